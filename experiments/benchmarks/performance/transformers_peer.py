"""Benchmark worker that decodes our exported weights with transformers.

python -m experiments.benchmarks.performance.transformers_peer \
    '{"what": "decoding", "folder": "weights", "batch": 1, "dtype": "float32", "prompt": 9, "new": 9}'

A worker (see `workers.py`): unmodified greedy `generate` with its KV cache.
"""

import time
from pathlib import Path

from experiments.benchmarks.performance.turns import Reading
from experiments.benchmarks.performance.workers import Prepared, serve


def decoding(folder: str, batch: int, dtype: str, prompt: int, new: int) -> Prepared:
    """Measure the seconds of a prompt of all rows and its first token, and then per token of all rows."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        Path(folder) / "transformers", dtype=getattr(torch, dtype), local_files_only=True
    )
    model.eval()
    model.generation_config.eos_token_id = None
    tokens_BT = torch.randint(model.config.vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(0))
    mask_BT = torch.ones_like(tokens_BT)

    def write(count: int) -> float:
        began = time.perf_counter()
        with torch.inference_mode():
            written = model.generate(
                tokens_BT, attention_mask=mask_BT, max_new_tokens=count, do_sample=False, pad_token_id=0
            )
        assert written.shape[1] == prompt + count
        return time.perf_counter() - began

    def turn() -> Reading:
        first = write(1)
        return {"prompt": first, "token": (write(new) - first) / (new - 1)}

    turn()
    return {}, turn


TASKS = {"decoding": decoding}

if __name__ == "__main__":
    serve(TASKS)
