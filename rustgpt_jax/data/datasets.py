"""Named sources of text: each is a function from the data config to documents, listed in `CORPORA` below.

A document is plain text or a dialogue. Which split it belongs to depends on its content alone (or, with
split='tail', on its place in the whole text), so the same config gives the same training text everywhere.
"""

import codecs
import csv
import glob
import hashlib
import io
import itertools
import json
import os
import re
import stat
import sysconfig
import tokenize
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, BinaryIO

from rustgpt_jax.config.schema import DataConfig
from rustgpt_jax.errors import UserError, short_repr, suggest_names
from rustgpt_jax.registry import lookup
from rustgpt_jax.tokenizers import ROLES, Document, Message, plain_document

# Number of characters to encode at a time if only the bytes of a text are needed.
BLOCK_CHARACTERS = 2**20


def documents(config: DataConfig) -> Iterator[Document]:
    """The documents of the config's corpus, in a fixed order, at most `max_documents`; those without text left out.

    Raises UserError for an unknown corpus and for a file that cannot be read as what it should be.
    """
    corpus = lookup(CORPORA, config.corpus, "config.data.corpus")(config)
    return itertools.islice((_checked(document) for document in corpus if document.text), config.max_documents)


def _checked(document: Document) -> Document:
    try:
        for _ in _encoded(document.text):
            pass
    except UnicodeEncodeError as error:
        code = ord(error.object[error.start])
        raise UserError(f"{document.name}: the text has half of a surrogate pair (\\u{code:04x}).") from None
    return document


def _encoded(text: str) -> Iterator[bytes]:
    """Yield a text in UTF-8 in blocks, so that a long text is not held in memory twice."""
    for start in range(0, len(text), BLOCK_CHARACTERS):
        yield text[start : start + BLOCK_CHARACTERS].encode()


# Training and validation.


def fingerprint(document: Document) -> bytes:
    """The SHA-256 of a document's roles and texts, whatever its name."""
    digest = hashlib.sha256()
    for turn in document.messages:
        digest.update(f"{turn.role} {sum(map(len, _encoded(turn.text)))}\n".encode())
        for block in _encoded(turn.text):
            digest.update(block)
    return digest.digest()


def is_validation(document: Document, config: DataConfig) -> bool:
    """Whether split='document' gives a document to validation. Equal contents always go to the same side."""
    return is_validation_fingerprint(fingerprint(document), config)


def is_validation_fingerprint(digest: bytes, config: DataConfig) -> bool:
    """Return whether split='document' assigns the document with the given fingerprint to validation."""
    return int.from_bytes(digest[:8], "big") < config.valid_fraction * 2**64


def assign_splits(source: Iterable[Document], config: DataConfig, n_characters: int) -> Iterator[tuple[str, Document]]:
    """Each document with its split, 'train' or 'valid'. `n_characters` is the length of all of `source`.

    With split='tail' the first (1 - valid_fraction) of the characters are training. A plain text that straddles the
    border is cut in two there; a dialogue that does is training.
    """
    if config.split == "document":
        for document in source:
            yield ("valid" if is_validation(document, config) else "train"), document
        return
    border = int(n_characters * (1 - config.valid_fraction))
    start = 0
    for document in source:
        length = len(document.text)
        if start >= border:
            yield "valid", document
        elif start + length <= border or document.is_dialogue:
            yield "train", document
        else:
            yield "train", plain_document(document.name, document.text[: border - start])
            yield "valid", plain_document(document.name, document.text[border - start :])
        start += length


def tokenizer_documents(config: DataConfig, n_characters: int | None = None) -> Iterator[Document]:
    """Iterate over the documents of the training split, on which a tokenizer may be trained.

    Args:
        config: The corpus config.
        n_characters: The length of the corpus if known; otherwise split='tail' reads the corpus to compute it.

    Raises:
        UserError: As for `documents`.
    """
    if n_characters is None:
        n_characters = sum(len(document.text) for document in documents(config)) if config.split == "tail" else 0
    return (document for split, document in assign_splits(documents(config), config, n_characters) if split == "train")


# Files.


def read_file(name: str, data: bytes) -> Iterator[Document]:
    """Iterate over the documents in a file's bytes, as `read_stream` does."""
    return read_stream(name, io.BytesIO(data))


def read_stream(name: str, file: BinaryIO) -> Iterator[Document]:
    """Iterate over the documents of an open file, whose format is given by the suffix of its name.

    .json holds a list of strings; .jsonl and .ndjson one text or dialogue per line ({"text": ...} or {"messages":
    [...]}); .csv and .tsv one text per row in the column `text`, delimited by commas, semicolons, tabs or bars. Any
    other file is one plain text. Line-based formats are streamed.

    Raises:
        UserError: The file cannot be parsed; the message names the file and the location.
    """
    is_empty = not file.read(len(codecs.BOM_UTF8) + 1).removeprefix(codecs.BOM_UTF8)
    if is_empty:
        raise UserError(f"{name}: the file is empty.")
    file.seek(0)
    return _READERS.get(Path(name).suffix.lower(), _read_plain)(name, file)


