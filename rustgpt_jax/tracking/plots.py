"""Loss plots of one run or several, drawn from metrics.jsonl."""

import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rustgpt_jax.atomic_io import write_atomically
from rustgpt_jax.config.validation import MAX_NUMBER
from rustgpt_jax.errors import UserError
from rustgpt_jax.tracking.metric_writer import Columns, read_columns
from rustgpt_jax.workdir.run_dir import RunDir

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRAIN_LOSS, VALID_LOSS = "train/loss", "valid/loss"

# Two hues that color-blind readers can tell apart, and grays from dark to light.
TRAIN_COLOR, VALID_COLOR = "#2f6db5", "#d95f28"
INK, SOFT_INK, GRID, SHADE = "#222222", "#757575", "#e4e4e4", "#f4f5f8"
# Colors of several runs, which color-blind readers can tell apart (Okabe and Ito, jfly.uni-koeln.de/color).
RUN_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#222222")
# The labels of more runs would not fit beside the curves.
MAX_RUNS = 20
MAX_NAME = 26

# The axis is logarithmic if the loss falls by more than this factor.
LOG_SCALE_FROM = 8.0
# Width of the smoothing window, as a fraction of a stage's points.
SMOOTHING_SHARE = 0.1
# Maximum number of points per line, far more than the width of the plot in pixels.
MAX_POINTS = 20_000
# Height of a label in points, 1/72 inch.
LABEL_HEIGHT, RUN_LABEL_HEIGHT = 34.0, 13.0
DPI = 160
# Markers are not clipped by the frame.
POINT: dict[str, Any] = {"marker": "o", "markersize": 5.5, "markeredgecolor": "white", "clip_on": False, "zorder": 3}
RING: dict[str, Any] = {
    **POINT,
    "color": "white",
    "markersize": 8,
    "markeredgecolor": VALID_COLOR,
    "markeredgewidth": 1.8,
}
BOLD: dict[str, Any] = {"fontsize": 10.5, "weight": "bold"}
SMALL: dict[str, Any] = {"fontsize": 8.5, "color": SOFT_INK}
# Names of stages shorter than this fraction of the run are written vertically.
NARROW_STAGE = 0.1


@dataclass(frozen=True)
class Curve:
    """The finite values of one metric in one stage, and the steps they belong to."""

    stage: str
    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Label:
    """The label at the right end of a curve: text next to its last value, and a remark below."""

    value: float
    text: str
    remark: str
    color: str


def draw_loss_curves(folder: Path) -> Path:
    """Draw training and validation loss, in nats per token, as loss.png in the folder of a run.

    Returns:
        The path of the plot.

    Raises:
        UserError: The run has not recorded a finite loss yet.
    """
    from matplotlib.figure import Figure

    columns = [read_columns(folder, name) for name in (TRAIN_LOSS, VALID_LOSS)]
    train, valid = (_split_stages(*each) for each in zip(columns, (TRAIN_LOSS, VALID_LOSS), strict=True))
    if not train and not valid:
        raise UserError(f"{folder} has no loss to draw yet.")
    figure = Figure(figsize=(9.6, 5.4), dpi=DPI, facecolor="white")
    axes = figure.add_axes((0.07, 0.115, 0.735, 0.745))
    _style_axes(axes, _replace_surrogates(folder.resolve().name), train + valid)
    _draw_stages(axes, max(columns, key=lambda each: len(each.steps)))
    labels = _draw_train(axes, train) + _draw_valid(axes, valid)
    _write_labels(axes, labels)
    target = RunDir(folder).loss_png
    _write_png(figure, target)
    return target


