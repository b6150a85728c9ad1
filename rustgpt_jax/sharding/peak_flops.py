"""The devices of this process: how fast they could be."""

import time
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from rustgpt_jax.sharding.hardware_specs import CHIPS

# Peak dense bfloat16 FLOP/s, by what JAX calls the chip.
PEAK_FLOPS = {chip.kind: chip.bfloat16 for chip in CHIPS.values()}


@cache
def device_peak_flops() -> float:
    """FLOP/s that one device could do at best: from a data sheet, or else of a float32 matrix product timed once."""
    kind = jax.devices()[0].device_kind
    for name, peak in PEAK_FLOPS.items():
        if name.lower() in kind.lower():
            return peak
    return _timed_matrix_product()


def _timed_matrix_product(size: int = 1024, repeats: int = 3) -> float:
    product = jax.jit(jnp.dot)
    matrix = np.ones((size, size), np.float32)
    product(matrix, matrix).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)
