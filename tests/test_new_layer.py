"""docs/tutorials/new_layer.md works as written: its files, its commands, and the mistakes that it proposes."""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import small_config
from doc_blocks import read_blocks

from rustgpt_jax.conformance.checks import checks_for, run_check
from rustgpt_jax.conformance.components import Scope, find_components
from rustgpt_jax.conformance.fixtures import LENGTH, quick_jit, random_params, random_tokens, small_model
from rustgpt_jax.errors import UserError
from rustgpt_jax.inference.generate import generate
from rustgpt_jax.inference.sampling import Greedy
from rustgpt_jax.model import transformer
from rustgpt_jax.model.flops import parameter_shapes
from rustgpt_jax.training.config_checks import validate_components

ROOT = Path(__file__).parent.parent
LAUNCH = str(ROOT / "launch.py")
PAGE = (ROOT / "docs" / "tutorials" / "new_layer.md").read_text(encoding="utf-8")
FILES = {block.title: block.text for block in read_blocks(PAGE) if block.title}


pytestmark = pytest.mark.usefixtures("quick_codegen")


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the files of the page."""
    for name, code in FILES.items():
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for module in [name for name in sys.modules if name.partition(".")[0] == "my_lab"]:
        monkeypatch.delitem(sys.modules, module)
    return tmp_path


def run(folder: Path, *command: str, status: int = 0) -> str:
    """Runs Python in a folder that is not the project's; returns stdout and stderr."""
    done = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_mixer_of_the_page_is_short() -> None:
    lines = FILES["my_lab/mixers.py"].split("class Retention")[1].splitlines()
    assert len([line for line in lines if line.strip()]) <= 40


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "my_lab.mixers:Retention",
        pytest.param("feedforwards/my_lab.feedforwards:SiluFeedForward", marks=pytest.mark.long),
    ],
)
def test_components_of_the_page_pass_every_check(name: str, lab: Path) -> None:
    assert ", 0 failed" in run(lab, LAUNCH, "check", name)


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("no_decay", "cache * decay_over(n_tokens_B1)[..., None] + jnp", "cache + jnp"),
        ("padding_in_cache", "is_token_BT[:, None]", "True"),
    ],
)
def test_cache_check_finds_the_mistakes_that_the_page_proposes(name: str, right: str, wrong: str, lab: Path) -> None:
    code = FILES["my_lab/mixers.py"]
    assert code.count(right) == 1 and right in PAGE.split("## Is it correct?")[1]
    (lab / f"my_lab/{name}.py").write_text(code.replace(right, wrong))
    (component,) = find_components(f"my_lab.{name}:Retention", {"n_layers": 1})
    outcome = run_check("cache", component)
    assert not outcome.is_ok and "Usual cause" in outcome.note, outcome.note


WRONG = """
import flax.linen as nn
class NoCache(nn.Module):
    config: object
    def __call__(self, x_BTD, inputs, cache):
        return x_BTD, cache
class Plain(nn.Module):
    config: object
    def __call__(self, x_BTD):
        return x_BTD
"""


