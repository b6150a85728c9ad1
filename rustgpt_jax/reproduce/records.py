"""What two runs have recorded, held against each other: metrics and texts step by step, and checkpoints."""

import json
import math
from collections.abc import Container
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from rustgpt_jax.errors import UserError
from rustgpt_jax.runs.folder import RunFolder
from rustgpt_jax.runs.metrics import read_metrics
from rustgpt_jax.training.checkpoints import Damaged, stored_about

# What a clock decides, and no config.
TIMED = ("train/tokens_per_second", "train/flops_share")
# What there is where a side has none of something, in words.
ABSENT = "nothing"


class Parting(NamedTuple):
    """Where two records part: the first step at which a value is not the same, its name and the two values."""

    step: int
    name: str
    first: Any
    second: Any


def in_a_sentence(parting: Parting) -> str:
    """Where two records part, in words."""
    return f"Step {parting.step:,} is the first that differs: {parting.name} is {parting.first} and {parting.second}."


class Comparison(NamedTuple):
    """What two records have in common: the last step of both, how many values were compared, where they part.

    `agreed` is the last step before that at which both have a value; 0 if there is none.
    """

    last_step: int
    n_values: int
    agreed: int
    parting: Parting | None


def compare_records(
    first: Path, second: Path, tolerance: float = 0.0, names: Container[str] | None = None
) -> Comparison:
    """Hold the metrics and the sampled texts of two runs against each other, as far as both have come.

    Values are equal if they are the same number, or within `tolerance` of its size; those that a clock decides are left
    out, and with `names` all others.
    """
    left, right = _values(first, names), _values(second, names)
    last_step = min(max(left, default=0), max(right, default=0))
    n_values, agreed = 0, 0
    for step in sorted(step for step in left.keys() | right.keys() if step <= last_step):
        here_and_there = left.get(step, {}), right.get(step, {})
        for name in dict.fromkeys(name for side in here_and_there for name in side):
            here, there = (side.get(name, ABSENT) for side in here_and_there)
            # A run that was killed in its last step may have recorded a part of it.
            if step == last_step and ABSENT in (here, there):
                continue
            n_values += 1
            if not _is_equal(here, there, tolerance):
                return Comparison(last_step, n_values, agreed, Parting(step, name, here, there))
        agreed = step
    return Comparison(last_step, n_values, agreed, None)


def compare_samples(first: Path, second: Path, last_step: int) -> tuple[int, Parting | None]:
    """How many texts two runs wrote up to a step, and where they part. Raises UserError for a file of other things."""
    both = [[text for text in _samples(path) if text["step"] <= last_step] for path in (first, second)]
    for here, there in zip_longest(*both, fillvalue={}):
        if here != there:
            known = here or there
            name = f"the text after {known['prompt']!r}"
            return 0, Parting(known["step"], name, here.get("text", ABSENT), there.get("text", ABSENT))
    return len(both[0]), None


class Arrays(NamedTuple):
    """The checkpoints of two runs after `step`, the last that both have: how many arrays, and which are not the same.

    Without such a step there are no arrays.
    """

    step: int
    n_arrays: int
    unequal: list[str]


def compare_checkpoints(first: RunFolder, second: RunFolder) -> Arrays:
    """Hold the last checkpoints that two runs both have against each other, by their fingerprints."""
    for step in sorted({*first.saved_steps} & {*second.saved_steps}, reverse=True):
        try:
            left, right = (stored_about(run.checkpoints, step)["fingerprints"] for run in (first, second))
        except Damaged:
            continue
        names = dict.fromkeys([*left, *right])
        return Arrays(step, len(names), [name for name in names if left.get(name) != right.get(name)])
    return Arrays(0, 0, [])


def _values(path: Path, names: Container[str] | None) -> dict[int, dict[str, Any]]:
    """The values of each step, whichever lines they stand in."""
    steps: dict[int, dict[str, Any]] = {}
    for line in read_metrics(path):
        kept = {name: value for name, value in line.items() if name not in (*TIMED, "step")}
        if names is not None:
            kept = {name: value for name, value in kept.items() if name in names}
        steps.setdefault(line["step"], {}).update(kept)
    return steps


def _is_equal(left: Any, right: Any, tolerance: float) -> bool:
    if isinstance(left, str) or isinstance(right, str):
        return left == right
    if math.isfinite(left) and math.isfinite(right):
        return abs(left - right) <= tolerance * max(abs(left), abs(right))
    return left == right or (math.isnan(left) and math.isnan(right))


def _samples(path: Path) -> list[dict[str, Any]]:
    file = RunFolder(path).samples_file
    if not file.exists():
        return []
    whole = file.read_bytes().splitlines(keepends=True)
    # A kill may have left half a line.
    return [_text(line, f"{file}, line {number}") for number, line in enumerate(whole, start=1) if line.endswith(b"\n")]


def _text(line: bytes, where: str) -> dict[str, Any]:
    try:
        text = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: it is damaged, for it is not JSON.") from error
    if not isinstance(text, dict) or not text.keys() >= {"step", "prompt", "text"}:
        raise UserError(f"{where}: it is damaged, for it has no step, prompt and text.")
    return text
