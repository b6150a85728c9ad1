"""Parts by name: an entry of a table, or anything that can be imported, as 'my_lab.mixers:Retention'."""

import importlib
from collections.abc import Mapping
from typing import Any, TypeVar

from rustgpt_jax.errors import UserError, suggestion

Part = TypeVar("Part")


def choose(table: Mapping[str, Part], name: str, what: str) -> Part:
    """The part that `table` holds under `name`, or that stands at the import path `name`.

    Raises UserError naming the valid names and the nearest one.
    """
    if ":" in name:
        return imported(name, what)
    if name not in table:
        raise UserError(f"{what}: there is no {name!r}.{suggestion(name, table)}")
    return table[name]


def imported(path: str, what: str) -> Any:
    """What stands at an import path, 'package.module:name'. Raises UserError for a module or a name that is not there.

    A mistake inside the module keeps its traceback.
    """
    module_name, _, name = path.partition(":")
    if "" in module_name.split("."):
        raise UserError(f"{what}={path!r} is no import path; one looks like my_lab.mixers:Retention.")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise UserError(
            f"{what}={path!r}: there is no module {error.name!r} here. Parts are looked for in the current folder and "
            "among the installed packages."
        ) from None
    if not hasattr(module, name):
        names = [known for known in vars(module) if not known.startswith("_")]
        raise UserError(f"{what}={path!r}: {module.__name__} has no {name!r}.{suggestion(name, names)}")
    return getattr(module, name)
