"""Estimates of the memory of a training step, per chip and purpose, and bounds on its time."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from rustgpt_jax.config.schema import Config, replace_paths
from rustgpt_jax.model.flops import parameter_shapes, total_size, training_flops_per_token
from rustgpt_jax.planning.aot_compile import CompiledStep, compile_step
from rustgpt_jax.planning.hlo import Collective
from rustgpt_jax.sharding.hardware_specs import Chip
from rustgpt_jax.sharding.sharding_plan import ShardingPlan, axis_sizes
from rustgpt_jax.training.memory_estimate import state_shapes

# Lower bounds on the time of a step, by the roofline model (Williams et al., 2009). A measured step takes longer.


@dataclass(frozen=True)
class StepTime:
    """Seconds of the matrix products, memory traffic and collectives of a step on a device."""

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
        """The name of the longest part."""
        parts = {"compute": self.compute, "memory": self.memory, "collectives": self.collectives}
        return max(parts, key=lambda name: parts[name])


def compute_step_time(chip: Chip, dtype: str, flops: float, traffic: float, found: Iterable[Collective]) -> StepTime:
    """Compute the time of the parts of a step on a device, from FLOPs, memory traffic in bytes, and collectives."""
    return StepTime(
        flops / chip.flops(dtype), traffic / chip.bandwidth, sum(compute_collective_time(each, chip) for each in found)
    )


def compute_collective_time(each: Collective, chip: Chip) -> float:
    """Compute the seconds of all runs of a collective, at full bandwidth and without latency.

    Devices are numbered node by node, with `chip.linked` devices per node. For a group that spans several nodes, the
    network is the bottleneck: the members on a node share the data that the node receives among their adapters.
    """
    fast = each.total / chip.links
    nodes = [Counter(device // chip.linked for device in group) for group in each.groups]
    if max(map(len, nodes), default=1) == 1:
        return fast
    if each.kind == "collective-permute":
        return each.total / chip.network
    members = min(min(counts.values()) for counts in nodes)
    return max(fast, each.total / (members * chip.network))


def compute_utilization(chip: Chip, dtype: str, model_flops: float, seconds: float) -> float:
    """Compute the model FLOPs utilization (arXiv 2204.02311, appendix B).

    Args:
        chip: The chip.
        dtype: The data type of the matrix products.
        model_flops: FLOPs of a step on a device, without recomputation.
        seconds: The duration of a step.
    """
    return model_flops / (chip.flops(dtype) * seconds)


# The share of a chip's memory for its driver, buffers of collectives, and gaps between arrays.
RESERVE = 0.1


@dataclass(frozen=True)
class Memory:
    """Bytes of memory on a device at the peak of a step, by purpose.

    The sizes of parameters, optimizer state and batch are known. Of the rest, gradients take as much as parameters, and
    the remainder is attributed to activations and temporary copies.
    """

    parameters: int
    optimizer: int
    batch: int
    gradients: int
    activations: int

    @property
    def peak(self) -> int:
        """Total bytes."""
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True, eq=False)
class Estimate:
    """The estimated resources of a step of a config, per chip.

    `model_flops` are the FLOPs of the model without recomputation; `compiled.flops` are those of the compiled step.
    """

    config: Config
    seq_len: int
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
        """The bytes that a chip has available for a step."""
        return (1 - RESERVE) * self.chip.memory

    @property
    def fits(self) -> bool:
        """True if the step fits in the memory of a chip."""
        return self.memory.peak <= self.room

    def utilization(self, seconds: float) -> float:
        """Return the model FLOPs utilization of a step of this duration."""
        return compute_utilization(self.chip, _dtype(self.config), self.model_flops, seconds)


def estimate(config: Config, seq_len: int, plan: ShardingPlan, chip: Chip) -> Estimate:
    """Estimate the resources of a step of a config by compiling it."""
    compiled = compile_step(config, seq_len, plan)
    tokens = config.training.batch_size * seq_len / plan.n_devices
    return Estimate(
        config=config,
        seq_len=seq_len,
        mesh=plan.sizes or {"data": 1},
        n_devices=plan.n_devices,
        chip=chip,
        n_parameters=total_size(parameter_shapes(config.model)),
        memory=_split_memory(config, plan, compiled),
        compiled=compiled,
        model_flops=tokens * training_flops_per_token(config.model, seq_len),
        seconds=compute_step_time(chip, _dtype(config), compiled.flops, compiled.traffic, compiled.collectives),
    )


def _split_memory(config: Config, plan: ShardingPlan, compiled: CompiledStep) -> Memory:
    state = plan.add_shardings(state_shapes(config))
    parameters, optimizer = count_bytes_on_device(state.params), count_bytes_on_device(state.opt_state)
    batch = max(0, compiled.arguments - count_bytes_on_device(state))
    gradients = min(parameters, compiled.working)
    rest = compiled.peak - parameters - optimizer - batch - gradients
    return Memory(parameters, optimizer, batch, gradients, max(0, rest))


def count_bytes_on_device(tree: Any) -> int:
    """Count the bytes of a tree of sharded shapes on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _dtype(config: Config) -> str:
    """Return the dtype of most matrix products."""
    return config.model.precision.matmul_dtype or config.model.dtype


# Single changes of a config that save memory.

# The number of tokens per row whose logits are in memory at once.
LOSS_CHUNK_SIZE = 512
MAX_TENSOR_PARALLEL = 8


class Suggestion(NamedTuple):
    """A change of a config, as values by field."""

    values: dict[str, int | str]

    def apply_to(self, config: Config) -> Config:
        """Return the config with the change."""
        return replace_paths(config, self.values)

    def __str__(self) -> str:
        return " ".join(f"--config.{path}={value}" for path, value in self.values.items())


def list_suggestions(config: Config, seq_len: int, n_devices: int) -> Iterator[list[Suggestion]]:
    """Yield the changes of each kind, smallest first, except changes that the config already has."""
    sizes = axis_sizes(config.mesh, n_devices)
    n_shards = sizes["data"] * sizes["fsdp"] * sizes["expert"]
    steps = config.training.grad_accum_steps
    rows = config.training.batch_size // steps // n_shards
    yield [Suggestion({"training.grad_accum_steps": factor * steps}) for factor in _power_of_two_divisors(rows)]
    yield [Suggestion({"model.remat": "full"})] if config.model.remat in ("none", "dots", "dots_no_batch") else []
    chunk = config.training.loss_chunk_size or seq_len
    yield [Suggestion({"training.loss_chunk_size": LOSS_CHUNK_SIZE})] if chunk > LOSS_CHUNK_SIZE else []
    yield [
        Suggestion({"mesh.data": sizes["data"] // factor, "mesh.fsdp": sizes["fsdp"] * factor})
        for factor in _power_of_two_divisors(sizes["data"])
    ]
    # More tensor parallelism with devices of the data axis, or of fsdp if data is 1.
    source = "data" if sizes["data"] > 1 else "fsdp"
    heads = config.model.attention.kv_heads
    yield [
        Suggestion({f"mesh.{source}": sizes[source] // factor, "mesh.tensor": tensor})
        for factor in _power_of_two_divisors(sizes[source])
        if (tensor := sizes["tensor"] * factor) <= MAX_TENSOR_PARALLEL and heads % tensor == 0
    ]


def _power_of_two_divisors(number: int) -> list[int]:
    """Return the powers of two that divide a number, starting with 2."""
    return [2**power for power in range(1, number.bit_length()) if number % 2**power == 0]
