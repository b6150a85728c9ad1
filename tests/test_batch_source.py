"""Batches from a token stream in device memory equal those from files."""

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import copy_code, run_config, train, train_elsewhere
from test_loop import assert_same_bits, metrics, stored_state
from test_pipeline import assert_equal, seq_lens, stream_of, streams

from rustgpt_jax.data.pipeline import Batch, SequenceOffsets, SequenceReader
from rustgpt_jax.data.token_store import TokenStream
from rustgpt_jax.sharding import hardware_specs
from rustgpt_jax.training import batch_source
from rustgpt_jax.training.batch_source import make_device_stream, n_bytes, read_sequences


def on_device(stream: TokenStream, places: SequenceOffsets, window: int) -> Batch:
    """Read sequences on a device."""
    sent = jax.tree.map(np.int32, places)
    return jax.tree.map(np.asarray, read_sequences(make_device_stream(stream), sent, seq_len=window))


@pytest.mark.slow
@given(stream=streams, window=seq_lens, seed=st.integers(0, 999))
# Each example compiles two programs.
@settings(max_examples=10)
def test_device_and_host_read_the_same_sequences(stream: TokenStream, window: int, seed: int) -> None:
    source, random = SequenceReader(stream, window), np.random.default_rng(seed)
    # Indices beyond the last one are padding.
    indices = random.integers(0, len(source) + 2, 8)
    places = source.locate(indices, random.integers(stream.n_tokens - 1, size=8))
    expected = source.read(places)
    assert_equal(on_device(stream, places, window), expected)
    halves = on_device(stream, SequenceOffsets(*(each.reshape(2, 4) for each in places)), window)
    assert_equal(Batch(*(leaf.reshape(8, window) for leaf in halves)), expected)


def test_device_reads_large_token_ids() -> None:
    stream = stream_of([7, 5])
    wide = TokenStream(
        (stream.token_shards[0].astype(np.uint32) + 2**17,), (), stream.offsets, stream.end_id, 12, stream.n_tokens
    )
    places = SequenceOffsets(np.array([3, 9]), np.array([5, 4]))
    assert_equal(on_device(wide, places, 5), SequenceReader(wide, 5).read(places))


def test_n_bytes_is_the_size_of_a_device_stream() -> None:
    stream = stream_of([30, 20], [True, False], shard=7)
    kept = make_device_stream(stream)
    assert kept.tokens_N.nbytes + kept.flags_N.nbytes == n_bytes(stream) == 51 * 3


@pytest.mark.usefixtures("quick_compilation")
def test_device_and_file_batches_train_bit_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Calls have two steps; the last one has one, so that a slot of it is padding.
    changes: dict[str, Any] = {"training.steps": 7}
    taken = list[str]()
    for kind in (batch_source.DeviceBatchSource, batch_source.FileBatchSource):

        def noted(self: Any, count: int, slots: int, kind: Any = kind, next_batches: Any = kind.next_batches) -> Batch:
            taken.append(kind.__name__)
            return next_batches(self, count, slots)

        monkeypatch.setattr(kind, "next_batches", noted)
    train(tmp_path / "devices", **changes)
    assert set(taken) == {"DeviceBatchSource"}
    monkeypatch.setattr(batch_source, "MAX_MEMORY_SHARE", 0)
    train(tmp_path / "files", **changes)
    assert set(taken) == {"DeviceBatchSource", "FileBatchSource"}
    config = run_config(**changes)
    assert_same_bits(stored_state(config, tmp_path / "devices"), stored_state(config, tmp_path / "files"))
    assert len(metrics(tmp_path / "devices")) >= 7
    assert metrics(tmp_path / "devices") == metrics(tmp_path / "files")


@pytest.mark.slow
@pytest.mark.long
def test_device_and_file_batches_train_bit_exactly_on_a_mesh(tmp_path: Path) -> None:
    code = copy_code(tmp_path / "code")
    file = code / "rustgpt_jax" / "training" / "batch_source.py"
    text = file.read_text()
    assert text.count("SHARE = 1 / 32\n") == 1
    file.write_text(text.replace("SHARE = 1 / 32\n", "SHARE = 0\n"))
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    changes: dict[str, Any] = {"training.batch_size": 8, "mesh.data": -1, "mesh.context": 2}
    train_elsewhere(tmp_path / "devices", environment=environment, **changes)
    train_elsewhere(tmp_path / "files", code, environment, **changes)
    assert len(metrics(tmp_path / "devices")) >= 6
    assert metrics(tmp_path / "devices") == metrics(tmp_path / "files")
    shutil.rmtree(code)


def test_free_memory_is_known_without_proc_meminfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = hardware_specs.free_memory()
    monkeypatch.setattr(hardware_specs, "MEMORY", tmp_path / "not there")
    assert 0 < free <= hardware_specs.free_memory()
