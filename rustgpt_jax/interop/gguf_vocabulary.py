"""Tokenizers in llama.cpp's format: byte-level BPE and SentencePiece BPE.

A tokenizer is converted only if llama.cpp produces the same tokens for the same text.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers

from rustgpt_jax.errors import UserError
from rustgpt_jax.interop.hf_tokenizer_io import own_dialect, special_ids
from rustgpt_jax.tokenizers import Codec
from rustgpt_jax.tokenizers.chat_template import rendered
from rustgpt_jax.tokenizers.messages import Turn

BLANK = "▁"
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]

_WORDS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
# llama.cpp's names of the pre-tokenizer patterns, and whether it then looks up a whole piece in the vocabulary before
# merging (`ignore_merges`).
SPLITS: dict[str, dict[str, bool]] = {
    rf"{_LETTERS}|\p{{N}}{{1,3}}|{_WORDS}": {"llama-bpe": True, "dbrx": False},
    rf"{_LETTERS}|\p{{N}}|{_WORDS}": {"qwen2": False},
}
GPT2_SPLIT = {"gpt-2": False}
DIGITS_SPLIT = {"smollm": False}


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer in terms of GGUF fields.

    Attributes:
        model: 'gpt2' for byte-level BPE, 'llama' for SentencePiece BPE.
        pre: llama.cpp's name of the pre-tokenizer.
        merges: Merges of a 'gpt2' tokenizer, in order of priority.
        scores: Token scores of a 'llama' tokenizer; higher scores are merged first.
        adds_blank: Whether a space is prepended to texts.
        adds_bos: Whether the token bos_id is prepended to texts.
    """

    model: str
    pre: str
    merges: list[str]
    scores: Mapping[str, float]
    adds_blank: bool
    adds_bos: bool
    bos_id: int


def vocabulary_of(codec: Codec) -> Vocabulary:
    """Convert a tokenizer for llama.cpp.

    Raises:
        UserError: llama.cpp would tokenize differently; the message says how.
    """
    written = json.loads(codec.tokenizer.to_str())
    if written["model"]["type"] != "BPE" or written["model"].get("dropout"):
        raise UserError(f"llama.cpp has no tokenizers of the kind {written['model']['type']} as they are here")
    opening, _ = codec.opening_and_closing
    if len(opening) > 1:
        raise UserError("llama.cpp puts at most one token before a text")
    bos_id = opening[0] if opening else special_ids(codec).get("bos_token_id", codec.end_id)
    is_byte_level = (written["decoder"] or {}).get("type") == "ByteLevel"
    describe = _byte_level if is_byte_level else _sentencepiece
    return describe(written, adds_bos=bool(opening), bos_id=bos_id)


def token_rows(codec: Codec, size: int, kinds: Any) -> Iterator[tuple[str, int]]:
    """Yield each row of the token table and its type, a gguf.TokenType."""
    written = json.loads(codec.tokenizer.to_str())
    added = {token["content"]: token["special"] for token in written["added_tokens"]}
    unknown, has_bytes = written["model"].get("unk_token"), written["model"].get("byte_fallback")
    taken = codec.tokenizer.get_vocab()
    for index in range(size):
        token = codec.id_to_token(index)
        if token is None:
            name = f"<unused{index}>"
            while name in taken:
                name = f"<{name}>"
            yield name, kinds.UNUSED
        elif token == unknown:
            yield token, kinds.UNKNOWN
        elif token in added:
            yield token, kinds.CONTROL if added[token] else kinds.USER_DEFINED
        else:
            yield token, kinds.BYTE if has_bytes and token in BYTE_TOKENS else kinds.NORMAL


def chat_template_of(codec: Codec, vocabulary: Vocabulary, is_dialogue: bool) -> str | None:
    """Return the chat template for llama.cpp, or None if the model has none.

    Raises:
        UserError: llama.cpp would tokenize the template's dialogues differently.
    """
    dialect = codec.dialect or own_dialect(is_dialogue)
    if dialect.chat_template is None:
        return None
    tokens = codec.tokenizer.get_added_tokens_decoder().values()
    stripping = next((token.content for token in tokens if token.lstrip or token.rstrip), None)
    if stripping is not None:
        raise UserError(f"llama.cpp keeps the blanks beside {stripping}, which the tokenizer leaves out")
    if "bos_token" in dialect.chat_template and "bos_token" not in dialect.named:
        raise UserError("the chat template writes a bos_token that the tokenizer does not name")
    bos = codec.id_to_token(vocabulary.bos_id) or ""
    try:
        asked = rendered(dialect, [Turn("user", "?")], is_asking=True, special_tokens=codec.special_tokens)
    except UserError:
        return dialect.chat_template
    if vocabulary.adds_bos and not asked.startswith(bos):
        raise UserError(f"llama.cpp puts {bos} before every dialogue, and the chat template does not")
    return dialect.chat_template


# Byte-level BPE.


