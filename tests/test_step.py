"""The training step: one program for all numbers, the same bits however a run is cut, and the right loss."""

import dataclasses
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import small_config

from rustgpt_jax.config import FIELDS, Config, Structure, merge, split
from rustgpt_jax.data.pipeline import Batch
from rustgpt_jax.model import transformer
from rustgpt_jax.training.objective import compiled_token_sums, objective, token_sums
from rustgpt_jax.training.optimizers import OPTIMIZERS
from rustgpt_jax.training.step import (
    Metrics,
    Numbers,
    State,
    as_arguments,
    compiled_start,
    compiled_train_steps,
    gradient,
)

TINY = {"model.n_layers": 1, "model.d_model": 16, "model.n_heads": 2, "model.context_length": 8, "model.vocab_size": 31}
ALL_ON = {"model.dropout": 0.1, "training.z_loss": 1e-3, "optimizer.clip_norm": 1.0}


def tiny(**changes: Any) -> Config:
    return small_config(**(TINY | changes))


def batch_of(config: Config, seed: int = 0) -> Batch:
    """Random tokens in two documents a row, of which a ragged share is learned, and in some rows none."""
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


def program_of(config: Config) -> tuple[Structure, Numbers]:
    structure, numbers = split(config)
    return structure, as_arguments(numbers)


def run(
    config: Config, cuts: list[tuple[int, int]], same_batch: bool = False, first_step: int = 0
) -> tuple[State, Metrics]:
    """The end of a run cut into calls of (steps, slots), and the metrics of all its steps."""
    structure, numbers = program_of(config)
    state = compiled_start(structure, numbers)._replace(step=np.int32(first_step))
    done, history = 0, []
    for count, slots in cuts:
        batches = stacked(config, 0 if same_batch else done, 1 if same_batch else count, slots)
        state, metrics = compiled_train_steps(structure, state, batches, np.int32(count), numbers, np.int32(first_step))
        history.append(jax.tree.map(lambda column, count=count: np.asarray(column)[:count], metrics))
        done += count
    return state, Metrics(*(np.concatenate(columns) for columns in zip(*history, strict=True)))


def assert_same_bits(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


# Programs.


def test_steps_cost_one_dispatch_a_call(caplog: pytest.LogCaptureFixture) -> None:
    config = tiny()
    structure, numbers = program_of(config)
    state = compiled_start(structure, numbers)
    batches = stacked(config, 0, 4, 4)
    # What is not compiled cannot run: without its caches, JAX says the name of everything that does.
    jax.clear_caches()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for _ in range(3):
            state, _ = compiled_train_steps(structure, state, batches, np.int32(4), numbers, np.int32(0))
    programs = [
        record.getMessage().split()[1] for record in caplog.records if record.getMessage().startswith("Compiling")
    ]
    assert programs == ["jit(train_steps)"]
    assert state.step == 12


def test_no_number_compiles_anything_new() -> None:
    config = tiny(**ALL_ON)
    run(config, [(2, 4)])
    before = compiled_start._cache_size(), compiled_train_steps._cache_size()
    _, numbers = split(config)
    for path, value in numbers.items():
        other = dataclasses.replace(config, **{})
        field = FIELDS[path]
        value = value + 1 if field.type is int else value * 0.5
        run(tiny(**(ALL_ON | {path: value})), [(3, 4)])
        assert (compiled_start._cache_size(), compiled_train_steps._cache_size()) == before, path


@pytest.mark.parametrize("path", ALL_ON)
def test_switching_a_part_on_compiles_once(path: str) -> None:
    run(tiny(**{path: 0.0}), [(1, 1)])
    before = compiled_train_steps._cache_size()
    for value in (0.1, 0.2):
        run(tiny(**{path: value}), [(1, 1)])
    assert compiled_train_steps._cache_size() == before + 1


# Cutting up.


def test_a_run_has_the_same_bits_however_it_is_cut() -> None:
    config = tiny(**ALL_ON, **{"training.accumulation": 2})
    whole = run(config, [(7, 7)])
    assert_same_bits(run(config, [(3, 7), (4, 7)]), whole)
    assert_same_bits(run(config, [(3, 4), (4, 4)]), whole)
    assert_same_bits(run(config, [(1, 1)] * 7), whole)
    assert whole[0].step == 7
    assert whole[1].loss.shape == (7,)


@pytest.mark.parametrize("parts", [2, 4])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(parts: int) -> None:
    config = tiny(**{"training.batch_size": 8, "training.z_loss": 0.1})
    params = compiled_start(*program_of(config)).params
    batch = batch_of(config)
    weights = batch.weights_BT.reshape(parts, -1)
    assert len(set(weights.sum(axis=1))) > 1, "the parts should have unequal numbers of learned tokens"

    def parted(accumulation: int) -> tuple[Any, Any]:
        structure, numbers = split(
            tiny(**{"training.batch_size": 8, "training.z_loss": 0.1, "training.accumulation": accumulation})
        )
        return jax.jit(lambda: gradient(params, batch, merge(structure, numbers), jax.random.key(0)))()

    (whole, whole_sums), (summed, sums) = parted(1), parted(parts)
    np.testing.assert_allclose(sums, whole_sums, rtol=1e-6)
    scale = float(optax.tree.norm(whole))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * scale), summed, whole)


