"""docs/new_layer.md is what a newcomer does: its files work as they stand, with nothing else touched."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import small_config

from rustgpt_jax.conformance.checks import CHECKS, checks_for
from rustgpt_jax.conformance.fixtures import LENGTH, random_params, random_tokens, small_model
from rustgpt_jax.conformance.runner import run_check
from rustgpt_jax.conformance.targets import subjects
from rustgpt_jax.errors import UserError
from rustgpt_jax.inference.generate import generate
from rustgpt_jax.inference.sampling import Greedy
from rustgpt_jax.model import transformer
from rustgpt_jax.model.flops import parameter_shapes
from rustgpt_jax.training.config_checks import validate_components

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "new_layer.md").read_text(encoding="utf-8")
CODE = r"```python\n(.*?)```"
# Each file of the page stands after the sentence that names it.
FILES = dict(re.findall(rf"`(my_lab/\w+\.py)`(?:(?!```).)*{CODE}", PAGE, re.DOTALL))
COMMANDS = [line for block in re.findall(r"```\n(python.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    """A folder of one's own with the files of the page."""
    for name, code in FILES.items():
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(code)
    return tmp_path


def run(lab: Path, *command: str) -> str:
    """What a command prints in the lab, which is not where the project is."""
    done = subprocess.run([sys.executable, *command], cwd=lab, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_page_has_the_files_and_commands_that_are_tested() -> None:
    assert sorted(FILES) == ["my_lab/feedforwards.py", "my_lab/mixers.py", "my_lab/retention.py"]
    assert [command.split()[2] for command in COMMANDS] == ["check", "check", "sweep", "sweep"]
    lines = FILES["my_lab/mixers.py"].split("class Retention")[1].splitlines()
    assert len([line for line in lines if line.strip()]) <= 40


@pytest.mark.slow
@pytest.mark.parametrize(
    "part",
    [
        "my_lab.mixers:Retention",
        pytest.param("feedforwards/my_lab.feedforwards:SiluFeedForward", marks=pytest.mark.long),
    ],
)
def test_the_parts_pass_every_check(part: str, lab: Path) -> None:
    assert ", 0 failed" in run(lab, str(ROOT / "launch.py"), "check", part)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("right", "wrong"),
    [("cache * faded(n_tokens_B1)[..., None] + jnp", "cache + jnp"), ("is_token_BT[:, None]", "True")],
)
def test_the_mistakes_that_the_page_proposes_are_found(right: str, wrong: str, lab: Path) -> None:
    file = lab / "my_lab/mixers.py"
    assert file.read_text().count(right) == 1
    file.write_text(file.read_text().replace(right, wrong))
    check = [sys.executable, str(ROOT / "launch.py"), "check", "my_lab.mixers:Retention", "--only=cache"]
    done = subprocess.run(check, cwd=lab, capture_output=True, text=True)
    assert done.returncode == 1 and "1 failed" in done.stdout and "Usual" in done.stdout


def test_the_parts_are_swept_against_those_that_are_there(lab: Path) -> None:
    shown = run(lab, str(ROOT / "launch.py"), "sweep", "--config=my_lab/retention.py", "--dry_run")
    assert "18 trials" in shown


WRONG = """
import flax.linen as nn
class NoCache(nn.Module):
    config: object
    def __call__(self, x_BTD, context, cache):
        return x_BTD, cache
class Plain(nn.Module):
    config: object
    def __call__(self, x_BTD):
        return x_BTD
"""


@pytest.mark.parametrize(
    ("knob", "part", "said"),
    [
        ("mixers", "json:loads", "is not a mixer: a Flax module with __call__(x, context)"),
        ("mixers", "wrong:NoCache", "is not a mixer"),
        ("mixers", "wrong:Plain", "is not a mixer"),
        ("feedforwards", "wrong:NoCache", "is not a feed-forward: a Flax module with __call__(x)"),
        ("positions", "wrong:Plain", "is not a position encoding: a PositionEncoding"),
        ("norm", "wrong:NoCache", "is not a norm"),
        ("mixers", "wrong:Missing", "wrong has no 'Missing'"),
        ("mixers", "nowhere.at.all:X", "there is no module 'nowhere' here"),
        ("mixers", ".wrong:X", "is no import path"),
    ],
)
def test_a_part_that_is_none_is_answered_in_one_sentence(
    knob: str, part: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wrong.py").write_text(WRONG)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = small_config(**{f"model.{knob}": part})
    with pytest.raises(UserError) as caught:
        validate_components(config)
        parameter_shapes(config.model)
    assert said in str(caught.value)


LIGHT = """
import flax.linen as nn
import jax.numpy as jnp
from rustgpt_jax.model.linear import Linear
from rustgpt_jax.model.kv_cache import causal_mask
class MeanOfDocument(nn.Module):
    config: object
    @nn.compact
    def __call__(self, x_BTD, context):
        weights_BTS = causal_mask(context) * 1.0
        mean_BTD = weights_BTS @ x_BTD / jnp.maximum(weights_BTS.sum(axis=-1, keepdims=True), 1)
        return Linear(self.config, self.config.d_model, residual=True, name="output")(mean_BTD)
class Plain(nn.Module):
    config: object
    @nn.compact
    def __call__(self, x_BTD):
        return Linear(self.config, self.config.d_model, residual=True, name="output")(x_BTD)
"""


def test_a_mixer_without_a_cache_is_recomputed_when_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "light.py").write_text(LIGHT)
    monkeypatch.syspath_prepend(str(tmp_path))
    model = small_model(mixers=("light:MeanOfDocument", "attention"), feedforwards="light:Plain", n_layers=3)
    params, tokens_BT = random_params(model), random_tokens(model)[:2]
    expected_BTV, _ = transformer.apply(params, tokens_BT, model)
    cache = transformer.init_cache(model, 2, LENGTH)
    for start, stop in ((0, 5), (5, 6), (6, LENGTH)):
        places_BT = np.tile(np.arange(start, stop, dtype=np.int32), (2, 1))
        found_BTV, cache = transformer.apply(params, tokens_BT[:, start:stop], model, cache, positions_BT=places_BT)
        np.testing.assert_allclose(found_BTV, expected_BTV[:, start:stop], rtol=1e-5, atol=1e-5)
    for _ in range(2):
        drawn = generate(params, [[1, 2, 3]], model, samplers=(Greedy(),), key=jax.random.key(0), max_tokens=3)
    assert len(drawn[0]) == 3
    warning = "light:MeanOfDocument has no init_cache, so it is recomputed over the whole context"
    assert capsys.readouterr().err.count(warning) == 1


