"""The conformance kit: each check finds the mistakes it is for, and registered components pass."""

import dataclasses
import functools
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from broken_components import MISTAKES, Mistake
from rich.console import Console

from rustgpt_jax.conformance import packed_sequences, rounding
from rustgpt_jax.conformance.checks import CHECKS, check_components, checks_for, run_check
from rustgpt_jax.conformance.components import (
    MODEL_FIELDS,
    MODEL_KINDS,
    REGISTRIES,
    Component,
    Scope,
    find_components,
    infer_kind,
)
from rustgpt_jax.conformance.fixtures import CheckFailure, assert_close, assert_finite, assert_same_bits
from rustgpt_jax.errors import UserError
from rustgpt_jax.model import flops
from rustgpt_jax.model.mixers import MIXERS

ROOT = Path(__file__).parent.parent
# Starts a child process if this one has fewer than eight devices.
IN_CHILD_PROCESS = "devices"
# Mistakes that plain pytest covers: one for each check in which mistakes of a model are cheap to find.
CHEAP_MISTAKES = (
    *("SeesNextToken", "SeesOtherDocuments", "ScaledByRow", "ScaledByTokensOfRow", "WritesOneSlotLate"),
    *("StopsGradientOfKeys", "WidensResult", "SoftmaxInBfloat16", "MatmulAsSum", "UnusedParameter"),
)
# What combinations of components could still break when each component passes by itself.
FAMILY_CHECKS = ("isolation", "cache", "parameters")
CORRECT = (
    "mixers/broken_components:Attention",
    "broken_components:Recurrence",
    "broken_components:FeedForward",
    "broken_components:GroupedAttention",
)
# Correct mixers of unusual construction.
UNUSUAL = ("SubclassedAttention", "SowsEntropy", "Stateless", "ChunkedRecurrence")

pytest_plugins = ["pytester"]


