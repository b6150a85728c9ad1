"""Flash attention by cuDNN (arXiv 2307.08691), for NVIDIA GPUs in bfloat16.

Which documents a row holds is known to it as a mask B x T x S in the type of the activations, without heads, whose
gradient it also makes: in memory that is 1/H of the scores. Its backward pass adds up in no fixed order, unless XLA is
told to be deterministic (`--xla_gpu_deterministic_ops=true` in XLA_FLAGS).
"""

import jax

from rustgpt_jax.model.kernels.accelerator import by_library
from rustgpt_jax.model.kernels.types import Kernel, Request, Task

AMPERE, HOPPER = (8, 0), (9, 0)


def cudnn(task: Task) -> jax.Array:
    """mixed_BTKGC of a task."""

    def attend(q_BTHC: jax.Array, k_BSKC: jax.Array, v_BSKC: jax.Array, mask_BTS: jax.Array) -> jax.Array:
        # Causal is said beside the mask, for what lies after a token to be skipped. A window is in the mask alone:
        # cuDNN takes no window beside one.
        return jax.nn.dot_product_attention(
            q_BTHC,
            k_BSKC,
            v_BSKC,
            mask=mask_BTS[:, None],
            scale=task.scale,
            is_causal=True,
            implementation="cudnn",
        )

    return by_library("cudnn", attend, task)


def refuses(request: Request) -> str | None:
    """Why cuDNN cannot serve a request; None if it can."""
    platform, capability = request.device
    widest = 128 if capability and capability < HOPPER else 256
    reasons = {
        f"it needs an NVIDIA GPU, and this is a {platform}": platform not in (None, "gpu"),
        "it needs a GPU of compute capability 8.0 or more": capability is not None and capability < AMPERE,
        "it reads no cache": request.cached,
        f"it computes in bfloat16, not in {request.dtype}": request.dtype != "bfloat16",
        "it has no soft-cap of scores": request.softcap,
        "it is given no bias of distances": request.bias,
        "it has no learned sinks": request.sinks,
        "it is given no dropout of attention": request.dropout,
        "its keys and values are equally wide": request.head_width != request.value_width,
        f"its heads have 8, 16, .. {widest} channels, not {request.head_width}": request.head_width % 8 != 0
        or request.head_width > widest,
        f"it needs an even number of tokens, not {request.length}": request.length % 2 != 0,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


CUDNN = Kernel(cudnn, refuses)
