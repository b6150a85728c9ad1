"""Model families as presets of the same components: the settings that define a family, independent of size.

A recipe starts with `config.model.update_from_flattened_dict(FAMILIES["qwen3"])`. Presets leave the knobs in SIZES and
NOT_IN_LOGITS to the recipe and set all others. Constants match the released models.
"""

from typing import Any

from rustgpt_jax.config.schema import ModelConfig, flatten

Knobs = dict[str, Any]

# Depth, widths, numbers of heads and experts, vocabulary, context.
SIZES = {
    *("vocab_size", "context_length", "n_layers", "d_model", "d_ff"),
    *("attention.n_heads", "attention.n_kv_heads", "attention.head_dim", "attention.local_window"),
    *("mla.kv_lora_rank", "mla.q_lora_rank", "mla.qk_rope_head_dim"),
    *("moe.n_experts", "moe.experts_per_token", "moe.d_expert"),
    *("recurrent.conv_width", "recurrent.width", "recurrent.blocks"),
}
# Settings that change the logits of one document only by rounding or not at all, and `extra`, which no component of
# this package reads.
NOT_IN_LOGITS = {
    *("dropout", "init_std", "moe.load_balance_loss_weight", "moe.router_z_loss", "scan_layers", "remat"),
    *("attention.kernel", "moe.kernel", "save_residuals", "mask_documents", "extra", "dtype"),
    *(f"precision.{name}" for name in ("mixer_dtype", "feedforward_dtype", "logits_dtype", "matmul_dtype")),
}

# Common to most families since Llama.
_DEFAULT: Knobs = {
    name: value for name, value in flatten(ModelConfig()).items() if name not in SIZES | NOT_IN_LOGITS
} | {
    "mixers": ("attention",),
    "feedforwards": ("swiglu",),
    "positions": ("rope",),
    "norm": "rmsnorm",
    "norm_placement": "pre",
    "norm_eps": 1e-6,
    "bias": False,
    "tie_embeddings": False,
    "rope.theta": 1e4,
    "moe.norm_topk_prob": True,
}

_GEMMA: Knobs = _DEFAULT | {
    "feedforwards": ("geglu",),
    "norm": "zero_centered_rmsnorm",
    "norm_placement": "sandwich",
    "tie_embeddings": True,
    "scale_embeddings": True,
}

FAMILIES: dict[str, Knobs] = {
    # Radford and others, Language Models are Unsupervised Multitask Learners (2019).
    "gpt2": _DEFAULT
    | {
        "feedforwards": ("gelu",),
        "positions": ("learned",),
        "norm": "layernorm",
        "norm_eps": 1e-5,
        "bias": True,
        "tie_embeddings": True,
    },
    # arXiv 2307.09288.
    "llama2": _DEFAULT | {"norm_eps": 1e-5},
    # arXiv 2407.21783, with the RoPE scaling of 3.1.
    "llama3": _DEFAULT
    | {
        "norm_eps": 1e-5,
        "rope.theta": 5e5,
        "rope.scaling": "llama3",
        "rope.factor": 8.0,
        "rope.original_context": 8192,
    },
    # arXiv 2310.06825: the first release, with its sliding window.
    "mistral": _DEFAULT | {"mixers": ("local_attention",), "norm_eps": 1e-5},
    # arXiv 2407.10671.
    "qwen2": _DEFAULT | {"attention.qkv_bias": True, "rope.theta": 1e6},
    # arXiv 2505.09388.
    "qwen3": _DEFAULT | {"attention.qk_norm": "head", "rope.theta": 1e6},
    # arXiv 2408.00118.
    "gemma2": _GEMMA
    | {"mixers": ("local_attention", "attention"), "final_logit_softcap": 30.0, "attention.logit_softcap": 50.0},
    # arXiv 2503.19786: five local layers, then a global one with slower positions.
    "gemma3": _GEMMA
    | {
        "mixers": (*["local_attention"] * 5, "attention"),
        "positions": (*["local_rope"] * 5, "rope"),
        "attention.qk_norm": "head",
        "rope.theta": 1e6,
    },
    # arXiv 2404.07839: two recurrent layers, then one local attention layer.
    "recurrent_gemma": _GEMMA
    | {
        "mixers": ("rg_lru", "rg_lru", "local_attention"),
        "norm_placement": "pre",
        "bias": True,
        "attention.qkv_bias": False,
        "final_logit_softcap": 30.0,
        "rope.fraction": 0.5,
        "recurrent.scale_first_token": False,
    },
    # arXiv 2402.17834: RoPE on a quarter of the channels.
    "stablelm": _DEFAULT | {"norm": "layernorm", "norm_eps": 1e-5, "norm_bias": True, "rope.fraction": 0.25},
    # arXiv 2404.14219: the first release, with its sliding window.
    "phi3": _DEFAULT | {"mixers": ("local_attention",), "norm_eps": 1e-5},
    # arXiv 2501.00656.
    "olmo2": _DEFAULT | {"norm_placement": "output", "attention.qk_norm": "projection", "rope.theta": 5e5},
    # huggingface.co/blog/smollm3: every fourth layer has no position encoding (arXiv 2501.18795).
    "smollm3": _DEFAULT | {"positions": (*["rope"] * 3, "none"), "tie_embeddings": True, "rope.theta": 5e6},
    # arXiv 2401.04088.
    "mixtral": _DEFAULT | {"feedforwards": ("moe",), "norm_eps": 1e-5, "rope.theta": 1e6},
    # arXiv 2505.09388.
    "qwen3_moe": _DEFAULT | {"feedforwards": ("moe",), "attention.qk_norm": "head", "rope.theta": 1e6},
}
