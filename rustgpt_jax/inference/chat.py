"""Chat with a trained model, interactively in a terminal or over a pipe."""

import bisect
import contextlib
import dataclasses
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.segment import Segment, Segments

from rustgpt_jax.cache_dir import cache_folder
from rustgpt_jax.config.schema import SamplingConfig
from rustgpt_jax.config.validation import parse_overrides, validate_value
from rustgpt_jax.errors import UserError, suggest_names
from rustgpt_jax.inference.sampling import SAMPLERS, is_greedy
from rustgpt_jax.inference.text_generator import (
    Ending,
    TextGenerator,
    WeightLayout,
    select_weight_layout,
    stream_text,
)
from rustgpt_jax.model.flops import total_size
from rustgpt_jax.tokenizers import Document, Message
from rustgpt_jax.tracking.console import format_count, replace_control_characters

PROMPT = "> "
HISTORY_LINES = 1000
SETTINGS = tuple(field.name for field in dataclasses.fields(SamplingConfig))


@dataclass(frozen=True)
class Conversation:
    """The messages so far, oldest first: questions and replies, or plain text and its continuations."""

    messages: tuple[Message, ...] = ()

    def add(self, *messages: Message) -> "Conversation":
        """Return the conversation with more messages at its end."""
        return Conversation((*self.messages, *messages))

    def reply_seed(self, seed: int) -> int:
        """Return the seed of the next reply. The first reply uses `seed`, so it equals the output of `generate`."""
        # Multiples of 2^32 / golden ratio keep the replies of adjacent seeds apart.
        return (seed + sum(message.role != "user" for message in self.messages) * 0x9E3779B9) % 2**32

    def prompt(
        self, message: Message, generator: TextGenerator, room: int, history_turns: int | None = None
    ) -> tuple[list[int], int]:
        """Return the prompt for a reply to `message`, and the number of oldest messages that it omits.

        Args:
            message: The new message. Plain text is continued without the earlier messages.
            generator: The model.
            room: Number of tokens of the context to leave for the reply by omitting earlier messages.
            history_turns: Maximum number of earlier question-reply pairs in the prompt; None for no limit.

        Raises:
            UserError: The message alone fills the context.
        """
        context = generator.model.context_length

        def encode_latest(n_pairs: int) -> list[int]:
            return generator.encode_messages([*self.messages[len(self.messages) - 2 * n_pairs :], message])

        if (length := len(encode_latest(0))) >= context:
            raise UserError(f"The message takes {length} tokens, and the model's context holds {context}: shorten it.")
        if message.role == "text":
            return encode_latest(0), 0
        most = len(self.messages) // 2 if history_turns is None else min(len(self.messages) // 2, history_turns)
        n_pairs = bisect.bisect_right(range(1, most + 1), context - room, key=lambda n: len(encode_latest(n)))
        return encode_latest(n_pairs), 2 * (most - n_pairs)

    def as_text(self) -> str:
        """Return the content of a file for the corpus `files`: one line of JSON for a dialogue, else plain text."""
        if not Document("", self.messages).is_dialogue:
            return "\n\n".join(message.text for message in self.messages) + "\n"
        messages = [{"role": message.role, "content": message.text} for message in self.messages]
        return json.dumps({"messages": messages}, ensure_ascii=False) + "\n"


class Turn(NamedTuple):
    """A line of the user and the reply of the model, or the error.

    Attributes:
        message: The line.
        reply: The reply; None after an error.
        finish_reason: Why the reply ends: "stop", "max_tokens", "context" or "interrupted"; None after an error.
        n_tokens: The number of tokens of the reply, None if it is unknown.
        error: The error, None if there is none.
    """

    message: str
    reply: str | None = None
    finish_reason: str | None = None
    n_tokens: int | None = None
    error: str | None = None


