"""Checks of the selected attention kernels against `reference`, before a model is trained.

A kernel may be wrong for a device, a head width or a version of a library, so each is compared with `reference` in
float32, in value and gradient, on small arrays with the head widths of the model.
"""

from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rustgpt_jax.config.schema import ModelConfig, is_enabled, replace_paths
from rustgpt_jax.errors import UserError
from rustgpt_jax.model.block import layer_groups
from rustgpt_jax.model.interfaces import BlockInputs
from rustgpt_jax.model.kernels import AttentionInputs, Device, current_device
from rustgpt_jax.model.kernels.attention import KERNELS, KernelChoice, attention_inputs, select_kernel
from rustgpt_jax.model.matmul import to_float32
from rustgpt_jax.model.mixers import MIXERS
from rustgpt_jax.registry import lookup

# Maximum length of a row in a check: more than one block of every kernel, and a multiple of the lengths they need.
MAX_TOKENS = 640
# Largest relative differences that rounding can cause: a few units in the last place.
TOLERANCES = {"float32": 1e-4, "bfloat16": 3e-2}


class KernelCheck(NamedTuple):
    """The kernel that was selected for a mixer, and how it compares with the reference.

    Attributes:
        mixer: Name of the mixer, with its position encoding if the mixer is used with several.
        choice: The kernel and the reason for its selection.
        difference: Largest relative difference from the reference; None for the reference itself.
    """

    mixer: str
    choice: KernelChoice
    difference: float | None

    @property
    def message(self) -> str:
        """A line such as 'attention: cudnn, because this is a gpu (differs from the reference by 3e-03)'."""
        text = f"{self.mixer}: {self.choice.kernel}, because {self.choice.reason}"
        return text if self.difference is None else f"{text} (differs from the reference by {self.difference:.0e})"


def select_kernels(model: ModelConfig, device: Device, length: int) -> dict[str, KernelChoice]:
    """Return the kernel for each mixer with attention, when training on rows of `length` tokens on a device.

    Raises:
        UserError: The config names a kernel that does not support one of the mixers.
    """
    dropout = is_enabled(model.dropout)
    return {
        name: select_kernel(
            model.attention.kernel,
            mixer.attention_spec(block, length, is_cached=False, has_dropout=dropout, device=device),
        )
        for name, (mixer, block) in _attention_blocks(model).items()
    }


def check_kernels(model: ModelConfig, length: int) -> list[KernelCheck]:
    """Compare the selected kernels with `reference` on the default device.

    Raises:
        UserError: A difference is larger than rounding can cause.
    """
    blocks = _attention_blocks(model)
    checks = []
    for name, choice in select_kernels(model, current_device(), length).items():
        difference = None
        if choice.kernel != "reference":
            mixer, block = blocks[name]
            difference = largest_difference(choice.kernel, *_random_inputs(mixer, block, length))
            if not difference <= TOLERANCES[block.dtype]:
                raise UserError(
                    f"Attention by {choice.kernel} ({name}) is wrong on this device: it differs from the reference by "
                    f"{difference:.0e} of its largest value, and rounding to {block.dtype} can cause only "
                    f"{TOLERANCES[block.dtype]:.0e}. Set config.model.attention.kernel=portable."
                )
        checks.append(KernelCheck(name, choice, difference))
    return checks


