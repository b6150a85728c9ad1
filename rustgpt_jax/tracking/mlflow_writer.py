"""MLflow: a run per run, and for a sweep a parent run with its trials as nested runs."""

import getpass
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rustgpt_jax.tracking.metric_writer import MAX_ROWS, MetricWriter, TrackedRun

NAME = "mlflow"
DEFAULT_EXPERIMENT = "rustgpt_jax"
STATUSES = {"finished": "FINISHED", "stopped": "KILLED"}
SAMPLES = "samples.json"
# The most metrics, parameters and tags of a request, and the most characters of a value.
MAX_METRICS, MAX_PARAMS, MAX_LENGTH = 1000, 100, 5000
# Characters that names of metrics and parameters must not have.
_NOT_IN_NAMES = re.compile(r"[^\w\-. /]")


class MlflowWriter(MetricWriter):
    """Writes a run to MLflow, on the server or in the store that MLFLOW_TRACKING_URI names."""

    def __init__(self, run: TrackedRun) -> None:
        import mlflow
        from mlflow.entities import Metric, Param, RunTag

        self._metric, self._param, self._tag = Metric, Param, RunTag
        self._client: Any = mlflow.MlflowClient()
        self._buffer: list[Any] = []
        self._samples = run.read_samples()
        experiment = _find_experiment(self._client, run)
        parent = {}
        if run.sweep is not None:
            sweep = TrackedRun(run.sweep, tags=run.tags, is_sweep=True)
            parent["mlflow.parentRunId"] = _find_run(self._client, experiment, sweep, {})
        self._id = _find_run(self._client, experiment, run, parent)
        self._write_params(run.params)
        uri = mlflow.get_tracking_uri()
        is_server = uri.startswith(("http://", "https://"))
        self.location = f"{uri}/#/experiments/{experiment}/runs/{self._id}" if is_server else f"run {self._id} in {uri}"

    def _write_params(self, params: Mapping[str, Any]) -> None:
        """Log the config. MLflow's parameters cannot change, so knobs that did in a resumed run become tags."""
        values = {_clean(name): str(value)[:MAX_LENGTH] for name, value in params.items()}
        there = self._client.get_run(self._id).data.params
        new = [self._param(name, value) for name, value in values.items() if name not in there]
        for batch in _split(new, MAX_PARAMS):
            self._client.log_batch(self._id, params=batch)
        changed = [self._tag(name, value) for name, value in values.items() if there.get(name, value) != value]
        for batch in _split(changed, MAX_PARAMS):
            self._client.log_batch(self._id, tags=batch)

    def write_scalars(self, step: int, scalars: Mapping[str, float], wall_time: float) -> None:
        """Buffer the scalars of a step."""
        now = round(1000 * wall_time)
        self._buffer += [self._metric(_clean(name), float(value), now, step) for name, value in scalars.items()]
        if len(self._buffer) >= MAX_METRICS:
            self.flush()

    def write_samples(self, step: int, samples: Sequence[tuple[str, str]]) -> None:
        """Log a table of all samples so far, an artifact in the format of MLflow's tables."""
        self.rewind(step - 1)
        self._samples = [*self._samples, *((step, prompt, text) for prompt, text in samples)][-MAX_ROWS:]
        table = {"columns": ["step", "prompt", "text"], "data": [list(row) for row in self._samples]}
        # `log_table` would download the table to append to it.
        self._client.log_dict(self._id, table, SAMPLES)
        self._client.set_tag(self._id, "mlflow.loggedArtifacts", json.dumps([{"path": SAMPLES, "type": "table"}]))

    def rewind(self, step: int) -> None:
        """Forget the samples after a step."""
        self._samples = [row for row in self._samples if row[0] <= step]

    def write_summary(self, values: Mapping[str, float | str]) -> None:
        """Log numbers as metrics and strings as tags."""
        self.write_scalars(
            0, {name: value for name, value in values.items() if not isinstance(value, str)}, time.time()
        )
        for name, value in values.items():
            if isinstance(value, str):
                self._client.set_tag(self._id, _clean(name), value[:MAX_LENGTH])

    def write_file(self, file: Path) -> None:
        """Log a file as an artifact."""
        self._client.log_artifact(self._id, str(file))

    def flush(self) -> None:
        """Send the buffered metrics."""
        for batch in _split(self._buffer, MAX_METRICS):
            self._client.log_batch(self._id, metrics=batch)
        self._buffer = []

    def close(self, status: str) -> None:
        """End the run."""
        self._client.set_terminated(self._id, STATUSES.get(status, "FAILED"))


def _find_experiment(client: Any, run: TrackedRun) -> str:
    """Return the ID of the experiment of a run, and create it if it does not exist."""
    name = run.project or os.environ.get("MLFLOW_EXPERIMENT_NAME") or DEFAULT_EXPERIMENT
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        # Another process may create it at the same time.
        with suppress(Exception):
            return client.create_experiment(name)
        experiment = client.get_experiment_by_name(name)
    return experiment.experiment_id


def _find_run(client: Any, experiment: str, run: TrackedRun, tags: Mapping[str, str]) -> str:
    """Return the ID of the run of a folder, and create it if there is none. The trials of a sweep share its parent."""
    with run.lock(NAME):
        stored = run.load_state(NAME).get("id")
        if isinstance(stored, str) and _is_there(client, stored):
            client.update_run(stored, status="RUNNING")
            return stored
        tags = {
            **tags,
            **dict.fromkeys(map(_clean, run.tags), "true"),
            "mlflow.source.name": "rustgpt_jax",
            "mlflow.source.type": "LOCAL",
            "rustgpt_jax.folder": str(run.folder.absolute()),
        }
        with suppress(OSError, KeyError):
            tags["mlflow.user"] = getpass.getuser()
        if run.notes:
            tags["mlflow.note.content"] = run.notes
        created = client.create_run(experiment, run_name=run.name, tags=tags).info.run_id
        # It lacks everything that another run may have.
        run.save_state(NAME, id=created, step=0, n_lines=0, samples_step=0)
        return created


def _is_there(client: Any, run_id: str) -> bool:
    """Return whether a run is in the store, which may be another one than before, and was not deleted."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id).info.lifecycle_stage == "active"
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return False
        raise


def _clean(name: str) -> str:
    return _NOT_IN_NAMES.sub("_", name)


def _split(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    yield from (items[start : start + size] for start in range(0, len(items), size))
