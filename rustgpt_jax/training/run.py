"""A run in progress: what it reads, where it stands, what its next call needs, and what is recorded after it."""

from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import jax
import numpy as np

from rustgpt_jax.config import Config, Stage, Structure, config_hash, split, stages
from rustgpt_jax.data.corpora import Turn
from rustgpt_jax.data.pipeline import Batch
from rustgpt_jax.data.prepare import StageData, changed_data, record_data
from rustgpt_jax.errors import UserError
from rustgpt_jax.interop.parameters import read_parameters
from rustgpt_jax.model.cost import parameter_shapes
from rustgpt_jax.parallel.devices import Placement
from rustgpt_jax.runs.folder import RunFolder, create, lock, write_atomically
from rustgpt_jax.runs.metrics import MetricsWriter, keep_until
from rustgpt_jax.tokenizers import Codec, encode_prompt, save_tokenizer
from rustgpt_jax.training.checkpoints import Checkpoints
from rustgpt_jax.training.optimizers import check_decay_groups
from rustgpt_jax.training.population import Orders
from rustgpt_jax.training.recorder import Pending, Recorder, Shows
from rustgpt_jax.training.step import Metrics, Numbers, State, as_arguments, compiled_start, compiled_start_from


class Program(NamedTuple):
    """What a stage runs: the structure selects the compiled program, the rest are its arguments."""

    structure: Structure
    numbers: Numbers
    first_step: np.int32


@dataclass(frozen=True, eq=False)
class Material:
    """What a run is made of: its config as it was written and with the vocabulary filled in, tokenizer and data."""

    config: Config
    whole: Config
    tokenizer: Codec
    stages: list[StageData]

    @property
    def total_steps(self) -> int:
        """The steps of all stages."""
        return self.stages[-1].stage.end_step

    @cached_property
    def programs(self) -> list[Program]:
        """The program of each stage."""
        return [_program(data.stage) for data in self.stages]

    def check(self, run: RunFolder, placement: Placement) -> None:
        """Raises UserError, before anything is compiled or written, for what cannot work."""
        check_decay_groups(parameter_shapes(self.whole.model), self.whole.optimizer)
        for role in {"user" if data.is_dialogue else "text" for data in self.stages}:
            _check_prompts(self.whole, self.tokenizer, role)
        for data in self.stages:
            placement.check_batch(data.stage.config.training)
        changed = changed_data(run.data_file, self.stages)
        if changed:
            again = "give back the old text, or choose another --run folder"
            raise UserError(f"{run.path}: the text of stage {changed[0]!r} is not what the run began with; {again}.")


def _program(stage: Stage) -> Program:
    structure, numbers = split(stage.config)
    return Program(structure, as_arguments(numbers), np.int32(stage.first_step))


def _check_prompts(config: Config, tokenizer: Codec, role: str) -> None:
    for prompt in config.record.prompts:
        length = len(encode_prompt(tokenizer, [Turn(role, prompt)]))
        if length >= config.model.context_length:
            raise UserError(
                f"config.record.prompts: {prompt!r} takes {length} tokens and leaves no room in "
                f"config.model.context_length={config.model.context_length}."
            )


