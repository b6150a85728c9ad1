"""Imported tokenizers: documents, dialogues, chat templates, and their files."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as HFTokenizer

from rustgpt_jax.config.schema import DataConfig, TokenizerConfig
from rustgpt_jax.data.datasets import load_documents
from rustgpt_jax.data.pipeline import SequenceOffsets, SequenceReader
from rustgpt_jax.data.token_store import build_store
from rustgpt_jax.errors import UserError
from rustgpt_jax.inference.text_generator import TextGenerator, _stable_prefix
from rustgpt_jax.interop.architectures import architecture_of
from rustgpt_jax.interop.gguf import SPLITS, gguf_vocabulary
from rustgpt_jax.interop.hf_checkpoint import load_hf_tokenizer, save_hf_tokenizer
from rustgpt_jax.tokenizers import (
    ChatFormat,
    Document,
    Message,
    Tokenizer,
    chat_template,
    decode,
    decode_continuation,
    encode,
    encode_document,
    encode_documents,
    encode_prompt,
    load_tokenizer,
    plain_document,
    save_tokenizer,
    train_tokenizer,
)
from rustgpt_jax.tokenizers.chat_template import apply_chat_template, find_turn_end_token

TEMPLATE = """\
{%- if messages[0].role == 'system' %}{{ '<s>[' + messages[0].content + ']' }}{% endif %}
{% for message in messages %}
    {%- if message.role == 'user' %}
<u>{{ message.content }}
    {%- elif message.role == 'assistant' %}
<a>{% generation %}{{ message.content | trim }}</s>{% endgeneration %}
    {%- elif message.role != 'system' %}
        {{- raise_exception('no ' + message.role) }}
    {%- endif %}
{% endfor %}
{% if add_generation_prompt %}
<a>{% endif %}"""
SPECIAL = ("<s>", "</s>", "<u>", "<a>")
MESSAGES = (
    Message("system", "Be brief."),
    Message("user", "Why?"),
    Message("assistant", "So."),
    Message("user", "Oh?"),
)


def foreign_tokenizer(has_opening: bool = True) -> HFTokenizer:
    """Bytes as tokens, after four special ones; texts open with <s> where `has_opening` says so."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *characters])}
    backend = HFTokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    if has_opening:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return backend


def foreign(has_opening: bool = True, template: str | None = TEMPLATE) -> Tokenizer:
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    return Tokenizer(foreign_tokenizer(has_opening), ChatFormat("</s>", ("</s>", "<u>"), template, named))


def shown(tokenizer: Tokenizer, ids: Any) -> str:
    """The text of tokens with the special ones."""
    return tokenizer.backend.decode(list(ids), skip_special_tokens=False)


