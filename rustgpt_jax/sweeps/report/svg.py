"""Paper and pen: figures measured in pixels of the page, drawn by matplotlib without a display, given as inline SVG.

A mark of a trial carries the trial's ID, so that the page can light up all marks of one trial together.
"""

import io
import math
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from rustgpt_jax.sweeps.report.labels import value_text
from rustgpt_jax.sweeps.report.results import is_number, key_of

# Where the values of a knob stand on an axis: numbers by size or by ratio, all else side by side.

# More values than this get round ticks instead of one each.
MOST_OWN_TICKS = 9
# Positive values that span a smaller factor stand by their size.
LEAST_FACTOR = 3.0

# Points are spread over this share of the way to the next value, and of the whole axis, where there are at least so
# many for each value.
POINT_SPREAD, MARGIN_SPREAD, POINTS_UNSPREAD = 0.45, 0.1, 8
GOLDEN = 0.6180339887498949

Tick = tuple[float, str]


@dataclass(frozen=True)
class Scale:
    """The distinct values of a knob in their order, and whether they are numbers, and spaced by ratio."""

    values: tuple[Any, ...]
    is_numeric: bool
    is_log: bool

    def place(self, value: Any) -> float:
        """The coordinate of a value. On a scale of ratios, 0 stands one step before the smallest positive value."""
        if not self.is_numeric:
            return float(self.index(value))
        if not self.is_log:
            return float(value)
        return math.log10(value) if value > 0 else self._place_of_zero

    def index(self, value: Any) -> int:
        """Return the number of values that precede this one."""
        return self._indices[key_of(value)]

    @cached_property
    def _indices(self) -> dict[str, int]:
        return {key_of(value): index for index, value in enumerate(self.values)}

    @cached_property
    def _place_of_zero(self) -> float:
        positive = [value for value in self.values if value > 0]
        step = math.log10(positive[-1] / positive[0]) / max(len(positive) - 1, 1)
        return math.log10(positive[0]) - min(step, 1.0)

    @cached_property
    def low(self) -> float:
        """The first coordinate."""
        return self.place(self.values[0])

    @cached_property
    def high(self) -> float:
        """The last coordinate."""
        return self.place(self.values[-1])

    def spread(self, n: int) -> list[float]:
        """How far aside to put each of n points so that those with one value do not hide each other, where many do."""
        places = sorted(self.place(value) for value in self.values)
        if n < POINTS_UNSPREAD * len(places):
            return [0.0] * n
        nearest = min((second - first for first, second in pairwise(places)), default=1.0)
        room = min(POINT_SPREAD * nearest, MARGIN_SPREAD * (self.high - self.low) or 1.0)
        # Multiples of the golden ratio fill an interval evenly, however many they are.
        return [room * (index * GOLDEN % 1 - 0.5) for index in range(n)]

    def ticks(self, least_gap: float) -> list[Tick]:
        """Coordinates and texts, at the values themselves if they are few, none nearer than a share of the axis."""
        if not self.is_numeric or len(self.values) <= MOST_OWN_TICKS:
            wanted = [(self.place(value), value_text(value)) for value in self.values]
        else:
            wanted = self._round_ticks()
        kept: list[Tick] = []
        for place, text in wanted:
            if not kept or place - kept[-1][0] >= least_gap * (self.high - self.low):
                kept.append((place, text))
        return kept

    def _round_ticks(self) -> list[Tick]:
        from matplotlib.ticker import MaxNLocator

        if not self.is_log:
            places = MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]).tick_values(self.low, self.high)
            return [(place, value_text(float(place))) for place in places if self._covers(place)]
        decades = range(math.floor(self.low), math.ceil(self.high) + 1)
        heads = (1,) if self.high - self.low > 2 else (1, 3)
        values = [head * 10.0**decade for decade in decades for head in heads]
        zero = [(self.low, "0")] if self.values[0] == 0 else []
        return zero + [(math.log10(value), value_text(value)) for value in values if self._covers(math.log10(value))]

    def _covers(self, place: float) -> bool:
        """Whether a tick lies between the ends, or so near to one that the axis still has room for it."""
        room = 0.04 * (self.high - self.low)
        return self.low - room <= place <= self.high + room


def scale_of(values: Iterable[Any]) -> Scale:
    """The scale that fits some values of a knob, in which there may be repetitions."""
    distinct = {key_of(value): value for value in values}.values()
    numeric = all(is_number(value) for value in distinct)
    own = tuple(sorted(distinct)) if numeric else tuple(distinct)
    return Scale(own, numeric, numeric and _is_spaced_by_ratio(own))


def _is_spaced_by_ratio(values: tuple[float, ...]) -> bool:
    """Whether the middle of the positive values is nearer to their geometric mean than to their arithmetic mean."""
    positive = [value for value in values if value > 0]
    if values[0] < 0 or len(positive) < 2 or positive[-1] / positive[0] < LEAST_FACTOR:
        return False
    logarithms = list(map(math.log, positive))
    arithmetic = math.log(fmean(positive))
    return abs(median(logarithms) - fmean(logarithms)) < abs(median(logarithms) - arithmetic)


