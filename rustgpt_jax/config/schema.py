"""The config of a run: frozen dataclasses that declare every knob once.

A field gives its knob's type, default, documentation and valid range, and whether it is static or traced. Everything
else that lists knobs (configs/base.py, validation, `explain`, conformance checks, tests) reads them from here.
A config has two halves, which `partition` splits and `combine` merges:

    StaticConfig   selects a compiled program: shapes, component names, switches (hashable)
    hparams        arguments of that program: seed, learning rate, dropout, ... (a flat dict by dotted path)
"""

import dataclasses
import hashlib
import json
import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np

from rustgpt_jax.errors import UserError, suggest_names


def _field(default: Any, doc: str, **metadata: Any) -> Any:
    return dataclasses.field(
        default=default, metadata={"doc": doc, "traced": False, "static_if_zero": False, **metadata}
    )


def static_field(
    default: Any, doc: str, low: float | None = None, high: float | None = None, choices: tuple[str, ...] = ()
) -> Any:
    """Declare a static knob, which selects a compiled program.

    Args:
        default: Its default value.
        doc: What it means, for people who set it.
        low: The smallest valid value.
        high: The largest valid value.
        choices: The valid values of a string; all strings if empty.
    """
    return _field(default, doc, low=low, high=high, choices=choices)


def pattern_field(default: tuple[str, ...], doc: str) -> Any:
    """Declare a static knob that names components, such as a pattern that is repeated over the layers."""
    return _field(default, doc, pattern=True)


def traced_field(
    default: float, doc: str, low: float | None = None, high: float | None = None, static_if_zero: bool = False
) -> Any:
    """Declare a traced knob, an argument of compiled programs, so that changing its value recompiles nothing.

    Args:
        default: Its default value.
        doc: What it means, for people who set it.
        low: The smallest valid value.
        high: The largest valid value.
        static_if_zero: Whether 0 is a static value, with which the term scaled by the knob is left out of the program.
    """
    return _field(default, doc, low=low, high=high, traced=True, static_if_zero=static_if_zero)


ConfigT = TypeVar("ConfigT")


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer."""

    name: str = static_field(
        "bpe",
        "word: words and punctuation; char: characters; byte: UTF-8 bytes; bpe: byte-pair encoding learned from "
        "the corpus.",
    )
    # For a larger vocabulary the BPE trainer would reserve more memory than any machine has.
    vocab_size: int | None = static_field(
        1024,
        "Largest number of tokens to learn, including special tokens. None: all in the corpus (word and char only).",
        low=1,
        high=2**22,
    )


@dataclass(frozen=True)
class DataConfig:
    """Text sources, their split, and training sequences."""

    corpus: str = static_field(
        "facts",
        "facts, chat: bundled with the package; python_stdlib: Python's standard library; files: any text.",
    )
    paths: tuple[str, ...] = static_field(
        (),
        "`files` only: paths or globs of .txt (or other plain text), .json (a list of strings), .jsonl or .ndjson "
        "(one text or list of messages per line), and .csv or .tsv (the column `text`). On the command line, pass "
        "one path per flag or a Python list.",
    )
    max_documents: int | None = static_field(None, "Read at most this many documents. None: all.", low=1)
    split: str = static_field(
        "document",
        "document: a hash of each document assigns it to training or validation, so adding files does not "
        "move other documents. tail: the end of the whole text is validation (for a single long document).",
        choices=("document", "tail"),
    )
    valid_fraction: float = static_field(0.1, "Fraction of the corpus held out for validation.", low=0.0, high=0.9)
    loss_mask: str = static_field(
        "all",
        "Tokens that count in the loss. all: every token; assistant: in dialogues, only tokens of the assistant.",
        choices=("all", "assistant"),
    )
    seq_len: int | None = static_field(None, "Tokens in a training sequence. None: model.context_length.", low=2)


@dataclass(frozen=True)
class AttentionConfig:
    """Attention: heads, scores and kernel. deltanet uses the heads and biases too."""

    n_heads: int = static_field(4, "Query heads of attention.", low=1)
    n_kv_heads: int | None = static_field(
        None,
        "Key/value heads, each shared by n_heads / n_kv_heads query heads (arXiv 2305.13245). None: n_heads.",
        low=1,
    )
    head_dim: int | None = static_field(None, "Channels of a head. None: d_model / n_heads.", low=1)
    qkv_bias: bool | None = static_field(
        None, "Whether the query, key and value projections have biases. None: same as model.bias."
    )
    output_bias: bool | None = static_field(
        None, "Whether the output projection of attention has a bias. None: same as model.bias."
    )
    qk_norm: str = static_field(
        "none",
        "Normalize queries and keys by the model's norm. head: each head (arXiv 2010.04245); projection: all "
        "heads of a token together; none.",
        choices=("none", "head", "projection"),
    )
    scale: float | None = static_field(
        None,
        "Multiplier of attention scores. None: head_dim^-1/2, or (head_dim + qk_rope_head_dim)^-1/2 in "
        "latent_attention.",
        low=0.0,
    )
    scale_by_layer: bool = static_field(
        False,
        "Also divide attention scores by the layer number, counted from 1 (GPT-2's "
        "scale_attn_by_inverse_layer_idx). Used by attention and local_attention.",
    )
    logit_softcap: float = traced_field(
        0.0, "Bound attention scores to plus and minus this value by tanh. 0: no bound.", low=0.0, static_if_zero=True
    )
    sinks: bool = static_field(
        False, "Add a learned logit to the softmax of each head that contributes no value (arXiv 2309.17453)."
    )
    kernel: str = static_field(
        "auto",
        "Attention implementation; results differ by rounding only, and decoding with a cache always uses reference. "
        "auto: on NVIDIA GPUs in bfloat16, cudnn, except that packed documents use tokamax on Hopper and later if "
        "installed (cudnn would need a mask); tokamax on TPUs; triangular on CPUs from 128 to 2047 tokens; else as "
        "portable; portable: blockwise from 2048 tokens, else reference; reference: all scores in memory; "
        "triangular: for each quarter of the row, only scores with tokens before its end; blockwise: scores of "
        "512 tokens at a time; cudnn, tokamax: flash attention (arXiv 2307.08691) of these libraries.",
        choices=("auto", "portable", "reference", "triangular", "blockwise", "cudnn", "tokamax"),
    )
    local_window: int = static_field(64, "Tokens that a query of local_attention sees, including itself.", low=1)

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.n_kv_heads or self.n_heads


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embeddings (arXiv 2104.09864)."""

    theta: float = traced_field(
        10000.0, "Base of the RoPE frequencies: the slowest wavelength is about 2 pi times this.", low=1.0
    )
    local_theta: float = traced_field(
        10000.0, "Base of the RoPE frequencies of local_rope, which is not scaled.", low=1.0
    )
    fraction: float = static_field(
        1.0, "Fraction of the channels of a head that RoPE rotates, starting with the first.", low=0.0, high=1.0
    )
    scaling: str = static_field(
        "none",
        "Extends RoPE to longer contexts: none, linear (arXiv 2306.15595), llama3 (arXiv 2407.21783), yarn (arXiv "
        "2309.00071), longrope (arXiv 2402.13753).",
    )
    factor: float = traced_field(1.0, "Factor by which the context is extended.", low=1.0)
    original_context: int | None = static_field(
        None, "llama3, yarn and longrope: the context length before scaling.", low=1
    )
    beta_slow: float = traced_field(
        1.0,
        "llama3 (low_freq_factor) and yarn (beta_slow): channels with fewer turns in the original context are "
        "slowed by the whole factor.",
        low=0.0,
    )
    beta_fast: float = traced_field(
        4.0,
        "llama3 (high_freq_factor) and yarn (beta_fast): channels with more turns in the original context are not "
        "slowed.",
        low=0.0,
    )
    attention_factor: float | None = static_field(
        None,
        "Multiplier for queries and keys. None: the default of the scaling method, which is 0.1 ln(factor) + "
        "1 for yarn, sqrt(1 + ln(factor) / ln(original_context)) for longrope, and 1 otherwise.",
        low=0.0,
    )
    truncate: bool = static_field(True, "yarn: round the bounds of the interpolated channel range to integers.")
    short_factors: tuple[float, ...] = static_field(
        (), "longrope: divisors of the frequency of each pair of channels, for contexts up to original_context."
    )
    long_factors: tuple[float, ...] = static_field(
        (), "longrope: like short_factors, for a context_length above original_context."
    )


