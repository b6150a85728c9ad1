"""A trace: steps of a run made again, with a fingerprint of everything before and after them, written as JSON.

    python -m rustgpt_jax.reproduce.step_trace RUN FIRST LAST OUT.json [--taps]

Two traces, made by two versions of the code or of two runs, are held against each other array by array. Of each step
there are

    step                    from 1, as in metrics.jsonl
    batch, before, after    fingerprints by path: of the step's batch, and of the state before and after it
    metrics                 by the names that metrics.jsonl has
    activations, gradients  with --taps, the tensors inside in the order in which they are made: site, fingerprint, norm
                            and largest magnitude (of finite elements), nonfinite, and size, both counts

where numbers that are not finite are written as in metrics.jsonl, and `gradients` has those of the activations, then
those of the parameters.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from rustgpt_jax.atomic_io import write_atomically
from rustgpt_jax.errors import UserError
from rustgpt_jax.fingerprints import fingerprint_tree
from rustgpt_jax.reproduce.recorded_run import (
    ACTIVATION,
    ACTIVATION_GRADIENT,
    PARAMETER_GRADIENT,
    RecordedRun,
    StepTensor,
    to_metric_dict,
)
from rustgpt_jax.sharding.compilation_cache import enable_compilation_cache
from rustgpt_jax.tracking.formatting import PlainTextConsole
from rustgpt_jax.training.train_step import State
from rustgpt_jax.workdir.program_fingerprint import load_autotuning
from rustgpt_jax.workdir.run_dir import RunDir


def write_trace(path: Path, first: int, last: int, has_taps: bool, console: Console) -> dict[str, Any]:
    """The trace of the steps `first` to `last` of a run. Raises UserError for steps that it does not have."""
    with RecordedRun(path, console) as past:
        past.check(first)
        past.check(last)
        state, steps = past.state_at(first - 1), []
        for step in range(first, last + 1):
            inside = _inside(past, state) if has_taps else {}
            before, batch = fingerprint_tree(state), fingerprint_tree(past.batch(state)._asdict())
            state, (metrics,) = past.train(state, 1)
            values = {name: _number(value) for name, value in to_metric_dict(metrics).items()}
            after = fingerprint_tree(state)
            steps.append({"step": step, "batch": batch, "before": before, "metrics": values, **inside, "after": after})
        return {"steps": steps}


def _inside(past: RecordedRun, state: State) -> dict[str, Any]:
    found = past.look_into(state).tensors
    kinds = {"activations": (ACTIVATION,), "gradients": (ACTIVATION_GRADIENT, PARAMETER_GRADIENT)}
    return {
        name: [_as_json(tensor) for kind in of_name for tensor in found if tensor.kind == kind]
        for name, of_name in kinds.items()
    }


def _as_json(tensor: StepTensor) -> dict[str, Any]:
    site = f"params/{tensor.name}" if tensor.kind == PARAMETER_GRADIENT else tensor.name
    return {
        "site": site,
        "fingerprint": tensor.fingerprint,
        "norm": _number(tensor.norm),
        "largest": _number(tensor.largest),
        "nonfinite": tensor.nonfinite,
        "size": tensor.size,
    }


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else json.dumps(value)


def main() -> int:
    """The command above. The exit status: 2 for a mistake, told in a sentence."""
    parser = argparse.ArgumentParser(prog="python -m rustgpt_jax.reproduce.step_trace", description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("first", type=int)
    parser.add_argument("last", type=int)
    parser.add_argument("out", type=Path)
    parser.add_argument("--taps", action="store_true")
    given = parser.parse_args()
    enable_compilation_cache()
    load_autotuning(RunDir(given.run))
    try:
        found = write_trace(given.run, given.first, given.last, given.taps, PlainTextConsole(stderr=True))
        write_atomically(given.out, json.dumps(found) + "\n")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
