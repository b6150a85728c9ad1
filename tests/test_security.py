"""Code of a run folder is executed only with the user's consent, and modules are imported only from named folders."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from small_runs import ROOT, train

from rustgpt_jax import registry
from rustgpt_jax.config.schema import config_hash
from rustgpt_jax.config.validation import resolve
from rustgpt_jax.errors import UserError
from rustgpt_jax.reproduce.rerun import rerun
from rustgpt_jax.reproduce.run_diff import diff
from rustgpt_jax.reproduce.snapshot_runner import FinishedProcess, SnapshotCode, load_snapshot_code
from rustgpt_jax.training import run_training
from rustgpt_jax.training.config_checks import validate_components
from rustgpt_jax.workdir import code_snapshot
from rustgpt_jax.workdir.code_snapshot import code_hash, read_code
from rustgpt_jax.workdir.event_log import EventLog, code_archive, load_first_launch
from rustgpt_jax.workdir.run_dir import RunDir, load_config

pytestmark = pytest.mark.usefixtures("quick_codegen")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, quick_codegen: None) -> Path:
    """A run trained by the installed code."""
    folder = tmp_path_factory.mktemp("trust") / "run"
    train(folder)
    return folder


def spoil_code(run: RunDir, name: str, code: str) -> Path:
    """Replace the code archive of a run by one with other code and a valid name, and return its file."""
    archive = code_archive(run, load_first_launch(run))
    contents = read_code(archive) | {name: code.encode()}
    folder = run.path / "made"
    for each, content in contents.items():
        (folder / each).parent.mkdir(parents=True, exist_ok=True)
        (folder / each).write_bytes(content)
    other = code_hash(dict(sorted((each, folder / each) for each in contents)))
    with zipfile.ZipFile(run.code / f"{other}.zip", "w") as packed:
        for each, content in sorted(contents.items()):
            packed.writestr(each, content)
    shutil.rmtree(folder)
    journal = run.events_file.read_text()
    run.events_file.write_text(journal.replace(f'"code": "{archive.stem}"', f'"code": "{other}"'))
    return run.code / f"{other}.zip"


@pytest.fixture
def hostile(trained: Path, tmp_path: Path) -> RunDir:
    """A copy of the run whose code writes a file when executed."""
    run = RunDir(Path(shutil.copytree(trained, tmp_path / "hostile")))
    spoil_code(run, "rustgpt_jax/__init__.py", f"open({str(tmp_path / 'was_run')!r}, 'w').close()\n")
    return run


@pytest.mark.slow
def test_diff_runs_no_code_of_a_run_folder(hostile: RunDir, trained: Path, tmp_path: Path) -> None:
    metrics = hostile.metrics_file.read_text().splitlines()
    first = json.loads(metrics[0]) | {"train/loss": 9.0}
    hostile.metrics_file.write_text("\n".join([json.dumps(first), *metrics[1:]]) + "\n")
    console = Console(file=StringIO(), width=1000)
    assert not diff(trained, hostile.path, console).is_same
    said = console.file.getvalue()
    assert "first tensor: not found." in said and "it differs in rustgpt_jax/__init__.py" in said and "--trust" in said
    assert not (tmp_path / "was_run").exists()
    # With consent, the code is executed, so this test could fail.
    diff(trained, hostile.path, Console(file=StringIO()), is_trusted=True)
    assert (tmp_path / "was_run").exists()


@pytest.mark.slow
def test_rerun_requires_trust_for_other_code(hostile: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=StringIO(), width=1000)
    with pytest.raises(UserError, match=r"with your permissions: it differs in rustgpt_jax/__init__.py.*--trust"):
        rerun(hostile.path, None, console)
    assert not (tmp_path / "was_run").exists() and not (tmp_path / "hostile.rerun").exists()
    monkeypatch.setattr(SnapshotCode, "run", lambda *_: FinishedProcess(0, None))
    rerun(hostile.path, None, console, is_trusted=True)
    assert (
        "--trust: " in console.file.getvalue()
        and "which differs from the code installed here" in console.file.getvalue()
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sitecustomize.py", "rustgpt_jax.py", "rustgpt_jax/extra.py", "json/__init__.py"])
def test_missing_modules_count_as_other_code(name: str, trained: Path, tmp_path: Path) -> None:
    run = RunDir(Path(shutil.copytree(trained, tmp_path / "run")))
    with load_snapshot_code(run, load_first_launch(run)) as code:
        assert code.note == f"The code of {run.path} is the code installed here."
    spoil_code(run, name, "evil = 1\n")
    with (
        pytest.raises(UserError, match="is not the code installed here"),
        load_snapshot_code(run, load_first_launch(run)),
    ):
        pass


def test_archive_of_unlimited_size_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_snapshot, "MAX_UNPACKED_BYTES", 2**20)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(9):
            archive.writestr(f"{number}.py", bytes(2**17))
    with pytest.raises(UserError, match="1,179,648 bytes when unpacked"):
        read_code(tmp_path / "bomb.zip")


# Modules named by run folders.


@pytest.fixture
def named(tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A run whose config.json names evil_lab:Mixer, a module in the current folder."""
    run = RunDir(Path(shutil.copytree(trained, tmp_path / "named")))
    record = json.loads(run.config_file.read_text())
    record["config"]["model"]["mixers"] = ["evil_lab:Mixer"]
    record["hash"] = config_hash(resolve(record["config"]))
    run.config_file.write_text(json.dumps(record))
    (tmp_path / "here").mkdir()
    mark = tmp_path / "was_imported"
    (tmp_path / "here" / "evil_lab.py").write_text(
        f"open({str(mark)!r}, 'w').close()\nfrom rustgpt_jax.model.mixers.attention import Attention as Mixer\n"
    )
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(registry, "_named_by_files", {})
    yield run.path
    sys.modules.pop("evil_lab", None)


