"""How a run fares: what a loss is measured by to be called a spike, and what has gone wrong so far."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# A loss this many standard deviations above the mean of those before it is a spike.
SPIKE_DEVIATIONS = 6.0
# Steps that the averages look back, and that a stage is given before anything in it is called a spike.
MEMORY_STEPS = 50


class Health(NamedTuple):
    """Scalars in the state of a run, so that they are the same however it was interrupted.

    mean, variance: of the losses of this stage, with a memory of MEMORY_STEPS.
    seen: finite losses in this stage.
    spikes: steps of the run whose loss was a spike.
    faults: steps of the run whose loss or gradient was not finite.
    skipped: batches of this stage passed over by rewinding. The batch of a step is number step + skipped.
    """

    mean: jax.Array
    variance: jax.Array
    seen: jax.Array
    spikes: jax.Array
    faults: jax.Array
    skipped: jax.Array


def healthy() -> Health:
    """The health of a run that has not begun."""
    types = Health(jnp.float32, jnp.float32, jnp.int32, jnp.int32, jnp.int32, jnp.int32)
    return Health(*(jnp.zeros((), dtype) for dtype in types))


def examined(health: Health, loss: jax.Array, is_finite: jax.Array, is_first: jax.Array, is_last: jax.Array) -> Health:
    """The health after a step with this loss, which may be the first or the last of its stage."""
    seen = jnp.where(is_first, 0, health.seen)
    above = loss - health.mean
    is_spike = is_finite & (seen >= MEMORY_STEPS) & (above > SPIKE_DEVIATIONS * jnp.sqrt(health.variance))
    # A plain mean at first, then an exponential one. Of the first loss alone there is no deviation.
    share = 1.0 / (jnp.minimum(seen, MEMORY_STEPS - 1) + 1).astype(jnp.float32)
    above = jnp.where(seen == 0, 0.0, above)
    mean = jnp.where(seen == 0, loss, health.mean + share * above)
    variance = (1.0 - share) * (jnp.where(seen == 0, 0.0, health.variance) + share * jnp.square(above))
    return Health(
        mean=jnp.where(is_finite, mean, health.mean),
        variance=jnp.where(is_finite, variance, health.variance),
        seen=seen + is_finite,
        spikes=health.spikes + is_spike,
        faults=health.faults + ~is_finite,
        skipped=jnp.where(is_last, 0, health.skipped),
    )
