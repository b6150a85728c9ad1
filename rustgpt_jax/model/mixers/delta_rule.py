"""The gated delta rule over many tokens at once, by matrix products."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

# Tokens that are worked on at once. It changes the speed, and results by no more than rounding.
CHUNK = 32


def gated_delta_rule(
    q_BTHC: jax.Array,
    k_BTHC: jax.Array,
    v_BTHE: jax.Array,
    beta_BTH: jax.Array,
    g_BTH: jax.Array,
    document_BT: jax.Array,
    state_BHCE: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """o_BTHE of o_t = S_t q_t with S_t = e^(g_t) S_(t-1) (I - beta_t k_t k_t^T) + beta_t v_t k_t^T, and the last S.

    What a token writes is u_t = beta_t (v_t - e^(g_t) S_(t-1) k_t): S_t is the sum over s of fade_ts u_s k_s^T, where
    fade_ts is e to the sum of g after s up to t. Within a chunk of tokens the u solve a unit lower triangular system,
    linear in the state before the chunk (arXiv 2406.06484, 2412.06464), so that only states go from chunk to chunk.
    The sums of g are made for each s by itself, for a difference of sums would depend on the documents before.

    Args:
        q_BTHC: queries.
        k_BTHC: keys, of length 1.
        v_BTHE: values; E counts their channels.
        beta_BTH: how much of what the state has for a key is replaced. 0, with a g of 0, leaves the state as it is.
        g_BTH: logarithm of what stays of the state, at most 0.
        document_BT: numbers of the documents, in order. No state goes from one to the next.
        state_BHCE: S before the first token, transposed, for the document of that token.
    """
    length, size = q_BTHC.shape[1], min(CHUNK, q_BTHC.shape[1])

    def chunks(x_BT: jax.Array, mode: str = "constant") -> jax.Array:
        """x_MBT of M chunks, the last of which is filled up."""
        x_BT = jnp.pad(x_BT, [(0, 0), (0, -length % size), *[(0, 0)] * (x_BT.ndim - 2)], mode=mode)
        return jnp.moveaxis(x_BT.reshape(x_BT.shape[0], -1, size, *x_BT.shape[2:]), 1, 0)

    q_MBHTC, k_MBHTC, v_MBHTE = (jnp.swapaxes(chunks(x), 2, 3) for x in (q_BTHC, k_BTHC, v_BTHE))
    beta_MBHT1, g_MBHT1 = (jnp.swapaxes(chunks(x), 2, 3)[..., None] for x in (beta_BTH, g_BTH))
    document_MBT = chunks(document_BT, "edge")
    before_MB1 = jnp.concatenate([document_MBT[:1, :, :1], document_MBT[:-1, :, -1:]])

    order_T = jnp.arange(size)
    later_MBHTS = (order_T[:, None] > order_T[None, :])[None, None, None]
    same_MBHTS = (document_MBT[:, :, :, None] == document_MBT[:, :, None, :])[:, :, None]
    after_s_MBHTS = jnp.cumsum(jnp.where(later_MBHTS, g_MBHT1, 0), axis=-2)
    fade_MBHTS = jnp.where(same_MBHTS & ~jnp.swapaxes(later_MBHTS, -1, -2), jnp.exp(after_s_MBHTS), 0)
    continues_MBHT1 = (document_MBT == before_MB1)[:, :, None, :, None]
    state_fade_MBHT1 = jnp.where(continues_MBHT1, jnp.exp(jnp.cumsum(g_MBHT1, axis=-2)), 0)

    k_MBHCS = jnp.swapaxes(k_MBHTC, -1, -2)
    system_MBHTS = jnp.where(later_MBHTS, beta_MBHT1 * fade_MBHTS * (k_MBHTC @ k_MBHCS), 0)
    right_side = jnp.concatenate([beta_MBHT1 * v_MBHTE, beta_MBHT1 * state_fade_MBHT1 * k_MBHTC], axis=-1)
    solved = solve_triangular(system_MBHTS, right_side, lower=True, unit_diagonal=True)
    written_MBHTE, erased_MBHTC = jnp.split(solved, [v_MBHTE.shape[-1]], axis=-1)

    def chunk(state_BHCE: jax.Array, parts: Any) -> tuple[jax.Array, jax.Array]:
        written_BHTE, erased_BHTC, q_BHTC, att_BHTS, k_BHCS, fade_BH11 = parts
        u_BHTE = written_BHTE - erased_BHTC @ state_BHCE
        return fade_BH11 * state_BHCE + k_BHCS @ u_BHTE, q_BHTC @ state_BHCE + att_BHTS @ u_BHTE

    faded_q_MBHTC, faded_k_MBHCS = state_fade_MBHT1 * q_MBHTC, fade_MBHTS[..., -1:, :] * k_MBHCS
    att_MBHTS = fade_MBHTS * (q_MBHTC @ k_MBHCS)
    parts = (written_MBHTE, erased_MBHTC, faded_q_MBHTC, att_MBHTS, faded_k_MBHCS, state_fade_MBHT1[..., -1:, :])
    state_BHCE, o_MBHTE = jax.lax.scan(chunk, state_BHCE, parts)
    o_BMTHE = jnp.moveaxis(jnp.swapaxes(o_MBHTE, 2, 3), 0, 1)
    return o_BMTHE.reshape(v_BTHE.shape[0], -1, *v_BTHE.shape[2:])[:, :length], state_BHCE
