"""The verbs `import` and `export`."""

import argparse
from pathlib import Path

from rustgpt_jax.cli.arguments import (
    VerbParser,
    add_checkpoint_argument,
    add_config_argument,
    add_run_argument,
    read_config,
)
from rustgpt_jax.errors import UserError

BASE = Path(__file__).resolve().parents[2] / "configs" / "base.py"


def add_import_arguments(parser: VerbParser) -> None:
    """Add the flags of `import`."""
    parser.add_argument("--from", dest="source", metavar="DIR", help="A folder with a Hugging Face model.")
    parser.add_argument("--run", metavar="DIR", help="The folder of the new run.")
    add_config_argument(parser)


def run_import(args: argparse.Namespace) -> int:
    """Create a run from a Hugging Face model."""
    if args.source is None or args.run is None:
        raise UserError("Which model, and where to? Give --from=DIR, a Hugging Face folder, and --run=DIR, a new run.")
    args.config = args.config or str(BASE)
    tree, origins = read_config(args)
    from rustgpt_jax.interop.convert import import_run

    import_run(Path(args.source), Path(args.run), tree, origins, print)
    return 0


def add_export_arguments(parser: VerbParser) -> None:
    """Add the arguments of `export`."""
    add_run_argument(parser)
    parser.add_argument(
        "--to", metavar="DIR|FILE.gguf", help="The folder to write, which transformers loads, or a .gguf file."
    )
    add_checkpoint_argument(parser)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "int8"),
        help="Another dtype than that of the parameters; int8 for a .gguf file only.",
    )


def run_export(args: argparse.Namespace) -> int:
    """Write a run as a Hugging Face model, or as a file for llama.cpp."""
    if args.run is None or args.to is None:
        raise UserError("Which run, and where to? Give the run, and --to=DIR, a new folder.")
    from rustgpt_jax.interop.convert import export_run
    from rustgpt_jax.interop.gguf import export_gguf

    export = export_gguf if Path(args.to).suffix == ".gguf" else export_run
    export(Path(args.run), Path(args.to), args.checkpoint, args.dtype, print)
    return 0
