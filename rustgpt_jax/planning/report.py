"""Tables of `explain` and `plan`: the fields of a config, its shapes and costs, and the resources of a step."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rustgpt_jax.cache_dir import cache_folder
from rustgpt_jax.config.schema import Config, Stage, flatten, replace_paths, stages, uses_epochs
from rustgpt_jax.data.preprocess import fill_vocab_size, load_or_train_tokenizer, resolve_epochs_of_text
from rustgpt_jax.errors import UserError, suggest_names
from rustgpt_jax.model.flops import forward_flops_per_token, parameter_shapes, total_bytes, total_size
from rustgpt_jax.planning.estimate import (
    RESERVE,
    Estimate,
    Suggestion,
    compute_collective_time,
    estimate,
    list_suggestions,
)
from rustgpt_jax.planning.hlo import summarize_collectives
from rustgpt_jax.pytrees import flatten_paths
from rustgpt_jax.sharding.hardware_specs import CHIPS, use_cpu_devices
from rustgpt_jax.sharding.sharding_plan import check_batch_shards, describe_mesh, plan_for_devices
from rustgpt_jax.tracking.console import format_bytes, format_count, show_spinner
from rustgpt_jax.training.config_checks import validate_components
from rustgpt_jax.training.memory_estimate import state_shapes

MAX_WARNINGS = 5
RIGHT_ALIGNED = ("size", "amount", "time", "runs", "received", "memory")
NO_WRAP = (*RIGHT_ALIGNED, "field", "path")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in columns:
        table.add_column(
            name,
            justify="right" if name in RIGHT_ALIGNED else "left",
            style="cyan" if name == "field" else "",
            overflow="fold",
            no_wrap=name in NO_WRAP,
        )
    return table


# The `explain` command.


class ConfigSummary(NamedTuple):
    """A config whose epochs are converted to steps, the origins of its values, and the vocabulary size of its model."""

    config: Config
    origins: Mapping[str, str]
    vocab_size: int | None

    def describe(self) -> dict[str, Any]:
        """Return the values of the config, the shapes of the parameters, and FLOPs and memory, as JSON has them."""
        config = replace_paths(self.config, {"model.vocab_size": self.vocab_size})
        shapes, state = parameter_shapes(config.model), state_shapes(config)
        overrides = {stage.name: dict(stage.overrides) for stage in config.stages}
        return {
            "config": {
                path: {"value": value, "origin": self.origins.get(path)} for path, value in flatten(self.config).items()
            },
            "stages": [_describe_stage(stage, overrides.get(stage.name, {})) for stage in stages(config)],
            "parameters": {
                path: {"shape": leaf.shape, "size": total_size(leaf)} for path, leaf in flatten_paths(shapes).items()
            },
            "n_parameters": total_size(shapes),
            "memory_bytes": {
                "parameters": total_bytes(state.params),
                "gradients": total_bytes(state.params),
                "optimizer": total_bytes(state.opt_state),
            },
            "cache": cache_folder(),
        }


def print_config_summary(config: Config, origins: Mapping[str, str], console: Console) -> ConfigSummary:
    """Print the fields of a config with their origins, the shapes of the parameters, and FLOPs and memory.

    Only shapes are computed. If the vocabulary depends on the corpus, the tokenizer is trained, and if the number of
    steps depends on the number of epochs, the text is encoded.
    """
    validate_components(config)
    for stage in stages(config):
        check_batch_shards(stage.config, stage.config.seq_len, jax.device_count())
    full_config = config
    if uses_epochs(config) or not config.model.vocab_size:
        tokenizer = load_or_train_tokenizer(config)
        resolved = resolve_epochs_of_text(config, tokenizer, cache_folder())
        config, origins = resolved.config, {**origins, **resolved.origins}
        for sentence in resolved.messages:
            console.print(sentence, markup=False, highlight=False, soft_wrap=True)
        full_config = fill_vocab_size(config, tokenizer)
    fields = _table("Fields", "field", "value", "origin")
    for path, value in flatten(config).items():
        origin = origins.get(path, "")
        fields.add_row(f"config.{path}", repr(value), origin, style="" if origin == "base" else "bold")
    tables = [fields]
    for stage_config in config.stages:
        tables.append(_table(f"\nStage {stage_config.name}", "field", "value"))
        for path, value in stage_config.overrides:
            tables[-1].add_row(f"config.{path}", repr(value))
    # Build all tables before printing any, since an invalid component raises.
    for table in [*tables, _parameter_table(full_config), _cost_table(full_config)]:
        console.print(table)
    return ConfigSummary(config, origins, full_config.model.vocab_size)


def _parameter_table(config: Config) -> Table:
    table = _table(
        "\nParameters (blocks are stacked: the first axis counts repeats of the pattern)", "path", "shape", "size"
    )
    shapes = parameter_shapes(config.model)
    for path, leaf in flatten_paths(shapes).items():
        table.add_row(path, " x ".join(map(str, leaf.shape)), f"{total_size(leaf):,}")
    table.add_row("total", "", f"{total_size(shapes):,}", style="bold")
    return table


def _cost_table(config: Config) -> Table:
    table = _table("\nCost", "resource", "amount", "details")
    state = state_shapes(config)
    parameters, optimizer = total_bytes(state.params), total_bytes(state.opt_state)
    parts = {"parameters": parameters, "gradients": parameters, "optimizer": optimizer}
    details = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())
    table.add_row("parameters", format_count(total_size(state.params)), format_bytes(parameters))
    table.add_row("training memory", format_bytes(sum(parts.values())), f"{details}; activations not included")
    for stage in stages(config):
        table.add_row(*_stage_costs(stage))
    table.add_row("token stores and compiled programs", "stored in", str(cache_folder()))
    return table


def _describe_stage(stage: Stage, overrides: Mapping[str, Any]) -> dict[str, Any]:
    config = stage.config
    forward = _forward_flops_per_token(config)
    tokens = config.training.steps * config.training.batch_size * config.seq_len
    return {
        "name": stage.name,
        "overrides": overrides,
        "steps": config.training.steps,
        "batch_size": config.training.batch_size,
        "seq_len": config.seq_len,
        "tokens": tokens,
        "forward_flops_per_token": forward,
        "total_flops": 3 * forward * tokens,
    }


def _forward_flops_per_token(config: Config) -> float:
    return forward_flops_per_token(dataclasses.replace(config.model, remat="none"), config.seq_len)


def _stage_costs(stage: Stage) -> tuple[str, str, str]:
    config, length = stage.config, stage.config.seq_len
    forward = _forward_flops_per_token(config)
    steps, batch_size = config.training.steps, config.training.batch_size
    tokens = steps * batch_size * length
    return (
        f"stage {stage.name}",
        f"{format_count(3 * forward)} FLOPs per token",
        f"forward {format_count(forward)}; {steps} steps of {batch_size} x {length} tokens, "
        f"{format_count(tokens)} in total, {format_count(3 * forward * tokens)} FLOPs",
    )


# The `plan` command.


class StepPlan(NamedTuple):
    """The estimate of a step and, if it does not fit, the changes that were tried."""

    chip_name: str
    found: Estimate
    tried: Sequence[tuple[Suggestion, Estimate]]

    def describe(self) -> dict[str, Any]:
        """Return the resources of the step per device, as JSON has them."""
        found = self.found
        compiled, memory = found.compiled, dataclasses.asdict(found.memory)
        return {
            "chip": self.chip_name,
            "devices": found.n_devices,
            "mesh": found.mesh,
            "n_parameters": found.n_parameters,
            "fits": found.fits,
            "memory_bytes": memory | {"peak": found.memory.peak, "available": found.room},
            "seconds": dataclasses.asdict(found.seconds)
            | {"overlapped": found.seconds.overlapped, "exposed": found.seconds.exposed},
            "limit": found.seconds.limit,
            "model_flops_utilization": [
                found.utilization(found.seconds.exposed),
                found.utilization(found.seconds.overlapped),
            ],
            "flops": {"model": found.model_flops, "compiled": compiled.flops},
            "traffic_bytes": {"memory": compiled.traffic, "collectives": sum(e.total for e in compiled.collectives)},
            "warnings": compiled.warnings,
            "suggestions": [
                {
                    "overrides": change.values,
                    "fits": changed.fits,
                    "peak_bytes": changed.memory.peak,
                    "seconds": changed.seconds.overlapped,
                }
                for change, changed in self.tried
            ],
        }


def print_plan(config: Config, chip_name: str, n_devices: int, console: Console) -> StepPlan:
    """Print the resources of a step of a config per chip, and return them.

    No parameters are allocated and no data are read. JAX, which must not have been used, gets virtual devices.

    Raises:
        UserError: The chip is unknown, the mesh or the batch does not match the number of devices, or the size of the
            vocabulary is unknown.
    """
    if chip_name not in CHIPS:
        raise UserError(f"--chip: unknown {chip_name!r}.{suggest_names(chip_name, CHIPS)}")
    validate_components(config)
    config = max((stage.config for stage in stages(set_vocab_size(config))), key=lambda config: config.seq_len)
    length, chip = config.seq_len, CHIPS[chip_name]
    check_batch_shards(config, length, n_devices)
    devices = _virtual_devices(n_devices)

    def run_estimate(config: Config) -> Estimate:
        return estimate(config, length, plan_for_devices(config.mesh, devices), chip)

    with show_spinner(console, "compiling the step"):
        found = run_estimate(config)
    print_estimate(found, chip_name, console)
    tried = list[tuple[Suggestion, Estimate]]()
    if not found.fits:
        with show_spinner(console, "trying changes that save memory"):
            tried += _try_suggestions(found, run_estimate)
        print_suggestions(tried, found.room, console)
    return StepPlan(chip_name, found, tried)


def set_vocab_size(config: Config) -> Config:
    """Set the vocabulary size of the model or else of the tokenizer. Raises UserError if neither is set."""
    size = config.model.vocab_size or config.tokenizer.vocab_size
    if size is None:
        raise UserError(
            f"config.model.vocab_size is None, and the size of a {config.tokenizer.name} vocabulary depends on the "
            "corpus, which plan does not read: give --config.model.vocab_size=N."
        )
    return replace_paths(config, {"model.vocab_size": size})


def _virtual_devices(count: int) -> list[jax.Device]:
    jax.config.update("jax_platforms", "cpu")
    # The programs are never run, so do not cache them. The compiler would not repeat its warnings for a cached one.
    jax.config.update("jax_enable_compilation_cache", False)
    use_cpu_devices(count)
    devices = jax.devices()
    if len(devices) < count:
        raise UserError(
            f"XLA_FLAGS sets the number of virtual devices to {len(devices)}, but plan needs {count}: remove "
            "--xla_force_host_platform_device_count from it."
        )
    return devices[:count]


def _try_suggestions(
    found: Estimate, run_estimate: Callable[[Config], Estimate]
) -> Iterator[tuple[Suggestion, Estimate]]:
    """Estimate the suggestions of each kind, up to the first that fits."""
    for kind in list_suggestions(found.config, found.seq_len, found.n_devices):
        for suggestion in kind:
            changed = run_estimate(suggestion.apply_to(found.config))
            yield suggestion, changed
            if changed.fits:
                break


def print_estimate(found: Estimate, chip_name: str, console: Console) -> None:
    """Print the resources of a step per device, and the compiler's warnings."""
    training = found.config.training
    parts = f" in {training.grad_accum_steps} microbatches" if training.grad_accum_steps > 1 else ""
    console.print(
        f"{format_count(found.n_parameters)} parameters on {found.n_devices} {chip_name} ({describe_mesh(found.mesh)})"
        f"; {training.batch_size} sequences of {found.seq_len:,} tokens per step{parts}. All numbers are per device.\n",
        highlight=False,
    )
    console.print(_memory_table(found), _time_table(found))
    if found.compiled.collectives:
        console.print(_collective_table(found))
    console.print(
        Text("\nIt fits." if found.fits else "\nIt does not fit.", style="bold"), _verdict(found), highlight=False
    )
    for warning in found.compiled.warnings[:MAX_WARNINGS]:
        console.print(f"Compiler warning: {warning}", style="yellow", highlight=False, markup=False)
    if (more := len(found.compiled.warnings) - MAX_WARNINGS) > 0:
        console.print(f"and {more} more warnings", style="yellow", highlight=False)


