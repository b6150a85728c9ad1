"""In this process: a thread for each device, or for each group of them, takes one chunk after another."""

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax

from rustgpt_jax.sweeps.asset_cache import AssetCache
from rustgpt_jax.sweeps.planner import Chunk
from rustgpt_jax.sweeps.sweep_dir import SweepDir
from rustgpt_jax.sweeps.worker import Worker

# What every launcher is told.


@dataclass(frozen=True, eq=False)
class Launch:
    """One launch of a sweep: its folder, the copy of the code that jobs run, how many workers, and when to stop.

    `slurm_options` are options of Slurm such as {'partition': 'gpu', 'time': '60'}.
    """

    folder: SweepDir
    shelf: AssetCache
    code: Path
    n_workers: int
    slurm_options: dict[str, str]
    is_stopped: Callable[[], bool]


def inline(launch: Launch, chunks: Sequence[Chunk]) -> None:
    """Run chunks on the devices of this process, at the same time on groups of as many devices as a chunk needs."""
    devices = jax.local_devices()
    for needed in dict.fromkeys(chunk.devices for chunk in chunks):
        size = needed or len(devices)
        groups = [devices[first : first + size] for first in range(0, len(devices) - size + 1, size)]
        _run(launch, groups, [chunk for chunk in chunks if chunk.devices == needed])


def _run(launch: Launch, groups: Sequence[Sequence[jax.Device]], chunks: Sequence[Chunk]) -> None:
    waiting: queue.SimpleQueue[Chunk] = queue.SimpleQueue()
    for chunk in chunks:
        waiting.put(chunk)
    errors: list[BaseException] = []

    def take(devices: Sequence[jax.Device]) -> None:
        worker = Worker(launch.folder, launch.shelf, devices, launch.code.name, launch.is_stopped)
        try:
            with jax.default_device(devices[0]):
                while not launch.is_stopped() and not waiting.empty():
                    worker.work(waiting.get_nowait())
        except queue.Empty:
            return
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=take, args=(devices,)) for devices in groups[: len(chunks)]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
