"""Tokenizers of other models: their documents, their chat templates, and what marks the end."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from rustgpt_jax.config import TokenizerConfig
from rustgpt_jax.data.corpora import Document, Turn, plain
from rustgpt_jax.errors import UserError
from rustgpt_jax.interop.tokenizer_files import read_codec, write_codec
from rustgpt_jax.tokenizers import (
    Codec,
    Dialect,
    decode,
    encode,
    encode_document,
    encode_prompt,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)

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
TURNS = (Turn("system", "Be brief."), Turn("user", "Why?"), Turn("assistant", "So."), Turn("user", "Oh?"))


def foreign_tokenizer(has_opening: bool = True) -> Tokenizer:
    """Bytes as tokens, after four special ones; texts open with <s> where `has_opening` says so."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *characters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    if has_opening:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def foreign(has_opening: bool = True, template: str | None = TEMPLATE) -> Codec:
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    return Codec(foreign_tokenizer(has_opening), Dialect("</s>", ("</s>", "<u>"), template, named))


def shown(codec: Codec, ids: Any) -> str:
    """The text of tokens with the special ones."""
    return codec.tokenizer.decode(list(ids), skip_special_tokens=False)


# Documents.


@pytest.mark.parametrize(("has_opening", "expected"), [(True, "<s>a rain</s>"), (False, "</s>a rain")])
def test_a_text_is_marked_as_its_model_marks_it(has_opening: bool, expected: str) -> None:
    codec = foreign(has_opening)
    ids, weights = encode_document(codec, plain("a", "a rain"), "all")
    assert shown(codec, ids) == expected
    # Nothing comes before an opening that could predict it.
    assert weights.tolist() == [not has_opening] + [True] * (len(ids) - 1)
    assert shown(codec, encode_prompt(codec, [Turn("text", "a rain")])) == ("<s>" if has_opening else "") + "a rain"
    assert codec.stop_ids == [1, 2] and codec.end_id == 1


def test_what_a_text_says_is_never_a_special_token() -> None:
    codec = foreign()
    assert not {0, 1, 2, 3} & set(encode(codec, "</s> and <u>"))
    assert decode(codec, encode(codec, "</s> and <u>")) == "</s> and <u>"
    with pytest.raises(UserError, match="contains <u>, which is a special token"):
        encode_prompt(codec, [Turn("user", "now <u>")])


def test_a_prompt_of_nothing_has_a_token() -> None:
    assert encode_prompt(foreign(has_opening=False), [Turn("text", "")]) == [1]


# Dialogues.


def test_a_dialogue_is_what_the_template_writes() -> None:
    codec = foreign()
    assert shown(codec, encode_prompt(codec, TURNS)) == "<s>[Be brief.]<u>Why?<a>So.</s><u>Oh?<a>"
    ids, weights = encode_document(codec, Document("d", TURNS[:3]), "assistant")
    assert shown(codec, ids) == "<s>[Be brief.]<u>Why?<a>So.</s>"
    assert shown(codec, ids[weights]) == "So.</s>"
    assert encode_document(codec, Document("d", TURNS[:3]), "all")[1].all()


def test_a_dialogue_that_the_template_does_not_take_is_a_user_error() -> None:
    with pytest.raises(UserError, match="does not take this dialogue: no tool"):
        encode_prompt(foreign(), [Turn("tool", "x")])
    with pytest.raises(UserError, match="has no chat template"):
        encode_prompt(foreign(template=None), [Turn("user", "x")])
    with pytest.raises(UserError, match="does not take this dialogue"):
        encode_prompt(foreign(template="{{ messages.__class__.__mro__ }}"), [Turn("user", "x")])


def test_answers_that_the_template_changes_later_are_not_guessed() -> None:
    last_only = "{% for m in messages %}{{ m.content if loop.last or m.role == 'user' else '' }}{% endfor %}"
    dialogue = Document("d", (*TURNS[1:3], *TURNS[1:3]))
    with pytest.raises(UserError, match="config.data.loss_on='all'"):
        encode_document(foreign(template=last_only), dialogue, "assistant")


# Files.


def test_a_saved_tokenizer_has_its_dialect(tmp_path: Path) -> None:
    save_tokenizer(foreign(), tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded.dialect == foreign().dialect and loaded.written == foreign().written
    assert loaded.written != Codec(foreign_tokenizer()).written
    (tmp_path / "tokenizer.dialect.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer.dialect.json: this is not the dialect"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_the_files_of_a_model_give_back_its_dialect(tmp_path: Path) -> None:
    write_codec(foreign(), tmp_path, 64, is_dialogue=False)
    assert read_codec(tmp_path).dialect == foreign().dialect
    assert json.loads((tmp_path / "generation_config.json").read_bytes())["eos_token_id"] == [1, 2]


@pytest.mark.parametrize("place", ["settings", "named", "file"])
def test_a_template_is_found_wherever_it_stands(place: str, tmp_path: Path) -> None:
    write_codec(foreign(template=None), tmp_path, 64, is_dialogue=False)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_bytes())
    settings["eos_token"] = {"content": "</s>", "lstrip": False}
    if place == "file":
        (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    else:
        listed = [{"name": "tools", "template": "x"}, {"name": "default", "template": TEMPLATE}]
        settings["chat_template"] = TEMPLATE if place == "settings" else listed
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert read_codec(tmp_path).dialect == foreign().dialect


def test_a_model_that_ends_nowhere_or_has_no_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no tokenizer.json"):
        read_codec(tmp_path)
    save_tokenizer(Codec(foreign_tokenizer()), tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="which token ends a text"):
        read_codec(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": 1}')
    assert read_codec(tmp_path).dialect == Dialect("</s>", ("</s>",), None, {"eos_token": "</s>"})


# Beside transformers.


@pytest.mark.parametrize("has_opening", [True, False])
def test_transformers_reads_the_same_tokenizer(has_opening: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    codec = foreign(has_opening)
    write_codec(codec, tmp_path, 64, is_dialogue=False)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": turn.role, "content": turn.text} for turn in TURNS]
    rendered = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert rendered == encode_prompt(codec, TURNS)
    assert theirs("a rain")["input_ids"] == encode_prompt(codec, [Turn("text", "a rain")])
    assert (theirs.eos_token_id, theirs.bos_token_id) == (1, 0)


def test_transformers_writes_dialogues_as_a_tokenizer_that_was_trained_here(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    codec = train_tokenizer(TokenizerConfig("bpe", 280), ["Why is the sky blue? It scatters light."])
    write_codec(codec, tmp_path, 64, is_dialogue=True)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": turn.role, "content": turn.text} for turn in TURNS]
    rendered = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert rendered == encode_prompt(codec, TURNS)
    assert np.array_equal(theirs("sky", add_special_tokens=False)["input_ids"], encode(codec, "sky"))
