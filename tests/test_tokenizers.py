"""Tokenizers: round trips, no special tokens from text, and reproducible training."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models

from rustgpt_jax import tokenizers
from rustgpt_jax.config.schema import DataConfig, TokenizerConfig
from rustgpt_jax.data import datasets
from rustgpt_jax.errors import UserError
from rustgpt_jax.tokenizers import (
    ASSISTANT,
    END,
    ROLE_TOKENS,
    SPECIAL_TOKENS,
    TOKENIZERS,
    UNKNOWN,
    USER,
    Document,
    Message,
    Tokenizer,
    encoding,
    plain_document,
)

TEXTS = [
    "The rain falls on the hill. It doesn't stop, does it?",
    'She said: "the rain (and the wind) fell on well-known hills."',
    "The rain fell on the hill, and the rain stopped.",
    "a ab abc aabbcc naïve café\n    indented\n    twice as far",
]
# All but word, which forgets unknown words and runs of blanks.
LOSSLESS = sorted(TOKENIZERS.keys() - {"word"})
MIN_BYTE_VOCABULARY = {"char": 260, "byte": 260, "bpe": 260}


def train(name: str, texts: list[str], vocab_size: int | None = None) -> Tokenizer:
    if name == "bpe" and vocab_size is None:
        vocab_size = 300
    return tokenizers.train_tokenizer(TokenizerConfig(name, vocab_size), texts)


TRAINED = {name: train(name, TEXTS) for name in TOKENIZERS}

any_text = st.text() | st.lists(
    st.sampled_from([*SPECIAL_TOKENS, UNKNOWN, "<0x41>", "<0xFF>", " ", "\n", "Ġ", "a", "￭"]) | st.text(max_size=3)
).map("".join)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_special_tokens_have_the_first_ids(name: str) -> None:
    assert [TRAINED[name].id_to_token(index) for index in range(4)] == list(SPECIAL_TOKENS)


@pytest.mark.parametrize("name", LOSSLESS)
@given(text=any_text)
def test_decode_inverts_encode(name: str, text: str) -> None:
    tokenizer = TRAINED[name]
    assert tokenizers.decode(tokenizer, tokenizers.encode(tokenizer, text)) == text


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=any_text)
def test_no_text_encodes_to_a_special_token(name: str, text: str) -> None:
    tokenizer = tokenizers.train_tokenizer(TokenizerConfig(name, None if name != "bpe" else 300), [text] * 2)
    assert all(index >= len(SPECIAL_TOKENS) for index in tokenizers.encode(tokenizer, text))


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=st.text("ab.'’-, \n\t\u00a0é漢\"", max_size=60))
def test_long_texts_are_encoded_in_pieces_with_the_same_result(name: str, text: str) -> None:
    tokenizer = TRAINED[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "PIECE_CHARACTERS", 4)
        patch.setattr(encoding, "CALL_CHARACTERS", 10)
        ids, _ = tokenizers.encode_document(tokenizer, plain_document("", text), "all")
    assert ids.tolist()[1:] == tokenizers.encode(tokenizer, text)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=any_text | st.text("a1é日 \n\t\r.,'_￭", max_size=40), size=st.integers(1, 9))
def test_pieces_of_a_text_give_the_tokens_and_tokenizer_of_the_whole(name: str, text: str, size: int) -> None:
    tokenizer = TRAINED[name]
    parts = list(encoding.split_text(text, tokenizer.split_chars, size))
    assert "".join(parts) == text
    whole = tokenizer.backend.encode(text, add_special_tokens=False).ids
    assert [token for part in parts for token in tokenizer.backend.encode(part, add_special_tokens=False).ids] == whole
    split_chars = tokenizer.split_chars or " \n"
    learned = [
        train(name, [*TEXTS, *texts]).serialized for texts in ([text], encoding.split_text(text, split_chars, size))
    ]
    assert learned[0] == learned[1]


@pytest.mark.parametrize("letter", ["x", "7", "-", " "])
def test_bpe_refuses_very_long_words(letter: str) -> None:
    text = "a b " + letter * 300_000
    with pytest.raises(UserError, match=r"300,000 characters in a row|300,001 characters in a row"):
        tokenizers.encode_document(TRAINED["bpe"], plain_document("long", text), "all")
    for name in ("byte", "char"):
        ids, _ = tokenizers.encode_document(TRAINED[name], plain_document("long", text), "all")
        assert len(ids) == len(text) + 1


def test_texts_are_split_before_spaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "PIECE_CHARACTERS", 4)
    assert list(encoding.split_text("one   two three\nfour", " ")) == ["one   two", " three\nfour"]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_training_is_reproducible(name: str) -> None:
    texts = [document.text for document in datasets.load_documents(facts(100))]
    assert train(name, texts).serialized == train(name, texts).serialized


@pytest.mark.parametrize("name", TOKENIZERS)
def test_vocab_size_is_respected(name: str) -> None:
    texts = [document.text for document in datasets.load_documents(facts(100))]
    assert train(name, texts, 270).get_vocab_size() == (260 if name == "byte" else 270)


@pytest.mark.parametrize(("name", "kept"), [("word", {"b", "a"}), ("char", {"b", "a"})])
def test_the_most_frequent_tokens_are_kept_with_ties_in_alphabetical_order(name: str, kept: set[str]) -> None:
    reserved = 5 if name == "word" else 260
    vocabulary = train(name, ["b b c a d"] if name == "word" else ["bbcad"], reserved + 2).backend.get_vocab()
    assert {token for token, index in vocabulary.items() if index >= reserved} == kept


def test_byte_ids_follow_the_special_tokens() -> None:
    text = "".join(map(chr, range(2000)))
    assert tokenizers.encode(TRAINED["byte"], text) == [4 + byte for byte in text.encode()]


def test_unknown_characters_are_encoded_as_bytes() -> None:
    tokens = [TRAINED["char"].id_to_token(index) for index in tokenizers.encode(TRAINED["char"], "aé漢")]
    assert tokens == ["a", "é", "<0xE6>", "<0xBC>", "<0xA2>"]


def test_bpe_merges_what_is_frequent() -> None:
    assert "Ġrain" in TRAINED["bpe"].backend.get_vocab()


def test_invalid_utf8_decodes_to_replacement_characters() -> None:
    assert tokenizers.decode(TRAINED["byte"], [4 + 0xFF, 4 + ord("a")]) == "\ufffda"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_decoding_omits_special_tokens(name: str) -> None:
    turns = (Message("user", "The rain fell on"), Message("assistant", "the hill."))
    ids, _ = tokenizers.encode_document(TRAINED[name], Document("", turns), "all")
    shown = "The rain fell on the hill." if name == "word" else "The rain fell onthe hill."
    assert tokenizers.decode(TRAINED[name], ids) == shown


# Words.


@given(text=st.text("ab.'’-,\"([ \n\té!", max_size=30))
def test_word_preserves_spacing_of_punctuation(text: str) -> None:
    text = re.sub(r"[^\S\n]+", " ", text).strip(" ")
    tokenizer = train("word", [text])
    assert tokenizers.decode(tokenizer, tokenizers.encode(tokenizer, text)) == text


@pytest.mark.parametrize("name", ["facts", "chat"])
def test_word_inverts_bundled_texts(name: str) -> None:
    config = DataConfig(name, (), None, "document", 0.0, "all", None)
    texts = [turn.text for document in datasets.load_documents(config) for turn in document.messages]
    tokenizer = train("word", texts)
    assert [tokenizers.decode(tokenizer, tokenizers.encode(tokenizer, text)) for text in texts] == texts


def test_word_separates_words_and_punctuation() -> None:
    text = 'Yes, "it doesn\'t" (3.5 well-known).\nEnd'
    tokens = train("word", [text]).backend.encode(text).tokens
    bare = [token.strip("￭") for token in tokens]
    words = ["Yes", ",", '"', "it", "doesn't", '"', "(", "3", ".", "5", "well", "-", "known", ")", ".", "", "End"]
    assert [token.strip() for token in bare] == words


def test_unknown_words_are_decoded_as_unk() -> None:
    tokenizer = TRAINED["word"]
    ids = tokenizers.encode(tokenizer, "The zebra stopped, unseen.")
    assert ids.count(tokenizer.token_to_id(UNKNOWN)) == 2
    assert tokenizers.decode(tokenizer, ids) == "The <unk> stopped, <unk>."


# Documents.


@pytest.mark.parametrize(
    ("loss_mask", "expected"),
    [("all", "111111111111"), ("assistant", "100000011101")],
)
def test_weights_of_dialogues(loss_mask: str, expected: str) -> None:
    turns = (
        Message("system", "a"),
        Message("user", "ab"),
        Message("assistant", "ba"),
        Message("user", ""),
        Message("assistant", "a"),
    )
    ids, weights = tokenizers.encode_document(TRAINED["char"], Document("", turns), loss_mask)
    tokens = [TRAINED["char"].id_to_token(index) for index in ids]
    system, user, assistant = ROLE_TOKENS.values()
    assert tokens == [END, system, "a", user, "a", "b", assistant, "b", "a", user, assistant, "a"]
    assert "".join(map(str, weights.astype(int))) == expected
    assert (ids.dtype, weights.dtype) == (np.int32, bool)


@pytest.mark.parametrize("loss_mask", ["all", "assistant"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_all_tokens_of_plain_text_are_targets(name: str, loss_mask: str) -> None:
    ids, weights = tokenizers.encode_document(TRAINED[name], plain_document("", TEXTS[0]), loss_mask)
    assert ids.tolist() == [0, *tokenizers.encode(TRAINED[name], TEXTS[0])]
    assert weights.all()


def test_documents_encode_the_same_together_and_alone() -> None:
    dialogue = Document("", (Message("user", "the hill"), Message("assistant", "the rain")))
    group = [dialogue, plain_document("", "The rain"), Document("", ()), dialogue]
    together = tokenizers.encode_documents(TRAINED["bpe"], group, "assistant")
    for document, (ids, weights) in zip(group, together, strict=True):
        alone = tokenizers.encode_document(TRAINED["bpe"], document, "assistant")
        assert (ids.tolist(), weights.tolist()) == (alone[0].tolist(), alone[1].tolist())


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([Message("text", "ab")], [END, "a", "b"]),
        ([], [END]),
        ([Message("user", "a")], [END, USER, "a", ASSISTANT]),
        ([Message("user", "a"), Message("assistant", "b")], [END, USER, "a", ASSISTANT, "b"]),
    ],
)
def test_prompts(turns: list[Message], expected: list[str]) -> None:
    ids = tokenizers.encode_prompt(TRAINED["char"], turns)
    assert [TRAINED["char"].id_to_token(index) for index in ids] == expected


# Files.


@pytest.mark.parametrize("name", TOKENIZERS)
def test_save_and_load_preserve_a_tokenizer(name: str, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "tokenizer.json"
    tokenizers.save_tokenizer(TRAINED[name], path)
    loaded = tokenizers.load_tokenizer(path)
    text = f"The rain {END} fell {USER} on <0x41> it."
    assert tokenizers.encode(loaded, text) == tokenizers.encode(TRAINED[name], text)
    assert loaded.serialized == TRAINED[name].serialized
    assert os.listdir(path.parent) == ["tokenizer.json"]


def test_failed_saves_keep_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizers.save_tokenizer(TRAINED["byte"], path)
    before = path.read_bytes()

    def fail(source: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UserError, match="disk full"):
        tokenizers.save_tokenizer(TRAINED["word"], path)
    assert os.listdir(tmp_path) == ["tokenizer.json"]
    assert path.read_bytes() == before


# Mistakes.


@pytest.mark.parametrize(("name", "minimum"), [("word", 6), *MIN_BYTE_VOCABULARY.items()])
def test_too_small_vocabularies_are_refused(name: str, minimum: int) -> None:
    with pytest.raises(UserError, match=rf"config.tokenizer.vocab_size={minimum - 1} .*{name}.* at least {minimum}\."):
        train(name, TEXTS, minimum - 1)
    assert train(name, TEXTS, minimum).get_vocab_size() == minimum


def test_bpe_needs_a_vocabulary_size() -> None:
    with pytest.raises(UserError, match="needs config.tokenizer.vocab_size"):
        tokenizers.train_tokenizer(TokenizerConfig("bpe", None), TEXTS)


def test_unknown_kinds_are_answered_with_a_suggestion() -> None:
    with pytest.raises(UserError, match="config.tokenizer.name: unknown 'bep'. Did you mean 'bpe'"):
        tokenizers.train_tokenizer(TokenizerConfig("bep", 300), TEXTS)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "cannot be read .No such file"),
        (b"", "not a tokenizer.json"),
        (b"{}", "not a tokenizer.json"),
        (b"\xff\xfe", "not a tokenizer.json"),
    ],
)
def test_invalid_tokenizer_files_are_refused_by_name(data: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(UserError, match=f"{re.escape(str(path))}: .*{message}"):
        tokenizers.load_tokenizer(path)


def test_missing_special_tokens_are_refused() -> None:
    foreign = Tokenizer(HFTokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")))
    with pytest.raises(UserError, match=re.escape(f"no token '{END}'")):
        tokenizers.encode_document(foreign, plain_document("", "a"), "all")


def facts(n: int) -> DataConfig:
    return DataConfig("facts", (), n, "document", 0.0, "all", None)
