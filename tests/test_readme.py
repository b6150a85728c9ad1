"""The README and docs: their code runs, and the files, names and tests that they mention exist."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rustgpt_jax.data.datasets import CORPORA
from rustgpt_jax.model.layers import NORMS
from rustgpt_jax.model.mixers import MIXERS
from rustgpt_jax.model.mlps import FEEDFORWARDS
from rustgpt_jax.model.positions import POSITIONS
from rustgpt_jax.model.presets import FAMILIES
from rustgpt_jax.tokenizers import TOKENIZERS
from rustgpt_jax.training.optimizers import OPTIMIZERS, SCHEDULES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TABLES = {
    "TOKENIZERS": TOKENIZERS,
    "CORPORA": CORPORA,
    "NORMS": NORMS,
    "POSITIONS": POSITIONS,
    "MIXERS": MIXERS,
    "FEEDFORWARDS": FEEDFORWARDS,
    "OPTIMIZERS": OPTIMIZERS,
    "SCHEDULES": SCHEDULES,
}


CODE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
NOTEBOOK = re.findall(r"In a notebook, in any folder.*?```python\n(.*?)```", README, re.DOTALL)[0]


@pytest.mark.parametrize("code", [code for code in CODE if code != NOTEBOOK])
def test_python_in_the_readme_runs(code: str) -> None:
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.slow
def test_notebook_in_the_readme_runs_in_any_folder(tmp_path: Path) -> None:
    """The package is on the path, as after an installation from its sources, but nothing beside it is."""
    (tmp_path / "installed").mkdir()
    (tmp_path / "installed" / "rustgpt_jax").symlink_to(ROOT / "rustgpt_jax")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed"), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", NOTEBOOK], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert re.fullmatch(r"(step \d: loss \d\.\d+\n){3}", done.stdout), done.stdout + done.stderr


def test_readme_lists_every_family() -> None:
    assert [name for name in FAMILIES if f"| `{name}`" not in README] == []


@pytest.mark.parametrize("name", TABLES)
def test_readme_lists_every_component(name: str) -> None:
    (row,) = (line for line in README.splitlines() if line.startswith(f"| `{name}`"))
    missing = [entry for entry in TABLES[name] if f"`{entry}`" not in row]
    assert not missing


@pytest.mark.parametrize(
    "link", re.findall(r"\]\((?!http)([^)#]+)\)", README) + re.findall(r"`(tests/\w+\.py)`", README)
)
def test_files_in_the_readme_exist(link: str) -> None:
    assert (ROOT / link).exists()


def test_readme_lists_every_config() -> None:
    configs = {path.name for path in (ROOT / "configs").glob("*.py")} - {"base.py"}
    assert configs == set(re.findall(r"^\| \[(\w+\.py)\]\(configs/", README, re.MULTILINE))


DOCS = ROOT / "docs"
PAGES = {str(page.relative_to(DOCS)): page.read_text(encoding="utf-8") for page in DOCS.rglob("*.md")}
GUARANTEES = PAGES["concepts/reproducibility.md"] + PAGES["how_to/scaling.md"] + PAGES["concepts/security.md"]


def test_no_placeholders_are_left() -> None:
    assert re.findall(r"^[A-Z]+$", GUARANTEES + README, re.MULTILINE) == []


def find_tests(text: str) -> list[str]:
    """Return the names of the tests in a page."""
    return sorted(set(re.findall(r"`(tests/[\w/]+\.py::\w+)`", text)))


def markers_of(name: str) -> set[str]:
    """Return the markers of a test function, without those of its parameters."""
    file, test = name.split("::")
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == test)
    return {ast.unparse(decorator).removeprefix("pytest.mark.") for decorator in function.decorator_list}


@pytest.mark.parametrize("name", find_tests(GUARANTEES))
def test_tests_of_guarantees_run_in_ci_unless_marked_long(name: str) -> None:
    is_long = not markers_of(name).isdisjoint(("long", "faults"))
    assert is_long == (f"`{name}` (`pytest -m long`)" in GUARANTEES)


@pytest.mark.parametrize("name", find_tests(PAGES["testing.md"]))
def test_smaller_forms_of_guarantees_run_by_default(name: str) -> None:
    assert markers_of(name).isdisjoint(("slow", "long", "faults"))


def test_speeds_in_the_readme_are_those_of_the_table() -> None:
    section = README.split("## How fast")[1].split("\n## ")[0]
    goals = PAGES["performance.md"].split("<!-- begin: goals -->")[1].split("<!-- end: goals -->")[0]
    quoted = re.findall(r"\d\.\d\dx|-?\d+\.\d%", section)
    assert quoted and not [figure for figure in quoted if f"| {figure} (" not in goals]


def test_files_named_in_ci_exist() -> None:
    lists = re.findall(r"tests/test_\{([\w,]+)\}\.py", (ROOT / ".ci" / "run").read_text(encoding="utf-8"))
    assert len(lists) == 2
    assert not [name for names in lists for name in names.split(",") if not (ROOT / f"tests/test_{name}.py").exists()]
