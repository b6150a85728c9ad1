"""How knobs of a model and keys of a config.json say the same, in both directions.

A correspondence reads some keys into knobs and writes them back. What a family cannot say is refused on reading, and
comes out as another value on writing: whoever writes a config.json reads it again and compares.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from rustgpt_jax.config.schema import ModelConfig, flatten, get_path
from rustgpt_jax.config.validation import validate_value
from rustgpt_jax.errors import UserError
from rustgpt_jax.model.linear import default_glu_width
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
            raise UserError(f"{self.file}: {key} takes a list, not {value!r}.")
        return None if value is None else list(value)

    def unsupported(self, key: str, why: str) -> UserError:
        """Return the error for an unsupported value."""
        return UserError(f"{self.file}: {key}={self[key]!r} is not supported: {why}.")


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        UserError: The file is missing or does not contain a JSON object.
    """
    try:
        values = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged: it is not JSON.") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} is damaged: it is not a JSON object.")
    return values


# What a model computes, however its config expresses it.

# Knobs that only some components read.
READ_ONLY_BY: tuple[tuple[set[str], tuple[str, ...]], ...] = (
    ({"local_attention"}, ("attention.local_window",)),
    ({"latent_attention"}, ("mla.kv_lora_rank", "mla.q_lora_rank", "mla.qk_rope_head_dim")),
    ({"rg_lru"}, ("bias", "recurrent.scale_first_token", "recurrent.width", "recurrent.blocks")),
    ({"rg_lru", "deltanet"}, ("recurrent.conv_width",)),
    (
        {"moe"},
        (
            "moe.n_experts",
            "moe.experts_per_token",
            "moe.d_expert",
            "moe.expert_activation",
            "moe.norm_topk_prob",
            "moe.capacity_factor",
        ),
    ),
    ({"rope", "local_rope"}, ("rope.fraction",)),
    ({"local_rope"}, ("rope.local_theta",)),
)

GATED_KINDS = {"swiglu", "geglu", "geglu_exact", "reglu", "relu_squared_glu"}


def expand_pattern(pattern: Sequence[str], layers: int) -> tuple[str, ...]:
    """Repeat a pattern to one entry per layer."""
    return tuple(pattern[layer % len(pattern)] for layer in range(layers))


def shortest_pattern(names: Sequence[str]) -> tuple[str, ...]:
    """Return the shortest pattern that repeats to these names, the inverse of `expand_pattern`."""
    period = next(p for p in range(1, len(names) + 1) if all(name == names[i % p] for i, name in enumerate(names)))
    return tuple(names[:period])


def dense_width(model: ModelConfig) -> int:
    """Return the hidden width of dense feed-forwards."""
    is_gated = (GATED_KINDS | {"moe"}) & set(model.feedforwards)
    return model.d_ff or (default_glu_width(model.d_model) if is_gated else 4 * model.d_model)


def expert_width(model: ModelConfig) -> int:
    """Return the hidden width of an expert."""
    return model.moe.d_expert or model.d_ff or default_glu_width(model.d_model)


def effective_attention_scale(model: ModelConfig) -> float:
    """Return the factor that attention scores are multiplied by."""
    return model.head_width**-0.5 if model.attention.scale is None else model.attention.scale


def canonical_config(model: ModelConfig) -> dict[str, Any]:
    """Return the knobs that decide the logits, with None and patterns expanded, without those that nothing reads."""
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
    rope = _rope(model) if "rope" in components else {}
    unread |= {
        knob for knob in knobs if knob.startswith("rope.") and knob not in ("rope.fraction", "rope.local_theta")
    } - rope.keys()
    return {knob: value for knob, value in (knobs | rope).items() if knob not in unread | NOT_IN_LOGITS}


def _rope(model: ModelConfig) -> dict[str, Any]:
    scaling = model.rope.scaling
    knobs: dict[str, Any] = {"rope.theta": model.rope.theta, "rope.scaling": scaling}
    if scaling in ("linear", "llama3", "yarn"):
        knobs["rope.factor"] = model.rope.factor
    if scaling in ("llama3", "yarn"):
        turns = ("rope.original_context", "rope.beta_slow", "rope.beta_fast")
        knobs |= {knob: get_path(model, knob) for knob in turns}
    knobs["rope.truncate"] = model.rope.truncate or scaling != "yarn"
    # Compare only the factors in use.
    factors = longrope_factors(model) if scaling == "longrope" else ()
    knobs["rope.short_factors"] = knobs["rope.long_factors"] = factors
    usual = 0.1 * math.log(model.rope.factor) + 1 if scaling == "yarn" else 1.0
    if scaling == "longrope" and model.rope.original_context is not None:
        usual = math.sqrt(1 + math.log(model.rope.factor) / math.log(model.rope.original_context))
    knobs["rope.attention_factor"] = usual if model.rope.attention_factor is None else model.rope.attention_factor
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
    """A bidirectional mapping: `read` gives knobs of a config.json, `write` gives the keys of a model."""

    read: Callable[[HFConfigReader], Knobs]
    write: Callable[[ModelConfig], Keys]


