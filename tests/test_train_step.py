"""The train step: one program for all hyperparameters, bit-exact for any number of steps per call, the right loss."""

import logging
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import small_config

from rustgpt_jax.config.schema import FIELDS, Config, combine, partition
from rustgpt_jax.data.pipeline import Batch
from rustgpt_jax.evaluation import loss
from rustgpt_jax.evaluation.loss import LossSums, eval_loss_sums, loss_sums, total_loss
from rustgpt_jax.model import transformer
from rustgpt_jax.training.optimizers import OPTIMIZERS, make_optimizer
from rustgpt_jax.training.train_step import (
    Metrics,
    TrainState,
    compiled_init_state,
    compiled_train_steps,
    gradient,
    init_loss_stats,
)

TINY = {
    "model.n_layers": 1,
    "model.d_model": 16,
    "model.attention.n_heads": 2,
    "model.context_length": 8,
    "model.vocab_size": 31,
}
# Terms that are disabled by 0. Clipping is enabled by default.
SWITCHES = {"model.dropout": 0.1, "training.z_loss": 1e-3, "optimizer.clip_norm": 1.0}
ALL_ON = SWITCHES | {"training.grad_accum_steps": 2}
SGD = {"optimizer.name": "sgd"}
# The number of batches of a call. Each number needs a compilation.
SLOTS = 4


pytestmark = pytest.mark.usefixtures("quick_compilation")


def tiny(**changes: Any) -> Config:
    return small_config(**(TINY | changes))


def batch_of(config: Config, seed: int = 0) -> Batch:
    """Return random tokens in two documents per row, with loss for a part of each row, and for none of some rows."""
    generator = np.random.default_rng(seed)
    shape = (config.training.batch_size, config.model.context_length)
    tokens, targets = generator.integers(0, config.model.vocab_size, (2, *shape), np.int32)
    learned = np.arange(shape[1])[None, :] < generator.integers(0, shape[1] + 1, (shape[0], 1))
    learned[::3] = False
    learned[1, :2] = True
    border = shape[1] // 2
    segments = np.broadcast_to(np.where(np.arange(shape[1]) < border, 1, 2), shape).astype(np.int32)
    positions = np.broadcast_to(np.arange(shape[1]) % border, shape).astype(np.int32)
    return Batch(tokens, targets, learned.astype(np.float32), segments, positions)


def stacked(config: Config, first: int, count: int, slots: int) -> Batch:
    batches = [batch_of(config, first + min(index, count - 1)) for index in range(slots)]
    return Batch(*(np.stack(leaves) for leaves in zip(*batches, strict=True)))


def parameters(seed: int = 0, init_std: float = 0.02) -> Any:
    """Return initial parameters. They fit all tiny models."""
    return jax.device_get(compiled_init_state(*partition(tiny(seed=seed, **{"model.init_std": init_std}))).params)


def run(
    config: Config, cuts: list[int], slots: int = SLOTS, same_batch: bool = False, first_step: int = 0
) -> tuple[TrainState, Metrics]:
    """Run calls of some numbers of steps. Returns the last state, and the metrics of all steps."""
    static, hparams = partition(config)
    params = parameters()
    state = TrainState(params, make_optimizer(config.optimizer).init(params), np.int32(first_step), init_loss_stats())
    done, history = 0, []
    for count in cuts:
        batches = stacked(config, 0 if same_batch else done, 1 if same_batch else count, slots)
        state, metrics = compiled_train_steps(static, state, batches, np.int32(count), hparams, np.int32(first_step))
        history.append(jax.tree.map(lambda column, count=count: np.asarray(column)[:count], metrics))
        done += count
    return state, jax.tree.map(lambda *columns: np.concatenate(columns), *history)