@dataclass(frozen=True)
class MLAConfig:
    """Multi-head latent attention, the mixer latent_attention (arXiv 2405.04434)."""

    kv_lora_rank: int | None = static_field(
        None,
        "Width of the latent from which keys and values are projected. None: 4 head_dim.",
        low=1,
    )
    q_lora_rank: int | None = static_field(
        None,
        "Width of the latent from which queries are projected. None: no latent for queries.",
        low=1,
    )
    qk_rope_head_dim: int | None = static_field(
        None,
        "Width of the rotated key that all heads share. None: half of head_dim, rounded up to an even number.",
        low=2,
    )


@dataclass(frozen=True)
class MoEConfig:
    """Settings of mixture-of-experts layers (`feedforwards` entry "moe")."""

    n_experts: int = static_field(8, "Number of experts in a layer.", low=1)
    experts_per_token: int = static_field(2, "Number of experts that each token is routed to.", low=1)
    d_expert: int | None = static_field(None, "Hidden width of an expert. None: same as swiglu.", low=1)
    expert_activation: str = static_field(
        "silu",
        "Activation of the gated experts: silu, gelu (tanh approximation), gelu_exact, relu or relu_squared.",
        choices=("silu", "gelu", "gelu_exact", "relu", "relu_squared"),
    )
    capacity_factor: float = static_field(
        0.0,
        "Tokens that an expert takes per row, as a multiple of the average; further tokens are dropped. A "
        "token then depends on those before it, and decoding, which drops none, differs from training. 0: "
        "dropless.",
        low=0.0,
    )
    kernel: str = static_field(
        "auto",
        "Implementation of the experts' matrix products without dropping. blocked: a scan over blocks of tokens that "
        "share an expert, with up to one block of padding per expert; ragged_dot: jax.lax.ragged_dot, for which XLA "
        "multiplies every token by every expert on CPUs and, unless flags select a kernel, on GPUs. auto: ragged_dot "
        "on TPUs, otherwise blocked.",
        choices=("auto", "blocked", "ragged_dot"),
    )
    norm_topk_prob: bool = static_field(
        True,
        "Divide the routing weights of a token by their sum, so that they add up to 1 (Mixtral). False: use "
        "the softmax over all experts (Switch). With one expert per token this must be False, since a constant "
        "weight of 1 does not train the router.",
    )
    load_balance_loss_weight: float = traced_field(
        0.01,
        "Coefficient of the load-balancing loss (arXiv 2101.03961): n_experts * sum over experts of (share "
        "of tokens routed to the expert * its mean probability), as in transformers; it equals experts_per_token "
        "for balanced routing. The losses of all layers are summed (transformers pools the tokens of all layers "
        "instead). 0: disabled.",
        low=0.0,
        static_if_zero=True,
    )
    router_z_loss: float = traced_field(
        0.0,
        "Coefficient of the squared log of the router's softmax normalizer (arXiv 2202.08906). 0: disabled.",
        low=0.0,
        static_if_zero=True,
    )


