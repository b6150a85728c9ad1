"""The report of a sweep: a table in the terminal, results.csv, and report.html, a single self-contained file."""

import ast
import dataclasses
import json
import math
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rustgpt_jax.atomic_io import write_atomically
from rustgpt_jax.config.config_files import find_config_file
from rustgpt_jax.errors import UserError
from rustgpt_jax.sweeps.report.analysis import (
    RankedSetting,
    describe_comparisons,
    describe_interval,
    find_visible_range,
    list_notes,
    list_omitted,
    rank_settings,
)
from rustgpt_jax.sweeps.report.results import (
    FAILED,
    FINISHED,
    METRICS,
    MISSING,
    Results,
    Setting,
    TrialResult,
    describe_setting,
    format_loss,
    format_p_value,
    format_rerun_command,
    format_value,
    get_knob_names,
    group_by_setting,
    read_results,
    write_csv,
)
from rustgpt_jax.sweeps.sweep_dir import SweepDir
from rustgpt_jax.tracking.console import replace_control_characters

MAX_ROWS, MAX_ERRORS = 20, 5

ASSETS = Path(__file__).parent / "assets"
# Size and margin of a strip of dots in the table, in pixels. Intervals may extend beyond the visible losses by at most
# this fraction of their range.
STRIP_WIDTH, STRIP_HEIGHT, STRIP_MARGIN = 170.0, 26.0, 6.0
INTERVALS_BEYOND = 0.3


class NoFinishedTrialError(UserError):
    """A sweep has nothing to report yet."""


def report(folder: Path, console: Console) -> Path:
    """Print the results of a sweep, write results.csv and report.html to its folder, and return the latter's path.

    Raises:
        NoFinishedTrialError: No trial has finished yet; the CSV is written even then.
        UserError: The folder holds no sweep.
    """
    results = read_results(folder)
    write_csv(results, folder / "results.csv")
    counts = ", ".join(f"{number} {status}" for status, number in results.counts.items())
    if not results.finished:
        reasons = [f" {trial.error}" for trial in results.trials if trial.status == MISSING][:1]
        # It may be the report of trials that the sweep no longer has.
        (folder / "report.html").unlink(missing_ok=True)
        raise NoFinishedTrialError(
            f"{folder} has no finished trial yet ({counts or 'none is planned'}).{''.join(reasons)}"
        )
    ranked = rank_settings(results)
    title = f"{results.name}: {METRICS[results.metric]}, best settings first"
    console.print(title, style="bold", highlight=False, markup=False)
    console.print(_make_terminal_table(results, ranked))
    n_hidden = len(group_by_setting(results)) - min(len(ranked), MAX_ROWS)
    lines = [f"{n_hidden} more settings are in results.csv."] if n_hidden else []
    lines += describe_comparisons(results, ranked)
    lines += [f"Of {len(results.trials)} planned: {counts}.", *list_omitted(results)]
    failed = [trial for trial in results.trials if trial.status == FAILED]
    lines += [f"failed: {trial.id} ({describe_setting(trial.knobs)}): {trial.error}" for trial in failed[:MAX_ERRORS]]
    lines += [f"{len(failed) - MAX_ERRORS} more failed."] if len(failed) > MAX_ERRORS else []
    for line in lines:
        console.print(replace_control_characters(line), highlight=False, markup=False)
    target = folder / "report.html"
    write_atomically(target, render_page(results).encode(errors="backslashreplace"))
    return target


def describe_sweep(path: Path) -> dict[str, Any]:
    """Return the results of a sweep, as JSON has them: its trials, its settings, best first, and the best trial."""
    results = read_results(path)
    ranked = rank_settings(results) if results.finished else ()
    metric = METRICS[results.metric]
    best = None
    if ranked:
        finished = [trial for trial in ranked[0].setting.trials if trial.final_loss is not None]
        best = _describe_trial(path, min(finished, key=lambda trial: trial.final_loss or 0.0))
    return {
        "sweep": path,
        "name": results.name,
        "metric": {"name": results.metric, "description": metric.name, "unit": metric.unit},
        "knobs": results.swept,
        "counts": results.counts,
        "best": best,
        "settings": [_describe_setting(row) for row in ranked],
        "trials": [_describe_trial(path, trial) for trial in results.trials],
        "comparisons": describe_comparisons(results, ranked) if ranked else [],
        "notes": list_notes(results, ranked) if ranked else [],
        "files": {"report": _existing(path / "report.html"), "results": _existing(path / "results.csv")},
    }


def _existing(path: Path) -> Path | None:
    return path if path.exists() else None


