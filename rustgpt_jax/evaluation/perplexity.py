"""Loss, perplexity and bits per byte on held-out text."""

import math
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import jax

from rustgpt_jax.config.schema import ModelConfig, for_inference
from rustgpt_jax.data.pipeline import Batch
from rustgpt_jax.evaluation.loss import LossSums, eval_loss_sums
from rustgpt_jax.model.transformer import Params

# Maximum number of batches whose sums are still being computed by the device. Each holds its batch and some KB of
# Python objects, so without a limit the memory of an evaluation would grow with the corpus.
MOST_PENDING = 128
# Maximum seconds of computation that may be pending, because an evaluation cannot be stopped before it is done.
MOST_SECONDS_PENDING = 5.0


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

    Bits per byte are comparable between tokenizers: the loss in bits divided by the average number of bytes of text per
    token. A word tokenizer loses spacing and unknown words, so that its value is about its tokens, not the whole text.

    Args:
        params: The parameters.
        model: The config of the model.
        batches: The batches.
        bytes_per_token: The average number of bytes per token with loss in the whole split.
        loss_chunk_size: As for `loss_sums`.
        n_parts: The number of microbatches of a batch.
        progress: Called before each batch with the number of batches whose sums are known. If it raises an exception,
            the evaluation ends.

    Returns:
        Mean loss in nats per token, perplexity and bits per byte; empty if there are no batches.
    """
    model = for_inference(model)
    losses, weights, pending = array("d"), array("d"), deque[LossSums]()
    # Wait for the first batch at once, because the time of a batch is unknown.
    limit, start = 1, time.monotonic()
    for batch in batches:
        if progress is not None:
            progress(len(losses))
        pending.append(eval_loss_sums(params, batch, model, loss_chunk_size, n_parts))
        if len(pending) >= limit:
            _read([pending.popleft() for _ in range((limit + 1) // 2)], losses, weights)
            # The first batch includes compilation; its time does not count.
            if len(losses) == 1:
                limit, start = 2, time.monotonic()
            else:
                seconds = (time.monotonic() - start) / (len(losses) - 1)
                limit = max(1, min(MOST_PENDING, int(MOST_SECONDS_PENDING / max(seconds, 1e-9))))
    _read(list(pending), losses, weights)
    if not losses:
        return {}
    # Sum in batch order with Python's own sum.
    loss, weight = sum(losses), sum(weights)
    mean = float(loss / max(weight, 1.0))
    return {
        "valid/loss": mean,
        "valid/perplexity": math.exp(min(mean, 700.0)),
        "valid/bits_per_byte": mean / math.log(2) / bytes_per_token if bytes_per_token else math.nan,
    }


def _read(sums: Sequence[LossSums], losses: "array[float]", weights: "array[float]") -> None:
    """Wait for the sums of some batches and append their losses and weights."""
    for part in jax.device_get(sums):
        losses.append(float(part.loss))
        weights.append(float(part.weight))