def direct(key: str, knob: str, of: Callable[[ModelConfig], Any] | None = None) -> KeyMapping:
    """Map a key to a knob; `of` computes the written value if it differs from the knob's."""
    return KeyMapping(
        lambda reader: {knob: reader.parse(key, knob)},
        lambda model: {key: get_path(model, knob) if of is None else of(model)},
    )


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
# The feed-forward for each activation, gated or not.
GATED = {
    "silu": "swiglu",
    "gelu": "geglu",
    "gelu_exact": "geglu_exact",
    "relu": "reglu",
    "relu_squared": "relu_squared_glu",
}
NOT_GATED = {name: name for name in ("gelu", "gelu_exact", "relu", "relu_squared")}


def activation(key: str, feedforwards: Mapping[str, str]) -> KeyMapping:
    """Map the activation of feed-forwards; `feedforwards` maps activations to parts."""

    def read(reader: HFConfigReader) -> Knobs:
        return {"feedforwards": (feedforwards[_activation(reader, key, feedforwards)],)}

    def write(model: ModelConfig) -> Keys:
        of_part = {part: name for name, part in feedforwards.items()}
        return {key: _hf_activation_name(of_part.get(model.feedforwards[0], next(iter(feedforwards))))}

    return KeyMapping(read, write)


def expert_activation(key: str) -> KeyMapping:
    """Map the activation of experts."""
    return KeyMapping(
        lambda reader: {"feedforwards": ("moe",), "moe.expert_activation": _activation(reader, key, GATED)},
        lambda model: {key: _hf_activation_name(model.moe.expert_activation)},
    )


def _activation(reader: HFConfigReader, key: str, known: Mapping[str, str]) -> str:
    name = reader[key]
    names = [there for there, here in ACTIVATIONS.items() if here in known]
    if not isinstance(name, str) or name not in names:
        raise reader.unsupported(key, f"the known ones are {', '.join(names)}")
    return ACTIVATIONS[name]


def _hf_activation_name(name: str) -> str:
    return next(there for there, here in ACTIVATIONS.items() if here == name)


def attention_bias(key: str) -> KeyMapping:
    """Map biases in the four projections of attention."""

    def read(reader: HFConfigReader) -> Knobs:
        return dict.fromkeys(("attention.qkv_bias", "attention.output_bias"), reader.parse(key, "bias"))

    return KeyMapping(read, lambda model: {key: model.has_qkv_bias})


def feedforward_bias(key: str) -> KeyMapping:
    """Map biases in the linear layers of feed-forwards."""
    return KeyMapping(
        lambda reader: {"feedforward_bias": reader.parse(key, "bias")},
        lambda model: {key: model.has_feedforward_bias},
    )


def softcap(key: str, knob: str) -> KeyMapping:
    """A bound by tanh, null there and 0 here for none."""
    return KeyMapping(
        lambda reader: {knob: 0.0 if reader[key] is None else reader.parse(key, knob)},
        lambda model: {key: get_path(model, knob) or None},
    )


def query_pre_attn_scalar(key: str) -> KeyMapping:
    """The number whose root scores are divided by."""

    def read(reader: HFConfigReader) -> Knobs:
        value = reader.parse(key, "attention.scale")
        if not value:
            raise reader.unsupported(key, "scores are divided by its root")
        return {"attention.scale": value**-0.5}

    def write(model: ModelConfig) -> Keys:
        scale = effective_attention_scale(model)
        return {key: round(scale**-2) if scale else None}

    return KeyMapping(read, write)


def scale_attn_weights(key: str) -> KeyMapping:
    """Whether scores are multiplied by head_dim^-1/2, or by nothing (GPT-2)."""
    return KeyMapping(
        lambda reader: {"attention.scale": None if reader.parse(key, "bias") else 1.0},
        lambda model: {key: effective_attention_scale(model) != 1.0},
    )


