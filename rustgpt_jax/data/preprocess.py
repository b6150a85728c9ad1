"""The tokenizer and token stores of a run, and a cache that the trials of a sweep share."""

import dataclasses
import hashlib
import json
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rustgpt_jax.atomic_io import read_json
from rustgpt_jax.cache_dir import cache_folder
from rustgpt_jax.config.schema import EPOCHS, STEPS, Config, DataConfig, Stage, stages, with_steps
from rustgpt_jax.config.validation import check_combinations, validate_value
from rustgpt_jax.data.datasets import hash_files, load_training_documents
from rustgpt_jax.data.pipeline import Batch, Batches, SequenceReader, count_eval_batches, iterate_eval_batches
from rustgpt_jax.data.token_store import (
    CorpusStats,
    Progress,
    Store,
    build_store,
    check_enough_tokens,
    compute_corpus_stats,
)
from rustgpt_jax.errors import UserError
from rustgpt_jax.tokenizers import Tokenizer, load_tokenizer, save_tokenizer, split_text, train_tokenizer
from rustgpt_jax.tokenizers.tokenizer import BPE_SPLIT_CHARS, WORD_SPLIT_CHARS


@dataclass(frozen=True, eq=False)
class StageData:
    """A stage with its token store."""

    stage: Stage
    store: Store

    @property
    def seq_len(self) -> int:
        """The number of tokens in a training sequence."""
        return self.stage.config.seq_len

    @property
    def n_sequences(self) -> int:
        """The number of training sequences in an epoch."""
        return len(SequenceReader(self.store.split("train"), self.seq_len))

    @property
    def is_dialogue(self) -> bool:
        """True if prompts are questions to answer rather than text to continue."""
        return self.store.manifest.n_dialogues > 0

    def training_batches(self, rows: np.ndarray | None = None) -> Batches:
        """Return the training batches of the stage, indexed by step of the run; `rows` selects rows of each batch."""
        config, stream = self.stage.config, self.store.split("train")
        return Batches(stream, self.seq_len, config.training.batch_size, config.seed, self.stage.first_step, rows)

    def validation_batches(self, rows: np.ndarray | None = None) -> Iterator[Batch]:
        """Iterate over the batches of an evaluation; `rows` selects rows of each batch."""
        config, stream = self.stage.config, self.store.split("valid")
        limit = config.logging.eval_batches
        return iterate_eval_batches(stream, self.seq_len, config.training.batch_size, limit, rows)

    @property
    def n_validation_batches(self) -> int:
        """The number of batches of an evaluation."""
        config, stream = self.stage.config, self.store.split("valid")
        return count_eval_batches(stream, self.seq_len, config.training.batch_size, config.logging.eval_batches)


