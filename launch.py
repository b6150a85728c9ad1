# PYTHON_ARGCOMPLETE_OK
"""The command `rustgpt` in a checkout: `python launch.py VERB [flags]`."""

import sys
from pathlib import Path

from rustgpt_jax.cli.main import run_command

if __name__ == "__main__":
    # Config files may import `configs`, which is beside this file.
    sys.path.insert(0, str(Path(__file__).parent))
    run_command()
