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

from rustgpt_jax.config.schema import Config
from rustgpt_jax.data.preprocess import AssetCache
from rustgpt_jax.errors import UserError, program_name
from rustgpt_jax.process_setup import StopRequest
from rustgpt_jax.registry import lookup
from rustgpt_jax.sharding.hardware_specs import Machine, count_cores, detect_machine
from rustgpt_jax.sharding.sharding_plan import min_devices
from rustgpt_jax.sweeps import ray_launcher
from rustgpt_jax.sweeps.live_table import LiveTable
from rustgpt_jax.sweeps.local_launchers import Launch, find_visible_gpus, run_in_subprocesses, run_inline
from rustgpt_jax.sweeps.slurm import run_on_slurm
from rustgpt_jax.sweeps.sweep_dir import (
    Ledger,
    SweepDir,
    create_sweep_dir,
    is_done_until,
    save_code_snapshot,
    write_sweep_info,
)
from rustgpt_jax.sweeps.trial_batching import MODES, Chunk, Plan, group_by_shape, make_plan
from rustgpt_jax.sweeps.trials import Trial, describe_overrides
from rustgpt_jax.tracking.metric_writer import TrackedRun
from rustgpt_jax.tracking.trackers import LOCAL, open_trackers
from rustgpt_jax.training.config_checks import validate_components
from rustgpt_jax.training.run_inputs import RunInputs
from rustgpt_jax.workdir.event_log import hold_lock
from rustgpt_jax.workdir.run_dir import create_run_dir as create_run
from rustgpt_jax.workdir.run_dir import update_trackers

# A launcher returns when all chunks have been processed, or after a stop request; outcomes are in the ledger.
Launcher = Callable[[Launch, Sequence[Chunk]], None]
LAUNCHERS: dict[str, Launcher] = {
    "inline": run_inline,
    "processes": run_in_subprocesses,
    "slurm": run_on_slurm,
    "ray": ray_launcher.run_on_ray,
}
POLL_SECONDS = 2.0
DEFAULT_JOBS = 8
# Workers on other machines are assumed to have a small GPU, or one core and its share of the memory.
REMOTE_GPU = Machine("gpu", 1, 16e9, 1e14)
REMOTE_CPU = Machine("cpu", 1, 2e9, 0.0)


@dataclass(frozen=True)
class SweepOptions:
    """Options for running a sweep; None means that the value is chosen automatically."""

    launcher: str = "inline"
    mode: str = "auto"
    width: int | None = None
    n_workers: int | None = None
    launcher_options: Mapping[str, str] | None = None


@dataclass(frozen=True)
class SweepInfo:
    """The definition of a sweep: its config file, the function that defines it, and where config values come from.

    The config file is '' for a sweep that a Python program defines.
    """

    config_file: str
    sweep: str
    origins: Mapping[str, str]

    @property
    def name(self) -> str:
        """The name to display."""
        stem = Path(self.config_file).stem or "sweep"
        return stem if self.sweep == "sweep" else f"{stem} {self.sweep.removeprefix('sweep_')}"


