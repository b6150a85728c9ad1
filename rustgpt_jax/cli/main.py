# PYTHON_ARGCOMPLETE_OK
"""The command line: `rustgpt VERB [flags]`.

JAX is imported by the `run` functions of the verbs that need it, so that help and usage errors are immediate.
"""

import argparse
import difflib
import errno
import gc
import io
import os
import re
import resource
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn

from absl import app, logging
from absl.flags import FLAGS, argparse_flags

from rustgpt_jax.cache_dir import cache_limit
from rustgpt_jax.cli import explain, listings, models, reproduce, train
from rustgpt_jax.cli.arguments import VerbParser, fail, read_config
from rustgpt_jax.cli.completion import complete
from rustgpt_jax.cli.log_messages import LEVELS, HeldErrors, set_default_verbosity
from rustgpt_jax.cli.output import DOCUMENT, INTERRUPTED, VerbResult
from rustgpt_jax.errors import UserError, is_out_of_memory, program_name, suggest_names
from rustgpt_jax.process_setup import keep_freed_memory

# Imports and tracing create many long-lived objects, so collect garbage less often than by default.
OBJECTS_BETWEEN_COLLECTIONS = (50_000, 20, 50)

# Errors of a write that names no file, such as one to standard output.
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)

# The values that absl accepts for a boolean flag.
SWITCH_VALUES = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}


class Verb(NamedTuple):
    """A verb of the command line.

    Attributes:
        add_arguments: Adds the verb's arguments to its parser.
        run: Runs the verb. The first line of its docstring is the verb's help.
        example: Example arguments to show after `rustgpt VERB`.
        reads_overrides: Whether the verb reads `--config.x.y=VALUE`.
    """

    add_arguments: Callable[[VerbParser], None]
    run: Callable[[argparse.Namespace], VerbResult]
    example: str
    reads_overrides: bool = True


VERBS = {
    "train": Verb(train.add_train_arguments, train.run_train, "--config=rustgpt --config.optimizer.learning_rate=3e-4"),
    "sweep": Verb(train.add_sweep_arguments, train.run_sweep, "--config=learning_rate --dry_run"),
    "report": Verb(train.add_report_arguments, train.run_report, "runs/learning_rate", reads_overrides=False),
    "explain": Verb(explain.add_explain_arguments, explain.run_explain, "--config=rustgpt"),
    "configs": Verb(listings.add_configs_arguments, listings.run_configs, "", reads_overrides=False),
    "components": Verb(listings.add_components_arguments, listings.run_components, "mixers", reads_overrides=False),
    "data": Verb(listings.add_data_arguments, listings.run_data, "rustgpt"),
    "runs": Verb(
        listings.add_runs_arguments, listings.run_runs, "runs/a runs/b --plot=losses.png", reads_overrides=False
    ),
    "plan": Verb(explain.add_plan_arguments, explain.run_plan, "--config=llama3_8b --devices=64 --chip=h100"),
    "evaluate": Verb(models.add_arguments, models.run_evaluate, "runs/rustgpt --checkpoint=best"),
    "generate": Verb(
        models.add_generate_arguments,
        models.run_generate,
        "runs/rustgpt --prompt='Why is the sky blue?' --num_samples=3",
    ),
    "chat": Verb(models.add_arguments, models.run_chat, "runs/rustgpt"),
    "replay": Verb(
        reproduce.add_replay_arguments,
        reproduce.run_replay,
        "runs/rustgpt --step=300 --intermediates",
        reads_overrides=False,
    ),
    "rerun": Verb(reproduce.add_rerun_arguments, reproduce.run_rerun, "runs/rustgpt", reads_overrides=False),
    "diff": Verb(reproduce.add_diff_arguments, reproduce.run_diff, "runs/a runs/b", reads_overrides=False),
    "doctor": Verb(reproduce.add_doctor_arguments, reproduce.run_doctor, "runs/rustgpt", reads_overrides=False),
    "check": Verb(explain.add_check_arguments, explain.run_check, "mixers/attention"),
    "schema": Verb(explain.add_schema_arguments, explain.run_schema, "train", reads_overrides=False),
    "import": Verb(models.add_import_arguments, models.run_import, "--from=DIR --run=runs/llama"),
    "export": Verb(
        models.add_export_arguments, models.run_export, "runs/rustgpt --to=rustgpt.gguf", reads_overrides=False
    ),
}

