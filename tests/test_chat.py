"""Chat: prompts within the context, replies, commands, interrupts, pipes and terminals."""

import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import pytest
from conftest import small_config
from rich.console import Console

from rustgpt_jax import tokenizers
from rustgpt_jax.config.schema import SamplingConfig
from rustgpt_jax.data import datasets
from rustgpt_jax.errors import UserError
from rustgpt_jax.inference import chat as chat_module
from rustgpt_jax.inference.chat import (
    COMMANDS,
    SETTINGS,
    Conversation,
    Session,
    Turn,
    chat,
    completions,
    describe_sampling,
)
from rustgpt_jax.inference.text_generator import Ending, TextGenerator, generate_text
from rustgpt_jax.model import transformer
from rustgpt_jax.tokenizers import Message

CONTEXT = 64
# Two tokens are generated at most, so that all prompts of the tests fall in one bucket and compile once.
CONFIG = small_config(
    **{
        "tokenizer.name": "byte",
        "tokenizer.vocab_size": 260,
        "model.vocab_size": 260,
        "model.context_length": CONTEXT,
        "model.n_layers": 1,
        "model.d_model": 16,
        "model.attention.n_heads": 2,
        "sampling.max_tokens": 2,
        "sampling.temperature": 1.0,
        "sampling.top_p": 1.0,
    }
)
TOKENIZER = tokenizers.train_tokenizer(CONFIG.tokenizer, [])
DIALOGUES = TextGenerator(transformer.init(jax.random.key(0), CONFIG.model), CONFIG.model, TOKENIZER, is_dialogue=True)
TEXTS = DIALOGUES._replace(is_dialogue=False)


def memory_console(terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=40, color_system=None)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


class RecordedSession(Session):
    """A session whose output is in memory."""

    def __init__(self, generator: TextGenerator = DIALOGUES, sampling: SamplingConfig = CONFIG.sampling) -> None:
        self.console = memory_console()
        super().__init__(generator, sampling, self.console)

    @property
    def output(self) -> str:
        return printed(self.console)

    def answer(self, *lines: str) -> str:
        """What is printed in response to the lines."""
        start = len(self.output)
        for line in lines:
            self.respond(line)
        return self.output[start:]


class Request(NamedTuple):
    """A request for a reply."""

    prompt: Sequence[int]
    sampling: SamplingConfig


FakeModel = Callable[..., list[Request]]


@pytest.fixture
def fake_model(monkeypatch: pytest.MonkeyPatch) -> FakeModel:
    """Replaces the model by fixed pieces of text, then an exception or a warning; returns the list of requests."""

    def install(*pieces: str, then: type[BaseException] | None = None, warning: str | None = None) -> list[Request]:
        requests: list[Request] = []

        def stream_text(
            generator: TextGenerator,
            prompt: Sequence[int],
            sampling: SamplingConfig,
            on_end: Callable[[Ending], object],
        ) -> Iterator[str]:
            requests.append(Request(prompt, sampling))
            yield from pieces
            if then:
                raise then
            on_end(Ending([0] * len(pieces), "stop" if warning is None else "context", warning))

        monkeypatch.setattr(chat_module, "stream_text", stream_text)
        monkeypatch.setattr(chat_module, "select_weight_layout", lambda sampling: None)
        monkeypatch.setattr(TextGenerator, "with_weight_layout", lambda generator, layout: generator)
        return requests

    return install


def reader(lines: Iterable[str | type[BaseException]]) -> Callable[[], str]:
    """Returns lines, or raises them if they are exceptions, and then EOFError."""
    remaining = iter(lines)

    def read() -> str:
        line = next(remaining, EOFError)
        if isinstance(line, str):
            return line
        raise line

    return read


def dialogue(*texts: str) -> Conversation:
    roles = ("user", "assistant") * len(texts)
    return Conversation(tuple(Message(role, text) for role, text in zip(roles, texts, strict=False)))


# Prompts.


def test_a_prompt_contains_the_whole_conversation() -> None:
    prompt, n_omitted = dialogue("a", "b").prompt(Message("user", "c"), DIALOGUES, 16)
    assert prompt == DIALOGUES.encode_messages([Message("user", "a"), Message("assistant", "b"), Message("user", "c")])
    assert n_omitted == 0


@pytest.mark.parametrize("room", [1, 10, 20, 32])
def test_only_as_many_old_messages_are_omitted_as_the_reply_needs(room: int) -> None:
    conversation, question = dialogue(*"abcdefghij" * 6), Message("user", "?")
    prompt, n_omitted = conversation.prompt(question, DIALOGUES, room)
    assert prompt == DIALOGUES.encode_messages([*conversation.messages[n_omitted:], question])
    one_more = DIALOGUES.encode_messages([*conversation.messages[n_omitted - 2 :], question])
    assert n_omitted % 2 == 0
    assert len(prompt) <= CONTEXT - room < len(one_more)


