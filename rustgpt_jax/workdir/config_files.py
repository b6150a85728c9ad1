"""Load configs and sweeps from Python files, and configs from run folders."""

import os
import runpy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from rustgpt_jax.config import schema
from rustgpt_jax.config.schema import FIELDS, to_dict
from rustgpt_jax.config.validation import flatten_tree
from rustgpt_jax.errors import UserError, suggest_names
from rustgpt_jax.workdir.run_dir import is_special, load_config, load_origins

# The values of a config, and the origin of each of them, by dotted path.
ValuesAndOrigins = tuple[dict[str, Any], dict[str, str]]
# The origin of a value set on the command line.
COMMAND_LINE = "command line"


def load_config_file(file: str) -> ValuesAndOrigins:
    """Load the config defined by a Python file. The origin of a default value is "base".

    Raises:
        UserError: The file does not exist or fails, or it does not define a config.
    """
    return flatten_config(_call_get_config(file), file)


def flatten_config(tree: Any, source: str) -> ValuesAndOrigins:
    """Return the values of a config by dotted path, and their origins: `source`, or "base" for a default value."""
    values, defaults = dict(flatten_tree(tree)), dict(flatten_tree(schema.defaults()))
    return values, {path: "base" if values.get(path) == defaults.get(path) else source for path in FIELDS}


def load_run_config(path: Path) -> ValuesAndOrigins:
    """Load the config of a run. Raises UserError as `load_config` does."""
    return dict(flatten_tree(to_dict(load_config(path)))), load_origins(path)


def load_sweep_function(file: str, name: str) -> Callable[[], Any]:
    """Return a config file's sweep function: sweep() for the name 'sweep', else sweep_NAME().

    Raises:
        UserError: The file does not define it.
    """
    functions = {key: value for key, value in _run_config_file(file).items() if key.split("_")[0] == "sweep"}
    names = [key.removeprefix("sweep_") for key, value in functions.items() if callable(value)]
    if not names:
        raise UserError(
            f"{file} has no sweep(), a function that yields overrides. See experiments/learning_rate.py for an example."
        )
    if name not in names:
        raise UserError(f"--sweep: {file} has no sweep {name!r}.{suggest_names(name, names)}")
    return functions["sweep" if name == "sweep" else f"sweep_{name}"]


@cache
def _run_config_file(file: str) -> dict[str, Any]:
    """Execute a config file and return the names that it defines."""
    path = Path(file)
    if is_special(path):
        raise UserError(f"{file} cannot be read as a config: it is a pipe, a device or a socket, not a file.")
    if not path.is_file():
        beside = [str(path.with_name(other.name)) for other in path.parent.glob("*.py")]
        raise UserError(f"The config file {file} does not exist.{suggest_names(file, beside)}")
    try:
        if not os.access(path, os.R_OK):
            raise UserError(f"{file} cannot be read: Permission denied.")
        return runpy.run_path(file)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{file} cannot be read as a config: {type(error).__name__}: {error}.") from error


def _call_get_config(file: str) -> Any:
    """Return the result of a config file's get_config(). Raises UserError as `load_config_file` does."""
    names = _run_config_file(file)
    try:
        tree = names["get_config"]()
        if not hasattr(tree, "items"):
            raise UserError(f"{file} cannot be read as a config: get_config() returns {tree!r}, not a ConfigDict.")
        # A tree of a custom class may raise when it is read.
        list(flatten_tree(tree))
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        what = "it has no get_config()" if "get_config" not in names else f"{type(error).__name__}: {error}"
        raise UserError(f"{file} cannot be read as a config: {what}.") from error
    return tree
