"""Names, prompts, values and file names are printed literally, not as rich's markup."""

import ast
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import small_config
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table
from small_runs import train
from synthetic_sweep import grid, write_sweep
from test_architecture import TREES

from rustgpt_jax.tracking.console import PlainTextConsole, show_progress, show_spinner

HOSTILE = "[INST] [bold]hi[/b] [/INST] :smile: [link=x] \\[ [@click=y]"


def shown(show: Callable[[Console], Any], **options: Any) -> str:
    """Return what a function prints on a wide console."""
    out = io.StringIO()
    show(PlainTextConsole(file=out, width=1000, **options))
    return out.getvalue()


@given(
    st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z", "M"]) | st.sampled_from("[]/:\\ a"), max_size=20)
)
@example(HOSTILE)
@example("[/INST]")
def test_strings_are_shown_literally(text: str) -> None:
    text = f"<{text}>"
    table = Table(text, title=text)
    table.add_row(text)
    for show in (
        lambda console: console.print(text, style="bold", markup=True),
        lambda console: console.print(table, markup=True, emoji=True),
    ):
        assert set(shown(show).split("\n")) >= {text} or text in shown(show)
    assert shown(lambda console: console.print(table)).count(text) == 3


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert shown(lambda console: console.print("a\x1b[2J\x07b\tc")).startswith("a\ufffd[2J\ufffdb")


@pytest.mark.parametrize("is_terminal", [False, True])
def test_spinner_text_is_shown_literally(is_terminal: bool) -> None:
    def show(console: Console) -> None:
        with show_spinner(console, HOSTILE):
            pass
        with show_progress(console, HOSTILE) as progress:
            progress(1, 2)

    assert (HOSTILE in shown(show, force_terminal=is_terminal)) == is_terminal


# All modules use the same console.


def calls(module: str) -> list[tuple[str, ast.Call]]:
    """Return the calls of a module with the last names of the called functions."""
    found = [node for node in ast.walk(TREES[module]) if isinstance(node, ast.Call)]
    return [(ast.unparse(call.func).rsplit(".", 1)[-1], call) for call in found]


# Functions that interpret markup regardless of the console.
READERS_OF_MARKUP = {"from_markup", "render_markup", "Panel", "Prompt", "Confirm", "Spinner", "RichHandler", "track"}


def test_all_modules_use_the_plain_text_console() -> None:
    every_call = [(module, *found) for module in TREES for found in calls(module)]
    for module, name, call in every_call:
        arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert name != "Console", f"{module}: a console is a PlainTextConsole"
        assert name not in READERS_OF_MARKUP, f"{module}: {name} reads markup"
        assert arguments.get("markup") in (None, "False"), f"{module}: {name} reads markup"
        assert name != "TextColumn" or "markup" in arguments, f"{module}: TextColumn reads markup"
        assert name != "status" or ast.unparse(call.args[0]).startswith("Text("), f"{module}: status reads markup"


# The verbs.


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, quick_compilation: None) -> Path:
    """A run with markup in its name, prompt and text file."""
    folder = tmp_path_factory.mktemp("runs") / "a" / "x[/INST]"
    text = folder.parent.parent / "text[/b].txt"
    text.parent.mkdir(parents=True)
    text.write_text("The rain fell, and it did not stop. " * 40, encoding="utf-8")
    files = {"data.corpus": "files", "data.paths": (str(text),), "data.split": "tail"}
    train(folder, **files, **{"logging.sample_prompts": ("[/INST]",), "training.steps": 2, "logging.eval_every": 2})
    return folder


@pytest.mark.slow
def test_verbs_show_names_literally(run: Path) -> None:
    from rustgpt_jax.cli.evaluation_report import print_evaluation
    from rustgpt_jax.reproduce.replay import replay
    from rustgpt_jax.reproduce.run_diff import diff
    from rustgpt_jax.training import run_training
    from rustgpt_jax.training.load_model import load_model

    config = load_model(run, "last").config
    assert "[/INST]" in shown(lambda console: run_training.train(config, run, {}, console))
    assert "perplexity" in shown(lambda console: print_evaluation(load_model(run, "last"), console))
    assert "[/INST]" in shown(lambda console: replay(run, 2, False, console))
    assert shown(lambda console: diff(run, run, console))


def test_explain_shows_values_and_origins_literally() -> None:
    from rustgpt_jax.planning.report import print_config_summary, summarize_config

    config = small_config(**{"logging.sample_prompts": (HOSTILE,), "data.paths": ("[/b].txt",)})
    origins = {"logging.sample_prompts": "lab[/b].py"}
    printed = shown(lambda console: print_config_summary(summarize_config(config, origins, console), console))
    assert repr((HOSTILE,)) in printed
    assert "('[/b].txt',)" in printed and "lab[/b].py" in printed


def test_sweep_report_shows_name_and_values_literally(tmp_path: Path) -> None:
    from rustgpt_jax.sweeps.report import report

    trials = grid(**{"logging.sample_prompts": ([HOSTILE], ["[/b]"]), "seed": (0, 1)})
    folder = write_sweep(tmp_path / "sweep[b]", trials)
    printed = shown(lambda console: report(folder, console))
    assert HOSTILE in printed and "[/b]" in printed and "sweep[b]" in printed
