"""Flash attention by the library tokamax (`pip install 'rustgpt_jax[kernels]'`), which is written for TPUs above all.

On a TPU its kernel, splash attention, takes the mask of one row: rows are computed one after another, as a core of a
TPU does anyway.
"""

import importlib
from importlib.util import find_spec

import jax
from absl import flags

from rustgpt_jax.model.kernels.accelerator import by_library
from rustgpt_jax.model.kernels.types import Kernel, Request, Task, device_at_hand

# By platform, those of tokamax's implementations that are flash attention, the first that can be used first.
IMPLEMENTATIONS = {"tpu": ("mosaic",), "gpu": ("mosaic", "triton")}
# Tokens in the smallest block of splash attention.
LANES = 128


def tokamax(task: Task) -> jax.Array:
    """mixed_BTKGC of a task."""
    library = importlib.import_module("tokamax")
    if not flags.FLAGS.is_parsed():  # It would read the command line of whatever program this is.
        flags.FLAGS.mark_as_parsed()
    platform = device_at_hand().platform
    implementation = IMPLEMENTATIONS[str(platform)]

    def rows(q_BTHC: jax.Array, k_BSKC: jax.Array, v_BSKC: jax.Array, mask_BTS: jax.Array) -> jax.Array:
        masks = mask_BTS[:, None]
        return library.dot_product_attention(
            q_BTHC, k_BSKC, v_BSKC, mask=masks, scale=task.scale, implementation=implementation
        )

    def row_by_row(*arrays: jax.Array) -> jax.Array:
        return jax.lax.map(lambda row: rows(*(x[None] for x in row))[0], arrays)

    return by_library("tokamax", rows if platform == "gpu" else row_by_row, task)


def refuses(request: Request) -> str | None:
    """Why tokamax cannot serve a request; None if it can."""
    platform = request.device.platform
    reasons = {
        f"it has flash attention for TPUs and NVIDIA GPUs, and this is a {platform}": platform is not None
        and platform not in IMPLEMENTATIONS,
        "it is not installed: pip install 'rustgpt_jax[kernels]'": platform is not None
        and find_spec("tokamax") is None,
        "it reads no cache": request.cached,
        f"it is used in bfloat16, not in {request.dtype}": request.dtype != "bfloat16",
        # Here the cap is an argument of the program, so that one program serves every cap.
        "its soft-cap is a constant of the program": request.softcap,
        "it is given no bias of distances": request.bias,
        "it has no learned sinks": request.sinks,
        "it is given no dropout of attention": request.dropout,
        "its keys and values are equally wide": request.head_width != request.value_width,
        f"it needs a multiple of {LANES} tokens, not {request.length}": request.length % LANES != 0,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


TOKAMAX = Kernel(tokamax, refuses)
