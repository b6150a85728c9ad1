"""Fingerprints of compiled programs, and the autotuning cache of a run.

XLA selects GPU kernels by timing them, so two compilations of one program may give different bits. A run keeps these
selections in its folder; with them it is compiled in the same way again.
"""

import hashlib
import os
import re
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from rustgpt_jax.atomic_io import write_atomically
from rustgpt_jax.cache_dir import cache_folder
from rustgpt_jax.jax_internals import record_cache_keys
from rustgpt_jax.workdir.environment import DRIVER
from rustgpt_jax.workdir.run_dir import RunDir

DUMP, LOAD = "--xla_gpu_dump_autotune_results_to=", "--xla_gpu_load_autotune_results_from="
MODULE_NAME = re.compile(r"^module @(?P<name>\w+)", re.MULTILINE)

# The cache keys of the programs that this process has compiled, by the hash of the program.
_keys: dict[str, str] = {}


class Program(NamedTuple):
    """SHA-256 of a program's StableHLO, without names of files and lines, and its key in JAX's persistent cache.

    The key is None if that cache is turned off.
    """

    stablehlo: str
    cache_key: str | None


def call_and_fingerprint(function: Any, *arguments: Any) -> tuple[Any, Program]:
    """Call a jitted function for the first time, and fingerprint its program. It is traced once.

    Returns:
        The function's result, and its program.
    """
    lowered = function.lower(*arguments).as_text()
    stablehlo = hashlib.sha256(lowered.encode()).hexdigest()
    with record_cache_keys() as keys:
        result = function(*arguments)
    module = MODULE_NAME.search(lowered)
    own_keys = [key for key in keys if module and key.startswith(f"{module['name']}-")]
    if own_keys:
        _keys[stablehlo] = own_keys[-1]
    return result, Program(stablehlo, _keys.get(stablehlo))


# What a GPU's compiler chose.


def enable_autotune_cache(run: RunDir) -> None:
    """Have XLA write what it chooses by timing for a run, and choose as before where it has.

    To be called before JAX is used: XLA reads its flags once. Flags that the user has set stay as they are. The names
    of the files are part of the keys of JAX's cache, so that each run compiles its programs itself once: a program that
    comes out of the cache makes no choices that could be written down.
    """
    if _may_choose():
        dumped = _dumped(run)
        dumped.parent.mkdir(parents=True, exist_ok=True)
        _add_flags(f"{DUMP}{dumped}", *_loading(run))


def load_autotuning(run: RunDir) -> None:
    """Have XLA choose as it did for a run, and write nothing: for what makes steps of the run again.

    To be called before JAX is used. Trials of sweeps have no choices kept: one process chooses for many of them.
    """
    if _may_choose():
        _add_flags(*_loading(run))


def save_autotune_cache(run: RunDir) -> None:
    """Keep in a run's folder what XLA has chosen by now, if it has."""
    dumped = _dumped(run)
    if f"{DUMP}{dumped}" in os.environ.get("XLA_FLAGS", "").split() and dumped.exists():
        write_atomically(run.autotune_file, _compiler() + dumped.read_text())


def _may_choose() -> bool:
    """Whether there is a GPU, and the user has said nothing of its choices."""
    given = os.environ.get("XLA_FLAGS", "")
    return DRIVER.exists() and DUMP not in given and LOAD not in given


def _loading(run: RunDir) -> list[str]:
    is_known = run.autotune_file.exists() and run.autotune_file.read_text().startswith(_compiler())
    return [f"{LOAD}{run.autotune_file.absolute()}"] if is_known else []


def _add_flags(*flags: str) -> None:
    if flags:
        os.environ["XLA_FLAGS"] = " ".join([*os.environ.get("XLA_FLAGS", "").split(), *flags])


def _dumped(run: RunDir) -> Path:
    """Where XLA writes, anew at each compilation. Beside JAX's cache, so that what has programs has their choices."""
    place = hashlib.sha256(str(run.path.absolute()).encode()).hexdigest()[:16]
    # By the suffix XLA writes text.
    return (cache_folder() / "autotune" / f"{place}.textproto").absolute()


def _compiler() -> str:
    """The first line of a file of choices: XLA refuses those of another version of itself."""
    return f"# jaxlib {metadata.version('jaxlib')}\n"
