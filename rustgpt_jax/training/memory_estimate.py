"""Estimates the memory of a training step from shapes alone, before anything is compiled."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from rustgpt_jax.config.schema import Config, is_enabled, partition, replace_paths, stages
from rustgpt_jax.data.pipeline import Batch
from rustgpt_jax.errors import UserError
from rustgpt_jax.evaluation.loss import loss_sums, total_loss
from rustgpt_jax.model.flops import Shapes, parameter_shapes, total_bytes, total_size
from rustgpt_jax.model.transformer import init_cache
from rustgpt_jax.sharding.hardware_specs import Machine
from rustgpt_jax.tracking.console import format_bytes
from rustgpt_jax.training.train_step import init_state

# Maximum number of layers to trace; needs of deeper models are extrapolated.
MAX_TRACED_LAYERS = 64
# Bytes of a batch per token.
BATCH_BYTES = total_bytes(Batch(*(jax.ShapeDtypeStruct((), dtype) for dtype in ("int32",) * 5)))
# Fraction of the estimated activations to count: the estimate may be twice too high (tests/test_memory_estimate.py).
ACTIVATIONS_SHARE = 0.5
# Skip the exact computation if a generous upper bound is below this fraction of the memory.
SKIP_BELOW_SHARE = 0.25
# The knobs that determine the size of each part.
SIZE_KNOBS = ("model.n_layers", "model.d_model", "model.vocab_size")
KNOBS = {
    "parameters": SIZE_KNOBS,
    "optimizer state": SIZE_KNOBS,
    "gradients": SIZE_KNOBS,
    "activations": (
        "training.batch_size",
        "model.context_length",
        "model.n_layers",
        "model.d_model",
        "model.vocab_size",
    ),
    "batches": ("training.batch_size", "training.steps_per_jit_call", "model.context_length"),
    "logits": ("training.batch_size", "model.context_length", "model.vocab_size"),
    "KV cache": ("model.context_length", "model.n_layers"),
}
MODEL = ("parameters", "optimizer state", "gradients")


def state_shapes(config: Config) -> Shapes:
    """Return the state of a run as shapes and dtypes."""
    static, hparams = partition(config)
    return jax.eval_shape(lambda: init_state(static, hparams))


def batch_shapes(rows: int, window: int) -> Batch:
    """Return a batch as shapes and dtypes."""
    types = Batch(jnp.int32, jnp.int32, jnp.float32, jnp.int32, jnp.int32)
    return Batch(*(jax.ShapeDtypeStruct((rows, window), dtype) for dtype in types))


def step_bytes(config: Config, window: int) -> int:
    """Return the bytes that a step needs beside the state: the gradients and the residuals of the forward pass.

    These are the residuals that JAX's differentiation saves; the compiler may keep fewer of them.
    """
    gradients = total_bytes(parameter_shapes(config.model))
    return gradients + residual_bytes(config, window)


def residual_bytes(config: Config, window: int) -> int:
    """Return the bytes of the residuals of one microbatch, without the parameters.

    With remat, this includes what the backward pass recomputes for one repeat of the pattern of blocks; with chunked
    loss, the logits of one chunk.
    """
    model, chunk = config.model, config.training.loss_chunk_size
    # Offloaded residuals are not on the device, as if they were recomputed.
    on_device = "full" if model.remat == "offload" else model.remat
    config = replace_paths(config, {"model.remat": on_device})
    kept = _saved_bytes(config, window)
    anew = 0
    if on_device != "none":
        everything = _saved_bytes(replace_paths(config, {"model.remat": "none"}), window)
        anew += (everything - kept) * min(model.period, model.n_layers) // model.n_layers
    if chunk is not None:
        whole = _saved_bytes(replace_paths(config, {"training.loss_chunk_size": None}), window)
        anew += (whole - kept) * min(chunk, window) // window
    return kept + anew


def _saved_bytes(config: Config, window: int) -> int:
    rows = config.training.batch_size // config.training.grad_accum_steps
    config = replace_paths(config, {"model.save_residuals": False})
    if config.model.attention.kernel != "plain":
        # Saves no scores, like a library kernel, which cannot be traced without its device.
        config = replace_paths(config, {"model.attention.kernel": "portable"})

    def loss(params: Any, batch: Batch) -> jax.Array:
        key = jax.random.key(0) if is_enabled(config.model.dropout) else None
        sums = loss_sums(params, batch, config.model, key, config.training.loss_chunk_size)
        return total_loss(sums, jnp.ones(()), config.training.z_loss)

    def backward(params: Any, batch: Batch) -> Any:
        return jax.vjp(lambda params: loss(params, batch), params)[1]

    shapes = parameter_shapes(config.model)
    kept = jax.eval_shape(backward, shapes, batch_shapes(rows, window))
    return max(0, total_bytes(kept) - total_bytes(shapes))


# Checks against the available memory.


def check_training_memory(config: Config, machine: Machine, mesh: Mapping[str, int], is_allowed: bool = False) -> None:
    """Check that a training step can fit the memory, without allocating or compiling anything.

    The check is a lower bound: an unknown vocabulary is ignored, and only half of the estimated activations are
    counted.

    Args:
        config: The config of a run.
        machine: The devices of this process and their memory.
        mesh: The sizes of the mesh axes; {} for one device.
        is_allowed: Whether to skip the check.

    Raises:
        UserError: The step cannot fit.
    """
    for stage in {} if is_allowed else dict.fromkeys(stage.config for stage in stages(config)):
        if _upper_bound(stage) > SKIP_BELOW_SHARE * machine.memory:
            _check("A training step", _per_device(training_needs(stage), mesh), stage, machine)


def _per_device(needs: Mapping[str, float], mesh: Mapping[str, int]) -> dict[str, float]:
    """Return the needs per device of a mesh. All axes but `data` shard the model, and all axes shard the rest."""
    n_devices = math.prod(mesh.values())
    return {
        name: size / (n_devices // mesh.get("data", 1) if name in MODEL else n_devices) for name, size in needs.items()
    }


def training_needs(config: Config) -> dict[str, float]:
    """Return the bytes that a training step needs on all devices together, by purpose."""
    config, window = _fill_vocab_size(config), _seq_len(config)

    def needs(config: Config) -> dict[str, float]:
        parameters = total_bytes(parameter_shapes(config.model))
        state = total_bytes(state_shapes(config)) - parameters
        return {
            "parameters": parameters,
            "optimizer state": 0 if config.optimizer.offload_state else state,
            "gradients": parameters,
            "activations": ACTIVATIONS_SHARE * residual_bytes(config, window),
        }

    training = config.training
    batches = BATCH_BYTES * training.batch_size * window * training.steps_per_jit_call
    return _extrapolate_layers(needs, config) | {"batches": batches}


def check_inference_memory(
    config: Config, machine: Machine, n_rows: int, is_allowed: bool = False, n_cached: int = 0
) -> None:
    """Check that a model and the logits of some rows or a KV cache can fit the memory.

    Args:
        config: A config with its vocabulary size.
        machine: The devices of this process, which share the model, and their memory.
        n_rows: The number of rows whose logits are computed at once; 0 for none.
        is_allowed: Whether to skip the check.
        n_cached: The number of tokens in the KV cache of one row, at most the context length; 0 for no cache.

    Raises:
        UserError: They cannot fit.
    """
    if is_allowed:
        return
    window = _seq_len(config)

    def needs(config: Config) -> dict[str, float]:
        found: dict[str, float] = {"parameters": total_bytes(parameter_shapes(config.model))}
        if n_cached:
            length = min(n_cached, config.model.context_length)
            found["KV cache"] = total_bytes(jax.eval_shape(lambda: init_cache(config.model, 1, length)))
        return found

    config = _fill_vocab_size(config)
    found = _extrapolate_layers(needs, config)
    if n_rows:
        chunk = min(window, config.training.loss_chunk_size or window)
        found["logits"] = 4 * n_rows * chunk * (config.model.vocab_size or 1)
        found["batches"] = BATCH_BYTES * config.training.batch_size * window
    found = {name: size / (machine.n_devices if name == "parameters" else 1) for name, size in found.items()}
    _check("Evaluation" if n_rows else "Generation" if n_cached else "The model", found, config, machine)


def out_of_memory_message(config: Config | None) -> str:
    """Return the message for a failed allocation: the largest consumers of memory, and the knobs that help."""
    failure = "There is not enough memory: an allocation failed."
    if config is None:
        return f"{failure} Use a smaller model or a shorter context, or stop other processes."
    needs = training_needs(config)
    return f"{failure} A training step of this config needs about {_format_needs(needs)}. {_remedy(needs, config)}"


def _check(what: str, needs: Mapping[str, float], config: Config, machine: Machine) -> None:
    needed = sum(needs.values())
    if needed > machine.memory:
        sizes = f"at least {format_bytes(needed)} of memory, and {format_bytes(machine.memory)} are available"
        device = f" on each of {machine.n_devices} devices" if machine.n_devices > 1 else ""
        raise UserError(
            f"{what} needs {sizes}{device}: {_format_needs(needs)}. {_remedy(needs, config)} "
            "Use --allow_oversubscription to run anyway."
        )


def _format_needs(needs: Mapping[str, float]) -> str:
    largest = sorted(needs.items(), key=lambda item: -item[1])[:3]
    return ", ".join(f"{format_bytes(size)} for {name}" for name, size in largest if size)


def _remedy(needs: Mapping[str, float], config: Config) -> str:
    """Return the knobs that determine the largest needs."""
    part = max(needs, key=lambda name: needs[name])
    knobs = list(KNOBS[part])
    if "moe" in config.model.feedforwards and part in (*MODEL, "activations"):
        knobs.append("model.moe.n_experts")
    found = sorted(((knob, _value(config, knob) or 0) for knob in knobs), key=lambda item: -item[1])
    values = ", ".join(f"config.{knob}={value}" for knob, value in found if value)
    more = {
        "activations": "; training.grad_accum_steps, training.loss_chunk_size and model.remat trade time for it",
        "optimizer state": "; config.mesh.fsdp shards it over devices",
        "parameters": "; config.mesh.fsdp shards them over devices",
    }
    return f"Reduce one of these: {values}{more.get(part, '')}."


def _value(config: Config, knob: str) -> Any:
    group, name = knob.split(".")
    return getattr(getattr(config, group), name)


def _seq_len(config: Config) -> int:
    return config.data.seq_len or config.model.context_length


def _fill_vocab_size(config: Config) -> Config:
    """Return the config with a vocabulary size, if necessary the smallest possible one."""
    size = config.model.vocab_size or config.tokenizer.vocab_size or 1
    return replace_paths(config, {"model.vocab_size": size})


def _upper_bound(config: Config) -> float:
    """Return an upper bound, for common parts, of the bytes that a training step needs."""
    config, window = _fill_vocab_size(config), _seq_len(config)
    model, training = config.model, config.training
    parameters = _extrapolate_layers(lambda config: {"all": float(total_size(parameter_shapes(config.model)))}, config)[
        "all"
    ]
    per_layer = parameters / model.n_layers / model.d_model + 16 * model.d_model + model.attention.n_heads * window
    per_token = (
        64 * model.n_layers * per_layer + 16 * (model.vocab_size or 1) + BATCH_BYTES * training.steps_per_jit_call
    )
    return 32 * parameters + training.batch_size * window * per_token


def _extrapolate_layers(needs: Callable[[Config], dict[str, float]], config: Config) -> dict[str, float]:
    """Return `needs` of a config, extrapolated from few layers, since each repeat of the pattern needs the same."""
    model = dataclasses.replace(config.model, scan_layers=True)
    config = dataclasses.replace(config, model=model)
    period = model.period
    least = math.ceil(MAX_TRACED_LAYERS / period) * period
    if model.n_layers <= 2 * least:
        return needs(config)
    few, twice = (needs(replace_paths(config, {"model.n_layers": count})) for count in (least, 2 * least))
    times = (model.n_layers - least) / least
    return {name: few[name] + times * (twice[name] - few[name]) for name in few}
