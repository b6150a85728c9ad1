"""The verb `diff`: compare the inputs and losses of two runs, and find the first tensor that differs."""

import ast
import difflib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from rustgpt_jax.atomic_io import read_json
from rustgpt_jax.config.schema import TRACKER_KNOBS
from rustgpt_jax.data.preprocess import read_data_record
from rustgpt_jax.errors import UserError, short_repr
from rustgpt_jax.reproduce.compare_metrics import (
    ABSENT,
    ArrayComparison,
    MetricComparison,
    compare_checkpoints,
    compare_records,
)
from rustgpt_jax.reproduce.step_trace import PARTS, TensorDifference, find_first_tensor
from rustgpt_jax.tracking.console import print_line
from rustgpt_jax.training.run_inputs import read_import_record
from rustgpt_jax.workdir.code_snapshot import CODE, read_code
from rustgpt_jax.workdir.environment import flatten_environment
from rustgpt_jax.workdir.event_log import code_archive, load_first_launch, load_programs
from rustgpt_jax.workdir.run_dir import NOT_OVERRIDDEN, RunDir, load_config

HASH_DIGITS = 12
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
MAX_DIFFERENCES, MAX_PATCH_LINES, MAX_PATCH_LINES_IN_ALL = 12, 12, 48
MAX_CAUSES = 3


class Difference(NamedTuple):
    """One difference of two runs.

    Attributes:
        name: The name of the differing value or file.
        first: Its value in the first run.
        second: Its value in the second run.
        patch: For a file of the code, the lines of a unified diff.
        matters: Whether it can affect results, unlike a changed comment.
    """

    name: str
    first: Any
    second: Any
    patch: tuple[str, ...] = ()
    matters: bool = True

    def __str__(self) -> str:
        if self.patch and ABSENT not in (self.first, self.second):
            return self.name
        values = (value if isinstance(value, str) else short_repr(value) for value in (self.first, self.second))
        return f"{self.name}: {' -> '.join(values)}"


class Section(NamedTuple):
    """The differences of one kind, or the reason why they could not be compared."""

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
    for kind, list_differences in kinds.items():
        try:
            found.append(Section(kind, list_differences(first, second)))
        except UserError as error:
            found.append(Section(kind, [], str(error)))
    return found


def diff_configs(first: RunDir, second: RunDir) -> list[Difference]:
    """Return the knobs in which two recorded configs differ, including those of stages."""
    found = _list_unequal(_read_knobs(first), _read_knobs(second), "config.", NOT_OVERRIDDEN)
    earlier = [read_json(run.config_file).get("earlier", []) for run in (first, second)]
    if earlier[0] != earlier[1]:
        here, there = (f"at steps {[each['until'] for each in side]}" if side else "never" for side in earlier)
        found.append(Difference("config was changed", here, there))
    return [*_diff_initial_params(first, second), *found]


def _diff_initial_params(first: RunDir, second: RunDir) -> list[Difference]:
    """Return differences in the source of the initial parameters (`--init_from` or an import)."""
    left, right = read_import_record(first), read_import_record(second)
    here, there = (
        f"{initial['source']} at step {initial['step']}" if "step" in initial else initial.get("source", ABSENT)
        for initial in (left, right)
    )
    if here != there:
        return [Difference("init_from", here, there)]
    names = [
        name
        for name in ("loaded", "partially_loaded", "initialized", "fingerprints")
        if left.get(name) != right.get(name)
    ]
    return [Difference(f"init_from: {name}", "one set", "another set") for name in names]


def _read_knobs(run: RunDir) -> dict[str, Any]:
    # As JSON, not as a Config: another version of the code may have other knobs.
    tree = dict(read_json(run.config_file)["config"])
    stages = tree.pop("stages", [])
    knobs = {path: value for path, value in flatten_environment(tree).items() if path not in TRACKER_KNOBS}
    knobs |= {"stages": [stage["name"] for stage in stages]}
    for stage in stages:
        knobs |= flatten_environment(
            {name: value for name, value in stage.items() if name != "name"}, f"stages.{stage['name']}."
        )
    return knobs


