"""The dialect of a model from elsewhere: which of its tokens mark off documents, and its chat template."""

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from rustgpt_jax.data.corpora import Turn
from rustgpt_jax.errors import UserError


@dataclass(frozen=True)
class Dialect:
    """What a model has learned of its special tokens.

    end: the token that ends a text. stops: tokens that end a text or a reply, `end` among them. chat_template: how a
    dialogue is written, in Jinja, or None for a model that has learned none. named: special tokens by the names that
    the template has for them, such as bos_token.
    """

    end: str
    stops: tuple[str, ...]
    chat_template: str | None
    named: Mapping[str, str]


def rendered(dialect: Dialect, turns: Sequence[Turn], *, is_asking: bool, special_tokens: Sequence[str]) -> str:
    """A dialogue as the model's chat template writes it; `is_asking` ends it where the model is to answer.

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
    try:
        template = _compiled(dialect.chat_template)
        return template.render(messages=messages, add_generation_prompt=is_asking, **dialect.named)
    except jinja2.TemplateError as error:
        raise UserError(f"The model's chat template does not take this dialogue: {error}.") from None


class _Generation(jinja2.ext.Extension):
    """{% generation %} and {% endgeneration %}, around the assistant's words in some templates: the body as it is."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@cache
def _compiled(source: str) -> jinja2.Template:
    # The environment of Hugging Face's templates: sandboxed, with blocks that leave no blank lines.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
