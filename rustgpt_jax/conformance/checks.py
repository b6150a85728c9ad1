"""The table of checks: what each is for, and what usually breaks it."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from rustgpt_jax.config.schema import ModelConfig, replace_paths
from rustgpt_jax.conformance import (
    component_checks,
    cost_checks,
    long_row_checks,
    masking_checks,
    numerics_checks,
    optimizer_checks,
    transform_checks,
)
from rustgpt_jax.conformance.cost_checks import require_used
from rustgpt_jax.conformance.fixtures import LENGTH
from rustgpt_jax.conformance.long_row_checks import Case, influence, long_model
from rustgpt_jax.conformance.masking_checks import cached_is_uncached, require_causal
from rustgpt_jax.conformance.targets import MODEL_KINDS, Subject
from rustgpt_jax.model import transformer
from rustgpt_jax.model.flops import parameter_shapes
from rustgpt_jax.model.mixers import has_cache

# Check mixers with other numbers of key-value heads than the small model has.

CASE = Case(17, 3)


def heads(subject: Subject) -> str:
    """Check causality, parameter use and the KV cache with one, two and all key-value heads."""
    model = subject.small_model
    counts = [count for count in (1, 2, model.attention.n_heads) if model.attention.n_heads % count == 0]
    others = {count: replace_paths(model, {"attention.n_kv_heads": count}) for count in counts}
    others = {count: other for count, other in others.items() if _shapes(other) != _shapes(model)}
    for count, other in others.items():
        here = f"with {count} of {model.attention.n_heads} heads of keys and values"
        there = dataclasses.replace(subject, model=other)
        require_causal(influence(long_model(other), CASE), CASE, here)
        require_used(other, here)
        cached_is_uncached(there)
    shown = ", ".join(map(str, others))
    return f"{shown} heads of keys and values too" if others else "no number of parameters depends on n_kv_heads"


def _shapes(model: ModelConfig) -> Any:
    cached = jax.eval_shape(lambda: transformer.init_cache(model, 1, LENGTH))
    return [leaf.shape for leaf in jax.tree.leaves((parameter_shapes(model), cached))]


@dataclass(frozen=True)
class Check:
    """A check: a function of a target that returns what it measured, or raises Broken.

    `cause` is the usual cause of a failure.
    """

    function: Callable[[Subject], str]
    kinds: Sequence[str]
    cause: str


CHECKS: dict[str, Check] = {
    "shapes": Check(
        numerics_checks.shapes,
        MODEL_KINDS,
        "A result is not cast back to the type of the input, or a shape is taken from the input where the config "
        "should say it.",
    ),
    "finite": Check(
        numerics_checks.finite,
        MODEL_KINDS,
        "An exponential without its maximum taken off, a division without an epsilon, or a root whose slope at 0 is "
        "infinite (a `where` after the root does not help its gradient: put one before it).",
    ),
    "precision": Check(
        numerics_checks.precision,
        MODEL_KINDS,
        "A softmax, a norm or a state that is computed in the type of the activations; widen it first.",
    ),
    "gradients": Check(
        numerics_checks.gradients,
        MODEL_KINDS,
        "A stop_gradient, a custom derivative that is not that of the function, or numbers that are made float32 on "
        "the way (use `precision.widened`).",
    ),
    "causality": Check(
        masking_checks.causality,
        MODEL_KINDS,
        "A mask that is off by one, a convolution padded on both sides, or a mean, norm or sort over the tokens.",
    ),
    "isolation": Check(
        masking_checks.isolation,
        MODEL_KINDS,
        "context.segments_BT is not read: a mask without documents, a state or a convolution that goes on from one "
        "document into the next, positions that are counted within the row, or statistics over the batch.",
    ),
    "rows": Check(
        masking_checks.rows,
        MODEL_KINDS,
        "The number of a row, the size of the batch, the first row, or the length of the rows is used.",
    ),
    "padding": Check(
        masking_checks.padding,
        MODEL_KINDS,
        "Tokens of segment 0 take part in a sum, a mean or a state, or a row of a softmax has nothing in it.",
    ),
    "cache": Check(
        masking_checks.cached_is_uncached,
        MODEL_KINDS,
        "A token is written to the wrong slot, the new tokens do not see the cached ones (or see slots that are "
        "empty), positions begin at 0 again, or padding is written to the cache.",
    ),
    "prefill": Check(
        masking_checks.prefill,
        MODEL_KINDS,
        "Prompts of some lengths are read by other code than the rest, a ring of slots wraps wrongly, or a position "
        "leaves the range that it is kept in.",
    ),
    "heads": Check(
        heads,
        MODEL_KINDS,
        "Heads of queries are matched with those of keys and values for one number of them only.",
    ),
    "dropout": Check(
        transform_checks.dropout,
        MODEL_KINDS,
        "context.dropout_key is None in evaluation, and nothing is to be dropped or scaled then.",
    ),
    "drift": Check(
        long_row_checks.drift,
        MODEL_KINDS,
        "A state, a decay or a position in bfloat16, or a decay a^t that is divided by instead of a^(t - s).",
    ),
    "layers": Check(
        transform_checks.unrolled_is_scanned,
        MODEL_KINDS,
        "The part keeps something in Python between calls, such as a counter of layers.",
    ),
    "remat": Check(
        transform_checks.remat_is_none,
        MODEL_KINDS,
        "The part is no pure function: it reads or keeps something in Python, or draws randomness without a key.",
    ),
    "vmap": Check(
        transform_checks.vmap_is_loop,
        MODEL_KINDS,
        "Python looks at a value (`if`, `float`, `int`) that is an argument of the program, or a shape depends on it.",
    ),
    "devices": Check(
        transform_checks.eight_devices_are_one,
        MODEL_KINDS,
        "Something is computed over the batch, or depends on its size or on the devices.",
    ),
    "parameters": Check(
        cost_checks.parameters,
        MODEL_KINDS,
        "A parameter is made and not used, or used where its effect is nothing.",
    ),
    "flops": Check(
        cost_checks.flops,
        MODEL_KINDS,
        "Work that is no matrix product, such as a product written as a broadcast and a sum, or a custom kernel.",
    ),
    "initial_scale": Check(
        cost_checks.initial_scale,
        MODEL_KINDS,
        "The projection into the residual stream is not Linear(..., residual=True), or weights are not initialised "
        "with init_std.",
    ),
    "optimizer_update": Check(
        optimizer_checks.optimizer_update,
        ("optimizers",),
        "A state of another type than the parameters', or a division by a norm that may be 0.",
    ),
    "optimizer_descent": Check(
        optimizer_checks.optimizer_descent,
        ("optimizers",),
        "The sign of the update, or a learning rate that is not read.",
    ),
    "optimizer_numbers": Check(
        optimizer_checks.optimizer_numbers,
        ("optimizers",),
        "Python looks at a number (`if`, `float`), or a transformation that must have a constant.",
    ),
    "schedule_factor": Check(
        optimizer_checks.schedule_factor,
        ("schedules",),
        "A run that is shorter than its warm-up, or a division by a number of steps that is 0.",
    ),
    "schedule_numbers": Check(
        optimizer_checks.schedule_numbers, ("schedules",), "Python looks at a number (`if`, `int`) that is an argument."
    ),
    "sampler_distribution": Check(
        component_checks.sampler_distribution,
        ("samplers",),
        "-inf minus -inf or times 0, ties with the last token that is kept, or a threshold that leaves nothing.",
    ),
    "sampler_rows": Check(
        component_checks.sampler_rows, ("samplers",), "A sum, sort or maximum over all rows where each row has its own."
    ),
    "tokenizer_round_trip": Check(
        component_checks.tokenizer_round_trip,
        ("tokenizers",),
        "A normaliser that changes text, a prefix space, or characters without a fallback to bytes.",
    ),
    "tokenizer_same": Check(
        component_checks.tokenizer_same,
        ("tokenizers",),
        "The order of a set or of a dictionary of counts decides ties.",
    ),
    "corpus_documents": Check(
        component_checks.corpus_documents,
        ("corpora",),
        "The order of files in a folder, a clock, or randomness decides.",
    ),
    "launcher_interface": Check(
        component_checks.launcher_interface, ("launchers",), "Arguments of another name; see sweeps/sweep.py."
    ),
}


def checks_for(subject: Subject, only: Sequence[str] = ()) -> dict[str, Check]:
    """Returns the checks that apply to a component, restricted to those in `only` if there are any.

    `prefill` compares ways to fill a cache, so it does not apply to a mixer without one.
    """
    names = [name for name, check in CHECKS.items() if subject.kind in check.kinds and (not only or name in only)]
    if subject.model is not None and not all(has_cache(mixer) for mixer in subject.model.mixers):
        names = [name for name in names if name != "prefill"]
    return {name: CHECKS[name] for name in names}