def print_suggestions(tried: Sequence[tuple[Suggestion, Estimate]], room: float, console: Console) -> None:
    """Print the effect of each change of a step that does not fit, and which changes make it fit."""
    if not tried:
        console.print("No single change saves memory: use more devices.", highlight=False)
        return
    table = _table("Single changes, each compiled", "change", "memory", "fits", "step")
    for change, found in tried:
        low, high = _format_time(found.seconds.overlapped), _format_time(found.seconds.exposed)
        table.add_row(
            str(change),
            format_bytes(found.memory.peak),
            "yes" if found.fits else "no",
            low if low == high else f"{low} to {high}",
            style="bold" if found.fits else "",
        )
    console.print(table)
    if not any(found.fits for _, found in tried):
        least = min(found.memory.peak for _, found in tried)
        console.print(
            f"None of these alone makes it fit: the smallest needs {format_bytes(least)} of {format_bytes(room)}. "
            "Combine several, or use more devices.",
            highlight=False,
        )


def _memory_table(found: Estimate) -> Table:
    memory = found.memory
    table = _table("Memory", "what", "size", "how it is known")
    rows = {
        "parameters": (memory.parameters, "counted"),
        "optimizer state": (
            memory.optimizer,
            f"counted; {format_bytes(memory.host)} in host memory" if memory.host else "counted",
        ),
        "batch": (memory.batch, "counted"),
        "gradients": (memory.gradients, "counted, like the parameters"),
        "activations and temporary copies": (memory.activations, "the rest of the peak"),
    }
    for what, (size, origin) in rows.items():
        table.add_row(what, format_bytes(size), origin)
    table.add_row("peak", format_bytes(memory.peak), "the compiled step", style="bold")
    reserve = f"of {format_bytes(found.chip.memory)}; {RESERVE:.0%} is reserved for driver, collectives and gaps"
    table.add_row("available", format_bytes(found.room), reserve)
    return table


