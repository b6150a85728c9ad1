"""--launcher=manifest writes jobs that Kubernetes and SkyPilot accept, and whose commands run a sweep together."""

import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import types
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from conftest import small_tree
from test_cli import LAUNCH, environment
from test_sweep import (
    CONFIG,
    TINY,
    Launched,
    assert_nothing_lost,
    checkpoints,
    events,
    sweep_of,
    wait_until,
)

from rustgpt_jax.cli.output import load_schema
from rustgpt_jax.data.preprocess import AssetCache
from rustgpt_jax.errors import UserError
from rustgpt_jax.sweeps import product, seeds, values
from rustgpt_jax.sweeps.manifests import ManifestOptions, SweepCommand, kubernetes_job, parse_options, write_manifests
from rustgpt_jax.sweeps.trial_batching import group_by_shape, select_part
from rustgpt_jax.sweeps.trials import make_trials

FILES = {"kubernetes-volume.yaml", "kubernetes.yaml", "skypilot-volume.yaml", "skypilot.yaml"}


def write(folder: Path, config: str, *flags: str) -> dict[str, Any]:
    """Write the manifests of a config in a folder, and return the result of the JSON document."""
    command = [sys.executable, LAUNCH, "sweep", f"--config={config}", "--launcher=manifest", "--to=jobs", "--json"]
    done = subprocess.run([*command, *flags], cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    jsonschema.validate(document, load_schema("sweep"))
    return dict(document["result"])


def read(file: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(file.read_text()))


# The commands.


def expand(word: str, variables: Mapping[str, str]) -> str:
    """Expand a word of a container's command as Kubernetes does."""
    for name, value in variables.items():
        word = word.replace(f"$({name})", value)
    return word.replace("$$", "$")


def start(command: list[str], cwd: Path, run: Path, **variables: str) -> Launched:
    """Start a command as a pod does, with `rustgpt` on its path."""
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=environment() | {"PATH": f"{cwd}:{os.environ['PATH']}"} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return Launched(process, run)


@pytest.mark.slow
def test_pods_run_each_trial_once_and_resume(tmp_path: Path) -> None:
    (tmp_path / "shared.py").write_text("RATES = (1e-3, 1e-2)\n")
    rates = sweep_of(40, (0.0,)).replace("*(0.0,)", "*RATES")
    (tmp_path / "four.py").write_text(f"from shared import RATES\n{CONFIG}{rates}")
    volume = tmp_path / "volume"
    flags = ["--mode=exact", "--width=1", "--config.sampling.temperature=0.5"]
    result = write(tmp_path, "four.py", f"--manifest=mount={volume}", "--manifest=parts=3", *flags)
    assert (result["n_trials"], result["n_parts"], result["sweep"]) == (4, 3, f"{volume}/four")
    config_map, job = read(tmp_path / "jobs" / "kubernetes.yaml")
    pod = tmp_path / "pod"
    pod.mkdir()
    for name, text in config_map["data"].items():
        (pod / name).write_text(text)
    assert sorted(config_map["data"]) == ["four.py", "shared.py"]
    (pod / "rustgpt").write_text(f'#!/bin/sh\nexec {sys.executable} {LAUNCH} "$@"\n')
    (pod / "rustgpt").chmod(0o755)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    run = volume / "four"

    def start_pod(index: int) -> Launched:
        words = [expand(word, {"JOB_COMPLETION_INDEX": str(index)}) for word in container["command"]]
        return start(words, pod, run)

    pods = [start_pod(0), start_pod(1)]

    def has_saved() -> bool:
        process = pods[0].process.pid
        return any(event["process"] == process and event["trial"] in checkpoints(run) for event in events(run, "began"))

    wait_until(has_saved, pods[0])
    seen = [(checkpoints(run), len(events(run)))]
    pods[0].kill()
    replaced = start_pod(0)
    assert "This part has ended; trials of other parts that have not:" in pods[1].ends()
    # The last part, as a node of SkyPilot runs it.
    (task,) = read(tmp_path / "jobs" / "skypilot.yaml")
    rank = {"SKYPILOT_NODE_RANK": "2", "SKYPILOT_NUM_NODES": str(task["num_nodes"])}
    node = start(["bash", "-c", task["run"]], pod, run, **rank)
    assert "Report: " in replaced.ends() + node.ends()
    assert seen[0][0]
    assert_nothing_lost(run, seen)
    n_begun = Counter(event["trial"] for event in events(run, "began"))
    assert sorted(n_begun.values()) == [1, 1, 1, 2]
    assert len(events(run, "planned")) == 4
    alone = tmp_path / "alone"
    start(["rustgpt", "sweep", "--config=four.py", f"--run={alone}", *flags], pod, alone).ends()
    assert (run / "results.csv").read_bytes() == (alone / "results.csv").read_bytes()


@pytest.mark.long
def test_stopped_pod_exits_with_the_status_that_the_job_ignores(tmp_path: Path) -> None:
    (tmp_path / "four.py").write_text(CONFIG + sweep_of(4000, (1e-3, 1e-2)))
    (tmp_path / "rustgpt").write_text(f'#!/bin/sh\nexec {sys.executable} {LAUNCH} "$@"\n')
    (tmp_path / "rustgpt").chmod(0o755)
    run = tmp_path / "run"
    launched = start(["rustgpt", "sweep", "--config=four.py", f"--run={run}", "--part=1/2"], tmp_path, run)
    wait_until(lambda: bool(checkpoints(run)), launched)
    launched.process.send_signal(signal.SIGTERM)
    (job,) = kubernetes_job(SweepCommand("four"), parse_options({}, "four", 4))
    ignored = [rule for rule in job["spec"]["podFailurePolicy"]["rules"] if rule["action"] == "Ignore"]
    (status,) = ignored[1]["onExitCodes"]["values"]
    assert "running trials were saved" in " ".join(launched.ends(status).split())
    assert len(checkpoints(run)) <= 2


def test_parts_divide_the_trials_by_cost() -> None:
    widths = values("model.d_ff", 16, 32, 64)
    trials = make_trials(small_tree(**TINY), product(seeds(4), widths))
    classes = group_by_shape(trials, AssetCache())
    costs = {trial.id: each.cost.total_flops for each in classes for trial in each.trials}
    for n_parts in (1, 2, 3, 5, 12, 40):
        parts = [select_part(classes, (index, n_parts)) for index in range(n_parts)]
        assert sorted(trial.id for part in parts for trial in part) == sorted(costs)
        share = sum(costs.values()) / n_parts
        assert all(abs(sum(costs[trial.id] for trial in part) - share) <= max(*costs.values(), share) for part in parts)
    # Only one class is in both halves.
    halves = [{trial.config.model.d_ff for trial in select_part(classes, (index, 2))} for index in (0, 1)]
    assert len(halves[0] & halves[1]) <= 1


# The manifests.


def test_recipe_needs_no_files_and_text_is_escaped(tmp_path: Path) -> None:
    options = parse_options({"gpus": "2", "namespace": "lab", "storage_class": "nfs"}, "Learning_rate", 126)
    assert (options.name, options.parts) == ("learning-rate", 8)
    prompt = "--config.logging.sample_prompts=$(id) costs $5 'or'\n\"more\""
    command = SweepCommand("learning_rate", {}, [prompt])
    commands = write_manifests(tmp_path / "jobs", command, options)
    assert {file.name for file in (tmp_path / "jobs").iterdir()} == FILES
    assert commands["kubernetes"][1] == f"kubectl apply -f {tmp_path / 'jobs' / 'kubernetes.yaml'}"
    (job,) = read(tmp_path / "jobs" / "kubernetes.yaml")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert "workingDir" not in container
    assert expand(container["command"][-2], {}) == prompt and "$$(id)" in container["command"][-2]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "2"
    (task,) = read(tmp_path / "jobs" / "skypilot.yaml")
    assert task["resources"]["accelerators"] == "H100:2"
    printed = subprocess.run(
        ["bash", "-c", 'rustgpt() { printf "%s\\0" "$@"; }\n' + task["run"]],
        env={"SKYPILOT_NODE_RANK": "0", "SKYPILOT_NUM_NODES": "8", "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    )
    assert printed.stdout.split("\0")[:-1] == [
        "sweep",
        "--config=learning_rate",
        "--run=/sweeps/learning-rate",
        prompt,
        "--part=0/8",
    ]
    with pytest.raises(UserError, match="already exists and is not empty"):
        write_manifests(tmp_path / "jobs", command, options)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gpu": "1"}, "--manifest=gpu: unknown option. Did you mean 'gpus'?"),
        ({"parts": "0"}, "--manifest=parts=0: '0' is not a whole number from 1 on."),
        ({"memory": "16Gi"}, "'16Gi' is not a whole number from 1 on."),
        ({"name": "Rates"}, "use at most 45 lower-case letters, digits and inner hyphens."),
        ({"mount": "sweeps"}, "--manifest=mount=sweeps: it is not an absolute path."),
        ({"mount": "//config/../config/runs"}, "the config file is in /config; use another folder."),
        ({"image": "an image"}, "--manifest=image=an image: it has a space or a control character."),
        ({"storage_class": "nfs\x7f"}, "it has a space or a control character."),
        ({"parts": "100000"}, "--manifest=parts=100000: a sweep has at most 99999 parts."),
    ],
)
def test_invalid_options_are_one_sentence(given: dict[str, str], message: str) -> None:
    with pytest.raises(UserError) as raised:
        parse_options(given, "rates", 4)
    assert message in str(raised.value)


@pytest.mark.parametrize("name", ["a config.py", "caf\u00e9.py", "..py"])
def test_files_that_a_config_map_cannot_hold_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="name of a file in a ConfigMap"):
        write_manifests(tmp_path / "jobs", SweepCommand(name, {name: ""}), parse_options({}, "rates", 4))
    assert not (tmp_path / "jobs").exists()


