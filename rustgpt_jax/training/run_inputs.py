"""The inputs of a run: its config, tokenizer and data, and the program of each stage."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from rustgpt_jax.atomic_io import read_json
from rustgpt_jax.cache_dir import cache_folder
from rustgpt_jax.config.schema import (
    Config,
    EarlierConfig,
    Hyperparams,
    Stage,
    StaticConfig,
    partition,
    stages,
)
from rustgpt_jax.data.preprocess import (
    StageData,
    fill_vocab_size,
    find_changed_stages,
    load_or_train_tokenizer,
    prepare_stage,
    read_data_record,
)
from rustgpt_jax.data.token_store import hash_tokenizer
from rustgpt_jax.errors import UserError
from rustgpt_jax.model.flops import parameter_shapes
from rustgpt_jax.sharding.sharding_plan import check_batch_shards
from rustgpt_jax.tokenizers import Message, Tokenizer, encode_prompt, load_tokenizer
from rustgpt_jax.tracking.console import show_progress
from rustgpt_jax.training.optimizers import check_decay_groups
from rustgpt_jax.workdir.run_dir import RunDir


class StageProgram(NamedTuple):
    """The static config of a stage, which selects its compiled program, and the constant arguments of that program."""

    static: StaticConfig
    hparams: Hyperparams
    first_step: np.int32


@dataclass(frozen=True, eq=False)
class RunInputs:
    """The inputs of a run.

    Attributes:
        config: The config.
        full_config: The config with the vocabulary size of the tokenizer.
        tokenizer: The tokenizer.
        stages: The data of each stage, with one entry per config if the config changed within a stage.
        earlier: Earlier configs of the run.
    """

    config: Config
    full_config: Config
    tokenizer: Tokenizer
    stages: list[StageData]
    earlier: tuple[EarlierConfig, ...] = ()

    @property
    def total_steps(self) -> int:
        """The total number of steps of all stages."""
        return self.stages[-1].stage.end_step

    def last_incomparable_step(self, data: StageData) -> int:
        """Return the last step before a stage whose evaluations had other batches or another best metric, or 0."""

        def evaluation(stage: Stage) -> tuple[int | None, str]:
            return stage.config.logging.eval_batches, stage.config.logging.best_metric

        earlier = [each.stage for each in self.stages[: self.stages.index(data)]]
        others = [stage.last_step for stage in earlier if evaluation(stage) != evaluation(data.stage)]
        return max(others, default=0)

    @cached_property
    def programs(self) -> list[StageProgram]:
        """The program of each stage."""
        return [StageProgram(*partition(data.stage.config), np.int32(data.stage.first_step)) for data in self.stages]

    def check(self, run: RunDir, n_devices: int) -> None:
        """Check the inputs before anything is compiled or written.

        Args:
            run: The run folder.
            n_devices: The number of devices to train on.

        Raises:
            UserError: The inputs cannot work on these devices, or the data differ from those in the run folder.
        """
        check_decay_groups(parameter_shapes(self.full_config.model), self.full_config.optimizer)
        for data in self.stages:
            _check_prompts(self.full_config, self.tokenizer, "user" if data.is_dialogue else "text")
            check_batch_shards(data.stage.config, data.seq_len, n_devices)
        changed = find_changed_stages(run.data_file, self.stages)
        if changed:
            remedy = "restore the old text, or choose another --run folder"
            raise UserError(f"{run.path}: the text of stage {changed[0]!r} is not what the run began with; {remedy}.")


def load_run_tokenizer(run: RunDir) -> Tokenizer:
    """Load the tokenizer of a run.

    Raises:
        UserError: It is missing, damaged, or differs from the one recorded in the folder.
    """
    tokenizer = load_tokenizer(run.tokenizer_file)
    recorded = [stage["tokenizer"] for stage in read_data_record(run.data_file)] if run.data_file.exists() else []
    recorded.append(read_import_record(run).get("tokenizer"))
    found = hash_tokenizer(tokenizer)
    for digest in recorded:
        if digest is not None and digest != found:
            raise UserError(
                f"{run.tokenizer_file} is not the tokenizer of this run: its SHA-256 is {found[:12]}, and "
                f"{digest[:12]} is recorded. Restore the original file."
            )
    return tokenizer


def read_import_record(run: RunDir) -> dict[str, Any]:
    """Read the source of a run's initial parameters; {} if they were initialized from the seed.

    Raises:
        UserError: The file that records it is damaged.
    """
    if not run.import_file.exists():
        return {}
    about = read_json(run.import_file)
    texts = [about.get(name, "") for name in ("source", "tokenizer")] if isinstance(about, dict) else [None]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"{run.import_file} is damaged: it does not say where the parameters came from.")
    return about


def _check_prompts(config: Config, tokenizer: Tokenizer, role: str) -> None:
    for prompt in config.logging.sample_prompts:
        length = len(encode_prompt(tokenizer, [Message(role, prompt)]))
        if length >= config.model.context_length:
            raise UserError(
                f"config.logging.sample_prompts: {prompt!r} has {length} tokens, which leaves no room in "
                f"config.model.context_length={config.model.context_length}."
            )


def prepare_tokenizer(config: Config, file: Path, console: Console) -> Tokenizer:
    """Load the tokenizer of a run, or train it if `file` does not exist."""
    if file.exists():
        return load_run_tokenizer(RunDir(file.parent))
    with show_progress(console, "characters read to train the tokenizer") as progress:
        return load_or_train_tokenizer(config, progress=progress)


def prepare_inputs(
    config: Config,
    tokenizer_file: Path,
    console: Console,
    earlier: tuple[EarlierConfig, ...] = (),
    tokenizer: Tokenizer | None = None,
) -> RunInputs:
    """Load or create the inputs of a run. A tokenizer in the run folder is kept.

    Args:
        config: The config of the run.
        tokenizer_file: The path of the run's tokenizer, which may not exist.
        console: The console to print to.
        earlier: Earlier configs of the run.
        tokenizer: The tokenizer of the run, if it was already loaded.

    Raises:
        UserError: The text is unsuitable.
    """
    if tokenizer is None:
        tokenizer = prepare_tokenizer(config, tokenizer_file, console)
    full_config = fill_vocab_size(config, tokenizer)
    with show_progress(console, "characters encoded") as progress:
        prepared = [prepare_stage(stage, tokenizer, cache_folder(), progress) for stage in stages(full_config)]
    stores = {data.stage.name: data.store for data in prepared}
    full_earlier = [each._replace(config=fill_vocab_size(each.config, tokenizer)) for each in earlier]
    data = [
        prepare_stage(stage, tokenizer, cache_folder(), store=stores[stage.name])
        for stage in stages(full_config, full_earlier)
    ]
    return RunInputs(config, full_config, tokenizer, data, earlier)
