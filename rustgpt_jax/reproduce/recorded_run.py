"""Read-only access to a recorded run: the state after any step, and bit-identical replays of steps."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from rustgpt_jax.config.schema import MeshConfig, StaticConfig, combine
from rustgpt_jax.data.pipeline import Batch
from rustgpt_jax.data.preprocess import StageData, find_changed_stages
from rustgpt_jax.errors import UserError
from rustgpt_jax.model import intermediates, transformer
from rustgpt_jax.model.block import layer_groups
from rustgpt_jax.pytrees import flatten_paths, format_fingerprint
from rustgpt_jax.sharding.sharding_plan import axis_sizes, check_batch_shards, describe_mesh, plan_for_all_devices
from rustgpt_jax.tracking.console import print_line, show_progress
from rustgpt_jax.tracking.metric_writer import iter_metrics, read_columns
from rustgpt_jax.training.checkpointing import Checkpoints, CorruptCheckpoint
from rustgpt_jax.training.memory_estimate import state_shapes
from rustgpt_jax.training.run_inputs import StageProgram, prepare_inputs
from rustgpt_jax.training.train_step import (
    Hyperparams,
    Metrics,
    StepIntermediates,
    TrainState,
    compiled_step_intermediates,
    compiled_train_steps,
    stack,
)
from rustgpt_jax.training.trainer import load_initial_state
from rustgpt_jax.workdir.event_log import EventLog, load_launches
from rustgpt_jax.workdir.run_dir import RunDir, load_config, load_earlier

# Statistics of the tensors of a training step.

PARAMETER, ACTIVATION, ACTIVATION_GRADIENT = "parameter", "activation", "gradient of the activation"
PARAMETER_GRADIENT, UPDATE = "gradient of the parameter", "update of the parameter"
# The kinds of tensors, in the order in which a step computes them.
KINDS = (PARAMETER, ACTIVATION, ACTIVATION_GRADIENT, PARAMETER_GRADIENT, UPDATE)
# The hook points that use the parameters outside the blocks.
HOOK_POINT_OF = {"embedding": "embeddings", "positions": "embeddings", "norm": "hidden", "head": "logits"}

# Measures stacked layers, so it is compiled once per shape and not once per parameter.
compiled_tensor_stats_N = jax.jit(jax.vmap(intermediates.tensor_stats))


class StepTensor(NamedTuple):
    """Statistics of one tensor of a step.

    Attributes:
        kind: One of KINDS.
        name: Such as 'logits' or 'layers/3/mixer/query', or 'layers/3/mixer/query/kernel' for a parameter.
        layer: The index of its layer; None outside the layers.
        path: The name without the layer.
        norm: The root of the sum of squares of the finite elements.
        largest: The largest magnitude among the finite elements.
        nonfinite: The number of elements that are not finite.
        size: The number of elements.
        fingerprint: A fingerprint of its bits.
    """

    kind: str
    name: str
    layer: int | None
    path: str
    norm: float
    largest: float
    nonfinite: int
    size: int
    fingerprint: str

    @property
    def rms(self) -> float:
        """The root mean square of the finite elements."""
        finite = self.size - self.nonfinite
        return self.norm / finite**0.5 if finite > 0 else 0.0


def list_step_tensors(
    program: tuple[StaticConfig, Hyperparams], params: transformer.Params, report: StepIntermediates
) -> list[StepTensor]:
    """List the tensors of a step, grouped by kind (see KINDS); gradients run from the logits backward."""
    config = combine(*program)
    rows, length = report.weights_BT.shape
    n_microbatches = config.training.grad_accum_steps
    points = transformer.hook_points(config.model, rows // n_microbatches, length)
    order = {point.name: index for index, point in enumerate(points)}
    layers = [group.layers for group in layer_groups(config.model)]

    def list_activations(kind: str, stats: intermediates.Intermediates) -> list[StepTensor]:
        stats = jax.device_get(stats)
        return [
            _step_tensor(kind, each.name, each.layer, each.path, n_microbatches * each.size, each.select(stats))
            for each in points
        ]

    def list_params(kind: str, tree: transformer.Params) -> list[StepTensor]:
        return sorted(_param_tensors(kind, tree, layers), key=lambda tensor: _param_order(tensor.name, order))

    return [
        *list_params(PARAMETER, params),
        *list_activations(ACTIVATION, report.activations),
        *list_activations(ACTIVATION_GRADIENT, report.gradients)[::-1],
        *list_params(PARAMETER_GRADIENT, report.parameter_gradients)[::-1],
        *list_params(UPDATE, report.updates)[::-1],
    ]


def _param_tensors(kind: str, tree: transformer.Params, layers: list[range]) -> Iterator[StepTensor]:
    """Yield the tensors of parameters, or of a tree like them, with stacked layers one by one."""
    for path, array in flatten_paths(tree).items():
        if path.startswith("blocks/"):
            _, group, rest = path.split("/", 2)
            stats_N = jax.device_get(compiled_tensor_stats_N(array))
            for layer, stats in zip(layers[int(group)], stats_N, strict=True):
                yield _step_tensor(kind, f"layers/{layer}/{rest}", layer, rest, array[0].size, stats[None])
        else:
            yield _step_tensor(kind, path, None, path, array.size, jax.device_get(compiled_tensor_stats_N(array[None])))


def _param_order(name: str, order: dict[str, int]) -> float:
    """Return the index of the hook point that uses a parameter: the one with the longest matching prefix."""
    module, *parts = name.split("/")
    if module in HOOK_POINT_OF:
        return order[HOOK_POINT_OF[module]] - 0.5
    prefixes = ("/".join([module, *parts[:end]]) for end in range(len(parts) - 1, 0, -1))
    index = next((order[prefix] for prefix in prefixes if prefix in order), None)
    if index is not None:
        return index
    # The output of the parameter's module is not a hook point: use the last one inside the module.
    inside = [index for point, index in order.items() if point.startswith(f"{name.rsplit('/', 1)[0]}/")]
    return max(inside, default=len(order)) - 0.5


def _step_tensor(kind: str, name: str, layer: int | None, path: str, size: int, stats_MN: np.ndarray) -> StepTensor:
    """Combine the measurements of a tensor over the microbatches."""
    read = intermediates.unpack_stats(stats_MN)
    weights = 2 * np.arange(len(stats_MN), dtype=np.uint32) + 1
    digest = format_fingerprint(*(int(np.sum(half * weights, dtype=np.uint32)) for half in read.digest))
    norm = float(np.sqrt(np.sum(np.square(read.norm.astype(np.float64)))))
    nonfinite = round(float(np.sum(read.nonfinite, dtype=np.float64)))
    return StepTensor(kind, name, layer, path, norm, float(np.max(read.largest)), nonfinite, size, digest)


# Recorded runs.

# A message is printed before more than this many steps are recomputed.
FAR = 20


class StepInternals(NamedTuple):
    """One step: its batch, metrics and intermediates, and statistics of all its tensors in the order of computation."""

    batch: Batch
    metrics: Metrics
    report: StepIntermediates
    tensors: list[StepTensor]


class Rewind(NamedTuple):
    """A rewind of a run: the failed step, the step it returned to, and the state's counters afterwards."""

    step: int
    to: int
    skipped: int
    faults: int


