"""Searches: sweeps whose trials depend on the results of earlier ones.

The state of a search is in run folders and a journal, so a search that is killed at any moment resumes exactly.
"""

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from rustgpt_jax.config.schema import affects_result, stages
from rustgpt_jax.config.validation import flatten_tree
from rustgpt_jax.data.preprocess import AssetCache
from rustgpt_jax.errors import UserError
from rustgpt_jax.sweeps.search_space import (
    TPE,
    Categorical,
    Distribution,
    Integers,
    LogIntegers,
    LogUniform,
    Overrides,
    SuccessiveHalving,
    Uniform,
)
from rustgpt_jax.sweeps.sweep import Sweep
from rustgpt_jax.sweeps.sweep_dir import DONE
from rustgpt_jax.sweeps.trials import Trial, make_trial, make_trials
from rustgpt_jax.tracking.metric_writer import read_metrics
from rustgpt_jax.training.config_checks import validate_components
from rustgpt_jax.workdir.run_dir import check_no_symlinks, lock_run_dir

VALID_LOSS = "valid/loss"
# The Optuna user attribute that stores why a suggestion was skipped.
SKIPPED = "skipped"
MAX_SKIPPED_PER_TRIAL = 20

Check = Callable[[Sequence[Trial]], None]


def check_validation(trials: Sequence[Trial]) -> None:
    """Raise UserError if a trial has no validation loss for a search to compare."""
    for trial in trials:
        if not all(stage.config.data.valid_fraction for stage in stages(trial.config)):
            raise UserError("A search compares validation losses, but config.data.valid_fraction=0.")


def check_rungs(search: SuccessiveHalving, trials: Sequence[Trial]) -> None:
    """Raise UserError if a trial is not evaluated at each rung."""
    for trial, rung in itertools.product(trials, search.rungs):
        every, end = trial.config.logging.eval_every, stages(trial.config)[-1].end_step
        if rung >= end:
            raise UserError(f"successive_halving: the rung {rung} is not before the end of training at step {end}.")
        if rung % every:
            raise UserError(
                f"successive_halving: no evaluation at step {rung}, because config.logging.eval_every={every}; "
                f"the nearest rung is {max(1, round(rung / every)) * every}."
            )


def check_components(trials: Iterable[Trial]) -> None:
    """Raise UserError if a component of a trial is unknown."""
    for trial in trials:
        validate_components(trial.config)


def run_successive_halving(sweep: Sweep, search: SuccessiveHalving, trials: Sequence[Trial]) -> None:
    """Run successive halving (arXiv 1502.07943): at each rung the worse trials end, and the better ones continue.

    The survivors are regrouped into programs, and resume from their checkpoints.
    """
    alive = list(trials)
    with lock_run_dir(sweep.folder.path):
        sweep.add(trials)
        for number, rung in enumerate(search.rungs, start=1):
            sweep.run(alive, until=rung)
            if sweep.stop:
                return
            alive = _prune(sweep, alive, rung, number, search.keep)
        sweep.run(alive)


def _prune(sweep: Sweep, trials: list[Trial], rung: int, number: int, keep: float) -> list[Trial]:
    """Prune the worse trials at a rung, and return the others."""
    losses = {trial.id: _read_losses(sweep, trial).get(rung, math.inf) for trial in trials}
    comparable = [trial for trial in trials if math.isfinite(losses[trial.id])]
    n_kept = min(len(comparable), math.ceil(keep * len(trials)))
    kept = sorted(comparable, key=lambda trial: losses[trial.id])[:n_kept]
    states = sweep.ledger.states()
    # An earlier sweep in this folder may have finished some of them.
    not_prunable = ("pruned", *DONE)
    pruned = [trial for trial in comparable if trial not in kept and states[trial.id]["event"] not in not_prunable]
    if pruned:
        details = {"step": rung, "rung": number}
        sweep.ledger.append_all([(trial.id, "pruned", details) for trial in pruned])
    return [trial for trial in trials if trial in kept]


def _read_losses(sweep: Sweep, trial: Trial) -> dict[int, float]:
    """Return the validation losses of a trial by step."""
    lines = read_metrics(sweep.folder.trial(trial.id).path)
    return {line["step"]: line[VALID_LOSS] for line in lines if VALID_LOSS in line}


