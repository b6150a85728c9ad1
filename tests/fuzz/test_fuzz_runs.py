"""Files of a run folder with random edits are read, truncated and plotted, or raise an error of one sentence."""

import json
import math
from contextlib import suppress
from typing import Any

# Its list of fonts is made in the user's own folder when it is first imported, which is not to be in a case.
import matplotlib.font_manager as _fonts
import numpy as np
import pytest
from fuzzing import ODD_NUMBERS, Sandbox, ShortBytes, corrupt_bytes, edit_tree, max_cases, run_or_refuse, write
from fuzzing import sandbox as sandbox
from hypothesis import given
from hypothesis import strategies as st

from rustgpt_jax.data.preprocess import read_data_record
from rustgpt_jax.reproduce.compare_metrics import compare_records
from rustgpt_jax.reproduce.recorded_run import read_rewinds
from rustgpt_jax.reproduce.run_diff import diff_data
from rustgpt_jax.tracking.metric_writer import (
    RunWriter,
    last_metrics,
    last_step,
    read_columns,
    read_metrics,
    truncate_after,
)
from rustgpt_jax.tracking.plots import draw_loss_curves
from rustgpt_jax.training.checkpointing import CorruptCheckpoint, read_metadata
from rustgpt_jax.training.run_inputs import read_import_record
from rustgpt_jax.workdir.event_log import load_launches, load_programs
from rustgpt_jax.workdir.run_dir import RunDir

assert _fonts.fontManager
ROWS: list[dict[str, Any]] = [
    {"step": step, "stage": "pretrain" if step < 5 else "instruct", "train/loss": 3 / (step + 1), "tokens/s": 9.5}
    | ({"valid/loss": 3.5 / (step + 1)} if step % 3 == 0 else {})
    for step in range(9)
]
NOT_FINITE = [{"step": 9, "train/loss": "NaN"}, {"step": 10, "train/loss": "Infinity", "valid/loss": "-Infinity"}]


def lines(rows: Any) -> bytes:
    """Return rows as the lines of metrics.jsonl."""
    return ShortBytes("".join(json.dumps(row) + "\n" for row in (rows if isinstance(rows, list) else [rows])).encode())


WRITTEN = lines(ROWS + NOT_FINITE)
# Names that a reader looks at, with a value that it does not expect.
odd_rows = st.lists(
    st.fixed_dictionaries(
        {"step": st.sampled_from((1, 2, 3, *ODD_NUMBERS)) | st.integers(0, 9)},
        optional={
            "train/loss": st.floats() | st.sampled_from(("NaN", "x", None, [], 1e308, 0)),
            "valid/loss": st.floats() | st.integers(),
            "stage": st.sampled_from(("a", "b", "$x$", "", 1, None, [], {}, "x" * 300, "\ud800", "日本\n")),
        },
    ),
    max_size=5,
)
metrics = corrupt_bytes(WRITTEN) | edit_tree(ROWS + NOT_FINITE).map(lines) | odd_rows.map(lines) | st.none()


def test_unedited_metrics_are_read(sandbox: Sandbox) -> None:
    with sandbox.case() as folder:
        write(folder / "metrics.jsonl", WRITTEN)
        assert len(read_metrics(folder)) == 11 and math.isnan(read_metrics(folder)[9]["train/loss"])
        assert last_metrics(folder)["step"] == 10
        assert draw_loss_curves(folder).exists()


@max_cases(400)
@given(metrics, st.sampled_from((0, 1, 4, 9, 10**30)))
def test_edited_metrics_are_read_or_are_an_error(sandbox: Sandbox, data: bytes | None, resumed: int) -> None:
    with sandbox.case() as folder:
        write(folder / "metrics.jsonl", data)
        rows = run_or_refuse(lambda: read_metrics(folder))
        last = run_or_refuse(lambda: last_metrics(folder))
        assert rows is None or data is None or last is not None
        run_or_refuse(lambda: truncate_after(folder / "metrics.jsonl", resumed))
        if rows is not None:
            places = [place for place, row in enumerate(rows, start=1) if resumed and row["step"] <= resumed]
            kept = rows[: max(places, default=0)]
            # NaN is not equal to itself.
            assert repr(read_metrics(folder)) == repr(kept)


@max_cases(200)
@given(metrics, metrics)
def test_columns_of_edited_metrics_are_read_and_compared(
    sandbox: Sandbox, data: bytes | None, other: bytes | None
) -> None:
    with sandbox.case() as folder:
        for name, content in (("one", data), ("other", other), ("copy", data)):
            write(folder / name / "metrics.jsonl", content)
        rows = run_or_refuse(lambda: read_metrics(folder / "one"))
        columns = run_or_refuse(lambda: read_columns(folder / "one", "train/loss", ("valid/loss",), absent=-1.0))
        last = run_or_refuse(lambda: last_step(folder / "one"))
        if rows is not None:
            assert columns is not None and last == (rows[-1]["step"] if rows else 0)
            own = [row for row in rows if "train/loss" in row]
            values = {"train/loss": [row["train/loss"] for row in own]}
            values["valid/loss"] = [row.get("valid/loss", -1.0) for row in own]
            assert columns.steps.tolist() == [row["step"] for row in own]
            for name, column in columns.values.items():
                np.testing.assert_array_equal(column, np.array(values[name], float))
            assert [columns.stage_names[index] for index in columns.stages] == [row.get("stage", "") for row in own]
            every = run_or_refuse(lambda: compare_records(folder / "one", folder / "copy"))
            assert every is None or every.first_difference is None
        run_or_refuse(lambda: compare_records(folder / "one", folder / "other"))


