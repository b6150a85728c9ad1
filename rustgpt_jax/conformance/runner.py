"""Running checks and showing what came of them: a line for each as it ends, then a table."""

import contextlib
import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rustgpt_jax.conformance.checks import CHECKS, Check, checks_for
from rustgpt_jax.conformance.fixtures import Broken, conditions, crash
from rustgpt_jax.conformance.targets import Scope, Subject, subjects
from rustgpt_jax.conformance.transform_checks import use_eight_cpu_devices
from rustgpt_jax.errors import UserError, suggest_names


@dataclass(frozen=True)
class Outcome:
    """What a check of a part found: a measurement, or what broke; and the seconds that it took."""

    subject: Subject
    check: str
    is_ok: bool
    note: str
    seconds: float


def run_check(name: str, check: Check, subject: Subject) -> Outcome:
    """A check, with its failures, and exceptions of the part, as a sentence."""
    began = time.perf_counter()
    is_ok = False
    try:
        with conditions():
            note = check.function(subject)
        is_ok = True
    except Broken as broken:
        note = f"{broken}. Usual cause: {check.cause}"
    except UserError:
        raise
    except Exception as error:
        # What JAX says of a number that is an argument has one cause, whatever the check.
        is_looked_at = isinstance(error, jax.errors.ConcretizationTypeError)
        note = crash(error) + (f". Usual cause: {CHECKS['vmap'].cause}" if is_looked_at else "")
    return Outcome(subject, name, is_ok, note, time.perf_counter() - began)


def run_checks(subjects: Sequence[Subject], only: Sequence[str], console: Console) -> list[Outcome]:
    """All checks of all parts, each shown as it ends. Parts that stand in the same small model share their checks."""
    known: dict[Any, Outcome] = {}
    outcomes = []
    width = max(len(subject.title) for subject in subjects) + 2 if len(subjects) > 1 else 0
    for subject in subjects:
        # Programs of other models are used no more, and a process can map only so many into its memory.
        jax.clear_caches()
        for name, check in checks_for(subject, only).items():
            # All that a check of a model looks at is the model.
            key = (name, subject.model or subject.title)
            if key in known:
                first = known[key]
                outcome = Outcome(subject, name, first.is_ok, f"{first.note} (as {first.subject.title})", 0.0)
            else:
                outcome = known[key] = run_check(name, check, subject)
            outcomes.append(outcome)
            console.print(_line(outcome, width))
    return outcomes


def _line(outcome: Outcome, width: int) -> Text:
    """The part, where there are several, and what its check found."""
    line = Text(f"{outcome.subject.title if width else '':{width}}{outcome.check:20} ")
    line.append("ok    " if outcome.is_ok else "BROKEN", "green" if outcome.is_ok else "bold red")
    line.append(f" {outcome.seconds:5.1f} s  {outcome.note}")
    return line


def table_of(outcomes: Sequence[Outcome]) -> Table:
    """The checks of one part, or the parts and how many of their checks they pass."""
    parts = list(dict.fromkeys(outcome.subject for outcome in outcomes))
    if len(parts) == 1:
        table = Table("check", "", "measured, or what broke", title=parts[0].title, title_justify="left")
        for outcome in outcomes:
            table.add_row(outcome.check, _verdict(outcome.is_ok), Text(outcome.note))
        return table
    table = Table("part", "checks", "", "broken", "seconds")
    for part in parts:
        own = [outcome for outcome in outcomes if outcome.subject is part]
        broken = [outcome.check for outcome in own if not outcome.is_ok]
        seconds = f"{sum(outcome.seconds for outcome in own):.1f}"
        table.add_row(part.title, str(len(own)), _verdict(not broken), Text(", ".join(broken)), seconds)
    return table


def _verdict(is_ok: bool) -> Text:
    return Text("ok", "green") if is_ok else Text("BROKEN", "bold red")


# The `check` command.


def check_components(
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
            raise UserError(f"check: unknown check {name!r}.{suggest_names(name, CHECKS)}")
    # Once JAX has started it is too late: the check of eight devices then has a process of its own.
    with contextlib.suppress(RuntimeError):
        use_eight_cpu_devices()
    knobs = {path.removeprefix("model."): value for path, value in (changes or {}).items()}
    parts = [part for name in names or (None,) for part in subjects(name, knobs)]
    scope = Scope.EXHAUSTIVE if is_exhaustive else Scope.QUICK
    parts = [dataclasses.replace(part, scope=scope) for part in parts if checks_for(part, only)]
    if not parts:
        raise UserError(f"check: {', '.join(only)} does not apply to {', '.join(names)}.")
    outcomes = run_checks(parts, only, console)
    broken = [outcome for outcome in outcomes if not outcome.is_ok]
    console.print(table_of(outcomes))
    console.print(f"{len(outcomes) - len(broken)} checks passed, {len(broken)} failed", highlight=False)
    return 1 if broken else 0
