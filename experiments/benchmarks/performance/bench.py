"""Shared state of the benchmark: what to measure, on which machine, and progress messages.

python experiments/benchmarks/run.py
"""

import os
import platform
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from rich.console import Console

from experiments.benchmarks.accelerator_report import spread
from experiments.benchmarks.best_batch import format_command
from experiments.benchmarks.performance.models import DECODED, SMOKE, Decoded
from experiments.benchmarks.performance.turns import Reading, take_turns
from experiments.benchmarks.performance.workers import Request, describe_task, start_workers
from experiments.benchmarks.sweep_throughput import shakespeare
from rustgpt_jax.errors import UserError

Row = dict[str, Any]


class Extent(NamedTuple):
    """The extent of the measurements.

    Attributes:
        shapes: The models to train, with the number of rounds of each.
        races: The dtypes of PyTorch to compare training with.
        decoded: The model to decode with, and numbers of tokens.
        batches: The batch sizes to decode with.
        dtypes: The dtypes of weights to decode with.
        kernels: The kernels to decode with.
        rounds: The number of rounds of everything else.
        product: The width of the matrices for measuring the peak FLOP/s.
        gigabytes: The memory to read for measuring the peak bandwidth.
        width: The width of the model in a whole run of configs/shakespeare_char.py.
        train_steps: The number of steps of that run.
        job_steps: The number of steps in each of the two stages of RustGPT's job.
        compiled: Whether to measure torch.compile too.
    """

    shapes: Mapping[str, int]
    races: tuple[str, ...]
    decoded: Decoded
    batches: tuple[int, ...]
    dtypes: tuple[str, ...]
    kernels: tuple[str, ...]
    rounds: int
    product: int
    gigabytes: float
    width: int
    train_steps: int
    job_steps: tuple[int, int]
    compiled: bool


FULL = Extent(
    shapes={"shk": 15, "mid": 7, "124M": 5},
    races=("float32", "bfloat16"),
    decoded=DECODED,
    batches=(1, 8),
    dtypes=("float32", "bfloat16", "int8"),
    kernels=("plain", "native"),
    rounds=7,
    product=2048,
    gigabytes=1.0,
    width=128,
    train_steps=600,
    job_steps=(2500, 5300),
    compiled=True,
)
TINY = Extent(
    shapes={"smoke": 2},
    races=("float32",),
    decoded=SMOKE,
    batches=(2,),
    dtypes=("float32",),
    kernels=("plain",),
    rounds=1,
    product=256,
    gigabytes=0.01,
    width=16,
    train_steps=40,
    job_steps=(40, 40),
    compiled=False,
)


