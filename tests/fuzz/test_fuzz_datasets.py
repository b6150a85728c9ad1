"""Corpora, token stores and what a run keeps of them, with random edits: read to the last batch, or refused."""

import csv
import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import small_config
from fuzzing import ODD_TEXTS, PIPE, Sandbox, corrupt_bytes, edit_tree, max_cases, run_or_refuse, write
from fuzzing import sandbox as sandbox
from hypothesis import given
from hypothesis import strategies as st

from rustgpt_jax.config.schema import DataConfig, TokenizerConfig, stages
from rustgpt_jax.data.datasets import load_documents, load_training_documents
from rustgpt_jax.data.pipeline import Batches, iterate_eval_batches
from rustgpt_jax.data.preprocess import StageData, find_changed_stages, format_data_record
from rustgpt_jax.data.token_store import SPLITS, Store, build_store, check_enough_tokens, open_store
from rustgpt_jax.tokenizers import TOKENIZERS, Tokenizer, train_tokenizer

LINES = [f"The rain fell on day {index},\nbut it didn't stop: “naïve” 日本." for index in range(9)]
MESSAGES = [
    {"messages": [{"role": role, "content": text} for role, text in (("user", "Why?"), ("assistant", line))]}
    for line in LINES
]


def table(rows: list[Any], delimiter: str = ",") -> bytes:
    """Rows as CSV, or with another delimiter."""
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter).writerows([row if isinstance(row, list) else [row] for row in rows])
    return text.getvalue().encode("utf-8", "replace")


def lines_of_json(items: list[Any]) -> bytes:
    """Items as JSONL."""
    return "\n".join(map(json.dumps, items)).encode()


# Each kind of file: as its writer writes it, and with edits before or after it is written.
TEXT = "\n\n".join(LINES).encode()
ROWS = [["name", "text"], *([str(place), line] for place, line in enumerate(LINES))]
ITEMS = [*MESSAGES, *({"text": line} for line in LINES)]
FILES: dict[str, tuple[bytes, Any]] = {
    "a.txt": (TEXT, corrupt_bytes(TEXT)),
    "a.json": (json.dumps(LINES).encode(), edit_tree(LINES).map(lambda items: json.dumps(items).encode())),
    "a.jsonl": (lines_of_json(ITEMS), edit_tree(ITEMS).map(lambda items: lines_of_json(list(items or ())))),
    "a.ndjson": (lines_of_json(ITEMS), edit_tree(ITEMS).map(lambda items: lines_of_json(list(items or ())))),
    "a.csv": (table(ROWS), edit_tree(ROWS).map(lambda rows: table(list(rows or ())))),
    "a.tsv": (table(ROWS, "\t"), st.sampled_from(";|, ").map(lambda delimiter: table(ROWS, delimiter))),
}
TRAINED = {name: Tokenizer(make(LINES, 400)) for name, make in TOKENIZERS.items()}


def data_config(folder: Path, name: str, **changes: Any) -> DataConfig:
    """The corpus of one file."""
    whole = DataConfig("files", (str(folder / name),), None, "document", 0.2, "all", None)
    return dataclasses.replace(whole, **changes)


def use(config: DataConfig, tokenizer: Tokenizer, stores: Path) -> Store:
    """The whole way from files to batches."""
    store = build_store(config, tokenizer, stores)
    store.verify()
    for split in SPLITS:
        stream = store.split(split)
        check_enough_tokens(stream, 4, 1)
        tokens = Batches(stream, 4, 1, seed=0).batch(0).tokens_BT
        list(iterate_eval_batches(stream, 4, 2, limit=2))
        assert tokens.max() < tokenizer.get_vocab_size()
    return store


files = st.sampled_from(sorted(FILES)).flatmap(
    lambda name: st.tuples(st.just(name), corrupt_bytes(FILES[name][0]) | FILES[name][1] | st.none() | st.just(PIPE))
)
choices = st.fixed_dictionaries(
    {
        "split": st.sampled_from(("document", "tail")),
        "valid_fraction": st.sampled_from((0.0, 0.2, 0.9)),
        "max_documents": st.sampled_from((None, 1, 5)),
        "loss_mask": st.sampled_from(("all", "assistant")),
    }
)


