"""The way in: `python launch.py VERB --config=FILE [--config.x.y=VALUE ...] [--run=DIR]`.

A verb and flags in, one function called. JAX is imported by the verbs that need it, so help answers at once.
"""

import dataclasses
import difflib
import gc
import io
import os
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from absl import app, flags, logging

from rustgpt_jax.cache_dir import cache_limit
from rustgpt_jax.errors import UserError, is_out_of_memory, suggestion
from rustgpt_jax.malloc import keep_freed_memory

# Imports and tracing make many objects that stay: Python's collector need not look through them all the time.
OBJECTS_BETWEEN_COLLECTIONS = (50_000, 20, 50)

BASE = Path(__file__).parent / "configs" / "base.py"

# Upper bounds for numeric flags; no realistic step, number of seconds or process count exceeds them.
MOST_DIGITS, LARGEST, MOST_PROCESSES = 9, 10**9 - 1, 2**16

FLAGS = flags.FLAGS
flags.DEFINE_string("config", None, "A Python file with get_config(); any knob is set by --config.x.y=VALUE.")
flags.DEFINE_string("run", None, "The folder of the run. For train: runs/NAME of the config file, unless given.")
flags.DEFINE_string("checkpoint", "last", "Which checkpoint is read: last, best, or that of a step.")
flags.register_validator(
    "checkpoint",
    lambda which: which in ("last", "best") or (which.isascii() and which.isdigit() and len(which) <= MOST_DIGITS),
    "It is last, best, or a step.",
)
flags.DEFINE_string(
    "init_from", None, "For train: a run, as RUN, RUN@STEP or RUN@best, whose parameters a new run takes."
)
flags.DEFINE_bool(
    "extend", False, "For train: allow more steps than the run's learning-rate schedule was designed for."
)
flags.DEFINE_integer(
    "step", None, "For replay: the step. For doctor: the step that went wrong, unless it is to look.", 1, LARGEST
)
flags.DEFINE_bool("taps", False, "For replay: measure the activations and gradients of every layer.")
flags.DEFINE_string("sweep", "sweep", "Which sweep of the config file: `NAME` stands for its function sweep_NAME().")
flags.DEFINE_string("launcher", "inline", "Where trials run: inline, processes or slurm. For train: inline or slurm.")
flags.DEFINE_string("mode", "auto", "How trials of one shape run: fused, exact, solo, or auto to have it chosen.")
flags.DEFINE_integer(
    "width", None, "The most trials in one program. Unless given: as many as are of use and fit.", 1, MOST_PROCESSES
)
flags.DEFINE_integer(
    "workers",
    None,
    "Worker processes or cluster jobs at a time. Unless given: one a core or GPU; 8 jobs.",
    1,
    MOST_PROCESSES,
)
flags.DEFINE_multi_string("slurm", [], "An option of Slurm as KEY=VALUE, such as partition=gpu. May be repeated.")
flags.DEFINE_bool("dry_run", False, "For sweep: list trials, shape classes, memory and cost, and run nothing.")
flags.DEFINE_string("coordinator", None, "For train in several processes: HOST:PORT of process 0. Clusters tell it.")
flags.DEFINE_integer("processes", None, "For train: how many processes there are.", 1, MOST_PROCESSES)
flags.DEFINE_integer("process", None, "For train: the number of this one, from 0.", 0, MOST_PROCESSES)
flags.DEFINE_integer("patience", 600, "Seconds after which a process gives up one that it waits for.", 1, LARGEST)
flags.DEFINE_string("profile", None, "START:STOP: trace the steps after START, up to STOP, into the run's folder.")
flags.DEFINE_integer("devices", None, "For plan: how many chips.", 1, MOST_PROCESSES)
flags.DEFINE_string("chip", None, "For plan: which chips, such as h100, b200, v5p.")
flags.DEFINE_string("from", None, "For import: a folder with a Hugging Face model.")
flags.DEFINE_string(
    "to", None, "For export: the folder to write, which transformers loads, or a .gguf file. For rerun: the new run."
)
flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "bfloat16", "float16", "int8"],
    "For export: another type than the parameters have; int8 for a .gguf file only.",
)
flags.DEFINE_list("only", [], "For check: the names of the checks to make, instead of all.")
flags.DEFINE_multi_string("module_path", [], "A folder to search for parts named by an import path. May be repeated.")
flags.DEFINE_bool("allow_oversubscription", False, "Run even if the model cannot fit in memory.")
flags.DEFINE_bool("trust", False, "For rerun and diff: run the code that a run's folder keeps, whoever wrote it.")
flags.DEFINE_integer(
    "num_samples",
    1,
    "For generate: number of texts per prompt, with consecutive seeds from sampling.seed on.",
    1,
    LARGEST,
)
flags.DEFINE_bool(
    "exhaustive", False, "For check: cover every length, batch size, dtype and mode, which takes minutes per part."
)
flags.DEFINE_multi_string("prompt", [], "A text for generate to continue, or a question to answer. May be repeated.")