def divisible_heads() -> KeyMapping:
    """Heads that divide d_model, which some config classes insist on even where head_dim is given."""

    def read(reader: HFConfigReader) -> Knobs:
        if reader.positive_int("hidden_size") % reader.positive_int("num_attention_heads"):
            raise reader.unsupported("hidden_size", "it must be a multiple of num_attention_heads")
        return {}

    return KeyMapping(read, lambda model: {})


# Which layers see how far.

FULL, SLIDING = "full_attention", "sliding_attention"
LayerType = Callable[[HFConfigReader, int], str]


def sliding_window_in_all_layers(switch: str | None = None) -> KeyMapping:
    """Map a sliding window in all layers, or null (Mistral); with a `switch`, only if that key is true."""

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


def layer_types(default: LayerType) -> KeyMapping:
    """layer_types, a name for each layer, or what `default` says of a layer where there are none."""

    def read(reader: HFConfigReader) -> Knobs:
        return _mixers(reader, _layer_types(reader, default))

    def write(model: ModelConfig) -> Keys:
        return {"layer_types": _layer_types_of(model), "sliding_window": _window(model)}

    return KeyMapping(read, write)


def layer_types_with_switch(default: LayerType) -> KeyMapping:
    """The same, where a sliding window has a switch of its own, use_sliding_window (Qwen2, Qwen3, SmolLM3)."""

    def read(reader: HFConfigReader) -> Knobs:
        types = _layer_types(reader, default)
        if SLIDING in types and not reader.boolean("use_sliding_window"):
            raise reader.unsupported("layer_types", "use_sliding_window is not true")
        return _mixers(reader, types)

    def write(model: ModelConfig) -> Keys:
        types = _layer_types_of(model)
        return {"layer_types": types, "sliding_window": _window(model), "use_sliding_window": SLIDING in types}

    return KeyMapping(read, write)


def sliding_window_after_first_layers() -> KeyMapping:
    """The first max_window_layers see all, the others a window (Qwen2); layer_types says so too, and goes first."""

    def default(reader: HFConfigReader, layer: int) -> str:
        has_window = reader.boolean("use_sliding_window") and reader["sliding_window"] is not None
        return SLIDING if has_window and layer >= reader.non_negative_int("max_window_layers") else FULL

    by_layer = layer_types_with_switch(default)

    def write(model: ModelConfig) -> Keys:
        types = _layer_types_of(model)
        first = types.index(SLIDING) if SLIDING in types else len(types)
        return by_layer.write(model) | {"max_window_layers": first}

    return KeyMapping(by_layer.read, write)


def layer_types_with_local_rope(default: LayerType) -> KeyMapping:
    """layer_types, where local layers have RoPE with a base of its own (Gemma 3)."""
    by_layer = layer_types(default)

    def read(reader: HFConfigReader) -> Knobs:
        types = _layer_types(reader, default)
        positions = shortest_pattern(["local_rope" if kind == SLIDING else "rope" for kind in types])
        return by_layer.read(reader) | {"positions": positions}

    return KeyMapping(read, by_layer.write)


def no_rope_layers() -> KeyMapping:
    """no_rope_layers: 1 where a layer has RoPE and 0 where it has no positions (SmolLM3)."""

    def read(reader: HFConfigReader) -> Knobs:
        layers, every = reader.positive_int("num_hidden_layers"), reader.positive_int("no_rope_layer_interval")
        has_rope = reader.optional_list("no_rope_layers")
        if has_rope is None:
            has_rope = [(layer + 1) % every != 0 for layer in range(layers)]
        if len(has_rope) < layers:
            raise reader.unsupported("no_rope_layers", f"there are {layers} layers")
        return {"positions": shortest_pattern(["rope" if has else "none" for has in has_rope[:layers]])}

    def write(model: ModelConfig) -> Keys:
        positions = expand_pattern(model.positions, model.n_layers)
        return {"no_rope_layers": [int(name == "rope") for name in positions]}

    return KeyMapping(read, write)


def _layer_types(reader: HFConfigReader, default: LayerType) -> list[str]:
    layers = reader.positive_int("num_hidden_layers")
    types = reader.optional_list("layer_types")
    if types is None:
        return [default(reader, layer) for layer in range(layers)]
    if len(types) != layers or not all(kind in (FULL, SLIDING) for kind in types):
        raise reader.unsupported("layer_types", f"it must name {FULL} or {SLIDING} for each of {layers} layers")
    return types


