"""Checks of components outside a model: optimizers, schedules, samplers, tokenizers, corpora and launchers."""

import dataclasses
import inspect
import itertools
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rustgpt_jax.config.schema import DataConfig, OptimizerConfig, ScheduleConfig, TokenizerConfig, get_field
from rustgpt_jax.conformance.components import Component
from rustgpt_jax.conformance.fixtures import (
    CheckFailure,
    assert_close,
    assert_finite,
    assert_same_bits,
    assert_same_shapes,
    quick_jit,
    traced_fields,
)
from rustgpt_jax.data.datasets import load_documents
from rustgpt_jax.pytrees import flatten_paths
from rustgpt_jax.tokenizers import (
    SPECIAL_TOKENS,
    decode,
    encode,
    load_tokenizer,
    save_tokenizer,
    special_token_id,
    train_tokenizer,
)
from rustgpt_jax.training.optimizers import get_eval_params, make_optimizer, schedule_multiplier

# Optimizers.

OPTIMIZER = OptimizerConfig(
    learning_rate=0.02, momentum=0.9, weight_decay=0.01, weight_decay_groups=((r".*", 1.0),), clip_norm=0.0
)
# Shapes as in a model: stacked over layers inside the blocks, unstacked outside.
PARAM_SHAPES = {
    "embedding": {"table": (7, 4)},
    "blocks": {"0": {"mixer": {"query": {"kernel": (2, 4, 6), "bias": (2, 6)}}, "mixer_norm": {"scale": (2, 4)}}},
}
DESCENT_STEPS = 200
MIN_DESCENT = 0.5
# Near the minimum, an orthogonalized gradient is mostly rounding error.
FEW_STEPS = 10
TOLERANCE = 1e-4
LEARNING_RATES = np.array([0.01, 0.02, 0.05], np.float32)


def _params(seed: int = 0, scale: float = 1.0) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: np.float32(scale) * rng.standard_normal(shape, np.float32),
        PARAM_SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def optimizer_update(component: Component) -> str:
    """Check that updates have the parameters' shapes and dtypes, the state keeps its own, and all values are finite."""
    config = dataclasses.replace(OPTIMIZER, name=component.name)

    def update(gradients: Any, params: Any) -> Any:
        transformation = make_optimizer(config)
        state = transformation.init(params)
        updates, after = transformation.update(gradients, state, params)
        return updates, after, state

    compiled = quick_jit(update)
    for kind, gradients in ("zero", _params(1, 0.0)), ("ordinary", _params(1)), ("large", _params(1, 1e6)):
        params = _params()
        updates, after, state = jax.device_get(compiled(gradients, params))
        for found, expected, what in (updates, params, "an update"), (after, state, "the optimizer state"):
            assert_same_shapes(found, expected, what)
        for name, leaf in flatten_paths((updates, after)).items():
            assert_finite(leaf, f"{name} is not finite after {kind} gradients", ())
    return f"{len(flatten_paths(state))} arrays of state"


def _descend(learning_rate: Any, config: OptimizerConfig, steps: int) -> tuple[Any, Any]:
    """Return half the squared distance to a target before and after some steps, and the parameters."""
    config = dataclasses.replace(config, learning_rate=learning_rate)
    start, target = _params(0), _params(1)

    def loss(params: Any) -> Any:
        squares = jax.tree.map(lambda p, t: jnp.sum(jnp.square(p - t)) / 2, params, target)
        return sum(jax.tree.leaves(squares))

    def step(carry: Any, _: None) -> Any:
        params, state = carry
        updates, state = make_optimizer(config).update(jax.grad(loss)(params), state, params)
        return (jax.tree.map(jnp.add, params, updates), state), None

    first = jax.tree.map(jnp.asarray, start)
    (params, state), _ = jax.lax.scan(step, (first, make_optimizer(config).init(first)), None, length=steps)
    params = get_eval_params(config, params, state)
    return jnp.stack([loss(start), loss(params)]), params


