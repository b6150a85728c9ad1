"""Samplers match brute force in the documented order, and samples follow the filtered distribution."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from conftest import small_config
from hypothesis import assume, currently_in_test_context, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from rustgpt_jax.config.schema import SamplingConfig
from rustgpt_jax.inference.sampling import SAMPLERS, Greedy, make_samplers, sample

pytestmark = pytest.mark.usefixtures("quick_codegen")

VOCABULARY = 9


BASE = small_config().sampling
NEUTRAL = {name: value for name, (value, _) in SAMPLERS.items()}
ORDER = ("repetition_penalty", "temperature", "top_k", "top_p", "min_p")


def sampling(**changes: Any) -> SamplingConfig:
    return dataclasses.replace(BASE, **NEUTRAL | changes)


# References for one row of logits, in float64. Examples whose result depends on rounding are skipped.


def only_where(condition: bool) -> None:
    """Skip an example of hypothesis that does not satisfy the condition; other examples must satisfy it."""
    if currently_in_test_context():
        assume(condition)
    assert condition


def without_near_ties(logits_V: np.ndarray) -> np.ndarray:
    gaps = np.diff(np.sort(logits_V[logits_V > -np.inf]))
    only_where(((gaps == 0) | (gaps > 1e-4)).all())
    return logits_V


def probabilities(logits_V: np.ndarray) -> np.ndarray:
    weights_V = np.exp(logits_V - logits_V.max())
    return weights_V / weights_V.sum()


def penalized(logits_V: np.ndarray, seen_V: np.ndarray, penalty: float) -> np.ndarray:
    return np.array(
        [(x / penalty if x > 0 else x * penalty) if seen else x for x, seen in zip(logits_V, seen_V, strict=True)]
    )


def tempered(logits_V: np.ndarray, seen_V: np.ndarray, temperature: float) -> np.ndarray:
    return logits_V / temperature


def top_k(logits_V: np.ndarray, seen_V: np.ndarray, k: float) -> np.ndarray:
    better_V = np.array([np.sum(without_near_ties(logits_V) > x) for x in logits_V])
    return np.where(better_V < k, logits_V, -np.inf)


def top_p(logits_V: np.ndarray, seen_V: np.ndarray, p: float) -> np.ndarray:
    kept, total = np.zeros(len(logits_V), bool), 0.0
    for rank, token in enumerate(np.argsort(-without_near_ties(logits_V))):
        only_where(rank == 0 or abs(total - p) > 1e-5)
        if rank == 0 or total < p:
            kept |= logits_V == logits_V[token]
        total += probabilities(logits_V)[token]
    return np.where(kept, logits_V, -np.inf)


def min_p(logits_V: np.ndarray, seen_V: np.ndarray, p: float) -> np.ndarray:
    share_V = probabilities(logits_V) / probabilities(logits_V).max()
    only_where(p == 1 or (np.abs(share_V - p) > 1e-4 * p).all())
    return np.where(share_V >= p, logits_V, -np.inf)


EXPECTED: dict[str, tuple[Callable[[np.ndarray, np.ndarray, float], np.ndarray], Any]] = {
    "repetition_penalty": (penalized, st.floats(1.0, 3.0, width=32)),
    "temperature": (tempered, st.floats(0.125, 4.0, width=32)),
    "top_k": (top_k, st.integers(0, VOCABULARY + 1)),
    "top_p": (top_p, st.just(0.0) | st.floats(0.0, 1.0, width=32)),
    "min_p": (min_p, st.floats(0.0, 1.0, width=32)),
}
some_logits = arrays(np.float32, (2, VOCABULARY), elements=st.floats(-8, 8, width=16))
some_seen = arrays(np.bool_, (2, VOCABULARY))


@jax.jit
def through(samplers: Any, logits_BV: Any, seen_BV: Any) -> Any:
    for sampler in samplers:
        logits_BV = sampler(logits_BV, seen_BV)
    return logits_BV


def expected_through(numbers: dict[str, float], logits_BV: np.ndarray, seen_BV: np.ndarray) -> np.ndarray:
    rows = []
    for logits_V, seen_V in zip(logits_BV.astype(np.float64), seen_BV, strict=True):
        for name in ORDER:
            if numbers.get(name, NEUTRAL[name]) != NEUTRAL[name]:
                logits_V = EXPECTED[name][0](logits_V, seen_V, numbers[name])
        rows.append(logits_V)
    return np.stack(rows)


@pytest.mark.parametrize("name", SAMPLERS)
@settings(max_examples=50)
@given(data=st.data(), logits_BV=some_logits, seen_BV=some_seen)
def test_samplers_match_brute_force(name: str, data: Any, logits_BV: np.ndarray, seen_BV: np.ndarray) -> None:
    number = data.draw(EXPECTED[name][1])
    actual = through(make_samplers(sampling(**{name: number})), logits_BV, seen_BV)
    np.testing.assert_allclose(actual, expected_through({name: number}, logits_BV, seen_BV), rtol=1e-5)


@settings(max_examples=50)
@given(
    numbers=st.fixed_dictionaries({name: values for name, (_, values) in EXPECTED.items()}),
    logits_BV=some_logits,
    seen_BV=some_seen,
)
def test_samplers_are_applied_in_the_documented_order(
    numbers: dict[str, float], logits_BV: np.ndarray, seen_BV: np.ndarray
) -> None:
    assume(all(numbers[name] != NEUTRAL[name] for name in ORDER))
    actual = through(make_samplers(sampling(**numbers)), logits_BV, seen_BV)
    np.testing.assert_allclose(actual, expected_through(numbers, logits_BV, seen_BV), rtol=1e-5)


@settings(max_examples=50)
@given(logits_BV=some_logits, seen_BV=some_seen, temperature=st.sampled_from([0.125, 1.0, 2.0]))
def test_samplers_preserve_the_order_of_tokens(logits_BV: np.ndarray, seen_BV: np.ndarray, temperature: float) -> None:
    samplers = make_samplers(sampling(temperature=temperature, top_k=4, top_p=0.7, min_p=0.05))
    left_BV = np.asarray(through(samplers, logits_BV, seen_BV))
    for logits_V, left_V in zip(logits_BV, left_BV, strict=True):
        order = np.argsort(logits_V, kind="stable")
        assert (np.diff(left_V[order][left_V[order] > -np.inf]) >= 0).all()
        assert left_V[np.argmax(logits_V)] > -np.inf


@pytest.mark.parametrize("top_k", [VOCABULARY, 10**6, 10**12])
def test_top_k_beyond_the_vocabulary_keeps_all_tokens(top_k: int) -> None:
    logits_BV = np.arange(2.0 * VOCABULARY, dtype=np.float32).reshape(2, VOCABULARY)
    np.testing.assert_array_equal(through(make_samplers(sampling(top_k=top_k)), logits_BV, logits_BV > 0), logits_BV)


def test_sampler_settings_do_not_recompile() -> None:
    for name, (_, sampler) in SAMPLERS.items():
        assert jax.tree.leaves(sampler(np.float32(0.5))) == [0.5], name
    through.clear_cache()
    for temperature in (0.3, 0.7, 2.0):
        through(
            make_samplers(sampling(temperature=temperature, top_p=0.5)),
            np.zeros((2, 9), np.float32),
            np.zeros((2, 9), bool),
        )
    assert through._cache_size() == 1


# Sampling.

compiled_sample = jax.jit(sample)


@settings(max_examples=50)
@given(
    logits_BV=some_logits,
    seen_BV=some_seen,
    penalty=st.sampled_from([1.0, 1.5]),
    temperature=st.sampled_from([0.0, 5e-324, 1e-46, 1e-40, 1e-30, 9e-6]),
)
def test_temperature_near_zero_is_greedy(
    logits_BV: np.ndarray, seen_BV: np.ndarray, penalty: float, temperature: float
) -> None:
    greedy = sampling(temperature=temperature, top_k=3, top_p=0.5, min_p=0.5, repetition_penalty=penalty)
    chain = make_samplers(greedy)
    keys_B = jax.random.split(jax.random.key(0), 2)
    penalized_BV = expected_through({"repetition_penalty": penalty}, logits_BV, seen_BV)
    for logits_V in penalized_BV:
        without_near_ties(logits_V)
    np.testing.assert_array_equal(compiled_sample(keys_B, logits_BV, seen_BV, chain), penalized_BV.argmax(-1))
    assert isinstance(chain[-1], Greedy)
    assert len(chain) == (1 if penalty == 1 else 2)


CHAINS = {
    "all tokens": {},
    "hot": {"temperature": 2.0},
    "nucleus": {"temperature": 1.5, "top_p": 0.8},
    "everything": {"temperature": 1.5, "top_k": 6, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.5},
}


@pytest.mark.parametrize("name", CHAINS)
def test_samples_follow_the_filtered_distribution(name: str) -> None:
    count = 20_000
    logits_V = np.random.default_rng(2).normal(0, 1.5, VOCABULARY).astype(np.float32)
    logits_BV, seen_BV = np.tile(logits_V, (count, 1)), np.tile(np.arange(VOCABULARY) % 3 == 0, (count, 1))
    keys_B = jax.random.split(jax.random.key(5), count)
    sampled_B = compiled_sample(keys_B, logits_BV, seen_BV, make_samplers(sampling(**CHAINS[name])))
    expected_V = probabilities(expected_through(CHAINS[name], logits_BV[:1], seen_BV[:1])[0])
    counts_V = np.bincount(sampled_B, minlength=VOCABULARY)
    possible_V = expected_V > 0
    assert 2 < possible_V.sum() <= (VOCABULARY if name in ("all tokens", "hot") else VOCABULARY - 2)
    assert counts_V[~possible_V].sum() == 0
    assert stats.chisquare(counts_V[possible_V], expected_V[possible_V] * count).pvalue > 1e-3


def test_a_row_depends_only_on_its_key() -> None:
    keys_B = jax.random.split(jax.random.key(0), 50)
    zeros_BV = np.zeros((50, VOCABULARY), np.float32)
    sampled_B = np.asarray(compiled_sample(keys_B, zeros_BV, zeros_BV > 0, ()))
    assert len(set(sampled_B.tolist())) == VOCABULARY
    np.testing.assert_array_equal(compiled_sample(keys_B[::-1], zeros_BV, zeros_BV > 0, ()), sampled_B[::-1])
