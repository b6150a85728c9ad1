"""What a step tells of its own fault: the tensor where it began, and the rows of the batch that stand out."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rustgpt_jax.reproduce.recorded_run import Inside
from rustgpt_jax.tokenizers import Codec, decode
from rustgpt_jax.training.instrumented_step import (
    ACTIVATION,
    ACTIVATION_GRADIENT,
    PARAMETER,
    PARAMETER_GRADIENT,
    UPDATE,
    Tensor,
)

# A row whose loss is this many robust standard deviations above the median stands out.
ROW_DEVIATIONS = 6.0
# The median of absolute deviations of a normal distribution, times this, is its standard deviation.
MAD_TO_DEVIATION = 1.4826
MOST_ROWS_NAMED = 4
TOKENS_SHOWN = 40

# How each kind of tensor is spoken of.
WHAT = {
    PARAMETER: "the parameter",
    ACTIVATION: "the activation",
    ACTIVATION_GRADIENT: "the gradient of the activation",
    PARAMETER_GRADIENT: "the gradient of the parameter",
    UPDATE: "the update of the parameter",
}


def first_bad(tensors: Sequence[Tensor]) -> Tensor | None:
    """The first tensor, in the order in which they are made, with an element that is not finite."""
    return next((tensor for tensor in tensors if tensor.nonfinite), None)


def called(tensor: Tensor) -> str:
    """A tensor in words: its kind, its name and its layer."""
    layer = "" if tensor.layer is None else f" (layer {tensor.layer})"
    return f"{WHAT[tensor.kind]} {tensor.name}{layer}"


def of_first_bad(tensors: Sequence[Tensor]) -> str:
    """A sentence about the first tensor that is not finite and the one that was made before it."""
    bad = first_bad(tensors)
    if bad is None:
        most = max(tensors, key=lambda tensor: tensor.largest)
        return (
            "Every tensor of the step is finite, but the sum of their squares is not: "
            f"the largest magnitude is {most.largest:.3g}, in {called(most)}."
        )
    count = f"{bad.nonfinite:,} of {bad.size:,} elements"
    sentence = f"The first tensor that is not finite is {called(bad)}: {count}."
    if bad.kind == PARAMETER:
        return f"{sentence} It was so before the step began."
    before = tensors[tensors.index(bad) - 1]
    kinds = {PARAMETER: "every parameter is finite", ACTIVATION_GRADIENT: "every activation is finite"}
    if before.kind != bad.kind:
        known = kinds.get(before.kind, "the forward is finite")
        return f"{sentence} Before it {known}."
    return f"{sentence} Before it comes {called(before)}, whose largest magnitude is {before.largest:.3g}."


class Growth(NamedTuple):
    """A tensor in a bad step, and how many times its largest magnitude is that of a calm step."""

    tensor: Tensor
    calm: Tensor
    times: float


def growths(tensors: Sequence[Tensor], calm: Sequence[Tensor]) -> list[Growth]:
    """What grew against a calm step, most first."""
    pairs = zip(tensors, calm, strict=True)
    grown = [Growth(now, then, now.largest / then.largest) for now, then in pairs if then.largest > 0]
    return sorted(grown, key=lambda growth: -growth.times)


def of_growth(tensors: Sequence[Tensor], calm: Sequence[Tensor], calm_step: int) -> list[str]:
    """Sentences about the activation and the gradient that grew most against a calm step."""
    sentences: list[str] = []
    for kind in (ACTIVATION, ACTIVATION_GRADIENT, PARAMETER_GRADIENT):
        most = next(iter(growth for growth in growths(tensors, calm) if growth.tensor.kind == kind), None)
        if most is not None:
            sentences.append(
                f"The {kind} that grew most since step {calm_step} is {most.tensor.name}: its largest magnitude is "
                f"{most.tensor.largest:.3g}, {most.times:.3g} times what it was."
            )
    return sentences


def row_losses(inside: Inside) -> np.ndarray:
    """The mean loss over the learned tokens of each row of the batch; 0 for a row without any."""
    losses_BT, weights_BT = np.asarray(inside.report.losses_BT), np.asarray(inside.report.weights_BT)
    learned_BT = np.where(weights_BT > 0, losses_BT * weights_BT, 0)
    return learned_BT.sum(axis=1) / np.maximum(weights_BT.sum(axis=1), 1)


def odd_rows(losses_B: np.ndarray) -> list[int]:
    """The rows whose loss is not finite, or else those whose loss is far above the others', worst first."""
    broken = np.flatnonzero(~np.isfinite(losses_B))
    if len(broken):
        return broken.tolist()
    median = np.median(losses_B)
    deviation = MAD_TO_DEVIATION * np.median(np.abs(losses_B - median))
    odd = np.flatnonzero(losses_B - median > ROW_DEVIATIONS * max(deviation, 1e-3))
    return odd[np.argsort(-losses_B[odd])].tolist()


def of_batch(inside: Inside, tokenizer: Codec) -> str:
    """A sentence about the rows of a batch that stand out, with the beginning of the worst."""
    losses_B = row_losses(inside)
    rows, n_rows = odd_rows(losses_B), len(losses_B)
    if not rows:
        span = f"from {losses_B.min():.3g} to {losses_B.max():.3g}"
        return f"No row of the batch stands out: the losses of its {n_rows} rows are {span}."
    if len(rows) == n_rows:
        return f"All {n_rows} rows of the batch have a loss that is not finite: it is not one of them alone."
    named = ", ".join(str(row) for row in rows[:MOST_ROWS_NAMED]) + (", ..." if len(rows) > MOST_ROWS_NAMED else "")
    which, stand = (f"row {named}", "stands") if len(rows) == 1 else (f"rows {named}", "stand")
    is_broken = not np.isfinite(losses_B[rows[0]])
    what = "not finite" if is_broken else f"{losses_B[rows[0]]:.3g}, the median is {np.median(losses_B):.3g}"
    text = decode(tokenizer, np.asarray(inside.batch.tokens_BT)[rows[0], :TOKENS_SHOWN].tolist())
    return f"Of the {n_rows} rows of the batch, {which} (from 0) {stand} out: loss {what}. It begins: {text!r}"
