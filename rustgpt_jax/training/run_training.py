"""Training of a run from start to finish: preparation, the loop, and messages to the user."""

import math
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import jax
from rich.console import Console

from rustgpt_jax.atomic_io import NotWritableError
from rustgpt_jax.cache_dir import cache_folder
from rustgpt_jax.config.schema import EPOCHS, STEPS, Config, uses_epochs
from rustgpt_jax.data.preprocess import (
    ResolvedEpochs,
    resolve_epochs_of_text,
)
from rustgpt_jax.distributed import EXIT_USER_ERROR, LaggedAllReduceMax, Watchdog, is_process_zero, process_zero_first
from rustgpt_jax.errors import UserError, program_name
from rustgpt_jax.model.flops import parameter_shapes, total_size
from rustgpt_jax.model.kernels.verify import check_kernels
from rustgpt_jax.process_setup import StopRequest
from rustgpt_jax.sharding.hardware_specs import query_machine
from rustgpt_jax.sharding.sharding_plan import check_host_offload, describe_mesh, plan_for_all_devices
from rustgpt_jax.tokenizers import Tokenizer
from rustgpt_jax.tracking.console import Progress, StartupTimer, format_count, format_duration, show_progress
from rustgpt_jax.tracking.plots import draw_loss_curves
from rustgpt_jax.training.config_checks import plan_resume, validate_components
from rustgpt_jax.training.loop import SingleRunExecutor, run_training_loop
from rustgpt_jax.training.memory_estimate import check_training_memory
from rustgpt_jax.training.run_inputs import prepare_inputs, prepare_tokenizer
from rustgpt_jax.training.trainer import Trainer
from rustgpt_jax.workdir.code_snapshot import record_code
from rustgpt_jax.workdir.run_dir import RunDir, scratch_run_dir

# With more blocks than this compiled separately, compilation takes a long time.
MANY_BLOCKS = 200


class StepTracer:
    """A tracer of a range of steps with the JAX profiler, as requested by `--profile=START:STOP`.

    Raises:
        UserError: The text is not START:STOP, or the run does not have these steps.
    """

    def __init__(self, text: str, total_steps: int, folder: Path) -> None:
        start, colon, stop = text.partition(":")
        if not colon or not (start.isdecimal() and stop.isdecimal()):
            raise UserError(f"--profile={text}: give the steps as START:STOP, such as --profile=10:15.")
        if not int(start) < int(stop) <= total_steps:
            raise UserError(f"--profile={text}: the run has {total_steps} steps, and START has to be less than STOP.")
        self.start_step, self.stop_step, self.folder = int(start), int(stop), folder
        self._is_tracing = False

    def before_call(self, run: Trainer, progress: Progress) -> None:
        """Start or stop the profiler if the run is at one of the steps, after all earlier steps are done."""
        run.break_steps = self.start_step, self.stop_step
        if run.step not in run.break_steps:
            return
        run.flush_metrics()
        if run.step == self.start_step and not self._is_tracing:
            jax.profiler.start_trace(self.folder, create_perfetto_trace=True)
            self._is_tracing = True
            progress.message(f"Tracing steps {self.start_step + 1} to {self.stop_step}.")
        elif run.step == self.stop_step and self._is_tracing:
            self.stop()
            progress.message(f"The trace is in {self.folder}; docs/performance.md explains how to read it.")

    def stop(self) -> None:
        """Write the trace, if the profiler is on."""
        if self._is_tracing:
            jax.profiler.stop_trace()
            self._is_tracing = False


