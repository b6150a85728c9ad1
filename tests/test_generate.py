"""Generation gives the tokens of an uncached loop, whatever the batch, the padding and the split into calls."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest
from conftest import random_params, small_config
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from rustgpt_jax.config.schema import ModelConfig, SamplingConfig, TokenizerConfig
from rustgpt_jax.errors import UserError
from rustgpt_jax.inference.generate import (
    decode_steps,
    generate,
    generated_tokens,
    pad_stop_ids,
    prefill,
    round_to_bucket,
    start_generation,
    stream_tokens,
)
from rustgpt_jax.inference.sampling import make_samplers
from rustgpt_jax.inference.text_generator import Ending, TextGenerator, generate_text, stream_text
from rustgpt_jax.model import transformer
from rustgpt_jax.tokenizers import TOKENIZERS, Message, train_tokenizer

pytestmark = pytest.mark.usefixtures("quick_codegen")

CONTEXT = 40
MODELS: dict[str, ModelConfig] = {
    "rope": small_config(
        **{"model.context_length": CONTEXT, "model.attention.n_kv_heads": 2, "model.tie_embeddings": False}
    ).model,
    "learned": small_config(
        **{
            "model.context_length": CONTEXT,
            "model.positions": ("learned",),
            "model.norm_placement": "post",
            "model.feedforwards": ("relu",),
            "model.scan_layers": False,
            "model.tie_embeddings": False,
        }
    ).model,
}
MODEL = MODELS["rope"]
PARAMS = {name: random_params(model, seed=3) for name, model in MODELS.items()}
PROMPTS = [np.random.default_rng(length).integers(0, 61, length).tolist() for length in (3, 1, 14, 9)]
GREEDY = make_samplers(small_config(**{"sampling.temperature": 0.0}).sampling)
WARM = make_samplers(small_config(**{"sampling.temperature": 1.5, "sampling.top_p": 0.9}).sampling)


def generate_tokens(
    prompts: Sequence[Sequence[int]] = PROMPTS,
    samplers: Any = WARM,
    seed: int = 0,
    max_tokens: int = 12,
    stop_ids: Sequence[int] = (),
    name: str = "rope",
) -> list[list[int]]:
    return generate(
        PARAMS[name],
        prompts,
        MODELS[name],
        samplers=samplers,
        key=jax.random.key(seed),
        max_tokens=max_tokens,
        stop_ids=stop_ids,
    )


forward = jax.jit(transformer.apply, static_argnames="model")


def uncached(prompt: Sequence[int], max_tokens: int, name: str = "rope") -> list[int]:
    """Greedy tokens, each from a forward pass over the whole text."""
    text = list(prompt)
    while len(text) < min(CONTEXT, len(prompt) + max_tokens):
        padded_BT = np.zeros((1, CONTEXT), np.int32)
        padded_BT[0, : len(text)] = text
        logits_BTV, _ = forward(PARAMS[name], padded_BT, MODELS[name])
        text.append(int(np.argmax(logits_BTV[0, len(text) - 1])))
    return text[len(prompt) :]


# Tokens.


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_match_the_uncached_loop(name: str) -> None:
    expected = [uncached(prompt, 12, name) for prompt in PROMPTS]
    assert generate_tokens(samplers=GREEDY, name=name) == expected
    assert len({tuple(tokens) for tokens in expected}) == len(PROMPTS)
    assert min(len(set(tokens)) for tokens in expected) > 2


def test_full_context_ends_only_its_row() -> None:
    prompts = [PROMPTS[0], [*PROMPTS[2], *PROMPTS[2]], [5] * (CONTEXT - 1), PROMPTS[1]]
    assert generate_tokens(prompts, GREEDY, max_tokens=36) == [uncached(prompt, 36) for prompt in prompts]
    assert [len(tokens) for tokens in generate_tokens(prompts, max_tokens=36)] == [36, 12, 1, 36]


def uncached_slide(prompt: Sequence[int], max_tokens: int, name: str) -> list[int]:
    """`uncached`, continued from the last half of a full context."""
    window, drawn = list(prompt), list[int]()
    while len(drawn) < max_tokens:
        if len(window) >= CONTEXT:
            window = window[-(CONTEXT // 2) :]
        new = uncached(window, max_tokens - len(drawn), name)
        window, drawn = window + new, drawn + new
    return drawn


@pytest.mark.parametrize("name", MODELS)
def test_sliding_past_the_context_matches_the_uncached_loop(name: str) -> None:
    prompts = [PROMPTS[0], [5] * (CONTEXT - 1), [*range(61)]]
    options: dict[str, Any] = {"samplers": GREEDY, "key": jax.random.key(0), "max_tokens": 70, "slide": True}
    expected = [uncached_slide(prompt, 70, name) for prompt in prompts]
    assert generate(PARAMS[name], prompts, MODELS[name], **options) == expected


def test_sliding_does_not_depend_on_batch_streaming_or_stops() -> None:
    options: dict[str, Any] = {"samplers": WARM, "key": jax.random.key(3), "max_tokens": 90, "slide": True}
    together = generate(PARAMS["rope"], PROMPTS, MODEL, **options)
    alone = generate(PARAMS["rope"], PROMPTS[:1], MODEL, **options)[0]
    assert alone == together[0] and len(alone) == 90
    stop_ids = [alone[80]]
    end = alone.index(stop_ids[0])
    stopped = generate(PARAMS["rope"], PROMPTS, MODEL, **options, stop_ids=stop_ids)
    assert stopped[0] == alone[:end]
    calls = list(stream_tokens(PARAMS["rope"], PROMPTS[:1], MODEL, **options, stop_ids=stop_ids, tokens_per_call=8))
    assert calls[-1] == ([alone[:end]], ["stop"])
    assert all(ending is None and alone[: len(tokens)] == tokens for [tokens], [ending] in calls[:-1])
    # After sliding, tokens are sampled with other keys.
    assert alone[CONTEXT // 2 :][:20] != alone[CONTEXT:][:20]


@pytest.mark.parametrize(
    ("max_tokens", "slide", "ending"), [(5, False, "max_tokens"), (99, False, "context"), (99, True, "max_tokens")]
)
def test_finish_reason_is_reported(max_tokens: int, slide: bool, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = text_sampling(max_tokens=max_tokens, past_context="slide" if slide else "stop")
    _, generator = text_generator("byte")
    endings = list[Ending]()
    prompt = generator.encode_prompt("rain")
    options: dict[str, Any] = {"samplers": GREEDY, "key": jax.random.key(0), "max_tokens": max_tokens, "slide": slide}
    calls = stream_tokens(TEXT_PARAMS, [prompt], TEXT_MODEL, **options, tokens_per_call=8)
    assert [last for _, [last] in calls][-1] == ending
    monkeypatch.setattr(TextGenerator, "stop_ids", [])
    text = "".join(stream_text(generator, prompt, sampling, endings.append))
    assert text == generate_text(generator, [prompt], sampling)[0]
    [(tokens, finish_reason, warning)] = endings
    assert finish_reason == ending and generator.decode(prompt, tokens) == text
    assert (warning is not None) == (ending == "context")
    if warning is not None:
        room = TEXT_MODEL.context_length - len(prompt)
        expected = f"The text ends after {room} of 99 tokens because the model's context of 64 is full"
        assert warning.startswith(expected)


@pytest.mark.parametrize("samplers", [GREEDY, WARM])
def test_tokens_do_not_depend_on_the_batch(samplers: Any) -> None:
    together = generate_tokens(samplers=samplers)
    assert generate_tokens(PROMPTS[:1], samplers)[0] == together[0]
    if samplers is GREEDY:
        assert [generate_tokens([prompt], samplers)[0] for prompt in PROMPTS] == together
    else:
        others = [PROMPTS[0], *[[7] * 33] * 3]
        assert generate_tokens(others, samplers, max_tokens=7)[0] == together[0][:7]


@given(st.lists(st.integers(0, 13), max_size=6))
@settings(max_examples=15)
def test_tokens_do_not_depend_on_splitting_the_loop(counts: list[int]) -> None:
    expected = generate_tokens(stop_ids=[17])
    generation = start_generation(PARAMS["rope"], PROMPTS, MODEL, 12)
    left = 12
    for count in [*counts, 12]:
        count = min(count, left)
        generation = decode_steps(
            PARAMS["rope"], generation, np.int32(count), WARM, jax.random.key(0), pad_stop_ids([17]), model=MODEL
        )
        left -= count
    assert generated_tokens(generation, [len(prompt) for prompt in PROMPTS], [17]) == expected


def test_seed_and_row_determine_the_tokens() -> None:
    assert generate_tokens(max_tokens=3) == [tokens[:3] for tokens in generate_tokens()]
    assert generate_tokens(seed=3) == generate_tokens(seed=3)
    assert all(first != second for first, second in zip(generate_tokens(seed=3), generate_tokens(seed=4), strict=True))
    same_prompt = generate_tokens([PROMPTS[3]] * 4)
    assert len({tuple(tokens) for tokens in same_prompt}) == 4
    assert generate_tokens(seed=3, samplers=GREEDY) == generate_tokens(seed=4, samplers=GREEDY)


def test_repetition_penalty_covers_the_prompt() -> None:
    penalty = make_samplers(small_config(**{"sampling.temperature": 0.0, "sampling.repetition_penalty": 1e6}).sampling)
    for prompt, tokens in zip(PROMPTS, generate_tokens(samplers=penalty), strict=True):
        assert len({*prompt, *tokens}) == len({*prompt}) + len(tokens)


@pytest.mark.parametrize("n_stops", [1, 9, 61])
def test_stop_token_ends_its_row_and_is_omitted(n_stops: int) -> None:
    free = generate_tokens()
    stop_ids = [free[0][5], *[token for token in range(61) if token not in {*free[0]}]][:n_stops]
    if n_stops == 61:
        stop_ids = list(range(61))
    ends = [next((place for place, token in enumerate(tokens) if token in stop_ids), 12) for tokens in free]
    assert generate_tokens(stop_ids=stop_ids) == [tokens[:end] for tokens, end in zip(free, ends, strict=True)]
    assert ends[0] <= 5


def test_decode_state_holds_the_whole_text() -> None:
    generation = start_generation(PARAMS["rope"], PROMPTS, MODEL, 12)
    generation = decode_steps(
        PARAMS["rope"], generation, np.int32(12), GREEDY, jax.random.key(0), pad_stop_ids([]), model=MODEL
    )
    for row, prompt in enumerate(PROMPTS):
        text = [*prompt, *uncached(prompt, 12)]
        assert generation.lengths_B[row] == len(text)
        assert np.asarray(generation.tokens_BS)[row, : len(text)].tolist() == text
        assert np.flatnonzero(generation.seen_BV[row]).tolist() == sorted({*text})


# Compiled programs.


def n_programs() -> tuple[int, int]:
    return prefill._cache_size(), decode_steps._cache_size()


@pytest.mark.parametrize(
    "changes",
    [
        {"prompts": [[1, 2], [3] * 16, [4] * 7, [5] * 8]},
        {"max_tokens": 18},
        {"max_tokens": 4},
        {"seed": 9},
        {"stop_ids": [3]},
        {"stop_ids": [1, 2, 3, 4]},
        {"samplers": make_samplers(small_config(**{"sampling.temperature": 0.1, "sampling.top_p": 0.2}).sampling)},
    ],
    ids=lambda changes: str(*changes),
)
def test_varying_arguments_do_not_recompile(changes: dict[str, Any]) -> None:
    generate_tokens()
    before = n_programs()
    generate_tokens(**changes)
    assert n_programs() == before


def test_another_bucket_compiles_one_program() -> None:
    generate_tokens()
    prefills, extensions = n_programs()
    generate_tokens([[1]] * 4, max_tokens=4)
    assert n_programs() == (prefills + 1, extensions + 1)


@given(st.integers(1, 10_000), st.integers(2, 10_000))
def test_buckets_are_large_enough_and_few(length: int, largest: int) -> None:
    length = min(length, largest)
    size = round_to_bucket(length, largest)
    assert length <= size <= largest
    assert size in (largest, 16) or (size < 2 * length and size & (size - 1) == 0)


# Invalid prompts.


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1], []], "at least one token"),
        ([[1] * CONTEXT], f"{CONTEXT} tokens.*context of {CONTEXT}.*config.model.context_length"),
        ([[1], [1] * (CONTEXT + 60)], f"{CONTEXT + 60} tokens"),
    ],
    ids=["empty", "full", "too long"],
)
def test_empty_and_overlong_prompts_are_user_errors(prompts: list[list[int]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        generate_tokens(prompts)


# Text.

TEXTS = ['She said: "the rain (and the wind) fell," naïvely. €100 🙂', "Yes, no! It's the well-known rain."]


def text_generator(name: str, is_dialogue: bool = False) -> tuple[Tokenizer, TextGenerator]:
    tokenizer = train_tokenizer(TokenizerConfig(name, 300 if name == "bpe" else None), TEXTS)
    return tokenizer, TextGenerator(TEXT_PARAMS, TEXT_MODEL, tokenizer, is_dialogue)


TEXT_MODEL = small_config(**{"model.vocab_size": 320, "model.context_length": 64}).model
TEXT_PARAMS = random_params(TEXT_MODEL)


def text_sampling(**changes: Any) -> SamplingConfig:
    changes = {"temperature": 1.5, "top_p": 0.99, "max_tokens": 30} | changes
    return small_config(**{f"sampling.{name}": value for name, value in changes.items()}).sampling


@pytest.mark.parametrize("name", TOKENIZERS)
def test_streamed_text_matches_generated_text(name: str) -> None:
    _, generator = text_generator(name)
    prompt = generator.encode_prompt(TEXTS[1][:4])
    for seed in range(5):
        sampling = text_sampling(seed=seed)
        pieces = list(stream_text(generator, prompt, sampling))
        assert "".join(pieces) == generate_text(generator, [prompt], sampling)[0]
        assert len(pieces) > 1


def test_prompts_of_dialogues_and_texts() -> None:
    tokenizer, of_texts = text_generator("word")
    _, of_dialogues = text_generator("word", is_dialogue=True)
    word = tokenizer.token_to_id("rain")
    names = [tokenizer.id_to_token(token) for token in of_dialogues.encode_prompt("rain")]
    assert of_texts.encode_prompt("rain") == [of_texts.stop_ids[0], word]
    assert names == ["<|endoftext|>", "<|user|>", "rain", "<|assistant|>"]
    assert of_dialogues.encode_prompt("rain") == of_dialogues.encode_messages([Message("user", "rain")])
    assert [tokenizer.id_to_token(token) for token in of_texts.stop_ids] == [
        "<|endoftext|>",
        "<|user|>",
        "<|system|>",
    ]