def assert_same_bits(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


# Programs.


def test_no_hyperparameter_value_causes_a_compilation() -> None:
    run(tiny(**ALL_ON), [1])
    compiled_init_state(*partition(tiny(**ALL_ON)))
    before = compiled_init_state._cache_size(), compiled_train_steps._cache_size()
    _, hparams = partition(tiny(**ALL_ON))
    assert len(hparams) > 15
    for path, value in hparams.items():
        field = FIELDS[path]
        changed = int(value) + 1 if field.type is int else max(float(value) * 0.5, field.metadata["low"])
        other = tiny(**(ALL_ON | {path: changed}))
        compiled_init_state(*partition(other))
        run(other, [2])
        assert (compiled_init_state._cache_size(), compiled_train_steps._cache_size()) == before, path


@pytest.mark.slow
@pytest.mark.long
def test_enabling_a_term_compiles_once() -> None:
    # A static config that no other test uses.
    switches: dict[str, Any] = {**SGD, **dict.fromkeys(SWITCHES, 0.0), "training.steps_per_jit_call": 77}
    run(tiny(**switches), [1])
    for path in SWITCHES:
        before = compiled_train_steps._cache_size()
        for value in (0.1, 0.2):
            switches[path] = value
            run(tiny(**switches), [1])
        assert compiled_train_steps._cache_size() == before + 1, path


# Calls and microbatches.


def test_results_do_not_depend_on_the_number_of_steps_per_call() -> None:
    config = tiny(**ALL_ON)
    whole = run(config, [4, 3])
    assert_same_bits(run(config, [1, 2, 4]), whole)
    assert_same_bits(run(config, [1] * 7, slots=1), whole)
    assert whole[0].step == 7
    assert len(set(whole[1].loss.tolist())) == 7


compiled_gradient = jax.jit(
    lambda static, params, batch, hparams, key: gradient(params, batch, combine(static, hparams), key)[:2],
    static_argnums=0,
)


def gradient_of(config: Config, params: Any, batch: Batch) -> tuple[Any, LossSums]:
    static, hparams = partition(config)
    return compiled_gradient(static, params, batch, hparams, jax.random.key(0))


IN_PARTS = {"training.batch_size": 8, "training.z_loss": 0.1}


@pytest.mark.parametrize("parts", [2, 4])
def test_microbatches_give_the_gradient_of_the_batch(parts: int) -> None:
    batch = batch_of(tiny(**IN_PARTS))
    assert len(set(batch.weights_BT.reshape(parts, -1).sum(axis=1))) > 1
    params = parameters(init_std=0.3)
    whole, whole_sums = gradient_of(tiny(**IN_PARTS), params, batch)
    summed, sums = gradient_of(tiny(**IN_PARTS, **{"training.grad_accum_steps": parts}), params, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), sums, whole_sums)
    smallest = 1e-6 * float(optax.tree.norm(whole))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=smallest), summed, whole)


@pytest.mark.slow
@pytest.mark.long
def test_layer_metrics_are_averaged_and_the_auxiliary_loss_is_minimized() -> None:
    experts = {"model.feedforwards": ("moe", "swiglu"), "model.n_layers": 4, "model.moe.n_experts": 3}
    config, batch = tiny(**experts, **{"model.moe.load_balance_loss_weight": 0.7}), batch_of(tiny())
    params = compiled_init_state(*partition(config)).params
    gradient, sums = gradient_of(config, params, batch)

    def reported(params: Any) -> Any:
        return transformer.hidden_states(
            params, batch.tokens_BT, config.model, positions_BT=batch.positions_BT, segments_BT=batch.segments_BT
        )[2]

    layer_metrics = jax.jit(reported)(params)
    assert layer_metrics["auxiliary_loss"] == pytest.approx(0.7 * 2 * float(layer_metrics["load_balance_loss"]))
    assert layer_metrics["load_balance_loss"] >= config.model.moe.experts_per_token and layer_metrics["dropped"] == 0
    jax.tree.map(
        lambda total, mean: np.testing.assert_allclose(total, mean * sums.weight, rtol=1e-5),
        sums.layer_metrics,
        layer_metrics,
    )
    without, _ = gradient_of(tiny(**experts, **{"model.moe.load_balance_loss_weight": 0.0}), params, batch)
    alone = jax.jit(jax.grad(lambda params: reported(params)["auxiliary_loss"]))(params)
    jax.tree.map(lambda a, b, c: np.testing.assert_allclose(a, b + c, rtol=1e-3, atol=1e-6), gradient, without, alone)


# Values.

compiled_apply = jax.jit(transformer.apply, static_argnames="model")


def loss_in_numpy(params: Any, config: Config, batch: Batch) -> tuple[float, float]:
    """Return the means of the cross-entropy and the squared log normalizer over tokens with loss, in float64."""
    logits_BTV, _ = compiled_apply(
        params, batch.tokens_BT, model=config.model, positions_BT=batch.positions_BT, segments_BT=batch.segments_BT
    )
    rows = np.asarray(logits_BTV, np.float64).reshape(-1, logits_BTV.shape[-1])
    losses, squares = [], []
    for logits, target, weight in zip(rows, batch.targets_BT.ravel(), batch.weights_BT.ravel(), strict=True):
        if weight:
            normalizer = np.log(np.exp(logits - logits.max()).sum()) + logits.max()
            losses.append(normalizer - logits[target])
            squares.append(normalizer**2)
    return float(np.mean(losses)), float(np.mean(squares))


