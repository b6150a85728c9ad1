"""--launcher=ray on a real Ray gives the results of --launcher=processes, even if workers, nodes or the driver die."""

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from test_loop import assert_same_bits, metrics, stored_state
from test_sweep import (
    FAKE_WORKER,
    LAUNCH,
    PROCESSES,
    SECONDS,
    Launcher,
    assert_no_worker_is_left,
    assert_nothing_lost,
    checkpoints,
    events,
    launcher_of,
    stop_and_resume,
    sweep_of,
    wait_until,
    workers_on,
)

from rustgpt_jax.data.preprocess import AssetCache
from rustgpt_jax.errors import UserError
from rustgpt_jax.sweeps import ray_launcher
from rustgpt_jax.sweeps.local_launchers import MAX_DEATHS, Launch
from rustgpt_jax.sweeps.sweep_dir import Ledger, SweepDir
from rustgpt_jax.sweeps.trial_batching import Chunk
from rustgpt_jax.workdir.run_dir import load_config

RAY = ["--launcher=ray", "--workers=2"]


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """A launcher of a sweep of four short trials."""
    yield from launcher_of(tmp_path_factory.mktemp("config") / "four.py", sweep_of(40, (1e-3, 1e-2)))


@pytest.fixture(scope="module")
def undisturbed(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed sweep in two processes, each on one core."""
    path = tmp_path_factory.mktemp("undisturbed") / "sweep"
    launcher(path, *PROCESSES).ends()
    return path


def ray_processes(mark: Path) -> list[int]:
    """Return the processes of Ray that a launch with the environment variable MARK has started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            is_marked = f"MARK={mark}\0".encode() in (folder / "environ").read_bytes()
            if is_marked and b"ray" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return found


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def assert_ray_has_ended(mark: Path) -> None:
    wait_for(lambda: not ray_processes(mark))


# Whole sweeps.


@pytest.mark.extras
@pytest.mark.long
def test_killed_sweep_gives_the_results_of_processes(launcher: Launcher, undisturbed: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    path, seen = tmp_path / "killed", list[tuple[dict[str, int], int]]()
    launched = launcher(path, *RAY, MARK=str(tmp_path))
    wait_until(lambda: len(checkpoints(path)) >= 2, launched)
    for environment in [Path(f"/proc/{pid}/environ").read_bytes() for pid in ray_processes(tmp_path)]:
        # The processes of Ray, some of which were started before it set the variable itself.
        assert b"RAY_USAGE_STATS_ENABLED=1" not in environment
    worker = workers_on(path)[0]
    assert len(os.sched_getaffinity(worker)) == 1
    words = Path(f"/proc/{worker}/environ").read_bytes().split(b"\0")
    assert b"RAY_USAGE_STATS_ENABLED=0" in words
    code = os.fsencode(f"PYTHONPATH={path}/code/")
    assert [word for word in words if word.startswith(code)]
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: len({event["process"] for event in events(path, "began")}) == 3, launched)
    seen.append((checkpoints(path), len(events(path))))
    launched.kill()
    assert_ray_has_ended(tmp_path)
    launcher(path, *RAY, MARK=str(tmp_path)).ends()
    assert seen[0][0]
    assert_nothing_lost(path, seen)
    assert_no_worker_is_left(path)
    assert_ray_has_ended(tmp_path)
    assert (path / "results.csv").read_bytes() == (undisturbed / "results.csv").read_bytes()
    for trial in (path / "trials").iterdir():
        config, other = load_config(trial), undisturbed / "trials" / trial.name
        assert_same_bits(stored_state(config, trial), stored_state(config, other))
        assert metrics(trial) == metrics(other)


@pytest.mark.extras
@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_stop_and_the_same_command_resumes(
    launcher: Launcher, undisturbed: Path, number: signal.Signals, tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    stop_and_resume(launcher, tmp_path / "stopped", RAY, number)
    assert (tmp_path / "stopped" / "results.csv").read_bytes() == (undisturbed / "results.csv").read_bytes()


# Workers and nodes that die, without JAX.

FAKE_RAY_WORKER = FAKE_WORKER.replace(
    '        if trial.startswith("bad")',
    """
        if trial == "orphan" and lived == 1:
            os.kill(os.getppid(), 9)
            sys.exit(sys.stdin.read())
        if trial == "moved" and lived == 1:
            (path / "is running").touch()
            sys.exit(sys.stdin.read())
        if trial.startswith("bad")""",
)


@pytest.mark.extras
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_chunks_outlive_their_workers_and_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    trials = ["moved", "good", "orphan", "bad", "weak"]
    launch = make_launch(tmp_path, trials, n_workers=2)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        node = cluster.add_node(num_cpus=1)
        with ray_launcher.connect({"address": cluster.address}, print):
            assert ray_launcher.count_tasks({}) == (1, 0)
            assert ray_launcher.count_tasks({"num_cpus": "2"}) == (0, 0)

            chunks = [Chunk((trial,), "exact", 1) for trial in trials]
            with ThreadPoolExecutor(1) as pool:
                launched = pool.submit(ray_launcher.run_on_ray, launch, chunks)
                wait_for(lambda: (tmp_path / "is running").exists())
                cluster.remove_node(node, allow_graceful=False)
                cluster.add_node(num_cpus=1)
                launched.result(SECONDS)
        assert not ray.is_initialized()
    finally:
        cluster.shutdown()
    states = Ledger(tmp_path / "ledger.jsonl").states()
    assert {trial: states[trial]["event"] for trial in trials} == dict.fromkeys(trials, "finished") | {"bad": "failed"}
    assert states["bad"]["error"] == (
        f"its worker died {MAX_DEATHS} times before the trial was done, most recently with exit status 7; its log is "
        f"{tmp_path / 'workers' / 'bad.log'}"
    )
    assert states["bad"]["traceback"].count("the log of") == MAX_DEATHS
    lives = (tmp_path / "lives").read_text().splitlines()
    assert {trial: lives.count(trial) for trial in trials} == {"moved": 2, "good": 1, "orphan": 2, "bad": 3, "weak": 3}


def make_launch(path: Path, trials: list[str], n_workers: int, options: dict[str, str] | None = None) -> Launch:
    """Make a launch of planned trials that fake workers run."""
    package = path / "code" / "rustgpt_jax" / "sweeps"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").write_text("")
    (package / "worker.py").write_text(FAKE_RAY_WORKER)
    Ledger(path / "ledger.jsonl").append_all([(trial, "planned", {"overrides": {}}) for trial in trials])
    return Launch(SweepDir(path), AssetCache(), path / "code", n_workers, options or {}, lambda: False)


# Without Ray.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_gpu": "1"}, "--ray=num_gpu: unknown option. Did you mean 'num_gpus'?"),
        ({"num_gpus": "0.5"}, "'0.5' is not a whole number. To share a GPU among trials, use --mode=fused."),
        ({"memory": "16GB"}, "--ray=memory=16GB: '16GB' is not a whole number."),
        ({"resources.TPU": "four"}, "--ray=resources.TPU=four: 'four' is not a number."),
        ({"resources.TPU": "\u00b2"}, "--ray=resources.TPU=\u00b2: '\u00b2' is not a number."),
        ({"address": "ray://head:10001"}, "Ray Client (ray://) is not supported."),
    ],
)
def test_invalid_options_are_one_sentence(options: dict[str, str], message: str) -> None:
    with pytest.raises(UserError) as raised:
        ray_launcher.check_options(options)
    assert message in str(raised.value)