class Run:
    """A run in its folder, held by this process. Use it in a `with` statement, which makes or reopens the folder.

    `until` is a step at which to pause; None is the end. Raises UserError as `create` and `lock` do.
    """

    def __init__(
        self,
        material: Material,
        path: Path,
        origins: Mapping[str, str],
        placement: Placement,
        until: int | None = None,
    ) -> None:
        self.material, self.folder, self.placement = material, RunFolder(path), placement
        self.end_step = material.total_steps if until is None else min(until, material.total_steps)
        self._origins, self._resources = origins, ExitStack()
        self._recorder: Recorder | None = None
        self._source: Generator[Batch, None, None] | None = None
        self._compiled = set[Structure]()

    def __enter__(self) -> "Run":
        with self._resources:
            create(self.folder.path, self.material.config, self._origins)
            self._resources.enter_context(lock(self.folder.path))
            save_tokenizer(self.material.tokenizer, self.folder.tokenizer_file)
            write_atomically(self.folder.data_file, record_data(self.material.stages))
            checkpoints = Checkpoints(self.folder.checkpoints, config_hash(self.material.config))
            self.checkpoints = self._resources.enter_context(checkpoints)
            self.step = self.checkpoints.step() or 0
            self._resources = self._resources.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close_source()
        self._resources.close()

    # Where it stands.

    @property
    def is_over(self) -> bool:
        """Whether there is nothing more to do: it has reached its end, or diverged."""
        return self.step >= self.end_step or self.diverged_at is not None

    @property
    def diverged_at(self) -> int | None:
        """The step whose training loss was not finite, if there was one."""
        return self._recorder.diverged_at if self._recorder else None

    @property
    def stage(self) -> StageData:
        """The stage of the next step, or of the last one."""
        return self.material.stages[self._stage_index]

    @property
    def program(self) -> Program:
        """What the next step runs."""
        return self.material.programs[self._stage_index]

    @property
    def _stage_index(self) -> int:
        stages = self.material.stages
        return next((index for index, data in enumerate(stages) if self.step < data.stage.end_step), len(stages) - 1)

    # Going on.

    def begin(self, progress: Shows) -> None:
        """Open the records, without what a killed process wrote after the last checkpoint."""
        keep_until(self.folder.samples_file, self.step)
        self._progress = progress
        self._writer = self._resources.enter_context(MetricsWriter(self.folder.path, self.step))

    def state(self) -> State:
        """The state to go on from: that of the last checkpoint, or the one that the seed gives."""
        structure, numbers = split(stages(self.material.whole)[0].config)
        arguments = as_arguments(numbers)
        if self.step == 0 and self.folder.parameters_file.exists():
            shapes = parameter_shapes(self.material.whole.model)
            return compiled_start_from(structure, arguments, read_parameters(self.folder.parameters_file, shapes))
        if self.step == 0:
            return compiled_start(structure, arguments)
        return self.checkpoints.restore(jax.eval_shape(lambda: compiled_start(structure, arguments)))

    def steps_to_event(self) -> int:
        """How many steps the next call may take: to the next evaluation or checkpoint, and as many as it has slots."""
        stage, record = self.stage.stage, self.stage.stage.config.record
        events = (_next(self.step, record.evaluate_every), _next(self.step, record.checkpoint_every))
        return min(stage.config.training.steps_per_call, min(stage.end_step, self.end_step, *events) - self.step)

    def orders(self, count: int) -> Orders:
        """The arguments of the next call, for its next `count` steps."""
        slots = self.stage.stage.config.training.steps_per_call
        if self._source is None:
            self._source = self.stage.training_batches().iterate(self.step)
        batches = [next(self._source) for _ in range(count)]
        # No step reads what fills up the slots.
        batches += [batches[-1]] * (slots - count)
        stacked = Batch(*(np.stack(leaves) for leaves in zip(*batches, strict=True)))
        return Orders(stacked, np.int32(count), self.program.numbers, self.program.first_step)

    def advanced(self, count: int, read_metrics: Callable[[], Metrics], seconds: float) -> None:
        """Take note of a call that took `seconds` to return; its metrics are read later."""
        recorder = self._open_recorder()
        recorder.called(self.program.structure, seconds)
        recorder.trained(Pending(self.step, count, read_metrics))
        self.step += count

    @property
    def is_due(self) -> bool:
        """Whether there is something to be done with the state after the step just made."""
        return self._evaluates or self._saves or self.step == self.end_step

    def record(self, state: State) -> None:
        """Evaluate and save the state after the step just made, where that is due."""
        recorder = self._open_recorder()
        recorder.flush()
        if self.diverged_at is None:
            is_best = self._evaluates and recorder.evaluate(state, self.step)
            if self._saves or is_best or self.step == self.end_step:
                self.checkpoints.save(state, self.step, is_best)
        if self.step == recorder.data.stage.end_step:
            self._close_source()
            self._recorder = self._recorder if self.is_over else None

    def stop(self, state: State) -> None:
        """Save the state after the last step made, so that the run can go on from there."""
        if self._recorder:
            self._recorder.flush()
        if self.diverged_at is None:
            self.checkpoints.save(state, self.step)

    @property
    def _evaluates(self) -> bool:
        stage = self._open_recorder().data.stage
        return self.step % stage.config.record.evaluate_every == 0 or self.step == stage.end_step

    @property
    def _saves(self) -> bool:
        stage = self._open_recorder().data.stage
        return self.step % stage.config.record.checkpoint_every == 0 or self.step == stage.end_step

    def _open_recorder(self) -> Recorder:
        if self._recorder is None:
            self._recorder = Recorder(
                self.material.whole,
                self.stage,
                self.folder,
                self.material.tokenizer,
                self._writer,
                self._progress,
                self.placement,
                self._compiled,
            )
        return self._recorder

    def _close_source(self) -> None:
        if self._source is not None:
            self._source.close()
            self._source = None


def _next(step: int, every: int) -> int:
    """The first multiple of `every` after `step`."""
    return (step // every + 1) * every
