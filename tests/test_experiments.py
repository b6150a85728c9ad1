"""Every experiment has a question, its command, a finding, a valid config, and valid sweeps."""

import importlib
from pathlib import Path

import pytest

from rustgpt_jax.config.validation import resolve
from rustgpt_jax.sweeps.search_space import TPE, SuccessiveHalving
from rustgpt_jax.sweeps.trials import make_trials, sample_feasible_points
from rustgpt_jax.training.config_checks import validate_components

ROOT = Path(__file__).parent.parent


def modules(folder: str) -> list[str]:
    files = sorted((ROOT / folder).rglob("*.py"))
    return [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]


@pytest.mark.parametrize("name", modules("experiments"))
def test_experiment_has_a_question_a_finding_and_a_valid_config(name: str) -> None:
    experiment = importlib.import_module(name)
    question, command, *_ = (experiment.__doc__ or "").split("\n\n")
    assert question.endswith("?")
    assert command.startswith("python ")
    assert "FINDING" in experiment.__doc__
    resolve(experiment.get_config())


@pytest.mark.parametrize("name", modules("configs") + modules("experiments"))
def test_sweeps_expand_to_valid_trials(name: str) -> None:
    module = importlib.import_module(name)
    for function in [value for key, value in vars(module).items() if key.split("_")[0] == "sweep" and callable(value)]:
        spec = function()
        match spec:
            case SuccessiveHalving():
                trials = make_trials(module.get_config(), spec.trials)
            case TPE():
                trials = sample_feasible_points(module.get_config(), spec)
            case _:
                trials = make_trials(module.get_config(), spec)
        for trial in trials:
            validate_components(trial.config)