def test_a_question_may_fill_the_context_but_for_one_token() -> None:
    # The prompt also contains three special tokens.
    longest = "x" * (CONTEXT - 4)
    assert dialogue("a", "b").prompt(Message("user", longest), DIALOGUES, 16) == (DIALOGUES.encode_prompt(longest), 2)
    with pytest.raises(UserError, match=r"takes 64 tokens, and the model's context holds 64"):
        Conversation().prompt(Message("user", longest + "x"), DIALOGUES, 16)


def test_plain_text_is_continued_without_earlier_texts() -> None:
    conversation = Conversation((Message("text", "before"),))
    assert conversation.prompt(Message("text", "now"), TEXTS, 16) == (TEXTS.encode_prompt("now"), 0)


@pytest.mark.parametrize(("history_turns", "n_pairs"), [(None, 3), (0, 0), (1, 1), (9, 3)])
def test_history_turns_limits_the_exchanges_in_a_prompt(history_turns: int | None, n_pairs: int) -> None:
    conversation, question = dialogue(*"aaaaaa"), Message("user", "b")
    tokens, n_omitted = conversation.prompt(question, DIALOGUES, 8, history_turns)
    assert tokens == DIALOGUES.encode_messages([*conversation.messages[6 - 2 * n_pairs :], question])
    assert n_omitted == 0


def test_each_reply_of_each_seed_has_its_own_seed() -> None:
    seeds = [dialogue(*"ab" * n).reply_seed(seed) for n in range(50) for seed in range(50)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert Conversation().reply_seed(2**32 - 1) == 2**32 - 1


# Replies.


@pytest.mark.slow
def test_replies_are_reproducible_and_the_first_is_that_of_generate() -> None:
    [expected] = generate_text(DIALOGUES, [DIALOGUES.encode_prompt("?")], CONFIG.sampling)
    session = RecordedSession()
    first = session.answer("?", "?")
    assert session.conversation.messages[:2] == dialogue("?", expected).messages
    assert session.answer("/reset", "?", "?").endswith(first)
    assert not session.answer("/seed 1", "?", "?").endswith(first)
    assert session.answer("/seed 0", "?", "?").endswith(first)
    _, one, _, other = session.conversation.messages
    assert one != other


def test_a_reply_is_generated_from_the_conversation_with_its_own_seed(fake_model: FakeModel) -> None:
    requests = fake_model("b")
    RecordedSession().answer("a", "c")
    assert requests[1].prompt == DIALOGUES.encode_messages([*dialogue("a", "b").messages, Message("user", "c")])
    assert requests[1].sampling != requests[0].sampling == CONFIG.sampling


def test_a_full_context_is_reported_once_and_keeps_the_conversation(fake_model: FakeModel) -> None:
    fake_model("a reply of some length.")
    session = RecordedSession()
    questions = ["Why is that?"] * 4
    assert session.answer(*questions).count("from now on the oldest messages") == 1
    assert len(session.conversation.messages) == 8
    assert "oldest messages" not in session.answer("Why?")
    assert session.answer("/reset", *questions).count("from now on the oldest messages") == 1


def test_a_message_that_does_not_fit_is_an_error_and_an_empty_line_is_nothing() -> None:
    session = RecordedSession()
    expected = "The message takes 103 tokens, and the model's context holds 64: shorten it.\n"
    assert session.answer("x" * 100) == expected
    assert session.answer("", "   ") == ""
    assert session.conversation == Conversation()


def test_texts_are_shown_and_kept_with_their_whitespace(fake_model: FakeModel) -> None:
    fake_model("\tup", " a time")
    session = RecordedSession(TEXTS)
    assert session.answer("  Once ") == "  Once \tup a time\n\n"
    assert session.conversation.messages == (Message("text", "  Once \tup a time"),)


def test_an_empty_reply_is_not_kept(fake_model: FakeModel) -> None:
    fake_model()
    session = RecordedSession()
    assert "The model wrote nothing" in session.answer("Hi")
    assert session.conversation == Conversation()


def test_a_line_with_a_leading_space_is_not_a_command(fake_model: FakeModel) -> None:
    fake_model("yes")
    session = RecordedSession()
    session.respond(" /quit")
    assert session.conversation == dialogue("/quit", "yes")


def test_control_characters_are_not_printed(fake_model: FakeModel) -> None:
    harmful = "\x1b]0;title\x07 \x1b[2J \r \x08 \x9b31m \x7f"
    fake_model(harmful)
    session = RecordedSession()
    output = session.answer("Hi", "/" + harmful)
    assert not [character for character in output if character != "\n" and not character.isprintable()]
    assert session.conversation == dialogue("Hi", harmful)


def test_markup_and_long_lines_are_printed_verbatim(fake_model: FakeModel) -> None:
    text = "[bold]x[/] :smile: " + "word " * 40
    fake_model(text)
    assert RecordedSession().answer("Hi") == text + "\n\n"


# Commands.


def test_help_lists_all_commands_and_quit_ends_the_session() -> None:
    output = RecordedSession().answer("/help")
    assert all(f"{name} " in output for name in COMMANDS)
    session = RecordedSession()
    session.run(reader(["/quit", "Hi"]))
    assert session.output == ""


def test_seed_shows_and_sets_and_starts_a_new_conversation() -> None:
    session = RecordedSession()
    assert session.answer("/seed") == "seed 0\n"
    session.conversation = dialogue("a", "b")
    assert session.answer("/seed 7") == "seed 7\nStarted a new conversation.\n"
    assert session.sampling.seed == 7
    assert session.conversation == Conversation()


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


@pytest.mark.parametrize("form", ["/set {} {}", "/set {}={}", "/set  {}  =  {} "])
def test_set_changes_each_setting_of_later_replies(form: str, fake_model: FakeModel) -> None:
    assert {*VALUES, "seed"} == set(SETTINGS)
    requests = fake_model("ok")
    session = RecordedSession()
    for setting, value in VALUES.items():
        assert session.answer(form.format(setting, value)) == f"{setting} {value}\n"
    session.respond("Hi")
    assert {setting: getattr(requests[0].sampling, setting) for setting in VALUES} == VALUES
    assert session.answer("/set") == "".join(f"{name} {getattr(session.sampling, name)}\n" for name in SETTINGS)
    assert session.answer("/set top_k") == "top_k 5\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/sve talk", "Unknown command /sve. Did you mean '/save'?"),
        ("/set temprature 1", "Unknown setting 'temprature'. Did you mean 'temperature'?"),
        ("/set temperature hot", "config.sampling.temperature must be a number, got 'hot'."),
        ("/set top_p 2", "config.sampling.top_p must be at most 1, got 2."),
        ("/set top_k 1.5", "config.sampling.top_k must be a whole number, got 1.5."),
        ("/set top_k 1 2", "config.sampling.top_k must be a whole number, got '1 2'."),
        ("/seed x", "config.sampling.seed must be a whole number, got 'x'."),
        ("/seed -1", "config.sampling.seed must be at least 0, got -1."),
        ("/save", "Save to which file?"),
    ],
)
def test_an_invalid_command_is_an_error_and_changes_nothing(line: str, message: str) -> None:
    session = RecordedSession()
    assert message in session.answer(line)
    assert (session.sampling, session.conversation) == (CONFIG.sampling, Conversation())


