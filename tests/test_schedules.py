"""Learning-rate schedules: each against plain Python, with one compilation for all lengths."""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import numpy as np
import pytest
from conftest import small_config
from hypothesis import given
from hypothesis import strategies as st

from rustgpt_jax.config.schema import ScheduleConfig
from rustgpt_jax.errors import UserError
from rustgpt_jax.training.optimizers import SCHEDULES, schedule_multiplier


def knobs(name: str, warmup: float = 0, decay: float = 0.2, final: float = 0.1) -> ScheduleConfig:
    base = small_config().schedule
    return dataclasses.replace(base, name=name, warmup_steps=warmup, decay_frac=decay, final_lr_frac=final)


@functools.cache
def compiled(name: str) -> Callable[..., jax.Array]:
    """Return the multiplier of a schedule as a compiled function, with all numbers traced."""
    return jax.jit(lambda step, steps, *numbers: schedule_multiplier(step, steps, knobs(name, *numbers)))


def traced(name: str, step: int, steps: int, warmup: int, decay: float, final: float) -> float:
    numbers = np.array([steps, warmup, decay, final], np.float32)
    return float(compiled(name)(np.int32(step), *numbers))


def curve(name: str, steps: int, warmup: int = 0, decay: float = 0.2, final: float = 0.1) -> np.ndarray:
    """Return the multipliers of all steps, and of the step after the last one."""
    return np.array([traced(name, step, steps, warmup, decay, final) for step in range(steps + 1)])


def oracle(name: str, step: int, steps: int, warmup: int, decay: float, final: float) -> float:
    start = {"constant": math.inf, "linear": warmup, "cosine": warmup, "wsd": steps * (1 - decay)}[name]
    done = min(1.0, max(0.0, step - start) / max(1.0, steps - start))
    share = (1 - math.cos(math.pi * done)) / 2 if name == "cosine" else done
    return min((step + 1) / (warmup + 1), 1 - (1 - final) * share)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_match_their_oracles_with_one_compilation(name: str) -> None:
    @given(
        steps=st.integers(1, 100_000),
        places=st.lists(st.floats(0, 1), min_size=1, max_size=5),
        warmup_share=st.floats(0, 1),
        decay=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
        final=st.sampled_from([0.0, 0.1, 1.0]),
    )
    def check(steps: int, places: list[float], warmup_share: float, decay: float, final: float) -> None:
        warmup = int(warmup_share * steps)
        for step in (int(place * (steps - 1)) for place in places):
            value = traced(name, step, steps, warmup, decay, final)
            assert value == pytest.approx(oracle(name, step, steps, warmup, decay, final), rel=1e-4, abs=1e-5)
            assert 0 <= value <= 1

    check()
    assert compiled(name)._cache_size() == 1


@pytest.mark.parametrize("name", SCHEDULES)
def test_warmup_is_linear(name: str) -> None:
    assert curve(name, 10)[0] == 1.0
    np.testing.assert_allclose(curve(name, 100, warmup=9)[:10], np.arange(1, 11) / 10, rtol=1e-6)


@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("name", SCHEDULES)
def test_multiplier_falls_to_the_final_fraction_after_warmup(name: str, final: float) -> None:
    factors = curve(name, 50, warmup=10, final=final)
    assert np.all(np.diff(factors[10:]) <= 1e-6)
    end = 1.0 if name == "constant" else final
    assert factors[-1] == pytest.approx(end, abs=1e-6)
    # The last step is one before that end.
    assert factors[-2] - factors[-1] <= (1 - end) / 10 + 1e-6


def test_wsd_is_constant_then_linear() -> None:
    factors = curve("wsd", 100, warmup=5, decay=0.2, final=0.0)
    assert np.all(factors[5:81] == 1.0)
    np.testing.assert_allclose(factors[80:], np.linspace(1, 0, 21), atol=1e-6)


def test_linear_and_cosine_are_half_way_in_the_middle() -> None:
    for name in ("linear", "cosine"):
        assert curve(name, 110, warmup=10, final=0.2)[60] == pytest.approx(0.6, rel=1e-5)
    # The slope of the cosine is 0 at both ends.
    assert np.abs(np.diff(curve("cosine", 100)))[[0, -1]].max() < 1e-3


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_with_only_warmup(name: str) -> None:
    factors = curve(name, 4, warmup=4, decay=0.0)
    np.testing.assert_allclose(factors[:4], np.arange(1, 5) / 5, rtol=1e-6)
    assert np.isfinite(factors).all()


@pytest.mark.parametrize("name", SCHEDULES)
def test_constant_and_traced_schedules_agree(name: str) -> None:
    for step in (0, 3, 17, 19):
        plain = schedule_multiplier(np.int32(step), 20, knobs(name, warmup=5, decay=0.3, final=0.2))
        assert float(plain) == pytest.approx(traced(name, step, 20, 5, 0.3, 0.2), rel=1e-6)


def test_unknown_schedule_suggests_the_nearest_name() -> None:
    with pytest.raises(UserError, match="config.schedule.name: unknown 'cosin'. Did you mean 'cosine'?"):
        schedule_multiplier(np.int32(0), 10, knobs("cosin"))
