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


def findings() -> list[str]:
    """Return the modules of experiments, which report a finding; other modules support benchmarks."""
    return [name for name in modules("experiments") if "FINDING" in (importlib.import_module(name).__doc__ or "")]


def test_experiments_and_main_benchmarks_report_findings() -> None:
    main = {"accelerator", "exported_decoding", "family_logits", "run", "sweep_throughput"}
    expected = {file.stem for file in (ROOT / "experiments").glob("*.py")} | main
    assert {name.rsplit(".", 1)[-1] for name in findings()} == expected


@pytest.mark.parametrize("name", findings())
def test_experiment_has_a_question_a_finding_and_a_valid_config(name: str) -> None:
    experiment = importlib.import_module(name)
    question, command, *_ = (experiment.__doc__ or "").split("\n\n")
    assert question.endswith("?")
    assert command.startswith(("python -m experiments.", "python experiments/", "rustgpt sweep "))
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
