"""Parsing and validation of configs. Invalid input raises a UserError of one sentence."""

import ast
import contextlib
import difflib
import math
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from rustgpt_jax.config import schema
from rustgpt_jax.config.schema import FIELDS, Config
from rustgpt_jax.errors import UserError, short_repr, suggest_names

# Ranges of the types of traced values: int32 for counts, float32 for all other numbers.
MAX_COUNT, MAX_NUMBER = 2**31 - 1, 3.4e38

# Deeper than any path of the schema, and well below Python's recursion limit.
MAX_DEPTH = 20

# A Mapping, or a ConfigDict, which has its methods but does not subclass it.
Tree = Any
TREES = (Mapping, ConfigDict)


def resolve(tree: Tree) -> Config:
    """Convert a nested mapping, such as a ConfigDict or a dict from JSON, into a validated Config.

    Raises:
        UserError: A key is missing or unknown, a value has a wrong type or is out of range, or a combination of values
            cannot work.
    """
    tree = dict(tree.items())
    listed_stages = tree.pop("stages", ())
    given = dict(flatten_tree(tree))
    for path in given:
        if path not in FIELDS:
            raise UserError(unknown_key_message(path))
    for path in FIELDS:
        if path not in given:
            raise UserError(f"config.{path} has no value. Recipes start from configs/base.py, which has every knob.")
    values = {path: validate_value(path, value, f"config.{path}") for path, value in given.items()}
    config = schema.build(Config, values | {"stages": _resolve_stages(listed_stages)})
    _check_epochs(config)
    for stage in schema.stages(config):
        check_combinations(stage.config)
    return config


def _check_epochs(config: Config) -> None:
    """Check that the epochs of the run apply to at least one stage: one without its own steps or epochs."""
    own = [dict(stage.overrides) for stage in config.stages]
    if own and config.training.epochs is not None and all({schema.STEPS, schema.EPOCHS} & {*each} for each in own):
        first = f"config.stages.{config.stages[0].name}.{schema.EPOCHS}"
        raise UserError(
            f"config.{schema.EPOCHS}={config.training.epochs:.10g} has no effect, because each stage has its own "
            f"number of steps or epochs; set {first}, and likewise for the other stages."
        )