OVERVIEW = """\
rustgpt_jax: train, study and talk to GPT language models. A run is a pure function of its config.

    python launch.py VERB [flags]

    train     --config=FILE [--run=DIR]      train, or go on from the run's last checkpoint
    sweep     --config=FILE [--run=DIR]      run the trials of the file's sweep(), or those that are missing, and report
    report    RUN                            what a sweep found: a table, results.csv and report.html
    explain   --config=FILE | RUN            each knob with its value and origin, shapes, FLOPs and memory
    plan      --config=FILE --devices=N --chip=NAME   whether it fits so many h100, v5p, .., and how fast it could be
    evaluate  RUN                            loss, perplexity, bits per byte; answers right, for dialogues
    generate  RUN --prompt=TEXT ...          continue texts, or answer questions, --num_samples=N times each
    chat      RUN                            talk to the model
    replay    RUN --step=K [--taps]          one step again, bit for bit; with taps, what every layer did in it
    rerun     RUN [--to=DIR] [--trust]       the whole run again, from its folder alone, and whether it is the same
    diff      RUN RUN [--trust]              where two runs differ, and the first tensor that does
    doctor    RUN [--step=K]                 why a step went wrong, and what would have saved it
    check     [PART ...]                     check a layer: mixers/attention, my_lab.mixers:Retention, or all there are
    import    --from=DIR --run=DIR           make a run of a Hugging Face model (with --config: its training knobs)
    export    RUN --to=DIR | --to=FILE.gguf  write a run as a Hugging Face model, or for llama.cpp

    RUN is the folder of a run, such as runs/rustgpt
    --config.x.y=VALUE sets a knob, such as --config.optimizer.learning_rate=3e-4 (configs/base.py lists them all);
    a list takes one item a flag, commas included (--config.data.paths=a.txt --config.data.paths=b.txt), or a quoted
    Python list ("--config.logging.sample_prompts=['Hi, you', 'Once']"); only names of parts are separated by commas
    train goes on with a run that is there: other --config.logging, --config.sampling and --config.training.steps may be
    given; --extend lets it have more steps than its learning-rate schedule was made for
    train takes --init_from=RUN@STEP, to begin with parameters of another run; and --launcher=slurm --slurm=nodes=4, to
    train on a cluster; elsewhere, several processes are told --coordinator=HOST:PORT --processes=N --process=I, and
    --patience=SECONDS, after which one that is silent is given up (docs/scaling.md)
    train --profile=START:STOP traces these steps (docs/performance.md)
    sweep takes --sweep=NAME, --launcher=inline|processes|slurm, --mode=auto|fused|exact|solo, --dry_run
    --allow_oversubscription goes on where train, sweep, evaluate, generate or chat cannot fit the memory
    --module_path=DIR adds a folder in which parts of your own are looked for; --trust runs the code that a run's folder
    keeps where it is not the code installed here (docs/security.md)
    --checkpoint=best reads the checkpoint of the lowest validation loss instead of the last, a number that of a step

Begin with:  python launch.py train --config=configs/rustgpt.py
"""