def run_python(code: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def require_ok(component: Component, checks: Any = ()) -> None:
    # A process can map only a limited number of compiled programs, and those of other components are not needed.
    jax.clear_caches()
    outcomes = [run_check(name, component) for name in checks_for(component, checks) if name != IN_CHILD_PROCESS]
    failed = [f"{outcome.check}: {outcome.note}" for outcome in outcomes if not outcome.is_ok]
    assert outcomes and not failed, "\n".join(failed)


# Mistakes are found.


def mark_mistakes() -> Iterator[Any]:
    """Mark the first mistake of each check and kind `slow` and the others `long`, except for cheap ones."""
    tested: set[tuple[str, str]] = set()
    for mistake in MISTAKES:
        kind, name = mistake.component.partition("/")[0], mistake.component.rpartition(":")[2]
        marker = pytest.mark.long if (kind, mistake.check) in tested else pytest.mark.slow
        tested.add((kind, mistake.check))
        is_cheap = name in CHEAP_MISTAKES or kind not in MODEL_KINDS
        yield pytest.param(mistake, id=f"{name}-{mistake.check}", marks=[] if is_cheap else [marker])


@pytest.mark.parametrize("mistake", list(mark_mistakes()))
def test_mistake_is_found_by_its_check(mistake: Mistake) -> None:
    # One layer compiles in half the time of a loop over layers.
    (component,) = find_components(mistake.component, {"n_layers": 1})
    outcome = run_check(mistake.check, dataclasses.replace(component, scope=mistake.scope))
    assert not outcome.is_ok, outcome.note
    assert re.search(mistake.message, outcome.note), outcome.note


def test_every_check_has_a_mistake() -> None:
    assert len(set(MISTAKES)) == 96
    assert {mistake.check for mistake in MISTAKES} == set(CHECKS) - {"tokenizer_determinism", "launcher_interface"}


# Correct components pass.


def select_components(kinds: tuple[str, ...], scope: Scope, **changes: Any) -> list[Component]:
    """The registered components of some kinds, those with the same small model once."""
    components: dict[Any, Component] = {}
    for kind in kinds:
        for component in find_components(kind, changes):
            components.setdefault(component.model or component.title, dataclasses.replace(component, scope=scope))
    return list(components.values())


def parametrize_components(components: list[Component]) -> Any:
    return pytest.mark.parametrize("component", components, ids=[component.title for component in components])


@pytest.mark.long
def test_attention_conforms_in_small_scope() -> None:
    (component,) = find_components("attention", {"n_layers": 1})
    require_ok(dataclasses.replace(component, scope=Scope.SMALL), set(CHECKS) - {"drift", "heads"})


@pytest.mark.slow
@parametrize_components(select_components(tuple(MODEL_FIELDS), Scope.SMALL, n_layers=1))
def test_model_components_conform_in_small_scope(component: Component) -> None:
    checks = ["causality", "isolation"]
    if component.kind in ("mixers", "positions") or component.name == "moe":
        checks += ["gradients", "rows", "prefill", "cache", "parameters"]
    require_ok(component, checks)


@pytest.mark.long
@parametrize_components(select_components(tuple(MODEL_FIELDS), Scope.QUICK))
def test_model_components_conform(component: Component) -> None:
    require_ok(component)


@pytest.mark.slow
def test_family_conforms_in_small_scope() -> None:
    (component,) = find_components("families/gpt2", {"n_layers": 1})
    require_ok(dataclasses.replace(component, scope=Scope.SMALL), ("causality", "isolation"))


@pytest.mark.long
@parametrize_components(select_components(("families",), Scope.QUICK))
def test_families_conform(component: Component) -> None:
    require_ok(component, FAMILY_CHECKS)


@pytest.mark.slow
def test_bias_of_keys_without_positions_is_not_unused() -> None:
    # It moves all scores of a query alike: its gradient is 0 except for rounding, and in some channels exactly 0.
    (component,) = find_components("positions/none", {"n_layers": 1, "attention.n_kv_heads": 4})
    require_ok(component, ("parameters",))


@pytest.mark.long
@pytest.mark.parametrize("name", ["broken_components:GroupedAttention", *(f"mixers/{name}" for name in MIXERS)])
def test_mixers_conform_in_exhaustive_scope(name: str) -> None:
    (component,) = find_components(name)
    require_ok(dataclasses.replace(component, scope=Scope.EXHAUSTIVE))


@pytest.mark.long
@pytest.mark.parametrize("name", [*CORRECT, *(f"mixers/broken_components:{name}" for name in UNUSUAL)])
def test_correct_variants_of_mistakes_conform(name: str) -> None:
    (component,) = find_components(name)
    require_ok(component)


@pytest.mark.parametrize(
    ("name", "check"),
    [*((name, "shapes") for name in UNUSUAL), pytest.param("Stateless", "cache", marks=pytest.mark.slow)],
)
def test_unusual_mixers_conform(name: str, check: str) -> None:
    (component,) = find_components(f"mixers/broken_components:{name}", {"n_layers": 1})
    require_ok(component, (check,))


@pytest.mark.slow
def test_exact_chunked_recurrence_is_not_found_to_round() -> None:
    (component,) = find_components("mixers/broken_components:ChunkedRecurrence", {"n_layers": 1})
    require_ok(component, ("precision",))


@parametrize_components(select_components(tuple(kind for kind in REGISTRIES if kind not in MODEL_KINDS), Scope.QUICK))
def test_other_components_conform(component: Component) -> None:
    require_ok(component)


@pytest.mark.long
def test_eight_devices_give_what_one_gives() -> None:
    code = """
import sys
from rich.console import Console
from rustgpt_jax.conformance.checks import check_components
check_components(sys.argv[1:], Console(width=200), only=["devices"])
"""
    shown = run_python(code, *(kind for kind in MODEL_KINDS if kind != "families"), "gpt2", "gemma2", "qwen3_moe")
    assert " 0 failed" in shown


# Names of components, and fields of the small model.


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("attention", "mixers/attention"),
        ("mixers/attention", "mixers/attention"),
        ("positions/none", "positions/none"),
        ("broken_components:Attention", "mixers/broken_components:Attention"),
        ("broken_components:FeedForward", "feedforwards/broken_components:FeedForward"),
        ("broken_components:NormOfBatch", "norms/broken_components:NormOfBatch"),
        ("broken_components:positions_of_row", "positions/broken_components:positions_of_row"),
        ("optimizers/broken_components:ascends", "optimizers/broken_components:ascends"),
        ("llama3", UserError("more than one registry; use rope_scalings/llama3 or families/llama3")),
        ("linear", UserError("schedules/linear")),
        ("broken_components:ascends", UserError("a mixer is a Flax module with __call__")),
        ("broken_components:Upwards", UserError("has no 'Upwards'")),
        ("atention", UserError("Did you mean 'attention'")),
        ("mixers/atention", UserError("Did you mean 'attention'")),
        ("nowhere/parts.py:Part", UserError("nowhere/parts.py does not exist")),
        ("v1.0/parts.py:Opt", UserError(r"v1\.0/parts\.py cannot be imported, because 'v1\.0' contains a dot")),
        ("optimizers/lab/parts.v2.py:Opt", UserError("cannot be imported, because 'parts.v2' contains a dot")),
        ("code/parts.py:Opt", UserError("another module is called code.parts")),
        ("../x:Y", UserError("'../x:Y' is no")),
        ("mixers/../x:Y", UserError("'../x:Y' is no")),
        (":Y", UserError("':Y' is no")),
        ("families/broken_components:MISTAKES", UserError("families/broken_components:MISTAKES is not a mapping")),
    ],
)
def test_name_selects_component_or_is_refused(
    name: str, expected: str | UserError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in ("v1.0/parts.py", "lab/parts.v2.py", "code/parts.py"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("Opt = None\n")
    if isinstance(expected, UserError):
        with pytest.raises(UserError, match=str(expected)):
            find_components(name)
    else:
        assert [component.title for component in find_components(name)] == [expected]


def test_registry_stands_for_all_its_components() -> None:
    assert [component.name for component in find_components("mixers")] == list(MIXERS)
    assert len(find_components()) == sum(len(registry) for registry in REGISTRIES.values())
    with pytest.raises(UserError, match="a mixer is a Flax module with __call__"):
        infer_kind(len, "len")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("attention", {"n_layer": 1}, "Did you mean config.model.n_layers"),
        ("attention", {"n_head": 2}, "Did you mean config.model.attention.n_heads"),
        (
            "attention",
            {"attention.qk_norm": "heads"},
            "config.model.attention.qk_norm: unknown 'heads'.*Did you mean 'head'",
        ),
        ("attention", {"attention.n_heads": 5}, "n_heads=5 is not divisible by config.model.attention.n_kv_heads=2"),
        (
            "attention",
            {"attention.n_heads": 5, "attention.head_dim": None, "attention.n_kv_heads": None},
            "d_model=32 is not divisible",
        ),
        ("attention", {"n_layers": 1.5}, "config.model.n_layers must be a whole number, got 1.5"),
        ("attention", {"n_layers": 0}, "config.model.n_layers must be at least 1"),
        ("attention", {"bias": 1}, "config.model.bias must be True or False"),
        ("attention", {"rope.fraction": 2.0}, "config.model.rope.fraction must be at most 1"),
        ("attention", {"rope.fraction": 0.4}, "rotates pairs of channels"),
        ("attention", {"positions": ()}, "config.model.positions is empty"),
        ("attention", {"positions": ("rope", "ropes")}, "config.model.positions: unknown 'ropes'.*'rope'"),
        ("attention", {"norm": "rmsnom"}, "config.model.norm: unknown 'rmsnom'.*Did you mean 'rmsnorm'"),
        ("attention", {"mixers": "rg_lru"}, r"mixers=\('rg_lru',\) does not use mixers/attention"),
        ("attention", {"vocab_size": None}, "config.model.vocab_size must be at least 145 here, got None"),
        ("attention", {"context_length": 4}, "config.model.context_length must be at least 12 here, got 4"),
        ("latent_attention", {"attention.qk_norm": "head"}, "qk_norm='head' cannot"),
        ("moe", {"moe.n_experts": 1}, "experts_per_token=2 is more than"),
    ],
)
def test_fields_of_small_model_are_validated(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_components(name, changes)


def test_fields_of_small_model_are_set() -> None:
    changes = {"mixers": ["attention", "rg_lru"], "positions": "none", "attention.n_heads": 6.0}
    (component,) = find_components("attention", changes)
    model = component.small_model
    assert (model.mixers, model.positions, model.attention.n_heads) == (("attention", "rg_lru"), ("none",), 6)


@pytest.mark.parametrize("error", ["ValueError('inside')", "TypeError('inside')"])
def test_error_inside_a_users_module_keeps_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    name = f"mistaken_{error[:5]}"
    (tmp_path / f"{name}.py").write_text(f"raise {error}\n")
    with pytest.raises((ValueError, TypeError), match="inside") as raised:
        find_components(f"{name}:Part")
    assert not isinstance(raised.value, UserError)


@pytest.mark.parametrize("is_absolute", [False, True])
def test_file_is_imported_as_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_absolute: bool) -> None:
    name = f"lab{is_absolute:d}"
    (tmp_path / name).mkdir()
    file = tmp_path / name / f"norms{is_absolute:d}.py"
    file.write_text("from rustgpt_jax.model.layers import RMSNorm\nclass Own(RMSNorm):\n    pass\n")
    monkeypatch.chdir(tmp_path / name if is_absolute else tmp_path)
    path = str(file) if is_absolute else f"{name}/norms0.py"
    (component,) = find_components(f"{path}:Own")
    assert component.title == ("norms/norms1:Own" if is_absolute else "norms/lab0.norms0:Own")
    assert component.small_model.norm == component.name