# Values.


def loss_in_numpy(params: Any, config: Config, batch: Batch) -> tuple[float, float]:
    """The mean cross-entropy and the mean squared normaliser over the learned tokens, from the logits in float64."""
    logits_BTV, _ = transformer.apply(
        params, batch.tokens_BT, config.model, positions_BT=batch.positions_BT, segments_BT=batch.segments_BT
    )
    losses, squares = [], []
    for logits, target, weight in zip(
        np.asarray(logits_BTV, np.float64).reshape(-1, logits_BTV.shape[-1]),
        batch.targets_BT.ravel(),
        batch.weights_BT.ravel(),
        strict=True,
    ):
        if weight:
            normalizer = np.log(np.exp(logits - logits.max()).sum()) + logits.max()
            losses.append(normalizer - logits[target])
            squares.append(normalizer**2)
    return float(np.mean(losses)), float(np.mean(squares))


def test_the_loss_and_the_z_loss_are_those_of_numpy() -> None:
    config = tiny(**{"model.init_std": 0.5})
    params = compiled_start(*program_of(config)).params
    batch = batch_of(config)
    loss, square = loss_in_numpy(params, config, batch)
    sums = compiled_token_sums(params, batch, config.model)
    total = np.float32(batch.weights_BT.sum())
    assert sums.weight == total
    assert objective(sums, total, 0.0) == pytest.approx(loss, rel=1e-5)
    assert objective(sums, total, 0.3) == pytest.approx(loss + 0.3 * square, rel=1e-5)
    assert run(config, [(1, 1)])[1].loss == pytest.approx(loss, rel=1e-5)


def test_a_z_loss_is_minimised_but_not_reported() -> None:
    without, with_z = (run(tiny(**{"training.z_loss": z}), [(1, 1)])[1] for z in (0.0, 10.0))
    np.testing.assert_array_equal(without.loss, with_z.loss)
    assert with_z.gradient_norm > 1.5 * without.gradient_norm


def test_the_gradient_is_that_of_the_mean_loss() -> None:
    config = tiny(**{"model.init_std": 0.3})
    params = compiled_start(*program_of(config)).params
    structure, numbers = split(config)
    gradients, _ = gradient(params, batch_of(config), merge(structure, numbers), jax.random.key(0))
    # Against a difference quotient along the gradient itself, whose value is the gradient's norm.
    norm, step = float(optax.tree.norm(gradients)), 1e-2

    def moved(distance: float) -> float:
        there = jax.tree.map(lambda p, g: p + distance * g / norm, params, gradients)
        return loss_in_numpy(there, config, batch_of(config))[0]

    assert (moved(step) - moved(-step)) / (2 * step) == pytest.approx(norm, rel=1e-2)


def test_a_batch_with_nothing_to_learn_changes_nothing_but_the_step() -> None:
    config = tiny(**{"optimizer.weight_decay": 0.0})
    structure, numbers = program_of(config)
    state = compiled_start(structure, numbers)
    before = jax.device_get(state.params)
    batches = stacked(config, 0, 1, 1)
    batches = batches._replace(weights_BT=np.zeros_like(batches.weights_BT))
    state, metrics = compiled_train_steps(structure, state, batches, np.int32(1), numbers, np.int32(0))
    assert_same_bits(state.params, before)
    assert (metrics.loss[0], metrics.gradient_norm[0], metrics.learned_tokens[0]) == (0, 0, 0)


def test_the_norm_is_reported_before_clipping_and_the_clip_acts() -> None:
    def first_update(clip_norm: float) -> tuple[float, float]:
        # With momentum 0 the update of sgd is the clipped gradient.
        config = tiny(
            **{
                "optimizer.name": "sgd",
                "optimizer.momentum": 0.0,
                "optimizer.weight_decay": 0.0,
                "optimizer.learning_rate": 1.0,
                "optimizer.clip_norm": clip_norm,
                "schedule.name": "constant",
                "schedule.warmup_steps": 0,
            }
        )
        state, metrics = run(config, [(1, 1)])
        moved = jax.tree.map(jnp.subtract, state.params, compiled_start(*program_of(config)).params)
        return float(metrics.gradient_norm[0]), float(optax.tree.norm(moved))

    norm, moved = first_update(0.0)
    assert moved == pytest.approx(norm, rel=1e-4)
    assert first_update(norm / 10) == pytest.approx((norm, norm / 10), rel=1e-4)


