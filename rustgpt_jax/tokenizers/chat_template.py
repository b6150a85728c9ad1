"""The dialect of a model from elsewhere: which of its tokens mark off documents, and its chat template."""

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rustgpt_jax.errors import UserError, short_repr
from rustgpt_jax.tokenizers.messages import Turn

# Limits of one rendering of a chat template: CPU seconds, output characters, and bytes of memory.
MOST_SECONDS = 5.0
MOST_CHARACTERS = 2**24
MOST_BYTES = 2**30


@dataclass(frozen=True)
class ChatFormat:
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
                raise TypeError(f"{short_repr(text)} is no text")
            # Half of a surrogate pair, which JSON can say, is none either.
            text.encode()


def rendered(dialect: ChatFormat, turns: Sequence[Turn], *, is_asking: bool, special_tokens: Sequence[str]) -> str:
    """Render a dialogue with the model's chat template; `is_asking` adds the prompt for an answer.

    Raises:
        UserError: As for `renderings`.
    """
    return renderings(dialect, turns, [(len(turns), is_asking)], special_tokens)[0]


def renderings(
    dialect: ChatFormat, turns: Sequence[Turn], wanted: Sequence[tuple[int, bool]], special_tokens: Sequence[str]
) -> list[str]:
    """Render prefixes of a dialogue with the model's chat template.

    Args:
        dialect: The dialect, which has the template.
        turns: The dialogue.
        wanted: For each rendering, the number of turns and whether to add the prompt for an answer.
        special_tokens: Tokens that no turn may contain.

    Raises:
        UserError: There is no template, the template rejects the dialogue, or a turn contains a special token, which
            would be parsed as one.
    """
    if dialect.chat_template is None:
        raise UserError("The model has no chat template: it continues text, and takes no dialogue.")
    for turn in turns:
        found = next((token for token in special_tokens if token in turn.text), None)
        if found:
            raise UserError(f"The text contains {found}, which is a special token of the model.")
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    fixed = {"tools": None, "documents": None, **dialect.named}
    return [
        _RENDERER.render(dialect.chat_template, {"messages": messages[:count], "add_generation_prompt": asks, **fixed})
        for count, asks in wanted
    ]


def turn_end(dialect: ChatFormat, special_tokens: Sequence[str]) -> str | None:
    """Return the special token that ends assistant turns in the chat template, or None."""
    question, answer = "q7e2", "a9d4"
    turns = (Turn("user", question), Turn("assistant", answer), Turn("user", question))
    try:
        text = rendered(dialect, turns, is_asking=False, special_tokens=special_tokens)
    except UserError:
        return None
    after = text.partition(answer)[2].partition(question)[0]
    found = [(after.index(token), -len(token), token) for token in special_tokens if token in after]
    return min(found)[2] if found else None


class _Renderer:
    """Renders templates in a child process, which is started on demand and restarted if it has ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._lock = threading.Lock()

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        """Render a chat template.

        Raises:
            UserError: The template fails or exceeds the limits.
        """
        limits = {"seconds": MOST_SECONDS, "characters": MOST_CHARACTERS}
        request = json.dumps({"template": template, "variables": variables, **limits}).encode() + b"\n"
        with self._lock:
            line = self._ask(request)
        answer = json.loads(line)
        if "error" in answer:
            raise UserError(f"The model's chat template rejects this dialogue: {answer['error']}.")
        return answer["text"]

    def _ask(self, request: bytes) -> bytes:
        process = self._running()
        assert process.stdin and process.stdout
        try:
            process.stdin.write(request)
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = b""
        except BaseException:
            # A late answer would be taken for that of the next request.
            self.end()
            raise
        if line.endswith(b"\n"):
            return line
        status = process.wait()
        self.end()
        limit = (
            f"it runs for more than {MOST_SECONDS:g} s"
            if status == -signal.SIGPROF
            else f"its process ended ({status})"
        )
        raise UserError(f"The model's chat template rejects this dialogue: {limit}.")

    def _running(self) -> "subprocess.Popen[bytes]":
        # After a fork, the process belongs to the parent.
        if self._process is None or self._owner != os.getpid():
            script = Path(__file__).with_name("template_worker.py")
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(script), str(MOST_BYTES)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            self._owner = os.getpid()
        return self._process

    def end(self) -> None:
        """Terminate the process if it is running."""
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._process.communicate()
        self._process = None


_RENDERER = _Renderer()
atexit.register(_RENDERER.end)
