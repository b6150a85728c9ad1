"""JSON documents of runs and sweeps, for the verbs `train`, `sweep` and `report`."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rustgpt_jax.sweeps.report.analysis import RankedSetting, describe_comparisons, list_notes, rank_settings
from rustgpt_jax.sweeps.report.results import METRICS, TrialResult, read_results
from rustgpt_jax.sweeps.sweep_dir import SweepDir
from rustgpt_jax.sweeps.trial_batching import Plan
from rustgpt_jax.tracking.metric_writer import iter_metrics, last_metrics
from rustgpt_jax.training.checkpointing import read_best_steps
from rustgpt_jax.workdir.run_dir import RunDir, load_stages


def describe_run(path: Path) -> dict[str, Any]:
    """Return the state of a run: its steps, last and best metrics, checkpoints and files."""
    run = RunDir(path)
    saved = run.saved_steps
    best_step = next((step for step in read_best_steps(run.checkpoints / "best") or () if step in saved), None)
    best, last_evaluation = None, dict[str, Any]()
    for line in iter_metrics(path, containing=b'"valid/loss"'):
        last_evaluation = line
        best = line if line["step"] == best_step else best
    last = last_evaluation | last_metrics(path)
    files = {
        "config": run.config_file,
        "metrics": run.metrics_file,
        "samples": run.samples_file,
        "tokenizer": run.tokenizer_file,
        "checkpoints": run.checkpoints,
        "loss_curves": run.loss_png,
        "tensorboard": run.tensorboard,
    }
    return {
        "run": path,
        "step": max(saved, default=0),
        "total_steps": load_stages(path)[-1].end_step,
        "last": last or None,
        "best": best,
        "tokens_per_second": last.get("train/tokens_per_second"),
        "checkpoints": {"last": max(saved, default=None), "best": best_step, "steps": saved},
        "files": {name: _existing(file) for name, file in files.items()},
    }


def describe_sweep(path: Path) -> dict[str, Any]:
    """Return the results of a sweep: its trials, its settings in order of their mean loss, and the best trial."""
    results = read_results(path)
    ranked = rank_settings(results) if results.finished else ()
    metric = METRICS[results.metric]
    best = None
    if ranked:
        finished = [trial for trial in ranked[0].setting.trials if trial.final_loss is not None]
        best = _describe_trial(path, min(finished, key=lambda trial: trial.final_loss or 0.0))
    return {
        "sweep": path,
        "name": results.name,
        "metric": {"name": results.metric, "description": metric.name, "unit": metric.unit},
        "knobs": results.swept,
        "counts": results.counts,
        "best": best,
        "settings": [_describe_setting(row) for row in ranked],
        "trials": [_describe_trial(path, trial) for trial in results.trials],
        "comparisons": describe_comparisons(results, ranked) if ranked else [],
        "notes": list_notes(results, ranked) if ranked else [],
        "files": {"report": _existing(path / "report.html"), "results": _existing(path / "results.csv")},
    }


def _existing(path: Path) -> Path | None:
    return path if path.exists() else None


def _describe_setting(row: RankedSetting) -> dict[str, Any]:
    comparison = None if row.comparison is None else dataclasses.asdict(row.comparison)
    return {
        "knobs": row.setting.knobs,
        "mean_loss": row.interval.mean,
        "interval": [row.interval.low, row.interval.high] if row.interval.n > 1 else None,
        "n_finished": row.interval.n,
        "n_diverged": row.setting.n_diverged,
        "trials": [trial.id for trial in row.setting.trials],
        "difference_from_best": comparison,
        "is_significantly_worse": row.is_significantly_worse,
    }


def _describe_trial(path: Path, trial: TrialResult) -> dict[str, Any]:
    return {
        "id": trial.id,
        "run": SweepDir(path).trial(trial.id).path,
        "status": trial.status,
        "knobs": trial.knobs,
        "step": trial.step,
        "total_steps": trial.total_steps,
        "final_loss": trial.final_loss,
        "best_loss": trial.best_loss,
        "train_loss": trial.train_loss,
        "valid_loss": trial.valid_loss,
        "bits_per_byte": trial.bits_per_byte,
        "error": trial.error,
    }


def describe_plans(path: Path, n_trials: int, plans: Sequence[Plan]) -> dict[str, Any]:
    """Return what a sweep would run: its shape classes with their cost and trials, which are examples for a search."""
    classes = []
    for plan in plans:
        cost = plan.shape_class.cost
        classes.append(
            {
                "trials": [{"id": trial.id, "knobs": trial.overrides} for trial in plan.shape_class.trials],
                "mode": plan.mode,
                "width": plan.width,
                "reason": plan.reason,
                "memory_bytes": plan.memory,
                "n_parameters": cost.parameters,
                "tokens_per_trial": cost.tokens,
                "flops_per_trial": cost.total_flops,
            }
        )
    return {"sweep": path, "n_trials": n_trials, "shape_classes": classes}
