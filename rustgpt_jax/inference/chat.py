"""A conversation with a trained model: line by line in a terminal, or through a pipe."""

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
from rustgpt_jax.config.validation import parse, validate_value
from rustgpt_jax.errors import UserError, suggest_names
from rustgpt_jax.inference.decode_params import WeightLayout, weight_layout
from rustgpt_jax.inference.sampling import SAMPLERS, is_greedy
from rustgpt_jax.inference.text_generator import TextGenerator, stream_text
from rustgpt_jax.model.flops import total_size
from rustgpt_jax.tokenizers.messages import Document, Turn
from rustgpt_jax.tracking.formatting import format_count, replace_control_characters

PROMPT = "> "
LINES_OF_HISTORY = 1000
KNOBS = tuple(field.name for field in dataclasses.fields(SamplingConfig))


@dataclass(frozen=True)
class Conversation:
    """What was said so far, oldest first: a question and a reply in turns, or plain texts with their continuations."""

    turns: tuple[Turn, ...] = ()

    def add(self, *turns: Turn) -> "Conversation":
        """The conversation with more turns at its end."""
        return Conversation((*self.turns, *turns))

    def reply_seed(self, seed: int) -> int:
        """The seed of the next reply. The first is `seed` itself, so that it is the reply of the verb `generate`."""
        # Multiples of 2^32 over the golden ratio keep the replies of neighbouring seeds apart.
        return (seed + sum(turn.role != "user" for turn in self.turns) * 0x9E3779B9) % 2**32

    def prompt(self, said: Turn, writer: TextGenerator, room: int, memory: int | None = None) -> tuple[list[int], int]:
        """The tokens to reply to what was `said` now from, and how many of the oldest turns they leave out.

        At most `memory` earlier exchanges are in them, and only as many as leave `room` tokens of the model's context
        free. Plain text is continued by itself. Raises UserError if what was said leaves no room even alone.
        """
        context = writer.model.context_length

        def after_latest(exchanges: int) -> list[int]:
            return writer.conversation([*self.turns[len(self.turns) - 2 * exchanges :], said])

        if (alone := len(after_latest(0))) >= context:
            raise UserError(f"That takes {alone} tokens, the model's context holds {context}: write less at a time.")
        if said.role == "text":
            return after_latest(0), 0
        wanted = min(len(self.turns) // 2, len(self.turns) if memory is None else memory)
        every = range(1, wanted + 1)
        kept = bisect.bisect_right(every, context - room, key=lambda exchanges: len(after_latest(exchanges)))
        return after_latest(kept), 2 * (wanted - kept)

    def as_text(self) -> str:
        """What a file of it holds, for the corpus `files`: a dialogue as a line of JSON, or plain text."""
        if not Document("", self.turns).is_dialogue:
            return "\n\n".join(turn.text for turn in self.turns) + "\n"
        messages = [{"role": turn.role, "content": turn.text} for turn in self.turns]
        return json.dumps({"messages": messages}, ensure_ascii=False) + "\n"


class Session:
    """A conversation that is being held, with what its user has set."""

    def __init__(self, writer: TextGenerator, sampling: SamplingConfig, console: Console) -> None:
        self.conversation = Conversation()
        self.sampling = sampling
        self._writer = writer
        self._laid_out: tuple[WeightLayout, TextGenerator] | None = None
        self._console = console
        self._is_over = False
        self._has_forgotten = False

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
                self.note("" if interrupts == 2 else "\nCtrl-C again or Ctrl-D leaves.")

    def respond(self, line: str) -> None:
        """Obey a command, or write a reply. A line that begins with a blank is no command."""
        name, _, text = line.partition(" ")
        try:
            if name in COMMANDS:
                COMMANDS[name].run(self, text.strip())
            elif name.startswith("/"):
                raise UserError(f"There is no command {name}.{suggest_names(name, COMMANDS)}")
            elif line.strip():
                self._reply(Turn("user", line.strip()) if self._writer.is_dialogue else Turn("text", line))
        except UserError as error:
            self.show(f"{error}\n", "red")

    def note(self, text: str) -> None:
        """Write a line that is not the model's."""
        self.show(f"{text}\n", "dim")

    def show(self, text: str, style: str = "") -> None:
        """Write a text, or a part of one, as it is, but for control characters."""
        # As rich's Text, a part would have its tabs expanded as if a line began with it.
        self._console.print(
            Segments([Segment(replace_control_characters(text), self._console.get_style(style))]), soft_wrap=True
        )

    def _reply(self, said: Turn) -> None:
        context = self._writer.model.context_length
        room = min(self.sampling.max_tokens, context // 2)
        prompt, n_forgotten = self.conversation.prompt(said, self._writer, room, self.sampling.history_turns)
        if n_forgotten and not self._has_forgotten:
            self._has_forgotten = True
            self.note(f"(The context of {context} tokens is full: what was said first is forgotten from now on.)")
        if said.role == "text":
            self.show(said.text, "bold")
        reply = self._write(prompt)
        self.show("\n\n")
        if not reply:
            self.note("(Nothing was written, so the question does not count.)")
        elif said.role == "text":
            self.conversation = self.conversation.add(Turn("text", said.text + reply))
        else:
            self.conversation = self.conversation.add(said, Turn("assistant", reply))

    def _write(self, prompt: Sequence[int]) -> str:
        """What the model writes, shown as it comes, until it ends or Ctrl-C is pressed."""
        sampling = dataclasses.replace(self.sampling, seed=self.conversation.reply_seed(self.sampling.seed))
        reply, notes = "", list[str]()
        with contextlib.suppress(KeyboardInterrupt):
            for piece in stream_text(self._fast_writer(), prompt, sampling, notes.append):
                reply += piece
                self.show(piece)
        for note in notes:
            self.note(f"\n({note})")
        return reply

    def _fast_writer(self) -> TextGenerator:
        """The writer with its weights in the form that is asked for now."""
        asked = weight_layout(self.sampling)
        if self._laid_out is None or self._laid_out[0] != asked:
            self._laid_out = asked, self._writer.with_weight_layout(asked)
        return self._laid_out[1]

    def _help(self, _: str) -> None:
        self.note(f"A line is {'answered' if self._writer.is_dialogue else 'continued'}, or it is a command:")
        for name, command in COMMANDS.items():
            self.note(f"  {f'{name} {command.argument}':<20} {command.meaning}")

    def _reset(self, _: str) -> None:
        self.conversation, self._has_forgotten = Conversation(), False
        self.note("The conversation begins anew.")

    def _seed(self, text: str) -> None:
        self._set(f"seed {text}")

    def _set(self, text: str) -> None:
        name, _, value = (part.strip() for part in text.replace("=", " ", 1).partition(" "))
        if name and name not in KNOBS:
            raise UserError(f"There is no knob {name!r}.{suggest_names(name, KNOBS)}")
        if value:
            path = f"sampling.{name}"
            number = validate_value(path, parse(path, value), f"config.{path}")
            self.sampling = dataclasses.replace(self.sampling, **{name: number})
        for knob in [name] if name else KNOBS:
            self.note(f"{knob} {getattr(self.sampling, knob)}")
        if name == "seed" and value:
            self._reset("")

    def _save(self, text: str) -> None:
        if not text:
            raise UserError("Save to which file? For example: /save talk")
        if not self.conversation.turns:
            raise UserError("There is nothing to save yet.")
        try:
            path = Path(os.path.expanduser(text))
            path = path if path.suffix else path.with_suffix(".jsonl" if self._writer.is_dialogue else ".txt")
            with path.open("x", encoding="utf-8", newline="\n") as file:
                file.write(self.conversation.as_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{text} cannot be written ({getattr(error, 'strerror', error)}).") from None
        self.note(f"Saved to {path}, which the corpus `files` reads.")

    def _quit(self, _: str) -> None:
        self._is_over = True


class Command(NamedTuple):
    """A line that begins with a slash: what may follow its name, what it does in words, and the doing."""

    argument: str
    meaning: str
    run: Callable[[Session, str], None]


COMMANDS: dict[str, Command] = {
    "/help": Command("", "list the commands", Session._help),
    "/reset": Command("", "begin the conversation anew", Session._reset),
    "/seed": Command("[N]", "begin anew with the seed N; alone, show it", Session._seed),
    "/set": Command("[KNOB [VALUE]]", "change how replies are drawn; alone, show it", Session._set),
    "/save": Command("FILE", "write the conversation to a new file", Session._save),
    "/quit": Command("", "leave, as Ctrl-D does", Session._quit),
}


def chat(writer: TextGenerator, sampling: SamplingConfig, console: Console, title: str) -> None:
    """Hold a conversation over standard input and `console` until the user leaves or the input ends.

    In a terminal it begins with `title` and how replies are drawn. Lines from a pipe are shown with their replies.
    """
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    session = Session(writer, sampling, console)
    if not sys.stdin.isatty():
        session.run(lambda: _piped_line(session))
        return
    session.show(f"{title}, {format_count(total_size(writer.params))} parameters\n", "bold")
    session.show(
        f"It {'answers' if writer.is_dialogue else 'continues'} what you write: {describe_sampling(sampling)}.\n", "dim"
    )
    session.show("/help lists the commands, Ctrl-C stops a reply, Ctrl-D leaves.\n\n", "dim")
    with _line_editing(cache_folder() / "chat_history"):
        session.run(_typed_line)


def describe_sampling(sampling: SamplingConfig) -> str:
    """How replies are drawn: what the samplers do, the most tokens, and the seed."""
    greedy = is_greedy(sampling)
    way = "the likeliest token each time" if greedy else f"temperature {sampling.temperature:g}"
    names = ["repetition_penalty"] if greedy else [name for name in SAMPLERS if name != "temperature"]
    values = [(name, getattr(sampling, name)) for name in names]
    others = [f"{name} {value:g}" for name, value in values if value != SAMPLERS[name][0]]
    return ", ".join([way, *others, f"up to {sampling.max_tokens} tokens, seed {sampling.seed}"])


def completions(line: str) -> list[str]:
    """The lines that the beginning of a command may become."""
    names = [name + " " * bool(command.argument) for name, command in COMMANDS.items()]
    knobs = [f"/set {knob} " for knob in KNOBS]
    return [whole for whole in (knobs if line.startswith("/set ") else names) if whole.startswith(line)]


def _piped_line(session: Session) -> str:
    line = input()
    session.show(f"{PROMPT}{line}\n")
    return line


def _typed_line() -> str:
    try:
        return input(PROMPT)
    except EOFError:
        print()
        raise


@contextlib.contextmanager
def _line_editing(history: Path) -> Iterator[None]:
    """Arrow keys, Tab, and a history that outlives the session, where Python has `readline`."""
    try:
        import readline
    except ImportError:
        yield
        return
    readline.parse_and_bind("bind ^I rl_complete" if "libedit" in (readline.__doc__ or "") else "tab: complete")
    readline.set_completer_delims("")
    readline.set_completer(lambda line, place: dict(enumerate(completions(line))).get(place))
    readline.set_history_length(LINES_OF_HISTORY)
    with contextlib.suppress(OSError):
        readline.read_history_file(history)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            history.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(history)
