"""The folder of a run: its file names, its config, and its lock."""

import errno
import fcntl
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from rustgpt_jax.atomic_io import is_special, read_json, write_atomically
from rustgpt_jax.config.schema import (
    TRACKER_KNOBS,
    Config,
    EarlierConfig,
    Stage,
    StageConfig,
    affects_result,
    config_hash,
    diff,
    get_path,
    stages,
    to_dict,
    uses_epochs,
)
from rustgpt_jax.config.validation import flatten_tree, resolve
from rustgpt_jax.errors import UserError, short_repr, suggest_names
from rustgpt_jax.registry import note_import_paths

MAX_DIFFERENCES_SHOWN = 8
# Shown for a field that a stage does not override.
NOT_OVERRIDDEN = "not overridden"


class RunLockedError(UserError):
    """Another process is training in a run folder."""


class RunDir:
    """The paths of the files of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # The config with its hash, and the origin of each value.
        self.config_file = path / "config.json"
        # The tokenizer, in the format of the Hugging Face `tokenizers` library.
        self.tokenizer_file = path / "tokenizer.json"
        # For each stage, document and token counts, and hashes of the text and the tokens.
        self.data_file = path / "data.json"
        # JSON Lines: the recorded metrics, and the texts generated during training.
        self.metrics_file = path / "metrics.jsonl"
        self.samples_file = path / "samples.jsonl"
        # The folder of TensorBoard event files.
        self.tensorboard = path / "tensorboard"
        # What trackers store: the ID of the run, and how much of its metrics they have.
        self.trackers_file = path / "trackers.json"
        # The plot of the loss curves.
        self.loss_png = path / "loss.png"
        # The folder of checkpoints, one folder per step.
        self.checkpoints = path / "checkpoints"
        # For an imported run: the initial parameters, and the source of the model with its original architecture.
        self.parameters_file = path / "parameters.safetensors"
        self.import_file = path / "import.json"
        # The event log in JSON Lines format: launches with their code and environment, programs, and rewinds.
        self.events_file = path / "events.jsonl"
        # The folder of code snapshots, archives named by their hash.
        self.code = path / "code"
        # The autotuning results of the GPU compiler, which let later launches use the same kernels.
        self.autotune_file = path / "autotune.textproto"
        # Locked by the process that trains in this folder.
        self.lock_file = path / ".lock"

    @property
    def is_untrained(self) -> bool:
        """True if this is an imported run without checkpoints."""
        return self.parameters_file.exists() and not self.saved_steps

    @property
    def saved_steps(self) -> list[int]:
        """The sorted steps of the checkpoints on disk, including damaged ones.

        Raises:
            UserError: The folder of checkpoints is not readable.
        """
        try:
            names = os.listdir(self.checkpoints)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise UserError(f"{self.checkpoints} cannot be read: {error.strerror}.") from error
        return sorted(int(name) for name in names if is_step_name(name))


def is_step_name(name: str) -> bool:
    """Return whether a name is valid for a checkpoint folder: a step number in plain digits."""
    # int() rejects thousands of digits; no step has more than ten.
    return name.isascii() and name.isdecimal() and str(int(name[:20])) == name


def prepare_run_dir(path: Path, config: Config, earlier: Sequence[EarlierConfig] = ()) -> None:
    """Create the folder of a run, or check that an existing folder is empty or has a run with this config.

    Args:
        path: The folder.
        config: The config of the run.
        earlier: Earlier configs of the run; the last of them is also accepted.

    Raises:
        UserError: The folder holds a run with another config or other files, or is not writable.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        is_used = any(not entry.name.startswith(".") for entry in path.iterdir())
    except OSError as error:
        is_file = isinstance(error, (FileExistsError, NotADirectoryError))
        reason = "there is a file in its place" if is_file else error.strerror or error
        raise UserError(f"The run folder {path} cannot be created: {reason}.") from error
    if RunDir(path).config_file.exists():
        stored = load_config(path)
        changed = describe_differences(to_dict(stored), config)
        if changed and stored not in [each.config for each in earlier[-1:]]:
            raise UserError(f"{path} holds a run with another config: {changed}. Choose another --run folder.")
    elif is_used:
        raise UserError(f"{path} holds files but no run (no config.json); choose another --run folder.")


