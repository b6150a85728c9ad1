"""Compare the recorded metrics, generated texts and checkpoints of two runs."""

import json
import math
import re
from collections.abc import Container, Iterator
from itertools import groupby, islice, zip_longest
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from rustgpt_jax.config.schema import Stage
from rustgpt_jax.errors import UserError
from rustgpt_jax.tracking.metric_writer import iter_metrics, last_step
from rustgpt_jax.training.checkpointing import CorruptCheckpoint, read_metadata
from rustgpt_jax.workdir.run_dir import RunDir

# What a clock decides, and no config.
TIMED = ("train/tokens_per_second", "train/flops_share")
# Clock-dependent metrics as they appear in a line, and the step at the start of a line.
OF_A_CLOCK = re.compile(rb', "train/tokens_per_second": [^,}"]+(?:, "train/flops_share": [^,}"]+)?')
STEP = re.compile(rb'\{"step": (\d{1,10}), "')
LINES_AT_A_TIME = 4096
# What there is where a side has none of something, in words.
ABSENT = "nothing"


class FirstDifference(NamedTuple):
    """The first step at which a value of two records differs, its name and the two values."""

    step: int
    name: str
    first: Any
    second: Any


def format_first_difference(found: FirstDifference) -> str:
    """Describe the first difference of two records."""
    return f"Step {found.step:,} is the first that differs: {found.name} is {found.first} and {found.second}."


class MetricComparison(NamedTuple):
    """The common part of two records: the last step, the number of compared values, and the first difference.

    `agreed` is the last step before that at which both have a value; 0 if there is none.
    """

    last_step: int
    n_values: int
    agreed: int
    first_difference: FirstDifference | None


def compare_records(
    first: Path, second: Path, tolerance: float = 0.0, names: Container[str] | None = None
) -> MetricComparison:
    """Compare the metrics of two runs over the steps that both have.

    Clock-dependent metrics are ignored, and so are metrics not in `names` if it is given. Values match if they are
    equal or within a relative `tolerance`.

    Raises:
        UserError: A record is damaged.
    """
    last = min(last_step(first), last_step(second))
    beginning = _same_beginning(first, second)
    agreed, n_values = beginning.agreed, beginning.n_values
    for step, left, right in _in_step(first, second, beginning.offsets):
        if step > last:
            break
        agreed = max(agreed, beginning.last_step if step > beginning.last_step else 0)
        for name in dict.fromkeys([*left, *right]):
            if names is not None and name not in names:
                continue
            here, there = left.get(name, ABSENT), right.get(name, ABSENT)
            # A run that was killed in its last step may have recorded a part of it.
            if step == last and ABSENT in (here, there):
                continue
            n_values += name != "stage"
            if not _is_equal(here, there, tolerance):
                return MetricComparison(last, n_values, agreed, FirstDifference(step, name, here, there))
        agreed = step
    return MetricComparison(last, n_values, max(agreed, beginning.last_step), None)


class _Beginning(NamedTuple):
    """The common beginning of two records, ignoring clock-dependent values.

    Attributes:
        offsets: The byte at which each file continues.
        last_step, agreed: The last step of the common lines, which may have more lines, and the step before it.
        n_values: The number of values compared.
    """

    offsets: tuple[int, int] = (0, 0)
    last_step: int = 0
    agreed: int = 0
    n_values: int = 0


def _same_beginning(first: Path, second: Path) -> _Beginning:
    """Skip lines that are bytewise identical, without parsing them."""
    found = _Beginning()
    paths = [RunDir(path).metrics_file for path in (first, second)]
    if not all(path.is_file() for path in paths):
        return found
    with open(paths[0], "rb") as left, open(paths[1], "rb") as right:
        while True:
            blocks = [b"".join(islice(file, LINES_AT_A_TIME)) for file in (left, right)]
            text, other = (OF_A_CLOCK.sub(b"", block) for block in blocks)
            if text != other or not text.endswith(b"\n"):
                return found
            steps = [int(match[1]) if (match := STEP.match(line)) else -1 for line in text.splitlines()]
            if -1 in steps or [found.last_step, *steps] != sorted([found.last_step, *steps]):
                return found
            agreed = max((step for step in [found.agreed, found.last_step, *steps] if step < steps[-1]), default=0)
            n_values = text.count(b'": ') - text.count(b'"step": ') - text.count(b'"stage": ')
            offsets = (found.offsets[0] + len(blocks[0]), found.offsets[1] + len(blocks[1]))
            found = _Beginning(offsets, steps[-1], agreed, found.n_values + n_values)


