"""The page of a replayed step: one HTML file that needs nothing else, with heat maps and a table of its tensors."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from rustgpt_jax.reproduce.heatmap import heat_map, short
from rustgpt_jax.reproduce.replay_step import Again
from rustgpt_jax.sweeps.report.html import PARTS as REPORT_PARTS
from rustgpt_jax.sweeps.report.palette import css
from rustgpt_jax.training.instrumented_step import (
    ACTIVATION,
    ACTIVATION_GRADIENT,
    KINDS,
    PARAMETER,
    PARAMETER_GRADIENT,
    UPDATE,
    Tensor,
)

PARTS = Path(__file__).parent / "assets"


def page(again: Again, tensors: Sequence[Tensor]) -> str:
    """The HTML of a step that was looked into."""
    title = f"{escape(again.run)}, step {again.step}"
    style = (REPORT_PARTS / "page.css").read_text(encoding="utf-8") + (PARTS / "page.css").read_text(encoding="utf-8")
    body = f"{_head(again, tensors)}{_figures(tensors)}{_table(tensors)}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><link rel=icon href=data:,><style>{css()}{style}</style></head>"
        f'<body><main>{body}</main><div id="tip"></div>'
        f"<script>{(PARTS / 'page.js').read_text(encoding='utf-8')}</script></body></html>\n"
    )


def _head(again: Again, tensors: Sequence[Tensor]) -> str:
    metrics = again.metrics
    start = f"the checkpoint of step {again.from_step:,}" if again.from_step else "the start"
    bad = [tensor for tensor in tensors if tensor.nonfinite]
    first = f"The first tensor that is not finite: the {bad[0].kind} {bad[0].name}." if bad else "All is finite."
    return (
        f'<header><p class="name">{escape(again.run)}, stage {escape(again.stage)}</p>'
        f"<h1>Step {again.step:,}, made again from {start}</h1>"
        f'<div class="best"><div class="loss">{metrics["train/loss"]:.4f}</div><div><p class="setting">'
        f"gradient norm {metrics['train/gradient_norm']:.4g}, learning rate {metrics['train/learning_rate']:.3g}</p>"
        f'<p class="unit">Training loss, nats a token. {escape(again.verdict)}</p></div></div>'
        f'<p class="counts{" warn" if bad else ""}">{escape(first)}</p></header>'
    )


def _figures(tensors: Sequence[Tensor]) -> str:
    def of(kind: str) -> list[Tensor]:
        return [tensor for tensor in tensors if tensor.kind == kind]

    before = {tensor.name: tensor.rms for tensor in of(PARAMETER)}
    shown = "Each cell is a tensor, coloured by the logarithm of its"
    maps = [
        heat_map(
            "Activations",
            f"{shown} root mean square. Sites stand in the order in which they are computed, from left to right.",
            of(ACTIVATION),
            lambda tensor: tensor.rms,
        ),
        heat_map(
            "Gradients of the activations",
            f"{shown} root mean square: how much the loss depends on it. They are computed from right to left.",
            of(ACTIVATION_GRADIENT)[::-1],
            lambda tensor: tensor.rms,
        ),
        heat_map(
            "Gradients of the parameters",
            f"{shown} root mean square, before clipping.",
            of(PARAMETER_GRADIENT)[::-1],
            lambda tensor: tensor.rms,
        ),
        heat_map(
            "Updates of the parameters",
            f"{shown} root mean square as a share of that of the parameter before the step.",
            of(UPDATE)[::-1],
            lambda tensor: tensor.rms / before[tensor.name] if before[tensor.name] else 0.0,
        ),
    ]
    return f'<section><h2>Where the numbers are large</h2><div class="figures">{"".join(maps)}</div></section>'


def _table(tensors: Sequence[Tensor]) -> str:
    heads = ("kind", "tensor", "root mean square", "norm", "largest", "not finite", "elements", "fingerprint")
    styles = ("", "", "number", "number", "number", "number", "number", "")
    head = "".join(f'<th class="{style}">{name}</th>' for name, style in zip(heads, styles, strict=True))
    rows = []
    for tensor in sorted(tensors, key=lambda tensor: KINDS.index(tensor.kind)):
        numbers = (short(tensor.rms), f"{tensor.norm:.4g}", f"{tensor.largest:.4g}")
        counts = (f"{tensor.nonfinite:,}", f"{tensor.size:,}", f"<code>{tensor.fingerprint}</code>")
        cells = (tensor.kind, escape(tensor.name), *numbers, *counts)
        line = "".join(f'<td class="{style}">{cell}</td>' for cell, style in zip(cells, styles, strict=True))
        rows.append(f"<tr{' class=broken' if tensor.nonfinite else ''}>{line}</tr>")
    return (
        "<section><h2>Every tensor, in the order in which it is computed</h2>"
        '<p class="soft small">Norms and largest magnitudes are of the finite elements. '
        "Two runs whose fingerprints of a tensor are equal have the same bits there.</p>"
        f'<div class="table tensors"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></section>"
    )
