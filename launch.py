"""The way in: `python launch.py VERB --config=FILE [--config.x.y=VALUE ...] [--run=DIR]`.

A verb and flags in, one function called. JAX is imported by the verbs that need it, so help answers at once.
"""

import difflib
import runpy
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags, logging

from rustgpt_jax.errors import UserError, suggestion

FLAGS = flags.FLAGS
flags.DEFINE_string("config", None, "A Python file with get_config(); any knob is set by --config.x.y=VALUE.")
flags.DEFINE_string("run", None, "The folder of the run. For train: runs/NAME of the config file, unless given.")
flags.DEFINE_enum("checkpoint", "last", ["last", "best"], "Which checkpoint evaluate, generate and chat read.")
flags.DEFINE_string("sweep", "sweep", "Which sweep of the config file: `NAME` stands for its function sweep_NAME().")
flags.DEFINE_string("launcher", "inline", "Where trials run: inline, processes or slurm.")
flags.DEFINE_string("mode", "auto", "How trials of one shape run: fused, exact, solo, or auto to have it chosen.")
flags.DEFINE_integer("width", None, "The most trials in one program. Unless given: as many as are of use and fit.", 1)
flags.DEFINE_integer(
    "workers", None, "Worker processes or cluster jobs at a time. Unless given: one a core or GPU; 8 jobs.", 1
)
flags.DEFINE_multi_string("slurm", [], "An option of Slurm as KEY=VALUE, such as partition=gpu. May be repeated.")
flags.DEFINE_bool("dry_run", False, "For sweep: list trials, shape classes, memory and cost, and run nothing.")
flags.DEFINE_string("from", None, "For import: a folder with a Hugging Face model.")
flags.DEFINE_string("to", None, "For export: the folder to write, which transformers loads.")
flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16", "float16"], "For export: another type than the parameters have."
)
flags.DEFINE_list("only", [], "For check: the names of the checks to make, instead of all.")
flags.DEFINE_multi_string("prompt", [], "A text for generate to continue, or a question to answer. May be repeated.")

OVERVIEW = """\
rustgpt_jax: train, study and talk to GPT language models. A run is a pure function of its config.

    python launch.py VERB [flags]

    train     --config=FILE [--run=DIR]      train, or go on from the run's last checkpoint
    sweep     --config=FILE [--run=DIR]      run the trials of the file's sweep(), or those that are missing, and report
    report    --run=DIR                      what a sweep found: a table, results.csv and report.html
    explain   --config=FILE | --run=DIR      each knob with its value and origin, shapes, FLOPs and memory
    evaluate  --run=DIR                      loss, perplexity, bits per byte; answers right, for dialogues
    generate  --run=DIR --prompt=TEXT ...    continue texts, or answer questions
    chat      --run=DIR                      talk to the model
    check     [PART ...]                     check a layer: mixers/attention, my_lab.mixers:Retention, or all there are
    import    --from=DIR --run=DIR           make a run of a Hugging Face model (with --config: its training knobs)
    export    --run=DIR --to=DIR             write a run as a Hugging Face model

    --config.x.y=VALUE sets a knob, such as --config.optimizer.learning_rate=3e-4 (configs/base.py lists them all)
    sweep takes --sweep=NAME, --launcher=inline|processes|slurm, --mode=auto|fused|exact|solo, --dry_run
    --checkpoint=best reads the checkpoint of the lowest validation loss instead of the last

Begin with:  python launch.py train --config=configs/rustgpt.py
"""


def train() -> int:
    """Train a run, or go on with it."""
    from rich.console import Console

    tree, origins = _config()
    config = _resolved(tree)
    from rustgpt_jax.parallel.devices import keep_compiled_programs
    from rustgpt_jax.training.loop import train

    keep_compiled_programs()
    folder = Path(FLAGS.run or Path("runs") / Path(FLAGS.config).stem)
    console = Console()
    status = train(config, folder, origins, console)
    if status == 0:
        console.print(f"Talk to it:  python launch.py chat --run={folder}", highlight=False)
    return status


def sweep() -> int:
    """Run a sweep, or go on with it, and report."""
    from rich.console import Console

    from rustgpt_jax.sweeps.space import SuccessiveHalving, TreeParzen
    from rustgpt_jax.sweeps.trials import expand

    if FLAGS.config is None:
        raise UserError(
            "Which sweep? Give --config=FILE, a config with a sweep(), such as experiments/learning_rate.py."
        )
    tree, origins = _config()
    says = _sweep_function(FLAGS.config)
    spec, fixed = _called(FLAGS.config, says), [path for path, _ in _overrides]
    if isinstance(spec, TreeParzen):
        trials = expand(tree, [spec.middle], fixed)
    else:
        trials = expand(tree, spec.trials if isinstance(spec, SuccessiveHalving) else spec, fixed)
    options = dict(_pair(option) for option in FLAGS.slurm)
    from rustgpt_jax.sweeps.command import Command, run_sweep
    from rustgpt_jax.sweeps.sweep import About, Settings

    settings = Settings(FLAGS.launcher, FLAGS.mode, FLAGS.width, FLAGS.workers, options)
    command = Command(About(FLAGS.config, says.__name__, origins), settings, FLAGS.dry_run)
    name = "_".join([Path(FLAGS.config).stem, *says.__name__.split("_", 1)[1:]])
    return run_sweep(tree, spec, trials, fixed, Path(FLAGS.run or Path("runs") / name), command, Console())


