"""How runs are advanced: one alone, on all its devices, or many by one program. The loop is the same."""

import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Protocol

import jax
import numpy as np

from rustgpt_jax.sharding.sharding_plan import ShardingPlan
from rustgpt_jax.training.train_step import (
    Metrics,
    State,
    StepArgs,
    compiled_get_member,
    compiled_population_steps,
    compiled_set_member,
    compiled_stack,
    compiled_train_steps,
    offload_opt_state,
    stack,
)
from rustgpt_jax.training.trainer import Trainer
from rustgpt_jax.workdir.program_fingerprint import Program as NamedProgram
from rustgpt_jax.workdir.program_fingerprint import call_and_fingerprint


class Executor(Protocol):
    """Holds the states of some runs and advances them."""

    def advance(self, runs: Sequence[Trainer | None], count: int) -> None:
        """`count` steps of each run that is not None; these have one structure."""

    def state(self, index: int) -> State:
        """The state of a run."""

    def put(self, index: int, state: State) -> None:
        """Give a run another state."""


class SingleRunExecutor:
    """One run, each call a program of its own."""

    def __init__(self, run: Trainer) -> None:
        self._plan, self._static = run.plan, run.program.static
        self._state = offload_opt_state(self._static, self._plan.shard_state(run.state()))

    def advance(self, runs: Sequence[Trainer | None], count: int) -> None:
        """`count` steps of the run."""
        (run,) = runs
        assert run is not None
        next_call_args = _device_put(run.next_call_args(count), run.plan, run.batch_size)
        began = time.perf_counter()
        self._state, metrics = _call([run], compiled_train_steps, run.program.static, self._state, *next_call_args)
        run.on_steps_done(count, lambda: jax.device_get(metrics), time.perf_counter() - began)

    def state(self, index: int) -> State:
        """The state of the run."""
        del index
        return self._state

    def put(self, index: int, state: State) -> None:
        """Give the run another state."""
        del index
        self._state = offload_opt_state(self._static, self._plan.shard_state(state))


class PopulationExecutor:
    """Many runs in one program, in a mode of `population.MODES`. Lanes beyond the runs stay idle.

    A program is made for a number of lanes: with the same number, it serves fewer runs too.
    """

    def __init__(self, mode: str, runs: Sequence[Trainer], n_slots: int) -> None:
        states = [run.state() for run in runs]
        self._mode, self._plan = mode, runs[0].plan
        self._states_P = self._plan.shard_state(stack(states + [states[0]] * (n_slots - len(states))))
        self._n_lanes = n_slots

    def advance(self, runs: Sequence[Trainer | None], count: int) -> None:
        """`count` steps of each run that is not None, in one call."""
        next_call_args = {index: run.next_call_args(count) for index, run in enumerate(runs) if run is not None}
        static = next(run.program.static for run in runs if run is not None)
        idle = next(iter(next_call_args.values()))._replace(count=np.int32(0))
        args_P = _stack_args([next_call_args.get(index, idle) for index in range(self._n_lanes)])
        args_P = _device_put(args_P, self._plan, args_P.batches.tokens_BT.shape[-2])
        began = time.perf_counter()
        members = [run for run in runs if run is not None]
        self._states_P, metrics_P = _call(
            members, compiled_population_steps, self._mode, static, self._states_P, args_P
        )
        seconds = time.perf_counter() - began
        read = cache(lambda: jax.device_get(metrics_P))
        for index, run in enumerate(runs):
            if run is not None:
                run.on_steps_done(count, _reader(read, index), seconds)

    def state(self, index: int) -> State:
        """The state of a run, apart from the others'."""
        return compiled_get_member(self._states_P, np.int32(index))

    def put(self, index: int, state: State) -> None:
        """Give a run another state."""
        # From the host: a state that is bound to a device would take the others there.
        self._states_P = compiled_set_member(self._states_P, jax.device_get(state), np.int32(index))


# The programs that this process has run, by what selects them.
_programs: dict[Any, NamedProgram] = {}


def _call(runs: Sequence[Trainer], function: Any, *arguments: Any) -> Any:
    """Call a compiled function; the journals of runs that call it for the first time are told what it is."""
    unnamed = [run for run in runs if run.is_unnamed]
    if not unnamed:
        return function(*arguments)
    leaves, tree = jax.tree.flatten(arguments)
    key = function, tree, tuple(map(_cache_key, leaves))
    if key in _programs:
        result = function(*arguments)
    else:
        result, _programs[key] = call_and_fingerprint(function, *arguments)
    for run in unnamed:
        run.name_program(_programs[key])
    return result


def _cache_key(argument: Any) -> Any:
    """What of an argument selects the program: all of a structure; shape, type and place of an array."""
    if not hasattr(argument, "shape"):
        return argument
    return argument.shape, argument.dtype, getattr(argument, "sharding", None)


def _device_put(next_call_args: StepArgs, plan: ShardingPlan, batch_size: int) -> StepArgs:
    """Orders on their way to the devices, which nothing waits for. On a mesh, what is no batch goes with the call."""
    if plan.mesh is None:
        return jax.device_put(next_call_args)
    return next_call_args._replace(batches=plan.shard_batch(next_call_args.batches, batch_size))


def _stack_args(next_call_args: list[StepArgs]) -> StepArgs:
    """Orders with a first axis P; batches are stacked where they are."""
    batches, *others = zip(*next_call_args, strict=True)
    on_devices = any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(batches))
    return StepArgs(compiled_stack(batches) if on_devices else _stack_on_host(batches), *map(_stack_on_host, others))


def _stack_on_host(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def _reader(read: Callable[[], Metrics], index: int) -> Callable[[], Metrics]:
    return lambda: jax.tree.map(lambda column: column[index], read())


def run_training_loop(
    runs: Sequence[Trainer],
    executor: Executor,
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
            resumed.record(executor.state(index), is_stopped)
    while True:
        between_calls()
        if is_stopped() or all(run.is_over for run in runs):
            break
        static = next(run.program.static for run in runs if not run.is_over)
        active = [None if run.is_over or run.program.static != static else run for run in runs]
        count = min(run.steps_to_event() for run in active if run)
        executor.advance(active, count)
        for index, run in enumerate(active):
            if run and run.has_event:
                run.record(executor.state(index), is_stopped)
            if run and run.needs_rewind:
                executor.put(index, run.rewind())
    for index, run in enumerate(runs):
        if not run.is_over:
            run.stop(executor.state(index))
