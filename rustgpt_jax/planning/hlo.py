"""Parser of HLO text (openxla.org/xla/operation_semantics), of `compiled.as_text()` or `lowered.as_text("hlo")`.

It finds the instructions of each computation, how often each computation runs, and the collectives.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from graphlib import TopologicalSorter

import numpy as np

# Bits per element. Other types, such as token[] and opaque[], have no elements.
BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}
BITS |= {f"{kind}{bits}": bits for kind in "su" for bits in (2, 4, 8, 16, 32, 64)}
BITS |= {f"f{bits}": bits for bits in (16, 32, 64)}

_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_LISTED = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_NAME = re.compile(r"%([\w.\-]+)")
# Lowered programs are printed in the short form, without percent signs and without the shapes of operands.
_SHORT_NAME = re.compile(r"[A-Za-z_][\w.\-]*")
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")


@dataclass(frozen=True)
class Instruction:
    """One line: `name = shape opcode(arguments), attributes`. The shape is text, in parentheses for a tuple."""

    name: str
    shape: str
    opcode: str
    arguments: str
    attributes: str

    @property
    def operands(self) -> tuple[str, ...]:
        """The names of the instructions that it reads."""
        names = _NAME.findall(self.arguments)
        if not names and self.opcode not in ("constant", "parameter"):
            names = _SHORT_NAME.findall(self.arguments)
        return tuple(names)

    @property
    def calls(self) -> tuple[str, ...]:
        """The names of the computations that it runs. The end of an asynchronous operation only names them."""
        if self.opcode.endswith(("-done", "-update")):
            return ()
        listed = (name for names in _LISTED.findall(self.attributes) for name in re.findall(r"[\w.\-]+", names))
        return (*_CALLED.findall(self.attributes), *listed)

    @property
    def trips(self) -> int | None:
        """The trip count of a loop, or None if it is unknown."""
        found = _TRIPS.search(self.attributes)
        return int(found[1]) if found else None


@dataclass(frozen=True)
class HloProgram:
    """The instructions of each computation by name, and the name of the entry computation."""

    computations: dict[str, tuple[Instruction, ...]]
    entry: str

    def count_runs(self) -> Counter[str]:
        """Count how often each computation runs per run of the program.

        A loop of unknown length and each branch of a conditional count once.
        """
        bodies = self.computations.items()
        called_by = {name: {callee for each in body for callee in each.calls} for name, body in bodies}
        runs = Counter({self.entry: 1})
        # In topological order from the entry, so that callers come before callees.
        for name in reversed(tuple(TopologicalSorter(called_by).static_order())):
            for each in self.computations.get(name, ()):
                for callee in each.calls:
                    runs[callee] += runs[name] * (self.count_trips(each) if each.opcode == "while" else 1)
        return runs

    def count_trips(self, loop: Instruction) -> int:
        """Return the trip count of a loop, which in a lowered program is the limit of its condition; 1 if unknown."""
        if loop.trips is not None:
            return loop.trips or 1
        condition = _CONDITION.search(loop.attributes)
        body = self.computations.get(condition[1], ()) if condition else ()
        constants = {each.name: each.arguments for each in body if each.opcode == "constant"}
        limits = (
            constants.get(each.operands[-1], "")
            for each in body
            if each.opcode == "compare" and "direction=LT" in each.attributes
        )
        return next((int(limit) for limit in limits if limit.isdigit()), 0) or 1


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
            body.append(_parse_instruction(found[1], found[2]))
    return HloProgram(computations, entry)


def _parse_instruction(name: str, rest: str) -> Instruction:
    shape, rest = _split_parentheses(rest) if rest.startswith("(") else rest.split(" ", 1)
    opcode, rest = rest.strip().split("(", 1)
    arguments, attributes = _split_parentheses("(" + rest)
    return Instruction(name, shape, opcode, arguments[1:-1], attributes)


def _split_parentheses(text: str) -> tuple[str, str]:
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
    with_bits = ((kind, size, 8 if kind.startswith("f8") else BITS.get(kind, 0)) for kind, size in found)
    return [(kind, math.ceil(size * bits / 8)) for kind, size, bits in with_bits if bits]


def parse_lengths(shape: str) -> tuple[int, ...]:
    """Return the axis lengths of an array's shape."""
    found = _ARRAY.search(shape)
    return tuple(int(length.removeprefix("<=")) for length in found[2].split(",") if length) if found else ()


def parse_elements(shape: str) -> list[str]:
    """Return the element shapes of a tuple shape."""
    inner, found, depth, start = shape[1:-1], list[str](), 0, 0
    for end, letter in enumerate(inner):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            found.append(inner[start:end].strip())
            start = end + 1
    return [*found, inner[start:].strip()]