def optimizer_descent(component: Component) -> str:
    """Check that the squared distance to a target decreases."""
    config = dataclasses.replace(OPTIMIZER, name=component.name)
    compiled = quick_jit(lambda rate: _descend(rate, config, DESCENT_STEPS)[0])
    before, after = jax.device_get(compiled(np.float32(0.02)))
    if not after < MIN_DESCENT * before:
        raise CheckFailure("a quadratic does not decrease", f"step {DESCENT_STEPS}", f"{before:.4g} became {after:.4g}")
    return f"{before:.3g} to {after:.2g} in {DESCENT_STEPS} steps"


def optimizer_traced(component: Component) -> str:
    """Check that one compiled program serves all hyperparameters, alone and under vmap."""
    config = dataclasses.replace(OPTIMIZER, name=component.name)
    hparams = traced_fields(config)
    del hparams["learning_rate"]
    traced = []

    def run(learning_rate: Any, hparams: Any) -> Any:
        traced.append(learning_rate)
        return _descend(learning_rate, dataclasses.replace(config, **hparams), FEW_STEPS)[1]

    compiled = quick_jit(run)
    alone = [jax.device_get(compiled(rate, hparams)) for rate in LEARNING_RATES]
    if len(traced) > 1:
        raise CheckFailure("a new learning rate compiles a new program", "the second rate", f"{len(traced)} programs")
    together = jax.device_get(quick_jit(jax.vmap(run, in_axes=(0, None)))(LEARNING_RATES, hparams))
    constant = jax.device_get(quick_jit(lambda: _descend(float(LEARNING_RATES[0]), config, FEW_STEPS)[1])())
    worst = 0.0
    for name, leaf in flatten_paths(constant).items():
        what = f"{name} differs between traced and constant hyperparameters"
        worst = max(worst, assert_close(flatten_paths(alone[0])[name], leaf, TOLERANCE, what, ()))
    for trial in range(len(LEARNING_RATES)):
        for name, leaf in flatten_paths(alone[trial]).items():
            what = f"trial {trial} under vmap differs from the same trial alone: {name}"
            worst = max(worst, assert_close(flatten_paths(together)[name][trial], leaf, TOLERANCE, what, ()))
    return f"one program; {len(LEARNING_RATES)} trials within {worst:.0e}"


# Schedules.

SCHEDULE = ScheduleConfig(warmup_steps=5, decay_frac=0.2, final_lr_frac=0.1)
MAX_STEPS = 64


def _compiled_multipliers(config: ScheduleConfig) -> Any:
    def all_steps(steps: Any, hparams: Any) -> Any:
        here = dataclasses.replace(config, **hparams)
        return jax.vmap(lambda step: schedule_multiplier(step, steps, here))(jnp.arange(MAX_STEPS))

    return quick_jit(all_steps)


def schedule_range(component: Component) -> str:
    """Check that the multiplier is in [0, 1] at every step of a run of any length, and above 0 at the first."""
    compiled = _compiled_multipliers(dataclasses.replace(SCHEDULE, name=component.name))
    cases = list(
        itertools.product((1, 2, 7, MAX_STEPS), (0, 1, 5, 2 * MAX_STEPS), ((0.0, 0.0), (0.2, 0.1), (1.0, 1.0)))
    )
    for steps, warmup, (decay, final) in cases:
        hparams = {"warmup_steps": warmup, "decay_frac": decay, "final_lr_frac": final}
        values = np.asarray(compiled(steps, hparams))[:steps]
        where = f"of {steps} with {warmup} warmup steps, decay_frac {decay} and final_lr_frac {final}"
        outside = np.flatnonzero(~((values >= 0) & (values <= 1 + 1e-6)))
        if len(outside):
            what = "the multiplier is not between 0 and 1"
            raise CheckFailure(what, f"step {outside[0]} {where}", f"{values[outside[0]]:.6g}")
        if values[0] <= 0:
            raise CheckFailure("the first step has no learning rate", f"step 0 {where}", f"{values[0]:.6g}")
    return f"{len(cases)} combinations of lengths and hyperparameters"