# Analysis of roundings, packed rows, assertions and FLOPs.

X_T = jax.ShapeDtypeStruct((8,), jnp.bfloat16)


def sum_by_scan(x_T: jax.Array, dtype: Any) -> Any:
    return jax.lax.scan(lambda state, x: ((state + x.astype(dtype)), state), jnp.zeros((), dtype), x_T)


def sum_by_while(x_T: jax.Array, count: Any) -> Any:
    return jax.lax.fori_loop(0, count, lambda t, state: state + x_T[t], jnp.zeros((), x_T.dtype))


def shift(x_T: jax.Array) -> Any:
    return jax.lax.scan(lambda last, x: (x, last.astype(jnp.float32) * 2), jnp.zeros((), x_T.dtype), x_T)


def write_slots(x_T: jax.Array) -> Any:
    return jax.lax.scan(lambda ring, x: (ring.at[0].set(x), x), jnp.zeros_like(x_T), x_T)


@pytest.mark.parametrize(
    ("function", "more", "is_found"),
    [
        (functools.partial(sum_by_scan, dtype=jnp.float32), (), False),
        (functools.partial(sum_by_scan, dtype=jnp.bfloat16), (), True),
        (sum_by_while, (jax.ShapeDtypeStruct((), jnp.int32),), True),
        (shift, (), False),
        (write_slots, (), False),
    ],
)
def test_rounded_state_is_distinguished_from_moved_values(function: Any, more: Any, is_found: bool) -> None:
    jaxpr = jax.make_jaxpr(function)(X_T, *more).jaxpr
    analysis = rounding.RoundingAnalysis()
    analysis.follow(jaxpr, [rounding.Rounding(is_exact=True, kind=rounding.DATA) for _ in jaxpr.invars])
    assert bool(analysis.found) == is_found, analysis.found


