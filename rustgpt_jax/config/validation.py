"""Parsing and validation of configs. Invalid input raises a UserError of one sentence."""

import ast
import difflib
import math
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from ml_collections import ConfigDict

from rustgpt_jax.config import schema
from rustgpt_jax.config.schema import FIELDS, Config
from rustgpt_jax.errors import UserError, program_name, short_repr, suggest_names

# Ranges of the types of traced values: int32 for counts, float32 for all other numbers.
MAX_COUNT, MAX_NUMBER = 2**31 - 1, 3.4e38

# Deeper than any path of the schema, and well below Python's recursion limit.
MAX_DEPTH = 20

# A Mapping, or a ConfigDict, which has its methods but does not subclass it.
Tree = Any
TREES = (Mapping, ConfigDict)


def resolve(tree: Tree, overrides: Mapping[str, Any] = MappingProxyType({})) -> Config:
    """Build the validated Config of a nested mapping, such as a ConfigDict or a dict from JSON.

    Args:
        tree: The value of every knob, and the stages.
        overrides: Values by dotted path that replace those in the tree; `stages.NAME.path` is for one stage.

    Raises:
        UserError: A key is missing or unknown, a value has a wrong type or is out of range, or a combination of values
            cannot work.
    """
    given = dict(flatten_tree(tree))
    stages = _flatten_stages(given.pop("stages", ()))
    given |= {f"stages.{name}.{path}": value for name, own in stages.items() for path, value in own.items()}
    # The values of the whole run and of each stage, by the name in error messages.
    values: dict[str, dict[str, Any]] = {"config": {}, **{f"config.stages.{name}": {} for name in stages}}
    for path, value in {**given, **overrides}.items():
        where, knob = _split_path(path)
        if where not in values:
            name = where.removeprefix("config.stages.")
            raise UserError(f"config.stages: unknown stage {name!r}.{suggest_names(name, stages)}")
        if where != "config" and not schema.may_differ_by_stage(knob):
            raise UserError(
                f"{where}.{knob}: a stage may change data, training.steps, the schedule and numbers such as "
                f"optimizer.learning_rate; {knob} must be the same in the whole run."
            )
        values[where][knob] = value
    for path in FIELDS:
        if path not in values["config"]:
            raise UserError(
                f"config.{path} has no value. Recipes start from load_config('base'), which has every knob."
            )
    for where, own in values.items():
        own.update((knob, validate_value(knob, value, f"{where}.{knob}")) for knob, value in own.items())
    listed = (schema.StageConfig(name, tuple(sorted(values[f"config.stages.{name}"].items()))) for name in stages)
    config = schema.build(Config, values["config"] | {"stages": tuple(listed)})
    _check_epochs(config, overrides)
    for stage in schema.stages(config):
        check_combinations(stage.config)
    return config


def _check_epochs(config: Config, overrides: Iterable[str]) -> None:
    """Check that no override sets steps where epochs are set, and that the run's epochs apply to at least one stage."""
    values = {f"config.stages.{stage.name}": dict(stage.overrides) for stage in config.stages}
    has_own = [bool({schema.STEPS, schema.EPOCHS} & {*own}) for own in values.values()]
    values["config"] = {schema.STEPS: config.training.steps, schema.EPOCHS: config.training.epochs}
    for where, knob in map(_split_path, overrides):
        epochs = values[where].get(schema.EPOCHS)
        if knob == schema.STEPS and epochs is not None:
            raise UserError(
                f"{where}.{knob}={values[where][knob]} conflicts with {where}.{schema.EPOCHS}={epochs:.10g}: give one "
                f"of them (--{where}.{schema.EPOCHS}=None selects the steps)."
            )
    if config.stages and config.training.epochs is not None and all(has_own):
        first = f"config.stages.{config.stages[0].name}.{schema.EPOCHS}"
        raise UserError(
            f"config.{schema.EPOCHS}={config.training.epochs:.10g} has no effect, because each stage has its own "
            f"number of steps or epochs; set {first}, and likewise for the other stages."
        )


