"""Check that rounding errors do not grow along long rows."""

import dataclasses

import jax
import numpy as np

from rustgpt_jax.config.schema import ModelConfig
from rustgpt_jax.conformance import fixtures
from rustgpt_jax.conformance.assertions import Broken, require_finite
from rustgpt_jax.conformance.long_row_checks import LONGEST, Packed, forward, long_model, whole_rows
from rustgpt_jax.conformance.targets import Subject
from rustgpt_jax.model.flops import parameter_shapes

# Token ranges whose median errors are compared: near the beginning, where bfloat16 represents every position exactly,
# and at the end.
EARLY, LATE = slice(64, 256), slice(LONGEST - 512, LONGEST)
# Largest allowed ratio of the error at the end to the error near the beginning. For attention it is below 1.5.
MOST_GROWTH = 3.0
# Quantile of the output errors. Smaller errors come from single operations; larger ones are wrong at any position.
# Rounding can change a few tokens a lot, for example by changing the choice of an expert, so those are ignored.
COUNTED = 0.95
NOISE = {"bfloat16": 3e-3, "float32": 1e-6}
MOST = {"bfloat16": 0.2, "float32": 1e-3}


def drift(subject: Subject) -> str:
    """Check that over 4,096 tokens, bfloat16 and float32 errors against float64 grow no faster than attention's.

    Uses initial parameters, whose decays are as slow as at the beginning of training.
    """
    model = _with_one_head(long_model(subject.small_model))
    params = fixtures.initial_params(model)
    packed = whole_rows(model, 1, LONGEST)
    with jax.enable_x64(True):
        double = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
        exact = Packed(packed.x_BTD.astype(np.float64), *packed[1:])
        expected = forward(double, exact, dataclasses.replace(model, dtype="float64"))
    require_finite(expected, f"in float64 an output is not finite in a row of {LONGEST} tokens", ("row", "token"))
    notes = []
    for dtype in ("float32", "bfloat16"):
        found = forward(params, packed, dataclasses.replace(model, dtype=dtype)).astype(np.float64)
        require_finite(found, f"in {dtype} an output is not finite in a row of {LONGEST} tokens", ("row", "token"))
        error_T = np.sqrt(np.mean(np.square(found - expected), axis=(0, 2)) / np.mean(np.square(expected)))
        early, late = (float(np.median(error_T[places])) for places in (EARLY, LATE))
        most = float(np.quantile(error_T, COUNTED))
        growth = late / max(early, NOISE[dtype])
        if not (growth <= MOST_GROWTH and most <= MOST[dtype]):
            raise Broken(
                f"the error of {dtype} grows along the row",
                f"tokens {LATE.start} to {LATE.stop}",
                f"{late:.2g} of the outputs there and {early:.2g} at tokens {EARLY.start} to {EARLY.stop}, "
                f"{most:.2g} in {COUNTED:.0%} of all ({MOST_GROWTH:.2g} times as much, and {MOST[dtype]:.0e}, may be)",
            )
        notes.append(f"{dtype} {early:.1g} to {late:.1g}")
    return f"error over {LONGEST} tokens: {', '.join(notes)}"


def _with_one_head(model: ModelConfig) -> ModelConfig:
    """Return the model with one head if its parameters can be initialized that way: scores of long rows are large."""
    one = dataclasses.replace(model, n_heads=1, n_kv_heads=1, head_dim=model.head_width)
    try:
        parameter_shapes(one)
    except Exception:
        return model
    return one
