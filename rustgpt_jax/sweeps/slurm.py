"""Slurm launcher: one job per chunk, submitted through submitit as an array.

A job that is preempted or comes to its time limit saves its trials, asks to be put back in the queue, and goes on from
there. Jobs run the copy of the code taken at launch. The ledger, not submitit, tells what became of the trials.
"""

import contextlib
import io
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rustgpt_jax.errors import UserError
from rustgpt_jax.sweeps.launchers import Launch
from rustgpt_jax.sweeps.planner import Chunk
from rustgpt_jax.sweeps.sweep_dir import Ledger, is_settled

SECONDS_BETWEEN_LOOKS = 2.0
COMMANDS = ("sbatch", "squeue", "srun")
# PREEMPTED is not among them: such a job may yet be queued again, and if it is not, Slurm forgets it in minutes.
ENDED = (
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "TIMEOUT",
    "FORGOTTEN",
)
# A chunk whose jobs have ended so often without coming further is given up.
MOST_DEATHS = 3
# Slurm's own limit, unless a cluster has another.
MOST_IN_ARRAY = 1000


def run_on_slurm(launch: Launch, chunks: Sequence[Chunk]) -> None:
    """Submit chunks that no job is waiting for or running, and wait until all jobs have ended.

    A chunk whose job is ended by somebody else is submitted again; if that happens MOST_DEATHS times on end and it
    comes no further, its trials fail. A stop leaves the jobs to the cluster: the same command looks after them again.
    Raises UserError without submitit or Slurm, or if Slurm refuses the jobs.
    """
    _check_cluster()
    watch = _Watch(launch)
    watch.begin(chunks)
    while watch.jobs and not launch.is_stopped():
        time.sleep(SECONDS_BETWEEN_LOOKS)
        watch.look()


class _Watch:
    """The jobs of some chunks: `jobs` has those of each, several where an earlier launch has cut chunks otherwise."""

    def __init__(self, launch: Launch) -> None:
        self._launch, self._ledger = launch, Ledger(launch.folder.ledger_file)
        self._before = dict(self._ledger.states())
        self._deaths, self._reached = Counter[Chunk](), dict[Chunk, int]()
        self.jobs: dict[Chunk, set[str]] = {}

    def begin(self, chunks: Sequence[Chunk]) -> None:
        """Find the jobs that an earlier launch has left, and submit what no job has."""
        queue = _queue()
        if queue is None:
            raise UserError("Slurm does not answer: squeue fails. Try again when it does.")
        events = self._ledger.events()
        jobs = {event["trial"]: event["job"] for event in events if event["event"] == "queued"}
        alive = {trial: job for trial, job in jobs.items() if queue.get(job, "FORGOTTEN") not in ENDED}
        self.jobs = {chunk: {alive[trial] for trial in chunk.trials if trial in alive} for chunk in chunks}
        self._submit([chunk for chunk in chunks if not set(chunk.trials) <= alive.keys()])

    def look(self) -> None:
        """Let go of chunks whose jobs have ended, and submit again those that were cut short."""
        queue = _queue()
        # A controller that is down for a while keeps its jobs.
        if queue is None:
            return
        again = []
        for chunk, jobs in list(self.jobs.items()):
            states = {job: queue.get(job, "FORGOTTEN") for job in jobs}
            if set(states.values()) <= set(ENDED):
                del self.jobs[chunk]
                # A job that completes has left only trials that somebody else holds.
                cut_short = {job: state for job, state in states.items() if state != "COMPLETED"}
                if cut_short and self._left(chunk) and self._is_worth_another(chunk, *cut_short.popitem()):
                    again.append(chunk)
        self._submit(again)

    def _left(self, chunk: Chunk) -> list[str]:
        """The trials of a chunk that have neither come to its end nor failed since this began."""
        return [trial for trial in chunk.trials if not self._is_settled(trial, chunk.until)]

    def _is_settled(self, trial: str, until: int | None) -> bool:
        state = self._ledger.states()[trial]
        if state["event"] == "failed":
            return state != self._before[trial]
        return is_settled(state, until)

    def _is_worth_another(self, chunk: Chunk, job: str, state: str) -> bool:
        """Whether a chunk has not been cut short too often; if it has, its trials fail."""
        states = self._ledger.states()
        reached = sum(states[trial].get("step", 0) for trial in chunk.trials)
        self._deaths[chunk] = 1 if reached > self._reached.get(chunk, 0) else self._deaths[chunk] + 1
        self._reached[chunk] = reached
        if self._deaths[chunk] < MOST_DEATHS:
            return True
        log = self._launch.folder.jobs / f"{job}_0_log.err"
        text = log.read_text(errors="replace")[-4000:] if log.exists() else ""
        where = f"its log is {log}" if log.exists() else "it wrote no log"
        error = f"its job ended {MOST_DEATHS} times before the trial did; the last, {job}, as {state}, and {where}"
        self._ledger.append_all([(trial, "failed", {"error": error, "traceback": text}) for trial in self._left(chunk)])
        return False

    def _submit(self, chunks: Sequence[Chunk]) -> None:
        for first in range(0, len(chunks), MOST_IN_ARRAY):
            part = chunks[first : first + MOST_IN_ARRAY]
            jobs = dict(zip(part, _submitted(self._launch, part), strict=True))
            self._ledger.append_all(
                [(trial, "queued", {"job": job}) for chunk, job in jobs.items() for trial in chunk.trials]
            )
            for chunk, job in jobs.items():
                self.jobs.setdefault(chunk, set()).add(job)


