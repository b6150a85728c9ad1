"""The dialect of a model from elsewhere: which of its tokens mark off documents, and its chat template."""

import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from rustgpt_jax.data.corpora import Turn
from rustgpt_jax.errors import UserError, shown


@dataclass(frozen=True)
class Dialect:
    """What a model has learned of its special tokens.

    end: the token that ends a text. stops: tokens that end a text or a reply, `end` among them. chat_template: how a
    dialogue is written, in Jinja, or None for a model that has learned none. named: special tokens by the names that
    the template has for them, such as bos_token. Raises TypeError and ValueError for what is no text.
    """

    end: str
    stops: tuple[str, ...]
    chat_template: str | None
    named: Mapping[str, str]

    def __post_init__(self) -> None:
        for text in (self.end, *self.stops, self.chat_template or "", *self.named, *self.named.values()):
            if not isinstance(text, str):
                raise TypeError(f"{shown(text)} is no text")
            # Half of a surrogate pair, which JSON can say, is none either.
            text.encode()


def rendered(dialect: Dialect, turns: Sequence[Turn], *, is_asking: bool, special_tokens: Sequence[str]) -> str:
    """A dialogue as the model's chat template writes it; `is_asking` ends it where the model is to answer.

    Raises UserError as `renderings` does.
    """
    return renderings(dialect, turns, [(len(turns), is_asking)], special_tokens)[0]


def renderings(
    dialect: Dialect, turns: Sequence[Turn], wanted: Sequence[tuple[int, bool]], special_tokens: Sequence[str]
) -> list[str]:
    """Beginnings of a dialogue as the model's chat template writes them.

    Args:
        dialect: has the template.
        turns: the dialogue.
        wanted: for each rendering, how many turns it has, and whether it ends where the model is to answer.
        special_tokens: what no turn may contain.

    Raises UserError for a model without a template, a dialogue that the template refuses, and a turn that contains a
    special token: it would be read as one.
    """
    if dialect.chat_template is None:
        raise UserError("The model has no chat template: it continues text, and takes no dialogue.")
    for turn in turns:
        found = next((token for token in special_tokens if token in turn.text), None)
        if found:
            raise UserError(f"The text contains {found}, which is a special token of the model.")
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    absent = {"tools": None, "documents": None}
    try:
        template = _compiled(dialect.chat_template)
        return [
            template.render(messages=messages[:count], add_generation_prompt=is_asking, **absent, **dialect.named)
            for count, is_asking in wanted
        ]
    except Exception as error:  # A template is a program, and may fail in any way.
        reason = str(error) or type(error).__name__
        raise UserError(f"The model's chat template does not take this dialogue: {reason}.") from None


def turn_end(dialect: Dialect, special_tokens: Sequence[str]) -> str | None:
    """The special token that ends the assistant's turns in the chat template, or None if it has none."""
    question, answer = "q7e2", "a9d4"
    turns = (Turn("user", question), Turn("assistant", answer), Turn("user", question))
    try:
        text = rendered(dialect, turns, is_asking=False, special_tokens=special_tokens)
    except UserError:
        return None
    after = text.partition(answer)[2].partition(question)[0]
    found = [(after.index(token), -len(token), token) for token in special_tokens if token in after]
    return min(found)[2] if found else None


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


@cache
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
