"""What kind of part something is, to judge by what it has."""

import inspect
from functools import partial
from typing import Any

from rustgpt_jax.model.positions import PositionEncoding

MIXER, FEEDFORWARD, NORM, POSITION = "a mixer", "a feed-forward", "a norm", "a position scheme"

LOOKS = {
    MIXER: "a Flax module with init_cache(config, batch, length) and __call__(x, context, cache)",
    FEEDFORWARD: "a Flax module with __call__(x, context)",
    NORM: "a Flax module with __call__(x)",
    POSITION: "a PositionScheme",
}


def component_kind(part: Any) -> str | None:
    """MIXER, FEEDFORWARD, NORM or POSITION; None for what is none of them."""
    if isinstance(part, PositionEncoding):
        return POSITION
    module = part.func if isinstance(part, partial) else part
    if not (inspect.isclass(module) and hasattr(module, "init") and hasattr(module, "apply")):
        return None
    arguments = list(inspect.signature(module.__call__).parameters.values())[1:]
    required = sum(argument.default is inspect.Parameter.empty for argument in arguments)
    if hasattr(module, "init_cache"):
        return MIXER
    return {2: FEEDFORWARD, 1: NORM}.get(required)
