"""The token store: a corpus encoded once, in flat files that every run memory-maps.

A store is a folder named by a hash of everything that its tokens depend on: the documents, the tokenizer and the config
of the split. It is created atomically and never changed. Each split is a stream of its documents followed by a copy of
the first token, cut into shards: raw little-endian arrays. Beside them are the start of each document and, if some
tokens have zero loss weight, the weights. manifest.json contains the counts and the hashes of the files.
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
from rustgpt_jax.data.datasets import assign_splits, hash_document, is_validation, load_documents
from rustgpt_jax.errors import UserError
from rustgpt_jax.tokenizers import UNKNOWN, Document, Tokenizer, encode_documents, plain_document, split_text

FORMAT_VERSION = 2
# Increment when the document delimiters of imported tokenizers change.
CHAT_FORMAT_VERSION = 2
SPLITS = ("train", "valid")
SHARD_TOKENS = 2**26
# The number of characters to encode, and hold in memory, at a time.
BATCH_CHARACTERS = 2**21

# Called with the number of characters processed so far and in total.
Progress = Callable[[int, int | None], None]


@dataclass(frozen=True)
class StoredFile:
    """The name, size in bytes and SHA-256 of a file in a store."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class SplitManifest:
    """The counts and files of one split.

    `n_targets` is the number of targets: tokens with weight True, except the first, which has no predecessor.
    `target_bytes` is the length of their text in UTF-8.
    """

    n_documents: int
    n_tokens: int
    n_targets: int
    n_unknown: int
    target_bytes: int
    tokens: tuple[StoredFile, ...]
    weights: tuple[StoredFile, ...]
    offsets: StoredFile

    @property
    def files(self) -> tuple[StoredFile, ...]:
        """All files of the split."""
        return (*self.tokens, *self.weights, self.offsets)


@dataclass(frozen=True, eq=False)
class TokenStream:
    """The tokens of one split.

    Attributes:
        token_shards: Arrays of equal length, except that the last may be shorter.
        weight_shards: Loss weights, cut in the same way; empty if every token is a target.
        offsets: The index of each document's first token (int64).
        end_id: The id of the end token, which is also used as padding.
        n_targets: The number of targets.
        target_bytes: The length of their text in UTF-8.
    """

    token_shards: tuple[np.ndarray, ...]
    weight_shards: tuple[np.ndarray, ...]
    offsets: np.ndarray
    end_id: int
    n_targets: int
    target_bytes: int

    @property
    def n_tokens(self) -> int:
        """The length of the stream, including the repeated first token."""
        return sum(map(len, self.token_shards))

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes per target, for the conversion of bits per target to bits per byte; 0 for an empty stream."""
        return self.target_bytes / self.n_targets if self.n_targets else 0.0

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Return the token ids from `start` to `stop` or the end of the stream (int32)."""
        return _read(self.token_shards, start, stop).astype(np.int32)

    def weights(self, start: int, stop: int) -> np.ndarray:
        """Return the loss weights from `start` to `stop` or the end of the stream (bool)."""
        if not self.weight_shards:
            return np.ones(max(0, min(stop, self.n_tokens) - start), bool)
        return _read(self.weight_shards, start, stop).astype(bool)


