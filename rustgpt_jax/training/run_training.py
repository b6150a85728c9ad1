"""Training as a whole: from a config to a finished run."""

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
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
from rustgpt_jax.errors import UserError
from rustgpt_jax.model.flops import parameter_shapes, total_size
from rustgpt_jax.model.kernels.verify import check_kernels
from rustgpt_jax.sharding.hardware_specs import query_machine
from rustgpt_jax.sharding.sharding_plan import check_host_offload, describe_mesh, plan_for_all_devices
from rustgpt_jax.tokenizers import Tokenizer
from rustgpt_jax.tracking.console import Progress, StartupTimer, format_count, format_duration, show_progress
from rustgpt_jax.tracking.plots import draw_loss_curves
from rustgpt_jax.training.config_checks import resolve_change, validate_components
from rustgpt_jax.training.hooks import Profile, parse_span
from rustgpt_jax.training.loop import SingleRunExecutor, run_training_loop
from rustgpt_jax.training.memory_estimate import check_training_memory
from rustgpt_jax.training.preemption import StopRequest
from rustgpt_jax.training.run_inputs import prepare_inputs, prepare_tokenizer
from rustgpt_jax.training.trainer import Trainer
from rustgpt_jax.workdir.code_snapshot import record_code
from rustgpt_jax.workdir.run_dir import RunDir, scratch_run_dir

# With at least this many separately compiled blocks, compilation takes long.
MANY_BLOCKS = 200


def train(
    config: Config,
    path: Path,
    origins: Mapping[str, str],
    console: Console,
    barrier_timeout: float = math.inf,
    profile: str | None = None,
    is_oversubscribed: bool = False,
    extends: bool = False,
) -> int:
    """Train a run in a folder, resuming from its last valid checkpoint if there is one.

    With several processes, each must call this function.

    Args:
        config: The config of the run.
        path: The folder of the run.
        origins: The origin of each knob's value, by dotted path.
        console: The console to print to.
        barrier_timeout: Seconds to wait for other processes before exiting.
        profile: Steps to trace into the folder, START:STOP.
        is_oversubscribed: Whether to start a run that cannot fit the memory.
        extends: Whether to allow more steps even if the learning-rate schedule was designed for fewer.

    Returns:
        The exit status: 0 at the end of training, or that of a stop if a signal stopped it.

    Raises:
        UserError: The config cannot work (raised before anything is compiled or written), the folder becomes
            unwritable, or the run ended because the loss or gradient was not finite.
    """
    startup_timer = StartupTimer("Python and packages")
    validate_components(config)
    # Read the code now: it may be edited while the data are prepared.
    record_code()
    resolved, tokenizer = _resolve_epochs(config, RunDir(path).tokenizer_file, console)
    config, earlier, sentences = resolve_change(path, resolved.config, extends)
    origins = {**origins, **resolved.origins}
    for sentence in (*resolved.messages, *sentences):
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)
    plan = plan_for_all_devices(config.mesh)
    check_host_offload(config)
    check_training_memory(config, query_machine(), plan.sizes, is_oversubscribed)
    remedy = "The same command continues from the last checkpoint."
    with _writable_run_dir(path, config, origins) as folder:
        with process_zero_first("data"):
            inputs = prepare_inputs(config, RunDir(folder).tokenizer_file, console, earlier, tokenizer)
        # Check again with the vocabulary size.
        check_training_memory(inputs.full_config, query_machine(), plan.sizes, is_oversubscribed)
        inputs.check(RunDir(folder), plan.n_devices)
        startup_timer.lap("the data")
        traced = None if profile is None else Profile(parse_span(profile, inputs.total_steps), path / "profile")
        with Trainer(inputs, folder, origins, plan) as run:
            # The watchdog ends before the run is closed, which waits for other processes.
            with Watchdog(barrier_timeout, remedy) as watchdog:
                status = _run_to_end(run, path, console, watchdog, startup_timer, traced)
            if run.diverged_at is not None:
                raise UserError(_divergence_message(run, path))
            return status


def _writable_run_dir(path: Path, config: Config, origins: Mapping[str, str]) -> AbstractContextManager[Path]:
    """Return the folder that this process writes to."""
    return nullcontext(path) if is_process_zero() else scratch_run_dir(path, config, origins)


