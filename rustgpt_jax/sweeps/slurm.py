"""Slurm: the launcher of sweeps, with one job per chunk, and the job script of a single training run.

A job that is preempted or reaches its time limit saves its trials, requeues itself, and resumes later. Jobs run the
copy of the code taken at launch. The outcomes of trials are read from the ledger rather than from submitit.
"""

import contextlib
import io
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rustgpt_jax.errors import UserError
from rustgpt_jax.sweeps.local_launchers import MAX_DEATHS, ChunkRetries, Launch
from rustgpt_jax.sweeps.sweep_dir import Ledger
from rustgpt_jax.sweeps.trial_batching import Chunk

POLL_SECONDS = 2.0
COMMANDS = ("sbatch", "squeue", "srun")
# The state of a job that squeue no longer lists.
FORGOTTEN = "FORGOTTEN"
# PREEMPTED is not included: such a job may be requeued; if it is not, Slurm forgets it within minutes.
ENDED_JOBS = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"}
ENDED_JOBS.add(FORGOTTEN)
# Slurm's default limit.
MAX_ARRAY_SIZE = 1000


def run_on_slurm(launch: Launch, chunks: Sequence[Chunk]) -> None:
    """Submit chunks that have no job yet, and wait until all jobs finish.

    A chunk whose job was cancelled or failed is resubmitted; after MAX_DEATHS such jobs in a row without progress, its
    trials fail. After a stop, the jobs continue on the cluster, and the same command monitors them again.

    Raises:
        UserError: submitit or Slurm is missing, or Slurm rejects the jobs.
    """
    _check_cluster()
    monitor = _JobMonitor(launch)
    monitor.start(chunks)
    while monitor.jobs and not launch.is_stop_requested():
        time.sleep(POLL_SECONDS)
        monitor.poll()


def _check_cluster() -> None:
    try:
        import submitit  # noqa: F401 (imported only to check that it is installed)
    except ModuleNotFoundError:
        raise UserError("--launcher=slurm needs submitit: python -m pip install 'rustgpt_jax[slurm]'.") from None
    missing = [name for name in COMMANDS if shutil.which(name) is None]
    if missing:
        raise UserError(
            f"--launcher=slurm must run on a machine with Slurm, such as a cluster's login node; {missing[0]} is "
            "missing here."
        )


class _JobMonitor:
    """Submits and monitors jobs.

    Attributes:
        jobs: The jobs of each chunk; several if an earlier launch divided the trials differently.
    """

    def __init__(self, launch: Launch) -> None:
        self._launch, self._ledger = launch, Ledger(launch.folder.ledger_file)
        self._retries = ChunkRetries(launch.folder)
        self.jobs: dict[Chunk, set[str]] = {}

    def start(self, chunks: Sequence[Chunk]) -> None:
        """Find the jobs of an earlier launch, and submit the chunks that have none."""
        queue = _read_queue()
        if queue is None:
            raise UserError("Slurm does not respond: squeue fails. Try again later.")
        jobs = {event["trial"]: event["job"] for event in self._ledger.events() if event["event"] == "queued"}
        alive = {trial: job for trial, job in jobs.items() if queue.get(job, FORGOTTEN) not in ENDED_JOBS}
        self.jobs = {chunk: {alive[trial] for trial in chunk.trials if trial in alive} for chunk in chunks}
        self._submit([chunk for chunk in chunks if not set(chunk.trials) <= alive.keys()])

    def poll(self) -> None:
        """Remove chunks whose jobs have finished, and resubmit those that are not done."""
        queue = _read_queue()
        # While the controller is down, its jobs continue.
        if queue is None:
            return
        retried = []
        for chunk, jobs in list(self.jobs.items()):
            states = {job: queue.get(job, FORGOTTEN) for job in jobs}
            if set(states.values()) <= ENDED_JOBS:
                del self.jobs[chunk]
                # The only trials that an ended job leaves unfinished are locked by other workers.
                failed = {job: state for job, state in states.items() if state != "COMPLETED"}
                if failed and self._retries.unfinished(chunk) and self._should_retry(chunk, *failed.popitem()):
                    retried.append(chunk)
        self._submit(retried)

    def _should_retry(self, chunk: Chunk, job: str, state: str) -> bool:
        """Return whether to resubmit a chunk; if not, record its trials as failed."""
        if self._retries.should_retry(chunk):
            return True
        error = f"its job ended {MAX_DEATHS} times before the trial was done; the last job, {job}, ended as {state}"
        self._retries.record_failure(chunk, error, self._launch.folder.jobs / f"{job}_0_log.err")
        return False

    def _submit(self, chunks: Sequence[Chunk]) -> None:
        for first in range(0, len(chunks), MAX_ARRAY_SIZE):
            part = chunks[first : first + MAX_ARRAY_SIZE]
            jobs = dict(zip(part, _submit_array(self._launch, part), strict=True))
            self._ledger.append_all(
                [(trial, "queued", {"job": job}) for chunk, job in jobs.items() for trial in chunk.trials]
            )
            for chunk, job in jobs.items():
                self.jobs.setdefault(chunk, set()).add(job)


