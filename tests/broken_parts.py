"""Parts with one mistake each, made from two honest ones, and the check that must find it."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from tokenizers import Tokenizer, normalizers

from rustgpt_jax.config.schema import DataConfig, ModelConfig, OptimizerConfig, ScheduleConfig
from rustgpt_jax.model.interfaces import BlockInputs, PositionEncoding
from rustgpt_jax.model.linear import Linear, broadcast_channels
from rustgpt_jax.model.matmul import accum_dtype, to_float32
from rustgpt_jax.model.norms import RMSNorm
from rustgpt_jax.model.positions import LearnedPositions, Rope, apply_rope
from rustgpt_jax.tokenizers import TOKENIZERS, Document, plain_document


class Mistake(NamedTuple):
    """A part by its table and import path, the check that must find it, and what the message must say (a pattern).

    is_slow: found in the slow tests only, as others of its kind are found in the fast ones.
    """

    part: str
    check: str
    message: str
    is_slow: bool = False


class HonestAttention(nn.Module):
    """Attention of one head, in steps that a mistake can be made in. It has no mistake itself."""

    config: ModelConfig

    @staticmethod
    def init_cache(config: ModelConfig, batch: int, length: int) -> dict[str, jax.Array]:
        return dict.fromkeys(("keys", "values"), jnp.zeros((batch, length, config.d_model), config.dtype))

    def visible(self, context: BlockInputs) -> jax.Array:
        order_T = jnp.arange(context.segments_BT.shape[1])
        same_BTS = context.segments_BT[:, :, None] == context.segments_BT[:, None, :]
        return (order_T[None, :, None] >= order_T[None, None, :]) & same_BTS

    def cached_visible(self, context: BlockInputs, slots: int) -> jax.Array:
        return jnp.arange(slots)[None, None, :] <= context.positions_BT[:, :, None]

    def slots(self, context: BlockInputs, n_slots: int) -> jax.Array:
        return jnp.where(context.segments_BT > 0, context.positions_BT, n_slots)

    def weights(self, scores_BTS: jax.Array) -> jax.Array:
        return jax.nn.softmax(scores_BTS, axis=-1)

    def keys(self, k_BTD: jax.Array) -> jax.Array:
        return k_BTD

    def result(self, y_BTD: jax.Array, context: BlockInputs) -> jax.Array:
        del context
        return y_BTD

    @nn.compact
    def __call__(self, x_BTD: jax.Array, context: BlockInputs, cache: Any) -> tuple[jax.Array, Any]:
        q, k, v = (Linear(self.config, self.config.d_model, name=name)(x_BTD) for name in ("query", "key", "value"))
        k = self.keys(k)
        visible_BTS = self.visible(context)
        if cache is not None:
            slots_BT = self.slots(context, cache["keys"].shape[1])
            rows_B1 = jnp.arange(len(slots_BT))[:, None]
            new = {"keys": k, "values": v}
            cache = {name: cache[name].at[rows_B1, slots_BT].set(new[name], mode="drop") for name in cache}
            k, v, visible_BTS = cache["keys"], cache["values"], self.cached_visible(context, cache["keys"].shape[1])
        scores_BTS = jnp.einsum("BTD,BSD->BTS", q, k, preferred_element_type=accum_dtype(q, k))
        scores_BTS = jnp.where(visible_BTS, scores_BTS * self.config.d_model**-0.5, -jnp.inf)
        y_BTD = jnp.einsum("BTS,BSD->BTD", self.weights(scores_BTS).astype(v.dtype), v)
        y_BTD = Linear(self.config, self.config.d_model, residual=True, name="output")(y_BTD)
        return self.result(y_BTD, context), cache


class SeesTheNextToken(HonestAttention):
    def visible(self, context: BlockInputs) -> jax.Array:
        order_T = jnp.arange(context.segments_BT.shape[1])
        same_BTS = context.segments_BT[:, :, None] == context.segments_BT[:, None, :]
        return (order_T[None, :, None] + 1 >= order_T[None, None, :]) & same_BTS


class SeesOtherDocuments(HonestAttention):
    def visible(self, context: BlockInputs) -> jax.Array:
        order_T = jnp.arange(context.segments_BT.shape[1])
        return jnp.broadcast_to(order_T[:, None] >= order_T[None, :], (*context.segments_BT.shape, len(order_T)))


class SoftmaxInBfloat16(HonestAttention):
    def weights(self, scores_BTS: jax.Array) -> jax.Array:
        return jax.nn.softmax(scores_BTS.astype(self.config.dtype), axis=-1)


class SoftmaxWithoutMaximum(HonestAttention):
    def weights(self, scores_BTS: jax.Array) -> jax.Array:
        exponentials = jnp.exp(scores_BTS)
        return exponentials / jnp.sum(exponentials, axis=-1, keepdims=True)


class WritesOneSlotLate(HonestAttention):
    def slots(self, context: BlockInputs, n_slots: int) -> jax.Array:
        return jnp.where(context.segments_BT > 0, context.positions_BT + 1, n_slots)


class WritesPadding(HonestAttention):
    def slots(self, context: BlockInputs, n_slots: int) -> jax.Array:
        return context.positions_BT % n_slots


class SeesAnEmptySlot(HonestAttention):
    def cached_visible(self, context: BlockInputs, slots: int) -> jax.Array:
        return jnp.arange(slots)[None, None, :] <= context.positions_BT[:, :, None] + 1


class CountsSlotsFromTheCall(HonestAttention):
    def slots(self, context: BlockInputs, n_slots: int) -> jax.Array:
        return jnp.where(context.segments_BT > 0, jnp.arange(context.segments_BT.shape[1])[None], n_slots)


class StopsTheGradientOfKeys(HonestAttention):
    def keys(self, k_BTD: jax.Array) -> jax.Array:
        return k_BTD + jax.lax.stop_gradient(k_BTD)


class ScalesByTokensOfTheRow(HonestAttention):
    def result(self, y_BTD: jax.Array, context: BlockInputs) -> jax.Array:
        n_tokens_B = jnp.sum(context.segments_BT > 0, axis=1)
        return y_BTD * (n_tokens_B / y_BTD.shape[1]).astype(y_BTD.dtype)[:, None, None]


class ScalesByItsOwnCalls(HonestAttention):
    def result(self, y_BTD: jax.Array, context: BlockInputs) -> jax.Array:
        return y_BTD * (1 + next(_calls) % 5)


_calls = itertools.count()


class PinnedToADevice(HonestAttention):
    def result(self, y_BTD: jax.Array, context: BlockInputs) -> jax.Array:
        return jax.lax.with_sharding_constraint(y_BTD, jax.sharding.SingleDeviceSharding(jax.devices()[0]))


class WidensItsResult(HonestAttention):
    def result(self, y_BTD: jax.Array, context: BlockInputs) -> jax.Array:
        return to_float32(y_BTD)


class HonestState(nn.Module):
    """h_t = a h_(t-1) + W x_t, read out by another matrix. It has no mistake."""

    config: ModelConfig

    @staticmethod
    def init_cache(config: ModelConfig, batch: int, length: int) -> jax.Array:
        del length
        return jnp.zeros((batch, config.d_model), jnp.promote_types(config.dtype, jnp.float32))

    def is_start(self, context: BlockInputs) -> jax.Array:
        before_BT = jnp.concatenate([context.segments_BT[:, :1], context.segments_BT[:, :-1]], axis=1)
        return context.segments_BT != before_BT

    def is_token(self, context: BlockInputs) -> jax.Array:
        return context.segments_BT > 0

    def state_type(self, x_BTD: jax.Array) -> jax.Array:
        return to_float32(x_BTD)

    @nn.compact
    def __call__(self, x_BTD: jax.Array, context: BlockInputs, cache: Any) -> tuple[jax.Array, Any]:
        config = self.config
        decay_D = jax.nn.sigmoid(self.param("decay", nn.initializers.ones, (config.d_model,)))[None]
        new_BTD = self.state_type(Linear(config, config.d_model, name="input")(x_BTD))

        def step(h_BD: jax.Array, token: Any) -> tuple[jax.Array, jax.Array]:
            new_BD, is_start_B, is_token_B = token
            after_BD = decay_D.astype(h_BD.dtype) * jnp.where(is_start_B[:, None], 0, h_BD) + new_BD
            h_BD = jnp.where(is_token_B[:, None], after_BD, h_BD)
            return h_BD, h_BD

        tokens = (new_BTD, self.is_start(context), self.is_token(context))
        start_BD = jnp.zeros_like(new_BTD[:, 0]) if cache is None else cache
        last_BD, h_TBD = jax.lax.scan(step, start_BD, jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), tokens))
        h_BTD = jnp.swapaxes(h_TBD, 0, 1).astype(x_BTD.dtype)
        y_BTD = Linear(config, config.d_model, residual=True, name="output")(h_BTD)
        return y_BTD, None if cache is None else last_BD


class StateLeaksOverDocuments(HonestState):
    def is_start(self, context: BlockInputs) -> jax.Array:
        return jnp.zeros_like(context.segments_BT, bool)


class StateMovedByPadding(HonestState):
    def is_token(self, context: BlockInputs) -> jax.Array:
        return jnp.ones_like(context.segments_BT, bool)


class StateStartsAnewWithEachCall(HonestState):
    def is_start(self, context: BlockInputs) -> jax.Array:
        return super().is_start(context).at[:, 0].set(True)


class StateInBfloat16(HonestState):
    def state_type(self, x_BTD: jax.Array) -> jax.Array:
        return x_BTD


# Correct mixers of an unusual build.


class SubclassedAttention(HonestAttention):
    """Calls `super().__call__`."""

    @nn.compact
    def __call__(self, x_BTD: jax.Array, context: BlockInputs, cache: Any) -> tuple[jax.Array, Any]:
        y_BTD, cache = super().__call__(x_BTD, context, cache)
        return y_BTD + Linear(self.config, self.config.d_model, residual=True, name="skip")(x_BTD), cache


class SowsItsEntropy(HonestAttention):
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
    def __call__(self, x_BTD: jax.Array, context: BlockInputs, cache: Any) -> tuple[jax.Array, Any]:
        gate_BTD = jax.nn.sigmoid(Linear(self.config, self.config.d_model, name="gate")(x_BTD))
        return Linear(self.config, self.config.d_model, residual=True, name="output")(gate_BTD * x_BTD), cache


class ChunkedState(HonestState):
    """The same recurrence over chunks of tokens, each by a matrix of decays: the last chunk is filled up."""

    chunk: int = 16

    def decays(self, decay_D: jax.Array) -> jax.Array:
        return decay_D

    def carried(self, state_BD: jax.Array) -> jax.Array:
        return state_BD

    @nn.compact
    def __call__(self, x_BTD: jax.Array, context: BlockInputs, cache: Any) -> tuple[jax.Array, Any]:
        config, (batch, length) = self.config, x_BTD.shape[:2]
        decay_D = self.decays(jax.nn.sigmoid(self.param("decay", nn.initializers.ones, (config.d_model,))))
        new_BTD = to_float32(Linear(config, config.d_model, name="input")(x_BTD))
        is_token_BT = self.is_token(context)
        document_BT = jnp.cumsum(self.is_start(context) & is_token_BT, axis=1)
        state_BD = jnp.zeros((batch, config.d_model), new_BTD.dtype) if cache is None else cache
        before_B, results = document_BT[:, 0], []
        for begin in range(0, length, self.chunk):
            tokens = slice(begin, begin + self.chunk)
            age_BT = jnp.cumsum(is_token_BT[:, tokens], axis=1)
            later_BTS = age_BT[:, :, None] - age_BT[:, None, :]
            order_T = jnp.arange(age_BT.shape[1])
            is_seen_BTS = (order_T[None, :, None] >= order_T[None, None, :]) & is_token_BT[:, None, tokens]
            is_seen_BTS &= document_BT[:, tokens, None] == document_BT[:, None, tokens]
            powers_BTSD = decay_D[None, None, None] ** jnp.maximum(later_BTS, 0)[..., None].astype(decay_D.dtype)
            faded_BTSD = jnp.where(is_seen_BTS[..., None], powers_BTSD, 0)
            h_BTD = jnp.einsum("BTSD,BSD->BTD", faded_BTSD, new_BTD[:, tokens])
            goes_on_BT1 = (document_BT[:, tokens] == before_B[:, None])[..., None]
            since_BTD = decay_D[None, None] ** age_BT[..., None].astype(decay_D.dtype)
            h_BTD = h_BTD + jnp.where(goes_on_BT1, since_BTD * state_BD[:, None], 0)
            results.append(h_BTD)
            state_BD, before_B = self.carried(h_BTD[:, -1]), document_BT[:, tokens][:, -1]
        h_BTD = jnp.concatenate(results, axis=1).astype(x_BTD.dtype)
        y_BTD = Linear(config, config.d_model, residual=True, name="output")(h_BTD)
        return y_BTD, None if cache is None else state_BD


# Feed-forwards.


class HonestFeedForward(nn.Module):
    """Two matrices with a ReLU between them."""

    config: ModelConfig

    def hidden(self, hidden_BTF: jax.Array) -> jax.Array:
        return jax.nn.relu(hidden_BTF)

    @nn.compact
    def __call__(self, x_BTD: jax.Array, context: BlockInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
        hidden_BTF = self.hidden(Linear(self.config, 2 * self.config.d_model, name="up")(x_BTD))
        return Linear(self.config, self.config.d_model, residual=True, name="down")(hidden_BTF), {}


class LooksAhead(HonestFeedForward):
    """A convolution that is padded on both sides."""

    def hidden(self, hidden_BTF: jax.Array) -> jax.Array:
        return jax.nn.relu(hidden_BTF + jnp.pad(hidden_BTF[:, 1:], ((0, 0), (0, 1), (0, 0))))


class UnusedParameter(HonestFeedForward):
    @nn.compact
    def __call__(self, x_BTD: jax.Array, context: BlockInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
        unused_D = self.param("unused", nn.initializers.ones, (self.config.d_model,))
        y_BTD = Linear(self.config, self.config.d_model, residual=True, name="down")(x_BTD)
        return y_BTD + 0 * broadcast_channels(unused_D, y_BTD).astype(y_BTD.dtype), {}


class ProductByHand(HonestFeedForward):
    @nn.compact
    def __call__(self, x_BTD: jax.Array, context: BlockInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
        shape = (self.config.d_model, self.config.d_model)
        kernel_DD = self.param("kernel", nn.initializers.normal(self.config.init_std), shape).astype(x_BTD.dtype)
        return jnp.sum(x_BTD[..., None] * kernel_DD[None, None], axis=2), {}


class Explodes(HonestFeedForward):
    def hidden(self, hidden_BTF: jax.Array) -> jax.Array:
        return 10 * jax.nn.relu(hidden_BTF)


class RootOfZero(HonestFeedForward):
    """A root whose slope at 0 is infinite."""

    def hidden(self, hidden_BTF: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.square(hidden_BTF))


# Norms, positions and scalings.


class NormOfTheBatch(RMSNorm):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = to_float32(x)
        y = y / jnp.sqrt(jnp.mean(jnp.square(y)) + self.config.norm_eps)
        return (y * broadcast_channels(self.param("scale", nn.initializers.ones, x.shape[-1:]), x)).astype(x.dtype)


class NormOverTokens(RMSNorm):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = to_float32(x)
        y = y / jnp.sqrt(jnp.mean(jnp.square(y), axis=(1, 2), keepdims=True) + self.config.norm_eps)
        return (y * broadcast_channels(self.param("scale", nn.initializers.ones, x.shape[-1:]), x)).astype(x.dtype)


class NormWithoutEpsilon(RMSNorm):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = to_float32(x)
        y = y / jnp.sqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True))
        return (y * broadcast_channels(self.param("scale", nn.initializers.ones, x.shape[-1:]), x)).astype(x.dtype)


class NormInBfloat16(RMSNorm):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        y = x * jax.lax.rsqrt(mean_square + jnp.asarray(self.config.norm_eps, x.dtype))
        return y * broadcast_channels(self.param("scale", nn.initializers.ones, x.shape[-1:]), x).astype(x.dtype)


class PositionsOfTheRow(LearnedPositions):
    @nn.compact
    def __call__(self, positions_BT: jax.Array) -> jax.Array:
        places_BT = jnp.broadcast_to(jnp.arange(positions_BT.shape[1])[None], positions_BT.shape)
        shape = (self.config.context_length, self.config.d_model)
        return self.param("table", nn.initializers.normal(1.0), shape)[places_BT]


def _rotated_by_place(x_BTHC: jax.Array, positions_BT: jax.Array, config: ModelConfig) -> jax.Array:
    return apply_rope(x_BTHC, jnp.broadcast_to(jnp.arange(positions_BT.shape[1])[None], positions_BT.shape), config)


positions_of_the_row = PositionEncoding(embed=PositionsOfTheRow)
rotated_by_place = PositionEncoding(rotate=_rotated_by_place)


def looks_at_the_factor(frequencies_C: jax.Array, config: ModelConfig) -> Rope:
    """Python asks whether a number is above 1."""
    return Rope(frequencies_C / config.rope.factor if config.rope.factor > 1 else frequencies_C, 1.0)


# Parts of other tables.


def uphill(config: OptimizerConfig, rate: Any) -> optax.GradientTransformation:
    """The sign is wrong."""
    return optax.scale(rate * config.learning_rate)


def state_in_bfloat16(config: OptimizerConfig, rate: Any) -> optax.GradientTransformation:
    """Moments come back in another type than they begin with."""

    def update(gradients: Any, state: Any, params: Any) -> tuple[Any, Any]:
        state = jax.tree.map(lambda m, g: (0.9 * m + g).astype(jnp.bfloat16), state, gradients)
        return jax.tree.map(lambda m: -rate * config.learning_rate * m.astype(jnp.float32), state), state

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)


def looks_at_the_rate(config: OptimizerConfig, rate: Any) -> optax.GradientTransformation:
    """Python asks whether a number is 0."""
    return optax.identity() if config.learning_rate == 0 else optax.scale(-rate * config.learning_rate)


def rises_for_ever(step: jax.Array, steps: Any, schedule: ScheduleConfig) -> jax.Array:
    """Above 1 after the first half."""
    return 2.0 * jnp.asarray(step, jnp.float32) / steps + 0.01


def counts_in_python(step: jax.Array, steps: Any, schedule: ScheduleConfig) -> jax.Array:
    """Python makes an integer of a number."""
    return jnp.minimum(1.0, (step + 1.0) / int(schedule.warmup_steps + 1))


class RevivesTokens:
    def __init__(self, number: Any) -> None:
        self.number = number

    def __call__(self, logits_BV: jax.Array, seen_BV: jax.Array) -> jax.Array:
        return jnp.maximum(logits_BV, -20.0)


class ThresholdOfTheBatch(RevivesTokens):
    def __call__(self, logits_BV: jax.Array, seen_BV: jax.Array) -> jax.Array:
        return jnp.where(logits_BV >= jnp.max(logits_BV) - 8.0, logits_BV, -jnp.inf)


def lower_case(texts: Iterable[str], vocab_size: int | None) -> Tokenizer:
    """Capital letters are lost."""
    tokenizer = TOKENIZERS["byte"](texts, vocab_size)
    tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def other_every_time(config: DataConfig) -> Iterator[Document]:
    """A counter is in the text."""
    yield plain_document("counter", f"This is text number {next(_calls)}.")


MISTAKES = (
    Mistake("mixers/broken_parts:SeesTheNextToken", "causality", r"output token 0, input token 1: a slope of"),
    Mistake("mixers/broken_parts:SeesOtherDocuments", "isolation", r"documents \d and \d of \d"),
    Mistake("mixers/broken_parts:SoftmaxInBfloat16", "precision", r"`exp`.*line \d+, in SoftmaxInBfloat16"),
    Mistake("mixers/broken_parts:SoftmaxWithoutMaximum", "finite", r"large activations in float32; at row 0"),
    Mistake("mixers/broken_parts:WritesOneSlotLate", "cache", r"reads its first r \+ 1 tokens; at row \d+, token"),
    Mistake("mixers/broken_parts:WritesPadding", "cache", r"row \d+", is_slow=True),
    Mistake(
        "mixers/broken_parts:SeesAnEmptySlot",
        "cache",
        r"reads its first r \+ 1 tokens; at row \d+, token",
        is_slow=True,
    ),
    Mistake("mixers/broken_parts:CountsSlotsFromTheCall", "cache", r"the rest after .* row \d+, token", is_slow=True),
    Mistake("mixers/broken_parts:StopsTheGradientOfKeys", "gradients", r"the parameter blocks/0/mixer"),
    Mistake("mixers/broken_parts:ScalesByTokensOfTheRow", "padding", r"a padded row is not .* row \d+, token"),
    Mistake("mixers/broken_parts:ScalesByItsOwnCalls", "remat", r"row \d+, token \d+, logit \d+"),
    Mistake("mixers/broken_parts:ScalesByItsOwnCalls", "layers", r"row \d+, token \d+, logit \d+", is_slow=True),
    Mistake("mixers/broken_parts:WidensItsResult", "shapes", r"float32.* instead of bfloat16"),
    Mistake("mixers/broken_parts:PinnedToADevice", "devices", r"fails on eight devices; .* devices", is_slow=True),
    Mistake("mixers/broken_parts:StateLeaksOverDocuments", "isolation", r"documents \d and \d of \d"),
    Mistake("mixers/broken_parts:StateMovedByPadding", "cache", r"padding changes the cache.* row 11, layer 0"),
    Mistake(
        "mixers/broken_parts:StateStartsAnewWithEachCall", "cache", r"the rest after .* row \d+, token", is_slow=True
    ),
    Mistake(
        "mixers/broken_parts:StateInBfloat16",
        "precision",
        r"keeps its state in fewer bits .*; at broken_parts.py, line",
    ),
    Mistake("feedforwards/broken_parts:LooksAhead", "causality", r"output token 0, input token 1"),
    Mistake("feedforwards/broken_parts:UnusedParameter", "parameters", r"blocks/0/feedforward/unused"),
    Mistake("feedforwards/broken_parts:ProductByHand", "flops", r"d_model 1024: .* declared, .* counted, -\d+%"),
    Mistake("feedforwards/broken_parts:Explodes", "initial_scale", r"layer \d+, seed 0: a root mean square of"),
    Mistake("feedforwards/broken_parts:RootOfZero", "finite", r"the gradient of .* is not finite", is_slow=True),
    Mistake("norms/broken_parts:NormOfTheBatch", "isolation", r"depends on another document"),
    Mistake("norms/broken_parts:NormOverTokens", "causality", r"output token 0, input token 1", is_slow=True),
    Mistake("norms/broken_parts:NormWithoutEpsilon", "finite", r"zero activations in float32; at row 0, token 0"),
    Mistake("norms/broken_parts:NormInBfloat16", "precision", r"`rsqrt`.*line \d+, in NormInBfloat16", is_slow=True),
    Mistake("positions/broken_parts:positions_of_the_row", "isolation", r"alone is not .* row \d+, token \d+"),
    Mistake("positions/broken_parts:rotated_by_place", "cache", r"row \d+, token \d+", is_slow=True),
    Mistake("rope_scalings/broken_parts:looks_at_the_factor", "vmap", r"broken_parts.py, line \d+"),
    Mistake("optimizers/broken_parts:uphill", "optimizer_descent", r"step 200: "),
    Mistake("optimizers/broken_parts:state_in_bfloat16", "optimizer_update", r"bfloat16.* instead of float32"),
    Mistake("optimizers/broken_parts:looks_at_the_rate", "optimizer_numbers", r"broken_parts.py, line \d+"),
    Mistake("schedules/broken_parts:rises_for_ever", "schedule_factor", r"step 1 of 2 "),
    Mistake("schedules/broken_parts:counts_in_python", "schedule_numbers", r"broken_parts.py, line \d+"),
    Mistake("samplers/broken_parts:RevivesTokens", "sampler_distribution", r"row 0, token \d+.* -inf became -20"),
    Mistake("samplers/broken_parts:ThresholdOfTheBatch", "sampler_rows", r"row 0, token"),
    Mistake("tokenizers/broken_parts:lower_case", "tokenizer_round_trip", r"text 0: 'It was"),
    Mistake("corpora/broken_parts:other_every_time", "corpus_documents", r"document 0"),
)
