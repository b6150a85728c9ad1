"""The user's cache folder for token stores and compiled programs. Runs share it, and it may be deleted at any time."""

import os
import re
from pathlib import Path

from rustgpt_jax.errors import UserError, short_repr

FOLDER, LIMIT = "RUSTGPT_JAX_CACHE", "RUSTGPT_JAX_CACHE_BYTES"
# Remedy shown to the user when the folder is not writable.
REMEDY = f"{FOLDER}=DIR moves the cache."
# Default size limit for compiled programs.
MAX_BYTES = 4 * 1024**3
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(?:i?b)?|b)?", re.IGNORECASE | re.ASCII)


def cache_folder() -> Path:
    """Return $RUSTGPT_JAX_CACHE, or rustgpt_jax in the user's cache folder ($XDG_CACHE_HOME or ~/.cache)."""
    if configured := os.environ.get(FOLDER):
        return Path(configured)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rustgpt_jax"


def cache_limit() -> int:
    """Return the size limit for compiled programs, in bytes.

    Reads $RUSTGPT_JAX_CACHE_BYTES, for example 4294967296, 4G or 1.5 GiB.

    Raises:
        UserError: The variable is not a valid size.
    """
    text = os.environ.get(LIMIT, "").strip()
    if not text:
        return MAX_BYTES
    match = SIZE.fullmatch(text)
    if match is None:
        raise UserError(f"{LIMIT}={short_repr(text)} is not a size; use a value such as 4G, 500M or 4294967296.")
    number, unit = match.groups()
    return int(float(number) * 1024 ** (" kmgt".index((unit or " ").lower())))
