"""The verbs that load a trained model: `evaluate`, `generate` and `chat`."""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from rustgpt_jax.cli.arguments import (
    VerbParser,
    add_checkpoint_argument,
    add_oversubscription_argument,
    add_run_argument,
    read_config,
    run_folder,
    whole_number,
)


def add_arguments(parser: VerbParser) -> None:
    """Add the arguments of `evaluate` and `chat`."""
    add_run_argument(parser)
    add_checkpoint_argument(parser)
    add_oversubscription_argument(parser)


def add_generate_arguments(parser: VerbParser) -> None:
    """Add the arguments of `generate`."""
    add_arguments(parser)
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        action="append",
        default=[],
        help="A text to continue, or a question to answer. May be repeated.",
    )
    parser.add_argument(
        "--num_samples",
        metavar="N",
        type=whole_number(1),
        default=1,
        help="Texts per prompt, with consecutive seeds from config.sampling.seed on.",
    )


def run_evaluate(args: argparse.Namespace) -> int:
    """Print the losses of a trained model."""
    trained = _load(args, generates=False)
    from rustgpt_jax.cli.evaluation_report import print_evaluation
    from rustgpt_jax.tracking.formatting import PlainTextConsole

    print_evaluation(trained, PlainTextConsole(), args.allow_oversubscription)
    return 0


def run_generate(args: argparse.Namespace) -> int:
    """Print generated text for each prompt."""
    trained = _load(args)
    from rustgpt_jax.inference.decode_params import weight_layout
    from rustgpt_jax.inference.text_generator import stream_text
    from rustgpt_jax.tracking.formatting import printable

    sampling = trained.config.sampling
    writer = trained.writer.with_weight_layout(weight_layout(sampling))
    for prompt in args.prompt or [""]:
        for sample in range(args.num_samples):
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


def run_chat(args: argparse.Namespace) -> int:
    """Chat with a trained model."""
    trained = _load(args)
    from rustgpt_jax.inference.chat import chat
    from rustgpt_jax.tracking.formatting import PlainTextConsole

    title = f"{Path(args.run).resolve().name} at step {trained.step:,}"
    chat(trained.writer, trained.config.sampling, PlainTextConsole(), title)
    return 0


def _load(args: argparse.Namespace, generates: bool = True) -> Any:
    """Return the LoadedModel of a run, with the overrides of the command line."""
    folder = run_folder(args)
    from rustgpt_jax.config.validation import resolve

    config = resolve(read_config(args)[0])
    from rustgpt_jax.sharding.compilation_cache import enable_compilation_cache
    from rustgpt_jax.training.load_model import load

    enable_compilation_cache()
    n_generated = config.sampling.max_tokens if generates else 0
    trained = load(folder, args.checkpoint, is_oversubscribed=args.allow_oversubscription, n_generated=n_generated)
    return trained.with_config(config)