@pytest.mark.parametrize(
    ("field", "name", "message"),
    [
        ("mixers", "json:loads", "is not a mixer: a Flax module with __call__(x, inputs)"),
        ("mixers", "wrong:NoCache", "is not a mixer"),
        ("mixers", "wrong:Plain", "is not a mixer"),
        ("feedforwards", "wrong:NoCache", "is not a feed-forward: a Flax module with __call__(x)"),
        ("positions", "wrong:Plain", "is not a position encoding: a PositionEncoding"),
        ("norm", "wrong:NoCache", "is not a norm"),
        ("mixers", "wrong:Missing", "wrong has no 'Missing'"),
        ("mixers", "nowhere.at.all:X", "no module named 'nowhere'"),
        ("mixers", ".wrong:X", "is not an import path"),
    ],
)
def test_wrong_component_is_refused_in_one_sentence(
    field: str, name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wrong.py").write_text(WRONG)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = small_config(**{f"model.{field}": name})
    with pytest.raises(UserError) as caught:
        validate_components(config)
        parameter_shapes(config.model)
    assert message in str(caught.value)


LIGHT = """
import flax.linen as nn
import jax.numpy as jnp
from rustgpt_jax.model.layers import Linear
from rustgpt_jax.model.kv_cache import causal_mask
class MeanOfDocument(nn.Module):
    config: object
    @nn.compact
    def __call__(self, x_BTD, inputs):
        weights_BTS = causal_mask(inputs) * 1.0
        mean_BTD = weights_BTS @ x_BTD / jnp.maximum(weights_BTS.sum(axis=-1, keepdims=True), 1)
        return Linear(self.config, self.config.d_model, residual=True, name="output")(mean_BTD)
class Plain(nn.Module):
    config: object
    @nn.compact
    def __call__(self, x_BTD):
        return Linear(self.config, self.config.d_model, residual=True, name="output")(x_BTD)
"""


@pytest.mark.slow
def test_mixer_without_a_cache_is_recomputed_in_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "light.py").write_text(LIGHT)
    monkeypatch.syspath_prepend(str(tmp_path))
    model = small_model(mixers=("light:MeanOfDocument", "attention"), feedforwards="light:Plain", n_layers=2)
    params, tokens_BT = random_params(model), random_tokens(model)[:2]
    apply = quick_jit(transformer.apply, static_argnames="model")
    expected_BTV, _ = apply(params, tokens_BT, model=model)
    cache = transformer.init_cache(model, 2, LENGTH)
    for start, stop in ((0, 5), (5, 6), (6, LENGTH)):
        positions_BT = np.tile(np.arange(start, stop, dtype=np.int32), (2, 1))
        piece_BT = tokens_BT[:, start:stop]
        found_BTV, cache = apply(params, piece_BT, model=model, cache=cache, positions_BT=positions_BT)
        np.testing.assert_allclose(found_BTV, expected_BTV[:, start:stop], rtol=1e-5, atol=1e-5)
    for _ in range(2):
        generated = generate(params, [[1, 2, 3]], model, samplers=(Greedy(),), key=jax.random.key(0), max_tokens=3)
    assert len(generated[0]) == 3
    warning = "light:MeanOfDocument has no init_cache, so it is recomputed over the whole context"
    assert caplog.text.count(warning) == 1


@pytest.mark.parametrize(
    ("name", "checks"),
    [
        ("mixers/light:MeanOfDocument", ("shapes", "causality", "padding", "cache", "parameters")),
        ("feedforwards/light:Plain", ("shapes", "causality")),
    ],
)
def test_checks_of_layers_without_cache_and_inputs(
    name: str, checks: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "light.py").write_text(LIGHT)
    monkeypatch.syspath_prepend(str(tmp_path))
    (component,) = find_components(name, {"n_layers": 1})
    assert ("prefill" in checks_for(component)) == (not name.startswith("mixers"))
    small = dataclasses.replace(component, scope=Scope.SMALL)
    outcomes = [run_check(check, small) for check in checks]
    assert [outcome.note for outcome in outcomes if not outcome.is_ok] == []


@pytest.mark.slow
@pytest.mark.long
def test_components_of_the_page_are_trained_and_generate(lab: Path) -> None:
    fields = (
        "--config.model.mixers=my_lab.mixers:Retention",
        "--config.model.feedforwards=my_lab.feedforwards:SiluFeedForward",
        "--config.training.steps=10",
    )
    run(lab, LAUNCH, "train", f"--config={ROOT}/configs/tiny.py", "--run=run", *fields)
    generate = ("generate", "--run=run", "--prompt=a", "--config.sampling.max_tokens=2")
    run(lab, LAUNCH, *generate, "--module_path=.")
    # Components named by a run are not imported from the current folder just because it is the current folder.
    assert "use --module_path=. to add it" in run(lab, LAUNCH, *generate, status=2)


@pytest.mark.long
def test_feedforward_is_registered_by_two_edits_of_one_file(tmp_path: Path) -> None:
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


@pytest.mark.long
def test_sweep_workers_import_the_component(lab: Path) -> None:
    (lab / "my_lab/small.py").write_text(
        "from configs import tiny\nfrom rustgpt_jax.sweeps import values\n"
        "def get_config():\n    config = tiny.get_config()\n    config.training.steps = 10\n    return config\n"
        "def sweep():\n    return values('model.mixers', 'my_lab.mixers:Retention')\n"
    )
    shown = run(lab, LAUNCH, "sweep", "--config=my_lab/small.py", "--launcher=processes", "--run=s")
    assert "1 finished" in shown
    assert [file.name for file in lab.glob("s/code/*/my_lab/mixers.py")] == ["mixers.py"]


@pytest.mark.slow
def test_plugin_makes_a_test_of_each_check(lab: Path) -> None:
    shown = run(lab, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "shapes or padding", "test_retention.py")
    assert "2 passed" in shown
