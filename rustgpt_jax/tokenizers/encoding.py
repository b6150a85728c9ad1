"""Tokenization of documents and conversations.

With tokenizers trained here, every document begins with END, which also terminates the preceding document and serves as
padding. Each turn of a dialogue begins with its role token. Special tokens are inserted by id only.

With an imported tokenizer, a document is encoded with its post-processor and the model's end token. A dialogue is
rendered by the chat template, and the end token is appended if the last answer is not terminated.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import numpy as np

from rustgpt_jax.errors import UserError
from rustgpt_jax.tokenizers.chat_template import ChatFormat, rendered, renderings
from rustgpt_jax.tokenizers.messages import Document, Turn
from rustgpt_jax.tokenizers.tokenizer import (
    ASSISTANT,
    CUTS_OF_BYTE_PAIRS,
    ROLE_TOKENS,
    Codec,
    encode,
    refusals,
    special_id,
)

# BPE takes quadratic time in the length of a word.
LONGEST_WORD = 2**16
# Upper bound of what byte-level tokenizers treat as one word: letters, digits, punctuation or spaces.
_WORD = re.compile(r"[^\W\d_]+|\d+|(?:[^\w\s]|_)+|\s+")
# For the tokenizers trained here a text is encoded in pieces of about this many characters, which threads share ...
PIECE_CHARACTERS = 2**14
# ... and about this many characters at a time, because the library spends over 100 bytes on a token until it is read.
CALL_CHARACTERS = 2**20


def encode_prompt(codec: Codec, turns: Sequence[Turn]) -> list[int]:
    """What a model is given to continue: a text, or a dialogue up to where the assistant is to answer.

    Raises UserError for a dialogue where the model has no chat template, or one that its template refuses.
    """
    if codec.dialect is not None:
        return _foreign_prompt(codec, codec.dialect, turns)
    ids, _ = encode_document(codec, Document("prompt", tuple(turns)), "all")
    answer = [special_id(codec, ASSISTANT)] if turns and turns[-1].role == "user" else []
    return ids.tolist() + answer


def encode_document(codec: Codec, document: Document, loss_mask: str) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a document and whether each is to be learned. See `encode_documents`."""
    return next(encode_documents(codec, [document], loss_mask))