def create_run_dir(
    path: Path, config: Config, origins: Mapping[str, str], earlier: Sequence[EarlierConfig] = ()
) -> RunDir:
    """Create a run folder and record its config, or check that the existing run has the same config.

    Args:
        path: The folder.
        config: The config of the run.
        origins: The origin of each value of the config, by dotted path.
        earlier: Earlier configs of the run. If the folder has the last of them, its config is replaced.

    Raises:
        UserError: The folder holds a run with another config or other files, or is not writable.
    """
    run = RunDir(path)
    if uses_epochs(config):
        raise ValueError("A run has a number of steps; resolve_epochs finds it for a number of epochs.")
    prepare_run_dir(path, config, earlier)
    if run.config_file.exists() and (not earlier or load_earlier(path) == tuple(earlier)):
        update_trackers(run, config)
        return run
    record: dict[str, Any] = {"config": to_dict(config), "origins": dict(origins), "hash": config_hash(config)}
    if earlier:
        record["earlier"] = [
            {"until": until, "config": to_dict(each), "hash": config_hash(each)} for until, each in earlier
        ]
    write_atomically(run.config_file, json.dumps(record, indent=2) + "\n")
    return run


def update_trackers(run: RunDir, config: Config) -> None:
    """Record the trackers of a config in the folder of a run with this config; they are not part of its hash."""
    record = _read_config_file(run.config_file)
    group = record["config"]["logging"]
    wanted = {path.rpartition(".")[2]: get_path(config, path) for path in TRACKER_KNOBS}
    wanted = {name: list(value) if isinstance(value, tuple) else value for name, value in wanted.items()}
    if any(group.get(name) != value for name, value in wanted.items()):
        group |= wanted
        write_atomically(run.config_file, json.dumps(record, indent=2) + "\n")


def check_no_special_files(path: Path) -> None:
    """Check that a path, or the folder tree below it, contains no pipe, device or socket.

    Raises:
        UserError: It contains one.
    """
    with suppress(OSError):
        inner = [path, *(each for folder in (path, *path.glob("*/")) if folder.is_dir() for each in folder.iterdir())]
        for each in inner:
            if is_special(each):
                raise UserError(f"{each} is a pipe, a device or a socket, not a file.")


def load_config(path: Path) -> Config:
    """Load the config of a run.

    Raises:
        UserError: The folder does not exist, is not the folder of a run, or its config is invalid.
    """
    file = RunDir(path).config_file
    if not path.exists():
        siblings = [file.parent.name for file in path.parent.glob("*/config.json")]
        raise UserError(f"There is no run {path}.{suggest_names(path.name, siblings)}")
    if not path.is_dir():
        raise UserError(f"{path} is a file, not the folder of a run.")
    if not file.exists():
        raise UserError(f"{path} is not the folder of a run: it has no config.json.")
    return _parse_recorded_config(_read_config_file(file), file)


def load_earlier(path: Path) -> tuple[EarlierConfig, ...]:
    """Load a run's earlier configs and the step at which each was replaced.

    Raises:
        UserError: The file is damaged.
    """
    file = RunDir(path).config_file
    listed, before = _read_config_file(file).get("earlier", []), 0
    for each in listed if isinstance(listed, list) else [None]:
        until = each.get("until") if isinstance(each, dict) else None
        if type(until) is not int or until < before:
            raise UserError(f"{file} is damaged: it lacks the last steps of its earlier configs.")
        before = until
    return tuple(EarlierConfig(each["until"], _parse_recorded_config(each, file)) for each in listed)


def load_stages(path: Path) -> tuple[Stage, ...]:
    """Load the stages of a run, including those trained with earlier configs.

    Raises:
        UserError: As for `load_config`.
    """
    return stages(load_config(path), load_earlier(path))


def _read_config_file(file: Path) -> dict[str, Any]:
    record = read_json(file)
    if not isinstance(record, dict):
        raise UserError(f"{file} is damaged: it is not a JSON object with a config.")
    return record


def _parse_recorded_config(record: Mapping[str, Any], file: Path) -> Config:
    """Parse a config that is stored in a file with its hash."""
    if "config" not in record:
        raise UserError(f"{file} is damaged: it is not a JSON object with a config.")
    tree, recorded = record["config"], record.get("hash")
    if not isinstance(tree, dict):
        raise UserError(f"{file} is damaged: its config is not a JSON object.")
    note_import_paths(json.dumps(tree), file)
    try:
        config = resolve(tree)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    if config_hash(config) != recorded:
        raise UserError(
            f"{file} was changed after the run began: its config has the hash {config_hash(config)}, and "
            f"{short_repr(recorded)} is recorded. Restore the file, or start a new run with the other config."
        )
    return config


