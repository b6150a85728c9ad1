"""Weights & Biases and MLflow, as their own readers see runs: offline, and in a local SQLite store."""

import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from conftest import small_tree
from small_runs import ROOT, SMALL, new_console, run_config

from rustgpt_jax.reproduce.compare_metrics import TIMED
from rustgpt_jax.sweeps.sweep import SweepInfo, SweepOptions
from rustgpt_jax.sweeps.sweep_command import SweepArgs, run_sweep
from rustgpt_jax.sweeps.trials import make_trials
from rustgpt_jax.tracking.console import PlainTextConsole
from rustgpt_jax.tracking.metric_writer import RunWriter, TrackedRun, read_metrics, select_scalars
from rustgpt_jax.tracking.trackers import open_trackers
from rustgpt_jax.training import run_training

pytestmark = [
    pytest.mark.extras,
    pytest.mark.usefixtures("quick_codegen"),
    # Raised by the libraries themselves.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::UserWarning"),
]

TRACKERS = ("wandb", "mlflow")
CHANGES = {
    "logging.trackers": TRACKERS,
    "logging.project": "snow",
    "logging.tags": ("winter",),
    "logging.sample_prompts": ("Why?",),
}


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep both libraries from the network, and their files in the folder of the test."""
    pytest.importorskip("wandb")
    pytest.importorskip("mlflow")
    variables = {
        "WANDB_MODE": "offline",
        **{f"WANDB_{name}_DIR": str(tmp_path / "wandb") for name in ("CACHE", "CONFIG", "DATA", "ARTIFACT")},
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    # Artifacts of the SQLite store are in a folder here.
    monkeypatch.chdir(tmp_path)


def train(path: Path, **changes: Any) -> str:
    """Train a run of six steps in this process, and return what it printed."""
    console = PlainTextConsole(file=StringIO(), width=200)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_training, "draw_loss_curves", lambda folder: folder / "loss.png")
        run_training.train(run_config(**(CHANGES | changes)), path, {}, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


# Readers.


def read_log(file: Path) -> Iterator[Any]:
    """Read the records of a .wandb file, in LevelDB's log format, with wandb's own protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, start, record = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while start + 7 <= len(data):
        left = 2**15 - start % 2**15
        if left < 7:
            start += left
            continue
        _, length, kind = struct.unpack("<IHB", data[start : start + 7])
        record += data[start + 7 : start + 7 + length]
        start += 7 + length
        # A whole record, or the last part of one.
        if kind in (1, 4):
            yield Record.FromString(record)
            record = b""


def read_wandb(folder: Path) -> dict[str, list[Any]]:
    """Return the records of the wandb run of a folder by type, over all its launches."""
    records = defaultdict(list)
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for record in read_log(file):
            kind = record.WhichOneof("record_type")
            records[kind].append(getattr(record, kind))
    return records


def to_values(items: Any) -> dict[str, Any]:
    """Return the items of a history or a summary by name."""
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def find_mlflow_runs() -> dict[str, Any]:
    """Return the MLflow runs by name."""
    client = mlflow_client()
    experiment = client.get_experiment_by_name("snow")
    return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}


def mlflow_client() -> Any:
    from mlflow import MlflowClient

    return MlflowClient()


def recorded(folder: Path, name: str) -> list[tuple[int, float]]:
    """Return the steps and values of a metric in metrics.jsonl."""
    return [(line["step"], line[name]) for line in read_metrics(folder) if name in line]


def check_histories(folder: Path, is_wandb_repeated: bool = False) -> None:
    """Check that both libraries have every value of metrics.jsonl once, except for those that depend on the clock.

    These may be other ones in a step that was repeated.
    """
    history = [to_values(record.item) for record in read_wandb(folder)["history"]]
    run = find_mlflow_runs()[folder.name]
    names = {name for line in read_metrics(folder) for name in select_scalars(line)} - {*TIMED}
    assert {"train/loss", "valid/loss", "train/learning_rate"} <= names
    assert any("train/tokens_per_second" in line for line in history) and "train/flops_share" in run.data.metrics
    for name in names:
        expected = recorded(folder, name)
        shown = [(line["step"], line[name]) for line in history if name in line]
        assert (sorted(set(shown)) if is_wandb_repeated else shown) == expected, name
        stored = mlflow_client().get_metric_history(run.info.run_id, name)
        assert sorted((metric.step, metric.value) for metric in stored) == expected, name


