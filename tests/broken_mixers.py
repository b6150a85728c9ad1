"""Mixers, and other parts, with mistakes that only some rows show: long ones, some batches, one type, one mode."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from broken_parts import ChunkedState, HonestAttention, HonestFeedForward, HonestState, Mistake

from rustgpt_jax.config.schema import ModelConfig
from rustgpt_jax.model.interfaces import BlockInputs, PositionEncoding
from rustgpt_jax.model.linear import Linear, broadcast_channels, dropout
from rustgpt_jax.model.matmul import accum_dtype, to_float32
from rustgpt_jax.model.norms import RMSNorm
from rustgpt_jax.model.positions import apply_rope


def order(context: BlockInputs) -> tuple[jax.Array, jax.Array]:
    """Places of queries and of keys in the row."""
    order_T = jnp.arange(context.segments_BT.shape[1])
    return order_T[None, :, None], order_T[None, None, :]


def same(segments_BT: jax.Array) -> jax.Array:
    return segments_BT[:, :, None] == segments_BT[:, None, :]


# The future.


class SeesTheNextChunk(HonestAttention):
    """The last token of a chunk of 16 sees the first of the next one."""

    def visible(self, context: BlockInputs) -> jax.Array:
        t, s = order(context)
        return super().visible(context) | ((t % 16 == 15) & (s == t + 1) & same(context.segments_BT))


class NormalizesByItsChunk(HonestAttention):
    """The mean size of a whole chunk of 32 tokens, for rows of more than one."""

    def result(self, y_BTD: jax.Array, context: BlockInputs) -> jax.Array:
        batch, length, width = y_BTD.shape
        if length <= 32 or length % 32:
            return y_BTD
        size_BM = jnp.mean(jnp.square(y_BTD.reshape(batch, -1, 32 * width)), axis=-1)
        return y_BTD / jnp.repeat(1 + size_BM, 32, axis=1)[..., None].astype(y_BTD.dtype)


class SignOfTheNextChunk(HonestAttention):
    """Has no slope."""

    def result(self, y_BTD: jax.Array, context: BlockInputs) -> jax.Array:
        is_last_T = jnp.arange(y_BTD.shape[1]) % 16 == 15
        next_BTD = jnp.sign(jnp.roll(y_BTD, -1, axis=1))
        return y_BTD + jnp.where(is_last_T[None, :, None], jax.lax.stop_gradient(next_BTD), 0)


class SeesTheFutureInTraining(HonestAttention):
    def visible(self, context: BlockInputs) -> jax.Array:
        return super().visible(context) if context.dropout_key is None else same(context.segments_BT)


class SeesTheFutureFarOut(HonestAttention):
    def visible(self, context: BlockInputs) -> jax.Array:
        t, s = order(context)
        return super().visible(context) | ((t > 200) & (s == t + 1) & same(context.segments_BT))


class SeesTheFutureFartherOut(HonestAttention):
    def visible(self, context: BlockInputs) -> jax.Array:
        t, s = order(context)
        return super().visible(context) | ((t > 500) & (s == t + 1) & same(context.segments_BT))


class SeesTheFutureInBfloat16(HonestAttention):
    def visible(self, context: BlockInputs) -> jax.Array:
        return super().visible(context) if self.config.dtype == "float32" else same(context.segments_BT)


class RoundsTheFutureInBfloat16(HonestAttention):
    def result(self, y_BTD: jax.Array, context: BlockInputs) -> jax.Array:
        if self.config.dtype != "bfloat16":
            return y_BTD
        return y_BTD + jax.lax.stop_gradient(jnp.round(jnp.max(y_BTD, axis=1, keepdims=True)))


class NormOverTokensInTraining(HonestFeedForward):
    @nn.compact
    def __call__(self, x_BTD: jax.Array, context: BlockInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
        y_BTD, layer_metrics = HonestFeedForward(self.config, name="inner")(x_BTD, context)
        if context.dropout_key is not None:
            y_BTD = y_BTD / (1 + jnp.mean(jnp.square(y_BTD), axis=1, keepdims=True))
        return y_BTD, layer_metrics


# Documents.


class ThirdDocumentSeesTheSecond(HonestAttention):
    def visible(self, context: BlockInputs) -> jax.Array:
        t, s = order(context)
        return (t >= s) & same(jnp.minimum(context.segments_BT, 2))


class DocumentsByParity(HonestAttention):
    def visible(self, context: BlockInputs) -> jax.Array:
        t, s = order(context)
        return (t >= s) & same(context.segments_BT % 2)


class StateStartsAnewOnlyOnce(HonestState):
    def is_start(self, context: BlockInputs) -> jax.Array:
        is_start_BT = super().is_start(context)
        return is_start_BT & (jnp.cumsum(is_start_BT, axis=1) == 1)


class LeaksDocumentsInTraining(HonestState):
    def is_start(self, context: BlockInputs) -> jax.Array:
        is_start_BT = super().is_start(context)
        return is_start_BT if context.dropout_key is None else jnp.zeros_like(is_start_BT)


class LeaksDocumentsInBfloat16(HonestState):
    def is_start(self, context: BlockInputs) -> jax.Array:
        is_start_BT = super().is_start(context)
        return jnp.zeros_like(is_start_BT) if self.config.dtype == "bfloat16" else is_start_BT


class LeaksDocumentsFarOut(HonestState):
    def is_start(self, context: BlockInputs) -> jax.Array:
        return super().is_start(context) & (jnp.arange(context.segments_BT.shape[1]) < 100)[None]


class LeaksAtBordersOfChunks(HonestState):
    def is_start(self, context: BlockInputs) -> jax.Array:
        return super().is_start(context) & (jnp.arange(context.segments_BT.shape[1]) % 16 != 0)[None]


class FirstDocumentApart(HonestAttention):
    """The first document of a row that has several is scaled."""

    def result(self, y_BTD: jax.Array, context: BlockInputs) -> jax.Array:
        is_packed_B1 = jnp.max(context.segments_BT, axis=1, keepdims=True) > 1
        is_first_BT = is_packed_B1 & (context.segments_BT == 1)
        return jnp.where(is_first_BT[..., None], y_BTD * jnp.asarray(1.05, y_BTD.dtype), y_BTD)


class LastDocumentApart(HonestState):
    """The last of three documents or more begins with the state of the one before."""

    def is_start(self, context: BlockInputs) -> jax.Array:
        last_B1 = jnp.max(context.segments_BT, axis=1, keepdims=True)
        return super().is_start(context) & ~((context.segments_BT == last_B1) & (last_B1 > 2))


# Rows and batches.


class ScaledByItsRow(HonestAttention):
    def result(self, y_BTD: jax.Array, context: BlockInputs) -> jax.Array:
        scale_B = 1 + 0.01 * jnp.arange(y_BTD.shape[0])
        return y_BTD * scale_B[:, None, None].astype(y_BTD.dtype)


class LargeBatchesApart(HonestAttention):
    def result(self, y_BTD: jax.Array, context: BlockInputs) -> jax.Array:
        return y_BTD * (1.02 if y_BTD.shape[0] > 16 else 1.0)


class OneRowApart(HonestAttention):
    def result(self, y_BTD: jax.Array, context: BlockInputs) -> jax.Array:
        return y_BTD * (1.02 if y_BTD.shape[0] == 1 else 1.0)


class FirstStateForAll(HonestState):
    """In large batches every row goes on from the state of the first."""

    @nn.compact
    def __call__(self, x_BTD: jax.Array, context: BlockInputs, cache: Any) -> tuple[jax.Array, Any]:
        if cache is not None and len(cache) > 16:
            cache = jnp.broadcast_to(cache[:1], cache.shape)
        return HonestState(self.config, name="inner")(x_BTD, context, cache)


class SizeOfTheBatchInTraining(HonestFeedForward):
    @nn.compact
    def __call__(self, x_BTD: jax.Array, context: BlockInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
        y_BTD, layer_metrics = HonestFeedForward(self.config, name="inner")(x_BTD, context)
        return y_BTD * (1.0 if context.dropout_key is None else 1 + 0.01 * y_BTD.shape[0]), layer_metrics


class FirstRowInLargeBatches(HonestFeedForward):
    def hidden(self, hidden_BTF: jax.Array) -> jax.Array:
        hidden_BTF = jax.nn.relu(hidden_BTF)
        return hidden_BTF + 0.1 * hidden_BTF[:1, :1] if len(hidden_BTF) > 16 else hidden_BTF


class WindowByLength(HonestAttention):
    """Rows of more than 32 tokens see less."""

    def visible(self, context: BlockInputs) -> jax.Array:
        t, s = order(context)
        return super().visible(context) & ((t - s < 24) | (context.segments_BT.shape[1] <= 32))


def _stretched(x_BTHC: jax.Array, positions_BT: jax.Array, config: ModelConfig) -> jax.Array:
    return apply_rope(x_BTHC, positions_BT // (2 if x_BTHC.shape[1] > 64 else 1), config)


stretched_by_length = PositionEncoding(rotate=_stretched)


# Derivatives.


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def with_slope(x: jax.Array, scale: float) -> jax.Array:
    """x, with a slope that is not its own."""
    del scale
    return x


def _forward(x: jax.Array, scale: float) -> tuple[jax.Array, None]:
    return x, None


def _backward(scale: float, _: None, slope: jax.Array) -> tuple[jax.Array]:
    return (slope * jnp.asarray(scale, slope.dtype),)


with_slope.defvjp(_forward, _backward)


class WrongSlopeOfLongRows(HonestAttention):
    def keys(self, k_BTD: jax.Array) -> jax.Array:
        return with_slope(k_BTD, 1.1) if k_BTD.shape[1] >= 32 else k_BTD


class WrongSlopeOfVeryLongRows(HonestAttention):
    def keys(self, k_BTD: jax.Array) -> jax.Array:
        return with_slope(k_BTD, 0.9) if k_BTD.shape[1] > 128 else k_BTD


class WrongSlopeInBfloat16(HonestAttention):
    def keys(self, k_BTD: jax.Array) -> jax.Array:
        return with_slope(k_BTD, 3.0) if k_BTD.dtype == jnp.bfloat16 else k_BTD


class WrongSlopeInTraining(HonestAttention):
    def result(self, y_BTD: jax.Array, context: BlockInputs) -> jax.Array:
        return y_BTD if context.dropout_key is None else with_slope(y_BTD, 1.1)


class WrongSlopeBehindTheFirstChunk(HonestAttention):
    def keys(self, k_BTD: jax.Array) -> jax.Array:
        return jnp.concatenate([k_BTD[:, :16], with_slope(k_BTD[:, 16:], 1.2)], axis=1)


class NoSlopeBetweenChunks(ChunkedState):
    def carried(self, state_BD: jax.Array) -> jax.Array:
        return jax.lax.stop_gradient(state_BD)


# Rounding.


class DecayInBfloat16(ChunkedState):
    def decays(self, decay_D: jax.Array) -> jax.Array:
        return to_float32(decay_D.astype(jnp.bfloat16))


class CarriedInBfloat16(ChunkedState):
    def carried(self, state_BD: jax.Array) -> jax.Array:
        return state_BD.astype(jnp.bfloat16).astype(state_BD.dtype)


class DecayWithFewBits(ChunkedState):
    """In every type."""

    def decays(self, decay_D: jax.Array) -> jax.Array:
        return jax.lax.reduce_precision(decay_D, 8, 7)


class RoundedBetweenTokens(HonestState):
    """The loop's state is rounded on its way to the next token."""

    def is_token(self, context: BlockInputs) -> jax.Array:
        return super().is_token(context)

    @nn.compact
    def __call__(self, x_BTD: jax.Array, context: BlockInputs, cache: Any) -> tuple[jax.Array, Any]:
        config = self.config
        decay_D = jax.nn.sigmoid(self.param("decay", nn.initializers.ones, (config.d_model,)))
        new_BTD = to_float32(Linear(config, config.d_model, name="input")(x_BTD))
        state_BD = jnp.zeros_like(new_BTD[:, 0]) if cache is None else cache

        def step(h_BD: jax.Array, token: Any) -> tuple[jax.Array, jax.Array]:
            new_BD, is_start_B, is_token_B = token
            after_BD = decay_D[None] * jnp.where(is_start_B[:, None], 0, h_BD) + new_BD
            h_BD = jnp.where(is_token_B[:, None], after_BD.astype(config.dtype).astype(h_BD.dtype), h_BD)
            return h_BD, h_BD

        tokens = (new_BTD, self.is_start(context), self.is_token(context))
        last_BD, h_TBD = jax.lax.scan(step, state_BD, jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), tokens))
        h_BTD = jnp.swapaxes(h_TBD, 0, 1).astype(x_BTD.dtype)
        y_BTD = Linear(config, config.d_model, residual=True, name="output")(h_BTD)
        return y_BTD, None if cache is None else last_BD