def _submit_array(launch: Launch, chunks: Sequence[Chunk]) -> list[str]:
    """Submit chunks as one job array (a single chunk as a plain job), and return the job ID of each."""
    import submitit

    path = os.pathsep.join(filter(None, [str(launch.code), os.environ.get("PYTHONPATH")]))
    python = shlex.join(["env", f"PYTHONPATH={path}", sys.executable, "-P"])
    # Options are passed through; those without a value are flags. srun does not inherit --cpus-per-task from sbatch.
    options = {key.replace("-", "_"): value or True for key, value in launch.options.items()}
    cores = [f"--cpus-per-task={options['cpus_per_task']}"] if "cpus_per_task" in options else []
    try:
        # submitit prints the output of sbatch before it raises an exception with it.
        with contextlib.redirect_stderr(io.StringIO()):
            executor = submitit.SlurmExecutor(launch.folder.jobs.absolute(), python=python)
            executor.update_parameters(
                job_name=launch.folder.path.absolute().name,
                array_parallelism=launch.n_workers,
                # Use the partition's time limit instead of submitit's, which is a few minutes.
                time=None,
                srun_args=cores,
                additional_parameters=options,
            )
            jobs = executor.map_array(Job(str(launch.folder.path.absolute()), launch.code.name), chunks)
    except RuntimeError as error:
        lines = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in str(error).splitlines()]
        raise UserError(f"Slurm rejects the jobs: {'; '.join(filter(None, lines))}.") from error
    return [job.job_id for job in jobs]


def _read_queue() -> dict[str, str] | None:
    """Return the states of the user's jobs that Slurm remembers, or None if Slurm does not respond."""
    # Query all jobs: a query for a single forgotten job returns nothing at all.
    command = ["squeue", "--me", "--all", "--noheader", "--array", "--states=all", "--format=%i %T"]
    shown = subprocess.run(command, capture_output=True, text=True)
    return None if shown.returncode else dict(line.split() for line in shown.stdout.splitlines())


class Job:
    """The function that a cluster job runs on its chunk; submitit pickles it."""

    def __init__(self, folder: str, code: str) -> None:
        self._folder, self._code = folder, code

    def __call__(self, chunk: Chunk) -> None:
        """Run a chunk. If the cluster reclaims the node, save and requeue the job."""
        from rustgpt_jax.process_setup import StopRequest

        with StopRequest() as stop:
            import jax

            from rustgpt_jax.data.preprocess import AssetCache
            from rustgpt_jax.process_setup import enable_compilation_cache
            from rustgpt_jax.sweeps.sweep_dir import SweepDir
            from rustgpt_jax.sweeps.worker import Worker

            enable_compilation_cache()
            folder = SweepDir(Path(self._folder))
            assets = AssetCache(folder.tokenizers)
            Worker(folder, assets, jax.local_devices(), self._code, lambda: bool(stop)).run_chunk(chunk)
        if stop:
            _requeue()
            # If this function returned, submitit would consider the job finished.
            sys.exit(1)


def _requeue() -> None:
    """Requeue this job, unless Slurm is already ending it."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    shown = subprocess.run(["squeue", "-h", "-j", job, "-o", "%T"], capture_output=True, text=True)
    if shown.stdout.strip() == "RUNNING":
        # If Slurm refuses, the job ends, and the launcher resubmits its chunk.
        subprocess.run(["scontrol", "requeue", job])


# A single training run as a Slurm job, on one node or more. The job saves when Slurm warns it, requeues itself, and
# resumes when it runs again.

# Seconds between the warning and the time limit, for saving.
GRACE = 120
# A job that loses a process is requeued at most this often.
MAX_REQUEUES = 10
# One process per node with all its devices, unless --slurm specifies otherwise.
DEFAULTS = {"nodes": "1", "ntasks_per_node": "1"}

SCRIPT = """\
#!/bin/bash
{options}
cd {folder}
srun ${{SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK}} {command}
status=$?
# 75: saved after a warning; resume when rescheduled. Above 75: a process was killed, or lost contact with another one.
if [ $status = 75 ] || {{ [ $status -gt 75 ] && [ ${{SLURM_RESTART_COUNT:-0}} -lt {max_requeues} ]; }}; then
  scontrol requeue $SLURM_JOB_ID
fi
exit $status
"""


def make_job_script(run: Path, command: Sequence[str], options: Mapping[str, str], folder: Path) -> str:
    """Return the script of a job that trains a run with a command in a folder; its log is next to the run's folder."""
    log = run.absolute().with_name(f"{run.name}.slurm-%j.log")
    own = {"job_name": run.name, "output": str(log), "open_mode": "append", "signal": f"USR1@{GRACE}"}
    given = {key.replace("-", "_"): value for key, value in options.items()}
    # If the number of tasks is given, Slurm distributes them.
    defaults = {} if "ntasks" in given else DEFAULTS
    every = {key.replace("_", "-"): value for key, value in {**own, **defaults, **given}.items()}
    lines = [f"#SBATCH --{key}={value}" if value else f"#SBATCH --{key}" for key, value in every.items()]
    return SCRIPT.format(
        options="\n".join([*lines, "#SBATCH --requeue"]),
        folder=shlex.quote(str(folder)),
        command=shlex.join(command),
        max_requeues=MAX_REQUEUES,
    )


def submit(script: str) -> str:
    """Submit a script to Slurm and return the job ID. Raises UserError if Slurm is missing or rejects it."""
    if shutil.which("sbatch") is None:
        raise UserError("--launcher=slurm: sbatch is missing here; submit from a machine of the cluster.")
    done = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"Slurm rejects the job: {' '.join(done.stderr.split())}")
    return done.stdout.strip().split(";")[0]