# Runs.


def test_a_resumed_run_is_one_run_of_each_tracker(tmp_path: Path) -> None:
    path = tmp_path / "run"
    constant = {"schedule.name": "constant"}
    train(path, **constant, **{"training.steps": 4})
    said = train(path, **constant, **{"training.steps": 6, "logging.sample_prompts": ("Why?", "A")})
    check_histories(path)
    records, (run,) = read_wandb(path), find_mlflow_runs().values()
    (identity,) = {record.run_id for record in records["run"]}
    state = json.loads((path / "trackers.json").read_text())
    assert (state["wandb"]["id"], state["mlflow"]["id"]) == (identity, run.info.run_id)
    assert "wandb: offline; upload it with `wandb sync" in said and f"mlflow: run {run.info.run_id} in sqlite" in said

    first, last = records["run"][0], records["run"][-1]
    assert (first.project, first.display_name, list(first.tags)) == ("snow", "run", ["winter"])
    config = to_values(first.config.update)
    assert config["optimizer.learning_rate"] == float(run.data.params["optimizer.learning_rate"])
    assert config["model.mixers"] == ["attention"] and run.data.params["model.mixers"] == "('attention',)"
    assert to_values(last.config.update)["training.steps"] == 6
    # MLflow's parameters cannot change.
    assert (run.data.params["training.steps"], run.data.tags["training.steps"]) == ("4", "6")
    assert run.data.tags["winter"] == "true" and run.info.status == "FINISHED"

    best_step, best_loss = min(recorded(path, "valid/loss"), key=lambda pair: pair[1])
    summary = {k: v for record in records["summary"] for k, v in to_values(record.update).items()}
    last_loss = recorded(path, "train/loss")[-1][1]
    for values in (summary, run.data.metrics):
        assert (values["best/loss"], values["best/step"], values["train/loss"]) == (best_loss, best_step, last_loss)

    samples = [json.loads(line) for line in (path / "samples.jsonl").read_text().splitlines()]
    rows = [[sample["step"], sample["prompt"], sample["text"]] for sample in samples]
    tables = sorted(path.glob("wandb/offline-run-*/files/media/table/*.json"), key=lambda file: file.stat().st_mtime_ns)
    assert json.loads(tables[-1].read_text())["data"] == rows
    table = mlflow_client().load_table(run.info.experiment_id, "samples.json", [run.info.run_id])
    assert table.values.tolist() == rows


KILLED = """
import json, os, signal, sys, time
from pathlib import Path
from rustgpt_jax.tracking import metric_writer, trackers
from rustgpt_jax.training import hooks
sys.path[:0] = [sys.argv[1]]
from small_runs import train
trackers.FLUSH_SECONDS = 0.1
write = metric_writer.RunWriter.write
def load_states():
    file = Path(sys.argv[2]) / "trackers.json"
    return json.loads(file.read_bytes()) if file.exists() else {}
def wait_and_kill(self, step, values):
    write(self, step, values)
    if step == int(sys.argv[4]):
        while load_states().get("mlflow", {}).get("step") != 5 or not list(Path(sys.argv[2]).glob("wandb/*/*.wandb")):
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGKILL)
metric_writer.RunWriter.write = wait_and_kill
train(Path(sys.argv[2]), **json.loads(sys.argv[3]))
"""


