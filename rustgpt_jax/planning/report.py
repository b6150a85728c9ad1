"""Tables of memory, time and collectives per device, and of changes that make a step fit."""

from collections.abc import Callable, Iterator, Sequence

import jax
from rich.console import Console
from rich.table import Table

from rustgpt_jax.config.schema import Config, Stage, replace_paths, stages
from rustgpt_jax.errors import UserError, suggest_names
from rustgpt_jax.planning.estimate import (
    RESERVE,
    Estimate,
    Suggestion,
    compute_collective_time,
    estimate,
    list_suggestions,
)
from rustgpt_jax.planning.hlo import summarize_collectives
from rustgpt_jax.sharding.hardware_specs import CHIPS, use_cpu_devices
from rustgpt_jax.sharding.sharding_plan import check_batch_shards, describe_mesh, plan_for_devices
from rustgpt_jax.tracking.formatting import format_bytes, format_count
from rustgpt_jax.tracking.progress import show_spinner
from rustgpt_jax.training.config_checks import validate_components

MOST_WARNINGS = 5


def print_estimate(found: Estimate, chip_name: str, console: Console) -> None:
    """Print the resources of a step per device, and the compiler's warnings."""
    training = found.config.training
    parts = f" in {training.grad_accum_steps} parts" if training.grad_accum_steps > 1 else ""
    console.print(
        f"{format_count(found.n_parameters)} parameters on {found.n_devices} {chip_name} ({describe_mesh(found.mesh)})"
        f"; {training.batch_size} windows of {found.window:,} tokens a step{parts}. What follows is for each device.\n",
        highlight=False,
    )
    console.print(_memory(found), _work(found), *([_collectives(found)] if found.compiled.collectives else []))
    console.print(_verdict(found), highlight=False)
    for warning in found.compiled.warnings[:MOST_WARNINGS]:
        console.print(f"The compiler warns: {warning}", style="yellow", highlight=False, markup=False)
    if (more := len(found.compiled.warnings) - MOST_WARNINGS) > 0:
        console.print(f"and {more} warnings more", style="yellow", highlight=False)


