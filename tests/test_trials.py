"""Trials: configs, IDs, and errors that are found before anything runs."""

import copy
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from conftest import small_tree
from hypothesis import given, settings
from hypothesis import strategies as some

from rustgpt_jax.config.schema import config_hash, get_path, stages, to_dict
from rustgpt_jax.config.validation import resolve
from rustgpt_jax.errors import UserError
from rustgpt_jax.sharding.hardware_specs import ACCELERATOR_PLUGINS
from rustgpt_jax.sweeps import choice, tpe, uniform
from rustgpt_jax.sweeps.trials import (
    ID_DIGITS,
    describe_overrides,
    make_trial,
    make_trials,
    sample_feasible_points,
)

ROOT = Path(__file__).parent.parent
RATE = "optimizer.learning_rate"
TREE = small_tree()
TWO_STAGES = small_tree(stages=({"name": "pretrain"}, {"name": "instruct", "data": {"corpus": "chat"}}))

# Values that differ from those of TREE, and are valid in any combination.
KNOBS = {
    RATE: some.floats(1e-6, 1.0),
    "seed": some.integers(1, 2**32 - 1),
    "model.dropout": some.floats(0.01, 0.9),
    "model.attention.qk_norm": some.sampled_from(["head", "projection"]),
    "training.steps": some.integers(20, 1000),
    "data.seq_len": some.none() | some.integers(2, 32),
    "logging.sample_prompts": some.lists(some.text(max_size=3), max_size=2).map(tuple),
}


@given(some.fixed_dictionaries({}, optional=KNOBS))
@settings(max_examples=20)
def test_trial_is_the_config_with_overrides_and_its_id_is_their_hash(overrides: dict[str, Any]) -> None:
    made = make_trial(TREE, overrides)
    by_hand = small_tree(**overrides)
    assert made.config == resolve(by_hand)
    assert made.id == config_hash(resolve(by_hand))[:8] and len(made.id) == ID_DIGITS == 8
    assert made.overrides == overrides
    # The config can be restored from its run folder.
    assert config_hash(resolve(to_dict(made.config)))[:8] == made.id


@given(some.lists(some.fixed_dictionaries({}, optional=KNOBS), min_size=1, max_size=4))
@settings(max_examples=20)
def test_base_config_is_not_modified(sweep: list[dict[str, Any]]) -> None:
    tree = copy.deepcopy(TWO_STAGES)
    before, swept = resolve(tree), copy.deepcopy(sweep)
    for overrides in sweep:
        make_trial(tree, overrides | {"stages.instruct.optimizer.b1": 0.5})
    assert resolve(tree) == before
    assert sweep == swept


@given(some.lists(some.sampled_from([1e-4, 1e-3, 3e-3, 1e-2]), min_size=1, max_size=6))
@settings(max_examples=20)
def test_trials_are_in_order_and_duplicates_are_errors(rates: list[float]) -> None:
    sweep = [{RATE: rate} for rate in rates]
    if len(set(rates)) == len(rates):
        trials = make_trials(TREE, iter(sweep))
        assert [each.config.optimizer.learning_rate for each in trials] == rates
        assert len({each.id for each in trials}) == len(rates)
    else:
        with pytest.raises(UserError, match="Two trials have the same config"):
            make_trials(TREE, sweep)


def test_overrides_of_stages() -> None:
    (made,) = make_trials(TWO_STAGES, [{f"stages.instruct.{RATE}": 0.5, "stages.pretrain.training.steps": 3}])
    rates = {stage.name: get_path(stage.config, RATE) for stage in stages(made.config)}
    steps = {stage.name: stage.config.training.steps for stage in stages(made.config)}
    assert rates == {"pretrain": resolve(TREE).optimizer.learning_rate, "instruct": 0.5}
    assert steps == {"pretrain": 3, "instruct": 8}
    assert describe_overrides(made.overrides) == f"stages.instruct.{RATE}=0.5, stages.pretrain.training.steps=3"


