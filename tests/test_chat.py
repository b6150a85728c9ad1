"""Chat: every command, what is forgotten and what is repeated, Ctrl-C, pipes, and nothing that harms a terminal."""

import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import pytest
from rich.console import Console

from configs import base
from rustgpt_jax import tokenizers
from rustgpt_jax.config.schema import Config, SamplingConfig
from rustgpt_jax.config.validation import resolve
from rustgpt_jax.data import datasets
from rustgpt_jax.errors import UserError
from rustgpt_jax.inference import chat as chat_module
from rustgpt_jax.inference.chat import COMMANDS, SETTINGS, Conversation, Session, chat, completions, describe_sampling
from rustgpt_jax.inference.text_generator import TextGenerator, generate_text
from rustgpt_jax.model import transformer
from rustgpt_jax.tokenizers import Message

CONTEXT = 64


def tiny_config() -> Config:
    """A model of one narrow block over bytes that is sure of nothing, and draws from all of them."""
    config = base.get_config()
    config.tokenizer.name, config.tokenizer.vocab_size = "byte", 260
    config.model.vocab_size, config.model.context_length = 260, CONTEXT
    config.model.n_layers, config.model.d_model, config.model.attention.n_heads = 1, 16, 2
    # Few enough that the prompts of the tests that generate fall in one bucket, and compile once.
    config.sampling.max_tokens = 2
    config.sampling.temperature, config.sampling.top_p = 1.0, 1.0
    return resolve(config)


CONFIG = tiny_config()
BYTES = tokenizers.train_tokenizer(CONFIG.tokenizer, [])
DIALOGUES = TextGenerator(transformer.init(jax.random.key(0), CONFIG.model), CONFIG.model, BYTES, is_dialogue=True)
TEXTS = DIALOGUES._replace(is_dialogue=False)


class Screen:
    """A console that writes to memory."""

    def __init__(self, terminal: bool = False) -> None:
        self.file = io.StringIO()
        self.console = Console(file=self.file, force_terminal=terminal, width=40, color_system=None)

    @property
    def text(self) -> str:
        return self.file.getvalue()

    def take(self) -> str:
        """What was written since the last time."""
        text = self.text
        self.file.seek(0)
        self.file.truncate()
        return text


class Held(Session):
    """A session whose screen is at hand."""

    def __init__(self, writer: TextGenerator = DIALOGUES, sampling: SamplingConfig = CONFIG.sampling) -> None:
        self.screen = Screen()
        super().__init__(writer, sampling, self.screen.console)

    def after(self, *lines: str) -> str:
        """What is written in answer to some lines."""
        self.screen.take()
        for line in lines:
            self.respond(line)
        return self.screen.take()


class Asked(NamedTuple):
    """What a reply was to be written from."""

    prompt: Sequence[int]
    sampling: SamplingConfig


Script = Callable[..., list[Asked]]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """Puts fixed pieces, or an interrupt, in the place of what the model writes; gives what is asked of it."""

    def put(*pieces: str, then: type[BaseException] | None = None, note: str | None = None) -> list[Asked]:
        asked: list[Asked] = []

        def written(
            writer: TextGenerator, prompt: Sequence[int], sampling: SamplingConfig, says: Callable[[str], object]
        ) -> Iterator[str]:
            del writer
            asked.append(Asked(prompt, sampling))
            yield from pieces
            if note is not None:
                says(note)
            if then:
                raise then

        monkeypatch.setattr(chat_module, "stream_text", written)
        return asked

    return put


def lines_then(lines: Iterable[str | type[BaseException]]) -> Callable[[], str]:
    """A reader of lines, some of which are errors, and then of the end of the input."""
    rest = iter(lines)

    def read() -> str:
        line = next(rest, EOFError)
        if isinstance(line, str):
            return line
        raise line

    return read


def dialogue(*texts: str) -> Conversation:
    roles = ("user", "assistant") * len(texts)
    return Conversation(tuple(Message(role, text) for role, text in zip(roles, texts, strict=False)))


