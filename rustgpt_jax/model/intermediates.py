"""Statistics of the intermediate tensors of a block and of their gradients, without changes to its modules.

A hook point is the first array that a module returns, named by the module's path, such as 'mixer/query', unless an
inner module returned that same array. The module `HookPoint` makes other tensors hook points.

Statistics of the tensors are outputs of the call. Those of the gradients use a trick: the tensor passes through an
identity with a second argument, a slot of zeros, whose "gradient" is defined as the statistics of the tensor's
gradient. So slots are inputs like parameters, and no tensor is kept in memory.
"""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rustgpt_jax.model.matmul import to_float32
from rustgpt_jax.pytrees import hash_elements

# Length of the array of `tensor_stats`.
N_STATS = 7

# Arrays of N_STATS by hook point, with a leading axis of layers where layers are stacked.
GradSlots = dict[str, Any]
Intermediates = dict[str, Any]

_COLLECTION = "hook_points"
_HALF = 1 << 16
# Elements are scaled before they are squared if the largest is tiny or huge.
_SMALL = 2.0**-40
_SCALES = (1.0, 2.0**80, 2.0**-80)


class HookPoint(nn.Module):
    """The identity, which makes a tensor a hook point: `scores = HookPoint(name="scores")(scores)`."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x


class HookPointInfo(NamedTuple):
    """A hook point of a whole model.

    Attributes:
        path: Path within its block, such as 'mixer/query', or 'embeddings', 'hidden' (after the last norm) or 'logits'.
        shape: Shape of the tensor.
        layer: Index of the layer; None for tensors outside the blocks.
        group: Key of the layer's group in parameters and intermediates; None outside the blocks.
        row: Index of the layer within its group.
    """

    path: str
    shape: tuple[int, ...]
    layer: int | None = None
    group: str | None = None
    row: int = 0

    @property
    def name(self) -> str:
        """Unique name, such as 'layers/3/mixer/query' or 'logits'."""
        return self.path if self.layer is None else f"layers/{self.layer}/{self.path}"

    @property
    def size(self) -> int:
        """Number of elements of the tensor."""
        return math.prod(self.shape)

    def select(self, values: Intermediates) -> Any:
        """Return the value of this hook point."""
        return values[self.path] if self.group is None else values["blocks"][self.group][self.path][self.row]


class TensorStats(NamedTuple):
    """Statistics of a tensor.

    Attributes:
        norm: Root of the sum of squares of the finite elements.
        largest: Largest magnitude of the finite elements.
        nonfinite: Number of elements that are not finite.
        digest: Two hashes of the elements.
    """

    norm: Any
    largest: Any
    nonfinite: Any
    digest: tuple[Any, Any]


@jax.jit
def tensor_stats(x: jax.Array) -> jax.Array:
    """Return the statistics of a tensor as N_STATS float32 numbers: three, and the 16-bit halves of two hashes."""
    finite = jnp.isfinite(x)
    magnitudes = jnp.where(finite, jnp.abs(to_float32(x)), 0)
    squares = [jnp.square(magnitudes * scale) for scale in _SCALES]
    largest, nonfinite, *sums = _reduce(magnitudes, (~finite).astype(jnp.float32), *squares, *hash_elements(x))
    norms = [jnp.sqrt(total) / scale for total, scale in zip(sums, _SCALES, strict=False)]
    norm = jnp.select([largest < _SMALL, largest > 1 / _SMALL], norms[1:], norms[0])
    # The bits of a hash could be those of a NaN, which arithmetic changes; small integers are exact.
    halves = [half for digest in sums[len(_SCALES) :] for half in (digest // _HALF, digest % _HALF)]
    return jnp.stack([jnp.asarray(number, jnp.float32) for number in (norm, largest, nonfinite, *halves)])


def _reduce(magnitudes: jax.Array, *terms: jax.Array) -> tuple[jax.Array, ...]:
    """Return the maximum of the magnitudes and the sums of the other arrays, all in one pass over the elements."""

    def combine(first: tuple[jax.Array, ...], second: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        sums = (left + right for left, right in zip(first[1:], second[1:], strict=True))
        return (jnp.maximum(first[0], second[0]), *sums)

    arrays = (magnitudes, *terms)
    zeros = tuple(np.zeros((), array.dtype) for array in arrays)
    # One axis at a time: a sequential sum of millions of numbers would lose precision.
    for axis in range(magnitudes.ndim - 1, -1, -1):
        arrays = tuple(jax.lax.reduce(arrays, zeros, combine, (axis,)))
    return arrays


def unpack_stats(stats: Any) -> TensorStats:
    """Unpack NumPy arrays from `tensor_stats`, which may have leading axes."""
    norm, largest, nonfinite, *halves = (stats[..., index] for index in range(N_STATS))
    high, low, second_high, second_low = (half.astype("uint32") for half in halves)
    return TensorStats(norm, largest, nonfinite, (high * _HALF + low, second_high * _HALF + second_low))


@jax.custom_vjp
def _identity(x: jax.Array, slot: jax.Array) -> jax.Array:
    del slot
    return x


_identity.defvjp(lambda x, slot: (_identity(x, slot), None), lambda _, grad: (grad, tensor_stats(grad)))


def record_stats(x: jax.Array, slot: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return x and its statistics; the gradient with respect to `slot` is the statistics of the gradient of x."""
    return _identity(x, slot), tensor_stats(jax.lax.stop_gradient(x))


