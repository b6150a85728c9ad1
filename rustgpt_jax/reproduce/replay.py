"""The verb `replay`: recompute a step bit for bit, compare it with its record, and show its tensors."""

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from rustgpt_jax.atomic_io import NotWritableError, write_atomically
from rustgpt_jax.reproduce.compare_metrics import TIMED, describe_missing_record, values_match
from rustgpt_jax.reproduce.recorded_run import (
    ACTIVATION,
    ACTIVATION_GRADIENT,
    KINDS,
    PARAMETER,
    PARAMETER_GRADIENT,
    UPDATE,
    RecordedRun,
    StepInternals,
    StepTensor,
    describe_start,
)
from rustgpt_jax.sweeps.report import ASSETS as REPORT_ASSETS
from rustgpt_jax.sweeps.report.plot_style import get_shade, make_css
from rustgpt_jax.tracking.console import print_line
from rustgpt_jax.training.hooks import MUST_BE_FINITE
from rustgpt_jax.workdir.code_snapshot import hash_running_code
from rustgpt_jax.workdir.environment import collect_environment, flatten_environment
from rustgpt_jax.workdir.event_log import load_launches

MAX_CHANGES_NAMED = 4
# The parts of an environment that may change bits.
BIT_RELEVANT = ("devices.", "machine.", "settings.", "variables.", "packages.jax")


@dataclass(frozen=True)
class ReplayedStep:
    """A recomputed step.

    Attributes:
        run: The name of the run.
        step: The number of the step, from 1.
        stage: The name of its stage.
        from_step: The step of the checkpoint that the replay started from; 0 for the start.
        metrics: Metrics by their names in metrics.jsonl.
        record: The line of that file, or None if the step was not logged.
        reasons: Reasons why the step may differ bitwise; empty if all known conditions are the same.
        missing: The reason why an expected line is missing; empty if it is present, or the run does not log the step.
        log_every: The logging interval of the run.
    """

    run: str
    step: int
    stage: str
    from_step: int
    metrics: dict[str, float]
    record: dict[str, Any] | None
    reasons: tuple[str, ...]
    missing: str = ""
    log_every: int = 1

    @property
    def recorded(self) -> dict[str, float]:
        """The recorded metrics, without those that depend on the clock."""
        record = self.record or {}
        return {name: value for name, value in record.items() if name.startswith("train/") and name not in TIMED}

    @property
    def unequal(self) -> list[str]:
        """The recorded metrics that differ bitwise from the replayed ones."""
        return [name for name, value in self.recorded.items() if not values_match(value, self.metrics.get(name))]

    @property
    def lacking(self) -> list[str]:
        """The metrics that are missing from the recorded line of the step."""
        return [name for name in self.metrics if self.record is not None and name not in self.record]

    @property
    def is_same(self) -> bool:
        """True if the step matches its record, or the run does not log the step."""
        return not (self.unequal or self.lacking or self.missing)

    @property
    def verdict(self) -> str:
        """The result of the comparison with the record, as a sentence."""
        if self.missing:
            return f"The step cannot be compared with the record: metrics.jsonl {self.missing}."
        if self.record is None:
            every = f"config.logging.log_every={self.log_every}"
            return f"Step {self.step} was not logged ({every}), so it cannot be compared with the record."
        names = ", ".join(name.removeprefix("train/") for name in self.unequal or self.lacking)
        if not self.unequal and self.lacking:
            return f"The recorded values are the same, but metrics.jsonl lacks values of this step: {names}."
        if not self.unequal:
            return f"All {len(self.recorded)} recorded values of the step are bit-identical."
        if not self.reasons:
            return f"Not bit-identical: {names}, although the code and the recorded environment are the same."
        return f"Not bit-identical: {names}. Possible reasons: {'; '.join(self.reasons)}."


class StepReplay(NamedTuple):
    """A recomputed step and, if its intermediates were measured, its tensors and the page that shows them."""

    replayed: ReplayedStep
    tensors: Sequence[StepTensor]
    page: Path | None

    def describe(self) -> dict[str, Any]:
        """Return the step as JSON has it."""
        replayed = self.replayed
        return {
            "step": replayed.step,
            "stage": replayed.stage,
            "from_step": replayed.from_step,
            "is_same": replayed.is_same,
            "verdict": replayed.verdict,
            "metrics": replayed.metrics,
            "recorded": replayed.recorded if replayed.record is not None else None,
            "differing": replayed.unequal,
            "missing": replayed.lacking,
            "possible_reasons": replayed.reasons,
            "tensors": [tensor._asdict() for tensor in self.tensors],
            "page": self.page,
        }


