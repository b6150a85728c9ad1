"""In what two runs differ before a step is made: config, code, environment, data, programs."""

import ast
import difflib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from rich.console import Console
from rich.text import Text

from rustgpt_jax.data.preprocess import read_record
from rustgpt_jax.errors import UserError, shown
from rustgpt_jax.reproduce.compare_metrics import ABSENT
from rustgpt_jax.tracking.formatting import printable
from rustgpt_jax.training.run_inputs import read_beginning
from rustgpt_jax.workdir.code_snapshot import read_code
from rustgpt_jax.workdir.environment import flat
from rustgpt_jax.workdir.event_log import archive_of, first_launch, programs
from rustgpt_jax.workdir.run_dir import RunDir

OWN = "the run's own"
HASH_DIGITS = 12
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class Difference(NamedTuple):
    """One thing in which two runs differ: what it is called, and what it is in the first and in the second.

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


def sections(first: RunDir, second: RunDir) -> list[Section]:
    """What two runs differ in, in the order in which one thing leads to the next."""
    kinds = {
        "config": config_differences,
        "code": code_differences,
        "environment": environment_differences,
        "data": data_differences,
        "program": program_differences,
    }
    found = []
    for kind, differences in kinds.items():
        try:
            found.append(Section(kind, differences(first, second)))
        except UserError as error:
            found.append(Section(kind, [], str(error)))
    return found


def config_differences(first: RunDir, second: RunDir) -> list[Difference]:
    """The knobs in which two configs differ, as they were recorded, those of stages too."""
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
    knobs = flat(tree) | {"stages": [stage["name"] for stage in own_stages]}
    for stage in own_stages:
        knobs |= flat({name: value for name, value in stage.items() if name != "name"}, f"stages.{stage['name']}.")
    return knobs


def code_differences(first: RunDir, second: RunDir) -> list[Difference]:
    """The files of the code that the first launches ran which are not the same."""
    both = [first_launch(run) for run in (first, second)]
    if both[0].code == both[1].code:
        return []
    left, right = (read_code(archive_of(run, launch)) for run, launch in zip((first, second), both, strict=True))
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
    """A module without its comments, docstrings and line breaks; as it is, where it is no Python of this version."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return source
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


def environment_differences(first: RunDir, second: RunDir) -> list[Difference]:
    """Versions, devices and settings that were not the same at the first launches, and how they trained."""
    both = [first_launch(run) for run in (first, second)]
    left, right = (
        flat(launch.environment)
        | {"launch.mode": launch.mode, "launch.devices": launch.devices}
        | {f"launch.mesh.{axis}": size for axis, size in launch.mesh.items()}
        for launch in both
    )
    return _unequal(left, right)


def data_differences(first: RunDir, second: RunDir) -> list[Difference]:
    """The stages whose text is not the same, with the files that make it so where they are known, or whose tokens."""
    left, right = ({stage["stage"]: stage for stage in read_record(run.data_file)} for run in (first, second))
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


def program_differences(first: RunDir, second: RunDir) -> list[Difference]:
    """The stages whose compiled programs are not the same, by the SHA-256 of their StableHLO."""
    both = [programs(run) for run in (first, second)]
    for run, found in zip((first, second), both, strict=True):
        if not found:
            raise UserError(f"{run.path} has no record of its programs.")
    modes = [(launch.mode, launch.width) for launch in map(first_launch, (first, second))]
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


def say(console: Console, text: str) -> None:
    """Print a line as it is, but for what a terminal would take for a command."""
    console.print(Text(printable(text)), soft_wrap=True)


def say_section(section: Section, console: Console) -> None:
    """Print a section."""
    for line in _lines(section):
        say(console, line)


def in_a_line(difference: Difference) -> str:
    """A difference as 'name: one -> other', a changed file of the code by its name."""
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
        yield f"  {in_a_line(difference)}{'' if difference.matters else ' (only comments and docstrings)'}"
        yield from (f"    {line}" for line in patch[: min(left, MOST_LINES)])
        if len(patch) > min(left, MOST_LINES):
            yield f"    ... {len(patch) - min(left, MOST_LINES)} more lines"
        left = max(0, left - len(patch))
    if len(section.differences) > MOST_SHOWN:
        yield f"  ... {len(section.differences) - MOST_SHOWN} more"


def _said(value: Any) -> str:
    return value if isinstance(value, str) else shown(value)
