"""One split on disk: a stream of its documents followed by a copy of the first token, cut into shards.

Shards are raw little-endian arrays that can be memory-mapped. The start of each document is stored next to them.
Weights are stored only if some tokens have zero loss weight.
"""

import array
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np


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
