"""How fast does this accelerator train and decode GPT-2, here and in PyTorch, and is what it computes right?

python experiments/benchmarks/accelerator.py

A full run takes about an hour on one H100. --only=checks,training,torch,decoding,sweep and --sizes=124m,350m,1.5b
select parts, and --add merges them with earlier results:

checks     values and gradients of every supported attention kernel, compared with reference attention in float32
training   GPT-2 with 124M, 350M and 1.5B parameters, sequences of 1024 tokens, bfloat16 over float32 parameters, AdamW
torch      the same in PyTorch (`gpt2_torch.py`)
decoding   batches of 1, 8 and 64, with parameters in bfloat16, greedy, 128 tokens after a prompt of 128
sweep      16 small trials (configs/shakespeare_char.py) in one program, and run sequentially

The best batch size of each framework is searched for (see `best_batch.py`; every measurement runs in its own process),
and variants are measured at that batch size. Then the best settings of both frameworks are measured alternately,
PyTorch's also at our batch size. FLOPs are counted for the model, without recomputation but including masked attention
scores; peaks are from data sheets. The share of bandwidth in decoding assumes that each step reads all parameters and
the cached keys and values once. Times are medians, with the interquartile range in parentheses.

Tables are printed, and written with all measurements to report.md and results.json in --out; log.txt has the output of
failed processes. The tables also list what ran out of memory, unsupported kernels and a missing PyTorch; after any
other failure the exit status is 1. --smoke runs everything with tiny models, also on a CPU.

FINDING: no accelerator has been measured yet.
"""

import json
import sys
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
    format_knobs,
    has_failed,
    markdown,
    percent,
    show,
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
SECTIONS = ("checks", "training", "torch", "decoding", "sweep")
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
)


def define_flags() -> None:
    """Define the flags of the command."""
    flags.DEFINE_list("only", list(SECTIONS), f"The parts to measure, some of {', '.join(SECTIONS)}.")
    flags.DEFINE_list("sizes", None, f"The sizes of models, some of {', '.join(FULL.sizes)}; all by default.")
    flags.DEFINE_string("out", "runs/accelerator", "The folder for everything that is written.")
    flags.DEFINE_bool("add", False, "Add to the results in results.json in --out.")
    flags.DEFINE_integer("patience", 900, "The time limit of a measurement in seconds.", 1)
    flags.DEFINE_bool("smoke", False, "Measure tiny models, also on a CPU, to check that everything works.")


def get_config() -> ConfigDict:
    """Return the config of the smallest model."""
    return make_tree("124m")


