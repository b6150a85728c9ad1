"""The same text gives the same tokens and continuations here, in transformers and in llama.cpp.

llama.cpp is the server of the package xllamacpp, on a local port.
"""

import contextlib
import json
import string
import urllib.request
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import random_params, small_config
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as HFTokenizer

from rustgpt_jax.config.schema import TokenizerConfig
from rustgpt_jax.errors import UserError
from rustgpt_jax.inference.generate import generate
from rustgpt_jax.inference.sampling import Greedy
from rustgpt_jax.inference.text_generator import TextGenerator
from rustgpt_jax.interop.gguf import SPLITS, gguf_vocabulary, write_gguf
from rustgpt_jax.interop.hf_checkpoint import export_model, native_chat_format, save_hf_tokenizer
from rustgpt_jax.model.presets import FAMILIES
from rustgpt_jax.tokenizers import ChatFormat, Message, Tokenizer, encode_prompt, train_tokenizer
from rustgpt_jax.tokenizers.chat_template import apply_chat_template

pytest.importorskip("gguf")
xllamacpp = pytest.importorskip("xllamacpp")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.oracle, pytest.mark.usefixtures("quick_compilation")]

CORPUS = [
    "The cat sat on the mat, and the cat's 1000000 friends sat there too; they'll say it's 12:45.",
    "def foo(x):\n    return x + 1  # 4096\n\n\nprint(foo(12345))\n",
    "Ein Bär und naïve cafés. 漢字かな交じり文 — “quoted” …",
] * 3
TEXTS = [
    "The cat sat",
    "x = 1000000\n\n\nfoo()",
    " two  blanks,   three\t\ttabs \n \n end ",
    "We'LL see: it'S 3.14159 m² Ⅻ ½ ٣٤٥",
    "naïve café — 漢字 🙂‍↔️ e\u0301 \u00a0 \u3000x\u2028y\r\n\r\nz",
    "_a__b--c==d!!e?! zzz",
    "",
]
SPECIAL = ("<s>", "</s>", "<|user|>")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|user|>' + m.role + '\n' + m.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|user|>assistant\n' }}{% endif %}"
)


def special_tokens() -> list[AddedToken]:
    return [AddedToken(token, special=True, normalized=False) for token in SPECIAL]


def imported(backend: HFTokenizer, has_opening: bool) -> Tokenizer:
    """A tokenizer as one from elsewhere, whose texts begin with <s> where `has_opening` says so."""
    backend.add_special_tokens(special_tokens())
    if has_opening:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    return Tokenizer(backend, ChatFormat("</s>", ("</s>", "<|user|>"), TEMPLATE, named))


def byte_level(first: list[Any], use_regex: bool, ignore_merges: bool = False) -> HFTokenizer:
    backend = HFTokenizer(models.BPE(ignore_merges=ignore_merges))
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*first, last])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def with_unmerged_token(backend: HFTokenizer) -> HFTokenizer:
    """Return the tokenizer with a token that no merge builds."""
    written = json.loads(backend.to_str())
    written["model"]["vocab"]["zzz"] = len(written["model"]["vocab"])
    return HFTokenizer.from_str(json.dumps(written))


def split(pattern: str) -> list[Any]:
    return [pre_tokenizers.Split(Regex(pattern), "isolated")]


