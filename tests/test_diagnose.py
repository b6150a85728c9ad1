"""The doctor finds the step and the tensor that went wrong, and its remedies do in training what it says of them."""

import math
import os
import shlex
import tracemalloc
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from conftest import random_params, small_config
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from rustgpt_jax.config.schema import Config, partition, replace_paths
from rustgpt_jax.config.validation import parse
from rustgpt_jax.errors import UserError
from rustgpt_jax.pytrees import flatten_paths
from rustgpt_jax.reproduce import anomaly_detection, diagnose
from rustgpt_jax.reproduce.anomaly_detection import (
    Anomaly,
    DivergenceThreshold,
    Failure,
    find_anomaly,
    find_failure,
    find_spike,
)
from rustgpt_jax.reproduce.diagnose import (
    InterventionTrial,
    describe_anomaly,
    describe_earlier_failure,
    describe_first_nonfinite,
    diagnose_run,
    find_outlier_rows,
    format_advice,
    try_interventions,
)
from rustgpt_jax.reproduce.interventions import (
    CONTROL,
    Intervention,
    InterventionResult,
    fit_state,
    format_flags,
    possible_interventions,
)
from rustgpt_jax.reproduce.recorded_run import ACTIVATION, HISTORY, PARAMETER, UPDATE, History, RecordedRun, StepTensor
from rustgpt_jax.reproduce.replay import ReplayedStep, is_finite, replay_one_step
from rustgpt_jax.tracking.metric_writer import read_metrics
from rustgpt_jax.training import run_training
from rustgpt_jax.training.train_step import init_state_from_params
from rustgpt_jax.workdir.run_dir import RunDir

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY: dict[str, Any] = {
    "tokenizer.name": "byte",
    "tokenizer.vocab_size": 300,
    "model.vocab_size": 300,
    "model.context_length": 16,
    "model.d_model": 16,
    "model.attention.n_heads": 2,
    "data.corpus": "files",
    "data.split": "tail",
    "schedule.name": "constant",
    "logging.log_every": 1,
    "logging.eval_batches": 1,
}


def config_of(**changes: Any) -> Config:
    file = Path(os.environ["RUSTGPT_JAX_CACHE"]) / "ill.txt"
    file.write_text("To be, or not to be, that is the question:\n" * 40)
    return small_config(**(TINY | {"data.paths": (str(file),)} | changes))


