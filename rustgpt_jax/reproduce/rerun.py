"""The verb `rerun`: rerun a run from its folder with its saved code, and compare both."""

import hashlib
import shutil
from pathlib import Path

from rich.console import Console

from rustgpt_jax.atomic_io import atomic_folder
from rustgpt_jax.errors import UserError
from rustgpt_jax.reproduce.compare_metrics import (
    compare_checkpoints,
    compare_records,
    compare_samples,
    describe_missing_record,
    format_first_difference,
)
from rustgpt_jax.reproduce.run_diff import compare_metadata, print_line, print_section
from rustgpt_jax.reproduce.snapshot_runner import SnapshotCode, load_snapshot_code
from rustgpt_jax.tracking.metric_writer import last_step
from rustgpt_jax.workdir.event_log import EventLog, Launch, load_first_launch, load_launches
from rustgpt_jax.workdir.run_dir import RunDir, load_config, load_stages

# A population in `fused` mode takes sums in another order than a run alone.
FUSED_TOLERANCE = 1e-3
MOST_NAMED = 4
# What a run begins with, and what its compiler chose.
BEGINNING = ("config.json", "tokenizer.json", "parameters.safetensors", "import.json", "autotune.textproto")


def rerun(path: Path, to: Path | None, console: Console, is_trusted: bool = False) -> int:
    """Rerun a run in the folder `to` and compare the results.

    Args:
        path: The folder of the run.
        to: The folder of the rerun; NAME.rerun next to the run by default.
        console: The console to print to.
        is_trusted: Whether the user allowed running code that is not installed here.

    Returns:
        The exit status: 0 if the results are the same, 1 if not, or that of the training if a signal stopped it; the
        same command then resumes the rerun.

    Raises:
        UserError: The code is missing or neither installed here nor trusted, `to` holds anything else, or the rerun
            fails.
    """
    if not RunDir(path).config_file.exists():
        load_config(path)  # Which says what is there instead.
    beside = path if path.name else path.absolute()
    run, again = RunDir(path), RunDir(to or beside.with_name(f"{beside.name}.rerun"))
    launch = _first_launch(run, console)
    with load_snapshot_code(run, launch, is_trusted) as code:
        print_line(console, code.whose)
        _prepare(run, again, launch)
        status = _train(run, again, code, console)
    if status:
        return status
    return 0 if _compared(run, again, launch, console) else 1


def _first_launch(run: RunDir, console: Console) -> Launch:
    every, first = load_launches(run), load_first_launch(run)
    codes = list(dict.fromkeys(launch.code for launch in every))
    if len(codes) > 1:
        print_line(
            console, f"{run.path} was trained by {len(codes)} versions of the code; this is the first, {codes[0]}."
        )
    if first.left_out:
        files = ", ".join(first.left_out[:MOST_NAMED]) + (", ..." if len(first.left_out) > MOST_NAMED else "")
        print_line(
            console, f"Beside the code of {run.path}, but not kept with it and not there for its rerun: {files}."
        )
    return first


# Running.


def _prepare(run: RunDir, again: RunDir, launch: Launch) -> None:
    """Create the folder of the new run, or check that it exists already."""
    about = {"code": launch.code, "config": hashlib.sha256(run.config_file.read_bytes()).hexdigest()}
    if again.path.exists() and not again.path.is_dir():
        raise UserError(f"{again.path} is a file, and the folder of the rerun cannot be there; choose another.")
    if again.path.exists() and any(again.path.iterdir()):
        began = [event for event in EventLog(again.journal_file).events() if event["event"] == "rerun"]
        if not began or {name: began[0].get(name) for name in about} != about:
            raise UserError(f"{again.path} holds something else than a rerun of {run.path}; choose another folder.")
        return
    with atomic_folder(again.path) as hidden:
        for name in BEGINNING:
            if (run.path / name).exists():
                shutil.copyfile(run.path / name, hidden / name)
        EventLog(RunDir(hidden).journal_file).append("rerun", of=str(run.path), **about)


