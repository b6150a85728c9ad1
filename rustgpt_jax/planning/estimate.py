"""Estimates of the memory of a compiled training step, per chip and purpose, and bounds on its time.

The step is compiled ahead of time by XLA:CPU, for virtual devices that need not exist. These differences from compilers
for accelerators are avoided:

- XLA:CPU computes bfloat16 products in float32, with copies of twice the size. The step uses float16 instead, which has
  the same size, and the pass that widens it is disabled.
- XLA:CPU uses an all-reduce for gradients where accelerators use a reduce-scatter. All-reduces are not combined, and
  one whose result is only sliced counts as a reduce-scatter (see `find_collectives`).
- Fused attention kernels exist only for accelerators. The step uses blockwise attention, which also never stores all
  scores.
- XLA:CPU has no kernel for jax.lax.ragged_dot. Dropless experts use blocked products, in blocks for CPUs.
- Saving residuals for gradients (`model.save_residuals`) is faster only with XLA:CPU, so it is turned off.
"""

import contextlib
import math
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from rustgpt_jax.config.schema import Config, find_auto_values, get_path, is_enabled, partition, replace_paths
from rustgpt_jax.config.validation import resolve
from rustgpt_jax.evaluation.loss import chunk_size
from rustgpt_jax.model.flops import matmul_flops, parameter_shapes, total_size, training_flops_per_token
from rustgpt_jax.model.mixers import MIXERS
from rustgpt_jax.planning import hlo
from rustgpt_jax.planning.hlo import Collective, HloProgram, Instruction, find_collectives, parse_arrays, parse_lengths
from rustgpt_jax.registry import lookup
from rustgpt_jax.sharding.hardware_specs import CHIPS, Chip, current_chip, resolve_auto_dtype
from rustgpt_jax.sharding.sharding_plan import ShardingPlan, axis_sizes
from rustgpt_jax.tracking.console import format_bytes, format_count
from rustgpt_jax.training.memory_estimate import batch_shapes, microbatch_loss, saved_bytes, state_shapes
from rustgpt_jax.training.train_step import train_step

# Costs of a program on one device: the FLOPs of matrix products, and the bytes that they read and write.
#
# XLA's cost analysis counts the body of a loop once; here it counts once per iteration. It also counts operations that
# XLA:CPU does not fuse; here all operations are assumed to be fused into matrix products.

_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")


def count_matmul_flops(program: HloProgram) -> float:
    """Count the FLOPs of the matrix products on a device: 2 m n k for each."""
    return sum(times * count_dot_flops(product, shapes) for times, product, shapes in _matrix_products(program))


def count_matmul_traffic(program: HloProgram) -> float:
    """Count the bytes that matrix products read and write.

    The largest array of a product with batch axes is not counted: these are products of attention, and the largest
    array holds its scores, which fused kernels do not store.
    """
    total = 0.0
    for times, product, shapes in _matrix_products(program):
        moved = [
            count_array_bytes(shape) for shape in (product.shape, *(shapes[operand] for operand in product.operands))
        ]
        total += times * (sum(moved) - max(moved) * ("lhs_batch_dims" in product.attributes))
    return total


def _matrix_products(program: HloProgram) -> Iterator[tuple[int, Instruction, dict[str, str]]]:
    """Yield each matrix product, how often it runs, and the shapes of its operands and result."""
    runs = program.count_runs()
    for name, body in program.computations.items():
        shapes = {each.name: each.shape for each in body}
        yield from ((runs[name], each, shapes) for each in body if each.opcode == "dot")


def count_dot_flops(product: Instruction, shapes: dict[str, str]) -> float:
    """Count the FLOPs of a matrix product, given the shapes of its computation by name."""
    left = parse_lengths(shapes[product.operands[0]])
    found = _CONTRACTED.search(product.attributes)
    contracted = [int(axis) for axis in found[1].split(",") if axis] if found else []
    return 2.0 * math.prod(parse_lengths(product.shape)) * math.prod(left[axis] for axis in contracted)


def count_array_bytes(shape: str) -> int:
    """Count the bytes of the arrays of a shape."""
    return sum(size for _, size in parse_arrays(shape))


# Warnings of the compiler, for example that an array must be gathered to be resharded.

_LOG_LINE = re.compile(r"^[WEF]\d{4} [\d:.]+\s+\d+ ([\w.]+):\d+\] (.*)$")
# The beginning of an explanation after the warning.
_EXPLANATION = " As the last resort"