def flatten_tree(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the (dotted path, value) pairs of a nested mapping. Values of fields and stages are not flattened."""
    for name, value in tree.items():
        path = prefix + str(name)
        if path.count(".") > MAX_DEPTH:
            raise UserError(f"config.{path} is nested too deeply; does the config contain itself?")
        if isinstance(value, TREES) and path not in FIELDS and path != "stages":
            yield from flatten_tree(value, path + ".")
        else:
            yield path, value


def _flatten_stages(listed: Any) -> dict[str, dict[str, Any]]:
    """Return a dict from each stage's name to its values by dotted path."""
    result: dict[str, dict[str, Any]] = {}
    if not isinstance(listed, (tuple, list)) or not all(
        isinstance(stage, TREES) and "name" in stage for stage in listed
    ):
        raise UserError(
            "config.stages must be a sequence of mappings, each with a name: ({'name': 'pretrain', ...}, ...)."
        )
    for stage in listed:
        name = stage["name"]
        if not isinstance(name, str) or not name or "." in name:
            raise UserError(f"config.stages: the name of a stage must be a string without dots, got {name!r}.")
        if name in result:
            raise UserError(f"config.stages: two stages have the name {name!r}.")
        result[name] = {path: value for path, value in flatten_tree(stage) if path != "name"}
    return result


def check_value(path: str, value: Any) -> None:
    """Check the value of the knob at a dotted path on its own, independently of other knobs.

    Raises:
        UserError: The knob is unknown, or the value has a wrong type or is out of range.
    """
    where, knob = _split_path(path)
    validate_value(knob, value, f"{where}.{knob}")


def _split_path(path: str) -> tuple[str, str]:
    """Split stages.NAME.x.y into ('config.stages.NAME', 'x.y'); any other path gives ('config', path).

    Raises:
        UserError: The knob is unknown.
    """
    where, knob = "config", path
    if path.startswith("stages.") and path.count(".") > 1:
        _, name, knob = path.split(".", 2)
        where = f"config.stages.{name}"
    if knob not in FIELDS:
        raise UserError(unknown_key_message(knob, where))
    return where, knob


def parse_overrides(overrides: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Parse command-line overrides, (path, text) pairs, into one value per path, by the types of the fields.

    A list is written as a Python list or tuple. For a list of strings, any other text is a single item, commas
    included; lists of numbers or component names may also be separated by commas. An empty text is an empty list.
    The items of a list that is given several times are concatenated; for any other knob the last value wins.
    """
    values: dict[str, Any] = {}
    for path, text in overrides:
        field = FIELDS[_split_path(path)[1]]
        hint = _without_none(field.type)
        value: Any
        if text in ("None", "none") and _allows_none(field.type):
            value = None
        elif hint is str:
            value = text
        elif hint is bool and text.lower() in ("true", "false"):
            value = text.lower() == "true"
        elif hint == tuple[str, ...] and not field.metadata.get("pattern"):
            value = _parse_strings(text)
        elif field.metadata.get("pattern") and not text.startswith(("(", "[")):
            value = tuple(part.strip() for part in text.split(",")) if text else ()
        else:
            if hint == tuple[float, ...] and not text.startswith(("(", "[")):
                text = f"({text},)" if text else "()"
            try:
                value = ast.literal_eval(text)
            except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
                raise UserError(f"config.{path} must be {_describe(field.type)}, got {text!r}.") from None
        if isinstance(value, (tuple, list)):
            value = (*values[path], *value) if isinstance(values.get(path), tuple) else tuple(value)
        values[path] = value
    return values


def _parse_strings(text: str) -> tuple[str, ...]:
    if not text:
        return ()
    try:
        listed = ast.literal_eval(text) if text.startswith(("(", "[")) else None
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        listed = None
    if isinstance(listed, (tuple, list)) and all(isinstance(item, str) for item in listed):
        return tuple(listed)
    return (text,)


def validate_value(path: str, value: Any, where: str, item_type: Any = None) -> Any:
    """Convert a value to the type of the field at `path` and check its range.

    Args:
        path: The dotted path of the field.
        value: The value, or an item of it.
        where: The beginning of error messages.
        item_type: The type of an item of the value; None for the value itself.

    Raises:
        UserError: The value has a wrong type or is out of range.
    """
    field = FIELDS[path]
    hint = item_type or field.type
    if value is None and _allows_none(hint):
        return None
    if field.metadata.get("pattern") and not item_type and isinstance(value, str):
        value = (value,)
    hint = _without_none(hint)
    item_types = typing.get_args(hint)
    if item_types and isinstance(value, (tuple, list)):
        if item_types[-1] is Ellipsis:
            item_types = item_types[:1] * len(value)
        if len(item_types) == len(value):
            return tuple(validate_value(path, item, where, each) for item, each in zip(value, item_types, strict=True))
    if hint is int and is_number(value) and value == int(value):
        value = int(value)
    elif hint is float and is_number(value) and abs(value) <= sys.float_info.max:
        value = float(value) + 0.0  # -0.0 becomes 0.0, which it equals, so that equal configs have equal hashes.
    elif hint not in (bool, str) or not isinstance(value, hint):
        what = "the item " if item_type else ""
        raise UserError(f"{where} must be {_describe(field.type)}, got {what}{short_repr(value)}.")
    if isinstance(value, str):
        _check_text(value, where)
    low, high, choices = (field.metadata.get(key) for key in ("low", "high", "choices"))
    if choices and value not in choices:
        raise UserError(f"{where}: unknown {short_repr(value)}.{suggest_names(value, choices)}")
    if hint in (int, float):
        if low is not None and value < low:
            raise UserError(f"{where} must be at least {low:.10g}, got {short_repr(value)}.")
        highest = high if high is not None else MAX_COUNT if hint is int else MAX_NUMBER
        if abs(value) > highest:
            raise UserError(f"{where} must be at most {highest:.10g}, got {short_repr(value)}.")
    return value


def _check_text(text: str, where: str) -> None:
    """Check that a string contains no lone surrogates, which cannot be tokenized or written to a file.

    Raises:
        UserError: It contains one.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: {short_repr(text)} has half of a surrogate pair, so it is not text.") from None


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number, but not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf


def _allows_none(hint: Any) -> bool:
    return isinstance(hint, types.UnionType) and type(None) in typing.get_args(hint)


def _without_none(hint: Any) -> Any:
    return next(arg for arg in typing.get_args(hint) if arg is not type(None)) if _allows_none(hint) else hint


def _describe(hint: Any) -> str:
    plain = _without_none(hint)
    if typing.get_origin(plain) is tuple:
        items = typing.get_args(plain)
        names = {str: "a list of strings", float: "a list of numbers"}
        text = names.get(items[0], "a list of pairs of a string and a number")
    else:
        text = {int: "a whole number", float: "a number", bool: "True or False", str: "a string"}[plain]
    return text + (" or None" if _allows_none(hint) else "")


def unknown_key_message(path: str, where: str = "config") -> str:
    """Return the error message for an unknown path, with the most similar valid path."""
    group = [valid for valid in FIELDS if valid.startswith(path + ".")]
    if group:
        return f"{where}.{path} is a group of knobs, such as {where}.{group[0]}."
    paths_by_name: dict[str, list[str]] = {}
    for valid in FIELDS:
        paths_by_name.setdefault(valid.rsplit(".", 1)[-1], []).append(valid)
    name = path.rsplit(".", 1)[-1]
    # A field of this name in another group, rather than one with a similar path.
    near = difflib.get_close_matches(path, paths_by_name.get(name, ()), n=1, cutoff=0.0)
    near = near or difflib.get_close_matches(path, FIELDS, n=1, cutoff=0.7)
    near = near or [paths_by_name[similar][0] for similar in difflib.get_close_matches(name, paths_by_name, n=1)]
    hint = f" Did you mean {where}.{near[0]}?" if near else f" `{program_name()} explain` lists every knob."
    return f"{where}.{path}: unknown field.{hint}"


DEFAULT_PATTERNS = {"mixers": ("attention",), "feedforwards": ("swiglu",), "positions": ("rope",)}


def check_model(model: schema.ModelConfig) -> None:
    """Check combinations of model knobs.

    Raises:
        UserError: Some knobs are incompatible.
    """
    for knob in ("mixers", "feedforwards", "positions"):
        if not getattr(model, knob):
            raise UserError(f"config.model.{knob} is empty; {DEFAULT_PATTERNS[knob]!r} is the usual value.")
    _check_attention(model)
    if {"rope", "local_rope"} & set(model.positions):
        _check_rope(model)
    if "rg_lru" in model.mixers:
        width, blocks = model.recurrent.width or model.d_model, model.recurrent.blocks or 1
        if width % blocks:
            raise UserError(
                f"config.model.recurrent.blocks={blocks} does not divide the {width} channels of rg_lru "
                "(config.model.recurrent.width, or else d_model)."
            )
    if "moe" in model.feedforwards:
        _check_moe(model.moe)


def _check_attention(model: schema.ModelConfig) -> None:
    heads, kv_heads = model.attention.n_heads, model.attention.n_kv_heads
    if model.attention.head_dim is None and model.d_model % heads:
        start = min(heads, model.d_model)
        nearby = (n for distance in range(start) for n in (start - distance, start + distance))
        nearest = next(n for n in nearby if model.d_model % n == 0)
        raise UserError(
            f"config.model.d_model={model.d_model} is not divisible by config.model.attention.n_heads={heads}; the "
            f"nearest number of heads that divides it is {nearest} (or give config.model.attention.head_dim)."
        )
    if kv_heads is not None and heads % kv_heads:
        raise UserError(
            f"config.model.attention.n_heads={heads} is not divisible by config.model.attention.n_kv_heads={kv_heads}: "
            "each key/value head serves the same number of query heads."
        )
    if "latent_attention" in model.mixers and model.attention.qk_norm != "none":
        raise UserError(
            f"config.model.attention.qk_norm={model.attention.qk_norm!r} cannot be used with latent_attention, which "
            "normalizes its latent and computes no keys when it decodes."
        )


def _check_moe(moe: schema.MoEConfig) -> None:
    if moe.experts_per_token > moe.n_experts:
        raise UserError(
            f"config.model.moe.experts_per_token={moe.experts_per_token} is more than "
            f"config.model.moe.n_experts={moe.n_experts}."
        )
    if moe.experts_per_token == 1 and moe.norm_topk_prob:
        raise UserError(
            "config.model.moe.norm_topk_prob=True makes the weight of a single expert 1, so that the loss cannot train "
            "the router; with config.model.moe.experts_per_token=1 use --config.model.moe.norm_topk_prob=False."
        )


def check_combinations(config: Config) -> None:
    """Check combinations of knobs.

    Raises:
        UserError: Some knobs are incompatible.
    """
    model, training = config.model, config.training
    check_model(model)
    window = config.data.seq_len
    if window is not None and window > model.context_length:
        raise UserError(
            f"config.data.seq_len={window} is more than the model's context length, "
            f"config.model.context_length={model.context_length}."
        )
    if training.batch_size % training.grad_accum_steps:
        raise UserError(
            f"config.training.batch_size={training.batch_size} is not a multiple of "
            f"config.training.grad_accum_steps={training.grad_accum_steps}, the number of microbatches."
        )
    if training.epochs is None and config.schedule.warmup_steps > training.steps:
        raise UserError(
            f"config.schedule.warmup_steps={config.schedule.warmup_steps} is more than "
            f"config.training.steps={training.steps}; --config.schedule.warmup_steps=N sets another number."
        )
    if config.data.corpus == "files" and not config.data.paths:
        raise UserError(
            "config.data.corpus='files' needs files: give --config.data.paths=FILE (repeat it for several) or a glob."
        )
    if config.tokenizer.name == "bpe" and config.tokenizer.vocab_size is None:
        raise UserError("config.tokenizer.name='bpe' needs config.tokenizer.vocab_size.")
    if config.optimizer.name == "schedule_free" and config.optimizer.b1 == 0:
        raise UserError("config.optimizer.b1=0.0: schedule_free needs a b1 above 0; 0.9 is the usual value.")


def _check_rope(model: schema.ModelConfig) -> None:
    rope, width = model.rope, model.rotated_channels
    if width % 2:
        raise UserError(
            f"config.model.positions: RoPE rotates pairs of channels, so their number must be even, got {width} "
            f"(config.model.rope.fraction={rope.fraction:g} of {model.head_width})."
        )
    if rope.scaling in ("llama3", "yarn", "longrope") and rope.original_context is None:
        raise UserError(
            f"config.model.rope.scaling={rope.scaling!r} needs config.model.rope.original_context, the context length "
            "that the model was trained with before."
        )
    if rope.scaling != "longrope":
        return
    if "latent_attention" in model.mixers:
        raise UserError(
            "config.model.rope.scaling='longrope' cannot be used with latent_attention, which rotates another number "
            "of channels."
        )
    if rope.original_context == 1:
        raise UserError("config.model.rope.original_context must be at least 2 for rope.scaling='longrope'.")
    for knob in ("short_factors", "long_factors"):
        factors, pairs = getattr(rope, knob), width // 2
        if min(factors, default=1) < 1e-6:
            raise UserError(f"config.model.rope.{knob}: factors must be above 0, got {min(factors):g}.")
        if len(factors) != pairs:
            raise UserError(
                f"config.model.rope.{knob} has {len(factors)} numbers; RoPE rotates {pairs} pairs of channels, and "
                "longrope needs a factor for each."
            )
