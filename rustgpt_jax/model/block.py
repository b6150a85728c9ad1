"""One block: a token mixer and a feed-forward, each around the residual stream."""

from functools import cache, partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from rustgpt_jax.config.schema import ModelConfig
from rustgpt_jax.model.interfaces import BlockInputs, CachedMixer, LayerMetrics, n_inputs
from rustgpt_jax.model.intermediates import Probe
from rustgpt_jax.model.linear import Linear, dropout
from rustgpt_jax.model.mixers import MIXERS, apply_uncached_mixer
from rustgpt_jax.model.mlps import FEEDFORWARDS
from rustgpt_jax.model.norms import NORMS
from rustgpt_jax.registry import lookup

# Where norms stand around a sublayer f, by config.norm_placement.
BEFORE = ("pre", "sandwich")  # f(norm(x))
ON_OUTPUT = ("output", "sandwich")  # x + norm(f(x))
AFTER_SUM = ("post",)  # norm(x + f(x))


class Block(nn.Module):
    """x + mixer(norm(x)), then x + feedforward(norm(x)), with norms where config.norm_placement puts them."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, context: BlockInputs, cache: Any) -> tuple[jax.Array, Any, LayerMetrics]:
        config = self.config
        (mixer_name,), (feedforward_name,) = config.mixers, config.feedforwards
        of_mixer, of_feedforward = config.mixer_config, config.feedforward_config
        mixer = lookup(MIXERS, mixer_name, "config.model.mixers")(of_mixer, name="mixer")
        # The inputs of a mixer without a cache are cached instead.
        apply_mixer = mixer if isinstance(mixer, CachedMixer) else partial(apply_uncached_mixer, mixer)
        feedforward = lookup(FEEDFORWARDS, feedforward_name, "config.model.feedforwards")(
            of_feedforward, name="feedforward"
        )

        mixed_BTD, cache = apply_mixer(self._norm("mixer_norm", x_BTD, BEFORE).astype(of_mixer.dtype), context, cache)
        x_BTD = self._add(x_BTD, mixed_BTD, "mixer", context, site=1)
        fed_BTD = self._norm("feedforward_norm", x_BTD, BEFORE).astype(of_feedforward.dtype)
        output = feedforward(fed_BTD) if n_inputs(type(feedforward)) == 1 else feedforward(fed_BTD, context)
        y_BTD, metrics = output if isinstance(output, tuple) else (output, {})
        return self._add(x_BTD, y_BTD, "feedforward", context, site=2), cache, metrics

    def _add(self, x_BTD: jax.Array, y_BTD: jax.Array, name: str, context: BlockInputs, site: int) -> jax.Array:
        """The residual stream, in its own precision, with the output of a sublayer in it."""
        y_BTD = self._norm(f"{name}_output_norm", y_BTD.astype(x_BTD.dtype), ON_OUTPUT)
        x_BTD = Probe(name=f"{name}_sum")(x_BTD + dropout(y_BTD, self.config.dropout, context, site))
        return self._norm(f"{name}_norm", x_BTD, AFTER_SUM)

    def _norm(self, name: str, x_BTD: jax.Array, placements: tuple[str, ...]) -> jax.Array:
        if self.config.norm_placement not in placements:
            return x_BTD
        return lookup(NORMS, self.config.norm, "config.model.norm")(self.config, name=name)(x_BTD)


# Layers with the same kind of block share one program, and their parameters are stacked.


class LayerGroup(NamedTuple):
    """Layers with the same block.

    Attributes:
        block: Config of the block.
        layers: Indices of the layers in the model.
    """

    block: ModelConfig
    layers: range


def layer_groups(model: ModelConfig) -> tuple[LayerGroup, ...]:
    """Return the groups of a model, ordered by their first layer; parameters and caches have the indices as keys.

    There is one group for each block of the pattern, with a layer for each whole repeat. If the number of layers is no
    multiple of the pattern's length, each remaining layer is a group of its own.
    """
    whole = model.n_layers - model.n_layers % model.period
    repeated = (range(first, whole, model.period) for first in range(min(whole, model.period)))
    left = (range(layer, layer + 1) for layer in range(whole, model.n_layers))
    return tuple(LayerGroup(model.block(layers.start), layers) for layers in (*repeated, *left))


# The kernels of linear layers in a block, found by tracing.


@cache
def linear_layers(block: ModelConfig) -> dict[str, ModelConfig]:
    """Return the paths of the kernels of linear layers in a block, each with the config of its layer."""
    found: dict[str, ModelConfig] = {}

    def note(call: Any, given: Any, named: Any, context: nn.module.InterceptorContext) -> Any:
        module = context.module
        if isinstance(module, Linear) and context.method_name == "__call__":
            found["/".join((*module.path, "kernel"))] = module.config
        return call(*given, **named)

    def forward() -> Any:
        context = BlockInputs(jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), jnp.int32))
        x_BTD = jnp.zeros((1, 1, block.d_model), block.dtype)
        return Block(block).init(jax.random.key(0), x_BTD, context, None)

    with nn.intercept_methods(note):
        jax.eval_shape(forward)
    return found
