"""Training benchmark: steps against PyTorch, and the overhead of a whole run.

python experiments/benchmarks/run.py training --text=tinyshakespeare.txt

A step is forward, backward, clipping and AdamW, on random tokens in memory. Each contender runs in its own process with
the allocator settings that are fastest for it. There are two races: all contenders that compute in float32 or round
only the operands of products; and all that compute in bfloat16, with the fastest that rounds operands. Then a whole run
of configs/shakespeare_char.py, with data, metrics, evaluations and checkpoints, is compared with its bare compiled
steps.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from ml_collections import ConfigDict

from experiments.benchmarks.best_batch import ROOT, Failure
from experiments.benchmarks.performance.bench import Bench, Row, about, format_median, to_columns
from experiments.benchmarks.performance.models import TRAINING
from experiments.benchmarks.performance.turns import Reading, take_turns
from experiments.benchmarks.performance.workers import Request, Worker
from experiments.benchmarks.sweep_throughput import write_config
from rustgpt_jax.tracking.metric_writer import read_metrics

# Our variants in the race with each dtype of PyTorch.
RACES = {"float32": ("float32", "bfloat16 factors"), "bfloat16": ("bfloat16 factors", "bfloat16")}
# Warm-up steps of a run: the first calls compile and take one step each.
FIRST_STEPS = 60


def measure(bench: Bench, shapes: list[str], earlier: Row) -> Row:
    """Measure the races of some shapes, added to earlier ones, and the framework's own step."""
    found: Row = {
        "about": about("torch"),
        "peaks": bench.peaks(),
        "costs": earlier.get("costs", {}) | {shape: bench.ask("ours", "cost", shape=shape) for shape in shapes},
        "races": dict(earlier.get("races", {})),
    }
    for shape in shapes:
        for against in bench.extent.races:
            title = f"{shape}, {against}"
            found["races"][title] = bench.race(contenders(shape, against, bench), bench.extent.shapes[shape], title)
    return found | {"whole": whole_run(bench)}


def contenders(shape: str, against: str, bench: Bench) -> dict[str, Request]:
    """Return the contenders of a race."""
    ours = {
        f"rustgpt_jax, {name}": Request("ours", "training", {"shape": shape, "knobs": TRAINING[name]})
        for name in RACES[against]
    }
    theirs = {
        f"{name}, {against}": Request(
            "torch_peer", "training", {"shape": shape, "dtype": against, "compiled": compiled}
        )
        for name, compiled in (("torch eager", False), ("torch.compile", True))
        if bench.extent.compiled or not compiled
    }
    return ours | theirs


def whole_run(bench: Bench) -> Row:
    """Measure, in turns, the seconds per step of whole runs by their metrics, and of the bare steps of such a run."""
    folder = bench.out / "whole"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = bench.shakespeare(bench.extent.train_steps, bench.extent.train_steps // 3)
    write_config(config, folder / "config.py")
    n_runs = 0

    def train() -> Reading:
        nonlocal n_runs
        n_runs += 1
        return {"seconds": run_once(folder, f"run_{n_runs}", config)}

    rounds = min(3, bench.extent.rounds)
    bench.say("a whole run, and its bare steps")
    with Worker(Request("ours", "bare", {"config": str(folder / "config.py")}), bench.patience, bench.log) as worker:
        readings, absent = take_turns({"whole": train, "bare": worker.turn}, rounds)
    found = {name: to_columns(rows)["seconds"] for name, rows in readings.items()}
    for name, seconds in found.items():
        bench.say(f"  {name}: {format_median(seconds)} s a step")
    return {"readings": found, "absent": absent}


def run_once(folder: Path, name: str, config: ConfigDict) -> float:
    """Return the average seconds per step of a run, without the first calls. Raises Failure."""
    command = [sys.executable, "launch.py", "train", f"--config={folder / 'config.py'}", f"--run={folder / name}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise Failure(done.stderr.strip().splitlines()[-1])
    tokens = config.training.batch_size * config.model.context_length
    rates = [
        line["train/tokens_per_second"]
        for line in read_metrics(folder / name)
        if "train/tokens_per_second" in line and line["step"] > min(FIRST_STEPS, config.training.steps // 2)
    ]
    return sum(tokens / rate for rate in rates) / len(rates)