def _in_step(
    first: Path, second: Path, offsets: tuple[int, int]
) -> Iterator[tuple[int, dict[str, Any], dict[str, Any]]]:
    """Yield the steps of two records from the given offsets, with the values of each."""
    sides = [_steps(path, offset) for path, offset in zip((first, second), offsets, strict=True)]
    heads = [next(side, None) for side in sides]
    while any(heads):
        step = min(head[0] for head in heads if head)
        left, right = (head[1] if head and head[0] == step else {} for head in heads)
        yield step, left, right
        heads = [
            next(side, None) if head and head[0] == step else head for side, head in zip(sides, heads, strict=True)
        ]


def _steps(path: Path, offset: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the values of each step, merged over its lines, without clock-dependent ones."""
    before = -1
    for step, lines in groupby(iter_metrics(path, offset=offset), key=itemgetter("step")):
        if step < before:
            raise UserError(f"{RunDir(path).metrics_file} is damaged: step {step} comes after step {before}.")
        before, values = step, dict[str, Any]()
        for line in lines:
            values |= line
        yield step, {name: value for name, value in values.items() if name not in (*TIMED, "step")}


def compare_samples(first: Path, second: Path, last_step: int) -> tuple[int, FirstDifference | None]:
    """How many texts two runs wrote up to a step, and where they part. Raises UserError for a file of other things."""
    both = [[text for text in _samples(path) if text["step"] <= last_step] for path in (first, second)]
    for here, there in zip_longest(*both, fillvalue={}):
        if here != there:
            known = here or there
            name = f"the text after {known['prompt']!r}"
            return 0, FirstDifference(known["step"], name, here.get("text", ABSENT), there.get("text", ABSENT))
    return len(both[0]), None


def describe_missing_record(run: RunDir, stage: Stage, step: int) -> str:
    """Explain why metrics.jsonl ends before a logged step of a stage; '' if it does not."""
    if not run.metrics_file.exists():
        return "is missing"
    last = last_step(run.path)
    logged = next((each for each in range(step, stage.first_step, -1) if stage.is_logged(each)), 0)
    if last < logged:
        return f"ends at step {last}" if last else "is empty"
    return ""


class ArrayComparison(NamedTuple):
    """The last checkpoint that two runs have in common: its step, its number of arrays, and those that differ.

    Without such a step there are no arrays.
    """

    step: int
    n_arrays: int
    unequal: list[str]


def compare_checkpoints(first: RunDir, second: RunDir) -> ArrayComparison:
    """Compare the last checkpoints that two runs have in common, by their fingerprints."""
    for step in sorted({*first.saved_steps} & {*second.saved_steps}, reverse=True):
        try:
            left, right = (read_metadata(run.checkpoints, step)["fingerprints"] for run in (first, second))
        except CorruptCheckpoint:
            continue
        names = dict.fromkeys([*left, *right])
        return ArrayComparison(step, len(names), [name for name in names if left.get(name) != right.get(name)])
    return ArrayComparison(0, 0, [])


def _is_equal(left: Any, right: Any, tolerance: float) -> bool:
    if isinstance(left, str) or isinstance(right, str):
        return left == right
    if math.isfinite(left) and math.isfinite(right):
        return abs(left - right) <= tolerance * max(abs(left), abs(right))
    return left == right or (math.isnan(left) and math.isnan(right))


def _samples(path: Path) -> list[dict[str, Any]]:
    file = RunDir(path).samples_file
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
