"""Shared by all tests: small configs, random parameters, separate cache folders, and quick compilation."""

import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

# For this process and for those that tests start. JAX reads it when it is first imported.
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"

import hypothesis
import numpy as np
import pytest
from ml_collections import ConfigDict
from slurm_fixture import slurm as slurm

from configs import base
from rustgpt_jax.config.schema import Config, ModelConfig
from rustgpt_jax.config.validation import resolve

# The first example of a property may compile a program.
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")

SMALL = {
    "data.valid_fraction": 0.2,
    "model.vocab_size": 61,
    "model.context_length": 32,
    "model.n_layers": 2,
    "model.d_model": 32,
    "model.attention.n_heads": 4,
    "schedule.warmup_steps": 2,
    "training.steps": 8,
    "training.batch_size": 4,
    "training.steps_per_jit_call": 4,
    "logging.log_every": 2,
    "logging.eval_every": 4,
    "logging.checkpoint_every": 4,
    "sampling.max_tokens": 8,
}


def small_tree(**changes: Any) -> ConfigDict:
    """Return a small version of base.py with changes by dotted path: `small_tree(**{"model.n_layers": 4})`."""
    tree = base.get_config()
    with tree.ignore_type():
        tree.update_from_flattened_dict(SMALL | changes)
    return tree


def small_config(**changes: Any) -> Config:
    """Return the resolved config of `small_tree`."""
    return resolve(small_tree(**changes))


def other_value(value: Any) -> Any:
    """Return another value of the same type; it need not be valid."""
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case str():
            return value + "2"
        case tuple():
            return (*value, "another")
        case _:
            return 1


def random_params(model: ModelConfig, seed: int = 0) -> Any:
    """Return parameters of which none is 0 or 1, so that each one matters, and activations are of order 1."""
    import jax

    from rustgpt_jax.model.flops import parameter_shapes

    rng = np.random.default_rng(seed)

    def fill(path: Any, leaf: Any) -> np.ndarray:
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        match path[-1].key:
            case "kernel":
                return noise / leaf.shape[-2] ** 0.5
            case "scale":
                return 1 + 0.2 * noise
            case _:
                return 0.5 * noise

    return jax.tree_util.tree_map_with_path(fill, parameter_shapes(model))


@pytest.fixture(scope="session", autouse=True)
def cache_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep token stores and compiled programs in a folder of the session, not in the user's cache.

    $JAX_COMPILATION_CACHE_DIR, where it is set, keeps compiled programs from one session to the next.
    """
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUSTGPT_JAX_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def quick_codegen(quick_compilation: None) -> Iterator[None]:
    """Compile the programs of a module in about a sixth of the time, also without XLA's fusion emitters.

    Use this only in modules that compare with a tolerance, or the bits of one program: two programs may round the
    same sum differently.
    """
    import jax
    from jax._src import compiler

    before = compiler.get_compile_options
    # Later versions have no such option.
    if version("jaxlib").startswith("0.10."):

        def get_compile_options(*args: Any, env_options_overrides: dict[str, Any] | None = None, **kwargs: Any) -> Any:
            overrides = (env_options_overrides or {}) | {"xla_cpu_use_fusion_emitters": False}
            return before(*args, env_options_overrides=overrides, **kwargs)

        compiler.get_compile_options = get_compile_options
    yield
    compiler.get_compile_options = before
    # Otherwise another module could reuse these programs.
    jax.clear_caches()


@pytest.fixture(scope="module")
def quick_compilation() -> Iterator[None]:
    """Compile the programs of a module in about half the time; they run slower."""
    import jax

    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
