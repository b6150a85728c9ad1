"""Tokenizers with random edits: texts to tokens and back, documents and prompts, or a sentence."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import small_config
from fuzzing import Sandbox, corrupt_bytes, edit_tree, max_cases, run_or_refuse, write
from fuzzing import sandbox as sandbox
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as HFTokenizer

from rustgpt_jax.data.preprocess import fill_vocab_size
from rustgpt_jax.interop.hf_checkpoint import load_hf_tokenizer, save_hf_tokenizer, special_token_ids
from rustgpt_jax.tokenizers import (
    TOKENIZERS,
    Document,
    Message,
    Tokenizer,
    decode,
    encode,
    encode_document,
    encode_prompt,
    load_tokenizer,
    plain_document,
    save_tokenizer,
)

TEXTS = ("The rain fell, “naïve”\n\n日本 \x00 <|endoftext|> </s>", "", " a  b\r\n", "👩‍👩‍👧 e\u0301")
LINES = [f"The rain fell on day {index}." for index in range(9)]
DIALOGUE = Document("chat", (Message("user", "Why?"), Message("assistant", "So."), Message("user", "Oh?")))
SPECIAL = ("<unk>", "<s>", "</s>", "[CLS]", "[SEP]")
TEMPLATE = "{% for message in messages %}{{ '<s>' + message['role'] + ': ' + message['content'] }}{% endfor %}"


def bytes_with_template() -> HFTokenizer:
    """As GPT-2 and Llama 3 have them: bytes, a token that opens every text."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIAL, *characters, "Th", "The"]
    merges = [("T", "h"), ("Th", "e")]
    backend = HFTokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.enable_truncation(6, stride=2)
    backend.enable_padding(pad_id=1, pad_token="<s>", pad_to_multiple_of=8)
    return backend