# Collectives.
#
# The bytes that each of the n devices of a group receives with a ring algorithm, which is optimal (arXiv 1802.05799),
# where R is the number of bytes of the result on a device:
#
#     all-gather          R (n - 1) / n
#     reduce-scatter      R (n - 1)
#     all-reduce          2 R (n - 1) / n       a reduce-scatter, then an all-gather
#     all-to-all          R (n - 1) / n
#     collective-permute  R

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
    """A collective of a program.

    Attributes:
        kind: One of KINDS.
        dtype: The type of its elements.
        received: The bytes that a device receives per run of the collective.
        groups: The groups of devices that communicate; for collective-permute, pairs of sender and receiver.
        times: How often it runs per run of the program.
        source: The JAX operation that it belongs to.
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
        """The bytes that a device receives per run of the program."""
        return self.times * self.received

    def axes(self, mesh: Mapping[str, int]) -> tuple[str, ...]:
        """Return the mesh axes along which the devices of a group differ. `mesh` gives the axis sizes in order."""
        positions = np.stack(np.unravel_index(np.arange(math.prod(mesh.values())), tuple(mesh.values())))
        differ = np.zeros(len(mesh), bool)
        for group in self.groups:
            members = positions[:, list(group)]
            differ |= np.any(members != members[:, :1], axis=1)
        return tuple(axis for axis, along in zip(mesh, differ, strict=True) if along)


@dataclass(frozen=True)
class CollectiveTotal:
    """The number of collectives of one kind over the same axes, and the total bytes that a device receives."""

    count: int
    received: float


def find_collectives(text: str, n_devices: int) -> list[Collective]:
    """Return the collectives over more than one device in a program's HLO, in the order of the text."""
    program = parse_hlo(text)
    runs = program.count_runs()
    found = [
        _make_collective(each, runs[name], n_devices, _is_scattered(each, name, program))
        for name, body in program.computations.items()
        for each in body
        if each.opcode.removesuffix("-start") in KINDS and runs[name]
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


def _make_collective(each: Instruction, times: int, n_devices: int, is_scattered: bool) -> Collective:
    kind = each.opcode.removesuffix("-start")
    groups = _parse_groups(each.attributes, n_devices)
    # The result of these instructions is a tuple of operand and result.
    has_operand = each.opcode in ("all-gather-start", "collective-permute-start")
    sized = parse_arrays(parse_elements(each.shape)[1] if has_operand else each.shape)
    dtype = max(sized, key=lambda array: array[1])[0] if sized else ""
    result = sum(size for _, size in sized)
    if "_promoted" in each.attributes and dtype == "f32":
        # XLA:CPU converts bfloat16 to float32 for the collective only.
        dtype, result = "bf16", result // 2
    source = _OP_NAME.search(each.attributes)
    size = max(map(len, groups), default=1)
    if kind == "all-reduce" and is_scattered:
        kind, result = "reduce-scatter", result // size
    return Collective(kind, dtype, _received_bytes(kind, result, size), groups, times, source[1] if source else "")


def _received_bytes(kind: str, result: float, size: int) -> float:
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
    """Return whether only slices of an all-reduce are used, which accelerators turn into a reduce-scatter."""
    if each.opcode != "all-reduce" or each.shape.startswith("("):
        return False
    users = [user for user in program.computations[name] if each.name in user.operands]
    return bool(users) and all(_is_slice(user, user.operands.index(each.name), program) for user in users)


def _is_slice(user: Instruction, operand: int, program: HloProgram) -> bool:
    """Return whether an instruction only slices one of its operands, given by index."""
    if user.opcode == "dynamic-slice":
        return operand == 0
    if user.opcode != "fusion":
        return False
    (called,) = user.calls
    body = program.computations[called]
    parameter = next(each.name for each in body if each.opcode == "parameter" and each.arguments == str(operand))
    users = [each for each in body if parameter in each.operands]
    return bool(users) and all(each.opcode == "dynamic-slice" and each.operands[0] == parameter for each in users)


def _parse_groups(attributes: str, n_devices: int) -> Groups:
    """Parse the device groups from the attributes of a collective."""
    if found := _MESH.search(attributes):
        return tuple(map(tuple, _parse_mesh_groups(*found.groups()).tolist()))
    if found := _TILED.search(attributes):
        return tuple(map(tuple, _parse_iota(found[1]).tolist()))
    if found := _LISTED_GROUPS.search(attributes):
        listed = re.findall(r"\{([\d, ]+)\}", found[1])
        groups = tuple(tuple(int(number) for number in group.split(",")) for group in listed)
        is_permute = "source_target_pairs" in attributes
        return tuple(pair for pair in groups if len(set(pair)) == 2) if is_permute else groups
    # `replica_groups={}` stands for all devices.
    return (tuple(range(n_devices)),)


def _parse_ints(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def _parse_iota(text: str) -> np.ndarray:
    """Parse [8,4]<=[4,8]T(1,0): the numbers 0 to 31 in shape [4,8], transposed, as 8 groups of 4."""
    found = _IOTA.search(text)
    assert found is not None
    shape, lengths, order = _parse_ints(found[1]), _parse_ints(found[2]), found[3]
    devices = np.arange(math.prod(lengths)).reshape(lengths)
    return (devices.transpose(_parse_ints(order)) if order else devices).reshape(shape)


def _parse_mesh_groups(axes: str, order: str | None, over: str) -> np.ndarray:
    """Parse groups along some axes of a mesh. 'a':(2)4 is a sub-axis of size 4 after a sub-axis of size 2."""
    sizes = {name: int(size) for name, size in _MESH_AXIS.findall(axes)}
    n_devices = math.prod(sizes.values())
    devices = np.arange(n_devices)
    if order:
        devices = _parse_iota(f"[{n_devices}]<={order}") if "[" in order else np.array(_parse_ints(order))
    taken = {name: (int(before or 1), int(size or sizes[name])) for name, before, size in _GROUP_AXIS.findall(over)}
    lengths, grouped = list[int](), dict[str, int]()
    for name, size in sizes.items():
        before, part = taken.get(name, (size, 1))
        grouped[name] = len(lengths) + 1
        lengths += [before, part, size // before // part]
    along = [grouped[name] for name in taken]
    others = [axis for axis in range(len(lengths)) if axis not in along]
    return devices.reshape(lengths).transpose(*others, *along).reshape(-1, math.prod(taken[name][1] for name in taken))
