"""Attention as it is written down, with all scores in memory: the reference, which serves every request."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rustgpt_jax.config.schema import is_on
from rustgpt_jax.model.dtypes import product_type, softcap
from rustgpt_jax.model.kernels.types import Bias, Kernel, Task, whole_mask


def attended(
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
    scores_BKGTS = jnp.einsum(
        "BTKGC,BKSC->BKGTS", q_BTKGC, k_BKSC, preferred_element_type=product_type(q_BTKGC, k_BKSC)
    )
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
    if is_on(cap):
        scores_BHTS = softcap(scores_BHTS, cap)
    if bias:
        scores_BHTS = scores_BHTS + bias(*positions)
    scores_BHTS = jnp.where(visible_BTS[:, None], scores_BHTS, -jnp.inf)
    if sinks_H is not None:
        sinks_BHT1 = jnp.broadcast_to(sinks_H[None, :, None, None], (*scores_BHTS.shape[:3], 1))
        scores_BHTS = jnp.concatenate([scores_BHTS, sinks_BHT1.astype(scores_BHTS.dtype)], axis=-1)
    return jax.nn.softmax(scores_BHTS, axis=-1)[..., : visible_BTS.shape[-1]]


def plain(task: Task) -> jax.Array:
    """mixed_BTKGC of a task."""
    positions = (task.context.positions_BT, task.context.positions_BT)
    visible_BTS = whole_mask(task)

    def weights(scores_BHTS: jax.Array) -> jax.Array:
        return softmax_weights(scores_BHTS, visible_BTS, positions, task.softcap, task.bias, task.sinks_H)

    by_heads = (jnp.swapaxes(task.k_BSKC, 1, 2), jnp.swapaxes(task.v_BSKC, 1, 2))
    return attended(task.q_BTHC, *by_heads, task.scale, weights)


PLAIN = Kernel(plain, lambda request: None)
