"""How much faster is a sweep of 16 trials as one program than as 16 processes, and what does an additional trial cost?

python -m experiments.benchmarks.sweep_throughput --text=tinyshakespeare.txt --out=runs/sweep_throughput

Four learning rates with four seeds of configs/tiny.py (100 steps), and of configs/shakespeare_char.py cut to 200 steps:
as one sweep (exact, with one core per trial; fused; worker processes), and as consecutive `train` processes with an
empty compilation cache, with a full one, and two at a time. Whole commands are timed from start to exit, including run
folders, evaluations and checkpoints. Each kind of sweep runs with an empty and with a full cache, and also with four
trials, which gives the cost of an additional one. With `--processes` below 16, fewer `train` processes are timed and
scaled up. The bare steps are the compiled training steps of one trial alone, on all cores, timed in a separate process.

FINDING (2 vCPU AMD EPYC, JAX 0.10.2; the tables are in docs/performance.md): with empty caches, tiny takes 23 s as one
sweep and 138 s as 16 processes, 6.0 times as long; shakespeare_char 191 s (152 s with worker processes) and 366 s.
A sweep with an empty cache is faster than processes even with full caches (tiny 40 s, shakespeare_char 204 s). An
additional trial costs 1.20 of its bare steps for tiny (1.08 with workers) and 0.90 (0.66) for shakespeare_char.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from configs import shakespeare_char, tiny
from rustgpt_jax.sweeps import Overrides, product, seeds, values
from rustgpt_jax.sweeps.trials import Trial, make_trials

FLAGS = flags.FLAGS
ROOT = Path(__file__).parent.parent.parent
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
SEEDS = 4
PROFILES = {
    "exact, a trial a core": ("--mode=exact",),
    "fused, 8 trials a core": ("--mode=fused",),
    "a worker process a core": ("--launcher=processes",),
}


def define_flags() -> None:
    """Define the flags of the command."""
    flags.DEFINE_string("text", None, "The text file for shakespeare_char.", required=True)
    flags.DEFINE_string("out", "runs/sweep_throughput", "The folder for everything that is written.")
    flags.DEFINE_integer("processes", 16, "The number of train processes to time, of 16.", 2)
    flags.DEFINE_list("caches", ["cold", "warm"], "The states of the compilation cache to run the sweeps with.")
    flags.DEFINE_list("models", ["tiny", "shakespeare_char"], "The configs to measure.")


def get_config() -> ConfigDict:
    """Return the smaller config."""
    return tiny.get_config()


def shakespeare(text: str) -> ConfigDict:
    """Return the larger config: nanoGPT's small recipe for 200 steps."""
    config = shakespeare_char.get_config()
    config.data.paths = (str(Path(text).absolute()),)
    config.training.steps = 200
    config.logging.sample_prompts = ()
    config.logging.eval_every = config.logging.checkpoint_every = 200
    config.logging.eval_batches = 20
    return config


def sweep() -> list[Overrides]:
    """Return sixteen trials of one shape class."""
    return product(values("optimizer.learning_rate", *RATES), seeds(SEEDS))


def sweep_few() -> list[Overrides]:
    """Return four of the sixteen trials; the time that the other twelve add gives the cost of an additional trial."""
    return sweep()[:SEEDS]


def write_config(config: ConfigDict, file: Path) -> None:
    """Write a config file with a config and the sweep of this benchmark."""
    file.write_text(
        "from ml_collections import ConfigDict\n"
        "from experiments.benchmarks.sweep_throughput import sweep, sweep_few\n\n"
        f"def get_config():\n    return ConfigDict({config.to_dict()!r})\n"
    )


