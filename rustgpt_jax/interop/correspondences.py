"""How knobs of a model and keys of a config.json say the same, in both directions.

A correspondence reads some keys into knobs and writes them back. What a family cannot say is refused on reading, and
comes out as another value on writing: whoever writes a config.json reads it again and compares.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rustgpt_jax.config import ModelConfig
from rustgpt_jax.interop.computation import (
    attention_scale,
    dense_width,
    expert_width,
    over_layers,
    shortest_pattern,
)
from rustgpt_jax.interop.settings import Settings

Knobs = dict[str, Any]
Keys = dict[str, Any]


class Correspondence(NamedTuple):
    """read: the knobs that a config.json says; write: the keys that say the knobs of a model."""

    read: Callable[[Settings], Knobs]
    write: Callable[[ModelConfig], Keys]


def same(key: str, knob: str, of: Callable[[ModelConfig], Any] | None = None) -> Correspondence:
    """A key with the meaning of a knob; `of` gives the value that is written where that is not the knob's own."""
    return Correspondence(
        lambda settings: {knob: settings.knob(key, knob)},
        lambda model: {key: getattr(model, knob) if of is None else of(model)},
    )


def always(key: str, *values: Any) -> Correspondence:
    """A key that has one of these values in everything that can be read; the first one is written."""

    def read(settings: Settings) -> Knobs:
        if settings[key] not in values:
            raise settings.refuse(key, f"it must be {' or '.join(map(repr, values))}")
        return {}

    return Correspondence(read, lambda model: {key: values[0]})


def activation(key: str, names: Mapping[str, str]) -> Correspondence:
    """The activation of all feed-forwards: their name here for each name there."""

    def read(settings: Settings) -> Knobs:
        name = settings[key]
        if not isinstance(name, str) or name not in names:
            raise settings.refuse(key, f"the known ones are {', '.join(names)}")
        return {"feedforwards": (names[name],)}

    def write(model: ModelConfig) -> Keys:
        there = [name for name, here in names.items() if here == model.feedforwards[0]]
        return {key: [*there, *names][0]}

    return Correspondence(read, write)


def biases(*keys: str) -> Correspondence:
    """Keys that are true together, for biases in all linear layers, or false together."""

    def read(settings: Settings) -> Knobs:
        values = {settings.knob(key, "bias") for key in keys}
        if len(values) > 1:
            raise settings.refuse(keys[0], f"{' and '.join(keys)} must be the same")
        return {"bias": values.pop()}

    return Correspondence(read, lambda model: dict.fromkeys(keys, model.bias))


def softcap(key: str, knob: str) -> Correspondence:
    """A bound by tanh, null there and 0 here for none."""
    return Correspondence(
        lambda settings: {knob: 0.0 if settings[key] is None else settings.knob(key, knob)},
        lambda model: {key: getattr(model, knob) or None},
    )


def query_scale(key: str) -> Correspondence:
    """The number whose root scores are divided by."""

    def read(settings: Settings) -> Knobs:
        value = settings.knob(key, "attention_scale")
        if not value:
            raise settings.refuse(key, "scores are divided by its root")
        return {"attention_scale": value**-0.5}

    def write(model: ModelConfig) -> Keys:
        scale = attention_scale(model)
        return {key: round(scale**-2) if scale else None}

    return Correspondence(read, write)


def scaled_or_not(key: str) -> Correspondence:
    """Whether scores are multiplied by head_dim^-1/2, or by nothing (GPT-2)."""
    return Correspondence(
        lambda settings: {"attention_scale": None if settings.knob(key, "bias") else 1.0},
        lambda model: {key: attention_scale(model) != 1.0},
    )


def whole_heads() -> Correspondence:
    """Heads that divide d_model, which some config classes insist on even where head_dim is given."""

    def read(settings: Settings) -> Knobs:
        if settings.whole("hidden_size") % settings.whole("num_attention_heads"):
            raise settings.refuse("hidden_size", "it must be a multiple of num_attention_heads")
        return {}

    return Correspondence(read, lambda model: {})


# Which layers see how far.

FULL, SLIDING = "full_attention", "sliding_attention"
LayerType = Callable[[Settings, int], str]


def window_everywhere(switch: str | None = None) -> Correspondence:
    """A sliding window in all layers, or null (Mistral); with a `switch` only where that is true."""

    def read(settings: Settings) -> Knobs:
        if settings["sliding_window"] is None or (switch is not None and not settings.flag(switch)):
            return {"mixers": ("attention",)}
        return {"mixers": ("local_attention",), "local_window": settings.knob("sliding_window", "local_window")}

    def write(model: ModelConfig) -> Keys:
        is_local = model.mixers[0] == "local_attention"
        keys: Keys = {"sliding_window": model.local_window if is_local else None}
        return keys if switch is None else {switch: is_local, **keys}

    return Correspondence(read, write)