def train() -> int:
    """Train a run, or go on with it."""
    from rustgpt_jax.distributed.multihost import detected
    from rustgpt_jax.tracking.formatting import PlainTextConsole

    in_several = FLAGS.processes is not None or detected(os.environ) is not None
    if FLAGS.init_from is not None and in_several:
        raise UserError("--init_from makes the folder of a run in one process; several can go on from there.")
    if FLAGS.init_from is not None and FLAGS.config is None and FLAGS.run is None:
        raise UserError("Where to? Give --run=DIR, the folder of the new run.")
    tree, origins = _config()
    config = _resolved(tree)
    from rustgpt_jax.distributed.failure_propagation import propagate_failures
    from rustgpt_jax.distributed.multihost import is_first, join
    from rustgpt_jax.sharding.compilation_cache import keep_compiled_programs
    from rustgpt_jax.training.loop import train
    from rustgpt_jax.workdir.program_fingerprint import enable_autotune_cache
    from rustgpt_jax.workdir.run_dir import RunDir

    folder = Path(FLAGS.run or Path("runs") / Path(FLAGS.config).stem)
    if FLAGS.launcher != "inline":
        return _submit(folder, config)
    keep_compiled_programs()
    join(FLAGS.coordinator, FLAGS.processes, FLAGS.process, FLAGS.patience)
    # All processes of a run would say the same.
    console = PlainTextConsole(quiet=not is_first())
    with propagate_failures():
        enable_autotune_cache(RunDir(folder))
        if FLAGS.init_from is not None:
            from rustgpt_jax.interop.warm_start import begin_from

            config, origins = begin_from(FLAGS.init_from, folder, config, origins, console.print)
        status = train(
            config,
            folder,
            origins,
            console,
            FLAGS.patience,
            FLAGS.profile,
            FLAGS.allow_oversubscription,
            FLAGS.extend,
        )
    if status == 0:
        console.print(f"Talk to it:  python launch.py chat {folder}", highlight=False)
    return status


def _submit(folder: Path, config: Any) -> int:
    """Have a cluster train a run."""
    from rustgpt_jax.config.schema import uses_epochs
    from rustgpt_jax.sweeps.launchers.slurm import job_script, submit
    from rustgpt_jax.training.config_checks import resolve_change, validate_components

    if FLAGS.launcher != "slurm":
        raise UserError(f"--launcher={FLAGS.launcher}: train runs inline, or as a job of slurm.")
    # How many steps epochs are, the job finds.
    if not uses_epochs(config):
        resolve_change(folder, config, FLAGS.extend)
    validate_components(config)
    given = [FLAGS[name] for name in (*VERBS["train"].flags, *OF_ALL_VERBS) if name not in ("launcher", "slurm")]
    words = [word for flag in given if not flag.using_default_value for word in flag.serialize().splitlines()]
    knobs = [f"--config.{path}={text}" for path, text in _overrides]
    command = [sys.executable, str(Path(__file__).resolve()), "train", *words, *knobs]
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    job = submit(job_script(folder, command, dict(_pair(option) for option in FLAGS.slurm), Path.cwd()))
    print(f"Submitted as job {job}. Its log: {folder.absolute().with_name(f'{folder.name}.slurm-{job}.log')}")
    return 0


def sweep() -> int:
    """Run a sweep, or go on with it, and report."""
    from rustgpt_jax.sweeps.search_space import TPE, SuccessiveHalving
    from rustgpt_jax.sweeps.trials import expand, feasible_points
    from rustgpt_jax.tracking.formatting import PlainTextConsole
    from rustgpt_jax.workdir.config_files import sweep_function

    if FLAGS.config is None:
        raise UserError(
            "Which sweep? Give --config=FILE, a config with a sweep(), such as experiments/learning_rate.py."
        )
    tree, origins = _config()
    says = sweep_function(FLAGS.config, FLAGS.sweep)
    spec, fixed = _called(FLAGS.config, says), [path for path, _ in _overrides]
    if isinstance(spec, TPE):
        trials = feasible_points(tree, spec, fixed)
    else:
        trials = expand(tree, spec.trials if isinstance(spec, SuccessiveHalving) else spec, fixed)
    options = dict(_pair(option) for option in FLAGS.slurm)
    from rustgpt_jax.sweeps.run_sweep import Command, run_sweep
    from rustgpt_jax.sweeps.sweep import Settings, SweepInfo

    settings = Settings(FLAGS.launcher, FLAGS.mode, FLAGS.width, FLAGS.workers, options)
    command = Command(
        SweepInfo(FLAGS.config, says.__name__, origins), settings, FLAGS.dry_run, FLAGS.allow_oversubscription
    )
    name = "_".join([Path(FLAGS.config).stem, *says.__name__.split("_", 1)[1:]])
    return run_sweep(tree, spec, trials, fixed, Path(FLAGS.run or Path("runs") / name), command, PlainTextConsole())


