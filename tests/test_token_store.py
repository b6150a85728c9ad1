"""The token store: it contains every token, is built once, and is created atomically."""

import dataclasses
import errno
import fcntl
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import small_config
from tokenizers import Tokenizer as HFTokenizer

from rustgpt_jax import tokenizers
from rustgpt_jax.config.schema import DataConfig
from rustgpt_jax.data import datasets, preprocess, token_store
from rustgpt_jax.data.token_store import FORMAT_VERSION, build_store, check_enough_tokens, open_store, temporary_folder
from rustgpt_jax.errors import UserError
from rustgpt_jax.tokenizers import TOKENIZERS, Tokenizer

LINES = [f"The rain fell on day {index}, but it didn't stop." for index in range(40)]


def char(texts: list[str] = LINES) -> HFTokenizer:
    return Tokenizer(TOKENIZERS["char"](texts, None))


def config(paths: tuple[str, ...], **changes: Any) -> DataConfig:
    whole = DataConfig("files", paths, None, "document", 0.25, "all", None)
    return dataclasses.replace(whole, **changes)


@pytest.fixture
def lines(tmp_path: Path) -> DataConfig:
    path = tmp_path / "lines.json"
    path.write_text(json.dumps(LINES))
    return config((str(path),))


@pytest.fixture
def dialogues(tmp_path: Path) -> DataConfig:
    path = tmp_path / "chat.jsonl"
    turns = [[("user", f"day {index}?"), ("assistant", line)] for index, line in enumerate(LINES)]
    messages = [{"messages": [{"role": role, "content": text} for role, text in turn]} for turn in turns]
    path.write_text("\n".join(map(json.dumps, messages)))
    return config((str(path),), loss_mask="assistant")


def refuse_to_encode(*arguments: object) -> None:
    raise AssertionError("encoded again")


# Contents.


