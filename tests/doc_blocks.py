"""Code blocks of the documentation: finding them in a page, and running them in order in one process.

A comment before a block says how the tests treat it:

    <!-- not run: REASON -->        the block is only parsed
    <!-- run with: FLAGS -->        flags that are added to `train` and `sweep`, such as a smaller number of steps
    <!-- exit status: N -->         the status of its last command

A block with `title="FILE"` is written to that file. Blocks of Python and of shell commands are run. Commands in
transcripts (`console`) and in blocks without a language are only parsed.
"""

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
SHELLS = ("sh", "bash")
# The verbs that take the flags of `run with`.
TRAINING = ("train", "sweep")
# Ends a command and begins another.
OPERATORS = {"&&", "||", "|", ";", "&", ">", ">>", "<", "2>&1"}
FENCE = re.compile(r"^( *)(`{3,}|~{3,})\s*([\w+-]*)(.*)$")
MARKER = re.compile(r"<!-- (not run|run with|exit status): (.*?) -->", re.DOTALL)


class Block(NamedTuple):
    """A code block of a page.

    Attributes:
        language: The language of the block, or "".
        title: The file that it is written to, or "".
        text: Its lines.
        line: The number of its first line in the page.
        markers: The comments before it, by kind.
    """

    language: str
    title: str
    text: str
    line: int
    markers: dict[str, str]

    @property
    def is_run(self) -> bool:
        """True if the tests run the block."""
        return "not run" not in self.markers and not self.title and self.language in ("python", *SHELLS)

    @property
    def command_lines(self) -> list[str]:
        """The shell commands of the block, with continued lines joined."""
        lines = self.text.replace("\\\n", " ").splitlines()
        if self.language in SHELLS:
            return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if self.language in ("", "console"):
            prompted = [line[2:] for line in lines if line.startswith("$ ")]
            return prompted or [line for line in lines if re.match(r"(rustgpt|python launch\.py|python -m) ", line)]
        return []


def read_blocks(page: str) -> list[Block]:
    """Return the code blocks of a page."""
    blocks: list[Block] = []
    lines = page.splitlines()
    number, before = 0, ""
    while number < len(lines):
        opening = FENCE.match(lines[number])
        if opening is None:
            before += lines[number] + "\n"
            number += 1
            continue
        indent, fence, language, rest = opening.groups()
        start = number = number + 1
        while lines[number].strip() != fence:
            number += 1
        text = "".join(f"{line.removeprefix(indent)}\n" for line in lines[start:number])
        title = re.search(r'title="([^"]+)"', rest)
        # Only comments directly before the block.
        comments = re.search(r"(?:<!--(?:(?!-->)[\s\S])*-->\s*)+$", before)
        markers = dict(MARKER.findall(comments.group())) if comments else {}
        blocks.append(Block(language, title.group(1) if title else "", text, start + 1, markers))
        number, before = number + 1, ""
    return blocks


def split_commands(line: str) -> list[list[str]]:
    """Split a shell line into the words of its commands, without comments and redirections."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
    lexer.whitespace_split, lexer.commenters = True, "#"
    commands: list[list[str]] = [[]]
    is_target = False
    for word in lexer:
        if word in OPERATORS or set(word) <= set("&|;<>"):
            is_target = word[0] in "<>"
            if not is_target:
                commands.append([])
        elif is_target:
            is_target = False
        else:
            commands[-1].append(word)
    return [command for command in commands if command]


def rustgpt_arguments(words: list[str]) -> list[str] | None:
    """Return the arguments of a command of this package, or None if it is another command."""
    for index, word in enumerate(words):
        is_command = word == "rustgpt" or (word.endswith("launch.py") and index and words[index - 1] == "python")
        if is_command and (index == 0 or "=" in words[0] or words[0] in ("srun", "python", "uv", "time")):
            return words[index + 1 :]
    return None


def with_flags(arguments: list[str], block: Block) -> list[str]:
    """Return the arguments of a command with the flags that the tests add to it."""
    return [*arguments, *shlex.split(block.markers.get("run with", ""))] if arguments[0] in TRAINING else arguments


def run_page(blocks: list[Block], folder: Path) -> None:
    """Run blocks in a folder, which is the current one. The first that fails ends the process."""
    shim = folder / ".bin" / "rustgpt"
    shim.parent.mkdir(exist_ok=True)
    shim.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(ROOT / "launch.py"))} "$@"\n')
    shim.chmod(0o755)
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks:
        if block.title:
            file = folder / block.title
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text, encoding="utf-8")
        elif block.is_run and block.language == "python":
            _announce(block, "python")
            exec(compile(block.text, f"<block at line {block.line}>", "exec"), names)
        elif block.is_run:
            for index, line in enumerate(block.command_lines):
                is_last = index == len(block.command_lines) - 1
                _run_line(block, line, int(block.markers.get("exit status", 0)) if is_last else 0, shim.parent)


def _run_line(block: Block, line: str, expected: int, folder: Path) -> None:
    """Run a shell line: a single command of this package in this process, anything else in a shell."""
    _announce(block, line)
    commands = split_commands(line)
    arguments = rustgpt_arguments(commands[0])
    is_plain = len(commands) == 1 and commands[0][0] == "rustgpt" and not re.search(r"[<>$]", line)
    if commands[0][0] == "export":
        os.environ.update(word.split("=", 1) for word in commands[0][1:])
        return
    if arguments is not None and is_plain:
        status = _run_here(with_flags(arguments, block))
    else:
        command = f'export PATH={shlex.quote(str(folder))}:"$PATH"; {line}'
        status = subprocess.run(["bash", "-euo", "pipefail", "-c", command], stdin=subprocess.DEVNULL).returncode
    if status != expected:
        sys.exit(f"line {block.line}: {line}: exit status {status}, not {expected}")


def _run_here(arguments: list[str]) -> int:
    from rustgpt_jax.cli.main import main, parse_args

    return main(parse_args(["rustgpt", *arguments]))


def _announce(block: Block, what: str) -> None:
    print(f"\n[{time.process_time():.1f}s] line {block.line}: {what}", flush=True)


if __name__ == "__main__":
    run_page([block for page in sys.argv[1:] for block in read_blocks(Path(page).read_text())], Path.cwd())
