"""The tokenizer of a Hugging Face folder, and its dialect: tokenizer.json and what stands beside it."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as HFTokenizer
from tokenizers import processors

from rustgpt_jax.errors import UserError
from rustgpt_jax.interop.config_mapping import read_json
from rustgpt_jax.tokenizers import END, SYSTEM, USER, ChatFormat, Tokenizer, load_tokenizer, save_tokenizer
from rustgpt_jax.tokenizers.chat_template import find_turn_end_token

TOKENIZER, SETTINGS, SPECIAL = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
TEMPLATE, GENERATION, MODEL = "chat_template.jinja", "generation_config.json", "config.json"

# How the tokenizers that are trained here write a dialogue, for readers of the exported folder.
OWN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def load_hf_tokenizer(source: Path, log: Callable[[str], object] = lambda _: None) -> Tokenizer:
    """Load the tokenizer of a folder with its dialect; `says` is called for ids of end tokens that are not in it.

    Raises:
        UserError: There is no tokenizer or no end token, or a file is damaged or invalid, for example with an end token
            that is not in the vocabulary or a chat template that is not a string.
    """
    file = source / TOKENIZER
    if not file.exists():
        raise UserError(f"{source} has no {TOKENIZER}; `transformers` writes one by AutoTokenizer...save_pretrained.")
    codec = load_tokenizer(file)
    return Tokenizer(codec.backend, _read_dialect(source, codec, log))


def _read_dialect(source: Path, codec: Tokenizer, log: Callable[[str], object]) -> ChatFormat:
    files = {name: _optional(source / name) for name in (SPECIAL, SETTINGS, MODEL, GENERATION)}
    named = _named_tokens(files[SPECIAL]) | _named_tokens(files[SETTINGS])
    stops = _named_end(source / SETTINGS, files[SETTINGS], codec) or _named_end(source / SPECIAL, files[SPECIAL], codec)
    unknown = []
    for name in (MODEL, GENERATION):
        known, sentences = _numbered_ends(source / name, files[name], codec)
        stops += known
        unknown += sentences
    if not stops:
        missing = f"{source}: neither {SETTINGS} nor {MODEL} says which token ends a text (eos_token)."
        raise UserError(unknown[0] if unknown else missing)
    for sentence in unknown:
        log(f"{sentence} It is left out.")
    named["eos_token"] = stops[0]
    try:
        dialect = ChatFormat(stops[0], tuple(dict.fromkeys(stops)), _template(source, files[SETTINGS]), named)
    except ValueError as error:
        raise UserError(f"{source}: a special token or the chat template is no text ({error}).") from None
    # A base model may have this token without stopping at it; after training on dialogues it does stop.
    closing = find_turn_end_token(dialect, codec.special_tokens)
    if closing is None or closing in dialect.stop_tokens:
        return dialect
    return replace(dialect, stop_tokens=(*dialect.stop_tokens, closing))


def _optional(file: Path) -> dict[str, Any]:
    return read_json(file) if file.exists() else {}


def _named_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token and the like: each is a string, or an object with its content."""
    found = {}
    for name, token in settings.items():
        content = _content(token)
        if name.endswith("_token") and isinstance(content, str):
            found[name] = content
    return found


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, Mapping) else token


def _named_end(file: Path, settings: Mapping[str, Any], codec: Tokenizer) -> list[str]:
    """The token that eos_token names, if it names one."""
    token = settings.get("eos_token")
    if token is None:
        return []
    content = _content(token)
    if not isinstance(content, str) or codec.token_to_id(content) is None:
        raise UserError(f"{file}: eos_token takes a token of {TOKENIZER}, and {token!r} is none.")
    return [content]


def _numbered_ends(file: Path, settings: Mapping[str, Any], codec: Tokenizer) -> tuple[list[str], list[str]]:
    """Return the tokens given by eos_token_id (an id, a list of ids or null), and a message for each unknown id."""
    given = settings.get("eos_token_id")
    ids = given if isinstance(given, list) else [] if given is None else [given]
    size = codec.get_vocab_size()
    tokens, unknown = [], []
    for index in ids:
        token = codec.id_to_token(index) if type(index) is int and 0 <= index < size else None
        sentence = f"{file}: eos_token_id takes ids of {TOKENIZER}, below {size}, not {index!r}."
        if type(index) is not int:
            raise UserError(sentence)
        if token is None:
            unknown.append(sentence)
        else:
            tokens.append(token)
    return tokens, unknown


def _template(source: Path, settings: Mapping[str, Any]) -> str | None:
    """The chat template: a file of its own, or in the settings, where there may be several by name."""
    file = source / TEMPLATE
    if file.exists():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file} cannot be read: {error}.") from None
    template = settings.get("chat_template")
    if template is None or isinstance(template, str):
        return template
    if not (isinstance(template, list) and all(_is_named_template(entry) for entry in template)):
        raise UserError(
            f"{source / SETTINGS}: chat_template takes a text, or a list of objects with the texts name and template, "
            f"not {template!r}."
        )
    return next((entry["template"] for entry in template if entry["name"] == "default"), None)


def _is_named_template(entry: Any) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("name", "template"))


def save_hf_tokenizer(codec: Tokenizer, folder: Path, context_length: int, is_dialogue: bool) -> None:
    """Write the files from which `transformers` makes the same tokenizer.

    One that was trained here gets a chat template if the model has learned dialogues.
    """
    dialect = codec.chat_format or native_chat_format(is_dialogue)
    save_tokenizer(Tokenizer(_exported(codec)), folder / TOKENIZER)
    # The class that takes a tokenizer.json as it is.
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        **dialect.special_tokens_map,
    }
    settings["clean_up_tokenization_spaces"] = False
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if dialect.chat_template is not None:
        (folder / TEMPLATE).write_text(dialect.chat_template, encoding="utf-8")
    stops = codec.stop_ids
    generation = special_ids(codec) | {"eos_token_id": stops[0] if len(stops) == 1 else stops}
    (folder / GENERATION).write_text(json.dumps(generation, indent=2) + "\n")


def special_ids(codec: Tokenizer) -> dict[str, int]:
    """bos_token_id, eos_token_id and pad_token_id, as far as the tokenizer has such tokens."""
    named = (codec.chat_format or native_chat_format(False)).special_tokens_map
    ids = {
        f"{name}_id": codec.token_to_id(named[name])
        for name in ("bos_token", "eos_token", "pad_token")
        if name in named
    }
    return {name: index for name, index in ids.items() if index is not None}


def _exported(codec: Tokenizer) -> HFTokenizer:
    """Return the tokenizer with a post-processor that adds the tokens that prompts have here."""
    if codec.chat_format is not None:
        return codec.backend
    tokenizer = HFTokenizer.from_str(codec.backend.to_str())
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", pair=f"{END} $A $B:1", special_tokens=[(END, codec.end_id)]
    )
    return tokenizer


def native_chat_format(is_dialogue: bool) -> ChatFormat:
    """Return the dialect of tokenizers trained here, in the form used for imported ones."""
    named = {"bos_token": END, "eos_token": END, "pad_token": END}
    return ChatFormat(END, (END, USER, SYSTEM), OWN_TEMPLATE if is_dialogue else None, named)
