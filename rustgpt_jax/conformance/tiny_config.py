"""The small model that parts are checked in: an explicit value for every knob, so that nothing hangs on a recipe."""

from typing import Any

from rustgpt_jax.config.schema import ModelConfig
from rustgpt_jax.config.validation import check_model, checked
from rustgpt_jax.errors import UserError, suggestion

LENGTH = 12  # tokens in a row
ROWS = 16  # rows in a batch: one for each prefix of a row, and some more
# What the checks need: a token of its own for each place in LENGTH rows and one more, and a position for each place.
LEAST = {"vocab_size": LENGTH * LENGTH + 1, "context_length": LENGTH}

SMALL: dict[str, Any] = {
    "vocab_size": 151,
    "context_length": 64,
    "n_layers": 2,
    "d_model": 32,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 8,
    "d_ff": 48,
    "mixers": ("attention",),
    "feedforwards": ("swiglu",),
    "positions": ("rope",),
    "norm": "rmsnorm",
    "norm_placement": "pre",
    "norm_epsilon": 1e-5,
    "bias": True,
    "qkv_bias": None,
    "attention_output_bias": None,
    "feedforward_bias": None,
    "norm_bias": None,
    "tie_embeddings": False,
    "scale_embeddings": False,
    "embedding_scale": None,
    "logits_softcap": 0.0,
    "qk_norm": "none",
    "attention_scale": None,
    "attention_scale_by_layer": False,
    "attention_softcap": 0.0,
    "attention_sinks": False,
    "attention_kernel": "auto",
    # Shorter than a row, so that what leaves the window is seen to leave it.
    "local_window": 5,
    "latent_width": 16,
    "query_latent_width": None,
    "shared_key_width": 4,
    "conv_width": 3,
    "recurrent_width": 24,
    "recurrent_blocks": None,
    "scale_first_token": True,
    "rope_base": 100.0,
    "local_rope_base": 50.0,
    "rope_fraction": 1.0,
    "rope_scaling": "none",
    "rope_factor": 2.0,
    "rope_original_context": 32,
    "rope_slow_turns": 1.0,
    "rope_fast_turns": 4.0,
    "rope_attention_factor": None,
    "rope_truncate": True,
    "rope_short_factors": (1.0, 1.5, 2.0, 2.5),
    "rope_long_factors": (1.0, 2.0, 3.0, 4.0),
    "n_experts": 4,
    "experts_per_token": 2,
    "d_expert": 24,
    "expert_activation": "silu",
    "expert_capacity": 0.0,
    "normalize_experts": True,
    "load_balance": 0.01,
    "router_z_loss": 0.001,
    "options": (),
    "dropout": 0.0,
    # Of order d_model^-1/2: what a layer gives is as large as what it gets, and every weight matters.
    "init_std": 0.2,
    "dtype": "float32",
    "mixer_dtype": None,
    "feedforward_dtype": None,
    "logits_dtype": None,
    "matmul": "plain",
    "derivatives": "auto",
    "layers": "scanned",
    "remat": "none",
}


def small_model(**changes: Any) -> ModelConfig:
    """The small model with some of its knobs changed.

    Raises UserError for a knob that a model does not have, a value that it cannot have, and knobs that cannot go
    together.
    """
    for name in changes:
        if name not in SMALL:
            raise UserError(f"check: a model has no knob {name!r}.{suggestion(name, SMALL)}")
    values = {
        name: checked(f"model.{name}", value, f"config.model.{name}") for name, value in {**SMALL, **changes}.items()
    }
    for name, least in LEAST.items():
        if values[name] is None or values[name] < least:
            raise UserError(f"check: config.model.{name} must be at least {least} here, not {values[name]!r}.")
    model = ModelConfig(**values)
    check_model(model)
    return model