def sentencepiece(has_blank: bool) -> HFTokenizer:
    """BPE like SentencePiece's: every two tokens whose concatenation is a token are merged."""
    replace = normalizers.Replace(" ", "▁")
    drafted = HFTokenizer(models.BPE())
    drafted.normalizer = replace
    drafted.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    learned = [token for token, _ in sorted(drafted.get_vocab().items(), key=lambda item: item[1])]
    reserved = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {token: index for index, token in enumerate([*reserved, *learned])}
    merges = [
        (token[:cut], token[cut:])
        for token in learned
        for cut in range(len(token) - 1, 0, -1)
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    backend = HFTokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁")] * has_blank + [replace])
    strip = [decoders.Strip(" ", 1, 0)] * has_blank
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    backend.decoder = decoders.Sequence(parts)
    return backend


LLAMA3, QWEN2 = SPLITS
# How each is made, and the name of its pre-tokenizer in llama.cpp.
TOKENIZERS: dict[str, tuple[Callable[[], Tokenizer], str]] = {
    "trained here": (lambda: train_tokenizer(TokenizerConfig("bpe", 400), CORPUS), "gpt-2"),
    "gpt2": (lambda: imported(byte_level([], True), False), "gpt-2"),
    "digits": (lambda: imported(byte_level([pre_tokenizers.Digits(True)], True), True), "smollm"),
    "llama3": (lambda: imported(byte_level(split(LLAMA3), False, True), True), "llama-bpe"),
    "dbrx": (lambda: imported(with_unmerged_token(byte_level(split(LLAMA3), False)), False), "dbrx"),
    "qwen2": (lambda: imported(byte_level(split(QWEN2), False), False), "qwen2"),
    "llama2": (lambda: imported(sentencepiece(True), True), "default"),
    "gemma": (lambda: imported(sentencepiece(False), True), "default"),
}


@cache
def made(name: str) -> Tokenizer:
    return TOKENIZERS[name][0]()


class LlamaCpp:
    """A llama.cpp server with a model."""

    def __init__(self, file: Path) -> None:
        given = xllamacpp.CommonParams()
        given.model.path, given.n_ctx, given.n_gpu_layers, given.n_parallel = str(file), 64, 0, 1
        given.cpuparams.n_threads, given.verbosity, given.cache_ram_mib, given.port = 1, -1, 0, 0
        given.warmup = given.fit_params = False
        given.cache_type_k = given.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        self.server = xllamacpp.Server(given)

    def ask(self, path: str, **body: Any) -> Any:
        data = json.dumps(body).encode()
        request = urllib.request.Request(
            self.server.listening_address + path, data, {"Content-Type": "application/json"}
        )
        with contextlib.closing(urllib.request.urlopen(request)) as answer:
            return json.load(answer)

    def tokens(self, text: str, **how: Any) -> list[int]:
        return self.ask("/tokenize", content=text, add_special=True, parse_special=False, **how)["tokens"]


def model_of(tokenizer: Tokenizer) -> Any:
    # One size for all, so that one program serves them.
    assert tokenizer.get_vocab_size() <= 480
    knobs = FAMILIES["llama2"] | {"vocab_size": 480, "d_model": 64, "attention.n_heads": 2, "d_ff": 64}
    knobs |= {"context_length": 64, "dtype": "float32", "attention.n_kv_heads": 2}
    return small_config(**{f"model.{knob}": value for knob, value in knobs.items()}).model


@pytest.fixture(scope="module", params=TOKENIZERS)
def everywhere(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A model with a tokenizer: here, as a folder for transformers, and in llama.cpp."""
    tokenizer, folder = made(request.param), tmp_path_factory.mktemp("model")
    model = model_of(tokenizer)
    params = random_params(model)
    export_model(params, model, folder / "hf", finish=lambda hidden: save_hf_tokenizer(tokenizer, hidden, 64, False))
    write_gguf(params, model, folder / "model.gguf", tokenizer=tokenizer, is_dialogue=True)
    yield request.param, TextGenerator(params, model, tokenizer, False), folder / "hf", LlamaCpp(folder / "model.gguf")


def random_texts() -> list[str]:
    """Texts of characters of many kinds, none of them a special token."""
    rng = np.random.default_rng(0)
    kinds = [string.ascii_letters, string.digits, " \n\t\r", string.punctuation, "äß漢字\u0301🙂½٣Ⅻ\u00a0\u2009"]
    return ["".join(rng.choice(list(kinds[rng.integers(5)])) for _ in range(rng.integers(1, 40))) for _ in range(30)]


def test_same_tokens_in_transformers_and_llama_cpp(everywhere: Any) -> None:
    name, writer, folder, llama = everywhere
    assert gguf_vocabulary(writer.tokenizer).pre == TOKENIZERS[name][1]
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in (*TEXTS[:-1], *random_texts()):
        expected = encode_prompt(writer.tokenizer, [Message("text", text)])
        assert theirs(text)["input_ids"] == expected, text
        assert llama.tokens(text) == expected, text


@pytest.mark.parametrize("text", ["x = 10"])
def test_same_continuations_in_transformers_and_llama_cpp(text: str, everywhere: Any) -> None:
    _, writer, folder, llama = everywhere
    prompt = writer.encode_prompt(text)
    drawn = continued(writer, prompt)
    theirs, text_there = continued_by_transformers(folder, text)
    assert without_stop(theirs, writer) == [*prompt, *drawn]
    answer = llama.ask("/completion", prompt=text, n_predict=12, temperature=0, return_tokens=True)
    assert without_stop(answer["tokens"], writer) == drawn
    ours = text + writer.decode(prompt, drawn)
    assert ours == text_there
    if "\N{REPLACEMENT CHARACTER}" not in ours:
        assert text + answer["content"] == ours


def continued(writer: TextGenerator, prompt: list[int]) -> list[int]:
    return generate(
        writer.params,
        [prompt],
        writer.model,
        samplers=(Greedy(),),
        key=jax.random.key(0),
        max_tokens=12,
        stop_ids=writer.stop_ids,
    )[0]


def without_stop(ids: list[int], writer: TextGenerator) -> list[int]:
    return ids[:-1] if ids[-1] in writer.stop_ids else ids


def continued_by_transformers(folder: Path, text: str) -> tuple[list[int], str]:
    """The tokens of a text and its greedy continuation, and their text."""
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    network = transformers.AutoModelForCausalLM.from_pretrained(folder)
    inputs = theirs(text, return_tensors="pt", return_token_type_ids=False)
    ids = network.generate(**inputs, max_new_tokens=12, do_sample=False)[0].tolist()
    return ids, theirs.decode(ids, skip_special_tokens=True)


def test_same_dialogue_prompts_in_llama_cpp(everywhere: Any) -> None:
    _, writer, _, llama = everywhere
    chat_format = writer.tokenizer.chat_format or native_chat_format(is_dialogue=True)
    turns = [Message("user", "Why?"), Message("assistant", "So."), Message("user", "Oh?")]
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    expected = apply_chat_template(
        chat_format, turns, add_generation_prompt=True, special_tokens=writer.tokenizer.special_tokens
    )
    asked = llama.ask("/apply-template", messages=messages)["prompt"]
    ids = llama.ask("/tokenize", content=asked, add_special=True, parse_special=True)["tokens"]
    if gguf_vocabulary(writer.tokenizer).adds_bos:
        assert ids == encode_prompt(writer.tokenizer, turns)
    else:
        assert asked == expected


@pytest.mark.parametrize("kind", ["word", "char", "byte"])
def test_same_tokens_and_continuations_of_other_tokenizers_in_transformers(kind: str, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TokenizerConfig(kind, None if kind != "byte" else 260), CORPUS)
    with pytest.raises(UserError, match="llama.cpp"):
        gguf_vocabulary(tokenizer)
    model = model_of(tokenizer)
    writer = TextGenerator(random_params(model), model, tokenizer, False)
    export_model(
        writer.params, model, tmp_path / "hf", finish=lambda hidden: save_hf_tokenizer(tokenizer, hidden, 64, False)
    )
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in (*TEXTS[:-1], *random_texts()):
        assert theirs(text)["input_ids"] == writer.encode_prompt(text)
    for text in ("The cat",):
        prompt = writer.encode_prompt(text)
        drawn = continued(writer, prompt)
        assert without_stop(continued_by_transformers(tmp_path / "hf", text)[0], writer) == [*prompt, *drawn]
