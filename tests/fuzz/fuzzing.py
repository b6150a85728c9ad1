"""Random edits of real inputs, and what the code that reads them must do.

Each test edits a valid input and calls what a command would call. The call returns, or raises a UserError of one clear
line; it ends within seconds, prints nothing, and leaves nothing outside the folder that it was given.

A quarter of the cases are tried by default, all of them with RUSTGPT_JAX_FUZZ=1, as in .ci/run; they are the same in
every session. A larger value multiplies their number and draws others: RUSTGPT_JAX_FUZZ=20 python -m pytest tests/fuzz
"""

import copy
import math
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import hypothesis
import pytest
from hypothesis import strategies as st

from rustgpt_jax.errors import UserError

FACTOR = float(os.environ.get("RUSTGPT_JAX_FUZZ", "0.25"))
# Of CPU time, and of wall time: the machine may be busy.
MAX_CPU_SECONDS, TIMEOUT_SECONDS = 6.0, 60.0
MAX_CHARACTERS = 600

Draw = Callable[[Any], Any]
Result = TypeVar("Result")


def max_cases(number: int) -> Any:
    """A decorator that sets the number of cases of a property."""
    return hypothesis.settings(
        max_examples=math.ceil(number * FACTOR),
        derandomize=FACTOR <= 1,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )


# Edits of values.

ODD_NUMBERS = (
    *(0, 1, -1, 2, 3, 7, 8, 100, 2**31 - 1, 2**31, 2**32, 2**53, 2**63, 2**64, 10**30, -(10**30), 10**400),
    *(0.0, -0.0, 0.5, 1.0, 1.5, 1e-320, 1e38, 1e39, 1e308, math.nan, math.inf, -math.inf),
)
ODD_TEXTS = (
    *("", " ", "None", "nan", "1e3", "x" * 5000, "\0", "\ud800", "\u202e", "日本", "a\nb\r\n", "\x1b[2J", "%s{}{0}"),
    *("[/INST]", "[b]x[/b] :smile:", "(softly) a, b", "a;b\tc|d", '"', "x" * 300),
    *("../../etc/passwd", "/", ".", "..", "*", "**", "[", "~", "json:loads", ":", "a:b", "os:getcwd", "math:pi"),
)


def nested_lists(depth: int) -> list[Any]:
    """A list nested this deep."""
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


# Deeper than the recursion limit of Python's JSON parser and of most recursive code.
DEEP_JSON = "[" * 100_000 + "]" * 100_000

odd_scalars = (
    st.none() | st.booleans() | st.sampled_from(ODD_NUMBERS) | st.sampled_from(ODD_TEXTS) | st.integers() | st.floats()
)
odd_values = odd_scalars | st.text(max_size=12) | st.sampled_from(
    ([], {}, [[]], {"": {}}, [None], ["a", 1], [["a", 1]], [0] * 3000, nested_lists(40), nested_lists(700))
)  # fmt: skip


@st.composite
def edit_tree(draw: Draw, value: Any) -> Any:
    """A copy of a tree of dicts and lists with some values replaced, removed, doubled, renamed or nested."""
    tree = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 4))):
        tree = _edit_node(draw, tree)
    return tree


def _edit_node(draw: Draw, node: Any) -> Any:
    keys = list(node) if isinstance(node, dict) else list(range(len(node))) if isinstance(node, (list, tuple)) else []
    how = draw(st.sampled_from(("below", "below", "below", "change") if keys else ("replace", "replace", "nest")))
    if how == "replace":
        return draw(odd_values)
    if how == "nest":
        return draw(st.sampled_from(([node], {"x": node}, [node, node], str(node))))
    key = keys[draw(st.integers(0, len(keys) - 1))]
    whole = dict(node) if isinstance(node, dict) else list(node)
    if how == "below":
        whole[key] = _edit_node(draw, whole[key])
    elif draw(st.booleans()):
        del whole[key]
    elif isinstance(whole, dict):
        renamed = draw(st.sampled_from((f"{key}s", str(key)[:-1], str(key).upper())) | st.sampled_from(ODD_TEXTS))
        whole[renamed] = draw(st.sampled_from((whole[key], whole[keys[0]])))
    else:
        whole.insert(draw(st.integers(0, len(whole))), whole[key])
    return tuple(whole) if isinstance(node, tuple) else whole


# Edits of bytes.

