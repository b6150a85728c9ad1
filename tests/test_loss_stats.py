"""Loss statistics, and the policies for steps that are not finite."""

import itertools
import math
from collections.abc import Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_config
from test_loop import TINY, Interruption, assert_same_bits, metrics, stored_state, train
from test_population import train_together

from rustgpt_jax.config.schema import Config
from rustgpt_jax.data.pipeline import Batch, Batches
from rustgpt_jax.errors import UserError
from rustgpt_jax.training import batch_source
from rustgpt_jax.training.train_step import (
    AVERAGING_STEPS,
    SPIKE_DEVIATIONS,
    LossStats,
    init_loss_stats,
    update_loss_stats,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

compiled_update = jax.jit(update_loss_stats)


def after(losses: list[float]) -> LossStats:
    loss_stats = init_loss_stats()
    for step, loss in enumerate(losses):
        loss_stats = compiled_update(
            loss_stats, jnp.float32(loss), jnp.isfinite(loss), jnp.bool_(step == 0), jnp.bool_(False)
        )
    return loss_stats


def test_averages_are_plain_means_at_first() -> None:
    losses = np.random.default_rng(0).normal(3.0, 0.5, AVERAGING_STEPS)
    loss_stats = after(list(losses))
    np.testing.assert_allclose((loss_stats.mean, loss_stats.variance), (losses.mean(), losses.var()), rtol=1e-5)


def test_spikes_are_losses_far_above_the_exponential_mean() -> None:
    generator = np.random.default_rng(1)
    losses = generator.normal(3.0, 0.1, 400)
    losses[[20, 120, 250]] += 2.0
    mean, variance, expected = 0.0, 0.0, 0
    for step, loss in enumerate(losses):
        expected += step >= AVERAGING_STEPS and loss - mean > SPIKE_DEVIATIONS * variance**0.5
        share = 1 / min(step + 1, AVERAGING_STEPS)
        mean, variance = (
            mean + share * (loss - mean),
            (1 - share) * (variance + share * (loss - mean) ** 2) if step else 0.0,
        )
    assert (int(after(list(losses)).spikes), expected) == (2, 2)


def test_non_finite_losses_are_counted_and_not_averaged() -> None:
    losses = [3.0, 2.0, float("nan"), 2.5, float("inf")]
    loss_stats, without = after(losses), after([3.0, 2.0, 2.5])
    assert (int(loss_stats.faults), int(loss_stats.spikes), int(loss_stats.seen)) == (2, 0, 3)
    assert (loss_stats.mean, loss_stats.variance) == (without.mean, without.variance)


def test_loss_statistics_restart_with_a_stage() -> None:
    loss_stats = after([1.0] * AVERAGING_STEPS)
    for step in range(AVERAGING_STEPS):
        loss_stats = update_loss_stats(
            loss_stats, jnp.float32(5.0), jnp.bool_(True), jnp.bool_(step == 0), jnp.bool_(False)
        )
    assert (int(loss_stats.spikes), float(loss_stats.mean)) == (0, 5.0)


# Runs with batches whose loss is not finite.

BAD = frozenset({5, 16})


def make_config(nonfinite_policy: str, **changes: Any) -> Config:
    """Return a run of 20 steps with a checkpoint at every third."""
    return small_config(
        **(
            TINY
            | {"training.steps": 20, "logging.sample_prompts": (), "faults.nonfinite_policy": nonfinite_policy}
            | changes
        )
    )


@pytest.fixture(autouse=True)
def bad_batches(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Make the loss of the batches in `bad` NaN. `order` maps the number of a batch to the number of the batch to read.

    Batches are read from files, as if no token stream fit the device memory.
    """
    monkeypatch.setattr(batch_source, "MAX_MEMORY_SHARE", 0)
    plan: dict[str, Any] = {"bad": BAD, "order": lambda number: number}
    original = Batches.batch

    def iterate(self: Batches, first_step: int) -> Iterator[Batch]:
        for number in itertools.count(first_step):
            batch = original(self, plan["order"](number))
            is_bad = plan["order"](number) in plan["bad"]
            yield batch._replace(weights_BT=batch.weights_BT * np.float32(np.nan)) if is_bad else batch

    def generator(self: Batches, first_step: int) -> Generator[Batch, None, None]:
        yield from iterate(self, first_step)

    monkeypatch.setattr(Batches, "iterate", generator)
    return plan


def test_policy_stop_ends_at_the_non_finite_step(tmp_path: Path) -> None:
    config = make_config("stop")
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"step 6 is not finite.* last checkpoint is from step 4\. .*rustgpt doctor "
        ):
            train(config, tmp_path)
        assert math.isnan(metrics(tmp_path)[-1]["train/loss"]) and metrics(tmp_path)[-1]["step"] == 6
        state = stored_state(config, tmp_path)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_policy_skip_skips_the_update_and_counts_it(tmp_path: Path) -> None:
    config = make_config("skip", **{"logging.log_every": 4})
    assert train(config, tmp_path)[0]
    state = stored_state(config, tmp_path)
    assert (int(state.step), int(state.loss_stats.faults), int(state.loss_stats.skipped)) == (20, 2, 0)
    lines = [line for line in metrics(tmp_path) if "train/loss" in line]
    # A non-finite step is logged even if it is not due.
    assert [line["step"] for line in lines] == [1, 4, 6, 8, 12, 16, 17, 20]
    assert [line["train/faults"] for line in lines] == [0, 0, 1, 1, 1, 1, 2, 2]
    assert [math.isnan(line["train/loss"]) for line in lines] == [line["step"] in (6, 17) for line in lines]


def test_policy_rewind_equals_a_run_without_the_bad_batches(tmp_path: Path, bad_batches: dict[str, Any]) -> None:
    config = make_config("rewind")
    is_complete, printed = train(config, tmp_path / "rewound")
    assert is_complete and "step 6 is not finite: going back to step 4" in printed and "(2 of 10 tolerated)" in printed
    rewound = stored_state(config, tmp_path / "rewound")
    # Batch 5 is that of step 6: back to step 4, and the next step reads batch 6. Batch 16 is then that of step 15: back
    # to step 12, and on with batch 17.
    bad_batches.update(bad=frozenset(), order=lambda number: number + 2 * (number >= 4) + 3 * (number >= 12))
    assert train(config, tmp_path / "clean")[0]
    clean = stored_state(config, tmp_path / "clean")
    assert_same_bits(rewound.params, clean.params)
    assert_same_bits(rewound.opt_state, clean.opt_state)
    assert (int(rewound.loss_stats.faults), int(rewound.loss_stats.skipped)) == (2, 0)
    counters = {"train/faults"}
    left, right = (
        [{name: value for name, value in line.items() if name not in counters} for line in metrics(tmp_path / name)]
        for name in ("rewound", "clean")
    )
    assert left == right


def test_skipped_batches_do_not_affect_the_next_stage(tmp_path: Path, bad_batches: dict[str, Any]) -> None:
    halves = ({"name": "first", "training": {"steps": 9}}, {"name": "second", "training": {"steps": 6}})
    config = make_config("rewind", stages=halves)
    assert train(config, tmp_path / "rewound")[0]
    rewound = stored_state(config, tmp_path / "rewound")
    assert (int(rewound.loss_stats.faults), int(rewound.loss_stats.skipped)) == (1, 0)
    # The second stage reads its batches from the first one on.
    bad_batches.update(bad=frozenset(), order=lambda number: number + 2 * (4 <= number < 9))
    assert train(config, tmp_path / "clean")[0]
    assert_same_bits(rewound.params, stored_state(config, tmp_path / "clean").params)


def test_non_finite_update_is_not_applied(tmp_path: Path, bad_batches: dict[str, Any]) -> None:
    bad_batches["bad"] = frozenset()
    wild = {"optimizer.name": "sgd", "optimizer.learning_rate": 3e38, "schedule.warmup_steps": 0}
    config = make_config("skip", **wild, **{"faults.max_skipped": 100, "optimizer.clip_norm": 0.0, "training.steps": 4})
    assert train(config, tmp_path)[0]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(stored_state(config, tmp_path).params))


@pytest.mark.parametrize("nonfinite_policy", ["skip", "rewind"])
def test_more_than_max_skipped_ends_the_run(tmp_path: Path, nonfinite_policy: str) -> None:
    with pytest.raises(UserError, match=r"the update of step \d+ is not finite, after 1 that were tolerated"):
        train(make_config(nonfinite_policy, **{"faults.max_skipped": 1}), tmp_path)
    assert math.isnan(metrics(tmp_path)[-1]["train/loss"])
    assert metrics(tmp_path)[-1]["train/faults"] == 2


def test_number_of_rewinds_is_bounded(tmp_path: Path, bad_batches: dict[str, Any]) -> None:
    bad_batches["bad"] = frozenset(range(1000))
    with pytest.raises(UserError, match=r"the update of step 1 is not finite.* last checkpoint is from step 0"):
        train(make_config("rewind", **{"faults.max_skipped": 3}), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("nonfinite_policy", "is_kill"), [("skip", False), ("rewind", True)])
def test_resume_with_non_finite_steps_is_bit_exact(tmp_path: Path, nonfinite_policy: str, is_kill: bool) -> None:
    config = make_config(nonfinite_policy)
    assert train(config, tmp_path / "straight")[0]
    for steps in (5, 2, 7):
        train(config, tmp_path / "broken", Interruption(steps, is_kill))
    assert train(config, tmp_path / "broken")[0]
    assert_same_bits(stored_state(config, tmp_path / "broken"), stored_state(config, tmp_path / "straight"))
    assert_same_bits(
        stored_state(config, tmp_path / "broken", "best"), stored_state(config, tmp_path / "straight", "best")
    )
    assert metrics(tmp_path / "broken") == metrics(tmp_path / "straight")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["exact", pytest.param("fused", marks=pytest.mark.long)])
def test_rewind_of_a_member_does_not_affect_the_population(tmp_path: Path, mode: str) -> None:
    steady = make_config("rewind", seed=2, **{"training.steps": 4})
    configs = [*(make_config("rewind", seed=seed) for seed in (0, 1)), steady]
    train_together(mode, configs, tmp_path / "together")
    for index, config in enumerate(configs):
        assert train(config, tmp_path / "alone" / str(index))[0]
        left, right = (stored_state(config, tmp_path / name / str(index)) for name in ("together", "alone"))
        assert left.loss_stats.faults == right.loss_stats.faults == (0 if config is steady else 2)
        if mode == "exact":
            assert_same_bits(left, right)
        else:
            jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-2, atol=1e-4), left.params, right.params)
