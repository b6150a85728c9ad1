"""How much is lost where the learning rate is not the best one (arXiv 2309.14322)."""

import math
from dataclasses import dataclass
from typing import Any

from rustgpt_jax.sweeps.report.labels import METRICS, knob_names, setting_text
from rustgpt_jax.sweeps.report.results import BITS_PER_BYTE, DIVERGED, Results, TrialResult, key_of
from rustgpt_jax.sweeps.report.stats import Interval, lr_sensitivity, mean_interval
from rustgpt_jax.sweeps.report.svg import (
    BOTTOM,
    RIGHT,
    SMALL_FONT_SIZE,
    WIDE,
    Picture,
    blank,
    css_placeholder,
    name_column,
    panel,
    scale_of,
    show_beyond,
    to_svg,
    write,
)

LEAST_RATES = 3
MOST_ROWS = 24
ROW_HEIGHT = 30.0
LONGEST_NAME = 46


@dataclass(frozen=True)
class Sensitivity:
    """The learning-rate sensitivity of one setting of the other knobs: of each seed, and their mean."""

    knobs: dict[str, Any]
    by_seed: tuple[float, ...]
    interval: Interval


def swept_learning_rate(results: Results) -> str | None:
    """The first knob that is a learning rate and has values enough for a sensitivity."""
    rates = [path for path in results.knobs if path.endswith("learning_rate")]
    scales = {path: scale_of(trial.knobs[path] for trial in results.trials) for path in rates}
    fit = [path for path, scale in scales.items() if scale.is_numeric and len(scale.values) >= LEAST_RATES]
    return fit[0] if fit else None


def sensitivities(results: Results) -> list[Sensitivity]:
    """The sensitivity to the learning rate of each setting of the other knobs, the least sensitive first.

    A seed counts if each of the setting's rates finished or diverged for it, and a setting if it has all the rates.
    """
    path = swept_learning_rate(results)
    # The loss at initialisation is in nats a token.
    if path is None or results.metric == BITS_PER_BYTE:
        return []
    rates = {trial.knobs[path] for trial in results.trials}
    others = [other for other in results.knobs if other != path]
    groups: dict[str, list[TrialResult]] = {}
    for trial in results.trials:
        groups.setdefault(key_of([trial.knobs[other] for other in others]), []).append(trial)
    found = []
    for group in groups.values():
        values = [value for seed in _seeds(group) if math.isfinite(value := _of_seed(group, seed, path, rates))]
        if values:
            knobs = {other: group[0].knobs[other] for other in others}
            found.append(Sensitivity(knobs, tuple(values), mean_interval(values)))
    return sorted(found, key=lambda sensitivity: sensitivity.interval.mean)


def sensitivity_figure(results: Results) -> Picture | None:
    """The learning-rate sensitivity of each setting of the other knobs, if there are at least two."""
    path, rows = swept_learning_rate(results), sensitivities(results)[:MOST_ROWS]
    if path is None or len(rows) < 2:
        return None
    name, unit = knob_names(results.swept)[path], METRICS[results.metric].unit
    height = ROW_HEIGHT * len(rows)
    texts = [_shortened(setting_text(row.knobs)) for row in rows]
    left = name_column(texts)
    figure = blank(WIDE, height + BOTTOM)
    axes = panel(figure, (left, 0, WIDE - left - 4 * RIGHT, height), "", f"sensitivity, {unit}")
    axes.grid(False)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks([])
    end = 1.12 * max(max(row.by_seed) for row in rows) or 1.0
    axes.set_xlim(0, end)
    for place, (row, text) in enumerate(zip(rows, texts, strict=True)):
        interval = row.interval
        axes.axhline(place, color=css_placeholder("grid"), linewidth=1, zorder=0)
        if interval.n > 1:
            axes.plot(
                [max(interval.low, 0), interval.high],
                [place, place],
                color=css_placeholder("hue0"),
                linewidth=5,
                alpha=0.3,
            )
            if interval.high > end:
                show_beyond(axes, (end, place), ">", css_placeholder("hue0"))
            axes.plot(
                row.by_seed, [place] * interval.n, "o", color=css_placeholder("hue0"), markersize=4, alpha=0.6, mew=0
            )
        axes.plot(interval.mean, place, "o", color=css_placeholder("hue0"), markersize=8.5, mew=0)
        share = 1 - (place + 0.5) / len(rows)
        write(axes, text, (0, share), (-12, 0), ha="right", va="center")
        write(axes, f"{interval.mean:.3f}", (1, share), (8, 0), va="center", fontsize=SMALL_FONT_SIZE)
    title = f"Sensitivity to the {name}"
    return Picture(title, _caption(results, path, rows), to_svg(figure, "sensitivity-", title))


def _caption(results: Results, path: str, rows: list[Sensitivity]) -> str:
    seeds = {row.interval.n for row in rows}
    n = f"{min(seeds)} to {max(seeds)}" if len(seeds) > 1 else str(max(seeds))
    rates = len({trial.knobs[path] for trial in results.trials})
    spread = (
        f", with a 95% t interval over seeds (n = {n}; small dots; an arrow where it goes on)" if max(seeds) > 1 else ""
    )
    return (
        f"The mean, over the {rates} values of the {knob_names(results.swept)[path]}, of how far the final loss lies "
        f"above the best of them{spread}, a diverged trial counted as the loss at initialisation (arXiv 2309.14322); "
        "a setting with a low value is forgiving."
    )


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_NAME else text[: LONGEST_NAME - 1] + "…"


def _seeds(trials: list[TrialResult]) -> list[Any]:
    return list(dict.fromkeys(trial.seed for trial in trials))


def _of_seed(trials: list[TrialResult], seed: Any, path: str, rates: set[float]) -> float:
    """nan where a rate neither finished nor diverged for the seed, or the loss at initialisation is not known."""
    done = [
        trial for trial in trials if trial.seed == seed and (trial.final_loss is not None or trial.status == DIVERGED)
    ]
    losses = {trial.knobs[path]: math.inf if trial.final_loss is None else trial.final_loss for trial in done}
    initial = [trial.initial_loss for trial in done if trial.initial_loss is not None]
    if set(losses) != rates or not initial:
        return math.nan
    return lr_sensitivity(losses, sum(initial) / len(initial))
