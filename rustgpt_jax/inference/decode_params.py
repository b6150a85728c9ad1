"""The form of a model's parameters in which they are read fastest, token by token: made once, not for each token.

Trained parameters are float32 and stacked over layers. Here each layer has arrays of its own, so that a loop over
tokens copies none of them; matrices have the type in which they are multiplied, or a narrower one; and their weights
lie in the order in which few rows read them. Norms, biases and tables of embeddings stay as they are.
"""

from functools import partial
from typing import Any, NamedTuple

import jax

from rustgpt_jax.config.schema import ModelConfig, SamplingConfig
from rustgpt_jax.model import transformer
from rustgpt_jax.model.block import layer_groups, linear_layers
from rustgpt_jax.model.quantized_weights import UpcastWeight, round_weights, to_row_major
from rustgpt_jax.native import matvec
from rustgpt_jax.pytrees import format_path


class WeightLayout(NamedTuple):
    """weights, kernel: as in `config.sampling`, the kernel one that is there. platform: where the weights are read."""

    weights: str | None
    kernel: str
    platform: str


def weight_layout(sampling: SamplingConfig) -> WeightLayout:
    """The form that a config asks for on the device at hand.

    The first native kernel of a machine is compiled here. Where there can be none, that is said once, on standard
    error, and the plain one is used.
    """
    platform = jax.default_backend()
    is_native = sampling.matmul_impl == "native" and platform == "cpu" and matvec.ffi_target() is not None
    return WeightLayout(sampling.weight_dtype, "native" if is_native else "plain", platform)


def for_decoding(params: transformer.Params, model: ModelConfig, layout: WeightLayout) -> transformer.Params:
    """Trained parameters in the form for decoding, which `transformer.apply` takes in their place.

    Parameters that lie on several devices stay where they are, stacked: if the weights are to be narrower, they are
    rounded so.
    """
    if not jax.sharding.get_abstract_mesh().empty or any(_is_shared(leaf) for leaf in jax.tree.leaves(params)):
        return params if layout.weights is None else _rounded(params, model=model, weights=layout.weights)
    return _for_decoding(params, model=model, layout=layout)


def _is_shared(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1


@partial(jax.jit, static_argnames=("model", "weights"))
def _rounded(params: transformer.Params, *, model: ModelConfig, weights: str) -> transformer.Params:
    """Parameters as they are trained, with the matrices of linear layers, and the head, rounded to narrower weights."""

    def of_stack(stack: ModelConfig, of_stack: transformer.Params) -> transformer.Params:
        layers = linear_layers(stack)
        narrow = jax.vmap(partial(round_weights, dtype=weights))
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: narrow(leaf) if format_path(path) in layers else leaf, of_stack
        )

    blocks = {
        str(index): of_stack(stack.block, params["blocks"][str(index)])
        for index, stack in enumerate(layer_groups(model))
    }
    return params | {"blocks": blocks, "head": {"kernel": round_weights(_head(params, model), weights)}}


@partial(jax.jit, static_argnames=("model", "layout"))
def _for_decoding(params: transformer.Params, *, model: ModelConfig, layout: WeightLayout) -> transformer.Params:
    blocks = {}
    for index, stack in enumerate(layer_groups(model)):
        of_stack = params["blocks"][str(index)]
        rows = [jax.tree.map(lambda leaf, row=row: leaf[row], of_stack) for row in range(len(stack.layers))]
        blocks[str(index)] = [_layer(row, stack.block, layout) for row in rows]
    head = {"kernel": _matrix(_head(params, model), model.logits_dtype or model.dtype, layout)}
    return params | {"blocks": blocks, "head": head}


def _head(params: transformer.Params, model: ModelConfig) -> jax.Array:
    """kernel_DV of the logits."""
    return params["embedding"]["table"].T if model.tie_embeddings else params["head"]["kernel"]


def _layer(params: transformer.Params, block: ModelConfig, layout: WeightLayout) -> transformer.Params:
    """The parameters of one layer, with the matrices of its linear layers in the form for decoding."""
    layers = linear_layers(block)

    def with_layout(path: Any, leaf: jax.Array) -> Any:
        layer = layers.get(format_path(path))
        if layer is None:
            return leaf
        if layer.matmul_dtype == "float8":
            # Its scales are found in float32.
            return leaf if layout.weights is None else _matrix(leaf, layer.dtype, layout)
        return _matrix(leaf, layer.matmul_dtype or layer.dtype, layout)

    return jax.tree_util.tree_map_with_path(with_layout, params)


def _matrix(kernel: jax.Array, operands: str, layout: WeightLayout) -> Any:
    """A kernel (inputs, outputs), otherwise multiplied in the type `operands`, in the form for decoding."""
    dtype = layout.weights or operands
    if dtype not in matvec.TYPES:
        return kernel
    if layout.kernel == "native" or (layout.platform != "cpu" and dtype == "int8"):
        return to_row_major(kernel, dtype, layout.kernel)
    if layout.platform != "cpu" or dtype == "float32":
        return kernel.astype(dtype)
    return UpcastWeight(round_weights(kernel, dtype), dtype)
