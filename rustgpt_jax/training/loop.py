"""Training as a whole: from a config to a finished run, with all its effects in their order."""

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

import jax
from rich.console import Console

from rustgpt_jax.cache_dir import cache_folder
from rustgpt_jax.config.schema import EPOCHS, STEPS, Config, Earlier, stages, stages_in_turn, uses_epochs
from rustgpt_jax.data.preprocess import (
    Resolved,
    fill_vocab_size,
    load_or_train_tokenizer,
    prepare_stage,
    resolve_epochs_with,
)
from rustgpt_jax.distributed.failure_propagation import MISTAKE, Watchdog
from rustgpt_jax.distributed.multihost import LaggedMax, is_first, process_zero_first
from rustgpt_jax.errors import UserError
from rustgpt_jax.model.flops import parameter_shapes, total_size
from rustgpt_jax.model.kernels.verify import check_kernels
from rustgpt_jax.sharding.hardware_specs import used_machine
from rustgpt_jax.sharding.mesh import in_words
from rustgpt_jax.sharding.sharding_plan import all_devices, check_memories
from rustgpt_jax.tokenizers import Codec
from rustgpt_jax.tracking.formatting import count as formatted
from rustgpt_jax.tracking.formatting import duration
from rustgpt_jax.tracking.plots import draw_loss_curves
from rustgpt_jax.tracking.progress import Progress, StartupTimer, counting
from rustgpt_jax.training.config_changes import change_of
from rustgpt_jax.training.executors import SingleRunExecutor, run_training_loop
from rustgpt_jax.training.memory_estimate import check_training_memory
from rustgpt_jax.training.preemption import StopRequest
from rustgpt_jax.training.profiler import Profile, span
from rustgpt_jax.training.run_inputs import RunInputs, run_tokenizer
from rustgpt_jax.training.trainer import Run
from rustgpt_jax.training.validate_components import validate_components
from rustgpt_jax.workdir.code_snapshot import record_code
from rustgpt_jax.workdir.run_dir import RunDir, RunDirNotWritable, shadow

# With at least this many separately compiled blocks, compilation takes long.
MANY_BLOCKS = 200


