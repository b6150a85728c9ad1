"""docs/how_to/move_a_sweep.md: the sweeps of other tools, expanded by these tools, equal their translations."""

import json
import re
import runpy
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from doc_blocks import ROOT, read_blocks

from rustgpt_jax.sweeps.search import _to_optuna
from rustgpt_jax.sweeps.search_space import TPE, Categorical

FILES = {
    block.title: block.text
    for block in read_blocks((ROOT / "docs" / "how_to" / "move_a_sweep.md").read_text(encoding="utf-8"))
    if block.title
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the files of the page."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sweep_of(file: str, name: str = "sweep") -> Any:
    return runpy.run_path(file)[name]()


def test_optuna_study_has_the_space_of_its_translation(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    arguments: list[tuple[Any, ...]] = []
    project = types.ModuleType("my_project")
    project.train_and_evaluate = lambda *given: float(len(arguments.append(given) or arguments))  # type: ignore
    monkeypatch.setitem(sys.modules, "my_project", project)
    create_study = optuna.create_study
    monkeypatch.setattr(optuna, "create_study", lambda study_name, storage, load_if_exists: create_study())
    study = runpy.run_path("study.py")["study"]

    search = sweep_of("from_optuna.py")
    assert isinstance(search, TPE) and search.n_trials == len(study.trials) == len(arguments)
    theirs = study.trials[0].distributions.values()
    for (path, ours), other in zip(search.space, theirs, strict=True):
        if isinstance(ours, Categorical):
            assert ours.options == other.choices, path
        else:
            assert _to_optuna(ours) == other, path


@pytest.mark.extras
def test_hydra_multirun_has_the_trials_of_its_translation(folder: Path) -> None:
    pytest.importorskip("hydra")
    (folder / "app.py").write_text(
        "import hydra, json\n"
        "@hydra.main(version_base=None, config_path='conf', config_name='config')\n"
        "def app(cfg):\n"
        "    print('TRIAL', json.dumps([cfg.optimizer.lr, cfg.model.n_layers, cfg.seed]))\n"
        "app()\n"
    )
    done = subprocess.run([sys.executable, "app.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs = [json.loads(line) for line in re.findall("^TRIAL (.*)$", done.stdout, re.MULTILINE)]
    ours = [
        [trial[path] for path in ("optimizer.learning_rate", "model.n_layers", "seed")]
        for trial in sweep_of("from_hydra.py")
    ]
    assert ours == theirs and len(ours) == 18


@pytest.mark.extras
def test_wandb_sweep_has_the_distributions_of_its_translation(folder: Path) -> None:
    params = pytest.importorskip("sweeps.params")
    yaml = pytest.importorskip("yaml")
    config = yaml.safe_load((folder / "wandb_sweep.yaml").read_text())
    names = runpy.run_path("from_wandb.py")
    fixed = {key: value["value"] for key, value in config["parameters"].items() if "value" in value}
    swept = {key: value for key, value in config["parameters"].items() if "value" not in value}
    assert fixed == {"batch_size": names["get_config"]().training.batch_size}
    assert len(names["sweep"]()) == config["run_cap"] == names["sweep_bayes"]().n_trials
    assert names["sweep_bayes"]().space == tuple(names["SPACE"].items())
    for (key, value), (path, ours) in zip(swept.items(), names["SPACE"].items(), strict=True):
        theirs = params.HyperParameter(key, value)
        for u in (0.05, 0.3, 0.55, 0.8, 0.95):
            expected = theirs.ppf(u)
            assert ours.quantile(u) == (
                pytest.approx(expected, rel=1e-3) if not isinstance(expected, str) else expected
            ), path
