"""Renders the benchmark tables and updates docs/performance.md.

python -m experiments.benchmarks.performance.page

Updates the page from docs/performance.json. Its text does not change; the tables of the part NAME between
`<!-- begin: NAME -->` and `<!-- end: NAME -->` are replaced if that part was measured. Each processor has tables of its
own, because ratios measured on one do not hold on another.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks.accelerator_report import (
    UNKNOWN,
    Cells,
    Sheets,
    markdown_table,
    milliseconds,
    percent,
    spread,
    times,
)
from experiments.benchmarks.best_batch import ROOT
from experiments.benchmarks.performance.goals import LLAMA_CPP, OURS, TORCH, TRANSFORMERS, Goal, goals, megabytes, ratio
from experiments.benchmarks.performance.models import SHAPES
from rustgpt_jax.errors import UserError
from rustgpt_jax.tracking.console import format_bytes, format_count

Row = dict[str, Any]
PAGE, RESULTS = ROOT / "docs" / "performance.md", ROOT / "docs" / "performance.json"
PARTS = ("training", "decoding", "startup", "sweeps")


def draw(results: Row, page: Path = PAGE) -> None:
    """Write the tables of the measurements into the page. Raises UserError if the markers of a part are missing."""
    text = page.read_text(encoding="utf-8")
    for part in ["goals", *PARTS]:
        measured = {name: found for name, found in results.items() if part in (*found, "goals")}
        if measured:
            text = replace_part(text, part, "\n".join(lines(part, measured)))
    page.write_text(text, encoding="utf-8")


def replace_part(text: str, part: str, by: str) -> str:
    """Return a page with the lines of a part replaced. Raises UserError unless it has both markers of the part once."""
    begin, end = f"<!-- begin: {part} -->", f"<!-- end: {part} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise UserError(f"docs/performance.md needs one line {begin!r} and, after it, one line {end!r}.")
    return re.sub(f"(?s){begin}.*{end}", lambda _: f"{begin}\n{by}\n{end}", text)


def lines(part: str, results: Row) -> Iterator[str]:
    """Return the Markdown between the markers of a part, given the measurements of each processor by its name."""
    if part == "goals":
        yield from ("", *markdown_table(goals_table(results)))
    else:
        for processor, found in results.items():
            yield from ("", f"### {processor}: {part}", "", *(f"{line}  " for line in about(found[part]["about"])))
            for title, rows in sheets(part, found[part]).items():
                yield from ("", f"**{title}**", "", *markdown_table(rows))
    yield ""


def about(row: Row) -> list[str]:
    """Describe the machine, date and command of a part's measurements."""
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    machine = f"{row['cores']} cores ({' '.join(row['features'])}), {format_bytes(row['memory'])}"
    return [f"{row['date']}: `{row['command']}`", machine, versions]


def sheets(part: str, measured: Row) -> Sheets:
    """Return the non-empty tables of a part by title, given its measurements on one processor."""
    every = {"training": _training, "decoding": _decoding, "startup": _startup, "sweeps": _sweeps}[part](measured)
    return {title: rows for title, rows in every.items() if rows}


def goals_table(results: Row) -> list[Cells]:
    """Return the goals with one column for each processor."""
    by_processor = {name: goals(found) for name, found in results.items()}
    return [
        {
            "goal": same[0].what,
            "wanted": f"{'at least' if same[0].at_least else 'at most'} {same[0].shown(same[0].wanted)}",
        }
        | {name: _measured(goal) for name, goal in zip(by_processor, same, strict=True)}
        for same in zip(*by_processor.values(), strict=True)
    ]


def _measured(goal: Goal) -> str:
    if goal.measured is None:
        return "not measured"
    width = "" if goal.spread is None else f" ({goal.spread:.1%})"
    return f"{goal.shown(goal.measured)}{width}, {goal.verdict}"


def _absent(part: Row) -> list[Cells]:
    """Return the contenders that were not measured, and the reasons."""
    races = [*part.get("races", {}).values(), *part.get("steadiness", {}).values()]
    found = {(name, reason): None for race in races for name, reason in race["absent"].items()}
    return [{"not measured": name, "why": reason} for name, reason in found]


def _peaks(peaks: Row) -> list[Cells]:
    shown = {name: f"{peaks[name] / 1e9:,.0f} GFLOP/s" for name in ("float32", "bfloat16") if name in peaks}
    return [shown | {"memory, read": f"{peaks['bytes'] / 1e9:.1f} GB/s"}] if peaks else []


# Training.


def _training(part: Row) -> Sheets:
    rows = [
        _step(title, name, column["seconds"], part)
        for title, race in part["races"].items()
        for name, column in race["readings"].items()
    ]
    whole = part["whole"]["readings"]
    return {
        "Peaks, as measured": _peaks(part["peaks"]),
        "A training step, ms (and the width of the middle half)": rows,
        "FLOPs of a step": [_cost(shape, row) for shape, row in part["costs"].items()],
        "A whole run, configs/shakespeare_char.py": [
            {"": name, "ms a step": milliseconds(seconds)} for name, seconds in whole.items() if seconds
        ],
        "Not measured": _absent(part),
    }


def _step(title: str, name: str, seconds: list[float], part: Row) -> Cells:
    shape, against = title.split(", ")
    race, median = part["races"][title], float(np.median(seconds))
    peak = part["peaks"].get("bfloat16" if "bfloat16" in name else "float32")
    against_torch = ratio(race, name, TORCH, "seconds")
    return {
        "model": shape,
        "against": f"torch {against}",
        "who": name,
        "ms": milliseconds(seconds),
        "tokens/s": f"{SHAPES[shape].tokens / median:,.0f}",
        "of peak FLOPs": percent(part["costs"][shape]["flops"] / median / peak if peak else None),
        "times as fast as the best of torch": UNKNOWN if against_torch is None else times(against_torch.median),
        "first call, s": f"{race['about'][name]['first_call']:.1f}",
        "measured": race["date"],
    }


