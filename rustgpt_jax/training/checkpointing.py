"""Checkpoints with Orbax, written atomically in the background. The most recent ones and the best are preserved.

Besides the state, a checkpoint stores its config, the shape, dtype and fingerprint of each array, and the SHA-256 of
each file. All are verified on restore, so that no array is missing, cast, or read from a damaged file.
"""

import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from rustgpt_jax.atomic_io import NotWritableError, write_atomically
from rustgpt_jax.config.schema import Config, EarlierConfig, config_hash, to_dict
from rustgpt_jax.distributed import all_agree, barrier, is_peer_lost, is_process_zero
from rustgpt_jax.errors import UserError
from rustgpt_jax.pytrees import fingerprint_tree, flatten_paths
from rustgpt_jax.tracking.console import format_bytes
from rustgpt_jax.training.train_step import TrainState
from rustgpt_jax.workdir.run_dir import describe_differences, is_step_name

N_RECENT = 2
# This includes the time to compute the checksums, which reads all files again.
MAX_SAVE_SECONDS = 6 * 3600
CHECKSUMS = "sha256.json"
# Orbax writes a timestamp to this file last; it is never read here.
NOT_HASHED = "_CHECKPOINT_METADATA"
MAX_REASON_CHARS = 160
# The metadata of a checkpoint, in the folder of its step.
METADATA = "about/metadata"
# Messages of the operating system to look for in long errors of libraries.
KNOWN_REASONS = ("No space left on device", "Read-only file system", "Permission denied")

# Orbax numbers operations with a global counter: two that start concurrently would wait for each other's files.
_orbax_lock = threading.Lock()


class CorruptCheckpoint(Exception):
    """A checkpoint cannot be read, or differs from what was saved."""


