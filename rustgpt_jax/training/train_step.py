"""The train step of a run and of a population: pure functions of the state, batch and hyperparameters."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rustgpt_jax.config.schema import Hyperparams, ModelConfig, StaticConfig, combine, is_enabled
from rustgpt_jax.data.pipeline import Batch
from rustgpt_jax.evaluation.loss import LossSums, cross_entropy_sums, loss_sums, split_microbatches, total_loss
from rustgpt_jax.model import transformer
from rustgpt_jax.model.interfaces import BlockInputs, LayerMetrics
from rustgpt_jax.model.intermediates import Intermediates, grad_slots
from rustgpt_jax.sharding.sharding_plan import constrain
from rustgpt_jax.training.optimizers import clip_by_norm, make_optimizer, schedule_multiplier

# A loss is a spike if it is this many standard deviations above the mean of the previous ones.
SPIKE_DEVIATIONS = 6.0
# The number of steps that the averages cover. No spikes are counted in this many first steps of a stage.
AVERAGING_STEPS = 50


class LossStats(NamedTuple):
    """Statistics of the loss. They are part of the state, so that they do not depend on interruptions.

    Attributes:
        mean: Mean loss of the stage, over about AVERAGING_STEPS steps.
        variance: Variance of the loss of the stage.
        seen: Number of finite losses in the stage.
        spikes: Number of steps of the run whose loss was a spike.
        faults: Number of steps of the run whose loss, gradient or update was not finite.
        skipped: Number of batches of the stage skipped by rewinds. A step uses batch number step + skipped.
    """

    mean: jax.Array
    variance: jax.Array
    seen: jax.Array
    spikes: jax.Array
    faults: jax.Array
    skipped: jax.Array


def init_loss_stats() -> LossStats:
    """Return the statistics at step 0."""
    return LossStats(*(jnp.zeros((), dtype) for dtype in 2 * (jnp.float32,) + 4 * (jnp.int32,)))


def update_loss_stats(
    loss_stats: LossStats, loss: jax.Array, is_finite: jax.Array, is_first: jax.Array, is_last: jax.Array
) -> LossStats:
    """Update the running loss statistics with the loss of one step, also at the boundaries of stages."""
    seen = jnp.where(is_first, 0, loss_stats.seen)
    above = loss - loss_stats.mean
    is_spike = is_finite & (seen >= AVERAGING_STEPS) & (above > SPIKE_DEVIATIONS * jnp.sqrt(loss_stats.variance))
    # A plain mean at first, then an exponential moving average. The variance of a single loss is 0.
    share = 1.0 / (jnp.minimum(seen, AVERAGING_STEPS - 1) + 1).astype(jnp.float32)
    above = jnp.where(seen == 0, 0.0, above)
    mean = jnp.where(seen == 0, loss, loss_stats.mean + share * above)
    variance = (1.0 - share) * (jnp.where(seen == 0, 0.0, loss_stats.variance) + share * jnp.square(above))
    return LossStats(
        mean=jnp.where(is_finite, mean, loss_stats.mean),
        variance=jnp.where(is_finite, variance, loss_stats.variance),
        seen=seen + is_finite,
        spikes=loss_stats.spikes + is_spike,
        faults=loss_stats.faults + ~is_finite,
        skipped=jnp.where(is_last, 0, loss_stats.skipped),
    )


class TrainState(NamedTuple):
    """The state of a run. The step is its position: it determines the data and the randomness.

    After a rewind, the number of skipped batches, `loss_stats.skipped`, is part of the position too.
    """

    params: transformer.Params
    opt_state: Any
    step: jax.Array
    loss_stats: LossStats


class StepIntermediates(NamedTuple):
    """Statistics of the tensors inside one training step, from `intermediates.tensor_stats`.

    Attributes:
        losses_BT: Loss of each token in nats.
        weights_BT: Loss weight of each token.
        activations: Statistics at the hook points. The second to last axis is the microbatch.
        gradients: Statistics of the gradients with respect to these activations.
        parameter_gradients: The gradients of the parameters before clipping.
        updates: The updates of the parameters.
    """

    losses_BT: jax.Array
    weights_BT: jax.Array
    activations: Intermediates
    gradients: Intermediates
    parameter_gradients: Any
    updates: Any


class Metrics(NamedTuple):
    """Metrics of one training step.

    Attributes:
        loss: Cross-entropy in nats per token, without auxiliary losses.
        gradient_norm: Global norm of the gradient before clipping.
        update_norm: Global norm of the update, even if it was skipped.
        learning_rate: Learning rate of the step.
        learned_tokens: Number of tokens with loss in the batch.
        spikes: Number of loss spikes of the run so far.
        faults: Number of non-finite steps of the run so far.
        layer_metrics: Metrics of the blocks, averaged over them.
        intermediates: Statistics of the tensors inside the step, if they were requested.
    """

    loss: jax.Array
    gradient_norm: jax.Array
    update_norm: jax.Array
    learning_rate: jax.Array
    learned_tokens: jax.Array
    spikes: jax.Array
    faults: jax.Array
    layer_metrics: LayerMetrics
    intermediates: StepIntermediates | None = None

    def by_name(self) -> dict[str, Any]:
        """Return the metrics, except for intermediates, by their names in metrics.jsonl."""
        values = {**self._asdict(), **self.layer_metrics}
        del values["layer_metrics"], values["intermediates"]
        return {f"train/{name}": value for name, value in values.items()}


def init_state(static: StaticConfig, hparams: Hyperparams) -> TrainState:
    """Return the state at step 0."""
    config = combine(static, hparams)
    params = transformer.init(jax.random.fold_in(jax.random.key(config.seed), 0), config.model)
    return init_state_from_params(static, hparams, params)


def init_state_from_params(static: StaticConfig, hparams: Hyperparams, params: transformer.Params) -> TrainState:
    """Return the state at step 0 with given parameters."""
    config = combine(static, hparams)
    state = TrainState(
        params, make_optimizer(config.optimizer).init(params), jnp.zeros((), jnp.int32), init_loss_stats()
    )
    return offload_opt_state(static, constrain(state))


def offload_opt_state(static: StaticConfig, state: TrainState) -> TrainState:
    """Move the optimizer state to host memory if `optimizer.offload_state` is set."""
    if not static.optimizer.offload_state:
        return state
    return state._replace(opt_state=jax.device_put(state.opt_state, jax.memory.Space.Host))


def fetch_opt_state(static: StaticConfig, opt_state: Any) -> Any:
    """Move the optimizer state to device memory."""
    return jax.device_put(opt_state, jax.memory.Space.Device) if static.optimizer.offload_state else opt_state


def train_step(
    static: StaticConfig,
    state: TrainState,
    batch: Batch,
    hparams: Hyperparams,
    first_step: jax.Array | int = 0,
    with_intermediates: bool = False,
) -> tuple[TrainState, Metrics]:
    """Take one optimizer step on one batch.

    If the loss, the gradient or the update is not finite, the step is counted, but parameters and optimizer state do
    not change.

    Args:
        static: The static half of the config.
        state: The state before the step.
        batch: The whole batch, with all microbatches.
        hparams: The traced half of the config.
        first_step: The first step of the stage, from which its learning-rate schedule counts.
        with_intermediates: Whether to compute statistics of the tensors inside the step.

    Returns:
        The state after the step, and its metrics.
    """
    config, state = combine(static, hparams), state._replace(opt_state=fetch_opt_state(static, state.opt_state))
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), 1), state.step)
    gradients, sums, inside = gradient(state.params, batch, config, key, with_intermediates)
    with jax.named_scope("optimizer"):
        gradients = constrain(gradients)
        norm = optax.tree.norm(gradients)
        stage_step = state.step - first_step
        lr_multiplier = schedule_multiplier(stage_step, config.training.steps, config.schedule)

        def update(gradients: Any, opt_state: Any) -> tuple[Any, Any]:
            if is_enabled(config.optimizer.clip_norm):
                gradients = clip_by_norm(gradients, norm, config.optimizer.clip_norm)
            return make_optimizer(config.optimizer, lr_multiplier).update(gradients, opt_state, state.params)

        # The state may change only after the whole update is checked. The update is computed twice on purpose: without
        # the barrier, XLA would keep new moments in memory until the check; with it, they are computed in the pass that
        # writes them. XLA removes the unused half of each call.
        updates, _ = update(gradients, state.opt_state)
        loss = sums.loss / jnp.maximum(sums.weight, 1.0)
        update_norm = optax.tree.norm(updates)
        is_finite = jnp.isfinite(loss) & jnp.isfinite(norm) & jnp.isfinite(update_norm)
        is_finite, late_gradients, old_opt_state = jax.lax.optimization_barrier((is_finite, gradients, state.opt_state))
        _, new_opt_state = update(late_gradients, old_opt_state)
        keep_if_finite = partial(jax.tree.map, lambda new, old: jnp.where(is_finite, new, old))
        params = keep_if_finite(optax.apply_updates(state.params, updates), state.params)
        opt_state = keep_if_finite(new_opt_state, old_opt_state)
    loss_stats = update_loss_stats(
        state.loss_stats, loss, is_finite, stage_step == 0, stage_step == config.training.steps - 1
    )
    intermediates = None
    if inside is not None:
        # Move microbatches from the first axis to the second to last.
        activations, activation_gradients = jax.tree.map(
            lambda leaf: jnp.moveaxis(leaf, 0, -2), (inside.activations, inside.gradients)
        )
        losses_BT = inside.losses_BT.reshape(batch.weights_BT.shape)
        intermediates = StepIntermediates(
            losses_BT, batch.weights_BT, activations, activation_gradients, gradients, updates
        )
    metrics = Metrics(
        loss=loss,
        gradient_norm=norm,
        update_norm=update_norm,
        learning_rate=lr_multiplier * config.optimizer.learning_rate,
        learned_tokens=sums.weight,
        spikes=loss_stats.spikes,
        faults=loss_stats.faults,
        layer_metrics={name: value / jnp.maximum(sums.weight, 1.0) for name, value in sums.layer_metrics.items()},
        intermediates=intermediates,
    )
    return offload_opt_state(static, constrain(TrainState(params, opt_state, state.step + 1, loss_stats))), metrics


def step_intermediates(
    static: StaticConfig, state: TrainState, batch: Batch, hparams: Hyperparams, first_step: jax.Array | int = 0
) -> tuple[Metrics, StepIntermediates]:
    """Return the metrics and intermediates of `train_step`, without its new state, so that it takes no memory."""
    _, metrics = train_step(static, state, batch, hparams, first_step, with_intermediates=True)
    assert metrics.intermediates is not None
    return metrics._replace(intermediates=None), metrics.intermediates


class _MicrobatchIntermediates(NamedTuple):
    """Statistics of one microbatch, or of all along a new first axis, as in `StepIntermediates`."""

    losses_BT: jax.Array
    activations: Intermediates
    gradients: Intermediates | None = None


def gradient(
    params: transformer.Params,
    batch: Batch,
    config: StaticConfig,
    key: jax.Array,
    with_intermediates: bool = False,
) -> tuple[transformer.Params, LossSums, _MicrobatchIntermediates | None]:
    """Compute the gradient of the mean loss over a batch, one microbatch after another.

    Each microbatch's summed loss is divided by the weight of the whole batch, so that the number of microbatches does
    not change how much a token counts.

    Args:
        params: The parameters.
        batch: The whole batch.
        config: The config, with traced numbers.
        key: The key for dropout.
        with_intermediates: Whether to compute statistics of the tensors at the hook points.

    Returns:
        The gradient, the sums of the loss, and the statistics, if any.
    """
    total_weight = jnp.sum(batch.weights_BT)
    n_parts = config.training.grad_accum_steps
    slots = None
    if with_intermediates:
        n_rows, length = batch.tokens_BT.shape
        slots = grad_slots(transformer.hook_points(config.model, n_rows // n_parts, length))

    def part_loss(params: Any, slots: Any, part: Batch, key: jax.Array) -> tuple[jax.Array, Any]:
        dropout_key, inside = key if is_enabled(config.model.dropout) else None, None
        if slots is None:
            sums = loss_sums(
                params, part, config.model, dropout_key, config.training.loss_chunk_size, config.training.z_loss
            )
        else:
            inputs = BlockInputs(part.positions_BT, part.segments_BT, dropout_key)
            logits_BTV, layer_metrics, activations = transformer.apply_with_intermediates(
                params, part.tokens_BT, config.model, inputs, slots
            )
            sums, losses_BT = cross_entropy_sums(logits_BTV, part, layer_metrics, config.training.z_loss)
            inside = _MicrobatchIntermediates(losses_BT, activations)
        return total_loss(sums, total_weight), (sums, inside)

    def part_gradient(part: Batch, key: jax.Array) -> tuple[Any, _MicrobatchIntermediates | None]:
        (gradients, slot_gradients), (sums, inside) = jax.grad(part_loss, argnums=(0, 1), has_aux=True)(
            params, slots, part, key
        )
        return (gradients, sums), inside and inside._replace(gradients=slot_gradients)

    if n_parts == 1:
        (gradients, sums), inside = part_gradient(batch, key)
        return gradients, sums, jax.tree.map(lambda leaf: leaf[None], inside)

    def accumulate(total: Any, indexed_part: tuple[jax.Array, Batch]) -> tuple[Any, Any]:
        index, part = indexed_part
        result, inside = part_gradient(part, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, total, result), inside

    split_batch = split_microbatches(batch, n_parts)
    first_part = jax.tree.map(lambda leaf: leaf[0], split_batch)
    layer_metrics = _zero_layer_metrics(params, first_part, config.model)
    zero_sums = LossSums(jnp.zeros(()), jnp.zeros(()), jnp.zeros(()), layer_metrics)
    zeros = (jax.tree.map(jnp.zeros_like, params), zero_sums)
    (gradients, sums), inside = jax.lax.scan(accumulate, zeros, (jnp.arange(n_parts), split_batch))
    return gradients, sums, inside


def train_steps(
    static: StaticConfig,
    state: TrainState,
    batches: Batch,
    count: jax.Array,
    hparams: Hyperparams,
    first_step: jax.Array,
) -> tuple[TrainState, Metrics]:
    """Take `count` steps, on the first `count` of the stacked batches. The metrics are stacked too.

    The count is traced and the loop has one body, so that results do not depend on the number of steps per call.
    """
    slots = jax.tree.leaves(batches)[0].shape[0]

    def body(index: jax.Array, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
        state, history = carry
        batch = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), batches)
        state, metrics = train_step(static, state, batch, hparams, first_step)
        return state, jax.tree.map(lambda past, now: past.at[index].set(now), history, metrics)

    first_batch = jax.tree.map(lambda leaf: leaf[0], batches)
    layer_metrics = _zero_layer_metrics(state.params, first_batch, combine(static, hparams).model)
    zero, none = jnp.zeros(()), jnp.zeros((), jnp.int32)
    metrics = Metrics(zero, zero, zero, zero, zero, none, none, layer_metrics)
    history = jax.tree.map(lambda leaf: jnp.zeros(slots, leaf.dtype), metrics)
    return jax.lax.fori_loop(0, count, body, (offload_opt_state(static, state), history))


def _zero_layer_metrics(params: transformer.Params, batch: Batch, model: ModelConfig) -> LayerMetrics:
    """Return a zero for each metric of the blocks. Only the forward pass is traced, which is faster."""
    shapes = jax.eval_shape(lambda: loss_sums(params, batch, model).layer_metrics)
    return {name: jnp.zeros((), shape.dtype) for name, shape in shapes.items()}


compiled_init_state = jax.jit(init_state, static_argnums=0)
compiled_init_state_from_params = jax.jit(init_state_from_params, static_argnums=0)
compiled_step_intermediates = jax.jit(step_intermediates, static_argnums=0)
compiled_train_steps = jax.jit(train_steps, static_argnums=0, donate_argnums=1)


# Populations: many runs with one static config in one program. Their states and arguments are stacked along a new first
# axis P.


class StepArgs(NamedTuple):
    """Arguments of a call for one run: `count` steps (0 leaves the state unchanged) on the stacked batches."""

    batches: Batch
    count: Any
    hparams: Hyperparams
    first_step: Any


def population_steps(
    mode: str, static: StaticConfig, states_P: TrainState, args_P: StepArgs
) -> tuple[TrainState, Metrics]:
    """Take steps of every run of a population. Metrics have shape (P, slots).

    Args:
        mode: "exact" takes the steps of one run after another, bit-identical to training each run alone. "fused" takes
            those of all runs at once with `vmap`, which is faster if one run does not keep the device busy; it takes
            sums in a different order, and all counts that are not 0 must be equal.
        static: The static half of the configs.
        states_P: The states.
        args_P: The arguments of each run.
    """
    if mode == "exact":
        return jax.lax.map(lambda run: train_steps(static, run[0], *run[1]), (states_P, args_P))
    count = jnp.max(args_P.count)

    def steps(state: TrainState, args: StepArgs) -> tuple[TrainState, Metrics]:
        after, metrics = train_steps(static, state, args.batches, count, args.hparams, args.first_step)
        return jax.tree.map(partial(jnp.where, args.count > 0), after, state), metrics

    return jax.vmap(steps)(states_P, args_P)


compiled_population_steps = jax.jit(population_steps, static_argnums=(0, 1), donate_argnums=2)


def stack(trees: Sequence[Any]) -> Any:
    """Stack trees along a new first axis P on the host, which compiles nothing."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *jax.device_get(list(trees)))
