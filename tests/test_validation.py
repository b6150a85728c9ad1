"""Validation: every mistake in a config is an error of one sentence that names the field and the remedy."""

import copy
import math
from typing import Any

import pytest
from conftest import small_config, small_tree
from hypothesis import example, given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from rustgpt_jax.config.schema import FIELDS, flatten, get_path, replace_paths, to_dict
from rustgpt_jax.config.validation import parse_overrides, resolve, unknown_key_message, validate_value
from rustgpt_jax.errors import UserError

VALID = to_dict(small_config())
MISSING = "(missing)"


def edited(changes: dict[str, Any]) -> dict[str, Any]:
    """Return a valid config as nested dicts, with raw values set at dotted paths; MISSING removes one."""
    tree = copy.deepcopy(VALID)
    for path, value in changes.items():
        *groups, name = path.split(".")
        node = tree
        for group in groups:
            if not isinstance(node.get(group), dict):
                node[group] = {}
            node = node[group]
        if value is MISSING:
            del node[name]
        else:
            node[name] = value
    return tree


def stage(name: Any = "one", **groups: Any) -> dict[str, Any]:
    return {"name": name, **groups}


MISTAKES: list[tuple[dict[str, Any], list[str]]] = [
    # Keys.
    ({"model.n_layer": 3}, ["config.model.n_layer:", "unknown field", "config.model.n_layers?"]),
    ({"learning_rate": 1.0}, ["config.learning_rate:", "config.optimizer.learning_rate?"]),
    ({"optimiser.learning_rate": 1.0}, ["config.optimiser.learning_rate:", "config.optimizer.learning_rate?"]),
    ({"model.qqq": 1}, ["config.model.qqq:", "`rustgpt explain` lists every knob"]),
    ({"model": 3}, ["config.model", "group"]),
    ({"model.n_layers": {"x": 1}}, ["config.model.n_layers must be a whole number"]),
    ({"model.n_layers": MISSING}, ["config.model.n_layers has no value", "load_config('base')"]),
    ({"model": MISSING}, ["config.model.vocab_size has no value"]),
    # Types.
    ({"model.n_layers": "2"}, ["config.model.n_layers must be a whole number, got '2'"]),
    ({"model.n_layers": 2.5}, ["config.model.n_layers must be a whole number, got 2.5"]),
    ({"model.n_layers": True}, ["config.model.n_layers must be a whole number, got True"]),
    ({"model.n_layers": None}, ["config.model.n_layers must be a whole number, got None"]),
    ({"model.n_layers": math.inf}, ["config.model.n_layers must be a whole number, got inf"]),
    ({"model.d_ff": "wide"}, ["config.model.d_ff must be a whole number or None, got 'wide'"]),
    ({"optimizer.learning_rate": "1e-3"}, ["config.optimizer.learning_rate must be a number, got '1e-3'"]),
    ({"optimizer.learning_rate": math.nan}, ["config.optimizer.learning_rate must be a number, got nan"]),
    ({"optimizer.learning_rate": math.inf}, ["config.optimizer.learning_rate must be a number, got inf"]),
    ({"optimizer.learning_rate": 10**400}, ["config.optimizer.learning_rate must be a number"]),
    ({"model.bias": 1}, ["config.model.bias must be True or False, got 1"]),
    ({"model.norm": 1}, ["config.model.norm must be a string, got 1"]),
    ({"data.paths": "a.txt"}, ["config.data.paths must be a list of strings, got 'a.txt'"]),
    ({"data.paths": ["a.txt", 1]}, ["config.data.paths must be a list of strings, got the item 1"]),
    (
        {"optimizer.weight_decay_groups": [["norm"]]},
        ["weight_decay_groups must be a list of pairs of a string and a number, got the item ['norm']"],
    ),
    ({"optimizer.weight_decay_groups": [["norm", "x"]]}, ["must be a list of pairs of a string and a number"]),
    # Ranges and names.
    ({"model.n_layers": 0}, ["config.model.n_layers must be at least 1, got 0"]),
    ({"model.context_length": -3}, ["config.model.context_length must be at least 2, got -3"]),
    ({"model.dropout": 1}, ["config.model.dropout must be at most 0.99, got 1"]),
    ({"optimizer.learning_rate": -0.5}, ["config.optimizer.learning_rate must be at least 0, got -0.5"]),
    ({"optimizer.momentum": 1.0000001}, ["config.optimizer.momentum must be at most 1, got 1.0000001"]),
    ({"seed": 2**32}, ["config.seed must be at most 4294967295, got 4294967296"]),
    ({"seed": 10**400}, ["config.seed must be at most 4294967295, got 1000"]),
    ({"model.d_ff": 2**31}, ["config.model.d_ff must be at most 2147483647, got 2147483648"]),
    ({"model.norm": [[[]]] * 300}, ["config.model.norm must be a string, got [[[]], [[]], "]),
    ({"optimizer.learning_rate": 1e39}, ["config.optimizer.learning_rate must be at most 3.4e+38, got 1e+39"]),
    (
        {"optimizer.weight_decay_groups": [["norm", -1e39]]},
        ["config.optimizer.weight_decay_groups must be at most 3.4e+38, got -1e+39"],
    ),
    ({"data.split": "documents"}, ["config.data.split: unknown 'documents'", "'document'?", "document, tail"]),
    ({"model.dtype": "float16"}, ["config.model.dtype", "bfloat16, float32"]),
    # Combinations.
    ({"model.attention.n_heads": 5}, ["model.d_model=32", "model.attention.n_heads=5", "is 4", "head_dim"]),
    ({"model.d_model": 10**9 + 1, "model.attention.n_heads": 4}, ["model.attention.n_heads=4"]),
    ({"model.attention.n_heads": 10**9}, ["is 32"]),
    ({"model.attention.n_kv_heads": 3}, ["model.attention.n_heads=4", "model.attention.n_kv_heads=3"]),
    ({"model.attention.n_kv_heads": 8}, ["model.attention.n_heads=4", "model.attention.n_kv_heads=8"]),
    ({"model.attention.n_heads": 32}, ["rope", "even", "got 1"]),
    ({"model.attention.head_dim": 7}, ["rope", "even", "got 7"]),
    ({"model.mixers": []}, ["model.mixers", "('attention',)"]),
    ({"model.positions": []}, ["model.positions", "('rope',)"]),
    ({"model.rope.fraction": 0.4, "model.attention.head_dim": 8}, ["got 3", "rope.fraction=0.4 of 8"]),
    ({"model.rope.scaling": "yarn"}, ["model.rope.scaling='yarn'", "model.rope.original_context"]),
    ({"model.rope.scaling": "longrope"}, ["model.rope.scaling='longrope'", "model.rope.original_context"]),
    (
        {"model.rope.scaling": "longrope", "model.rope.original_context": 31, "model.rope.short_factors": (1.0, 2.0)},
        ["rope.short_factors has 2 numbers", "a factor for each"],
    ),
    ({"model.rope.long_factors": ["a"]}, ["config.model.rope.long_factors must be a list of numbers"]),
    ({"model.mixers": "rg_lru", "model.recurrent.blocks": 3}, ["recurrent.blocks=3", "does not divide"]),
    ({"model.feedforwards": "moe", "model.moe.n_experts": 1}, ["experts_per_token=2", "n_experts=1"]),
    ({"data.seq_len": 33}, ["data.seq_len=33", "context_length=32"]),
    ({"training.grad_accum_steps": 3}, ["training.batch_size=4", "grad_accum_steps=3"]),
    ({"schedule.warmup_steps": 9}, ["schedule.warmup_steps=9", "training.steps=8"]),
    ({"data.corpus": "files"}, ["data.corpus='files'", "--config.data.paths"]),
    ({"tokenizer.vocab_size": None}, ["bpe", "config.tokenizer.vocab_size"]),
    # Stages.
    ({"stages": "x"}, ["config.stages must be a sequence of mappings"]),
    ({"stages": {"one": {}}}, ["config.stages must be a sequence of mappings"]),
    ({"stages": [3]}, ["config.stages must be a sequence of mappings"]),
    ({"stages": [{"data": {}}]}, ["config.stages", "name"]),
    ({"stages": [stage(3)]}, ["config.stages", "name", "got 3"]),
    ({"stages": [stage("")]}, ["config.stages", "name", "got ''"]),
    ({"stages": [stage("a.b")]}, ["config.stages", "name", "got 'a.b'"]),
    ({"stages": [stage("one"), stage("one")]}, ["config.stages", "two stages", "'one'"]),
    ({"stages": [stage(data={"corpu": "x"})]}, ["config.stages.one.data.corpu:", "config.stages.one.data.corpus?"]),
    ({"stages": [stage(data=3)]}, ["config.stages.one.data", "group"]),
    ({"stages": [stage(model={"n_layers": 3})]}, ["config.stages.one.model.n_layers", "same in the whole run"]),
    ({"stages": [stage(seed=3)]}, ["config.stages.one.seed", "same in the whole run"]),
    ({"stages": [stage(training={"steps": 0})]}, ["config.stages.one.training.steps must be at least 1"]),
    ({"stages": [stage(training={"steps": 1})]}, ["schedule.warmup_steps=2", "training.steps=1"]),
    (
        {"stages": [stage(optimizer={"learning_rate": math.inf})]},
        ["config.stages.one.optimizer.learning_rate must be"],
    ),
    ({"stages": [stage(data={"corpus": "files"})]}, ["data.corpus='files'"]),
]


