"""The loss, which is the mean next-token cross-entropy over weighted tokens, and evaluation on held-out text."""

import math
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rustgpt_jax.config.schema import ModelConfig, for_inference, is_enabled
from rustgpt_jax.data.pipeline import Batch
from rustgpt_jax.model import transformer
from rustgpt_jax.model.activation_sharding import shard_activations
from rustgpt_jax.model.interfaces import AUX_LOSS, LayerMetrics
from rustgpt_jax.model.transformer import Params


class LossSums(NamedTuple):
    """Weighted sums over tokens, in nats. Unlike means, sums can be added over microbatches and batches.

    Attributes:
        loss: Sum of the cross-entropy.
        squared_normalizer: Sum of the squared log normalizer, for z-loss.
        weight: Sum of the weights, which is the number of tokens that count in the loss.
        layer_metrics: Metrics of the blocks, times `weight`.
    """

    loss: jax.Array
    squared_normalizer: jax.Array
    weight: jax.Array
    layer_metrics: LayerMetrics


def loss_sums(
    params: transformer.Params,
    batch: Batch,
    model: ModelConfig,
    dropout_key: jax.Array | None = None,
    loss_chunk_size: int | None = None,
) -> LossSums:
    """Compute the loss sums of a batch.

    Args:
        params: The parameters.
        batch: The batch.
        model: The config of the model.
        dropout_key: The key for dropout, None for no dropout.
        loss_chunk_size: The number of tokens per row whose logits are in memory at a time, in the backward pass too;
            None for all.
    """
    hidden_BTD, _, layer_metrics = transformer.hidden_states(
        params,
        batch.tokens_BT,
        model,
        positions_BT=batch.positions_BT,
        segments_BT=batch.segments_BT,
        dropout_key=dropout_key,
    )
    if loss_chunk_size is not None:
        return _chunked_sums(params, hidden_BTD, batch, layer_metrics, model, loss_chunk_size)
    return cross_entropy_sums(transformer.logits(params, hidden_BTD, model), batch, layer_metrics)[0]


def _chunked_sums(
    params: transformer.Params,
    hidden_BTD: jax.Array,
    batch: Batch,
    layer_metrics: LayerMetrics,
    model: ModelConfig,
    chunk: int,
) -> LossSums:
    """Compute the sums of a batch with the logits of one chunk at a time."""
    length = hidden_BTD.shape[1]
    chunk = min(chunk, length)

    def chunks(x: jax.Array) -> jax.Array:
        """Reshape (B, T, ...) to (chunks, B, chunk, ...), padded with zeros, which have no weight.

        A chunk has tokens from all parts of the sequence, which preserves a sharding along T.
        """
        padded = jnp.pad(x, [(0, 0), (0, -length % chunk), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(padded.reshape(x.shape[0], chunk, -1, *x.shape[2:]), 2, 0)

    @partial(jax.checkpoint, prevent_cse=False)
    def chunk_sums(hidden_BTD: jax.Array, part: Batch) -> LossSums:
        return cross_entropy_sums(transformer.logits(params, hidden_BTD, model), part, {})[0]

    def add(total: LossSums, inputs: tuple[jax.Array, Batch]) -> tuple[LossSums, None]:
        return jax.tree.map(jnp.add, total, chunk_sums(*inputs)), None

    zeros = LossSums(jnp.zeros(()), jnp.zeros(()), jnp.zeros(()), {})
    sums, _ = jax.lax.scan(add, zeros, (chunks(hidden_BTD), jax.tree.map(chunks, batch)))
    return sums._replace(layer_metrics={name: value * sums.weight for name, value in layer_metrics.items()})


def cross_entropy_sums(logits_BTV: jax.Array, batch: Batch, layer_metrics: LayerMetrics) -> tuple[LossSums, jax.Array]:
    """Compute the sums of a batch from its logits, and the loss of each token."""
    weight = jnp.sum(batch.weights_BT)
    normalizer_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    chosen_BT = jnp.take_along_axis(logits_BTV, batch.targets_BT[..., None], axis=-1)[..., 0]
    losses_BT = normalizer_BT - chosen_BT
    sums = LossSums(
        loss=jnp.sum(losses_BT * batch.weights_BT),
        squared_normalizer=jnp.sum(jnp.square(normalizer_BT) * batch.weights_BT),
        weight=weight,
        layer_metrics={name: value * weight for name, value in layer_metrics.items()},
    )
    return sums, losses_BT


def total_loss(sums: LossSums, total_weight: jax.Array, z_loss: jax.Array | float) -> jax.Array:
    """Return the contribution of a microbatch to the mean loss of its batch.

    It includes the z-loss (arXiv 2204.02311) and the auxiliary loss of the blocks for this microbatch.
    """
    loss = sums.loss
    if AUX_LOSS in sums.layer_metrics:
        loss = loss + sums.layer_metrics[AUX_LOSS]
    if is_enabled(z_loss):
        loss = loss + z_loss * sums.squared_normalizer
    return loss / jnp.maximum(total_weight, 1.0)


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
        loss_chunk_size: As for `loss_sums`.
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
