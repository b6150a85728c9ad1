"""The verb `check`: the parts that a user names, held against every check that is for them."""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from rustgpt_jax.conformance.checks import CHECKS, checks_for
from rustgpt_jax.conformance.runner import run_checks, table_of
from rustgpt_jax.conformance.targets import Scope, subjects
from rustgpt_jax.conformance.transform_checks import use_eight_cpu_devices
from rustgpt_jax.errors import UserError, suggestion


def check(
    names: Sequence[str],
    console: Console,
    only: Sequence[str] = (),
    changes: Mapping[str, Any] | None = None,
    is_exhaustive: bool = False,
) -> int:
    """Check parts and print the results.

    Args:
        names: The parts to check, as named by the user; all parts if empty.
        console: The console to print to.
        only: Names of the checks to run; all checks if empty.
        changes: Overrides for the small model that parts are checked in, such as `extra` or `model.extra`.
        is_exhaustive: Whether to cover every length, batch size, dtype and mode, which takes minutes per part.

    Returns:
        The exit status: 1 if any check fails, else 0.

    Raises:
        UserError: A name is unknown.
    """
    for name in only:
        if name not in CHECKS:
            raise UserError(f"check: there is no check {name!r}.{suggestion(name, CHECKS)}")
    # Once JAX has started it is too late: the check of eight devices then has a process of its own.
    with contextlib.suppress(RuntimeError):
        use_eight_cpu_devices()
    knobs = {path.removeprefix("model."): value for path, value in (changes or {}).items()}
    parts = [part for name in names or (None,) for part in subjects(name, knobs)]
    scope = Scope.EXHAUSTIVE if is_exhaustive else Scope.QUICK
    parts = [dataclasses.replace(part, scope=scope) for part in parts if checks_for(part, only)]
    if not parts:
        raise UserError(f"check: {', '.join(only)} is no check for {', '.join(names)}.")
    outcomes = run_checks(parts, only, console)
    broken = [outcome for outcome in outcomes if not outcome.is_ok]
    console.print(table_of(outcomes))
    console.print(f"{len(outcomes) - len(broken)} checks passed, {len(broken)} failed", highlight=False)
    return 1 if broken else 0