def _describe_setting(row: RankedSetting) -> dict[str, Any]:
    comparison = None if row.comparison is None else dataclasses.asdict(row.comparison)
    return {
        "knobs": row.setting.knobs,
        "mean_loss": row.interval.mean,
        "interval": [row.interval.low, row.interval.high] if row.interval.n > 1 else None,
        "n_finished": row.interval.n,
        "n_diverged": row.setting.n_diverged,
        "trials": [trial.id for trial in row.setting.trials],
        "difference_from_best": comparison,
        "is_significantly_worse": row.is_significantly_worse,
    }


def _describe_trial(path: Path, trial: TrialResult) -> dict[str, Any]:
    return {
        "id": trial.id,
        "run": SweepDir(path).trial(trial.id).path,
        "status": trial.status,
        "knobs": trial.knobs,
        "step": trial.step,
        "total_steps": trial.total_steps,
        "final_loss": trial.final_loss,
        "best_loss": trial.best_loss,
        "train_loss": trial.train_loss,
        "valid_loss": trial.valid_loss,
        "bits_per_byte": trial.bits_per_byte,
        "error": trial.error,
    }


def summarize(folder: Path) -> dict[str, float | str]:
    """Return the best setting of a sweep, its mean loss, and the number of trials by status, for trackers."""
    results = read_results(folder)
    best = rank_settings(results)[0]
    counts = {f"trials/{status}": number for status, number in results.counts.items()}
    return {"best/setting": describe_setting(best.setting.knobs), "best/mean_loss": best.interval.mean, **counts}


def _make_terminal_table(results: Results, ranked: tuple[RankedSetting, ...]) -> Table:
    names = get_knob_names(results.swept)
    table = Table(box=None, pad_edge=False)
    for path in results.knobs:
        table.add_column(names[path])
    for column in ("mean", "95% interval", "n", "diverged"):
        table.add_column(column, justify="right")
    for row in ranked[:MAX_ROWS]:
        interval = row.interval
        bounds = f"{format_loss(interval.low)} to {format_loss(interval.high)}" if math.isfinite(interval.low) else "-"
        knobs = [format_value(row.setting.knobs[path]) for path in results.knobs]
        diverged = str(row.setting.n_diverged or "")
        table.add_row(*knobs, format_loss(interval.mean), bounds, str(interval.n), diverged)
    return table


