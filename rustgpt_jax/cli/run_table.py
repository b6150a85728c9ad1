"""The table of `runs`: what each run folder holds, read from its config, metrics and events without JAX."""

import math
import os
import re
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from rustgpt_jax.atomic_io import read_json
from rustgpt_jax.config.config_files import list_recipes
from rustgpt_jax.errors import UserError, suggest_names
from rustgpt_jax.sweeps.sweep_dir import DONE, ENDED, Ledger, SweepDir
from rustgpt_jax.tracking.console import process_age
from rustgpt_jax.tracking.metric_writer import last_step, read_columns
from rustgpt_jax.workdir.event_log import EventLog
from rustgpt_jax.workdir.run_dir import RunDir, check_no_special_files, load_stages

# The process of a run on another machine counts as running if the run has recorded something in the last minutes.
SECONDS_TO_SILENCE = 600
# Widths of a terminal with room for all columns, and of lines that are not written to a terminal.
WIDE, PIPE_WIDTH = 100, 200
# The number of problems to print below the table.
MAX_PROBLEMS = 8
_HOLDER = re.compile(r"process (?P<pid>\d+) on (?P<host>.+)")


@dataclass(frozen=True)
class RunSummary:
    """A row of the table: a run, or a sweep with its trials.

    Attributes:
        folder: The folder.
        kind: "run" or "sweep".
        status: finished, running, stopped, or damaged if the number of steps is unknown. Trials that ended
            otherwise have their last event in the ledger.
        config: The config file, or None if it is not recorded.
        step: The last recorded step; for a sweep, the number of trials that are done.
        steps: The number of steps of the run, or of trials of the sweep; None if it is unknown.
        valid_loss: The last validation loss; None if there is none.
        best_valid_loss: The lowest validation loss of the last stage, or of all trials of a sweep.
        best_step: The step of the lowest validation loss; None for a sweep.
        launched: The time of the last launch in seconds since 1970, or None if none is recorded.
        problem: What is damaged, or what another version recorded; None if nothing is.
    """

    folder: Path
    kind: str = "run"
    status: str = "damaged"
    config: str | None = None
    step: int | None = None
    steps: int | None = None
    valid_loss: float | None = None
    best_valid_loss: float | None = None
    best_step: int | None = None
    launched: float | None = None
    problem: str | None = None


def summarize_folders(folders: Sequence[Path], sort: str) -> list[RunSummary]:
    """Return a row for each run and sweep in the given folders, sorted.

    A folder may be a run, a sweep, whose trials are listed, or a folder of runs and sweeps.

    Args:
        folders: The folders.
        sort: The name of an attribute, or "name" for the folder. Launch times are sorted with the latest first,
            everything else in ascending order, and rows without a value come last.

    Raises:
        UserError: A folder does not exist.
    """
    rows = [row for folder in folders for row in _summarize_folder(folder)]

    def key(row: RunSummary) -> tuple[bool, Any, str]:
        value: Any = str(row.folder) if sort == "name" else getattr(row, sort)
        is_missing = value is None or (isinstance(value, float) and math.isnan(value))
        return is_missing, 0 if is_missing else -value if sort == "launched" else value, str(row.folder)

    return sorted({row.folder: row for row in rows}.values(), key=key)


def _summarize_folder(folder: Path) -> Iterator[RunSummary]:
    if not folder.is_dir():
        siblings = [each.name for each in folder.parent.glob("*/")] if folder.parent.is_dir() else []
        what = f"{folder} is a file, not a folder." if folder.exists() else f"There is no folder {folder}."
        raise UserError(f"{what}{suggest_names(folder.name, siblings)}")
    if _is_sweep(folder):
        yield from map(_summarize_trial, _list_trials(folder))
    elif _is_run(folder):
        yield summarize_run(folder)
    else:
        for inner in _subfolders(folder):
            if _is_sweep(inner):
                yield _summarize_sweep(inner)
            elif _is_run(inner):
                yield summarize_run(inner)


