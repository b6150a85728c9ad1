"""Folders of sweeps with random edits: corrupt entries are skipped or named, or the folder is refused in one line."""

import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# The first import writes a list of fonts to the user's folder, which must not happen during a case.
import matplotlib.font_manager as _fonts
import pytest
from conftest import small_tree
from fuzzing import Sandbox, ShortBytes, corrupt_bytes, edit_tree, max_cases, run_or_refuse, write
from fuzzing import sandbox as sandbox
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

sys.path.append(str(Path(__file__).parent.parent))
from synthetic_sweep import grid, trial_id, write_sweep

from rustgpt_jax.data.preprocess import AssetCache
from rustgpt_jax.sweeps import choice, log_uniform, search, tpe
from rustgpt_jax.sweeps.report import report
from rustgpt_jax.sweeps.report.results import group_by_setting, read_results
from rustgpt_jax.sweeps.sweep_dir import Ledger, SweepDir, is_done_until

assert _fonts.fontManager
TRIALS = grid(optimizer__learning_rate=(1e-3, 1e-2), seed=(0, 1))


def status(overrides: dict[str, Any]) -> str:
    """One trial of four diverged, and another failed."""
    kinds = {(1e-2, 0): "diverged", (1e-2, 1): "failed"}
    return kinds.get((overrides["optimizer.learning_rate"], overrides["seed"]), "finished")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a sweep by their names."""
    listed = [trial_id(overrides) for overrides in TRIALS]
    folder = write_sweep(tmp_path_factory.mktemp("sweeps") / "sweep", TRIALS, status, eval_every=50)
    about = json.loads((folder / "sweep.json").read_bytes()) | {"trials": listed}
    (folder / "sweep.json").write_text(json.dumps(about))
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def lines_of(data: bytes) -> list[Any]:
    """The values of the lines of a file of JSON."""
    return [json.loads(line) for line in data.splitlines()]


def as_lines(rows: Any) -> bytes:
    """Values as lines of JSON."""
    listed = rows if isinstance(rows, list) else [rows]
    return ShortBytes("".join(json.dumps(row) + "\n" for row in listed).encode(errors="surrogatepass"))


def edits(name: str, data: bytes) -> st.SearchStrategy[bytes | None]:
    """Edits of a file: of its bytes or of its values, its deletion, or a folder instead of it."""
    if name == "sweep.json":
        values = edit_tree(json.loads(data)).map(
            lambda value: ShortBytes(json.dumps(value).encode(errors="surrogatepass"))
        )
    else:
        values = edit_tree(lines_of(data)).map(as_lines)
    return values | values | corrupt_bytes(data) | st.none()


def put(folder: Path, files: dict[str, bytes], name: str, data: bytes | None) -> None:
    """Write a sweep with one file replaced."""
    for other, content in files.items():
        write(folder / other, data if other == name else content)


def read_all(folder: Path) -> None:
    """Read a sweep as commands and workers do."""
    ledger = Ledger(folder / "ledger.jsonl")
    for state in (run_or_refuse(ledger.states) or {}).values():
        is_done_until(state, 3)
    results = run_or_refuse(lambda: read_results(folder))
    if results is not None:
        assert {trial.id for setting in group_by_setting(results) for trial in setting.trials} == {
            trial.id for trial in results.trials
        }


METRICS = f"trials/{trial_id(TRIALS[0])}/metrics.jsonl"
NAMES = st.sampled_from(("sweep.json", "ledger.jsonl", "ledger.jsonl", METRICS))


def test_the_sweep_works(sandbox: Sandbox, whole: dict[str, bytes]) -> None:
    with sandbox.case() as folder:
        put(folder, whole, "", None)
        assert report(folder, Console(file=io.StringIO())).exists()
        assert read_results(folder).counts == {"finished": 2, "diverged": 1, "failed": 1}


@max_cases(400)
@given(data=st.data())
def test_sweeps_with_edits_are_read(sandbox: Sandbox, whole: dict[str, bytes], data: st.DataObject) -> None:
    name = data.draw(NAMES)
    with sandbox.case() as folder:
        put(folder, whole, name, data.draw(edits(name, whole[name])))
        read_all(folder)


@max_cases(60)
@given(data=st.data())
def test_sweeps_with_edits_are_reported_on(sandbox: Sandbox, whole: dict[str, bytes], data: st.DataObject) -> None:
    name = data.draw(NAMES)
    with sandbox.case() as folder:
        put(folder, whole, name, data.draw(edits(name, whole[name])))
        run_or_refuse(lambda: report(folder, Console(file=io.StringIO())))


# The journal of a search.

SEARCH = tpe(
    5, {"optimizer.learning_rate": log_uniform(1e-4, 1e-1), "schedule.warmup_steps": choice(None, 1, (2,), 3)}, batch=2
)


class Untrained:
    """A sweep whose trials are not trained."""

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.folder, self.assets, self.stop = SweepDir(path), AssetCache(), False

    def add(self, trials: Sequence[Any]) -> None:
        """Nothing."""

    def run(self, trials: Sequence[Any]) -> None:
        """Nothing."""


def searched(path: Path) -> list[str]:
    """Run a search whose loss is the learning rate."""
    return search.run_tpe(Untrained(path), SEARCH, small_tree(), {})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The journal of a completed search."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "_final_loss", lambda sweep, trial: trial.config.optimizer.learning_rate)
        path = tmp_path_factory.mktemp("search")
        # Two of the warmup options are not integers, and so are skipped.
        assert searched(path)
        return SweepDir(path).study_file.read_bytes()


@max_cases(40)
@given(data=st.data())
def test_journals_of_searches_with_edits(
    sandbox: Sandbox, journal: bytes, monkeypatch: pytest.MonkeyPatch, data: st.DataObject
) -> None:
    monkeypatch.setattr(search, "_final_loss", lambda sweep, trial: trial.config.optimizer.learning_rate)
    n_lines = data.draw(st.integers(1, journal.count(b"\n")))
    begun = b"".join(journal.splitlines(keepends=True)[:n_lines])
    with sandbox.case() as folder:
        write(folder / "study.journal", data.draw(edits("study.journal", begun)))
        run_or_refuse(lambda: searched(folder))
