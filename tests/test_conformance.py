"""The checks: each finds the mistake that it is there to find, and what is registered makes none."""

import dataclasses
import functools
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from broken_mixers import MISTAKES_OF_LONG_ROWS
from broken_parts import MISTAKES, Mistake
from rich.console import Console

from rustgpt_jax.conformance import long_row_checks, rounding_checks
from rustgpt_jax.conformance.checks import CHECKS, checks_for
from rustgpt_jax.conformance.fixtures import (
    Broken,
    require_close,
    require_finite,
    require_same_bits,
)
from rustgpt_jax.conformance.runner import check_components, run_check
from rustgpt_jax.conformance.targets import KNOBS, MODEL_KINDS, TABLES, Scope, Subject, component_kind, subjects
from rustgpt_jax.errors import UserError
from rustgpt_jax.model import flops
from rustgpt_jax.model.mixers import MIXERS

ROOT = Path(__file__).parent.parent
# Outside a process that has eight devices, it starts one.
IN_A_CHILD = "devices"
# What combinations of parts, each of which is checked by itself, could still break.
OF_A_WHOLE = ("isolation", "cache", "parameters")
# What compiles much, `pytest -m long` asks of the parts that do not stand in SHORT.
LONG_CHECKS = (
    *("finite", "gradients", "vmap", "remat", "initial_scale", "layers", "flops"),
    *("causality", "isolation", "rows", "prefill", "heads", "dropout", "drift"),
)
SHORT = {
    "mixers/attention": tuple(name for name in LONG_CHECKS if name not in ("rows", "heads")),
    "mixers/deltanet": ("causality", "isolation"),
}
# Of these, the checks that plain pytest makes in the small scope: of a part that mixes tokens, and of any other.
SMALL_CHECKS = ("causality", "isolation", "gradients", "rows", "prefill")
SMALL_CHECKS_OF_OTHERS = ("causality", "isolation", "gradients")
# What is read in a traced program.
QUICK_TO_FIND = ("precision", "shapes")
# One of each kind that only some rows, batches, types or modes show.
OF_EACH_KIND = (
    *("SeesTheNextChunk", "SeesTheFutureInTraining", "SeesTheFutureInBfloat16", "SeesTheFutureFartherOut"),
    *("ThirdDocumentSeesTheSecond", "FirstDocumentApart", "LargeBatchesApart", "OneRowApart", "WrongSlopeOfLongRows"),
    *("PhaseInBfloat16", "LastOfALongPromptLost", "PositionsTo2047", "FirstHeadForAll", "DropsInEvaluation"),
)
# Leaks of the future, between documents, and of the size of the batch.
FOUND_IN_SMALL_SCOPE = ("SeesTheNextChunk", "ThirdDocumentSeesTheSecond", "LargeBatchesApart")
ALL_MISTAKES = (*MISTAKES, *MISTAKES_OF_LONG_ROWS)
HONEST = (
    "mixers/broken_parts:HonestAttention",
    "broken_parts:HonestState",
    "broken_parts:HonestFeedForward",
    "broken_mixers:Grouped",
)
# Correct mixers of an unusual build, and the checks that have most to do with it.
UNUSUAL = {
    "SubclassedAttention": ("shapes",),
    "SowsItsEntropy": ("shapes",),
    "Stateless": ("shapes", "cache"),
    "ChunkedState": ("shapes", "precision"),
}

pytest_plugins = ["pytester"]


# Mistakes are found.


def of_mistake(mistake: Mistake) -> Any:
    """The first mistake for each check, one of each kind, and with `pytest -m long` the others."""
    marks = [pytest.mark.slow] if mistake.is_slow else []
    is_first = mistake is next(other for other in ALL_MISTAKES if other.check == mistake.check)
    name = mistake.part.rpartition(":")[2]
    if not (is_first or mistake.check in QUICK_TO_FIND or name in OF_EACH_KIND):
        marks.append(pytest.mark.long)
    return pytest.param(mistake, id=f"{name}-{mistake.check}", marks=marks)


@pytest.mark.parametrize("mistake", [of_mistake(mistake) for mistake in ALL_MISTAKES])
def test_a_mistake_is_found_by_the_check_for_it(mistake: Mistake) -> None:
    # One layer is compiled in half the time of a loop over layers.
    (subject,) = subjects(mistake.part, {"n_layers": 1})
    outcome = run_check(mistake.check, CHECKS[mistake.check], subject)
    assert not outcome.is_ok, outcome.note
    assert re.search(mistake.message, outcome.note), outcome.note


