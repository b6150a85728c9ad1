"""The verb `diff`: compare the inputs of two runs, their losses, and find the first tensor that differs."""

import ast
import difflib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.text import Text

from rustgpt_jax.data.preprocess import read_data_record
from rustgpt_jax.errors import UserError, short_repr
from rustgpt_jax.reproduce.compare_metrics import ABSENT, compare_checkpoints, compare_records, format_first_difference
from rustgpt_jax.reproduce.snapshot_runner import load_snapshot_code
from rustgpt_jax.tracking.formatting import replace_control_characters
from rustgpt_jax.training.run_inputs import read_beginning
from rustgpt_jax.workdir.code_snapshot import CODE, read_code
from rustgpt_jax.workdir.environment import flatten_environment
from rustgpt_jax.workdir.event_log import code_archive, load_first_launch, load_programs
from rustgpt_jax.workdir.run_dir import RunDir, load_config

# In what two runs differ before a step is made: config, code, environment, data, programs.

OWN = "the run's own"
HASH_DIGITS = 12
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class Difference(NamedTuple):
    """One difference of two runs: its name, and its value in the first and in the second.

    `patch` are the lines of a unified diff, for a file of the code. `matters` is whether it can change a run: a comment
    does not.
    """

    name: str
    first: Any
    second: Any
    patch: tuple[str, ...] = ()
    matters: bool = True


class Section(NamedTuple):
    """The differences of one kind; `missing` says what could not be compared."""

    kind: str
    differences: list[Difference]
    missing: str = ""


def compare_metadata(first: RunDir, second: RunDir) -> list[Section]:
    """Return the differences of two runs, causes before effects."""
    kinds = {
        "config": diff_configs,
        "code": diff_code,
        "environment": diff_environments,
        "data": diff_data,
        "program": diff_programs,
    }
    found = []
    for kind, differences in kinds.items():
        try:
            found.append(Section(kind, differences(first, second)))
        except UserError as error:
            found.append(Section(kind, [], str(error)))
    return found


def diff_configs(first: RunDir, second: RunDir) -> list[Difference]:
    """Return the knobs in which two recorded configs differ, including those of stages."""
    left, right = _knobs(first), _knobs(second)
    names = [name for name in dict.fromkeys([*left, *right]) if left.get(name, OWN) != right.get(name, OWN)]
    found = [Difference(f"config.{name}", left.get(name, OWN), right.get(name, OWN)) for name in names]
    earlier = [_json(run, run.config_file.name).get("earlier", []) for run in (first, second)]
    if earlier[0] != earlier[1]:
        here, there = (f"at steps {[each['until'] for each in side]}" if side else "never" for side in earlier)
        found.append(Difference("config was changed", here, there))
    return [*_beginning_differences(first, second), *found]


def _beginning_differences(first: RunDir, second: RunDir) -> list[Difference]:
    """Return differences in the source of the initial parameters (`--init_from` or an import)."""
    left, right = read_beginning(first), read_beginning(second)
    here, there = (
        f"{about['source']} at step {about['step']}" if "step" in about else about.get("source", ABSENT)
        for about in (left, right)
    )
    if here != there:
        return [Difference("init_from", here, there)]
    names = [name for name in ("taken", "partly", "from_seed", "fingerprints") if left.get(name) != right.get(name)]
    return [Difference(f"init_from: {name}", "some", "others") for name in names]


def _knobs(run: RunDir) -> dict[str, Any]:
    # As JSON, not as a Config: another version of the code may have other knobs.
    tree = dict(_json(run, run.config_file.name)["config"])
    own_stages = tree.pop("stages", [])
    knobs = flatten_environment(tree) | {"stages": [stage["name"] for stage in own_stages]}
    for stage in own_stages:
        knobs |= flatten_environment(
            {name: value for name, value in stage.items() if name != "name"}, f"stages.{stage['name']}."
        )
    return knobs


def diff_code(first: RunDir, second: RunDir) -> list[Difference]:
    """Return the files in which the code of the first launches differs."""
    both = [load_first_launch(run) for run in (first, second)]
    if both[0].code == both[1].code:
        return []
    left, right = (read_code(code_archive(run, launch)) for run, launch in zip((first, second), both, strict=True))
    names = sorted(name for name in left.keys() | right.keys() if left.get(name) != right.get(name))
    found = [_of_file(name, left.get(name), right.get(name)) for name in names]
    return sorted(found, key=lambda difference: not difference.matters)


def _of_file(name: str, left: bytes | None, right: bytes | None) -> Difference:
    before, after = ((content or b"").decode(errors="replace").splitlines() for content in (left, right))
    # The first two lines of the patch name the files.
    patch = tuple(difflib.unified_diff(before, after, lineterm="", n=1))[2:]
    matters = left is None or right is None or not name.endswith(".py") or _meaning(left) != _meaning(right)
    return Difference(name, ABSENT if left is None else "a file", ABSENT if right is None else "a file", patch, matters)


