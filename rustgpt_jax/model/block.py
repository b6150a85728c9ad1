"""One block: a token mixer and a feed-forward, each around the residual stream."""

from typing import Any

import flax.linen as nn
import jax

from rustgpt_jax.config import ModelConfig
from rustgpt_jax.errors import choose
from rustgpt_jax.model.context import Context, dropout
from rustgpt_jax.model.feedforwards import FEEDFORWARDS
from rustgpt_jax.model.mixers import MIXERS
from rustgpt_jax.model.norms import NORMS


class Block(nn.Module):
    """x + mixer(norm(x)), then x + feedforward(norm(x)); with norm_placement 'post', norm(x + mixer(x)) and so on."""

    config: ModelConfig
    mixer: str

    @nn.compact
    def __call__(self, x_BTD: jax.Array, context: Context, cache: Any) -> tuple[jax.Array, Any]:
        config = self.config
        norm = choose(NORMS, config.norm, "config.model.norm")
        mixer_norm, feedforward_norm = norm(config, name="mixer_norm"), norm(config, name="feedforward_norm")
        mixer = choose(MIXERS, self.mixer, "config.model.mixers")(config, name="mixer")
        feedforward = choose(FEEDFORWARDS, config.feedforward, "config.model.feedforward")(config, name="feedforward")

        if config.norm_placement == "pre":
            mixed_BTD, cache = mixer(mixer_norm(x_BTD), context, cache)
            x_BTD = x_BTD + dropout(mixed_BTD, config.dropout, context, site=1)
            fed_BTD = feedforward(feedforward_norm(x_BTD))
            return x_BTD + dropout(fed_BTD, config.dropout, context, site=2), cache
        mixed_BTD, cache = mixer(x_BTD, context, cache)
        x_BTD = mixer_norm(x_BTD + dropout(mixed_BTD, config.dropout, context, site=1))
        fed_BTD = feedforward(x_BTD)
        return feedforward_norm(x_BTD + dropout(fed_BTD, config.dropout, context, site=2)), cache
