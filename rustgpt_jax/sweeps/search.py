"""Searches: trials that depend on the results of earlier ones.

The results are in run folders and in a journal, so a search that is killed at any moment can be continued exactly.
"""

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rustgpt_jax.config.schema import affects_result, stages
from rustgpt_jax.config.validation import flatten_tree
from rustgpt_jax.errors import UserError
from rustgpt_jax.sweeps.asset_cache import AssetCache
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
# The key of the reason for skipping a suggestion, in its user attributes.
SKIPPED = "skipped"
MOST_SKIPPED_A_TRIAL = 20


def check_validation(trials: Sequence[Trial]) -> None:
    """Raise UserError if a trial has no validation loss for a search to compare."""
    for each in trials:
        if not all(stage.config.data.valid_fraction for stage in stages(each.config)):
            raise UserError("A search compares validation losses, and config.data.valid_fraction=0 has none.")


def check_rungs(search: SuccessiveHalving, trials: Sequence[Trial]) -> None:
    """Raise UserError for a rung at which some trial is not evaluated."""
    for each, rung in itertools.product(trials, search.rungs):
        every, parts = each.config.logging.eval_every, stages(each.config)
        if rung >= parts[-1].end_step:
            raise UserError(
                f"successive_halving: the rung {rung} is not before the end of training at step {parts[-1].end_step}."
            )
        if rung % every:
            raise UserError(
                f"successive_halving: there is no evaluation at step {rung}, for config.logging.eval_every={every}; "
                f"the nearest rung is {max(1, round(rung / every)) * every}."
            )


def run_successive_halving(sweep: Sweep, search: SuccessiveHalving, trials: Sequence[Trial]) -> None:
    """Successive halving (arXiv 1502.07943): at each rung the worse trials end, and the better ones go on.

    The survivors are packed together anew, and begin where they stood.
    """
    alive = list(trials)
    with lock_run_dir(sweep.folder.path):
        sweep.add(trials)
        for number, rung in enumerate(search.rungs, start=1):
            sweep.run(alive, until=rung)
            if sweep.stop:
                return
            alive = _survivors(sweep, alive, rung, number, search.keep)
        sweep.run(alive)


def _survivors(sweep: Sweep, trials: list[Trial], rung: int, number: int, keep: float) -> list[Trial]:
    losses = {each.id: _loss_at(sweep, each, rung) for each in trials}
    comparable = [each for each in trials if math.isfinite(losses[each.id])]
    n_kept = min(len(comparable), math.ceil(keep * len(trials)))
    kept = sorted(comparable, key=lambda each: losses[each.id])[:n_kept]
    states = sweep.ledger.states()
    # Trials that have ended stay so: an earlier sweep of the folder may have completed them.
    ended = ("pruned", *DONE)
    dropped = [each for each in comparable if each not in kept and states[each.id]["event"] not in ended]
    if dropped:
        details = {"step": rung, "rung": number}
        sweep.ledger.append_all([(each.id, "pruned", details) for each in dropped])
    return [each for each in trials if each in kept]


def _loss_at(sweep: Sweep, each: Trial, step: int) -> float:
    """Return the validation loss of a trial at a step, infinite if it did not reach it."""
    lines = read_metrics(sweep.folder.trial(each.id).path)
    return next((line[VALID_LOSS] for line in lines if line["step"] == step and VALID_LOSS in line), math.inf)


def check_components(trials: Iterable[Trial]) -> None:
    """Check that all components of the trials exist.

    Raises:
        UserError: A part does not exist.
    """
    for each in trials:
        validate_components(each.config)


