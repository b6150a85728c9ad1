"""The `sweep` command: runs a sweep, or previews it, and writes its report."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rustgpt_jax.errors import UserError
from rustgpt_jax.sharding.compilation_cache import enable_compilation_cache
from rustgpt_jax.sharding.hardware_specs import Machine, detect_machine, use_cores_as_devices
from rustgpt_jax.sweeps import search
from rustgpt_jax.sweeps.asset_cache import AssetCache
from rustgpt_jax.sweeps.planner import Plan, group_by_shape, make_plan
from rustgpt_jax.sweeps.report import report
from rustgpt_jax.sweeps.search_space import TPE, Overrides, Search, SuccessiveHalving
from rustgpt_jax.sweeps.sweep import Sweep, SweepInfo, SweepOptions, check_options, check_trials, open_sweep
from rustgpt_jax.sweeps.trials import Trial, describe_overrides
from rustgpt_jax.tracking.formatting import format_bytes, format_count
from rustgpt_jax.tracking.progress import show_progress, show_spinner
from rustgpt_jax.training.config_checks import validate_components
from rustgpt_jax.training.memory_estimate import check_training_memory

# What a sweep would do, before it does anything: its trials, shape classes, memory and cost.


def print_preview(
    trials: Sequence[Trial],
    shelf: AssetCache,
    machine: Machine,
    mode: str,
    width: int | None,
    console: Console,
    search: Search | None = None,
) -> None:
    """Print the trials and the cost of each shape class on a machine, without using a device.

    For an Optuna search, `trials` are sample points, and the cost is estimated from the first that can run.

    Raises:
        UserError: A trial, or every point of a search, cannot run on the machine.
    """
    is_open = isinstance(search, TPE)
    plans, errors = [], []
    for each in group_by_shape(trials, shelf):
        try:
            plans.append(make_plan(each, machine, mode, width))
        except UserError as error:
            errors.append(error)
    # A search skips points that cannot run here.
    if errors and not (is_open and plans):
        raise errors[0]
    console.print(_trials(plans, "Examples of the search's points" if is_open else "Trials"))
    console.print(_classes(plans))
    tokens = sum(len(each.shape_class.trials) * each.shape_class.cost.tokens for each in plans)
    flops = sum(len(each.shape_class.trials) * each.shape_class.cost.total_flops for each in plans)
    programs = f"{len(plans)} {'program' if len(plans) == 1 else 'programs'} to compile"
    total = f"{len(trials)} trials, {programs}, {format_count(tokens)} tokens, {format_count(flops)} FLOPs"
    if isinstance(search, SuccessiveHalving):
        total += " if none of them is pruned"
    if isinstance(search, TPE):
        cost = plans[0].shape_class.cost
        points = f"{search.n_trials} points" + f" with {len(search.seeds)} seeds each" * bool(search.seeds)
        total = (
            f"A search of {search.n_runs} trials ({points}, {search.batch} points at a time). If all are as the first "
            f"of these examples: {format_count(search.n_runs * cost.tokens)} tokens, "
            f"{format_count(search.n_runs * cost.total_flops)} FLOPs"
        )
    console.print(f"\n{total}. Nothing was run.", highlight=False)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in columns:
        table.add_column(name, overflow="fold", no_wrap=name in ("trial", "class"))
    return table


def _trials(plans: Sequence[Plan], title: str) -> Table:
    table = _table(title, "trial", "class", "knobs")
    for number, each in enumerate(plans, start=1):
        for trial in each.shape_class.trials:
            table.add_row(trial.id, str(number), describe_overrides(trial.overrides))
    return table


def _classes(plans: Sequence[Plan]) -> Table:
    columns = ("class", "trials", "parameters", "memory", "FLOPs a trial", "mode", "why")
    table = _table("\nShape classes: the trials of each share one compiled program", *columns)
    for number, each in enumerate(plans, start=1):
        cost, n_trials = each.shape_class.cost, len(each.shape_class.trials)
        lanes = f"{each.mode} x {each.width}" if each.width > 1 else each.mode
        memory = format_bytes(each.memory)
        table.add_row(
            str(number),
            str(n_trials),
            format_count(cost.parameters),
            memory,
            format_count(cost.total_flops),
            lanes,
            each.reason,
        )
    return table


Spec = Sequence[Overrides] | SuccessiveHalving | TPE


@dataclass(frozen=True)
class Command:
    """The arguments of the `sweep` command."""

    about: SweepInfo
    settings: SweepOptions
    dry_run: bool
    is_oversubscribed: bool = False


def run_sweep(
    tree: Any, spec: Spec, trials: Sequence[Trial], fixed: Sequence[str], path: Path, command: Command, console: Console
) -> int:
    """Run a sweep in a folder and write its report.

    `trials` are the trials known in advance; for an Optuna search, examples to validate the config with.

    Returns:
        The exit status: 1 if trials failed, or that of a stop if it was stopped.
    """
    check_options(command.settings)
    use_cores_as_devices()
    enable_compilation_cache()
    if isinstance(spec, SuccessiveHalving | TPE):
        search.check_validation(trials)
    if isinstance(spec, SuccessiveHalving):
        search.check_rungs(spec, trials)
    if not (command.dry_run or command.is_oversubscribed or command.settings.launcher == "slurm"):
        _check_memory(trials, isinstance(spec, TPE))
    with show_progress(console, "characters read and encoded") as progress, show_spinner(console, "reading the data"):
        shelf = AssetCache(progress=progress)
        if isinstance(spec, TPE):
            _check_points(trials, shelf)
        else:
            check_trials(trials, shelf)
    if command.dry_run:
        search_only = spec if isinstance(spec, SuccessiveHalving | TPE) else None
        print_preview(
            trials, shelf, detect_machine(), command.settings.mode, command.settings.width, console, search_only
        )
        return 0
    with open_sweep(path, command.about, command.settings, shelf, console) as sweep:
        match spec:
            case SuccessiveHalving():
                search.run_successive_halving(sweep, spec, trials)
            case TPE():
                skipped = search.run_tpe(sweep, spec, tree, fixed, sweep.shelf, sweep.check)
                if skipped:
                    points = "1 point was" if len(skipped) == 1 else f"{len(skipped)} points were"
                    sweep.message(f"{points} skipped, the last because: {skipped[-1]}")
            case _:
                sweep.add(trials)
                sweep.run(trials)
    return _finish(sweep, path, command.settings.launcher, console)


def _check_points(points: Sequence[Trial], shelf: AssetCache) -> None:
    """Check points of a search.

    Raises:
        UserError: A part does not exist, or the text is unsuitable for every point.
    """
    errors = []
    for each in points:
        validate_components(each.config)
    for each in points:
        try:
            return check_trials([each], shelf)
        except UserError as error:
            errors.append(error)
    raise errors[0]


def _check_memory(trials: Sequence[Trial], is_search: bool = False) -> None:
    """Check that trials fit the memory of this machine when they run alone.

    Points of a search are allowed to be too large as long as some fit; those trials fail.

    Raises:
        UserError: A trial does not fit.
    """
    machine = detect_machine()
    if machine.platform == "cpu":
        machine = replace(machine, n_devices=1, memory=machine.n_devices * machine.memory)
    errors = []
    for trial in trials:
        mesh = {axis: max(1, size) for axis, size in asdict(trial.config.mesh).items()}
        try:
            check_training_memory(trial.config, machine, mesh)
        except UserError as error:
            errors.append(UserError(f"The trial {describe_overrides(trial.overrides)} is invalid: {error}"))
    if errors and not (is_search and len(errors) < len(trials)):
        raise errors[0]


def _finish(sweep: Sweep, path: Path, launcher: str, console: Console) -> int:
    if sweep.stop:
        again = "The same command goes on from there."
        what = "its jobs go on" if launcher == "slurm" else "what was running is saved"
        console.print(f"Stopped by {sweep.stop.signal_name}; {what}. {again}", highlight=False)
        return sweep.stop.exit_status
    try:
        console.print(f"Report: {report(path, console)}", highlight=False, soft_wrap=True)
    except UserError as error:
        # All of them diverged or failed: that is what the sweep found.
        console.print(str(error), highlight=False, soft_wrap=True)
        return 1
    return 1 if sweep.failed() else 0
