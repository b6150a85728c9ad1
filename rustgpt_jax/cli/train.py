"""The verbs that train: `train` for a run, `sweep` for many, and `report`, which summarizes a sweep."""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rustgpt_jax.cli.arguments import MAX_PROCESSES, VerbParser, key_value, read_config, whole_number
from rustgpt_jax.cli.output import DOCUMENT, VerbResult
from rustgpt_jax.errors import UserError, program_name

if TYPE_CHECKING:
    from rustgpt_jax.sweeps.trials import Trial


def add_train_arguments(parser: VerbParser) -> None:
    """Add the flags of `train`."""
    parser.add_config()
    parser.add_argument("--run", metavar="DIR", help="The run folder. Default: runs/ and the name of the config.")
    parser.add_argument(
        "--init_from",
        metavar="RUN[@STEP]",
        help="Begin a new run with the matching parameters of another: RUN, RUN@STEP or RUN@best.",
    )
    parser.add_switch("extend", "Allow more steps than the run's learning-rate schedule was designed for.")
    parser.add_argument("--profile", metavar="START:STOP", help="Profile the steps after START, up to STOP.")
    parser.add_allow_oversubscription()
    parser.add_argument("--launcher", metavar="inline|slurm", default="inline", help="Where to train.")
    parser.add_slurm()
    parser.add_argument(
        "--coordinator_address",
        metavar="HOST:PORT",
        help="The address of process 0, for several processes.",
    )
    count = whole_number(1, MAX_PROCESSES)
    parser.add_argument("--num_processes", metavar="N", type=count, help="The number of processes.")
    number = whole_number(0, MAX_PROCESSES)
    parser.add_argument("--process_id", metavar="I", type=number, help="The number of this process, from 0.")
    help = "End the process if the others are silent for this long."
    parser.add_argument("--barrier_timeout", metavar="SECONDS", type=whole_number(1), default=600, help=help)


def run_train(args: argparse.Namespace) -> VerbResult:
    """Train a run, or resume it from its last checkpoint."""
    began = time.monotonic()
    from rustgpt_jax.config.validation import resolve
    from rustgpt_jax.distributed import detect_cluster
    from rustgpt_jax.tracking.console import PlainTextConsole

    is_distributed = args.num_processes is not None or detect_cluster(os.environ) is not None
    if args.init_from is not None and is_distributed:
        raise UserError("--init_from creates the run folder in a single process; several processes can then resume it.")
    if args.init_from is not None and args.config is None and args.run is None:
        raise UserError("No run given: add --run=DIR, the folder of the new run.")
    values, overrides, origins = read_config(args, is_remote=is_distributed or args.launcher == "slurm")
    config = resolve(values, overrides)
    folder = Path(args.run or Path("runs") / Path(args.config).stem)
    if args.launcher == "slurm":
        return _submit(args, folder, config)
    if args.launcher != "inline":
        raise UserError(f"--launcher={args.launcher}: train runs inline, or as a job of slurm.")
    from rustgpt_jax.distributed import exit_listeners, initialize, is_process_zero, propagate_failures
    from rustgpt_jax.process_setup import enable_compilation_cache
    from rustgpt_jax.training.run_training import train
    from rustgpt_jax.workdir.environment import enable_autotune_cache
    from rustgpt_jax.workdir.run_dir import RunDir

    enable_compilation_cache()
    initialize(args.coordinator_address, args.num_processes, args.process_id, args.barrier_timeout)
    console = PlainTextConsole(quiet=not is_process_zero())
    if is_process_zero():
        exit_listeners.append(DOCUMENT.write_error)
    else:
        DOCUMENT.cancel()
    with propagate_failures():
        first_step = max(RunDir(folder).saved_steps, default=0)
        enable_autotune_cache(RunDir(folder))
        if args.init_from is not None:
            from rustgpt_jax.interop.warm_start import create_warm_started_run

            config, origins = create_warm_started_run(args.init_from, folder, config, origins, console.print)
        options = args.barrier_timeout, args.profile, args.allow_oversubscription, args.extend
        status = train(config, folder, origins, console, *options)
    if status == 0:
        console.print(f"Talk to it:  {program_name()} chat {shlex.quote(str(folder))}", highlight=False, soft_wrap=True)
    if not DOCUMENT.is_requested:
        return VerbResult(status, {})
    document = describe_run(folder)
    document |= {"first_step": first_step, "is_complete": status == 0, "seconds": time.monotonic() - began}
    return VerbResult(status, document)


