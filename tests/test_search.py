"""Searches: which trials continue, reproducible suggestions, and exact resumption after kills."""

import csv
import json
import math
import random
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.storages.journal import JournalFileBackend
from rich.console import Console
from test_loop import Killed, metrics
from test_sweep import (
    INFO,
    assert_same_runs,
    checkpoints,
    events,
    opened,
    run,
    table,
    tiny_tree,
    trial_path,
)

from rustgpt_jax.config.schema import stages
from rustgpt_jax.errors import UserError
from rustgpt_jax.sweeps import (
    TPE,
    SuccessiveHalving,
    choice,
    log_uniform,
    product,
    seeds,
    successive_halving,
    tpe,
    trial_batching,
    uniform,
    values,
)
from rustgpt_jax.sweeps import sweep_command as commands
from rustgpt_jax.sweeps.local_launchers import Launch
from rustgpt_jax.sweeps.report import report
from rustgpt_jax.sweeps.report.results import group_by_setting, read_results
from rustgpt_jax.sweeps.search import decode_params, hash_study, run_successive_halving, run_tpe
from rustgpt_jax.sweeps.sweep import LAUNCHERS, SweepOptions
from rustgpt_jax.sweeps.sweep_dir import Ledger, SweepDir
from rustgpt_jax.sweeps.trial_batching import Chunk
from rustgpt_jax.sweeps.trials import Trial, make_trials, sample_feasible_points
from rustgpt_jax.workdir.run_dir import RunLockedError, load_config, lock_run_dir

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Searches over losses from a formula, which train nothing and may be killed at any write.

Loss = Callable[[Any, int], float]


class KillSwitch:
    """Counts the moments at which a process could be killed, and raises Killed at one of them."""

    def __init__(self) -> None:
        self.left = math.inf

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise Killed

    def around(self, write: Callable[..., Any]) -> Callable[..., Any]:
        """Return a write that may be killed before and after."""

        def written(*arguments: Any) -> Any:
            self()
            result = write(*arguments)
            self()
            return result

        return written


SetLoss = Callable[[Loss], KillSwitch]


def train_by_formula(loss: Loss, kills: KillSwitch, launch: Launch, chunks: Sequence[Chunk]) -> None:
    """A launcher that takes losses from a formula of the config and the step; NaN means divergence."""
    ledger = Ledger(launch.folder.ledger_file)
    for chunk in chunks:
        configs = {trial: load_config(launch.folder.trial(trial).path) for trial in chunk.trials}
        ledger.append_all([(trial, "began", {"step": 0}) for trial in configs])
        for trial, config in configs.items():
            end = min(chunk.until or math.inf, stages(config)[-1].end_step)
            lines, event, step = [], "finished" if end == config.training.steps else "stopped", end
            for at in range(config.logging.eval_every, end + 1, config.logging.eval_every):
                if math.isnan(loss(config, at)):
                    event, step = "diverged", at
                    break
                lines.append({"step": at, "stage": "train", "valid/loss": loss(config, at)})
            text = "".join(json.dumps(line) + "\n" for line in lines)
            launch.folder.trial(trial).metrics_file.write_text(text)
            kills()
            ledger.append(trial, event, step=step)


@pytest.fixture
def kills(monkeypatch: pytest.MonkeyPatch) -> KillSwitch:
    """Let any write to the ledger or the journal be the last one."""
    kills = KillSwitch()
    monkeypatch.setattr(Ledger, "append_all", kills.around(Ledger.append_all))
    monkeypatch.setattr(JournalFileBackend, "append_logs", kills.around(JournalFileBackend.append_logs))
    monkeypatch.setattr("rustgpt_jax.sweeps.sweep.save_code_snapshot", lambda folder: folder.code)
    monkeypatch.setattr(trial_batching, "estimate_cost", lambda config: trial_batching.Cost(1, 1, 1, 1.0, 1.0, 1))
    return kills


@pytest.fixture
def by_formula(kills: KillSwitch, monkeypatch: pytest.MonkeyPatch) -> Iterator[SetLoss]:
    """Return a function that sets the formula of the losses."""

    def given(loss: Loss) -> KillSwitch:
        monkeypatch.setitem(LAUNCHERS, "inline", partial(train_by_formula, loss, kills))
        return kills

    yield given


