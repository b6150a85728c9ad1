"""Populations: each run gives the same results as when it is trained alone."""

import logging
import math
from io import StringIO
from pathlib import Path
from typing import Any

import jax
import pytest
from rich.console import Console
from test_loop import assert_same_bits, config_of, contents, metrics, stored_state, tiny

from rustgpt_jax.config.schema import Config
from rustgpt_jax.errors import UserError
from rustgpt_jax.sharding.sharding_plan import ShardingPlan
from rustgpt_jax.training import run_training
from rustgpt_jax.training.loop import PopulationExecutor, run_training_loop
from rustgpt_jax.training.run_inputs import prepare_inputs
from rustgpt_jax.training.trainer import Trainer
from rustgpt_jax.workdir.run_dir import RunDir

pytestmark = pytest.mark.usefixtures("quick_compilation")

QUIET = Console(file=StringIO())
NO_SAMPLES: dict[str, Any] = {"logging.sample_prompts": ()}
ONE_DEVICE = ShardingPlan()


class Silent:
    def update(self, *_: Any) -> None: ...

    def update_evaluation(self, done: int, total: int) -> None: ...

    def message(self, text: str) -> None: ...


def train_together(
    mode: str, configs: list[Config], path: Path, n_slots: int | None = None, calls: float = math.inf
) -> list[Trainer]:
    """Train configs as one population in the folders 0, 1, ... of a path, for at most `calls` calls."""
    runs = []
    for index, config in enumerate(configs):
        inputs = prepare_inputs(config, RunDir(path / str(index)).tokenizer_file, QUIET)
        runs.append(Trainer(inputs, path / str(index), {}, ONE_DEVICE))
    left = calls

    def count_call() -> None:
        nonlocal left
        left -= 1

    for run in runs:
        run.__enter__()
        run.begin(Silent())
    run_training_loop(runs, PopulationExecutor(mode, runs, n_slots or len(runs)), lambda: left < 0, count_call)
    for run in runs:
        run.__exit__(None, None, None)
    return runs


def train_alone(config: Config, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_training, "draw_loss_curves", lambda folder: folder / "loss.png")
    assert run_training.train(config, path, {}, QUIET) == 0


def population(base: dict[str, Any]) -> list[Config]:
    """Return configs that differ in learning rate, seed, dropout rate and number of steps."""
    trials = [
        {"optimizer.learning_rate": 1e-3, "seed": 0},
        {"optimizer.learning_rate": 1e-2, "seed": 1, "model.dropout": 0.3},
        {"optimizer.learning_rate": 3e-2, "seed": 1, "training.steps": 7},
    ]
    return [tiny(**(NO_SAMPLES | base | trial)) for trial in trials]


def staged(accumulation: int) -> list[Config]:
    return [config_of("facts", "byte", accumulation, boundary) for boundary in (5, 3)]


@pytest.mark.parametrize(
    "configs",
    [
        pytest.param(population({}), id="numbers"),
        pytest.param(
            population({"training.grad_accum_steps": 2, "optimizer.name": "muon"}),
            id="accumulation",
            marks=[pytest.mark.slow, pytest.mark.long],
        ),
        pytest.param(staged(2), id="stages", marks=[pytest.mark.slow, pytest.mark.long]),
    ],
)
def test_exact_mode_is_bit_exact(configs: list[Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_together("exact", configs, tmp_path / "together", n_slots=len(configs) + 1)
    for index, config in enumerate(configs):
        alone, together = tmp_path / f"alone_{index}", tmp_path / "together" / str(index)
        train_alone(config, alone, monkeypatch)
        for which in ("last", "best"):
            assert_same_bits(stored_state(config, together, which), stored_state(config, alone, which))
        assert metrics(together) == metrics(alone)
        for name in ("samples.jsonl", "tokenizer.json", "data.json"):
            assert contents(together).get(name) == contents(alone).get(name)


@pytest.mark.slow
def test_fused_mode_is_close_to_each_run_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = population({})
    train_together("fused", configs, tmp_path / "together", n_slots=4)
    for index, config in enumerate(configs):
        train_alone(config, tmp_path / f"alone_{index}", monkeypatch)
        pairs = zip(metrics(tmp_path / "together" / str(index)), metrics(tmp_path / f"alone_{index}"), strict=True)
        for ours, theirs in pairs:
            assert ours.keys() == theirs.keys()
            for name in ours.keys() & {"train/loss", "valid/loss"}:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["exact", pytest.param("fused", marks=pytest.mark.long)])
def test_population_compiles_once_and_resumes_bit_exactly(
    mode: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # A width that no other test uses.
    configs = population({"model.d_ff": 24})
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        train_together(mode, configs, tmp_path / "straight", n_slots=4)
        train_together(mode, configs, tmp_path / "broken", n_slots=4, calls=2)
        train_together(mode, configs, tmp_path / "broken", n_slots=4)
    assert sum("Finished XLA compilation of jit(population_steps)" in line for line in caplog.messages) == 1
    for index, config in enumerate(configs):
        straight, broken = tmp_path / "straight" / str(index), tmp_path / "broken" / str(index)
        assert_same_bits(stored_state(config, broken), stored_state(config, straight))
        assert metrics(broken) == metrics(straight)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["exact", pytest.param("fused", marks=pytest.mark.long)])
def test_diverged_run_does_not_affect_the_population(mode: str, tmp_path: Path) -> None:
    calm = [tiny(**NO_SAMPLES, seed=seed) for seed in (0, 1)]
    wild = tiny(**NO_SAMPLES, **{"optimizer.learning_rate": 1e30})
    runs = train_together(mode, [calm[0], wild, calm[1]], tmp_path / "wild")
    train_together(mode, [calm[0], calm[0], calm[1]], tmp_path / "calm")
    assert [run.diverged_at is None for run in runs] == [True, False, True]
    for index in (0, 2):
        config = calm[index // 2]
        assert_same_bits(
            stored_state(config, tmp_path / "wild" / str(index)), stored_state(config, tmp_path / "calm" / str(index))
        )
    lines = metrics(tmp_path / "wild" / "1")
    assert lines[-1]["step"] == runs[1].diverged_at
    measured = ("train/loss", "train/gradient_norm", "train/update_norm")
    assert not all(math.isfinite(lines[-1][name]) for name in measured)
    assert all(math.isfinite(line[name]) for line in lines[:-1] for name in measured if name in line)


def test_train_reports_divergence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run diverged: the loss, .* of step \d+ is not finite"):
        run_training.train(tiny(**NO_SAMPLES, **{"optimizer.learning_rate": 1e30}), tmp_path / "run", {}, QUIET)


@pytest.mark.slow
@pytest.mark.long
def test_paused_run_resumes_bit_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(**NO_SAMPLES)
    inputs = prepare_inputs(config, tmp_path / "none.json", QUIET)
    for until in (4, 8, None):
        with Trainer(inputs, tmp_path / "paused", {}, ONE_DEVICE, until) as run:
            run.begin(Silent())
            run_training_loop([run], PopulationExecutor("exact", [run], 2), lambda: False)
            assert run.step == (until or 10)
    train_alone(config, tmp_path / "straight", monkeypatch)
    assert_same_bits(stored_state(config, tmp_path / "paused"), stored_state(config, tmp_path / "straight"))
    assert metrics(tmp_path / "paused") == metrics(tmp_path / "straight")
