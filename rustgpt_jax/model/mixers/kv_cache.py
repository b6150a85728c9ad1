"""What attention keeps of earlier tokens, in a ring of slots, and which of them a token sees."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rustgpt_jax.model.block_inputs import BlockInputs
from rustgpt_jax.model.dtypes import to_float32
from rustgpt_jax.model.kernels.types import attention_mask, current_device


class KVCache(NamedTuple):
    """Arrays (B, S, ...), or (B, K, S, C) with heads: the token at position p is in slot p modulo the slots S.

    A ring with a slot for each position of a row never wraps; one of a sliding window forgets what the window left.
    Each head has its slots together, for that is how attention reads them.
    """

    kept: Any

    @property
    def slots(self) -> int:
        """How many tokens the ring holds."""
        first = jax.tree.leaves(self.kept)[0]
        return first.shape[_tokens_axis(first)]

    def write(self, new: Any, context: BlockInputs) -> "KVCache":
        """The ring with the tokens of a call in their slots: the last ones, where there are more than slots."""
        is_new_BT = context.positions_BT > last_position(context)[:, None] - self.slots
        stays_BT = (context.segments_BT > 0) & is_new_BT
        # No slot has the number `slots`: what is written there is dropped.
        slots_BT = jnp.where(stays_BT, context.positions_BT % self.slots, self.slots)
        return KVCache(jax.tree.map(partial(_with_tokens, slots_BT=slots_BT), self.kept, new))

    def positions(self, newest_B: jax.Array) -> jax.Array:
        """positions_BS of the tokens in the slots, when the newest is at position newest_B; below 0: no token yet."""
        slot_S = jnp.arange(self.slots)
        return newest_B[:, None] - (newest_B[:, None] - slot_S[None, :]) % self.slots


def cast_for_decode(cache: Any) -> Any:
    """A tree of caches with rings in the type in which this device reads them fastest, token by token.

    XLA on a CPU widens all of a ring of bfloat16 to read it, and to write a token. So there its values are float32.
    """
    if current_device().platform != "cpu":
        return cache

    def wide(cache: Any) -> Any:
        return jax.tree.map(to_float32, cache) if isinstance(cache, KVCache) else cache

    return jax.tree.map(wide, cache, is_leaf=lambda each: isinstance(each, KVCache))


class AttentionContext(NamedTuple):
    """The keys of a call: their arrays as in a ring, their positions, and which queries see which."""

    keys: Any
    positions_BS: jax.Array
    visible_BTS: jax.Array


def causal_mask(context: BlockInputs, window: int | None = None) -> jax.Array:
    """Returns mask_BTS: a token sees itself and the earlier tokens of its document, within the last `window`."""
    order_T = jnp.arange(context.segments_BT.shape[1])
    return attention_mask(context, order_T, context, order_T, window)


def update_kv_cache(
    ring: KVCache | None, new: Any, context: BlockInputs, window: int | None = None
) -> tuple[AttentionContext, KVCache | None]:
    """Returns the keys that the tokens of a call attend to, and the cache with the new tokens in it.

    A token sees the cached tokens and those of this call up to its own position, within the last `window` positions.
    Without a cache, it sees the earlier tokens of its own document.
    """
    if ring is None:
        return AttentionContext(new, context.positions_BT, causal_mask(context, window)), None
    after = ring.write(new, context)
    if window is None or context.positions_BT.shape[1] == 1:
        # What the new tokens take the place of, no query of this call sees.
        positions_BS = after.positions(last_position(context))
        visible_BTS = _up_to(context, positions_BS) & _near(context, positions_BS, window)
        return AttentionContext(after.kept, positions_BS, visible_BTS), after
    before_BS = ring.positions(context.positions_BT[:, 0] - 1)
    old_BTS = _up_to(context, before_BS) & _near(context, before_BS, window)
    keys = jax.tree.map(lambda kept, now: jnp.concatenate([kept, now], _tokens_axis(kept)), ring.kept, new)
    positions_BS = jnp.concatenate([before_BS, context.positions_BT], axis=1)
    return AttentionContext(keys, positions_BS, jnp.concatenate([old_BTS, causal_mask(context, window)], axis=2)), after


def _tokens_axis(x: jax.Array) -> int:
    return 2 if x.ndim == 4 else 1


def _with_tokens(kept: jax.Array, now: jax.Array, slots_BT: jax.Array) -> jax.Array:
    """A ring's array with tokens in its slots; those for which there is no slot are dropped."""
    if kept.ndim != 4:
        return kept.at[jnp.arange(len(slots_BT))[:, None], slots_BT].set(now, mode="drop")
    # Heads are rows here: so XLA on CPUs writes where the ring is, and copies it for no number of rows.
    flat = kept.reshape(-1, *kept.shape[2:])
    slots_BT = jnp.repeat(slots_BT, kept.shape[1], axis=0)
    return _with_tokens(flat, now.reshape(len(flat), *now.shape[2:]), slots_BT).reshape(kept.shape)


def last_position(context: BlockInputs) -> jax.Array:
    """Returns the position of the last token in each row (B,).

    For a row of padding it is that of the row's first place, so that a softmax over the row is finite.
    """
    is_token_BT = context.segments_BT > 0
    return jnp.max(jnp.where(is_token_BT, context.positions_BT, context.positions_BT[:, :1]), axis=1)


def _up_to(context: BlockInputs, positions_BS: jax.Array) -> jax.Array:
    return (positions_BS[:, None, :] >= 0) & (positions_BS[:, None, :] <= context.positions_BT[:, :, None])


def _near(context: BlockInputs, positions_BS: jax.Array, window: int | None) -> jax.Array:
    if window is None:
        return jnp.ones((), bool)[None, None, None]
    return positions_BS[:, None, :] > context.positions_BT[:, :, None] - window
