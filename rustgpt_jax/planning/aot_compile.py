"""Ahead-of-time compilation of the training step of a config, for devices that need not exist.

The step is compiled by XLA:CPU for virtual devices. These differences from compilers for accelerators are avoided:

- XLA:CPU computes bfloat16 products in float32, with copies of twice the size. The step uses float16 instead, which has
  the same size, and the pass that widens it is disabled.
- XLA:CPU uses an all-reduce for gradients where accelerators use a reduce-scatter. All-reduces are not combined, and
  one whose result is only sliced counts as a reduce-scatter (see `find_collectives`).
- Fused attention kernels exist only for accelerators. The step uses blockwise attention, which also never stores all
  scores.
- Saving residuals for gradients (`model.save_residuals`) is faster only with XLA:CPU, so it is turned off.
"""

import contextlib
import math
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax

from rustgpt_jax.config.schema import Config, get_path, is_enabled, partition, replace_paths
from rustgpt_jax.planning import hlo
from rustgpt_jax.planning.hlo import Collective, HloProgram, Instruction, find_collectives, parse_arrays, parse_lengths
from rustgpt_jax.sharding.sharding_plan import ShardingPlan
from rustgpt_jax.training.memory_estimate import batch_shapes, state_shapes
from rustgpt_jax.training.train_step import train_step

# Costs of a program on one device: the FLOPs of matrix products, and the bytes that they read and write.
#
# XLA's cost analysis counts the body of a loop once; here it counts once per iteration. It also counts operations that
# XLA:CPU does not fuse; here all operations are assumed to be fused into matrix products.

_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")


def count_matmul_flops(program: HloProgram) -> float:
    """Count the FLOPs of the matrix products on a device: 2 m n k for each."""
    return sum(times * _flops(product, shapes) for times, product, shapes in _matrix_products(program))


def count_matmul_traffic(program: HloProgram) -> float:
    """Count the bytes that matrix products read and write.

    The largest array of a product with batch axes is not counted: these are products of attention, and the largest
    array holds its scores, which fused kernels do not store.
    """
    total = 0.0
    for times, product, shapes in _matrix_products(program):
        moved = [_array_bytes(shape) for shape in (product.shape, *(shapes[operand] for operand in product.operands))]
        total += times * (sum(moved) - max(moved) * ("lhs_batch_dims" in product.attributes))
    return total


def _matrix_products(program: HloProgram) -> Iterator[tuple[int, Instruction, dict[str, str]]]:
    """Yield each matrix product, how often it runs, and the shapes of its operands and result."""
    runs = program.count_runs()
    for name, body in program.computations.items():
        shapes = {each.name: each.shape for each in body}
        yield from ((runs[name], each, shapes) for each in body if each.opcode == "dot")


def _flops(product: Instruction, shapes: dict[str, str]) -> float:
    left = parse_lengths(shapes[product.operands[0]])
    found = _CONTRACTED.search(product.attributes)
    contracted = [int(axis) for axis in found[1].split(",") if axis] if found else []
    return 2.0 * math.prod(parse_lengths(product.shape)) * math.prod(left[axis] for axis in contracted)


def _array_bytes(shape: str) -> int:
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
    """Replace bfloat16 by float16, custom gradients by JAX's, and the attention kernel by a portable one."""
    values: dict[str, Any] = {path: "float16" for path in DTYPES if get_path(config, path) == "bfloat16"}
    values["model.save_residuals"] = False
    if config.model.attention.kernel != "plain":
        values["model.attention.kernel"] = "portable" if is_enabled(config.model.dropout) else "blockwise"
    return replace_paths(config, values)