def test_overrides_survive_json() -> None:
    overrides = {RATE: 0.1 + 0.2, "logging.sample_prompts": ("a", "b"), "data.seq_len": None, "model.bias": False}
    again = json.loads(json.dumps(make_trial(TREE, overrides).overrides))
    assert make_trial(TREE, again).id == make_trial(TREE, overrides).id


# Sweeps with mistakes, and parts of their error messages.

SAME = "Two trials have the same config: "
WRONG = {
    "unknown knob": ([{"optimizer.learning_rat": 1}], f"Did you mean config.{RATE}?"),
    "no group": ([{"learning_rate": 1}], f"Did you mean config.{RATE}?"),
    "a group": ([{"optimizer": 1}], "config.optimizer is a group of knobs"),
    "an empty path": ([{"": 1}], "unknown field"),
    "a path that is no text": ([{("seed",): 1}], "('seed',)"),
    "wrong type": ([{RATE: "fast"}], f"config.{RATE} must be a number, got 'fast'"),
    "not finite": ([{RATE: float("nan")}], f"config.{RATE} must be a number, got nan"),
    "a list for a number": ([{"seed": [1, 2]}], "config.seed must be a whole number, got [1, 2]"),
    "out of range": (
        [{"seed": 1}, {"seed": -1}],
        "The trial seed=-1 is invalid: config.seed must be at least 0, got -1",
    ),
    "combination": (
        [{"model.attention.n_heads": 5}],
        "The trial model.attention.n_heads=5 is invalid: config.model.d_model=32 is not",
    ),
    "no such choice": ([{"model.remat": "ful"}], "config.model.remat: unknown 'ful'. Did you mean 'full'?"),
    "no such stage": ([{"stages.one.seed": 1}], "config.stages: unknown stage 'one'"),
    "the same twice": ([{"seed": 1}, {"seed": 1}], f"{SAME}seed=1 and seed=1"),
    "the same in other words": ([{RATE: 1e-3}, {RATE: 0.001}], f"{SAME}{RATE}=0.001 and {RATE}=0.001"),
    "whole and real": ([{RATE: 1}, {RATE: 1.0}], f"{SAME}{RATE}=1 and {RATE}=1.0"),
    "no override": ([{}, {"seed": 0}], SAME),
    "the base's own value": ([{"seed": 0, "model.bias": True}, {"seed": 0}], SAME),
    "empty": ([], "The sweep has no trials."),
    "not a mapping": ([("seed", 1)], "A sweep yields mappings of knobs to values, not ('seed', 1)."),
    "one mapping alone": ({"seed": 1}, "A sweep yields mappings of knobs to values, not 'seed'."),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_the_trial(name: str) -> None:
    sweep, message = WRONG[name]
    tree = copy.deepcopy(TREE)
    tree.model.bias = True
    before = resolve(tree)
    with pytest.raises(UserError) as error:
        make_trials(tree, sweep)
    assert message in str(error.value)
    assert str(error.value).endswith((".", "?")) and "\n" not in str(error.value)
    assert resolve(tree) == before


def test_errors_name_the_stage_of_a_knob() -> None:
    with pytest.raises(UserError, match="config.stages.instruct.optimizer.learning_rate?") as error:
        make_trials(TWO_STAGES, [{"stages.instruct.optimizer.learning_rat": 1}])
    assert "The trial stages.instruct.optimizer.learning_rat=1 is invalid" in str(error.value)
    with pytest.raises(UserError, match="must be the same in the whole run"):
        make_trials(TWO_STAGES, [{"stages.instruct.model.d_model": 8}])


def test_swept_knob_cannot_be_set_on_the_command_line() -> None:
    stage = f"stages.instruct.{RATE}"
    assert len(make_trials(TWO_STAGES, [{RATE: 1.0}, {RATE: 2.0}], fixed={"seed": 1, stage: 0.5})) == 2
    for path in RATE, stage:
        with pytest.raises(UserError, match=f"config.{path} is both set on the command line and swept"):
            make_trials(TWO_STAGES, [{"seed": 1}, {path: 1.0}], fixed={"data.seq_len": 8, path: 1.0})


# Points of a search.


def test_feasible_points_cover_all_valid_options() -> None:
    heads = {"model.attention.n_heads": choice(2, 3, 4, 5), "model.d_model": choice(16, 24, 40)}
    assert heads["model.d_model"].quantile(0.5) % heads["model.attention.n_heads"].quantile(0.5) == 0
    odd = {"model.attention.n_heads": choice(2, 3, 7), "model.d_model": choice(16, 20, 24)}
    with pytest.raises(UserError):
        make_trial(TREE, tpe(4, odd).median_point)
    for space, left_out in ((heads, set()), (odd, {7})):
        found = sample_feasible_points(TREE, tpe(4, space, seeds=(5,)))
        assert len({each.id for each in found}) > 1
        assert {each.config.seed for each in found} == {5}
        for path, each in space.items():
            assert {point.overrides[path] for point in found} == set(each.options) - left_out


WRONG_SPACES = {
    "unknown knob": ({"optimizer.learning_rat": uniform(0, 1)}, f"Did you mean config.{RATE}?"),
    "one wrong option": ({"training.batch_size": choice(2, "many")}, "must be a whole number, got 'many'"),
    "one option out of range": ({"model.dropout": choice(0.1, 7.0)}, "config.model.dropout must be at most"),
    "an end out of range": ({"model.dropout": uniform(0.1, 3.0)}, "config.model.dropout must be at most"),
    "parts of whole numbers": ({"model.n_layers": uniform(1, 3)}, "config.model.n_layers must be a whole number"),
    "no such stage": ({f"stages.one.{RATE}": uniform(0, 1)}, "unknown stage 'one'"),
    "no point": ({"model.attention.n_heads": choice(5, 7)}, "is not divisible by config.model.attention.n_heads=7"),
}


@pytest.mark.parametrize("name", WRONG_SPACES)
def test_invalid_spaces_are_errors(name: str) -> None:
    space, message = WRONG_SPACES[name]
    with pytest.raises(UserError, match=re.escape(message)):
        sample_feasible_points(TREE, tpe(4, space))


def test_searched_knob_cannot_be_set_on_the_command_line() -> None:
    with pytest.raises(UserError, match=f"config.{RATE} is both set on the command line and swept"):
        sample_feasible_points(TREE, tpe(4, {RATE: uniform(0, 1)}), fixed={RATE: 1.0})


# Without starting JAX.

BASE = """
from configs import tiny

def get_config():
    return tiny.get_config()

def sweep():
    return [{KNOBS}, {"seed": 1}]
"""
LAUNCH = """
import sys
sys.argv = ["launch.py", "sweep", "--config=swept.py"]
sys.path.insert(0, ROOT)
import runpy
import os
end = os._exit

def report(status):
    print([name for name in ("jax", "jaxlib", "flax", "optax", "orbax") if name in sys.modules], flush=True)
    end(status)

os._exit = report
runpy.run_path(ROOT + "/launch.py", run_name="__main__")
"""


def test_unknown_knob_is_an_error_before_jax_is_imported(tmp_path: Path) -> None:
    (tmp_path / "swept.py").write_text(BASE.replace("KNOBS", '"optimizer.learning_rat": 1.0'))
    code = LAUNCH.replace("ROOT", repr(str(ROOT)))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"Did you mean config.{RATE}?" in done.stderr
    assert done.stdout == "[]\n"
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["swept.py"]


@pytest.mark.skipif(any(map(find_spec, ACCELERATOR_PLUGINS)), reason="asks an accelerator for its memory")
def test_dry_run_uses_no_device_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "swept.py").write_text(BASE.replace("KNOBS", f'"{RATE}": 0.25'))
    command = [sys.executable, str(ROOT / "launch.py"), "sweep", "--config=swept.py", "--dry_run"]
    # Using a device would fail.
    environment = os.environ | {"JAX_PLATFORMS": "bogus"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{RATE}=0.25" in done.stdout and "seed=1" in done.stdout
    assert "2 trials, 1 program to compile" in done.stdout and "Nothing was run." in done.stdout
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["swept.py"]
