"""The predicted memory of a train step, compared with that of a process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(TESTS.parent), "JAX_PLATFORMS": "cpu"}
MEASURED = """
import json, re, sys
import jax
import numpy as np
from conftest import small_config
from rustgpt_jax.config.schema import partition
from rustgpt_jax.sharding.sharding_plan import (ShardingPlan)
from rustgpt_jax.planning.estimate import compile_step
from rustgpt_jax.training.memory_estimate import batch_shapes, state_shapes
from rustgpt_jax.training.train_step import compiled_init_state, train_step

def status(name):
    return 1024 * int(re.search(rf"{name}:\\s+(\\d+)", open("/proc/self/status").read())[1])

LARGE = {"model.n_layers": 8, "model.d_model": 512, "model.attention.n_heads": 8, "model.vocab_size": 16384,
         "model.context_length": 256, "training.batch_size": 8, "schedule.warmup_steps": 0}
config = small_config(**LARGE | json.loads(sys.argv[1]))
window, rows = config.model.context_length, config.training.batch_size
predicted = compile_step(config, window, ShardingPlan(), for_cpu=True).peak
static, hparams = partition(config)
step = jax.jit(train_step, static_argnums=0, donate_argnums=1)
step = step.lower(static, state_shapes(config), batch_shapes(rows, window), hparams).compile()
start = compiled_init_state.lower(static, hparams).compile()
before = status("VmRSS")
state = jax.block_until_ready(start(hparams))
batch = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), batch_shapes(rows, window))
# Reset the peak memory of the process.
open("/proc/self/clear_refs", "w").write("5")
for _ in range(2):
    state, metrics = jax.block_until_ready(step(state, batch, hparams))
print(json.dumps([predicted, status("VmHWM") - before]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "knobs",
    [
        "{}",
        pytest.param('{"model.dtype": "bfloat16", "model.remat": "full"}', marks=pytest.mark.long),
        pytest.param('{"training.grad_accum_steps": 4}', marks=pytest.mark.long),
    ],
)
def test_predicted_memory_matches_a_process(knobs: str) -> None:
    command = [sys.executable, "-c", MEASURED, knobs]
    done = subprocess.run(command, cwd=TESTS, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    predicted, measured = (float(number) for number in done.stdout.strip(" []\n").split(","))
    assert predicted == pytest.approx(measured, rel=0.1)
