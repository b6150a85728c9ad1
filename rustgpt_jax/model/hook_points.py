"""The sites of a whole model: where its taps are, in the order in which a forward makes the tensors there."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rustgpt_jax.config.schema import ModelConfig, is_enabled
from rustgpt_jax.model import intermediates
from rustgpt_jax.model.block import Block, layer_groups
from rustgpt_jax.model.block_inputs import BlockInputs
from rustgpt_jax.model.transformer import vocab_size


class HookPoint(NamedTuple):
    """A place in the forward.

    site: within its block, or of the whole model: 'embeddings', 'hidden' (after the last norm), 'logits'. layer: None
    for the latter. stack, row: where its measurement is among those of the blocks. shape: of the tensor there.
    """

    site: str
    shape: tuple[int, ...]
    layer: int | None = None
    stack: str | None = None
    row: int = 0

    @property
    def name(self) -> str:
        """'layers/3/mixer/query', 'logits'."""
        return self.site if self.layer is None else f"layers/{self.layer}/{self.site}"

    @property
    def size(self) -> int:
        """The elements of the tensor."""
        return math.prod(self.shape)

    def of(self, measurements: intermediates.Intermediates) -> Any:
        """The measurement of this site."""
        return (
            measurements[self.site] if self.stack is None else measurements["blocks"][self.stack][self.site][self.row]
        )


def hook_points(model: ModelConfig, rows: int, length: int) -> tuple[HookPoint, ...]:
    """All sites of a model that reads `rows` windows of `length` tokens."""
    x_BTD: Any = jax.ShapeDtypeStruct((rows, length, model.d_model), jnp.dtype(model.dtype))
    tokens_BT: Any = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0)) if is_enabled(model.dropout) else None
    context = BlockInputs(tokens_BT, tokens_BT, key)
    blocks: dict[int, list[HookPoint]] = {}
    for index, stack in enumerate(layer_groups(model)):
        found = intermediates.block_hook_points(Block(stack.block), x_BTD, context, None)
        for row, layer in enumerate(stack.layers):
            blocks[layer] = [HookPoint(site, leaf.shape, layer, str(index), row) for site, leaf in found.items()]
    return (
        HookPoint("embeddings", x_BTD.shape),
        *(site for layer in sorted(blocks) for site in blocks[layer]),
        HookPoint("hidden", x_BTD.shape),
        HookPoint("logits", (rows, length, vocab_size(model))),
    )


def grad_slots(hook_points: tuple[HookPoint, ...]) -> intermediates.GradSlots:
    """Zeros for every site, by stack where it is in a block, as `transformer.apply_with_intermediates` takes them."""
    result: intermediates.GradSlots = {
        site.site: jnp.zeros(intermediates.N_STATS) for site in hook_points if site.stack is None
    }
    layers: dict[str, dict[str, int]] = {}
    for site in hook_points:
        if site.stack is not None:
            of_stack = layers.setdefault(site.stack, {})
            of_stack[site.site] = max(of_stack.get(site.site, 0), site.row + 1)
    result["blocks"] = {
        stack: {site: jnp.zeros((n, intermediates.N_STATS)) for site, n in of_stack.items()}
        for stack, of_stack in layers.items()
    }
    return result
