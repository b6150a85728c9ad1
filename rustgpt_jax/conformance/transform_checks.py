"""What a program is turned into must not change what it computes: other layouts of layers, remat, and vmap."""

import dataclasses
import json
import os
import subprocess
import sys
from functools import cache
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rustgpt_jax.config.schema import ModelConfig, flatten, replace_paths
from rustgpt_jax.conformance import fixtures
from rustgpt_jax.conformance.fixtures import LENGTH, ROWS_OF_LOGITS, SMALL, Broken, crash, require_close
from rustgpt_jax.conformance.long_row_checks import (
    Case,
    cached_forward,
    forward,
    influence,
    long_model,
    packed_rows,
    whole_rows,
)
from rustgpt_jax.conformance.targets import Subject, subjects
from rustgpt_jax.model import transformer
from rustgpt_jax.pytrees import flatten_paths

LOGITS_CLOSE = 5e-5
# A gradient is a sum over all tokens, in which much may cancel.
GRADIENTS_CLOSE = 5e-4
TRIALS = 3
HIDDEN = ("row", "token", "channel")
# These rows share their compiled program with the check of rows.
ROWS_OF_DROPOUT, LENGTH_OF_DROPOUT = 2, 40


def require_close_results(found: fixtures.Result, expected: fixtures.Result, what: str) -> float:
    """The largest relative difference of logits and gradients. Raises Broken if it is more than rounding gives."""
    worst = require_close(
        found.logits_BTV, expected.logits_BTV, LOGITS_CLOSE, f"{what}: the logits differ", ROWS_OF_LOGITS
    )
    gradients = flatten_paths(found.gradient)
    # A gradient that would be 0 but for rounding, as that of a bias of keys, has no size of its own.
    noise = 1e-3 * max(float(np.sqrt(np.mean(np.square(leaf)))) for leaf in jax.tree.leaves(expected.gradient))
    for name, leaf in flatten_paths(expected.gradient).items():
        gradient = f"{what}: the gradient of {name}"
        worst = max(worst, require_close(gradients[name], leaf, GRADIENTS_CLOSE, gradient, (), least_size=noise))
    return worst


def unrolled_is_scanned(subject: Subject) -> str:
    """The layers run in a loop, and one after another, give the same."""
    return _same_with(subject.small_model, "unrolled layers are not scanned ones", scan_layers=False)


def remat_is_none(subject: Subject) -> str:
    """What the backward pass computes again is what the forward pass computed."""
    notes = [_same_with(subject.small_model, f"remat {each!r} is not 'none'", remat=each) for each in ("dots", "full")]
    return notes[-1]


def _same_with(model: ModelConfig, what: str, **changes: Any) -> str:
    rows = fixtures.rows_of(fixtures.random_tokens(model), model)
    found = fixtures.run(fixtures.random_params(model), rows, dataclasses.replace(model, **changes))
    return f"within {require_close_results(found, fixtures.ordinary(model), what):.0e}"


def dropout(subject: Subject) -> str:
    """Check that evaluation drops nothing, with or without a cache, and that training with no drops matches it."""
    model = long_model(subject.small_model)
    dropping = dataclasses.replace(model, dropout=0.5)
    params, packed = fixtures.random_params(model), packed_rows(model, ROWS_OF_DROPOUT, LENGTH_OF_DROPOUT)
    expected, found = (forward(params, packed, each) for each in (model, dropping))
    what = "evaluation changes with the rate of dropout"
    worst = require_close(found, expected, LOGITS_CLOSE, what, HIDDEN, packed.segments_BT > 0)
    training, evaluation = (influence(model, Case(64, 3, is_training=each)) for each in (True, False))
    is_token_BT = evaluation.packed.segments_BT > 0
    what = "a training that drops nothing is not what evaluation is"
    outputs = training.output_BTD, evaluation.output_BTD
    worst = max(worst, require_close(*outputs, LOGITS_CLOSE, what, HIDDEN, is_token_BT))
    what = "the slopes of a training that drops nothing are not those of evaluation"
    slopes = training.slopes_KBT, evaluation.slopes_KBT
    worst = max(worst, require_close(*slopes, GRADIENTS_CLOSE, what, ("probe", "row", "token")))
    whole = whole_rows(model, 1, LENGTH + 1)
    caches: list[Any] = [transformer.init_cache(each, 1, LENGTH + 1) for each in (model, dropping)]
    for places in slice(0, LENGTH), slice(LENGTH, LENGTH + 1):
        piece = jax.tree.map(lambda leaf, places=places: leaf[:, places], whole)
        expected, caches[0] = cached_forward(params, piece, caches[0], model)
        found, caches[1] = cached_forward(params, piece, caches[1], dropping)
        what = "with a cache, the outputs change with the rate of dropout"
        worst = max(worst, require_close(found, expected, LOGITS_CLOSE, what, HIDDEN))
    return f"within {worst:.0e}"


