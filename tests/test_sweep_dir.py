"""The ledger of a sweep: many processes write it, any of them may be killed, and no whole line is ever lost."""

import fcntl
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as some

from rustgpt_jax.sweeps.sweep_dir import DONE, EVENTS, Ledger

ROOT = Path(__file__).parent.parent
TRIALS = ("aaaaaaaa", "bbbbbbbb", "cccccccc")

Event = tuple[str, str, dict[str, Any]]
EVENT = some.tuples(
    some.sampled_from(TRIALS),
    some.sampled_from(EVENTS),
    some.fixed_dictionaries(
        {"overrides": some.just({})}, optional={"error": some.text(max_size=9), "step": some.integers(0, 9)}
    ),
)
# What happens to a ledger: some events are written at once, a writer is killed in the middle of a line, someone looks.
HAPPENINGS = some.lists(
    some.one_of(
        some.tuples(some.just("append"), some.lists(EVENT, min_size=1, max_size=3)),
        some.tuples(some.just("kill"), EVENT, some.floats(0, 1)),
        some.tuples(some.just("look")),
    ),
    max_size=12,
)


def bare(event: dict[str, Any]) -> Event:
    """An event as it was given: (trial, event, details)."""
    details = {name: value for name, value in event.items() if name not in ("time", "trial", "event")}
    return event["trial"], event["event"], details


def write_half_a_line(file: Path, event: Event, share: float) -> None:
    """What a writer leaves that is killed before its line is whole."""
    trial, name, details = event
    line = json.dumps({"time": 0.0, "trial": trial, "event": name, **details}).encode()
    with open(file, "ab") as ledger:
        ledger.write(line[: int(share * (len(line) - 1))])


# One writer at a time.


@given(HAPPENINGS)
@hypothesis.settings(max_examples=60)
def test_what_was_written_whole_is_read_in_its_order(happenings: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "ledger.jsonl"
        ledger, written = Ledger(file), list[Event]()
        for what, *details in happenings:
            match what:
                case "append":
                    ledger.append_all(details[0])
                    written += details[0]
                case "kill":
                    write_half_a_line(file, *details)
                case "look":
                    assert [bare(event) for event in ledger.events()] == written
                    assert_done(ledger)
        assert_done(ledger)
        assert [bare(event) for event in ledger.events()] == written
        assert Ledger(file).events() == ledger.events()
        if written:
            ledger.append("dddddddd", "planned", overrides={})
            # A torn line stays, alone: each event stands on a line of its own.
            lines = file.read_bytes().split(b"\n")
            assert [event for line in lines if (event := as_event(line))] == ledger.events()


def assert_done(ledger: Ledger) -> None:
    """`is_done`, which keeps no events, says what the last events say."""
    done = [trial for trial, event in ledger.states().items() if event["event"] in DONE]
    assert [trial for trial in ledger.states() if ledger.is_done(trial)] == done


def as_event(line: bytes) -> dict[str, Any] | None:
    """A line of JSON, or None."""
    try:
        return json.loads(line)
    except ValueError:
        return None


@given(some.lists(EVENT, max_size=12))
@hypothesis.settings(max_examples=60)
def test_a_state_is_the_last_event_but_queued(events: list[Event]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder) / "ledger.jsonl")
        for trial, event, details in events:
            ledger.append(trial, event, **details)
        states = ledger.states()
        assert list(states) == list(dict.fromkeys(trial for trial, _, _ in events))
        for trial in TRIALS:
            own = [event for event in events if event[0] == trial]
            telling = [event for event in own if event[1] != "queued"] or own[:1]
            assert [bare(states[trial])] == telling[-1:] if own else trial not in states
            assert ledger.is_done(trial) == (bool(own) and telling[-1][1] in ("finished", "diverged"))


