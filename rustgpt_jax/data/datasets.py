"""Datasets: functions from the data config to documents, by name in `CORPORA`.

A document is plain text or a dialogue. Its split depends only on its content (or, with split='tail', on its position in
the corpus), so the same config gives the same training text everywhere.
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


def load_documents(config: DataConfig) -> Iterator[Document]:
    """Iterate over the non-empty documents of a corpus, in a fixed order, up to `max_documents`."""
    corpus = lookup(CORPORA, config.corpus, "config.data.corpus")(config)
    return itertools.islice((_check_text(document) for document in corpus if document.text), config.max_documents)


def _check_text(document: Document) -> Document:
    try:
        for _ in _encode_blocks(document.text):
            pass
    except UnicodeEncodeError as error:
        code = ord(error.object[error.start])
        raise UserError(f"{document.name}: the text contains half of a surrogate pair (\\u{code:04x}).") from None
    return document


def _encode_blocks(text: str) -> Iterator[bytes]:
    """Yield text as blocks of UTF-8, so that long text is not held in memory twice."""
    for start in range(0, len(text), BLOCK_CHARACTERS):
        yield text[start : start + BLOCK_CHARACTERS].encode()


# Splits.


def hash_document(document: Document) -> bytes:
    """Return the SHA-256 of a document's roles and text. It does not depend on the name."""
    digest = hashlib.sha256()
    for message in document.messages:
        digest.update(f"{message.role} {sum(map(len, _encode_blocks(message.text)))}\n".encode())
        for block in _encode_blocks(message.text):
            digest.update(block)
    return digest.digest()


def is_validation(digest: bytes, config: DataConfig) -> bool:
    """Return whether split='document' assigns the document with the given digest to validation."""
    return int.from_bytes(digest[:8], "big") < config.valid_fraction * 2**64


def assign_splits(source: Iterable[Document], config: DataConfig, n_characters: int) -> Iterator[tuple[str, Document]]:
    """Iterate over documents with their split, 'train' or 'valid'.

    With split='tail', the first (1 - valid_fraction) of the `n_characters` of `source` are for training. A plain text
    that straddles the boundary is cut there; a dialogue that straddles it is used for training.
    """
    if config.split == "document":
        for document in source:
            yield ("valid" if is_validation(hash_document(document), config) else "train"), document
        return
    boundary = int(n_characters * (1 - config.valid_fraction))
    start = 0
    for document in source:
        length = len(document.text)
        if start >= boundary:
            yield "valid", document
        elif start + length <= boundary or document.is_dialogue:
            yield "train", document
        else:
            yield "train", plain_document(document.name, document.text[: boundary - start])
            yield "valid", plain_document(document.name, document.text[boundary - start :])
        start += length


def load_training_documents(config: DataConfig, n_characters: int | None = None) -> Iterator[Document]:
    """Iterate over the documents of the training split.

    Args:
        config: The corpus config.
        n_characters: The length of the corpus; if None, split='tail' reads the corpus once more to compute it.

    Raises:
        UserError: A file of the corpus cannot be read or parsed.
    """
    if n_characters is None:
        n_characters = sum(len(document.text) for document in load_documents(config)) if config.split == "tail" else 0
    assigned = assign_splits(load_documents(config), config, n_characters)
    return (document for split, document in assigned if split == "train")


# Files.


def parse_file(name: str, file: BinaryIO) -> Iterator[Document]:
    """Iterate over the documents of an open file, whose format is given by its suffix.

    A .json file contains a list of strings; .jsonl and .ndjson one text or dialogue per line ({"text": ...} or
    {"messages": [...]}); .csv and .tsv one text per row in the column `text`, delimited by commas, semicolons, tabs or
    bars. Any other file is one plain text. Line-based formats are streamed.

    Raises:
        UserError: The file cannot be parsed; the message names the file and the location.
    """
    is_empty = not file.read(len(codecs.BOM_UTF8) + 1).removeprefix(codecs.BOM_UTF8)
    if is_empty:
        raise UserError(f"{name}: the file is empty.")
    file.seek(0)
    return _PARSERS.get(Path(name).suffix.lower(), _parse_plain)(name, file)


