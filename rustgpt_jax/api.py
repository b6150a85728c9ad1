"""The Python API: train and sweep from a config, load a run, and read its data, metrics and text.

Each function does what the verb of the same name does. Paths may be strings. Import the names from `rustgpt_jax`:

    import rustgpt_jax

    config = rustgpt_jax.load_config("tiny")
    rustgpt_jax.train(config, "runs/tiny")
    model = rustgpt_jax.load("runs/tiny")
    rustgpt_jax.generate(model, ["Snow is"], temperature=0.0, max_tokens=40)
"""

import csv
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from rich.console import Console

from rustgpt_jax.cache_dir import cache_folder
from rustgpt_jax.config.config_files import ValuesAndOrigins, flatten_config, load_config
from rustgpt_jax.config.schema import Config, SamplingConfig, stages, to_dict
from rustgpt_jax.config.validation import resolve as resolve_values
from rustgpt_jax.data.preprocess import AssetCache, StageData, fill_vocab_size, prepare_stage
from rustgpt_jax.errors import UserError
from rustgpt_jax.inference.text_generator import generate_text, select_weight_layout
from rustgpt_jax.model.transformer import apply
from rustgpt_jax.planning.estimate import resolve_auto_values
from rustgpt_jax.process_setup import enable_compilation_cache
from rustgpt_jax.sweeps.search_space import TPE, Overrides, Search, SuccessiveHalving
from rustgpt_jax.sweeps.sweep import SweepInfo, SweepOptions
from rustgpt_jax.sweeps.sweep_command import SweepArgs, run_sweep
from rustgpt_jax.sweeps.trials import make_trials, sample_feasible_points
from rustgpt_jax.tokenizers import Tokenizer, decode, encode
from rustgpt_jax.tracking.console import PlainTextConsole
from rustgpt_jax.tracking.metric_writer import read_metrics as read_run_metrics
from rustgpt_jax.training.load_model import LoadedModel, load_model
from rustgpt_jax.training.run_training import train as train_run

__all__ = [
    "Data",
    "apply",
    "decode",
    "encode",
    "generate",
    "load",
    "load_data",
    "read_metrics",
    "resolve",
    "sweep",
    "train",
]

NO_OVERRIDES: Mapping[str, Any] = MappingProxyType({})
# The origin, in config.json, of values that are not defaults.
ORIGIN = "Python"


class Data(NamedTuple):
    """The data of a config.

    Attributes:
        config: The config, with the size of the tokenizer's vocabulary.
        tokenizer: The tokenizer.
        stages: The data of each stage; `stages[0].training_batches().batch(step)` is a batch, and
            `stages[0].validation_batches()` iterates over those of an evaluation.
    """

    config: Config
    tokenizer: Tokenizer
    stages: list[StageData]


def resolve(config: Any, overrides: Mapping[str, Any] = NO_OVERRIDES) -> Config:
    """Return the validated, immutable form of a config, as the functions of the package take it.

    Args:
        config: A ConfigDict, such as from `load_config`, a nested dict, a Config, or the name of a recipe.
        overrides: Values by dotted path, such as `{"optimizer.learning_rate": 3e-4}`.

    Raises:
        UserError: A value is missing, unknown or out of range, or a combination of values cannot work.
    """
    return _resolve(config, overrides)[0]


def _resolve(config: Any, overrides: Mapping[str, Any]) -> tuple[Config, dict[str, str]]:
    """Return the resolved config and the origin of each value, with 'auto' values chosen for this machine."""
    values, origins = _flatten(config)
    # Scalars of NumPy and JAX become numbers of Python.
    given = {path: value.item() if getattr(value, "shape", None) == () else value for path, value in overrides.items()}
    origins |= dict.fromkeys(given, ORIGIN)
    resolve_auto_values(values, given, origins)
    return resolve_values(values, given), origins


def _flatten(config: Any) -> ValuesAndOrigins:
    """Return the values of a config by dotted path, and their origins."""
    if isinstance(config, str | Path):
        config = load_config(str(config))
    if not isinstance(config, Config) and not hasattr(config, "items"):
        raise UserError(f"A config is a ConfigDict, a nested dict, a Config or the name of a recipe, not {config!r}.")
    return flatten_config(to_dict(config) if isinstance(config, Config) else config, ORIGIN)


def train(
    config: Any,
    workdir: str | Path,
    overrides: Mapping[str, Any] = NO_OVERRIDES,
    *,
    is_quiet: bool = False,
    allow_oversubscription: bool = False,
) -> list[dict[str, Any]]:
    """Train a run in a folder, or resume it from its last checkpoint. Call it from the main thread.

    Args:
        config: A ConfigDict, a nested dict, a Config, or the name of a recipe.
        workdir: The run folder. The verbs of the command line read it, too.
        overrides: Values by dotted path that replace those of the config.
        is_quiet: Whether to print nothing.
        allow_oversubscription: Whether to train even if the model cannot fit in memory.

    Returns:
        The metrics of the run, a dict per line of its metrics.jsonl.

    Raises:
        UserError: The config cannot work, the folder holds another run, or training diverged.
        KeyboardInterrupt: Training was interrupted. It has saved a checkpoint, from which the same call continues.
    """
    _check_main_thread()
    resolved, origins = _resolve(config, overrides)
    enable_compilation_cache()
    status = train_run(
        resolved,
        Path(workdir),
        origins,
        _make_console(is_quiet),
        allow_oversubscription=allow_oversubscription,
    )
    if status:
        raise KeyboardInterrupt(f"Training in {workdir} was interrupted; the same call continues it.")
    return read_run_metrics(Path(workdir))


