"""Metrics: one line per record, exact after a kill and a resume, with the same numbers in TensorBoard files."""

import errno
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData
from tensorboardX.record_writer import masked_crc32c

from rustgpt_jax.config.validation import MAX_COUNT
from rustgpt_jax.errors import UserError
from rustgpt_jax.tracking import metric_writer
from rustgpt_jax.tracking.metric_writer import (
    RunWriter,
    TrackedRun,
    iter_metrics,
    last_step,
    read_columns,
    read_metrics,
    truncate_after,
)
from rustgpt_jax.tracking.tensorboard_writer import TensorBoardWriter


def new_writer(folder: Path, resume_step: int = 0, **params: Any) -> RunWriter:
    """Return a writer with TensorBoard whose lines are written one second apart from a given time on."""
    seconds = count(1767225600)
    run = TrackedRun(folder, params=params, resume_step=resume_step)
    return RunWriter(folder, resume_step, [TensorBoardWriter(run)], lambda: next(seconds))


def without_time(folder: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name != "time"} for line in read_metrics(folder)]


def record(folder: Path, resume_step: int, steps: range) -> None:
    with new_writer(folder, resume_step) as writer:
        writer._clock = lambda: 1767225600.0
        for step in steps:
            writer.write(step, {"stage": "train", "train/loss": 1 / (step + 1)})


def events(folder: Path) -> Iterator[Event]:
    """Read the records of TensorBoard files: a length, its checksum, the data, its checksum."""
    for file in sorted((folder / "tensorboard").iterdir(), key=lambda file: int(file.suffix[1:])):
        rest = file.read_bytes()
        while rest:
            (length,) = struct.unpack("<Q", rest[:8])
            record = rest[12 : 12 + length]
            sums = struct.pack("<II", masked_crc32c(rest[:8]), masked_crc32c(record))
            assert sums == rest[8:12] + rest[12 + length : 16 + length]
            yield Event.FromString(record)
            rest = rest[16 + length :]


def test_metrics_round_trip(tmp_path: Path) -> None:
    with RunWriter(tmp_path, 0) as writer:
        writer.write(10, {"stage": "größer", "train/loss": 2.3, "tokens": 4096})
        assert without_time(tmp_path) == [{"step": 10, "stage": "größer", "train/loss": 2.3, "tokens": 4096}]
        writer.write(20, {"train/loss": 0.1 + 0.2})
    last = read_metrics(tmp_path)[1]
    assert abs(time.time() - last.pop("time")) < 100 and last == {"step": 20, "train/loss": 0.1 + 0.2}


def test_nonfinite_values_round_trip_as_valid_json(tmp_path: Path) -> None:
    with new_writer(tmp_path) as writer:
        writer.write(1, {"a": math.nan, "b": math.inf, "c": -math.inf})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    (line,) = read_metrics(tmp_path)
    assert math.isnan(line["a"]) and (line["b"], line["c"]) == (math.inf, -math.inf)
    assert math.isnan(
        next(event.summary.value[0].simple_value for event in events(tmp_path) if event.HasField("summary"))
    )


def test_resumed_run_has_the_file_of_an_uninterrupted_one(tmp_path: Path) -> None:
    record(tmp_path / "whole", 0, range(10))
    record(tmp_path / "killed", 0, range(8))
    with open(tmp_path / "killed" / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "train/lo')
    record(tmp_path / "killed", 5, range(6, 10))
    whole, killed = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "killed"))
    assert killed == whole
    assert sorted(os.listdir(tmp_path / "killed")) == ["metrics.jsonl", "tensorboard"]


def test_run_without_checkpoint_starts_with_an_empty_file(tmp_path: Path) -> None:
    record(tmp_path, 0, range(3))
    record(tmp_path, 0, range(2))
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1]


def test_last_line_without_newline_is_kept(tmp_path: Path) -> None:
    record(tmp_path, 0, range(3))
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-1])
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1, 2]
    record(tmp_path, 2, range(3, 4))
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1, 2, 3]