class AssociativeInBfloat16(HonestState):
    """The parallel form of the recurrence, in the type of the activations."""

    def typed(self, x: jax.Array) -> jax.Array:
        return x

    def decays(self, rate_D: jax.Array, dtype: Any) -> jax.Array:
        return jax.nn.sigmoid(rate_D).astype(dtype)

    @nn.compact
    def __call__(self, x_BTD: jax.Array, context: BlockInputs, cache: Any) -> tuple[jax.Array, Any]:
        config = self.config
        decay_D = self.decays(self.param("decay", nn.initializers.ones, (config.d_model,)), x_BTD.dtype)
        new_BTD = self.typed(Linear(config, config.d_model, name="input")(x_BTD))
        is_token_BT1 = self.is_token(context)[..., None]
        kept_BTD = jnp.where(self.is_start(context)[..., None], 0, decay_D[None, None])
        kept_BTD = jnp.where(is_token_BT1, kept_BTD, 1).astype(new_BTD.dtype)
        new_BTD = jnp.where(is_token_BT1, new_BTD, 0)
        if cache is not None:
            new_BTD = new_BTD.at[:, 0].add((kept_BTD[:, 0] * cache).astype(new_BTD.dtype))

        def then(first: Any, second: Any) -> Any:
            return first[0] * second[0], second[0] * first[1] + second[1]

        h_BTD = jax.lax.associative_scan(then, (kept_BTD, new_BTD), axis=1)[1]
        y_BTD = Linear(config, config.d_model, residual=True, name="output")(h_BTD.astype(x_BTD.dtype))
        return y_BTD, None if cache is None else h_BTD[:, -1].astype(cache.dtype)


