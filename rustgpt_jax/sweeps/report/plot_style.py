"""Style, scales, colors and SVG output of the report's figures.

Colors are CSS variables, so that one SVG serves a light and a dark page: figures are drawn in placeholder colors, one
for each variable, and `to_svg` replaces them. Artists marked with a trial carry its ID, so that the page can highlight
a trial in all figures at once.
"""

import io
import math
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import ListedColormap, LogNorm, Normalize, SymLogNorm, to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import ScaledTranslation

from rustgpt_jax.config.validation import is_number
from rustgpt_jax.sweeps.report.results import format_value, to_key

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.transforms import Transform

# Widths of figures in pixels.
WIDE, NARROW = 880, 430
PIXELS_PER_INCH = 72

# On a linear axis, a loss that falls by more than this factor looks like a cliff followed by a flat line.
LOG_SCALE_FROM = 8.0
# An axis with more values than this gets round ticks instead of one for each value.
MAX_VALUE_TICKS = 9
# Knobs whose positive values span a smaller factor get a linear axis; smaller values overflow a logarithmic one.
MIN_LOG_FACTOR, MIN_LOG_VALUE = 3.0, 1e-100
# Points are jittered if there are at least this many per value.
JITTER_FROM = 8
GOLDEN_RATIO = 0.6180339887498949

TRIAL_PREFIX = "trial-"

N_SHADES = 24
# The value of each variable on a light and on a dark page. The hues are distinct for color-blind readers.
COLORS = {
    "ink": ("#1d1f24", "#e7e8ea"),
    "soft": ("#696d76", "#9aa0aa"),
    "grid": ("#e3e5e9", "#2e3238"),
    "paper": ("#ffffff", "#15171b"),
    "shade": ("#f5f6f8", "#1d2025"),
    "warn": ("#c2352b", "#ff7a6b"),
    "hue0": ("#2f6db5", "#6ea8ef"),
    "hue1": ("#d95f28", "#f59257"),
    "hue2": ("#1f9078", "#4cc9ac"),
    "hue3": ("#8a56b8", "#bf93ea"),
    "hue4": ("#b8860b", "#e3b94a"),
    "hue5": ("#c2477f", "#f08ab8"),
    "hue6": ("#5a6b2f", "#a9bf6a"),
    "hue7": ("#5b6472", "#a3adbb"),
}
N_HUES = sum(name.startswith("hue") for name in COLORS)
# The range of a colormap, from its strong end to its faint one, that is visible on a light and on a dark page.
COLORMAPS = {
    "loss": ("viridis", (0.05, 0.93), (0.95, 0.22)),
    "knob": ("plasma", (0.0, 0.84), (0.95, 0.33)),
}
VARIABLES = (*COLORS, *(f"{name}{index}" for name in COLORMAPS for index in range(N_SHADES)))


def get_css_color(variable: str) -> str:
    """Return the placeholder color that `to_svg` replaces by a CSS variable."""
    return f"#fe{VARIABLES.index(variable):02x}01"


def get_shade(colormap: str, share: float) -> str:
    """Return the variable at a fraction of the way from the strong end of a colormap to its faint end."""
    return f"{colormap}{round(min(max(share, 0.0), 1.0) * (N_SHADES - 1))}"


def make_css_colormap(name: str) -> ListedColormap:
    """Return a colormap of placeholder colors."""
    return ListedColormap([get_css_color(f"{name}{index}") for index in range(N_SHADES)])


def make_css() -> str:
    """Return the definitions of all variables, for light pages and for readers who prefer dark ones."""
    themes = []
    for theme in range(2):
        values = {name: colors[theme] for name, colors in COLORS.items()}
        for name, (colormap, *ranges) in COLORMAPS.items():
            shades = list(map(to_hex, colormaps[colormap](np.linspace(*ranges[theme], N_SHADES))))
            values |= {f"{name}{index}": color for index, color in enumerate(shades)}
            values[f"{name}-band"] = f"linear-gradient(to right,{','.join(shades)})"
        themes.append("".join(f"--{name}:{value};" for name, value in values.items()))
    light, dark = themes
    return f":root{{color-scheme:light dark;{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"