def train(
    config: Config,
    path: Path,
    origins: Mapping[str, str],
    console: Console,
    barrier_timeout: float = math.inf,
    profile: str | None = None,
    allow_oversubscription: bool = False,
    extends: bool = False,
) -> int:
    """Train a run in a folder, resuming from its last valid checkpoint if there is one.

    If several processes train the run, each must call this function.

    Args:
        config: The config of the run.
        path: The run folder.
        origins: The origin of each knob's value, by dotted path.
        console: The console to print to.
        barrier_timeout: Seconds to wait for other processes before exiting.
        profile: The steps to trace with the profiler, as START:STOP.
        allow_oversubscription: Whether to start even if the memory is too small.
        extends: Whether to allow more steps than the learning-rate schedule of the run was made for.

    Returns:
        The exit status: 0 if training is complete, or the one for a stop by a signal.

    Raises:
        UserError: The config cannot work (raised before anything is compiled or written), the folder is no longer
            writable, or the run diverged.
    """
    startup_timer = StartupTimer("Python and packages")
    validate_components(config)
    # Read the code now: it may be edited while the data are prepared.
    record_code()
    resolved, tokenizer = _resolve_epochs(config, RunDir(path).tokenizer_file, console)
    config, earlier, messages = plan_resume(path, resolved.config, extends)
    origins = {**origins, **resolved.origins}
    for message in (*resolved.messages, *messages):
        console.print(message, markup=False, highlight=False, soft_wrap=True)
    plan = plan_for_all_devices(config.mesh)
    check_host_offload(config)
    check_training_memory(config, query_machine(), plan.sizes, allow_oversubscription)
    remedy = "The same command continues from the last checkpoint."
    # Only process 0 writes to the run folder.
    with nullcontext(path) if is_process_zero() else scratch_run_dir(path, config, origins) as folder:
        with process_zero_first("data"):
            inputs = prepare_inputs(config, RunDir(folder).tokenizer_file, console, earlier, tokenizer)
        # Check again, now that the vocabulary size is known.
        check_training_memory(inputs.full_config, query_machine(), plan.sizes, allow_oversubscription)
        inputs.check(RunDir(folder), plan.n_devices)
        startup_timer.lap("the data")
        tracer = None if profile is None else StepTracer(profile, inputs.total_steps, path / "profile")
        with Trainer(inputs, folder, origins, plan) as run:
            # Closing the run waits for other processes, without the watchdog.
            with Watchdog(barrier_timeout, remedy) as watchdog:
                status = _run_to_end(run, path, console, watchdog, startup_timer, tracer)
            if run.diverged_at is not None:
                raise UserError(_divergence_message(run, path))
            return status


def _resolve_epochs(config: Config, tokenizer_file: Path, console: Console) -> tuple[ResolvedEpochs, Tokenizer | None]:
    """Convert epochs to steps. Returns the tokenizer too, if it was needed to count the training sequences.

    Raises:
        UserError: The text is unsuitable, or several processes train the run.
    """
    if not uses_epochs(config):
        return ResolvedEpochs(config, {}, {}, []), None
    if jax.process_count() > 1:
        raise UserError(
            f"config.{EPOCHS}: with several processes, give the number of steps, config.{STEPS}; "
            f"`{program_name()} explain` prints it."
        )
    tokenizer = prepare_tokenizer(config, tokenizer_file, console)
    with show_progress(console, "characters encoded") as progress:
        return resolve_epochs_of_text(config, tokenizer, cache_folder(), progress), tokenizer


def _run_to_end(
    run: Trainer,
    path: Path,
    console: Console,
    watchdog: Watchdog,
    startup_timer: StartupTimer,
    tracer: StepTracer | None,
) -> int:
    total_steps = run.inputs.total_steps
    began = time.perf_counter()
    with StopRequest() as stop, Progress(console, total_steps) as progress, _translate_io_errors(run):
        run.begin(progress)
        if run.is_finished:
            progress.message(f"{path} is complete: {total_steps} steps. There is nothing to do.")
            return 0
        for message in (_headline(run, path), *_compile_time_warnings(run), *_attention_messages(run)):
            progress.message(message)
        startup_timer.lap("the folder")
        executor = SingleRunExecutor(run)
        startup_timer.lap("the first state")
        first_step = run.step

        def before_call() -> None:
            if run.step > first_step and (phases := startup_timer.finish("compiling")):
                progress.message(f"The first step began after {phases}.")
            if tracer is not None:
                tracer.before_call(run, progress)

        run_training_loop([run], executor, _make_stop_check(stop, watchdog), before_call)
        if tracer is not None:
            # Training may have been stopped before the last step to trace.
            tracer.stop()
        run.finish()
    if run.diverged_at is not None:
        return EXIT_USER_ERROR
    if not run.is_finished:
        remedy = "The same command continues from there."
        console.print(f"Stopped by {stop.signal_name} at step {run.step}, saved. {remedy}", highlight=False)
        return stop.exit_status
    took = format_duration(time.perf_counter() - began)
    try:
        curves = f"Loss curves: {draw_loss_curves(run.folder.path)}"
    except UserError as error:
        curves = str(error)
    console.print(f"Done in {took}. {curves}", highlight=False, soft_wrap=True)
    return 0


