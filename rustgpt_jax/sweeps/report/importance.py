"""Which knobs matter, and which of them change each other's effect."""

import math
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rustgpt_jax.sweeps.report.labels import METRICS, knob_names, loss_text, value_text
from rustgpt_jax.sweeps.report.ranking import knob_shares, loss, losses_in_view, variance_shares
from rustgpt_jax.sweeps.report.results import DIVERGED, SEED, Results, TrialResult
from rustgpt_jax.sweeps.report.svg import (
    BOTTOM,
    NARROW,
    RIGHT,
    SMALL_FONT_SIZE,
    TOP,
    WIDE,
    Key,
    Picture,
    Scale,
    blank,
    css_placeholder,
    mark,
    name_column,
    panel,
    scale_of,
    shade,
    show_knob,
    to_svg,
    write,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEAST_TRIALS = 6
ROW_HEIGHT = 34.0
MOST_ROWS = 12
MAP_HEIGHT, MOST_CELL_HEIGHT = 280.0, 64.0
# More values than this on either side make points of a heat map's cells.
MOST_CELLS = 10
# A cell narrower than this has no room for its loss.
LEAST_WIDTH_FOR_TEXT = 38.0


def importance_figure(results: Results) -> Picture | None:
    """Draw a bar for each share of the final loss variance: swept knobs, interactions and noise, which sum to 100%."""
    shares = knob_shares(results)
    if len(results.knobs) < 2 or not shares or len(results.finished) < LEAST_TRIALS:
        return None
    names = knob_names(results.swept)
    pairs = interaction_shares(results)
    rows = [(names[path], share, "soft" if path == SEED else "hue0") for path, share in shares.items()]
    if len(rows) > MOST_ROWS:
        others = sum(share for _, share, _ in rows[MOST_ROWS - 1 :])
        rows[MOST_ROWS - 1 :] = [(f"{len(rows) - MOST_ROWS + 1} more knobs", others, "hue0")]
    rest = "noise" if pairs else "interactions, noise"
    rows += [("interactions", sum(pairs.values()), "hue3")] if pairs else []
    rows.append((rest, variance_shares(results).rest, "soft"))
    height = ROW_HEIGHT * len(rows)
    figure = blank(NARROW, height + BOTTOM)
    left = name_column(name for name, *_ in rows)
    rectangle = (left, 0, NARROW - left - 4 * RIGHT, height)
    axes = panel(figure, rectangle, "", "share of the variance of the final loss")
    axes.grid(False)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks([])
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25%", "50%", "75%", "100%"])
    for place, (name, share, color) in enumerate(rows):
        axes.barh(place, share, 0.56, color=css_placeholder(color))
        height_share = 1 - (place + 0.5) / len(rows)
        write(axes, name, (0, height_share), (-10, 0), ha="right", va="center")
        write(axes, f"{share:.1%}", (share, height_share), (7, 0), va="center", color=css_placeholder("soft"))
    unknown = [names[path] for path in results.knobs if path not in shares]
    fitted = "main effects, then interactions of two knobs" if pairs else "main effects"
    caption = (
        f"Analysis of variance of {len(results.finished)} finished trials by least squares ({fitted}; what chance "
        "would explain is taken off). The shares add up to 100%"
        + (f"; {' and '.join(unknown)} cannot be told from noise" if unknown else "")
        + ("." if pairs else "; the trials are too few to tell interactions from noise.")
        + (" Noise includes interactions of three and more knobs." if pairs and len(results.knobs) > 2 else "")
    )
    title = "Importance of the knobs"
    return Picture(title, caption, to_svg(figure, "importance-", title), is_wide=False)


def interaction_shares(results: Results) -> dict[tuple[str, str], float]:
    """The share of variance that each two swept knobs, the seed aside, explain only together, the largest first."""
    if len(results.finished) < LEAST_TRIALS:
        return {}
    return dict(sorted(variance_shares(results).pairs.items(), key=lambda item: -item[1]))


def interaction_matrix(results: Results) -> Picture | None:
    """A cell for each two of three or more knobs: the share of variance that they explain only together."""
    shares = interaction_shares(results)
    knobs = [path for path in knob_shares(results) if any(path in pair for pair in shares)][:MOST_ROWS]
    if len(knobs) < 3:
        return None
    names = knob_names(results.swept)
    left = name_column(names[path] for path in knobs[1:])
    size = min(52.0, (NARROW - left) / (len(knobs) - 1))
    figure = blank(NARROW, TOP + size * (len(knobs) - 1))
    axes = panel(figure, (left, TOP, size * (len(knobs) - 1), size * (len(knobs) - 1)), "", "")
    _bare(axes)
    axes.set_xlim(-0.5, len(knobs) - 1.5)
    axes.set_ylim(len(knobs) - 0.5, 0.5)
    top = max(max(shares.values()), 0.01)
    for row, first in enumerate(knobs):
        for column, second in enumerate(knobs[:row]):
            share = shares.get((first, second), shares.get((second, first)))
            text = "?" if share is None else f"{share:.0%}"
            strength = 0.0 if share is None else share / top
            square = {"facecolor": css_placeholder("hue0"), "alpha": 0.07 + 0.93 * strength}
            _cell(axes, (column, row), square, text if size >= LEAST_WIDTH_FOR_TEXT else "", strength > 0.5)
        if row:
            write(axes, names[first], (0, 1 - (row - 0.5) / (len(knobs) - 1)), (-10, 0), ha="right", va="center")
        if row < len(knobs) - 1:
            place = ((row + 0.5) / (len(knobs) - 1), 1 - row / (len(knobs) - 1))
            write(axes, names[first], place, (-size / 2 + 5, 9), ha="left", va="center")
    caption = (
        "The share of the variance of the final loss that two knobs explain only together, beyond the sum of each: "
        "where it is large, the best value of the one depends on the other."
    )
    title = "Interactions of two knobs"
    return Picture(title, caption, to_svg(figure, "interactions-", title), is_wide=False)


def heat_map(results: Results) -> Picture | None:
    """The final loss over the values of the two knobs that interact most: cells, or points where values are many."""
    pair = next(iter(interaction_shares(results)), None)
    if pair is None:
        return None
    scales = [scale_of(trial.knobs[path] for trial in results.trials) for path in pair]
    names = knob_names(results.swept)
    # The knob with more values lies along the longer side.
    (across, wide), (up, tall) = sorted(zip(pair, scales, strict=True), key=lambda item: -len(item[1].values))
    in_cells = max(len(scale.values) for scale in scales) <= MOST_CELLS
    height = min(MOST_CELL_HEIGHT * len(tall.values), MAP_HEIGHT) if in_cells else MAP_HEIGHT
    left = name_column(map(value_text, tall.values if in_cells else [0.001]))
    # Beside the importance of the knobs, or alone where the interactions stand there.
    is_wide = len(results.knobs) > 2
    whole = WIDE if is_wide else NARROW
    width = whole - left - RIGHT
    figure = blank(whole, TOP + height + BOTTOM)
    axes = panel(figure, (left, TOP, width, height), names[up], names[across])
    _bare(axes)
    key = loss_key(results)
    title = f"Final loss by {names[across]} and {names[up]}"
    if in_cells:
        _draw_cells(axes, results, (across, wide), (up, tall), width / len(wide.values))
        what = "Each cell is the mean over the finished trials with its two values; × counts those that diverged"
    else:
        _draw_points(axes, results, (across, wide), (up, tall))
        what = "Each point is a finished trial; crosses are trials that diverged"
    share = interaction_shares(results)[pair]
    caption = f"{what}. Of all pairs of knobs, these two explain most of the variance beyond their sum ({share:.1%})."
    if len(results.knobs) == 2:
        caption = f"{what}. Together the knobs explain {share:.1%} of the variance beyond the sum of each."
    return Picture(title, caption, to_svg(figure, "map-", title), (key,), is_wide)


def loss_shade(results: Results, final: float) -> float:
    """The place of a loss in the shades, from 0 for the best one to 1 for those that are out of view."""
    low, high = losses_in_view(results)
    return min((final - low) / ((high - low) or 1.0), 1.0)


def loss_key(results: Results) -> Key:
    """The band of shades between the best loss and that from which all are shown alike."""
    low, high = losses_in_view(results)
    more = " and more" if any(loss(trial) > high for trial in results.finished) else ""
    return Key(
        f"final loss, {METRICS[results.metric].unit}", (("", loss_text(low)), ("", loss_text(high) + more)), "loss"
    )


def _bare(axes: "Axes") -> None:
    axes.grid(False)
    axes.spines["bottom"].set_visible(False)
    axes.set_xticks([])
    axes.set_yticks([])


def _cell(axes: "Axes", place: tuple[int, int], style: dict[str, Any], text: str, is_strong: bool) -> None:
    """A square with a text that can be read on it: on both papers, what is strong is far from the paper's colour."""
    from matplotlib.patches import Rectangle

    across, up = place
    axes.add_patch(Rectangle((across - 0.48, up - 0.48), 0.96, 0.96, linewidth=0, **style))
    colour = css_placeholder("paper" if is_strong else "ink")
    axes.text(across, up, text, ha="center", va="center", color=colour, fontsize=SMALL_FONT_SIZE)


def _draw_cells(axes: "Axes", results: Results, across: tuple[str, Scale], up: tuple[str, Scale], width: float) -> None:
    cells: dict[tuple[int, int], list[TrialResult]] = {}
    for trial in results.trials:
        cell = (across[1].index(trial.knobs[across[0]]), up[1].index(trial.knobs[up[0]]))
        cells.setdefault(cell, []).append(trial)
    for place, trials in cells.items():
        losses = [trial.final_loss for trial in trials if trial.final_loss is not None]
        diverged = sum(trial.status == DIVERGED for trial in trials)
        crosses = f"{diverged} ×" if diverged else ""
        if losses:
            mean = fmean(losses)
            text = f"{mean:.3f}" + (f"\n{crosses}" if crosses else "")
            faintness = loss_shade(results, mean)
            square = {"facecolor": css_placeholder(shade("loss", faintness))}
            _cell(axes, place, square, text if width >= LEAST_WIDTH_FOR_TEXT else "", faintness < 0.55)
        elif crosses:
            axes.text(
                *place, crosses, ha="center", va="center", color=css_placeholder("warn"), fontsize=SMALL_FONT_SIZE
            )
    for axis, (_, scale) in ((axes.xaxis, across), (axes.yaxis, up)):
        axis.set_ticks(range(len(scale.values)), [value_text(value) for value in scale.values])
    axes.set_xlim(-0.5, len(across[1].values) - 0.5)
    axes.set_ylim(-0.5, len(up[1].values) - 0.5)


def _draw_points(axes: "Axes", results: Results, across: tuple[str, Scale], up: tuple[str, Scale]) -> None:
    (first, wide), (second, tall) = across, up
    show_knob(axes, wide, NARROW)
    ticks = tall.ticks(least_gap=0.06)
    axes.set_yticks([place for place, _ in ticks], [text for _, text in ticks])
    margin = 0.06 * (tall.high - tall.low)
    axes.set_ylim(tall.low - margin, tall.high + margin)
    trials = sorted(results.trials, key=lambda trial: -math.inf if trial.final_loss is None else -trial.final_loss)
    spreads = zip(trials, wide.spread(len(trials)), tall.spread(len(trials)), strict=True)
    for trial, aside, upwards in spreads:
        place = wide.place(trial.knobs[first]) + aside, tall.place(trial.knobs[second]) + upwards
        if trial.final_loss is not None:
            colour = css_placeholder(shade("loss", loss_shade(results, trial.final_loss)))
            mark(axes.plot(*place, "o", color=colour, markersize=8, markeredgewidth=0), trial.id)
        elif trial.status == DIVERGED:
            mark(axes.plot(*place, "x", color=css_placeholder("warn"), markersize=6), trial.id)
