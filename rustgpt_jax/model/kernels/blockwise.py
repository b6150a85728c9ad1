"""Attention of one block of queries after another, in plain XLA: on every device, and never all scores at once."""

import jax
import jax.numpy as jnp

from rustgpt_jax.model.block_inputs import Context
from rustgpt_jax.model.kernels.portable import attended, softmax_weights
from rustgpt_jax.model.kernels.types import Kernel, Request, Task, visible

# Queries in a block: enough to keep the units for matrix products busy.
BLOCK = 512


def blockwise(task: Task, block: int = BLOCK) -> jax.Array:
    """mixed_BTKGC of a task, exactly: a query has all its scores at once, and the backward pass makes them again.

    In memory are the scores of a block: B x H x block x S numbers, where S is the row, or block + window. But where
    config.model.remat is dots, which keeps all matrix products, those of all blocks are kept.
    """
    batch, length = task.q_BTHC.shape[:2]
    n_blocks = -(-length // block)
    block = -(-length // n_blocks)
    n_keys = length if task.window is None else min(length, block + task.window - 1)

    def blocks(x_BT: jax.Array) -> jax.Array:
        """x cut along T, with the blocks as the first axis, the last one filled up with copies of the last token."""
        filled = jnp.pad(x_BT, [(0, 0), (0, n_blocks * block - length), *[(0, 0)] * (x_BT.ndim - 2)], mode="edge")
        return jnp.moveaxis(filled.reshape(batch, n_blocks, block, *x_BT.shape[2:]), 1, 0)

    @jax.checkpoint
    def attend(index: jax.Array, q_BTHC: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
        order_T = jnp.minimum(index * block + jnp.arange(block), length - 1)
        first = jnp.clip((index + 1) * block - n_keys, 0, length - n_keys)

        def near(x_BS: jax.Array) -> jax.Array:
            return x_BS if n_keys == length else jax.lax.dynamic_slice_in_dim(x_BS, first, n_keys, axis=1)

        keys = Context(near(task.context.positions_BT), near(task.context.segments_BT))
        order_S = jnp.arange(length) if n_keys == length else first + jnp.arange(n_keys)
        visible_BTS = visible(Context(positions_BT, segments_BT), order_T, keys, order_S, task.window)
        positions = (positions_BT, keys.positions_BT)

        def weights(scores_BHTS: jax.Array) -> jax.Array:
            return softmax_weights(scores_BHTS, visible_BTS, positions, task.softcap, task.bias, task.sinks_H)

        by_heads = (jnp.swapaxes(near(task.k_BSKC), 1, 2), jnp.swapaxes(near(task.v_BSKC), 1, 2))
        return attended(q_BTHC, *by_heads, task.scale, weights)

    queries = (task.q_BTHC, task.context.positions_BT, task.context.segments_BT)
    mixed = jax.lax.map(lambda each: attend(*each), (jnp.arange(n_blocks), *map(blocks, queries)))
    return jnp.moveaxis(mixed, 0, 1).reshape(batch, n_blocks * block, *mixed.shape[3:])[:, :length]


def refuses(request: Request) -> str | None:
    """Why blockwise attention cannot serve a request; None if it can."""
    if request.cached:
        return "it reads no cache"
    return "it has no dropout of attention" if request.dropout else None


BLOCKWISE = Kernel(blockwise, refuses)
