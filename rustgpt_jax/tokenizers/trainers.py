"""The kinds of tokenizers that can be trained: word, char, byte and BPE."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from rustgpt_jax.config.schema import TokenizerConfig
from rustgpt_jax.errors import UserError
from rustgpt_jax.registry import lookup
from rustgpt_jax.tokenizers.tokenizer import SPECIAL_TOKENS, UNKNOWN, Codec

# What config.tokenizer.name says in a run whose tokenizer came with its model.
IMPORTED = "imported"


def train_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> Codec:
    """A tokenizer of the kind that the config names, learned from `texts`; the same texts give the same tokenizer.

    Raises UserError for an unknown kind and for a vocabulary too small for the tokens that the kind must have.
    """
    if config.name == IMPORTED:
        raise UserError(
            "config.tokenizer.name='imported': this tokenizer stands in the folder of a run that `launch.py import` "
            "made; it is not trained. Choose another for a new run."
        )
    return Codec(lookup(TOKENIZERS, config.name, "config.tokenizer.name")(texts, config.vocab_size))


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
    return tokenizer


TOKENIZERS: dict[str, Callable[[Iterable[str], int | None], Tokenizer]] = {
    "word": _train_word,
    "char": _train_char,
    "byte": _train_byte,
    "bpe": _train_bpe,
}
