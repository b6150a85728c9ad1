"""A block: a token mixer and a feed-forward, each with a residual connection."""

from functools import cache, partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from rustgpt_jax.config.schema import ModelConfig
from rustgpt_jax.model.interfaces import BlockInputs, CachedMixer, LayerMetrics, n_inputs
from rustgpt_jax.model.intermediates import HookPoint
from rustgpt_jax.model.layers import NORMS, Linear, dropout
from rustgpt_jax.model.mixers import MIXERS, apply_uncached_mixer
from rustgpt_jax.model.mlps import FEEDFORWARDS
from rustgpt_jax.registry import lookup

# Values of config.norm_placement, by where the norm is applied around a sublayer f.
BEFORE = ("pre", "sandwich")  # f(norm(x))
ON_OUTPUT = ("output", "sandwich")  # x + norm(f(x))
AFTER_SUM = ("post",)  # norm(x + f(x))


class Block(nn.Module):
    """x + mixer(norm(x)), then x + feedforward(norm(x)), with norms placed by config.norm_placement."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, inputs: BlockInputs, cache: Any) -> tuple[jax.Array, Any, LayerMetrics]:
        config = self.config
        (mixer_name,), (feedforward_name,) = config.mixers, config.feedforwards
        mixer_config, mlp_config = config.mixer_config, config.feedforward_config
        mixer = lookup(MIXERS, mixer_name, "config.model.mixers")(mixer_config, name="mixer")
        # The inputs of a mixer without a cache are cached instead.
        apply_mixer = mixer if isinstance(mixer, CachedMixer) else partial(apply_uncached_mixer, mixer)
        feedforward = lookup(FEEDFORWARDS, feedforward_name, "config.model.feedforwards")(
            mlp_config, name="feedforward"
        )

        mixer_input_BTD = self._norm("mixer_norm", x_BTD, BEFORE).astype(mixer_config.dtype)
        y_BTD, cache = apply_mixer(mixer_input_BTD, inputs, cache)
        x_BTD = self._add(x_BTD, y_BTD, "mixer", inputs, site=1)
        mlp_input_BTD = self._norm("feedforward_norm", x_BTD, BEFORE).astype(mlp_config.dtype)
        has_metrics = n_inputs(type(feedforward)) == 2
        output = feedforward(mlp_input_BTD, inputs) if has_metrics else feedforward(mlp_input_BTD)
        y_BTD, metrics = output if isinstance(output, tuple) else (output, {})
        return self._add(x_BTD, y_BTD, "feedforward", inputs, site=2), cache, metrics

    def _add(self, x_BTD: jax.Array, y_BTD: jax.Array, name: str, inputs: BlockInputs, site: int) -> jax.Array:
        """Add the output of a sublayer to the residual stream, in the dtype of the stream."""
        y_BTD = self._norm(f"{name}_output_norm", y_BTD.astype(x_BTD.dtype), ON_OUTPUT)
        x_BTD = HookPoint(name=f"{name}_sum")(x_BTD + dropout(y_BTD, self.config.dropout, inputs, site))
        return self._norm(f"{name}_norm", x_BTD, AFTER_SUM)

    def _norm(self, name: str, x_BTD: jax.Array, placements: tuple[str, ...]) -> jax.Array:
        if self.config.norm_placement not in placements:
            return x_BTD
        return lookup(NORMS, self.config.norm, "config.model.norm")(self.config, name=name)(x_BTD)


class LayerGroup(NamedTuple):
    """Layers with the same block, whose parameters are stacked.

    Attributes:
        block: Config of the block.
        layers: Indices of the layers in the model.
    """

    block: ModelConfig
    layers: range


def layer_groups(model: ModelConfig) -> tuple[LayerGroup, ...]:
    """Return the groups of a model, ordered by their first layer; their indices are keys in parameters and caches.

    Each block of the pattern is a group with one layer per complete repeat. If the number of layers is not a multiple
    of the pattern's length, each remaining layer is a separate group.
    """
    whole = model.n_layers - model.n_layers % model.period
    repeated = (range(first, whole, model.period) for first in range(min(whole, model.period)))
    left = (range(layer, layer + 1) for layer in range(whole, model.n_layers))
    return tuple(LayerGroup(model.block(layers.start), layers) for layers in (*repeated, *left))


@cache
def linear_layers(block: ModelConfig) -> dict[str, ModelConfig]:
    """Return the paths of the kernels of linear layers in a block, found by tracing, each with its layer's config."""
    found: dict[str, ModelConfig] = {}

    def record(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        module = context.module
        if isinstance(module, Linear) and context.method_name == "__call__":
            found["/".join((*module.path, "kernel"))] = module.config
        return call(*args, **kwargs)

    def forward() -> Any:
        inputs = BlockInputs(jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), jnp.int32))
        x_BTD = jnp.zeros((1, 1, block.d_model), block.dtype)
        return Block(block).init(jax.random.key(0), x_BTD, inputs, None)

    with nn.intercept_methods(record):
        jax.eval_shape(forward)
    return found
