"""Text to token ids and back. A tokenizer is one of Hugging Face's `tokenizers` library, kept in a tokenizer.json."""

from rustgpt_jax.tokenizers.chat_template import ChatFormat
from rustgpt_jax.tokenizers.encoding import encode_document, encode_documents, encode_prompt, pieces
from rustgpt_jax.tokenizers.tokenizer import (
    ASSISTANT,
    END,
    ROLE_TOKENS,
    SPECIAL_TOKENS,
    SYSTEM,
    UNKNOWN,
    USER,
    Codec,
    decode,
    decode_after,
    encode,
    load_tokenizer,
    save_tokenizer,
    special_id,
)
from rustgpt_jax.tokenizers.trainers import IMPORTED, TOKENIZERS, train_tokenizer

__all__ = [
    "ASSISTANT",
    "END",
    "IMPORTED",
    "ROLE_TOKENS",
    "SPECIAL_TOKENS",
    "SYSTEM",
    "TOKENIZERS",
    "UNKNOWN",
    "USER",
    "Codec",
    "ChatFormat",
    "decode",
    "decode_after",
    "encode",
    "encode_document",
    "encode_documents",
    "encode_prompt",
    "load_tokenizer",
    "pieces",
    "save_tokenizer",
    "special_id",
    "train_tokenizer",
]
