"""Causal masks and the KV cache."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rustgpt_jax.model.interfaces import BlockInputs
from rustgpt_jax.model.kernels import current_device
from rustgpt_jax.model.matmul import to_float32


class KVCache(NamedTuple):
    """Ring buffers of shape (B, S, ...), or (B, K, S, C) with heads: the token at position p is in slot p % S.

    A cache with a slot for each position never wraps; that of a sliding window overwrites tokens outside the window.
    The slots of a head are contiguous, because attention reads them in this order.

    Attributes:
        buffers: A pytree of arrays.
    """

    buffers: Any

    @property
    def slots(self) -> int:
        """Number of tokens that the cache can hold."""
        first = jax.tree.leaves(self.buffers)[0]
        return first.shape[_tokens_axis(first)]

    def write(self, new: Any, inputs: BlockInputs) -> "KVCache":
        """Return the cache with new tokens in their slots; if there are more tokens than slots, the last ones."""
        fits_BT = inputs.positions_BT > last_position(inputs)[:, None] - self.slots
        is_written_BT = (inputs.segments_BT > 0) & fits_BT
        # Writes to the slot after the last one are dropped.
        slots_BT = jnp.where(is_written_BT, inputs.positions_BT % self.slots, self.slots)
        return KVCache(jax.tree.map(partial(_write_tokens, slots_BT=slots_BT), self.buffers, new))

    def positions(self, newest_B: jax.Array) -> jax.Array:
        """Return positions_BS of the tokens in the slots, given the newest position; negative in empty slots."""
        slot_S = jnp.arange(self.slots)
        return newest_B[:, None] - (newest_B[:, None] - slot_S[None, :]) % self.slots


def cast_for_decode(cache: Any) -> Any:
    """Cast the KV caches in a tree to the dtype in which this device decodes fastest: float32 on CPUs.

    XLA on CPUs converts a whole bfloat16 cache to float32 for each read and write.
    """
    if current_device().platform != "cpu":
        return cache

    def cast(node: Any) -> Any:
        return jax.tree.map(to_float32, node) if isinstance(node, KVCache) else node

    return jax.tree.map(cast, cache, is_leaf=lambda node: isinstance(node, KVCache))


class AttentionContext(NamedTuple):
    """Keys that the tokens of a call attend to.

    Attributes:
        keys: Arrays in the layout of the cache.
        positions_BS: Positions of the keys.
        mask_BTS: Which keys each query attends to.
    """

    keys: Any
    positions_BS: jax.Array
    mask_BTS: jax.Array


def first_visible_key(order_T: jax.Array, first_key_BT: jax.Array | None, window: int | None) -> jax.Array:
    """Return first_BT, the index of the first key that each query attends to; first_1T if `first_key_BT` is None.

    Args:
        order_T: Indices of the queries in the row.
        first_key_BT: Index of the first token of each query's document; None if it is 0.
        window: Number of tokens that a token attends to, itself included; None for all.
    """
    first_BT = jnp.zeros_like(order_T)[None] if first_key_BT is None else first_key_BT
    return first_BT if window is None else jnp.maximum(first_BT, order_T[None] - (window - 1))


def attention_mask(
    order_T: jax.Array, order_S: jax.Array, first_key_BT: jax.Array | None, window: int | None
) -> jax.Array:
    """Return mask_BTS, True where a query attends to a key; `order_S` are the keys' indices in the row."""
    first_BT = first_visible_key(order_T, first_key_BT, window)
    earlier_TS = order_S[None] <= order_T[:, None]
    return earlier_TS[None] & (order_S[None, None] >= first_BT[:, :, None])


def causal_mask(inputs: BlockInputs, window: int | None = None) -> jax.Array:
    """Return mask_BTS: tokens attend to themselves and earlier tokens of their document, within the last `window`."""
    order_T = jnp.arange(inputs.segments_BT.shape[1])
    return attention_mask(order_T, order_T, inputs.first_keys(), window)


def update_kv_cache(
    cache: KVCache | None, new: Any, inputs: BlockInputs, window: int | None = None
) -> tuple[AttentionContext, KVCache | None]:
    """Return the keys that the new tokens attend to, and the cache with the new tokens in it.

    A token attends to the cached and new tokens up to its own position, within the last `window` positions. Without a
    cache, it attends to the earlier tokens of its document.
    """
    if cache is None:
        return AttentionContext(new, inputs.positions_BT, causal_mask(inputs, window)), None
    after = cache.write(new, inputs)
    if window is None or inputs.positions_BT.shape[1] == 1:
        # Overwritten slots are outside every query's window.
        positions_BS = after.positions(last_position(inputs))
        mask_BTS = _cached_mask(inputs, positions_BS, window)
        return AttentionContext(after.buffers, positions_BS, mask_BTS), after
    before_BS = cache.positions(inputs.positions_BT[:, 0] - 1)
    old_BTS = _cached_mask(inputs, before_BS, window)
    keys = jax.tree.map(lambda old, new: jnp.concatenate([old, new], _tokens_axis(old)), cache.buffers, new)
    positions_BS = jnp.concatenate([before_BS, inputs.positions_BT], axis=1)
    return AttentionContext(keys, positions_BS, jnp.concatenate([old_BTS, causal_mask(inputs, window)], axis=2)), after


def _tokens_axis(x: jax.Array) -> int:
    return 2 if x.ndim == 4 else 1


def _write_tokens(buffer: jax.Array, new: jax.Array, slots_BT: jax.Array) -> jax.Array:
    """Write tokens to their slots; tokens for the slot after the last one are dropped."""
    if buffer.ndim != 4:
        rows_B1 = jnp.arange(slots_BT.shape[0])[:, None]
        if slots_BT.shape[1] == 1:
            return buffer.at[rows_B1, slots_BT].set(new, mode="drop")
        # A prompt has padding, which is written to one more slot: compilers differ in what they do out of bounds.
        padded = jnp.pad(buffer, [(0, 0), (0, 1), *[(0, 0)] * (buffer.ndim - 2)])
        return padded.at[rows_B1, slots_BT].set(new)[:, :-1]
    # With heads as rows, XLA on CPUs updates the cache in place for any number of rows.
    flat = buffer.reshape(-1, *buffer.shape[2:])
    slots_BT = jnp.repeat(slots_BT, buffer.shape[1], axis=0)
    # Not len(flat): the batch size of exported programs may be symbolic.
    return _write_tokens(flat, new.reshape(flat.shape[0], *new.shape[2:]), slots_BT).reshape(buffer.shape)


def last_position(inputs: BlockInputs) -> jax.Array:
    """Return the position of the last token in each row (B,).

    For a row of padding, it is the first position of the row, so that a softmax over the row is finite.
    """
    is_token_BT = inputs.segments_BT > 0
    return jnp.max(jnp.where(is_token_BT, inputs.positions_BT, inputs.positions_BT[:, :1]), axis=1)


def _cached_mask(inputs: BlockInputs, positions_BS: jax.Array, window: int | None) -> jax.Array:
    """Return mask_BTS for cached keys at `positions_BS`, which are negative in empty slots."""
    key_B1S, query_BT1 = positions_BS[:, None, :], inputs.positions_BT[:, :, None]
    mask_BTS = (key_B1S >= 0) & (key_B1S <= query_BT1)
    return mask_BTS if window is None else mask_BTS & (key_B1S > query_BT1 - window)
