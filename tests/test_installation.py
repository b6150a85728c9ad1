"""The installed package: recipes by name, the program's name in messages, and the wheel in an empty environment."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from ml_collections import ConfigDict

import rustgpt_jax
from rustgpt_jax.config.config_files import list_recipes
from rustgpt_jax.config.validation import resolve
from rustgpt_jax.errors import PROGRAM_VARIABLE, UserError, program_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


# Recipes.


def test_every_config_and_experiment_is_a_recipe_with_its_own_name() -> None:
    files = [*(ROOT / "configs").glob("*.py"), *(ROOT / "experiments").glob("*.py")]
    assert set(list_recipes().values()) == set(files)
    assert len(list_recipes()) == len(files)


def test_a_recipe_is_loaded_by_name_in_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # A file or folder with the name of a recipe does not replace it, but a path does.
    (tmp_path / "base").write_text("1 / 0\n")
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny.py").write_text("def get_config():\n    return {'seed': 5}\n")
    tiny = rustgpt_jax.load_config("tiny")
    assert isinstance(tiny, ConfigDict)
    assert resolve(tiny) == resolve(rustgpt_jax.load_config(ROOT / "configs" / "tiny.py"))
    assert rustgpt_jax.load_config("tiny.py").to_dict() == {"seed": 5}


def test_a_loaded_config_is_new_and_follows_its_file(tmp_path: Path) -> None:
    first = rustgpt_jax.load_config("rustgpt")
    first.model.n_layers, first.stages[0].training.steps = 7, 7
    assert rustgpt_jax.load_config("rustgpt").model.n_layers == 2
    assert rustgpt_jax.load_config("rustgpt").stages[0].training.steps == 100
    file = tmp_path / "mine.py"
    for seed in (1, 2):
        file.write_text(
            "from rustgpt_jax import load_config\n\n"
            f"def get_config():\n    config = load_config('tiny')\n    config.seed = {seed}\n    return config\n"
        )
        assert rustgpt_jax.load_config(file).seed == seed


@pytest.mark.parametrize(
    "name, message",
    {
        "rustgtp": "There is no recipe 'rustgtp', and no file of that name. Did you mean 'rustgpt'?",
        "configs/tiny.py": "The config file configs/tiny.py does not exist. Did you mean the recipe 'tiny'?",
        "runs": "There is no recipe 'runs', and no file of that name. `rustgpt configs` lists the recipes.",
        "nothing/like.py": "The config file nothing/like.py does not exist.",
    }.items(),
)
def test_an_unknown_config_is_an_error_with_the_nearest_name(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        rustgpt_jax.load_config(name)
    assert str(error.value).startswith(message)
    assert ("Did you mean" in str(error.value)) == ("Did you mean" in message)


# Names.


def test_type_checkers_see_the_public_names() -> None:
    stub = (ROOT / "rustgpt_jax" / "__init__.pyi").read_text(encoding="utf-8")
    listed = re.findall(r"^from (\S+) import (\w+) as \2$", stub, re.MULTILINE)
    assert {name: module for module, name in listed} == rustgpt_jax._MODULES
    for name, module in rustgpt_jax._MODULES.items():
        assert getattr(rustgpt_jax, name) is getattr(importlib.import_module(module), name)
        assert name in dir(rustgpt_jax)
    with pytest.raises(AttributeError, match="no attribute 'load_confg'"):
        rustgpt_jax.load_confg  # noqa: B018 (reading the name raises)


@pytest.mark.parametrize(
    "argument, name",
    {
        "launch.py": "python launch.py",
        "/home/me/code/launch.py": "python launch.py",
        "/opt/env/lib/rustgpt_jax/__main__.py": "python -m rustgpt_jax",
        "/opt/env/lib/pytest/__main__.py": "rustgpt",
        "/opt/env/bin/rustgpt": "rustgpt",
        "-c": "rustgpt",
        "": "rustgpt",
    }.items(),
)
def test_messages_name_the_program_as_it_was_called(argument: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [argument, "train"])
    assert program_name() == name
    # The name in the parent process.
    monkeypatch.setenv(PROGRAM_VARIABLE, "python launch.py")
    assert program_name() == "python launch.py"


# The wheel.

Run = Callable[..., subprocess.CompletedProcess[str]]
FEW_STEPS = ["--config.training.steps=12", "--config.logging.eval_every=12", "--config.logging.checkpoint_every=12"]
SWEPT = """
from rustgpt_jax import load_config
from rustgpt_jax.sweeps import values

def get_config():
    return load_config("tiny")

