"""A small modern model on real text: the source of the running Python's standard library, with byte-pair encoding.

rustgpt train --config=python_stdlib

Nothing is downloaded: the corpus is part of every Python installation. Training takes about 12 minutes on two cores.
"""

from ml_collections import ConfigDict

from rustgpt_jax import load_config


def get_config() -> ConfigDict:
    """RoPE, RMSNorm, SwiGLU, QK-norm and grouped heads, trained with Muon."""
    config = load_config("base")
    config.tokenizer.name = "bpe"
    config.tokenizer.vocab_size = 4096
    config.data.corpus = "python_stdlib"
    config.data.valid_fraction = 0.02
    config.model.context_length = 256
    config.model.n_layers = 4
    config.model.d_model = 192
    config.model.attention.n_heads = 6
    config.model.attention.n_kv_heads = 2
    config.model.attention.qk_norm = "head"
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 3e-3
    config.schedule.name = "linear"
    config.schedule.final_lr_frac = 0.0
    config.schedule.warmup_steps = 50
    config.training.steps = 1000
    config.training.batch_size = 8
    config.logging.eval_every = 100
    config.logging.eval_batches = 25
    config.logging.checkpoint_every = 250
    config.logging.sample_prompts = ("def read_lines(path):\n", "import ", "class Queue:\n")
    config.sampling.max_tokens = 64
    return config
