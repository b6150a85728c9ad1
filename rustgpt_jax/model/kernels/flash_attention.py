"""Flash attention kernels of third-party libraries, for GPUs and TPUs.

They support neither vmap nor automatic partitioning; this module adds both. If each row is one document, the kernels
use their built-in causal masking instead of a mask array.
"""

import importlib
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import PartitionSpec

from rustgpt_jax.model.activation_sharding import partition_spec
from rustgpt_jax.model.kernels import AttentionInputs, AttentionSpec, Device, current_device, fold_vmap
from rustgpt_jax.model.kv_cache import attention_mask, first_visible_key

# A function of q_BTHC, k_BSKC, v_BSKC and, if rows are packed, first_key_BT, that returns mixed_BTHC.
Attend = Callable[..., jax.Array]


def call_sharded_kernel(attend: Attend, inputs: AttentionInputs) -> jax.Array:
    """Call a library's kernel; on a mesh, each device calls it for its own rows and heads."""

    def grouped(q_BTHC: jax.Array, k_BSKC: jax.Array, *arrays: jax.Array) -> jax.Array:
        mixed_BTHC = call_batchable_kernel(attend, q_BTHC, k_BSKC, *arrays)
        return mixed_BTHC.reshape(*mixed_BTHC.shape[:2], k_BSKC.shape[2], -1, mixed_BTHC.shape[-1])

    first_key_BT = inputs.first_keys_if_packed()
    arrays = (inputs.q_BTHC, inputs.k_BSKC, inputs.v_BSKC, *(() if first_key_BT is None else (first_key_BT,)))
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return grouped(*arrays)
    rows, _, heads, _ = partition_spec("B.K.", inputs.k_BSKC.shape, dict(mesh.shape))
    spec = PartitionSpec(rows, None, heads)
    in_specs = (spec, spec, spec, PartitionSpec(rows))[: len(arrays)]
    return jax.shard_map(grouped, in_specs=in_specs, out_specs=spec, check_vma=False)(*arrays)