def draw_runs(folders: Sequence[Path], file: Path) -> None:
    """Draw the loss curves of several runs, at most MAX_RUNS, in one PNG file.

    Raises:
        UserError: No run has recorded a finite loss, or the file cannot be written.
    """
    from matplotlib.figure import Figure

    found = {
        folder: [_split_stages(read_columns(folder, name), name) for name in (TRAIN_LOSS, VALID_LOSS)]
        for folder in folders
    }
    found = {folder: curves for folder, curves in found.items() if any(curves)}
    if not found:
        raise UserError("None of these runs has a loss to draw yet.")
    figure = Figure(figsize=(9.6, 5.4), dpi=DPI, facecolor="white")
    axes = figure.add_axes((0.07, 0.115, 0.655, 0.745))
    title = " and ".join(folder.name for folder in found) if len(found) <= 2 else f"{len(found)} runs"
    every = [curve for kinds in found.values() for curves in kinds for curve in curves]
    _style_axes(axes, _replace_surrogates(title), every, "loss, nats per token: validation, and training (thin)")
    labels = list[Label]()
    for (folder, (train, valid)), color in zip(found.items(), cycle(RUN_COLORS)):
        for curve in train:
            positions = _spaced_positions(curve)
            means = _smooth(curve.values, positions)
            axes.plot(curve.steps[positions], means, color=color, linewidth=1.0, alpha=0.6)
        for curve in valid:
            axes.plot(curve.steps, curve.values, color=color, linewidth=1.8, **POINT)
        last = float(valid[-1].values[-1]) if valid else float(means[-1])
        labels.append(Label(last, f"{_shorten(_replace_surrogates(folder.name))} {last:.3f}", "", color))
    _write_run_labels(axes, labels)
    _write_png(figure, file)


