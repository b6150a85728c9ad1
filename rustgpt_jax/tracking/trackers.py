"""Trackers of a run: their registry, and the thread that keeps a slow or failing tracker from delaying training."""

import importlib.util
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rustgpt_jax.config.schema import TRACKER_KNOBS, Config, flatten
from rustgpt_jax.errors import UserError
from rustgpt_jax.registry import lookup
from rustgpt_jax.tracking.metric_writer import MetricWriter, TrackedRun, iter_since, select_scalars
from rustgpt_jax.tracking.mlflow_writer import MlflowWriter
from rustgpt_jax.tracking.tensorboard_writer import TensorBoardWriter
from rustgpt_jax.tracking.wandb_writer import WandbWriter
from rustgpt_jax.workdir.run_dir import RunDir

TRACKERS: dict[str, Callable[[TrackedRun], MetricWriter]] = {
    "tensorboard": TensorBoardWriter,
    "wandb": WandbWriter,
    "mlflow": MlflowWriter,
}
# Trackers that only append to a file, like metrics.jsonl, and need no thread.
LOCAL = ("tensorboard",)
# Trackers that need a package, which has the same name as the tracker and as an extra of this package.
WITH_PACKAGE = ("wandb", "mlflow")

# The number of lines of metrics that may wait for a tracker; those of a few minutes if every step is logged.
QUEUE_SIZE = 10_000
# Seconds between flushes of a tracker, after which it is recorded how much the tracker has.
FLUSH_SECONDS = 5.0
# Maximum seconds that the end of a run waits for a tracker. Once a tracker has exceeded this, later runs of the process
# wait for it only briefly, so that a sweep without network is not delayed again by each trial.
CLOSE_SECONDS = 20.0
CLOSE_SECONDS_AFTER_TIMEOUT = 1.0
# The time after which Python lets another thread run.
SWITCH_SECONDS = 0.0005
# More than the number of lines of any step.
ALL_LINES = 2**31

_timed_out: set[str] = set()


def check_trackers(names: Sequence[str]) -> None:
    """Check that trackers exist and that their packages are installed.

    Raises:
        UserError: A name is unknown, a package is missing, or an import path names no class of a tracker.
    """
    for name in names:
        if not callable(_get_factory(name)):
            raise UserError(f"config.logging.trackers={name!r} is not a class of a MetricWriter.")
        if name in WITH_PACKAGE and not _is_installed(name):
            raise UserError(
                f"config.logging.trackers={name!r} needs the package {name}: python -m pip install "
                f"'rustgpt_jax[{name}]'."
            )


def _get_factory(name: str) -> Callable[[TrackedRun], MetricWriter]:
    return lookup(TRACKERS, name, "config.logging.trackers")


def _is_installed(package: str) -> bool:
    # A folder with the name of the package, such as one that wandb creates, has a spec but no file.
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def open_trackers(
    names: Sequence[str], run: TrackedRun, message: Callable[[str], None], warn: Callable[[str], None]
) -> list[MetricWriter]:
    """Open trackers for a run whose metrics.jsonl ends at the step that training resumes from.

    Args:
        names: Names in TRACKERS, or import paths.
        run: The run.
        message: Tells the user where a tracker shows the run. Called from other threads.
        warn: Tells the user, once per tracker, that it failed. Called from other threads.
    """
    return [
        TRACKERS[name](run) if name in LOCAL else BackgroundWriter(name, run, message, warn)
        for name in dict.fromkeys(names)
    ]


def flatten_params(config: Config) -> dict[str, Any]:
    """Return the config of a run as trackers show it: values by dotted path, with those that stages override."""
    params = {path: value for path, value in flatten(config).items() if path not in TRACKER_KNOBS}
    for stage in config.stages:
        params |= {f"stages.{stage.name}.{path}": value for path, value in stage.overrides}
    return params


