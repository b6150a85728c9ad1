"""Text to token ids and back: word, char, byte and BPE, each a `tokenizers.Tokenizer` kept in a tokenizer.json.

Every document begins with END, so END also ends the document before it; it pads as well. A dialogue's turns begin
with the token of their role. Special tokens are inserted by id only: no text, whatever it says, encodes to one.
"""

import os
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from rustgpt_jax.config import TokenizerConfig
from rustgpt_jax.data.corpora import Document, Turn
from rustgpt_jax.errors import UserError
from rustgpt_jax.tables import choose

END = "<|endoftext|>"
SYSTEM = "<|system|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
# Not a special token in the sense of the library: decoding shows it, where it skips the others.
UNKNOWN = "<unk>"

SPECIAL_TOKENS = (END, SYSTEM, USER, ASSISTANT)
ROLE_TOKENS = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}

# A long text is encoded in pieces of about this many characters, so that threads share the work ...
PIECE_CHARACTERS = 2**14
# ... and this many characters at a time, because the library spends over 100 bytes on a token until it is read.
CALL_CHARACTERS = 2**20


# Training.


def train_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """A tokenizer of the kind that the config names, learned from `texts`; the same texts give the same tokenizer.

    Raises UserError for an unknown kind and for a vocabulary too small for the tokens that the kind must have.
    """
    return choose(TOKENIZERS, config.name, "config.tokenizer.name")(texts, config.vocab_size)


def _train_word(texts: Iterable[str], vocab_size: int | None) -> Tokenizer:
    reserved = (*SPECIAL_TOKENS, UNKNOWN)
    _require_vocabulary("word", vocab_size, len(reserved) + 1, "the special tokens, <unk> and one word")
    tokenizer = _word_tokenizer({UNKNOWN: 0})
    trainer = trainers.WordLevelTrainer(
        vocab_size=vocab_size or 2**31, special_tokens=list(reserved), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    # The trainer marks all that is reserved as special; a new tokenizer leaves <unk> an ordinary word.
    return _with_special_tokens(_word_tokenizer(tokenizer.get_vocab()))


# In the word tokenizer a mark (punctuation or a line break) carries a joiner on each side on which it touches its
# neighbour: 'Yes, "no".' is Yes  ￭,  "￭  no  ￭"  ￭.  so that words have one form each and spacing is not lost.
JOINER = "￭"
_MARK = r"(?!(?<=\w)['’](?=\w))(?:[^\w\s]|\n)"


def _word_tokenizer(vocabulary: dict[str, int]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(JOINER, ""),
            normalizers.Replace(Regex(rf"(?<=[\S\n])(?={_MARK})"), JOINER),
            normalizers.Replace(Regex(rf"(?<=[^\w\s{JOINER}]|\n)(?<!\w['’])(?=\w)"), JOINER),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[^\S\n]+"), "removed"),
            pre_tokenizers.Split(Regex(rf"{JOINER}?{_MARK}(?:{JOINER}(?=\w))?"), "isolated"),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix=JOINER, cleanup=False),
            decoders.Fuse(),
            decoders.Replace(JOINER + " ", ""),
            decoders.Replace(JOINER, ""),
        ]
    )
    return tokenizer


