"""Checkpoints through Orbax: written in the background, whole or not at all; the last two and the best are kept."""

import json
import threading
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from rustgpt_jax.errors import UserError
from rustgpt_jax.runs.folder import write_atomically
from rustgpt_jax.training.step import State

LAST_KEPT = 2

# Orbax numbers its operations with one counter: two threads that begin one at once wait for each other's files.
_one_at_a_time = threading.Lock()


class Checkpoints:
    """The checkpoints of one run, in folders named by their steps: the last ones and the best. Use it in a `with`.

    The file `best` names the step of the best one, and the one before it, which holds until that one is written.
    """

    def __init__(self, folder: Path, config_hash: str) -> None:
        self._config_hash, self._best_file = config_hash, folder.absolute() / "best"
        # Orbax deletes nothing by itself: it does not know which is the best.
        options = ocp.CheckpointManagerOptions(max_to_keep=None, cleanup_tmp_directories=True)
        with _one_at_a_time:
            self._manager = ocp.CheckpointManager(folder.absolute(), options=options, item_names=("state", "about"))

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()
        with _one_at_a_time:
            self._manager.close()

    def step(self, which: str = "last") -> int | None:
        """The step of the `last` or the `best` checkpoint, or None."""
        steps = self._manager.all_steps()
        if which == "last":
            return max(steps, default=None)
        return next((step for step in self._named_best() if step in steps), None)

    def save(self, state: State, step: int, is_best: bool = False) -> None:
        """Begin to write the state at `step`; its buffers are free again on return. One that is there already stays."""
        if step not in self._manager.all_steps():
            about = {"config_hash": self._config_hash, "layout": layout(state)}
            args = ocp.args.Composite(state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about))
            with _one_at_a_time:
                self._manager.save(step, args=args)
        if is_best:
            write_atomically(self._best_file, json.dumps([step, *self._named_best()[:1]]))
        self._delete_old(step)

    def _named_best(self) -> list[int]:
        return json.loads(self._best_file.read_bytes()) if self._best_file.exists() else []

    def _delete_old(self, saving: int) -> None:
        steps, best = sorted(self._manager.all_steps()), self._named_best()
        # What is being saved now may never be finished: the best one before it holds until then.
        needed = best[:2] if best[:1] == [saving] else best[:1]
        for step in set(steps[:-LAST_KEPT]) - set(needed):
            with _one_at_a_time:
                self._manager.delete(step)

    def restore(self, like: Any, which: str = "last") -> State:
        """The newest checkpoint, on the shapes and types of `like` (arrays or their shapes), on one device.

        Raises UserError if there is none, or if it is of another config or has other arrays: nothing is left out,
        made up or cast.
        """
        manager, step = self._manager, self.step(which)
        if step is None:
            raise UserError(f"{manager.directory} has no {'best ' if which == 'best' else ''}checkpoint yet.")
        with _one_at_a_time:
            about = manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
        self._check(about, layout(like), f"{manager.directory}/{step}")
        # Not where they were when they were saved: that may have been a device that this process does not have.
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), like)
        with _one_at_a_time:
            return manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))["state"]

    def wait(self) -> None:
        """Return when all that was saved is on the disk."""
        self._manager.wait_until_finished()

    def _check(self, about: dict[str, Any], wanted: dict[str, str], where: str) -> None:
        if about["config_hash"] != self._config_hash:
            raise UserError(f"{where} is a checkpoint of another config ({about['config_hash']}).")
        stored = about["layout"]
        for path in sorted(stored.keys() | wanted.keys()):
            if stored.get(path) != wanted.get(path):
                raise UserError(
                    f"{where}: {path} is {stored.get(path, 'missing')} in the checkpoint, "
                    f"and the config makes it {wanted.get(path, 'nothing')}."
                )


def layout(tree: Any) -> dict[str, str]:
    """Shape and type of each array of a tree by its path: {'params/embedding/table': 'float32[65, 128]'}."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{json.dumps(leaf.shape)}"
        for path, leaf in leaves
    }
