"""Datasets: documents of every corpus, errors that name bad files, and stable splits."""

import csv
import dataclasses
import hashlib
import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rustgpt_jax.config.schema import DataConfig
from rustgpt_jax.config.validation import parse_overrides
from rustgpt_jax.data import datasets
from rustgpt_jax.data.datasets import CORPORA
from rustgpt_jax.errors import UserError
from rustgpt_jax.tokenizers import ROLES, Document, Message, plain_document


def config(corpus: str = "files", paths: tuple[str, ...] = (), **changes: Any) -> DataConfig:
    whole = DataConfig(corpus, paths, None, "document", 0.1, "all", None)
    return dataclasses.replace(whole, **changes)


def write(folder: Path, name: str, text: str | bytes) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def texts(found: DataConfig) -> list[str]:
    return [document.text for document in datasets.load_documents(found)]


# Every corpus.


@pytest.mark.parametrize("name", CORPORA)
def test_corpora_are_reproducible(name: str, tmp_path: Path) -> None:
    paths = tuple(write(tmp_path, f"{index}.txt", f"text {index}") for index in range(20))
    found = config(name, paths, max_documents=12)
    documents = list(datasets.load_documents(found))
    assert len(documents) == 12
    assert documents == list(datasets.load_documents(found))
    assert all(document.text and document.name for document in documents)
    assert len({document.name for document in documents}) == 12
    assert {turn.role for document in documents for turn in document.messages} <= {"text", *ROLES}


def test_unknown_corpora_are_answered_with_a_suggestion() -> None:
    with pytest.raises(UserError, match="config.data.corpus: unknown 'fact'. Did you mean 'facts'"):
        datasets.load_documents(config("fact"))


def test_chat_dialogues_end_with_the_assistant() -> None:
    documents = list(datasets.load_documents(config("chat")))
    assert all(document.is_dialogue and document.messages[-1].role == "assistant" for document in documents)


def test_python_stdlib_has_no_tests() -> None:
    names = [document.name for document in datasets.load_documents(config("python_stdlib"))]
    assert {"dataclasses.py", "json/decoder.py"} <= set(names)
    assert names == sorted(names)
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(name.split("/"))]


def test_modules_with_a_wrong_encoding_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "a.py", b"# coding: latin-1\n'\xe9'\n")
    write(tmp_path, "b.py", b"'\xe9'\n")
    write(tmp_path, "c.py", b"# coding: no-such-encoding\n")
    write(tmp_path, "test/d.py", b"pass\n")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert texts(config("python_stdlib")) == ["# coding: latin-1\n'é'\n"]


# Files.


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.txt", "one\r\ntwo", ["one\r\ntwo"]),
        ("a.md", "\ufeff# Title", ["# Title"]),
        ("a.json", '["one", "", "zwei \\u00fc"]', ["one", "zwei ü"]),
        ("a.JSONL", '{"text": "one"}\n\n{"text": "two", "extra": 1}\r\n', ["one", "two"]),
        ("a.csv", 'id,text\n1,"one, ""quoted"""\n\n2,"two\nlines"\n', ['one, "quoted"', "two\nlines"]),
        ("a.csv", "text\none\ntwo\n", ["one", "two"]),
        ("a.csv", "\ufefftext;label\none;1\ntwo, three;2\n", ["one", "two, three"]),
        ("a.csv", '"id"|"text"\n1|"a ""b"" c"\n', ['a "b" c']),
        ("a.csv", "id\ttext\n1\tone\n", ["one"]),
        ("a.csv", 'id,text\r1,"one\rmore"\r2,two\r', ["one\rmore", "two"]),
        ("a.csv", 'id,text\r\n1,"one\r\nmore"\r\n2,two', ["one\r\nmore", "two"]),
        ("a.csv", '"a\nb",text\n1,one\n', ["one"]),
        ("a.csv", f"id,text\n1,{'word ' * 40_000}\n", ["word " * 40_000]),
        ("a.tsv", "text\tlabel\none\t1\n", ["one"]),
        ("a.TSV", "label,text\n1,one\n", ["one"]),
        ("a.ndjson", '\ufeff{"text": "one"}\n{"text": "two\u2028"}\n', ["one", "two\u2028"]),
        ("a.jsonl", f'{{"text": "one", "answer": {"1" * 5000}, "score": NaN}}\n', ["one"]),
        ("a.jsonl", '{"text": "one", "tag": 1, "tag": 2}\n', ["one"]),
    ],
)
def test_file_formats(name: str, text: str, expected: list[str], tmp_path: Path) -> None:
    assert texts(config(paths=(write(tmp_path, name, text),))) == expected


