"""Changes of the config of an existing run, and runs that are extended."""

import json
import shutil
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_loop import Interruption, assert_same_bits, contents, metrics, stored_state, tiny, train

from rustgpt_jax.config.schema import Config, EarlierConfig, can_change_on_resume, stages
from rustgpt_jax.errors import UserError
from rustgpt_jax.reproduce.compare_metrics import compare_checkpoints, compare_records, compare_samples
from rustgpt_jax.reproduce.recorded_run import RecordedRun
from rustgpt_jax.reproduce.replay import replay_one_step
from rustgpt_jax.reproduce.run_diff import diff_configs
from rustgpt_jax.training import run_training
from rustgpt_jax.training.config_checks import ResumePlan, plan_resume
from rustgpt_jax.training.load_model import load_model
from rustgpt_jax.workdir.event_log import EventLog
from rustgpt_jax.workdir.run_dir import RunDir, create_run_dir, load_config, load_earlier

pytestmark = pytest.mark.usefixtures("quick_codegen")

CONSTANT = {"schedule.name": "constant"}
LONGER = {"training.steps": 16}
OBSERVED = {
    "logging.log_every": 2,
    "logging.eval_every": 5,
    "logging.checkpoint_every": 4,
    "logging.sample_prompts": ("B",),
    "sampling.max_tokens": 3,
}


def extend(config: Config, path: Path) -> str:
    """Train with --extend. Returns what was printed."""
    console = Console(file=StringIO(), width=200)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_training, "draw_loss_curves", lambda folder: folder / "loss.png")
        assert run_training.train(config, path, {}, console, extends=True) == 0
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ten steps that was stopped, resumed with other logging, and then extended to 16 steps."""
    path = tmp_path_factory.mktemp("changed") / "run"
    assert not train(tiny(**CONSTANT), path, Interruption(5, is_kill=False))[0]
    assert train(tiny(**CONSTANT, **OBSERVED), path)[0]
    assert train(tiny(**CONSTANT, **OBSERVED, **LONGER), path)[0]
    return path


def test_changed_logging_does_not_change_training(changed: Path, tmp_path: Path) -> None:
    config = tiny(**CONSTANT, **LONGER)
    assert train(config, tmp_path / "straight")[0]
    whole = tiny(**CONSTANT, **OBSERVED, **LONGER)
    assert load_config(changed) == whole
    assert_same_bits(stored_state(whole, changed), stored_state(config, tmp_path / "straight"))
    (first, _), (second, _) = load_earlier(changed)
    assert 5 <= first < second == 10
    logged = [line["step"] for line in metrics(changed) if "train/loss" in line]
    assert logged == [*range(1, first + 1), *(step for step in range(first + 1, 17) if step % 2 == 0)]
    evaluated = {line["step"] for line in metrics(changed) if "valid/loss" in line}
    assert evaluated == {step for step in range(1, 17) if step % (4 if step <= first else 5) == 0} | {10, 16}
    straight = {line["step"]: line["train/loss"] for line in metrics(tmp_path / "straight") if "train/loss" in line}
    assert all(straight[line["step"]] == line["train/loss"] for line in metrics(changed) if "train/loss" in line)
    texts = [json.loads(line) for line in (changed / "samples.jsonl").read_text().splitlines()]
    assert {text["prompt"] for text in texts if text["step"] > first} == {"B"}
    events = [event for event in EventLog(RunDir(changed).events_file).events() if event["event"] == "config"]
    assert [event["step"] for event in events] == [first, 10]
    assert events[0]["changes"]["logging.log_every"] == [1, 2] and events[1]["changes"] == {"training.steps": [10, 16]}
    assert load_model(changed).step == 16


def test_rerun_applies_config_changes_at_the_same_steps(changed: Path, tmp_path: Path) -> None:
    again = RunDir(tmp_path / "again")
    again.path.mkdir()
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(changed / name, again.path / name)
    # With interruptions before and after the first change.
    for steps in (3, 5):
        assert not train(load_config(again.path), again.path, Interruption(steps, is_kill=steps == 3))[0]
    assert train(load_config(again.path), again.path)[0]
    found = compare_records(changed, again.path)
    assert found.first_difference is None and found.last_step == 16
    assert compare_samples(changed, again.path, 16)[1] is None
    arrays = compare_checkpoints(RunDir(changed), again)
    assert arrays.step == 16 and not arrays.unequal
    assert (again.path / "config.json").read_bytes() == (changed / "config.json").read_bytes()


def test_replay_of_a_changed_run_is_bit_exact(changed: Path) -> None:
    with RecordedRun(changed, Console(file=StringIO())) as past:
        for step in (1, 5, 6, 8, 10, 12, 16):
            again, _ = replay_one_step(past, step, with_intermediates=False)
            assert again.is_same and again.unequal == [], again.verdict
        again, _ = replay_one_step(past, 15, with_intermediates=False)
        assert again.record is None and "(config.logging.log_every=2)" in again.verdict


@pytest.mark.slow
def test_changed_run_resumes_on_another_mesh(changed: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(changed, tmp_path / "run"))
    shutil.rmtree(run / "checkpoints" / "16")
    before = (run / "config.json").read_bytes()
    assert RunDir(run).saved_steps[-1] > load_earlier(run)[-1].until
    assert train(tiny(**CONSTANT, **OBSERVED, **LONGER, **{"mesh.data": 1}), run)[0]
    assert (run / "config.json").read_bytes() == before and load_model(run).step == 16


def test_diff_reports_config_changes(changed: Path, tmp_path: Path) -> None:
    assert train(tiny(**CONSTANT, **OBSERVED, **LONGER), tmp_path / "straight")[0]
    (found,) = diff_configs(RunDir(changed), RunDir(tmp_path / "straight"))
    assert found.name == "config was changed" and found.second == "never" and "10]" in found.first


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a cosine schedule."""
    path = tmp_path_factory.mktemp("finished") / "run"
    assert train(tiny(**{"schedule.name": "cosine"}), path)[0]
    return path


