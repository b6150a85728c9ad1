"""Many processes that train one run: how they find each other, agree, and notice that one of them is gone."""

import os
import sys
import threading
import time
from types import TracebackType

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from rustgpt_jax.errors import UserError
from rustgpt_jax.parallel.clusters import detected, own_devices

# "Error in protocol": what a process ends with when it has lost the others. It is the highest of ours, and so what a
# cluster sees of a job in which one process fails and the others lose it.
LOST = os.EX_PROTOCOL
# JAX ends a process without a word to its user when another is silent for so much longer than the patience.
SECONDS_TO_SAY_SO = 30
# Texts in the errors of the libraries through which processes talk.
SIGNS_OF_LOSS = ("Gloo", "NCCL", "oordination", "eartbeat", "UNAVAILABLE", "DEADLINE_EXCEEDED", "onnection")


def join(coordinator: str | None, count: int | None, index: int | None, patience: int) -> None:
    """Meet the other processes, if there are any. To be called before JAX is used.

    `coordinator` is HOST:PORT of process 0, `index` the number of this one of `count`; None where a cluster tells.
    `patience` is the seconds after which a process that others wait for is given up. Raises UserError if only a part
    of this is given, or the others cannot be met.
    """
    given = [value is not None for value in (coordinator, count, index)]
    if any(given) and not all(given):
        raise UserError("Give all three of --coordinator=HOST:PORT, --processes=N and --process=I, or none.")
    if index is not None and count is not None and not 0 <= index < count:
        raise UserError(f"--process={index}: the processes are numbered from 0 to {count - 1}.")
    if not any(given) and detected(os.environ) is None:
        return
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            index,
            local_device_ids=own_devices(os.environ),
            initialization_timeout=patience,
            heartbeat_timeout_seconds=patience + SECONDS_TO_SAY_SO,
        )
    except (RuntimeError, ValueError) as error:
        where = coordinator or f"as {detected(os.environ)} has it"
        raise UserError(f"The processes cannot meet ({where}): {str(error).splitlines()[0]}") from error


def is_first() -> bool:
    """Whether this is process 0, whose records are the run's."""
    return jax.process_index() == 0


def all_agree(is_so: bool) -> bool:
    """Whether something is so in every process. All must ask at the same place."""
    if jax.process_count() == 1:
        return is_so
    return bool(np.all(multihost_utils.process_allgather(np.array(is_so))))


def meet(place: str) -> None:
    """Return when every process has come to this place."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(place)


class Votes:
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


class Patience:
    """Ends this process, with a sentence, when it has waited too long for others. Use it in a `with` statement.

    Alone, a process waits for nobody, and nothing is done.
    """

    def __init__(self, seconds: float, hint: str) -> None:
        self._seconds, self._hint = seconds, hint
        self._last, self._over = time.monotonic(), threading.Event()

    def __enter__(self) -> "Patience":
        if jax.process_count() > 1:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()
        if error is not None and jax.process_count() > 1 and is_loss(error):
            end_for_loss(f"Another process of the run is gone ({' '.join(str(error).split())[:160]}).", self._hint)

    def beat(self) -> None:
        """Something was done: the waiting begins anew."""
        self._last = time.monotonic()

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self._seconds / 4)):
            if time.monotonic() - self._last > self._seconds:
                end_for_loss(f"Another process of the run has been silent for {self._seconds:.0f} s.", self._hint)


def is_loss(error: BaseException) -> bool:
    """Whether an error of a library, or one that it has caused, says that another process is gone."""
    if error.__cause__ is not None:
        return is_loss(error.__cause__)
    return not isinstance(error, UserError) and any(sign in str(error) for sign in SIGNS_OF_LOSS)


def end_for_loss(what: str, hint: str) -> None:
    """End this process at once, for no other would take part in an orderly end."""
    print(f"process {jax.process_index()}: {what} {hint}", file=sys.stderr, flush=True)
    os._exit(LOST)