DESCRIPTION = "Train and study GPT language models. A run is a pure function of its config."
EPILOG = """\
`{program} VERB --help` lists the flags of a verb. RUN is a run folder, such as runs/rustgpt.

--config=NAME is a recipe that ships with the package, such as rustgpt or tiny; --config=FILE is a Python file that
defines get_config().

--config.x.y=VALUE overrides a value of the config, such as --config.optimizer.learning_rate=3e-4;
rustgpt_jax/config/schema.py documents them all. --config.stages.NAME.x.y=VALUE overrides it for one stage. A list takes
one item per flag, commas included (--config.data.paths=a.txt --config.data.paths=b.txt), or a quoted Python list
("--config.logging.sample_prompts=['Hi, you', 'Once']"); only component names may be separated by commas.

exit status:
{statuses}

Quick start:  {program} train --config=rustgpt
"""
# What each exit status means, in short; docs/reference/command_line.md says more.
EXIT_STATUSES = {
    "0": "success",
    "1": "the result is negative: runs differ, a check or a trial failed, a plan does not fit; or an unexpected error",
    "2": "an error in the command line, a config or a file, or a run that diverged: one sentence on standard error",
    "75": "stopped by SIGTERM, SIGUSR1 or SIGUSR2, and saved: the same command resumes",
    "76": "another process of the run was lost: the same command resumes",
    "130": "stopped by Ctrl-C, and saved: the same command resumes",
    "128 + N": "killed by signal N",
}


def build_parsers() -> tuple[argparse_flags.ArgumentParser, dict[str, VerbParser]]:
    """Return the parser of the command line, and the parsers of the verbs by name."""
    program = program_name()
    overrides = f"--config.x.y=VALUE overrides a value of the config (see `{program} --help`)."
    statuses = "\n".join(f"    {status:10}{meaning}" for status, meaning in EXIT_STATUSES.items())
    parser = argparse_flags.ArgumentParser(
        prog=program,
        usage=f"{program} VERB [flags]",
        description=DESCRIPTION,
        epilog=EPILOG.format(program=program, statuses=statuses),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_ShowVersion, nargs=0, help="show the version and exit")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB [flags]", title="verbs", parser_class=VerbParser)
    parsers = {}
    for name, verb in VERBS.items():
        summary = (verb.run.__doc__ or "").partition("\n")[0]
        example = f"Example:  {program} {name} {verb.example}"
        parsers[name] = verb_parser = verbs.add_parser(
            name,
            prog=f"{program} {name}",
            help=f"{summary[:1].lower()}{summary[1:].rstrip('.')}",
            description=summary,
            epilog=f"{overrides}\n\n{example}" if verb.reads_overrides else example,
        )
        verb.add_arguments(verb_parser)
        help = "A folder to search for components given by an import path. May be repeated."
        verb_parser.add_argument("--module_path", metavar="DIR", action="append", default=[], help=help)
        verb_parser.add_switch("json", "Write one JSON document to standard output, and all text to standard error.")
    return parser, parsers


class _ShowVersion(argparse.Action):
    """Prints the version, which takes an import that other commands do not need, and exits."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        from importlib import metadata

        try:
            print(f"rustgpt {metadata.version('rustgpt_jax')}")
        except metadata.PackageNotFoundError:
            fail("The package is not installed, and a checkout has no version.")
        parser.exit()


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Parse a command line, with absl's spellings of flags.

    A flag may begin with one dash or two, and be followed by `=VALUE` or by its value as the next argument. A boolean
    flag is `--x`, `--nox` or `--x=true`. The verb, flags and other arguments may be mixed in any order.

    Args:
        argv: The program and its arguments.

    Returns:
        The values of the verb's arguments, with `verb`, its name; `flags`, the flags given; and `overrides`, the
        (path, text) pairs of `--config.path=text`, which the schema checks.
    """
    parser, parsers = build_parsers()
    complete(parser, parsers, {name for name, verb in VERBS.items() if verb.reads_overrides})
    takes_value = {flag: takes for verb_parser in parsers.values() for flag, takes in verb_parser.takes_value.items()}
    flags: list[str] = []
    positionals: list[str] = []
    overrides: list[tuple[str, str]] = []
    words = iter(argv[1:])
    for word in words:
        flag, equals, value = word.partition("=")
        name = flag.lstrip("-")
        if word == "--":
            positionals += [word, *words]
        elif not word.startswith("-"):
            positionals.append(word)
        elif name.startswith("config."):
            overrides.append((name.removeprefix("config."), value if equals else next(words, "")))
        else:
            flag = flag if flag in takes_value else f"--{name}"
            if takes_value.get(flag) and not equals:
                following = next(words, None)
                flags.append(flag if following is None else f"{flag}={following}")
            elif takes_value.get(flag) is False and value.lower() in SWITCH_VALUES:
                flags.append(flag if SWITCH_VALUES[value.lower()] else f"--no{name}")
            else:
                flags.append(f"{flag}{equals}{value}" if flag in takes_value else word)
    if len(argv) == 1:
        parser.print_help()
        parser.exit()
    json_flags = [flag for flag in flags if flag in ("--json", "--nojson")]
    verb = positionals[0] if positionals and positionals[0] in parsers else None
    DOCUMENT.configure(verb, is_requested=json_flags[-1:] == ["--json"])
    flags = [_parse_verbosity(flag) if flag.startswith(("-v=", "--verbosity=")) else flag for flag in flags]
    _check_words(argv[1:])
    if positionals and positionals[0] not in parsers:
        hint = suggest_names(positionals[0], parsers) or f" `{program_name()} --help` lists the verbs."
        fail(f"Unknown verb {positionals[0]!r}.{hint}")
    args, unknown = parser.parse_known_args([*positionals[:1], *flags, *positionals[1:]])
    if args.verb is None:
        fail(f"No verb given; `{program_name()} --help` lists them.")
    if unknown:
        _reject_argument(args.verb, unknown[0], parsers)
    if overrides and not VERBS[args.verb].reads_overrides:
        fail(f"{args.verb} does not read --config.{overrides[0][0]}: the config of the run is used.")
    set_default_verbosity()
    args.flags, args.overrides = flags, overrides
    return args


