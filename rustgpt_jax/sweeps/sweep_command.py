"""Implementation of the `sweep` command: run a sweep and write its report, or preview the sweep."""

import timeit
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from rustgpt_jax.data.preprocess import AssetCache
from rustgpt_jax.errors import UserError
from rustgpt_jax.process_setup import enable_compilation_cache
from rustgpt_jax.sharding.hardware_specs import Machine, count_cores, detect_machine, use_cpu_devices
from rustgpt_jax.sweeps import search
from rustgpt_jax.sweeps.report import report, summarize
from rustgpt_jax.sweeps.search_space import TPE, Overrides, SuccessiveHalving
from rustgpt_jax.sweeps.sweep import Sweep, SweepInfo, SweepOptions, check_options, check_trials, open_sweep
from rustgpt_jax.sweeps.sweep_dir import ENDED
from rustgpt_jax.sweeps.trial_batching import Plan, group_by_shape, make_plan, select_part
from rustgpt_jax.sweeps.trials import Trial, describe_overrides
from rustgpt_jax.tracking.console import format_bytes, format_count, format_duration, show_progress, show_spinner
from rustgpt_jax.training.memory_estimate import check_training_memory

# The share of the peak FLOP/s that training is assumed to reach. Small models reach less, above all on accelerators.
UTILIZATION = 0.3

Spec = Sequence[Overrides] | SuccessiveHalving | TPE


def print_preview(
    trials: Sequence[Trial],
    assets: AssetCache,
    machine: Machine,
    mode: str,
    width: int | None,
    console: Console,
    spec: Spec = (),
) -> "Preview":
    """Print the cost of a sweep on a machine, its trials and its shape classes, without using a device.

    For a TPE search, `trials` are sample points, and the cost is estimated from the first that can run.

    Raises:
        UserError: A trial, or every point of a search, cannot run on the machine.
    """
    is_tpe = isinstance(spec, TPE)
    plans, errors = list[Plan](), list[UserError]()
    for shape_class in group_by_shape(trials, assets):
        try:
            plans.append(make_plan(shape_class, machine, mode, width))
        except UserError as error:
            errors.append(error)
    # A search skips points that cannot run here.
    if errors and not (is_tpe and plans):
        raise errors[0]
    costs = [(len(plan.shape_class.trials), plan.shape_class.cost) for plan in plans]
    tokens, flops = sum(n * cost.tokens for n, cost in costs), sum(n * cost.total_flops for n, cost in costs)
    programs = f"{len(plans)} {'program' if len(plans) == 1 else 'programs'} to compile"
    total = f"{len(trials)} trials, {programs}, {format_count(tokens)} tokens, {format_count(flops)} FLOPs"
    if isinstance(spec, SuccessiveHalving):
        total += " if none of them is pruned"
    if isinstance(spec, TPE):
        cost = plans[0].shape_class.cost
        points = f"{spec.n_trials} points" + f" with {len(spec.seeds)} seeds each" * bool(spec.seeds)
        total = (
            f"A search of {spec.n_runs} trials ({points}, {spec.batch} points at a time). If all cost as much as the "
            f"first of these examples: {format_count(spec.n_runs * cost.tokens)} tokens, "
            f"{format_count(spec.n_runs * cost.total_flops)} FLOPs"
        )
    console.print(f"{total}. Nothing was run.\n", highlight=False)
    duration = estimate_duration(plans, machine, spec.n_runs if isinstance(spec, TPE) else None)
    console.print(f"{describe_duration(duration, machine)}\n", highlight=False)
    console.print(_trials_table(plans, "Example points of the search" if is_tpe else "Trials"))
    console.print(_classes_table(plans))
    return Preview(plans, duration)


class Duration(NamedTuple):
    """The estimated time of a sweep on a machine.

    Attributes:
        seconds: The time from start to end.
        device_seconds: The sum over devices of the time that each is busy.
        peak_flops: The peak FLOP/s of a device that the estimate is based on.
        utilization: The share of it that is assumed.
    """

    seconds: float
    device_seconds: float
    peak_flops: float
    utilization: float = UTILIZATION


class Preview(NamedTuple):
    """What a dry run finds: the plan of each shape class, and the estimated time."""

    plans: list[Plan]
    duration: Duration


