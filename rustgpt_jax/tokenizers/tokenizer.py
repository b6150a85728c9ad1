"""Text to token ids and back: a tokenizer of Hugging Face's library, with how documents are marked in its tokens."""

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer

from rustgpt_jax.atomic_io import write_atomically
from rustgpt_jax.errors import UserError
from rustgpt_jax.tokenizers.chat_template import ChatFormat

END = "<|endoftext|>"
SYSTEM = "<|system|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
# Not a special token in the sense of the library: decoding shows it, where it skips the others.
UNKNOWN = "<unk>"

# Far more than any tokenizer has. The library takes time and memory for each id below the largest.
MOST_TOKENS = 2**24

# Characters that start a word or are dropped between words, regardless of context.
CUTS_OF_WORDS = " "
CUTS_OF_BYTE_PAIRS = " \n"

SPECIAL_TOKENS = (END, SYSTEM, USER, ASSISTANT)
ROLE_TOKENS = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}


@dataclass(frozen=True, eq=False)
class Codec:
    """A tokenizer and its dialect. None is the dialect of tokenizers trained here: END, and a token for each role.

    No text, whatever it says, encodes to a special token.
    """

    tokenizer: Tokenizer
    dialect: ChatFormat | None = None

    def __post_init__(self) -> None:
        # The library does not write this switch to tokenizer.json.
        self.tokenizer.encode_special_tokens = True

    @cached_property
    def written(self) -> str:
        """All that its tokens depend on, as JSON."""
        dialect = {} if self.dialect is None else {"dialect": dataclasses.asdict(self.dialect)}
        return self.tokenizer.to_str() + (json.dumps(dialect) if dialect else "")

    @cached_property
    def cuts(self) -> str | None:
        """The characters before which a text may be split, if this tokenizer was trained here; None for anywhere."""
        model = json.loads(self.tokenizer.to_str())["model"]
        if model["type"] != "BPE":
            return CUTS_OF_WORDS
        return CUTS_OF_BYTE_PAIRS if model["merges"] else None

    @cached_property
    def template_reader(self) -> Tokenizer:
        """The same tokenizer, for text in which special tokens stand for themselves."""
        reader = Tokenizer.from_str(self.tokenizer.to_str())
        reader.encode_special_tokens = False
        return reader

    @cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """The special tokens as they are written."""
        added = self.tokenizer.get_added_tokens_decoder().values()
        return tuple(token.content for token in added if token.special)

    @property
    def end_id(self) -> int:
        """The token that ends documents."""
        return special_id(self, END if self.dialect is None else self.dialect.end)

    @property
    def stop_ids(self) -> list[int]:
        """The tokens that end a text or a reply."""
        stops = (END, USER, SYSTEM) if self.dialect is None else self.dialect.stops
        return [special_id(self, token) for token in stops]

    @cached_property
    def opening_and_closing(self) -> tuple[list[int], list[int]]:
        """The ids before and after a text: END, or those that an imported tokenizer's post-processor adds."""
        if self.dialect is None:
            return [self.end_id], []
        for probe in ("a", "0", ".", " ", "\N{LOWER ONE EIGHTH BLOCK}"):
            with refusals():
                plain = self.tokenizer.encode(probe, add_special_tokens=False).ids
                marked = self.tokenizer.encode(probe, add_special_tokens=True)
            if plain and 0 in marked.special_tokens_mask:
                start = marked.special_tokens_mask.index(0)
                return marked.ids[:start], marked.ids[start + len(plain) :]
        # For an empty text, opening and closing ids can be distinguished only by the end token.
        with refusals():
            around = self.tokenizer.encode("", add_special_tokens=True).ids
        return (around[:-1], around[-1:]) if len(around) > 1 and around[-1] == self.end_id else (around, [])

    def get_vocab_size(self) -> int:
        """One more than the largest token id."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def token_to_id(self, token: str) -> int | None:
        """The id of a token, or None."""
        try:
            return self.tokenizer.token_to_id(token)
        except UnicodeEncodeError:  # No token has half of a surrogate pair.
            return None

    def id_to_token(self, index: int) -> str | None:
        """The token of an id, or None."""
        return self.tokenizer.id_to_token(index)


def special_id(codec: Codec, token: str) -> int:
    """The id of a special token. Raises UserError when the tokenizer has none of that name."""
    index = codec.token_to_id(token)
    if index is None:
        raise UserError(f"The tokenizer has no token {token!r}, which marks off documents or turns.")
    return index


def encode(codec: Codec, text: str) -> list[int]:
    """The token ids of a text, without END and never with a special token."""
    with refusals():
        return codec.tokenizer.encode(text, add_special_tokens=False).ids


def decode(codec: Codec, ids: Iterable[int]) -> str:
    """The text of token ids; special tokens are skipped, and bytes that are not UTF-8 become U+FFFD."""
    with refusals():
        return codec.tokenizer.decode([int(index) for index in ids], skip_special_tokens=True)


def decode_after(codec: Codec, before: Sequence[int], ids: Iterable[int]) -> str:
    """Return the text that token ids add to the text of the preceding tokens.

    This may differ from the text of the ids alone: some tokenizers write spaces only between tokens, or drop the first.
    """
    ids = list(ids)
    known, whole = decode(codec, before), decode(codec, [*before, *ids])
    # Decode the ids alone if they change earlier text, for example bytes that do not complete a character.
    return whole[len(known) :] if whole.startswith(known) else decode(codec, ids)


@contextmanager
def refusals(what: str = "The tokenizer does not take this text") -> Iterator[None]:
    """Around calls of the library: what it cannot do becomes a UserError, `what` with the library's reason."""
    try:
        yield
    except BaseException as error:
        # The library raises nothing narrower than Exception, and where Rust panics not even that.
        if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
            raise
        raise UserError(f"{what}: {error}.") from None


# Files.


def dialect_file(path: Path) -> Path:
    """Where the dialect of the tokenizer in `path` is kept, if it has one: tokenizer.dialect.json, for example."""
    return path.with_suffix(".dialect.json")


def save_tokenizer(codec: Codec, path: str | os.PathLike[str]) -> None:
    """Write a tokenizer.json, its dialect beside it. Another process sees an old file or a new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if codec.dialect is not None:
        write_atomically(
            dialect_file(path), json.dumps(dataclasses.asdict(codec.dialect), indent=2, ensure_ascii=False) + "\n"
        )
    write_atomically(path, codec.tokenizer.to_str(pretty=True))


def load_tokenizer(path: str | os.PathLike[str]) -> Codec:
    """Read a tokenizer.json and its dialect. Raises UserError naming a file that is missing or damaged."""
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: the tokenizer cannot be read ({error.strerror}).") from None
    with refusals(f"{path}: this is not a tokenizer.json"):
        tokenizer = Tokenizer.from_buffer(data)
    # A file may ask for these, which `transformers` does only when its caller does.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    codec = Codec(tokenizer, _load_dialect(dialect_file(path)))
    if codec.get_vocab_size() > MOST_TOKENS:
        raise UserError(f"{path}: a token has the id {codec.get_vocab_size() - 1}; ids below {MOST_TOKENS} are read.")
    return codec


def _load_dialect(path: Path) -> ChatFormat | None:
    if not path.exists():
        return None
    try:
        fields = json.loads(path.read_bytes())
        return ChatFormat(**{**fields, "stops": tuple(fields["stops"])})
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: this is not the dialect of a tokenizer ({error}).") from None