class AssociativeDecayInBfloat16(AssociativeInBfloat16):
    """Only its decay is in the type of the activations."""

    def typed(self, x: jax.Array) -> jax.Array:
        return to_float32(x)


class LogOfTheDecayInBfloat16(AssociativeInBfloat16):
    """exp of rounded logarithms."""

    def typed(self, x: jax.Array) -> jax.Array:
        return to_float32(x)

    def decays(self, rate_D: jax.Array, dtype: Any) -> jax.Array:
        return jnp.exp(to_float32(-jax.nn.softplus(rate_D).astype(dtype)))


class CacheInBfloat16(HonestState):
    @staticmethod
    def init_cache(config: ModelConfig, batch: int, length: int) -> jax.Array:
        del length
        return jnp.zeros((batch, config.d_model), config.dtype)

    @nn.compact
    def __call__(self, x_BTD: jax.Array, context: BlockInputs, cache: Any) -> tuple[jax.Array, Any]:
        y_BTD, after = HonestState(self.config, name="inner")(
            x_BTD, context, None if cache is None else to_float32(cache)
        )
        return y_BTD, None if cache is None else after.astype(cache.dtype)


# Long rows.


class FactoredDecay(HonestAttention):
    """exp(-r (t - s)) as exp(-r t) exp(r s), which leaves the range of float32."""

    @nn.compact
    def __call__(self, x_BTD: jax.Array, context: BlockInputs, cache: Any) -> tuple[jax.Array, Any]:
        return factored(self, x_BTD, context, cache, 0.1)


