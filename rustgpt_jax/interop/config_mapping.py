"""How knobs of a model and keys of a config.json say the same, in both directions.

A correspondence reads some keys into knobs and writes them back. What a family cannot say is refused on reading, and
comes out as another value on writing: whoever writes a config.json reads it again and compares.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from rustgpt_jax.config.schema import ModelConfig
from rustgpt_jax.interop.hf_config import Settings
from rustgpt_jax.model.linear import default_glu_width
from rustgpt_jax.model.positions import longrope_factors
from rustgpt_jax.model.presets import NOT_IN_LOGITS

# What a model computes, however its config expresses it.

# Knobs that only some components read.
READ_ONLY_BY: tuple[tuple[set[str], tuple[str, ...]], ...] = (
    ({"local_attention"}, ("local_window",)),
    ({"latent_attention"}, ("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim")),
    ({"rg_lru"}, ("bias", "scale_first_token", "recurrent_width", "recurrent_blocks")),
    ({"rg_lru", "deltanet"}, ("conv_width",)),
    ({"moe"}, ("n_experts", "experts_per_token", "d_expert", "expert_activation", "norm_topk_prob", "capacity_factor")),
    ({"rope", "local_rope"}, ("rope_fraction",)),
    ({"local_rope"}, ("local_rope_theta",)),
)

GATED_KINDS = {"swiglu", "geglu", "geglu_exact", "reglu", "relu_squared_glu"}


def over_layers(pattern: Sequence[str], layers: int) -> tuple[str, ...]:
    """A pattern written out for every layer."""
    return tuple(pattern[layer % len(pattern)] for layer in range(layers))


def shortest_pattern(names: Sequence[str]) -> tuple[str, ...]:
    """The shortest pattern that, repeated, gives these names: the inverse of `over_layers`."""
    period = next(p for p in range(1, len(names) + 1) if all(name == names[i % p] for i, name in enumerate(names)))
    return tuple(names[:period])


def dense_width(model: ModelConfig) -> int:
    """The hidden width of feed-forwards that are no mixture of experts."""
    is_gated = (GATED_KINDS | {"moe"}) & set(model.feedforwards)
    return model.d_ff or (default_glu_width(model.d_model) if is_gated else 4 * model.d_model)


def expert_width(model: ModelConfig) -> int:
    """The hidden width of an expert."""
    return model.d_expert or model.d_ff or default_glu_width(model.d_model)


def attention_scale(model: ModelConfig) -> float:
    """What scores are multiplied by."""
    return model.head_width**-0.5 if model.attention_scale is None else model.attention_scale


def computation(model: ModelConfig) -> dict[str, Any]:
    """Return the knobs that decide the logits, with None and patterns expanded, without those that nothing reads."""
    patterns = {
        knob: over_layers(getattr(model, knob), model.n_layers) for knob in ("mixers", "feedforwards", "positions")
    }
    knobs = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
    knobs |= patterns | {
        "n_kv_heads": model.n_kv_heads or model.n_heads,
        "head_dim": model.head_width,
        "qkv_bias": model.has_qkv_bias,
        "attention_output_bias": model.has_attention_output_bias,
        "feedforward_bias": model.has_feedforward_bias,
        "norm_bias": model.has_norm_bias and model.norm == "layernorm",
        "embedding_scale": (model.embedding_scale or model.d_model**0.5) if model.scale_embeddings else 1.0,
        "attention_scale": attention_scale(model),
        "d_ff": dense_width(model),
        "d_expert": expert_width(model),
        "recurrent_width": model.recurrent_width or model.d_model,
        "recurrent_blocks": model.recurrent_blocks or 1,
    }
    components = {name for names in patterns.values() for name in names}
    unread = {knob for readers, names in READ_ONLY_BY if not readers & components for knob in names}
    if not set(patterns["feedforwards"]) - {"moe"}:
        unread |= {"d_ff", "feedforward_bias"}
    rope = _rope(model) if "rope" in components else {}
    unread |= {knob for knob in knobs if knob.startswith("rope_") and knob != "rope_fraction"} - rope.keys()
    return {knob: value for knob, value in (knobs | rope).items() if knob not in unread | NOT_IN_LOGITS}


def _rope(model: ModelConfig) -> dict[str, Any]:
    scaling = model.rope_scaling
    knobs: dict[str, Any] = {"rope_theta": model.rope_theta, "rope_scaling": scaling}
    if scaling in ("linear", "llama3", "yarn"):
        knobs["rope_factor"] = model.rope_factor
    if scaling in ("llama3", "yarn"):
        turns = ("rope_original_context", "rope_beta_slow", "rope_beta_fast")
        knobs |= {knob: getattr(model, knob) for knob in turns}
    knobs["rope_truncate"] = model.rope_truncate or scaling != "yarn"
    # Compare only the factors in use.
    factors = longrope_factors(model) if scaling == "longrope" else ()
    knobs["rope_short_factors"] = knobs["rope_long_factors"] = factors
    usual = 0.1 * math.log(model.rope_factor) + 1 if scaling == "yarn" else 1.0
    if scaling == "longrope" and model.rope_original_context is not None:
        usual = math.sqrt(1 + math.log(model.rope_factor) / math.log(model.rope_original_context))
    knobs["rope_attention_factor"] = usual if model.rope_attention_factor is None else model.rope_attention_factor
    return knobs


def disagreements(first: ModelConfig, second: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """The knobs in which two models compute something else, with the value of each; None where it has none."""
    one, two = computation(first), computation(second)
    pairs = {knob: (one.get(knob), two.get(knob)) for knob in one | two}
    return {knob: pair for knob, pair in pairs.items() if not _equal(*pair)}


def _equal(one: Any, two: Any) -> bool:
    if isinstance(one, float) and isinstance(two, (int, float)):
        return math.isclose(one, two, rel_tol=1e-9)
    return one == two


Knobs = dict[str, Any]
Keys = dict[str, Any]


class KeyMapping(NamedTuple):
    """read: the knobs that a config.json says; write: the keys that say the knobs of a model."""

    read: Callable[[Settings], Knobs]
    write: Callable[[ModelConfig], Keys]


def same(key: str, knob: str, of: Callable[[ModelConfig], Any] | None = None) -> KeyMapping:
    """A key with the meaning of a knob; `of` gives the value that is written where that is not the knob's own."""
    return KeyMapping(
        lambda settings: {knob: settings.knob(key, knob)},
        lambda model: {key: getattr(model, knob) if of is None else of(model)},
    )


