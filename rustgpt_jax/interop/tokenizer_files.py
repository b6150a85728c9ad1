"""The tokenizer of a Hugging Face folder, and its dialect: tokenizer.json and what stands beside it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rustgpt_jax.errors import UserError
from rustgpt_jax.interop.settings import read_json
from rustgpt_jax.tokenizers import END, SYSTEM, USER, Codec, Dialect, load_tokenizer, save_tokenizer

TOKENIZER, SETTINGS, SPECIAL = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
TEMPLATE, GENERATION, MODEL = "chat_template.jinja", "generation_config.json", "config.json"

# How the tokenizers that are trained here write a dialogue, for readers of the exported folder.
OWN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def read_codec(source: Path) -> Codec:
    """The tokenizer of a folder with its dialect. Raises UserError if it has none, or no token that ends a text."""
    file = source / TOKENIZER
    if not file.exists():
        raise UserError(f"{source} has no {TOKENIZER}; `transformers` writes one by AutoTokenizer...save_pretrained.")
    codec = load_tokenizer(file)
    return Codec(codec.tokenizer, _read_dialect(source, codec))


def _read_dialect(source: Path, codec: Codec) -> Dialect:
    files = {name: _optional(source / name) for name in (SPECIAL, SETTINGS, MODEL, GENERATION)}
    named = _named_tokens(files[SPECIAL]) | _named_tokens(files[SETTINGS])
    stops = [token for name in (MODEL, GENERATION) for token in _end_tokens(files[name], codec)]
    end = named.get("eos_token") or next(iter(stops), None)
    if end is None:
        raise UserError(f"{source}: neither {SETTINGS} nor {MODEL} says which token ends a text (eos_token).")
    named["eos_token"] = end
    return Dialect(end, tuple(dict.fromkeys([end, *stops])), _template(source, files[SETTINGS]), named)


def _optional(file: Path) -> dict[str, Any]:
    return read_json(file) if file.exists() else {}


def _named_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token and the like: each is a string, or an object with its content."""
    found = {}
    for name, token in settings.items():
        content = token.get("content") if isinstance(token, Mapping) else token
        if name.endswith("_token") and isinstance(content, str):
            found[name] = content
    return found


def _end_tokens(settings: Mapping[str, Any], codec: Codec) -> list[str]:
    ids = settings.get("eos_token_id")
    listed = ids if isinstance(ids, list) else [ids]
    tokens = [codec.id_to_token(index) for index in listed if isinstance(index, int)]
    return [token for token in tokens if token is not None]


def _template(source: Path, settings: Mapping[str, Any]) -> str | None:
    """The chat template: a file of its own, or in the settings, where there may be several by name."""
    file = source / TEMPLATE
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    return template


def write_codec(codec: Codec, folder: Path, context_length: int, is_dialogue: bool) -> None:
    """Write the files from which `transformers` makes the same tokenizer.

    One that was trained here gets a chat template if the model has learned dialogues.
    """
    dialect = codec.dialect or _own_dialect(is_dialogue)
    save_tokenizer(Codec(codec.tokenizer), folder / TOKENIZER)
    # The class that takes a tokenizer.json as it is.
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context_length, **dialect.named}
    settings["clean_up_tokenization_spaces"] = False
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if dialect.chat_template is not None:
        (folder / TEMPLATE).write_text(dialect.chat_template, encoding="utf-8")
    stops = codec.stop_ids
    generation = special_ids(codec) | {"eos_token_id": stops[0] if len(stops) == 1 else stops}
    (folder / GENERATION).write_text(json.dumps(generation, indent=2) + "\n")


def special_ids(codec: Codec) -> dict[str, int]:
    """bos_token_id, eos_token_id and pad_token_id, as far as the tokenizer has such tokens."""
    named = (codec.dialect or _own_dialect(False)).named
    ids = {
        f"{name}_id": codec.token_to_id(named[name])
        for name in ("bos_token", "eos_token", "pad_token")
        if name in named
    }
    return {name: index for name, index in ids.items() if index is not None}


def _own_dialect(is_dialogue: bool) -> Dialect:
    named = {"bos_token": END, "eos_token": END, "pad_token": END}
    return Dialect(END, (END, USER, SYSTEM), OWN_TEMPLATE if is_dialogue else None, named)