@pytest.mark.parametrize(("changes", "said"), MISTAKES, ids=lambda value: str(value)[:60])
def test_mistakes_are_errors_with_a_hint(changes: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        resolve(edited(changes))
    assert [part for part in said if part not in str(caught.value)] == []


@pytest.mark.parametrize("path", [path for path in FIELDS if "None" in str(FIELDS[path].type)])
def test_optional_fields_accept_none(path: str) -> None:
    assert get_path(resolve(edited({"tokenizer.name": "word", path: None})), path) is None


@pytest.mark.parametrize("path", [path for path in FIELDS if "None" not in str(FIELDS[path].type)])
def test_other_fields_reject_none(path: str) -> None:
    with pytest.raises(UserError, match=f"config.{path} must be .*, got None"):
        resolve(edited({path: None}))


@pytest.mark.parametrize("path", [path for path in FIELDS if FIELDS[path].metadata.get("low") is not None])
def test_ranges_are_inclusive(path: str) -> None:
    for end, step in (("low", -1), ("high", 1)):
        value = FIELDS[path].metadata[end]
        if value is not None:
            assert validate_value(path, value, path) == value
            with pytest.raises(UserError, match=f"{path} must be at (least|most) .*, got"):
                validate_value(path, value + step, path)


def test_whole_floats_become_ints_and_ints_become_floats() -> None:
    config = resolve(edited({"training.steps": 1e3, "optimizer.clip_norm": 2}))
    assert (repr(config.training.steps), repr(config.optimizer.clip_norm)) == ("1000", "2.0")


def test_huge_numbers_are_errors() -> None:
    with pytest.raises(UserError, match="must be at most 2147483647, got a number with thousands of digits"):
        resolve(edited({"model.d_ff": 10**5000}))


@pytest.mark.parametrize("value", [{"x": {"y": 1}}, ConfigDict({"x": {"y": 1}})])
def test_mappings_are_rejected_as_values(value: Any) -> None:
    with pytest.raises(UserError, match=r"config\.model\.norm must be a string"):
        resolve(edited({"model.norm": value}))


# The command line.


def parse(path: str, text: str) -> Any:
    return parse_overrides([(path, text)])[path]


@pytest.mark.parametrize("path", FIELDS)
def test_values_survive_a_round_trip_through_text(path: str) -> None:
    for config in (
        small_config(),
        small_config(**{"data.paths": ("a.txt", "b c.txt"), "model.attention.n_kv_heads": 2}),
    ):
        value = get_path(config, path)
        assert validate_value(path, parse(path, str(value)), path) == value


TEXT_LISTS = ("logging.sample_prompts", "data.paths")


@pytest.mark.parametrize("path", TEXT_LISTS)
@given(items=st.lists(st.text(min_size=1, max_size=12).filter(lambda text: text[0] not in "([")))
@example(items=["Once upon a time, there was", " a,b.txt "])
def test_lists_of_strings_take_one_item_per_flag_or_a_python_list(path: str, items: list[str]) -> None:
    assert parse_overrides([(path, item) for item in items]).get(path, ()) == tuple(items)
    assert parse(path, repr(items)) == parse(path, repr(tuple(items))) == tuple(items)


@pytest.mark.parametrize(
    "text", ["(softly) Hello", "[INST] hi [/INST]", "[1, 2]", "(a", "[" * 9000, "a, b", "'a', 'b'"]
)
def test_other_text_is_a_single_item(text: str) -> None:
    assert parse("logging.sample_prompts", text) == (text,)


def test_repeated_list_flags_append_and_other_flags_replace() -> None:
    given_flags = [
        ("model.mixers", "a,b"),
        ("seed", "1"),
        ("model.mixers", "('c',)"),
        ("seed", "2"),
        ("data.paths", ""),
    ]
    expected = {"model.mixers": ("a", "b", "c"), "seed": 2, "data.paths": ()}
    assert parse_overrides([*given_flags, ("optimizer.weight_decay_groups", "[('x', 1)]")]) == expected | {
        "optimizer.weight_decay_groups": (("x", 1),)
    }


@pytest.mark.parametrize("path", [*TEXT_LISTS, "model.norm"])
def test_lone_surrogates_are_errors(path: str) -> None:
    value = "a\udcffb" if path == "model.norm" else ("fine", "a\udcffb")
    with pytest.raises(UserError, match=rf"config\.{path}: 'a\\udcffb' has half of a surrogate pair"):
        resolve(edited({path: value}))


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("training.steps", "1e3", 1000),
        ("model.rope.short_factors", "1,2.5", (1.0, 2.5)),
        ("model.rope.short_factors", "(1.0,)", (1.0,)),
        ("model.bias", "true", True),
        ("model.bias", "False", False),
        ("model.d_ff", "none", None),
        ("model.norm", "None", "None"),
        ("data.paths", "a.txt, b.txt", ("a.txt, b.txt",)),
        ("model.mixers", "attention, rg_lru", ("attention", "rg_lru")),
        ("data.paths", "", ()),
        ("data.paths", "['a,b.txt']", ("a,b.txt",)),
        ("optimizer.weight_decay_groups", "[('x', 1)]", (("x", 1.0),)),
        ("stages.one.training.steps", "7", 7),
    ],
)
def test_text_is_parsed_by_the_type_of_its_field(path: str, text: str, value: Any) -> None:
    known = path.removeprefix("stages.one.")
    assert validate_value(known, parse(path, text), path) == value