def test_a_saved_dialogue_can_be_read_as_training_data(tmp_path: Path, fake_model: FakeModel) -> None:
    fake_model("It rains.\x1b\n")
    session = RecordedSession()
    output = session.answer("Wie ist es, schön?", "Why?", f"/save {tmp_path}/my talk")
    assert output.endswith(f"Saved to {tmp_path / 'my talk.jsonl'}, which the corpus `files` can read.\n")
    [document] = datasets.load_documents(replace(CONFIG.data, corpus="files", paths=(str(tmp_path / "*.jsonl"),)))
    assert document.messages == session.conversation.messages
    assert len(document.messages) == 4


def test_saved_texts_are_plain(tmp_path: Path, fake_model: FakeModel) -> None:
    fake_model(" went on\r\n")
    session = RecordedSession(TEXTS)
    session.answer("It", "She", f"/save {tmp_path}/texts")
    assert (tmp_path / "texts.txt").read_bytes() == b"It went on\r\n\n\nShe went on\r\n\n"


def test_save_expands_the_home_folder_and_never_overwrites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    existing = tmp_path / "existing.jsonl"
    existing.write_text("kept")
    session = RecordedSession()
    assert session.answer("/save talk") == "There is nothing to save yet.\n"
    session.conversation = dialogue("a", "b")
    session.respond("/save ~/talk.txt")
    assert (tmp_path / "talk.txt").read_text() == session.conversation.as_text()
    assert session.answer(f"/save {existing}") == f"Cannot write {existing} (File exists).\n"
    assert "(No such file or directory)" in session.answer(f"/save {tmp_path}/no/talk.jsonl")
    assert "Cannot write" in session.answer("/save .")
    assert "Cannot write" in session.answer("/save ~nobody/\0")
    assert existing.read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["existing.jsonl", "talk.txt"]


def test_a_saved_dialogue_is_one_line_of_json() -> None:
    text = dialogue("a\nb", "\u2028\x85\r\n").as_text()
    assert text.count("\n") == 1
    assert json.loads(text)["messages"][0] == {"role": "user", "content": "a\nb"}


