"""What the trials of a sweep show, what they do not, and how both were found out, in sentences."""

import math

from rustgpt_jax.sweeps.report.labels import METRICS, knob_names, loss_text, setting_text, value_text
from rustgpt_jax.sweeps.report.lr_sensitivity import sensitivities, swept_learning_rate
from rustgpt_jax.sweeps.report.ranking import Ranked, comparison_text
from rustgpt_jax.sweeps.report.results import DIVERGED, FAILED, MISSING, PRUNED, TRAIN_LOSS, Results, is_number, key_of
from rustgpt_jax.sweeps.report.stats import Interval

MOST_COMPARISONS = 8
MOST_ERRORS = 12
# A best value at the end of fewer values than this says little of what lies beyond.
LEAST_VALUES = 3


def interval_text(interval: Interval) -> str:
    """The interval of a mean over seeds in words."""
    seeds = "1 seed" if interval.n == 1 else f"{interval.n} seeds"
    if not math.isfinite(interval.low):
        return f"{seeds}, no interval"
    return f"95% CI {loss_text(interval.low)} to {loss_text(interval.high)}, {seeds}"


def comparisons(results: Results, ranked: tuple[Ranked, ...]) -> list[str]:
    """The best setting against others, in sentences: the best of each other value of the knobs that are no numbers
    first, then the next ones by rank."""
    rivals = _rivals(results, ranked)
    chosen = (rivals + [row for row in ranked[1:] if row not in rivals])[:MOST_COMPARISONS]
    sentences = [comparison_text(ranked[0], row) for row in sorted(chosen, key=ranked.index)]
    n_tests = sum(row.comparison is not None for row in ranked)
    if n_tests:
        metric = METRICS[results.metric]
        sentences.append(
            f"These are differences of the {metric.name} in {metric.unit}, paired by seed. The p-values and the 95% "
            f"intervals hold for all {n_tests} comparisons at once and account for the choice of the best setting by "
            'the same losses: were all settings alike, the chance of any "better than" would be at most 5%, if losses '
            "are normal (docs/statistics.md)."
        )
    return sentences


def notes(results: Results, ranked: tuple[Ranked, ...]) -> list[str]:
    """What a reader must know to read the losses rightly, and the errors of trials that failed."""
    counts = results.counts
    said = ["Only finished trials are compared, by the last evaluation: ranks change while the learning rate decays."]
    if len(ranked) > 1:
        said.append(
            "The best setting is chosen by the losses that are shown, so its own mean and interval are a little too "
            "good; new seeds would tell by how much."
        )
    if results.metric == TRAIN_LOSS:
        said.append(
            "There was no validation text: what is compared is the training loss of the last step, which is of one "
            "batch, and of one tokenizer's tokens."
        )
    if counts.get(DIVERGED):
        said.append(
            "Diverged trials, whose loss left the finite numbers, have no loss; a setting with one of these is ranked "
            "after all others, since the mean over its other seeds would flatter it."
        )
    if counts.get(PRUNED):
        said.append("Pruned trials were stopped early; their curves are shown, and they are not ranked.")
    return said + left_out(results) + _edges(results, ranked[0]) + _sensitivity(results) + _errors(results)


def left_out(results: Results) -> list[str]:
    """Return notes on trials that are not compared because they are missing or no longer part of the sweep."""
    said = []
    if results.removed:
        trials = "1 trial is" if len(results.removed) == 1 else f"{len(results.removed)} trials are"
        said.append(f"{trials} no longer defined by the sweep's file, and left out here; see removed.csv.")
    missing = [trial for trial in results.trials if trial.status == MISSING]
    said += [f"Missing: trial {trial.id}: {trial.error}" for trial in missing[:MOST_ERRORS]]
    if missing:
        said.append("The sweep's command runs trials again whose folders were deleted.")
    if results.n_damaged:
        lines = "1 line" if results.n_damaged == 1 else f"{results.n_damaged} lines"
        said.append(f"{lines} of ledger.jsonl are damaged and left out.")
    return said


def _edges(results: Results, best: Ranked) -> list[str]:
    """The knobs whose best value is the least or the greatest that was tried."""
    said = []
    for path in results.knobs:
        values = {trial.knobs[path] for trial in results.trials if is_number(trial.knobs[path])}
        value = best.setting.knobs[path]
        if len(values) >= LEAST_VALUES and value in (min(values), max(values)):
            name, edge = knob_names(results.swept)[path], "smallest" if value == min(values) else "largest"
            said.append(
                f"The best {name}, {value_text(value)}, is the {edge} that was tried; beyond it may be a better one."
            )
    return said


def _rivals(results: Results, ranked: tuple[Ranked, ...]) -> list[Ranked]:
    """The best setting with each value, other than the best setting's, of each knob whose values are no numbers."""
    best, found = ranked[0], []
    for path in results.knobs:
        if all(is_number(trial.knobs[path]) for trial in results.trials):
            continue
        seen = {key_of(best.setting.knobs[path])}
        for row in ranked[1:]:
            value = key_of(row.setting.knobs[path])
            if value not in seen:
                seen.add(value)
                found.append(row)
    return found


def _sensitivity(results: Results) -> list[str]:
    path, found = swept_learning_rate(results), sensitivities(results)
    if path is None or len(found) != 1:
        return []
    return [
        f"The sensitivity to the {knob_names(results.swept)[path]} (arXiv 2309.14322), which is the mean, over its "
        f"values, of the loss above the best one, is {loss_text(found[0].interval.mean)} "
        f"{METRICS[results.metric].unit} ({interval_text(found[0].interval)})."
    ]


def _errors(results: Results) -> list[str]:
    failed = [trial for trial in results.trials if trial.status == FAILED]
    lines = [f"Failed: trial {trial.id} ({setting_text(trial.knobs)}): {trial.error}" for trial in failed[:MOST_ERRORS]]
    return lines + ([f"{len(failed) - MOST_ERRORS} more trials failed."] if len(failed) > MOST_ERRORS else [])