def test_a_task_must_request_something(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_launcher, "_nodes", lambda: [{"CPU": 2.0}])
    assert ray_launcher.count_tasks({}) == (2, 0)
    with pytest.raises(UserError, match="a task must request something"):
        ray_launcher.count_tasks({"num_cpus": "0"})


def test_documentation_lists_the_options() -> None:
    page = (Path(LAUNCH).parent / "docs" / "how_to" / "ray.md").read_text()
    rows = set(re.findall(r"^\| `--ray=([\w.]+)=", page, re.MULTILINE))
    assert rows | {"address"} == set(ray_launcher.OPTIONS)


def test_missing_ray_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(UserError, match=r"needs Ray: python -m pip install 'rustgpt_jax\[ray\]'"),
        ray_launcher.connect({}, print),
    ):
        pass


def test_tasks_reserve_different_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5, 7, 9})
    monkeypatch.setattr("shutil.which", lambda name: name)
    held: Any
    with ExitStack() as first, ExitStack() as second, ExitStack() as third:
        held = [list(ray_launcher.reserve_cores(2, stack)) for stack in (first, second, third)]
        assert held == [[3, 5], [7, 9], []]
        second.close()
        assert list(ray_launcher.reserve_cores(1, third)) == [7]
    with ExitStack() as stack:
        assert ray_launcher.reserve_cores(4, stack) == {}
        assert list(ray_launcher.reserve_cores(3, stack)) == [3, 5, 7]
