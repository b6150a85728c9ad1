"""On a cluster: a Slurm job for each chunk, submitted through submitit as one array.

A job that is preempted or comes to its time limit saves its trials, asks to be put back in the queue, and goes on from
there. Jobs run the copy of the code taken at launch. The ledger, not submitit, tells what became of the trials.
"""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rustgpt_jax.errors import UserError
from rustgpt_jax.sweeps.launchers.launch import Launch
from rustgpt_jax.sweeps.ledger import Ledger
from rustgpt_jax.sweeps.planner import Chunk

SECONDS_BETWEEN_LOOKS = 2.0
ENDED = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")
# submitit's own parameters; everything else is an option of Slurm's.
NUMBERS = ("mem_gb", "nodes", "cpus_per_task", "gpus_per_node", "tasks_per_node", "array_parallelism", "signal_delay_s")


def slurm(launch: Launch, chunks: Sequence[Chunk]) -> None:
    """Submit chunks that no job is waiting for or running, and wait until all jobs have ended.

    A stop leaves the jobs to the cluster: the same command looks after them again. Raises UserError without submitit or
    Slurm, or if Slurm refuses the jobs.
    """
    jobs = _jobs_of(launch)
    awaited = [chunk for chunk in chunks if not set(chunk.trials) <= jobs.keys()]
    if awaited:
        jobs |= _submit(launch, awaited)
    while jobs and not launch.is_stopped():
        time.sleep(SECONDS_BETWEEN_LOOKS)
        alive = _alive(set(jobs.values()))
        jobs = {trial: job for trial, job in jobs.items() if job in alive}


def _jobs_of(launch: Launch) -> dict[str, str]:
    """The live job of each trial that an earlier launch has queued."""
    queued = {
        event["trial"]: event["job"]
        for event in Ledger(launch.folder.ledger_file).events()
        if event["event"] == "queued"
    }
    alive = _alive(set(queued.values())) if queued else set()
    return {trial: job for trial, job in queued.items() if job in alive}


def _submit(launch: Launch, chunks: Sequence[Chunk]) -> dict[str, str]:
    try:
        import submitit
    except ModuleNotFoundError:
        raise UserError("--launcher=slurm needs submitit: python -m pip install 'rustgpt_jax[slurm]'.") from None
    python = f"env PYTHONPATH={launch.code}:{os.environ.get('PYTHONPATH', '')} {sys.executable} -P"
    try:
        executor = submitit.AutoExecutor(launch.folder.jobs.absolute(), cluster="slurm", slurm_python=python)
        executor.update_parameters(**_parameters(launch))
        submitted = executor.map_array(Job(str(launch.folder.path.absolute()), launch.code.name), chunks)
    except (RuntimeError, NotImplementedError, submitit.core.utils.FailedJobError) as error:
        raise UserError(f"Slurm does not take the jobs: {' '.join(str(error).split())}") from error
    jobs = {trial: job.job_id for job, chunk in zip(submitted, chunks, strict=True) for trial in chunk.trials}
    Ledger(launch.folder.ledger_file).append_all([(trial, "queued", {"job": job}) for trial, job in jobs.items()])
    return jobs


def _parameters(launch: Launch) -> dict[str, Any]:
    name = launch.folder.path.absolute().name
    given: dict[str, Any] = {"name": name, "array_parallelism": launch.n_workers, **launch.slurm_options}
    return {f"slurm_{key}": int(value) if key in NUMBERS else value for key, value in given.items()}


def _alive(jobs: set[str]) -> set[str]:
    """Those of some jobs that wait or run."""
    arrays = sorted({job.split("_")[0] for job in jobs})
    # Slurm forgets old jobs, and then refuses to tell of any: ask for one array at a time.
    shown = [
        subprocess.run(
            ["squeue", "-h", "-r", "-t", "all", "-o", "%i %T", "-j", array], capture_output=True, text=True
        ).stdout
        for array in arrays
    ]
    states = dict(line.split() for text in shown for line in text.splitlines())
    return {job for job in jobs if job in states and states[job] not in ENDED}


class Job:
    """What a job of the cluster does with its chunk."""

    def __init__(self, folder: str, code: str) -> None:
        self._folder, self._code = folder, code

    def __call__(self, chunk: Chunk) -> None:
        """Work on a chunk. If the cluster wants the node back, save, and have the job queued again."""
        import jax

        from rustgpt_jax.parallel.devices import Placement, keep_compiled_programs
        from rustgpt_jax.sweeps.folder import SweepFolder
        from rustgpt_jax.sweeps.shelf import Shelf
        from rustgpt_jax.sweeps.worker import Worker
        from rustgpt_jax.training.signals import PREEMPTION, StopRequest

        keep_compiled_programs()
        folder = SweepFolder(Path(self._folder))
        with StopRequest(PREEMPTION) as stop:
            placement = Placement((jax.local_devices()[0],))
            Worker(folder, Shelf(folder.tokenizers), placement, self._code, lambda: bool(stop)).work(chunk)
        if stop:
            _requeue()
            # Not a return, which submitit would take for the end of the job.
            sys.exit(1)


def _requeue() -> None:
    """Put this job back in the queue, unless Slurm is ending it already: then it is cancelled, or requeued by Slurm."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    shown = subprocess.run(["squeue", "-h", "-j", job, "-o", "%T"], capture_output=True, text=True)
    if shown.stdout.strip() == "RUNNING":
        subprocess.run(["scontrol", "requeue", job], check=True)