def load_or_train_tokenizer(config: Config, file: Path | None = None, progress: Progress | None = None) -> Tokenizer:
    """Load the tokenizer in `file`, or train one on the training documents of all stages if the file does not exist.

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
    stats = {data: compute_corpus_stats(data) for data in corpora}
    return train_tokenizer(config.tokenizer, _training_texts(stats, config.tokenizer.name, progress))


def _training_texts(corpora: dict[DataConfig, CorpusStats], kind: str, progress: Progress | None) -> Iterator[str]:
    """Yield the training text of corpora, in pieces that give the same tokenizer as the whole text."""
    split_chars = BPE_SPLIT_CHARS if kind == "bpe" else WORD_SPLIT_CHARS
    done, total = 0, sum(stats.n_characters for stats in corpora.values())
    for data, stats in corpora.items():
        for document in load_training_documents(data, stats.n_characters):
            for message in document.messages:
                for piece in split_text(message.text, split_chars):
                    yield piece
                    done += len(piece)
                    if progress is not None:
                        progress(done, total)


def fill_vocab_size(config: Config, tokenizer: Tokenizer) -> Config:
    """Return the config with model.vocab_size filled in. Raises UserError if it is too small for the tokenizer."""
    n_tokens, vocab_size = tokenizer.get_vocab_size(), config.model.vocab_size
    if vocab_size is not None and vocab_size < n_tokens:
        raise UserError(f"config.model.vocab_size={vocab_size} is too small: the tokenizer has {n_tokens} tokens.")
    model = dataclasses.replace(config.model, vocab_size=vocab_size or n_tokens)
    return dataclasses.replace(config, model=model)


def prepare_stage(
    stage: Stage,
    tokenizer: Tokenizer,
    cache: Path,
    progress: Progress | None = None,
    store: Store | None = None,
) -> StageData:
    """Return a stage with the given store, or with one found or built under `cache`.

    Raises:
        UserError: The corpus cannot be read, or has too few tokens for a batch.
    """
    data = StageData(stage, store or build_store(stage.config.data, tokenizer, cache / "stores", progress))
    check_enough_tokens(data.store.split("train"), data.seq_len, stage.config.training.batch_size)
    return data


class ResolvedEpochs(NamedTuple):
    """A config whose epochs have been replaced by steps.

    Attributes:
        config: The config.
        steps: The computed numbers of steps, by dotted path.
        origins: The origins of these values, by dotted path.
        messages: A message for the user about each of them.
    """

    config: Config
    steps: dict[str, int]
    origins: dict[str, str]
    messages: list[str]


def resolve_epochs(config: Config, prepare: Callable[[Stage], StageData]) -> ResolvedEpochs:
    """Replace each stage's number of epochs by the smallest sufficient number of steps.

    Args:
        config: The config, returned unchanged if no stage has a number of epochs.
        prepare: A function that returns the data of a stage whose number of steps is still unknown.

    Raises:
        UserError: The data are unsuitable, or the number of steps is too large, or too small for the config.
    """
    found, result = dict[str, int](), ResolvedEpochs(config, {}, {}, [])
    for stage in stages(config):
        epochs, batch_size = stage.config.training.epochs, stage.config.training.batch_size
        if epochs is None:
            continue
        n_sequences = prepare(stage).n_sequences
        # With decimal arithmetic, 0.1 epochs of 30 sequences are exactly 3; the product of floats is larger.
        n_steps = math.ceil(Fraction(repr(epochs)) * n_sequences / batch_size)
        prefix = f"stages.{stage.name}." if config.stages else ""
        origin = f"config.{prefix}{EPOCHS}={epochs:.10g}"
        found[stage.name] = validate_value(STEPS, n_steps, f"{origin}: config.{prefix}{STEPS}")
        result.steps[prefix + STEPS] = found[stage.name]
        result.origins[prefix + STEPS] = origin
        result.messages.append(
            f"{origin}: {n_steps:,} steps ({n_sequences:,} sequences per epoch, {batch_size} per step)."
        )
    if not found:
        return result
    resolved = with_steps(config, found)
    for stage in stages(resolved):
        check_combinations(stage.config)
    return result._replace(config=resolved)


def resolve_epochs_of_text(
    config: Config, tokenizer: Tokenizer, cache: Path, progress: Progress | None = None
) -> ResolvedEpochs:
    """Resolve epochs as in `resolve_epochs`, with token stores that are found or built under `cache`."""
    return resolve_epochs(config, lambda stage: prepare_stage(stage, tokenizer, cache, progress))


# The record of the data in a run folder.


def format_data_record(data: Iterable[StageData]) -> str:
    """Return a JSON record of each stage's data: counts, hashes of the text and its tokens, and digests of its files.

    The digests show which files changed; `source` shows whether the text did.
    """
    records = [{**_token_record(each), "files": hash_files(each.stage.config.data)} for each in data]
    return json.dumps(records, indent=2) + "\n"


def _token_record(data: StageData) -> dict[str, Any]:
    return {"stage": data.stage.name, **json.loads(json.dumps(dataclasses.asdict(data.store.manifest)))}


def find_changed_stages(record: Path, data: Iterable[StageData]) -> list[str]:
    """Return the names of stages whose text or tokens differ from a record; none if the record does not exist yet."""
    if not record.exists():
        return []
    recorded = [{name: value for name, value in stage.items() if name != "files"} for stage in read_data_record(record)]
    return [each.stage.name for each in data if _token_record(each) not in recorded]


# Required fields of a stage's record.
RECORD_FIELDS = {"stage": str, "source": str, "tokenizer": str, "n_dialogues": int, "splits": dict, "files": dict}


def read_data_record(record: Path) -> list[dict[str, Any]]:
    """Read the record that `format_data_record` returned. Raises UserError if the file is unreadable or damaged."""
    records = read_json(record)
    if not isinstance(records, list) or not all(
        isinstance(stage, dict) and all(isinstance(stage.get(name), kind) for name, kind in RECORD_FIELDS.items())
        for stage in records
    ):
        raise UserError(f"{record} is damaged: it does not describe the data of each stage.")
    return records


class AssetCache:
    """Cache that builds each tokenizer and token store of a sweep once, in one thread at a time.

    Args:
        folder: The folder that tokenizers are loaded from and saved to, so that other processes can use them.
        progress: A function that is called with the progress of tokenization.
    """

    def __init__(self, folder: Path | None = None, progress: Progress | None = None) -> None:
        self._folder, self._progress, self._lock = folder, progress, threading.RLock()
        self._tokenizers: dict[str, Tokenizer] = {}
        self._stores: dict[tuple[str, str], Store] = {}

    def tokenizer(self, config: Config) -> Tokenizer:
        """Return the tokenizer of a trial. Raises UserError if the corpus cannot be read."""
        key = _tokenizer_key(config)
        if key not in self._tokenizers:
            file = self._folder / f"{key}.json" if self._folder else None
            self._tokenizers[key] = load_or_train_tokenizer(config, file, self._progress)
            if file is not None and not file.exists():
                save_tokenizer(self._tokenizers[key], file)
        return self._tokenizers[key]

    def set_folder(self, folder: Path) -> None:
        """Set the folder of the tokenizers, and save the tokenizers that are missing there."""
        self._folder = folder
        for key, tokenizer in self._tokenizers.items():
            if not (folder / f"{key}.json").exists():
                save_tokenizer(tokenizer, folder / f"{key}.json")

    def fill_vocab_size(self, config: Config) -> Config:
        """Fill in the vocabulary size of a config. Raises UserError if the model's is too small."""
        with self._lock:
            return fill_vocab_size(config, self.tokenizer(config))

    def resolve_epochs(self, config: Config) -> ResolvedEpochs:
        """Convert epochs to steps in a config. Raises UserError if the text is unsuitable."""
        with self._lock:
            return resolve_epochs(config, lambda stage: self._stage_data(stage, config))

    def prepare(self, config: Config) -> tuple[Config, Tokenizer, list[StageData]]:
        """Return a trial's config (with the vocabulary size filled in), its tokenizer, and the data of each stage.

        Raises:
            UserError: The text is shorter than one batch.
        """
        with self._lock:
            full_config = self.fill_vocab_size(config)
            data = [self._stage_data(stage, config) for stage in stages(full_config)]
            return full_config, self.tokenizer(config), data

    def _stage_data(self, stage: Stage, config: Config) -> StageData:
        key = _tokenizer_key(config), repr(stage.config.data)
        data = prepare_stage(stage, self.tokenizer(config), cache_folder(), self._progress, self._stores.get(key))
        self._stores[key] = data.store
        return data


def _tokenizer_key(config: Config) -> str:
    """Return a hash of everything that a tokenizer depends on: its config and the data of all stages."""
    corpora = [asdict(data) for data in dict.fromkeys(stage.config.data for stage in stages(config))]
    text = json.dumps([asdict(config.tokenizer), corpora], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