def call_batchable_kernel(attend: Attend, *arrays: jax.Array) -> jax.Array:
    """Call a kernel that JAX cannot batch. Under `jax.vmap`, the new axis is folded into the rows, in both passes.

    `custom_vmap` cannot be differentiated, so the two passes are separate functions. They share only the arrays that
    the kernel saves, all of which have the rows as their first axis.
    """

    def attend_vjp(*arrays: jax.Array) -> tuple[jax.Array, Any]:
        return jax.vjp(lambda *qkv: attend(*qkv, *arrays[3:]), *arrays[:3])

    def attend_fwd(*arrays: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        mixed_BTHC, pullback = attend_vjp(*arrays)
        return mixed_BTHC, jax.tree.leaves(pullback)

    def attend_bwd_rows(grad_BTHC: jax.Array, *saved: jax.Array) -> tuple[jax.Array, ...]:
        # A pullback is a program for a fixed number of rows. Trace it for the folded rows, and fill in the saved
        # arrays.
        shapes = [jax.ShapeDtypeStruct((len(grad_BTHC), *x.shape[1:]), x.dtype) for x in arrays]
        _, pullback = jax.eval_shape(attend_vjp, *shapes)
        return jax.tree.unflatten(jax.tree.structure(pullback), saved)(grad_BTHC)

    def attend_bwd(saved: list[jax.Array], grad_BTHC: jax.Array) -> tuple[jax.Array | None, ...]:
        return *fold_vmap(attend_bwd_rows)(grad_BTHC, *saved), *[None] * len(arrays[3:])

    call = jax.custom_vjp(fold_vmap(attend))
    call.defvjp(fold_vmap(attend_fwd), attend_bwd)
    return call(*arrays)


# Flash attention of cuDNN (arXiv 2307.08691), for NVIDIA GPUs in bfloat16.
#
# Documents are passed as a mask B x T x S in the dtype of the activations, without heads. cuDNN also computes the
# gradient of the mask; both take 1/H of the memory of the scores. cuDNN would save the mask for the backward pass of
# each layer, which therefore repeats the forward pass. The backward pass accumulates in no fixed order unless XLA is
# set to be deterministic (`--xla_gpu_deterministic_ops=true` in XLA_FLAGS).

AMPERE, HOPPER = (8, 0), (9, 0)


def cudnn(inputs: AttentionInputs) -> jax.Array:
    """Return mixed_BTKGC, computed by cuDNN."""

    def attend(q_BTHC: jax.Array, k_BSKC: jax.Array, v_BSKC: jax.Array, **limits: Any) -> jax.Array:
        return jax.nn.dot_product_attention(
            q_BTHC, k_BSKC, v_BSKC, scale=inputs.scale, is_causal=True, implementation="cudnn", **limits
        )

    @jax.checkpoint
    def attend_packed(q_BTHC: jax.Array, k_BSKC: jax.Array, v_BSKC: jax.Array, first_key_BT: jax.Array) -> jax.Array:
        # A window cannot be given with a mask. is_causal repeats part of it, so that cuDNN skips later tokens.
        order_T = jnp.arange(q_BTHC.shape[1])
        mask_BTS = attention_mask(order_T, order_T, first_key_BT, inputs.window)
        return attend(q_BTHC, k_BSKC, v_BSKC, mask=mask_BTS[:, None])

    if inputs.packed:
        return call_sharded_kernel(attend_packed, inputs)
    window = None if inputs.window is None else (inputs.window - 1, 0)
    return call_sharded_kernel(partial(attend, local_window_size=window), inputs)


def cudnn_unsupported_reason(spec: AttentionSpec) -> str | None:
    """Return why cuDNN does not support a spec; None if it does."""
    platform, capability = spec.device
    widest = 128 if capability and capability < HOPPER else 256
    head = spec.head_width
    reasons = {
        f"it needs an NVIDIA GPU, and this is a {platform}": platform not in (None, "gpu"),
        "it needs a GPU of compute capability 8.0 or more": capability is not None and capability < AMPERE,
        **_reasons_of_libraries(spec),
        "it does not support a soft-cap of scores": spec.softcap,
        f"it supports heads of 8, 16, ... {widest} channels, not {head}": head % 8 != 0 or head > widest,
        f"it needs an even number of tokens, not {spec.length}": spec.length % 2 != 0,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _reasons_of_libraries(spec: AttentionSpec) -> dict[str, bool]:
    """Return the limitations of both cuDNN and tokamax as called here, and whether each applies to a spec."""
    return {
        "it does not read a cache": spec.cached,
        f"it computes in bfloat16, not in {spec.dtype}": spec.dtype != "bfloat16",
        "it does not support a positional bias": spec.bias,
        "it does not support attention sinks": spec.sinks,
        "it does not support dropout of attention weights": spec.dropout,
        "it needs keys and values of the same width": spec.head_width != spec.value_width,
    }


# Flash attention of the library tokamax (`pip install 'rustgpt_jax[kernels]'`).
#
# On GPUs it takes the first key of each query, so packed documents need no mask; only its Triton kernel builds one in
# the backward pass. Its kernel for TPUs, splash attention, takes the mask of one row, so rows are computed
# sequentially there, which costs nothing on a TPU core.

# Tokens in the smallest block of splash attention.
LANES = 128


def is_mosaic_gpu(device: Device) -> bool:
    """Return whether tokamax has a Mosaic kernel for a GPU: for Hopper and data-center Blackwell GPUs."""
    return device.capability is not None and HOPPER <= device.capability < (11, 0)


def takes_first_keys(spec: AttentionSpec) -> bool:
    """Return whether rows are packed and a kernel of tokamax takes the first key of each query instead of a mask."""
    return spec.packed and is_mosaic_gpu(spec.device) and spec.head_width in range(8, 129, 8)


def tokamax(inputs: AttentionInputs) -> jax.Array:
    """Return mixed_BTKGC, computed by tokamax."""
    # The public function has no argument for the first key of each query.
    library = importlib.import_module("tokamax._src.ops.attention.api")
    if not flags.FLAGS.is_parsed():  # Otherwise tokamax would parse the command line of this program.
        flags.FLAGS.mark_as_parsed()
    device = current_device()
    is_tpu, is_only_causal = device.platform != "gpu", not inputs.packed and inputs.window is None
    name = "mosaic_tpu" if is_tpu else "mosaic_gpu" if is_mosaic_gpu(device) else "triton"

    def make_mask(q_BTHC: jax.Array, first_key_BT: jax.Array | None) -> Any:
        order_T = jnp.arange(q_BTHC.shape[1])
        if is_only_causal:
            return library.base.Mask(is_causal=True)
        if is_tpu:
            return library.base.Mask(attention_mask(order_T, order_T, first_key_BT, inputs.window)[:, None])
        first_BT = jnp.broadcast_to(first_visible_key(order_T, first_key_BT, inputs.window), q_BTHC.shape[:2])
        return library.base.Mask(k_start=first_BT[:, None], is_causal=True)

    def attend(
        q_BTHC: jax.Array, k_BSKC: jax.Array, v_BSKC: jax.Array, first_key_BT: jax.Array | None = None
    ) -> jax.Array:
        mask = make_mask(q_BTHC, first_key_BT)
        return library.IMPLEMENTATIONS[name](q_BTHC, k_BSKC, v_BSKC, mask=mask, logits_scale=inputs.scale)

    @jax.checkpoint
    def attend_row_by_row(*arrays: jax.Array) -> jax.Array:
        return jax.lax.map(lambda row: attend(*(x[None] for x in row))[0], arrays)

    return call_sharded_kernel(attend_row_by_row if is_tpu and not is_only_causal else attend, inputs)


def tokamax_unsupported_reason(spec: AttentionSpec) -> str | None:
    """Return why tokamax does not support a spec; None if it does."""
    platform, capability = spec.device
    reasons = {
        f"it has flash attention for TPUs and NVIDIA GPUs, and this is a {platform}": platform is not None
        and platform not in ("tpu", "gpu"),
        "it needs a GPU of compute capability 8.0 or more": capability is not None and capability < AMPERE,
        "it is not installed: pip install 'rustgpt_jax[kernels]'": platform is not None
        and find_spec("tokamax") is None,
        **_reasons_of_libraries(spec),
        # Here, the cap is an argument of the program, so that one program serves every value.
        "its soft-cap is a constant of the program": spec.softcap,
        f"it needs a multiple of {LANES} tokens, not {spec.length}": spec.length % LANES != 0,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)