@pytest.mark.parametrize(
    ("path", "text", "said"),
    [
        ("model.n_layers", "two", "config.model.n_layers must be a whole number, got 'two'"),
        ("model.n_layers", "", "config.model.n_layers must be a whole number, got ''"),
        ("model.bias", "yes", "config.model.bias must be True or False, got 'yes'"),
        ("model.d_ff", "{[]: 1}", "config.model.d_ff must be a whole number or None"),
        ("seed", "-" * 100_000 + "1", "config.seed must be a whole number"),
        ("model.n_layer", "2", "config.model.n_layers?"),
        ("stages.one.training.step", "2", "training.steps?"),
        ("stages.one", "2", "unknown field"),
    ],
    ids=lambda value: value[:30],
)
def test_unparsable_text_is_an_error(path: str, text: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(path, text)
    assert said in str(caught.value)


@pytest.mark.parametrize("kind", [dict, ConfigDict])
def test_overrides_reach_every_field_and_into_stages(kind: Any) -> None:
    target = replace_paths(small_config(), {"data.paths": ("x",), "model.n_layers": 4, "data.seq_len": 8})
    tree = small_tree(stages=(kind(stage("one", data={"corpus": "chat"})), kind(stage("two"))))
    before = copy.deepcopy(tree)
    of_stages = {"stages.one.data.corpus": "facts", "stages.two.optimizer.learning_rate": 1}
    config = resolve(tree, flatten(target) | of_stages)
    assert tree == before
    assert flatten(config) == flatten(target)
    assert [dict(one.overrides) for one in config.stages] == [
        {"data.corpus": "facts"},
        {"optimizer.learning_rate": 1.0},
    ]


def test_overrides_are_validated() -> None:
    tree = small_tree(stages=(stage("one", data={"corpus": "chat"}),))
    for path, value in {
        "model.n_layers": "two",
        "model.norm": 3,
        "data.seq_len": "x",
        "stages.one.data.corpus": 3,
    }.items():
        with pytest.raises(UserError, match=f"config.{path} must be"):
            resolve(tree, {path: value})


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("model.n_layer", "config.model.n_layers?"),
        ("model", "group"),
        ("stages", "config.stages"),
        ("stages.on.training.steps", "unknown stage 'on'. Did you mean 'one'?"),
        ("stages.one.training.step", "config.stages.one.training.steps?"),
        ("stages.one", "config.stages.one"),
    ],
)
def test_override_of_an_unknown_path_is_an_error(path: str, said: str) -> None:
    tree = small_tree(stages=(stage("one"),))
    with pytest.raises(UserError) as caught:
        resolve(tree, {path: 1})
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("path", "suggestion"),
    [
        ("model.n_heads", "model.attention.n_heads"),
        ("model.theta", "model.rope.theta"),
        ("optimizr.name", "optimizer.name"),
        ("optimizer.learning_rat", "optimizer.learning_rate"),
        ("model.n_head", "model.attention.n_heads"),
    ],
)
def test_unknown_field_suggests_the_field_of_that_name_or_a_similar_one(path: str, suggestion: str) -> None:
    assert unknown_key_message(path).endswith(f"Did you mean config.{suggestion}?")
