"""The event log of a run: exactly the complete events are read."""

import json
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as some

from rustgpt_jax.errors import UserError
from rustgpt_jax.reproduce import recorded_run
from rustgpt_jax.workdir.event_log import EventLog, load_launches, load_programs
from rustgpt_jax.workdir.run_dir import RunDir, lock_run_dir

VALUES = some.dictionaries(
    some.sampled_from(["step", "code", "text", "environment"]),
    some.one_of(some.integers(), some.text(max_size=9), some.lists(some.integers(), max_size=3)),
)
EVENT = some.tuples(some.sampled_from(["launch", "program", "stopped"]), VALUES)
HAPPENINGS = some.lists(
    some.one_of(
        some.tuples(some.just("append"), EVENT),
        some.tuples(some.just("kill"), EVENT, some.floats(0, 1)),
        some.tuples(some.just("look")),
    ),
    max_size=10,
)


def bare(event: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return an event without its time."""
    return event["event"], {name: value for name, value in event.items() if name not in ("time", "event")}


@given(HAPPENINGS)
@hypothesis.settings(max_examples=60)
def test_complete_events_are_read_in_order(happenings: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "events.jsonl"
        journal, written = EventLog(file), []
        for happening in happenings:
            match happening:
                case ("append", (name, values)):
                    journal.append(name, **values)
                    written.append((name, values))
                case ("kill", (name, values), share):
                    line = json.dumps({"time": 0.0, "event": name, **values}).encode()
                    with open(file, "ab") as half:
                        half.write(line[: int(share * (len(line) - 1))])
                case _:
                    assert [bare(event) for event in journal.events()] == written
        for reader in (journal, EventLog(file)):
            assert [bare(event) for event in reader.events()] == written


def test_event_has_its_time(tmp_path: Path) -> None:
    journal, before = EventLog(tmp_path / "events.jsonl"), time.time()
    journal.append("launch", step=3)
    (event,) = journal.events()
    assert before <= event["time"] <= time.time()
    assert bare(event) == ("launch", {"step": 3})


def test_concurrent_appends_lose_no_event(tmp_path: Path) -> None:
    journals = [EventLog(tmp_path / "events.jsonl") for _ in range(4)]

    def write(number: int) -> None:
        for step in range(20):
            journals[number].append("program", writer=number, step=step)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    events = journals[0].events()
    for number in range(4):
        assert [event["step"] for event in events if event["writer"] == number] == list(range(20))


def test_unwritable_log_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="nowhere/events.jsonl cannot be written: No such file or directory"):
        EventLog(tmp_path / "nowhere" / "events.jsonl").append("launch")
    # The disk is full after half of the event.
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, text: write(descriptor, text[: len(text) // 2]))
        with pytest.raises(UserError, match="events.jsonl cannot be written: No space left on device"):
            EventLog(tmp_path / "events.jsonl").append("launch", step=1)
    journal = EventLog(tmp_path / "events.jsonl")
    journal.append("launch", step=2)
    assert [event["step"] for event in journal.events()] == [2]


LAUNCH = {"step": 0, "argv": [], "cwd": "/", "code": "c", "git": None}
LAUNCH |= {"environment": {"machine": {"cores": 1}}, "mode": "solo", "width": 1, "devices": 1}
LINES = {
    "launch": (LAUNCH, load_launches),
    "program": ({"stage": "train", "stablehlo": "s", "cache_key": None}, load_programs),
    "rewind": ({"step": 3, "to": 1, "skipped": 2, "faults": 1}, recorded_run.read_rewinds),
}


@pytest.mark.parametrize(
    ("event", "missing"), [(event, name) for event, (values, _) in LINES.items() for name in values]
)
def test_missing_value_is_named(event: str, missing: str, tmp_path: Path) -> None:
    run, (values, read) = RunDir(tmp_path), LINES[event]
    EventLog(run.events_file).append(event, **values)
    assert len(read(run)) == 1
    EventLog(run.events_file).append(event, **{name: value for name, value in values.items() if name != missing})
    with pytest.raises(UserError, match=f"damaged: in a line of the event '{event}', '{missing}' is missing"):
        read(run)


@pytest.mark.parametrize(("event", "name"), [(event, name) for event, (values, _) in LINES.items() for name in values])
def test_value_of_another_type_is_named(event: str, name: str, tmp_path: Path) -> None:
    run, (values, read) = RunDir(tmp_path), LINES[event]
    EventLog(run.events_file).append(event, **(values | {name: 1.5}))
    with pytest.raises(UserError, match=f"damaged: in a line of the event '{event}', '{name}' has the wrong type"):
        read(run)


def test_symbolic_links_are_not_followed(tmp_path: Path) -> None:
    """In an untrusted folder, a link may point to any file of the user."""
    mine = tmp_path / "mine"
    mine.write_text("precious")
    for name in ("events.jsonl", ".lock"):
        (tmp_path / name).symlink_to(mine)
    with pytest.raises(UserError, match="cannot be written"):
        EventLog(tmp_path / "events.jsonl").append("launch")
    with pytest.raises(UserError, match="cannot be locked"), lock_run_dir(tmp_path):
        pass
    assert mine.read_text() == "precious"


@pytest.mark.parametrize("mask", [0o002, 0o077])
def test_log_respects_the_umask(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        EventLog(tmp_path / "events.jsonl").append("launch")
        with lock_run_dir(tmp_path):
            pass
    finally:
        os.umask(before)
    for name in ("events.jsonl", ".lock"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~mask
