"""How fast does this accelerator train and decode GPT-2, here and in PyTorch, and is what it computes right?

python experiments/benchmarks/accelerator.py

It takes about an hour on one H100, and less with --only=checks,training,decoding,torch,sweep and --sizes=124m,350m,1.5b:

checks     every attention kernel that does not refuse, in value and gradient, against plain attention in float32
training   GPT-2 with 124M, 350M and 1.5B parameters, windows of 1024 tokens, bfloat16 over float32 parameters, AdamW
torch      the same in PyTorch (`gpt2_torch.py`): the best batch is searched likewise, and then the two take turns
decoding   batches of 1, 8 and 64, with parameters in bfloat16, greedy, 128 tokens after 128
sweep      16 small trials (configs/shakespeare_char.py) in one program, and the same one after another

Every measurement is a process of its own: none holds memory that another lacks, its peak of memory is its own, and
one that fails leaves the others alone. The best batch is doubled until it no longer fits, or gains less than 2%; where
it was memory that was short, the search goes on with less kept for the backward pass. The best is measured again with
other ways of doing the same. FLOPs are those that the model needs, without recomputation and with the scores that the
causal mask hides; peaks are those of data sheets. A token that is decoded needs all parameters, and the keys and
values of the tokens so far, once. Times are medians; the spread is the middle half of them.

Tables are printed, and written with everything measured to report.md and results.json in --out; what processes that
failed have said is in log.txt. The exit status is 0 if nothing failed, else 1. --smoke does it all with tiny models.

FINDING: no accelerator has been measured yet; report.md says what one has to say, beside the goals.
"""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags
from ml_collections import ConfigDict
from rich.console import Console

# A file that is run finds only its neighbours by itself.
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from configs import gpt2_124m
from experiments.benchmarks.accelerator_report import SHEETS, chip_of, share_of_peak, tokens_per_second, written
from rustgpt_jax.config import Config
from rustgpt_jax.resolve import override, resolve

FLAGS = flags.FLAGS
Knobs = dict[str, Any]

# Of GPT-2 (OpenAI 2019); heads have 64 channels.
SIZES: dict[str, Knobs] = {
    "124m": {"n_layers": 12, "n_heads": 12, "d_model": 768},
    "350m": {"n_layers": 24, "n_heads": 16, "d_model": 1024},
    "1.5b": {"n_layers": 48, "n_heads": 25, "d_model": 1600},
    "smoke": {"n_layers": 2, "n_heads": 2, "d_model": 32, "context_length": 64, "vocab_size": 128},
}
SECTIONS = ("checks", "training", "torch", "decoding", "sweep")
MODULES = {"rustgpt_jax": "gpt2_jax", "PyTorch": "gpt2_torch"}
# What keeps less and less for the backward pass.
SAVINGS: dict[str, tuple[Knobs, ...]] = {
    "rustgpt_jax": ({}, {"model.remat": "weights"}, {"model.remat": "full"}),
    "PyTorch": ({}, {"remat": "full"}),
}
# Other ways to the same, tried at the best batch.
VARIANTS: dict[str, tuple[Knobs, ...]] = {
    "rustgpt_jax": ({"model.layers": "unrolled"},),
    "PyTorch": ({"attention": "cudnn"},),
}
# A batch twice as large is worth it if it gives so many times the tokens a second.
GAIN = 1.02
MEMORY_WORDS = ("RESOURCE_EXHAUSTED", "OutOfMemory", "out of memory", "Out of memory")
# Both frameworks may have nearly all of the memory of one device. What the user has set stays.
ENVIRONMENT = {
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.93",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "CUDA_VISIBLE_DEVICES": "0",
}


class Extent(NamedTuple):
    """How much is measured.

    first_batch, most_batch: where the search for the best batch begins, by size, and ends. decoded: the sizes that
    decode. rounds: how often the best of the frameworks take turns. repeats: timings of a process. variants: whether
    there are any.
    """

    first_batch: dict[str, int]
    most_batch: int
    decoded: tuple[str, ...]
    decode_batches: tuple[int, ...]
    prompt: int
    new: int
    trials: int
    trial_knobs: Knobs
    rounds: int
    repeats: int
    variants: bool


