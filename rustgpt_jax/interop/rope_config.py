"""RoPE in a config.json: rope_theta and rope_scaling, or rope_parameters as transformers 5 writes them."""

import math
from collections.abc import Mapping
from typing import Any

from rustgpt_jax.config.schema import ModelConfig, get_path
from rustgpt_jax.config.validation import validate_value
from rustgpt_jax.errors import UserError, suggest_names
from rustgpt_jax.interop.config_mapping import FULL, SLIDING, HFConfigReader, KeyMapping, Keys, Knobs
from rustgpt_jax.model.positions import longrope_factors

# What rope_type is called here, and the keys beside it.
NAMES = {
    "default": "none",
    "linear": "linear",
    # Scaling depends on the text length and starts above max_position_embeddings, which is the context length here.
    "dynamic": "none",
    "llama3": "llama3",
    "yarn": "yarn",
    "longrope": "longrope",
}
FACTOR = {"factor": "rope.factor"}
STRETCHED = FACTOR | {"original_max_position_embeddings": "rope.original_context"}
TURNS = {
    "llama3": {"low_freq_factor": "rope.beta_slow", "high_freq_factor": "rope.beta_fast"},
    "yarn": {"beta_slow": "rope.beta_slow", "beta_fast": "rope.beta_fast"},
}
KEYS = {
    "default": {},
    "linear": FACTOR,
    "llama3": STRETCHED | TURNS["llama3"],
    "dynamic": {},
    "yarn": STRETCHED | TURNS["yarn"] | {"attention_factor": "rope.attention_factor", "truncate": "rope.truncate"},
    "longrope": STRETCHED
    | {
        "attention_factor": "rope.attention_factor",
        "short_factor": "rope.short_factors",
        "long_factor": "rope.long_factors",
    },
}
EVERY_TYPE = {name: name for name in NAMES}
# Keys of these types that may be missing or null.
OPTIONAL = ("attention_factor", "truncate")
# Keys that are read in their own way, and those of them that are no numbers.
OTHER_KEYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "mscale", "mscale_all_dim")
NO_NUMBERS = ("rope_type", "type", "truncate", "short_factor", "long_factor")


def rope(has_fraction: bool = False, types: Mapping[str, str] = EVERY_TYPE) -> KeyMapping:
    """Map one RoPE for all layers, applied to all channels or a fraction of them.

    `types` maps each rope_type of the architecture to the scaling type that it means.
    """

    def read(reader: HFConfigReader) -> Knobs:
        return rope_knobs(reader, _stored(reader), reader["rope_theta"], has_fraction, types)

    def write(model: ModelConfig) -> Keys:
        fraction: Keys = {"partial_rotary_factor": model.rope.fraction} if has_fraction else {}
        return rope_keys(model) | fraction

    return KeyMapping(read, write)


def global_and_local_rope() -> KeyMapping:
    """A RoPE for global layers and one, unscaled, for local ones (Gemma 3)."""

    def read(reader: HFConfigReader) -> Knobs:
        stored = _mapping(reader, reader["rope_parameters"])
        of_global = _mapping(reader, stored.get(FULL)) | _mapping(reader, reader["rope_scaling"])
        of_local = _mapping(reader, stored.get(SLIDING))
        local = rope_knobs(reader, of_local, reader["rope_local_base_freq"])
        if local["rope.scaling"] != "none":
            raise reader.unsupported("rope_parameters", f"the RoPE of {SLIDING} layers is scaled")
        return rope_knobs(reader, of_global, reader["rope_theta"]) | {"rope.local_theta": local["rope.theta"]}

    return KeyMapping(read, lambda model: rope_keys(model) | {"rope_local_base_freq": model.rope.local_theta})


