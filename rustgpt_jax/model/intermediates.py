"""Taps: what every module of a block gives is measured, forward and backward, without an edit to the module.

A site is a place in the forward: 'mixer/query' for the first array that the module of that path in a block gives, if it
is not just what a module within it gave. `Probe` makes sites of other tensors.

Forward, a measurement of the tensor there comes out of the call. Backward, the tensor's gradient is measured by a
trick: the tensor passes through an identity that has a second argument, a slot of zeros, and whose "gradient" with
respect to the slot is the measurement. So slots go in like parameters, and no tensor is kept for it.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rustgpt_jax.fingerprints import hash_elements
from rustgpt_jax.model.dtypes import to_float32

# The numbers of a measurement, as `tensor_stats` has them.
N_STATS = 7

# By site, an array of MEASUREMENT_SIZE; where layers are stacked, with a first axis of them.
GradSlots = dict[str, Any]
Intermediates = dict[str, Any]

_COLLECTION = "taps"
_HALF = 1 << 16
# What elements are multiplied by before they are squared: as they are, or where the largest is small, or very large.
_SMALL = 2.0**-40
_SCALES = (1.0, 2.0**80, 2.0**-80)


class Probe(nn.Module):
    """A tensor inside a layer under a name of its own, as it is: `scores = Tap(name="scores")(scores)` makes a site."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x


class TensorStats(NamedTuple):
    """A measurement as it is read. norm (root of the sum of squares) and largest magnitude are of finite elements."""

    norm: Any
    largest: Any
    nonfinite: Any
    digest: tuple[Any, Any]


@jax.jit
def tensor_stats(x: jax.Array) -> jax.Array:
    """Norm, largest magnitude, count of elements that are not finite, and the digest in quarters, all as float32."""
    finite = jnp.isfinite(x)
    magnitudes = jnp.where(finite, jnp.abs(to_float32(x)), 0)
    squares = [jnp.square(magnitudes * scale) for scale in _SCALES]
    largest, nonfinite, *sums = _reduced(magnitudes, (~finite).astype(jnp.float32), *squares, *hash_elements(x))
    norms = [jnp.sqrt(total) / scale for total, scale in zip(sums, _SCALES, strict=False)]
    norm = jnp.select([largest < _SMALL, largest > 1 / _SMALL], norms[1:], norms[0])
    # Bits that were read as a float could be those of a NaN, which arithmetic changes: small whole numbers are safe.
    quarters = [quarter for half in sums[len(_SCALES) :] for quarter in (half // _HALF, half % _HALF)]
    return jnp.stack([jnp.asarray(number, jnp.float32) for number in (norm, largest, nonfinite, *quarters)])


def _reduced(magnitudes: jax.Array, *terms: jax.Array) -> tuple[jax.Array, ...]:
    """The largest magnitude and the sums of the other arrays, all in one pass over the elements."""

    def join(first: tuple[jax.Array, ...], second: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        sums = (left + right for left, right in zip(first[1:], second[1:], strict=True))
        return (jnp.maximum(first[0], second[0]), *sums)

    arrays = (magnitudes, *terms)
    zeros = tuple(np.zeros((), array.dtype) for array in arrays)
    # A row at a time: a sum of millions of numbers, one after another, would lose digits.
    for axis in range(magnitudes.ndim - 1, -1, -1):
        arrays = tuple(jax.lax.reduce(arrays, zeros, join, (axis,)))
    return arrays


def unpack_stats(measurement: Any) -> TensorStats:
    """The parts of a measurement, or of many along first axes; with NumPy arrays, on the host."""
    norm, largest, nonfinite, *quarters = (measurement[..., index] for index in range(N_STATS))
    high, low, second_high, second_low = (quarter.astype("uint32") for quarter in quarters)
    return TensorStats(norm, largest, nonfinite, (high * _HALF + low, second_high * _HALF + second_low))


@jax.custom_vjp
def _watched(x: jax.Array, slot: jax.Array) -> jax.Array:
    del slot
    return x


def _forward(x: jax.Array, slot: jax.Array) -> tuple[jax.Array, None]:
    return _watched(x, slot), None


def _backward(_: None, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gradient, tensor_stats(gradient)


_watched.defvjp(_forward, _backward)


def probe(x: jax.Array, slot: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A tensor as it is and its measurement; the gradient with respect to `slot` is that of the tensor's gradient."""
    return _watched(x, slot), tensor_stats(jax.lax.stop_gradient(x))


def apply_block(block: nn.Module, params: Any, slots: GradSlots | None, *arguments: Any) -> tuple[Any, Intermediates]:
    """What a block gives, and its measurements by site. With no slots there are none, and nothing in the program."""
    if slots is None:
        return block.apply({"params": params}, *arguments), {}
    return _intercepted(block, params, arguments, lambda site, x: probe(x, slots[site]))


def block_hook_points(block: nn.Module, *arguments: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """The sites of a block in the order in which their tensors are made, with their shapes and types."""
    found: dict[str, jax.ShapeDtypeStruct] = {}

    def note(site: str, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        found[site] = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return x, jnp.zeros(N_STATS)

    def forward(*arguments: Any) -> Any:
        params = block.init(jax.random.key(0), *arguments)["params"]
        return _intercepted(block, params, arguments, note)

    _, measurements = jax.eval_shape(forward, *arguments)
    return {site: found[site] for site in found if site in measurements}


def _intercepted(
    block: nn.Module,
    params: Any,
    arguments: tuple[Any, ...],
    tap: Callable[[str, jax.Array], tuple[jax.Array, jax.Array]],
) -> tuple[Any, Intermediates]:
    """What a block gives with `tap` put around each module's first array, and what `tap` found there, by site."""
    calls, tapped = Counter[str](), list[jax.Array]()

    def intercept(call: Callable[..., Any], given: Any, named: Any, context: nn.module.InterceptorContext) -> Any:
        output, module = call(*given, **named), context.module
        leaves, tree = jax.tree.flatten(output)
        # Inside a lifted transformation (nn.scan, nn.vmap) the collection is not there: a tensor has many values.
        is_site = context.method_name == "__call__" and module.is_mutable_collection(_COLLECTION)
        if not (is_site and leaves and _is_real(leaves[0])) or any(leaves[0] is each for each in tapped):
            return output
        site = "/".join(module.path)
        calls[site] += 1
        name = site if calls[site] == 1 else f"{site}:{calls[site]}"
        leaves[0], measurement = tap(name, leaves[0])
        tapped.append(leaves[0])
        module.put_variable(_COLLECTION, f":{calls[site]}", {name: measurement})
        return jax.tree.unflatten(tree, leaves)

    with nn.intercept_methods(intercept):
        output, collected = block.apply({"params": params}, *arguments, mutable=[_COLLECTION])
    return output, {path[-1].key: leaf for path, leaf in jax.tree_util.tree_flatten_with_path(collected)[0]}


def _is_real(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.floating)
