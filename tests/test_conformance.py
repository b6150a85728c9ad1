"""The checks: each finds the mistake that it is there to find, and what is registered makes none."""

import dataclasses
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from broken_parts import MISTAKES, Mistake
from rich.console import Console

from rustgpt_jax.config import ModelConfig
from rustgpt_jax.conformance.broken import Broken, require_close, require_finite, require_same_bits
from rustgpt_jax.conformance.checks import CHECKS, checks_for
from rustgpt_jax.conformance.command import check
from rustgpt_jax.conformance.jaxprs import equations, product_flops
from rustgpt_jax.conformance.report import run_check
from rustgpt_jax.conformance.small import SMALL
from rustgpt_jax.conformance.subjects import MODEL_KINDS, TABLES, Subject, kind_of, subjects
from rustgpt_jax.errors import UserError
from rustgpt_jax.model.cost import matrix_product_flops

ROOT = Path(__file__).parent.parent
# Outside a process that has eight devices, it starts one.
IN_A_CHILD = "devices"
# What combinations of parts, each of which is checked by itself, could still break.
OF_A_WHOLE = ("isolation", "cache", "parameters")
HONEST = ("mixers/broken_parts:HonestAttention", "broken_parts:HonestState", "broken_parts:HonestFeedForward")

pytest_plugins = ["pytester"]


# Mistakes are found.


def of_mistake(mistake: Mistake) -> Any:
    marks = [pytest.mark.slow] if mistake.is_slow else []
    return pytest.param(mistake, id=f"{mistake.part.rpartition(':')[2]}-{mistake.check}", marks=marks)


@pytest.mark.parametrize("mistake", [of_mistake(mistake) for mistake in MISTAKES])
def test_a_mistake_is_found_by_the_check_for_it(mistake: Mistake) -> None:
    # One layer is compiled in half the time of a loop over layers.
    (subject,) = subjects(mistake.part, {"n_layers": 1})
    outcome = run_check(mistake.check, CHECKS[mistake.check], subject)
    assert not outcome.is_ok, outcome.note
    assert re.search(mistake.message, outcome.note), outcome.note


def test_every_check_has_a_mistake_to_find() -> None:
    assert {mistake.check for mistake in MISTAKES} == set(CHECKS) - {"tokenizer_same", "launcher_interface"}


# What is registered makes none.


def over_parts(names: tuple[str, ...], only: tuple[str, ...] = ()) -> Any:
    """Each check of each part, those of one small model once."""
    cases: dict[Any, tuple[Subject, str]] = {}
    for name in names:
        # Where the layers are what is checked, and where they keep caches, there are two of them; else one will do.
        for subject, alone in zip(subjects(name), subjects(name, {"n_layers": 1}), strict=True):
            for check_name in checks_for(subject, only):
                one = subject if check_name == "layers" or subject.kind in ("mixers", "families") else alone
                if check_name != IN_A_CHILD:
                    cases.setdefault((check_name, one.model or one.title), (one, check_name))
    return pytest.mark.parametrize(
        ("subject", "name"),
        [pytest.param(*case, id=f"{case[0].title}-{case[1]}") for case in cases.values()],
    )


def require_ok(subject: Subject, name: str) -> None:
    outcome = run_check(name, CHECKS[name], subject)
    assert outcome.is_ok, outcome.note


@pytest.mark.slow
@over_parts(tuple(kind for kind in MODEL_KINDS if kind != "families"))
def test_parts_of_the_model_conform(subject: Subject, name: str) -> None:
    require_ok(subject, name)


@pytest.mark.slow
@over_parts(("families",), OF_A_WHOLE)
def test_families_conform(subject: Subject, name: str) -> None:
    require_ok(subject, name)


@pytest.mark.slow
@over_parts(HONEST)
def test_the_parts_that_mistakes_are_made_in_conform(subject: Subject, name: str) -> None:
    require_ok(subject, name)


@over_parts(tuple(kind for kind in TABLES if kind not in MODEL_KINDS))
def test_other_parts_conform(subject: Subject, name: str) -> None:
    require_ok(subject, name)


def run_python(code: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_eight_devices_give_what_one_gives() -> None:
    code = """
import sys
from rich.console import Console
from rustgpt_jax.conformance.command import check
sys.exit(check(sys.argv[1:], Console(width=200), only=["devices"]))
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
    with pytest.raises(UserError, match="a mixer has init_cache"):
        kind_of(len, "len")
    with pytest.raises(UserError, match="no knob 'n_layer'.*'n_layers'"):
        subjects("attention", {"n_layer": 1})


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


def test_the_small_model_says_every_knob() -> None:
    assert set(SMALL) == {field.name for field in dataclasses.fields(ModelConfig)}


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


def test_flops_of_a_program_without_loops_are_those_that_are_declared() -> None:
    def function(a: jax.Array, b: jax.Array) -> jax.Array:
        return jax.jit(lambda x: x @ b)(a) @ b

    jaxpr = jax.make_jaxpr(function)(np.ones((3, 4), np.float32), np.ones((4, 4), np.float32)).jaxpr
    assert sum(map(product_flops, equations(jaxpr))) == matrix_product_flops(jaxpr) == 2 * 2 * 3 * 4 * 4


# What a user sees.


def test_the_command_shows_what_broke_and_says_so_to_the_shell() -> None:
    console = Console(file=io.StringIO(), width=300)
    assert check(["samplers/top_k"], console) == 0
    assert check(["samplers/top_k", "samplers/broken_parts:RevivesTokens"], console, ["sampler_distribution"]) == 1
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "a token comes back that was ruled out; at row 0, token" in shown
    assert "Usual cause: -inf minus -inf" in shown
    assert "samplers/top_k" in shown and "1 checks passed, 1 failed" in shown


def test_the_command_refuses_what_means_nothing() -> None:
    with pytest.raises(UserError, match="Did you mean 'causality'"):
        check(["attention"], Console(file=io.StringIO()), ["causalty"])
    with pytest.raises(UserError, match="no check for adamw"):
        check(["adamw"], Console(file=io.StringIO()), ["causality"])


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
