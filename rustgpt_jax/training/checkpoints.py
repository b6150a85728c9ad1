"""Checkpoints through Orbax: written in the background, whole or not at all; the last and the best are kept."""

import json
import threading
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from rustgpt_jax.errors import UserError
from rustgpt_jax.training.step import State

LAST_KEPT = 2
BEST_KEPT = 1

# Orbax numbers its operations with one counter: two threads that begin one at once wait for each other's files.
_one_at_a_time = threading.Lock()


class Checkpoints:
    """The checkpoints of one run, in the folders `last` and `best` under `folder`. Use it in a `with` statement."""

    def __init__(self, folder: Path, config_hash: str) -> None:
        self._config_hash = config_hash
        with _one_at_a_time:
            self._managers = {
                "last": _manager(folder / "last", LAST_KEPT),
                "best": _manager(folder / "best", BEST_KEPT),
            }

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()
        with _one_at_a_time:
            for manager in self._managers.values():
                manager.close()

    def step(self, which: str = "last") -> int | None:
        """The step of the newest checkpoint of `last` or `best`, or None."""
        return self._managers[which].latest_step()

    def save(self, state: State, step: int, which: str = "last") -> None:
        """Begin to write the state at `step`; its buffers are free again on return. One that is there already stays."""
        manager = self._managers[which]
        if step in manager.all_steps():
            return
        about = {"config_hash": self._config_hash, "layout": layout(state)}
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about))
        with _one_at_a_time:
            manager.save(step, args=args)

    def forget_after(self, step: int) -> None:
        """Delete what a killed run saved after the step that training goes on from."""
        for manager in self._managers.values():
            for later in [saved for saved in manager.all_steps() if saved > step]:
                with _one_at_a_time:
                    manager.delete(later)

    def restore(self, like: Any, which: str = "last") -> State:
        """The newest checkpoint, on the shapes, types and devices of `like` (arrays or their shapes).

        Raises UserError if there is none, or if it is of another config or has other arrays: nothing is left out,
        made up or cast.
        """
        manager = self._managers[which]
        step = manager.latest_step()
        if step is None:
            raise UserError(f"{manager.directory} has no checkpoint yet.")
        with _one_at_a_time:
            about = manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
        self._check(about, layout(like), f"{manager.directory}/{step}")
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        with _one_at_a_time:
            return manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))["state"]

    def wait(self) -> None:
        """Return when all that was saved is on the disk."""
        for manager in self._managers.values():
            manager.wait_until_finished()

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


def _manager(folder: Path, kept: int) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(max_to_keep=kept, cleanup_tmp_directories=True)
    return ocp.CheckpointManager(folder.absolute(), options=options, item_names=("state", "about"))