ODD_BYTES = (
    *(b"\0", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\r\n", b"\n", b"\r", b"\\ud800", b"\x1a", b"\x1b[2J"),
    *(b"NaN", b"-Infinity", b"1e999", b"9" * 400, b"9" * 5000, b"-1", b"null", b"true", b"0", b"1.5"),
    *(b'"', b"'", b",", b"{", b"}", b"[", b"]", b":", b"/", b"\\", b" " * 300, "é".encode("latin-1"), "日本".encode()),
)


class ShortBytes(bytes):
    """Bytes with a short repr."""

    def __repr__(self) -> str:
        return repr(bytes(self)) if len(self) < 4000 else f"{bytes(self[:2000])!r} ... {bytes(self[-2000:])!r}"


@st.composite
def corrupt_bytes(draw: Draw, data: bytes) -> bytes:
    """The bytes with some of them changed, removed, inserted or doubled, or truncated."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        stop = min(len(data), start + draw(st.sampled_from((1, 1, 2, 5, 40, 1000))))
        part = data[start:stop]
        how = draw(st.sampled_from(("flip", "cut", "insert", "insert", "replace", "double", "truncate", "ends", "all")))
        if how == "flip":
            part = bytes(byte ^ draw(st.sampled_from((1, 32, 128, 255))) for byte in part[:1]) + part[1:]
        elif how == "cut":
            part = b""
        elif how == "insert":
            part = draw(st.sampled_from(ODD_BYTES)) + part
        elif how == "replace":
            part = draw(st.sampled_from(ODD_BYTES))
        elif how == "double":
            part = part * 2
        elif how == "truncate":
            part, stop = b"", len(data)
        elif how == "ends":
            start, stop, part = 0, len(data), data.replace(b"\n", b"\r\n")
        else:
            utf_16 = data.decode("latin-1").encode("utf-16")
            whole = (b"", b"\xef\xbb\xbf" + data, DEEP_JSON.encode(), data + data, utf_16)
            start, stop, part = 0, len(data), draw(st.sampled_from(whole))
        data = data[:start] + part + data[stop:]
    return ShortBytes(data)


PIPE = ShortBytes(b"a pipe without a writer")


def write(file: Path, data: bytes | None) -> None:
    """Writes a file; for None makes a folder instead, and for PIPE a named pipe."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if data is None:
        file.mkdir()
    elif data is PIPE:
        os.mkfifo(file)
    else:
        file.write_bytes(data)


# What the code must do.


class CaseTimeout(Exception):
    """A case does not end."""


def run_or_refuse(call: Callable[[], Result]) -> Result | None:
    """Returns the result of a call, or None if it raises a UserError of one clear line; it must end within seconds."""

    def stop(*_: object) -> None:
        raise CaseTimeout

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, TIMEOUT_SECONDS)
    start = time.process_time()
    try:
        result = call()
    except UserError as error:
        assert_clear_message(str(error))
        result = None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.process_time() - start < MAX_CPU_SECONDS
    return result


def assert_clear_message(text: str) -> None:
    """Asserts that a message is one line, neither empty nor long, that ends like a sentence."""
    assert text.isprintable() and text.strip(), repr(text)
    assert text.endswith((".", "?", ")")), text
    assert len(text) < MAX_CHARACTERS and "Traceback" not in text, text


class Sandbox:
    """A folder for one case at a time, beside the current, the home and the temporary folder."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.root, self.inside = root, root / "inside"
        for name in ("current", "home", "temporary"):
            (root / name).mkdir()
        patch.chdir(root / "current")
        patch.setenv("HOME", str(root / "home"))
        patch.setenv("RUSTGPT_JAX_CACHE", str(self.inside / "cache"))
        patch.setattr(tempfile, "tempdir", str(root / "temporary"))

    @contextmanager
    def case(self) -> Iterator[Path]:
        """Yields an empty folder; nothing outside it may change."""
        self.inside.mkdir()
        before = self._around()
        try:
            yield self.inside
            assert self._around() == before
        finally:
            shutil.rmtree(self.inside)

    def _around(self) -> dict[str, tuple[int, int]]:
        beside = (path for path in self.root.rglob("*") if not path.is_relative_to(self.inside))
        return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in beside}


@pytest.fixture
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Sandbox]:
    """The folder of a test's cases; the test may print nothing."""
    yield Sandbox(tmp_path, monkeypatch)
    assert capfd.readouterr() == ("", "")
