"""What a sweep would do, before it does anything: its trials, shape classes, memory and cost."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from rustgpt_jax.parallel.machine import Machine
from rustgpt_jax.runs.formatting import byte_size, count
from rustgpt_jax.sweeps.planner import Plan, plan, shape_classes
from rustgpt_jax.sweeps.shelf import Shelf
from rustgpt_jax.sweeps.trials import Trial, in_words


def preview(
    trials: Sequence[Trial], shelf: Shelf, machine: Machine, mode: str, width: int | None, console: Console
) -> None:
    """Print the trials, and how each shape class would run on a machine. No device is used."""
    plans = [plan(each, machine, mode, width) for each in shape_classes(trials, shelf)]
    console.print(_trials(plans))
    console.print(_classes(plans))
    tokens = sum(len(each.shape_class.trials) * each.shape_class.cost.tokens for each in plans)
    flops = sum(len(each.shape_class.trials) * each.shape_class.cost.total_flops for each in plans)
    programs = "program" if len(plans) == 1 else "programs"
    total = f"{len(trials)} trials, {len(plans)} {programs} to compile, {count(tokens)} tokens, {count(flops)} FLOPs"
    console.print(f"\n{total}. Nothing was run.", highlight=False)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in columns:
        table.add_column(name, overflow="fold", no_wrap=name in ("trial", "class"))
    return table


def _trials(plans: Sequence[Plan]) -> Table:
    table = _table("Trials", "trial", "class", "knobs")
    for number, each in enumerate(plans, start=1):
        for trial in each.shape_class.trials:
            table.add_row(trial.id, str(number), in_words(trial.overrides))
    return table


def _classes(plans: Sequence[Plan]) -> Table:
    columns = ("class", "trials", "parameters", "memory", "FLOPs a trial", "mode", "why")
    table = _table("\nShape classes: the trials of each share one compiled program", *columns)
    for number, each in enumerate(plans, start=1):
        cost, n_trials = each.shape_class.cost, len(each.shape_class.trials)
        lanes = f"{each.mode} x {each.width}" if each.width > 1 else each.mode
        memory = byte_size(each.memory)
        table.add_row(
            str(number), str(n_trials), count(cost.parameters), memory, count(cost.total_flops), lanes, each.reason
        )
    return table
