"""The user's cache folder: token stores and compiled programs, which runs share and may always be deleted."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """$RUSTGPT_JAX_CACHE, or rustgpt_jax in the user's cache folder ($XDG_CACHE_HOME or ~/.cache)."""
    own = os.environ.get("RUSTGPT_JAX_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rustgpt_jax"