class Bench:
    """Timings of one model, in its own folder with its own compilation caches."""

    def __init__(self, name: str, config: ConfigDict, out: Path) -> None:
        self.out, self.config, self.file = out, config, out / f"{name}.py"
        self.trials: list[Trial] = make_trials(config, sweep())
        out.mkdir(parents=True)
        write_config(config, self.file)
        # The first command builds the token store and fills the warm cache.
        self.train(self.trials[0], "first", "warm")

    def command(self, *words: str, cache: str) -> float:
        """Return the seconds that a command takes with a compilation cache given by name."""
        environment = os.environ | {
            "RUSTGPT_JAX_CACHE": str(self.out / "cache"),
            "JAX_COMPILATION_CACHE_DIR": str(self.out / "programs" / cache),
            "PYTHONPATH": str(ROOT),
        }
        began = time.perf_counter()
        done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{words} failed: {done.stderr[-2000:]}")
        self.output = done.stdout
        return time.perf_counter() - began

    def sweep(self, profile: str, kind: str, name: str = "sweep") -> float:
        """Return the seconds of a whole sweep; the cold one fills the cache for the warm one."""
        folder = self.out / f"{name}_{profile}_{kind}"
        words = ["launch.py", "sweep", f"--config={self.file}", f"--sweep={name}", f"--run={folder}"]
        return self.command(*words, *PROFILES[profile], cache=f"{name}_{profile}")

    def train(self, trial: Trial, folder: str, cache: str) -> float:
        """Return the seconds of one `train` process."""
        knobs = [f"--config.{path}={value}" for path, value in trial.overrides.items()]
        words = ["launch.py", "train", f"--config={self.file}", f"--run={self.out / folder / trial.id}"]
        return self.command(*words, *knobs, cache=cache)

    def processes(self, n: int, cold: bool, at_once: int) -> float:
        """Return the seconds of 16 `train` processes, `at_once` in parallel, extrapolated from n of them."""
        kind = f"{'cold' if cold else 'warm'}_{at_once}"
        caches = [f"{kind}_{index}" if cold else "warm" for index in range(n)]
        began = time.perf_counter()
        with ThreadPoolExecutor(at_once) as pool:
            list(pool.map(self.train, self.trials[:n], [kind] * n, caches))
        return (time.perf_counter() - began) * len(self.trials) / n

    def bare_steps(self) -> float:
        """Return the seconds of the compiled steps of one trial in a separate process: the minimum of three runs."""
        self.command("-m", "experiments.benchmarks.bare_steps", str(self.file), cache="warm")
        return float(json.loads(self.output.splitlines()[-1]))


def measure(
    name: str, config: ConfigDict, out: Path, console: Console, n: int, caches: Sequence[str]
) -> dict[str, Any]:
    """Time everything for one config, with n `train` processes, and print a table.

    Returns:
        bare: The seconds of the bare steps of a trial.
        rows: Pairs of a label and seconds.
        more: The seconds of an additional trial, by profile.
        processes: n.
    """
    bench = Bench(name, config, out)
    bare = bench.bare_steps()
    rows: list[tuple[str, float]] = []
    more_of: dict[str, float] = {}

    def add(label: str, seconds: float) -> None:
        rows.append((label, seconds))
        console.print(f"{name}: {label}: {seconds:.1f} s", highlight=False)

    for profile in PROFILES:
        for kind in caches:
            add(f"one sweep, {profile}, {kind} cache", bench.sweep(profile, kind))
        added = rows[-len(caches)][1] - bench.sweep(profile, caches[0], "few")
        more = more_of[profile] = added / (len(bench.trials) - SEEDS)
        console.print(f"{name}: one more trial, {profile}: {more:.2f} s, {more / bare:.2f} of its bare steps")
    for cold, at_once in ((True, 1), (False, 1), (True, 2), (False, 2)):
        kind = f"{'cold' if cold else 'warm'} cache, {'one at a time' if at_once == 1 else 'two at a time'}"
        add(f"16 train processes, {kind}", bench.processes(n, cold, at_once))
    best = min(seconds for label, seconds in rows if "processes," in label)
    table = Table("16 trials of " + name, "seconds", "per trial", "in bare steps", "against cold processes", box=None)
    cold = next(seconds for label, seconds in rows if label.startswith("16 train processes, cold"))
    for label, seconds in rows:
        trial = seconds / 16
        table.add_row(label, f"{seconds:.1f}", f"{trial:.2f}", f"{trial / bare:.2f}", f"{cold / seconds:.1f}x")
    console.print(table)
    console.print(f"bare steps of one trial: {bare:.2f} s; best of the alternatives: {best:.1f} s", highlight=False)
    return {"bare": bare, "rows": rows, "more": more_of, "processes": n}


def main(argv: list[str]) -> None:
    """Measure both configs."""
    del argv
    console, out = Console(width=120), Path(FLAGS.out).absolute()
    shutil.rmtree(out, ignore_errors=True)
    configs = {"tiny": tiny.get_config(), "shakespeare_char": shakespeare(FLAGS.text)}
    for name in FLAGS.models:
        measure(name, configs[name], out / name, console, FLAGS.processes, FLAGS.caches)


if __name__ == "__main__":
    define_flags()
    app.run(main)