def rope_knobs(
    reader: HFConfigReader,
    stored: Mapping[str, Any],
    base: Any,
    has_fraction: bool = False,
    types: Mapping[str, str] = EVERY_TYPE,
) -> Knobs:
    """Return the knobs of one RoPE, warning about keys that `transformers` does not read.

    Raises:
        UserError: The type is unknown, or a key is missing or has the wrong type; the message names it.
    """
    where = f"{reader.file}: RoPE"
    kind = stored.get("rope_type") or stored.get("type") or "default"
    if not isinstance(kind, str) or kind not in types:
        raise UserError(f"{where}: unknown type {kind!r}.{suggest_names(str(kind), types)}")
    kind = types[kind]
    given: Keys = {}
    for key, value in stored.items():
        if value is None:
            continue
        if key not in OTHER_KEYS and key not in KEYS[kind] and (kind, key) != ("dynamic", "factor"):
            reader.warn(f"{where} of the type {kind!r}: the key {key!r} computes nothing and is ignored.")
            continue
        if key not in NO_NUMBERS and not isinstance(value, int | float):
            raise UserError(f"{where}: {key} takes a number, not {value!r}.")
        given[key] = value
    fraction = stored.get("partial_rotary_factor", reader["partial_rotary_factor"])
    if not has_fraction and fraction not in (None, 1):
        raise UserError(f"{where}: partial_rotary_factor={fraction!r} is not what this architecture computes.")
    knobs: Knobs = {"rope.theta": given.get("rope_theta", base), "rope.scaling": NAMES[kind]}
    if has_fraction:
        knobs["rope.fraction"] = 1.0 if fraction is None else fraction
    if kind in ("llama3", "yarn", "longrope"):
        given["original_max_position_embeddings"] = _original_context(reader, given)
    if kind == "yarn":
        given = _yarn(reader, given)
    if kind == "longrope":
        given, longer = _longrope(reader, given)
        knobs |= longer
    if kind == "dynamic":
        reader.warn(
            f"{where} of the type 'dynamic' scales nothing within max_position_embeddings, which is the context here; "
            "with a longer config.model.context_length it is not scaled either."
        )
    for key, knob in KEYS[kind].items():
        if key not in given and key not in OPTIONAL:
            raise UserError(f"{where} of the type {kind!r} has no {key!r}.")
        knobs[knob] = given.get(key, True if key == "truncate" else None)
    return {knob: validate_value(f"model.{knob}", value, f"{where}: {knob}") for knob, value in knobs.items()}


def rope_keys(model: ModelConfig) -> Keys:
    """rope_theta and rope_scaling, which transformers 4 and 5 both read."""
    kind = next((name for name, here in NAMES.items() if here == model.rope.scaling), None)
    if kind in (None, "default"):
        return {"rope_theta": model.rope.theta, "rope_scaling": None}
    values = {key: get_path(model, knob) for key, knob in KEYS[str(kind)].items()}
    if kind == "longrope":
        # `transformers` selects the factors by text length. To use the long factors for all texts, write them as the
        # short factors too.
        is_long = longrope_factors(model) is model.rope.long_factors
        short = model.rope.long_factors if is_long else model.rope.short_factors
        values |= {"short_factor": list(short), "long_factor": list(model.rope.long_factors)}
    if values.get("truncate"):
        del values["truncate"]
    scaling = {"rope_type": kind} | {key: value for key, value in values.items() if value is not None}
    return {"rope_theta": model.rope.theta, "rope_scaling": scaling}


def _stored(reader: HFConfigReader) -> dict[str, Any]:
    stored = _mapping(reader, reader["rope_scaling"]) or _mapping(reader, reader["rope_parameters"])
    nested = [key for key, value in stored.items() if isinstance(value, Mapping)]
    if nested:
        raise UserError(f"{reader.file}: a RoPE of their own for {' and '.join(nested)} cannot be said here.")
    return stored


def _mapping(reader: HFConfigReader, stored: Any) -> dict[str, Any]:
    if not isinstance(stored, Mapping | None):
        raise UserError(f"{reader.file}: the parameters of RoPE are no JSON object but {stored!r}.")
    return dict(stored or {})


def _original_context(reader: HFConfigReader, given: Mapping[str, Any]) -> float:
    if reader["original_max_position_embeddings"] is not None:
        return reader.positive_int("original_max_position_embeddings")
    return given.get("original_max_position_embeddings") or reader.positive_int("max_position_embeddings")


def _yarn(reader: HFConfigReader, given: dict[str, Any]) -> dict[str, Any]:
    """The keys of yarn with what transformers takes for those that are not there."""
    usual = {
        "beta_slow": 1.0,
        "beta_fast": 32.0,
        "factor": reader.positive_int("max_position_embeddings") / given["original_max_position_embeddings"],
    }
    whole = usual | given
    one, other = given.get("mscale"), given.get("mscale_all_dim")
    if one and other and "attention_factor" not in given:
        whole["attention_factor"] = _magnitude(whole["factor"], one) / _magnitude(whole["factor"], other)
    return whole


def _longrope(reader: HFConfigReader, given: dict[str, Any]) -> tuple[dict[str, Any], Knobs]:
    """Return the longrope keys with the defaults of transformers, and the context length that they apply to.

    `transformers` switches frequencies for texts longer than the original context. Here a model uses the same
    frequencies for all texts: those for texts within the original context.
    """
    original, longest = given["original_max_position_embeddings"], reader.positive_int("max_position_embeddings")
    whole = {"factor": max(1.0, longest / original)} | given
    if longest <= original or given.get("short_factor") == given.get("long_factor"):
        return whole, {}
    reader.warn(
        f"{reader.file}: longrope is read with its short factors, for a context of {original} tokens; the long "
        f"ones are used where training goes on with a longer config.model.context_length, up to {longest}."
    )
    return whole, {"context_length": original}


def _magnitude(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0
