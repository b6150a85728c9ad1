"""Wrappers of private parts of JAX and XLA that have no public equivalent.

tests/test_jax_internals.py fails if an update of JAX removes or changes one of them.
"""

import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

# Substrings of XLA and C++ error messages about failed allocations.
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory", "bad_alloc")
# Substrings, in lower case, of error messages from Gloo, NCCL and JAX's coordination service about another process
# that was lost.
PEER_LOST = ("gloo", "nccl", "coordination", "heartbeat", "unavailable:", "deadline_exceeded", "connection")

_COMPILER_LOGGER = "jax._src.compiler"
_CACHE_KEY = re.compile(r"with key '?(?P<key>\w+-[0-9a-f]+)")
# The cache keys that JAX has logged on this thread while `record_cache_keys` is active.
_recorded = threading.local()


def kv_store() -> Any | None:
    """Return the key-value store of JAX's coordination service, or None for a single process.

    A failing process uses it to tell the others why. The public `jax.experimental.multihost_utils` has only
    collectives, in which all processes must take part, with devices that may be waiting for the failed process.
    """
    from jax._src import distributed

    return distributed.global_state.client


@contextmanager
def record_cache_keys() -> Iterator[list[str]]:
    """Record the keys that JAX looks up in its persistent compilation cache, on this thread.

    JAX reports the keys only in its debug log. The log level that users see does not change.
    """
    _add_log_filter()
    keys: list[str] = []
    _recorded.keys = keys
    try:
        yield keys
    finally:
        _recorded.keys = None


@cache
def _add_log_filter() -> None:
    logger = logging.getLogger(_COMPILER_LOGGER)
    shown_level = logger.getEffectiveLevel()

    def record_key(record: logging.LogRecord) -> bool:
        keys, match = getattr(_recorded, "keys", None), _CACHE_KEY.search(record.getMessage())
        if keys is not None and match:
            keys.append(match["key"])
        return record.levelno >= shown_level

    logger.addFilter(record_key)
    logger.setLevel(logging.DEBUG)


def is_out_of_memory_message(message: str) -> bool:
    """Return whether an error message reports a failed allocation. `JaxRuntimeError` has no public status code."""
    return any(text in message for text in OUT_OF_MEMORY)


def is_peer_lost_message(message: str) -> bool:
    """Return whether an error message reports that another process was lost.

    Collectives, the coordination service and Orbax raise such errors in several classes, without a common code.
    """
    return any(text in message.lower() for text in PEER_LOST)