class Bench(NamedTuple):
    """The inputs of a part of the benchmark.

    Attributes:
        extent: The extent of the measurements.
        text: The text for configs/shakespeare_char.py, or None.
        out: The folder for files.
        patience: The time limit of a turn in seconds.
        console: The console to print to.
        rustgpt: RustGPT's program, or None.
    """

    extent: Extent
    text: Path | None
    out: Path
    patience: float
    console: Console
    rustgpt: Path | None = None

    def ask(self, module: str, what: str, **arguments: Any) -> Row:
        """Return the description of a prepared worker. Raises Failure."""
        return describe_task(Request(module, what, arguments), self.patience, self.log)

    def race(self, requests: Mapping[str, Request], rounds: int, title: str) -> Row:
        """Measure workers in turns; return readings by contender and quantity, and the reasons for missing ones."""
        self.say(f"{title}: {', '.join(requests)}")
        with start_workers(requests, self.patience, self.log) as (workers, absent):
            about = {name: worker.about for name, worker in workers.items()}
            readings, failures = take_turns({name: worker.turn for name, worker in workers.items()}, rounds)
        columns = {name: to_columns(rows) for name, rows in readings.items()}
        for name, reason in (absent | failures).items():
            self.say(f"  {name} is not measured: {reason}", "yellow")
        for name, column in columns.items():
            shown = (f"{what} {format_median(values)}" for what, values in column.items())
            self.say(f"  {name}: {', '.join(shown)}")
        return {"readings": columns, "about": about, "absent": absent | failures, "date": today()}

    def needed_text(self) -> Path:
        """Return the text. Raises UserError if none was given."""
        if self.text is None:
            raise UserError("This part of the benchmark needs a text: give --text=FILE, such as tiny Shakespeare.")
        return self.text

    def shakespeare(self, steps: int, every: int) -> ConfigDict:
        """Return configs/shakespeare_char.py for a number of steps, evaluated and saved at an interval.

        Raises:
            UserError: No text was given.
        """
        config = shakespeare(str(self.needed_text()))
        config.training.steps, config.schedule.warmup_steps = steps, min(steps // 2, config.schedule.warmup_steps)
        config.model.d_model = self.extent.width
        config.logging.eval_every = config.logging.checkpoint_every = every
        return config

    def peaks(self) -> Row:
        """Return the peak FLOP/s and bytes/s of the machine, as reached by the fastest matrix products."""
        requests = {
            "rustgpt_jax": Request("ours", "peaks", {"size": self.extent.product, "gigabytes": self.extent.gigabytes}),
            "torch": Request("torch_peer", "peaks", {"size": self.extent.product}),
        }
        found = self.race(requests, self.extent.rounds, "peaks")["readings"]
        best: Row = {}
        for column in found.values():
            for what, values in column.items():
                best[what] = max(best.get(what, 0.0), *values)
        return best

    def say(self, text: str, style: str = "") -> None:
        """Print a line."""
        self.console.print(text, style=style, highlight=False, markup=False)

    @property
    def log(self) -> Path:
        """The log file of the worker processes."""
        return self.out / "log.txt"


def about(*peers: str) -> Row:
    """Return the machine, the versions of JAX and of some installed packages, and the date."""
    versions = {"Python": platform.python_version()}
    for package in ("jax", *peers):
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {"date": today(), "command": format_command(sys.argv), "versions": versions} | machine()


def to_columns(readings: list[Reading]) -> dict[str, list[float]]:
    """Return readings by quantity."""
    return {name: [reading[name] for reading in readings] for name in readings[0]} if readings else {}


def format_median(values: list[float]) -> str:
    """Format a median and its spread for a progress message."""
    return f"{np.median(values):.4g} ({spread(values):.0%})"


def today() -> str:
    """Return the date in UTC."""
    return f"{datetime.now(UTC):%Y-%m-%d}"


# Names of processors that report only their maker, by vendor and family, with the range of models.
MICROARCHITECTURES = {
    ("AuthenticAMD", 25): {"Zen 4": (*range(0x10, 0x20), *range(0x60, 0x80), *range(0xA0, 0xB0)), "Zen 3": range(0x60)},
    ("AuthenticAMD", 26): {"Zen 5": range(0x100)},
    ("GenuineIntel", 6): {
        "Sapphire Rapids": (143,),
        "Emerald Rapids": (207,),
        "Granite Rapids": (173, 174),
        "Ice Lake": (106, 108),
        "Cascade Lake": (85,),
    },
}


def describe_processor(fields: Mapping[str, str]) -> str:
    """Return the name of a processor with its microarchitecture, given the fields of /proc/cpuinfo."""
    name = fields.get("model name") or platform.processor() or platform.machine()
    family, model = int(fields.get("cpu family", 0)), int(fields.get("model", 0))
    known = MICROARCHITECTURES.get((fields.get("vendor_id", ""), family), {})
    kind = next((kind for kind, models in known.items() if model in models), f"family {family}, model {model}")
    return f"{name} ({kind})"


def machine() -> Row:
    """Describe the processor, its cores and the memory."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    features = (fields.get("flags") or fields.get("Features") or "").split()
    wide = [name for name in ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "asimd") if name in features]
    return {
        "processor": describe_processor(fields),
        "features": wide,
        "cores": len(os.sched_getaffinity(0)),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }
