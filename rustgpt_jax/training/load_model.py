"""Loading of a trained model from its run folder."""

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path

import jax

from rustgpt_jax.config.schema import Config, diff, partition
from rustgpt_jax.data.preprocess import fill_vocab_size, read_data_record
from rustgpt_jax.errors import UserError, program_name
from rustgpt_jax.inference.text_generator import TextGenerator
from rustgpt_jax.model.flops import parameter_shapes
from rustgpt_jax.model.transformer import Params
from rustgpt_jax.sharding.hardware_specs import query_machine
from rustgpt_jax.sharding.sharding_plan import plan_for_local_devices
from rustgpt_jax.tokenizers import Tokenizer
from rustgpt_jax.training.checkpointing import Checkpoints
from rustgpt_jax.training.memory_estimate import check_inference_memory
from rustgpt_jax.training.optimizers import get_eval_params
from rustgpt_jax.training.run_inputs import load_run_tokenizer
from rustgpt_jax.training.train_step import compiled_init_state
from rustgpt_jax.workdir.params_io import read_parameters
from rustgpt_jax.workdir.run_dir import RunDir, load_config, load_earlier

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A model loaded from a run folder.

    Attributes:
        run: The run folder.
        config: The config of the run, with the size of the vocabulary.
        step: The step of the checkpoint.
        generator: The model with its tokenizer, for generating text.
    """

    run: RunDir
    config: Config
    step: int
    generator: TextGenerator

    @property
    def params(self) -> Params:
        """The parameters, for `apply` with `config.model`."""
        return self.generator.params

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer."""
        return self.generator.tokenizer

    def with_config(self, config: Config) -> "LoadedModel":
        """Return the same model with another config for sampling and data.

        Raises:
            UserError: A knob of the model or tokenizer differs.
        """
        config = fill_vocab_size(config, self.generator.tokenizer)
        for knob, (trained, asked) in diff(self.config, config).items():
            if knob.startswith(("model.", "tokenizer.")):
                raise UserError(
                    f"config.{knob}={asked!r}: the model was trained with {trained!r}, which cannot be changed."
                )
        return dataclasses.replace(self, config=config)


def load_model(
    path: Path,
    which: str = "last",
    allow_oversubscription: bool = False,
    n_generated: int = 0,
) -> LoadedModel:
    """Load the model of a run.

    Args:
        path: The run folder.
        which: The checkpoint: "last", "best" or a step. If it is damaged, the previous one is loaded, with a warning.
        allow_oversubscription: Whether to load the model even if the memory is too small.
        n_generated: The number of tokens of one row in the KV cache, which has to fit in memory too.

    Raises:
        UserError: There is no run, or no valid checkpoint, or the memory is too small.
    """
    stored = load_config(path)
    run = RunDir(path)
    if not (run.is_untrained or run.checkpoints.exists()):
        raise UserError(f"{path} has no checkpoint yet; `{program_name()} train` saves one.")
    tokenizer = load_run_tokenizer(run)
    config = fill_vocab_size(stored, tokenizer)
    check_inference_memory(config, query_machine(), 0, allow_oversubscription, n_generated)
    if run.is_untrained:
        shapes = plan_for_local_devices().add_shardings(parameter_shapes(config.model))
        params, step = read_parameters(run.parameters_file, shapes), 0
    else:
        params, step = _restore(run, stored, config, which)
    return LoadedModel(run, config, step, TextGenerator(params, config.model, tokenizer, _is_dialogue(run, tokenizer)))


def _restore(run: RunDir, stored: Config, config: Config, which: str) -> tuple[Params, int]:
    """Return the parameters for evaluation from a checkpoint, and its step."""

    def on_skipped(step: int, reason: str) -> None:
        logger.warning(
            "%s: the checkpoint of step %d is damaged (%s); the previous one is loaded.", run.path, step, reason
        )

    static, hparams = partition(config)
    like = plan_for_local_devices().add_shardings(jax.eval_shape(lambda: compiled_init_state(static, hparams)))
    with Checkpoints(run.checkpoints, stored, earlier=load_earlier(run.path)) as checkpoints:
        state = checkpoints.restore(like, which, on_skipped)
        return get_eval_params(config.optimizer, state.params, state.opt_state), int(state.step)


def _is_dialogue(run: RunDir, tokenizer: Tokenizer) -> bool:
    """Return whether the model was trained on dialogues, or was imported with a chat template."""
    if tokenizer.chat_format is not None and tokenizer.chat_format.chat_template is not None:
        return True
    recorded = read_data_record(run.data_file) if run.data_file.exists() else []
    return any(stage["n_dialogues"] for stage in recorded)
