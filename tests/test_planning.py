"""Estimates of memory and time: roofline bounds, memory by purpose, suggestions, and the command."""

import dataclasses
import io
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from conftest import small_config, small_tree
from hypothesis import given, settings
from hypothesis import strategies as some
from rich.console import Console

from configs import gpt2_124m
from rustgpt_jax.config.schema import replace_paths
from rustgpt_jax.config.validation import flatten_tree, resolve
from rustgpt_jax.errors import UserError
from rustgpt_jax.model.flops import parameter_shapes, total_bytes, training_flops_per_token
from rustgpt_jax.planning.estimate import (
    Estimate,
    StepTime,
    choose_remat,
    compile_step,
    compute_collective_time,
    compute_step_time,
    estimate,
    list_suggestions,
    resolve_auto_remat,
)
from rustgpt_jax.planning.hlo import Collective
from rustgpt_jax.planning.report import print_estimate, print_plan, print_suggestions, set_vocab_size
from rustgpt_jax.sharding.hardware_specs import CHIPS, Chip, current_chip
from rustgpt_jax.sharding.sharding_plan import ShardingPlan, axis_sizes, check_batch_shards

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.usefixtures("quick_compilation")

# A chip with round numbers.
CHIP = Chip("X", 100.0, 200.0, 1e12, 10.0, 8.0, 8, 2.0)


@pytest.mark.parametrize("name", CHIPS)
def test_chips_are_plausible(name: str) -> None:
    chip = CHIPS[name]
    assert 1e14 < chip.bfloat16 < 1e16 and 1e10 < chip.memory < 1e12
    assert chip.bfloat16 > chip.bandwidth > chip.links > chip.network > 1e9
    assert chip.float8 is None or chip.float8 == pytest.approx(2 * chip.bfloat16, rel=1e-3)
    assert chip.flops("float8") == (chip.float8 or chip.bfloat16)
    assert chip.flops("bfloat16") == chip.flops("float32") == chip.bfloat16


