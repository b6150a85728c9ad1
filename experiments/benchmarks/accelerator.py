"""How fast does this accelerator train and decode GPT-2, here and in PyTorch, and is what it computes right?

python experiments/benchmarks/accelerator.py

The most important measurements come first, and the run ends after --minutes (8 by default; all take about an hour).
First, with the smallest model: training here and in PyTorch at one batch size, decoding at batch 1, 16 small trials as
one program and sequentially, and whether a resumed run and a repeated run are bit-identical. Then everything else, one
size at a time. --only=training,torch,decoding,sweep,reproduction,checks and --sizes=124m,350m,1.5b select
parts, and --add merges them with earlier results:

training      GPT-2 with 124M, 350M and 1.5B parameters, sequences of 1024 tokens, bfloat16 over float32 parameters
torch         the same in PyTorch (`gpt2_torch.py`)
decoding      batches of 1, 8 and 64, with parameters in bfloat16, greedy, 128 tokens after a prompt of 128
sweep         16 small trials (configs/shakespeare_char.py) in one program, and run sequentially
reproduction  the state after ten steps: repeated in another process, and resumed from a checkpoint of the fifth
checks        values and gradients of every supported attention kernel, compared with reference attention in float32

The best batch size of each framework is searched for (see `best_batch.py`; every measurement runs in its own process),
and variants are measured at that batch size. Then the best settings of both frameworks are measured alternately,
PyTorch's also at our batch size. FLOPs are counted for the model, without recomputation but including masked attention
scores; peaks are from data sheets. The share of bandwidth in decoding assumes that each step reads all parameters and
the cached keys and values once. Times are medians, with the interquartile range in parentheses.

Each measurement is printed and appended to results.jsonl in --out as soon as it is made, and report.md there has all
tables so far; log.txt has the output of failed processes. The tables also list what ran out of memory, unsupported
kernels and a missing PyTorch; after any other failure the exit status is 1. --smoke runs everything with tiny models,
also on a CPU.

An image with JAX, Flax, Optax and Orbax lacks one required package, ml-collections, which needs no installation:

python -m pip download --no-deps --dest=wheels ml-collections
PYTHONPATH=$(echo wheels/ml_collections-*.whl) python experiments/benchmarks/accelerator.py

FINDING: no accelerator has been measured yet.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags
from ml_collections import ConfigDict
from rich.console import Console

# A script can import only its siblings by default.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.benchmarks.accelerator_report import (
    collect,
    decoding_share,
    format_knobs,
    fused_ratio,
    has_failed,
    is_reproduced,
    is_right,
    markdown,
    merge_rows,
    milliseconds,
    percent,
    read_rows,
    show,
    times,
    tokens_per_second,
    training_share,
)
from experiments.benchmarks.best_batch import (
    FIRST_BATCH,
    MAX_BATCH,
    MODULES,
    SAVINGS,
    Best,
    Failure,
    Knobs,
    best_batch,
    format_command,
    make_tree,
    run_task,
)
from rustgpt_jax.errors import UserError, suggest_names

FLAGS = flags.FLAGS
SECTIONS = ("training", "torch", "decoding", "sweep", "reproduction", "checks")
# No measurement begins with less time left.
LEAST_SECONDS = 10
# Variants that are measured at the best batch size.
VARIANTS: dict[str, tuple[Knobs, ...]] = {
    "rustgpt_jax": ({"model.scan_layers": False},),
    "PyTorch": ({"attention": "cudnn"},),
}


class Extent(NamedTuple):
    """The extent of the measurements.

    Attributes:
        sizes: The sizes of models to train.
        most_batch: The largest batch size to try in training.
        variants: Knobs to try at the best batch size, by framework.
        rounds: The number of times that the best settings of the frameworks alternate.
        repeats: The number of timings per process.
        decoded: The sizes of models to decode with.
        batches: The batch sizes to decode with.
        scan_layers: The values of `scan_layers` to decode with.
        prompt: The number of tokens in a prompt.
        new: The number of tokens to generate.
        trials: The number of trials in the sweep.
        trial_knobs: Knobs of these trials.
        reproduced_batch: The batch size of the run that is repeated and resumed.
    """

    sizes: tuple[str, ...]
    most_batch: int
    variants: dict[str, tuple[Knobs, ...]]
    rounds: int
    repeats: int
    decoded: tuple[str, ...]
    batches: tuple[int, ...]
    scan_layers: tuple[bool, ...]
    prompt: int
    new: int
    trials: int
    trial_knobs: Knobs
    reproduced_batch: int


FULL = Extent(
    sizes=("124m", "350m", "1.5b"),
    most_batch=MAX_BATCH,
    variants=VARIANTS,
    rounds=2,
    repeats=6,
    decoded=("124m", "1.5b"),
    batches=(1, 8, 64),
    scan_layers=(False, True),
    prompt=128,
    new=128,
    trials=16,
    trial_knobs={"training.steps_per_jit_call": 100},
    reproduced_batch=8,
)
SMOKE = Extent(
    sizes=("smoke",),
    most_batch=2,
    variants=dict.fromkeys(VARIANTS, ()),
    rounds=1,
    repeats=2,
    decoded=("smoke",),
    batches=(2,),
    scan_layers=(True,),
    prompt=8,
    new=8,
    trials=4,
    trial_knobs={"training.steps_per_jit_call": 2, "model.n_layers": 1, "model.d_model": 16},
    reproduced_batch=2,
)


def define_flags() -> None:
    """Define the flags of the command."""
    flags.DEFINE_list("only", list(SECTIONS), f"The parts to measure, some of {', '.join(SECTIONS)}.")
    flags.DEFINE_list("sizes", None, f"The sizes of models, some of {', '.join(FULL.sizes)}; all by default.")
    flags.DEFINE_string("out", "runs/accelerator", "The folder for everything that is written.")
    flags.DEFINE_bool("add", False, "Add to the results in results.jsonl in --out.")
    flags.DEFINE_float("minutes", 8, "The time limit of the whole run in minutes.", 0)
    flags.DEFINE_integer("patience", 150, "The time limit of a measurement in seconds.", 1)
    flags.DEFINE_bool("smoke", False, "Measure tiny models, also on a CPU, to check that everything works.")


def get_config() -> ConfigDict:
    """Return the config of the smallest model."""
    return make_tree("124m")


class TimeIsUp(Exception):
    """The time of the whole run is over."""


class Bench:
    """A runner of measurements that prints each one and appends it to results.jsonl."""

    def __init__(self, extent: Extent, sizes: Sequence[str], out: Path, console: Console) -> None:
        self.extent, self.sizes, self.out, self.console = extent, sizes, out, console
        self.deadline = time.monotonic() + 60 * FLAGS.minutes
        self.rows: list[dict[str, Any]] = []
        self.first_row = {
            "section": "machine",
            "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
            "command": format_command(sys.argv),
            **self.ask("gpt2_jax", "machine", sizes=list(sizes)),
        }
        self.platform = self.first_row["platform"]

    def begin(self, adds: bool) -> None:
        """Begin results.jsonl, or add to it. Raises UserError if its results are from another device."""
        file = self.out / "results.jsonl"
        if adds:
            self.rows = read_rows(file)
            kinds = collect(self.rows)["machine"]["kind"], self.first_row["kind"]
            if kinds[0] != kinds[1]:
                raise UserError(f"--add: {self.out} has been measured on {kinds[0]}, and this is {kinds[1]}.")
        else:
            file.unlink(missing_ok=True)
        self.keep(self.first_row)

    @property
    def results(self) -> dict[str, Any]:
        """Return the results so far."""
        return collect(self.rows)

    def ask(self, module: str, what: str, **arguments: Any) -> Any:
        """Return a measurement by another benchmark module. Raises Failure, or TimeIsUp."""
        left = self.deadline - time.monotonic()
        if left < LEAST_SECONDS:
            raise TimeIsUp
        try:
            return run_task(module, {"what": what} | arguments, min(FLAGS.patience, left), self.out / "log.txt")
        except Failure:
            if time.monotonic() >= self.deadline:
                raise TimeIsUp from None
            raise

    def attempt(self, name: str, ask: Callable[[], Any]) -> Any:
        """Return the result of `ask`; if it fails, record that and return None."""
        try:
            return ask()
        except Failure as failure:
            self.record_failure(name, str(failure), failure.is_memory)

    def record_failure(self, name: str, reason: str, is_expected: bool) -> None:
        """Print and record why something was not measured."""
        self.say(f"{name}: {reason}", "yellow" if is_expected else "red")
        self.keep({"section": "unmeasured", "what": name, "reason": reason, "is_expected": is_expected})

    def keep(self, row: dict[str, Any]) -> None:
        """Write a row, and the tables so far."""
        self.rows.append(row)
        self.out.mkdir(parents=True, exist_ok=True)
        with open(self.out / "results.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        (self.out / "report.md").write_text(markdown(self.results), encoding="utf-8")

    def say(self, text: str, style: str = "") -> None:
        """Print a line."""
        self.console.print(text, style=style, highlight=False, markup=False)

    def run(self, sections: Sequence[str]) -> None:
        """Measure some sections, the most important rows first. Raises TimeIsUp."""
        smallest = self.sizes[0]
        has_torch = "torch" in sections and self.has_torch()
        frameworks = ["rustgpt_jax"] * ("training" in sections) + ["PyTorch"] * has_torch
        for framework in frameworks:
            with suppress(Failure):
                self.train(framework, smallest, min(FIRST_BATCH[smallest], self.extent.most_batch), {})
        decodings = list(product(self.extent.batches, self.extent.scan_layers)) if "decoding" in sections else []
        for batch, scan_layers in decodings[:1]:
            self.decode(smallest, batch, scan_layers)
        if "sweep" in sections:
            self.sweep()
        if "reproduction" in sections:
            self.reproduce(smallest)
        for size in self.sizes:
            if "checks" in sections:
                self.check(size)
            self.compare(frameworks, size)
            if size in self.extent.decoded or self.sizes == [size]:
                for batch, scan_layers in decodings[size == smallest :]:
                    self.decode(size, batch, scan_layers)

    def check(self, size: str) -> None:
        """Check the attention kernels of models of a size."""
        name = f"kernels, {size}"
        if found := self.attempt(name, partial(self.ask, "gpt2_jax", "checks", size=size)):
            for row in found:
                self.keep({"section": "checks"} | row)
            verdicts = [
                f"{row['kernel']} {'right' if is_right(row) else 'WRONG'}" for row in found if "refuses" not in row
            ]
            self.say(f"{name}: {', '.join(verdicts)}")

    def compare(self, frameworks: Sequence[str], size: str) -> None:
        """Find the best settings of each framework, then measure these in turns.

        The second framework is also measured at the batch size of the first.
        """
        found: dict[str, Best] = {}
        for framework in frameworks:
            with suppress(Failure):
                found[framework] = self.search(framework, size)
        first = [best.batch for best in found.values()][:1]
        turns = [
            (framework, batch, best.knobs)
            for framework, best in found.items()
            for batch in dict.fromkeys([best.batch, *first])
        ]
        for framework, batch, knobs in turns * self.extent.rounds:
            with suppress(Failure):
                self.train(framework, size, batch, knobs)

    def search(self, framework: str, size: str) -> Best:
        """Return the best batch size and the best variant there. Raises Failure if nothing fits."""

        def rate(batch: int, knobs: Knobs) -> float:
            wanted = {"framework": framework, "size": size, "batch": batch, "knobs": knobs}
            known = (row for row in merge_rows(self.results["training"]) if wanted.items() <= row.items())
            return tokens_per_second(next(known, None) or self.train(framework, size, batch, knobs))

        best = best_batch(rate, FIRST_BATCH[size], self.extent.most_batch, SAVINGS[framework])
        for variant in self.extent.variants[framework]:
            with suppress(Failure):
                knobs = best.knobs | variant
                best = max(best, Best(rate(best.batch, knobs), best.batch, knobs), key=lambda each: each.rate)
        return best

    def train(self, framework: str, size: str, batch: int, knobs: Knobs) -> dict[str, Any]:
        """Measure training once and record the result. Raises Failure, which is recorded too."""
        row: dict[str, Any] = {"size": size, "batch": batch, "knobs": knobs}
        name = f"training {size}, {framework}, batch {batch} {format_knobs(knobs)}".strip()
        where = {"device": self.torch_device} if framework == "PyTorch" else {}
        try:
            found = self.ask(MODULES[framework], "training", repeats=self.extent.repeats, **row, **where)
        except Failure as failure:
            self.record_failure(name, str(failure), failure.is_memory)
            raise
        row |= {"section": "training", "framework": framework} | found
        self.keep(row)
        share = percent(training_share(self.results, row))
        self.say(f"{name}: {milliseconds(row['seconds'])} ms, {tokens_per_second(row):,.0f} tokens/s, {share} of peak")
        return row

    @property
    def torch_device(self) -> str:
        """Return PyTorch's name for the device of JAX."""
        return "cuda" if self.platform == "gpu" else "cpu"

    def has_torch(self) -> bool:
        """Return whether PyTorch can be measured; if not, print and record why."""
        if self.platform == "tpu":
            found = {"absent": "it is measured on GPUs, and this is a TPU"}
        else:
            found = self.attempt("PyTorch", partial(self.ask, "gpt2_torch", "machine", device=self.torch_device)) or {}
        self.keep({"section": "torch"} | found)
        if "absent" in found:
            self.say(f"PyTorch: {found['absent']}", "yellow")
        return bool(found) and "absent" not in found

    def decode(self, size: str, batch: int, scan_layers: bool) -> None:
        """Measure decoding with scanned or with unrolled layers."""
        extent, row = self.extent, {"size": size, "batch": batch, "scan_layers": scan_layers}
        lengths = {"prompt": extent.prompt, "new": extent.new, "repeats": extent.repeats}
        name = f"decoding {size}, batch {batch}, {'scanned' if scan_layers else 'unrolled'}"
        if found := self.attempt(name, partial(self.ask, "gpt2_jax", "decoding", **row, **lengths)):
            row |= {"section": "decoding"} | found
            self.keep(row)
            share = percent(decoding_share(self.results, row))
            self.say(f"{name}: {milliseconds(row['seconds'])} ms a token, {share} of bandwidth")

    def sweep(self) -> None:
        """Measure small trials in one program, and run sequentially."""
        extent = self.extent
        wanted = {"trials": extent.trials, "knobs": extent.trial_knobs, "repeats": extent.repeats}
        if found := self.attempt(f"{extent.trials} trials", partial(self.ask, "gpt2_jax", "sweep", **wanted)):
            self.keep({"section": "sweep"} | found)
            self.say(f"{extent.trials} trials: fused is {times(fused_ratio(found))} as fast as sequential")

    def reproduce(self, size: str) -> None:
        """Repeat a run in another process, and resume it there from its checkpoint."""
        row = {"size": size, "batch": self.extent.reproduced_batch}
        ask = partial(self.ask, "gpt2_jax", "reproduction", **row)
        with tempfile.TemporaryDirectory() as folder:
            name = f"reproduction {size}, batch {row['batch']}"
            first = self.attempt(name, partial(ask, folder=folder, resumes=False))
            again = first and self.attempt(name, partial(ask, folder=folder, resumes=True))
        if again:
            row |= {"section": "reproduction", "steps": first["steps"]}
            row |= {"repeated": again["whole"] == first["whole"], "resumed": again["resumed"] == first["whole"]}
            self.keep(row)
            self.say(f"{name}: {'bit-identical' if is_reproduced(row) else 'DIFFERENT'}")


