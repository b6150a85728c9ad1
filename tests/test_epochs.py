"""Epochs: their number of steps, and their support by each command."""

from collections import Counter
from fractions import Fraction
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from conftest import small_tree
from rich.console import Console
from test_loop import TINY, Interruption, assert_same_bits, metrics, stored_state, tiny, train

from rustgpt_jax.config.config_files import load_config_file
from rustgpt_jax.config.schema import Config, stages, uses_epochs
from rustgpt_jax.config.validation import parse_overrides, resolve
from rustgpt_jax.data.preprocess import AssetCache
from rustgpt_jax.errors import UserError
from rustgpt_jax.interop.warm_start import create_warm_started_run
from rustgpt_jax.planning.report import print_config_summary, summarize_config
from rustgpt_jax.reproduce.compare_metrics import compare_checkpoints, compare_records
from rustgpt_jax.reproduce.recorded_run import RecordedRun
from rustgpt_jax.reproduce.replay import replay_one_step
from rustgpt_jax.sharding.hardware_specs import Machine
from rustgpt_jax.sweeps.search import check_rungs
from rustgpt_jax.sweeps.search_space import SuccessiveHalving
from rustgpt_jax.sweeps.sweep_command import print_preview
from rustgpt_jax.sweeps.trials import describe_overrides, make_trials
from rustgpt_jax.workdir.run_dir import RunDir, load_config, load_origins

pytestmark = pytest.mark.usefixtures("quick_codegen")

BASE = Path(__file__).parent.parent / "configs" / "base.py"
FEW = {"data.max_documents": 6, "data.valid_fraction": 0.3}


def by_epochs(epochs: float | None, **changes: Any) -> Config:
    return tiny(**FEW, **{"training.epochs": epochs, **changes})


def resolve_steps(config: Config) -> Config:
    return AssetCache().resolve_epochs(config).config


def steps_to_read_all(config: Config, n_times: int) -> int:
    """Return the steps after which each token but the first one of the training text was a target `n_times`."""
    data = AssetCache().prepare(config)[2][0]
    batches, circle = data.training_batches(), data.store.split("train").n_tokens - 1
    seen: Counter[int] = Counter()
    step = 0
    while len(seen) < circle or min(seen.values()) < n_times:
        places = batches.locate(step)
        for start, real in zip(places.starts_B.tolist(), places.lengths_B.tolist(), strict=True):
            seen.update((start + at) % circle for at in range(real))
        step += 1
    return step


@pytest.mark.parametrize(("epochs", "batch_size", "window"), [(1, 4, None), (2, 3, 7), (3, 5, None), (1, 1, 16)])
def test_epochs_are_the_steps_that_read_all_sequences(epochs: int, batch_size: int, window: int | None) -> None:
    changes = {"training.batch_size": batch_size, "data.seq_len": window, "schedule.warmup_steps": 0}
    steps = resolve_steps(by_epochs(epochs, **changes)).training.steps
    assert steps == steps_to_read_all(by_epochs(None, **changes), epochs)


@pytest.mark.parametrize("epochs", [0.1, 0.5, 1.1, 2.7])
def test_fractional_epochs_are_exact(epochs: float) -> None:
    config = by_epochs(epochs, **{"training.batch_size": 1, "schedule.warmup_steps": 0})
    n_sequences = AssetCache().prepare(resolve_steps(config))[2][0].n_sequences
    steps, wanted = resolve_steps(config).training.steps, Fraction(str(epochs)) * n_sequences
    assert steps - 1 < wanted <= steps


def test_stages_have_their_own_steps_or_epochs() -> None:
    listed: tuple[dict[str, Any], ...] = (
        {"name": "own_steps", "training": {"steps": 5}},
        {"name": "inherits", "data": {"seq_len": 8}},
        {"name": "own_epochs", "training": {"epochs": 2.0, "steps": 77}},
    )
    config = by_epochs(1.0, stages=listed)
    assert uses_epochs(config)
    found = {stage.name: stage.config.training.steps for stage in stages(resolve_steps(config))}
    wide, narrow = (
        resolve_steps(by_epochs(epochs, **{"data.seq_len": window})) for epochs, window in ((2.0, None), (1.0, 8))
    )
    assert found == {"own_steps": 5, "inherits": narrow.training.steps, "own_epochs": wide.training.steps}
    assert not uses_epochs(resolve_steps(config)) and resolve_steps(resolve_steps(config)) == resolve_steps(config)


