"""Compare the recorded metrics, samples and checkpoints of two runs."""

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
from rustgpt_jax.tracking.metric_writer import HPARAMS, iter_metrics, last_step
from rustgpt_jax.training.checkpointing import CorruptCheckpoint, read_metadata
from rustgpt_jax.workdir.run_dir import RunDir

# Metrics that depend on the clock.
TIMED = ("time", "train/tokens_per_second", "train/flops_share")
# Values that are not compared, and the step, as they appear in a line. The hyperparameters are compared as configs.
IGNORED_IN_LINE = re.compile(rb', "(?:time|train/tokens_per_second|train/flops_share|hparams/[^"]*)": [^,}"]+')
STEP_IN_LINE = re.compile(rb'\{"step": (\d{1,10}), "')
LINES_PER_BLOCK = 4096
# Shown for a value that one of the runs lacks.
ABSENT = "(missing)"


class FirstDifference(NamedTuple):
    """The first step at which two records differ, the name of the value, and the two values."""

    step: int
    name: str
    first: Any
    second: Any

    def __str__(self) -> str:
        values = f"{self.first} in the first run and {self.second} in the second"
        return f"Step {self.step:,} is the first that differs: {self.name} is {values}."


class MetricComparison(NamedTuple):
    """The comparison of two records over the steps that both have.

    Attributes:
        last_step: The last step that both have.
        n_values: The number of compared values.
        agreed: The last step that both have before the first difference; 0 if there is none.
        first_difference: The first difference, or None.
    """

    last_step: int
    n_values: int
    agreed: int
    first_difference: FirstDifference | None

    def describe(self) -> dict[str, Any]:
        """Return the comparison as JSON has it."""
        first = self.first_difference
        return self._asdict() | {"first_difference": None if first is None else first._asdict()}


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
    start = _skip_identical_lines(first, second)
    agreed, n_values = start.agreed, start.n_values
    for step, left, right in _iter_steps(first, second, start.offsets):
        if step > last:
            break
        agreed = max(agreed, start.last_step if step > start.last_step else 0)
        for name in dict.fromkeys([*left, *right]):
            if names is not None and name not in names:
                continue
            values = left.get(name, ABSENT), right.get(name, ABSENT)
            # A run that was killed during its last step may have recorded it only in part.
            if step == last and ABSENT in values:
                continue
            n_values += name != "stage"
            if not values_match(*values, tolerance):
                return MetricComparison(last, n_values, agreed, FirstDifference(step, name, *values))
        agreed = step
    return MetricComparison(last, n_values, max(agreed, start.last_step), None)


class _IdenticalLines(NamedTuple):
    """The common beginning of two records, ignoring clock-dependent values.

    Attributes:
        offsets: The byte at which each file continues.
        last_step: The last step of the common lines, which may have more lines.
        agreed: The step before it.
        n_values: The number of values compared.
    """

    offsets: tuple[int, int] = (0, 0)
    last_step: int = 0
    agreed: int = 0
    n_values: int = 0


def _skip_identical_lines(first: Path, second: Path) -> _IdenticalLines:
    """Compare lines that are bytewise identical without parsing them."""
    found = _IdenticalLines()
    paths = [RunDir(path).metrics_file for path in (first, second)]
    if not all(path.is_file() for path in paths):
        return found
    with open(paths[0], "rb") as left, open(paths[1], "rb") as right:
        while True:
            blocks = [b"".join(islice(file, LINES_PER_BLOCK)) for file in (left, right)]
            text, other = (IGNORED_IN_LINE.sub(b"", block) for block in blocks)
            if text != other or not text.endswith(b"\n"):
                return found
            steps = [int(match[1]) if (match := STEP_IN_LINE.match(line)) else -1 for line in text.splitlines()]
            if -1 in steps or [found.last_step, *steps] != sorted([found.last_step, *steps]):
                return found
            agreed = max((step for step in [found.agreed, found.last_step, *steps] if step < steps[-1]), default=0)
            n_values = text.count(b'": ') - text.count(b'"step": ') - text.count(b'"stage": ')
            offsets = (found.offsets[0] + len(blocks[0]), found.offsets[1] + len(blocks[1]))
            found = _IdenticalLines(offsets, steps[-1], agreed, found.n_values + n_values)