@pytest.mark.parametrize("name", FOUND_IN_SMALL_SCOPE)
def test_the_small_scope_finds_mistakes_of_several_kinds(name: str) -> None:
    (mistake,) = (mistake for mistake in ALL_MISTAKES if mistake.part.endswith(f":{name}"))
    (subject,) = subjects(mistake.part, {"n_layers": 1})
    outcome = run_check(mistake.check, CHECKS[mistake.check], dataclasses.replace(subject, scope=Scope.SMALL))
    assert not outcome.is_ok, outcome.note


def test_every_check_has_a_mistake_to_find() -> None:
    assert {mistake.check for mistake in ALL_MISTAKES} == set(CHECKS) - {"tokenizer_same", "launcher_interface"}


# What is registered makes none.


def over_parts(names: tuple[str, ...], only: tuple[str, ...] = ()) -> Any:
    """The checks of each part, those of one small model once: a test of the quick ones, and one of the others.

    Checks of one part share their compiled programs, and so they are one test.
    """
    cases: dict[Any, tuple[Subject, str]] = {}
    for name in names:
        # Where the layers are what is checked, and where they keep caches, there are two of them; else one will do.
        for subject, alone in zip(subjects(name), subjects(name, {"n_layers": 1}), strict=True):
            for check_name in checks_for(subject, only):
                one = subject if check_name == "layers" or subject.kind in ("mixers", "families") else alone
                if check_name != IN_A_CHILD:
                    cases.setdefault((check_name, one.model or one.title), (one, check_name))
    groups: dict[tuple[str, bool], list[tuple[Subject, str]]] = {}
    for subject, check_name in cases.values():
        is_long = check_name in LONG_CHECKS and check_name not in SHORT.get(subject.title, ())
        groups.setdefault((subject.title, is_long), []).append((subject, check_name))
    return pytest.mark.parametrize(
        "part_checks",
        [
            pytest.param(group, id=title + "-long" * is_long, marks=[pytest.mark.long] if is_long else [])
            for (title, is_long), group in groups.items()
        ],
    )


def require_ok(part_checks: list[tuple[Subject, str]]) -> None:
    # Programs of other parts are used no more, and a process can map only so many into its memory.
    jax.clear_caches()
    outcomes = [run_check(name, CHECKS[name], subject) for subject, name in part_checks]
    broken = [f"{outcome.check}: {outcome.note}" for outcome in outcomes if not outcome.is_ok]
    assert not broken, "\n".join(broken)


@pytest.mark.slow
@over_parts(tuple(kind for kind in MODEL_KINDS if kind != "families"))
def test_parts_of_the_model_conform(part_checks: list[tuple[Subject, str]]) -> None:
    require_ok(part_checks)


def in_small_scope() -> list[Any]:
    """Parts of the model, those of one small model once, with their checks in the small scope."""
    cases: dict[Any, Any] = {}
    for kind in KNOBS:
        for subject in subjects(kind, {"n_layers": 1}):
            is_mixed = kind in ("mixers", "positions") or subject.name == "moe"
            names = SMALL_CHECKS if is_mixed else SMALL_CHECKS_OF_OTHERS
            names = tuple(name for name in names if name not in SHORT.get(subject.title, ()))
            small = dataclasses.replace(subject, scope=Scope.SMALL)
            cases.setdefault(subject.model, pytest.param([(small, name) for name in names], id=subject.title))
    return list(cases.values())


@pytest.mark.parametrize("part_checks", in_small_scope())
def test_parts_of_the_model_conform_in_the_small_scope(part_checks: list[tuple[Subject, str]]) -> None:
    require_ok(part_checks)


def test_a_family_conforms_in_the_small_scope() -> None:
    (subject,) = subjects("families/gpt2", {"n_layers": 1})
    small = dataclasses.replace(subject, scope=Scope.SMALL)
    require_ok([(small, name) for name in ("causality", "isolation")])


def test_a_bias_of_keys_without_positions_is_no_unused_parameter() -> None:
    # It moves all scores of a query alike: its gradient is 0 but for rounding, and in some channels 0 exactly.
    (subject,) = subjects("positions/none", {"n_layers": 1, "attention.n_kv_heads": 4})
    require_ok([(subject, "parameters")])


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", ["my own", *MIXERS])
def test_mixers_conform_exhaustively(name: str) -> None:
    (subject,) = subjects("broken_mixers:Grouped" if name == "my own" else f"mixers/{name}")
    exhaustive = dataclasses.replace(subject, scope=Scope.EXHAUSTIVE)
    require_ok([(exhaustive, check_name) for check_name in checks_for(subject) if check_name != IN_A_CHILD])