def _check_cluster() -> None:
    try:
        import submitit  # noqa: F401 (imported only to check that it is installed)
    except ModuleNotFoundError:
        raise UserError("--launcher=slurm needs submitit: python -m pip install 'rustgpt_jax[slurm]'.") from None
    missing = [name for name in COMMANDS if shutil.which(name) is None]
    if missing:
        raise UserError(
            f"--launcher=slurm runs where Slurm is, such as a cluster's login node; there is no {missing[0]} here."
        )


def _submitted(launch: Launch, chunks: Sequence[Chunk]) -> list[str]:
    """Submit chunks as one array. The job of each; one chunk alone is a job that is no array."""
    import submitit

    path = os.pathsep.join(filter(None, [str(launch.code), os.environ.get("PYTHONPATH")]))
    python = shlex.join(["env", f"PYTHONPATH={path}", sys.executable, "-P"])
    try:
        # submitit prints what sbatch says before it raises it.
        with contextlib.redirect_stderr(io.StringIO()):
            executor = submitit.SlurmExecutor(launch.folder.jobs.absolute(), python=python)
            executor.update_parameters(**_parameters(launch))
            jobs = executor.map_array(Job(str(launch.folder.path.absolute()), launch.code.name), chunks)
    except RuntimeError as error:
        lines = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in str(error).splitlines()]
        raise UserError(f"Slurm does not take the jobs: {'; '.join(filter(None, lines))}.") from error
    return [job.job_id for job in jobs]


def _parameters(launch: Launch) -> dict[str, Any]:
    """What submitit is told. Options of Slurm are passed on as they are; one without a value is a flag."""
    options = {key.replace("-", "_"): value or True for key, value in launch.slurm_options.items()}
    # srun does not take over this option of sbatch's.
    cores = [f"--cpus-per-task={options['cpus_per_task']}"] if "cpus_per_task" in options else []
    return {
        "job_name": launch.folder.path.absolute().name,
        "array_parallelism": launch.n_workers,
        # Otherwise submitit sets a limit of minutes; the partition has its own.
        "time": None,
        "srun_args": cores,
        "additional_parameters": options,
    }


def _queue() -> dict[str, str] | None:
    """The states of the user's jobs, as far as Slurm remembers them; None if it does not answer."""
    # Asked for a job that it has forgotten, it would tell of none.
    command = ["squeue", "--me", "--all", "--noheader", "--array", "--states=all", "--format=%i %T"]
    shown = subprocess.run(command, capture_output=True, text=True)
    return None if shown.returncode else dict(line.split() for line in shown.stdout.splitlines())