class FactoredSlowDecay(HonestAttention):
    """The same, with a decay for which the exponents of only the longest rows are too large."""

    @nn.compact
    def __call__(self, x_BTD: jax.Array, context: BlockInputs, cache: Any) -> tuple[jax.Array, Any]:
        return factored(self, x_BTD, context, cache, 0.04)


def factored(mixer: Any, x_BTD: jax.Array, context: BlockInputs, cache: Any, rate: float) -> tuple[jax.Array, Any]:
    """Linear attention with fading weights, without a cache."""
    config = mixer.config
    q, k, v = (Linear(config, config.d_model, name=name)(x_BTD) for name in ("query", "key", "value"))
    positions_BT1 = context.positions_BT[..., None].astype(accum_dtype(q, k))
    scores_BTS = jnp.einsum("BTD,BSD->BTS", q * jnp.exp(-rate * positions_BT1), k * jnp.exp(rate * positions_BT1))
    y_BTD = jnp.einsum("BTS,BSD->BTD", jnp.where(mixer.visible(context), scores_BTS, 0), to_float32(v))
    return Linear(config, config.d_model, residual=True, name="output")(y_BTD.astype(x_BTD.dtype)), cache


def _rounded_positions(x_BTHC: jax.Array, positions_BT: jax.Array, config: ModelConfig) -> jax.Array:
    return apply_rope(x_BTHC, positions_BT.astype(config.dtype), config)