def _train(run: RunDir, again: RunDir, code: SnapshotCode, console: Console) -> int:
    """Train the new run with the old code and return the exit status, 0 if it finished."""
    wanted = _reached(run)
    _say_if_early(run, wanted, console)
    arguments = [str(code.folder / "launch.py"), "train", f"--run={again.path.absolute()}"]
    status, stopped_by = code.run(arguments)
    if stopped_by is not None and status:
        print_line(console, f"Stopped by {stopped_by.name}. The same command goes on from there.")
        return status
    reached = _reached(again)
    # A run that diverged ends with another status than 0, as the first one did.
    if status and reached < wanted:
        raise UserError(f"The rerun of {run.path} ended at step {reached} with exit status {status}, as it says above.")
    return 0


def _reached(run: RunDir) -> int:
    return last_step(run.path)


def _say_if_early(run: RunDir, reached: int, console: Console) -> None:
    try:
        total_steps = load_stages(run.path)[-1].end_step
    except UserError:
        # Its own code may read a config that this one does not.
        return
    if reached < total_steps:
        to = f"step {reached:,} of {total_steps:,}"
        print_line(
            console, f"{run.path} went to {to}. Its rerun is not stopped there; what both have made is compared."
        )


# Comparing.


def _compared(run: RunDir, again: RunDir, launch: Launch, console: Console) -> bool:
    """Print how far two runs are identical and, if they are not, what differs in their inputs."""
    if launch.mode == "fused":
        return _compared_roughly(run, again, console)
    found, arrays = compare_records(run.path, again.path), compare_checkpoints(run, again)
    n_texts, text = compare_samples(run.path, again.path, found.last_step)
    first_difference = min(filter(None, (found.first_difference, text)), key=lambda each: each.step, default=None)
    if first_difference is not None:
        print_line(
            console,
            f"bit-identical for {min(found.agreed, first_difference.step - 1):,} steps. "
            f"{format_first_difference(first_difference)}",
        )
    else:
        counts = f"{found.n_values:,} values and {n_texts:,} texts"
        print_line(console, f"bit-identical for {found.last_step:,} steps: {counts} of the record")
    if arrays.n_arrays:
        same = f"{arrays.n_arrays - len(arrays.unequal)} of {arrays.n_arrays} arrays are the same"
        first = f"; the first that is not: {arrays.unequal[0]}" if arrays.unequal else ""
        print_line(console, f"After step {arrays.step:,} {same}{first}.")
    is_identical = first_difference is None and not arrays.unequal and found.last_step > 0
    is_recorded = _has_its_record(run, console)
    if not is_identical:
        _say_sections(run, again, console)
        return False
    return _read_the_same(run, again, console) and is_recorded


def _has_its_record(run: RunDir, console: Console) -> bool:
    """Return whether metrics.jsonl reaches the checkpoints of a run; print a message if not."""
    try:
        every = load_stages(run.path)
    except UserError:
        # The run's own code may read a config that this code cannot.
        return True
    saved = min(max(run.saved_steps, default=0), every[-1].end_step)
    stage = next((stage for stage in every if saved <= stage.last_step), every[-1])
    missing = describe_missing_record(run, stage, saved) if saved else ""
    if missing:
        print_line(console, f"Later steps cannot be compared: {run.metrics_file} {missing}.")
    return not missing


def _read_the_same(run: RunDir, again: RunDir, console: Console) -> bool:
    """Return whether two runs with the same results read the same data; print the differences if not."""
    section = next(section for section in compare_metadata(run, again) if section.kind == "data")
    if section.differences:
        print_line(console, "The data are not the same, although no step read what differs:")
        print_section(section, console)
    return not section.differences


def _compared_roughly(run: RunDir, again: RunDir, console: Console) -> bool:
    found = compare_records(run.path, again.path, FUSED_TOLERANCE)
    print_line(
        console, f"{run.path} was trained together with others, its sums taken in another order: no bits are compared."
    )
    if found.first_difference is None:
        counts = f"{found.n_values:,} values of the record"
        print_line(console, f"within {FUSED_TOLERANCE:g} for {found.last_step:,} steps: {counts}")
        return found.last_step > 0
    print_line(
        console,
        f"within {FUSED_TOLERANCE:g} for {found.agreed:,} steps. {format_first_difference(found.first_difference)}",
    )
    _say_sections(run, again, console)
    return False


def _say_sections(run: RunDir, again: RunDir, console: Console) -> None:
    for section in compare_metadata(run, again):
        print_section(section, console)
