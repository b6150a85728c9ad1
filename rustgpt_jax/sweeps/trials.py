"""The trials of a sweep, each a complete config that is validated before anything runs."""

import copy
import functools
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rustgpt_jax.config.schema import EPOCHS, STEPS, Config, config_hash, uses_epochs
from rustgpt_jax.config.validation import check_value, override_all, resolve
from rustgpt_jax.errors import UserError
from rustgpt_jax.sweeps.search_space import TPE, Categorical, Distribution, Overrides, sample

if TYPE_CHECKING:
    from rustgpt_jax.sweeps.asset_cache import AssetCache

ID_DIGITS = 8
# Number of points of a search to try before giving up.
N_PROBES = 100
# Quantiles of a range at which its values are checked.
PLACES = (0.0, 0.3, 0.5, 0.7, 0.999)


@dataclass(frozen=True, eq=False)
class Trial:
    """A run of a sweep. Its ID is a prefix of its config hash, so equal configs are the same trial."""

    id: str
    overrides: Overrides
    config: Config


def _new_shelf() -> "AssetCache":
    # It imports JAX, which takes seconds, and few configs need data to be resolved.
    from rustgpt_jax.sweeps.asset_cache import AssetCache

    return AssetCache()


def make_trial(tree: Any, overrides: Overrides, shelf: Callable[[], "AssetCache"] = _new_shelf) -> Trial:
    """Make the trial that overrides some knobs of a ConfigDict, which is not modified.

    Where epochs are among the knobs, the trial has the steps that they come to instead; `shelf` gives the data that
    tell. Raises UserError for a knob that the config does not have, a value out of range, and whatever `resolve`
    refuses.
    """
    tree = copy.deepcopy(tree)
    try:
        override_all(tree, overrides)
        config, steps = resolve(tree), dict[str, int]()
        if uses_epochs(config):
            config, steps, *_ = shelf().resolve_epochs(config)
    except UserError as error:
        raise UserError(f"The trial {describe_overrides(overrides)} is invalid: {error}") from error
    own = {path: value for path, value in overrides.items() if not path.endswith(EPOCHS)}
    if len(own) < len(overrides):
        own |= steps
    return Trial(config_hash(config)[:ID_DIGITS], own, config)


def make_trials(
    tree: Any, sweep: Iterable[Overrides], fixed: Iterable[str] = (), shelf: Callable[[], "AssetCache"] = _new_shelf
) -> list[Trial]:
    """Make all trials of a sweep over a config, in order.

    `fixed` are knobs that were set by hand and so must not be swept. `shelf` gives what trials share. Raises
    UserError for what cannot run, for two trials that are the same config, and for a sweep without trials.
    """
    shelf = functools.cache(shelf)
    trials: list[Trial] = []
    by_id: dict[str, Trial] = {}
    for overrides in sweep:
        if not isinstance(overrides, Mapping):
            raise UserError(f"A sweep yields mappings of knobs to values, not {overrides!r}.")
        _check_fixed(overrides, fixed)
        for path in overrides:
            if not isinstance(path, str):
                raise UserError(f"A sweep names each knob by its dotted path, such as 'seed', not {path!r}.")
        added = make_trial(tree, dict(overrides), shelf)
        if added.id in by_id:
            first, second = describe_overrides(by_id[added.id].overrides), describe_overrides(added.overrides)
            raise UserError(f"Two trials are the same config: {first} and {second}. Leave one of them out.")
        by_id[added.id] = added
        trials.append(added)
    if not trials:
        raise UserError("The sweep has no trials.")
    return trials


def _check_fixed(overrides: Iterable[str], fixed: Iterable[str]) -> None:
    swept = set(overrides)
    for path in fixed:
        if path in swept:
            raise UserError(f"config.{path} is given on the command line and swept too: leave one of them out.")
        if path.endswith(STEPS) and path.removesuffix(STEPS) + EPOCHS in swept:
            raise UserError(
                f"config.{path} is given on the command line, and {EPOCHS}, which decides instead, is swept: leave one "
                "of them out."
            )


def sample_feasible_points(tree: Any, search: TPE, fixed: Iterable[str] = ()) -> list[Trial]:
    """Return points of a search that resolve, covering each option of each choice, to validate a config with.

    The first is the middle of the space if it resolves. Options without such a point are omitted, just as a search
    skips points that do not resolve.

    Raises:
        UserError: A knob or one of its values is invalid in any config, or no point resolves.
    """
    _check_fixed([path for path, _ in search.space], fixed)
    for path, distribution in search.space:
        for value in _examples(distribution):
            check_value(path, value)
    shelf = functools.cache(_new_shelf)
    points = [search.middle, *sample(N_PROBES, dict(search.space))]
    options = [
        (path, option) for path, each in search.space if isinstance(each, Categorical) for option in each.options
    ]
    seed = {"seed": search.seeds[0]} if search.seeds else {}
    found = [_first(tree, ({**point, **seed, path: option} for point in points), shelf) for path, option in options]
    first = _first(tree, ({**point, **seed} for point in points), shelf) or next(filter(None, found), None)
    # Report the reason for the middle point.
    first = first or make_trial(tree, search.middle, shelf)
    return [first, *(each for each in found if each is not None and each.id != first.id)]


def _examples(distribution: Distribution) -> list[Any]:
    if isinstance(distribution, Categorical):
        return list(distribution.options)
    return [distribution.at(place) for place in PLACES]


def _first(tree: Any, points: Iterable[Overrides], shelf: Callable[[], "AssetCache"]) -> Trial | None:
    """Return the first point that resolves."""
    for point in points:
        with suppress(UserError):
            return make_trial(tree, point, shelf)
    return None


def describe_overrides(overrides: Overrides) -> str:
    """Format overrides for people: 'optimizer.learning_rate=0.001, seed=1'."""
    return ", ".join(f"{path}={value}" for path, value in overrides.items()) or "of the config as it is"
