"""Text generation: encoding of prompts, and decoding of generated tokens at the end or as a stream."""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from rustgpt_jax.config.schema import ModelConfig, SamplingConfig, for_inference
from rustgpt_jax.inference.decode_params import WeightLayout, to_decode_params
from rustgpt_jax.inference.generate import generate, stream_tokens
from rustgpt_jax.inference.sampling import make_samplers
from rustgpt_jax.model.transformer import Params
from rustgpt_jax.tokenizers import Message, Tokenizer, decode, decode_continuation, encode_prompt

# Tokens generated per call of the compiled loop when text is streamed.
STREAM_TOKENS_PER_CALL = 8


class TextGenerator(NamedTuple):
    """A trained model with its tokenizer.

    Attributes:
        params: Parameters as trained, or from `to_decode_params`.
        model: Config of the model.
        tokenizer: Tokenizer of the model.
        is_dialogue: Whether the model was trained on dialogues, so that it answers prompts instead of continuing them.
    """

    params: Params
    model: ModelConfig
    tokenizer: Tokenizer
    is_dialogue: bool

    def encode_prompt(self, text: str) -> list[int]:
        """Return the tokens of a question for a model of dialogues, or of a text to continue."""
        return self.encode_messages([Message("user" if self.is_dialogue else "text", text)])

    def encode_messages(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens of a conversation whose next message is the model's."""
        return encode_prompt(self.tokenizer, messages)

    def decode(self, prompt: Sequence[int], tokens: Sequence[int]) -> str:
        """Return the text of the tokens generated after a prompt: a reply, or the continuation of a text."""
        return (
            decode(self.tokenizer, tokens) if self.is_dialogue else decode_continuation(self.tokenizer, prompt, tokens)
        )

    def with_weight_layout(self, layout: WeightLayout) -> "TextGenerator":
        """Return the same model with its parameters prepared for decoding."""
        model = for_inference(self.model)
        return self._replace(model=model, params=to_decode_params(self.params, model, layout))

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end a text or a reply."""
        return self.tokenizer.stop_ids


def generate_text(generator: TextGenerator, prompts: Sequence[Sequence[int]], sampling: SamplingConfig) -> list[str]:
    """Return the text generated after each prompt (of tokens), as one batch."""
    options = _generate_options(generator, sampling)
    outputs = generate(generator.params, prompts, generator.model, **options)
    return [generator.decode(prompt, tokens) for prompt, tokens in zip(prompts, outputs, strict=True)]


def stream_text(
    generator: TextGenerator,
    prompt: Sequence[int],
    sampling: SamplingConfig,
    warn: Callable[[str], object] = lambda _: None,
) -> Iterator[str]:
    """Yield the text that `generate_text` returns for one prompt in pieces, each as soon as it is final.

    `warn` is called with a message if generation ends because the context is full.
    """
    options = _generate_options(generator, sampling) | {"tokens_per_call": STREAM_TOKENS_PER_CALL}
    shown = ""
    for [tokens], [finish_reason] in stream_tokens(generator.params, [prompt], generator.model, **options):
        is_last = finish_reason is not None
        text = generator.decode(prompt, tokens) if is_last else _stable_prefix(generator, prompt, tokens)
        if text.startswith(shown):
            yield text[len(shown) :]
            shown = text
        if finish_reason == "context":
            warn(
                f"The text ends after {len(tokens)} of {sampling.max_tokens} tokens because the model's context of "
                f"{generator.model.context_length} is full; use --config.sampling.past_context=slide to continue."
            )


def _generate_options(generator: TextGenerator, sampling: SamplingConfig) -> dict[str, Any]:
    """Return the keyword arguments of `generate`."""
    return {
        "samplers": make_samplers(sampling),
        "key": jax.random.key(sampling.seed),
        "max_tokens": sampling.max_tokens,
        "stop_ids": generator.stop_ids,
        "slide": sampling.past_context == "slide",
    }


def _stable_prefix(generator: TextGenerator, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """Return the part of the text of `tokens` that later tokens cannot change.

    An incomplete character decodes to U+FFFD. With byte fallback, an invalid byte changes the text of the whole run of
    byte tokens that it ends, so the prefix must also be a prefix of the text of the tokens followed by an invalid byte.
    """
    text = generator.decode(prompt, tokens)
    invalid_byte = generator.tokenizer.token_to_id("<0xFF>")
    if invalid_byte is not None:
        text = os.path.commonprefix([text, generator.decode(prompt, [*tokens, invalid_byte])])
    return text.rstrip("\N{REPLACEMENT CHARACTER}").rstrip(" ")