def always(key: str, *values: Any) -> KeyMapping:
    """A key that has one of these values in everything that can be read; the first one is written."""

    def read(settings: Settings) -> Knobs:
        if settings[key] not in values:
            raise settings.refuse(key, f"it must be {' or '.join(map(repr, values))}")
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

    def read(settings: Settings) -> Knobs:
        return {"feedforwards": (feedforwards[_activation(settings, key, feedforwards)],)}

    def write(model: ModelConfig) -> Keys:
        of_part = {part: name for name, part in feedforwards.items()}
        return {key: _written_activation(of_part.get(model.feedforwards[0], next(iter(feedforwards))))}

    return KeyMapping(read, write)


def expert_activation(key: str) -> KeyMapping:
    """Map the activation of experts."""
    return KeyMapping(
        lambda settings: {"feedforwards": ("moe",), "expert_activation": _activation(settings, key, GATED)},
        lambda model: {key: _written_activation(model.expert_activation)},
    )


def _activation(settings: Settings, key: str, known: Mapping[str, str]) -> str:
    name = settings[key]
    names = [there for there, here in ACTIVATIONS.items() if here in known]
    if not isinstance(name, str) or name not in names:
        raise settings.refuse(key, f"the known ones are {', '.join(names)}")
    return ACTIVATIONS[name]


