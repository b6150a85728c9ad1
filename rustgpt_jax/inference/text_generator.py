"""Text generation: parameters for decoding, encoding of prompts, and text at the end or as a stream."""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax

from rustgpt_jax.config.schema import ModelConfig, SamplingConfig, for_inference
from rustgpt_jax.inference.generate import FinishReason, generate, stream_tokens
from rustgpt_jax.inference.sampling import make_samplers
from rustgpt_jax.model import transformer
from rustgpt_jax.model.block import layer_groups, linear_layers
from rustgpt_jax.model.kernels import matvec
from rustgpt_jax.model.matmul import UpcastWeight, round_weights, to_row_major
from rustgpt_jax.model.transformer import Params
from rustgpt_jax.pytrees import format_path
from rustgpt_jax.tokenizers import Message, Tokenizer, decode, decode_continuation, encode_prompt

# Parameters for decoding, converted once instead of for every token.
#
# Trained parameters are float32 and stacked over layers. Here each layer has its own arrays, so the loop over tokens
# copies none of them; matrices have the dtype in which they are multiplied, or a narrower one, and the layout that is
# fastest for few rows. Norms, biases and embedding tables are unchanged.


class WeightLayout(NamedTuple):
    """Storage of the weight matrices for decoding.

    Attributes:
        dtype: As in `config.sampling.weight_dtype`; None for the dtype in which matrices are multiplied.
        matmul_impl: As in `config.sampling.matmul_impl`, but only native if the native kernel is available.
        platform: Platform of the device.
    """

    dtype: str | None
    matmul_impl: str
    platform: str


def select_weight_layout(sampling: SamplingConfig) -> WeightLayout:
    """Return the layout for a config and the default device.

    The native kernel is compiled on first use. If that fails, a warning is printed and XLA is used instead.
    """
    platform = jax.default_backend()
    is_native = sampling.matmul_impl == "native" and platform == "cpu" and matvec.ffi_target() is not None
    return WeightLayout(sampling.weight_dtype, "native" if is_native else "plain", platform)


def to_decode_params(params: transformer.Params, model: ModelConfig, layout: WeightLayout) -> transformer.Params:
    """Return parameters for decoding, which `transformer.apply` accepts in place of the trained ones.

    Parameters sharded over several devices stay stacked and sharded; their values are rounded to the layout's dtype.
    """
    is_sharded = any(isinstance(x, jax.Array) and len(x.sharding.device_set) > 1 for x in jax.tree.leaves(params))
    if is_sharded or not jax.sharding.get_abstract_mesh().empty:
        return params if layout.dtype is None else _round_params(params, model=model, dtype=layout.dtype)
    return _unstack_params(params, model=model, layout=layout)


@partial(jax.jit, static_argnames=("model", "dtype"))
def _round_params(params: transformer.Params, *, model: ModelConfig, dtype: str) -> transformer.Params:
    """Round the matrices of linear layers and the output layer to a dtype; all arrays stay as they were trained."""
    blocks = {}
    for index, group in enumerate(layer_groups(model)):
        kernels = linear_layers(group.block)

        def round_leaf(path: Any, leaf: jax.Array, kernels: Any = kernels) -> jax.Array:
            return jax.vmap(partial(round_weights, dtype=dtype))(leaf) if format_path(path) in kernels else leaf

        blocks[str(index)] = jax.tree_util.tree_map_with_path(round_leaf, params["blocks"][str(index)])
    return params | {"blocks": blocks, "head": {"kernel": round_weights(_head_kernel(params, model), dtype)}}


@partial(jax.jit, static_argnames=("model", "layout"))
def _unstack_params(params: transformer.Params, *, model: ModelConfig, layout: WeightLayout) -> transformer.Params:
    blocks = {}
    for index, group in enumerate(layer_groups(model)):
        stacked = params["blocks"][str(index)]
        layers = [jax.tree.map(lambda leaf, n=n: leaf[n], stacked) for n in range(len(group.layers))]
        blocks[str(index)] = [_convert_layer(layer, group.block, layout) for layer in layers]
    head = {"kernel": _convert_kernel(_head_kernel(params, model), model.precision.logits_dtype or model.dtype, layout)}
    return params | {"blocks": blocks, "head": head}