def run_tpe(
    sweep: Sweep,
    search: TPE,
    tree: Any,
    fixed: Iterable[str],
    shelf: AssetCache | None = None,
    check: Callable[[Sequence[Trial]], None] = check_components,
) -> list[str]:
    """Run Optuna's tree-structured Parzen estimator (Bergstra et al. 2011) in batches.

    Each suggestion is a function of the seed, its number, and earlier results, so a restarted search suggests the same
    trials. Another config or search space starts a new study.

    Suggestions that cannot run, such as a number of heads that does not divide the width or a mesh of more devices than
    there are, are skipped: they do not count towards `n_trials`, and the sampler ranks them below all others.

    Args:
        sweep: The sweep that runs the trials.
        search: The search.
        tree: The config of the sweep.
        fixed: The knobs set on the command line, which are not searched.
        shelf: The data of the trials, which is needed where the config has epochs.
        check: Raises a UserError if trials cannot run.

    Returns:
        The reasons of all skipped suggestions.

    Raises:
        UserError: Too many suggestions were skipped.
    """
    trials_of = partial(_trials_of, search=search, tree=tree, fixed=tuple(fixed), shelf=shelf or AssetCache())
    with lock_run_dir(sweep.folder.path):
        study = _study(sweep, search, tree)
        told = [each for each in _tried(study)[: search.n_trials] if each.state.is_finished()]
        # Rerun trials that failed or whose folders were deleted; the results told earlier remain.
        _run(sweep, {each.number: trials_of(each) for each in told})
        while not sweep.stop and len(_tried(study)) - len(_running(study)) < search.n_trials:
            _ask(study, search, trials_of, check)
            batch = {each.number: trials_of(each) for each in _running(study)}
            _run(sweep, batch)
            if not sweep.stop:
                for number, members in batch.items():
                    _tell(study, number, [_final_loss(sweep, member) for member in members])
        return [each.user_attrs[SKIPPED] for each in study.trials if SKIPPED in each.user_attrs]


def _run(sweep: Sweep, batch: Mapping[int, Sequence[Trial]]) -> None:
    distinct = list({member.id: member for members in batch.values() for member in members}.values())
    if distinct:
        sweep.add(distinct)
        sweep.run(distinct)


def _study(sweep: Sweep, search: TPE, tree: Any) -> Any:
    try:
        import optuna
    except ModuleNotFoundError:
        raise UserError("tree_parzen needs Optuna: python -m pip install 'rustgpt_jax[search]'.") from None
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    file, name = sweep.folder.study_file, hash_study(search, tree)
    check_no_symlinks([file])
    # Optuna's reader raises arbitrary errors for a damaged file.
    try:
        _drop_torn_line(file)
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


def _drop_torn_line(file: Path) -> None:
    """Remove a partial last line left by a killed writer, so that the next line does not continue it."""
    if file.exists():
        with open(file, "r+b") as content:
            content.truncate(content.read().rfind(b"\n") + 1)


def _check_study(study: Any, search: TPE) -> None:
    """Raise some exception if a study's trials do not match the search."""
    import optuna

    if study.direction != optuna.study.StudyDirection.MINIMIZE:
        raise ValueError(study.direction)
    space = {path: _optuna(distribution) for path, distribution in search.space}
    optuna.create_study().add_trials(_as_told(study.trials))
    for each in study.trials:
        if each.distributions != space or not isinstance(each.user_attrs.get(SKIPPED, ""), str):
            raise ValueError(each.number)


def _as_told(trials: Sequence[Any]) -> list[Any]:
    """Return trials reduced to what the sampler is told."""
    from optuna.trial import create_trial

    return [
        create_trial(state=each.state, value=each.value, params=each.params, distributions=each.distributions)
        for each in trials
    ]


def hash_study(search: TPE, tree: Any) -> str:
    """Return the name of a search's study, a hash of everything that its losses depend on.

    This covers the config without the searched knobs, the search space, and the seeds. The number of trials and the
    batch size are excluded, so that a search can be extended.
    """
    searched = {path for path, _ in search.space} | ({"seed"} if search.seeds else set())
    config = {path: value for path, value in flatten_tree(tree) if path not in searched and affects_result(path)}
    space = {path: [type(each).__name__, dataclasses.astuple(each)] for path, each in search.space}
    described = json.dumps([config, space, search.seed, search.seeds], sort_keys=True, default=_as_dict)
    return f"sweep {hashlib.sha256(described.encode()).hexdigest()[:16]}"


def _as_dict(value: Any) -> dict[str, Any]:
    return dict(value.items())


