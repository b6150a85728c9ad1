"""What a training step needs of each chip: memory by what it is for, and bounds on its time."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import jax

from rustgpt_jax.config.schema import Config
from rustgpt_jax.model.flops import parameter_shapes, total_size, training_flops_per_token
from rustgpt_jax.planning.aot_compile import Compiled, compiled_step, placed_state
from rustgpt_jax.planning.roofline import Seconds, step_seconds, utilization
from rustgpt_jax.sharding.hardware_specs import Chip
from rustgpt_jax.sharding.sharding_plan import Placement

# Of a chip's memory: for its driver, the buffers of collectives, and gaps between arrays.
RESERVE = 0.1


@dataclass(frozen=True)
class Memory:
    """Bytes on a device when its step holds most.

    Parameters, optimizer state and batch are there all the time, and their sizes known. Of what the compiler needs
    beside them, gradients take as much as parameters do; the rest are activations, and copies that the step makes.
    """

    parameters: int
    optimizer: int
    batch: int
    gradients: int
    activations: int

    @property
    def peak(self) -> int:
        """All of it."""
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True, eq=False)
class Estimate:
    """A step of a config on chips: what it needs of each of them.

    model_flops: what the model needs, without recomputation; the compiled step's own are in `compiled`.
    """

    config: Config
    window: int
    mesh: dict[str, int]
    n_devices: int
    chip: Chip
    n_parameters: int
    memory: Memory
    compiled: Compiled
    model_flops: float
    seconds: Seconds

    @property
    def room(self) -> float:
        """Bytes that a chip has for a step."""
        return (1 - RESERVE) * self.chip.memory

    @property
    def fits(self) -> bool:
        """Whether a chip has the memory."""
        return self.memory.peak <= self.room

    def utilization(self, seconds: float) -> float:
        """Model FLOPs utilisation of a step that takes so long."""
        return utilization(self.chip, _dtype(self.config), self.model_flops, seconds)


def estimate(config: Config, window: int, placement: Placement, chip: Chip) -> Estimate:
    """What a step of a config needs, by compiling it."""
    compiled = compiled_step(config, window, placement)
    tokens = config.training.batch_size * window / placement.n_devices
    return Estimate(
        config=config,
        window=window,
        mesh=placement.sizes or {"data": 1},
        n_devices=placement.n_devices,
        chip=chip,
        n_parameters=total_size(parameter_shapes(config.model)),
        memory=_memory(config, placement, compiled),
        compiled=compiled,
        model_flops=tokens * training_flops_per_token(config.model, window),
        seconds=step_seconds(chip, _dtype(config), compiled.flops, compiled.traffic, compiled.collectives),
    )


def _memory(config: Config, placement: Placement, compiled: Compiled) -> Memory:
    state = placed_state(config, placement)
    parameters, optimizer = bytes_on_device(state.params), bytes_on_device(state.opt_state)
    batch = max(0, compiled.arguments - bytes_on_device(state))
    gradients = min(parameters, compiled.working)
    rest = compiled.peak - parameters - optimizer - batch - gradients
    return Memory(parameters, optimizer, batch, gradients, max(0, rest))


def bytes_on_device(tree: Any) -> int:
    """Bytes that one device holds of a tree of placed shapes."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _dtype(config: Config) -> str:
    """The type of most matrix products."""
    return config.model.dtype if config.model.matmul == "plain" else config.model.matmul