def test_a_stage_counts_its_schedule_from_its_first_step() -> None:
    early, late = run(tiny(), [(4, 4)]), run(tiny(), [(4, 4)], first_step=100)
    np.testing.assert_array_equal(early[1].learning_rate, late[1].learning_rate)
    assert late[0].step == 104
    # Two steps of warm-up, then the peak.
    np.testing.assert_allclose(early[1].learning_rate[:3], np.array([1 / 3, 2 / 3, 1]) * 1e-3, rtol=1e-6)


# Randomness.


def test_dropout_is_a_function_of_seed_and_step() -> None:
    def losses(**changes: Any) -> np.ndarray:
        return run(
            tiny(**{"model.dropout": 0.5, "optimizer.learning_rate": 0.0, **changes}), [(3, 4)], same_batch=True
        )[1].loss

    first = losses()
    np.testing.assert_array_equal(losses(), first)
    assert len(set(first.tolist())) == 3
    # Parameters that do not move and the same batch: without dropout all steps are alike.
    assert len(set(losses(**{"model.dropout": 0.0}).tolist())) == 1


def test_the_seed_decides_the_parameters_and_what_is_dropped() -> None:
    first, again, other = (compiled_start(*program_of(tiny(seed=seed))).params for seed in (1, 1, 2**32 - 1))
    assert_same_bits(first, again)
    tables = first["embedding"]["table"], other["embedding"]["table"]
    assert np.abs(np.corrcoef(*map(np.ravel, tables))[0, 1]) < 0.2

    config = tiny(**{"model.dropout": 0.5})
    structure, numbers = split(config)
    sums = [
        token_sums(first, batch_of(config), merge(structure, numbers).model, jax.random.key(seed)) for seed in (1, 1, 2)
    ]
    assert sums[0].loss == sums[1].loss != sums[2].loss


def test_parts_of_a_batch_drop_different_activations() -> None:
    config = tiny(
        **{"model.dropout": 0.5, "training.accumulation": 2, "training.batch_size": 2, "optimizer.weight_decay": 0.0}
    )
    structure, numbers = split(config)
    params = compiled_start(*program_of(config)).params
    one = jax.tree.map(lambda leaf: np.repeat(leaf[1:2], 2, axis=0), batch_of(tiny()))
    key = jax.random.key(0)
    _, sums = gradient(params, one, merge(structure, numbers), key)
    part = jax.tree.map(lambda leaf: leaf[:1], one)
    alike = token_sums(params, part, merge(structure, numbers).model, jax.random.fold_in(key, 0))
    assert sums.loss != pytest.approx(2 * float(alike.loss), rel=1e-5)


def test_evaluation_drops_nothing() -> None:
    params = compiled_start(*program_of(tiny())).params
    plain, dropping = (
        compiled_token_sums(params, batch_of(tiny()), tiny(**{"model.dropout": rate}).model) for rate in (0.0, 0.9)
    )
    assert_same_bits(plain, dropping)


# Learning.


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_lowers_the_loss(name: str) -> None:
    rate = 0.3 if name == "sgd" else 1e-2
    config = tiny(**{"optimizer.name": name, "optimizer.learning_rate": rate, "training.steps": 40})
    _, metrics = run(config, [(40, 40)], same_batch=True)
    assert metrics.loss[0] == pytest.approx(np.log(31), abs=0.1)
    assert metrics.loss[-1] < 0.5 * metrics.loss[0]
    assert all(np.isfinite(column).all() for column in metrics)


def test_bfloat16_trains_on_float32_parameters() -> None:
    config = tiny(**{"model.dtype": "bfloat16", "optimizer.learning_rate": 1e-2, "training.steps": 40})
    state, metrics = run(config, [(40, 40)], same_batch=True)
    exact = run(tiny(**{"optimizer.learning_rate": 1e-2, "training.steps": 40}), [(40, 40)], same_batch=True)[1]
    np.testing.assert_allclose(metrics.loss[:5], exact.loss[:5], rtol=0.01)
    assert metrics.loss[-1] < 0.5 * metrics.loss[0]
    assert metrics.loss[0] != exact.loss[0]
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.opt_state)} <= {np.dtype("float32"), np.dtype("int32")}
