"""Exact-match accuracy of a model on the questions of a dialogue corpus."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

from rustgpt_jax.config.schema import SamplingConfig
from rustgpt_jax.inference.text_generator import TextGenerator, generate_text
from rustgpt_jax.tokenizers import Document, Message, decode, encode

BATCH = 64


def right_answers(
    writer: TextGenerator,
    documents: Iterable[Document],
    sampling: SamplingConfig,
    progress: Callable[[int, int], object] | None = None,
) -> tuple[int, int]:
    """Count the assistant messages that the model reproduces exactly with greedy decoding.

    Each message is generated after all true messages before it. It is right if its text equals the true one after a
    round trip through the tokenizer. Messages whose prompt does not fit the context count as wrong.

    Args:
        writer: The model.
        documents: The dialogues.
        sampling: The sampling config; temperature, penalty and length are overridden.
        progress: Called before each batch with the number of answered questions and the total.

    Returns:
        The number of right messages and the total.
    """
    exchanges = [exchange for document in documents for exchange in _exchanges(document)]
    exchanges.sort(key=lambda exchange: sum(len(turn.text) for turn in exchange[0]))
    right = 0
    for start in range(0, len(exchanges), BATCH):
        if progress is not None:
            progress(start, len(exchanges))
        right += _right_in_batch(writer, exchanges[start : start + BATCH], sampling)
    return right, len(exchanges)


def _exchanges(document: Document) -> Iterator[tuple[tuple[Message, ...], str]]:
    for place, turn in enumerate(document.messages):
        if turn.role == "assistant":
            yield document.messages[:place], turn.text


def _right_in_batch(
    writer: TextGenerator, exchanges: Sequence[tuple[tuple[Message, ...], str]], sampling: SamplingConfig
) -> int:
    wanted = [encode(writer.tokenizer, answer) for _, answer in exchanges]
    prompts = [writer.encode_messages(turns) for turns, _ in exchanges]
    fits = [len(prompt) < writer.model.context_length for prompt in prompts]
    prompts = [prompt if fit else prompt[:1] for prompt, fit in zip(prompts, fits, strict=True)]
    longest = max(len(tokens) for tokens in wanted) + 1
    greedy = dataclasses.replace(sampling, temperature=0.0, repetition_penalty=1.0, max_tokens=longest)
    given = generate_text(writer, prompts, greedy)
    return sum(
        fit and text == decode(writer.tokenizer, tokens) for fit, text, tokens in zip(fits, given, wanted, strict=True)
    )
