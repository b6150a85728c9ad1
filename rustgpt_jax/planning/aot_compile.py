"""Compile the training step of a config ahead of time, for devices that need not exist.

It is compiled by the compiler of CPUs, for as many virtual ones as there would be devices. Where that compiler would do
what one for accelerators does not, it is kept from it:

- It computes products of bfloat16 in float32, so that its copies of weights and activations have twice the size. So
  float16 stands in for bfloat16: of the same size, and left as it is with the pass that widens it switched off.
- It adds up gradients whole where an accelerator scatters their sums. So sums are not combined into one, and one of
  which only a slice is used is read as a reduce-scatter (see `find_collectives`).
- Kernels of attention that never hold all scores are those of accelerators; blockwise attention, which holds a block of
  them, stands in for these.
- Gradients from arrays that are kept for it (see `model.save_residuals`) are faster with this compiler alone.
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
from rustgpt_jax.data.pipeline import Batch
from rustgpt_jax.planning import hlo
from rustgpt_jax.planning.hlo import Collective, HloProgram, Instruction, find_collectives, parse_arrays, parse_lengths
from rustgpt_jax.sharding.sharding_plan import ShardingPlan
from rustgpt_jax.training.memory_estimate import batch_shapes, state_shapes
from rustgpt_jax.training.train_step import State, train_step

# What a compiled program does on one device at least: FLOPs of its matrix products, and bytes that they move.
#
# XLA's own analysis counts the body of each loop once; here it counts as often as the loop turns. It also counts what
# the compiler of CPUs fuses badly; here everything but matrix products is taken to be fused into them.

_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")


def count_matmul_flops(program: HloProgram) -> float:
    """Count the FLOPs of the matrix products of a device: 2 m n k for each."""
    return sum(times * _flops(product, shapes) for times, product, shapes in _products(program))


def count_matmul_traffic(program: HloProgram) -> float:
    """Count the bytes that matrix products read and write.

    The largest array of a product with batch axes is left out: these are the products of attention, and its scores,
    which a fused kernel never writes.
    """
    total = 0.0
    for times, product, shapes in _products(program):
        moved = [_bytes(shape) for shape in (product.shape, *(shapes[operand] for operand in product.operands))]
        total += times * (sum(moved) - max(moved) * ("lhs_batch_dims" in product.attributes))
    return total


def _products(program: HloProgram) -> Iterator[tuple[int, Instruction, dict[str, str]]]:
    """Yield each matrix product, how often it runs, and the shapes of its operands and result."""
    times = program.times()
    for name, body in program.computations.items():
        shapes = {each.name: each.shape for each in body}
        yield from ((times[name], each, shapes) for each in body if each.opcode == "dot")


def _flops(product: Instruction, shapes: dict[str, str]) -> float:
    left = parse_lengths(shapes[product.operands[0]])
    found = _CONTRACTED.search(product.attributes)
    contracted = [int(axis) for axis in found[1].split(",") if axis] if found else []
    return 2.0 * math.prod(parse_lengths(product.shape)) * math.prod(left[axis] for axis in contracted)


def _bytes(shape: str) -> int:
    return sum(size for _, size in parse_arrays(shape))


# What the compiler warns of, such as arrays that it can lay out as asked only by gathering them whole.

_LOGGED = re.compile(r"^[WEF]\d{4} [\d:.]+\s+\d+ ([\w.]+):\d+\] (.*)$")
# What it says of itself after that.
_APOLOGY = " As the last resort"


@contextlib.contextmanager
def capture_compiler_log() -> Iterator[list[str]]:
    """Collect the compiler's warnings of a `with` block in a list.

    The compiler is not Python and writes to the process's standard error stream, which nobody else hears meanwhile.
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
    found = (_LOGGED.match(line) for line in log.splitlines())
    told = (line[2].split(_APOLOGY)[0] for line in found if line and line[1] != "slow_operation_alarm.cc")
    return list(dict.fromkeys(told))


DTYPES = (
    "model.dtype",
    "model.precision.mixer_dtype",
    "model.precision.feedforward_dtype",
    "model.precision.logits_dtype",
    "model.precision.matmul_dtype",
)
OPTIONS: dict[str, str | bool] = {"xla_disable_hlo_passes": "change-op-data-type,cpu-all-reduce-combiner"}


@dataclass(frozen=True, eq=False)
class CompiledStep:
    """Bytes, FLOPs, collectives and warnings of a compiled step, for one device.

    arguments, results, shared: bytes of what goes in, what comes out, and what of these is the same memory.
    working: bytes of everything else that the step holds at its fullest.
    flops: of all matrix products, what is computed again among them. traffic: bytes that these, and the reading and
    writing of the state, move at least. counted_once: FLOPs as XLA counts them, the body of each loop once.
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


def compile_step(config: Config, window: int, placement: ShardingPlan, for_cpu: bool = False) -> CompiledStep:
    """Compile one training step on sequences of `window` tokens, sharded as in a run.

    for_cpu: as this compiler makes it for a CPU, and nothing stands in for anything.
    """
    static, hparams = partition(config if for_cpu else _stand_in(config))
    state = build_sharded_state(config, placement)
    batch = _placed(batch_shapes(config.training.batch_size, window), placement)
    with placement.active(), capture_compiler_log() as warnings:
        jitted = jax.jit(train_step, static_argnums=0, donate_argnums=1)
        lowered = jitted.lower(static, state, batch, hparams)
        compiled = lowered.compile(compiler_options={} if for_cpu else OPTIONS)
    memory, text, cost = compiled.memory_analysis(), compiled.as_text(), compiled.cost_analysis()
    assert memory is not None and text is not None and cost is not None, "the compiler of CPUs tells all of these"
    program = hlo.parse_hlo(text)
    return CompiledStep(
        arguments=memory.argument_size_in_bytes,
        results=memory.output_size_in_bytes,
        shared=memory.alias_size_in_bytes,
        working=memory.temp_size_in_bytes,
        flops=count_matmul_flops(program),
        traffic=count_matmul_traffic(program) + memory.argument_size_in_bytes + memory.output_size_in_bytes,
        counted_once=cost["flops"],
        collectives=tuple(find_collectives(text, placement.n_devices)),
        warnings=tuple(warnings),
    )


def build_sharded_state(config: Config, placement: ShardingPlan) -> State:
    """Build the state of a run as shapes and dtypes with shardings."""
    return placement.abstract(state_shapes(config))


def _stand_in(config: Config) -> Config:
    """Replace bfloat16 by float16, custom gradients by JAX's, and the attention kernel by a portable one."""
    values: dict[str, Any] = {path: "float16" for path in DTYPES if get_path(config, path) == "bfloat16"}
    values["model.save_residuals"] = False
    if config.model.attention.kernel != "plain":
        values["model.attention.kernel"] = "portable" if is_enabled(config.model.dropout) else "blockwise"
    return replace_paths(config, values)


def _placed(batch: Batch, placement: ShardingPlan) -> Batch:
    if placement.mesh is None:
        return batch
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement.batch_sharding(leaf.shape)), batch
    )