def test_an_event_has_the_time_of_its_writing(tmp_path: Path) -> None:
    ledger, before = Ledger(tmp_path / "ledger.jsonl"), time.time()
    ledger.append_all([("aaaaaaaa", "planned", {"overrides": {"seed": 1}}), ("bbbbbbbb", "planned", {"overrides": {}})])
    first, second = ledger.events()
    assert before <= first["time"] == second["time"] <= time.time()
    assert first["overrides"] == {"seed": 1}


def test_a_ledger_that_is_not_there_is_empty_and_stays_away(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    assert (ledger.events(), ledger.states(), ledger.is_done("aaaaaaaa")) == ([], {}, False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("line", [b"[1]", b"3", b'{"trial": "a"}', b"\xff\xfe", b"\x00\x00", b""])
def test_a_line_that_is_no_event_is_passed_over(line: bytes, tmp_path: Path) -> None:
    file = tmp_path / "ledger.jsonl"
    ledger = Ledger(file)
    ledger.append("aaaaaaaa", "planned", overrides={})
    with open(file, "ab") as lines:
        lines.write(line + b"\n")
    ledger.append("aaaaaaaa", "began")
    assert [event["event"] for event in ledger.events()] == ["planned", "began"]


# Many at a time.

WRITER = """
import sys
from pathlib import Path
from rustgpt_jax.sweeps.sweep_dir import Ledger

name, file, count = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
ledger = Ledger(file)
for number in range(0, count, 2):
    # Longer than a page of memory, so that a kill may fall into the middle of a write.
    ledger.append_all([(name, "began", {"step": step, "error": name * 700}) for step in (number, number + 1)])
    print(number + 1, flush=True)
"""


@pytest.mark.slow
def test_processes_write_at_once_and_some_are_killed(tmp_path: Path) -> None:
    file, count = tmp_path / "ledger.jsonl", 60
    names = ("killed 0", "killed 1", "killed 2", "whole 0", "whole 1")
    writers = {
        name: subprocess.Popen(
            [sys.executable, "-c", WRITER, name, str(file), str(count if "whole" in name else 10**9)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in names
    }
    reader, said = Ledger(file), dict[str, list[int]]()
    try:
        for number, name in enumerate(names):
            process = writers[name]
            assert process.stdout is not None
            if "killed" in name:
                told = [int(process.stdout.readline()) for _ in range(5 + 3 * number)]
                process.kill()
                said[name] = told + [int(line) for line in process.stdout]
            else:
                said[name] = [int(line) for line in process.stdout]
            reader.events()
            assert (process.wait() == 0) == ("whole" in name)
    finally:
        for process in writers.values():
            process.kill()
            process.communicate()
    events = reader.events()
    assert events == Ledger(file).events()
    for name in names:
        steps = [event["step"] for event in events if event["trial"] == name]
        assert steps == list(range(len(steps)))
        # Whatever was told to be on the disk is there, and of what was being written when it was killed, a part.
        assert said[name][-1] + 1 <= len(steps) <= said[name][-1] + 3
        assert "killed" in name or len(steps) == count
    assert all(event["error"] == event["trial"] * 700 for event in events)


def test_a_writer_waits_for_its_turn(tmp_path: Path) -> None:
    file = tmp_path / "ledger.jsonl"
    with open(file, "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        writer = threading.Thread(target=Ledger(file).append, args=("aaaaaaaa", "began"))
        writer.start()
        writer.join(0.2)
        assert writer.is_alive() and file.read_bytes() == b""
    writer.join()
    assert [event["event"] for event in Ledger(file).events()] == ["began"]


def test_threads_that_look_at_once_see_each_event_once(tmp_path: Path) -> None:
    ledger, count, is_over = Ledger(tmp_path / "ledger.jsonl"), 2000, threading.Event()

    def look() -> None:
        while not is_over.is_set():
            ledger.events()

    threads = [threading.Thread(target=look) for _ in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        descriptor = os.open(tmp_path / "ledger.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        for step in range(count):
            os.write(descriptor, json.dumps({"time": 0, "trial": "a", "event": "began", "step": step}).encode() + b"\n")
        os.close(descriptor)
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    assert [event["step"] for event in ledger.events()] == list(range(count))
