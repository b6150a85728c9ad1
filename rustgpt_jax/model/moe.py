"""Mixture of experts: a router sends each token to a few of many feed-forward layers."""

import math
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from rustgpt_jax.config.schema import ModelConfig, is_enabled
from rustgpt_jax.model.activation_sharding import partition_spec, shard_activations
from rustgpt_jax.model.interfaces import AUX_LOSS, BlockInputs, LayerMetrics
from rustgpt_jax.model.kernels import current_device, fold_vmap
from rustgpt_jax.model.layers import default_glu_width, normal_init
from rustgpt_jax.model.matmul import ACTIVATIONS, apply_activation, to_float32

# The name of the products of rows with the matrices of their experts, for rematerialization policies.
EXPERT_PRODUCTS = "expert_products"


class Routing(NamedTuple):
    """The experts of each token.

    Attributes:
        weight_BTX: Weight of each expert in the output; 0 for experts that the token is not routed to.
        is_routed_BTX: Whether a token is routed to an expert.
        expert_BTE: The experts of each token, the most probable first.
        probability_BTX: Softmax of the router's logits.
        router_logits_BTX: Logits of the router.
    """

    weight_BTX: jax.Array
    is_routed_BTX: jax.Array
    expert_BTE: jax.Array
    probability_BTX: jax.Array
    router_logits_BTX: jax.Array


