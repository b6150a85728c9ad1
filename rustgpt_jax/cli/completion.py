"""Shell completion of verbs, flags, recipes, run folders and config fields, by argcomplete.

    eval "$(register-python-argcomplete rustgpt)"

switches it on in bash and zsh; the shell then runs the program with $_ARGCOMPLETE set.
"""

import argparse
import os
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NoReturn

from rustgpt_jax.cli.arguments import VerbParser

# Set by the shell functions of argcomplete.
REQUEST = "_ARGCOMPLETE"


def complete(parser: argparse.ArgumentParser, verbs: Mapping[str, VerbParser], reading_overrides: set[str]) -> None:
    """Answer the shell's request for completions, if there is one, and end the process.

    Args:
        parser: The parser of the command line.
        verbs: The parsers of the verbs by name.
        reading_overrides: The names of the verbs that read `--config.x.y=VALUE`.
    """
    if REQUEST not in os.environ:
        return
    import argcomplete

    words = os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])].split()
    for name, verb in verbs.items():
        # An incomplete command line is no error.
        verb.error = _ignore_error  # type: ignore[method-assign]
        for action in verb._actions:
            action.completer = _find_completer(action)  # type: ignore[attr-defined]
        if name in words and name in reading_overrides and words[-1].startswith("--config."):
            _add_config_fields(verb)
    parser.error = _ignore_error  # type: ignore[method-assign]
    argcomplete.autocomplete(parser, always_complete_options="long")


def _ignore_error(message: str) -> NoReturn:
    raise SystemExit(2)


def _find_completer(action: argparse.Action) -> Any:
    """Return the completer of an argument: for config files and folders, or the alternatives of its metavar."""
    from argcomplete.completers import DirectoriesCompleter, FilesCompleter

    metavar = str(action.metavar)
    if action.dest in ("config", "config_or_run"):
        return _complete_config
    if metavar in ("RUN", "DIR", "FOLDER"):
        return DirectoriesCompleter()
    if "FILE" in metavar:
        return FilesCompleter()
    alternatives = [word for word in metavar.split("|") if word.islower()] if "|" in metavar else []
    return partial(_return_values, action.choices or alternatives)


def _return_values(values: Iterable[str], **_: Any) -> Iterable[str]:
    return values


def _complete_config(prefix: str, **_: Any) -> list[str]:
    from argcomplete.completers import FilesCompleter

    from rustgpt_jax.config.config_files import list_recipes

    return [*list_recipes(), *FilesCompleter(("py",))(prefix)]


def _add_config_fields(verb: VerbParser) -> None:
    """Add a flag for each field of the config, with the values that it can have."""
    from rustgpt_jax.config.schema import FIELDS

    for path, field in FIELDS.items():
        values = ("True", "False") if field.type is bool else field.metadata.get("choices", ())
        action = verb.add_argument(f"--config.{path}", help=field.metadata["doc"].replace("%", "%%"))
        action.completer = partial(_return_values, values)  # type: ignore[attr-defined]
