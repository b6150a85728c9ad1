"""Check mixers with other numbers of key-value heads than the small model has."""

import dataclasses
from typing import Any

import jax

from rustgpt_jax.config.schema import ModelConfig
from rustgpt_jax.conformance.cost_checks import require_used
from rustgpt_jax.conformance.long_row_checks import Case, influence, long_model
from rustgpt_jax.conformance.masking_checks import cached_is_uncached, require_causal
from rustgpt_jax.conformance.targets import Subject
from rustgpt_jax.conformance.tiny_config import LENGTH
from rustgpt_jax.model import transformer
from rustgpt_jax.model.flops import parameter_shapes

CASE = Case(17, 3)


def heads(subject: Subject) -> str:
    """Check causality, parameter use and the KV cache with one, two and all key-value heads."""
    model = subject.small_model
    counts = [count for count in (1, 2, model.n_heads) if model.n_heads % count == 0]
    others = {count: dataclasses.replace(model, n_kv_heads=count) for count in counts}
    others = {count: other for count, other in others.items() if _shapes(other) != _shapes(model)}
    for count, other in others.items():
        here = f"with {count} of {model.n_heads} heads of keys and values"
        there = dataclasses.replace(subject, model=other)
        require_causal(influence(long_model(other), CASE), CASE, here)
        require_used(other, here)
        cached_is_uncached(there)
    shown = ", ".join(map(str, others))
    return f"{shown} heads of keys and values too" if others else "no number of parameters depends on n_kv_heads"


def _shapes(model: ModelConfig) -> Any:
    cached = jax.eval_shape(lambda: transformer.init_cache(model, 1, LENGTH))
    return [leaf.shape for leaf in jax.tree.leaves((parameter_shapes(model), cached))]
