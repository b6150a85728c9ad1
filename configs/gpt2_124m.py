"""GPT-2 124M (OpenAI 2019) on any text, for an accelerator: half a million tokens a step, 315 billion in all.

rustgpt train --config=gpt2_124m --config.data.paths='openwebtext/*.jsonl'

`rustgpt plan --config=gpt2_124m --devices=1 --chip=h100` estimates 8 GB of device memory, which has not been measured
on a GPU. A microbatch has 16 sequences, so it can be split over 2, 4, 8 or 16 devices.
"""

from ml_collections import ConfigDict

from rustgpt_jax import load_config


def get_config() -> ConfigDict:
    """12 layers, 12 heads, 768 wide, context 1024, learned positions, LayerNorm with biases, GELU, tied embeddings."""
    config = load_config("base")
    config.tokenizer.name = "bpe"
    config.tokenizer.vocab_size = 50257
    config.data.corpus = "files"
    config.data.paths = ("openwebtext/*.jsonl",)
    config.data.valid_fraction = 0.0005
    # A multiple of 128 suits matrix units; the rows beyond the tokenizer's vocabulary are never used.
    config.model.vocab_size = 50304
    config.model.context_length = 1024
    config.model.n_layers = 12
    config.model.d_model = 768
    config.model.attention.n_heads = 12
    config.model.norm = "layernorm"
    config.model.norm_eps = 1e-5
    config.model.positions = ("learned",)
    config.model.feedforwards = ("gelu",)
    config.model.bias = True
    config.model.dtype = "bfloat16"
    config.optimizer.learning_rate = 6e-4
    config.optimizer.b2 = 0.95
    config.schedule.warmup_steps = 2000
    config.training.steps = 600_000
    config.training.batch_size = 512
    config.training.grad_accum_steps = 32
    config.training.steps_per_jit_call = 5
    config.logging.log_every = 10
    config.logging.eval_every = 1000
    config.logging.eval_batches = 20
    config.logging.checkpoint_every = 1000
    config.logging.sample_prompts = ("The meaning of life is",)
    return config
