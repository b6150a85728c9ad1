"""The figures of a sweep's report. Plotting functions return None if the sweep has no data for their figure."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

from rustgpt_jax.sweeps.report import analysis
from rustgpt_jax.sweeps.report.plot_style import (
    N_HUES,
    NARROW,
    PIXELS_PER_INCH,
    STYLE,
    WIDE,
    KnobColors,
    ReportFigure,
    Scale,
    add_legend,
    draw_arrow,
    get_css_color,
    jitter,
    make_css_colormap,
    make_scale,
    mark_trial,
    set_loss_axis,
    shift_transform,
    subplots,
    to_svg,
)
from rustgpt_jax.sweeps.report.results import (
    BITS_PER_BYTE,
    DIVERGED,
    FAILED,
    METRICS,
    PRUNED,
    RUNNING,
    SEED,
    STOPPED,
    TRAIN_LOSS,
    Curve,
    Results,
    TrialResult,
    describe_setting,
    format_loss,
    format_value,
    get_knob_names,
    get_validation_metric,
    to_key,
)
from rustgpt_jax.sweeps.report.stats import compute_mean_interval

# Maximum number of points over all curves and in one of them; curves of few points get a marker at each.
MAX_POINTS, MAX_POINTS_PER_TRIAL, MAX_MARKERS = 24_000, 160, 12
# More lines than this share colors and have no bands; more than the second number are not drawn.
MAX_NAMED_LINES, MAX_LINES = 6, 60
# Pixels between the crosses of trials that diverged at the same value, and the maximum for all of them together.
CROSS_GAP, MAX_CROSS_WIDTH = 9.0, 40.0
# Maximum numbers of settings and of knobs in a figure, and of characters in the name of a row.
MAX_SENSITIVITIES, MAX_KNOBS, MAX_NAME = 24, 12, 46
# A heat map with more values on one side shows points instead of cells; narrower cells have no text.
MAX_CELLS, MIN_CELL_WIDTH = 10, 38.0
# Maximum number of parallel axes, height of the diverged trials, and the spread of equal values.
MAX_AXES, DIVERGED_AT, SPREAD = 8, 1.07, 0.06
DASHED = (0, (3, 2))


def plot_loss_curves(results: Results) -> ReportFigure | None:
    """Plot the training loss and the validation loss of all trials, colored by the most important knob."""
    train = {trial.id: trial.train_curve for trial in results.trials if trial.train_curve}
    valid = {trial.id: trial.valid_curve for trial in results.trials if trial.valid_curve}
    # Losses per token of different tokenizers are not comparable.
    panels = [(str(METRICS[TRAIN_LOSS]), train)] if train and results.metric != BITS_PER_BYTE else []
    panels += [(str(METRICS[get_validation_metric(results.metric)]), valid)] if valid else []
    if not panels:
        return None
    knob = analysis.find_most_important(results)
    colors = _make_knob_colors(results, knob) if knob else None
    best = {trial.id for trial in analysis.rank_settings(results)[0].setting.trials}
    figure, all_axes = subplots(WIDE, 400, len(panels))
    bin_size = 1
    for axes, (title, curves) in zip(all_axes, panels, strict=True):
        axes.set(title=title, xlabel="step", xlim=(0, max(curve[-1][0] for curve in curves.values()) or 1))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        stable = [curves[trial.id] for trial in results.trials if trial.id in curves and trial.status != DIVERGED]
        set_loss_axis(axes, [loss for curve in stable or curves.values() for _, loss in curve])
        max_points = min(MAX_POINTS_PER_TRIAL, max(MAX_POINTS // len(curves), 2))
        bin_size = max(bin_size, math.ceil(max(map(len, curves.values())) / max_points))
        width = 1.7 if len(curves) <= 12 else 1.2 if len(curves) <= 60 else 0.8
        for trial in sorted(results.trials, key=lambda trial: trial.id in best):
            if trial.id in curves:
                color = get_css_color(colors.css_variable(trial.knobs[knob]) if colors and knob else "hue0")
                _plot_curve(
                    axes, trial, downsample(curves[trial.id], max_points), color, width + 0.9 * (trial.id in best)
                )
    if colors:
        colors.add_legend(figure)
    title = "Loss curves"
    return ReportFigure(title, _write_curves_caption(results, knob, bin_size), to_svg(figure, "curves-", title))


def downsample(curve: Curve, max_points: int) -> Curve:
    """Average neighboring points to about `max_points`; the first point and the last step are kept."""
    size = math.ceil(len(curve) / max_points)
    if size == 1:
        return curve
    groups = [curve[start : start + size] for start in range(1, len(curve), size)]
    means = [tuple(map(fmean, zip(*group, strict=True))) for group in groups]
    return (curve[0], *means[:-1], (curve[-1][0], means[-1][1]))  # type: ignore[arg-type]


def _plot_curve(axes: Axes, trial: TrialResult, curve: Curve, color: str, width: float) -> None:
    diverged = trial.status == DIVERGED
    style: dict[str, Any] = {"linestyle": DASHED if diverged else "solid", "linewidth": width, "alpha": 0.9}
    if len(curve) <= MAX_MARKERS:
        style |= {"marker": "o", "markersize": 4}
    mark_trial(axes.plot(*zip(*curve, strict=True), color=color, **style), trial.id)
    if diverged:
        end = _find_visible_end(curve, axes.get_ylim()[1])
        mark_trial(axes.plot(*end, "x", color=color, markersize=7, markeredgewidth=1.8, clip_on=False), trial.id)


def _find_visible_end(curve: Curve, top: float) -> tuple[float, float]:
    """Return the end of a curve, or the point where it finally leaves the axes through the top."""
    inside = [index for index, (_, loss) in enumerate(curve) if loss <= top]
    if not inside or inside[-1] == len(curve) - 1:
        return curve[-1][0], min(curve[-1][1], top)
    (step, loss), (next_step, next_loss) = curve[inside[-1]], curve[inside[-1] + 1]
    return step + (next_step - step) * (top - loss) / (next_loss - loss), top


def _write_curves_caption(results: Results, knob: str | None, bin_size: int) -> str:
    parts = ["Each line is a trial"]
    if knob:
        is_known = len(results.knobs) > 1 and knob in analysis.compute_knob_shares(results)
        explains = ", the knob that explains most of the final loss" if is_known else ""
        parts.append(f"its color shows its {get_knob_names(results.swept)[knob]}{explains}")
    if len(results.trials) > 1:
        parts.append("thick lines belong to the best setting")
    if results.counts.get(DIVERGED):
        parts.append("dashed lines are trials that diverged, and end in a cross")
    if any(status in results.counts for status in (PRUNED, STOPPED, RUNNING, FAILED)):
        parts.append("lines that end early belong to trials that did not finish")
    if bin_size > 1:
        parts.append(f"each point is the mean of up to {bin_size} consecutive values")
    return "; ".join(parts) + "."


def _make_knob_colors(results: Results, path: str) -> KnobColors:
    return KnobColors(get_knob_names(results.swept)[path], _get_scale(results, path))


def _get_scale(results: Results, path: str) -> Scale:
    return make_scale(trial.knobs[path] for trial in results.trials)


def plot_responses(results: Results) -> list[ReportFigure]:
    """Plot the final loss against each numeric knob, the most important one first."""
    shares = analysis.compute_knob_shares(results)
    knobs = sorted(results.knobs, key=lambda path: -shares.get(path, 0.0))
    numeric = [path for path in knobs if _get_scale(results, path).is_numeric]
    # Two fit side by side, so the first of an odd number is wide.
    return [
        _plot_response(results, path, is_wide=place == 0 and len(numeric) % 2 == 1)
        for place, path in enumerate(numeric)
    ]


def _plot_response(results: Results, path: str, is_wide: bool) -> ReportFigure:
    name, scale = get_knob_names(results.swept)[path], _get_scale(results, path)
    by_other_knobs: dict[str, list[TrialResult]] = defaultdict(list)
    for trial in results.trials:
        by_other_knobs[to_key(_get_other_knobs(results, trial, path))].append(trial)
    groups = list(by_other_knobs.values())
    width = WIDE if is_wide else NARROW
    figure, (axes,) = subplots(width, 370)
    colors = _color_groups(results, path, groups, figure)
    losses = [_collect_losses(group, path) for group in groups]
    is_named = len(groups) <= MAX_NAMED_LINES
    has_lines = len(groups) <= MAX_LINES and sum(len(by_value) > 1 for by_value in losses) >= len(groups) / 2
    n_diverged = results.counts.get(DIVERGED, 0)
    axes.set_title(str(METRICS[results.metric]), pad=20 if n_diverged else None)
    axes.set_xlabel(name)
    set_loss_axis(axes, [trial.final_loss for trial in results.finished if trial.final_loss is not None])
    scale.set_axis(axes, "x")
    for by_value, color in zip(losses, colors, strict=True) if has_lines else ():
        if len(by_value) > 1:
            _plot_means(axes, by_value, color, is_named)
    n_trials = len(results.trials)
    offsets = np.zeros(n_trials) if has_lines else jitter(n_trials, len(scale.values), width)
    size = 5.5 if n_trials <= 100 else 4.5
    trials = [(trial, color) for group, color in zip(groups, colors, strict=True) for trial in group]
    for (trial, color), offset in zip(trials, offsets, strict=True):
        if trial.final_loss is not None:
            style: dict[str, Any] = {"color": color, "markersize": size, "alpha": 0.85}
            transform = shift_transform(axes, axes.transData, offset)
            mark_trial(axes.plot(trial.knobs[path], trial.final_loss, "o", transform=transform, **style), trial.id)
    _plot_crosses(axes, trials, path)
    title = f"Final loss by {name}"
    caption = _write_response_caption(results, losses, has_lines, has_lines and is_named)
    return ReportFigure(title, caption, to_svg(figure, f"response-{results.swept.index(path)}-", title), is_wide)


def _get_other_knobs(results: Results, trial: TrialResult, path: str) -> dict[str, Any]:
    return {other: trial.knobs[other] for other in results.knobs if other != path}


def _color_groups(results: Results, path: str, groups: Sequence[list[TrialResult]], figure: Figure) -> list[str]:
    """Return a color per group: separate ones if they are few, else by the most important other knob. Add a legend."""
    knob = analysis.find_most_important(results, path)
    if knob is None:
        return [get_css_color("hue0")] * len(groups)
    if len(results.knobs) > 2 and len(groups) <= min(MAX_NAMED_LINES, N_HUES):
        names = [describe_setting(_get_other_knobs(results, group[0], path)) for group in groups]
        add_legend(figure, "", [(f"hue{index}", name) for index, name in enumerate(names)])
        return [get_css_color(f"hue{index}") for index in range(len(groups))]
    colors = _make_knob_colors(results, knob)
    colors.add_legend(figure)
    return [get_css_color(colors.css_variable(group[0].knobs[knob])) for group in groups]


def _collect_losses(trials: Iterable[TrialResult], path: str) -> dict[float, list[float]]:
    """Group the final losses of trials by a knob's value, in ascending order."""
    losses: dict[float, list[float]] = defaultdict(list)
    for trial in sorted(trials, key=lambda trial: trial.knobs[path]):
        if trial.final_loss is not None:
            losses[trial.knobs[path]].append(trial.final_loss)
    return losses


