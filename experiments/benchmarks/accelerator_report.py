"""Report of the measurements of `accelerator.py`: tables, and which goals are met.

python -m experiments.benchmarks.accelerator_report runs/accelerator/results.jsonl

Prints the tables of a results.jsonl, which holds raw measurements: seconds, bytes, and the costs of models. All shares
and ratios are computed here. Repeated measurements are merged; the best of a framework has the most tokens per second.
"""

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rustgpt_jax.sharding.hardware_specs import CHIPS, Chip
from rustgpt_jax.tracking.console import format_bytes, format_count

Row = dict[str, Any]
UNKNOWN = "-"

# The goals for one GPU: shares of peak FLOPs and of bandwidth, and ratios of throughputs.
TRAINING_GOALS = {"124m": 0.4, "350m": 0.5, "1.5b": 0.5}
TORCH_GOAL = 1.0
DECODING_GOAL = 0.6
SWEEP_GOAL = 5.0

# What a run measures more than once, besides the machine and PyTorch.
LISTS = ("training", "decoding", "sweep", "reproduction", "checks", "unmeasured")


def read_rows(file: Path) -> list[Row]:
    """Read a results.jsonl. A last line that was not written completely is dropped."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def collect(rows: Iterable[Row]) -> Row:
    """Return rows by section: the last machine, with the costs of all models, the last PyTorch, and lists of others."""
    found: Row = {"machine": {"costs": {}}, "torch": None} | {name: [] for name in LISTS}
    for row in rows:
        section = row["section"]
        if section == "machine":
            found["machine"] = row | {"costs": found["machine"]["costs"] | row["costs"]}
        elif section == "torch":
            found["torch"] = row
        else:
            found[section].append(row)
    return found


# Rates, shares and ratios.


def tokens_per_second(row: Row) -> float:
    """Return the training throughput of a measurement, by its median step."""
    return row["tokens"] / float(np.median(row["seconds"]))


def spread(seconds: Sequence[float]) -> float:
    """Return the interquartile range of some times as a fraction of their median."""
    lower, median, upper = np.percentile(seconds, (25, 50, 75))
    return float((upper - lower) / median) if median else 0.0


def share_of_peak(flops_per_token: float, rate: float, chip: Chip | None) -> float | None:
    """Return the fraction of a chip's peak bfloat16 FLOP/s at a throughput in tokens/s; None for an unknown chip."""
    return None if chip is None else flops_per_token * rate / chip.bfloat16


def share_of_bandwidth(n_bytes: float, seconds: float, chip: Chip | None) -> float | None:
    """Return the fraction of a chip's memory bandwidth used by a read; None for an unknown chip."""
    return None if chip is None else n_bytes / seconds / chip.bandwidth


def find_chip(kind: str) -> Chip | None:
    """Return the chip for a device kind as named by JAX; None if its data sheet is unknown."""
    return next((chip for chip in CHIPS.values() if chip.kind.lower() in kind.lower()), None)


def training_share(results: Row, row: Row) -> float | None:
    """Return the fraction of peak FLOP/s of a training measurement."""
    machine = results["machine"]
    flops = machine["costs"][row["size"]]["flops_per_token"]
    return share_of_peak(flops, tokens_per_second(row), find_chip(machine["kind"]))


def decoding_share(results: Row, row: Row) -> float | None:
    """Return the fraction of bandwidth of a decoding measurement."""
    n_bytes = row["parameter_bytes"] + row["cache_bytes"]
    return share_of_bandwidth(n_bytes, float(np.median(row["seconds"])), find_chip(results["machine"]["kind"]))


def merge_rows(rows: Iterable[Row]) -> list[Row]:
    """Merge repeated training measurements, with all times and the smallest peak memory.

    The smallest, because the first process also compiles, which takes memory.
    """
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = (row["size"], row["framework"], row["batch"], format_knobs(row["knobs"]))
        known = found.setdefault(key, row | {"seconds": []})
        known["seconds"] = known["seconds"] + row["seconds"]
        known["memory"] = None if row["memory"] is None else min(known["memory"], row["memory"])
    return list(found.values())


def best(results: Row, size: str, framework: str, batch: int | None = None) -> Row | None:
    """Return the measurement with the most tokens per second, optionally only at one batch size."""
    wanted = {"size": size, "framework": framework} | ({} if batch is None else {"batch": batch})
    fitting = [row for row in merge_rows(results["training"]) if wanted.items() <= row.items()]
    return max(fitting, key=tokens_per_second, default=None)


def ratios(results: Row, size: str) -> tuple[float | None, float | None]:
    """Return our throughput divided by PyTorch's: the best of each, and at our best batch size."""
    ours, theirs = (best(results, size, framework) for framework in ("rustgpt_jax", "PyTorch"))
    if ours is None or theirs is None:
        return None, None
    same = best(results, size, "PyTorch", ours["batch"])
    rate = tokens_per_second(ours)
    return rate / tokens_per_second(theirs), None if same is None else rate / tokens_per_second(same)