def _called(file: str, says: Callable[[], Any]) -> Any:
    """What a sweep function says, with its mistakes as sentences."""
    from rustgpt_jax.sweeps.search_space import Search

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
    from rustgpt_jax.sweeps.report.report import report
    from rustgpt_jax.tracking.formatting import PlainTextConsole

    if FLAGS.run is None:
        raise UserError("Which sweep? Give --run=DIR, the folder that `sweep` wrote, such as --run=runs/learning_rate.")
    console = PlainTextConsole()
    console.print(f"Report: {report(Path(FLAGS.run), console)}", highlight=False)
    return 0


def print_config_summary() -> int:
    """Print what a config means."""
    from rustgpt_jax.tracking.formatting import PlainTextConsole

    tree, origins = _config()
    config = _resolved(tree)
    from rustgpt_jax.planning.config_summary import print_config_summary

    print_config_summary(config, origins, PlainTextConsole())
    return 0


def print_plan() -> int:
    """Tell what a config needs of chips that need not be there. The exit status is 1 if it does not fit them."""
    from rustgpt_jax.tracking.formatting import PlainTextConsole

    # No chip is a CPU.
    tree, _ = _config(platform="tpu")
    config = _resolved(tree)
    if FLAGS.devices is None:
        raise UserError("For how many chips? Give --devices=N.")
    if FLAGS.chip is None:
        raise UserError("For which chip? Give --chip=NAME, such as --chip=h100.")
    from rustgpt_jax.planning.report import print_plan

    return 0 if print_plan(config, FLAGS.chip, FLAGS.devices, PlainTextConsole()) else 1


def evaluate() -> int:
    """Measure a trained model."""
    from rustgpt_jax.cli.evaluation_report import print_evaluation
    from rustgpt_jax.tracking.formatting import PlainTextConsole

    print_evaluation(_trained(generates=False), PlainTextConsole(), FLAGS.allow_oversubscription)
    return 0


def generate() -> int:
    """Print what a model writes after each prompt."""
    from rustgpt_jax.inference.decode_params import weight_layout
    from rustgpt_jax.inference.text_generator import stream_text
    from rustgpt_jax.tracking.formatting import printable

    trained = _trained()
    writer, sampling = (
        trained.writer.with_weight_layout(weight_layout(trained.config.sampling)),
        trained.config.sampling,
    )
    for prompt in FLAGS.prompt or [""]:
        for sample in range(FLAGS.num_samples):
            # Use an explicit seed rather than a derived one, so that any single sample can be drawn again.
            drawn = dataclasses.replace(sampling, seed=(sampling.seed + sample) % 2**32)
            notes = list[str]()
            print(prompt, end="\n" if writer.is_dialogue else "")
            for piece in stream_text(writer, writer.prompt(prompt), drawn, notes.append):
                print(printable(piece), end="", flush=True)
            print("\n", flush=True)
            for note in notes:
                print(note, file=sys.stderr)
    return 0


def chat() -> int:
    """Talk to a model."""
    from rustgpt_jax.inference.chat import chat
    from rustgpt_jax.tracking.formatting import PlainTextConsole

    trained = _trained()
    title = f"{Path(FLAGS.run).resolve().name} at step {trained.step:,}"
    chat(trained.writer, trained.config.sampling, PlainTextConsole(), title)
    return 0


def replay() -> int:
    """Make one step of a run again. The exit status is 1 if it is not what was recorded."""
    from rustgpt_jax.reproduce.replay import replay
    from rustgpt_jax.tracking.formatting import PlainTextConsole

    if FLAGS.step is None:
        raise UserError("Which step? Give --step=K: its line of metrics.jsonl has the number K.")
    _compute_as(_run_folder())
    return 0 if replay(_run_folder(), FLAGS.step, FLAGS.taps, PlainTextConsole()) else 1


def rerun() -> int:
    """Make a whole run again, and compare. The exit status is 1 if they differ, or that of a stop."""
    from rustgpt_jax.reproduce.rerun import rerun
    from rustgpt_jax.tracking.formatting import PlainTextConsole

    return rerun(_run_folder(), Path(FLAGS.to) if FLAGS.to else None, PlainTextConsole(), FLAGS.trust)


def diff() -> int:
    """Tell two runs apart. The exit status is 1 if they differ."""
    from rustgpt_jax.reproduce.run_diff import diff
    from rustgpt_jax.tracking.formatting import PlainTextConsole

    if len(_arguments) != 2:
        raise UserError("Which two runs? Give `diff RUN RUN`, such as `diff runs/a runs/b`.")
    return 0 if diff(*map(Path, _arguments), PlainTextConsole(), FLAGS.trust) else 1


