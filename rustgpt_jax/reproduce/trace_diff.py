"""Where two runs part inside a step: both are made again by their own code, and held against each other by tensor."""

import json
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rustgpt_jax.errors import UserError
from rustgpt_jax.reproduce.snapshot_runner import own_code
from rustgpt_jax.workdir.launch_log import first_launch
from rustgpt_jax.workdir.run_dir import RunFolder

# What a step makes, in the order in which it is made.
PARTS = ("batch", "before", "activations", "loss", "gradients", "after")
FEW_STEPS = 3
Trace = dict[int, dict[str, Any]]


class Origin(NamedTuple):
    """The first tensor in which two runs differ: its step, the part of the step, its name there."""

    step: int
    part: str
    name: str


def trace(run: RunFolder, first: int, last: int, has_taps: bool, is_trusted: bool = False) -> Trace:
    """Recompute the steps `first` to `last` of a run with the code and settings of its first launch.

    Raises:
        UserError: This is impossible, or the code may not be run.
        KeyboardInterrupt: A signal requests a stop.
    """
    with own_code(run, first_launch(run), is_trusted) as code, tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "trace.json", Path(folder) / "log"
        arguments = [str(run.path.absolute()), str(first), str(last), str(out), *(["--taps"] if has_taps else [])]
        with open(log, "wb") as errors:
            status, stopped_by = code.run(["-m", "rustgpt_jax.reproduce.step_trace", *arguments], errors)
        if stopped_by is not None:
            raise KeyboardInterrupt
        if status or not out.exists():
            lines = log.read_text(errors="replace").strip().splitlines() or [f"exit status {status}"]
            raise UserError(f"The steps of {run.path} cannot be made again: {lines[-1].removeprefix('error: ')}")
        return {step["step"]: step for step in json.loads(out.read_bytes())["steps"]}


def find_origin(
    first: RunFolder, second: RunFolder, agreed: int, parted: int, is_trusted: bool = False
) -> Origin | None:
    """The first tensor in which two runs differ, whose records agree up to one step and part at another.

    Raises UserError if either cannot be made again.
    """
    begin = max(agreed, 1)
    traced = partial(_first_between, first, second, is_trusted)
    # The inside of a few steps is looked at right away, that of many only where it is needed.
    has_taps = parted - begin < FEW_STEPS
    origin = traced(begin, parted, has_taps)
    if origin is not None and origin.part == "before" and origin.step > 1:
        # They differed before their records showed it.
        origin, has_taps = traced(1, begin, False) or origin, False
    if origin is None or origin.part in ("batch", "before") or has_taps:
        return origin
    return traced(origin.step, origin.step, True) or origin


def _first_between(
    first: RunFolder, second: RunFolder, is_trusted: bool, begin: int, last: int, has_taps: bool
) -> Origin | None:
    left, right = (trace(run, begin, last, has_taps, is_trusted) for run in (first, second))
    return _first_unequal(left, right)


def _first_unequal(left: Trace, right: Trace) -> Origin | None:
    for step in sorted(left.keys() & right.keys()):
        for part in PARTS:
            here, there = (dict(_tensors(side[step], part)) for side in (left, right))
            for name in dict.fromkeys([*here, *there]):
                if here.get(name) != there.get(name):
                    return Origin(step, part, name)
    return None


def _tensors(step: dict[str, Any], part: str) -> Iterator[tuple[str, Any]]:
    """The tensors of a part of a step by their names, each by what tells it apart."""
    if part == "loss":
        yield "train/loss", step["metrics"]["train/loss"]
    elif part in ("activations", "gradients"):
        yield from ((tensor["site"], tensor["fingerprint"]) for tensor in step.get(part, []))
    else:
        yield from step[part].items()
