"""Two runs held against each other: what they were made of, where their losses part, and which tensor was the first."""

import json
import tempfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from rustgpt_jax.errors import UserError
from rustgpt_jax.reproduce.compare_metrics import compare_checkpoints, compare_records, in_a_sentence
from rustgpt_jax.reproduce.metadata_diff import Difference, Section, in_a_line, say, say_section, sections
from rustgpt_jax.reproduce.snapshot_runner import own_code
from rustgpt_jax.workdir.code_snapshot import CODE
from rustgpt_jax.workdir.event_log import first_launch
from rustgpt_jax.workdir.run_dir import RunDir, load_config

# Where two runs part inside a step: both are made again by their own code, and held against each other by tensor.

# What a step makes, in the order in which it is made.
PARTS = ("batch", "before", "activations", "loss", "gradients", "after")
FEW_STEPS = 3
Trace = dict[int, dict[str, Any]]


class Origin(NamedTuple):
    """The first tensor in which two runs differ: its step, the part of the step, its name there."""

    step: int
    part: str
    name: str


def trace(run: RunDir, first: int, last: int, has_taps: bool, is_trusted: bool = False) -> Trace:
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


def find_origin(first: RunDir, second: RunDir, agreed: int, parted: int, is_trusted: bool = False) -> Origin | None:
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
    first: RunDir, second: RunDir, is_trusted: bool, begin: int, last: int, has_taps: bool
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


LOSSES = ("train/loss", "valid/loss")
MOST_CAUSES = 3


class Causes(NamedTuple):
    """What a part of a step depends on: knobs, files of the code and packages, by the beginnings of their names."""

    words: str
    knobs: tuple[str, ...]
    code: tuple[str, ...]
    packages: tuple[str, ...]


ALL = ("",)
# In the order in which a step makes them.
OF_PART = {
    "batch": Causes(
        "batch",
        ("seed", "data.", "tokenizer.", "model.context_length", "training.", "stages"),
        ("rustgpt_jax/data/", "rustgpt_jax/tokenizers/"),
        ("tokenizers", "grain", "numpy"),
    ),
    "before": Causes("state before it", ("seed", "model.", "optimizer.", "init_from"), ALL, ("jax", "flax", "optax")),
    "activations": Causes("activations", ("model.", "seed"), ("rustgpt_jax/model/",), ("jax", "flax")),
    "loss": Causes("loss", ("model.", "data.", "training."), ("rustgpt_jax/training/",), ("jax",)),
    "gradients": Causes(
        "gradients", ("model.", "training."), ("rustgpt_jax/model/", "rustgpt_jax/training/"), ("jax", "flax")
    ),
    "after": Causes(
        "update",
        ("optimizer.", "schedule.", "training.steps", "faults.", "stages"),
        ("rustgpt_jax/training/",),
        ("optax", "jax"),
    ),
}
# What no compiled program makes.
ON_THE_HOST = ("batch", "before")


def diff(first: Path, second: Path, console: Console, is_trusted: bool = False) -> bool:
    """Print the differences between two runs, from their configs to the first tensor, and the likely cause.

    Steps are recomputed only with code that is also installed here, unless the runs' code `is_trusted`.

    Returns:
        Whether the runs are known to be the same; False if something could not be compared.

    Raises:
        UserError: A folder holds no run.
    """
    for path in (first, second):
        if not RunDir(path).config_file.exists():
            load_config(path)  # Which says what is there instead.
    runs = RunDir(first), RunDir(second)
    say(console, f"{first} -> {second}")
    found = sections(*runs)
    for section in found:
        say_section(section, console)
    is_same = _compare_steps(*runs, found, console, is_trusted)
    return is_same and not any(section.differences or section.missing for section in found)


def _compare_steps(first: RunDir, second: RunDir, found: list[Section], console: Console, is_trusted: bool) -> bool:
    losses = compare_records(first.path, second.path, names=LOSSES)
    every, arrays = compare_records(first.path, second.path), compare_checkpoints(first, second)
    if losses.parting:
        say(console, f"losses: {in_a_sentence(losses.parting)}")
    else:
        say(console, f"losses: the same for {losses.last_step:,} steps")
    if every.parting is None and not arrays.unequal:
        if arrays.n_arrays:
            say(console, f"checkpoints: after step {arrays.step:,} all {arrays.n_arrays} arrays are the same")
        else:
            say(console, "checkpoints: not compared, since there is no valid checkpoint of the same step in both")
        return True
    agreed, parted = (every.agreed, every.parting.step) if every.parting else (every.last_step, arrays.step)
    try:
        origin = find_origin(first, second, min(agreed, parted), parted, is_trusted)
    except UserError as error:
        say(console, f"first tensor: not found. {error}")
        say(console, _sentence(None, _likely(None, found)))
        return False
    if origin is None:
        steps = f"steps {max(agreed, 1):,} to {parted:,}"
        say(
            console,
            f"first tensor: none. Made again here, {steps} are the same in both: the cause is not in their code.",
        )
    else:
        say(console, f"first tensor: step {origin.step:,}, {OF_PART[origin.part].words}: {origin.name}")
    say(console, _sentence(origin, _likely(origin, found)))
    return False


def _likely(origin: Origin | None, found: Iterable[Section]) -> list[Difference]:
    """The differences that can be the cause of a first tensor; all there are, if none of them is known to."""
    kinds = {section.kind: section for section in found}
    program = kinds.pop("program")
    every = [(kind, each) for kind, section in kinds.items() for each in section.differences if each.matters]
    if origin is None:
        return [difference for _, difference in every]
    # What is the same program is the same code, as far as it goes.
    is_same_program = not program.missing and not program.differences and origin.part not in ON_THE_HOST
    fitting = [
        difference
        for kind, difference in every
        if _fits(origin, kind, difference.name) and not (kind == "code" and is_same_program)
    ]
    return fitting or [difference for _, difference in every]


def _fits(origin: Origin, kind: str, name: str) -> bool:
    causes = OF_PART[origin.part]
    match kind:
        case "config":
            knob = name.removeprefix("config.")
            return knob.startswith(causes.knobs) or _in_stage(knob).startswith(causes.knobs)
        case "code":
            # Parts of one's own may be anything.
            return name.startswith(causes.code) or name.split("/")[0] not in CODE
        case "data":
            return origin.part == "batch"
        case _:
            is_package = name.startswith("packages.")
            return not is_package or name.removeprefix("packages.").startswith(causes.packages)


def _in_stage(knob: str) -> str:
    """The knob that a stage has of its own: 'optimizer.learning_rate' of 'stages.second.optimizer.learning_rate'."""
    return knob.split(".", 2)[2] if knob.startswith("stages.") else knob


def _sentence(origin: Origin | None, likely: list[Difference]) -> str:
    shown = "; ".join(in_a_line(difference) for difference in likely[:MOST_CAUSES])
    rest = f"; and {len(likely) - MOST_CAUSES} more" if len(likely) > MOST_CAUSES else ""
    cause = f"{shown}{rest}" if likely else "nothing that was recorded"
    if origin is None:
        return f"likely cause: {cause}"
    parts = list(OF_PART)
    same = "".join(f"same {OF_PART[part].words}, " for part in parts[: parts.index(origin.part)]).removesuffix(", ")
    return f"step {origin.step:,}: {same}{'; ' if same else ''}not the same {OF_PART[origin.part].words}: {cause}"