def test_missing_file_has_no_metrics(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize("line", ["{", "[1]", "3", '{"loss": 1}', '{"step": "1"}', ""])
def test_malformed_line_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2"):
        read_metrics(tmp_path)
    before = file.read_bytes()
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2"):
        RunWriter(tmp_path, 1)
    assert file.read_bytes() == before


def test_tensorboard_has_the_scalars_and_purges_on_resume(tmp_path: Path) -> None:
    record(tmp_path, 0, range(1, 4))
    record(tmp_path, 2, range(3, 5))
    seen = list(events(tmp_path))
    assert [event.step for event in seen if event.session_log.status == SessionLog.START] == [0, 3]
    scalars = [(event.step, value.tag, value.simple_value) for event in seen for value in event.summary.value]
    assert [(step, tag) for step, tag, _ in scalars] == [(step, "train/loss") for step in (1, 2, 3, 3, 4)]
    assert [value for *_, value in scalars] == pytest.approx([1 / 2, 1 / 3, 1 / 4, 1 / 4, 1 / 5])


def test_tensorboard_records_are_valid(tmp_path: Path) -> None:
    """With checksums, a long name, and values outside of float32."""
    values = {"train/loss": 0.1, "größer" * 30: 1e300, "none": math.nan, "tokens": 2**40, "zero": 0.0}
    with new_writer(tmp_path) as writer:
        writer.write(MAX_COUNT, {"stage": "train"} | values)
    version, start, scalars = events(tmp_path)
    assert version.file_version == "brain.Event:2" and start.session_log.status == SessionLog.START
    assert time.time() - 100 < version.wall_time <= time.time()
    # The same time as in metrics.jsonl.
    assert (scalars.step, scalars.wall_time) == (MAX_COUNT, read_metrics(tmp_path)[0]["time"])
    read = {value.tag: value.simple_value for value in scalars.summary.value}
    expected = {"train/loss": pytest.approx(0.1), "größer" * 30: math.inf, "none": math.nan, "tokens": 2**40, "zero": 0}
    assert read == pytest.approx(expected, nan_ok=True)


def test_tensorboard_has_hyperparameters_and_samples(tmp_path: Path) -> None:
    config = {"optimizer.learning_rate": 0.1, "model.bias": True, "data.paths": ("a", "b"), "data.corpus": "facts"}
    with new_writer(tmp_path, **config) as writer:
        writer.write(1, {"stage": "train", "train/loss": 1.0, "hparams/optimizer.learning_rate": 0.1})
        writer.write_samples(1, [("Why?", "So | that\nit is"), ("A", "b")])
        writer.rewind(0)
    *_, hparams, scalars, samples, rewind = (event for event in events(tmp_path))
    # A hyperparameter is no curve.
    assert [value.tag for value in scalars.summary.value] == ["train/loss"]
    assert rewind.session_log.status == SessionLog.START
    (value,) = hparams.summary.value
    assert (value.tag, value.metadata.plugin_data.plugin_name) == ("_hparams_/session_start_info", "hparams")
    info = HParamsPluginData.FromString(value.metadata.plugin_data.content).session_start_info
    stored = {name: getattr(each, each.WhichOneof("kind")) for name, each in info.hparams.items()}
    assert stored == config | {"data.paths": "('a', 'b')"}
    (value,) = samples.summary.value
    assert (value.tag, value.metadata.plugin_data.plugin_name, value.tensor.dtype) == ("samples", "text", 7)
    table = "| prompt | text |\n|---|---|\n| Why? | So \\| that<br>it is |\n| A | b |\n"
    assert [text.decode() for text in value.tensor.string_val] == [table]


def test_training_goes_on_without_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    tracker = TensorBoardWriter(TrackedRun(tmp_path))
    with RunWriter(tmp_path, 0, [tracker]) as writer, monkeypatch.context() as patch:
        patch.setattr(tracker, "_file", SimpleNamespace(write=full, flush=full))
        writer.write(1, {"train/loss": 0.5})
    shutil.rmtree(tmp_path / "tensorboard")
    (tmp_path / "tensorboard").write_text("not a folder")
    with new_writer(tmp_path, 1) as writer:
        writer.write(2, {"train/loss": 0.25})
    assert without_time(tmp_path) == [{"step": 1, "train/loss": 0.5}, {"step": 2, "train/loss": 0.25}]


def test_metrics_do_not_import_jax_or_tensorflow(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from rustgpt_jax.workdir import run_dir\n"
        "from rustgpt_jax.tracking import console, metric_writer, plots, trackers\n"
        "assert 'matplotlib' not in sys.modules\n"
        "folder = Path(sys.argv[1])\n"
        "opened = trackers.open_trackers(['tensorboard'], metric_writer.TrackedRun(folder), print, print)\n"
        "with metric_writer.RunWriter(folder, 0, opened) as writer: writer.write(1, {'loss': 1.0})\n"
        "assert not {'jax', 'torch', 'tensorflow', 'tensorboardX', 'wandb', 'mlflow'} & set(sys.modules)"
    )
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "PYTHONPATH": paths}
    subprocess.run([sys.executable, "-W", "error", "-c", program, str(tmp_path)], check=True, env=environment)


