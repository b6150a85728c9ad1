"""Every experiment asks a question, gives its command, and starts from a config that resolves."""

import importlib
from pathlib import Path

import pytest

from rustgpt_jax.resolve import resolve

EXPERIMENTS = sorted(path.stem for path in (Path(__file__).parent.parent / "experiments").glob("*.py"))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_says_what_it_asks_and_builds_its_config(name: str) -> None:
    experiment = importlib.import_module(f"experiments.{name}")
    question, command, *_ = (experiment.__doc__ or "").split("\n\n")
    assert question.endswith("?")
    assert command.startswith("python ")
    assert "FINDING" in experiment.__doc__
    resolve(experiment.get_config())