def render_page(results: Results) -> str:
    """Render the HTML page of a sweep with at least one finished trial."""
    from rustgpt_jax.sweeps.report.figures import plot_all
    from rustgpt_jax.sweeps.report.plot_style import make_css

    ranked = rank_settings(results)
    tooltips = json.dumps({trial.id: _make_tooltip(results, trial) for trial in results.trials}).replace("<", "\\u003c")
    figures = "".join(
        f'<figure class="{"wide" if figure.is_wide else "narrow"}"><h3>{escape(figure.title)}</h3>'
        f"<div class=plot>{figure.svg}</div>"
        f"<figcaption><b>Figure {number}.</b> {escape(figure.caption)}</figcaption></figure>"
        for number, figure in enumerate(plot_all(results), start=1)
    )
    original_command = f'<p class="soft">The sweep was started with</p>{_render_command(results.command)}'
    style, script = ((ASSETS / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    body = (
        f"{_render_header(results, ranked)}"
        f"<section><h2>Settings</h2>{_render_legend(results, ranked)}{_render_settings(results, ranked)}</section>"
        f'<section><h2>Figures</h2><div class="figures">{figures}</div></section>'
        f"{_render_section('Comparisons', describe_comparisons(results, ranked))}"
        f"{_render_section('Notes', list_notes(results, ranked), original_command)}"
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(results.name)}</title><link rel=icon href=data:,>"
        f"<style>{make_css()}{style}</style></head><body><main>{body}</main>"
        f'<div id="tip"></div><script type="application/json" id="trials">{tooltips}</script>'
        f"<script>{script}</script></body></html>\n"
    )


def _render_header(results: Results, ranked: tuple[RankedSetting, ...]) -> str:
    best, name = ranked[0], escape(results.name)
    try:
        source = find_config_file(results.config_file).read_text(encoding="utf-8")
        docstring = ast.get_docstring(ast.parse(source)) or ""
    except (UserError, OSError, SyntaxError, ValueError):
        docstring = ""
    # The first paragraph of an experiment's docstring is its question.
    question = " ".join(docstring.split("\n\n")[0].split())
    heading = f'<p class="name">{name}</p><h1>{escape(question)}</h1>' if question else f"<h1>{name}</h1>"
    first = next(trial for trial in best.setting.trials if trial.final_loss is not None)
    trials = "1 trial" if len(results.trials) == 1 else f"{len(results.trials)} trials"
    counts = ", ".join(f"<b>{number}</b> {status}" for status, number in results.counts.items())
    return (
        f"<header>{heading}"
        f'<div class="best"><div class="loss">{format_loss(best.interval.mean)}</div>'
        f'<div><p class="setting">{escape(describe_setting(best.setting.knobs))}</p>'
        f'<p class="unit">The lowest {METRICS[results.metric]}: {describe_interval(best.interval)}.</p></div></div>'
        f"{_render_command(format_rerun_command(results, first.overrides))}"
        f'<p class="counts">{trials}: {counts}.</p></header>'
    )


def _render_legend(results: Results, ranked: tuple[RankedSetting, ...]) -> str:
    is_clipped = any(trial.final_loss > find_visible_range(results)[1] for trial in results.finished)  # type: ignore[operator]
    parts = [f"Each dot is a trial{', each arrow a trial beyond the axis' if is_clipped else ''}"]
    if any(row.interval.n > 1 for row in ranked):
        parts.append("bars are 95% t intervals of a setting's mean over seeds")
    if any(row.comparison for row in ranked):
        parts.append(
            "p-values and 95% intervals (±) of the difference from the best setting are paired by seed, hold for all "
            "settings at once, and account for the selection of the best setting"
        )
    n_settings = len(group_by_setting(results))
    number = f"{n_settings} settings, best first. " if n_settings > 1 else ""
    return f'<p class="soft small">{number}{"; ".join(parts)}.</p>'


def _render_command(command: str) -> str:
    # A browser may break lines after a hyphen.
    words = " ".join(f"<span>{escape(word)}</span>" for word in command.split(" "))
    return f'<div class="command"><pre>{words}</pre><button type="button">Copy</button></div>'


def _make_tooltip(results: Results, trial: TrialResult) -> str:
    names = get_knob_names(results.swept)
    knobs = [f"{names[path]}: {format_value(trial.knobs[path])}" for path in results.swept]
    metric = METRICS[results.metric]
    if trial.final_loss is not None:
        end = f"{metric.name}: {format_loss(trial.final_loss)} {metric.unit}"
    else:
        of_total = f" of {trial.total_steps:,}" if trial.total_steps else ""
        end = f"{trial.status} at step {trial.step:,}{of_total}"
    return "\n".join([f"trial {trial.id}", *knobs, end])


def _render_section(title: str, sentences: list[str], rest: str = "") -> str:
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f"<section><h2>{title}</h2><ul>{items}</ul>{rest}</section>" if sentences else ""


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of the settings table.

    Attributes:
        head: The HTML of its head.
        style: The CSS class of its cells.
        cell: A function that returns the HTML of a ranked setting's cell.
        unranked: A function that returns the cell of a setting without a finished trial.
    """

    head: str
    style: str
    cell: Callable[[RankedSetting], str]
    unranked: Callable[[Setting], str] = lambda setting: ""


def _render_settings(results: Results, ranked: tuple[RankedSetting, ...]) -> str:
    """Render the ranked settings, then those without a finished trial."""
    columns = _make_columns(results, ranked)
    heads = "".join(f'<th class="{column.style}">{column.head}</th>' for column in columns)
    rows = [_render_row("first" if row is ranked[0] else "", columns, [c.cell(row) for c in columns]) for row in ranked]
    rest = [setting for setting in group_by_setting(results) if not setting.losses]
    rows += [_render_row("rest", columns, [column.unranked(setting) for column in columns]) for setting in rest]
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<div class="table">{table}</div>'


def _render_row(style: str, columns: list[Column], cells: list[str]) -> str:
    html = "".join(f"<td class={column.style!r}>{cell}</td>" for column, cell in zip(columns, cells, strict=True))
    return f'<tr class="{style}">{html}</tr>'


def _make_columns(results: Results, ranked: tuple[RankedSetting, ...]) -> list[Column]:
    names, best = get_knob_names(results.swept), ranked[0]
    number_of = {id(row): number for number, row in enumerate(ranked, start=1)}
    limits = _find_strip_limits(results, ranked)
    has_seeds = any(len(setting.trials) > 1 for setting in group_by_setting(results))

    columns = [Column("", "number", lambda row: str(number_of[id(row)]))]
    columns += [_make_knob_column(path, names[path]) for path in results.knobs]
    columns.append(Column(str(METRICS[results.metric]), "strip", lambda row: _render_strip(row, limits)))
    columns.append(Column("mean" if has_seeds else "loss", "number", lambda row: format_loss(row.interval.mean)))
    if has_seeds:
        columns.append(Column("seeds", "number", lambda row: str(row.interval.n)))
    if len(ranked) > 1:
        columns.append(Column("above the best", "number", lambda row: _format_difference(row, best)))
    if any(row.comparison for row in ranked):
        columns.append(Column("p", "number", lambda row: "" if row is best else _format_p_cell(row)))
    if any(trial.status != FINISHED for trial in results.trials):
        columns.append(Column("not finished", "", lambda row: _render_unfinished(row.setting), _render_unfinished))
    return columns


def _make_knob_column(path: str, name: str) -> Column:
    def cell(setting: Setting) -> str:
        return escape(format_value(setting.knobs[path]))

    return Column(f'<span title="{escape(path)}">{escape(name)}</span>', "", lambda row: cell(row.setting), cell)


def _format_difference(row: RankedSetting, best: RankedSetting) -> str:
    if row is best:
        return ""
    if row.comparison is None:
        return format_loss(row.interval.mean - best.interval.mean)
    half = row.comparison.high - row.comparison.difference
    return format_loss(row.comparison.difference) + (f" ± {format_loss(half)}" if math.isfinite(half) else "")


def _format_p_cell(row: RankedSetting) -> str:
    if row.comparison is None:
        return "one seed" if row.interval.n == 1 else "–"
    return escape(format_p_value(row.comparison.p_value).removeprefix("p ").removeprefix("= "))


def _render_unfinished(setting: Setting) -> str:
    return "".join(
        f'<span class="chip {trial.status}" data-trial="{trial.id}">{trial.status}</span>'
        for trial in setting.trials
        if trial.status != FINISHED
    )


def _find_strip_limits(results: Results, ranked: tuple[RankedSetting, ...]) -> tuple[float, float]:
    """Return the range of the strips: the visible losses, and intervals that extend slightly beyond them."""
    low, high = find_visible_range(results)
    intervals = [row.interval for row in ranked if row.interval.mean <= high]
    bounds = [bound for interval in intervals for bound in (interval.low, interval.high) if math.isfinite(bound)]
    room = INTERVALS_BEYOND * (high - low)
    return max(min(low, *bounds, low), low - room), min(max(high, *bounds, high), high + room)


def _render_strip(row: RankedSetting, limits: tuple[float, float]) -> str:
    """Draw a dot for each seed and a bar for the confidence interval of their mean, on an axis shared by all rows.

    Seeds outside the axis are drawn as arrows at the end of the strip, as is the end of a clipped bar.
    """
    low, high = limits
    middle, first, last = STRIP_HEIGHT / 2, STRIP_MARGIN / 2, STRIP_WIDTH - STRIP_MARGIN / 2

    def to_pixels(loss: float) -> float:
        return STRIP_MARGIN + (STRIP_WIDTH - 2 * STRIP_MARGIN) * (loss - low) / ((high - low) or 1.0)

    def arrow(is_right: bool) -> str:
        start, tip = (STRIP_WIDTH - 2, 7) if is_right else (2, -7)
        return f'<path class="beyond" d="M{start} {middle - 5}v10l{tip} -5z"'

    parts = [f'<path d="M0 {middle}H{STRIP_WIDTH}" style="stroke:var(--grid)"/>']
    if math.isfinite(row.interval.low):
        bounds = to_pixels(row.interval.low), to_pixels(row.interval.high)
        start, end = (min(max(bound, first), last) for bound in bounds)
        box = f'x="{start:.1f}" y="{middle - 3}" width="{end - start:.1f}" height="6"'
        parts.append(f'<rect {box} style="fill:var(--hue0);opacity:.22"/>')
        clipped = [False] * (bounds[0] < first) + [True] * (bounds[1] > last)
        parts += [f'{arrow(is_right)} style="fill:var(--hue0);opacity:.4"/>' for is_right in clipped]
    for trial in row.setting.trials:
        if trial.final_loss is not None:
            at, style = to_pixels(trial.final_loss), f'data-trial="{trial.id}" style="fill:var(--hue0)"'
            dot = f'<circle cx="{at:.1f}" cy="{middle}" r="3.6"' if first <= at <= last else arrow(at > last)
            parts.append(f"{dot} {style}/>")
    return f'<svg viewBox="0 0 {STRIP_WIDTH:g} {STRIP_HEIGHT:g}">{"".join(parts)}</svg>'
