"""A mixture of experts: a router sends each token to a few of many feed-forward layers."""

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from rustgpt_jax.config.schema import ModelConfig, is_enabled
from rustgpt_jax.model.activation_sharding import shard_activations
from rustgpt_jax.model.interfaces import AUX_LOSS, BlockInputs, LayerMetrics
from rustgpt_jax.model.linear import default_glu_width, normal_init
from rustgpt_jax.model.matmul import ACTIVATIONS, apply_activation, to_float32


class Routes(NamedTuple):
    """Where the tokens go. weight_BTX: of each expert in a token's output, 0 for those that it does not go to."""

    weight_BTX: jax.Array
    chosen_BTX: jax.Array
    probability_BTX: jax.Array
    router_logits_BTX: jax.Array


class MixtureOfExperts(nn.Module):
    """The weighted sum of the gated feed-forward layers that a router chooses for a token (arXiv 2401.04088).

    With `capacity_factor` 0 no token is dropped: every expert is computed for every token, and what was not chosen has
    the weight 0. That costs n_experts / experts_per_token times what is used, and makes a token independent of all
    others. With a capacity, experts are computed for the tokens that they have places for, the earliest ones of a row
    (arXiv 2006.16668): cheaper, but whether a token is fed then depends on those before it, across documents too.
    """

    config: ModelConfig

    @staticmethod
    def width(config: ModelConfig) -> int:
        """The hidden width of an expert."""
        return config.moe.d_expert or config.d_ff or default_glu_width(config.d_model)

    @nn.compact
    def __call__(self, x_BTD: jax.Array, context: BlockInputs) -> tuple[jax.Array, LayerMetrics]:
        config = self.config
        width = self.width(config)
        residual_std = config.init_std / (2 * config.n_layers) ** 0.5
        router_DX = self.param("router", normal_init(config.init_std), (config.d_model, config.moe.n_experts))
        shape = (config.moe.n_experts, config.d_model, width)
        gate_XDF = self.param("gate", normal_init(config.init_std), shape).astype(config.dtype)
        up_XDF = self.param("up", normal_init(config.init_std), shape).astype(config.dtype)
        down_XFD = self.param("down", normal_init(residual_std), (shape[0], width, config.d_model)).astype(config.dtype)

        routes = route(to_float32(x_BTD) @ to_float32(router_DX), config)
        if config.moe.capacity_factor:
            y_BTD, is_fed_BTX = self._fed_by_capacity(x_BTD, routes, context, gate_XDF, up_XDF, down_XFD)
        else:
            activation = ACTIVATIONS[config.moe.expert_activation]
            hidden_BTXF = apply_activation(activation, jnp.einsum("BTD,XDF->BTXF", x_BTD, gate_XDF), config)
            hidden_BTXF = hidden_BTXF * jnp.einsum("BTD,XDF->BTXF", x_BTD, up_XDF)
            weighted_BTXF = hidden_BTXF * routes.weight_BTX[..., None].astype(hidden_BTXF.dtype)
            y_BTD, is_fed_BTX = jnp.einsum("BTXF,XFD->BTD", weighted_BTXF, down_XFD), routes.chosen_BTX
        return y_BTD, layer_metrics(routes, is_fed_BTX, context, config)

    def _fed_by_capacity(
        self,
        x_BTD: jax.Array,
        routes: Routes,
        context: BlockInputs,
        gate_XDF: jax.Array,
        up_XDF: jax.Array,
        down_XFD: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """The output, and which tokens found a place with which experts. P counts the places of an expert in a row."""
        config, length = self.config, x_BTD.shape[1]
        is_token_BT = context.segments_BT > 0
        share = config.moe.capacity_factor * config.moe.experts_per_token / config.moe.n_experts
        places = min(length, math.ceil(share * length))
        # Padding makes no places.
        places_B = jnp.minimum(jnp.ceil(share * jnp.sum(is_token_BT, axis=1)), places)
        asks_BTX = routes.chosen_BTX & is_token_BT[..., None]
        place_BTX = jnp.cumsum(asks_BTX, axis=1) - 1
        is_fed_BTX = asks_BTX & (place_BTX < places_B[:, None, None])

        kept_BTX = jnp.where(is_fed_BTX, place_BTX, places)
        # The rows one by one: where they lie on different devices, none needs to know of the others.
        token_BXP = jax.vmap(lambda kept_TX: _tokens_in_places(kept_TX, places))(kept_BTX)
        fed_BXPD = jax.vmap(lambda x_TD, token_XP: x_TD.at[token_XP].get(mode="fill", fill_value=0))(x_BTD, token_BXP)
        # Where experts lie on different devices, the tokens go to theirs, and what these make of them comes back.
        fed_BXPD = shard_activations(shard_activations(fed_BXPD, "B..."), "BXPD")
        activation = ACTIVATIONS[config.moe.expert_activation]
        hidden_BXPF = apply_activation(activation, jnp.einsum("BXPD,XDF->BXPF", fed_BXPD, gate_XDF), config)
        hidden_BXPF = hidden_BXPF * jnp.einsum("BXPD,XDF->BXPF", fed_BXPD, up_XDF)
        out_BXPD = jnp.einsum("BXPF,XFD->BXPD", hidden_BXPF, down_XFD)
        out_BXPD = shard_activations(shard_activations(out_BXPD, "BXPD"), "B...")
        return jax.vmap(_back_to_tokens)(out_BXPD, token_BXP, routes.weight_BTX), is_fed_BTX


def _tokens_in_places(kept_TX: jax.Array, places: int) -> jax.Array:
    """The token in each place of each expert; an empty place holds a number that no token has."""
    length, n_experts = kept_TX.shape
    tokens_TX = jnp.broadcast_to(jnp.arange(length)[:, None], kept_TX.shape)
    empty_XP = jnp.full((n_experts, places), length)
    return empty_XP.at[jnp.arange(n_experts)[None, :], kept_TX].set(tokens_TX, mode="drop")


def _back_to_tokens(out_XPD: jax.Array, token_XP: jax.Array, weight_TX: jax.Array) -> jax.Array:
    """The weighted sum for each token of what experts made of it."""
    experts_X1 = jnp.arange(len(token_XP))[:, None]
    weight_XP = weight_TX.at[token_XP, experts_X1].get(mode="fill", fill_value=0)
    weighted_XPD = out_XPD * weight_XP[..., None].astype(out_XPD.dtype)
    nothing_TD = jnp.zeros((len(weight_TX), out_XPD.shape[-1]), out_XPD.dtype)
    return nothing_TD.at[token_XP].add(weighted_XPD, mode="drop")


def route(router_logits_BTX: jax.Array, config: ModelConfig) -> Routes:
    """Each token goes to the experts of its highest logits, weighted by their softmax over all experts."""
    probability_BTX = jax.nn.softmax(router_logits_BTX, axis=-1)
    chosen_BTX = jnp.zeros(probability_BTX.shape, bool)
    # Not `top_k`, for which compilers bring a batch that is cut over devices together.
    for _ in range(config.moe.experts_per_token):
        left_BTX = jnp.where(chosen_BTX, -1, jax.lax.stop_gradient(probability_BTX))
        highest_BT = jnp.argmax(left_BTX, axis=-1)
        chosen_BTX = chosen_BTX | jax.nn.one_hot(highest_BT, config.moe.n_experts, dtype=bool)
    weight_BTX = jnp.where(chosen_BTX, probability_BTX, 0)
    if config.moe.norm_topk_prob:
        weight_BTX = weight_BTX / jnp.sum(weight_BTX, axis=-1, keepdims=True)
    return Routes(weight_BTX, chosen_BTX, probability_BTX, router_logits_BTX)


def layer_metrics(routes: Routes, is_fed_BTX: jax.Array, context: BlockInputs, config: ModelConfig) -> LayerMetrics:
    """Return statistics of expert use over all tokens that are not padding, and the auxiliary losses.

    Returns:
        load_balance_loss: n_experts * sum over experts of (share of tokens routed to it * mean probability), as
        in arXiv
            2101.03961 and transformers' load_balancing_loss_func; it equals experts_per_token for balanced routing.
        router_entropy: Mean entropy of the routing probabilities, in nats.
        busiest_expert: The largest share of assignments of one expert.
        dropped: The share of assignments that exceed the experts' capacity.
    """
    is_token_BT1 = (context.segments_BT > 0)[..., None]
    n_tokens = jnp.maximum(jnp.sum(is_token_BT1), 1)

    def mean_X(values_BTX: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(is_token_BT1, to_float32(values_BTX), 0), axis=(0, 1)) / n_tokens

    chosen_X = mean_X(routes.chosen_BTX)
    load_balance_loss = config.moe.n_experts * jnp.sum(chosen_X * mean_X(routes.probability_BTX))
    normalizer_BT1 = jax.nn.logsumexp(routes.router_logits_BTX, axis=-1, keepdims=True)
    entropy_BTX = -routes.probability_BTX * (routes.router_logits_BTX - normalizer_BT1)
    found = {
        "load_balance_loss": load_balance_loss,
        "router_entropy": jnp.sum(mean_X(entropy_BTX)),
        "busiest_expert": jnp.max(chosen_X) / config.moe.experts_per_token,
        "dropped": 1 - jnp.sum(mean_X(is_fed_BTX)) / config.moe.experts_per_token,
    }
    losses: list[jax.Array] = []
    if is_enabled(config.moe.load_balance_loss_weight):
        losses.append(config.moe.load_balance_loss_weight * load_balance_loss)
    if is_enabled(config.moe.router_z_loss):
        losses.append(config.moe.router_z_loss * mean_X(jnp.square(normalizer_BT1))[0])
    return found | ({AUX_LOSS: jnp.sum(jnp.stack(losses))} if losses else {})
