"""Pytest plugin: the checks as tests of another project's components.

    @pytest.mark.conforms("my_lab.mixers:Retention")
    def test_retention(conformance_check):
        conformance_check()

is a test for each check that the part must pass. Knobs of the small model may be set too: `conforms(NAME, n_heads=2)`.
"""

from collections.abc import Callable
from typing import Any

import pytest

MARKER = "conforms(*names, **knobs): one test for each check of these parts, with the argument conformance_check"
ARGUMENT = "conformance_check"


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line("markers", MARKER)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each part and check. Only here, where a test asks for it, is JAX imported."""
    if ARGUMENT not in metafunc.fixturenames:
        return
    markers = list(metafunc.definition.iter_markers("conforms"))
    if not markers:
        raise pytest.UsageError(f'{metafunc.definition.nodeid} needs @pytest.mark.conforms("my_lab.mixers:Retention")')
    from rustgpt_jax.conformance.checks import checks_for
    from rustgpt_jax.conformance.targets import subjects

    cases = [
        pytest.param(_case(name, part, is_first=index == 0), id=f"{part.name.rpartition(':')[2]}-{name}")
        for marker in markers
        for wanted in marker.args
        for part in subjects(wanted, marker.kwargs)
        for index, name in enumerate(checks_for(part))
    ]
    metafunc.parametrize(ARGUMENT, cases)


def _case(name: str, part: Any, is_first: bool) -> Callable[[], str]:
    """Return a test function that runs one check, returns its measurement, and fails if the check fails.

    The first check of a part clears the compiled programs of earlier parts, since a process can map only a limited
    number.
    """

    def conformance_check() -> str:
        import jax

        from rustgpt_jax.conformance.checks import CHECKS
        from rustgpt_jax.conformance.runner import run_check

        if is_first:
            jax.clear_caches()
        outcome = run_check(name, CHECKS[name], part)
        if not outcome.is_ok:
            pytest.fail(outcome.note, pytrace=False)
        return outcome.note

    return conformance_check
