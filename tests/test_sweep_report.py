"""The report of a sweep: its terminal output, figures, and HTML page."""

import argparse
import io
import itertools
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from rich.console import Console
from scipy import stats
from small_runs import check_result
from synthetic_sweep import INITIAL_LOSS, RATES, grid, loss_of, status_of, trial_id, two_optimizers, write_sweep

from rustgpt_jax.cli.train import run_report
from rustgpt_jax.errors import UserError
from rustgpt_jax.sweeps.report import describe_sweep, report
from rustgpt_jax.sweeps.report.analysis import compute_sensitivities, describe_comparison, rank_settings
from rustgpt_jax.sweeps.report.figures import downsample
from rustgpt_jax.sweeps.report.plot_style import TRIAL_PREFIX, KnobColors, make_css, make_scale, set_loss_axis
from rustgpt_jax.sweeps.report.results import format_rerun_command, format_value, get_knob_names, read_results
from rustgpt_jax.sweeps.report.stats import compare_with_best

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs Chromium")


def write_report(folder: Path) -> tuple[str, str]:
    """Write a report; return its terminal output and its page."""
    console = Console(file=io.StringIO(), width=200)
    page = report(folder, console).read_text(encoding="utf-8")
    check_result("report", describe_sweep(folder))
    return console.file.getvalue(), page  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def optimizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sweep of two optimizers, with its report."""
    folder = write_sweep(tmp_path_factory.mktemp("sweeps") / "two-optimizers", two_optimizers())
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def page(optimizers: Path) -> str:
    """The page of the sweep of two optimizers."""
    return (optimizers / "report.html").read_text(encoding="utf-8")


# Ranking, comparisons and terminal output.


def test_settings_are_ranked_by_mean_loss_with_diverged_ones_last(tmp_path: Path) -> None:
    def loss(trial: dict[str, Any]) -> float:
        return -trial["optimizer.learning_rate"] - 0.05 * (trial["optimizer.name"] == "adamw")

    ranked = rank_settings(read_results(write_sweep(tmp_path / "sweep", two_optimizers(), loss=loss)))
    assert [row.setting.n_diverged for row in ranked] == [0] * 11 + [2]
    assert ranked[-1].interval.mean == min(row.interval.mean for row in ranked) == pytest.approx(-0.15)
    means = [row.interval.mean for row in ranked[:-1]]
    assert means == sorted(means)
    assert ranked[0].setting.knobs == {"optimizer.name": "muon", "optimizer.learning_rate": 0.1}


def test_comparisons_are_paired_and_account_for_selecting_the_best(optimizers: Path) -> None:
    ranked = rank_settings(read_results(optimizers))
    expected = compare_with_best([row.setting.losses for row in ranked], n_candidates=11)
    assert [row.comparison for row in ranked[1:]] == expected
    # The trial that failed leaves two seeds; those that diverged leave one.
    assert [row.comparison.n_pairs if row.comparison else None for row in ranked[1:]].count(2) == 1
    assert ranked[-1].setting.n_diverged == 2 and ranked[-1].comparison is None


def test_claims_agree_with_their_intervals(optimizers: Path) -> None:
    text, page = write_report(optimizers)
    for shown in (text, page):
        found = re.findall(
            r"(better than|No significant difference)[^(]*\(95% CI (-?[\d.]+) to (-?[\d.]+), p [=&lt;]+ ([\d.]+)",
            shown,
        )
        assert {claim for claim, *_ in found} == {"better than", "No significant difference"}
        for claim, low, high, p_value in found:
            assert (claim == "better than") == (float(p_value) < 0.05) == (float(low) > 0) and float(high) > 0


def test_terminal_output_shows_the_best_settings_and_comparisons(optimizers: Path) -> None:
    text, _ = write_report(optimizers)
    first = text.splitlines()[2].split()
    assert text.splitlines()[0].strip() == "two-optimizers: validation loss, nats per token, best settings first"
    assert first[:2] == ["muon", "0.01"]
    losses = [
        loss_of({**rank_settings(read_results(optimizers))[0].setting.overrides, "seed": seed}) for seed in range(3)
    ]
    low, high = stats.t.interval(0.95, 2, np.mean(losses), stats.sem(losses))
    assert first[2:] == [f"{np.mean(losses):.4f}", f"{low:.4f}", "to", f"{high:.4f}", "3"]
    assert "Optimizer muon, learning rate 0.01 is better than optimizer adamw, learning rate 0.003 by 0.0848" in text
    assert (
        "No significant difference between optimizer muon, learning rate 0.01 and the same with learning rate 0.003: "
        "0.0388" in text
    )
    assert "33 finished, 2 diverged, 1 failed" in text
    assert "OSError: [Errno 28] No space left on device" in text


def test_no_p_value_for_a_single_seed(tmp_path: Path) -> None:
    text, page = write_report(write_sweep(tmp_path / "sweep", grid(optimizer__learning_rate=RATES[:3])))
    assert "Learning rate 0.003 and learning rate 0.001 differ by" in text
    assert "no p-value: one seed" in text and "no p-value: one seed" in page


@pytest.mark.parametrize("config", ["qk_norm", "experiments/qk_norm.py"])
def test_heading_is_the_question_of_the_experiment(config: str, tmp_path: Path) -> None:
    trials = grid(optimizer__learning_rate=RATES[:2])
    _, page = write_report(write_sweep(tmp_path / "sweep", trials, config_file=config))
    assert "<h1>Does QK-norm widen the range of good learning rates?</h1>" in page


def test_better_than_is_claimed_only_for_significant_differences(tmp_path: Path) -> None:
    def noisy(overrides: dict[str, Any]) -> float:
        return 2.0 + 0.01 * (overrides["model.bias"]) + 0.1 * overrides["seed"] * (1 if overrides["model.bias"] else -1)

    def clear(overrides: dict[str, Any]) -> float:
        return 2.0 + 0.1 * overrides["model.bias"] + 0.001 * overrides["seed"] ** 2 * overrides["model.bias"]

    for loss, start in (
        (noisy, "No significant difference between"),
        (clear, "Bias False is better than bias True by"),
    ):
        folder = write_sweep(tmp_path / loss.__name__, grid(model__bias=(False, True), seed=range(4)), loss=loss)
        best, other = rank_settings(read_results(folder))
        assert describe_comparison(best, other).startswith(start)


@pytest.mark.parametrize(("best", "edge"), [(RATES[0], "smallest"), (RATES[2], None), (RATES[-1], "largest")])
def test_best_value_at_the_end_of_a_range_is_noted(best: float, edge: str | None, tmp_path: Path) -> None:
    def loss(trial: dict[str, Any]) -> float:
        return 2 + abs(math.log(trial["optimizer.learning_rate"] / best))

    trials = grid(optimizer__learning_rate=RATES)
    _, page = write_report(write_sweep(tmp_path / "sweep", trials, status=lambda _: "finished", loss=loss))
    found = re.findall(r"The best learning rate, ([\d.]+), is the (\w+) one tried", page)
    assert found == ([(format_value(best), edge)] if edge else [])


def test_report_without_finished_trials_has_a_status_and_a_document(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "sweep", two_optimizers(), status=lambda _: "running")
    with pytest.raises(UserError, match=r"no finished trial yet \(36 running\)"):
        write_report(folder)
    assert (folder / "results.csv").read_text().count("running") == 36
    assert not (folder / "report.html").exists()
    # A program may ask for the results while the trials are running.
    assert run_report(argparse.Namespace(run=folder)).status == 1
    found = describe_sweep(folder)
    check_result("report", found)
    assert (found["counts"], found["best"], found["files"]["report"]) == ({"running": 36}, None, None)


def test_report_does_not_import_jax() -> None:
    code = "import sys, rustgpt_jax.sweeps.report; print([name for name in ('jax', 'flax') if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "[]\n"


# Names and formats.


def test_knob_names_are_short_and_distinct() -> None:
    paths = ["optimizer.name", "schedule.name", "optimizer.learning_rate", "model.d_model", "training.steps", "seed"]
    names = ["optimizer", "schedule", "learning rate", "d_model", "training steps", "seed"]
    assert list(get_knob_names(paths).values()) == names
    staged = ["stages.a.optimizer.learning_rate", "stages.b.optimizer.learning_rate"]
    assert list(get_knob_names(staged).values()) == ["a optimizer learning rate", "b optimizer learning rate"]


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_values_are_formatted_with_four_digits(value: float) -> None:
    assert float(format_value(value)) == float(f"{value:.4g}")


def test_rerun_command_reproduces_the_config(tmp_path: Path) -> None:
    from rustgpt_jax.config.validation import parse_overrides

    prompts = "--config.logging.sample_prompts='Hi, you' --config.logging.sample_prompts='[INST] hi [/INST]'"
    launched = f"python launch.py sweep --config=configs/tiny.py --config.seed 5 {prompts} --config.seed=6 --mode=lanes"
    results = read_results(write_sweep(tmp_path / "sweep", grid(seed=(0,)), command=launched))
    overrides = {
        "model.mixers": ["a", "b"],
        "optimizer.learning_rate": 1e-5 / 3,
        "model.bias": True,
        "data.seq_len": None,
        "data.paths": ["a,b.txt", "c.txt"],
    }
    command = format_rerun_command(results, overrides)
    words = [word for word in shlex.split(command) if word.startswith("--config.")]
    given_flags = [tuple(word.removeprefix("--config.").split("=", 1)) for word in words]
    assert "--config=configs/tiny.py" in command
    expected = {
        **overrides,
        "seed": 6,
        "logging.sample_prompts": ("Hi, you", "[INST] hi [/INST]"),
        "model.mixers": ("a", "b"),
        "data.paths": ("a,b.txt", "c.txt"),
    }
    assert parse_overrides(given_flags) == expected


# Scales and curves.


@pytest.mark.parametrize(
    ("values", "is_log"),
    [
        (RATES, True),
        ((64, 128, 256), True),
        ((0.0, 0.01, 0.1), True),
        ((1, 2, 3), False),
        ((0.9, 0.95, 0.99), False),
        ((0.0, 0.1, 0.2, 0.3), False),
        (tuple(np.random.default_rng(0).uniform(0.01, 1, 99)), False),
        (tuple(10 ** np.random.default_rng(0).uniform(-4, -1, 99)), True),
    ],
)
def test_values_spaced_by_ratio_get_a_log_scale(values: tuple[float, ...], is_log: bool) -> None:
    assert (make_scale(values).kind in ("log", "symlog")) == is_log


@given(
    losses=st.lists(st.floats(-10, 10), min_size=2, max_size=60),
    most=st.integers(2, 20),
)
def test_downsampled_curves_keep_their_ends_and_range(losses: list[float], most: int) -> None:
    curve = tuple(enumerate(losses))
    thin = downsample(curve, most)
    assert len(thin) <= most + 1
    assert (thin[0], thin[-1][0]) == (curve[0], curve[-1][0])
    assert min(losses) - 1e-9 <= min(loss for _, loss in thin) and max(loss for _, loss in thin) <= max(losses) + 1e-9


# The page.


def attributes(page: str, name: str) -> list[str]:
    """Return the values of an attribute in page order."""
    return re.findall(rf'\b{name}="([^"]*)"', page)


def test_ids_are_unique_and_references_resolve(page: str) -> None:
    ids = attributes(page, "id")
    referred = re.findall(r'(?:url\(|href=")#([^")]+)', page)
    assert len(ids) == len(set(ids)) and referred
    assert set(referred) <= set(ids)


def test_page_is_self_contained(page: str) -> None:
    assert not re.search(
        r"https?:|//\w|@import|<link(?! rel=icon href=data:,)|<img|\bsrc=", page.replace("// Each thin", "")
    )
    assert not re.search(r"url\((?!#)", page)


def test_every_trial_is_in_every_figure_that_shows_trials(page: str) -> None:
    figures = re.findall(r"(?s)<figure.*?</figure>", page)
    table = re.findall(r"(?s)<table.*?</table>", page)[0]
    every = {trial_id(overrides) for overrides in two_optimizers()}
    ended = {trial_id(overrides) for overrides in two_optimizers() if status_of(overrides) != "failed"}
    assert set(attributes(table, "data-trial")) == every
    assert set(json.loads(re.findall(r'id="trials">(.*?)</script>', page)[0])) == every
    shown = [set(attributes(figure, "data-trial")) for figure in figures]
    assert [trials for trials in shown if trials] == [every, ended, ended]
    assert TRIAL_PREFIX not in page


def test_points_are_plotted_at_their_losses(page: str) -> None:
    figures = re.findall(r"(?s)<figure.*?</figure>", page)
    figure = next(figure for figure in figures if "Final loss by learning rate" in figure)
    points = re.findall(r'<g data-trial="(\w+)">(?:(?!</g>).)*?<use [^>]*x="([\d.]+)" y="([\d.]+)"', figure)
    assert {format_value(rate) for rate in RATES} <= set(re.findall(r"<text[^>]*>([^<]*)<", figure))
    at = {trial: (float(x), float(y)) for trial, x, y in points}
    finished = [overrides for overrides in two_optimizers() if status_of(overrides) == "finished"]
    places = np.array([at[trial_id(overrides)] for overrides in finished])
    values = [(math.log(overrides["optimizer.learning_rate"]), loss_of(overrides)) for overrides in finished]
    for place, value, direction in zip(places.T, np.array(values).T, (1, -1), strict=True):
        slope, start = np.polyfit(value, place, 1)
        assert np.sign(slope) == direction
        np.testing.assert_allclose(place, slope * value + start, atol=0.02)


def test_sensitivities_use_complete_seeds_and_the_initial_loss_for_diverged_trials(optimizers: Path) -> None:
    expected = {}
    for name, seeds in (("adamw", (0, 1, 2)), ("muon", (0, 1))):
        knobs = [
            {"optimizer.name": name, "optimizer.learning_rate": rate, "seed": seed} for seed in seeds for rate in RATES
        ]
        losses = [loss_of(trial) if status_of(trial) == "finished" else INITIAL_LOSS for trial in knobs]
        above = [np.array(part) - min(part) for part in np.split(np.array(losses), len(seeds))]
        # The weight of a rate is half the logarithmic distance between its neighbors.
        widths = np.gradient(np.log(RATES))
        expected[name] = [float(part @ widths / widths.sum()) for part in above]
    found = {row.knobs["optimizer.name"]: row for row in compute_sensitivities(read_results(optimizers))}
    assert list(found) == ["muon", "adamw"]
    for name, values in expected.items():
        assert found[name].by_seed == pytest.approx(values)
        assert found[name].interval.mean == pytest.approx(np.mean(values))


def test_figures_are_numbered_and_have_no_placeholder_colors(page: str) -> None:
    assert re.findall(r"Figure (\d+)\.", page) == [str(number) for number in range(1, 7)]
    assert not re.search(r"#fe[0-9a-f]{2}01", page)
    used = set(re.findall(r"var\(--([\w-]+)\)", page))
    assert used <= set(re.findall(r"--([\w-]+):", page))


def sweep_of(**values: Any) -> Callable[[], list[dict[str, Any]]]:
    """Return a function that builds a grid."""
    return lambda: grid(**values)


@pytest.mark.parametrize(
    ("trials", "titles"),
    [
        (sweep_of(seed=(0,)), ["Loss curves"]),
        (sweep_of(optimizer__learning_rate=RATES), ["Loss curves", "Final loss by learning rate"]),
        (sweep_of(model__norm=("rmsnorm", "layernorm"), seed=(0, 1)), ["Loss curves"]),
        (
            sweep_of(
                optimizer__learning_rate=RATES[:2],
                optimizer__weight_decay=(0.0, 0.1),
                model__d_model=(64, 128),
                seed=(0, 1),
            ),
            [
                "Loss curves",
                "Final loss by learning rate",
                "Final loss by weight decay",
                "Final loss by d_model",
                "Importance of the knobs",
                "Interactions of two knobs",
                "Final loss by",
                "All knobs and the final loss",
            ],
        ),
    ],
    ids=["one trial", "one knob", "no number", "three knobs"],
)
def test_figures_depend_on_the_swept_knobs(
    trials: Callable[[], list[dict[str, Any]]], titles: list[str], tmp_path: Path
) -> None:
    _, page = write_report(write_sweep(tmp_path / "sweep", trials(), status=lambda _: "finished"))
    found = re.findall(r"<h3>(.*?)</h3>", page)
    assert sorted(re.sub(r" by .* and .*", " by", title) for title in found) == sorted(titles)


@pytest.mark.parametrize("losses", [(0.0, 0.0), (0.0, 20.0), (5e-324, 20.0), (2.2e-309, 2.2e-309), (1e-9, 1e308)])
def test_loss_axis_supports_any_finite_losses(losses: tuple[float, float]) -> None:
    axes = Figure().add_subplot()
    set_loss_axis(axes, losses)
    low, high = axes.get_ylim()
    assert low <= min(losses) and max(losses) <= high and low < high


KNOBS = {
    "optimizer.learning_rate": st.floats(1e-5, 1),
    "stages.pretrain.training.steps": st.sampled_from([10, 20, 40]),
    "tokenizer.vocab_size": st.sampled_from([None, 256]),
    "model.mixers": st.sampled_from([["attention"], ["attention", "other"]]),
    "model.bias": st.booleans(),
    "model.norm": st.sampled_from(["rmsnorm", "layernorm"]),
    "model.dropout": st.sampled_from([0.0, 0.1]),
    "seed": st.integers(0, 2),
}
STATUSES = ["finished", "diverged", "failed", "pruned", "stopped", "running", "planned"]


@hypothesis.settings(max_examples=5, suppress_health_check=[hypothesis.HealthCheck.too_slow])
@given(data=st.data(), paths=st.sets(st.sampled_from(sorted(KNOBS)), min_size=1))
def test_any_sweep_with_a_finished_trial_has_a_report(
    data: st.DataObject, paths: set[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    overrides = st.fixed_dictionaries({}, optional={path: KNOBS[path] for path in sorted(paths)})
    trials = data.draw(st.lists(overrides, min_size=1, max_size=20, unique_by=trial_id))
    ends = {trial_id(trial): data.draw(st.sampled_from(STATUSES)) for trial in trials} | {
        trial_id(trials[0]): "finished"
    }
    losses = {trial_id(trial): data.draw(st.floats(0, 20)) for trial in trials}
    folder = write_sweep(
        tmp_path_factory.mktemp("sweeps") / "sweep",
        trials,
        status=lambda trial: ends[trial_id(trial)],
        loss=lambda trial: losses[trial_id(trial)],
        eval_every=data.draw(st.sampled_from([20, 200, 201])),
    )
    _, page = write_report(folder)
    table = re.findall(r"(?s)<table.*?</table>", page)[0]
    assert set(attributes(table, "data-trial")) == set(ends)
    assert "nan" not in re.sub(r"(?s)<script.*?</script>", "", page)


def test_names_and_values_are_escaped(tmp_path: Path) -> None:
    malicious = '</script><script>alert(1)</script>$x_1$ & "quotes"'
    trials = grid(model__norm=("rmsnorm", malicious), optimizer__learning_rate=RATES[:3])
    _, page = write_report(write_sweep(tmp_path / "sweep", trials, name=malicious))
    assert page.count("<script") == 2 and "alert(1)</script>" not in page


def test_page_of_many_trials_is_small(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    trials = [
        {
            "optimizer.learning_rate": float(10 ** random.uniform(-4, -1)),
            "optimizer.weight_decay": float(10 ** random.uniform(-3, 0)),
            "optimizer.name": str(random.choice(["adamw", "muon", "lion"])),
            "model.dropout": float(random.uniform(0, 0.3)),
            "model.d_model": int(random.choice([64, 128, 256])),
        }
        for _ in range(100)
    ]
    _, page = write_report(write_sweep(tmp_path / "sweep", trials, status=lambda _: "finished"))
    assert len(page.encode()) < 600_000
    table = re.findall(r"(?s)<table.*?</table>", page)[0]
    assert set(attributes(table, "data-trial")) == {trial_id(overrides) for overrides in trials}


# Colors and clipping.


def to_lab(color: str) -> np.ndarray:
    """Convert a matplotlib color to CIELAB, where a distance of 2 is just visible."""
    from matplotlib.colors import to_rgb

    rgb = np.array(to_rgb(color))
    linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(to_xyz @ linear / [0.9505, 1.0, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize(
    "values", [(1e-3, 1.1e-3), (1e-4, 1e-3, 1.1e-3, 1e-1), (0.0, 1e-3, 1.0001e-3, 1e-2, 2e-2, 0.5, 0.9, 0.91)]
)
def test_close_values_have_distinguishable_colors(values: tuple[float, ...]) -> None:
    colors = [KnobColors("learning rate", make_scale(values)).css_variable(value) for value in values]
    for theme in re.findall(r":root\{(.*?)\}", make_css()):
        known = dict(re.findall(r"--([\w-]+):(#\w+);", theme))
        labs = [to_lab(known[color]) for color in colors]
        distances = [np.linalg.norm(a - b) for a, b in itertools.combinations(labs, 2)]
        assert min(distances) > 8


def test_data_beyond_an_axis_are_drawn_as_arrows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(trial: dict[str, Any]) -> float:
        spread = {1e-2: 5.0, 3e-3: 0.01}.get(trial["optimizer.learning_rate"], 0.01)
        return 2.0 + 3.0 * (trial["optimizer.learning_rate"] == 1e-2) + spread * trial["seed"] ** 2

    drawn = []
    monkeypatch.setattr("rustgpt_jax.sweeps.report.figures.draw_arrow", lambda *args: drawn.append(args[2]))
    trials = grid(optimizer__learning_rate=RATES[:4], seed=range(3))
    _, page = write_report(write_sweep(tmp_path / "sweep", trials, status=lambda _: "finished", loss=loss))
    assert set(drawn) == {"^", "v"}
    rows = re.findall(r"(?s)<tr class=.*?</tr>", page)
    assert len(rows) == 4
    assert [row.count("<circle") for row in rows] == [3, 3, 3, 0]
    # An arrow for each seed, and one at each end of the bar.
    assert [row.count('class="beyond"') for row in rows] == [0, 0, 0, 5]
    assert "each arrow a trial beyond the axis" in page


def test_parallel_coordinates_end_at_their_losses(tmp_path: Path) -> None:
    trials = grid(optimizer__learning_rate=RATES, model__bias=(False, True))
    losses = {trial_id(trial): 2.0 * 1.3**place for place, trial in enumerate(trials)}
    folder = write_sweep(
        tmp_path / "sweep", trials, status=lambda _: "finished", loss=lambda trial: losses[trial_id(trial)]
    )
    figure = re.findall(r"(?s)<figure.*?</figure>", write_report(folder)[1])[-1]
    width, height = map(float, re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', figure)[0])
    ends = {}
    for trial, path in re.findall(r'<g data-trial="(\w+)"><path d="([^"]*)"', figure):
        points = np.array(re.findall(r"-?[\d.]+", path), float).reshape(-1, 2)
        assert ((points >= 0) & (points <= [width, height])).all()
        ends[trial] = points[-1, 1]
    assert sorted(ends, key=lambda trial: -ends[trial]) == sorted(losses, key=lambda trial: losses[trial])


def test_shares_of_importance_sum_to_100_percent(tmp_path: Path) -> None:
    def loss(trial: dict[str, Any]) -> float:
        return 2.0 + trial["model.bias"] + trial["model.n_layers"] + (trial["model.norm"] == "rmsnorm")

    trials = grid(model__bias=(False, True), model__n_layers=(1, 2), model__norm=("rmsnorm", "layernorm"), seed=(0, 1))
    _, page = write_report(write_sweep(tmp_path / "sweep", trials, loss=loss))
    figure = next(figure for figure in re.findall(r"(?s)<figure.*?</figure>", page) if "Importance of" in figure)
    assert sorted(map(float, re.findall(r">([\d.]+\.\d)%<", figure))) == [0.0] * 3 + [33.3] * 3
    assert [name in figure for name in (">interactions<", ">noise<", ">seed<")] == [True] * 3


# The page in a browser.


def browse(page: Path, *flags: str, hash: str = "") -> subprocess.CompletedProcess[str]:
    """Open a page in a headless browser without network."""
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
        "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={page.parent / 'browser'}", *flags,
        f"file://{page}{hash}",
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)


def script_errors(run: subprocess.CompletedProcess[str]) -> list[str]:
    """Return the errors of the page's script."""
    return [line for line in run.stderr.splitlines() if "CONSOLE" in line]