def train(config: Config, path: Path) -> list[dict[str, Any]]:
    """Train a run to its end or to its fault. Its record of the training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_training, "draw_loss_curves", lambda folder: folder / "loss.png")
        try:
            run_training.train(config, path, {}, quiet())
        except UserError as error:
            assert "diverged" in str(error)
    return [line for line in read_metrics(path) if "train/loss" in line]


def quiet() -> Console:
    return Console(file=StringIO(), width=120)


def line(step: int, loss: float, **others: float) -> dict[str, Any]:
    return {"step": step, "train/loss": loss, "train/gradient_norm": 1.0, **others}


def history(lines: list[dict[str, Any]]) -> History:
    """Lines of metrics as the arrays that are read of them."""
    columns = (np.array([line.get(name, 0.0) for line in lines], float) for name in HISTORY)
    return History(np.array([line["step"] for line in lines], int), *columns)


def found_in(past: Any) -> Anomaly:
    """The step that is looked at, where there is one."""
    found = find_anomaly(past, None)
    assert found is not None
    return found


# Which step.


@given(st.integers(0, 2**32 - 1), st.integers(20, 38), st.floats(-5, 5), st.sampled_from([1, 7, 2**16]))
def test_a_spike_is_found_among_ordinary_losses_and_nothing_where_there_is_none(
    seed: int, place: int, at: float, block: int
) -> None:
    losses = at + 0.1 * np.random.default_rng(seed).uniform(-1, 1, 40) - 0.01 * np.arange(40)
    lines = [line(10 * index, float(loss)) for index, loss in enumerate(losses)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(anomaly_detection, "BLOCK_LINES", block)
        assert find_spike(history(lines)) is None
        lines[place]["train/loss"] += 5.0
        assert find_spike(history(lines)) == 10 * place


def test_the_search_for_a_spike_takes_little_more_memory_than_the_losses() -> None:
    steps = np.arange(2**18)
    losses = -1e-6 * steps
    every = History(steps, losses, losses, losses, losses)
    tracemalloc.start()
    try:
        assert find_spike(every) is None
        assert every.until(2**18) is every
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
def test_a_fault_is_a_loss_a_gradient_or_an_update_that_is_not_finite(changed: dict[str, float], is_bad: bool) -> None:
    assert is_finite(line(3, 2.0) | changed) != is_bad


@pytest.mark.parametrize("what", ["loss", "gradient", "update"])
def test_what_is_not_finite_is_said(what: str) -> None:
    name = {"loss": "train/loss", "gradient": "train/gradient_norm", "update": "train/update_norm"}[what]
    past: Any = SimpleNamespace(history=lambda: history([line(1, 2.0), line(2, 2.0) | {name: math.nan}]), rewinds=[])
    assert found_in(past)[:3] == (2, f"its {what} is not finite", True)


# Which tensor, and which rows.


def tensor(name: str, nonfinite: int = 0, kind: str = ACTIVATION, layer: int | None = 2) -> StepTensor:
    return StepTensor(kind, name, layer, name, 1.0, 3e19, nonfinite, 64, "")


def test_the_first_bad_tensor_is_named_with_what_came_before_it() -> None:
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


def test_what_grew_most_is_named_against_a_calm_step() -> None:
    calm = [tensor("a"), tensor("b"), tensor("c")]
    now = [calm[0]._replace(largest=6e19), calm[1]._replace(largest=3e22), calm[2]]
    (sentence,) = diagnose.describe_growth(now, calm, 7)
    assert sentence.startswith("The activation that grew most since step 7 is b:") and "1e+03 times" in sentence


@given(st.integers(0, 2**32 - 1))
def test_odd_rows_are_those_that_are_not_finite_or_else_far_above_the_others(seed: int) -> None:
    losses = np.random.default_rng(seed).permutation(np.linspace(2.8, 3.2, 16))
    assert find_outlier_rows(losses) == []
    losses[[4, 9]] = 8.0, 12.0
    assert find_outlier_rows(losses) == [9, 4]
    losses[[1, 7]] = math.nan, math.inf
    assert find_outlier_rows(losses) == [1, 7]


# Which remedies.


def hindered(config: Config) -> dict[str, str | None]:
    return {remedy.name: remedy.unavailable_reason for remedy in possible_interventions(config, usual_norm=0.63)}


def test_remedies_that_cannot_be_tried_say_why() -> None:
    usual = hindered(small_config())
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
    other = hindered(small_config(**changes))
    assert other["float32"] is None and "already" in other["z-loss"] and "clipped to 0.01" in other["tighter clipping"]
    assert "no layer of the model has queries" in other["QK-norm"]
    assert "already enabled" in hindered(small_config(**{"model.attention.qk_norm": "head"}))["QK-norm"]
    assert "latent_attention" in hindered(small_config(**{"model.mixers": "latent_attention"}))["QK-norm"]
    interventions = possible_interventions(small_config(), usual_norm=0.0)
    unknown = {remedy.name: remedy.unavailable_reason for remedy in interventions}
    assert "gradient norm is unknown" in unknown["tighter clipping"]


def test_knobs_of_remedies_are_flags_of_the_run_or_of_the_stage_that_sets_them() -> None:
    stages = ({"name": "a", "optimizer": {"learning_rate": 0.5}}, {"name": "b"})
    config = small_config(stages=stages, **{"optimizer.name": "muon"})
    half = Intervention("half", (("optimizer.learning_rate", 0.25), ("model.attention.qk_norm", "head")))
    assert list(format_flags(half, config, "a")) == [
        "--config.stages.a.optimizer.learning_rate=0.25",
        "--config.model.attention.qk_norm=head",
    ]
    assert list(format_flags(half, config, "b"))[0] == "--config.optimizer.learning_rate=0.25"
    rates = config.optimizer.learning_rate, config.optimizer.muon_learning_rate
    for remedy, times in zip(possible_interventions(config, 1.0)[1:4], (2, 10, 100), strict=True):
        assert tuple(times * rate for rate in dict(remedy.knobs).values()) == pytest.approx(rates)


def test_a_state_is_fitted_to_parts_that_it_does_not_have() -> None:
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


def fate(name: str, *losses: float) -> InterventionResult:
    return InterventionResult(
        Intervention(name, (("optimizer.learning_rate", 0.1),)), np.array(losses), np.isfinite(losses)
    )


def test_the_fates_are_told_as_they_are() -> None:
    control, good, better, bad = fate(CONTROL, 2, math.nan, 1), fate("a", 2, 3), fate("b", 2, 2.5), fate("c", 2, 9)
    assert [each.first_bad_index(8.0) for each in (control, good, bad)] == [1, None, 1] and bad.first_bad_index(
        9.0
    ) is None
    assert bad._replace(is_finite=np.array([False, True])).first_bad_index(math.inf) == 0
    assert (
        bad.first_bad_index(8.0, start=1),
        bad.first_bad_index(8.0, start=2),
        control.first_bad_index(8.0, start=2),
    ) == (1, None, 1)
    config = small_config()

    def told(*fates: InterventionResult) -> str:
        return "\n".join(format_advice(trial_of(*fates), config, "train"))

    assert told(control, good, better, bad).startswith("Survived: b, a. Of these, b has the lowest loss at step 9.")
    assert told(control, good) == "Survived: a. Start again with\n    --config.optimizer.learning_rate=0.1"
    assert told(control, bad).startswith("No intervention is enough, not even a learning rate of 0.1.")
    assert told(fate(CONTROL, 2, 2), good).startswith("Without a change")


def trial_of(*fates: InterventionResult) -> InterventionTrial:
    return InterventionTrial(
        4, 9, [each.intervention for each in fates], list(fates), DivergenceThreshold(8.0, "as is known")
    )


def test_a_run_that_was_lost_before_is_told_where() -> None:
    view, trial = Failure(6, DivergenceThreshold(8.0, "as is known"), 1.0), trial_of(fate(CONTROL, 2, math.nan, 1))
    sentence, command = describe_earlier_failure(trial, view, 6, Path("my runs/a"))
    assert "at step 5." in sentence and command == "    python launch.py doctor 'my runs/a' --step=5"
    assert "at step 6." in describe_earlier_failure(trial_of(fate(CONTROL, 2, 2, 2, 2)), view, 9, Path("a"))[0]
    assert describe_earlier_failure(trial, replace(view, step=5), 5, Path("a")) == []
    assert describe_earlier_failure(trial_of(fate(CONTROL, 2, 2, 2)), view, 6, Path("a")) == []


class Recorded:
    """A run of which only the record is read. Made again, its steps have the losses `between`."""

    rewinds = ()
    folder = RunDir(Path("run"))

    def __init__(self, losses: list[float], between: list[float] | None = None) -> None:
        self._between = between or []
        model = small_config(**{"model.vocab_size": 300}).model
        self.inputs = SimpleNamespace(full_config=SimpleNamespace(model=model))
        self.lines = [line(10 * index, loss) for index, loss in enumerate(losses, start=1)]

    def history(self) -> History:
        return history(self.lines)

    def check_step(self, step: int) -> None:
        """It has every step."""

    def state_at(self, step: int) -> int:
        return step

    def train(self, step: int, count: int) -> tuple[int, list[Any]]:
        return step, [SimpleNamespace(loss=loss) for loss in self._between[step : step + count]]


def again_at(step: int, loss: float, norm: float = 1.0) -> Any:
    return ReplayedStep("run", step, "train", 0, {"train/loss": loss, "train/gradient_norm": norm}, None, ())


def test_a_step_is_seen_as_a_fault_as_a_spike_or_as_sound() -> None:
    calm: Any = Recorded([5.8, 4.0, 3.0, 2.0, 2.1, 1.9, 2.0])
    first_loss = DivergenceThreshold(pytest.approx(8.7), "1.5 times the first loss")  # type: ignore[arg-type]
    assert find_failure(calm, again_at(75, math.nan)) == Failure(75, first_loss, 1.0)
    assert find_failure(calm, again_at(75, 30.0)) == Failure(75, first_loss, 1.0)
    spike = find_failure(calm, again_at(75, 4.0))
    assert spike is not None and (spike.step, spike.threshold.loss, spike.threshold.since) == (75, 3.0, 30)
    assert find_failure(calm, again_at(75, 2.05)) is None
    lost: Any = Recorded([5.7, 4.0, 30.0, 5.0, 20.0, 900.0])
    view = find_failure(lost, again_at(65, 5.6, math.inf))
    # The loss of step 30 is too high too, but the run came back from it.
    assert view is not None and (view.step, view.threshold.since) == (50, 50)
    assert "ln 300" in view.threshold.meaning and view.threshold.loss == pytest.approx(1.5 * math.log(300))
    # The same from wherever it is seen, with a record or without.
    assert find_failure(lost, again_at(50, 20.0)) == view
    nothing: Any = Recorded([])
    assert find_failure(nothing, again_at(1, 5.0)) is None
    assert find_failure(nothing, again_at(3, 50.0)) == Failure(3, view.threshold._replace(since=1), 0.0)


def test_the_first_step_that_is_not_finite_is_looked_at() -> None:
    run: Any = Recorded([5.7, 5.6, math.nan, 30.0, math.nan])
    found = found_in(run)
    assert (found.step, found.is_fault, found.reason) == (30, True, "its loss is not finite, the first of 2 such steps")
    run.lines[1]["train/update_norm"] = math.inf
    assert found_in(run).reason == "its update is not finite, the first of 3 such steps"


def test_the_first_loss_that_is_too_high_is_looked_at() -> None:
    recorded = [5.8, 6.2, 14.9, 19.8, 29.1, 14.7, 5.3]
    losses = [5.8] * 24 + [8.6, 8.8, 9.0, 8.5, 11.0, 14.9]
    found = found_in(Recorded(recorded, losses))
    assert (found.step, found.is_fault) == (26, False) and found.reason.endswith("above 8.7, 1.5 times the first loss")
    # Made again elsewhere, it may not be found again.
    assert found_in(Recorded(recorded, [5.8] * 30)).step == 30
    assert find_anomaly(Recorded([5.8, 6.2, 8.6, 5.3]), None) is None  # type: ignore[arg-type]


def test_without_a_record_it_is_said_that_there_is_none() -> None:
    run: Any = Recorded([])
    with pytest.raises(UserError, match=r"no record of its training \(metrics.jsonl\).* Give --step=K"):
        find_anomaly(run, None)
    asked = find_anomaly(run, 3)
    assert asked is not None and asked.step == 3


# A layer that breaks at a known step: weight decay alone shortens its fuse.

BOMB = """
import flax.linen as nn
import jax.numpy as jnp
from rustgpt_jax.model.linear import Linear

