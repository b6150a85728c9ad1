"""Recompute steps of runs with their own code, and find the first tensor in which two runs differ.

    python -m rustgpt_jax.reproduce.step_trace RUN FIRST LAST OUT.json [--intermediates]

writes a trace: a JSON list with an object per step. The object has the number of the step as "step" and, for each of
PARTS, the fingerprints of its arrays by name, in order of computation ("loss" has the value of the loss instead).
"before" and "after" are the states before and after the step. Activations and gradients are included only with
--intermediates.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from rustgpt_jax.atomic_io import write_atomically
from rustgpt_jax.errors import UserError
from rustgpt_jax.process_setup import enable_compilation_cache
from rustgpt_jax.pytrees import fingerprint_tree
from rustgpt_jax.reproduce.recorded_run import ACTIVATION, ACTIVATION_GRADIENT, PARAMETER_GRADIENT, RecordedRun
from rustgpt_jax.reproduce.snapshot_runner import load_snapshot_code
from rustgpt_jax.tracking.console import PlainTextConsole
from rustgpt_jax.workdir.environment import load_autotuning
from rustgpt_jax.workdir.event_log import load_first_launch
from rustgpt_jax.workdir.run_dir import RunDir

# The parts of a step in order of computation.
PARTS = ("batch", "before", "activations", "loss", "gradients", "after")
# Intermediates are traced in the first pass if there are fewer steps than this.
FEW_STEPS = 3
# The parts of each step by its number, each a mapping from names to fingerprints.
Trace = dict[int, dict[str, dict[str, str]]]


class TensorDifference(NamedTuple):
    """The first tensor in which two runs differ: its step, the part of the step, and its name."""

    step: int
    part: str
    name: str


def write_trace(path: Path, first: int, last: int, with_intermediates: bool, console: Console) -> list[dict[str, Any]]:
    """Return the trace of the steps `first` to `last` of a run.

    Raises:
        UserError: The run does not have the steps.
    """
    with RecordedRun(path, console) as run:
        run.check_step(first)
        run.check_step(last)
        state, trace = run.compute_state(first - 1), []
        for step in range(first, last + 1):
            tensors = run.measure_step(state).tensors if with_intermediates else []
            (batch,) = run.load_batches(state, 1)
            parts: dict[str, Any] = {
                "step": step,
                "batch": fingerprint_tree(batch._asdict()),
                "before": fingerprint_tree(state),
                "activations": {each.name: each.fingerprint for each in tensors if each.kind == ACTIVATION},
                "gradients": {each.name: each.fingerprint for each in tensors if each.kind == ACTIVATION_GRADIENT},
            }
            for each in tensors:
                if each.kind == PARAMETER_GRADIENT:
                    parts["gradients"][f"params/{each.name}"] = each.fingerprint
            state, (metrics,) = run.train(state, 1)
            # A string, because NaN does not equal itself.
            parts |= {"loss": {"train/loss": repr(metrics.loss.item())}, "after": fingerprint_tree(state)}
            trace.append(parts)
        return trace


def trace_steps(run: RunDir, first: int, last: int, with_intermediates: bool, is_trusted: bool = False) -> Trace:
    """Recompute the steps `first` to `last` of a run with the code and settings of its first launch.

    Raises:
        UserError: The steps cannot be recomputed, or the code is not trusted.
        KeyboardInterrupt: A signal requests a stop.
    """
    with load_snapshot_code(run, load_first_launch(run), is_trusted) as code, tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "trace.json", Path(folder) / "log"
        arguments = [
            str(run.path.absolute()),
            str(first),
            str(last),
            str(out),
            *(["--intermediates"] if with_intermediates else []),
        ]
        with open(log, "wb") as errors:
            status, stopped_by = code.run(["-m", "rustgpt_jax.reproduce.step_trace", *arguments], errors)
        if stopped_by is not None:
            raise KeyboardInterrupt
        if status or not out.exists():
            lines = log.read_text(errors="replace").strip().splitlines() or [f"exit status {status}"]
            raise UserError(f"The steps of {run.path} cannot be recomputed: {lines[-1].removeprefix('error: ')}")
        return {parts.pop("step"): parts for parts in json.loads(out.read_bytes())}


def find_first_tensor(
    first: RunDir, second: RunDir, last_equal: int, first_different: int, is_trusted: bool = False
) -> TensorDifference | None:
    """Find the first tensor in which two runs differ.

    Args:
        first: One run.
        second: The other run.
        last_equal: The last step whose records are equal.
        first_different: The first step whose records differ.
        is_trusted: Whether the user allowed running code that is not installed here.

    Raises:
        UserError: The steps of a run cannot be recomputed.
    """

    def find_between(begin: int, end: int, with_intermediates: bool) -> TensorDifference | None:
        left, right = (trace_steps(run, begin, end, with_intermediates, is_trusted) for run in (first, second))
        return next(_iter_differences(left, right), None)

    begin = max(last_equal, 1)
    # Intermediates are expensive: for many steps, trace them only at the step where they are needed.
    with_intermediates = first_different - begin < FEW_STEPS
    found = find_between(begin, first_different, with_intermediates)
    if found is not None and found.part == "before" and found.step > 1:
        # The states differed before the logged metrics did.
        found, with_intermediates = find_between(1, begin, False) or found, False
    if found is None or found.part in ("batch", "before") or with_intermediates:
        return found
    return find_between(found.step, found.step, True) or found


def _iter_differences(left: Trace, right: Trace) -> Iterator[TensorDifference]:
    for step in sorted(left.keys() & right.keys()):
        for part in PARTS:
            here, there = left[step][part], right[step][part]
            for name in dict.fromkeys([*here, *there]):
                if here.get(name) != there.get(name):
                    yield TensorDifference(step, part, name)


def main() -> int:
    """Write a trace, as described above, and return the exit status: 2 after an error message."""
    parser = argparse.ArgumentParser(prog="python -m rustgpt_jax.reproduce.step_trace", description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("first", type=int)
    parser.add_argument("last", type=int)
    parser.add_argument("out", type=Path)
    parser.add_argument("--intermediates", action="store_true")
    args = parser.parse_args()
    enable_compilation_cache()
    load_autotuning(RunDir(args.run))
    try:
        trace = write_trace(args.run, args.first, args.last, args.intermediates, PlainTextConsole(stderr=True))
        write_atomically(args.out, json.dumps(trace) + "\n")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
