"""Estimates of the memory that training and inference need, from shapes alone."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from rustgpt_jax.config.schema import Config, get_path, is_enabled, partition, replace_paths, stages
from rustgpt_jax.data.pipeline import Batch
from rustgpt_jax.errors import UserError
from rustgpt_jax.evaluation.loss import chunk_size, loss_sums, total_loss
from rustgpt_jax.model.flops import Shapes, parameter_shapes, total_bytes, total_size
from rustgpt_jax.model.transformer import init_cache
from rustgpt_jax.sharding.hardware_specs import Machine
from rustgpt_jax.tracking.console import format_bytes
from rustgpt_jax.training.train_step import init_state

# Maximum number of layers to trace. The memory of deeper models is extrapolated.
MAX_TRACED_LAYERS = 64
# Bytes of a batch, per token.
BATCH_BYTES = total_bytes(Batch(*(jax.ShapeDtypeStruct((), dtype) for dtype in ("int32",) * 5)))
# Fraction of the estimated activations to count: the estimate may be too high by a factor of 2.
ACTIVATIONS_SHARE = 0.5
# Nothing is traced if a generous upper bound is below this fraction of the memory.
SKIP_BELOW_SHARE = 0.25
# The knobs that determine the memory for each purpose.
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
    """Return the shapes and dtypes of the state of a run."""
    static, hparams = partition(config)
    return jax.eval_shape(lambda: init_state(static, hparams))


def batch_shapes(rows: int, seq_len: int) -> Batch:
    """Return the shapes and dtypes of a batch."""
    types = Batch(jnp.int32, jnp.int32, jnp.float32, jnp.int32, jnp.int32)
    return Batch(*(jax.ShapeDtypeStruct((rows, seq_len), dtype) for dtype in types))


def step_bytes(config: Config, seq_len: int) -> int:
    """Return the bytes that a step needs besides the state: gradients, and residuals of the forward pass.

    These are the residuals that JAX saves; the compiler may keep fewer.
    """
    return total_bytes(parameter_shapes(config.model)) + residual_bytes(config, seq_len)


def residual_bytes(config: Config, seq_len: int) -> int:
    """Return the bytes of the residuals of one microbatch, without the parameters.

    They include what the backward pass recomputes at one time: with remat, one repeat of the pattern of blocks; with
    chunked loss, the logits of one chunk.
    """
    model, chunk = config.model, chunk_size(config.training.loss_chunk_size, config.model)
    # Offloaded residuals are not on the device, as if they were recomputed.
    remat = "full" if model.remat == "offload" else model.remat
    config = replace_paths(config, {"model.remat": remat})
    saved = saved_bytes(config, seq_len)
    recomputed = 0
    if remat != "none":
        everything = saved_bytes(replace_paths(config, {"model.remat": "none"}), seq_len)
        recomputed += (everything - saved) * min(model.period, model.n_layers) // model.n_layers
    n_tokens = config.training.batch_size // config.training.grad_accum_steps * seq_len
    if chunk < n_tokens:
        # The logits and their gradient.
        recomputed += 2 * 4 * chunk * (model.vocab_size or 1)
    return saved + recomputed


def saved_bytes(config: Config, seq_len: int) -> int:
    """Return the bytes that the forward pass of one microbatch saves for the backward pass."""
    loss, arguments = microbatch_loss(config, seq_len)

    def backward(params: Any, batch: Batch) -> Any:
        return jax.vjp(lambda params: loss(params, batch), params)[1]

    return max(0, total_bytes(jax.eval_shape(backward, *arguments)) - total_bytes(arguments[0]))


def microbatch_loss(config: Config, seq_len: int) -> tuple[Callable[[Any, Batch], jax.Array], tuple[Shapes, Batch]]:
    """Return the loss of a microbatch on an accelerator as a function that any device can trace, and its arguments."""
    rows = config.training.batch_size // config.training.grad_accum_steps
    config = replace_paths(config, {"model.save_residuals": False})
    if config.model.attention.kernel not in ("reference", "blockwise"):
        # It saves no scores, like library kernels, which cannot be traced without their devices.
        config = replace_paths(config, {"model.attention.kernel": "portable"})

    def loss(params: Any, batch: Batch) -> jax.Array:
        key = jax.random.key(0) if is_enabled(config.model.dropout) else None
        training = config.training
        sums = loss_sums(params, batch, config.model, key, training.loss_chunk_size, training.z_loss)
        return total_loss(sums, jnp.ones(()))

    return loss, (parameter_shapes(config.model), batch_shapes(rows, seq_len))


# Checks against the available memory.


def check_training_memory(
    config: Config, machine: Machine, mesh: Mapping[str, int], allow_oversubscription: bool = False
) -> None:
    """Check that a training step can fit in memory, without allocating or compiling anything.

    It checks a lower bound: an unknown vocabulary does not count, and half of the estimated activations do.

    Args:
        config: The config of a run.
        machine: The devices of this process and their memory.
        mesh: The sizes of the mesh axes; {} for one device.
        allow_oversubscription: Whether to skip the check.

    Raises:
        UserError: The step cannot fit.
    """
    for stage in {} if allow_oversubscription else dict.fromkeys(stage.config for stage in stages(config)):
        if _upper_bound(stage) > SKIP_BELOW_SHARE * machine.memory:
            # All axes but `data` shard the model, and all axes shard the rest.
            n_devices = math.prod(mesh.values())
            n_shards = n_devices // mesh.get("data", 1)
            needs = {
                name: size / (n_shards if name in MODEL else n_devices) for name, size in training_needs(stage).items()
            }
            _check("A training step", needs, stage, machine)


def training_needs(config: Config) -> dict[str, float]:
    """Return the bytes that a training step needs, by purpose, summed over all devices."""
    config, seq_len = _fill_vocab_size(config), config.seq_len

    def needs(config: Config) -> dict[str, float]:
        parameters = total_bytes(parameter_shapes(config.model))
        state = total_bytes(state_shapes(config)) - parameters
        return {
            "parameters": parameters,
            "optimizer state": 0 if config.optimizer.offload_state else state,
            "gradients": parameters,
            "activations": ACTIVATIONS_SHARE * residual_bytes(config, seq_len),
        }

    training = config.training
    batches = BATCH_BYTES * training.batch_size * seq_len * training.steps_per_jit_call
    return _extrapolate_layers(needs, config) | {"batches": batches}


def check_inference_memory(
    config: Config, machine: Machine, n_rows: int, allow_oversubscription: bool = False, n_cached: int = 0
) -> None:
    """Check that a model, and the logits of some rows or a KV cache, can fit in memory.

    Args:
        config: The config, with the vocabulary size.
        machine: The devices of this process, which shard the model, and their memory.
        n_rows: The number of rows whose logits are computed at once, or 0.
        allow_oversubscription: Whether to skip the check.
        n_cached: The number of tokens in the KV cache of one row, or 0.

    Raises:
        UserError: They cannot fit.
    """
    if allow_oversubscription:
        return
    seq_len = config.seq_len

    def needs(config: Config) -> dict[str, float]:
        found: dict[str, float] = {"parameters": total_bytes(parameter_shapes(config.model))}
        if n_cached:
            length = min(n_cached, config.model.context_length)
            found["KV cache"] = total_bytes(jax.eval_shape(lambda: init_cache(config.model, 1, length)))
        return found

    config = _fill_vocab_size(config)
    found = _extrapolate_layers(needs, config)
    if n_rows:
        chunk = min(n_rows * seq_len, chunk_size(config.training.loss_chunk_size, config.model))
        found["logits"] = 4 * chunk * (config.model.vocab_size or 1)
        found["batches"] = BATCH_BYTES * config.training.batch_size * seq_len
    found = {name: size / (machine.n_devices if name == "parameters" else 1) for name, size in found.items()}
    _check("Evaluation" if n_rows else "Generation" if n_cached else "The model", found, config, machine)


def out_of_memory_message(config: Config | None) -> str:
    """Return the message for a failed allocation: the largest uses of memory, and the knobs that determine them."""
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
    """Return a sentence about the knobs that determine the largest need."""
    part = max(needs, key=lambda name: needs[name])
    knobs = list(KNOBS[part])
    if "moe" in config.model.feedforwards and part in (*MODEL, "activations"):
        knobs.append("model.moe.n_experts")
    found = sorted(((knob, get_path(config, knob) or 0) for knob in knobs), key=lambda item: -item[1])
    values = ", ".join(f"config.{knob}={value}" for knob, value in found if value)
    more = {
        "activations": "; training.grad_accum_steps, training.loss_chunk_size and model.remat trade time for it",
        "optimizer state": "; config.mesh.fsdp shards it over devices",
        "parameters": "; config.mesh.fsdp shards them over devices",
    }
    return f"Reduce one of these: {values}{more.get(part, '')}."


def _fill_vocab_size(config: Config) -> Config:
    """Return the config with a vocabulary size, the smallest possible one if it is unknown."""
    size = config.model.vocab_size or config.tokenizer.vocab_size or 1
    return replace_paths(config, {"model.vocab_size": size})


def _upper_bound(config: Config) -> float:
    """Return an upper bound on the bytes a training step needs; it holds for common components."""
    config, seq_len = _fill_vocab_size(config), config.seq_len
    model, training = config.model, config.training
    sizes = _extrapolate_layers(lambda config: {"all": float(total_size(parameter_shapes(config.model)))}, config)
    parameters = sizes["all"]
    per_layer = parameters / model.n_layers / model.d_model + 16 * model.d_model + model.attention.n_heads * seq_len
    per_token = (
        64 * model.n_layers * per_layer + 16 * (model.vocab_size or 1) + BATCH_BYTES * training.steps_per_jit_call
    )
    return 32 * parameters + training.batch_size * seq_len * per_token


def _extrapolate_layers(needs: Callable[[Config], dict[str, float]], config: Config) -> dict[str, float]:
    """Return `needs` of a config, extrapolated from few layers: each repeat of the pattern needs the same."""
    config = replace_paths(config, {"model.scan_layers": True})
    n_layers, period = config.model.n_layers, config.model.period
    n_few = math.ceil(MAX_TRACED_LAYERS / period) * period
    if n_layers <= 2 * n_few:
        return needs(config)
    few, twice = (needs(replace_paths(config, {"model.n_layers": count})) for count in (n_few, 2 * n_few))
    scale = (n_layers - n_few) / n_few
    return {name: few[name] + scale * (twice[name] - few[name]) for name in few}