def estimate_duration(plans: Sequence[Plan], machine: Machine, n_trials: int | None = None) -> Duration:
    """Estimate the time of a sweep from its FLOPs, without compilation, evaluation and checkpoints.

    Args:
        plans: The plans of all shape classes.
        machine: The machine. The peak rate of a CPU is measured with a matrix product.
        n_trials: The number of trials of a search, each of which costs as much as the first example in the plans; None
            for the trials of the plans.
    """
    flops = machine.flops or measure_core_flops()
    rate = UTILIZATION * flops

    def seconds(plan: Plan) -> float:
        """Return the time of one program, with `width` trials."""
        return plan.width * plan.shape_class.cost.total_flops / rate / (plan.devices or machine.n_devices)

    if n_trials is not None:
        total = n_trials * plans[0].shape_class.cost.total_flops / rate
    else:
        total = sum(len(plan.shape_class.trials) * plan.shape_class.cost.total_flops for plan in plans) / rate
    # Neither can all devices together be faster, nor the longest program.
    return Duration(max(total / machine.n_devices, *map(seconds, plans)), total, flops)


def describe_duration(duration: Duration, machine: Machine) -> str:
    """Describe an estimate and what it is based on."""
    device = "core" if machine.platform == "cpu" else machine.platform.upper()
    devices = f"{machine.n_devices} {device}{'s' * (machine.n_devices > 1)}"
    hours, least = duration.seconds / 3600, UTILIZATION * duration.seconds / 3600
    each = f"{duration.device_seconds / 3600:.2g} {device}-hours"
    measured = ", measured here" if machine.platform == "cpu" else ""
    peak = f"{format_bytes(duration.peak_flops).removesuffix('B')}FLOP/s per {device}{measured}"
    return (
        f"About {hours:.2g} hours ({format_duration(duration.seconds)}) on the {devices} of this machine, {each}, if "
        f"training reaches {UTILIZATION:.0%} of the peak of {peak}; at least {least:.2g} hours at that peak. "
        "Compilation, evaluation and checkpoints are not included."
    )


def measure_core_flops() -> float:
    """Measure the peak FLOP/s of one CPU core, with a float32 matrix product on all cores and without JAX."""
    matrix = np.ones((1024, 1024), np.float32)
    seconds = min(timeit.repeat(lambda: matrix @ matrix, number=1, repeat=8))
    return 2 * len(matrix) ** 3 / seconds / count_cores()


def _make_table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in columns:
        table.add_column(name, overflow="fold", no_wrap=name in ("trial", "class"))
    return table


def _trials_table(plans: Sequence[Plan], title: str) -> Table:
    table = _make_table(title, "trial", "class", "knobs")
    for number, plan in enumerate(plans, start=1):
        for trial in plan.shape_class.trials:
            table.add_row(trial.id, str(number), describe_overrides(trial.overrides))
    return table


def _classes_table(plans: Sequence[Plan]) -> Table:
    columns = ("class", "trials", "parameters", "memory", "FLOPs per trial", "mode", "reason")
    table = _make_table("\nShape classes (the trials of a class share one compiled program)", *columns)
    for number, plan in enumerate(plans, start=1):
        cost, n_trials = plan.shape_class.cost, len(plan.shape_class.trials)
        mode = f"{plan.mode} x {plan.width}" if plan.width > 1 else plan.mode
        costs = format_count(cost.parameters), format_bytes(plan.memory), format_count(cost.total_flops)
        table.add_row(str(number), str(n_trials), *costs, mode, plan.reason)
    return table


@dataclass(frozen=True)
class SweepArgs:
    """The arguments of the `sweep` command; `part` is (index, number of parts) if only a part of the trials runs."""

    info: SweepInfo
    options: SweepOptions
    dry_run: bool
    allow_oversubscription: bool = False
    part: tuple[int, int] | None = None