class Checkpoints:
    """The checkpoints of a run, in folders named by step. Use it as a context manager.

    It preserves the most recent checkpoints, the best one, and the last scheduled one, which does not depend on
    interruptions. The file `best` names the step of the best checkpoint, and of the previous best, which is used until
    the new one is written. Only one run may write to a folder.

    Args:
        folder: The folder of the checkpoints.
        config: The config of the run.
        is_writer: Whether to save checkpoints.
        earlier: Earlier configs of the run, with which older checkpoints were saved.
    """

    def __init__(
        self, folder: Path, config: Config, is_writer: bool = False, earlier: Sequence[EarlierConfig] = ()
    ) -> None:
        self._folder, self._config = folder.absolute(), config
        self._hashes = {config_hash(each) for each in (config, *(each.config for each in earlier))}
        self._best_file = self._folder / "best"
        async_options = ocp.AsyncOptions(
            post_finalization_callback=self._write_checksums, timeout_secs=MAX_SAVE_SECONDS
        )
        # Old checkpoints are deleted here: Orbax does not know which one is the best. A reader must not delete what a
        # writer has started.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None, create=is_writer, cleanup_tmp_directories=is_writer, async_options=async_options
        )
        with _translate_io_errors(self._folder, "written" if is_writer else "read"), _orbax_lock:
            self._manager = ocp.CheckpointManager(self._folder, options=options, item_names=("state", "about"))
        # Cached, so that all processes of a run delete the same checkpoints.
        self._best = read_best_steps(self._best_file)
        self._scheduled: dict[int, bool] = {}

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.wait()
        except UserError:
            # Report only the first error.
            if kind is None:
                raise
        finally:
            with _orbax_lock:
                self._manager.close()

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints, in ascending order."""
        return sorted(self._manager.all_steps())

    def steps_on_disk(self) -> list[int]:
        """Return the steps of the checkpoints that are completely on disk, in ascending order."""
        return sorted(int(path.name) for path in self._folder.glob("*") if is_step_name(path.name) and path.is_dir())

    def step(self, which: str = "last") -> int | None:
        """Return the step of the `last` or the `best` checkpoint, or None."""
        return next(iter(self._candidates(which)), None)

    def _candidates(self, which: str) -> list[int]:
        steps = self.steps()
        named = {"last": steps[::-1], "best": self._best or []}.get(which, [int(which)] if is_step_name(which) else [])
        return [step for step in named if step in steps]

    # Writing.

    def save(self, state: TrainState, step: int, is_best: bool = False, is_scheduled: bool = True) -> None:
        """Start writing the state at `step`. Its buffers may be reused when this returns.

        An existing checkpoint of this step is preserved, unless its metadata is damaged or belongs to another step.

        Raises:
            NotWritableError: This checkpoint or the previous one cannot be written.
        """
        with _translate_io_errors(self._folder):
            if step not in self._scheduled and (self._folder / str(step)).exists() and not self._has_metadata(step):
                self.quarantine(step)
            if step in self._manager.all_steps():
                if is_scheduled and not self._is_scheduled(step):
                    self._mark_scheduled(step)
            else:
                if is_process_zero():
                    _check_space(self._folder, sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
                metadata = {
                    "step": step,
                    "config_hash": config_hash(self._config),
                    "config": to_dict(self._config),
                    "is_scheduled": is_scheduled,
                    "layout": tree_spec(state),
                    "fingerprints": fingerprint_tree(state),
                }
                args = ocp.args.Composite(state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(metadata))
                with _orbax_lock:
                    self._manager.save(step, args=args)
                self._scheduled[step] = is_scheduled
            if is_best:
                self._best = [step, *[other for other in self._candidates("best") if other != step][:1]]
                if is_process_zero():
                    write_atomically(self._best_file, json.dumps(self._best))
            self._delete_old(step)

    def _mark_scheduled(self, step: int) -> None:
        """Mark a checkpoint that was saved because of a stop as scheduled."""
        self._manager.wait_until_finished()
        self._scheduled[step] = True
        if is_process_zero():
            folder = self._folder / str(step)
            write_atomically(folder / METADATA, json.dumps(read_metadata(self._folder, step) | {"is_scheduled": True}))
            _write_checksums(folder)

    def wait(self) -> None:
        """Wait until all checkpoints are on disk. Raises NotWritableError if one cannot be written."""
        with _translate_io_errors(self._folder):
            self._manager.wait_until_finished()

    def _write_checksums(self) -> None:
        # Orbax calls this before it renames the finished temporary folder.
        if is_process_zero():
            (temporary,) = self._folder.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*")
            _write_checksums(temporary)

    def _has_metadata(self, step: int) -> bool:
        """Return whether a step's folder contains checkpoint metadata for that step."""
        with suppress(CorruptCheckpoint):
            read_metadata(self._folder, step)
            return step in self.steps()
        return False

    def _delete_old(self, saving: int) -> None:
        if self._best is None:
            # The file that names the best checkpoint is damaged, so any may be the best.
            return
        steps, best = self.steps(), self._candidates("best")
        # The new best may never be finished: the previous best is preserved until it is.
        needed = {
            *(best[:2] if best[:1] == [saving] else best[:1]),
            *steps[-N_RECENT:],
            self.last_scheduled(saving - 1),
        }
        for step in set(steps) - needed:
            self._delete(step)

    def _delete(self, step: int) -> None:
        with _orbax_lock:
            self._manager.delete(step)

    def last_scheduled(self, step: int) -> int | None:
        """Return the step of the last scheduled checkpoint at or before a step, or None."""
        return next((other for other in self.steps()[::-1] if other <= step and self._is_scheduled(other)), None)

    def _is_scheduled(self, step: int) -> bool:
        if step in self._scheduled:
            return self._scheduled[step]
        try:
            return bool(read_metadata(self._folder, step)["is_scheduled"])
        except CorruptCheckpoint:
            return False

    def delete_after(self, step: int) -> None:
        """Delete the checkpoints after a step."""
        for other in self.steps()[::-1]:
            if other > step:
                self._delete(other)

    def quarantine(self, step: int) -> Path:
        """Rename a damaged checkpoint so that it is ignored. Returns its new path."""
        new_path = self._folder / f"{step}.damaged"
        if is_process_zero():
            shutil.rmtree(new_path, ignore_errors=True)
        with _translate_io_errors(self._folder):
            if is_process_zero():
                (self._folder / str(step)).rename(new_path)
            barrier("a damaged checkpoint is renamed")
            self._manager.reload()
        return new_path

    # Reading.

    def restore(
        self, like: Any, which: str = "last", on_skipped: Callable[[int, str], object] | None = None
    ) -> TrainState:
        """Restore the newest valid checkpoint.

        Args:
            like: Arrays or shapes with the expected shapes and dtypes, and the shardings to restore to. Without
                shardings, all arrays are put on one device.
            which: 'last', 'best', or a step, for which there is no fallback.
            on_skipped: Called with the step of each damaged newer checkpoint, and the reason.

        Raises:
            UserError: No checkpoint is valid, or one belongs to another config or has other arrays.
        """
        candidates = self._candidates(which)
        what = {"last": "checkpoint", "best": "best checkpoint"}.get(which, f"checkpoint of step {which}")
        if not candidates:
            raise UserError(self._missing_message(which, what))
        damage: dict[int, str] = {}
        for step in candidates:
            try:
                state = self.restore_step(like, step)
            except CorruptCheckpoint as error:
                damage[step] = str(error)
                continue
            for skipped, reason in damage.items():
                if on_skipped is not None:
                    on_skipped(skipped, reason)
            return state
        reasons = "; ".join(f"{step}: {reason}" for step, reason in damage.items())
        raise UserError(f"{self._folder} has no valid {what} ({reasons}); to start over, choose another --run folder.")

    def _missing_message(self, which: str, what: str) -> str:
        steps = ", ".join(map(str, self.steps()))
        others = f"; there are checkpoints of steps {steps}" if steps else ""
        if which == "best" and self._best is None:
            return f"{self._best_file} is damaged: it does not name the steps of the best checkpoints{others}."
        if which == "best" and self._best:
            return f"{self._folder}: the checkpoint of step {self._best[0]}, named by best, is missing{others}."
        return f"{self._folder} has no {what} yet{others}."

    def restore_step(self, like: Any, step: int) -> TrainState:
        """Restore the checkpoint of one step.

        With several processes, each reads the shards of its devices; they agree on whether the checkpoint is valid.

        Args:
            like: As in `restore`.
            step: The step.

        Raises:
            CorruptCheckpoint: The checkpoint differs from what was saved.
            UserError: The checkpoint belongs to another config or has other arrays.
        """
        with _agree_on_corruption():
            _verify_checksums(self._folder / str(step))
            metadata = read_metadata(self._folder, step)
        self._check(metadata, tree_spec(like), f"{self._folder}/{step}")
        # The device that an array was saved from may not exist here.
        default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or default
            ),
            like,
        )
        with _agree_on_corruption():
            try:
                with _orbax_lock:
                    args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
                    state = self._manager.restore(step, args=args)["state"]
            # Orbax, TensorStore and their dependencies raise many types of errors.
            except Exception as error:
                if is_peer_lost(error) or isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                    raise
                raise CorruptCheckpoint(_describe_error(error)) from error
        found = fingerprint_tree(state)
        changed = [path for path in sorted(found) if metadata["fingerprints"].get(path) != found[path]]
        if changed:
            raise CorruptCheckpoint(f"{changed[0]} is not what was saved")
        return state

    def _check(self, metadata: dict[str, Any], expected: dict[str, str], where: str) -> None:
        if metadata["config_hash"] not in self._hashes:
            changes = describe_differences(metadata["config"], self._config)
            raise UserError(f"{where} is a checkpoint of another config: {changes}.")
        stored = metadata["layout"]
        for path in sorted(stored.keys() | expected.keys()):
            if stored.get(path) != expected.get(path):
                raise UserError(
                    f"{where}: {path} is {stored.get(path, 'missing')} in the checkpoint, "
                    f"and {expected.get(path, 'missing')} in the config."
                )


