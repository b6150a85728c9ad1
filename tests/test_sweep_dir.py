"""The ledger of a sweep: concurrent writers, killed writers, and damaged lines."""

import json
import subprocess
import sys
import tempfile
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
# Several events are written at once, a writer is killed in the middle of a line, or events are read.
ACTIONS = some.lists(
    some.one_of(
        some.tuples(some.just("append"), some.lists(EVENT, min_size=1, max_size=3)),
        some.tuples(some.just("kill"), EVENT, some.floats(0, 1)),
        some.tuples(some.just("read")),
    ),
    max_size=12,
)


def to_tuple(event: dict[str, Any]) -> Event:
    """Convert an event to (trial, event, details)."""
    details = {name: value for name, value in event.items() if name not in ("time", "trial", "event")}
    return event["trial"], event["event"], details


def write_partial_line(file: Path, event: Event, share: float) -> None:
    """Write a part of a line, as a killed writer does."""
    trial, name, details = event
    line = json.dumps({"time": 0.0, "trial": trial, "event": name, **details}).encode()
    with open(file, "ab") as ledger:
        ledger.write(line[: int(share * (len(line) - 1))])


# One writer at a time.


@given(ACTIONS)
@hypothesis.settings(max_examples=60)
def test_complete_lines_are_read_in_order(actions: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "ledger.jsonl"
        ledger, written = Ledger(file), list[Event]()
        for what, *details in actions:
            match what:
                case "append":
                    ledger.append_all(details[0])
                    written += details[0]
                case "kill":
                    write_partial_line(file, *details)
                case "read":
                    assert [to_tuple(event) for event in ledger.events()] == written
                    assert_done(ledger)
        assert_done(ledger)
        assert [to_tuple(event) for event in ledger.events()] == written
        assert Ledger(file).events() == ledger.events()
        if written:
            ledger.append("dddddddd", "planned", overrides={})
            # The partial line remains, but each event has its own line.
            lines = file.read_bytes().split(b"\n")
            assert [event for line in lines if (event := as_event(line))] == ledger.events()


def assert_done(ledger: Ledger) -> None:
    """Assert that `is_done` agrees with the last events."""
    done = [trial for trial, event in ledger.states().items() if event["event"] in DONE]
    assert [trial for trial in ledger.states() if ledger.is_done(trial)] == done


def as_event(line: bytes) -> dict[str, Any] | None:
    """Parse a line of JSON, or return None."""
    try:
        return json.loads(line)
    except ValueError:
        return None


@given(some.lists(EVENT, max_size=12))
@hypothesis.settings(max_examples=60)
def test_state_is_the_last_event_except_queued(events: list[Event]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder) / "ledger.jsonl")
        for trial, event, details in events:
            ledger.append(trial, event, **details)
        states = ledger.states()
        assert list(states) == list(dict.fromkeys(trial for trial, _, _ in events))
        for trial in TRIALS:
            own = [event for event in events if event[0] == trial]
            telling = [event for event in own if event[1] != "queued"] or own[:1]
            assert [to_tuple(states[trial])] == telling[-1:] if own else trial not in states
            assert ledger.is_done(trial) == (bool(own) and telling[-1][1] in ("finished", "diverged"))


def test_missing_ledger_is_empty(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    assert (ledger.events(), ledger.states(), ledger.is_done("aaaaaaaa")) == ([], {}, False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("line", [b"[1]", b"3", b'{"trial": "a"}', b"\xff\xfe", b"\x00\x00", b""])
def test_invalid_lines_are_skipped(line: bytes, tmp_path: Path) -> None:
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
    # Longer than a page of memory, so that a kill may interrupt a write.
    ledger.append_all([(name, "began", {"step": step, "error": name * 700}) for step in (number, number + 1)])
    print(number + 1, flush=True)
"""


@pytest.mark.slow
def test_concurrent_writers_some_of_which_are_killed(tmp_path: Path) -> None:
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
    reader, acknowledged = Ledger(file), dict[str, list[int]]()
    try:
        for number, name in enumerate(names):
            process = writers[name]
            assert process.stdout is not None
            if "killed" in name:
                numbers = [int(process.stdout.readline()) for _ in range(5 + 3 * number)]
                process.kill()
                acknowledged[name] = numbers + [int(line) for line in process.stdout]
            else:
                acknowledged[name] = [int(line) for line in process.stdout]
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
        # All acknowledged events are on disk, and possibly some of the interrupted write.
        assert acknowledged[name][-1] + 1 <= len(steps) <= acknowledged[name][-1] + 3
        assert "killed" in name or len(steps) == count
    assert all(event["error"] == event["trial"] * 700 for event in events)
