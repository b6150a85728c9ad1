"""A training step that is looked into: measurements of every tensor that it makes, instead of a new state."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rustgpt_jax.config.schema import Structure, is_on, merge
from rustgpt_jax.data.pipeline import Batch
from rustgpt_jax.evaluation.loss import cross_entropy_sums, total_loss
from rustgpt_jax.fingerprints import fingerprint
from rustgpt_jax.model import intermediates, transformer
from rustgpt_jax.model.block_inputs import BlockInputs
from rustgpt_jax.model.hook_points import grad_slots, hook_points
from rustgpt_jax.model.layer_groups import layer_groups
from rustgpt_jax.pytrees import by_path
from rustgpt_jax.training.optimizers import clip_by_norm, make_optimizer
from rustgpt_jax.training.schedules import schedule_multiplier
from rustgpt_jax.training.train_step import Numbers, State

ACTIVATION, ACTIVATION_GRADIENT = "activation", "gradient of the activation"
PARAMETER, PARAMETER_GRADIENT, UPDATE = "parameter", "gradient of the parameter", "update of the parameter"
# The sites for which the parameters outside of the blocks are needed.
OUTSIDE = {"embedding": "embeddings", "positions": "embeddings", "norm": "hidden", "head": "logits"}
# The kinds of tensors in the order in which a step makes them.
KINDS = (PARAMETER, ACTIVATION, ACTIVATION_GRADIENT, PARAMETER_GRADIENT, UPDATE)


class StepIntermediates(NamedTuple):
    """What a step looks like from inside. Measurements are as `intermediates.tensor_stats` has them.

    loss: mean over the learned tokens, in nats. losses_BT, weights_BT: of each token. gradient_norm: before clipping.
    activations, gradients: of the tensors at the sites, with the parts of the batch as the last axis but one.
    parameter_gradients (before clipping), updates: the arrays themselves, in trees like that of the parameters.
    """

    loss: jax.Array
    losses_BT: jax.Array
    weights_BT: jax.Array
    gradient_norm: jax.Array
    activations: intermediates.Intermediates
    gradients: intermediates.Intermediates
    parameter_gradients: Any
    updates: Any


def tapped_step(
    structure: Structure, state: State, batch: Batch, numbers: Numbers, first_step: jax.Array | int = 0
) -> StepIntermediates:
    """Measurements of one step as `train_step` makes it, up to rounding."""
    config = merge(structure, numbers)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), 1), state.step)
    total_weight, parts = jnp.sum(batch.weights_BT), config.training.grad_accum_steps
    split_batch = jax.tree.map(lambda leaf: leaf.reshape(parts, -1, *leaf.shape[1:]), batch)
    empty = grad_slots(hook_points(config.model, *split_batch.tokens_BT.shape[1:]))

    def part_loss(
        params: Any, grad_slots: intermediates.GradSlots, part: Batch, key: jax.Array
    ) -> tuple[jax.Array, Any]:
        context = BlockInputs(part.positions_BT, part.segments_BT, key if is_on(config.model.dropout) else None)
        logits_BTV, signals, measured = transformer.apply_with_intermediates(
            params, part.tokens_BT, config.model, context, grad_slots
        )
        sums, losses_BT = cross_entropy_sums(logits_BTV, part, signals)
        return total_loss(sums, total_weight, config.training.z_loss), (sums.loss, losses_BT, measured)

    def accumulate(total: Any, indexed_part: tuple[jax.Array, Batch]) -> tuple[Any, Any]:
        index, part = indexed_part
        part_key = key if parts == 1 else jax.random.fold_in(key, index)
        (of_params, of_slots), (loss, *seen) = jax.grad(part_loss, argnums=(0, 1), has_aux=True)(
            state.params, empty, part, part_key
        )
        return jax.tree.map(jnp.add, total, (of_params, loss)), (*seen, of_slots)

    zeros = (jax.tree.map(jnp.zeros_like, state.params), jnp.zeros(()))
    (gradients, loss), (losses_BT, *measured) = jax.lax.scan(accumulate, zeros, (jnp.arange(parts), split_batch))
    activations, activation_gradients = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, -2), measured)
    norm = optax.tree.norm(gradients)
    clipped = (
        clip_by_norm(gradients, norm, config.optimizer.clip_norm) if is_on(config.optimizer.clip_norm) else gradients
    )
    rate = schedule_multiplier(state.step - first_step, config.training.steps, config.schedule)
    updates, _ = make_optimizer(config.optimizer, rate).update(clipped, state.opt_state, state.params)
    return StepIntermediates(
        loss=loss / jnp.maximum(total_weight, 1.0),
        losses_BT=losses_BT.reshape(batch.weights_BT.shape),
        weights_BT=batch.weights_BT,
        gradient_norm=norm,
        activations=activations,
        gradients=activation_gradients,
        parameter_gradients=gradients,
        updates=updates,
    )


compiled_tapped_step = jax.jit(tapped_step, static_argnums=0)
# Of an array of layers. It is compiled once for each shape, not once for each parameter.
compiled_measured_N = jax.jit(jax.vmap(intermediates.tensor_stats))


# As they are read on the report.


class Tensor(NamedTuple):
    """What was measured of one tensor.

    name: 'layers/3/mixer/query', 'logits'; of a parameter 'layers/3/mixer/query/kernel', 'embedding/table'.
    norm (root of the sum of squares) and largest magnitude are of the finite elements.
    """

    kind: str
    name: str
    layer: int | None
    site: str
    norm: float
    largest: float
    nonfinite: int
    size: int
    fingerprint: str

    @property
    def rms(self) -> float:
        """The root of the mean square of the finite elements."""
        finite = self.size - self.nonfinite
        return self.norm / finite**0.5 if finite > 0 else 0.0


def tensors(program: tuple[Structure, Numbers], params: transformer.Params, report: StepIntermediates) -> list[Tensor]:
    """Every tensor of a step from `params`, in the order in which it is made: of each of KINDS, one after another.

    Gradients go backward, from the logits to the embeddings.
    """
    config = merge(*program)
    rows, length = report.weights_BT.shape
    every = hook_points(config.model, rows // config.training.grad_accum_steps, length)
    layers = [stack.layers for stack in layer_groups(config.model)]
    places = {site.name: place for place, site in enumerate(every)}

    def at_sites(kind: str, measurements: intermediates.Intermediates, order: int) -> list[Tensor]:
        measurements, parts = jax.device_get(measurements), config.training.grad_accum_steps
        return [
            _tensor(kind, site.name, site.layer, site.site, parts * site.size, site.of(measurements))
            for site in every[::order]
        ]

    def of_params(kind: str, tree: transformer.Params, order: int) -> list[Tensor]:
        return _of_params(kind, tree, layers, places)[::order]

    return [
        *of_params(PARAMETER, params, 1),
        *at_sites(ACTIVATION, report.activations, 1),
        *at_sites(ACTIVATION_GRADIENT, report.gradients, -1),
        *of_params(PARAMETER_GRADIENT, report.parameter_gradients, -1),
        *of_params(UPDATE, report.updates, -1),
    ]


def _of_params(kind: str, tree: transformer.Params, layers: list[range], places: dict[str, int]) -> list[Tensor]:
    """The parameters, or what is shaped like them, in the order of the first sites that need them."""
    found: list[Tensor] = []
    for path, array in by_path(tree).items():
        if not path.startswith("blocks/"):
            (measurement,) = jax.device_get(compiled_measured_N(array[None]))
            found.append(_tensor(kind, path, None, path, array.size, measurement[None]))
            continue
        _, stack, site = path.split("/", 2)
        for layer, measurement in zip(layers[int(stack)], jax.device_get(compiled_measured_N(array)), strict=True):
            found.append(_tensor(kind, f"layers/{layer}/{site}", layer, site, array[0].size, measurement[None]))
    return sorted(found, key=lambda tensor: _place(tensor.name, places))


def _place(parameter: str, places: dict[str, int]) -> float:
    """The number of the site that a parameter makes: that of the longest path that begins its own."""
    parts = parameter.split("/")
    if parts[0] in OUTSIDE:
        return places[OUTSIDE[parts[0]]] - 0.5
    paths = ("/".join(parts[:end]) for end in range(len(parts) - 1, 0, -1))
    # A parameter of a module whose own output is no site is needed for that of its last part.
    return next((float(places[path]) for path in paths if path in places), _after(parameter, places))


def _after(parameter: str, places: dict[str, int]) -> float:
    module = parameter.rsplit("/", 1)[0]
    within = [place for name, place in places.items() if name.startswith(f"{module}/")]
    return max(within, default=len(places)) - 0.5


def _tensor(kind: str, name: str, layer: int | None, site: str, size: int, parts: np.ndarray) -> Tensor:
    """A tensor from the measurements of its parts."""
    read = intermediates.unpack_stats(parts)
    weights = 2 * np.arange(len(parts), dtype=np.uint32) + 1
    first, second = (int(np.sum(half * weights, dtype=np.uint32)) for half in read.digest)
    norm = float(np.sqrt(np.sum(np.square(read.norm.astype(np.float64)))))
    nonfinite = round(float(np.sum(read.nonfinite, dtype=np.float64)))
    return Tensor(
        kind, name, layer, site, norm, float(np.max(read.largest)), nonfinite, size, fingerprint(first, second)
    )