@dataclass(frozen=True)
class RecurrentConfig:
    """Recurrent mixers, rg_lru and deltanet."""

    conv_width: int = static_field(4, "rg_lru and deltanet: width in tokens of their short convolution.", low=1)
    width: int | None = static_field(None, "rg_lru: channels of the state. None: d_model.", low=1)
    blocks: int | None = static_field(
        None,
        "rg_lru: number of channel blocks in the gates; each gate reads only its own block, as in Griffin. None: "
        "gates read all channels.",
        low=1,
    )
    scale_first_token: bool = static_field(
        True,
        "rg_lru: multiply the input of a document's first token by sqrt(1 - a^2), like every other token (arXiv "
        "2402.19427). False: do not scale it (RecurrentGemma).",
    )


@dataclass(frozen=True)
class PrecisionConfig:
    """Data types of parts of the model where they differ from model.dtype."""

    mixer_dtype: str | None = static_field(
        None,
        "Type in which mixers compute and keep their caches; the residual stream does not. None: model.dtype.",
        choices=("float32", "bfloat16"),
    )
    feedforward_dtype: str | None = static_field(
        None, "Type in which feed-forwards compute. None: model.dtype.", choices=("float32", "bfloat16")
    )
    logits_dtype: str | None = static_field(
        None,
        "Type of the operands of the unembedding; logits are float32. None: model.dtype.",
        choices=("float32", "bfloat16"),
    )
    matmul_dtype: str | None = static_field(
        None,
        "Type that the operands of linear layers in blocks are rounded to, in the backward pass too; sums and "
        "results keep the dtype of the layer. float8 has a scale for each tensor (arXiv 2209.05433) and is fast "
        "from the H100 on; its scales are computed from all tokens of a call, so a token depends slightly on "
        "later tokens and on other rows. None: model.dtype.",
        choices=("bfloat16", "float8"),
    )


