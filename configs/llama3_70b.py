"""Llama 3 70B (arXiv 2407.21783) on any text, for 512 accelerators: four million tokens a step.

rustgpt plan --config=llama3_70b --devices=512 --chip=h100
"""

from ml_collections import ConfigDict

from rustgpt_jax import load_config


def get_config() -> ConfigDict:
    """80 layers of width 8192, 64 query heads, 8 key-value heads, context 8192; parameters sharded over all devices."""
    config = load_config("llama3_8b")
    config.model.n_layers = 80
    config.model.d_model = 8192
    config.model.attention.n_heads = 64
    config.model.d_ff = 28_672
    config.optimizer.learning_rate = 1.5e-4
    config.training.batch_size = 512
    return config