@pytest.mark.slow
@pytest.mark.long
@over_parts(("families",), OF_A_WHOLE)
def test_families_conform(part_checks: list[tuple[Subject, str]]) -> None:
    require_ok(part_checks)


@pytest.mark.slow
@pytest.mark.long
@over_parts(HONEST)
def test_the_parts_that_mistakes_are_made_in_conform(part_checks: list[tuple[Subject, str]]) -> None:
    require_ok(part_checks)


@pytest.mark.parametrize("name", UNUSUAL)
def test_correct_mixers_of_unusual_build_pass(name: str) -> None:
    (subject,) = subjects(f"mixers/broken_parts:{name}", {"n_layers": 1})
    require_ok([(subject, check_name) for check_name in UNUSUAL[name]])


@pytest.mark.slow
@pytest.mark.long
@over_parts(tuple(f"mixers/broken_parts:{name}" for name in UNUSUAL))
def test_correct_mixers_of_unusual_build_pass_every_check(part_checks: list[tuple[Subject, str]]) -> None:
    require_ok(part_checks)


@over_parts(tuple(kind for kind in TABLES if kind not in MODEL_KINDS))
def test_other_parts_conform(part_checks: list[tuple[Subject, str]]) -> None:
    require_ok(part_checks)


def run_python(code: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.long
def test_eight_devices_give_what_one_gives() -> None:
    code = """
import sys
from rich.console import Console
from rustgpt_jax.conformance.runner import check_components
sys.exit(check_components(sys.argv[1:], Console(width=200), only=["devices"]))
"""
    shown = run_python(code, *(kind for kind in MODEL_KINDS if kind != "families"), "gpt2", "gemma2", "qwen3_moe")
    assert " 0 failed" in shown


# What a name means.


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("attention", "mixers/attention"),
        ("mixers/attention", "mixers/attention"),
        ("llama3", None),
        ("positions/none", "positions/none"),
        ("broken_parts:HonestAttention", "mixers/broken_parts:HonestAttention"),
        ("broken_parts:HonestFeedForward", "feedforwards/broken_parts:HonestFeedForward"),
        ("broken_parts:NormOfTheBatch", "norms/broken_parts:NormOfTheBatch"),
        ("broken_parts:positions_of_the_row", "positions/broken_parts:positions_of_the_row"),
        ("optimizers/broken_parts:uphill", "optimizers/broken_parts:uphill"),
        ("broken_parts:uphill", None),
        ("broken_parts:Upwards", None),
        ("atention", None),
        ("mixers/atention", None),
        ("nowhere/parts.py:Part", None),
    ],
)
def test_a_name_is_a_part_or_is_refused(name: str, title: str | None) -> None:
    if title is None:
        with pytest.raises(UserError):
            subjects(name)
    else:
        assert [subject.title for subject in subjects(name)] == [title]


def test_a_name_of_two_tables_and_a_wrong_one_are_answered() -> None:
    with pytest.raises(UserError, match="schedules/linear"):
        subjects("linear")
    with pytest.raises(UserError, match="Did you mean 'attention'"):
        subjects("atention")
    with pytest.raises(UserError, match="a mixer is a Flax module with __call__"):
        component_kind(len, "len")
    with pytest.raises(UserError, match="no knob 'n_layer'.*'n_layers'"):
        subjects("attention", {"n_layer": 1})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention.qk_norm": "heads"}, "config.model.attention.qk_norm: unknown 'heads'.*Did you mean 'head'"),
        ({"attention.n_heads": 5}, "n_heads=5 is not divisible by config.model.attention.n_kv_heads=2"),
        (
            {"attention.n_heads": 5, "attention.head_dim": None, "attention.n_kv_heads": None},
            "d_model=32 is not divisible",
        ),
        ({"n_layers": 1.5}, "config.model.n_layers takes a whole number, not 1.5"),
        ({"n_layers": 0}, "config.model.n_layers must be at least 1"),
        ({"bias": 1}, "config.model.bias takes True or False"),
        ({"rope.fraction": 2.0}, "config.model.rope.fraction must be at most 1"),
        ({"rope.fraction": 0.4}, "rotates pairs of channels"),
        ({"positions": ()}, "config.model.positions is empty"),
        ({"positions": ("rope", "ropes")}, "config.model.positions: unknown 'ropes'.*Did you mean 'rope'"),
        ({"norm": "rmsnom"}, "config.model.norm: unknown 'rmsnom'.*Did you mean 'rmsnorm'"),
        ({"mixers": "rg_lru"}, r"mixers=\('rg_lru',\) does not have mixers/attention"),
        ({"vocab_size": None}, "config.model.vocab_size must be at least 145 here, not None"),
        ({"context_length": 4}, "config.model.context_length must be at least 12 here, not 4"),
    ],
)
def test_a_knob_of_the_small_model_is_held_against_its_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        subjects("mixers/attention", changes)