@dataclass(frozen=True)
class ModelConfig:
    """Components and shapes of the model."""

    vocab_size: int | None = static_field(
        None, "Rows of the embedding table. None: the vocabulary size of the tokenizer.", low=1
    )
    context_length: int = static_field(
        128, "Largest number of tokens that the model attends to, and the size of a learned position table.", low=2
    )
    n_layers: int = static_field(4, "Number of blocks.", low=1)
    d_model: int = static_field(128, "Width of the residual stream.", low=1)
    d_ff: int | None = static_field(
        None,
        "Hidden width of the feed-forward. None: 4 d_model, or 8/3 d_model for gated feed-forwards (rounded up to "
        "a multiple of 8).",
        low=1,
    )
    mixers: tuple[str, ...] = pattern_field(
        ("attention",),
        "Token mixers, a pattern repeated over the layers (as are feedforwards and positions): attention, "
        "local_attention, latent_attention; rg_lru and deltanet, which are recurrent and need no positions; or "
        "the import path of your own component, such as my_lab.mixers:Retention.",
    )
    feedforwards: tuple[str, ...] = pattern_field(
        ("swiglu",),
        "Feed-forwards, a pattern: gelu (tanh approximation), gelu_exact, relu, relu_squared; gated: swiglu, "
        "geglu, geglu_exact, reglu, relu_squared_glu; or a mixture of experts: moe.",
    )
    positions: tuple[str, ...] = pattern_field(
        ("rope",),
        "Position encodings, a pattern. learned: a table added to the embeddings; rope: rotated queries and keys "
        "(arXiv 2104.09864); local_rope: RoPE with rope.local_theta; alibi: scores that fall with distance (arXiv "
        "2108.12409); none.",
    )
    norm: str = static_field("rmsnorm", "layernorm, rmsnorm, or zero_centered_rmsnorm, which multiplies by 1 + scale.")
    norm_placement: str = static_field(
        "pre",
        "pre: norms before each sublayer and at the end (arXiv 2002.04745); post: after each residual sum (arXiv "
        "1706.03762); output: on the output of each sublayer, and at the end (arXiv 2501.00656); sandwich: pre "
        "and output (arXiv 2105.13290).",
        choices=("pre", "post", "output", "sandwich"),
    )
    norm_eps: float = traced_field(1e-6, "Added to the variance or mean square that a norm divides by.", low=0.0)
    bias: bool = static_field(False, "Use bias vectors in linear layers and layer norms.")
    feedforward_bias: bool | None = static_field(
        None, "Whether the linear layers of feed-forwards have biases (moe has none). None: same as model.bias."
    )
    norm_bias: bool | None = static_field(None, "Whether layer norms have biases. None: same as model.bias.")
    tie_embeddings: bool = static_field(
        True, "Use the embedding table, transposed, as the output layer (arXiv 1608.05859)."
    )
    scale_embeddings: bool = static_field(False, "Multiply embeddings by embedding_scale (arXiv 1706.03762).")
    embedding_scale: float | None = static_field(None, "The embedding multiplier. None: sqrt(d_model).", low=0.0)
    final_logit_softcap: float = traced_field(
        0.0,
        "Bound logits to plus and minus this value by tanh (arXiv 2408.00118). 0: no bound.",
        low=0.0,
        static_if_zero=True,
    )
    mask_documents: bool = static_field(
        True,
        "Whether tokens see only their own document where a sequence contains several. False: the sequence is one "
        "document, as for GPT-2, and attention needs no mask but the causal one.",
    )
    extra: tuple[tuple[str, float], ...] = static_field(
        (), 'Static knobs of your own components as (name, number) pairs: (("decay", 0.9),).'
    )
    dropout: float = traced_field(
        0.0,
        "Probability of dropping an activation in training. 0: no dropout.",
        low=0.0,
        high=0.99,
        static_if_zero=True,
    )
    init_std: float = traced_field(
        0.02,
        "Standard deviation of initial weights; projections into the residual stream are divided by sqrt(2 n_layers).",
        low=0.0,
    )
    dtype: str = static_field(
        "float32",
        "Type of activations, also of the residual stream, and of matrix products: float32 or bfloat16. Parameters "
        "are float32, and norms and losses are computed in float32. "
        "On the command line, auto chooses for the device: bfloat16 on GPUs and TPUs; on CPUs float32, with "
        "bfloat16 as precision.matmul_dtype and precision.logits_dtype if the processor has instructions for it.",
        choices=("float32", "bfloat16"),
    )
    save_residuals: bool | None = static_field(
        None,
        "Materialize what the gradients of linear layers and activations are computed from (the slope of an "
        "activation, a transposed operand) instead of letting the compiler recompute it. Results differ by "
        "rounding only. None: True on CPUs, where it is faster, else False.",
    )
    scan_layers: bool = static_field(
        True,
        "True: compile one block and run it in a loop; False: compile every layer, slower to start, faster if small.",
    )
    remat: str = static_field(
        "none",
        "Recomputation in the backward pass to save memory, from least to most. none: only norms, activations and "
        "casts; dots: all but matrix products; dots_no_batch: all but products with weights, so attention too; full: "
        "each block. offload is dots_no_batch with saved activations in host memory. On the command line, auto chooses "
        "for the device: dots_no_batch on accelerators where attention is faster to recompute than what it replaces "
        "is to write and read, else none.",
        choices=("none", "dots", "dots_no_batch", "full", "offload"),
    )
    attention: AttentionConfig = AttentionConfig()
    rope: RopeConfig = RopeConfig()
    mla: MLAConfig = MLAConfig()
    moe: MoEConfig = MoEConfig()
    recurrent: RecurrentConfig = RecurrentConfig()
    precision: PrecisionConfig = PrecisionConfig()

    @property
    def period(self) -> int:
        """Number of blocks after which the patterns of mixers, feed-forwards and positions all repeat."""
        return math.lcm(len(self.mixers), len(self.feedforwards), len(self.positions))

    def block(self, layer: int) -> "ModelConfig":
        """Return the config of a layer's block, with each pattern reduced to the component of that layer."""
        names = (self.mixers, self.feedforwards, self.positions)
        mixer, feedforward, position = (pattern[layer % len(pattern)] for pattern in names)
        return dataclasses.replace(self, mixers=(mixer,), feedforwards=(feedforward,), positions=(position,))

    @property
    def mixer_config(self) -> "ModelConfig":
        """A block's mixer config, with the dtype of mixers."""
        return dataclasses.replace(self, dtype=self.precision.mixer_dtype or self.dtype)

    @property
    def feedforward_config(self) -> "ModelConfig":
        """A block's feed-forward config, with the dtype of feed-forwards."""
        return dataclasses.replace(self, dtype=self.precision.feedforward_dtype or self.dtype)

    @property
    def has_qkv_bias(self) -> bool:
        """True if the query, key and value projections have biases."""
        return self.bias if self.attention.qkv_bias is None else self.attention.qkv_bias

    @property
    def has_attention_output_bias(self) -> bool:
        """True if the output projection of attention has a bias."""
        return self.bias if self.attention.output_bias is None else self.attention.output_bias

    @property
    def has_feedforward_bias(self) -> bool:
        """True if the linear layers of dense feed-forwards have biases."""
        return self.bias if self.feedforward_bias is None else self.feedforward_bias

    @property
    def has_norm_bias(self) -> bool:
        """True if layer norms have biases."""
        return self.bias if self.norm_bias is None else self.norm_bias

    @property
    def head_width(self) -> int:
        """Channels of a head."""
        return self.attention.head_dim or self.d_model // self.attention.n_heads

    @property
    def rotated_channels(self) -> int:
        """Number of channels per head that RoPE rotates."""
        return int(self.head_width * self.rope.fraction)

    def get_extra(self, name: str) -> float:
        """Return the value of a knob in `extra`, for custom components. Raises UserError if it is not set."""
        values = dict(self.extra)
        if name not in values:
            raise UserError(f"config.model.extra has no {name!r}.{suggest_names(name, values)}")
        return values[name]


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer."""

    name: str = static_field(
        "adamw",
        "adamw, adam (decay as an L2 gradient), sgd, lion, muon or schedule_free (AdamW evaluated at its average; "
        "meant for the schedule constant).",
    )
    learning_rate: float = traced_field(
        1e-3, "Peak learning rate, which the schedule multiplies by a factor from 0 to 1.", low=0.0
    )
    b1: float = traced_field(
        0.9,
        "Decay rate of the first moment of adam, adamw and lion, and of adamw within muon. schedule_free: the "
        "weight of the average in the point where gradients are computed, above 0.",
        low=0.0,
        high=0.999999,
    )
    b2: float = traced_field(
        0.99,
        "Decay rate of the second moment of adam, adamw and schedule_free; for lion, of the momentum.",
        low=0.0,
        high=0.999999,
    )
    eps: float = traced_field(
        1e-8, "Added to the root of the second moment that adam, adamw and schedule_free divide by.", low=1e-30
    )
    momentum: float = traced_field(0.95, "Momentum of sgd and muon.", low=0.0, high=1.0)
    muon_learning_rate: float = traced_field(
        0.02,
        "muon: learning rate of the matrices inside the blocks; all other parameters use learning_rate.",
        low=0.0,
    )
    weight_decay: float = traced_field(
        0.1,
        "Decoupled weight decay, multiplied by the learning rate and by the factor of the parameter's group.",
        low=0.0,
    )
    weight_decay_groups: tuple[tuple[str, float], ...] = static_field(
        ((r"norm|bias|decay|sinks", 0.0), (r".*", 1.0)),
        "(regular expression, factor) pairs: the first expression found in the path of a parameter gives its "
        "factor. Every parameter must match one.",
    )
    clip_norm: float = traced_field(
        1.0,
        "Scale gradients so that their global norm is at most this. 0: no clipping.",
        low=0.0,
        static_if_zero=True,
    )
    offload_state: bool = static_field(
        False,
        "Keep optimizer state in host memory and move it to the device for each update: slower, for models that "
        "would not fit otherwise.",
    )
    state_dtype: str = static_field(
        "float32",
        "Type of momentum and first moments, and of z in schedule_free: float32 or bfloat16. Second moments are "
        "always float32: they change by a fraction 1 - b2 per step, which bfloat16 would round away. It also "
        "rounds away steps of z below 1/256 of a parameter: for schedule_free, keep float32 if learning rates are "
        "small.",
        choices=("float32", "bfloat16"),
    )


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning-rate schedule."""

    name: str = static_field(
        "cosine", "constant, linear, cosine or wsd (warmup, stable, decay); each after a linear warmup."
    )
    warmup_steps: int = traced_field(20, "Steps in which the learning rate rises linearly from 0.", low=0)
    decay_frac: float = traced_field(
        0.2, "wsd: fraction of the steps, at the end, in which the learning rate falls linearly.", low=0.0, high=1.0
    )
    final_lr_frac: float = traced_field(
        0.1, "Factor of the learning rate at the end of linear, cosine and wsd.", low=0.0, high=1.0
    )


