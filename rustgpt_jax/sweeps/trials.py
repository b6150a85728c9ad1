"""The trials of a sweep: complete configs, validated before anything runs."""

import functools
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from rustgpt_jax.config.schema import EPOCHS, STEPS, Config, config_hash, uses_epochs
from rustgpt_jax.config.validation import check_value, resolve
from rustgpt_jax.errors import UserError
from rustgpt_jax.sweeps.search_space import TPE, Categorical, Overrides, sample

if TYPE_CHECKING:
    from rustgpt_jax.data.preprocess import AssetCache

ID_DIGITS = 8
NO_OVERRIDES: Mapping[str, Any] = MappingProxyType({})
# Number of points of a search to try before giving up.
N_PROBES = 100
# Quantiles of a numeric distribution whose values are validated.
QUANTILES = (0.0, 0.3, 0.5, 0.7, 0.999)


@dataclass(frozen=True, eq=False)
class Trial:
    """A run of a sweep. Its ID is a prefix of its config hash, so trials with equal configs have equal IDs."""

    id: str
    overrides: Overrides
    config: Config


def _make_asset_cache() -> "AssetCache":
    # The import takes seconds, since it imports JAX, and most configs are resolved without data.
    from rustgpt_jax.data.preprocess import AssetCache

    return AssetCache()


def make_trial(
    tree: Any,
    overrides: Overrides,
    fixed: Mapping[str, Any] = NO_OVERRIDES,
    get_assets: Callable[[], "AssetCache"] = _make_asset_cache,
) -> Trial:
    """Make the trial that overrides some knobs of a config.

    Args:
        tree: The config of the sweep.
        overrides: The values of knobs by path. Epochs are converted to steps.
        fixed: The values of knobs set on the command line.
        get_assets: A function that returns the data needed for this conversion.

    Raises:
        UserError: A knob is unknown, a value is out of range, or the config is invalid.
    """
    try:
        config, steps = resolve(tree, {**fixed, **overrides}), dict[str, int]()
        if uses_epochs(config):
            config, steps, *_ = get_assets().resolve_epochs(config)
    except UserError as error:
        raise UserError(f"The trial {describe_overrides(overrides)} is invalid: {error}") from error
    without_epochs = {path: value for path, value in overrides.items() if not path.endswith(EPOCHS)}
    if len(without_epochs) < len(overrides):
        without_epochs |= steps
    return Trial(config_hash(config)[:ID_DIGITS], without_epochs, config)


def make_trials(
    tree: Any,
    sweep: Iterable[Overrides],
    fixed: Mapping[str, Any] = NO_OVERRIDES,
    get_assets: Callable[[], "AssetCache"] = _make_asset_cache,
) -> list[Trial]:
    """Make all trials of a sweep over a config, in order.

    Args:
        tree: The config of the sweep.
        sweep: The overrides of each trial.
        fixed: The values of knobs set on the command line, which must not be swept.
        get_assets: A function that returns the data needed for trials with epochs; called at most once.

    Raises:
        UserError: A trial is invalid, two trials have the same config, or there are no trials.
    """
    get_assets = functools.cache(get_assets)
    trials: dict[str, Trial] = {}
    for overrides in sweep:
        if not isinstance(overrides, Mapping):
            raise UserError(f"A sweep yields mappings of knobs to values, not {overrides!r}.")
        _check_fixed(overrides, fixed)
        for path in overrides:
            if not isinstance(path, str):
                raise UserError(f"A sweep names each knob by its dotted path, such as 'seed', not {path!r}.")
        trial = make_trial(tree, dict(overrides), fixed, get_assets)
        if trial.id in trials:
            first, second = describe_overrides(trials[trial.id].overrides), describe_overrides(trial.overrides)
            raise UserError(f"Two trials have the same config: {first} and {second}. Remove one of them.")
        trials[trial.id] = trial
    if not trials:
        raise UserError("The sweep has no trials.")
    return list(trials.values())


def _check_fixed(overrides: Iterable[str], fixed: Iterable[str]) -> None:
    swept = set(overrides)
    for path in fixed:
        if path in swept:
            raise UserError(f"config.{path} is both set on the command line and swept: remove one of them.")
        if path.endswith(STEPS) and path.removesuffix(STEPS) + EPOCHS in swept:
            raise UserError(
                f"config.{path} is set on the command line, and {EPOCHS}, which takes precedence, is swept: remove one "
                "of them."
            )


def sample_feasible_points(tree: Any, search: TPE, fixed: Mapping[str, Any] = NO_OVERRIDES) -> list[Trial]:
    """Return valid points of a search that cover each option of each choice, for validating a config.

    The first is the median point of the space if it is valid. Options without a valid point are omitted, just as a
    search skips invalid points.

    Raises:
        UserError: A knob or one of its values is invalid in any config, or no point is valid.
    """
    _check_fixed([path for path, _ in search.space], fixed)
    for path, distribution in search.space:
        examples = [distribution.quantile(u) for u in QUANTILES]
        for value in distribution.options if isinstance(distribution, Categorical) else examples:
            check_value(path, value)
    get_assets = functools.cache(_make_asset_cache)
    points = [search.median_point, *sample(N_PROBES, dict(search.space))]
    options = [
        {path: option} for path, choice in search.space if isinstance(choice, Categorical) for option in choice.options
    ]
    seed = {"seed": search.seeds[0]} if search.seeds else {}

    def find_valid(fixed_option: Overrides) -> Trial | None:
        for point in points:
            with suppress(UserError):
                return make_trial(tree, {**point, **seed, **fixed_option}, fixed, get_assets)
        return None

    found = list(filter(None, map(find_valid, options)))
    # If no point is valid, raise the error of the median point.
    first = find_valid({}) or next(iter(found), None) or make_trial(tree, search.median_point, fixed, get_assets)
    return [first, *(trial for trial in found if trial.id != first.id)]


def describe_overrides(overrides: Overrides) -> str:
    """Format overrides for display: 'optimizer.learning_rate=0.001, seed=1'."""
    return ", ".join(f"{path}={value}" for path, value in overrides.items()) or "without overrides"
