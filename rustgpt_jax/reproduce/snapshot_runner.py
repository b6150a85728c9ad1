"""The code that a run was made with, unpacked, and processes that run it as the run was launched."""

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

from rustgpt_jax.errors import UserError
from rustgpt_jax.sharding.hardware_specs import use_cpu_devices
from rustgpt_jax.sweeps.launchers import visible_gpus
from rustgpt_jax.training.preemption import SIGNALS
from rustgpt_jax.workdir.code_snapshot import list_differing_files, read_verified_code, write_code
from rustgpt_jax.workdir.environment import environment_variables
from rustgpt_jax.workdir.event_log import Launch, code_archive, load_launches
from rustgpt_jax.workdir.run_dir import RunDir

# What a shell says of a process that a signal ended.
KILLED_BY = 128
SECONDS_BETWEEN_POLLS = 0.05
# Number of differing files to list in a message.
MOST_NAMED = 4


def use_devices_of(run: RunDir) -> None:
    """Make a CPU as many devices as the last launch of a run had, if there was one. To be called before JAX is used."""
    for launch in load_launches(run)[-1:]:
        use_cpu_devices(launch.devices)


class FinishedProcess(NamedTuple):
    """How a process ended: its status, as a shell would have it, and the first signal that was passed on to it."""

    status: int
    stopped_by: signal.Signals | None


class SnapshotCode(NamedTuple):
    """The code of a launch, unpacked in a folder, and a sentence that says whose code it is."""

    folder: Path
    launch: Launch
    whose: str = ""

    def run(self, arguments: Sequence[str], errors: IO[bytes] | None = None) -> FinishedProcess:
        """Run Python with this code before all other, on as many cores and devices as the launch had, in its place.

        Signals that ask this process to stop go to that one, and end it: this one lives on to clean up.
        """
        with _passing_on() as signals:
            child = self._start(arguments, errors)
            signals.pass_to(child)
            # child.wait() would miss a signal that arrives just before it blocks.
            while (status := child.poll()) is None:
                time.sleep(SECONDS_BETWEEN_POLLS)
        return FinishedProcess(status if status >= 0 else KILLED_BY - status, signals.first)

    def _start(self, arguments: Sequence[str], errors: IO[bytes] | None) -> "subprocess.Popen[bytes]":
        # Paths of the config may be relative to where the run was launched.
        place = Path(self.launch.cwd) if Path(self.launch.cwd).is_dir() else self.folder
        mine = os.sched_getaffinity(0)
        # XLA divides its sums by the cores.
        os.sched_setaffinity(0, sorted(mine)[: self.launch.environment["machine"]["cores"]])
        try:
            return subprocess.Popen(
                # Without the current folder, which may have another version of the code.
                [sys.executable, "-P", *arguments],
                cwd=place,
                env=self._variables(),
                stderr=errors,
                # Ctrl-C is for this process, which passes it on: once.
                start_new_session=True,
            )
        finally:
            os.sched_setaffinity(0, mine)

    def _variables(self) -> dict[str, str]:
        path = os.pathsep.join(filter(None, [str(self.folder), os.environ.get("PYTHONPATH")]))
        gpus = visible_gpus()
        seen = {"CUDA_VISIBLE_DEVICES": ",".join(gpus[: self.launch.devices])} if gpus else {}
        return environment_variables(self.launch.environment, self.launch.devices) | {"PYTHONPATH": path} | seen


class _Signals:
    """Signals to this process, which go to a child, also those that came before there was one."""

    def __init__(self) -> None:
        self.first: signal.Signals | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._waiting = deque[int]()

    def heard(self, number: int, frame: FrameType | None) -> None:
        """The handler of a signal."""
        del frame
        self.first = self.first or signal.Signals(number)
        # Training saves and ends at the one, and knows nothing of the other.
        self._waiting.append(signal.SIGTERM if number == signal.SIGHUP else number)
        self._send()

    def pass_to(self, child: "subprocess.Popen[bytes]") -> None:
        """Send them to this child from now on."""
        self._child = child
        self._send()

    def _send(self) -> None:
        # Another signal may interrupt this anywhere.
        while self._child is not None:
            try:
                number = self._waiting.popleft()
            except IndexError:
                return
            self._child.send_signal(number)


@contextmanager
def _passing_on() -> Iterator[_Signals]:
    """Signals that ask to stop are kept for a child while the block runs."""
    signals = _Signals()
    # A process that was told not to mind the end of its terminal does not.
    minds_terminal = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
    numbers = [*SIGNALS, *([signal.SIGHUP] if minds_terminal else [])]
    handlers = {number: signal.signal(number, signals.heard) for number in numbers}
    try:
        yield signals
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
        raise UserError(f"{run.path} does not have the code that it was made with: there is no {archive}.")
    contents = read_verified_code(archive)
    others = list_differing_files(contents)
    more = f" and {len(others) - MOST_NAMED} more" if len(others) > MOST_NAMED else ""
    named = ", ".join(others[:MOST_NAMED]) + more
    if others and not is_trusted:
        raise UserError(
            f"{archive} is not the code installed here, and would run with your permissions: it differs in {named}. "
            "Read it first; --trust runs it."
        )
    kept = f"--trust: running {archive}, which differs from the code installed here in {named}."
    with tempfile.TemporaryDirectory() as folder:
        write_code(contents, Path(folder))
        yield SnapshotCode(
            Path(folder), launch, kept if others else f"The code of {run.path} is the code installed here."
        )