class Session:
    """A chat session: the conversation, all turns since the start, and the settings, which its user can change."""

    def __init__(self, generator: TextGenerator, sampling: SamplingConfig, console: Console) -> None:
        self.conversation = Conversation()
        self.turns = list[Turn]()
        self.sampling = sampling
        self._generator = generator
        self._decoder: tuple[WeightLayout, TextGenerator] | None = None
        self._console = console
        self._is_over = False
        self._has_warned = False

    def run(self, read_line: Callable[[], str]) -> None:
        """Respond to each line until /quit, an EOFError of `read_line`, or two KeyboardInterrupts in a row."""
        interrupts = 0
        while not self._is_over and interrupts < 2:
            try:
                line = read_line()
                interrupts = 0
                self.respond(line)
            except EOFError:
                return
            except KeyboardInterrupt:
                interrupts += 1
                self.note("" if interrupts == 2 else "\nPress Ctrl-C again or Ctrl-D to exit.")

    def respond(self, line: str) -> None:
        """Run a command or write a reply. A line that begins with a space is not a command."""
        name, _, text = line.partition(" ")
        try:
            if name in COMMANDS:
                COMMANDS[name].run(self, text.strip())
            elif name.startswith("/"):
                raise UserError(f"Unknown command {name}.{suggest_names(name, COMMANDS)}")
            elif line.strip():
                self._reply(Message("user", line.strip()) if self._generator.is_dialogue else Message("text", line))
        except UserError as error:
            self.turns.append(Turn(line, error=str(error)))
            self.show(f"{error}\n", "red")

    def note(self, text: str) -> None:
        """Print a line that is not model output."""
        self.show(f"{text}\n", "dim")

    def show(self, text: str, style: str = "") -> None:
        """Print text verbatim, except for control characters."""
        # rich's Text would expand the tabs of each piece as if it began a line.
        self._console.print(
            Segments([Segment(replace_control_characters(text), self._console.get_style(style))]), soft_wrap=True
        )

    def _reply(self, message: Message) -> None:
        context = self._generator.model.context_length
        room = min(self.sampling.max_tokens, context // 2)
        prompt, n_omitted = self.conversation.prompt(message, self._generator, room, self.sampling.history_turns)
        if n_omitted and not self._has_warned:
            self._has_warned = True
            self.note(f"(The context of {context} tokens is full: from now on the oldest messages are left out.)")
        if message.role == "text":
            self.show(message.text, "bold")
        reply, ending = self._generate(prompt)
        self.show("\n\n")
        if ending is None:
            self.turns.append(Turn(message.text, reply, "interrupted"))
        else:
            self.turns.append(Turn(message.text, reply, ending.finish_reason, len(ending.tokens)))
        if not reply:
            self.note("(The model wrote nothing, so the message is not kept.)")
        elif message.role == "text":
            self.conversation = self.conversation.add(Message("text", message.text + reply))
        else:
            self.conversation = self.conversation.add(message, Message("assistant", reply))

    def _generate(self, prompt: Sequence[int]) -> tuple[str, Ending | None]:
        """Generate a reply and print it as it is generated, until it ends, or until Ctrl-C, when it has no ending."""
        layout = select_weight_layout(self.sampling)
        if self._decoder is None or self._decoder[0] != layout:
            self._decoder = layout, self._generator.with_weight_layout(layout)
        sampling = dataclasses.replace(self.sampling, seed=self.conversation.reply_seed(self.sampling.seed))
        reply, endings = "", list[Ending]()
        with contextlib.suppress(KeyboardInterrupt):
            for piece in stream_text(self._decoder[1], prompt, sampling, endings.append):
                reply += piece
                self.show(piece)
        ending = endings[0] if endings else None
        if ending is not None and ending.warning is not None:
            self.note(f"\n({ending.warning})")
        return reply, ending

    def _help(self, _: str) -> None:
        verb = "answers" if self._generator.is_dialogue else "continues"
        self.note(f"The model {verb} every line that is not one of these commands:")
        for name, command in COMMANDS.items():
            self.note(f"  {f'{name} {command.argument}':<20} {command.help}")

    def _reset(self, _: str) -> None:
        self.conversation, self._has_warned = Conversation(), False
        self.note("Started a new conversation.")

    def _set(self, text: str) -> None:
        name, _, value = (part.strip() for part in text.replace("=", " ", 1).partition(" "))
        if name and name not in SETTINGS:
            raise UserError(f"Unknown setting {name!r}.{suggest_names(name, SETTINGS)}")
        if value:
            path = f"sampling.{name}"
            parsed = validate_value(path, parse_overrides([(path, value)])[path], f"config.{path}")
            self.sampling = dataclasses.replace(self.sampling, **{name: parsed})
        for setting in [name] if name else SETTINGS:
            self.note(f"{setting} {getattr(self.sampling, setting)}")
        if name == "seed" and value:
            self._reset("")

    def _save(self, text: str) -> None:
        if not text:
            raise UserError("Save to which file? For example: /save talk")
        if not self.conversation.messages:
            raise UserError("There is nothing to save yet.")
        try:
            path = Path(os.path.expanduser(text))
            path = path if path.suffix else path.with_suffix(".jsonl" if self._generator.is_dialogue else ".txt")
            with path.open("x", encoding="utf-8", newline="\n") as file:
                file.write(self.conversation.as_text())
        except (OSError, ValueError) as error:
            raise UserError(f"Cannot write {text} ({getattr(error, 'strerror', error)}).") from None
        self.note(f"Saved to {path}, which the corpus `files` can read.")

    def _quit(self, _: str) -> None:
        self._is_over = True


class Command(NamedTuple):
    """A chat command.

    Attributes:
        argument: Placeholder of its argument.
        help: What it does.
        run: The method that runs it, given the argument.
    """

    argument: str
    help: str
    run: Callable[[Session, str], None]


COMMANDS: dict[str, Command] = {
    "/help": Command("", "list the commands", Session._help),
    "/reset": Command("", "start a new conversation", Session._reset),
    "/seed": Command(
        "[N]", "start again with seed N; without N, show the seed", lambda session, text: session._set(f"seed {text}")
    ),
    "/set": Command(
        "[SETTING [VALUE]]", "change or show a sampling setting; without arguments, show all", Session._set
    ),
    "/save": Command("FILE", "write the conversation to a new file", Session._save),
    "/quit": Command("", "exit, like Ctrl-D", Session._quit),
}


def chat(generator: TextGenerator, sampling: SamplingConfig, console: Console, title: str) -> list[Turn]:
    """Chat over standard input and `console` until the user leaves or the input ends, and return the turns.

    In a terminal, it first prints `title` and the sampling settings. Lines from a pipe are printed with their replies.
    """
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    session = Session(generator, sampling, console)
    if sys.stdin is None:
        # Standard input is closed.
        return session.turns
    if not sys.stdin.isatty():
        session.run(lambda: _read_piped_line(session))
        return session.turns
    session.show(f"{title}, {format_count(total_size(generator.params))} parameters\n", "bold")
    verb = "answers" if generator.is_dialogue else "continues"
    session.note(f"The model {verb} what you write, with {describe_sampling(sampling)}.")
    session.note("/help lists the commands, Ctrl-C stops a reply, Ctrl-D exits.\n")
    with _line_editing(cache_folder() / "chat_history"):
        session.run(_read_typed_line)
    return session.turns


def describe_sampling(sampling: SamplingConfig) -> str:
    """Return the settings of the samplers, the maximum number of tokens, and the seed."""
    greedy = is_greedy(sampling)
    names = ["repetition_penalty"] if greedy else [name for name in SAMPLERS if name != "temperature"]
    values = [(name, getattr(sampling, name)) for name in names]
    return ", ".join(
        [
            "greedy decoding" if greedy else f"temperature {sampling.temperature:g}",
            *(f"{name} {value:g}" for name, value in values if value != SAMPLERS[name][0]),
            f"up to {sampling.max_tokens} tokens, seed {sampling.seed}",
        ]
    )


def completions(line: str) -> list[str]:
    """Return the possible completions of the start of a command."""
    names = [name + " " * bool(command.argument) for name, command in COMMANDS.items()]
    settings = [f"/set {setting} " for setting in SETTINGS]
    return [each for each in (settings if line.startswith("/set ") else names) if each.startswith(line)]


def _read_piped_line(session: Session) -> str:
    line = input()
    session.show(f"{PROMPT}{line}\n")
    return line


def _read_typed_line() -> str:
    try:
        return input(PROMPT)
    except EOFError:
        print()
        raise


@contextlib.contextmanager
def _line_editing(history: Path) -> Iterator[None]:
    """Enable line editing, completion and a persistent history, if Python has `readline`."""
    try:
        import readline
    except ImportError:
        yield
        return
    readline.parse_and_bind("bind ^I rl_complete" if "libedit" in (readline.__doc__ or "") else "tab: complete")
    readline.set_completer_delims("")
    readline.set_completer(lambda line, index: dict(enumerate(completions(line))).get(index))
    readline.set_history_length(HISTORY_LINES)
    with contextlib.suppress(OSError):
        readline.read_history_file(history)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            history.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(history)
