"""Benchmark worker that decodes our exported weights with llama.cpp.

python -m experiments.benchmarks.performance.llama_cpp_peer \
    '{"what": "decoding", "folder": "weights", "batch": 1, "dtype": "int8", "prompt": 9, "new": 9}'

A worker (see `workers.py`). It calls the C functions through llama-cpp-python: one `llama_decode` for the prompts of
all rows, then one per token of all rows, greedily, with one thread per core.
"""

import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks.performance.turns import Reading
from experiments.benchmarks.performance.workers import Prepared, serve


class Context:
    """A llama.cpp model with a KV cache for a number of rows and tokens."""

    def __init__(self, file: Path, rows: int, length: int) -> None:
        import llama_cpp

        self.library: Any = llama_cpp
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_load_model_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        wanted = llama_cpp.llama_context_default_params()
        wanted.n_ctx = wanted.n_batch = wanted.n_ubatch = rows * length
        wanted.n_seq_max = rows
        wanted.n_threads = wanted.n_threads_batch = len(os.sched_getaffinity(0))
        self.context = llama_cpp.llama_new_context_with_model(self.model, wanted)
        if not self.context:
            raise RuntimeError("llama.cpp cannot create a context")
        self.n_tokens = llama_cpp.llama_n_vocab(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(rows * length, 0, 1)

    def forget(self) -> None:
        """Empty the cache."""
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)

    def read(self, tokens_BT: np.ndarray, position: int) -> np.ndarray:
        """Decode tokens in all rows from a position, and return the most likely next token of each, as a column."""
        rows, length = tokens_BT.shape
        self.batch.n_tokens = rows * length
        for index, (row, place) in enumerate(np.ndindex(rows, length)):
            self.batch.token[index] = int(tokens_BT[row, place])
            self.batch.pos[index] = position + place
            self.batch.n_seq_id[index] = 1
            self.batch.seq_id[index][0] = row
            self.batch.logits[index] = place == length - 1
        if self.library.llama_decode(self.context, self.batch):
            raise RuntimeError("llama_decode failed")
        last = [self.library.llama_get_logits_ith(self.context, row * length + length - 1) for row in range(rows)]
        logits_BV = [np.ctypeslib.as_array(each, (self.n_tokens,)) for each in last]
        return np.array([[logits_V.argmax()] for logits_V in logits_BV])


def decoding(folder: str, batch: int, dtype: str, prompt: int, new: int) -> Prepared:
    """Measure the seconds of a prompt of all rows, and then per token of all rows."""
    context = Context(Path(folder) / f"{dtype}.gguf", batch, prompt + new)
    prompts_BT = np.random.default_rng(0).integers(0, context.n_tokens, (batch, prompt))

    def turn() -> Reading:
        context.forget()
        began = time.perf_counter()
        tokens_B1 = context.read(prompts_BT, 0)
        read = time.perf_counter()
        for place in range(new):
            tokens_B1 = context.read(tokens_B1, prompt + place)
        return {"prompt": read - began, "token": (time.perf_counter() - read) / new}

    turn()
    return {"features": " ".join(context.library.llama_print_system_info().decode().split())}, turn


TASKS = {"decoding": decoding}

if __name__ == "__main__":
    serve(TASKS)