def best_decoding(results: Row, size: str, batch: int) -> Row | None:
    """Return the measurement with the least time per token."""
    fitting = [row for row in results["decoding"] if (row["size"], row["batch"]) == (size, batch)]
    return min(fitting, key=lambda row: np.median(row["seconds"]), default=None)


def fused_ratio(row: Row) -> float:
    """Return the throughput of trials in one program divided by that of consecutive trials."""
    return float(np.median(row["one_after_another"]) / np.median(row["fused"]))


class Goal(NamedTuple):
    """A minimum to reach, and the measured value; None if it was not measured."""

    what: str
    wanted: float
    measured: float | None
    shown: Callable[[float | None], str]


def goals(results: Row) -> list[Goal]:
    """Return the goals of the measured sizes and of the sweep."""
    found = []
    for size in results["machine"]["costs"]:
        ours = best(results, size, "rustgpt_jax")
        if size in TRAINING_GOALS:
            share = ours and training_share(results, ours)
            found.append(Goal(f"training {size}: share of peak FLOPs", TRAINING_GOALS[size], share, percent))
        found.append(Goal(f"training {size}: against PyTorch", TORCH_GOAL, ratios(results, size)[0], times))
    for size in dict.fromkeys(row["size"] for row in results["decoding"]):
        row = best_decoding(results, size, 1)
        share = row and decoding_share(results, row)
        found.append(Goal(f"decoding {size} at batch 1: share of bandwidth", DECODING_GOAL, share, percent))
    for row in results["sweep"]:
        what = f"{row['trials']} small trials: fused against one after another"
        found.append(Goal(what, SWEEP_GOAL, fused_ratio(row), times))
    for row in results["reproduction"]:
        what = f"reproduction {row['size']}: a repeated and a resumed run are bit-identical"
        found.append(Goal(what, True, is_reproduced(row), yes_or_no))
    return found


def has_failed(results: Row) -> bool:
    """Return whether anything failed for lack of neither memory nor time, or a kernel or a repeated run is wrong."""
    wrong = [row for row in results["checks"] if "refuses" not in row and not is_right(row)]
    wrong += [row for row in results["reproduction"] if not is_reproduced(row)]
    return bool(wrong) or not all(row["is_expected"] for row in results["unmeasured"])


def is_right(row: Row) -> bool:
    """Return whether a kernel matches the reference within rounding."""
    return "difference" in row and row["difference"] <= row["tolerance"]


def is_reproduced(row: Row) -> bool:
    """Return whether a repeated run and a resumed one end in exactly the same state."""
    return row["repeated"] and row["resumed"]


# Tables: a title, and rows of cells by column.

Cells = dict[str, str]
Sheets = dict[str, list[Cells]]


def sheets(results: Row) -> Sheets:
    """Return all non-empty tables by title."""
    size_of = {size: format_count(cost["parameters"]) for size, cost in results["machine"]["costs"].items()}
    every = {
        "Training": [
            {"model": f"{row['size']} ({size_of[row['size']]})"} | _training(results, row)
            for row in merge_rows(results["training"])
        ],
        "Training: our tokens a second over PyTorch's": [
            {"model": size, "best against best": times(at_best), "at the batch of our best": times(at_same)}
            for size, (at_best, at_same) in ((size, ratios(results, size)) for size in size_of)
            if at_best is not None
        ],
        "Decoding": [_decoding(results, row) for row in results["decoding"]],
        "A sweep of small trials": [_sweep(row) for row in results["sweep"]],
        "Reproduction": [_reproduction(row) for row in results["reproduction"]],
        "Attention kernels: the largest difference from the reference in float32, relative to its largest value": [
            _check(row) for row in results["checks"]
        ],
        "Goals for one GPU": [_goal(goal) for goal in goals(results)],
        "Not measured": [{"what": row["what"], "why": row["reason"]} for row in results["unmeasured"]],
    }
    if absent := (results["torch"] or {}).get("absent"):
        every["Not measured"].append({"what": "PyTorch", "why": absent})
    return {title: rows for title, rows in every.items() if rows}


def _check(row: Row) -> Cells:
    if "difference" in row:
        difference, verdict = f"{row['difference']:.1e}", "right" if is_right(row) else "WRONG"
    else:
        difference, verdict = UNKNOWN, f"refuses: {row['refuses']}" if "refuses" in row else f"FAILED: {row['failed']}"
    return {"model": row["size"], "kernel": row["kernel"], "type": row["dtype"], "difference": difference, "": verdict}


def _training(results: Row, row: Row) -> Cells:
    is_best = best(results, row["size"], row["framework"]) == row
    return {
        "framework": row["framework"],
        "batch": str(row["batch"]),
        "knobs": format_knobs(row["knobs"]),
        "attention": row["kernel"],
        "ms a step": milliseconds(row["seconds"]),
        "tokens/s": f"{tokens_per_second(row):,.0f}",
        "of peak FLOPs": percent(training_share(results, row)),
        "peak memory": memory(row["memory"]),
        "first call, s": f"{row['first_call']:.1f}",
        "": "best" if is_best else "",
    }


