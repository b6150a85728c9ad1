"""Where a config comes from: a Python file with get_config(), or a run; and the sweeps that a file defines."""

import os
import runpy
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from rustgpt_jax.config.schema import FIELDS, to_dict
from rustgpt_jax.config.validation import flatten_tree, override_all, parse_all
from rustgpt_jax.errors import UserError, suggestion
from rustgpt_jax.workdir.run_dir import is_special, load_config, load_origins

# A config, and where each of its values came from.
Recipe = tuple[Any, dict[str, str]]
# Knobs and their values as they are written on a command line, in the order given.
Overrides = Sequence[tuple[str, str]]
# The origin of a value set on the command line.
COMMAND_LINE = "command line"


def read_recipe(file: str, base: Path, overrides: Overrides) -> Recipe:
    """The config of a file, whose other values come from the file `base`, with the command line's overrides.

    Raises UserError for a file that is not there or fails, and for a knob or a value that cannot be.
    """
    tree = _load(file)
    defaults, given = dict(flatten_tree(_load(str(base)))), dict(flatten_tree(tree))
    origins = {path: "base" if given.get(path) == defaults.get(path) else file for path in FIELDS}
    return _overridden(tree, origins, overrides)


def recipe_of_run(path: Path, overrides: Overrides) -> Recipe:
    """The config of a run with the command line's overrides. Raises UserError as `load_config` does."""
    return _overridden(ConfigDict(to_dict(load_config(path))), load_origins(path), overrides)


def _overridden(tree: Any, origins: dict[str, str], overrides: Overrides) -> Recipe:
    values = parse_all(overrides)
    override_all(tree, values)
    return tree, origins | dict.fromkeys(values, COMMAND_LINE)


def sweep_function(file: str, name: str) -> Callable[[], Any]:
    """A sweep that a config file defines: its function sweep() for 'sweep', else sweep_NAME().

    Raises UserError if there is none of that name.
    """
    functions = {key: value for key, value in _namespace(file).items() if key.split("_")[0] == "sweep"}
    names = [key.removeprefix("sweep_") for key, value in functions.items() if callable(value)]
    if not names:
        raise UserError(
            f"{file} has no sweep(): a function that yields overrides, as experiments/learning_rate.py has."
        )
    if name not in names:
        raise UserError(f"--sweep: {file} has no sweep {name!r}.{suggestion(name, names)}")
    return functions["sweep" if name == "sweep" else f"sweep_{name}"]


@cache
def _namespace(file: str) -> dict[str, Any]:
    """What a config file defines."""
    path = Path(file)
    if is_special(path):
        raise UserError(f"{file} cannot be read as a config: it is a pipe, a device or a socket, not a file.")
    if not path.is_file():
        beside = [str(path.with_name(other.name)) for other in path.parent.glob("*.py")]
        raise UserError(f"There is no config file {file}.{suggestion(file, beside)}")
    try:
        if not os.access(path, os.R_OK):
            raise UserError(f"{file} cannot be read: Permission denied.")
        return runpy.run_path(file)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{file} cannot be read as a config: {type(error).__name__}: {error}.") from error


def _load(file: str) -> Any:
    """Run a config file's get_config()."""
    names = _namespace(file)
    try:
        tree = names["get_config"]()
        if not hasattr(tree, "items"):
            raise UserError(f"{file} cannot be read as a config: get_config() gives {tree!r}, not a ConfigDict.")
        # A tree of a custom class may raise when it is read.
        list(flatten_tree(tree))
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        what = "it has no get_config()" if "get_config" not in names else f"{type(error).__name__}: {error}"
        raise UserError(f"{file} cannot be read as a config: {what}.") from error
    return tree
