"""Ranking and comparison of a sweep's settings, with notes on how to interpret them."""

import math
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from rustgpt_jax.config.validation import is_number
from rustgpt_jax.sweeps.report.results import (
    BITS_PER_BYTE,
    DIVERGED,
    FAILED,
    METRICS,
    MISSING,
    PRUNED,
    SEED,
    TRAIN_LOSS,
    Results,
    Setting,
    TrialResult,
    describe_setting,
    format_loss,
    format_p_value,
    format_value,
    get_knob_names,
    group_by_setting,
    to_key,
)
from rustgpt_jax.sweeps.report.stats import (
    FALSE_CLAIMS,
    Comparison,
    Interval,
    VarianceDecomposition,
    compare_with_best,
    compute_lr_sensitivity,
    compute_mean_interval,
    decompose_variance,
)

# Figures clip losses further above the best one than this many times the distance of the median.
VISIBLE_RANGE = 3.0
# Sentences name the best setting by its knobs if it has at most this many, else as "the best setting".
MAX_KNOBS_NAMED = 2
MAX_COMPARISONS, MAX_ERRORS = 8, 12
# Minimum number of values of a knob for notes on its range, and of learning rates for their sensitivity.
MIN_VALUES = 3
# Minimum number of seeds for a band in figures: a t interval of two seeds would hide everything else.
MIN_SEEDS = 3
# Minimum number of trials for shares of variance.
MIN_TRIALS = 6


@dataclass(frozen=True)
class RankedSetting:
    """A setting with its mean loss over seeds, and its difference from the best setting over shared seeds.

    The comparison is None for the best setting, and if fewer than two seeds are shared. Its p-value and interval
    account for the number of comparisons and the selection of the best setting (see `compare_with_best`).
    """

    setting: Setting
    interval: Interval
    comparison: Comparison | None

    @property
    def is_significantly_worse(self) -> bool:
        """True if the setting is significantly worse than the best one."""
        found = self.comparison
        return found is not None and found.p_value < FALSE_CLAIMS and found.difference > 0


def rank_settings(results: Results) -> tuple[RankedSetting, ...]:
    """Order the settings with a finished trial by their mean loss; those with a diverged trial come last.

    The mean over the remaining seeds would flatter a setting that diverges for others.
    """
    ordered = sorted(
        (setting for setting in group_by_setting(results) if setting.losses),
        key=lambda setting: (setting.n_diverged > 0, setting.mean_loss),
    )
    n_candidates = sum(setting.n_diverged == 0 for setting in ordered) or len(ordered)
    compared = compare_with_best([setting.losses for setting in ordered], n_candidates)
    return tuple(
        RankedSetting(setting, compute_mean_interval(list(setting.losses.values())), comparison)
        for setting, comparison in zip(ordered, [None, *compared], strict=True)
    )


def compute_variance_shares(results: Results) -> VarianceDecomposition:
    """Decompose the variance of the final loss into swept knobs, their interactions, and noise."""

    def encode(path: str, value: Any) -> Any:
        # A seed is a label, not a number.
        return value if is_number(value) and path != SEED else to_key(value)

    columns = tuple(tuple(encode(path, trial.knobs[path]) for trial in results.finished) for path in results.swept)
    return _decompose(results.swept, columns, tuple(map(_final_loss, results.finished)))


@lru_cache(maxsize=8)
def _decompose(
    paths: tuple[str, ...], columns: tuple[tuple[Any, ...], ...], losses: tuple[float, ...]
) -> VarianceDecomposition:
    return decompose_variance(dict(zip(paths, columns, strict=True)), losses, without_interactions=[SEED])


def compute_knob_shares(results: Results) -> dict[str, float]:
    """Return the fraction of variance that each swept knob explains, largest first, without unknown ones."""
    known = {path: share for path, share in compute_variance_shares(results).knobs.items() if math.isfinite(share)}
    return dict(sorted(known.items(), key=lambda item: -item[1]))


def compute_interaction_shares(results: Results) -> dict[tuple[str, str], float]:
    """Return the fraction of variance that each pair of knobs explains only jointly, largest first."""
    if len(results.finished) < MIN_TRIALS:
        return {}
    return dict(sorted(compute_variance_shares(results).pairs.items(), key=lambda item: -item[1]))


def find_most_important(results: Results, *excluded: str) -> str | None:
    """Return the knob that explains most of the variance, without the seed and excluded ones; the first if unknown."""
    candidates = [path for path in results.knobs if path not in excluded]
    shares = compute_knob_shares(results)
    return max(candidates, key=lambda path: shares.get(path, -1.0), default=None)


