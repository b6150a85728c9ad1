"""Building blocks of sweeps: combinators, distributions, sampling, and error messages."""

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from rustgpt_jax.errors import UserError
from rustgpt_jax.sweeps import (
    Overrides,
    chain,
    choice,
    integers,
    log_integers,
    log_uniform,
    product,
    sample,
    seeds,
    sobol,
    successive_halving,
    tpe,
    uniform,
    values,
    zip_,
)

U = st.floats(0, 1, exclude_max=True)
FINITE = st.floats(-1e300, 1e300)
POSITIVE = st.floats(1e-300, 1e300)

RANGES = {
    "uniform": st.lists(FINITE, min_size=2, max_size=2, unique=True).map(lambda pair: uniform(*sorted(pair))),
    "log_uniform": st.lists(POSITIVE, min_size=2, max_size=2, unique=True).map(lambda pair: log_uniform(*sorted(pair))),
    "integers": st.lists(st.integers(), min_size=2, max_size=2, unique=True).map(lambda pair: integers(*sorted(pair))),
    "log_integers": st.lists(st.integers(1), min_size=2, max_size=2, unique=True).map(
        lambda pair: log_integers(*sorted(pair))
    ),
}


def sweep_over(names: str) -> st.SearchStrategy[list[Overrides]]:
    """Sweeps of trials that each give some of the knobs, of which a sweep may have none."""
    knobs = st.dictionaries(st.sampled_from(names), st.integers(0, 3))
    return st.lists(knobs, max_size=4)


THREE = st.tuples(sweep_over("abc"), sweep_over("def"), sweep_over("ghi"))


# Combinations.


@given(THREE)
def test_product_has_each_combination_and_the_first_varies_slowest(sweeps: Any) -> None:
    first, second, third = sweeps
    found = product(first, second, third)
    assert len(found) == len(first) * len(second) * len(third)
    assert found == [a | b | c for a in first for b in second for c in third]


@given(THREE)
def test_products_and_chains_are_monoids(sweeps: Any) -> None:
    a, b, c = sweeps
    for combine, neutral in ((product, [{}]), (chain, [])):
        assert combine(combine(a, b), c) == combine(a, combine(b, c)) == combine(a, b, c)
        assert combine(a, neutral) == combine(neutral, a) == combine(a) == a
        assert combine() == neutral
    assert chain(a, b, c) == [*a, *b, *c]
    assert product(a, []) == []
    assert product(chain(a, a), b) == chain(product(a, b), product(a, b))


@given(st.lists(st.tuples(st.integers(), st.text(max_size=3), st.booleans()), min_size=1, max_size=6))
def test_zip_is_the_inverse_of_taking_columns(rows: list[tuple[int, str, bool]]) -> None:
    columns = [values(path, *column) for path, column in zip("abc", zip(*rows, strict=True), strict=True)]
    trials = zip_(*columns)
    assert [tuple(trial.values()) for trial in trials] == rows
    assert [[{path: trial[path]} for trial in trials] for path in "abc"] == columns
    assert zip_(columns[0]) == columns[0]


def test_generators_are_sweeps_and_results_are_copies() -> None:
    def trials() -> Any:
        yield {"a": 1}
        yield {"a": 2}

    listed = list(trials())
    others = seeds(3)
    assert product(trials(), iter(others)) == product(listed, others)
    assert chain(trials(), trials()) == listed + listed
    assert zip_(trials(), seeds(2)) == [{"a": 1, "seed": 0}, {"a": 2, "seed": 1}]
    assert successive_halving(trials(), (1, 2)).trials == tuple(listed)
    for combine in (chain, product, zip_, lambda sweep: successive_halving(sweep, (1,)).trials):
        combine(listed)[0]["a"] = 7
        assert listed == [{"a": 1}, {"a": 2}]


def test_values_and_seeds() -> None:
    assert values("model.mixers", ("attention",), ["attention"]) == [
        {"model.mixers": ("attention",)},
        {"model.mixers": ["attention"]},
    ]
    assert values("model.d_ff", None, 64) == [{"model.d_ff": None}, {"model.d_ff": 64}]
    assert seeds(3) == [{"seed": 0}, {"seed": 1}, {"seed": 2}]
    assert seeds(2, first=5) == [{"seed": 5}, {"seed": 6}]