STYLE: Any = {
    "figure.dpi": PIXELS_PER_INCH,
    "figure.facecolor": "none",
    "figure.constrained_layout.use": True,
    "font.size": 11.5,
    "text.color": get_css_color("ink"),
    "text.parse_math": False,
    "axes.facecolor": "none",
    "axes.edgecolor": get_css_color("soft"),
    "axes.labelcolor": get_css_color("ink"),
    "axes.labelsize": 12.5,
    "axes.titlelocation": "left",
    "axes.titlesize": 12.5,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.spines.left": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": get_css_color("grid"),
    "grid.linewidth": 1.0,
    "legend.frameon": False,
    "lines.markeredgewidth": 0.0,
    **{f"{axis}tick.{which}.size": 0.0 for axis in "xy" for which in ("major", "minor")},
    **{f"{axis}tick.major.pad": 7.0 for axis in "xy"},
    **{f"{axis}tick.labelcolor": get_css_color("soft") for axis in "xy"},
    "svg.fonttype": "none",
}


@dataclass(frozen=True)
class ReportFigure:
    """A figure of the page.

    Attributes:
        title: A short title.
        caption: An explanation of how to read the figure and how it was computed.
        svg: The SVG element.
        is_wide: Whether it takes the full width of the page.
    """

    title: str
    caption: str
    svg: str
    is_wide: bool = True


def subplots(width: float, height: float, n_columns: int = 1) -> tuple[Figure, list["Axes"]]:
    """Create a figure of a size in pixels with axes side by side."""
    figure = Figure(figsize=(width / PIXELS_PER_INCH, height / PIXELS_PER_INCH))
    return figure, list(figure.subplots(1, n_columns, squeeze=False)[0])


@dataclass(frozen=True)
class Scale:
    """The distinct values of a knob in axis order, and how they are spaced.

    `kind` is linear, log, symlog (numbers that include 0, otherwise spaced by ratio) or category (evenly spaced).
    """

    values: tuple[Any, ...]
    kind: str

    @property
    def is_numeric(self) -> bool:
        """True if all values are numbers."""
        return self.kind != "category"

    def index(self, value: Any) -> int:
        """Return the number of values that precede this one."""
        return self._indices[to_key(value)]

    @cached_property
    def _indices(self) -> dict[str, int]:
        return {to_key(value): index for index, value in enumerate(self.values)}

    def coordinate(self, value: Any) -> float:
        """Return the data coordinate of a value: a number itself, anything else its index."""
        return float(value) if self.is_numeric else float(self.index(value))

    def axis_fraction(self, value: Any) -> float:
        """Return the position of a value on the axis, from 0 to 1."""
        return float(self._norm(self.coordinate(value))) if len(self.values) > 1 else 0.5

    @property
    def _linthresh(self) -> float:
        return min(value for value in self.values if value > 0)

    @cached_property
    def _norm(self) -> Normalize:
        limits = self.coordinate(self.values[0]), self.coordinate(self.values[-1])
        if self.kind == "symlog":
            return SymLogNorm(self._linthresh, 0.9, *limits, base=10)
        return LogNorm(*limits) if self.kind == "log" else Normalize(*limits)

    def tick_values(self, min_gap: float) -> list[Any]:
        """Return the values to label: all if they are few, else evenly spaced ones; none closer than `min_gap`."""
        if self.is_numeric and len(self.values) > MAX_VALUE_TICKS:
            return [float(f"{value:.2g}") for value in self._norm.inverse(np.linspace(0, 1, 5))]
        kept: list[Any] = []
        for value in self.values:
            if not kept or self.axis_fraction(value) - self.axis_fraction(kept[-1]) >= min_gap:
                kept.append(value)
        return kept

    def set_axis(self, axes: "Axes", which: str) -> None:
        """Set the scale, the ticks and the range of the "x" or "y" axis."""
        options = {"linthresh": self._linthresh, "linscale": 0.9} if self.kind == "symlog" else {}
        axes.set(**{f"{which}margin": 0.06})
        getattr(axes, f"set_{which}scale")("linear" if self.kind == "category" else self.kind, **options)
        axis = axes.xaxis if which == "x" else axes.yaxis
        axis.set_major_formatter(FuncFormatter(lambda value, _: format_value(float(value))))
        if self.kind == "log":
            axis.set_major_locator(LogLocator(subs=(1.0, 3.0), numticks=6))
        if not self.is_numeric or len(self.values) <= MAX_VALUE_TICKS:
            ticks = self.tick_values(0.1 if which == "x" else 0.06)
            axis.set_ticks(list(map(self.coordinate, ticks)), labels=list(map(format_value, ticks)))
        axis.set_minor_locator(NullLocator())
        ends = np.array([self.coordinate(self.values[0]), self.coordinate(self.values[-1])])
        axes.update_datalim(np.stack([ends, ends], 1), updatex=which == "x", updatey=which == "y")
        axes.autoscale_view(scalex=which == "x", scaley=which == "y")


