"""Which layers have the same kind of block: they share one program, and their parameters are stacked."""

from typing import NamedTuple

from rustgpt_jax.config.schema import ModelConfig


class LayerGroup(NamedTuple):
    """Layers of one kind: the config that their blocks see, and their numbers, which count the blocks of the model."""

    block: ModelConfig
    layers: range


def layer_groups(model: ModelConfig) -> tuple[LayerGroup, ...]:
    """The stacks of a model, in the order of their first layers. Parameters and caches have their indices as keys.

    As many stacks as the patterns have blocks, with a layer for each whole repeat of the patterns; then, where the
    number of layers is no multiple of the period, a stack of one layer for each layer that is left.
    """
    whole = model.n_layers - model.n_layers % model.period
    repeated = (range(first, whole, model.period) for first in range(min(whole, model.period)))
    left = (range(layer, layer + 1) for layer in range(whole, model.n_layers))
    return tuple(LayerGroup(model.block(layers.start), layers) for layers in (*repeated, *left))
