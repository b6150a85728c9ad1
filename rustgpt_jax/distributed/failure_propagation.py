"""Failure propagation: if one process of a run fails, falls silent or is gone, all processes exit."""

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NoReturn

import jax

from rustgpt_jax.distributed.multihost import is_process_zero
from rustgpt_jax.errors import UserError
from rustgpt_jax.jax_internals import is_peer_lost_message, kv_store

# "Error in protocol": the exit status of a process that has lost the others. It is the highest of ours, so a cluster
# reports it for a job in which one process fails and the others lose it.
EXIT_PEER_LOST = os.EX_PROTOCOL
# The exit status of all processes after a user error, which a restart would not fix.
EXIT_USER_ERROR = 2

FAILURE_KEY, ACKNOWLEDGED_KEY = "rustgpt_jax/failed", "rustgpt_jax/acknowledged"
ACKNOWLEDGMENT_TIMEOUT_MS = 10_000
# Process 0 serves the key-value store: if it exits first, JAX kills the others by a signal.
SECONDS_TO_EXIT = 2.0


@contextmanager
def propagate_failures() -> Iterator[None]:
    """Exit in all processes if the block fails in one; each prints what went wrong, and in which process.

    The exit status is EXIT_USER_ERROR for a UserError, else EXIT_PEER_LOST. A single process raises as usual.
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
        hint: What the user can do if another process is lost.
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
    """Tell the other processes why this one exits, unless one has failed before, and wait until they know."""
    store = kv_store()
    assert store is not None, "a single process has nobody to tell"
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
    """Tell that this process knows of the failure. Process 0, which serves the store, waits for the others."""
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

    An error in the block exits at once, without leaving enclosing `with` blocks, which may wait for the others.
    With a single process it does nothing.
    """

    def __init__(self, seconds: float, hint: str) -> None:
        self._seconds, self._hint = seconds, hint
        self._last_heartbeat, self._is_over = time.monotonic(), threading.Event()

    def __enter__(self) -> "Watchdog":
        if jax.process_count() > 1:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
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
    """Return whether an error of a library, or its cause, reports that another process is gone."""
    if error.__cause__ is not None:
        return is_peer_lost(error.__cause__)
    return not isinstance(error, UserError) and is_peer_lost_message(str(error))


def exit_after_peer_loss(message: str, hint: str) -> NoReturn:
    """Exit this process at once, because the others can no longer take part in an orderly exit."""
    _exit(f"process {jax.process_index()}: {message} {hint}", EXIT_PEER_LOST)


def _exit(message: str, status: int, before_exit: Any = None) -> NoReturn:
    """Print a message and exit from any thread; if several threads call this, the first one does it."""
    with _exit_lock:
        sys.stdout.flush()
        print(message, file=sys.stderr, flush=True)
        if before_exit is not None:
            before_exit()
        os._exit(status)


_exit_lock = threading.Lock()