def test_exhaustive_cases_cover_both_sides_of_each_power_of_two() -> None:
    cases = packed_sequences.CASES[Scope.EXHAUSTIVE]
    for border in (16, 32, 64, 128, 256):
        near = [case for case in cases if abs(case.length - border) <= 1]
        assert {case.length for case in near} == {border - 1, border, border + 1}
        assert {(case.dtype, case.is_training) for case in near} == set(packed_sequences.DTYPES_AND_MODES)
    assert {case.batch for case in cases} >= {1, 2, 3, 17, 33}
    assert set(packed_sequences.QUICK) <= set(cases)


@pytest.mark.parametrize("length", [1, 2, 17, 40, 521])
def test_documents_follow_one_another_in_packed_rows(length: int) -> None:
    counts = set()
    for row in range(len(packed_sequences.DOCUMENTS)):
        positions_T, segments_T = packed_sequences.document_layout(length, row)
        documents = [np.flatnonzero(segments_T == number) for number in range(1, segments_T.max() + 1)]
        for places in documents:
            assert np.array_equal(places, np.arange(places[0], places[-1] + 1))
            assert np.array_equal(positions_T[places], np.arange(len(places)))
        n_tokens = sum(len(places) for places in documents)
        assert not segments_T[n_tokens:].any() and not positions_T[n_tokens:].any()
        counts.add(len(documents))
    assert length < 40 or counts >= {1, 2, 3, 4, 5}


