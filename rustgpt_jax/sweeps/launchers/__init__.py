"""Where trials run: in this process, in processes of this machine, or as jobs of a Slurm cluster.

A launcher is a function of (launch, chunks) that returns when it can do no more for these chunks: all have been worked
through, or a stop was asked for. What became of the trials stands in the ledger.
"""

from collections.abc import Callable, Sequence

from rustgpt_jax.sweeps.launchers.local import Launch, inline, processes
from rustgpt_jax.sweeps.launchers.slurm import slurm
from rustgpt_jax.sweeps.planner import Chunk

Launcher = Callable[[Launch, Sequence[Chunk]], None]

LAUNCHERS: dict[str, Launcher] = {"inline": inline, "processes": processes, "slurm": slurm}
