"""Paper and pen: figures measured in pixels of the page, drawn by matplotlib without a display, given as inline SVG.

A mark of a trial carries the trial's ID, so that the page can light up all marks of one trial together.
"""

import io
import math
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rustgpt_jax.sweeps.report.axis_scales import Scale
from rustgpt_jax.sweeps.report.palette import Key, stand_in, with_variables

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
    axes.grid(axis="y", color=stand_in("grid"), linewidth=1)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(stand_in("soft"))
    axes.tick_params(which="both", length=0, labelsize=SMALL_FONT_SIZE, labelcolor=stand_in("soft"), pad=7)
    axes.set_xlabel(label, color=stand_in("ink"), fontsize=FONT_SIZE, labelpad=7)
    write(axes, title, (0, 1), (0, top - FONT_SIZE - 3), fontsize=FONT_SIZE)
    return axes


def write(axes: "Axes", text: str, place: tuple[float, float], shift: tuple[float, float], **style: Any) -> None:
    """Write a text at a place given in shares of the axes, moved by so many pixels."""
    plain: dict[str, Any] = {"color": stand_in("ink"), "fontsize": SMALL_FONT_SIZE, "xycoords": "axes fraction"}
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
    return head + with_variables(_short(_with_own_ids(body, prefix)))


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
