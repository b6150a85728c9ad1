"""Samplers, which transform the logits of the next token, and sampling from the result.

A sampler is a frozen dataclass whose setting is a pytree leaf, so a new value does not trigger a recompilation. A
sampler excludes a token by setting its logit to -inf. Samplers are combined in a tuple and applied in order.
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
    """Keep only the most likely token (the first one of ties)."""

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


def _keep_at_least(logits_BV: jax.Array, threshold_B1: jax.Array) -> jax.Array:
    return jnp.where(logits_BV >= threshold_B1, logits_BV, -jnp.inf)


@pytree_dataclass()
@dataclass(frozen=True)
class TopK:
    """Keep the k most likely tokens, and ties with the last of them."""

    k: Any

    def __call__(self, logits_BV: jax.Array, seen_BV: jax.Array) -> jax.Array:
        del seen_BV
        n_tokens = logits_BV.shape[-1]
        index = n_tokens - jnp.clip(jnp.asarray(self.k, jnp.int32), 1, n_tokens)
        return _keep_at_least(logits_BV, jax.lax.dynamic_slice_in_dim(jnp.sort(logits_BV, axis=-1), index, 1, axis=-1))


@pytree_dataclass()
@dataclass(frozen=True)
class TopP:
    """Keep the fewest most likely tokens whose probabilities sum to at least p: nucleus sampling (arXiv 1904.09751)."""

    p: Any

    def __call__(self, logits_BV: jax.Array, seen_BV: jax.Array) -> jax.Array:
        del seen_BV
        sorted_BV = -jnp.sort(-logits_BV, axis=-1)
        probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
        is_kept_BV = (jnp.cumsum(probs_BV, axis=-1) - probs_BV < self.p).at[:, 0].set(True)
        return _keep_at_least(logits_BV, jnp.min(jnp.where(is_kept_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True))


@pytree_dataclass()
@dataclass(frozen=True)
class MinP:
    """Keep the tokens that are at least p times as likely as the most likely one (arXiv 2407.01082)."""

    p: Any

    def __call__(self, logits_BV: jax.Array, seen_BV: jax.Array) -> jax.Array:
        del seen_BV
        return _keep_at_least(logits_BV, jnp.max(logits_BV, axis=-1, keepdims=True) + jnp.log(self.p))


@pytree_dataclass()
@dataclass(frozen=True)
class RepetitionPenalty:
    """Make the tokens seen so far less likely: divide positive logits, multiply negative ones (arXiv 1909.05858)."""

    penalty: Any

    def __call__(self, logits_BV: jax.Array, seen_BV: jax.Array) -> jax.Array:
        penalized_BV = jnp.where(logits_BV > 0, logits_BV / self.penalty, logits_BV * self.penalty)
        return jnp.where(seen_BV, penalized_BV, logits_BV)


# Dividing logits by a lower temperature would overflow.
MIN_TEMPERATURE = 1e-5

# Fields of `config.sampling` in the order in which they are applied, with the value that disables each.
SAMPLERS: dict[str, tuple[float, Callable[[Any], Sampler]]] = {
    "repetition_penalty": (1.0, RepetitionPenalty),
    "temperature": (1.0, Temperature),
    "top_k": (0.0, TopK),
    "top_p": (1.0, TopP),
    "min_p": (0.0, MinP),
}


def make_samplers(sampling: SamplingConfig) -> tuple[Sampler, ...]:
    """Return the samplers that a config enables. A temperature of (almost) 0 means greedy decoding."""
    greedy = is_greedy(sampling)
    names = ["repetition_penalty"] if greedy else SAMPLERS
    values = {name: getattr(sampling, name) for name in names}
    samplers = [SAMPLERS[name][1](np.float32(value)) for name, value in values.items() if value != SAMPLERS[name][0]]
    return (*samplers, Greedy()) if greedy else tuple(samplers)


def is_greedy(sampling: SamplingConfig) -> bool:
    """Return whether a config asks for greedy decoding."""
    return sampling.temperature < MIN_TEMPERATURE


def sample(keys_B: jax.Array, logits_BV: jax.Array, seen_BV: jax.Array, samplers: tuple[Sampler, ...]) -> jax.Array:
    """Return one token per row, sampled with the row's key after applying the samplers to the logits."""
    greedy = bool(samplers) and isinstance(samplers[-1], Greedy)
    for sampler in samplers[: len(samplers) - greedy]:
        logits_BV = sampler(logits_BV, seen_BV)
    if greedy:
        # Reads the logits once; sampling from the output of Greedy would read them three times.
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)