def llama_2() -> Tokenizer:
    """A tokenizer that, like Llama 2's, writes ▁ before a text and for its blanks, and unknown characters as bytes."""
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = HFTokenizer(models.BPE(vocabulary, [("▁", "a")], byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return Tokenizer(backend, ChatFormat("</s>", ("</s>",), TEMPLATE, {}))


# Documents.


@pytest.mark.parametrize(("has_opening", "expected"), [(True, "<s>a rain</s>"), (False, "</s>a rain")])
def test_documents_have_the_bos_and_end_tokens_of_their_model(has_opening: bool, expected: str) -> None:
    tokenizer = foreign(has_opening)
    ids, weights = encode_document(tokenizer, plain_document("a", "a rain"), "all")
    assert shown(tokenizer, ids) == expected
    # Nothing comes before an opening that could predict it.
    assert weights.tolist() == [not has_opening] + [True] * (len(ids) - 1)
    assert (
        shown(tokenizer, encode_prompt(tokenizer, [Message("text", "a rain")]))
        == ("<s>" if has_opening else "") + "a rain"
    )
    assert tokenizer.stop_ids == [1, 2] and tokenizer.end_id == 1


def test_long_texts_of_imported_tokenizers_are_not_split() -> None:
    tokenizer, text = llama_2(), "a bab " * 7000
    ids, _ = encode_document(tokenizer, plain_document("", text), "all")
    assert shown(tokenizer, [4 + 256]) == "▁"
    assert ids.tolist() == [0, *tokenizer.backend.encode(text, add_special_tokens=False).ids, 1]


def test_text_never_encodes_to_special_tokens() -> None:
    tokenizer = foreign()
    assert not {0, 1, 2, 3} & set(encode(tokenizer, "</s> and <u>"))
    assert decode(tokenizer, encode(tokenizer, "</s> and <u>")) == "</s> and <u>"
    with pytest.raises(UserError, match="contains <u>, which is a special token"):
        encode_prompt(tokenizer, [Message("user", "now <u>")])


@pytest.mark.parametrize(
    ("single", "document", "prompt", "first_learned"),
    [
        ("<s> $A", "<s>a rain</s>", "<s>a rain", 1),
        ("<s> $A </s>", "<s>a rain</s>", "<s>a rain", 1),
        ("$A </s>", "a rain</s>", "a rain", 1),
        ("<s> <u> $A", "<s><u>a rain</s>", "<s><u>a rain", 2),
        ("<s> $A <a>", "<s>a rain<a></s>", "<s>a rain", 1),
        ("</s> $A", "</s>a rain", "</s>a rain", 0),
        ("$A", "</s>a rain", "a rain", 0),
    ],
)
def test_post_processors_add_affixes_to_documents_and_prefixes_to_prompts(
    single: str, document: str, prompt: str, first_learned: int
) -> None:
    tokenizer, special = foreign(False), [(token, index) for index, token in enumerate(SPECIAL)]
    tokenizer.backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    ids, weights = encode_document(tokenizer, plain_document("a", "a rain"), "all")
    assert shown(tokenizer, ids) == document
    assert shown(tokenizer, encode_prompt(tokenizer, [Message("text", "a rain")])) == prompt
    assert weights.tolist() == [place >= first_learned for place in range(len(ids))]


@pytest.mark.parametrize("processor", ["bert", "roberta", "sequence"])
def test_prefix_and_suffix_of_other_post_processors(processor: str) -> None:
    tokenizer = foreign(False)
    template = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer.backend.post_processor = {
        "bert": processors.BertProcessing(("</s>", 1), ("<s>", 0)),
        "roberta": processors.RobertaProcessing(("</s>", 1), ("<s>", 0)),
        "sequence": processors.Sequence([processors.ByteLevel(), template]),
    }[processor]
    assert tokenizer.prefix_and_suffix_ids == ([0], [1])


DOCUMENTS = {
    "texts": [{"text": "a rain"}, {"text": "Why?"}],
    "dialogues": [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "b"}]} for text in "xy"
    ],
}


@pytest.mark.parametrize("loss_mask", ["all", "assistant"])
@pytest.mark.parametrize("has_opening", [True, False])
@pytest.mark.parametrize("kind", DOCUMENTS)
def test_weights_of_documents_in_a_circular_stream(
    kind: str, has_opening: bool, loss_mask: str, tmp_path: Path
) -> None:
    tokenizer, file = foreign(has_opening), tmp_path / "lines.jsonl"
    file.write_text("\n".join(map(json.dumps, DOCUMENTS[kind])))
    config = DataConfig("files", (str(file),), None, "document", 0.0, loss_mask, None)
    stream = build_store(config, tokenizer, tmp_path / "stores").split("train")
    parts = [encode_document(tokenizer, document, loss_mask) for document in load_documents(config)]
    allowed = {tuple(ids.tolist()): weights.tolist() for ids, weights in parts}
    length = sum(map(len, allowed))
    assert stream.n_tokens == length + 1 and stream.n_targets == sum(map(sum, allowed.values()))
    # Once around, from each place of the circle.
    windows, found = SequenceReader(stream, length), set()
    for start in range(length):
        batch = windows.read(SequenceOffsets(np.array([start]), np.array([length])))
        begins = np.flatnonzero(batch.positions_BT[0] == 0).tolist()
        for begin, end in itertools.pairwise(begins[1:]):
            document = tuple(batch.tokens_BT[0, begin:end].tolist())
            assert batch.weights_BT[0, begin - 1 : end - 1].astype(bool).tolist() == allowed[document]
            found.add(document)
    assert found == set(allowed)


