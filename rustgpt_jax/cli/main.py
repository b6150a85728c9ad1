"""The command line: `python launch.py VERB [flags]`.

JAX is imported by the `run` functions of the verbs that need it, so that help and usage errors are immediate.
"""

import argparse
import difflib
import gc
import io
import os
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from absl import logging
from absl.flags import argparse_flags

from rustgpt_jax.cache_dir import cache_limit
from rustgpt_jax.cli import convert, explain, generate, reproduce, sweep, train
from rustgpt_jax.cli.arguments import VerbParser, fail, read_config
from rustgpt_jax.errors import UserError, is_out_of_memory, suggestion
from rustgpt_jax.malloc import keep_freed_memory

# Imports and tracing create many objects that stay, so the garbage collector need not look for them often.
OBJECTS_BETWEEN_COLLECTIONS = (50_000, 20, 50)


class Verb(NamedTuple):
    """A verb of the command line.

    Attributes:
        summary: One line of help.
        add_arguments: Adds the verb's arguments to its parser.
        run: Runs the verb and returns the exit status.
        example: What may follow `python launch.py VERB`.
        reads_overrides: Whether the verb reads `--config.x.y=VALUE`.
    """

    summary: str
    add_arguments: Callable[[VerbParser], None]
    run: Callable[[argparse.Namespace], int]
    example: str
    reads_overrides: bool = True


VERBS = {
    "train": Verb(
        "train a run, or resume it from its last checkpoint",
        train.add_arguments,
        train.run,
        "--config=configs/rustgpt.py --config.optimizer.learning_rate=3e-4",
    ),
    "sweep": Verb(
        "run the trials of a sweep that are not done, and report",
        sweep.add_arguments,
        sweep.run,
        "--config=experiments/learning_rate.py --dry_run",
    ),
    "report": Verb(
        "summarize a sweep: a table, results.csv and report.html",
        sweep.add_report_arguments,
        sweep.run_report,
        "runs/learning_rate",
        reads_overrides=False,
    ),
    "explain": Verb(
        "show a config: values and their origins, shapes, FLOPs and memory",
        explain.add_explain_arguments,
        explain.run_explain,
        "--config=configs/rustgpt.py",
    ),
    "plan": Verb(
        "estimate whether a config fits accelerators that are not here, and how fast it is",
        explain.add_plan_arguments,
        explain.run_plan,
        "--config=configs/llama3_8b.py --devices=64 --chip=h100",
    ),
    "evaluate": Verb(
        "measure loss, perplexity and bits per byte, and accuracy on dialogues",
        generate.add_arguments,
        generate.run_evaluate,
        "runs/rustgpt --checkpoint=best",
    ),
    "generate": Verb(
        "continue texts, or answer questions",
        generate.add_generate_arguments,
        generate.run_generate,
        "runs/rustgpt --prompt='Why is the sky blue?' --num_samples=3",
    ),
    "chat": Verb("chat with a model", generate.add_arguments, generate.run_chat, "runs/rustgpt"),
    "replay": Verb(
        "compute one step again, bit for bit, and show what every layer did",
        reproduce.add_replay_arguments,
        reproduce.run_replay,
        "runs/rustgpt --step=300 --taps",
        reads_overrides=False,
    ),
    "rerun": Verb(
        "train a run again from its folder alone, and compare",
        reproduce.add_rerun_arguments,
        reproduce.run_rerun,
        "runs/rustgpt",
        reads_overrides=False,
    ),
    "diff": Verb(
        "show where two runs differ, down to the first tensor",
        reproduce.add_diff_arguments,
        reproduce.run_diff,
        "runs/a runs/b",
        reads_overrides=False,
    ),
    "doctor": Verb(
        "find out why a step went wrong, and what would have prevented it",
        reproduce.add_doctor_arguments,
        reproduce.run_doctor,
        "runs/rustgpt",
        reads_overrides=False,
    ),
    "check": Verb(
        "check that a layer, an optimizer or another component is correct",
        explain.add_check_arguments,
        explain.run_check,
        "mixers/attention",
    ),
    "import": Verb(
        "create a run from a Hugging Face model",
        convert.add_import_arguments,
        convert.run_import,
        "--from=DIR --run=runs/llama",
    ),
    "export": Verb(
        "write a run as a Hugging Face model, or for llama.cpp",
        convert.add_export_arguments,
        convert.run_export,
        "runs/rustgpt --to=rustgpt.gguf",
        reads_overrides=False,
    ),
}

DESCRIPTION = "Train and study GPT language models. A run is a pure function of its config."
EPILOG = """\
`python launch.py VERB --help` lists the flags of a verb. RUN is a run folder, such as runs/rustgpt.

--config.x.y=VALUE overrides a value of the config, such as --config.optimizer.learning_rate=3e-4;
rustgpt_jax/config/schema.py documents them all. --config.stages.NAME.x.y=VALUE overrides it for one stage. A list takes
one item per flag, commas included (--config.data.paths=a.txt --config.data.paths=b.txt), or a quoted Python list
("--config.logging.sample_prompts=['Hi, you', 'Once']"); only component names may be separated by commas.

Quick start:  python launch.py train --config=configs/rustgpt.py
"""
OVERRIDES = "--config.x.y=VALUE overrides a value of the config (see `python launch.py --help`)."


