"""Which kernel computes attention."""

import sys
from typing import NamedTuple

from rustgpt_jax.errors import UserError
from rustgpt_jax.model.kernels.accelerator import CUDNN, TOKAMAX
from rustgpt_jax.model.kernels.portable import BLOCKWISE, PLAIN, TRIANGULAR
from rustgpt_jax.model.kernels.types import ANY_DEVICE, AttentionSpec, Device, Kernel, current_device

KERNELS: dict[str, Kernel] = {
    "plain": PLAIN,
    "triangular": TRIANGULAR,
    "blockwise": BLOCKWISE,
    "cudnn": CUDNN,
    "tokamax": TOKAMAX,
}
# From so many tokens on, the scores of one head of one row take 16 MiB in float32: memory, and the time to read and
# write it, are then mostly theirs.
LONG = 2048
# Of fewer tokens, a CPU computes all scores as soon as those that are seen.
SHORT = 128
# What auto tries first, by platform, for rows of so many tokens.
FASTEST = {
    "cpu": ("triangular", range(SHORT, LONG)),
    "gpu": ("cudnn", range(sys.maxsize)),
    "tpu": ("tokamax", range(sys.maxsize)),
}
# These are the same on every device.
EVERYWHERE = ("plain", "portable", "triangular", "blockwise")


class KernelChoice(NamedTuple):
    """A kernel by its name in KERNELS, and why it was chosen, in words that follow 'because'."""

    kernel: str
    reason: str


def device_for(name: str, cached: bool) -> Device:
    """The device to choose for; where that does not matter, none is started to be asked."""
    return ANY_DEVICE if cached or name in EVERYWHERE else current_device()


def select_kernel(name: str, request: AttentionSpec) -> KernelChoice:
    """The kernel that serves a request where config.model.attention_kernel is `name`.

    auto: the fastest of the platform where it serves the request; then, like portable, blockwise for long rows, and
    plain for all others. Cached tokens are always served by plain. Raises UserError for a kernel asked for by name that
    refuses.
    """
    if request.cached:
        return KernelChoice("plain", "tokens are cached")
    if name not in ("auto", "portable"):
        if (reason := KERNELS[name].unsupported_reason(request)) is not None:
            raise UserError(
                f"config.model.attention_kernel={name!r} cannot be used here: {reason}. auto chooses one that can."
            )
        return KernelChoice(name, "the config names it")
    refusals = []
    fastest, lengths = FASTEST.get(request.device.platform or "", ("", range(0)))
    if name == "auto" and request.length in lengths:
        if (reason := KERNELS[fastest].unsupported_reason(request)) is None:
            return KernelChoice(fastest, f"this is a {request.device.platform}")
        refusals.append(f"{fastest} cannot be used: {reason}")
    if request.length >= LONG:
        if (reason := BLOCKWISE.unsupported_reason(request)) is None:
            return KernelChoice("blockwise", "; ".join([*refusals, f"rows have {LONG} tokens or more"]))
        refusals.append(f"blockwise cannot be used: {reason}")
    return KernelChoice("plain", "; ".join(refusals) or f"rows have less than {LONG} tokens")