# The conversation.


def test_a_prompt_is_all_that_was_said() -> None:
    prompt, n_forgotten = dialogue("a", "b").prompt(Message("user", "c"), DIALOGUES, 16)
    assert prompt == DIALOGUES.encode_messages([Message("user", "a"), Message("assistant", "b"), Message("user", "c")])
    assert n_forgotten == 0


@pytest.mark.parametrize("room", [1, 10, 20, 32])
def test_the_oldest_exchanges_make_room_for_the_reply_and_no_more_than_must(room: int) -> None:
    said = dialogue(*"abcdefghij" * 6)
    prompt, n_forgotten = said.prompt(Message("user", "?"), DIALOGUES, room)
    assert prompt == DIALOGUES.encode_messages([*said.messages[n_forgotten:], Message("user", "?")])
    one_more = DIALOGUES.encode_messages([*said.messages[n_forgotten - 2 :], Message("user", "?")])
    assert n_forgotten % 2 == 0
    assert len(prompt) <= CONTEXT - room < len(one_more)


def test_a_long_question_is_asked_alone_as_long_as_one_token_is_left() -> None:
    # Around it stand END, USER and ASSISTANT.
    longest = "x" * (CONTEXT - 4)
    assert dialogue("a", "b").prompt(Message("user", longest), DIALOGUES, 16) == (DIALOGUES.encode_prompt(longest), 2)
    with pytest.raises(UserError, match=r"takes 64 tokens, and the model's context holds 64"):
        Conversation().prompt(Message("user", longest + "x"), DIALOGUES, 16)


def test_plain_text_is_continued_by_itself() -> None:
    said = Conversation((Message("text", "before"),))
    assert said.prompt(Message("text", "now"), TEXTS, 16) == (TEXTS.encode_prompt("now"), 0)


