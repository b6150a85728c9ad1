"""A run that takes seconds, for tests and first experiments: a two-layer byte-level model on the bundled facts.

rustgpt train --config=tiny
"""

from ml_collections import ConfigDict

from rustgpt_jax import load_config


def get_config() -> ConfigDict:
    """Return the default config with a smaller model and fewer steps."""
    config = load_config("base")
    config.tokenizer.name = "byte"
    config.tokenizer.vocab_size = None
    config.model.context_length = 32
    config.model.n_layers = 2
    config.model.d_model = 32
    config.model.attention.n_heads = 2
    config.optimizer.learning_rate = 1e-2
    config.training.steps = 100
    config.training.batch_size = 8
    config.schedule.warmup_steps = 10
    config.logging.eval_every = 50
    config.logging.eval_batches = 4
    config.logging.checkpoint_every = 50
    return config
