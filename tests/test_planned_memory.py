"""The predicted memory of a train step, compared with that of a process and of the program of a run."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import small_config

from rustgpt_jax.config.schema import partition
from rustgpt_jax.planning.estimate import estimate
from rustgpt_jax.sharding.hardware_specs import CHIPS
from rustgpt_jax.sharding.sharding_plan import ShardingPlan
from rustgpt_jax.training.memory_estimate import batch_shapes, state_shapes
from rustgpt_jax.training.train_step import compiled_train_steps

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
@pytest.mark.long
@pytest.mark.parametrize(
    "knobs", ["{}", '{"model.dtype": "bfloat16", "model.remat": "full"}', '{"training.grad_accum_steps": 4}']
)
def test_predicted_memory_matches_a_process(knobs: str) -> None:
    command = [sys.executable, "-c", MEASURED, knobs]
    done = subprocess.run(command, cwd=TESTS, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    predicted, measured = (float(number) for number in done.stdout.strip(" []\n").split(","))
    assert predicted == pytest.approx(measured, rel=0.1)


# The program of a run takes several steps. Portable kernels, and no residuals that only CPUs save, as in plans.
PORTABLE = {
    "model.d_model": 64,
    "model.vocab_size": 256,
    "model.context_length": 64,
    "model.save_residuals": False,
    "model.attention.kernel": "blockwise",
}
CASES = {
    "gpt2": {"model.norm": "layernorm", "model.feedforwards": "gelu", "model.positions": "learned", "model.bias": True},
    "llama": {"model.attention.n_kv_heads": 2, "model.tie_embeddings": False},
    "experts": {"model.feedforwards": "moe", "model.moe.n_experts": 4},
    "latent attention": {"model.mixers": "latent_attention", "model.mla.kv_lora_rank": 16},
    "recurrent": {"model.mixers": ("rg_lru", "local_attention")},
    "microbatches": {"training.grad_accum_steps": 4, "model.scan_layers": False},
    "remat": {"model.remat": "full", "training.loss_chunk_size": 16},
    "offload": {"optimizer.offload_state": True},
}
LONG_CASES = ("llama", "experts", "latent attention", "recurrent", "microbatches")


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.long) if case in LONG_CASES else case for case in CASES]
)
def test_plan_matches_the_program_of_a_run(case: str) -> None:
    config = small_config(**PORTABLE | CASES[case])
    length, steps = config.model.context_length, config.training.steps_per_jit_call
    planned = estimate(config, length, ShardingPlan(), CHIPS["h100"]).memory
    static, hparams = partition(config)
    batch = batch_shapes(config.training.batch_size, length)
    batches = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((steps, *leaf.shape), leaf.dtype), batch)
    arguments = static, state_shapes(config), batches, np.int32(steps), hparams, np.int32(0)
    found = compiled_train_steps.lower(*arguments).compile().memory_analysis()
    assert found is not None
    shared = found.alias_size_in_bytes
    peak = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes - shared
    # Programs for CPUs ignore that the optimizer state is in host memory.
    assert planned.peak == pytest.approx(peak - planned.host, rel=0.1)
    assert (planned.host > 0) == (case == "offload")