def doctor() -> int:
    """Look for what made a step of a run go wrong."""
    from rustgpt_jax.reproduce.diagnose import doctor
    from rustgpt_jax.tracking.formatting import PlainTextConsole

    _compute_as(_run_folder())
    doctor(_run_folder(), FLAGS.step, PlainTextConsole())
    return 0


def check_components() -> int:
    """Check parts: layers, optimizers, tokenizers and all else that stands in a table."""
    from rustgpt_jax.config.validation import parse_all
    from rustgpt_jax.conformance.runner import check_components
    from rustgpt_jax.tracking.formatting import PlainTextConsole

    return check_components(_arguments, PlainTextConsole(), FLAGS.only, parse_all(_overrides), FLAGS.exhaustive)


def import_model() -> int:
    """Make a run of a Hugging Face model."""
    if FLAGS["from"].value is None or FLAGS.run is None:
        raise UserError("Which model, and where to? Give --from=DIR, a Hugging Face folder, and --run=DIR, a new run.")
    FLAGS.config = FLAGS.config or str(BASE)
    tree, origins = _config()
    from rustgpt_jax.interop.convert import import_run

    import_run(Path(FLAGS["from"].value), Path(FLAGS.run), tree, origins, print)
    return 0


def export() -> int:
    """Write a run as a Hugging Face model, or as a file for llama.cpp."""
    if FLAGS.run is None or FLAGS.to is None:
        raise UserError("Which run, and where to? Give --run=DIR, a run, and --to=DIR, a new folder.")
    if Path(FLAGS.to).suffix == ".gguf":
        from rustgpt_jax.interop.gguf import export_gguf

        export_gguf(Path(FLAGS.run), Path(FLAGS.to), FLAGS.checkpoint, FLAGS.dtype, print)
        return 0
    from rustgpt_jax.interop.convert import export_run

    export_run(Path(FLAGS.run), Path(FLAGS.to), FLAGS.checkpoint, FLAGS.dtype, print)
    return 0


class Verb(NamedTuple):
    """What a verb does, the flags that it reads, and how many arguments may follow it; one alone is the run."""

    function: Callable[[], int]
    flags: tuple[str, ...]
    most_arguments: int = 1


VERBS = {
    "train": Verb(
        train,
        (
            "config",
            "run",
            "init_from",
            "extend",
            "launcher",
            "slurm",
            "coordinator",
            "processes",
            "process",
            "patience",
            "profile",
            "allow_oversubscription",
        ),
        0,
    ),
    "sweep": Verb(
        sweep,
        (
            "config",
            "run",
            "sweep",
            "launcher",
            "mode",
            "width",
            "workers",
            "slurm",
            "dry_run",
            "allow_oversubscription",
        ),
        0,
    ),
    "report": Verb(report, ("run",)),
    "explain": Verb(print_config_summary, ("config", "run")),
    "plan": Verb(print_plan, ("config", "run", "devices", "chip")),
    "evaluate": Verb(evaluate, ("run", "checkpoint", "allow_oversubscription")),
    "generate": Verb(generate, ("run", "checkpoint", "prompt", "num_samples", "allow_oversubscription")),
    "chat": Verb(chat, ("run", "checkpoint", "allow_oversubscription")),
    "replay": Verb(replay, ("run", "step", "taps")),
    "rerun": Verb(rerun, ("run", "to", "trust")),
    "diff": Verb(diff, ("trust",), 2),
    "doctor": Verb(doctor, ("run", "step")),
    "check": Verb(check_components, ("only", "exhaustive"), sys.maxsize),
    "import": Verb(import_model, ("from", "run", "config"), 0),
    "export": Verb(export, ("run", "to", "checkpoint", "dtype")),
}
# Flags accepted by every command.
OF_ALL_VERBS = ("module_path",)
# Verbs that read no knobs.
WITHOUT_KNOBS = ("report", "replay", "rerun", "diff", "doctor", "export")

# What follows the verb.
_arguments: list[str] = []

# `--config.x.y=VALUE` in the order given; filled while flags are parsed.
_overrides: list[tuple[str, str]] = []


