"""Checks of the program: parameters, FLOPs, dropout, and transformations that must not change what it computes."""

import dataclasses
import json
import os
import subprocess
import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rustgpt_jax.config.schema import ModelConfig, flatten, replace_paths
from rustgpt_jax.conformance.components import Component, Scope, find_components
from rustgpt_jax.conformance.fixtures import (
    LENGTH,
    LOGIT_AXES,
    SMALL,
    Batch,
    CheckFailure,
    Outputs,
    assert_close,
    check_settings,
    format_exception,
    forward_and_backward,
    init_cache,
    initial_params,
    make_batch,
    quick_jit,
    random_params,
    random_tokens,
    reference_outputs,
    run_model,
    traced_fields,
)
from rustgpt_jax.conformance.packed_sequences import (
    CASES,
    HIDDEN_AXES,
    compute_influence,
    model_for_long_rows,
    packed_rows,
    run_cached_forward,
    run_forward,
    single_document_rows,
)
from rustgpt_jax.model import transformer
from rustgpt_jax.model.flops import forward_flops_per_token, parameter_shapes, total_size
from rustgpt_jax.pytrees import flatten_paths
from rustgpt_jax.sharding.hardware_specs import use_cpu_devices

# Parameters and FLOPs.

# Gradients below this fraction of the largest one count as rounding error.
ROUNDING = 1e-5
FLOPS_TOLERANCE = 0.05
# Sizes at which almost all the work is in matmuls.
LARGE: dict[str, Any] = {
    "d_model": 1024,
    "attention.n_heads": 8,
    "attention.head_dim": 128,
    "rope.short_factors": (1.0,) * 64,
    "rope.long_factors": (2.0,) * 64,
    "d_ff": 2048,
    "moe.d_expert": 2048,
    "moe.kernel": "blocked",
    "mla.kv_lora_rank": 512,
    "mla.qk_rope_head_dim": 64,
    "recurrent.width": 1024,
    # A smaller fraction could give an odd number of channels; the fraction does not change any matmul.
    "rope.fraction": 1.0,
}
FLOPS_TOKENS = 128


def parameters(component: Component) -> str:
    """Check that `init` creates as many parameters as a run plans for, and that each of them is used."""
    model = component.small_model
    planned = total_size(parameter_shapes(model))
    count = sum(leaf.size for leaf in jax.tree.leaves(initial_params(model)))
    if count != planned:
        raise CheckFailure("init does not create the planned number of parameters", "init", f"{count}, not {planned}")
    assert_parameters_used(model)
    return f"{count} in the small model"


def assert_parameters_used(model: ModelConfig, where: str = "") -> None:
    """Raise CheckFailure if a parameter, or all weights of a mixer's output channel, have zero gradient."""
    what = f"is never used {where}".rstrip()
    gradient = flatten_paths(reference_outputs(model).gradient)
    # A gradient that is only rounding error, such as that of a key bias without positions, may be 0 in places.
    noise = ROUNDING * max(float(np.abs(leaf).max()) for leaf in gradient.values())
    for name, leaf in gradient.items():
        if not leaf.any():
            raise CheckFailure(f"a parameter {what}", f"the parameter {name}", f"a gradient of 0 in all {leaf.size}")
        if "/mixer/" in name and leaf.ndim > 1 and np.abs(leaf).max() > noise:
            unused = np.flatnonzero(~leaf.any(axis=tuple(range(leaf.ndim - 1))))
            if len(unused):
                shown = f"a gradient of 0 in {len(unused)} of {leaf.shape[-1]} channels"
                raise CheckFailure(f"a part of a parameter {what}", f"the parameter {name}, channel {unused[0]}", shown)


