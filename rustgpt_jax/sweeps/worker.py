"""Worker loop, which claims the trials of a chunk, trains them, and records their outcomes.

A worker process reads chunks from standard input, one JSON object per line, and writes a line to standard output after
each. The end of the input means that the launcher has exited: the worker saves its trials and exits, too.
"""

import dataclasses
import os
import queue
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import jax

from rustgpt_jax.data.preprocess import AssetCache
from rustgpt_jax.errors import is_out_of_memory
from rustgpt_jax.process_setup import StopRequest
from rustgpt_jax.sharding.sharding_plan import plan_for_devices
from rustgpt_jax.sweeps.sweep_dir import Ledger, SweepDir
from rustgpt_jax.sweeps.trial_batching import Chunk
from rustgpt_jax.training.loop import PopulationExecutor, SingleRunExecutor, run_training_loop
from rustgpt_jax.training.memory_estimate import out_of_memory_message
from rustgpt_jax.training.run_inputs import RunInputs
from rustgpt_jax.training.trainer import Trainer
from rustgpt_jax.workdir.run_dir import RunLockedError, load_config, load_origins


class _NoProgress:
    """A progress display that shows nothing."""

    def update(self, step: int, values: Mapping[str, float], stage: str) -> None:
        """Do nothing."""

    def update_evaluation(self, done: int, total: int) -> None:
        """Do nothing."""

    def message(self, text: str) -> None:
        """Do nothing."""


@cache
def _warn_once(text: str) -> None:
    """Print a warning about a tracker, which is likely to be the same for all trials."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


class Worker:
    """Runs chunks of a sweep on the first of some devices, in the thread that calls it.

    Args:
        folder: The folder of the sweep.
        assets: The tokenizers and data of the trials.
        devices: The devices of this worker.
        code: The hash of the code, for the ledger.
        is_stop_requested: A function that returns whether to save and stop.
    """

    def __init__(
        self,
        folder: SweepDir,
        assets: AssetCache,
        devices: Sequence[jax.Device],
        code: str,
        is_stop_requested: Callable[[], bool],
    ) -> None:
        self._folder, self._assets, self._devices = folder, assets, devices
        self._ledger, self._is_stop_requested = Ledger(folder.ledger_file), is_stop_requested
        self._identity = {"host": socket.gethostname(), "process": os.getpid(), "code": code}

    def run_chunk(self, chunk: Chunk) -> None:
        """Run the trials of a chunk that are neither done nor locked by another worker.

        After an error, each trial is run alone in the same program, so that only the one that causes it is marked as
        failed.
        """
        with ExitStack() as locks:
            runs = {trial: run for trial in chunk.trials if (run := self._claim(trial, chunk, locks)) is not None}
            try:
                if runs:
                    self._train(runs, chunk)
                return
            except Exception as error:
                if len(runs) == 1:
                    self._record_failure(next(iter(runs)), error)
                    return
        for trial in runs:
            self.run_chunk(dataclasses.replace(chunk, trials=(trial,)))

    def _claim(self, trial: str, chunk: Chunk, locks: ExitStack) -> Trainer | None:
        """Lock a trial and return its trainer, or None if it is done, locked by another worker, or invalid."""
        if self._is_stop_requested() or self._ledger.is_done(trial):
            return None
        folder = self._folder.trial(trial)
        try:
            config = load_config(folder.path)
            inputs = RunInputs(config, *self._assets.prepare(config))
            plan = plan_for_devices(inputs.config.mesh, self._devices[: chunk.devices])
            inputs.check(folder, plan.n_devices)
            origins = load_origins(folder.path)
            run = Trainer(inputs, folder.path, origins, plan, chunk.until, self._folder.path, _warn_once)
            locks.enter_context(run)
        except RunLockedError:
            return None
        except Exception as error:
            self._record_failure(trial, error)
            return None
        # Another worker may have finished it between the first check and the lock.
        return None if self._ledger.is_done(trial) else run

    def _train(self, runs: Mapping[str, Trainer], chunk: Chunk) -> None:
        groups = [{trial: run} for trial, run in runs.items()] if chunk.mode == "solo" else [runs]
        for group in groups:
            members = list(group.values())
            for run in members:
                run.begin(_NoProgress(), chunk.mode, chunk.width)
            details = {**self._identity, "mode": chunk.mode, "width": chunk.width}
            self._ledger.append_all([(trial, "began", {"step": run.step, **details}) for trial, run in group.items()])
            if chunk.mode == "solo":
                run_training_loop(members, SingleRunExecutor(members[0]), self._is_stop_requested)
            elif not all(run.is_finished for run in members):
                run_training_loop(
                    members, PopulationExecutor(chunk.mode, members, chunk.width), self._is_stop_requested
                )
            for run in members:
                run.finish()
            self._ledger.append_all([(trial, *_get_outcome(run)) for trial, run in group.items()])

    def _record_failure(self, trial: str, error: Exception) -> None:
        message = " ".join(str(error).split()) or type(error).__name__
        if is_out_of_memory(error):
            message = f"{out_of_memory_message(load_config(self._folder.trial(trial).path))} ({message})"
        self._ledger.append(trial, "failed", error=message, traceback="".join(traceback.format_exception(error)))


def _get_outcome(run: Trainer) -> tuple[str, dict[str, int]]:
    if run.diverged_at is not None:
        return "diverged", {"step": run.diverged_at}
    is_complete = run.is_finished and run.step >= run.inputs.total_steps
    return "finished" if is_complete else "stopped", {"step": run.step}


def main(sweep: str, code: str) -> None:
    """Run the chunks from standard input on the devices of this process, until the input ends."""
    from rustgpt_jax.process_setup import enable_compilation_cache, keep_freed_memory

    keep_freed_memory()
    enable_compilation_cache()
    folder = SweepDir(Path(sweep))
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    is_orphaned = threading.Event()

    def read_input() -> None:
        for line in sys.stdin:
            lines.put(line)
        is_orphaned.set()
        lines.put(None)

    with StopRequest() as stop:
        threading.Thread(target=read_input, daemon=True).start()
        assets, devices = AssetCache(folder.tokenizers), jax.local_devices()
        worker = Worker(folder, assets, devices, code, lambda: bool(stop) or is_orphaned.is_set())
        while not stop and (line := lines.get()) is not None:
            worker.run_chunk(Chunk.from_json(line))
            print("done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
