"""The table of checks, with the usual causes of failures, and the `check` command that runs them."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rustgpt_jax.conformance import masking_checks, non_model_checks, numerics_checks, transform_checks
from rustgpt_jax.conformance.components import MODEL_KINDS, Component, Scope, find_components
from rustgpt_jax.conformance.fixtures import CheckFailure, check_settings, format_exception
from rustgpt_jax.errors import UserError, suggest_names
from rustgpt_jax.model.mixers import has_cache
from rustgpt_jax.sharding.hardware_specs import use_cpu_devices


@dataclass(frozen=True)
class Check:
    """A function that checks a component, the kinds of components it applies to, and the usual cause of a failure.

    The function returns a note on what it measured, or raises CheckFailure.
    """

    function: Callable[[Component], str]
    kinds: Sequence[str]
    cause: str


# The usual cause of a failure of each check, by the kinds of components that it applies to.
_CAUSES: dict[Sequence[str], dict[Callable[[Component], str], str]] = {
    MODEL_KINDS: {
        numerics_checks.shapes: "A result is not cast back to the dtype of the input, or a shape is taken from the "
        "input instead of the config.",
        numerics_checks.finite: "An exponential without subtracting the maximum, a division without an epsilon, or a "
        "root whose derivative at 0 is infinite (a `where` after the root does not help its gradient: put one before "
        "it).",
        numerics_checks.precision: "A softmax, a norm or a state that is computed in the dtype of the activations; "
        "cast to float32 first.",
        numerics_checks.gradients: "A stop_gradient, a wrong custom derivative, or values that are cast to float32 on "
        "the way (use `matmul.to_float32`, which leaves float64 as it is).",
        masking_checks.causality: "A mask that is off by one, a convolution padded on both sides, or a mean, norm or "
        "sort over the tokens.",
        masking_checks.isolation: "inputs.segments_BT is not used: a mask without documents, a state or a convolution "
        "that continues from one document into the next, positions that are counted within the row, or statistics "
        "over the batch.",
        masking_checks.rows: "The result depends on the index of a row, the batch size, the first row, or the length "
        "of the rows.",
        masking_checks.padding: "Tokens of segment 0 take part in a sum, a mean or a state, or all of a softmax is "
        "masked.",
        masking_checks.cache: "A token is written to the wrong slot, the new tokens do not see the cached ones (or see "
        "empty slots), positions restart at 0, or padding is written to the cache.",
        masking_checks.prefill: "Prompts of some lengths take another code path, a ring buffer wraps wrongly, or a "
        "position leaves the range of its dtype.",
        masking_checks.heads: "Query heads are mapped to key-value heads correctly for only one number of the latter.",
        transform_checks.dropout: "inputs.dropout_key is None in evaluation, when nothing must be dropped or scaled.",
        numerics_checks.drift: "A state, a decay or a position in bfloat16, or a decay computed as a^t / a^s instead "
        "of a^(t - s).",
        transform_checks.layers: "The component keeps Python state between calls, such as a counter of layers.",
        transform_checks.remat: "The component is not a pure function: it keeps Python state, or draws randomness "
        "without a key.",
        transform_checks.vmap: "Python code needs the value of a traced array (`if`, `float`, `int`), or a shape "
        "depends on it.",
        transform_checks.devices: "Something is computed over the batch, or depends on its size or on the devices.",
        transform_checks.parameters: "A parameter is not used, or has no effect.",
        transform_checks.flops: "Work that is not a matmul, such as a product written as a broadcast and a sum, or a "
        "custom kernel.",
        numerics_checks.initial_scale: "The projection into the residual stream is not Linear(..., residual=True), or "
        "weights are not initialized with init_std.",
    },
    ("optimizers",): {
        non_model_checks.optimizer_update: "A state whose dtype is not that of the parameters, or a division by a norm "
        "that may be 0.",
        non_model_checks.optimizer_descent: "The sign of the update, or a learning rate that is not used.",
        non_model_checks.optimizer_traced: "Python code needs the value of a traced array (`if`, `float`), or a "
        "transformation needs a constant.",
    },
    ("schedules",): {
        non_model_checks.schedule_range: "A run that is shorter than its warmup, or a division by a number of steps "
        "that is 0.",
        non_model_checks.schedule_traced: "Python code needs the value of a traced array (`if`, `int`).",
    },
    ("samplers",): {
        non_model_checks.sampler_distribution: "-inf minus -inf, -inf times 0, ties with the last token that is kept, "
        "or a threshold that excludes everything.",
        non_model_checks.sampler_rows: "A sum, sort or maximum over all rows instead of within each row.",
    },
    ("tokenizers",): {
        non_model_checks.tokenizer_round_trip: "A normalizer that changes text, a prefix space, or characters without "
        "a byte fallback.",
        non_model_checks.tokenizer_determinism: "Ties are broken by the order of a set or of a dictionary of counts.",
    },
    ("corpora",): {
        non_model_checks.corpus_documents: "The result depends on the order of files in a folder, the time, or "
        "unseeded randomness.",
    },
    ("launchers",): {
        non_model_checks.launcher_interface: "Other argument names; see `LAUNCHERS` in sweeps/sweep.py.",
    },
}
CHECKS: dict[str, Check] = {
    function.__name__: Check(function, kinds, cause)
    for kinds, causes in _CAUSES.items()
    for function, cause in causes.items()
}


def checks_for(component: Component, only: Sequence[str] = ()) -> dict[str, Check]:
    """Return the checks that apply to a component, restricted to the names in `only` if it is not empty.

    `prefill` compares ways to fill a cache, so it does not apply to a mixer without one.
    """
    names = [name for name, check in CHECKS.items() if component.kind in check.kinds and (not only or name in only)]
    if component.model is not None and not all(has_cache(mixer) for mixer in component.model.mixers):
        names = [name for name in names if name != "prefill"]
    return {name: CHECKS[name] for name in names}


@dataclass(frozen=True)
class Outcome:
    """The result of a check, with a note on what was measured or is wrong, and the seconds that it took."""

    component: Component
    check: str
    is_ok: bool
    note: str
    seconds: float


def run_check(name: str, component: Component) -> Outcome:
    """Run a check; a failure or an exception in the component is described in the note of the outcome.

    Raises:
        UserError: The component's config is invalid.
    """
    began = time.perf_counter()
    is_ok = False
    try:
        with check_settings():
            note = CHECKS[name].function(component)
        is_ok = True
    except CheckFailure as failure:
        note = f"{failure}. Usual cause: {CHECKS[name].cause}"
    except UserError:
        raise
    except Exception as error:
        # A ConcretizationTypeError has the same usual cause in every check.
        is_concretization = isinstance(error, jax.errors.ConcretizationTypeError)
        note = format_exception(error) + (f". Usual cause: {CHECKS['vmap'].cause}" if is_concretization else "")
    return Outcome(component, name, is_ok, note, time.perf_counter() - began)


def run_checks(components: Sequence[Component], only: Sequence[str], console: Console) -> list[Outcome]:
    """Run all checks of all components and print each outcome. Components with the same model share outcomes."""
    known: dict[Any, Outcome] = {}
    outcomes = []
    width = max(len(component.title) for component in components) + 2 if len(components) > 1 else 0
    for component in components:
        # A process can map only a limited number of compiled programs, and those of earlier models are not needed.
        jax.clear_caches()
        for name in checks_for(component, only):
            # A check of a model component depends on its model only.
            key = (name, component.model or component.title)
            if key in known:
                first = known[key]
                note = f"{first.note} (as {first.component.title})"
                outcome = dataclasses.replace(first, component=component, note=note, seconds=0.0)
            else:
                outcome = known[key] = run_check(name, component)
            outcomes.append(outcome)
            line = Text(f"{component.title if width else '':{width}}{name:21} ")
            line.append("ok    " if outcome.is_ok else "FAILED", "green" if outcome.is_ok else "bold red")
            line.append(f" {outcome.seconds:5.1f} s  {outcome.note}")
            console.print(line)
    return outcomes


def make_table(outcomes: Sequence[Outcome]) -> Table:
    """Return a table of the checks of one component, or a summary of several components that lists failed checks."""
    components = list(dict.fromkeys(outcome.component for outcome in outcomes))
    if len(components) == 1:
        table = Table("check", "", "measured, or what is wrong", title=components[0].title, title_justify="left")
        for outcome in outcomes:
            table.add_row(outcome.check, _format_status(outcome.is_ok), Text(outcome.note))
        return table
    table = Table("component", "checks", "", "failed", "seconds")
    for component in components:
        own = [outcome for outcome in outcomes if outcome.component is component]
        failed = [outcome.check for outcome in own if not outcome.is_ok]
        seconds = f"{sum(outcome.seconds for outcome in own):.1f}"
        table.add_row(component.title, str(len(own)), _format_status(not failed), Text(", ".join(failed)), seconds)
    return table


def _format_status(is_ok: bool) -> Text:
    return Text("ok", "green") if is_ok else Text("FAILED", "bold red")


def check_components(
    names: Sequence[str],
    console: Console,
    only: Sequence[str] = (),
    changes: Mapping[str, Any] | None = None,
    is_exhaustive: bool = False,
) -> list[Outcome]:
    """Run the `check` command: check components, print the results, and return them.

    Args:
        names: The components to check, as named by the user; all components if empty.
        console: The console to print to.
        only: Names of the checks to run; all checks if empty.
        changes: Overrides for the small model that components are checked in, such as `extra` or `model.extra`.
        is_exhaustive: True to cover all lengths, batch sizes, dtypes and modes, which takes minutes per component.

    Raises:
        UserError: A name is unknown.
    """
    for name in only:
        if name not in CHECKS:
            raise UserError(f"check: unknown check {name!r}.{suggest_names(name, CHECKS)}")
    # If JAX has already started, this fails, and the check of eight devices runs in a child process.
    with contextlib.suppress(RuntimeError):
        use_cpu_devices(transform_checks.DEVICES)
    fields = {path.removeprefix("model."): value for path, value in (changes or {}).items()}
    components = [component for name in names or (None,) for component in find_components(name, fields)]
    scope = Scope.EXHAUSTIVE if is_exhaustive else Scope.QUICK
    components = [dataclasses.replace(each, scope=scope) for each in components if checks_for(each, only)]
    if not components:
        raise UserError(f"check: {', '.join(only)} does not apply to {', '.join(names)}.")
    outcomes = run_checks(components, only, console)
    n_failed = sum(not outcome.is_ok for outcome in outcomes)
    console.print(make_table(outcomes))
    console.print(f"{len(outcomes) - n_failed} checks passed, {n_failed} failed", highlight=False)
    return outcomes
