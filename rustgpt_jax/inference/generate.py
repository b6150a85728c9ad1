"""Token generation as pure functions: prefill a batch of prompts, then sample tokens in one loop on the device.

The tokens of a row depend on the parameters, the prompt, the samplers, the key and the row's index, but not on padding
or on how the loop is split into calls. Lengths of prompts and caches are rounded up, so that few programs are compiled.
"""

import functools
import logging
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rustgpt_jax.config.schema import ModelConfig
from rustgpt_jax.errors import UserError
from rustgpt_jax.inference.sampling import Sampler, sample
from rustgpt_jax.model import transformer
from rustgpt_jax.model.activation_sharding import shard_activations
from rustgpt_jax.model.kv_cache import cast_for_decode
from rustgpt_jax.model.mixers import has_cache

logger = logging.getLogger(__name__)

SMALLEST_BUCKET = 16

FinishReason = Literal["stop", "max_tokens", "context"]


class DecodeState(NamedTuple):
    """A batch of sequences during generation.

    Attributes:
        tokens_BS: Prompt and generated tokens, each at its position.
        lengths_B: Number of tokens in each row, a generated stop token included.
        logits_BV: Logits of the next token.
        is_done_B: Whether a row has generated a stop token or has no room left.
        seen_BV: Whether a row contains a token.
        cache: Cache of `transformer.apply`.
    """

    tokens_BS: jax.Array
    lengths_B: jax.Array
    logits_BV: jax.Array
    is_done_B: jax.Array
    seen_BV: jax.Array
    cache: transformer.Cache


def round_to_bucket(length: int, largest: int) -> int:
    """Return the smallest of 16, 32, 64, ... that is at least `length`, but at most `largest`."""
    size = SMALLEST_BUCKET
    while size < length:
        size *= 2
    return min(size, largest)


@functools.cache
def _warn_recomputation(mixers: tuple[str, ...]) -> None:
    """Log a warning, once per process, that decoding recomputes mixers without a cache."""
    names = ", ".join(dict.fromkeys(mixers))
    logger.warning(
        "Decoding is slow: %s has no init_cache, so it is recomputed over the whole context for every token.", names
    )


@partial(jax.jit, static_argnames=("model", "slots"))
def prefill(
    params: transformer.Params, prompts_BT: jax.Array, lengths_B: jax.Array, *, model: ModelConfig, slots: int
) -> DecodeState:
    """Process prompts, padded on the right to one length, into a new cache of `slots` tokens per row."""
    batch, length = prompts_BT.shape
    is_token_BT = jnp.arange(length)[None, :] < lengths_B[:, None]
    is_unstacked = transformer.is_unrolled(params["blocks"])
    empty = transformer.init_cache(model, batch, slots, unstacked=is_unstacked)
    hidden_BTD, cache, _ = transformer.hidden_states(
        params,
        prompts_BT,
        model,
        cast_for_decode(empty) if is_unstacked else empty,
        segments_BT=is_token_BT.astype(jnp.int32),
    )
    last_B1D = jnp.take_along_axis(hidden_BTD, (lengths_B - 1)[:, None, None], axis=1)
    rows_BT = jnp.arange(batch)[:, None]
    tokens_BT = jnp.where(is_token_BT, prompts_BT, transformer.vocab_size(model))
    assert cache is not None
    return DecodeState(
        tokens_BS=jnp.zeros((batch, slots), jnp.int32).at[:, :length].set(prompts_BT),
        lengths_B=lengths_B,
        logits_BV=transformer.logits(params, last_B1D, model)[:, 0],
        is_done_B=lengths_B >= slots,
        seen_BV=jnp.zeros((batch, transformer.vocab_size(model)), bool).at[rows_BT, tokens_BT].set(True, mode="drop"),
        cache=cache,
    )


