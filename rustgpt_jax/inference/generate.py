"""Generation as pure functions: prefill a batch of prompts, then draw tokens in one loop on the device.

A token depends on the parameters, its row's prompt, the samplers and key, and its place: not on padding, nor on how the
loop is cut into calls. Prompts and caches are rounded up to a few lengths, so that new lengths compile nothing new.
"""

import functools
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rustgpt_jax.config.schema import ModelConfig
from rustgpt_jax.errors import UserError
from rustgpt_jax.inference.sampling import Sampler, draw
from rustgpt_jax.model import transformer
from rustgpt_jax.model.activation_sharding import shard_activations
from rustgpt_jax.model.kv_cache import cast_for_decode
from rustgpt_jax.model.mixers import has_cache

SMALLEST_BUCKET = 16

# Reason why generation ended: a stop token, the requested number of tokens, or a full context.
Ending = Literal["stop", "max_tokens", "context"]


class Generation(NamedTuple):
    """A batch of texts being written.

    tokens_BS: prompt and drawn tokens, each at its position. lengths_B: how many they are, a drawn stop token included.
    logits_BV: for the next token of each row. is_done_B: rows that drew a stop token or have no room left.
    seen_BV: tokens that a row holds. cache: what `transformer.apply` keeps of the tokens so far.
    """

    tokens_BS: jax.Array
    lengths_B: jax.Array
    logits_BV: jax.Array
    is_done_B: jax.Array
    seen_BV: jax.Array
    cache: transformer.Cache


def bucket(length: int, largest: int) -> int:
    """The least of 16, 32, 64, ... that holds `length`, at most `largest`."""
    size = SMALLEST_BUCKET
    while size < length:
        size *= 2
    return min(size, largest)


@functools.cache
def _warn_recomputation(mixers: tuple[str, ...]) -> None:
    """Warns on stderr, once per process, that decoding recomputes mixers without a cache."""
    names = ", ".join(dict.fromkeys(mixers))
    print(
        f"Decoding is slow: {names} has no init_cache, so it is recomputed over the whole context for every token.",
        file=sys.stderr,
    )


@partial(jax.jit, static_argnames=("model", "slots"))
def prefill(
    params: transformer.Params, prompts_BT: jax.Array, lengths_B: jax.Array, *, model: ModelConfig, slots: int
) -> Generation:
    """Read prompts, padded on the right to one length, into a new cache of `slots` tokens a row."""
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
    kept_BT = jnp.where(is_token_BT, prompts_BT, transformer.vocab_size(model))
    assert cache is not None
    return Generation(
        tokens_BS=jnp.zeros((batch, slots), jnp.int32).at[:, :length].set(prompts_BT),
        lengths_B=lengths_B,
        logits_BV=transformer.logits(params, last_B1D, model)[:, 0],
        is_done_B=lengths_B >= slots,
        seen_BV=jnp.zeros((batch, transformer.vocab_size(model)), bool).at[rows_BT, kept_BT].set(True, mode="drop"),
        cache=cache,
    )


@partial(jax.jit, static_argnames="model", donate_argnames="generation")
def decode_steps(
    params: transformer.Params,
    generation: Generation,
    count: jax.Array,
    samplers: tuple[Sampler, ...],
    key: jax.Array,
    stops: jax.Array,
    *,
    model: ModelConfig,
) -> Generation:
    """Draw up to `count` more tokens for each row that is not done, in one loop on the device.

    Args:
        params: The parameters of the model.
        model: The config of the model.
        generation: from `prefill`, or from an earlier call.
        count: the most tokens to draw now.
        samplers: applied in order to the logits of each token.
        key: of the whole batch; each row and position has its own from it.
        stops: tokens (any number of them, -1 is none) after which a row is done.
    """
    batch, slots = generation.tokens_BS.shape
    rows_B = jnp.arange(batch)
    key_of = jax.vmap(lambda row, position: jax.random.fold_in(jax.random.fold_in(key, row), position))

    def unfinished(carry: tuple[jax.Array, Generation]) -> jax.Array:
        drawn, now = carry
        return (drawn < count) & ~jnp.all(now.is_done_B)

    def one_token(carry: tuple[jax.Array, Generation]) -> tuple[jax.Array, Generation]:
        drawn, now = carry
        token_B = draw(key_of(rows_B, now.lengths_B), now.logits_BV, now.seen_BV, samplers)
        slot_B = jnp.where(now.is_done_B, slots, now.lengths_B)
        lengths_B = now.lengths_B + ~now.is_done_B
        is_done_B = now.is_done_B | jnp.isin(token_B, stops) | (lengths_B >= slots)
        logits_B1V, cache = transformer.apply(
            params,
            token_B[:, None],
            model,
            now.cache,
            positions_BT=now.lengths_B[:, None],
            segments_BT=jnp.where(is_done_B, 0, 1)[:, None],
        )
        assert cache is not None
        return drawn + 1, Generation(
            tokens_BS=now.tokens_BS.at[rows_B, slot_B].set(token_B, mode="drop"),
            lengths_B=lengths_B,
            logits_BV=logits_B1V[:, 0],
            is_done_B=is_done_B,
            seen_BV=now.seen_BV.at[rows_B, token_B].set(True),
            cache=cache,
        )

    after = jax.lax.while_loop(unfinished, one_token, (jnp.zeros((), jnp.int32), generation))[1]
    # Every process of a mesh reads them.
    return after._replace(
        tokens_BS=shard_activations(after.tokens_BS, ".."), lengths_B=shard_activations(after.lengths_B, ".")
    )