def _subfolders(folder: Path) -> list[Path]:
    try:
        return sorted(each for each in folder.iterdir() if each.is_dir() and not each.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}.") from error


def _is_run(folder: Path) -> bool:
    """Return whether a folder has files of a run, even if its config is missing."""
    run = RunDir(folder)
    return any(file.exists() for file in (run.config_file, run.metrics_file, run.checkpoints))


def _is_sweep(folder: Path) -> bool:
    return SweepDir(folder).info_file.exists()


def _list_trials(folder: Path) -> list[Path]:
    trials = SweepDir(folder).trials
    return _subfolders(trials) if trials.is_dir() else []


def summarize_run(folder: Path) -> RunSummary:
    """Return the row of a run. Damage is reported in the row."""
    run = RunDir(folder)
    row: dict[str, Any] = {"folder": folder}
    try:
        check_no_special_files(folder)
        row |= {"config": _find_config_file(run), "launched": _last_launch(run)}
        row["step"] = last_step(folder)
        # Evaluations of earlier stages are of other data.
        evaluations = read_columns(folder, "valid/loss")
        losses, steps = evaluations.values["valid/loss"], evaluations.steps
        if len(losses):
            row["valid_loss"] = float(losses[-1])
            in_last_stage = np.flatnonzero((evaluations.stages == evaluations.stages[-1]) & np.isfinite(losses))
            if len(in_last_stage):
                best = in_last_stage[np.argmin(losses[in_last_stage])]
                row |= {"best_valid_loss": float(losses[best]), "best_step": int(steps[best])}
        row["steps"] = _read_recorded_steps(run)
        load_stages(folder)
    except (UserError, OSError) as error:
        row["problem"] = str(error)
    if row.get("step") is None or row.get("steps") is None:
        return RunSummary(**row)
    is_finished = row["step"] >= row["steps"]
    status = "finished" if is_finished else "running" if _is_being_trained(run) else "stopped"
    return RunSummary(**row, status=status)


def _summarize_trial(folder: Path) -> RunSummary:
    """Return the row of a trial, whose state in the ledger says more than its files, such as that it diverged."""
    row = summarize_run(folder)
    state = Ledger(SweepDir(folder.parent.parent).ledger_file).states().get(folder.name)
    is_ended = state is not None and state["event"] in ENDED
    if state is None or not is_ended or row.status in ("damaged", "running"):
        return row
    return RunSummary(**{**vars(row), "status": state["event"]})


def _summarize_sweep(folder: Path) -> RunSummary:
    sweep = SweepDir(folder)
    row: dict[str, Any] = {"folder": folder, "kind": "sweep"}
    try:
        info = read_json(sweep.info_file)
        config = info.get("config_file") if isinstance(info, dict) else None
        states = Ledger(sweep.ledger_file).states()
        n_done = sum(state["event"] in (*DONE, "pruned") for state in states.values())
        times = [float(state["time"]) for state in states.values()]
        row |= {"config": config if isinstance(config, str) else None, "launched": max(times, default=None)}
        row |= {"step": n_done, "steps": len(states)}
    except UserError as error:
        return RunSummary(**row, problem=str(error))
    trials = [summarize_run(trial) for trial in _list_trials(folder)]
    losses = [trial.best_valid_loss for trial in trials if trial.best_valid_loss is not None]
    is_running = any(trial.status == "running" for trial in trials)
    status = "running" if is_running else "finished" if n_done == len(states) else "stopped"
    return RunSummary(**row, status=status, best_valid_loss=min(losses, default=None))


