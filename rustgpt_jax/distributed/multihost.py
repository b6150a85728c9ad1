"""Multi-process runs: initialization, agreement between processes, and barriers."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from rustgpt_jax.errors import UserError
from rustgpt_jax.jax_internals import kv_store

# JAX kills a process whose peer is silent for this much longer than the barrier timeout, without a message to its user.
EXTRA_HEARTBEAT_SECONDS = 30
LONGEST_WAIT_MS = 7 * 24 * 3600 * 1000


def detect_cluster(environment: Mapping[str, str]) -> str | None:
    """Return the name of the cluster that started this process as one of several, or None."""
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return "Slurm"
    if "OMPI_MCA_orte_hnp_uri" in environment and int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return "Open MPI"
    if "," in environment.get("TPU_WORKER_HOSTNAMES", ""):
        return "a pod of TPUs"
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return "Kubernetes"
    return None


def local_device_ids(environment: Mapping[str, str]) -> list[int] | None:
    """Return the GPUs of a process that a cluster started as the only one of its node, or None to leave it to JAX.

    JAX would give a process of Slurm or Open MPI one GPU.
    """
    on_node = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") or ""
    if not re.fullmatch(r"1(\(x\d+\))?", on_node):
        return None
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    count = len(visible.split(",")) if visible else int(environment.get("SLURM_GPUS_ON_NODE", "0"))
    return list(range(count)) or None


def initialize(
    coordinator_address: str | None, num_processes: int | None, process_id: int | None, barrier_timeout: int
) -> None:
    """Connect to the other processes of the run, if there are any. Call this before JAX is used.

    Args:
        coordinator_address: HOST:PORT of process 0; None if a cluster provides it.
        num_processes: The number of processes; None if a cluster provides it.
        process_id: The number of this process; None if a cluster provides it.
        barrier_timeout: The seconds after which a process that others wait for is considered lost.

    Raises:
        UserError: Only some of the arguments are given, or the other processes are not reachable.
    """
    given = [value is not None for value in (coordinator_address, num_processes, process_id)]
    if any(given) and not all(given):
        raise UserError("Give all of --coordinator_address=HOST:PORT, --num_processes=N and --process_id=I, or none.")
    if coordinator_address is not None and not _is_address(coordinator_address):
        raise UserError(
            f"--coordinator_address={coordinator_address} is not HOST:PORT, such as node1:12345 (ports go to 65535)."
        )
    if process_id is not None and num_processes is not None and not 0 <= process_id < num_processes:
        raise UserError(f"--process_id={process_id}: the processes are numbered from 0 to {num_processes - 1}.")
    if not any(given) and detect_cluster(os.environ) is None:
        return
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            local_device_ids=local_device_ids(os.environ),
            initialization_timeout=barrier_timeout,
            heartbeat_timeout_seconds=barrier_timeout + EXTRA_HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        where = coordinator_address or f"as configured by {detect_cluster(os.environ)}"
        raise UserError(f"The processes cannot connect ({where}): {str(error).splitlines()[0]}") from error


def _is_address(text: str) -> bool:
    """Return whether a text has the form HOST:PORT."""
    host, _, port = text.rpartition(":")
    return bool(host) and port.isascii() and port.isdecimal() and len(port) <= 5 and 0 < int(port) < 2**16


def is_process_zero() -> bool:
    """Return whether this is process 0, which writes the files of the run."""
    return jax.process_index() == 0


@contextmanager
def process_zero_first(name: str) -> Iterator[None]:
    """Run a block in process 0 before the others begin it, so that they find its results in a shared cache.

    Args:
        name: A name that no other such block of the run has.
    """
    store, key = kv_store(), f"rustgpt_jax/done/{name}"
    if store is not None and not is_process_zero():
        store.blocking_key_value_get(key, LONGEST_WAIT_MS)
    yield
    if store is not None and is_process_zero():
        store.key_value_set(key, "")


def all_agree(is_true: bool) -> bool:
    """Return whether a condition is true in all processes. A collective: all processes must call it."""
    if jax.process_count() == 1:
        return is_true
    return bool(np.all(multihost_utils.process_allgather(np.array(is_true))))


def barrier(name: str) -> None:
    """Wait until all processes have called this."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


class LaggedAllReduceMax:
    """The maximum of a number over all processes, one call late, so that no call waits for the devices.

    A collective: all processes must make the same calls. With one process there is no lag.
    """

    def __init__(self, initial: float) -> None:
        self._result: jax.Array | float = initial
        self._mesh = jax.sharding.Mesh(np.array(jax.devices()), ("all",))
        self._max = jax.jit(jnp.max, out_shardings=NamedSharding(self._mesh, PartitionSpec()))

    def update(self, value: float) -> float:
        """Contribute a number, and return the maximum of the call before; at first, `initial`."""
        if jax.process_count() == 1:
            return value
        previous = float(self._result)
        sharding, values = (
            NamedSharding(self._mesh, PartitionSpec("all")),
            np.full(jax.device_count(), value, np.float32),
        )
        # The devices of the run's own mesh may have another order.
        with jax.set_mesh(self._mesh):
            self._result = self._max(jax.make_array_from_callback(values.shape, sharding, lambda index: values[index]))
        return previous