def _cost(shape: str, row: Row) -> Cells:
    return {
        "model": shape,
        "parameters": format_count(row["parameters"]),
        "counted from shapes": f"{row['flops']:.4g}",
        "products of the compiled program": f"{row['of the program'] / row['flops']:.3f} times that",
        "XLA's cost analysis": f"{row['of XLA'] / row['flops']:.3f} times that",
    }


# Decoding.


def _decoding(part: Row) -> Sheets:
    rows = [
        _token(title, name, column, part)
        for title, race in part["races"].items()
        for name, column in race["readings"].items()
    ]
    steady = [
        {
            "who": f"{OURS}, {name}",
            "steps": f"{column['steps'][0]:.0f}",
            "p50, ms": f"{1e3 * column['p50'][0]:.2f}",
            "p99, ms": f"{1e3 * column['p99'][0]:.2f}",
            "p99 over p50": times(column["p99"][0] / column["p50"][0]),
            "compiled": f"{column['compiled'][0]:.0f}",
            "memory grew by": megabytes(column["grown"][0]),
        }
        for race in part["steadiness"].values()
        for name, column in race["readings"].items()
    ]
    return {
        "Peaks, as measured": _peaks(part["peaks"]),
        "Decoding": rows,
        "Steps one by one": steady,
        "Not measured": _absent(part),
    }


# Bytes per weight.
WIDTHS = {"float32": 4, "bfloat16": 2, "int8": 34 / 32}


def _token(title: str, name: str, column: dict[str, list[float]], part: Row) -> Cells:
    dtype, batch = title.split(", batch ")
    race, rows, token = part["races"][title], int(batch), float(np.median(column["token"]))
    against = {peer: ratio(race, name, peer, "token") for peer in (LLAMA_CPP, TRANSFORMERS)}
    n_bytes = part["parameters"] * WIDTHS[dtype]
    return {
        "weights": dtype,
        "batch": batch,
        "who": name,
        "ms a token": milliseconds(column["token"]),
        "tokens/s": f"{rows / token:,.1f}",
        "prompt, tokens/s": f"{rows * part['prompt'] / np.median(column['prompt']):,.0f}",
        "of bandwidth": percent(n_bytes / token / part["peaks"]["bytes"] if "bytes" in part["peaks"] else None),
    } | {
        f"times as fast as {peer}": UNKNOWN if found is None else times(found.median) for peer, found in against.items()
    }


# Startup.


def _startup(part: Row) -> Sheets:
    def rows(name: str) -> list[Cells]:
        if not part[name]:
            return []
        cold, *warm = part[name]
        found = [{"caches": "empty", "first step, s": f"{cold['first step']:.2f}", "all, s": f"{cold['all']:.2f}"}]
        if warm:
            columns = {what: [row[what] for row in warm] for what in ("first step", "all")}
            shown = {
                f"{what}, s": f"{np.median(column):.2f} ({spread(column):.1%})" for what, column in columns.items()
            }
            found.append({"caches": "full"} | shown)
        return found

    said = [row["parts"] for row in part["starts"] if row["parts"]]
    bare = part["job's bare steps"]["readings"].get("job", {}).get("seconds", [])
    compute = {"updates": f"{part['updates']:,}", "ms an update": milliseconds(bare)} if bare else None
    return {
        "Starts of `train`, configs/shakespeare_char.py, 40 steps": rows("starts"),
        "Where the seconds before the first step go": [{"the last start says": said[-1]}] if said else [],
        "RustGPT's job": rows("jobs"),
        "RustGPT's own program, in turns with ours": [{"all, s": f"{np.median(theirs):.2f} ({spread(theirs):.1%})"}]
        if (theirs := part.get("rustgpt"))
        else [],
        "RustGPT's job, its bare steps": [compute | {"all, s": f"{np.median(bare) * part['updates']:.2f}"}]
        if compute
        else [],
        "Not measured": _missing_jobs(part),
    }


def _missing_jobs(part: Row) -> list[Cells]:
    missing = {"RustGPT's job": part.get("job fails")}
    if not part.get("rustgpt"):
        missing["RustGPT's own program"] = "not available on this machine; pass its path with --rustgpt"
    return [{"": name, "why": why} for name, why in missing.items() if why]


# Sweeps.


def _sweeps(part: Row) -> Sheets:
    found: Sheets = {}
    for model, row in part["models"].items():
        cold = next(seconds for label, seconds in row["rows"] if label.startswith("16 train processes, cold"))
        found[f"16 trials of {model}; the bare steps of one trial take {row['bare']:.3g} s"] = [
            {
                "": label,
                "seconds": f"{seconds:.1f}",
                "a trial": f"{seconds / 16:.2f}",
                "in bare steps": f"{seconds / 16 / row['bare']:.2f}",
                "against cold processes": f"{cold / seconds:.1f}x",
            }
            for label, seconds in row["rows"]
        ]
        found[f"One more trial of {model}"] = [
            {"": profile, "in bare steps": f"{seconds / row['bare']:.2f}"} for profile, seconds in row["more"].items()
        ]
    return found


def read(file: Path = RESULTS) -> Row:
    """Return the saved measurements by processor and part; empty if there is no file."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


if __name__ == "__main__":
    draw(read())
