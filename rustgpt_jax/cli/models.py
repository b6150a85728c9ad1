"""The verbs that read a model: `evaluate`, `generate`, `chat`, `import` and `export`."""

import argparse
import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rustgpt_jax.cli.arguments import VerbParser, get_run_folder, read_config, whole_number
from rustgpt_jax.cli.output import VerbResult
from rustgpt_jax.errors import UserError


def add_arguments(parser: VerbParser) -> None:
    """Add the arguments of `evaluate` and `chat`."""
    parser.add_run()
    parser.add_checkpoint()
    parser.add_allow_oversubscription()


def add_generate_arguments(parser: VerbParser) -> None:
    """Add the arguments of `generate`."""
    add_arguments(parser)
    help = "A text to continue, or a question to answer. May be repeated."
    parser.add_argument("--prompt", metavar="TEXT", action="append", default=[], help=help)
    help = "Texts per prompt, with consecutive seeds from config.sampling.seed on."
    parser.add_argument("--num_samples", metavar="N", type=whole_number(1), default=1, help=help)


def run_evaluate(args: argparse.Namespace) -> VerbResult:
    """Measure loss, perplexity and bits per byte, and accuracy on dialogues."""
    trained = _load(args, generates=False)
    from rustgpt_jax.cli.evaluation_report import print_evaluation
    from rustgpt_jax.tracking.console import PlainTextConsole

    evaluations = print_evaluation(trained, PlainTextConsole(), args.allow_oversubscription)
    return VerbResult(0, _describe_model(trained) | {"evaluations": [each.describe() for each in evaluations]})


def run_generate(args: argparse.Namespace) -> VerbResult:
    """Continue text or answer questions."""
    trained = _load(args)
    from rustgpt_jax.inference.text_generator import Ending, select_weight_layout, stream_text
    from rustgpt_jax.tracking.console import replace_control_characters

    sampling = trained.config.sampling
    writer = trained.generator.with_weight_layout(select_weight_layout(sampling))
    samples = []
    for prompt in args.prompt or [""]:
        for sample in range(args.num_samples):
            # Use an explicit seed rather than a derived one, so that any single sample can be drawn again.
            drawn = dataclasses.replace(sampling, seed=(sampling.seed + sample) % 2**32)
            pieces, endings = list[str](), list[Ending]()
            print(prompt, end="\n" if writer.is_dialogue else "")
            for piece in stream_text(writer, writer.encode_prompt(prompt), drawn, endings.append):
                pieces.append(piece)
                print(replace_control_characters(piece), end="", flush=True)
            print("\n", flush=True)
            (ending,) = endings
            if ending.warning is not None:
                print(ending.warning, file=sys.stderr)
            samples.append(
                {
                    "prompt": prompt,
                    "seed": drawn.seed,
                    "text": "".join(pieces),
                    "tokens": ending.tokens,
                    "finish_reason": ending.finish_reason,
                }
            )
    return VerbResult(0, _describe_model(trained) | {"samples": samples})


def run_chat(args: argparse.Namespace) -> VerbResult:
    """Chat with a model."""
    trained = _load(args)
    from rustgpt_jax.inference.chat import chat
    from rustgpt_jax.tracking.console import PlainTextConsole

    title = f"{Path(args.run).resolve().name} at step {trained.step:,}"
    turns = chat(trained.generator, trained.config.sampling, PlainTextConsole(), title)
    return VerbResult(0, _describe_model(trained) | {"turns": [turn._asdict() for turn in turns]})


def add_import_arguments(parser: VerbParser) -> None:
    """Add the flags of `import`."""
    parser.add_argument("--from", dest="source", metavar="DIR", help="A folder with a Hugging Face model.")
    parser.add_argument("--run", metavar="DIR", help="The folder of the new run.")
    parser.add_config()


def run_import(args: argparse.Namespace) -> VerbResult:
    """Create a run from a Hugging Face model."""
    if args.source is None or args.run is None:
        raise UserError("import needs --from=DIR, a Hugging Face folder, and --run=DIR, the folder of the new run.")
    args.config = args.config or "base"
    values, overrides, origins = read_config(args)
    from rustgpt_jax.interop.convert import import_run

    log = _PrintedMessages()
    architecture = import_run(Path(args.source), Path(args.run), values | overrides, origins, log.print)
    document = {"source": args.source, "run": args.run, "architecture": architecture, "messages": log.messages}
    return VerbResult(0, document)


