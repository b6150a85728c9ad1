"""Doctor: it finds the step and tensor that went wrong, and training confirms the results of its interventions."""

import math
import os
import shlex
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from conftest import random_params, small_config
from hypothesis import given
from hypothesis import strategies as st
from small_runs import check_result, new_console, output_of, run_config

from rustgpt_jax.config.schema import Config, partition, replace_paths
from rustgpt_jax.config.validation import parse_overrides
from rustgpt_jax.errors import UserError
from rustgpt_jax.pytrees import flatten_paths
from rustgpt_jax.reproduce import diagnose
from rustgpt_jax.reproduce.diagnose import (
    Anomaly,
    DivergenceThreshold,
    Failure,
    InterventionTrial,
    describe_anomaly,
    describe_earlier_failure,
    describe_first_nonfinite,
    diagnose_run,
    find_anomaly,
    find_failure,
    find_outlier_rows,
    find_spike,
    format_advice,
    try_interventions,
)
from rustgpt_jax.reproduce.interventions import (
    CONTROL,
    Intervention,
    InterventionResult,
    fit_state,
    format_flags,
    list_interventions,
)
from rustgpt_jax.reproduce.recorded_run import ACTIVATION, HISTORY, PARAMETER, UPDATE, History, RecordedRun, StepTensor
from rustgpt_jax.reproduce.replay import ReplayedStep, is_finite, replay_one_step
from rustgpt_jax.tracking.metric_writer import read_metrics
from rustgpt_jax.training import run_training
from rustgpt_jax.training.train_step import init_state_from_params
from rustgpt_jax.workdir.run_dir import RunDir

pytestmark = pytest.mark.usefixtures("quick_codegen")

CHANGES = {"model.n_layers": 2, "schedule.name": "constant", "data.corpus": "files", "data.split": "tail"}


def config_of(**changes: Any) -> Config:
    file = Path(os.environ["RUSTGPT_JAX_CACHE"]) / "diagnosed.txt"
    file.write_text("To be, or not to be, that is the question:\n" * 40)
    return run_config(**(CHANGES | {"data.paths": (str(file),)} | changes))