def test_replies_of_a_conversation_and_of_neighbouring_seeds_have_seeds_of_their_own() -> None:
    seeds = [dialogue(*"ab" * n).reply_seed(seed) for n in range(50) for seed in range(50)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert Conversation().reply_seed(2**32 - 1) == 2**32 - 1


# Replies.


def test_the_first_reply_is_that_of_generate() -> None:
    [expected] = generate_text(DIALOGUES, [DIALOGUES.encode_prompt("?")], CONFIG.sampling)
    session = Held()
    session.respond("?")
    assert session.conversation == dialogue("?", expected)


def test_the_same_seed_and_questions_give_the_same_conversation() -> None:
    session = Held()
    first = session.after("?", "?")
    assert session.after("/reset", "?", "?").endswith(first)
    assert not session.after("/seed 1", "?", "?").endswith(first)
    assert session.after("/seed 0", "?", "?").endswith(first)
    _, one, _, other = session.conversation.messages
    assert one != other


def test_each_reply_reads_all_that_was_said(script: Script) -> None:
    asked = script("b")
    session = Held()
    session.after("a", "c")
    assert asked[1].prompt == DIALOGUES.encode_messages(
        [Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
    )
    assert asked[1].sampling != asked[0].sampling == CONFIG.sampling


def test_forgetting_is_said_once(script: Script) -> None:
    script("a reply of some length.")
    session = Held()
    questions = ["Why is that?"] * 4
    assert session.after(*questions).count("from now on the oldest messages") == 1
    assert len(session.conversation.messages) == 8, "what is forgotten can still be saved"
    assert "oldest messages" not in session.after("Why?")
    assert session.after("/reset", *questions).count("from now on the oldest messages") == 1


def test_a_question_that_does_not_fit_is_answered_with_a_sentence() -> None:
    session = Held()
    said = session.after("x" * 100)
    assert said == "The message takes 103 tokens, and the model's context holds 64: shorten it.\n"
    assert session.conversation == Conversation()


def test_texts_are_shown_and_kept_whole(script: Script) -> None:
    script("\tup", " a time")
    session = Held(TEXTS)
    assert session.after("  Once ") == "  Once \tup a time\n\n"
    assert session.conversation.messages == (Message("text", "  Once \tup a time"),)


def test_nothing_asked_is_nothing_answered() -> None:
    assert Held().after("", "   ") == ""


def test_an_empty_reply_does_not_count(script: Script) -> None:
    script()
    session = Held()
    assert "The model wrote nothing" in session.after("Hi")
    assert session.conversation == Conversation()


def test_a_blank_keeps_a_line_from_being_a_command(script: Script) -> None:
    script("yes")
    session = Held()
    session.respond(" /quit")
    assert session.conversation == dialogue("/quit", "yes")


def test_no_control_character_reaches_the_terminal(script: Script) -> None:
    harmful = "\x1b]0;title\x07 \x1b[2J \r \x08 \x9b31m \x7f"
    script(harmful)
    session = Held()
    shown = session.after("Hi", "/" + harmful)
    assert not [character for character in shown if character != "\n" and not character.isprintable()]
    assert session.conversation == dialogue("Hi", harmful)


def test_brackets_and_long_lines_are_shown_as_they_are(script: Script) -> None:
    text = "[bold]x[/] :smile: " + "word " * 40
    script(text)
    assert Held().after("Hi") == text + "\n\n"


# Commands.


def test_help_names_every_command() -> None:
    shown = Held().after("/help")
    assert all(f"{name} " in shown for name in COMMANDS)


def test_an_unknown_command_is_answered_with_the_nearest() -> None:
    session = Held()
    assert "Unknown command /sve. Did you mean '/save'?" in session.after("/sve talk")
    assert session.conversation == Conversation()


def test_quit_ends_the_session() -> None:
    session = Held()
    session.run(lines_then(["/quit", "Hi"]))
    assert session.screen.text == ""


def test_seed_shows_and_sets() -> None:
    session = Held()
    assert session.after("/seed") == "seed 0\n"
    session.conversation = dialogue("a", "b")
    assert session.after("/seed 7") == "seed 7\nStarted a new conversation.\n"
    assert session.sampling.seed == 7
    assert session.conversation == Conversation()
    assert session.after("/seed x") == "config.sampling.seed takes a whole number, not 'x'.\n"
    assert session.after("/seed -1") == "config.sampling.seed must be at least 0, not -1.\n"


VALUES = {
    "temperature": 0.5,
    "top_k": 5,
    "top_p": 0.5,
    "min_p": 0.1,
    "repetition_penalty": 1.5,
    "max_tokens": 3,
    "past_context": "slide",
    "history_turns": 1,
    "weight_dtype": "int8",
    "matmul_impl": "native",
}


@pytest.mark.parametrize("knob", sorted(set(SETTINGS) - {"seed"}))
@pytest.mark.parametrize("form", ["/set {} {}", "/set {}={}", "/set  {}  =  {} "])
def test_set_changes_each_knob(knob: str, form: str, script: Script) -> None:
    asked = script("ok")
    session = Held()
    session.conversation = dialogue("a", "b")
    assert session.after(form.format(knob, VALUES[knob])) == f"{knob} {VALUES[knob]}\n"
    session.respond("Hi")
    assert getattr(asked[0].sampling, knob) == VALUES[knob]
    assert session.conversation == dialogue("a", "b", "Hi", "ok")


def test_set_alone_shows_the_knobs() -> None:
    session = Held()
    assert session.after("/set") == "".join(f"{knob} {getattr(CONFIG.sampling, knob)}\n" for knob in SETTINGS)
    assert session.after("/set top_k") == "top_k 0\n"


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("/set temprature 1", "Unknown setting 'temprature'. Did you mean 'temperature'?"),
        ("/set temperature hot", "config.sampling.temperature takes a number, not 'hot'."),
        ("/set top_p 2", "config.sampling.top_p must be at most 1, not 2."),
        ("/set top_k 1.5", "config.sampling.top_k takes a whole number, not 1.5."),
        ("/set top_k 1 2", "config.sampling.top_k takes a whole number, not '1 2'."),
    ],
)
def test_a_wrong_setting_is_a_sentence_and_changes_nothing(line: str, sentence: str) -> None:
    session = Held()
    assert sentence in session.after(line)
    assert session.sampling == CONFIG.sampling