def window_by_layer(usual: LayerType) -> Correspondence:
    """layer_types, a name for each layer, or what `usual` says of a layer where there are none."""

    def read(settings: Settings) -> Knobs:
        return _mixers(settings, _layer_types(settings, usual))

    def write(model: ModelConfig) -> Keys:
        return {"layer_types": _names(model), "sliding_window": _window(model)}

    return Correspondence(read, write)


def window_by_layer_if(usual: LayerType) -> Correspondence:
    """The same, where a sliding window has a switch of its own, use_sliding_window (Qwen2, Qwen3, SmolLM3)."""

    def read(settings: Settings) -> Knobs:
        types = _layer_types(settings, usual)
        if SLIDING in types and not settings.flag("use_sliding_window"):
            raise settings.refuse("layer_types", "use_sliding_window is not true")
        return _mixers(settings, types)

    def write(model: ModelConfig) -> Keys:
        types = _names(model)
        return {"layer_types": types, "sliding_window": _window(model), "use_sliding_window": SLIDING in types}

    return Correspondence(read, write)


def window_after_first_layers() -> Correspondence:
    """The first max_window_layers see all, the others a window (Qwen2); layer_types says so too, and goes first."""

    def usual(settings: Settings, layer: int) -> str:
        has_window = settings.flag("use_sliding_window") and settings["sliding_window"] is not None
        return SLIDING if has_window and layer >= settings.count("max_window_layers") else FULL

    by_layer = window_by_layer_if(usual)

    def write(model: ModelConfig) -> Keys:
        types = _names(model)
        first = types.index(SLIDING) if SLIDING in types else len(types)
        return by_layer.write(model) | {"max_window_layers": first}

    return Correspondence(by_layer.read, write)


def local_layers_turn_faster(usual: LayerType) -> Correspondence:
    """layer_types, where local layers have RoPE with a base of its own (Gemma 3)."""
    by_layer = window_by_layer(usual)

    def read(settings: Settings) -> Knobs:
        types = _layer_types(settings, usual)
        positions = shortest_pattern(["local_rope" if kind == SLIDING else "rope" for kind in types])
        return by_layer.read(settings) | {"positions": positions}

    return Correspondence(read, by_layer.write)


def layers_without_positions() -> Correspondence:
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

    return Correspondence(read, write)


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


# Experts.


def experts_everywhere() -> Correspondence:
    """Experts of width intermediate_size in every layer, with weights that add up to 1 (Mixtral)."""
    reads = (
        same("num_local_experts", "n_experts"),
        same("num_experts_per_tok", "experts_per_token"),
        same("intermediate_size", "d_ff", expert_width),
    )

    def read(settings: Settings) -> Knobs:
        return joined_knobs(reads, settings) | {"d_expert": None}

    return Correspondence(read, lambda model: joined_keys(reads, model))


def experts_in_some_layers() -> Correspondence:
    """Experts in every decoder_sparse_step-th layer but mlp_only_layers, which are dense (Qwen3-MoE)."""
    reads = (
        same("num_experts_per_tok", "experts_per_token"),
        same("moe_intermediate_size", "d_expert", expert_width),
        same("intermediate_size", "d_ff", dense_width),
        same("norm_topk_prob", "normalize_experts"),
    )

    def read(settings: Settings) -> Knobs:
        layers, every = settings.whole("num_hidden_layers"), settings.whole("decoder_sparse_step")
        dense = settings.entries("mlp_only_layers") or ()
        names = ["moe" if layer not in dense and (layer + 1) % every == 0 else "swiglu" for layer in range(layers)]
        # transformers 5 writes num_local_experts, and the published models say num_experts.
        count = "num_experts" if "num_experts" in settings.values else "num_local_experts"
        return joined_knobs(reads, settings) | {
            "feedforwards": shortest_pattern(names),
            "n_experts": settings.knob(count, "n_experts"),
        }

    def write(model: ModelConfig) -> Keys:
        names = over_layers(model.feedforwards, model.n_layers)
        return joined_keys(reads, model) | {
            "num_experts": model.n_experts,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [layer for layer, name in enumerate(names) if name == "swiglu"],
        }

    return Correspondence(read, write)


def joined_knobs(parts: Sequence[Correspondence], settings: Settings) -> Knobs:
    """The knobs of several correspondences."""
    return {knob: value for part in parts for knob, value in part.read(settings).items()}


def joined_keys(parts: Sequence[Correspondence], model: ModelConfig) -> Keys:
    """The keys of several correspondences."""
    return {key: value for part in parts for key, value in part.write(model).items()}