def run_tpe(sweep: Sweep, search: TPE, tree: Any, fixed: Overrides, check: Check = check_components) -> list[str]:
    """Run Optuna's tree-structured Parzen estimator (Bergstra et al. 2011) in batches.

    Each suggestion is a function of the seed, its number, and earlier results, so a restarted search suggests the same
    trials. Another config or search space starts a new study.

    Suggestions that cannot run, such as a number of heads that does not divide the width or a mesh with more devices
    than are available, are skipped: they do not count toward `n_trials`, and the sampler ranks them below all others.

    Args:
        sweep: The sweep that runs the trials.
        search: The search.
        tree: The config of the sweep.
        fixed: The values of knobs set on the command line, which are not searched.
        check: A function that raises UserError if trials cannot run.

    Returns:
        The reason for each skipped suggestion.

    Raises:
        UserError: Too many suggestions were skipped.
    """
    make = partial(_make_point_trials, search=search, tree=tree, fixed=fixed, assets=sweep.assets)
    with lock_run_dir(sweep.folder.path):
        study = _load_study(sweep, search, {**dict(flatten_tree(tree)), **fixed})
        finished = [point for point in _valid(study)[: search.n_trials] if point.state.is_finished()]
        # Rerun trials that failed or whose folders were deleted; the results reported to Optuna remain.
        _run_points(sweep, {point.number: make(point) for point in finished})
        while not sweep.stop and len(_valid(study)) - len(_running(study)) < search.n_trials:
            _ask(study, search, make, check)
            batch = {point.number: make(point) for point in _running(study)}
            _run_points(sweep, batch)
            if not sweep.stop:
                for number, trials in batch.items():
                    _tell(study, number, [_final_loss(sweep, trial) for trial in trials])
        return [point.user_attrs[SKIPPED] for point in study.trials if SKIPPED in point.user_attrs]


def _run_points(sweep: Sweep, batch: Mapping[int, Sequence[Trial]]) -> None:
    distinct = list({trial.id: trial for trials in batch.values() for trial in trials}.values())
    if distinct:
        sweep.add(distinct)
        sweep.run(distinct)


def _load_study(sweep: Sweep, search: TPE, tree: Any) -> Any:
    try:
        import optuna
    except ModuleNotFoundError:
        raise UserError("tpe needs Optuna: python -m pip install 'rustgpt_jax[search]'.") from None
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    file, name = sweep.folder.study_file, hash_study(search, tree)
    check_no_symlinks([file])
    # Optuna's reader raises arbitrary errors for a damaged file.
    try:
        if file.exists():
            # Remove the partial last line of a killed writer, so that the next line does not continue it.
            with open(file, "r+b") as content:
                content.truncate(content.read().rfind(b"\n") + 1)
        # The sweep's own lock excludes other processes, and is released when a process is killed.
        backend = JournalFileBackend(str(file), lock_obj=_NoLock())  # type: ignore[arg-type]
        storage = optuna.storages.JournalStorage(backend)
        study = optuna.create_study(study_name=name, storage=storage, load_if_exists=True, direction="minimize")
        _check_study(study, search)
    except Exception as error:
        raise UserError(
            f"{file} cannot be read ({type(error).__name__}). Move it away to restart the search; trials "
            "that have run are not run again."
        ) from error
    return study


def _check_study(study: Any, search: TPE) -> None:
    """Raise an exception, of any type, if a study's trials do not match the search."""
    import optuna

    if study.direction != optuna.study.StudyDirection.MINIMIZE:
        raise ValueError(study.direction)
    space = {path: _to_optuna(distribution) for path, distribution in search.space}
    optuna.create_study().add_trials(_copy_results(study.trials))
    for point in study.trials:
        if point.distributions != space or not isinstance(point.user_attrs.get(SKIPPED, ""), str):
            raise ValueError(point.number)


def _copy_results(points: Sequence[Any]) -> list[Any]:
    """Copy the parts of Optuna trials that the sampler uses."""
    from optuna.trial import create_trial

    return [
        create_trial(state=point.state, value=point.value, params=point.params, distributions=point.distributions)
        for point in points
    ]


def hash_study(search: TPE, tree: Any) -> str:
    """Return the name of a search's study, a hash of everything that its losses depend on.

    This covers the config without the searched knobs, the search space, and the seeds. The number of trials and the
    batch size are excluded, so that a search can be extended.
    """
    searched = {path for path, _ in search.space} | ({"seed"} if search.seeds else set())
    config = {path: value for path, value in flatten_tree(tree) if path not in searched and affects_result(path)}
    space = {path: [type(each).__name__, dataclasses.astuple(each)] for path, each in search.space}
    content = [config, space, search.seed, search.seeds]
    described = json.dumps(content, sort_keys=True, default=lambda mapping: dict(mapping.items()))
    return f"sweep {hashlib.sha256(described.encode()).hexdigest()[:16]}"