def train(config: Config, path: Path) -> list[dict[str, Any]]:
    """Train a run to its end or to its fault, and return its record."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_training, "draw_loss_curves", lambda folder: folder / "loss.png")
        try:
            run_training.train(config, path, {}, new_console())
        except UserError as error:
            assert "diverged" in str(error)
    return [line for line in read_metrics(path) if "train/loss" in line]


def line(step: int, loss: float, **others: float) -> dict[str, Any]:
    return {"step": step, "train/loss": loss, "train/gradient_norm": 1.0, **others}


def history(lines: list[dict[str, Any]]) -> History:
    """Return lines of metrics as arrays."""
    columns = (np.array([line.get(name, 0.0) for line in lines], float) for name in HISTORY)
    return History(np.array([line["step"] for line in lines], int), *columns)


def must_find_anomaly(run: Any) -> Anomaly:
    anomaly = find_anomaly(run, None)
    assert anomaly is not None
    return anomaly


# The step.


@given(st.integers(0, 2**32 - 1), st.integers(20, 38), st.floats(-5, 5), st.sampled_from([1, 7, 2**16]))
def test_spike_is_found_only_if_there_is_one(seed: int, place: int, at: float, block: int) -> None:
    losses = at + 0.1 * np.random.default_rng(seed).uniform(-1, 1, 40) - 0.01 * np.arange(40)
    lines = [line(10 * index, float(loss)) for index, loss in enumerate(losses)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diagnose, "BLOCK_LINES", block)
        assert find_spike(history(lines)) is None
        lines[place]["train/loss"] += 5.0
        assert find_spike(history(lines)) == 10 * place


def test_spike_search_needs_little_memory() -> None:
    steps = np.arange(2**18)
    losses = -1e-6 * steps
    every = History(steps, losses, losses, losses, losses)
    tracemalloc.start()
    try:
        assert find_spike(every) is None
        assert every.where(steps >= 0) is every
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.5 * losses.nbytes


@pytest.mark.parametrize(
    ("changed", "is_bad"),
    [
        ({}, False),
        ({"train/loss": math.nan}, True),
        ({"train/gradient_norm": math.inf}, True),
        ({"train/update_norm": math.inf}, True),
        ({"train/other": math.inf}, False),
    ],
)
def test_is_finite_covers_loss_gradient_and_update(changed: dict[str, float], is_bad: bool) -> None:
    assert is_finite(line(3, 2.0) | changed) != is_bad


@pytest.mark.parametrize("name", ["loss", "gradient", "update"])
def test_nonfinite_value_is_named(name: str) -> None:
    metric = "train/loss" if name == "loss" else f"train/{name}_norm"
    run: Any = SimpleNamespace(
        load_history=lambda: history([line(1, 2.0), line(2, 2.0) | {metric: math.nan}]), rewinds=[]
    )
    assert must_find_anomaly(run)[:3] == (2, f"its {name} is not finite", True)


# The tensor and the rows.


def tensor(name: str, nonfinite: int = 0, kind: str = ACTIVATION, layer: int | None = 2) -> StepTensor:
    return StepTensor(kind, name, layer, name, 1.0, 3e19, nonfinite, 64, "")


def test_first_nonfinite_tensor_is_named_with_the_one_before_it() -> None:
    rows = [tensor("embedding/table", kind=PARAMETER), tensor("mixer/key"), tensor("mixer/scores", 5), tensor("x", 64)]
    sentence = describe_first_nonfinite(rows)
    assert sentence.startswith("The first tensor that is not finite is the activation mixer/scores (layer 2): 5 of 64")
    assert "The one before it is the activation mixer/key (layer 2), whose largest magnitude is 3e+19." in sentence
    large = tensor("layers/2/w", kind=UPDATE)._replace(largest=1e30)
    sentence = describe_first_nonfinite([*rows[:2], large])
    assert sentence.startswith("Every tensor of the step is finite, but the sum of their squares is not")
    assert sentence.endswith("1e+30, in the update of the parameter layers/2/w (layer 2).")
    assert "Before it, every parameter is finite." in describe_first_nonfinite([rows[0], rows[2]])
    assert "It was not finite before the step." in describe_first_nonfinite(
        [tensor("layers/2/w", 1, kind=PARAMETER), *rows]
    )
    assert "the forward pass" not in describe_first_nonfinite([rows[0], tensor("layers/2/w", 1, kind=UPDATE)])


def test_tensor_that_grew_most_is_named() -> None:
    reference = [tensor("a"), tensor("b"), tensor("c")]
    now = [reference[0]._replace(largest=6e19), reference[1]._replace(largest=3e22), reference[2]]
    (sentence,) = diagnose.describe_growth(now, reference, 7)
    assert sentence.startswith("The activation that grew most since step 7 is b:") and "1e+03 times" in sentence


@given(st.integers(0, 2**32 - 1))
def test_outlier_rows_are_nonfinite_or_far_above_the_others(seed: int) -> None:
    losses = np.random.default_rng(seed).permutation(np.linspace(2.8, 3.2, 16))
    assert find_outlier_rows(losses) == []
    losses[[4, 9]] = 8.0, 12.0
    assert find_outlier_rows(losses) == [9, 4]
    losses[[1, 7]] = math.nan, math.inf
    assert find_outlier_rows(losses) == [1, 7]


# Interventions.


def unavailable_reasons(config: Config, usual_norm: float = 0.63) -> dict[str, str | None]:
    return {each.name: each.unavailable_reason for each in list_interventions(config, usual_norm)}


def test_unavailable_interventions_have_reasons() -> None:
    usual = unavailable_reasons(small_config())
    assert list(usual)[0] == CONTROL and usual["float32"] is not None and "already" in usual["float32"]
    assert [name for name, why in usual.items() if why is None] == [
        CONTROL,
        "half the learning rate",
        "learning rate / 10",
        "learning rate / 100",
        "tighter clipping",
        "QK-norm",
        "z-loss",
    ]
    changes = {
        "model.mixers": "deltanet",
        "model.dtype": "bfloat16",
        "training.z_loss": 0.1,
        "optimizer.clip_norm": 0.01,
    }
    other = unavailable_reasons(small_config(**changes))
    assert other["float32"] is None and "already" in other["z-loss"] and "clipped to 0.01" in other["tighter clipping"]
    assert "no layer of the model has queries" in other["QK-norm"]
    assert "already enabled" in unavailable_reasons(small_config(**{"model.attention.qk_norm": "head"}))["QK-norm"]
    assert "latent_attention" in unavailable_reasons(small_config(**{"model.mixers": "latent_attention"}))["QK-norm"]
    assert "gradient norm is unknown" in (unavailable_reasons(small_config(), 0.0)["tighter clipping"] or "")


def test_flags_override_the_run_or_the_stage() -> None:
    stages = ({"name": "a", "optimizer": {"learning_rate": 0.5}}, {"name": "b"})
    config = small_config(stages=stages, **{"optimizer.name": "muon"})
    half = Intervention("half", (("optimizer.learning_rate", 0.25), ("model.attention.qk_norm", "head")))
    assert list(format_flags(half, config, "a")) == [
        "--config.stages.a.optimizer.learning_rate=0.25",
        "--config.model.attention.qk_norm=head",
    ]
    assert list(format_flags(half, config, "b"))[0] == "--config.optimizer.learning_rate=0.25"
    rates = config.optimizer.learning_rate, config.optimizer.muon_learning_rate
    for intervention, factor in zip(list_interventions(config, 1.0)[1:4], (2, 10, 100), strict=True):
        assert tuple(factor * rate for rate in dict(intervention.knobs).values()) == pytest.approx(rates)


def test_state_is_fitted_to_new_parameters() -> None:
    config = config_of()
    static, hparams = partition(config)
    state = init_state_from_params(static, hparams, jax.tree.map(jax.numpy.asarray, random_params(config.model)))
    state = state._replace(step=jax.numpy.int32(7))
    other, hparams = partition(replace_paths(config, {"model.attention.qk_norm": "head"}))
    found, kept = flatten_paths(fit_state(state, other, hparams)), flatten_paths(state)
    new = {path for path in found if path not in kept}
    assert new and all("query_norm" in path or "key_norm" in path for path in new)
    assert all(np.array_equal(found[path], kept[path]) for path in kept)
    assert np.all(np.asarray(found["params/blocks/0/mixer/query_norm/scale"]) == 1)


def result_of(name: str, *losses: float) -> InterventionResult:
    intervention = Intervention(name, (("optimizer.learning_rate", 0.1),))
    return InterventionResult(intervention, np.array(losses), np.isfinite(losses))


def trial_of(*results: InterventionResult) -> InterventionTrial:
    interventions = [each.intervention for each in results]
    return InterventionTrial(4, 9, interventions, list(results), DivergenceThreshold(8.0, "a known loss"))


def test_advice_follows_from_results() -> None:
    control, good, better, bad = (
        result_of(name, *losses)
        for name, losses in {CONTROL: (2, math.nan, 1), "a": (2, 3), "b": (2, 2.5), "c": (2, 9)}.items()
    )
    assert [each.find_first_bad_index(8.0) for each in (control, good, bad)] == [1, None, 1]
    assert bad.find_first_bad_index(9.0) is None
    assert bad._replace(is_finite=np.array([False, True])).find_first_bad_index(math.inf) == 0
    starts = [(bad, 1), (bad, 2), (control, 2)]
    assert [each.find_first_bad_index(8.0, start=start) for each, start in starts] == [1, None, 1]

    def advice(*results: InterventionResult) -> str:
        return "\n".join(format_advice(trial_of(*results), small_config(), "train"))

    survived = "Survived: b, a. Of these, b has the lowest loss at step 9."
    assert advice(control, good, better, bad).startswith(survived)
    assert advice(control, good) == "Survived: a. Start again with\n    --config.optimizer.learning_rate=0.1"
    assert advice(control, bad).startswith("No intervention is enough, not even a learning rate of 0.1.")
    assert advice(result_of(CONTROL, 2, 2), good).startswith("Without a change")


def test_earlier_failure_is_reported() -> None:
    failure = Failure(6, DivergenceThreshold(8.0, "a known loss"), 1.0)
    trial = trial_of(result_of(CONTROL, 2, math.nan, 1))
    sentence, command = describe_earlier_failure(trial, failure, 6, Path("my runs/a"))
    assert "at step 5." in sentence and command == "    rustgpt doctor 'my runs/a' --step=5"
    survived = trial_of(result_of(CONTROL, 2, 2, 2, 2))
    assert "at step 6." in describe_earlier_failure(survived, failure, 9, Path("a"))[0]
    assert describe_earlier_failure(trial, replace(failure, step=5), 5, Path("a")) == []
    assert describe_earlier_failure(survived, failure, 6, Path("a")) == []


class Recorded:
    """A stand-in for a run: a record of every tenth step, and the losses `between` that a replay gives."""

    rewinds = ()
    folder = RunDir(Path("run"))

    def __init__(self, losses: list[float], between: list[float] | None = None) -> None:
        self._between = between or []
        model = small_config(**{"model.vocab_size": 300}).model
        self.inputs = SimpleNamespace(full_config=SimpleNamespace(model=model))
        self.lines = [line(10 * index, loss) for index, loss in enumerate(losses, start=1)]

    def load_history(self) -> History:
        return history(self.lines)

    def check_step(self, step: int) -> None:
        """Accept every step."""

    def compute_state(self, step: int) -> int:
        return step

    def train(self, step: int, count: int) -> tuple[int, list[Any]]:
        return step, [SimpleNamespace(loss=loss) for loss in self._between[step : step + count]]


def step_with(step: int, loss: float, norm: float = 1.0) -> Any:
    return ReplayedStep("run", step, "train", 0, {"train/loss": loss, "train/gradient_norm": norm}, None, ())


def test_failure_is_a_fault_a_divergence_or_a_spike() -> None:
    calm: Any = Recorded([5.8, 4.0, 3.0, 2.0, 2.1, 1.9, 2.0])
    first_loss = DivergenceThreshold(pytest.approx(8.7), "1.5 times the first loss")  # type: ignore[arg-type]
    assert find_failure(calm, step_with(75, math.nan)) == Failure(75, first_loss, 1.0)
    assert find_failure(calm, step_with(75, 30.0)) == Failure(75, first_loss, 1.0)
    spike = find_failure(calm, step_with(75, 4.0))
    assert spike is not None and (spike.step, spike.threshold.loss, spike.threshold.since) == (75, 3.0, 30)
    assert find_failure(calm, step_with(75, 2.05)) is None
    diverged: Any = Recorded([5.7, 4.0, 30.0, 5.0, 20.0, 900.0])
    failure = find_failure(diverged, step_with(65, 5.6, math.inf))
    # The loss of step 30 is also too high, but the run recovered from it.
    assert failure is not None and (failure.step, failure.threshold.since) == (50, 50)
    assert "ln 300" in failure.threshold.meaning and failure.threshold.loss == pytest.approx(1.5 * math.log(300))
    # It does not depend on the examined step, or on whether there is a record.
    assert find_failure(diverged, step_with(50, 20.0)) == failure
    empty: Any = Recorded([])
    assert find_failure(empty, step_with(1, 5.0)) is None
    assert find_failure(empty, step_with(3, 50.0)) == Failure(3, failure.threshold._replace(since=1), 0.0)


def test_first_nonfinite_step_is_found() -> None:
    run: Any = Recorded([5.7, 5.6, math.nan, 30.0, math.nan])
    found = must_find_anomaly(run)
    assert (found.step, found.is_fault, found.reason) == (30, True, "its loss is not finite, the first of 2 such steps")
    run.lines[1]["train/update_norm"] = math.inf
    assert must_find_anomaly(run).reason == "its update is not finite, the first of 3 such steps"


def test_first_loss_above_the_threshold_is_found() -> None:
    recorded = [5.8, 6.2, 14.9, 19.8, 29.1, 14.7, 5.3]
    losses = [5.8] * 24 + [8.6, 8.8, 9.0, 8.5, 11.0, 14.9]
    found = must_find_anomaly(Recorded(recorded, losses))
    assert (found.step, found.is_fault) == (26, False) and found.reason.endswith("above 8.7, 1.5 times the first loss")
    # A replay elsewhere may not reproduce it.
    assert must_find_anomaly(Recorded(recorded, [5.8] * 30)).step == 30
    assert find_anomaly(Recorded([5.8, 6.2, 8.6, 5.3]), None) is None  # type: ignore[arg-type]


def test_missing_record_is_an_error() -> None:
    run: Any = Recorded([])
    with pytest.raises(UserError, match=r"no record of its training \(metrics.jsonl\).* Give --step=K"):
        find_anomaly(run, None)
    asked = find_anomaly(run, 3)
    assert asked is not None and asked.step == 3


# A layer that breaks at a known step, because weight decay shortens its fuse.

BOMB = """
import flax.linen as nn
import jax.numpy as jnp
from rustgpt_jax.model.layers import Linear

