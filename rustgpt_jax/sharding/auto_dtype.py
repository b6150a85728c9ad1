"""The precision that suits a device, for a config that leaves it open: what is chosen is what the run's config says."""

import re
from pathlib import Path
from typing import Any

import jax

from rustgpt_jax.config.validation import override

# What processors call their instructions that multiply numbers in bfloat16.
MULTIPLIES_BFLOAT16 = re.compile(r"\b(avx512_bf16|amx_bf16|bf16)\b")
# What CPUs compute, with such instructions: bfloat16 alone is slower there (docs/performance.md).
ROUNDED_FACTORS = {"model.matmul_dtype": "bfloat16", "model.logits_dtype": "bfloat16"}


def settle(tree: Any, origins: dict[str, str], platform: str | None = None) -> None:
    """Put what suits a platform, or else the device at hand, in the place of model.dtype='auto', here and in origins.

    Other knobs of precision stay as they are where somebody has set them.
    """
    platform = platform or jax.default_backend()
    for path, value in suited(platform).items():
        if path == "model.dtype" or origins.get(path) == "base":
            override(tree, path, value)
            origins[path] = f"auto, for a {platform}"


def suited(platform: str) -> dict[str, str]:
    """Knobs and their values: bfloat16 on accelerators; on CPUs float32, from rounded factors where those are fast."""
    if platform != "cpu":
        return {"model.dtype": "bfloat16"}
    return {"model.dtype": "float32"} | (ROUNDED_FACTORS if MULTIPLIES_BFLOAT16.search(_processor()) else {})


def _processor() -> str:
    """What Linux says of the processor; nothing elsewhere."""
    file = Path("/proc/cpuinfo")
    return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
