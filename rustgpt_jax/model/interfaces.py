"""Interfaces of a model's components. A component is a Flax module made from the config of its block.

The config field or table that names a component decides its role: `norm`, `mixers`, `feedforwards` or `positions`.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp

from rustgpt_jax.config.schema import ModelConfig

LayerMetrics = dict[str, jax.Array]

# The metric that is added to the training loss.
AUX_LOSS = "auxiliary_loss"


class BlockInputs(NamedTuple):
    """Inputs of a block besides the residual stream.

    Attributes:
        positions_BT: Position of each token in its document, from 0.
        segments_BT: Number of each token's document within its row, from 1. 0 is padding, which no other token sees.
            The tokens of a document must be adjacent.
        dropout_key: Key for dropout; None for no dropout.
        layer: Index of the layer, from 0; None if no component reads it.
        first_key_BT: Cached result of `first_keys`, or None.
    """

    positions_BT: jax.Array
    segments_BT: jax.Array
    dropout_key: jax.Array | None = None
    layer: jax.Array | int | None = None
    first_key_BT: jax.Array | None = None

    def first_keys(self) -> jax.Array:
        """Return first_key_BT, the index in the row of the first token of each token's document."""
        if self.first_key_BT is not None:
            return self.first_key_BT
        is_start_BT = jnp.pad(self.segments_BT[:, 1:] != self.segments_BT[:, :-1], ((0, 0), (1, 0)))
        index_T = jnp.arange(self.segments_BT.shape[1], dtype=jnp.int32)
        return jax.lax.cummax(jnp.where(is_start_BT, index_T[None], 0), axis=1)

    def as_one_document(self) -> "BlockInputs":
        """Return the inputs with all tokens of a row, except padding, in one document."""
        positions_T = jnp.arange(self.positions_BT.shape[1], dtype=self.positions_BT.dtype)
        is_token_BT = (self.segments_BT > 0).astype(self.segments_BT.dtype)
        return self._replace(positions_BT=jnp.broadcast_to(positions_T, is_token_BT.shape), segments_BT=is_token_BT)

    def fold_in(self, data: jax.Array | int) -> "BlockInputs":
        """Return the same inputs with an independent dropout key for layer number `data`."""
        if self.dropout_key is None:
            return self
        return self._replace(dropout_key=jax.random.fold_in(self.dropout_key, data))


class Mixer(Protocol):
    """A token mixer without a cache. Decoding recomputes it over the whole context for each token."""

    def __call__(self, x_BTD: jax.Array, inputs: BlockInputs) -> jax.Array:
        """Return y_BTD."""


@runtime_checkable
class CachedMixer(Protocol):
    """A token mixer with a cache, which makes decoding fast."""

    @staticmethod
    def init_cache(config: ModelConfig, batch: int, length: int) -> Any:
        """Return an empty cache for `length` tokens: any pytree of arrays whose first axis is B."""

    def __call__(self, x_BTD: jax.Array, inputs: BlockInputs, cache: Any) -> tuple[jax.Array, Any]:
        """Return y_BTD and the cache with the new tokens in it; the cache is None in training."""


class FeedForward(Protocol):
    """A layer that transforms each token independently."""

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Return y_BTD."""


class FeedForwardWithMetrics(Protocol):
    """A feed-forward that reads the block's inputs. It may return y_BTD alone."""

    def __call__(self, x_BTD: jax.Array, inputs: BlockInputs) -> tuple[jax.Array, LayerMetrics]:
        """Return y_BTD and scalars to log; AUX_LOSS is added to the training loss."""


class Norm(Protocol):
    """A normalization over the last axis."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the normalized array, in the dtype of x."""


class PositionEncoding(NamedTuple):
    """Functions that add positions to a model at up to three places; None for places that are not used.

    Attributes:
        embed: A Flax module that maps positions_BT to vectors (B, T, D) added to the embeddings.
        rotate: Maps (x_BTHC, positions_BT, config) to rotated queries or keys.
        bias: Maps (query_positions_BT, key_positions_BS, config) to bias_BHTS, added to the attention scores.
    """

    embed: type[nn.Module] | None = None
    rotate: Callable[[jax.Array, jax.Array, ModelConfig], jax.Array] | None = None
    bias: Callable[[jax.Array, jax.Array, ModelConfig], jax.Array] | None = None


MIXER, FEEDFORWARD, NORM, POSITION = "a mixer", "a feed-forward", "a norm", "a position encoding"

DESCRIPTIONS = {
    MIXER: "a Flax module with __call__(x, inputs), or with __call__(x, inputs, cache) and "
    "init_cache(config, batch, length)",
    FEEDFORWARD: "a Flax module with __call__(x) or __call__(x, inputs)",
    NORM: "a Flax module with __call__(x)",
    POSITION: "a PositionEncoding",
}


def component_kinds(component: Any) -> tuple[str, ...]:
    """Return the roles whose interface a component has, most likely first."""
    if isinstance(component, PositionEncoding):
        return (POSITION,)
    module = module_class(component)
    if not (inspect.isclass(module) and issubclass(module, nn.Module)):
        return ()
    if isinstance(module, CachedMixer):
        return (MIXER,)
    return {1: (NORM, FEEDFORWARD), 2: (FEEDFORWARD, MIXER)}.get(n_inputs(module), ())


def module_class(component: Any) -> Any:
    """Return the class of a component, which may be a `functools.partial` of it."""
    return component.func if isinstance(component, partial) else component


def n_inputs(module: Any) -> int:
    """Return the number of required arguments of a module's `__call__`."""
    arguments = list(inspect.signature(module.__call__).parameters.values())[1:]
    return sum(argument.default is inspect.Parameter.empty for argument in arguments)