def test_an_empty_prompt_has_a_token() -> None:
    assert encode_prompt(foreign(has_opening=False), [Message("text", "")]) == [1]


# Dialogues.


def test_dialogues_are_rendered_by_the_chat_template() -> None:
    tokenizer = foreign()
    assert shown(tokenizer, encode_prompt(tokenizer, MESSAGES)) == "<s>[Be brief.]<u>Why?<a>So.</s><u>Oh?<a>"
    ids, weights = encode_document(tokenizer, Document("d", MESSAGES[:3]), "assistant")
    assert shown(tokenizer, ids) == "<s>[Be brief.]<u>Why?<a>So.</s>"
    assert shown(tokenizer, ids[weights]) == "So.</s>"
    assert encode_document(tokenizer, Document("d", MESSAGES[:3]), "all")[1].all()


def test_rejected_dialogues_raise_user_errors() -> None:
    with pytest.raises(UserError, match="rejects this dialogue: no tool"):
        encode_prompt(foreign(), [Message("tool", "x")])
    with pytest.raises(UserError, match="has no chat template"):
        encode_prompt(foreign(template=None), [Message("user", "x")])


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ messages.__class__.__mro__ }}", "attribute '__class__' of 'list' object is unsafe"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ 1 + 'x' }}", "unsupported operand"),
        ("{% for message in tools %}{% endfor %}", "'NoneType' object is not iterable"),
        ("{{ messages[0] | tojson(indent=[]) }}", "can't multiply sequence"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{% set ns = namespace(_x=1) %}", "'_x' is not a valid name"),
        ("{{ dict.update(messages[0], role='x') }}", "has no attribute 'update'"),
        ("{% if %}", "Expected an expression"),
    ],
)
def test_failing_templates_raise_user_errors(template: str, reason: str) -> None:
    with pytest.raises(UserError, match=f"chat template rejects this dialogue: .*{re.escape(reason)}"):
        encode_prompt(foreign(template=template), [Message("user", "x")])


