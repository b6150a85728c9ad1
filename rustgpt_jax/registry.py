"""Component lookup: by the name in a table, or by an import path such as 'my_lab.mixers:Retention'."""

import importlib
import json
import os
import re
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from rustgpt_jax.errors import UserError, suggest_names

Component = TypeVar("Component")

# An import path in JSON, such as "my_lab.mixers:Retention": the module and the name in it.
IMPORT_PATH = re.compile(r'"([A-Za-z_][\w.]*):([A-Za-z_]\w*)"')
JSON_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')

# Modules named by files of run folders, which may be untrusted, with the first file that names each.
_named_by_files: dict[str, Path] = {}


def lookup(table: Mapping[str, Component], name: str, what: str) -> Component:
    """Return a component of a table, or import it if `name` is an import path.

    Args:
        table: Components by name.
        name: A name in the table, or an import path.
        what: The config field that has this value, for error messages.

    Raises:
        UserError: The name is unknown.
    """
    if ":" in name:
        return import_object(name, what)
    if name not in table:
        raise UserError(f"{what}: unknown {name!r}.{suggest_names(name, table)}")
    return table[name]


def note_import_paths(text: str, file: Path) -> None:
    """Register the modules that a file of a run folder names.

    Such modules are not looked up in the current folder, and their first import is announced on stderr.

    Args:
        text: The file's content, JSON.
        file: The path of the file, for the announcement.
    """
    for string in JSON_STRING.findall(text):
        # Match everything for which `import_object` would import a module, even if the module lacks the name.
        module, colon, _ = json.loads(string).partition(":")
        if colon and all(name.isidentifier() for name in module.split(".")):
            _named_by_files.setdefault(module, file)


def import_object(path: str, what: str) -> Any:
    """Import an object by its path, 'package.module:name'. Errors inside the module propagate with their traceback.

    Raises:
        UserError: The path is malformed, or the module or the name does not exist.
    """
    module_name, _, name = path.partition(":")
    if "" in module_name.split("."):
        raise UserError(f"{what}={path!r} is not an import path, such as my_lab.mixers:Retention.")
    try:
        module = _import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise UserError(
            f"{what}={path!r}: no module named {error.name!r}. {_describe_search_path(error.name)}"
        ) from None
    if not hasattr(module, name):
        names = [known for known in vars(module) if not known.startswith("_")]
        raise UserError(f"{what}={path!r}: {module.__name__} has no {name!r}.{suggest_names(name, names)}")
    return getattr(module, name)


def _import_module(name: str) -> ModuleType:
    """Import a module. If a file of a run folder names it, the current folder is not searched."""
    file = _named_by_files.get(name)
    if file is None or name in sys.modules:
        return importlib.import_module(name)
    with _without_current_folder():
        package = name.partition(".")[0]
        if package not in sys.modules:
            # Finding the spec of a top-level module does not execute it.
            found = PathFinder.find_spec(package)
            if found is not None:
                origin = found.origin or ", ".join(found.submodule_search_locations or ())
                print(f"{file} names a component of the module {name}: importing it from {origin}.", file=sys.stderr)
        return importlib.import_module(name)


@contextmanager
def _without_current_folder() -> Iterator[None]:
    """Remove the current folder from the module search path inside a `with` block, unless the user named it."""
    before = list(sys.path)
    sys.path[:] = search_path()
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = before


def search_path() -> list[str]:
    """Return the entries of `sys.path` for installed packages and folders named by the user.

    Python puts the current folder first for `python -c`, `python -m` and notebooks. It is kept only if PYTHONPATH
    contains it or this package is in it.
    """
    here = os.path.realpath(os.curdir)
    named = {os.path.realpath(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry}
    named.add(os.path.realpath(Path(__file__).parent.parent))
    # Entries after the standard library are installed packages or were appended on purpose.
    standard = sysconfig.get_path("stdlib")
    n_leading = sys.path.index(standard) if standard in sys.path else len(sys.path)
    return [
        entry
        for index, entry in enumerate(sys.path)
        if entry and (index > n_leading or os.path.realpath(entry) != here or here in named)
    ]


def _describe_search_path(module: str) -> str:
    """Describe where a module that was not found was searched for."""
    searched = "The installed packages and the folders in PYTHONPATH and --module_path were searched"
    if PathFinder.find_spec(module.partition(".")[0], [os.curdir]) is None:
        return f"{searched}."
    return f"{searched}, but not the current folder, which has it: use --module_path=. to add it."