def _make_stop_check(stop: StopRequest, watchdog: Watchdog) -> Callable[[], bool]:
    """Return a function that returns whether any process was asked to stop. All processes get the same answer."""
    votes = LaggedAllReduceMax(0)

    def is_stop_requested() -> bool:
        watchdog.heartbeat()
        number = int(votes.update(stop.signal_number))
        if number:
            stop.signal_name = signal.Signals(number).name
        return number > 0

    return is_stop_requested


def _divergence_message(run: Trainer, path: Path) -> str:
    n_tolerated = run.n_nonfinite - 1
    before = f", after {n_tolerated} that were tolerated (config.faults.max_skipped)" if n_tolerated > 0 else ""
    return (
        f"{path} diverged: the loss, the gradient or the update of step {run.diverged_at} is not finite{before}, and "
        f"training ended there. The last checkpoint is from step {run.checkpoints.step() or 0}. A lower learning "
        f"rate usually helps; `{program_name()} doctor {shlex.quote(str(path))}` looks for the cause."
    )


@contextmanager
def _translate_io_errors(run: Trainer) -> Iterator[None]:
    """Convert I/O errors to a UserError that names the last complete checkpoint."""
    try:
        yield
    except (OSError, NotWritableError) as error:
        reason = f"{error.filename or run.folder.path}: {error.strerror}." if isinstance(error, OSError) else error
        # A checkpoint may still be being written, and may succeed.
        with suppress(NotWritableError):
            run.checkpoints.wait()
        steps = run.checkpoints.steps_on_disk()
        last = f"the checkpoint of step {steps[-1]} is complete" if steps else "there is no checkpoint"
        raise UserError(f"{reason} Training stopped at step {run.step}; {last}.") from error


def _compile_time_warnings(run: Trainer) -> list[str]:
    """Return a warning if many blocks are compiled separately."""
    model = run.inputs.full_config.model
    n_repeats, n_left = divmod(model.n_layers, model.period)
    n_blocks = model.n_layers if not model.scan_layers else n_left + (model.period if n_repeats else 0)
    if n_blocks <= MANY_BLOCKS:
        return []
    cause = f"config.model.scan_layers={model.scan_layers}, and a pattern of {model.period}"
    return [
        f"{n_blocks:,} blocks are compiled one by one, which may take many minutes ({cause}); with scan_layers=True "
        "and a short pattern, only a few are."
    ]


def _attention_messages(run: Trainer) -> list[str]:
    """Check the attention kernels against the reference implementation, and return messages about those in use."""
    findings = [
        finding
        for data in {data.seq_len: data for data in run.inputs.stages}.values()
        for finding in check_kernels(data.stage.config.model, data.seq_len)
    ]
    messages = list(dict.fromkeys(finding.message for finding in findings))
    return messages if any(finding.choice.kernel != "reference" for finding in findings) else []


def _headline(run: Trainer, path: Path) -> str:
    parameters = format_count(total_size(parameter_shapes(run.inputs.full_config.model)))
    begin = f"from step {run.step}" if run.step else "from the start"
    devices = f"{run.plan.n_devices} x {jax.devices()[0].device_kind}"
    mesh = f" ({describe_mesh(run.plan.sizes)})" if run.plan.n_devices > 1 else ""
    return f"{path}: {parameters} parameters, {run.inputs.total_steps} steps {begin}, on {devices}{mesh}"