def encode_documents(
    codec: Codec, documents: Sequence[Document], loss_mask: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The (ids int32, weights bool) of each document, encoded together by the library's threads.

    A document is END, then its text; in a dialogue each turn's text follows the token of its role. With `loss_mask`
    'all' every weight is True. With 'assistant' a dialogue has True on the assistant's words and on the token that
    ends them: the role token of the next turn, or END.
    """
    if codec.dialect is not None:
        yield from _foreign_documents(codec, codec.dialect, documents, loss_mask)
        return
    encoded = iter(_encode_texts(codec, [turn.text for document in documents for turn in document.turns]))
    end = codec.end_id
    for document in documents:
        ids, weights = [np.array([end], np.int32)], [np.array([True])]
        before = "text"
        for turn in document.turns:
            if turn.role in ROLE_TOKENS:
                ids.append(np.array([special_id(codec, ROLE_TOKENS[turn.role])], np.int32))
                weights.append(np.array([loss_mask == "all" or before == "assistant"]))
            words = next(encoded)
            ids.append(words)
            weights.append(np.full(len(words), loss_mask == "all" or turn.is_learned_as_answer))
            before = turn.role
        yield np.concatenate(ids), np.concatenate(weights)


# The dialects of other models.


def _foreign_prompt(codec: Codec, dialect: ChatFormat, turns: Sequence[Turn]) -> list[int]:
    if all(turn.role == "text" for turn in turns):
        return [*codec.opening_and_closing[0], *encode(codec, "".join(turn.text for turn in turns))] or [codec.end_id]
    text = rendered(dialect, turns, is_asking=turns[-1].role == "user", special_tokens=codec.special_tokens)
    with refusals():
        return codec.template_reader.encode(text, add_special_tokens=False).ids


def _foreign_documents(
    codec: Codec, dialect: ChatFormat, documents: Sequence[Document], loss_mask: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    encoded = iter(_encode_texts(codec, [document.text for document in documents if not document.is_dialogue]))
    for document in documents:
        if document.is_dialogue:
            yield _foreign_dialogue(codec, dialect, document.turns, loss_mask)
        else:
            yield _foreign_text(codec, next(encoded))


def _foreign_text(codec: Codec, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    opening, closing = codec.opening_and_closing
    end = codec.end_id
    if end in opening or not (opening or closing):
        # The end token at the beginning of a document terminates the preceding one.
        ids = np.concatenate([opening or [end], words, closing]).astype(np.int32)
        return ids, np.ones(len(ids), bool)
    ids = np.concatenate([opening, words, closing, [] if end in closing else [end]]).astype(np.int32)
    # Nothing predicts the tokens with which every text begins.
    return ids, np.arange(len(ids)) >= max(len(opening), 1)


def _foreign_dialogue(
    codec: Codec, dialect: ChatFormat, turns: Sequence[Turn], loss_mask: str
) -> tuple[np.ndarray, np.ndarray]:
    answers = (
        [place for place, turn in enumerate(turns) if turn.role == "assistant"] if loss_mask == "assistant" else []
    )
    wanted = [(len(turns), False)]
    for place in answers:
        wanted += [(place, True), (place + 1, False)]
    text, *parts = renderings(dialect, turns, wanted, codec.special_tokens)
    with refusals():
        encoding = codec.template_reader.encode(text, add_special_tokens=False)
    ids, ends = np.array(encoding.ids, np.int32), np.array([end for _, end in encoding.offsets], np.int64)
    is_stop = np.isin(ids, codec.stop_ids)
    if loss_mask == "all":
        weights = np.ones(len(ids), bool)
        is_open = turns[-1].role == "assistant" and _is_open(text, turns[-1].text.strip(), ends, is_stop)
    else:
        weights, is_open = np.zeros(len(ids), bool), False
        for before, after in zip(parts[::2], parts[1::2], strict=True):
            is_open = _learn_answer(weights, ends, is_stop, _answer_span(text, before, after), dialect)
    if is_open:
        # The template ends this answer only by another turn, so append the token that ends a text.
        ids, weights = np.append(ids, np.int32(codec.end_id)), np.append(weights, True)
    return ids, weights


def _answer_span(text: str, before: str, after: str) -> tuple[int, int]:
    """Return the start and end of an answer in a rendered dialogue, given the text before and after it."""
    if not (text.startswith(before) and text.startswith(after)):
        raise UserError(
            "The model's chat template writes earlier turns anew when others follow, so the assistant's words "
            "cannot be told apart: set config.data.loss_mask='all'."
        )
    return len(before), len(after)


def _learn_answer(
    weights: np.ndarray, ends: np.ndarray, is_stop: np.ndarray, span: tuple[int, int], dialect: ChatFormat
) -> bool:
    """Set the weights of an answer and its stop token; return whether the stop token is missing.

    Raises:
        UserError: The answer is followed by text that is not a stop token.
    """
    is_answer = (ends > span[0]) & (ends <= span[1])
    weights |= is_answer
    if is_stop[is_answer].any():
        return False
    following = int(np.searchsorted(ends, span[1], side="right"))
    if following == len(ends):
        return True
    if not is_stop[following]:
        raise UserError(
            "The model's chat template ends the assistant's turns with none of the tokens that end a reply "
            f"({', '.join(dialect.stops)}), so the model would not learn to stop: use dialogues of one answer each, "
            "or a model with another chat template."
        )
    weights[following] = True
    return False


def _is_open(text: str, answer: str, ends: np.ndarray, is_stop: np.ndarray) -> bool:
    """Return whether no stop token follows the last answer of a rendered dialogue."""
    place = text.rfind(answer)
    return bool(answer) and place >= 0 and not is_stop[ends > place + len(answer)].any()


def _encode_texts(codec: Codec, texts: Sequence[str]) -> list[np.ndarray]:
    # Another model's tokenizer may do something at the beginning of a text that it must not do at that of a piece.
    cut = partial(pieces, cuts=codec.cuts) if codec.dialect is None else _whole
    cut_texts = [(index, piece) for index, text in enumerate(texts) for piece in cut(text)]
    parts: list[list[np.ndarray]] = [[np.empty(0, np.int32)] for _ in texts]
    for group in _groups(cut_texts):
        with refusals():
            encodings = codec.tokenizer.encode_batch_fast([piece for _, piece in group], add_special_tokens=False)
        for (index, _), encoding in zip(group, encodings, strict=True):
            parts[index].append(np.array(encoding.ids, np.int32))
    return [np.concatenate(part) for part in parts]


def _whole(text: str) -> Iterator[str]:
    yield text


def pieces(text: str, cuts: str | None, size: int | None = None) -> Iterator[str]:
    """Split a text into consecutive pieces whose concatenated encodings equal that of the whole text.

    Args:
        text: The text.
        cuts: The characters before which the text may be split if preceded by a visible character; None for anywhere.
        size: The approximate number of characters per piece; PIECE_CHARACTERS by default.

    Raises:
        UserError: A run of characters that is merged as one word is too long.
    """
    size = size or PIECE_CHARACTERS
    start = 0
    while start < len(text):
        stop = min(start + size, len(text)) if cuts is None else _safe_cut(text, start + size, cuts)
        piece = text[start:stop]
        if cuts == CUTS_OF_BYTE_PAIRS and len(piece) > size + LONGEST_WORD:
            _check_words(piece)
        yield piece
        start = stop


def _safe_cut(text: str, start: int, cuts: str) -> int:
    # No tokenizer that is trained here looks past a single blank, or has a token that goes on from a visible character
    # to a blank. Those of other models may, so their texts are not cut.
    found = re.compile(rf"(?<=\S)[{cuts}]").search(text, start)
    return found.start() if found else len(text)


def _check_words(text: str) -> None:
    for found in _WORD.finditer(text):
        if found.end() - found.start() > LONGEST_WORD:
            raise UserError(
                f"The text has {found.end() - found.start():,} characters in a row, {found[0][:20]!r} and so on, that "
                f"byte pairs take for one word; they read words of {LONGEST_WORD:,} characters. Break the text into "
                "words or lines, or set config.tokenizer.name='byte'."
            )


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