@pytest.mark.parametrize(
    ("name", "changes", "checks"),
    [
        ("mixers/light:MeanOfDocument", {}, ("shapes", "causality", "padding", "cache", "parameters")),
        ("feedforwards/light:Plain", {}, ("shapes", "causality")),
    ],
)
def test_the_kit_checks_what_applies_to_a_light_layer(
    name: str, changes: dict[str, Any], checks: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "light.py").write_text(LIGHT)
    monkeypatch.syspath_prepend(str(tmp_path))
    (subject,) = subjects(name, {"n_layers": 1} | changes)
    assert ("prefill" in checks_for(subject)) == (not name.startswith("mixers"))
    outcomes = [run_check(check, CHECKS[check], subject) for check in checks]
    assert [outcome.note for outcome in outcomes if not outcome.is_ok] == []


@pytest.mark.slow
def test_a_part_of_ones_own_is_trained_and_talks(lab: Path) -> None:
    launch = str(ROOT / "launch.py")
    knobs = "--config.model.mixers=my_lab.mixers:Retention"
    other = "--config.model.feedforwards=my_lab.feedforwards:SiluFeedForward"
    run(
        lab,
        launch,
        "train",
        f"--config={ROOT}/configs/tiny.py",
        "--run=run",
        knobs,
        other,
        "--config.training.steps=10",
    )
    generate = ("generate", "--run=run", "--prompt=a", "--config.sampling.max_tokens=2")
    run(lab, launch, *generate, "--module_path=.")
    # What the run's folder names is not taken from the current folder, only because it is current.
    done = subprocess.run([sys.executable, launch, *generate], cwd=lab, capture_output=True, text=True)
    assert done.returncode == 2 and "use --module_path=. to add it" in done.stderr


@pytest.mark.slow
@pytest.mark.long
def test_a_feedforward_in_the_package_is_two_places_in_one_file(tmp_path: Path) -> None:
    for name in ("rustgpt_jax", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "launch.py", tmp_path)
    file = tmp_path / "rustgpt_jax/model/mlps.py"
    code = FILES["my_lab/feedforwards.py"]
    there, here = file.read_text(), code[code.index("class SiluFeedForward") :]
    table = "FEEDFORWARDS: dict[str, Callable[..., nn.Module]] = {\n"
    assert there.count(table) == 1 and '    "silu": SiluFeedForward,\n'.strip() in PAGE
    with_class = there.replace("# gelu is the tanh approximation", f"{here}\n\n# gelu is the tanh approximation")
    file.write_text(with_class.replace(table, f'{table}    "silu": SiluFeedForward,\n'))
    assert ", 0 failed" in run(tmp_path, "launch.py", "check", "feedforwards/silu")
    run(tmp_path, "launch.py", "explain", "--config=configs/tiny.py", "--config.model.feedforwards=swiglu,silu")


@pytest.mark.slow
@pytest.mark.long
def test_workers_of_a_sweep_have_the_part(lab: Path) -> None:
    (lab / "my_lab/small.py").write_text(
        "from configs import tiny\nfrom rustgpt_jax.sweeps import values\n"
        "def get_config():\n    config = tiny.get_config()\n    config.training.steps = 10\n    return config\n"
        "def sweep():\n    return values('model.mixers', 'my_lab.mixers:Retention')\n"
    )
    shown = run(lab, str(ROOT / "launch.py"), "sweep", "--config=my_lab/small.py", "--launcher=processes", "--run=s")
    assert "1 finished" in shown
    assert [file.name for file in lab.glob("s/code/*/my_lab/mixers.py")] == ["mixers.py"]


@pytest.mark.slow
def test_the_plugin_makes_a_test_of_each_check(lab: Path) -> None:
    (code,) = (code for code in re.findall(CODE, PAGE, re.DOTALL) if "conforms" in code)
    (lab / "test_lab.py").write_text(code)
    shown = run(lab, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "shapes or padding", "test_lab.py")
    assert "2 passed" in shown