def test_dialogues_keep_roles(tmp_path: Path) -> None:
    messages = [{"role": role, "content": f"said by {role}"} for role in ROLES]
    path = write(tmp_path, "a.jsonl", json.dumps({"messages": messages}))
    (document,) = datasets.load_documents(config(paths=(path,)))
    assert document.messages == tuple(Message(message["role"], message["content"]) for message in messages)
    assert document.is_dialogue


def test_files_are_sorted_and_unique(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "deep/er/c.txt", "[d].txt", "other.md"):
        write(tmp_path, name, name)
    paths = (f"{tmp_path}/b.txt", f"{tmp_path}/**/*.txt", f"{tmp_path}/deep/../a.txt", f"{tmp_path}/[d].txt")
    assert texts(config(paths=paths)) == ["[d].txt", "a.txt", "b.txt", "deep/er/c.txt"]


MISTAKES = {
    "empty.txt": (b"", "the file is empty"),
    "latin.txt": (b"caf\xe9", "not UTF-8 at byte 3 (0xe9)"),
    "broken.json": (b'["one",\n "two"', "line 2: malformed JSON"),
    "deep.json": (b"[" * 100_000, "line 1: the JSON is nested too deeply"),
    "object.json": (b'{"text": "one"}', "not a list of strings"),
    "numbers.json": (b'["one", 2]', "not a list of strings: item 1 is 2"),
    "broken.jsonl": (b'{"text": "one"}\n{"text": ', "line 2: malformed JSON"),
    "long.json": (f"[{'9' * 5000}]".encode(), "not a list of strings: item 0 is inf"),
    "twice.jsonl": (b'{"text": "one"}\n{"text": "a", "text": "b"}', "line 2: an object has the key 'text' twice"),
    "returns.jsonl": (b'{"text": "one"}\r{"text": "two"}\r', "line 1: malformed JSON (Extra data at column 17)"),
    "late.jsonl": (b'{"text": "one"}\n{"text": "caf\xe9"}', "not UTF-8 at byte 29 (0xe9)"),
    "neither.jsonl": (b'{"text": "one"}\n{"body": "two"}', "line 2: expected an object with a string `text`"),
    "list.jsonl": (b'["one"]', "line 1: expected an object"),
    "role.jsonl": (
        b'{"messages": [{"role": "asistant", "content": "x"}]}',
        "unknown role 'asistant'. Did you mean 'assist",
    ),
    "content.jsonl": (b'{"messages": [{"role": "user", "content": null}]}', "line 1: a message is an object with"),
    "surrogate.jsonl": (
        b'{"text": "a"}\n{"text": "\\ud800"}',
        "line 2: the text contains half of a surrogate pair (\\ud800)",
    ),
    "columns.csv": (b"id,body\n1,one\n", "no column is named `text`; the first row is 'id,body'"),
    "header.csv": (
        b"Bees make honey.\nFish swim.\n",
        "no column is named `text`; the first row is 'Bees make honey.'",
    ),
    "header.tsv": (b"one\t1\ntwo\t2\n", "no column is named `text`; the first row is"),
    "twice.csv": (b"text,text\n1,2\n", "2 columns are named `text`"),
    "short.csv": (b"id,text\n1\n", "line 2: 1 cell in a row of 2 columns separated by ','"),
    "comma.csv": (b"text\nHello, you\n", "line 2: 2 cells in a row of 1 columns"),
    "quote.csv": (b'text\n"one" two\n', "line 2: malformed CSV"),
    "open.csv": (b'text\n"one\n', "line 2: malformed CSV (unexpected end of data)"),
    "open.tsv": (b'"text\none\n', "no column is named `text`"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_bad_files_are_named_with_the_reason(name: str, tmp_path: Path) -> None:
    data, message = MISTAKES[name]
    path = write(tmp_path, name, data)
    with pytest.raises(UserError, match=rf"^{re.escape(path)}\b.*{re.escape(message)}"):
        list(datasets.load_documents(config(paths=(path,))))


@pytest.mark.parametrize("pattern", ["missing.txt", "*.txt", ""])
def test_unmatched_paths_are_named(pattern: str, tmp_path: Path) -> None:
    path = f"{tmp_path}/{pattern}"
    with pytest.raises(UserError, match=rf"config.data.paths: {re.escape(repr(path))} matches no file"):
        list(datasets.load_documents(config(paths=(path,))))


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@given(rows=st.lists(st.tuples(st.text(st.characters(codec="utf-8"), min_size=1), st.text("a,;|\t", max_size=3))))
def test_tables_round_trip(delimiter: str, rows: list[tuple[str, str]]) -> None:
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter).writerows([("text", "other"), *rows])
    found = [document.text for document in datasets.parse_file("a.csv", io.BytesIO(out.getvalue().encode()))]
    assert found == [text for text, _ in rows]


def test_unreadable_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "a.txt", "text")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(UserError, match=rf"^{re.escape(path)}: the file cannot be read \(Permission denied\)"):
        list(datasets.load_documents(config(paths=(path,))))


