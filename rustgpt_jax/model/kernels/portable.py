"""Attention as it is written down, with all scores in memory: the reference, which serves every request."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rustgpt_jax.config.schema import is_enabled
from rustgpt_jax.model.block_inputs import BlockInputs
from rustgpt_jax.model.dtypes import accum_dtype, softcap
from rustgpt_jax.model.kernels.types import AttentionInputs, AttentionSpec, Bias, Kernel, attention_mask, whole_mask


def dot_product_attention(
    q_BTHC: jax.Array,
    k_BKSC: jax.Array,
    v_BKSC: jax.Array,
    scale: float,
    weights: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """mixed_BTKGC, the mean of the values by att_BHTS = weights(scores_BHTS)."""
    batch, length, n_heads, channels = q_BTHC.shape
    n_kv_heads = k_BKSC.shape[1]
    q_BTKGC = q_BTHC.reshape(batch, length, n_kv_heads, n_heads // n_kv_heads, channels)
    scores_BKGTS = jnp.einsum("BTKGC,BKSC->BKGTS", q_BTKGC, k_BKSC, preferred_element_type=accum_dtype(q_BTKGC, k_BKSC))
    scores_BHTS = scale * scores_BKGTS.reshape(batch, n_heads, *scores_BKGTS.shape[3:])
    att_BHTS = weights(scores_BHTS).astype(v_BKSC.dtype)
    # In the order of its factors: in another, XLA on CPUs would put the values into another order too.
    mixed_BKGTC = jax.lax.dot_general(att_BHTS.reshape(scores_BKGTS.shape), v_BKSC, (((4,), (2,)), ((0, 1), (0, 1))))
    return jnp.moveaxis(mixed_BKGTC, 3, 1)


def softmax_weights(
    scores_BHTS: jax.Array,
    visible_BTS: jax.Array,
    positions: tuple[jax.Array, jax.Array],
    cap: Any,
    bias: Bias | None,
    sinks_H: jax.Array | None,
) -> jax.Array:
    """Scaled scores through soft-cap, bias of the positions of queries and keys, mask, and softmax (with sinks)."""
    if is_enabled(cap):
        scores_BHTS = softcap(scores_BHTS, cap)
    if bias:
        scores_BHTS = scores_BHTS + bias(*positions)
    scores_BHTS = jnp.where(visible_BTS[:, None], scores_BHTS, -jnp.inf)
    if sinks_H is not None:
        sinks_BHT1 = jnp.broadcast_to(sinks_H[None, :, None, None], (*scores_BHTS.shape[:3], 1))
        scores_BHTS = jnp.concatenate([scores_BHTS, sinks_BHT1.astype(scores_BHTS.dtype)], axis=-1)
    return jax.nn.softmax(scores_BHTS, axis=-1)[..., : visible_BTS.shape[-1]]


def reference_attention(task: AttentionInputs) -> jax.Array:
    """mixed_BTKGC of a task."""
    positions = (task.context.positions_BT, task.context.positions_BT)
    visible_BTS = whole_mask(task)

    def weights(scores_BHTS: jax.Array) -> jax.Array:
        return softmax_weights(scores_BHTS, visible_BTS, positions, task.softcap, task.bias, task.sinks_H)

    by_heads = (jnp.swapaxes(task.k_BSKC, 1, 2), jnp.swapaxes(task.v_BSKC, 1, 2))
    return dot_product_attention(task.q_BTHC, *by_heads, task.scale, weights)


PLAIN = Kernel(reference_attention, lambda request: None)


# Attention of one block of queries after another, in plain XLA: on every device, and never all scores at once.

# Queries in a block: enough to keep the units for matrix products busy.
BLOCK = 512


def blockwise(task: AttentionInputs, block: int = BLOCK) -> jax.Array:
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

        keys = BlockInputs(near(task.context.positions_BT), near(task.context.segments_BT))
        order_S = jnp.arange(length) if n_keys == length else first + jnp.arange(n_keys)
        visible_BTS = attention_mask(BlockInputs(positions_BT, segments_BT), order_T, keys, order_S, task.window)
        positions = (positions_BT, keys.positions_BT)

        def weights(scores_BHTS: jax.Array) -> jax.Array:
            return softmax_weights(scores_BHTS, visible_BTS, positions, task.softcap, task.bias, task.sinks_H)

        by_heads = (jnp.swapaxes(near(task.k_BSKC), 1, 2), jnp.swapaxes(near(task.v_BSKC), 1, 2))
        return dot_product_attention(q_BTHC, *by_heads, task.scale, weights)

    queries = (task.q_BTHC, task.context.positions_BT, task.context.segments_BT)
    mixed = jax.lax.map(lambda each: attend(*each), (jnp.arange(n_blocks), *map(blocks, queries)))
    return jnp.moveaxis(mixed, 0, 1).reshape(batch, n_blocks * block, *mixed.shape[3:])[:, :length]


def portable_unsupported_reason(request: AttentionSpec) -> str | None:
    """Why blockwise attention cannot serve a request; None if it can."""
    if request.cached:
        return "it reads no cache"
    return "it has no dropout of attention" if request.dropout else None


BLOCKWISE = Kernel(blockwise, portable_unsupported_reason)


# Attention of a few blocks of queries, each with no more keys than it can see: about half of all products.
#
# The blocks are written out one after another, and what the backward pass reads is kept: the fastest form on CPUs.

# More blocks leave out more keys, and make more and smaller products.
N_BLOCKS = 4


def triangular(task: AttentionInputs, n_blocks: int = N_BLOCKS) -> jax.Array:
    """mixed_BTKGC of a task, exactly. In memory are the scores of the keys that each block reads."""
    length = task.q_BTHC.shape[1]
    k_BKSC, v_BKSC = jnp.swapaxes(task.k_BSKC, 1, 2), jnp.swapaxes(task.v_BSKC, 1, 2)

    def attend(start: int, stop: int) -> jax.Array:
        first = 0 if task.window is None else max(0, start + 1 - task.window)
        queries, keys = _part(task.context, start, stop), _part(task.context, first, stop)
        visible_BTS = attention_mask(queries, jnp.arange(start, stop), keys, jnp.arange(first, stop), task.window)
        positions = (queries.positions_BT, keys.positions_BT)

        def weights(scores_BHTS: jax.Array) -> jax.Array:
            return softmax_weights(scores_BHTS, visible_BTS, positions, task.softcap, task.bias, task.sinks_H)

        near = (k_BKSC[:, :, first:stop], v_BKSC[:, :, first:stop])
        return dot_product_attention(task.q_BTHC[:, start:stop], *near, task.scale, weights)

    block = -(-length // n_blocks)
    starts = range(0, length, block)
    return jnp.concatenate([attend(start, min(start + block, length)) for start in starts], axis=1)


def _part(context: BlockInputs, start: int, stop: int) -> BlockInputs:
    return BlockInputs(context.positions_BT[:, start:stop], context.segments_BT[:, start:stop])


TRIANGULAR = Kernel(triangular, portable_unsupported_reason)
