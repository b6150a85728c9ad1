"""Multi-process runs: initialization, barriers, agreement between processes, and failure propagation."""

import json
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from rustgpt_jax.errors import UserError
from rustgpt_jax.jax_internals import is_peer_lost_message, kv_store

# JAX kills a process, without a message to the user, if a peer is silent for this much longer than the barrier timeout.
EXTRA_HEARTBEAT_SECONDS = 30
MAX_WAIT_MS = 7 * 24 * 3600 * 1000


def detect_cluster(environment: Mapping[str, str]) -> str | None:
    """Return the kind of cluster that started this process as one of several, or None."""
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return "Slurm"
    if "OMPI_MCA_orte_hnp_uri" in environment and int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return "Open MPI"
    if "," in environment.get("TPU_WORKER_HOSTNAMES", ""):
        return "a TPU pod"
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return "Kubernetes"
    return None


def local_device_ids(environment: Mapping[str, str]) -> list[int] | None:
    """Return the GPUs of this process if a cluster started it as the only one on its node, or None to let JAX choose.

    JAX would give a process started by Slurm or Open MPI only one GPU.
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
    if coordinator_address is not None:
        host, _, port = coordinator_address.rpartition(":")
        if not (host and port.isascii() and port.isdecimal() and len(port) <= 5 and 0 < int(port) < 2**16):
            raise UserError(
                f"--coordinator_address={coordinator_address} is not HOST:PORT, such as node1:12345, with a port below "
                "65536."
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


def is_process_zero() -> bool:
    """Return whether this is process 0, which writes the files of the run."""
    return jax.process_index() == 0


@contextmanager
def process_zero_first(name: str) -> Iterator[None]:
    """Run a block in process 0 before the others begin it, so that they find its results in a shared cache.

    Args:
        name: A name that is unique among these blocks of the run.
    """
    store, key = kv_store(), f"rustgpt_jax/done/{name}"
    if store is not None and not is_process_zero():
        store.blocking_key_value_get(key, MAX_WAIT_MS)
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
        """Contribute a number, and return the maximum of the previous call, or `initial` at the first call."""
        if jax.process_count() == 1:
            return value
        previous = float(self._result)
        sharding, values = NamedSharding(self._mesh, PartitionSpec("all")), np.full(len(jax.devices()), value, "f4")
        # The mesh of the run may have the devices in another order.
        with jax.set_mesh(self._mesh):
            self._result = self._max(jax.make_array_from_callback(values.shape, sharding, lambda index: values[index]))
        return previous


# Failure propagation: if one process of a run fails, hangs or is lost, all processes exit.

# "Error in protocol": the exit status of a process that has lost the others. It is the highest status of this package,
# so a cluster reports it for a job in which one process fails and the others lose it.
EXIT_PEER_LOST = os.EX_PROTOCOL
# The exit status of all processes after a user error, which a restart would not fix.
EXIT_USER_ERROR = 2

FAILURE_KEY, ACKNOWLEDGED_KEY = "rustgpt_jax/failed", "rustgpt_jax/acknowledged"
ACKNOWLEDGMENT_TIMEOUT_MS = 10_000
# Process 0, which serves the key-value store, exits this much later than the others: JAX would kill them otherwise.
SECONDS_TO_EXIT = 2.0


@contextmanager
def propagate_failures() -> Iterator[None]:
    """Exit in all processes if the block fails in one; each prints what went wrong, and in which process.

    The exit status is EXIT_USER_ERROR for a UserError, else EXIT_PEER_LOST. A single process just raises the error.
    """
    store, is_over = kv_store(), threading.Event()
    if store is None:
        yield
        return
    threading.Thread(target=_watch_for_failures, args=(store, is_over), daemon=True).start()
    try:
        yield
    except BaseException as error:
        exit_after_failure(error, "")
    finally:
        is_over.set()


def exit_after_failure(error: BaseException, hint: str) -> NoReturn:
    """Exit this process at once because of an error, and tell the other processes.

    Args:
        error: The error.
        hint: Advice to the user for the case that another process is lost.
    """
    if is_peer_lost(error):
        exit_after_peer_loss(f"Another process of the run is gone ({' '.join(str(error).split())[:160]}).", hint)
    if isinstance(error, UserError):
        message, status = str(error), EXIT_USER_ERROR
    else:
        traceback.print_exception(error)
        message, status = f"{type(error).__name__}: {error}", EXIT_PEER_LOST
    _exit(f"error: {message}", status, lambda: _broadcast_failure(message, status))


def _broadcast_failure(message: str, status: int) -> None:
    """Tell the other processes why this one exits, unless another failed first, and wait until they acknowledge it."""
    store = kv_store()
    assert store is not None, "a single process has no key-value store"
    try:
        store.key_value_set(FAILURE_KEY, json.dumps([f"process {jax.process_index()}: {message}", status]))
    except jax.errors.JaxRuntimeError:
        _acknowledge(store)
        return
    _wait_for_acknowledgments(store, jax.process_index())


def _watch_for_failures(store: Any, is_over: threading.Event) -> None:
    """Exit this process if another one reports a failure."""
    while not is_over.wait(0.5):
        try:
            message, status = json.loads(store.key_value_try_get(FAILURE_KEY))
        except jax.errors.JaxRuntimeError:
            continue
        _exit(f"error in {message}", status, lambda: _acknowledge(store))


def _acknowledge(store: Any) -> None:
    """Acknowledge the failure of another process. Process 0, which serves the store, then waits for the others."""
    store.key_value_set(f"{ACKNOWLEDGED_KEY}/{jax.process_index()}", "", allow_overwrite=True)
    if is_process_zero():
        _wait_for_acknowledgments(store, 0)


def _wait_for_acknowledgments(store: Any, own_id: int) -> None:
    deadline = time.monotonic() + ACKNOWLEDGMENT_TIMEOUT_MS / 1000
    for other in range(jax.process_count()):
        seconds_left = deadline - time.monotonic()
        if other != own_id and seconds_left > 0:
            try:
                store.blocking_key_value_get(f"{ACKNOWLEDGED_KEY}/{other}", int(1000 * seconds_left))
            except jax.errors.JaxRuntimeError:
                break
    if is_process_zero():
        time.sleep(SECONDS_TO_EXIT)


class Watchdog:
    """Context manager that exits this process if it waits for other processes for more than `seconds`.

    An error in the block exits at once, without exiting the enclosing `with` blocks, which may wait for the others.
    With a single process it does nothing.
    """

    def __init__(self, seconds: float, hint: str) -> None:
        self._seconds, self._hint = seconds, hint
        self._last_heartbeat, self._is_over = time.monotonic(), threading.Event()

    def __enter__(self) -> "Watchdog":
        if jax.process_count() > 1:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self._is_over.set()
        if error is not None and jax.process_count() > 1:
            exit_after_failure(error, self._hint)

    def heartbeat(self) -> None:
        """Reset the timer."""
        self._last_heartbeat = time.monotonic()

    def _watch(self) -> None:
        while not self._is_over.wait(min(1.0, self._seconds / 4)):
            if time.monotonic() - self._last_heartbeat > self._seconds:
                message = f"Another process of the run has been silent for {self._seconds:.0f} s."
                exit_after_peer_loss(message, self._hint)


def is_peer_lost(error: BaseException) -> bool:
    """Return whether a library's error, or its cause, reports that another process is gone."""
    if error.__cause__ is not None:
        return is_peer_lost(error.__cause__)
    return not isinstance(error, UserError) and is_peer_lost_message(str(error))


def exit_after_peer_loss(message: str, hint: str) -> NoReturn:
    """Exit this process at once, because the others can no longer take part in an orderly exit."""
    _exit(f"process {jax.process_index()}: {message} {hint}", EXIT_PEER_LOST)


def _exit(message: str, status: int, before_exit: Any = None) -> NoReturn:
    """Print a message and exit from any thread. If several threads call this, the first one wins."""
    with _exit_lock:
        sys.stdout.flush()
        print(message, file=sys.stderr, flush=True)
        for listener in exit_listeners:
            listener(message.removeprefix("error: "), status)
        if before_exit is not None:
            before_exit()
        os._exit(status)


_exit_lock = threading.Lock()
# Called with the message and the exit status before this process exits at once.
exit_listeners: list[Callable[[str, int], object]] = []