def _plot_means(axes: Axes, losses: dict[float, list[float]], color: str, is_named: bool) -> None:
    """Plot the mean losses as a line, with a band of confidence intervals where there are enough seeds."""
    values, intervals = list(losses), [compute_mean_interval(group) for group in losses.values()]
    means = [interval.mean for interval in intervals]
    axes.plot(values, means, color=color, linewidth=2.0 if is_named else 0.9, alpha=1.0 if is_named else 0.6)
    bounds = np.array([(i.low, i.high) if i.n >= analysis.MIN_SEEDS else (math.nan, math.nan) for i in intervals])
    if not is_named or not np.isfinite(bounds).any():
        return
    axes.fill_between(values, *bounds.T, color=color, alpha=0.15, linewidth=0)
    bottom, top = axes.get_ylim()
    for value, (low, high) in zip(values, bounds, strict=True):
        if low < bottom:
            draw_arrow(axes, (value, bottom), "v", color)
        if high > top:
            draw_arrow(axes, (value, top), "^", color)


def _plot_crosses(axes: Axes, trials: Iterable[tuple[TrialResult, str]], path: str) -> None:
    """Draw a cross above the axes for each trial that diverged, side by side at the same value."""
    by_value: dict[float, list[tuple[TrialResult, str]]] = defaultdict(list)
    for trial, color in trials:
        if trial.status == DIVERGED:
            by_value[trial.knobs[path]].append((trial, color))
    for value, crosses in by_value.items():
        gap = min(CROSS_GAP, MAX_CROSS_WIDTH / len(crosses))
        for index, (trial, color) in enumerate(crosses):
            transform = shift_transform(axes, axes.get_xaxis_transform(), (index - (len(crosses) - 1) / 2) * gap, 8)
            style: dict[str, Any] = {"markersize": 6.5, "markeredgewidth": 1.7, "clip_on": False}
            mark_trial(axes.plot(value, 1, "x", color=color, transform=transform, **style), trial.id)
    if by_value:
        _annotate(axes, "diverged", (0, 1), (-7, 8), ha="right", color=get_css_color("soft"))


