"""`replay`: a step of a run made again with the same bits, held against its record, and looked into."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from rustgpt_jax.atomic_io import NotWritableError, write_atomically
from rustgpt_jax.reproduce.html_report import page
from rustgpt_jax.reproduce.recorded_run import RecordedRun, start_of
from rustgpt_jax.reproduce.replay_step import ReplayedStep, replay_one_step
from rustgpt_jax.reproduce.step_tensors import ACTIVATION, ACTIVATION_GRADIENT, StepTensor
from rustgpt_jax.tracking.formatting import printable


def replay(path: Path, step: int, has_taps: bool, console: Console) -> bool:
    """Recompute a step of a run and print its metrics.

    With taps, also measures the step's tensors and writes them to RUN/replay/step_K.html, or to a temporary folder if
    the run folder is not writable.

    Returns:
        Whether the step matches its record bitwise, or was not meant to be recorded.

    Raises:
        UserError: As for `RecordedRun`, or the run does not have the step.
    """
    with RecordedRun(path, console) as past:
        again, inside = replay_one_step(past, step, has_taps)
    _print(again, path, console)
    if inside is not None:
        print_tensors(inside.tensors, console)
        file = write_page(path, again, inside.tensors)
        console.print(f"Each tensor of the step: {file}", highlight=False, soft_wrap=True)
    return again.is_same


def write_page(path: Path, again: ReplayedStep, tensors: Sequence[StepTensor]) -> Path:
    """Write the page of a step and return its path.

    The page goes to the run folder, or to a new temporary folder if that is not writable.
    """
    name, content = f"step_{again.step}.html", page(again, tensors)
    try:
        (path / "replay").mkdir(exist_ok=True)
        write_atomically(path / "replay" / name, content)
        return path / "replay" / name
    except (OSError, NotWritableError):
        file = Path(tempfile.mkdtemp(prefix="rustgpt_jax_replay_")) / name
        write_atomically(file, content)
        return file


def _print(again: ReplayedStep, path: Path, console: Console) -> None:
    console.print(
        f"step {again.step} of {path} (stage {printable(again.stage)}), made again from {start_of(again.from_step)}",
        highlight=False,
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False, header_style="dim")
    for head, justify in (("", "left"), ("again", "right"), ("recorded", "right"), ("", "left")):
        table.add_column(head, justify=justify)  # type: ignore[arg-type]
    recorded = again.recorded
    for name, value in again.metrics.items():
        there = f"{recorded[name]:.9g}" if name in recorded else ""
        same = ("differs" if name in again.unequal else "same bits") if name in recorded else ""
        table.add_row(name.removeprefix("train/"), f"{value:.9g}", there, same)
    console.print(table, highlight=False)
    console.print(again.verdict, highlight=False, soft_wrap=True)


def print_tensors(tensors: Sequence[StepTensor], console: Console) -> None:
    """A table with a row for each site: of all layers the one with the largest magnitude, forward and backward."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("site", no_wrap=True)
    for head in ("largest", "layer", "norm", "not finite", "gradient", "layer", "norm", "not finite"):
        table.add_column(head, justify="right", no_wrap=True)
    for site in dict.fromkeys(tensor.site for tensor in tensors if tensor.kind == ACTIVATION):
        cells: list[RenderableType] = []
        for kind in (ACTIVATION, ACTIVATION_GRADIENT):
            of_site = [tensor for tensor in tensors if tensor.kind == kind and tensor.site == site]
            worst = max(of_site, key=lambda tensor: (tensor.nonfinite, tensor.largest))
            layer = "" if worst.layer is None else str(worst.layer)
            bad = Text(f"{worst.nonfinite:,}", "red" if worst.nonfinite else "")
            cells += [f"{worst.largest:.3g}", layer, f"{worst.norm:.3g}", bad]
        table.add_row(site, *cells)
    console.print(table, highlight=False)
