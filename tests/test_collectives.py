"""Collectives, FLOPs and traffic of compiled programs with known communication, on 8 virtual devices."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from rustgpt_jax.planning.estimate import count_matmul_flops, count_matmul_traffic, find_warnings
from rustgpt_jax.planning.hlo import (
    Collective,
    CollectiveTotal,
    _parse_groups,
    find_collectives,
    parse_hlo,
    summarize_collectives,
)

ROOT = Path(__file__).parent.parent
MESH = {"data": 4, "tensor": 2}
PROGRAMS = """
import json, sys
import jax, jax.numpy as jnp
jax.config.update("jax_num_cpu_devices", 8)
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)

def at(*axes):
    return NamedSharding(mesh, P(*axes))

def text(function, out, *inputs):
    shapes = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype, sharding in inputs]
    return jax.jit(function, out_shardings=out).lower(*shapes).compile().as_text()

def loop(x, weights):
    def body(x, w):
        return jax.lax.all_gather(jnp.tanh(x @ w), "tensor", axis=1, tiled=True), None
    return jax.lax.scan(body, x, weights)[0]

def nested(x, weights):
    return jax.lax.fori_loop(0, 3, lambda _, x: loop(x, weights), x)

def looped(function):
    specs = P(), P(None, None, "tensor")
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)

def mapped(function, spec=P("data", "tensor")):
    return jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)

f32, bf16 = jnp.float32, jnp.bfloat16
product = lambda a, b: a @ b
square = ((16, 32), f32, at("data", "tensor"))
weights = ((5, 32, 32), f32, at(None, None, "tensor"))
programs = {
    "contracted": text(product, at(), ((16, 32), f32, at(None, "tensor")), ((32, 64), f32, at("tensor"))),
    "contracted, bfloat16": text(product, at(), ((16, 32), bf16, at(None, "tensor")), ((32, 64), bf16, at("tensor"))),
    "contracted, scattered": text(product, at("data"), ((16, 32), f32, at(None, "data")), ((32, 64), f32, at("data"))),
    "gathered": text(product, at("data"), ((16, 32), f32, at("data")), ((32, 64), f32, at("data"))),
    "local": text(product, at("data", "tensor"), ((16, 32), f32, at("data")), ((32, 64), f32, at(None, "tensor"))),
    "scan": text(looped(loop), at(), ((16, 32), f32, at()), weights),
    "nested": text(looped(nested), at(), ((16, 32), f32, at()), weights),
    "exchanged": text(lambda a: 2 * a, at(None, "data"), ((16, 32), f32, at("data"))),
    "both axes": text(mapped(lambda x: jax.lax.psum(x, ("data", "tensor"))), None, square),
    "permuted": text(mapped(lambda x: jax.lax.ppermute(x, "data", [(i, (i + 1) % 4) for i in range(4)])), None, square),
    "one sends": text(mapped(lambda x: jax.lax.ppermute(x, "data", [(0, 1)])), None, square),
    "psum_scatter": text(mapped(lambda x: jax.lax.psum_scatter(jnp.tile(x, (4, 1)), "data", tiled=True)), None, square),
    "all_to_all": text(mapped(lambda x: jax.lax.all_to_all(x, "tensor", 1, 1, tiled=True)), None, square),
    "tree": text(mapped(lambda x: sum(jax.lax.psum([x, x[:2].sum(0, keepdims=True), 3 * x], "tensor"))), None, square),
    "attention": text(lambda q: jnp.einsum("bts,bsc->btc", jax.nn.softmax(jnp.einsum("btc,bsc->bts", q, q + 1)), q * 2),
                      at(), ((2, 64, 4), f32, at())),
    "half": text(lambda a: a.sum(), at(), ((8, 4), f32, at(("tensor", "data")))),
}
from rustgpt_jax.planning.estimate import capture_compiler_log
cube = jax.make_mesh((2, 2, 2), ("a", "b", "c"), axis_types=(AxisType.Auto,) * 3)
with capture_compiler_log() as warnings:
    rows, others = NamedSharding(cube, P(("a", "b", "c"))), NamedSharding(cube, P("b", "a"))
    text(jnp.sin, others, ((16, 32), f32, rows))
json.dump([programs, warnings], sys.stdout)
"""


@pytest.fixture(scope="module")
def compiled() -> tuple[dict[str, str], list[str]]:
    """The HLO of programs compiled for a mesh of 4 x 2, and the compiler's warnings for another."""
    command = [sys.executable, "-c", PROGRAMS]
    # The compiler does not repeat its warnings for a cached program.
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    made = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert (made.returncode, made.stderr) == (0, "")
    return json.loads(made.stdout)


@pytest.fixture(scope="module")
def programs(compiled: tuple[dict[str, str], list[str]]) -> dict[str, str]:
    """The HLO of the programs."""
    return compiled[0]