class History(NamedTuple):
    """Recorded training metrics of a run, one array per metric."""

    steps: np.ndarray
    loss: np.ndarray
    gradient_norm: np.ndarray
    update_norm: np.ndarray
    spikes: np.ndarray

    def where(self, is_kept: np.ndarray) -> "History":
        """Return the lines selected by a boolean array."""
        return self if is_kept.all() else History(*(column[is_kept] for column in self))

    @property
    def is_finite(self) -> np.ndarray:
        """True for each line whose loss, gradient norm and update norm are finite."""
        return np.isfinite(self.loss) & np.isfinite(self.gradient_norm) & np.isfinite(self.update_norm)


HISTORY = tuple(f"train/{name}" for name in History._fields[1:])


class RecordedRun:
    """A read-only view of a recorded run, which takes no lock. Use it in a `with` statement.

    Steps are counted from 1: step K turns the state after step K - 1 into the one after step K, and its metrics are
    recorded with "step": K.

    Raises:
        UserError: The folder is not a run, or its training text has changed.
    """

    def __init__(self, path: Path, console: Console) -> None:
        self.folder, self._console = RunDir(path), console
        self.config = load_config(path)
        self.inputs = prepare_inputs(self.config, self.folder.tokenizer_file, console, load_earlier(path))
        changed = find_changed_stages(self.folder.data_file, self.inputs.stages)
        if changed:
            raise UserError(
                f"{path}: the text of stage {changed[0]!r} has changed since the run, so its steps cannot be "
                "recomputed."
            )
        mesh = self._choose_mesh()
        self._placement = plan_for_all_devices(mesh)
        for data in self.inputs.stages:
            check_batch_shards(replace(data.stage.config, mesh=mesh), data.seq_len, self._placement.n_devices)
        self.rewinds = read_rewinds(self.folder)
        self._last_visible = self.inputs.total_steps
        self._resources = ExitStack()
        self._checkpoints: Checkpoints | None = None

    def _choose_mesh(self) -> MeshConfig:
        """Return the mesh of the last launch, or a data-parallel one if that does not fit the devices."""
        last = load_launches(self.folder)[-1:]
        mesh = MeshConfig(**last[0].mesh) if last and last[0].mesh else self.config.mesh
        try:
            axis_sizes(mesh, jax.device_count())
        except UserError:
            print_line(
                self._console,
                f"The run used another mesh ({describe_mesh(mesh)}), which does not fit these devices; "
                "results are close to the recorded ones, but not bit-identical.",
            )
            return MeshConfig(data=-1, fsdp=1, expert=1, context=1, tensor=1)
        return mesh

    def __enter__(self) -> "RecordedRun":
        self._resources.enter_context(self._placement.use_mesh())
        if self.folder.checkpoints.exists():
            checkpoints = Checkpoints(self.folder.checkpoints, self.config, earlier=self.inputs.earlier)
            self._checkpoints = self._resources.enter_context(checkpoints)
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def check_step(self, step: int) -> None:
        """Raise UserError if the run does not have a step."""
        if not 1 <= step <= self.inputs.total_steps:
            raise UserError(f"{self.folder.path} has no step {step}: its steps are 1 to {self.inputs.total_steps}.")

    def get_stage(self, step: int) -> tuple[StageData, StageProgram]:
        """Return the data and the program of the stage that contains a step."""
        pairs = zip(self.inputs.stages, self.inputs.programs, strict=True)
        return next((data, program) for data, program in pairs if step <= data.stage.last_step)

    def load_metrics(self, step: int) -> dict[str, Any] | None:
        """Return the training metrics logged at a step, or None if it was not logged."""
        found = None
        for line in iter_metrics(self.folder.path, containing=str(step).encode()):
            if line["step"] == step and "train/loss" in line and step <= self._last_visible:
                found = line
        return found

    def load_history(self) -> History:
        """Return the logged training metrics."""
        steps, _, _, values = read_columns(self.folder.path, HISTORY[0], HISTORY[1:])
        history = History(steps, *(values[name] for name in HISTORY))
        return history.where(steps <= self._last_visible)

    def undo_rewind(self, rewind: Rewind) -> None:
        """Show the run as it was before a rewind, and hide everything recorded after it."""
        self.rewinds = [earlier for earlier in self.rewinds if earlier.faults < rewind.faults]
        self._last_visible = rewind.to

    def list_saved_steps(self) -> list[int]:
        """Return 0, the start, and the steps with a checkpoint."""
        steps = self._checkpoints.steps() if self._checkpoints else []
        return [0, *(step for step in steps if step <= self._last_visible)]

    def compute_state(self, step: int) -> TrainState:
        """Return the state after a step: the nearest valid checkpoint, advanced by the missing steps."""
        return self.advance(self.restore_nearest(step), step)

    def restore_nearest(self, step: int) -> TrainState:
        """Return the state of the last valid checkpoint at or before a step, or else the initial state."""
        like = self._placement.add_shardings(state_shapes(self.inputs.stages[0].stage.config))
        for saved in self.list_saved_steps()[::-1]:
            if 0 < saved <= step and self._checkpoints:
                try:
                    return self._placement.shard_state(self._checkpoints.restore_step(like, saved))
                except CorruptCheckpoint as error:
                    print_line(
                        self._console, f"The checkpoint of step {saved} is damaged ({error}); an earlier one is used."
                    )
        return self._placement.shard_state(load_initial_state(self.inputs, self.folder, self._placement))

    def advance(self, state: TrainState, step: int) -> TrainState:
        """Return the state after a step, computed from an earlier state, whose buffers are donated."""
        first = int(state.step)
        missing = step - first
        if missing > FAR:
            print_line(self._console, f"Recomputing {missing:,} earlier steps, from {describe_start(first)}.")
        with show_progress(self._console, "steps recomputed") as progress:
            return self.train(state, missing, lambda done: progress(done, missing))[0]

    def load_batches(self, state: TrainState, count: int) -> list[Batch]:
        """Return the batches that the run read in the `count` steps after a state, which must belong to one stage."""
        first = int(state.step)
        source = self.get_stage(first + 1)[0].training_batches()
        indices = []
        for step in range(first, first + count):
            last = self._last_rewind(step)
            n_skipped = int(state.loss_stats.skipped) if last is None or last.to < first else last.skipped
            indices.append(step + n_skipped)
        return [source.batch(index) for index in indices]

    def train(
        self, state: TrainState, count: int, on_progress: Callable[[int], object] | None = None
    ) -> tuple[TrainState, list[Metrics]]:
        """Train for `count` more steps.

        Args:
            state: The state to start from. Its buffers are donated.
            count: The number of steps.
            on_progress: Called with the number of completed steps.

        Returns:
            The last state, and the metrics of each step.
        """
        every: list[Metrics] = []
        state = self._apply_rewind(state)
        while len(every) < count:
            step = int(state.step)
            data, program = self.get_stage(step + 1)
            slots = data.stage.config.training.steps_per_jit_call
            ends = [data.stage.last_step, *(rewind.to for rewind in self.rewinds if rewind.to > step)]
            n_steps = min(slots, min(ends) - step, count - len(every))
            batches = self.load_batches(state, n_steps)
            # Fill the unused slots, which no step reads.
            batches += [batches[-1]] * (slots - n_steps)
            stacked = stack(batches)
            sharded = self._placement.shard_batch(stacked, stacked.tokens_BT.shape[1])
            state, metrics = compiled_train_steps(
                program.static, state, sharded, np.int32(n_steps), program.hparams, program.first_step
            )
            metrics = jax.device_get(metrics)
            every += [jax.tree.map(lambda column, index=index: column[index], metrics) for index in range(n_steps)]
            state = self._apply_rewind(state)
            if on_progress is not None:
                on_progress(len(every))
        return state, every

    def _apply_rewind(self, state: TrainState) -> TrainState:
        """Set a state's counters to those after the last rewind if that rewind returned to its step."""
        last = self._last_rewind(int(state.step))
        if last is None or last.to < int(state.step):
            return state
        loss_stats = state.loss_stats._replace(faults=jnp.int32(last.faults), skipped=jnp.int32(last.skipped))
        return self._placement.shard_state(state._replace(loss_stats=loss_stats))

    def _last_rewind(self, step: int) -> Rewind | None:
        return next((rewind for rewind in self.rewinds[::-1] if rewind.to <= step), None)

    def measure_step(self, state: TrainState) -> StepInternals:
        """Compute the step after a state, with the statistics of all its tensors. The state is not changed."""
        _, program = self.get_stage(int(state.step) + 1)
        (batch,) = self.load_batches(state, 1)
        sharded = self._placement.shard_batch(batch, len(batch.tokens_BT))
        metrics, report = compiled_step_intermediates(
            program.static, state, sharded, program.hparams, program.first_step
        )
        tensors = list_step_tensors((program.static, program.hparams), state.params, report)
        return StepInternals(batch, metrics, report, tensors)


def read_rewinds(folder: RunDir) -> list[Rewind]:
    """Read the rewinds of a run. A rewind that was repeated after a kill is listed once."""
    names = Rewind._fields
    events = EventLog(folder.events_file).events_named("rewind", dict.fromkeys(names, int))
    return [Rewind(*rewind) for rewind in dict.fromkeys(tuple(event[name] for name in names) for event in events)]


def describe_start(step: int) -> str:
    """Describe the state after a step: a checkpoint, or the start of the run."""
    return f"the checkpoint of step {step:,}" if step else "the start"