def test_keyboard_interrupts_pass_through_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(json, "dumps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encode_prompt(foreign(template="{{ messages | tojson }}"), [Message("user", "x")])


HOSTILE = {
    "a long loop": "{% for i in range(10**9) %}{% endfor %}",
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "doubling text": "{% set n = namespace(s='aa') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "doubling list": "{% set n = namespace(s=[1]) %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "a product": "{{ 'a' * 10**9 }}",
    "a power": "{{ 10**(10**10) }}",
    "a macro that calls itself twice": (
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}"
    ),
    "batches": "{{ messages | batch(10**9, 1) | list }}",
    "joins": "{{ range(99999) | join('a' * 10**5) }}",
    "indentation": "{{ ('x\\n' * 10**5) | indent(10**5, true) }}",
    "nested parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "a very long chain": "{{ " + "1" + "+1" * 50_000 + " }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_within_their_limits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_CPU_SECONDS", 0.3)
    with pytest.raises(UserError, match="chat template rejects this dialogue: ."):
        encode_prompt(foreign(template=HOSTILE[name]), [Message("user", "x")])
    # The next template is rendered as if nothing had been.
    assert shown(foreign(), encode_prompt(foreign(), MESSAGES[1:2])) == "<u>Why?<a>"


def test_interrupted_renderings_do_not_affect_later_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = foreign()
    encode_prompt(tokenizer, MESSAGES[1:2])
    process = chat_template._RENDERER._process
    assert process is not None and process.stdout is not None

    class Interrupted:
        def readline(self) -> bytes:
            raise KeyboardInterrupt

        def __getattr__(self, name: str) -> Any:
            return getattr(stdout, name)

    stdout = process.stdout
    monkeypatch.setattr(process, "stdout", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        encode_prompt(tokenizer, MESSAGES[1:2])
    assert process.returncode is not None
    assert shown(tokenizer, encode_prompt(tokenizer, (Message("user", "Oh?"),))) == "<u>Oh?<a>"


def test_templates_that_change_earlier_replies_are_refused() -> None:
    last_only = "{% for m in messages %}{{ m.content if loop.last or m.role == 'user' else '' }}{% endfor %}"
    dialogue = Document("d", (*MESSAGES[1:3], *MESSAGES[1:3]))
    with pytest.raises(UserError, match="config.data.loss_mask='all'"):
        encode_document(foreign(template=last_only), dialogue, "assistant")


NO_STOP = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
NEXT_ROLE = "{% for m in messages %}{{ ('<u>' if m.role == 'user' else '<a>') + m.content }}{% endfor %}"
ASKS = "{% if add_generation_prompt %}<a>{% endif %}"


@pytest.mark.parametrize("loss_mask", ["all", "assistant"])
def test_every_reply_has_a_stop_token_as_a_target(loss_mask: str) -> None:
    tokenizer, dialogue = (
        foreign(template=NEXT_ROLE + ASKS),
        Document("d", (*MESSAGES[1:], Message("assistant", "I see"))),
    )
    ids, weights = encode_document(tokenizer, dialogue, loss_mask)
    assert shown(tokenizer, ids) == "<u>Why?<a>So.<u>Oh?<a>I see</s>"
    assert shown(tokenizer, ids[weights]) == ("So.<u>I see</s>" if loss_mask == "assistant" else shown(tokenizer, ids))
    # A question is not ended, nor is an answer that the template ends.
    assert (
        shown(tokenizer, encode_document(tokenizer, Document("d", dialogue.messages[:3]), loss_mask)[0])
        == "<u>Why?<a>So.<u>Oh?"
    )
    ended = encode_document(foreign(), Document("d", dialogue.messages[:2]), loss_mask)[0]
    assert shown(tokenizer, ended) == "\n<u>Why?<a>So.</s>"[1:]


SPACED = (
    "{% for m in messages %}{{ ('<u>' if m.role == 'user' else '\n<a>') + m.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n<a>' }}{% endif %}"
)


@pytest.mark.parametrize("kind", ["plain", "prefix space", "llama_2", "lstrip", "rstrip"])
def test_replies_are_targets_with_every_treatment_of_spaces(kind: str) -> None:
    tokenizer, blank = foreign(template=SPACED), ""
    if kind == "prefix space":
        tokenizer.backend.pre_tokenizer, blank = pre_tokenizers.ByteLevel(add_prefix_space=True), " "
    elif kind == "llama_2":
        tokenizer, blank = Tokenizer(continued("llama_2").backend, tokenizer.chat_format), " "
        tokenizer.backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    elif kind != "plain":
        written = json.loads(tokenizer.backend.to_str())
        written["added_tokens"] = [token | {kind: True} for token in written["added_tokens"]]
        tokenizer = Tokenizer(HFTokenizer.from_str(json.dumps(written)), tokenizer.chat_format)
    messages = (*MESSAGES[1:], Message("assistant", "é漢 b"))
    ids, weights = encode_document(tokenizer, Document("d", messages), "assistant")
    assert shown(tokenizer, ids[weights]) == f"{blank}So.</s>{blank}é漢 b</s>"


def test_templates_without_a_stop_token_after_replies_are_refused() -> None:
    tokenizer = foreign(template=NO_STOP + "{% if add_generation_prompt %}assistant: {% endif %}")
    ids, weights = encode_document(tokenizer, Document("d", MESSAGES[1:3]), "assistant")
    assert shown(tokenizer, ids[weights]) == "So.\n</s>"
    dialogue = Document("d", (*MESSAGES[1:], Message("assistant", "I see")))
    with pytest.raises(UserError, match=r"none of the tokens that end a reply \(</s>, <u>\)"):
        encode_document(tokenizer, dialogue, "assistant")
    assert shown(tokenizer, encode_document(tokenizer, dialogue, "all")[0]).endswith("I see\n</s>")


@pytest.mark.parametrize(
    ("template", "found"),
    [
        (TEMPLATE, "</s>"),
        (NEXT_ROLE, "<u>"),
        (NO_STOP, None),
        ("{% for m in messages %}<s>{{ m.content }}<a>\n{% endfor %}", "<a>"),
        ("{% if messages | length > 2 %}{{ raise_exception('one exchange') }}{% endif %}", None),
        (None, None),
    ],
)
def test_the_turn_end_token_is_a_stop_token(template: str | None, found: str | None, tmp_path: Path) -> None:
    tokenizer = Tokenizer(foreign_tokenizer(), ChatFormat("</s>", ("</s>",), template, {"eos_token": "</s>"}))
    assert tokenizer.chat_format is not None
    assert find_turn_end_token(tokenizer.chat_format, tokenizer.special_tokens) == found
    save_hf_tokenizer(tokenizer, tmp_path, 64, is_dialogue=False)
    read = load_hf_tokenizer(tmp_path).chat_format
    assert read is not None and set(read.stop_tokens) == {"</s>", found or "</s>"}


# Continuations.


def unigram() -> Tokenizer:
    """A Unigram tokenizer with blanks as ▁, which its decoder leaves out before the first word."""
    split_text = [("<unk>", 0.0), ("▁", -2.0), ("▁a", -3.0), ("b", -3.0), ("a", -3.5), ("▁b", -4.0)]
    backend = HFTokenizer(models.Unigram(split_text, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return Tokenizer(backend, ChatFormat("<unk>", ("<unk>",), None, {}))


def continued(kind: str) -> Tokenizer:
    """Tokenizers of each kind, trained here or from elsewhere."""
    if kind == "foreign":
        return foreign()
    if kind == "llama_2":
        tokenizer = llama_2()
        parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.backend.decoder = decoders.Sequence(parts)
        return tokenizer
    if kind == "unigram":
        return unigram()
    return train_tokenizer(TokenizerConfig(kind, 300), ['a b "a bab," b-a aé漢. b'])


@pytest.mark.parametrize("kind", ["foreign", "llama_2", "unigram", "word", "char", "byte", "bpe"])
def test_decode_continuation_completes_the_text(kind: str) -> None:
    tokenizer = continued(kind)
    ids = encode_prompt(tokenizer, [Message("text", 'a b "bab," b-a')]) + encode(tokenizer, "aé漢. b")
    whole = decode(tokenizer, ids)
    assert " " in whole[1:-1]
    writer = TextGenerator(None, None, tokenizer, is_dialogue=False)
    for cut in range(1, len(ids)):
        prompt, drawn = ids[:cut], ids[cut:]
        before = decode(tokenizer, prompt)
        if whole.startswith(before):
            assert before + decode_continuation(tokenizer, prompt, drawn) == whole
        # What is shown as the tokens come is never taken back.
        for count in range(len(drawn)):
            assert writer.decode(prompt, drawn).startswith(_stable_prefix(writer, prompt, drawn[:count]))
    assert TextGenerator(None, None, tokenizer, is_dialogue=True).decode(ids[:3], ids[3:]) == decode(tokenizer, ids[3:])


# Files.


def test_saved_tokenizer_keeps_its_chat_format(tmp_path: Path) -> None:
    save_tokenizer(foreign(), tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded.chat_format == foreign().chat_format and loaded.serialized == foreign().serialized
    assert loaded.serialized != Tokenizer(foreign_tokenizer()).serialized
    (tmp_path / "tokenizer.chat_format.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer.chat_format.json: this is not the chat format"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_chat_format_survives_export_and_import(tmp_path: Path) -> None:
    save_hf_tokenizer(foreign(), tmp_path, 64, is_dialogue=False)
    assert load_hf_tokenizer(tmp_path).chat_format == foreign().chat_format
    assert json.loads((tmp_path / "generation_config.json").read_bytes())["eos_token_id"] == [1, 2]


@pytest.mark.parametrize("place", ["settings", "named", "file"])
def test_chat_templates_are_read_from_settings_or_their_own_file(place: str, tmp_path: Path) -> None:
    save_hf_tokenizer(foreign(template=None), tmp_path, 64, is_dialogue=False)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_bytes())
    settings["eos_token"] = {"content": "</s>", "lstrip": False}
    if place == "file":
        (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    else:
        listed = [{"name": "tools", "template": "x"}, {"name": "default", "template": TEMPLATE}]
        settings["chat_template"] = TEMPLATE if place == "settings" else listed
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_hf_tokenizer(tmp_path).chat_format == foreign().chat_format


def test_missing_tokenizers_and_end_tokens_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no tokenizer.json"):
        load_hf_tokenizer(tmp_path)
    save_tokenizer(Tokenizer(foreign_tokenizer()), tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="names the token that ends a text"):
        load_hf_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": 1}')
    assert load_hf_tokenizer(tmp_path).chat_format == ChatFormat("</s>", ("</s>",), None, {"eos_token": "</s>"})


TOKEN_LISTS = ("tokenizer_config.json", "special_tokens_map.json")
MODEL_FILES = ("config.json", "generation_config.json")


@pytest.mark.parametrize(
    ("names", "settings", "key"),
    [
        *(
            (MODEL_FILES, {"eos_token_id": ids}, "eos_token_id")
            for ids in (-1, 260, 2**40, 1.0, True, "1", [1, "1"], {})
        ),
        *((TOKEN_LISTS, {"eos_token": token}, "eos_token") for token in ("</S>", {"content": "</S>"}, {}, 5, ["</s>"])),
        *(
            (TOKEN_LISTS[:1], {"eos_token": "</s>", "chat_template": template}, "chat_template")
            for template in (["x"], 5, {"default": "x"}, [{"name": "default"}], [{"name": "default", "template": 5}])
        ),
    ],
)
def test_invalid_tokenizer_settings_are_refused_by_name(
    names: tuple[str, ...], settings: dict[str, Any], key: str, tmp_path: Path
) -> None:
    save_tokenizer(Tokenizer(foreign_tokenizer()), tmp_path / "tokenizer.json")
    for name in names:
        (tmp_path / name).write_text(json.dumps(settings))
        with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path / name))}: {key} must be"):
            load_hf_tokenizer(tmp_path)
        (tmp_path / name).unlink()


@pytest.mark.parametrize("name", MODEL_FILES)
def test_unknown_end_token_ids_are_ignored_with_a_message(name: str, tmp_path: Path) -> None:
    save_hf_tokenizer(foreign(), tmp_path, 64, is_dialogue=False)
    (tmp_path / name).write_text(json.dumps({"eos_token_id": [50256, 3, 260, -1]}))
    said = list[str]()
    assert load_hf_tokenizer(tmp_path, said.append).stop_ids[:2] == [1, 3]
    assert len(said) == 3
    assert said[0] == (
        f"{tmp_path / name}: eos_token_id must be ids of tokenizer.json, below 260, got 50256. It is ignored."
    )


def test_truncation_and_padding_of_a_tokenizer_file_are_disabled(tmp_path: Path) -> None:
    backend = foreign_tokenizer()
    backend.enable_truncation(max_length=4)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"eos_token_id": 1}')
    tokenizer = load_hf_tokenizer(tmp_path)
    documents = [plain_document("", "a rain"), plain_document("", "a")]
    assert [shown(tokenizer, ids) for ids, _ in encode_documents(tokenizer, documents, "all")] == [
        "<s>a rain</s>",
        "<s>a</s>",
    ]


def test_undecodable_template_files_are_refused(tmp_path: Path) -> None:
    save_hf_tokenizer(foreign(), tmp_path, 64, is_dialogue=False)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'chat_template.jinja'} cannot be read")):
        load_hf_tokenizer(tmp_path)


def test_precedence_of_files_with_end_tokens(tmp_path: Path) -> None:
    save_tokenizer(Tokenizer(foreign_tokenizer()), tmp_path / "tokenizer.json")
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<u>"}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 1]}')
    assert load_hf_tokenizer(tmp_path).stop_ids == [2, 3, 1]
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}}')
    assert load_hf_tokenizer(tmp_path).stop_ids == [1, 3]
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": null}')
    assert load_hf_tokenizer(tmp_path).stop_ids == [2, 3, 1]


@pytest.mark.parametrize("named", [[None], [["x"]], {"a": 1}, "L", "", 0, False, {}])
def test_invalid_architectures_are_refused(named: Any) -> None:
    config = {"architectures": named, "model_type": "llama"}
    with pytest.raises(UserError, match=r'^there/config.json: architectures must be a list .* \["LlamaForCausalLM"\]'):
        architecture_of(config, Path("there/config.json"))


@pytest.mark.parametrize("config", [{}, {"architectures": None}, {"architectures": []}])
def test_model_type_selects_the_architecture_by_default(config: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r'^config.json names no architecture, such as .*\["LlamaForCausalLM"\]'):
        architecture_of(config, Path("config.json"))
    assert architecture_of(config | {"model_type": "llama"}, Path("config.json")).name == "LlamaForCausalLM"


# For llama.cpp.


def merging(**changes: Any) -> Tokenizer:
    """A byte-level BPE with a merge, and other fields of its file."""
    backend = foreign_tokenizer()
    written = json.loads(backend.to_str())
    written["model"]["vocab"]["ab"] = len(written["model"]["vocab"])
    written["model"]["merges"] = [["a", "b"]]
    for path, value in changes.items():
        part, _, key = path.rpartition("__")
        (written[part] if part else written)[key] = value
    return Tokenizer(HFTokenizer.from_str(json.dumps(written)), foreign().chat_format)


def test_gguf_vocabulary_of_byte_level_bpe() -> None:
    found = gguf_vocabulary(merging())
    assert (found.model, found.pre, found.merges, found.adds_bos, found.bos_id) == ("gpt2", "gpt-2", ["a b"], True, 0)
    assert not gguf_vocabulary(merging(post_processor=None)).adds_bos


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
MANY = {"type": "Split", "pattern": {"Regex": r"\p{N}{1,4}|."}, "behavior": "Isolated", "invert": False}
TWO = [{"SpecialToken": {"id": "<s>", "type_id": 0}}] * 2 + [{"Sequence": {"id": "A", "type_id": 0}}]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pre_tokenizer": BYTE_LEVEL}, "splits text"),
        ({"pre_tokenizer": BYTE_LEVEL | {"use_regex": True, "add_prefix_space": True}}, "splits text"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [MANY, BYTE_LEVEL]}}, "splits text"),
        ({"pre_tokenizer": None}, "splits text"),
        ({"normalizer": {"type": "NFC"}}, "normalizer NFC"),
        ({"model__merges": []}, "without merges"),
        ({"model__dropout": 0.1}, "kind BPE"),
        ({"model__continuing_subword_prefix": "#"}, "prefixes"),
        ({"post_processor": {"type": "TemplateProcessing", "single": TWO, "pair": TWO, "special_tokens": {
            "<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}}}, "at most one token"),
        ({"added_tokens": [{"id": 0, "content": "<s>", "single_word": False, "lstrip": True, "rstrip": False,
                            "normalized": False, "special": False}]}, "does not find the token <s>"),
    ],
)  # fmt: skip
def test_gguf_vocabulary_refuses_unsupported_settings(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        gguf_vocabulary(merging(**changes))


def test_gguf_vocabulary_of_sentencepiece_requires_all_merges() -> None:
    found = gguf_vocabulary(llama_2())
    assert (found.model, found.adds_space, found.adds_bos, found.bos_id) == ("llama", True, True, 0)
    assert found.scores == {"▁a": 0.0}
    written = json.loads(llama_2().backend.to_str())
    written["model"]["merges"] = []
    with pytest.raises(UserError, match="whenever the result is a token"):
        gguf_vocabulary(Tokenizer(HFTokenizer.from_str(json.dumps(written)), llama_2().chat_format))


def test_gguf_vocabulary_requires_the_same_ignore_merges() -> None:
    split = {"type": "Split", "pattern": {"Regex": next(iter(SPLITS))}, "behavior": "Isolated", "invert": False}
    cut = {"type": "Sequence", "pretokenizers": [split, BYTE_LEVEL]}
    assert gguf_vocabulary(merging(pre_tokenizer=cut)).pre == "llama-bpe"
    # No merge makes this token.
    unmade = {"pre_tokenizer": cut, "model__vocab": merging().backend.get_vocab() | {"zzz": 261}}
    assert gguf_vocabulary(merging(**unmade)).pre == "dbrx"
    assert gguf_vocabulary(merging(**unmade, model__ignore_merges=True)).pre == "llama-bpe"
    with pytest.raises(UserError, match="ignore_merges"):
        gguf_vocabulary(merging(model__vocab=unmade["model__vocab"], model__ignore_merges=True))


@pytest.mark.parametrize("kind", ["unigram", "word", "char", "byte"])
def test_gguf_vocabulary_refuses_other_tokenizers(kind: str) -> None:
    with pytest.raises(UserError, match=r"llama\.cpp"):
        gguf_vocabulary(continued(kind))


# Beside transformers.


@pytest.mark.oracle
@pytest.mark.parametrize(
    "template",
    [
        "{% if tools is not none or documents is not none %}asked{% else %}not asked{% endif %}",
        "{{ tools is defined }}{{ documents is defined }}{{ functions is defined }}{{ bos_token }}{{ pad_token }}",
        "{{ messages | tojson }}{{ {'b': '<é>', 'a': 1} | tojson(ensure_ascii=true, sort_keys=true) }}",
        "{{ messages | tojson(indent=2) }}{{ messages | tojson(separators=(',', ':')) }}{{ 'é' | tojson(true, 2) }}",
        "{% set ns = namespace(n=0, self=1) %}{% for m in messages %}{% set ns.n = ns.n + 2 %}{% endfor %}{{ ns.n }}",
        "{{ dict(messages[0], content='x') }}{{ dict(a=1).items() | list }}{{ dict.fromkeys('ab', 0) }}",
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
        "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
        "{% for m in messages %}\n  {%- if loop.last %}\n{{ m['content'] }}\n  {% endif %}\n{% endfor %}\n\n",
        TEMPLATE,
    ],
)
def test_templates_render_as_in_transformers(template: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = foreign(template=template)
    save_hf_tokenizer(tokenizer, tmp_path, 64, is_dialogue=False)
    messages = [{"role": turn.role, "content": turn.text} for turn in MESSAGES]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert tokenizer.chat_format is not None
    assert (
        apply_chat_template(tokenizer.chat_format, MESSAGES, add_generation_prompt=True, special_tokens=SPECIAL)
        == expected
    )


@pytest.mark.oracle
@pytest.mark.parametrize("has_opening", [True, False])
def test_exported_tokenizers_encode_the_same_in_transformers(has_opening: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = foreign(has_opening)
    save_hf_tokenizer(tokenizer, tmp_path, 64, is_dialogue=False)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": turn.role, "content": turn.text} for turn in MESSAGES]
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == encode_prompt(tokenizer, MESSAGES)
    assert theirs("a rain")["input_ids"] == encode_prompt(tokenizer, [Message("text", "a rain")])
    assert (theirs.eos_token_id, theirs.bos_token_id) == (1, 0)


@pytest.mark.oracle
def test_native_template_renders_dialogues_as_encode_prompt(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = train_tokenizer(TokenizerConfig("bpe", 280), ["Why is the sky blue? It scatters light."])
    save_hf_tokenizer(tokenizer, tmp_path, 64, is_dialogue=True)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": turn.role, "content": turn.text} for turn in MESSAGES]
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == encode_prompt(tokenizer, MESSAGES)
    assert np.array_equal(theirs("sky", add_special_tokens=False)["input_ids"], encode(tokenizer, "sky"))