def schedule_traced(component: Component) -> str:
    """Check that traced hyperparameters give the same multipliers as Python numbers."""
    config = dataclasses.replace(SCHEDULE, name=component.name)
    traced = _compiled_multipliers(config)(np.float32(MAX_STEPS), traced_fields(config))
    constant = quick_jit(
        lambda: jax.vmap(lambda step: schedule_multiplier(step, MAX_STEPS, config))(jnp.arange(MAX_STEPS))
    )()
    what = "the multiplier differs between traced and constant hyperparameters"
    return f"within {assert_close(traced, constant, TOLERANCE, what, ('step',)):.0e}"


# Samplers.


def sampler_distribution(component: Component) -> str:
    """Check that logits keep shape and dtype, each row keeps a token, and no excluded token comes back."""
    shares, compiled = [], _compiled_sampler(component)
    for value in _sampler_values(component.name):
        logits_BV, seen_BV = _random_logits(0)
        found = np.asarray(compiled(np.float32(value), logits_BV, seen_BV))
        where = f"the value {value}"
        if (found.shape, found.dtype) != (logits_BV.shape, logits_BV.dtype):
            raise CheckFailure("the logits change their shape or dtype", where, f"{found.dtype}{list(found.shape)}")
        is_excluded_BV = logits_BV == -np.inf
        for is_wrong_BV, what in (
            (np.isnan(found) | (found == np.inf), "a logit is infinite or NaN"),
            (is_excluded_BV & (found > -np.inf), "an excluded token comes back"),
        ):
            if is_wrong_BV.any():
                row, token = np.argwhere(is_wrong_BV)[0]
                shown = f"{logits_BV[row, token]:.3g} became {found[row, token]:.3g}"
                raise CheckFailure(what, f"row {row}, token {token}, {where}", shown)
        empty = np.flatnonzero((found == -np.inf).all(axis=1))
        if len(empty):
            raise CheckFailure("no token remains", f"row {empty[0]}, {where}", "all logits are -inf")
        shares.append(np.mean(np.isfinite(found)) / np.mean(~is_excluded_BV))
    return f"{min(shares):.0%} to {max(shares):.0%} of the tokens remain"


def sampler_rows(component: Component) -> str:
    """Check that the result for a row does not depend on the other rows or on its index."""
    value = np.float32(_sampler_values(component.name)[0])
    logits_BV, seen_BV = _random_logits(1)
    compiled = _compiled_sampler(component)
    found = np.asarray(compiled(value, logits_BV, seen_BV))
    order = np.random.default_rng(2).permutation(len(logits_BV))
    permuted = np.asarray(compiled(value, logits_BV[order], seen_BV[order]))
    assert_same_bits(permuted, found[order], "a row changes with its index", ("row", "token"))
    others, _ = _random_logits(3)
    others[0] = logits_BV[0]
    other = np.asarray(compiled(value, others, seen_BV))
    assert_same_bits(other[:1], found[:1], "a row changes with the other rows", ("row", "token"))
    return f"{len(order)} rows, bit-equal"


def _compiled_sampler(component: Component) -> Any:
    make_sampler = component.value[1] if isinstance(component.value, tuple) else component.value
    return quick_jit(lambda value, logits_BV, seen_BV: make_sampler(value)(logits_BV, seen_BV))


def _sampler_values(name: str) -> tuple[float, ...]:
    """Return values in the range of the sampler's config field."""
    try:
        limits = get_field(f"sampling.{name}").metadata
    except KeyError:
        return (1.0,)
    return (0.3, 0.9, 1.0) if limits["high"] == 1.0 else (1.0, 2.5, 7.0)


