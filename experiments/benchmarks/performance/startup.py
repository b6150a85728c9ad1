"""Startup benchmark: time to the first training step, and RustGPT's whole training job.

python experiments/benchmarks/run.py startup --text=tinyshakespeare.txt

Startup: `launch.py train --config=configs/shakespeare_char.py` until the first line of metrics.jsonl is written, with
empty and then with full caches. Each start creates a new run.

Job: RustGPT (github.com/tekaratzas/RustGPT) trains three blocks of one head, 128 wide with 256 hidden channels, on 25
facts for 100 epochs and on 53 dialogues for 100 more, one text per update: 7,800 updates. Ours has the same sizes (plus
an output projection of attention) and number of updates, each on a sequence of 32 tokens, which fits any of RustGPT's
texts. With --rustgpt=PROGRAM, its own program (`cargo build --release`) takes turns with our command; it is run in the
folder that has its `data`, and does the same job when its input is empty.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from ml_collections import ConfigDict

from configs import rustgpt
from experiments.benchmarks.best_batch import ROOT, Failure
from experiments.benchmarks.performance.bench import Bench, Row, about
from experiments.benchmarks.performance.workers import Request
from experiments.benchmarks.sweep_throughput import write_config

# The polling interval of the metrics of a run.
LOOK_SECONDS = 0.003
START_STEPS = 40


def job(steps: tuple[int, int]) -> ConfigDict:
    """Return the config of RustGPT's job, given the numbers of updates on facts and on dialogues."""
    config = rustgpt.get_config()
    config.data.seq_len = 32
    config.model.update(
        {
            "vocab_size": 533,
            "context_length": 80,
            "n_layers": 3,
            "d_model": 128,
            "attention": {"n_heads": 1},
            "d_ff": 256,
        }
    )
    config.model.update({"feedforwards": ("relu",), "positions": ("learned",), "norm": "layernorm", "bias": True})
    config.model.update({"tie_embeddings": False, "scan_layers": False, "norm_eps": 1e-5})
    config.optimizer.update({"name": "adam", "learning_rate": 5e-4, "b2": 0.999, "weight_decay": 0.0, "clip_norm": 5.0})
    config.schedule.update({"name": "constant", "warmup_steps": 0})
    config.training.batch_size, config.training.steps_per_jit_call = 1, 100
    config.tokenizer.vocab_size = 533
    config.logging.update({"log_every": 100, "eval_every": sum(steps), "checkpoint_every": sum(steps)})
    config.logging.sample_prompts = ()
    facts, dialogues = {"corpus": "facts", "max_documents": 25}, {"corpus": "chat", "max_documents": 53}
    config.stages = (
        {"name": "pretrain", "data": facts, "training": {"steps": steps[0]}},
        {"name": "instruct", "data": dialogues, "training": {"steps": steps[1]}},
    )
    return config


def measure(bench: Bench) -> Row:
    """Measure startup and the job."""
    folder = bench.out / "startup"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_config(bench.shakespeare(START_STEPS, START_STEPS), folder / "start.py")
    write_config(job(bench.extent.job_steps), folder / "job.py")
    found: Row = {
        "about": about(),
        "starts": [started(bench, folder, "start", turn) for turn in range(1 + bench.extent.rounds)],
        "jobs": [],
        "rustgpt": [],
    }
    try:
        for turn in range(1 + min(3, bench.extent.rounds)):
            found["jobs"].append(started(bench, folder, "job", turn))
            if bench.rustgpt is not None:
                found["rustgpt"].append(run_rustgpt(bench.rustgpt, bench))
    except Failure as failure:
        found |= {"jobs": [], "job fails": str(failure)}
    request = {"job": Request("ours", "bare", {"config": str(folder / "job.py")})}
    found["job's bare steps"] = bench.race(request, min(3, bench.extent.rounds), "the job's bare steps")
    found["updates"] = sum(bench.extent.job_steps)
    return found


def run_rustgpt(program: Path, bench: Bench) -> float:
    """Return the seconds of RustGPT's program, run in the nearest folder above it that has its data."""
    folder = next((above for above in program.parents if (above / "data").is_dir()), program.parent)
    began = time.perf_counter()
    try:
        done = subprocess.run(
            [program], cwd=folder, input="exit\n", capture_output=True, text=True, timeout=bench.patience
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Failure(f"{program}: {error}") from None
    if done.returncode:
        raise Failure(f"{program}: {done.stderr.strip()[-200:]}")
    taken = time.perf_counter() - began
    bench.say(f"RustGPT's program: {taken:.2f} s in all")
    return taken


def started(bench: Bench, folder: Path, name: str, turn: int) -> Row:
    """Return the seconds of a training command until its first step and until its end.

    The first command has empty caches. `parts` is the startup breakdown that the command prints, if any.
    """
    run, caches = folder / f"{name}_{turn}", folder / "caches"
    settings = os.environ | {"RUSTGPT_JAX_CACHE": str(caches)}
    settings.pop("JAX_COMPILATION_CACHE_DIR", None)
    command = [sys.executable, "launch.py", "train", f"--config={folder / name}.py", f"--run={run}"]
    metrics, said = run / "metrics.jsonl", folder / f"{run.name}.txt"
    began = time.perf_counter()
    with (
        said.open("w") as output,
        subprocess.Popen(command, cwd=ROOT, env=settings, stdout=output, stderr=output) as ran,
    ):
        while ran.poll() is None and not (metrics.exists() and metrics.stat().st_size):
            time.sleep(LOOK_SECONDS)
        first = time.perf_counter() - began
        try:
            status = ran.wait(timeout=bench.patience)
        except subprocess.TimeoutExpired:
            ran.kill()
            raise Failure(f"{' '.join(command)} took more than {bench.patience:.0f} seconds") from None
        if status:
            raise Failure(f"{' '.join(command)}: {said.read_text().strip().splitlines()[-1]}")
    taken = time.perf_counter() - began
    bench.say(f"{run.name}: {first:.2f} s until the first step, {taken:.2f} s in all")
    return {"first step": first, "all": taken, "parts": parts(said.read_text())}


def parts(said: str) -> str | None:
    """Parse the startup breakdown in the output of a training command."""
    found = re.search(r"^.*(first step|before the first).*$", said, re.MULTILINE | re.IGNORECASE)
    return found[0].strip() if found else None