positions_in_bfloat16 = PositionEncoding(rotate=_rounded_positions)


class PhaseInBfloat16(HonestAttention):
    """Positions as bfloat16 numbers, which above 256 are not all whole numbers."""

    def keys(self, k_BTD: jax.Array) -> jax.Array:
        return k_BTD

    def result(self, y_BTD: jax.Array, context: BlockInputs) -> jax.Array:
        phase_BT1 = context.positions_BT[..., None].astype(y_BTD.dtype)
        return y_BTD * (1 + 0.5 * jnp.sin(phase_BT1))


# Prompts.


class LongPromptsCutOff(HonestAttention):
    """Of a prompt of more than 64 tokens, only the last 64 are seen."""

    def cached_visible(self, context: BlockInputs, slots: int) -> jax.Array:
        visible_BTS = super().cached_visible(context, slots)
        if context.positions_BT.shape[1] <= 64:
            return visible_BTS
        return visible_BTS & (jnp.arange(slots)[None, None, :] > context.positions_BT[:, :, None] - 64)


class PromptsInEights(HonestAttention):
    """A prompt whose length is a multiple of 8 sees itself alone."""

    def cached_visible(self, context: BlockInputs, slots: int) -> jax.Array:
        visible_BTS = super().cached_visible(context, slots)
        if context.positions_BT.shape[1] % 8:
            return visible_BTS
        return visible_BTS & (jnp.arange(slots)[None, None, :] >= context.positions_BT[:, :1, None])


class LastOfALongPromptLost(HonestState):
    """The state after more than 128 tokens is that before the last of them."""

    @nn.compact
    def __call__(self, x_BTD: jax.Array, context: BlockInputs, cache: Any) -> tuple[jax.Array, Any]:
        length = x_BTD.shape[1]
        inner = HonestState(self.config, name="inner")
        if cache is None or length <= 128:
            return inner(x_BTD, context, cache)
        y_BTD, _ = inner(x_BTD, context, cache)
        _, after = inner(x_BTD[:, :-1], BlockInputs(context.positions_BT[:, :-1], context.segments_BT[:, :-1]), cache)
        return y_BTD, after


