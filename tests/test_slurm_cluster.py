"""The Slurm of the tests: it runs jobs, queues them again, makes room for urgent ones, and leaves nothing behind."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from slurm_fixture import cluster, run_script

Environment = dict[str, str]


def output_of(environment: Environment, *command: str) -> str:
    """What a command of Slurm prints."""
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def submit(environment: Environment, folder: Path, script: str, *options: str) -> tuple[str, Path]:
    """Submits a shell script; returns the job and the file to which it prints."""
    batch, printed = folder / "job.sh", folder / "printed.txt"
    batch.write_text(f"#!/bin/sh\n{script}\n")
    command = ("sbatch", "--parsable", "--open-mode=append", f"--output={printed}", *options, str(batch))
    return output_of(environment, *command), printed


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Returns as soon as a condition holds, and fails the test where it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def state(environment: Environment, job: str) -> str:
    """The state of a job, also of one that has ended."""
    return output_of(environment, "squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T")


def alive(folder: Path) -> dict[str, str]:
    """The processes, by number, that were started with a cluster's SLURM_CONF, and their names."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"SLURM_CONF={folder}/slurm.conf\0".encode() in (process / "environ").read_bytes():
                found[process.name] = (process / "comm").read_text().strip()
        except OSError:
            continue
    return found


def test_a_job_runs(slurm: Environment, tmp_path: Path) -> None:
    job, printed = submit(slurm, tmp_path, "echo job $SLURM_JOB_ID")
    wait_for(lambda: state(slurm, job) == "COMPLETED")
    assert printed.read_text() == f"job {job}\n"


def test_a_job_that_is_queued_again_runs_again(slurm: Environment, tmp_path: Path) -> None:
    script = "echo run ${SLURM_RESTART_COUNT:-0}\ntest $SLURM_RESTART_COUNT || scontrol requeue $SLURM_JOB_ID"
    job, printed = submit(slurm, tmp_path, script)
    wait_for(lambda: state(slurm, job) == "COMPLETED")
    assert [line for line in printed.read_text().splitlines() if line.startswith("run")] == ["run 0", "run 1"]


def test_a_job_of_high_preempts_one_of_low(slurm: Environment, tmp_path: Path) -> None:
    # Told by a file: srun may end before it has passed on what a task prints last. The signal comes more than once and
    # to each process: the shell makes the file itself, and waits for nothing whose end would be its own.
    told, task = tmp_path / "told", tmp_path / "task.sh"
    on_signal = f"trap '' TERM\n: > {told}\nscontrol requeue $SLURM_JOB_ID\nexit"
    task.write_text(f"told() {{ {on_signal}\n}}\ntrap told TERM\necho begun\nwhile true; do sleep 1; done\n")
    low, printed = submit(slurm, tmp_path, f"srun sh {task}", "--exclusive")
    wait_for(lambda: printed.exists() and "begun" in printed.read_text())
    high = output_of(
        slurm, "sbatch", "--parsable", "--partition=high", "--exclusive", "--output=/dev/null", "--wrap=true"
    )
    wait_for(lambda: state(slurm, high) == "COMPLETED")
    assert told.exists()
    assert state(slurm, low) in ("PENDING", "RUNNING")
    output_of(slurm, "scancel", low)


def test_nothing_is_left_after_stop(tmp_path: Path) -> None:
    with cluster() as environment:
        folder = Path(environment["SLURM_CONF"]).parent
        stubborn = "trap 'scontrol requeue $SLURM_JOB_ID' TERM\necho begun\nwhile true; do sleep 1; done"
        _, printed = submit(environment, tmp_path, stubborn)
        wait_for(lambda: printed.exists() and "begun" in printed.read_text())
        wait_for(lambda: {"munged", "slurmctld", "slurmd", "slurmstepd", "sleep"} <= set(alive(folder).values()))
    assert alive(folder) == {}
    assert not folder.exists()


def test_stop_touches_no_folder_of_others(tmp_path: Path) -> None:
    (tmp_path / "slurm.conf").write_text("ClusterName=production\n")
    stopped = run_script("stop", tmp_path)
    assert stopped.stderr == f"no cluster that `slurm_cluster start` began in {tmp_path}\n"
    assert [file.name for file in tmp_path.iterdir()] == ["slurm.conf"]


def test_where_there_is_no_slurm_the_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    started = run_script("start")
    assert started.returncode == 1
    assert started.stderr.startswith("no Slurm here (")
    assert started.stderr.endswith("sbatch, scancel, sinfo, squeue not found): apt-get install slurm-wlm munge\n")