def train(
    config: Config,
    path: Path,
    origins: Mapping[str, str],
    console: Console,
    patience: float = math.inf,
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
        patience: Seconds to wait for other processes before exiting.
        profile: Steps to trace into the folder, START:STOP.
        is_oversubscribed: Whether to start a run that cannot fit the memory.
        extends: Whether to allow more steps even if the learning-rate schedule was designed for fewer.

    Returns:
        The exit status: 0 at the end of training, or that of a stop if a signal stopped it.

    Raises:
        UserError: The config cannot work (raised before anything is compiled or written), the folder becomes
            unwritable, or the run ended because the loss or gradient was not finite.
    """
    laps = StartupTimer("Python and packages")
    validate_components(config)
    # As it is now: it may be edited while the data are prepared.
    record_code()
    resolved, tokenizer = _with_steps(config, RunDir(path).tokenizer_file, console)
    config, earlier, sentences = change_of(path, resolved.config, extends)
    origins = {**origins, **resolved.origins}
    for sentence in (*resolved.sentences, *sentences):
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)
    placement = all_devices(config.mesh)
    check_memories(config)
    check_training_memory(config, used_machine(), placement.sizes, is_oversubscribed)
    again = "The same command goes on from the last checkpoint."
    with _records(path, config, origins) as folder:
        with process_zero_first("data"):
            material = gather(config, RunDir(folder).tokenizer_file, console, earlier, tokenizer)
        # Check again with the vocabulary size.
        check_training_memory(material.whole, used_machine(), placement.sizes, is_oversubscribed)
        material.check(RunDir(folder), placement.n_devices)
        laps.lap("the data")
        traced = None if profile is None else Profile(span(profile, material.total_steps), path / "profile")
        with Run(material, folder, origins, placement) as run:
            # It ends before the run is closed, which would wait for processes that are gone.
            with Watchdog(patience, again) as waiting:
                status = _train(run, path, console, waiting, laps, traced)
            if run.diverged_at is not None:
                raise UserError(_divergence(run, path))
            return status


def _records(path: Path, config: Config, origins: Mapping[str, str]) -> AbstractContextManager[Path]:
    """The folder that this process writes to."""
    return nullcontext(path) if is_first() else shadow(path, config, origins)


def _with_steps(config: Config, tokenizer_file: Path, console: Console) -> tuple[Resolved, Codec | None]:
    """Replace epochs by steps, and return the tokenizer too if the windows had to be counted.

    Raises:
        UserError: The text is unsuitable, or several processes train the run.
    """
    if not uses_epochs(config):
        return Resolved(config, {}, {}, []), None
    if jax.process_count() > 1:
        raise UserError(
            f"config.{EPOCHS}: several processes take a number of steps, config.{STEPS}; "
            "`launch.py explain` tells how many it is."
        )
    tokenizer = _tokenizer(config, tokenizer_file, console)
    with counting(console, "characters encoded") as progress:
        return resolve_epochs_with(config, tokenizer, cache_folder(), progress), tokenizer


def _tokenizer(config: Config, file: Path, console: Console) -> Codec:
    if file.exists():
        return run_tokenizer(RunDir(file.parent))
    with counting(console, "characters read to train the tokenizer") as progress:
        return load_or_train_tokenizer(config, progress=progress)


def gather(
    config: Config,
    tokenizer_file: Path,
    console: Console,
    earlier: tuple[Earlier, ...] = (),
    tokenizer: Codec | None = None,
) -> RunInputs:
    """Load or create the inputs of a run. An existing tokenizer of the run folder is kept.

    Args:
        config: The config of the run.
        tokenizer_file: The path of the run's tokenizer, which may not exist.
        console: The console to print to.
        earlier: Earlier configs of the run.
        tokenizer: The tokenizer of the run, if it is known already.

    Raises:
        UserError: The text is unsuitable.
    """
    if tokenizer is None:
        tokenizer = _tokenizer(config, tokenizer_file, console)
    whole = fill_vocab_size(config, tokenizer)
    with counting(console, "characters encoded") as progress:
        prepared = [prepare_stage(stage, tokenizer, cache_folder(), progress) for stage in stages(whole)]
    stores = {data.stage.name: data.store for data in prepared}
    before = [each._replace(config=fill_vocab_size(each.config, tokenizer)) for each in earlier]
    in_turn = stages_in_turn(whole, before)
    data = [prepare_stage(stage, tokenizer, cache_folder(), store=stores[stage.name]) for stage in in_turn]
    return RunInputs(config, whole, tokenizer, data, earlier)


def _train(
    run: Run, path: Path, console: Console, patience: Watchdog, laps: StartupTimer, profile: Profile | None
) -> int:
    total_steps = run.material.total_steps
    began = time.perf_counter()
    with StopRequest() as stop, Progress(console, total_steps) as progress, _writing(run):
        run.begin(progress)
        if run.is_over:
            progress.message(f"{path} is complete: {total_steps} steps. There is nothing to do.")
            return 0
        progress.message(_headline(run, path))
        for sentence in (*_compile_time(run), *_attention(run)):
            progress.message(sentence)
        laps.lap("the folder")
        lanes = SingleRunExecutor(run)
        laps.lap("the first state")
        first_step = run.step

        def between_calls() -> None:
            if run.step > first_step and (told := laps.finish("compiling")):
                progress.message(f"The first step began after {told}.")
            if profile is not None:
                _trace(profile, run, progress)

        run_training_loop([run], lanes, _stopped(stop, patience), between_calls)
        if profile is not None:
            # Where the run was stopped before.
            profile.ends(profile.steps.stop)
        run.finish()
    if run.diverged_at is not None:
        return MISTAKE
    if not run.is_over:
        again = "The same command goes on from there."
        console.print(f"Stopped by {stop.signal_name} at step {run.step}, saved. {again}", highlight=False)
        return stop.exit_status
    console.print(f"Done in {duration(time.perf_counter() - began)}. {_curves(run)}", highlight=False, soft_wrap=True)
    return 0


def _trace(profile: Profile, run: Run, progress: Progress) -> None:
    """Begin or end the trace of a run where it stands, with nothing left to be done of the steps before."""
    run.marks = profile.steps
    if run.step not in profile.steps:
        return
    run.catch_up()
    if profile.begins(run.step):
        progress.message(f"Tracing steps {run.step + 1} to {profile.steps.stop}.")
    elif profile.ends(run.step):
        progress.message(f"The trace is in {profile.folder}; docs/performance.md says how to read it.")


def _stopped(stop: StopRequest, patience: Watchdog) -> Callable[[], bool]:
    """Asks, turn by turn, whether a process of the run has been told to stop: all hear of it at the same turn."""
    votes = LaggedMax(0)

    def is_stopped() -> bool:
        patience.beat()
        number = int(votes.largest(stop.signal_number))
        if number:
            stop.signal_name = signal.Signals(number).name
        return number > 0

    return is_stopped


def _divergence(run: Run, path: Path) -> str:
    forgiven = run.n_skipped - 1
    before = f", after {forgiven} that were forgiven (config.faults.max_skipped)" if forgiven > 0 else ""
    return (
        f"{path} diverged: the loss, the gradient or the update of step {run.diverged_at} is not finite{before}, and "
        f"training ended there. Its last checkpoint is of step {run.checkpoints.step() or 0}. A lower learning rate "
        f"usually helps; `python launch.py doctor {path}` looks for the cause."
    )


@contextmanager
def _writing(run: Run) -> Iterator[None]:
    """Says in a sentence that files can no longer be written, or read, and what is left of the run."""
    try:
        yield
    except (OSError, RunDirNotWritable) as error:
        reason = f"{error.filename or run.folder.path}: {error.strerror}." if isinstance(error, OSError) else error
        # Include a checkpoint that is still being written, if that succeeds.
        with suppress(RunDirNotWritable):
            run.checkpoints.wait()
        kept = run.checkpoints.written()
        left = f"its checkpoint of step {kept[-1]} is whole" if kept else "it has no checkpoint"
        raise UserError(f"{reason} Training stopped at step {run.step}; {left}.") from error


def _compile_time(run: Run) -> list[str]:
    """Return a warning if so many blocks are compiled separately that compilation takes long."""
    model = run.material.whole.model
    repeats, left = divmod(model.n_layers, model.period)
    n_blocks = model.n_layers if not model.scan_layers else left + (model.period if repeats else 0)
    if n_blocks <= MANY_BLOCKS:
        return []
    how = f"config.model.scan_layers={model.scan_layers}, and a pattern of {model.period}"
    return [
        f"{n_blocks:,} blocks are compiled one by one, which may take many minutes ({how}); scan_layers=True needs few."
    ]


def _attention(run: Run) -> list[str]:
    """What computes attention, if it is not the plain form alone. Raises UserError if it does not compute the same."""
    findings = [
        finding
        for data in {data.seq_len: data for data in run.material.stages}.values()
        for finding in check_kernels(data.stage.config.model, data.seq_len)
    ]
    sentences = list(dict.fromkeys(finding.sentence for finding in findings))
    return sentences if any(finding.choice.kernel != "plain" for finding in findings) else []


def _curves(run: Run) -> str:
    try:
        return f"Loss curves: {draw_loss_curves(run.folder.path)}"
    except UserError as error:
        return str(error)


def _headline(run: Run, path: Path) -> str:
    parameters = formatted(total_size(parameter_shapes(run.material.whole.model)))
    begin = f"from step {run.step}" if run.step else "from the start"
    devices = f"{run.placement.n_devices} x {jax.devices()[0].device_kind}"
    mesh = f" ({in_words(run.placement.sizes)})" if run.placement.n_devices > 1 else ""
    return f"{path}: {parameters} parameters, {run.material.total_steps} steps {begin}, on {devices}{mesh}"
