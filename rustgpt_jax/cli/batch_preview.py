"""The first training batch of each stage as text: documents, tokens with loss, and what the model sees and predicts."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rustgpt_jax.cache_dir import cache_folder
from rustgpt_jax.config.schema import Config, stages
from rustgpt_jax.data.pipeline import Batch
from rustgpt_jax.data.preprocess import (
    StageData,
    fill_vocab_size,
    load_or_train_tokenizer,
    prepare_stage,
    resolve_epochs_of_text,
)
from rustgpt_jax.tokenizers import Tokenizer, decode_continuation
from rustgpt_jax.tracking.console import replace_control_characters, show_progress

# The number of preceding tokens from which the text of a token is decoded.
N_BEFORE = 16
# Marks of tokens with loss where there are no colors.
OPEN, CLOSE = "[[", "]]"
LOSS_STYLE, OTHER_STYLE, SPECIAL_STYLE, BORDER_STYLE = "green", "dim", "magenta", "cyan"


class Span(NamedTuple):
    """Successive tokens of one document that all have loss or all have none, as the model predicts them.

    Attributes:
        document: The number of the document in its row, from 1; 0 for padding.
        has_loss: Whether the model learns to predict these tokens.
        ids: The ids of the tokens.
        text: Their text, with the names of special tokens.
    """

    document: int
    has_loss: bool
    ids: list[int]
    text: str


class StagePreview(NamedTuple):
    """The first batch of a stage."""

    data: StageData
    batch: Batch


def load_first_batches(config: Config, run: Path | None, console: Console) -> tuple[Tokenizer, list[StagePreview]]:
    """Load or train the tokenizer, encode the text, and read the first batch of each stage.

    Args:
        config: The config.
        run: The tokenizer.json of the run, or None if the config is not of a run.
        console: The console for progress.

    Raises:
        UserError: The text is unsuitable.
    """
    with show_progress(console, "characters read to train the tokenizer") as progress:
        tokenizer = load_or_train_tokenizer(config, run, progress)
    with show_progress(console, "characters encoded") as progress:
        config = resolve_epochs_of_text(config, tokenizer, cache_folder(), progress).config
        full_config = fill_vocab_size(config, tokenizer)
        prepared = [prepare_stage(stage, tokenizer, cache_folder(), progress) for stage in stages(full_config)]
    return tokenizer, [StagePreview(data, data.training_batches().batch(data.stage.first_step)) for data in prepared]


def split_row(tokenizer: Tokenizer, batch: Batch, row: int) -> list[Span]:
    """Split the tokens of a row, with the target of the last one, by document and loss."""
    ids_S = np.append(batch.tokens_BT[row], batch.targets_BT[row, -1])
    # The first token is seen but not predicted. Of a target after the last token, only the document is not recorded.
    weights_S = np.append(0.0, batch.weights_BT[row])
    segments_S = np.append(batch.segments_BT[row], batch.segments_BT[row, -1])
    starts = np.flatnonzero((np.diff(segments_S) != 0) | (np.diff(weights_S > 0) != 0)) + 1
    spans, texts = [], token_texts(tokenizer, ids_S.tolist())
    for part in np.split(np.arange(len(ids_S)), starts):
        first = part[0]
        text = "".join(piece for place in part.tolist() for piece in texts[place])
        spans.append(Span(int(segments_S[first]), bool(weights_S[first] > 0), ids_S[part].tolist(), text))
    return spans


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Return the text of each token. A character of several tokens is the text of the last of them."""
    special, texts, begin = set(tokenizer.special_tokens), list[str](), 0
    pending = list[int]()
    for place, index in enumerate(ids):
        name = tokenizer.id_to_token(index)
        if name in special:
            texts.append(name or "")
            begin, pending = place + 1, []
            continue
        pending.append(index)
        first = place + 1 - len(pending)
        text = decode_continuation(tokenizer, ids[max(begin, first - N_BEFORE) : first], pending)
        is_partial = text.endswith("\N{REPLACEMENT CHARACTER}") and len(pending) < 4
        texts.append("" if is_partial else text)
        pending = pending if is_partial else []
    return texts


