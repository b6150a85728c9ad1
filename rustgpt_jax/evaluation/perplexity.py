"""How well a model predicts held-out text: loss, perplexity and bits per byte."""

import math
from collections.abc import Iterable

import jax

from rustgpt_jax.config import ModelConfig, for_inference
from rustgpt_jax.data.pipeline import Batch
from rustgpt_jax.model.transformer import Params
from rustgpt_jax.training.objective import held_out_sums


def evaluate(
    params: Params,
    model: ModelConfig,
    batches: Iterable[Batch],
    bytes_per_token: float,
    loss_chunk: int | None = None,
    n_parts: int = 1,
) -> dict[str, float]:
    """Mean loss in nats a token, perplexity, and bits per byte over the learned tokens of some batches.

    Bits per byte divide the loss in bits by the bytes of text that a learned token stands for on average in the whole
    split, which makes tokenizers comparable. A word tokenizer loses spacing and unknown words: its value says what its
    tokens cost, not what the text would. Empty if there are no batches.

    loss_chunk, n_parts: as those of `held_out_sums`, for what memory allows.
    """
    model = for_inference(model)
    sums = [held_out_sums(params, batch, model, loss_chunk, n_parts) for batch in batches]
    if not sums:
        return {}
    on_host = jax.device_get(sums)
    loss, weight = (sum(float(getattr(part, name)) for part in on_host) for name in ("loss", "weight"))
    mean = float(loss / max(weight, 1.0))
    return {
        "valid/loss": mean,
        "valid/perplexity": math.exp(min(mean, 700.0)),
        "valid/bits_per_byte": mean / math.log(2) / bytes_per_token if bytes_per_token else math.nan,
    }
