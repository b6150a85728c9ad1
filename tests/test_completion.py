"""Shell completion: verbs, flags, recipes, run folders, and fields of the config with their values."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parent.parent / "launch.py"
# A command line up to the cursor, some of its completions, and some words that are none.
LINES: dict[str, tuple[set[str], set[str]]] = {
    "rustgpt tra": ({"train"}, set()),
    "rustgpt train --": ({"--config", "--run", "--extend"}, {"--config.seed", "--noextend", "--sweep"}),
    "rustgpt train --width=x --ex": ({"--extend"}, set()),
    "rustgpt train --config=": (
        {"--config=tiny", "--config=learning_rate", "--config=mine.py"},
        {"--config=notes.txt"},
    ),
    "rustgpt train --config ": ({"tiny", "mine.py"}, set()),
    "rustgpt sweep --config.optimizer.learn": ({"--config.optimizer.learning_rate"}, {"--config.seed"}),
    "rustgpt train --config.data.split=": ({"--config.data.split=document", "--config.data.split=tail"}, set()),
    "rustgpt report --config.": (set(), {"--config.seed"}),
    "rustgpt sweep --launcher=": ({"--launcher=inline", "--launcher=processes"}, set()),
    "rustgpt chat runs/": ({"runs/mine/"}, set()),
    "rustgpt chat runs/mine --checkpoint=": ({"--checkpoint=best"}, set()),
}


@pytest.mark.parametrize("line", LINES)
def test_completions_without_jax(line: str, tmp_path: Path) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    for name in ("mine.py", "notes.txt"):
        (tmp_path / name).touch()
    request = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_STDOUT_FILENAME": "completions", "_ARGCOMPLETE_IFS": "\n"}
    environment = os.environ | request | {"COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9"}
    command = [sys.executable, "-X", "importtime", LAUNCH]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    found = {word.strip() for word in (tmp_path / "completions").read_text().split("\n")}
    expected, unexpected = LINES[line]
    assert expected <= found and not unexpected & found, done.stderr
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "argcomplete" in imported and not imported & {"jax", "flax", "rich", "tokenizers"}