def test_assertions_locate_differences() -> None:
    expected = np.arange(6.0).reshape(2, 3)
    found = expected.copy()
    found[1, 2] += 1e-3
    scale = np.sqrt((expected**2).mean())
    assert assert_close(found, expected, 1e-3, "x", ("row",)) == pytest.approx(1e-3 / scale)
    with pytest.raises(CheckFailure, match=r"x; at row 1, index \[2\]: 5.001 and 5, a difference of 0.00033"):
        assert_close(found, expected, 1e-4, "x", ("row",))
    with pytest.raises(CheckFailure, match="row 1, token 2"):
        assert_same_bits(found, expected, "x", ("row", "token"))
    assert_same_bits(found, expected, "x", ("row", "token"), where=np.array([True, False]))
    assert assert_close(found, expected, 1e-4, "x", (), where=np.array([True, False])) == 0
    found[0, 1] = np.nan
    for compare in (lambda: assert_close(found, expected, 1e9, "x", ()), lambda: assert_finite(found, "x", ())):
        with pytest.raises(CheckFailure, match=r"index \[0, 1\]: nan"):
            compare()


def test_flops_count_a_loop_by_its_length_or_once() -> None:
    def function(a: jax.Array, b: jax.Array) -> jax.Array:
        a = jax.lax.scan(lambda x, _: (jax.lax.scan(lambda x, _: (x @ b, None), x, length=3)[0], None), a, length=5)[0]
        return jax.jit(lambda x: x @ b)(a) @ b

    jaxpr = jax.make_jaxpr(function)(np.ones((3, 4), np.float32), np.ones((4, 4), np.float32)).jaxpr
    assert flops.matmul_flops(jaxpr) == (15 + 2) * 2 * 3 * 4 * 4
    assert flops.matmul_flops(jaxpr, loops_once=True) == (1 + 2) * 2 * 3 * 4 * 4


EQUATIONS, PRODUCT_FLOPS = flops.equations, flops._equation_flops


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("equations", lambda *arguments: ((each, 1) for each, _ in EQUATIONS(*arguments)), "layers in a loop"),
        ("equations", lambda *arguments: ((each, times**2) for each, times in EQUATIONS(*arguments)), "in a loop"),
        ("_equation_flops", lambda equation: PRODUCT_FLOPS(equation) / 2, r"reported, .* counted, -5\d%"),
    ],
    ids=["loops_once", "loops_too_often", "multiplications_only"],
)
def test_wrong_counts_of_flops_are_found(monkeypatch: pytest.MonkeyPatch, name: str, wrong: Any, message: str) -> None:
    flops.forward_flops_per_token.cache_clear()
    monkeypatch.setattr(flops, name, wrong)
    outcome = run_check("flops", find_components("mixers/attention")[0])
    flops.forward_flops_per_token.cache_clear()
    assert not outcome.is_ok and re.search(message, outcome.note), outcome.note


# The command.