def test_extending_a_decaying_schedule_requires_the_flag(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    longer, before = tiny(**{"schedule.name": "cosine"}, **LONGER), contents(run)
    with pytest.raises(
        UserError, match=r"another config: training.steps is 10 in the run and 16 in this config; the cosine schedule"
    ):
        train(longer, run)
    assert contents(run) == before
    said = extend(longer, run)
    assert "From step 10 on, training.steps is 16 instead of 10." in said
    assert "--extend: the cosine schedule of 16 steps differs from that of 10 from step 4 on: the steps that" in said
    rates = [line["train/learning_rate"] for line in metrics(run) if "train/loss" in line]
    kept = [line["train/learning_rate"] for line in metrics(finished) if "train/loss" in line]
    assert rates[:10] == kept and rates[10] > rates[9] and len(rates) == 16
    with RecordedRun(run, Console(file=StringIO())) as past:
        assert all(replay_one_step(past, step, with_intermediates=False)[0].is_same for step in (10, 11, 16))


def test_config_change_without_steps_keeps_earlier_configs(finished: Path, tmp_path: Path) -> None:
    """As if a run was killed before its first step with a new config, and changed again."""
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    first = load_config(run)

    def lengthened(steps: int) -> ResumePlan:
        change = plan_resume(run, tiny(**{"schedule.name": "cosine", "training.steps": steps}), extends=True)
        create_run_dir(run, change.config, {}, change.earlier)
        return change

    lengthened(16)
    lengthened(24)
    stage, last = stages(load_config(run), load_earlier(run))
    assert (stage.end_step, stage.last_step, last.end_step) == (first.training.steps, 10, 24)
    # The same command changes nothing.
    assert lengthened(24) == ResumePlan(load_config(run), load_earlier(run))
    for step in RunDir(run).saved_steps[1:]:
        shutil.rmtree(run / "checkpoints" / str(step))
    (left,) = RunDir(run).saved_steps
    lengthened(32)
    stage, last = stages(load_config(run), load_earlier(run))
    assert (stage.end_step, stage.last_step, last.end_step) == (first.training.steps, left, 32)


@pytest.mark.parametrize(
    ("changes", "extends", "sentence"),
    [
        (
            {"optimizer.learning_rate": 0.5},
            False,
            r"another config: optimizer.learning_rate is .* in the run and 0.5 in this config",
        ),
        ({"data.seq_len": 8}, False, r"another config: data.seq_len is None in the run and 8 in this config"),
        ({"training.steps": 9}, True, r"--extend: .* has 10 steps; give a larger config.training.steps, such as 20"),
        (
            {"training.steps": 9},
            False,
            r"training.steps is 10 in the run and 9 in this config, and 10 steps are done already",
        ),
        ({}, True, r"--extend: .* has 10 steps; give a larger"),
        ({"stages": ({"name": "a"},)}, False, r"another config: stages"),
    ],
)
def test_impossible_config_change_is_an_error_and_changes_nothing(
    finished: Path, changes: dict[str, Any], extends: bool, sentence: str
) -> None:
    before = contents(finished)
    with pytest.raises(UserError, match=sentence) as refusal:
        plan_resume(finished, tiny(**{"schedule.name": "cosine"}, **changes), extends)
    assert "delete" not in str(refusal.value)
    assert contents(finished) == before


@pytest.mark.parametrize(
    ("change", "metric", "message"),
    [
        ({"logging.eval_batches": 1}, "valid/loss", "do not count for the best checkpoint"),
        ({"logging.best_metric": "train/mean_loss"}, "train/mean_loss", "chosen among the evaluations after that step"),
    ],
)
def test_incomparable_evaluations_do_not_count_for_the_best_checkpoint(
    change: dict[str, Any], metric: str, message: str, finished: Path, tmp_path: Path
) -> None:
    """Evaluations of fewer batches, or of another metric, continue the run; rerun applies the change there."""
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    lines = [line | {metric: -1.0} if "valid/loss" in line else line for line in metrics(run)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    longer = tiny(**{"schedule.name": "cosine", "logging.eval_every": 3}, **change, **LONGER)
    said = extend(longer, run)
    assert f"{next(iter(change))} is " in said and message in said
    losses = {line["step"]: line[metric] for line in metrics(run) if metric in line and line["step"] > 10}
    assert set(losses) == {12, 15, 16}
    assert json.loads((run / "checkpoints" / "best").read_bytes())[0] == min(losses, key=losses.__getitem__)


def test_extend_requires_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--extend: .*none has no run to extend"):
        plan_resume(tmp_path / "none", tiny(), extends=True)
    assert plan_resume(tmp_path / "none", tiny()).earlier == ()


@pytest.mark.slow
def test_wsd_run_can_be_extended_before_its_decay(tmp_path: Path) -> None:
    """The steps before the decay do not depend on when it starts."""
    stable = {"schedule.name": "wsd", "schedule.decay_frac": 0.3}
    train(tiny(**stable), tmp_path / "run", Interruption(5, is_kill=False))
    assert train(tiny(**stable, **LONGER), tmp_path / "run")[0]
    assert train(tiny(**stable, **LONGER), tmp_path / "straight")[0]
    longer = tiny(**stable, **LONGER)
    assert_same_bits(stored_state(longer, tmp_path / "run"), stored_state(longer, tmp_path / "straight"))
    with pytest.raises(UserError, match="the wsd schedule of 30 steps differs from that of 16 from step 13 on"):
        plan_resume(tmp_path / "run", tiny(**stable, **{"training.steps": 30}))


@pytest.mark.parametrize("earlier", ["null", "5", "[null]", '[{"until": "1"}]', '[{"until": -1}]', '[{"until": 3}]'])
def test_damaged_earlier_configs_are_an_error(finished: Path, tmp_path: Path, earlier: str) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    record = json.loads((run / "config.json").read_bytes())
    (run / "config.json").write_text(json.dumps(record | {"earlier": json.loads(earlier)}))
    with pytest.raises(UserError, match=r"config.json is damaged"):
        load_model(run)


def test_stages_are_split_at_config_changes() -> None:
    two = ({"name": "a", "training": {"steps": 4}}, {"name": "b", "training": {"steps": 6}})
    longer = ({"name": "a", "training": {"steps": 4}}, {"name": "b", "training": {"steps": 9}})
    first, second = tiny(stages=two), tiny(stages=longer)
    cut = stages(second, (EarlierConfig(0, second), EarlierConfig(3, first), EarlierConfig(7, first)))
    found = [(stage.name, stage.first_step, stage.end_step, stage.last_step) for stage in cut]
    assert found == [("a", 0, 4, 3), ("a", 0, 4, 4), ("b", 4, 10, 7), ("b", 4, 13, 13)]
    assert stages(second) == stages(second, (EarlierConfig(0, first),))


def test_only_knobs_that_do_not_affect_the_state_may_change() -> None:
    assert (
        can_change_on_resume("logging.log_every")
        and can_change_on_resume("stages.b.training.steps")
        and can_change_on_resume("sampling.seed")
    )
    assert not any(map(can_change_on_resume, ("seed", "stages", "data.seq_len", "stages.b.optimizer.learning_rate")))
