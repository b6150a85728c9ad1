"""What a model computes, whatever words its config says it in."""

import math
from collections.abc import Sequence
from typing import Any

from rustgpt_jax.config import ModelConfig
from rustgpt_jax.model.linear import gated_width

# Knobs that never change the logits, and those of mixers that no Hugging Face architecture here has.
UNSAID = (
    *("dropout", "init_std", "load_balance", "router_z_loss", "layers", "remat", "attention_kernel"),
    *("dtype", "mixer_dtype", "feedforward_dtype", "logits_dtype", "matmul", "derivatives"),
    *("latent_width", "query_latent_width", "shared_key_width", "conv_width", "recurrent_width", "options"),
)

PLAIN = (
    *("vocab_size", "context_length", "n_layers", "d_model", "n_heads", "norm", "norm_placement", "norm_epsilon"),
    *("bias", "tie_embeddings", "scale_embeddings", "logits_softcap", "qk_norm", "attention_softcap"),
    "attention_sinks",
)


def over_layers(pattern: Sequence[str], layers: int) -> tuple[str, ...]:
    """A pattern written out for every layer."""
    return tuple(pattern[layer % len(pattern)] for layer in range(layers))


def shortest_pattern(names: Sequence[str]) -> tuple[str, ...]:
    """The shortest pattern that, repeated, gives these names: the inverse of `over_layers`."""
    period = next(p for p in range(1, len(names) + 1) if all(name == names[i % p] for i, name in enumerate(names)))
    return tuple(names[:period])


def dense_width(model: ModelConfig) -> int:
    """The hidden width of feed-forwards that are no mixture of experts."""
    is_gated = {"swiglu", "geglu", "moe"} & set(model.feedforwards)
    return model.d_ff or (gated_width(model.d_model) if is_gated else 4 * model.d_model)


def expert_width(model: ModelConfig) -> int:
    """The hidden width of an expert."""
    return model.d_expert or model.d_ff or gated_width(model.d_model)


def attention_scale(model: ModelConfig) -> float:
    """What scores are multiplied by."""
    return model.head_width**-0.5 if model.attention_scale is None else model.attention_scale


def computation(model: ModelConfig) -> dict[str, Any]:
    """The knobs that decide the logits, with None and patterns written out, without those that nothing reads."""
    names = {
        knob: over_layers(getattr(model, knob), model.n_layers) for knob in ("mixers", "feedforwards", "positions")
    }
    said: dict[str, Any] = {knob: getattr(model, knob) for knob in PLAIN} | names
    said["n_kv_heads"] = model.n_kv_heads or model.n_heads
    said["head_dim"] = model.head_width
    said["qkv_bias"] = model.bias or model.qkv_bias
    said["attention_scale"] = attention_scale(model)
    if "local_attention" in names["mixers"]:
        said["local_window"] = model.local_window
    if set(names["feedforwards"]) - {"moe"}:
        said["d_ff"] = dense_width(model)
    if "moe" in names["feedforwards"]:
        said |= {
            knob: getattr(model, knob)
            for knob in ("n_experts", "experts_per_token", "normalize_experts", "expert_capacity")
        }
        said["d_expert"] = expert_width(model)
    if {"rope", "local_rope"} & set(names["positions"]):
        said["rope_fraction"] = model.rope_fraction
    if "local_rope" in names["positions"]:
        said["local_rope_base"] = model.local_rope_base
    if "rope" in names["positions"]:
        said |= _rope(model)
    return said


def _rope(model: ModelConfig) -> dict[str, Any]:
    said: dict[str, Any] = {"rope_base": model.rope_base, "rope_scaling": model.rope_scaling}
    if model.rope_scaling != "none":
        said["rope_factor"] = model.rope_factor
    if model.rope_scaling not in ("none", "linear"):
        turns = ("rope_original_context", "rope_slow_turns", "rope_fast_turns")
        said |= {knob: getattr(model, knob) for knob in turns}
    usual = 0.1 * math.log(model.rope_factor) + 1 if model.rope_scaling == "yarn" else 1.0
    said["rope_attention_factor"] = usual if model.rope_attention_factor is None else model.rope_attention_factor
    return said


def disagreements(first: ModelConfig, second: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """The knobs in which two models compute something else, with the value of each; None where it has none."""
    one, two = computation(first), computation(second)
    pairs = {knob: (one.get(knob), two.get(knob)) for knob in one | two}
    return {knob: pair for knob, pair in pairs.items() if not _equal(*pair)}


def _equal(one: Any, two: Any) -> bool:
    if isinstance(one, float) and isinstance(two, (int, float)):
        return math.isclose(one, two, rel_tol=1e-9)
    return one == two
