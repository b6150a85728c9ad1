"""Llama 3 8B (arXiv 2407.21783) on any text, for 64 accelerators: half a million tokens a step.

rustgpt plan --config=llama3_8b --devices=64 --chip=h100
rustgpt train --config=llama3_8b --config.data.paths='text/*.jsonl'
"""

from ml_collections import ConfigDict

from rustgpt_jax import load_config
from rustgpt_jax.model.presets import FAMILIES


def get_config() -> ConfigDict:
    """32 layers of width 4096, 32 query heads, 8 key-value heads, context 8192; parameters sharded over all devices."""
    config = load_config("base")
    config.tokenizer.name = "bpe"
    config.tokenizer.vocab_size = 128_256
    config.data.corpus = "files"
    config.data.paths = ("text/*.jsonl",)
    config.data.valid_fraction = 0.0005
    config.model.update_from_flattened_dict(FAMILIES["llama3"])
    # RoPE scaling came with the longer contexts of Llama 3.1.
    config.model.rope.scaling = "none"
    config.model.rope.factor = 1.0
    config.model.rope.original_context = None
    config.model.vocab_size = 128_256
    config.model.context_length = 8192
    config.model.n_layers = 32
    config.model.d_model = 4096
    config.model.attention.n_heads = 32
    config.model.attention.n_kv_heads = 8
    config.model.d_ff = 14_336
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.optimizer.learning_rate = 3e-4
    config.optimizer.b2 = 0.95
    config.schedule.warmup_steps = 2000
    config.training.steps = 500_000
    config.training.batch_size = 64
    config.training.steps_per_jit_call = 1
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.logging.log_every = 10
    config.logging.eval_every = 1000
    config.logging.eval_batches = 20
    config.logging.checkpoint_every = 1000
    config.logging.sample_prompts = ("The meaning of life is",)
    return config
