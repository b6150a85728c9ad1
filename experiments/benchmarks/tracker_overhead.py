"""CPU time that trackers take from training steps of 5 ms.

python -m experiments.benchmarks.tracker_overhead [TRACKER ...]

A step is a pause of 5 ms, as the host has while a device computes, and logs 14 metrics every so many steps. For each
tracker, prints the CPU time per step that it adds to the thread that trains, and that of all other threads of the
process, without opening and closing the tracker. Weights & Biases is offline, and MLflow has a SQLite store.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

from rustgpt_jax.tracking.metric_writer import RunWriter, TrackedRun
from rustgpt_jax.tracking.trackers import open_trackers

STEP_SECONDS, N_STEPS, N_WARMUP_STEPS = 0.005, 2000, 200
LOG_EVERY = (10, 1)
METRICS = {f"train/metric_{index}": 1.0 / (index + 1) for index in range(14)}


def measure(names: list[str], log_every: int, folder: Path) -> tuple[float, float]:
    """Return the CPU seconds per step of this thread and of the others, with some trackers."""
    folder.mkdir()
    is_open: list[str] = []
    opened = open_trackers(names, TrackedRun(folder), is_open.append, sys.exit)
    with RunWriter(folder, 0, opened) as writer:
        writer.write(0, METRICS)
        while len(is_open) < len([name for name in names if name != "tensorboard"]):
            time.sleep(0.1)
        run_steps(writer, 0, N_WARMUP_STEPS, log_every)
        thread, process = time.thread_time(), time.process_time()
        run_steps(writer, N_WARMUP_STEPS, N_STEPS, log_every)
        thread, process = time.thread_time() - thread, time.process_time() - process
    return thread / N_STEPS, (process - thread) / N_STEPS


def run_steps(writer: RunWriter, first_step: int, n_steps: int, log_every: int) -> None:
    """Run steps that log their metrics."""
    for step in range(first_step + 1, first_step + n_steps + 1):
        time.sleep(STEP_SECONDS)
        if step % log_every == 0:
            writer.write(step, {"stage": "train", **METRICS})


def main() -> None:
    """Measure the trackers named as arguments, or all of them."""
    os.environ["WANDB_MODE"] = "offline"
    with tempfile.TemporaryDirectory() as temporary:
        os.chdir(temporary)
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{temporary}/mlflow.db"
        for log_every in LOG_EVERY:
            without = measure([], log_every, Path(temporary) / f"none_{log_every}")[0]
            for name in sys.argv[1:] or ("tensorboard", "wandb", "mlflow"):
                this, others = measure([name], log_every, Path(temporary) / f"{name}_{log_every}")
                seconds = this - without, others
                added = [f"{1e6 * each:.0f} us ({each / STEP_SECONDS:.2%} of a step)" for each in seconds]
                every = "every step" if log_every == 1 else f"every {log_every} steps"
                print(f"{name}, logging {every}: {added[0]} in the thread that trains, {added[1]} in others")


if __name__ == "__main__":
    main()
