"""Launchers on this machine: threads of this process, or subprocesses. Also what all launchers share."""

import os
import select
import shutil
import signal
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import jax

from rustgpt_jax.data.preprocess import AssetCache
from rustgpt_jax.errors import PROGRAM_VARIABLE, program_name
from rustgpt_jax.sweeps.sweep_dir import DONE, Ledger, SweepDir, is_done_until
from rustgpt_jax.sweeps.trial_batching import Chunk
from rustgpt_jax.sweeps.worker import Worker
from rustgpt_jax.workdir.run_dir import check_no_symlinks

# A chunk fails after its process has died this many times, or after its job on a cluster has ended this many times in a
# row without making progress.
MAX_DEATHS = 3
# A worker process is replaced after this many trials, since libraries leak a few KB per checkpoint.
TRIALS_PER_PROCESS = 500
POLL_SECONDS = 0.2
Place = TypeVar("Place")


@dataclass(frozen=True, eq=False)
class Launch:
    """One launch of a sweep.

    Attributes:
        folder: The folder of the sweep.
        assets: The tokenizers and data of the trials.
        code: The copy of the code that jobs run.
        n_workers: The number of worker processes, or of cluster jobs at a time.
        options: The options of the launcher, such as {'partition': 'gpu', 'time': '60'} for Slurm.
        is_stop_requested: A function that returns whether to save and stop.
    """

    folder: SweepDir
    assets: AssetCache
    code: Path
    n_workers: int
    options: dict[str, str]
    is_stop_requested: Callable[[], bool]


class ChunkRetries:
    """Decides whether to run a chunk again whose job on a cluster ended before its trials did."""

    def __init__(self, folder: SweepDir) -> None:
        self._ledger = Ledger(folder.ledger_file)
        self._states_before = dict(self._ledger.states())
        self._deaths, self._steps = Counter[Chunk](), dict[Chunk, int]()

    def unfinished(self, chunk: Chunk) -> list[str]:
        """Return the trials that have neither reached the end of their chunk nor failed since this launch began."""
        states = self._ledger.states()

        def is_finished(trial: str) -> bool:
            if states[trial]["event"] == "failed":
                return states[trial] != self._states_before[trial]
            return is_done_until(states[trial], chunk.until)

        return [trial for trial in chunk.trials if not is_finished(trial)]

    def should_retry(self, chunk: Chunk) -> bool:
        """Count a job that ended early, and return whether to run the chunk again."""
        states = self._ledger.states()
        steps = sum(states[trial].get("step", 0) for trial in chunk.trials)
        self._deaths[chunk] = 1 if steps > self._steps.get(chunk, 0) else self._deaths[chunk] + 1
        self._steps[chunk] = steps
        return self._deaths[chunk] < MAX_DEATHS

    def record_failure(self, chunk: Chunk, error: str, log: Path) -> None:
        """Record that the unfinished trials of a chunk failed, with the end of a log file if there is one."""
        text = log.read_text(errors="replace")[-4000:] if log.exists() else ""
        where = f"its log is {log}" if log.exists() else "it wrote no log"
        details = {"error": f"{error}; {where}", "traceback": text}
        self._ledger.append_all([(trial, "failed", details) for trial in self.unfinished(chunk)])


def run_inline(launch: Launch, chunks: Sequence[Chunk]) -> None:
    """Run chunks concurrently in this process, each on a group of as many devices as it needs."""
    devices = jax.local_devices()

    def run_on(group: Sequence[jax.Device], pending: Iterator[Chunk]) -> None:
        worker = Worker(launch.folder, launch.assets, group, launch.code.name, launch.is_stop_requested)
        with jax.default_device(group[0]):
            for chunk in pending:
                worker.run_chunk(chunk)

    for needed in dict.fromkeys(chunk.devices for chunk in chunks):
        size = needed or len(devices)
        groups = [devices[first : first + size] for first in range(0, len(devices) - size + 1, size)]
        _run_in_threads(launch, run_on, groups, [chunk for chunk in chunks if chunk.devices == needed])


def run_in_subprocesses(launch: Launch, chunks: Sequence[Chunk]) -> None:
    """Run chunks in `n_workers` processes. If a process dies, a new one resumes its chunk."""

    def run_in_process(index: int, pending: Iterator[Chunk]) -> None:
        process = _WorkerProcess(launch, index)
        try:
            for chunk in pending:
                process.run_chunk(chunk)
        finally:
            process.stop()

    _run_in_threads(launch, run_in_process, range(launch.n_workers), chunks)


