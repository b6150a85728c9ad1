"""Statistics of every tensor of a training step, in the order in which the step computes them."""

from typing import NamedTuple

import jax
import numpy as np

from rustgpt_jax.config.schema import StaticConfig, combine
from rustgpt_jax.fingerprints import fingerprint
from rustgpt_jax.model import intermediates, transformer
from rustgpt_jax.model.hook_points import hook_points
from rustgpt_jax.model.layer_groups import layer_groups
from rustgpt_jax.pytrees import by_path
from rustgpt_jax.training.train_step import Hyperparams, StepIntermediates

ACTIVATION, ACTIVATION_GRADIENT = "activation", "gradient of the activation"
PARAMETER, PARAMETER_GRADIENT, UPDATE = "parameter", "gradient of the parameter", "update of the parameter"
# The hook points for which the parameters outside the blocks are needed.
OUTSIDE = {"embedding": "embeddings", "positions": "embeddings", "norm": "hidden", "head": "logits"}
# The kinds of tensors in the order in which a step makes them.
KINDS = (PARAMETER, ACTIVATION, ACTIVATION_GRADIENT, PARAMETER_GRADIENT, UPDATE)

# Measures stacked layers. Compiled once per shape, not once per parameter.
compiled_measured_N = jax.jit(jax.vmap(intermediates.tensor_stats))


class StepTensor(NamedTuple):
    """Statistics of one tensor. `norm` (root of the sum of squares) and `largest` are over its finite elements.

    Names are like 'layers/3/mixer/query' or 'logits', and 'layers/3/mixer/query/kernel' for parameters.
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


def list_step_tensors(
    program: tuple[StaticConfig, Hyperparams], params: transformer.Params, report: StepIntermediates
) -> list[StepTensor]:
    """List the tensors of a step from `params`, grouped by KINDS. Gradients are listed from the logits backward."""
    config = combine(*program)
    rows, length = report.weights_BT.shape
    every = hook_points(config.model, rows // config.training.grad_accum_steps, length)
    layers = [stack.layers for stack in layer_groups(config.model)]
    places = {site.name: place for place, site in enumerate(every)}

    def at_sites(kind: str, measurements: intermediates.Intermediates, order: int) -> list[StepTensor]:
        measurements, parts = jax.device_get(measurements), config.training.grad_accum_steps
        return [
            _tensor(kind, site.name, site.layer, site.site, parts * site.size, site.of(measurements))
            for site in every[::order]
        ]

    def of_params(kind: str, tree: transformer.Params, order: int) -> list[StepTensor]:
        return _of_params(kind, tree, layers, places)[::order]

    return [
        *of_params(PARAMETER, params, 1),
        *at_sites(ACTIVATION, report.activations, 1),
        *at_sites(ACTIVATION_GRADIENT, report.gradients, -1),
        *of_params(PARAMETER_GRADIENT, report.parameter_gradients, -1),
        *of_params(UPDATE, report.updates, -1),
    ]


def _of_params(kind: str, tree: transformer.Params, layers: list[range], places: dict[str, int]) -> list[StepTensor]:
    """List the parameters, or a tree like them, in the order of the first hook points that need them."""
    found: list[StepTensor] = []
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
    """Return the index of the hook point that a parameter is used for: that of the longest prefix of its path."""
    parts = parameter.split("/")
    if parts[0] in OUTSIDE:
        return places[OUTSIDE[parts[0]]] - 0.5
    paths = ("/".join(parts[:end]) for end in range(len(parts) - 1, 0, -1))
    # If the output of a parameter's module is not a hook point, use the last one inside the module.
    return next((float(places[path]) for path in paths if path in places), _after(parameter, places))


def _after(parameter: str, places: dict[str, int]) -> float:
    module = parameter.rsplit("/", 1)[0]
    within = [place for name, place in places.items() if name.startswith(f"{module}/")]
    return max(within, default=len(places)) - 0.5


def _tensor(kind: str, name: str, layer: int | None, site: str, size: int, parts: np.ndarray) -> StepTensor:
    """Combine the measurements of the microbatches of a tensor."""
    read = intermediates.unpack_stats(parts)
    weights = 2 * np.arange(len(parts), dtype=np.uint32) + 1
    first, second = (int(np.sum(half * weights, dtype=np.uint32)) for half in read.digest)
    norm = float(np.sqrt(np.sum(np.square(read.norm.astype(np.float64)))))
    nonfinite = round(float(np.sum(read.nonfinite, dtype=np.float64)))
    return StepTensor(
        kind, name, layer, site, norm, float(np.max(read.largest)), nonfinite, size, fingerprint(first, second)
    )