class Bomb(nn.Module):
    config: object
    @nn.compact
    def __call__(self, x_BTD, context):
        fuse = self.param("fuse", nn.initializers.ones, (1,))
        inner_BTD = Linear(self.config, self.config.d_model, name="inner")(x_BTD)
        is_over = (fuse < self.config.get_extra("limit"))[None, None] & (jnp.arange(x_BTD.shape[1]) == 3)[None, :, None]
        return jnp.where(is_over, jnp.inf, inner_BTD), {}
"""
# After n steps the fuse is 0.9^n: the sixth step sees 0.9^5.
BAD_STEP = 6


@pytest.fixture
def bombed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose second layer gives infinities from step BAD_STEP on."""
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
def test_the_layer_that_broke_is_named(bombed: Path) -> None:
    with RecordedRun(bombed, quiet()) as past:
        found = found_in(past)
        assert (found.step, found.is_fault) == (BAD_STEP, True)
        again, inside = replay_one_step(past, found.step, has_taps=True)
        assert inside is not None and not is_finite(again.metrics) and again.unequal == []
        first, rows = describe_anomaly(past, found, again, inside)[1:]
        elements = 4 * 16  # of one place in each of 4 rows
        assert f"the activation layers/1/feedforward (layer 1): {elements} of {4 * 16 * 16:,} elements" in first
        assert "The one before it is the activation layers/1/feedforward/inner (layer 1)" in first
        assert rows.startswith("All 4 rows of the batch")
        view = find_failure(past, again)
        assert view is not None and view.step == BAD_STEP and 0 < view.usual_norm < math.inf
        with pytest.raises(UserError, match="has no step 13"):
            find_anomaly(past, 13)
        # A sound step that is recorded as a fault lays the blame elsewhere.
        sound, calm = replay_one_step(past, 3, has_taps=True)
        assert calm is not None and "Every tensor" in describe_first_nonfinite(calm.tensors)
        (sentence,) = describe_anomaly(past, found, sound, calm)
        assert sentence.startswith("Replayed, the step is finite") and "the machine" in sentence


