"""Loss over the steps of every trial."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rustgpt_jax.sweeps.report.labels import METRICS, knob_names
from rustgpt_jax.sweeps.report.ranking import knob_shares, most_important, ranking
from rustgpt_jax.sweeps.report.results import (
    BITS_PER_BYTE,
    DIVERGED,
    FAILED,
    PRUNED,
    RUNNING,
    STOPPED,
    TRAIN_LOSS,
    Curve,
    Results,
    TrialResult,
    validation_metric,
)
from rustgpt_jax.sweeps.report.svg import (
    BOTTOM,
    LEFT,
    NARROW,
    RIGHT,
    TOP,
    WIDE,
    Coloring,
    Picture,
    blank,
    css_placeholder,
    mark,
    panel,
    scale_of,
    show_losses,
    show_steps,
    to_svg,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEIGHT = 360.0
# Points drawn in all, over all trials and within one.
MOST_POINTS, MOST_POINTS_A_TRIAL = 24_000, 160
# Draw a marker at each point of curves with at most this many points.
MOST_DOTS = 12


def loss_curves(results: Results) -> Picture | None:
    """Training loss and validation loss of all trials over the steps, coloured by the knob that explains most."""
    sides = _sides(results)
    if not sides:
        return None
    knob = most_important(results)
    colouring = _colouring(results, knob)
    best = {trial.id for trial in ranking(results)[0].setting.trials}
    figure = blank(WIDE, TOP + HEIGHT)
    width = (WIDE if len(sides) == 1 else NARROW) - LEFT - RIGHT
    binned = 1
    for place, (title, curves) in enumerate(sides):
        rectangle = (LEFT + place * (WIDE - NARROW), TOP, width, HEIGHT - BOTTOM)
        axes = panel(figure, rectangle, title, "step")
        show_losses(axes, _losses_in_view(results, curves))
        show_steps(axes, max(curve[-1][0] for curve in curves.values()))
        binned = max(binned, _bin_size(curves.values()))
        for trial in sorted(results.trials, key=lambda trial: trial.id in best):
            if trial.id in curves:
                curve = downsample(curves[trial.id], _most_points(curves.values()))
                colour = colouring(trial.knobs[knob]) if colouring and knob else css_placeholder("hue0")
                _draw(axes, trial, curve, colour, _line_width(len(curves)) + 0.9 * (trial.id in best))
    title, keys = "Loss over the steps", (colouring.key,) if colouring else ()
    return Picture(title, _caption(results, knob, binned), to_svg(figure, "curves-", title), keys)


def downsample(curve: Curve, most_points: int) -> Curve:
    """A curve of at most about so many points: means of neighbours, the first kept as it is, the last in its place."""
    size = math.ceil(len(curve) / most_points)
    if size == 1:
        return curve
    groups = [curve[start : start + size] for start in range(1, len(curve), size)]
    means = [tuple(sum(column) / len(group) for column in zip(*group, strict=True)) for group in groups]
    return (curve[0], *means[:-1], (curve[-1][0], means[-1][1]))  # type: ignore[arg-type]


def _sides(results: Results) -> list[tuple[str, dict[str, Curve]]]:
    """The titles of the panels and the curves in them, by trial."""
    train = {trial.id: trial.train_curve for trial in results.trials if trial.train_curve}
    valid = {trial.id: trial.valid_curve for trial in results.trials if trial.valid_curve}
    sides = []
    # Losses a token of different tokenizers stand on no common axis.
    if train and results.metric != BITS_PER_BYTE:
        sides.append((str(METRICS[TRAIN_LOSS]), train))
    if valid:
        sides.append((str(METRICS[validation_metric(results.metric)]), valid))
    return sides


def _colouring(results: Results, knob: str | None) -> Coloring | None:
    if knob is None:
        return None
    return Coloring(knob_names(results.swept)[knob], scale_of(trial.knobs[knob] for trial in results.trials))


def _losses_in_view(results: Results, curves: dict[str, Curve]) -> list[float]:
    whole = [curves[trial.id] for trial in results.trials if trial.id in curves and trial.status != DIVERGED]
    return [loss for curve in whole or curves.values() for _, loss in curve]


def _line_width(n_curves: int) -> float:
    return 1.7 if n_curves <= 12 else 1.2 if n_curves <= 60 else 0.8


def _most_points(curves: Iterable[Curve]) -> int:
    return min(MOST_POINTS_A_TRIAL, max(MOST_POINTS // len(list(curves)), 2))


def _bin_size(curves: Iterable[Curve]) -> int:
    curves = list(curves)
    return math.ceil(max(map(len, curves)) / _most_points(curves))


def _draw(axes: "Axes", trial: TrialResult, curve: Curve, colour: str, width: float) -> None:
    diverged = trial.status == DIVERGED
    style: dict[str, Any] = {"linestyle": (0, (3, 2)) if diverged else "solid", "solid_capstyle": "round"}
    if len(curve) <= MOST_DOTS:
        style |= {"marker": "o", "markersize": 4, "markeredgewidth": 0}
    steps, losses = zip(*curve, strict=True)
    mark(axes.plot(steps, losses, color=colour, linewidth=width, alpha=0.9, **style), trial.id)
    if diverged:
        mark(
            axes.plot(
                *_end_in_view(curve, axes.get_ylim()[1]),
                "x",
                color=colour,
                markersize=7,
                markeredgewidth=1.8,
                clip_on=False,
            ),
            trial.id,
        )


def _end_in_view(curve: Curve, top: float) -> tuple[float, float]:
    """Where a curve ends, or leaves the axes for good through the top."""
    inside = [index for index, (_, loss) in enumerate(curve) if loss <= top]
    if not inside or inside[-1] == len(curve) - 1:
        return curve[-1][0], min(curve[-1][1], top)
    (step, loss), (next_step, next_loss) = curve[inside[-1]], curve[inside[-1] + 1]
    return step + (next_step - step) * (top - loss) / (next_loss - loss), top


def _caption(results: Results, knob: str | None, binned: int) -> str:
    parts = ["Each line is a trial"]
    if knob:
        named = f"its colour its {knob_names(results.swept)[knob]}"
        tells = len(results.knobs) > 1 and knob in knob_shares(results)
        parts.append(f"{named}, the knob that explains most of the final loss" if tells else named)
    if len(results.trials) > 1:
        parts.append("thick lines are the best setting's")
    if results.counts.get(DIVERGED):
        parts.append("dashed lines diverged, and end in a cross")
    if any(status in results.counts for status in (PRUNED, STOPPED, RUNNING, FAILED)):
        parts.append("lines that end early are of trials that did not finish")
    if binned > 1:
        parts.append(f"a point is the mean of up to {binned} neighbouring records")
    return "; ".join(parts) + "."
