"""Correct components, and variants of them with one mistake each that an intended check must find.

Some mistakes show only in long rows, some batches, one dtype or one mode.
"""

import itertools
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from tokenizers import Tokenizer, normalizers

from rustgpt_jax.config.schema import DataConfig, ModelConfig, OptimizerConfig, ScheduleConfig
from rustgpt_jax.conformance.components import Scope
from rustgpt_jax.model.interfaces import BlockInputs, PositionEncoding
from rustgpt_jax.model.layers import Linear, RMSNorm, broadcast_channels, dropout
from rustgpt_jax.model.matmul import accum_dtype, to_float32
from rustgpt_jax.model.positions import LearnedPositions, Rope, apply_rope
from rustgpt_jax.tokenizers import TOKENIZERS, Document, plain_document

Result = tuple[jax.Array, Any]


def variant(base: Any, **methods: Any) -> Any:
    """A subclass with other methods."""
    return type("Variant", (base,), methods)


def positions(inputs: BlockInputs) -> tuple[jax.Array, jax.Array]:
    """Indices in the row of queries (1, T, 1) and of keys (1, 1, S)."""
    order_T = jnp.arange(inputs.segments_BT.shape[1])
    return order_T[None, :, None], order_T[None, None, :]


def same(segments_BT: jax.Array) -> jax.Array:
    return segments_BT[:, :, None] == segments_BT[:, None, :]


# Correct mixers.


class Attention(nn.Module):
    """Attention with one head, in steps that variants replace."""

    config: ModelConfig

    @staticmethod
    def init_cache(config: ModelConfig, batch: int, length: int) -> dict[str, jax.Array]:
        return dict.fromkeys(("keys", "values"), jnp.zeros((batch, length, config.d_model), config.dtype))

    def mask(self, inputs: BlockInputs) -> jax.Array:
        t, s = positions(inputs)
        return (t >= s) & same(inputs.segments_BT)

    def cached_mask(self, inputs: BlockInputs, n_slots: int) -> jax.Array:
        return jnp.arange(n_slots)[None, None, :] <= inputs.positions_BT[:, :, None]

    def slots(self, inputs: BlockInputs, n_slots: int) -> jax.Array:
        return jnp.where(inputs.segments_BT > 0, inputs.positions_BT, n_slots)

    def weights(self, scores_BTS: jax.Array) -> jax.Array:
        return jax.nn.softmax(scores_BTS, axis=-1)

    def keys(self, k_BTD: jax.Array) -> jax.Array:
        return k_BTD

    def result(self, y_BTD: jax.Array, inputs: BlockInputs) -> jax.Array:
        return y_BTD

    @nn.compact
    def __call__(self, x_BTD: jax.Array, inputs: BlockInputs, cache: Any) -> Result:
        q, k, v = (Linear(self.config, self.config.d_model, name=name)(x_BTD) for name in ("query", "key", "value"))
        k, mask_BTS = self.keys(k), self.mask(inputs)
        if cache is not None:
            slots_BT = self.slots(inputs, cache["keys"].shape[1])
            rows_B1 = jnp.arange(len(slots_BT))[:, None]
            new = {"keys": k, "values": v}
            cache = {name: cache[name].at[rows_B1, slots_BT].set(new[name], mode="drop") for name in cache}
            k, v, mask_BTS = cache["keys"], cache["values"], self.cached_mask(inputs, cache["keys"].shape[1])
        scores_BTS = jnp.einsum("BTD,BSD->BTS", q, k, preferred_element_type=accum_dtype(q, k))
        scores_BTS = jnp.where(mask_BTS, scores_BTS * self.config.d_model**-0.5, -jnp.inf)
        y_BTD = jnp.einsum("BTS,BSD->BTD", self.weights(scores_BTS).astype(v.dtype), v)
        y_BTD = Linear(self.config, self.config.d_model, residual=True, name="output")(y_BTD)
        return self.result(y_BTD, inputs), cache


class Recurrence(nn.Module):
    """h_t = a h_(t-1) + W x_t, read out by another matrix."""

    config: ModelConfig

    @staticmethod
    def init_cache(config: ModelConfig, batch: int, length: int) -> jax.Array:
        del length
        return jnp.zeros((batch, config.d_model), jnp.promote_types(config.dtype, jnp.float32))

    def is_start(self, inputs: BlockInputs) -> jax.Array:
        before_BT = jnp.concatenate([inputs.segments_BT[:, :1], inputs.segments_BT[:, :-1]], axis=1)
        return inputs.segments_BT != before_BT

    def is_token(self, inputs: BlockInputs) -> jax.Array:
        return inputs.segments_BT > 0

    def cast_input(self, x_BTD: jax.Array) -> jax.Array:
        return to_float32(x_BTD)

    def cast_state(self, h_BD: jax.Array) -> jax.Array:
        return h_BD

    @nn.compact
    def __call__(self, x_BTD: jax.Array, inputs: BlockInputs, cache: Any) -> Result:
        config = self.config
        decay_D = jax.nn.sigmoid(self.param("decay", nn.initializers.ones, (config.d_model,)))[None]
        new_BTD = self.cast_input(Linear(config, config.d_model, name="input")(x_BTD))

        def step(h_BD: jax.Array, token: Any) -> tuple[jax.Array, jax.Array]:
            new_BD, is_start_B, is_token_B = token
            after_BD = decay_D.astype(h_BD.dtype) * jnp.where(is_start_B[:, None], 0, h_BD) + new_BD
            h_BD = jnp.where(is_token_B[:, None], self.cast_state(after_BD), h_BD)
            return h_BD, h_BD

        tokens = (new_BTD, self.is_start(inputs), self.is_token(inputs))
        start_BD = jnp.zeros_like(new_BTD[:, 0]) if cache is None else cache
        last_BD, h_TBD = jax.lax.scan(step, start_BD, jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), tokens))
        h_BTD = jnp.swapaxes(h_TBD, 0, 1).astype(x_BTD.dtype)
        y_BTD = Linear(config, config.d_model, residual=True, name="output")(h_BTD)
        return y_BTD, None if cache is None else last_BD


