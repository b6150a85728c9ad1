"""Documents, the messages they consist of, and the chat templates of imported models."""

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

ROLES = ("system", "user", "assistant")

# Limits for rendering a chat template once.
MAX_CPU_SECONDS = 5.0
MAX_CHARACTERS = 2**24
MAX_MEMORY_BYTES = 2**30


@dataclass(frozen=True)
class Message:
    """A message in a dialogue, with a role in ROLES, or plain text, with role 'text'."""

    role: str
    text: str

    @property
    def is_assistant_target(self) -> bool:
        """True if its tokens are targets when config.data.loss_mask is 'assistant'."""
        return self.role in ("text", "assistant")


@dataclass(frozen=True)
class Document:
    """Plain text (a single message with role 'text') or a dialogue. `name` identifies its source in messages."""

    name: str
    messages: tuple[Message, ...]

    @property
    def text(self) -> str:
        """The concatenated texts of all messages."""
        return "".join(message.text for message in self.messages)

    @property
    def is_dialogue(self) -> bool:
        """True if any message has a role other than 'text'."""
        return any(message.role != "text" for message in self.messages)


def plain_document(name: str, text: str) -> Document:
    """Return a document of plain text."""
    return Document(name, (Message("text", text),))


@dataclass(frozen=True)
class ChatFormat:
    """The special tokens and chat template of an imported model.

    Attributes:
        end_token: The end-of-text token.
        stop_tokens: Tokens that end a continuation or a reply, including `end_token`.
        chat_template: The Jinja template of dialogues; None if the model has none.
        special_tokens_map: Special tokens by the names that the template uses, such as bos_token.

    Raises:
        TypeError: A value is not a string.
        ValueError: A string cannot be encoded in UTF-8, since it contains half of a surrogate pair.
    """

    end_token: str
    stop_tokens: tuple[str, ...]
    chat_template: str | None
    special_tokens_map: Mapping[str, str]

    def __post_init__(self) -> None:
        named = self.special_tokens_map
        for text in (self.end_token, *self.stop_tokens, self.chat_template or "", *named, *named.values()):
            if not isinstance(text, str):
                raise TypeError(f"{short_repr(text)} is not a string")
            text.encode()


def apply_chat_template(
    chat_format: ChatFormat, messages: Sequence[Message], *, add_generation_prompt: bool, special_tokens: Sequence[str]
) -> str:
    """Render a dialogue with the chat template, optionally followed by the prompt for a reply."""
    return render_prefixes(chat_format, messages, [(len(messages), add_generation_prompt)], special_tokens)[0]


def render_prefixes(
    chat_format: ChatFormat,
    messages: Sequence[Message],
    prefixes: Sequence[tuple[int, bool]],
    special_tokens: Sequence[str],
) -> list[str]:
    """Render prefixes of a dialogue with the chat template.

    Args:
        chat_format: The chat format.
        messages: The dialogue.
        prefixes: For each prefix, the number of messages and whether to add the prompt for a reply.
        special_tokens: Tokens that may not occur in messages, because they would be parsed as special tokens.

    Raises:
        UserError: The model has no template, the template rejects the dialogue, or a message contains a special token.
    """
    if chat_format.chat_template is None:
        raise UserError("The model has no chat template: it continues text but cannot take dialogues.")
    for message in messages:
        found = next((token for token in special_tokens if token in message.text), None)
        if found:
            raise UserError(f"The text contains {found}, which is a special token of the model.")
    entries = [{"role": message.role, "content": message.text} for message in messages]
    variables = {"tools": None, "documents": None, **chat_format.special_tokens_map}
    return [
        _RENDERER.render(
            chat_format.chat_template, variables | {"messages": entries[:count], "add_generation_prompt": asks}
        )
        for count, asks in prefixes
    ]


def find_turn_end_token(chat_format: ChatFormat, special_tokens: Sequence[str]) -> str | None:
    """Return the special token that ends assistant messages in the chat template, or None."""
    question, answer = "q7e2", "a9d4"
    messages = (Message("user", question), Message("assistant", answer), Message("user", question))
    try:
        text = apply_chat_template(chat_format, messages, add_generation_prompt=False, special_tokens=special_tokens)
    except UserError:
        return None
    between = text.partition(answer)[2].partition(question)[0]
    found = [(between.index(token), -len(token), token) for token in special_tokens if token in between]
    return min(found)[2] if found else None


class _Renderer:
    """A renderer of templates in a child process, which is started on demand and restarted if it has exited."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._lock = threading.Lock()

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        """Render a chat template. Raises UserError if it fails or exceeds the limits."""
        limits = {"seconds": MAX_CPU_SECONDS, "characters": MAX_CHARACTERS}
        request = json.dumps({"template": template, "variables": variables, **limits}).encode() + b"\n"
        with self._lock:
            response = json.loads(self._send(request))
        if "error" in response:
            raise UserError(f"The model's chat template rejects this dialogue: {response['error']}.")
        return response["text"]

    def _send(self, request: bytes) -> bytes:
        process = self._start()
        assert process.stdin and process.stdout
        try:
            process.stdin.write(request)
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = b""
        except BaseException:
            # Otherwise a late response could be mistaken for the response to the next request.
            self.end()
            raise
        if line.endswith(b"\n"):
            return line
        status = process.wait()
        self.end()
        reason = f"its process ended ({status})"
        if status == -signal.SIGPROF:
            reason = f"it runs for more than {MAX_CPU_SECONDS:g} s"
        raise UserError(f"The model's chat template rejects this dialogue: {reason}.")

    def _start(self) -> "subprocess.Popen[bytes]":
        # After a fork, the renderer process belongs to the parent.
        if self._process is None or self._owner != os.getpid():
            script = Path(__file__).with_name("template_worker.py")
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(script), str(MAX_MEMORY_BYTES)],
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
