"""The text of a compiled program, read: its computations, their instructions, and how often each computation runs.

The text is XLA's HLO (openxla.org/xla/operation_semantics), as `compiled.as_text()` gives it.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass
from graphlib import TopologicalSorter

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
        """The instructions that it reads."""
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
        """How often a loop turns; None where the compiler does not know it."""
        found = _TRIPS.search(self.attributes)
        return int(found[1]) if found else None


@dataclass(frozen=True)
class Program:
    """Instructions by the name of their computation; `entry` is the one that runs first."""

    computations: dict[str, tuple[Instruction, ...]]
    entry: str

    def times(self) -> Counter[str]:
        """How often each computation runs when the program runs once.

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


def read(text: str) -> Program:
    """A program from its text."""
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
    return Program(computations, entry)


def _instruction(name: str, rest: str) -> Instruction:
    shape, rest = _cut(rest) if rest.startswith("(") else rest.split(" ", 1)
    opcode, rest = rest.strip().split("(", 1)
    arguments, attributes = _cut("(" + rest)
    return Instruction(name, shape, opcode, arguments[1:-1], attributes)


def _cut(text: str) -> tuple[str, str]:
    """A text that begins with a parenthesis, cut after the one that closes it."""
    depth = 0
    for end, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[: end + 1], text[end + 1 :]
    raise ValueError(f"no closing parenthesis: {text[:80]}")


def arrays(shape: str) -> list[tuple[str, int]]:
    """The element type and bytes of each array of a shape."""
    found = ((each[1], math.prod(lengths(each[0]))) for each in _ARRAY.finditer(shape))
    return [(kind, math.ceil(size * bits / 8)) for kind, size in found if (bits := _bits(kind))]


def lengths(shape: str) -> tuple[int, ...]:
    """The lengths of the axes of an array's shape."""
    found = _ARRAY.search(shape)
    return tuple(int(length.removeprefix("<=")) for length in found[2].split(",") if length) if found else ()


def elements(shape: str) -> list[str]:
    """The elements of a tuple's shape, one level down."""
    inner, found, depth, start = shape[1:-1], list[str](), 0, 0
    for place, letter in enumerate(inner):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            found.append(inner[start:place].strip())
            start = place + 1
    return [*found, inner[start:].strip()]


def _bits(kind: str) -> int:
    return 8 if kind.startswith("f8") else BITS.get(kind, 0)
