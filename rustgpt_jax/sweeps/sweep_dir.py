"""A sweep on disk: what lies where in its folder."""

import json
import shlex
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rustgpt_jax.errors import UserError
from rustgpt_jax.workdir.code_snapshot import code_files, code_hash, code_sources, remember_code, write_git_state
from rustgpt_jax.workdir.run_dir import RunFolder, write_atomically


@dataclass(frozen=True)
class SweepFolder:
    """The names of the files of a sweep. Nothing is read or written by asking for them."""

    path: Path

    @property
    def about_file(self) -> Path:
        """The path of sweep.json: the sweep's name, config file, last launch command, and trials."""
        return self.path / "sweep.json"

    @property
    def ledger_file(self) -> Path:
        """What was planned, began, ended and failed, one JSON object a line; never rewritten."""
        return self.path / "ledger.jsonl"

    @property
    def trials(self) -> Path:
        """The folder of the trials, each an ordinary run folder."""
        return self.path / "trials"

    def trial(self, name: str) -> RunFolder:
        """The run folder of a trial."""
        return RunFolder(self.trials / name)

    @property
    def tokenizers(self) -> Path:
        """Tokenizers that several trials share."""
        return self.path / "tokenizers"

    @property
    def code(self) -> Path:
        """The code as it was at each launch, in folders named by its hash."""
        return self.path / "code"

    @property
    def study_file(self) -> Path:
        """The journal of a search by Optuna."""
        return self.path / "study.journal"

    @property
    def jobs(self) -> Path:
        """What submitit keeps of the jobs of a cluster: scripts, logs, results."""
        return self.path / "jobs"

    @property
    def lock_file(self) -> Path:
        """Held by the launcher that leads a search."""
        return self.path / ".lock"


def create(path: Path, about: dict[str, Any]) -> SweepFolder:
    """Make the folder of a sweep, or go on with the one there. `about` has at least its name and its config file.

    Raises UserError if the folder holds another sweep, a run, or other files.
    """
    folder = SweepFolder(path)
    if folder.about_file.exists():
        stored = read_about(path)
        for key in ("config_file", "sweep"):
            if stored.get(key) != about[key]:
                raise UserError(
                    f"{path} holds another sweep: its {key} is {stored.get(key)!r}, not {about[key]!r}. "
                    "Choose another --run folder."
                )
        return folder
    if RunFolder(path).config_file.exists():
        raise UserError(f"{path} is the folder of a run, not of a sweep; choose another --run folder.")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The sweep's folder {path} cannot be made: {error.strerror}.") from error
    used = any(not entry.name.startswith(".") for entry in path.iterdir())
    # Another launch may have begun the same sweep in this moment.
    if used and not folder.about_file.exists():
        raise UserError(f"{path} holds files but no sweep (no sweep.json); choose another --run folder.")
    write_about(folder, about)
    return folder


def read_about(path: Path) -> dict[str, Any]:
    """What sweep.json says. Raises UserError if the folder is not one of a sweep."""
    file = SweepFolder(path).about_file
    if not file.exists():
        raise UserError(f"{path} is not the folder of a sweep: it has no sweep.json.")
    try:
        about = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged: it is not JSON.") from error
    wrong = _wrong_field(about)
    if wrong:
        raise UserError(f"{file} is damaged: {wrong}.")
    return dict(about)


def _wrong_field(about: Any) -> str | None:
    """Return what is wrong with the content of sweep.json, or None if all required fields are valid."""
    if not isinstance(about, dict):
        return "it is not a JSON object"
    for name in ("name", "command", "config_file", "sweep"):
        if name not in about:
            return f"it has no {name!r}"
        if not isinstance(about[name], str):
            return f"its {name!r} is not a text"
    try:
        shlex.split(about["command"])
    except ValueError:
        return "its 'command' has a quote without an end"
    trials = about.get("trials", [])
    if not isinstance(trials, list) or not all(isinstance(trial, str) for trial in trials):
        return "its 'trials' is not a list of names"
    return None


def write_about(folder: SweepFolder, about: dict[str, Any]) -> None:
    """Record the sweep as of this launch in sweep.json.

    Raises:
        UserError: The file is not writable.
    """
    write_atomically(folder.about_file, json.dumps(about, indent=2) + "\n")


def keep_code(folder: SweepFolder) -> Path:
    """Copy the code that is running into the sweep's folder, unless it is there: jobs that wait run this copy."""
    remember_code()
    files = code_files(code_sources())
    copy = folder.code / code_hash(files)
    if not copy.exists():
        partial = copy.with_name(f".{copy.name}.{uuid.uuid4().hex}")
        for name, file in files.items():
            target = partial / name
            target.parent.mkdir(parents=True, exist_ok=True)
            # Without the permissions of the original: those of the copy follow the umask.
            shutil.copyfile(file, target)
        write_git_state(partial)
        try:
            partial.rename(copy)
        except OSError:  # Another launcher was first.
            shutil.rmtree(partial)
    return copy
