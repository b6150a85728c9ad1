"""Time of the compiled training steps of a run alone, with data in memory.

python -m experiments.benchmarks.bare_steps CONFIG.py

Prints the seconds of all steps of the run, the minimum of three repeats. Nothing is written.
"""

import json
import runpy
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from rustgpt_jax.config.schema import StaticConfig
from rustgpt_jax.config.validation import resolve
from rustgpt_jax.data.preprocess import AssetCache
from rustgpt_jax.process_setup import enable_compilation_cache, keep_freed_memory
from rustgpt_jax.sharding.sharding_plan import ShardingPlan
from rustgpt_jax.training.run_inputs import RunInputs
from rustgpt_jax.training.train_step import StepArgs, compiled_train_steps
from rustgpt_jax.training.trainer import Trainer

REPEATS = 3


def bare_steps(file: Path) -> tuple[Callable[[], float], int]:
    """Return a function that runs all steps of a config file and returns their seconds, and the number of steps."""
    config = resolve(runpy.run_path(str(file))["get_config"]())
    inputs = RunInputs(config, *AssetCache().prepare(config))
    calls = list(iterate_calls(inputs))

    def all_steps() -> float:
        state = jax.block_until_ready(Trainer(inputs, Path("unused"), {}, ShardingPlan()).state())
        began = time.perf_counter()
        for static, args in calls:
            state, _ = compiled_train_steps(static, state, *args)
        jax.block_until_ready(state)
        return time.perf_counter() - began

    all_steps()
    return all_steps, inputs.total_steps


def iterate_calls(inputs: RunInputs) -> Iterator[tuple[StaticConfig, StepArgs]]:
    """Yield the static config and the arguments of each call of the compiled program, stage by stage."""
    step = 0
    for data in inputs.stages:
        run = Trainer(inputs, Path("unused"), {}, ShardingPlan())
        run.step = step
        while run.step < data.stage.end_step:
            count = min(data.stage.config.training.steps_per_jit_call, data.stage.end_step - run.step)
            static, hparams, first_step = run.program
            yield static, StepArgs(run.next_batches(count), np.int32(count), hparams, first_step)
            run.step += count
        step = run.step
        run.__exit__(None, None, None)


if __name__ == "__main__":
    keep_freed_memory()
    enable_compilation_cache()
    call, _ = bare_steps(Path(sys.argv[1]))
    print(json.dumps(min(call() for _ in range(REPEATS))))