class PositionsTo2047(HonestAttention):
    def slots(self, context: BlockInputs, n_slots: int) -> jax.Array:
        return jnp.where(context.segments_BT > 0, jnp.minimum(context.positions_BT, 2047), n_slots)


class WrapsOnce(HonestAttention):
    """A ring of 1,000 slots: after it has been filled twice, tokens are lost."""

    def slots(self, context: BlockInputs, n_slots: int) -> jax.Array:
        is_lost_BT = context.positions_BT >= 2000
        return jnp.where((context.segments_BT > 0) & ~is_lost_BT, context.positions_BT, n_slots)


# Heads.


class Grouped(nn.Module):
    """Attention with heads of keys and values that several heads of queries share. It has no mistake."""

    config: ModelConfig

    @staticmethod
    def init_cache(config: ModelConfig, batch: int, length: int) -> dict[str, jax.Array]:
        shape = (batch, length, config.attention.kv_heads, config.head_width)
        return dict.fromkeys(("key", "value"), jnp.zeros(shape, config.dtype))

    def shared(self, x_BSKC: jax.Array, is_cached: bool) -> jax.Array:
        return jnp.repeat(x_BSKC, self.config.attention.n_heads // x_BSKC.shape[2], axis=2)

    @nn.compact
    def __call__(self, x_BTD: jax.Array, context: BlockInputs, cache: Any) -> tuple[jax.Array, Any]:
        config, (batch, length) = self.config, x_BTD.shape[:2]
        counts = {"query": config.attention.n_heads, "key": config.attention.kv_heads}
        counts["value"] = counts["key"]

        def heads(name: str) -> jax.Array:
            x_BTR = Linear(config, counts[name] * config.head_width, name=name)(x_BTD)
            return x_BTR.reshape(batch, length, counts[name], config.head_width)

        q_BTHC, now = heads("query"), {name: heads(name) for name in ("key", "value")}
        t, s = order(context)
        visible_BTS = (t >= s) & same(context.segments_BT)
        if cache is not None:
            n_slots = cache["key"].shape[1]
            slots_BT = jnp.where(context.segments_BT > 0, context.positions_BT, n_slots)
            rows_B1 = jnp.arange(batch)[:, None]
            cache = now = {name: cache[name].at[rows_B1, slots_BT].set(now[name], mode="drop") for name in now}
            visible_BTS = jnp.arange(n_slots)[None, None, :] <= context.positions_BT[:, :, None]
        k_BSHC, v_BSHC = (self.shared(now[name], cache is not None) for name in ("key", "value"))
        scores_BHTS = jnp.einsum("BTHC,BSHC->BHTS", q_BTHC, k_BSHC, preferred_element_type=accum_dtype(q_BTHC))
        scores_BHTS = jnp.where(visible_BTS[:, None], scores_BHTS * config.head_width**-0.5, -jnp.inf)
        att_BHTS = jax.nn.softmax(scores_BHTS, axis=-1).astype(v_BSHC.dtype)
        y_BTD = jnp.einsum("BHTS,BSHC->BTHC", att_BHTS, v_BSHC).reshape(batch, length, -1)
        return Linear(config, config.d_model, residual=True, name="output")(y_BTD), cache


class FirstHeadForAll(Grouped):
    """All heads of queries share the first one of keys and values."""

    def shared(self, x_BSKC: jax.Array, is_cached: bool) -> jax.Array:
        return jnp.repeat(x_BSKC[:, :, :1], self.config.attention.n_heads, axis=2)


class AllHeadsTurned(Grouped):
    """As many heads of keys and values as of queries are read from the cache in another order."""

    def shared(self, x_BSKC: jax.Array, is_cached: bool) -> jax.Array:
        shared_BSHC = super().shared(x_BSKC, is_cached)
        is_turned = is_cached and x_BSKC.shape[2] == self.config.attention.n_heads
        return shared_BSHC[:, :, ::-1] if is_turned else shared_BSHC


class OneHeadIsTheLatest(Grouped):
    """With one head of keys and values, a cache gives the values in the opposite order of channels."""

    def shared(self, x_BSKC: jax.Array, is_cached: bool) -> jax.Array:
        shared_BSHC = super().shared(x_BSKC, is_cached)
        return shared_BSHC[..., ::-1] if is_cached and x_BSKC.shape[2] == 1 else shared_BSHC


# Dropout.


class DropsInEvaluation(HonestAttention):
    def result(self, y_BTD: jax.Array, context: BlockInputs) -> jax.Array:
        if context.dropout_key is None:
            context = context._replace(dropout_key=jax.random.key(0))
        return dropout(y_BTD, self.config.dropout, context, site=3)


class ScalesInEvaluation(HonestAttention):
    """The old form of dropout: nothing is scaled in training, and all in evaluation."""

    def result(self, y_BTD: jax.Array, context: BlockInputs) -> jax.Array:
        return y_BTD * (1 - self.config.dropout) if context.dropout_key is None else y_BTD


class DropsWhileDecoding(HonestFeedForward):
    @nn.compact
    def __call__(self, x_BTD: jax.Array, context: BlockInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
        y_BTD, layer_metrics = HonestFeedForward(self.config, name="inner")(x_BTD, context)
        return y_BTD * (1 - self.config.dropout if x_BTD.shape[1] == 1 else 1.0), layer_metrics


class LeavesOutItsBiasInTraining(HonestAttention):
    def result(self, y_BTD: jax.Array, context: BlockInputs) -> jax.Array:
        return y_BTD if context.dropout_key is not None else y_BTD + jnp.asarray(0.01, y_BTD.dtype)


class NormScaledInTraining(RMSNorm):
    """Large batches are normed together."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = to_float32(x)
        axes = (0, -1) if len(x) > 16 else (-1,)
        y = y / jnp.sqrt(jnp.mean(jnp.square(y), axis=axes, keepdims=True) + self.config.norm_eps)
        return (y * broadcast_channels(self.param("scale", nn.initializers.ones, x.shape[-1:]), x)).astype(x.dtype)


def _mistake(name: str, check: str, message: str, kind: str = "mixers") -> Mistake:
    return Mistake(f"{kind}/broken_mixers:{name}", check, message)


MISTAKES_OF_LONG_ROWS = (
    _mistake("SeesTheNextChunk", "causality", r"output token 15, input token 16: a slope"),
    _mistake("NormalizesByItsChunk", "causality", r"rows of 64 tokens.*output token"),
    _mistake("SignOfTheNextChunk", "causality", r"changes with a later token.*output token 15, input token 16"),
    _mistake("SeesTheFutureInTraining", "causality", r"training; at row 0, output token 0"),
    _mistake("SeesTheFutureFarOut", "causality", r"rows of 521 tokens.*output token 2\d\d"),
    _mistake("SeesTheFutureFartherOut", "causality", r"rows of 521 tokens"),
    _mistake("SeesTheFutureInBfloat16", "causality", r"bfloat16, evaluation"),
    _mistake("RoundsTheFutureInBfloat16", "causality", r"changes with a later token, in .*bfloat16, evaluation"),
    _mistake("NormOverTokensInTraining", "causality", r"training", "feedforwards"),
    _mistake("ThirdDocumentSeesTheSecond", "isolation", r"documents \d and \d of \d"),
    _mistake("DocumentsByParity", "isolation", r"documents \d and \d of \d"),
    _mistake("StateStartsAnewOnlyOnce", "isolation", r"documents 3 and \d of \d"),
    _mistake("LeaksDocumentsInTraining", "isolation", r"64 tokens, float32, training"),
    _mistake("LeaksDocumentsInBfloat16", "isolation", r"33 tokens, bfloat16"),
    _mistake("LeaksDocumentsFarOut", "isolation", r"521 tokens"),
    _mistake("LeaksAtBordersOfChunks", "isolation", r"document"),
    _mistake("FirstDocumentApart", "isolation", r"a document alone is not"),
    _mistake("LastDocumentApart", "isolation", r"documents \d and \d of \d"),
    _mistake("ScaledByItsRow", "rows", r"not what it is alone, in 2 rows of 40 tokens.*row 1"),
    _mistake("LargeBatchesApart", "rows", r"not what it is alone, in 17 rows of 40 tokens"),
    _mistake("OneRowApart", "rows", r"not what it is alone, in 2 rows of 40 tokens"),
    _mistake("FirstStateForAll", "rows", r"with a cache, a row of 1 is not"),
    _mistake("SizeOfTheBatchInTraining", "rows", r"training", "feedforwards"),
    _mistake("FirstRowInLargeBatches", "rows", r"in 17 rows of 40 tokens", "feedforwards"),
    _mistake("NormScaledInTraining", "rows", r"in 17 rows of 40 tokens", "norms"),
    _mistake("WindowByLength", "rows", r"the length of a row changes its outputs"),
    _mistake("stretched_by_length", "rows", r"the length of a row changes its outputs", "positions"),
    _mistake("WrongSlopeOfLongRows", "gradients", r"rows of 40 tokens"),
    _mistake("WrongSlopeOfVeryLongRows", "gradients", r"rows of 130 tokens"),
    _mistake("WrongSlopeBehindTheFirstChunk", "gradients", r"rows of 40 tokens"),
    _mistake("WrongSlopeInBfloat16", "gradients", r"the slopes of bfloat16 are not"),
    _mistake("NoSlopeBetweenChunks", "gradients", r"rows of 40 tokens"),
    _mistake("DecayInBfloat16", "precision", r"a rounded decay is raised to a power; at broken_parts.py"),
    _mistake("CarriedInBfloat16", "precision", r"add up: .* in 384; at broken_mixers.py"),
    _mistake("DecayWithFewBits", "precision", r"a rounded decay is raised to a power"),
    _mistake("RoundedBetweenTokens", "precision", r"a loop keeps its state in fewer bits .* broken_mixers.py"),
    _mistake("AssociativeInBfloat16", "precision", r"associative scan|add up"),
    _mistake("AssociativeDecayInBfloat16", "precision", r"an associative scan multiplies decays that were rounded"),
    _mistake("LogOfTheDecayInBfloat16", "precision", r"an associative scan multiplies decays that were rounded"),
    _mistake("CacheInBfloat16", "precision", r"the cache keeps its state in fewer bits .* broken_mixers.py"),
    _mistake("FactoredDecay", "drift", r"not finite|error of float32"),
    _mistake("FactoredSlowDecay", "drift", r"not finite|error of float32"),
    _mistake("positions_in_bfloat16", "drift", r"the error of bfloat16 grows", "positions"),
    _mistake("PhaseInBfloat16", "drift", r"the error of bfloat16 grows"),
    _mistake("PromptsInEights", "prefill", r"8 tokens after a prompt of 1 and one more"),
    _mistake("LongPromptsCutOff", "prefill", r"in a prompt of 131 tokens"),
    _mistake("LastOfALongPromptLost", "prefill", r"one token after a prompt of 131"),
    _mistake("PositionsTo2047", "prefill", r"from position 1930"),
    _mistake("WrapsOnce", "prefill", r"from position \d{4}"),
    _mistake("FirstHeadForAll", "parameters", r"a part of a parameter is never used; at the parameter .*mixer/key"),
    _mistake("OneHeadIsTheLatest", "heads", r"with a cache"),
    _mistake("AllHeadsTurned", "heads", r"with a cache"),
    _mistake("DropsInEvaluation", "dropout", r"evaluation changes with the rate"),
    _mistake("ScalesInEvaluation", "dropout", r"evaluation changes with the rate"),
    _mistake("DropsWhileDecoding", "dropout", r"with a cache", "feedforwards"),
    _mistake("LeavesOutItsBiasInTraining", "dropout", r"a training that drops nothing"),
    _mistake("WrongSlopeInTraining", "dropout", r"the slopes of a training"),
)