@partial(jax.jit, static_argnames="model", donate_argnames="state")
def decode_steps(
    params: transformer.Params,
    state: DecodeState,
    count: jax.Array,
    samplers: tuple[Sampler, ...],
    key: jax.Array,
    stop_ids: jax.Array,
    *,
    model: ModelConfig,
) -> DecodeState:
    """Generate up to `count` more tokens for each unfinished row, in one loop on the device.

    Args:
        params: Parameters of the model.
        state: From `prefill` or an earlier call; donated.
        count: Maximum number of tokens.
        samplers: Applied in order to the logits of each token.
        key: Key of the batch, from which each row and position derives its own.
        stop_ids: Tokens after which a row is done; entries of -1 are ignored.
        model: Config of the model.
    """
    batch, slots = state.tokens_BS.shape
    rows_B = jnp.arange(batch)
    fold_in_B = jax.vmap(lambda row, position: jax.random.fold_in(jax.random.fold_in(key, row), position))

    def is_unfinished(carry: tuple[jax.Array, DecodeState]) -> jax.Array:
        n_generated, state = carry
        return (n_generated < count) & ~jnp.all(state.is_done_B)

    def decode_step(carry: tuple[jax.Array, DecodeState]) -> tuple[jax.Array, DecodeState]:
        n_generated, state = carry
        token_B = sample(fold_in_B(rows_B, state.lengths_B), state.logits_BV, state.seen_BV, samplers)
        slot_B = jnp.where(state.is_done_B, slots, state.lengths_B)
        lengths_B = state.lengths_B + ~state.is_done_B
        is_done_B = state.is_done_B | jnp.isin(token_B, stop_ids) | (lengths_B >= slots)
        logits_B1V, cache = transformer.apply(
            params,
            token_B[:, None],
            model,
            state.cache,
            positions_BT=state.lengths_B[:, None],
            segments_BT=jnp.where(is_done_B, 0, 1)[:, None],
        )
        assert cache is not None
        return n_generated + 1, DecodeState(
            tokens_BS=state.tokens_BS.at[rows_B, slot_B].set(token_B, mode="drop"),
            lengths_B=lengths_B,
            logits_BV=logits_B1V[:, 0],
            is_done_B=is_done_B,
            seen_BV=state.seen_BV.at[rows_B, token_B].set(True),
            cache=cache,
        )

    _, state = jax.lax.while_loop(is_unfinished, decode_step, (jnp.zeros((), jnp.int32), state))
    # Replicated, because every process of a mesh reads them.
    return state._replace(
        tokens_BS=shard_activations(state.tokens_BS, ".."), lengths_B=shard_activations(state.lengths_B, ".")
    )


def start_generation(
    params: transformer.Params, prompts: Sequence[Sequence[int]], model: ModelConfig, max_tokens: int
) -> DecodeState:
    """Prefill prompts of any lengths, with room for `max_tokens` more in each row, up to the context length.

    Raises:
        UserError: A prompt is empty or leaves no room in the model's context.
    """
    longest = max(len(prompt) for prompt in prompts)
    if min(len(prompt) for prompt in prompts) == 0:
        raise UserError("A prompt needs at least one token.")
    if longest >= model.context_length:
        raise UserError(
            f"The prompt has {longest} tokens, and the model's context of {model.context_length} "
            "(config.model.context_length) leaves no room for another."
        )
    if uncached := tuple(name for name in model.mixers if not has_cache(name)):
        _warn_recomputation(uncached)
    padded_BT = np.zeros((len(prompts), round_to_bucket(longest, model.context_length)), np.int32)
    for row, prompt in enumerate(prompts):
        padded_BT[row, : len(prompt)] = prompt
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    slots = round_to_bucket(longest + max_tokens, model.context_length)
    return prefill(params, padded_BT, lengths_B, model=model, slots=slots)


