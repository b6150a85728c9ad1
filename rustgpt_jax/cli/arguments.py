"""Shared command-line code: the parser, common flags, and reading the config."""

import argparse
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from absl.flags import argparse_flags

from rustgpt_jax.cli.output import DOCUMENT
from rustgpt_jax.errors import UserError

VERBOSITY_HELP = "The least level of log messages to show. Default: warning."
# Upper bounds for numeric flags; no realistic step, number of seconds or process count exceeds them.
MAX_WHOLE_NUMBER, MAX_PROCESSES = 10**9 - 1, 2**16


def fail(message: str) -> NoReturn:
    """Print an error message and end the process with exit status 2."""
    error = UserError(message)
    # A stream is None if it is closed, and writes to standard output may be what failed.
    if sys.stdout is not None:
        with suppress(OSError):
            sys.stdout.flush()
    if sys.stderr is not None:
        print(f"error: {error}", file=sys.stderr, flush=True)
    with suppress(OSError):
        DOCUMENT.write_error(str(error), 2)
    # Not sys.exit: after a failed write, library threads wait for it, and their exit handlers print tracebacks.
    os._exit(2)


class VerbParser(argparse_flags.ArgumentParser):
    """Parser of one verb's flags and positional arguments. Flags must be in the form produced by `main.parse_args`."""

    def __init__(self, **kwargs: Any) -> None:
        # Whether each flag takes a value.
        self.takes_value: dict[str, bool] = {}
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def add_argument(self, *names: str, **kwargs: Any) -> argparse.Action:  # type: ignore[override]
        """Add an argument. The default value is appended to the help text of a flag."""
        if "--helpfull" in names:
            kwargs["help"] = argparse.SUPPRESS
        if "--verbosity" in names:
            kwargs |= {"metavar": "debug|info|warning|error", "help": VERBOSITY_HELP}
        if kwargs.get("default") not in (None, False, [], argparse.SUPPRESS):
            kwargs["help"] += " Default: %(default)s."
        action = super().add_argument(*names, **kwargs)
        self.takes_value |= dict.fromkeys(action.option_strings, action.nargs != 0)
        return action

    def add_switch(self, name: str, help: str) -> None:
        """Add a boolean flag that is off by default: `--NAME`, or `--noNAME`."""
        self.add_argument(f"--{name}", action="store_true", help=help)
        self.add_argument(f"--no{name}", dest=name, action="store_false", default=False, help=argparse.SUPPRESS)

    def add_run(self, help: str = "The run folder, such as runs/rustgpt.") -> None:
        """Add RUN, which may also be given as --run=RUN."""
        self.add_argument("run", metavar="RUN", nargs="?", action=_StoreRun, default=argparse.SUPPRESS, help=help)
        self.add_argument("--run", metavar="RUN", action=_StoreRun, help=argparse.SUPPRESS)

    def add_config(self) -> None:
        """Add --config."""
        help = "A recipe, such as rustgpt, or a Python file that defines get_config()."
        self.add_argument("--config", metavar="NAME|FILE", help=help)

    def add_checkpoint(self) -> None:
        """Add --checkpoint."""
        help = "The checkpoint to load: the last one, the best by config.logging.best_metric, or the one of a step."
        self.add_argument("--checkpoint", metavar="last|best|STEP", type=_checkpoint, default="last", help=help)

    def add_allow_oversubscription(self) -> None:
        """Add --allow_oversubscription."""
        self.add_switch("allow_oversubscription", "Run even if the model cannot fit in memory.")

    def add_slurm(self) -> None:
        """Add --slurm, which may be repeated."""
        help = "A Slurm option, such as partition=gpu. May be repeated."
        self.add_argument("--slurm", metavar="KEY=VALUE", type=key_value, action="append", default=[], help=help)

    def error(self, message: str) -> NoReturn:
        """End the process with an error message."""
        fail(message)


def whole_number(low: int, high: int = MAX_WHOLE_NUMBER) -> Callable[[str], int]:
    """Return an argparse type for whole numbers from `low` to `high`."""

    def parse(text: str) -> int:
        number = int(text) if text.isascii() and text.isdigit() and len(text) <= len(str(high)) else -1
        if not low <= number <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}.")
        return number

    return parse


def key_value(text: str) -> tuple[str, str]:
    """Parse KEY=VALUE, for an argparse type."""
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE, such as partition=gpu.")
    return key, value


def _checkpoint(text: str) -> str:
    if text not in ("last", "best") and not (text.isascii() and text.isdigit() and len(text) < 10):
        raise argparse.ArgumentTypeError(f"{text!r} is not last, best or a step.")
    return text


class _StoreRun(argparse.Action):
    """Stores the run folder, given as a positional argument or by --run."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if option_string is None and namespace.run is not None:
            parser.error(f"Two runs are given, {values} and --run={namespace.run}; give only one.")
        namespace.run = values


def get_run_folder(args: argparse.Namespace) -> Path:
    """Return the run folder named on the command line."""
    if args.run is None:
        raise UserError("No run given: add the folder of a run, such as runs/rustgpt.")
    return Path(args.run)


def read_config(
    args: argparse.Namespace, platform: str | None = None, is_remote: bool = False
) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """Read the config file, or the config of the run, and the overrides of the command line.

    Args:
        args: The parsed command line.
        platform: The platform, that of `--chip`, for which 'auto' values are resolved; None for this process's device.
        is_remote: Whether the computation runs in other processes or on other machines, whose devices are unknown here.

    Returns:
        The values of the config and the overrides, for `resolve`, and the origin of each value, by dotted path.
    """
    from rustgpt_jax.config.config_files import COMMAND_LINE, load_config_file
    from rustgpt_jax.config.schema import find_auto_values
    from rustgpt_jax.config.validation import parse_overrides
    from rustgpt_jax.workdir.run_dir import load_run_config

    if getattr(args, "config", None) is not None:
        values, origins = load_config_file(args.config)
    elif getattr(args, "init_from", None) is not None:
        from rustgpt_jax.interop.warm_start import parse_source

        values, origins = load_run_config(parse_source(args.init_from)[0])
    elif args.run is not None:
        values, origins = load_run_config(Path(args.run))
    else:
        raise UserError("No config given: add --config=NAME, such as --config=rustgpt, or --config=FILE.")
    overrides = parse_overrides(args.overrides)
    origins |= dict.fromkeys(overrides, COMMAND_LINE)
    automatic = find_auto_values(values | overrides)
    if automatic:
        from rustgpt_jax.distributed import detect_cluster
        from rustgpt_jax.planning.estimate import resolve_auto_values

        if platform is None and (is_remote or detect_cluster(os.environ)):
            raise UserError(
                f"config.{automatic[0]}='auto' depends on the device of this process, but the computation runs in "
                "other processes: give a value."
            )
        resolve_auto_values(values, overrides, origins, platform, getattr(args, "chip", None))
    return values, overrides, origins
