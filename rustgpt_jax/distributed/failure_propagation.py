"""How the processes of a run end together, where one of them fails, falls silent or is gone."""

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

from rustgpt_jax.distributed.multihost import board, is_first
from rustgpt_jax.errors import UserError

# "Error in protocol": what a process ends with when it has lost the others. It is the highest of ours, and so what a
# cluster sees of a job in which one process fails and the others lose it.
LOST = os.EX_PROTOCOL
# What a user's mistake ends with, in all processes: to begin again would not mend it.
MISTAKE = 2
# Texts in the errors of the libraries through which processes talk.
SIGNS_OF_LOSS = ("Gloo", "NCCL", "oordination", "eartbeat", "UNAVAILABLE", "DEADLINE_EXCEEDED", "onnection")

FAILED, HEARD = "rustgpt_jax/failed", "rustgpt_jax/heard"
LONGEST_HEARING_MS = 10_000
# Process 0 keeps the board: where it goes first, JAX ends the others by a signal.
SECONDS_TO_LEAVE = 2.0


@contextmanager
def propagate_failures() -> Iterator[None]:
    """A block in which all processes end where one of them fails: each says what went wrong, and in which.

    A user's mistake ends them with status 2, any other failure with LOST. Alone, a process fails as it always does.
    """
    notes, over = board(), threading.Event()
    if notes is None:
        yield
        return
    threading.Thread(target=_listen, args=(notes, over), daemon=True).start()
    try:
        yield
    except BaseException as error:
        report_failure(error, "")
    finally:
        over.set()


def report_failure(error: BaseException, hint: str) -> NoReturn:
    """End this process at once for an error, which the others are told. `hint` is for one that tells of a loss."""
    if is_loss(error):
        end_for_loss(f"Another process of the run is gone ({' '.join(str(error).split())[:160]}).", hint)
    if isinstance(error, UserError):
        sentence, status = str(error), MISTAKE
    else:
        traceback.print_exception(error)
        sentence, status = f"{type(error).__name__}: {error}", LOST
    _end(f"error: {sentence}", status, lambda: _tell(sentence, status))


def _tell(sentence: str, status: int) -> None:
    """Tell the others why this process ends, unless one has told already, and wait until all know."""
    notes = board()
    assert notes is not None, "a process alone tells nobody"
    try:
        notes.key_value_set(FAILED, json.dumps([f"process {jax.process_index()}: {sentence}", status]))
    except jax.errors.JaxRuntimeError:
        _leave(notes)
        return
    _wait_until_heard(notes, jax.process_index())


def _listen(notes: Any, over: threading.Event) -> None:
    """Ends this process when another has told that it fails."""
    while not over.wait(0.5):
        try:
            sentence, status = json.loads(notes.key_value_try_get(FAILED))
        except jax.errors.JaxRuntimeError:
            continue
        _end(f"error in {sentence}", status, lambda: _leave(notes))


def _leave(notes: Any) -> None:
    """Say that this process knows; the one that keeps the board waits until the others do."""
    notes.key_value_set(f"{HEARD}/{jax.process_index()}", "", allow_overwrite=True)
    if is_first():
        _wait_until_heard(notes, 0)


def _wait_until_heard(notes: Any, own: int) -> None:
    until = time.monotonic() + LONGEST_HEARING_MS / 1000
    for other in range(jax.process_count()):
        left = until - time.monotonic()
        if other != own and left > 0:
            try:
                notes.blocking_key_value_get(f"{HEARD}/{other}", int(1000 * left))
            except jax.errors.JaxRuntimeError:
                break
    if is_first():
        time.sleep(SECONDS_TO_LEAVE)


class Watchdog:
    """Ends this process, with a sentence, when it has waited too long for others. Use it in a `with` statement.

    An error ends it at once, without what a `with` statement around this one would do: that may wait for the others.
    Alone, a process waits for nobody, and nothing is done.
    """

    def __init__(self, seconds: float, hint: str) -> None:
        self._seconds, self._hint = seconds, hint
        self._last, self._over = time.monotonic(), threading.Event()

    def __enter__(self) -> "Watchdog":
        if jax.process_count() > 1:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()
        if error is not None and jax.process_count() > 1:
            report_failure(error, self._hint)

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


def end_for_loss(what: str, hint: str) -> NoReturn:
    """End this process at once, for no other would take part in an orderly end."""
    _end(f"process {jax.process_index()}: {what} {hint}", LOST)


def _end(sentence: str, status: int, last: Any = None) -> NoReturn:
    """End the process, from whichever of its threads; of several that want to, the first does."""
    with _one_end:
        sys.stdout.flush()
        print(sentence, file=sys.stderr, flush=True)
        if last is not None:
            last()
        os._exit(status)


_one_end = threading.Lock()
