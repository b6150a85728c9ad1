"""Tokenizers based on Hugging Face's `tokenizers`: text to token ids and back, training, saving and loading."""

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from rustgpt_jax.atomic_io import write_atomically
from rustgpt_jax.config.schema import TokenizerConfig
from rustgpt_jax.errors import UserError, program_name
from rustgpt_jax.registry import lookup
from rustgpt_jax.tokenizers.chat_template import ChatFormat

END = "<|endoftext|>"
SYSTEM = "<|system|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
SPECIAL_TOKENS = (END, SYSTEM, USER, ASSISTANT)
ROLE_TOKENS = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}
# Not a special token for the library, so that `decode` keeps it.
UNKNOWN = "<unk>"

# The time and memory that the library takes are proportional to the largest token id.
MAX_VOCAB_SIZE = 2**24

# Characters that start a word or are dropped between words, regardless of context.
WORD_SPLIT_CHARS = " "
BPE_SPLIT_CHARS = " \n"

# The value of config.tokenizer.name in runs with the tokenizer of an imported model.
IMPORTED = "imported"


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer. Text never encodes to special tokens, even if it contains their names.

    Attributes:
        backend: The tokenizer of the `tokenizers` library.
        chat_format: The chat format of an imported model; None for tokenizers trained here, which have END and a token
            for each role.
    """

    backend: HFTokenizer
    chat_format: ChatFormat | None = None

    def __post_init__(self) -> None:
        # The library does not write this setting to tokenizer.json.
        self.backend.encode_special_tokens = True

    @cached_property
    def serialized(self) -> str:
        """Everything that affects the tokenizer's output, as JSON."""
        chat_format = "" if self.chat_format is None else json.dumps(dataclasses.asdict(self.chat_format))
        return self.backend.to_str() + chat_format

    @cached_property
    def split_chars(self) -> str | None:
        """For tokenizers trained here, the characters before which text may be split; None for anywhere."""
        model = json.loads(self.backend.to_str())["model"]
        if model["type"] != "BPE":
            return WORD_SPLIT_CHARS
        return BPE_SPLIT_CHARS if model["merges"] else None

    @cached_property
    def special_token_parser(self) -> HFTokenizer:
        """The same tokenizer for trusted text, in which the names of special tokens encode to these tokens."""
        parser = HFTokenizer.from_str(self.backend.to_str())
        parser.encode_special_tokens = False
        return parser

    @cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """The names of the special tokens."""
        return tuple(token.content for token in self.backend.get_added_tokens_decoder().values() if token.special)

    @property
    def end_id(self) -> int:
        """The id of the token that ends documents."""
        return special_token_id(self, END if self.chat_format is None else self.chat_format.end_token)

    @property
    def stop_ids(self) -> list[int]:
        """The ids of the tokens that end a continuation or a reply."""
        stop_tokens = (END, USER, SYSTEM) if self.chat_format is None else self.chat_format.stop_tokens
        return [special_token_id(self, token) for token in stop_tokens]

    @cached_property
    def prefix_and_suffix_ids(self) -> tuple[list[int], list[int]]:
        """The ids to add before and after text: END, or those of an imported tokenizer's post-processor."""
        if self.chat_format is None:
            return [self.end_id], []
        for probe in ("a", "0", ".", " ", "\N{LOWER ONE EIGHTH BLOCK}"):
            with translate_library_errors():
                plain = self.backend.encode(probe, add_special_tokens=False).ids
                marked = self.backend.encode(probe, add_special_tokens=True)
            if plain and 0 in marked.special_tokens_mask:
                start = marked.special_tokens_mask.index(0)
                return marked.ids[:start], marked.ids[start + len(plain) :]
        # For an empty text, the suffix can be distinguished from the prefix only if it is the end token.
        with translate_library_errors():
            ids = self.backend.encode("", add_special_tokens=True).ids
        return (ids[:-1], ids[-1:]) if len(ids) > 1 and ids[-1] == self.end_id else (ids, [])

    def get_vocab_size(self) -> int:
        """Return the largest token id plus one."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a token, or None."""
        try:
            return self.backend.token_to_id(token)
        except UnicodeEncodeError:  # Half of a surrogate pair is never in the vocabulary.
            return None

    def id_to_token(self, index: int) -> str | None:
        """Return the token with the given id, or None if the id is unknown."""
        return self.backend.id_to_token(index)


