"""The colours of the figures, which are names until a page is shown: light paper and dark paper have their own.

Figures are drawn in stand-in colours, one for each name. In the SVG they become `var(--NAME)`, and `css` defines
these variables for both papers.
"""

import re
from dataclasses import dataclass
from typing import Any

from rustgpt_jax.sweeps.report.axis_scales import Scale
from rustgpt_jax.sweeps.report.labels import value_text

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


def stand_in(name: str) -> str:
    """The colour to draw with in place of a named one."""
    return f"#fe{NAMES.index(name):02x}01"


def with_variables(svg: str) -> str:
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
class Colouring:
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
        return stand_in(self.name(value))

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