@cache
def _compiled_trials() -> Any:
    def one(params: Any, hparams: Any, rows: fixtures.Rows, model: ModelConfig) -> fixtures.Result:
        return fixtures.forward_and_backward(params, rows, replace_paths(model, hparams))

    def all_trials(params: Any, hparams: Any, rows: fixtures.Rows, model: ModelConfig) -> fixtures.Result:
        return jax.vmap(lambda params, hparams: one(params, hparams, rows, model))(params, hparams)

    return fixtures.quick_jit(all_trials, static_argnames="model")


@cache
def _compiled_inits() -> Any:
    def one(key: jax.Array, hparams: Any, model: ModelConfig) -> Any:
        return transformer.init(key, replace_paths(model, hparams))

    def all_trials(keys: jax.Array, hparams: Any, model: ModelConfig) -> Any:
        return jax.vmap(lambda key, hparams: one(key, hparams, model))(keys, hparams)

    return fixtures.quick_jit(all_trials, static_argnames="model")


def vmap_is_loop(subject: Subject) -> str:
    """Trials side by side, their parameters and their numbers as arguments, are what each is alone.

    So a fused sweep runs; the numbers are the knobs of the model that are no structure, such as norm_eps.
    """
    model = subject.small_model
    hparams = {name: np.repeat(value, TRIALS) for name, value in fixtures.numbers_of(model).items()}
    keys = jax.vmap(jax.random.key)(np.arange(TRIALS))
    initial = jax.device_get(_compiled_inits()(keys, hparams, model=model))
    worst = 0.0
    for trial in range(TRIALS):
        alone = flatten_paths(fixtures.initial_params(model, trial))
        for name, leaf in flatten_paths(initial).items():
            what = f"trial {trial} of vmap is not what it is alone: the initial {name}"
            worst = max(worst, require_close(leaf[trial], alone[name], LOGITS_CLOSE, what, ()))

    rows = fixtures.rows_of(fixtures.random_tokens(model), model)
    several = [fixtures.random_params(model, seed) for seed in range(TRIALS)]
    params = jax.tree.map(lambda *leaves: np.stack(leaves), *several)
    together = jax.device_get(_compiled_trials()(params, hparams, rows, model=model))
    for trial in range(TRIALS):
        alone_result = fixtures.run(several[trial], rows, model)
        one = jax.tree.map(lambda leaf, trial=trial: leaf[trial], together)
        what = f"trial {trial} of vmap is not what it is alone"
        worst = max(worst, require_close_results(one, alone_result, what))
    return f"{TRIALS} trials within {worst:.0e}"


# A batch that is shared by eight devices gives what it gives on one.
#
# Where a process has fewer devices, the check runs in a child process,
# `python -m rustgpt_jax.conformance.transform_checks`.

DEVICES = 8


def eight_devices_are_one(subject: Subject) -> str:
    """Logits and gradients with the rows of the batch over eight devices, against those of one device."""
    if len(jax.devices()) < DEVICES:
        return _in_a_child(subject)
    model = subject.small_model
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:DEVICES])
    cut, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    params = fixtures.random_params(model)
    rows = fixtures.rows_of(fixtures.random_tokens(model), model)
    shared = rows._replace(**{name: jax.device_put(getattr(rows, name), cut) for name in rows._fields[:-1]})
    found = fixtures.run(jax.device_put(params, whole), shared, model)
    largest = require_close_results(found, fixtures.ordinary(model), "eight devices are not one")
    return f"within {largest:.0e}"


def _in_a_child(subject: Subject) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    changes = {field: value for field, value in flatten(subject.small_model).items() if value != SMALL[field]}
    command = [sys.executable, "-m", "rustgpt_jax.conformance.transform_checks", subject.title, json.dumps(changes)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().rsplit("\n", 1)[-1])
    answer = json.loads(done.stdout.strip().rsplit("\n", 1)[-1])
    if "broken" in answer:
        raise Broken(*answer["broken"])
    return answer["note"]


def main(title: str, changes: str) -> None:
    """Run the check on eight virtual devices of the CPU, and print what came of it as a line of JSON."""
    use_eight_cpu_devices()
    (subject,) = subjects(title, json.loads(changes))
    answer: dict[str, Any]
    try:
        with fixtures.conditions():
            answer = {"note": eight_devices_are_one(subject)}
    except Broken as broken:
        answer = {"broken": broken.args}
    except Exception as error:
        answer = {"broken": ("the part fails on eight devices", "its forward or backward pass", crash(error))}
    print(json.dumps(answer))


def use_eight_cpu_devices() -> None:
    """Make eight devices of a CPU. To be called before JAX is used; an accelerator is left as it is."""
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", DEVICES)


if __name__ == "__main__":
    main(*sys.argv[1:])