def describe_run(path: Path) -> dict[str, Any]:
    """Return the state of a run: its steps, last and best metrics, checkpoints and files, as JSON has them."""
    from rustgpt_jax.tracking.metric_writer import iter_metrics, last_metrics
    from rustgpt_jax.training.checkpointing import read_best_steps
    from rustgpt_jax.workdir.run_dir import RunDir, load_stages

    run = RunDir(path)
    saved = run.saved_steps
    best_step = next((step for step in read_best_steps(run.checkpoints / "best") or () if step in saved), None)
    last_stage = load_stages(path)[-1]
    best, last_evaluation = None, dict[str, Any]()
    # Only evaluations record this metric.
    for line in iter_metrics(path, containing=f'"{last_stage.config.logging.best_metric}"'.encode()):
        last_evaluation = line
        best = line if line["step"] == best_step else best
    last = last_evaluation | last_metrics(path)
    files = {
        "config": run.config_file,
        "metrics": run.metrics_file,
        "samples": run.samples_file,
        "tokenizer": run.tokenizer_file,
        "checkpoints": run.checkpoints,
        "loss_curves": run.loss_png,
        "tensorboard": run.tensorboard,
    }
    return {
        "run": path,
        "step": max(saved, default=0),
        "total_steps": last_stage.end_step,
        "last": last or None,
        "best": best,
        "tokens_per_second": last.get("train/tokens_per_second"),
        "checkpoints": {"last": max(saved, default=None), "best": best_step, "steps": saved},
        "files": {name: file if file.exists() else None for name, file in files.items()},
    }


def _submit(args: argparse.Namespace, folder: Path, config: Any) -> VerbResult:
    """Submit the run to Slurm."""
    from rustgpt_jax.config.schema import uses_epochs
    from rustgpt_jax.sweeps.slurm import make_job_script, submit
    from rustgpt_jax.training.config_checks import plan_resume, validate_components

    # The job converts epochs into steps.
    if not uses_epochs(config):
        plan_resume(folder, config, args.extend)
    validate_components(config)
    flags = [flag for flag in args.flags if not flag.startswith(("--launcher=", "--slurm=", "--json"))]
    overrides = [f"--config.{path}={text}" for path, text in args.overrides]
    is_checkout = Path(sys.argv[0]).name == "launch.py"
    program = [os.path.abspath(sys.argv[0])] if is_checkout else ["-P", "-m", "rustgpt_jax"]
    command = [sys.executable, *program, "train", *flags, *overrides]
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    job = submit(make_job_script(folder, command, dict(args.slurm), Path.cwd()))
    log = folder.absolute().with_name(f"{folder.name}.slurm-{job}.log")
    print(f"Submitted as job {job}. Its log: {log}")
    return VerbResult(0, {"run": folder, "job": job, "log": log})


def add_sweep_arguments(parser: VerbParser) -> None:
    """Add the flags of `sweep`."""
    parser.add_config()
    parser.add_argument("--run", metavar="DIR", help="The sweep folder. Default: runs/ and the name of the config.")
    help = "The sweep to run: the config file's function sweep_NAME()."
    parser.add_argument("--sweep", metavar="NAME", default="sweep", help=help)
    help = "Where the trials run; manifest writes jobs for Kubernetes and SkyPilot instead."
    launchers = "inline|processes|slurm|ray|manifest"
    parser.add_argument("--launcher", metavar=launchers, default="inline", help=help)
    help = "How trials of equal shapes run: fused (vmap), exact (sequentially in one program), or solo (one by one)."
    parser.add_argument("--mode", metavar="auto|fused|exact|solo", default="auto", help=help)
    count = whole_number(1, MAX_PROCESSES)
    help = "The maximum number of trials in one program. Default: as many as fit in memory and increase the speed."
    parser.add_argument("--width", metavar="N", type=count, help=help)
    help = "The number of processes, or of concurrent cluster jobs. Default: one process per core or GPU; 8 jobs."
    parser.add_argument("--workers", metavar="N", type=count, help=help)
    parser.add_slurm()
    help = "An option of Ray, such as address=auto or num_gpus=1. May be repeated."
    parser.add_argument("--ray", metavar="KEY=VALUE", type=key_value, action="append", default=[], help=help)
    help = "An option of the manifests, such as image=IMAGE or gpus=1. May be repeated."
    parser.add_argument("--manifest", metavar="KEY=VALUE", type=key_value, action="append", default=[], help=help)
    parser.add_argument("--to", metavar="DIR", help="The new folder for the manifests.")
    help = "Run one of N parts of the trials, I from 0 on. Other processes run the others in the same folder."
    parser.add_argument("--part", metavar="I/N", type=_parse_part, help=help)
    parser.add_switch("dry_run", "List the trials, shape classes, memory and cost, and run nothing.")
    parser.add_allow_oversubscription()