def run_with_kills(search: Callable[[], None], kills: KillSwitch, seed: int) -> int:
    """Restart a search, killed after some writes each time, until it ends; return the number of kills."""
    rng, n = random.Random(seed), 0
    while True:
        kills.left = rng.randint(1, 14)
        try:
            search()
            return n
        except Killed:
            n += 1


# Successive halving.


def random_loss(seed: int) -> Loss:
    """Return random losses, one in eight of them NaN."""

    def loss(config: Any, step: int) -> float:
        rng = random.Random(f"{seed} {config.seed} {step}")
        return math.nan if rng.random() < 1 / 8 else rng.random()

    return loss


def expected_ends(trials: list[Trial], loss: Loss, rungs: Sequence[int], keep: float) -> dict[str, tuple[str, int]]:
    """Return how each trial should end and at which step, by brute force."""
    ends, alive = {}, list(range(len(trials)))
    for rung in (*rungs, trials[0].config.training.steps):
        losses = np.array([[loss(trials[index].config, step) for step in range(4, rung + 1, 4)] for index in alive])
        for index, row in zip(alive, losses, strict=True):
            if np.isnan(row).any():
                ends[trials[index].id] = "diverged", 4 * (int(np.isnan(row).argmax()) + 1)
        fine = [(row[-1], index) for index, row in zip(alive, losses, strict=True) if not np.isnan(row).any()]
        n_kept = math.ceil(keep * len(alive)) if rung in rungs else len(fine)
        for _, index in sorted(fine)[n_kept:]:
            ends[trials[index].id] = "pruned", rung
        alive = sorted(index for _, index in sorted(fine)[:n_kept])
    return ends | {trials[index].id: ("finished", trials[0].config.training.steps) for index in alive}


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_halving_keeps_the_best_trials_at_each_rung(by_formula: SetLoss, seed: int, tmp_path: Path) -> None:
    trials = make_trials(tiny_tree(), seeds(11))
    keep, rungs = (1 / 3, (4, 8)) if seed % 2 else (0.5, (4,))
    search = successive_halving(seeds(11), rungs, keep)

    def once(path: Path) -> None:
        with opened(path) as sweep:
            run_successive_halving(sweep, search, trials)

    kills = by_formula(random_loss(seed))
    once(tmp_path / "straight")
    assert run_with_kills(partial(once, tmp_path / "killed"), kills, seed) > 3
    for path in (tmp_path / "straight", tmp_path / "killed"):
        ends = {event["trial"]: (event["event"], event["step"]) for event in events(path) if "step" in event}
        assert ends == expected_ends(trials, random_loss(seed), rungs, keep)
        ended = [event["trial"] for event in events(path, "finished", "diverged", "pruned")]
        assert sorted(ended) == sorted(trial.id for trial in trials)
    assert table(tmp_path / "straight") == table(tmp_path / "killed")


@pytest.mark.slow
def test_survivors_of_halving_match_a_plain_sweep_bit_for_bit(tmp_path: Path) -> None:
    rates = values("optimizer.learning_rate", 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 1e30)
    trials = make_trials(tiny_tree(), rates)
    run(tmp_path / "plain", trials)
    search = successive_halving(rates, rungs=(4, 8), keep=1 / 2)
    with opened(tmp_path / "halved") as sweep:
        run_successive_halving(sweep, search, trials)
    losses = {
        trial.id: {line["step"]: line["valid/loss"] for line in metrics(path) if "valid/loss" in line}
        for trial in trials[:-1]
        for path in [trial_path(tmp_path / "plain", trial)]
    }
    first = sorted(losses, key=lambda name: losses[name][4])[:3]
    second = sorted(first, key=lambda name: losses[name][8])[:2]
    assert {event["trial"] for event in events(tmp_path / "halved", "finished")} == set(second)
    assert_same_runs([trial for trial in trials if trial.id in second], tmp_path / "halved", tmp_path / "plain")
    pruned = {event["trial"]: (event["step"], event["rung"]) for event in events(tmp_path / "halved", "pruned")}
    assert pruned == {name: (8, 2) if name in first else (4, 1) for name in losses if name not in second}
    assert all(checkpoints(tmp_path / "halved")[name] == rung for name, (rung, _) in pruned.items())