def test_loss_and_z_loss_match_numpy() -> None:
    params, batch = parameters(init_std=0.5), batch_of(tiny())
    loss, square = loss_in_numpy(params, tiny(), batch)
    sums = jax.jit(lambda z_loss: loss_sums(params, batch, tiny().model, z_loss=z_loss))(0.3)
    total = np.float32(batch.weights_BT.sum())
    assert sums.weight == total
    assert sums.loss / total == pytest.approx(loss, rel=1e-5)
    assert total_loss(sums, total) == pytest.approx(loss + 0.3 * square, rel=1e-5)


def test_evaluate_bounds_the_number_of_pending_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    made, alive = list[weakref.ref[np.ndarray]](), list[int]()

    def sums(_: Any, batch: Any, *others: Any) -> LossSums:
        del others
        loss = np.array(0.1 * batch)
        made.append(weakref.ref(loss))
        alive.append(sum(each() is not None for each in made))
        return LossSums(loss, np.zeros(()), np.array(2.0), {})

    monkeypatch.setattr(loss, "eval_loss_sums", sums)
    monkeypatch.setattr(loss, "MAX_PENDING", 4)
    batches: Any = range(11)
    measured = loss.evaluate(parameters(), tiny().model, batches, 1.0)
    assert measured["valid/loss"] == sum(0.1 * batch for batch in range(11)) / 22
    assert max(alive) <= 5 and len(made) == 11


def test_gradient_is_that_of_the_mean_loss() -> None:
    config = tiny(**IN_PARTS)
    params, batch = parameters(init_std=0.3), batch_of(config)
    gradients, _ = gradient_of(config, params, batch)
    # The difference quotient along the gradient is its norm.
    norm, distance = float(optax.tree.norm(gradients)), 1e-2

    def moved(distance: float) -> float:
        there = jax.tree.map(lambda p, g: p + distance * g / norm, params, gradients)
        loss, square = loss_in_numpy(there, config, batch)
        return loss + 0.1 * square

    assert (moved(distance) - moved(-distance)) / (2 * distance) == pytest.approx(norm, rel=1e-2)


def test_reported_loss_is_that_of_the_batch() -> None:
    _, metrics = run(tiny(), [1])
    loss, _ = loss_in_numpy(parameters(), tiny(), batch_of(tiny()))
    assert metrics.loss == pytest.approx(loss, rel=1e-5)
    assert metrics.learned_tokens == batch_of(tiny()).weights_BT.sum()


@pytest.mark.slow
def test_z_loss_is_minimized_but_not_reported() -> None:
    (_, without), (_, with_z) = (run(tiny(**SGD, **{"training.z_loss": z}), [1]) for z in (0.0, 10.0))
    np.testing.assert_allclose(without.loss, with_z.loss, rtol=1e-6)
    assert with_z.gradient_norm > 1.5 * without.gradient_norm


def test_a_batch_without_loss_changes_only_the_step() -> None:
    config = tiny(**{"optimizer.weight_decay": 0.0})
    static, hparams = partition(config)
    state = TrainState(
        parameters(), make_optimizer(config.optimizer).init(parameters()), np.int32(0), init_loss_stats()
    )
    batches = stacked(config, 0, SLOTS, SLOTS)
    batches = batches._replace(weights_BT=np.zeros_like(batches.weights_BT))
    state, metrics = compiled_train_steps(static, state, batches, np.int32(1), hparams, np.int32(0))
    assert_same_bits(state.params, parameters())
    assert (metrics.loss[0], metrics.gradient_norm[0], metrics.learned_tokens[0], state.step) == (0, 0, 0, 1)


@pytest.mark.slow
def test_gradient_norm_is_reported_before_clipping() -> None:
    # With these, the update is the clipped gradient.
    plain = {"optimizer.momentum": 0.0, "optimizer.weight_decay": 0.0, "optimizer.learning_rate": 1.0}
    at_once = {"schedule.warmup_steps": 0, "schedule.final_lr_frac": 1.0}

    def first_step(clip_norm: float) -> tuple[float, float]:
        state, metrics = run(tiny(**SGD, **plain, **at_once, **{"optimizer.clip_norm": clip_norm}), [1])
        moved = jax.tree.map(jnp.subtract, state.params, parameters())
        return float(metrics.gradient_norm[0]), float(optax.tree.norm(moved))

    norm, moved = first_step(0.0)
    assert moved == pytest.approx(norm, rel=1e-4)
    assert first_step(norm / 10) == pytest.approx((norm, norm / 10), rel=1e-4)


