"""Cache of the tokenizers and token stores that trials share."""

import hashlib
import json
import threading
from dataclasses import asdict
from pathlib import Path

from rustgpt_jax.cache_dir import cache_folder
from rustgpt_jax.config.schema import Config, Stage, stages
from rustgpt_jax.data import preprocess
from rustgpt_jax.data.token_store import Progress, Store
from rustgpt_jax.tokenizers import Tokenizer, save_tokenizer
from rustgpt_jax.training.run_inputs import RunInputs


class AssetCache:
    """Builds each tokenizer and token store once, in one thread at a time.

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
            self._tokenizers[key] = preprocess.load_or_train_tokenizer(config, file, self._progress)
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
            return preprocess.fill_vocab_size(config, self.tokenizer(config))

    def resolve_epochs(self, config: Config) -> preprocess.ResolvedEpochs:
        """Convert epochs to steps in a config. Raises UserError if the text is unsuitable."""
        with self._lock:
            return preprocess.resolve_epochs(config, lambda stage: self._stage_data(stage, config))

    def inputs(self, config: Config) -> RunInputs:
        """Return the inputs of a trial. Raises UserError if the text is shorter than one batch."""
        with self._lock:
            full_config = self.fill_vocab_size(config)
            data = [self._stage_data(stage, config) for stage in stages(full_config)]
            return RunInputs(config, full_config, self.tokenizer(config), data)

    def _stage_data(self, stage: Stage, config: Config) -> preprocess.StageData:
        key = _tokenizer_key(config), repr(stage.config.data)
        data = preprocess.prepare_stage(
            stage, self.tokenizer(config), cache_folder(), self._progress, self._stores.get(key)
        )
        self._stores[key] = data.store
        return data


def _tokenizer_key(config: Config) -> str:
    """Return a hash of everything that a tokenizer depends on: its config and the data of all stages."""
    corpora = [asdict(data) for data in dict.fromkeys(stage.config.data for stage in stages(config))]
    text = json.dumps([asdict(config.tokenizer), corpora], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