def _resolve_epochs(config: Config, tokenizer_file: Path, console: Console) -> tuple[ResolvedEpochs, Tokenizer | None]:
    """Replace epochs by steps, and return the tokenizer too if the windows had to be counted.

    Raises:
        UserError: The text is unsuitable, or several processes train the run.
    """
    if not uses_epochs(config):
        return ResolvedEpochs(config, {}, {}, []), None
    if jax.process_count() > 1:
        raise UserError(
            f"config.{EPOCHS}: several processes take a number of steps, config.{STEPS}; "
            "`launch.py explain` tells how many it is."
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
    profile: Profile | None,
) -> int:
    total_steps = run.inputs.total_steps
    began = time.perf_counter()
    with StopRequest() as stop, Progress(console, total_steps) as progress, _translate_io_errors(run):
        run.begin(progress)
        if run.is_over:
            progress.message(f"{path} is complete: {total_steps} steps. There is nothing to do.")
            return 0
        progress.message(_headline(run, path))
        for sentence in (*_compile_time_warnings(run), *_attention_messages(run)):
            progress.message(sentence)
        startup_timer.lap("the folder")
        executor = SingleRunExecutor(run)
        startup_timer.lap("the first state")
        first_step = run.step

        def before_call() -> None:
            if run.step > first_step and (phases := startup_timer.finish("compiling")):
                progress.message(f"The first step began after {phases}.")
            if profile is not None:
                _trace(profile, run, progress)

        run_training_loop([run], executor, _make_stop_check(stop, watchdog), before_call)
        if profile is not None:
            # Training may have been stopped before the end of the span.
            profile.ends(profile.steps.stop)
        run.finish()
    if run.diverged_at is not None:
        return EXIT_USER_ERROR
    if not run.is_over:
        again = "The same command continues from there."
        console.print(f"Stopped by {stop.signal_name} at step {run.step}, saved. {again}", highlight=False)
        return stop.exit_status
    took = format_duration(time.perf_counter() - began)
    console.print(f"Done in {took}. {_draw_curves(run)}", highlight=False, soft_wrap=True)
    return 0


def _trace(profile: Profile, run: Trainer, progress: Progress) -> None:
    """Start or stop the profiler at the current step, after all earlier steps are done."""
    run.break_steps = profile.steps
    if run.step not in profile.steps:
        return
    run.catch_up()
    if profile.begins(run.step):
        progress.message(f"Tracing steps {run.step + 1} to {profile.steps.stop}.")
    elif profile.ends(run.step):
        progress.message(f"The trace is in {profile.folder}; docs/performance.md says how to read it.")


def _make_stop_check(stop: StopRequest, watchdog: Watchdog) -> Callable[[], bool]:
    """Return a function that tells whether any process was asked to stop, with the same answer in all of them."""
    votes = LaggedAllReduceMax(0)

    def is_stopped() -> bool:
        watchdog.heartbeat()
        number = int(votes.update(stop.signal_number))
        if number:
            stop.signal_name = signal.Signals(number).name
        return number > 0

    return is_stopped


def _divergence_message(run: Trainer, path: Path) -> str:
    forgiven = run.n_skipped - 1
    before = f", after {forgiven} that were forgiven (config.faults.max_skipped)" if forgiven > 0 else ""
    return (
        f"{path} diverged: the loss, the gradient or the update of step {run.diverged_at} is not finite{before}, and "
        f"training ended there. Its last checkpoint is of step {run.checkpoints.step() or 0}. A lower learning rate "
        f"usually helps; `python launch.py doctor {path}` looks for the cause."
    )


@contextmanager
def _translate_io_errors(run: Trainer) -> Iterator[None]:
    """Turn I/O errors into a UserError that names the last complete checkpoint."""
    try:
        yield
    except (OSError, NotWritableError) as error:
        reason = f"{error.filename or run.folder.path}: {error.strerror}." if isinstance(error, OSError) else error
        # Include a checkpoint that is still being written, if that succeeds.
        with suppress(NotWritableError):
            run.checkpoints.wait()
        kept = run.checkpoints.written()
        left = f"its checkpoint of step {kept[-1]} is whole" if kept else "it has no checkpoint"
        raise UserError(f"{reason} Training stopped at step {run.step}; {left}.") from error


def _compile_time_warnings(run: Trainer) -> list[str]:
    """Return a warning if many blocks are compiled separately, which takes long."""
    model = run.inputs.full_config.model
    repeats, left = divmod(model.n_layers, model.period)
    n_blocks = model.n_layers if not model.scan_layers else left + (model.period if repeats else 0)
    if n_blocks <= MANY_BLOCKS:
        return []
    how = f"config.model.scan_layers={model.scan_layers}, and a pattern of {model.period}"
    return [
        f"{n_blocks:,} blocks are compiled one by one, which may take many minutes ({how}); scan_layers=True needs few."
    ]


def _attention_messages(run: Trainer) -> list[str]:
    """Check the attention kernels against the plain form, and return messages about those that are used."""
    findings = [
        finding
        for data in {data.seq_len: data for data in run.inputs.stages}.values()
        for finding in check_kernels(data.stage.config.model, data.seq_len)
    ]
    sentences = list(dict.fromkeys(finding.sentence for finding in findings))
    return sentences if any(finding.choice.kernel != "plain" for finding in findings) else []


def _draw_curves(run: Trainer) -> str:
    try:
        return f"Loss curves: {draw_loss_curves(run.folder.path)}"
    except UserError as error:
        return str(error)


def _headline(run: Trainer, path: Path) -> str:
    parameters = format_count(total_size(parameter_shapes(run.inputs.full_config.model)))
    begin = f"from step {run.step}" if run.step else "from the start"
    devices = f"{run.plan.n_devices} x {jax.devices()[0].device_kind}"
    mesh = f" ({describe_mesh(run.plan.sizes)})" if run.plan.n_devices > 1 else ""
    return f"{path}: {parameters} parameters, {run.inputs.total_steps} steps {begin}, on {devices}{mesh}"
