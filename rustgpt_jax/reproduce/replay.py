"""The verb `replay`: recompute a step bit for bit, compare it with its record, and show its tensors."""

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import fmean

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from rustgpt_jax.atomic_io import NotWritableError, write_atomically
from rustgpt_jax.reproduce.recorded_run import (
    ACTIVATION,
    ACTIVATION_GRADIENT,
    KINDS,
    PARAMETER,
    PARAMETER_GRADIENT,
    UPDATE,
    RecordedRun,
    StepTensor,
    describe_start,
)
from rustgpt_jax.reproduce.replay_step import ReplayedStep, replay_one_step
from rustgpt_jax.sweeps.report import ASSETS as REPORT_ASSETS
from rustgpt_jax.sweeps.report.plot_style import css, shade
from rustgpt_jax.tracking.formatting import replace_control_characters


def replay(path: Path, step: int, has_taps: bool, console: Console) -> bool:
    """Recompute a step of a run and print its metrics.

    With taps, also measures the step's tensors and writes them to RUN/replay/step_K.html, or to a temporary folder if
    the run folder is not writable.

    Returns:
        Whether the step matches its record bitwise, or was not meant to be recorded.

    Raises:
        UserError: As for `RecordedRun`, or the run does not have the step.
    """
    with RecordedRun(path, console) as past:
        again, inside = replay_one_step(past, step, has_taps)
    _print(again, path, console)
    if inside is not None:
        print_tensors(inside.tensors, console)
        file = write_page(path, again, inside.tensors)
        console.print(f"Each tensor of the step: {file}", highlight=False, soft_wrap=True)
    return again.is_same


def write_page(path: Path, again: ReplayedStep, tensors: Sequence[StepTensor]) -> Path:
    """Write the page of a step and return its path.

    The page goes to the run folder, or to a new temporary folder if that is not writable.
    """
    name, content = f"step_{again.step}.html", render_page(again, tensors)
    try:
        (path / "replay").mkdir(exist_ok=True)
        write_atomically(path / "replay" / name, content)
        return path / "replay" / name
    except (OSError, NotWritableError):
        file = Path(tempfile.mkdtemp(prefix="rustgpt_jax_replay_")) / name
        write_atomically(file, content)
        return file


def _print(again: ReplayedStep, path: Path, console: Console) -> None:
    console.print(
        f"step {again.step} of {path} (stage {replace_control_characters(again.stage)}), "
        f"replayed from {describe_start(again.from_step)}",
        highlight=False,
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False, header_style="dim")
    for head, justify in (("", "left"), ("again", "right"), ("recorded", "right"), ("", "left")):
        table.add_column(head, justify=justify)  # type: ignore[arg-type]
    recorded = again.recorded
    for name, value in again.metrics.items():
        there = f"{recorded[name]:.9g}" if name in recorded else ""
        same = ("differs" if name in again.unequal else "same bits") if name in recorded else ""
        table.add_row(name.removeprefix("train/"), f"{value:.9g}", there, same)
    console.print(table, highlight=False)
    console.print(again.verdict, highlight=False, soft_wrap=True)


