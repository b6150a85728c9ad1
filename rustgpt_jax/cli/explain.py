"""The verbs that inspect a config, a component or the output without training: `explain`, `plan`, `check`, `schema`."""

import argparse
import json

from rustgpt_jax.cli.arguments import MAX_PROCESSES, VerbParser, read_config, whole_number
from rustgpt_jax.cli.output import SCHEMAS, VerbResult, load_schema
from rustgpt_jax.errors import UserError, suggest_names


def add_explain_arguments(parser: VerbParser) -> None:
    """Add the arguments of `explain`."""
    _add_config_or_run(parser)
    parser.add_switch("all", "Show the fields that have their default values, too.")
    help = "Show operations, FLOPs and bytes of the lowered training step and decoding step by module instead."
    parser.add_switch("program", help)
    help = "With --program: the chip to lower for, such as h100, b200 or v5p. Default: the devices of this process."
    parser.add_argument("--chip", metavar="NAME", help=help)


def _add_config_or_run(parser: VerbParser) -> None:
    parser.add_config()
    parser.add_run()


def run_explain(args: argparse.Namespace) -> VerbResult:
    """Show a config: values that differ from the defaults and their origins, shapes, FLOPs and memory."""
    if args.config is not None and args.run is not None:
        raise UserError("explain takes either --config or a run.")
    if args.chip is not None and not args.program:
        raise UserError("explain --chip is for --program; `plan` estimates memory and time on a chip.")
    from rustgpt_jax.config.validation import resolve

    # All known chips are accelerators, whose automatic dtype is the same.
    values, overrides, origins = read_config(args, platform=None if args.chip is None else "tpu")
    config = resolve(values, overrides)
    from rustgpt_jax.planning.report import lower_programs, print_config_summary, print_programs, summarize_config
    from rustgpt_jax.tracking.console import PlainTextConsole, show_spinner

    console = PlainTextConsole()
    summary = summarize_config(config, origins, console)
    if args.program:
        with show_spinner(console, "lowering the programs"):
            programs = lower_programs(summary.full_config, args.chip)
        print_programs(programs, console)
        return VerbResult(0, {**summary.describe(), "program": programs.describe()})
    print_config_summary(summary, console, args.all)
    return VerbResult(0, {**summary.describe(), "program": None})


def add_plan_arguments(parser: VerbParser) -> None:
    """Add the arguments of `plan`."""
    _add_config_or_run(parser)
    parser.add_argument("--devices", metavar="N", type=whole_number(1, MAX_PROCESSES), help="The number of chips.")
    parser.add_argument("--chip", metavar="NAME", help="The kind of chip, such as h100, b200 or v5p.")


def run_plan(args: argparse.Namespace) -> VerbResult:
    """Estimate whether a config fits given accelerators, and how fast it trains there.

    The exit status is 1 if the step does not fit.
    """
    from rustgpt_jax.config.validation import resolve

    # All known chips are accelerators, whose automatic dtype is the same.
    values, overrides, origins = read_config(args, platform="tpu")
    config = resolve(values, overrides)
    if args.devices is None:
        raise UserError("plan needs --devices=N, the number of chips.")
    if args.chip is None:
        raise UserError("plan needs --chip=NAME, the kind of chip, such as --chip=h100.")
    from rustgpt_jax.planning.report import print_plan
    from rustgpt_jax.tracking.console import PlainTextConsole

    console = PlainTextConsole()
    if origins.get("model.remat", "").startswith("auto"):
        console.print(f"config.model.remat={config.model.remat!r}, {origins['model.remat']}.\n")
    plan = print_plan(config, args.chip, args.devices, console)
    return VerbResult(0 if plan.found.fits else 1, plan.describe())


def add_check_arguments(parser: VerbParser) -> None:
    """Add the arguments of `check`."""
    help = "A registered component, such as mixers/attention, or an import path, such as my_lab.mixers:Retention. "
    parser.add_argument("components", metavar="COMPONENT", nargs="*", help=f"{help}Default: all registered ones.")
    parser.add_argument(
        "--only",
        metavar="CHECK,...",
        type=lambda text: [name.strip() for name in text.split(",")] if text else [],
        default=[],
        help="The names of the checks to run. Default: all checks.",
    )
    parser.add_switch("exhaustive", "Cover every length, batch size, dtype and mode; takes minutes per component.")


def run_check(args: argparse.Namespace) -> VerbResult:
    """Check that a layer, an optimizer or another component is correct."""
    from rustgpt_jax.config.validation import parse_overrides
    from rustgpt_jax.conformance.checks import check_components
    from rustgpt_jax.tracking.console import PlainTextConsole

    outcomes = check_components(
        args.components, PlainTextConsole(), args.only, parse_overrides(args.overrides), args.exhaustive
    )
    n_passed = sum(outcome.is_ok for outcome in outcomes)
    checks = [
        {
            "component": outcome.component.title,
            "check": outcome.check,
            "is_ok": outcome.is_ok,
            "note": outcome.note,
            "seconds": outcome.seconds,
        }
        for outcome in outcomes
    ]
    document = {"n_passed": n_passed, "n_failed": len(outcomes) - n_passed, "checks": checks}
    return VerbResult(0 if n_passed == len(outcomes) else 1, document)


def add_schema_arguments(parser: VerbParser) -> None:
    """Add the argument of `schema`."""
    parser.add_argument("name", metavar="VERB", nargs="?", help="The verb.")


def run_schema(args: argparse.Namespace) -> VerbResult:
    """Print the JSON Schema of the document that a verb writes with --json."""
    names = sorted(file.stem for file in SCHEMAS.glob("*.json") if file.stem != "document")
    if args.name is None:
        raise UserError(f"No verb given: add one of {', '.join(names)}.")
    if args.name not in names:
        raise UserError(f"Unknown verb {args.name!r}.{suggest_names(args.name, names)}")
    schema = load_schema(args.name)
    print(json.dumps(schema, indent=2))
    return VerbResult(0, {"schema": schema})
