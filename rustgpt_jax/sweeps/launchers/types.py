"""What every launcher is told."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rustgpt_jax.sweeps.asset_cache import Shelf
from rustgpt_jax.sweeps.sweep_dir import SweepFolder


@dataclass(frozen=True, eq=False)
class Launch:
    """One launch of a sweep: its folder, the copy of the code that jobs run, how many workers, and when to stop.

    `slurm_options` are options of Slurm such as {'partition': 'gpu', 'time': '60'}.
    """

    folder: SweepFolder
    shelf: Shelf
    code: Path
    n_workers: int
    slurm_options: dict[str, str]
    is_stopped: Callable[[], bool]
