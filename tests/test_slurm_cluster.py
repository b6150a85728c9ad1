"""The Slurm cluster of the tests runs, requeues and preempts jobs, and leaves no processes behind."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from slurm_fixture import cluster, run_script

pytestmark = pytest.mark.slow
Environment = dict[str, str]


def output_of(environment: Environment, *command: str) -> str:
    """Return the output of a Slurm command."""
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def submit(environment: Environment, folder: Path, script: str, *options: str) -> tuple[str, Path]:
    """Submit a shell script, and return the job and its output file."""
    batch, printed = folder / "job.sh", folder / "printed.txt"
    batch.write_text(f"#!/bin/sh\n{script}\n")
    command = ("sbatch", "--parsable", "--open-mode=append", f"--output={printed}", *options, str(batch))
    return output_of(environment, *command), printed


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Wait until a condition holds, and fail if it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def state(environment: Environment, job: str) -> str:
    """Return the state of a job, even if it has ended."""
    return output_of(environment, "squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T")


def alive(folder: Path) -> dict[str, str]:
    """Return the IDs and names of the processes with a cluster's SLURM_CONF."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"SLURM_CONF={folder}/slurm.conf\0".encode() in (process / "environ").read_bytes():
                found[process.name] = (process / "comm").read_text().strip()
        except OSError:
            continue
    return found


def test_stop_leaves_no_processes(tmp_path: Path) -> None:
    with cluster() as environment:
        folder = Path(environment["SLURM_CONF"]).parent
        stubborn = "trap 'scontrol requeue $SLURM_JOB_ID' TERM\necho begun\nwhile true; do sleep 1; done"
        _, printed = submit(environment, tmp_path, stubborn)
        wait_for(lambda: printed.exists() and "begun" in printed.read_text())
        wait_for(lambda: {"munged", "slurmctld", "slurmd", "slurmstepd", "sleep"} <= set(alive(folder).values()))
    assert alive(folder) == {}
    assert not folder.exists()


def test_stop_ignores_other_folders(tmp_path: Path) -> None:
    (tmp_path / "slurm.conf").write_text("ClusterName=production\n")
    stopped = run_script("stop", tmp_path)
    assert stopped.stderr == f"no cluster of `slurm_cluster start` in {tmp_path}\n"
    assert [file.name for file in tmp_path.iterdir()] == ["slurm.conf"]


def test_start_without_slurm_names_the_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    started = run_script("start")
    assert started.returncode == 1
    assert started.stderr.startswith("no Slurm here (")
    assert started.stderr.endswith("sbatch, scancel, sinfo, squeue not found): apt-get install slurm-wlm munge\n")
