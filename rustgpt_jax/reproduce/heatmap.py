"""Heat maps of a step in HTML: layers down, sites across, colours by the logarithm, red where it is not finite."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from statistics import fmean

from rustgpt_jax.sweeps.report.palette import shade
from rustgpt_jax.training.instrumented_step import Tensor

# Cells have their numbers written in them where there are no more columns than this.
MOST_COLUMNS_WITH_NUMBERS = 14
# A cell at more than this share of the way to the faint end of the colours has dark writing.
FAINT_FROM = 0.45

Value = Callable[[Tensor], float]


@dataclass(frozen=True)
class Span:
    """The smallest and the largest positive value of a map."""

    low: float
    high: float

    def share(self, value: float) -> float:
        """Where a value stands between them by its logarithm, 0 for the largest."""
        if value <= 0:
            return 1.0
        width = math.log(self.high / self.low)
        return 1.0 - math.log(value / self.low) / width if width > 0 else 0.5


def heat_map(title: str, caption: str, tensors: Sequence[Tensor], value: Value) -> str:
    """A figure with a cell for each tensor. Those outside of the layers stand in a line of their own above."""
    values = [value(tensor) for tensor in tensors]
    positive = [each for each in values if each > 0 and math.isfinite(each)]
    span = Span(min(positive, default=1.0), max(positive, default=1.0))
    inside = [tensor for tensor in tensors if tensor.layer is not None]
    columns = _columns(inside)
    layers = sorted({tensor.layer for tensor in inside if tensor.layer is not None})
    cells = {(tensor.layer, tensor.site): _cell(tensor, value(tensor), span, len(columns)) for tensor in inside}
    heads = "".join(f"<th><span>{escape(column)}</span></th>" for column in columns)
    rows = "".join(
        f"<tr><th>{layer}</th>{''.join(cells.get((layer, column), '<td></td>') for column in columns)}</tr>"
        for layer in layers
    )
    style = "heat numbered" if len(columns) <= MOST_COLUMNS_WITH_NUMBERS else "heat"
    return (
        f'<figure class="wide"><h3>{escape(title)}</h3>{_key(span)}'
        f'<div class="plot"><table class="{style}"><thead><tr><th class="corner">layer</th>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>{_outside(tensors, value, span)}"
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _columns(tensors: Sequence[Tensor]) -> list[str]:
    """The sites in the order in which they come in their layers, by how far into a layer where layers differ."""
    layers: dict[int | None, list[str]] = {}
    for tensor in tensors:
        layers.setdefault(tensor.layer, []).append(tensor.site)
    places: dict[str, list[float]] = {}
    for names in layers.values():
        for index, site in enumerate(names):
            places.setdefault(site, []).append(index / len(names))
    return sorted(places, key=lambda site: fmean(places[site]))


def _outside(tensors: Sequence[Tensor], value: Value, span: Span) -> str:
    outside = [tensor for tensor in tensors if tensor.layer is None]
    if not outside:
        return ""
    cells = "".join(f"<th>{escape(tensor.name)}</th>{_cell(tensor, value(tensor), span, 1)}" for tensor in outside)
    return f'<table class="heat numbered outside"><tbody><tr>{cells}</tr></tbody></table>'


def _cell(tensor: Tensor, value: float, span: Span, n_columns: int) -> str:
    tip = f'data-tip="{escape(tip_text(tensor))}"'
    if tensor.nonfinite or not math.isfinite(value):
        return f'<td class="bad" {tip}>{tensor.nonfinite:,}</td>'
    text = short(value) if n_columns <= MOST_COLUMNS_WITH_NUMBERS else ""
    if value <= 0:
        return f'<td class="none" {tip}>{text}</td>'
    share = span.share(value)
    kind = "faint" if share > FAINT_FROM else "strong"
    return f'<td class="{kind}" style="background:var(--{shade("loss", share)})" {tip}>{text}</td>'


def tip_text(tensor: Tensor) -> str:
    """All numbers of a tensor, a line each."""
    return (
        f"{tensor.name}\n{tensor.kind}\nroot mean square {tensor.rms:.4g}\nnorm {tensor.norm:.4g}\n"
        f"largest magnitude {tensor.largest:.4g}\nnot finite {tensor.nonfinite:,} of {tensor.size:,}"
    )


def short(value: float) -> str:
    """A number in two significant digits, without the zeros of an exponent: 0.12, 3.4e-5, 1.2e4."""
    mantissa, e, exponent = f"{value:.2g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if e else mantissa


def _key(span: Span) -> str:
    band = '<i class="band" style="background:var(--loss-band)"></i>'
    return (
        f'<div class="key"><span>{short(span.high)}{band}{short(span.low)}</span>'
        '<span><i class="red"></i>not finite, how many</span></div>'
    )