@dataclass(frozen=True)
class TrainingConfig:
    """Number and size of training steps."""

    steps: int = traced_field(200, "Optimizer steps.", low=1)
    # Takes precedence over `steps` until data.preprocess.resolve_epochs has replaced it by steps.
    epochs: float | None = static_field(
        None,
        "Passes over the training text, such as 3 or 0.5; the run records the resulting number of steps. "
        "None: training.steps applies.",
        low=1e-09,
    )
    batch_size: int = static_field(16, "Sequences in a step, over all devices and microbatches.", low=1)
    grad_accum_steps: int = static_field(
        1,
        "Number of microbatches per batch, processed sequentially to save memory. The gradient is that of the "
        "whole batch, except for the load balance of moe, which is computed per microbatch.",
        low=1,
    )
    # Memory use grows with this number, since each call has a slot for every step.
    steps_per_jit_call: int = static_field(
        10, "Optimizer steps in one call of the compiled program. Results do not depend on it.", low=1, high=2**16
    )
    z_loss: float = traced_field(
        0.0,
        "Coefficient of the squared log of the softmax normalizer in the loss (arXiv 2204.02311). 0: disabled.",
        low=0.0,
        static_if_zero=True,
    )
    loss_chunk_size: int | None = static_field(
        None,
        "Tokens on each device whose logits, and their gradient, are computed at a time. None: as many as fit in 0.5 "
        "GiB.",
        low=1,
    )


@dataclass(frozen=True)
class MeshConfig:
    """Number of devices per mesh axis; -1, for one axis, means all remaining devices.

    Results do not depend on the mesh, and a run may resume with another one.
    """

    data: int = static_field(-1, "Devices that split the batch and replicate the state.", low=-1)
    fsdp: int = static_field(
        1,
        "Devices that split the batch and the parameters, which are gathered layer by layer (arXiv 1910.02054).",
        low=-1,
    )
    expert: int = static_field(
        1, "Devices that split the batch and the experts of each layer (arXiv 2006.16668).", low=-1
    )
    context: int = static_field(1, "Devices that split each sequence.", low=-1)
    tensor: int = static_field(
        1, "Devices that split heads, hidden channels and the vocabulary (arXiv 1909.08053).", low=-1
    )