def test_knobs_of_the_small_model_that_go_together_are_taken() -> None:
    (subject,) = subjects(
        "attention", {"mixers": ["attention", "rg_lru"], "positions": "none", "attention.n_heads": 6.0}
    )
    model = subject.small_model
    assert (model.mixers, model.positions, model.attention.n_heads) == (("attention", "rg_lru"), ("none",), 6)
    with pytest.raises(UserError, match="qk_norm='head' cannot be used with latent_attention"):
        subjects("latent_attention", {"attention.qk_norm": "head"})
    with pytest.raises(UserError, match="experts_per_token=2 is more than"):
        subjects("moe", {"moe.n_experts": 1})
    with pytest.raises(UserError, match="Did you mean config.model.attention.n_heads"):
        subjects("attention", {"n_head": 2})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v1.0/parts.py:Opt", r"v1\.0/parts\.py is no import path, for 'v1\.0' has a dot"),
        ("optimizers/lab/parts.v2.py:Opt", "is no import path, for 'parts.v2' has a dot"),
        ("code/parts.py:Opt", "another module is called code.parts"),
        ("../x:Y", "'../x:Y' is no import path"),
        ("mixers/../x:Y", "'../x:Y' is no import path"),
        (":Y", "':Y' is no import path"),
        ("families/broken_parts:MISTAKES", "families/broken_parts:MISTAKES is no mapping"),
    ],
)
def test_what_cannot_be_imported_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in ("v1.0/parts.py", "lab/parts.v2.py", "code/parts.py"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("Opt = None\n")
    with pytest.raises(UserError, match=message):
        subjects(name)


@pytest.mark.parametrize("mistake", ["ValueError('inside')", "TypeError('inside')"])
def test_a_mistake_inside_a_module_keeps_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    name = f"mistaken_{mistake[:5]}"
    (tmp_path / f"{name}.py").write_text(f"raise {mistake}\n")
    with pytest.raises((ValueError, TypeError), match="inside") as raised:
        subjects(f"{name}:Part")
    assert not isinstance(raised.value, UserError)


def test_a_table_is_all_its_parts_and_nothing_is_everything() -> None:
    assert [subject.name for subject in subjects("mixers")] == list(TABLES["mixers"])
    assert len(subjects()) == sum(len(table) for table in TABLES.values())


@pytest.mark.parametrize("is_absolute", [False, True])
def test_a_file_is_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_absolute: bool) -> None:
    name = f"lab{is_absolute:d}"
    (tmp_path / name).mkdir()
    file = tmp_path / name / f"norms{is_absolute:d}.py"
    file.write_text("from rustgpt_jax.model.norms import RMSNorm\nclass Own(RMSNorm):\n    pass\n")
    monkeypatch.chdir(tmp_path / name if is_absolute else tmp_path)
    path = str(file) if is_absolute else f"{name}/norms0.py"
    (subject,) = subjects(f"{path}:Own")
    assert subject.title == ("norms/norms1:Own" if is_absolute else "norms/lab0.norms0:Own")
    assert subject.model is not None and subject.model.norm == subject.name


# Roundings in a traced program.

X_T = jax.ShapeDtypeStruct((8,), jnp.bfloat16)


def summed(x_T: jax.Array, dtype: Any) -> Any:
    return jax.lax.scan(lambda state, x: ((state + x.astype(dtype)), state), jnp.zeros((), dtype), x_T)


def summed_while(x_T: jax.Array, count: Any) -> Any:
    return jax.lax.fori_loop(0, count, lambda t, state: state + x_T[t], jnp.zeros((), x_T.dtype))