def _read_lines(name: str, file: BinaryIO) -> Iterator[str]:
    """Iterate over the lines of a file, terminated by line feeds, without a byte order mark."""
    start = 0
    for line in file:
        yield _decode(name, line, start)
        start += len(line)


def _decode(name: str, data: bytes, start: int = 0) -> str:
    """Decode bytes at the offset `start` of a file, without a byte order mark."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 at byte {start + error.start} (0x{data[error.start]:02x}).") from None
    return text if start else text.removeprefix("\ufeff")


def _parse_plain(name: str, file: BinaryIO) -> Iterator[Document]:
    yield plain_document(name, _decode(name, file.read()))


def _parse_json_file(name: str, file: BinaryIO) -> Iterator[Document]:
    items = _parse_json(_decode(name, file.read()), name, 1)
    if not isinstance(items, list):
        raise UserError(f"{name}: the JSON is not a list of strings.")
    for index, item in enumerate(items):
        if not isinstance(item, str):
            raise UserError(f"{name}: the JSON is not a list of strings: item {index} is {item!r:.60}.")
        yield plain_document(f"{name}[{index}]", item)


def _parse_jsonl(name: str, file: BinaryIO) -> Iterator[Document]:
    for number, line in enumerate(_read_lines(name, file), 1):
        if line.strip():
            where = f"{name}, line {number}"
            yield _parse_item(where, _parse_json(line, name, number))


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
    """Raised if a JSON object repeats a key that is read here, since parsers disagree about the value."""


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


def _parse_item(where: str, item: Any) -> Document:
    if isinstance(item, dict) and isinstance(item.get("messages"), list):
        return Document(where, tuple(_parse_message(where, message) for message in item["messages"]))
    if isinstance(item, dict) and isinstance(item.get("text"), str):
        return plain_document(where, item["text"])
    raise UserError(f"{where}: expected an object with a string `text` or a list `messages`.")


def _parse_message(where: str, message: Any) -> Message:
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


def _parse_table(name: str, file: BinaryIO) -> Iterator[Document]:
    csv.field_size_limit(_LARGEST_CELL)
    lines = (row for line in _read_lines(name, file) for row in _split_at_returns(line))
    header = _header(lines)
    delimiter, columns = _columns(name, "".join(header))
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        for row in rows:
            where = f"{name}, line {len(header) + rows.line_num}"
            if row and len(row) != len(columns):
                raise UserError(
                    f"{where}: {len(row)} cell{'s' * (len(row) != 1)} in a row of {len(columns)} columns separated by "
                    f"{delimiter!r}; cells that contain this character must be in double quotes."
                )
            if row:
                yield plain_document(where, row[columns.index("text")])
    except csv.Error as error:
        raise UserError(f"{name}, line {len(header) + rows.line_num}: malformed CSV ({error}).") from None


def _header(lines: Iterator[str]) -> list[str]:
    """Return the lines of a table's first row: more than one if a column name contains line breaks."""
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
            raise UserError(f"{name}: {columns.count('text')} columns are named `text`.")
        if "text" in columns:
            return delimiter, columns
    raise UserError(
        f"{name}: no column is named `text`; the first row is {short_repr(header.strip())}. The first row of a table "
        "must contain the column names, and the column to read must be named `text`."
    )


_PARSERS = {
    ".json": _parse_json_file,
    ".jsonl": _parse_jsonl,
    ".ndjson": _parse_jsonl,
    ".csv": _parse_table,
    ".tsv": _parse_table,
}


# Corpora.


def _bundled(name: str) -> Iterator[Document]:
    return parse_file(name, io.BytesIO((resources.files("rustgpt_jax.data") / "texts" / name).read_bytes()))


def _facts(config: DataConfig) -> Iterator[Document]:
    """Yield the bundled sentences about the world."""
    del config
    return _bundled("facts.json")


def _chat(config: DataConfig) -> Iterator[Document]:
    """Yield the bundled dialogues, each a question and its answer."""
    del config
    return _bundled("chat.jsonl")


