"""What a part says of itself: its parameters, its FLOPs, and how large its activations are at the beginning."""

import dataclasses
import math
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rustgpt_jax.config.schema import ModelConfig, replace_paths
from rustgpt_jax.conformance import fixtures
from rustgpt_jax.conformance.fixtures import LENGTH, Broken
from rustgpt_jax.conformance.targets import Subject
from rustgpt_jax.model import transformer
from rustgpt_jax.model.block import ON_OUTPUT, Block
from rustgpt_jax.model.flops import forward_flops_per_token, parameter_shapes, total_size
from rustgpt_jax.model.interfaces import BlockInputs
from rustgpt_jax.pytrees import flatten_paths

FLOPS_ERROR = 0.05
# Sizes at which matrix products are nearly all that there is to do.
LARGE: dict[str, Any] = {
    "d_model": 1024,
    "attention.n_heads": 8,
    "attention.head_dim": 128,
    "rope.short_factors": (1.0,) * 64,
    "rope.long_factors": (2.0,) * 64,
    "d_ff": 2048,
    "moe.d_expert": 2048,
    "mla.kv_lora_rank": 512,
    "mla.qk_rope_head_dim": 64,
    "recurrent.width": 1024,
    # Of channels that are many, a share that may be odd; it changes no product.
    "rope.fraction": 1.0,
}
WINDOW = 128
DEPTH = 16
SEEDS = 3
# The root mean square of the residual stream after DEPTH layers, where it is 1 before them. Norms on the outputs of
# sublayers make each of these as large as what they are added to.
LEAST_SCALE, MOST_SCALE = 0.5, 4.0
LOSS_ERROR = 0.1
# Gradients below this fraction of the largest one count as rounding error.
ROUNDING = 1e-5
USUAL_STD = 0.02


def parameters(subject: Subject) -> str:
    """Checks that the parameters a run plans for are the ones `init` makes, and that every one of them is used."""
    model = subject.small_model
    declared = total_size(parameter_shapes(model))
    made = flatten_paths(fixtures.initial_params(model))
    count = sum(leaf.size for leaf in made.values())
    if count != declared:
        raise Broken("more or fewer parameters are made than declared", "init", f"{count} made, {declared} declared")
    require_used(model)
    return f"{count} in the small model"


def require_used(model: ModelConfig, where: str = "") -> None:
    """Raise Broken if a parameter, or all weights of a mixer's output channel, have zero gradient."""
    what = f"is never used {where}".rstrip()
    gradient = flatten_paths(fixtures.ordinary(model).gradient)
    # A gradient that is 0 but for rounding, such as that of a bias of keys without positions, may be 0 in places.
    noise = ROUNDING * max(float(np.abs(leaf).max()) for leaf in gradient.values())
    for name, leaf in gradient.items():
        if not leaf.any():
            raise Broken(f"a parameter {what}", f"the parameter {name}", f"a gradient of 0 in all {leaf.size}")
        if "/mixer/" in name and leaf.ndim > 1 and np.abs(leaf).max() > noise:
            unused = np.flatnonzero(~leaf.any(axis=tuple(range(leaf.ndim - 1))))
            if len(unused):
                shown = f"a gradient of 0 in {len(unused)} of {leaf.shape[-1]} channels"
                raise Broken(f"a part of a parameter {what}", f"the parameter {name}, channel {unused[0]}", shown)


def flops(subject: Subject) -> str:
    """Compare the declared FLOPs, those of matrix products, with what XLA counts.

    XLA counts the body of a loop once. Layers in a loop must be declared to cost what they cost without one.
    """
    model = replace_paths(
        subject.small_model, LARGE | {"attention.n_kv_heads": 2, "n_layers": subject.small_model.period}
    )
    declared = WINDOW * forward_flops_per_token(model, WINDOW, loops_once=True)
    counted = _flops_by_xla(model)
    if abs(declared / counted - 1) > FLOPS_ERROR:
        raise Broken(
            "the declared FLOPs are not those that XLA counts",
            f"a forward over {WINDOW} tokens with d_model {LARGE['d_model']}",
            f"{declared:.4g} declared, {counted:.4g} counted, {declared / counted - 1:+.0%} "
            f"({FLOPS_ERROR:.0%} is allowed)",
        )
    deep = dataclasses.replace(model, n_layers=2 * model.period)
    looped, listed = (forward_flops_per_token(each, WINDOW) for each in (deep, _without_a_loop(deep)))
    if looped != listed:
        raise Broken(
            "layers in a loop are declared to cost other FLOPs than without one",
            f"{deep.n_layers} layers with d_model {LARGE['d_model']}",
            f"{looped:.6g} a token in a loop, {listed:.6g} without",
        )
    return f"{declared / counted - 1:+.1%} of XLA's count"


