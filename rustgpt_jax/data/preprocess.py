"""From a config to what its run reads: a tokenizer, and for each stage the token streams of its corpus."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rustgpt_jax.config.schema import EPOCHS, STEPS, Config, DataConfig, Stage, stages, with_steps
from rustgpt_jax.config.validation import check_combinations, validate_value
from rustgpt_jax.data.datasets import file_digests, tokenizer_documents
from rustgpt_jax.data.pipeline import Batch, Batches, SequenceReader, batches, eval_batches, n_eval_batches
from rustgpt_jax.data.token_store import CorpusStats, Store, build_store, check_enough_tokens, compute_corpus_stats
from rustgpt_jax.errors import UserError
from rustgpt_jax.tokenizers import Tokenizer, load_tokenizer, split_text, train_tokenizer
from rustgpt_jax.tokenizers.tokenizer import BPE_SPLIT_CHARS, WORD_SPLIT_CHARS

StoreProgress = Callable[[int, int | None], None]


@dataclass(frozen=True, eq=False)
class StageData:
    """A stage with its token store."""

    stage: Stage
    store: Store

    @property
    def seq_len(self) -> int:
        """Tokens in a training sequence."""
        return self.stage.config.data.seq_len or self.stage.config.model.context_length

    @property
    def n_sequences(self) -> int:
        """Windows in an epoch of the training text."""
        return len(SequenceReader(self.store.split("train"), self.seq_len))

    @property
    def is_dialogue(self) -> bool:
        """Whether prompts are questions to be answered, rather than texts to be continued."""
        return self.store.manifest.n_dialogues > 0

    def training_batches(self, rows: np.ndarray | None = None) -> Batches:
        """The stage's batches, addressed by the step of the run, or some rows of each."""
        config, first_step = self.stage.config, self.stage.first_step
        stream, batch_size = self.store.split("train"), config.training.batch_size
        return batches(stream, self.seq_len, batch_size, config.seed, first_step, rows)

    def validation_batches(self, rows: np.ndarray | None = None) -> Iterator[Batch]:
        """The windows that an evaluation reads, in order, or some rows of each batch of them."""
        config, stream = self.stage.config, self.store.split("valid")
        limit = config.logging.eval_batches
        return eval_batches(stream, self.seq_len, config.training.batch_size, limit, rows)

    @property
    def n_validation_batches(self) -> int:
        """The number of batches that an evaluation reads."""
        config, stream = self.stage.config, self.store.split("valid")
        return n_eval_batches(stream, self.seq_len, config.training.batch_size, config.logging.eval_batches)


def load_or_train_tokenizer(
    config: Config, file: Path | None = None, progress: StoreProgress | None = None
) -> Tokenizer:
    """Load the tokenizer in `file`, or train one on the training documents of all stages if there is no file.

    Args:
        config: The config of the run.
        file: The path of the run's tokenizer, which may not exist.
        progress: Called during training with the number of characters read so far and in total.

    Raises:
        UserError: The file is not a tokenizer, or the text cannot be read, split or trained on.
    """
    if file is not None and file.exists():
        return load_tokenizer(file)
    corpora = dict.fromkeys(stage.config.data for stage in stages(config))
    surveys = {data: compute_corpus_stats(data) for data in corpora}
    return train_tokenizer(config.tokenizer, _texts(surveys, config.tokenizer.name, progress))


def _texts(surveys: dict[DataConfig, CorpusStats], kind: str, progress: StoreProgress | None) -> Iterator[str]:
    """Yield the training text of some corpora, in pieces that give the same tokenizer as the whole text."""
    split_chars = BPE_SPLIT_CHARS if kind == "bpe" else WORD_SPLIT_CHARS
    done, total = 0, sum(survey.n_characters for survey in surveys.values())
    for data, survey in surveys.items():
        for document in tokenizer_documents(data, survey.n_characters):
            for turn in document.messages:
                for piece in split_text(turn.text, split_chars):
                    yield piece
                    done += len(piece)
                    if progress is not None:
                        progress(done, total)


def fill_vocab_size(config: Config, tokenizer: Tokenizer) -> Config:
    """The config with model.vocab_size filled in. Raises UserError if the model has too few rows for the tokenizer."""
    needed, given = tokenizer.get_vocab_size(), config.model.vocab_size
    if given is not None and given < needed:
        raise UserError(f"config.model.vocab_size={given} is too small: the tokenizer has {needed} tokens.")
    model = dataclasses.replace(config.model, vocab_size=given or needed)
    return dataclasses.replace(config, model=model)


