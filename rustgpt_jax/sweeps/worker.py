"""Worker loop: claim the trials of a chunk, train them, and record their outcomes.

Workers in other processes are told their chunks on standard input, one JSON object a line, and answer each with a line
on standard output. Where the input ends, whoever told them is gone: they save and end.
"""

import dataclasses
import json
import os
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import jax

from rustgpt_jax.errors import is_out_of_memory
from rustgpt_jax.sharding.sharding_plan import plan_for_devices
from rustgpt_jax.sweeps.asset_cache import AssetCache
from rustgpt_jax.sweeps.planner import Chunk
from rustgpt_jax.sweeps.sweep_dir import Ledger, SweepDir
from rustgpt_jax.training.executors import PopulationExecutor, SingleRunExecutor
from rustgpt_jax.training.loop import run_training_loop
from rustgpt_jax.training.memory_estimate import out_of_memory_message
from rustgpt_jax.training.preemption import StopRequest
from rustgpt_jax.training.trainer import Trainer
from rustgpt_jax.workdir.run_dir import RunLockedError, load_config, load_origins


class _Quiet:
    """A progress display that shows nothing."""

    def update(self, step: int, values: Mapping[str, float], stage: str) -> None:
        """Do nothing."""

    def evaluating(self, done: int, total: int) -> None:
        """Do nothing."""

    def message(self, text: str) -> None:
        """Do nothing."""


class Worker:
    """Runs chunks of a sweep on some devices, the first ones of these, on the thread that calls it."""

    def __init__(
        self,
        folder: SweepDir,
        shelf: AssetCache,
        devices: Sequence[jax.Device],
        code: str,
        is_stopped: Callable[[], bool],
    ) -> None:
        self._folder, self._shelf, self._devices = folder, shelf, devices
        self._ledger, self._is_stopped = Ledger(folder.ledger_file), is_stopped
        self._identity = {"host": socket.gethostname(), "process": os.getpid(), "code": code}

    def work(self, chunk: Chunk) -> None:
        """Run the trials of a chunk that are neither done nor held by another worker.

        If something fails that is not the user's asking to stop, each trial is run alone in the same program, so that
        only the one that causes it is marked as failed.
        """
        with ExitStack() as held:
            runs = {trial: run for trial in chunk.trials if (run := self._claim(trial, chunk, held)) is not None}
            try:
                if runs:
                    self._train(runs, chunk)
                return
            except Exception as error:
                if len(runs) == 1:
                    self._failed(next(iter(runs)), error)
                    return
        for trial in runs:
            self.work(dataclasses.replace(chunk, trials=(trial,)))

    def _claim(self, trial: str, chunk: Chunk, held: ExitStack) -> Trainer | None:
        """Lock a trial, unless it is done, held by another worker, or not runnable."""
        if self._is_stopped() or self._ledger.is_done(trial):
            return None
        folder = self._folder.trial(trial)
        try:
            inputs = self._shelf.inputs(load_config(folder.path))
            plan = plan_for_devices(inputs.config.mesh, self._devices[: chunk.devices])
            inputs.check(folder, plan.n_devices)
            run = held.enter_context(Trainer(inputs, folder.path, load_origins(folder.path), plan, chunk.until))
        except RunLockedError:
            return None
        except Exception as error:
            self._failed(trial, error)
            return None
        # It may have been done between the first look and the lock.
        return None if self._ledger.is_done(trial) else run

    def _train(self, runs: Mapping[str, Trainer], chunk: Chunk) -> None:
        if chunk.mode == "solo":
            for trial, run in runs.items():
                self._begin({trial: run}, chunk)
                run_training_loop([run], SingleRunExecutor(run), self._is_stopped)
                self._ended({trial: run})
            return
        self._begin(runs, chunk)
        members = list(runs.values())
        if not all(run.is_over for run in members):
            run_training_loop(members, PopulationExecutor(chunk.mode, members, chunk.width), self._is_stopped)
        self._ended(runs)

    def _begin(self, runs: Mapping[str, Trainer], chunk: Chunk) -> None:
        for run in runs.values():
            run.begin(_Quiet(), chunk.mode, chunk.width)
        about = {**self._identity, "mode": chunk.mode, "width": chunk.width}
        self._ledger.append_all([(trial, "began", {"step": run.step, **about}) for trial, run in runs.items()])

    def _ended(self, runs: Mapping[str, Trainer]) -> None:
        for run in runs.values():
            run.finish()
        self._ledger.append_all([(trial, *_outcome(run)) for trial, run in runs.items()])

    def _failed(self, trial: str, error: Exception) -> None:
        sentence = " ".join(str(error).split()) or type(error).__name__
        if is_out_of_memory(error):
            sentence = f"{out_of_memory_message(load_config(self._folder.trial(trial).path))} ({sentence})"
        self._ledger.append(trial, "failed", error=sentence, traceback="".join(traceback.format_exception(error)))


def _outcome(run: Trainer) -> tuple[str, dict[str, int]]:
    if run.diverged_at is not None:
        return "diverged", {"step": run.diverged_at}
    is_finished = run.is_over and run.step >= run.inputs.total_steps
    return "finished" if is_finished else "stopped", {"step": run.step}


def main(sweep: str, code: str) -> None:
    """Work through the chunks of standard input on the devices of this process, until it ends."""
    from rustgpt_jax.malloc import keep_freed_memory
    from rustgpt_jax.sharding.compilation_cache import enable_compilation_cache

    keep_freed_memory()
    enable_compilation_cache()
    folder = SweepDir(Path(sweep))
    told: list[str] = []
    arrived, is_alone = threading.Semaphore(0), threading.Event()

    def listen() -> None:
        for line in sys.stdin:
            told.append(line)
            arrived.release()
        is_alone.set()
        arrived.release()

    with StopRequest() as stop:
        threading.Thread(target=listen, daemon=True).start()
        shelf, devices = AssetCache(folder.tokenizers), jax.local_devices()
        worker = Worker(folder, shelf, devices, code, lambda: bool(stop) or is_alone.is_set())
        while not stop:
            arrived.acquire()
            if not told:
                return
            worker.work(Chunk.from_dict(json.loads(told.pop(0))))
            print("done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