def _iter_steps(
    first: Path, second: Path, offsets: tuple[int, int]
) -> Iterator[tuple[int, dict[str, Any], dict[str, Any]]]:
    """Yield the steps of two records from the given offsets, with the values of each."""
    sides = [_iter_values(path, offset) for path, offset in zip((first, second), offsets, strict=True)]
    heads = [next(side, None) for side in sides]
    while any(heads):
        step = min(head[0] for head in heads if head)
        left, right = (head[1] if head and head[0] == step else {} for head in heads)
        yield step, left, right
        heads = [
            next(side, None) if head and head[0] == step else head for side, head in zip(sides, heads, strict=True)
        ]


def _iter_values(path: Path, offset: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the values of each step, merged over its lines, without clock-dependent ones."""
    previous = -1
    for step, lines in groupby(iter_metrics(path, offset=offset), key=itemgetter("step")):
        if step < previous:
            raise UserError(f"{RunDir(path).metrics_file} is damaged: step {step} comes after step {previous}.")
        previous, values = step, dict[str, Any]()
        for line in lines:
            values |= line
        ignored = (*TIMED, "step")
        yield step, {n: value for n, value in values.items() if n not in ignored and not n.startswith(HPARAMS)}


def values_match(left: Any, right: Any, tolerance: float = 0.0) -> bool:
    """Return whether two values of a record are equal, both NaN, or within a relative tolerance."""
    if not isinstance(left, (int, float)) or not isinstance(right, (int, float)):
        return left == right
    if math.isfinite(left) and math.isfinite(right):
        return abs(left - right) <= tolerance * max(abs(left), abs(right))
    return left == right or (math.isnan(left) and math.isnan(right))


def compare_samples(first: Path, second: Path, last_step: int) -> tuple[int, FirstDifference | None]:
    """Compare the samples that two runs generated up to a step.

    Returns:
        The number of samples if all are equal, and the first difference or None.

    Raises:
        UserError: A file is damaged.
    """
    left, right = ([text for text in _read_samples(path) if text["step"] <= last_step] for path in (first, second))
    missing: dict[str, Any] = {}
    for here, there in zip_longest(left, right, fillvalue=missing):
        if here != there:
            either = here or there
            name = f"the text after {either['prompt']!r}"
            return 0, FirstDifference(either["step"], name, here.get("text", ABSENT), there.get("text", ABSENT))
    return len(left), None


def _read_samples(path: Path) -> list[dict[str, Any]]:
    file = RunDir(path).samples_file
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    samples = []
    for number, line in enumerate(lines, start=1):
        # A killed process may have left an incomplete line.
        if line.endswith(b"\n"):
            try:
                samples.append(json.loads(line))
            except ValueError as error:
                raise UserError(f"{file}, line {number} is damaged: it is not JSON.") from error
            if not isinstance(samples[-1], dict) or not samples[-1].keys() >= {"step", "prompt", "text"}:
                raise UserError(f"{file}, line {number} is damaged: it has no step, prompt and text.")
    return samples


def describe_missing_record(run: RunDir, stage: Stage, step: int) -> str:
    """Return how metrics.jsonl falls short of a logged step of a stage, such as 'is empty'; '' if it does not."""
    if not run.metrics_file.exists():
        return "is missing"
    last = last_step(run.path)
    logged = next((each for each in range(step, stage.first_step, -1) if stage.is_logged(each)), 0)
    if last < logged:
        return f"ends at step {last}" if last else "is empty"
    return ""


class ArrayComparison(NamedTuple):
    """A comparison of the last common checkpoints of two runs; it has no arrays if there are none.

    Attributes:
        step: The step of the checkpoints.
        n_arrays: The number of arrays.
        unequal: The names of the arrays that differ.
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
