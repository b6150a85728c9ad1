"""How a sweep is read: a table in the terminal, results.csv, and report.html."""

import math
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rustgpt_jax.atomic_io import write_atomically
from rustgpt_jax.errors import UserError
from rustgpt_jax.sweeps.report.caveats import comparisons, left_out
from rustgpt_jax.sweeps.report.html import page
from rustgpt_jax.sweeps.report.labels import METRICS, knob_names, loss_text, setting_text, value_text
from rustgpt_jax.sweeps.report.ranking import Ranked, ranking
from rustgpt_jax.sweeps.report.results import FAILED, MISSING, Results, read_results, settings, write_csv
from rustgpt_jax.tracking.formatting import printable

MOST_ROWS = 20
MOST_ERRORS = 5


def report(folder: Path, console: Console) -> Path:
    """Print what a sweep found, write results.csv and report.html in its folder, and give the path of the latter.

    Raises UserError if the folder holds no sweep, or no trial has finished yet; the CSV is written all the same.
    """
    results = read_results(folder)
    write_csv(results, folder / "results.csv")
    if not results.finished:
        counts = ", ".join(f"{number} {status}" for status, number in results.counts.items())
        reasons = [f" {trial.error}" for trial in results.trials if trial.status == MISSING][:1]
        raise UserError(
            f"{folder} has no finished trial to report on yet ({counts or 'none is planned'}).{''.join(reasons)}"
        )
    ranked = ranking(results)
    title = f"{results.name}: {METRICS[results.metric]}, best settings first"
    console.print(title, style="bold", highlight=False, markup=False)
    console.print(_table(results, ranked))
    for line in _lines(results, ranked):
        console.print(printable(line), highlight=False, markup=False)
    target = folder / "report.html"
    write_atomically(target, page(results).encode(errors="backslashreplace"))
    return target


def _table(results: Results, ranked: tuple[Ranked, ...]) -> Table:
    names = knob_names(results.swept)
    shown = ranked[:MOST_ROWS]
    table = Table(box=None, pad_edge=False)
    for path in results.knobs:
        table.add_column(names[path])
    for column in ("mean", "95% interval", "n", "diverged"):
        table.add_column(column, justify="right")
    for row in shown:
        interval = row.interval
        bounds = f"{loss_text(interval.low)} to {loss_text(interval.high)}" if math.isfinite(interval.low) else "-"
        knobs = [value_text(row.setting.knobs[path]) for path in results.knobs]
        diverged = str(row.setting.n_diverged or "")
        table.add_row(*knobs, loss_text(interval.mean), bounds, str(interval.n), diverged)
    return table


def _lines(results: Results, ranked: tuple[Ranked, ...]) -> list[str]:
    lines = []
    rest = len(settings(results)) - min(len(ranked), MOST_ROWS)
    if rest:
        lines.append(f"{rest} more settings are in results.csv.")
    lines += comparisons(results, ranked)
    counts = ", ".join(f"{number} {status}" for status, number in results.counts.items())
    lines.append(f"Of {len(results.trials)} planned: {counts}.")
    lines += left_out(results)
    failed = [trial for trial in results.trials if trial.status == FAILED]
    lines += [f"failed: {trial.id} ({setting_text(trial.knobs)}): {trial.error}" for trial in failed[:MOST_ERRORS]]
    if len(failed) > MOST_ERRORS:
        lines.append(f"{len(failed) - MOST_ERRORS} more failed.")
    return lines