def test_numpy_scalars_become_python_numbers() -> None:
    trials = chain(
        values("a", *np.logspace(-4, -2, 3)),
        values("a", *np.arange(2)),
        values("a", np.float32(0.5), np.bool_(True)),
        seeds(np.int64(1)),
        sample(1, {"a": choice(np.int32(3)), "b": uniform(np.float32(0), np.int64(1))}),
    )
    assert {type(value) for trial in trials for value in trial.values()} == {float, int, bool}
    json.dumps(trials)


# Distributions.


@pytest.mark.parametrize("name", RANGES)
@given(data=st.data())
def test_quantiles_are_monotone_and_in_range(name: str, data: st.DataObject) -> None:
    distribution = data.draw(RANGES[name])
    lower, upper = sorted((data.draw(U), data.draw(U)))
    kind = int if "integers" in name else float
    found = [distribution.quantile(u) for u in (0.0, lower, upper, math.nextafter(1, 0))]
    assert found == sorted(found)
    assert {type(value) for value in found} == {kind}
    assert distribution.low <= found[0]
    assert found[-1] <= distribution.high


@settings(max_examples=20)
@given(st.integers(1, 40), st.integers(1, 40))
def test_integers_have_the_right_probabilities(low: int, more: int) -> None:
    high = low + more
    grid = (np.arange(2000) + 0.5) / 2000
    whole = np.arange(low, high + 1)
    for distribution, edges in ((integers, whole - 0.5), (log_integers, np.log(whole - 0.5))):
        top = high + 0.5 if distribution is integers else math.log(high + 0.5)
        chances = np.diff([*edges, top]) / (top - edges[0])
        found = [distribution(low, high).quantile(u) for u in grid.tolist()]
        counts = np.array([found.count(value) for value in whole])
        np.testing.assert_allclose(counts / len(grid), chances, atol=1.01 / len(grid))


@pytest.mark.parametrize(("low", "high"), [(-3, 5), (0.9, 0.999), (1e-9, 2e-9), (-2e6, 7e6)])
def test_uniform_quantiles_match_scipy_up_to_rounding(low: float, high: float) -> None:
    grid = np.linspace(0, 1, 1000, endpoint=False)
    found = [uniform(low, high).quantile(u) for u in grid.tolist()]
    np.testing.assert_allclose(found, stats.uniform(low, high - low).ppf(grid), rtol=0, atol=0.6e-4 * (high - low))
    assert len(set(found)) > 990


@pytest.mark.parametrize(("low", "high"), [(1e-5, 1e-1), (1, 1.001), (3e4, 8e7), (0.9, 0.999)])
def test_log_uniform_quantiles_match_scipy_up_to_rounding(low: float, high: float) -> None:
    grid = np.linspace(0, 1, 1000, endpoint=False)
    found = [log_uniform(low, high).quantile(u) for u in grid.tolist()]
    np.testing.assert_allclose(found, stats.loguniform(low, high).ppf(grid), rtol=0.6e-3 * min(1, (high - low) / low))
    assert len(set(found)) > 990


def test_sampled_numbers_are_short() -> None:
    trials = sample(200, {"a": log_uniform(1e-5, 1e-1), "b": uniform(0, 1), "c": uniform(0.9, 0.999)})
    longest = {path: max(len(f"{trial[path]!r}") for trial in trials) for path in "abc"}
    assert longest["a"] <= len("0.0001234")
    assert longest["b"] <= len("0.12345")
    assert longest["c"] <= len("0.9123456")


@given(st.lists(st.integers(), min_size=1, max_size=30))
def test_options_are_equally_likely(options: list[int]) -> None:
    n = len(options)
    found = [choice(*options).quantile((place + 0.5) / (7 * n)) for place in range(7 * n)]
    assert found == [option for option in options for _ in range(7)]
    assert choice(*options).quantile(math.nextafter(1, 0)) == options[-1]


# Points of a space.

