"""Inputs of a block besides the activations."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

LayerMetrics = dict[str, jax.Array]

# The metric that is added to the loss.
AUX_LOSS = "auxiliary_loss"


class BlockInputs(NamedTuple):
    """The position of each token, and the randomness of a training step.

    Attributes:
        positions_BT: Position of a token in its document, from 0.
        segments_BT: Index of a token's document within its row, from 1. 0 is padding, which no other token sees.
        dropout_key: None if nothing is dropped.
        layer: Index of the layer, from 0; None if no part of the model reads it.
    """

    positions_BT: jax.Array
    segments_BT: jax.Array
    dropout_key: jax.Array | None = None
    layer: jax.Array | int | None = None

    def fold_in(self, data: jax.Array | int) -> "BlockInputs":
        """The same context with randomness of its own for layer or sublayer number `data`."""
        if self.dropout_key is None:
            return self
        return self._replace(dropout_key=jax.random.fold_in(self.dropout_key, data))


def dropout(x: jax.Array, rate: jax.Array | float, context: BlockInputs, site: int) -> jax.Array:
    """Zero each element with probability `rate` and scale the others to keep the mean (arXiv 1207.0580)."""
    if context.dropout_key is None:
        return x
    kept = jax.random.bernoulli(jax.random.fold_in(context.dropout_key, site), 1.0 - rate, x.shape)
    return jnp.where(kept, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros((), x.dtype))