def _build_parsers() -> tuple[argparse_flags.ArgumentParser, dict[str, VerbParser]]:
    """Return the parser of the command line, and those of the verbs."""
    parser = argparse_flags.ArgumentParser(
        prog="launch.py",
        usage="python launch.py VERB [flags]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs", parser_class=VerbParser)
    parsers = {}
    for name, verb in VERBS.items():
        example = f"Example:  python launch.py {name} {verb.example}"
        parsers[name] = own = verbs.add_parser(
            name,
            prog=f"launch.py {name}",
            help=verb.summary,
            description=f"{verb.summary[0].upper()}{verb.summary[1:]}.",
            epilog=f"{OVERRIDES}\n\n{example}" if verb.reads_overrides else example,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        verb.add_arguments(own)
        own.add_argument(
            "--module_path",
            metavar="DIR",
            action="append",
            default=[],
            help="A folder to search for components named by an import path. May be repeated.",
        )
    return parser, parsers


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Parse a command line.

    Args:
        argv: The program and its arguments.

    Returns:
        The values of the verb's arguments, with `verb`, its name; `flags`, the flags given; and `overrides`, the
        (path, text) pairs of `--config.path=text`.
    """
    words = list(argv[1:])
    for word in words:
        if any("\ud800" <= letter <= "\udfff" for letter in word):
            fail(f"The argument {ascii(word)[1:-1]} is not UTF-8.")
        if word.startswith("-") and word.lstrip("-").partition("=")[0] in ("flagfile", "undefok"):
            # Absl's --flagfile would read any file.
            fail(f"Unknown flag {word.partition('=')[0]}: give the flags themselves.")
    parser, parsers = _build_parsers()
    if not words:
        parser.print_help()
        parser.exit()
    position = _verb_position(words, parsers)
    if position < len(words):
        verb = words.pop(position)
        if verb not in parsers:
            fail(f"Unknown verb {verb!r}.{suggestion(verb, parsers)}")
        words.insert(0, verb)
    args, unknown = parser.parse_known_args(words)
    if unknown:
        _refuse(args.verb, unknown[0], parsers)
    if args.overrides and not VERBS[args.verb].reads_overrides:
        fail(f"{args.verb} does not read --config.{args.overrides[0][0]}: the config is that of the run.")
    return args


def _verb_position(words: Sequence[str], parsers: dict[str, VerbParser]) -> int:
    """Return the index of the verb; flags may precede it."""
    index = 0
    while index < len(words) and words[index].startswith("-"):
        word = words[index].lstrip("-")
        is_flag_of_value = any(each.takes_value.get(f"--{word}") for each in parsers.values())
        index += 1 + (is_flag_of_value or (word.startswith("config.") and "=" not in word))
    return index


def _refuse(verb: str, word: str, parsers: dict[str, VerbParser]) -> None:
    """End the process because a verb does not take an argument."""
    name = word.lstrip("-").partition("=")[0]
    if not word.startswith("-"):
        fail(f"{verb} does not take the argument {word!r}; flags begin with --.")
    readers = [each for each, own in parsers.items() if f"--{name}" in own.takes_value]
    if readers:
        fail(f"{verb} does not read --{name}; verbs that do: {', '.join(readers)}.")
    known = {flag.removeprefix("--") for own in parsers.values() for flag in own.takes_value if flag[:2] == "--"}
    near = difflib.get_close_matches(name, known, n=1)
    fail(f"Unknown flag --{name}." + (f" Did you mean --{near[0]}?" if near else f" See `launch.py {verb} --help`."))


def main(args: argparse.Namespace) -> int:
    """Run a verb and return the exit status."""
    _extend_module_path(args)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # File names and texts in damaged folders may not be valid Unicode.
        sys.stdout.reconfigure(errors="backslashreplace")
    if hasattr(args, "allow_oversubscription") and _is_address_space_limited():
        status = _run_in_child(args)
        if status is not None:
            return status
    keep_freed_memory()
    gc.set_threshold(*OBJECTS_BETWEEN_COLLECTIONS)
    # Libraries also raise the errors that they log.
    logging.set_verbosity(logging.FATAL)
    try:
        # Validate once here, rather than in each process that is started.
        cache_limit()
        _check_folders(args)
        return VERBS[args.verb].run(args)
    except UserError as error:
        fail(str(error))
    except OSError as error:
        # For example, the path is too long or permission is denied. An error that names no file is a bug.
        if error.filename is None:
            raise
        fail(f"{os.fsdecode(error.filename)}: {error.strerror}.")
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        fail(_describe_out_of_memory(args))


def _extend_module_path(args: argparse.Namespace) -> None:
    """Set the search path for components named by an import path, such as my_lab.mixers:Retention.

    Child processes use the same path. The current folder is searched only if the user names the components directly,
    in a config file or as arguments of `check`. A run folder may come from somebody else, so the components it names
    are not looked up there.
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


def _check_folders(args: argparse.Namespace) -> None:
    """Refuse folders containing files that cannot be read to the end, such as pipes."""
    from rustgpt_jax.workdir.run_dir import check_files

    given = vars(args)
    initial = (given.get("init_from") or "").partition("@")[0]
    for folder in [given.get("run"), given.get("source"), initial, *given.get("runs", ())]:
        if folder:
            check_files(Path(folder))


def _describe_out_of_memory(args: argparse.Namespace) -> str:
    """Return the error message for a failed allocation."""
    from rustgpt_jax.config.validation import resolve
    from rustgpt_jax.training.memory_estimate import out_of_memory_message

    try:
        return out_of_memory_message(resolve(read_config(args)[0]))
    # The config may be missing, or there may not be enough memory left to compute the sizes.
    except Exception:
        return out_of_memory_message(None)


def _is_address_space_limited() -> bool:
    """Return whether the address space is limited, for example by `ulimit -v`."""
    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY


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
    # Follow the shell's convention for processes killed by a signal.
    return code if code >= 0 else 128 - code
