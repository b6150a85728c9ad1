"""Read-only view of a recorded run: its state after any step, and bit-exact recomputation of its steps."""

from collections.abc import Callable
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
from rustgpt_jax.data.preprocess import StageData, changed_stages
from rustgpt_jax.errors import UserError
from rustgpt_jax.fingerprints import format_fingerprint
from rustgpt_jax.model import intermediates, transformer
from rustgpt_jax.model.block import layer_groups
from rustgpt_jax.model.hook_points import hook_points
from rustgpt_jax.pytrees import flatten_paths
from rustgpt_jax.sharding.sharding_plan import axis_sizes, check_batch_shards, describe_mesh, plan_for_all_devices
from rustgpt_jax.tracking.metric_writer import iter_metrics, read_columns
from rustgpt_jax.tracking.progress import show_progress
from rustgpt_jax.training.checkpointing import Checkpoints, CorruptCheckpoint
from rustgpt_jax.training.memory_estimate import state_shapes
from rustgpt_jax.training.run_inputs import StageProgram, prepare_inputs
from rustgpt_jax.training.train_step import (
    Hyperparams,
    Metrics,
    State,
    StepIntermediates,
    compiled_step_intermediates,
    compiled_train_steps,
)
from rustgpt_jax.training.trainer import load_initial_state
from rustgpt_jax.workdir.event_log import EventLog, load_launches
from rustgpt_jax.workdir.run_dir import RunDir, load_config, load_earlier

# Statistics of every tensor of a training step, in the order in which the step computes them.

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
    for path, array in flatten_paths(tree).items():
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
        kind, name, layer, site, norm, float(np.max(read.largest)), nonfinite, size, format_fingerprint(first, second)
    )


# Steps that have to be made before the one that is wanted, which are worth a word.
FAR = 20


class StepInternals(NamedTuple):
    """One step: its batch, metrics and intermediates, and statistics of all its tensors in the order of computation."""

    batch: Batch
    metrics: Metrics
    report: StepIntermediates
    tensors: list[StepTensor]


class Rewind(NamedTuple):
    """A failure that a run rewound from: its step, the step it continued from, and the state's counters then."""

    step: int
    to: int
    skipped: int
    faults: int


HISTORY = ("train/loss", "train/gradient_norm", "train/update_norm", "train/spikes")


class History(NamedTuple):
    """Recorded training metrics of a run that show its health, one array per metric."""

    steps: np.ndarray
    loss: np.ndarray
    gradient_norm: np.ndarray
    update_norm: np.ndarray
    spikes: np.ndarray

    def until(self, step: int) -> "History":
        """Return the lines up to a step."""
        return self.where(self.steps <= step)

    def where(self, is_kept: np.ndarray) -> "History":
        """Return the lines selected by a boolean array."""
        if is_kept.all():
            return self
        return History(*(column[is_kept] for column in self))

    @property
    def is_finite(self) -> np.ndarray:
        """Whether the loss, gradient norm and update norm of each line are finite."""
        return np.isfinite(self.loss) & np.isfinite(self.gradient_norm) & np.isfinite(self.update_norm)


