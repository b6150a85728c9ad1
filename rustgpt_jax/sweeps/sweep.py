"""Run a sweep: plan its trials, launch them, and repeat until all are done."""

import contextlib
import dataclasses
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from rustgpt_jax.errors import UserError
from rustgpt_jax.registry import lookup
from rustgpt_jax.sharding.hardware_specs import Machine, count_cores, detect_machine
from rustgpt_jax.sharding.sharding_plan import min_devices
from rustgpt_jax.sweeps import sweep_dir as folders
from rustgpt_jax.sweeps.asset_cache import AssetCache
from rustgpt_jax.sweeps.launchers import Launch, run_in_subprocesses, run_inline, visible_gpus
from rustgpt_jax.sweeps.live_table import LiveTable
from rustgpt_jax.sweeps.planner import MODES, Chunk, Plan, group_by_shape, make_plan
from rustgpt_jax.sweeps.slurm import run_on_slurm
from rustgpt_jax.sweeps.sweep_dir import Ledger, SweepDir, is_settled
from rustgpt_jax.sweeps.trials import Trial, describe_overrides
from rustgpt_jax.training.config_checks import validate_components
from rustgpt_jax.training.preemption import StopRequest
from rustgpt_jax.workdir.run_dir import create_run_dir as create_run

# A launcher returns when all chunks have been worked through, or a stop was requested; outcomes are in the ledger.
Launcher = Callable[[Launch, Sequence[Chunk]], None]
LAUNCHERS: dict[str, Launcher] = {"inline": run_inline, "processes": run_in_subprocesses, "slurm": run_on_slurm}
SECONDS_BETWEEN_LOOKS = 2.0
JOBS_AT_ONCE = 8
# What workers elsewhere are planned for, since nobody can look: a small GPU, or a core with its share of memory.
UNSEEN_GPU = Machine("gpu", 1, 16e9, 1e14)
UNSEEN_CPU = Machine("cpu", 1, 2e9, 0.0)


@dataclass(frozen=True)
class SweepOptions:
    """How to run a sweep; None means chosen automatically."""

    launcher: str = "inline"
    mode: str = "auto"
    width: int | None = None
    n_workers: int | None = None
    slurm_options: Mapping[str, str] | None = None


@dataclass(frozen=True)
class SweepInfo:
    """What a sweep is: the file and the name of the function that says it, and the knobs set by hand."""

    config_file: str
    sweep: str
    origins: Mapping[str, str]

    @property
    def name(self) -> str:
        """A name for people."""
        stem = Path(self.config_file).stem
        return stem if self.sweep == "sweep" else f"{stem} {self.sweep.removeprefix('sweep_')}"