def sweep():
    return values("optimizer.learning_rate", 1e-3, 1e-2)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the files that git tracks or would track."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    names = ("rustgpt_jax", "configs", "experiments", "launch.py", "pyproject.toml", "README.md", "LICENSE")
    for name in names:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, folder / name)
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder / "dist")]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return next((folder / "dist").glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_has_the_recipes_and_metadata_and_nothing_at_its_top(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
        (scripts,) = (archive.read(name).decode() for name in names if name.endswith(".dist-info/entry_points.txt"))
    assert {name.split("/")[0] for name in names} == {"rustgpt_jax", f"rustgpt_jax-{PROJECT['version']}.dist-info"}
    packaged = {f"rustgpt_jax/{file.relative_to(ROOT)}" for file in list_recipes().values()}
    assert {name for name in names if name.startswith(("rustgpt_jax/configs", "rustgpt_jax/experiments"))} == packaged
    files = [path for path in (ROOT / "rustgpt_jax").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert {path.relative_to(ROOT).as_posix() for path in files} <= set(names)
    assert "License-Expression: Apache-2.0\n" in metadata and "Version: 0.2.0\n" in metadata
    assert not re.search("^Author", metadata, re.MULTILINE) and "Classifier: Typing :: Typed\n" in metadata
    assert "rustgpt = rustgpt_jax.cli.main:run_command" in scripts


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A function that runs a program of an environment that has the wheel, in an empty folder outside the checkout.

    The dependencies are those of the environment of the tests, and are found after the wheel.
    """
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*install, str(wheel)], check=True)
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    (folder / "work").mkdir()
    unset = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PATH": f"{python.parent}:{os.environ['PATH']}"}

    def run(*words: str, code: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(words, cwd=folder / "work", env=environment | variables, capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        return done

    run.folder = folder / "work"  # type: ignore[attr-defined]
    return run


@pytest.mark.slow
def test_the_wheel_works_outside_a_checkout(installed: Run) -> None:
    """One test, since each command depends on those before it."""
    work: Path = installed.folder  # type: ignore[attr-defined]
    assert installed("rustgpt", "--version").stdout == f"rustgpt {PROJECT['version']}\n"
    shown = installed("rustgpt", "--help").stdout
    assert "usage: rustgpt VERB" in shown and "launch.py" not in shown
    assert "Example:  rustgpt train --config=rustgpt" in installed("rustgpt", "train", "--help").stdout
    wrong = installed("rustgpt", "train", "--confg=tiny", code=2)
    assert wrong.stderr == "error: Unknown flag --confg. Did you mean --config?\n"
    assert "config.model.context_length" in installed("rustgpt", "explain", "--config=rustgpt").stdout
    trained = installed("rustgpt", "train", "--config=tiny", *FEW_STEPS)
    assert "Talk to it:  rustgpt chat runs/tiny\n" in trained.stdout
    rerun = installed("rustgpt", "rerun", "runs/tiny").stdout
    assert "The code of runs/tiny is the code installed here." in rerun and "bit-identical for 12 steps" in rerun
    assert re.search(r"Talk to it:  rustgpt chat \S+/runs/tiny.rerun\n", rerun)
    (archive,) = (work / "runs" / "tiny" / "code").glob("*.zip")
    with zipfile.ZipFile(archive) as code:
        assert {name.split("/")[0] for name in code.namelist()} == {"rustgpt_jax"}
        assert "rustgpt_jax/configs/tiny.py" in code.namelist()
    (work / "old.py").write_text("from configs import tiny\n")
    assert "rustgpt_jax.load_config('tiny')" in installed("rustgpt", "explain", "--config=old.py", code=2).stderr
    (work / "mine.py").write_text(SWEPT)
    swept = installed("rustgpt", "sweep", "--config=mine.py", "--launcher=processes", "--workers=1", *FEW_STEPS)
    assert "Report: runs/mine/report.html" in swept.stdout.replace("\n", "")
    sweep = json.loads((work / "runs" / "mine" / "sweep.json").read_text())
    assert sweep["command"].startswith("rustgpt sweep --config=mine.py ") and len(sweep["trials"]) == 2
    installed("python", "-c", "import rustgpt_jax; assert rustgpt_jax.load_config('tiny').training.batch_size == 8")
    assert installed("python", "-m", "rustgpt_jax", "--help").stdout.startswith("usage: python -m rustgpt_jax VERB")
    # A job starts the package by its name.
    (work / "sbatch").write_text("#!/bin/sh\ncat > script; echo 7\n")
    (work / "sbatch").chmod(0o755)
    path = f"{work}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    installed(
        str(work.parent / "venv" / "bin" / "rustgpt"),
        "train",
        "--config=tiny",
        "--run=job",
        "--launcher=slurm",
        PATH=path,
    )
    assert re.search(r"/bin/python -P -m rustgpt_jax train --config=tiny --run=job\n", (work / "script").read_text())
