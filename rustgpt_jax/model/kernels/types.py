"""What is asked of an attention kernel: as far as it is known before tracing, and the arrays themselves."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from rustgpt_jax.model.block_inputs import BlockInputs

Bias = Callable[[jax.Array, jax.Array], jax.Array]


class Device(NamedTuple):
    """Where a program is to run.

    platform: cpu, gpu (NVIDIA's), rocm (AMD's) or tpu; None for any that is fit. capability: the compute capability of
    an NVIDIA GPU, (9, 0) for an H100; None where it is not known.
    """

    platform: str | None
    capability: tuple[int, int] | None = None


ANY_DEVICE = Device(None)


def default_device() -> jax.Device:
    """The device that programs of this thread run on, if nothing else is said."""
    default = jax.config.values["jax_default_device"]
    if default is None or isinstance(default, str):
        return jax.local_devices(backend=default)[0]
    return default


def current_device() -> Device:
    """What the default device is, as far as kernels ask."""
    default = default_device()
    if default.platform != "gpu":
        return Device(default.platform)
    major, _, minor = str(getattr(default, "compute_capability", "")).partition(".")
    return Device("gpu", (int(major), int(minor))) if major.isdigit() and minor.isdigit() else Device("rocm")


class AttentionSpec(NamedTuple):
    """All that decides whether a kernel can serve attention.

    length: T, the tokens of a row. n_heads, n_kv_heads: H and K. head_width, value_width: channels of queries and keys,
    and of values. softcap, bias, sinks, dropout: whether scores are bounded, depend on distances, compete with learned
    logits, or are dropped. cached: whether keys come from a cache.
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


class AttentionInputs(NamedTuple):
    """What a kernel computes from. Query head h reads the keys and values of head h // G, where G is H / K.

    context: positions and documents of the tokens, which are queries and keys alike. A token sees itself and the
    earlier tokens of its own document: all, or the last `window`. Scores are multiplied by `scale`, then bounded by
    `softcap` (0: not at all), then `bias`, a function of the positions of queries and of keys, is added. `sinks_H` are
    the logits of sinks.
    """

    q_BTHC: jax.Array
    k_BSKC: jax.Array
    v_BSKC: jax.Array
    context: BlockInputs
    window: int | None
    scale: float
    softcap: Any = 0.0
    bias: Bias | None = None
    sinks_H: jax.Array | None = None


class Kernel(NamedTuple):
    """An implementation of attention.

    attend: mixed_BTKGC of a task. unsupported_reason: why it cannot serve a request, as a clause that follows
    'because'; None if it can.

    `mixed_BTKGC` are the values that each query takes on average: heads h = k G + g in groups of G, in the type of the
    values.
    """

    attend: Callable[[AttentionInputs], jax.Array]
    unsupported_reason: Callable[[AttentionSpec], str | None]
