"""The trials of a sweep: each a whole config with a name of its own, checked before anything runs."""

import copy
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from rustgpt_jax.config import Config, config_hash
from rustgpt_jax.errors import UserError
from rustgpt_jax.resolve import check_value, override, resolve
from rustgpt_jax.sweeps.space import Choice, Distribution, Overrides, TreeParzen, sample

ID_DIGITS = 8
# Number of points of a search to try before giving up.
N_PROBES = 100
# Quantiles of a range at which its values are checked.
PLACES = (0.0, 0.3, 0.5, 0.7, 0.999)


@dataclass(frozen=True, eq=False)
class Trial:
    """A run of a sweep. Its id is the beginning of its config's hash, so equal configs are one trial everywhere."""

    id: str
    overrides: Overrides
    config: Config


def trial(tree: Any, overrides: Overrides) -> Trial:
    """The trial that differs from a config (a ConfigDict, left as it is) in these knobs.

    Raises UserError for a knob that the config does not have, a value out of range, and whatever `resolve` refuses.
    """
    tree = copy.deepcopy(tree)
    try:
        for path, value in overrides.items():
            override(tree, path, value)
        config = resolve(tree)
    except UserError as error:
        raise UserError(f"The trial {in_words(overrides)} cannot be: {error}") from error
    return Trial(config_hash(config)[:ID_DIGITS], dict(overrides), config)


def expand(tree: Any, sweep: Iterable[Overrides], fixed: Iterable[str] = ()) -> list[Trial]:
    """All trials of a sweep over a config, in their order.

    `fixed` are knobs that were set by hand and so must not be swept. Raises UserError for what cannot run, for two
    trials that are the same config, and for a sweep without trials.
    """
    trials: list[Trial] = []
    by_id: dict[str, Trial] = {}
    for overrides in sweep:
        if not isinstance(overrides, Mapping):
            raise UserError(f"A sweep yields mappings of knobs to values, not {overrides!r}.")
        _check_fixed(overrides, fixed)
        for path in overrides:
            if not isinstance(path, str):
                raise UserError(f"A sweep names each knob by its dotted path, such as 'seed', not {path!r}.")
        added = trial(tree, dict(overrides))
        if added.id in by_id:
            first, second = in_words(by_id[added.id].overrides), in_words(added.overrides)
            raise UserError(f"Two trials are the same config: {first} and {second}. Leave one of them out.")
        by_id[added.id] = added
        trials.append(added)
    if not trials:
        raise UserError("The sweep has no trials.")
    return trials


def _check_fixed(overrides: Iterable[str], fixed: Iterable[str]) -> None:
    for path in fixed:
        if path in overrides:
            raise UserError(f"config.{path} is given on the command line and swept too: leave one of them out.")


def feasible_points(tree: Any, search: TreeParzen, fixed: Iterable[str] = ()) -> list[Trial]:
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
    points = [search.middle, *sample(N_PROBES, dict(search.space))]
    options = [(path, option) for path, each in search.space if isinstance(each, Choice) for option in each.options]
    seed = {"seed": search.seeds[0]} if search.seeds else {}
    found = [_first(tree, ({**point, **seed, path: option} for point in points)) for path, option in options]
    first = _first(tree, ({**point, **seed} for point in points)) or next(filter(None, found), None)
    # Report the reason for the middle point.
    first = first or trial(tree, search.middle)
    return [first, *(each for each in found if each is not None and each.id != first.id)]


def _examples(distribution: Distribution) -> list[Any]:
    if isinstance(distribution, Choice):
        return list(distribution.options)
    return [distribution.at(place) for place in PLACES]


def _first(tree: Any, points: Iterable[Overrides]) -> Trial | None:
    """Return the first point that resolves."""
    for point in points:
        with suppress(UserError):
            return trial(tree, point)
    return None


def in_words(overrides: Overrides) -> str:
    """Overrides as a person would write them: 'optimizer.learning_rate=0.001, seed=1'."""
    return ", ".join(f"{path}={value}" for path, value in overrides.items()) or "of the config as it is"