def _meaning(source: bytes) -> str | bytes:
    """Return a module without comments, docstrings and line breaks, or unchanged if it cannot be parsed."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return source
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


def diff_environments(first: RunDir, second: RunDir) -> list[Difference]:
    """Return differences of versions, devices, settings and training mode at the first launches."""
    both = [load_first_launch(run) for run in (first, second)]
    left, right = (
        flatten_environment(launch.environment)
        | {"launch.mode": launch.mode, "launch.devices": launch.devices}
        | {f"launch.mesh.{axis}": size for axis, size in launch.mesh.items()}
        for launch in both
    )
    return _unequal(left, right)


def diff_data(first: RunDir, second: RunDir) -> list[Difference]:
    """The stages whose text is not the same, with the files that make it so where they are known, or whose tokens."""
    left, right = ({stage["stage"]: stage for stage in read_data_record(run.data_file)} for run in (first, second))
    common = [name for name in left if name in right]
    return [difference for name in common for difference in _of_stage(name, left[name], right[name])]


def _of_stage(name: str, left: Mapping[str, Any], right: Mapping[str, Any]) -> Iterator[Difference]:
    if left["source"] != right["source"]:
        files = _unequal(*_alike(left.get("files") or {}, right.get("files") or {}))
        # Texts that are not files have only a hash of all.
        text = Difference("the text", left["source"][:HASH_DIGITS], right["source"][:HASH_DIGITS])
        for difference in files or [text]:
            yield difference._replace(name=f"stage {name}: {difference.name}")
    elif left["splits"] != right["splits"] and left["tokenizer"] == right["tokenizer"]:
        yield Difference(f"stage {name}: the division into splits", "one", "another")
    if left["tokenizer"] != right["tokenizer"]:
        here, there = (side["tokenizer"][:HASH_DIGITS] for side in (left, right))
        yield Difference(f"stage {name}: the tokenizer", here, there)


def _alike(left: Mapping[str, str], right: Mapping[str, str]) -> tuple[Mapping[str, str], Mapping[str, str]]:
    """The files of two corpora; if none is in both, by their names in the folders that have them all."""
    return (left, right) if left.keys() & right.keys() else (_relative(left), _relative(right))


def _relative(files: Mapping[str, str]) -> dict[str, str]:
    folder = os.path.commonpath([os.path.dirname(os.path.abspath(name)) for name in files]) if files else ""
    return {os.path.relpath(name, folder): digest for name, digest in files.items()}


def diff_programs(first: RunDir, second: RunDir) -> list[Difference]:
    """Return the stages whose compiled programs differ, by the SHA-256 of their StableHLO."""
    both = [load_programs(run) for run in (first, second)]
    for run, found in zip((first, second), both, strict=True):
        if not found:
            raise UserError(f"{run.path} has no record of its programs.")
    modes = [(launch.mode, launch.width) for launch in map(load_first_launch, (first, second))]
    if modes[0] != modes[1]:
        raise UserError(f"They trained in other modes, {' and '.join(f'{mode} of {width}' for mode, width in modes)}.")
    left, right = ({stage: program.stablehlo[:HASH_DIGITS] for stage, program in found.items()} for found in both)
    common = [stage for stage in left if stage in right]
    return [Difference(f"stage {stage}", left[stage], right[stage]) for stage in common if left[stage] != right[stage]]


def _json(run: RunDir, name: str) -> Any:
    try:
        return json.loads((run.path / name).read_bytes())
    except OSError as error:
        raise UserError(f"{run.path} has no {name} that can be read: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"{run.path / name} is damaged: it is not JSON.") from error


def _unequal(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[Difference]:
    names = [name for name in dict.fromkeys([*left, *right]) if left.get(name, ABSENT) != right.get(name, ABSENT)]
    return [Difference(name, left.get(name, ABSENT), right.get(name, ABSENT)) for name in names]


# In words.

MOST_SHOWN, MOST_LINES, MOST_LINES_OF_ALL = 12, 12, 48


def print_line(console: Console, text: str) -> None:
    """Print a line without interpreting markup or control characters."""
    console.print(Text(replace_control_characters(text)), soft_wrap=True)


def print_section(section: Section, console: Console) -> None:
    """Print a section."""
    for line in _lines(section):
        print_line(console, line)


def format_difference(difference: Difference) -> str:
    """Format a difference as 'name: one -> other'; a changed file by its name."""
    if difference.patch and ABSENT not in (difference.first, difference.second):
        return difference.name
    return f"{difference.name}: {_said(difference.first)} -> {_said(difference.second)}"


def _lines(section: Section) -> Iterator[str]:
    if section.missing:
        yield f"{section.kind}: not compared. {section.missing}"
        return
    if not section.differences:
        yield f"{section.kind}: the same"
        return
    yield f"{section.kind}:"
    left = MOST_LINES_OF_ALL
    for difference in section.differences[:MOST_SHOWN]:
        patch = difference.patch if difference.matters else ()
        yield f"  {format_difference(difference)}{'' if difference.matters else ' (only comments and docstrings)'}"
        yield from (f"    {line}" for line in patch[: min(left, MOST_LINES)])
        if len(patch) > min(left, MOST_LINES):
            yield f"    ... {len(patch) - min(left, MOST_LINES)} more lines"
        left = max(0, left - len(patch))
    if len(section.differences) > MOST_SHOWN:
        yield f"  ... {len(section.differences) - MOST_SHOWN} more"


def _said(value: Any) -> str:
    return value if isinstance(value, str) else short_repr(value)


# Where two runs part inside a step: both are made again by their own code, and held against each other by tensor.

# What a step makes, in the order in which it is made.
PARTS = ("batch", "before", "activations", "loss", "gradients", "after")
FEW_STEPS = 3
Trace = dict[int, dict[str, Any]]


class Origin(NamedTuple):
    """The first tensor in which two runs differ: its step, the part of the step, and its name."""

    step: int
    part: str
    name: str


def trace_steps(run: RunDir, first: int, last: int, has_taps: bool, is_trusted: bool = False) -> Trace:
    """Recompute the steps `first` to `last` of a run with the code and settings of its first launch.

    Raises:
        UserError: This is impossible, or the code may not be run.
        KeyboardInterrupt: A signal requests a stop.
    """
    with load_snapshot_code(run, load_first_launch(run), is_trusted) as code, tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "trace.json", Path(folder) / "log"
        arguments = [str(run.path.absolute()), str(first), str(last), str(out), *(["--taps"] if has_taps else [])]
        with open(log, "wb") as errors:
            status, stopped_by = code.run(["-m", "rustgpt_jax.reproduce.step_trace", *arguments], errors)
        if stopped_by is not None:
            raise KeyboardInterrupt
        if status or not out.exists():
            lines = log.read_text(errors="replace").strip().splitlines() or [f"exit status {status}"]
            raise UserError(f"The steps of {run.path} cannot be recomputed: {lines[-1].removeprefix('error: ')}")
        return {step["step"]: step for step in json.loads(out.read_bytes())["steps"]}


def find_origin(first: RunDir, second: RunDir, agreed: int, parted: int, is_trusted: bool = False) -> Origin | None:
    """Find the first tensor in which two runs differ, between the last equal step and the first different one.

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
    left, right = (trace_steps(run, begin, last, has_taps, is_trusted) for run in (first, second))
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
    """Return the tensors of a part of a step by name, each with its fingerprint."""
    if part == "loss":
        yield "train/loss", step["metrics"]["train/loss"]
    elif part in ("activations", "gradients"):
        yield from ((tensor["site"], tensor["fingerprint"]) for tensor in step.get(part, []))
    else:
        yield from step[part].items()


