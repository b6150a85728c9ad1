"""Estimate the memory of a training step per chip by purpose, and bounds on its time."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, NamedTuple

import jax

from rustgpt_jax.config.schema import Config, replace_paths
from rustgpt_jax.model.flops import parameter_shapes, total_size, training_flops_per_token
from rustgpt_jax.planning.aot_compile import CompiledStep, build_sharded_state, compile_step
from rustgpt_jax.planning.hlo import Collective
from rustgpt_jax.sharding.hardware_specs import Chip
from rustgpt_jax.sharding.sharding_plan import ShardingPlan, axis_sizes

# How fast a chip could be at best (the roofline, Williams and others 2009): bounds on the time of a step.
#
# Nothing here knows how well a program does; a measured step takes longer than the lower bound.


@dataclass(frozen=True)
class StepTime:
    """Seconds of the parts of a step on a device: matrix products, memory traffic, collectives."""

    compute: float
    memory: float
    collectives: float

    @property
    def overlapped(self) -> float:
        """Seconds of a step whose parts overlap fully."""
        return max(self.compute, self.memory, self.collectives)

    @property
    def exposed(self) -> float:
        """Seconds of a step that waits for each collective."""
        return max(self.compute, self.memory) + self.collectives

    @property
    def limit(self) -> str:
        """The longest part."""
        parts = {"compute": self.compute, "memory": self.memory, "collectives": self.collectives}
        return max(parts, key=lambda name: parts[name])


def compute_step_time(chip: Chip, dtype: str, flops: float, traffic: float, found: Iterable[Collective]) -> StepTime:
    """Compute the time of the parts of a step per device, from FLOPs, memory traffic in bytes, and collectives."""
    return StepTime(
        flops / chip.flops(dtype), traffic / chip.bandwidth, sum(compute_collective_time(each, chip) for each in found)
    )


def compute_collective_time(each: Collective, chip: Chip) -> float:
    """Compute the seconds of all runs of a collective, at full bandwidth and without latency.

    Devices are numbered node by node, `chip.linked` to each. A group with members on several nodes is as fast as the
    network lets it be: its members on a node receive together, each by its own adapter, what the node lacks.
    """
    fast = each.total / chip.links
    nodes = [Counter(device // chip.linked for device in group) for group in each.groups]
    if max(map(len, nodes), default=1) == 1:
        return fast
    if each.kind == "collective-permute":
        return each.total / chip.network
    members = min(min(own.values()) for own in nodes)
    return max(fast, each.total / (members * chip.network))


def compute_utilization(chip: Chip, dtype: str, model_flops: float, seconds: float) -> float:
    """Compute the model FLOPs utilization (arXiv 2204.02311, appendix B).

    model_flops: of a step on a device, without recomputation.
    """
    return model_flops / (chip.flops(dtype) * seconds)


# Of a chip's memory: for its driver, the buffers of collectives, and gaps between arrays.
RESERVE = 0.1


@dataclass(frozen=True)
class Memory:
    """Bytes on a device at the peak of its step.

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
    """The estimated resources of a step of a config, per chip.

    model_flops: what the model needs, without recomputation; the compiled step's own are in `compiled`.
    """

    config: Config
    window: int
    mesh: dict[str, int]
    n_devices: int
    chip: Chip
    n_parameters: int
    memory: Memory
    compiled: CompiledStep
    model_flops: float
    seconds: StepTime

    @property
    def room(self) -> float:
        """Bytes that a chip has available for a step."""
        return (1 - RESERVE) * self.chip.memory

    @property
    def fits(self) -> bool:
        """Whether the step fits in the memory of a chip."""
        return self.memory.peak <= self.room

    def utilization(self, seconds: float) -> float:
        """Return the model FLOPs utilization of a step of this duration."""
        return compute_utilization(self.chip, _dtype(self.config), self.model_flops, seconds)


def estimate(config: Config, window: int, placement: ShardingPlan, chip: Chip) -> Estimate:
    """Estimate the resources of a step of a config by compiling it."""
    compiled = compile_step(config, window, placement)
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
        seconds=compute_step_time(chip, _dtype(config), compiled.flops, compiled.traffic, compiled.collectives),
    )


def _memory(config: Config, placement: ShardingPlan, compiled: CompiledStep) -> Memory:
    state = build_sharded_state(config, placement)
    parameters, optimizer = count_bytes_on_device(state.params), count_bytes_on_device(state.opt_state)
    batch = max(0, compiled.arguments - count_bytes_on_device(state))
    gradients = min(parameters, compiled.working)
    rest = compiled.peak - parameters - optimizer - batch - gradients
    return Memory(parameters, optimizer, batch, gradients, max(0, rest))


def count_bytes_on_device(tree: Any) -> int:
    """Count the bytes of a tree of sharded shapes that one device holds."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _dtype(config: Config) -> str:
    """Return the dtype of most matrix products."""
    return config.model.precision.matmul_dtype or config.model.dtype


# Single changes of a config that save memory on a device.

# Tokens of a row whose logits exist at a time.
LOSS_CHUNK = 512
MOST_TENSOR = 8


class Suggestion(NamedTuple):
    """Changed knobs of a config."""

    knobs: dict[str, int | str]

    def apply_to(self, config: Config) -> Config:
        """Return the config with the change."""
        return replace_paths(config, self.knobs)

    def __str__(self) -> str:
        return " ".join(f"--config.{path}={value}" for path, value in self.knobs.items())


def list_suggestions(config: Config, window: int, n_devices: int) -> Iterator[list[Suggestion]]:
    """Yield the changes of each kind, smallest first, except those that the config already has."""
    sizes = axis_sizes(config.mesh, n_devices)
    shares = sizes["data"] * sizes["fsdp"] * sizes["expert"]
    yield _accumulation(config, shares)
    yield [Suggestion({"model.remat": "full"})] if config.model.remat in ("none", "dots", "dots_no_batch") else []
    chunk = config.training.loss_chunk_size or window
    yield [Suggestion({"training.loss_chunk_size": LOSS_CHUNK})] if chunk > LOSS_CHUNK else []
    yield [Suggestion({"mesh.data": data, "mesh.fsdp": fsdp}) for data, fsdp in _moved(sizes["data"], sizes["fsdp"])]
    yield _tensor(config, sizes)


def _accumulation(config: Config, shares: int) -> list[Suggestion]:
    training = config.training
    rows = training.batch_size // training.grad_accum_steps // shares
    return [
        Suggestion({"training.grad_accum_steps": factor * training.grad_accum_steps}) for factor in _doublings(rows)
    ]


def _tensor(config: Config, sizes: dict[str, int]) -> list[Suggestion]:
    """Suggest more devices along tensor, taken from data, or from fsdp if data is 1."""
    giver = "data" if sizes["data"] > 1 else "fsdp"
    heads = config.model.attention.kv_heads
    found = []
    for left, tensor in _moved(sizes[giver], sizes["tensor"]):
        if tensor <= MOST_TENSOR and heads % tensor == 0:
            found.append(Suggestion({f"mesh.{giver}": left, "mesh.tensor": tensor}))
    return found


def _moved(giver: int, taker: int) -> list[tuple[int, int]]:
    """Return the axis sizes after moving devices from one axis to another, by powers of two."""
    return [(giver // factor, taker * factor) for factor in _doublings(giver)]


def _doublings(most: int) -> list[int]:
    """Return the powers of two that divide a number, from 2 on."""
    powers = (2**power for power in range(1, most.bit_length()))
    return list(takewhile(lambda factor: most % factor == 0, powers))
