"""In this process: a thread for each device takes one chunk after another."""

import queue
import threading
from collections.abc import Sequence

import jax

from rustgpt_jax.parallel.devices import Placement, all_devices
from rustgpt_jax.sweeps.launchers.launch import Launch
from rustgpt_jax.sweeps.planner import Chunk
from rustgpt_jax.sweeps.worker import Worker


def inline(launch: Launch, chunks: Sequence[Chunk]) -> None:
    """Run chunks on the devices of this process, each on one of them; those in mode solo on all, one after another."""
    alone = [chunk for chunk in chunks if chunk.mode == "solo"]
    together = [chunk for chunk in chunks if chunk.mode != "solo"]
    for placements, share in ([all_devices()], alone), ([Placement((device,)) for device in jax.devices()], together):
        _run(launch, placements, share)


def _run(launch: Launch, placements: Sequence[Placement], chunks: Sequence[Chunk]) -> None:
    waiting: queue.SimpleQueue[Chunk] = queue.SimpleQueue()
    for chunk in chunks:
        waiting.put(chunk)
    errors: list[BaseException] = []

    def take(placement: Placement) -> None:
        worker = Worker(launch.folder, launch.shelf, placement, launch.code.name, launch.is_stopped)
        try:
            with jax.default_device(placement.devices[0]):
                while not launch.is_stopped() and not waiting.empty():
                    worker.work(waiting.get_nowait())
        except queue.Empty:
            return
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=take, args=(placement,)) for placement in placements[: len(chunks)]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