def _parse_part(text: str) -> tuple[int, int]:
    index, _, number = text.partition("/")
    if all(word.isascii() and word.isdigit() and len(word) < 6 for word in (index, number)):
        part = int(index), int(number)
        if part[0] < part[1]:
            return part
    raise argparse.ArgumentTypeError(f"{text!r} is not I/N, with I from 0 to N - 1.")


def run_sweep(args: argparse.Namespace) -> VerbResult:
    """Run the unfinished trials of a sweep, and write its report."""
    from rustgpt_jax.config.config_files import load_sweep_function
    from rustgpt_jax.sweeps.search_space import TPE, Search, SuccessiveHalving
    from rustgpt_jax.sweeps.trials import make_trials, sample_feasible_points
    from rustgpt_jax.tracking.console import PlainTextConsole

    if args.config is None:
        raise UserError("No sweep given: add --config=NAME or --config=FILE, a config file that defines sweep().")
    for flag, launcher in (("slurm", "slurm"), ("ray", "ray"), ("manifest", "manifest"), ("to", "manifest")):
        if getattr(args, flag) and args.launcher != launcher:
            raise UserError(f"--{flag} is for --launcher={launcher}, not --launcher={args.launcher}.")
    values, fixed, origins = read_config(args, is_remote=args.launcher in ("slurm", "ray", "manifest"))
    function = load_sweep_function(args.config, args.sweep)
    try:
        spec = function()
        spec = spec if isinstance(spec, Search) else list(spec)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{args.config}: {function.__name__}() fails: {type(error).__name__}: {error}.") from error
    if isinstance(spec, Search) and (args.part or args.launcher == "manifest"):
        flag = "--part" if args.part else "--launcher=manifest"
        raise UserError(
            f"{flag} divides a list of trials, but {function.__name__}() returns a search, which chooses trials by the "
            "results of others. Use --launcher=slurm or --launcher=ray."
        )
    if isinstance(spec, TPE):
        trials = sample_feasible_points(values, spec, fixed)
    else:
        trials = make_trials(values, spec.trials if isinstance(spec, SuccessiveHalving) else spec, fixed)
    name = "_".join([Path(args.config).stem, *function.__name__.split("_", 1)[1:]])
    if args.launcher == "manifest":
        return _write_manifests(args, name, trials)
    from rustgpt_jax.sweeps import sweep_command as sweeps
    from rustgpt_jax.sweeps.report import describe_sweep
    from rustgpt_jax.sweeps.sweep import SweepInfo, SweepOptions

    launcher_options = dict({"slurm": args.slurm, "ray": args.ray}.get(args.launcher, ()))
    settings = SweepOptions(args.launcher, args.mode, args.width, args.workers, launcher_options)
    info = SweepInfo(args.config, function.__name__, origins)
    sweep_args = sweeps.SweepArgs(info, settings, args.dry_run, args.allow_oversubscription, args.part)
    folder = Path(args.run or Path("runs") / name)
    status, preview = sweeps.run_sweep(values, spec, trials, fixed, folder, sweep_args, PlainTextConsole())
    if preview is None:
        # Reading the results of many trials takes a while.
        return VerbResult(status, describe_sweep(folder) if DOCUMENT.is_requested else {})
    n_trials = spec.n_runs if isinstance(spec, TPE) else len(trials)
    document = {
        "sweep": folder,
        "n_trials": n_trials,
        "estimate": preview.duration._asdict(),
        "shape_classes": [plan.describe() for plan in preview.plans],
    }
    return VerbResult(status, document)


