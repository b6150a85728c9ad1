"""Gated DeltaNet: each head has a matrix state of fixed size that maps keys to values and is updated by each token."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from rustgpt_jax.config.schema import ModelConfig
from rustgpt_jax.model.interfaces import BlockInputs
from rustgpt_jax.model.layers import NORMS, Linear
from rustgpt_jax.model.matmul import to_float32
from rustgpt_jax.model.mixers.short_conv import ShortConvolution, document_ids
from rustgpt_jax.registry import lookup

# Tokens that are processed together; affects speed, and results only by rounding.
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
    """Apply the gated delta rule to all tokens of a row, by matrix products over chunks of tokens.

    The state is S_t = e^(g_t) S_(t-1) (I - beta_t k_t k_t^T) + beta_t v_t k_t^T, and the output o_t = S_t q_t. With the
    updates u_t = beta_t (v_t - e^(g_t) S_(t-1) k_t), S_t is the sum over s of decay_ts u_s k_s^T, where decay_ts is
    exp(the sum of g from s + 1 to t). Within a chunk, the u solve a unit lower triangular system that is linear in the
    state before the chunk (arXiv 2406.06484, 2412.06464), so that only states are passed from chunk to chunk. The sums
    of g are computed separately for each s, because a difference of cumulative sums would depend on earlier documents.

    Args:
        q_BTHC: Queries.
        k_BTHC: Keys of length 1.
        v_BTHE: Values, with E channels.
        beta_BTH: Share of the value stored for a key that is replaced; 0, with a g of 0, leaves the state unchanged.
        g_BTH: Logarithm of the decay of the state, at most 0.
        document_BT: Index of each token's document, in order; no state is passed between documents.
        state_BHCE: S before the first token, transposed, for the document of that token.

    Returns:
        o_BTHE, and the last S, transposed.
    """
    length, size = q_BTHC.shape[1], min(CHUNK, q_BTHC.shape[1])

    def split(x_BT: jax.Array, mode: str = "constant") -> jax.Array:
        """Split x along T into M chunks, as the first axis; the last chunk is padded."""
        x_BT = jnp.pad(x_BT, [(0, 0), (0, -length % size), *[(0, 0)] * (x_BT.ndim - 2)], mode=mode)
        return jnp.moveaxis(x_BT.reshape(x_BT.shape[0], -1, size, *x_BT.shape[2:]), 1, 0)

    q_MBHTC, k_MBHTC, v_MBHTE = (jnp.swapaxes(split(x), 2, 3) for x in (q_BTHC, k_BTHC, v_BTHE))
    beta_MBHT1, g_MBHT1 = (jnp.swapaxes(split(x), 2, 3)[..., None] for x in (beta_BTH, g_BTH))
    document_MBT = split(document_BT, "edge")
    previous_MB1 = jnp.concatenate([document_MBT[:1, :, :1], document_MBT[:-1, :, -1:]])

    order_T = jnp.arange(size)
    is_earlier_MBHTS = (order_T[:, None] > order_T[None, :])[None, None, None]
    is_same_MBHTS = (document_MBT[:, :, :, None] == document_MBT[:, :, None, :])[:, :, None]
    g_sum_MBHTS = jnp.cumsum(jnp.where(is_earlier_MBHTS, g_MBHT1, 0), axis=-2)
    decay_MBHTS = jnp.where(is_same_MBHTS & ~jnp.swapaxes(is_earlier_MBHTS, -1, -2), jnp.exp(g_sum_MBHTS), 0)
    is_continued_MBHT1 = (document_MBT == previous_MB1)[:, :, None, :, None]
    state_decay_MBHT1 = jnp.where(is_continued_MBHT1, jnp.exp(jnp.cumsum(g_MBHT1, axis=-2)), 0)

    k_MBHCS = jnp.swapaxes(k_MBHTC, -1, -2)
    system_MBHTS = jnp.where(is_earlier_MBHTS, beta_MBHT1 * decay_MBHTS * (k_MBHTC @ k_MBHCS), 0)
    right_side = jnp.concatenate([beta_MBHT1 * v_MBHTE, beta_MBHT1 * state_decay_MBHT1 * k_MBHTC], axis=-1)
    solved = solve_triangular(system_MBHTS, right_side, lower=True, unit_diagonal=True)
    values_MBHTE, removed_MBHTC = jnp.split(solved, [v_MBHTE.shape[-1]], axis=-1)

    def process_chunk(state_BHCE: jax.Array, xs: Any) -> tuple[jax.Array, jax.Array]:
        values_BHTE, removed_BHTC, q_BHTC, att_BHTS, k_BHCS, decay_BH11 = xs
        u_BHTE = values_BHTE - removed_BHTC @ state_BHCE
        return decay_BH11 * state_BHCE + k_BHCS @ u_BHTE, q_BHTC @ state_BHCE + att_BHTS @ u_BHTE

    decayed_q_MBHTC, decayed_k_MBHCS = state_decay_MBHT1 * q_MBHTC, decay_MBHTS[..., -1:, :] * k_MBHCS
    att_MBHTS = decay_MBHTS * (q_MBHTC @ k_MBHCS)
    xs = (values_MBHTE, removed_MBHTC, decayed_q_MBHTC, att_MBHTS, decayed_k_MBHCS, state_decay_MBHT1[..., -1:, :])
    state_BHCE, o_MBHTE = jax.lax.scan(process_chunk, state_BHCE, xs)
    o_BMTHE = jnp.moveaxis(jnp.swapaxes(o_MBHTE, 2, 3), 0, 1)
    return o_BMTHE.reshape(v_BTHE.shape[0], -1, *v_BTHE.shape[2:])[:, :length], state_BHCE


STREAMS = ("query", "key", "value")


class DeltaCache(NamedTuple):
    """The state after the earlier tokens, whose rows are channels of keys, and the last inputs of the convolutions."""

    state_BHCE: jax.Array
    histories: dict[str, jax.Array]


class GatedDeltaNet(nn.Module):
    """Gated DeltaNet (arXiv 2412.06464).

    In each head, with q and k of length 1 after a short convolution and SiLU,

        S_t = e^(g_t) S_(t-1) (I - b_t k_t k_t^T) + b_t v_t k_t^T,    o_t = S_t q_t / sqrt(C)
        b_t = sigmoid(W_b x_t),    g_t = -e^A softplus(W_g x_t + d)

    where A and d are the parameters `decay_rate` and `decay_bias`. The output is a projection of norm(o_t) * SiLU(W
    x_t). S is 0 before a document and unchanged by padding.
    """

    config: ModelConfig

    @classmethod
    def init_cache(cls, config: ModelConfig, batch: int, length: int) -> DeltaCache:
        """Return the initial state, whose size does not depend on `length`."""
        del length
        n_heads, channels = config.attention.n_heads, config.head_width
        history = ShortConvolution.init_history(config, batch, n_heads * channels)
        return DeltaCache(_initial_state(config, batch), dict.fromkeys(STREAMS, history))

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, inputs: BlockInputs, cache: DeltaCache | None
    ) -> tuple[jax.Array, DeltaCache | None]:
        config, n_heads, channels = self.config, self.config.attention.n_heads, self.config.head_width
        batch, length = x_BTD.shape[:2]
        histories: dict[str, Any] = dict.fromkeys(STREAMS) if cache is None else dict(cache.histories)

        def project(name: str) -> jax.Array:
            x_BTR = Linear(config, n_heads * channels, has_bias=config.has_qkv_bias, name=name)(x_BTD)
            convolution = ShortConvolution(config, n_heads * channels, name=f"{name}_convolution")
            x_BTR, histories[name] = convolution(x_BTR, inputs, histories[name])
            return to_float32(jax.nn.silu(x_BTR)).reshape(batch, length, n_heads, channels)

        q_BTHC, k_BTHC, v_BTHE = (project(name) for name in STREAMS)
        is_token_BT1 = (inputs.segments_BT > 0)[..., None]
        rate_H = jnp.exp(self.param("decay_rate", initial_decay_rate, (n_heads,)))
        bias_H = self.param("decay_bias", initial_decay_bias, (n_heads,))
        forget_BTH = to_float32(Linear(config, n_heads, has_bias=False, name="forget")(x_BTD)) + bias_H[None, None]
        g_BTH = jnp.where(is_token_BT1, -rate_H[None, None] * jax.nn.softplus(forget_BTH), 0)
        write_BTH = to_float32(Linear(config, n_heads, name="write")(x_BTD))
        beta_BTH = jnp.where(is_token_BT1, jax.nn.sigmoid(write_BTH), 0)

        o_BTHE, state_BHCE = gated_delta_rule(
            l2_normalize(q_BTHC, config.norm_eps) / channels**0.5,
            l2_normalize(k_BTHC, config.norm_eps),
            v_BTHE,
            beta_BTH,
            g_BTH,
            document_ids(inputs),
            _initial_state(config, batch) if cache is None else cache.state_BHCE,
        )
        norm = lookup(NORMS, config.norm, "config.model.norm")(config, name="output_norm")
        gate_BTR = jax.nn.silu(Linear(config, n_heads * channels, name="gate")(x_BTD))
        y_BTR = norm(o_BTHE).astype(gate_BTR.dtype).reshape(gate_BTR.shape) * gate_BTR
        y_BTD = Linear(config, config.d_model, residual=True, name="output")(y_BTR)
        return y_BTD, None if cache is None else DeltaCache(state_BHCE, histories)


def l2_normalize(x: jax.Array, epsilon: Any) -> jax.Array:
    """Divide x by its L2 norm along the last axis."""
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + epsilon)


def initial_decay_rate(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Initialize logarithms of rates that are uniform between 1 and 16 (arXiv 2405.21060)."""
    return jnp.log(jax.random.uniform(key, shape, dtype, 1.0, 16.0))


def initial_decay_bias(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Initialize biases whose softplus is log-uniform between 0.001 and 0.1 (arXiv 2405.21060)."""
    step = jnp.exp(jax.random.uniform(key, shape, dtype, jnp.log(0.001), jnp.log(0.1)))
    return step + jnp.log(-jnp.expm1(-step))


def _initial_state(config: ModelConfig, batch: int) -> jax.Array:
    shape = (batch, config.attention.n_heads, config.head_width, config.head_width)
    return jnp.zeros(shape, jnp.promote_types(config.dtype, jnp.float32))