def generate(
    params: transformer.Params, prompts: Sequence[Sequence[int]], model: ModelConfig, *, max_tokens: int, **options: Any
) -> list[list[int]]:
    """Return the tokens generated after each prompt, without the stop token; `options` are as for `stream_tokens`."""
    *_, (outputs, _) = stream_tokens(
        params, prompts, model, max_tokens=max_tokens, tokens_per_call=max_tokens, **options
    )
    return outputs


def stream_tokens(
    params: transformer.Params,
    prompts: Sequence[Sequence[int]],
    model: ModelConfig,
    *,
    samplers: tuple[Sampler, ...],
    key: jax.Array,
    max_tokens: int,
    tokens_per_call: int,
    stop_ids: Sequence[int] = (),
    slide: bool = False,
) -> Iterator[tuple[list[list[int]], list[FinishReason | None]]]:
    """Generate tokens after prompts, in calls of the compiled loop for `tokens_per_call` tokens each.

    A row ends when its context is full, unless `slide` is True: then it continues from the last half of the context,
    which is processed again from position 0.

    Yields:
        After each call, the tokens of each row so far, without the stop token, and why it stopped, or None.

    Raises:
        UserError: A prompt is empty or leaves no room in the model's context.
    """
    contexts = [_slide(prompt, model) if slide else list(prompt) for prompt in prompts]
    outputs: list[list[int]] = [[] for _ in prompts]
    reasons: list[FinishReason | None] = [None for _ in prompts]
    n_slides = 0
    while None in reasons:
        unfinished = [row for row, reason in enumerate(reasons) if reason is None]
        count = max_tokens - min(len(outputs[row]) for row in unfinished)
        state = start_generation(params, contexts, model, count)
        call_key = jax.random.fold_in(key, n_slides) if n_slides else key
        earlier = list(outputs)
        new: list[list[int]] = []
        for start in range(0, count, tokens_per_call):
            steps = np.int32(min(tokens_per_call, count - start))
            state = decode_steps(params, state, steps, samplers, call_key, pad_stop_ids(stop_ids), model=model)
            new = generated_tokens(state, [len(context) for context in contexts], stop_ids)
            lengths_B, is_done_B = jax.device_get((state.lengths_B, state.is_done_B))
            for row in unfinished:
                length = len(contexts[row]) + len(new[row])
                outputs[row] = [*earlier[row], *new[row][: max_tokens - len(earlier[row])]]
                if lengths_B[row] > length:
                    reasons[row] = "stop"
                elif len(outputs[row]) == max_tokens:
                    reasons[row] = "max_tokens"
                elif length == model.context_length and not slide:
                    reasons[row] = "context"
            yield list(outputs), list(reasons)
            if is_done_B.all() or None not in reasons:
                break
        for row in unfinished:
            contexts[row] = _slide([*contexts[row], *new[row]], model)
        n_slides += 1


def _slide(tokens: Sequence[int], model: ModelConfig) -> list[int]:
    """Return the tokens to continue from: all of them, or the last half of the context if it is full."""
    return list(tokens if len(tokens) < model.context_length else tokens[-(model.context_length // 2) :])


def pad_stop_ids(stop_ids: Sequence[int]) -> np.ndarray:
    """Return stop tokens as an array padded to a multiple of 8, so that their number rarely causes recompilation."""
    padded = np.full(-(-max(len(stop_ids), 1) // 8) * 8, -1, np.int32)
    padded[: len(stop_ids)] = stop_ids
    return padded


def generated_tokens(state: DecodeState, starts: Sequence[int], stop_ids: Sequence[int]) -> list[list[int]]:
    """Return the tokens of each row from its start, without a final stop token."""
    tokens_BS, lengths_B = jax.device_get((state.tokens_BS, state.lengths_B))
    rows: list[list[int]] = []
    for tokens_S, length, start in zip(tokens_BS, lengths_B, starts, strict=True):
        row = tokens_S[start:length].tolist()
        rows.append(row[:-1] if row and row[-1] in stop_ids else row)
    return rows