def sweep(
    config: Any,
    trials: Iterable[Overrides] | Search,
    workdir: str | Path,
    *,
    launcher: str = "inline",
    mode: str = "auto",
    is_quiet: bool = False,
) -> list[dict[str, str]]:
    """Run the unfinished trials of a sweep, and write its results.csv and report.html. Call it from the main thread.

    Args:
        config: A ConfigDict, a nested dict, a Config, or the name of a recipe.
        trials: Overrides by dotted path for each trial, from the functions of `rustgpt_jax.sweeps`, or a search.
        workdir: The sweep folder. It continues a sweep that this function began there.
        launcher: Where the trials run: "inline", in this process, or "processes", in a worker for each core or GPU.
        mode: How trials of equal shapes run: "auto", "fused", "exact" or "solo".
        is_quiet: Whether to print nothing.

    Returns:
        The rows of results.csv: the knobs, status and losses of each trial.

    Raises:
        UserError: The config, a trial or the folder cannot work.
        KeyboardInterrupt: The sweep was interrupted; the same call continues it.
    """
    _check_main_thread()
    values, origins = _flatten(config)
    resolve_auto_values(values, {}, origins)
    spec = trials if isinstance(trials, Search) else list(trials)
    if isinstance(spec, TPE):
        planned = sample_feasible_points(values, spec, {})
    else:
        planned = make_trials(values, spec.trials if isinstance(spec, SuccessiveHalving) else spec, {})
    folder = Path(workdir)
    info = SweepInfo("", "sweep", origins)
    arguments = SweepArgs(info, SweepOptions(launcher, mode, None, None, {}), dry_run=False)
    status, _ = run_sweep(values, spec, planned, {}, folder, arguments, _make_console(is_quiet))
    if status not in (0, 1):
        raise KeyboardInterrupt(f"The sweep in {workdir} was interrupted; the same call continues it.")
    with open(folder / "results.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def load(run: str | Path, checkpoint: str | int = "last") -> LoadedModel:
    """Load the model of a run, or of a trial of a sweep.

    Args:
        run: The run folder.
        checkpoint: "last", "best", or a step.

    Returns:
        The model. `model.params` are its parameters, `model.config` its config, `model.tokenizer` its tokenizer.

    Raises:
        UserError: There is no run, or it has no valid checkpoint.
    """
    enable_compilation_cache()
    return load_model(Path(run), str(checkpoint))


def generate(model: LoadedModel, prompts: Sequence[str] | str, **sampling: Any) -> list[str]:
    """Return the text that a model generates after each prompt: replies, if it was trained on dialogues.

    Args:
        model: The model, from `load`.
        prompts: The prompts, as text.
        **sampling: Fields of the config's `sampling` to change, such as `temperature=0.0`, `max_tokens=40` or `seed=1`.

    Raises:
        UserError: A field is unknown or out of range, or a prompt leaves no room in the model's context.
    """
    if not isinstance(model, LoadedModel):
        raise UserError(f"generate() takes a model from load(), not {model!r}.")
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    for text in texts:
        if not isinstance(text, str):
            raise UserError(f"generate(): a prompt is a string, not {text!r}.")
    values = {f"sampling.{name}": value for name, value in sampling.items()}
    config: SamplingConfig = resolve_values(to_dict(model.config), values).sampling
    generator = model.generator.with_weight_layout(select_weight_layout(config))
    prompt_tokens = [generator.encode_prompt(text) for text in texts]
    return generate_text(generator, prompt_tokens, config) if texts else []


def load_data(source: Any) -> Data:
    """Return the tokenizer and the batches of a config, or of a loaded model.

    Args:
        source: A ConfigDict, a nested dict or a Config, whose tokenizer is trained if necessary, or the result of
            `load`, whose tokenizer is kept.

    Raises:
        UserError: The corpus cannot be read, or is shorter than one batch.
    """
    if not isinstance(source, LoadedModel):
        return Data(*AssetCache().prepare(resolve(source)))
    config = fill_vocab_size(source.config, source.tokenizer)
    data = [prepare_stage(stage, source.tokenizer, cache_folder()) for stage in stages(config)]
    return Data(config, source.tokenizer, data)


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """Return the metrics of a run, a dict per line of its metrics.jsonl.

    Raises:
        UserError: There is no run in the folder, or a line is malformed.
    """
    if not Path(run).is_dir():
        raise UserError(f"{run} is not a folder.")
    return read_run_metrics(Path(run))


def _check_main_thread() -> None:
    """Raise UserError in any other thread: only the main thread of Python receives signals, which stop training."""
    if threading.current_thread() is not threading.main_thread():
        raise UserError("Training has to be called from the main thread, which receives the signals that stop it.")


def _make_console(is_quiet: bool) -> Console:
    return PlainTextConsole(quiet=is_quiet)