class Sweep:
    """A running sweep, to which a search can add trials repeatedly. Created by `open_sweep`.

    `record` is the content of sweep.json for this launch, without trials added later.
    """

    def __init__(
        self,
        folder: SweepDir,
        about: SweepInfo,
        settings: SweepOptions,
        shelf: AssetCache,
        board: LiveTable,
        stop: StopRequest,
        record: Mapping[str, str],
    ) -> None:
        self.folder, self.stop, self._about, self._settings, self._board = folder, stop, about, settings, board
        self._record, self._listed = record, dict[str, None]()
        self.ledger, self.shelf = Ledger(folder.ledger_file), shelf
        shelf.keep_in(folder.tokenizers)
        self._is_told = set[str]()
        self._first_event = len(self.ledger.events())
        self._machine = self._machine_of_workers()
        code = folders.save_code_snapshot(folder)
        self._launch = Launch(
            folder, self.shelf, code.absolute(), self.n_workers, dict(settings.slurm_options or {}), lambda: bool(stop)
        )

    @property
    def n_workers(self) -> int:
        """Worker processes or jobs at a time."""
        here = JOBS_AT_ONCE if self._settings.launcher == "slurm" else len(visible_gpus()) or count_cores()
        return self._settings.n_workers or here

    def message(self, text: str) -> None:
        """Print a message to the user."""
        self._board.message(text)

    def _machine_of_workers(self) -> Machine:
        if self._settings.launcher == "inline":
            return detect_machine()
        options = self._settings.slurm_options or {}
        asks_for_gpus = any("gpu" in f"{key}={value}" for key, value in options.items() if key != "partition")
        has_gpus = asks_for_gpus if self._settings.launcher == "slurm" else bool(visible_gpus())
        seen = UNSEEN_GPU if has_gpus else UNSEEN_CPU
        return dataclasses.replace(seen, n_devices=self.n_workers)

    def check(self, trials: Sequence[Trial]) -> None:
        """Check that trials can run on the devices of this sweep, before they are added.

        Raises:
            UserError: A trial cannot run.
        """
        check_trials(trials, self.shelf)
        self._planned(trials)

    def add(self, trials: Sequence[Trial]) -> None:
        """Record new trials, each with its run folder. A trial whose folder was deleted is recorded and run again.

        Raises:
            UserError: A trial cannot run.
        """
        planned = self.ledger.planned()
        deleted = {trial.id for trial in trials if trial.id in planned and not self._has_folder(trial)}
        for trial in trials:
            if trial.id in deleted or trial.id not in planned:
                origins = {**self._about.origins, **dict.fromkeys(trial.overrides, "sweep")}
                create_run(self.folder.trial(trial.id).path, trial.config, origins)
        # Another launch may have recorded them meanwhile.
        planned = self.ledger.planned()
        if new := [trial for trial in trials if trial.id in deleted or trial.id not in planned]:
            self.ledger.append_all([(trial.id, "planned", {"overrides": trial.overrides}) for trial in new])
        self._listed |= dict.fromkeys(trial.id for trial in trials)
        folders.write_sweep_info(self.folder, {**self._record, "trials": list(self._listed)})
        self._board.add(trials)

    def _has_folder(self, trial: Trial) -> bool:
        return self.folder.trial(trial.id).config_file.exists()

    def run(self, trials: Sequence[Trial], until: int | None = None) -> None:
        """Have trials run to the step `until` or to their ends, until each is there, has diverged or failed.

        Trials that another launch holds are waited for, and taken over if it is gone.
        """
        plans = self._plans(trials, until)
        launcher = lookup(LAUNCHERS, self._settings.launcher, "--launcher")
        while not self.stop and (waiting := self.unsettled(trials, until)):
            launcher(self._launch, [chunk for each in plans for chunk in each.chunks(waiting, until)])
            if not self.stop and self.unsettled(trials, until) == waiting:
                time.sleep(SECONDS_BETWEEN_LOOKS)

    def _planned(self, trials: Sequence[Trial]) -> list[Plan]:
        settings = self._settings
        several = next((trial for trial in trials if min_devices(trial.config.mesh) > 1), None)
        if several and settings.launcher == "processes":
            raise UserError(
                f"--launcher=processes gives a trial one device: {describe_overrides(several.overrides)} needs several."
            )
        return [
            make_plan(each, self._machine, settings.mode, settings.width) for each in group_by_shape(trials, self.shelf)
        ]

    def _plans(self, trials: Sequence[Trial], until: int | None) -> list[Plan]:
        plans = self._planned(trials)
        for number, each in enumerate(plans, start=1):
            n_trials = len(each.shape_class.trials)
            text = (
                f"shape class {number} of {len(plans)}: {n_trials} trials, {each.mode}"
                f"{'' if each.width == 1 else f', up to {each.width} in a program'} ({each.reason})"
            )
            if until is None and text not in self._is_told:
                self._is_told.add(text)
                self._board.message(text)
        return plans

    def unsettled(self, trials: Sequence[Trial], until: int | None = None) -> list[str]:
        """The trials that have not come to the step `until`, or to their ends, and have not failed in this launch."""
        states, failed = self.ledger.states(), self.failed()
        return [
            trial.id
            for trial in trials
            if trial.id not in failed and not is_settled(states.get(trial.id, {"event": "planned"}), until)
        ]

    def failed(self) -> set[str]:
        """The trials that failed in this launch."""
        recent = self.ledger.events()[self._first_event :]
        return {event["trial"] for event in recent if event["event"] == "failed"}


@contextlib.contextmanager
def open_sweep(
    path: Path, about: SweepInfo, settings: SweepOptions, shelf: AssetCache, console: Console
) -> Iterator[Sweep]:
    """Begin a sweep in a folder, or go on with it, with a table of its trials on the console."""
    command = shlex.join(["python", *sys.argv])
    record = {"name": about.name, "command": command, "config_file": about.config_file, "sweep": about.sweep}
    record |= {"mode": settings.mode, "launcher": settings.launcher}
    folder = folders.create_sweep_dir(path, record)
    with StopRequest() as stop, LiveTable(console, folder) as board:
        yield Sweep(folder, about, settings, shelf, board, stop, record)


def check_options(settings: SweepOptions) -> None:
    """Raise UserError if the launcher or the mode is unknown."""
    lookup(LAUNCHERS, settings.launcher, "--launcher")
    lookup(dict.fromkeys(MODES), settings.mode, "--mode")


def check_trials(trials: Iterable[Trial], shelf: AssetCache) -> None:
    """Raise UserError, before anything is written, for unknown components and unsuitable text."""
    nowhere = SweepDir(Path("none"))
    for trial in trials:
        try:
            validate_components(trial.config)
            shelf.inputs(trial.config).check(nowhere.trial(trial.id), min_devices(trial.config.mesh))
        except UserError as error:
            raise UserError(f"The trial {describe_overrides(trial.overrides)} is invalid: {error}") from error
