"""Parser of HLO text: computations, their instructions and collectives, and how often each computation runs.

The text is XLA's HLO (openxla.org/xla/operation_semantics), as `compiled.as_text()` gives it.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from graphlib import TopologicalSorter

import numpy as np

# Bits of an element. Types of other names hold no numbers: token[], opaque[].
BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}
BITS |= {f"{kind}{bits}": bits for kind in "su" for bits in (2, 4, 8, 16, 32, 64)}
BITS |= {f"f{bits}": bits for bits in (16, 32, 64)}

_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_LISTED = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_NAME = re.compile(r"%([\w.\-]+)")


@dataclass(frozen=True)
class Instruction:
    """One line: `name = shape opcode(arguments), attributes`. A shape is kept as text, a tuple's in parentheses."""

    name: str
    shape: str
    opcode: str
    arguments: str
    attributes: str

    @property
    def operands(self) -> tuple[str, ...]:
        """Return the names of the instructions that it reads."""
        return tuple(_NAME.findall(self.arguments))

    @property
    def calls(self) -> tuple[str, ...]:
        """The computations that it runs. What ends an asynchronous operation names those that its start has run."""
        if self.opcode.endswith(("-done", "-update")):
            return ()
        listed = (name for names in _LISTED.findall(self.attributes) for name in re.findall(r"[\w.\-]+", names))
        return (*_CALLED.findall(self.attributes), *listed)

    @property
    def trips(self) -> int | None:
        """Return the trip count of a loop, or None if it is unknown."""
        found = _TRIPS.search(self.attributes)
        return int(found[1]) if found else None


@dataclass(frozen=True)
class HloProgram:
    """Instructions by the name of their computation; `entry` is the one that runs first."""

    computations: dict[str, tuple[Instruction, ...]]
    entry: str

    def times(self) -> Counter[str]:
        """Return how often each computation runs per run of the program.

        A loop of unknown length counts once; so does each branch of a choice.
        """
        bodies = self.computations.items()
        called_by = {name: {callee for each in body for callee in each.calls} for name, body in bodies}
        times = Counter({self.entry: 1})
        # From the entry downwards: what calls comes before what is called.
        for name in reversed(tuple(TopologicalSorter(called_by).static_order())):
            for each in self.computations.get(name, ()):
                for callee in each.calls:
                    times[callee] += times[name] * ((each.trips or 1) if each.opcode == "while" else 1)
        return times


def parse_hlo(text: str) -> HloProgram:
    """Parse a program from its HLO text."""
    computations: dict[str, tuple[Instruction, ...]] = {}
    entry, name, body = "", "", list[Instruction]()
    for line in text.splitlines():
        if head := _HEAD.match(line):
            name, body = head[2], []
            entry = name if head[1] else entry
        elif line.startswith("}"):
            computations[name] = tuple(body)
        elif found := _INSTRUCTION.match(line):
            body.append(_instruction(found[1], found[2]))
    return HloProgram(computations, entry)


def _instruction(name: str, rest: str) -> Instruction:
    shape, rest = _cut(rest) if rest.startswith("(") else rest.split(" ", 1)
    opcode, rest = rest.strip().split("(", 1)
    arguments, attributes = _cut("(" + rest)
    return Instruction(name, shape, opcode, arguments[1:-1], attributes)


def _cut(text: str) -> tuple[str, str]:
    """Split a text that begins with a parenthesis after the matching one."""
    depth = 0
    for end, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[: end + 1], text[end + 1 :]
    raise ValueError(f"no closing parenthesis: {text[:80]}")


def parse_arrays(shape: str) -> list[tuple[str, int]]:
    """Return the element type and bytes of each array of a shape."""
    found = ((each[1], math.prod(parse_lengths(each[0]))) for each in _ARRAY.finditer(shape))
    return [(kind, math.ceil(size * bits / 8)) for kind, size in found if (bits := _bits(kind))]


def parse_lengths(shape: str) -> tuple[int, ...]:
    """Return the axis lengths of an array's shape."""
    found = _ARRAY.search(shape)
    return tuple(int(length.removeprefix("<=")) for length in found[2].split(",") if length) if found else ()


