"""What a model computes, whatever words its config says it in."""

import math
from collections.abc import Sequence
from typing import Any

from rustgpt_jax.config.schema import ModelConfig
from rustgpt_jax.model.linear import gated_width
from rustgpt_jax.model.rope_scaling import longrope_factors

# Knobs that never change the logits, and those of mixers that no Hugging Face architecture here has.
UNSAID = (
    *("dropout", "init_std", "load_balance", "router_z_loss", "layers", "remat", "attention_kernel"),
    *("dtype", "mixer_dtype", "feedforward_dtype", "logits_dtype", "matmul", "derivatives"),
    *("latent_width", "query_latent_width", "shared_key_width", "options"),
)

GATED = {"swiglu", "geglu", "geglu_exact", "reglu", "relu_squared_glu"}

PLAIN = (
    *("vocab_size", "context_length", "n_layers", "d_model", "n_heads", "norm", "norm_placement", "norm_epsilon"),
    *("tie_embeddings", "scale_embeddings", "logits_softcap", "qk_norm", "attention_softcap"),
    *("attention_sinks", "attention_scale_by_layer"),
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
    is_gated = (GATED | {"moe"}) & set(model.feedforwards)
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
    said["qkv_bias"] = model.has_qkv_bias
    said["attention_output_bias"] = model.has_attention_output_bias
    said["norm_bias"] = model.has_norm_bias and model.norm == "layernorm"
    said["embedding_scale"] = (model.embedding_scale or model.d_model**0.5) if model.scale_embeddings else 1.0
    said["attention_scale"] = attention_scale(model)
    if "local_attention" in names["mixers"]:
        said["local_window"] = model.local_window
    if set(names["feedforwards"]) - {"moe"}:
        said["d_ff"] = dense_width(model)
        said["feedforward_bias"] = model.has_feedforward_bias
    if "moe" in names["feedforwards"]:
        said |= {
            knob: getattr(model, knob)
            for knob in (
                *("n_experts", "experts_per_token", "expert_activation", "normalize_experts", "expert_capacity"),
            )
        }
        said["d_expert"] = expert_width(model)
    if "rg_lru" in names["mixers"]:
        said |= {knob: getattr(model, knob) for knob in ("bias", "conv_width", "scale_first_token")}
        said["recurrent_width"] = model.recurrent_width or model.d_model
        said["recurrent_blocks"] = model.recurrent_blocks or 1
    if {"rope", "local_rope"} & set(names["positions"]):
        said["rope_fraction"] = model.rope_fraction
    if "local_rope" in names["positions"]:
        said["local_rope_base"] = model.local_rope_base
    if "rope" in names["positions"]:
        said |= _rope(model)
    return said


def _rope(model: ModelConfig) -> dict[str, Any]:
    scaling = model.rope_scaling
    said: dict[str, Any] = {"rope_base": model.rope_base, "rope_scaling": scaling}
    if scaling in ("linear", "llama3", "yarn"):
        said["rope_factor"] = model.rope_factor
    if scaling in ("llama3", "yarn"):
        turns = ("rope_original_context", "rope_slow_turns", "rope_fast_turns")
        said |= {knob: getattr(model, knob) for knob in turns}
    said["rope_truncate"] = model.rope_truncate or scaling != "yarn"
    # Compare only the factors in use.
    factors = longrope_factors(model) if scaling == "longrope" else ()
    said["rope_short_factors"] = said["rope_long_factors"] = factors
    usual = 0.1 * math.log(model.rope_factor) + 1 if scaling == "yarn" else 1.0
    if scaling == "longrope" and model.rope_original_context is not None:
        usual = math.sqrt(1 + math.log(model.rope_factor) / math.log(model.rope_original_context))
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