class Bench:
    """A runner of measurements that prints results and stores them in `results` and on disk."""

    def __init__(self, extent: Extent, sizes: Sequence[str], out: Path, patience: float, console: Console) -> None:
        self.extent, self.sizes, self.out, self.patience, self.console = extent, sizes, out, patience, console
        self.results: dict[str, Any] = {
            "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
            "command": format_command(sys.argv),
            "machine": self.ask("gpt2_jax", "machine", sizes=list(sizes)),
            "torch": None,
        }
        self.results |= {name: [] for name in ("checks", "training", "decoding", "sweep", "unmeasured")}

    def add(self, earlier: dict[str, Any]) -> None:
        """Add earlier results. Raises UserError if they are from another device."""
        kinds = [results["machine"]["kind"] for results in (earlier, self.results)]
        if kinds[0] != kinds[1]:
            raise UserError(f"--add: {self.out} has been measured on {kinds[0]}, and this is {kinds[1]}.")
        self.results["machine"]["costs"] = earlier["machine"]["costs"] | self.results["machine"]["costs"]
        self.results["torch"] = earlier["torch"]
        self.results |= {name: found for name, found in earlier.items() if isinstance(found, list)}

    def ask(self, module: str, what: str, **arguments: Any) -> Any:
        """Return a measurement by another benchmark module. Raises Failure."""
        return run_task(module, {"what": what} | arguments, self.patience, self.out / "log.txt")

    def attempt(self, name: str, ask: Callable[[], Any]) -> Any:
        """Return the result of `ask`; if it fails, record that and return None."""
        try:
            found = ask()
            self.say(f"measured: {name}")
            return found
        except Failure as failure:
            self.record_failure(name, failure)

    def record_failure(self, name: str, failure: Failure) -> None:
        """Print and record why something was not measured."""
        self.say(f"{name}: {failure}", "yellow" if failure.is_memory else "red")
        self.results["unmeasured"].append({"what": name, "reason": str(failure), "is_expected": failure.is_memory})
        self.save()

    def keep(self, section: str, rows: list[dict[str, Any]]) -> None:
        """Add rows to a section of the results."""
        self.results[section] += rows
        self.save()

    def save(self) -> None:
        """Write the results so far."""
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "results.json").write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")

    def say(self, text: str, style: str = "") -> None:
        """Print a line."""
        self.console.print(text, style=style, highlight=False, markup=False)

    def checks(self) -> None:
        """Check the attention kernels of models of each size."""
        for size in self.sizes:
            found = self.attempt(f"kernels, {size}", partial(self.ask, "gpt2_jax", "checks", size=size))
            self.keep("checks", found or [])

    def training(self, frameworks: Sequence[str]) -> None:
        """Find the best settings of each framework, then measure these in turns.

        The second framework is also measured at the batch size of the first.
        """
        for size in self.sizes:
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
            return tokens_per_second(self.train(framework, size, batch, knobs))

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
            self.record_failure(name, failure)
            raise
        row |= {"framework": framework} | found
        self.keep("training", [row])
        self.say(
            f"{name}: {tokens_per_second(row):,.0f} tokens/s, {percent(training_share(self.results, row))} of peak"
        )
        return row

    @property
    def torch_device(self) -> str:
        """Return PyTorch's name for the device of JAX."""
        return "cuda" if self.results["machine"]["platform"] == "gpu" else "cpu"

    def has_torch(self) -> bool:
        """Return whether PyTorch can be measured; if not, print and record why."""
        if self.results["machine"]["platform"] == "tpu":
            found = {"absent": "it is measured on GPUs, and this is a TPU"}
        else:
            found = self.attempt("PyTorch", partial(self.ask, "gpt2_torch", "machine", device=self.torch_device)) or {}
        self.results["torch"] = found
        if "absent" in found:
            self.say(f"PyTorch: {found['absent']}", "yellow")
        return bool(found) and "absent" not in found

    def decoding(self) -> None:
        """Measure decoding with scanned and with unrolled layers."""
        extent = self.extent
        sizes = [size for size in self.sizes if size in extent.decoded] or self.sizes
        lengths = {"prompt": extent.prompt, "new": extent.new, "repeats": extent.repeats}
        for size, batch, scan_layers in product(sizes, extent.batches, extent.scan_layers):
            row = {"size": size, "batch": batch, "scan_layers": scan_layers}
            name = f"decoding {size}, batch {batch}, {'scanned' if scan_layers else 'unrolled'}"
            found = self.attempt(name, partial(self.ask, "gpt2_jax", "decoding", **row, **lengths))
            self.keep("decoding", [row | found] if found else [])

    def sweep(self) -> None:
        """Measure small trials in one program, and run sequentially."""
        extent = self.extent
        wanted = {"trials": extent.trials, "knobs": extent.trial_knobs, "repeats": extent.repeats}
        found = self.attempt(f"{extent.trials} trials", partial(self.ask, "gpt2_jax", "sweep", **wanted))
        self.keep("sweep", [found] if found else [])


def run(console: Console) -> int:
    """Run the measurements that the flags select, and return the exit status. Raises UserError for invalid flags."""
    extent, out = SMOKE if FLAGS.smoke else FULL, Path(FLAGS.out).absolute()
    sections, sizes = (
        check_names("only", FLAGS.only, SECTIONS),
        check_names("sizes", FLAGS.sizes or extent.sizes, extent.sizes),
    )
    earlier = out / "results.json"
    if FLAGS.add and not earlier.exists():
        raise UserError(f"--add: there is no {earlier} to add to.")
    try:
        bench = Bench(extent, sizes, out, FLAGS.patience, console)
    except Failure as failure:
        raise UserError(f"JAX cannot be used here: {failure}. {out / 'log.txt'} has its full output.") from None
    if bench.results["machine"]["platform"] == "cpu" and not FLAGS.smoke:
        raise UserError("This needs an accelerator, and JAX finds only a CPU here; --smoke tries it with tiny models.")
    if FLAGS.add:
        bench.add(json.loads(earlier.read_text(encoding="utf-8")))
    if "checks" in sections:
        bench.checks()
    has_torch = "torch" in sections and bench.has_torch()
    bench.training(["rustgpt_jax"] * ("training" in sections) + ["PyTorch"] * has_torch)
    if "decoding" in sections:
        bench.decoding()
    if "sweep" in sections:
        bench.sweep()
    bench.save()
    (out / "report.md").write_text(markdown(bench.results), encoding="utf-8")
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