class GroupedAttention(nn.Module):
    """Attention with key-value heads that several query heads share."""

    config: ModelConfig

    @staticmethod
    def init_cache(config: ModelConfig, batch: int, length: int) -> dict[str, jax.Array]:
        shape = (batch, length, config.attention.kv_heads, config.head_width)
        return dict.fromkeys(("key", "value"), jnp.zeros(shape, config.dtype))

    def repeat(self, x_BSKC: jax.Array, is_cached: bool) -> jax.Array:
        return jnp.repeat(x_BSKC, self.config.attention.n_heads // x_BSKC.shape[2], axis=2)

    @nn.compact
    def __call__(self, x_BTD: jax.Array, inputs: BlockInputs, cache: Any) -> Result:
        config, (batch, length) = self.config, x_BTD.shape[:2]
        n_kv_heads = config.attention.kv_heads

        def heads(name: str, count: int) -> jax.Array:
            x_BTR = Linear(config, count * config.head_width, name=name)(x_BTD)
            return x_BTR.reshape(batch, length, count, config.head_width)

        q_BTHC, now = (
            heads("query", config.attention.n_heads),
            {name: heads(name, n_kv_heads) for name in ("key", "value")},
        )
        t, s = positions(inputs)
        mask_BTS = (t >= s) & same(inputs.segments_BT)
        if cache is not None:
            n_slots = cache["key"].shape[1]
            slots_BT = jnp.where(inputs.segments_BT > 0, inputs.positions_BT, n_slots)
            rows_B1 = jnp.arange(batch)[:, None]
            cache = now = {name: cache[name].at[rows_B1, slots_BT].set(now[name], mode="drop") for name in now}
            mask_BTS = jnp.arange(n_slots)[None, None, :] <= inputs.positions_BT[:, :, None]
        k_BSHC, v_BSHC = (self.repeat(now[name], cache is not None) for name in ("key", "value"))
        scores_BHTS = jnp.einsum("BTHC,BSHC->BHTS", q_BTHC, k_BSHC, preferred_element_type=accum_dtype(q_BTHC))
        scores_BHTS = jnp.where(mask_BTS[:, None], scores_BHTS * config.head_width**-0.5, -jnp.inf)
        att_BHTS = jax.nn.softmax(scores_BHTS, axis=-1).astype(v_BSHC.dtype)
        y_BTD = jnp.einsum("BHTS,BSHC->BTHC", att_BHTS, v_BSHC).reshape(batch, length, -1)
        return Linear(config, config.d_model, residual=True, name="output")(y_BTD), cache


# Correct mixers of unusual construction.


class SubclassedAttention(Attention):
    """Calls `super().__call__`."""

    @nn.compact
    def __call__(self, x_BTD: jax.Array, inputs: BlockInputs, cache: Any) -> Result:
        y_BTD, cache = super().__call__(x_BTD, inputs, cache)
        return y_BTD + Linear(self.config, self.config.d_model, residual=True, name="skip")(x_BTD), cache


class SowsEntropy(Attention):
    """Has an auxiliary output beside its result."""

    def weights(self, scores_BTS: jax.Array) -> jax.Array:
        weights_BTS = super().weights(scores_BTS)
        entropy_BT = -jnp.sum(jax.scipy.special.xlogy(weights_BTS, weights_BTS), axis=-1)
        self.sow("intermediates", "entropy", jnp.mean(entropy_BT))
        return weights_BTS


class Stateless(nn.Module):
    """Mixes channels only: its cache has no arrays."""

    config: ModelConfig

    @staticmethod
    def init_cache(config: ModelConfig, batch: int, length: int) -> dict[str, jax.Array]:
        del config, batch, length
        return {}

    @nn.compact
    def __call__(self, x_BTD: jax.Array, inputs: BlockInputs, cache: Any) -> Result:
        gate_BTD = jax.nn.sigmoid(Linear(self.config, self.config.d_model, name="gate")(x_BTD))
        return Linear(self.config, self.config.d_model, residual=True, name="output")(gate_BTD * x_BTD), cache


class ChunkedRecurrence(Recurrence):
    """The same recurrence over chunks of 16 tokens, each by a matrix of decays; the last chunk may be shorter."""

    def decays(self, decay_D: jax.Array) -> jax.Array:
        return decay_D

    @nn.compact
    def __call__(self, x_BTD: jax.Array, inputs: BlockInputs, cache: Any) -> Result:
        config, (batch, length) = self.config, x_BTD.shape[:2]
        decay_D = self.decays(jax.nn.sigmoid(self.param("decay", nn.initializers.ones, (config.d_model,))))
        new_BTD = to_float32(Linear(config, config.d_model, name="input")(x_BTD))
        is_token_BT = self.is_token(inputs)
        document_BT = jnp.cumsum(self.is_start(inputs) & is_token_BT, axis=1)
        state_BD = jnp.zeros((batch, config.d_model), new_BTD.dtype) if cache is None else cache
        before_B, results = document_BT[:, 0], []
        for begin in range(0, length, 16):
            chunk = slice(begin, begin + 16)
            age_BT = jnp.cumsum(is_token_BT[:, chunk], axis=1)
            distance_BTS = age_BT[:, :, None] - age_BT[:, None, :]
            order_T = jnp.arange(age_BT.shape[1])
            is_seen_BTS = (order_T[None, :, None] >= order_T[None, None, :]) & is_token_BT[:, None, chunk]
            is_seen_BTS &= document_BT[:, chunk, None] == document_BT[:, None, chunk]
            powers_BTSD = decay_D[None, None, None] ** jnp.maximum(distance_BTS, 0)[..., None].astype(decay_D.dtype)
            h_BTD = jnp.einsum("BTSD,BSD->BTD", jnp.where(is_seen_BTS[..., None], powers_BTSD, 0), new_BTD[:, chunk])
            continues_BT1 = (document_BT[:, chunk] == before_B[:, None])[..., None]
            since_BTD = decay_D[None, None] ** age_BT[..., None].astype(decay_D.dtype)
            h_BTD = h_BTD + jnp.where(continues_BT1, since_BTD * state_BD[:, None], 0)
            results.append(h_BTD)
            state_BD, before_B = self.cast_state(h_BTD[:, -1]), document_BT[:, chunk][:, -1]
        h_BTD = jnp.concatenate(results, axis=1).astype(x_BTD.dtype)
        y_BTD = Linear(config, config.d_model, residual=True, name="output")(h_BTD)
        return y_BTD, None if cache is None else state_BD


class FeedForward(nn.Module):
    """Two matrices with a ReLU between them."""

    config: ModelConfig

    def hidden(self, hidden_BTF: jax.Array) -> jax.Array:
        return jax.nn.relu(hidden_BTF)

    def result(self, y_BTD: jax.Array, inputs: BlockInputs) -> jax.Array:
        return y_BTD

    @nn.compact
    def __call__(self, x_BTD: jax.Array, inputs: BlockInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
        hidden_BTF = self.hidden(Linear(self.config, 2 * self.config.d_model, name="up")(x_BTD))
        y_BTD = Linear(self.config, self.config.d_model, residual=True, name="down")(hidden_BTF)
        return self.result(y_BTD, inputs), {}


# Mistakes in who sees whom. In a variant of `mask`, the correct mask is `Attention.mask(self, x)`.


def sees_next_token(is_affected: Any) -> Any:
    """Attention that sees the next token of the document at some positions t of queries."""

    def mask(self: Any, x: BlockInputs) -> jax.Array:
        t, s = positions(x)
        return Attention.mask(self, x) | (is_affected(t) & (s == t + 1) & same(x.segments_BT))

    return variant(Attention, mask=mask)


SeesNextToken = sees_next_token(lambda t: t >= 0)
SeesNextChunk = sees_next_token(lambda t: t % 16 == 15)
SeesFutureFarOut = sees_next_token(lambda t: t > 200)
SeesFutureFartherOut = sees_next_token(lambda t: t > 500)
SeesFutureInTraining = variant(
    Attention, mask=lambda self, x: Attention.mask(self, x) if x.dropout_key is None else same(x.segments_BT)
)
SeesFutureInBfloat16 = variant(
    Attention,
    mask=lambda self, x: Attention.mask(self, x) if self.config.dtype == "float32" else same(x.segments_BT),
)
SeesOtherDocuments = variant(
    Attention, mask=lambda self, x: jnp.broadcast_to(positions(x)[0] >= positions(x)[1], same(x.segments_BT).shape)
)
ThirdDocumentSeesSecond = variant(
    Attention, mask=lambda self, x: Attention.mask(self, x._replace(segments_BT=jnp.minimum(x.segments_BT, 2)))
)
DocumentsByParity = variant(
    Attention, mask=lambda self, x: Attention.mask(self, x._replace(segments_BT=x.segments_BT % 2))
)
# Rows of more than 32 tokens see less.
WindowByLength = variant(
    Attention,
    mask=lambda self, x: (
        Attention.mask(self, x) & ((positions(x)[0] - positions(x)[1] < 24) | (x.segments_BT.shape[1] <= 32))
    ),
)


class NormalizesByChunk(Attention):
    """The mean square of a whole chunk of 32 tokens, for rows of more than one chunk."""

    def result(self, y_BTD: jax.Array, inputs: BlockInputs) -> jax.Array:
        batch, length, width = y_BTD.shape
        if length <= 32 or length % 32:
            return y_BTD
        scale_BM = jnp.mean(jnp.square(y_BTD.reshape(batch, -1, 32 * width)), axis=-1)
        return y_BTD / jnp.repeat(1 + scale_BM, 32, axis=1)[..., None].astype(y_BTD.dtype)


class SignOfNextChunk(Attention):
    """Depends on the next chunk with a derivative of 0."""

    def result(self, y_BTD: jax.Array, inputs: BlockInputs) -> jax.Array:
        is_last_T = jnp.arange(y_BTD.shape[1]) % 16 == 15
        next_BTD = jnp.sign(jnp.roll(y_BTD, -1, axis=1))
        return y_BTD + jnp.where(is_last_T[None, :, None], jax.lax.stop_gradient(next_BTD), 0)


class RoundsFutureInBfloat16(Attention):
    def result(self, y_BTD: jax.Array, inputs: BlockInputs) -> jax.Array:
        if self.config.dtype != "bfloat16":
            return y_BTD
        return y_BTD + jax.lax.stop_gradient(jnp.round(jnp.max(y_BTD, axis=1, keepdims=True)))


class FirstDocumentScaled(Attention):
    """The first document of a row that has several is scaled."""

    def result(self, y_BTD: jax.Array, inputs: BlockInputs) -> jax.Array:
        is_packed_B1 = jnp.max(inputs.segments_BT, axis=1, keepdims=True) > 1
        is_first_BT = is_packed_B1 & (inputs.segments_BT == 1)
        return jnp.where(is_first_BT[..., None], y_BTD * jnp.asarray(1.05, y_BTD.dtype), y_BTD)


# Mistakes in where a recurrence starts.

StateLeaksOverDocuments = variant(Recurrence, is_start=lambda self, x: jnp.zeros_like(x.segments_BT, bool))
StateMovedByPadding = variant(Recurrence, is_token=lambda self, x: jnp.ones_like(x.segments_BT, bool))
StateRestartsWithEachCall = variant(
    Recurrence, is_start=lambda self, x: Recurrence.is_start(self, x).at[:, 0].set(True)
)
StateRestartsOnlyOnce = variant(
    Recurrence,
    is_start=lambda self, x: Recurrence.is_start(self, x) & (jnp.cumsum(Recurrence.is_start(self, x), axis=1) == 1),
)
LeaksDocumentsInTraining = variant(
    Recurrence, is_start=lambda self, x: Recurrence.is_start(self, x) & (x.dropout_key is None)
)
LeaksDocumentsInBfloat16 = variant(
    Recurrence, is_start=lambda self, x: Recurrence.is_start(self, x) & (self.config.dtype != "bfloat16")
)
LeaksDocumentsFarOut = variant(
    Recurrence, is_start=lambda self, x: Recurrence.is_start(self, x) & (positions(x)[1][0] < 100)
)
LeaksAtChunkBorders = variant(
    Recurrence, is_start=lambda self, x: Recurrence.is_start(self, x) & (positions(x)[1][0] % 16 != 0)
)


class LastDocumentContinues(Recurrence):
    """The last of three documents or more begins with the state of the one before."""

    def is_start(self, inputs: BlockInputs) -> jax.Array:
        last_B1 = jnp.max(inputs.segments_BT, axis=1, keepdims=True)
        return super().is_start(inputs) & ~((inputs.segments_BT == last_B1) & (last_B1 > 2))


# Mistakes with rows and batches.

ScaledByRow = variant(
    Attention, result=lambda self, y, x: y * (1 + 0.01 * jnp.arange(len(y)))[:, None, None].astype(y.dtype)
)
ScaledInLargeBatches = variant(Attention, result=lambda self, y, x: y * (1.02 if len(y) > 16 else 1.0))
ScaledInSingleRow = variant(Attention, result=lambda self, y, x: y * (1.02 if len(y) == 1 else 1.0))
ScaledByBatchInTraining = variant(
    FeedForward, result=lambda self, y, x: y * (1.0 if x.dropout_key is None else 1 + 0.01 * len(y))
)
NormOverTokensInTraining = variant(
    FeedForward,
    result=lambda self, y, x: y if x.dropout_key is None else y / (1 + jnp.mean(jnp.square(y), axis=1, keepdims=True)),
)
FirstRowInLargeBatches = variant(
    FeedForward, hidden=lambda self, h: jax.nn.relu(h) + (0.1 * jax.nn.relu(h)[:1, :1] if len(h) > 16 else 0)
)


class FirstStateForAll(Recurrence):
    """In large batches every row continues from the state of the first."""

    @nn.compact
    def __call__(self, x_BTD: jax.Array, inputs: BlockInputs, cache: Any) -> Result:
        if cache is not None and len(cache) > 16:
            cache = jnp.broadcast_to(cache[:1], cache.shape)
        return super().__call__(x_BTD, inputs, cache)


class ScaledByTokensOfRow(Attention):
    def result(self, y_BTD: jax.Array, inputs: BlockInputs) -> jax.Array:
        n_tokens_B = jnp.sum(inputs.segments_BT > 0, axis=1)
        return y_BTD * (n_tokens_B / y_BTD.shape[1]).astype(y_BTD.dtype)[:, None, None]


# Wrong derivatives.


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def scale_gradient(x: jax.Array, factor: float) -> jax.Array:
    """Returns x, with a wrong derivative."""
    del factor
    return x


scale_gradient.defvjp(lambda x, factor: (x, None), lambda factor, _, g: (g * jnp.asarray(factor, g.dtype),))

StopsGradientOfKeys = variant(Attention, keys=lambda self, k: k + jax.lax.stop_gradient(k))
WrongGradientOfLongRows = variant(Attention, keys=lambda self, k: scale_gradient(k, 1.1) if k.shape[1] >= 32 else k)
WrongGradientOfVeryLongRows = variant(Attention, keys=lambda self, k: scale_gradient(k, 0.9) if k.shape[1] > 128 else k)
WrongGradientInBfloat16 = variant(
    Attention, keys=lambda self, k: scale_gradient(k, 3.0) if k.dtype == jnp.bfloat16 else k
)
WrongGradientInTraining = variant(
    Attention, result=lambda self, y, x: y if x.dropout_key is None else scale_gradient(y, 1.1)
)
WrongGradientAfterFirstChunk = variant(
    Attention, keys=lambda self, k: jnp.concatenate([k[:, :16], scale_gradient(k[:, 16:], 1.2)], axis=1)
)
NoGradientBetweenChunks = variant(ChunkedRecurrence, cast_state=lambda self, h: jax.lax.stop_gradient(h))

# Rounding.

RecurrenceInBfloat16 = variant(Recurrence, cast_input=lambda self, x: x)
StateRoundedInLoop = variant(Recurrence, cast_state=lambda self, h: h.astype(self.config.dtype).astype(h.dtype))
DecayInBfloat16 = variant(ChunkedRecurrence, decays=lambda self, decay: to_float32(decay.astype(jnp.bfloat16)))
DecayWithFewBits = variant(ChunkedRecurrence, decays=lambda self, decay: jax.lax.reduce_precision(decay, 8, 7))
StateRoundedBetweenChunks = variant(
    ChunkedRecurrence, cast_state=lambda self, h: h.astype(jnp.bfloat16).astype(h.dtype)
)
WidensResult = variant(Attention, result=lambda self, y, x: to_float32(y))


class SoftmaxInBfloat16(Attention):
    def weights(self, scores_BTS: jax.Array) -> jax.Array:
        return jax.nn.softmax(scores_BTS.astype(self.config.dtype), axis=-1)


class SoftmaxWithoutMaximum(Attention):
    def weights(self, scores_BTS: jax.Array) -> jax.Array:
        exponentials = jnp.exp(scores_BTS)
        return exponentials / jnp.sum(exponentials, axis=-1, keepdims=True)


class AssociativeScanInBfloat16(Recurrence):
    """The parallel form of the recurrence, in the dtype of the activations."""

    def cast_input(self, x_BTD: jax.Array) -> jax.Array:
        return x_BTD

    def decays(self, rate_D: jax.Array, dtype: Any) -> jax.Array:
        return jax.nn.sigmoid(rate_D).astype(dtype)

    @nn.compact
    def __call__(self, x_BTD: jax.Array, inputs: BlockInputs, cache: Any) -> Result:
        config = self.config
        decay_D = self.decays(self.param("decay", nn.initializers.ones, (config.d_model,)), x_BTD.dtype)
        new_BTD = self.cast_input(Linear(config, config.d_model, name="input")(x_BTD))
        is_token_BT1 = self.is_token(inputs)[..., None]
        decay_BTD = jnp.where(self.is_start(inputs)[..., None], 0, decay_D[None, None])
        decay_BTD = jnp.where(is_token_BT1, decay_BTD, 1).astype(new_BTD.dtype)
        new_BTD = jnp.where(is_token_BT1, new_BTD, 0)
        if cache is not None:
            new_BTD = new_BTD.at[:, 0].add((decay_BTD[:, 0] * cache).astype(new_BTD.dtype))

        def combine(first: Any, second: Any) -> Any:
            return first[0] * second[0], second[0] * first[1] + second[1]

        h_BTD = jax.lax.associative_scan(combine, (decay_BTD, new_BTD), axis=1)[1]
        y_BTD = Linear(config, config.d_model, residual=True, name="output")(h_BTD.astype(x_BTD.dtype))
        return y_BTD, None if cache is None else h_BTD[:, -1].astype(cache.dtype)


# Only the decay is in the dtype of the activations; and the exponential of rounded logarithms.
AssociativeDecayInBfloat16 = variant(AssociativeScanInBfloat16, cast_input=lambda self, x: to_float32(x))
LogDecayInBfloat16 = variant(
    AssociativeScanInBfloat16,
    cast_input=lambda self, x: to_float32(x),
    decays=lambda self, rate, dtype: jnp.exp(to_float32(-jax.nn.softplus(rate).astype(dtype))),
)


class CacheInBfloat16(Recurrence):
    @staticmethod
    def init_cache(config: ModelConfig, batch: int, length: int) -> jax.Array:
        del length
        return jnp.zeros((batch, config.d_model), config.dtype)

    @nn.compact
    def __call__(self, x_BTD: jax.Array, inputs: BlockInputs, cache: Any) -> Result:
        y_BTD, after = super().__call__(x_BTD, inputs, None if cache is None else to_float32(cache))
        return y_BTD, None if cache is None else after.astype(cache.dtype)


class FactoredDecay(Attention):
    """Linear attention with exp(-r (t - s)) as exp(-r t) exp(r s), which overflows in float32."""

    rate: float = 0.1

    @nn.compact
    def __call__(self, x_BTD: jax.Array, inputs: BlockInputs, cache: Any) -> Result:
        config, rate = self.config, self.rate
        q, k, v = (Linear(config, config.d_model, name=name)(x_BTD) for name in ("query", "key", "value"))
        positions_BT1 = inputs.positions_BT[..., None].astype(accum_dtype(q, k))
        scores_BTS = jnp.einsum("BTD,BSD->BTS", q * jnp.exp(-rate * positions_BT1), k * jnp.exp(rate * positions_BT1))
        y_BTD = jnp.einsum("BTS,BSD->BTD", jnp.where(self.mask(inputs), scores_BTS, 0), to_float32(v))
        return Linear(config, config.d_model, residual=True, name="output")(y_BTD.astype(x_BTD.dtype)), cache


class FactoredSlowDecay(FactoredDecay):
    """The same, with a decay for which only the exponents of the longest rows are too large."""

    rate: float = 0.04


class PhaseInBfloat16(Attention):
    """Positions in bfloat16, which cannot represent all whole numbers above 256."""

    def result(self, y_BTD: jax.Array, inputs: BlockInputs) -> jax.Array:
        return y_BTD * (1 + 0.5 * jnp.sin(inputs.positions_BT[..., None].astype(y_BTD.dtype)))


# Mistakes with caches.

WritesOneSlotLate = variant(
    Attention, slots=lambda self, x, n_slots: jnp.where(x.segments_BT > 0, x.positions_BT + 1, n_slots)
)
WritesPadding = variant(Attention, slots=lambda self, x, n_slots: x.positions_BT % n_slots)
SeesEmptySlot = variant(
    Attention, cached_mask=lambda self, x, n: jnp.arange(n)[None, None, :] <= x.positions_BT[:, :, None] + 1
)
CountsSlotsFromCall = variant(
    Attention, slots=lambda self, x, n_slots: jnp.where(x.segments_BT > 0, positions(x)[1][0], n_slots)
)
PositionsTo2047 = variant(
    Attention,
    slots=lambda self, x, n_slots: jnp.where(x.segments_BT > 0, jnp.minimum(x.positions_BT, 2047), n_slots),
)
# A ring buffer of 1,000 slots: after it has been filled twice, tokens are lost.
WrapsOnce = variant(
    Attention,
    slots=lambda self, x, n_slots: jnp.where((x.segments_BT > 0) & (x.positions_BT < 2000), x.positions_BT, n_slots),
)


class LongPromptsCutOff(Attention):
    """Of a prompt of more than 64 tokens, only the last 64 are seen."""

    def cached_mask(self, inputs: BlockInputs, n_slots: int) -> jax.Array:
        is_near_BTS = jnp.arange(n_slots)[None, None, :] > inputs.positions_BT[:, :, None] - 64
        return super().cached_mask(inputs, n_slots) & (is_near_BTS | (inputs.positions_BT.shape[1] <= 64))


class PromptsInEights(Attention):
    """A prompt whose length is a multiple of 8 sees only itself."""

    def cached_mask(self, inputs: BlockInputs, n_slots: int) -> jax.Array:
        is_own_BTS = jnp.arange(n_slots)[None, None, :] >= inputs.positions_BT[:, :1, None]
        return super().cached_mask(inputs, n_slots) & (is_own_BTS | (inputs.positions_BT.shape[1] % 8 > 0))


class LastOfLongPromptLost(Recurrence):
    """The state after more than 128 tokens is that before the last of them."""

    @nn.compact
    def __call__(self, x_BTD: jax.Array, inputs: BlockInputs, cache: Any) -> Result:
        inner = Recurrence(self.config, name="inner")
        y_BTD, after = inner(x_BTD, inputs, cache)
        if cache is not None and x_BTD.shape[1] > 128:
            before = BlockInputs(inputs.positions_BT[:, :-1], inputs.segments_BT[:, :-1])
            _, after = inner(x_BTD[:, :-1], before, cache)
        return y_BTD, after


# Mistakes with heads.

# All query heads share the first key-value head.
FirstHeadForAll = variant(
    GroupedAttention, repeat=lambda self, x, is_cached: jnp.repeat(x[:, :, :1], self.config.attention.n_heads, axis=2)
)


class AllHeadsReversed(GroupedAttention):
    """With as many key-value heads as query heads, a cache gives them in reverse order."""

    def repeat(self, x_BSKC: jax.Array, is_cached: bool) -> jax.Array:
        is_wrong = is_cached and x_BSKC.shape[2] == self.config.attention.n_heads
        return super().repeat(x_BSKC, is_cached)[:, :, :: -1 if is_wrong else 1]


class OneHeadReversed(GroupedAttention):
    """With one key-value head, a cache gives its channels in reverse order."""

    def repeat(self, x_BSKC: jax.Array, is_cached: bool) -> jax.Array:
        return super().repeat(x_BSKC, is_cached)[..., :: -1 if is_cached and x_BSKC.shape[2] == 1 else 1]


# Dropout and purity.

ScalesInEvaluation = variant(
    Attention, result=lambda self, y, x: y * (1 - self.config.dropout) if x.dropout_key is None else y
)
ScalesInDecoding = variant(
    FeedForward, result=lambda self, y, x: y * (1 - self.config.dropout if y.shape[1] == 1 else 1.0)
)
NoBiasInTraining = variant(
    Attention, result=lambda self, y, x: y if x.dropout_key is not None else y + jnp.asarray(0.01, y.dtype)
)
_calls = itertools.count()
ScaledByCallCount = variant(Attention, result=lambda self, y, x: y * (1 + next(_calls) % 5))


class DropsInEvaluation(Attention):
    def result(self, y_BTD: jax.Array, inputs: BlockInputs) -> jax.Array:
        if inputs.dropout_key is None:
            inputs = inputs._replace(dropout_key=jax.random.key(0))
        return dropout(y_BTD, self.config.dropout, inputs, site=3)


class PinnedToDevice(Attention):
    def result(self, y_BTD: jax.Array, inputs: BlockInputs) -> jax.Array:
        return jax.lax.with_sharding_constraint(y_BTD, jax.sharding.SingleDeviceSharding(jax.devices()[0]))


# Feed-forwards.

# A convolution that is padded on both sides.
ConvolvesBothSides = variant(
    FeedForward, hidden=lambda self, h: jax.nn.relu(h + jnp.pad(h[:, 1:], ((0, 0), (0, 1), (0, 0))))
)
LargeAtInit = variant(FeedForward, hidden=lambda self, h: 10 * jax.nn.relu(h))
SqrtAtZero = variant(FeedForward, hidden=lambda self, h: jnp.sqrt(jnp.square(h)))


class UnusedParameter(FeedForward):
    def result(self, y_BTD: jax.Array, inputs: BlockInputs) -> jax.Array:
        unused_D = self.param("unused", nn.initializers.ones, (self.config.d_model,))
        return y_BTD + 0 * broadcast_channels(unused_D, y_BTD).astype(y_BTD.dtype)


class MatmulAsSum(FeedForward):
    @nn.compact
    def __call__(self, x_BTD: jax.Array, inputs: BlockInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
        shape = (self.config.d_model, self.config.d_model)
        kernel_DD = self.param("kernel", nn.initializers.normal(self.config.init_std), shape).astype(x_BTD.dtype)
        return jnp.sum(x_BTD[..., None] * kernel_DD[None, None], axis=2), {}


# Norms, positions and scalings.


class Norm(RMSNorm):
    """RMSNorm over axes that variants replace."""

    def mean(self, y: jax.Array) -> jax.Array:
        return jnp.mean(y, axis=-1, keepdims=True) + self.config.norm_eps

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = to_float32(x)
        y = y / jnp.sqrt(self.mean(jnp.square(y)))
        return (y * broadcast_channels(self.param("scale", nn.initializers.ones, x.shape[-1:]), x)).astype(x.dtype)


NormOfBatch = variant(Norm, mean=lambda self, y: jnp.mean(y, keepdims=True) + self.config.norm_eps)
NormOverTokens = variant(Norm, mean=lambda self, y: jnp.mean(y, axis=(1, 2), keepdims=True) + self.config.norm_eps)
NormWithoutEpsilon = variant(Norm, mean=lambda self, y: jnp.mean(y, axis=-1, keepdims=True))
NormOverLargeBatches = variant(
    Norm,
    mean=lambda self, y: jnp.mean(y, axis=(0, -1) if len(y) > 16 else -1, keepdims=True) + self.config.norm_eps,
)


class NormInBfloat16(RMSNorm):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        y = x * jax.lax.rsqrt(mean_square + jnp.asarray(self.config.norm_eps, x.dtype))
        return y * broadcast_channels(self.param("scale", nn.initializers.ones, x.shape[-1:]), x).astype(x.dtype)


def row_positions(positions_BT: jax.Array) -> jax.Array:
    """Positions within the row instead of within the document."""
    return jnp.broadcast_to(jnp.arange(positions_BT.shape[1])[None], positions_BT.shape)


class PositionsOfRow(LearnedPositions):
    @nn.compact
    def __call__(self, positions_BT: jax.Array) -> jax.Array:
        shape = (self.config.context_length, self.config.d_model)
        return self.param("table", nn.initializers.normal(1.0), shape)[row_positions(positions_BT)]


positions_of_row = PositionEncoding(embed=PositionsOfRow)
rotated_by_row = PositionEncoding(rotate=lambda x, positions, config: apply_rope(x, row_positions(positions), config))
rotated_by_length = PositionEncoding(
    rotate=lambda x, positions, config: apply_rope(x, positions // (2 if x.shape[1] > 64 else 1), config)
)
positions_in_bfloat16 = PositionEncoding(
    rotate=lambda x, positions, config: apply_rope(x, positions.astype(config.dtype), config)
)


def compares_factor(frequencies_C: jax.Array, config: ModelConfig) -> Rope:
    """Python compares a traced value with 1."""
    return Rope(frequencies_C / config.rope.factor if config.rope.factor > 1 else frequencies_C, 1.0)


# Components of other kinds.


def ascends(config: OptimizerConfig, rate: Any) -> optax.GradientTransformation:
    """The sign is wrong."""
    return optax.scale(rate * config.learning_rate)


def state_in_bfloat16(config: OptimizerConfig, rate: Any) -> optax.GradientTransformation:
    """Moments come back in another dtype than they start with."""

    def update(gradients: Any, state: Any, params: Any) -> tuple[Any, Any]:
        state = jax.tree.map(lambda m, g: (0.9 * m + g).astype(jnp.bfloat16), state, gradients)
        return jax.tree.map(lambda m: -rate * config.learning_rate * m.astype(jnp.float32), state), state

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)


def compares_rate(config: OptimizerConfig, rate: Any) -> optax.GradientTransformation:
    """Python compares a traced value with 0."""
    return optax.identity() if config.learning_rate == 0 else optax.scale(-rate * config.learning_rate)


def never_decays(step: jax.Array, steps: Any, schedule: ScheduleConfig) -> jax.Array:
    """Above 1 after the first half."""
    return 2.0 * jnp.asarray(step, jnp.float32) / steps + 0.01


def converts_warmup(step: jax.Array, steps: Any, schedule: ScheduleConfig) -> jax.Array:
    """Python converts a traced value to an integer."""
    return jnp.minimum(1.0, (step + 1.0) / int(schedule.warmup_steps + 1))


def restores_tokens(value: Any) -> Any:
    return lambda logits_BV, seen_BV: jnp.maximum(logits_BV, -20.0)


def threshold_of_batch(value: Any) -> Any:
    return lambda logits_BV, seen_BV: jnp.where(logits_BV >= jnp.max(logits_BV) - 8.0, logits_BV, -jnp.inf)


def lowercases(texts: Iterable[str], vocab_size: int | None) -> Tokenizer:
    """Capital letters are lost."""
    tokenizer = TOKENIZERS["byte"](texts, vocab_size)
    tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def changing_documents(config: DataConfig) -> Iterator[Document]:
    """A counter is in the text."""
    yield plain_document("counter", f"This is text number {next(_calls)}.")


# The table of mistakes.


class Mistake(NamedTuple):
    """A component by registry and import path, the check that must find it, and a pattern that its message matches.

    scope: the least scope in which the check finds it.
    """

    component: str
    check: str
    message: str
    scope: Scope = Scope.SMALL


def _mistakes(kind: str, *rows: tuple[str, ...], scope: Scope = Scope.SMALL) -> tuple[Mistake, ...]:
    return tuple(Mistake(f"{kind}/broken_components:{name}", *rest, scope) for name, *rest in rows)


MISTAKES = (
    *_mistakes(
        "mixers",
        ("SeesNextToken", "causality", r"output token 0, input token 1: a derivative of"),
        ("SeesNextChunk", "causality", r"output token 15, input token 16: a derivative"),
        ("SignOfNextChunk", "causality", r"changes with a later token.*output token 15, input token 16"),
        ("SeesOtherDocuments", "isolation", r"documents \d and \d of \d"),
        ("StateLeaksOverDocuments", "isolation", r"documents \d and \d of \d"),
        ("ThirdDocumentSeesSecond", "isolation", r"documents \d and \d of \d"),
        ("DocumentsByParity", "isolation", r"documents \d and \d of \d"),
        ("StateRestartsOnlyOnce", "isolation", r"documents 3 and \d of \d"),
        ("FirstDocumentScaled", "isolation", r"a document alone differs"),
        ("LastDocumentContinues", "isolation", r"documents \d and \d of \d"),
        ("ScaledByRow", "rows", r"the same row alone, in 2 rows of 40 tokens.*row 1"),
        ("ScaledInLargeBatches", "rows", r"the same row alone, in 17 rows of 40 tokens"),
        ("ScaledInSingleRow", "rows", r"the same row alone, in 2 rows of 40 tokens"),
        ("ScaledByTokensOfRow", "padding", r"a padded row differs .* row \d+, token"),
        ("WritesOneSlotLate", "cache", r"reads its first r \+ 1 tokens; at row \d+, token"),
        ("WritesPadding", "cache", r"row \d+"),
        ("SeesEmptySlot", "cache", r"reads its first r \+ 1 tokens; at row \d+, token"),
        ("CountsSlotsFromCall", "cache", r"the rest after .* row \d+, token"),
        ("StateMovedByPadding", "cache", r"padding changes the cache.* row 11, layer 0"),
        ("StateRestartsWithEachCall", "cache", r"the rest after .* row \d+, token"),
        ("StopsGradientOfKeys", "gradients", r"rows of 17 tokens; at the parameter"),
        ("WrongGradientAfterFirstChunk", "gradients", r"rows of 17 tokens"),
        ("NoGradientBetweenChunks", "gradients", r"rows of 17 tokens"),
        ("SoftmaxWithoutMaximum", "finite", r"large activations in float32; at row 0"),
        ("WidensResult", "shapes", r"float32.* instead of bfloat16"),
        ("SoftmaxInBfloat16", "precision", r"`exp`.*line \d+, in SoftmaxInBfloat16"),
        ("RecurrenceInBfloat16", "precision", r"keeps its state in fewer bits .*; at broken_components.py, line"),
        ("DecayInBfloat16", "precision", r"a rounded decay is raised to a power; at broken_components.py"),
        ("StateRoundedBetweenChunks", "precision", r"add up: .* in 384; at broken_components.py"),
        ("DecayWithFewBits", "precision", r"a rounded decay is raised to a power"),
        ("StateRoundedInLoop", "precision", r"a loop keeps its state in fewer bits .* broken_components.py"),
        ("AssociativeScanInBfloat16", "precision", r"associative scan|add up"),
        ("AssociativeDecayInBfloat16", "precision", r"an associative scan multiplies decays that were rounded"),
        ("LogDecayInBfloat16", "precision", r"an associative scan multiplies decays that were rounded"),
        ("CacheInBfloat16", "precision", r"the cache keeps its state in fewer bits .* broken_components.py"),
        ("FactoredDecay", "drift", r"not finite|error of float32"),
        ("FactoredSlowDecay", "drift", r"not finite|error of float32"),
        ("PhaseInBfloat16", "drift", r"the error of bfloat16 grows"),
        ("FirstHeadForAll", "parameters", r"a part of a parameter is never used; at the parameter .*mixer/key"),
        ("OneHeadReversed", "heads", r"with a cache"),
        ("AllHeadsReversed", "heads", r"with a cache"),
        ("DropsInEvaluation", "dropout", r"evaluation changes with the dropout rate"),
        ("ScalesInEvaluation", "dropout", r"evaluation changes with the dropout rate"),
        ("NoBiasInTraining", "dropout", r"training that drops nothing differs"),
        ("WrongGradientInTraining", "dropout", r"the gradients of training"),
        ("ScaledByCallCount", "remat", r"row \d+, token \d+, logit \d+"),
        ("ScaledByCallCount", "layers", r"row \d+, token \d+, logit \d+"),
        ("PinnedToDevice", "devices", r"fails on eight devices; .* devices"),
    ),
    *_mistakes(
        "mixers",
        ("NormalizesByChunk", "causality", r"rows of 64 tokens.*output token"),
        ("SeesFutureInTraining", "causality", r"training; at row 0, output token 0"),
        ("SeesFutureFarOut", "causality", r"rows of 521 tokens.*output token 2\d\d"),
        ("SeesFutureFartherOut", "causality", r"rows of 521 tokens"),
        ("SeesFutureInBfloat16", "causality", r"bfloat16, evaluation"),
        ("RoundsFutureInBfloat16", "causality", r"changes with a later token, in .*bfloat16, evaluation"),
        ("LeaksDocumentsInTraining", "isolation", r"33 tokens, float32, training"),
        ("LeaksDocumentsInBfloat16", "isolation", r"33 tokens, bfloat16"),
        ("LeaksDocumentsFarOut", "isolation", r"521 tokens"),
        ("LeaksAtChunkBorders", "isolation", r"document"),
        ("WindowByLength", "rows", r"the length of a row changes its outputs"),
        ("FirstStateForAll", "rows", r"with a cache, a row in a batch of 1 differs"),
        ("WrongGradientOfLongRows", "gradients", r"rows of 40 tokens"),
        ("WrongGradientOfVeryLongRows", "gradients", r"rows of 130 tokens"),
        ("WrongGradientInBfloat16", "gradients", r"the gradients in bfloat16 differ"),
        ("PromptsInEights", "prefill", r"8 tokens after a prompt of 1 and one more"),
        ("LongPromptsCutOff", "prefill", r"in a prompt of 131 tokens"),
        ("LastOfLongPromptLost", "prefill", r"one token after a prompt of 131"),
        ("PositionsTo2047", "prefill", r"from position 1930"),
        ("WrapsOnce", "prefill", r"from position \d{4}"),
        scope=Scope.QUICK,
    ),
    *_mistakes(
        "feedforwards",
        ("ConvolvesBothSides", "causality", r"output token 0, input token 1"),
        ("FirstRowInLargeBatches", "rows", r"in 17 rows of 40 tokens"),
        ("SqrtAtZero", "finite", r"the gradient of .* is not finite"),
        ("UnusedParameter", "parameters", r"blocks/0/feedforward/unused"),
        ("MatmulAsSum", "flops", r"d_model 1024: .* reported, .* counted, -\d+%"),
        ("LargeAtInit", "initial_scale", r"layer \d+, seed 0: a root mean square of"),
        ("ScalesInDecoding", "dropout", r"with a cache"),
    ),
    *_mistakes(
        "feedforwards",
        ("NormOverTokensInTraining", "causality", r"training"),
        ("ScaledByBatchInTraining", "rows", r"training"),
        scope=Scope.QUICK,
    ),
    *_mistakes(
        "norms",
        ("NormOfBatch", "isolation", r"depends on another document"),
        ("NormOverTokens", "causality", r"output token 0, input token 1"),
        ("NormOverLargeBatches", "rows", r"in 17 rows of 40 tokens"),
        ("NormWithoutEpsilon", "finite", r"zero activations in float32; at row 0, token 0"),
        ("NormInBfloat16", "precision", r"`rsqrt`.*line \d+, in NormInBfloat16"),
    ),
    *_mistakes(
        "positions",
        ("positions_of_row", "isolation", r"a document alone differs .* row \d+, token \d+"),
        ("rotated_by_row", "cache", r"row \d+, token \d+"),
        ("positions_in_bfloat16", "drift", r"the error of bfloat16 grows"),
    ),
    *_mistakes("positions", ("rotated_by_length", "rows", r"the length of a row changes"), scope=Scope.QUICK),
    *_mistakes("rope_scalings", ("compares_factor", "vmap", r"broken_components.py, line \d+")),
    *_mistakes(
        "optimizers",
        ("ascends", "optimizer_descent", r"step 200: "),
        ("state_in_bfloat16", "optimizer_update", r"bfloat16.* instead of float32"),
        ("compares_rate", "optimizer_traced", r"broken_components.py, line \d+"),
    ),
    *_mistakes(
        "schedules",
        ("never_decays", "schedule_range", r"step 1 of 2 "),
        ("converts_warmup", "schedule_traced", r"broken_components.py, line \d+"),
    ),
    *_mistakes(
        "samplers",
        ("restores_tokens", "sampler_distribution", r"row 0, token \d+.* -inf became -20"),
        ("threshold_of_batch", "sampler_rows", r"row 0, token"),
    ),
    *_mistakes("tokenizers", ("lowercases", "tokenizer_round_trip", r"text 0: 'It was")),
    *_mistakes("corpora", ("changing_documents", "corpus_documents", r"document 0")),
)