@needs_browser
def test_trial_in_the_url_is_highlighted_in_all_figures(optimizers: Path, page: str) -> None:
    trial = trial_id(two_optimizers()[7])
    run = browse(optimizers / "report.html", "--dump-dom", hash=f"#trial={trial}")
    assert script_errors(run) == []
    assert re.search(r'<body class="[^"]*\blit\b', run.stdout)
    tags = [tag for tag in re.findall(r"<[a-z][^>]*>", run.stdout) if "data-trial=" in tag]
    lit = [tag for tag in tags if re.search(r'class="[^"]*\bhot\b', tag)]
    assert len(lit) == attributes(page, "data-trial").count(trial) >= 4
    assert all(f'data-trial="{trial}"' in tag for tag in lit)
    assert {attributes(tag, "data-trial")[0] for tag in tags} == {trial_id(overrides) for overrides in two_optimizers()}


@needs_browser
def test_hovering_a_point_highlights_its_trial_and_shows_its_knobs(optimizers: Path, page: str) -> None:
    trial = trial_id(two_optimizers()[7])
    place = f"""document.querySelector('figure [data-trial="{trial}"] use')"""
    move = f"{place}.dispatchEvent(new MouseEvent('mousemove', {{bubbles: true, clientX: 9, clientY: 9}}));"
    moved = optimizers / "moved.html"
    moved.write_text(page.replace("</body>", f"<script>{move}</script></body>"), encoding="utf-8")
    run = browse(moved, "--dump-dom")
    assert script_errors(run) == []
    tip = re.findall(r'(?s)<div id="tip"[^>]*>(.*?)</div>', run.stdout)[0]
    loss = loss_of(two_optimizers()[7])
    knobs = ["optimizer: adamw", "learning rate: 0.003", "seed: 1", f"validation loss: {loss:.4f} nats per token"]
    assert tip.splitlines() == [f"trial {trial}", *knobs]
    assert re.search(r'<body class="[^"]*\blit\b', run.stdout)


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize(("theme", "flags"), [("light", ()), ("dark", ("--blink-settings=preferredColorScheme=0",))])
def test_page_is_rendered_in_light_and_dark_themes(optimizers: Path, theme: str, flags: tuple[str, ...]) -> None:
    from matplotlib.image import imread

    shot = optimizers / f"{theme}.png"
    browse(optimizers / "report.html", *flags, "--window-size=1200,4200", "--hide-scrollbars", f"--screenshot={shot}")
    pixels = imread(shot)[..., :3]
    background = pixels[5, 5]
    assert background.mean() > 0.95 if theme == "light" else background.mean() < 0.15
    is_ink = np.abs(pixels - background).max(axis=-1, keepdims=False) > 0.2
    # Content in each tenth of the height down to the notes, and empty margins.
    assert all(part.mean() > 0.003 for part in np.array_split(is_ink[: len(is_ink) * 9 // 10], 9))
    assert not is_ink[:, :60].any() and not is_ink[:, -60:].any()
