"""One block: a token mixer and a feed-forward, each around the residual stream."""

from typing import Any

import flax.linen as nn
import jax

from rustgpt_jax.config.schema import ModelConfig
from rustgpt_jax.errors import UserError
from rustgpt_jax.model.block_inputs import BlockInputs, LayerMetrics, dropout
from rustgpt_jax.model.intermediates import Probe
from rustgpt_jax.model.mixers import MIXERS
from rustgpt_jax.model.mlps import FEEDFORWARDS
from rustgpt_jax.model.norms import NORMS
from rustgpt_jax.registry import choose

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
        mixer = choose(MIXERS, mixer_name, "config.model.mixers")(of_mixer, name="mixer")
        feedforward = choose(FEEDFORWARDS, feedforward_name, "config.model.feedforwards")(
            of_feedforward, name="feedforward"
        )

        mixed_BTD, cache = mixer(self._norm("mixer_norm", x_BTD, BEFORE).astype(of_mixer.dtype), context, cache)
        x_BTD = self._add(x_BTD, mixed_BTD, "mixer", context, site=1)
        fed = feedforward(self._norm("feedforward_norm", x_BTD, BEFORE).astype(of_feedforward.dtype), context)
        if not isinstance(fed, tuple):
            raise UserError(
                f"config.model.feedforwards={feedforward_name!r} gives no signals: let it return (y_BTD, {{}})."
            )
        fed_BTD, signals = fed
        return self._add(x_BTD, fed_BTD, "feedforward", context, site=2), cache, signals

    def _add(self, x_BTD: jax.Array, y_BTD: jax.Array, name: str, context: BlockInputs, site: int) -> jax.Array:
        """The residual stream, in its own precision, with the output of a sublayer in it."""
        y_BTD = self._norm(f"{name}_output_norm", y_BTD.astype(x_BTD.dtype), ON_OUTPUT)
        x_BTD = Probe(name=f"{name}_sum")(x_BTD + dropout(y_BTD, self.config.dropout, context, site))
        return self._norm(f"{name}_norm", x_BTD, AFTER_SUM)

    def _norm(self, name: str, x_BTD: jax.Array, placements: tuple[str, ...]) -> jax.Array:
        if self.config.norm_placement not in placements:
            return x_BTD
        return choose(NORMS, self.config.norm, "config.model.norm")(self.config, name=name)(x_BTD)
