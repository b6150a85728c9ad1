"""Models beyond the available memory are rejected before allocation, and failed allocations are reported."""

import dataclasses
import os
import resource
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from conftest import small_config
from rich.console import Console
from small_runs import ROOT, run_config

from rustgpt_jax.errors import UserError, is_out_of_memory
from rustgpt_jax.sharding import hardware_specs as machines
from rustgpt_jax.sharding.hardware_specs import Machine, free_memory, query_machine
from rustgpt_jax.sweeps import sweep_command
from rustgpt_jax.sweeps.trials import make_trials
from rustgpt_jax.training import memory_estimate, run_training
from rustgpt_jax.training.memory_estimate import (
    check_inference_memory,
    check_training_memory,
    out_of_memory_message,
    training_needs,
)

GIGABYTE = 10**9
SMALL = Machine("cpu", 1, 8 * GIGABYTE, 0.0)
HUGE = {
    "layers": {"model.n_layers": 1_000_000},
    "unrolled layers": {"model.n_layers": 1_000_000, "model.scan_layers": False},
    "all layers": {"model.n_layers": 2**31 - 1},
    "width": {"model.d_model": 1_000_000},
    "vocabulary": {"model.vocab_size": 100_000_000},
    "experts": {"model.moe.n_experts": 1_000_000, "model.feedforwards": ("moe",)},
    "batch": {"training.batch_size": 1_000_000},
    "call": {"training.steps_per_jit_call": 65_536, "training.batch_size": 4096},
}


@pytest.mark.parametrize("name", HUGE)
def test_training_that_cannot_fit_the_memory_is_refused(name: str) -> None:
    config = small_config(**HUGE[name])
    with pytest.raises(UserError) as caught:
        check_training_memory(config, SMALL, {})
    said = str(caught.value)
    (knob, value), *_ = HUGE[name].items()
    assert said.startswith("A training step needs at least ") and "and 8 GB are available: " in said
    assert f"config.{knob}={value}" in said and said.endswith("Use --allow_oversubscription to run anyway.")
    check_training_memory(config, SMALL, {}, allow_oversubscription=True)


def test_small_configs_are_not_traced_to_check_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_estimate, "training_needs", lambda config: pytest.fail("it was counted"))
    check_training_memory(small_config(), SMALL, {})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model.mixers": ("attention", "rg_lru", "deltanet")},
        {"model.feedforwards": ("moe",), "model.moe.n_experts": 16},
        {"model.scan_layers": False, "training.batch_size": 64},
        {"model.context_length": 512, "training.grad_accum_steps": 2},
    ],
)
def test_upper_bound_is_above_the_estimate(changes: dict[str, Any]) -> None:
    """A config that the estimate would reject must not be accepted by the bound."""
    config = small_config(**changes)
    assert memory_estimate._upper_bound(config) > sum(training_needs(config).values())


def test_deep_models_are_extrapolated(monkeypatch: pytest.MonkeyPatch) -> None:
    patterns = {"model.mixers": ("attention", "local_attention")}
    monkeypatch.setattr(memory_estimate, "MAX_TRACED_LAYERS", 6)
    config = small_config(**patterns, **{"model.n_layers": 25})
    few = dataclasses.replace(config, model=dataclasses.replace(config.model, scan_layers=True))
    counted = training_needs(few)
    exactly = {"parameters": memory_estimate.total_bytes(memory_estimate.parameter_shapes(few.model))}
    # The remaining layer is of the first kind in the pattern.
    assert counted["parameters"] == pytest.approx(exactly["parameters"], rel=0.01)


def test_all_mesh_axes_but_data_shard_the_model() -> None:
    config = small_config(**{"model.d_model": 8192, "model.vocab_size": 1000})
    with pytest.raises(UserError, match="on each of 8 devices"):
        check_training_memory(config, dataclasses.replace(SMALL, n_devices=8), {"data": 8})
    check_training_memory(config, dataclasses.replace(SMALL, n_devices=8), {"data": 1, "fsdp": 8})


