"""What a sweep would do, before it does anything: its trials, shape classes, memory and cost."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from rustgpt_jax.errors import UserError
from rustgpt_jax.sharding.host_resources import Machine
from rustgpt_jax.sweeps.asset_cache import Shelf
from rustgpt_jax.sweeps.planner import Plan, plan, shape_classes
from rustgpt_jax.sweeps.search_space import Search, SuccessiveHalving, TreeParzen
from rustgpt_jax.sweeps.trials import Trial, in_words
from rustgpt_jax.tracking.formatting import byte_size, count


def preview(
    trials: Sequence[Trial],
    shelf: Shelf,
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
    is_open = isinstance(search, TreeParzen)
    plans, errors = [], []
    for each in shape_classes(trials, shelf):
        try:
            plans.append(plan(each, machine, mode, width))
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
    total = f"{len(trials)} trials, {programs}, {count(tokens)} tokens, {count(flops)} FLOPs"
    if isinstance(search, SuccessiveHalving):
        total += " if none of them is pruned"
    if isinstance(search, TreeParzen):
        cost = plans[0].shape_class.cost
        points = f"{search.n_trials} points" + f" with {len(search.seeds)} seeds each" * bool(search.seeds)
        total = (
            f"A search of {search.n_runs} trials ({points}, {search.batch} points at a time). If all are as the first "
            f"of these examples: {count(search.n_runs * cost.tokens)} tokens, "
            f"{count(search.n_runs * cost.total_flops)} FLOPs"
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