SPACE = {
    "optimizer.learning_rate": log_uniform(1e-4, 1e-1),
    "optimizer.b2": uniform(0.9, 0.999),
    "schedule.warmup_steps": integers(0, 100),
    "training.steps": log_integers(10, 1000),
    "schedule.name": choice("cosine", "wsd", "linear"),
}
Draw = Callable[..., list[Overrides]]


@pytest.mark.parametrize("draw", [sample, sobol])
def test_points_are_reproducible_and_a_prefix_of_more_points(draw: Draw) -> None:
    whole = draw(40, SPACE, seed=3)
    assert draw(40, SPACE, seed=3) == whole
    assert [draw(n, SPACE, seed=3) for n in range(1, 41)] == [whole[:n] for n in range(1, 41)]
    assert draw(40, SPACE, seed=4) != whole
    assert [list(point) for point in whole] == [list(SPACE)] * 40
    json.dumps(whole)


def test_random_points_are_the_same_on_all_machines() -> None:
    assert sample(2, {"a": uniform(0, 1), "b": integers(1, 100)}, seed=7) == [
        {"a": 0.6182, "b": 56},
        {"a": 0.9217, "b": 3},
    ]


def test_random_values_of_a_knob_do_not_depend_on_other_knobs() -> None:
    whole = sample(20, SPACE)
    for path, distribution in SPACE.items():
        assert sample(20, {path: distribution}) == [{path: point[path]} for point in whole]


@pytest.mark.parametrize("exponent", range(1, 7))
def test_sobol_points_put_one_into_each_interval_of_every_knob(exponent: int) -> None:
    n = 2**exponent
    trials = sobol(n, {name: integers(0, n - 1) for name in "abcdefgh"}, seed=exponent)
    for name in "abcdefgh":
        assert sorted(trial[name] for trial in trials) == list(range(n))


# Searches.


def test_searches_are_plain_data() -> None:
    halving = successive_halving(seeds(9), [10, 30], keep=0.5)
    assert (halving.trials, halving.rungs, halving.keep) == (tuple(seeds(9)), (10, 30), 0.5)
    assert successive_halving(seeds(9), (10,)).keep == 1 / 3
    search = tpe(20, SPACE, batch=4, seed=1, seeds=[0, 1])
    assert dict(search.space) == SPACE
    assert (search.n_trials, search.batch, search.seed, search.seeds) == (20, 4, 1, (0, 1))
    assert (tpe(20, SPACE).batch, tpe(20, SPACE).seed, tpe(20, SPACE).seeds) == (8, 0, ())
    assert hash(search) == hash(dataclasses.replace(search))
    for spec in (halving, search):
        json.dumps(dataclasses.asdict(spec))
        with pytest.raises(dataclasses.FrozenInstanceError):
            spec.keep = 0.1  # type: ignore


# Mistakes.

LEFT, RIGHT = values("optimizer.b2", 0.9, 0.99), chain(seeds(1), [{"seed": 1, "optimizer.b2": 0.9}])

