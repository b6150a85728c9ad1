"""The `slurm` fixture: a real Slurm of one machine, for tests that submit jobs."""

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "slurm_cluster"


def run_script(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run tests/slurm_cluster in a subprocess."""
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True)


@contextmanager
def cluster() -> Iterator[dict[str, str]]:
    """Start a cluster, yield the environment of its commands, and stop it. Skips the test without Slurm."""
    started = run_script("start")
    if started.stderr.startswith("no Slurm here"):
        pytest.skip("no Slurm: apt-get install slurm-wlm munge")
    assert started.returncode == 0, started.stderr
    name, configuration = shlex.split(started.stdout)[1].split("=", 1)
    try:
        yield os.environ | {name: configuration}
    finally:
        stopped = run_script("stop", Path(configuration).parent)
        assert stopped.returncode == 0, stopped.stderr


@pytest.fixture(scope="session")
def slurm() -> Iterator[dict[str, str]]:
    """The environment of a cluster that is shared by the session of a worker."""
    with cluster() as environment:
        yield environment