def _lines(name: str, file: BinaryIO) -> Iterator[str]:
    """Iterate over the lines of a file, terminated by line feeds, without a byte order mark."""
    start = 0
    for line in file:
        yield _decoded(name, line, start)
        start += len(line)


def _decoded(name: str, data: bytes, start: int = 0) -> str:
    """Decode the bytes of a file from `start`, without a byte order mark."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 at byte {start + error.start} (0x{data[error.start]:02x}).") from None
    return text if start else text.removeprefix("\ufeff")


def _read_plain(name: str, file: BinaryIO) -> Iterator[Document]:
    yield plain_document(name, _decoded(name, file.read()))


def _read_json(name: str, file: BinaryIO) -> Iterator[Document]:
    items = _parse_json(_decoded(name, file.read()), name, 1)
    if not isinstance(items, list):
        raise UserError(f"{name}: the JSON is not a list of strings.")
    for index, item in enumerate(items):
        if not isinstance(item, str):
            raise UserError(f"{name}: the JSON is not a list of strings: item {index} is {item!r:.60}.")
        yield plain_document(f"{name}[{index}]", item)


def _read_jsonl(name: str, file: BinaryIO) -> Iterator[Document]:
    for number, line in enumerate(_lines(name, file), 1):
        if line.strip():
            where = f"{name}, line {number}"
            yield _from_object(where, _parse_json(line, name, number))


def _parse_json(text: str, name: str, first_line: int) -> Any:
    try:
        try:
            return _JSON.decode(text)
        except json.JSONDecodeError:
            raise
        except ValueError:
            return _JSON_WITH_LONG_NUMBERS.decode(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise UserError(f"{name}, line {line}: malformed JSON ({error.msg} at column {error.colno}).") from None
    except _DuplicateKey as error:
        raise UserError(f"{name}, line {first_line}: an object has the key {error.args[0]!r} twice.") from None
    except RecursionError:
        raise UserError(f"{name}, line {first_line}: the JSON is nested too deeply.") from None


class _DuplicateKey(Exception):
    """A JSON object that repeats a key that is read, so its meaning depends on the parser."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        for name in ("text", "messages", "role", "content"):
            if names.count(name) > 1:
                raise _DuplicateKey(name)
    return values


_JSON = json.JSONDecoder(object_pairs_hook=_object)
# Python refuses to parse an int of more than 4,300 digits.
_JSON_WITH_LONG_NUMBERS = json.JSONDecoder(object_pairs_hook=_object, parse_int=float)


def _from_object(where: str, item: Any) -> Document:
    if isinstance(item, dict) and isinstance(item.get("messages"), list):
        return Document(where, tuple(_turn(where, message) for message in item["messages"]))
    if isinstance(item, dict) and isinstance(item.get("text"), str):
        return plain_document(where, item["text"])
    raise UserError(f"{where}: expected an object with a string `text` or a list `messages`.")


def _turn(where: str, message: Any) -> Message:
    if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
        raise UserError(f"{where}: a message is an object with the strings `role` and `content`, not {message!r:.60}.")
    role = message["role"]
    if role not in ROLES:
        raise UserError(f"{where}: unknown role {role!r}.{suggest_names(role, ROLES)}")
    return Message(role, message["content"])


_DELIMITERS = ",;\t|"
# Maximum number of characters in a CSV cell; Python's default is 131,072. Larger values overflow a C long on some
# platforms.
_LARGEST_CELL = 2**31 - 1
_LARGEST_HEADER = 2**16


def _read_table(name: str, file: BinaryIO) -> Iterator[Document]:
    csv.field_size_limit(_LARGEST_CELL)
    lines = (row for line in _lines(name, file) for row in _split_at_returns(line))
    header = _header(lines)
    delimiter, columns = _columns(name, "".join(header))
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        for row in rows:
            where = f"{name}, line {len(header) + rows.line_num}"
            if row and len(row) != len(columns):
                raise UserError(
                    f"{where}: {len(row)} cell{'s' * (len(row) != 1)} in a row of {len(columns)} columns, which "
                    f"{delimiter!r} separates; a cell with that character in it is written in double quotes."
                )
            if row:
                yield plain_document(where, row[columns.index("text")])
    except csv.Error as error:
        raise UserError(f"{name}, line {len(header) + rows.line_num}: malformed CSV ({error}).") from None


def _header(lines: Iterator[str]) -> list[str]:
    """Return the lines of a table's first row, which are several if a column name contains line breaks."""
    header: list[str] = []
    for line in lines:
        header.append(line)
        if "".join(header).count('"') % 2 == 0 or sum(map(len, header)) > _LARGEST_HEADER:
            break
    return header


def _split_at_returns(line: str) -> list[str]:
    """Split a line at carriage returns, which some spreadsheets write as row separators."""
    return re.split(r"(?<=\r)(?!\n)", line) if "\r" in line[:-2] else [line]


