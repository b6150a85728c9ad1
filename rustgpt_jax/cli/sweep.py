"""The verbs `sweep` and `report`."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rustgpt_jax.cli.arguments import (
    MOST_PROCESSES,
    VerbParser,
    add_config_argument,
    add_oversubscription_argument,
    add_run_argument,
    add_slurm_argument,
    read_config,
    whole_number,
)
from rustgpt_jax.errors import UserError


def add_arguments(parser: VerbParser) -> None:
    """Add the flags of `sweep`."""
    add_config_argument(parser)
    parser.add_argument("--run", metavar="DIR", help="The sweep folder. Default: runs/NAME, by the config file's name.")
    parser.add_argument(
        "--sweep", metavar="NAME", default="sweep", help="The sweep to run: the config file's function sweep_NAME()."
    )
    parser.add_argument("--launcher", metavar="inline|processes|slurm", default="inline", help="Where the trials run.")
    parser.add_argument(
        "--mode",
        metavar="auto|fused|exact|solo",
        default="auto",
        help="How trials of equal shapes run: fused (vmap), exact (sequentially in one program), or solo (one by one).",
    )
    parser.add_argument(
        "--width",
        metavar="N",
        type=whole_number(1, MOST_PROCESSES),
        help="The most trials in one program. Default: as many as fit in memory and help.",
    )
    parser.add_argument(
        "--workers",
        metavar="N",
        type=whole_number(1, MOST_PROCESSES),
        help="Worker processes, or cluster jobs at a time. Default: one per core or GPU; 8 jobs.",
    )
    add_slurm_argument(parser)
    parser.add_switch("dry_run", "List the trials, shape classes, memory and cost, and run nothing.")
    add_oversubscription_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Run a sweep, or resume it, and write its report."""
    from rustgpt_jax.sweeps.search_space import TPE, SuccessiveHalving
    from rustgpt_jax.sweeps.trials import make_trials, sample_feasible_points
    from rustgpt_jax.tracking.formatting import PlainTextConsole
    from rustgpt_jax.workdir.config_files import load_sweep_function

    if args.config is None:
        raise UserError("Which sweep? Give --config=FILE, a config that defines sweep().")
    tree, origins = read_config(args, is_remote=args.launcher == "slurm")
    function = load_sweep_function(args.config, args.sweep)
    spec, fixed = _call(args.config, function), [path for path, _ in args.overrides]
    if isinstance(spec, TPE):
        trials = sample_feasible_points(tree, spec, fixed)
    else:
        trials = make_trials(tree, spec.trials if isinstance(spec, SuccessiveHalving) else spec, fixed)
    from rustgpt_jax.sweeps.run_sweep import Command, run_sweep
    from rustgpt_jax.sweeps.sweep import SweepInfo, SweepOptions

    settings = SweepOptions(args.launcher, args.mode, args.width, args.workers, dict(args.slurm))
    info = SweepInfo(args.config, function.__name__, origins)
    command = Command(info, settings, args.dry_run, args.allow_oversubscription)
    name = "_".join([Path(args.config).stem, *function.__name__.split("_", 1)[1:]])
    return run_sweep(tree, spec, trials, fixed, Path(args.run or Path("runs") / name), command, PlainTextConsole())


def _call(file: str, function: Callable[[], Any]) -> Any:
    """Call a sweep function.

    Raises:
        UserError: It fails.
    """
    from rustgpt_jax.sweeps.search_space import Search

    try:
        spec = function()
        return spec if isinstance(spec, Search) else list(spec)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{file}: {function.__name__}() fails: {type(error).__name__}: {error}.") from error


def add_report_arguments(parser: VerbParser) -> None:
    """Add the arguments of `report`."""
    add_run_argument(parser, "The sweep folder, such as runs/learning_rate.")


def run_report(args: argparse.Namespace) -> int:
    """Report the results of a sweep."""
    if args.run is None:
        raise UserError("Which sweep? Give its folder, which `sweep` wrote, such as runs/learning_rate.")
    from rustgpt_jax.sweeps.report import report
    from rustgpt_jax.tracking.formatting import PlainTextConsole

    console = PlainTextConsole()
    console.print(f"Report: {report(Path(args.run), console)}", highlight=False)
    return 0
