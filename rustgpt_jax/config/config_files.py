"""Config files: find the recipes that ship with the package, and load the configs and sweeps of Python files."""

import os
import runpy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import rustgpt_jax
from rustgpt_jax.atomic_io import is_special
from rustgpt_jax.config import schema
from rustgpt_jax.config.schema import FIELDS
from rustgpt_jax.config.validation import flatten_tree
from rustgpt_jax.errors import UserError, program_name, suggest_names

# The values of a config, and the origin of each of them, by dotted path.
ValuesAndOrigins = tuple[dict[str, Any], dict[str, str]]
# The origin of a value set on the command line.
COMMAND_LINE = "command line"
# The folders of recipes. An installed package contains them; in a checkout they are beside the package.
RECIPE_FOLDERS = ("configs", "experiments")


# Recipes.


@cache
def list_recipes() -> dict[str, Path]:
    """Return the file of each recipe that ships with the package, by the recipe's name."""
    package = Path(rustgpt_jax.__file__).parent
    root = package if (package / RECIPE_FOLDERS[0]).is_dir() else package.parent
    return {file.stem: file for folder in RECIPE_FOLDERS for file in sorted((root / folder).glob("*.py"))}


def load_config(config: str | Path) -> ConfigDict:
    """Load a config as a `ConfigDict`, which can be changed and passed to `resolve`.

    Config files can build on a recipe with it:

        from rustgpt_jax import load_config

        def get_config():
            config = load_config("tiny")
            config.optimizer.learning_rate = 3e-3
            return config

    Args:
        config: The name of a recipe that ships with the package, such as "tiny", or the path of a Python file that
            defines `get_config()`.

    Raises:
        UserError: There is no such file or recipe, or the file fails or does not define a config.
    """
    tree = _call_get_config(str(config), _run_file(str(config)))
    return tree if isinstance(tree, ConfigDict) else ConfigDict(tree)


def find_config_file(config: str) -> Path:
    """Return the file of a config, which is given by its path or by the name of a recipe.

    Raises:
        UserError: There is no such file or recipe.
    """
    path, recipes = Path(config), list_recipes()
    if config in recipes:
        return recipes[config]
    if is_special(path):
        raise UserError(f"{config} cannot be read as a config: it is a pipe, a device or a socket, not a file.")
    if path.is_file():
        return path
    if path.name == config and path.suffix != ".py":
        hint = suggest_names(config, recipes) or f" `{program_name()} configs` lists the recipes."
        raise UserError(f"There is no recipe {config!r}, and no file of that name.{hint}")
    beside = [str(path.with_name(other.name)) for other in path.parent.glob("*.py")]
    hint = suggest_names(config, beside)
    if not hint and path.stem in recipes:
        hint = f" Did you mean the recipe {path.stem!r}?"
    raise UserError(f"The config file {config} does not exist.{hint}")


# Config files.


def load_config_file(config: str) -> ValuesAndOrigins:
    """Load the config of a recipe or of a Python file. The origin of a default value is "base".

    Raises:
        UserError: As `load_config`.
    """
    return flatten_config(_call_get_config(config, _run_file_once(config)), config)


def flatten_config(tree: Any, source: str) -> ValuesAndOrigins:
    """Return the values of a config by dotted path, and their origins: `source`, or "base" for a default value."""
    values, defaults = dict(flatten_tree(tree)), dict(flatten_tree(schema.defaults()))
    return values, {path: "base" if values.get(path) == defaults.get(path) else source for path in FIELDS}


def load_sweep_function(config: str, name: str) -> Callable[[], Any]:
    """Return a config file's sweep function: sweep() for the name 'sweep', else sweep_NAME().

    Raises:
        UserError: The file does not define it.
    """
    functions = {key: value for key, value in _run_file_once(config).items() if key.split("_")[0] == "sweep"}
    names = [key.removeprefix("sweep_") for key, value in functions.items() if callable(value)]
    if not names:
        example = list_recipes().get("learning_rate")
        hint = f" See {example} for an example." if example else ""
        raise UserError(f"{config} has no sweep(), a function that yields overrides.{hint}")
    if name not in names:
        raise UserError(f"--sweep: {config} has no sweep {name!r}.{suggest_names(name, names)}")
    return functions["sweep" if name == "sweep" else f"sweep_{name}"]


def _run_file(config: str) -> dict[str, Any]:
    """Execute a config file and return the names that it defines."""
    file = find_config_file(config)
    try:
        if not os.access(file, os.R_OK):
            raise UserError(f"{config} cannot be read: Permission denied.")
        return runpy.run_path(str(file))
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        hint = ""
        # Files of a checkout can import the recipes beside them.
        if isinstance(error, ModuleNotFoundError) and error.name in RECIPE_FOLDERS:
            hint = " Recipes are loaded by name: rustgpt_jax.load_config('tiny')."
        raise UserError(f"{config} cannot be read as a config: {type(error).__name__}: {error}.{hint}") from error


# A command reads the config and the sweep of the same file.
_run_file_once = cache(_run_file)


def _call_get_config(config: str, names: dict[str, Any]) -> Any:
    """Return the result of get_config() among the names that a config file defines."""
    try:
        tree = names["get_config"]()
        if not hasattr(tree, "items"):
            raise UserError(f"{config} cannot be read as a config: get_config() returns {tree!r}, not a ConfigDict.")
        # A tree of a custom class may raise when it is read.
        list(flatten_tree(tree))
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        what = "it has no get_config()" if "get_config" not in names else f"{type(error).__name__}: {error}"
        raise UserError(f"{config} cannot be read as a config: {what}.") from error
    return tree