def special_token_id(tokenizer: Tokenizer, token: str) -> int:
    """Return the id of a special token. Raises UserError if the vocabulary does not contain it."""
    index = tokenizer.token_to_id(token)
    if index is None:
        raise UserError(f"The tokenizer has no token {token!r}, which separates documents or messages.")
    return index


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encode text without END or any other special token."""
    with translate_library_errors():
        return tokenizer.backend.encode(text, add_special_tokens=False).ids


def decode(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """Decode token ids without special tokens; bytes that are not UTF-8 become U+FFFD."""
    with translate_library_errors():
        return tokenizer.backend.decode([int(index) for index in ids], skip_special_tokens=True)


def decode_continuation(tokenizer: Tokenizer, before: Sequence[int], ids: Iterable[int]) -> str:
    """Return the text that token ids add to the text of the preceding tokens.

    This may differ from the text of the ids alone: some tokenizers write spaces only between tokens, or drop the first.
    """
    ids = list(ids)
    known, whole = decode(tokenizer, before), decode(tokenizer, [*before, *ids])
    # Decode the ids alone if they change earlier text, for example bytes that do not complete a character.
    return whole[len(known) :] if whole.startswith(known) else decode(tokenizer, ids)


@contextmanager
def translate_library_errors(what: str = "The tokenizer does not accept this text") -> Iterator[None]:
    """Translate errors of the `tokenizers` library to UserError, prefixing the library's message with `what`."""
    try:
        yield
    except BaseException as error:
        # The library raises plain Exception, and PanicException, a BaseException, for panics in Rust.
        if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
            raise
        raise UserError(f"{what}: {error}.") from None


# Files.


def save_tokenizer(tokenizer: Tokenizer, path: str | os.PathLike[str]) -> None:
    """Write a tokenizer.json atomically, with the chat format of an imported model in a file beside it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if tokenizer.chat_format is not None:
        values = json.dumps(dataclasses.asdict(tokenizer.chat_format), indent=2, ensure_ascii=False)
        write_atomically(chat_format_file(path), values + "\n")
    write_atomically(path, tokenizer.backend.to_str(pretty=True))


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Load a tokenizer.json and its chat format, if any. Raises UserError if a file is missing or damaged."""
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: the tokenizer cannot be read ({error.strerror}).") from None
    with translate_library_errors(f"{path}: this is not a tokenizer.json"):
        backend = HFTokenizer.from_buffer(data)
    # A file may enable truncation and padding; like `transformers`, ignore that.
    backend.no_truncation()
    backend.no_padding()
    tokenizer = Tokenizer(backend, _load_chat_format(chat_format_file(path)))
    if tokenizer.get_vocab_size() > MAX_VOCAB_SIZE:
        raise UserError(f"{path}: a token has the id {tokenizer.get_vocab_size() - 1}; the limit is {MAX_VOCAB_SIZE}.")
    return tokenizer


def chat_format_file(path: Path) -> Path:
    """Return the path of the chat format of the tokenizer in `path`, such as tokenizer.chat_format.json."""
    return path.with_suffix(".chat_format.json")


def _load_chat_format(path: Path) -> ChatFormat | None:
    if not path.exists():
        return None
    try:
        fields = json.loads(path.read_bytes())
        return ChatFormat(**{**fields, "stop_tokens": tuple(fields["stop_tokens"])})
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: this is not the chat format of a tokenizer ({error}).") from None


# Training.


def train_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """Train a tokenizer of the kind in the config. The result depends only on the config and the text."""
    if config.name == IMPORTED:
        raise UserError(
            f"config.tokenizer.name='imported' is for runs created by `{program_name()} import`, whose folder contains "
            "the tokenizer. Choose another name for a new run."
        )
    return Tokenizer(lookup(TOKENIZERS, config.name, "config.tokenizer.name")(texts, config.vocab_size))