def _read_recorded_steps(run: RunDir) -> int | None:
    """Return the number of steps of a run by its config, which may be from another version; None if it has none."""
    record: Any = read_json(run.config_file) if run.config_file.exists() else None
    try:
        steps, listed = record["config"]["training"]["steps"], record["config"]["stages"]
        every = [stage.get("training", {}).get("steps", steps) for stage in listed] or [steps]
        return sum(every) if all(type(each) is int for each in every) else None
    except (TypeError, KeyError, AttributeError):
        return None


def _find_config_file(run: RunDir) -> str | None:
    """Return the config file that most values of a run's config come from."""
    if not run.config_file.exists():
        return None
    record = read_json(run.config_file)
    origins = record.get("origins") if isinstance(record, dict) else None
    counts = Counter(origins.values() if isinstance(origins, dict) else ())
    names = [name for name, _ in counts.most_common() if isinstance(name, str)]
    recipes = list_recipes()
    # The origin of a default value has the name of the recipe that holds the defaults.
    names = [name for name in names if name != "base" and (name.endswith(".py") or name in recipes)]
    return names[0] if names else None


def _last_launch(run: RunDir) -> float | None:
    launches = [event["time"] for event in EventLog(run.events_file).events() if event["event"] == "launch"]
    times = [float(each) for each in launches if isinstance(each, int | float)]
    return times[-1] if times else None


def _is_being_trained(run: RunDir) -> bool:
    """Return whether the process that last locked a run folder still runs.

    The lock itself is not tried: a process that starts to train at that moment would find it taken.
    """
    try:
        holder = _HOLDER.fullmatch(run.lock_file.read_text(encoding="utf-8", errors="replace").strip())
        if holder is None:
            return False
        if holder["host"] != socket.gethostname():
            return time.time() - run.metrics_file.stat().st_mtime < SECONDS_TO_SILENCE
        age = process_age(holder["pid"])
        # A later process may have been given the same number.
        return age is not None and time.time() - age <= os.stat(run.lock_file).st_mtime + 1
    except OSError:
        return False


def print_runs(rows: Sequence[RunSummary], console: Console) -> None:
    """Print the table. The folder is printed once if all runs are in the same one."""
    parents = {row.folder.parent for row in rows}
    folder = parents.pop() if len(parents) == 1 else Path()
    if folder != Path():
        console.print(f"In {folder}:", highlight=False)
    table = Table(
        box=None, pad_edge=False, caption="valid, best: validation loss in nats per token", caption_justify="left"
    )
    # A pipe has no width; a narrow terminal has no room for the step of the best loss.
    width = console.width if console.is_terminal else PIPE_WIDTH
    names = ["run", "config", "step", "valid", "best", "at step", "status", "launched"]
    if width < WIDE:
        names.remove("at step")
    for name in names:
        is_number = name in ("step", "valid", "best", "at step")
        justify: Any = "right" if is_number else "left"
        table.add_column(name, justify=justify, no_wrap=name not in ("run", "config"), overflow="fold")
    for row in rows:
        step = "" if row.step is None else f"{row.step:,}" + ("" if row.steps is None else f"/{row.steps:,}")
        cells = {
            "run": str(row.folder.relative_to(folder)),
            "config": row.config or "",
            "step": step + " trials" * (row.kind == "sweep"),
            "valid": _format_loss(row.valid_loss),
            "best": _format_loss(row.best_valid_loss),
            "at step": "" if row.best_step is None else f"{row.best_step:,}",
            "status": row.status,
            "launched": "" if row.launched is None else time.strftime("%b %d %H:%M", time.localtime(row.launched)),
        }
        table.add_row(*(cells[name] for name in names), style="yellow" if row.problem else "")
    console.print(table, width=width)
    problems = [row.problem for row in rows if row.problem]
    for problem in problems[:MAX_PROBLEMS]:
        console.print(problem, style="yellow", highlight=False, soft_wrap=True)
    if len(problems) > MAX_PROBLEMS:
        console.print(f"and {len(problems) - MAX_PROBLEMS} more problems", style="yellow", highlight=False)


def _format_loss(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.4f}"