LOSSES = ("train/loss", "valid/loss")
MOST_CAUSES = 3


class Causes(NamedTuple):
    """What a part of a step depends on: prefixes of knobs, code files and packages."""

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
    print_line(console, f"{first} -> {second}")
    found = compare_metadata(*runs)
    for section in found:
        print_section(section, console)
    is_same = _compare_steps(*runs, found, console, is_trusted)
    return is_same and not any(section.differences or section.missing for section in found)


def _compare_steps(first: RunDir, second: RunDir, found: list[Section], console: Console, is_trusted: bool) -> bool:
    losses = compare_records(first.path, second.path, names=LOSSES)
    every, arrays = compare_records(first.path, second.path), compare_checkpoints(first, second)
    if losses.first_difference:
        print_line(console, f"losses: {format_first_difference(losses.first_difference)}")
    else:
        print_line(console, f"losses: the same for {losses.last_step:,} steps")
    if every.first_difference is None and not arrays.unequal:
        if arrays.n_arrays:
            print_line(console, f"checkpoints: after step {arrays.step:,} all {arrays.n_arrays} arrays are the same")
        else:
            print_line(
                console, "checkpoints: not compared, since there is no valid checkpoint of the same step in both"
            )
        return True
    first_difference = every.first_difference
    agreed, parted = (every.agreed, first_difference.step) if first_difference else (every.last_step, arrays.step)
    try:
        origin = find_origin(first, second, min(agreed, parted), parted, is_trusted)
    except UserError as error:
        print_line(console, f"first tensor: not found. {error}")
        print_line(console, _sentence(None, _likely(None, found)))
        return False
    if origin is None:
        steps = f"steps {max(agreed, 1):,} to {parted:,}"
        print_line(
            console,
            f"first tensor: none. Made again here, {steps} are the same in both: the cause is not in their code.",
        )
    else:
        print_line(console, f"first tensor: step {origin.step:,}, {OF_PART[origin.part].words}: {origin.name}")
    print_line(console, _sentence(origin, _likely(origin, found)))
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
    listed = "; ".join(format_difference(difference) for difference in likely[:MOST_CAUSES])
    rest = f"; and {len(likely) - MOST_CAUSES} more" if len(likely) > MOST_CAUSES else ""
    cause = f"{listed}{rest}" if likely else "nothing that was recorded"
    if origin is None:
        return f"likely cause: {cause}"
    parts = list(OF_PART)
    same = "".join(f"same {OF_PART[part].words}, " for part in parts[: parts.index(origin.part)]).removesuffix(", ")
    return f"step {origin.step:,}: {same}{'; ' if same else ''}not the same {OF_PART[origin.part].words}: {cause}"