def diff_code(first: RunDir, second: RunDir) -> list[Difference]:
    """Return the files that differ between the code of both runs' first launches, those that affect results first."""
    runs = {run: load_first_launch(run) for run in (first, second)}
    if runs[first].code == runs[second].code:
        return []
    left, right = (read_code(code_archive(run, launch)) for run, launch in runs.items())
    names = sorted(name for name in left.keys() | right.keys() if left.get(name) != right.get(name))
    found = [_diff_file(name, left.get(name), right.get(name)) for name in names]
    return sorted(found, key=lambda difference: not difference.matters)


def _diff_file(name: str, left: bytes | None, right: bytes | None) -> Difference:
    before, after = ((content or b"").decode(errors="replace").splitlines() for content in (left, right))
    # The first two lines of the patch name the files.
    patch = tuple(difflib.unified_diff(before, after, lineterm="", n=1))[2:]
    matters = left is None or right is None or not name.endswith(".py") or _strip(left) != _strip(right)
    return Difference(name, ABSENT if left is None else "a file", ABSENT if right is None else "a file", patch, matters)


def _strip(source: bytes) -> str | bytes:
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
    left, right = (
        flatten_environment(launch.environment)
        | {"launch.mode": launch.mode, "launch.devices": launch.devices}
        | {f"launch.mesh.{axis}": size for axis, size in launch.mesh.items()}
        for launch in map(load_first_launch, (first, second))
    )
    return _list_unequal(left, right)


def diff_data(first: RunDir, second: RunDir) -> list[Difference]:
    """Return the stages whose text or tokens differ, with the files that differ if they are known."""
    left, right = ({stage["stage"]: stage for stage in read_data_record(run.data_file)} for run in (first, second))
    common = [name for name in left if name in right]
    return [each for name in common for each in _diff_stage(f"stage {name}: ", left[name], right[name])]


def _diff_stage(prefix: str, left: Mapping[str, Any], right: Mapping[str, Any]) -> Iterator[Difference]:
    if left["source"] != right["source"]:
        here, there = (side.get("files") or {} for side in (left, right))
        if not here.keys() & there.keys():
            # The files are in different folders.
            here, there = (_relative_to_common_folder(side) for side in (here, there))
        # A text that was not read from files has a single hash.
        text = Difference(f"{prefix}the text", left["source"][:HASH_DIGITS], right["source"][:HASH_DIGITS])
        yield from _list_unequal(here, there, prefix) or [text]
    elif left["splits"] != right["splits"] and left["tokenizer"] == right["tokenizer"]:
        yield Difference(f"{prefix}the splits", "one split", "another split")
    if left["tokenizer"] != right["tokenizer"]:
        yield Difference(f"{prefix}the tokenizer", left["tokenizer"][:HASH_DIGITS], right["tokenizer"][:HASH_DIGITS])


def _relative_to_common_folder(files: Mapping[str, str]) -> dict[str, str]:
    folder = os.path.commonpath([os.path.dirname(os.path.abspath(name)) for name in files]) if files else ""
    return {os.path.relpath(name, folder): digest for name, digest in files.items()}


def diff_programs(first: RunDir, second: RunDir) -> list[Difference]:
    """Return the stages whose compiled programs differ, by the SHA-256 of their StableHLO."""
    hashes, modes = [], []
    for run in (first, second):
        recorded = load_programs(run)
        if not recorded:
            raise UserError(f"{run.path} has no record of its programs.")
        hashes.append({stage: program.stablehlo[:HASH_DIGITS] for stage, program in recorded.items()})
        launch = load_first_launch(run)
        modes.append(f"{launch.mode} of {launch.width}")
    if modes[0] != modes[1]:
        raise UserError(f"The first run was trained in the mode {modes[0]}, the second in {modes[1]}.")
    left, right = ({stage: side[stage] for stage in hashes[0] if stage in hashes[1]} for side in hashes)
    return _list_unequal(left, right, "stage ")


def _list_unequal(
    left: Mapping[str, Any], right: Mapping[str, Any], prefix: str = "", absent: str = ABSENT
) -> list[Difference]:
    pairs = {name: (left.get(name, absent), right.get(name, absent)) for name in dict.fromkeys([*left, *right])}
    return [Difference(f"{prefix}{name}", *pair) for name, pair in pairs.items() if pair[0] != pair[1]]


