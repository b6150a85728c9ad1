"""Tables of `explain` and `plan`: the fields of a config, its shapes and costs, and the resources of a step."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rustgpt_jax.cache_dir import cache_folder
from rustgpt_jax.config.schema import Config, ModelConfig, Stage, flatten, replace_paths, stages, uses_epochs
from rustgpt_jax.data.preprocess import fill_vocab_size, load_or_train_tokenizer, resolve_epochs_of_text
from rustgpt_jax.errors import UserError, suggest_names
from rustgpt_jax.model.block import layer_groups
from rustgpt_jax.model.flops import forward_flops_per_token, parameter_shapes, total_bytes, total_size
from rustgpt_jax.planning.estimate import (
    RESERVE,
    Estimate,
    Suggestion,
    compute_collective_time,
    estimate,
    list_suggestions,
    replace_device_kernels,
)
from rustgpt_jax.planning.hlo import summarize_collectives
from rustgpt_jax.planning.program_costs import (
    PASSES,
    RECOMPUTED,
    ProgramCosts,
    count_program_costs,
    lower_decode_step,
    lower_train_step,
)
from rustgpt_jax.pytrees import flatten_paths
from rustgpt_jax.sharding.hardware_specs import CHIPS, use_cpu_devices
from rustgpt_jax.sharding.sharding_plan import check_batch_shards, describe_mesh, plan_for_devices
from rustgpt_jax.tracking.console import format_bytes, format_count, show_spinner
from rustgpt_jax.training.config_checks import validate_components
from rustgpt_jax.training.memory_estimate import state_shapes

MAX_WARNINGS = 5
RIGHT_ALIGNED = ("size", "amount", "time", "runs", "received", "memory", "ops", "share", "bytes", *PASSES)
NO_WRAP = (*RIGHT_ALIGNED, "field", "path", "module")


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

    @property
    def full_config(self) -> Config:
        """The config with the vocabulary size."""
        return replace_paths(self.config, {"model.vocab_size": self.vocab_size})

    def describe(self) -> dict[str, Any]:
        """Return the values of the config, the shapes of the parameters, and FLOPs and memory, as JSON has them."""
        config = self.full_config
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


def summarize_config(config: Config, origins: Mapping[str, str], console: Console) -> ConfigSummary:
    """Check a config and find the number of its steps and the size of its vocabulary.

    If the vocabulary depends on the corpus, the tokenizer is trained, and if the number of steps depends on the number
    of epochs, the text is encoded.
    """
    validate_components(config)
    for stage in stages(config):
        check_batch_shards(stage.config, stage.config.seq_len, jax.device_count())
    vocab_size = config.model.vocab_size
    if uses_epochs(config) or not vocab_size:
        tokenizer = load_or_train_tokenizer(config)
        resolved = resolve_epochs_of_text(config, tokenizer, cache_folder())
        config, origins = resolved.config, {**origins, **resolved.origins}
        for sentence in resolved.messages:
            console.print(sentence, markup=False, highlight=False, soft_wrap=True)
        vocab_size = fill_vocab_size(config, tokenizer).model.vocab_size
    return ConfigSummary(config, origins, vocab_size)


def print_config_summary(summary: ConfigSummary, console: Console, shows_all: bool = False) -> None:
    """Print the fields of a config with their origins, the shapes of the parameters, and FLOPs and memory.

    Args:
        summary: The config. Only shapes are computed.
        console: The console.
        shows_all: Whether to print the fields that have their default values, too.
    """
    config = summary.config
    tables = [_field_table(summary, shows_all)]
    for stage_config in config.stages:
        tables.append(_table(f"\nStage {stage_config.name}", "field", "value"))
        for path, value in stage_config.overrides:
            tables[-1].add_row(f"config.{path}", repr(value))
    full_config = summary.full_config
    # Build all tables before printing any, since an invalid component raises.
    for table in [*tables, _parameter_table(full_config), _cost_table(full_config)]:
        console.print(table)


def _field_table(summary: ConfigSummary, shows_all: bool) -> Table:
    values, defaults = flatten(summary.config), flatten(Config())
    table = _table("Fields" if shows_all else "Fields that differ from the defaults", "field", "value", "origin")
    for path, value in values.items():
        is_default = value == defaults[path]
        if shows_all or not is_default:
            style = "bold" if shows_all and not is_default else ""
            table.add_row(f"config.{path}", repr(value), summary.origins.get(path, ""), style=style)
    if not shows_all:
        n_rest = len(values) - table.row_count
        table.caption, table.caption_justify = f"{n_rest} other fields have their defaults; --all shows them.", "left"
    return table


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


# The `explain --program` command.


class Programs(NamedTuple):
    """The costs of the lowered training step and decoding step of a config.

    Attributes:
        config: The config, with the kernels that were lowered.
        platform: The platform that the programs are lowered for.
        chip_name: The chip; None for the devices of this process.
        train_step: The costs of the training step.
        decode_step: The costs of the decoding step.
        xla: XLA's cost analysis of the training step; None for a chip, whose compiler may not be here.
    """

    config: Config
    platform: str
    chip_name: str | None
    train_step: ProgramCosts
    decode_step: ProgramCosts
    xla: Mapping[str, float] | None

    @property
    def model_flops(self) -> float:
        """FLOPs of a training step by the usual count, three times those of the forward pass."""
        tokens = self.config.training.batch_size * self.config.seq_len
        return 3 * tokens * _forward_flops_per_token(self.config)

    def describe(self) -> dict[str, Any]:
        """Return the costs as JSON has them."""
        return {
            "platform": self.platform,
            "chip": self.chip_name,
            "batch_size": self.config.training.batch_size,
            "seq_len": self.config.seq_len,
            "model_flops": self.model_flops,
            "xla_flops": self.xla and self.xla["flops"],
            "xla_bytes": self.xla and self.xla["bytes accessed"],
            "train_step": self.train_step.describe(),
            "decode_step": self.decode_step.describe(),
        }


def lower_programs(config: Config, chip_name: str | None) -> Programs:
    """Lower the training step and the decoding step of a config, and count their costs by module.

    Args:
        config: A config with the vocabulary size. Of several stages, the one with the longest sequences is lowered.
        chip_name: The chip to lower for; None for the devices of this process.

    Raises:
        UserError: The chip is unknown.
    """
    if chip_name is not None and chip_name not in CHIPS:
        raise UserError(f"--chip: unknown {chip_name!r}.{suggest_names(chip_name, CHIPS)}")
    config = max((stage.config for stage in stages(config)), key=lambda config: config.seq_len)
    platform = None
    if chip_name is not None:
        platform = "tpu" if CHIPS[chip_name].kind.startswith("TPU") else "cuda"
        config = replace_device_kernels(config)
    lowered = lower_train_step(config, platform)
    return Programs(
        config=config,
        platform=platform or jax.default_backend(),
        chip_name=chip_name,
        train_step=count_program_costs(lowered),
        decode_step=count_program_costs(lower_decode_step(config.model, platform)),
        xla=lowered.cost_analysis() if platform is None else None,
    )


def print_programs(programs: Programs, console: Console) -> None:
    """Print the costs of the training step and the decoding step by module."""
    config, step = programs.config, programs.train_step
    target = programs.platform + (f" ({programs.chip_name})" if programs.chip_name else "")
    sentences = [
        f"The training step of {config.training.batch_size} x {config.seq_len} tokens, lowered for {target}.",
        "FLOPs are those of matrix products; bytes are what the operations read and write if the compiler fuses none "
        "of them.",
    ]
    if programs.chip_name is not None:
        sentences.append("Portable kernels replace those of libraries, whose operations JAX does not see.")
    console.print(*sentences, highlight=False)
    _print_program_table("\nTraining step", step, config.model, 4, console)
    total, recomputed = step.total().total_flops, step.total().flops[RECOMPUTED]
    part = f", {format_count(recomputed)} of them for recomputation" if recomputed else ""
    console.print(
        f"\n{format_count(total)} FLOPs in all{part}. Three times those of the forward pass, the usual count of a "
        f"training step, are {format_count(programs.model_flops)}.",
        highlight=False,
    )
    if programs.xla is not None:
        xla_flops, xla_bytes = programs.xla["flops"], programs.xla["bytes accessed"]
        console.print(
            "XLA's cost analysis counts the body of each loop once, and other arithmetic too: "
            f"{format_count(xla_flops)} FLOPs and {format_bytes(xla_bytes)}; counted so here, "
            f"{format_count(step.once.total_flops + step.once.other_flops)} and {format_bytes(step.once.bytes)}.",
            highlight=False,
        )
    for name, count in step.library_calls.items():
        console.print(f"Calls of {name}, whose FLOPs are not known here: {count:,}.", highlight=False)
    title = f"\nDecoding step: one token of one row, with a cache of {config.model.context_length:,} tokens"
    _print_program_table(title, programs.decode_step, config.model, 3, console)


def _print_program_table(title: str, program: ProgramCosts, model: ModelConfig, depth: int, console: Console) -> None:
    # The title of a table is folded at the width of the table.
    console.print(title, style="bold", highlight=False)
    total = program.total()
    passes = [name for name, flops in total.flops.items() if flops]
    table = _table("", "module", "ops", *passes, "share", "bytes")
    rows = [*program.paths(depth), ""]
    for path in rows:
        costs = program.total(path)
        *outer, name = path.split("/") if path else ["total"]
        layers = len(layer_groups(model)[int(name)].layers) if outer == ["blocks"] and name.isdecimal() else 0
        table.add_row(
            "  " * len(outer) + name + (f" ({layers} layer{'s' * (layers > 1)})" if layers else ""),
            f"{costs.operations:,}",
            *(format_count(costs.flops[each]) if costs.flops[each] else "" for each in passes),
            f"{costs.total_flops / (total.total_flops or 1):.0%}" if costs.total_flops else "",
            format_bytes(costs.bytes),
            style="bold" if not path or not outer else "",
        )
    console.print(table)


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