def shifted(x_T: jax.Array) -> Any:
    return jax.lax.scan(lambda last, x: (x, last.astype(jnp.float32) * 2), jnp.zeros((), x_T.dtype), x_T)


def written(x_T: jax.Array) -> Any:
    return jax.lax.scan(lambda ring, x: (ring.at[0].set(x), x), jnp.zeros_like(x_T), x_T)


@pytest.mark.parametrize(
    ("function", "more", "is_found"),
    [
        (functools.partial(summed, dtype=jnp.float32), (), False),
        (functools.partial(summed, dtype=jnp.bfloat16), (), True),
        (summed_while, (jax.ShapeDtypeStruct((), jnp.int32),), True),
        (shifted, (), False),
        (written, (), False),
    ],
)
def test_a_state_that_is_rounded_is_told_from_one_that_is_moved(function: Any, more: Any, is_found: bool) -> None:
    jaxpr = jax.make_jaxpr(function)(X_T, *more).jaxpr
    reading = rounding_checks.Reading()
    reading.follow(jaxpr, [rounding_checks.Traced(is_exact=True, kind=rounding_checks.DATA) for _ in jaxpr.invars])
    assert bool(reading.found) == is_found, reading.found


# Rows of many lengths.


@pytest.mark.parametrize("border", [16, 32, 64, 128, 256])
def test_exhaustive_checks_go_through_everything_beside_a_border(border: int) -> None:
    beside = [case for case in long_row_checks.EXHAUSTIVE if abs(case.length - border) <= 1]
    assert {case.length for case in beside} == {border - 1, border, border + 1}
    assert {(case.dtype, case.is_training) for case in beside} == set(long_row_checks.KINDS)
    assert {case.batch for case in long_row_checks.EXHAUSTIVE} >= {1, 2, 3, 17, 33}
    assert set(long_row_checks.QUICK) <= set(long_row_checks.EXHAUSTIVE)


@pytest.mark.parametrize("length", [1, 2, 17, 40, 521])
def test_rows_hold_documents_one_after_another(length: int) -> None:
    counts = set()
    for row in range(len(long_row_checks.DOCUMENTS)):
        positions_T, segments_T = long_row_checks.layout(length, row)
        documents = [np.flatnonzero(segments_T == number) for number in range(1, segments_T.max() + 1)]
        for places in documents:
            assert np.array_equal(places, np.arange(places[0], places[-1] + 1))
            assert np.array_equal(positions_T[places], np.arange(len(places)))
        n_tokens = sum(len(places) for places in documents)
        assert not segments_T[n_tokens:].any() and not positions_T[n_tokens:].any()
        counts.add(len(documents))
    assert length < 40 or counts >= {1, 2, 3, 4, 5}


# Comparisons.


def test_differences_are_found_where_they_are() -> None:
    expected = np.arange(6.0).reshape(2, 3)
    found = expected.copy()
    found[1, 2] += 1e-3
    size = np.sqrt((expected**2).mean())
    assert require_close(found, expected, 1e-3, "x", ("row",)) == pytest.approx(1e-3 / size)
    with pytest.raises(Broken, match=r"x; at row 1, index \[2\]: 5.001 and 5, a difference of 0.00033"):
        require_close(found, expected, 1e-4, "x", ("row",))
    with pytest.raises(Broken, match="row 1, token 2"):
        require_same_bits(found, expected, "x", ("row", "token"))
    require_same_bits(found, expected, "x", ("row", "token"), where=np.array([True, False]))
    assert require_close(found, expected, 1e-4, "x", (), where=np.array([True, False])) == 0
    found[0, 1] = np.nan
    for compare in (lambda: require_close(found, expected, 1e9, "x", ()), lambda: require_finite(found, "x", ())):
        with pytest.raises(Broken, match=r"index \[0, 1\]: nan"):
            compare()


# What is declared.


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
        ("_equation_flops", lambda equation: PRODUCT_FLOPS(equation) / 2, r"declared, .* counted, -5\d%"),
    ],
    ids=["loops_once", "loops_too_often", "multiplications_only"],
)
def test_flops_that_runs_would_report_wrong_are_found(
    monkeypatch: pytest.MonkeyPatch, name: str, wrong: Any, message: str
) -> None:
    flops.forward_flops_per_token.cache_clear()
    monkeypatch.setattr(flops, name, wrong)
    outcome = run_check("flops", CHECKS["flops"], subjects("mixers/attention")[0])
    flops.forward_flops_per_token.cache_clear()
    assert not outcome.is_ok and re.search(message, outcome.note), outcome.note