def print_section(section: Section, console: Console) -> None:
    """Print a section."""
    if section.missing or not section.differences:
        verdict = f"not compared. {section.missing}" if section.missing else "the same"
        print_line(console, f"{section.kind}: {verdict}")
        return
    print_line(console, f"{section.kind}:")
    lines_left = MAX_PATCH_LINES_IN_ALL
    for difference in section.differences[:MAX_DIFFERENCES]:
        patch = difference.patch if difference.matters else ()
        print_line(console, f"  {difference}{'' if difference.matters else ' (only comments and docstrings)'}")
        n_shown = min(lines_left, MAX_PATCH_LINES)
        for line in patch[:n_shown]:
            print_line(console, f"    {line}")
        if len(patch) > n_shown:
            print_line(console, f"    ... {len(patch) - n_shown} more lines")
        lines_left = max(0, lines_left - len(patch))
    if len(section.differences) > MAX_DIFFERENCES:
        print_line(console, f"  ... {len(section.differences) - MAX_DIFFERENCES} more")


# The comparison as a whole, and the likely cause of a difference.

LOSSES = ("train/loss", "valid/loss")


class PartInputs(NamedTuple):
    """Inputs that can affect a part of a step.

    Attributes:
        label: The name of the part in messages.
        knobs: Prefixes of knobs.
        code: Prefixes of code files.
        packages: Prefixes of installed packages.
    """

    label: str
    knobs: tuple[str, ...]
    code: tuple[str, ...]
    packages: tuple[str, ...]


MODEL_CODE, TRAINING_CODE = "rustgpt_jax/model/", "rustgpt_jax/training/"
INPUTS = {
    "batch": PartInputs(
        "batch",
        ("seed", "data.", "tokenizer.", "model.context_length", "training.", "stages"),
        ("rustgpt_jax/data/", "rustgpt_jax/tokenizers/"),
        ("tokenizers", "grain", "numpy"),
    ),
    "before": PartInputs(
        "state before it", ("seed", "model.", "optimizer.", "init_from"), ("",), ("jax", "flax", "optax")
    ),
    "activations": PartInputs("activations", ("model.", "seed"), (MODEL_CODE,), ("jax", "flax")),
    "loss": PartInputs("loss", ("model.", "data.", "training."), (TRAINING_CODE,), ("jax",)),
    "gradients": PartInputs("gradients", ("model.", "training."), (MODEL_CODE, TRAINING_CODE), ("jax", "flax")),
    "after": PartInputs(
        "update",
        ("optimizer.", "schedule.", "training.steps", "faults.", "stages"),
        (TRAINING_CODE,),
        ("optax", "jax"),
    ),
}
# The parts that are not computed by the compiled program.
NOT_COMPILED = ("batch", "before")


class StepComparison(NamedTuple):
    """The comparison of what two runs computed.

    Attributes:
        is_same: Whether metrics and checkpoints are the same.
        losses: The comparison of the losses.
        metrics: The comparison of all metrics.
        arrays: The comparison of the last common checkpoints.
        tensor: The first tensor that differs, or None if it is not known.
        cause: A sentence about the likely cause of the difference; None if there is none.
    """

    is_same: bool
    losses: MetricComparison
    metrics: MetricComparison
    arrays: ArrayComparison
    tensor: TensorDifference | None = None
    cause: str | None = None


class RunDiff(NamedTuple):
    """The differences between two runs: those of their inputs, by kind, and of what they computed."""

    sections: list[Section]
    steps: StepComparison

    @property
    def is_same(self) -> bool:
        """True if the runs are known to be the same; False if they differ or something could not be compared."""
        return self.steps.is_same and not any(section.differences or section.missing for section in self.sections)

    def describe(self) -> dict[str, Any]:
        """Return the differences as JSON has them."""
        steps = self.steps
        return {
            "is_same": self.is_same,
            "inputs": [
                {
                    "kind": section.kind,
                    "not_compared": section.missing or None,
                    "differences": [
                        {name: getattr(each, name) for name in ("name", "first", "second", "matters")}
                        for each in section.differences
                    ],
                }
                for section in self.sections
            ],
            "losses": steps.losses.describe(),
            "metrics": steps.metrics.describe(),
            "checkpoint": steps.arrays._asdict() if steps.arrays.n_arrays else None,
            "first_tensor": None if steps.tensor is None else steps.tensor._asdict(),
            "cause": steps.cause,
        }