class MixtureOfExperts(nn.Module):
    """Weighted sum of the gated feed-forward layers that a router selects for each token (arXiv 2401.04088).

    With `capacity_factor` 0, no token is dropped: the tokens are sorted by expert, and each expert processes all of its
    own (arXiv 2211.15841). Tokens are independent of each other. On a mesh, each device sorts its own tokens and
    gathers all experts of a layer. With a capacity, each expert processes the first tokens of a row that are routed to
    it, up to its capacity (arXiv 2006.16668): experts are not gathered, but whether a token is dropped depends on the
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
            y_BTD = self._apply_dropless(x_BTD, routing, gate_XDF, up_XDF, down_XFD)
            is_processed_BTX = routing.is_routed_BTX
        return y_BTD, layer_metrics(routing, is_processed_BTX, inputs, config)

    def _apply_dropless(
        self, x_BTD: jax.Array, routing: Routing, gate_XDF: jax.Array, up_XDF: jax.Array, down_XFD: jax.Array
    ) -> jax.Array:
        """Return the output. On a mesh, each device computes it for its own tokens and hidden channels."""
        arrays = x_BTD, routing.weight_BTX, routing.expert_BTE, gate_XDF, up_XDF, down_XFD
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.manual_axes:
            return self._process_tokens(*arrays)
        tokens = PartitionSpec(*partition_spec("BT", x_BTD.shape[:2], dict(mesh.shape)))
        hidden = partition_spec("F", gate_XDF.shape[2:], dict(mesh.shape))[0]

        def process_local_tokens(*arrays: jax.Array) -> jax.Array:
            y_BTD = self._process_tokens(*arrays)
            return y_BTD if hidden is None else jax.lax.psum(y_BTD, hidden)

        weights = PartitionSpec(None, None, hidden), PartitionSpec(None, None, hidden), PartitionSpec(None, hidden)
        return jax.shard_map(
            process_local_tokens, in_specs=(tokens, tokens, tokens, *weights), out_specs=tokens, check_vma=False
        )(*arrays)

    def _process_tokens(
        self,
        x_BTD: jax.Array,
        weight_BTX: jax.Array,
        expert_BTE: jax.Array,
        gate_XDF: jax.Array,
        up_XDF: jax.Array,
        down_XFD: jax.Array,
    ) -> jax.Array:
        """Return the output. N counts tokens, E the experts of a token, R the rows of tokens sorted by expert."""
        moe = self.config.moe
        expert_NE = expert_BTE.reshape(-1, moe.experts_per_token)
        block_size = choose_block_size(moe.kernel, expert_NE.size, moe.n_experts)
        token_R, row_NE, sizes_X = sort_by_expert(expert_NE, moe.n_experts, block_size or 1)
        weight_NE = jnp.take_along_axis(weight_BTX.reshape(-1, moe.n_experts), expert_NE, axis=1)
        weight_R = jnp.zeros(len(token_R), weight_NE.dtype).at[row_NE].set(weight_NE, unique_indices=True)

        def matmul(x_RD: jax.Array, w_XDF: jax.Array) -> jax.Array:
            return checkpoint_name(grouped_matmul(x_RD, w_XDF, sizes_X, block_size), EXPERT_PRODUCTS)

        x_RD = gather_rows(x_BTD.reshape(-1, x_BTD.shape[-1]), token_R, row_NE)
        hidden_RF = apply_activation(ACTIVATIONS[moe.expert_activation], matmul(x_RD, gate_XDF), self.config)
        hidden_RF = hidden_RF * matmul(x_RD, up_XDF) * weight_R[:, None].astype(hidden_RF.dtype)
        return sum_rows(matmul(hidden_RF, down_XFD), token_R, row_NE).reshape(x_BTD.shape)

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


def sort_by_expert(expert_NE: jax.Array, n_experts: int, block_size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sort tokens by expert, in their order. The rows of each expert fill whole blocks.

    Returns:
        token_R: The token in each row; N in rows of padding, which follow the tokens of each expert.
        row_NE: The row of each token and expert.
        sizes_X: Number of rows of each expert, R in total.
    """
    n_tokens, n_rows = len(expert_NE), count_blocks(expert_NE.size, n_experts, block_size) * block_size
    is_routed_NX = jnp.any(jax.nn.one_hot(expert_NE, n_experts, dtype=bool), axis=1)
    order_NX = jnp.cumsum(is_routed_NX, axis=0, dtype=jnp.int32)
    sizes_X = -(-order_NX[-1] // block_size) * block_size
    ends_X = jnp.cumsum(sizes_X)
    row_NE = jnp.take_along_axis(order_NX + (ends_X - sizes_X - 1)[None, :], expert_NE, axis=1)
    token_R = jnp.full(n_rows, n_tokens).at[row_NE].set(jnp.arange(n_tokens)[:, None], unique_indices=True)
    return token_R, row_NE, sizes_X.at[-1].add(n_rows - ends_X[-1])


# Gathering the rows of tokens, and summing the rows of each token, are transposes of each other. JAX would transpose a
# gather to a scatter, which is slower, and adds in no fixed order on GPUs.


@jax.custom_vjp
def gather_rows(x_ND: jax.Array, token_R: jax.Array, row_NE: jax.Array) -> jax.Array:
    """Return x_RD, the token of each row; 0 in rows of padding."""
    del row_NE
    return x_ND.at[token_R].get(mode="fill", fill_value=0)


@jax.custom_vjp
def sum_rows(y_RD: jax.Array, token_R: jax.Array, row_NE: jax.Array) -> jax.Array:
    """Return y_ND, the sum of the rows of each token."""
    del token_R
    return jnp.sum(y_RD[row_NE], axis=1)


gather_rows.defvjp(
    lambda x_ND, *index: (gather_rows(x_ND, *index), index),
    lambda index, grad_RD: (sum_rows(grad_RD, *index), None, None),
)
sum_rows.defvjp(
    lambda y_RD, *index: (sum_rows(y_RD, *index), index),
    lambda index, grad_ND: (gather_rows(grad_ND, *index), None, None),
)


# Grouped matrix products: rows sorted by group, each multiplied by the matrix of its group.
#
# XLA computes jax.lax.ragged_dot by multiplying every row by every matrix, with zeros for rows of other groups, except
# on TPUs and, with XLA flags, on some GPUs. The alternative here scans over blocks of rows that share a group.

# Copying a group's matrix to a buffer takes as long as multiplying this many rows. On accelerators the ratio of FLOPs
# to memory bandwidth is higher than on CPUs.
ROWS_PER_COPY = {"cpu": 16}
ROWS_PER_COPY_ON_ACCELERATORS = 384
BLOCK_SIZES = tuple(2**power for power in range(13))


def choose_block_size(kernel: str, n_rows: int, n_groups: int) -> int | None:
    """Return the rows of a block with which the default device is fastest; None for jax.lax.ragged_dot."""
    platform = str(current_device().platform)
    if kernel == "ragged_dot" or (kernel == "auto" and platform == "tpu"):
        return None
    rows_per_copy = ROWS_PER_COPY.get(platform, ROWS_PER_COPY_ON_ACCELERATORS)
    return min(BLOCK_SIZES, key=lambda size: count_blocks(n_rows, n_groups, size) * (size + rows_per_copy))


def count_blocks(n_rows: int, n_groups: int, block_size: int) -> int:
    """Return an upper bound on the number of blocks, for any group sizes."""
    n_used = min(n_groups, n_rows)
    return n_used + (n_rows - n_used) // block_size


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul(x_RD: jax.Array, w_XDF: jax.Array, sizes_X: jax.Array, block_size: int | None) -> jax.Array:
    """Return y_RF, the product of each row with the matrix of its group.

    Under `vmap`, all groups are computed in one product.

    Args:
        x_RD: Rows, sorted by group.
        w_XDF: The matrix of each group.
        sizes_X: Rows of each group, R in total; multiples of `block_size`.
        block_size: Rows of a block; None for jax.lax.ragged_dot.
    """
    product = jax.lax.ragged_dot if block_size is None else partial(_multiply_blocks, block_size)
    return fold_vmap(product)(x_RD, w_XDF, sizes_X)


def _grouped_matmul_bwd(
    block_size: int | None, saved: tuple[jax.Array, ...], grad_RF: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    gradients = _ragged_dot_gradients if block_size is None else partial(_block_gradients, block_size)
    return *fold_vmap(gradients)(*saved, grad_RF), None


grouped_matmul.defvjp(lambda *arguments: (grouped_matmul(*arguments), arguments[:3]), _grouped_matmul_bwd)


def _ragged_dot_gradients(
    x_RD: jax.Array, w_XDF: jax.Array, sizes_X: jax.Array, grad_RF: jax.Array
) -> tuple[jax.Array, jax.Array]:
    # Transposes, because a VJP would add an unused product to the program.
    (grad_RD,) = jax.linear_transpose(lambda x_RD: jax.lax.ragged_dot(x_RD, w_XDF, sizes_X), x_RD)(grad_RF)
    (grad_XDF,) = jax.linear_transpose(lambda w_XDF: jax.lax.ragged_dot(x_RD, w_XDF, sizes_X), w_XDF)(grad_RF)
    return grad_RD, grad_XDF


def _multiply_blocks(block_size: int, x_RD: jax.Array, w_XDF: jax.Array, sizes_X: jax.Array) -> jax.Array:
    blocks = x_RD.reshape(-1, block_size, x_RD.shape[-1]), _group_of_block(block_size, len(x_RD), sizes_X)
    y_blocks = jax.lax.map(
        lambda block: block[0] @ jax.lax.dynamic_index_in_dim(w_XDF, block[1], keepdims=False), blocks
    )
    return y_blocks.reshape(len(x_RD), -1)


def _block_gradients(
    block_size: int, x_RD: jax.Array, w_XDF: jax.Array, sizes_X: jax.Array, grad_RF: jax.Array
) -> tuple[jax.Array, jax.Array]:
    def step(grad_XDF: jax.Array, block: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        x, grad, group = block
        w_DF = jax.lax.dynamic_index_in_dim(w_XDF, group, keepdims=False)
        grad_DF = jnp.einsum("RD,RF->DF", x, grad, preferred_element_type=grad_XDF.dtype)
        return grad_XDF.at[group].add(grad_DF, mode="promise_in_bounds"), grad @ w_DF.T

    rows = (x.reshape(-1, block_size, x.shape[-1]) for x in (x_RD, grad_RF))
    zeros_XDF = jnp.zeros(w_XDF.shape, jnp.promote_types(w_XDF.dtype, jnp.float32))
    grad_XDF, grad_blocks = jax.lax.scan(step, zeros_XDF, (*rows, _group_of_block(block_size, len(x_RD), sizes_X)))
    return grad_blocks.reshape(x_RD.shape), grad_XDF.astype(w_XDF.dtype)


def _group_of_block(block_size: int, n_rows: int, sizes_X: jax.Array) -> jax.Array:
    first_rows = jnp.arange(0, n_rows, block_size)
    return jnp.searchsorted(jnp.cumsum(sizes_X), first_rows, side="right", method="compare_all")


# Experts with a capacity, and the router.


def _tokens_in_slots(slot_TX: jax.Array, n_slots: int) -> jax.Array:
    """Return the index of the token in each slot of each expert; T in empty slots."""
    length, n_experts = slot_TX.shape
    token_TX = jnp.broadcast_to(jnp.arange(length)[:, None], slot_TX.shape)
    # Tokens that are not processed go to a slot after the last one. No index is out of bounds, where compilers differ.
    empty_XP = jnp.full((n_experts, n_slots + 1), length)
    return empty_XP.at[jnp.arange(n_experts)[None, :], slot_TX].set(token_TX)[:, :n_slots]


def _combine(y_XPD: jax.Array, token_XP: jax.Array, weight_TX: jax.Array) -> jax.Array:
    """Return the weighted sum of the experts' outputs for each token."""
    experts_X1 = jnp.arange(len(token_XP))[:, None]
    weight_XP = weight_TX.at[token_XP, experts_X1].get(mode="fill", fill_value=0)
    weighted_XPD = y_XPD * weight_XP[..., None].astype(y_XPD.dtype)
    zeros_TD = jnp.zeros((len(weight_TX), y_XPD.shape[-1]), y_XPD.dtype)
    # Empty slots add 0 to the last token.
    return zeros_TD.at[token_XP].add(weighted_XPD, mode="clip")


def route(router_logits_BTX: jax.Array, config: ModelConfig) -> Routing:
    """Route each token to the experts with its highest logits, weighted by their softmax over all experts."""
    probability_BTX = jax.nn.softmax(router_logits_BTX, axis=-1)
    is_routed_BTX = jnp.zeros(probability_BTX.shape, bool)
    experts = []
    # `top_k` would make the compiler gather a batch that is sharded over devices.
    for _ in range(config.moe.experts_per_token):
        remaining_BTX = jnp.where(is_routed_BTX, -1, jax.lax.stop_gradient(probability_BTX))
        experts.append(jnp.argmax(remaining_BTX, axis=-1))
        is_routed_BTX = is_routed_BTX | jax.nn.one_hot(experts[-1], config.moe.n_experts, dtype=bool)
    weight_BTX = jnp.where(is_routed_BTX, probability_BTX, 0)
    if config.moe.norm_topk_prob:
        weight_BTX = weight_BTX / jnp.sum(weight_BTX, axis=-1, keepdims=True)
    return Routing(weight_BTX, is_routed_BTX, jnp.stack(experts, axis=-1), probability_BTX, router_logits_BTX)


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
