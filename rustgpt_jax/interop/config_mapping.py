"""Bidirectional mapping between ModelConfig fields and the keys of a Hugging Face config.json.

A KeyMapping reads some keys into knobs and writes them back. Reading raises an error for what ModelConfig cannot
represent. Writing gives the nearest keys; `Architecture.roundtrip_differences` reads them again to find differences.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from rustgpt_jax.atomic_io import read_json
from rustgpt_jax.config.schema import ModelConfig, flatten, get_path
from rustgpt_jax.config.validation import validate_value
from rustgpt_jax.errors import UserError, suggest_names
from rustgpt_jax.model.layers import default_glu_width
from rustgpt_jax.model.positions import longrope_factors
from rustgpt_jax.model.presets import NOT_IN_LOGITS

# The config.json of a Hugging Face model, read strictly.


@dataclass(frozen=True)
class HFConfigReader:
    """The values of a config.json, the defaults of `transformers` for missing keys, and a callback for warnings."""

    file: Path
    values: Mapping[str, Any]
    defaults: Mapping[str, Any]
    warn: Callable[[str], object] = lambda text: None

    def __getitem__(self, key: str) -> Any:
        """Return the value of a key or its default. Raises UserError if it has neither."""
        if key in self.values:
            return self.values[key]
        if key in self.defaults:
            return self.defaults[key]
        raise UserError(f"{self.file} has no {key!r}.")

    def parse(self, key: str, knob: str) -> Any:
        """Parse a value with the type and range of a ModelConfig field. Raises UserError if it is invalid."""
        return validate_value(f"model.{knob}", self[key], f"{self.file}: {key}")

    def positive_int(self, key: str) -> int:
        """Parse an integer of 1 or more. Raises UserError if the value is invalid."""
        return self.parse(key, "n_layers")

    def non_negative_int(self, key: str) -> int:
        """Parse an integer of 0 or more. Raises UserError if the value is invalid."""
        return 0 if self[key] == 0 else self.positive_int(key)

    def boolean(self, key: str) -> bool:
        """Parse true or false; null is false. Raises UserError if the value is invalid."""
        return self[key] is not None and self.parse(key, "bias")

    def optional_list(self, key: str) -> list[Any] | None:
        """Parse a list or null. Raises UserError if the value is invalid."""
        value = self[key]
        if not isinstance(value, list | tuple | None):
            raise UserError(f"{self.file}: {key} must be a list, got {value!r}.")
        return None if value is None else list(value)

    def unsupported(self, key: str, why: str) -> UserError:
        """Return the error for an unsupported value."""
        return UserError(f"{self.file}: {key}={self[key]!r} is not supported: {why}.")


def read_json_object(file: Path) -> dict[str, Any]:
    """Read a JSON object from a file. Raises UserError if the file is missing or contains something else."""
    values = read_json(file)
    if not isinstance(values, dict):
        raise UserError(f"{file} is damaged: it is not a JSON object.")
    return values


# Canonical form of a ModelConfig, in which models with the same logits are equal.

# Knobs that only these components read.
READ_ONLY_BY: tuple[tuple[set[str], tuple[str, ...]], ...] = (
    ({"local_attention"}, ("attention.local_window",)),
    ({"latent_attention"}, ("mla.kv_lora_rank", "mla.q_lora_rank", "mla.qk_rope_head_dim")),
    ({"rg_lru"}, ("bias", "recurrent.scale_first_token", "recurrent.width", "recurrent.blocks")),
    ({"rg_lru", "deltanet"}, ("recurrent.conv_width",)),
    (
        {"moe"},
        tuple(
            f"moe.{name}"
            for name in ("n_experts", "experts_per_token", "d_expert", "expert_activation", "norm_topk_prob")
        )
        + ("moe.capacity_factor",),
    ),
    ({"rope", "local_rope"}, ("rope.fraction",)),
    ({"local_rope"}, ("rope.local_theta",)),
)

# The gated feed-forward with each activation.
GATED_ACTIVATIONS = {
    "silu": "swiglu",
    "gelu": "geglu",
    "gelu_exact": "geglu_exact",
    "relu": "reglu",
    "relu_squared": "relu_squared_glu",
}


def expand_pattern(pattern: Sequence[str], layers: int) -> tuple[str, ...]:
    """Repeat a pattern to one entry per layer."""
    return tuple(pattern[layer % len(pattern)] for layer in range(layers))


def shortest_pattern(names: Sequence[str]) -> tuple[str, ...]:
    """Return the shortest pattern that repeats to these names, the inverse of `expand_pattern`."""
    period = next(p for p in range(1, len(names) + 1) if all(name == names[i % p] for i, name in enumerate(names)))
    return tuple(names[:period])


def dense_width(model: ModelConfig) -> int:
    """Return the hidden width of the dense feed-forward layers."""
    is_gated = {*GATED_ACTIVATIONS.values(), "moe"} & set(model.feedforwards)
    return model.d_ff or (default_glu_width(model.d_model) if is_gated else 4 * model.d_model)


def expert_width(model: ModelConfig) -> int:
    """Return the hidden width of an expert."""
    return model.moe.d_expert or model.d_ff or default_glu_width(model.d_model)


def effective_attention_scale(model: ModelConfig) -> float:
    """Return the factor that attention scores are multiplied by."""
    return model.head_width**-0.5 if model.attention.scale is None else model.attention.scale


def canonical_config(model: ModelConfig) -> dict[str, Any]:
    """Return the knobs that affect the logits of a model, with defaults and patterns expanded."""
    patterns = {
        knob: expand_pattern(getattr(model, knob), model.n_layers) for knob in ("mixers", "feedforwards", "positions")
    }
    knobs = flatten(model)
    knobs |= patterns | {
        "attention.n_kv_heads": model.attention.kv_heads,
        "attention.head_dim": model.head_width,
        "attention.qkv_bias": model.has_qkv_bias,
        "attention.output_bias": model.has_attention_output_bias,
        "feedforward_bias": model.has_feedforward_bias,
        "norm_bias": model.has_norm_bias and model.norm == "layernorm",
        "embedding_scale": (model.embedding_scale or model.d_model**0.5) if model.scale_embeddings else 1.0,
        "attention.scale": effective_attention_scale(model),
        "d_ff": dense_width(model),
        "moe.d_expert": expert_width(model),
        "recurrent.width": model.recurrent.width or model.d_model,
        "recurrent.blocks": model.recurrent.blocks or 1,
    }
    components = {name for names in patterns.values() for name in names}
    unread = {knob for readers, names in READ_ONLY_BY if not readers & components for knob in names}
    if not set(patterns["feedforwards"]) - {"moe"}:
        unread |= {"d_ff", "feedforward_bias"}
    rope = _canonical_rope(model) if "rope" in components else {}
    unread |= {
        knob for knob in knobs if knob.startswith("rope.") and knob not in ("rope.fraction", "rope.local_theta")
    } - rope.keys()
    return {knob: value for knob, value in (knobs | rope).items() if knob not in unread | NOT_IN_LOGITS}


def _canonical_rope(model: ModelConfig) -> dict[str, Any]:
    scaling = model.rope.scaling
    knobs: dict[str, Any] = {"rope.theta": model.rope.theta, "rope.scaling": scaling}
    if scaling in ("linear", "llama3", "yarn"):
        knobs["rope.factor"] = model.rope.factor
    if scaling in ("llama3", "yarn"):
        names = ("rope.original_context", "rope.beta_slow", "rope.beta_fast")
        knobs |= {knob: get_path(model, knob) for knob in names}
    knobs["rope.truncate"] = model.rope.truncate or scaling != "yarn"
    # Compare only the factors in use.
    factors = longrope_factors(model) if scaling == "longrope" else ()
    knobs["rope.short_factors"] = knobs["rope.long_factors"] = factors
    default = 0.1 * math.log(model.rope.factor) + 1 if scaling == "yarn" else 1.0
    if scaling == "longrope" and model.rope.original_context is not None:
        default = math.sqrt(1 + math.log(model.rope.factor) / math.log(model.rope.original_context))
    knobs["rope.attention_factor"] = default if model.rope.attention_factor is None else model.rope.attention_factor
    return knobs


def model_config_differences(first: ModelConfig, second: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """Return the knobs that make two models compute different logits, with both values (None if unused)."""
    one, two = canonical_config(first), canonical_config(second)
    pairs = {knob: (one.get(knob), two.get(knob)) for knob in one | two}
    return {knob: pair for knob, pair in pairs.items() if not _equal(*pair)}


def _equal(one: Any, two: Any) -> bool:
    if isinstance(one, float) and isinstance(two, (int, float)):
        return math.isclose(one, two, rel_tol=1e-9)
    return one == two


Knobs = dict[str, Any]
Keys = dict[str, Any]


class KeyMapping(NamedTuple):
    """A bidirectional mapping: `read` returns the knobs for a config.json, `write` the keys for a model."""

    read: Callable[[HFConfigReader], Knobs]
    write: Callable[[ModelConfig], Keys]


def direct(key: str, knob: str, of: Callable[[ModelConfig], Any] | None = None) -> KeyMapping:
    """Map a key to a knob; `of` computes the value to write if it is not the knob itself."""
    return KeyMapping(
        lambda reader: {knob: reader.parse(key, knob)},
        lambda model: {key: get_path(model, knob) if of is None else of(model)},
    )


def fixed(knobs: Knobs) -> KeyMapping:
    """Set knobs that have no keys."""
    return KeyMapping(lambda reader: knobs, lambda model: {})


def constant(key: str, *values: Any) -> KeyMapping:
    """Require a key to have one of these values; the first one is written."""

    def read(reader: HFConfigReader) -> Knobs:
        if reader[key] not in values:
            raise reader.unsupported(key, f"it must be {' or '.join(map(repr, values))}")
        return {}

    return KeyMapping(read, lambda model: {key: values[0]})


# Activation names in `transformers` and here; the first name of each activation is the one written.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_new": "gelu",
    "gelu_fast": "gelu",
    "gelu": "gelu_exact",
    "gelu_python": "gelu_exact",
    "relu": "relu",
    "relu2": "relu_squared",
}
# The feed-forward with each activation that is not gated.
UNGATED_ACTIVATIONS = {name: name for name in ("gelu", "gelu_exact", "relu", "relu_squared")}


def activation(key: str, feedforwards: Mapping[str, str]) -> KeyMapping:
    """Map the activation of feed-forwards; `feedforwards` gives the component for each activation."""

    def read(reader: HFConfigReader) -> Knobs:
        return {"feedforwards": (feedforwards[_parse_activation(reader, key, feedforwards)],)}

    def write(model: ModelConfig) -> Keys:
        activations = {component: name for name, component in feedforwards.items()}
        return {key: _hf_activation_name(activations.get(model.feedforwards[0], next(iter(feedforwards))))}

    return KeyMapping(read, write)


def expert_activation(key: str) -> KeyMapping:
    """Map the activation of experts."""
    return KeyMapping(
        lambda reader: {
            "feedforwards": ("moe",),
            "moe.expert_activation": _parse_activation(reader, key, GATED_ACTIVATIONS),
        },
        lambda model: {key: _hf_activation_name(model.moe.expert_activation)},
    )


def _parse_activation(reader: HFConfigReader, key: str, known: Mapping[str, str]) -> str:
    name = reader[key]
    names = [hf_name for hf_name, activation in ACTIVATIONS.items() if activation in known]
    if not isinstance(name, str) or name not in names:
        raise reader.unsupported(key, f"the supported values are {', '.join(names)}")
    return ACTIVATIONS[name]


def _hf_activation_name(name: str) -> str:
    return next(hf_name for hf_name, activation in ACTIVATIONS.items() if activation == name)


def attention_bias(key: str) -> KeyMapping:
    """Map biases in the four projections of attention."""

    def read(reader: HFConfigReader) -> Knobs:
        return dict.fromkeys(("attention.qkv_bias", "attention.output_bias"), reader.parse(key, "bias"))

    return KeyMapping(read, lambda model: {key: model.has_qkv_bias})


def softcap(key: str, knob: str) -> KeyMapping:
    """Map a softcap. If disabled, it is null in config.json and 0 in ModelConfig."""
    return KeyMapping(
        lambda reader: {knob: 0.0 if reader[key] is None else reader.parse(key, knob)},
        lambda model: {key: get_path(model, knob) or None},
    )


def query_pre_attn_scalar(key: str) -> KeyMapping:
    """Map the number by whose square root attention scores are divided."""

    def read(reader: HFConfigReader) -> Knobs:
        value = reader.parse(key, "attention.scale")
        if not value:
            raise reader.unsupported(key, "scores are divided by its square root")
        return {"attention.scale": value**-0.5}

    def write(model: ModelConfig) -> Keys:
        scale = effective_attention_scale(model)
        return {key: round(scale**-2) if scale else None}

    return KeyMapping(read, write)


def scale_attn_weights(key: str) -> KeyMapping:
    """Map the switch that multiplies attention scores by head_dim^-1/2 (GPT-2)."""
    return KeyMapping(
        lambda reader: {"attention.scale": None if reader.parse(key, "bias") else 1.0},
        lambda model: {key: effective_attention_scale(model) != 1.0},
    )


def divisible_heads() -> KeyMapping:
    """Require d_model to be a multiple of the number of heads, as some config classes do even if head_dim is given."""

    def read(reader: HFConfigReader) -> Knobs:
        if reader.positive_int("hidden_size") % reader.positive_int("num_attention_heads"):
            raise reader.unsupported("hidden_size", "it must be a multiple of num_attention_heads")
        return {}

    return KeyMapping(read, lambda model: {})


# Attention windows by layer.

FULL, SLIDING = "full_attention", "sliding_attention"
LayerType = Callable[[HFConfigReader, int], str]


def sliding_window_in_all_layers(switch: str | None = None) -> KeyMapping:
    """Map a sliding window in all layers, or null for none (Mistral). If given, the key `switch` must enable it."""

    def read(reader: HFConfigReader) -> Knobs:
        if reader["sliding_window"] is None or (switch is not None and not reader.boolean(switch)):
            return {"mixers": ("attention",)}
        return {
            "mixers": ("local_attention",),
            "attention.local_window": reader.parse("sliding_window", "attention.local_window"),
        }

    def write(model: ModelConfig) -> Keys:
        is_local = model.mixers[0] == "local_attention"
        keys: Keys = {"sliding_window": model.attention.local_window if is_local else None}
        return keys if switch is None else {switch: is_local, **keys}

    return KeyMapping(read, write)


def layer_types(default: LayerType, *, has_switch: bool = False, has_local_rope: bool = False) -> KeyMapping:
    """Map layer_types, a list with the attention type of each layer.

    Args:
        default: A function that returns the type of a layer if there is no list.
        has_switch: Whether the key use_sliding_window enables sliding windows (Qwen2, Qwen3, SmolLM3).
        has_local_rope: Whether local layers have RoPE with a separate base (Gemma 3).
    """

    def read(reader: HFConfigReader) -> Knobs:
        types = _parse_layer_types(reader, default)
        if has_switch and SLIDING in types and not reader.boolean("use_sliding_window"):
            raise reader.unsupported("layer_types", "use_sliding_window is not true")
        is_local = [kind == SLIDING for kind in types]
        knobs: Knobs = {"mixers": shortest_pattern([("attention", "local_attention")[local] for local in is_local])}
        if SLIDING in types:
            if reader["sliding_window"] is None:
                raise reader.unsupported("sliding_window", f"some layers are {SLIDING}")
            knobs["attention.local_window"] = reader.parse("sliding_window", "attention.local_window")
        if has_local_rope:
            knobs["positions"] = shortest_pattern([("rope", "local_rope")[local] for local in is_local])
        return knobs

    def write(model: ModelConfig) -> Keys:
        types = _model_layer_types(model)
        window = model.attention.local_window if SLIDING in types else None
        switch: Keys = {"use_sliding_window": SLIDING in types} if has_switch else {}
        return {"layer_types": types, "sliding_window": window} | switch

    return KeyMapping(read, write)


def sliding_window_after_first_layers() -> KeyMapping:
    """Map max_window_layers, the number of initial layers with full attention (Qwen2); layer_types takes precedence."""

    def default(reader: HFConfigReader, layer: int) -> str:
        has_window = reader.boolean("use_sliding_window") and reader["sliding_window"] is not None
        return SLIDING if has_window and layer >= reader.non_negative_int("max_window_layers") else FULL

    by_layer = layer_types(default, has_switch=True)

    def write(model: ModelConfig) -> Keys:
        types = _model_layer_types(model)
        first = types.index(SLIDING) if SLIDING in types else len(types)
        return by_layer.write(model) | {"max_window_layers": first}

    return KeyMapping(by_layer.read, write)


def no_rope_layers() -> KeyMapping:
    """Map no_rope_layers: 1 for layers with RoPE, 0 for layers without position encoding (SmolLM3)."""

    def read(reader: HFConfigReader) -> Knobs:
        layers, every = reader.positive_int("num_hidden_layers"), reader.positive_int("no_rope_layer_interval")
        has_rope = reader.optional_list("no_rope_layers")
        if has_rope is None:
            has_rope = [(layer + 1) % every != 0 for layer in range(layers)]
        if len(has_rope) < layers:
            raise reader.unsupported("no_rope_layers", f"it must have an entry for each of {layers} layers")
        return {"positions": shortest_pattern(["rope" if has else "none" for has in has_rope[:layers]])}

    def write(model: ModelConfig) -> Keys:
        positions = expand_pattern(model.positions, model.n_layers)
        return {"no_rope_layers": [int(name == "rope") for name in positions]}

    return KeyMapping(read, write)


def _parse_layer_types(reader: HFConfigReader, default: LayerType) -> list[str]:
    layers = reader.positive_int("num_hidden_layers")
    types = reader.optional_list("layer_types")
    if types is None:
        return [default(reader, layer) for layer in range(layers)]
    if len(types) != layers or not all(kind in (FULL, SLIDING) for kind in types):
        raise reader.unsupported("layer_types", f"it must name {FULL} or {SLIDING} for each of {layers} layers")
    return types


def _model_layer_types(model: ModelConfig) -> list[str]:
    mixers = expand_pattern(model.mixers, model.n_layers)
    return [SLIDING if name == "local_attention" else FULL for name in mixers]


def block_types() -> KeyMapping:
    """Map block_types, a pattern of recurrent and local attention layers (RecurrentGemma)."""
    names = {"recurrent": "rg_lru", "attention": "local_attention"}

    def read(reader: HFConfigReader) -> Knobs:
        layers, types = reader.positive_int("num_hidden_layers"), reader.optional_list("block_types")
        if not types or not all(isinstance(kind, str) and kind in names for kind in types):
            raise reader.unsupported("block_types", f"it must be a list of {' and '.join(names)}")
        mixers = expand_pattern([names[kind] for kind in types], layers)
        width = reader.positive_int("hidden_size" if reader["lru_width"] is None else "lru_width")
        if width % reader.positive_int("num_attention_heads"):
            raise reader.unsupported("lru_width", "it must be a multiple of num_attention_heads")
        return {"mixers": shortest_pattern(mixers), "recurrent.width": width}

    def write(model: ModelConfig) -> Keys:
        types = {mixer: block_type for block_type, mixer in names.items()}
        return {
            "block_types": [types.get(name, "attention") for name in expand_pattern(model.mixers, model.n_layers)],
            "lru_width": model.recurrent.width or model.d_model,
        }

    return KeyMapping(read, write)


def doubled_mlp_width(key: str) -> KeyMapping:
    """Map a key that holds twice the hidden width of feed-forwards (RecurrentGemma)."""

    def read(reader: HFConfigReader) -> Knobs:
        if reader.positive_int(key) < 2:
            raise reader.unsupported(key, "it is twice the hidden width of a feed-forward")
        return {"d_ff": reader.positive_int(key) // 2}

    return KeyMapping(read, lambda model: {key: 2 * dense_width(model)})


def rounded_embedding_scale() -> KeyMapping:
    """Map embeddings multiplied by sqrt(hidden_size) rounded to bfloat16 (RecurrentGemma)."""

    def read(reader: HFConfigReader) -> Knobs:
        root = np.float32(reader.positive_int("hidden_size") ** 0.5)
        return {"scale_embeddings": True, "embedding_scale": float(root.astype(ml_dtypes.bfloat16))}

    return KeyMapping(read, lambda model: {})


# Experts.


def moe_in_some_layers(activation: str) -> KeyMapping:
    """Map experts in every decoder_sparse_step-th layer, except the dense mlp_only_layers (Qwen3-MoE)."""

    def read(reader: HFConfigReader) -> Knobs:
        layers, every = reader.positive_int("num_hidden_layers"), reader.positive_int("decoder_sparse_step")
        dense = reader.optional_list("mlp_only_layers") or ()
        dense_name = GATED_ACTIVATIONS[_parse_activation(reader, activation, GATED_ACTIVATIONS)]
        names = ["moe" if layer not in dense and (layer + 1) % every == 0 else dense_name for layer in range(layers)]
        n_experts = reader.parse("num_local_experts", "moe.n_experts")
        return {"feedforwards": shortest_pattern(names), "moe.n_experts": n_experts}

    def write(model: ModelConfig) -> Keys:
        names = expand_pattern(model.feedforwards, model.n_layers)
        return {
            "num_experts": model.moe.n_experts,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [layer for layer, name in enumerate(names) if name != "moe"],
        }

    return KeyMapping(read, write)


# RoPE: rope_theta and rope_scaling, or rope_parameters as written by transformers 5.

# Our name for each rope_type. ROPE_KEYS has the knobs for the keys of each type.
ROPE_SCALINGS = {
    "default": "none",
    "linear": "linear",
    # Scaling depends on the text length and starts above max_position_embeddings, which is the context length here.
    "dynamic": "none",
    "llama3": "llama3",
    "yarn": "yarn",
    "longrope": "longrope",
}
_FACTOR = {"factor": "rope.factor"}
_SCALED = _FACTOR | {"original_max_position_embeddings": "rope.original_context"}
ROPE_KEYS = {
    "default": {},
    "linear": _FACTOR,
    "llama3": _SCALED | {"low_freq_factor": "rope.beta_slow", "high_freq_factor": "rope.beta_fast"},
    "dynamic": {},
    "yarn": _SCALED
    | {"beta_slow": "rope.beta_slow", "beta_fast": "rope.beta_fast"}
    | {"attention_factor": "rope.attention_factor", "truncate": "rope.truncate"},
    "longrope": _SCALED
    | {"attention_factor": "rope.attention_factor"}
    | {"short_factor": "rope.short_factors", "long_factor": "rope.long_factors"},
}
ALL_ROPE_TYPES = {name: name for name in ROPE_SCALINGS}
# Keys that may be missing or null.
OPTIONAL_ROPE_KEYS = ("attention_factor", "truncate")
# Keys of all types, and keys that are not numbers.
COMMON_ROPE_KEYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "mscale", "mscale_all_dim")
NON_NUMERIC_ROPE_KEYS = ("rope_type", "type", "truncate", "short_factor", "long_factor")


def rope(has_fraction: bool = False, types: Mapping[str, str] = ALL_ROPE_TYPES) -> KeyMapping:
    """Map one RoPE for all layers, applied to all channels or a fraction of them.

    `types` maps each rope_type of the architecture to the scaling type that it means.
    """

    def read(reader: HFConfigReader) -> Knobs:
        return _rope_knobs(reader, _parse_rope_parameters(reader), reader["rope_theta"], has_fraction, types)

    def write(model: ModelConfig) -> Keys:
        fraction: Keys = {"partial_rotary_factor": model.rope.fraction} if has_fraction else {}
        return _rope_keys(model) | fraction

    return KeyMapping(read, write)


def global_and_local_rope() -> KeyMapping:
    """Map separate RoPE settings of global (scaled) and local (unscaled) layers (Gemma 3)."""

    def read(reader: HFConfigReader) -> Knobs:
        stored = _parse_mapping(reader, reader["rope_parameters"])
        of_global = _parse_mapping(reader, stored.get(FULL)) | _parse_mapping(reader, reader["rope_scaling"])
        of_local = _parse_mapping(reader, stored.get(SLIDING))
        local = _rope_knobs(reader, of_local, reader["rope_local_base_freq"])
        if local["rope.scaling"] != "none":
            raise reader.unsupported("rope_parameters", f"the RoPE of {SLIDING} layers is scaled")
        return _rope_knobs(reader, of_global, reader["rope_theta"]) | {"rope.local_theta": local["rope.theta"]}

    return KeyMapping(read, lambda model: _rope_keys(model) | {"rope_local_base_freq": model.rope.local_theta})


def _rope_knobs(
    reader: HFConfigReader,
    stored: Mapping[str, Any],
    base: Any,
    has_fraction: bool = False,
    types: Mapping[str, str] = ALL_ROPE_TYPES,
) -> Knobs:
    """Return the knobs of one RoPE, warning about unused keys. Raises UserError naming a bad type or key."""
    where = f"{reader.file}: RoPE"
    kind = stored.get("rope_type") or stored.get("type") or "default"
    if not isinstance(kind, str) or kind not in types:
        raise UserError(f"{where}: unknown type {kind!r}.{suggest_names(str(kind), types)}")
    kind = types[kind]
    given: Keys = {}
    for key, value in stored.items():
        if value is None:
            continue
        if key not in COMMON_ROPE_KEYS and key not in ROPE_KEYS[kind] and (kind, key) != ("dynamic", "factor"):
            reader.warn(f"{where} of the type {kind!r}: the key {key!r} has no effect and is ignored.")
            continue
        if key not in NON_NUMERIC_ROPE_KEYS and not isinstance(value, int | float):
            raise UserError(f"{where}: {key} must be a number, got {value!r}.")
        given[key] = value
    fraction = stored.get("partial_rotary_factor", reader["partial_rotary_factor"])
    if not has_fraction and fraction not in (None, 1):
        raise UserError(f"{where}: partial_rotary_factor={fraction!r} is not supported by this architecture.")
    knobs: Knobs = {"rope.theta": given.get("rope_theta", base), "rope.scaling": ROPE_SCALINGS[kind]}
    if has_fraction:
        knobs["rope.fraction"] = 1.0 if fraction is None else fraction
    if kind in ("llama3", "yarn", "longrope"):
        given["original_max_position_embeddings"] = _original_context(reader, given)
    if kind == "yarn":
        given = _yarn(reader, given)
    if kind == "longrope":
        given, context = _longrope(reader, given)
        knobs |= context
    if kind == "dynamic":
        reader.warn(
            f"{where} of the type 'dynamic' does not scale within max_position_embeddings, which is the context length "
            "here, and it is not scaled with a longer config.model.context_length either."
        )
    for key, knob in ROPE_KEYS[kind].items():
        if key not in given and key not in OPTIONAL_ROPE_KEYS:
            raise UserError(f"{where} of the type {kind!r} has no {key!r}.")
        knobs[knob] = given.get(key, True if key == "truncate" else None)
    return {knob: validate_value(f"model.{knob}", value, f"{where}: {knob}") for knob, value in knobs.items()}


def _rope_keys(model: ModelConfig) -> Keys:
    """Return rope_theta and rope_scaling, which transformers 4 and 5 both read."""
    kind = next((name for name, here in ROPE_SCALINGS.items() if here == model.rope.scaling), None)
    if kind in (None, "default"):
        return {"rope_theta": model.rope.theta, "rope_scaling": None}
    values = {key: get_path(model, knob) for key, knob in ROPE_KEYS[str(kind)].items()}
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


def _parse_rope_parameters(reader: HFConfigReader) -> dict[str, Any]:
    stored = _parse_mapping(reader, reader["rope_scaling"]) or _parse_mapping(reader, reader["rope_parameters"])
    nested = [key for key, value in stored.items() if isinstance(value, Mapping)]
    if nested:
        raise UserError(f"{reader.file}: separate RoPE parameters for {' and '.join(nested)} are not supported.")
    return stored


def _parse_mapping(reader: HFConfigReader, stored: Any) -> dict[str, Any]:
    if not isinstance(stored, Mapping | None):
        raise UserError(f"{reader.file}: the parameters of RoPE must be a JSON object, got {stored!r}.")
    return dict(stored or {})


def _original_context(reader: HFConfigReader, given: Mapping[str, Any]) -> float:
    if reader["original_max_position_embeddings"] is not None:
        return reader.positive_int("original_max_position_embeddings")
    return given.get("original_max_position_embeddings") or reader.positive_int("max_position_embeddings")


def _yarn(reader: HFConfigReader, given: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of yarn with the defaults of transformers."""
    defaults = {
        "beta_slow": 1.0,
        "beta_fast": 32.0,
        "factor": reader.positive_int("max_position_embeddings") / given["original_max_position_embeddings"],
    }
    values = defaults | given
    one, other = given.get("mscale"), given.get("mscale_all_dim")
    if one and other and "attention_factor" not in given:
        values["attention_factor"] = _mscale(values["factor"], one) / _mscale(values["factor"], other)
    return values


def _longrope(reader: HFConfigReader, given: dict[str, Any]) -> tuple[dict[str, Any], Knobs]:
    """Return the longrope keys with the defaults of transformers, and the context length that they apply to.

    `transformers` switches frequencies for text longer than the original context. Here a model always uses the
    frequencies for text within the original context.
    """
    original, longest = given["original_max_position_embeddings"], reader.positive_int("max_position_embeddings")
    values = {"factor": max(1.0, longest / original)} | given
    if longest <= original or given.get("short_factor") == given.get("long_factor"):
        return values, {}
    reader.warn(
        f"{reader.file}: longrope is read with its short factors, for a context of {original} tokens; the long "
        f"factors are used if training continues with a longer config.model.context_length, up to {longest}."
    )
    return values, {"context_length": original}


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0