def is_finite(metrics: Mapping[str, Any]) -> bool:
    """Return whether the loss, gradient and update are finite, given the metrics of a step or a line of the record."""
    return all(math.isfinite(metrics.get(f"train/{name}", 0.0)) for name in MUST_BE_FINITE)


def replay(path: Path, step: int, with_intermediates: bool, console: Console) -> StepReplay:
    """Recompute a step of a run and print its metrics.

    With intermediates, also measure the step's tensors and write them to RUN/replay/step_K.html, or to a temporary
    folder if the run folder is not writable.

    Raises:
        UserError: As for `RecordedRun`, or the run does not have the step.
    """
    with RecordedRun(path, console) as run:
        replayed, internals = replay_one_step(run, step, with_intermediates)
    print_line(
        console,
        f"step {step} of {path} (stage {replayed.stage}), replayed from {describe_start(replayed.from_step)}",
    )
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("")
    table.add_column("replayed", justify="right")
    table.add_column("recorded", justify="right")
    table.add_column("")
    for name, value in replayed.metrics.items():
        recorded, verdict = "", ""
        if name in replayed.recorded:
            recorded = f"{replayed.recorded[name]:.9g}"
            verdict = "differs" if name in replayed.unequal else "same bits"
        table.add_row(name.removeprefix("train/"), f"{value:.9g}", recorded, verdict)
    console.print(table, highlight=False)
    print_line(console, replayed.verdict)
    if internals is None:
        return StepReplay(replayed, (), None)
    print_tensors(internals.tensors, console)
    page = write_page(path, replayed, internals.tensors)
    print_line(console, f"All tensors of the step: {page}")
    return StepReplay(replayed, internals.tensors, page)


def replay_one_step(run: RecordedRun, step: int, with_intermediates: bool) -> tuple[ReplayedStep, StepInternals | None]:
    """Recompute a step of a run, with its intermediates if `with_intermediates`.

    Raises:
        UserError: The run does not have the step.
    """
    run.check_step(step)
    state = run.restore_nearest(step - 1)
    from_step = int(state.step)
    state = run.advance(state, step - 1)
    internals = run.measure_step(state) if with_intermediates else None
    _, (metrics,) = run.train(state, 1)
    stage, record = run.get_stage(step)[0].stage, run.load_metrics(step)
    missing = "" if record is not None else describe_missing_record(run.folder, stage, step)
    if record is None and not missing and stage.is_logged(step):
        missing = f"has no line of step {step}"
    replayed = ReplayedStep(
        run=run.folder.path.resolve().name,
        step=step,
        stage=stage.name,
        from_step=from_step,
        metrics={name: value.item() for name, value in metrics.by_name().items()},
        record=record,
        reasons=_find_reasons(run, step),
        missing=missing,
        log_every=stage.config.logging.log_every,
    )
    return replayed, internals


def _find_reasons(run: RecordedRun, step: int) -> tuple[str, ...]:
    """Return why a step may differ bitwise from its record."""
    launch = next((launch for launch in load_launches(run.folder)[::-1] if launch.step < step), None)
    if launch is None:
        return ("the code and environment of the run were not recorded",)
    reasons: list[str] = []
    code = hash_running_code(run.folder)
    if launch.code != code:
        reasons.append(f"the hash of the code was {launch.code} and is now {code}")
    if launch.mode == "fused":
        reasons.append(f"the run was trained fused with {launch.width - 1} other runs, which changes the order of sums")
    then, now = flatten_environment(launch.environment), flatten_environment(collect_environment())
    changed = [name for name in then | now if name.startswith(BIT_RELEVANT) and then.get(name) != now.get(name)]
    reasons += [f"{name} was {then.get(name)!r} and is now {now.get(name)!r}" for name in changed[:MAX_CHANGES_NAMED]]
    return tuple(reasons)