@dataclass(frozen=True)
class FaultsConfig:
    """Handling of non-finite steps."""

    nonfinite_policy: str = static_field(
        "stop",
        "A step whose loss, gradient or update is not finite changes no parameter. stop: end the run; skip: "
        "continue with the next batch; rewind: restore the last scheduled checkpoint and continue with the batches "
        "after the bad one.",
        choices=("stop", "skip", "rewind"),
    )
    max_skipped: int = static_field(10, "Number of non-finite steps after which skip and rewind stop the run.", low=0)


@dataclass(frozen=True)
class LoggingConfig:
    """Intervals of metrics, evaluations, samples and checkpoints."""

    log_every: int = static_field(10, "Steps between lines of training metrics.", low=1)
    eval_every: int = static_field(100, "Steps between evaluations, which also write samples.", low=1)
    eval_batches: int | None = static_field(None, "Validation batches in an evaluation. None: all.", low=1)
    checkpoint_every: int = static_field(100, "Steps between checkpoints.", low=1)
    best_metric: str = static_field(
        "valid/loss",
        "Metric whose lowest value in a stage marks the best checkpoint. train/mean_loss: the mean of the training "
        "losses logged since the previous evaluation, for models that are meant to memorize their text.",
        choices=("valid/loss", "train/mean_loss"),
    )
    sample_prompts: tuple[str, ...] = static_field(
        (),
        "Prompts that each evaluation continues; for dialogue data, questions to answer. On the command line, "
        "pass one text per flag or a Python list.",
    )
    trackers: tuple[str, ...] = pattern_field(
        ("tensorboard",),
        "Tools that show the metrics, which metrics.jsonl records in any case: tensorboard, wandb, mlflow, or the "
        "import path of your own MetricWriter, such as my_lab.trackers:Dashboard. This and the next two knobs may "
        "change at any time.",
    )
    project: str | None = static_field(
        None,
        "The project in W&B, and the experiment in MLflow. None: WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME if set, else "
        "rustgpt_jax.",
    )
    tags: tuple[str, ...] = static_field((), "Tags of the run in W&B and MLflow.")


@dataclass(frozen=True)
class SamplingConfig:
    """Text generation."""

    seed: int = static_field(
        0,
        "Seed of generated text, which is a function of the parameters, the prompt, the sampling knobs and this seed.",
        low=0,
        high=2**32 - 1,
    )
    max_tokens: int = static_field(128, "Largest number of tokens to generate.", low=1)
    temperature: float = static_field(0.8, "0: greedy; 1: the model's own distribution.", low=0.0)
    top_k: int = static_field(0, "Keep only the k most likely tokens. 0: all.", low=0)
    top_p: float = static_field(
        0.95,
        "Keep the most likely tokens whose probabilities reach this sum (arXiv 1904.09751). 1: all.",
        low=0.0,
        high=1.0,
    )
    min_p: float = static_field(
        0.0,
        "Keep tokens at least this fraction as likely as the most likely one (arXiv 2407.01082). 0: all.",
        low=0.0,
        high=1.0,
    )
    repetition_penalty: float = static_field(
        1.0, "Divide the logits of tokens seen so far by this (arXiv 1909.05858). 1: no penalty.", low=1.0
    )
    past_context: str = static_field(
        "stop",
        "Behavior when a text fills the context. stop; slide: continue from the last half of the context.",
        choices=("stop", "slide"),
    )
    history_turns: int | None = static_field(
        None, "Earlier exchanges included with a question in a chat. None: as many as fit into the context.", low=0
    )
    weight_dtype: str | None = static_field(
        None,
        "Type that the weights of linear layers are rounded to for decoding: bfloat16, or int8 with a scale per "
        "output channel. Faster, but changes what is generated. None: no additional rounding.",
        choices=("bfloat16", "int8"),
    )
    matmul_impl: str = static_field(
        "plain",
        "Matrix-vector products on CPUs; results differ by rounding only. plain: XLA; native: C++, faster, "
        "compiled on first use, and replaced by plain if there is no compiler.",
        choices=("plain", "native"),
    )


@dataclass(frozen=True)
class StageConfig:
    """One stage of a run: a name, and the knobs it overrides."""

    name: str
    overrides: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Config:
    """The config of a run."""

    seed: int = traced_field(0, "Determines initial parameters, data order and dropout.", low=0, high=2**32 - 1)
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    training: TrainingConfig = TrainingConfig()
    mesh: MeshConfig = MeshConfig()
    faults: FaultsConfig = FaultsConfig()
    logging: LoggingConfig = LoggingConfig()
    sampling: SamplingConfig = SamplingConfig()
    stages: tuple[StageConfig, ...] = static_field(
        (),
        "Stages run in order on the same parameters and optimizer state; each lists the fields it "
        'changes: ({"name": "pretrain", "data": {...}}, {"name": "instruct", ...}). Empty: one stage.',
    )

    @property
    def seq_len(self) -> int:
        """The number of tokens of a training sequence."""
        return self.data.seq_len or self.model.context_length


