"""A functional JAX framework for research on decoder-only language models: a run is a pure function of its config."""

import importlib
from typing import Any

# The modules of the Python API, imported on first use, so that the command line starts without importing JAX. Type
# checkers read __init__.pyi, which lists the same names.
_API = ("apply", "decode", "encode", "generate", "load", "load_data", "read_metrics", "resolve", "sweep", "train")
_MODULES = {"load_config": "rustgpt_jax.config.config_files", **dict.fromkeys(_API, "rustgpt_jax.api")}


def __getattr__(name: str) -> Any:
    """Return a function of the Python API."""
    if name not in _MODULES:
        raise AttributeError(f"module 'rustgpt_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
