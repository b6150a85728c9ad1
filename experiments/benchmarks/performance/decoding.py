"""How fast is decoding, beside transformers and llama.cpp with the same weights?

python experiments/benchmarks/run.py decoding

GPT-2 124M with random weights, written by us for both others: 128 tokens are read, then 128 drawn, the likeliest each
time. Contenders of a race have the same type and batch, and take turns, each in a process of its own. Weights have
these types; int8 has a scale for each of some numbers, and is not in transformers. Then 1,000 steps of ours are timed
one by one.

FINDING: none of its own; see `run.py`.
"""

import shutil

from ml_collections import ConfigDict

from experiments.benchmarks.best_batch import tree_of
from experiments.benchmarks.performance.bench import Bench, Row, about
from experiments.benchmarks.performance.workers import Request


def get_config() -> ConfigDict:
    """The model."""
    return tree_of("124m")


def measure(bench: Bench) -> Row:
    """All races, and how steady our steps are."""
    decoded, folder = bench.extent.decoded, bench.out / "weights"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    found: Row = {"about": about("torch", "transformers", "llama-cpp-python"), "peaks": bench.peaks(), "races": {}}
    found |= {"prompt": decoded.prompt} | bench.ask("ours", "export", size=decoded.size, folder=str(folder))
    for batch in bench.extent.batches:
        for dtype in bench.extent.dtypes:
            title = f"{dtype}, batch {batch}"
            found["races"][title] = bench.race(contenders(dtype, batch, str(folder), bench), bench.extent.rounds, title)
    shutil.rmtree(folder)
    arguments = {"size": decoded.size, "prompt": 8, "steps": decoded.steps}
    steady = {
        f"{dtype}, {kernel}": Request("ours", "steadiness", arguments | {"dtype": dtype, "kernel": kernel})
        for dtype in bench.extent.dtypes
        for kernel in bench.extent.kernels
    }
    # One after another: a turn is long, and nothing is compared.
    found["steadiness"] = {name: bench.race({name: each}, 1, "steadiness") for name, each in steady.items()}
    return found


def contenders(dtype: str, batch: int, folder: str, bench: Bench) -> dict[str, Request]:
    """Who takes part in a race."""
    decoded = bench.extent.decoded
    lengths = {"dtype": dtype, "batch": batch, "prompt": decoded.prompt, "new": decoded.new}
    found = {
        f"rustgpt_jax, {kernel}": Request("ours", "decoding", lengths | {"size": decoded.size, "kernel": kernel})
        for kernel in bench.extent.kernels
    }
    if dtype != "int8":
        found["transformers"] = Request("transformers_peer", "decoding", lengths | {"folder": folder})
    return found | {"llama.cpp": Request("llama_cpp_peer", "decoding", lengths | {"folder": folder})}