def _written_activation(name: str) -> str:
    return next(there for there, here in ACTIVATIONS.items() if here == name)


def attention_bias(key: str) -> KeyMapping:
    """Map biases in the four projections of attention."""

    def read(settings: Settings) -> Knobs:
        return dict.fromkeys(("qkv_bias", "attention_output_bias"), settings.knob(key, "bias"))

    return KeyMapping(read, lambda model: {key: model.has_qkv_bias})


def feedforward_bias(key: str) -> KeyMapping:
    """Map biases in the linear layers of feed-forwards."""
    return KeyMapping(
        lambda settings: {"feedforward_bias": settings.knob(key, "bias")},
        lambda model: {key: model.has_feedforward_bias},
    )


def softcap(key: str, knob: str) -> KeyMapping:
    """A bound by tanh, null there and 0 here for none."""
    return KeyMapping(
        lambda settings: {knob: 0.0 if settings[key] is None else settings.knob(key, knob)},
        lambda model: {key: getattr(model, knob) or None},
    )


def query_scale(key: str) -> KeyMapping:
    """The number whose root scores are divided by."""

    def read(settings: Settings) -> Knobs:
        value = settings.knob(key, "attention_scale")
        if not value:
            raise settings.refuse(key, "scores are divided by its root")
        return {"attention_scale": value**-0.5}

    def write(model: ModelConfig) -> Keys:
        scale = attention_scale(model)
        return {key: round(scale**-2) if scale else None}

    return KeyMapping(read, write)


def scaled_or_not(key: str) -> KeyMapping:
    """Whether scores are multiplied by head_dim^-1/2, or by nothing (GPT-2)."""
    return KeyMapping(
        lambda settings: {"attention_scale": None if settings.knob(key, "bias") else 1.0},
        lambda model: {key: attention_scale(model) != 1.0},
    )


def whole_heads() -> KeyMapping:
    """Heads that divide d_model, which some config classes insist on even where head_dim is given."""

    def read(settings: Settings) -> Knobs:
        if settings.whole("hidden_size") % settings.whole("num_attention_heads"):
            raise settings.refuse("hidden_size", "it must be a multiple of num_attention_heads")
        return {}

    return KeyMapping(read, lambda model: {})


# Which layers see how far.

FULL, SLIDING = "full_attention", "sliding_attention"
LayerType = Callable[[Settings, int], str]


def window_everywhere(switch: str | None = None) -> KeyMapping:
    """A sliding window in all layers, or null (Mistral); with a `switch` only where that is true."""

    def read(settings: Settings) -> Knobs:
        if settings["sliding_window"] is None or (switch is not None and not settings.flag(switch)):
            return {"mixers": ("attention",)}
        return {"mixers": ("local_attention",), "local_window": settings.knob("sliding_window", "local_window")}

    def write(model: ModelConfig) -> Keys:
        is_local = model.mixers[0] == "local_attention"
        keys: Keys = {"sliding_window": model.local_window if is_local else None}
        return keys if switch is None else {switch: is_local, **keys}

    return KeyMapping(read, write)


def window_by_layer(usual: LayerType) -> KeyMapping:
    """layer_types, a name for each layer, or what `usual` says of a layer where there are none."""

    def read(settings: Settings) -> Knobs:
        return _mixers(settings, _layer_types(settings, usual))

    def write(model: ModelConfig) -> Keys:
        return {"layer_types": _names(model), "sliding_window": _window(model)}

    return KeyMapping(read, write)


def window_by_layer_if(usual: LayerType) -> KeyMapping:
    """The same, where a sliding window has a switch of its own, use_sliding_window (Qwen2, Qwen3, SmolLM3)."""

    def read(settings: Settings) -> Knobs:
        types = _layer_types(settings, usual)
        if SLIDING in types and not settings.flag("use_sliding_window"):
            raise settings.refuse("layer_types", "use_sliding_window is not true")
        return _mixers(settings, types)

    def write(model: ModelConfig) -> Keys:
        types = _names(model)
        return {"layer_types": types, "sliding_window": _window(model), "use_sliding_window": SLIDING in types}

    return KeyMapping(read, write)