A_RESULT = 16 * 64 * 4
# Kind, element type, axes, number of runs, total bytes received.
KNOWN: dict[str, list[tuple[str, str, tuple[str, ...], int, float]]] = {
    "contracted": [("all-reduce", "f32", ("tensor",), 1, 2 * A_RESULT / 2)],
    "contracted, bfloat16": [("all-reduce", "bf16", ("tensor",), 1, 2 * A_RESULT / 2 / 2)],
    "contracted, scattered": [("reduce-scatter", "f32", ("data",), 1, A_RESULT * 3 / 4)],
    "gathered": [("all-gather", "f32", ("data",), 1, 32 * 64 * 4 * 3 / 4)],
    "local": [],
    "scan": [("all-gather", "f32", ("tensor",), 5, 5 * 16 * 32 * 4 / 2)],
    "nested": [("all-gather", "f32", ("tensor",), 15, 15 * 16 * 32 * 4 / 2)],
    "exchanged": [("all-to-all", "f32", ("data",), 1, 4 * 32 * 4 * 3 / 4)],
    "both axes": [("all-reduce", "f32", ("data", "tensor"), 1, 2 * 4 * 16 * 4 * 7 / 8)],
    "permuted": [("collective-permute", "f32", ("data",), 1, 4 * 16 * 4)],
    "one sends": [("collective-permute", "f32", ("data",), 1, 4 * 16 * 4)],
    "psum_scatter": [("reduce-scatter", "f32", ("data",), 1, 16 * 16 * 4 * 3 / 4)],
    "all_to_all": [("all-to-all", "f32", ("tensor",), 1, 4 * 16 * 4 / 2)],
    "half": [("all-reduce", "f32", ("data", "tensor"), 1, 2 * 4 * 7 / 8)],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KNOWN)
def test_collectives_of_known_programs(programs: dict[str, str], name: str) -> None:
    found = find_collectives(programs[name], 8)
    shown = [(each.kind, each.dtype, each.axes(MESH), each.times, each.total) for each in found]
    assert shown == KNOWN[name]


def test_arrays_of_one_collective_are_summed(programs: dict[str, str]) -> None:
    total = summarize_collectives(find_collectives(programs["tree"], 8), MESH)["all-reduce", ("tensor",)]
    assert total.received == 2 * (4 * 16 + 16 + 4 * 16) * 4 / 2


def test_summary_adds_up_by_kind_and_axes() -> None:
    pairs, whole = ((0, 1), (2, 3), (4, 5), (6, 7)), (tuple(range(8)),)
    found = [
        Collective("all-gather", "f32", 10.0, pairs, 3, ""),
        Collective("all-gather", "bf16", 1.0, pairs, 2, ""),
        Collective("all-gather", "f32", 100.0, whole, 1, ""),
    ]
    assert list(summarize_collectives(found, MESH).items()) == [
        (("all-gather", ("data", "tensor")), CollectiveTotal(1, 100.0)),
        (("all-gather", ("tensor",)), CollectiveTotal(5, 32.0)),
    ]


def test_products_in_loops_count_per_iteration(programs: dict[str, str]) -> None:
    def flops(name: str) -> float:
        return count_matmul_flops(parse_hlo(programs[name]))

    assert flops("contracted") == 2 * 16 * 64 * 32 / 2
    assert flops("local") == 2 * 16 * 64 * 32 / 8
    assert flops("scan") == 5 * 2 * 16 * 32 * 32 / 2
    assert flops("nested") == 3 * flops("scan")


def test_traffic_of_products(programs: dict[str, str]) -> None:
    def moved(name: str) -> float:
        return moved_by(programs[name])

    # A quarter of a's rows, half of b's columns, and their product.
    assert moved("local") == 4 * (4 * 32 + 32 * 32 + 4 * 32)
    # An iteration reads one slice of the weights, not all five.
    assert moved("scan") == 5 * 4 * (16 * 32 + 32 * 16 + 16 * 16)
    assert moved("nested") == 3 * moved("scan")


def test_attention_scores_are_not_counted_as_traffic(programs: dict[str, str]) -> None:
    # q, k and v of 2 x 64 x 4, scores of 2 x 64 x 64, and the weighted values.
    assert moved_by(programs["attention"]) == 4 * 4 * (2 * 64 * 4)
    assert count_matmul_flops(parse_hlo(programs["attention"])) == 2 * 2 * (2 * 64 * 64 * 4)


def moved_by(text: str) -> float:
    return count_matmul_traffic(parse_hlo(text))


# Formats of device groups.


def brute_force(shape: tuple[int, ...], lengths: tuple[int, ...], order: tuple[int, ...]) -> list[list[int]]:
    """Compute the groups of `shape<=lengths T(order)` one number at a time."""
    transposed = [lengths[axis] for axis in order]
    numbers = []
    for place in np.ndindex(*transposed):
        where = [0] * len(lengths)
        for axis, index in zip(order, place, strict=True):
            where[axis] = index
        numbers.append(sum(index * math.prod(lengths[axis + 1 :]) for axis, index in enumerate(where)))
    return [numbers[first : first + shape[1]] for first in range(0, len(numbers), shape[1])]