def _without_a_loop(model: ModelConfig) -> ModelConfig:
    """The same layers as one pattern that names them all: a program of as many blocks."""
    patterns = {knob: getattr(model, knob) for knob in ("mixers", "feedforwards", "positions")}
    listed = {knob: names * (model.n_layers // len(names)) for knob, names in patterns.items()}
    return dataclasses.replace(model, **listed)


def _flops_by_xla(model: ModelConfig) -> float:
    """All operations of a forward over WINDOW tokens, before XLA makes them fewer."""
    tokens = jax.ShapeDtypeStruct((1, WINDOW), jnp.int32)
    forward = jax.jit(lambda params, tokens_BT: transformer.apply(params, tokens_BT, model)[0])
    analysis: Any = forward.lower(parameter_shapes(model), tokens).cost_analysis()
    return float(analysis["flops"])


@cache
def _compiled_profile() -> Any:
    return fixtures.quick_jit(_profile, static_argnames="model")


def _profile(key: jax.Array, init_std: Any, model: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """The root mean square of the residual stream after each layer of initial parameters, and the loss."""
    model = dataclasses.replace(model, init_std=init_std)
    init_key, x_key, tokens_key = jax.random.split(key, 3)
    params = transformer.init(init_key, model)
    x_BTD = jax.random.normal(x_key, (4, LENGTH, model.d_model))
    positions_BT = jnp.broadcast_to(jnp.arange(LENGTH)[None], (4, LENGTH))
    context = BlockInputs(positions_BT, jnp.ones_like(positions_BT))

    def repeat(x_BTD: jax.Array, blocks: Any) -> tuple[jax.Array, jax.Array]:
        sizes = []
        for index in range(model.period):
            applied: Any = Block(model.block(index)).apply({"params": blocks[str(index)]}, x_BTD, context, None)
            x_BTD = applied[0]
            sizes.append(jnp.sqrt(jnp.mean(jnp.square(x_BTD))))
        return x_BTD, jnp.stack(sizes)

    _, sizes = jax.lax.scan(repeat, x_BTD, params["blocks"])
    tokens_BT = jax.random.randint(tokens_key, (4, LENGTH), 0, model.vocab_size or 0)
    log_probabilities = jax.nn.log_softmax(transformer.apply(params, tokens_BT, model)[0])
    chosen = jnp.take_along_axis(log_probabilities[:, :-1], tokens_BT[:, 1:, None], axis=-1)
    return sizes.reshape(-1), -jnp.mean(chosen)


def initial_scale(subject: Subject) -> str:
    """Over 16 layers of initial parameters the residual stream keeps its size, and the loss is that of no knowledge."""
    model = subject.small_model
    model = dataclasses.replace(model, n_layers=model.period * math.ceil(DEPTH / model.period))
    most = 2 * math.sqrt(1 + 2 * model.n_layers) if model.norm_placement in ON_OUTPUT else MOST_SCALE
    ends = []
    for seed in range(SEEDS):
        sizes, _ = jax.device_get(
            _compiled_profile()(jax.random.key(seed), np.float32(model.d_model**-0.5), model=model)
        )
        outside = np.flatnonzero(~((sizes >= LEAST_SCALE) & (sizes <= most)))
        if len(outside):
            raise Broken(
                "the residual stream grows or shrinks over the layers",
                f"layer {outside[0]}, seed {seed}",
                f"a root mean square of {sizes[outside[0]]:.3g} there and {sizes[-1]:.3g} at the end, from 1 before "
                f"the first layer ({LEAST_SCALE} to {most:.2g} is allowed)",
            )
        ends.append(float(sizes[-1]))
    _, loss = jax.device_get(_compiled_profile()(jax.random.key(0), np.float32(USUAL_STD), model=model))
    expected = math.log(model.vocab_size or 1)
    if not abs(loss - expected) <= LOSS_ERROR:
        raise Broken(
            "the loss at the beginning is not that of a uniform guess",
            f"initial parameters with init_std {USUAL_STD}",
            f"{loss:.3f} and not about ln(vocab_size) = {expected:.3f}",
        )
    return f"{min(ends):.2f} to {max(ends):.2f} after {model.n_layers} layers, from 1; loss {loss:.2f}"