class RecordedRun:
    """A read-only view of a recorded run, which takes no lock. Use it in a `with` statement.

    Step K of a run, from 1, is the one whose record has "step": K; it takes the state after step K - 1.
    Raises UserError if the folder has no run, or the text that it read is not there any more.
    """

    def __init__(self, path: Path, console: Console) -> None:
        self.folder, self._console = RunDir(path), console
        self.config = load_config(path)
        earlier = load_earlier(path)
        self.inputs = prepare_inputs(self.config, self.folder.tokenizer_file, console, earlier)
        changed = changed_stages(self.folder.data_file, self.inputs.stages)
        if changed:
            raise UserError(
                f"{path}: the text of stage {changed[0]!r} is not what the run read, so its steps cannot be recomputed."
            )
        mesh = self._mesh_here()
        self._placement = plan_for_all_devices(mesh)
        for data in self.inputs.stages:
            check_batch_shards(replace(data.stage.config, mesh=mesh), data.seq_len, self._placement.n_devices)
        self.rewinds = read_rewinds(self.folder)
        self._last_saved = self.total_steps
        self._resources = ExitStack()
        self._checkpoints: Checkpoints | None = None

    def _mesh_here(self) -> MeshConfig:
        """Return the mesh of the last launch, or a data-parallel one if the devices differ."""
        last = load_launches(self.folder)[-1:]
        was = MeshConfig(**last[0].mesh) if last and last[0].mesh else self.config.mesh
        try:
            axis_sizes(was, jax.device_count())
        except UserError:
            self._say(
                f"The run was on another mesh ({describe_mesh(was)}); on these devices, "
                "results are close to its results, not equal."
            )
            return MeshConfig(data=-1, fsdp=1, expert=1, context=1, tensor=1)
        return was

    def __enter__(self) -> "RecordedRun":
        self._resources.enter_context(self._placement.active())
        if self.folder.checkpoints.exists():
            checkpoints = Checkpoints(self.folder.checkpoints, self.config, earlier=self.inputs.earlier)
            self._checkpoints = self._resources.enter_context(checkpoints)
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    @property
    def total_steps(self) -> int:
        """The steps of all stages."""
        return self.inputs.total_steps

    def check(self, step: int) -> None:
        """Raises UserError for a step that the run does not have."""
        if not 1 <= step <= self.total_steps:
            raise UserError(f"{self.folder.path} has no step {step}: its steps are 1 to {self.total_steps}.")

    def data_of(self, step: int) -> StageData:
        """The stage that a step belongs to."""
        return self.inputs.stages[self._stage_index(step)]

    def program_of(self, step: int) -> StageProgram:
        """Return the program of a step."""
        return self.inputs.programs[self._stage_index(step)]

    def _stage_index(self, step: int) -> int:
        return next(index for index, data in enumerate(self.inputs.stages) if step <= data.stage.last_step)

    def record(self, step: int) -> dict[str, Any] | None:
        """Return the logged training metrics of a step, or None if it was not logged."""
        found = None
        for line in iter_metrics(self.folder.path, containing=str(step).encode()):
            if line["step"] == step and "train/loss" in line and step <= self._last_saved:
                found = line
        return found

    def history(self) -> History:
        """Return the logged training metrics."""
        steps, _, _, values = read_columns(self.folder.path, HISTORY[0], HISTORY[1:])
        return History(steps, *(values[name] for name in HISTORY)).until(self._last_saved)

    def go_before(self, rewind: Rewind) -> None:
        """View the run as it was before it rewound from a failure, without anything written later."""
        self.rewinds = [earlier for earlier in self.rewinds if earlier.faults < rewind.faults]
        self._last_saved = rewind.to

    # Doing it again.

    def saved_steps(self) -> list[int]:
        """Return the steps with a checkpoint, and 0."""
        steps = self._checkpoints.steps() if self._checkpoints else []
        return [0, *(step for step in steps if step <= self._last_saved)]

    def nearest(self, step: int) -> int:
        """Return the last step with a checkpoint at or before this one; 0 for the start."""
        return max(saved for saved in self.saved_steps() if saved <= step)

    def state_at(self, step: int) -> State:
        """Return the state after a step: the nearest valid checkpoint, advanced by the missing steps."""
        return self.advanced(self.saved_state(step), step)

    def saved_state(self, step: int) -> State:
        """The state of the nearest sound checkpoint at or before a step, or else the one that the run began with."""
        return self._placement.shard_state(self._sound_state(step))

    def _sound_state(self, step: int) -> State:
        like = self._placement.abstract(state_shapes(self.inputs.stages[0].stage.config))
        for saved in self.saved_steps()[::-1]:
            if 0 < saved <= step and self._checkpoints:
                try:
                    return self._checkpoints.restore_step(like, saved)
                except CorruptCheckpoint as damage:
                    self._say(f"The checkpoint of step {saved} is damaged ({damage}); an earlier one is taken.")
        return load_initial_state(self.inputs, self.folder, self._placement)

    def advanced(self, state: State, step: int) -> State:
        """A state, whose buffers are gone then, advanced to that after a step. If that takes many steps, it is said."""
        missing = step - int(state.step)
        if missing > FAR:
            self._say(f"{missing:,} steps are recomputed first, from {describe_start(int(state.step))} on.")
        with show_progress(self._console, "steps recomputed") as progress:
            return self.train(state, missing, lambda done: progress(done, missing))[0]

    def batch(self, state: State) -> Batch:
        """Return the batch of the step after a state."""
        return self.batches(state, 1)[0]

    def batches(self, state: State, count: int) -> list[Batch]:
        """The batches that the run read in the `count` steps after a state, which are all of one stage."""
        first = int(state.step)
        source = self.data_of(first + 1).training_batches()
        return [source.batch(step + self._skipped(state, step)) for step in range(first, first + count)]

    def _skipped(self, state: State, step: int) -> int:
        """How many batches the run had passed over after a step, of the stage in which it has come from a state."""
        last = self._last_rewind(step)
        return int(state.loss_stats.skipped) if last is None or last.to < int(state.step) else last.skipped

    def train(
        self, state: State, count: int, made: Callable[[int], object] | None = None
    ) -> tuple[State, list[Metrics]]:
        """The state after `count` more steps, and the metrics of each. The buffers of `state` are gone then.

        `made` is told how many have been made.
        """
        every: list[Metrics] = []
        state = self._rewound(state)
        while len(every) < count:
            step = int(state.step)
            data, program = self.data_of(step + 1), self.program_of(step + 1)
            slots = data.stage.config.training.steps_per_jit_call
            borders = [data.stage.last_step, *(rewind.to for rewind in self.rewinds if rewind.to > step)]
            now = min(slots, min(borders) - step, count - len(every))
            batches = self.batches(state, now)
            # No step reads what fills up the slots.
            batches += [batches[-1]] * (slots - now)
            stacked = Batch(*(np.stack(leaves) for leaves in zip(*batches, strict=True)))
            shared = self._placement.shard_batch(stacked, stacked.tokens_BT.shape[1])
            state, metrics = compiled_train_steps(
                program.static, state, shared, np.int32(now), program.hparams, program.first_step
            )
            history = jax.device_get(metrics)
            every += [jax.tree.map(lambda column, index=index: column[index], history) for index in range(now)]
            state = self._rewound(state)
            if made is not None:
                made(len(every))
        return state, every

    def _rewound(self, state: State) -> State:
        """The state from which the run went on, which is another where it had come back to this step."""
        last = self._last_rewind(int(state.step))
        if last is None or last.to < int(state.step):
            return state
        loss_stats = state.loss_stats._replace(faults=jnp.int32(last.faults), skipped=jnp.int32(last.skipped))
        return self._placement.shard_state(state._replace(loss_stats=loss_stats))

    def _last_rewind(self, step: int) -> Rewind | None:
        return next((rewind for rewind in self.rewinds[::-1] if rewind.to <= step), None)

    def look_into(self, state: State) -> StepInternals:
        """Compute the step after a state, with the statistics of all its tensors. The state is not changed."""
        program, batch = self.program_of(int(state.step) + 1), self.batch(state)
        shared = self._placement.shard_batch(batch, len(batch.tokens_BT))
        metrics, report = compiled_step_intermediates(
            program.static, state, shared, program.hparams, program.first_step
        )
        tensors = list_step_tensors((program.static, program.hparams), state.params, report)
        return StepInternals(batch, metrics, report, tensors)

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)


def read_rewinds(folder: RunDir) -> list[Rewind]:
    """The rewinds of a run. One that was done again, after a kill, is one."""
    names = Rewind._fields
    events = EventLog(folder.journal_file).events_named("rewind", dict.fromkeys(names, int))
    return [Rewind(*rewind) for rewind in dict.fromkeys(tuple(event[name] for name in names) for event in events)]


def describe_start(step: int) -> str:
    """Describe what the state after a step is restored from."""
    return f"the checkpoint of step {step}" if step else "the start"


def to_metric_dict(metrics: Metrics) -> dict[str, float]:
    """Return the metrics of a step under their names in metrics.jsonl."""
    values = {**metrics._asdict(), **metrics.layer_metrics}
    del values["layer_metrics"]
    return {f"train/{name}": value.item() for name, value in values.items()}