class Job:
    """What a job of the cluster does with its chunk."""

    def __init__(self, folder: str, code: str) -> None:
        self._folder, self._code = folder, code

    def __call__(self, chunk: Chunk) -> None:
        """Work on a chunk. If the cluster wants the node back, save, and have the job queued again."""
        from rustgpt_jax.training.preemption import StopRequest

        with StopRequest() as stop:
            import jax

            from rustgpt_jax.sharding.compilation_cache import enable_compilation_cache
            from rustgpt_jax.sweeps.asset_cache import AssetCache
            from rustgpt_jax.sweeps.sweep_dir import SweepDir
            from rustgpt_jax.sweeps.worker import Worker

            enable_compilation_cache()
            folder = SweepDir(Path(self._folder))
            shelf = AssetCache(folder.tokenizers)
            Worker(folder, shelf, jax.local_devices(), self._code, lambda: bool(stop)).work(chunk)
        if stop:
            _requeue()
            # Not a return, which submitit would take for the end of the job.
            sys.exit(1)


def _requeue() -> None:
    """Requeue this job, unless Slurm is ending it already."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    shown = subprocess.run(["squeue", "-h", "-j", job, "-o", "%T"], capture_output=True, text=True)
    if shown.stdout.strip() == "RUNNING":
        # Where Slurm refuses, the job has ended, and the launcher submits its chunk anew.
        subprocess.run(["scontrol", "requeue", job])


# Training as a job of Slurm, on one node or many: a script made of the command that was given, and submitted.
#
# The job saves when it is warned, is put back in the queue, and goes on from there when it runs again.

# Seconds between the warning and the end of the time, in which the job saves.
GRACE = 120
# A job that loses a process is queued again as long as it has been queued again less often than this.
MOST_LOSSES = 10
# One process a node, with all its devices, unless --slurm says otherwise.
DEFAULTS = {"nodes": "1", "ntasks_per_node": "1"}

SCRIPT = """\
#!/bin/bash
{options}
cd {folder}
srun ${{SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK}} {command}
status=$?
# 75: warned, it has saved, and goes on when its turn comes again. Above: a process was killed, or has lost another.
if [ $status = 75 ] || {{ [ $status -gt 75 ] && [ ${{SLURM_RESTART_COUNT:-0}} -lt {most_losses} ]; }}; then
  scontrol requeue $SLURM_JOB_ID
fi
exit $status
"""


def job_script(run: Path, command: Sequence[str], options: Mapping[str, str], folder: Path) -> str:
    """The script of a job that trains a run by a command in a folder. Its log lies beside the run's folder."""
    log = run.absolute().with_name(f"{run.name}.slurm-%j.log")
    own = {"job_name": run.name, "output": str(log), "open_mode": "append", "signal": f"USR1@{GRACE}"}
    asked = {key.replace("-", "_"): value for key, value in options.items()}
    # Who asks for a number of tasks says how they lie, too.
    defaults = {} if "ntasks" in asked else DEFAULTS
    every = {key.replace("_", "-"): value for key, value in {**own, **defaults, **asked}.items()}
    lines = [f"#SBATCH --{key}={value}" if value else f"#SBATCH --{key}" for key, value in every.items()]
    return SCRIPT.format(
        options="\n".join([*lines, "#SBATCH --requeue"]),
        folder=shlex.quote(str(folder)),
        command=shlex.join(command),
        most_losses=MOST_LOSSES,
    )


def submit(script: str) -> str:
    """Submit a script to Slurm and return the job number. Raises UserError if Slurm is missing or refuses."""
    if shutil.which("sbatch") is None:
        raise UserError("--launcher=slurm: there is no sbatch here; submit from a machine of the cluster.")
    done = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"Slurm refuses the job: {' '.join(done.stderr.split())}")
    return done.stdout.strip().split(";")[0]
