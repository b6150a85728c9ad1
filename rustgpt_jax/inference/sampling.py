"""Samplers: values that each turn the logits of the next token into others; a tuple of them is a way of sampling.

A sampler is a frozen dataclass whose number is a leaf, so that changing a number compiles nothing new. A token is ruled
out by the logit -inf. `draw` applies the samplers in order and draws from what is left.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from rustgpt_jax.config.schema import SamplingConfig
from rustgpt_jax.pytrees import pytree_dataclass


class Sampler(Protocol):
    """Maps logits_BV to logits_BV. seen_BV is True for the tokens of the row so far, prompt included."""

    def __call__(self, logits_BV: jax.Array, seen_BV: jax.Array) -> jax.Array: ...


@pytree_dataclass()
@dataclass(frozen=True)
class Greedy:
    """Leave only the likeliest token (the first of equals)."""

    def __call__(self, logits_BV: jax.Array, seen_BV: jax.Array) -> jax.Array:
        del seen_BV
        best_B = jnp.argmax(logits_BV, axis=-1)
        is_best_BV = jnp.arange(logits_BV.shape[-1])[None, :] == best_B[:, None]
        return jnp.where(is_best_BV, 0.0, -jnp.inf)


@pytree_dataclass()
@dataclass(frozen=True)
class Temperature:
    """Divide the logits: below 1 sharpens the distribution, above 1 flattens it."""

    temperature: Any

    def __call__(self, logits_BV: jax.Array, seen_BV: jax.Array) -> jax.Array:
        del seen_BV
        return logits_BV / self.temperature


@pytree_dataclass()
@dataclass(frozen=True)
class TopK:
    """Keep the k likeliest tokens, and any equal to the last of them."""

    k: Any

    def __call__(self, logits_BV: jax.Array, seen_BV: jax.Array) -> jax.Array:
        del seen_BV
        vocabulary = logits_BV.shape[-1]
        place = vocabulary - jnp.clip(jnp.asarray(self.k, jnp.int32), 1, vocabulary)
        least_B1 = jax.lax.dynamic_slice_in_dim(jnp.sort(logits_BV, axis=-1), place, 1, axis=-1)
        return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)


@pytree_dataclass()
@dataclass(frozen=True)
class TopP:
    """Keep the fewest likeliest tokens whose probabilities sum to at least p: nucleus sampling (arXiv 1904.09751)."""

    p: Any

    def __call__(self, logits_BV: jax.Array, seen_BV: jax.Array) -> jax.Array:
        del seen_BV
        falling_BV = -jnp.sort(-logits_BV, axis=-1)
        probabilities_BV = jax.nn.softmax(falling_BV, axis=-1)
        before_BV = jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV
        is_kept_BV = (before_BV < self.p).at[:, 0].set(True)
        least_B1 = jnp.min(jnp.where(is_kept_BV, falling_BV, jnp.inf), axis=-1, keepdims=True)
        return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)


@pytree_dataclass()
@dataclass(frozen=True)
class MinP:
    """Keep the tokens at least p times as likely as the likeliest (arXiv 2407.01082)."""

    p: Any

    def __call__(self, logits_BV: jax.Array, seen_BV: jax.Array) -> jax.Array:
        del seen_BV
        least_B1 = jnp.max(logits_BV, axis=-1, keepdims=True) + jnp.log(self.p)
        return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)


@pytree_dataclass()
@dataclass(frozen=True)
class RepetitionPenalty:
    """Make the tokens seen so far less likely: positive logits divided, negative ones multiplied (arXiv 1909.05858)."""

    penalty: Any

    def __call__(self, logits_BV: jax.Array, seen_BV: jax.Array) -> jax.Array:
        penalized_BV = jnp.where(logits_BV > 0, logits_BV / self.penalty, logits_BV * self.penalty)
        return jnp.where(seen_BV, penalized_BV, logits_BV)


LEAST_TEMPERATURE = 1e-5

# In the order in which `from_config` applies them: a name in `config.sampling`, its neutral value, its sampler.
SAMPLERS: dict[str, tuple[float, Callable[[Any], Sampler]]] = {
    "repetition_penalty": (1.0, RepetitionPenalty),
    "temperature": (1.0, Temperature),
    "top_k": (0.0, TopK),
    "top_p": (1.0, TopP),
    "min_p": (0.0, MinP),
}


def from_config(sampling: SamplingConfig) -> tuple[Sampler, ...]:
    """Return the samplers configured by `config.sampling`. A temperature of (almost) 0 means greedy decoding."""
    asked = {
        name: getattr(sampling, name) for name, (neutral, _) in SAMPLERS.items() if getattr(sampling, name) != neutral
    }
    greedy = is_greedy(sampling)
    if greedy:
        asked = {name: number for name, number in asked.items() if name == "repetition_penalty"}
    chain = tuple(SAMPLERS[name][1](np.float32(number)) for name, number in asked.items())
    return (*chain, Greedy()) if greedy else chain


def is_greedy(sampling: SamplingConfig) -> bool:
    """Return whether decoding is greedy; dividing logits by a smaller temperature would overflow."""
    return sampling.temperature < LEAST_TEMPERATURE


def draw(keys_B: jax.Array, logits_BV: jax.Array, seen_BV: jax.Array, samplers: tuple[Sampler, ...]) -> jax.Array:
    """One token for each row, drawn from the logits that the samplers leave, with a key of its own for each row."""
    is_greedy = bool(samplers) and isinstance(samplers[-1], Greedy)
    # What Greedy leaves is found without asking it: one reading of the logits, not three.
    for sampler in samplers[: len(samplers) - is_greedy]:
        logits_BV = sampler(logits_BV, seen_BV)
    if is_greedy:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)
