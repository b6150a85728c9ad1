"""Benchmark worker that trains the same models with PyTorch.

python -m experiments.benchmarks.performance.torch_peer '{"what": "peaks", "size": 2048}'

A worker (see `workers.py`). The model is defined in `gpt2_torch.py`, with the same parameters and logits as ours; it is
run eagerly or with torch.compile, and trained with fused AdamW.
"""

import time

from experiments.benchmarks.gpt2_torch import trainer
from experiments.benchmarks.performance.models import training_config
from experiments.benchmarks.performance.turns import Reading
from experiments.benchmarks.performance.workers import Prepared, serve


def peaks(size: int) -> Prepared:
    """Measure the FLOP/s of large matrix products."""
    import torch

    matrices = {name: torch.randn(size, size, dtype=getattr(torch, name)) for name in ("float32", "bfloat16")}

    def turn() -> Reading:
        found = {}
        for name, matrix in matrices.items():
            began = time.perf_counter()
            torch.mm(matrix, matrix)
            found[name] = 2 * size**3 / (time.perf_counter() - began)
        return found

    turn()
    return {}, turn


def training(shape: str, dtype: str, compiled: bool) -> Prepared:
    """Measure the seconds of a training step in float32, or with bfloat16 autocast over float32 weights."""
    config = training_config(shape, {"model.dtype": dtype})
    began = time.perf_counter()
    call = trainer(config, "cpu", compiled)
    call()
    first = time.perf_counter() - began

    def turn() -> Reading:
        began = time.perf_counter()
        loss = call()
        taken = time.perf_counter() - began
        if not abs(loss) < float("inf"):
            raise ArithmeticError(f"the loss is {loss}")
        return {"seconds": taken / config.training.steps_per_jit_call}

    return {"first_call": first}, turn


TASKS = {"peaks": peaks, "training": training}

if __name__ == "__main__":
    serve(TASKS)