class _NoLock:
    """A no-op lock for Optuna."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        return None


def _running(study: Any) -> list[Any]:
    return [each for each in study.trials if not each.state.is_finished()]


def _tried(study: Any) -> list[Any]:
    """Return the suggestions that were not skipped, finished or not."""
    return [each for each in study.trials if SKIPPED not in each.user_attrs]


def _ask(
    study: Any,
    search: TPE,
    trials_of: Callable[[Any], list[Trial]],
    check: Callable[[Sequence[Trial]], None],
) -> None:
    """Ask for suggestions until the batch or the search is complete.

    Each suggestion enters the journal as one line, and no batch begins before all of the one before is told: wherever
    a search is killed, it goes on with the same suggestions.
    """
    from optuna.trial import TrialState, create_trial

    n_told = len(_tried(study)) - len(_running(study))
    end = min(search.n_trials, (n_told // search.batch + 1) * search.batch)
    while len(_tried(study)) < end:
        asked = suggest(search, study.trials, len(study.trials))
        reason = _why_not(asked, trials_of, check)
        if reason and len(study.trials) - len(_tried(study)) >= MOST_SKIPPED_A_TRIAL * search.n_trials:
            raise UserError(f"Too few points of the search are valid; the last one was skipped because: {reason}")
        study.add_trial(
            create_trial(
                state=TrialState.PRUNED if reason else TrialState.RUNNING,
                params=asked.params,
                distributions=asked.distributions,
                user_attrs={SKIPPED: reason} if reason else {},
            )
        )


def _why_not(
    asked: Any, trials_of: Callable[[Any], list[Trial]], check: Callable[[Sequence[Trial]], None]
) -> str | None:
    """Return why a suggestion cannot be tried, or None if it can."""
    try:
        check(trials_of(asked))
    except UserError as error:
        return str(error)
    return None


def suggest(search: TPE, trials: Sequence[Any], number: int) -> Any:
    """Return suggestion `number` of Optuna's sampler, given the (frozen) trials before it."""
    import optuna

    sampler = optuna.samplers.TPESampler(
        seed=search.seed + number, constant_liar=True, n_startup_trials=min(10, search.n_trials)
    )
    in_memory = optuna.create_study(sampler=sampler)
    in_memory.add_trials(_as_told(trials))
    return in_memory.ask({path: _optuna(distribution) for path, distribution in search.space})


def _optuna(distribution: Distribution) -> Any:
    import optuna

    match distribution:
        case Categorical(options):
            # Use indices: options may be tuples, which JSON would turn into lists.
            return optuna.distributions.CategoricalDistribution(range(len(options)))
        case Integers(low, high):
            return optuna.distributions.IntDistribution(low, high)
        case LogIntegers(low, high):
            return optuna.distributions.IntDistribution(low, high, log=True)
        case Uniform(low, high):
            return optuna.distributions.FloatDistribution(low, high)
        case LogUniform(low, high):
            return optuna.distributions.FloatDistribution(low, high, log=True)


def decode_params(search: TPE, params: dict[str, Any]) -> Overrides:
    """Return the overrides for Optuna's parameters, with option indices replaced by the options."""
    return {
        path: distribution.options[params[path]] if isinstance(distribution, Categorical) else params[path]
        for path, distribution in search.space
    }


def _trials_of(asked: Any, search: TPE, tree: Any, fixed: tuple[str, ...], shelf: AssetCache) -> list[Trial]:
    """Return the trials of a suggestion: one, or one per seed."""
    overrides = decode_params(search, asked.params)
    if not search.seeds:
        return make_trials(tree, [overrides], fixed, lambda: shelf)
    return [make_trial(tree, {**overrides, "seed": seed}, lambda: shelf) for seed in search.seeds]


def _final_loss(sweep: Sweep, each: Trial) -> float:
    if sweep.ledger.states()[each.id]["event"] != "finished":
        return math.inf
    losses = [line[VALID_LOSS] for line in read_metrics(sweep.folder.trial(each.id).path) if VALID_LOSS in line]
    return losses[-1] if losses else math.inf


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
