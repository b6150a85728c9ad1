"""What attention of a model is computed by, and whether it computes what the reference does.

A kernel may be wrong on a device, for a head width or a version of a library: so, before a model is trained, each that
was chosen is held against `plain` in float32, in value and gradient, on small arrays of the model's own widths.
"""

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

# Tokens of a row in a check, at most: more than one block of every kernel, and a multiple of what any of them needs.
MOST_TOKENS = 640
# Differences, as a share of the largest magnitude, that rounding explains: some units in the last place of the type.
TOLERANCES = {"float32": 1e-4, "bfloat16": 3e-2}


class Finding(NamedTuple):
    """What attention of a mixer is computed by.

    mixer: its name in the config, with its position scheme where the mixer alone does not tell. difference: the largest
    between it and the reference, as a share of the reference's largest magnitude; None for the reference itself.
    """

    mixer: str
    choice: KernelChoice
    difference: float | None

    @property
    def sentence(self) -> str:
        """'attention: cudnn, because this is a gpu (differs from the reference by 3e-03)'."""
        text = f"{self.mixer}: {self.choice.kernel}, because {self.choice.reason}"
        return text if self.difference is None else f"{text} (differs from the reference by {self.difference:.0e})"


def attention_choices(model: ModelConfig, device: Device, length: int) -> dict[str, KernelChoice]:
    """The kernel that serves each mixer with attention when rows of `length` tokens are trained on, by mixer.

    Starts no JAX if the device is given. Raises UserError for a kernel asked for by name that cannot serve all.
    """
    dropout = is_enabled(model.dropout)
    return {
        name: select_kernel(
            model.attention.kernel,
            mixer.attention_spec(block, length, is_cached=False, has_dropout=dropout, device=device),
        )
        for name, (mixer, block) in _attention_blocks(model).items()
    }


def check_kernels(model: ModelConfig, length: int) -> list[Finding]:
    """Each choice with how far it is from the reference, on the device at hand; nothing is computed for `plain`.

    Raises UserError for a difference that rounding does not explain.
    """
    blocks = _attention_blocks(model)
    findings = []
    for name, choice in attention_choices(model, current_device(), length).items():
        difference = None
        if choice.kernel != "plain":
            mixer, block = blocks[name]
            difference = largest_difference(choice.kernel, *_small_inputs(mixer, block, length))
            if not difference <= TOLERANCES[block.dtype]:
                raise UserError(
                    f"Attention by {choice.kernel} ({name}) is wrong on this device: it differs from the reference by "
                    f"{difference:.0e} of its largest value, where {block.dtype} explains "
                    f"{TOLERANCES[block.dtype]:.0e}. Set config.model.attention.kernel=portable."
                )
        findings.append(Finding(name, choice, difference))
    return findings


def largest_difference(kernel: str, inputs: AttentionInputs, cotangent_BTHC: jax.Array) -> float:
    """How far the values and gradients of a kernel are from those of `plain` in float32, for a cotangent of the values.

    Of each array, the largest difference as a share of the largest magnitude; of these the largest, NaN if one is NaN.
    Values of padding do not count.
    """
    arrays = (inputs.q_BTHC, inputs.k_BSKC, inputs.v_BSKC)
    is_token_BT11 = (inputs.context.segments_BT > 0)[:, :, None, None]

    def computed(name: str, arrays: tuple[jax.Array, ...], cotangent_BTHC: jax.Array) -> list[np.ndarray]:
        def attend(*arrays: jax.Array) -> jax.Array:
            q_BTHC, k_BSKC, v_BSKC = arrays
            mixed = KERNELS[name].attend(inputs._replace(q_BTHC=q_BTHC, k_BSKC=k_BSKC, v_BSKC=v_BSKC))
            return jnp.where(is_token_BT11, mixed.reshape(cotangent_BTHC.shape), 0)

        def both(arrays: tuple[jax.Array, ...], cotangent_BTHC: jax.Array) -> tuple[jax.Array, ...]:
            mixed_BTHC, pullback = jax.vjp(attend, *arrays)
            return mixed_BTHC, *pullback(cotangent_BTHC)

        # Units for matrix products would round float32 to fewer digits, for a kernel and the reference differently.
        is_wide = arrays[0].dtype != jnp.bfloat16
        with jax.default_matmul_precision("highest" if is_wide else None):
            return [np.asarray(array, np.float64) for array in jax.jit(both)(arrays, cotangent_BTHC)]

    expected = computed("plain", tuple(map(to_float32, arrays)), to_float32(cotangent_BTHC))
    pairs = zip(computed(kernel, arrays, cotangent_BTHC), expected, strict=True)
    return float(np.max([np.max(np.abs(got - right)) / np.max(np.abs(right)) for got, right in pairs]))


def _attention_blocks(model: ModelConfig) -> dict[str, tuple[Any, ModelConfig]]:
    """The mixers with attention and the configs of their blocks, one for each kind of block."""
    found: dict[tuple[str, str], tuple[Any, ModelConfig]] = {}
    for stack in layer_groups(model):
        (mixer_name,), (position,) = stack.block.mixers, stack.block.positions
        mixer = lookup(MIXERS, mixer_name, "config.model.mixers")
        if hasattr(mixer, "attention_spec"):
            found[mixer_name, position] = (mixer, stack.block.mixer_config)
    schemes = {mixer: sum(name == mixer for name, _ in found) for mixer, _ in found}
    return {
        name if schemes[name] == 1 else f"{name} with {position}": block for (name, position), block in found.items()
    }


def _small_inputs(mixer: Any, block: ModelConfig, length: int) -> tuple[AttentionInputs, jax.Array]:
    """Random arrays as a block of a model has them, and a cotangent of what a kernel gives for them.

    A row is one document, the other has two and padding, whose cotangent is 0. A window is short, so that tokens leave
    it; heads are of two groups at most.
    """
    length = min(length, MOST_TOKENS)
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
    context = BlockInputs(jnp.asarray(positions_BT), jnp.asarray(segments_BT))
    sinks_H = jnp.asarray(rng.standard_normal(spec.n_heads), jnp.float32) if spec.sinks else None
    queries, keys = random(spec.n_heads, spec.head_width), random(spec.n_kv_heads, spec.head_width)
    values = random(spec.n_kv_heads, spec.value_width)
    cotangent_BTHC = jnp.where((context.segments_BT > 0)[:, :, None, None], random(spec.n_heads, spec.value_width), 0)
    return attention_inputs(block, (queries, keys, values), context, spec.window, sinks_H), cotangent_BTHC