@pytest.mark.parametrize("pattern", ["a.txt", "*.txt", "inner/a.txt"])
def test_unreadable_folders_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
    """A glob finds nothing in it, as if it were empty."""
    closed = tmp_path / "closed"
    closed.mkdir()
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != closed)
    with pytest.raises(UserError, match=rf"matches no file; the folder {re.escape(str(closed))} is not readable\.$"):
        list(datasets.load_documents(config(paths=(f"{closed}/{pattern}",))))


@pytest.mark.parametrize("read", [lambda found: list(datasets.load_documents(found)), datasets.hash_files])
def test_pipes_and_devices_are_refused(read: Callable[[DataConfig], Any], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    for path in (str(tmp_path / "pipe.txt"), "/dev/null"):
        with pytest.raises(UserError, match=rf"^{re.escape(path)}: this is not a regular file"):
            read(config(paths=(path,)))


def test_file_names_may_contain_commas(tmp_path: Path) -> None:
    path = write(tmp_path, "a,b.txt", "text")
    assert texts(config(paths=parse_overrides([("data.paths", path)])["data.paths"])) == ["text"]
    with pytest.raises(UserError, match="matches no file; repeat the flag for each path, or give a Python list"):
        texts(config(paths=parse_overrides([("data.paths", f"{path},{path}")])["data.paths"]))


def test_line_based_formats_are_streamed(tmp_path: Path) -> None:
    """Errors late in a file do not affect its beginning."""
    for name, data in (("a.jsonl", b'{"text": "one"}\n\xff\n'), ("a.csv", b"text\none\n\xff\n")):
        assert texts(config(paths=(write(tmp_path, name, data),), max_documents=1)) == ["one"]


# Training and validation.


def splits_of(documents: list[Document], found: DataConfig) -> dict[str, str]:
    n_characters = sum(len(document.text) for document in documents)
    return {document.text: split for split, document in datasets.assign_splits(documents, found, n_characters)}


def test_added_documents_do_not_move_others() -> None:
    documents = [plain_document(f"{index}", f"text {index}") for index in range(500)]
    few, many = (splits_of(documents[:stop], config(valid_fraction=0.2)) for stop in (250, 500))
    assert many.items() >= few.items()
    assert 70 < list(many.values()).count("valid") < 130


def test_the_split_does_not_depend_on_names() -> None:
    found = config(valid_fraction=0.5)
    for index in range(50):
        first, second = plain_document("here", f"text {index}"), plain_document("there", f"text {index}")
        assert datasets.is_validation(datasets.hash_document(first), found) == datasets.is_validation(
            datasets.hash_document(second), found
        )


def test_a_larger_valid_fraction_keeps_the_smaller_split() -> None:
    documents = [plain_document("", f"text {index}") for index in range(300)]
    taken = [
        {d for d in documents if datasets.is_validation(datasets.hash_document(d), config(valid_fraction=f))}
        for f in (0.0, 0.1, 0.4)
    ]
    assert not taken[0]
    assert taken[1] < taken[2]


turn_lists = st.lists(st.builds(Message, st.sampled_from(ROLES), st.text("ab 1\n", max_size=3)), max_size=3).map(tuple)


@given(first=turn_lists, second=turn_lists)
@example(first=(Message("user", "auserb"),), second=(Message("user", "a"), Message("user", "b")))
@example(first=(Message("user", "a"),), second=(Message("assistant", "a"),))
def test_digests_are_equal_only_for_equal_messages(first: tuple[Message, ...], second: tuple[Message, ...]) -> None:
    same = datasets.hash_document(Document("a", first)) == datasets.hash_document(Document("b", second))
    assert same == (first == second)


@given(turns=turn_lists)
def test_digests_do_not_depend_on_blocks(turns: tuple[Message, ...]) -> None:
    document = Document("a", turns)
    encoded = [(turn.role, turn.text.encode()) for turn in turns]
    whole = b"".join(f"{role} {len(text)}\n".encode() + text for role, text in encoded)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "BLOCK_CHARACTERS", 2)
        assert datasets.hash_document(document) == hashlib.sha256(whole).digest()