class Sweep:
    """A running sweep, to which a search can add trials repeatedly; created by `open_sweep`."""

    def __init__(
        self,
        folder: SweepDir,
        info: SweepInfo,
        options: SweepOptions,
        assets: AssetCache,
        table: LiveTable,
        stop: StopRequest,
    ) -> None:
        self.folder, self.assets, self.stop, self.ledger = folder, assets, stop, Ledger(folder.ledger_file)
        self._info, self._options, self._table = info, options, table
        self._ids, self._announced = dict[str, None](), set[str]()
        # The config of the first trial.
        self.config: Config | None = None
        self._first_event = len(self.ledger.events())
        assets.set_folder(folder.tokenizers)
        code = save_code_snapshot(folder).absolute()
        n_workers, self._machine = _find_workers(options)
        launcher_options = dict(options.launcher_options or {})
        self._launch = Launch(folder, assets, code, n_workers, launcher_options, lambda: bool(stop))

    def message(self, text: str) -> None:
        """Print a message to the user."""
        self._table.message(text)

    @property
    def trackers(self) -> list[str]:
        """The trackers of the trials, except those that are local to each trial."""
        return [name for name in self.config.logging.trackers if name not in LOCAL] if self.config else []

    def write_to_trackers(
        self, summary: Mapping[str, float | str], files: Sequence[Path], message: Callable[[str], None]
    ) -> None:
        """Write the result of the sweep to its trackers."""
        assert self.config is not None
        logging = self.config.logging
        run = TrackedRun(self.folder.path, project=logging.project, tags=logging.tags, is_sweep=True)
        writers = open_trackers(self.trackers, run, message, message)
        for writer in writers:
            writer.write_summary(summary)
            for file in files:
                writer.write_file(file)
            writer.begin_close("finished")
        for writer in writers:
            writer.close("finished")

    def check(self, trials: Sequence[Trial]) -> None:
        """Check that trials can run on the devices, before they are added. Raises UserError if one cannot."""
        check_trials(trials, self.assets)
        self._plan(trials)

    def add(self, trials: Sequence[Trial]) -> None:
        """Record new trials and create their run folders. A trial whose folder was deleted is recorded and run again.

        Raises:
            UserError: A trial cannot run.
        """
        # Other launches may add the same trials at the same time.
        with hold_lock(self.folder.adding_lock):
            planned = self.ledger.planned()
            new = [
                trial
                for trial in trials
                if trial.id not in planned or not self.folder.trial(trial.id).config_file.exists()
            ]
            for trial in new:
                origins = {**self._info.origins, **dict.fromkeys(trial.overrides, "sweep")}
                create_run(self.folder.trial(trial.id).path, trial.config, origins)
            if new:
                self.ledger.append_all([(trial.id, "planned", {"overrides": trial.overrides}) for trial in new])
            for trial in trials:
                if trial not in new and not self.ledger.is_done(trial.id):
                    update_trackers(self.folder.trial(trial.id), trial.config)
        self._ids |= dict.fromkeys(trial.id for trial in trials)
        self.config = self.config or trials[0].config
        write_sweep_info(self.folder, {**_make_launch_info(self._info, self._options), "trials": list(self._ids)})
        self._table.add(trials)

    def run(self, trials: Sequence[Trial], until: int | None = None) -> None:
        """Run trials until each has reached the step `until` or its end, diverged, or failed.

        Trials that are locked by another launch are awaited, and taken over if that launch dies.
        """
        plans = self._plan(trials)
        for number, plan in enumerate(plans, start=1) if until is None else ():
            n_trials = len(plan.shape_class.trials)
            width = "" if plan.width == 1 else f", up to {plan.width} in a program"
            text = f"shape class {number} of {len(plans)}: {n_trials} trials, {plan.mode}{width} ({plan.reason})"
            if text not in self._announced:
                self._announced.add(text)
                self.message(text)
        run_chunks = lookup(LAUNCHERS, self._options.launcher, "--launcher")
        while not self.stop and (unfinished := self.unfinished(trials, until)):
            run_chunks(self._launch, [chunk for plan in plans for chunk in plan.chunks(unfinished, until)])
            if not self.stop and self.unfinished(trials, until) == unfinished:
                time.sleep(POLL_SECONDS)

    def _plan(self, trials: Sequence[Trial]) -> list[Plan]:
        options = self._options
        several = next((trial for trial in trials if min_devices(trial.config.mesh) > 1), None)
        one_device = options.launcher == "processes" or (options.launcher == "ray" and self._machine.platform == "cpu")
        if several and one_device:
            raise UserError(
                f"--launcher={options.launcher} gives each trial one device, but "
                f"{describe_overrides(several.overrides)} needs several."
            )
        classes = group_by_shape(trials, self.assets)
        return [make_plan(shape_class, self._machine, options.mode, options.width) for shape_class in classes]

    def unfinished(self, trials: Sequence[Trial], until: int | None = None) -> list[str]:
        """Return the trials that have not reached the step `until` or their end, and have not failed in this launch."""
        states, failed = self.ledger.states(), self.failed()
        return [
            trial.id
            for trial in trials
            if trial.id not in failed and not is_done_until(states.get(trial.id, {"event": "planned"}), until)
        ]

    def failed(self) -> set[str]:
        """Return the trials that failed in this launch."""
        recent = self.ledger.events()[self._first_event :]
        return {event["trial"] for event in recent if event["event"] == "failed"}


def _find_workers(options: SweepOptions) -> tuple[int, Machine]:
    """Return the number of workers, and the machine to plan with, which has the devices of all of them."""
    if options.launcher == "inline":
        return 1, detect_machine()
    given = options.launcher_options or {}
    if options.launcher == "ray":
        n_tasks, n_gpus = ray_launcher.count_tasks(given)
        n_workers = options.n_workers or max(1, n_tasks)
        machine = REMOTE_GPU if n_gpus else REMOTE_CPU
        return n_workers, dataclasses.replace(machine, n_devices=n_workers * max(1, n_gpus))
    if options.launcher == "slurm":
        n_workers = options.n_workers or DEFAULT_JOBS
        has_gpus = any("gpu" in f"{key}={value}" for key, value in given.items() if key != "partition")
    else:
        gpus = find_visible_gpus()
        n_workers, has_gpus = options.n_workers or len(gpus) or count_cores(), bool(gpus)
    return n_workers, dataclasses.replace(REMOTE_GPU if has_gpus else REMOTE_CPU, n_devices=n_workers)


@contextlib.contextmanager
def open_sweep(
    path: Path, info: SweepInfo, options: SweepOptions, assets: AssetCache, console: Console
) -> Iterator[Sweep]:
    """Create or resume a sweep in a folder, and show a table of its trials on the console."""
    connection = (
        ray_launcher.connect(options.launcher_options or {}, console.print)
        if options.launcher == "ray"
        else contextlib.nullcontext()
    )
    with connection:
        folder = create_sweep_dir(path, _make_launch_info(info, options))
        with StopRequest() as stop, LiveTable(console, folder) as table:
            yield Sweep(folder, info, options, assets, table, stop)


def _make_launch_info(info: SweepInfo, options: SweepOptions) -> dict[str, str]:
    """Return the content of sweep.json except for the trials."""
    command = f"{program_name()} {shlex.join(sys.argv[1:])}"
    launch_info = {"name": info.name, "command": command, "config_file": info.config_file, "sweep": info.sweep}
    return launch_info | {"mode": options.mode, "launcher": options.launcher}


def check_options(options: SweepOptions) -> None:
    """Raise UserError if the launcher, one of its options or the mode is unknown."""
    lookup(LAUNCHERS, options.launcher, "--launcher")
    lookup(dict.fromkeys(MODES), options.mode, "--mode")
    if options.launcher == "ray":
        ray_launcher.check_options(options.launcher_options or {})


def check_trials(trials: Iterable[Trial], assets: AssetCache) -> None:
    """Raise UserError, before anything is written, for unknown components and unsuitable text."""
    nowhere = SweepDir(Path("none"))
    for trial in trials:
        try:
            validate_components(trial.config)
            inputs = RunInputs(trial.config, *assets.prepare(trial.config))
            inputs.check(nowhere.trial(trial.id), min_devices(trial.config.mesh))
        except UserError as error:
            raise UserError(f"The trial {describe_overrides(trial.overrides)} is invalid: {error}") from error
