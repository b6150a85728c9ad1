"""The loss, which is the mean next-token cross-entropy over weighted tokens, and evaluation on held-out text."""

import math
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rustgpt_jax.config.schema import ModelConfig, for_inference, is_enabled
from rustgpt_jax.data.pipeline import Batch
from rustgpt_jax.model import transformer
from rustgpt_jax.model.activation_sharding import shard_activations, token_shards
from rustgpt_jax.model.interfaces import AUX_LOSS, LayerMetrics
from rustgpt_jax.model.matmul import softcap, unembed
from rustgpt_jax.model.transformer import Params

# Default bytes of the logits of a chunk on a device. Smaller chunks would be limited by memory bandwidth, since each
# chunk reads the output matrix and updates its gradient.
LOGITS_BYTES = 2**29


class LossSums(NamedTuple):
    """Weighted sums over tokens, in nats. Unlike means, sums can be added over microbatches and batches.

    Attributes:
        loss: Sum of the cross-entropy; no gradient flows through it.
        objective: Sum of the cross-entropy and the z-loss. Auxiliary losses are added later.
        weight: Sum of the weights, which is the number of tokens that count in the loss.
        layer_metrics: Metrics of the blocks, times `weight`.
    """

    loss: jax.Array
    objective: jax.Array
    weight: jax.Array
    layer_metrics: LayerMetrics