def print_tensors(tensors: Sequence[StepTensor], console: Console) -> None:
    """Print a table with a row per hook point: the layer with the largest magnitude, forward and backward."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("site", no_wrap=True)
    for head in ("largest", "layer", "norm", "not finite", "gradient", "layer", "norm", "not finite"):
        table.add_column(head, justify="right", no_wrap=True)
    for site in dict.fromkeys(tensor.site for tensor in tensors if tensor.kind == ACTIVATION):
        cells: list[RenderableType] = []
        for kind in (ACTIVATION, ACTIVATION_GRADIENT):
            of_site = [tensor for tensor in tensors if tensor.kind == kind and tensor.site == site]
            worst = max(of_site, key=lambda tensor: (tensor.nonfinite, tensor.largest))
            layer = "" if worst.layer is None else str(worst.layer)
            bad = Text(f"{worst.nonfinite:,}", "red" if worst.nonfinite else "")
            cells += [f"{worst.largest:.3g}", layer, f"{worst.norm:.3g}", bad]
        table.add_row(site, *cells)
    console.print(table, highlight=False)


# The page of a replayed step: one HTML file that needs nothing else, with heat maps and a table of its tensors.

# Heat maps of a step in HTML: layers down, sites across, colours by the logarithm, red where it is not finite.

# Cells have their numbers written in them where there are no more columns than this.
MOST_COLUMNS_WITH_NUMBERS = 14
# A cell at more than this share of the way to the faint end of the colours has dark writing.
FAINT_FROM = 0.45

Value = Callable[[StepTensor], float]


@dataclass(frozen=True)
class ValueRange:
    """The smallest and the largest positive value of a heat map."""

    low: float
    high: float

    def share(self, value: float) -> float:
        """Return the position of a value on a logarithmic scale, 0 for the largest."""
        if value <= 0:
            return 1.0
        width = math.log(self.high / self.low)
        return 1.0 - math.log(value / self.low) / width if width > 0 else 0.5


def render_heat_map(title: str, caption: str, tensors: Sequence[StepTensor], value: Value) -> str:
    """Render a figure with a cell per tensor; those outside of the layers are in a separate row."""
    values = [value(tensor) for tensor in tensors]
    positive = [each for each in values if each > 0 and math.isfinite(each)]
    span = ValueRange(min(positive, default=1.0), max(positive, default=1.0))
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


def _columns(tensors: Sequence[StepTensor]) -> list[str]:
    """The sites in the order in which they come in their layers, by how far into a layer where layers differ."""
    layers: dict[int | None, list[str]] = {}
    for tensor in tensors:
        layers.setdefault(tensor.layer, []).append(tensor.site)
    places: dict[str, list[float]] = {}
    for names in layers.values():
        for index, site in enumerate(names):
            places.setdefault(site, []).append(index / len(names))
    return sorted(places, key=lambda site: fmean(places[site]))


def _outside(tensors: Sequence[StepTensor], value: Value, span: ValueRange) -> str:
    outside = [tensor for tensor in tensors if tensor.layer is None]
    if not outside:
        return ""
    cells = "".join(f"<th>{escape(tensor.name)}</th>{_cell(tensor, value(tensor), span, 1)}" for tensor in outside)
    return f'<table class="heat numbered outside"><tbody><tr>{cells}</tr></tbody></table>'


def _cell(tensor: StepTensor, value: float, span: ValueRange, n_columns: int) -> str:
    tip = f'data-tip="{escape(format_tooltip(tensor))}"'
    if tensor.nonfinite or not math.isfinite(value):
        return f'<td class="bad" {tip}>{tensor.nonfinite:,}</td>'
    text = format_short(value) if n_columns <= MOST_COLUMNS_WITH_NUMBERS else ""
    if value <= 0:
        return f'<td class="none" {tip}>{text}</td>'
    share = span.share(value)
    kind = "faint" if share > FAINT_FROM else "strong"
    return f'<td class="{kind}" style="background:var(--{shade("loss", share)})" {tip}>{text}</td>'


def format_tooltip(tensor: StepTensor) -> str:
    """Format the statistics of a tensor, one per line."""
    return (
        f"{tensor.name}\n{tensor.kind}\nroot mean square {tensor.rms:.4g}\nnorm {tensor.norm:.4g}\n"
        f"largest magnitude {tensor.largest:.4g}\nnot finite {tensor.nonfinite:,} of {tensor.size:,}"
    )


def format_short(value: float) -> str:
    """Format a number with two significant digits and a short exponent: 0.12, 3.4e-5, 1.2e4."""
    mantissa, e, exponent = f"{value:.2g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if e else mantissa


def _key(span: ValueRange) -> str:
    band = '<i class="band" style="background:var(--loss-band)"></i>'
    return (
        f'<div class="key"><span>{format_short(span.high)}{band}{format_short(span.low)}</span>'
        '<span><i class="red"></i>not finite, how many</span></div>'
    )


PARTS = Path(__file__).parent / "assets"


def render_page(again: ReplayedStep, tensors: Sequence[StepTensor]) -> str:
    """Render the HTML page of a replayed step."""
    title = f"{escape(again.run)}, step {again.step}"
    style = (REPORT_ASSETS / "page.css").read_text(encoding="utf-8") + (PARTS / "page.css").read_text(encoding="utf-8")
    body = f"{_head(again, tensors)}{_figures(tensors)}{_table(tensors)}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><link rel=icon href=data:,><style>{css()}{style}</style></head>"
        f'<body><main>{body}</main><div id="tip"></div>'
        f"<script>{(PARTS / 'page.js').read_text(encoding='utf-8')}</script></body></html>\n"
    )


def _head(again: ReplayedStep, tensors: Sequence[StepTensor]) -> str:
    metrics = again.metrics
    start = f"the checkpoint of step {again.from_step:,}" if again.from_step else "the start"
    bad = [tensor for tensor in tensors if tensor.nonfinite]
    first = f"The first tensor that is not finite: the {bad[0].kind} {bad[0].name}." if bad else "All is finite."
    return (
        f'<header><p class="name">{escape(again.run)}, stage {escape(again.stage)}</p>'
        f"<h1>Step {again.step:,}, replayed from {start}</h1>"
        f'<div class="best"><div class="loss">{metrics["train/loss"]:.4f}</div><div><p class="setting">'
        f"gradient norm {metrics['train/gradient_norm']:.4g}, learning rate {metrics['train/learning_rate']:.3g}</p>"
        f'<p class="unit">Training loss, nats a token. {escape(again.verdict)}</p></div></div>'
        f'<p class="counts{" warn" if bad else ""}">{escape(first)}</p></header>'
    )


def _figures(tensors: Sequence[StepTensor]) -> str:
    def of(kind: str) -> list[StepTensor]:
        return [tensor for tensor in tensors if tensor.kind == kind]

    before = {tensor.name: tensor.rms for tensor in of(PARAMETER)}
    shown = "Each cell is a tensor, coloured by the logarithm of its"
    maps = [
        render_heat_map(
            "Activations",
            f"{shown} root mean square. Sites stand in the order in which they are computed, from left to right.",
            of(ACTIVATION),
            lambda tensor: tensor.rms,
        ),
        render_heat_map(
            "Gradients of the activations",
            f"{shown} root mean square: how much the loss depends on it. They are computed from right to left.",
            of(ACTIVATION_GRADIENT)[::-1],
            lambda tensor: tensor.rms,
        ),
        render_heat_map(
            "Gradients of the parameters",
            f"{shown} root mean square, before clipping.",
            of(PARAMETER_GRADIENT)[::-1],
            lambda tensor: tensor.rms,
        ),
        render_heat_map(
            "Updates of the parameters",
            f"{shown} root mean square as a share of that of the parameter before the step.",
            of(UPDATE)[::-1],
            lambda tensor: tensor.rms / before[tensor.name] if before[tensor.name] else 0.0,
        ),
    ]
    return f'<section><h2>Where the numbers are large</h2><div class="figures">{"".join(maps)}</div></section>'


def _table(tensors: Sequence[StepTensor]) -> str:
    heads = ("kind", "tensor", "root mean square", "norm", "largest", "not finite", "elements", "fingerprint")
    styles = ("", "", "number", "number", "number", "number", "number", "")
    head = "".join(f'<th class="{style}">{name}</th>' for name, style in zip(heads, styles, strict=True))
    rows = []
    for tensor in sorted(tensors, key=lambda tensor: KINDS.index(tensor.kind)):
        numbers = (format_short(tensor.rms), f"{tensor.norm:.4g}", f"{tensor.largest:.4g}")
        counts = (f"{tensor.nonfinite:,}", f"{tensor.size:,}", f"<code>{tensor.fingerprint}</code>")
        cells = (tensor.kind, escape(tensor.name), *numbers, *counts)
        line = "".join(f'<td class="{style}">{cell}</td>' for cell, style in zip(cells, styles, strict=True))
        rows.append(f"<tr{' class=broken' if tensor.nonfinite else ''}>{line}</tr>")
    return (
        "<section><h2>Every tensor, in the order in which it is computed</h2>"
        '<p class="soft small">Norms and largest magnitudes are of the finite elements. '
        "Two runs whose fingerprints of a tensor are equal have the same bits there.</p>"
        f'<div class="table tensors"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></section>"
    )
