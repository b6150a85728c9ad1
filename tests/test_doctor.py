"""The doctor finds the step and the tensor that went wrong, and its remedies do in training what it says of them."""

import math
import os
import shlex
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

from rustgpt_jax.config import Config, split, with_values
from rustgpt_jax.errors import UserError
from rustgpt_jax.model.paths import by_path
from rustgpt_jax.reproduce import findings
from rustgpt_jax.reproduce.again import Again, make_again
from rustgpt_jax.reproduce.doctor import Trial, View, advice, diagnosis, doctor, try_remedies
from rustgpt_jax.reproduce.findings import first_bad, odd_rows, of_first_bad
from rustgpt_jax.reproduce.past import Past
from rustgpt_jax.reproduce.remedies import CONTROL, Fate, Remedy, fitted, flags, remedies
from rustgpt_jax.reproduce.suspects import is_fault, spike, suspect
from rustgpt_jax.resolve import parse
from rustgpt_jax.runs.folder import RunFolder
from rustgpt_jax.runs.metrics import read_metrics
from rustgpt_jax.training import loop
from rustgpt_jax.training.step import as_arguments, start_from
from rustgpt_jax.training.tapped import ACTIVATION, PARAMETER, UPDATE, Tensor

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY: dict[str, Any] = {
    "tokenizer.name": "byte",
    "tokenizer.vocab_size": 300,
    "model.vocab_size": 300,
    "model.context_length": 16,
    "model.d_model": 16,
    "model.n_heads": 2,
    "data.corpus": "files",
    "data.split": "tail",
    "schedule.name": "constant",
    "record.log_every": 1,
    "record.evaluation_batches": 1,
}


def config_of(**changes: Any) -> Config:
    file = Path(os.environ["RUSTGPT_JAX_CACHE"]) / "ill.txt"
    file.write_text("To be, or not to be, that is the question:\n" * 40)
    return small_config(**(TINY | {"data.paths": (str(file),)} | changes))