class Bomb(nn.Module):
    config: object
    @nn.compact
    def __call__(self, x_BTD, inputs):
        fuse = self.param("fuse", nn.initializers.ones, (1,))
        inner_BTD = Linear(self.config, self.config.d_model, name="inner")(x_BTD)
        is_over = (fuse < self.config.get_extra("limit"))[None, None] & (jnp.arange(x_BTD.shape[1]) == 3)[None, :, None]
        return jnp.where(is_over, jnp.inf, inner_BTD), {}
"""
# After n steps the fuse is 0.9^n: the sixth step sees 0.9^5.
BAD_STEP = 6


@pytest.fixture
def broken_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose second layer outputs infinities from step BAD_STEP on."""
    (tmp_path / "bomb_layer.py").write_text(BOMB)
    monkeypatch.syspath_prepend(str(tmp_path))
    changes = {
        "model.feedforwards": ("swiglu", "bomb_layer:Bomb"),
        "model.extra": (("limit", 0.9**5 + 1e-3),),
        "optimizer.learning_rate": 0.1,
        "optimizer.weight_decay": 1.0,
        "schedule.warmup_steps": 0,
        "training.steps": 12,
    }
    path = tmp_path / "run"
    assert [line["step"] for line in train(config_of(**changes), path)] == [*range(1, BAD_STEP + 1)]
    return path