# The flags of `sweep` that are not passed to the pods of a manifest.
LOCAL_FLAGS = ("--config", "--run", "--launcher", "--manifest", "--to", "--json", "--nojson", "--nodry_run")


def _write_manifests(args: argparse.Namespace, name: str, trials: Sequence["Trial"]) -> VerbResult:
    """Write the manifests of a sweep for Kubernetes and SkyPilot, and print how to apply them."""
    from rustgpt_jax.config.config_files import find_config_file, list_recipes
    from rustgpt_jax.sweeps.manifests import SweepCommand, parse_options, write_manifests
    from rustgpt_jax.workdir.code_snapshot import user_modules

    if args.to is None:
        raise UserError("--launcher=manifest: add --to=DIR, a new folder for the manifests.")
    refused = {
        "part": "each pod runs one",
        "run": "the pods write to a folder of the volume; set --manifest=name=NAME",
        "module_path": "install your modules in the image",
        "dry_run": "it runs nothing",
    }
    for flag, reason in refused.items():
        if getattr(args, flag):
            raise UserError(f"--launcher=manifest does not take --{flag}: {reason}.")
    options = parse_options(dict(args.manifest), name, len(trials))
    files, packages = dict[str, str](), list[str]()
    if args.config not in list_recipes():
        file = find_config_file(args.config)
        for source in [file, *user_modules({Path.cwd(), file.absolute().parent})]:
            if source.is_dir():
                packages.append(source.name)
            else:
                try:
                    files[source.name] = source.read_text(encoding="utf-8")
                except UnicodeDecodeError:
                    raise UserError(f"{source}: a ConfigMap holds UTF-8, which this file is not: convert it.") from None
    arguments = [flag for flag in args.flags if flag.partition("=")[0] not in LOCAL_FLAGS]
    arguments += [f"--config.{path}={text}" for path, text in args.overrides]
    command = SweepCommand(Path(args.config).name if files else args.config, files, arguments)
    folder = Path(args.to)
    commands = write_manifests(folder, command, options)
    print(f"{len(trials)} trials in {options.parts} parts, for the image {options.image}. Nothing was run.")
    for title, lines in commands.items():
        print(f"\n{title}:", *lines, sep="\n  ")
    print(f"\nThe results will be in {options.mount}/{options.name} on the volume {options.volume}.")
    paths = sorted({path for trial in trials for path in trial.config.data.paths})
    if missing := [*packages, *paths]:
        print(f"The image or the volume must have what the config uses: {', '.join(missing)}.")
    written = sorted(path for path in folder.rglob("*") if path.is_file())
    document = {"manifests": folder, "files": written, "n_trials": len(trials), "n_parts": options.parts}
    return VerbResult(0, document | {"sweep": f"{options.mount}/{options.name}", "commands": commands})


def add_report_arguments(parser: VerbParser) -> None:
    """Add the arguments of `report`."""
    parser.add_run("The sweep folder, such as runs/learning_rate.")


def run_report(args: argparse.Namespace) -> VerbResult:
    """Summarize a sweep: a table, results.csv and report.html.

    The exit status is 1 if no trial has finished yet.
    """
    if args.run is None:
        raise UserError("No sweep given: add the folder of a sweep, such as runs/learning_rate.")
    from rustgpt_jax.sweeps.report import NoFinishedTrialError, describe_sweep, report
    from rustgpt_jax.tracking.console import PlainTextConsole

    console, status = PlainTextConsole(), 0
    try:
        console.print(f"Report: {report(Path(args.run), console)}", highlight=False)
    except NoFinishedTrialError as error:
        # Its trials may still be running.
        console.print(str(error), highlight=False, markup=False, soft_wrap=True)
        status = 1
    return VerbResult(status, describe_sweep(Path(args.run)) if DOCUMENT.is_requested else {})