def window_after_first_layers() -> KeyMapping:
    """The first max_window_layers see all, the others a window (Qwen2); layer_types says so too, and goes first."""

    def usual(settings: Settings, layer: int) -> str:
        has_window = settings.flag("use_sliding_window") and settings["sliding_window"] is not None
        return SLIDING if has_window and layer >= settings.count("max_window_layers") else FULL

    by_layer = window_by_layer_if(usual)

    def write(model: ModelConfig) -> Keys:
        types = _names(model)
        first = types.index(SLIDING) if SLIDING in types else len(types)
        return by_layer.write(model) | {"max_window_layers": first}

    return KeyMapping(by_layer.read, write)


def local_layers_turn_faster(usual: LayerType) -> KeyMapping:
    """layer_types, where local layers have RoPE with a base of its own (Gemma 3)."""
    by_layer = window_by_layer(usual)

    def read(settings: Settings) -> Knobs:
        types = _layer_types(settings, usual)
        positions = shortest_pattern(["local_rope" if kind == SLIDING else "rope" for kind in types])
        return by_layer.read(settings) | {"positions": positions}

    return KeyMapping(read, by_layer.write)


def layers_without_positions() -> KeyMapping:
    """no_rope_layers: 1 where a layer has RoPE and 0 where it has no positions (SmolLM3)."""

    def read(settings: Settings) -> Knobs:
        layers, every = settings.whole("num_hidden_layers"), settings.whole("no_rope_layer_interval")
        has_rope = settings.entries("no_rope_layers")
        if has_rope is None:
            has_rope = [(layer + 1) % every != 0 for layer in range(layers)]
        if len(has_rope) < layers:
            raise settings.refuse("no_rope_layers", f"there are {layers} layers")
        return {"positions": shortest_pattern(["rope" if has else "none" for has in has_rope[:layers]])}

    def write(model: ModelConfig) -> Keys:
        positions = over_layers(model.positions, model.n_layers)
        return {"no_rope_layers": [int(name == "rope") for name in positions]}

    return KeyMapping(read, write)


def _layer_types(settings: Settings, usual: LayerType) -> list[str]:
    layers = settings.whole("num_hidden_layers")
    types = settings.entries("layer_types")
    if types is None:
        return [usual(settings, layer) for layer in range(layers)]
    if len(types) != layers or not all(kind in (FULL, SLIDING) for kind in types):
        raise settings.refuse("layer_types", f"it must name {FULL} or {SLIDING} for each of {layers} layers")
    return types


def _mixers(settings: Settings, types: Sequence[str]) -> Knobs:
    mixers = shortest_pattern(["local_attention" if kind == SLIDING else "attention" for kind in types])
    if SLIDING not in types:
        return {"mixers": mixers}
    if settings["sliding_window"] is None:
        raise settings.refuse("sliding_window", f"some layers are {SLIDING}")
    return {"mixers": mixers, "local_window": settings.knob("sliding_window", "local_window")}


def _names(model: ModelConfig) -> list[str]:
    mixers = over_layers(model.mixers, model.n_layers)
    return [SLIDING if name == "local_attention" else FULL for name in mixers]


def _window(model: ModelConfig) -> int | None:
    return model.local_window if SLIDING in _names(model) else None


