"""The verbs `sweep` and `report`."""

import argparse
from pathlib import Path

from rustgpt_jax.cli.arguments import MAX_PROCESSES, VerbParser, read_config, whole_number
from rustgpt_jax.errors import UserError


def add_arguments(parser: VerbParser) -> None:
    """Add the flags of `sweep`."""
    parser.add_config()
    parser.add_argument("--run", metavar="DIR", help="The sweep folder. Default: runs/NAME for --config=NAME.py.")
    help = "The sweep to run: the config file's function sweep_NAME()."
    parser.add_argument("--sweep", metavar="NAME", default="sweep", help=help)
    parser.add_argument("--launcher", metavar="inline|processes|slurm", default="inline", help="Where the trials run.")
    help = "How trials of equal shapes run: fused (vmap), exact (sequentially in one program), or solo (one by one)."
    parser.add_argument("--mode", metavar="auto|fused|exact|solo", default="auto", help=help)
    count = whole_number(1, MAX_PROCESSES)
    help = "The maximum number of trials in one program. Default: as many as fit in memory and increase the speed."
    parser.add_argument("--width", metavar="N", type=count, help=help)
    help = "The number of processes, or of concurrent cluster jobs. Default: one process per core or GPU; 8 jobs."
    parser.add_argument("--workers", metavar="N", type=count, help=help)
    parser.add_slurm()
    parser.add_switch("dry_run", "List the trials, shape classes, memory and cost, and run nothing.")
    parser.add_allow_oversubscription()


def run_sweep(args: argparse.Namespace) -> int:
    """Run the unfinished trials of a sweep, and write its report."""
    from rustgpt_jax.sweeps.search_space import TPE, Search, SuccessiveHalving
    from rustgpt_jax.sweeps.trials import make_trials, sample_feasible_points
    from rustgpt_jax.tracking.console import PlainTextConsole
    from rustgpt_jax.workdir.config_files import load_sweep_function

    if args.config is None:
        raise UserError("No sweep given: add --config=FILE, a config file that defines sweep().")
    tree, origins = read_config(args, is_remote=args.launcher == "slurm")
    function = load_sweep_function(args.config, args.sweep)
    try:
        spec = function()
        spec = spec if isinstance(spec, Search) else list(spec)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{args.config}: {function.__name__}() fails: {type(error).__name__}: {error}.") from error
    fixed = [path for path, _ in args.overrides]
    if isinstance(spec, TPE):
        trials = sample_feasible_points(tree, spec, fixed)
    else:
        trials = make_trials(tree, spec.trials if isinstance(spec, SuccessiveHalving) else spec, fixed)
    from rustgpt_jax.sweeps import sweep_command as sweeps
    from rustgpt_jax.sweeps.sweep import SweepInfo, SweepOptions

    settings = SweepOptions(args.launcher, args.mode, args.width, args.workers, dict(args.slurm))
    info = SweepInfo(args.config, function.__name__, origins)
    command = sweeps.Command(info, settings, args.dry_run, args.allow_oversubscription)
    name = "_".join([Path(args.config).stem, *function.__name__.split("_", 1)[1:]])
    return sweeps.run_sweep(
        tree, spec, trials, fixed, Path(args.run or Path("runs") / name), command, PlainTextConsole()
    )


def add_report_arguments(parser: VerbParser) -> None:
    """Add the arguments of `report`."""
    parser.add_run("The sweep folder, such as runs/learning_rate.")


def run_report(args: argparse.Namespace) -> int:
    """Summarize a sweep: a table, results.csv and report.html."""
    if args.run is None:
        raise UserError("No sweep given: add the folder of a sweep, such as runs/learning_rate.")
    from rustgpt_jax.sweeps.report import report
    from rustgpt_jax.tracking.console import PlainTextConsole

    console = PlainTextConsole()
    console.print(f"Report: {report(Path(args.run), console)}", highlight=False)
    return 0
