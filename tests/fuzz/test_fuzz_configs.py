"""Configs with random edits either resolve, hash, partition and have shapes, or raise an error of one sentence."""

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from fuzzing import ODD_TEXTS, Sandbox, corrupt_bytes, edit_tree, max_cases, run_or_refuse, write
from fuzzing import sandbox as sandbox
from hypothesis import given
from hypothesis import strategies as st

from rustgpt_jax.config.schema import FIELDS, Config, combine, config_hash, partition, replace_paths, stages, to_dict
from rustgpt_jax.config.validation import TREES, parse_overrides, resolve
from rustgpt_jax.errors import UserError
from rustgpt_jax.model.flops import parameter_shapes
from rustgpt_jax.sharding.sharding_plan import check_batch_shards
from rustgpt_jax.training.config_checks import validate_components
from rustgpt_jax.training.optimizers import check_decay_groups
from rustgpt_jax.workdir.run_dir import load_config, load_origins, prepare_run_dir

ROOT = Path(__file__).parent.parent.parent
# Shapes of more than this take more time than a case has.
MAX_LAYERS = 30


def recipes() -> dict[str, Any]:
    """Return the config of each file that defines one."""
    files = sorted([*(ROOT / "configs").glob("*.py"), *(ROOT / "experiments").glob("*.py")])
    modules = (importlib.import_module(f"{file.parent.name}.{file.stem}") for file in files)
    return {module.__name__: plain(module.get_config()) for module in modules if hasattr(module, "get_config")}


def plain(node: Any) -> Any:
    """Convert a ConfigDict to dicts; tuples are kept."""
    if isinstance(node, TREES):
        return {key: plain(value) for key, value in node.items()}
    return tuple(plain(item) for item in node) if isinstance(node, (tuple, list)) else node


RECIPES = recipes()


def use(config: Config) -> Config | None:
    """Do what a verb does with a config before it compiles anything; return the config after a JSON round trip."""
    validate_components(config)
    for stage in stages(config):
        check_batch_shards(stage.config, stage.config.seq_len, 2)
        combined = combine(*partition(stage.config))
        assert partition(dataclasses.replace(stage.config, **vars(combined))) == partition(stage.config)
    model = config.model
    if model.n_layers < MAX_LAYERS or model.period < MAX_LAYERS:
        sized = replace_paths(config, {"model.vocab_size": model.vocab_size or 300})
        check_decay_groups(parameter_shapes(sized.model), config.optimizer)
    return resolve(json.loads(json.dumps(to_dict(config))))


def require_same(config: Config, again: Config | None) -> None:
    """Assert that a config survived a round trip."""
    assert again is None or (again == config and config_hash(again) == config_hash(config))


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_valid(name: str, sandbox: Sandbox) -> None:
    assert use(resolve(RECIPES[name])) == resolve(RECIPES[name])


@max_cases(1000)
@given(st.sampled_from(sorted(RECIPES)).flatmap(lambda name: edit_tree(RECIPES[name])))
def test_edited_config_resolves_or_is_an_error(sandbox: Sandbox, tree: Any) -> None:
    config = run_or_refuse(lambda: resolve(tree)) if isinstance(tree, TREES) else None
    if config is not None:
        require_same(config, run_or_refuse(lambda: use(config)))


paths = st.sampled_from([*FIELDS, "stages.instruct.training.steps", "stages.pretrain.data.corpus"]).flatmap(
    lambda path: st.sampled_from((path, path, path, path[:-1], path.upper(), path.split(".")[0], f"{path}.x"))
)
texts = st.text(max_size=20) | st.sampled_from(
    (*ODD_TEXTS, "[" * 3000, "-" * 3000 + "1", "1+1j", "9" * 5000, "(1,", "{}", "b''", "1_0", "0x10", "a,,b", "['a',]")
)


@max_cases(500)
@given(st.lists(st.tuples(paths | texts, texts | st.sampled_from(("0", "1", "2", "64", "True", "0.5"))), max_size=3))
def test_any_overrides_resolve_or_are_an_error(sandbox: Sandbox, given: list[tuple[str, str]]) -> None:
    config = run_or_refuse(lambda: resolve(RECIPES["configs.rustgpt"], parse_overrides(given)))
    if config is not None:
        require_same(config, run_or_refuse(lambda: use(config)))


def record(name: str) -> dict[str, Any]:
    """Return the contents of config.json for a recipe."""
    config = resolve(RECIPES[name])
    return {"config": to_dict(config), "origins": dict.fromkeys(FIELDS, "base"), "hash": config_hash(config)}


RECORD = record("configs.rustgpt")
WRITTEN = json.dumps(RECORD, indent=2).encode()
records = corrupt_bytes(WRITTEN) | edit_tree(RECORD).map(lambda tree: json.dumps(tree).encode()) | st.none()


@max_cases(300)
@given(records)
def test_edited_config_file_is_read_or_is_an_error(sandbox: Sandbox, data: bytes | None) -> None:
    with sandbox.case() as folder:
        write(folder / "config.json", data)
        config = run_or_refuse(lambda: load_config(folder))
        origins = run_or_refuse(lambda: load_origins(folder))
        assert (config is None) <= (origins is None)
        run_or_refuse(lambda: prepare_run_dir(folder, resolve(RECIPES["configs.rustgpt"])))
        if config is not None:
            require_same(config, run_or_refuse(lambda: use(config)))


@pytest.mark.parametrize(
    ("knob", "name", "arguments"),
    [
        ("tokenizer.name", "json:loads", "texts, vocab_size"),
        ("model.rope.scaling", "math:pi", "frequencies, config"),
        ("optimizer.name", "json:loads", "config, rate"),
        ("schedule.name", "json:loads", "step, steps, schedule"),
        ("data.corpus", "os:getcwd", "config"),
        ("data.corpus", "json:decoder", "config"),
    ],
)
def test_unsuitable_functions_are_errors_before_a_call(knob: str, name: str, arguments: str) -> None:
    config = replace_paths(resolve(RECIPES["configs.tiny"]), {knob: name})
    with pytest.raises(UserError, match=rf"config\.{knob}='{name}' is not a function of \({arguments}\)\."):
        validate_components(config)


def test_error_message_is_one_short_line() -> None:
    text = str(UserError("first\nsecond\x1b[2J " + "word " * 300 + "Did you mean this?"))
    assert text.startswith("first\\nsecond\\x1b[2J") and text.endswith("Did you mean this?") and len(text) < 600