FULL = Extent(
    first_batch={"124m": 16, "350m": 8, "1.5b": 4},
    most_batch=512,
    decoded=("124m", "1.5b"),
    decode_batches=(1, 8, 64),
    prompt=128,
    new=128,
    trials=16,
    trial_knobs={"training.steps_per_call": 100},
    rounds=2,
    repeats=6,
    variants=True,
)
SMOKE = Extent(
    first_batch={"smoke": 1},
    most_batch=2,
    decoded=("smoke",),
    decode_batches=(1, 2),
    prompt=8,
    new=8,
    trials=4,
    trial_knobs={"training.steps_per_call": 2, "model.n_layers": 1, "model.d_model": 16},
    rounds=1,
    repeats=2,
    variants=False,
)


class Failure(Exception):
    """Why a measurement gave nothing, in one line. is_memory: what was to be measured did not fit."""

    def __init__(self, reason: str) -> None:
        super().__init__(" ".join(reason.split())[:300] or "it said nothing")
        self.is_memory = any(word in reason for word in MEMORY_WORDS)


def define_flags() -> None:
    """What the command takes."""
    flags.DEFINE_list("only", list(SECTIONS), f"What to measure, of {', '.join(SECTIONS)}.")
    flags.DEFINE_list("sizes", None, f"Which models, of {', '.join(SIZES)}.")
    flags.DEFINE_string("out", "runs/accelerator", "The folder for everything that is written.")
    flags.DEFINE_integer("patience", 900, "Seconds after which a measurement is given up.", 1)
    flags.DEFINE_bool("smoke", False, "Measure tiny models, on a CPU too: to see that everything works.")


def get_config() -> ConfigDict:
    """The smallest of the models."""
    return tree_of("124m")


def tree_of(size: str) -> ConfigDict:
    """configs/gpt2_124m.py in another size, with batches that are not divided, and five steps in a call."""
    tree = gpt2_124m.get_config()
    tree.model.update(SIZES[size])
    tree.training.accumulation = 1
    tree.training.batch_size = 1
    return tree


def config_of(size: str, knobs: Knobs | None = None) -> Config:
    """The same with the values at some dotted paths changed, as a resolved config."""
    tree = tree_of(size)
    for path, value in (knobs or {}).items():
        override(tree, path, value)
    return resolve(tree)


def printed(tasks: dict[str, Callable[..., Any]]) -> None:
    """What the process of a measurement does: the task that its one argument asks for, its result printed as JSON."""
    request = json.loads(sys.argv[1])
    try:
        reply = {"result": tasks[request.pop("what")](**request)}
    except Exception as error:
        traceback.print_exc()
        reply = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(reply))


def measured(module: str, request: dict[str, Any], patience: float, log: Path) -> Any:
    """What a process of its own measures. Raises Failure."""
    command = [sys.executable, "-m", f"experiments.benchmarks.{module}", json.dumps(request)]
    began = f"\n$ {' '.join(command[1:-1])} '{command[-1]}'\n"
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=ENVIRONMENT | os.environ, capture_output=True, text=True, timeout=patience
        )
    except subprocess.TimeoutExpired:
        raise Failure(f"it took more than {patience:.0f} seconds") from None
    try:
        reply = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or [""])[-1]
        reply = {"error": f"its process ended with status {done.returncode}: {last}"}
    if "error" in reply:
        with log.open("a", encoding="utf-8") as file:
            file.write(began + done.stderr)
        raise Failure(reply["error"])
    return reply["result"]