@pytest.mark.slow
def test_broken_layer_is_named(broken_run: Path) -> None:
    with RecordedRun(broken_run, new_console()) as run:
        anomaly = must_find_anomaly(run)
        assert (anomaly.step, anomaly.is_fault) == (BAD_STEP, True)
        replayed, internals = replay_one_step(run, anomaly.step, with_intermediates=True)
        assert internals is not None and not is_finite(replayed.metrics) and replayed.unequal == []
        first, rows = describe_anomaly(run, anomaly, replayed, internals)[1:]
        elements = 4 * 16  # of one position in each of 4 rows
        assert f"the activation layers/1/feedforward (layer 1): {elements} of {4 * 16 * 16:,} elements" in first
        assert "The one before it is the activation layers/1/feedforward/inner (layer 1)" in first
        assert rows.startswith("All 4 rows of the batch")
        failure = find_failure(run, replayed)
        assert failure is not None and failure.step == BAD_STEP and 0 < failure.usual_norm < math.inf
        with pytest.raises(UserError, match="has no step 13"):
            find_anomaly(run, 13)
        # If a step that is recorded as a fault is finite in a replay, neither data nor computation is the cause.
        finite, internals = replay_one_step(run, 3, with_intermediates=True)
        assert internals is not None and "Every tensor" in describe_first_nonfinite(internals.tensors)
        (sentence,) = describe_anomaly(run, anomaly, finite, internals)
        assert sentence.startswith("The replayed step is finite") and "hardware error" in sentence
    # Without the bad step, nothing stands out.
    metrics = RunDir(broken_run).metrics_file
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(text for text in lines if f'"step": {BAD_STEP},' not in text))
    console = new_console()
    check_result("doctor", {"run": broken_run, **diagnose_run(broken_run, None, console).describe()})
    assert f"{broken_run} is healthy: every recorded loss" in output_of(console)


