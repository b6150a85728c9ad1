"""Weights & Biases: a run per run, and for a sweep a group of its trials with a run for the sweep itself."""

import os
import secrets
import shlex
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from rustgpt_jax.tracking.metric_writer import MAX_ROWS, MetricWriter, TrackedRun

NAME = "wandb"
DEFAULT_PROJECT = "rustgpt_jax"
# Maximum seconds that wandb waits for its server when a run is opened and when it is closed.
INIT_SECONDS, FINISH_SECONDS = 60.0, 15.0
# The exit codes by which wandb tells the status of a run: 255 is a run that was stopped.
EXIT_CODES = {"finished": 0, "stopped": 255}

# Runs of a population are opened by several threads.
_init_lock = threading.Lock()


@cache
def _use_own_service() -> None:
    """Let wandb start its service for this process only.

    It would share that of a parent process, which keeps the run of a killed process open, so that nobody can resume it.
    """
    os.environ.pop("WANDB_SERVICE", None)


class WandbWriter(MetricWriter):
    """Writes a run to Weights & Biases, online or offline as its environment variables say.

    Steps are a metric, the x axis of all others, because wandb's own steps cannot go back when a run is resumed from an
    earlier step.
    """

    # wandb's service loses what it has not written when it ends because this process was killed.
    is_durable = False

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        self._wandb = wandb
        config = {name: list(value) if isinstance(value, tuple) else value for name, value in run.params.items()}
        sweep = run.folder if run.is_sweep else run.sweep
        with _init_lock:
            _use_own_service()
            # Its messages would break the progress bar, and it would ask for an API key in the middle of training.
            wandb.setup(wandb.Settings(silent=True))
            self._run: Any = wandb.init(
                project=run.project or os.environ.get("WANDB_PROJECT") or DEFAULT_PROJECT,
                id=self._get_id(run),
                name=run.name,
                group=sweep.absolute().name if sweep else None,
                job_type="sweep" if run.is_sweep else "trial" if sweep else "train",
                notes=run.notes or None,
                tags=list(run.tags) or None,
                config={**config, "run_folder": str(run.folder.absolute())},
                # The knobs of logging may change when a run is resumed.
                allow_val_change=True,
                dir=None if os.environ.get("WANDB_DIR") else str(run.folder.absolute()),
                resume="allow",
                # A population has several runs in a process.
                reinit="create_new",
                settings=wandb.Settings(
                    console="off", silent=True, init_timeout=INIT_SECONDS, finish_timeout=FINISH_SECONDS
                ),
            )
        last_step = self._run.summary.get("step") if self._run.resumed else None
        if isinstance(last_step, (int, float)):
            # The server knows what it has; the last step may lack lines.
            run.save_state(NAME, step=int(last_step), n_lines=0)
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step", step_sync=True)
        folder = Path(self._run.dir).parent
        self.location = self._run.url or f"offline; upload it with `wandb sync {shlex.quote(str(folder))}`"
        self._samples = run.read_samples()

    @staticmethod
    def _get_id(run: TrackedRun) -> str:
        stored = run.load_state(NAME).get("id")
        if isinstance(stored, str) and stored.isalnum():
            return stored
        new = secrets.token_hex(8)
        run.save_state(NAME, id=new, step=0, n_lines=0, samples_step=0)
        return new

    def write_scalars(self, step: int, scalars: Mapping[str, float], wall_time: float) -> None:
        """Log the scalars of a step."""
        self._run.log({"step": step, "_timestamp": wall_time, **scalars})

    def write_samples(self, step: int, samples: Sequence[tuple[str, str]]) -> None:
        """Log a table of all samples so far."""
        self.rewind(step - 1)
        self._samples = [*self._samples, *((step, prompt, text) for prompt, text in samples)][-MAX_ROWS:]
        table = self._wandb.Table(columns=["step", "prompt", "text"], data=[list(row) for row in self._samples])
        self._run.log({"step": step, "samples": table})

    def write_summary(self, values: Mapping[str, float | str]) -> None:
        """Set values of the summary."""
        self._run.summary.update(dict(values))

    def write_file(self, file: Path) -> None:
        """Log a file as an artifact."""
        artifact = self._wandb.Artifact(f"{file.stem}-{self._run.id}", type="report")
        artifact.add_file(str(file))
        self._run.log_artifact(artifact)

    def rewind(self, step: int) -> None:
        """Forget the samples after a step."""
        self._samples = [row for row in self._samples if row[0] <= step]

    def close(self, status: str) -> None:
        """Finish the run."""
        self._run.finish(exit_code=EXIT_CODES.get(status, 1))