def _head_kernel(params: transformer.Params, model: ModelConfig) -> jax.Array:
    """Return kernel_DV of the output layer."""
    return params["embedding"]["table"].T if model.tie_embeddings else params["head"]["kernel"]


def _convert_layer(params: transformer.Params, block: ModelConfig, layout: WeightLayout) -> transformer.Params:
    kernels = linear_layers(block)

    def convert(path: Any, leaf: jax.Array) -> Any:
        config = kernels.get(format_path(path))
        if config is None:
            return leaf
        if config.precision.matmul_dtype == "float8":
            # The scale of a float8 matrix is computed from float32 weights.
            return leaf if layout.dtype is None else _convert_kernel(leaf, config.dtype, layout)
        return _convert_kernel(leaf, config.precision.matmul_dtype or config.dtype, layout)

    return jax.tree_util.tree_map_with_path(convert, params)


def _convert_kernel(kernel: jax.Array, operand_dtype: str, layout: WeightLayout) -> Any:
    """Convert a kernel (inputs, outputs) that would otherwise be multiplied in `operand_dtype`."""
    dtype = layout.dtype or operand_dtype
    if dtype not in matvec.DTYPES:
        return kernel
    if layout.matmul_impl == "native" or (layout.platform != "cpu" and dtype == "int8"):
        return to_row_major(kernel, dtype, layout.matmul_impl)
    if layout.platform != "cpu" or dtype == "float32":
        return kernel.astype(dtype)
    return UpcastWeight(round_weights(kernel, dtype), dtype)


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
        """Return the tokens of a question, for a model trained on dialogues, or of text to continue."""
        return self.encode_messages([Message("user" if self.is_dialogue else "text", text)])

    def encode_messages(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens of a conversation whose next message is the model's."""
        return encode_prompt(self.tokenizer, messages)

    def decode(self, prompt: Sequence[int], tokens: Sequence[int]) -> str:
        """Return the text of the tokens generated after a prompt: a reply or a continuation."""
        return (
            decode(self.tokenizer, tokens) if self.is_dialogue else decode_continuation(self.tokenizer, prompt, tokens)
        )

    def with_weight_layout(self, layout: WeightLayout) -> "TextGenerator":
        """Return the same model with its parameters prepared for decoding."""
        model = for_inference(self.model)
        return self._replace(model=model, params=to_decode_params(self.params, model, layout))

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end a continuation or a reply."""
        return self.tokenizer.stop_ids


def generate_text(generator: TextGenerator, prompts: Sequence[Sequence[int]], sampling: SamplingConfig) -> list[str]:
    """Return the text generated after each prompt (of tokens), as one batch."""
    options = _generate_options(generator, sampling)
    outputs = generate(generator.params, prompts, generator.model, **options)
    return [generator.decode(prompt, tokens) for prompt, tokens in zip(prompts, outputs, strict=True)]


class Ending(NamedTuple):
    """The end of a generated text: its tokens, why it ends, and a warning if the context is full."""

    tokens: list[int]
    finish_reason: FinishReason
    warning: str | None = None


def stream_text(
    generator: TextGenerator,
    prompt: Sequence[int],
    sampling: SamplingConfig,
    on_end: Callable[[Ending], object] = lambda _: None,
) -> Iterator[str]:
    """Yield the text that `generate_text` returns for one prompt in pieces, each as soon as it is final.

    `on_end` is called when generation ends.
    """
    options = _generate_options(generator, sampling) | {"tokens_per_call": STREAM_TOKENS_PER_CALL}
    shown = ""
    for [tokens], [finish_reason] in stream_tokens(generator.params, [prompt], generator.model, **options):
        is_last = finish_reason is not None
        text = generator.decode(prompt, tokens) if is_last else _stable_prefix(generator, prompt, tokens)
        if text.startswith(shown):
            yield text[len(shown) :]
            shown = text
        if finish_reason is not None:
            warning = (
                f"The text ends after {len(tokens)} of {sampling.max_tokens} tokens because the model's context of "
                f"{generator.model.context_length} is full; use --config.sampling.past_context=slide to continue."
            )
            on_end(Ending(list(tokens), finish_reason, warning if finish_reason == "context" else None))


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