def test_config_that_is_not_utf8_is_one_sentence(tmp_path: Path) -> None:
    text = f"# -*- coding: latin-1 -*-\n# caf\u00e9\n{CONFIG}{sweep_of(40, (1e-3,))}"
    (tmp_path / "old.py").write_bytes(text.encode("latin-1"))
    command = [sys.executable, LAUNCH, "sweep", "--config=old.py", "--launcher=manifest", "--to=jobs"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2 and "old.py: a ConfigMap holds UTF-8" in done.stderr and done.stderr.count("\n") == 1


def test_documentation_lists_the_options_with_their_defaults() -> None:
    page = (Path(LAUNCH).parent / "docs" / "how_to" / "kubernetes.md").read_text()
    rows = dict(re.findall(r"^\| `--manifest=(\w+)=\w+` \| (.*?) \|", page, re.MULTILINE))
    options = vars(ManifestOptions())
    assert rows.keys() == options.keys()
    assert all(rows[name].strip("`") == str(value) for name, value in options.items() if value or name == "gpus")


OPTIONS: dict[str, dict[str, str]] = {
    "defaults": {},
    "all": {"gpus": "1", "namespace": "lab", "storage_class": "nfs", "size": "5", "parts": "4", "parallelism": "2"},
}


def documents(folder: Path, given: dict[str, str]) -> dict[str, list[dict[str, Any]]]:
    """Write the manifests of a sweep with a config file, and read them."""
    command = SweepCommand("four.py", {"four.py": "x = 1\n"}, ["--config.seed=1"])
    write_manifests(folder / "jobs", command, parse_options(given, "four", 4))
    return {name: read(folder / "jobs" / name) for name in FILES}


@pytest.mark.extras
@pytest.mark.parametrize("given", OPTIONS.values(), ids=OPTIONS)
def test_kubernetes_accepts_the_manifests(given: dict[str, str], tmp_path: Path) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    written = documents(tmp_path, given)
    # The first version with all fields as stable, and the last one.
    for version in ("1.33", kubernetes_validate.latest_version()):
        for document in [*written["kubernetes-volume.yaml"], *written["kubernetes.yaml"]]:
            kubernetes_validate.validate(document, version, strict=True)
    broken = written["kubernetes.yaml"][1]
    broken["spec"]["template"]["spec"]["containers"][0]["comand"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, version, strict=True)


@pytest.mark.extras
@pytest.mark.parametrize("given", OPTIONS.values(), ids=OPTIONS)
def test_skypilot_accepts_the_manifests(given: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    schemas = import_skypilot_schemas(monkeypatch)
    written = documents(tmp_path, given)
    (task,), (volume,) = written["skypilot.yaml"], written["skypilot-volume.yaml"]
    jsonschema.validate(task, schemas.get_task_schema())
    jsonschema.validate(task["resources"], schemas.get_resources_schema())
    jsonschema.validate(volume, schemas.get_volume_schema())
    for schema, document in ((schemas.get_task_schema(), task), (schemas.get_resources_schema(), task["resources"])):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(document | {"nodes": 2}, schema)


def import_skypilot_schemas(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import SkyPilot's schemas without the packages that it needs for clouds: `pip install --no-deps skypilot`."""
    found = importlib.util.find_spec("sky")
    if found is None or found.submodule_search_locations is None:
        pytest.skip("needs skypilot")
    sky = types.ModuleType("sky")
    sky.__path__ = list(found.submodule_search_locations)  # type: ignore[attr-defined]
    sky.__version__ = importlib.metadata.version("skypilot")  # type: ignore[attr-defined]
    # Modules that import all of SkyPilot, of which the schemas use only names that `jsonschema` does not check.
    autostop, volume = types.ModuleType("sky.skylet.autostop_lib"), types.ModuleType("sky.utils.volume")
    vars(autostop)["AutostopWaitFor"] = types.SimpleNamespace(supported_modes=list)
    vars(volume).update(VolumeType=[], VolumeAccessMode=[])
    for module in (sky, autostop, volume):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    schemas = importlib.import_module("sky.utils.schemas")
    # This is for a field that is not used here.
    monkeypatch.setattr(schemas, "_task_config_schema", dict)
    return schemas