def best_batch(
    rate: Callable[[int, Knobs], float], first: int, most: int, savings: Sequence[Knobs]
) -> tuple[int, Knobs]:
    """The batch, and what saves memory, with the most tokens a second, of which `rate` gives the number.

    It raises Failure where it cannot; so does this where nothing fits, down to a batch of 1.
    """
    best: tuple[int, Knobs] | None = None
    best_rate, batch = 0.0, first
    for knobs in savings:
        try:
            while batch <= most:
                now, enough = rate(batch, knobs), GAIN * best_rate
                if now > best_rate:
                    best, best_rate = (batch, knobs), now
                if now < enough:
                    break
                batch *= 2
            break
        except Failure as failure:
            if best is None and not (failure.is_memory and (first > 1 or knobs != savings[-1])):
                raise
            if not failure.is_memory:
                break
    return best or best_batch(rate, first // 2, first // 2, savings[-1:])


class Bench:
    """Measures, tells, and keeps what was found in `results`."""

    def __init__(self, extent: Extent, out: Path, patience: float, console: Console) -> None:
        self.extent, self.out, self.patience, self.console = extent, out, patience, console
        self.results: dict[str, Any] = {"date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", "failures": []}
        self.results |= {"command": " ".join(["python", *sys.argv])}

    def ask(self, module: str, what: str, **arguments: Any) -> Any:
        """What a module of MODULES measures. Raises Failure."""
        return measured(module, {"what": what} | arguments, self.patience, self.out / "log.txt")

    def failed(self, what: str, failure: Failure) -> None:
        """Tell and keep a failure."""
        self.console.print(f"{what}: {failure}", style="red", highlight=False, markup=False)
        self.results["failures"].append({"what": what, "reason": str(failure)})

    def attempt(self, name: str, module: str, what: str, **arguments: Any) -> Any:
        """The same as `ask`, but None, and a line among the failures, where there is nothing."""
        try:
            found = self.ask(module, what, **arguments)
        except Failure as failure:
            return self.failed(name, failure)
        self.console.print(f"measured: {name}", style="dim", highlight=False)
        return found

    def checks(self, sizes: Sequence[str]) -> None:
        """Attention kernels of models of each size."""
        for size in sizes:
            self.results["checks"] += self.attempt(f"checks of {size}", "gpt2_jax", "checks", size=size) or []

    def training(self, size: str, frameworks: Sequence[str]) -> None:
        """The best of each framework; then, turn by turn, the best again, and the others at the batch of the first."""
        found = [(framework, best) for framework in frameworks if (best := self.search(framework, size))]
        if not found:
            return
        (_, (batch, _)), *others = found
        found += [(framework, (batch, knobs)) for framework, (own, knobs) in others if own != batch]
        for framework, best in found * self.extent.rounds:
            try:
                self.train(framework, size, *best)
            except Failure as failure:
                self.failed(f"training {size} with {framework}, batch {best[0]}", failure)

    def search(self, framework: str, size: str) -> tuple[int, Knobs] | None:
        """The batch and the knobs with the most tokens a second."""

        def rate(batch: int, knobs: Knobs) -> float:
            return tokens_per_second(self.train(framework, size, batch, knobs))

        extent = self.extent
        try:
            batch, knobs = best_batch(rate, extent.first_batch[size], extent.most_batch, SAVINGS[framework])
        except Failure as failure:
            return self.failed(f"training {size} with {framework}", failure)
        rates = {(): max(tokens_per_second(row) for row in self.results["training"] if row["framework"] == framework)}
        del rates
        best, best_rate = knobs, 0.0
        for variant in ({}, *(VARIANTS[framework] if extent.variants else ())):
            try:
                now = rate(batch, knobs | variant)
            except Failure as failure:
                self.failed(f"training {size} with {framework}, {variant}", failure)
                continue
            if now > best_rate:
                best, best_rate = knobs | variant, now
        return batch, best

    def train(self, framework: str, size: str, batch: int, knobs: Knobs) -> dict[str, Any]:
        """One measurement of training, kept among the results. Raises Failure."""
        where = {"device": self.torch_device} if framework == "PyTorch" else {}
        arguments = {"size": size, "batch": batch, "knobs": knobs}
        name = f"{size} with {framework}, batch {batch}{''.join(f', {key}={value}' for key, value in knobs.items())}"
        try:
            found = self.ask(MODULES[framework], "training", repeats=self.extent.repeats, **arguments, **where)
        except Failure as failure:
            self.console.print(f"{name}: {failure}", style="yellow", highlight=False, markup=False)
            raise
        row = {"framework": framework} | arguments | found
        self.results["training"].append(row)
        machine = self.results["machine"]
        share = share_of_peak(machine["costs"][size]["flops_per_token"], tokens_per_second(row), chip_of(machine))
        told = "" if share is None else f", {share:.1%} of peak"
        self.console.print(f"{name}: {tokens_per_second(row):,.0f} tokens/s{told}", highlight=False)
        return row
