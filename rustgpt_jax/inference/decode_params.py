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
from rustgpt_jax.model.layer_groups import stacks
from rustgpt_jax.model.matrices import linear_layers
from rustgpt_jax.model.quantized_weights import UpcastWeight, rounded, to_row_major
from rustgpt_jax.native import matvec
from rustgpt_jax.pytrees import path_name


class Form(NamedTuple):
    """weights, kernel: as in `config.sampling`, the kernel one that is there. platform: where the weights are read."""

    weights: str | None
    kernel: str
    platform: str


def form(sampling: SamplingConfig) -> Form:
    """The form that a config asks for on the device at hand.

    The first native kernel of a machine is compiled here. Where there can be none, that is said once, on standard
    error, and the plain one is used.
    """
    platform = jax.default_backend()
    is_native = sampling.matmul_impl == "native" and platform == "cpu" and matvec.target() is not None
    return Form(sampling.weight_dtype, "native" if is_native else "plain", platform)


def for_decoding(params: transformer.Params, model: ModelConfig, form: Form) -> transformer.Params:
    """Trained parameters in the form for decoding, which `transformer.apply` takes in their place.

    Parameters that lie on several devices stay where they are, stacked: if the weights are to be narrower, they are
    rounded so.
    """
    if not jax.sharding.get_abstract_mesh().empty or any(_is_shared(leaf) for leaf in jax.tree.leaves(params)):
        return params if form.weights is None else _rounded(params, model=model, weights=form.weights)
    return _for_decoding(params, model=model, form=form)


def _is_shared(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1


@partial(jax.jit, static_argnames=("model", "weights"))
def _rounded(params: transformer.Params, *, model: ModelConfig, weights: str) -> transformer.Params:
    """Parameters as they are trained, with the matrices of linear layers, and the head, rounded to narrower weights."""

    def of_stack(stack: ModelConfig, of_stack: transformer.Params) -> transformer.Params:
        layers = linear_layers(stack)
        narrow = jax.vmap(partial(rounded, dtype=weights))
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: narrow(leaf) if path_name(path) in layers else leaf, of_stack
        )

    blocks = {
        str(index): of_stack(stack.block, params["blocks"][str(index)]) for index, stack in enumerate(stacks(model))
    }
    return params | {"blocks": blocks, "head": {"kernel": rounded(_head(params, model), weights)}}


@partial(jax.jit, static_argnames=("model", "form"))
def _for_decoding(params: transformer.Params, *, model: ModelConfig, form: Form) -> transformer.Params:
    blocks = {}
    for index, stack in enumerate(stacks(model)):
        of_stack = params["blocks"][str(index)]
        rows = [jax.tree.map(lambda leaf, row=row: leaf[row], of_stack) for row in range(len(stack.layers))]
        blocks[str(index)] = [_layer(row, stack.block, form) for row in rows]
    head = {"kernel": _matrix(_head(params, model), model.logits_dtype or model.dtype, form)}
    return params | {"blocks": blocks, "head": head}


def _head(params: transformer.Params, model: ModelConfig) -> jax.Array:
    """kernel_DV of the logits."""
    return params["embedding"]["table"].T if model.tie_embeddings else params["head"]["kernel"]


def _layer(params: transformer.Params, block: ModelConfig, form: Form) -> transformer.Params:
    """The parameters of one layer, with the matrices of its linear layers in the form for decoding."""
    layers = linear_layers(block)

    def shard_activations(path: Any, leaf: jax.Array) -> Any:
        layer = layers.get(path_name(path))
        if layer is None:
            return leaf
        if layer.matmul_dtype == "float8":
            # Its scales are found in float32.
            return leaf if form.weights is None else _matrix(leaf, layer.dtype, form)
        return _matrix(leaf, layer.matmul_dtype or layer.dtype, form)

    return jax.tree_util.tree_map_with_path(shard_activations, params)


def _matrix(kernel: jax.Array, operands: str, form: Form) -> Any:
    """A kernel (inputs, outputs), otherwise multiplied in the type `operands`, in the form for decoding."""
    dtype = form.weights or operands
    if dtype not in matvec.TYPES:
        return kernel
    if form.kernel == "native" or (form.platform != "cpu" and dtype == "int8"):
        return to_row_major(kernel, dtype, form.kernel)
    if form.platform != "cpu" or dtype == "float32":
        return kernel.astype(dtype)
    return UpcastWeight(rounded(kernel, dtype), dtype)