def _mixers(reader: HFConfigReader, types: Sequence[str]) -> Knobs:
    mixers = shortest_pattern(["local_attention" if kind == SLIDING else "attention" for kind in types])
    if SLIDING not in types:
        return {"mixers": mixers}
    if reader["sliding_window"] is None:
        raise reader.unsupported("sliding_window", f"some layers are {SLIDING}")
    return {"mixers": mixers, "attention.local_window": reader.parse("sliding_window", "attention.local_window")}


def _layer_types_of(model: ModelConfig) -> list[str]:
    mixers = expand_pattern(model.mixers, model.n_layers)
    return [SLIDING if name == "local_attention" else FULL for name in mixers]


def _window(model: ModelConfig) -> int | None:
    return model.attention.local_window if SLIDING in _layer_types_of(model) else None


def block_types() -> KeyMapping:
    """Map block_types, a pattern of recurrent and local attention layers (RecurrentGemma)."""
    names = {"recurrent": "rg_lru", "attention": "local_attention"}
    reads = (
        direct("attention_window_size", "attention.local_window"),
        direct("conv1d_width", "recurrent.conv_width"),
        direct("num_attention_heads", "recurrent.blocks", lambda model: model.attention.n_heads),
    )

    def read(reader: HFConfigReader) -> Knobs:
        layers, types = reader.positive_int("num_hidden_layers"), reader.optional_list("block_types")
        if not types or not all(isinstance(kind, str) and kind in names for kind in types):
            raise reader.unsupported("block_types", f"it must be a list of {' and '.join(names)}")
        mixers = expand_pattern([names[kind] for kind in types], layers)
        width = reader.positive_int("hidden_size" if reader["lru_width"] is None else "lru_width")
        if width % reader.positive_int("num_attention_heads"):
            raise reader.unsupported("lru_width", "it must be a multiple of num_attention_heads")
        return read_all(reads, reader) | {"mixers": shortest_pattern(mixers), "recurrent.width": width}

    def write(model: ModelConfig) -> Keys:
        types = {here: there for there, here in names.items()}
        return write_all(reads, model) | {
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


def moe_in_all_layers() -> KeyMapping:
    """Experts of width intermediate_size in every layer, with weights that add up to 1 (Mixtral)."""
    reads = (
        direct("num_local_experts", "moe.n_experts"),
        direct("num_experts_per_tok", "moe.experts_per_token"),
        direct("intermediate_size", "d_ff", expert_width),
    )

    def read(reader: HFConfigReader) -> Knobs:
        return read_all(reads, reader) | {"moe.d_expert": None}

    return KeyMapping(read, lambda model: write_all(reads, model))


def moe_in_some_layers(activation: str) -> KeyMapping:
    """Experts in every decoder_sparse_step-th layer but mlp_only_layers, which are dense (Qwen3-MoE)."""
    reads = (
        direct("num_experts_per_tok", "moe.experts_per_token"),
        direct("moe_intermediate_size", "moe.d_expert", expert_width),
        direct("intermediate_size", "d_ff", dense_width),
        direct("norm_topk_prob", "moe.norm_topk_prob"),
    )

    def read(reader: HFConfigReader) -> Knobs:
        layers, every = reader.positive_int("num_hidden_layers"), reader.positive_int("decoder_sparse_step")
        dense = reader.optional_list("mlp_only_layers") or ()
        plain = GATED[_activation(reader, activation, GATED)]
        names = ["moe" if layer not in dense and (layer + 1) % every == 0 else plain for layer in range(layers)]
        return read_all(reads, reader) | {
            "feedforwards": shortest_pattern(names),
            "moe.n_experts": reader.parse("num_local_experts", "moe.n_experts"),
        }

    def write(model: ModelConfig) -> Keys:
        names = expand_pattern(model.feedforwards, model.n_layers)
        return write_all(reads, model) | {
            "num_experts": model.moe.n_experts,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [layer for layer, name in enumerate(names) if name != "moe"],
        }

    return KeyMapping(read, write)


def read_all(parts: Sequence[KeyMapping], reader: HFConfigReader) -> Knobs:
    """Read several mappings into one dict of knobs."""
    return {knob: value for part in parts for knob, value in part.read(reader).items()}


def write_all(parts: Sequence[KeyMapping], model: ModelConfig) -> Keys:
    """Write several mappings into one dict of keys."""
    return {key: value for part in parts for key, value in part.write(model).items()}