def add_export_arguments(parser: VerbParser) -> None:
    """Add the arguments of `export`."""
    parser.add_run()
    parser.add_argument(
        "--to",
        metavar="PATH",
        help="The folder to write, which transformers loads; FILE.gguf, for llama.cpp; or DIR.stablehlo, a folder of "
        "StableHLO programs for JAX and IREE. `stablehlo` means RUN.stablehlo in the current folder.",
    )
    parser.add_checkpoint()
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "int8"),
        help="The dtype to convert the parameters to; int8 is not for transformers, and float16 not for StableHLO. "
        "Default: unchanged.",
    )
    help = "StableHLO: the number of rows of a batch. Default: any number."
    parser.add_argument("--batch", metavar="N", type=whole_number(1), help=help)
    help = "StableHLO: the platforms that can run the programs, of cpu, cuda, rocm and tpu. Default: cpu,cuda,tpu."
    parser.add_argument("--platforms", metavar="NAME,...", type=_split_names, help=help)
    help = "StableHLO: the tokens of a row that the cache has room for. Default: the model's context length."
    parser.add_argument("--cache_length", metavar="N", type=whole_number(1), help=help)
    help = "StableHLO: the lengths to which prompts are padded. Default: 16, 32, 64, ..., up to the cache length."
    parser.add_argument("--prefill_lengths", metavar="N,...", type=_split_numbers, help=help)


def _split_names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text.split(",")))


def _split_numbers(text: str) -> tuple[int, ...]:
    return tuple(whole_number(1)(part) for part in text.split(","))


# Arguments of `export` that only StableHLO programs have.
STABLEHLO_OPTIONS = ("batch", "platforms", "cache_length", "prefill_lengths")


def run_export(args: argparse.Namespace) -> VerbResult:
    """Export a run as a Hugging Face model, a .gguf file for llama.cpp, or StableHLO programs for JAX and IREE."""
    if args.run is None or args.to is None:
        raise UserError(
            "export needs the folder of a run, and --to=DIR, a new folder, --to=FILE.gguf, or --to=stablehlo."
        )
    run, log = Path(args.run), _PrintedMessages()
    to = Path(f"{run.resolve().name}.stablehlo" if args.to == "stablehlo" else args.to)
    kind, export = _find_format(to, args)
    architecture = export(run, to, args.checkpoint, args.dtype, log.print)
    files = sorted(file for file in to.rglob("*") if file.is_file()) if to.is_dir() else [to]
    document = {
        "run": args.run,
        "checkpoint": args.checkpoint,
        "format": kind,
        "architecture": architecture,
        "files": [{"path": file, "bytes": file.stat().st_size} for file in files],
        "messages": log.messages,
    }
    return VerbResult(0, document)


def _find_format(to: Path, args: argparse.Namespace) -> tuple[str, Callable[..., str | None]]:
    """Return the format of the path to write, and the function that exports a run to it."""
    options = {name: value for name in STABLEHLO_OPTIONS if (value := getattr(args, name)) is not None}
    if to.suffix == ".stablehlo":
        from rustgpt_jax.interop.stablehlo import ExportOptions, export_stablehlo

        return "stablehlo", partial(export_stablehlo, options=ExportOptions(**options))
    if options:
        raise UserError(f"--{next(iter(options))} is only for --to=stablehlo and --to=DIR.stablehlo.")
    if to.suffix == ".gguf":
        from rustgpt_jax.interop.gguf import export_gguf

        return "gguf", export_gguf
    from rustgpt_jax.interop.convert import export_run

    return "huggingface", export_run


class _PrintedMessages:
    """Prints messages and keeps them."""

    def __init__(self) -> None:
        self.messages = list[str]()

    def print(self, message: str) -> None:
        print(message)
        self.messages.append(message)


def _describe_model(trained: Any) -> dict[str, Any]:
    return {"run": trained.run.path, "step": trained.step, "is_dialogue": trained.generator.is_dialogue}


def _load(args: argparse.Namespace, generates: bool = True) -> Any:
    """Return the LoadedModel of a run, with the overrides of the command line."""
    folder = get_run_folder(args)
    from rustgpt_jax.config.validation import resolve

    config = resolve(*read_config(args)[:2])
    from rustgpt_jax.process_setup import enable_compilation_cache
    from rustgpt_jax.training.load_model import load_model

    enable_compilation_cache()
    n_generated = config.sampling.max_tokens if generates else 0
    trained = load_model(
        folder, args.checkpoint, allow_oversubscription=args.allow_oversubscription, n_generated=n_generated
    )
    return trained.with_config(config)
