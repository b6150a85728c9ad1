"""Compute kernels: attention with its interface (static spec, arrays, device), and matrix-vector products on CPUs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rustgpt_jax.model.interfaces import BlockInputs

Bias = Callable[[jax.Array, jax.Array], jax.Array]


class Device(NamedTuple):
    """The device that runs a program.

    Attributes:
        platform: cpu, gpu (NVIDIA), rocm (AMD) or tpu; None for any device that supports the program.
        capability: Compute capability of an NVIDIA GPU, such as (9, 0) for an H100; None if unknown.
    """

    platform: str | None
    capability: tuple[int, int] | None = None


ANY_DEVICE = Device(None)


def default_device() -> jax.Device:
    """Return the default device of this thread."""
    default = jax.config.values["jax_default_device"]
    if default is None or isinstance(default, str):
        return jax.local_devices(backend=default)[0]
    return default


def current_device() -> Device:
    """Return the platform and compute capability of the default device."""
    default = default_device()
    if default.platform != "gpu":
        return Device(default.platform)
    major, _, minor = str(getattr(default, "compute_capability", "")).partition(".")
    return Device("gpu", (int(major), int(minor))) if major.isdigit() and minor.isdigit() else Device("rocm")


def fold_vmap(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of arrays that `jax.vmap` calls once, with the new axis folded into the first of each array."""
    # The lambda keeps the default values of the function's other arguments out of `arrays`.
    call = jax.custom_batching.custom_vmap(lambda *arrays: function(*arrays))

    @call.def_vmap
    def call_folded(size: int, is_batched: list[bool], *arrays: jax.Array) -> tuple[Any, Any]:
        def fold(x: jax.Array, is_batched: bool) -> jax.Array:
            x = x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape(-1 if x.size else 0, *x.shape[2:])

        outputs = call(*map(fold, arrays, is_batched))
        unfolded = jax.tree.map(lambda y: y.reshape(size, len(y) // size, *y.shape[1:]), outputs)
        return unfolded, jax.tree.map(lambda _: True, outputs)

    return call


class AttentionSpec(NamedTuple):
    """Static properties of a layer's attention, which determine the kernels that support it.

    Attributes:
        device: Device that runs the program.
        dtype: Dtype of activations.
        length: T, tokens in a row.
        n_heads: H.
        n_kv_heads: K.
        head_width: Channels of queries and keys.
        value_width: Channels of values.
        softcap: Whether scores are soft-capped.
        bias: Whether a positional bias is added to scores.
        sinks: Whether there are learned attention sinks.
        dropout: Whether attention weights are dropped.
        cached: Whether keys come from a cache.
        window: Number of tokens that a token attends to, itself included; None for all.
        packed: Whether a row may contain several documents.
    """

    device: Device
    dtype: str
    length: int
    n_heads: int
    n_kv_heads: int
    head_width: int
    value_width: int
    softcap: bool
    bias: bool
    sinks: bool
    dropout: bool
    cached: bool
    window: int | None = None
    packed: bool = True


class AttentionInputs(NamedTuple):
    """Inputs of a kernel. Query head h attends to key/value head h // G, where G is H / K.

    Attributes:
        q_BTHC: Queries.
        k_BSKC: Keys.
        v_BSKC: Values.
        block_inputs: Positions and documents of the tokens, which are both queries and keys.
        window: A token attends to this many tokens of its document, itself included; None for all earlier ones.
        scale: Factor that the scores are multiplied by.
        softcap: Soft-cap of the scaled scores; 0 for no cap.
        bias: Function of query and key positions, added to the capped scores.
        sinks_H: Logits of attention sinks.
        packed: Whether a row may contain several documents.
    """

    q_BTHC: jax.Array
    k_BSKC: jax.Array
    v_BSKC: jax.Array
    block_inputs: BlockInputs
    window: int | None
    scale: float
    softcap: Any = 0.0
    bias: Bias | None = None
    sinks_H: jax.Array | None = None
    packed: bool = True

    def first_keys_if_packed(self) -> jax.Array | None:
        """Return first_key_BT, the index of the first token of each query's document; None if it is always 0."""
        return self.block_inputs.first_keys() if self.packed else None


class Kernel(NamedTuple):
    """An implementation of attention.

    Attributes:
        attend: Returns mixed_BTKGC, the weighted mean of the values for each query, in the dtype of the values; query
            head h is k G + g.
        unsupported_reason: Returns why it does not support a spec, as a clause that follows 'because', or None.
    """

    attend: Callable[[AttentionInputs], jax.Array]
    unsupported_reason: Callable[[AttentionSpec], str | None]