def _read(shards: tuple[np.ndarray, ...], start: int, stop: int) -> np.ndarray:
    size = len(shards[0]) if shards else 1
    indices = range(start // size, min(-(-stop // size), len(shards)))
    parts = [shards[index][max(0, start - index * size) : stop - index * size] for index in indices]
    return parts[0] if len(parts) == 1 else np.concatenate(parts or [np.empty(0, np.uint16)])


def _map(path: Path, dtype: str) -> np.ndarray:
    # Slicing a plain array over the mapped memory is several times faster than slicing a np.memmap.
    return np.asarray(np.memmap(path, dtype, "r"))


def _describe_file(path: Path) -> StoredFile:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return StoredFile(path.name, path.stat().st_size, digest)


class SplitWriter:
    """A writer of the files of one split: call `append` for each document, `flush` regularly, and finally `close`."""

    def __init__(self, folder: Path, name: str, dtype: str, shard_tokens: int) -> None:
        self._offsets_path = folder / f"{name}.offsets.npy"
        self._tokens = _ShardWriter(folder, f"{name}.tokens", dtype, shard_tokens)
        self._weights = _ShardWriter(folder, f"{name}.weights", "u1", shard_tokens)
        self._first: tuple[np.ndarray, np.ndarray] | None = None
        self._offsets = array.array("q")
        self._pending: list[tuple[np.ndarray, np.ndarray]] = []
        self._n_tokens = self._n_weighted = self._n_unknown = self._target_bytes = 0

    def append(self, ids: np.ndarray, weights: np.ndarray, n_unknown: int, target_bytes: int) -> None:
        """Append a document, including its delimiter tokens, or the first piece of a document."""
        if self._first is None and len(ids):
            self._first = ids[:1], weights[:1]
        self._offsets.append(self._n_tokens)
        self.extend(ids, weights, n_unknown, target_bytes)

    def extend(self, ids: np.ndarray, weights: np.ndarray, n_unknown: int = 0, target_bytes: int = 0) -> None:
        """Append another piece to the latest document."""
        self._n_unknown += n_unknown
        self._target_bytes += target_bytes
        self._pending.append((ids, weights))
        self._n_tokens += len(ids)
        self._n_weighted += int(weights.sum())

    def flush(self) -> None:
        """Write the tokens appended since the last call."""
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
        n_targets = self._n_weighted
        if self._first is not None:
            self.extend(*self._first)
        self.flush()
        np.save(self._offsets_path, np.array(self._offsets, np.int64))
        if self._n_weighted == self._n_tokens:
            self._weights.discard()
        return SplitManifest(
            n_documents=len(self._offsets),
            n_tokens=self._n_tokens,
            n_targets=n_targets,
            n_unknown=self._n_unknown,
            target_bytes=self._target_bytes,
            tokens=tuple(map(_describe_file, self._tokens.paths)),
            weights=tuple(map(_describe_file, self._weights.paths)),
            offsets=_describe_file(self._offsets_path),
        )


class _ShardWriter:
    """A writer of one array as files of `shard_tokens` elements each; the last one may be shorter."""

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


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json. `source` and `tokenizer` are the SHA-256 hashes of the documents and tokenizer."""

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
    """A complete store in the folder `path`."""

    path: Path
    manifest: Manifest

    def split(self, name: str) -> TokenStream:
        """Memory-map the stream of 'train' or 'valid', which is empty with valid_fraction=0.

        Raises:
            UserError: The file of document starts is damaged. The other files are not read.
        """
        split, dtype = self.manifest.splits[name], self.manifest.dtype
        self._verify(split.offsets)
        return TokenStream(
            token_shards=tuple(_map(self.path / file.name, dtype) for file in split.tokens),
            weight_shards=tuple(_map(self.path / file.name, "u1") for file in split.weights),
            offsets=np.load(self.path / split.offsets.name, allow_pickle=False),
            end_id=self.manifest.end_id,
            n_targets=split.n_targets,
            target_bytes=split.target_bytes,
        )

    def verify(self) -> None:
        """Compare the SHA-256 of every file with the manifest. Raises UserError for the first that differs."""
        for file in (file for split in self.manifest.splits.values() for file in split.files):
            self._verify(file)

    def _verify(self, file: StoredFile) -> None:
        if _describe_file(self.path / file.name) != file:
            raise UserError(f"{self.path / file.name}: the file is damaged; delete {self.path} to rebuild it.")


def open_store(path: Path) -> Store:
    """Open the store in a folder. Raises UserError if it is missing or damaged, or has another format version."""
    try:
        values = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if values["format_version"] != FORMAT_VERSION:
            raise UserError(f"{path}: the store has format {values['format_version']}, not {FORMAT_VERSION}.")
        if values.pop("checksum") != _checksum(values):
            raise UserError(f"{path}: the store's manifest.json is damaged; delete {path} to rebuild it.")
        splits = {name: _parse_split(split) for name, split in values.pop("splits").items()}
        for file in (file for split in splits.values() for file in split.files):
            if os.path.getsize(path / file.name) != file.size:
                raise UserError(f"{path / file.name}: the file does not have the size given in the manifest.")
        return Store(path, Manifest(**values, splits=splits))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: this is not a token store ({error}).") from None


def _checksum(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _parse_split(values: dict[str, Any]) -> SplitManifest:
    tokens, weights = (tuple(StoredFile(**file) for file in values.pop(name)) for name in ("tokens", "weights"))
    return SplitManifest(tokens=tokens, weights=weights, offsets=StoredFile(**values.pop("offsets")), **values)


def check_enough_tokens(stream: TokenStream, seq_len: int, batch_size: int) -> None:
    """Raise UserError if the training stream has too few tokens for one batch."""
    needed = seq_len * batch_size + 1
    if stream.n_tokens < needed:
        raise UserError(
            f"The training split has {stream.n_tokens} tokens and one batch needs {needed}: lower "
            f"config.training.batch_size={batch_size} or config.data.seq_len={seq_len}, or give more text."
        )


# Temporary folders, which other processes remove if the process that created them was killed.

# The file in each folder that is locked by its process. The operating system releases the lock when the process ends.
LOCK = ".lock"


@contextmanager
def temporary_folder(root: Path, name: str) -> Iterator[Path]:
    """Create a hidden folder in `root`, creating `root` if necessary; remove it on exit unless it was renamed.

    First remove unlocked hidden folders in `root`, which were left by killed processes.
    """
    for leftover in root.glob(".*"):
        lock = _lock(leftover, is_own=False)
        if lock is not None:
            with lock:
                shutil.rmtree(leftover, ignore_errors=True)
    folder, lock = _create_locked(root, name)
    with lock:
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _create_locked(root: Path, name: str) -> tuple[Path, IO[str]]:
    while True:
        folder = root / f".{name}.{uuid.uuid4().hex}"
        folder.mkdir(parents=True)
        lock = _lock(folder, is_own=True)
        # Before the folder was locked, another process may have removed it as a leftover.
        if lock is not None:
            return folder, lock


def _lock(folder: Path, is_own: bool) -> IO[str] | None:
    """Lock a folder; return None if another process has locked or just removed it."""
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
        # On cluster file systems without locks, leftovers are kept, but building must be possible.
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
        if is_own:
            return lock
    lock.close()
    return None


# Building.


@dataclass(frozen=True)
class CorpusStats:
    """Statistics of a corpus, and `source`, the SHA-256 of its documents; computed in one pass."""

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
    stats = compute_corpus_stats(config)
    root = Path(root)
    folder = root / _store_name(config, tokenizer, stats)
    if _is_store(folder):
        return open_store(folder)
    try:
        with temporary_folder(root, folder.name) as temporary:
            splits = _write_splits(config, tokenizer, stats, temporary, progress, shard_tokens)
            _write_manifest(temporary, tokenizer, stats, splits)
            # Another process may have been first; a damaged store is replaced.
            publish_folder(temporary, folder, _is_store)
            (folder / LOCK).unlink(missing_ok=True)
            return open_store(folder)
    except OSError as error:
        raise UserError(f"{root}: the token store cannot be written ({error.strerror}). {REMEDY}") from error


def compute_corpus_stats(config: DataConfig) -> CorpusStats:
    """Compute the statistics of a corpus without encoding it. Raises UserError if the corpus or a split is empty."""
    digest, n_documents, n_dialogues, n_characters, n_valid = hashlib.sha256(), 0, 0, 0, 0
    for document in load_documents(config):
        document_digest = hash_document(document)
        digest.update(document_digest)
        n_documents += 1
        n_dialogues += document.is_dialogue
        n_characters += len(document.text)
        n_valid += is_validation(document_digest, config)
    if not n_documents:
        raise UserError(f"config.data.corpus={config.corpus!r} has no document with text.")
    if config.split == "document":
        _check_split_sizes(config, n_documents, {"train": n_documents - n_valid, "valid": n_valid})
    return CorpusStats(n_documents, n_dialogues, n_characters, digest.hexdigest())


def _store_name(config: DataConfig, tokenizer: Tokenizer, stats: CorpusStats) -> str:
    knobs = [config.split, config.valid_fraction, config.loss_mask]
    parts = [FORMAT_VERSION, stats.source, hash_tokenizer(tokenizer), *knobs]
    if tokenizer.chat_format is not None:
        parts.append(CHAT_FORMAT_VERSION)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def hash_tokenizer(tokenizer: Tokenizer) -> str:
    """Return the SHA-256 of everything that affects a tokenizer's output, which identifies the tokenizer."""
    return hashlib.sha256(tokenizer.serialized.encode()).hexdigest()


def _is_store(folder: Path) -> bool:
    try:
        open_store(folder)
    except UserError:
        return False
    return True


def _update_digest(source: Iterable[Document], digest: Any) -> Iterator[Document]:
    for document in source:
        digest.update(hash_document(document))
        yield document


def _write_splits(
    config: DataConfig,
    tokenizer: Tokenizer,
    stats: CorpusStats,
    folder: Path,
    progress: Progress | None,
    shard_tokens: int,
) -> dict[str, SplitManifest]:
    unknown_id = tokenizer.token_to_id(UNKNOWN)
    writers = {name: SplitWriter(folder, name, _dtype(tokenizer), shard_tokens) for name in SPLITS}
    digest, done = hashlib.sha256(), 0

    documents = _update_digest(load_documents(config), digest)
    for batch in _batches(_split_long(assign_splits(documents, config, stats.n_characters), tokenizer)):
        encoded = encode_documents(tokenizer, [part.document for part in batch], config.loss_mask)
        for part, (ids, weights) in zip(batch, encoded, strict=True):
            counts = int((ids == unknown_id).sum()), _count_target_bytes(part.document, config.loss_mask)
            if part.is_first:
                writers[part.split].append(ids, weights, *counts)
            else:
                writers[part.split].extend(ids[1:], weights[1:], *counts)
            done += len(part.document.text)
        for writer in writers.values():
            writer.flush()
        if progress is not None:
            progress(done, stats.n_characters)
    if digest.hexdigest() != stats.source:
        raise UserError(f"config.data.corpus={config.corpus!r} changed while it was being read; start again.")
    splits = {name: writer.close() for name, writer in writers.items()}
    _check_split_sizes(config, stats.n_documents, {name: split.n_documents for name, split in splits.items()})
    return splits


def _dtype(tokenizer: Tokenizer) -> str:
    return "<u2" if tokenizer.get_vocab_size() <= 2**16 else "<u4"


class _Part(NamedTuple):
    """A document of a split, or one piece of a long document."""

    split: str
    document: Document
    is_first: bool


def _split_long(source: Iterable[tuple[str, Document]], tokenizer: Tokenizer) -> Iterator[_Part]:
    """Yield documents, with long plain text in pieces, so that only one piece and its tokens are in memory."""
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


def _count_target_bytes(document: Document, loss_mask: str) -> int:
    learned = (each for each in document.messages if loss_mask == "all" or each.is_assistant_target)
    return sum(len(message.text.encode()) for message in learned)


def _check_split_sizes(config: DataConfig, n_documents: int, n_by_split: dict[str, int]) -> None:
    for name, number in n_by_split.items():
        if not number and (name == "train" or config.valid_fraction > 0):
            raise UserError(
                f"The corpus has {n_documents} document(s) and the split {name!r} got none: set "
                "config.data.split='tail' to split within a text, another config.data.valid_fraction, or "
                "config.data.valid_fraction=0 for no validation."
            )


def _write_manifest(folder: Path, tokenizer: Tokenizer, stats: CorpusStats, splits: dict[str, SplitManifest]) -> None:
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        source=stats.source,
        tokenizer=hash_tokenizer(tokenizer),
        vocab_size=tokenizer.get_vocab_size(),
        end_id=tokenizer.end_id,
        dtype=_dtype(tokenizer),
        n_dialogues=stats.n_dialogues,
        splits=splits,
    )
    values = dataclasses.asdict(manifest)
    text = json.dumps(values | {"checksum": _checksum(values)}, indent=1)
    (folder / "manifest.json").write_text(text, encoding="utf-8")