def _train_word(texts: Iterable[str], vocab_size: int | None) -> HFTokenizer:
    """Words, punctuation marks and line breaks of the corpus."""
    reserved = (*SPECIAL_TOKENS, UNKNOWN)
    _check_vocab_size("word", vocab_size, len(reserved) + 1, "the special tokens, <unk> and one word")
    tokenizer = _word_tokenizer({UNKNOWN: 0})
    trainer = trainers.WordLevelTrainer(
        vocab_size=vocab_size or 2**31, special_tokens=list(reserved), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    # The trainer marks all reserved tokens as special; in a new tokenizer, <unk> is an ordinary word.
    return _add_special_tokens(_word_tokenizer(tokenizer.get_vocab()))


# In the word tokenizer, punctuation marks and line breaks have a joiner on each side that has no space: 'Yes, "no".' is
# encoded as Yes  ￭,  "￭  no  ￭"  ￭.  so that each word is one token and spacing is preserved.
JOINER = "￭"
_MARK = r"(?!(?<=\w)['’](?=\w))(?:[^\w\s]|\n)"


def _word_tokenizer(vocabulary: dict[str, int]) -> HFTokenizer:
    tokenizer = HFTokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
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


def _train_char(texts: Iterable[str], vocab_size: int | None) -> HFTokenizer:
    """Characters of the corpus; others are encoded as UTF-8 bytes."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    reserved = [*SPECIAL_TOKENS, *byte_tokens]
    _check_vocab_size("char", vocab_size, len(reserved), "the special tokens and the 256 bytes")
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    ranked = sorted(counts, key=lambda character: (-counts[character], character))
    kept = ranked if vocab_size is None else ranked[: vocab_size - len(reserved)]
    tokenizer = HFTokenizer(_bpe_without_merges([*reserved, *sorted(kept)], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return _add_special_tokens(tokenizer)


def _train_byte(texts: Iterable[str], vocab_size: int | None) -> HFTokenizer:
    """UTF-8 bytes."""
    reserved = [*SPECIAL_TOKENS, *_byte_characters()]
    _check_vocab_size("byte", vocab_size, len(reserved), "the special tokens and the 256 bytes")
    return _add_special_tokens(_byte_level(_bpe_without_merges(reserved, byte_fallback=False), use_regex=False))


def _train_bpe(texts: Iterable[str], vocab_size: int | None) -> HFTokenizer:
    """Byte-pair encoding of UTF-8 bytes, learned from the corpus."""
    if vocab_size is None:
        raise UserError("config.tokenizer.name='bpe' needs config.tokenizer.vocab_size.")
    _check_vocab_size("bpe", vocab_size, len(SPECIAL_TOKENS) + 256, "the special tokens and the 256 bytes")
    tokenizer = _byte_level(models.BPE(), use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _add_special_tokens(tokenizer)


def _byte_level(model: models.BPE, use_regex: bool) -> HFTokenizer:
    tokenizer = HFTokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _byte_characters() -> list[str]:
    """Return the character for each byte in byte-level models: itself if visible, else one from U+0100 on."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    replacements = iter(range(256, 512))
    return [chr(byte if byte in visible else next(replacements)) for byte in range(256)]


def _bpe_without_merges(tokens: Sequence[str], byte_fallback: bool) -> models.BPE:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return models.BPE(vocabulary, [], byte_fallback=byte_fallback)


def _check_vocab_size(name: str, vocab_size: int | None, minimum: int, reason: str) -> None:
    if vocab_size is not None and vocab_size < minimum:
        raise UserError(
            f"config.tokenizer.vocab_size={vocab_size} is too small for {name!r}: {reason} need at least {minimum}."
        )


def _add_special_tokens(tokenizer: HFTokenizer) -> HFTokenizer:
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


TOKENIZERS: dict[str, Callable[[Iterable[str], int | None], HFTokenizer]] = {
    "word": _train_word,
    "char": _train_char,
    "byte": _train_byte,
    "bpe": _train_bpe,
}
