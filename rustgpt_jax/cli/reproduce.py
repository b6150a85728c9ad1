"""The verbs that reproduce and compare runs: `replay`, `rerun`, `diff` and `doctor`."""

import argparse
from pathlib import Path

from rustgpt_jax.cli.arguments import VerbParser, get_run_folder, whole_number
from rustgpt_jax.cli.output import VerbResult
from rustgpt_jax.errors import UserError

TRUST = "Run the code snapshot in the run folder even if it is not the installed code (docs/concepts/security.md)."


def add_replay_arguments(parser: VerbParser) -> None:
    """Add the arguments of `replay`."""
    parser.add_run()
    parser.add_argument("--step", metavar="K", type=whole_number(1), help="The step to replay.")
    parser.add_switch("intermediates", "Measure the activations and gradients of every layer.")


def run_replay(args: argparse.Namespace) -> VerbResult:
    """Recompute one step bit for bit, and compare it with its record.

    The exit status is 1 if the step differs from its record.
    """
    if args.step is None:
        raise UserError("No step given: add --step=K, a step of the run as numbered in metrics.jsonl.")
    folder = get_run_folder(args)
    _set_up_jax(folder)
    from rustgpt_jax.reproduce.replay import replay
    from rustgpt_jax.tracking.console import PlainTextConsole

    found = replay(folder, args.step, args.intermediates, PlainTextConsole())
    return VerbResult(0 if found.replayed.is_same else 1, {"run": folder, **found.describe()})


def add_rerun_arguments(parser: VerbParser) -> None:
    """Add the arguments of `rerun`."""
    parser.add_run()
    parser.add_argument("--to", metavar="DIR", help="The folder of the new run. Default: RUN.rerun.")
    parser.add_switch("trust", TRUST)


def run_rerun(args: argparse.Namespace) -> VerbResult:
    """Repeat a run from its folder alone, and compare the two runs.

    The exit status is 1 if the runs differ, or that of the training if a signal stopped it.
    """
    from rustgpt_jax.reproduce.rerun import rerun
    from rustgpt_jax.tracking.console import PlainTextConsole

    folder = get_run_folder(args)
    status, new, comparison = rerun(folder, Path(args.to) if args.to else None, PlainTextConsole(), args.trust)
    document = {
        "run": folder,
        "rerun": new,
        "is_same": None if comparison is None else comparison.is_same,
        "comparison": None if comparison is None else comparison.describe(),
    }
    return VerbResult(status, document)


def add_diff_arguments(parser: VerbParser) -> None:
    """Add the arguments of `diff`."""
    parser.add_argument("runs", metavar="RUN", nargs="*", help="The two run folders.")
    parser.add_switch("trust", TRUST)


def run_diff(args: argparse.Namespace) -> VerbResult:
    """Show where two runs differ, down to the first tensor.

    The exit status is 1 if they differ.
    """
    if len(args.runs) != 2:
        raise UserError("diff compares two runs: give both folders, such as `diff runs/a runs/b`.")
    from rustgpt_jax.reproduce.run_diff import diff
    from rustgpt_jax.tracking.console import PlainTextConsole

    first, second = map(Path, args.runs)
    found = diff(first, second, PlainTextConsole(), args.trust)
    return VerbResult(0 if found.is_same else 1, {"first": first, "second": second, **found.describe()})


def add_doctor_arguments(parser: VerbParser) -> None:
    """Add the arguments of `doctor`."""
    parser.add_run()
    parser.add_argument(
        "--step", metavar="K", type=whole_number(1), help="The step that went wrong. Default: the first anomaly."
    )


def run_doctor(args: argparse.Namespace) -> VerbResult:
    """Find out why a step went wrong, and what would have prevented it."""
    folder = get_run_folder(args)
    _set_up_jax(folder)
    from rustgpt_jax.reproduce.diagnose import diagnose_run
    from rustgpt_jax.tracking.console import PlainTextConsole

    return VerbResult(0, {"run": folder, **diagnose_run(folder, args.step, PlainTextConsole()).describe()})


def _set_up_jax(run: Path) -> None:
    """Set up JAX with the devices and autotuning results of a run. Call this before JAX is used."""
    from rustgpt_jax.process_setup import enable_compilation_cache
    from rustgpt_jax.sharding.hardware_specs import use_cpu_devices
    from rustgpt_jax.workdir.environment import load_autotuning
    from rustgpt_jax.workdir.event_log import load_launches
    from rustgpt_jax.workdir.run_dir import RunDir

    enable_compilation_cache()
    for launch in load_launches(RunDir(run))[-1:]:
        use_cpu_devices(launch.devices)
    load_autotuning(RunDir(run))