def prepare_stage(
    stage: Stage,
    tokenizer: Tokenizer,
    cache: Path,
    progress: StoreProgress | None = None,
    store: Store | None = None,
) -> StageData:
    """A stage's data, its store built under `cache` or found there, unless it is given.

    Raises UserError for less text than one batch.
    """
    data = StageData(stage, store or build_store(stage.config.data, tokenizer, cache / "stores", progress))
    check_enough_tokens(data.store.split("train"), data.seq_len, stage.config.training.batch_size)
    return data


class Resolved(NamedTuple):
    """A config whose epochs have been replaced by steps.

    Attributes:
        config: The config.
        steps: The numbers of steps that were computed, by dotted path.
        origins: The origins of these values, by dotted path.
        sentences: A sentence for the user about each of them.
    """

    config: Config
    steps: dict[str, int]
    origins: dict[str, str]
    sentences: list[str]


def resolve_epochs(config: Config, prepare: Callable[[Stage], StageData]) -> Resolved:
    """Replace the number of epochs of each stage by the smallest number of steps that reads so many.

    Args:
        config: The config, returned as it is if no stage has a number of epochs.
        prepare: A function that returns the data of a stage, whose number of steps is not known yet.

    Raises:
        UserError: The data are unsuitable, or the number of steps is too large, or too small for the config.
    """
    found, result = dict[str, int](), Resolved(config, {}, {}, [])
    for stage in stages(config):
        epochs, batch_size = stage.config.training.epochs, stage.config.training.batch_size
        if epochs is None:
            continue
        n_sequences = prepare(stage).n_sequences
        # As it was written: 0.1 of 30 windows are 3, which the product of floats exceeds.
        n_steps = math.ceil(Fraction(repr(epochs)) * n_sequences / batch_size)
        prefix = f"stages.{stage.name}." if config.stages else ""
        asked = f"config.{prefix}{EPOCHS}={epochs:.10g}"
        found[stage.name] = validate_value(STEPS, n_steps, f"{asked}: config.{prefix}{STEPS}")
        result.steps[prefix + STEPS] = found[stage.name]
        result.origins[prefix + STEPS] = asked
        per_epoch = f"{n_sequences:,} sequences an epoch, {batch_size} a step"
        result.sentences.append(f"{asked}: {n_steps:,} steps ({per_epoch}).")
    if not found:
        return result
    whole = with_steps(config, found)
    for stage in stages(whole):
        check_combinations(stage.config)
    return result._replace(config=whole)


def resolve_epochs_of_text(
    config: Config, tokenizer: Tokenizer, cache: Path, progress: StoreProgress | None = None
) -> Resolved:
    """`resolve_epochs` with the data of a tokenizer, their stores built under `cache` or found there."""
    return resolve_epochs(config, lambda stage: prepare_stage(stage, tokenizer, cache, progress))


def data_record(material: Iterable[StageData]) -> str:
    """What a run folder keeps of its data, as JSON: for each stage, counts and hashes of the text and its tokens.

    The digests of its `files` say which of them changed; whether the text did, `source` says.
    """
    stages = [{**_tokens(data), "files": file_digests(data.stage.config.data)} for data in material]
    return json.dumps(stages, indent=2) + "\n"


def _tokens(data: StageData) -> dict[str, Any]:
    return {"stage": data.stage.name, **json.loads(json.dumps(dataclasses.asdict(data.store.manifest)))}


def changed_stages(record: Path, material: Iterable[StageData]) -> list[str]:
    """The stages whose text or tokens are not those of the record in a file; none if there is no such file yet.

    Raises UserError as `read_data_record` does.
    """
    if not record.exists():
        return []
    recorded = [{name: value for name, value in stage.items() if name != "files"} for stage in read_data_record(record)]
    return [data.stage.name for data in material if _tokens(data) not in recorded]


def read_data_record(record: Path) -> list[dict[str, Any]]:
    """What `data_record` has written into a file. Raises UserError if it cannot be read or is damaged."""
    try:
        stages = json.loads(record.read_bytes())
    except OSError as error:
        raise UserError(f"{record} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{record} is damaged: it is not JSON.") from error
    if not isinstance(stages, list) or not all(map(_is_record, stages)):
        raise UserError(f"{record} is damaged: it does not say what each stage reads.")
    return stages


# Fields that a run folder records about the data of a stage, with their types.
RECORDED = {"stage": str, "source": str, "tokenizer": str, "n_dialogues": int, "splits": dict, "files": dict}


def _is_record(stage: Any) -> bool:
    return isinstance(stage, dict) and all(isinstance(stage.get(name), kind) for name, kind in RECORDED.items())
