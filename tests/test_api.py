"""The Python API does what the verbs do, takes strings for paths, and starts without importing JAX."""

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rustgpt_jax
from configs import tiny
from rustgpt_jax.config.schema import to_dict
from rustgpt_jax.errors import UserError
from rustgpt_jax.sweeps import seeds
from rustgpt_jax.workdir.run_dir import load_run_config

OVERRIDES = {
    "training.steps": 4,
    "schedule.warmup_steps": 1,
    "logging.eval_every": 4,
    "logging.checkpoint_every": 2,
    "data.valid_fraction": 0.2,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a short run."""
    folder = str(tmp_path_factory.mktemp("api") / "run")
    metrics = rustgpt_jax.train(tiny.get_config(), folder, OVERRIDES, is_quiet=True)
    assert metrics == rustgpt_jax.read_metrics(folder) and metrics[-1]["step"] == 4
    return folder


def test_import_is_quick() -> None:
    script = "import rustgpt_jax, sys; dir(rustgpt_jax); assert 'jax' not in sys.modules, 'jax'"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_every_name_is_documented() -> None:
    for name in rustgpt_jax._API:
        assert name in dir(rustgpt_jax) and getattr(rustgpt_jax, name).__doc__
    with pytest.raises(AttributeError, match="has no attribute 'fit'"):
        _ = rustgpt_jax.fit


def test_resolve_takes_every_form_of_a_config() -> None:
    config = rustgpt_jax.resolve(tiny.get_config(), {"optimizer.learning_rate": 0.5})
    assert config.optimizer.learning_rate == 0.5
    assert rustgpt_jax.resolve(config) == config == rustgpt_jax.resolve(to_dict(config))
    with pytest.raises(UserError, match="Did you mean config.optimizer.learning_rate"):
        rustgpt_jax.resolve(config, {"optimizer.learning_rat": 0.5})
    # 'auto' becomes a value for this machine.
    assert rustgpt_jax.resolve(tiny.get_config(), {"model.dtype": "auto"}).model.dtype in ("float32", "bfloat16")


def test_train_resumes_and_records_origins(run: str) -> None:
    assert rustgpt_jax.train(tiny.get_config(), run, OVERRIDES, is_quiet=True) == rustgpt_jax.read_metrics(run)
    values, origins = load_run_config(Path(run))
    assert values["training.steps"] == 4 and origins["training.steps"] == "Python"
    assert origins["optimizer.name"] == "base"


def test_model_gives_logits_and_text(run: str) -> None:
    model = rustgpt_jax.load(run, checkpoint=2)
    assert model.step == 2 and rustgpt_jax.load(run).step == 4
    tokens = jnp.array([rustgpt_jax.encode(model.tokenizer, "Snow is white")])
    logits, cache = rustgpt_jax.apply(model.params, tokens, model.config.model)
    assert cache is None and logits.shape == (1, tokens.shape[1], model.config.model.vocab_size)
    [text] = rustgpt_jax.generate(model, "Snow is", temperature=0.0, max_tokens=3)
    prompt = model.generator.encode_prompt("Snow is")
    greedy = list(prompt)
    for _ in range(3):
        greedy.append(
            int(jnp.argmax(rustgpt_jax.apply(model.params, jnp.array([greedy]), model.config.model)[0][0, -1]))
        )
    assert text == model.generator.decode(prompt, greedy[len(prompt) :])
    assert rustgpt_jax.generate(model, ["a", "b"], seed=1) != rustgpt_jax.generate(model, ["a", "b"], seed=2)
    with pytest.raises(UserError, match="temperatur"):
        rustgpt_jax.generate(model, "Snow is", temperatur=0.0)


def test_data_of_a_config_and_of_its_model_are_equal(run: str) -> None:
    of_config = rustgpt_jax.load_data(rustgpt_jax.resolve(tiny.get_config(), OVERRIDES))
    of_model = rustgpt_jax.load_data(rustgpt_jax.load(run))
    for step in (0, 3):
        first, second = (data.stages[0].training_batches().batch(step) for data in (of_config, of_model))
        assert jax.tree.all(jax.tree.map(np.array_equal, first, second))
    ids = rustgpt_jax.encode(of_config.tokenizer, "Snow")
    assert (
        ids == rustgpt_jax.encode(of_model.tokenizer, "Snow") and rustgpt_jax.decode(of_model.tokenizer, ids) == "Snow"
    )
    assert next(iter(of_model.stages[0].validation_batches()))


def test_sweep_returns_the_rows_of_its_results(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = rustgpt_jax.sweep(
        tiny.get_config(), [OVERRIDES | trial for trial in seeds(2)], str(tmp_path / "sweep"), is_quiet=True
    )
    assert [row["seed"] for row in rows] == ["0", "1"] and {row["status"] for row in rows} == {"finished"}
    assert (tmp_path / "sweep" / "report.html").exists()
    assert rows == rustgpt_jax.sweep(
        tiny.get_config(), [OVERRIDES | trial for trial in seeds(2)], tmp_path / "sweep", is_quiet=True
    )


def test_misuse_is_a_user_error_and_writes_nothing(run: str, tmp_path: Path) -> None:
    model = rustgpt_jax.load(run)
    assert rustgpt_jax.generate(model, []) == []
    for arguments in ((model, b"Snow"), (model, ["Snow", 3]), (run, "Snow")):
        with pytest.raises(UserError, match="generate"):
            rustgpt_jax.generate(*arguments)
    with pytest.raises(UserError, match="A config is"):
        rustgpt_jax.resolve(3)
    assert rustgpt_jax.resolve("tiny", {"training.steps": np.int64(30)}).training.steps == 30
    errors = list[str]()

    def train() -> None:
        try:
            rustgpt_jax.train("tiny", tmp_path / "run")
        except UserError as error:
            errors.append(str(error))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert "main thread" in errors[0] and not (tmp_path / "run").exists()
