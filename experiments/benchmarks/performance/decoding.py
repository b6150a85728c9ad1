"""Decoding benchmark against transformers and llama.cpp with the same weights.

python experiments/benchmarks/run.py decoding

GPT-2 124M with random weights, exported for both peers. Contenders of a race have the same dtype and batch size and
take turns, each in its own process. A turn is a prompt of 128 tokens and then only 16 generated greedily, because the
memory of a machine may change its speed within seconds. The dtype is that of
the weights; int8 has one scale per group of numbers, and is not supported by transformers. Then 1,000 of our steps are
timed individually.
"""

import shutil

from experiments.benchmarks.performance.bench import Bench, Row, about
from experiments.benchmarks.performance.workers import Request


def measure(bench: Bench) -> Row:
    """Run all races, and measure the variation of our steps."""
    decoded, folder = bench.extent.decoded, bench.out / "weights"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    found: Row = {"about": about("torch", "transformers", "llama-cpp-python"), "peaks": bench.peaks(), "races": {}}
    found |= {"prompt": decoded.prompt} | bench.ask("ours", "export", size=decoded.size, folder=str(folder))
    for batch in bench.extent.batches:
        for dtype in bench.extent.dtypes:
            title = f"{dtype}, batch {batch}"
            found["races"][title] = bench.race(
                contenders(dtype, batch, str(folder), bench), 3 * bench.extent.rounds, title
            )
    shutil.rmtree(folder)
    arguments = {"size": decoded.size, "prompt": 8, "steps": decoded.steps}
    steady = {
        f"{dtype}, {kernel}": Request("ours", "steadiness", arguments | {"dtype": dtype, "kernel": kernel})
        for dtype in bench.extent.dtypes
        for kernel in bench.extent.kernels
    }
    # Consecutively: turns are long, and nothing is compared.
    found["steadiness"] = {name: bench.race({name: each}, 1, "steadiness") for name, each in steady.items()}
    return found


def contenders(dtype: str, batch: int, folder: str, bench: Bench) -> dict[str, Request]:
    """Return the contenders of a race."""
    decoded = bench.extent.decoded
    lengths = {"dtype": dtype, "batch": batch, "prompt": decoded.prompt, "new": decoded.new}
    found = {
        f"rustgpt_jax, {kernel}": Request("ours", "decoding", lengths | {"size": decoded.size, "kernel": kernel})
        for kernel in bench.extent.kernels
    }
    if dtype != "int8":
        found["transformers"] = Request("transformers_peer", "decoding", lengths | {"folder": folder})
    return found | {"llama.cpp": Request("llama_cpp_peer", "decoding", lengths | {"folder": folder})}
