"""Tokenization of documents and conversations.

With tokenizers trained here, every document begins with END, which also terminates the preceding document and serves as
padding. Each message of a dialogue begins with its role token. Special tokens are inserted by id only.

With an imported tokenizer, a document is encoded with its post-processor and the model's end token. A dialogue is
rendered by the chat template, and the end token is appended if the last reply is not terminated.
"""

import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from rustgpt_jax.errors import UserError
from rustgpt_jax.tokenizers.chat_template import ChatFormat, Document, Message, apply_chat_template, render_prefixes
from rustgpt_jax.tokenizers.tokenizer import (
    ASSISTANT,
    BPE_SPLIT_CHARS,
    ROLE_TOKENS,
    Tokenizer,
    encode,
    special_token_id,
    translate_library_errors,
)

# BPE takes quadratic time in the length of a word.
MAX_WORD_CHARACTERS = 2**16
# Matches everything that byte-level tokenizers treat as one word: a run of letters, digits, punctuation or spaces.
_WORD = re.compile(r"[^\W\d_]+|\d+|(?:[^\w\s]|_)+|\s+")
# If the tokenizer was trained here, texts are split into pieces of about this many characters, encoded in parallel.
PIECE_CHARACTERS = 2**14
# Each call of the library encodes about this many characters, because it allocates over 100 bytes per token.
CALL_CHARACTERS = 2**20

# The token ids of a document (int32), and the mask of the targets of the loss (bool).
EncodedDocument = tuple[np.ndarray, np.ndarray]