def test_a_saved_dialogue_is_read_by_the_corpus(tmp_path: Path, script: Script) -> None:
    script("It rains.\x1b\n")
    session = Held()
    shown = session.after("Wie ist es, schön?", "Why?", f"/save {tmp_path}/my talk")
    assert shown.endswith(f"Saved to {tmp_path / 'my talk.jsonl'}, which the corpus `files` can read.\n")
    [document] = datasets.load_documents(replace(CONFIG.data, corpus="files", paths=(str(tmp_path / "*.jsonl"),)))
    assert document.messages == session.conversation.messages
    assert len(document.messages) == 4


def test_saved_texts_are_plain(tmp_path: Path, script: Script) -> None:
    script(" went on\r\n")
    session = Held(TEXTS)
    session.after("It", "She", f"/save {tmp_path}/texts")
    assert (tmp_path / "texts.txt").read_bytes() == b"It went on\r\n\n\nShe went on\r\n\n"


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    session = Held()
    session.conversation = dialogue("a", "b")
    session.respond("/save ~/talk.txt")
    assert (tmp_path / "talk.txt").read_text() == session.conversation.as_text()


def test_saving_never_harms(tmp_path: Path) -> None:
    kept = tmp_path / "kept.jsonl"
    kept.write_text("kept")
    session = Held()
    assert session.after("/save talk") == "There is nothing to save yet.\n"
    session.conversation = dialogue("a", "b")
    assert "Save to which file?" in session.after("/save")
    assert session.after(f"/save {kept}") == f"Cannot write {kept} (File exists).\n"
    assert "(No such file or directory)" in session.after(f"/save {tmp_path}/no/talk.jsonl")
    assert "Cannot write" in session.after("/save .")
    assert "Cannot write" in session.after("/save ~nobody/\0")
    assert kept.read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["kept.jsonl"]


def test_completion_offers_commands_and_then_knobs() -> None:
    assert completions("") == ["/help", "/reset", "/seed ", "/set ", "/save ", "/quit"]
    assert completions("/se") == ["/seed ", "/set "]
    assert completions("/set t") == ["/set temperature ", "/set top_k ", "/set top_p "]
    assert completions("Why") == []


# Ctrl-C, pipes and terminals.


def test_an_interrupt_stops_the_reply_and_keeps_what_was_written(script: Script) -> None:
    script("It", " is", then=KeyboardInterrupt)
    session = Held()
    session.run(lines_then(["Why?"]))
    assert session.conversation == dialogue("Why?", "It is")
    assert session.screen.text == "It is\n\n"


def test_a_reply_that_the_context_ends_says_so(script: Script) -> None:
    script("It is", note="The text ends here.")
    session = Held()
    session.run(lines_then(["Why?"]))
    assert "It is\n(The text ends here.)\n" in session.screen.text
    assert session.conversation == dialogue("Why?", "It is")


def test_an_interrupt_before_the_first_word_leaves_no_turn(script: Script) -> None:
    script(then=KeyboardInterrupt)
    session = Held()
    session.run(lines_then(["Why?"]))
    assert session.conversation == Conversation()
    assert "The model wrote nothing" in session.screen.text


def test_two_interrupts_in_a_row_leave(script: Script) -> None:
    script("ok")
    session = Held()
    session.run(lines_then([KeyboardInterrupt, "a", KeyboardInterrupt, "b", KeyboardInterrupt, KeyboardInterrupt, "c"]))
    assert session.conversation == dialogue("a", "ok", "b", "ok")
    assert session.screen.text.count("Press Ctrl-C again or Ctrl-D to leave.") == 3


def test_an_interrupt_anywhere_else_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object) -> tuple[list[int], int]:
        raise KeyboardInterrupt

    monkeypatch.setattr(Conversation, "prompt", interrupted)
    session = Held()
    session.run(lines_then(["Hi", "/seed"]))
    assert session.screen.text == "\nPress Ctrl-C again or Ctrl-D to leave.\nseed 0\n"


