"""The verb `check`: the parts that a user names, held against every check that is for them."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from rustgpt_jax.conformance.checks import CHECKS, checks_for
from rustgpt_jax.conformance.devices import use_eight_cpu_devices
from rustgpt_jax.conformance.report import run_checks, table_of
from rustgpt_jax.conformance.subjects import subjects
from rustgpt_jax.errors import UserError, suggestion


def check(
    names: Sequence[str], console: Console, only: Sequence[str] = (), changes: Mapping[str, Any] | None = None
) -> int:
    """Check the parts that `names` mean, all parts if there are none, and show what was found; 1 if any is broken.

    `only` names the checks to run, all for none; `changes` sets knobs of the small model that parts are checked in,
    as `options` or as `model.options`. Raises UserError for a name that means nothing.
    """
    for name in only:
        if name not in CHECKS:
            raise UserError(f"check: there is no check {name!r}.{suggestion(name, CHECKS)}")
    # Once JAX has started it is too late: the check of eight devices then has a process of its own.
    with contextlib.suppress(RuntimeError):
        use_eight_cpu_devices()
    knobs = {path.removeprefix("model."): value for path, value in (changes or {}).items()}
    parts = [part for name in names or (None,) for part in subjects(name, knobs)]
    parts = [part for part in parts if checks_for(part, only)]
    if not parts:
        raise UserError(f"check: {', '.join(only)} is no check for {', '.join(names)}.")
    outcomes = run_checks(parts, only, console)
    broken = [outcome for outcome in outcomes if not outcome.is_ok]
    console.print(table_of(outcomes))
    console.print(f"{len(outcomes) - len(broken)} checks passed, {len(broken)} failed", highlight=False)
    return 1 if broken else 0
