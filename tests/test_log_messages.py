"""Log messages: `--verbosity`, and errors that a library logs before it raises them."""

import io
import logging
import time
from pathlib import Path

import pytest
from absl import logging as absl_logging
from absl.flags import FLAGS

from rustgpt_jax.cli.log_messages import HeldErrors
from rustgpt_jax.cli.main import EXIT_STATUSES, parse_args

ROOT = Path(__file__).parent.parent


@pytest.fixture
def library() -> logging.Logger:
    """A logger with one handler, which writes to `stream` of the handler."""
    logger = logging.Logger("library", logging.WARNING)
    logger.addHandler(logging.StreamHandler(io.StringIO()))
    return logger


def log_all(library: logging.Logger) -> None:
    library.info("details")
    library.warning("a warning")
    library.error("an error")
    try:
        _ = 1 / 0
    except ZeroDivisionError:
        library.exception("cannot save")


def shown(library: logging.Logger) -> str:
    (handler,) = library.handlers
    return handler.stream.getvalue()  # type: ignore[attr-defined]


def test_errors_with_a_traceback_are_shown_when_they_are_released(library: logging.Logger) -> None:
    held = HeldErrors(library.handlers[0])
    log_all(library)
    assert shown(library) == "a warning\nan error\n"
    held.release()
    assert shown(library).startswith("a warning\nan error\ncannot save\nTraceback ")
    log_all(library)
    assert shown(library).count("cannot save\nTraceback ") == 2


def test_errors_of_a_command_that_continues_are_shown(library: logging.Logger) -> None:
    HeldErrors(library.handlers[0], seconds=0.01)
    log_all(library)
    deadline = time.monotonic() + 10
    while "ZeroDivisionError" not in shown(library):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    "words, level",
    {
        (): -1,
        ("--verbosity=info",): 0,
        ("--verbosity", "DEBUG"): 1,
        ("-v", "error"): -2,
        ("-v=2",): 2,
        ("--verbosity=-3",): -3,
    }.items(),
)
def test_verbosity_is_a_name_or_a_number(words: tuple[str, ...], level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FLAGS["verbosity"], "using_default_value", True)
    try:
        parse_args(["rustgpt", "explain", "--config=tiny", *words])
        assert FLAGS.verbosity == level
    finally:
        absl_logging.set_verbosity(absl_logging.WARNING)


def test_exit_statuses_are_those_of_the_docs() -> None:
    page = (ROOT / "docs" / "reference" / "command_line.md").read_text(encoding="utf-8")
    table = page.split("## Exit status")[1].split("\n## ")[0]
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]
    assert rows == ["status", *EXIT_STATUSES]