def _write_png(figure: "Figure", file: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    png = io.BytesIO()
    with warnings.catch_warnings():
        # Letters that the font lacks are drawn as boxes.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        # Without the version of matplotlib, the same metrics give the same bytes.
        FigureCanvasAgg(figure).print_png(png, metadata={"Software": None})
    write_atomically(file, png.getvalue())


def _split_stages(columns: Columns, name: str) -> list[Curve]:
    """Return the curve of a metric in each stage, without values that are not finite or too large to plot."""
    values = columns.values[name]
    is_drawn = (values <= MAX_NUMBER) & (values >= -MAX_NUMBER)
    steps, stages = columns.steps, columns.stages
    if not is_drawn.all():
        steps, stages, values = steps[is_drawn], stages[is_drawn], values[is_drawn]
    parts = zip(*(np.split(each, _stage_starts(stages)) for each in (steps, stages, values)), strict=True)
    return [Curve(columns.stage_names[stage[0]], steps, values) for steps, stage, values in parts if len(steps)]


def _stage_starts(stages: np.ndarray) -> np.ndarray:
    """Return the positions at which a new stage begins."""
    return np.flatnonzero(np.diff(stages)) + 1


def _downsample(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Downsample a line, keeping the minimum and maximum of each interval so that it looks the same."""
    if len(steps) <= MAX_POINTS:
        return steps, values
    starts = np.linspace(0, len(steps), MAX_POINTS // 2, endpoint=False).astype(int)
    lowest, highest = np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)
    return np.repeat(steps[starts], 2), np.stack([lowest, highest], axis=1).ravel()


def _smooth(values: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Return a running mean at some positions of a curve.

    The window is centered, so that the mean does not lag, and shrinks where the values begin or end.
    """
    # The window shrinks on both sides at the steep beginning, and on one side at the end, where noise matters more.
    before = np.minimum(positions, int(len(values) * SMOOTHING_SHARE / 2))
    after = np.minimum(before, len(values) - 1 - positions)
    sums = np.zeros(len(values) + 1)
    np.cumsum(values, out=sums[1:])
    return (sums[positions + after + 1] - sums[positions - before]) / (before + after + 1)


def _spaced_positions(curve: Curve) -> np.ndarray:
    """Return the positions of at most MAX_POINTS evenly spaced values of a curve."""
    n_values = len(curve.values)
    return np.linspace(0, n_values - 1, min(n_values, MAX_POINTS)).round().astype(int)


def _style_axes(axes: "Axes", title: str, curves: list[Curve], subtitle: str = "loss, nats per token") -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    lowest = min(curve.values.min() for curve in curves)
    highest = max(curve.values.max() for curve in curves)
    if lowest > 0 and highest / lowest > LOG_SCALE_FROM:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlim(0, max(curve.steps[-1] for curve in curves) or 1)
    axes.margins(y=0.08)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(SOFT_INK)
    axes.tick_params(which="both", length=0, labelsize=9.5, labelcolor=SOFT_INK, pad=6)
    axes.set_xlabel("step", color=SOFT_INK, fontsize=10)
    heading: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "parse_math": False}
    axes.annotate(title, (0, 1), (0, 30), color=INK, fontsize=14, weight="bold", **heading)
    axes.annotate(subtitle, (0, 1), (0, 13), color=SOFT_INK, fontsize=10, **heading)


def _replace_surrogates(name: Any) -> str:
    """Return a name without surrogates, which represent bytes of a file name that are not UTF-8."""
    return str(name).encode(errors="replace").decode()


def _draw_stages(axes: "Axes", columns: Columns) -> None:
    lasts = [*(_stage_starts(columns.stages) - 1), -1]
    groups = [(columns.stage_names[columns.stages[last]], columns.steps[last]) for last in lasts]
    if len(groups) < 2:
        return
    ends = [0, *(end for _, end in groups)]
    for place, ((stage, _), (start, end)) in enumerate(zip(groups, pairwise(ends), strict=True)):
        if place % 2:
            axes.axvspan(start, end, color=SHADE, linewidth=0, zorder=0)
        narrow = end - start < NARROW_STAGE * ends[-1]
        axes.annotate(
            _replace_surrogates(stage), ((start + end) / 2, 1), (0, -5), axes.get_xaxis_transform(), "offset points",
            rotation=90 if narrow else 0, ha="center", va="top", color=SOFT_INK, fontsize=9.5, parse_math=False,
        )  # fmt: skip


def _draw_train(axes: "Axes", curves: list[Curve]) -> list[Label]:
    last = math.nan
    for curve in curves:
        axes.plot(*_downsample(curve.steps, curve.values), color=TRAIN_COLOR, linewidth=0.7, alpha=0.35)
        positions = _spaced_positions(curve)
        means = _smooth(curve.values, positions)
        axes.plot(curve.steps[positions], means, color=TRAIN_COLOR, linewidth=2, solid_capstyle="round")
        last = float(means[-1])
    return [Label(last, f"train {last:.3f}", "smoothed", TRAIN_COLOR)] if curves else []


def _draw_valid(axes: "Axes", curves: list[Curve]) -> list[Label]:
    for curve in curves:
        axes.plot(curve.steps, curve.values, color=VALID_COLOR, linewidth=1.6, **POINT)
    if not curves:
        return []
    steps, values = curves[-1].steps, curves[-1].values
    best = int(values.argmin())
    remark = "best so far"
    if best < len(values) - 1:
        remark = f"best {values[best]:.3f} at step {steps[best]:,}"
        axes.plot(steps[best], values[best], **RING)
    return [Label(float(values[-1]), f"validation {values[-1]:.3f}", remark, VALID_COLOR)]


def _write_labels(axes: "Axes", labels: list[Label]) -> None:
    """Label each curve at its end, without overlapping the other label or the numbers below the axis."""
    axes.autoscale_view()
    lowest = axes.bbox.y0 * 72 / DPI + LABEL_HEIGHT / 2
    for label in sorted(labels, key=lambda label: label.value):
        end = axes.transData.transform((0, label.value))[1] * 72 / DPI
        height = max(end, lowest)
        lowest = height + LABEL_HEIGHT
        for text, down, font in ((label.text, 0.0, BOLD), (label.remark, 12.5, SMALL)):
            axes.annotate(
                text, (1, label.value), (12, height - end - down), axes.get_yaxis_transform(), "offset points",
                va="center", **{"color": label.color, **font},
            )  # fmt: skip


def _write_run_labels(axes: "Axes", labels: list[Label]) -> None:
    """Label each run at the end of its curve, moving labels apart that would overlap."""
    axes.autoscale_view()
    labels = sorted(labels, key=lambda label: label.value)
    ends = [axes.transData.transform((0, label.value))[1] * 72 / DPI for label in labels]
    heights, lowest = [], -math.inf
    for end in ends:
        heights.append(max(end, lowest))
        lowest = heights[-1] + RUN_LABEL_HEIGHT
    # Push the labels that would be above the plot down.
    highest = axes.bbox.y1 * 72 / DPI
    for place in reversed(range(len(heights))):
        heights[place] = min(heights[place], highest)
        highest = heights[place] - RUN_LABEL_HEIGHT
    for label, end, height in zip(labels, ends, heights, strict=True):
        axes.annotate(
            label.text, (1, label.value), (12, height - end), axes.get_yaxis_transform(), "offset points",
            va="center", fontsize=9, color=label.color, parse_math=False,
        )  # fmt: skip


def _shorten(name: str) -> str:
    """Shorten a name that would not fit beside the plot, keeping both ends."""
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME // 2]}…{name[-MAX_NAME // 2 :]}"
