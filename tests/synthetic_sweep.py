"""Synthetic sweep folders with losses from a formula, for tests of results and reports."""

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Overrides = dict[str, Any]

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
INITIAL_LOSS = 5.55
STEPS = 200


def trial_id(overrides: Mapping[str, Any]) -> str:
    """Return eight hex digits that depend only on the overrides."""
    return hashlib.sha256(json.dumps(overrides, sort_keys=True).encode()).hexdigest()[:8]


def grid(**values: Iterable[Any]) -> list[Overrides]:
    """Return all combinations of values; `__` in a name stands for the dot of a path."""
    paths = [path.replace("__", ".") for path in values]
    return [dict(zip(paths, combination, strict=True)) for combination in itertools.product(*values.values())]


def two_optimizers() -> list[Overrides]:
    """2 optimizers x 6 learning rates x 3 seeds."""
    return grid(optimizer__name=("adamw", "muon"), optimizer__learning_rate=RATES, seed=(0, 1, 2))


def loss_of(overrides: Mapping[str, Any]) -> float:
    """Return a parabola in the log learning rate, lower and further right for muon, plus noise of the seed."""
    rate = overrides.get("optimizer.learning_rate", 1e-2)
    decay = overrides.get("optimizer.weight_decay", 0.1)
    muon = overrides.get("optimizer.name") == "muon"
    best = 1e-2 if muon else 3e-3
    noise = np.random.default_rng(int(trial_id(overrides), 16)).normal()
    shape = 0.16 * math.log10(rate / best) ** 2 + 0.05 * math.log10((decay + 1e-3) * 20 * rate / best) ** 2
    width = 0.09 * math.log2(256 / overrides.get("model.d_model", 256)) ** 1.5
    return 2.31 - 0.11 * muon + shape + width + 0.02 * noise + 0.03 * (overrides.get("seed", 0) - 1)


def status_of(overrides: Mapping[str, Any]) -> str:
    """Return the status: adamw's largest rate diverges for two seeds, and muon's smallest fails for one."""
    rate, seed = overrides.get("optimizer.learning_rate"), overrides.get("seed")
    if overrides.get("optimizer.name") == "muon":
        return "failed" if (rate, seed) == (3e-4, 2) else "finished"
    return "diverged" if rate == 1e-1 and seed != 1 else "finished"


def write_sweep(
    folder: Path,
    trials: Iterable[Overrides],
    status: Callable[[Overrides], str] = status_of,
    loss: Callable[[Overrides], float] = loss_of,
    eval_every: int = 20,
    **sweep: str,
) -> Path:
    """Write sweep.json, ledger.jsonl and each trial's metrics.jsonl, and return the folder."""
    folder.mkdir(parents=True)
    trials = list(trials)
    command = "python launch.py sweep --config=configs/tiny.py --sweep='learning rates'"
    head = {"name": folder.name, "command": command, "config_file": "configs/tiny.py", "sweep": "", "mode": "solo"}
    (folder / "sweep.json").write_text(json.dumps(head | sweep))
    events = [{"trial": trial_id(overrides), "event": "planned", "overrides": overrides} for overrides in trials]
    for overrides in trials:
        events += _events(overrides, status(overrides))
        if status(overrides) != "planned":
            lines = metrics(overrides, status(overrides), loss(overrides), eval_every)
            write_metrics(folder, overrides, lines)
    with open(folder / "ledger.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"time": 1e9 + second, **event}) + "\n" for second, event in enumerate(events))
    return folder


def write_metrics(folder: Path, overrides: Overrides, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write the metrics.jsonl of a trial."""
    run = folder / "trials" / trial_id(overrides)
    run.mkdir(parents=True)
    texts = (json.dumps(line).replace(": NaN", ': "NaN"') for line in lines)
    (run / "metrics.jsonl").write_text("".join(text + "\n" for text in texts))


def metrics(overrides: Overrides, status: str, final: float, eval_every: int) -> list[dict[str, Any]]:
    """Return a noisy decreasing loss every 4 steps; if the trial diverges, it ends early after an increase."""
    random = np.random.default_rng(int(trial_id(overrides), 16) + 1)
    last = {"diverged": 60, "failed": 32, "pruned": 80, "stopped": 120, "running": 100}.get(status, STEPS)
    lines: list[dict[str, Any]] = []
    for step in (1, *range(4, last + 1, 4)):
        smooth = final + (INITIAL_LOSS - final) * ((1 - step / STEPS) * 12 / (12 + step) if step > 1 else 1)
        if status == "diverged" and step > 40:
            smooth += 1.3 ** (step - 40)
        train = smooth + random.normal() * (0.03 if step > 1 else 0.002) if step > 1 else INITIAL_LOSS
        if status == "diverged" and step == last:
            train = math.nan
        lines.append({"step": step, "stage": "train", "train/loss": train, "train/tokens_per_second": random.random()})
        if step % eval_every == 0 and math.isfinite(train):
            valid = smooth if step < STEPS else final
            scores = {"valid/loss": valid, "valid/perplexity": math.exp(valid), "valid/bits_per_byte": valid / 2.5}
            lines.append({"step": step, "stage": "train", **scores})
    return lines


def _events(overrides: Overrides, status: str) -> list[dict[str, Any]]:
    trial = trial_id(overrides)
    if status == "planned":
        return []
    events: list[dict[str, Any]] = [{"trial": trial, "event": "queued"}, {"trial": trial, "event": "began"}]
    if status == "failed":
        error = "OSError: [Errno 28] No space left on device: 'checkpoints/32'"
        return [*events, {"trial": trial, "event": "failed", "error": error, "traceback": "Traceback ...\n" + error}]
    step = {"diverged": 60, "pruned": 80, "stopped": 120, "running": 100}.get(status, STEPS)
    return events if status == "running" else [*events, {"trial": trial, "event": status, "step": step}]