def _byte_level(written: Mapping[str, Any], adds_bos: bool, bos_id: int) -> Vocabulary:
    model = written["model"]
    if written["normalizer"] is not None:
        raise UserError(f"llama.cpp does not change text as the normalizer {written['normalizer']['type']} does")
    if any(model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")):
        raise UserError("llama.cpp has no byte-level BPE with prefixes, suffixes or a fallback to bytes")
    if not set(pre_tokenizers.ByteLevel.alphabet()) <= model["vocab"].keys():
        raise UserError("the tokenizer has no token for some of the 256 bytes")
    _require_plain_added_tokens(written)
    merges = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
    if not merges:
        raise UserError("llama.cpp takes no BPE without merges")
    names = _splits(written["pre_tokenizer"])
    ignores = bool(model.get("ignore_merges"))
    # Both settings are equivalent if every token can be built by merges from its own characters.
    agree = _makes_every_token(written, merges)
    pre = next((name for name, there in names.items() if agree or there == ignores), None)
    if pre is None:
        raise UserError("llama.cpp merges within words of the vocabulary, and the tokenizer does not (ignore_merges)")
    return Vocabulary("gpt2", pre, [" ".join(pair) for pair in merges], {}, False, adds_bos, bos_id)


def _splits(pre_tokenizer: Mapping[str, Any] | None) -> dict[str, bool]:
    """Return the entry of SPLITS that matches a pre-tokenizer.

    Raises:
        UserError: llama.cpp does not support the pre-tokenizer.
    """
    parts = [] if pre_tokenizer is None else pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    *first, last = [dict(part) for part in parts] or [{}]
    if last.get("type") == "ByteLevel" and not last["add_prefix_space"]:
        if last["use_regex"] and not first:
            return GPT2_SPLIT
        if last["use_regex"] and first == [{"type": "Digits", "individual_digits": True}]:
            return DIGITS_SPLIT
        if not last["use_regex"] and len(first) == 1 and first[0]["type"] == "Split":
            split, pattern = first[0], first[0]["pattern"].get("Regex")
            if split["behavior"] == "Isolated" and not split["invert"] and pattern in SPLITS:
                return SPLITS[pattern]
    raise UserError("how the tokenizer cuts text before its merges is none of the ways known in llama.cpp")


def _makes_every_token(written: Mapping[str, Any], merges: Sequence[Sequence[str]]) -> bool:
    """Return whether every token can be built by merges from its own characters."""
    vocabulary = written["model"]["vocab"]
    added = {token["content"] for token in written["added_tokens"]}
    bare = Tokenizer(models.BPE(vocabulary, [(left, right) for left, right in merges]))
    tokens = [token for token in vocabulary if token not in added]
    encoded = bare.encode_batch_fast(tokens, add_special_tokens=False)
    return all(each.ids == [vocabulary[token]] for token, each in zip(tokens, encoded, strict=True))


def _require_plain_added_tokens(written: Mapping[str, Any]) -> None:
    """Check that added tokens that may occur in text are matched literally.

    Raises:
        UserError: An added token is matched in another way.
    """
    for token in written["added_tokens"]:
        special = ("lstrip", "rstrip", "single_word")
        if not token["special"] and (
            any(token[key] for key in special) or token["normalized"] and written["normalizer"]
        ):
            raise UserError(f"llama.cpp does not find the token {token['content']} in a text as the tokenizer does")


# SentencePiece's BPE.


def _sentencepiece(written: Mapping[str, Any], adds_bos: bool, bos_id: int) -> Vocabulary:
    model = written["model"]
    vocabulary = model["vocab"]
    if not model.get("byte_fallback") or not set(BYTE_TOKENS) <= vocabulary.keys():
        raise UserError("llama.cpp has no BPE of characters without a fallback to bytes")
    if model.get("ignore_merges") or any(not token["special"] for token in written["added_tokens"]):
        raise UserError("llama.cpp's SentencePiece has neither ignore_merges nor added tokens that are not special")
    adds_blank = _adds_blank(written)
    groups = [(whole, list(of)) for whole, of in groupby(model["merges"], key="".join)]
    scores = {whole: float(-rank) for rank, (whole, _) in enumerate(groups)}
    merges = {tuple(pair) for _, of in groups for pair in of}
    added = {token["content"] for token in written["added_tokens"]}
    if len(scores) < len(groups) or not all(
        (token[:cut], token[cut:]) in merges
        for token in vocabulary.keys() - added
        for cut in range(1, len(token))
        if all(len(part) == 1 or part in vocabulary for part in (token[:cut], token[cut:]))
    ):
        raise UserError("llama.cpp merges two tokens whenever the result is a token, and the tokenizer does not")
    return Vocabulary("llama", "default", [], scores, adds_blank, adds_bos, bos_id)


def _adds_blank(written: Mapping[str, Any]) -> bool:
    """Return whether a space is prepended to texts.

    Raises:
        UserError: Spaces are handled differently than in SentencePiece.
    """
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
    metaspace = {"type": "Metaspace", "replacement": BLANK, "prepend_scheme": "never", "split": False}
    normalizer, pre_tokenizer = written["normalizer"], written["pre_tokenizer"]
    if normalizer == {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": BLANK}, replace]}:
        has_blank = True
    elif normalizer in (replace, {"type": "Sequence", "normalizers": [replace]}) or pre_tokenizer == metaspace:
        has_blank = False
    else:
        has_blank = None
    if has_blank is None or None not in (normalizer, pre_tokenizer):
        raise UserError("llama.cpp writes blanks otherwise than the tokenizer")
    return has_blank