def grad_slots(points: tuple[HookPointInfo, ...]) -> GradSlots:
    """Return slots of zeros for the hook points of a model, an argument of `transformer.apply_with_intermediates`."""
    slots: GradSlots = {point.path: jnp.zeros(N_STATS) for point in points if point.group is None}
    n_layers: dict[str, dict[str, int]] = {}
    for point in points:
        if point.group is not None:
            group = n_layers.setdefault(point.group, {})
            group[point.path] = max(group.get(point.path, 0), point.row + 1)
    slots["blocks"] = {
        key: {path: jnp.zeros((n, N_STATS)) for path, n in group.items()} for key, group in n_layers.items()
    }
    return slots


def apply_block(block: nn.Module, params: Any, slots: GradSlots | None, *arguments: Any) -> tuple[Any, Intermediates]:
    """Apply a block and return its output and statistics by hook point; without slots, an empty dict at no cost."""
    if slots is None:
        return block.apply({"params": params}, *arguments), {}
    return _apply_with_hooks(block, params, arguments, lambda name, x: record_stats(x, slots[name]))


def block_hook_points(block: nn.Module, *arguments: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shape and dtype of the tensor at each hook point of a block, in the order of computation."""
    shapes: dict[str, jax.ShapeDtypeStruct] = {}

    def record(name: str, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        shapes[name] = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return x, jnp.zeros(N_STATS)

    def forward(*arguments: Any) -> Any:
        params = block.init(jax.random.key(0), *arguments)["params"]
        return _apply_with_hooks(block, params, arguments, record)

    _, stats = jax.eval_shape(forward, *arguments)
    return {name: shapes[name] for name in shapes if name in stats}


def _apply_with_hooks(
    block: nn.Module,
    params: Any,
    arguments: tuple[Any, ...],
    hook: Callable[[str, jax.Array], tuple[jax.Array, jax.Array]],
) -> tuple[Any, Intermediates]:
    """Apply a block and call `hook` on each hook point; return the block's output and the values of the hook."""
    n_calls, hooked = Counter[str](), list[jax.Array]()

    def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        output, module = call(*args, **kwargs), context.module
        leaves, tree = jax.tree.flatten(output)
        # Inside lifted transformations (nn.scan, nn.vmap), where a tensor has many values, the collection is immutable.
        is_hook_point = context.method_name == "__call__" and module.is_mutable_collection(_COLLECTION)
        if not (is_hook_point and leaves and _is_float(leaves[0])) or any(leaves[0] is each for each in hooked):
            return output
        path = "/".join(module.path)
        n_calls[path] += 1
        name = path if n_calls[path] == 1 else f"{path}:{n_calls[path]}"
        leaves[0], value = hook(name, leaves[0])
        hooked.append(leaves[0])
        module.put_variable(_COLLECTION, f":{n_calls[path]}", {name: value})
        return jax.tree.unflatten(tree, leaves)

    with nn.intercept_methods(intercept):
        output, collected = block.apply({"params": params}, *arguments, mutable=[_COLLECTION])
    return output, {path[-1].key: leaf for path, leaf in jax.tree_util.tree_flatten_with_path(collected)[0]}


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.floating)