def run_sweep(
    tree: Any, spec: Spec, trials: Sequence[Trial], fixed: Overrides, path: Path, args: SweepArgs, console: Console
) -> tuple[int, Preview | None]:
    """Run a sweep in a folder and write its report.

    Args:
        tree: The config of the sweep.
        spec: The trials or the search, as returned by the sweep function of the config file.
        trials: The trials known in advance; for a TPE search, examples to validate the config with.
        fixed: The values of knobs set on the command line, which are not searched.
        path: The folder.
        args: The arguments of the command.
        console: The console for the preview, the progress and the report.

    Returns:
        The exit status: 1 if a trial failed, or the exit status for the signal that stopped the sweep. And what a
        dry run finds; None otherwise.
    """
    options, is_tpe = args.options, isinstance(spec, TPE)
    check_options(options)
    use_cpu_devices(count_cores())
    enable_compilation_cache()
    if isinstance(spec, SuccessiveHalving | TPE):
        search.check_validation(trials)
    if isinstance(spec, SuccessiveHalving):
        search.check_rungs(spec, trials)
    if not (args.dry_run or args.allow_oversubscription or options.launcher in ("slurm", "ray")):
        _check_each(trials, _check_memory, is_tpe)
    with show_progress(console, "characters read and encoded") as progress, show_spinner(console, "reading the data"):
        assets = AssetCache(progress=progress)
        if is_tpe:
            search.check_components(trials)
        _check_each(trials, lambda trial: check_trials([trial], assets), is_tpe)
    if args.dry_run:
        return 0, print_preview(trials, assets, detect_machine(), options.mode, options.width, console, spec)
    with open_sweep(path, args.info, options, assets, console) as sweep:
        match spec:
            case SuccessiveHalving():
                search.run_successive_halving(sweep, spec, trials)
            case TPE():
                skipped = search.run_tpe(sweep, spec, tree, fixed, sweep.check)
                if skipped:
                    points = "1 point was" if len(skipped) == 1 else f"{len(skipped)} points were"
                    sweep.message(f"{points} skipped, the last because: {skipped[-1]}")
            case _:
                sweep.add(trials)
                if args.part is None:
                    sweep.run(trials)
                else:
                    part = select_part(group_by_shape(trials, assets), args.part)
                    sweep.run(part)
                    return _finish_part(sweep, path, part, trials, options.launcher, console), None
    return _finish(sweep, path, options.launcher, console), None


def _check_each(trials: Sequence[Trial], check: Callable[[Trial], None], is_tpe: bool) -> None:
    """Check all trials, or for a TPE search, that at least one passes; raise the first UserError otherwise."""
    errors = []
    for trial in trials:
        try:
            check(trial)
            if is_tpe:
                return
        except UserError as error:
            if not is_tpe:
                raise
            errors.append(error)
    if errors:
        raise errors[0]


def _check_memory(trial: Trial) -> None:
    """Raise UserError if a trial that runs alone does not fit the memory of this machine."""
    machine = detect_machine()
    if machine.platform == "cpu":
        machine = replace(machine, n_devices=1, memory=machine.n_devices * machine.memory)
    mesh = {axis: max(1, size) for axis, size in asdict(trial.config.mesh).items()}
    try:
        check_training_memory(trial.config, machine, mesh)
    except UserError as error:
        raise UserError(f"The trial {describe_overrides(trial.overrides)} is invalid: {error}") from error


def _finish_part(
    sweep: Sweep, path: Path, part: Sequence[Trial], trials: Sequence[Trial], launcher: str, console: Console
) -> int:
    """Print how a part of a sweep ended, write the report if it was the last part, and return the exit status."""
    states = sweep.ledger.states()
    waiting = [trial for trial in trials if states[trial.id]["event"] not in ENDED]
    if sweep.stop or not waiting:
        status = _finish(sweep, path, launcher, console)
    else:
        console.print(f"This part has ended; trials of other parts that have not: {len(waiting)}.", highlight=False)
        status = 0
    if sweep.stop:
        return status
    has_none = not waiting and all(states[trial.id]["event"] != "finished" for trial in trials)
    return 1 if has_none or sweep.failed() & {trial.id for trial in part} else 0


def _finish(sweep: Sweep, path: Path, launcher: str, console: Console) -> int:
    """Print how the sweep ended, write its report, and return the exit status."""
    if sweep.stop:
        what = "its jobs continue" if launcher == "slurm" else "running trials were saved"
        console.print(f"Stopped by {sweep.stop.signal_name}; {what}. Run the same command to resume.", highlight=False)
        return sweep.stop.exit_status
    try:
        page = report(path, console)
        console.print(f"Report: {page}", highlight=False, soft_wrap=True)
        if sweep.trackers:
            sweep.write_to_trackers(summarize(path), [page, path / "results.csv"], console.print)
    except UserError as error:
        # No trial finished. This is a result of the sweep, not a usage error.
        console.print(str(error), highlight=False, soft_wrap=True)
        return 1
    return 1 if sweep.failed() else 0