def test_completion_offers_commands_and_then_settings() -> None:
    assert completions("") == ["/help", "/reset", "/seed ", "/set ", "/save ", "/quit"]
    assert completions("/se") == ["/seed ", "/set "]
    assert completions("/set t") == ["/set temperature ", "/set top_k ", "/set top_p "]
    assert completions("Why") == []


@pytest.mark.parametrize(
    ("changes", "description"),
    [
        ({}, "temperature 1, up to 2 tokens, seed 0"),
        ({"temperature": 0.5, "top_k": 3, "min_p": 0.1}, "temperature 0.5, top_k 3, min_p 0.1, up to 2 tokens, seed 0"),
        ({"temperature": 0.0, "top_p": 0.9}, "greedy decoding, up to 2 tokens, seed 0"),
    ],
)
def test_description_of_sampling(changes: dict[str, float], description: str) -> None:
    assert describe_sampling(replace(CONFIG.sampling, **changes)) == description


# Interrupts, pipes and terminals.


def test_an_interrupt_or_a_full_context_keeps_the_text_so_far(fake_model: FakeModel) -> None:
    for ending, note in (({"then": KeyboardInterrupt}, ""), ({"warning": "It ends here."}, "\n(It ends here.)\n")):
        fake_model("It", " is", **ending)
        session = RecordedSession()
        session.run(reader(["Why?"]))
        assert session.conversation == dialogue("Why?", "It is")
        assert session.output == f"It is{note}\n\n"


def test_an_interrupt_before_the_first_piece_keeps_nothing(fake_model: FakeModel) -> None:
    fake_model(then=KeyboardInterrupt)
    session = RecordedSession()
    session.run(reader(["Why?"]))
    assert session.conversation == Conversation()
    assert "The model wrote nothing" in session.output


def test_two_interrupts_in_a_row_end_the_session(fake_model: FakeModel) -> None:
    fake_model("ok")
    session = RecordedSession()
    session.run(reader([KeyboardInterrupt, "a", KeyboardInterrupt, "b", KeyboardInterrupt, KeyboardInterrupt, "c"]))
    assert session.conversation == dialogue("a", "ok", "b", "ok")
    assert session.output.count("Press Ctrl-C again or Ctrl-D to exit.") == 3


def test_an_interrupt_outside_of_a_reply_is_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object) -> tuple[list[int], int]:
        raise KeyboardInterrupt

    monkeypatch.setattr(Conversation, "prompt", interrupt)
    session = RecordedSession()
    session.run(reader(["Hi", "/seed"]))
    assert session.output == "\nPress Ctrl-C again or Ctrl-D to exit.\nseed 0\n"


def test_a_pipe_prints_questions_and_replies(monkeypatch: pytest.MonkeyPatch, fake_model: FakeModel) -> None:
    fake_model("Because.")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Why?\n/seed\nWhy\x1b not?"))
    console = memory_console()
    turns = chat(DIALOGUES, CONFIG.sampling, console, "title")
    assert printed(console) == "> Why?\nBecause.\n\n> /seed\nseed 0\n> Why� not?\nBecause.\n\n"
    assert turns == [Turn(message, "Because.", "stop", 1) for message in ("Why?", "Why\x1b not?")]


def test_closed_input_has_no_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert chat(DIALOGUES, CONFIG.sampling, memory_console(), "run") == []


def test_a_pipe_may_contain_any_bytes(monkeypatch: pytest.MonkeyPatch, fake_model: FakeModel) -> None:
    fake_model("Because.")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\x00\xc3\n"), encoding="utf-8"))
    console = memory_console()
    chat(DIALOGUES, CONFIG.sampling, console, "title")
    assert printed(console).startswith("> ���\n")


class Terminal(io.StringIO):
    """Standard input that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., str]:
    """Chats in a terminal in which the lines are typed, and returns what is printed."""

    def type_lines(*lines: str) -> str:
        console = memory_console(terminal=True)
        read = reader(lines)
        monkeypatch.setattr("builtins.input", lambda prompt: read())
        chat(DIALOGUES, CONFIG.sampling, console, "my run at step 5")
        return printed(console)

    monkeypatch.setenv("RUSTGPT_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "stdin", Terminal())
    return type_lines


def test_a_terminal_shows_the_model_and_the_settings(terminal: Callable[..., str]) -> None:
    output = terminal("/seed")
    size = sum(leaf.size for leaf in jax.tree.leaves(DIALOGUES.params))
    title = f"my run at step 5, {size / 1000:.3g}K parameters\n"
    assert output.startswith(f"{title}The model answers what you write, with temperature")
    assert "/help" in output
    assert output.endswith("\n\nseed 0\n")


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
