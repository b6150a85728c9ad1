"""Ways to report diverged points to a search, compared on problems with known optima (see docs/how_to/sweeps.md)."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from rustgpt_jax.sweeps import TPE, log_uniform, tpe
from rustgpt_jax.sweeps.search import suggest

# Of `constraints_func`, which is experimental in one version of Optuna and deprecated in another.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*constraints_func.*"),
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),
]

DOCS = Path(__file__).parent.parent / "docs" / "how_to" / "sweeps.md"
N_POINTS, BATCH = 60, 4
optuna.logging.set_verbosity(optuna.logging.WARNING)

Point = Mapping[str, float]
Loss = Callable[[Point], float]


# Losses that are 0 at their best point and infinite where training would diverge.


def one_knob(point: Point) -> float:
    """A learning rate that diverges above 10^-1.5, in a space up to 10^3."""
    rate = math.log10(point["rate"])
    return math.inf if rate > -1.5 else (rate + 2.5) ** 2


def two_knobs(point: Point) -> float:
    """A learning rate and a decay that diverge together, where one may be high if the other is low."""
    rate, decay = math.log10(point["rate"]), math.log10(point["decay"])
    return math.inf if rate + 0.5 * decay > -2 else (rate + 2.2) ** 2 + 0.3 * (decay + 1) ** 2


def three_knobs(point: Point) -> float:
    """Two knobs that must be low, and one that hardly matters: four points in five diverge."""
    first, second, third = (math.log10(point[name]) for name in ("first", "second", "third"))
    is_fine = first <= -2 and second <= -1.5
    return (first + 2.5) ** 2 + (second + 3) ** 2 + 0.1 * (third + 1) ** 2 if is_fine else math.inf


WIDE = log_uniform(1e-5, 1e3)
PROBLEMS: dict[str, tuple[Loss, dict[str, Any]]] = {
    "one field": (one_knob, {"rate": WIDE}),
    "two fields": (two_knobs, {"rate": log_uniform(1e-5, 10), "decay": log_uniform(1e-3, 10)}),
    "three fields": (three_knobs, {"first": WIDE, "second": WIDE, "third": WIDE}),
}


# How a diverged point is reported to the sampler, given the worst finite loss so far.


def constrained(search: TPE, trials: Sequence[FrozenTrial], number: int) -> Any:
    """Return a suggestion of the same sampler with a constraint."""
    sampler = optuna.samplers.TPESampler(
        seed=search.seed + number, constant_liar=True, n_startup_trials=10, constraints_func=lambda trial: ()
    )
    study = optuna.create_study(sampler=sampler)
    study.add_trials(trials)
    space = {path: optuna.distributions.FloatDistribution(each.low, each.high, log=True) for path, each in search.space}
    return study.ask(space)


Strategy = tuple[Callable[..., Any], Callable[[float], dict[str, Any]]]
STRATEGIES: dict[str, Strategy] = {
    "failed": (suggest, lambda worst: {"state": TrialState.FAIL}),
    "pruned": (suggest, lambda worst: {"state": TrialState.PRUNED}),
    "a loss above the worst": (suggest, lambda worst: {"value": worst + 1}),
    "a violated constraint": (constrained, lambda worst: {"value": worst, "system_attrs": {"constraints": [1.0]}}),
}


def asked(problem: str, strategy: str, seed: int, n_points: int = N_POINTS) -> list[tuple[Point, float]]:
    """Return the suggested points of a search and their losses."""
    (loss, space), (suggest_next, of_diverged) = PROBLEMS[problem], STRATEGIES[strategy]
    search = tpe(n_points, space, batch=BATCH, seed=1000 * seed)
    found: list[tuple[Any, float | None]] = []
    while len(found) < n_points:
        for _ in range(BATCH):
            worst = max((loss for _, loss in found if loss is not None and math.isfinite(loss)), default=0.0)
            trials = [_told(asked, loss, of_diverged(worst)) for asked, loss in found]
            found.append((suggest_next(search, trials, len(found)), None))
        found = [(asked, loss(asked.params)) for asked, _ in found]
    return [(asked.params, loss) for asked, loss in found if loss is not None]


def _told(asked: Any, loss: float | None, of_diverged: dict[str, Any]) -> FrozenTrial:
    point = {"params": asked.params, "distributions": asked.distributions}
    if loss is None:
        return create_trial(**point, state=TrialState.RUNNING)
    if math.isfinite(loss):
        return create_trial(**point, value=loss, system_attrs={"constraints": [-1.0]})
    return create_trial(**point, **of_diverged)


def test_search_learns_to_avoid_diverging_points() -> None:
    runs = {strategy: [asked("one field", strategy, seed, 40) for seed in range(2)] for strategy in STRATEGIES}
    diverged = {
        strategy: sum(math.isinf(loss) for run in found for _, loss in run[20:]) for strategy, found in runs.items()
    }
    assert diverged["pruned"] < 15 < 25 < diverged["failed"]
    # The sampler compares trials by rank, so all of these are equivalent.
    assert runs["pruned"] == runs["a loss above the worst"] == runs["a violated constraint"]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("problem", PROBLEMS)
def test_comparison_in_the_docs_is_reproduced(problem: str) -> None:
    """`python -m pytest -n 0 -m long -s tests/test_search_strategies.py` prints the table of docs/how_to/sweeps.md."""
    for strategy in STRATEGIES:
        runs = [asked(problem, strategy, seed) for seed in range(8)]
        diverged = np.mean([sum(math.isinf(loss) for _, loss in run[-30:]) for run in runs])
        best = [min(loss for _, loss in run) for run in runs]
        row = f"| {problem} | {strategy} | {diverged:.1f} | {np.median(best):.4f} | {max(best):.4f} |"
        print(row)
        pattern = re.escape(f"| {problem} | {strategy} |") + r" ([\d.]+) \| ([\d.]+) \| [\d.]+ \|"
        (written,) = re.findall(pattern, DOCS.read_text(encoding="utf-8"))
        # Other versions of Optuna suggest other points.
        assert diverged == pytest.approx(float(written[0]), abs=4)
        assert float(written[1]) / 4 < np.median(best) < 4 * float(written[1]) + 1e-3
