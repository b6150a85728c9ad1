"""The whole model as pure functions: `init`, `apply`, `init_cache`. Training and decoding share one forward pass.

The scopes (`jax.named_scope`) outside of Flax modules have the names of the parameters that they use. Profiles and
`explain --program` show them.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from rustgpt_jax.config.schema import ModelConfig, is_enabled
from rustgpt_jax.errors import UserError
from rustgpt_jax.model import intermediates
from rustgpt_jax.model.activation_sharding import shard_activations
from rustgpt_jax.model.block import Block, LayerGroup, layer_groups
from rustgpt_jax.model.interfaces import AUX_LOSS, BlockInputs, LayerMetrics
from rustgpt_jax.model.layers import NORMS, dropout, normal_init
from rustgpt_jax.model.matmul import softcap, unembed
from rustgpt_jax.model.mixers import init_mixer_cache
from rustgpt_jax.model.moe import EXPERT_PRODUCTS
from rustgpt_jax.model.positions import POSITIONS
from rustgpt_jax.registry import lookup

Params = dict[str, Any]
Cache = dict[str, Any]

# Memory kind to which the policy `offload` saves arrays.
HOST_MEMORY = "pinned_host"


def _save_products(products: Callable[..., Any]) -> Callable[..., Any]:
    """Return a policy that saves products of experts, too, which JAX does not recognize as matrix products."""
    names = jax.checkpoint_policies.save_only_these_names(EXPERT_PRODUCTS)
    return jax.checkpoint_policies.save_from_both_policies(products, names)


REMAT_POLICIES = {
    "dots": _save_products(jax.checkpoint_policies.dots_saveable),
    "dots_no_batch": _save_products(jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", HOST_MEMORY),
}


def init(key: jax.Array, model: ModelConfig) -> Params:
    """Return initial float32 parameters; parameters of blocks are stacked over N, the layers of a group."""
    # Parameters do not depend on save_residuals, and resolving it would initialize the device.
    model = dataclasses.replace(model, save_residuals=False)
    inputs = BlockInputs(jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), jnp.int32))
    x_BTD = jnp.zeros((1, 1, model.d_model), model.dtype)
    n_tokens = vocab_size(model)
    keys = dict(zip(("embedding", "positions", "norm", "head", "blocks"), jax.random.split(key, 5), strict=True))

    def init_group(index: int, group: LayerGroup) -> Params:
        block_keys_N = jax.random.split(jax.random.fold_in(keys["blocks"], index), len(group.layers))
        return jax.vmap(lambda block_key: Block(group.block).init(block_key, x_BTD, inputs, None)["params"])(
            block_keys_N
        )

    params: Params = {
        "embedding": {"table": normal_init(model.init_std)(keys["embedding"], (n_tokens, model.d_model))},
        "blocks": {str(index): init_group(index, group) for index, group in enumerate(layer_groups(model))},
    }
    if (embed := _positions_embedding(model)) is not None:
        params["positions"] = embed.init(keys["positions"], inputs.positions_BT)["params"]
    if model.norm_placement != "post":
        params["norm"] = _norm(model).init(keys["norm"], x_BTD)["params"]
    if not model.tie_embeddings:
        params["head"] = {"kernel": normal_init(model.init_std)(keys["head"], (model.d_model, n_tokens))}
    return params


def is_unrolled(blocks: Params) -> bool:
    """Return whether the layers of a group are a list of trees instead of arrays stacked over N."""
    return any(isinstance(group, list) for group in blocks.values())


def init_cache(model: ModelConfig, batch: int, length: int, *, unstacked: bool = False) -> Cache:
    """Return an empty cache for `batch` rows of `length` tokens, stacked over N, or in lists if `unstacked`."""

    def init_group(group: LayerGroup) -> Any:
        cache = init_mixer_cache(group.block, batch, length)
        if unstacked:
            return [cache] * len(group.layers)
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (len(group.layers), *leaf.shape)), cache)

    return {str(index): init_group(group) for index, group in enumerate(layer_groups(model))}


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
    """Return float32 logits_BTV for the token after each token, and the cache with the new tokens in it.

    Args:
        params: From `init`, or from `to_decode_params`, where layers are in lists and weights are `PackedWeight`.
        tokens_BT: Token ids.
        model: Config of the model.
        cache: Cache of the tokens before `tokens_BT`; None for no cache.
        positions_BT: Position of each token in its document, by default 0, 1, 2, ...
        segments_BT: Document of each token in a packed row, from 1; 0 is padding. The tokens of a document must be
            adjacent. By default each row is one document.
        dropout_key: Key for dropout at rate `model.dropout`; None for no dropout.
    """
    hidden_BTD, cache, _ = hidden_states(
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
) -> tuple[jax.Array, Cache | None, LayerMetrics]:
    """Return hidden_BTD after the last norm, the cache, and the layer metrics.

    Layer metrics are averaged over layers, except AUX_LOSS, which is summed. The arguments are the same as for `apply`.
    """
    if positions_BT is None:
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
    if segments_BT is None:
        segments_BT = jnp.ones_like(tokens_BT)
    inputs = BlockInputs(positions_BT, segments_BT, dropout_key)
    hidden_BTD, cache, layer_metrics, _ = _hidden_states(params, tokens_BT, model, cache, inputs, None)
    return hidden_BTD, cache, layer_metrics


def apply_with_intermediates(
    params: Params, tokens_BT: jax.Array, model: ModelConfig, inputs: BlockInputs, slots: intermediates.GradSlots
) -> tuple[jax.Array, LayerMetrics, intermediates.Intermediates]:
    """Return logits_BTV, the layer metrics, and the statistics of the tensor at each hook point.

    `slots` are from `intermediates.grad_slots`; the gradient with respect to them is the statistics of the gradients.
    """
    hidden_BTD, _, layer_metrics, stats = _hidden_states(params, tokens_BT, model, None, inputs, slots)
    logits_BTV, stats["logits"] = intermediates.record_stats(logits(params, hidden_BTD, model), slots["logits"])
    return logits_BTV, layer_metrics, stats


def hook_points(model: ModelConfig, rows: int, length: int) -> tuple[intermediates.HookPointInfo, ...]:
    """Return the hook points of a model for `rows` sequences of `length` tokens, in the order of computation."""
    x_BTD: Any = jax.ShapeDtypeStruct((rows, length, model.d_model), jnp.dtype(model.dtype))
    tokens_BT: Any = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0)) if is_enabled(model.dropout) else None
    by_layer: dict[int, list[intermediates.HookPointInfo]] = {}
    for index, group in enumerate(layer_groups(model)):
        inputs = BlockInputs(tokens_BT, tokens_BT, key)
        tensors = intermediates.block_hook_points(Block(group.block), x_BTD, inputs, None)
        for row, layer in enumerate(group.layers):
            by_layer[layer] = [
                intermediates.HookPointInfo(path, x.shape, layer, str(index), row) for path, x in tensors.items()
            ]
    return (
        intermediates.HookPointInfo("embeddings", x_BTD.shape),
        *(point for layer in sorted(by_layer) for point in by_layer[layer]),
        intermediates.HookPointInfo("hidden", x_BTD.shape),
        intermediates.HookPointInfo("logits", (rows, length, vocab_size(model))),
    )


def _hidden_states(
    params: Params,
    tokens_BT: jax.Array,
    model: ModelConfig,
    cache: Cache | None,
    inputs: BlockInputs,
    slots: intermediates.GradSlots | None,
) -> tuple[jax.Array, Cache | None, LayerMetrics, intermediates.Intermediates]:
    stats: intermediates.Intermediates = {}
    if cache is None:
        inputs = inputs if model.mask_documents else inputs.as_one_document()
        inputs = inputs._replace(first_key_BT=inputs.first_keys())

    def record(x_BTD: jax.Array, name: str) -> jax.Array:
        if slots is not None:
            x_BTD, stats[name] = intermediates.record_stats(x_BTD, slots[name])
        return x_BTD

    x_BTD = record(_embed(params, tokens_BT, model, inputs), "embeddings")
    block_slots = None if slots is None else slots["blocks"]
    x_BTD, cache, layer_metrics, stats["blocks"] = _run_blocks(
        params["blocks"], x_BTD, model, inputs, cache, block_slots
    )
    if model.norm_placement != "post":
        with jax.named_scope("norm"):
            x_BTD = _norm(model).apply({"params": params["norm"]}, x_BTD)
    return record(x_BTD, "hidden"), cache, layer_metrics, stats


@jax.named_scope("embedding")
def _embed(params: Params, tokens_BT: jax.Array, model: ModelConfig, inputs: BlockInputs) -> jax.Array:
    # Each device looks up all tokens in its own shard of the channels, so the table is never gathered.
    x_BTD = shard_activations(shard_activations(params["embedding"]["table"], "VE")[tokens_BT], "BTE")
    if model.scale_embeddings:
        scale = model.d_model**0.5 if model.embedding_scale is None else model.embedding_scale
        x_BTD = x_BTD * jnp.asarray(scale, x_BTD.dtype)
    if (embed := _positions_embedding(model)) is not None:
        with jax.named_scope("positions"):
            x_BTD = x_BTD + embed.apply({"params": params["positions"]}, inputs.positions_BT)
    x_BTD = dropout(x_BTD.astype(model.dtype), model.dropout, inputs, site=model.n_layers)
    return shard_activations(x_BTD, "BTD")


@jax.named_scope("logits")
def logits(params: Params, hidden_BTD: jax.Array, model: ModelConfig) -> jax.Array:
    """Return float32 logits_BTV, computed with the output layer or else the embedding table."""
    logits_BTV = unembed(hidden_BTD, *output_matrix(params), model)
    return softcap(logits_BTV, model.final_logit_softcap) if is_enabled(model.final_logit_softcap) else logits_BTV


def output_matrix(params: Params) -> tuple[Any, str]:
    """Return the matrix that maps hidden states to logits, and its axes.

    It is that of the output layer, or the embedding table if they are tied.
    """
    return (params["head"]["kernel"], "DV") if "head" in params else (params["embedding"]["table"], "VD")


def remat_policy(name: str) -> Callable[..., Any]:
    """Return the rematerialization policy named in the config.

    Raises:
        UserError: The policy offloads arrays, and the devices have no memory to offload them to.
    """
    if name != "offload":
        return REMAT_POLICIES[name]
    device = jax.local_devices()[0]
    if HOST_MEMORY not in {memory.kind for memory in device.addressable_memories()}:
        raise UserError(
            f"config.model.remat='offload' needs devices with {HOST_MEMORY} memory, and {device.platform} has none; "
            "'dots_no_batch' saves the same arrays on the device, and 'full' saves fewer."
        )
    return REMAT_POLICIES[name]


@jax.named_scope("blocks")
def _run_blocks(
    blocks: Params,
    x_BTD: jax.Array,
    model: ModelConfig,
    inputs: BlockInputs,
    cache: Cache | None,
    slots: intermediates.GradSlots | None,
) -> tuple[jax.Array, Cache | None, LayerMetrics, intermediates.Intermediates]:
    """Run all layers: a scan over the repeats of the block pattern, then the remaining layers as one repeat.

    Layers whose arrays are not stacked run in a Python loop instead of a scan.
    """
    keys = tuple(str(index) for index in range(len(layer_groups(model))))
    n_repeats = model.n_layers // model.period
    n_repeated = model.period if n_repeats else 0
    trees = [dict.fromkeys(keys) if tree is None else tree for tree in (blocks, cache, slots)]
    outputs: list[dict[str, Any]] = [{}, {}, {}]
    for pattern, repeats, is_scanned in (
        (keys[:n_repeated], n_repeats, not is_unrolled(blocks)),
        (keys[n_repeated:], 1, False),
    ):
        if pattern:
            run_pattern = partial(_run_pattern, keys=pattern, model=model, inputs=inputs)
            pattern_trees = [{key: tree[key] for key in pattern} for tree in trees]
            x_BTD, new = _repeat(run_pattern, x_BTD, pattern_trees, repeats, model, is_scanned)
            outputs = [{**done, **more} for done, more in zip(outputs, new, strict=True)]
    new_cache, metrics, stats = outputs
    return x_BTD, None if cache is None else new_cache, _reduce_metrics(metrics), stats


def _run_pattern(
    x_BTD: jax.Array,
    xs: tuple[list[dict[str, Any]], jax.Array | int],
    *,
    keys: tuple[str, ...],
    model: ModelConfig,
    inputs: BlockInputs,
) -> tuple[jax.Array, list[dict[str, Any]]]:
    """Run one layer of each group in `keys`, the body of the scan.

    Args:
        x_BTD: Residual stream.
        xs: The layers' parameters, caches and gradient slots, each a dict by group, and the index of the repeat.
        keys: Groups in the order of their layers.
        model: Config of the whole model.
        inputs: Inputs of all blocks.

    Returns:
        The residual stream, and the layers' caches, metrics and intermediates, each a dict by group.
    """
    (params, cache, slots), repeat = xs
    groups = layer_groups(model)
    outputs: list[dict[str, Any]] = [{}, {}, {}]
    for key in keys:
        group = groups[int(key)]
        layer = repeat * model.period + group.layers.start
        layer_inputs = inputs.fold_in(layer)
        if model.attention.scale_by_layer:
            layer_inputs = layer_inputs._replace(layer=layer)
        with jax.named_scope(key):
            (x_BTD, *output), stats = intermediates.apply_block(
                Block(group.block), params[key], slots[key], x_BTD, layer_inputs, cache[key]
            )
        x_BTD = shard_activations(x_BTD, "BTD")
        for by_group, value in zip(outputs, (*output, stats), strict=True):
            by_group[key] = value
    return x_BTD, outputs


def _repeat(
    run_pattern: Callable[..., Any],
    x_BTD: jax.Array,
    trees: list[dict[str, Any]],
    repeats: int,
    model: ModelConfig,
    is_scanned: bool,
) -> tuple[jax.Array, list[dict[str, Any]]]:
    """Call `run_pattern` for each repeat, in a scan over the first axis of `trees` or in a Python loop."""
    if model.remat != "none":
        prevent_cse = not (is_scanned and model.scan_layers)
        run_pattern = jax.checkpoint(run_pattern, policy=remat_policy(model.remat), prevent_cse=prevent_cse)
    if is_scanned:
        unroll = 1 if model.scan_layers else repeats
        return jax.lax.scan(run_pattern, x_BTD, (trees, jnp.arange(repeats)), unroll=unroll)
    results = []
    for repeat in range(repeats):
        layers = [{key: _layer(tree[key], repeat) for key in tree} for tree in trees]
        x_BTD, outputs = run_pattern(x_BTD, (layers, repeat))
        results.append(outputs)
    caches, *others = zip(*results, strict=True)
    has_lists = is_unrolled(trees[0])
    cache = {key: [cache[key] for cache in caches] for key in trees[0]} if has_lists else _stack(*caches)
    return x_BTD, [cache, *(_stack(*values) for values in others)]


def _layer(group: Any, index: int) -> Any:
    """Return one layer of a group, which is a list of layers or a tree of arrays whose first axis is the layers."""
    return group[index] if isinstance(group, list) else jax.tree.map(lambda leaf: leaf[index], group)


def _stack(*trees: Any) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _reduce_metrics(metrics: dict[str, LayerMetrics]) -> LayerMetrics:
    """Return the mean of each metric over the layers that have it, and the sum of AUX_LOSS."""
    values: dict[str, list[jax.Array]] = {}
    for group in metrics.values():
        for name, value in group.items():
            values.setdefault(name, []).append(jnp.ravel(value))
    joined = {name: jnp.concatenate(arrays) for name, arrays in values.items()}
    return {name: jnp.sum(array) if name == AUX_LOSS else jnp.mean(array) for name, array in joined.items()}


def vocab_size(model: ModelConfig) -> int:
    """Return the number of rows of the embedding table."""
    assert model.vocab_size is not None, "config.model.vocab_size must be set from the tokenizer first"
    return model.vocab_size


def _positions_embedding(model: ModelConfig) -> Any:
    """Return the module that adds positions to the embeddings, or None."""
    schemes = (lookup(POSITIONS, name, "config.model.positions") for name in model.positions)
    embed = next((scheme.embed for scheme in schemes if scheme.embed is not None), None)
    return None if embed is None else embed(model)


def _norm(model: ModelConfig) -> Any:
    return lookup(NORMS, model.norm, "config.model.norm")(model)
