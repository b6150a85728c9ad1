"""The checks: each finds the mistake that it is there to find, and what is registered makes none."""

import dataclasses
import io
import re
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest
from broken_parts import MISTAKES, Mistake
from rich.console import Console

from rustgpt_jax.config import ModelConfig
from rustgpt_jax.conformance import isolation, programs
from rustgpt_jax.conformance.broken import Broken, require_close, require_finite, require_same_bits
from rustgpt_jax.conformance.checks import CHECKS, checks_for
from rustgpt_jax.conformance.command import check
from rustgpt_jax.conformance.jaxprs import equations, product_flops
from rustgpt_jax.conformance.report import run_check
from rustgpt_jax.conformance.small import SMALL, small_model
from rustgpt_jax.conformance.subjects import MODEL_KINDS, TABLES, Subject, subjects
from rustgpt_jax.errors import UserError
from rustgpt_jax.model.cost import matrix_product_flops

# These start a process with eight devices.
IN_A_CHILD = "devices"
HONEST = ("HonestAttention", "HonestState", "HonestFeedForward")

pytest_plugins = ["pytester"]


def outcome_of(part: str, name: str) -> tuple[bool, str]:
    # One layer is compiled in half the time of a loop over layers.
    (subject,) = subjects(part, {"n_layers": 1})
    outcome = run_check(name, CHECKS[name], subject)
    return outcome.is_ok, outcome.note


# Mistakes are found.


def of_mistake(mistake: Mistake) -> object:
    marks = [pytest.mark.slow] if mistake.check == IN_A_CHILD else []
    return pytest.param(mistake, id=f"{mistake.part.rpartition(':')[2]}-{mistake.check}", marks=marks)


@pytest.mark.parametrize("mistake", [of_mistake(mistake) for mistake in MISTAKES])
def test_a_mistake_is_found_by_the_check_for_it(mistake: Mistake) -> None:
    is_ok, note = outcome_of(mistake.part, mistake.check)
    assert not is_ok, note
    assert re.search(mistake.message, note), note


def test_every_check_has_a_mistake_to_find() -> None:
    missing = {"tokenizer_same", "launcher_interface"}
    assert {mistake.check for mistake in MISTAKES} == set(CHECKS) - missing


# What is registered makes none.


def over_parts(kinds: tuple[str, ...]) -> list[object]:
    """Each check of each part, those of the same small model once."""
    cases = {}
    for kind in kinds:
        for subject in subjects(kind):
            for name in checks_for(subject):
                cases.setdefault((name, subject.model or subject.title), (subject, name))
    return [
        pytest.param(subject, name, id=f"{subject.title}-{name}")
        for subject, name in cases.values()
        if name != IN_A_CHILD
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("subject", "name"), over_parts(MODEL_KINDS), scope="module")
def test_parts_of_the_model_conform(subject: Subject, name: str) -> None:
    outcome = run_check(name, CHECKS[name], subject)
    assert outcome.is_ok, outcome.note


@pytest.mark.parametrize(("subject", "name"), over_parts(tuple(set(TABLES) - set(MODEL_KINDS))))
def test_other_parts_conform(subject: Subject, name: str) -> None:
    outcome = run_check(name, CHECKS[name], subject)
    assert outcome.is_ok, outcome.note
