"""The README and docs: their code runs, their links resolve, and the files, names and tests that they mention exist."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from rustgpt_jax.cli.main import VERBS
from rustgpt_jax.config.schema import FIELDS
from rustgpt_jax.data.datasets import CORPORA
from rustgpt_jax.model.layers import NORMS
from rustgpt_jax.model.mixers import MIXERS
from rustgpt_jax.model.mlps import FEEDFORWARDS
from rustgpt_jax.model.positions import POSITIONS
from rustgpt_jax.model.presets import FAMILIES
from rustgpt_jax.tokenizers import TOKENIZERS
from rustgpt_jax.training.optimizers import OPTIMIZERS, SCHEDULES

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {str(page.relative_to(DOCS)): page.read_text(encoding="utf-8") for page in DOCS.rglob("*.md")}
GUARANTEES = PAGES["concepts/reproducibility.md"] + PAGES["how_to/scaling.md"] + PAGES["concepts/security.md"]
# Every page by its path in the repository.
TEXTS = {f"docs/{name}": text for name, text in PAGES.items()} | {
    file.name: file.read_text(encoding="utf-8") for file in ROOT.glob("*.md")
}
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
PYTHON = r"```python\n(.*?)```"
MAX_WORDS = 1000


# The README.


def test_readme_is_short() -> None:
    assert len(README.split()) <= MAX_WORDS


@pytest.mark.slow
def test_pure_functions_of_the_reference_run_in_any_folder(tmp_path: Path) -> None:
    """The checkout is on the path, as after `pip install -e .`, but is not the current folder."""
    (code,) = re.findall(PYTHON, PAGES["reference/python.md"], re.DOTALL)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert re.fullmatch(r"(step \d: loss \d\.\d+\n){3}", done.stdout), done.stdout + done.stderr


# Links.


@pytest.mark.parametrize("page", TEXTS)
def test_links_and_tests_of_a_page_exist(page: str) -> None:
    text = re.sub(r"^(`{3,}).*?^\1`*$", "", TEXTS[page], flags=re.DOTALL | re.MULTILINE)
    links = re.findall(r"(?:\]\(|src=\")(?!\w+:|#)([^)\"\s#]+)", text)
    broken = [link for link in links if not ((ROOT / page).parent / link).exists()]
    broken += [test for test in re.findall(r"`(tests/[\w/]+\.py)[`:]", text) if not (ROOT / test).exists()]
    assert not broken


def test_every_page_is_in_the_nav() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:")[1]
    expected = {f"source/{name}" for name in ("AGENTS.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")}
    expected |= {str(file.relative_to(DOCS).with_suffix(".md")) for file in DOCS.rglob("*.ipynb")}
    assert set(re.findall(r"[:-] ([\w/.-]+\.md)$", nav, re.MULTILINE)) == expected | set(PAGES)


# Tables and the generated reference.


def test_import_guide_lists_every_family() -> None:
    assert [name for name in FAMILIES if f"| `{name}`" not in PAGES["how_to/import_export.md"]] == []


@pytest.mark.parametrize("name", TABLES)
def test_reference_lists_every_component(name: str) -> None:
    (row,) = (line for line in PAGES["reference/components.md"].splitlines() if line.startswith(f"| `{name}`"))
    missing = [entry for entry in TABLES[name] if f"`{entry}`" not in row]
    assert not missing


def test_reference_lists_every_recipe_and_experiment() -> None:
    listed = re.findall(r"^\| \[\w+\.py\]\(\.\./\.\./(\w+/\w+\.py)\)", PAGES["reference/recipes.md"], re.MULTILINE)
    files = [*(ROOT / "configs").glob("*.py"), *(ROOT / "experiments").glob("*.py")]
    assert {str(file.relative_to(ROOT)) for file in files} - {"configs/base.py"} == set(listed)


def load_hooks() -> ModuleType:
    """Return the module that generates the reference when the site is built."""
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    assert spec is not None and spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    return hooks


def test_generated_reference_has_every_knob_and_verb() -> None:
    hooks = load_hooks()
    assert "<!-- generated: knobs -->" in PAGES["reference/config.md"]
    assert "<!-- generated: verbs -->" in PAGES["reference/command_line.md"]
    knobs, verbs = hooks.knobs(), hooks.verbs()
    assert [path for path in (*FIELDS, "stages") if f"`{path}`{{ #{path} }}\n:   " not in knobs] == []
    assert re.findall(r"^## (\w+)$", verbs, re.MULTILINE) == list(VERBS)
    assert verbs.count("`--json`\n:   ") == 1 and verbs.index("`--json`") < verbs.index("## train")
    assert "`--init_from=RUN[@STEP]`\n:   Begin a new run" in verbs and "%(default)s" not in verbs


@pytest.mark.extras
def test_site_builds_without_warnings(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings_handlers.python")
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'id="optimizer.learning_rate"' in (tmp_path / "reference" / "config.html").read_text()
    assert "Return float32 logits_BTV" in (tmp_path / "reference" / "python.html").read_text()
    # Reading the site needs no network.
    for page in tmp_path.rglob("*.html"):
        assert not re.findall(r"<(?:script|img|link rel=\"stylesheet\")[^>]*(?:src|href)=\"https?:", page.read_text())


# Guarantees and figures.


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


def test_summarized_speeds_are_those_of_the_table() -> None:
    section = PAGES["performance.md"].split("## Summary")[1].split("\n## ")[0]
    goals = PAGES["performance.md"].split("<!-- begin: goals -->")[1].split("<!-- end: goals -->")[0]
    quoted = re.findall(r"\d\.\d\dx|-?\d+\.\d%", section)
    assert quoted and not [figure for figure in quoted if f"| {figure} (" not in goals]


def test_files_named_in_ci_exist() -> None:
    lists = re.findall(r"tests/test_\{([\w,]+)\}\.py", (ROOT / ".ci" / "run").read_text(encoding="utf-8"))
    assert len(lists) == 2
    assert not [name for names in lists for name in names.split(",") if not (ROOT / f"tests/test_{name}.py").exists()]
