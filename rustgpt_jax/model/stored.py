"""Weights that are kept otherwise than as an array of floats, and know how they are multiplied."""

from abc import ABC, abstractmethod

import jax


class Stored(ABC):
    """A weight matrix (inputs, outputs), a pytree that stands where a model's parameters have an array."""

    @abstractmethod
    def product(self, x: jax.Array) -> jax.Array:
        """x W with the shape (..., outputs), in the type of x (..., inputs)."""
