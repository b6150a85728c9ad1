"""Results of a sweep: statuses, the compared metric, curves, settings, and CSV files."""

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from conftest import small_config
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from synthetic_sweep import (
    INITIAL_LOSS,
    STEPS,
    grid,
    loss_of,
    metrics,
    status_of,
    trial_id,
    two_optimizers,
    write_metrics,
    write_sweep,
)

from rustgpt_jax.errors import UserError
from rustgpt_jax.sweeps.report import report
from rustgpt_jax.sweeps.report.results import Results, group_by_setting, read_results, write_csv
from rustgpt_jax.tracking.metric_writer import read_metrics
from rustgpt_jax.workdir.run_dir import create_run_dir


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """The sweep of two optimizers."""
    return read_results(write_sweep(tmp_path_factory.mktemp("sweeps") / "optimizers", two_optimizers()))


def append(folder: Path, trial: str, event: str, **more: Any) -> None:
    """Add an event to a ledger."""
    with open(folder / "ledger.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"time": 2e9, "trial": trial, "event": event, **more}) + "\n")


def csv_of(folder: Path) -> bytes:
    """The bytes of the CSV of a sweep."""
    write_csv(read_results(folder), folder / "results.csv")
    return (folder / "results.csv").read_bytes()


def test_trials_are_in_planned_order_with_their_status(results: Results) -> None:
    planned = two_optimizers()
    assert [trial.overrides for trial in results.trials] == planned
    assert [trial.id for trial in results.trials] == [trial_id(overrides) for overrides in planned]
    assert [trial.status for trial in results.trials] == [status_of(overrides) for overrides in planned]
    assert results.swept == ("optimizer.name", "optimizer.learning_rate", "seed")
    assert results.counts == {"finished": 33, "diverged": 2, "failed": 1}


def test_only_finished_trials_have_a_final_loss(results: Results) -> None:
    for trial in results.trials:
        if status_of(dict(trial.overrides)) == "finished":
            assert trial.final_loss == trial.valid_loss == loss_of(dict(trial.overrides))
            assert trial.step == STEPS
        else:
            assert trial.final_loss is trial.valid_loss is trial.train_loss is trial.bits_per_byte is None
        assert trial.initial_loss == INITIAL_LOSS == trial.train_curve[0][1]
    failed = [trial for trial in results.trials if trial.status == "failed"]
    assert [trial.error for trial in failed] == ["OSError: [Errno 28] No space left on device: 'checkpoints/32'"]


def test_curves_of_diverged_trials_end_at_the_last_finite_loss(results: Results) -> None:
    for trial in results.trials:
        losses = [loss for _, loss in (*trial.train_curve, *trial.valid_curve)]
        assert all(map(math.isfinite, losses))
        if trial.status == "diverged":
            assert trial.step == 60 and trial.train_curve[-1][0] == 56


@given(events=st.lists(st.sampled_from(["queued", "began", "finished", "diverged", "pruned", "stopped", "failed"])))
def test_status_is_the_last_event_except_queued(events: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = write_sweep(tmp_path_factory.mktemp("sweeps") / "one", [{"seed": 0}], status=lambda _: "planned")
    write_metrics(folder, {"seed": 0}, metrics({"seed": 0}, "finished", 2.0, 20))
    for event in events:
        append(folder, trial_id({"seed": 0}), event)
    status = ["planned", *(event for event in events if event != "queued")][-1]
    assert read_results(folder).trials[0].status == {"began": "running"}.get(status, status)


def test_csv_does_not_depend_on_interruptions(tmp_path: Path) -> None:
    trials = two_optimizers()
    straight = csv_of(write_sweep(tmp_path / "straight", trials))
    folder = write_sweep(tmp_path / "interrupted", trials)
    lines = (folder / "ledger.jsonl").read_text().splitlines(keepends=True)
    planned, rest = lines[: len(trials)], lines[len(trials) :]
    (folder / "ledger.jsonl").write_text("".join(planned))
    for overrides in trials[::-1]:
        append(folder, trial_id(overrides), "began")
        append(folder, trial_id(overrides), "stopped", step=40)
    with open(folder / "ledger.jsonl", "a", encoding="utf-8") as file:
        file.writelines(sorted(rest, key=lambda line: (json.loads(line)["trial"], lines.index(line))))
    for run in (folder / "trials").iterdir():
        text = (run / "metrics.jsonl").read_text()
        (run / "metrics.jsonl").write_text(text.replace('"train/tokens_per_second": 0', '"train/tokens_per_second": 9'))
    assert csv_of(folder) == straight


def test_csv_has_all_trials_and_digits(results: Results, tmp_path: Path) -> None:
    write_csv(results, tmp_path / "results.csv")
    with open(tmp_path / "results.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    knobs = ["optimizer.name", "optimizer.learning_rate", "seed"]
    assert list(rows[0]) == ["trial", *knobs, "status", "steps", "train_loss", "valid_loss", "bits_per_byte", "best"]
    assert [row["trial"] for row in rows] == [trial.id for trial in results.trials]
    for row, trial in zip(rows, results.trials, strict=True):
        assert float(row["optimizer.learning_rate"]) == trial.overrides["optimizer.learning_rate"]
        assert row["status"] == trial.status
        assert (float(row["valid_loss"]) if row["valid_loss"] else None) == trial.final_loss
        assert (float(row["best"]) if row["best"] else None) == trial.best_loss


def test_metric_depends_on_the_swept_knobs(tmp_path: Path) -> None:
    rates = grid(optimizer__learning_rate=(1e-3, 1e-2))
    cases = {
        "valid/loss": write_sweep(tmp_path / "valid", rates),
        "valid/bits_per_byte": write_sweep(tmp_path / "bits", grid(tokenizer__vocab_size=(256, 512))),
        "train/loss": write_sweep(tmp_path / "train", rates, eval_every=STEPS + 1),
    }
    for metric, folder in cases.items():
        read = read_results(folder)
        assert read.metric == metric
        for trial in read.trials:
            lines = read_metrics(folder / "trials" / trial.id)
            assert trial.final_loss == [line[metric] for line in lines if metric in line][-1]
    texts = write_sweep(tmp_path / "texts", grid(stages__instruct__data__corpus=("facts", "chat")))
    assert read_results(texts).metric == "valid/bits_per_byte"


def test_non_finite_validation_loss_means_diverged(tmp_path: Path) -> None:
    folder = write_sweep(
        tmp_path / "sweep", grid(seed=(0, 1)), loss=lambda overrides: (2.0, math.nan)[overrides["seed"]]
    )
    assert [trial.status for trial in read_results(folder).trials] == ["finished", "diverged"]


def test_best_loss_is_of_the_last_stage(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "sweep", [{"seed": 0}], status=lambda _: "planned")
    lines = metrics({"seed": 0}, "finished", 2.0, 20)
    # The losses of the first stage, on another text, are lower.
    first = [{**line, "stage": "first", **({"valid/loss": 0.5} if "valid/loss" in line else {})} for line in lines[:30]]
    write_metrics(folder, {"seed": 0}, first + lines[30:])
    append(folder, trial_id({"seed": 0}), "finished", step=STEPS)
    assert read_results(folder).trials[0].best_loss == min(
        line["valid/loss"] for line in lines[30:] if "valid/loss" in line
    )


def test_knobs_without_override_have_the_value_of_the_config(tmp_path: Path) -> None:
    trials = [{}, {"optimizer.learning_rate": 0.5}, {"optimizer.weight_decay": 0.25}]
    folder = write_sweep(tmp_path / "sweep", trials)
    base = small_config()
    for overrides in trials:
        create_config(folder, overrides)
    read = read_results(folder)
    assert read.knobs == ("optimizer.learning_rate", "optimizer.weight_decay")
    rates = [trial.knobs["optimizer.learning_rate"] for trial in read.trials]
    assert rates == [base.optimizer.learning_rate, 0.5, base.optimizer.learning_rate]
    assert [trial.seed for trial in read.trials] == [base.seed] * 3
    assert [trial.total_steps for trial in read.trials] == [base.training.steps] * 3


def test_settings_depend_on_configs_rather_than_overrides(tmp_path: Path) -> None:
    trials = [{"seed": seed, "logging.sample_prompts": [prompt]} for seed in (0, 1) for prompt in ("a", "b")]
    folder = write_sweep(tmp_path / "sweep", trials)
    for overrides in trials:
        steps = 50 if overrides["logging.sample_prompts"] == ["b"] else 60
        create_config(folder, overrides, **{"logging.sample_prompts": ("a",), "training.steps": steps})
    read = read_results(folder)
    # The configs take precedence over the ledger.
    assert read.swept == ("seed", "training.steps")
    assert [each.knobs for each in group_by_setting(read)] == [{"training.steps": 60}, {"training.steps": 50}]
    assert [sorted(each.losses) for each in group_by_setting(read)] == [[0, 1], [0, 1]]


def create_config(folder: Path, overrides: dict[str, Any], **changes: Any) -> None:
    """Write the config.json of a trial that has metrics."""
    run = folder / "trials" / trial_id(overrides)
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").unlink()
    create_run_dir(run, small_config(**overrides | changes), {})
    (run / "metrics.jsonl").write_text(text)


@given(
    trials=st.lists(
        st.fixed_dictionaries(
            {"optimizer.learning_rate": st.sampled_from([0.1, 0.2]), "seed": st.integers(0, 3)},
            optional={"model.mixers": st.sampled_from([["attention"], ["attention", "other"]])},
        ),
        min_size=1,
        max_size=12,
        unique_by=lambda overrides: json.dumps(overrides, sort_keys=True),
    )
)
def test_settings_are_the_trials_that_differ_only_in_seed(
    trials: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = write_sweep(tmp_path_factory.mktemp("sweeps") / "sweep", trials, status=lambda _: "planned")
    read = read_results(folder)
    found = group_by_setting(read)
    assert sorted(trial.id for setting in found for trial in setting.trials) == sorted(map(trial_id, trials))
    for first in read.trials:
        for second in read.trials:
            alike = all(
                first.overrides.get(path) == second.overrides.get(path)
                for path in first.overrides | second.overrides
                if path != "seed"
            )
            together = any(first in setting.trials and second in setting.trials for setting in found)
            assert alike == together


def test_reading_another_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not the folder of a sweep: it has no sweep\.json"):
        read_results(tmp_path)
    (tmp_path / "sweep.json").write_text('{"name": "x", "command": "y"}')
    with pytest.raises(UserError, match="it has no 'config_file'"):
        read_results(tmp_path)
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(UserError, match="it is not JSON"):
        read_results(tmp_path)


def test_error_without_finished_trials_names_the_reason(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "sweep", [{"seed": 0}])
    (folder / "trials" / trial_id({"seed": 0}) / "metrics.jsonl").write_text("[]\n")
    with pytest.raises(UserError, match=r"no finished trial .*\(1 missing\)\. .*metrics\.jsonl, line 1: "):
        report(folder, Console(file=io.StringIO()))
