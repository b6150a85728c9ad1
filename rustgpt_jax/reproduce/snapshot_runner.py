"""Run the code snapshot of a run in a process with the same cores, devices and variables as the original launch."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO, NamedTuple

from rustgpt_jax.errors import PROGRAM_VARIABLE, UserError, program_name
from rustgpt_jax.process_setup import SIGNALS
from rustgpt_jax.sweeps.local_launchers import find_visible_gpus
from rustgpt_jax.workdir.code_snapshot import list_differing_files, read_verified_code, write_code
from rustgpt_jax.workdir.environment import environment_variables
from rustgpt_jax.workdir.event_log import Launch, code_archive
from rustgpt_jax.workdir.run_dir import RunDir

SECONDS_BETWEEN_POLLS = 0.05
# The number of differing files to list in a message.
MAX_NAMED = 4


class FinishedProcess(NamedTuple):
    """The exit status of a process, by the shell's convention, and the first signal that was passed on to it."""

    status: int
    stopped_by: signal.Signals | None


class SnapshotCode(NamedTuple):
    """The code of a launch, unpacked in a folder, and a note on whether it is the code installed here."""

    folder: Path
    launch: Launch
    note: str = ""

    def run(self, arguments: Sequence[str], errors: IO[bytes] | None = None) -> FinishedProcess:
        """Run Python with this code first on the path, and with the cores, devices and working folder of the launch.

        Signals that ask this process to stop are passed on to the child, so that this process can clean up.
        """
        with _forward_signals() as signals:
            child = self._start(arguments, errors)
            signals.send_to(child)
            # child.wait() would miss a signal that arrives just before it blocks.
            while (status := child.poll()) is None:
                time.sleep(SECONDS_BETWEEN_POLLS)
        return FinishedProcess(status if status >= 0 else 128 - status, signals.first)

    def _start(self, arguments: Sequence[str], errors: IO[bytes] | None) -> "subprocess.Popen[bytes]":
        # Paths in the config may be relative to the folder in which the run was launched.
        cwd = Path(self.launch.cwd) if Path(self.launch.cwd).is_dir() else self.folder
        cores = os.sched_getaffinity(0)
        # XLA splits its sums by the number of cores.
        os.sched_setaffinity(0, sorted(cores)[: self.launch.environment["machine"]["cores"]])
        try:
            return subprocess.Popen(
                # -P: do not import from the current folder, which may have another version of the code.
                [sys.executable, "-P", *arguments],
                cwd=cwd,
                env=self._variables(),
                stderr=errors,
                # Ctrl-C reaches only this process, which passes it on.
                start_new_session=True,
            )
        finally:
            os.sched_setaffinity(0, cores)

    def _variables(self) -> dict[str, str]:
        path = os.pathsep.join(filter(None, [str(self.folder), os.environ.get("PYTHONPATH")]))
        variables = environment_variables(self.launch.environment, self.launch.devices)
        variables |= {"PYTHONPATH": path, PROGRAM_VARIABLE: program_name()}
        if gpus := find_visible_gpus():
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[: self.launch.devices])
        return variables


class _SignalForwarder:
    """Forwards signals of this process to a child, including those that arrived before the child was started."""

    def __init__(self) -> None:
        self.first: signal.Signals | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._pending = deque[int]()

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        del frame
        self.first = self.first or signal.Signals(number)
        # Training handles SIGTERM, but not SIGHUP.
        self._pending.append(signal.SIGTERM if number == signal.SIGHUP else number)
        self._send()

    def send_to(self, child: "subprocess.Popen[bytes]") -> None:
        """Send pending and future signals to a child."""
        self._child = child
        self._send()

    def _send(self) -> None:
        # Another signal may interrupt this anywhere.
        while self._child is not None:
            try:
                number = self._pending.popleft()
            except IndexError:
                return
            self._child.send_signal(number)


@contextmanager
def _forward_signals() -> Iterator[_SignalForwarder]:
    """Collect signals that request a stop, to forward them to a child process."""
    forwarder = _SignalForwarder()
    # A process started by nohup ignores SIGHUP, and so should its child.
    ignores_hangup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    numbers = [*SIGNALS, *([] if ignores_hangup else [signal.SIGHUP])]
    handlers = {number: signal.signal(number, forwarder.handle) for number in numbers}
    try:
        yield forwarder
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def load_snapshot_code(run: RunDir, launch: Launch, is_trusted: bool = False) -> Iterator[SnapshotCode]:
    """Unpack the code of a launch for the duration of a `with` block.

    Args:
        run: The run.
        launch: One of its launches.
        is_trusted: Whether the user allowed running code that is not installed here.

    Raises:
        UserError: The code is missing, damaged, or neither installed here nor trusted.
    """
    archive = code_archive(run, launch)
    if not archive.exists():
        raise UserError(f"{run.path} does not have the code that it was trained with: {archive} does not exist.")
    contents = read_verified_code(archive)
    differing = list_differing_files(contents)
    note = f"The code of {run.path} is the code installed here."
    if differing:
        more = f" and {len(differing) - MAX_NAMED} more" if len(differing) > MAX_NAMED else ""
        names = ", ".join(differing[:MAX_NAMED]) + more
        note = f"--trust: running {archive}, which differs from the code installed here in {names}."
        if not is_trusted:
            raise UserError(
                f"{archive} is not the code installed here, and would run with your permissions: it differs in "
                f"{names}. Read it first; --trust runs it."
            )
    with tempfile.TemporaryDirectory() as folder:
        write_code(contents, Path(folder))
        yield SnapshotCode(Path(folder), launch, note)