@pytest.mark.parametrize("shard_tokens", [7, 2**26])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_split_concatenates_its_documents(name: str, shard_tokens: int, lines: DataConfig, tmp_path: Path) -> None:
    tokenizer = Tokenizer(TOKENIZERS[name](LINES[:20], 300))
    built = build_store(lines, tokenizer, tmp_path / "stores", shard_tokens=shard_tokens)
    for split in token_store.SPLITS:
        documents = [d for side, d in datasets.assign_splits(datasets.load_documents(lines), lines, 0) if side == split]
        encoded = [[0, *tokenizers.encode(tokenizer, document.text)] for document in documents]
        expected = [token for piece in encoded for token in piece] + [0]
        stream, manifest = built.split(split), built.manifest.splits[split]
        assert stream.tokens(0, len(expected) + 9).tolist() == expected
        assert stream.offsets.tolist() == np.cumsum([0, *map(len, encoded[:-1])]).tolist()
        assert (stream.n_tokens, stream.n_targets) == (len(expected), len(expected) - 1)
        assert stream.target_bytes == sum(len(document.text.encode()) for document in documents)
        assert stream.bytes_per_token == stream.target_bytes / stream.n_targets
        assert manifest.n_documents == len(documents) > 0
        assert manifest.n_unknown == (expected.count(4) if name == "word" else 0)
        assert len(manifest.tokens) == -(-len(expected) // shard_tokens)
        assert not manifest.weights and stream.weights(3, len(expected) + 9).sum() == len(expected) - 3
    assert any(built.manifest.splits[split].n_unknown for split in token_store.SPLITS) == (name == "word")


def test_slices_may_cross_shards(lines: DataConfig, tmp_path: Path) -> None:
    stream = build_store(lines, char(), tmp_path / "stores", shard_tokens=5).split("train")
    everything = stream.tokens(0, stream.n_tokens)
    for start in range(20):
        for stop in range(start, 25):
            assert stream.tokens(start, stop).tolist() == everything[start:stop].tolist()


def test_weights_are_stored_for_dialogues(dialogues: DataConfig, tmp_path: Path) -> None:
    tokenizer = char()
    built = build_store(dialogues, tokenizer, tmp_path / "stores", shard_tokens=11)
    stream = built.split("train")
    documents = list(datasets.load_training_documents(dialogues))
    parts = [tokenizers.encode_document(tokenizer, document, "assistant")[1] for document in documents]
    expected = np.concatenate([*parts, [True]])
    assert stream.weights(0, stream.n_tokens).tolist() == expected.tolist()
    assert stream.n_targets == expected.sum() - 1
    assert stream.target_bytes == sum(len(document.messages[-1].text) for document in documents)
    # Each answer is learned with the END after it, and one character is one token here.
    assert stream.n_targets == stream.target_bytes + len(documents)


def test_large_vocabularies_take_four_bytes_per_token(lines: DataConfig, tmp_path: Path) -> None:
    tokenizer = char(["".join(map(chr, range(0x10000, 0x20000))), *LINES])
    built = build_store(lines, tokenizer, tmp_path / "stores")
    manifest = built.manifest.splits["train"]
    assert sum(file.size for file in manifest.tokens) == 4 * manifest.n_tokens
    assert tokenizers.decode(tokenizer, built.split("train").tokens(0, 30)).startswith("The rain")


def test_the_validation_stream_may_be_empty(lines: DataConfig, tmp_path: Path) -> None:
    built = build_store(dataclasses.replace(lines, valid_fraction=0.0), char(), tmp_path / "stores")
    stream = built.split("valid")
    assert (stream.n_tokens, len(stream.offsets), stream.bytes_per_token) == (0, 0, 0.0)
    assert len(stream.tokens(0, 5)) == len(stream.weights(0, 5)) == 0
    assert built.manifest.splits["train"].n_documents == len(LINES)


def test_the_store_does_not_depend_on_batches_of_documents(
    lines: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build_store(lines, char(), tmp_path / "whole").manifest
    calls: list[tuple[int, int | None]] = []
    monkeypatch.setattr(token_store, "BATCH_CHARACTERS", 100)
    parts = build_store(lines, char(), tmp_path / "parts", lambda done, total: calls.append((done, total))).manifest
    assert parts == whole
    n_characters = sum(map(len, LINES))
    assert len(calls) > 5 and calls[-1] == (n_characters, n_characters)
    assert calls == sorted(calls)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_store_does_not_depend_on_pieces_of_documents(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    novel = "\n\n".join([*LINES, "日本の川。" * 30, "x" * 300, " " * 90]) * 2
    (tmp_path / "novel.txt").write_text(novel, encoding="utf-8")
    found = config((str(tmp_path / "novel.txt"),), split="tail")
    tokenizer = Tokenizer(TOKENIZERS[name](LINES, 300))
    whole = build_store(found, tokenizer, tmp_path / "whole").manifest
    monkeypatch.setattr(token_store, "BATCH_CHARACTERS", 100)
    assert build_store(found, tokenizer, tmp_path / "parts").manifest == whole
    assert {split.n_documents for split in whole.splits.values()} == {1}


MEASURE = """
import resource, sys
from pathlib import Path
from rustgpt_jax.config.schema import DataConfig, TokenizerConfig
from rustgpt_jax.data import preprocess
from rustgpt_jax.data.token_store import build_store
data, folder = DataConfig("files", (sys.argv[1],), None, "tail", 0.1, "all", None), Path(sys.argv[2])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
surveys = {data: preprocess.compute_corpus_stats(data)}
texts = preprocess._training_texts(surveys, "word", None)
build_store(data, preprocess.train_tokenizer(TokenizerConfig("word", None), texts), folder)
print((peak() - before) / 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("megabytes", [2, pytest.param(20, marks=pytest.mark.long)])
def test_memory_is_bounded_for_one_long_document(megabytes: int, tmp_path: Path) -> None:
    """It holds the text a few times, not its tokens: 20 MB took 1,160 MB to train the tokenizer alone."""
    text = " ".join(LINES) * (megabytes * 10**6 // len(" ".join(LINES)))
    (tmp_path / "novel.txt").write_text(text)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "novel.txt"), str(tmp_path / "stores")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 60 + 6 * megabytes


# When it is built.


def test_a_store_is_built_once(lines: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build_store(lines, char(), tmp_path / "stores")
    monkeypatch.setattr(token_store, "encode_documents", refuse_to_encode)
    assert build_store(dataclasses.replace(lines, seq_len=77), char(), tmp_path / "stores") == first


CHANGES: dict[str, Callable[[DataConfig], tuple[DataConfig, HFTokenizer]]] = {
    "tokenizer": lambda found: (found, Tokenizer(TOKENIZERS["byte"]([], None))),
    "valid_fraction": lambda found: (dataclasses.replace(found, valid_fraction=0.3), char()),
    "split": lambda found: (dataclasses.replace(found, split="tail"), char()),
    "loss_mask": lambda found: (dataclasses.replace(found, loss_mask="assistant"), char()),
    "documents": lambda found: (dataclasses.replace(found, max_documents=30), char()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_setting_of_the_tokens_changes_the_store(name: str, lines: DataConfig, tmp_path: Path) -> None:
    first = build_store(lines, char(), tmp_path / "stores")
    assert build_store(*CHANGES[name](lines), tmp_path / "stores").path != first.path


def truncate(path: Path) -> None:
    file = path / "train.tokens.00000.bin"
    file.write_bytes(file.read_bytes()[:-2])


def rewrite_format(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format_version": -1}))


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a short shard": (truncate, "does not have the size given in the manifest"),
    "a missing shard": (lambda path: (path / "valid.tokens.00000.bin").unlink(), "not a token store"),
    "a missing manifest": (lambda path: (path / "manifest.json").unlink(), "not a token store"),
    "half a manifest": (lambda path: os.truncate(path / "manifest.json", 40), "not a token store"),
    "a manifest of nothing": (lambda path: os.truncate(path / "manifest.json", 0), "not a token store"),
    "another format": (rewrite_format, f"has format -1, not {FORMAT_VERSION}"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_stores_are_named_and_rebuilt(name: str, lines: DataConfig, tmp_path: Path) -> None:
    built = build_store(lines, char(), tmp_path / "stores")
    damage, message = DAMAGE[name]
    damage(built.path)
    with pytest.raises(UserError, match=rf"{re.escape(str(built.path))}.*{message}"):
        open_store(built.path)
    again = build_store(lines, char(), tmp_path / "stores")
    again.verify()
    assert again == built
    assert os.listdir(tmp_path / "stores") == [built.path.name]


def test_verify_finds_a_changed_byte(lines: DataConfig, tmp_path: Path) -> None:
    built = build_store(lines, char(), tmp_path / "stores")
    built.verify()
    file = built.path / "valid.tokens.00000.bin"
    data = bytearray(file.read_bytes())
    data[10] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=f"{file}: the file is damaged"):
        built.verify()


def test_interrupted_builds_leave_nothing(lines: DataConfig, tmp_path: Path) -> None:
    def interrupt(done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_store(lines, char(), tmp_path / "stores", interrupt)
    assert os.listdir(tmp_path / "stores") == []


# Builds that are killed.

# Builds a store in one process after another, each of which kills itself at a later file operation of the build.
# Nothing but data/ is imported, and no thread is started before the processes part.
KILLED = """
import os, signal, sys
from rustgpt_jax.config.schema import DataConfig
from rustgpt_jax.data import token_store
from rustgpt_jax.tokenizers import TOKENIZERS, Tokenizer

file, folder = sys.argv[1:]
token_store.BATCH_CHARACTERS = 700
data = DataConfig("files", (file,), None, "document", 0.25, "all", None)
tokenizer = Tokenizer(TOKENIZERS["byte"]([], None))
EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "fcntl.flock", "os.scandir")

def build(moment):
    left = moment
    def count(event, arguments):
        nonlocal left
        if event in EVENTS:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(count)
    token_store.build_store(data, tokenizer, f"{folder}/{moment}", shard_tokens=300)
    os._exit(0)

for moment in range(1, 1000):
    pid = os.fork()
    if not pid:
        build(moment)
    if os.waitpid(pid, 0)[1] == 0:
        break
"""


def test_builds_killed_at_any_moment_can_be_repeated(
    lines: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_store, "BATCH_CHARACTERS", 700)
    subprocess.run([sys.executable, "-c", KILLED, lines.paths[0], str(tmp_path / "killed")], check=True)
    roots = sorted((tmp_path / "killed").iterdir(), key=lambda root: int(root.name))
    left = [{entry.name[0] == "." for entry in root.iterdir()} for root in roots]
    # There were kills before the store had its name and after, and at last there was none.
    assert len(roots) > 30 and left.count({True}) > 20 and left.count({False}) > 1

    tokenizer = Tokenizer(TOKENIZERS["byte"]([], None))
    undisturbed = build_store(lines, tokenizer, tmp_path / "undisturbed", shard_tokens=300)
    for root in roots:
        built = build_store(lines, tokenizer, root, shard_tokens=300)
        built.verify()
        assert built.manifest == undisturbed.manifest
        for split in token_store.SPLITS:
            ours, theirs = built.split(split), undisturbed.split(split)
            assert ours.tokens(0, ours.n_tokens).tolist() == theirs.tokens(0, theirs.n_tokens).tolist()
        build_store(dataclasses.replace(lines, valid_fraction=0.3), tokenizer, root)
        assert [path.name for path in root.glob(".*")] == []


def test_folders_of_killed_builds_are_removed(lines: DataConfig, tmp_path: Path) -> None:
    built = build_store(lines, char(), tmp_path / "stores")
    torn = built.path.with_name(f".{built.path.name}.0123")
    built.path.rename(torn)
    again = build_store(lines, char(), tmp_path / "stores")
    again.verify()
    assert os.listdir(tmp_path / "stores") == [built.path.name]


def test_folders_of_running_builds_are_kept(lines: DataConfig, tmp_path: Path) -> None:
    root = tmp_path / "stores"
    with temporary_folder(root, "key") as held:
        build_store(lines, char(), root)
        assert held.is_dir()
    (root / ".key.of_a_killed_one").mkdir()
    (root / ".a_file").touch()
    build_store(dataclasses.replace(lines, valid_fraction=0.3), char(), root)
    assert [path.name for path in root.glob(".*")] == [".a_file"]


def test_nothing_is_removed_without_file_locks(
    lines: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: object, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    leftover = tmp_path / "stores" / ".key.of_another"
    leftover.mkdir(parents=True)
    build_store(lines, char(), tmp_path / "stores").verify()
    assert leftover.is_dir()


def test_the_first_of_two_builders_wins(lines: DataConfig, tmp_path: Path) -> None:
    root, others = tmp_path / "stores", []

    def build_another(done: int, total: int | None) -> None:
        others.append(build_store(lines, char(), root))
        os.utime(others[0].path / "manifest.json", (1, 1))

    built = build_store(lines, char(), root, build_another)
    assert [built] == others
    assert (built.path / "manifest.json").stat().st_mtime == 1
    assert os.listdir(root) == [built.path.name]


# Mistakes.


def test_files_that_change_during_a_build_are_an_error(
    lines: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = tmp_path / "more.txt"
    extra.write_text("A last line.")
    monkeypatch.setattr(token_store, "BATCH_CHARACTERS", 100)
    changing = dataclasses.replace(lines, paths=(*lines.paths, str(extra)))
    with pytest.raises(UserError, match="changed while it was being read"):
        build_store(changing, char(), tmp_path / "stores", lambda done, total: extra.write_text("Another.") and None)
    assert os.listdir(tmp_path / "stores") == []


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        ('["", ""]', {}, "config.data.corpus='files' has no document with text"),
        ('["one"]', {}, "has 1 document.s. and the split '(train|valid)' got none: set config.data.split='tail'"),
        ('["one"]', {"split": "tail", "valid_fraction": 0.9, "loss_mask": "all"}, "the split 'train' got none"),
    ],
)
def test_too_small_corpora_are_refused(text: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "few.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        build_store(config((str(path),), **changes), char(), tmp_path / "stores")


def test_empty_splits_are_refused_before_training_a_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocess, "train_tokenizer", refuse_to_encode)
    monkeypatch.setattr(token_store, "encode_documents", refuse_to_encode)
    (tmp_path / "one.txt").write_text("One long text. " * 1000)
    found = config((str(tmp_path / "one.txt"),))
    whole = small_config(**{"data.corpus": "files", "data.paths": found.paths, "data.valid_fraction": 0.25})
    for refused in (lambda: build_store(found, char(), tmp_path), lambda: preprocess.load_or_train_tokenizer(whole)):
        with pytest.raises(UserError, match="the split '(train|valid)' got none: set config.data.split='tail'"):
            refused()


def test_less_text_than_one_batch_is_refused(lines: DataConfig, tmp_path: Path) -> None:
    stream = build_store(lines, char(), tmp_path / "stores").split("train")
    fitting = stream.n_tokens - 1
    check_enough_tokens(stream, fitting, 1)
    numbers = f"has {stream.n_tokens} tokens and one batch needs {stream.n_tokens + 1}"
    message = f"{numbers}.*batch_size=1 or .*seq_len={fitting + 1}"
    with pytest.raises(UserError, match=message):
        check_enough_tokens(stream, fitting + 1, 1)


def test_unwritable_caches_are_named(lines: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"{tmp_path}/file/stores: the token store cannot be written .Not a directory"):
        build_store(lines, char(), tmp_path / "file" / "stores")