def parse_elements(shape: str) -> list[str]:
    """Return the element shapes of a tuple shape."""
    inner, found, depth, start = shape[1:-1], list[str](), 0, 0
    for place, letter in enumerate(inner):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            found.append(inner[start:place].strip())
            start = place + 1
    return [*found, inner[start:].strip()]


def _bits(kind: str) -> int:
    return 8 if kind.startswith("f8") else BITS.get(kind, 0)


# The collectives of a compiled program: what its devices send one another, among which of them, and how often.
#
# `received` is the bytes that each device has to receive, as a ring of the n devices of a group does it, which is the
# least that is possible. With R the bytes of the result on a device (arXiv 1802.05799 for the ring):
#
#     all-gather          R (n - 1) / n         all others' parts
#     reduce-scatter      R (n - 1)             a part of each other's
#     all-reduce          2 R (n - 1) / n       a reduce-scatter, then an all-gather
#     all-to-all          R (n - 1) / n         a part of each other's
#     collective-permute  R                     another's whole

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

Groups = tuple[tuple[int, ...], ...]

_LISTED_GROUPS = re.compile(r"(?:replica_groups|source_target_pairs)=(\{\{[\d,{} ]*\}\})")
_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_TILED = re.compile(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? \{([^}]*)\}")
_MESH_AXIS = re.compile(r"['\"]([^'\"]+)['\"]=(\d+)")
_GROUP_AXIS = re.compile(r"['\"]([^'\"]+)['\"](?::\((\d+)\)(\d+))?")
_OP_NAME = re.compile(r'op_name="([^"]*)"')


@dataclass(frozen=True)
class Collective:
    """A collective: its kind, the type of its elements, and the bytes that a device receives each time.

    groups: the devices that take part with each other; for collective-permute, pairs of a sender and a receiver.
    times: how often it runs in one run of the program.
    source: the operation of the program's author that it serves.
    """

    kind: str
    dtype: str
    received: float
    groups: Groups
    times: int
    source: str

    @property
    def group_size(self) -> int:
        """The number of devices in a group."""
        return max(map(len, self.groups), default=1)

    @property
    def total(self) -> float:
        """Bytes that a device receives per run of the program."""
        return self.times * self.received

    def axes(self, mesh: Mapping[str, int]) -> tuple[str, ...]:
        """The axes of a mesh, given as their sizes in order, along which the devices of a group differ."""
        places = np.stack(np.unravel_index(np.arange(math.prod(mesh.values())), tuple(mesh.values())))
        differ = np.zeros(len(mesh), bool)
        for group in self.groups:
            of_group = places[:, list(group)]
            differ |= np.any(of_group != of_group[:, :1], axis=1)
        return tuple(axis for axis, along in zip(mesh, differ, strict=True) if along)


@dataclass(frozen=True)
class CollectiveTotal:
    """The number of collectives of one kind over the same axes, and the total bytes that a device receives."""

    count: int
    received: float


def find_collectives(text: str, n_devices: int) -> list[Collective]:
    """Return the collectives over more than one device in a program's HLO, in the order of the text."""
    program = parse_hlo(text)
    times = program.times()
    found = [
        _collective(each, times[name], n_devices, _is_scattered(each, name, program))
        for name, body in program.computations.items()
        for each in body
        if each.opcode.removesuffix("-start") in KINDS and times[name]
    ]
    return [each for each in found if each.group_size > 1]


def summarize_collectives(
    found: Iterable[Collective], mesh: Mapping[str, int]
) -> dict[tuple[str, tuple[str, ...]], CollectiveTotal]:
    """Group collectives by kind and mesh axes, most bytes first."""
    counts, received = Counter[tuple[str, tuple[str, ...]]](), Counter[tuple[str, tuple[str, ...]]]()
    for each in found:
        key = each.kind, each.axes(mesh)
        counts[key] += each.times
        received[key] += each.total  # type: ignore[assignment]
    return {key: CollectiveTotal(counts[key], received[key]) for key, _ in received.most_common()}


