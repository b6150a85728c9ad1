"""A plan as tables: memory, time and collectives of each device, and changes that would make a step fit."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from rustgpt_jax.planning.collectives import summary
from rustgpt_jax.planning.estimate import RESERVE, Change, Estimate, collective_seconds
from rustgpt_jax.sharding.mesh import in_words
from rustgpt_jax.tracking.formatting import byte_size, count

MOST_WARNINGS = 5


def show(found: Estimate, chip_name: str, console: Console) -> None:
    """Print what a step needs of each device, and the compiler's warnings."""
    training = found.config.training
    parts = f" in {training.grad_accum_steps} parts" if training.grad_accum_steps > 1 else ""
    console.print(
        f"{count(found.n_parameters)} parameters on {found.n_devices} {chip_name} ({in_words(found.mesh)}); "
        f"{training.batch_size} windows of {found.window:,} tokens a step{parts}. What follows is for each device.\n",
        highlight=False,
    )
    console.print(_memory(found), _work(found), *([_collectives(found)] if found.compiled.collectives else []))
    console.print(_verdict(found), highlight=False)
    for warning in found.compiled.warnings[:MOST_WARNINGS]:
        console.print(f"The compiler warns: {warning}", style="yellow", highlight=False, markup=False)
    if (more := len(found.compiled.warnings) - MOST_WARNINGS) > 0:
        console.print(f"and {more} warnings more", style="yellow", highlight=False)


def show_changes(tried: Sequence[tuple[Change, Estimate]], room: float, console: Console) -> None:
    """Print what each change of a step that does not fit would do, and which would make it fit."""
    if not tried:
        console.print("There is no single change to try: give more devices.", highlight=False)
        return
    table = _table("Single changes, each compiled", "change", "memory", "fits", "step")
    for change, found in tried:
        table.add_row(
            str(change),
            byte_size(found.memory.peak),
            "yes" if found.fits else "no",
            _bounds(found),
            style="bold" if found.fits else "",
        )
    console.print(table)
    if not any(found.fits for _, found in tried):
        least = min(found.memory.peak for _, found in tried)
        console.print(
            f"None of these alone makes it fit: the least takes {byte_size(least)} of {byte_size(room)}. Take several "
            "together, or more devices.",
            highlight=False,
        )


def _memory(found: Estimate) -> Table:
    memory = found.memory
    table = _table("Memory", "what", "size", "how it is known")
    rows = {
        "parameters": (memory.parameters, "counted"),
        "optimizer state": (memory.optimizer, "counted"),
        "batch": (memory.batch, "counted"),
        "gradients": (memory.gradients, "counted: as the parameters"),
        "activations, and copies in the step": (memory.activations, "what the compiler needs beside these"),
    }
    for what, (size, origin) in rows.items():
        table.add_row(what, byte_size(size), origin)
    table.add_row("at its fullest", byte_size(memory.peak), "the compiled step", style="bold")
    reserve = f"of {byte_size(found.chip.memory)}; {RESERVE:.0%} is kept for driver, collectives and gaps"
    table.add_row("there is", byte_size(found.room), reserve)
    return table


def _work(found: Estimate) -> Table:
    compiled, seconds, chip = found.compiled, found.seconds, found.chip
    table = _table("\nOne step at the chip's peak", "what", "how much", "takes", "of which")
    again = compiled.flops / found.model_flops if found.model_flops else 1.0
    table.add_row(
        "matrix products",
        f"{count(compiled.flops)} FLOPs",
        _time(seconds.compute),
        f"{again:.2f} times the model's own {count(found.model_flops)}, with what is computed again or twice "
        f"(XLA, loops once: {count(compiled.counted_once)})",
    )
    table.add_row(
        "memory", byte_size(compiled.traffic), _time(seconds.memory), f"at least, at {byte_size(chip.bandwidth)}/s"
    )
    received = sum(each.total for each in compiled.collectives)
    if received:
        links = f"links of {byte_size(chip.links)}/s to {chip.linked} chips, network of {byte_size(chip.network)}/s"
        table.add_row("collectives", byte_size(received), _time(seconds.collectives), links)
    return table


def _collectives(found: Estimate) -> Table:
    table = _table("\nCollectives", "kind", "over", "runs", "received", "takes")
    for (kind, axes), total in summary(found.compiled.collectives, found.mesh).items():
        same = (each for each in found.compiled.collectives if (each.kind, each.axes(found.mesh)) == (kind, axes))
        seconds = sum(collective_seconds(each, found.chip) for each in same)
        table.add_row(kind, " and ".join(axes), f"{total.count:,}", byte_size(total.received), _time(seconds))
    return table


def _verdict(found: Estimate) -> str:
    low, high = found.seconds.overlapped, found.seconds.exposed
    fits = "It fits." if found.fits else "It does not fit."
    best = f"{_time(low)}, at {found.utilization(low):.0%} model FLOPs utilisation"
    if low == high:
        return f"\n[bold]{fits}[/] A step takes at least {best}: {found.seconds.limit} is the limit."
    return (
        f"\n[bold]{fits}[/] A step takes at least {best}, if all of it goes on at the same time ({found.seconds.limit} "
        f"is the limit), or {_time(high)}, at {found.utilization(high):.0%}, if it waits for each collective."
    )


def _bounds(found: Estimate) -> str:
    low, high = _time(found.seconds.overlapped), _time(found.seconds.exposed)
    return low if low == high else f"{low} to {high}"


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in columns:
        right = name in ("size", "how much", "takes", "runs", "received", "memory")
        table.add_column(name, justify="right" if right else "left", overflow="fold", no_wrap=right)
    return table
