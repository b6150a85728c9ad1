"""Checks of samplers, tokenizers, corpora and launchers."""

import inspect
import itertools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from rustgpt_jax.config.schema import DataConfig, TokenizerConfig, get_field
from rustgpt_jax.conformance.fixtures import Broken, quick_jit, require_same_bits
from rustgpt_jax.conformance.targets import Subject
from rustgpt_jax.data.datasets import load_documents
from rustgpt_jax.tokenizers import (
    SPECIAL_TOKENS,
    decode,
    encode,
    load_tokenizer,
    save_tokenizer,
    special_token_id,
    train_tokenizer,
)

LOGIT = ("row", "token")
# Tokenizers that say that they lose some of the spacing: their own texts must come back as they are.
LOSSY = ("word",)
TEXTS = (
    "It was the best of times, it was the worst of times.",
    "two  spaces,\ttabs\n\nand\r\nlines\n",
    " leading and trailing ",
    "naïve café – 'quotes' “more” … §½",
    "日本語 Ελληνικά العربية हिन्दी",
    "👩‍👩‍👧 e\u0301 \u200b\ufeff\u00a0\u2028",
    "\x00\x07\x7f",
    f"text that says {SPECIAL_TOKENS[0]} is text",
    "￭",
    "",
)
VOCAB_SIZE = 300
MOST_DOCUMENTS = 40


def sampler_distribution(subject: Subject) -> str:
    """Logits stay logits: their shape and type, some token left in each row, and none that was ruled out."""
    ratios = []
    for number in _numbers(subject.name):
        logits_BV, seen_BV = _logits(0)
        found = np.asarray(_compiled_sampler(subject)(np.float32(number), logits_BV, seen_BV))
        where = f"the number {number}"
        if (found.shape, found.dtype) != (logits_BV.shape, logits_BV.dtype):
            raise Broken("logits come back in another shape or type", where, f"{found.dtype}{list(found.shape)}")
        wrong = np.argwhere(np.isnan(found) | (found == np.inf))
        if len(wrong):
            row, token = wrong[0]
            raise Broken("a logit is no number", f"row {row}, token {token}, {where}", str(found[row, token]))
        invented = np.argwhere((logits_BV == -np.inf) & (found > -np.inf))
        if len(invented):
            row, token = invented[0]
            what = "a token comes back that was ruled out"
            raise Broken(what, f"row {row}, token {token}, {where}", f"-inf became {found[row, token]:.3g}")
        empty = np.flatnonzero((found == -np.inf).all(axis=1))
        if len(empty):
            raise Broken("no token is left", f"row {empty[0]}, {where}", "all logits are -inf")
        ratios.append(np.mean(np.isfinite(found)) / np.mean(np.isfinite(logits_BV)))
    return f"{min(ratios):.0%} to {max(ratios):.0%} of the tokens are left"


def sampler_rows(subject: Subject) -> str:
    """What becomes of a row does not depend on the other rows, nor on its place among them."""
    number = np.float32(_numbers(subject.name)[0])
    logits_BV, seen_BV = _logits(1)
    compiled = _compiled_sampler(subject)
    found = np.asarray(compiled(number, logits_BV, seen_BV))
    order = np.random.default_rng(2).permutation(len(logits_BV))
    moved = np.asarray(compiled(number, logits_BV[order], seen_BV[order]))
    require_same_bits(moved, found[order], "a row changes with its place", LOGIT)
    others, _ = _logits(3)
    others[0] = logits_BV[0]
    alone = np.asarray(compiled(number, others, seen_BV))
    require_same_bits(alone[:1], found[:1], "a row changes with the other rows", LOGIT)
    return f"{len(order)} rows, bit-equal"


def _compiled_sampler(subject: Subject) -> Any:
    make = subject.part[1] if isinstance(subject.part, tuple) else subject.part
    return quick_jit(lambda number, logits_BV, seen_BV: make(number)(logits_BV, seen_BV))


