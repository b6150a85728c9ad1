"""Pytest plugin that turns the checks into tests of your own components.

    @pytest.mark.conforms("my_lab.mixers:Retention")
    def test_retention(conformance_check):
        conformance_check()

creates one test for each check that applies. Fields of the small model can be set: `conforms(NAME, n_heads=2)`.
"""

from collections.abc import Callable
from typing import Any

import pytest

MARKER = "conforms(*names, **fields): one test for each check of these components, with the argument conformance_check"
ARGUMENT = "conformance_check"


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker `conforms`."""
    config.addinivalue_line("markers", MARKER)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Create one test for each component and check. JAX is imported only if a test uses `conformance_check`."""
    if ARGUMENT not in metafunc.fixturenames:
        return
    markers = list(metafunc.definition.iter_markers("conforms"))
    if not markers:
        raise pytest.UsageError(f'{metafunc.definition.nodeid} needs @pytest.mark.conforms("my_lab.mixers:Retention")')
    from rustgpt_jax.conformance.checks import checks_for
    from rustgpt_jax.conformance.components import find_components

    cases = [
        pytest.param(_make_test(name, component, index == 0), id=f"{component.name.rpartition(':')[2]}-{name}")
        for marker in markers
        for wanted in marker.args
        for component in find_components(wanted, marker.kwargs)
        for index, name in enumerate(checks_for(component))
    ]
    metafunc.parametrize(ARGUMENT, cases)


def _make_test(name: str, component: Any, is_first: bool) -> Callable[[], str]:
    """Return a test function that runs one check, returns its measurement, and fails if the check fails.

    The first check of a component clears the compiled programs of earlier components, since a process can map only a
    limited number.
    """

    def conformance_check() -> str:
        import jax

        from rustgpt_jax.conformance.checks import run_check

        if is_first:
            jax.clear_caches()
        outcome = run_check(name, component)
        if not outcome.is_ok:
            pytest.fail(outcome.note, pytrace=False)
        return outcome.note

    return conformance_check