@pytest.mark.parametrize(
    ("changes", "rungs", "message"),
    [
        ({}, (4, 10), "no evaluation at step 10, because config.logging.eval_every=4; the nearest rung is 8"),
        ({}, (1,), "no evaluation at step 1, .* the nearest rung is 4"),
        ({}, (4, 12), "the rung 12 is not before the end of training at step 12"),
        ({"data.valid_fraction": 0.0}, (4,), "config.data.valid_fraction=0"),
    ],
)
def test_invalid_rungs_are_errors_before_anything_is_written(
    changes: dict[str, Any], rungs: tuple[int, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Both are for a process that has not used JAX yet.
    monkeypatch.setattr(commands, "use_cpu_devices", lambda _: None)
    monkeypatch.setattr(commands, "enable_compilation_cache", lambda: None)
    tree, search = tiny_tree(**changes), successive_halving(seeds(2), rungs)
    args = commands.SweepArgs(INFO, SweepOptions(), dry_run=False)
    with pytest.raises(UserError, match=message):
        commands.run_sweep(
            tree, search, make_trials(tree, seeds(2)), {}, tmp_path / "sweep", args, Console(file=StringIO())
        )
    assert not (tmp_path / "sweep").exists()


def test_pruned_trials_continue_after_the_rungs_are_edited(by_formula: SetLoss, tmp_path: Path) -> None:
    trials, loss = make_trials(tiny_tree(), seeds(11)), random_loss(3)
    by_formula(loss)
    finished = set[str]()
    for rungs, keep in (((4,), 1 / 4), ((8,), 1 / 2), ((4, 8), 1 / 2)):
        with opened(tmp_path) as sweep:
            run_successive_halving(sweep, successive_halving(seeds(11), rungs, keep), trials)
        wanted = expected_ends(trials, loss, rungs, keep)
        found = {trial: state["event"] for trial, state in Ledger(SweepDir(tmp_path).ledger_file).states().items()}
        assert {trial for trial, (end, _) in wanted.items() if end == "finished"} <= {
            trial for trial, end in found.items() if end == "finished"
        }
        for trial in trials:
            # Trials that an earlier sweep completed remain so.
            if trial.id not in finished and wanted[trial.id][0] != "diverged":
                assert found[trial.id] == wanted[trial.id][0]
        finished |= {trial for trial, end in found.items() if end == "finished"}
    with opened(tmp_path) as sweep:
        sweep.add(trials)
        sweep.run(trials)
    ends = {state["event"] for state in Ledger(SweepDir(tmp_path).ledger_file).states().values()}
    assert ends == {"finished", "diverged"}


# Edited sweeps and deleted trials.


def rows(file: Path) -> dict[str, str]:
    """Return the status of each trial in a CSV file, in order."""
    with open(file, encoding="utf-8", newline="") as lines:
        return {row["trial"]: row["status"] for row in csv.DictReader(lines)}


def test_results_of_an_edited_config_are_never_pooled_with_earlier_ones(by_formula: SetLoss, tmp_path: Path) -> None:
    by_formula(bowl)
    old = make_trials(tiny_tree(), seeds(3))
    new = make_trials(tiny_tree(**{"training.steps": 24}), seeds(2))
    for trials, removed in ((old, []), (new, old), (old, new)):
        run(tmp_path, trials)
        read = read_results(tmp_path)
        assert [each.id for each in read.trials] == [each.id for each in trials]
        assert [each.id for each in read.removed] == [each.id for each in removed]
        (setting,) = group_by_setting(read)
        end = trials[0].config.training.steps
        assert setting.losses == {each.config.seed: bowl(each.config, end) for each in trials}
        shown = Console(file=StringIO(), width=200)
        report(tmp_path, shown)
        assert rows(tmp_path / "results.csv") == dict.fromkeys([each.id for each in trials], "finished")
        assert (tmp_path / "removed.csv").exists() == bool(removed)
        message = f"{len(removed)} trials are no longer defined by the sweep's file"
        assert (message in shown.file.getvalue()) == bool(removed)  # type: ignore[attr-defined]
        if removed:
            assert list(rows(tmp_path / "removed.csv")) == [each.id for each in removed]
    assert len(events(tmp_path, "began")) == 5


def test_deleted_trial_is_missing_until_it_is_rerun(by_formula: SetLoss, tmp_path: Path) -> None:
    by_formula(bowl)
    trials = make_trials(tiny_tree(), [*values("optimizer.learning_rate", 1e-3, 1e-2, 6e-2)])
    run(tmp_path, trials)
    whole = table(tmp_path)
    for trial, before in zip(trials, ("finished", "finished", "diverged"), strict=True):
        assert rows(tmp_path / "results.csv")[trial.id] == before
        shutil.rmtree(trial_path(tmp_path, trial))
        read = read_results(tmp_path)
        assert [each.id for each in read.trials if each.status == "missing"] == [trial.id]
        assert read.metric == "valid/loss"
        shown = Console(file=StringIO(), width=200)
        report(tmp_path, shown)
        message = f"Missing: trial {trial.id}: {trial_path(tmp_path, trial)} was deleted"
        assert message in shown.file.getvalue()  # type: ignore[attr-defined]
        so_far = len(events(tmp_path))
        run(tmp_path, trials)
        again = [(event["trial"], event["event"]) for event in events(tmp_path)[so_far:]]
        assert again == [(trial.id, "planned"), (trial.id, "began"), (trial.id, before)]
        assert table(tmp_path) == whole


def test_deleted_trials_of_a_search_are_run_again(by_formula: SetLoss, tmp_path: Path) -> None:
    by_formula(bowl)
    search = tpe(6, SPACE, batch=3, seeds=(0, 1))
    searched(tmp_path, search)
    whole, found = table(tmp_path), study(tmp_path, search)
    gone = sorted(rows(tmp_path / "results.csv"))[::5]
    for trial in gone:
        shutil.rmtree(SweepDir(tmp_path).trial(trial).path)
    so_far = len(events(tmp_path))
    searched(tmp_path, search)
    assert {event["trial"] for event in events(tmp_path)[so_far:]} == set(gone)
    assert (table(tmp_path), study(tmp_path, search)) == (whole, found)


# Tree-structured Parzen estimators.

SPACE = {
    "optimizer.learning_rate": log_uniform(1e-4, 1e-1),
    "optimizer.weight_decay": uniform(0.0, 0.3),
    "schedule.warmup_steps": choice(1, 2, 3),
}


def bowl(config: Any, step: int) -> float:
    """A parabola about a learning rate of 1e-2, with noise of the seed; high rates diverge."""
    rate = config.optimizer.learning_rate
    if rate > 5e-2:
        return math.nan
    return (math.log10(rate) + 2) ** 2 + config.optimizer.weight_decay + 0.01 * config.seed - 1e-3 * step


def searched(path: Path, search: TPE, tree: Any = None) -> None:
    with opened(path) as sweep:
        run_tpe(sweep, search, tree or tiny_tree(), {})


def study(path: Path, search: TPE, tree: Any = None) -> list[tuple[dict[str, Any], list[float] | None, str]]:
    """Return the point, result and state of each suggestion, in order."""
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(SweepDir(path).study_file)))
    trials = optuna.load_study(study_name=hash_study(search, tree or tiny_tree()), storage=storage).trials
    return [(decode_params(search, each.params), each.values, each.state.name) for each in trials]