def test_a_pipe_gives_questions_and_replies(monkeypatch: pytest.MonkeyPatch, script: Script) -> None:
    script("Because.")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Why?\n/seed\nWhy\x1b not?"))
    screen = Screen()
    chat(DIALOGUES, CONFIG.sampling, screen.console, "title")
    assert screen.text == "> Why?\nBecause.\n\n> /seed\nseed 0\n> Why� not?\nBecause.\n\n"


def test_a_pipe_may_hold_any_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\x00\xc3\n"), encoding="utf-8"))
    screen = Screen()
    chat(DIALOGUES, CONFIG.sampling, screen.console, "title")
    assert screen.text.startswith("> ���\n")


class Terminal(io.StringIO):
    """Standard input as a terminal, for all that it is asked."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., str]:
    """Chats in a terminal in which some lines are typed; gives what is on the screen."""

    def typed(*lines: str) -> str:
        screen = Screen(terminal=True)
        read = lines_then(lines)
        monkeypatch.setattr("builtins.input", lambda prompt: read())
        chat(DIALOGUES, CONFIG.sampling, screen.console, "my run at step 5")
        return screen.text

    monkeypatch.setenv("RUSTGPT_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "stdin", Terminal())
    return typed


def test_a_terminal_is_greeted(terminal: Callable[..., str]) -> None:
    shown = terminal("/seed")
    size = sum(leaf.size for leaf in jax.tree.leaves(DIALOGUES.params))
    assert shown.startswith(f"my run at step 5, {size / 1000:.3g}K parameters\nIt answers what you write: temperature")
    assert "/help" in shown
    assert shown.endswith("\n\nseed 0\n")


def test_history_outlives_the_session(terminal: Callable[..., str], tmp_path: Path) -> None:
    readline = pytest.importorskip("readline")
    file = tmp_path / "cache" / "chat_history"
    terminal()
    assert file.exists()
    readline.clear_history()
    readline.add_history("asked before")
    terminal()
    readline.clear_history()
    terminal()
    assert readline.get_history_item(readline.get_current_history_length()) == "asked before"
    assert "asked before" in file.read_text()
    readline.clear_history()


def test_chat_needs_no_readline_and_no_history_file(
    terminal: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("not a folder")
    assert terminal("/seed").endswith("seed 0\n")
    monkeypatch.setitem(sys.modules, "readline", None)
    assert terminal("/seed").endswith("seed 0\n")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "temperature 1, up to 2 tokens, seed 0"),
        ({"temperature": 0.5, "top_k": 3, "min_p": 0.1}, "temperature 0.5, top_k 3, min_p 0.1, up to 2 tokens, seed 0"),
        ({"temperature": 0.0, "top_p": 0.9}, "the likeliest token each time, up to 2 tokens, seed 0"),
    ],
)
def test_sampling_in_words(changes: dict[str, float], words: str) -> None:
    assert describe_sampling(replace(CONFIG.sampling, **changes)) == words


def test_a_line_of_json_is_one_line() -> None:
    text = dialogue("a\nb", "\u2028\x85\r\n").as_text()
    assert text.count("\n") == 1
    assert json.loads(text)["messages"][0] == {"role": "user", "content": "a\nb"}


@pytest.mark.parametrize(("memory", "kept"), [(None, 3), (0, 0), (1, 1), (9, 3)])
def test_a_question_comes_with_no_more_exchanges_than_the_memory_allows(memory: int | None, kept: int) -> None:
    turns = tuple(Message(role, "a") for _ in range(3) for role in ("user", "assistant"))
    question = Message("user", "b")
    tokens, n_forgotten = Conversation(turns).prompt(question, DIALOGUES, 8, memory)
    assert tokens == DIALOGUES.encode_messages([*turns[6 - 2 * kept :], question])
    assert n_forgotten == 0
