"""Tokenizers and token stores, each made once for all trials that share them."""

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
from rustgpt_jax.tokenizers import Codec, save_tokenizer
from rustgpt_jax.training.run_inputs import RunInputs


class AssetCache:
    """Makes what trials read. With a folder, tokenizers are kept there for other processes too.

    One thread at a time makes something.
    """

    def __init__(self, folder: Path | None = None, progress: StoreProgress | None = None) -> None:
        self._folder, self._progress, self._turn = folder, progress, threading.RLock()
        self._tokenizers: dict[str, Codec] = {}
        self._stores: dict[tuple[str, str], Store] = {}

    def tokenizer(self, config: Config) -> Codec:
        """The tokenizer of a trial. Raises UserError for a corpus that cannot be read."""
        key = _tokenizer_key(config)
        if key not in self._tokenizers:
            file = self._folder / f"{key}.json" if self._folder else None
            self._tokenizers[key] = load_or_train_tokenizer(config, file, self._progress)
            if file is not None and not file.exists():
                save_tokenizer(self._tokenizers[key], file)
        return self._tokenizers[key]

    def keep_in(self, folder: Path) -> None:
        """Keep the tokenizers in a folder; those that are there already are the ones that trials began with."""
        self._folder = folder
        for key, tokenizer in self._tokenizers.items():
            if not (folder / f"{key}.json").exists():
                save_tokenizer(tokenizer, folder / f"{key}.json")

    def whole(self, config: Config) -> Config:
        """The config with its vocabulary filled in. Raises UserError if the model has too few rows for it."""
        with self._turn:
            return fill_vocab_size(config, self.tokenizer(config))

    def resolve_epochs(self, config: Config) -> Resolved:
        """The config with steps in place of epochs. Raises UserError for text that will not do."""
        with self._turn:
            return resolve_epochs(config, lambda stage: self._stage_data(stage, config))

    def inputs(self, config: Config) -> RunInputs:
        """All that a trial is made of. Raises UserError for less text than one batch."""
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
    """A name for what a tokenizer depends on: its own knobs and the text of all stages."""
    corpora = [asdict(data) for data in dict.fromkeys(stage.config.data for stage in stages(config))]
    text = json.dumps([asdict(config.tokenizer), corpora], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