def test_a_killed_run_continues_the_runs_of_the_trackers(tmp_path: Path) -> None:
    """Killed after step 5 with a checkpoint of step 4. wandb loses what its service has not written."""
    path = tmp_path / "run"
    command = [sys.executable, "-c", KILLED, str(ROOT / "tests"), str(path), json.dumps(CHANGES)]
    for kill_step, status in ((5, -signal.SIGKILL), (99, 0)):
        variables = os.environ | {"PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        done = subprocess.run([*command, str(kill_step)], env=variables, capture_output=True, text=True)
        assert done.returncode == status, done.stderr
        assert find_mlflow_runs()["run"].info.status == ("FINISHED" if status == 0 else "RUNNING")
    check_histories(path, is_wandb_repeated=True)
    assert len({record.run_id for record in read_wandb(path)["run"]}) == 1


def test_a_sweep_is_a_group_and_a_parent_run(tmp_path: Path) -> None:
    path, rates = tmp_path / "rates", (0.01, 0.02)
    tree = small_tree(**(SMALL | CHANGES | {"training.steps": 4}))
    points = [{"optimizer.learning_rate": rate} for rate in rates]
    args = SweepArgs(SweepInfo("config.py", "sweep", {}), SweepOptions(mode="fused"), False, True)
    assert run_sweep(tree, points, make_trials(tree, points), {}, path, args, new_console())[0] == 0
    runs = find_mlflow_runs()
    parent = runs.pop("rates")
    assert parent.info.status == "FINISHED" and parent.data.metrics["trials/finished"] == 2
    assert parent.data.tags["best/setting"] in [f"learning rate {rate}" for rate in rates]
    artifacts = mlflow_client().list_artifacts(parent.info.run_id)
    assert {artifact.path for artifact in artifacts} == {"report.html", "results.csv"}
    assert len(runs) == 2
    for name, run in runs.items():
        check_histories(path / "trials" / name)
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        rate = run.data.params["optimizer.learning_rate"]
        assert run.data.tags["mlflow.note.content"] == f"optimizer.learning_rate={rate}"
        record = read_wandb(path / "trials" / name)["run"][0]
        assert (record.run_group, record.job_type, record.notes) == (
            "rates",
            "trial",
            run.data.tags["mlflow.note.content"],
        )
    records = read_wandb(path)
    assert (records["run"][0].run_group, records["run"][0].job_type) == ("rates", "sweep")
    reports = {entry.path for record in records["artifact"] for entry in record.manifest.contents}
    assert reports == {"report.html", "results.csv"}


def test_a_tracker_without_network_delays_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that refuses connections, and a W&B account that is not logged in."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    code = (
        "import sys, time; from pathlib import Path; sys.path[:0] = [sys.argv[1]]\n"
        "from rustgpt_jax.tracking.metric_writer import RunWriter, TrackedRun\n"
        "from rustgpt_jax.tracking.trackers import open_trackers\n"
        "folder = Path(sys.argv[2]); folder.mkdir()\n"
        "opened = open_trackers(['wandb', 'mlflow'], TrackedRun(folder), print, lambda text: print('warning', text))\n"
        "with RunWriter(folder, 0, opened) as writer:\n"
        "    began = time.monotonic()\n"
        "    for step in range(1, 101): writer.write(step, {'train/loss': 1.0})\n"
        "    print('took', time.monotonic() - began)\n"
    )
    variables = {name: value for name, value in os.environ.items() if name not in ("WANDB_MODE", "WANDB_API_KEY")}
    variables |= {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "WANDB_BASE_URL": "http://127.0.0.1:9"}
    began = time.monotonic()
    command = [sys.executable, "-c", code, str(ROOT / "tests"), str(tmp_path / "run")]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0 and time.monotonic() - began < 60, done.stderr
    lines = done.stdout.splitlines()
    warnings = sorted(line for line in lines if line.startswith("warning"))
    assert len(warnings) == 2 and "mlflow failed" in warnings[0] and "wandb failed" in warnings[1], done.stdout
    assert "No API key configured" in warnings[1]
    assert float(next(line for line in lines if line.startswith("took")).split()[1]) < 0.5
    assert len(read_metrics(tmp_path / "run")) == 100


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    warnings: list[str] = []
    opened = open_trackers(TRACKERS, TrackedRun(folder, project="snow"), print, warnings.append)
    with RunWriter(folder, 0, opened) as writer:
        writer.write(1, {"train/loss": float("nan"), "größe [x]": float("inf"), "train/a": 1})
    assert not warnings
    history = to_values(read_wandb(folder)["history"][0].item)
    assert history["train/a"] == 1 and str(history["train/loss"]) in ("nan", "NaN")
    metrics = find_mlflow_runs()["run"].data.metrics
    assert metrics["train/loss"] != metrics["train/loss"] and metrics["größe _x_"] > 1e300