def print_tensors(tensors: Sequence[StepTensor], console: Console) -> None:
    """Print a table with a row per hook point, for the layers with the largest activation and the largest gradient."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("hook point", no_wrap=True)
    for head in ("largest", "layer", "norm", "not finite", "gradient", "layer", "norm", "not finite"):
        table.add_column(head, justify="right", no_wrap=True)
    for path in dict.fromkeys(tensor.path for tensor in tensors if tensor.kind == ACTIVATION):
        cells: list[RenderableType] = []
        for kind in (ACTIVATION, ACTIVATION_GRADIENT):
            same_path = [tensor for tensor in tensors if tensor.kind == kind and tensor.path == path]
            worst = max(same_path, key=lambda tensor: (tensor.nonfinite, tensor.largest))
            layer = "" if worst.layer is None else str(worst.layer)
            nonfinite = Text(f"{worst.nonfinite:,}", "red" if worst.nonfinite else "")
            cells += [f"{worst.largest:.3g}", layer, f"{worst.norm:.3g}", nonfinite]
        table.add_row(path, *cells)
    console.print(table, highlight=False)


# The HTML page of a replayed step: a self-contained file with heat maps and a table of its tensors.

ASSETS = Path(__file__).parent / "assets"
# With at most this many columns, the cells of a heat map show their values.
MAX_COLUMNS_WITH_VALUES = 14
# Colors beyond this fraction of the color scale are light and get dark text.
LIGHT_FROM = 0.45


def write_page(path: Path, replayed: ReplayedStep, tensors: Sequence[StepTensor]) -> Path:
    """Write the page of a step and return its path.

    The page is written to the run folder, or to a new temporary folder if that is not writable.
    """
    name, page = f"step_{replayed.step}.html", render_page(replayed, tensors)
    try:
        (path / "replay").mkdir(exist_ok=True)
        write_atomically(path / "replay" / name, page)
        return path / "replay" / name
    except (OSError, NotWritableError):
        file = Path(tempfile.mkdtemp(prefix="rustgpt_jax_replay_")) / name
        write_atomically(file, page)
        return file


def render_page(replayed: ReplayedStep, tensors: Sequence[StepTensor]) -> str:
    """Render the HTML page of a replayed step."""
    style = "".join((folder / "page.css").read_text(encoding="utf-8") for folder in (REPORT_ASSETS, ASSETS))
    script = (ASSETS / "page.js").read_text(encoding="utf-8")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(replayed.run)}, step {replayed.step}</title><link rel=icon href=data:,>"
        f"<style>{make_css()}{style}</style></head><body><main>"
        f"{_render_head(replayed, tensors)}{_render_heat_maps(tensors)}{_render_table(tensors)}"
        f'</main><div id="tip"></div><script>{script}</script></body></html>\n'
    )


def _render_head(replayed: ReplayedStep, tensors: Sequence[StepTensor]) -> str:
    metrics = replayed.metrics
    bad = [tensor for tensor in tensors if tensor.nonfinite]
    first = f"The first non-finite tensor is the {bad[0].kind} {bad[0].name}." if bad else "All tensors are finite."
    return (
        f'<header><p class="name">{escape(replayed.run)}, stage {escape(replayed.stage)}</p>'
        f"<h1>Step {replayed.step:,}, replayed from {describe_start(replayed.from_step)}</h1>"
        f'<div class="best"><div class="loss">{metrics["train/loss"]:.4f}</div><div><p class="setting">'
        f"gradient norm {metrics['train/gradient_norm']:.4g}, learning rate {metrics['train/learning_rate']:.3g}</p>"
        f'<p class="unit">Training loss in nats per token. {escape(replayed.verdict)}</p></div></div>'
        f'<p class="counts{" warn" if bad else ""}">{escape(first)}</p></header>'
    )


def _render_heat_maps(tensors: Sequence[StepTensor]) -> str:
    rms_before = {tensor.name: tensor.rms for tensor in tensors if tensor.kind == PARAMETER}

    def rms(tensor: StepTensor) -> float:
        return tensor.rms

    def relative_rms(tensor: StepTensor) -> float:
        return tensor.rms / rms_before[tensor.name] if rms_before[tensor.name] else 0.0

    figures = (
        (ACTIVATION, "Activations", rms, ", in order of computation from left to right"),
        (ACTIVATION_GRADIENT, "Gradients of the activations", rms, ", computed from right to left"),
        (PARAMETER_GRADIENT, "Gradients of the parameters", rms, " before clipping"),
        (UPDATE, "Updates of the parameters", relative_rms, ", relative to that of the parameter before the step"),
    )
    rendered = []
    for kind, title, value, rest in figures:
        shown = [tensor for tensor in tensors if tensor.kind == kind][:: 1 if kind == ACTIVATION else -1]
        caption = f"Root mean square of each tensor{rest}, on a logarithmic color scale."
        rendered.append(render_heat_map(title, caption, shown, value))
    return f'<section><h2>Magnitudes</h2><div class="figures">{"".join(rendered)}</div></section>'


def render_heat_map(
    title: str, caption: str, tensors: Sequence[StepTensor], value: Callable[[StepTensor], float]
) -> str:
    """Render a figure with a row per layer and a column per path. Tensors outside the layers have a separate row."""
    positive = [each for each in map(value, tensors) if each > 0 and math.isfinite(each)]
    low, high = min(positive, default=1.0), max(positive, default=1.0)
    columns = _order_paths(tensors)

    def cell(tensor: StepTensor, has_value: bool) -> str:
        return _render_cell(tensor, value(tensor), low, high, has_value)

    has_values = len(columns) <= MAX_COLUMNS_WITH_VALUES
    cells = {(tensor.layer, tensor.path): cell(tensor, has_values) for tensor in tensors}
    heads = "".join(f"<th><span>{escape(column)}</span></th>" for column in columns)
    rows = "".join(
        f"<tr><th>{layer}</th>{''.join(cells.get((layer, column), '<td></td>') for column in columns)}</tr>"
        for layer in sorted({tensor.layer for tensor in tensors if tensor.layer is not None})
    )
    outside = "".join(
        f"<th>{escape(tensor.name)}</th>{cell(tensor, True)}" for tensor in tensors if tensor.layer is None
    )
    if outside:
        outside = f'<table class="heat numbered outside"><tbody><tr>{outside}</tr></tbody></table>'
    band = '<i class="band" style="background:var(--loss-band)"></i>'
    return (
        f'<figure class="wide"><h3>{escape(title)}</h3><div class="key"><span>{format_short(high)}{band}'
        f'{format_short(low)}</span><span><i class="red"></i>number of non-finite elements</span></div>'
        f'<div class="plot"><table class="heat{" numbered" if has_values else ""}">'
        f'<thead><tr><th class="corner">layer</th>{heads}</tr></thead><tbody>{rows}</tbody></table></div>{outside}'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _order_paths(tensors: Sequence[StepTensor]) -> list[str]:
    """Order tensor paths within layers by their mean relative position in the layers that have them."""
    layers: dict[int, list[str]] = {}
    for tensor in tensors:
        if tensor.layer is not None:
            layers.setdefault(tensor.layer, []).append(tensor.path)
    positions: dict[str, list[float]] = {}
    for paths in layers.values():
        for index, path in enumerate(paths):
            positions.setdefault(path, []).append(index / len(paths))
    return sorted(positions, key=lambda path: fmean(positions[path]))


def _render_cell(tensor: StepTensor, value: float, low: float, high: float, has_value: bool) -> str:
    tooltip = (
        f"{tensor.name}\n{tensor.kind}\nroot mean square {tensor.rms:.4g}\nnorm {tensor.norm:.4g}\n"
        f"largest magnitude {tensor.largest:.4g}\nnot finite {tensor.nonfinite:,} of {tensor.size:,}"
    )
    tip = f'data-tip="{escape(tooltip)}"'
    if tensor.nonfinite or not math.isfinite(value):
        return f'<td class="bad" {tip}>{tensor.nonfinite:,}</td>'
    text = format_short(value) if has_value else ""
    if value <= 0:
        return f'<td class="none" {tip}>{text}</td>'
    share = 1.0 - math.log(value / low) / math.log(high / low) if high > low else 0.5
    style = "faint" if share > LIGHT_FROM else "strong"
    return f'<td class="{style}" style="background:var(--{get_shade("loss", share)})" {tip}>{text}</td>'


def format_short(value: float) -> str:
    """Format a number with two significant digits and a short exponent: 0.12, 3.4e-5, 1.2e4."""
    mantissa, e, exponent = f"{value:.2g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if e else mantissa


def _render_table(tensors: Sequence[StepTensor]) -> str:
    heads = ("kind", "tensor", "root mean square", "norm", "largest", "not finite", "elements", "fingerprint")
    styles = ("", "", "number", "number", "number", "number", "number", "")
    head = "".join(f'<th class="{style}">{name}</th>' for name, style in zip(heads, styles, strict=True))
    rows = []
    for tensor in sorted(tensors, key=lambda tensor: KINDS.index(tensor.kind)):
        cells = (
            *(tensor.kind, escape(tensor.name)),
            *(format_short(tensor.rms), f"{tensor.norm:.4g}", f"{tensor.largest:.4g}"),
            *(f"{tensor.nonfinite:,}", f"{tensor.size:,}", f"<code>{tensor.fingerprint}</code>"),
        )
        row = "".join(f'<td class="{style}">{cell}</td>' for cell, style in zip(cells, styles, strict=True))
        rows.append(f"<tr{' class=broken' if tensor.nonfinite else ''}>{row}</tr>")
    return (
        "<section><h2>All tensors, in order of computation</h2>"
        '<p class="soft small">Norms and largest magnitudes are computed over the finite elements. '
        "If tensors of two runs have equal fingerprints, they are bit-identical.</p>"
        f'<div class="table tensors"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></section>"
    )