def chunk_size(loss_chunk_size: int | None, model: ModelConfig) -> int:
    """Return the number of tokens on each device whose logits are in memory at a time.

    It is `loss_chunk_size`, or by default the largest power of two whose logits take at most LOGITS_BYTES.
    """
    most = max(1, LOGITS_BYTES // (4 * transformer.vocab_size(model)))
    return loss_chunk_size or 2 ** (most.bit_length() - 1)


def loss_sums(
    params: transformer.Params,
    batch: Batch,
    model: ModelConfig,
    dropout_key: jax.Array | None = None,
    loss_chunk_size: int | None = None,
    z_loss: jax.Array | float = 0.0,
) -> LossSums:
    """Compute the loss sums of a batch.

    Args:
        params: The parameters.
        batch: The batch.
        model: The config of the model.
        dropout_key: The key for dropout, None for no dropout.
        loss_chunk_size: See `chunk_size`.
        z_loss: The coefficient of the squared log normalizer in the objective (arXiv 2204.02311).
    """
    hidden_BTD, _, layer_metrics = transformer.hidden_states(
        params,
        batch.tokens_BT,
        model,
        positions_BT=batch.positions_BT,
        segments_BT=batch.segments_BT,
        dropout_key=dropout_key,
    )
    chunk = chunk_size(loss_chunk_size, model)
    if batch.tokens_BT.size <= chunk * math.prod(token_shards(*batch.tokens_BT.shape)):
        return cross_entropy_sums(transformer.logits(params, hidden_BTD, model), batch, layer_metrics, z_loss)[0]
    matrix, axes = transformer.output_matrix(params)
    scan = partial(_scan_chunks, axes=axes, model=model, chunk=chunk)
    total_sums = jax.custom_vjp(lambda *inputs: scan(*inputs)[0])
    total_sums.defvjp(scan, _scale_gradients)
    # None is no input of the program, so a disabled term stays disabled.
    z_loss_or_none, cap = (value if is_enabled(value) else None for value in (z_loss, model.final_logit_softcap))
    sums = total_sums(matrix, hidden_BTD, batch, z_loss_or_none, cap)
    return sums._replace(layer_metrics={name: value * sums.weight for name, value in layer_metrics.items()})


@jax.named_scope("loss")
def _scan_chunks(
    matrix: jax.Array,
    hidden_BTD: jax.Array,
    batch: Batch,
    z_loss: Any,
    cap: Any,
    *,
    axes: str,
    model: ModelConfig,
    chunk: int,
) -> tuple[LossSums, tuple[jax.Array, jax.Array]]:
    """Compute the sums of a batch, and the gradient of the objective, with the logits of one chunk at a time.

    The loss and the gradient share one computation of a chunk's logits. Each of the R shards has a part of every chunk
    and adds to its own gradient of the output matrix, so that the matrix is gathered, and its gradient reduced, only
    once.

    Args:
        matrix: The output matrix.
        hidden_BTD: The output of the last norm.
        batch: The batch.
        z_loss: The coefficient of the z-loss; None if it is disabled.
        cap: The soft-cap of the logits; None if it is disabled.
        axes: See `unembed`.
        model: The config of the model.
        chunk: The number of tokens of a chunk on each device.

    Returns:
        The sums, and the gradients of the objective with respect to the matrix and the hidden states.
    """
    # Round the matrix where it is stored (E: the shards of its channels), then gather it, so that fewer bytes are sent.
    factor = shard_activations(matrix.astype(model.precision.logits_dtype or model.dtype), axes.replace("D", "E"))
    factor = shard_activations(factor, axes)

    def objective(logits_RCV: jax.Array, part: Batch) -> tuple[jax.Array, LossSums]:
        if cap is not None:
            logits_RCV = softcap(logits_RCV, cap)
        sums, _ = cross_entropy_sums(logits_RCV, part, {}, 0.0 if z_loss is None else z_loss)
        return sums.objective, sums

    @jax.named_scope("logits")
    def chunk_logits(hidden_RCD: jax.Array) -> jax.Array:
        return unembed(hidden_RCD, factor, axes, model)

    def add_chunk(totals: Any, inputs: tuple[jax.Array, Batch]) -> tuple[Any, jax.Array]:
        hidden_RCD, part = inputs
        logits_RCV, unembed_bwd = jax.vjp(chunk_logits, hidden_RCD)
        grad_RCV, sums = jax.grad(objective, has_aux=True)(logits_RCV, part)
        # Sum the outer products over tokens, with axes in the order of the matrix.
        by_axis = {"D": hidden_RCD.astype(factor.dtype), "V": grad_RCV.astype(factor.dtype)}
        left, right = (by_axis[axis] for axis in axes)
        with jax.named_scope("logits"), jax.named_scope("backward"):
            contracted_and_batch = (((1,), (1,)), ((0,), (0,)))
            grad_R = jax.lax.dot_general(left, right, contracted_and_batch, preferred_element_type=matrix.dtype)
        return jax.tree.map(jnp.add, totals, (sums, grad_R)), unembed_bwd(grad_RCV)[0]

    zero = jnp.zeros(())
    n_shards = math.prod(token_shards(*batch.tokens_BT.shape))
    zeros_R = shard_activations(jnp.zeros((n_shards, *matrix.shape), matrix.dtype), f"R{axes}")
    chunks = jax.tree.map(partial(_split_tokens, chunk=chunk), (hidden_BTD, batch))
    (sums, grad_R), grad_chunks = jax.lax.scan(add_chunk, (LossSums(zero, zero, zero, {}), zeros_R), chunks)
    return sums, (jnp.sum(grad_R, axis=0), _join_tokens(grad_chunks, hidden_BTD.shape))


def _scale_gradients(gradients: tuple[jax.Array, jax.Array], grad_sums: LossSums) -> tuple[Any, ...]:
    """Scale the gradients of the objective with respect to the matrix and the hidden states."""
    # In the dtype of the scale, at least float32: the reciprocal of a number of tokens is not exact in bfloat16.
    scale = grad_sums.objective
    return *((gradient * scale).astype(gradient.dtype) for gradient in gradients), None, None, None


def _split_tokens(x_BT: jax.Array, chunk: int) -> jax.Array:
    """Reshape (B, T, ...) to (chunks, R, tokens, ...), padded with zeros, which have no weight.

    Tokens stay on their device: each of the R shards of a batch has at most `chunk` tokens of each chunk. S counts the
    tokens of a shard, N the chunks, and C the tokens of a shard in a chunk.
    """
    rows, columns = token_shards(*x_BT.shape[:2])
    (batch, length), channels = x_BT.shape[:2], x_BT.shape[2:]
    x_RBT = jnp.moveaxis(x_BT.reshape(rows, batch // rows, columns, length // columns, *channels), 2, 1)
    x_RS = x_RBT.reshape(rows * columns, -1, *channels)
    n_chunks = -(-x_RS.shape[1] // chunk)
    x_RS = jnp.pad(x_RS, [(0, 0), (0, -x_RS.shape[1] % n_chunks), *[(0, 0)] * len(channels)])
    x_NRC = jnp.moveaxis(x_RS.reshape(len(x_RS), n_chunks, -1, *channels), 1, 0)
    return shard_activations(x_NRC, ".R".ljust(x_NRC.ndim, "."))


def _join_tokens(x_NRC: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Undo `_split_tokens` for an array of a shape (B, T, ...)."""
    rows, columns = token_shards(*shape[:2])
    n_rows, length, channels = shape[0] // rows, shape[1] // columns, shape[2:]
    x_RS = jnp.moveaxis(x_NRC, 0, 1).reshape(rows * columns, -1, *channels)[:, : n_rows * length]
    x_BT = jnp.moveaxis(x_RS.reshape(rows, columns, n_rows, length, *channels), 1, 2).reshape(shape)
    return shard_activations(x_BT, "BT".ljust(len(shape), "."))


@jax.named_scope("loss")
def cross_entropy_sums(
    logits_BTV: jax.Array, batch: Batch, layer_metrics: LayerMetrics, z_loss: jax.Array | float = 0.0
) -> tuple[LossSums, jax.Array]:
    """Compute the sums of a batch from its logits, and the loss of each token."""
    weight = jnp.sum(batch.weights_BT)
    normalizer_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    chosen_BT = jnp.take_along_axis(logits_BTV, batch.targets_BT[..., None], axis=-1)[..., 0]
    losses_BT = normalizer_BT - chosen_BT
    loss = jnp.sum(losses_BT * batch.weights_BT)
    objective = loss
    if is_enabled(z_loss):
        objective = loss + z_loss * jnp.sum(jnp.square(normalizer_BT) * batch.weights_BT)
    metrics = {name: value * weight for name, value in layer_metrics.items()}
    return LossSums(jax.lax.stop_gradient(loss), objective, weight, metrics), losses_BT


def total_loss(sums: LossSums, total_weight: jax.Array) -> jax.Array:
    """Return the contribution of a microbatch to the mean objective of its batch, with its auxiliary loss."""
    return (sums.objective + sums.layer_metrics.get(AUX_LOSS, 0.0)) / jnp.maximum(total_weight, 1.0)


def split_microbatches(batch: Batch, n_parts: int) -> Batch:
    """Split a batch into microbatches along a new first axis, each sharded over all devices."""
    return jax.tree.map(lambda leaf: shard_activations(leaf.reshape(n_parts, -1, leaf.shape[1]), "PBT"), batch)


@partial(jax.jit, static_argnames=("model", "loss_chunk_size", "n_parts"))
def eval_loss_sums(
    params: transformer.Params, batch: Batch, model: ModelConfig, loss_chunk_size: int | None = None, n_parts: int = 1
) -> LossSums:
    """Compute the sums of a batch in `n_parts` microbatches, so that it needs no more memory than a training step."""
    if n_parts == 1:
        return loss_sums(params, batch, model, None, loss_chunk_size)
    sums_P = jax.lax.map(
        lambda part: loss_sums(params, part, model, None, loss_chunk_size), split_microbatches(batch, n_parts)
    )
    return jax.tree.map(jnp.sum, sums_P)


# Maximum number of batches whose sums are pending on the device. Each holds its batch and some KB of Python objects, so
# without a limit the memory of an evaluation would grow with the corpus.
MAX_PENDING = 128
# Maximum seconds of pending computation, because an evaluation cannot be stopped before it is done.
MAX_SECONDS_PENDING = 5.0


def evaluate(
    params: Params,
    model: ModelConfig,
    batches: Iterable[Batch],
    bytes_per_token: float,
    loss_chunk_size: int | None = None,
    n_parts: int = 1,
    progress: Callable[[int], object] | None = None,
) -> dict[str, float]:
    """Evaluate a model on batches.

    Bits per byte, the loss in bits divided by the average number of bytes of text per token, can be compared between
    tokenizers, except for word tokenizers, which lose spacing and unknown words.

    Args:
        params: The parameters.
        model: The config of the model.
        batches: The batches.
        bytes_per_token: The average number of bytes of text per token of the split that counts in the loss.
        loss_chunk_size: See `chunk_size`.
        n_parts: The number of microbatches of a batch.
        progress: Called before each batch with the number of batches done. It may raise an exception to stop.

    Returns:
        Mean loss in nats per token, perplexity and bits per byte; an empty dict if there are no batches.
    """
    model = for_inference(model)
    losses, weights, pending = array("d"), array("d"), deque[LossSums]()
    # Wait for the first batch, because the duration of a batch is not known yet.
    limit, start = 1, time.monotonic()
    for batch in batches:
        if progress is not None:
            progress(len(losses))
        pending.append(eval_loss_sums(params, batch, model, loss_chunk_size, n_parts))
        if len(pending) >= limit:
            _append_sums([pending.popleft() for _ in range((limit + 1) // 2)], losses, weights)
            # The first batch includes compilation; its time does not count.
            if len(losses) == 1:
                limit, start = 2, time.monotonic()
            else:
                seconds = (time.monotonic() - start) / (len(losses) - 1)
                limit = max(1, min(MAX_PENDING, int(MAX_SECONDS_PENDING / max(seconds, 1e-9))))
    _append_sums(list(pending), losses, weights)
    if not losses:
        return {}
    # In the order of the batches, in float64.
    loss, weight = sum(losses), sum(weights)
    mean = float(loss / max(weight, 1.0))
    return {
        "valid/loss": mean,
        "valid/perplexity": math.exp(min(mean, 700.0)),
        "valid/bits_per_byte": mean / math.log(2) / bytes_per_token if bytes_per_token else math.nan,
    }


def _append_sums(sums: Sequence[LossSums], losses: "array[float]", weights: "array[float]") -> None:
    """Wait for the sums of some batches and append their losses and weights."""
    for part in jax.device_get(sums):
        losses.append(float(part.loss))
        weights.append(float(part.weight))