@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_killed_search_resumes_with_the_same_suggestions(by_formula: SetLoss, batch: int, tmp_path: Path) -> None:
    search = tpe(10, SPACE, batch, seed=batch)
    kills = by_formula(bowl)
    searched(tmp_path / "straight", search)
    assert run_with_kills(lambda: searched(tmp_path / "killed", search), kills, batch) > 5
    assert study(tmp_path / "killed", search) == study(tmp_path / "straight", search)
    assert table(tmp_path / "killed") == table(tmp_path / "straight")


def test_results_are_reported_to_the_study(by_formula: SetLoss, tmp_path: Path) -> None:
    by_formula(bowl)
    search = tpe(9, SPACE, batch=4)
    searched(tmp_path, search)
    found = study(tmp_path, search)
    assert len(found) == 9 == len(events(tmp_path, "planned"))
    for point, result, state in found:
        (trial,) = make_trials(tiny_tree(), [point])
        loss = bowl(trial.config, 12)
        assert (result, state) == ((None, "PRUNED") if math.isnan(loss) else ([loss], "COMPLETE"))
    assert {state for _, _, state in found} == {"PRUNED", "COMPLETE"}
    searched(tmp_path, search)
    assert study(tmp_path, search) == found

    assert all(json.loads(line) for line in SweepDir(tmp_path).study_file.read_text().splitlines())
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert not [file for file in files if file.read_bytes().startswith(b"SQLite")]


