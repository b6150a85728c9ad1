"""What a training step holds in memory, counted from shapes alone, before anything is compiled."""

from typing import Any

import jax
import jax.numpy as jnp

from rustgpt_jax.config import Config, is_on, split, with_values
from rustgpt_jax.data.pipeline import Batch
from rustgpt_jax.model.cost import Shapes, parameter_shapes, total_bytes
from rustgpt_jax.training.objective import objective, token_sums
from rustgpt_jax.training.step import as_arguments, start


def state_shapes(config: Config) -> Shapes:
    """The state of a run (parameters, optimizer state, step) as shapes and types."""
    structure, numbers = split(config)
    return jax.eval_shape(lambda: start(structure, as_arguments(numbers)))


def batch_shapes(rows: int, window: int) -> Batch:
    """A batch as shapes and types."""
    types = Batch(jnp.int32, jnp.int32, jnp.float32, jnp.int32, jnp.int32)
    return Batch(*(jax.ShapeDtypeStruct((rows, window), dtype) for dtype in types))


def step_bytes(config: Config, window: int) -> int:
    """Bytes beside the state while a step is computed: the gradients, and what the backward pass reads of the forward.

    These are the residuals that JAX's differentiation keeps; the compiler may keep fewer of them.
    """
    gradients = total_bytes(parameter_shapes(config.model))
    return gradients + residual_bytes(config, window)


def residual_bytes(config: Config, window: int) -> int:
    """Bytes of what the forward of one part of a batch keeps for its backward, without the parameters.

    With remat, what one repeat of the pattern of blocks computes anew for its own backward is there too; so are the
    logits of one chunk.
    """
    model, chunk = config.model, config.training.loss_chunk
    # What is offloaded is not on the device, as if it were computed anew.
    on_device = "full" if model.remat == "offload" else model.remat
    config = with_values(config, {"model.remat": on_device})
    kept = _kept_bytes(config, window)
    anew = 0
    if on_device != "none":
        everything = _kept_bytes(with_values(config, {"model.remat": "none"}), window)
        anew += (everything - kept) * min(model.period, model.n_layers) // model.n_layers
    if chunk is not None:
        whole = _kept_bytes(with_values(config, {"training.loss_chunk": None}), window)
        anew += (whole - kept) * min(chunk, window) // window
    return kept + anew


def _kept_bytes(config: Config, window: int) -> int:
    rows = config.training.batch_size // config.training.accumulation
    config = with_values(config, {"model.derivatives": "plain"})
    if config.model.attention_kernel != "plain":
        # As a kernel of a library would, which needs its own device to be traced, it keeps no scores.
        config = with_values(config, {"model.attention_kernel": "portable"})

    def loss(params: Any, batch: Batch) -> jax.Array:
        key = jax.random.key(0) if is_on(config.model.dropout) else None
        sums = token_sums(params, batch, config.model, key, config.training.loss_chunk)
        return objective(sums, jnp.ones(()), config.training.z_loss)

    def backward(params: Any, batch: Batch) -> Any:
        return jax.vjp(lambda params: loss(params, batch), params)[1]

    shapes = parameter_shapes(config.model)
    kept = jax.eval_shape(backward, shapes, batch_shapes(rows, window))
    return max(0, total_bytes(kept) - total_bytes(shapes))