MISTAKES: dict[str, tuple[Callable[[], Any], str]] = {
    "no path": (lambda: values(1e-3, 1e-4), "the first argument is the path of a knob"),  # type: ignore
    "no values": (lambda: values("seed"), "values('seed'): no values to try"),
    "an array as one value": (lambda: values("seed", np.arange(3)), "is a ndarray; write * before it"),
    "a range as one value": (lambda: values("seed", range(3)), "is a range; write * before it"),
    "a generator as one option": (lambda: choice(i for i in range(3)), "is a generator; write * before it"),
    "no seeds": (lambda: seeds(0), "seeds: n must be an integer >= 1, got 0"),
    "half a seed": (lambda: seeds(1.5), "got 1.5"),  # type: ignore
    "True seeds": (lambda: seeds(True), "got True"),
    "negative seed": (lambda: seeds(1, first=-1), "seeds: first must be an integer >= 0, got -1"),
    "product: a knob twice": (lambda: product(LEFT, RIGHT), "product: 'optimizer.b2' is set by two"),
    "zipped: a knob twice": (lambda: zip_(LEFT, RIGHT), "zip_: 'optimizer.b2' is set by two"),
    "zipped: lengths": (lambda: zip_(seeds(2), LEFT, values("c", 1, 2, 3)), "different lengths: 2, 2, 3"),
    "one trial for a sweep": (lambda: product(LEFT, {"seed": 1}), "product: argument 2 is not a sweep"),  # type: ignore
    "a list of paths": (lambda: chain(["seed"]), "chain: argument 1 is not a sweep"),  # type: ignore
    "a number for a sweep": (lambda: zip_(3), "zip_: argument 1 is not a sweep"),  # type: ignore
    "a search in a product": (lambda: product(tpe(1, SPACE)), "argument 1 is not a sweep"),  # type: ignore
    "low above high": (lambda: uniform(2, 1), "uniform: low=2 must be below high=1"),
    "low is high": (lambda: integers(2, 2), "integers: low=2 must be below high=2"),
    "infinite": (lambda: uniform(0, math.inf), "both finite"),
    "too wide": (lambda: uniform(-1.7e308, 1.7e308), "both finite"),
    "not a number": (lambda: log_uniform(math.nan, 1), "both finite"),
    "a word": (lambda: uniform("0", 1), "uniform: low must be a number, got '0'"),  # type: ignore
    "not whole": (lambda: integers(0, 1.5), "integers: high must be an integer, got 1.5"),  # type: ignore
    "log of 0": (lambda: log_uniform(0, 1), "log_uniform: low=0 must be above 0"),
    "log of -1": (lambda: log_integers(-1, 1), "log_integers: low=-1 must be above 0"),
    "log of whole 0": (lambda: log_integers(0, 10), "log_integers: low=0 must be above 0"),
    "no options": (lambda: choice(), "choice: no options"),
    "no points": (lambda: sample(0, SPACE), "sample: n must be an integer >= 1, got 0"),
    "no Sobol points": (lambda: sobol(-1, SPACE), "sobol: n must be an integer >= 1, got -1"),
    "no knobs": (lambda: sobol(4, {}), "sobol: a space maps knobs to distributions"),
    "negative sample seed": (lambda: sample(4, SPACE, seed=-1), "sample: seed must be an integer >= 0"),
    "negative Sobol seed": (lambda: sobol(4, SPACE, seed=-1), "sobol: seed must be an integer >= 0"),
    "a number in a space": (lambda: sample(4, {"seed": 1}), "sample: seed is 1, not a distribution"),  # type: ignore
    "nothing to halve": (lambda: successive_halving([], (1, 2)), "no trials"),
    "no rungs": (lambda: successive_halving(LEFT, ()), "rungs must be ascending steps"),
    "rungs that stay": (lambda: successive_halving(LEFT, (5, 5)), "rungs must be ascending steps, .* got (5, 5)"),
    "a rung at 0": (lambda: successive_halving(LEFT, (0, 5)), "a rung must be an integer >= 1, got 0"),
    "keep none": (lambda: successive_halving(LEFT, (5,), keep=0), "keep must be between 0 and 1"),
    "keep all": (lambda: successive_halving(LEFT, (5,), keep=1), "such as 1/3, got 1"),
    "no search": (lambda: tpe(0, SPACE), "tpe: n_trials must be an integer >= 1"),
    "no batch": (lambda: tpe(4, SPACE, batch=0), "tpe: batch must be an integer >= 1"),
    "search of nothing": (lambda: tpe(4, {}), "tpe: a space maps"),
    "seed twice": (lambda: tpe(4, SPACE, seeds=(1, 1)), "seeds=(1, 1) has duplicates"),
    "seed also in the space": (
        lambda: tpe(4, {"seed": integers(0, 9)}, seeds=(1,)),
        "'seed' is both in the space and given by seeds",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_raise_one_sentence(mistake: str) -> None:
    call, answer = MISTAKES[mistake]
    with pytest.raises(UserError) as error:
        call()
    shown = str(error.value)
    place = 0
    for part in answer.split(".*"):
        assert part in shown[place:]
        place = shown.index(part, place) + len(part)
    assert "\n" not in shown


def test_sweeps_are_listed_without_jax_and_scipy() -> None:
    code = "import sys, rustgpt_jax.sweeps; print([n for n in ('jax', 'flax', 'numpy', 'scipy') if n in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "[]\n"