# The colours of the figures, which are names until a page is shown: light paper and dark paper have their own.
#
# Figures are drawn in stand-in colours, one for each name. In the SVG they become `var(--NAME)`, and `css` defines
# these variables for both papers.

N_SHADES = 24

# By name, on light and on dark paper. The hues stay apart for colour-blind readers.
PLAIN = {
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
N_HUES = sum(name.startswith("hue") for name in PLAIN)
# The part of a colour map from its strong end to its faint one, which must still show on the paper.
MAPS = {
    "loss": ("viridis", (0.05, 0.93), (0.95, 0.22)),
    "knob": ("plasma", (0.0, 0.84), (0.95, 0.33)),
}
NAMES = (*PLAIN, *(f"{name}{shade}" for name in MAPS for shade in range(N_SHADES)))


def css_placeholder(name: str) -> str:
    """The colour to draw with in place of a named one."""
    return f"#fe{NAMES.index(name):02x}01"


def use_css_variables(svg: str) -> str:
    """An SVG with each stand-in replaced by the variable of its name."""
    return re.sub(r"#fe([0-9a-f]{2})01", lambda match: f"var(--{NAMES[int(match[1], 16)]})", svg)


def css() -> str:
    """The definitions of all the variables, for light paper and, where the reader prefers it, for dark."""
    light, dark = (_declarations(paper) for paper in range(2))
    return f":root{{color-scheme:light dark;{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"


def _declarations(paper: int) -> str:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    values = {name: colours[paper] for name, colours in PLAIN.items()}
    for name, (colour_map, *ranges) in MAPS.items():
        strong, faint = ranges[paper]
        for shade in range(N_SHADES):
            place = strong + (faint - strong) * shade / (N_SHADES - 1)
            values[f"{name}{shade}"] = to_hex(colormaps[colour_map](place))
        shades = ",".join(values[f"{name}{shade}"] for shade in range(N_SHADES))
        values[f"{name}-band"] = f"linear-gradient(to right,{shades})"
    return "".join(f"--{name}:{value};" for name, value in values.items())


@dataclass(frozen=True)
class Key:
    """What the colours of a figure mean: a swatch and a text for each, or a band of a `gradient` between two texts."""

    title: str
    entries: tuple[tuple[str, str], ...]
    gradient: str | None = None


@dataclass(frozen=True)
class Coloring:
    """The colour of each value of a knob."""

    title: str
    scale: Scale

    def name(self, value: Any) -> str:
        """Return the color name of a value: a separate hue, or a shade if the values are numeric.

        Shades follow the rank of the values, not their distance, so that close values remain distinguishable.
        """
        place = self.scale.index(value)
        if not self.scale.is_numeric:
            return f"hue{min(place, N_HUES - 1)}"
        return shade("knob", place / max(len(self.scale.values) - 1, 1))

    def __call__(self, value: Any) -> str:
        return css_placeholder(self.name(value))

    @property
    def key(self) -> Key:
        """The values and their colours, or the first and the last where they are many."""
        values = self.scale.values
        if self.scale.is_numeric and len(values) > N_HUES:
            return Key(f"{self.title}, in order", (("", value_text(values[0])), ("", value_text(values[-1]))), "knob")
        entries = [(self.name(value), value_text(value)) for value in values]
        if len(entries) > N_HUES:
            entries[N_HUES - 1 :] = [(entries[-1][0], f"{len(entries) - N_HUES + 1} others")]
        return Key(self.title, tuple(entries))


def shade(colour_map: str, share: float) -> str:
    """The name of the shade at a share of the way from the strong end of a map to the faint one."""
    return f"{colour_map}{round(min(max(share, 0.0), 1.0) * (N_SHADES - 1))}"


if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# In pixels: one point of matplotlib is one pixel of the page.
WIDE, NARROW = 880.0, 430.0
LEFT, TOP, RIGHT, BOTTOM = 60.0, 34.0, 14.0, 52.0
FONT_SIZE, SMALL_FONT_SIZE = 12.5, 11.5
PIXELS_PER_INCH = 72

# Of a letter, with room to spare: pages have fonts of their own.
LETTER_WIDTH = 7.4

# On a linear axis, a loss that falls by more than this factor is a cliff and a floor.
LOG_SCALE_FROM = 8.0

TRIAL = "trial-"

# From the left and the top of a figure, then width and height, in pixels.
Rectangle = tuple[float, float, float, float]


@dataclass(frozen=True)
class Picture:
    """A figure of the page: what it shows in a few words, how that was computed, its SVG, its keys, its width."""

    title: str
    caption: str
    svg: str
    keys: tuple[Key, ...] = ()
    is_wide: bool = True


def blank(width: float, height: float) -> "Figure":
    """An empty, transparent figure of a size in pixels."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width / PIXELS_PER_INCH, height / PIXELS_PER_INCH), dpi=PIXELS_PER_INCH, facecolor="none")


def panel(figure: "Figure", rectangle: Rectangle, title: str, label: str) -> "Axes":
    """Axes in a rectangle of a figure, with a title at the top of the figure and a label under the horizontal one."""
    left, top, width, height = rectangle
    whole_width, whole_height = figure.get_size_inches() * PIXELS_PER_INCH
    place = (left / whole_width, 1 - (top + height) / whole_height, width / whole_width, height / whole_height)
    axes = figure.add_axes(place, facecolor="none")
    axes.grid(axis="y", color=css_placeholder("grid"), linewidth=1)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(css_placeholder("soft"))
    axes.tick_params(which="both", length=0, labelsize=SMALL_FONT_SIZE, labelcolor=css_placeholder("soft"), pad=7)
    axes.set_xlabel(label, color=css_placeholder("ink"), fontsize=FONT_SIZE, labelpad=7)
    write(axes, title, (0, 1), (0, top - FONT_SIZE - 3), fontsize=FONT_SIZE)
    return axes


def write(axes: "Axes", text: str, place: tuple[float, float], shift: tuple[float, float], **style: Any) -> None:
    """Write a text at a place given in shares of the axes, moved by so many pixels."""
    plain: dict[str, Any] = {"color": css_placeholder("ink"), "fontsize": SMALL_FONT_SIZE, "xycoords": "axes fraction"}
    axes.annotate(text, place, shift, textcoords="offset points", annotation_clip=False, **(plain | style))


def show_losses(axes: "Axes", losses: Iterable[float]) -> None:
    """Let the vertical axis hold some losses with a margin, logarithmic where they span a large factor."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    losses = list(losses)
    low, high = min(losses), max(losses)
    if low > 0 and high / LOG_SCALE_FROM > low:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{loss:g}"))
        # Work with logarithms: the ratio of losses near the float64 limits would overflow.
        margin = math.exp(0.06 * (math.log(high) - math.log(low)))
        axes.set_ylim(max(low / margin, math.ulp(0.0)), min(high * margin, sys.float_info.max))
    else:
        margin = 0.07 * (high - low) or 0.05 * abs(high) or 1.0
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
        axes.set_ylim(low - margin, high + margin)
        axes.ticklabel_format(axis="y", useOffset=False)


def show_beyond(axes: "Axes", place: tuple[float, float], direction: str, color: str) -> None:
    """Draw an arrow at the edge of the axes, pointing ("<", ">", "^" or "v") at data that lies outside."""
    axes.plot(*place, direction, color=color, markersize=7, markeredgewidth=0, alpha=0.7, clip_on=False)


def show_knob(axes: "Axes", scale: Scale, width: float) -> None:
    """Let the horizontal axis, so many pixels wide, hold the values of a knob."""
    ticks = scale.ticks(least_gap=46 / width)
    axes.set_xticks([place for place, _ in ticks], [text for _, text in ticks])
    margin = 0.06 * (scale.high - scale.low) or 0.5
    axes.set_xlim(scale.low - margin, scale.high + margin)


def show_steps(axes: "Axes", last: int) -> None:
    """Let the horizontal axis hold the steps of a run."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_xlim(0, last or 1)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))


def name_column(names: Iterable[str]) -> float:
    """The width in pixels that names beside an axis take."""
    return 24 + LETTER_WIDTH * max(map(len, names))


def mark(artists: "Artist | Iterable[Artist]", trial: str) -> None:
    """Say that some lines, points or patches belong to a trial."""
    for artist in artists if isinstance(artists, Iterable) else (artists,):
        artist.set_gid(TRIAL + trial)


def to_svg(figure: "Figure", prefix: str, description: str) -> str:
    """The figure as an SVG element that can stand in a page beside others: `prefix` begins every ID in it.

    Its texts are texts in the page's font, its colours variables of the page, and each element of a trial has the
    trial's ID as `data-trial`.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)
    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix}):
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None, "Creator": None})
    width, height = figure.get_size_inches() * PIXELS_PER_INCH
    head = f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{description}">'
    body = re.sub(r"(?s)^.*?<svg.*?>|<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", file.getvalue())
    return head + use_css_variables(_short(_with_own_ids(body, prefix)))


def _with_own_ids(svg: str, prefix: str) -> str:
    """Only the IDs that something refers to, each begun by a prefix, and those of trials as attributes."""
    svg = svg.replace("xlink:href", "href")
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
    svg = re.sub(r'((?:href="|url\()#)', rf"\g<1>{prefix}", svg)
    svg = re.sub(rf' id="{TRIAL}([^"]*)"', r' data-trial="\1"', svg)
    return re.sub(r' id="([^"]*)"', lambda match: f' id="{prefix}{match[1]}"' if match[1] in used else "", svg)


def _short(svg: str) -> str:
    """Coordinates to a hundredth of a pixel, no font but the page's, no blanks between elements."""
    svg = re.sub(r' transform="rotate\(-?0 [^"]*"|font-family: [^"]*?sans-serif; ', "", svg)
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), svg)
    svg = re.sub(r"\s*\n\s*", " ", svg)
    return re.sub(r"> <", "><", svg).replace("<defs></defs>", "").replace("<defs/>", "")