def _parse(argv: Sequence[str]) -> list[str]:
    """Let absl parse its flags, and keep `--config.x.y` aside: its paths and types are the schema's to check."""
    others: list[str] = []
    for word in argv[1:]:
        if any("\ud800" <= letter <= "\udfff" for letter in word):
            _fail(f"The argument {ascii(word)[1:-1]} is not UTF-8.")
    words = iter(argv[1:])
    for word in words:
        if word.lstrip("-").startswith("config.") and word.startswith("-"):
            path, equals, text = word.lstrip("-").removeprefix("config.").partition("=")
            _overrides.append((path, text if equals else next(words, "")))
        elif word.lstrip("-").partition("=")[0] in ("flagfile", "undefok") and word.startswith("-"):
            # Absl's --flagfile would read any file, and would not recognize --config.x.y=VALUE in it.
            _fail(f"There is no flag {word.partition('=')[0]}: give the flags themselves.")
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


def _config(platform: str | None = None) -> tuple[Any, dict[str, str]]:
    """The config file or the run's config with the command line's overrides, and where each value came from.

    Its precision is settled: what `auto` is on a platform, or else on the device at hand.
    """
    from rustgpt_jax.config.validation import leaves

    tree, origins = _recipe()
    # A config that says nothing of it is told so when it is resolved.
    if dict(leaves(tree)).get("model.dtype") == "auto":
        from rustgpt_jax.distributed.multihost import detected

        if platform is None and (FLAGS.launcher == "slurm" or FLAGS.processes or detected(os.environ)):
            raise UserError(
                "config.model.dtype='auto' asks the device of this process, and others are to compute: name it, "
                "float32 or bfloat16."
            )
        from rustgpt_jax.sharding.auto_dtype import settle

        settle(tree, origins, platform)
    return tree, origins


def _recipe() -> tuple[Any, dict[str, str]]:
    from rustgpt_jax.workdir.config_files import read_recipe, recipe_of_run

    if FLAGS.config is not None:
        return read_recipe(FLAGS.config, BASE, _overrides)
    if FLAGS.init_from is not None:
        from rustgpt_jax.interop.warm_start import run_and_step

        return recipe_of_run(run_and_step(FLAGS.init_from)[0], _overrides)
    if FLAGS.run is None:
        raise UserError("Which config? Give --config=FILE, such as --config=configs/rustgpt.py.")
    return recipe_of_run(Path(FLAGS.run), _overrides)


def _resolved(tree: Any) -> Any:
    from rustgpt_jax.config.validation import resolve

    return resolve(tree)


def _trained(generates: bool = True) -> Any:
    """The trained model of --run, with the sampling knobs of the command line."""
    folder = _run_folder()
    tree, _ = _config()
    config = _resolved(tree)
    from rustgpt_jax.sharding.compilation_cache import keep_compiled_programs
    from rustgpt_jax.training.load_model import load

    keep_compiled_programs()
    n_generated = config.sampling.max_tokens if generates else 0
    trained = load(folder, FLAGS.checkpoint, is_oversubscribed=FLAGS.allow_oversubscription, n_generated=n_generated)
    return trained.with_config(config)


def _compute_as(run: Path) -> None:
    """Have JAX, which is not used yet, compute as it did for a run."""
    from rustgpt_jax.reproduce.snapshot_runner import use_devices_of
    from rustgpt_jax.sharding.compilation_cache import keep_compiled_programs
    from rustgpt_jax.workdir.program_fingerprint import load_autotuning
    from rustgpt_jax.workdir.run_dir import RunDir

    keep_compiled_programs()
    use_devices_of(RunDir(run))
    load_autotuning(RunDir(run))


def _run_folder() -> Path:
    """The run that is named on the command line."""
    if FLAGS.run is None:
        raise UserError("Which run? Give its folder, which `train` wrote, such as runs/rustgpt.")
    return Path(FLAGS.run)


def _exhausted() -> str:
    """Return the error message for a failed allocation."""
    from rustgpt_jax.training.memory_estimate import out_of_memory_message

    try:
        return out_of_memory_message(_resolved(_config()[0]))
    # The config may be missing, or there may not be enough memory left to compute the sizes.
    except Exception:
        return out_of_memory_message(None)


def _has_limit() -> bool:
    """Return whether the address space is limited, for example by `ulimit -v`."""
    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY


