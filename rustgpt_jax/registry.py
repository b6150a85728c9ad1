"""Parts by name: an entry of a table, or anything that can be imported, as 'my_lab.mixers:Retention'."""

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

Part = TypeVar("Part")

# An import path in JSON, such as "my_lab.mixers:Retention": the module and the name in it.
IMPORT_PATH = re.compile(r'"([A-Za-z_][\w.]*):([A-Za-z_]\w*)"')
JSON_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')

# Modules named by files of run folders, which may be untrusted, with the first file that names each.
_named_by_files: dict[str, Path] = {}


def lookup(table: Mapping[str, Part], name: str, what: str) -> Part:
    """The part that `table` holds under `name`, or that stands at the import path `name`.

    Raises UserError naming the valid names and the nearest one.
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
        # Everything that `import_object` would import a module for, whether or not the name is valid there.
        module, colon, _ = json.loads(string).partition(":")
        if colon and all(name.isidentifier() for name in module.split(".")):
            _named_by_files.setdefault(module, file)


def import_object(path: str, what: str) -> Any:
    """What stands at an import path, 'package.module:name'. Raises UserError for a module or a name that is not there.

    A mistake inside the module keeps its traceback.
    """
    module_name, _, name = path.partition(":")
    if "" in module_name.split("."):
        raise UserError(f"{what}={path!r} is no import path; one looks like my_lab.mixers:Retention.")
    try:
        module = _module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        looked = _where_looked_for(error.name)
        raise UserError(f"{what}={path!r}: there is no module {error.name!r} here. {looked}") from None
    if not hasattr(module, name):
        names = [known for known in vars(module) if not known.startswith("_")]
        raise UserError(f"{what}={path!r}: {module.__name__} has no {name!r}.{suggest_names(name, names)}")
    return getattr(module, name)


def _module(name: str) -> ModuleType:
    """Import a module, with the search path that applies to its source."""
    file = _named_by_files.get(name)
    if file is None or name in sys.modules:
        return importlib.import_module(name)
    with _without_current_folder():
        package = name.partition(".")[0]
        if package not in sys.modules:
            # Finding the spec of a top-level module does not execute it.
            found = PathFinder.find_spec(package)
            if found is not None:
                place = found.origin or ", ".join(found.submodule_search_locations or ())
                print(f"{file} names a part of the module {name}: importing it from {place}.", file=sys.stderr)
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
        for place, entry in enumerate(sys.path)
        if entry and (place > n_leading or os.path.realpath(entry) != here or here in named)
    ]


def _where_looked_for(module: str) -> str:
    """Describe the search path of a module that was not found."""
    searched = "It is looked for among the installed packages and in folders that PYTHONPATH or --module_path names"
    if PathFinder.find_spec(module.partition(".")[0], [os.curdir]) is None:
        return f"{searched}."
    return f"{searched}, not in the current folder, which has one: use --module_path=. to add it."