def test_result_of_a_point_is_the_mean_over_its_seeds(by_formula: SetLoss, tmp_path: Path) -> None:
    def loss(config: Any, step: int) -> float:
        # The last seed diverges where the decay is high.
        return math.nan if config.seed == 7 and config.optimizer.weight_decay > 0.15 else bowl(config, step)

    by_formula(loss)
    search = tpe(8, SPACE, batch=3, seeds=(0, 3, 7))
    searched(tmp_path, search)
    found = study(tmp_path, search)
    assert len(found) == 8 and len(events(tmp_path, "planned")) == 24
    for point, result, _ in found:
        configs = [trial.config for trial in make_trials(tiny_tree(), product([point], values("seed", 0, 3, 7)))]
        mean = np.mean([loss(config, 12) for config in configs])
        assert result is None if math.isnan(mean) else result == pytest.approx([mean])
    assert {state for _, _, state in found} == {"PRUNED", "COMPLETE"}


def test_suggestions_depend_on_earlier_results_and_the_seed(by_formula: SetLoss, tmp_path: Path) -> None:
    def elsewhere(config: Any, step: int) -> float:
        return (math.log10(config.optimizer.learning_rate) + 4) ** 2

    search = tpe(30, SPACE, batch=2)
    rates = {}
    for loss in (bowl, elsewhere):
        by_formula(loss)
        path = tmp_path / loss.__name__
        searched(path, search)
        rates[loss] = [point["optimizer.learning_rate"] for point, _, _ in study(path, search)]
    assert rates[bowl][:10] == rates[elsewhere][:10]
    centre = {loss: np.median(np.log10(found[15:])) for loss, found in rates.items()}
    assert abs(centre[bowl] + 2) < abs(centre[elsewhere] + 2)
    assert abs(centre[elsewhere] + 4) < abs(centre[bowl] + 4)
    by_formula(bowl)
    other = replace(search, seed=search.seed + 100)
    searched(tmp_path / "other", other)
    assert study(tmp_path / "other", other)[0] != study(tmp_path / "bowl", search)[0]


def test_options_of_any_type_are_searched(by_formula: SetLoss, tmp_path: Path) -> None:
    by_formula(bowl)
    options: dict[str, tuple[Any, ...]] = {
        "model.mixers": (("attention",), ("local_attention", "attention")),
        "optimizer.weight_decay_groups": ((("norm", 0.0), (".*", 1.0)), ((".*", 1.0),)),
        "data.seq_len": (None, 8),
    }
    search = tpe(12, SPACE | {path: choice(*each) for path, each in options.items()}, batch=4)
    for _ in range(2):
        searched(tmp_path, search)
        found = study(tmp_path, search)
        assert len(found) == 12
        for path, each in options.items():
            assert {point[path] for point, _, _ in found} == set(each)


# Invalid points.

HEADS = {
    "model.d_model": choice(16, 20, 24),
    "model.attention.n_heads": choice(1, 3, 4, 5),
    "optimizer.learning_rate": log_uniform(1e-4, 1e-1),
}