def encode_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Encode text to continue, or a dialogue up to the beginning of the assistant's reply.

    Raises:
        UserError: The model has no chat template, or its template rejects the dialogue.
    """
    is_question = bool(messages) and messages[-1].role == "user"
    if tokenizer.chat_format is None:
        ids, _ = encode_document(tokenizer, Document("prompt", tuple(messages)), "all")
        return ids.tolist() + ([special_token_id(tokenizer, ASSISTANT)] if is_question else [])
    if all(message.role == "text" for message in messages):
        text = "".join(message.text for message in messages)
        return [*tokenizer.prefix_and_suffix_ids[0], *encode(tokenizer, text)] or [tokenizer.end_id]
    text = apply_chat_template(
        tokenizer.chat_format,
        messages,
        add_generation_prompt=is_question,
        special_tokens=tokenizer.special_tokens,
    )
    with translate_library_errors():
        return tokenizer.special_token_parser.encode(text, add_special_tokens=False).ids


def encode_document(tokenizer: Tokenizer, document: Document, loss_mask: str) -> EncodedDocument:
    """Encode one document; see `encode_documents`."""
    return next(encode_documents(tokenizer, [document], loss_mask))


def encode_documents(tokenizer: Tokenizer, documents: Sequence[Document], loss_mask: str) -> Iterator[EncodedDocument]:
    """Encode documents together, in parallel.

    Args:
        tokenizer: The tokenizer.
        documents: The documents.
        loss_mask: 'all' makes every token a target. With 'assistant', the only targets in dialogues are the assistant's
            messages and the token that ends each of them: the role token of the next message, or END.

    Yields:
        The token ids of each document and a mask of its targets.
    """
    if tokenizer.chat_format is not None:
        yield from _encode_imported(tokenizer, tokenizer.chat_format, documents, loss_mask)
        return
    encoded = iter(_encode_texts(tokenizer, [message.text for document in documents for message in document.messages]))
    for document in documents:
        ids, weights = [np.array([tokenizer.end_id], np.int32)], [np.array([True])]
        previous_role = "text"
        for message in document.messages:
            if message.role in ROLE_TOKENS:
                ids.append(np.array([special_token_id(tokenizer, ROLE_TOKENS[message.role])], np.int32))
                weights.append(np.array([loss_mask == "all" or previous_role == "assistant"]))
            text_ids = next(encoded)
            ids.append(text_ids)
            weights.append(np.full(len(text_ids), loss_mask == "all" or message.is_assistant_target))
            previous_role = message.role
        yield np.concatenate(ids), np.concatenate(weights)


# Imported tokenizers.


def _encode_imported(
    tokenizer: Tokenizer, chat_format: ChatFormat, documents: Sequence[Document], loss_mask: str
) -> Iterator[EncodedDocument]:
    texts = [document.text for document in documents if not document.is_dialogue]
    encoded = iter(_encode_texts(tokenizer, texts))
    for document in documents:
        if document.is_dialogue:
            yield _encode_imported_dialogue(tokenizer, chat_format, document.messages, loss_mask)
        else:
            yield _add_affixes(tokenizer, next(encoded))


def _add_affixes(tokenizer: Tokenizer, text_ids: np.ndarray) -> EncodedDocument:
    prefix, suffix = tokenizer.prefix_and_suffix_ids
    end = tokenizer.end_id
    if end in prefix or not (prefix or suffix):
        # The end token at the beginning of a document terminates the preceding one.
        ids = np.concatenate([prefix or [end], text_ids, suffix]).astype(np.int32)
        return ids, np.ones(len(ids), bool)
    ids = np.concatenate([prefix, text_ids, suffix, [] if end in suffix else [end]]).astype(np.int32)
    # The tokens that begin every text are not targets.
    return ids, np.arange(len(ids)) >= max(len(prefix), 1)


def _encode_imported_dialogue(
    tokenizer: Tokenizer, chat_format: ChatFormat, messages: Sequence[Message], loss_mask: str
) -> EncodedDocument:
    prefixes = [(len(messages), False)]
    for index, message in enumerate(messages):
        if message.role == "assistant" and loss_mask == "assistant":
            prefixes += [(index, True), (index + 1, False)]
    text, *parts = render_prefixes(chat_format, messages, prefixes, tokenizer.special_tokens)
    with translate_library_errors():
        encoding = tokenizer.special_token_parser.encode(text, add_special_tokens=False)
    ids, ends = np.array(encoding.ids, np.int32), np.array([end for _, end in encoding.offsets], np.int64)
    is_stop = np.isin(ids, tokenizer.stop_ids)
    if loss_mask == "all":
        weights = np.ones(len(ids), bool)
        is_open = messages[-1].role == "assistant" and _is_open(text, messages[-1].text.strip(), ends, is_stop)
    else:
        weights, is_open = np.zeros(len(ids), bool), False
        for before, after in zip(parts[::2], parts[1::2], strict=True):
            is_open = _set_reply_weights(weights, ends, is_stop, _reply_span(text, before, after), chat_format)
    if is_open:
        # The template marks the end of this reply only by the start of the next message, so append the end token.
        ids, weights = np.append(ids, np.int32(tokenizer.end_id)), np.append(weights, True)
    return ids, weights


def _reply_span(text: str, before: str, after: str) -> tuple[int, int]:
    """Return where a reply starts and ends in a rendered dialogue, given the text up to each of these points."""
    if not (text.startswith(before) and text.startswith(after)):
        raise UserError(
            "The model's chat template renders earlier messages differently when others follow, so the assistant's "
            "messages cannot be located: set config.data.loss_mask='all'."
        )
    return len(before), len(after)


def _set_reply_weights(
    weights: np.ndarray, ends: np.ndarray, is_stop: np.ndarray, span: tuple[int, int], chat_format: ChatFormat
) -> bool:
    """Set the weights of a reply and its stop token; return whether the stop token is missing.

    Raises:
        UserError: The reply is followed by text that is not a stop token.
    """
    is_reply = (ends > span[0]) & (ends <= span[1])
    weights[is_reply] = True
    if is_stop[is_reply].any():
        return False
    following = int(np.searchsorted(ends, span[1], side="right"))
    if following == len(ends):
        return True
    if not is_stop[following]:
        raise UserError(
            "The model's chat template ends the assistant's messages with none of the tokens that end a reply "
            f"({', '.join(chat_format.stop_tokens)}), so the model would not learn to stop: use dialogues with one "
            "reply each, or a model with another chat template."
        )
    weights[following] = True
    return False


def _is_open(text: str, reply: str, ends: np.ndarray, is_stop: np.ndarray) -> bool:
    """Return whether no stop token follows the last reply of a rendered dialogue."""
    start = text.rfind(reply)
    return bool(reply) and start >= 0 and not is_stop[ends > start + len(reply)].any()


# Encoding of long texts.


def _encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    # Imported tokenizers may treat the beginning of a text in their own way, so their texts are not split.
    is_split = tokenizer.chat_format is None
    numbered_pieces = [
        (index, piece)
        for index, text in enumerate(texts)
        for piece in (split_text(text, tokenizer.split_chars) if is_split else [text])
    ]
    parts: list[list[np.ndarray]] = [[np.empty(0, np.int32)] for _ in texts]
    for group in _groups(numbered_pieces):
        with translate_library_errors():
            encodings = tokenizer.backend.encode_batch_fast([piece for _, piece in group], add_special_tokens=False)
        for (index, _), encoding in zip(group, encodings, strict=True):
            parts[index].append(np.array(encoding.ids, np.int32))
    return [np.concatenate(part) for part in parts]


def split_text(text: str, split_chars: str | None, size: int | None = None) -> Iterator[str]:
    """Split text into consecutive pieces whose concatenated encodings equal the encoding of the whole.

    Args:
        text: The text.
        split_chars: The characters before which the text may be split if preceded by a visible character; None for
            anywhere.
        size: The approximate number of characters per piece; PIECE_CHARACTERS by default.

    Raises:
        UserError: A run of characters that is merged as one word is too long.
    """
    size = size or PIECE_CHARACTERS
    start = 0
    while start < len(text):
        stop = start + size
        if split_chars is not None:
            # Tokenizers trained here look no further than one space, and have no token with a space after a visible
            # character.
            found = re.compile(rf"(?<=\S)[{split_chars}]").search(text, stop)
            stop = found.start() if found else len(text)
        piece = text[start:stop]
        if split_chars == BPE_SPLIT_CHARS and len(piece) > size + MAX_WORD_CHARACTERS:
            _check_words(piece)
        yield piece
        start = stop


def _check_words(text: str) -> None:
    for found in _WORD.finditer(text):
        if found.end() - found.start() > MAX_WORD_CHARACTERS:
            raise UserError(
                f"The text has {found.end() - found.start():,} characters in a row, {found[0][:20]!r} and so on, that "
                f"BPE treats as one word; at most {MAX_WORD_CHARACTERS:,} characters are supported. Break the text "
                "into words or lines, or set config.tokenizer.name='byte'."
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
