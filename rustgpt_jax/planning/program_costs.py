"""Operations, FLOPs and bytes of a lowered program by module of the model, from the metadata of its HLO.

JAX records the stack of `jax.named_scope` of each operation, such as

    jit(train_step)/transpose(jvp(blocks))/while/body/checkpoint/rematted_computation/0/Block/mixer/query/dot_general

Flax opens a scope for each module, and transformer.py, loss.py and train_step.py for the rest of the step. What is left
without the parts that name transformations is the path of a module, here blocks/0/mixer/query; `transpose` marks the
backward pass, and `rematted_computation` what rematerialization computes again.

The program is the one that JAX gives to the compiler, before fusion. So FLOPs are exact, and the bytes are those that
operations would move one by one: a compiler that fuses operations moves less.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from rustgpt_jax.config.schema import Config, ModelConfig, partition
from rustgpt_jax.model import transformer
from rustgpt_jax.model.flops import parameter_shapes
from rustgpt_jax.planning.estimate import count_array_bytes, count_dot_flops
from rustgpt_jax.planning.hlo import HloProgram, Instruction, parse_hlo, parse_lengths
from rustgpt_jax.training.memory_estimate import batch_shapes, state_shapes
from rustgpt_jax.training.train_step import train_step

FORWARD, BACKWARD, RECOMPUTED, UPDATE = PASSES = ("forward", "backward", "recomputed", "update")
OTHER = "other"
# The outermost scopes, in the order of a training step.
TOP_SCOPES = ("embedding", "positions", "blocks", "norm", "logits", "loss", "optimizer")
# Operations that compute nothing and move nothing.
FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "opt-barrier",
    "optimization-barrier",
}
# Operations that XLA's cost analysis counts as one FLOP per element of the result.
ARITHMETIC = {
    "add",
    "subtract",
    "multiply",
    "divide",
    "maximum",
    "minimum",
    "negate",
    "abs",
    "select",
    "compare",
    "and",
}
# Operations whose costs are those of the computations that they run.
CALLS = {"while", "call", "conditional", "fusion", "async-start", "async-done"}

_OP_NAME = re.compile(r'op_name="([^"]*)"')
_WRAPPED = re.compile(r"^(?:\w+\()+(.*?)\)+$")
# Parts of a name stack that JAX adds.
_STRUCTURE = re.compile(
    r"(pjit|while|body|cond|scan|checkpoint|remat\d*|rematted_computation|closed_call|core_call|shard_map|branch_\d+_fun"
    r"|custom_[jv][vj]p_call(_jaxpr)?|custom_lin|named|backward|Block)"
)


@dataclass
class Costs:
    """Costs of the operations of a module.

    Attributes:
        operations: The number of operations that run, with each iteration of a loop counted.
        flops: FLOPs of matrix products by pass: forward, backward, recomputed and the optimizer's update.
        other_flops: FLOPs of other arithmetic: one per element of an elementwise operation or a reduction.
        bytes: Bytes that the operations read and write if none are fused.
    """

    operations: int = 0
    flops: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PASSES, 0.0))
    other_flops: float = 0.0
    bytes: float = 0.0

    @property
    def total_flops(self) -> float:
        """FLOPs of all passes."""
        return sum(self.flops.values())

    def add(self, other: "Costs", times: int = 1) -> None:
        """Add `times` times the costs of another module."""
        self.operations += times * other.operations
        self.other_flops += times * other.other_flops
        self.bytes += times * other.bytes
        for name, flops in other.flops.items():
            self.flops[name] += times * flops


@dataclass(frozen=True)
class ProgramCosts:
    """Costs of a program by path of a module, without those of the modules inside it.

    Attributes:
        modules: Costs by path, such as blocks/0/mixer/query.
        library_calls: The number of calls of each library kernel, whose FLOPs are unknown.
        once: Costs of the program with the body of each loop counted once, as XLA counts.
    """

    modules: dict[str, Costs]
    library_calls: dict[str, int]
    once: Costs

    def total(self, prefix: str = "") -> Costs:
        """Return the costs of a module with those inside it, by default of the whole program."""
        total = Costs()
        for path, costs in self.modules.items():
            if not prefix or path == prefix or path.startswith(f"{prefix}/"):
                total.add(costs)
        return total

    def describe(self) -> dict[str, Any]:
        """Return the costs as JSON has them."""
        modules = {path: vars(costs) for path, costs in self.modules.items()}
        return {"modules": modules, "total": vars(self.total()), "library_calls": self.library_calls}

    def paths(self, depth: int) -> list[str]:
        """Return the paths of the modules up to a depth, outer ones first, in the order of a training step."""
        found = {
            "/".join(path.split("/")[:length])
            for path in self.modules
            for length in range(1, 1 + (depth if path.startswith("blocks") else 1))
        }
        first_places = dict[str, int]()
        for place, path in enumerate(self.modules):
            parts = path.split("/")
            for length in range(1, len(parts) + 1):
                first_places.setdefault("/".join(parts[:length]), place)
        first_places |= {name: rank - len(TOP_SCOPES) for rank, name in enumerate(TOP_SCOPES)}

        def key(path: str) -> list[int]:
            parts = path.split("/")
            return [first_places["/".join(parts[:length])] for length in range(1, len(parts) + 1)]

        return sorted(found, key=key)


def lower_train_step(config: Config, platform: str | None = None) -> Any:
    """Lower one training step of a config on one device, for a platform or else for that of this process."""
    static, hparams = partition(config)
    batch = batch_shapes(config.training.batch_size, config.seq_len)
    traced = jax.jit(train_step, static_argnums=0, donate_argnums=1).trace(static, state_shapes(config), batch, hparams)
    return traced.lower(lowering_platforms=None if platform is None else (platform,))


def lower_decode_step(model: ModelConfig, platform: str | None = None) -> Any:
    """Lower one decoding step: the logits of one token of one row, with a cache of `context_length` tokens."""
    cache = jax.eval_shape(lambda: transformer.init_cache(model, 1, model.context_length))
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)

    def decode_step(params: Any, cache: Any, tokens_BT: Any, positions_BT: Any) -> Any:
        return transformer.apply(params, tokens_BT, model, cache, positions_BT=positions_BT)

    traced = jax.jit(decode_step, donate_argnums=1).trace(parameter_shapes(model), cache, token, token)
    return traced.lower(lowering_platforms=None if platform is None else (platform,))


def count_program_costs(lowered: Any) -> ProgramCosts:
    """Count the costs of a lowered program by module."""
    program = parse_hlo(lowered.as_text(dialect="hlo", debug_info=True))
    modules, library_calls, once = defaultdict[str, Costs](Costs), Counter[str](), Costs()
    for each, shapes, scopes, times in _walk(program, program.entry, (_root(program),), 1):
        path, stage = parse_scopes(scopes)
        costs = _count_operation(each, shapes, stage)
        modules[path].add(costs, times)
        once.add(costs)
        if each.opcode == "custom-call":
            library_calls[_target(each)] += times
    return ProgramCosts(dict(modules), dict(library_calls), once)


def _count_operation(instruction: Instruction, shapes: dict[str, str], stage: str) -> Costs:
    costs = Costs(operations=1, bytes=_moved_bytes(instruction, shapes))
    if instruction.opcode == "dot":
        costs.flops[stage] = count_dot_flops(instruction, shapes)
    elif instruction.opcode in ARITHMETIC:
        costs.other_flops = math.prod(parse_lengths(instruction.shape))
    elif instruction.opcode == "reduce":
        # The first half of the operands are the arrays, and the second half the initial values.
        arrays = instruction.operands[: len(instruction.operands) // 2]
        costs.other_flops = sum(math.prod(parse_lengths(shapes[array])) for array in arrays)
    return costs


def _walk(
    program: HloProgram, name: str, caller: tuple[str, ...], times: int
) -> Iterator[tuple[Instruction, dict[str, str], tuple[str, ...], int]]:
    """Yield each operation that a computation runs, the shapes in its computation, its scopes, and how often it runs.

    Names either begin with the outermost scope of the program, which is the first one of `caller`, or, in computations
    that JAX lowers separately, with the first scope inside them.
    """
    body = program.computations[name]
    shapes = {each.name: each.shape for each in body}
    for each in _live_instructions(body):
        found = _OP_NAME.search(each.attributes)
        own = tuple(found[1].partition(";")[0].split("/")) if found else ()
        # Some names begin with the name of the traced function instead.
        own = own[1:] if own[:1] == (_inner_name(caller[0]),) else own
        scopes = own if own[:1] == caller[:1] else (*caller, *own)
        if each.opcode in CALLS:
            trips = program.count_trips(each) if each.opcode == "while" else 1
            for callee in each.calls:
                yield from _walk(program, callee, scopes, times * trips)
        elif each.opcode not in FREE:
            yield each, shapes, scopes[:-1] if own else scopes, times


def parse_scopes(scopes: Sequence[str]) -> tuple[str, str]:
    """Return the path of the module with these scopes, and the pass that it belongs to."""
    stage = FORWARD
    if "backward" in scopes or any("transpose(" in scope for scope in scopes):
        stage = BACKWARD
    if "rematted_computation" in scopes:
        stage = RECOMPUTED
    path: list[str] = []
    for scope in scopes:
        if scope.startswith(("jit(", "pjit(")) or "->" in scope:
            continue
        # A method other than __call__ has a scope such as mixer.decode.
        name = _inner_name(scope).partition(".")[0]
        if name.isdecimal():
            # A group of layers. In a checkpointed function, JAX repeats the scopes around it.
            path = ["blocks", name]
        elif name in TOP_SCOPES and path[:1] != ["blocks"]:
            # For example, the logits of a chunk are computed inside the scope of the loss.
            path = [name]
        elif name and path and name != path[-1] and not _STRUCTURE.fullmatch(name):
            path.append(name)
    return "/".join(path) or OTHER, UPDATE if path[:1] == ["optimizer"] else stage


def _inner_name(scope: str) -> str:
    """Return the name inside transformations: blocks for transpose(jvp(blocks))."""
    wrapped = _WRAPPED.match(scope)
    return wrapped[1] if wrapped else scope


def _root(program: HloProgram) -> str:
    """Return the outermost scope of a program, such as jit(train_step)."""
    names = (_OP_NAME.search(each.attributes) for each in program.computations[program.entry])
    return next((name[1].split("/")[0] for name in names if name and name[1].startswith("jit(")), "")


def _live_instructions(body: Sequence[Instruction]) -> list[Instruction]:
    """Return the instructions that the last one, the result of the computation, depends on."""
    live = {body[-1].name}
    for each in reversed(body):
        if each.name in live:
            live.update(each.operands)
    return [each for each in body if each.name in live]


def _moved_bytes(instruction: Instruction, shapes: dict[str, str]) -> int:
    operands: Iterable[str] = (shapes.get(operand, "") for operand in instruction.operands)
    if instruction.opcode in ("dynamic-slice", "gather", "slice"):
        # They read only what they return.
        return 2 * count_array_bytes(instruction.shape)
    if instruction.opcode in ("dynamic-update-slice", "scatter"):
        update = instruction.operands[1 if instruction.opcode == "dynamic-update-slice" else -1]
        return 2 * count_array_bytes(shapes.get(update, ""))
    return count_array_bytes(instruction.shape) + sum(map(count_array_bytes, operands))


def _target(instruction: Instruction) -> str:
    found = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
    return found[1] if found else "custom-call"