def print_suggestions(tried: Sequence[tuple[Suggestion, Estimate]], room: float, console: Console) -> None:
    """Print the effect of each change of a step that does not fit, and which make it fit."""
    if not tried:
        console.print("There is no single change to try: give more devices.", highlight=False)
        return
    table = _table("Single changes, each compiled", "change", "memory", "fits", "step")
    for change, found in tried:
        table.add_row(
            str(change),
            format_bytes(found.memory.peak),
            "yes" if found.fits else "no",
            _bounds(found),
            style="bold" if found.fits else "",
        )
    console.print(table)
    if not any(found.fits for _, found in tried):
        least = min(found.memory.peak for _, found in tried)
        console.print(
            f"None of these alone makes it fit: the least takes {format_bytes(least)} of {format_bytes(room)}. Take "
            "several together, or more devices.",
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
        table.add_row(what, format_bytes(size), origin)
    table.add_row("at its fullest", format_bytes(memory.peak), "the compiled step", style="bold")
    reserve = f"of {format_bytes(found.chip.memory)}; {RESERVE:.0%} is kept for driver, collectives and gaps"
    table.add_row("there is", format_bytes(found.room), reserve)
    return table


def _work(found: Estimate) -> Table:
    compiled, seconds, chip = found.compiled, found.seconds, found.chip
    table = _table("\nOne step at the chip's peak", "what", "how much", "takes", "of which")
    again = compiled.flops / found.model_flops if found.model_flops else 1.0
    table.add_row(
        "matrix products",
        f"{format_count(compiled.flops)} FLOPs",
        _time(seconds.compute),
        f"{again:.2f} times the model's own {format_count(found.model_flops)}, with what is computed again or twice "
        f"(XLA, loops once: {format_count(compiled.counted_once)})",
    )
    table.add_row(
        "memory",
        format_bytes(compiled.traffic),
        _time(seconds.memory),
        f"at least, at {format_bytes(chip.bandwidth)}/s",
    )
    received = sum(each.total for each in compiled.collectives)
    if received:
        links = (
            f"links of {format_bytes(chip.links)}/s to {chip.linked} chips, network of {format_bytes(chip.network)}/s"
        )
        table.add_row("collectives", format_bytes(received), _time(seconds.collectives), links)
    return table


def _collectives(found: Estimate) -> Table:
    table = _table("\nCollectives", "kind", "over", "runs", "received", "takes")
    for (kind, axes), total in summarize_collectives(found.compiled.collectives, found.mesh).items():
        same = (each for each in found.compiled.collectives if (each.kind, each.axes(found.mesh)) == (kind, axes))
        seconds = sum(compute_collective_time(each, found.chip) for each in same)
        table.add_row(kind, " and ".join(axes), f"{total.count:,}", format_bytes(total.received), _time(seconds))
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


# The `plan` command.


def print_plan(config: Config, chip_name: str, n_devices: int, console: Console) -> bool:
    """Print the resources of a step of a config per chip, and return whether it fits.

    Nothing of the model is allocated, no data are read, and JAX, which must not have been used, gets as many virtual
    devices. Raises UserError for a chip that there is not, for a mesh or a batch that does not suit the number of
    devices, and for a config whose vocabulary only a tokenizer would tell.
    """
    if chip_name not in CHIPS:
        raise UserError(f"--chip: unknown {chip_name!r}.{suggest_names(chip_name, CHIPS)}")
    validate_components(config)
    config, window = _longest(set_vocab_size(config))
    check_batch_shards(config, window, n_devices)
    devices = _virtual_devices(n_devices)
    chip = CHIPS[chip_name]

    def estimated(config: Config) -> Estimate:
        return estimate(config, window, plan_for_devices(config.mesh, devices), chip)

    with show_spinner(console, "compiling the step"):
        found = estimated(config)
    print_estimate(found, chip_name, console)
    if not found.fits:
        with show_spinner(console, "looking for a change that makes it fit"):
            tried = list(_tried(found, estimated))
        print_suggestions(tried, found.room, console)
    return found.fits


def set_vocab_size(config: Config) -> Config:
    """Set the vocabulary size of the model or else of the tokenizer. Raises UserError if neither is set."""
    size = config.model.vocab_size or config.tokenizer.vocab_size
    if size is None:
        raise UserError(
            f"config.model.vocab_size is None, and a tokenizer of {config.tokenizer.name}s has no size of its own: "
            "give --config.model.vocab_size=N, for plan reads no text."
        )
    return replace_paths(config, {"model.vocab_size": size})


def _longest(config: Config) -> tuple[Config, int]:
    """Return the config of the stage with the longest sequences, and their length."""

    def window(stage: Stage) -> int:
        return stage.config.data.seq_len or stage.config.model.context_length

    longest = max(stages(config), key=window)
    return longest.config, window(longest)


def _virtual_devices(count: int) -> list[jax.Device]:
    jax.config.update("jax_platforms", "cpu")
    # What is compiled only to be looked at is not worth keeping, and what is found in a cache comes without warnings.
    jax.config.update("jax_enable_compilation_cache", False)
    use_cpu_devices(count)
    devices = jax.devices()
    if len(devices) < count:
        raise UserError(
            f"XLA_FLAGS says how many virtual devices there are, {len(devices)}, and plan needs {count}: take "
            "--xla_force_host_platform_device_count out of it."
        )
    return devices[:count]


def _tried(found: Estimate, estimated: Callable[[Config], Estimate]) -> Iterator[tuple[Suggestion, Estimate]]:
    """Try the changes of each kind, up to the first that fits."""
    for of_kind in list_suggestions(found.config, found.window, found.n_devices):
        for change in of_kind:
            changed = estimated(change.of(found.config))
            yield change, changed
            if changed.fits:
                break
