"""Small runs for tests of commands on runs: trained in this process, or by a copy of the code in another."""

import json
import os
import shutil
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

from conftest import small_config
from rich.console import Console

from rustgpt_jax.config.schema import Config
from rustgpt_jax.tracking.console import PlainTextConsole

ROOT = Path(__file__).parent.parent
SMALL = {
    "tokenizer.name": "byte",
    "tokenizer.vocab_size": 300,
    "model.vocab_size": 300,
    "model.context_length": 16,
    "model.n_layers": 1,
    "model.d_model": 16,
    "model.attention.n_heads": 2,
    "training.steps": 6,
    "training.steps_per_jit_call": 2,
    "logging.log_every": 1,
    "logging.eval_every": 3,
    "logging.eval_batches": 1,
    "logging.checkpoint_every": 2,
    "logging.sample_prompts": (),
}

ELSEWHERE = """
import json, sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], sys.argv[2]]
from small_runs import train
train(Path(sys.argv[3]), **json.loads(sys.argv[4]))
"""


def run_config(**changes: Any) -> Config:
    """Return a config of six fast steps."""
    return small_config(**(SMALL | changes))


def train(path: Path, **changes: Any) -> None:
    """Train such a run in this process, without drawing its loss curves."""
    from rustgpt_jax.training import run_training

    with mock.patch.object(run_training, "draw_loss_curves", lambda folder: folder / "loss.png"):
        run_training.train(run_config(**changes), path, {}, PlainTextConsole(file=StringIO()))


def new_console(width: int = 120) -> Console:
    """Return a console that collects its output."""
    return Console(file=StringIO(), width=width)


def output_of(console: Console) -> str:
    """Return the output of such a console."""
    return console.file.getvalue()  # type: ignore[attr-defined]


def train_elsewhere(path: Path, code: Path = ROOT, environment: dict[str, str] | None = None, **changes: Any) -> None:
    """Train such a run in another process with the code in a folder."""
    variables = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"} | (environment or {})
    command = [sys.executable, "-P", "-c", ELSEWHERE, str(code), str(ROOT / "tests"), str(path), json.dumps(changes)]
    done = subprocess.run(command, env=variables, cwd=path.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def check_result(verb: str, result: dict[str, Any]) -> None:
    """Check that a result matches the schema of a verb."""
    import jsonschema

    from rustgpt_jax.cli.output import SCHEMA_VERSION, load_schema, to_json

    document = {"schema_version": SCHEMA_VERSION, "verb": verb, "status": 0, "result": to_json(result)}
    jsonschema.validate(document, load_schema(verb), jsonschema.Draft202012Validator)


def copy_code(folder: Path) -> Path:
    """Copy the code to a folder, where it may be changed."""
    for name in ("rustgpt_jax", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("launch.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    return folder