def _train_char(texts: Iterable[str], vocab_size: int | None) -> Tokenizer:
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    reserved = [*SPECIAL_TOKENS, *byte_tokens]
    _require_vocabulary("char", vocab_size, len(reserved), "the special tokens and the 256 bytes")
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    ranked = sorted(counts, key=lambda character: (-counts[character], character))
    kept = ranked if vocab_size is None else ranked[: vocab_size - len(reserved)]
    tokenizer = Tokenizer(_without_merges([*reserved, *sorted(kept)], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return _with_special_tokens(tokenizer)


def _train_byte(texts: Iterable[str], vocab_size: int | None) -> Tokenizer:
    reserved = [*SPECIAL_TOKENS, *_byte_characters()]
    _require_vocabulary("byte", vocab_size, len(reserved), "the special tokens and the 256 bytes")
    return _with_special_tokens(_byte_level(_without_merges(reserved, byte_fallback=False), use_regex=False))


def _train_bpe(texts: Iterable[str], vocab_size: int | None) -> Tokenizer:
    if vocab_size is None:
        raise UserError("config.tokenizer.name='bpe' needs config.tokenizer.vocab_size.")
    _require_vocabulary("bpe", vocab_size, len(SPECIAL_TOKENS) + 256, "the special tokens and the 256 bytes")
    tokenizer = _byte_level(models.BPE(), use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _with_special_tokens(tokenizer)


def _byte_level(model: models.BPE, use_regex: bool) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _byte_characters() -> list[str]:
    """The character that byte-level models write for each byte: itself where it can be seen, or one from 256 on."""
    seen = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    stand_ins = iter(range(256, 512))
    return [chr(byte if byte in seen else next(stand_ins)) for byte in range(256)]


def _without_merges(tokens: Sequence[str], byte_fallback: bool) -> models.BPE:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return models.BPE(vocabulary, [], byte_fallback=byte_fallback)


def _require_vocabulary(name: str, vocab_size: int | None, least: int, why: str) -> None:
    if vocab_size is not None and vocab_size < least:
        raise UserError(
            f"config.tokenizer.vocab_size={vocab_size} is too small for {name!r}: {why} need at least {least}."
        )


def _with_special_tokens(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return _deaf_to_special_tokens(tokenizer)


def _deaf_to_special_tokens(tokenizer: Tokenizer) -> Tokenizer:
    # The library does not write this switch to tokenizer.json.
    tokenizer.encode_special_tokens = True
    return tokenizer


# Files.


def save_tokenizer(tokenizer: Tokenizer, path: str | os.PathLike[str]) -> None:
    """Write a tokenizer.json. Another process sees the old file or the new one, never a part of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Read a tokenizer.json. Raises UserError naming the file when it is missing or holds no tokenizer."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: the tokenizer cannot be read ({error.strerror}).") from None
    try:
        tokenizer = Tokenizer.from_buffer(data)
    except Exception as error:  # The library raises nothing narrower.
        raise UserError(f"{path}: this is not a tokenizer.json ({error}).") from None
    return _deaf_to_special_tokens(tokenizer)


# Encoding and decoding.


def special_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a special token. Raises UserError when the tokenizer has none of that name."""
    index = tokenizer.token_to_id(token)
    if index is None:
        raise UserError(f"The tokenizer has no token {token!r}, which marks off documents or turns.")
    return index


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """The token ids of a text, without END and never with a special token."""
    return tokenizer.encode(text, add_special_tokens=False).ids


def decode(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """The text of token ids; special tokens are skipped, and bytes that are not UTF-8 become U+FFFD."""
    return tokenizer.decode([int(index) for index in ids], skip_special_tokens=True)


def encode_prompt(tokenizer: Tokenizer, turns: Sequence[Turn]) -> list[int]:
    """What a model is given to continue: END, the turns, and ASSISTANT when the last turn is the user's."""
    ids, _ = encode_document(tokenizer, Document("prompt", tuple(turns)), "all")
    answer = [special_id(tokenizer, ASSISTANT)] if turns and turns[-1].role == "user" else []
    return ids.tolist() + answer


def encode_document(tokenizer: Tokenizer, document: Document, loss_on: str) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a document, END first, and whether each is to be learned. See `encode_documents`."""
    return next(encode_documents(tokenizer, [document], loss_on))


def encode_documents(
    tokenizer: Tokenizer, documents: Sequence[Document], loss_on: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The (ids int32, weights bool) of each document, encoded together by the library's threads.

    A document is END, then its text; in a dialogue each turn's text follows the token of its role. With `loss_on`
    'all' every weight is True. With 'assistant' a dialogue has True on the assistant's words and on the token that
    ends them: the role token of the next turn, or END.
    """
    encoded = iter(_encode_texts(tokenizer, [turn.text for document in documents for turn in document.turns]))
    end = special_id(tokenizer, END)
    for document in documents:
        ids, weights = [np.array([end], np.int32)], [np.array([True])]
        before = "text"
        for turn in document.turns:
            if turn.role in ROLE_TOKENS:
                ids.append(np.array([special_id(tokenizer, ROLE_TOKENS[turn.role])], np.int32))
                weights.append(np.array([loss_on == "all" or before == "assistant"]))
            words = next(encoded)
            ids.append(words)
            weights.append(np.full(len(words), loss_on == "all" or turn.is_learned_as_answer))
            before = turn.role
        yield np.concatenate(ids), np.concatenate(weights)


def _encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    pieces = [(index, piece) for index, text in enumerate(texts) for piece in _pieces(text)]
    parts: list[list[np.ndarray]] = [[np.empty(0, np.int32)] for _ in texts]
    for group in _groups(pieces):
        encodings = tokenizer.encode_batch_fast([piece for _, piece in group], add_special_tokens=False)
        for (index, _), encoding in zip(group, encodings, strict=True):
            parts[index].append(np.array(encoding.ids, np.int32))
    return [np.concatenate(part) for part in parts]


def _pieces(text: str) -> Iterator[str]:
    """Consecutive parts of a text whose encodings, one after another, are the encoding of the whole."""
    start = 0
    while start < len(text):
        stop = _safe_cut(text, start + PIECE_CHARACTERS)
        yield text[start:stop]
        start = stop


def _safe_cut(text: str, start: int) -> int:
    # No tokenizer here looks past a single blank, or has a token that goes on from a visible character to a blank.
    stop = text.find(" ", start)
    while stop != -1 and text[stop - 1].isspace():
        stop = text.find(" ", stop + 1)
    return len(text) if stop == -1 else stop


def _groups(pieces: Iterable[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    group: list[tuple[int, str]] = []
    size = 0
    for piece in pieces:
        group.append(piece)
        size += len(piece[1])
        if size >= CALL_CHARACTERS:
            yield group
            group, size = [], 0
    if group:
        yield group


TOKENIZERS: dict[str, Callable[[Iterable[str], int | None], Tokenizer]] = {
    "word": _train_word,
    "char": _train_char,
    "byte": _train_byte,
    "bpe": _train_bpe,
}