def flops(component: Component) -> str:
    """Check that the FLOPs that runs report, those of matmuls, are close to XLA's count.

    XLA counts the body of a loop once. The reported FLOPs must be the same for layers in a loop and without one.
    """
    period = component.small_model.period
    model = replace_paths(component.small_model, LARGE | {"attention.n_kv_heads": 2, "n_layers": period})
    tokens = jax.ShapeDtypeStruct((1, FLOPS_TOKENS), jnp.int32)
    forward = jax.jit(lambda params, tokens_BT: transformer.apply(params, tokens_BT, model)[0])
    # Before optimization.
    analysis: Any = forward.lower(parameter_shapes(model), tokens).cost_analysis()
    counted = float(analysis["flops"])
    reported = FLOPS_TOKENS * forward_flops_per_token(model, FLOPS_TOKENS, loops_once=True)
    if abs(reported / counted - 1) > FLOPS_TOLERANCE:
        raise CheckFailure(
            "the reported FLOPs differ from XLA's count",
            f"a forward pass over {FLOPS_TOKENS} tokens with d_model {model.d_model}",
            f"{reported:.4g} reported, {counted:.4g} counted, {reported / counted - 1:+.0%} "
            f"({FLOPS_TOLERANCE:.0%} is allowed)",
        )
    deep = dataclasses.replace(model, n_layers=2 * period)
    patterns = {field: getattr(deep, field) for field in ("mixers", "feedforwards", "positions")}
    # The same layers as one pattern that names all of them, which is not a loop.
    listed = dataclasses.replace(
        deep, **{field: names * (2 * period // len(names)) for field, names in patterns.items()}
    )
    with_loop, without = (forward_flops_per_token(each, FLOPS_TOKENS) for each in (deep, listed))
    if with_loop != without:
        raise CheckFailure(
            "the reported FLOPs of layers in a loop differ from those without one",
            f"{deep.n_layers} layers with d_model {model.d_model}",
            f"{with_loop:.6g} a token in a loop, {without:.6g} without",
        )
    return f"{reported / counted - 1:+.1%} of XLA's count"


# Transformations.

LOGIT_TOLERANCE = 5e-5
# A gradient is a sum over all tokens, in which terms may cancel.
GRADIENT_TOLERANCE = 5e-4
TRIALS = 3
DEVICES = 8


def assert_close_outputs(found: Outputs, expected: Outputs, what: str) -> float:
    """Return the largest relative difference of logits and gradients. Raises CheckFailure if it exceeds rounding."""
    worst = assert_close(
        found.logits_BTV, expected.logits_BTV, LOGIT_TOLERANCE, f"{what}: the logits differ", LOGIT_AXES
    )
    gradients = flatten_paths(found.gradient)
    # A gradient that is only rounding error, such as that of a key bias, has no meaningful scale.
    noise = 1e-3 * max(float(np.sqrt(np.mean(np.square(leaf)))) for leaf in jax.tree.leaves(expected.gradient))
    for name, leaf in flatten_paths(expected.gradient).items():
        gradient = f"{what}: the gradient of {name}"
        worst = max(worst, assert_close(gradients[name], leaf, GRADIENT_TOLERANCE, gradient, (), min_scale=noise))
    return worst


def layers(component: Component) -> str:
    """Check that scanned and unrolled layers give the same outputs and gradients."""
    model = component.small_model
    what = "unrolled layers differ from scanned ones"
    return f"within {_assert_same_with(model, what, scan_layers=False):.0e}"


def remat(component: Component) -> str:
    """Check that rematerialization does not change outputs or gradients."""
    policies = ("dots", "full") if component.scope is Scope.EXHAUSTIVE else ("full",)
    differences = [
        _assert_same_with(component.small_model, f"remat {policy!r} differs from 'none'", remat=policy)
        for policy in policies
    ]
    return f"within {max(differences):.0e}"


def _assert_same_with(model: ModelConfig, what: str, **changes: Any) -> float:
    batch = make_batch(random_tokens(model), model)
    found = run_model(random_params(model), batch, dataclasses.replace(model, **changes))
    return assert_close_outputs(found, reference_outputs(model), what)


def dropout(component: Component) -> str:
    """Check that evaluation drops nothing, with or without a cache, and equals training that drops nothing."""
    model = model_for_long_rows(component)
    case = CASES[component.scope][0]
    dropping = dataclasses.replace(model, dropout=0.5)
    params, packed = random_params(model), packed_rows(model, 2, 40)
    expected, found = (run_forward(params, packed, each) for each in (model, dropping))
    what = "evaluation changes with the dropout rate"
    worst = [assert_close(found, expected, LOGIT_TOLERANCE, what, HIDDEN_AXES, packed.segments_BT > 0)]
    training, evaluation = (compute_influence(model, case._replace(is_training=each)) for each in (True, False))
    is_token_BT = evaluation.packed.segments_BT > 0
    what = "training that drops nothing differs from evaluation"
    outputs = training.output_BTD, evaluation.output_BTD
    worst.append(assert_close(*outputs, LOGIT_TOLERANCE, what, HIDDEN_AXES, is_token_BT))
    what = "the gradients of training that drops nothing differ from those of evaluation"
    gradients = training.gradients_KBT, evaluation.gradients_KBT
    worst.append(assert_close(*gradients, GRADIENT_TOLERANCE, what, ("probe", "row", "token")))
    rows = single_document_rows(model, 1, LENGTH + 1)
    caches = [init_cache(each, 1, LENGTH + 1) for each in (model, dropping)]
    for positions in slice(0, LENGTH), slice(LENGTH, LENGTH + 1):
        piece = jax.tree.map(lambda leaf, positions=positions: leaf[:, positions], rows)
        expected, caches[0] = run_cached_forward(params, piece, caches[0], model)
        found, caches[1] = run_cached_forward(params, piece, caches[1], dropping)
        what = "with a cache, the outputs change with the dropout rate"
        worst.append(assert_close(found, expected, LOGIT_TOLERANCE, what, HIDDEN_AXES))
    return f"within {max(worst):.0e}"


@partial(quick_jit, static_argnums=4)
def _run_trials(keys: Any, params: Any, hparams: Any, batch: Batch, model: ModelConfig) -> tuple[Any, Outputs]:
    def run_trial(key: Any, params: Any, hparams: Any) -> tuple[Any, Outputs]:
        trial_model = replace_paths(model, hparams)
        return transformer.init(key, trial_model), forward_and_backward(params, batch, trial_model)

    return jax.vmap(run_trial)(keys, params, hparams)


def vmap(component: Component) -> str:
    """Check that trials under vmap, with traced fields such as norm_eps as arguments, equal each trial alone.

    A sweep in one program relies on this.
    """
    model = component.small_model
    hparams = {name: np.repeat(value, TRIALS) for name, value in traced_fields(model).items()}
    keys = jax.vmap(jax.random.key)(np.arange(TRIALS))
    batch = make_batch(random_tokens(model), model)
    several = [random_params(model, seed) for seed in range(TRIALS)]
    params = jax.tree.map(lambda *leaves: np.stack(leaves), *several)
    initial, outputs = jax.device_get(_run_trials(keys, params, hparams, batch, model))
    worst = 0.0
    for trial in range(TRIALS):
        what = f"trial {trial} under vmap differs from the same trial alone"
        alone = flatten_paths(initial_params(model, trial))
        for name, leaf in flatten_paths(initial).items():
            here = f"{what}: the initial {name}"
            worst = max(worst, assert_close(leaf[trial], alone[name], LOGIT_TOLERANCE, here, ()))
        one = jax.tree.map(lambda leaf, trial=trial: leaf[trial], outputs)
        worst = max(worst, assert_close_outputs(one, run_model(several[trial], batch, model), what))
    return f"{TRIALS} trials within {worst:.0e}"


def devices(component: Component) -> str:
    """Check that logits and gradients of a batch split over eight devices equal those of one device.

    A process with fewer devices starts a child process, `python -m rustgpt_jax.conformance.transform_checks`.
    """
    if len(jax.devices()) < DEVICES:
        return _check_in_child_process(component)
    model = component.small_model
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:DEVICES])
    split, replicated = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    batch = make_batch(random_tokens(model), model)
    sharded = batch._replace(**{name: jax.device_put(getattr(batch, name), split) for name in batch._fields[:-1]})
    found = run_model(jax.device_put(random_params(model), replicated), sharded, model)
    return f"within {assert_close_outputs(found, reference_outputs(model), 'eight devices differ from one'):.0e}"


def _check_in_child_process(component: Component) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    values = flatten(component.small_model)
    changes = json.dumps({field: value for field, value in values.items() if value != SMALL[field]})
    command = [sys.executable, "-m", "rustgpt_jax.conformance.transform_checks", component.title, changes]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().rsplit("\n", 1)[-1])
    answer = json.loads(done.stdout.strip().rsplit("\n", 1)[-1])
    if "failure" in answer:
        raise CheckFailure(*answer["failure"])
    return answer["note"]


def main(title: str, changes: str) -> None:
    """Run the check on eight virtual CPU devices, and print its result as a line of JSON."""
    use_cpu_devices(DEVICES)
    (component,) = find_components(title, json.loads(changes))
    answer: dict[str, Any]
    try:
        with check_settings():
            answer = {"note": devices(component)}
    except CheckFailure as failure:
        answer = {"failure": failure.args}
    except Exception as error:
        where = "its forward or backward pass"
        answer = {"failure": ("the component fails on eight devices", where, format_exception(error))}
    print(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