def _random_logits(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    logits_BV = 4 * rng.standard_normal((6, 50)).astype(np.float32)
    logits_BV[:, rng.choice(50, 10, replace=False)] = -np.inf
    logits_BV[1, 3:] = -np.inf
    logits_BV[1, :3] = 2.0
    return logits_BV, rng.random((6, 50)) < 0.3


# Tokenizers.

# Tokenizers that are documented to lose some of the spacing: decoded text must encode to the same tokens.
LOSSY = ("word",)
TEXTS = (
    "It was the best of times, it was the worst of times.",
    "two  spaces,\ttabs\n\nand\r\nlines\n",
    " leading and trailing ",
    "naïve café – 'quotes' “more” … §½",
    "日本語 Ελληνικά العربية हिन्दी",
    "👩‍👩‍👧 e\u0301 \u200b\ufeff\u00a0\u2028",
    "\x00\x07\x7f",
    f"text that says {SPECIAL_TOKENS[0]} is text",
    "￭",
    "",
)
VOCAB_SIZE = 300


def tokenizer_round_trip(component: Component) -> str:
    """Check that every text is recovered from its tokens, and that no text is encoded to special tokens."""
    tokenizer = train_tokenizer(TokenizerConfig(component.name, VOCAB_SIZE), TEXTS)
    special = {special_token_id(tokenizer, token) for token in SPECIAL_TOKENS}
    recovered = 0
    for index, text in enumerate(TEXTS):
        ids, where = encode(tokenizer, text), f"text {index}, {text!r}"
        if special & set(ids):
            raise CheckFailure("a text is encoded to a special token", where, str(sorted(special & set(ids))))
        if (largest := max(ids, default=0)) >= tokenizer.get_vocab_size():
            raise CheckFailure("a token is outside the vocabulary", where, str(largest))
        back = decode(tokenizer, ids)
        if back != text and (component.name not in LOSSY or encode(tokenizer, back) != ids):
            raise CheckFailure("a text is not recovered from its tokens", f"text {index}", f"{text!r} became {back!r}")
        recovered += back == text
    return f"{recovered} of {len(TEXTS)} texts recovered"


def tokenizer_determinism(component: Component) -> str:
    """Check that training twice gives the same tokenizer, and that a loaded tokenizer equals the saved one."""
    config = TokenizerConfig(component.name, VOCAB_SIZE)
    first, second = train_tokenizer(config, TEXTS), train_tokenizer(config, TEXTS)
    if first.serialized != second.serialized:
        index = next(i for i, (a, b) in enumerate(itertools.zip_longest(first.serialized, second.serialized)) if a != b)
        shown = f"{first.serialized[index : index + 30]!r} and {second.serialized[index : index + 30]!r}"
        raise CheckFailure("the same texts give different tokenizers", f"character {index} of the JSON", shown)
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(first, Path(folder) / "tokenizer.json")
        loaded = load_tokenizer(Path(folder) / "tokenizer.json")
    for index, text in enumerate(TEXTS):
        if encode(loaded, text) != encode(first, text):
            raise CheckFailure("a loaded tokenizer differs from the saved one", f"text {index}", repr(text))
    return f"{first.get_vocab_size()} tokens"


# Corpora and launchers.


def corpus_documents(component: Component) -> str:
    """Check that two passes give the same documents, and that each names its source."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("a.txt", "b.txt"):
            (Path(folder) / name).write_text(f"The text of {name}.\n", encoding="utf-8")
        config = DataConfig(corpus=component.name, paths=(f"{folder}/*.txt",), max_documents=40)
        first, second = list(load_documents(config)), list(load_documents(config))
    if not first:
        raise CheckFailure("there are no documents", component.name, "0")
    for index, (one, other) in enumerate(itertools.zip_longest(first, second)):
        if one != other:
            what = "the second pass gives a different document"
            raise CheckFailure(what, f"document {index}", f"{one!r:.60} and {other!r:.60}")
        if not one.name:
            raise CheckFailure("a document has no name", f"document {index}", repr(one.text[:60]))
    return f"{len(first)} documents twice"


def launcher_interface(component: Component) -> str:
    """Check that a launcher is a function of (launch, chunks) with a docstring."""
    names = list(inspect.signature(component.value).parameters)
    if names != ["launch", "chunks"]:
        raise CheckFailure("a launcher must be a function of (launch, chunks)", component.name, f"({', '.join(names)})")
    if not inspect.getdoc(component.value):
        raise CheckFailure("a launcher needs a docstring that says where trials run", component.name, "it has none")
    return "(launch, chunks)"