def train(config: Config, path: Path) -> list[dict[str, Any]]:
    """Train a run to its end or to its fault. Its record of the training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "draw_loss_curves", lambda folder: folder / "loss.png")
        try:
            loop.train(config, path, {}, quiet())
        except UserError as error:
            assert "diverged" in str(error)
    return [line for line in read_metrics(path) if "train/loss" in line]


def quiet() -> Console:
    return Console(file=StringIO(), width=120)


def line(step: int, loss: float, **others: float) -> dict[str, Any]:
    return {"step": step, "train/loss": loss, "train/gradient_norm": 1.0, **others}


# Which step.


@given(st.integers(0, 2**32 - 1), st.integers(20, 38), st.floats(-5, 5))
def test_a_spike_is_found_among_ordinary_losses_and_nothing_where_there_is_none(
    seed: int, place: int, at: float
) -> None:
    losses = at + 0.1 * np.random.default_rng(seed).uniform(-1, 1, 40) - 0.01 * np.arange(40)
    lines = [line(10 * index, float(loss)) for index, loss in enumerate(losses)]
    assert spike(lines) is None
    lines[place]["train/loss"] += 5.0
    assert spike(lines) == 10 * place


@pytest.mark.parametrize(
    ("changed", "is_bad"),
    [({}, False), ({"train/loss": math.nan}, True), ({"train/gradient_norm": math.inf}, True)],
)
def test_a_fault_is_a_loss_or_a_gradient_that_is_not_finite(changed: dict[str, float], is_bad: bool) -> None:
    assert is_fault(line(3, 2.0) | changed) == is_bad


# Which tensor, and which rows.


def tensor(name: str, nonfinite: int = 0, kind: str = ACTIVATION, layer: int | None = 2) -> Tensor:
    return Tensor(kind, name, layer, name, 1.0, 3e19, nonfinite, 64, "")


def test_the_first_bad_tensor_is_named_with_what_came_before_it() -> None:
    rows = [tensor("embedding/table", kind=PARAMETER), tensor("mixer/key"), tensor("mixer/scores", 5), tensor("x", 64)]
    assert first_bad(rows) == rows[2]
    sentence = of_first_bad(rows)
    assert sentence.startswith("The first tensor that is not finite is the activation mixer/scores (layer 2): 5 of 64")
    assert "Before it comes the activation mixer/key (layer 2), whose largest magnitude is 3e+19." in sentence
    assert of_first_bad(rows[:2]) == "Every tensor of the step is finite."
    assert "Before it every parameter is finite." in of_first_bad([rows[0], rows[2]])
    assert "It was so before the step began." in of_first_bad([tensor("layers/2/w", 1, kind=PARAMETER), *rows])
    assert "Before it the forward is finite" not in of_first_bad([rows[0], tensor("layers/2/w", 1, kind=UPDATE)])


def test_what_grew_most_is_named_against_a_calm_step() -> None:
    calm = [tensor("a"), tensor("b"), tensor("c")]
    now = [calm[0]._replace(largest=6e19), calm[1]._replace(largest=3e22), calm[2]]
    (sentence,) = findings.of_growth(now, calm, 7)
    assert "Against step 7" in sentence and " b that grew most" in sentence and "1e+03 times" in sentence


@given(st.integers(0, 2**32 - 1))
def test_odd_rows_are_those_that_are_not_finite_or_else_far_above_the_others(seed: int) -> None:
    losses = np.random.default_rng(seed).normal(3.0, 0.1, 16).clip(2.8, 3.2)
    assert odd_rows(losses) == []
    losses[[4, 9]] = 8.0, 12.0
    assert odd_rows(losses) == [9, 4]
    losses[[1, 7]] = math.nan, math.inf
    assert odd_rows(losses) == [1, 7]


# Which remedies.


def hindered(config: Config) -> dict[str, str | None]:
    return {remedy.name: remedy.hindrance for remedy in remedies(config, calm_norm=0.63)}


def test_remedies_that_cannot_be_tried_say_why() -> None:
    usual = hindered(small_config())
    assert list(usual)[0] == CONTROL and usual["float32"] is not None and "already" in usual["float32"]
    assert [name for name, why in usual.items() if why is None] == [
        CONTROL,
        "half the learning rate",
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
    assert other["float32"] is None and "already" in other["z-loss"] and "0.01 already" in other["tighter clipping"]
    assert "no layer of the model has queries" in other["QK-norm"]
    assert "on already" in hindered(small_config(**{"model.qk_norm": "head"}))["QK-norm"]
    assert "latent_attention" in hindered(small_config(**{"model.mixers": "latent_attention"}))["QK-norm"]
    unknown = {remedy.name: remedy.hindrance for remedy in remedies(small_config(), calm_norm=0.0)}
    assert "no gradient norm is known" in unknown["tighter clipping"]


def test_knobs_of_remedies_are_flags_of_the_run_or_of_the_stage_that_sets_them() -> None:
    stages = ({"name": "a", "optimizer": {"learning_rate": 0.5}}, {"name": "b"})
    config = small_config(stages=stages, **{"optimizer.name": "muon"})
    half = Remedy("half", (("optimizer.learning_rate", 0.25), ("model.qk_norm", "head")))
    assert list(flags(half, config, "a")) == [
        "--config.stages.a.optimizer.learning_rate=0.25",
        "--config.model.qk_norm=head",
    ]
    assert list(flags(half, config, "b"))[0] == "--config.optimizer.learning_rate=0.25"
    halved = dict(remedies(config, 1.0)[1].knobs)
    rates = config.optimizer.learning_rate, config.optimizer.matrix_learning_rate
    assert tuple(2 * rate for rate in halved.values()) == rates


def test_a_state_is_fitted_to_parts_that_it_does_not_have() -> None:
    config = config_of()
    structure, numbers = split(config)
    state = start_from(structure, as_arguments(numbers), jax.tree.map(jax.numpy.asarray, random_params(config.model)))
    state = state._replace(step=jax.numpy.int32(7))
    other, numbers = split(with_values(config, {"model.qk_norm": "head"}))
    found, kept = by_path(fitted(state, other, as_arguments(numbers))), by_path(state)
    new = {path for path in found if path not in kept}
    assert new and all("query_norm" in path or "key_norm" in path for path in new)
    assert all(np.array_equal(found[path], kept[path]) for path in kept)
    assert np.all(np.asarray(found["params/blocks/0/mixer/query_norm/scale"]) == 1)


def fate(name: str, *losses: float) -> Fate:
    return Fate(Remedy(name, (("optimizer.learning_rate", 0.1),)), np.array(losses), np.ones(len(losses)))


def test_the_fates_are_told_as_they_are() -> None:
    control, good, better, bad = fate(CONTROL, 2, math.nan, 1), fate("a", 2, 3), fate("b", 2, 2.5), fate("c", 2, 9)
    assert [each.died_at(8.0) for each in (control, good, bad)] == [1, None, 1] and bad.died_at(math.inf) is None
    assert (bad.died_at(8.0, since=1), bad.died_at(8.0, since=2), control.died_at(8.0, since=2)) == (1, None, 1)
    config = small_config()

    def told(*fates: Fate) -> str:
        return "\n".join(advice(Trial(4, 9, [each.remedy for each in fates], list(fates), 8.0), config, "train"))

    assert told(control, good, better, bad).startswith("Survived: b, a. Of these, b has the lowest loss at step 9.")
    assert told(control, good).endswith("--config.optimizer.learning_rate=0.1")
    assert told(control, bad) == "None of the remedies would have been enough. Look at the tensor and at the batch."
    assert told(fate(CONTROL, 2, 2), good).startswith("With nothing changed")


class Recorded:
    """A run of which only the record is read."""

    def __init__(self, losses: list[float]) -> None:
        model = small_config(**{"model.vocab_size": 300}).model
        self.material = SimpleNamespace(whole=SimpleNamespace(model=model))
        self._lines = [line(10 * index, loss) for index, loss in enumerate(losses, start=1)]

    def records(self) -> list[dict[str, Any]]:
        return self._lines


def again_at(step: int, loss: float, norm: float = 1.0) -> Any:
    return Again("run", step, "train", 0, {"train/loss": loss, "train/gradient_norm": norm}, None, ())


def test_a_step_is_seen_as_a_fault_as_a_spike_or_as_sound() -> None:
    nothing_known = 1.5 * math.log(300)
    calm: Any = Recorded([5.7, 4.0, 3.0, 2.0, 2.1, 1.9, 2.0])
    fault = View.of(calm, again_at(75, math.nan))
    assert fault == View(pytest.approx(nothing_known), 1, None, 1.0)  # type: ignore[arg-type]
    spike = View.of(calm, again_at(75, 4.0))
    assert spike is not None and (spike.ceiling, spike.since, spike.lost_at) == (3.0, 30, None)
    assert View.of(calm, again_at(75, 2.05)) is None
    lost: Any = Recorded([5.7, 4.0, 30.0, 5.0, 20.0, 900.0])
    view = View.of(lost, again_at(65, 5.7, math.inf))
    assert view is not None and (view.lost_at, view.since) == (50, 1)


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
        is_over = (fuse < self.config.option("limit"))[None, None] & (jnp.arange(x_BTD.shape[1]) == 3)[None, :, None]
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
        "model.options": (("limit", 0.9**5 + 1e-3),),
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
    with Past(bombed, quiet()) as past:
        found = suspect(past, None)
        assert (found.step, found.is_fault) == (BAD_STEP, True)
        again, inside = make_again(past, found.step, has_taps=True)
        assert inside is not None and not again.is_finite and again.unequal == []
        first, rows = diagnosis(past, found, again, inside)[1:]
        elements = 4 * 16  # of one place in each of 4 rows
        assert f"the activation layers/1/feedforward (layer 1): {elements} of {4 * 16 * 16:,} elements" in first
        assert "Before it comes the activation layers/1/feedforward/inner (layer 1)" in first
        assert rows.startswith("All 4 rows of the batch")
        view = View.of(past, again)
        assert view is not None and view.lost_at is None and 0 < view.calm_norm < math.inf
        with pytest.raises(UserError, match="has no step 13"):
            suspect(past, 13)
        # A sound step that is recorded as a fault lays the blame elsewhere.
        sound, calm = make_again(past, 3, has_taps=True)
        assert calm is not None and "Every tensor" in of_first_bad(calm.tensors)
        (sentence,) = diagnosis(past, found, sound, calm)
        assert sentence.startswith("Made again, the step is sound") and "the machine" in sentence


@pytest.mark.slow
def test_a_record_in_which_nothing_stands_out_is_told_so(bombed: Path) -> None:
    metrics = RunFolder(bombed).metrics_file
    metrics.write_text(
        "".join(text for text in metrics.read_text().splitlines(True) if f'"step": {BAD_STEP},' not in text)
    )
    with Past(bombed, quiet()) as past, pytest.raises(UserError, match="no loss stands out. Give --step=K"):
        suspect(past, None)


# A run that a rate too high destroys.


@pytest.mark.slow
def test_what_the_doctor_says_of_a_remedy_is_what_training_with_it_does(tmp_path: Path) -> None:
    ill = {"optimizer.name": "sgd", "optimizer.learning_rate": 2.0, "optimizer.clip_norm": 0.0, "training.steps": 40}
    rarely = {"record.evaluate_every": 40, "record.checkpoint_every": 20}
    config, path, console = config_of(**ill, **rarely), tmp_path / "ill", quiet()
    record = train(config, path)
    assert is_fault(record[-1]) and len(record) < 40
    with Past(path, quiet()) as past:
        again, _ = make_again(past, record[-1]["step"], has_taps=False)
        view = View.of(past, again)
        assert view is not None and view.lost_at is not None and record[view.lost_at - 2]["train/loss"] < view.ceiling
        trial = try_remedies(past, again, view)
    died = {fate.remedy.name: trial.died_at(fate) for fate in trial.fates}
    assert died[CONTROL] == view.lost_at
    assert {name for name, at in died.items() if at is None} == {"tighter clipping"}

    assert doctor(path, None, console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    (flag,) = (word for word in shlex.split(said) if word.startswith("--config."))
    knob, value = flag.removeprefix("--config.").split("=")
    better = train(with_values(config, {knob: parse(knob, value)}), tmp_path / "better")
    assert len(better) == 40 and max(line["train/loss"] for line in better) < view.ceiling
    half = train(with_values(config, {"optimizer.learning_rate": 1.0}), tmp_path / "half")
    at = died["half the learning rate"]
    assert at is not None and half[at - 1]["train/loss"] >= view.ceiling