@pytest.mark.slow
def test_a_record_in_which_nothing_stands_out_is_told_so(bombed: Path) -> None:
    metrics = RunDir(bombed).metrics_file
    metrics.write_text(
        "".join(text for text in metrics.read_text().splitlines(True) if f'"step": {BAD_STEP},' not in text)
    )
    console = quiet()
    diagnose_run(bombed, None, console)
    assert f"{bombed} is healthy: every recorded loss" in console.file.getvalue()  # type: ignore[attr-defined]


# A run that a rate too high destroys.


@pytest.mark.slow
def test_what_the_doctor_says_of_a_remedy_is_what_training_with_it_does(tmp_path: Path) -> None:
    ill = {"optimizer.name": "sgd", "optimizer.learning_rate": 2.0, "optimizer.clip_norm": 0.0, "training.steps": 40}
    rarely = {"logging.eval_every": 40, "logging.checkpoint_every": 20, "model.save_residuals": False}
    config, path, console = config_of(**ill, **rarely), tmp_path / "ill", quiet()
    record = train(config, path)
    assert not is_finite(record[-1]) and len(record) < 40
    with RecordedRun(path, quiet()) as past:
        again, _ = replay_one_step(past, record[-1]["step"], has_taps=False)
        view = find_failure(past, again)
        assert view is not None and view.step < again.step
        ceiling = view.threshold.loss
        assert record[view.step - 2]["train/loss"] <= ceiling < record[view.step - 1]["train/loss"]
        trial = try_interventions(past, view)
    died = {result.intervention.name: trial.first_bad_step(result) for result in trial.results}
    assert died[CONTROL] == view.step
    assert {name for name, at in died.items() if at is None} == {
        "learning rate / 10",
        "learning rate / 100",
        "tighter clipping",
    }

    diagnose_run(path, None, console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    (flag,) = (word for word in shlex.split(said) if word.startswith("--config."))
    knob, value = flag.removeprefix("--config.").split("=")
    better = train(replace_paths(config, {knob: parse(knob, value)}), tmp_path / "better")
    assert len(better) == 40 and max(line["train/loss"] for line in better) < ceiling
    half = train(replace_paths(config, {"optimizer.learning_rate": 1.0}), tmp_path / "half")
    at = died["half the learning rate"]
    assert at is not None and half[at - 1]["train/loss"] > ceiling
