"""The trainer of a run: its step, batches, hooks, checkpoints and run folder."""

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
from rustgpt_jax.tracking.metric_writer import RunWriter, TrackedRun, truncate_after
from rustgpt_jax.tracking.trackers import flatten_params, open_trackers
from rustgpt_jax.training.batch_source import BatchSource, make_batch_source
from rustgpt_jax.training.checkpointing import Checkpoints, CorruptCheckpoint
from rustgpt_jax.training.hooks import (
    Evaluate,
    HookContext,
    LogMetrics,
    NonFiniteStep,
    PendingMetrics,
    ProgressSink,
    SaveCheckpoint,
)
from rustgpt_jax.training.memory_estimate import state_shapes
from rustgpt_jax.training.run_inputs import RunInputs, StageProgram
from rustgpt_jax.training.train_step import (
    Metrics,
    TrainState,
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
    """Training of one run. Use it as a context manager, which creates or opens the run folder and locks it.

    Call `begin` before training and `finish` after it. The state is held by an executor.

    Attributes:
        step: The number of steps done.
        end_step: The step at which training ends or pauses.
        break_steps: Additional steps at which a call has to end.
    """

    def __init__(
        self,
        inputs: RunInputs,
        path: Path,
        origins: Mapping[str, str],
        plan: ShardingPlan,
        until: int | None = None,
        sweep: Path | None = None,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        """Initialize without reading or writing anything.

        Args:
            inputs: The config, tokenizer and data.
            path: The run folder.
            origins: The origin of each knob's value, by dotted path.
            plan: The devices and how arrays are sharded over them.
            until: The step at which to pause; None to train to the end.
            sweep: For a trial, the folder of its sweep.
            warn: Tells the user that a tracker failed, from another thread; None for a message of the progress.
        """
        self.inputs, self.folder, self.plan = inputs, RunDir(path), plan
        self.end_step = inputs.total_steps if until is None else min(until, inputs.total_steps)
        self.break_steps: Sequence[int] = ()
        self._origins, self._resources, self._sweep, self._warn = origins, ExitStack(), sweep, warn
        self._is_failed = False
        self._hooks: tuple[LogMetrics, Evaluate, SaveCheckpoint] | None = None
        self._writer: RunWriter | None = None
        self._batch_source: BatchSource | None = None
        self._seconds_per_step, self._recorded_programs = dict[StaticConfig, float](), set[int]()
        self._events = EventLog(self.folder.events_file)
        self._pace = LaggedAllReduceMax(math.inf)
        self._state: TrainState | None = None
        self._skipped = 0
        # The step whose evaluation was stopped and not repeated yet.
        self._stopped_evaluation: int | None = None

    def __enter__(self) -> "Trainer":
        with self._resources:
            self._resources.enter_context(self.plan.use_mesh())
            earlier = self.inputs.earlier
            prepare_run_dir(self.folder.path, self.inputs.config, earlier)
            check_no_symlinks((self.folder.metrics_file, self.folder.samples_file, self.folder.events_file))
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
        self._is_failed = error is not None
        try:
            self._resources.__exit__(kind, error, traceback)
        except OSError:
            # On a full disk, closing a file fails too: report the first error.
            if error is None:
                raise

    def _record_config(self) -> None:
        """Write the config to the folder, and its changes to the event log."""
        path, config, earlier = self.folder.path, self.inputs.config, self.inputs.earlier
        before = load_config(path) if self.folder.config_file.exists() else config
        differing = diff_configs(before, config) if earlier and before != config else {}
        changed = {knob: values for knob, values in differing.items() if affects_result(knob)}
        if changed and earlier[-1].until != max(self.folder.saved_steps, default=0):
            raise UserError(f"{path} was trained by another process in the meantime; repeat the command.")
        create_run_dir(path, config, self._origins, earlier)
        if changed:
            self._events.append("config", step=earlier[-1].until, changes=changed)

    # Progress.

    @property
    def is_finished(self) -> bool:
        """True if training has reached its end or diverged."""
        is_at_end = self.step >= self.end_step and not self.has_pending_evaluation
        return is_at_end or self.diverged_at is not None

    @property
    def has_pending_evaluation(self) -> bool:
        """True if the evaluation after the last step was stopped, and has to be repeated before the next step."""
        return self.step == self._stopped_evaluation

    @property
    def _nonfinite_step(self) -> NonFiniteStep | None:
        return self._hooks[0].nonfinite_step if self._hooks else None

    @property
    def n_nonfinite(self) -> int:
        """The number of non-finite steps up to the one at which training ended; 0 if it did not."""
        return self._nonfinite_step.n_nonfinite if self._nonfinite_step else 0

    @property
    def needs_rewind(self) -> bool:
        """True if a step is not finite and the run has to go back to a checkpoint."""
        faults = self.inputs.config.faults
        if self._nonfinite_step is None or faults.nonfinite_policy != "rewind":
            return False
        return self._nonfinite_step.n_nonfinite <= faults.max_skipped

    @property
    def diverged_at(self) -> int | None:
        """The non-finite step at which training ended, or None."""
        return self._nonfinite_step.step if self._nonfinite_step and not self.needs_rewind else None

    @property
    def stage(self) -> StageData:
        """The stage of the next step, or the last stage at the end of training."""
        return self.inputs.stages[self._stage_index]

    @property
    def program(self) -> StageProgram:
        """The program of the next step, and its constant arguments."""
        return self.inputs.programs[self._stage_index]

    @property
    def _stage_index(self) -> int:
        stages = self.inputs.stages
        next_step = self.step if self.has_pending_evaluation else self.step + 1
        return next((index for index, data in enumerate(stages) if next_step <= data.stage.last_step), len(stages) - 1)

    # Training.

    def begin(self, progress: ProgressSink, mode: str = "solo", width: int = 1) -> None:
        """Restore the last valid checkpoint, and drop metrics and samples that were written after it.

        If training is complete already, nothing is written.

        Args:
            progress: Shows the progress of the run.
            mode: 'solo', or the mode of the population, for the event log.
            width: The number of runs that the compiled program can train at once, for the event log.

        Raises:
            UserError: There are checkpoints, but none is valid.
        """
        self._progress = progress
        damaged: dict[int, str] = {}
        if self.step > 0:
            self._state = self.checkpoints.restore(self._abstract_state(), on_skipped=damaged.__setitem__)
            self.step, self._skipped = int(self._state.step), int(self._state.loss_stats.skipped)
        for step, reason in damaged.items():
            self._events.append("damaged", step=step, reason=reason)
            new_path = self.checkpoints.quarantine(step)
            progress.message(f"The checkpoint of step {step} is damaged ({reason}); it was renamed to {new_path}.")
        events = self._events.events_named("evaluation", {"step": int, "is_done": bool})
        is_unfinished = {event["step"]: not event["is_done"] for event in events}.get(self.step, False)
        # Only process 0 has the event log of the run.
        self._stopped_evaluation = None if all_agree(not is_unfinished) else self.step
        if self.is_finished:
            return
        excluded = record_launch(self.folder, self.step, mode, width, self.plan.n_devices, self.plan.sizes)
        if excluded:
            listed = ", ".join(excluded[:MAX_LISTED]) + (", ..." if len(excluded) > MAX_LISTED else "")
            progress.message(f"Not copied with the code of the run (docs/concepts/security.md explains why): {listed}.")
        self._open_metrics()

    def _abstract_state(self) -> TrainState:
        return self.plan.add_shardings(state_shapes(stages(self.inputs.full_config)[0].config))

    def state(self) -> TrainState:
        """Return the state of the last valid checkpoint, or the initial state. Call this only once."""
        state, self._state = self._state, None
        return load_initial_state(self.inputs, self.folder, self.plan) if state is None else state

    def rewind(self) -> TrainState:
        """Go back to the last scheduled checkpoint before the non-finite step, and skip the batches up to that step.

        Returns:
            The state to continue from.

        Raises:
            UserError: The checkpoint is damaged.
        """
        n_nonfinite = self.n_nonfinite
        self._undo_steps()
        try:
            state = self.checkpoints.restore_step(self._abstract_state(), self.step) if self.step else self.state()
        except CorruptCheckpoint as damage:
            raise UserError(f"{self.folder.path}: the checkpoint of step {self.step} is damaged: {damage}.") from damage
        loss_stats = state.loss_stats._replace(faults=jnp.int32(n_nonfinite), skipped=jnp.int32(self._skipped))
        return state._replace(loss_stats=loss_stats)

    def _undo_steps(self) -> None:
        """Delete everything after the last scheduled checkpoint before the non-finite step."""
        assert self._nonfinite_step is not None
        (bad_step, count), self._hooks = self._nonfinite_step, None
        self.checkpoints.wait()
        self.step = self.checkpoints.last_scheduled(bad_step - 1) or 0
        self._skipped += bad_step - self.step
        self._events.append("rewind", step=bad_step, to=self.step, skipped=self._skipped, faults=count)
        self._progress.message(
            f"The loss, gradient or update of step {bad_step} is not finite: going back to step {self.step}, to "
            f"continue with the batches after step {bad_step} ({count} of "
            f"{self.inputs.config.faults.max_skipped} tolerated)."
        )
        self.checkpoints.delete_after(self.step)
        self._close_source()
        self._truncate_record()
        if self._writer is not None:
            self._writer.rewind(self.step)

    @property
    def is_program_recorded(self) -> bool:
        """True if the program of the next step has been recorded in this launch."""
        return self._stage_index in self._recorded_programs

    def record_program(self, program: Program) -> None:
        """Record the program of the next step in the event log, and save the compiler's autotuning results."""
        self._recorded_programs.add(self._stage_index)
        record_program(self.folder, self.stage.stage.name, program, self.step)
        save_autotune_cache(self.folder)

    def _truncate_record(self) -> None:
        # An evaluation that was stopped or killed may have left some of its lines.
        truncate_after(self.folder.samples_file, self.step - self.has_pending_evaluation)
        truncate_after(self.folder.metrics_file, self.step, keeps_evaluation=not self.has_pending_evaluation)

    def _open_metrics(self) -> None:
        self._truncate_record()
        config, message = self.inputs.config, self._progress.message
        swept = {path: value for path, value in flatten_params(config).items() if self._origins.get(path) == "sweep"}
        run = TrackedRun(
            folder=self.folder.path,
            params=flatten_params(config),
            project=config.logging.project,
            tags=config.logging.tags,
            resume_step=self.step,
            sweep=self._sweep,
            notes=", ".join(f"{path}={value}" for path, value in swept.items()),
        )
        # Other processes write copies of the run folder that are not kept.
        names = config.logging.trackers if is_process_zero() else ()
        self._writer = RunWriter(self.folder.path, self.step, open_trackers(names, run, message, self._warn or message))
        earlier = self.inputs.earlier
        if self.step and earlier and earlier[-1].until == self.step:
            # The steps after this one are repeated with another config.
            self._writer.rewind(self.step)

    def _close(self) -> None:
        self._close_source()
        if self._writer is not None:
            self._writer.close(self._status)
            self._writer = None

    @property
    def _status(self) -> str:
        """The status of the run for trackers."""
        if self.diverged_at is not None:
            return "diverged"
        if self._is_failed:
            return "failed"
        return "finished" if self.step >= self.inputs.total_steps and self.is_finished else "stopped"

    def steps_to_next_hook(self) -> int:
        """Return the maximum number of steps of the next call, which ends where a hook is due or at a break step."""
        stage = self.stage.stage
        logging = stage.config.logging
        due = [(self.step // every + 1) * every for every in (logging.eval_every, logging.checkpoint_every)]
        due += [step for step in self.break_steps if step > self.step]
        most = min(stage.config.training.steps_per_jit_call, min(stage.last_step, self.end_step, *due) - self.step)
        # The number of steps per call does not change results. It is one until the duration of a step is known.
        seconds = self._pace.update(self._seconds_per_step.get(self.program.static, math.inf))
        return min(most, max(1, int(MAX_CALL_SECONDS / max(seconds, 1e-9))))

    def next_batches(self, count: int) -> Batch:
        """Return this process's rows of the batches of the next `count` steps, stacked."""
        if self._batch_source is None:
            self._batch_source = make_batch_source(self.stage, self.plan, self.step + self._skipped)
        return self._batch_source.next_batches(count, self.stage.stage.config.training.steps_per_jit_call)

    def on_steps_dispatched(self, n_steps: int, read_metrics: Callable[[], Metrics], seconds: float) -> None:
        """Advance the step counter after the compiled steps have been dispatched.

        Args:
            n_steps: The number of steps of the call.
            read_metrics: Waits for the metrics of the steps and returns them. It is called after the next call starts.
            seconds: The time until the call returned.
        """
        self.hooks[0].on_call(PendingMetrics(self.step, n_steps, read_metrics), seconds)
        self.step += n_steps

    @property
    def is_hook_due(self) -> bool:
        """True if a hook is due after the last step."""
        log, evaluate, save = self.hooks
        is_at_end = self.step in (log.data.stage.last_step, self.end_step)
        return evaluate.is_due(self.step) or save.is_due(self.step) or is_at_end

    def make_hook_context(self, state: TrainState, is_stop_requested: Callable[[], bool]) -> HookContext:
        """Return the argument for the hooks after the last step."""
        return HookContext(self.step, state, is_stop_requested, self.has_pending_evaluation)

    def on_hooks_done(self, context: HookContext) -> None:
        """Record that all hooks were called, or that an evaluation was stopped and has to be repeated."""
        data = self.hooks[0].data
        if context.is_evaluation_stopped:
            if not context.has_pending_evaluation:
                self._events.append("evaluation", step=self.step, is_done=False)
                self._stopped_evaluation = self.step
            return
        if self._nonfinite_step:
            return
        if self.step == data.stage.end_step:
            self._skipped = 0
        if self.step == data.stage.last_step:
            self._close_source()
            self._hooks = self._hooks if self.step >= self.end_step else None
        if context.has_pending_evaluation:
            # After the checkpoint is marked as the best.
            self._events.append("evaluation", step=self.step, is_done=True)
            self._stopped_evaluation = None

    def flush_metrics(self) -> None:
        """Wait for all steps that were started, and write their metrics."""
        if self._hooks is not None:
            self._hooks[0].flush()

    def finish(self) -> None:
        """Wait until the last checkpoint is on disk.

        Raises:
            NotWritableError: It cannot be written, or a file of the run folder was deleted.
        """
        self.checkpoints.wait()
        if self._writer is None:
            return
        self._writer.check()
        if not self.folder.config_file.exists():
            raise NotWritableError(f"{self.folder.config_file} was deleted during training.")
        # Files written by other processes may become visible with a delay.
        if is_process_zero() and self.diverged_at is None and self.step not in self.checkpoints.steps_on_disk():
            raise NotWritableError(f"{self.folder.checkpoints}: the checkpoint of step {self.step} was deleted.")
        self._writer.begin_close(self._status)

    def stop(self, state: TrainState) -> None:
        """Save the state after the last step, so that the run can be resumed."""
        self.flush_metrics()
        if self.needs_rewind:
            self._undo_steps()
        elif self.diverged_at is None:
            is_scheduled = self.has_pending_evaluation and self.hooks[2].is_due(self.step)
            self.checkpoints.save(state, self.step, is_scheduled=is_scheduled)

    @property
    def hooks(self) -> tuple[LogMetrics, Evaluate, SaveCheckpoint]:
        """The hooks of the stage of the last step, in the order in which they are called."""
        if self._hooks is None:
            assert self._writer is not None, "begin() opens the metrics file"
            data, incomparable_until = self.stage, self.inputs.last_incomparable_step(self.stage)
            log = LogMetrics(data, self._writer, self._progress, self.plan, self._seconds_per_step)
            evaluate = Evaluate(data, self.folder, self.inputs.tokenizer, log, incomparable_until)
            self._hooks = log, evaluate, SaveCheckpoint(data, self.checkpoints, self.end_step)
        return self._hooks

    def _close_source(self) -> None:
        if self._batch_source is not None:
            self._batch_source.close()
            self._batch_source = None


def load_initial_state(inputs: RunInputs, folder: RunDir, plan: ShardingPlan) -> TrainState:
    """Return the state at step 0, with parameters from the run folder if there are any, else random ones."""
    static, hparams = partition(stages(inputs.full_config)[0].config)
    if not folder.parameters_file.exists():
        return compiled_init_state(static, hparams)
    params = read_parameters(folder.parameters_file, plan.add_shardings(parameter_shapes(inputs.full_config.model)))
    return compiled_init_state_from_params(static, hparams, params)
