"""From text to text: prompts are encoded, drawn tokens are decoded, whole or as they come."""

import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from rustgpt_jax.config import ModelConfig, SamplingConfig, for_inference
from rustgpt_jax.data.corpora import Turn
from rustgpt_jax.decoding.generate import begin, drawn_tokens, extend, generate, stop_tokens
from rustgpt_jax.decoding.samplers import from_config
from rustgpt_jax.decoding.weights import Form, for_decoding
from rustgpt_jax.model.transformer import Params
from rustgpt_jax.tokenizers import Codec, decode, decode_after, encode_prompt

# Tokens drawn on the device between looks at the text, where it is shown as it comes.
TOKENS_PER_LOOK = 8


class Writer(NamedTuple):
    """A trained model as something that writes text."""

    params: Params
    model: ModelConfig
    tokenizer: Codec
    is_dialogue: bool

    def prompt(self, text: str) -> list[int]:
        """The tokens to go on from: a question to answer where the model learned dialogues, else the text itself."""
        return self.conversation([Turn("user" if self.is_dialogue else "text", text)])

    def conversation(self, turns: Sequence[Turn]) -> list[int]:
        """The tokens of a conversation whose next turn is the model's."""
        return encode_prompt(self.tokenizer, turns)

    def laid_out(self, form: Form) -> "Writer":
        """A writer that has its weights in a form in which they are read faster."""
        model = for_inference(self.model)
        return self._replace(model=model, params=for_decoding(self.params, model, form))

    def written(self, prompt: Sequence[int], tokens: Sequence[int]) -> str:
        """The text of the tokens drawn after a prompt: a reply by itself, or the continuation of a text."""
        return decode(self.tokenizer, tokens) if self.is_dialogue else decode_after(self.tokenizer, prompt, tokens)

    @property
    def stops(self) -> list[int]:
        """The tokens that end a text or a reply."""
        return self.tokenizer.stop_ids


def write(writer: Writer, prompts: Sequence[Sequence[int]], sampling: SamplingConfig) -> list[str]:
    """What the model writes after each prompt (of tokens), as one batch."""
    drawn = generate(
        writer.params,
        prompts,
        writer.model,
        samplers=from_config(sampling),
        key=jax.random.key(sampling.seed),
        max_tokens=sampling.max_tokens,
        stops=writer.stops,
    )
    return [writer.written(prompt, tokens) for prompt, tokens in zip(prompts, drawn, strict=True)]


def write_as_it_comes(writer: Writer, prompt: Sequence[int], sampling: SamplingConfig) -> Iterator[str]:
    """The same text as `write` gives for the one prompt, in pieces, each as soon as it is known."""
    samplers, key, stops = from_config(sampling), jax.random.key(sampling.seed), stop_tokens(writer.stops)
    generation = begin(writer.params, [prompt], writer.model, sampling.max_tokens)
    shown = ""
    for drawn in range(0, sampling.max_tokens, TOKENS_PER_LOOK):
        count = np.int32(min(TOKENS_PER_LOOK, sampling.max_tokens - drawn))
        generation = extend(writer.params, generation, count, samplers, key, stops, model=writer.model)
        is_done = bool(generation.is_done_B[0]) or drawn + TOKENS_PER_LOOK >= sampling.max_tokens
        tokens = drawn_tokens(generation, [len(prompt)], writer.stops)[0]
        known = writer.written(prompt, tokens) if is_done else _settled(writer, prompt, tokens)
        if known.startswith(shown):
            yield known[len(shown) :]
            shown = known
        if is_done:
            return


def _settled(writer: Writer, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """The part of the text of `tokens` that later tokens cannot change.

    An unfinished character decodes to U+FFFD. Where bytes are tokens for what is no character of the vocabulary, a run
    of them is one text or none: a wrong byte at its end would change all of it.
    """
    text = writer.written(prompt, tokens)
    wrong_byte = writer.tokenizer.token_to_id("<0xFF>")
    if wrong_byte is not None:
        text = os.path.commonprefix([text, writer.written(prompt, [*tokens, wrong_byte])])
    return text.rstrip("\N{REPLACEMENT CHARACTER}").rstrip(" ")