def _columns(name: str, header: str) -> tuple[str, list[str]]:
    """Return the delimiter of a table and its column names, which must include `text`."""
    for delimiter in _DELIMITERS if len(header) <= _LARGEST_HEADER else "":
        try:
            columns = [cell.strip() for cell in next(csv.reader([header], delimiter=delimiter, strict=True), [])]
        except csv.Error:
            continue
        if columns.count("text") > 1:
            raise UserError(f"{name}: {columns.count('text')} columns are called `text`.")
        if "text" in columns:
            return delimiter, columns
    raise UserError(
        f"{name}: no column is called `text`; the first row is {short_repr(header.strip())}. A table begins "
        "with the names "
        "of its columns, and the one that is to be read has the name `text`."
    )


_READERS = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".csv": _read_table,
    ".tsv": _read_table,
}


# Corpora.


def _bundled(name: str) -> Iterator[Document]:
    return read_file(name, (resources.files("rustgpt_jax.data") / "texts" / name).read_bytes())


def _python_stdlib(config: DataConfig) -> Iterator[Document]:
    """Each .py file of the running Python's standard library, its tests left out, in the order of their paths."""
    for path in sorted(_modules(_library())):
        try:
            with tokenize.open(_library() / path) as file:
                text = file.read()
        except (SyntaxError, UnicodeDecodeError):  # Some files are written wrongly on purpose.
            continue
        yield plain_document(path, text)


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


_NO_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


def _modules(root: Path) -> Iterator[str]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _NO_LIBRARY]
        yield from ((Path(folder) / name).relative_to(root).as_posix() for name in names if name.endswith(".py"))


def _files(config: DataConfig) -> Iterator[Document]:
    """The documents of the files that config.data.paths names, in the order of the paths, each file once."""
    for path in _paths(config):
        with _opened(path) as file:
            yield from read_stream(path, file)


@contextmanager
def _opened(path: str | Path) -> Iterator[BinaryIO]:
    """Open a text file.

    Raises:
        UserError: The file cannot be read, or is a pipe or a device.
    """
    try:
        # Opening a pipe would block until another process writes to it.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UserError(f"{path}: this is not a regular file; what trains a model is read more than once.")
        file = open(path, "rb")
    except OSError as error:
        raise UserError(f"{path}: the file cannot be read ({error.strerror}).") from None
    with file:
        try:
            yield file
        except OSError as error:
            raise UserError(f"{path}: the file cannot be read ({error.strerror}).") from None


def _paths(config: DataConfig) -> list[str]:
    return sorted({found for pattern in config.paths for found in _matches(pattern)})


def _matches(pattern: str) -> list[str]:
    # A file may have the characters of a glob in its name.
    found = [pattern] if os.path.exists(pattern) else glob.glob(os.path.expanduser(pattern), recursive=True)
    files = [os.path.normpath(path) for path in found if not os.path.isdir(path)]
    if not files:
        folder = " (a folder: give a glob such as folder/**/*.txt)" if os.path.isdir(pattern) else ""
        several = "; give one path a flag, or a Python list" if "," in pattern else ""
        unreadable = _unreadable_folder(pattern)
        reason = f"; the folder {unreadable} is not readable" if unreadable else ""
        raise UserError(f"config.data.paths: {pattern!r} matches no file{folder}{several}{reason}.")
    return files


def _unreadable_folder(pattern: str) -> Path | None:
    """Return the first folder on the way to a path or glob that this user may not look into, or None."""
    path = Path(pattern).expanduser().absolute()
    for folder in (*reversed(path.parents), path):
        if os.path.isdir(folder) and not os.access(folder, os.R_OK | os.X_OK):
            return folder
    return None


CORPORA: dict[str, Callable[[DataConfig], Iterator[Document]]] = {
    "facts": lambda config: _bundled("facts.json"),
    "chat": lambda config: _bundled("chat.jsonl"),
    "python_stdlib": _python_stdlib,
    "files": _files,
}


# What a run's record has of the files of a corpus.


def file_digests(config: DataConfig) -> dict[str, str]:
    """The SHA-256 of each file that a corpus reads, cut to 16 hex digits, by name; none for one that is no files.

    Of more than MOST_LISTED files, all of a folder have one digest. Raises UserError for a file that cannot be read.
    """
    digests = {name: _file_digest(path) for name, path in _FILES_OF.get(config.corpus, lambda _: {})(config).items()}
    while len(digests) > MOST_LISTED:
        folders: dict[str, list[str]] = {}
        for name, digest in digests.items():
            folders.setdefault(os.path.dirname(name) or ".", []).append(f"{name} {digest}")
        digests = {name: hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] for name, lines in folders.items()}
    return digests


MOST_LISTED = 1000

_FILES_OF: dict[str, Callable[[DataConfig], dict[str, Path]]] = {
    "python_stdlib": lambda config: {name: _library() / name for name in sorted(_modules(_library()))},
    "files": lambda config: {path: Path(path) for path in _paths(config)},
}


def _file_digest(path: Path) -> str:
    with _opened(path) as file:
        state = os.fstat(file.fileno())
        return _digest_of(path, state.st_size, state.st_mtime_ns)


@cache
def _digest_of(path: Path, size: int, modified: int) -> str:
    """The digest of a file that has, as far as anyone can tell, not changed: the trials of a sweep read it once."""
    del size, modified
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