def test_invalid_points_are_skipped(by_formula: SetLoss, tmp_path: Path) -> None:
    kills = by_formula(bowl)
    search = tpe(6, HEADS, batch=3, seeds=(0, 1))
    skipped: list[str] = []

    def once(path: Path) -> None:
        with opened(path) as sweep:
            skipped[:] = run_tpe(sweep, search, tiny_tree(), {})

    once(tmp_path / "straight")
    found = study(tmp_path / "straight", search)
    # The number of heads must divide the width, and RoPE needs an even head size.
    fits = [point["model.d_model"] % (2 * point["model.attention.n_heads"]) == 0 for point, *_ in found]
    assert sum(fits) == 6 and len(skipped) == len(found) - 6 > 1
    reasons = {reason for reason in skipped if "is not divisible by config.model.attention.n_heads" in reason}
    assert reasons and all("must be even" in reason for reason in skipped if reason not in reasons)
    assert {state for (*_, state), is_fit in zip(found, fits, strict=True) if not is_fit} == {"PRUNED"}
    assert len(read_results(tmp_path / "straight").trials) == 12
    assert run_with_kills(partial(once, tmp_path / "killed"), kills, 1) > 3
    assert study(tmp_path / "killed", search) == found


IMPOSSIBLE_HERE = {
    "mesh.tensor": (2**16, "config.mesh: a trial on tensor 65536 needs 65536 devices"),
    "data.seq_len": (17, "config.data.seq_len=17"),
    "optimizer.weight_decay_groups": ((("kernel", 1.0),), "weight_decay_groups"),
}


@pytest.mark.parametrize("path", IMPOSSIBLE_HERE)
def test_points_that_cannot_run_on_this_machine_are_skipped(by_formula: SetLoss, path: str, tmp_path: Path) -> None:
    by_formula(bowl)
    value, reason = IMPOSSIBLE_HERE[path]
    usual = {"mesh.tensor": 1, "data.seq_len": None, "optimizer.weight_decay_groups": ((".*", 1.0),)}[path]
    search = tpe(6, SPACE | {path: choice(usual, value)}, batch=2)
    with opened(tmp_path) as sweep:
        skipped = run_tpe(sweep, search, tiny_tree(), {}, sweep.check)
    found = study(tmp_path, search)
    assert len(found) - len(skipped) == 6 and skipped and all(reason in each for each in skipped)
    assert all((point[path] == value) == (state == "PRUNED" and result is None) for point, result, state in found)


def test_search_with_too_few_valid_points_is_an_error(by_formula: SetLoss, tmp_path: Path) -> None:
    by_formula(bowl)
    search = tpe(2, HEADS | {"model.attention.n_heads": choice(7, 9)}, batch=2)
    with pytest.raises(
        UserError, match=r"Too few points of the search .* is not divisible by config\.model\.attention\.n_heads"
    ):
        searched(tmp_path, search)


def test_dry_run_of_a_search_prints_its_number_of_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Both are for a process that has not used JAX yet.
    monkeypatch.setattr(commands, "use_cpu_devices", lambda _: None)
    monkeypatch.setattr(commands, "enable_compilation_cache", lambda: None)
    monkeypatch.setattr(trial_batching, "estimate_cost", lambda config: trial_batching.Cost(1, 1, 1, 1.0, 1.0, 1))
    # The middle of this space, 20 channels for 4 heads, resolves; 24 channels for 5 do not.
    specs = {
        "A search of 12 trials (12 points, 4 points at a time)": tpe(12, HEADS, batch=4),
        "A search of 24 trials (12 points with 2 seeds each, 4": tpe(12, HEADS, batch=4, seeds=(0, 1)),
        "5 trials, 1 program to compile": successive_halving(seeds(5), (4,)),
        "A search of 3 trials": tpe(3, {"mesh.tensor": choice(2**16, 1)}),
    }
    for message, spec in specs.items():
        is_halving = isinstance(spec, SuccessiveHalving)
        trials = make_trials(tiny_tree(), spec.trials) if is_halving else sample_feasible_points(tiny_tree(), spec)
        console = Console(file=StringIO(), width=200)
        args = commands.SweepArgs(INFO, SweepOptions(), dry_run=True)
        status, plans = commands.run_sweep(tiny_tree(), spec, trials, {}, tmp_path / "sweep", args, console)
        assert status == 0 and plans
        text = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
        assert message in text and "Nothing was run." in text
        assert ("if none of them is pruned" in text) == is_halving
    assert not (tmp_path / "sweep").exists()


