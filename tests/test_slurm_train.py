"""A Slurm job with the script of docs/concepts/reproducibility.md saves when warned, is requeued, and completes."""

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_loop import metrics
from test_slurm_cluster import output_of, state, submit, wait_for

from rustgpt_jax.sweeps.slurm import make_job_script

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "concepts" / "reproducibility.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_warned_job_is_requeued_and_completes(slurm: dict[str, str], tmp_path: Path) -> None:
    (script,) = re.findall(r"```\n(#SBATCH.*?)```", PAGE, re.DOTALL)
    steps = ("--config.training.steps=1200", "--config.logging.checkpoint_every=200", "--config.logging.log_every=100")
    arguments = f"--config={ROOT}/configs/tiny.py {' '.join(steps)} --run={tmp_path}/run"
    training = "rustgpt train --config=gpt2_124m --run=runs/gpt2"
    assert training in script
    script = script.replace(training, f"{sys.executable} {ROOT}/launch.py train {arguments}")
    environment = slurm | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "RUSTGPT_JAX_CACHE": os.environ["RUSTGPT_JAX_CACHE"]}
    job, printed = submit(environment, tmp_path, script)
    saved = tmp_path / "run" / "checkpoints"
    wait_for(lambda: any(path.name.isdigit() for path in saved.glob("*")), seconds=180)
    # Slurm sends this signal at the time given by --signal.
    output_of(slurm, "scancel", "--signal=USR1", job)
    wait_for(lambda: "Stopped by SIGUSR1 at step" in printed.read_text(), seconds=180)
    deadline = time.monotonic() + 240
    while "Done in" not in printed.read_text():
        assert time.monotonic() < deadline, printed.read_text()
        time.sleep(0.2)
    wait_for(lambda: state(slurm, job) == "COMPLETED", seconds=60)
    assert re.search(r"from step \d+", printed.read_text())
    logged = [line["step"] for line in metrics(tmp_path / "run") if "train/loss" in line]
    assert logged == [1, *range(100, 1201, 100)]


@pytest.mark.slow
@pytest.mark.long
def test_warned_job_of_two_processes_is_requeued(slurm: dict[str, str], tmp_path: Path) -> None:
    steps = ("--config.training.steps=2000", "--config.logging.checkpoint_every=200", "--config.logging.log_every=100")
    command = [sys.executable, str(ROOT / "launch.py"), "train", f"--config={ROOT}/configs/tiny.py", *steps]
    command += [f"--run={tmp_path}/run", "--launcher=slurm", "--slurm=ntasks=2", "--slurm=time=20"]
    environment = slurm | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "RUSTGPT_JAX_CACHE": os.environ["RUSTGPT_JAX_CACHE"]}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ((job, log),) = re.findall(r"Submitted as job (\d+)\. Its log: (\S+)", done.stdout)
    printed = Path(log)
    saved = tmp_path / "run" / "checkpoints"
    wait_for(lambda: any(path.name.isdigit() for path in saved.glob("*")), seconds=240)
    output_of(slurm, "scancel", "--signal=USR1", job)
    wait_for(lambda: "Stopped by SIGUSR1 at step" in printed.read_text(), seconds=180)
    deadline = time.monotonic() + 300
    while "Done in" not in printed.read_text():
        assert time.monotonic() < deadline, printed.read_text()
        time.sleep(0.2)
    wait_for(lambda: state(slurm, job) == "COMPLETED", seconds=60)
    assert re.search(r"steps from the start, on 2 x cpu \(data 2\)", printed.read_text())
    assert re.search(r"steps from step \d+, on 2 x cpu", printed.read_text())


def test_job_script_runs_the_given_command(tmp_path: Path) -> None:
    script = make_job_script(
        Path("runs/a"), ["python", "launch.py", "train", "--run=a b"], {"nodes": "4"}, Path("/some where")
    )
    assert "#SBATCH --nodes=4\n#SBATCH --ntasks-per-node=1\n" in script
    assert "cd '/some where'\nsrun " in script and " python launch.py train '--run=a b'\n" in script
    assert f"#SBATCH --output={Path('runs').absolute()}/a.slurm-%j.log" in script
    assert "ntasks-per-node" not in make_job_script(Path("a"), ["x"], {"ntasks": "2"}, Path("."))


def test_job_has_the_flags_of_the_command_except_those_of_its_launcher(tmp_path: Path) -> None:
    fake = tmp_path / "bin" / "sbatch"
    fake.parent.mkdir()
    fake.write_text(f"#!/bin/sh\ncat > {tmp_path}/script; echo 7\n")
    fake.chmod(0o755)
    command = [sys.executable, str(ROOT / "launch.py"), "train", "--config", f"{ROOT}/configs/tiny.py"]
    command += ["--launcher=slurm", "--slurm", "time=20", "--config.training.steps", "90", f"--run={tmp_path}/a run"]
    environment = os.environ | {"PATH": f"{fake.parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        [*command, "--barrier_timeout=50"], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and "Submitted as job 7." in done.stdout, done.stdout + done.stderr
    script = (tmp_path / "script").read_text()
    (line,) = (line for line in script.splitlines() if line.startswith("srun"))
    words = shlex.split(line.split("} ", 1)[1])
    wanted = [f"--config={ROOT}/configs/tiny.py", f"--run={tmp_path}/a run", "--barrier_timeout=50"]
    assert words[2] == "train" and sorted(words[3:]) == sorted([*wanted, "--config.training.steps=90"])
    assert "#SBATCH --time=20\n" in script