def flatten_tree(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the (dotted path, value) pairs of a nested mapping. The value of a schema field is never flattened."""
    for name, value in tree.items():
        path = prefix + str(name)
        if path.count(".") > MAX_DEPTH:
            raise UserError(f"config.{path} is nested too deeply; does the config contain itself?")
        if isinstance(value, TREES) and path not in FIELDS:
            yield from flatten_tree(value, path + ".")
        else:
            yield path, value


def _resolve_stages(listed: Any) -> tuple[schema.StageConfig, ...]:
    result: list[schema.StageConfig] = []
    if not isinstance(listed, (tuple, list)) or not all(
        isinstance(stage, TREES) and "name" in stage for stage in listed
    ):
        raise UserError("config.stages is a sequence of mappings, each with a name: ({'name': 'pretrain', ...}, ...).")
    for stage in listed:
        name = stage["name"]
        if not isinstance(name, str) or not name or "." in name:
            raise UserError(f"config.stages: the name of a stage is a string without dots, not {name!r}.")
        where = f"config.stages.{name}"
        if any(name == earlier.name for earlier in result):
            raise UserError(f"config.stages: two stages have the name {name!r}.")
        overrides = {path: value for path, value in flatten_tree(stage) if path != "name"}
        for path, value in overrides.items():
            if path not in FIELDS:
                raise UserError(unknown_key_message(path, where))
            if not schema.may_differ_by_stage(path):
                raise UserError(
                    f"{where}.{path}: a stage may change data, training.steps, the schedule and numbers such as "
                    f"optimizer.learning_rate; {path} must be the same in the whole run."
                )
            overrides[path] = validate_value(path, value, f"{where}.{path}")
        result.append(schema.StageConfig(name, tuple(sorted(overrides.items()))))
    return tuple(result)


def override(tree: Any, values: Mapping[str, Any]) -> None:
    """Set values by dotted path in a ConfigDict, in place. `stages.NAME.path` sets a value for one stage.

    Raises:
        UserError: A path or a stage is unknown, or a number of steps is given where a number of epochs is set.
    """
    for path, value in values.items():
        node, where, knob = _find_stage(tree, path)
        if knob not in FIELDS:
            raise UserError(unknown_key_message(knob, where))
        *groups, name = knob.split(".")
        for group in groups:
            if group not in node:
                node[group] = {}
            node = node[group]
        with node.ignore_type() if isinstance(node, ConfigDict) else contextlib.nullcontext():
            node[name] = value
    for path, value in values.items():
        node, where, knob = _find_stage(tree, path)
        epochs = dict(flatten_tree(node)).get(schema.EPOCHS) if knob == schema.STEPS else None
        if epochs is not None:
            raise UserError(
                f"{where}.{knob}={value} conflicts with {where}.{schema.EPOCHS}={short_repr(epochs)}: give one of them "
                f"(--{where}.{schema.EPOCHS}=None selects the steps)."
            )


def _find_stage(tree: Any, path: str) -> tuple[Any, str, str]:
    """Return the part of a config that a path refers to, the name of that part, and the path inside it."""
    where, knob = _in_stage(path)
    if where == "config":
        return tree, where, knob
    name, named = where.rsplit(".", 1)[-1], {stage["name"]: stage for stage in tree["stages"]}
    if name not in named:
        raise UserError(f"config.stages: unknown stage {name!r}.{suggest_names(name, named)}")
    return named[name], where, knob


def check_value(path: str, value: Any) -> None:
    """Check the value of the knob at a dotted path on its own, independently of other knobs.

    Raises:
        UserError: The knob is unknown, or the value has a wrong type or is out of range.
    """
    where, knob = _in_stage(path)
    if knob not in FIELDS:
        raise UserError(unknown_key_message(knob, where))
    validate_value(knob, value, f"{where}.{knob}")


def _in_stage(path: str) -> tuple[str, str]:
    """Split stages.NAME.x.y into ('config.stages.NAME', 'x.y'); any other path gives ('config', path)."""
    if path.startswith("stages.") and path.count(".") > 1:
        _, name, knob = path.split(".", 2)
        return f"config.stages.{name}", knob
    return "config", path


def parse(path: str, text: str) -> Any:
    """Parse the text of a command-line override according to the type of its field.

    A list is written as a Python list or tuple. For a list of strings, any other text is a single item, commas
    included; lists of numbers or component names may also be separated by commas. An empty text is an empty list.
    """
    where, knob = _in_stage(path)
    if knob not in FIELDS:
        raise UserError(unknown_key_message(knob, where))
    hint = FIELDS[knob].type
    if text in ("None", "none") and _allows_none(hint):
        return None
    hint = _without_none(hint)
    if hint is str:
        return text
    if hint == tuple[float, ...] and not text.startswith(("(", "[")):
        text = f"({text},)" if text else "()"
    if FIELDS[knob].metadata.get("pattern") and not text.startswith(("(", "[")):
        return tuple(part.strip() for part in text.split(",")) if text else ()
    if hint == tuple[str, ...] and not FIELDS[knob].metadata.get("pattern"):
        return _parse_strings(text)
    if hint is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        raise UserError(f"config.{path} takes {_describe(FIELDS[knob].type)}, not {text!r}.") from None


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


def parse_all(overrides: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Parse command-line overrides, (path, text) pairs, into one value per path.

    The items of a list that is given several times are concatenated; for any other knob the last value wins.
    """
    values: dict[str, Any] = {}
    for path, text in overrides:
        value = parse(path, text)
        if isinstance(value, (tuple, list)) and isinstance(values.get(path), tuple):
            value = (*values[path], *value)
        values[path] = tuple(value) if isinstance(value, list) else value
    return values


def validate_value(path: str, value: Any, where: str) -> Any:
    """Convert a value to the type of the field at `path` and check its range.

    Raises:
        UserError: The value has a wrong type or is out of range; the message starts with `where`.
    """
    field = FIELDS[path]
    if field.metadata.get("pattern") and isinstance(value, str):
        value = (value,)
    try:
        value = _convert(field.type, value)
    except TypeError:
        raise UserError(f"{where} takes {_describe(field.type)}, not {short_repr(value)}.") from None
    _check_text(value, where)
    low, high, choices = (field.metadata.get(key) for key in ("low", "high", "choices"))
    if value is None:
        return value
    if choices and value not in choices:
        raise UserError(f"{where}: unknown {short_repr(value)}.{suggest_names(value, choices)}")
    for number in _numbers(value):
        if low is not None and number < low:
            raise UserError(f"{where} must be at least {low:.10g}, not {short_repr(number)}.")
        highest = high if high is not None else MAX_COUNT if isinstance(number, int) else MAX_NUMBER
        if abs(number) > highest:
            raise UserError(f"{where} must be at most {highest:.10g}, not {short_repr(number)}.")
    return value


def _check_text(value: Any, where: str) -> None:
    """Check that a text contains no lone surrogate, which neither a tokenizer nor a file can encode.

    Raises:
        UserError: It contains one.
    """
    if isinstance(value, tuple):
        for item in value:
            _check_text(item, where)
    elif isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UserError(f"{where}: {short_repr(value)} has half of a surrogate pair, so it is not text.") from None


def _numbers(value: Any) -> list[int | float]:
    """Return the numbers in the value of a knob: the value itself, or those nested in a tuple."""
    if isinstance(value, tuple):
        return [number for item in value for number in _numbers(item)]
    return [value] if isinstance(value, (int, float)) else []


def _convert(hint: Any, value: Any) -> Any:
    """Convert `value` to the type `hint`, or raise TypeError."""
    if value is None and _allows_none(hint):
        return None
    wanted = _without_none(hint)
    if typing.get_origin(wanted) is tuple and isinstance(value, (tuple, list)):
        items = typing.get_args(wanted)
        if items[-1] is Ellipsis:
            return tuple(_convert(items[0], item) for item in value)
        if len(items) == len(value):
            return tuple(_convert(item, part) for item, part in zip(items, value, strict=True))
    elif wanted is bool and isinstance(value, bool) or wanted is str and isinstance(value, str):
        return value
    elif wanted is int and _is_number(value) and value == int(value):
        return int(value)
    elif wanted is float and _is_number(value) and abs(value) <= sys.float_info.max:
        return float(value) + 0.0  # -0.0 becomes 0.0, which it equals, so that equal configs have equal hashes.
    raise TypeError


def _is_number(value: Any) -> bool:
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
    hint = f" Did you mean {where}.{near[0]}?" if near else " `launch.py explain` lists every knob."
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
            f"config.training.steps={training.steps}."
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
            f"config.model.positions: RoPE rotates pairs of channels, so their number must be even, not {width} "
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
            raise UserError(f"config.model.rope.{knob}: factors must be above 0, not {min(factors):g}.")
        if len(factors) != pairs:
            raise UserError(
                f"config.model.rope.{knob} has {len(factors)} numbers; RoPE rotates {pairs} pairs of channels, and "
                "longrope needs a factor for each."
            )
