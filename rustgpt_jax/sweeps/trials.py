"""The trials of a sweep: each a whole config with a name of its own, checked before anything runs."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rustgpt_jax.config import Config, config_hash
from rustgpt_jax.errors import UserError
from rustgpt_jax.resolve import override, resolve
from rustgpt_jax.sweeps.space import Overrides

ID_DIGITS = 8


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
        for path in fixed:
            if path in overrides:
                raise UserError(f"config.{path} is given on the command line and swept too: leave one of them out.")
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


def in_words(overrides: Overrides) -> str:
    """Overrides as a person would write them: 'optimizer.learning_rate=0.001, seed=1'."""
    return ", ".join(f"{path}={value}" for path, value in overrides.items()) or "of the config as it is"
