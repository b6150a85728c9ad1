"""What a run computes, by name: the fingerprint of a compiled program, its key in JAX's cache, a GPU's choices for it.

XLA chooses between kernels for a GPU by timing them, so that two compilations of one program may give other bits. The
choices of a run are kept in its folder, and with them it is compiled the same again.
"""

import hashlib
import logging
import os
import re
import threading
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from rustgpt_jax.atomic_io import write_atomically
from rustgpt_jax.cache_dir import cache_folder
from rustgpt_jax.workdir.environment import DRIVER
from rustgpt_jax.workdir.run_dir import RunDir

DUMP, LOAD = "--xla_gpu_dump_autotune_results_to=", "--xla_gpu_load_autotune_results_from="
# Where JAX says which key of its cache it looks for, and found or not.
COMPILER = logging.getLogger("jax._src.compiler")
SAID = re.compile(r"with key '?(?P<key>\w+-[0-9a-f]+)")
NAMED = re.compile(r"^module @(?P<name>\w+)", re.MULTILINE)

# The keys that this process has seen, by their programs: it compiles each once.
_keys: dict[str, str] = {}
# The keys that JAX has named on this thread since the last look.
_said = threading.local()


class Program(NamedTuple):
    """SHA-256 of a program's StableHLO, without names of files and lines, and its key in JAX's persistent cache.

    The key is None where that cache is turned off, or where JAX does not say it.
    """

    stablehlo: str
    cache_key: str | None


def observed(function: Any, *arguments: Any) -> tuple[Any, Program]:
    """Call a jitted function for the first time. Its result, and the program that was run.

    It is lowered here, and the call compiles what was lowered: nothing is traced twice.
    """
    lowered = function.lower(*arguments).as_text()
    stablehlo = hashlib.sha256(lowered.encode()).hexdigest()
    _listen()
    _said.keys = []
    result = function(*arguments)
    module = NAMED.search(lowered)
    own = [key for key in _said.keys if module and key.startswith(f"{module['name']}-")]
    if own:
        _keys[stablehlo] = own[-1]
    return result, Program(stablehlo, _keys.get(stablehlo))


@cache
def _listen() -> None:
    """Hear from now on what JAX's compiler says of the keys of its cache. Its log shows no more than before."""
    shown = COMPILER.getEffectiveLevel()

    def hear(record: logging.LogRecord) -> bool:
        match = SAID.search(record.getMessage())
        if match:
            _said.keys = [*getattr(_said, "keys", []), match["key"]]
        return record.levelno >= shown

    COMPILER.addFilter(hear)
    COMPILER.setLevel(logging.DEBUG)


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
