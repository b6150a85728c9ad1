"""A process that renders chat templates, which are programs of strangers, within limits of time, memory and output.

It is started as a script, and imports nothing of the project. Each line of its input is a request in JSON, each line of
its output the answer. A request that takes too long ends the process by SIGPROF, wherever it is.
"""

import datetime
import json
import resource
import signal
import sys
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils


class _Generation(jinja2.ext.Extension):
    """{% generation %} and {% endgeneration %}, around the assistant's words in some templates: the body as it is.

    Variables set inside end with it.
    """

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


class _Dictionary:
    """`dict` in templates, which makes dictionaries and gives no way to the type."""

    def __call__(self, *args: Any, **entries: Any) -> dict[Any, Any]:
        return dict(*args, **entries)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _Namespace(jinja2.utils.Namespace):
    """`namespace` in templates: variables that outlive a loop, none of which begins with an underscore."""

    def __init__(self, /, *args: Any, **variables: Any) -> None:
        super().__init__()
        for name, value in dict(*args, **variables).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.sandbox.SecurityError(f"{name!r} is no name for a variable of a namespace")
        super().__setitem__(name, value)


@lru_cache(16)
def _compiled(source: str) -> jinja2.Template:
    # The environment of Hugging Face's templates: sandboxed, with blocks that leave no blank lines.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["dict"] = _Dictionary()
    environment.globals["namespace"] = _Namespace
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _rendered(template: str, variables: Mapping[str, Any], characters: int) -> str:
    pieces: list[str] = []
    length = 0
    for piece in _compiled(template).generate(**variables):
        length += len(piece)
        if length > characters:
            raise OverflowError(f"it writes more than {characters} characters")
        pieces.append(piece)
    return "".join(pieces)


def _answer(request: Mapping[str, Any]) -> str:
    try:
        text = _rendered(request["template"], request["variables"], request["characters"])
        return json.dumps({"text": text})
    except MemoryError:
        return json.dumps({"error": "it needs too much memory"})
    except Exception as error:  # A template is a program, and may fail in any way.
        return json.dumps({"error": str(error)[:1000] or type(error).__name__})


def main(n_bytes: int) -> None:
    """Answer requests until the input ends, with at most `n_bytes` of memory."""
    # Ctrl-C is for the process that asks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (n_bytes if hard == resource.RLIM_INFINITY else min(n_bytes, hard), hard))
    for line in sys.stdin.buffer:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])
        answer = _answer(request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(answer + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]))