# Reading in blocks.


@pytest.mark.parametrize("block", [1, 7, 100, 2**20])
def test_block_size_does_not_affect_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(metric_writer, "BLOCK_BYTES", block)
    monkeypatch.setattr(metric_writer, "LAST_BYTES", block)
    rows = [{"step": step, "stage": "ab"[step > 5], "train/loss": step + 0.5} for step in range(1, 10)]
    rows.insert(4, {"step": 4, "stage": "a", "valid/loss": 2.0})
    file = tmp_path / "metrics.jsonl"
    whole = "".join(json.dumps(row) + "\n" for row in rows)
    for cut in ("", '{"step": 10, "tr'):
        file.write_text(whole + cut)
        assert list(iter_metrics(tmp_path)) == read_metrics(tmp_path) == rows
        assert last_step(tmp_path) == 9
        assert list(iter_metrics(tmp_path, containing=b"valid")) == rows[4:5]
        columns = read_columns(tmp_path, "train/loss", ("valid/loss",))
        assert columns.steps.tolist() == list(range(1, 10)) and columns.values["valid/loss"].sum() == 0
        assert columns.stage_names == ["a", "b"] and columns.stages.tolist() == [0] * 5 + [1] * 4
        truncate_after(file, 5)
        assert read_metrics(tmp_path) == rows[:6]
        truncate_after(file, 0)
        assert file.read_bytes() == b"" and last_step(tmp_path) == 0


@pytest.mark.parametrize("value", ["null", "[1]", "{}", "true", '"x"', "1" * 400])
@pytest.mark.parametrize("name", ["stage", "train/loss", "valid/loss", "step"])
def test_value_of_another_type_is_malformed(tmp_path: Path, name: str, value: str) -> None:
    if (name, value) == ("stage", '"x"'):
        return
    good = '{"step": 1, "stage": "train", "train/loss": 1.0}\n'
    (tmp_path / "metrics.jsonl").write_text(good + good[:-2] + f', "{name}": {value}}}\n')
    for read in (read_metrics, last_step, lambda folder: read_columns(folder, "train/loss")):
        with pytest.raises(UserError, match=r"metrics.jsonl, line 2: this is not a line of metrics"):
            read(tmp_path)


def test_reading_columns_takes_little_extra_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metric_writer, "BLOCK_BYTES", 2**12)
    n_lines = 20_000
    lines = (f'{{"step": {step}, "train/loss": 1.5, "train/spikes": 0}}\n' for step in range(n_lines))
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    tracemalloc.start()
    try:
        columns = read_columns(tmp_path, "train/loss", ("train/spikes",))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    arrays = [columns.steps, columns.stages, *columns.values.values()]
    assert {len(array) for array in arrays} == {n_lines}
    assert peak < 1.3 * sum(array.nbytes for array in arrays)


@pytest.mark.long
def test_a_million_lines_take_little_memory(tmp_path: Path) -> None:
    line = '{{"step": {}, "stage": "train", "train/loss": 1.5, "train/gradient_norm": 0.5, "train/update_norm": 0.1}}\n'
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        with open(tmp_path / name / "metrics.jsonl", "w") as file:
            file.writelines(line.format(step) for step in range(1, 1_000_001))
    code = """
import resource, sys
from pathlib import Path
from rustgpt_jax.reproduce.compare_metrics import compare_records
from rustgpt_jax.tracking.plots import draw_loss_curves
from rustgpt_jax.tracking.metric_writer import truncate_after, last_step, read_columns
one, other = Path(sys.argv[1]) / "one", Path(sys.argv[1]) / "other"
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert compare_records(one, other).n_values == 3_000_000
assert len(read_columns(one, "train/loss", ("train/gradient_norm", "train/spikes")).steps) == 1_000_000
draw_loss_curves(one)
truncate_after(one / "metrics.jsonl", 999_000)
assert last_step(one) == 999_000
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 150