def llama_2() -> HFTokenizer:
    """As Llama 2 has it: ▁ for blanks, unknown characters as bytes."""
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = HFTokenizer(models.BPE(vocabulary, [("▁", "a")], byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def unigram() -> HFTokenizer:
    """As Gemma and T5 have them: pieces with scores."""
    scores = dict.fromkeys(SPECIAL, 0.0) | {"▁": -2.0, "he": -1.0} | dict.fromkeys("Therainfo.", -3.0)
    backend = HFTokenizer(models.Unigram(list(scores.items()), unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return backend


def bert() -> HFTokenizer:
    """As BERT has it: pieces of words."""
    tokens = [*SPECIAL, "[UNK]", "the", "rain", "##y", *"abcdefgh", *(f"##{letter}" for letter in "abcdefgh")]
    backend = HFTokenizer(models.WordPiece({token: index for index, token in enumerate(tokens)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 4), ("[CLS]", 3))
    backend.decoder = decoders.WordPiece()
    return backend


def with_special_tokens(backend: HFTokenizer) -> HFTokenizer:
    """The same tokenizer with its special tokens marked as such."""
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return backend


OWN = {name: make(LINES, 300).to_str() for name, make in TOKENIZERS.items()}
FOREIGN = {
    make.__name__: with_special_tokens(make()).to_str() for make in (bytes_with_template, llama_2, unigram, bert)
}
# What stands beside the tokenizer.json of another model.
BESIDE: dict[str, Any] = {
    "tokenizer_config.json": {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": TEMPLATE},
    "special_tokens_map.json": {"eos_token": "</s>", "additional_special_tokens": ["<s>"]},
    "generation_config.json": {"eos_token_id": [2, 1]},
    "config.json": {"eos_token_id": 2},
}


def use(tokenizer: Tokenizer, folder: Path) -> None:
    """All that a run does with a tokenizer."""
    fill_vocab_size(small_config(**{"model.vocab_size": None}), tokenizer)
    for text in TEXTS:
        ids = encode(tokenizer, text)
        assert all(0 <= index < tokenizer.get_vocab_size() for index in ids)
        assert isinstance(decode(tokenizer, ids), str)
    decode(tokenizer, [0, tokenizer.get_vocab_size() - 1, tokenizer.get_vocab_size() + 7])
    assert all(isinstance(index, int) for index in (tokenizer.end_id, *tokenizer.stop_ids))
    for document in (plain_document("text", TEXTS[0]), DIALOGUE):
        for loss_mask in ("all", "assistant"):
            ids, weights = encode_document(tokenizer, document, loss_mask)
            assert len(ids) == len(weights)
    for messages in ([Message("text", "The")], DIALOGUE.messages):
        encode_prompt(tokenizer, messages)
    save_tokenizer(tokenizer, folder / "again" / "tokenizer.json")
    load_tokenizer(folder / "again" / "tokenizer.json")


def edits(written: str) -> Any:
    """A tokenizer.json with edits of its values or of its bytes."""
    tree = json.loads(written)
    return edit_tree(tree).map(lambda value: json.dumps(value).encode()) | corrupt_bytes(written.encode())


@pytest.mark.parametrize("name", [*OWN, *FOREIGN])
def test_unedited_tokenizers(name: str, sandbox: Sandbox) -> None:
    with sandbox.case() as folder:
        write(folder / "tokenizer.json", (OWN | FOREIGN)[name].encode())
        for file, values in BESIDE.items():
            write(folder / file, json.dumps(values).encode())
        if name in OWN:
            use(load_tokenizer(folder / "tokenizer.json"), folder)
        else:
            use(load_hf_tokenizer(folder), folder)


@max_cases(300)
@given(st.sampled_from(sorted(OWN)).flatmap(lambda name: edits(OWN[name])) | st.none())
def test_edited_tokenizers_of_runs(sandbox: Sandbox, data: bytes | None) -> None:
    with sandbox.case() as folder:
        write(folder / "tokenizer.json", data)
        run_or_refuse(lambda: use(load_tokenizer(folder / "tokenizer.json"), folder))


@max_cases(300)
@given(st.sampled_from(sorted(FOREIGN)).flatmap(lambda name: edits(FOREIGN[name])))
def test_edited_imported_tokenizers(sandbox: Sandbox, data: bytes) -> None:
    with sandbox.case() as folder:
        write(folder / "tokenizer.json", data)
        for file, values in BESIDE.items():
            write(folder / file, json.dumps(values).encode())
        run_or_refuse(lambda: use(load_hf_tokenizer(folder), folder))


templates = st.sampled_from(
    (
        *("{% for", "{{", "{{ 1/0 }}", "{{ messages[9].x.y }}", "{% for i in range(9**9) %}{% endfor %}", "\ud800"),
        *("{{ ''.__class__.__mro__ }}", "{{ raise_exception('no\nno') }}", "{{ dict(a=dict) }}", "{% generation %}"),
        *("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ strftime_now(1) }}", "{{ messages.append(1) }}", "\0"),
    )
)
settings_with = st.sampled_from(("chat_template", "eos_token", "bos_token"))
beside = (
    edit_tree(BESIDE).filter(lambda tree: isinstance(tree, dict))
    | st.builds(lambda text: BESIDE | {"chat_template.jinja": text}, templates)
    | st.builds(lambda text: BESIDE | {"chat_template.jinja": text}, corrupt_bytes(TEMPLATE.encode()))
    | st.builds(
        lambda key, text: BESIDE | {"tokenizer_config.json": {"eos_token": "</s>", key: text}}, settings_with, templates
    )
    | st.builds(lambda name, data: BESIDE | {name: data}, st.sampled_from(sorted(BESIDE)), st.none())
    | st.builds(
        lambda name, data: BESIDE | {name: data},
        st.sampled_from(sorted(BESIDE)),
        corrupt_bytes(json.dumps(BESIDE).encode()),
    )
)


def as_bytes(value: Any) -> bytes | None:
    """A file beside a tokenizer: a template is a text, all else JSON; None for a folder."""
    if isinstance(value, bytes | None):
        return value
    return value.encode("utf-8", "surrogatepass") if isinstance(value, str) else json.dumps(value).encode()


@max_cases(300)
@given(beside)
def test_edited_files_beside_a_tokenizer(sandbox: Sandbox, files: dict[str, Any]) -> None:
    with sandbox.case() as folder:
        write(folder / "tokenizer.json", FOREIGN["llama_2"].encode())
        for name, value in files.items():
            if name in (*BESIDE, "chat_template.jinja"):
                write(folder / name, as_bytes(value))

        def read_and_write() -> None:
            tokenizer = load_hf_tokenizer(folder)
            use(tokenizer, folder)
            special_token_ids(tokenizer)
            (folder / "export").mkdir()
            save_hf_tokenizer(tokenizer, folder / "export", 64, is_dialogue=True)

        run_or_refuse(read_and_write)
