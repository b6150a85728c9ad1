"""Softmax attention: the portable kernels, the table of all kernels, and the choice between them.

All kernels compute the same as `reference_attention`, up to rounding. Only the reference supports every spec, reads
caches, and has all scores in memory at once, so that they can be a hook point.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rustgpt_jax.config.schema import ModelConfig, is_enabled
from rustgpt_jax.errors import UserError
from rustgpt_jax.model.interfaces import BlockInputs, PositionEncoding
from rustgpt_jax.model.intermediates import HookPoint
from rustgpt_jax.model.kernels import (
    ANY_DEVICE,
    AttentionInputs,
    AttentionSpec,
    Bias,
    Device,
    Kernel,
    current_device,
)
from rustgpt_jax.model.kernels.flash_attention import (
    cudnn,
    cudnn_unsupported_reason,
    takes_first_keys,
    tokamax,
    tokamax_unsupported_reason,
)
from rustgpt_jax.model.kv_cache import AttentionContext, KVCache, attention_mask, update_kv_cache
from rustgpt_jax.model.layers import dropout
from rustgpt_jax.model.matmul import accum_dtype, softcap
from rustgpt_jax.model.positions import POSITIONS
from rustgpt_jax.registry import lookup


def dot_product_attention(
    q_BTHC: jax.Array,
    k_BKSC: jax.Array,
    v_BKSC: jax.Array,
    scale: float,
    weights: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Return mixed_BTKGC, the means of the values weighted by att_BHTS = weights(scores_BHTS)."""
    batch, length, n_heads, channels = q_BTHC.shape
    n_kv_heads = k_BKSC.shape[1]
    q_BTKGC = q_BTHC.reshape(batch, length, n_kv_heads, n_heads // n_kv_heads, channels)
    scores_BKGTS = jnp.einsum("BTKGC,BKSC->BKGTS", q_BTKGC, k_BKSC, preferred_element_type=accum_dtype(q_BTKGC, k_BKSC))
    scores_BHTS = scale * scores_BKGTS.reshape(batch, n_heads, *scores_BKGTS.shape[3:])
    att_BHTS = weights(scores_BHTS).astype(v_BKSC.dtype)
    # The output has the axis order of its factors; for any other, XLA on CPUs would transpose the values.
    mixed_BKGTC = jax.lax.dot_general(att_BHTS.reshape(scores_BKGTS.shape), v_BKSC, (((4,), (2,)), ((0, 1), (0, 1))))
    return jnp.moveaxis(mixed_BKGTC, 3, 1)


def softmax_weights(
    scores_BHTS: jax.Array,
    mask_BTS: jax.Array,
    positions: tuple[jax.Array, jax.Array],
    cap: Any,
    bias: Bias | None,
    sinks_H: jax.Array | None,
) -> jax.Array:
    """Apply soft-cap, positional bias, mask and softmax (with attention sinks) to scaled scores."""
    if is_enabled(cap):
        scores_BHTS = softcap(scores_BHTS, cap)
    if bias:
        # A bias need not be defined for keys that are not visible.
        scores_BHTS = scores_BHTS + jnp.where(mask_BTS[:, None], bias(*positions), 0)
    # Adding -inf, unlike `jnp.where`, does not save the mask for the backward pass.
    scores_BHTS = scores_BHTS + jnp.where(mask_BTS[:, None], 0, -jnp.inf).astype(scores_BHTS.dtype)
    if sinks_H is not None:
        sinks_BHT1 = jnp.broadcast_to(sinks_H[None, :, None, None], (*scores_BHTS.shape[:3], 1))
        scores_BHTS = jnp.concatenate([scores_BHTS, sinks_BHT1.astype(scores_BHTS.dtype)], axis=-1)
    return jax.nn.softmax(scores_BHTS, axis=-1)[..., : mask_BTS.shape[-1]]


def reference_attention(inputs: AttentionInputs) -> jax.Array:
    """Compute attention with all scores in memory: the reference for other kernels."""
    order_T, positions_BT = jnp.arange(inputs.q_BTHC.shape[1]), inputs.block_inputs.positions_BT
    k_BKSC, v_BKSC = jnp.swapaxes(inputs.k_BSKC, 1, 2), jnp.swapaxes(inputs.v_BSKC, 1, 2)
    mask_BTS = attention_mask(order_T, order_T, inputs.first_keys_if_packed(), inputs.window)
    return _attend(inputs, inputs.q_BTHC, k_BKSC, v_BKSC, (positions_BT, positions_BT), mask_BTS)


def _attend(
    inputs: AttentionInputs,
    q_BTHC: jax.Array,
    k_BKSC: jax.Array,
    v_BKSC: jax.Array,
    positions: tuple[jax.Array, jax.Array],
    mask_BTS: jax.Array,
) -> jax.Array:
    """Compute attention of some of the queries to some of the keys, given their positions and mask."""
    weights = partial(
        softmax_weights,
        mask_BTS=mask_BTS,
        positions=positions,
        cap=inputs.softcap,
        bias=inputs.bias,
        sinks_H=inputs.sinks_H,
    )
    return dot_product_attention(q_BTHC, k_BKSC, v_BKSC, inputs.scale, weights)


# Blockwise attention: one block of queries after another, in plain XLA, on every device.

# Queries in a block: enough to keep matrix units busy.
BLOCK = 512


def blockwise(inputs: AttentionInputs, block: int = BLOCK) -> jax.Array:
    """Compute attention for one block of queries at a time; the backward pass recomputes the scores.

    Memory holds the scores of one block: B x H x block x S numbers, where S is the row, or block + window. With
    config.model.remat=dots, which saves all matrix products, it holds those of all blocks.
    """
    batch, length = inputs.q_BTHC.shape[:2]
    n_blocks = -(-length // block)
    block = -(-length // n_blocks)
    n_keys = length if inputs.window is None else min(length, block + inputs.window - 1)

    def split(x_BT: jax.Array) -> jax.Array:
        """Split x along T into blocks, as the first axis; the last block is padded with copies of the last token."""
        padded = jnp.pad(x_BT, [(0, 0), (0, n_blocks * block - length), *[(0, 0)] * (x_BT.ndim - 2)], mode="edge")
        return jnp.moveaxis(padded.reshape(batch, n_blocks, block, *x_BT.shape[2:]), 1, 0)

    @jax.checkpoint
    def attend_block(
        index: jax.Array, q_BTHC: jax.Array, positions_BT: jax.Array, first_key_BT: jax.Array | None
    ) -> jax.Array:
        order_T = jnp.minimum(index * block + jnp.arange(block), length - 1)
        first = jnp.clip((index + 1) * block - n_keys, 0, length - n_keys)

        def visible(x_BS: jax.Array) -> jax.Array:
            return x_BS if n_keys == length else jax.lax.dynamic_slice_in_dim(x_BS, first, n_keys, axis=1)

        positions = (positions_BT, visible(inputs.block_inputs.positions_BT))
        order_S = jnp.arange(length) if n_keys == length else first + jnp.arange(n_keys)
        k_BKSC, v_BKSC = jnp.swapaxes(visible(inputs.k_BSKC), 1, 2), jnp.swapaxes(visible(inputs.v_BSKC), 1, 2)
        mask_BTS = attention_mask(order_T, order_S, first_key_BT, inputs.window)
        return _attend(inputs, q_BTHC, k_BKSC, v_BKSC, positions, mask_BTS)

    queries = (inputs.q_BTHC, inputs.block_inputs.positions_BT, inputs.first_keys_if_packed())
    mixed = jax.lax.map(lambda xs: attend_block(*xs), (jnp.arange(n_blocks), *jax.tree.map(split, queries)))
    return jnp.moveaxis(mixed, 0, 1).reshape(batch, n_blocks * block, *mixed.shape[3:])[:, :length]


# Triangular attention: a few blocks of queries, each with only the keys that it can attend to, which saves about half
# of the products. The blocks are unrolled and the backward pass recomputes nothing: the fastest form on CPUs.

# With more blocks, more keys are skipped, but products are smaller.
N_BLOCKS = 4


def triangular(inputs: AttentionInputs, n_blocks: int = N_BLOCKS) -> jax.Array:
    """Compute attention for a few blocks of queries, each with only the keys that it can attend to."""
    length = inputs.q_BTHC.shape[1]
    k_BKSC, v_BKSC = jnp.swapaxes(inputs.k_BSKC, 1, 2), jnp.swapaxes(inputs.v_BSKC, 1, 2)
    order_T, positions_BT = jnp.arange(length), inputs.block_inputs.positions_BT
    first_key_BT = inputs.first_keys_if_packed()

    def attend_block(start: int, stop: int) -> jax.Array:
        first = 0 if inputs.window is None else max(0, start + 1 - inputs.window)
        queries, keys = slice(start, stop), slice(first, stop)
        first_BT = None if first_key_BT is None else first_key_BT[:, queries]
        return _attend(
            inputs,
            inputs.q_BTHC[:, queries],
            k_BKSC[:, :, keys],
            v_BKSC[:, :, keys],
            (positions_BT[:, queries], positions_BT[:, keys]),
            attention_mask(order_T[queries], order_T[keys], first_BT, inputs.window),
        )

    block = -(-length // n_blocks)
    starts = range(0, length, block)
    return jnp.concatenate([attend_block(start, min(start + block, length)) for start in starts], axis=1)


def portable_unsupported_reason(spec: AttentionSpec) -> str | None:
    """Return why blockwise and triangular attention do not support a spec; None if they do."""
    if spec.cached:
        return "it does not read a cache"
    return "it does not support dropout of attention weights" if spec.dropout else None


KERNELS: dict[str, Kernel] = {
    "reference": Kernel(reference_attention, lambda spec: None),
    "triangular": Kernel(triangular, portable_unsupported_reason),
    "blockwise": Kernel(blockwise, portable_unsupported_reason),
    "cudnn": Kernel(cudnn, cudnn_unsupported_reason),
    "tokamax": Kernel(tokamax, tokamax_unsupported_reason),
}
# From this length on, the scores of one head of one row take 16 MiB in float32 and dominate memory traffic.
LONG = 2048
# Below this length, a CPU computes all scores as fast as only the unmasked ones.
SHORT = 128
# The kernel that auto tries first, by platform, and the row lengths for which it does.
FASTEST = {
    "cpu": ("triangular", range(SHORT, LONG)),
    "gpu": ("cudnn", range(sys.maxsize)),
    "tpu": ("tokamax", range(sys.maxsize)),
}
# Values of config.model.attention.kernel for which the choice does not depend on the device.
DEVICE_INDEPENDENT = ("reference", "portable", "triangular", "blockwise")


class KernelChoice(NamedTuple):
    """A kernel by its name in KERNELS, and the reason for the choice, as a clause that follows 'because'."""

    kernel: str
    reason: str


def select_kernel(name: str, spec: AttentionSpec) -> KernelChoice:
    """Return the kernel for a spec.

    Args:
        name: config.model.attention.kernel. `auto` is the platform's fastest kernel if it supports the spec; otherwise,
            like `portable`, blockwise for long rows and reference for others. Cached keys are always read by reference.
        spec: Properties of the attention.

    Raises:
        UserError: The config names a kernel that does not support the spec.
    """
    if spec.cached:
        return KernelChoice("reference", "tokens are cached")
    if name not in ("auto", "portable"):
        if (reason := KERNELS[name].unsupported_reason(spec)) is not None:
            raise UserError(
                f"config.model.attention.kernel={name!r} cannot be used here: {reason}. auto chooses one that can."
            )
        return KernelChoice(name, "the config names it")
    reasons = []
    fastest, lengths = FASTEST.get(spec.device.platform or "", ("", range(0)))
    if name == "auto" and spec.length in lengths:
        if takes_first_keys(spec) and tokamax_unsupported_reason(spec) is None:
            return KernelChoice("tokamax", "rows are packed, and cudnn would need a mask of all pairs of tokens")
        if (reason := KERNELS[fastest].unsupported_reason(spec)) is None:
            return KernelChoice(fastest, f"this is a {spec.device.platform}")
        reasons.append(f"{fastest} cannot be used: {reason}")
    if spec.length >= LONG:
        if (reason := portable_unsupported_reason(spec)) is None:
            return KernelChoice("blockwise", "; ".join([*reasons, f"rows have {LONG} tokens or more"]))
        reasons.append(f"blockwise cannot be used: {reason}")
    return KernelChoice("reference", "; ".join(reasons) or f"rows have fewer than {LONG} tokens")


def attention(
    q_BTHC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKC: jax.Array,
    spec: AttentionSpec,
    config: ModelConfig,
    inputs: BlockInputs,
    cache: KVCache | None = None,
    sinks_H: jax.Array | None = None,
) -> tuple[jax.Array, KVCache | None]:
    """Compute causal attention with the kernel that config.model.attention.kernel selects.

    Args:
        q_BTHC: Queries. Head h reads the keys and values of head h // (H / K).
        k_BTKC: Keys.
        v_BTKC: Values.
        spec: From `attention_spec`.
        config: Config of the block.
        inputs: Positions and documents of the tokens, and the dropout key.
        cache: Earlier keys and values; None in training.
        sinks_H: Logits of attention sinks.

    Returns:
        mixed_BTKGC, the weighted means of the values, and the cache with the new keys and values.
    """
    kernel = select_kernel(config.attention.kernel, spec).kernel
    if kernel != "reference":
        kernel_inputs = attention_inputs(config, (q_BTHC, k_BTKC, v_BTKC), inputs, spec.window, sinks_H)
        return KERNELS[kernel].attend(kernel_inputs), cache
    by_heads = (jnp.swapaxes(k_BTKC, 1, 2), jnp.swapaxes(v_BTKC, 1, 2))
    attended, cache = update_kv_cache(cache, by_heads, inputs, spec.window)
    weights = partial(attention_weights, attended=attended, sinks_H=sinks_H, inputs=inputs, config=config)
    scale = attention_scale(config, q_BTHC.shape[-1])
    k_BKSC, v_BKSC = attended.keys
    return dot_product_attention(q_BTHC, k_BKSC, v_BKSC, scale, weights), cache


def get_position_encoding(config: ModelConfig) -> PositionEncoding:
    """Return the position encoding of a block."""
    (name,) = config.positions
    return lookup(POSITIONS, name, "config.model.positions")


def attention_weights(
    scores_BHTS: jax.Array,
    attended: AttentionContext,
    sinks_H: jax.Array | None,
    inputs: BlockInputs,
    config: ModelConfig,
) -> jax.Array:
    """Turn scaled scores into attention weights with dropout; the scores are a hook point."""
    scores_BHTS = HookPoint(name="scores")(scores_BHTS)
    positions = (inputs.positions_BT, attended.positions_BS)
    att_BHTS = softmax_weights(
        scores_BHTS, attended.mask_BTS, positions, config.attention.logit_softcap, positional_bias(config), sinks_H
    )
    return dropout(att_BHTS, config.dropout, inputs, site=0)


def positional_bias(config: ModelConfig) -> Bias | None:
    """Return the positional bias of a block's attention scores, or None."""
    bias = get_position_encoding(config).bias
    return (lambda queries_BT, keys_BS: bias(queries_BT, keys_BS, config)) if bias else None


def attention_scale(config: ModelConfig, channels: int) -> float:
    """Return the factor of attention scores for queries and keys with this number of channels."""
    return channels**-0.5 if config.attention.scale is None else config.attention.scale


def attention_spec(
    config: ModelConfig,
    *,
    n_kv_heads: int,
    key_width: int,
    window: int | None,
    length: int,
    is_cached: bool,
    has_dropout: bool,
    device: Device | None = None,
) -> AttentionSpec:
    """Return the spec of a block's attention.

    Args:
        config: Config of the block.
        n_kv_heads: Number of key/value heads.
        key_width: Channels of queries and keys.
        window: Number of tokens that a token attends to, itself included; None for all.
        length: Tokens in a row.
        is_cached: Whether keys come from a cache. Initialization counts as cached, because it needs no fast kernel.
        has_dropout: Whether attention weights are dropped.
        device: The device that runs the program; None for the default device.
    """
    if device is None:
        # The default device is only initialized if the choice of the kernel depends on it.
        is_independent = is_cached or config.attention.kernel in DEVICE_INDEPENDENT
        device = ANY_DEVICE if is_independent else current_device()
    return AttentionSpec(
        device=device,
        dtype=config.dtype,
        length=length,
        n_heads=config.attention.n_heads,
        n_kv_heads=n_kv_heads,
        head_width=key_width,
        value_width=config.head_width,
        softcap=is_enabled(config.attention.logit_softcap),
        bias=get_position_encoding(config).bias is not None,
        sinks=config.attention.sinks,
        dropout=has_dropout,
        cached=is_cached,
        window=window,
        packed=config.mask_documents,
    )


def attention_inputs(
    config: ModelConfig,
    arrays: tuple[jax.Array, ...],
    inputs: BlockInputs,
    window: int | None,
    sinks_H: jax.Array | None,
) -> AttentionInputs:
    """Return a kernel's inputs for a block, from arrays q_BTHC, k_BSKC and v_BSKC."""
    q_BTHC, k_BSKC, v_BSKC = arrays
    scale = attention_scale(config, q_BTHC.shape[-1])
    cap, bias = config.attention.logit_softcap, positional_bias(config)
    return AttentionInputs(
        q_BTHC, k_BSKC, v_BSKC, inputs, window, scale, cap, bias, sinks_H, packed=config.mask_documents
    )
