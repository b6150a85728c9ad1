"""Cache of tokenizers and token stores that trials share."""

import hashlib
import json
import threading
from dataclasses import asdict
from pathlib import Path

from rustgpt_jax.cache_dir import cache_folder
from rustgpt_jax.config.schema import Config, Stage, stages
from rustgpt_jax.data.preprocess import (
    Resolved,
    StageData,
    StoreProgress,
    fill_vocab_size,
    load_or_train_tokenizer,
    prepare_stage,
    resolve_epochs,
)
from rustgpt_jax.data.token_store import Store
from rustgpt_jax.tokenizers import Tokenizer, save_tokenizer
from rustgpt_jax.training.run_inputs import RunInputs


class AssetCache:
    """Builds the tokenizers and data of trials, each once. With a folder, other processes share the tokenizers.

    One thread at a time makes something.
    """

    def __init__(self, folder: Path | None = None, progress: StoreProgress | None = None) -> None:
        self._folder, self._progress, self._turn = folder, progress, threading.RLock()
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

    def keep_in(self, folder: Path) -> None:
        """Save the tokenizers in a folder, except those that are there already."""
        self._folder = folder
        for key, tokenizer in self._tokenizers.items():
            if not (folder / f"{key}.json").exists():
                save_tokenizer(tokenizer, folder / f"{key}.json")

    def whole(self, config: Config) -> Config:
        """Fill in the vocabulary size of a config. Raises UserError if the model's is too small."""
        with self._turn:
            return fill_vocab_size(config, self.tokenizer(config))

    def resolve_epochs(self, config: Config) -> Resolved:
        """Convert epochs to steps in a config. Raises UserError if the text is unsuitable."""
        with self._turn:
            return resolve_epochs(config, lambda stage: self._stage_data(stage, config))

    def inputs(self, config: Config) -> RunInputs:
        """Return the inputs of a trial. Raises UserError if the text is shorter than one batch."""
        with self._turn:
            whole = self.whole(config)
            data = [self._stage_data(stage, config) for stage in stages(whole)]
            return RunInputs(config, whole, self.tokenizer(config), data)

    def _stage_data(self, stage: Stage, config: Config) -> StageData:
        key = _tokenizer_key(config), repr(stage.config.data)
        data = prepare_stage(stage, self.tokenizer(config), cache_folder(), self._progress, self._stores.get(key))
        self._stores[key] = data.store
        return data


def _tokenizer_key(config: Config) -> str:
    """Return a hash of what a tokenizer depends on: its knobs and the text of all stages."""
    corpora = [asdict(data) for data in dict.fromkeys(stage.config.data for stage in stages(config))]
    text = json.dumps([asdict(config.tokenizer), corpora], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