def test_command_shows_and_returns_failures() -> None:
    console = Console(file=io.StringIO(), width=300)
    names = ["samplers/top_k", "samplers/broken_components:restores_tokens"]
    assert all(outcome.is_ok for outcome in check_components(names[:1], console))
    assert [outcome.is_ok for outcome in check_components(names, console, ["sampler_distribution"])] == [True, False]
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "an excluded token comes back; at row 0, token" in shown
    assert "Usual cause: -inf minus -inf" in shown
    assert "samplers/top_k" in shown and "1 checks passed, 1 failed" in shown


@pytest.mark.parametrize(("is_exhaustive", "scope"), [(False, Scope.QUICK), (True, Scope.EXHAUSTIVE)])
def test_command_passes_the_scope_to_checks(monkeypatch: pytest.MonkeyPatch, is_exhaustive: bool, scope: Scope) -> None:
    scopes: list[Scope] = []
    recorder = dataclasses.replace(CHECKS["causality"], function=lambda component: scopes.append(component.scope) or "")
    monkeypatch.setitem(CHECKS, "causality", recorder)
    console = Console(file=io.StringIO())
    assert check_components(["mixers/attention"], console, ["causality"], is_exhaustive=is_exhaustive)[0].is_ok
    assert scopes == [scope]


def test_flag_exhaustive_reaches_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    from rustgpt_jax.cli.explain import run_check
    from rustgpt_jax.cli.main import parse_args
    from rustgpt_jax.conformance import checks

    calls: list[Any] = []
    monkeypatch.setattr(checks, "check_components", lambda *arguments: calls.append(arguments) or [])
    for more in [], ["--exhaustive"]:
        run_check(parse_args(["launch.py", "check", "attention", *more]))
    assert [(names, *more) for names, _, *more in calls] == [
        (["attention"], [], {}, False),
        (["attention"], [], {}, True),
    ]


def test_command_refuses_unknown_and_inapplicable_checks() -> None:
    with pytest.raises(UserError, match="Did you mean 'causality'"):
        check_components(["attention"], Console(file=io.StringIO()), ["causalty"])
    with pytest.raises(UserError, match="does not apply to adamw"):
        check_components(["adamw"], Console(file=io.StringIO()), ["causality"])


def test_exception_of_a_component_is_one_line_with_its_location() -> None:
    (component,) = find_components("schedules/broken_components:converts_warmup")
    outcome = run_check("schedule_traced", component)
    assert "\n" not in outcome.note
    location = r"ConcretizationTypeError: .*; at broken_components.py, line \d+, in converts_warmup"
    assert re.search(location, outcome.note)


# The plugin.

PLUGIN = ("-p", "no:rustgpt_jax", "-p", "rustgpt_jax.conformance.pytest_plugin")


def test_plugin_makes_a_test_of_every_check(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.conforms("optimizers/sgd", "optimizers/broken_components:ascends")
        def test_parts(conformance_check):
            conformance_check()
        """
    )
    result = pytester.runpytest_inprocess(*PLUGIN, "-p", "no:xdist", "-v", "--strict-markers")
    result.assert_outcomes(passed=5, failed=1)
    result.stdout.re_match_lines_random(
        [r".*\[sgd-optimizer_traced\] PASSED.*", r".*ascends-optimizer_descent\] FAILED.*"]
    )
    result.stdout.fnmatch_lines(["a quadratic does not decrease; at step 200*"])


def test_plugin_needs_its_marker(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_part(conformance_check): conformance_check()")
    result = pytester.runpytest_inprocess(*PLUGIN, "-p", "no:xdist")
    assert result.ret != 0
    result.stdout.fnmatch_lines(["*test_part needs @pytest.mark.conforms*"])


def test_plugin_imports_jax_only_for_tests_that_use_it(tmp_path: Path) -> None:
    file = tmp_path / "test_nothing.py"
    file.write_text("def test_nothing(): pass\n")
    code = "import pytest, sys; pytest.main(sys.argv[1:]); print('jax' in sys.modules)"
    shown = run_python(code, *PLUGIN, "-p", "no:xdist", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", str(file))
    assert shown.endswith("False\n"), shown