def _collective(each: Instruction, times: int, n_devices: int, is_scattered: bool) -> Collective:
    kind = each.opcode.removesuffix("-start")
    groups = _groups(each.attributes, n_devices)
    # What starts an all-gather or a permute has its operand beside its result.
    has_operand = each.opcode in ("all-gather-start", "collective-permute-start")
    sized = parse_arrays(parse_elements(each.shape)[1] if has_operand else each.shape)
    dtype = max(sized, key=lambda array: array[1])[0] if sized else ""
    result = sum(size for _, size in sized)
    if "_promoted" in each.attributes and dtype == "f32":
        # A CPU has no sums of bfloat16, and widens them for the sake of the collective alone.
        dtype, result = "bf16", result // 2
    source = _OP_NAME.search(each.attributes)
    size = max(map(len, groups), default=1)
    if kind == "all-reduce" and is_scattered:
        kind, result = "reduce-scatter", result // size
    return Collective(kind, dtype, _received(kind, result, size), groups, times, source[1] if source else "")


def _received(kind: str, result: float, size: int) -> float:
    match kind:
        case "all-gather" | "all-to-all":
            return result * (size - 1) / size
        case "reduce-scatter":
            return result * (size - 1)
        case "all-reduce":
            return 2 * result * (size - 1) / size
        case _:
            return result


def _is_scattered(each: Instruction, name: str, program: HloProgram) -> bool:
    """Whether only a slice of an all-reduce is used, which accelerators turn into a reduce-scatter."""
    if each.opcode != "all-reduce" or each.shape.startswith("("):
        return False
    users = [user for user in program.computations[name] if each.name in user.operands]
    return bool(users) and all(_slices(user, user.operands.index(each.name), program) for user in users)


def _slices(user: Instruction, place: int, program: HloProgram) -> bool:
    if user.opcode == "dynamic-slice":
        return place == 0
    if user.opcode != "fusion":
        return False
    (called,) = user.calls
    body = program.computations[called]
    parameter = next(each.name for each in body if each.opcode == "parameter" and each.arguments == str(place))
    users = [each for each in body if parameter in each.operands]
    return bool(users) and all(each.opcode == "dynamic-slice" and each.operands[0] == parameter for each in users)


def _groups(attributes: str, n_devices: int) -> Groups:
    """Parse the device groups from the attributes of a collective."""
    if found := _MESH.search(attributes):
        return _rows(_of_mesh(*found.groups()))
    if found := _TILED.search(attributes):
        return _rows(_tiled(found[1]))
    if found := _LISTED_GROUPS.search(attributes):
        listed = re.findall(r"\{([\d, ]+)\}", found[1])
        groups = tuple(tuple(int(number) for number in group.split(",")) for group in listed)
        is_permute = "source_target_pairs" in attributes
        return tuple(pair for pair in groups if len(set(pair)) == 2) if is_permute else groups
    # `replica_groups={}` stands for all devices.
    return (tuple(range(n_devices)),)


def _rows(groups: np.ndarray) -> Groups:
    return tuple(tuple(row) for row in groups.tolist())


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def _tiled(text: str) -> np.ndarray:
    """[8,4]<=[4,8]T(1,0): the numbers from 0 in the shape [4,8], transposed, as 8 groups of 4."""
    found = _IOTA.search(text)
    assert found is not None
    shape, lengths, order = _numbers(found[1]), _numbers(found[2]), found[3]
    devices = np.arange(math.prod(lengths)).reshape(lengths)
    return (devices.transpose(_numbers(order)) if order else devices).reshape(shape)


def _of_mesh(axes: str, order: str | None, over: str) -> np.ndarray:
    """The groups along some axes of a mesh. 'a':(2)4 is a part of the axis: after a part of 2, one of 4."""
    sizes = {name: int(size) for name, size in _MESH_AXIS.findall(axes)}
    n_devices = math.prod(sizes.values())
    devices = np.arange(n_devices)
    if order:
        devices = _tiled(f"[{n_devices}]<={order}") if "[" in order else np.array(_numbers(order))
    taken = {name: (int(before or 1), int(size or sizes[name])) for name, before, size in _GROUP_AXIS.findall(over)}
    lengths, grouped = list[int](), dict[str, int]()
    for name, size in sizes.items():
        before, part = taken.get(name, (size, 1))
        grouped[name] = len(lengths) + 1
        lengths += [before, part, size // before // part]
    along = [grouped[name] for name in taken]
    others = [place for place in range(len(lengths)) if place not in along]
    return devices.reshape(lengths).transpose(*others, *along).reshape(-1, math.prod(taken[name][1] for name in taken))
