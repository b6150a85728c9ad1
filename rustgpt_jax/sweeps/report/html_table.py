"""The table of a sweep's page: a row for each setting, with a dot for each of its seeds."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from html import escape

from rustgpt_jax.sweeps.report.labels import METRICS, knob_names, loss_text, p_text, value_text
from rustgpt_jax.sweeps.report.ranking import Ranked, losses_in_view
from rustgpt_jax.sweeps.report.results import FINISHED, Results, Setting, settings

STRIP_WIDTH, STRIP_HEIGHT, STRIP_MARGIN = 170.0, 26.0, 6.0
# Fraction of the strip, beyond the visible losses, that is reserved for intervals.
INTERVALS_BEYOND = 0.3


@dataclass(frozen=True)
class Column:
    """A head, the class of the cells, and the HTML of a cell; settings without a finished trial have some of them."""

    head: str
    style: str
    cell: Callable[[Ranked], str]
    unranked: Callable[[Setting], str] = lambda setting: ""


def settings_table(results: Results, ranked: tuple[Ranked, ...]) -> str:
    """The HTML of the table: ranked settings first, then those without a finished trial."""
    columns = _columns(results, ranked)
    heads = "".join(f'<th class="{column.style}">{column.head}</th>' for column in columns)
    rows = [
        _row("first" if row is ranked[0] else "", [(column.style, column.cell(row)) for column in columns])
        for row in ranked
    ]
    rows += [
        _row("rest", [(column.style, column.unranked(setting)) for column in columns])
        for setting in settings(results)
        if not setting.losses
    ]
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<div class="table">{table}</div>'


def _row(style: str, cells: list[tuple[str, str]]) -> str:
    return f'<tr class="{style}">{"".join(f"<td class={kind!r}>{html}</td>" for kind, html in cells)}</tr>'


def _columns(results: Results, ranked: tuple[Ranked, ...]) -> list[Column]:
    names, best = knob_names(results.swept), ranked[0]
    number_of = {id(row): number for number, row in enumerate(ranked, start=1)}
    span = _axis(results, ranked)
    has_seeds = any(len(setting.trials) > 1 for setting in settings(results))
    compares = any(row.comparison for row in ranked)

    columns = [Column("", "number", lambda row: str(number_of[id(row)]))]
    columns += [_knob_column(path, names[path]) for path in results.knobs]
    columns.append(Column(str(METRICS[results.metric]), "strip", lambda row: _strip(row, span)))
    columns.append(Column("mean" if has_seeds else "loss", "number", lambda row: loss_text(row.interval.mean)))
    if has_seeds:
        columns.append(Column("seeds", "number", lambda row: str(row.interval.n)))
    if len(ranked) > 1:
        columns.append(Column("above the best", "number", lambda row: _above(row, best)))
    if compares:
        columns.append(Column("p", "number", lambda row: "" if row is best else _p(row)))
    if any(trial.status != FINISHED for trial in results.trials):
        columns.append(Column("not finished", "", lambda row: _chips(row.setting), _chips))
    return columns


def _knob_column(path: str, name: str) -> Column:
    def cell(setting: Setting) -> str:
        return escape(value_text(setting.knobs[path]))

    return Column(f'<span title="{escape(path)}">{escape(name)}</span>', "", lambda row: cell(row.setting), cell)


def _above(row: Ranked, best: Ranked) -> str:
    if row is best:
        return ""
    if row.comparison is None:
        return loss_text(row.interval.mean - best.interval.mean)
    half = row.comparison.high - row.comparison.difference
    return loss_text(row.comparison.difference) + (f" ± {loss_text(half)}" if math.isfinite(half) else "")


def _p(row: Ranked) -> str:
    if row.comparison is None:
        return "one seed" if row.interval.n == 1 else "–"
    return escape(p_text(row.comparison.p_value).removeprefix("p ").removeprefix("= "))


def _chips(setting: Setting) -> str:
    others = (trial for trial in setting.trials if trial.status != FINISHED)
    return "".join(
        f'<span class="chip {trial.status}" data-trial="{trial.id}">{trial.status}</span>' for trial in others
    )


def _axis(results: Results, ranked: tuple[Ranked, ...]) -> tuple[float, float]:
    """Return the limits of the strips: the visible losses, and intervals that extend slightly beyond them."""
    low, high = losses_in_view(results)
    intervals = [row.interval for row in ranked if row.interval.mean <= high]
    bounds = [bound for interval in intervals for bound in (interval.low, interval.high) if math.isfinite(bound)]
    room = INTERVALS_BEYOND * (high - low)
    return max(min(low, *bounds, low), low - room), min(max(high, *bounds, high), high + room)


def _strip(row: Ranked, span: tuple[float, float]) -> str:
    """Draw a dot for each seed and a bar for the confidence interval of their mean, on an axis shared by all rows.

    Seeds outside the axis are drawn as arrows at the end of the strip, as is the end of a clipped bar.
    """
    low, high = span

    def place(loss: float) -> float:
        return STRIP_MARGIN + (STRIP_WIDTH - 2 * STRIP_MARGIN) * (loss - low) / ((high - low) or 1.0)

    middle, interval = STRIP_HEIGHT / 2, row.interval
    first, last = STRIP_MARGIN / 2, STRIP_WIDTH - STRIP_MARGIN / 2
    parts = [f'<path d="M0 {middle}H{STRIP_WIDTH}" style="stroke:var(--grid)"/>']
    if math.isfinite(interval.low):
        start, end = (min(max(place(bound), first), last) for bound in (interval.low, interval.high))
        box = f'x="{start:.1f}" y="{middle - 3}" width="{end - start:.1f}" height="6"'
        parts.append(f'<rect {box} style="fill:var(--hue0);opacity:.22"/>')
        ends = [
            side for side, is_out in ((-1, place(interval.low) < first), (1, place(interval.high) > last)) if is_out
        ]
        parts += [f'<path class="beyond" d="{_arrow(side)}" style="fill:var(--hue0);opacity:.4"/>' for side in ends]
    for trial in row.setting.trials:
        if trial.final_loss is None:
            continue
        at, style = place(trial.final_loss), f'data-trial="{trial.id}" style="fill:var(--hue0)"'
        if first <= at <= last:
            parts.append(f'<circle cx="{at:.1f}" cy="{middle}" r="3.6" {style}/>')
        else:
            parts.append(f'<path class="beyond" d="{_arrow(-1 if at < first else 1)}" {style}/>')
    return f'<svg viewBox="0 0 {STRIP_WIDTH:g} {STRIP_HEIGHT:g}">{"".join(parts)}</svg>'


def _arrow(side: int) -> str:
    """Draw an outward-pointing triangle at the left (-1) or right (1) end of a strip."""
    base = STRIP_WIDTH - 2 if side > 0 else 2
    return f"M{base} {STRIP_HEIGHT / 2 - 5}v10l{7 * side} -5z"
