"""The whole model as pure functions: `init`, `apply`, `init_cache`. One forward serves training and decoding."""

from typing import Any

import jax
import jax.numpy as jnp

from rustgpt_jax.config import ModelConfig
from rustgpt_jax.errors import choose
from rustgpt_jax.model.block import Block
from rustgpt_jax.model.context import Context, dropout
from rustgpt_jax.model.linear import scaled_normal
from rustgpt_jax.model.mixers import MIXERS
from rustgpt_jax.model.norms import NORMS
from rustgpt_jax.model.positions import POSITIONS

Params = dict[str, Any]
Cache = dict[str, Any]

REMAT_POLICIES = {"dots": jax.checkpoint_policies.dots_saveable, "full": jax.checkpoint_policies.nothing_saveable}


def init(key: jax.Array, model: ModelConfig) -> Params:
    """Initial float32 parameters. Those of the blocks are stacked: their first axis is N, repeats of the pattern."""
    context = Context(jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), jnp.int32))
    x_BTD = jnp.zeros((1, 1, model.d_model), model.dtype)
    vocab_size = vocabulary(model)
    keys = dict(zip(("embedding", "positions", "norm", "head", "blocks"), jax.random.split(key, 5), strict=True))
    repeats = model.n_layers // len(model.mixers)

    def init_blocks(index: int, mixer: str) -> Params:
        block_keys_N = jax.random.split(jax.random.fold_in(keys["blocks"], index), repeats)
        return jax.vmap(lambda block_key: Block(model, mixer).init(block_key, x_BTD, context, None)["params"])(
            block_keys_N
        )

    params: Params = {
        "embedding": {"table": scaled_normal(model.init_std)(keys["embedding"], (vocab_size, model.d_model))},
        "blocks": {str(index): init_blocks(index, mixer) for index, mixer in enumerate(model.mixers)},
    }
    if (embed := _positions(model).embed) is not None:
        params["positions"] = embed(model).init(keys["positions"], context.positions_BT)["params"]
    if model.norm_placement == "pre":
        params["norm"] = _norm(model).init(keys["norm"], x_BTD)["params"]
    if not model.tie_embeddings:
        params["head"] = {"kernel": scaled_normal(model.init_std)(keys["head"], (model.d_model, vocab_size))}
    return params


def init_cache(model: ModelConfig, batch: int, length: int) -> Cache:
    """An empty cache for `batch` rows of at most `length` tokens, stacked over N like the parameters."""
    repeats = model.n_layers // len(model.mixers)

    def stacked(mixer: str) -> Any:
        one = choose(MIXERS, mixer, "config.model.mixers").init_cache(model, batch, length)
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (repeats, *leaf.shape)), one)

    return {str(index): stacked(mixer) for index, mixer in enumerate(model.mixers)}


def apply(
    params: Params,
    tokens_BT: jax.Array,
    model: ModelConfig,
    cache: Cache | None = None,
    *,
    positions_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, Cache | None]:
    """logits_BTV (float32) for the token after each token, and the cache with the new tokens in it.

    Args:
        params: from `init`.
        tokens_BT: token ids.
        model: what `params` were made from.
        cache: None to see `tokens_BT` alone; else they follow the cached tokens and are written at their positions.
        positions_BT: places in the document; by default 0, 1, 2, ...
        segments_BT: documents packed in a row, from 1; 0 is padding; by default each row is one document.
        dropout_key: drops activations at rate `model.dropout`; None for none.
    """
    hidden_BTD, cache = hidden_states(
        params,
        tokens_BT,
        model,
        cache,
        positions_BT=positions_BT,
        segments_BT=segments_BT,
        dropout_key=dropout_key,
    )
    return logits(params, hidden_BTD, model), cache


def hidden_states(
    params: Params,
    tokens_BT: jax.Array,
    model: ModelConfig,
    cache: Cache | None = None,
    *,
    positions_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, Cache | None]:
    """The residual stream (B, T, D) after the last norm, and the cache. Arguments as those of `apply`."""
    if positions_BT is None:
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
    if segments_BT is None:
        segments_BT = jnp.ones_like(tokens_BT)
    context = Context(positions_BT, segments_BT, dropout_key)

    x_BTD = params["embedding"]["table"][tokens_BT]
    if (embed := _positions(model).embed) is not None:
        x_BTD = x_BTD + embed(model).apply({"params": params["positions"]}, positions_BT)
    x_BTD = dropout(x_BTD.astype(model.dtype), model.dropout, context, site=model.n_layers)
    x_BTD, cache = _run_blocks(params["blocks"], x_BTD, model, context, cache)
    if model.norm_placement == "pre":
        x_BTD = _norm(model).apply({"params": params["norm"]}, x_BTD)
    return x_BTD, cache


def logits(params: Params, hidden_BTD: jax.Array, model: ModelConfig) -> jax.Array:
    """logits_BTV in float32, from the embedding table or from an output layer of their own."""
    if model.tie_embeddings:
        table_VD = params["embedding"]["table"].astype(model.dtype)
        return jnp.einsum("BTD,VD->BTV", hidden_BTD, table_VD, preferred_element_type=jnp.float32)
    kernel_DV = params["head"]["kernel"].astype(model.dtype)
    return jnp.einsum("BTD,DV->BTV", hidden_BTD, kernel_DV, preferred_element_type=jnp.float32)


def _run_blocks(
    blocks: Params, x_BTD: jax.Array, model: ModelConfig, context: Context, cache: Cache | None
) -> tuple[jax.Array, Cache | None]:
    """One scan over N repeats of the pattern. With no cache, None rides along as an empty tree."""

    def pattern(x_BTD: jax.Array, slices: tuple[Params, Cache | None, jax.Array]) -> tuple[jax.Array, Cache | None]:
        params, cache, repeat = slices
        written: Cache = {}
        for index, mixer in enumerate(model.mixers):
            layer = context.fold_in(repeat * len(model.mixers) + index)
            kept = None if cache is None else cache[str(index)]
            x_BTD, written[str(index)] = Block(model, mixer).apply({"params": params[str(index)]}, x_BTD, layer, kept)
        return x_BTD, None if cache is None else written

    if model.remat != "none":
        pattern = jax.checkpoint(pattern, policy=REMAT_POLICIES[model.remat], prevent_cse=model.layers == "unrolled")
    repeats = model.n_layers // len(model.mixers)
    return jax.lax.scan(
        pattern, x_BTD, (blocks, cache, jnp.arange(repeats)), unroll=repeats if model.layers == "unrolled" else 1
    )


def vocabulary(model: ModelConfig) -> int:
    """Rows of the embedding table. A model is complete only once its tokenizer is known."""
    assert model.vocab_size is not None, "config.model.vocab_size is set from the tokenizer before a model is made"
    return model.vocab_size


def _positions(model: ModelConfig) -> Any:
    return choose(POSITIONS, model.position, "config.model.position")


def _norm(model: ModelConfig) -> Any:
    return choose(NORMS, model.norm, "config.model.norm")(model)
