"""Which setting of a sweep is best, and whether the others are shown to be worse."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from rustgpt_jax.sweeps.report.labels import loss_text, p_text, setting_text
from rustgpt_jax.sweeps.report.results import SEED, Results, Setting, TrialResult, is_number, key_of, settings
from rustgpt_jax.sweeps.report.stats import (
    FALSE_CLAIMS,
    Comparison,
    Interval,
    Shares,
    compare_with_best,
    decompose,
    mean_interval,
)

# Losses further above the best one than so many times the median are not told apart, or they would squeeze the rest.
IN_VIEW = 3.0
# A best setting of more knobs than this is not named in every sentence.
MOST_KNOBS_NAMED = 2


@dataclass(frozen=True)
class Ranked:
    """A setting with its mean loss over seeds, and its difference from the best setting over shared seeds.

    The comparison is None for the best setting, and if fewer than two seeds are shared. Its p-value and interval
    account for the number of comparisons and the selection of the best setting (see `compare_with_best`).
    """

    setting: Setting
    interval: Interval
    comparison: Comparison | None

    @property
    def is_shown_worse(self) -> bool:
        """Whether the setting is significantly worse than the best one."""
        found = self.comparison
        return found is not None and found.p_value < FALSE_CLAIMS and found.difference > 0


def ranking(results: Results) -> tuple[Ranked, ...]:
    """The settings with a finished trial by their mean loss, but after all others those of which a trial diverged.

    The mean over the seeds that survived says too much good of a setting that diverges for others.
    """
    ordered = sorted(
        (setting for setting in settings(results) if setting.losses),
        key=lambda setting: (setting.n_diverged > 0, setting.mean_loss),
    )
    n_candidates = sum(setting.n_diverged == 0 for setting in ordered) or len(ordered)
    compared = compare_with_best([setting.losses for setting in ordered], n_candidates)
    return tuple(
        Ranked(setting, mean_interval(list(setting.losses.values())), comparison)
        for setting, comparison in zip(ordered, [None, *compared], strict=True)
    )


def comparison_text(best: Ranked, other: Ranked) -> str:
    """What the trials show of the best setting against another one, named by what differs, in a sentence."""
    it = setting_text(best.setting.knobs) if len(best.setting.knobs) <= MOST_KNOBS_NAMED else "the best setting"
    unlike = _unlike(other.setting, best.setting)
    that = f"{'' if len(unlike) == len(best.setting.knobs) else 'the same with '}{setting_text(unlike)}"
    comparison = other.comparison
    if comparison is None:
        difference = other.interval.mean - best.interval.mean
        seeds = "one seed" if best.interval.n == other.interval.n == 1 else "fewer than two shared seeds"
        return _sentence(f"{it} and {that} differ by {loss_text(difference)}; no p-value: {seeds}.")
    interval = "no interval: all seeds differ alike"
    if math.isfinite(comparison.low):
        interval = f"95% CI {loss_text(comparison.low)} to {loss_text(comparison.high)}"
    evidence = f"{interval}, {p_text(comparison.p_value)}, {comparison.n_pairs} paired seeds"
    if other.is_shown_worse:
        return _sentence(f"{it} is better than {that} by {loss_text(comparison.difference)} ({evidence}).")
    return f"No difference shown between {it} and {that}: {loss_text(comparison.difference)} ({evidence})."


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _unlike(setting: Setting, best: Setting) -> dict[str, Any]:
    return {path: value for path, value in setting.knobs.items() if key_of(value) != key_of(best.knobs[path])}


def variance_shares(results: Results) -> Shares:
    """Return the shares of the swept knobs, their interactions and noise in the variance of the final loss."""
    losses = tuple(loss(trial) for trial in results.finished)
    # A seed is a label, not a number.
    columns = tuple(
        tuple(
            value if is_number(value) and path != SEED else key_of(value)
            for value in (trial.knobs[path] for trial in results.finished)
        )
        for path in results.swept
    )
    return _variance_shares(results.swept, columns, losses)


@lru_cache(maxsize=8)
def _variance_shares(paths: tuple[str, ...], columns: tuple[tuple[Any, ...], ...], losses: tuple[float, ...]) -> Shares:
    return decompose(dict(zip(paths, columns, strict=True)), losses, without_interactions=[SEED])


def knob_shares(results: Results) -> dict[str, float]:
    """The share of the variance of the final losses that each swept knob explains, most important first.

    A knob of which the trials cannot tell is left out.
    """
    told = {path: share for path, share in variance_shares(results).knobs.items() if math.isfinite(share)}
    return dict(sorted(told.items(), key=lambda item: -item[1]))


def most_important(results: Results, *but: str) -> str | None:
    """The knob, other than the seed and some others, that explains most; the first if the trials cannot tell."""
    candidates = [path for path in results.knobs if path not in but]
    shares = knob_shares(results)
    return max(candidates, key=lambda path: shares.get(path, -1.0), default=None)


def losses_in_view(results: Results) -> tuple[float, float]:
    """The best final loss, and that from which on pictures show all alike."""
    losses = sorted(loss(trial) for trial in results.finished)
    best, middle = losses[0], losses[len(losses) // 2]
    return best, min(losses[-1], best + IN_VIEW * (middle - best)) if middle > best else losses[-1]


def loss(trial: TrialResult) -> float:
    """The final loss of a trial, nan where it has none."""
    return math.nan if trial.final_loss is None else trial.final_loss
