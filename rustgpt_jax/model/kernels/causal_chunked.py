"""Attention of a few blocks of queries, each with no more keys than it can see: about half of all products.

The blocks are written out one after another, and what the backward pass reads is kept: the fastest form on CPUs.
"""

import jax
import jax.numpy as jnp

from rustgpt_jax.model.block_inputs import Context
from rustgpt_jax.model.kernels.blockwise import refuses
from rustgpt_jax.model.kernels.portable import attended, softmax_weights
from rustgpt_jax.model.kernels.types import Kernel, Task, visible

# More blocks leave out more keys, and make more and smaller products.
N_BLOCKS = 4


def triangular(task: Task, n_blocks: int = N_BLOCKS) -> jax.Array:
    """mixed_BTKGC of a task, exactly. In memory are the scores of the keys that each block reads."""
    length = task.q_BTHC.shape[1]
    k_BKSC, v_BKSC = jnp.swapaxes(task.k_BSKC, 1, 2), jnp.swapaxes(task.v_BSKC, 1, 2)

    def attend(start: int, stop: int) -> jax.Array:
        first = 0 if task.window is None else max(0, start + 1 - task.window)
        queries, keys = _part(task.context, start, stop), _part(task.context, first, stop)
        visible_BTS = visible(queries, jnp.arange(start, stop), keys, jnp.arange(first, stop), task.window)
        positions = (queries.positions_BT, keys.positions_BT)

        def weights(scores_BHTS: jax.Array) -> jax.Array:
            return softmax_weights(scores_BHTS, visible_BTS, positions, task.softcap, task.bias, task.sinks_H)

        near = (k_BKSC[:, :, first:stop], v_BKSC[:, :, first:stop])
        return attended(task.q_BTHC[:, start:stop], *near, task.scale, weights)

    block = -(-length // n_blocks)
    starts = range(0, length, block)
    return jnp.concatenate([attend(start, min(start + block, length)) for start in starts], axis=1)


def _part(context: Context, start: int, stop: int) -> Context:
    return Context(context.positions_BT[:, start:stop], context.segments_BT[:, start:stop])


TRIANGULAR = Kernel(triangular, refuses)
