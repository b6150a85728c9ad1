"""Benchmark tasks of one JAX process: training, decoding, sweeping, reproduction and kernel checks of a GPT-2.

python -m experiments.benchmarks.gpt2_jax '{"what": "training", "size": "124m", "batch": 16}'

Prints one measurement as JSON; `accelerator.py` runs many and collects them. The argument names one of TASKS and the
arguments of its function. A training step is the framework's own, compiled as `train` compiles it, with several steps
per call; decoding is what `generate` does. Calls are timed after two warm-up calls: the first compiles, and the second
has its arguments on the device.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs import shakespeare_char
from experiments.benchmarks.best_batch import make_config, serve_task
from rustgpt_jax.config.schema import Config, ModelConfig, partition, replace_paths
from rustgpt_jax.config.validation import resolve
from rustgpt_jax.data.pipeline import Batch
from rustgpt_jax.inference.generate import decode_steps, pad_stop_ids, start_generation
from rustgpt_jax.inference.sampling import Greedy
from rustgpt_jax.model import transformer
from rustgpt_jax.model.flops import parameter_shapes, total_bytes, total_size, training_flops_per_token
from rustgpt_jax.model.interfaces import BlockInputs
from rustgpt_jax.model.kernels import AttentionInputs, current_device
from rustgpt_jax.model.kernels.attention import KERNELS, attention_inputs
from rustgpt_jax.model.kernels.verify import TOLERANCES, largest_difference, select_kernels
from rustgpt_jax.model.mixers.attention import Attention
from rustgpt_jax.process_setup import enable_compilation_cache
from rustgpt_jax.pytrees import fingerprint_tree
from rustgpt_jax.training.checkpointing import Checkpoints
from rustgpt_jax.training.train_step import (
    StepArgs,
    TrainState,
    compiled_init_state,
    compiled_population_steps,
    compiled_train_steps,
    stack,
)
from rustgpt_jax.workdir.environment import collect_environment

WARM_UP = 2


def machine(sizes: list[str]) -> dict[str, Any]:
    """Return the device, versions, and the costs of models of some sizes."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "kind": device.device_kind,
        "memory": (device.memory_stats() or {}).get("bytes_limit"),
        "environment": collect_environment(),
        "costs": {size: cost(make_config(size).model) for size in sizes},
    }


def cost(model: ModelConfig) -> dict[str, float]:
    """Return the number of parameters, and the training FLOPs per token as `rustgpt_jax.model.flops` counts them."""
    # The products inside library kernels are invisible, so count those of reference attention.
    counted = replace_paths(model, {"attention.kernel": "reference"})
    return {
        "parameters": total_size(parameter_shapes(model)),
        "flops_per_token": training_flops_per_token(counted, model.context_length),
    }


def checks(size: str) -> list[dict[str, Any]]:
    """Compare values and gradients of each kernel with the float32 reference, or give the reason it is unsupported."""
    block = make_config(size).model.block(0)
    request = Attention.attention_spec(block, block.context_length, is_cached=False, has_dropout=False)
    found: list[dict[str, Any]] = []
    for name, kernel in KERNELS.items():
        row: dict[str, Any] = {"size": size, "kernel": name, "dtype": block.dtype}
        if (reason := kernel.unsupported_reason(request)) is not None:
            row["refuses"] = reason
        else:
            try:
                row |= {
                    "difference": largest_difference(name, *attention_task(block)),
                    "tolerance": TOLERANCES[block.dtype],
                }
            except Exception as error:
                row["failed"] = f"{type(error).__name__}: {error}"
        found.append(row)
    return found


