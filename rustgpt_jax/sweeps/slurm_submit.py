"""Training as a job of Slurm, on one node or many: a script made of the command that was given, and submitted.

The job saves when it is warned, is put back in the queue, and goes on from there when it runs again.
"""

import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from rustgpt_jax.errors import UserError

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
    """Give a script to Slurm. The number of the job. Raises UserError if there is no Slurm, or if it refuses."""
    if shutil.which("sbatch") is None:
        raise UserError("--launcher=slurm: there is no sbatch here; submit from a machine of the cluster.")
    done = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"Slurm refuses the job: {' '.join(done.stderr.split())}")
    return done.stdout.strip().split(";")[0]