# The static half: the groups of the config that compiled steps depend on.


@dataclass(frozen=True)
class StaticConfig:
    """Static half of a config, which selects a compiled program. Traced fields hold TRACED, or 0 if 0 is static."""

    seed: Any
    model: ModelConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    training: TrainingConfig


TRACED = "traced"

Hyperparams = dict[str, Any]


def partition(config: Config) -> tuple[StaticConfig, Hyperparams]:
    """Split a config into the static half, which selects a program, and that program's arguments by dotted path.

    The arguments are NumPy scalars of fixed types, so that changing their values recompiles nothing.
    """
    hparams: Hyperparams = {}

    def strip(node: Any, prefix: str) -> Any:
        changes: dict[str, Any] = {}
        for field in dataclasses.fields(node):
            path, value = prefix + field.name, getattr(node, field.name)
            if dataclasses.is_dataclass(value):
                changes[field.name] = strip(value, path + ".")
            elif is_traced(path) and not (get_field(path).metadata["static_if_zero"] and value == 0):
                changes[field.name] = TRACED
                hparams[path] = np.uint32(value) if path == "seed" else np.float32(value)
        return dataclasses.replace(node, **changes)

    whole = StaticConfig(config.seed, config.model, config.optimizer, config.schedule, config.training)
    return strip(whole, ""), hparams


def combine(static: StaticConfig, hparams: Mapping[str, Any]) -> StaticConfig:
    """Replace every TRACED by the value (or tracer) at its path in `hparams`: the inverse of `partition`."""

    def fill(node: Any, prefix: str) -> Any:
        changes: dict[str, Any] = {}
        for field in dataclasses.fields(node):
            value = getattr(node, field.name)
            if dataclasses.is_dataclass(value):
                changes[field.name] = fill(value, prefix + field.name + ".")
            elif isinstance(value, str) and value == TRACED:
                changes[field.name] = hparams[prefix + field.name]
        return dataclasses.replace(node, **changes)

    return fill(static, "")


def is_enabled(value: Any) -> bool:
    """Return whether the program has the term scaled by a value: False only for a Python zero, never for a tracer."""
    return not (isinstance(value, (int, float)) and value == 0)


def for_inference(model: ModelConfig) -> ModelConfig:
    """Return a model config for inference.

    Knobs that only training reads are 0, so that models that differ only in these share a program, and kernels are
    chosen for the current device instead of the one that trained the model.
    """
    return replace_paths(
        model,
        {
            "dropout": 0.0,
            "init_std": 0.0,
            "moe.load_balance_loss_weight": 0.0,
            "moe.router_z_loss": 0.0,
            "attention.kernel": "auto",
            "moe.kernel": "auto",
            "save_residuals": False,
        },
    )


# Fields by dotted path.


def fields_by_path(cls: type, prefix: str = "") -> dict[str, dataclasses.Field[Any]]:
    """Return the dataclass fields of a config (or group) class by dotted path."""
    fields: dict[str, dataclasses.Field[Any]] = {}
    for field in dataclasses.fields(cls):
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            fields |= fields_by_path(field.type, prefix + field.name + ".")
        else:
            fields[prefix + field.name] = field
    return fields


FIELDS: dict[str, dataclasses.Field[Any]] = {
    path: field for path, field in fields_by_path(Config).items() if path != "stages"
}


def get_field(path: str) -> dataclasses.Field[Any]:
    """Return the dataclass field at a dotted path such as 'optimizer.learning_rate'."""
    return FIELDS[path]


def is_traced(path: str) -> bool:
    """Return whether the knob at a dotted path is an argument of compiled programs."""
    return bool(get_field(path).metadata["traced"])


def get_path(config: Any, path: str) -> Any:
    """Return the value at a dotted path of a config."""
    for name in path.split("."):
        config = getattr(config, name)
    return config


def flatten(config: Any) -> dict[str, Any]:
    """Return the value of every knob of a config (or group) except stages, by dotted path in order of declaration."""
    return {path: get_path(config, path) for path in fields_by_path(type(config)) if path != "stages"}


def defaults() -> dict[str, Any]:
    """Return the default of every knob in nested dicts."""
    return dataclasses.asdict(Config())


# Stages.

STEPS, EPOCHS = "training.steps", "training.epochs"


@dataclass(frozen=True)
class Stage:
    """One stage of a run: steps `first_step` to `end_step` (exclusive), with a complete config.

    `until` is the step after which the run continued with another config, or None.
    """

    name: str
    first_step: int
    config: Config
    until: int | None = None

    @property
    def end_step(self) -> int:
        """The first step after the stage."""
        return self.first_step + self.config.training.steps

    @property
    def last_step(self) -> int:
        """The last step, counted from 1, that is trained with this config."""
        return self.end_step if self.until is None else min(self.until, self.end_step)

    def is_logged(self, step: int) -> bool:
        """Return whether the metrics of the given step, counted from 1, are recorded."""
        # The first step has the loss of the initial parameters.
        return step == 1 or step % self.config.logging.log_every == 0 or step == self.end_step


class EarlierConfig(NamedTuple):
    """A config that a run used up to a given step, before it was changed."""

    until: int
    config: Config


