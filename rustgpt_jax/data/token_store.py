"""The token store: a corpus encoded once, kept in flat files that every run reads by memory map.

A store is a folder named by the hash of all that its tokens depend on: the documents, the tokenizer and the knobs of
the split. It appears whole or not at all, and is never changed. manifest.json has its counts and file hashes.
"""

import array
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from rustgpt_jax.atomic_io import publish_folder
from rustgpt_jax.cache_dir import REMEDY
from rustgpt_jax.config.schema import DataConfig
from rustgpt_jax.data.datasets import assign_splits, documents, fingerprint, is_validation_fingerprint
from rustgpt_jax.errors import UserError
from rustgpt_jax.tokenizers import UNKNOWN, Document, Tokenizer, encode_documents, plain_document, split_text

# One split on disk: a stream of its documents followed by a copy of the first token, cut into shards.
#
# Shards are raw little-endian arrays that can be memory-mapped. The start of each document is stored next to them.
# Weights are stored only if some tokens have zero loss weight.


@dataclass(frozen=True)
class StoredFile:
    """A file of a store: its name there, its bytes, their SHA-256."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class SplitManifest:
    """The counts and files of one split.

    `n_learned` counts the tokens with weight True, without the first of all, which nothing comes before;
    `learned_bytes` is the UTF-8 length of the text that they stand for.
    """

    n_documents: int
    n_tokens: int
    n_learned: int
    n_unknown: int
    learned_bytes: int
    tokens: tuple[StoredFile, ...]
    weights: tuple[StoredFile, ...]
    offsets: StoredFile

    @property
    def files(self) -> tuple[StoredFile, ...]:
        """Every file of the split."""
        return (*self.tokens, *self.weights, self.offsets)


@dataclass(frozen=True, eq=False)
class TokenStream:
    """The tokens of one split.

    Attributes:
        token_shards: Arrays of equal length, except that the last may be shorter.
        weight_shards: Loss weights, cut in the same way; empty if every token is a target.
        offsets: The index of each document's first token (int64).
    """

    token_shards: tuple[np.ndarray, ...]
    weight_shards: tuple[np.ndarray, ...]
    offsets: np.ndarray
    end_id: int
    n_learned: int
    learned_bytes: int

    @property
    def n_tokens(self) -> int:
        """The length of the stream, including the repeated first token."""
        return sum(map(len, self.token_shards))

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes per learned token: bits per byte = bits per learned token / this. 0 for an empty stream."""
        return self.learned_bytes / self.n_learned if self.n_learned else 0.0

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """The ids (int32) from `start` to `stop`, or to the end of the stream where that comes first."""
        return _read(self.token_shards, start, stop).astype(np.int32)

    def weights(self, start: int, stop: int) -> np.ndarray:
        """Whether each token is to be learned (bool), from `start` to `stop` or to the end of the stream."""
        if not self.weight_shards:
            return np.ones(max(0, min(stop, self.n_tokens) - start), bool)
        return _read(self.weight_shards, start, stop).astype(bool)


