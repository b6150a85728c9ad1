"""The page of a sweep: one HTML file that needs nothing else, with its figures, table and statistics in it."""

import ast
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path

from rustgpt_jax.sweeps.report.caveats import comparisons, interval_text, notes
from rustgpt_jax.sweeps.report.importance import heat_map, importance_figure, interaction_matrix
from rustgpt_jax.sweeps.report.labels import (
    METRICS,
    knob_names,
    loss_text,
    p_text,
    rerun_command,
    setting_text,
    value_text,
)
from rustgpt_jax.sweeps.report.loss_curves import loss_curves
from rustgpt_jax.sweeps.report.lr_sensitivity import sensitivity_figure
from rustgpt_jax.sweeps.report.parallel_coordinates import parallel_coordinates
from rustgpt_jax.sweeps.report.ranking import Ranked, loss, losses_in_view, ranking
from rustgpt_jax.sweeps.report.response_curves import responses
from rustgpt_jax.sweeps.report.results import FINISHED, Results, Setting, TrialResult, settings
from rustgpt_jax.sweeps.report.svg import Key, Picture, css

# The table of a sweep's page: a row for each setting, with a dot for each of its seeds.

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


PARTS = Path(__file__).parent / "assets"

# In the order of the page. Each gives nothing where a sweep has nothing of its kind to show.
FIGURES: tuple[Callable[[Results], Picture | list[Picture] | None], ...] = (
    loss_curves,
    responses,
    sensitivity_figure,
    importance_figure,
    interaction_matrix,
    heat_map,
    parallel_coordinates,
)


def page(results: Results) -> str:
    """The HTML of a sweep with at least one finished trial."""
    ranked = ranking(results)
    title = escape(results.name)
    tips = json.dumps({trial.id: _tip(results, trial) for trial in results.trials}).replace("<", "\\u003c")
    sections = [
        _head(results, ranked),
        f"<section><h2>Settings</h2>{_legend(results, ranked)}{settings_table(results, ranked)}</section>",
        f'<section><h2>Figures</h2><div class="figures">{_figures(results)}</div></section>',
        _listed("What is shown, and what is not", comparisons(results, ranked)),
        _listed("Notes", notes(results, ranked), _origin(results)),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><link rel=icon href=data:,>"
        f"<style>{css()}{_part('page.css')}</style></head><body><main>{''.join(sections)}</main>"
        f'<div id="tip"></div><script type="application/json" id="trials">{tips}</script>'
        f"<script>{_part('page.js')}</script></body></html>\n"
    )


def question(config_file: Path) -> str | None:
    """The first paragraph of a Python file's docstring, None if there is no such file or it has none."""
    try:
        text = ast.get_docstring(ast.parse(config_file.read_text(encoding="utf-8")))
    except (OSError, SyntaxError, ValueError):
        return None
    return " ".join(text.split("\n\n")[0].split()) if text else None


def _part(name: str) -> str:
    return (PARTS / name).read_text(encoding="utf-8")


def _head(results: Results, ranked: tuple[Ranked, ...]) -> str:
    best = ranked[0]
    asked = question(Path(results.config_file))
    heading = (
        f'<p class="name">{escape(results.name)}</p><h1>{escape(asked)}</h1>'
        if asked
        else f"<h1>{escape(results.name)}</h1>"
    )
    metric = METRICS[results.metric]
    first = next(trial for trial in best.setting.trials if trial.final_loss is not None)
    trials = "1 trial" if len(results.trials) == 1 else f"{len(results.trials)} trials"
    counts = ", ".join(f"<b>{number}</b> {status}" for status, number in results.counts.items())
    return (
        f"<header>{heading}"
        f'<div class="best"><div class="loss">{loss_text(best.interval.mean)}</div>'
        f'<div><p class="setting">{escape(setting_text(best.setting.knobs))}</p>'
        f'<p class="unit">The lowest {metric}: {interval_text(best.interval)}.</p></div></div>'
        f"{_command(rerun_command(results, first.overrides))}"
        f'<p class="counts">{trials}: {counts}.</p></header>'
    )


def _legend(results: Results, ranked: tuple[Ranked, ...]) -> str:
    """What stands in the columns of the table."""
    beyond = (
        ", an arrow one beyond the axis"
        if any(loss(trial) > losses_in_view(results)[1] for trial in results.finished)
        else ""
    )
    parts = [f"Each dot is a trial{beyond}"]
    if any(row.interval.n > 1 for row in ranked):
        parts.append("bars are 95% t intervals of each setting's own mean over seeds")
    if any(row.comparison for row in ranked):
        parts.append(
            "p-values and 95% intervals (±) of the difference from the best setting are paired by seed, hold for all "
            "settings at once, and account for the choice of the best"
        )
    n_settings = len(settings(results))
    number = f"{n_settings} settings, best first. " if n_settings > 1 else ""
    return f'<p class="soft small">{number}{"; ".join(parts)}.</p>'


def _origin(results: Results) -> str:
    return f'<p class="soft">The sweep was begun with</p>{_command(results.command)}'


def _command(command: str) -> str:
    # A browser may break lines after a hyphen.
    words = " ".join(f"<span>{escape(word)}</span>" for word in command.split(" "))
    return f'<div class="command"><pre>{words}</pre><button type="button">Copy</button></div>'


def _tip(results: Results, trial: TrialResult) -> str:
    names = knob_names(results.swept)
    knobs = [f"{names[path]}: {value_text(trial.knobs[path])}" for path in results.swept]
    metric = METRICS[results.metric]
    if trial.final_loss is not None:
        end = f"{metric.name}: {loss_text(trial.final_loss)} {metric.unit}"
    else:
        of_total = f" of {trial.total_steps:,}" if trial.total_steps else ""
        end = f"{trial.status} at step {trial.step:,}{of_total}"
    return "\n".join([f"trial {trial.id}", *knobs, end])


def _figures(results: Results) -> str:
    pictures: list[Picture] = []
    for draw in FIGURES:
        drawn = draw(results)
        pictures += drawn if isinstance(drawn, list) else [drawn] if drawn else []
    return "".join(_figure(number, picture) for number, picture in enumerate(pictures, start=1))


def _figure(number: int, picture: Picture) -> str:
    return (
        f'<figure class="{"wide" if picture.is_wide else "narrow"}"><h3>{escape(picture.title)}</h3>'
        f"{''.join(map(_key, picture.keys))}<div class=plot>{picture.svg}</div>"
        f"<figcaption><b>Figure {number}.</b> {escape(picture.caption)}</figcaption></figure>"
    )


def _key(key: Key) -> str:
    title = f"<b>{escape(key.title)}</b>" if key.title else ""
    if key.gradient:
        (_, low), (_, high) = key.entries
        band = f'<i class="band" style="background:var(--{key.gradient}-band)"></i>'
        return f'<div class="key">{title}<span>{escape(low)}{band}{escape(high)}</span></div>'
    entries = (f'<span><i style="background:var(--{colour})"></i>{escape(text)}</span>' for colour, text in key.entries)
    return f'<div class="key">{title}{"".join(entries)}</div>'


def _listed(title: str, sentences: list[str], rest: str = "") -> str:
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f"<section><h2>{title}</h2><ul>{items}</ul>{rest}</section>" if sentences else ""
