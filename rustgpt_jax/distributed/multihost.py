"""Many processes that train one run: how they find each other, agree, and wait for one another."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from rustgpt_jax.errors import UserError

# Whether a cluster has started this process as one of several that belong together.


def detected(environment: Mapping[str, str]) -> str | None:
    """What has started this process as one of several: Slurm, Open MPI, Kubernetes, a pod of TPUs; or None."""
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return "Slurm"
    if "OMPI_MCA_orte_hnp_uri" in environment and int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return "Open MPI"
    if "," in environment.get("TPU_WORKER_HOSTNAMES", ""):
        return "a pod of TPUs"
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return "Kubernetes"
    return None


def local_devices_of_process(environment: Mapping[str, str]) -> list[int] | None:
    """The GPUs of a process that a cluster has started as the only one of its node: all; None leaves it to JAX.

    JAX would give a process of Slurm or Open MPI one GPU.
    """
    on_node = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") or ""
    if not re.fullmatch(r"1(\(x\d+\))?", on_node):
        return None
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    count = len(visible.split(",")) if visible else int(environment.get("SLURM_GPUS_ON_NODE", "0"))
    return list(range(count)) or None


# JAX ends a process without a word to its user when another is silent for so much longer than the patience.
SECONDS_TO_SAY_SO = 30
LONGEST_WAIT_MS = 7 * 24 * 3600 * 1000


def join(coordinator: str | None, count: int | None, index: int | None, patience: int) -> None:
    """Meet the other processes, if there are any. To be called before JAX is used.

    `coordinator` is HOST:PORT of process 0, `index` the number of this one of `count`; None where a cluster tells.
    `patience` is the seconds after which a process that others wait for is given up. Raises UserError if only a part
    of this is given, or the others cannot be met.
    """
    given = [value is not None for value in (coordinator, count, index)]
    if any(given) and not all(given):
        raise UserError("Give all of --coordinator_address=HOST:PORT, --num_processes=N and --process_id=I, or none.")
    if coordinator is not None and not _is_address(coordinator):
        raise UserError(
            f"--coordinator_address={coordinator} is not HOST:PORT, such as node1:12345 (ports go to 65535)."
        )
    if index is not None and count is not None and not 0 <= index < count:
        raise UserError(f"--process_id={index}: the processes are numbered from 0 to {count - 1}.")
    if not any(given) and detected(os.environ) is None:
        return
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            index,
            local_device_ids=local_devices_of_process(os.environ),
            initialization_timeout=patience,
            heartbeat_timeout_seconds=patience + SECONDS_TO_SAY_SO,
        )
    except (RuntimeError, ValueError) as error:
        where = coordinator or f"as {detected(os.environ)} has it"
        raise UserError(f"The processes cannot meet ({where}): {str(error).splitlines()[0]}") from error


def _is_address(text: str) -> bool:
    """Return whether a text has the form HOST:PORT."""
    host, _, port = text.rpartition(":")
    return bool(host) and port.isascii() and port.isdecimal() and len(port) <= 5 and 0 < int(port) < 2**16


def is_first() -> bool:
    """Whether this is process 0, whose records are the run's."""
    return jax.process_index() == 0


def board() -> Any | None:
    """Where processes leave short texts for one another, without taking turns; None for one process alone."""
    # JAX has no public name for it. It needs no device, and so goes on while the main thread waits for one.
    from jax._src import distributed

    return distributed.global_state.client


@contextmanager
def process_zero_first(what: str) -> Iterator[None]:
    """A block that process 0 does before the others begin it, who then find its work in the cache if they share it.

    `what` is another one for each block.
    """
    notes, name = board(), f"rustgpt_jax/done/{what}"
    if notes is not None and not is_first():
        notes.blocking_key_value_get(name, LONGEST_WAIT_MS)
    yield
    if notes is not None and is_first():
        notes.key_value_set(name, "")


def all_agree(is_so: bool) -> bool:
    """Whether something is so in every process. All must ask at the same place."""
    if jax.process_count() == 1:
        return is_so
    return bool(np.all(multihost_utils.process_allgather(np.array(is_so))))


def meet(place: str) -> None:
    """Return when every process has come to this place."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(place)


class LaggedMax:
    """Finds the largest of a number that each process has, turn by turn, without waiting for the device.

    With several processes, the answer is that of the turn before: all get the same. The first is `first`. All must take
    their turns at the same places.
    """

    def __init__(self, first: float) -> None:
        self._result: jax.Array | float = first
        self._mesh = jax.sharding.Mesh(np.array(jax.devices()), ("all",))
        self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(self._mesh, PartitionSpec()))

    def largest(self, value: float) -> float:
        """The largest number that a process said at its last turn; of one process alone, this one."""
        if jax.process_count() == 1:
            return value
        before = float(self._result)
        here, values = NamedSharding(self._mesh, PartitionSpec("all")), np.full(jax.device_count(), value, np.float32)
        # The devices of the run's own mesh may have another order.
        with jax.set_mesh(self._mesh):
            self._result = self._largest(jax.make_array_from_callback(values.shape, here, lambda index: values[index]))
        return before