def load_origins(path: Path) -> dict[str, str]:
    """Load the recorded origin of each value of a run's config.

    Raises:
        UserError: As for `load_config`.
    """
    load_config(path)
    file = RunDir(path).config_file
    origins = json.loads(file.read_bytes()).get("origins")
    if not isinstance(origins, dict) or not all(isinstance(origin, str) for origin in origins.values()):
        raise UserError(f"{file} is damaged: it lacks the origins of the values of its config.")
    return origins


def load_run_config(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Load the values of a run's config by dotted path, and their origins.

    Raises:
        UserError: As for `load_config`.
    """
    return dict(flatten_tree(to_dict(load_config(path)))), load_origins(path)


def check_no_symlinks(files: Iterable[Path]) -> None:
    """Check that files which are appended to or truncated are not symbolic links.

    In a folder from an untrusted source, a link may point to a file that must not be modified.

    Raises:
        UserError: A file is a symbolic link.
    """
    for file in files:
        if file.is_symlink():
            raise UserError(
                f"{file} is a symbolic link, and its target would be modified; replace the link by a copy of the file."
            )


@contextmanager
def lock_run_dir(path: Path) -> Iterator[None]:
    """Hold the exclusive lock of a run folder. The operating system releases it when the process ends in any way.

    Raises:
        RunLockedError: Another process holds the lock. The message names it.
    """

    def open_without_links(name: str, flags: int) -> int:
        # The target of a symbolic link would be truncated.
        return os.open(name, flags | os.O_NOFOLLOW, 0o666)

    try:
        file = open(RunDir(path).lock_file, "a+", encoding="utf-8", opener=open_without_links)
    except OSError as error:
        raise UserError(f"The run folder {path} cannot be locked: {error.strerror}.") from error
    with file:
        _acquire(file, path)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _acquire(file: TextIO, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read() or "another process"
        raise RunLockedError(
            f"{path} is in use: {holder} is training in it. Choose another --run folder or wait."
        ) from None
    except OSError as error:
        # Training must be possible on cluster file systems without locks.
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise


def describe_differences(stored: Mapping[str, Any], wanted: Config) -> str:
    """Describe the differences from a stored config (as by `to_dict`) that affect results; '' if there are none."""
    try:
        differing = diff_configs(resolve(stored), wanted)
        changed = {path: values for path, values in differing.items() if affects_result(path)}
    except UserError as error:
        return f"it is not valid in this version ({error})"
    listed = [f"{path} is {there!r} in the run and {here!r} in this config" for path, (there, here) in changed.items()]
    if len(listed) > MAX_DIFFERENCES_SHOWN:
        listed[MAX_DIFFERENCES_SHOWN:] = [f"and {len(listed) - MAX_DIFFERENCES_SHOWN} more"]
    return "; ".join(listed)


def diff_configs(first: Config, second: Config) -> dict[str, tuple[Any, Any]]:
    """Return both values of each field that differs between two configs; fields of stages are 'stages.NAME.path'."""
    changed = diff(first, second)
    if "stages" in changed:
        both: tuple[tuple[StageConfig, ...], ...] = changed.pop("stages")
        names = [tuple(stage.name for stage in stages) for stages in both]
        if names[0] != names[1]:
            return changed | {"stages": (names[0], names[1])}
        left, right = (
            {f"stages.{stage.name}.{path}": value for stage in stages for path, value in stage.overrides}
            for stages in both
        )
        paths = [path for path in left | right if left.get(path) != right.get(path)]
        changed |= {path: (left.get(path, NOT_OVERRIDDEN), right.get(path, NOT_OVERRIDDEN)) for path in paths}
    return changed


@contextmanager
def scratch_run_dir(path: Path, config: Config, origins: Mapping[str, str]) -> Iterator[Path]:
    """Create a temporary copy of a run folder for a process other than 0, sharing only its checkpoints.

    All processes write the same records; those of process 0 are kept.

    Raises:
        UserError: As for `create_run_dir`.
    """
    with tempfile.TemporaryDirectory(prefix="rustgpt_jax_") as temporary:
        real, scratch = RunDir(path.absolute()), RunDir(Path(temporary) / path.absolute().name)
        create_run_dir(scratch.path, config, origins)
        for file in (real.metrics_file, real.data_file, real.tokenizer_file):
            if file.exists():
                shutil.copyfile(file, scratch.path / file.name)
        scratch.parameters_file.symlink_to(real.parameters_file)
        scratch.checkpoints.symlink_to(real.checkpoints)
        yield scratch.path