@pytest.mark.parametrize("name", FILES)
def test_unedited_files(name: str, sandbox: Sandbox) -> None:
    with sandbox.case() as folder:
        write(folder / name, FILES[name][0])
        use(data_config(folder, name, split="tail"), TRAINED["bpe"], folder / "stores")


@max_cases(450)
@given(files, choices, st.sampled_from(sorted(TRAINED)))
def test_edited_files(sandbox: Sandbox, file: tuple[str, bytes | None], changes: dict[str, Any], kind: str) -> None:
    name, data = file
    with sandbox.case() as folder:
        write(folder / name, data)
        config = data_config(folder, name, **changes)
        read = run_or_refuse(lambda: list(load_documents(config)))
        store = run_or_refuse(lambda: use(config, TRAINED[kind], folder / "stores"))
        assert read is not None or store is None
        assert list((folder / "stores").glob(".*")) == []


@max_cases(120)
@given(files, st.sampled_from(sorted(TOKENIZERS)), st.sampled_from((None, 1, 261, 300)))
def test_tokenizers_of_edited_files(
    sandbox: Sandbox, file: tuple[str, bytes | None], kind: str, vocab_size: int | None
) -> None:
    name, data = file
    with sandbox.case() as folder:
        write(folder / name, data)
        config = data_config(folder, name)

        def train() -> Tokenizer:
            texts = (turn.text for document in load_training_documents(config) for turn in document.messages)
            return train_tokenizer(TokenizerConfig(kind, vocab_size), texts)

        run_or_refuse(train)


patterns = st.lists(st.sampled_from([text for text in ODD_TEXTS if text != "/"]) | st.text(max_size=8), max_size=3)


@max_cases(120)
@given(patterns)
def test_odd_paths(sandbox: Sandbox, names: list[str]) -> None:
    # A path from the root may be all there is.
    paths = tuple(name.lstrip("/") for name in names)
    with sandbox.case() as folder:
        run_or_refuse(lambda: use(data_config(folder, "", paths=paths), TRAINED["byte"], folder / "stores"))


# What was written before.


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store to be corrupted."""
    folder = tmp_path_factory.mktemp("built")
    write(folder / "a.jsonl", FILES["a.jsonl"][0])
    return build_store(data_config(folder, "a.jsonl", loss_mask="assistant"), TRAINED["byte"], folder / "stores")


def sums(store: Store) -> list[int]:
    """Something of every array."""
    streams = [store.split(split) for split in SPLITS]
    return [int(np.sum(read(0, stream.n_tokens))) for stream in streams for read in (stream.tokens, stream.weights)]


@max_cases(250)
@given(st.data())
def test_damaged_stores(sandbox: Sandbox, built: Store, data: st.DataObject) -> None:
    with sandbox.case() as folder:
        root = folder / built.path.name
        shutil.copytree(built.path, root)
        file = data.draw(st.sampled_from(sorted(root.iterdir())))
        old = file.read_bytes()
        new = data.draw(
            corrupt_bytes(old) | edit_tree(json.loads(old)).map(json_bytes)
            if file.suffix == ".json"
            else corrupt_bytes(old)
        )
        file.unlink()
        write(file, data.draw(st.sampled_from((new, new, new, None))))
        run_or_refuse(lambda: sums(open_store(root)))
        run_or_refuse(lambda: open_store(root).verify())


def json_bytes(value: Any) -> bytes:
    """A value as JSON."""
    return json.dumps(value).encode()


@max_cases(150)
@given(st.data())
def test_edited_data_records(sandbox: Sandbox, built: Store, data: st.DataObject) -> None:
    material = [StageData(stages(small_config())[0], built)]
    written = format_data_record(material)
    new = data.draw(corrupt_bytes(written.encode()) | edit_tree(json.loads(written)).map(json_bytes) | st.none())
    with sandbox.case() as folder:
        write(folder / "data.json", new)
        changed = run_or_refuse(lambda: find_changed_stages(folder / "data.json", material))
        assert changed in (None, [], ["train"])
        assert changed != [] or new in (None, written.encode()) or json.loads(new)