@pytest.mark.slow
@pytest.mark.long
def test_training_confirms_the_results_of_interventions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run diverges, because its learning rate is too high."""
    changes = {"optimizer.name": "sgd", "optimizer.learning_rate": 2.0, "optimizer.clip_norm": 0.0}
    changes |= {"training.steps": 40, "logging.eval_every": 40, "logging.checkpoint_every": 20}
    config, path, console = config_of(**changes, **{"model.save_residuals": False}), tmp_path / "run", new_console()
    record = train(config, path)
    assert not is_finite(record[-1]) and len(record) < 40
    with RecordedRun(path, new_console()) as run:
        replayed, _ = replay_one_step(run, record[-1]["step"], with_intermediates=False)
        failure = find_failure(run, replayed)
        assert failure is not None and failure.step < replayed.step
        threshold = failure.threshold.loss
        assert record[failure.step - 2]["train/loss"] <= threshold < record[failure.step - 1]["train/loss"]
    tried: list[InterventionTrial] = []
    with monkeypatch.context() as patch:
        patch.setattr(diagnose, "try_interventions", lambda *each: tried.append(try_interventions(*each)) or tried[0])
        diagnose_run(path, None, console)
    (trial,) = tried
    failed = {result.intervention.name: trial.find_first_bad_step(result) for result in trial.results}
    assert failed[CONTROL] == failure.step
    survivors = {name for name, step in failed.items() if step is None}
    assert survivors == {"learning rate / 10", "learning rate / 100", "tighter clipping"}
    output = output_of(console)
    (flag,) = (word for word in shlex.split(output) if word.startswith("--config."))
    knob, value = flag.removeprefix("--config.").split("=")
    better = train(replace_paths(config, parse_overrides([(knob, value)])), tmp_path / "better")
    assert len(better) == 40 and max(line["train/loss"] for line in better) < threshold
    half = train(replace_paths(config, {"optimizer.learning_rate": 1.0}), tmp_path / "half")
    step = failed["half the learning rate"]
    assert step is not None and half[step - 1]["train/loss"] > threshold
