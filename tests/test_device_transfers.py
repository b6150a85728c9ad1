"""The training loop does not wait for the device and makes no implicit transfers."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import pytest
from small_runs import run_config, train

from rustgpt_jax.training import loop
from rustgpt_jax.training.train_step import Metrics
from rustgpt_jax.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("quick_codegen")

# Steps without events, except for the last one.
STEPS: dict[str, Any] = {
    "training.steps": 8,
    "logging.eval_every": 8,
    "logging.checkpoint_every": 8,
    "faults.nonfinite_policy": "skip",
}


@pytest.mark.slow
def test_calls_make_no_implicit_transfers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_steps, guarded = loop.SingleRunExecutor.run_steps, list[int]()

    def run_guarded(
        executor: loop.SingleRunExecutor, active: Mapping[int, Trainer], n_steps: int
    ) -> Callable[[int], Metrics]:
        (run,) = active.values()
        # The first call transfers the constants of the program.
        if run.step:
            guarded.append(run.step)
        with jax.transfer_guard("disallow" if run.step else "allow"):
            return run_steps(executor, active, n_steps)

    monkeypatch.setattr(loop.SingleRunExecutor, "run_steps", run_guarded)
    train(tmp_path / "run", **STEPS)
    assert len(guarded) >= 3 and guarded[-1] < 8


@pytest.mark.slow
def test_metrics_are_read_one_call_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advanced, events = Trainer.on_steps_dispatched, list[tuple[str, int]]()

    def noted(run: Trainer, count: int, read_metrics: Callable[[], Metrics], seconds: float) -> None:
        first = run.step
        events.append(("begun", first))

        def read() -> Metrics:
            events.append(("read", first))
            return read_metrics()

        advanced(run, count, read, seconds)

    monkeypatch.setattr(Trainer, "on_steps_dispatched", noted)
    train(tmp_path / "run", **STEPS)
    calls = [step for what, step in events if what == "begun"]
    assert len(calls) >= 4
    assert [step for what, step in events if what == "read"] == calls
    for call, after in zip(calls[:-1], calls[1:], strict=True):
        assert events.index(("read", call)) == events.index(("begun", after)) + 1


def test_state_buffers_are_donated() -> None:
    from rustgpt_jax.config.schema import partition
    from rustgpt_jax.training.memory_estimate import batch_shapes, state_shapes
    from rustgpt_jax.training.train_step import compiled_train_steps

    config = run_config()
    static, hparams = partition(config)
    state = state_shapes(config)
    batches = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((2, *leaf.shape), leaf.dtype), batch_shapes(4, 16))
    arguments = static, state, batches, jax.ShapeDtypeStruct((), "int32"), hparams
    program = compiled_train_steps.lower(*arguments, jax.ShapeDtypeStruct((), "int32")).compile()
    bytes_of_state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert program.memory_analysis().alias_size_in_bytes >= bytes_of_state
