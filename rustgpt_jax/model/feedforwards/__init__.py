"""Feed-forward layers: what a block does to each token by itself.

A feed-forward is a Flax leaf made from the config of its block. It has

    __call__(x_BTD, context)     y_BTD, and its signals: named numbers to be recorded in training, {} for none

The signal AUXILIARY_LOSS is added to the loss.
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax

from rustgpt_jax.model.feedforwards.dense import FeedForward, GatedFeedForward, relu_squared
from rustgpt_jax.model.feedforwards.experts import MixtureOfExperts

# gelu in its tanh form, as in GPT-2 (arXiv 1606.08415); relu_squared from Primer (arXiv 2109.08668); swiglu as in PaLM
# and Llama, geglu as in Gemma (arXiv 2002.05202); moe as in Mixtral (arXiv 2401.04088).
FEEDFORWARDS: dict[str, Callable[..., nn.Module]] = {
    "gelu": partial(FeedForward, activation=jax.nn.gelu),
    "relu": partial(FeedForward, activation=jax.nn.relu),
    "relu_squared": partial(FeedForward, activation=relu_squared),
    "swiglu": partial(GatedFeedForward, activation=jax.nn.silu),
    "geglu": partial(GatedFeedForward, activation=jax.nn.gelu),
    "moe": partial(MixtureOfExperts, activation=jax.nn.silu),
}
