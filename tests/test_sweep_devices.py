"""Sweeps on several devices: one trial per device or per mesh, with the losses of runs alone."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL
from test_loop import TINY

from rustgpt_jax.tracking.metric_writer import read_metrics
from rustgpt_jax.workdir.event_log import load_launches
from rustgpt_jax.workdir.run_dir import RunDir, load_config

LAUNCH = str(Path(__file__).parent.parent / "launch.py")
KNOBS = (
    SMALL | TINY | {"training.steps": 8, "training.batch_size": 8, "logging.log_every": 1, "logging.sample_prompts": ()}
)
CONFIG = f"""
from configs import base
from rustgpt_jax.sweeps.search_space import values

def get_config():
    tree = base.get_config()
    tree.update_from_flattened_dict({KNOBS})
    return tree

def sweep():
    return values("optimizer.learning_rate", 1e-3, 3e-3, 1e-2)
"""


def call(n_devices: int, *words: str) -> str:
    """Run a command with a number of devices, and return its output."""
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={n_devices}",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run([sys.executable, LAUNCH, *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def losses(run: Path) -> list[tuple[int, Any, Any]]:
    return [(line["step"], line.get("train/loss"), line.get("valid/loss")) for line in read_metrics(run)]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
    ("mesh", "per_trial"),
    [([], 1), (["--config.mesh.fsdp=2", "--config.mesh.data=1"], 2)],
)
def test_trials_on_separate_devices_match_runs_alone(tmp_path: Path, mesh: list[str], per_trial: int) -> None:
    (tmp_path / "small.py").write_text(CONFIG)
    config = f"--config={tmp_path}/small.py"
    preview = call(4, "sweep", config, f"--run={tmp_path}/sweep", "--dry_run", *mesh)
    call(4, "sweep", config, f"--run={tmp_path}/sweep", *mesh)
    if per_trial == 2:
        assert "each on 2 devices (fsdp 2)" in " ".join(preview.split())
    trials = sorted((tmp_path / "sweep" / "trials").iterdir())
    assert len(trials) == 3
    for trial in trials:
        (launch,) = load_launches(RunDir(trial))
        assert launch.devices == per_trial
        assert launch.mesh.get("fsdp", 1) == per_trial
    rate = load_config(trials[1]).optimizer.learning_rate
    alone = tmp_path / "alone"
    call(per_trial, "train", config, f"--run={alone}", f"--config.optimizer.learning_rate={rate}", *mesh)
    assert losses(alone) == losses(trials[1]) and len(losses(alone)) >= 8
