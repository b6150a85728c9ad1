"""Write tests/golden: a tiny random model of every family, saved by `transformers`, with its outputs.

python -m tests.make_golden

Needs torch and transformers; the tests that read the files need neither. A folder holds config.json, the tensors in
bfloat16, and expected.npz: tokens_BT and their logits_BTV in float32, and prompt_T with the greedy_T tokens after it.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.benchmarks.family_logits import CASES, TOKENS, random_reference

GOLDEN = Path(__file__).parent / "golden"
PROMPT, GREEDY = 9, 32
# Minimum gap between the two largest logits, so that rounding does not decide, and minimum number of distinct tokens.
LEAST_MARGIN, LEAST_DISTINCT = 1e-3, 6


def greedy_tokens(model: Any, prompt: list[int], count: int) -> list[int] | None:
    """Return `count` greedy tokens by forward passes without a cache; None if they discriminate too little."""
    tokens = list(prompt)
    for _ in range(count):
        logits_V = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
        best = torch.topk(logits_V, 2).values
        if best[0] - best[1] < LEAST_MARGIN:
            return None
        tokens.append(int(torch.argmax(logits_V)))
    drawn = tokens[len(prompt) :]
    return drawn if len(set(drawn)) >= LEAST_DISTINCT else None


def write(name: str, folder: Path) -> None:
    """Write the golden files of one family."""
    model = random_reference(CASES[name], seed=1)
    rng = np.random.default_rng(1)
    greedy = None
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.bfloat16().float())
        while greedy is None:
            tokens_BT = rng.integers(0, CASES[name]["vocab_size"], (1, TOKENS), dtype=np.int32)
            greedy = greedy_tokens(model, tokens_BT[0, :PROMPT].tolist(), GREEDY)
        logits_BTV = model(torch.tensor(tokens_BT), use_cache=False).logits.numpy()
    prompt_T, greedy_T = tokens_BT[0, :PROMPT], np.array(greedy, np.int32)
    print(name, greedy)
    model.bfloat16().save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    np.savez_compressed(
        folder / "expected.npz", tokens_BT=tokens_BT, logits_BTV=logits_BTV, prompt_T=prompt_T, greedy_T=greedy_T
    )


def main() -> None:
    """Write the golden files of all families."""
    shutil.rmtree(GOLDEN, ignore_errors=True)
    for name in CASES:
        write(name, GOLDEN / name)


if __name__ == "__main__":
    main()