def start_generation(
    params: transformer.Params, prompts: Sequence[Sequence[int]], model: ModelConfig, max_tokens: int
) -> Generation:
    """Prefill prompts of any lengths, with room for `max_tokens` more each, as far as the context goes.

    Raises UserError for an empty prompt, or one that leaves no room in the model's context.
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
    width = bucket(longest, model.context_length)
    padded_BT = np.zeros((len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        padded_BT[row, : len(prompt)] = prompt
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    slots = bucket(longest + max_tokens, model.context_length)
    return prefill(params, padded_BT, lengths_B, model=model, slots=slots)


def generate(
    params: transformer.Params,
    prompts: Sequence[Sequence[int]],
    model: ModelConfig,
    *,
    samplers: tuple[Sampler, ...],
    key: jax.Array,
    max_tokens: int,
    stops: Sequence[int] = (),
    slides: bool = False,
) -> list[list[int]]:
    """Return the tokens drawn after each prompt, without the stop token.

    Generation ends when the context is full, unless `slides` is True: then it continues from the last half of the
    context, which is read again from position 0.

    Raises:
        UserError: A prompt is empty or leaves no room in the model's context.
    """
    windows = [_slid(prompt, model) if slides else list(prompt) for prompt in prompts]
    drawn: list[list[int]] = [[] for _ in prompts]
    unfinished, turn = set(range(len(prompts))), 0
    while unfinished:
        left = max_tokens - min(len(drawn[row]) for row in unfinished)
        generation = start_generation(params, windows, model, left)
        turn_key = key if turn == 0 else jax.random.fold_in(key, turn)
        generation = decode_steps(
            params, generation, np.int32(left), samplers, turn_key, stop_tokens(stops), model=model
        )
        new = generated_tokens(generation, [len(window) for window in windows], stops)
        lengths_B = jax.device_get(generation.lengths_B)
        for row in sorted(unfinished):
            is_stopped = lengths_B[row] > len(windows[row]) + len(new[row])
            drawn[row] += new[row][: max_tokens - len(drawn[row])]
            if is_stopped or not slides or len(drawn[row]) == max_tokens:
                unfinished.discard(row)
            windows[row] = _slid([*windows[row], *new[row]], model)
        turn += 1
    return drawn


def stream_tokens(
    params: transformer.Params,
    prompt: Sequence[int],
    model: ModelConfig,
    *,
    samplers: tuple[Sampler, ...],
    key: jax.Array,
    max_tokens: int,
    stops: Sequence[int] = (),
    slides: bool = False,
    tokens_per_look: int,
) -> Iterator[tuple[list[int], Ending | None]]:
    """Yield the tokens that `generate` draws after one prompt, all so far each time, and why generation ended."""
    window, drawn, turn = _slid(prompt, model) if slides else list(prompt), list[int](), 0
    while True:
        generation = start_generation(params, [window], model, max_tokens - len(drawn))
        turn_key = key if turn == 0 else jax.random.fold_in(key, turn)
        room = min(max_tokens - len(drawn), model.context_length - len(window))
        new: list[int] = []
        for place in range(0, room, tokens_per_look):
            count = np.int32(min(tokens_per_look, room - place))
            generation = decode_steps(params, generation, count, samplers, turn_key, stop_tokens(stops), model=model)
            new = generated_tokens(generation, [len(window)], stops)[0]
            ending: Ending | None = None
            if int(generation.lengths_B[0]) > len(window) + len(new):
                ending = "stop"
            elif len(drawn) + len(new) == max_tokens:
                ending = "max_tokens"
            elif len(new) == room and not slides:
                ending = "context"
            yield [*drawn, *new], ending
            if ending is not None:
                return
        drawn += new
        window = _slid([*window, *new], model)
        turn += 1


def _slid(window: Sequence[int], model: ModelConfig) -> list[int]:
    """Return the tokens to continue from: all of them, or the last half if the context is full."""
    return list(window if len(window) < model.context_length else window[-(model.context_length // 2) :])


def stop_tokens(stops: Sequence[int]) -> np.ndarray:
    """Stop tokens as an array of one of a few sizes, so that their number compiles nothing new."""
    padded = np.full(-(-max(len(stops), 1) // 8) * 8, -1, np.int32)
    padded[: len(stops)] = stops
    return padded


def generated_tokens(generation: Generation, starts: Sequence[int], stops: Sequence[int]) -> list[list[int]]:
    """The tokens of each row from its start on, without a final stop token."""
    tokens_BS, lengths_B = jax.device_get((generation.tokens_BS, generation.lengths_B))
    rows: list[list[int]] = []
    for tokens_S, length, start in zip(tokens_BS, lengths_B, starts, strict=True):
        row = tokens_S[start:length].tolist()
        rows.append(row[:-1] if row and row[-1] in stops else row)
    return rows
