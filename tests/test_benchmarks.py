"""The benchmark against other frameworks: turns, workers, goals, the page, and a run with tiny models."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_runs import new_console

from experiments.benchmarks.best_batch import Failure, format_command
from experiments.benchmarks.performance import page
from experiments.benchmarks.performance.bench import FULL, TINY, Bench, about, describe_processor
from experiments.benchmarks.performance.goals import goals, ratio
from experiments.benchmarks.performance.models import SHAPES, TRAINING, WEIGHTS, decoding_config, training_config
from experiments.benchmarks.performance.startup import job, parts, run_rustgpt
from experiments.benchmarks.performance.turns import Reading, rotate, summarize, take_turns, times_as_fast
from experiments.benchmarks.performance.workers import MALLOC, Request, Worker, start_workers
from rustgpt_jax.config.validation import resolve
from rustgpt_jax.errors import UserError
from rustgpt_jax.model.flops import parameter_shapes, total_size

ROOT = Path(__file__).parent.parent


# Turns.


@given(
    count=st.integers(1, 5),
    rounds=st.integers(1, 6),
    warm_up=st.integers(0, 3),
    broken=st.sets(st.tuples(st.integers(0, 4), st.integers(0, 8)), max_size=2),
)
def test_contenders_take_turns(count: int, rounds: int, warm_up: int, broken: set[tuple[int, int]]) -> None:
    """All have equally many turns, each round starts with another one, and a failure does not affect the others."""
    order: list[str] = []

    def contender(index: int) -> Callable[[], Reading]:
        def turn() -> Reading:
            order.append(str(index))
            done = order.count(str(index))
            if (index, done) in broken:
                raise Failure("it broke")
            return {"seconds": float(done)}

        return turn

    names = [str(index) for index in range(count)]
    readings, failures = take_turns({name: contender(int(name)) for name in names}, rounds, warm_up, pause=0)
    fails = {str(index) for index, turn in broken if index < count and 1 <= turn <= warm_up + rounds}
    assert set(failures) == fails and set(readings) == set(names) - fails
    for rows in readings.values():
        assert [row["seconds"] for row in rows] == list(range(warm_up + 1, warm_up + rounds + 1))
    if not fails:
        firsts = [order[turn * count] for turn in range(warm_up + rounds)]
        assert max(map(firsts.count, names)) - min(map(firsts.count, names)) <= 1


@given(st.lists(st.integers(), max_size=6), st.integers(0, 20))
def test_each_contender_has_one_turn_per_round(names: list[int], turn: int) -> None:
    assert sorted(rotate([str(name) for name in names], turn)) == sorted(map(str, names))


@given(
    pairs=st.lists(st.tuples(st.floats(1e-3, 10), st.floats(1e-3, 10)), min_size=1, max_size=9),
    noise=st.lists(st.floats(0.1, 10), min_size=9, max_size=9),
)
def test_ratios_cancel_noise_shared_by_a_round(pairs: list[tuple[float, float]], noise: list[float]) -> None:
    ours, theirs = (list(column) for column in zip(*pairs, strict=True))
    quiet = times_as_fast(ours, theirs)
    slowed = [[each * by for each, by in zip(column, noise, strict=False)] for column in (ours, theirs)]
    np.testing.assert_allclose(times_as_fast(*slowed), quiet, rtol=1e-9, atol=1e-12)
    assert quiet.median == pytest.approx(1 / times_as_fast(theirs, ours).median) or len(pairs) % 2 == 0


def test_times_are_summarized_by_median_and_spread() -> None:
    assert summarize([5.0, 1.0, 2.0, 3.0, 4.0]) == (3.0, pytest.approx(2 / 3))
    assert summarize([0.0, 0.0]) == (0.0, 0.0)


# Workers.


@pytest.mark.oracle
def test_worker_measures_once_per_turn(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    with Worker(Request("torch_peer", "peaks", {"size": 8}), 60, tmp_path / "log.txt") as worker:
        assert worker.about == {}
        assert [set(worker.turn()) for _ in range(2)] == [{"float32", "bfloat16"}] * 2
    assert worker._process.returncode == 0


@pytest.mark.slow
def test_failed_workers_report_their_reason(tmp_path: Path) -> None:
    log = tmp_path / "out" / "log.txt"
    requests = {
        "unknown": Request("torch_peer", "cook"),
        "no module": Request("baker", "cook"),
        "absent": Request("llama_cpp_peer", "decoding", {"folder": ""}),
    }
    with start_workers(requests, 60, log) as (workers, absent):
        assert not workers
    assert absent["unknown"] == "KeyError: 'cook'" and "Traceback" in log.read_text()
    assert "status 1: " in absent["no module"] and "No module named" in absent["no module"]
    assert absent["absent"].startswith(("llama_cpp is not installed", "TypeError"))
    with pytest.raises(Failure, match="more than 0 seconds"):
        Worker(Request("torch_peer", "peaks", {"size": 8}), 0.01, log)


def test_allocator_settings_are_those_of_glibc() -> None:
    assert set(MALLOC) == {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_"}
    assert all(int(value) > 2**20 for value in MALLOC.values())


# What is measured.


@pytest.mark.oracle
@pytest.mark.parametrize("shape", SHAPES)
def test_torch_model_has_as_many_parameters(shape: str) -> None:
    torch = pytest.importorskip("torch")
    from experiments.benchmarks.gpt2_torch import gpt2

    model = training_config(shape, {}).model
    with torch.device("meta"):
        layers = gpt2(model)
    assert sum(parameter.numel() for parameter in layers.parameters()) == total_size(parameter_shapes(model))


def test_every_variant_has_a_valid_config() -> None:
    assert {*FULL.shapes, *TINY.shapes} == set(SHAPES)
    for knobs in TRAINING.values():
        training_config("smoke", knobs)
    for weights in WEIGHTS:
        decoding_config("smoke", weights, "plain")


def test_rustgpt_job_has_its_sizes() -> None:
    config = resolve(job((2500, 5300)))
    # An output projection in attention, biases of its four projections, a norm at the end; and none on the logits.
    own = 3 * (128 * 128 + 4 * 128) + 2 * 128 - 533
    assert total_size(parameter_shapes(config.model)) == 493_973 + own
    assert config.training.batch_size == 1


def test_startup_times_are_found_in_the_output() -> None:
    assert parts("runs/a: 3 parameters\n1.9s before the first step: imports 0.9s\nstep 10") == (
        "1.9s before the first step: imports 0.9s"
    )
    assert parts("step 1/40  loss 2") is None


# Goals, and the page.


def race(what: str, **columns: list[float]) -> dict[str, Any]:
    names = {name: name.replace("_of_", ", ").replace("llama_cpp", "llama.cpp") for name in columns}
    about_each = {names[name]: {"first_call": 1.0} for name in columns}
    absent = {"torch.compile, float32": "no compiler | at all"}
    readings = {names[name]: {what: column, "prompt": column} for name, column in columns.items()}
    return {"readings": readings, "about": about_each, "absent": absent, "date": "2026-01-01"}


def recorded() -> dict[str, Any]:
    """Return results in which everything was measured."""
    cost = {"parameters": 1e6, "flops": 1e9, "of the program": 1e9, "of XLA": 1.1e9}
    ours = {"rustgpt_jax_of_float32": [1.0, 2.0, 3.0], "rustgpt_jax_of_bfloat16 factors": [0.5, 1.0, 1.5]}
    training = race("seconds", **ours, torch_of_float32=[0.9, 1.8, 2.7])
    decoding = race(
        "token",
        **{"rustgpt_jax_of_plain": [2.0, 4.0], "rustgpt_jax_of_native": [1.0, 2.0]},
        **{"llama_cpp": [0.5, 1.0], "transformers": [3.0, 6.0]},
    )
    steady = race("p50", plain=[1.0])
    column = {"p50": [1.0], "p99": [1.4], "compiled": [0.0], "grown": [2e6], "steps": [1000.0]}
    steady["readings"] = {"float32, plain": column}
    start = {"first step": 1.0, "all": 9.0, "parts": None}
    return {
        "training": {
            "about": about(),
            "peaks": {"float32": 2e11, "bfloat16": 4e11, "bytes": 3e10},
            "costs": {"shk": cost},
            "races": {"shk, float32": training},
            "whole": {"readings": {"whole": [1.05, 2.1], "bare": [1.0, 2.0]}, "absent": {}},
        },
        "decoding": {
            "about": about(),
            "peaks": {"float32": 2e11, "bytes": 3e10},
            "prompt": 128,
            "parameters": 1e8,
            "races": {f"{dtype}, batch {batch}": decoding for dtype in WEIGHTS for batch in (1, 8)},
            "steadiness": {"float32, plain": steady},
        },
        "startup": {
            "about": about(),
            "starts": [start | {"first step": 9.0}, start, start | {"parts": "1.0s before the first step"}],
            "jobs": [start, start, start],
            "rustgpt": [18.0, 18.0, 18.0],
            "job's bare steps": race("seconds", job=[1e-3, 1e-3]),
            "updates": 7800,
        },
        "sweeps": {
            "about": about(),
            "models": {
                "tiny": {
                    "bare": 0.5,
                    "rows": [["one sweep, exact, cold cache", 8.0], ["16 train processes, cold cache", 80.0]],
                    "more": {"exact": 0.4},
                    "processes": 2,
                }
            },
        },
    }


def test_goals_compare_the_fastest_variants() -> None:
    found = {goal.what: goal for goal in goals(recorded())}
    shk = found["training step, shk, against torch float32"]
    assert shk.measured == pytest.approx(1.8) and shk.spread == pytest.approx(0) and shk.verdict == "reached"
    assert shk.who == "rustgpt_jax, bfloat16 factors / torch, float32"
    assert found["training step, mid, against torch float32"].verdict == "not measured"
    added = found["what a run adds to its bare steps"]
    assert added.measured == pytest.approx(0.05)
    plain = found["decoding, batch 1, float32, plain, against llama.cpp"]
    assert plain.measured == pytest.approx(0.25) and plain.verdict == "missed"
    assert found["decoding, batch 1, int8, against llama.cpp"].measured == pytest.approx(0.5)
    assert found["decoding, batch 8, bfloat16, against transformers"].measured == pytest.approx(3.0)
    assert found["prompt of 128 tokens, batch 1, float32, against transformers"].measured == pytest.approx(3.0)
    assert found["decoding steps, p99 over p50"].measured == pytest.approx(1.4)
    assert found["decoding steps, growth of memory"].verdict == "missed"
    assert found["RustGPT's job, compute alone, of its program's time"].measured == pytest.approx(7.8 / 18)
    whole = found["RustGPT's job, all included, warm cache, of its program's time"]
    assert whole.measured == pytest.approx(0.5) and whole.verdict == "reached"
    assert found["train on shk, until the first step, warm cache"].measured == 1.0
    assert found["one more trial of a sweep of tiny, in bare steps"].measured == pytest.approx(0.8)
    assert found["16 cold trials of tiny in one sweep, against as many processes"].measured == 10
    assert {goal.verdict for goal in goals({})} == {"not measured"}
    assert ratio(None, "rustgpt_jax", "torch", "seconds") is None


def marked(*parts: str) -> str:
    return "Words.\n" + "".join(
        f"<!-- begin: {part} -->\nearlier {part}\n<!-- end: {part} -->\nmore\n" for part in parts
    )


def test_sections_without_measurements_keep_their_text(tmp_path: Path) -> None:
    file, results = tmp_path / "page.md", recorded()
    file.write_text(marked("goals", *page.PARTS))
    page.draw({"A": {"decoding": results["decoding"]}}, file)
    text = file.read_text()
    assert "earlier decoding" not in text and "earlier goals" not in text
    assert all(f"earlier {part}" in text for part in ("training", "startup", "sweeps"))
    assert text.startswith("Words.\n<!-- begin: goals -->") and text.endswith("more\n")
    page.draw({"A": results, "B": {"training": results["training"]}}, file)
    whole = file.read_text()
    assert "earlier" not in whole and r"no compiler \| at all" in whole
    row = (
        "| training step, shk, against torch float32 | at least 1.60x | 1.80x (0.0%), reached | 1.80x (0.0%), reached |"
    )
    assert row in whole and whole.count("### A: ") == 4 and whole.count("### B: ") == 1
    assert (
        "| shk | torch float32 | rustgpt_jax, float32 | 2000 (50.0%) | 384 | 0.2% | 0.90x | 1.0 | 2026-01-01 |" in whole
    )
    page.draw({"A": results, "B": {"training": results["training"]}}, file)
    assert file.read_text() == whole


def test_rows_of_a_table_have_the_same_columns() -> None:
    results = recorded()
    for rows in [
        page.goals_table({"A": results}),
        *(t for p in page.PARTS for t in page.sheets(p, results[p]).values()),
    ]:
        assert {tuple(row) for row in rows} == {tuple(rows[0])}


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"model name": "AMD EPYC", "vendor_id": "AuthenticAMD", "cpu family": "25", "model": "17"}, "Zen 4"),
        ({"model name": "AMD EPYC", "vendor_id": "AuthenticAMD", "cpu family": "26", "model": "2"}, "Zen 5"),
        ({"model name": "Intel", "vendor_id": "GenuineIntel", "cpu family": "6", "model": "143"}, "Sapphire Rapids"),
        ({"model name": "Other", "vendor_id": "Other", "cpu family": "6", "model": "1"}, "family 6, model 1"),
    ],
)
def test_processors_are_told_apart(fields: dict[str, str], name: str) -> None:
    assert describe_processor(fields) == f"{fields['model name']} ({name})"


def test_rustgpt_runs_where_its_data_is(tmp_path: Path) -> None:
    program = tmp_path / "target" / "release" / "llm"
    for folder in (tmp_path / "data", program.parent):
        folder.mkdir(parents=True)
    program.write_text("#!/bin/sh\ntest -d data && read line && test $line = exit\n")
    program.chmod(0o755)
    bench = Bench(TINY, None, tmp_path, 10.0, new_console())
    assert 0 < run_rustgpt(program, bench) < 10
    program.write_text("#!/bin/sh\necho broken >&2; exit 1\n")
    with pytest.raises(Failure, match="broken"):
        run_rustgpt(program, bench)


@pytest.mark.parametrize("text", ["", marked("goals", "goals"), "<!-- end: goals --><!-- begin: goals -->"])
def test_page_without_markers_is_an_error(text: str) -> None:
    with pytest.raises(UserError, match="begin: goals"):
        page.replace_part(text, "goals", "")


def test_performance_page_has_its_markers() -> None:
    text = page.PAGE.read_text()
    for part in ("goals", *page.PARTS):
        page.replace_part(text, part, "")


# All of it.


def command(out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    settings = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "OMP_NUM_THREADS": "1"}
    file = ROOT / "experiments" / "benchmarks" / "run.py"
    return subprocess.run(
        [sys.executable, file, f"--out={out}", *words],
        cwd=out.parent,
        env=os.environ | settings,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "part",
    [
        pytest.param("decoding", marks=pytest.mark.long),
        pytest.param("training", marks=pytest.mark.long),
        pytest.param("startup", marks=pytest.mark.long),
    ],
)
def test_benchmark_runs_with_tiny_models(part: str, tmp_path: Path) -> None:
    out, before = tmp_path / "out", page.PAGE.read_bytes()
    done = command(out, part, "--smoke")
    assert done.returncode == 0, done.stdout + done.stderr
    assert page.PAGE.read_bytes() == before
    found, text = json.loads((out / "performance.json").read_text()), (out / "performance.md").read_text()
    (found,) = found.values()
    assert list(found) == [part]
    assert "Goals" in done.stdout and f"**{next(iter(page.sheets(part, found[part])))}**" in text
    for race in found[part].get("races", {}).values():
        ours = [name for name in race["readings"] if name.startswith("rustgpt_jax")]
        assert ours and all(min(column) > 0 for name in ours for column in race["readings"][name].values())
    if part == "startup":
        assert [0 < row["first step"] < row["all"] for row in found[part]["starts"]] == [True, True]


@pytest.mark.parametrize(
    ("words", "message"),
    [(("trainig",), "Did you mean 'training'"), (("training",), "--text"), (("decoding", "--shapes=big"), "'big'")],
)
def test_mistakes_are_errors_of_one_sentence(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    done = command(tmp_path / "out", *words)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_recorded_commands_have_no_local_paths() -> None:
    words = ["/home/me/run.py", "training", "--text=/home/me/text.txt", "--out=/home/me/out", "--rustgpt=/home/me/llm"]
    assert format_command(words) == "python experiments/benchmarks/run.py training --text=text.txt --rustgpt=llm"
    assert "--text=text.txt --rounds=3" in format_command(["run.py", "--text=text.txt", "--rounds=3"])
    assert not re.search(r"(/home|/root|/tmp|/work)/", page.RESULTS.read_text() + page.PAGE.read_text())
