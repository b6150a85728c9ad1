"""Schema: defaults, the JSON form and its hash, partition into static and traced halves, and stages."""

import dataclasses
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import other_value, small_config

from configs import base
from rustgpt_jax.config import schema
from rustgpt_jax.config.schema import (
    FIELDS,
    TRACED,
    Config,
    combine,
    config_hash,
    diff,
    flatten,
    get_path,
    is_enabled,
    partition,
    replace_paths,
    stages,
    to_dict,
)
from rustgpt_jax.config.validation import flatten_tree, resolve, validate_value

CONFIGS = Path(base.__file__).parent
RECIPES = sorted(file.stem for file in CONFIGS.glob("*.py"))
TWO_STAGES = (
    {"name": "first", "data": {"corpus": "facts"}, "training": {"steps": 3, "z_loss": 1e-4}},
    {"name": "second", "data": {"corpus": "chat", "loss_mask": "assistant"}, "optimizer": {"learning_rate": 1}},
)
IN_STATIC_CONFIG = [
    path for path in FIELDS if path.split(".")[0] in {field.name for field in dataclasses.fields(schema.StaticConfig)}
]
# Whatever may be swept without compiling anew: all that is not a shape or a name.
FRACTIONAL_SHAPES = ("model.rope.fraction", "model.moe.capacity_factor")
WHOLE_NUMBERS = ("seed", "schedule.warmup_steps", "training.steps")
NUMBERS = [
    path
    for path in IN_STATIC_CONFIG
    if path in WHOLE_NUMBERS or FIELDS[path].type is float and path not in FRACTIONAL_SHAPES
]
SWITCHES = tuple(
    f"model.{name}"
    for name in (
        *("dropout", "final_logit_softcap", "attention.logit_softcap"),
        *("moe.load_balance_loss_weight", "moe.router_z_loss"),
    )
) + ("optimizer.clip_norm", "training.z_loss")


# base.py and the recipes.


def test_base_config_equals_the_defaults_of_the_schema() -> None:
    tree = base.get_config()
    assert {path for path, _ in flatten_tree(tree)} == {*FIELDS, "stages"}
    assert resolve(tree) == Config()


@pytest.mark.parametrize("path", FIELDS)
def test_every_field_has_documentation_and_a_valid_default(path: str) -> None:
    field = FIELDS[path]
    assert len(field.metadata["doc"]) > 4
    assert validate_value(path, field.default, path) == field.default == get_path(Config(), path)
    assert field.metadata["traced"] or not field.metadata["static_if_zero"]


NEW_KNOB = """
import dataclasses
from configs import base, tiny
from rustgpt_jax.config.validation import parse_overrides, resolve
from rustgpt_jax.conformance.fixtures import small_model
from rustgpt_jax.interop.config_mapping import model_config_differences
from rustgpt_jax.model.presets import FAMILIES

assert base.get_config().model.shininess == 3
model = resolve(tiny.get_config(), parse_overrides([("model.shininess", "7")])).model
assert model.shininess == 7
assert small_model(shininess=8).shininess == 8
assert all(knobs["shininess"] == 3 for knobs in FAMILIES.values())
assert model_config_differences(model, dataclasses.replace(model, shininess=4)) == {"shininess": (7, 4)}
"""