def make_scale(values: Iterable[Any]) -> Scale:
    """Return an axis scale suited to a knob's values, which may contain duplicates."""
    distinct = {to_key(value): value for value in values}.values()
    if not all(is_number(value) for value in distinct):
        return Scale(tuple(distinct), "category")
    ordered = tuple(sorted(distinct))
    kind = "linear" if not _is_spaced_by_ratio(ordered) else "log" if ordered[0] > 0 else "symlog"
    return Scale(ordered, kind)


def _is_spaced_by_ratio(values: tuple[float, ...]) -> bool:
    """Return whether the median positive value is closer to the geometric mean than to the arithmetic mean."""
    positive = [value for value in values if value > 0]
    if values[0] < 0 or len(positive) < 2 or positive[0] < MIN_LOG_VALUE or positive[-1] / positive[0] < MIN_LOG_FACTOR:
        return False
    logarithms = list(map(math.log, positive))
    arithmetic = math.log(fmean(positive))
    return abs(median(logarithms) - fmean(logarithms)) < abs(median(logarithms) - arithmetic)


@dataclass(frozen=True)
class KnobColors:
    """The color of each value of a knob."""

    title: str
    scale: Scale

    def css_variable(self, value: Any) -> str:
        """Return the CSS variable of a value: a separate hue, or a shade if the values are numbers.

        Shades follow the rank of the values, not their distance, so that close values remain distinguishable.
        """
        index = self.scale.index(value)
        if not self.scale.is_numeric:
            return f"hue{min(index, N_HUES - 1)}"
        return get_shade("knob", index / max(len(self.scale.values) - 1, 1))

    def add_legend(self, figure: Figure) -> None:
        """Add a legend of the values, or of a subset if there are many."""
        values, n_values = self.scale.values, len(self.scale.values)
        if self.scale.is_numeric and n_values > N_HUES:
            values = tuple(values[round(index)] for index in np.linspace(0, n_values - 1, N_HUES - 2))
        entries = [(self.css_variable(value), format_value(value)) for value in values]
        if len(entries) > N_HUES:
            entries[N_HUES - 1 :] = [(entries[-1][0], f"{len(entries) - N_HUES + 1} others")]
        add_legend(figure, self.title, entries)


def add_legend(figure: Figure, title: str, entries: Sequence[tuple[str, str]]) -> None:
    """Add a legend above the axes, from the CSS variable and text of each entry."""
    width = figure.get_figwidth() * PIXELS_PER_INCH
    n_columns = min(max(int(width / (6.3 * max(len(text) for _, text in entries) + 32)), 1), len(entries))
    # Matplotlib fills columns first.
    by_row = [entry for column in range(n_columns) for entry in entries[column::n_columns]]
    figure.legend(
        [Line2D([], [], color=get_css_color(variable), linewidth=4) for variable, _ in by_row],
        [text for _, text in by_row],
        title=title,
        ncols=n_columns,
        loc="outside upper left",
        alignment="left",
        handlelength=1.0,
        columnspacing=1.2,
        labelcolor=get_css_color("soft"),
    )