def stages(config: Config, earlier: Sequence[EarlierConfig] = ()) -> tuple[Stage, ...]:
    """Return the stages of a run in order. A config that lists none has one stage called 'train'.

    A stage in which the config of the run changed has one entry per config.
    """
    result: list[Stage] = []
    begin = 0
    for until, each in (*earlier, (None, config)):
        first_step = 0
        for listed in each.stages or (StageConfig("train", ()),):
            own = dict(listed.overrides)
            if STEPS in own:
                # They take precedence over the epochs of the whole run.
                own.setdefault(EPOCHS, None)
            stage = Stage(listed.name, first_step, replace_paths(dataclasses.replace(each, stages=()), own), until)
            if stage.end_step > begin and (until is None or first_step < until > begin):
                result.append(stage)
            first_step = stage.end_step
        begin = max(begin, until or 0)
    # The run is complete; later config changes apply to no step.
    return tuple(result)


def uses_epochs(config: Config) -> bool:
    """Return whether the length of any stage is given in epochs; converting it to steps requires the data."""
    return any(stage.config.training.epochs is not None for stage in stages(config))


def with_steps(config: Config, steps: Mapping[str, int]) -> Config:
    """Return a config with the given number of steps, instead of epochs, for some stages by name."""
    if not config.stages:
        return replace_paths(config, {STEPS: steps["train"], EPOCHS: None})
    parts = []
    for stage in config.stages:
        own = {path: value for path, value in stage.overrides if path != EPOCHS}
        own |= {STEPS: steps[stage.name]} if stage.name in steps else {}
        parts.append(StageConfig(stage.name, tuple(sorted(own.items()))))
    return replace_paths(config, {"stages": tuple(parts), EPOCHS: None})


def replace_paths(config: ConfigT, values: Mapping[str, Any]) -> ConfigT:
    """Return a copy of a config (or group) with the values at the given dotted paths replaced, without checks."""
    for path, value in values.items():
        name, _, rest = path.partition(".")
        value = replace_paths(getattr(config, name), {rest: value}) if rest else value
        node: Any = config
        config = dataclasses.replace(node, **{name: value})
    return config


def may_differ_by_stage(path: str) -> bool:
    """Return whether a stage may override a knob.

    Data, step counts and traced knobs except the seed may be overridden; knobs that determine the shape of the state
    may not.
    """
    return path.startswith("data.") or path in ("schedule.name", EPOCHS) or (is_traced(path) and path != "seed")


# Written form.


def find_auto_values(values: Mapping[str, Any]) -> list[str]:
    """Return the paths whose value is 'auto', a choice that depends on the device."""
    return [path for path in ("model.dtype", "model.remat") if values.get(path) == "auto"]


def to_dict(config: Config) -> dict[str, Any]:
    """Return a config as JSON-compatible dicts, lists and scalars. `resolve` reads it back."""
    plain = dataclasses.asdict(config)
    plain["stages"] = [{"name": stage.name, **unflatten(dict(stage.overrides))} for stage in config.stages]
    return json.loads(json.dumps(plain))


def build(cls: type[ConfigT], values: Mapping[str, Any], prefix: str = "") -> ConfigT:
    """Return a config, or one of its groups, with the values of all its knobs by dotted path; they are not checked."""
    hints = typing.get_type_hints(cls)
    fields = {name: (prefix + name, hint) for name, hint in hints.items()}
    return cls(
        **{
            name: values[path] if path in values else build(hint, values, path + ".")
            for name, (path, hint) in fields.items()
        }
    )


def unflatten(values: Mapping[str, Any], separator: str = ".") -> dict[str, Any]:
    """Return nested dicts for values by path; with the separator "/", the inverse of `pytrees.flatten_paths`."""
    tree: dict[str, Any] = {}
    for path, value in values.items():
        *groups, name = path.split(separator)
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = value
    return tree


def can_change_on_resume(path: str) -> bool:
    """Return whether a knob may change when a run is resumed.

    Knobs of logging, sampling, the mesh, and the number of steps may.
    """
    knob = path.split(".", 2)[-1] if path.startswith("stages.") else path
    return knob.startswith(("logging.", "sampling.", "mesh.")) or knob in (
        "training.steps",
        "training.steps_per_jit_call",
    )


# Knobs that say where metrics are shown.
TRACKER_KNOBS = ("logging.trackers", "logging.project", "logging.tags")


def affects_result(path: str) -> bool:
    """Return whether a knob changes what a run computes or records, rather than where it runs or is shown."""
    return not path.startswith("mesh.") and path not in TRACKER_KNOBS


def config_hash(config: Config) -> str:
    """Hash a config: the first 16 hex digits of the SHA-256 of the canonical JSON of the knobs that affect results."""
    plain = to_dict(config)
    del plain["mesh"]
    for path in TRACKER_KNOBS:
        del plain["logging"][path.removeprefix("logging.")]
    canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def diff(first: Config, second: Config) -> dict[str, tuple[Any, Any]]:
    """Return a dict from the dotted path of each knob that differs between two configs to its two values."""
    left, right = flatten(first), flatten(second)
    changed = {path: (left[path], right[path]) for path in FIELDS if left[path] != right[path]}
    if first.stages != second.stages:
        changed["stages"] = (first.stages, second.stages)
    return changed
