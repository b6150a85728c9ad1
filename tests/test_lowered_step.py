"""What the train step of a recipe contains when it is lowered for an NVIDIA GPU, and compiled for a mesh with fsdp."""

import importlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import numpy as np
import pytest
from conftest import small_config

from rustgpt_jax.config.schema import ModelConfig, partition
from rustgpt_jax.config.validation import resolve
from rustgpt_jax.model import kernels
from rustgpt_jax.training.memory_estimate import batch_shapes, state_shapes
from rustgpt_jax.training.train_step import compiled_train_steps, train_step

ROOT = Path(__file__).parent.parent
# Rows of a step. Without microbatches, no scan hides the sizes of a batch.
ROWS = {"gpt2_124m": 32, "llama3_8b": 2}


class Step(NamedTuple):
    """A lowered train step, the number of arrays of its state, and the sizes of its other arrays."""

    text: str
    n_state_arrays: int
    n_rows: int
    length: int
    model: ModelConfig


@pytest.fixture(scope="module", params=ROWS)
def step(request: pytest.FixtureRequest) -> Iterator[Step]:
    """The step of a recipe in bfloat16, lowered for an H100 with cuDNN."""
    tree = importlib.import_module(f"configs.{request.param}").get_config()
    sizes = {"model.n_layers": 4, "training.batch_size": ROWS[request.param], "training.grad_accum_steps": 1}
    config = resolve(tree, sizes)
    static, hparams = partition(config)
    length, count = config.model.context_length, jax.ShapeDtypeStruct((), np.int32)
    batch = batch_shapes(config.training.batch_size, length)
    batches = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((2, *leaf.shape), leaf.dtype), batch)
    state = state_shapes(config)
    cudnn = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    if not hasattr(cudnn, "check_cudnn_version"):
        pytest.skip("this JAX looks for cuDNN in another way, and finds none here")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
        patch.setattr(kernels, "default_device", lambda: SimpleNamespace(platform="gpu", compute_capability="9.0"))
        traced = compiled_train_steps.trace(static, state, batches, count, hparams, count)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert config.model.dtype == "bfloat16"
    yield Step(text, len(jax.tree.leaves(state)), config.training.batch_size, length, config.model)


def array_shapes(text: str) -> set[tuple[int, ...]]:
    """Return the shapes of all arrays of floating-point numbers in a StableHLO program."""
    return {tuple(map(int, dims.split("x"))) for dims in re.findall(r"tensor<([\dx]+)x(?:f32|bf16)>", text)}


def products(text: str) -> list[tuple[str, str]]:
    """Return the types of the factors of all matrix products of a StableHLO program."""
    lines = (line.rpartition(" : ")[2] for line in text.splitlines() if "stablehlo.dot_general" in line)
    return [(left, right) for left, right in (re.findall(r"x([a-z]\w*)>", line)[:2] for line in lines)]


def test_step_has_no_logits_of_the_whole_batch(step: Step) -> None:
    sizes = {step.model.vocab_size, step.model.d_model}
    of_tokens = [shape for shape in array_shapes(step.text) if sizes.intersection(shape) == {step.model.vocab_size}]
    # The logits of a chunk.
    assert 2**28 < 4 * max(map(math.prod, of_tokens)) <= 2**29


def test_step_has_no_attention_scores(step: Step) -> None:
    assert len(re.findall(r"cudnn\$fmha\w*", step.text)) >= 2
    square = [shape for shape in array_shapes(step.text) if shape.count(step.length) >= 2]
    scores = step.n_rows * step.model.attention.n_heads * step.length**2
    assert all(math.prod(shape) < scores for shape in square), square


def test_step_donates_the_whole_state(step: Step) -> None:
    (main,) = re.findall(r"func.func public @main\((.*?)\) -> ", step.text, re.DOTALL)
    assert main.count("tf.aliasing_output") + main.count("jax.buffer_donor") == step.n_state_arrays


def test_step_does_not_call_the_host(step: Step) -> None:
    targets = set(re.findall(r"custom_call @([\w$]+)", step.text.replace('"', "")))
    assert {target for target in targets if "cudnn" not in target} == set()


def test_step_has_no_float32_products(step: Step) -> None:
    found = products(step.text)
    assert len(found) >= 3 * 5 and set(found) == {("bf16", "bf16")}


# The optimizer.


def test_new_moments_are_not_kept_until_the_update_is_checked() -> None:
    config = small_config(**{"model.d_ff": 96, "model.n_layers": 1, "training.batch_size": 1})
    static, hparams = partition(config)
    lowered = jax.jit(train_step, static_argnums=0, donate_argnums=1).lower(
        static, state_shapes(config), batch_shapes(1, 32), hparams
    )
    text = lowered.compile().as_text()
    assert text is not None
    (entry,) = re.findall(r"\nENTRY .*?\n}", text, re.DOTALL)
    arrays = [line for line in entry.splitlines() if re.search(r"= f32\[1,32,96\]\S* (fusion|copy)\(", line)]
    # For both kernels of this shape, gate and up: the squared gradient, Adam's direction, the update, and the new
    # moments and parameters.
    written = [line for line in arrays if "jvp" not in line]
    assert len(written) == 2 * 6, written


# A mesh.

MESH_PROGRAM = """
import json, sys
import jax
from conftest import small_config
from rustgpt_jax.planning.estimate import compile_step
from rustgpt_jax.sharding.sharding_plan import plan_for_devices

sizes = json.loads(sys.argv[1])
config = small_config(**sizes)
plan = plan_for_devices(config.mesh, jax.devices())
step = compile_step(config, 32, plan)
found = [[each.kind, each.times, each.total / each.times] for each in step.collectives]
json.dump([found, list(step.warnings)], sys.stdout)
"""
VOCABULARY, WIDTH, CHUNKS = 2048, 64, 4
# A chunk has 16 tokens of each device, which has 2 rows of 32 tokens.
MESH_SIZES = {
    "model.n_layers": 2,
    "model.d_model": WIDTH,
    "model.attention.n_heads": 8,
    "model.attention.head_dim": 8,
    "model.d_ff": 96,
    "model.vocab_size": VOCABULARY,
    "model.dtype": "bfloat16",
    "training.batch_size": 16,
    "training.loss_chunk_size": 2 * 32 // CHUNKS,
    "mesh.data": 1,
    "mesh.fsdp": 8,
}


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.long)])
def test_fsdp_gathers_the_output_matrix_once_and_looks_embeddings_up_where_they_are(tied: bool) -> None:
    command = [sys.executable, "-c", MESH_PROGRAM, json.dumps(MESH_SIZES | {"model.tie_embeddings": tied})]
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    made = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    collectives, warnings = json.loads(made.stdout)
    assert warnings == []
    # Bytes of a matrix of vocabulary and channels that a device receives.
    in_float32 = VOCABULARY * WIDTH * 4 * 7 / 8
    large = [collective for collective in collectives if collective[2] >= in_float32 / 2]
    # The gradient of the output matrix is reduced once, too, and not for every chunk.
    assert sorted(large) == [["all-gather", 1, in_float32 / 2], ["reduce-scatter", 1, in_float32]], collectives