# Which edits start a new study.

OTHER_CONFIGS: dict[str, dict[str, Any]] = {
    "more steps": {"training.steps": 24},
    "a seed": {"seed": 5},
    "a stage": {"stages": ({"name": "train", "optimizer": {"b1": 0.5}},)},
}
OTHER_SEARCHES: dict[str, dict[str, Any]] = {
    "another range": {"space": SPACE | {"optimizer.learning_rate": log_uniform(1e-4, 1.0)}},
    "another kind": {"space": SPACE | {"optimizer.learning_rate": uniform(1e-4, 1e-1)}},
    "another option": {"space": SPACE | {"schedule.warmup_steps": choice(1, 2, 4)}},
    "another knob": {"space": SPACE | {"optimizer.b1": uniform(0.8, 0.9)}},
    "another seed": {"seed": 1},
    "seeds": {"seeds": (0, 1)},
}


def test_edited_config_starts_another_study(by_formula: SetLoss, tmp_path: Path) -> None:
    by_formula(bowl)
    search, changed = tpe(4, SPACE, batch=2), tiny_tree(**OTHER_CONFIGS["a stage"])
    searched(tmp_path, search)
    searched(tmp_path, search, changed)
    assert len(study(tmp_path, search)) == len(study(tmp_path, search, changed)) == 4
    assert len(events(tmp_path, "finished", "diverged")) == 8
    read = read_results(tmp_path)
    old, new = ([each.overrides for each in trials] for trials in (read.removed, read.trials))
    assert old == [json.loads(json.dumps(each)) for each, *_ in study(tmp_path, search)]
    assert new == [json.loads(json.dumps(each)) for each, *_ in study(tmp_path, search, changed)]


def test_study_name_depends_on_config_space_and_seeds_only() -> None:
    def name(tree: Any = None, n_trials: int = 4, batch: int = 2, space: Any = SPACE, **more: Any) -> str:
        return hash_study(tpe(n_trials, space, batch=batch, **more), tree or tiny_tree())

    same = [name(), name(n_trials=9, batch=3), name(tiny_tree(**{"optimizer.weight_decay": 0.25, "mesh.data": 1}))]
    other = [name(tiny_tree(**changes)) for changes in OTHER_CONFIGS.values()]
    other += [name(**changes) for changes in OTHER_SEARCHES.values()]
    assert len(set(same)) == 1 and len({*same, *other}) == 1 + len(other)


def test_extended_search_equals_a_longer_one(by_formula: SetLoss, tmp_path: Path) -> None:
    by_formula(bowl)
    long = tpe(12, SPACE, batch=4)
    searched(tmp_path / "long", long)
    for n_trials in (4, 12):
        searched(tmp_path / "extended", replace(long, n_trials=n_trials))
    assert study(tmp_path / "extended", long) == study(tmp_path / "long", long)


def test_stopped_search_reports_no_results(
    by_formula: SetLoss, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopping(launch: Launch, chunks: Sequence[Chunk]) -> None:
        signal.raise_signal(signal.SIGINT)

    search = tpe(6, SPACE, batch=3)
    by_formula(bowl)
    searched(tmp_path / "straight", search)
    with monkeypatch.context() as patch:
        patch.setitem(LAUNCHERS, "inline", stopping)
        searched(tmp_path / "stopped", search)
    assert [state for _, _, state in study(tmp_path / "stopped", search)] == ["RUNNING"] * 3
    searched(tmp_path / "stopped", search)
    assert study(tmp_path / "stopped", search) == study(tmp_path / "straight", search)


def test_search_is_locked_by_its_launcher(by_formula: SetLoss, tmp_path: Path) -> None:
    by_formula(bowl)
    with lock_run_dir(tmp_path), pytest.raises(RunLockedError):
        searched(tmp_path, tpe(2, SPACE))
    assert events(tmp_path) == []
