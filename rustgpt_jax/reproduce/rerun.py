"""The verb `rerun`: repeat a run with the code saved in its folder, and compare the two runs."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from rustgpt_jax.atomic_io import atomic_folder, read_json, write_atomically
from rustgpt_jax.errors import UserError
from rustgpt_jax.reproduce.compare_metrics import (
    ArrayComparison,
    FirstDifference,
    MetricComparison,
    compare_checkpoints,
    compare_records,
    compare_samples,
    describe_missing_record,
)
from rustgpt_jax.reproduce.run_diff import compare_metadata, print_section
from rustgpt_jax.reproduce.snapshot_runner import SnapshotCode, load_snapshot_code
from rustgpt_jax.tracking.console import print_line
from rustgpt_jax.tracking.metric_writer import last_step
from rustgpt_jax.tracking.trackers import LOCAL
from rustgpt_jax.workdir.event_log import EventLog, Launch, load_first_launch, load_launches
from rustgpt_jax.workdir.run_dir import RunDir, load_config, load_stages

# Training in `fused` mode computes sums in a different order than training alone.
FUSED_TOLERANCE = 1e-3
MAX_NAMED = 4
# The files that a run starts from, and the autotuning results of its compiler.
INITIAL_FILES = ("config.json", "tokenizer.json", "parameters.safetensors", "import.json", "autotune.textproto")


class RunComparison(NamedTuple):
    """The comparison of a run with its rerun.

    Attributes:
        is_same: Whether the results are the same.
        metrics: The comparison of the recorded metrics.
        tolerance: The relative tolerance of that comparison; 0 if it is bitwise.
        n_texts: The number of samples that are equal.
        text: The first sample that differs, or None.
        arrays: The comparison of the last common checkpoints; None if the comparison is not bitwise.
    """

    is_same: bool
    metrics: MetricComparison
    tolerance: float = 0.0
    n_texts: int = 0
    text: FirstDifference | None = None
    arrays: ArrayComparison | None = None

    def describe(self) -> dict[str, Any]:
        """Return the comparison as JSON has it."""
        return {
            "metrics": self.metrics.describe(),
            "tolerance": self.tolerance,
            "n_texts": self.n_texts,
            "first_different_text": None if self.text is None else self.text._asdict(),
            "checkpoint": self.arrays._asdict() if self.arrays is not None and self.arrays.n_arrays else None,
        }


class Rerun(NamedTuple):
    """A rerun: the exit status, its folder, and the comparison, or None if a signal stopped the training."""

    status: int
    path: Path
    comparison: RunComparison | None


def rerun(path: Path, to: Path | None, console: Console, is_trusted: bool = False) -> Rerun:
    """Repeat a run in the folder `to` and compare the results.

    The exit status is 0 if the results are the same, 1 if not, or that of the training if a signal stopped it; the same
    command then resumes the rerun.

    Args:
        path: The folder of the run.
        to: The folder of the rerun; NAME.rerun next to the run by default.
        console: The console to print to.
        is_trusted: Whether the user allowed running code that is not installed here.

    Raises:
        UserError: The code is missing, or neither installed here nor trusted; `to` contains anything but a rerun of
            this run; or the rerun fails.
    """
    run = RunDir(path)
    if not run.config_file.exists():
        load_config(path)  # Raises an error that explains what is wrong with the folder.
    named = path if path.name else path.absolute()
    new = RunDir(to or named.with_name(f"{named.name}.rerun"))
    launch = load_first_launch(run)
    codes = list(dict.fromkeys(each.code for each in load_launches(run)))
    if len(codes) > 1:
        print_line(console, f"{path} was trained by {len(codes)} versions of the code; this is the first, {codes[0]}.")
    if launch.left_out:
        files = ", ".join(launch.left_out[:MAX_NAMED]) + (", ..." if len(launch.left_out) > MAX_NAMED else "")
        print_line(console, f"The rerun lacks files that were next to the code but not in its snapshot: {files}.")
    with load_snapshot_code(run, launch, is_trusted) as code:
        print_line(console, code.note)
        _create_folder(run, new, launch)
        status = _train(run, new, code, console)
    if status:
        return Rerun(status, new.path, None)
    found = _compare_fused(run, new, console) if launch.mode == "fused" else _compare(run, new, console)
    return Rerun(0 if found.is_same else 1, new.path, found)


def _create_folder(run: RunDir, new: RunDir, launch: Launch) -> None:
    """Create the folder of the new run, or check that an existing one is a rerun of the same run."""
    source = {"code": launch.code, "config": hashlib.sha256(run.config_file.read_bytes()).hexdigest()}
    if new.path.exists() and not new.path.is_dir():
        raise UserError(f"{new.path} is a file, not a folder for the rerun; choose another.")
    if new.path.exists() and any(new.path.iterdir()):
        started = [event for event in EventLog(new.events_file).events() if event["event"] == "rerun"]
        if not started or {name: started[0].get(name) for name in source} != source:
            raise UserError(f"{new.path} is not empty and not a rerun of {run.path}; choose another folder.")
        return
    with atomic_folder(new.path) as hidden:
        for name in INITIAL_FILES:
            if (run.path / name).exists():
                shutil.copyfile(run.path / name, hidden / name)
        _keep_local_trackers(RunDir(hidden))
        EventLog(RunDir(hidden).events_file).append("rerun", of=str(run.path), **source)


def _keep_local_trackers(run: RunDir) -> None:
    """Remove the trackers that would show the rerun elsewhere from its config. They are not part of its hash."""
    record = read_json(run.config_file)
    try:
        logging = record["config"]["logging"]
        logging["trackers"] = [name for name in logging["trackers"] if name in LOCAL]
    except (KeyError, TypeError):
        # The config of an earlier version, which has no trackers, or a damaged one, which training reports.
        return
    write_atomically(run.config_file, json.dumps(record, indent=2) + "\n")


def _train(run: RunDir, new: RunDir, code: SnapshotCode, console: Console) -> int:
    """Train the new run with the code of the run and return the exit status, 0 if it finished."""
    wanted = last_step(run.path)
    total_steps = _total_steps(run)
    if wanted < total_steps:
        print_line(
            console,
            f"{run.path} stopped at step {wanted:,} of {total_steps:,}. Its rerun does not stop there; the common "
            "steps are compared.",
        )
    # The snapshot of an installed package has no launch.py.
    script = code.folder / "launch.py"
    program = [str(script)] if script.exists() else ["-m", "rustgpt_jax"]
    status, stopped_by = code.run([*program, "train", f"--run={new.path.absolute()}"])
    if stopped_by is not None and status:
        print_line(console, f"Stopped by {stopped_by.name}. The same command resumes the rerun.")
        return status
    reached = last_step(new.path)
    # The rerun of a run that diverged also ends with a status other than 0.
    if status and reached < wanted:
        raise UserError(f"The rerun of {run.path} ended at step {reached} with exit status {status}; see above.")
    return 0


def _total_steps(run: RunDir) -> int:
    try:
        return load_stages(run.path)[-1].end_step
    except UserError:
        # The config may be valid only in the run's own version of the code.
        return 0


def _compare(run: RunDir, new: RunDir, console: Console) -> RunComparison:
    """Print for how many steps two runs are identical and, if they differ, the differences of their inputs."""
    metrics, arrays = compare_records(run.path, new.path), compare_checkpoints(run, new)
    n_texts, text = compare_samples(run.path, new.path, metrics.last_step)
    first = min(filter(None, (metrics.first_difference, text)), key=lambda each: each.step, default=None)
    if first is not None:
        print_line(console, f"bit-identical for {min(metrics.agreed, first.step - 1):,} steps. {first}")
    else:
        counts = f"{metrics.n_values:,} recorded values and {n_texts:,} texts"
        print_line(console, f"bit-identical for {metrics.last_step:,} steps: {counts}")
    if arrays.n_arrays:
        same = f"{arrays.n_arrays - len(arrays.unequal)} of {arrays.n_arrays} arrays are the same"
        unequal = f"; the first that differs: {arrays.unequal[0]}" if arrays.unequal else ""
        print_line(console, f"After step {arrays.step:,}, {same}{unequal}.")
    is_recorded = _check_record(run, console)
    sections = compare_metadata(run, new)
    found = RunComparison(False, metrics, 0.0, n_texts, text, arrays)
    if first is not None or arrays.unequal or not metrics.last_step:
        for section in sections:
            print_section(section, console)
        return found
    data = next(section for section in sections if section.kind == "data")
    if data.differences:
        print_line(console, "The data differ, but no step read the changed part:")
        print_section(data, console)
    return found._replace(is_same=is_recorded and not data.differences)


def _check_record(run: RunDir, console: Console) -> bool:
    """Return whether metrics.jsonl reaches the checkpoints of a run; print a message if not."""
    saved = min(max(run.saved_steps, default=0), _total_steps(run))
    if not saved:
        return True
    stages = load_stages(run.path)
    stage = next((stage for stage in stages if saved <= stage.last_step), stages[-1])
    missing = describe_missing_record(run, stage, saved)
    if missing:
        print_line(console, f"Later steps cannot be compared: {run.metrics_file} {missing}.")
    return not missing


def _compare_fused(run: RunDir, new: RunDir, console: Console) -> RunComparison:
    """Compare two runs within a tolerance; the first was trained fused with others and so is not bit-exact."""
    metrics = compare_records(run.path, new.path, FUSED_TOLERANCE)
    print_line(
        console,
        f"{run.path} was trained together with others, which changes the order of sums; the comparison is not bitwise.",
    )
    if metrics.first_difference is None:
        counts = f"{metrics.n_values:,} recorded values"
        print_line(console, f"within {FUSED_TOLERANCE:g} for {metrics.last_step:,} steps: {counts}")
        return RunComparison(metrics.last_step > 0, metrics, FUSED_TOLERANCE)
    print_line(console, f"within {FUSED_TOLERANCE:g} for {metrics.agreed:,} steps. {metrics.first_difference}")
    for section in compare_metadata(run, new):
        print_section(section, console)
    return RunComparison(False, metrics, FUSED_TOLERANCE)
