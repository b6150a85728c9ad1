"""The hook points of a whole model: the tensors whose statistics `apply_with_intermediates` returns."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rustgpt_jax.config.schema import ModelConfig, is_enabled
from rustgpt_jax.model import intermediates
from rustgpt_jax.model.block import Block, layer_groups
from rustgpt_jax.model.interfaces import BlockInputs
from rustgpt_jax.model.transformer import vocab_size


class HookPoint(NamedTuple):
    """A tensor of the forward pass.

    Attributes:
        site: Name within its block, such as 'mixer/query', or 'embeddings', 'hidden' (after the last norm) or 'logits'.
        shape: Shape of the tensor.
        layer: Index of the layer; None for tensors outside the blocks.
        group: Key of the layer's group in parameters and intermediates; None outside the blocks.
        row: Index of the layer within its group.
    """

    site: str
    shape: tuple[int, ...]
    layer: int | None = None
    group: str | None = None
    row: int = 0

    @property
    def name(self) -> str:
        """Unique name, such as 'layers/3/mixer/query' or 'logits'."""
        return self.site if self.layer is None else f"layers/{self.layer}/{self.site}"

    @property
    def size(self) -> int:
        """Number of elements of the tensor."""
        return math.prod(self.shape)

    def select(self, values: intermediates.Intermediates) -> Any:
        """Return the value of this hook point."""
        return values[self.site] if self.group is None else values["blocks"][self.group][self.site][self.row]


def hook_points(model: ModelConfig, rows: int, length: int) -> tuple[HookPoint, ...]:
    """Return the hook points of a model for `rows` sequences of `length` tokens, in the order of computation."""
    x_BTD: Any = jax.ShapeDtypeStruct((rows, length, model.d_model), jnp.dtype(model.dtype))
    tokens_BT: Any = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0)) if is_enabled(model.dropout) else None
    by_layer: dict[int, list[HookPoint]] = {}
    for index, group in enumerate(layer_groups(model)):
        inputs = BlockInputs(tokens_BT, tokens_BT, key)
        tensors = intermediates.block_hook_points(Block(group.block), x_BTD, inputs, None)
        for row, layer in enumerate(group.layers):
            by_layer[layer] = [HookPoint(site, x.shape, layer, str(index), row) for site, x in tensors.items()]
    return (
        HookPoint("embeddings", x_BTD.shape),
        *(point for layer in sorted(by_layer) for point in by_layer[layer]),
        HookPoint("hidden", x_BTD.shape),
        HookPoint("logits", (rows, length, vocab_size(model))),
    )


def grad_slots(points: tuple[HookPoint, ...]) -> intermediates.GradSlots:
    """Return slots of zeros for all hook points, an argument of `transformer.apply_with_intermediates`."""
    slots: intermediates.GradSlots = {
        point.site: jnp.zeros(intermediates.N_STATS) for point in points if point.group is None
    }
    n_layers: dict[str, dict[str, int]] = {}
    for point in points:
        if point.group is not None:
            group = n_layers.setdefault(point.group, {})
            group[point.site] = max(group.get(point.site, 0), point.row + 1)
    slots["blocks"] = {
        key: {site: jnp.zeros((n, intermediates.N_STATS)) for site, n in group.items()}
        for key, group in n_layers.items()
    }
    return slots