def _time_table(found: Estimate) -> Table:
    compiled, seconds, chip = found.compiled, found.seconds, found.chip
    table = _table("\nOne step at the chip's peak rates", "what", "amount", "time", "details")
    ratio = compiled.flops / found.model_flops if found.model_flops else 1.0
    table.add_row(
        "matrix products",
        f"{format_count(compiled.flops)} FLOPs",
        _format_time(seconds.compute),
        f"{ratio:.2f} times the model's {format_count(found.model_flops)}, including recomputation "
        f"(XLA, which counts loops once: {format_count(compiled.counted_once)})",
    )
    bandwidth = f"at least, at {format_bytes(chip.bandwidth)}/s"
    table.add_row("memory", format_bytes(compiled.traffic), _format_time(seconds.memory), bandwidth)
    received = sum(each.total for each in compiled.collectives)
    if received:
        links, network = f"{format_bytes(chip.links)}/s", f"{format_bytes(chip.network)}/s"
        details = f"links of {links} to {chip.linked} chips, network of {network}"
        table.add_row("collectives", format_bytes(received), _format_time(seconds.collectives), details)
    return table


def _collective_table(found: Estimate) -> Table:
    table = _table("\nCollectives", "kind", "over", "runs", "received", "time")
    for (kind, axes), total in summarize_collectives(found.compiled.collectives, found.mesh).items():
        same = (each for each in found.compiled.collectives if (each.kind, each.axes(found.mesh)) == (kind, axes))
        seconds = sum(compute_collective_time(each, found.chip) for each in same)
        table.add_row(kind, " and ".join(axes), f"{total.count:,}", format_bytes(total.received), _format_time(seconds))
    return table


def _verdict(found: Estimate) -> str:
    low, high = found.seconds.overlapped, found.seconds.exposed
    best = f"A step takes at least {_format_time(low)}, at {found.utilization(low):.0%} model FLOPs "
    limit = f"{found.seconds.limit} is the limit"
    if low == high:
        return f"{best}utilization: {limit}."
    return (
        f"{best}utilization, if everything overlaps ({limit}), or {_format_time(high)}, at "
        f"{found.utilization(high):.0%}, if it waits for each collective."
    )


def _format_time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
