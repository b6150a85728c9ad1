"""Benchmark worker for this framework: training, decoding, and peak FLOP/s and bandwidth.

python -m experiments.benchmarks.performance.ours '{"what": "peaks", "size": 2048, "gigabytes": 1}'

A worker (see `workers.py`) for one of TASKS.
"""

import gc
import os
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.bare_steps import bare_steps
from experiments.benchmarks.best_batch import Knobs
from experiments.benchmarks.gpt2_jax import trainer
from experiments.benchmarks.performance.models import SHAPES, decoding_config, training_config
from experiments.benchmarks.performance.turns import Reading
from experiments.benchmarks.performance.workers import Prepared, description_only, serve
from rustgpt_jax.config.schema import ModelConfig, for_inference
from rustgpt_jax.errors import UserError
from rustgpt_jax.inference.generate import DecodeState, decode_steps, pad_stop_ids, start_generation
from rustgpt_jax.inference.sampling import Greedy
from rustgpt_jax.inference.text_generator import select_weight_layout, to_decode_params
from rustgpt_jax.interop.gguf import write_gguf
from rustgpt_jax.interop.hf_checkpoint import export_model
from rustgpt_jax.model import transformer
from rustgpt_jax.model.flops import parameter_shapes, total_bytes, total_size, training_flops_per_token
from rustgpt_jax.planning.estimate import compile_step
from rustgpt_jax.process_setup import enable_compilation_cache, keep_freed_memory
from rustgpt_jax.sharding.sharding_plan import ShardingPlan

# The event that JAX records for each program that it compiles or finds in the compilation cache.
COMPILED = "/jax/core/compile/backend_compile_duration"


# Peaks of the machine.


