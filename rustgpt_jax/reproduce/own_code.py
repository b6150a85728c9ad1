"""The code that a run was made with, unpacked, and processes that run it as the run was launched."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from rustgpt_jax.errors import UserError
from rustgpt_jax.runs.environment import as_variables
from rustgpt_jax.runs.folder import RunFolder
from rustgpt_jax.runs.launches import Launch, archive_of
from rustgpt_jax.runs.snapshot import unpack
from rustgpt_jax.sweeps.launchers.processes import visible_gpus


class OwnCode(NamedTuple):
    """The code of a launch in a folder."""

    folder: Path
    launch: Launch

    def start(self, arguments: Sequence[str], errors: IO[bytes] | None = None) -> "subprocess.Popen[bytes]":
        """Start Python with this code before all other, on as many cores and GPUs as the launch had, in its place."""
        # Paths of the config may be relative to where the run was launched.
        place = Path(self.launch.cwd) if Path(self.launch.cwd).is_dir() else self.folder
        mine = os.sched_getaffinity(0)
        # XLA divides its sums by the cores.
        os.sched_setaffinity(0, sorted(mine)[: self.launch.environment["machine"]["cores"]])
        try:
            return subprocess.Popen(
                # Without the current folder, which may have another version of the code.
                [sys.executable, "-P", *arguments],
                cwd=place,
                env=self._variables(),
                stderr=errors,
                # Ctrl-C is for this process, which passes it on: once.
                start_new_session=True,
            )
        finally:
            os.sched_setaffinity(0, mine)

    def _variables(self) -> dict[str, str]:
        path = os.pathsep.join(filter(None, [str(self.folder), os.environ.get("PYTHONPATH")]))
        gpus = visible_gpus()
        seen = {"CUDA_VISIBLE_DEVICES": ",".join(gpus[: self.launch.devices])} if gpus else {}
        return as_variables(self.launch.environment) | {"PYTHONPATH": path} | seen


@contextmanager
def own_code(run: RunFolder, launch: Launch) -> Iterator[OwnCode]:
    """The code of a launch, while the block runs. Raises UserError if the run does not have it, or it is damaged."""
    archive = archive_of(run, launch)
    if not archive.exists():
        raise UserError(f"{run.path} does not have the code that it was made with: there is no {archive}.")
    with tempfile.TemporaryDirectory() as folder:
        unpack(archive, Path(folder))
        yield OwnCode(Path(folder), launch)
