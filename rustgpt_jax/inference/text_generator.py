"""From text to text: prompts are encoded, drawn tokens are decoded, whole or as they come."""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from rustgpt_jax.config.schema import ModelConfig, SamplingConfig, for_inference
from rustgpt_jax.inference.decode_params import WeightLayout, for_decoding
from rustgpt_jax.inference.generate import generate, stream_tokens
from rustgpt_jax.inference.sampling import from_config
from rustgpt_jax.model.transformer import Params
from rustgpt_jax.tokenizers import Codec, decode, decode_after, encode_prompt
from rustgpt_jax.tokenizers.messages import Turn

# Tokens drawn on the device between looks at the text, where it is shown as it comes.
TOKENS_PER_LOOK = 8


class TextGenerator(NamedTuple):
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

    def with_weight_layout(self, layout: WeightLayout) -> "TextGenerator":
        """A writer that has its weights in a form in which they are read faster."""
        model = for_inference(self.model)
        return self._replace(model=model, params=for_decoding(self.params, model, layout))

    def written(self, prompt: Sequence[int], tokens: Sequence[int]) -> str:
        """Return the text of tokens drawn after a prompt: a separate reply, or the continuation of a text."""
        return decode(self.tokenizer, tokens) if self.is_dialogue else decode_after(self.tokenizer, prompt, tokens)

    @property
    def stops(self) -> list[int]:
        """The tokens that end a text or a reply."""
        return self.tokenizer.stop_ids


def generate_text(writer: TextGenerator, prompts: Sequence[Sequence[int]], sampling: SamplingConfig) -> list[str]:
    """What the model writes after each prompt (of tokens), as one batch."""
    drawn = generate(writer.params, prompts, writer.model, **_drawing(writer, sampling))
    return [writer.written(prompt, tokens) for prompt, tokens in zip(prompts, drawn, strict=True)]


def stream_text(
    writer: TextGenerator,
    prompt: Sequence[int],
    sampling: SamplingConfig,
    says: Callable[[str], object] = lambda _: None,
) -> Iterator[str]:
    """Yield the text that `generate_text` returns for one prompt in pieces, each as soon as it is known.

    `says` is called with a message if the text ends because the context is full.
    """
    looks = stream_tokens(
        writer.params, prompt, writer.model, **_drawing(writer, sampling), tokens_per_look=TOKENS_PER_LOOK
    )
    shown = ""
    for tokens, ending in looks:
        known = _stable_prefix(writer, prompt, tokens) if ending is None else writer.written(prompt, tokens)
        if known.startswith(shown):
            yield known[len(shown) :]
            shown = known
        if ending == "context":
            says(
                f"The text ends after {len(tokens)} of {sampling.max_tokens} tokens because the model's context of "
                f"{writer.model.context_length} is full; use --config.sampling.past_context=slide to continue."
            )


def _drawing(writer: TextGenerator, sampling: SamplingConfig) -> dict[str, Any]:
    """Return the sampling options as keyword arguments of `generate`."""
    return {
        "samplers": from_config(sampling),
        "key": jax.random.key(sampling.seed),
        "max_tokens": sampling.max_tokens,
        "stops": writer.stops,
        "slides": sampling.past_context == "slide",
    }


def _stable_prefix(writer: TextGenerator, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """The part of the text of `tokens` that later tokens cannot change.

    An unfinished character decodes to U+FFFD. Where bytes are tokens for what is no character of the vocabulary, a run
    of them is one text or none: a wrong byte at its end would change all of it.
    """
    text = writer.written(prompt, tokens)
    wrong_byte = writer.tokenizer.token_to_id("<0xFF>")
    if wrong_byte is not None:
        text = os.path.commonprefix([text, writer.written(prompt, [*tokens, wrong_byte])])
    return text.rstrip("\N{REPLACEMENT CHARACTER}").rstrip(" ")