def test_schedule_counts_from_the_first_step_of_a_stage() -> None:
    early, late = run(tiny(), [4]), run(tiny(), [4], first_step=100)
    np.testing.assert_array_equal(early[1].learning_rate, late[1].learning_rate)
    assert late[0].step == 104
    # Two steps of warmup, then the peak.
    np.testing.assert_allclose(early[1].learning_rate[:3], np.array([1 / 3, 2 / 3, 1]) * 1e-3, rtol=1e-6)


# Randomness.


@pytest.mark.slow
def test_dropout_depends_on_seed_and_step_only() -> None:
    def losses(**changes: Any) -> list[float]:
        # Constant parameters, and always the same batch.
        still = {"optimizer.learning_rate": 0.0, "model.dropout": 0.5}
        return run(tiny(**(SGD | still | changes)), [3], same_batch=True)[1].loss.tolist()

    assert len(set(losses(**{"model.dropout": 0.0}))) == 1
    assert len(set(losses())) == 3
    assert losses() == losses()
    assert not set(losses()) & set(losses(seed=1))


def test_initial_parameters_depend_on_the_seed() -> None:
    assert_same_bits(parameters(1), parameters(1))
    first, other = (parameters(seed)["embedding"]["table"].ravel() for seed in (1, 2**32 - 1))
    assert abs(np.corrcoef(first, other)[0, 1]) < 0.2


@pytest.mark.slow
def test_microbatches_have_different_dropout() -> None:
    config = tiny(**ALL_ON, **{"training.batch_size": 2})
    # The same sequence in both microbatches.
    batch = jax.tree.map(lambda leaf: leaf[[1, 1]], batch_of(tiny()))
    _, sums = gradient_of(config, parameters(), batch)
    static, hparams = partition(config)

    @jax.jit
    def alone(key: jax.Array) -> LossSums:
        return loss_sums(parameters(), jax.tree.map(lambda leaf: leaf[:1], batch), combine(static, hparams).model, key)

    losses = [float(alone(jax.random.fold_in(jax.random.key(0), part)).loss) for part in range(2)]
    assert float(sums.loss) == pytest.approx(sum(losses), rel=1e-5)
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


def test_evaluation_has_no_dropout() -> None:
    rates = (0.0, 0.9)
    sums = [eval_loss_sums(parameters(), batch_of(tiny()), tiny(**{"model.dropout": rate}).model) for rate in rates]
    assert_same_bits(*sums)


# Learning.


@pytest.mark.parametrize(
    "name", [name if name in ("adamw", "muon") else pytest.param(name, marks=pytest.mark.slow) for name in OPTIMIZERS]
)
def test_training_lowers_the_loss(name: str) -> None:
    rate = 0.3 if name == "sgd" else 1e-2
    config = tiny(**{"optimizer.name": name, "optimizer.learning_rate": rate, "training.steps": 40})
    _, metrics = run(config, [SLOTS] * 10, same_batch=True)
    assert metrics.loss[0] == pytest.approx(np.log(31), abs=0.1)
    assert metrics.loss[-1] < 0.5 * metrics.loss[0]
    assert all(np.isfinite(column).all() for column in jax.tree.leaves(metrics))


def test_bfloat16_activations_train_float32_parameters() -> None:
    steps = {"optimizer.learning_rate": 1e-2, "training.steps": 40}
    state, metrics = run(tiny(**steps, **{"model.dtype": "bfloat16"}), [SLOTS] * 10, same_batch=True)
    _, exact = run(tiny(**steps), [SLOTS], same_batch=True)
    np.testing.assert_allclose(metrics.loss[:SLOTS], exact.loss, rtol=0.01)
    assert metrics.loss[0] != exact.loss[0]
    assert metrics.loss[-1] < 0.5 * metrics.loss[0]
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.opt_state)} <= {np.dtype("float32"), np.dtype("int32")}


# The last test, because it clears the caches of compiled programs.


@pytest.mark.slow
def test_a_call_dispatches_one_program(caplog: pytest.LogCaptureFixture) -> None:
    config = tiny()
    static, hparams = partition(config)
    state = compiled_init_state(static, hparams)
    batches = stacked(config, 0, SLOTS, SLOTS)
    # Without caches, JAX logs the name of every program that runs.
    jax.clear_caches()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for _ in range(3):
            state, _ = compiled_train_steps(static, state, batches, np.int32(SLOTS), hparams, np.int32(0))
    messages = [record.getMessage() for record in caplog.records]
    programs = [message.split()[1] for message in messages if message.startswith("Compiling")]
    assert programs == ["jit(train_steps)"]
    assert state.step == 3 * SLOTS