def _watched() -> int | None:
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
        _fail(_exhausted())
    # Follow the shell's convention for processes killed by a signal.
    return code if code >= 0 else 128 - code


def _fail(sentence: str) -> NoReturn:
    sys.stdout.flush()
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    # Not sys.exit: where a write has failed, threads of libraries wait for it, and their exit handlers complain of it.
    os._exit(2)


def _check_usage(verb: str) -> None:
    """End with a sentence if a verb is given what it does not read; one argument that is a run stands for --run."""
    _, own, most = VERBS[verb]
    if len(_arguments) > most:
        takes = f"no more than {most} argument{'s' * (most > 1)}" if most else "no argument"
        _fail(f"{verb} takes {takes}, and {_arguments[most]!r} is one; flags begin with --.")
    ours = [flag.name for flag in FLAGS.get_flags_for_module(FLAGS.find_module_defining_flag("config"))]
    for name in ours:
        if FLAGS[name].present and name not in (*own, *OF_ALL_VERBS):
            readers = ", ".join(each for each, (_, names, _) in VERBS.items() if name in names)
            _fail(f"{verb} does not read --{name}; what reads it: {readers}.")
    if _overrides and verb in WITHOUT_KNOBS:
        _fail(f"{verb} does not read --config.{_overrides[0][0]}: the config is that of the run.")
    if verb == "explain" and FLAGS.config is not None and (_arguments or FLAGS.run is not None):
        _fail("explain tells of a config or of a run: give --config or the run.")
    if most == 1 and _arguments:
        if FLAGS.run is not None:
            _fail(f"Which run: {_arguments[0]} or --run={FLAGS.run}? Give one of them.")
        FLAGS.run = _arguments[0]


def _check_files(verb: str) -> None:
    """Refuse user folders containing files that cannot be read to the end, such as pipes."""
    from rustgpt_jax.workdir.run_dir import check_files

    named = [FLAGS.run, FLAGS["from"].value, (FLAGS.init_from or "").partition("@")[0]]
    for folder in [*named, *(_arguments if verb != "check" else ())]:
        if folder:
            check_files(Path(folder))


def _search_modules(verb: str) -> None:
    """Set the search path for parts named by an import path, such as my_lab.mixers:Retention.

    Child processes use the same path. The current folder is searched only if the user names the parts directly, in a
    config file or as arguments of `check`. A run folder may come from somebody else, so the parts it names are not
    looked up there.
    """
    folders = [str(Path(folder).resolve()) for folder in FLAGS.module_path]
    for given, folder in zip(FLAGS.module_path, folders, strict=True):
        if not Path(folder).is_dir():
            _fail(f"--module_path={given}: not a folder.")
    if folders:
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [*folders, os.environ.get("PYTHONPATH")]))
    if FLAGS.config is not None or verb == "check":
        folders.append(str(Path.cwd()))
    sys.path += folders


def main(argv: Sequence[str]) -> int:
    """Call the verb named on the command line."""
    if len(argv) == 1:
        print(OVERVIEW, end="")
        return 0
    verb, *_arguments[:] = argv[1:]
    if verb not in VERBS:
        _fail(f"There is no verb {verb!r}.{suggestion(verb, VERBS)}")
    _check_usage(verb)
    _search_modules(verb)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # File names and texts in damaged folders may not be valid Unicode.
        sys.stdout.reconfigure(errors="backslashreplace")
    if "allow_oversubscription" in VERBS[verb].flags and _has_limit():
        status = _watched()
        if status is not None:
            return status
    keep_freed_memory()
    gc.set_threshold(*OBJECTS_BETWEEN_COLLECTIONS)
    # What goes wrong in libraries they raise too, and it is told in a sentence; progress goes to the console.
    logging.set_verbosity(logging.FATAL)
    try:
        # Validate once here, rather than in each process that is started.
        cache_limit()
        _check_files(verb)
        return VERBS[verb].function()
    except UserError as error:
        _fail(str(error))
    except OSError as error:
        # For example, the path is too long or permission is denied. An error that names no file is a bug.
        if error.filename is None:
            raise
        _fail(str(UserError(f"{os.fsdecode(error.filename)}: {error.strerror}.")))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        _fail(_exhausted())
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    if any(word in ("-h", "-help", "--help") for word in sys.argv[1:]):
        print(OVERVIEW, end="")
    else:
        app.run(main, flags_parser=_parse)