def print_batches(
    tokenizer: Tokenizer,
    previews: Sequence[StagePreview],
    n_rows: int,
    n_tokens: int,
    shows_ids: bool,
    console: Console,
) -> None:
    """Print the first rows of each batch.

    Args:
        tokenizer: The tokenizer.
        previews: The first batch of each stage.
        n_rows: The number of rows to print.
        n_tokens: The number of positions of the first row to list, with what the model sees and predicts there.
        shows_ids: Whether to print token ids too.
        console: The console. Where it has no colors, tokens with loss are between OPEN and CLOSE.
    """
    has_colors = console.color_system is not None
    marks = f"{LOSS_STYLE}: predicted with loss" if has_colors else f"{OPEN}...{CLOSE}: predicted with loss"
    for data, batch in previews:
        name, (rows, length) = data.stage.name, batch.tokens_BT.shape
        n_loss, n_documents = int((batch.weights_BT > 0).sum()), int(batch.segments_BT.max(axis=1).sum())
        title = f"Stage {name}, step {data.stage.first_step}: {rows} sequences of {length} tokens"
        console.print(Text(replace_control_characters(title), style="bold"))
        console.print(
            f"{n_documents} documents or parts of documents; {n_loss:,} of {rows * length:,} predictions count in the "
            f"loss ({n_loss / (rows * length):.0%}). {marks}.",
            highlight=False,
        )
        for row in range(min(n_rows, rows)):
            _print_row(split_row(tokenizer, batch, row), row, has_colors, shows_ids, console)
        if n_tokens:
            console.print("\nWhat the model sees and predicts at the first positions of row 0", style="bold")
            console.print(_token_table(tokenizer, batch, n_tokens, shows_ids))
        console.print()


def _print_row(spans: Sequence[Span], row: int, has_colors: bool, shows_ids: bool, console: Console) -> None:
    for number, document, parts in _group_documents(spans):
        count = sum(len(part.ids) for part in parts)
        label = f"document {document}" if document else "padding"
        border = f"-- row {row}, {label}, tokens {number} to {number + count - 1}"
        console.print(Text(border, style=BORDER_STYLE))
        text = Text()
        for part in parts:
            shown = replace_control_characters(part.text)
            if not has_colors and part.has_loss:
                shown = f"{OPEN}{shown}{CLOSE}"
            text.append(shown, style=LOSS_STYLE if part.has_loss else OTHER_STYLE)
        text.highlight_regex(r"<\|\w+\|>", SPECIAL_STYLE)
        console.print(text, soft_wrap=not console.is_terminal)
        if shows_ids:
            ids = " ".join(str(index) for part in parts for index in part.ids)
            console.print(Text(ids, style=OTHER_STYLE), soft_wrap=not console.is_terminal)


def _group_documents(spans: Sequence[Span]) -> Iterator[tuple[int, int, list[Span]]]:
    """Yield the position of each document in the row, its number, and its spans."""
    position, begin, group = 0, 0, list[Span]()
    for span in spans:
        if group and span.document != group[0].document:
            yield begin, group[0].document, group
            begin, group = position, []
        group.append(span)
        position += len(span.ids)
    if group:
        yield begin, group[0].document, group


def _token_table(tokenizer: Tokenizer, batch: Batch, n_tokens: int, shows_ids: bool) -> Table:
    """Return a table of the first positions of row 0."""
    table = Table(box=None, pad_edge=False)
    columns = ("position", "document", "sees", "id", "predicts", "id", "loss")
    for name in columns if shows_ids else [name for name in columns if name != "id"]:
        table.add_column(name, justify="left" if name in ("sees", "predicts") else "right", overflow="fold")
    texts = token_texts(tokenizer, [*batch.tokens_BT[0].tolist(), int(batch.targets_BT[0, -1])])
    for place in range(min(n_tokens, batch.tokens_BT.shape[1])):
        sees, predicts = (_show_token(text) for text in texts[place : place + 2])
        has_loss = batch.weights_BT[0, place] > 0
        ids = [str(tokens_BT[0, place]) for tokens_BT in (batch.tokens_BT, batch.targets_BT)]
        table.add_row(
            *(str(batch.positions_BT[0, place]), str(batch.segments_BT[0, place])),
            *((sees, ids[0], predicts, ids[1]) if shows_ids else (sees, predicts)),
            "yes" if has_loss else "no",
            style="" if has_loss else OTHER_STYLE,
        )
    return table


def _show_token(text: str) -> str:
    return repr(text)[1:-1] if text.strip(" ") == text != "" else repr(text)


def describe_batches(tokenizer: Tokenizer, previews: Sequence[StagePreview], n_rows: int) -> list[dict[str, Any]]:
    """Return the first rows of each batch as JSON values."""
    return [
        {
            "stage": data.stage.name,
            "step": data.stage.first_step,
            "batch_size": batch.tokens_BT.shape[0],
            "seq_len": batch.tokens_BT.shape[1],
            "n_predicted": int((batch.weights_BT > 0).sum()),
            "rows": [
                {
                    "spans": [span._asdict() for span in split_row(tokenizer, batch, row)],
                    "tokens": batch.tokens_BT[row].tolist(),
                    "targets": batch.targets_BT[row].tolist(),
                    "weights": batch.weights_BT[row].tolist(),
                    "documents": batch.segments_BT[row].tolist(),
                    "positions": batch.positions_BT[row].tolist(),
                }
                for row in range(min(n_rows, batch.tokens_BT.shape[0]))
            ],
        }
        for data, batch in previews
    ]
