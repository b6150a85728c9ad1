"""What a compiled program does on one device at least: FLOPs of its matrix products, and bytes that they move.

XLA's own analysis counts the body of each loop once; here it counts as often as the loop turns. It also counts what the
compiler of CPUs fuses badly; here everything but matrix products is taken to be fused into them.
"""

import math
import re
from collections.abc import Iterator

from rustgpt_jax.planning.hlo import Instruction, Program, arrays, lengths

_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")


def product_flops(program: Program) -> float:
    """2 m n k for each matrix product that a device computes."""
    return sum(times * _flops(product, shapes) for times, product, shapes in _products(program))


def product_traffic(program: Program) -> float:
    """Bytes of what matrix products read and write.

    The largest array of a product with batch axes is left out: these are the products of attention, and its scores,
    which a fused kernel never writes.
    """
    total = 0.0
    for times, product, shapes in _products(program):
        moved = [_bytes(shape) for shape in (product.shape, *(shapes[operand] for operand in product.operands))]
        total += times * (sum(moved) - max(moved) * ("lhs_batch_dims" in product.attributes))
    return total


def _products(program: Program) -> Iterator[tuple[int, Instruction, dict[str, str]]]:
    """Each matrix product, how often it runs, and the shapes of what stands beside it."""
    times = program.times()
    for name, body in program.computations.items():
        shapes = {each.name: each.shape for each in body}
        yield from ((times[name], each, shapes) for each in body if each.opcode == "dot")


def _flops(product: Instruction, shapes: dict[str, str]) -> float:
    left = lengths(shapes[product.operands[0]])
    found = _CONTRACTED.search(product.attributes)
    contracted = [int(axis) for axis in found[1].split(",") if axis] if found else []
    return 2.0 * math.prod(lengths(product.shape)) * math.prod(left[axis] for axis in contracted)


def _bytes(shape: str) -> int:
    return sum(size for _, size in arrays(shape))
