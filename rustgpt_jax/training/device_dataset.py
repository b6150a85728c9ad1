"""A token stream in the memory of a device, where batches are read from it: all that is sent are windows' places."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from rustgpt_jax.data.pipeline import Batch, Places
from rustgpt_jax.data.token_shards import TokenStream

LEARNED, BEGINS = np.uint8(1), np.uint8(2)


class ResidentStream(NamedTuple):
    """N tokens, as they are stored, and what is to be known of each: LEARNED where it is a target to be learned, BEGINS
    where a document begins, or does so once the end of the stream is its beginning again."""

    tokens_N: Any
    marks_N: Any  # uint8
    end_id: Any  # int32


def n_bytes(stream: TokenStream) -> int:
    """The bytes of a stream that is resident."""
    return stream.n_tokens * (stream.token_shards[0].itemsize + LEARNED.itemsize)


def resident(stream: TokenStream) -> ResidentStream:
    """A stream as it is to be brought to a device, in the memory of the host. It must have less than 2**30 tokens."""
    marks_N = np.where(stream.weights(0, stream.n_tokens), LEARNED, np.uint8(0))
    marks_N[[*stream.offsets, -1]] |= BEGINS
    return ResidentStream(np.concatenate(stream.token_shards), marks_N, np.int32(stream.end_id))


@partial(jax.jit, static_argnames=("window", "sharding"))
def read_windows(stream: ResidentStream, places: Places, *, window: int, sharding: Sharding | None = None) -> Batch:
    """The windows of T = `window` tokens at int32 places, as `pipeline.Windows.read` gives them, laid out so.

    Places may have any axes before B, which the batch then has too.
    """
    read = partial(_read_window, stream, jnp.arange(window + 1))
    for _ in places.starts_B.shape:
        read = jax.vmap(read)
    batch = read(places.starts_B, places.real_B)
    return batch if sharding is None else jax.lax.with_sharding_constraint(batch, sharding)


def _read_window(stream: ResidentStream, within_S: jax.Array, start: jax.Array, real: jax.Array) -> Batch:
    """One window, without the axis of rows."""
    last = stream.tokens_N.shape[0] - 1
    around_S = start + within_S
    # The last token of the stream is also its first, so its second token follows.
    around_S = jnp.where(around_S > last, around_S - last, around_S)
    is_read_S = (within_S <= real) & (real > 0)
    tokens_S = jnp.where(is_read_S, stream.tokens_N[around_S].astype(jnp.int32), stream.end_id)
    marks_S = jnp.where(is_read_S, stream.marks_N[around_S], np.uint8(0))

    within_T = within_S[:-1]
    is_real_T = within_T < real
    # The first document of a window is number 1 whether or not it begins there.
    is_start_T = (within_T == 0) | (is_real_T & (marks_S[:-1] & BEGINS > 0))
    began_T = jax.lax.cummax(jnp.where(is_start_T, within_T, 0))
    return Batch(
        tokens_BT=tokens_S[:-1],
        targets_BT=tokens_S[1:],
        weights_BT=(marks_S[1:] & LEARNED).astype(jnp.float32),
        segments_BT=jnp.cumsum(is_start_T, dtype=jnp.int32) * is_real_T,
        positions_BT=within_T - began_T,
    )
