"""How are several frameworks measured in turns, each in a process of its own?

python -m experiments.benchmarks.performance.ours '{"what": "peaks", "size": 2048, "gigabytes": 1}'

A worker is a process that prepares what its one argument asks for (one of the tasks of its module), says so, and then
does a turn for each line that it is sent, and tells what it measured. Only one works at a time: the others wait for a
line. Ours tell the allocator what every command of the framework tells it; peers begin with those settings of it that
serve them best (`MALLOC`), which matter to all of them.

FINDING: none of its own; see `run.py`.
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

from ml_collections import ConfigDict

from experiments.benchmarks.best_batch import ROOT, Failure, tree_of
from experiments.benchmarks.performance.turns import Reading

PACKAGE = "experiments.benchmarks.performance"
OURS = "ours"
# glibc is to keep large blocks instead of giving them back to the system, which would hand them out page by page again.
# One arena for all threads, as we have it, makes PyTorch slower.
LARGE = str(2**33)
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": LARGE,
    "MALLOC_TRIM_THRESHOLD_": LARGE,
    "MALLOC_TOP_PAD_": str(2**26),
}


# What a task gives: what there is to say once it is prepared, and the function that does a turn.
Prepared = tuple[dict[str, Any], Callable[[], Reading]]


class Request(NamedTuple):
    """A task of a module, and its arguments."""

    module: str
    what: str
    arguments: Mapping[str, Any] = {}


class Worker:
    """A process that does a task turn by turn. Use it in a `with` statement.

    about: what it has said once it was prepared. Raises Failure where it fails, then and in any turn.
    """

    def __init__(self, request: Request, patience: float, log: Path) -> None:
        self._patience, self._log, self._said = patience, log, b""
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
        """What it measures in its next turn."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(b"\n")
            self._process.stdin.flush()
        return self._reply()

    def _reply(self) -> Any:
        assert self._process.stdout is not None
        until = time.monotonic() + self._patience
        while b"\n" not in self._said:
            if not select.select([self._process.stdout], [], [], max(0, until - time.monotonic()))[0]:
                raise Failure(f"it took more than {self._patience:.0f} seconds")
            said = os.read(self._process.stdout.fileno(), 2**16)
            if not said:
                raise Failure(f"its process ended with status {self._process.wait()}: {self._last_words()}")
            self._said += said
        line, self._said = self._said.split(b"\n", 1)
        reply = json.loads(line)
        if "error" in reply:
            raise Failure(reply["error"])
        return reply["result"]

    def _last_words(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process: it ends when there are no more lines to come, or else it is ended."""
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
def crew(
    requests: Mapping[str, Request], patience: float, log: Path
) -> Iterator[tuple[dict[str, Worker], dict[str, str]]]:
    """Workers by name, prepared one after another, and why some are not there."""
    workers: dict[str, Worker] = {}
    failures: dict[str, str] = {}
    with ExitStack() as stack:
        for name, request in requests.items():
            try:
                workers[name] = stack.enter_context(Worker(request, patience, log))
            except Failure as failure:
                failures[name] = str(failure)
        yield workers, failures


def asked(request: Request, patience: float, log: Path) -> dict[str, Any]:
    """What a worker says once it is prepared, without any turn. Raises Failure."""
    with Worker(request, patience, log) as worker:
        return worker.about


def serve(tasks: Mapping[str, Callable[..., Prepared]]) -> None:
    """What such a process does."""
    request = json.loads(sys.argv[1])
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # What libraries print is no reply.
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


def only_said(about: dict[str, Any]) -> Prepared:
    """A task that is done when it is prepared."""
    return about, dict


def get_config() -> ConfigDict:
    """The smallest of the models."""
    return tree_of("124m")
