"""Exact-match accuracy on the assistant messages of dialogues."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from rustgpt_jax.config.schema import SamplingConfig
from rustgpt_jax.inference.text_generator import TextGenerator, generate_text
from rustgpt_jax.tokenizers import Document, Message, decode, encode

BATCH_SIZE = 64


def count_exact_matches(
    generator: TextGenerator,
    documents: Iterable[Document],
    sampling: SamplingConfig,
    progress: Callable[[int, int], object] | None = None,
) -> tuple[int, int]:
    """Count the assistant messages that the model reproduces exactly with greedy decoding.

    Each message is generated after the true messages before it. It has to equal the true one after a round trip through
    the tokenizer. Messages whose prompt does not fit into the context count as wrong.

    Args:
        generator: The model.
        documents: The dialogues.
        sampling: The sampling config; temperature, penalty and length are overridden.
        progress: Called before each batch with the number of messages done and the total.

    Returns:
        The number of exact matches and the total.
    """
    exchanges = [
        (document.messages[:index], message.text)
        for document in documents
        for index, message in enumerate(document.messages)
        if message.role == "assistant"
    ]
    exchanges.sort(key=lambda exchange: sum(len(message.text) for message in exchange[0]))
    n_matches = 0
    for start in range(0, len(exchanges), BATCH_SIZE):
        if progress is not None:
            progress(start, len(exchanges))
        n_matches += _count_in_batch(generator, exchanges[start : start + BATCH_SIZE], sampling)
    return n_matches, len(exchanges)


def _count_in_batch(
    generator: TextGenerator, exchanges: Sequence[tuple[tuple[Message, ...], str]], sampling: SamplingConfig
) -> int:
    targets = [encode(generator.tokenizer, answer) for _, answer in exchanges]
    prompts = [generator.encode_messages(messages) for messages, _ in exchanges]
    fits = [len(prompt) < generator.model.context_length for prompt in prompts]
    prompts = [prompt if fit else prompt[:1] for prompt, fit in zip(prompts, fits, strict=True)]
    max_tokens = max(len(tokens) for tokens in targets) + 1
    greedy = dataclasses.replace(sampling, temperature=0.0, repetition_penalty=1.0, max_tokens=max_tokens)
    texts = generate_text(generator, prompts, greedy)
    return sum(
        fit and text == decode(generator.tokenizer, tokens)
        for fit, text, tokens in zip(fits, texts, targets, strict=True)
    )
