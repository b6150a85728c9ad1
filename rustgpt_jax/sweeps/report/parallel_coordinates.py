"""All knobs of all trials at once: parallel coordinates."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rustgpt_jax.sweeps.report.importance import loss_key, loss_shade
from rustgpt_jax.sweeps.report.labels import METRICS, knob_names, loss_text
from rustgpt_jax.sweeps.report.ranking import knob_shares
from rustgpt_jax.sweeps.report.results import DIVERGED, Results, TrialResult
from rustgpt_jax.sweeps.report.svg import (
    FONT_SIZE,
    WIDE,
    Picture,
    Scale,
    blank,
    css_placeholder,
    mark,
    panel,
    scale_of,
    shade,
    to_svg,
    write,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEIGHT, MARGIN, SIDE = 410.0, 64.0, 74.0
MOST_AXES = 8
# Height between the loss axis and the mark of those that diverged; how far equal values are spread, as a share.
DIVERGED_AT, SPREAD = 1.07, 0.06


def parallel_coordinates(results: Results) -> Picture | None:
    """A line for each finished or diverged trial through its values of every knob, the most important ones last."""
    by_share = [path for path in knob_shares(results) if path in results.knobs]
    order = [path for path in results.knobs if path not in by_share] + by_share[::-1]
    knobs = order[-MOST_AXES:]
    trials = [trial for trial in results.trials if trial.final_loss is not None or trial.status == DIVERGED]
    if len(knobs) < 2:
        return None
    figure = blank(WIDE, HEIGHT)
    axes = panel(figure, (SIDE, MARGIN, WIDE - 2 * SIDE, HEIGHT - MARGIN - 24), "", "")
    axes.set_axis_off()
    axes.set_xlim(0, len(knobs))
    axes.set_ylim(0, 1)
    scales = {path: scale_of(trial.knobs[path] for trial in results.trials) for path in knobs}
    heights = [_heights(trials, path, scales[path]) for path in knobs] + [_loss_heights(results, trials)]
    # Best on top.
    for index in sorted(range(len(trials)), key=lambda index: -heights[-1][index]):
        _draw_trial(axes, results, trials[index], [column[index] for column in heights])
    _draw_axes(axes, results, scales)
    hidden = len(order) - len(knobs)
    caption = (
        "Each line is a trial, through its value of each knob to its final loss, coloured by that loss"
        + (f"; {hidden} less important knobs are left out" if hidden else "")
        + ("; dashed lines diverged" if results.counts.get(DIVERGED) else "")
        + ". Lines with the same value are spread a little."
    )
    title = "All knobs and the final loss"
    return Picture(title, caption, to_svg(figure, "parallel-", title), (loss_key(results),))


def _share(scale: Scale, place: float) -> float:
    if scale.high == scale.low:
        return 0.5
    return SPREAD / 2 + (1 - SPREAD) * (place - scale.low) / (scale.high - scale.low)


def _heights(trials: Sequence[TrialResult], path: str, scale: Scale) -> list[float]:
    """Where each trial's line crosses the axis of a knob; lines with the same value lie side by side, best lowest."""
    places = [scale.place(trial.knobs[path]) for trial in trials]
    step = SPREAD / max(places.count(place) for place in places)
    ranked = sorted(range(len(trials)), key=lambda index: (trials[index].final_loss is None, trials[index].final_loss))
    heights = [0.0] * len(trials)
    seen: dict[float, int] = {}
    for index in ranked:
        place = places[index]
        rank = seen[place] = seen.get(place, -1) + 1
        heights[index] = _share(scale, place) + step * (rank - (places.count(place) - 1) / 2)
    return heights


def _loss_heights(results: Results, trials: Sequence[TrialResult]) -> list[float]:
    losses = scale_of(trial.final_loss for trial in results.finished)
    return [
        DIVERGED_AT if trial.final_loss is None else _share(losses, losses.place(trial.final_loss)) for trial in trials
    ]


def _draw_trial(axes: "Axes", results: Results, trial: TrialResult, heights: Sequence[float]) -> None:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    points: list[tuple[float, float]] = [(0, heights[0])]
    for place in range(1, len(heights)):
        points += [(place - 0.5, heights[place - 1]), (place - 0.5, heights[place]), (place, heights[place])]
    curve = Path(points, [Path.MOVETO] + [Path.CURVE4] * (len(points) - 1))
    many = len(results.trials) > 100
    if trial.final_loss is None:
        style = {"edgecolor": css_placeholder("warn"), "linestyle": (0, (3, 3)), "alpha": 0.7}
    else:
        style = {"edgecolor": css_placeholder(shade("loss", loss_shade(results, trial.final_loss))), "alpha": 0.8}
    patch = PathPatch(curve, facecolor="none", linewidth=0.9 if many else 1.5, clip_on=False, **style)
    mark(axes.add_patch(patch), trial.id)


def _draw_axes(axes: "Axes", results: Results, scales: dict[str, Scale]) -> None:
    names = knob_names(results.swept)
    columns = len(scales)
    ground = {"facecolor": css_placeholder("paper"), "linewidth": 0, "pad": 1.0, "alpha": 0.8}
    for place, (path, scale) in enumerate(scales.items()):
        _axis(axes, place / columns, names[path])
        for tick, text in scale.ticks(least_gap=0.05):
            write(axes, text, (place / columns, _share(scale, tick)), (-8, 0), ha="right", va="center", bbox=ground)
    losses = [trial.final_loss for trial in results.finished if trial.final_loss is not None]
    _axis(axes, 1, METRICS[results.metric].name)
    scale = scale_of(losses)
    for loss in {min(losses), max(losses)}:
        write(axes, loss_text(loss), (1, _share(scale, scale.place(loss))), (8, 0), va="center")
    if results.counts.get(DIVERGED):
        write(axes, "diverged", (1, DIVERGED_AT), (8, 0), va="center", color=css_placeholder("warn"))


def _axis(axes: "Axes", place: float, name: str) -> None:
    columns = axes.get_xlim()[1]
    axes.plot([place * columns] * 2, [0, 1], color=css_placeholder("soft"), linewidth=1.2, clip_on=False, zorder=3)
    write(axes, name, (place, 1), (0, 44), ha="center", fontsize=FONT_SIZE)
