"""Where trials run: in this process, in processes of this machine, or as jobs of a Slurm cluster.

A launcher is a function of (launch, chunks) that returns when it can do no more for these chunks: all have been worked
through, or a stop was asked for. What became of the trials stands in the ledger.
"""

from collections.abc import Callable, Sequence

from rustgpt_jax.sweeps.launchers.local import Launch, run_in_subprocesses, run_inline
from rustgpt_jax.sweeps.launchers.slurm import run_on_slurm
from rustgpt_jax.sweeps.planner import Chunk

Launcher = Callable[[Launch, Sequence[Chunk]], None]

LAUNCHERS: dict[str, Launcher] = {"inline": run_inline, "processes": run_in_subprocesses, "slurm": run_on_slurm}