@pytest.mark.slow
def test_run_with_epochs_equals_the_run_with_steps(tmp_path: Path) -> None:
    constant = {"schedule.name": "constant"}
    config, path = by_epochs(1.5, **constant), tmp_path / "epochs"
    n_steps = resolve_steps(config).training.steps
    assert not train(config, path, Interruption(4, is_kill=False))[0]
    is_over, said = train(config, path)
    assert is_over and f"config.training.epochs=1.5: {n_steps} steps (" in said and f"{n_steps} steps from step" in said
    assert f"is complete: {n_steps} steps" in train(config, path)[1]
    plain = by_epochs(None, **constant, **{"training.steps": n_steps})
    assert train(plain, tmp_path / "steps")[0]
    assert load_config(path) == plain == load_config(tmp_path / "steps")
    assert load_origins(path)["training.steps"] == "config.training.epochs=1.5"
    assert_same_bits(stored_state(plain, path), stored_state(plain, tmp_path / "steps"))
    assert metrics(path) == metrics(tmp_path / "steps")
    # The recorded config has steps, so that `rerun` and `replay` need no epochs.
    assert compare_records(path, tmp_path / "steps").first_difference is None
    assert not compare_checkpoints(RunDir(path), RunDir(tmp_path / "steps")).unequal
    with RecordedRun(path, Console(file=StringIO())) as past:
        assert all(replay_one_step(past, step, with_intermediates=False)[0].is_same for step in (1, 5, n_steps))
    # More epochs are more steps.
    longer = by_epochs(2, **constant)
    assert train(longer, path)[0]
    assert load_config(path).training.steps == resolve_steps(longer).training.steps > n_steps


@pytest.mark.slow
def test_warm_started_run_supports_epochs(tmp_path: Path) -> None:
    assert train(by_epochs(None, **{"training.steps": 3}), tmp_path / "source")[0]
    said = list[str]()
    begun, _ = create_warm_started_run(str(tmp_path / "source"), tmp_path / "new", by_epochs(2), {}, said.append)
    assert begun == load_config(tmp_path / "new") == resolve_steps(by_epochs(2))
    assert any("config.training.epochs=2" in sentence for sentence in said)


def test_trials_support_epochs() -> None:
    tree = small_tree(**(TINY | FEW))
    trials = make_trials(tree, [{"training.epochs": epochs, "seed": 1} for epochs in (0.5, 1.0)])
    counts = [resolve_steps(by_epochs(epochs)).training.steps for epochs in (0.5, 1.0)]
    plain = make_trials(tree, [{"training.steps": steps, "seed": 1} for steps in counts])
    assert [(each.id, each.overrides, each.config) for each in trials] == [
        (each.id, each.overrides, each.config) for each in plain
    ]
    console = Console(file=StringIO(), width=200)
    print_preview(trials, AssetCache(), Machine("cpu", 1, 1e12, 0.0), "auto", None, console)
    assert f"training.steps={counts[1]}" in console.file.getvalue()  # type: ignore[attr-defined]
    # The steps follow from the swept knob.
    swept = make_trials(
        small_tree(**(TINY | FEW | {"training.epochs": 1.0})), [{"data.seq_len": 8}, {"data.seq_len": 16}]
    )
    assert [describe_overrides(each.overrides) for each in swept] == ["data.seq_len=8", "data.seq_len=16"]
    assert swept[0].config.training.steps > swept[1].config.training.steps == counts[1]
    with pytest.raises(UserError, match="is not before the end of training at step"):
        check_rungs(SuccessiveHalving(({},), (counts[1] + 4 - counts[1] % 4,), 0.5), trials[1:])


def recipe(*overrides: tuple[str, str]) -> Config:
    values, _ = load_config_file(str(BASE))
    return resolve(values, parse_overrides(overrides))


REFUSED = [
    ([("training.epochs", "0")], "training.epochs must be at least"),
    ([("training.epochs", "many")], "must be a number or None"),
    ([("training.epochs", "3"), ("training.steps", "50")], "give one of them"),
    ([("training.epochs", "1e9")], "training.steps must be at most 2147483647"),
    ([("training.epochs", "1e-6")], "config.schedule.warmup_steps=20 is more than config.training.steps=1"),
]


@pytest.mark.parametrize(("overrides", "words"), REFUSED)
def test_invalid_epochs_are_refused(overrides: list[tuple[str, str]], words: str) -> None:
    with pytest.raises(UserError, match=words):
        resolve_steps(recipe(*overrides, ("tokenizer.name", "byte"), ("model.context_length", "16")))


def test_steps_and_epochs_are_mutually_exclusive() -> None:
    tree = small_tree(**TINY)
    with pytest.raises(UserError, match="give one of them"):
        make_trials(small_tree(**TINY, **{"training.epochs": 1.0}), [{"training.steps": 3}])
    with pytest.raises(UserError, match="remove one of them"):
        make_trials(tree, [{"training.epochs": 1.0}], fixed={"training.steps": 8})
    listed = ({"name": "one", "training": {"steps": 5}},)
    with pytest.raises(UserError, match=r"has no effect, .* set config.stages.one.training.epochs"):
        tiny(stages=listed, **{"training.epochs": 1.0})
    assert recipe(("training.steps", "50"), ("training.epochs", "None")).training.steps == 50


def test_config_summary_shows_the_steps_of_epochs() -> None:
    console, config = Console(file=StringIO(), width=240), by_epochs(2)
    print_config_summary(summarize_config(config, {"training.epochs": "command line"}, console), console)
    said, steps = console.file.getvalue(), resolve_steps(config).training.steps  # type: ignore[attr-defined]
    assert f"{steps} steps of 4 x 16 tokens" in said and "config.training.epochs=2: " in said