def recurrent_and_local() -> KeyMapping:
    """Map block_types, a pattern of recurrent and local attention layers (RecurrentGemma)."""
    names = {"recurrent": "rg_lru", "attention": "local_attention"}
    reads = (
        same("attention_window_size", "local_window"),
        same("conv1d_width", "conv_width"),
        same("num_attention_heads", "recurrent_blocks", lambda model: model.n_heads),
    )

    def read(settings: Settings) -> Knobs:
        layers, types = settings.whole("num_hidden_layers"), settings.entries("block_types")
        if not types or not all(isinstance(kind, str) and kind in names for kind in types):
            raise settings.refuse("block_types", f"it must be a list of {' and '.join(names)}")
        mixers = over_layers([names[kind] for kind in types], layers)
        width = settings.whole("hidden_size" if settings["lru_width"] is None else "lru_width")
        if width % settings.whole("num_attention_heads"):
            raise settings.refuse("lru_width", "it must be a multiple of num_attention_heads")
        return joined_knobs(reads, settings) | {"mixers": shortest_pattern(mixers), "recurrent_width": width}

    def write(model: ModelConfig) -> Keys:
        types = {here: there for there, here in names.items()}
        return joined_keys(reads, model) | {
            "block_types": [types.get(name, "attention") for name in over_layers(model.mixers, model.n_layers)],
            "lru_width": model.recurrent_width or model.d_model,
        }

    return KeyMapping(read, write)


def halved_width(key: str) -> KeyMapping:
    """Map a key that holds twice the hidden width of feed-forwards (RecurrentGemma)."""

    def read(settings: Settings) -> Knobs:
        if settings.whole(key) < 2:
            raise settings.refuse(key, "it is twice the hidden width of a feed-forward")
        return {"d_ff": settings.whole(key) // 2}

    return KeyMapping(read, lambda model: {key: 2 * dense_width(model)})


def rounded_embedding_scale() -> KeyMapping:
    """Map embeddings multiplied by sqrt(hidden_size) rounded to bfloat16 (RecurrentGemma)."""

    def read(settings: Settings) -> Knobs:
        root = np.float32(settings.whole("hidden_size") ** 0.5)
        return {"scale_embeddings": True, "embedding_scale": float(root.astype(ml_dtypes.bfloat16))}

    return KeyMapping(read, lambda model: {})


# Experts.


def experts_everywhere() -> KeyMapping:
    """Experts of width intermediate_size in every layer, with weights that add up to 1 (Mixtral)."""
    reads = (
        same("num_local_experts", "n_experts"),
        same("num_experts_per_tok", "experts_per_token"),
        same("intermediate_size", "d_ff", expert_width),
    )

    def read(settings: Settings) -> Knobs:
        return joined_knobs(reads, settings) | {"d_expert": None}

    return KeyMapping(read, lambda model: joined_keys(reads, model))


def experts_in_some_layers(activation: str) -> KeyMapping:
    """Experts in every decoder_sparse_step-th layer but mlp_only_layers, which are dense (Qwen3-MoE)."""
    reads = (
        same("num_experts_per_tok", "experts_per_token"),
        same("moe_intermediate_size", "d_expert", expert_width),
        same("intermediate_size", "d_ff", dense_width),
        same("norm_topk_prob", "norm_topk_prob"),
    )

    def read(settings: Settings) -> Knobs:
        layers, every = settings.whole("num_hidden_layers"), settings.whole("decoder_sparse_step")
        dense = settings.entries("mlp_only_layers") or ()
        plain = GATED[_activation(settings, activation, GATED)]
        names = ["moe" if layer not in dense and (layer + 1) % every == 0 else plain for layer in range(layers)]
        return joined_knobs(reads, settings) | {
            "feedforwards": shortest_pattern(names),
            "n_experts": settings.knob("num_local_experts", "n_experts"),
        }

    def write(model: ModelConfig) -> Keys:
        names = over_layers(model.feedforwards, model.n_layers)
        return joined_keys(reads, model) | {
            "num_experts": model.n_experts,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [layer for layer, name in enumerate(names) if name != "moe"],
        }

    return KeyMapping(read, write)


def joined_knobs(parts: Sequence[KeyMapping], settings: Settings) -> Knobs:
    """The knobs of several correspondences."""
    return {knob: value for part in parts for knob, value in part.read(settings).items()}


def joined_keys(parts: Sequence[KeyMapping], model: ModelConfig) -> Keys:
    """The keys of several correspondences."""
    return {key: value for part in parts for key, value in part.write(model).items()}
