"""nanoGPT's small recipe for a CPU, on any text file: 0.8M parameters, 2,000 steps, characters as tokens.

rustgpt train --config=shakespeare_char --config.data.paths=tinyshakespeare.txt

nanoGPT's README gives a validation loss of 1.88 on tiny Shakespeare (first 90% training, the rest validation).
"""

from ml_collections import ConfigDict

from rustgpt_jax import load_config


def get_config() -> ConfigDict:
    """GPT-2's architecture without biases, AdamW, a cosine schedule from 1e-3 to 1e-4."""
    config = load_config("base")
    config.tokenizer.name = "char"
    config.tokenizer.vocab_size = None
    config.data.corpus = "files"
    config.data.paths = ("tinyshakespeare.txt",)
    config.data.split = "tail"
    config.model.context_length = 64
    config.model.norm = "layernorm"
    config.model.norm_eps = 1e-5
    config.model.positions = ("learned",)
    config.model.feedforwards = ("gelu",)
    config.model.scan_layers = False
    config.optimizer.weight_decay_groups = ((r"norm|bias", 0.0), (r".*", 1.0))
    config.training.steps = 2000
    config.training.batch_size = 12
    config.training.steps_per_jit_call = 20
    config.schedule.warmup_steps = 100
    config.logging.log_every = 20
    config.logging.eval_every = 250
    config.logging.checkpoint_every = 250
    config.logging.sample_prompts = ("\n",)
    config.sampling.max_tokens = 200
    return config