class _NoLock:
    """A no-op lock for Optuna."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        return None


def _running(study: Any) -> list[Any]:
    return [point for point in study.trials if not point.state.is_finished()]


def _valid(study: Any) -> list[Any]:
    """Return the suggestions that were not skipped, finished or not."""
    return [point for point in study.trials if SKIPPED not in point.user_attrs]


def _ask(study: Any, search: TPE, make_point_trials: Callable[[Any], list[Trial]], check: Check) -> None:
    """Add suggestions to the study until the batch is full or the search has all its points.

    Each suggestion is one line of the journal, and a batch begins only after all results of the previous one have been
    reported: a search that was killed continues with the same suggestions.
    """
    from optuna.trial import TrialState, create_trial

    n_finished = len(_valid(study)) - len(_running(study))
    end = min(search.n_trials, (n_finished // search.batch + 1) * search.batch)
    while len(_valid(study)) < end:
        point, reason = suggest(search, study.trials, len(study.trials)), None
        try:
            check(make_point_trials(point))
        except UserError as error:
            reason = str(error)
        if reason and len(study.trials) - len(_valid(study)) >= MAX_SKIPPED_PER_TRIAL * search.n_trials:
            raise UserError(f"Too few points of the search are valid; the last one was skipped because: {reason}")
        study.add_trial(
            create_trial(
                state=TrialState.PRUNED if reason else TrialState.RUNNING,
                params=point.params,
                distributions=point.distributions,
                user_attrs={SKIPPED: reason} if reason else {},
            )
        )


def suggest(search: TPE, trials: Sequence[Any], number: int) -> Any:
    """Return suggestion `number` of Optuna's sampler, given the (frozen) Optuna trials before it."""
    import optuna

    sampler = optuna.samplers.TPESampler(
        seed=search.seed + number, constant_liar=True, n_startup_trials=min(10, search.n_trials)
    )
    in_memory = optuna.create_study(sampler=sampler)
    in_memory.add_trials(_copy_results(trials))
    return in_memory.ask({path: _to_optuna(distribution) for path, distribution in search.space})


def _to_optuna(distribution: Distribution) -> Any:
    import optuna

    match distribution:
        case Categorical(options):
            # Use indices: options may be tuples, which JSON would turn into lists.
            return optuna.distributions.CategoricalDistribution(range(len(options)))
        case Integers(low, high) | LogIntegers(low, high):
            return optuna.distributions.IntDistribution(low, high, log=isinstance(distribution, LogIntegers))
        case Uniform(low, high) | LogUniform(low, high):
            return optuna.distributions.FloatDistribution(low, high, log=isinstance(distribution, LogUniform))


def decode_params(search: TPE, params: dict[str, Any]) -> Overrides:
    """Return the overrides for Optuna's parameters, with indices of options replaced by the options."""
    return {
        path: distribution.options[params[path]] if isinstance(distribution, Categorical) else params[path]
        for path, distribution in search.space
    }


def _make_point_trials(point: Any, search: TPE, tree: Any, fixed: Overrides, assets: AssetCache) -> list[Trial]:
    """Return the trials of a suggestion: one, or one per seed."""
    overrides = decode_params(search, point.params)
    if not search.seeds:
        return make_trials(tree, [overrides], fixed, lambda: assets)
    return [make_trial(tree, {**overrides, "seed": seed}, fixed, lambda: assets) for seed in search.seeds]


def _final_loss(sweep: Sweep, trial: Trial) -> float:
    if sweep.ledger.states()[trial.id]["event"] != "finished":
        return math.inf
    return [math.inf, *_read_losses(sweep, trial).values()][-1]


def _tell(study: Any, number: int, losses: list[float]) -> None:
    """Report the mean loss over the seeds, or a pruned trial if the point diverged or failed for any seed.

    The sampler ignores failed trials, and would keep suggesting points that diverge. It ranks pruned trials below all
    others.
    """
    import optuna

    mean = sum(losses) / len(losses)
    if math.isfinite(mean):
        study.tell(number, mean)
    else:
        study.tell(number, state=optuna.trial.TrialState.PRUNED)
