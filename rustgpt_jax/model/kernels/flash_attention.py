"""Flash attention kernels of third-party libraries, for GPUs and TPUs.

They take an explicit mask, and support neither vmap nor automatic partitioning.
"""

import importlib
from collections.abc import Callable
from importlib.util import find_spec

import jax
from absl import flags
from jax.sharding import PartitionSpec

from rustgpt_jax.errors import UserError
from rustgpt_jax.model.activation_sharding import partition_spec
from rustgpt_jax.model.kernels import AttentionInputs, AttentionSpec, current_device
from rustgpt_jax.model.kv_cache import causal_mask

# A function of q_BTHC, k_BSKC, v_BSKC, mask_BTS that returns mixed_BTHC.
Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def call_sharded_kernel(name: str, attend: Attend, inputs: AttentionInputs) -> jax.Array:
    """Call a library's kernel; on a mesh, each device calls it for its own rows and heads.

    Raises:
        UserError: The program is batched by `jax.vmap`.
    """

    def grouped(q_BTHC: jax.Array, k_BSKC: jax.Array, v_BSKC: jax.Array, mask_BTS: jax.Array) -> jax.Array:
        mixed_BTHC = attend(q_BTHC, k_BSKC, v_BSKC, mask_BTS)
        return mixed_BTHC.reshape(*mixed_BTHC.shape[:2], k_BSKC.shape[2], -1, mixed_BTHC.shape[-1])

    arrays = (inputs.q_BTHC, inputs.k_BSKC, inputs.v_BSKC)
    mask_BTS = _forbid_vmap(name, causal_mask(inputs.block_inputs, inputs.window), *arrays)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return grouped(*arrays, mask_BTS)
    rows, _, heads, _ = partition_spec("B.K.", inputs.k_BSKC.shape, dict(mesh.shape))
    spec = PartitionSpec(rows, None, heads)
    in_specs = (spec, spec, spec, PartitionSpec(rows))
    return jax.shard_map(grouped, in_specs=in_specs, out_specs=spec, check_vma=False)(*arrays, mask_BTS)


def _forbid_vmap(name: str, mask_BTS: jax.Array, *arrays: jax.Array) -> jax.Array:
    """Return the mask, and raise UserError if the program is batched over it or any of the arrays.

    JAX's batching rule for cuDNN would misread the batch axis of the mask as heads, and splash attention takes one
    mask at a time.
    """

    @jax.custom_batching.custom_vmap
    def guarded(mask_BTS: jax.Array, *arrays: jax.Array) -> jax.Array:
        return mask_BTS

    @guarded.def_vmap
    def refuse(*_: object) -> tuple[jax.Array, bool]:
        raise UserError(
            f"config.model.attention.kernel: {name} cannot train several runs in one program (vmap); portable can."
        )

    return guarded(mask_BTS, *(jax.lax.stop_gradient(array) for array in arrays))


# Flash attention of cuDNN (arXiv 2307.08691), for NVIDIA GPUs in bfloat16.
#
# Documents are passed as a mask B x T x S in the dtype of the activations, without heads. cuDNN also computes the
# gradient of the mask; both take 1/H of the memory of the scores. The backward pass accumulates in no fixed order
# unless XLA is set to be deterministic (`--xla_gpu_deterministic_ops=true` in XLA_FLAGS).

AMPERE, HOPPER = (8, 0), (9, 0)


def cudnn(inputs: AttentionInputs) -> jax.Array:
    """Return mixed_BTKGC, computed by cuDNN."""

    def attend(q_BTHC: jax.Array, k_BSKC: jax.Array, v_BSKC: jax.Array, mask_BTS: jax.Array) -> jax.Array:
        # is_causal repeats part of the mask, so that cuDNN skips later tokens. A window cannot be given with a mask.
        return jax.nn.dot_product_attention(
            q_BTHC,
            k_BSKC,
            v_BSKC,
            mask=mask_BTS[:, None],
            scale=inputs.scale,
            is_causal=True,
            implementation="cudnn",
        )

    return call_sharded_kernel("cudnn", attend, inputs)


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


# Flash attention of the library tokamax (`pip install 'rustgpt_jax[kernels]'`), mainly for TPUs.
#
# Its kernel for TPUs, splash attention, takes the mask of one row, so rows are computed sequentially, which costs
# nothing on a TPU core.

# tokamax's implementations of flash attention by platform, in order of preference.
IMPLEMENTATIONS = {"tpu": ("mosaic",), "gpu": ("mosaic", "triton")}
# Tokens in the smallest block of splash attention.
LANES = 128


def tokamax(inputs: AttentionInputs) -> jax.Array:
    """Return mixed_BTKGC, computed by tokamax."""
    library = importlib.import_module("tokamax")
    if not flags.FLAGS.is_parsed():  # Otherwise tokamax would parse the command line of this program.
        flags.FLAGS.mark_as_parsed()
    platform = current_device().platform
    implementation = IMPLEMENTATIONS[str(platform)]

    def attend(q_BTHC: jax.Array, k_BSKC: jax.Array, v_BSKC: jax.Array, mask_BTS: jax.Array) -> jax.Array:
        masks = mask_BTS[:, None]
        return library.dot_product_attention(
            q_BTHC, k_BSKC, v_BSKC, mask=masks, scale=inputs.scale, implementation=implementation
        )

    def attend_row_by_row(*arrays: jax.Array) -> jax.Array:
        return jax.lax.map(lambda row: attend(*(x[None] for x in row))[0], arrays)

    return call_sharded_kernel("tokamax", attend if platform == "gpu" else attend_row_by_row, inputs)


def tokamax_unsupported_reason(spec: AttentionSpec) -> str | None:
    """Return why tokamax does not support a spec; None if it does."""
    platform = spec.device.platform
    reasons = {
        f"it has flash attention for TPUs and NVIDIA GPUs, and this is a {platform}": platform is not None
        and platform not in IMPLEMENTATIONS,
        "it is not installed: pip install 'rustgpt_jax[kernels]'": platform is not None
        and find_spec("tokamax") is None,
        **_reasons_of_libraries(spec),
        # Here, the cap is an argument of the program, so that one program serves every value.
        "its soft-cap is a constant of the program": spec.softcap,
        f"it needs a multiple of {LANES} tokens, not {spec.length}": spec.length % LANES != 0,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)