def set_loss_axis(axes: "Axes", losses: Iterable[float]) -> None:
    """Fit the y axis to losses, logarithmic if they span a large factor."""
    losses = list(losses)
    low, high = min(losses), max(losses)
    if low > 0 and high / LOG_SCALE_FROM > low:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{loss:g}"))
        # Work with logarithms: the ratio of losses near the float64 limits would overflow.
        margin = math.exp(0.06 * (math.log(high) - math.log(low)))
        axes.set_ylim(max(low / margin, math.ulp(0.0)), min(high * margin, sys.float_info.max))
    else:
        margin = 0.07 * (high - low) or 0.05 * abs(high) or 1.0
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
        axes.set_ylim(low - margin, high + margin)
        axes.ticklabel_format(axis="y", useOffset=False)


def draw_arrow(axes: "Axes", position: tuple[float, float], direction: str, color: str) -> None:
    """Draw an arrow at the edge of the axes, pointing ("<", ">", "^" or "v") at data that is outside."""
    axes.plot(*position, direction, color=color, markersize=7, alpha=0.7, clip_on=False)


def jitter(n_points: int, n_values: int, width: float) -> np.ndarray:
    """Return offsets in pixels that separate points with the same value, or zeros if few share one."""
    if n_points < JITTER_FROM * n_values:
        return np.zeros(n_points)
    # Multiples of the golden ratio fill an interval evenly, for any number of points.
    return min(0.4 / n_values, 0.08) * width * (np.arange(n_points) * GOLDEN_RATIO % 1 - 0.5)


def shift_transform(axes: "Axes", transform: "Transform", x: float, y: float = 0.0) -> "Transform":
    """Return a transform followed by a shift in pixels."""
    return transform + ScaledTranslation(x / PIXELS_PER_INCH, y / PIXELS_PER_INCH, axes.figure.dpi_scale_trans)


def mark_trial(artists: Iterable["Artist"], trial: str) -> None:
    """Mark artists as belonging to a trial."""
    for artist in artists:
        artist.set_gid(TRIAL_PREFIX + trial)
        artist.set_in_layout(False)


def to_svg(figure: Figure, prefix: str, description: str) -> str:
    """Return a figure as an inline SVG element that can share a page with others.

    Text stays text in the page's font, colors become CSS variables, and trial marks become `data-trial` attributes.

    Args:
        figure: The figure.
        prefix: The beginning of every ID in the SVG.
        description: The text for screen readers.
    """
    file = io.StringIO()
    with rc_context({"svg.hashsalt": prefix}):
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None, "Creator": None})
    width, height = figure.get_size_inches() * PIXELS_PER_INCH
    head = f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{description}">'
    svg = re.sub(r"(?s)^.*?<svg.*?>|<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", file.getvalue())
    # Prefix the IDs that are referenced, remove the others, and turn those of trials into attributes.
    svg = svg.replace("xlink:href", "href")
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
    svg = re.sub(r'((?:href="|url\()#)', rf"\g<1>{prefix}", svg)
    svg = re.sub(rf' id="{TRIAL_PREFIX}([^"]*)"', r' data-trial="\1"', svg)
    svg = re.sub(r' id="([^"]*)"', lambda match: f' id="{prefix}{match[1]}"' if match[1] in used else "", svg)
    # Round coordinates to a hundredth of a pixel, and remove fonts and whitespace between elements.
    svg = re.sub(r' transform="rotate\(-?0 [^"]*"|font-family: [^"]*?sans-serif; ', "", svg)
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), svg)
    svg = re.sub(r"> <", "><", re.sub(r"\s*\n\s*", " ", svg)).replace("<defs></defs>", "").replace("<defs/>", "")
    return head + re.sub(r"#fe([0-9a-f]{2})01", lambda match: f"var(--{VARIABLES[int(match[1], 16)]})", svg)