@pytest.mark.parametrize(
    ("device_kind", "expected"),
    [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-80GB", "a100"), ("TPU v5 lite", "v5e"), ("TPU v5p", "v5p")],
)
def test_chips_match_jax_device_kinds(device_kind: str, expected: str) -> None:
    assert next(name for name, chip in CHIPS.items() if chip.kind in device_kind) == expected


# The roofline.


def collective(received: float, *groups: tuple[int, ...], kind: str = "all-gather", times: int = 1) -> Collective:
    return Collective(kind, "f32", received, groups, times, "")


@pytest.mark.parametrize(
    ("found", "seconds"),
    [
        # Within nodes of 8, over links.
        (collective(80.0, tuple(range(8)), tuple(range(8, 16))), 10.0),
        (collective(80.0, (0, 1), (8, 9), times=3), 30.0),
        # Over two nodes: four adapters are as fast as the links, two half as fast, one a quarter.
        (collective(80.0, tuple(range(16))), 10.0),
        (collective(80.0, (0, 2, 4, 6, 8, 10, 12, 14)), 10.0),
        (collective(80.0, (0, 4, 8, 12)), 20.0),
        (collective(80.0, (0, 8), (1, 9)), 40.0),
        # The node and the group with the fewest adapters are the slowest.
        (collective(80.0, (0, 1, 2, 8)), 40.0),
        (collective(80.0, (0, 4, 8, 12), (1, 9)), 40.0),
        (collective(80.0, (0, 1), (7, 8), kind="collective-permute"), 40.0),
        (collective(80.0, (0, 1), (1, 2), kind="collective-permute"), 10.0),
    ],
)
def test_collective_time(found: Collective, seconds: float) -> None:
    assert compute_collective_time(found, CHIP) == seconds


@given(some.floats(0, 1e6), some.floats(0, 1e6), some.floats(0, 1e6))
def test_step_time_bounds(flops: float, traffic: float, received: float) -> None:
    seconds = compute_step_time(CHIP, "bfloat16", flops, traffic, [collective(received, (0, 1))])
    assert seconds == StepTime(flops / 100, traffic / 10, received / 8)
    assert max(seconds.compute, seconds.memory) <= seconds.overlapped <= seconds.exposed
    assert seconds.exposed <= 2 * seconds.overlapped
    assert getattr(seconds, seconds.limit) == seconds.overlapped


# One device.

WIDE = {"model.d_model": 64, "model.context_length": 128, "model.vocab_size": 256, "training.batch_size": 16}


@pytest.fixture(scope="module")
def found() -> Estimate:
    """The estimate of a small config on one device."""
    return estimate(small_config(**WIDE), 128, ShardingPlan(), CHIPS["h100"])


def test_memory_parts_add_up(found: Estimate) -> None:
    memory, compiled = found.memory, found.compiled
    parameters = total_bytes(parameter_shapes(found.config.model))
    assert memory.parameters == memory.gradients == parameters
    # Two moments of AdamW and a step count.
    assert memory.optimizer == pytest.approx(2 * parameters, abs=16)
    assert memory.peak == compiled.peak
    assert memory.batch >= 5 * 16 * 128 * 4
    assert compiled.shared >= 3 * parameters and memory.activations > 0
    assert not dataclasses.replace(found, chip=dataclasses.replace(found.chip, memory=1e6)).fits


def test_utilization_is_1_at_peak_flops(found: Estimate) -> None:
    for dtype, utilization in (("bfloat16", 1.0), ("float8", 0.5)):
        config = replace_paths(found.config, {"model.precision.matmul_dtype": dtype})
        changed = dataclasses.replace(found, chip=CHIP, config=config, model_flops=50.0)
        assert changed.utilization(0.5) == utilization


@pytest.mark.slow
def test_compiled_flops_match_the_models(found: Estimate) -> None:
    tokens = found.config.training.batch_size * 128
    assert found.model_flops == tokens * training_flops_per_token(found.config.model, 128)
    # Blockwise attention recomputes its scores in the backward pass.
    config = small_config(**WIDE, **{"model.attention.kernel": "reference"})
    plain = compile_step(config, 128, ShardingPlan())
    assert plain.flops == pytest.approx(found.model_flops, rel=0.02)
    assert plain.flops < found.compiled.flops < 1.3 * plain.flops
    assert plain.counted_once < 0.6 * plain.flops


@pytest.mark.slow
def test_remat_saves_memory_and_adds_flops(found: Estimate) -> None:
    again = estimate(small_config(**WIDE, **{"model.remat": "full"}), 128, ShardingPlan(), CHIPS["h100"])
    assert again.memory.peak < found.memory.peak
    assert again.compiled.flops > 1.15 * found.compiled.flops
    assert again.model_flops == found.model_flops


@pytest.mark.slow
def test_bfloat16_saves_memory(found: Estimate) -> None:
    """As on an accelerator; the program for a CPU converts to float32 and saves nothing."""
    narrow = small_config(**WIDE, **{"model.dtype": "bfloat16"})
    assert compile_step(narrow, 128, ShardingPlan()).working < 0.75 * found.compiled.working


def test_plan_requires_a_vocabulary_size() -> None:
    assert set_vocab_size(small_config()).model.vocab_size == 61
    of_tokenizer = small_config(**{"model.vocab_size": None, "tokenizer.vocab_size": 300})
    assert set_vocab_size(of_tokenizer).model.vocab_size == 300
    nothing = {"model.vocab_size": None, "tokenizer.vocab_size": None, "tokenizer.name": "char"}
    with pytest.raises(UserError, match="--config.model.vocab_size=N"):
        set_vocab_size(small_config(**nothing))


# Suggestions.


@given(some.data())
@settings(max_examples=25)
def test_suggestions_are_valid_on_the_same_devices(data: Any) -> None:
    powers = [data.draw(some.integers(0, 3)) for _ in range(4)]
    fsdp, tensor, context, rows = (2**power for power in powers)
    n_devices = fsdp * tensor * context * 2 ** data.draw(some.integers(0, 3))
    knobs: dict[str, Any] = {"mesh.fsdp": fsdp, "mesh.tensor": tensor, "mesh.context": context}
    knobs["model.remat"] = data.draw(some.sampled_from(["none", "full"]))
    shares = n_devices // tensor // context
    config = small_config(**knobs, **{"training.batch_size": rows * shares, "model.attention.n_heads": 8})
    for of_kind in list_suggestions(config, 32, n_devices):
        for change in of_kind:
            changed = change.apply_to(config)
            assert changed != config
            check_batch_shards(changed, 32, n_devices)
            assert math.prod(axis_sizes(changed.mesh, n_devices).values()) == n_devices
        assert len(set(map(str, of_kind))) == len(of_kind)


def test_list_suggestions() -> None:
    config = small_config(**{"training.batch_size": 32, "model.attention.n_heads": 4, "data.seq_len": None})
    assert [[str(change) for change in of_kind] for of_kind in list_suggestions(config, 1024, 8)] == [
        ["--config.training.grad_accum_steps=2", "--config.training.grad_accum_steps=4"],
        ["--config.model.remat=full"],
        ["--config.training.loss_chunk_size=512"],
        [f"--config.mesh.data={8 // n} --config.mesh.fsdp={n}" for n in (2, 4, 8)],
        [f"--config.mesh.data={8 // n} --config.mesh.tensor={n}" for n in (2, 4)],
    ]


# The report.


def shown(*estimates: Estimate) -> str:
    console = Console(file=io.StringIO(), width=150)
    print_estimate(estimates[0], "h100", console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_report_says_whether_the_step_fits(found: Estimate) -> None:
    text = shown(found)
    assert "It fits." in text and "on 1 h100 (one device)" in text and "Collectives" not in text
    small = dataclasses.replace(found, chip=dataclasses.replace(found.chip, memory=1e6))
    assert "It does not fit." in shown(small)


def test_report_says_whether_a_suggestion_fits(found: Estimate) -> None:
    small = dataclasses.replace(found, chip=dataclasses.replace(found.chip, memory=1e6))
    (change,) = list(list_suggestions(found.config, 128, 1))[1]
    console = Console(file=io.StringIO(), width=150)
    print_suggestions([(change, small)], small.room, console)
    print_suggestions([(change, found)], found.room, console)
    none, one = console.file.getvalue().split("None of these alone makes it fit")  # type: ignore[attr-defined]
    assert "--config.model.remat=full" in none and " no " in none
    assert " yes " in one


# remat='auto'.


def test_remat_auto_weighs_attention_against_memory_traffic() -> None:
    recipe = resolve(gpt2_124m.get_config())

    def chosen(length: int, **changes: Any) -> str:
        config = replace_paths(recipe, {"model.context_length": length})
        return choose_remat(config, dataclasses.replace(CHIPS["h100"], **changes))[0]

    assert (chosen(512), chosen(1024)) == ("dots_no_batch", "none")
    assert (chosen(512, bandwidth=1e15), chosen(1024, bfloat16=1e18)) == ("none", "dots_no_batch")
    # A recurrence is recomputed without matrix products.
    recipe = replace_paths(recipe, {"model.mixers": ("rg_lru",)})
    assert chosen(512) == "none"


def test_remat_auto_is_none_on_a_cpu() -> None:
    values, origins = dict(flatten_tree(small_tree())) | {"model.remat": "auto"}, {"model.remat": "file"}
    resolve_auto_remat(values, {}, origins, current_chip())
    assert values["model.remat"] == "none" and origins["model.remat"].startswith("auto: recomputation saves time on")


# The command.


def launched(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launch.py"), "plan", *arguments]
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "COLUMNS": "150"}
    return subprocess.run(command, env=os.environ | quick, capture_output=True, text=True)


SMALL = [f"--config={ROOT}/configs/tiny.py", "--config.model.vocab_size=256"]


@pytest.mark.slow
def test_plan_of_a_mesh() -> None:
    done = launched(*SMALL, "--devices=8", "--chip=v5e", "--config.mesh.fsdp=4", "--config.mesh.tensor=2")
    assert (done.returncode, done.stderr) == (0, "")
    for words in ("on 8 v5e (fsdp 4 x tensor 2)", "all-gather", "reduce-scatter", "It fits.", "optimizer state"):
        assert words in done.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [(["--devices=8"], "plan needs --chip=NAME"), (["--chip=h100"], "plan needs --devices=N")],
)
def test_plan_asks_for_missing_flags(arguments: list[str], sentence: str) -> None:
    done = launched(*SMALL, *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert sentence in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("knobs", "chip", "devices", "sentence"),
    [
        ({}, "h101", 8, "--chip: unknown 'h101'. Did you mean 'h100'?"),
        ({}, "h100", 3, "config.training.batch_size=4 in 1 microbatches cannot be divided equally among 3 devices"),
        ({"mesh.data": 2}, "h100", 8, "config.mesh has data 2 = 2 devices, but there are 8 devices"),
        ({"model.norm": "rmsnrm"}, "h100", 8, "Did you mean 'rmsnorm'?"),
    ],
)
def test_plan_reports_user_errors(knobs: dict[str, Any], chip: str, devices: int, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        print_plan(small_config(**knobs), chip, devices, Console(file=io.StringIO()))
    assert sentence in str(caught.value)


@pytest.mark.slow
def test_plan_gives_the_reason_for_remat_auto() -> None:
    done = launched(*SMALL, "--devices=1", "--chip=h100", "--config.model.remat=auto")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("config.model.remat='dots_no_batch', auto: per token and layer, dots_no_batch recom")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "devices"), [("llama3_8b", 64), pytest.param("llama3_70b", 512, marks=pytest.mark.long)]
)
def test_large_models_can_be_planned(recipe: str, devices: int) -> None:
    done = launched(f"--config={ROOT}/configs/{recipe}.py", f"--devices={devices}", "--chip=h100")
    assert done.returncode == 0, done.stderr
    assert "It fits." in done.stdout
    assert jax.device_count() < devices
