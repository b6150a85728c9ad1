"""How fast is this framework on this machine, compared with PyTorch, transformers, llama.cpp and RustGPT?

python experiments/benchmarks/run.py [training] [decoding] [startup] [sweeps] --text=tinyshakespeare.txt

All parts take about an hour on two cores, half of it for sweeps; without arguments, all are measured. Install the peers
with `pip install 'rustgpt_jax[bench]'`; missing ones are skipped with a message. Run nothing else at the same time.

training   a step, compared with the same model in PyTorch (`performance/training.py`); --shapes=shk,mid,124M selects
decoding   compared with transformers and llama.cpp with the same weights (`performance/decoding.py`)
startup    time to the first step, and RustGPT's whole job (`performance/startup.py`)
sweeps     many trials as one program (`sweep_throughput.py`); --sweep_models=tiny leaves out the slower model

Tables are printed; docs/performance.json has all measurements, and docs/performance.md is generated from it, with the
goals. Parts that are not measured keep their tables. --smoke runs everything with tiny models in --out.

FINDING: docs/performance.md has the tables and the goals.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict
from rich.console import Console

# A script can import only its siblings by default.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configs import tiny
from experiments.benchmarks import sweep_throughput
from experiments.benchmarks.accelerator_report import show_sheets
from experiments.benchmarks.best_batch import Failure, make_tree
from experiments.benchmarks.performance import decoding, page, startup, training
from experiments.benchmarks.performance.bench import FULL, TINY, Bench, Row, about, machine
from rustgpt_jax.errors import UserError, suggest_names

FLAGS = flags.FLAGS
# The number of `train` processes that are run, of the 16 that a sweep replaces.
PROCESSES = 4
CACHES = ("cold", "warm")
SWEEP_MODELS = ("tiny", "shakespeare_char")
SMOKE_TEXT = "Two households, both alike in dignity, in fair Verona, where we lay our scene.\n" * 200


def define_flags() -> None:
    """Define the flags of the command."""
    flags.DEFINE_string("text", None, "A text file for configs/shakespeare_char.py, such as tiny Shakespeare.")
    flags.DEFINE_string("rustgpt", None, "RustGPT's program, built from its source, to take turns with our job.")
    flags.DEFINE_list("shapes", None, f"The models to train, some of {', '.join(FULL.shapes)}; all by default.")
    flags.DEFINE_list("sweep_models", list(SWEEP_MODELS), f"The models to sweep, some of {', '.join(SWEEP_MODELS)}.")
    flags.DEFINE_string("out", "runs/benchmarks", "The folder for everything but the results.")
    flags.DEFINE_integer("rounds", None, "Turns of each contender in a race, instead of the default of the race.", 1)
    flags.DEFINE_integer("patience", 1800, "The time limit of a turn of a worker in seconds.", 1)
    flags.DEFINE_bool("smoke", False, "Measure tiny models, to check that everything works; results are kept in --out.")


def get_config() -> ConfigDict:
    """Return the config of the smallest model."""
    return make_tree("124m")


def sweeps(bench: Bench) -> Row:
    """Measure many trials as one program and as processes."""
    configs = {}
    if "tiny" in FLAGS.sweep_models:
        configs["tiny"] = tiny.get_config()
    if "shakespeare_char" in FLAGS.sweep_models and not FLAGS.smoke:
        configs["shakespeare_char"] = sweep_throughput.shakespeare(str(bench.needed_text()))
    found: dict[str, Any] = {"about": about(), "models": {}}
    for name, config in configs.items():
        folder = bench.out / "sweeps" / name
        shutil.rmtree(folder, ignore_errors=True)
        found["models"][name] = sweep_throughput.measure(name, config, folder, bench.console, PROCESSES, CACHES)
    return found


def run(parts: list[str], console: Console) -> int:
    """Measure parts, print their tables and save them. Raises UserError for an unknown part."""
    extent, out = TINY if FLAGS.smoke else FULL, Path(FLAGS.out).absolute()
    if FLAGS.rounds:
        extent = extent._replace(rounds=FLAGS.rounds, shapes=dict.fromkeys(extent.shapes, FLAGS.rounds))
    check_names(parts, page.PARTS, "Unknown part")
    shapes = FLAGS.shapes or list(extent.shapes)
    check_names(shapes, extent.shapes, "--shapes: unknown")
    check_names(FLAGS.sweep_models, SWEEP_MODELS, "--sweep_models: unknown")
    out.mkdir(parents=True, exist_ok=True)
    text, results, place = Path(FLAGS.text).absolute() if FLAGS.text else None, page.RESULTS, page.PAGE
    if FLAGS.smoke:
        text, results, place = out / "text.txt", out / "performance.json", out / "performance.md"
        text.write_text(SMOKE_TEXT)
        shutil.copy(page.PAGE, place)
    every: Row = page.read(results)
    # The tables of other processors are kept.
    found: Row = every.setdefault(machine()["processor"], {})
    rustgpt = Path(FLAGS.rustgpt).absolute() if FLAGS.rustgpt else None
    if rustgpt is not None and not rustgpt.is_file():
        raise UserError(f"--rustgpt: there is no file {rustgpt}.")
    bench = Bench(extent, text, out, FLAGS.patience, console, rustgpt)
    if {"training", "startup", "sweeps"} & set(parts):
        bench.needed_text()
    for part in parts:
        match part:
            case "training":
                found[part] = training.measure(bench, shapes, found.get(part, {}))
            case "decoding":
                found[part] = decoding.measure(bench)
            case "startup":
                found[part] = startup.measure(bench)
            case _:
                found[part] = sweeps(bench)
        results.write_text(json.dumps(every, indent=1) + "\n", encoding="utf-8")
        page.draw(every, place)
    for part in parts:
        show_sheets(page.sheets(part, found[part]), console)
    show_sheets({"Goals": page.goals_table(every)}, console)
    console.print(f"\nWritten to {place} and {results}", highlight=False, soft_wrap=True)
    return 0


def check_names(names: list[str], every: Any, saying: str) -> None:
    """Check names. Raises UserError if one is unknown."""
    for name in names:
        if name not in every:
            raise UserError(f"{saying} {name!r}.{suggest_names(name, every)}")


def main(argv: list[str]) -> int:
    """Run the benchmark; a user error prints one sentence and gives exit status 2."""
    try:
        return run(argv[1:] or list(page.PARTS), Console(width=None if sys.stdout.isatty() else 160))
    except (UserError, Failure) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    define_flags()
    app.run(main)