@max_cases(25)
@given(metrics, st.sampled_from((0, 3)))
def test_run_resumes_from_edited_metrics_or_is_an_error(sandbox: Sandbox, data: bytes | None, last_step: int) -> None:
    with sandbox.case() as folder:
        write(folder / "metrics.jsonl", data)

        def go_on() -> None:
            with RunWriter(folder, last_step) as writer:
                writer.write(last_step + 1, {"train/loss": math.nan})

        run_or_refuse(go_on)


@max_cases(25)
@given(metrics)
def test_edited_metrics_are_plotted_or_are_an_error(sandbox: Sandbox, data: bytes | None) -> None:
    with sandbox.case() as folder:
        write(folder / "metrics.jsonl", data)
        run_or_refuse(lambda: draw_loss_curves(folder))


@pytest.mark.parametrize("name", ["日本", "\udcff", "$x$"])
def test_unusual_names_are_plotted(sandbox: Sandbox, name: str) -> None:
    with sandbox.case() as folder:
        write(folder / name / "metrics.jsonl", lines([*ROWS, {"step": 20, "stage": name, "train/loss": 1.0}]))
        draw_loss_curves(folder / name)


# The other files of a run's folder.

DATA = [{"stage": "a", "source": "0" * 64, "tokenizer": "1" * 64, "n_dialogues": 0, "splits": {}, "files": {}}]
BEGINNING = {"source": "runs/a", "step": 3, "tokenizer": "1" * 64, "loaded": ["x"], "fingerprints": {"x": "00"}}
LAUNCH = {
    **{"time": 1.0, "event": "launch", "step": 0, "argv": ["launch.py"], "cwd": "/", "code": "00", "git": None},
    **{"environment": {"machine": {"cores": 2}}, "mode": "solo", "width": 1, "devices": 1, "left_out": [], "mesh": {}},
}
REWIND = {"time": 2.0, "event": "rewind", "step": 8, "to": 6, "skipped": 2, "faults": 1}
PROGRAM = {"time": 2.0, "event": "program", "stage": "a", "step": 0, "stablehlo": "00", "cache_key": "11"}
ABOUT = {
    **{"step": 8, "config_hash": "00", "config": {}, "is_scheduled": True},
    **{"layout": {"params/a": "float32[]"}, "fingerprints": {"params/a": "00"}},
}


def json_edits(value: Any) -> Any:
    """A strategy for the JSON of a value with edits of its bytes or of its tree."""
    written = ShortBytes(json.dumps(value).encode())
    return corrupt_bytes(written) | edit_tree(value).map(lambda tree: ShortBytes(json.dumps(tree).encode())) | st.none()


@max_cases(150)
@given(json_edits(DATA), json_edits(BEGINNING))
def test_edited_data_and_warm_start_records_are_read_or_are_an_error(
    sandbox: Sandbox, data: bytes | None, beginning: bytes | None
) -> None:
    with sandbox.case() as folder:
        run = RunDir(folder / "run")
        write(run.data_file, data)
        write(run.import_file, beginning)
        run_or_refuse(lambda: read_data_record(run.data_file))
        run_or_refuse(lambda: read_import_record(run))
        if run_or_refuse(lambda: diff_data(run, run)) is not None:
            assert not diff_data(run, run)


@max_cases(150)
@given(json_edits(LAUNCH), json_edits(REWIND), json_edits(PROGRAM))
def test_edited_event_log_is_read_or_is_an_error(
    sandbox: Sandbox, launch: bytes | None, rewind: bytes | None, program: bytes | None
) -> None:
    with sandbox.case() as folder:
        run = RunDir(folder / "run")
        write(run.events_file, b"\n".join(filter(None, (launch, rewind, program))) + b"\n")
        for read in (load_launches, load_programs, read_rewinds):
            run_or_refuse(lambda read=read: read(run))  # type: ignore[misc]


@max_cases(150)
@given(json_edits(ABOUT))
def test_edited_checkpoint_metadata_is_read_or_is_corrupt(sandbox: Sandbox, about: bytes | None) -> None:
    with sandbox.case() as folder:
        write(folder / "8" / "about" / "metadata", about)
        with suppress(CorruptCheckpoint):
            found = read_metadata(folder, 8)
            assert found["step"] == 8 and isinstance(found["layout"], dict)
