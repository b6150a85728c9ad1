"""Mixture of experts: a router sends each token to a few of many feed-forward layers."""

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from rustgpt_jax.config.schema import ModelConfig, is_enabled
from rustgpt_jax.model.activation_sharding import shard_activations
from rustgpt_jax.model.interfaces import AUX_LOSS, BlockInputs, LayerMetrics
from rustgpt_jax.model.layers import default_glu_width, normal_init
from rustgpt_jax.model.matmul import ACTIVATIONS, apply_activation, to_float32


class Routing(NamedTuple):
    """The experts of each token.

    Attributes:
        weight_BTX: Weight of each expert in the output; 0 for experts that the token is not routed to.
        is_routed_BTX: Whether a token is routed to an expert.
        probability_BTX: Softmax of the router's logits.
        router_logits_BTX: Logits of the router.
    """

    weight_BTX: jax.Array
    is_routed_BTX: jax.Array
    probability_BTX: jax.Array
    router_logits_BTX: jax.Array


class MixtureOfExperts(nn.Module):
    """Weighted sum of the gated feed-forward layers that a router selects for each token (arXiv 2401.04088).

    With `capacity_factor` 0, no token is dropped: every expert processes every token, and the outputs of experts that
    were not selected get weight 0. This costs n_experts / experts_per_token times the FLOPs of the selected ones, and
    makes tokens independent of each other. With a capacity, each expert processes the first tokens of a row that are
    routed to it, up to its capacity (arXiv 2006.16668): this is cheaper, but whether a token is dropped depends on the
    tokens before it, even those of other documents.
    """

    config: ModelConfig

    @staticmethod
    def width(config: ModelConfig) -> int:
        """Return the hidden width of an expert."""
        return config.moe.d_expert or config.d_ff or default_glu_width(config.d_model)

    @nn.compact
    def __call__(self, x_BTD: jax.Array, inputs: BlockInputs) -> tuple[jax.Array, LayerMetrics]:
        config = self.config
        n_experts, width = config.moe.n_experts, self.width(config)
        residual_std = config.init_std / (2 * config.n_layers) ** 0.5
        router_DX = self.param("router", normal_init(config.init_std), (config.d_model, n_experts))
        shape = (n_experts, config.d_model, width)
        gate_XDF = self.param("gate", normal_init(config.init_std), shape).astype(config.dtype)
        up_XDF = self.param("up", normal_init(config.init_std), shape).astype(config.dtype)
        down_XFD = self.param("down", normal_init(residual_std), (n_experts, width, config.d_model)).astype(
            config.dtype
        )

        routing = route(to_float32(x_BTD) @ to_float32(router_DX), config)
        if config.moe.capacity_factor:
            y_BTD, is_processed_BTX = self._apply_with_capacity(x_BTD, routing, inputs, gate_XDF, up_XDF, down_XFD)
        else:
            activation = ACTIVATIONS[config.moe.expert_activation]
            hidden_BTXF = apply_activation(activation, jnp.einsum("BTD,XDF->BTXF", x_BTD, gate_XDF), config)
            hidden_BTXF = hidden_BTXF * jnp.einsum("BTD,XDF->BTXF", x_BTD, up_XDF)
            weighted_BTXF = hidden_BTXF * routing.weight_BTX[..., None].astype(hidden_BTXF.dtype)
            y_BTD, is_processed_BTX = jnp.einsum("BTXF,XFD->BTD", weighted_BTXF, down_XFD), routing.is_routed_BTX
        return y_BTD, layer_metrics(routing, is_processed_BTX, inputs, config)

    def _apply_with_capacity(
        self,
        x_BTD: jax.Array,
        routing: Routing,
        inputs: BlockInputs,
        gate_XDF: jax.Array,
        up_XDF: jax.Array,
        down_XFD: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """Return the output, and which experts processed which tokens. P counts the slots of an expert in a row."""
        moe, length = self.config.moe, x_BTD.shape[1]
        is_token_BT = inputs.segments_BT > 0
        share = moe.capacity_factor * moe.experts_per_token / moe.n_experts
        n_slots = min(length, math.ceil(share * length))
        # Padding does not count towards the capacity.
        capacity_B = jnp.minimum(jnp.ceil(share * jnp.sum(is_token_BT, axis=1)), n_slots)
        is_routed_BTX = routing.is_routed_BTX & is_token_BT[..., None]
        slot_BTX = jnp.cumsum(is_routed_BTX, axis=1) - 1
        is_processed_BTX = is_routed_BTX & (slot_BTX < capacity_B[:, None, None])

        slot_BTX = jnp.where(is_processed_BTX, slot_BTX, n_slots)
        # Row by row, so that rows on different devices need no communication.
        token_BXP = jax.vmap(lambda slot_TX: _tokens_in_slots(slot_TX, n_slots))(slot_BTX)
        x_BXPD = jax.vmap(lambda x_TD, token_XP: x_TD.at[token_XP].get(mode="fill", fill_value=0))(x_BTD, token_BXP)
        # With experts on different devices, the tokens are sent to their experts, and the outputs back.
        x_BXPD = shard_activations(shard_activations(x_BXPD, "B..."), "BXPD")
        activation = ACTIVATIONS[moe.expert_activation]
        hidden_BXPF = apply_activation(activation, jnp.einsum("BXPD,XDF->BXPF", x_BXPD, gate_XDF), self.config)
        hidden_BXPF = hidden_BXPF * jnp.einsum("BXPD,XDF->BXPF", x_BXPD, up_XDF)
        y_BXPD = jnp.einsum("BXPF,XFD->BXPD", hidden_BXPF, down_XFD)
        y_BXPD = shard_activations(shard_activations(y_BXPD, "BXPD"), "B...")
        return jax.vmap(_combine)(y_BXPD, token_BXP, routing.weight_BTX), is_processed_BTX


def _tokens_in_slots(slot_TX: jax.Array, n_slots: int) -> jax.Array:
    """Return the index of the token in each slot of each expert; T in empty slots."""
    length, n_experts = slot_TX.shape
    token_TX = jnp.broadcast_to(jnp.arange(length)[:, None], slot_TX.shape)
    empty_XP = jnp.full((n_experts, n_slots), length)
    return empty_XP.at[jnp.arange(n_experts)[None, :], slot_TX].set(token_TX, mode="drop")


def _combine(y_XPD: jax.Array, token_XP: jax.Array, weight_TX: jax.Array) -> jax.Array:
    """Return the weighted sum of the experts' outputs for each token."""
    experts_X1 = jnp.arange(len(token_XP))[:, None]
    weight_XP = weight_TX.at[token_XP, experts_X1].get(mode="fill", fill_value=0)
    weighted_XPD = y_XPD * weight_XP[..., None].astype(y_XPD.dtype)
    zeros_TD = jnp.zeros((len(weight_TX), y_XPD.shape[-1]), y_XPD.dtype)
    return zeros_TD.at[token_XP].add(weighted_XPD, mode="drop")


def route(router_logits_BTX: jax.Array, config: ModelConfig) -> Routing:
    """Route each token to the experts with its highest logits, weighted by their softmax over all experts."""
    probability_BTX = jax.nn.softmax(router_logits_BTX, axis=-1)
    is_routed_BTX = jnp.zeros(probability_BTX.shape, bool)
    # `top_k` would make the compiler gather a batch that is sharded over devices.
    for _ in range(config.moe.experts_per_token):
        remaining_BTX = jnp.where(is_routed_BTX, -1, jax.lax.stop_gradient(probability_BTX))
        highest_BT = jnp.argmax(remaining_BTX, axis=-1)
        is_routed_BTX = is_routed_BTX | jax.nn.one_hot(highest_BT, config.moe.n_experts, dtype=bool)
    weight_BTX = jnp.where(is_routed_BTX, probability_BTX, 0)
    if config.moe.norm_topk_prob:
        weight_BTX = weight_BTX / jnp.sum(weight_BTX, axis=-1, keepdims=True)
    return Routing(weight_BTX, is_routed_BTX, probability_BTX, router_logits_BTX)


def layer_metrics(
    routing: Routing, is_processed_BTX: jax.Array, inputs: BlockInputs, config: ModelConfig
) -> LayerMetrics:
    """Return statistics of expert use over all tokens that are not padding, and the auxiliary losses.

    Returns:
        load_balance_loss: n_experts * sum over experts of (share of tokens routed to it * mean probability), as in
            arXiv 2101.03961 and transformers' load_balancing_loss_func; it equals experts_per_token for balanced
            routing.
        router_entropy: Mean entropy of the routing probabilities, in nats.
        busiest_expert: The largest share of assignments that one expert receives.
        dropped: The share of assignments that exceed the experts' capacity.
    """
    moe = config.moe
    is_token_BT1 = (inputs.segments_BT > 0)[..., None]
    n_tokens = jnp.maximum(jnp.sum(is_token_BT1), 1)

    def mean_X(values_BTX: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(is_token_BT1, to_float32(values_BTX), 0), axis=(0, 1)) / n_tokens

    routed_X = mean_X(routing.is_routed_BTX)
    load_balance_loss = moe.n_experts * jnp.sum(routed_X * mean_X(routing.probability_BTX))
    normalizer_BT1 = jax.nn.logsumexp(routing.router_logits_BTX, axis=-1, keepdims=True)
    entropy_BTX = -routing.probability_BTX * (routing.router_logits_BTX - normalizer_BT1)
    metrics = {
        "load_balance_loss": load_balance_loss,
        "router_entropy": jnp.sum(mean_X(entropy_BTX)),
        "busiest_expert": jnp.max(routed_X) / moe.experts_per_token,
        "dropped": 1 - jnp.sum(mean_X(is_processed_BTX)) / moe.experts_per_token,
    }
    losses: list[jax.Array] = []
    if is_enabled(moe.load_balance_loss_weight):
        losses.append(moe.load_balance_loss_weight * load_balance_loss)
    if is_enabled(moe.router_z_loss):
        losses.append(moe.router_z_loss * mean_X(jnp.square(normalizer_BT1))[0])
    return metrics | ({AUX_LOSS: jnp.sum(jnp.stack(losses))} if losses else {})