def _sweep_function(file: str) -> Callable[[], Any]:
    """The function of a config file that --sweep names: sweep, or sweep_NAME."""
    functions = {name: value for name, value in _namespace(file).items() if name.split("_")[0] == "sweep"}
    names = [name.removeprefix("sweep_") for name, value in functions.items() if callable(value)]
    if not names:
        raise UserError(
            f"{file} has no sweep(): a function that yields overrides, as experiments/learning_rate.py has."
        )
    if FLAGS.sweep not in names:
        raise UserError(f"--sweep: {file} has no sweep {FLAGS.sweep!r}.{suggestion(FLAGS.sweep, names)}")
    return functions["sweep" if FLAGS.sweep == "sweep" else f"sweep_{FLAGS.sweep}"]


def _called(file: str, says: Callable[[], Any]) -> Any:
    """What a sweep function says, with its mistakes as sentences."""
    from rustgpt_jax.sweeps.space import Search

    try:
        spec = says()
        return spec if isinstance(spec, Search) else list(spec)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{file}: {says.__name__}() fails: {type(error).__name__}: {error}.") from error


def _pair(option: str) -> tuple[str, str]:
    key, equals, value = option.partition("=")
    if not equals:
        raise UserError(f"--slurm={option}: an option is KEY=VALUE, such as --slurm=partition=gpu.")
    return key, value


def report() -> int:
    """Tell what a sweep found."""
    from rich.console import Console

    from rustgpt_jax.sweeps.report.report import report

    if FLAGS.run is None:
        raise UserError("Which sweep? Give --run=DIR, the folder that `sweep` wrote, such as --run=runs/learning_rate.")
    console = Console()
    console.print(f"Report: {report(Path(FLAGS.run), console)}", highlight=False)
    return 0


def explain() -> int:
    """Print what a config means."""
    from rich.console import Console

    tree, origins = _config()
    config = _resolved(tree)
    from rustgpt_jax.runs.explain import explain

    explain(config, origins, Console())
    return 0


def evaluate() -> int:
    """Measure a trained model."""
    from rich.console import Console

    from rustgpt_jax.evaluation.report import evaluate_run

    evaluate_run(_trained(), Console())
    return 0


def generate() -> int:
    """Print what a model writes after each prompt."""
    from rustgpt_jax.decoding.text import write_as_it_comes
    from rustgpt_jax.runs.formatting import printable

    trained = _trained()
    for prompt in FLAGS.prompt or [""]:
        print(prompt, end="\n" if trained.writer.is_dialogue else "")
        for piece in write_as_it_comes(trained.writer, trained.writer.prompt(prompt), trained.config.sampling):
            print(printable(piece), end="", flush=True)
        print("\n")
    return 0


def chat() -> int:
    """Talk to a model."""
    from rich.console import Console

    from rustgpt_jax.decoding.chat import chat

    trained = _trained()
    title = f"{Path(FLAGS.run).resolve().name} at step {trained.step:,}"
    chat(trained.writer, trained.config.sampling, Console(), title)
    return 0


def check() -> int:
    """Check parts: layers, optimizers, tokenizers and all else that stands in a table."""
    from rich.console import Console

    from rustgpt_jax.conformance.command import check
    from rustgpt_jax.resolve import parse

    return check(_arguments, Console(), FLAGS.only, {path: parse(path, text) for path, text in _overrides})


def import_model() -> int:
    """Make a run of a Hugging Face model."""
    if FLAGS["from"].value is None or FLAGS.run is None:
        raise UserError("Which model, and where to? Give --from=DIR, a Hugging Face folder, and --run=DIR, a new run.")
    FLAGS.config = FLAGS.config or str(Path(__file__).parent / "configs" / "base.py")
    tree, origins = _config()
    from rustgpt_jax.interop.runs import import_run

    import_run(Path(FLAGS["from"].value), Path(FLAGS.run), tree, origins, print)
    return 0


def export() -> int:
    """Write a run as a Hugging Face model."""
    if FLAGS.run is None or FLAGS.to is None:
        raise UserError("Which run, and where to? Give --run=DIR, a run, and --to=DIR, a new folder.")
    from rustgpt_jax.interop.runs import export_run

    export_run(Path(FLAGS.run), Path(FLAGS.to), FLAGS.checkpoint, FLAGS.dtype, print)
    return 0


VERBS: dict[str, Callable[[], int]] = {
    "train": train,
    "sweep": sweep,
    "report": report,
    "explain": explain,
    "evaluate": evaluate,
    "generate": generate,
    "chat": chat,
    "check": check,
    "import": import_model,
    "export": export,
}

# What follows the verb. Only check takes something.
_arguments: list[str] = []

# `--config.x.y=VALUE` in the order given; filled while flags are parsed.
_overrides: list[tuple[str, str]] = []