def largest_difference(kernel: str, inputs: AttentionInputs, cotangent_BTHC: jax.Array) -> float:
    """Compare the values and gradients of a kernel with those of `reference` in float32.

    Args:
        kernel: Name of the kernel.
        inputs: Inputs of the kernel.
        cotangent_BTHC: Gradient with respect to the values that the kernel returns.

    Returns:
        The largest difference as a share of the largest magnitude of each array, without padding; NaN if one is NaN.
    """
    arrays = (inputs.q_BTHC, inputs.k_BSKC, inputs.v_BSKC)
    is_token_BT11 = (inputs.block_inputs.segments_BT > 0)[:, :, None, None]

    def compute(name: str, arrays: tuple[jax.Array, ...], cotangent_BTHC: jax.Array) -> list[np.ndarray]:
        def attend(q_BTHC: jax.Array, k_BSKC: jax.Array, v_BSKC: jax.Array) -> jax.Array:
            mixed = KERNELS[name].attend(inputs._replace(q_BTHC=q_BTHC, k_BSKC=k_BSKC, v_BSKC=v_BSKC))
            return jnp.where(is_token_BT11, mixed.reshape(cotangent_BTHC.shape), 0)

        def values_and_gradients(arrays: tuple[jax.Array, ...], cotangent_BTHC: jax.Array) -> tuple[jax.Array, ...]:
            mixed_BTHC, pullback = jax.vjp(attend, *arrays)
            return mixed_BTHC, *pullback(cotangent_BTHC)

        # By default, matrix units may round float32 to fewer bits, for a kernel and the reference differently.
        precision = None if arrays[0].dtype == jnp.bfloat16 else "highest"
        with jax.default_matmul_precision(precision):
            return [np.asarray(array, np.float64) for array in jax.jit(values_and_gradients)(arrays, cotangent_BTHC)]

    expected = compute("reference", tuple(map(to_float32, arrays)), to_float32(cotangent_BTHC))
    pairs = zip(compute(kernel, arrays, cotangent_BTHC), expected, strict=True)
    return float(np.max([np.max(np.abs(actual - right)) / np.max(np.abs(right)) for actual, right in pairs]))


def _attention_blocks(model: ModelConfig) -> dict[str, tuple[Any, ModelConfig]]:
    """Return the distinct mixers with attention, each with the config of its block."""
    found: dict[tuple[str, str], tuple[Any, ModelConfig]] = {}
    for group in layer_groups(model):
        (mixer_name,), (position,) = group.block.mixers, group.block.positions
        mixer = lookup(MIXERS, mixer_name, "config.model.mixers")
        if hasattr(mixer, "attention_spec"):
            found[mixer_name, position] = (mixer, group.block.mixer_config)
    n_encodings = Counter(name for name, _ in found)
    return {
        name if n_encodings[name] == 1 else f"{name} with {position}": block
        for (name, position), block in found.items()
    }


def _random_inputs(mixer: Any, block: ModelConfig, length: int) -> tuple[AttentionInputs, jax.Array]:
    """Return random inputs for a block's attention, and a cotangent of its output.

    One row is one document; the other has two documents and padding, whose cotangent is 0. The window is shorter than a
    row, and there are at most two key/value heads.
    """
    length = min(length, MAX_TOKENS)
    n_kv_heads = block.attention.kv_heads
    fewer = min(2, n_kv_heads)
    block = replace_paths(
        block,
        {
            "attention.n_heads": block.attention.n_heads // n_kv_heads * fewer,
            "attention.n_kv_heads": fewer,
            "attention.head_dim": block.head_width,
            "attention.local_window": min(block.attention.local_window, length // 4 + 1),
        },
    )
    spec = mixer.attention_spec(block, length, is_cached=False, has_dropout=False)
    rng = np.random.default_rng(0)

    def random(heads: int, channels: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal((2, length, heads, channels)), block.dtype)

    first, end = length // 3, length - length // 8
    segments_BT, positions_BT = np.ones((2, length), np.int32), np.tile(np.arange(length, dtype=np.int32), (2, 1))
    segments_BT[1, first:end], segments_BT[1, end:] = 2, 0
    positions_BT[1, first:] -= first
    inputs = BlockInputs(jnp.asarray(positions_BT), jnp.asarray(segments_BT))
    sinks_H = jnp.asarray(rng.standard_normal(spec.n_heads), jnp.float32) if spec.sinks else None
    queries, keys = random(spec.n_heads, spec.head_width), random(spec.n_kv_heads, spec.head_width)
    values = random(spec.n_kv_heads, spec.value_width)
    cotangent_BTHC = jnp.where((inputs.segments_BT > 0)[:, :, None, None], random(spec.n_heads, spec.value_width), 0)
    return attention_inputs(block, (queries, keys, values), inputs, spec.window, sinks_H), cotangent_BTHC