def _read(shards: tuple[np.ndarray, ...], start: int, stop: int) -> np.ndarray:
    size = len(shards[0]) if shards else 1
    places = range(start // size, min(-(-stop // size), len(shards)))
    parts = [shards[place][max(0, start - place * size) : stop - place * size] for place in places]
    return parts[0] if len(parts) == 1 else np.concatenate(parts or [np.empty(0, np.uint16)])


def read_stream(folder: Path, manifest: SplitManifest, dtype: str, end_id: int) -> TokenStream:
    """The stream of a split, memory-mapped."""
    return TokenStream(
        token_shards=tuple(_map(folder / file.name, dtype) for file in manifest.tokens),
        weight_shards=tuple(_map(folder / file.name, "u1") for file in manifest.weights),
        offsets=np.load(folder / manifest.offsets.name, allow_pickle=False),
        end_id=end_id,
        n_learned=manifest.n_learned,
        learned_bytes=manifest.learned_bytes,
    )


def _map(path: Path, dtype: str) -> np.ndarray:
    # A plain array over the mapped memory: slicing a np.memmap costs several times as much.
    return np.asarray(np.memmap(path, dtype, "r"))


def stored_file(path: Path) -> StoredFile:
    """What a manifest says of a file. Reads all of it."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return StoredFile(path.name, path.stat().st_size, digest)


class SplitWriter:
    """Writes the files of one split into a folder: `append` each document, `flush` now and then, `close`."""

    def __init__(self, folder: Path, name: str, dtype: str, shard_tokens: int) -> None:
        self._offsets_path = folder / f"{name}.offsets.npy"
        self._tokens = _ShardWriter(folder, f"{name}.tokens", dtype, shard_tokens)
        self._weights = _ShardWriter(folder, f"{name}.weights", "u1", shard_tokens)
        self._first: tuple[np.ndarray, np.ndarray] | None = None
        self._offsets = array.array("q")
        self._pending: list[tuple[np.ndarray, np.ndarray]] = []
        self._n_tokens = self._n_weighted = self._n_unknown = self._learned_bytes = 0

    def append(self, ids: np.ndarray, weights: np.ndarray, n_unknown: int, learned_bytes: int) -> None:
        """Append a document, including its delimiter tokens, or the first piece of a document."""
        if self._first is None and len(ids):
            self._first = ids[:1], weights[:1]
        self._offsets.append(self._n_tokens)
        self.extend(ids, weights, n_unknown, learned_bytes)

    def extend(self, ids: np.ndarray, weights: np.ndarray, n_unknown: int = 0, learned_bytes: int = 0) -> None:
        """Append another piece to the latest document."""
        self._n_unknown += n_unknown
        self._learned_bytes += learned_bytes
        self._pending.append((ids, weights))
        self._n_tokens += len(ids)
        self._n_weighted += int(weights.sum())

    def flush(self) -> None:
        """Write what was appended since the last time."""
        if self._pending:
            ids, weights = (np.concatenate(parts) for parts in zip(*self._pending, strict=True))
            self._tokens.append(ids)
            self._weights.append(weights)
            self._pending = []

    def close(self) -> SplitManifest:
        """Flush the remaining tokens and return a manifest of the split.

        The stream is circular, so its first token is repeated at the end, as the target that follows the last document.
        """
        # The first token has no predecessor, so it is a target only in its copy at the end.
        n_learned = self._n_weighted
        if self._first is not None:
            self.extend(*self._first)
        self.flush()
        np.save(self._offsets_path, np.array(self._offsets, np.int64))
        if self._n_weighted == self._n_tokens:
            self._weights.discard()
        return SplitManifest(
            n_documents=len(self._offsets),
            n_tokens=self._n_tokens,
            n_learned=n_learned,
            n_unknown=self._n_unknown,
            learned_bytes=self._learned_bytes,
            tokens=tuple(map(stored_file, self._tokens.paths)),
            weights=tuple(map(stored_file, self._weights.paths)),
            offsets=stored_file(self._offsets_path),
        )


class _ShardWriter:
    """Writes one array as files of `shard_tokens` elements each, the last one shorter."""

    def __init__(self, folder: Path, stem: str, dtype: str, shard_tokens: int) -> None:
        self._folder, self._stem, self._dtype, self._shard_tokens = folder, stem, dtype, shard_tokens
        self._length = 0
        self.paths: list[Path] = []

    def append(self, values: np.ndarray) -> None:
        while len(values):
            room = -self._length % self._shard_tokens
            if room == 0:
                self.paths.append(self._folder / f"{self._stem}.{len(self.paths):05d}.bin")
                room = self._shard_tokens
            with self.paths[-1].open("ab") as file:
                file.write(values[:room].astype(self._dtype).tobytes())
            self._length += len(values[:room])
            values = values[room:]

    def discard(self) -> None:
        for path in self.paths:
            path.unlink()
        self.paths = []


# Folders that a process fills, holds by a lock while it does, and leaves nothing of, even where it is killed.

# In each folder. The operating system lets go of it when the process that holds it ends, however it ends.
LOCK = ".lock"


@contextmanager
def temporary_folder(root: Path, name: str) -> Iterator[Path]:
    """A new hidden folder in `root`, which is made too; removed in the end, unless it has got another name by then.

    Hidden folders in `root` that no process holds are leftovers of killed ones, and are removed first.
    """
    for leftover in root.glob(".*"):
        lock = _held(leftover, is_own=False)
        if lock is not None:
            with lock:
                shutil.rmtree(leftover, ignore_errors=True)
    folder, lock = _new_folder(root, name)
    with lock:
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _new_folder(root: Path, name: str) -> tuple[Path, IO[str]]:
    while True:
        folder = root / f".{name}.{uuid.uuid4().hex}"
        folder.mkdir(parents=True)
        lock = _held(folder, is_own=True)
        # Another process may have taken the folder, which nobody held yet, for a leftover.
        if lock is not None:
            return folder, lock


def _held(folder: Path, is_own: bool) -> IO[str] | None:
    """The lock of a folder, or None where another process has it, or has just removed the folder."""
    try:
        lock = open(folder / LOCK, "a", encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        if is_own and folder.exists():
            raise
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock.fileno()), os.stat(folder / LOCK)):
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError as error:
        # Some cluster file systems have no locks: leftovers stay there, and building must still be possible.
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
        if is_own:
            return lock
    lock.close()
    return None


FORMAT_VERSION = 1
# Increment when the document delimiters of imported tokenizers change.
DIALECT_VERSION = 2
SPLITS = ("train", "valid")
SHARD_TOKENS = 2**26
# Text that is encoded, and held in memory, at a time.
BATCH_CHARACTERS = 2**21

Progress = Callable[[int, int | None], None]


@dataclass(frozen=True)
class Manifest:
    """What manifest.json holds. `source` and `tokenizer` are SHA-256 of the documents and of the tokenizer's JSON."""

    format_version: int
    source: str
    tokenizer: str
    vocab_size: int
    end_id: int
    dtype: str
    n_dialogues: int
    splits: dict[str, SplitManifest]


@dataclass(frozen=True)
class Store:
    """A finished store in the folder `path`."""

    path: Path
    manifest: Manifest

    def split(self, name: str) -> TokenStream:
        """The stream of 'train' or 'valid', memory-mapped. With valid_fraction=0 the latter is empty.

        Raises UserError naming a file that is damaged, as far as that can be told without reading all tokens.
        """
        split = self.manifest.splits[name]
        self._verify(split.offsets)
        return read_stream(self.path, split, self.manifest.dtype, self.manifest.end_id)

    def verify(self) -> None:
        """Compare the SHA-256 of every file with the manifest's. Raises UserError naming the first that differs."""
        for file in (file for split in self.manifest.splits.values() for file in split.files):
            self._verify(file)

    def _verify(self, file: StoredFile) -> None:
        if stored_file(self.path / file.name) != file:
            raise UserError(f"{self.path / file.name}: the file is damaged; delete {self.path} to build it anew.")


def open_store(path: Path) -> Store:
    """The store in a folder. Raises UserError when it is not there, not whole (by its sizes), or of another format."""
    try:
        values = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if values["format_version"] != FORMAT_VERSION:
            raise UserError(f"{path}: the store has format {values['format_version']}, not {FORMAT_VERSION}.")
        if values.pop("checksum") != _checksum(values):
            raise UserError(f"{path}: the store's manifest.json is damaged; delete {path} to build it anew.")
        splits = {name: _split_manifest(split) for name, split in values.pop("splits").items()}
        for file in (file for split in splits.values() for file in split.files):
            if os.path.getsize(path / file.name) != file.size:
                raise UserError(f"{path / file.name}: the file does not have the size that the manifest says.")
        return Store(path, Manifest(**values, splits=splits))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: this is not a token store ({error}).") from None


def _checksum(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _split_manifest(values: dict[str, Any]) -> SplitManifest:
    tokens, weights = (tuple(StoredFile(**file) for file in values.pop(name)) for name in ("tokens", "weights"))
    return SplitManifest(tokens=tokens, weights=weights, offsets=StoredFile(**values.pop("offsets")), **values)


def check_enough_tokens(stream: TokenStream, window: int, batch_size: int) -> None:
    """Raises UserError when the training stream has less than one batch of windows of `window` tokens."""
    needed = window * batch_size + 1
    if stream.n_tokens < needed:
        raise UserError(
            f"The training split has {stream.n_tokens} tokens and one batch needs {needed}: lower "
            f"config.training.batch_size={batch_size} or config.data.seq_len={window}, or give more text."
        )


# Building.


@dataclass(frozen=True)
class CorpusStats:
    """Statistics of a corpus and the SHA-256 of its documents, computed in one pass."""

    n_documents: int
    n_dialogues: int
    n_characters: int
    source: str


def build_store(
    config: DataConfig,
    tokenizer: Tokenizer,
    root: Path,
    progress: Progress | None = None,
    shard_tokens: int = SHARD_TOKENS,
) -> Store:
    """Return the token store of a corpus under `root`, building it if necessary.

    The documents are streamed twice, once to name the store and once to encode them. Partial stores left under `root`
    by killed builds are removed.

    Args:
        config: The corpus config.
        tokenizer: The tokenizer.
        root: The folder that holds all stores.
        progress: Called with the number of characters encoded so far and in total.
        shard_tokens: The number of tokens per shard.

    Raises:
        UserError: The corpus is empty, a split with a nonzero share gets no document, or `root` is not writable.
    """
    survey = compute_corpus_stats(config)
    root = Path(root)
    folder = root / _key(config, tokenizer, survey)
    store = _existing(folder)
    if store is not None:
        return store
    try:
        with temporary_folder(root, folder.name) as temporary:
            splits = _write_splits(config, tokenizer, survey, temporary, progress, shard_tokens)
            _write_manifest(temporary, tokenizer, survey, splits)
            return _publish(temporary, folder)
    except OSError as error:
        raise UserError(f"{root}: the token store cannot be written ({error.strerror}). {REMEDY}") from error


def compute_corpus_stats(config: DataConfig) -> CorpusStats:
    """Compute the statistics of a corpus without encoding it.

    Raises:
        UserError: The corpus has no text, or a split with a nonzero share gets no document.
    """
    digest, n_documents, n_dialogues, n_characters, n_valid = hashlib.sha256(), 0, 0, 0, 0
    for document in documents(config):
        mark = fingerprint(document)
        digest.update(mark)
        n_documents += 1
        n_dialogues += document.is_dialogue
        n_characters += len(document.text)
        n_valid += is_validation_fingerprint(mark, config)
    if not n_documents:
        raise UserError(f"config.data.corpus={config.corpus!r} has no document with text.")
    if config.split == "document":
        _require_documents(config, n_documents, {"train": n_documents - n_valid, "valid": n_valid})
    return CorpusStats(n_documents, n_dialogues, n_characters, digest.hexdigest())


def _hashed(source: Iterable[Document], digest: Any) -> Iterator[Document]:
    for document in source:
        digest.update(fingerprint(document))
        yield document


def _key(config: DataConfig, tokenizer: Tokenizer, survey: CorpusStats) -> str:
    knobs = [config.split, config.valid_fraction, config.loss_mask]
    parts = [FORMAT_VERSION, survey.source, tokenizer_hash(tokenizer), *knobs]
    if tokenizer.chat_format is not None:
        parts.append(DIALECT_VERSION)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """Return the SHA-256 of everything that affects a tokenizer's output, which identifies the tokenizer."""
    return hashlib.sha256(tokenizer.serialized.encode()).hexdigest()


def _existing(folder: Path) -> Store | None:
    try:
        return open_store(folder)
    except UserError:
        return None


def _publish(temporary: Path, folder: Path) -> Store:
    """Give a finished folder its name, unless another process was first. A damaged store of that name is replaced."""
    publish_folder(temporary, folder, lambda path: _existing(path) is not None)
    (folder / LOCK).unlink(missing_ok=True)
    return open_store(folder)


def _write_splits(
    config: DataConfig,
    tokenizer: Tokenizer,
    survey: CorpusStats,
    folder: Path,
    progress: Progress | None,
    shard_tokens: int,
) -> dict[str, SplitManifest]:
    unknown_id = tokenizer.token_to_id(UNKNOWN)
    writers = {name: SplitWriter(folder, name, _dtype(tokenizer), shard_tokens) for name in SPLITS}
    digest, done = hashlib.sha256(), 0
    for batch in _batches(
        _parts(assign_splits(_hashed(documents(config), digest), config, survey.n_characters), tokenizer)
    ):
        encoded = encode_documents(tokenizer, [part.document for part in batch], config.loss_mask)
        for part, (ids, weights) in zip(batch, encoded, strict=True):
            counts = int((ids == unknown_id).sum()), _learned_bytes(part.document, config.loss_mask)
            if part.is_first:
                writers[part.split].append(ids, weights, *counts)
            else:
                writers[part.split].extend(ids[1:], weights[1:], *counts)
            done += len(part.document.text)
        for writer in writers.values():
            writer.flush()
        if progress is not None:
            progress(done, survey.n_characters)
    if digest.hexdigest() != survey.source:
        raise UserError(f"config.data.corpus={config.corpus!r} changed while it was being read; start again.")
    splits = {name: writer.close() for name, writer in writers.items()}
    _require_documents(config, survey.n_documents, {name: split.n_documents for name, split in splits.items()})
    return splits


def _dtype(tokenizer: Tokenizer) -> str:
    return "<u2" if tokenizer.get_vocab_size() <= 2**16 else "<u4"


class _Part(NamedTuple):
    """A document of a split, or one piece of a long document."""

    split: str
    document: Document
    is_first: bool


def _parts(source: Iterable[tuple[str, Document]], tokenizer: Tokenizer) -> Iterator[_Part]:
    """Yield documents, with long plain texts in pieces, so that only one piece and its tokens are in memory."""
    for split, document in source:
        if document.is_dialogue or len(document.text) <= BATCH_CHARACTERS or tokenizer.chat_format is not None:
            yield _Part(split, document, is_first=True)
            continue
        for number, text in enumerate(split_text(document.text, tokenizer.split_chars, BATCH_CHARACTERS)):
            yield _Part(split, plain_document(document.name, text), number == 0)


def _batches(source: Iterable[_Part]) -> Iterator[list[_Part]]:
    batch: list[_Part] = []
    size = 0
    for part in source:
        batch.append(part)
        size += len(part.document.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _learned_bytes(document: Document, loss_mask: str) -> int:
    return sum(len(turn.text.encode()) for turn in document.messages if loss_mask == "all" or turn.is_assistant_target)


def _require_documents(config: DataConfig, n_documents: int, of_split: dict[str, int]) -> None:
    for name, number in of_split.items():
        if not number and (name == "train" or config.valid_fraction > 0):
            raise UserError(
                f"The corpus has {n_documents} document(s) and the split {name!r} got none: set "
                "config.data.split='tail' to cut the whole text in two, another config.data.valid_fraction, or "
                "config.data.valid_fraction=0 for no validation."
            )


def _write_manifest(folder: Path, tokenizer: Tokenizer, survey: CorpusStats, splits: dict[str, SplitManifest]) -> None:
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        source=survey.source,
        tokenizer=tokenizer_hash(tokenizer),
        vocab_size=tokenizer.get_vocab_size(),
        end_id=tokenizer.end_id,
        dtype=_dtype(tokenizer),
        n_dialogues=survey.n_dialogues,
        splits=splits,
    )
    values = dataclasses.asdict(manifest)
    text = json.dumps(values | {"checksum": _checksum(values)}, indent=1)
    (folder / "manifest.json").write_text(text, encoding="utf-8")