def _annotate(axes: Axes, text: str, position: tuple[float, float], shift: tuple[float, float], **style: Any) -> None:
    """Write text at a position in axes coordinates, shifted by pixels."""
    style = {"va": "center", "xycoords": "axes fraction", "annotation_clip": False, **style}
    axes.annotate(text, position, shift, textcoords="offset points", **style)


def _write_response_caption(
    results: Results, losses: Sequence[dict[float, list[float]]], lines: bool, bands: bool
) -> str:
    seeds = {len(group) for by_value in losses for group in by_value.values()}
    parts = ["Each point is a finished trial"]
    if lines:
        parts.append(
            "lines connect means over seeds" if max(seeds) > 1 else "lines connect trials with equal other knobs"
        )
    with_band = [n for n in seeds if n >= analysis.MIN_SEEDS]
    if bands and with_band:
        parts.append(
            f"bands are 95% t intervals over seeds (n = {_describe_range(with_band)}; none below {analysis.MIN_SEEDS} "
            "seeds; arrows mark intervals that extend beyond the axes)"
        )
    if results.counts.get(DIVERGED):
        parts.append("crosses above are trials that diverged")
    return "; ".join(parts) + "."


def _describe_range(numbers: Iterable[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def plot_sensitivities(results: Results) -> ReportFigure | None:
    """Plot the learning-rate sensitivity of each setting of the other knobs, if there are at least two."""
    path, rows = analysis.find_learning_rate(results), analysis.compute_sensitivities(results)[:MAX_SENSITIVITIES]
    if path is None or len(rows) < 2:
        return None
    figure, (axes,) = subplots(WIDE, 30 * len(rows) + 52)
    texts = [describe_setting(row.knobs) for row in rows]
    names = [text if len(text) <= MAX_NAME else text[: MAX_NAME - 1] + "…" for text in texts]
    end = 1.12 * max(max(row.by_seed) for row in rows) or 1.0
    axes.set(xlim=(0, end), ylim=(len(rows) - 0.5, -0.5), xlabel=f"sensitivity, {METRICS[results.metric].unit}")
    axes.set_yticks(range(len(rows)), names, color=get_css_color("ink"))
    color = get_css_color("hue0")
    for place, row in enumerate(rows):
        interval = row.interval
        if interval.n > 1:
            axes.plot([max(interval.low, 0), interval.high], [place] * 2, color=color, linewidth=5, alpha=0.3)
            axes.plot(row.by_seed, [place] * interval.n, "o", color=color, markersize=4, alpha=0.6)
            if interval.high > end:
                draw_arrow(axes, (end, place), ">", color)
        axes.plot(interval.mean, place, "o", color=color, markersize=8.5)
        _annotate(axes, f"{interval.mean:.3f}", (1, place), (8, 0), xycoords=("axes fraction", "data"))
    name = get_knob_names(results.swept)[path]
    title = f"Sensitivity to the {name}"
    seeds, n_rates = [row.interval.n for row in rows], len({trial.knobs[path] for trial in results.trials})
    interval_caption = (
        f", with a 95% t interval over seeds (n = {_describe_range(seeds)}; small dots are seeds; arrows mark "
        "intervals that extend beyond the axis)"
    )
    caption = (
        f"The mean, over the {n_rates} values of the {name}, of the final loss minus the lowest one"
        f"{interval_caption if max(seeds) > 1 else ''}; a diverged trial counts as the loss at initialization "
        "(arXiv 2309.14322). A setting with a low value is robust."
    )
    return ReportFigure(title, caption, to_svg(figure, "sensitivity-", title))


def plot_importance(results: Results) -> ReportFigure | None:
    """Plot how much of the variance of the final loss knobs, interactions and noise explain, summing to 100%."""
    shares = analysis.compute_knob_shares(results)
    if len(results.knobs) < 2 or not shares or len(results.finished) < analysis.MIN_TRIALS:
        return None
    names, pairs = get_knob_names(results.swept), analysis.compute_interaction_shares(results)
    rows = [(names[path], share, "soft" if path == SEED else "hue0") for path, share in shares.items()]
    if len(rows) > MAX_KNOBS:
        others = sum(share for _, share, _ in rows[MAX_KNOBS - 1 :])
        rows[MAX_KNOBS - 1 :] = [(f"{len(rows) - MAX_KNOBS + 1} more knobs", others, "hue0")]
    rows += [("interactions", sum(pairs.values()), "hue3")] if pairs else []
    rows.append(("noise" if pairs else "interactions, noise", analysis.compute_variance_shares(results).rest, "soft"))
    texts, values, variables = zip(*rows, strict=True)
    figure, (axes,) = subplots(NARROW, 34 * len(rows) + 52)
    bars = axes.barh(range(len(rows)), values, 0.56, color=list(map(get_css_color, variables)))
    axes.bar_label(bars, [f"{share:.1%}" for share in values], padding=7, color=get_css_color("soft"))
    axes.grid(False)
    axes.set(xlim=(0, 1), ylim=(len(rows) - 0.5, -0.5), xlabel="share of the variance of the final loss")
    axes.set_yticks(range(len(rows)), texts, color=get_css_color("ink"))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    unknown = [names[path] for path in results.knobs if path not in shares]
    caption = (
        f"Analysis of variance of {len(results.finished)} finished trials by least squares "
        f"({'main effects, then interactions of two knobs' if pairs else 'main effects'}; corrected for chance). "
        "The shares sum to 100%"
        + (f"; {' and '.join(unknown)} cannot be distinguished from noise" if unknown else "")
        + ("." if pairs else "; there are too few trials to distinguish interactions from noise.")
        + (" Noise includes interactions of three and more knobs." if pairs and len(results.knobs) > 2 else "")
    )
    title = "Importance of the knobs"
    return ReportFigure(title, caption, to_svg(figure, "importance-", title), is_wide=False)


def plot_interactions(results: Results) -> ReportFigure | None:
    """Plot, for three or more knobs, the fraction of variance that each pair explains only jointly."""
    shares = analysis.compute_interaction_shares(results)
    knobs = [path for path in analysis.compute_knob_shares(results) if any(path in pair for pair in shares)][:MAX_KNOBS]
    if len(knobs) < 3:
        return None
    n = len(knobs) - 1
    matrix = np.full((n, n), math.nan)
    for row, first in enumerate(knobs[1:]):
        for column, second in enumerate(knobs[: row + 1]):
            matrix[row, column] = shares.get((first, second), shares.get((second, first), math.nan))
    figure, (axes,) = subplots(NARROW, min(52 * n + 120, NARROW))
    strengths = ListedColormap([(*to_rgb(get_css_color("hue0")), alpha) for alpha in np.linspace(0.07, 1, 24)])
    texts = np.where(np.isnan(matrix), "?", np.vectorize(lambda share: f"{share:.0%}")(np.nan_to_num(matrix)))
    texts[np.triu_indices(n, 1)] = ""
    _plot_cells(axes, matrix / max(np.nanmax(matrix), 0.01), texts, strengths, dark_from=0.5)
    names = get_knob_names(results.swept)
    axes.set_aspect("equal", anchor="NW")
    axes.invert_yaxis()
    axes.xaxis.tick_top()
    axes.set_xticks(np.arange(n) + 0.5, [names[path] for path in knobs[:-1]], rotation=30, ha="left")
    axes.set_yticks(np.arange(n) + 0.5, [names[path] for path in knobs[1:]])
    axes.tick_params(labelcolor=get_css_color("ink"))
    caption = (
        "The share of the variance of the final loss that two knobs explain jointly, beyond their separate shares. "
        "Where it is large, the best value of one knob depends on the other."
    )
    title = "Interactions of two knobs"
    return ReportFigure(title, caption, to_svg(figure, "interactions-", title), is_wide=False)


def _plot_cells(axes: Axes, shares: np.ndarray, texts: np.ndarray, colormap: Colormap, dark_from: float) -> None:
    """Draw a heat map of fractions in [0, 1]; labels on dark cells use the background color of the page."""
    axes.pcolormesh(shares, cmap=colormap, vmin=0, vmax=1, edgecolors=get_css_color("paper"), linewidth=3)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    for (row, column), text in np.ndenumerate(texts):
        share = shares[row, column]
        is_dark = share > dark_from if dark_from > 0 else share < -dark_from
        variable = "warn" if text.endswith("×") and math.isnan(share) else "paper" if is_dark else "ink"
        axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", color=get_css_color(variable))


def plot_heat_map(results: Results) -> ReportFigure | None:
    """Plot the final loss over the two knobs that interact most: in cells, or as points if the values are many."""
    pair = next(iter(analysis.compute_interaction_shares(results)), None)
    if pair is None:
        return None
    # The knob with more values is on the longer side.
    across, up = sorted(pair, key=lambda path: -len(_get_scale(results, path).values))
    is_wide = len(results.knobs) > 2
    n_rows = len(_get_scale(results, up).values)
    has_cells = len(_get_scale(results, across).values) <= MAX_CELLS
    names = get_knob_names(results.swept)
    figure, (axes,) = subplots(WIDE if is_wide else NARROW, (min(64 * n_rows, 280) if has_cells else 280) + 86)
    axes.set(title=names[up], xlabel=names[across])
    colors = _make_loss_colors(results)
    if has_cells:
        _plot_mean_losses(axes, results, across, up, colors)
        caption = "Each cell is the mean over the finished trials with its two values; × counts those that diverged"
    else:
        _plot_points(axes, results, across, up, colors)
        caption = "Each point is a finished trial; crosses are trials that diverged"
    _add_colorbar(figure, axes, results, colors)
    share = analysis.compute_interaction_shares(results)[pair]
    together = f"Jointly, the knobs explain {share:.1%} of the variance beyond their separate shares."
    if is_wide:
        together = f"Of all pairs, these two knobs explain most variance beyond their separate shares ({share:.1%})."
    title = f"Final loss by {names[across]} and {names[up]}"
    return ReportFigure(title, f"{caption}. {together}", to_svg(figure, "map-", title), is_wide)


def _make_loss_colors(results: Results) -> ScalarMappable:
    """Return the colors of final losses; those beyond the visible range have the faintest one."""
    low, high = analysis.find_visible_range(results)
    return ScalarMappable(Normalize(low, high if high > low else low + 1.0, clip=True), make_css_colormap("loss"))


def _add_colorbar(figure: Figure, axes: Axes, results: Results, colors: ScalarMappable) -> None:
    low, high = analysis.find_visible_range(results)
    width = figure.get_figwidth() * PIXELS_PER_INCH
    bar = figure.colorbar(colors, ax=axes, location="top", shrink=230 / width, aspect=26, anchor=(0.0, 0.5))
    is_clipped = any(trial.final_loss is not None and trial.final_loss > high for trial in results.finished)
    bar.set_ticks([low, high], labels=[format_loss(low), format_loss(high) + (" and more" if is_clipped else "")])
    bar.set_label(f"final loss, {METRICS[results.metric].unit}")
    bar.outline.set_visible(False)  # type: ignore[operator]
    # Without edges, thin gaps are visible between the colors.
    bar.solids.set_edgecolor("face")  # type: ignore[union-attr]


def _plot_mean_losses(axes: Axes, results: Results, across: str, up: str, colors: ScalarMappable) -> None:
    wide, tall = _get_scale(results, across), _get_scale(results, up)
    shape = len(tall.values), len(wide.values)
    cells: dict[tuple[int, int], list[TrialResult]] = defaultdict(list)
    for trial in results.trials:
        cells[tall.index(trial.knobs[up]), wide.index(trial.knobs[across])].append(trial)
    means, texts = np.full(shape, math.nan), np.full(shape, "", object)
    for cell, trials in cells.items():
        losses = [trial.final_loss for trial in trials if trial.final_loss is not None]
        n_diverged = sum(trial.status == DIVERGED for trial in trials)
        lines = [f"{fmean(losses):.3f}"] if losses else []
        if losses:
            means[cell] = fmean(losses)
        texts[cell] = "\n".join(lines + ([f"{n_diverged} ×"] if n_diverged else []))
    if (WIDE if len(results.knobs) > 2 else NARROW) / len(wide.values) < MIN_CELL_WIDTH:
        texts[:] = ""
    _plot_cells(axes, np.asarray(colors.norm(means)), texts, make_css_colormap("loss"), dark_from=-0.55)
    axes.set_xticks(np.arange(shape[1]) + 0.5, list(map(format_value, wide.values)))
    axes.set_yticks(np.arange(shape[0]) + 0.5, list(map(format_value, tall.values)))


def _plot_points(axes: Axes, results: Results, across: str, up: str, colors: ScalarMappable) -> None:
    wide, tall = _get_scale(results, across), _get_scale(results, up)
    wide.set_axis(axes, "x")
    tall.set_axis(axes, "y")
    axes.grid(False)
    # The best are drawn last.
    trials = sorted(results.trials, key=lambda trial: -math.inf if trial.final_loss is None else -trial.final_loss)
    offsets = [jitter(len(trials), len(scale.values), size) for scale, size in ((wide, NARROW), (tall, 280))]
    for trial, x, y in zip(trials, *offsets, strict=True):
        place = wide.coordinate(trial.knobs[across]), tall.coordinate(trial.knobs[up])
        transform = shift_transform(axes, axes.transData, x, y)
        if trial.final_loss is not None:
            color = colors.to_rgba(np.asarray(trial.final_loss))
            mark_trial(axes.plot(*place, "o", color=color, markersize=8, transform=transform), trial.id)
        elif trial.status == DIVERGED:
            style: dict[str, Any] = {"color": get_css_color("warn"), "markersize": 6, "markeredgewidth": 1.5}
            mark_trial(axes.plot(*place, "x", transform=transform, **style), trial.id)


def plot_parallel_coordinates(results: Results) -> ReportFigure | None:
    """Plot each finished or diverged trial as a line through its value of each knob, the most important knobs last."""
    by_share = [path for path in analysis.compute_knob_shares(results) if path in results.knobs]
    order = [path for path in results.knobs if path not in by_share] + by_share[::-1]
    knobs = order[-MAX_AXES:]
    if len(knobs) < 2:
        return None
    # Equal values are ordered by loss, and the best lines are drawn last.
    trials = sorted(results.finished, key=lambda trial: trial.final_loss or 0.0)
    trials += [trial for trial in results.trials if trial.status == DIVERGED]
    losses = make_scale(trial.final_loss for trial in results.finished)
    scales = [_get_scale(results, path) for path in knobs]
    columns = [
        _spread([scale.axis_fraction(trial.knobs[path]) for trial in trials])
        for path, scale in zip(knobs, scales, strict=True)
    ]
    columns.append(
        [
            DIVERGED_AT if trial.final_loss is None else _inset(losses.axis_fraction(trial.final_loss))
            for trial in trials
        ]
    )
    figure, (axes,) = subplots(WIDE, 440)
    axes.set(xlim=(-0.3, len(knobs) + 0.3), ylim=(0, 1.1 if results.counts.get(DIVERGED) else 1))
    colors = _make_loss_colors(results)
    width = 0.9 if len(trials) > 100 else 1.5
    for trial, heights in reversed(list(zip(trials, zip(*columns, strict=True), strict=True))):
        _plot_parallel_line(axes, trial, heights, colors, width)
    _label_parallel_axes(axes, results, dict(zip(knobs, scales, strict=True)), losses)
    _add_colorbar(figure, axes, results, colors)
    n_hidden = len(order) - len(knobs)
    caption = (
        "Each line is a trial, through its value of each knob to its final loss, and colored by that loss"
        + (f"; {n_hidden} less important knobs are omitted" if n_hidden else "")
        + ("; dashed lines are trials that diverged" if results.counts.get(DIVERGED) else "")
        + ". Lines with equal values are spread slightly."
    )
    title = "All knobs and the final loss"
    return ReportFigure(title, caption, to_svg(figure, "parallel-", title))


def _inset(share: float) -> float:
    """Leave room at both ends of an axis for spread lines."""
    return SPREAD / 2 + (1 - SPREAD) * share


def _spread(shares: Sequence[float]) -> list[float]:
    """Return the heights of lines that cross an axis; those with the same value are side by side, in order."""
    step = SPREAD / max(shares.count(share) for share in shares)
    return [
        _inset(share) + step * (shares[:index].count(share) - (shares.count(share) - 1) / 2)
        for index, share in enumerate(shares)
    ]


def _plot_parallel_line(
    axes: Axes, trial: TrialResult, heights: Sequence[float], colors: ScalarMappable, width: float
) -> None:
    points: list[tuple[float, float]] = [(0, heights[0])]
    for place in range(1, len(heights)):
        points += [(place - 0.5, heights[place - 1]), (place - 0.5, heights[place]), (place, heights[place])]
    curve = Path(points, [Path.MOVETO] + [Path.CURVE4] * (len(points) - 1))
    if trial.final_loss is None:
        style = {"edgecolor": get_css_color("warn"), "linestyle": DASHED, "alpha": 0.7}
    else:
        style = {"edgecolor": colors.to_rgba(np.asarray(trial.final_loss)), "alpha": 0.8}
    mark_trial([axes.add_patch(PathPatch(curve, facecolor="none", linewidth=width, clip_on=False, **style))], trial.id)


def _label_parallel_axes(axes: Axes, results: Results, knobs: dict[str, Scale], losses: Scale) -> None:
    names, last = get_knob_names(results.swept), len(knobs)
    labels = [names[path] for path in knobs] + [METRICS[results.metric].name]
    axes.xaxis.tick_top()
    axes.set_xticks(range(last + 1), labels, color=get_css_color("ink"), fontsize=12.5)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.vlines(range(last + 1), 0, 1, color=get_css_color("soft"), linewidth=1.2, zorder=3)
    background = {"facecolor": get_css_color("paper"), "linewidth": 0, "pad": 1.0, "alpha": 0.8}
    for place, scale in enumerate(knobs.values()):
        for value in scale.tick_values(min_gap=0.05):
            height = _inset(scale.axis_fraction(value))
            _annotate(axes, format_value(value), (place, height), (-8, 0), ha="right", xycoords="data", bbox=background)
    for loss in {losses.values[0], losses.values[-1]}:
        _annotate(axes, format_loss(loss), (last, _inset(losses.axis_fraction(loss))), (8, 0), xycoords="data")
    if results.counts.get(DIVERGED):
        _annotate(axes, "diverged", (last, DIVERGED_AT), (8, 0), xycoords="data", color=get_css_color("warn"))


# In the order of the page.
PLOTS: tuple[Callable[[Results], ReportFigure | list[ReportFigure] | None], ...] = (
    plot_loss_curves,
    plot_responses,
    plot_sensitivities,
    plot_importance,
    plot_interactions,
    plot_heat_map,
    plot_parallel_coordinates,
)


def plot_all(results: Results) -> list[ReportFigure]:
    """Draw every figure that the sweep has data for."""
    figures: list[ReportFigure] = []
    with rc_context(STYLE):
        for plot in PLOTS:
            plotted = plot(results)
            figures += plotted if isinstance(plotted, list) else [plotted] if plotted else []
    return figures