def _parse_verbosity(flag: str) -> str:
    """Return the flag `--verbosity` with the number of its level."""
    value = flag.partition("=")[2]
    level = LEVELS.get(value.lower())
    if level is None and not re.fullmatch(r"-?\d", value):
        fail(f"--verbosity: unknown level {value!r}.{suggest_names(value, LEVELS)}")
    return f"--verbosity={value if level is None else level}"


def _check_words(words: Sequence[str]) -> None:
    """End the process if an argument is not UTF-8, or names a file with flags."""
    for word in words:
        if any("\ud800" <= letter <= "\udfff" for letter in word):
            fail(f"The argument {ascii(word)[1:-1]} is not UTF-8.")
        if word.startswith("-") and word.lstrip("-").partition("=")[0] in ("flagfile", "undefok"):
            # Absl's --flagfile would read any file.
            fail(f"Unknown flag {word.partition('=')[0]}: give the flags themselves.")


def _reject_argument(verb: str, word: str, parsers: dict[str, VerbParser]) -> NoReturn:
    """End the process because a verb does not take an argument."""
    from rustgpt_jax.config.config_files import list_recipes
    from rustgpt_jax.config.schema import FIELDS

    name = word.lstrip("-").partition("=")[0]
    takes_config = "--config" in parsers[verb].takes_value
    if not word.startswith("-"):
        is_config = takes_config and (word.endswith(".py") or word in list_recipes())
        hint = f"Did you mean --config={word}?" if is_config else "Flags begin with --."
        fail(f"{verb} does not take the argument {word!r}. {hint}")
    readers = [other for other, parser in parsers.items() if f"--{name}" in parser.takes_value]
    if readers:
        fail(f"{verb} does not read --{name}; verbs that do: {', '.join(readers)}.")
    known = [flag.removeprefix("--") for flag in parsers[verb].takes_value if flag.startswith("--")]
    fields = [f"config.{path}" for path in FIELDS if path.rsplit(".", 1)[-1] == name and VERBS[verb].reads_overrides]
    near = fields or difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean --{near[0]}?" if near else f" See `{program_name()} {verb} --help`."
    fail(f"Unknown flag --{name}.{hint}")


def run_command() -> None:
    """Run the command line of this process, and exit with the verb's exit status."""
    signal.signal(signal.SIGINT, handle_interrupt)
    app.run(main, flags_parser=parse_args)