def _decoding(results: Row, row: Row) -> Cells:
    return {
        "model": row["size"],
        "batch": str(row["batch"]),
        "layers": "scanned" if row["scan_layers"] else "unrolled",
        "ms a token": milliseconds(row["seconds"]),
        "tokens/s": f"{row['batch'] / np.median(row['seconds']):,.0f}",
        "parameters": format_bytes(row["parameter_bytes"]),
        "cache": format_bytes(row["cache_bytes"]),
        "of bandwidth": percent(decoding_share(results, row)),
        "peak memory": memory(row["memory"]),
    }


def _sweep(row: Row) -> Cells:
    return {
        "trials": str(row["trials"]),
        "one after another, ms a step of all": milliseconds(row["one_after_another"]),
        "fused": milliseconds(row["fused"]),
        "throughput": times(fused_ratio(row)),
        "largest difference of a loss": f"{row['difference']:.0e}",
    }


def _reproduction(row: Row) -> Cells:
    cells = {"model": row["size"], "batch": str(row["batch"]), "steps": str(row["steps"])}
    runs = {"repeated in another process": row["repeated"], "resumed from a checkpoint": row["resumed"]}
    return cells | {run: "bit-identical" if is_equal else "DIFFERENT" for run, is_equal in runs.items()}


def _goal(goal: Goal) -> Cells:
    verdict = "not measured" if goal.measured is None else "met" if goal.measured >= goal.wanted else "missed"
    shown = (goal.shown(goal.wanted), goal.shown(goal.measured))
    return {"goal": goal.what, "at least": shown[0], "measured": shown[1], "": verdict}


def format_knobs(knobs: dict[str, Any]) -> str:
    """Format knobs as on the command line: 'model.remat=full'."""
    return " ".join(f"{path}={value}" for path, value in knobs.items())


def percent(share: float | None) -> str:
    """Format a fraction, as in 52.3%."""
    return UNKNOWN if share is None else f"{share:.1%}"


def yes_or_no(answer: float | None) -> str:
    """Format a bool."""
    return "yes" if answer else "no"


def times(ratio: float | None) -> str:
    """Format a ratio, as in 1.07x."""
    return UNKNOWN if ratio is None else f"{ratio:.2f}x"


def memory(n_bytes: int | None) -> str:
    """Format bytes, as in 12.3 GB."""
    return UNKNOWN if n_bytes is None else format_bytes(n_bytes)


def milliseconds(seconds: Sequence[float]) -> str:
    """Format times by their median and spread, as in 12.3 (1.2%)."""
    return f"{1e3 * np.median(seconds):.4g} ({spread(seconds):.1%})"


def about(results: Row) -> list[str]:
    """Describe the machine and the method of the measurements."""
    machine, torch = results["machine"], results["torch"] or {}
    environment, chip = machine["environment"], find_chip(machine["kind"])
    names = ("jax", "jaxlib", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "tokamax")
    versions = {name: environment["packages"].get(name) for name in names}
    versions |= {"Python": environment["python"]["version"], "torch": torch.get("version")}
    peak = "its data sheet is not known"
    if chip is not None:
        peak = f"data sheet: {chip.bfloat16 / 1e12:,.0f} TFLOP/s in bfloat16, {chip.bandwidth / 1e12:.2f} TB/s"
    variables = " ".join(f"{name}={value}" for name, value in environment["variables"].items())
    return [
        f"{machine['kind']}; memory for JAX: {memory(machine['memory'])}; {peak}",
        f"driver: {environment['devices']['driver'] or UNKNOWN}; {environment['devices']['platform_version']}",
        f"{environment['machine']['processor']}, {environment['machine']['cores']} cores",
        ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        f"variables: {variables or UNKNOWN}",
        f"{machine['date']}: {machine['command']}",
    ]


def show(results: Row, console: Console) -> None:
    """Print all tables."""
    for line in about(results):
        console.print(line, highlight=False, markup=False)
    show_sheets(sheets(results), console)


def show_sheets(sheets: Sheets, console: Console) -> None:
    """Print tables."""
    for title, rows in sheets.items():
        table = Table(*rows[0], title=title, title_justify="left", box=None)
        for row in rows:
            table.add_row(*map(Text, row.values()))
        console.print()
        console.print(table)


def markdown(results: Row) -> str:
    """Return all tables as a Markdown page."""
    lines = ["# The accelerator", "", *(f"- {line}" for line in about(results))]
    for title, rows in sheets(results).items():
        lines += ["", f"## {title}", "", *markdown_table(rows)]
    return "\n".join(lines) + "\n"


def markdown_table(rows: list[Cells]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = (rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows))
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in lines]


if __name__ == "__main__":
    show(collect(read_rows(Path(sys.argv[1]))), Console())