def _python_stdlib(config: DataConfig) -> Iterator[Document]:
    """Yield the .py files of the running Python's standard library without its tests, in order of their paths."""
    for path in _stdlib_modules():
        try:
            with tokenize.open(_stdlib() / path) as file:
                text = file.read()
        except (SyntaxError, UnicodeDecodeError):  # Some files are invalid on purpose.
            continue
        yield plain_document(path, text)


def _stdlib() -> Path:
    return Path(sysconfig.get_path("stdlib"))


_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


def _stdlib_modules() -> list[str]:
    found = []
    for folder, folders, names in os.walk(_stdlib()):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
        found += [(Path(folder) / name).relative_to(_stdlib()).as_posix() for name in names if name.endswith(".py")]
    return sorted(found)


def _files(config: DataConfig) -> Iterator[Document]:
    """Yield the documents of the files in config.data.paths, each file once, in order of their paths."""
    for path in _list_paths(config):
        with _open_file(path) as file:
            yield from parse_file(path, file)


@contextmanager
def _open_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a text file. Raises UserError if it cannot be read, or is a pipe or a device."""
    try:
        # Opening a pipe would block until another process writes to it.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UserError(f"{path}: this is not a regular file, and the text must be readable more than once.")
        file = open(path, "rb")
    except OSError as error:
        raise UserError(f"{path}: the file cannot be read ({error.strerror}).") from None
    with file:
        try:
            yield file
        except OSError as error:
            raise UserError(f"{path}: the file cannot be read ({error.strerror}).") from None


def _list_paths(config: DataConfig) -> list[str]:
    return sorted({found for pattern in config.paths for found in _expand_pattern(pattern)})


def _expand_pattern(pattern: str) -> list[str]:
    # A file name may contain the special characters of globs.
    found = [pattern] if os.path.exists(pattern) else glob.glob(os.path.expanduser(pattern), recursive=True)
    files = [os.path.normpath(path) for path in found if not os.path.isdir(path)]
    if not files:
        folder = " (a folder: give a glob such as folder/**/*.txt)" if os.path.isdir(pattern) else ""
        several = "; repeat the flag for each path, or give a Python list" if "," in pattern else ""
        unreadable = _unreadable_folder(pattern)
        reason = f"; the folder {unreadable} is not readable" if unreadable else ""
        hint = folder + several + reason or "; name your text with --config.data.paths=FILE"
        raise UserError(f"config.data.paths: {pattern!r} matches no file{hint}.")
    return files


def _unreadable_folder(pattern: str) -> Path | None:
    """Return the first parent folder of a path or glob that this user may not list, or None."""
    path = Path(pattern).expanduser().absolute()
    for folder in (*reversed(path.parents), path):
        if os.path.isdir(folder) and not os.access(folder, os.R_OK | os.X_OK):
            return folder
    return None


CORPORA: dict[str, Callable[[DataConfig], Iterator[Document]]] = {
    "facts": _facts,
    "chat": _chat,
    "python_stdlib": _python_stdlib,
    "files": _files,
}


# Digests of files, for the record of a run.

MAX_DIGESTS = 1000


def hash_files(config: DataConfig) -> dict[str, str]:
    """Return a dict from each corpus file's name to its SHA-256, truncated to 16 hex digits; empty without files.

    With more than MAX_DIGESTS files, the files of a folder are combined into one digest. Raises UserError if a file
    cannot be read.
    """
    if config.corpus == "python_stdlib":
        digests = {name: _hash_file(_stdlib() / name) for name in _stdlib_modules()}
    else:
        digests = {path: _hash_file(Path(path)) for path in (_list_paths(config) if config.corpus == "files" else ())}
    while len(digests) > MAX_DIGESTS:
        folders: dict[str, list[str]] = {}
        for name, digest in digests.items():
            folders.setdefault(os.path.dirname(name) or ".", []).append(f"{name} {digest}")
        digests = {name: hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] for name, lines in folders.items()}
    return digests


def _hash_file(path: Path) -> str:
    with _open_file(path) as file:
        status = os.fstat(file.fileno())
        return _hash_unchanged_file(path, status.st_size, status.st_mtime_ns)


# Cached, so that the trials of a sweep read a file only once unless its size or modification time changes.
@cache
def _hash_unchanged_file(path: Path, size: int, modified: int) -> str:
    del size, modified
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
