"""Trainer: the position of a run, the arguments of its next call, its hooks, and its run folder."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import jax.numpy as jnp

from rustgpt_jax.atomic_io import NotWritableError, write_atomically
from rustgpt_jax.config.schema import StaticConfig, affects_result, partition, stages
from rustgpt_jax.data.pipeline import Batch
from rustgpt_jax.data.preprocess import StageData, format_data_record
from rustgpt_jax.distributed import LaggedAllReduceMax, all_agree, is_process_zero
from rustgpt_jax.errors import UserError
from rustgpt_jax.model.flops import parameter_shapes
from rustgpt_jax.sharding.sharding_plan import ShardingPlan
from rustgpt_jax.tokenizers import save_tokenizer
from rustgpt_jax.tracking.metric_writer import MetricsWriter, truncate_after
from rustgpt_jax.training.batch_source import BatchSource, make_batch_source
from rustgpt_jax.training.checkpointing import Checkpoints, CorruptCheckpoint
from rustgpt_jax.training.hooks import (
    Evaluate,
    Hook,
    LogMetrics,
    NonFiniteStep,
    PendingMetrics,
    ProgressSink,
    SaveCheckpoint,
    StepEvent,
)
from rustgpt_jax.training.memory_estimate import state_shapes
from rustgpt_jax.training.run_inputs import RunInputs, StageProgram
from rustgpt_jax.training.train_step import (
    Metrics,
    State,
    compiled_init_state,
    compiled_init_state_from_params,
)
from rustgpt_jax.workdir.environment import Program, save_autotune_cache
from rustgpt_jax.workdir.event_log import EventLog, record_launch, record_program
from rustgpt_jax.workdir.params_io import read_parameters
from rustgpt_jax.workdir.run_dir import (
    RunDir,
    check_no_symlinks,
    create_run_dir,
    diff_configs,
    load_config,
    lock_run_dir,
    prepare_run_dir,
)

# Maximum seconds of a call of several steps, because a call cannot be stopped before it is done.
MAX_CALL_SECONDS = 5.0
# Maximum number of files to list in a message.
MAX_LISTED = 4


class Trainer:
    """A run in training. Use it as a context manager, which creates or reopens and locks the run folder.

    Call `begin` before training and `finish` after it. The state itself is held by an executor.

    Attributes:
        step: The number of steps done.
        end_step: The step at which training ends or pauses.
        break_steps: Further steps at which a call has to end.
    """

    def __init__(
        self,
        inputs: RunInputs,
        path: Path,
        origins: Mapping[str, str],
        plan: ShardingPlan,
        until: int | None = None,
    ) -> None:
        """Prepare a run; nothing is read or written yet.

        Args:
            inputs: The config, tokenizer and data.
            path: The run folder.
            origins: The origin of each knob's value, by dotted path.
            plan: The devices and how arrays are sharded over them.
            until: The step at which to pause, None for the end of training.
        """
        self.inputs, self.folder, self.plan = inputs, RunDir(path), plan
        self.end_step = inputs.total_steps if until is None else min(until, inputs.total_steps)
        self.break_steps: Sequence[int] = ()
        self._origins, self._resources = origins, ExitStack()
        self._hooks: tuple[LogMetrics, Evaluate, SaveCheckpoint] | None = None
        self._writer: MetricsWriter | None = None
        self._batch_source: BatchSource | None = None
        self._seconds_per_step, self._recorded_programs = dict[StaticConfig, float](), set[int]()
        self._journal = EventLog(self.folder.journal_file)
        self._pace = LaggedAllReduceMax(math.inf)
        self._state: State | None = None
        self._skipped = 0
        # The step whose evaluation was stopped and has not been repeated yet.
        self._stopped_evaluation: int | None = None

    def __enter__(self) -> "Trainer":
        with self._resources:
            self._resources.enter_context(self.plan.active())
            earlier = self.inputs.earlier
            prepare_run_dir(self.folder.path, self.inputs.config, earlier)
            check_no_symlinks((self.folder.metrics_file, self.folder.samples_file, self.folder.journal_file))
            self._resources.enter_context(lock_run_dir(self.folder.path))
            self._record_config()
            save_tokenizer(self.inputs.tokenizer, self.folder.tokenizer_file)
            by_name = {data.stage.name: data for data in self.inputs.stages}
            write_atomically(self.folder.data_file, format_data_record(by_name.values()))
            self._resources.callback(self._close)
            checkpoints = Checkpoints(self.folder.checkpoints, self.inputs.config, is_writer=True, earlier=earlier)
            self.checkpoints = self._resources.enter_context(checkpoints)
            self.step = self.checkpoints.step() or 0
            self._resources = self._resources.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._resources.__exit__(kind, error, traceback)
        except OSError:
            # On a full disk, closing a file fails again; report the first error.
            if error is None:
                raise

    def _record_config(self) -> None:
        """Write the config to the folder, and any change of it to the journal."""
        path, config, earlier = self.folder.path, self.inputs.config, self.inputs.earlier
        before = load_config(path) if self.folder.config_file.exists() else config
        differing = diff_configs(before, config) if earlier and before != config else {}
        changed = {knob: values for knob, values in differing.items() if affects_result(knob)}
        if changed and earlier[-1].until != max(self.folder.saved_steps, default=0):
            raise UserError(f"{path} was trained by another process in the meantime; give the command again.")
        create_run_dir(path, config, self._origins, earlier)
        if changed:
            self._journal.append("config", step=earlier[-1].until, changes=changed)

    # Position.

    @property
    def is_over(self) -> bool:
        """Whether training has reached its end or diverged."""
        is_at_end = self.step >= self.end_step and not self.owes_evaluation
        return is_at_end or self.diverged_at is not None

    @property
    def owes_evaluation(self) -> bool:
        """Whether the evaluation after the last step was stopped and has to be repeated before the next step."""
        return self.step == self._stopped_evaluation

    @property
    def _nonfinite_step(self) -> NonFiniteStep | None:
        return self._hooks[0].nonfinite_step if self._hooks else None

    @property
    def n_skipped(self) -> int:
        """The number of non-finite steps up to the one at which training ended; 0 if it did not."""
        return self._nonfinite_step.n_skipped if self._nonfinite_step else 0

    @property
    def needs_rewind(self) -> bool:
        """Whether a step is not finite and has to be undone."""
        faults = self.inputs.config.faults
        if self._nonfinite_step is None or faults.nonfinite_policy != "rewind":
            return False
        return self._nonfinite_step.n_skipped <= faults.max_skipped

    @property
    def diverged_at(self) -> int | None:
        """The non-finite step at which training ended, None if there is none."""
        return self._nonfinite_step.step if self._nonfinite_step and not self.needs_rewind else None

    @property
    def stage(self) -> StageData:
        """The stage of the next step, or the last stage at the end of training."""
        return self.inputs.stages[self._stage_index]

    @property
    def program(self) -> StageProgram:
        """The program of the next step."""
        return self.inputs.programs[self._stage_index]

    @property
    def _stage_index(self) -> int:
        stages = self.inputs.stages
        next_step = self.step if self.owes_evaluation else self.step + 1
        return next((index for index, data in enumerate(stages) if next_step <= data.stage.last_step), len(stages) - 1)

    # Training.

    def begin(self, progress: ProgressSink, mode: str = "solo", width: int = 1) -> None:
        """Restore the last valid checkpoint, and drop metrics and samples that were written after it.

        If training is complete already, nothing is written.

        Args:
            progress: Shows the progress of the run.
            mode: How the run is trained: 'solo', or a mode of a population. Recorded in the journal.
            width: The number of runs that the compiled program can train at once. Recorded in the journal.

        Raises:
            UserError: There are checkpoints, but no valid one.
        """
        self._progress = progress
        damaged: dict[int, str] = {}
        if self.step > 0:
            self._state = self.checkpoints.restore(self._like(), on_skipped=damaged.__setitem__)
            self.step, self._skipped = int(self._state.step), int(self._state.loss_stats.skipped)
        for step, reason in damaged.items():
            self._journal.append("damaged", step=step, reason=reason)
            aside = self.checkpoints.quarantine(step)
            progress.message(f"The checkpoint of step {step} is damaged ({reason}); it is now {aside}.")
        self._stopped_evaluation = self._find_stopped_evaluation()
        if self.is_over:
            return
        sizes = self.plan.sizes
        left_out = record_launch(self.folder, self.step, mode, width, self.plan.n_devices, sizes)
        if left_out:
            shown = ", ".join(left_out[:MAX_LISTED]) + (", ..." if len(left_out) > MAX_LISTED else "")
            progress.message(f"Not kept with the code of the run (docs/security.md says why): {shown}.")
        self._open_records()

    def _find_stopped_evaluation(self) -> int | None:
        events = self._journal.events_named("evaluation", {"step": int, "is_done": bool})
        is_stopped = {event["step"]: not event["is_done"] for event in events}.get(self.step, False)
        # Only process 0 has the journal of the run.
        return None if all_agree(not is_stopped) else self.step

    def _like(self) -> State:
        return self.plan.abstract(state_shapes(stages(self.inputs.full_config)[0].config))

    def state(self) -> State:
        """Return the state to continue from: that of the last valid checkpoint, or the initial one. Call it once."""
        state, self._state = self._state, None
        return load_initial_state(self.inputs, self.folder, self.plan) if state is None else state

    def rewind(self) -> State:
        """Go back to the last scheduled checkpoint before the non-finite step, and skip the batches up to that step.

        Returns:
            The state to continue from.

        Raises:
            UserError: The checkpoint is damaged.
        """
        fault = self._go_back()
        try:
            state = self.checkpoints.restore_step(self._like(), self.step) if self.step else self.state()
        except CorruptCheckpoint as damage:
            raise UserError(f"{self.folder.path}: the checkpoint of step {self.step} is damaged: {damage}.") from damage
        loss_stats = state.loss_stats._replace(faults=jnp.int32(fault.n_skipped), skipped=jnp.int32(self._skipped))
        return state._replace(loss_stats=loss_stats)

    def _go_back(self) -> NonFiniteStep:
        """Drop everything after the last scheduled checkpoint before the non-finite step."""
        assert self._nonfinite_step is not None
        fault, self._hooks = self._nonfinite_step, None
        self.checkpoints.wait()
        self.step = self.checkpoints.last_scheduled(fault.step - 1) or 0
        self._skipped += fault.step - self.step
        self._journal.append("rewind", step=fault.step, to=self.step, skipped=self._skipped, faults=fault.n_skipped)
        self._progress.message(
            f"Loss, gradient or update of step {fault.step} is not finite: back to step {self.step}, and on with the "
            f"batches after it ({fault.n_skipped} of {self.inputs.config.faults.max_skipped} forgiven)."
        )
        self.checkpoints.delete_after(self.step)
        self._close()
        self._open_records()
        return fault

    @property
    def is_program_recorded(self) -> bool:
        """Whether the program of the next step has been recorded in this launch."""
        return self._stage_index in self._recorded_programs

    def record_program(self, program: Program) -> None:
        """Record the program of the next step in the journal, and save the compiler's autotuning results."""
        self._recorded_programs.add(self._stage_index)
        record_program(self.folder, self.stage.stage.name, program, self.step)
        save_autotune_cache(self.folder)

    def _open_records(self) -> None:
        # A repeated evaluation that was stopped or killed may have left some of its lines.
        truncate_after(self.folder.samples_file, self.step - self.owes_evaluation)
        truncate_after(self.folder.metrics_file, self.step, keeps_evaluation=not self.owes_evaluation)
        self._writer = MetricsWriter(self.folder.path, self.step)

    def _close(self) -> None:
        self._close_source()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def steps_to_event(self) -> int:
        """Return the maximum number of steps of the next call: it ends at the next evaluation, checkpoint or break."""
        stage = self.stage.stage
        every = stage.config.logging
        events = [_next_multiple(self.step, every.eval_every), _next_multiple(self.step, every.checkpoint_every)]
        events += [step for step in self.break_steps if step > self.step]
        most = min(stage.config.training.steps_per_jit_call, min(stage.last_step, self.end_step, *events) - self.step)
        # The number of steps per call does not change results. The first calls, of unknown duration, take one step.
        seconds = self._pace.update(self._seconds_per_step.get(self.program.static, math.inf))
        return min(most, max(1, int(MAX_CALL_SECONDS / max(seconds, 1e-9))))

    def next_batches(self, count: int) -> Batch:
        """Return the stacked batches of the next call, of `count` steps: this process's rows of them."""
        if self._batch_source is None:
            self._batch_source = make_batch_source(self.stage, self.plan, self.step + self._skipped)
        return self._batch_source.take(count, self.stage.stage.config.training.steps_per_jit_call)

    def on_steps_done(self, n_steps: int, read_metrics: Callable[[], Metrics], seconds: float) -> None:
        """Advance the position after a call was started.

        Args:
            n_steps: The number of steps of the call.
            read_metrics: Waits for the metrics of the steps and returns them. It is called after the next call began.
            seconds: How long the call took to return.
        """
        log, _, _ = self._open_hooks()
        log.on_first_call(self.program.static, seconds)
        log.on_call(PendingMetrics(self.step, n_steps, read_metrics))
        self.step += n_steps

    @property
    def has_event(self) -> bool:
        """Whether a hook is due after the last step."""
        log, evaluate, save = self._open_hooks()
        is_at_end = self.step in (log.data.stage.last_step, self.end_step)
        return evaluate.is_due(self.step) or save.is_due(self.step) or is_at_end

    @property
    def hooks(self) -> Sequence[Hook]:
        """The hooks of the stage of the last step, in the order in which they run."""
        return self._open_hooks()

    def new_event(self, state: State, is_stopped: Callable[[], bool]) -> StepEvent:
        """Return the event to call the hooks with after the last step."""
        return StepEvent(self.step, state, is_stopped, self.owes_evaluation)

    def on_event_done(self, event: StepEvent) -> None:
        """Record that all hooks have run, or that an evaluation was stopped and has to be repeated on resume."""
        data = self._open_hooks()[0].data
        if event.is_evaluation_stopped:
            if not event.owes_evaluation:
                self._journal.append("evaluation", step=self.step, is_done=False)
                self._stopped_evaluation = self.step
            return
        if self._nonfinite_step:
            return
        if self.step == data.stage.end_step:
            self._skipped = 0
        if self.step == data.stage.last_step:
            self._close_source()
            self._hooks = self._hooks if self.step >= self.end_step else None
        if event.owes_evaluation:
            # Only after the checkpoint is marked as the best.
            self._journal.append("evaluation", step=self.step, is_done=True)
            self._stopped_evaluation = None

    def catch_up(self) -> None:
        """Wait for all steps that were started, and write their metrics."""
        if self._hooks is not None:
            self._hooks[0].flush()

    def finish(self) -> None:
        """Wait until the last checkpoint is on disk.

        Raises:
            NotWritableError: It cannot be written, or part of the run folder was deleted in the meantime.
        """
        self.checkpoints.wait()
        if self._writer is None:
            return
        self._writer.check()
        if not self.folder.config_file.exists():
            raise NotWritableError(f"{self.folder.config_file} was deleted while the run was being trained.")
        # Files written by another process of the run may become visible here with a delay.
        if is_process_zero() and self.diverged_at is None and self.step not in self.checkpoints.written():
            raise NotWritableError(f"{self.folder.checkpoints}: the checkpoint of step {self.step} was deleted.")

    def stop(self, state: State) -> None:
        """Save the state after the last step, so that the run can be resumed from there."""
        self.catch_up()
        if self.needs_rewind:
            self._go_back()
        elif self.diverged_at is None:
            is_scheduled = self.owes_evaluation and self._open_hooks()[2].is_due(self.step)
            self.checkpoints.save(state, self.step, is_scheduled=is_scheduled)

    def _open_hooks(self) -> tuple[LogMetrics, Evaluate, SaveCheckpoint]:
        if self._hooks is None:
            assert self._writer is not None, "begin() opens the metrics file"
            data, compares_after = self.stage, self.inputs.compares_after(self.stage)
            log = LogMetrics(data, self._writer, self._progress, self.plan, self._seconds_per_step)
            evaluate = Evaluate(data, self.folder, self.inputs.tokenizer, log, compares_after)
            self._hooks = log, evaluate, SaveCheckpoint(data, self.checkpoints, self.end_step)
        return self._hooks

    def _close_source(self) -> None:
        if self._batch_source is not None:
            self._batch_source.close()
            self._batch_source = None


def load_initial_state(inputs: RunInputs, folder: RunDir, plan: ShardingPlan) -> State:
    """Return the state at step 0: with the parameters in the run folder, if any, else those of the seed."""
    static, hparams = partition(stages(inputs.full_config)[0].config)
    if not folder.parameters_file.exists():
        return compiled_init_state(static, hparams)
    params = read_parameters(folder.parameters_file, plan.abstract(parameter_shapes(inputs.full_config.model)))
    return compiled_init_state_from_params(static, hparams, params)


def _next_multiple(step: int, every: int) -> int:
    """Return the first multiple of `every` after `step`."""
    return (step // every + 1) * every
