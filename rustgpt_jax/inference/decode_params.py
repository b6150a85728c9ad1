"""Parameters for decoding, converted once instead of for every token.

Trained parameters are float32 and stacked over layers. Here each layer has its own arrays, so the loop over tokens
copies none of them; matrices have the dtype in which they are multiplied, or a narrower one, and the layout that is
fastest for few rows. Norms, biases and embedding tables are unchanged.
"""

from functools import partial
from typing import Any, NamedTuple

import jax

from rustgpt_jax.config.schema import ModelConfig, SamplingConfig
from rustgpt_jax.model import transformer
from rustgpt_jax.model.block import layer_groups, linear_layers
from rustgpt_jax.model.kernels import matvec
from rustgpt_jax.model.matmul import UpcastWeight, round_weights, to_row_major
from rustgpt_jax.pytrees import format_path


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
