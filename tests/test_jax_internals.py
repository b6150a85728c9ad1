"""Private parts of JAX and XLA that the package relies on. A failure shows what an update of JAX changed."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rustgpt_jax.errors import is_out_of_memory
from rustgpt_jax.jax_internals import is_peer_lost_message, kv_store, record_cache_keys

STORE = """
import jax, socket
from rustgpt_jax.jax_internals import is_peer_lost_message, kv_store
with socket.socket() as listener:
    listener.bind(("localhost", 0))
    port = listener.getsockname()[1]
jax.distributed.initialize(f"localhost:{port}", 1, 0)
store = kv_store()
store.key_value_set("a", "first")
store.key_value_set("a", "second", allow_overwrite=True)
assert store.key_value_try_get("a") == store.blocking_key_value_get("a", 1000) == "second"
for read in (lambda: store.key_value_try_get("b"), lambda: store.key_value_set("a", "third")):
    try:
        read()
        raise SystemExit("no error")
    except jax.errors.JaxRuntimeError:
        pass
try:
    store.blocking_key_value_get("b", 100)
except jax.errors.JaxRuntimeError as error:
    assert is_peer_lost_message(str(error)), error
"""


def test_failing_processes_can_tell_the_others_through_the_key_value_store() -> None:
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", STORE], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_single_process_has_no_key_value_store() -> None:
    assert kv_store() is None


def test_jax_logs_the_cache_key_of_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def triple_plus_one(x: jax.Array) -> jax.Array:
        return 3 * x + 1

    with record_cache_keys() as keys:
        jax.jit(triple_plus_one)(np.ones(3))
    assert [key for key in keys if key.startswith("jit_triple_plus_one-")]
    with record_cache_keys() as others:
        pass
    assert others == []


def test_a_failed_allocation_is_recognized() -> None:
    with pytest.raises(jax.errors.JaxRuntimeError) as raised:
        jax.jit(lambda: jnp.ones(2**48, jnp.float32) * 2)().block_until_ready()
    assert is_out_of_memory(raised.value)


def test_other_errors_are_not_taken_for_lost_processes() -> None:
    assert not is_peer_lost_message("INVALID_ARGUMENT: shapes do not match")