@given(some.data(), some.lists(some.integers(1, 4), min_size=1, max_size=4))
def test_iota_groups_are_parsed(data: Any, lengths: list[int]) -> None:
    order = data.draw(some.permutations(range(len(lengths))))
    size = data.draw(some.sampled_from([n for n in range(1, 65) if math.prod(lengths) % n == 0]))
    shape = (math.prod(lengths) // size, size)
    written = f"[{shape[0]},{size}]<=[{','.join(map(str, lengths))}]T({','.join(map(str, order))})"
    found = _parse_groups(f", channel_id=1, replica_groups={written}, dimensions={{0}}", 64)
    assert [list(group) for group in found] == brute_force(shape, tuple(lengths), tuple(order))


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("{{0,1},{2,3}}", ((0, 1), (2, 3))),
        ("[2,4]<=[8]", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("[4,2]<=[2,4]T(1,0)", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['a'=2,'b'=4] {'b'}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("mesh['a'=2,'b'=4] {'a'}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", ((0, 1), (2, 3), (4, 5), (6, 7))),
        ("mesh['a'=2,'b'=4] {'a','b'}", (tuple(range(8)),)),
        ("mesh['a'=2,'b'=4] {'b','a'}", ((0, 4, 1, 5, 2, 6, 3, 7),)),
        ("mesh['a'=2,'b'=4] {'b':(1)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("mesh['a'=2,'b'=4] {'b':(2)2}", ((0, 1), (2, 3), (4, 5), (6, 7))),
        ("{}", (tuple(range(8)),)),
    ],
)
def test_device_groups_are_parsed(written: str, groups: tuple[tuple[int, ...], ...]) -> None:
    assert _parse_groups(f", channel_id=1, replica_groups={written}, use_global_device_ids=true", 8) == groups


# Programs for accelerators, with asynchronous collectives.

ASYNCHRONOUS = """HloModule m, entry_computation_layout={(f32[4]{0})->f32[16]{0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

%wrapped (p: f32[32]) -> f32[4] {
  %p = f32[32]{0} parameter(0)
  ROOT %rs = f32[4]{0} reduce-scatter(%p), replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%add
}

ENTRY %main (x: f32[4], y: bf16[8,2]) -> f32[16] {
  %x = f32[4]{0:T(128)} parameter(0)
  %y = bf16[8,2]{1,0} parameter(1)
  %ags = (f32[4]{0}, f32[16]{0}) all-gather-start(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %agd = f32[16]{0} all-gather-done(%ags)
  %ars = bf16[8,2]{1,0} all-reduce-start(%y), replica_groups={}, to_apply=%add
  %ard = bf16[8,2]{1,0} all-reduce-done(%ars)
  %cps = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1},{1,0},{2,2}}
  %cpd = f32[4]{0} collective-permute-done(%cps)
  %rss = ((f32[32]{0}), f32[4]{0}) async-start(%agd), calls=%wrapped
  %rsd = f32[4]{0} async-done(%rss), calls=%wrapped
  ROOT %r = f32[16]{0} add(%agd, %agd)
}
"""


def test_asynchronous_collectives_count_once() -> None:
    found = {each.kind: (each.dtype, each.group_size, each.total) for each in find_collectives(ASYNCHRONOUS, 8)}
    assert found == {
        "all-gather": ("f32", 4, 16 * 4 * 3 / 4),
        "all-reduce": ("bf16", 8, 2 * 16 * 2 * 7 / 8),
        "collective-permute": ("f32", 2, 4 * 4),
        "reduce-scatter": ("f32", 8, 4 * 4 * 7),
    }


def test_single_device_has_no_collectives() -> None:
    text = ASYNCHRONOUS.replace("[2,4]<=[8]", "[8,1]<=[8]").replace("[1,8]<=[8]", "[8,1]<=[8]")
    assert {each.kind for each in find_collectives(text, 8)} == {"all-reduce", "collective-permute"}


# Warnings.


def test_compiler_warnings_are_captured(compiled: tuple[dict[str, str], list[str]]) -> None:
    (warning,) = compiled[1]
    assert warning.startswith("[SPMD] Involuntary full rematerialization. The compiler cannot go from sharding")


def test_find_warnings_skips_other_lines() -> None:
    log = """noise
W1122 10:39:35.960690    4208 spmd_partitioner.cc:630] [SPMD] Involuntary full rematerialization.
I1122 10:39:35.960690    4208 spmd_partitioner.cc:631] as it should be
E1122 10:39:35.960690    4208 slow_operation_alarm.cc:73] Compiling takes long
W1122 10:39:36.960690    4208 spmd_partitioner.cc:630] [SPMD] Involuntary full rematerialization.
"""
    assert find_warnings(log) == ["[SPMD] Involuntary full rematerialization."]
