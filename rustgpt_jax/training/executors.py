"""How runs are advanced: one alone, on all its devices, or many by one program. The loop is the same."""

import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Protocol

import jax
import numpy as np

from rustgpt_jax.sharding.sharding_plan import ShardingPlan
from rustgpt_jax.training.train_step import Metrics, State, compiled_train_steps, resident
from rustgpt_jax.training.trainer import Run
from rustgpt_jax.training.vmapped_step import (
    StepArgs,
    compiled_member,
    compiled_population_steps,
    compiled_put,
    compiled_stack,
    stack,
)
from rustgpt_jax.workdir.program_fingerprint import Program as NamedProgram
from rustgpt_jax.workdir.program_fingerprint import observed


class Executor(Protocol):
    """Holds the states of some runs and advances them."""

    def advance(self, runs: Sequence[Run | None], count: int) -> None:
        """`count` steps of each run that is not None; these have one structure."""

    def state(self, index: int) -> State:
        """The state of a run."""

    def put(self, index: int, state: State) -> None:
        """Give a run another state."""


class SingleRunExecutor:
    """One run, each call a program of its own."""

    def __init__(self, run: Run) -> None:
        self._placement, self._structure = run.placement, run.program.structure
        self._state = resident(self._structure, self._placement.place(run.state()))

    def advance(self, runs: Sequence[Run | None], count: int) -> None:
        """`count` steps of the run."""
        (run,) = runs
        assert run is not None
        orders = _sent(run.orders(count), run.placement, run.batch_size)
        began = time.perf_counter()
        self._state, metrics = _call([run], compiled_train_steps, run.program.structure, self._state, *orders)
        run.advanced(count, lambda: jax.device_get(metrics), time.perf_counter() - began)

    def state(self, index: int) -> State:
        """The state of the run."""
        del index
        return self._state

    def put(self, index: int, state: State) -> None:
        """Give the run another state."""
        del index
        self._state = resident(self._structure, self._placement.place(state))


class PopulationExecutor:
    """Many runs in one program, in a mode of `population.MODES`. Lanes beyond the runs stay idle.

    A program is made for a number of lanes: with the same number, it serves fewer runs too.
    """

    def __init__(self, mode: str, runs: Sequence[Run], n_lanes: int) -> None:
        states = [run.state() for run in runs]
        self._mode, self._placement = mode, runs[0].placement
        self._states_P = self._placement.place(stack(states + [states[0]] * (n_lanes - len(states))))
        self._n_lanes = n_lanes

    def advance(self, runs: Sequence[Run | None], count: int) -> None:
        """`count` steps of each run that is not None, in one call."""
        orders = {index: run.orders(count) for index, run in enumerate(runs) if run is not None}
        structure = next(run.program.structure for run in runs if run is not None)
        idle = next(iter(orders.values()))._replace(count=np.int32(0))
        orders_P = _stacked([orders.get(index, idle) for index in range(self._n_lanes)])
        orders_P = _sent(orders_P, self._placement, orders_P.batches.tokens_BT.shape[-2])
        began = time.perf_counter()
        members = [run for run in runs if run is not None]
        self._states_P, metrics_P = _call(
            members, compiled_population_steps, self._mode, structure, self._states_P, orders_P
        )
        seconds = time.perf_counter() - began
        read = cache(lambda: jax.device_get(metrics_P))
        for index, run in enumerate(runs):
            if run is not None:
                run.advanced(count, _reader(read, index), seconds)

    def state(self, index: int) -> State:
        """The state of a run, apart from the others'."""
        return compiled_member(self._states_P, np.int32(index))

    def put(self, index: int, state: State) -> None:
        """Give a run another state."""
        # From the host: a state that is bound to a device would take the others there.
        self._states_P = compiled_put(self._states_P, jax.device_get(state), np.int32(index))


# The programs that this process has run, by what selects them.
_programs: dict[Any, NamedProgram] = {}


def _call(runs: Sequence[Run], function: Any, *arguments: Any) -> Any:
    """Call a compiled function; the journals of runs that call it for the first time are told what it is."""
    unnamed = [run for run in runs if run.is_unnamed]
    if not unnamed:
        return function(*arguments)
    leaves, tree = jax.tree.flatten(arguments)
    key = function, tree, tuple(map(_selects, leaves))
    if key in _programs:
        result = function(*arguments)
    else:
        result, _programs[key] = observed(function, *arguments)
    for run in unnamed:
        run.name_program(_programs[key])
    return result


def _selects(argument: Any) -> Any:
    """What of an argument selects the program: all of a structure; shape, type and place of an array."""
    if not hasattr(argument, "shape"):
        return argument
    return argument.shape, argument.dtype, getattr(argument, "sharding", None)


def _sent(orders: StepArgs, placement: ShardingPlan, batch_size: int) -> StepArgs:
    """Orders on their way to the devices, which nothing waits for. On a mesh, what is no batch goes with the call."""
    if placement.mesh is None:
        return jax.device_put(orders)
    return orders._replace(batches=placement.share(orders.batches, batch_size))


def _stacked(orders: list[StepArgs]) -> StepArgs:
    """Orders with a first axis P; batches are stacked where they are."""
    batches, *others = zip(*orders, strict=True)
    on_devices = any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(batches))
    return StepArgs(compiled_stack(batches) if on_devices else _on_host(batches), *map(_on_host, others))


def _on_host(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def _reader(read: Callable[[], Metrics], index: int) -> Callable[[], Metrics]:
    return lambda: jax.tree.map(lambda column: column[index], read())


def run_training_loop(
    runs: Sequence[Run],
    lanes: Executor,
    is_stopped: Callable[[], bool],
    between_calls: Callable[[], object] = lambda: None,
) -> None:
    """Advance runs to their ends, or until a stop is requested; then save them all.

    Args:
        runs: The runs.
        lanes: The states of the runs.
        is_stopped: Whether a stop is requested; called between calls and between the batches of an evaluation.
        between_calls: Called before each call and after the last one.
    """
    for index, resumed in enumerate(runs):
        if resumed.owes_evaluation:
            resumed.record(lanes.state(index), is_stopped)
    while True:
        between_calls()
        if is_stopped() or all(run.is_over for run in runs):
            break
        structure = next(run.program.structure for run in runs if not run.is_over)
        turn = [None if run.is_over or run.program.structure != structure else run for run in runs]
        count = min(run.steps_to_event() for run in turn if run)
        lanes.advance(turn, count)
        for index, run in enumerate(turn):
            if run and run.has_event:
                run.record(lanes.state(index), is_stopped)
            if run and run.needs_rewind:
                lanes.put(index, run.rewind())
    for index, run in enumerate(runs):
        if not run.is_over:
            run.stop(lanes.state(index))