def diff(first: Path, second: Path, console: Console, is_trusted: bool = False) -> RunDiff:
    """Print and return the differences between two runs, from their configs to the first tensor, and the likely cause.

    Steps are recomputed only with code that is also installed here, unless the runs' code `is_trusted`.

    Raises:
        UserError: A folder is not a run.
    """
    runs = RunDir(first), RunDir(second)
    for run in runs:
        if not run.config_file.exists():
            load_config(run.path)  # Raises an error that explains what is wrong with the folder.
    print_line(console, f"{first} -> {second}")
    sections = compare_metadata(*runs)
    for section in sections:
        print_section(section, console)
    return RunDiff(sections, _compare_steps(*runs, sections, console, is_trusted))


def _compare_steps(
    first: RunDir, second: RunDir, sections: list[Section], console: Console, is_trusted: bool
) -> StepComparison:
    losses = compare_records(first.path, second.path, names=LOSSES)
    metrics, arrays = compare_records(first.path, second.path), compare_checkpoints(first, second)
    print_line(console, f"losses: {losses.first_difference or f'the same for {losses.last_step:,} steps'}")
    if metrics.first_difference is None and not arrays.unequal:
        verdict = "not compared, since there is no valid checkpoint of the same step in both"
        if arrays.n_arrays:
            verdict = f"after step {arrays.step:,} all {arrays.n_arrays} arrays are the same"
        print_line(console, f"checkpoints: {verdict}")
        return StepComparison(True, losses, metrics, arrays)
    last_equal, first_different = metrics.last_step, arrays.step
    if metrics.first_difference:
        last_equal, first_different = metrics.agreed, metrics.first_difference.step
    tensor = None
    try:
        tensor = find_first_tensor(first, second, min(last_equal, first_different), first_different, is_trusted)
    except UserError as error:
        verdict = f"not found. {error}"
    else:
        steps = f"steps {max(last_equal, 1):,} to {first_different:,}"
        verdict = f"none. when recomputed here, {steps} are the same in both, so the cause is not in their code."
        if tensor is not None:
            verdict = f"step {tensor.step:,}, {INPUTS[tensor.part].label}: {tensor.name}"
    print_line(console, f"first tensor: {verdict}")
    cause = _describe_cause(tensor, _likely_causes(tensor, sections))
    print_line(console, cause)
    return StepComparison(False, losses, metrics, arrays, tensor, cause)


def _likely_causes(tensor: TensorDifference | None, sections: Iterable[Section]) -> list[Difference]:
    """Return the differences that can explain a difference in a tensor, or all differences if none can."""
    by_kind = {section.kind: section for section in sections}
    program = by_kind.pop("program")
    found = [(kind, each) for kind, section in by_kind.items() for each in section.differences if each.matters]
    likely = []
    if tensor is not None:
        # If the compiled programs are equal, the code is not the cause.
        is_same_program = not program.missing and not program.differences and tensor.part not in NOT_COMPILED
        likely = [
            each
            for kind, each in found
            if _can_cause(tensor.part, kind, each.name) and not (kind == "code" and is_same_program)
        ]
    return likely or [each for _, each in found]


def _can_cause(part: str, kind: str, name: str) -> bool:
    inputs = INPUTS[part]
    match kind:
        case "config":
            knob = name.removeprefix("config.")
            overridden = knob.split(".", 2)[-1] if knob.startswith("stages.") else knob
            return knob.startswith(inputs.knobs) or overridden.startswith(inputs.knobs)
        case "code":
            # A file outside the package, such as a custom layer, can change anything.
            return name.startswith(inputs.code) or name.split("/")[0] not in CODE
        case "data":
            return part == "batch"
        case _:
            return not name.startswith("packages.") or name.removeprefix("packages.").startswith(inputs.packages)


def _describe_cause(tensor: TensorDifference | None, causes: list[Difference]) -> str:
    cause = "; ".join(map(str, causes[:MAX_CAUSES])) or "nothing that was recorded"
    if len(causes) > MAX_CAUSES:
        cause += f"; and {len(causes) - MAX_CAUSES} more"
    if tensor is None:
        return f"likely cause: {cause}"
    same = ", ".join(f"same {INPUTS[part].label}" for part in PARTS[: PARTS.index(tensor.part)])
    return f"step {tensor.step:,}: {same}{'; ' if same else ''}not the same {INPUTS[tensor.part].label}: {cause}"
