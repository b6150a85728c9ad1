"""A modern architecture and optimizer with about as many parameters and tokens as shakespeare_char.py.

rustgpt train --config=shakespeare_char_modern --config.data.paths=tinyshakespeare.txt

experiments/shakespeare.py compares the two over three seeds.
"""

from ml_collections import ConfigDict

from rustgpt_jax import load_config


def get_config() -> ConfigDict:
    """RoPE, RMSNorm, SwiGLU and QK-norm, trained with Muon and a learning rate that decays linearly to zero."""
    config = load_config("shakespeare_char")
    config.model.norm = "rmsnorm"
    config.model.norm_eps = 1e-6
    config.model.positions = ("rope",)
    config.model.feedforwards = ("swiglu",)
    config.model.attention.qk_norm = "head"
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 3e-3
    config.schedule.name = "linear"
    config.schedule.final_lr_frac = 0.0
    return config