def run(console: Console) -> int:
    """Run the measurements that the flags select, and return the exit status. Raises UserError for invalid flags."""
    extent, out = SMOKE if FLAGS.smoke else FULL, Path(FLAGS.out).absolute()
    sections, sizes = (
        check_names("only", FLAGS.only, SECTIONS),
        check_names("sizes", FLAGS.sizes or extent.sizes, extent.sizes),
    )
    earlier = out / "results.jsonl"
    if FLAGS.add and not earlier.exists():
        raise UserError(f"--add: there is no {earlier} to add to.")
    try:
        bench = Bench(extent, list(sizes), out, console)
    except Failure as failure:
        raise UserError(f"JAX cannot be used here: {failure}. {out / 'log.txt'} has its full output.") from None
    if bench.platform == "cpu" and not FLAGS.smoke:
        raise UserError("This needs an accelerator, and JAX finds only a CPU here; --smoke tries it with tiny models.")
    bench.begin(FLAGS.add)
    try:
        bench.run(sections)
    except TimeIsUp:
        bench.record_failure("the rest", f"the {FLAGS.minutes:g} minutes of --minutes are over", is_expected=True)
    show(bench.results, console)
    console.print(f"\nWritten to {out}", highlight=False)
    return int(has_failed(bench.results))


def check_names(flag: str, names: Sequence[str], every: Sequence[str]) -> Sequence[str]:
    """Return the names given by a flag. Raises UserError if one is unknown."""
    for name in names:
        if name not in every:
            raise UserError(f"--{flag}: unknown {name!r}.{suggest_names(name, every)}")
    return names


def main(argv: list[str]) -> int:
    """Run the benchmark; a user error prints one sentence and gives exit status 2."""
    del argv
    try:
        return run(Console(width=None if sys.stdout.isatty() else 160))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    define_flags()
    app.run(main)