def _parse(argv: Sequence[str]) -> list[str]:
    """Let absl parse its flags, and keep `--config.x.y` aside: its paths and types are the schema's to check."""
    others: list[str] = []
    words = iter(argv[1:])
    for word in words:
        if word.lstrip("-").startswith("config.") and word.startswith("-"):
            path, equals, text = word.lstrip("-").removeprefix("config.").partition("=")
            _overrides.append((path, text if equals else next(words, "")))
        else:
            others.append(word)
    try:
        return FLAGS([argv[0], *others])
    except flags.UnrecognizedFlagError as error:
        ours = FLAGS.get_flags_for_module(FLAGS.find_module_defining_flag("config"))
        near = difflib.get_close_matches(error.flagname, ["help", *(flag.name for flag in ours)], n=1)
        hint = f" Did you mean --{near[0]}?" if near else " `python launch.py --help` lists them."
        _fail(f"There is no flag --{error.flagname}.{hint}")
    except flags.Error as error:
        _fail(" ".join(str(error).split()))


def _config() -> tuple[Any, dict[str, str]]:
    """The config file or the run's config with the command line's overrides, and where each value came from."""
    from rustgpt_jax.config import FIELDS
    from rustgpt_jax.resolve import leaves, override, parse

    if FLAGS.config is None and FLAGS.run is None:
        raise UserError("Which config? Give --config=FILE, such as --config=configs/rustgpt.py.")
    if FLAGS.config is None:
        return _config_of_run()
    tree = _load(FLAGS.config)
    base = dict(leaves(_load(str(Path(__file__).parent / "configs" / "base.py"))))
    given = dict(leaves(tree))
    origins = {path: "base" if given.get(path) == base.get(path) else FLAGS.config for path in FIELDS}
    for path, text in _overrides:
        override(tree, path, parse(path, text))
        origins[path] = "command line"
    return tree, origins


def _config_of_run() -> tuple[Any, dict[str, str]]:
    from ml_collections import ConfigDict

    from rustgpt_jax.config import to_dict
    from rustgpt_jax.resolve import override, parse
    from rustgpt_jax.runs.folder import load_config, load_origins

    path = Path(FLAGS.run)
    tree, origins = ConfigDict(to_dict(load_config(path))), load_origins(path)
    for knob, text in _overrides:
        override(tree, knob, parse(knob, text))
        origins[knob] = "command line"
    return tree, origins


def _resolved(tree: Any) -> Any:
    from rustgpt_jax.resolve import resolve

    return resolve(tree)


@cache
def _namespace(file: str) -> dict[str, Any]:
    """What a config file defines."""
    path = Path(file)
    if not path.is_file():
        beside = [str(path.with_name(other.name)) for other in path.parent.glob("*.py")]
        raise UserError(f"There is no config file {file}.{suggestion(file, beside)}")
    try:
        return runpy.run_path(file)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{file} cannot be read as a config: {type(error).__name__}: {error}.") from error


def _load(file: str) -> Any:
    """Run a config file's get_config()."""
    names = _namespace(file)
    try:
        tree = names["get_config"]()
    except UserError:
        raise
    except Exception as error:
        what = "it has no get_config()" if "get_config" not in names else f"{type(error).__name__}: {error}"
        raise UserError(f"{file} cannot be read as a config: {what}.") from error
    if not hasattr(tree, "items"):
        raise UserError(f"{file} cannot be read as a config: get_config() gives {tree!r}, not a ConfigDict.")
    return tree


def _trained() -> Any:
    """The trained model of --run, with the sampling knobs of the command line."""
    if FLAGS.run is None:
        raise UserError("Which run? Give --run=DIR, the folder that `train` wrote, such as --run=runs/rustgpt.")
    tree, _ = _config_of_run()
    config = _resolved(tree)
    from rustgpt_jax.parallel.devices import keep_compiled_programs
    from rustgpt_jax.training.trained import load

    keep_compiled_programs()
    return load(Path(FLAGS.run), FLAGS.checkpoint).with_config(config)


def _fail(sentence: str) -> NoReturn:
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)


def main(argv: Sequence[str]) -> int:
    """Call the verb named on the command line."""
    if len(argv) == 1:
        print(OVERVIEW, end="")
        return 0
    verb, *rest = argv[1:]
    if verb not in VERBS:
        _fail(f"There is no verb {verb!r}.{suggestion(verb, VERBS)}")
    if verb == "check":
        _arguments.extend(rest)
    elif rest:
        _fail(f"{verb} takes no argument {rest[0]!r}; flags begin with --.")
    # Libraries report their progress to absl at this level; ours goes to the console.
    logging.set_verbosity(logging.WARNING)
    try:
        return VERBS[verb]()
    except UserError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    # Parts of one's own, such as my_lab.mixers:Retention, are looked for in the current folder too.
    sys.path.append(str(Path.cwd()))
    if any(word in ("-h", "-help", "--help") for word in sys.argv[1:]):
        print(OVERVIEW, end="")
    else:
        app.run(main, flags_parser=_parse)