def test_lone_surrogates_are_found_in_any_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "BLOCK_CHARACTERS", 2)
    with pytest.raises(UserError, match=r"surrogate pair \(\\ud800\)"):
        datasets._check_text(plain_document("odd", "abc\ud800d"))


@given(texts=st.lists(st.text("abc", min_size=1, max_size=9), min_size=1), fraction=st.floats(0.0, 0.9))
def test_tail_split_of_texts(texts: list[str], fraction: float) -> None:
    whole = "".join(texts)
    parts = list(
        datasets.assign_splits(
            map(plain_document, texts, texts), config(split="tail", valid_fraction=fraction), len(whole)
        )
    )
    train, valid = ("".join(document.text for side, document in parts if side == name) for name in ("train", "valid"))
    assert train + valid == whole
    assert len(train) == int(len(whole) * (1 - fraction))
    assert all(document.text for _, document in parts)


def test_tail_split_keeps_dialogues_whole() -> None:
    documents = [Document(f"{index}", (Message("user", "aaaa"), Message("assistant", "aaaa"))) for index in range(3)]
    parts = list(datasets.assign_splits(documents, config(split="tail", valid_fraction=0.5), 24))
    assert parts == [("train", documents[0]), ("train", documents[1]), ("valid", documents[2])]


@pytest.mark.parametrize("split", ["document", "tail"])
def test_training_documents_are_the_training_split(split: str) -> None:
    found = config("facts", split=split)
    everything = list(datasets.load_documents(found))
    divided = datasets.assign_splits(everything, found, sum(len(document.text) for document in everything))
    training = list(datasets.load_training_documents(found))
    assert training == [document for side, document in divided if side == "train"]
    assert 0.8 < sum(len(d.text) for d in training) / sum(len(d.text) for d in everything) < 0.97