def test_a_new_knob_is_declared_in_one_place(tmp_path: Path) -> None:
    root = CONFIGS.parent
    for name in ("rustgpt_jax", "configs"):
        shutil.copytree(root / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    file = tmp_path / "rustgpt_jax" / "config" / "schema.py"
    first = "class ModelConfig:\n"
    before, after = file.read_text().split(first)
    file.write_text(f'{before}{first}    shininess: int = static_field(3, "How shiny it is.", low=1)\n{after}')
    subprocess.run([sys.executable, "-c", NEW_KNOB], cwd=tmp_path, env=os.environ | {"PYTHONPATH": ""}, check=True)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_survive_a_json_round_trip(name: str) -> None:
    config = resolve(importlib.import_module(f"configs.{name}").get_config())
    written = json.dumps(to_dict(config), allow_nan=False)
    assert resolve(json.loads(written)) == config
    assert config_hash(resolve(json.loads(written))) == config_hash(config)


# The written form and its hash.


def test_stages_survive_a_round_trip() -> None:
    config = small_config(stages=TWO_STAGES)
    assert resolve(to_dict(config)) == config
    assert to_dict(config)["stages"][0] == TWO_STAGES[0]


@pytest.mark.parametrize("path", [*FIELDS, "stages"])
def test_hash_depends_on_every_field_that_affects_results(path: str) -> None:
    config = small_config()
    if path == "stages":
        changed = small_config(stages=TWO_STAGES)
    else:
        changed = replace_paths(config, {path: other_value(get_path(config, path))})
        assert diff(config, changed) == {path: (get_path(config, path), get_path(changed, path))}
    assert list(diff(config, changed)) == [path]
    # The mesh and the trackers say where a run is computed and shown, and not what it computes.
    elsewhere = path.startswith("mesh.") or path in ("logging.trackers", "logging.project", "logging.tags")
    assert (config_hash(changed) != config_hash(config)) == (not elsewhere)


def test_hash_does_not_depend_on_spelling() -> None:
    def reversed_keys(tree: Any) -> Any:
        return {key: reversed_keys(tree[key]) for key in reversed(tree)} if isinstance(tree, dict) else tree

    config = small_config(stages=TWO_STAGES)
    respelt = reversed_keys(to_dict(config))
    respelt["optimizer"]["clip_norm"] = 1
    respelt["training"]["steps"] = 8.0
    respelt["training"]["z_loss"] = -0.0
    respelt["model"]["mixers"] = tuple(respelt["model"]["mixers"])
    assert resolve(respelt) == config
    assert config_hash(resolve(respelt)) == config_hash(config)


def test_hash_is_the_same_in_another_process() -> None:
    code = "import json, sys\nfrom rustgpt_jax.config import schema, validation"
    config = small_config(stages=TWO_STAGES)
    found = subprocess.run(
        [sys.executable, "-c", f"{code}\nprint(schema.config_hash(validation.resolve(json.load(sys.stdin))))"],
        input=json.dumps(to_dict(config)),
        env={**os.environ, "PYTHONHASHSEED": "1"},
        cwd=CONFIGS.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == config_hash(config)
    assert len(config_hash(config)) == 16


# StaticConfig and hparams.


def test_combine_is_the_inverse_of_partition() -> None:
    config = small_config(**dict.fromkeys(SWITCHES, 0.5))
    static, hparams = partition(config)
    hash(static)
    assert sorted(hparams) == sorted(NUMBERS)
    combined = combine(static, hparams)
    assert partition(dataclasses.replace(config, **vars(combined))) == (static, hparams)
    for path in IN_STATIC_CONFIG:
        value = get_path(config, path)
        assert get_path(combined, path) == (np.float32(value) if path in NUMBERS else value)


@pytest.mark.parametrize("path", IN_STATIC_CONFIG)
def test_traced_fields_are_in_hparams_and_all_others_in_the_static_config(path: str) -> None:
    config = small_config(**dict.fromkeys(SWITCHES, 0.5))
    static, hparams = partition(config)
    value = other_value(get_path(config, path))
    changed_static, changed_hparams = partition(replace_paths(config, {path: value}))
    if path in NUMBERS:
        assert (changed_static, hash(changed_static)) == (static, hash(static))
        assert get_path(static, path) == TRACED
        assert changed_hparams == hparams | {path: np.float32(value)}
    else:
        assert changed_static != static
        assert get_path(changed_static, path) == value
        assert changed_hparams == hparams


@pytest.mark.parametrize("path", sorted(set(FIELDS) - set(IN_STATIC_CONFIG)))
def test_other_fields_change_neither_static_config_nor_hparams(path: str) -> None:
    config = small_config()
    assert partition(replace_paths(config, {path: other_value(get_path(config, path))})) == partition(config)


@pytest.mark.parametrize("path", NUMBERS)
def test_zero_is_static_only_for_switches(path: str) -> None:
    config = small_config(**dict.fromkeys(SWITCHES, 0.5))
    off, hparams = partition(replace_paths(config, {path: 0}))
    assert (path in hparams) != (path in SWITCHES)
    assert (off != partition(config)[0]) == (path in SWITCHES)
    assert is_enabled(get_path(combine(off, hparams), path)) == (path not in SWITCHES)


def test_hparams_are_tracers_in_a_program_and_count_as_enabled() -> None:
    static, hparams = partition(small_config(**{"model.dropout": 0.25}))

    @jax.jit
    def rate(hparams: dict[str, Any]) -> Any:
        merged = combine(static, hparams)
        assert isinstance(merged.model.dropout, jax.core.Tracer)
        assert is_enabled(merged.model.dropout)
        assert not is_enabled(merged.training.z_loss)
        return merged.model.dropout * 2

    assert rate({path: np.float32(value) for path, value in hparams.items()}) == 0.5


# Paths.


def test_replace_paths_is_the_inverse_of_flatten() -> None:
    config, changed = small_config(), small_config(**{"model.d_model": 64, "seed": 3, "data.paths": ("x",)})
    assert flatten(config)["model.d_model"] == config.model.d_model == 32
    assert list(flatten(config)) == list(FIELDS)
    assert replace_paths(config, flatten(changed)) == changed
    assert config.model.d_model == 32


# Stages.


def test_a_config_without_stages_is_one_stage() -> None:
    config = small_config()
    (only,) = stages(config)
    assert (only.name, only.first_step, only.end_step, only.config) == ("train", 0, 8, config)


def test_stages_run_in_sequence_with_their_overrides() -> None:
    config = small_config(stages=TWO_STAGES)
    first, second = stages(config)
    assert [(stage.name, stage.first_step, stage.end_step) for stage in (first, second)] == [
        ("first", 0, 3),
        ("second", 3, 11),
    ]
    plain = dataclasses.replace(config, stages=())
    assert diff(plain, first.config) == {"training.steps": (8, 3), "training.z_loss": (0.0, 1e-4)}
    assert set(diff(plain, second.config)) == {"data.corpus", "data.loss_mask", "optimizer.learning_rate"}


def test_stages_may_only_change_fields_that_do_not_affect_the_state() -> None:
    allowed = {path for path in FIELDS if schema.may_differ_by_stage(path)}
    others = {path for path in FIELDS if path.startswith("data.")} | {"schedule.name", "training.epochs"}
    assert allowed == others | set(NUMBERS) - {"seed"}


def test_configs_are_frozen() -> None:
    config = small_config()
    for node in (config, *(getattr(config, field.name) for field in dataclasses.fields(Config))):
        if dataclasses.is_dataclass(node):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(node, dataclasses.fields(node)[0].name, 1)
