"""The code blocks, commands and notebooks of the documentation work as written."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from doc_blocks import ROOT, Block, read_blocks, rustgpt_arguments, split_commands, with_flags

from rustgpt_jax.config.validation import check_value, parse_overrides, resolve
from rustgpt_jax.errors import UserError
from rustgpt_jax.training.config_checks import validate_components

DOCS = ROOT / "docs"
FOLDERS = ("tutorials", "how_to", "concepts")
PAGES = [
    ROOT / "README.md",
    DOCS / "get_started.md",
    *(page for name in FOLDERS for page in (DOCS / name).glob("*.md")),
]
PAGES = sorted(page for page in PAGES if page.exists())
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))
# Other programs that pages may call.
PROGRAMS = {
    "bash",
    "cd",
    "cp",
    "curl",
    "exit",
    "export",
    "git",
    "head",
    "hf",
    "jupyter",
    "ls",
    "mkdir",
    "printf",
    "python",
}
PROGRAMS |= {
    "sbatch",
    "scontrol",
    "srun",
    "status=$?",
    "tensorboard",
    "[",
    "uv",
    "kubectl",
    "sky",
    "ray",
    "wandb",
    "mlflow",
}

# What a page expects to find in its folder, as Markdown.
SETUP = {
    "README.md": """
```python
open("my_text.txt", "w").write("Once upon a time there was a small model that read this line. " * 200)
```
""",
    "docs/tutorials/your_own_text.md": """
```python title="datasets.py"
def load_dataset(name, split, streaming):
    assert (name, split, streaming) == ("Skylion007/openwebtext", "train", True)
    return ({"text": f"Document {number} has some words about the number {number * 17}."} for number in range(300))
```
```python
import json
from importlib import resources

facts = json.loads((resources.files("rustgpt_jax.data") / "texts" / "facts.json").read_text())
open("tinyshakespeare.txt", "w").write("\\n".join(facts))
```
""",
    "docs/tutorials/fine_tune.md": """
```sh
rustgpt train --config=tiny --run=runs/source --config.tokenizer.name=bpe --config.tokenizer.vocab_size=400 \\
  --config.data.corpus=chat --config.data.seq_len=32 --config.model.context_length=128 \\
  --config.training.steps=10 --config.logging.eval_batches=1
rustgpt export runs/source --to=SmolLM2-135M-Instruct
```
""",
}


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture
def no_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A usage error raises SystemExit instead of ending the process."""

    def fail(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(os, "_exit", fail)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_and_code_are_valid(
    page: Path, no_exit: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every verb, flag and field exists, and every config is valid; Python compiles."""
    monkeypatch.chdir(tmp_path)
    link_checkout(page, tmp_path)
    for block in read_blocks(SETUP.get(name_of(page), "")) + read_blocks(page.read_text(encoding="utf-8")):
        where = f"{name_of(page)}:{block.line}"
        assert all(block.markers.values()), f"{where}: a marker without a reason or flags"
        if block.language == "python":
            compile(block.text, where, "exec")
        if block.title:
            (tmp_path / block.title).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / block.title).write_text(block.text)
        for line in block.command_lines:
            for words in split_commands(line):
                problem = find_problem(words, block, capsys)
                assert problem == expected_error(block, line), f"{where}: {line}"


def link_checkout(page: Path, folder: Path) -> None:
    """Put the files of a checkout that the README mentions into a folder; other pages need only the package."""
    for name in ("launch.py", "configs", "experiments") if page.name == "README.md" else ():
        (folder / name).symlink_to(ROOT / name)


def expected_error(block: Block, line: str) -> str | None:
    """Return the error message that a transcript shows after a command."""
    shown = block.text.partition(f"$ {line}\n")[2]
    return shown.splitlines()[0].removeprefix("error: ") if shown.startswith("error: ") else None


def find_problem(words: list[str], block: Block, capsys: pytest.CaptureFixture[str]) -> str | None:
    """Return the error message of a command that cannot work, or None."""
    arguments = rustgpt_arguments(words)
    if arguments is None:
        return find_problem_of_program([word for word in words if not re.match(r"[A-Z_]+=", word)])
    try:
        check_arguments(arguments)
        check_arguments(with_flags(arguments, block))
    except UserError as error:
        return str(error)
    except SystemExit as error:
        return capsys.readouterr().err.strip().removeprefix("error: ") if error.code else None
    return None


def check_arguments(arguments: list[str]) -> None:
    """Parse a command line and resolve the config that it names, unless it is a placeholder or the folder of a run."""
    from rustgpt_jax.cli.arguments import read_config
    from rustgpt_jax.cli.main import parse_args

    args = parse_args(["rustgpt", *arguments])
    for path, value in parse_overrides(args.overrides).items():
        check_value(path, value)
    config = getattr(args, "config", None)
    if config is not None and not config.isupper():
        resolved = resolve(*read_config(args, platform="cpu")[:2])
        # An import path may name a file that the reader would write.
        if not any(":" in text for _, text in args.overrides):
            validate_components(resolved)


def find_problem_of_program(words: list[str]) -> str | None:
    if not words or words[0] in PROGRAMS - {"python"}:
        return None
    if words[0] != "python":
        return f"unknown program {words[0]!r}"
    if words[1:4] == ["-m", "pip", "install"]:
        extras = {
            extra for word in words for listed in re.findall(r"\[([\w,]+)\]", word) for extra in listed.split(",")
        }
        table = (
            (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
        )
        unknown = extras - set(re.findall(r"^(\w+) =", table, re.MULTILINE))
        return f"unknown extras {sorted(unknown)}" if unknown else None
    if words[1] == "-m":
        return None if find_spec(words[2].partition(".")[0]) else f"unknown module {words[2]!r}"
    return None if (ROOT / words[1]).exists() or Path(words[1]).exists() else f"unknown file {words[1]!r}"


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(map(Block.is_run.fget, read_blocks(page.read_text())))], ids=name_of
)
@pytest.mark.slow
def test_page_runs(page: Path, tmp_path: Path) -> None:
    """All blocks of a page run in order, in one process and an empty folder."""
    link_checkout(page, tmp_path)
    (tmp_path / ".setup.md").write_text(SETUP.get(name_of(page), ""), encoding="utf-8")
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_NUMPY_RANK_PROMOTION": "allow",
        "MPLBACKEND": "Agg",
    }
    command = [sys.executable, str(ROOT / "tests" / "doc_blocks.py"), ".setup.md", str(page)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def code_cells(notebook: Path) -> list[str]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name_of)
def test_notebook_is_valid_and_small(notebook: Path) -> None:
    document = json.loads(notebook.read_text(encoding="utf-8"))
    assert document["nbformat"] == 4 and notebook.stat().st_size < 200_000
    for number, cell in enumerate(code_cells(notebook)):
        compile(cell, f"{notebook.name}, cell {number}", "exec")


@pytest.mark.extras
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name_of)
def test_notebook_runs(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    pytest.importorskip("pandas")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    document: Any = nbformat.read(notebook, as_version=4)
    nbformat.validate(document)
    nbclient.NotebookClient(document, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