def peaks(size: int, gigabytes: float) -> Prepared:
    """Measure the FLOP/s of large matrix products and the bytes read per second."""
    left = jnp.asarray(np.random.default_rng(0).standard_normal((size, size)), jnp.float32)
    products = {name: partial(_product, left.astype(name)) for name in ("float32", "bfloat16")}
    # BLAS reads several rows at a time on all cores: memory is faster if read sequentially at several places.
    rows = np.ones((int(gigabytes * 2**28) // 2048, 2048), np.float32)

    def turn() -> Reading:
        found = {name: 2 * size**3 / seconds(call) for name, call in products.items()}
        return found | {"bytes": rows.nbytes / seconds(lambda: rows @ rows[0])}

    turn()
    return {}, turn


@jax.jit
def _product(matrix: jax.Array) -> jax.Array:
    return jnp.dot(matrix, matrix, preferred_element_type=jnp.float32)


def seconds(call: Callable[[], Any]) -> float:
    """Return the seconds of a call, including the computation of its result."""
    began = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - began


# Training.


def training(shape: str, knobs: Knobs) -> Prepared:
    """Measure the seconds of a training step, compiled as `train` compiles it."""
    config = training_config(shape, knobs)
    call = trainer(config)
    first = seconds(call)

    def turn() -> Reading:
        began = time.perf_counter()
        losses = np.asarray(call())
        taken = time.perf_counter() - began
        if not np.isfinite(losses).all():
            raise ArithmeticError(f"the loss is {losses}")
        return {"seconds": taken / config.training.steps_per_jit_call}

    return {"first_call": first}, turn


def bare(config: str) -> Prepared:
    """Measure the seconds per step of the compiled steps of a run alone."""
    call, steps = bare_steps(Path(config))

    def turn() -> Reading:
        return {"seconds": call() / steps}

    return {"steps": steps}, turn


def cost(shape: str) -> Prepared:
    """Report parameters, and FLOPs of a training step: from shapes, from the compiled program, and by XLA."""
    config = training_config(shape, {})
    window = config.model.context_length
    flops = training_flops_per_token(config.model, window) * SHAPES[shape].tokens
    # XLA counts the body of a loop only once.
    unrolled = training_config(shape, {"model.scan_layers": False})
    step = compile_step(unrolled, window, ShardingPlan(), for_cpu=True)
    return description_only(
        {
            "parameters": total_size(parameter_shapes(config.model)),
            "flops": flops,
            "of the program": step.flops,
            "of XLA": step.counted_once,
        }
    )


# Decoding.


def export(size: str, folder: str) -> Prepared:
    """Export a model with the parameters of `weights` for the peers; as GGUF only if `gguf` is installed."""
    model = decoding_config(size, "float32", "plain").model
    params, place = weights(model), Path(folder)
    export_model(params, model, place / "transformers")
    with suppress(UserError):
        for dtype in ("float32", "bfloat16", "int8"):
            write_gguf(params, model, place / f"{dtype}.gguf", dtype=dtype)
    return description_only({"parameters": total_size(params)})


def weights(model: ModelConfig) -> transformer.Params:
    """Return the parameters that all contenders decode with."""
    return jax.jit(lambda key: transformer.init(key, model))(jax.random.key(0))


def prepare_params(size: str, dtype: str, kernel: str) -> tuple[transformer.Params, ModelConfig]:
    """Return parameters in the layout for decoding in a dtype, by plain products or by the native kernel."""
    config = decoding_config(size, dtype, kernel)
    model, wanted = for_inference(config.model), select_weight_layout(config.sampling)
    if wanted.matmul_impl != kernel:
        raise UserError(f"The {kernel} kernel is not available on this machine.")
    return to_decode_params(weights(config.model), model, wanted), model


def decoding(size: str, batch: int, dtype: str, kernel: str, prompt: int, new: int) -> Prepared:
    """Measure the seconds of a prompt of all rows, and then per greedily generated token of all rows."""
    params, model = prepare_params(size, dtype, kernel)
    key, stops = jax.random.key(1), pad_stop_ids(())
    prompts = np.random.default_rng(0).integers(0, model.vocab_size, (batch, prompt)).tolist()

    def turn() -> Reading:
        began = time.perf_counter()
        generation = jax.block_until_ready(start_generation(params, prompts, model, new))
        read = time.perf_counter()
        extended = decode_steps(params, generation, np.int32(new), (Greedy(),), key, stops, model=model)
        jax.block_until_ready(extended.tokens_BS)
        return {"prompt": read - began, "token": (time.perf_counter() - read) / new}

    turn()
    read_whole = {name: tree for name, tree in params.items() if name != "positions"}
    return {"parameter_bytes": total_bytes(read_whole)}, turn


def steadiness(size: str, dtype: str, kernel: str, prompt: int, steps: int) -> Prepared:
    """Measure the seconds of many decoding steps, the programs compiled meanwhile, and the growth of memory."""
    params, model = prepare_params(size, dtype, kernel)
    key, stops = jax.random.key(1), pad_stop_ids(())
    compiled = 0

    def count(event: str, duration: float, **_: Any) -> None:
        nonlocal compiled
        compiled += event == COMPILED

    jax.monitoring.register_event_duration_secs_listener(count)

    def step(generation: DecodeState) -> tuple[DecodeState, float]:
        began = time.perf_counter()
        after = decode_steps(params, generation, np.int32(1), (Greedy(),), key, stops, model=model)
        jax.block_until_ready(after.tokens_BS)
        return after, time.perf_counter() - began

    def turn() -> Reading:
        generation = start_generation(params, [[1] * prompt], model, model.context_length - prompt)
        for _ in range(8):
            generation, _ = step(generation)
        gc.collect()
        compiled_before, memory_before, taken = compiled, resident_memory(), []
        for _ in range(steps):
            generation, each = step(generation)
            taken.append(each)
        p50, p99 = np.percentile(taken, (50, 99))
        grown = resident_memory() - memory_before
        return {"p50": p50, "p99": p99, "compiled": compiled - compiled_before, "grown": grown, "steps": steps}

    return {}, turn


def resident_memory() -> int:
    """Return the resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


TASKS = {
    "peaks": peaks,
    "training": training,
    "bare": bare,
    "cost": cost,
    "export": export,
    "decoding": decoding,
    "steadiness": steadiness,
}

if __name__ == "__main__":
    keep_freed_memory()
    enable_compilation_cache()
    serve(TASKS)