def attention_task(block: ModelConfig) -> tuple[AttentionInputs, jax.Array]:
    """Return attention inputs of two full-length rows, one with two documents and padding, and a cotangent."""
    length, rng = block.context_length, np.random.default_rng(0)
    places_T = np.arange(length, dtype=np.int32)
    border, end = length // 3, length - length // 8
    segments_BT = np.stack([np.ones_like(places_T), 1 + (places_T >= border)]).astype(np.int32)
    segments_BT[1, end:] = 0
    positions_BT = np.stack([places_T, np.where(places_T < border, places_T, places_T - border)])
    queries, keys, values, cotangent_BTHC = (
        jnp.asarray(rng.standard_normal((2, length, block.attention.n_heads, block.head_width)), block.dtype)
        for _ in range(4)
    )
    inputs = BlockInputs(jnp.asarray(positions_BT), jnp.asarray(segments_BT))
    cotangent_BTHC = jnp.where((inputs.segments_BT > 0)[:, :, None, None], cotangent_BTHC, 0)
    return attention_inputs(block, (queries, keys, values), inputs, None, None), cotangent_BTHC


def training(size: str, batch: int, knobs: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Return the seconds per step of several calls, at a batch size and with some knobs changed."""
    config = make_config(size, {"training.batch_size": batch} | knobs)
    steps = config.training.steps_per_jit_call
    compiling, seconds, losses = timed(trainer(config), repeats)
    if not np.isfinite(losses).all():
        raise ArithmeticError(f"the loss is {losses}")
    choices = select_kernels(config.model, current_device(), config.model.context_length)
    return {
        "seconds": [each / steps for each in seconds],
        "tokens": batch * config.model.context_length,
        "memory": peak_memory(),
        "first_call": compiling,
        "kernel": ", ".join(choice.kernel for choice in choices.values()),
    }


def trainer(config: Config) -> Callable[[], jax.Array]:
    """Return a function that trains for one call of the compiled program and returns the losses."""
    static, arguments = partition(config)
    steps = np.int32(config.training.steps_per_jit_call)
    batches = jax.device_put(synthetic(config, (int(steps), config.training.batch_size)))
    state = jax.block_until_ready(compiled_init_state(static, arguments))

    def call() -> jax.Array:
        nonlocal state
        state, metrics = compiled_train_steps(static, state, batches, steps, arguments, np.zeros((), np.int32))
        return metrics.loss

    return call


def synthetic(config: Config, lead: tuple[int, ...], seed: int = 0) -> Batch:
    """Return sequences of random tokens, each a single document whose tokens all count in the loss."""
    model = config.model
    shape = (*lead, model.context_length)
    tokens = np.random.default_rng(seed).integers(0, model.vocab_size, shape, np.int32)
    positions = np.broadcast_to(np.arange(model.context_length, dtype=np.int32), shape)
    return Batch(tokens, np.roll(tokens, -1, -1), np.ones(shape, np.float32), np.ones(shape, np.int32), positions)


def decoding(size: str, batch: int, scan_layers: bool, prompt: int, new: int, repeats: int) -> dict[str, Any]:
    """Return the seconds per decoding step of all rows, and the bytes that a step must read: parameters and cache.

    Parameters are in the compute dtype. On average, the cache of a row holds its prompt and half of the new tokens.
    """
    model = make_config(size, {"model.scan_layers": scan_layers}).model
    narrowed = jax.jit(
        lambda key: jax.tree.map(lambda leaf: leaf.astype(model.dtype), transformer.init(key, model)),
    )
    params = narrowed(jax.random.key(0))
    prompts = np.random.default_rng(0).integers(0, model.vocab_size, (batch, prompt)).tolist()
    key, stops = jax.random.key(1), pad_stop_ids(())

    def call(generation: Any) -> jax.Array:
        return decode_steps(params, generation, np.int32(new), (Greedy(),), key, stops, model=model).tokens_BS

    compiling, seconds, _ = timed(call, repeats, lambda: start_generation(params, prompts, model, new))
    # Only one row of the position table is read.
    read_whole = {name: tree for name, tree in params.items() if name != "positions"}
    cached_token = total_bytes(jax.eval_shape(partial(transformer.init_cache, model, 1, 1)))
    return {
        "seconds": [each / new for each in seconds],
        "parameter_bytes": total_bytes(read_whole),
        "cache_bytes": int(batch * (prompt + new / 2) * cached_token),
        "memory": peak_memory(),
        "first_call": compiling,
    }


def small_trials(trials: int, knobs: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Return the seconds per step of all trials of a small model: fused, and in consecutive calls."""
    tree = shakespeare_char.get_config()
    tree.model.vocab_size = 65
    config = replace_paths(resolve(tree), knobs)
    static, hparams = partition(config)
    each = [
        hparams | {"seed": np.uint32(index), "optimizer.learning_rate": np.float32(1e-3 * (1 + index % 4))}
        for index in range(trials)
    ]
    steps, zero = config.training.steps_per_jit_call, np.zeros((), np.int32)
    batches = synthetic(config, (steps, config.training.batch_size))
    on_device = jax.device_put(batches)
    states = [compiled_init_state(static, arguments) for arguments in each]
    states_P = jax.device_put(stack(states))
    orders_P = jax.device_put(stack([StepArgs(batches, np.int32(steps), arguments, zero) for arguments in each]))

    def one_after_another() -> list[jax.Array]:
        losses = []
        for index, arguments in enumerate(each):
            states[index], metrics = compiled_train_steps(
                static, states[index], on_device, np.int32(steps), arguments, zero
            )
            losses.append(metrics.loss)
        return losses

    def together() -> jax.Array:
        nonlocal states_P
        states_P, metrics_P = compiled_population_steps("fused", static, states_P, orders_P)
        return metrics_P.loss

    _, alone, losses = timed(one_after_another, repeats)
    _, fused, losses_P = timed(together, repeats)
    # Both ran the same steps, but sum in different orders, and training amplifies the differences.
    difference = float(np.max(np.abs(np.stack(losses) - losses_P)))
    return {
        "trials": trials,
        "one_after_another": [seconds / steps for seconds in alone],
        "fused": [seconds / steps for seconds in fused],
        "difference": difference,
        "memory": peak_memory(),
    }


def reproduction(size: str, batch: int, folder: str, resumes: bool) -> dict[str, Any]:
    """Return fingerprints of the state after two calls, whose first state is saved in a folder.

    If `resumes`, the second call is also made from the state that another process saved.
    """
    config = make_config(size, {"training.batch_size": batch})
    static, arguments = partition(config)
    steps = config.training.steps_per_jit_call

    def advance(state: TrainState, seed: int) -> TrainState:
        batches = synthetic(config, (steps, batch), seed)
        return compiled_train_steps(static, state, batches, np.int32(steps), arguments, np.zeros((), np.int32))[0]

    with Checkpoints(Path(folder), config, is_writer=not resumes) as checkpoints:
        state = advance(compiled_init_state(static, arguments), seed=0)
        found: dict[str, Any] = {"steps": 2 * steps}
        if resumes:
            restored = checkpoints.restore_step(jax.eval_shape(lambda: state), steps)
            found["resumed"] = fingerprint_tree(advance(restored, seed=1))
        else:
            checkpoints.save(state, steps)
        return found | {"whole": fingerprint_tree(advance(state, seed=1))}


def timed(
    call: Callable[..., Any], repeats: int, prepare: Callable[[], Any] | None = None
) -> tuple[float, list[float], Any]:
    """Return the seconds of the first call, which compiles, of each call after the warm-up, and the last result.

    `prepare` makes the argument of each call, and is not timed.
    """
    seconds, result = [], None
    for _ in range(WARM_UP + repeats):
        arguments = () if prepare is None else (jax.block_until_ready(prepare()),)
        began = time.perf_counter()
        result = jax.block_until_ready(call(*arguments))
        seconds.append(time.perf_counter() - began)
    return seconds[0], seconds[WARM_UP:], jax.device_get(result)


def peak_memory() -> int | None:
    """Return the peak memory of this process on its device in bytes; None if the device does not report it."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


TASKS = {
    "machine": machine,
    "checks": checks,
    "training": training,
    "decoding": decoding,
    "sweep": small_trials,
    "reproduction": reproduction,
}

if __name__ == "__main__":
    enable_compilation_cache()
    serve_task(TASKS)
