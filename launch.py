"""Command-line entry point: `python launch.py VERB [flags]`."""

import sys
from pathlib import Path

from absl import app

from rustgpt_jax.cli.main import main, parse_args

if __name__ == "__main__":
    # Config files import `configs`, which is beside this file.
    sys.path.insert(0, str(Path(__file__).parent))
    app.run(main, flags_parser=parse_args)