# What a user sees.


@pytest.mark.slow
@pytest.mark.long
def test_the_command_shows_what_broke_and_says_so_to_the_shell() -> None:
    console = Console(file=io.StringIO(), width=300)
    assert check_components(["samplers/top_k"], console) == 0
    assert (
        check_components(["samplers/top_k", "samplers/broken_parts:RevivesTokens"], console, ["sampler_distribution"])
        == 1
    )
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "a token comes back that was ruled out; at row 0, token" in shown
    assert "Usual cause: -inf minus -inf" in shown
    assert "samplers/top_k" in shown and "1 checks passed, 1 failed" in shown


@pytest.mark.parametrize(("is_exhaustive", "scope"), [(False, Scope.QUICK), (True, Scope.EXHAUSTIVE)])
def test_the_command_gives_its_checks_the_scope_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, is_exhaustive: bool, scope: Scope
) -> None:
    scopes: list[Scope] = []
    recorder = dataclasses.replace(CHECKS["causality"], function=lambda subject: scopes.append(subject.scope) or "")
    monkeypatch.setitem(CHECKS, "causality", recorder)
    assert (
        check_components(["mixers/attention"], Console(file=io.StringIO()), ["causality"], is_exhaustive=is_exhaustive)
        == 0
    )
    assert scopes == [scope]


def test_the_flag_exhaustive_reaches_the_checks() -> None:
    code = """
from rustgpt_jax.cli.explain import run_check
from rustgpt_jax.cli.main import parse_args
from rustgpt_jax.conformance import runner
runner.check_components = lambda *arguments: print(arguments[0], arguments[2:]) or 0
for more in [], ["--exhaustive"]:
    run_check(parse_args(["launch.py", "check", "attention", *more]))
"""
    assert run_python(code).splitlines() == ["['attention'] ([], {}, False)", "['attention'] ([], {}, True)"]


def test_the_command_refuses_what_means_nothing() -> None:
    with pytest.raises(UserError, match="Did you mean 'causality'"):
        check_components(["attention"], Console(file=io.StringIO()), ["causalty"])
    with pytest.raises(UserError, match="does not apply to adamw"):
        check_components(["adamw"], Console(file=io.StringIO()), ["causality"])


def test_an_exception_of_a_part_is_a_sentence_that_says_where() -> None:
    (subject,) = subjects("schedules/broken_parts:counts_in_python")
    outcome = run_check("schedule_numbers", CHECKS["schedule_numbers"], subject)
    assert "\n" not in outcome.note
    assert re.search(r"ConcretizationTypeError: .*; at broken_parts.py, line \d+, in counts_in_python", outcome.note)


# The plugin.

PLUGIN = ("-p", "no:rustgpt_jax", "-p", "rustgpt_jax.conformance.pytest_plugin")


def test_the_plugin_makes_a_test_of_every_check(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.conforms("optimizers/sgd", "optimizers/broken_parts:uphill")
        def test_parts(conformance_check):
            conformance_check()
        """
    )
    result = pytester.runpytest_inprocess(*PLUGIN, "-p", "no:xdist", "-v", "--strict-markers")
    result.assert_outcomes(passed=5, failed=1)
    result.stdout.re_match_lines_random(
        [r".*\[sgd-optimizer_numbers\] PASSED.*", r".*uphill-optimizer_descent\] FAILED.*"]
    )
    result.stdout.fnmatch_lines(["a quadratic does not get smaller; at step 200*"])


def test_the_plugin_says_what_a_test_lacks(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_part(conformance_check): conformance_check()")
    result = pytester.runpytest_inprocess(*PLUGIN, "-p", "no:xdist")
    assert result.ret != 0
    result.stdout.fnmatch_lines(["*test_part needs @pytest.mark.conforms*"])


def test_the_plugin_starts_no_jax_for_tests_that_do_not_ask(tmp_path: Path) -> None:
    file = tmp_path / "test_nothing.py"
    file.write_text("def test_nothing(): pass\n")
    code = "import pytest, sys; pytest.main(sys.argv[1:]); print('jax' in sys.modules)"
    shown = run_python(code, *PLUGIN, "-p", "no:xdist", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", str(file))
    assert shown.endswith("False\n"), shown