def find_visible_range(results: Results) -> tuple[float, float]:
    """Return the best final loss, and the loss above which figures are clipped."""
    losses = sorted(_final_loss(trial) for trial in results.finished)
    best, middle = losses[0], losses[len(losses) // 2]
    return best, min(losses[-1], best + VISIBLE_RANGE * (middle - best)) if middle > best else losses[-1]


def _final_loss(trial: TrialResult) -> float:
    return math.nan if trial.final_loss is None else trial.final_loss


@dataclass(frozen=True)
class Sensitivity:
    """The learning-rate sensitivity of one setting of the other knobs: for each seed, and their mean."""

    knobs: dict[str, Any]
    by_seed: tuple[float, ...]
    interval: Interval


def find_learning_rate(results: Results) -> str | None:
    """Return the first learning rate among the knobs that has enough numeric values for a sensitivity."""
    for path in results.knobs:
        values = {to_key(trial.knobs[path]) for trial in results.trials}
        is_numeric = all(is_number(trial.knobs[path]) for trial in results.trials)
        if path.endswith("learning_rate") and is_numeric and len(values) >= MIN_VALUES:
            return path
    return None


def compute_sensitivities(results: Results) -> list[Sensitivity]:
    """Compute the learning-rate sensitivity (arXiv 2309.14322) of each setting of the other knobs, lowest first.

    A seed counts if every learning rate finished or diverged for it.
    """
    path = find_learning_rate(results)
    # The loss at initialization is in nats per token.
    if path is None or results.metric == BITS_PER_BYTE:
        return []
    rates = {trial.knobs[path] for trial in results.trials}
    groups: dict[str, list[TrialResult]] = defaultdict(list)
    for trial in results.trials:
        groups[to_key([trial.knobs[other] for other in results.knobs if other != path])].append(trial)
    found = []
    for group in groups.values():
        by_seed = [
            _compute_sensitivity(group, seed, path, rates) for seed in dict.fromkeys(trial.seed for trial in group)
        ]
        values = [value for value in by_seed if math.isfinite(value)]
        if values:
            knobs = {other: group[0].knobs[other] for other in results.knobs if other != path}
            found.append(Sensitivity(knobs, tuple(values), compute_mean_interval(values)))
    return sorted(found, key=lambda sensitivity: sensitivity.interval.mean)


def _compute_sensitivity(trials: list[TrialResult], seed: Any, path: str, rates: set[float]) -> float:
    """Return the sensitivity of a seed, or NaN if a rate neither finished nor diverged."""
    rated = [
        trial for trial in trials if trial.seed == seed and (trial.final_loss is not None or trial.status == DIVERGED)
    ]
    losses = {trial.knobs[path]: math.inf if trial.final_loss is None else trial.final_loss for trial in rated}
    initial = [trial.initial_loss for trial in rated if trial.initial_loss is not None]
    if set(losses) != rates or not initial:
        return math.nan
    return compute_lr_sensitivity(losses, sum(initial) / len(initial))


def describe_comparison(best: RankedSetting, other: RankedSetting) -> str:
    """Return a sentence that compares the best setting with another, which is described by its differing knobs."""
    it = describe_setting(best.setting.knobs) if len(best.setting.knobs) <= MAX_KNOBS_NAMED else "the best setting"
    knobs = other.setting.knobs
    changed = {path: value for path, value in knobs.items() if to_key(value) != to_key(best.setting.knobs[path])}
    that = f"{'' if len(changed) == len(knobs) else 'the same with '}{describe_setting(changed)}"
    comparison = other.comparison
    if comparison is None:
        difference = other.interval.mean - best.interval.mean
        seeds = "one seed" if best.interval.n == other.interval.n == 1 else "fewer than two shared seeds"
        sentence = f"{it} and {that} differ by {format_loss(difference)}; no p-value: {seeds}."
        return sentence[0].upper() + sentence[1:]
    interval = "no interval: all seeds differ equally"
    if math.isfinite(comparison.low):
        interval = f"95% CI {format_loss(comparison.low)} to {format_loss(comparison.high)}"
    evidence = f"{interval}, {format_p_value(comparison.p_value)}, {comparison.n_pairs} paired seeds"
    if other.is_significantly_worse:
        sentence = f"{it} is better than {that} by {format_loss(comparison.difference)} ({evidence})."
        return sentence[0].upper() + sentence[1:]
    return f"No significant difference between {it} and {that}: {format_loss(comparison.difference)} ({evidence})."


def describe_interval(interval: Interval) -> str:
    """Describe the confidence interval of a mean over seeds."""
    seeds = "1 seed" if interval.n == 1 else f"{interval.n} seeds"
    if not math.isfinite(interval.low):
        return f"{seeds}, no interval"
    return f"95% CI {format_loss(interval.low)} to {format_loss(interval.high)}, {seeds}"


def describe_comparisons(results: Results, ranked: tuple[RankedSetting, ...]) -> list[str]:
    """Describe how the best setting compares with the best of other categories and with the next in rank."""
    rivals = _find_best_of_categories(results, ranked)
    chosen = (rivals + [row for row in ranked[1:] if row not in rivals])[:MAX_COMPARISONS]
    sentences = [describe_comparison(ranked[0], row) for row in sorted(chosen, key=ranked.index)]
    n_tests = sum(row.comparison is not None for row in ranked)
    if n_tests:
        metric = METRICS[results.metric]
        at_once = f"hold for all {n_tests} comparisons at once and " if n_tests > 1 else ""
        sentences.append(
            f"These are differences of the {metric.name} in {metric.unit}, paired by seed. The p-values and the 95% "
            f"intervals {at_once}account for selecting the best setting on the "
            'same losses: if all settings were equal, the probability of any "better than" would be at most 5%, for '
            "normal losses (docs/concepts/statistics.md)."
        )
    return sentences


def _find_best_of_categories(results: Results, ranked: tuple[RankedSetting, ...]) -> list[RankedSetting]:
    """Return the best setting for each value of a non-numeric knob, except for the best setting's own values."""
    found = []
    for path in results.knobs:
        if all(is_number(trial.knobs[path]) for trial in results.trials):
            continue
        seen = {to_key(ranked[0].setting.knobs[path])}
        for row in ranked[1:]:
            value = to_key(row.setting.knobs[path])
            if value not in seen:
                seen.add(value)
                found.append(row)
    return found


def list_notes(results: Results, ranked: tuple[RankedSetting, ...]) -> list[str]:
    """List what a reader must know to interpret the losses, and the errors of failed trials."""
    counts = results.counts
    notes = ["Only finished trials are compared, by the last evaluation: ranks change while the learning rate decays."]
    if len(ranked) > 1:
        notes.append(
            "The best setting is selected on the losses that are shown, so its own mean and interval are slightly "
            "optimistic; new seeds would show by how much."
        )
    if results.metric == TRAIN_LOSS:
        notes.append(
            "There is no validation data, so the training loss of the last step is compared, which is the loss of one "
            "batch and depends on the tokenizer."
        )
    if counts.get(DIVERGED):
        notes.append(
            "Diverged trials, whose loss became infinite or NaN, have no final loss. A setting with a diverged trial "
            "is ranked after all others, because the mean over its other seeds would flatter it."
        )
    if counts.get(PRUNED):
        notes.append("Pruned trials were stopped early; their curves are shown, but they are not ranked.")
    failed = [trial for trial in results.trials if trial.status == FAILED]
    errors = [f"Failed: trial {trial.id} ({describe_setting(trial.knobs)}): {trial.error}" for trial in failed]
    more = [f"{len(failed) - MAX_ERRORS} more trials failed."] if len(failed) > MAX_ERRORS else []
    notes += list_omitted(results) + _list_range_notes(results, ranked[0]) + _list_sensitivity_notes(results)
    return notes + errors[:MAX_ERRORS] + more


def list_omitted(results: Results) -> list[str]:
    """List the trials that are not compared because they are missing or no longer part of the sweep."""
    notes = []
    if results.removed:
        trials = "1 trial is" if len(results.removed) == 1 else f"{len(results.removed)} trials are"
        notes.append(f"{trials} no longer defined by the sweep's file and omitted here; see removed.csv.")
    missing = [trial for trial in results.trials if trial.status == MISSING]
    notes += [f"Missing: trial {trial.id}: {trial.error}" for trial in missing[:MAX_ERRORS]]
    if missing:
        notes.append("The sweep's command reruns trials whose folders were deleted.")
    if results.n_damaged:
        lines = "1 damaged line" if results.n_damaged == 1 else f"{results.n_damaged} damaged lines"
        notes.append(f"Skipped {lines} of ledger.jsonl.")
    return notes


def _list_range_notes(results: Results, best: RankedSetting) -> list[str]:
    """Return notes on knobs whose best value is the smallest or largest one that was tried."""
    notes = []
    for path in results.knobs:
        values = {trial.knobs[path] for trial in results.trials if is_number(trial.knobs[path])}
        value = best.setting.knobs[path]
        if len(values) >= MIN_VALUES and value in (min(values), max(values)):
            name, end = get_knob_names(results.swept)[path], "smallest" if value == min(values) else "largest"
            notes.append(
                f"The best {name}, {format_value(value)}, is the {end} one tried; a better one may be beyond it."
            )
    return notes


def _list_sensitivity_notes(results: Results) -> list[str]:
    path, found = find_learning_rate(results), compute_sensitivities(results)
    if path is None or len(found) != 1:
        return []
    name, interval = get_knob_names(results.swept)[path], found[0].interval
    return [
        f"The sensitivity to the {name} (arXiv 2309.14322), the mean over its values of the loss minus the best loss, "
        f"is {format_loss(interval.mean)} {METRICS[results.metric].unit} ({describe_interval(interval)})."
    ]
