"""How fast is a training step, beside that of the same model in PyTorch, and what does the framework add to its own?

python experiments/benchmarks/run.py training --text=tinyshakespeare.txt

A step is forward, backward, clipping and AdamW, on random tokens that lie ready. Each contender is a process of its own
with the settings of the allocator that serve it best. Those of a race take turns: all that compute in float32 or say
that they round the factors of products only; all that compute in bfloat16, and the fastest that rounds factors. Then a
whole run of configs/shakespeare_char.py, with its data, metrics, evaluations and checkpoints, beside its bare compiled
steps.

FINDING: none of its own; see `run.py`.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from ml_collections import ConfigDict

from experiments.benchmarks.best_batch import ROOT, Failure, tree_of
from experiments.benchmarks.performance.bench import Bench, Row, about, columns_of, told
from experiments.benchmarks.performance.models import TRAINING
from experiments.benchmarks.performance.turns import Reading, take_turns
from experiments.benchmarks.performance.workers import Request, Worker
from experiments.benchmarks.sweep_throughput import write_config
from rustgpt_jax.tracking.metric_writer import read_metrics

# Which of our ways run against PyTorch in which type.
RACES = {"float32": ("float32", "bfloat16 factors"), "bfloat16": ("bfloat16 factors", "bfloat16")}
# Steps of a run that are not counted: the first calls compile, and take one step each.
FIRST_STEPS = 60


def get_config() -> ConfigDict:
    """The smallest of the models."""
    return tree_of("124m")


def measure(bench: Bench, shapes: list[str], earlier: Row) -> Row:
    """The races of some shapes, put beside what is known of others, and the framework's own step."""
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
    """Who takes part in a race."""
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
    """Seconds of a step of whole runs, as their metrics say, and of the bare steps of such a run, in turns."""
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
    found = {name: columns_of(rows)["seconds"] for name, rows in readings.items()}
    for name, seconds in found.items():
        bench.say(f"  {name}: {told(seconds)} s a step")
    return {"readings": found, "absent": absent}


def run_once(folder: Path, name: str, config: ConfigDict) -> float:
    """Seconds of a step in a run, on average over all calls but the first. Raises Failure."""
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
