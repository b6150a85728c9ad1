"""Executors hold the states of one run, or of a population, and call the compiled program that advances them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
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

ReadMetrics = Callable[[int], Metrics]


class Executor(Protocol):
    """Holds the states of runs and advances them by calls of a compiled program."""

    def run_steps(self, active: Mapping[int, Trainer], n_steps: int) -> ReadMetrics:
        """Start `n_steps` steps of each active run, by index. All of them have the same static config.

        Returns:
            A function that waits for the metrics of a run, by index, and returns them.
        """

    def get_state(self, index: int) -> State:
        """Return the state of a run."""

    def set_state(self, index: int, state: State) -> None:
        """Replace the state of a run."""


class SingleRunExecutor:
    """Advances one run, on all devices of its mesh."""

    def __init__(self, trainer: Trainer) -> None:
        self._plan, self._static = trainer.plan, trainer.program.static
        self._state: State
        self.set_state(0, trainer.state())

    def run_steps(self, active: Mapping[int, Trainer], n_steps: int) -> ReadMetrics:
        """Start `n_steps` steps of the run."""
        (trainer,) = active.values()
        args = _device_put(trainer.next_call_args(n_steps), self._plan, trainer.batch_size)
        self._state, metrics = _call([trainer], compiled_train_steps, trainer.program.static, self._state, *args)
        return lambda _: jax.device_get(metrics)

    def get_state(self, index: int) -> State:
        """Return the state of the run."""
        del index
        return self._state

    def set_state(self, index: int, state: State) -> None:
        """Replace the state of the run."""
        del index
        self._state = offload_opt_state(self._static, self._plan.shard_state(state))


class PopulationExecutor:
    """Advances many runs with one program, in one of `train_step.MODES`.

    A program is compiled for a number of slots; it serves fewer runs too, with idle slots.
    """

    def __init__(self, mode: str, trainers: Sequence[Trainer], n_slots: int) -> None:
        states = [trainer.state() for trainer in trainers]
        self._mode, self._plan, self._n_slots = mode, trainers[0].plan, n_slots
        self._states_P = self._plan.shard_state(stack(states + [states[0]] * (n_slots - len(states))))

    def run_steps(self, active: Mapping[int, Trainer], n_steps: int) -> ReadMetrics:
        """Start `n_steps` steps of each active run. The other slots do nothing."""
        args = {index: trainer.next_call_args(n_steps) for index, trainer in active.items()}
        static = next(iter(active.values())).program.static
        idle = next(iter(args.values()))._replace(count=np.int32(0))
        args_P = _stack_args([args.get(index, idle) for index in range(self._n_slots)])
        args_P = _device_put(args_P, self._plan, args_P.batches.tokens_BT.shape[-2])
        self._states_P, metrics_P = _call(
            active.values(), compiled_population_steps, self._mode, static, self._states_P, args_P
        )
        read = cache(lambda: jax.device_get(metrics_P))
        return lambda index: jax.tree.map(lambda column: column[index], read())

    def get_state(self, index: int) -> State:
        """Return the state of a run, sliced out of those of the population."""
        return compiled_get_member(self._states_P, np.int32(index))

    def set_state(self, index: int, state: State) -> None:
        """Replace the state of a run."""
        # From the host: a state committed to one device would move the others there.
        self._states_P = compiled_set_member(self._states_P, jax.device_get(state), np.int32(index))


# The compiled programs that this process has called, by `_cache_key` of their arguments.
_programs: dict[Any, NamedProgram] = {}


def _call(trainers: Iterable[Trainer], function: Any, *arguments: Any) -> Any:
    """Call a compiled function, and record the program in the journal of each run that calls it for the first time."""
    unnamed = [trainer for trainer in trainers if trainer.is_unnamed]
    if not unnamed:
        return function(*arguments)
    leaves, tree = jax.tree.flatten(arguments)
    key = function, tree, tuple(map(_cache_key, leaves))
    if key in _programs:
        result = function(*arguments)
    else:
        result, _programs[key] = call_and_fingerprint(function, *arguments)
    for trainer in unnamed:
        trainer.name_program(_programs[key])
    return result


def _cache_key(argument: Any) -> Any:
    """Return what selects the program of an argument: shape, dtype and sharding of an array; anything else as it is."""
    if not hasattr(argument, "shape"):
        return argument
    return argument.shape, argument.dtype, getattr(argument, "sharding", None)


def _device_put(args: StepArgs, plan: ShardingPlan, batch_size: int) -> StepArgs:
    """Start the transfer to the devices. On a mesh, only batches are transferred before the call."""
    if plan.mesh is None:
        return jax.device_put(args)
    return args._replace(batches=plan.shard_batch(args.batches, batch_size))


def _stack_args(args: list[StepArgs]) -> StepArgs:
    """Stack arguments along a new first axis P. Batches are stacked where they are, on the devices or the host."""
    batches, *others = zip(*args, strict=True)
    on_devices = any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(batches))
    return StepArgs(compiled_stack(batches) if on_devices else _stack_on_host(batches), *map(_stack_on_host, others))


def _stack_on_host(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)
