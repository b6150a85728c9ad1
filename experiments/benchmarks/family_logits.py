"""How closely do each model family's logits match those of `transformers` with the same weights?

python -m experiments.benchmarks.family_logits

A tiny random model of every family and of its variants (untied embeddings, biases, windows, scaled positions) is
created and saved by `transformers`, imported here, and evaluated on 24 random tokens in float32, where logits are of
order 1. The weights are large enough that every component matters, and windows are shorter than the text.

FINDING (CPU, float32; JAX 0.10.2, torch 2.13, transformers 5.24): by 1e-6 to 4e-6 for the 15 families and their
variants, which is rounding. Tests allow 1e-4.
"""

import copy
import tempfile
from pathlib import Path
from typing import Any

from absl import app
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from configs import base
from rustgpt_jax.config.schema import ModelConfig
from rustgpt_jax.config.validation import resolve
from rustgpt_jax.model.presets import FAMILIES

TOKENS = 24

_GPT2: dict[str, Any] = {
    "architecture": "GPT2LMHeadModel",
    "vocab_size": 97,
    "n_positions": 64,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": 40,
}
_SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def _case(architecture: str, **keys: Any) -> dict[str, Any]:
    return {"architecture": architecture} | _SIZES | keys


def _rope(kind: str, base: float = 1e4, **keys: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": base, **keys}}


_LLAMA3 = _rope(
    "llama3", 5e5, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)
_YARN_KEYS = {"factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4.0, "beta_slow": 1.0}
_YARN = _rope("yarn", **_YARN_KEYS)
_LONGROPE = _rope(
    "longrope",
    factor=2.0,
    original_max_position_embeddings=32,
    short_factor=[1.0, 1.5, 2.0],
    long_factor=[1.0, 3.0, 5.0],
)

# A tiny model of each family: its class in transformers, and the values of its config.
CASES: dict[str, dict[str, Any]] = {
    "gpt2": _GPT2,
    "llama2": _case("LlamaForCausalLM", head_dim=8),
    "llama3": _case("LlamaForCausalLM", tie_word_embeddings=True, **_LLAMA3),
    "mistral": _case("MistralForCausalLM", head_dim=8, sliding_window=7),
    "qwen2": _case("Qwen2ForCausalLM"),
    "qwen3": _case("Qwen3ForCausalLM", head_dim=8),
    "gemma2": _case("Gemma2ForCausalLM", head_dim=8, num_hidden_layers=3, sliding_window=7, query_pre_attn_scalar=6),
    "gemma3": _case(
        "Gemma3ForCausalLM",
        head_dim=8,
        num_hidden_layers=4,
        sliding_window_pattern=3,
        sliding_window=7,
        query_pre_attn_scalar=8,
    ),
    "recurrent_gemma": _case(
        "RecurrentGemmaForCausalLM",
        hidden_size=32,
        num_hidden_layers=4,
        num_key_value_heads=1,
        lru_width=24,
        attention_window_size=7,
        block_types=["recurrent", "recurrent", "attention"],
        logits_soft_cap=5.0,
    ),
    "stablelm": _case("StableLmForCausalLM", hidden_size=32),
    "phi3": _case("Phi3ForCausalLM", hidden_size=32, sliding_window=7),
    "olmo2": _case("Olmo2ForCausalLM"),
    "smollm3": _case("SmolLM3ForCausalLM", num_hidden_layers=5),
    "mixtral": _case("MixtralForCausalLM", num_local_experts=4, intermediate_size=16),
    "qwen3_moe": _case(
        "Qwen3MoeForCausalLM", head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
}

VARIANTS: dict[str, dict[str, Any]] = {
    "gpt2 untied": _GPT2 | {"tie_word_embeddings": False, "scale_attn_weights": False},
    "llama, biases": _case("LlamaForCausalLM", attention_bias=True, mlp_bias=True),
    "llama, biases of attention": _case("LlamaForCausalLM", attention_bias=True),
    "llama, biases of feed-forwards": _case("LlamaForCausalLM", mlp_bias=True),
    "llama, exact gelu": _case("LlamaForCausalLM", hidden_act="gelu"),
    "llama, relu": _case("LlamaForCausalLM", hidden_act="relu"),
    "llama, dynamic": _case("LlamaForCausalLM", **_rope("dynamic", factor=4.0)),
    "llama, longrope": _case("LlamaForCausalLM", **_LONGROPE),
    "llama, yarn not truncated": _case("LlamaForCausalLM", **_rope("yarn", **_YARN_KEYS, truncate=False)),
    "gpt2, exact gelu": _GPT2 | {"activation_function": "gelu", "scale_attn_by_inverse_layer_idx": True},
    "gpt2, relu2": _GPT2 | {"activation_function": "relu2"},
    "qwen3, biases and relu2": _case("Qwen3ForCausalLM", head_dim=8, attention_bias=True, hidden_act="relu2"),
    "gemma2, exact gelu": _case(
        "Gemma2ForCausalLM", head_dim=8, sliding_window=7, query_pre_attn_scalar=6, hidden_activation="gelu"
    ),
    "mixtral, relu": _case("MixtralForCausalLM", num_local_experts=4, intermediate_size=16, hidden_act="relu"),
    "recurrent_gemma, biases, untied": _case(
        "RecurrentGemmaForCausalLM",
        hidden_size=32,
        attention_window_size=7,
        block_types=["attention", "recurrent"],
        attention_bias=True,
        tie_word_embeddings=False,
    ),
    "stablelm, biases": _case("StableLmForCausalLM", hidden_size=32, use_qkv_bias=True, partial_rotary_factor=0.5),
    "phi3, longrope": _case(
        "Phi3ForCausalLM",
        hidden_size=32,
        original_max_position_embeddings=32,
        partial_rotary_factor=0.75,
        **_LONGROPE,
    ),
    "llama, linear": _case("LlamaForCausalLM", **_rope("linear", factor=3.0)),
    "llama, yarn": _case("LlamaForCausalLM", **_YARN),
    "qwen2, windows": _case(
        "Qwen2ForCausalLM",
        num_hidden_layers=3,
        use_sliding_window=True,
        sliding_window=7,
        max_window_layers=1,
        tie_word_embeddings=True,
    ),
    "gemma3, linear": _case(
        "Gemma3ForCausalLM",
        head_dim=8,
        sliding_window_pattern=2,
        sliding_window=7,
        tie_word_embeddings=False,
        final_logit_softcapping=5.0,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "mixtral, window": _case("MixtralForCausalLM", num_local_experts=4, intermediate_size=16, sliding_window=7),
    "qwen3_moe, a dense layer": _case(
        "Qwen3MoeForCausalLM",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        num_hidden_layers=3,
        mlp_only_layers=[1],
        norm_topk_prob=True,
        hidden_act="gelu",
        use_sliding_window=True,
        sliding_window=7,
    ),
}


def get_config() -> ConfigDict:
    """Return the config of one family with the sizes of base.py."""
    config = base.get_config()
    config.model.update_from_flattened_dict(FAMILIES["qwen3"])
    return config


def random_reference(case: dict[str, Any], seed: int = 0) -> Any:
    """Return the `transformers` model of a case, with random weights such that every component matters."""
    import torch
    import transformers

    config_class = getattr(transformers, case["architecture"]).config_class
    # The config classes modify their arguments.
    keys = {key: copy.deepcopy(value) for key, value in case.items() if key != "architecture"}
    no_tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = config_class(**keys, **no_tokens, attn_implementation="eager")
    model = getattr(transformers, case["architecture"])(config).eval()
    generator = torch.Generator().manual_seed(seed)
    # With tied embeddings, large ones would make every token predict itself.
    embedding = 0.15 if config.tie_word_embeddings else 0.5
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1 and "bias" not in name:
                weight += 0.2 * noise
            elif weight.ndim == 1 or "embed" in name or "wte" in name or "wpe" in name:
                weight.copy_(embedding * noise)
            else:
                inputs = weight.shape[0] if case["architecture"].startswith("GPT2") else weight.shape[-1]
                weight.copy_(noise / inputs**0.5)
    return model


def model_config(knobs: dict[str, Any]) -> ModelConfig:
    """Return a model config with the knobs of a Hugging Face folder, and the defaults of base.py for the rest."""
    config = base.get_config()
    config.model.update_from_flattened_dict(knobs)
    return resolve(config).model


def largest_difference(case: dict[str, Any], folder: Path) -> float:
    """Save the model of a case in a folder, import it, and return the largest difference between the logits."""
    import numpy as np
    import torch

    from rustgpt_jax.interop.convert import compare_with_reference
    from rustgpt_jax.interop.hf_checkpoint import import_parameters, read_model
    from rustgpt_jax.model.flops import parameter_shapes
    from rustgpt_jax.workdir.params_io import read_parameters

    reference = random_reference(case)
    reference.save_pretrained(folder)
    knobs, architecture, _ = read_model(folder)
    model = model_config(knobs)
    import_parameters(folder, folder / "parameters.safetensors", model, architecture)
    params = read_parameters(folder / "parameters.safetensors", parameter_shapes(model))
    tokens_BT = np.random.default_rng(0).integers(0, case["vocab_size"], (1, TOKENS))
    with torch.no_grad():
        logits_BTV = reference(torch.tensor(tokens_BT)).logits.numpy()
    found = compare_with_reference(logits_BTV, tokens_BT, params, model).difference
    assert found is not None
    return found


def main(argv: list[str]) -> None:
    """Print a table of the differences."""
    del argv
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    table = Table("model", "architecture", "largest difference of a logit", box=None)
    for name, case in (CASES | VARIANTS).items():
        with tempfile.TemporaryDirectory() as folder:
            table.add_row(name, case["architecture"], f"{largest_difference(case, Path(folder)):.1e}")
    Console(width=120).print(table)


if __name__ == "__main__":
    app.run(main)
