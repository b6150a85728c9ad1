"""A functional JAX framework for research on decoder-only language models: a run is a pure function of its config."""

import importlib
from typing import Any

# The Python API, imported on first use, so that the command line starts without importing JAX.
_API = ("apply", "decode", "encode", "generate", "load", "load_data", "read_metrics", "resolve", "sweep", "train")


def __getattr__(name: str) -> Any:
    """Return a function of the Python API."""
    if name in _API:
        return getattr(importlib.import_module("rustgpt_jax.api"), name)
    raise AttributeError(f"module 'rustgpt_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_API})