def handle_interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, or end the process during an import. Training installs its own handler.

    An exception crashes some extension modules while they are imported. JAX calls `_xla_gc_callback` during garbage
    collection, where Python ignores exceptions, so the signal is sent again a moment later.
    """
    del number
    names = set()
    while frame is not None:
        names |= {frame.f_code.co_name, frame.f_code.co_filename}
        frame = frame.f_back
    if "_xla_gc_callback" in names:
        threading.Timer(0.05, signal.raise_signal, [signal.SIGINT]).start()
    elif "<frozen importlib._bootstrap>" in names:
        print("stopped", file=sys.stderr, flush=True)
        DOCUMENT.write_error("The command was interrupted.", INTERRUPTED)
        os._exit(INTERRUPTED)
    else:
        raise KeyboardInterrupt


def main(args: argparse.Namespace) -> int:
    """Run a verb and return the exit status."""
    DOCUMENT.redirect_text()
    _extend_module_path(args)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # File names and texts in damaged folders may not be valid Unicode.
        sys.stdout.reconfigure(errors="backslashreplace")
    if hasattr(args, "allow_oversubscription") and resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        # The address space is limited, for example by `ulimit -v`.
        status = _run_in_child(args)
        if status is not None:
            return status
    keep_freed_memory()
    gc.set_threshold(*OBJECTS_BETWEEN_COLLECTIONS)
    from rustgpt_jax.workdir.run_dir import check_no_special_files

    held_errors = HeldErrors(logging.get_absl_handler())
    if FLAGS.verbosity >= LEVELS["info"]:
        held_errors.release()
    try:
        # Validate the limit once here, rather than in each child process.
        cache_limit()
        given = vars(args)
        initial = (given.get("init_from") or "").partition("@")[0]
        for folder in [given.get("run"), given.get("source"), initial, *given.get("runs", ())]:
            if folder:
                check_no_special_files(Path(folder))
        result = VERBS[args.verb].run(args)
    except UserError as error:
        fail(str(error))
    except KeyboardInterrupt:
        held_errors.release()
        print("stopped", file=sys.stderr)
        DOCUMENT.write_error("The command was interrupted.", INTERRUPTED)
        return INTERRUPTED
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            # For example, the path is too long or permission is denied. An error that names no file is a bug.
            fail(f"{os.fsdecode(error.filename)}: {error.strerror}.")
        if isinstance(error, OSError) and error.errno in FULL_DISK:
            fail(f"Cannot write to standard output or a file: {error.strerror}.")
        if is_out_of_memory(error):
            fail(_describe_out_of_memory(args))
        held_errors.release()
        DOCUMENT.write_error(f"{type(error).__name__}: {error}", 1)
        raise
    held_errors.release()
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
        DOCUMENT.write_result(result)
    except OSError as error:
        fail(f"Cannot write to standard output: {error.strerror}.")
    return result.status


def _extend_module_path(args: argparse.Namespace) -> None:
    """Set the search path for components named by an import path, such as my_lab.mixers:Retention.

    Child processes use the same path. The current folder is searched only if the user names the components directly,
    in a config file or as arguments of `check`. A run folder may come from an untrusted source, so the current
    folder is not searched for the components that it names.
    """
    folders = [str(Path(folder).resolve()) for folder in args.module_path]
    for given, folder in zip(args.module_path, folders, strict=True):
        if not Path(folder).is_dir():
            fail(f"--module_path={given}: not a folder.")
    if folders:
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [*folders, os.environ.get("PYTHONPATH")]))
    if getattr(args, "config", None) is not None or args.verb == "check":
        folders.append(str(Path.cwd()))
    sys.path += folders


def _describe_out_of_memory(args: argparse.Namespace) -> str:
    """Return the error message for a failed allocation."""
    from rustgpt_jax.config.validation import resolve
    from rustgpt_jax.training.memory_estimate import out_of_memory_message

    try:
        return out_of_memory_message(resolve(*read_config(args)[:2]))
    # The config may be missing, or there may not be enough memory left to compute the sizes.
    except Exception:
        return out_of_memory_message(None)


def _run_in_child(args: argparse.Namespace) -> int | None:
    """Fork, continue in the child process, and return the child's exit status in the parent.

    When the address space is limited, a failed allocation in a C++ thread aborts the process, so only another process
    can report it. Call this before starting threads.

    Returns:
        The child's exit status in the parent; None in the child.
    """
    child = os.fork()
    if not child:
        return None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        # A terminal sends Ctrl-C to both processes.
        is_sent_to_both = number == signal.SIGINT and sys.stdin is not None and sys.stdin.isatty()
        signal.signal(number, signal.SIG_IGN if is_sent_to_both else lambda number, _: os.kill(child, number))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code in (-signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS):
        fail(_describe_out_of_memory(args))
    if code >= 0:
        return code
    # Follow the shell's convention for processes killed by a signal.
    DOCUMENT.write_error(f"The process was ended by {signal.Signals(-code).name}.", 128 - code)
    return 128 - code