@pytest.mark.parametrize("entry", ["", "."])
def test_component_of_a_run_is_not_imported_from_the_current_folder(
    entry: str, named: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # As for `python -c`, notebooks, and `python -m`.
    here = entry and str(Path(entry).absolute())
    monkeypatch.setattr(sys, "path", [here, *sys.path])
    config = load_config(named)
    with pytest.raises(UserError, match="no module named 'evil_lab'.*but not the current folder, which has it"):
        validate_components(config)
    assert not (tmp_path / "was_imported").exists() and sys.path[0] == here
    # If the user names the folder, it is imported from there with a note.
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "here"))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "here"), *sys.path])
    validate_components(config)
    assert (tmp_path / "was_imported").exists()
    file, place = RunDir(named).config_file, tmp_path / "here" / "evil_lab.py"
    assert capsys.readouterr().err == f"{file} names a component of the module evil_lab: importing it from {place}.\n"
    validate_components(config)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("path", ["evil_lab:Mixer.x", "evil_lab:", "evil_lab: Mixer", "évil_lab:Mixer"])
def test_invalid_import_path_does_not_import_the_module(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_named_by_files", {})
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"{path.partition(':')[0]}.py").write_text("open('was_imported', 'w').close()\n")
    registry.note_import_paths(json.dumps({"mixers": ["attention", path]}), tmp_path / "config.json")
    with pytest.raises(UserError, match="no module named"):
        registry.import_object(path, "config.model.mixers")
    assert not (tmp_path / "was_imported").exists()


def test_installed_component_is_imported(
    named: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.move(tmp_path / "here" / "evil_lab.py", tmp_path / "evil_lab.py")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    validate_components(load_config(named))
    assert "importing it from" in capsys.readouterr().err


def test_evaluate_does_not_import_from_the_current_folder(named: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "launch.py"), "evaluate", str(named)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "no module named 'evil_lab'" in done.stderr, done.stderr
    assert not (tmp_path / "was_imported").exists()


def test_missing_module_path_is_rejected(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "launch.py"), "explain", "x", "--module_path=nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr == "error: --module_path=nowhere: not a folder.\n"


def test_recorded_settings_cannot_set_variables_that_load_code(trained: Path, tmp_path: Path) -> None:
    run = RunDir(Path(shutil.copytree(trained, tmp_path / "run")))
    (event,) = (each for each in EventLog(run.events_file).events() if each["event"] == "launch")
    event["environment"]["variables"] |= {"NCCL_NET_PLUGIN": "evil.so", "PYTHONSTARTUP": "evil.py"}
    run.events_file.write_text(json.dumps(event) + "\n")
    with load_snapshot_code(run, load_first_launch(run)) as code:
        assert not {"NCCL_NET_PLUGIN", "PYTHONSTARTUP"} & code._variables().keys()


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        (None, "devices", 0),
        (None, "devices", 10**9),
        ("machine", "cores", 0),
        ("machine", "cores", True),
        ("variables", "XLA_FLAGS", 5),
    ],
)
def test_launch_with_invalid_environment_is_damaged(
    group: str | None, name: str, value: Any, trained: Path, tmp_path: Path
) -> None:
    run = RunDir(Path(shutil.copytree(trained, tmp_path / "run")))
    (event,) = (each for each in EventLog(run.events_file).events() if each["event"] == "launch")
    (event if group is None else event["environment"][group])[name] = value
    run.events_file.write_text(json.dumps(event) + "\n")
    with pytest.raises(UserError, match="damaged: the environment of a launch is invalid"):
        load_first_launch(run)


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "events.jsonl"])
def test_symbolic_links_in_a_run_folder_are_rejected(trained: Path, tmp_path: Path, name: str) -> None:
    """Otherwise training would append to the target of a link in an untrusted folder."""
    run, other = Path(shutil.copytree(trained, tmp_path / "run")), tmp_path / "bashrc"
    other.write_text("alias ls='ls -l'\n")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(other)
    config = load_config(run)
    longer = dataclasses.replace(config.training, steps=config.training.steps + 1)

    def contents() -> dict[Path, bytes]:
        return {file: file.read_bytes() for file in run.rglob("*") if file.is_file() and file.name != ".lock"}

    before = contents()
    with pytest.raises(UserError, match=f"{name} is a symbolic link"):
        run_training.train(dataclasses.replace(config, training=longer), run, {}, Console(quiet=True), extends=True)
    assert contents() == before
