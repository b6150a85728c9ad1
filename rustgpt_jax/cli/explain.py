"""The verbs that inspect a config or a component without training: `explain`, `plan` and `check`."""

import argparse

from rustgpt_jax.cli.arguments import (
    MOST_PROCESSES,
    VerbParser,
    add_config_argument,
    add_run_argument,
    read_config,
    whole_number,
)
from rustgpt_jax.errors import UserError


def add_explain_arguments(parser: VerbParser) -> None:
    """Add the arguments of `explain`."""
    add_config_argument(parser)
    add_run_argument(parser)


def run_explain(args: argparse.Namespace) -> int:
    """Print each knob with its value and origin, parameter shapes, FLOPs and memory."""
    if args.config is not None and args.run is not None:
        raise UserError("explain takes either --config or a run.")
    from rustgpt_jax.config.validation import resolve

    tree, origins = read_config(args)
    config = resolve(tree)
    from rustgpt_jax.planning.config_summary import print_config_summary
    from rustgpt_jax.tracking.formatting import PlainTextConsole

    print_config_summary(config, origins, PlainTextConsole())
    return 0


def add_plan_arguments(parser: VerbParser) -> None:
    """Add the arguments of `plan`."""
    add_explain_arguments(parser)
    parser.add_argument("--devices", metavar="N", type=whole_number(1, MOST_PROCESSES), help="How many chips.")
    parser.add_argument("--chip", metavar="NAME", help="Which chips, such as h100, b200 or v5p.")


def run_plan(args: argparse.Namespace) -> int:
    """Print what a step needs of each chip.

    Returns:
        The exit status: 1 if the step does not fit.
    """
    from rustgpt_jax.config.validation import resolve

    # All known chips are accelerators, whose automatic dtype is the same.
    config = resolve(read_config(args, platform="tpu")[0])
    if args.devices is None:
        raise UserError("For how many chips? Give --devices=N.")
    if args.chip is None:
        raise UserError("For which chip? Give --chip=NAME, such as --chip=h100.")
    from rustgpt_jax.planning.report import print_plan
    from rustgpt_jax.tracking.formatting import PlainTextConsole

    return 0 if print_plan(config, args.chip, args.devices, PlainTextConsole()) else 1


def add_check_arguments(parser: VerbParser) -> None:
    """Add the arguments of `check`."""
    parser.add_argument(
        "components",
        metavar="COMPONENT",
        nargs="*",
        help="A registered component, such as mixers/attention, or one of your own, such as my_lab.mixers:Retention. "
        "Default: all that are registered.",
    )
    parser.add_argument(
        "--only",
        metavar="CHECK,...",
        type=lambda text: [name.strip() for name in text.split(",")] if text else [],
        default=[],
        help="The names of the checks to run, instead of all.",
    )
    parser.add_switch("exhaustive", "Cover every length, batch size, dtype and mode; takes minutes per component.")


def run_check(args: argparse.Namespace) -> int:
    """Check layers, optimizers, tokenizers and other components."""
    from rustgpt_jax.config.validation import parse_all
    from rustgpt_jax.conformance.runner import check_components
    from rustgpt_jax.tracking.formatting import PlainTextConsole

    return check_components(args.components, PlainTextConsole(), args.only, parse_all(args.overrides), args.exhaustive)