def _run_in_threads(
    launch: Launch, run: Callable[[Place, Iterator[Chunk]], None], places: Sequence[Place], chunks: Sequence[Chunk]
) -> None:
    """Distribute chunks among threads, one per place. Raises the first error after all threads finish."""
    queue = deque(chunks)

    def take_chunks() -> Iterator[Chunk]:
        while not launch.is_stop_requested():
            try:
                yield queue.popleft()
            except IndexError:
                return

    places = places[: len(chunks)]
    if places:
        with ThreadPoolExecutor(len(places)) as pool:
            threads = [pool.submit(run, place, take_chunks()) for place in places]
        for thread in threads:
            thread.result()


class _WorkerProcess:
    """A worker process on its share of the cores or GPUs, started when it is first needed."""

    def __init__(self, launch: Launch, index: int) -> None:
        self._launch, self._index = launch, index
        self._log = launch.folder.path / "workers" / f"{index}.log"
        self._process: subprocess.Popen[str] | None = None
        self._n_trials = 0

    def run_chunk(self, chunk: Chunk) -> None:
        """Run a chunk, restarting the process if it dies."""
        for _ in range(MAX_DEATHS):
            if self._try_chunk(chunk):
                self._n_trials += len(chunk.trials)
                if self._n_trials >= TRIALS_PER_PROCESS:
                    self.stop()
                return
            if self._launch.is_stop_requested():
                return
            status = self.stop()
        reason = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        ledger, log = Ledger(self._launch.folder.ledger_file), self._log.read_text(errors="replace")[-4000:]
        for trial in chunk.trials:
            if ledger.states()[trial]["event"] not in DONE:
                error = f"its process died {MAX_DEATHS} times, most recently with {reason}"
                ledger.append(trial, "failed", error=error, traceback=log)

    def _try_chunk(self, chunk: Chunk) -> bool:
        """Run a chunk, forward a stop request to the process, and return False if the process died."""
        process = self._process = self._process or self._start()
        assert process.stdin and process.stdout
        try:
            process.stdin.write(chunk.to_json() + "\n")
            process.stdin.flush()
        except OSError:
            return False
        while not select.select([process.stdout], [], [], POLL_SECONDS)[0]:
            if self._launch.is_stop_requested():
                process.stdin.close()
        return process.stdout.readline() == "done\n"

    def _start(self) -> "subprocess.Popen[str]":
        self._log.parent.mkdir(exist_ok=True)
        check_no_symlinks([self._log])
        code, gpus = self._launch.code, find_visible_gpus()
        command = [sys.executable, "-P", "-m", "rustgpt_jax.sweeps.worker", str(self._launch.folder.path), code.name]
        path = os.pathsep.join(filter(None, [str(code), os.environ.get("PYTHONPATH")]))
        own_gpu = {"CUDA_VISIBLE_DEVICES": gpus[self._index % len(gpus)]} if gpus else {}
        with open(self._log, "ab") as log:
            return subprocess.Popen(
                [*_pin_to_cores(self._index, self._launch.n_workers), *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=os.environ | {"PYTHONPATH": path, PROGRAM_VARIABLE: program_name()} | own_gpu,
                text=True,
                # Ctrl-C should reach only the launcher, which lets its workers save.
                start_new_session=True,
            )

    def stop(self) -> int:
        """Close the input of the process so that it saves and exits, and return its exit status."""
        process, self._process, self._n_trials = self._process, None, 0
        if process is None:
            return 0
        assert process.stdin and process.stdout
        # Flushing the buffer fails if the process is dead.
        with suppress(OSError):
            process.stdin.close()
        process.stdout.close()
        return process.wait()


def find_visible_gpus() -> list[str]:
    """Return the CUDA names of the GPUs that this process may use, without starting JAX."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    if os.environ.get("JAX_PLATFORMS", "cuda").split(",")[0] not in ("cuda", "gpu") or not shutil.which("nvidia-smi"):
        return []
    shown = subprocess.run(["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True)
    return shown.stdout.split()


def _pin_to_cores(index: int, n_workers: int) -> list[str]:
    """Return the prefix of a command that pins a worker process to its share of the cores."""
    cores = sorted(os.sched_getaffinity(0))
    if n_workers > len(cores) or not shutil.which("taskset"):
        return []
    share = cores[index * len(cores) // n_workers : (index + 1) * len(cores) // n_workers]
    return ["taskset", "-c", ",".join(map(str, share))]