@pytest.mark.parametrize(
    ("changes", "n_rows", "part"),
    [
        ({"model.n_layers": 1_000_000}, 0, "parameters"),
        ({"model.vocab_size": 100_000_000}, 0, "parameters"),
        ({"model.context_length": 100_000_000}, 0, "KV cache"),
        ({"training.loss_chunk_size": 32_000_000, "model.vocab_size": 500}, 1_000_000, "logits"),
    ],
)
def test_inference_that_cannot_fit_the_memory_is_refused(changes: dict[str, Any], n_rows: int, part: str) -> None:
    config = small_config(**changes)
    with pytest.raises(UserError, match=rf"needs at least .* of memory, and 8 GB are available: \S+ \S+ for {part}"):
        check_inference_memory(config, SMALL, n_rows, n_cached=0 if n_rows else 100_000_000)
    check_inference_memory(config, SMALL, n_rows, allow_oversubscription=True)


def test_cache_size_depends_on_the_generated_length() -> None:
    config = small_config(**{"model.context_length": 100_000_000})
    for n_cached in (0, 64):
        check_inference_memory(config, SMALL, 0, n_cached=n_cached)


def test_train_checks_memory_before_creating_the_run_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="A training step needs at least"):
        run_training.train(run_config(**{"model.n_layers": 1_000_000}), tmp_path / "run", {}, Console(file=StringIO()))
    assert not (tmp_path / "run").exists()


def test_sweep_refuses_a_trial_that_cannot_fit_the_memory() -> None:
    from conftest import small_tree

    trials = make_trials(small_tree(), [{"model.d_model": 32}, {"model.d_model": 1_000_000}])
    with pytest.raises(UserError, match="The trial model.d_model=1000000 is invalid: A training step needs at least"):
        sweep_command._check_each(trials, sweep_command._check_memory, is_tpe=False)


def test_train_warns_about_many_separately_compiled_blocks() -> None:
    class Run:
        class inputs:
            full_config = small_config(**{"model.n_layers": 300, "model.scan_layers": False})

    assert "300 blocks are compiled one by one" in run_training._compile_time_warnings(Run())[0]  # type: ignore[arg-type]
    Run.inputs.full_config = small_config(**{"model.n_layers": 300})
    assert run_training._compile_time_warnings(Run()) == []  # type: ignore[arg-type]


# Available memory.


def test_free_memory_respects_all_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = free_memory()
    statistics = "anon 5\ninactive_file 20000\nactive_file 30000\n"
    group = {"memory.max": "1000000", "memory.current": "300000", "memory.stat": statistics}
    for name, text in group.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(machines, "CONTROL_GROUP", tmp_path)
    assert free_memory() == 750_000
    (tmp_path / "memory.max").write_text("max\n")
    assert 0.5 * before < free_memory() < 2 * before
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1, 1))
    assert free_memory() == 0
    assert query_machine().platform == "cpu"


# Failed allocations.


class JaxRuntimeError(RuntimeError):
    """An error like jaxlib's."""


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (MemoryError(), True),
        (JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8 bytes."), True),
        (JaxRuntimeError("INTERNAL: Error dispatching computation: Out of memory allocating 8 bytes."), True),
        (JaxRuntimeError("std::bad_alloc"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (caused(KeyError("x"), MemoryError()), True),
        (JaxRuntimeError("INTERNAL: something else"), False),
        (ValueError("Out of memory"), False),
        (OSError(28, "No space left on device"), False),
    ],
)
def test_failed_allocations_are_recognized(error: Exception, is_one: bool) -> None:
    assert is_out_of_memory(error) == is_one


def test_out_of_memory_message_names_the_largest_needs() -> None:
    said = out_of_memory_message(small_config(**{"model.vocab_size": 100_000_000}))
    assert "an allocation failed" in said and "config.model.vocab_size=100000000" in said and " GB for " in said
    assert out_of_memory_message(None)


@pytest.mark.slow
@pytest.mark.parametrize(
    "knobs",
    [
        ["--config.model.d_model=8192", "--config.model.n_layers=12"],
        # A thread of XLA aborts the process.
        pytest.param(["--config.model.vocab_size=20000000"], marks=pytest.mark.long),
    ],
)
def test_failed_allocation_is_a_user_error(knobs: list[str], tmp_path: Path) -> None:
    """With an address space of 8 GB, and a step that the user starts despite the estimate."""
    knobs = [*knobs, "--allow_oversubscription"]
    launch = [sys.executable, str(ROOT / "launch.py"), "train", f"--config={ROOT}/configs/tiny.py", "--run=run"]
    done = subprocess.run(
        ["bash", "-c", 'ulimit -v 8388608; exec "$@"', "bash", *launch, *knobs],
        cwd=tmp_path,
        env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: There is not enough memory") and knobs[0].removeprefix("--") in last
