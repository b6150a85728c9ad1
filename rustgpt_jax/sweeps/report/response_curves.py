"""Final loss against one knob, the others held or coloured."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rustgpt_jax.sweeps.report.labels import METRICS, knob_names, setting_text
from rustgpt_jax.sweeps.report.ranking import knob_shares, most_important
from rustgpt_jax.sweeps.report.results import DIVERGED, Results, TrialResult, key_of
from rustgpt_jax.sweeps.report.stats import Interval, mean_interval
from rustgpt_jax.sweeps.report.svg import (
    BOTTOM,
    LEFT,
    N_HUES,
    NARROW,
    RIGHT,
    TOP,
    WIDE,
    Coloring,
    Key,
    Picture,
    Scale,
    blank,
    css_placeholder,
    mark,
    panel,
    scale_of,
    show_beyond,
    show_knob,
    show_losses,
    to_svg,
    write,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEIGHT = 362.0
# More lines than this have no colour, band and name of their own; more than the second number are not drawn.
MOST_NAMED_LINES, MOST_LINES = 6, 60
# A t interval of two seeds is so wide that its band would hide the rest.
LEAST_SEEDS = 3
# Pixels between the crosses of trials that diverged at the same value, and of all of these together.
CROSS_GAP, CROSS_SPREAD = 9.0, 40.0
CROSS_ROOM = 14.0


@dataclass(frozen=True)
class Line:
    """The trials that differ only in one knob and the seed, and their colour."""

    trials: tuple[TrialResult, ...]
    colour: str

    def at(self, path: str) -> dict[Any, list[float]]:
        """The final losses at each value of a knob, values in order."""
        losses: dict[Any, list[float]] = {}
        for trial in sorted(self.trials, key=lambda trial: trial.knobs[path]):
            if trial.final_loss is not None:
                losses.setdefault(trial.knobs[path], []).append(trial.final_loss)
        return losses


def responses(results: Results) -> list[Picture]:
    """A picture of the final loss against each swept knob whose values are numbers, the most important one first."""
    shares = knob_shares(results)
    knobs = sorted(results.knobs, key=lambda path: -shares.get(path, 0.0))
    scales = {path: scale_of(trial.knobs[path] for trial in results.trials) for path in knobs}
    numeric = [(path, scale) for path, scale in scales.items() if scale.is_numeric]
    # Two stand side by side, so one of an odd number takes all the width.
    return [
        _response(results, path, scale, place == 0 and len(numeric) % 2 == 1)
        for place, (path, scale) in enumerate(numeric)
    ]


def _response(results: Results, path: str, scale: Scale, is_wide: bool) -> Picture:
    name = knob_names(results.swept)[path]
    lines, keys = _lines(results, path)
    are_named = len(lines) <= MOST_NAMED_LINES
    joined = [line for line in lines if len(line.at(path)) > 1]
    are_lines = len(lines) <= MOST_LINES and len(joined) >= len(lines) / 2
    width = WIDE if is_wide else NARROW
    figure = blank(width, HEIGHT)
    inner = width - LEFT - RIGHT
    top = TOP + (CROSS_ROOM if results.counts.get(DIVERGED) else 0)
    axes = panel(figure, (LEFT, top, inner, HEIGHT - top - BOTTOM), str(METRICS[results.metric]), name)
    show_losses(axes, [trial.final_loss for trial in results.finished if trial.final_loss is not None])
    show_knob(axes, scale, inner)
    for line in joined if are_lines else ():
        _draw_line(axes, line, path, scale, are_named)
    spread = [0.0] * len(results.trials) if are_lines else scale.spread(len(results.trials))
    aside = {trial.id: shift for trial, shift in zip(results.trials, spread, strict=True)}
    size = 5.5 if len(results.trials) <= 100 else 4.5
    for line in lines:
        for trial in line.trials:
            if trial.final_loss is not None:
                place = scale.place(trial.knobs[path]) + aside[trial.id]
                style: dict[str, Any] = {"color": line.colour, "markersize": size, "markeredgewidth": 0, "alpha": 0.85}
                mark(axes.plot(place, trial.final_loss, "o", **style), trial.id)
    _draw_crosses(axes, lines, path, scale)
    title = f"Final loss and {name}"
    prefix = f"response-{results.swept.index(path)}-"
    caption = _caption(results, lines, path, are_lines, are_lines and are_named)
    return Picture(title, caption, to_svg(figure, prefix, title), keys, is_wide)


def _lines(results: Results, path: str) -> tuple[list[Line], tuple[Key, ...]]:
    """The trials by the values of the other knobs: each its colour if they are few, else by the most important knob."""
    groups: dict[str, list[TrialResult]] = {}
    for trial in results.trials:
        groups.setdefault(key_of(_others(results, trial, path)), []).append(trial)
    knob = most_important(results, path)
    if knob is None:
        return [Line(tuple(results.trials), css_placeholder("hue0"))], ()
    if len(results.knobs) > 2 and len(groups) <= min(MOST_NAMED_LINES, N_HUES):
        names = {
            f"hue{place}": setting_text(_others(results, group[0], path)) for place, group in enumerate(groups.values())
        }
        lines = [Line(tuple(group), css_placeholder(hue)) for hue, group in zip(names, groups.values(), strict=True)]
        return lines, (Key("", tuple(names.items())),)
    scale = scale_of(trial.knobs[knob] for trial in results.trials)
    colouring = Coloring(knob_names(results.swept)[knob], scale)
    return [Line(tuple(group), colouring(group[0].knobs[knob])) for group in groups.values()], (colouring.key,)


def _others(results: Results, trial: TrialResult, path: str) -> dict[str, Any]:
    return {other: trial.knobs[other] for other in results.knobs if other != path}


def _draw_line(axes: "Axes", line: Line, path: str, scale: Scale, is_named: bool) -> None:
    losses = line.at(path)
    places = [scale.place(value) for value in losses]
    intervals = [mean_interval(group) for group in losses.values()]
    means = [interval.mean for interval in intervals]
    axes.plot(places, means, color=line.colour, linewidth=2.0 if is_named else 0.9, alpha=1.0 if is_named else 0.6)
    told = [
        interval if interval.n >= LEAST_SEEDS else Interval(math.nan, math.nan, math.nan, 0) for interval in intervals
    ]
    bounds = np.array([(interval.low, interval.high) for interval in told])
    if is_named and np.isfinite(bounds).any():
        axes.fill_between(places, *bounds.T, color=line.colour, alpha=0.15, linewidth=0)
        bottom, top = axes.get_ylim()
        for place, (low, high) in zip(places, bounds, strict=True):
            if low < bottom:
                show_beyond(axes, (place, bottom), "v", line.colour)
            if high > top:
                show_beyond(axes, (place, top), "^", line.colour)


def _draw_crosses(axes: "Axes", lines: Iterable[Line], path: str, scale: Scale) -> None:
    """A cross above the axes for each trial that diverged, side by side where there are several."""
    from matplotlib.transforms import ScaledTranslation

    at: dict[float, list[tuple[TrialResult, str]]] = {}
    for line in lines:
        for trial in line.trials:
            if trial.status == DIVERGED:
                at.setdefault(scale.place(trial.knobs[path]), []).append((trial, line.colour))
    for place, crosses in at.items():
        gap = min(CROSS_GAP, CROSS_SPREAD / len(crosses))
        for index, (trial, colour) in enumerate(crosses):
            shift = ScaledTranslation((index - (len(crosses) - 1) / 2) * gap / 72, 8 / 72, axes.figure.dpi_scale_trans)
            cross = axes.plot(
                place, 1, "x", color=colour, markersize=6.5, markeredgewidth=1.7, clip_on=False,
                transform=axes.get_xaxis_transform() + shift,
            )  # fmt: skip
            mark(cross, trial.id)
    if at:
        write(axes, "diverged", (0, 1), (-7, 8), ha="right", va="center", color=css_placeholder("soft"))


def _caption(results: Results, lines: list[Line], path: str, has_lines: bool, has_bands: bool) -> str:
    seeds = {len(group) for line in lines for group in line.at(path).values()}
    parts = ["Each point is a finished trial"]
    if has_lines:
        parts.append(
            "lines join the means over seeds" if max(seeds) > 1 else "lines join trials alike in all other knobs"
        )
    banded = [n for n in seeds if n >= LEAST_SEEDS]
    if has_bands and banded:
        n = f"{min(banded)} to {max(banded)}" if len(banded) > 1 else str(max(banded))
        parts.append(
            f"bands are 95% t intervals over seeds (n = {n}; none below {LEAST_SEEDS}; arrows where they go on)"
        )
    if results.counts.get(DIVERGED):
        parts.append("crosses above are trials that diverged")
    return "; ".join(parts) + "."
