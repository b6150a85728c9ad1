"""Interfaces of a model's components. A component is a Flax module made from the config of its block.

The config field or table that names a component decides its role: `norm`, `mixers`, `feedforwards` or `positions`.
"""

import inspect
from functools import partial
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax

from rustgpt_jax.config.schema import ModelConfig
from rustgpt_jax.model.block_inputs import BlockInputs, LayerMetrics
from rustgpt_jax.model.positions import PositionEncoding

MIXER, FEEDFORWARD, NORM, POSITION = "a mixer", "a feed-forward", "a norm", "a position encoding"

DESCRIPTIONS = {
    MIXER: "a Flax module with __call__(x, context), or with __call__(x, context, cache) and "
    "init_cache(config, batch, length)",
    FEEDFORWARD: "a Flax module with __call__(x) or __call__(x, context)",
    NORM: "a Flax module with __call__(x)",
    POSITION: "a PositionEncoding",
}


class Mixer(Protocol):
    """A token mixer without a cache. Decoding recomputes it over the whole context for each token."""

    def __call__(self, x_BTD: jax.Array, context: BlockInputs) -> jax.Array:
        """Returns y_BTD."""


@runtime_checkable
class CachedMixer(Protocol):
    """A token mixer with a cache, which makes decoding fast."""

    @staticmethod
    def init_cache(config: ModelConfig, batch: int, length: int) -> Any:
        """Returns an empty cache for `length` tokens: any pytree of arrays whose first axis is B."""

    def __call__(self, x_BTD: jax.Array, context: BlockInputs, cache: Any) -> tuple[jax.Array, Any]:
        """Returns y_BTD and the cache with the new tokens in it; the cache is None in training."""


class FeedForward(Protocol):
    """A layer that transforms each token on its own."""

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Returns y_BTD."""


class FeedForwardWithMetrics(Protocol):
    """A feed-forward that reads the block's inputs. It may return y_BTD alone."""

    def __call__(self, x_BTD: jax.Array, context: BlockInputs) -> tuple[jax.Array, LayerMetrics]:
        """Returns y_BTD and scalars to log; AUX_LOSS is added to the training loss."""


class Norm(Protocol):
    """A normalization over the last axis."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the normalized array, in the dtype of x."""


def component_kinds(component: Any) -> tuple[str, ...]:
    """Returns the roles whose interface a component has, the likeliest first."""
    if isinstance(component, PositionEncoding):
        return (POSITION,)
    module = module_class(component)
    if not (inspect.isclass(module) and issubclass(module, nn.Module)):
        return ()
    if isinstance(module, CachedMixer):
        return (MIXER,)
    return {1: (NORM, FEEDFORWARD), 2: (FEEDFORWARD, MIXER)}.get(n_inputs(module), ())


def module_class(component: Any) -> Any:
    """Returns the class of a component, which may be a `functools.partial` of it."""
    return component.func if isinstance(component, partial) else component


def n_inputs(module: Any) -> int:
    """Returns the number of required arguments of a module's `__call__`."""
    arguments = list(inspect.signature(module.__call__).parameters.values())[1:]
    return sum(argument.default is inspect.Parameter.empty for argument in arguments)
