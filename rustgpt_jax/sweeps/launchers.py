"""Launchers on this machine: threads of this process, or subprocesses."""

import json
import os
import queue
import select
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import jax

from rustgpt_jax.sweeps.asset_cache import AssetCache
from rustgpt_jax.sweeps.planner import Chunk
from rustgpt_jax.sweeps.sweep_dir import DONE, Ledger, SweepDir
from rustgpt_jax.sweeps.worker import Worker
from rustgpt_jax.workdir.run_dir import check_no_symlinks

# What every launcher is told.


@dataclass(frozen=True, eq=False)
class Launch:
    """One launch of a sweep: its folder, the copy of the code that jobs run, how many workers, and when to stop.

    `slurm_options` are options of Slurm such as {'partition': 'gpu', 'time': '60'}.
    """

    folder: SweepDir
    shelf: AssetCache
    code: Path
    n_workers: int
    slurm_options: dict[str, str]
    is_stopped: Callable[[], bool]


def run_inline(launch: Launch, chunks: Sequence[Chunk]) -> None:
    """Run chunks on the devices of this process, at the same time on groups of as many devices as a chunk needs."""
    devices = jax.local_devices()
    for needed in dict.fromkeys(chunk.devices for chunk in chunks):
        size = needed or len(devices)
        groups = [devices[first : first + size] for first in range(0, len(devices) - size + 1, size)]
        _run(launch, groups, [chunk for chunk in chunks if chunk.devices == needed])


def _run(launch: Launch, groups: Sequence[Sequence[jax.Device]], chunks: Sequence[Chunk]) -> None:
    waiting: queue.SimpleQueue[Chunk] = queue.SimpleQueue()
    for chunk in chunks:
        waiting.put(chunk)
    errors: list[BaseException] = []

    def take(devices: Sequence[jax.Device]) -> None:
        worker = Worker(launch.folder, launch.shelf, devices, launch.code.name, launch.is_stopped)
        try:
            with jax.default_device(devices[0]):
                while not launch.is_stopped() and not waiting.empty():
                    worker.work(waiting.get_nowait())
        except queue.Empty:
            return
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=take, args=(devices,)) for devices in groups[: len(chunks)]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


# In processes of this machine: one for each core or GPU, which nothing but its own trials can bring down.

# A chunk whose process has died so often is given up.
MOST_DEATHS = 3
# A process that has run so many trials is replaced by a new one: libraries keep some KB of memory for each checkpoint.
TRIALS_PER_PROCESS = 500
SECONDS_BETWEEN_LOOKS = 0.2


def run_in_subprocesses(launch: Launch, chunks: Sequence[Chunk]) -> None:
    """Run chunks in `n_workers` processes. A process that dies is started anew with its chunk, which goes on."""
    waiting: queue.SimpleQueue[Chunk] = queue.SimpleQueue()
    for chunk in chunks:
        waiting.put(chunk)
    errors: list[BaseException] = []

    def serve(place: int) -> None:
        try:
            with _Process(launch, place) as process:
                while not launch.is_stopped():
                    process.run(waiting.get_nowait())
        except queue.Empty:
            return
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=serve, args=(place,)) for place in range(min(launch.n_workers, len(chunks)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


class _Process:
    """A worker process on its share of the machine, started when it is needed."""

    def __init__(self, launch: Launch, place: int) -> None:
        self._launch, self._place = launch, place
        self._process: subprocess.Popen[str] | None = None
        self._n_trials = 0

    def __enter__(self) -> "_Process":
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def run(self, chunk: Chunk) -> None:
        """Run a chunk, restarting the process if it dies."""
        for _ in range(MOST_DEATHS):
            if self._answers(chunk):
                self._n_trials += len(chunk.trials)
                if self._n_trials >= TRIALS_PER_PROCESS:
                    self._end()
                return
            if self._launch.is_stopped():
                return
            status = self._end()
        reason = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        ledger, log = Ledger(self._launch.folder.ledger_file), self._log.read_text(errors="replace")[-4000:]
        for trial in chunk.trials:
            if ledger.states()[trial]["event"] not in DONE:
                error = f"its process ended {MOST_DEATHS} times, at last by {reason}"
                ledger.append(trial, "failed", error=error, traceback=log)

    def _answers(self, chunk: Chunk) -> bool:
        """Whether the process has worked through a chunk; if not, it is dead. A stop is passed on to it."""
        process = self._process = self._process or self._start()
        assert process.stdin and process.stdout
        try:
            process.stdin.write(json.dumps(chunk.to_dict()) + "\n")
            process.stdin.flush()
        except OSError:
            return False
        while not select.select([process.stdout], [], [], SECONDS_BETWEEN_LOOKS)[0]:
            if self._launch.is_stopped():
                process.stdin.close()
        return process.stdout.readline() == "done\n"

    @property
    def _log(self) -> Path:
        return self._launch.folder.path / "workers" / f"{self._place}.log"

    def _start(self) -> "subprocess.Popen[str]":
        self._log.parent.mkdir(exist_ok=True)
        check_no_symlinks([self._log])
        code = self._launch.code
        command = [sys.executable, "-P", "-m", "rustgpt_jax.sweeps.worker", str(self._launch.folder.path), code.name]
        path = os.pathsep.join(filter(None, [str(code), os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"PYTHONPATH": path} | self._share()
        with open(self._log, "ab") as log:
            return subprocess.Popen(
                [*_pinned(self._place, self._launch.n_workers), *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                text=True,
                # Ctrl-C is for the launcher, which lets its workers save.
                start_new_session=True,
            )

    def _share(self) -> dict[str, str]:
        gpus = visible_gpus()
        return {"CUDA_VISIBLE_DEVICES": gpus[self._place % len(gpus)]} if gpus else {}

    def _end(self) -> int:
        """Close the input of the process so that it saves and ends, and return its exit status."""
        process, self._process, self._n_trials = self._process, None, 0
        if process is None:
            return 0
        assert process.stdin and process.stdout
        with suppress(OSError):  # What a dead process was still to be told.
            process.stdin.close()
        process.stdout.close()
        return process.wait()


def visible_gpus() -> list[str]:
    """The names by which CUDA knows the GPUs that this process may use; JAX is not started to find them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name]
    if os.environ.get("JAX_PLATFORMS", "cuda").split(",")[0] not in ("cuda", "gpu") or not shutil.which("nvidia-smi"):
        return []
    shown = subprocess.run(["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True)
    return shown.stdout.split()


def _pinned(place: int, n_workers: int) -> list[str]:
    """The beginning of a command that keeps a process on its share of the cores."""
    cores = sorted(os.sched_getaffinity(0))
    if n_workers > len(cores) or not shutil.which("taskset"):
        return []
    share = cores[place * len(cores) // n_workers : (place + 1) * len(cores) // n_workers]
    return ["taskset", "-c", ",".join(map(str, share))]