def _numbers(name: str) -> tuple[float, ...]:
    """Numbers in the range of the sampler's knob."""
    try:
        limits = get_field(f"sampling.{name}").metadata
    except KeyError:
        return (1.0,)
    return (0.3, 0.9, 1.0) if limits["high"] == 1.0 else (1.0, 2.5, 7.0)


def _logits(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    logits_BV = 4 * rng.standard_normal((6, 50)).astype(np.float32)
    logits_BV[:, rng.choice(50, 10, replace=False)] = -np.inf
    logits_BV[1, 3:] = -np.inf
    logits_BV[1, :3] = 2.0
    return logits_BV, rng.random((6, 50)) < 0.3


def tokenizer_round_trip(subject: Subject) -> str:
    """Every text comes back from its tokens, and no text has special tokens in it."""
    codec = train_tokenizer(TokenizerConfig(subject.name, VOCAB_SIZE), TEXTS)
    special = {special_token_id(codec, token) for token in SPECIAL_TOKENS}
    kept = 0
    for number, text in enumerate(TEXTS):
        ids = encode(codec, text)
        if special & set(ids):
            raise Broken(
                "a text has a special token in it", f"text {number}, {text!r}", str(sorted(special & set(ids)))
            )
        largest = max(ids, default=0)
        if largest >= codec.get_vocab_size():
            raise Broken("a token is outside the vocabulary", f"text {number}, {text!r}", str(largest))
        back = decode(codec, ids)
        again = encode(codec, back)
        if back != text and (subject.name not in LOSSY or again != ids):
            raise Broken("a text does not come back from its tokens", f"text {number}", f"{text!r} became {back!r}")
        kept += back == text
    return f"{kept} of {len(TEXTS)} texts come back"


def tokenizer_same(subject: Subject) -> str:
    """The same texts give the same tokenizer, and a saved one is the same when it is loaded."""
    config = TokenizerConfig(subject.name, VOCAB_SIZE)
    first, second = train_tokenizer(config, TEXTS), train_tokenizer(config, TEXTS)
    if first.serialized != second.serialized:
        place = next(i for i, (a, b) in enumerate(itertools.zip_longest(first.serialized, second.serialized)) if a != b)
        shown = f"{first.serialized[place : place + 30]!r} and {second.serialized[place : place + 30]!r}"
        raise Broken("the same texts give another tokenizer", f"character {place} of its JSON", shown)
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(first, Path(folder) / "tokenizer.json")
        loaded = load_tokenizer(Path(folder) / "tokenizer.json")
    for number, text in enumerate(TEXTS):
        if encode(loaded, text) != encode(first, text):
            raise Broken("a loaded tokenizer is another than the saved one", f"text {number}", repr(text))
    return f"{first.get_vocab_size()} tokens"


def corpus_documents(subject: Subject) -> str:
    """The same documents come every time, each with a text, and with a name that says where it came from."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("a.txt", "b.txt"):
            (Path(folder) / name).write_text(f"The text of {name}.\n", encoding="utf-8")
        config = DataConfig(subject.name, (f"{folder}/*.txt",), MOST_DOCUMENTS, "document", 0.1, "all", None)
        first, second = list(load_documents(config)), list(load_documents(config))
    if not first:
        raise Broken("there are no documents", subject.name, "0")
    for number, (one, other) in enumerate(itertools.zip_longest(first, second)):
        if one != other:
            raise Broken(
                "another document comes the second time", f"document {number}", f"{one!r:.60} and {other!r:.60}"
            )
        if not one.name:
            raise Broken("a document has no name", f"document {number}", repr(one.text[:60]))
    return f"{len(first)} documents twice"


def launcher_interface(subject: Subject) -> str:
    """It is a function of (launch, chunks), and says in a docstring where trials run."""
    names = list(inspect.signature(subject.part).parameters)
    if names != ["launch", "chunks"]:
        raise Broken("a launcher is a function of (launch, chunks)", subject.name, f"({', '.join(names)})")
    if not inspect.getdoc(subject.part):
        raise Broken("a launcher has a docstring that says where trials run", subject.name, "it has none")
    return "(launch, chunks)"