@contextlib.contextmanager
def capture_compiler_log() -> Iterator[list[str]]:
    """Collect the compiler's warnings of a `with` block in a list.

    The compiler writes to the standard error stream of the process, which is redirected to a file meanwhile.
    """
    warnings: list[str] = []
    with tempfile.TemporaryFile() as file:
        before = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield warnings
        finally:
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            warnings += find_warnings(file.read().decode(errors="replace"))


def find_warnings(log: str) -> list[str]:
    """Return the distinct warnings and errors in a log, except those about a slow machine."""
    found = (_LOG_LINE.match(line) for line in log.splitlines())
    warnings = (line[2].split(_EXPLANATION)[0] for line in found if line and line[1] != "slow_operation_alarm.cc")
    return list(dict.fromkeys(warnings))


DTYPES = (
    "model.dtype",
    "model.precision.mixer_dtype",
    "model.precision.feedforward_dtype",
    "model.precision.logits_dtype",
    "model.precision.matmul_dtype",
)
COMPILER_OPTIONS: dict[str, str | bool] = {"xla_disable_hlo_passes": "change-op-data-type,cpu-all-reduce-combiner"}


@dataclass(frozen=True, eq=False)
class CompiledStep:
    """The costs of a compiled step on one device.

    Attributes:
        arguments: Bytes of the arguments.
        results: Bytes of the results.
        shared: Bytes of donated arguments, whose memory the results reuse.
        working: Peak bytes of temporary arrays.
        flops: FLOPs of all matrix products, including recomputation.
        traffic: A lower bound of the bytes read and written by matrix products and for the state.
        counted_once: FLOPs as counted by XLA, with the body of each loop counted once.
        collectives: The collectives of the step.
        warnings: The compiler's warnings.
    """

    arguments: int
    results: int
    shared: int
    working: int
    flops: float
    traffic: float
    counted_once: float
    collectives: tuple[Collective, ...]
    warnings: tuple[str, ...]

    @property
    def peak(self) -> int:
        """Peak memory of the step in bytes."""
        return self.arguments + self.results - self.shared + self.working


def compile_step(config: Config, seq_len: int, plan: ShardingPlan, for_cpu: bool = False) -> CompiledStep:
    """Compile one training step, sharded as in a run.

    Args:
        config: The config of the step.
        seq_len: The number of tokens of a sequence.
        plan: The mesh and the shardings.
        for_cpu: Whether to compile the step that would run on a CPU, without the changes for accelerators.
    """
    static, hparams = partition(config if for_cpu else _imitate_accelerator(config))
    state = plan.add_shardings(state_shapes(config))
    batch = batch_shapes(config.training.batch_size, seq_len)
    if plan.mesh is not None:
        batch = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=plan.batch_sharding(leaf.shape)), batch
        )
    with plan.use_mesh(), capture_compiler_log() as warnings:
        jitted = jax.jit(train_step, static_argnums=0, donate_argnums=1)
        lowered = jitted.lower(static, state, batch, hparams)
        compiled = lowered.compile(compiler_options={} if for_cpu else COMPILER_OPTIONS)
    memory, text, cost = compiled.memory_analysis(), compiled.as_text(), compiled.cost_analysis()
    assert memory is not None and text is not None and cost is not None, "XLA:CPU supports all of these"
    program = hlo.parse_hlo(text)
    return CompiledStep(
        arguments=memory.argument_size_in_bytes,
        results=memory.output_size_in_bytes,
        shared=memory.alias_size_in_bytes,
        working=memory.temp_size_in_bytes,
        flops=count_matmul_flops(program),
        traffic=count_matmul_traffic(program) + memory.argument_size_in_bytes + memory.output_size_in_bytes,
        counted_once=cost["flops"],
        collectives=tuple(find_collectives(text, plan.n_devices)),
        warnings=tuple(warnings),
    )


def _imitate_accelerator(config: Config) -> Config:
    """Replace bfloat16 by float16, custom gradients by JAX's, and kernels by portable ones."""
    dtypes = {path: "float16" for path in DTYPES if get_path(config, path) == "bfloat16"}
    return replace_paths(replace_device_kernels(config), dtypes)


def replace_device_kernels(config: Config) -> Config:
    """Replace custom gradients by JAX's, and kernels of libraries by portable ones, which any device can trace."""
    values: dict[str, Any] = {"model.save_residuals": False, "model.moe.kernel": "blocked"}
    if config.model.attention.kernel != "reference":
        values["model.attention.kernel"] = "portable" if is_enabled(config.model.dropout) else "blockwise"
    return replace_paths(config, values)


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
    """Compute how long each part of a step takes on a device, from FLOPs, bytes of memory traffic, and collectives."""
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


# config.model.remat='auto'.


