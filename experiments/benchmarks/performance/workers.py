"""Worker processes of the benchmark, each measuring one framework.

python -m experiments.benchmarks.performance.ours '{"what": "peaks", "size": 2048, "gigabytes": 1}'

A worker is a process that prepares the task named by its argument, reports that it is ready, and then runs one turn per
line of standard input and reports the measurement. Only one works at a time; the others wait for input. Our workers use
the framework's allocator settings; peers start with the settings that are fastest for them (`MALLOC`).
"""

import json
import os
import select
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from experiments.benchmarks.best_batch import ROOT, Failure
from experiments.benchmarks.performance.turns import Reading

PACKAGE = "experiments.benchmarks.performance"
OURS = "ours"
# glibc keeps large blocks instead of returning them to the system, which would map them page by page again.
# A single arena for all threads, as in our processes, makes PyTorch slower.
LARGE = str(2**33)
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": LARGE,
    "MALLOC_TRIM_THRESHOLD_": LARGE,
    "MALLOC_TOP_PAD_": str(2**26),
}


# A prepared task: its description, and the function that runs a turn.
Prepared = tuple[dict[str, Any], Callable[[], Reading]]


class Request(NamedTuple):
    """A task of a module, and its arguments."""

    module: str
    what: str
    arguments: Mapping[str, Any] = {}


class Worker:
    """A process that runs a task turn by turn; a context manager.

    Attributes:
        about: The description of the prepared task.

    Raises:
        Failure: The process fails while it prepares the task. `turn` raises it if the process fails in a turn.
    """

    def __init__(self, request: Request, patience: float, log: Path) -> None:
        self._patience, self._log, self._unread = patience, log, b""
        log.parent.mkdir(parents=True, exist_ok=True)
        words = json.dumps({"what": request.what, **request.arguments})
        with log.open("a", encoding="utf-8") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", f"{PACKAGE}.{request.module}", words],
                cwd=ROOT,
                env=os.environ | ({} if request.module == OURS else MALLOC),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
            )
        try:
            self.about: dict[str, Any] = self._reply()
        except BaseException:
            self.close()
            raise

    def turn(self) -> Reading:
        """Run a turn and return its measurement."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(b"\n")
            self._process.stdin.flush()
        return self._reply()

    def _reply(self) -> Any:
        assert self._process.stdout is not None
        until = time.monotonic() + self._patience
        while b"\n" not in self._unread:
            if not select.select([self._process.stdout], [], [], max(0, until - time.monotonic()))[0]:
                raise Failure(f"it took more than {self._patience:.0f} seconds")
            chunk = os.read(self._process.stdout.fileno(), 2**16)
            if not chunk:
                raise Failure(f"its process ended with status {self._process.wait()}: {self._last_log_line()}")
            self._unread += chunk
        line, self._unread = self._unread.split(b"\n", 1)
        reply = json.loads(line)
        if "error" in reply:
            raise Failure(reply["error"])
        return reply["result"]

    def _last_log_line(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else "no output"

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process by closing its input, or else by killing it."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


@contextmanager
def start_workers(
    requests: Mapping[str, Request], patience: float, log: Path
) -> Iterator[tuple[dict[str, Worker], dict[str, str]]]:
    """Yield prepared workers by name, and the reasons for missing ones."""
    workers: dict[str, Worker] = {}
    failures: dict[str, str] = {}
    with ExitStack() as stack:
        for name, request in requests.items():
            try:
                workers[name] = stack.enter_context(Worker(request, patience, log))
            except Failure as failure:
                failures[name] = str(failure)
        yield workers, failures


def describe_task(request: Request, patience: float, log: Path) -> dict[str, Any]:
    """Return the description of a prepared worker, without running a turn. Raises Failure."""
    with Worker(request, patience, log) as worker:
        return worker.about


def serve(tasks: Mapping[str, Callable[..., Prepared]]) -> None:
    """Run the worker loop of this process."""
    request = json.loads(sys.argv[1])
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # Keep the output of libraries apart from the replies.
    os.dup2(2, 1)

    def say(**reply: Any) -> None:
        print(json.dumps(reply), file=replies, flush=True)

    try:
        about, turn = tasks[request.pop("what")](**request)
        say(result=about)
        for _ in sys.stdin:
            say(result=turn())
    except ModuleNotFoundError as error:
        say(error=f"{error.name} is not installed: python -m pip install 'rustgpt_jax[bench]'")
    except Exception as error:
        traceback.print_exc()
        say(error=f"{type(error).__name__}: {error}")


def description_only(about: dict[str, Any]) -> Prepared:
    """Return a task that has a description but no turns."""
    return about, dict