@contextmanager
def _agree_on_corruption() -> Iterator[None]:
    """Raise CorruptCheckpoint in all processes if one of them does."""
    damage: CorruptCheckpoint | None = None
    try:
        yield
    except CorruptCheckpoint as error:
        damage = error
    if not all_agree(damage is None):
        raise damage or CorruptCheckpoint("another process could not read it")


@contextmanager
def _translate_io_errors(folder: Path, what: str = "written") -> Iterator[None]:
    """Convert errors of Orbax to a NotWritableError with a readable reason, such as a full disk."""
    try:
        yield
    except UserError:
        raise
    # The threads of Orbax and TensorStore raise many types of errors.
    except Exception as error:
        raise NotWritableError(f"{folder}: the checkpoint cannot be {what}: {_describe_error(error)}.") from error


def _check_space(folder: Path, n_bytes: int) -> None:
    """Raise an OSError if a checkpoint cannot be written: Orbax would hang."""
    probe = folder / ".probe"
    # A killed process may have left it.
    probe.mkdir(exist_ok=True)
    probe.rmdir()
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        needs = f"up to {format_bytes(n_bytes)} needed, {format_bytes(free)} free"
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({needs})")


def _describe_error(error: Exception) -> str:
    """Return the operating system's message in an error of a library, or the first line of the error."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error) or type(error).__name__
    known = next((reason for reason in KNOWN_REASONS if reason in text), None)
    line = " ".join(text.splitlines()[0].split()).rstrip(".")
    return known or (line if len(line) <= MAX_REASON_CHARS else f"{line[:MAX_REASON_CHARS]}...")


def read_best_steps(file: Path) -> list[int] | None:
    """Return the steps of the best checkpoint and the previous best; [] without a file, None if it is damaged."""
    try:
        steps = json.loads(file.read_bytes())
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError):
        return None
    is_valid = isinstance(steps, list) and steps and all(type(step) is int and step >= 0 for step in steps)
    return steps if is_valid else None


def _maps_to_strings(value: Any) -> bool:
    """Return whether a JSON value is an object whose values are all strings."""
    return isinstance(value, dict) and all(isinstance(each, str) for each in value.values())


# Validators for the fields of a checkpoint's metadata.
VALIDATORS: dict[str, Callable[[Any], bool]] = {
    "step": lambda value: type(value) is int,
    "config_hash": lambda value: isinstance(value, str),
    "config": lambda value: isinstance(value, dict),
    "is_scheduled": lambda value: isinstance(value, bool),
    "layout": _maps_to_strings,
    "fingerprints": _maps_to_strings,
}


def read_metadata(folder: Path, step: int) -> dict[str, Any]:
    """Read the metadata of the checkpoint of a step.

    Raises:
        CorruptCheckpoint: It cannot be read, is invalid, or belongs to another step.
    """
    metadata = _read_json(folder / str(step) / METADATA, "its metadata")
    if not isinstance(metadata, dict) or not all(
        name in metadata and is_valid(metadata[name]) for name, is_valid in VALIDATORS.items()
    ):
        raise CorruptCheckpoint("its metadata is not valid")
    if metadata["step"] != step:
        raise CorruptCheckpoint(f"it is the checkpoint of step {metadata['step']} under another name")
    return metadata


def _read_json(file: Path, what: str) -> Any:
    try:
        return json.loads(file.read_bytes())
    except OSError as error:
        raise CorruptCheckpoint(f"{what} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"{what} is not JSON") from error


def _write_checksums(folder: Path) -> None:
    """Write the SHA-256 of each file of a finished checkpoint to its folder."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name not in (NOT_HASHED, CHECKSUMS)]
    sums = {str(file.relative_to(folder)): _sha256(file) for file in files}
    write_atomically(folder / CHECKSUMS, json.dumps(sums, indent=1))


def _verify_checksums(folder: Path) -> None:
    """Raise CorruptCheckpoint if a file of a checkpoint is not what was written."""
    sums = _read_json(folder / CHECKSUMS, CHECKSUMS)
    if not _maps_to_strings(sums) or METADATA not in sums:
        raise CorruptCheckpoint(f"{CHECKSUMS} does not have the checksums of a checkpoint")
    # The processes of a run divide the files among them.
    for name, digest in list(sums.items())[jax.process_index() :: jax.process_count()]:
        if not (folder / name).is_file():
            raise CorruptCheckpoint(f"{name} is missing")
        try:
            found = _sha256(folder / name)
        except OSError as error:
            raise CorruptCheckpoint(f"{name} cannot be read: {error.strerror}") from error
        if found != digest:
            raise CorruptCheckpoint(f"{name} is not what was written")


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def tree_spec(tree: Any) -> dict[str, str]:
    """Return the dtype and shape of each array in a tree: {'params/embedding/table': 'float32[65, 128]'}."""
    return {path: f"{leaf.dtype}{json.dumps(leaf.shape)}" for path, leaf in flatten_paths(tree).items()}
