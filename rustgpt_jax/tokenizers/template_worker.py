"""A process that renders untrusted chat templates with limits on time, memory and output.

It runs as a script and imports nothing from the project. Each input line is a JSON request, and each output line is the
response. A request that exceeds the time limit terminates the process by SIGPROF.
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
    """The {% generation %} ... {% endgeneration %} block around assistant text: renders its body unchanged.

    Variables set inside the block are local to it.
    """

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


class _Dictionary:
    """Replacement for `dict` in templates that gives no access to the type."""

    def __call__(self, *args: Any, **entries: Any) -> dict[Any, Any]:
        return dict(*args, **entries)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _Namespace(jinja2.utils.Namespace):
    """Replacement for `namespace` in templates: variables that outlive a loop, with no leading underscores."""

    def __init__(self, /, *args: Any, **variables: Any) -> None:
        super().__init__()
        for name, value in dict(*args, **variables).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.sandbox.SecurityError(f"{name!r} is not a valid name of a namespace variable")
        super().__setitem__(name, value)


@lru_cache(16)
def _compile(source: str) -> jinja2.Template:
    # Same environment as in transformers: sandboxed, and block tags leave no blank lines.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["dict"] = _Dictionary()
    environment.globals["namespace"] = _Namespace
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.datetime.now().strftime(pattern)
    return environment.from_string(source)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _respond(request: Mapping[str, Any]) -> str:
    try:
        chunks: list[str] = []
        n_characters = 0
        for chunk in _compile(request["template"]).generate(**request["variables"]):
            n_characters += len(chunk)
            if n_characters > request["characters"]:
                raise OverflowError(f"it writes more than {request['characters']} characters")
            chunks.append(chunk)
        return json.dumps({"text": "".join(chunks)})
    except MemoryError:
        return json.dumps({"error": "it needs too much memory"})
    except Exception as error:  # Templates are programs and can raise anything.
        return json.dumps({"error": str(error)[:1000] or type(error).__name__})


def main(n_bytes: int) -> None:
    """Respond to requests until the input ends, using at most `n_bytes` of memory."""
    # Ctrl-C is handled by the parent.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (n_bytes if hard == resource.RLIM_INFINITY else min(n_bytes, hard), hard))
    for line in sys.stdin.buffer:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])
        response = _respond(request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(response + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]))