def resolve_auto_values(
    values: dict[str, Any],
    overrides: dict[str, Any],
    origins: dict[str, str],
    platform: str | None = None,
    chip_name: str | None = None,
) -> None:
    """Replace each value 'auto' by the choice for a platform and a chip.

    Args:
        values: The values of a config by dotted path; modified in place.
        overrides: Values that replace them; modified in place.
        origins: The origin of each value; modified in place.
        platform: cpu, gpu or tpu; None for this process's device.
        chip_name: The chip of the platform, in `CHIPS`.
    """
    automatic = find_auto_values(values | overrides)
    if "model.dtype" in automatic:
        resolve_auto_dtype(values, overrides, origins, platform)
    if "model.remat" in automatic:
        chip = current_chip() if platform is None else CHIPS.get(chip_name or "")
        resolve_auto_remat(values, overrides, origins, chip)


def resolve_auto_remat(
    values: dict[str, Any], overrides: dict[str, Any], origins: dict[str, str], chip: Chip | None
) -> None:
    """Replace model.remat='auto' by the choice for a chip, and its origin by the reason; all are modified in place."""
    remat, reason = choose_remat(resolve(values, overrides | {"model.remat": "none"}), chip)
    (overrides if "model.remat" in overrides else values)["model.remat"] = remat
    origins["model.remat"] = f"auto: {reason}"


def choose_remat(config: Config, chip: Chip | None) -> tuple[str, str]:
    """Choose the faster of `none` and `dots_no_batch` on a chip, by the roofline model, and give the reason.

    `dots_no_batch` recomputes attention. It is faster if that takes less time than to write and read the arrays that it
    does not save.
    """
    if chip is None:
        return "none", "recomputation saves time on known accelerators only"
    model, seq_len = config.model, config.seq_len
    for name in model.mixers:
        if not hasattr(lookup(MIXERS, name, "config.model.mixers"), "attention_spec"):
            return "none", f"the roofline model counts only matrix products, and recomputing {name} takes more"
    one_row = {"training.batch_size": 1, "training.grad_accum_steps": 1, "model.n_layers": model.period}
    # This kernel saves what library kernels do.
    kernel = "portable" if is_enabled(model.dropout) else "blockwise"
    config = replace_paths(config, one_row | {"model.vocab_size": 1, "model.attention.kernel": kernel})
    flops, saved = {}, {}
    for remat in ("none", "dots_no_batch"):
        changed = replace_paths(config, {"model.remat": remat})
        loss, arguments = microbatch_loss(changed, seq_len)
        flops[remat] = matmul_flops(jax.make_jaxpr(jax.grad(loss))(*arguments).jaxpr) / seq_len / model.period
        saved[remat] = saved_bytes(changed, seq_len) / seq_len / model.period
    more, fewer = flops["dots_no_batch"] - flops["none"], saved["none"] - saved["dots_no_batch"]
    compute, memory = more / chip.flops(_dtype(config)), 2 * fewer / chip.bandwidth
    return (
        "dots_no_batch" if compute < memory else "none",
        f"per token and layer, dots_no_batch recomputes {format_count(more)} FLOPs, {1e9 * compute:.3g} ns at peak, "
        f"and saves {format_bytes(fewer)} less, {1e9 * memory:.3g} ns to write and read",
    )


# The share of a chip's memory for its driver, buffers of collectives, and gaps between arrays.
RESERVE = 0.1


@dataclass(frozen=True)
class Memory:
    """Bytes of memory on a device at the peak of a step, by purpose.

    The sizes of parameters, optimizer state and batch are known. Of the rest, gradients take as much as parameters, and
    the remainder is attributed to activations and temporary copies. Offloaded optimizer state lies in host memory, and
    is copied to the device when the activations are no longer needed.
    """

    parameters: int
    optimizer: int
    batch: int
    gradients: int
    activations: int
    host: int = 0

    @property
    def peak(self) -> int:
        """Total bytes on the device."""
        return self.parameters + self.optimizer + self.batch + self.gradients + self.activations


@dataclass(frozen=True, eq=False)
class Estimate:
    """Estimated per-chip resources of one training step.

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
        """Return the model FLOPs utilization (arXiv 2204.02311, appendix B) of a step of this duration."""
        return self.model_flops / (self.chip.flops(_dtype(self.config)) * seconds)


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
    if config.optimizer.offload_state:
        return Memory(parameters, 0, batch, gradients, max(rest, optimizer), host=optimizer)
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

# The number of tokens on each chip whose logits are in memory at once.
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
    chunk = min(rows * seq_len, chunk_size(config.training.loss_chunk_size, config.model))
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
