"""Search for the batch size at which a GPT-2 trains fastest on this accelerator, here or in PyTorch.

python -m experiments.benchmarks.best_batch 350m rustgpt_jax

Every measurement runs in its own process, so that memory is measured separately and a failure does not affect others.
The batch size is doubled until it no longer fits or the throughput rises by less than 2%. If memory is exhausted, the
search continues with fewer saved residuals; if not even the first batch size fits then, it continues with smaller ones.
"""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from configs import gpt2_124m
from rustgpt_jax.config.schema import Config
from rustgpt_jax.config.validation import resolve

ROOT = Path(__file__).resolve().parents[2]
Knobs = dict[str, Any]

# GPT-2 (OpenAI 2019); heads have 64 channels.
SIZES: dict[str, Knobs] = {
    "124m": {"n_layers": 12, "attention": {"n_heads": 12}, "d_model": 768},
    "350m": {"n_layers": 24, "attention": {"n_heads": 16}, "d_model": 1024},
    "1.5b": {"n_layers": 48, "attention": {"n_heads": 25}, "d_model": 1600},
    "smoke": {"n_layers": 2, "attention": {"n_heads": 2}, "d_model": 32, "context_length": 64, "vocab_size": 128},
}
# The first batch size of the search.
FIRST_BATCH = {"124m": 32, "350m": 16, "1.5b": 8, "smoke": 1}
MAX_BATCH = 512
# The search continues while doubling the batch size multiplies the throughput by at least this factor.
GAIN = 1.02
MODULES = {"rustgpt_jax": "gpt2_jax", "PyTorch": "gpt2_torch"}
# Settings in decreasing order of memory for residuals.
SAVINGS: dict[str, tuple[Knobs, ...]] = {
    "rustgpt_jax": ({}, {"model.remat": "dots_no_batch"}, {"model.remat": "full"}),
    "PyTorch": ({}, {"remat": "full"}),
}
MEMORY_WORDS = ("RESOURCE_EXHAUSTED", "OutOfMemory", "out of memory", "Out of memory", "ALLOC_FAILED")
# Both frameworks may use nearly all memory of one device. Variables set by the user take precedence.
ENVIRONMENT = {
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.93",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "CUDA_VISIBLE_DEVICES": "0",
}


class Failure(Exception):
    """A failed measurement: the reason in one line, and whether memory was exhausted (is_memory)."""

    def __init__(self, reason: str) -> None:
        super().__init__(" ".join(reason.split())[:300])
        self.is_memory = any(word in reason for word in MEMORY_WORDS)


class Best(NamedTuple):
    """The batch size and knobs with the most tokens per second."""

    rate: float
    batch: int
    knobs: Knobs


def format_command(words: list[str]) -> str:
    """Return the command line to record with the results of a benchmark, without the folders of this machine."""
    script, *others = words
    kept = [word for word in others if not word.startswith("--out=")]
    for flag in ("--text=", "--rustgpt="):
        kept = [flag + Path(word.removeprefix(flag)).name if word.startswith(flag) else word for word in kept]
    return " ".join([f"python experiments/benchmarks/{Path(script).name}", *kept])


def make_tree(size: str) -> ConfigDict:
    """Return configs/gpt2_124m.py in another size, without gradient accumulation, with five steps per call."""
    tree = gpt2_124m.get_config()
    tree.model.update(SIZES[size])
    tree.training.grad_accum_steps = tree.training.batch_size = 1
    return tree


def make_config(size: str, knobs: Knobs | None = None) -> Config:
    """Return the resolved config of a size with the values at some dotted paths changed."""
    return resolve(make_tree(size), knobs or {})


def best_batch(rate: Callable[[int, Knobs], float], first: int, most: int, savings: Sequence[Knobs]) -> Best:
    """Search for the best batch size. `rate` returns tokens per second.

    Raises:
        Failure: Not even a batch of 1 fits, or `rate` failed for another reason before anything was measured.
    """
    best, batch, failure = Best(0.0, first, {}), first, None
    for knobs in savings:
        try:
            while batch <= most:
                now = Best(rate(batch, knobs), batch, knobs)
                gained = now.rate >= GAIN * best.rate
                best = max(best, now, key=lambda each: each.rate)
                if not gained:
                    return best
                batch *= 2
            return best
        except Failure as found:
            failure = found
            if not failure.is_memory:
                break
    if best.rate > 0:
        return best
    assert failure is not None, "savings is not empty, and only a failure leaves no result"
    if failure.is_memory and first > 1:
        return best_batch(rate, first // 2, first // 2, savings[-1:])
    raise failure


def run_task(module: str, request: dict[str, Any], patience: float, log: Path) -> Any:
    """Return a measurement made in a new process. Raises Failure; the log then has the output of the process."""
    command = [sys.executable, "-m", f"experiments.benchmarks.{module}", json.dumps(request)]
    environment = ENVIRONMENT | os.environ
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, errors="replace", timeout=patience
        )
    except subprocess.TimeoutExpired:
        raise Failure(f"it took more than {patience:.0f} seconds") from None
    try:
        reply = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        reply = {"error": f"its process ended with status {done.returncode}: {last}"}
    if "error" not in reply:
        return reply["result"]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ python -m {command[2]} '{command[3]}'\n{done.stderr}\n")
    raise Failure(reply["error"])


def serve_task(tasks: dict[str, Callable[..., Any]]) -> None:
    """Run the task that the command line names, and print its result as JSON."""
    request = json.loads(sys.argv[1])
    try:
        reply = {"result": tasks[request.pop("what")](**request)}
    except Exception as error:
        traceback.print_exc()
        reply = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(reply))


def main(size: str, framework: str) -> None:
    """Search for the best batch size, and print each measurement."""
    device = {"device": "cuda"} if framework == "PyTorch" else {}

    def rate(batch: int, knobs: Knobs) -> float:
        request = {"what": "training", "size": size, "batch": batch, "knobs": knobs, "repeats": 3} | device
        try:
            found = run_task(MODULES[framework], request, 900, Path("runs/best_batch.txt"))
        except Failure as failure:
            print(f"batch {batch} {knobs}: {failure}")
            raise
        tokens_per_second = found["tokens"] / sorted(found["seconds"])[1]
        print(f"batch {batch} {knobs}: {tokens_per_second:,.0f} tokens/s")
        return tokens_per_second

    print(best_batch(rate, FIRST_BATCH[size], MAX_BATCH, SAVINGS[framework]))


if __name__ == "__main__":
    main(*sys.argv[1:])