class BackgroundWriter(MetricWriter):
    """A tracker that is opened, used and closed by its own thread, with a bounded queue.

    The methods only add to the queue, so that a slow, failing or unreachable tracker never delays training. If the
    queue is full, metrics are dropped; after an error, all further ones are. Either is reported once.

    metrics.jsonl is the record: what the tracker lacks of the steps before the one that training resumes from is read
    from there, and steps that are repeated after a kill, with the same results, are not written again.
    """

    def __init__(self, name: str, run: TrackedRun, message: Callable[[str], None], warn: Callable[[str], None]) -> None:
        self._name, self._tracked, self._message, self._warn = name, run, message, warn
        self._queue: queue.Queue[tuple[str, tuple[Any, ...]] | None] = queue.Queue(QUEUE_SIZE)
        self._n_dropped, self._is_over = 0, False
        # Set when no more metrics follow.
        self._status: str | None = None
        metrics_file = RunDir(run.folder).metrics_file
        self._record_end = metrics_file.stat().st_size if metrics_file.exists() else 0
        # A thread that computes would otherwise delay the one that trains by 5 ms each time.
        sys.setswitchinterval(min(SWITCH_SECONDS, sys.getswitchinterval()))
        # The thread may be in the middle of a request when the process exits.
        self._thread = threading.Thread(target=self._serve, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def write_scalars(self, step: int, scalars: Mapping[str, float], wall_time: float) -> None:
        """Queue the scalars of a step."""
        self._put("write_scalars", step, scalars, wall_time)

    def write_samples(self, step: int, samples: Sequence[tuple[str, str]]) -> None:
        """Queue samples."""
        self._put("write_samples", step, samples)

    def write_summary(self, values: Mapping[str, float | str]) -> None:
        """Queue values that describe the whole run."""
        self._put("write_summary", values)

    def write_file(self, file: Path) -> None:
        """Queue the upload of a file."""
        self._put("write_file", file)

    def rewind(self, step: int) -> None:
        """Queue a rewind."""
        self._put("rewind", step)

    def begin_close(self, status: str) -> None:
        """Let the thread close the tracker after everything in the queue."""
        if self._status is None:
            self._status = status
            if not self._queue.full():
                self._queue.put_nowait(None)

    def close(self, status: str) -> None:
        """Wait until the tracker is closed, but not for long."""
        self.begin_close(status)
        self._thread.join(CLOSE_SECONDS_AFTER_TIMEOUT if self._name in _timed_out else CLOSE_SECONDS)
        if self._thread.is_alive():
            _timed_out.add(self._name)
            self._give_up(f"is not done after {CLOSE_SECONDS:g} seconds")
        elif self._n_dropped:
            self._warn(
                f"The tracker {self._name} lacks {self._n_dropped:,} lines of metrics.jsonl, for which it was too slow."
            )

    def _put(self, method: str, *arguments: Any) -> None:
        if self._is_over:
            return
        try:
            self._queue.put_nowait((method, arguments))
        except queue.Full:
            self._n_dropped += 1
            if self._n_dropped == 1:
                self._warn(
                    f"The tracker {self._name} is slower than training: with {QUEUE_SIZE:,} lines waiting, "
                    "further ones are dropped. metrics.jsonl has them all."
                )

    def _give_up(self, what: str) -> None:
        """Pass nothing more on to the tracker, and tell the user."""
        if not self._is_over:
            self._is_over = True
            self._warn(f"The tracker {self._name} {what}, and gets no more of this run. metrics.jsonl has everything.")

    # The thread.

    def _serve(self) -> None:
        try:
            writer = _get_factory(self._name)(self._tracked)
            # Opening the run may have found that the tracker has lost it.
            self._position = _Position(self._tracked, self._name)
            if writer.location:
                self._message(f"{self._name}: {writer.location}")
            if not self._tracked.is_sweep:
                self._write_record(writer)
            self._write_queue(writer)
            self._flush(writer)
            writer.close(self._status or "failed")
            self._save_position()
        # Libraries raise anything, and some call sys.exit.
        except BaseException as error:
            self._give_up(f"failed ({' '.join(str(error).split()) or type(error).__name__})")

    def _write_record(self, writer: MetricWriter) -> None:
        """Write what metrics.jsonl had when the run was opened, and the tracker lacks."""
        for line in iter_since(self._tracked.folder, self._position.step, self._record_end):
            if line["step"] > self._tracked.resume_step:
                break
            self._write_line(writer, line["step"], select_scalars(line), line.get("time", time.time()))

    def _write_queue(self, writer: MetricWriter) -> None:
        """Write everything from the queue until no more follows."""
        flush_time = time.monotonic() + FLUSH_SECONDS
        while not (self._is_over or (self._status is not None and self._queue.empty())):
            try:
                item = self._queue.get(timeout=max(0.0, flush_time - time.monotonic()))
            except queue.Empty:
                item = None
            if item is not None:
                method, arguments = item
                own: dict[str, Callable[..., None]]
                own = {"write_scalars": self._write_line, "write_samples": self._write_samples, "rewind": self._rewind}
                own.get(method, partial(_call, method))(writer, *arguments)
            if time.monotonic() >= flush_time:
                self._flush(writer)
                flush_time = time.monotonic() + FLUSH_SECONDS

    def _write_line(self, writer: MetricWriter, step: int, scalars: Mapping[str, float], wall_time: float) -> None:
        if self._position.advance(step):
            writer.write_scalars(step, scalars, wall_time)

    def _write_samples(self, writer: MetricWriter, step: int, samples: Sequence[tuple[str, str]]) -> None:
        if self._position.advance_samples(step):
            writer.write_samples(step, samples)

    def _rewind(self, writer: MetricWriter, step: int) -> None:
        self._position.rewind(step)
        writer.rewind(step)

    def _flush(self, writer: MetricWriter) -> None:
        writer.flush()
        if writer.is_durable:
            self._save_position()

    def _save_position(self) -> None:
        if not self._tracked.is_sweep:
            self._position.save()


def _call(method: str, writer: MetricWriter, *arguments: Any) -> None:
    getattr(writer, method)(*arguments)


class _Position:
    """How much of a run a tracker has: the lines before a step, some of the lines of that step, and samples.

    It is stored in the run folder, so that a resumed run continues where the tracker's record ends.
    """

    def __init__(self, run: TrackedRun, tracker: str) -> None:
        self._run, self._tracker = run, tracker
        state = run.load_state(tracker)
        known = [state.get(name) for name in ("step", "n_lines", "samples_step")]
        numbers = [value if type(value) is int and value >= 0 else 0 for value in known]
        self._sent, self._samples_step = (numbers[0], numbers[1]), numbers[2]
        # The last line of the run, and its number among those of its step.
        self._last = (-1, 0)
        self._saved: tuple[int, int, int] | None = None

    @property
    def step(self) -> int:
        """The first step of which lines may be missing."""
        return self._sent[0]

    def advance(self, step: int) -> bool:
        """Advance to the next line of the run, and return whether the tracker lacks it."""
        self._last = (step, self._last[1] + 1 if step == self._last[0] else 1)
        if self._last <= self._sent:
            return False
        self._sent = self._last
        return True

    def advance_samples(self, step: int) -> bool:
        """Advance to the samples of a step, and return whether the tracker lacks them."""
        if step <= self._samples_step:
            return False
        self._samples_step = step
        return True

    def rewind(self, step: int) -> None:
        """Go back to the end of a step."""
        self._sent, self._samples_step = (step, ALL_LINES), min(step, self._samples_step)

    def save(self) -> None:
        """Store the position, if it has changed."""
        position = (*self._sent, self._samples_step)
        if position != self._saved:
            self._saved = position
            names = ("step", "n_lines", "samples_step")
            self._run.save_state(self._tracker, **dict(zip(names, position, strict=True)))
