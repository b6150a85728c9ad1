"""The training loop, and the executors that call the compiled train step for one run or for a population."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from rustgpt_jax.training.train_step import (
    Metrics,
    StepArgs,
    TrainState,
    compiled_population_steps,
    compiled_train_steps,
    offload_opt_state,
    stack,
)
from rustgpt_jax.workdir.environment import Program, call_and_fingerprint

if TYPE_CHECKING:
    from rustgpt_jax.training.trainer import Trainer

# Waits for the metrics of a run, by index, and returns them.
ReadMetrics = Callable[[int], Metrics]


def run_training_loop(
    trainers: "Sequence[Trainer]",
    executor: "SingleRunExecutor | PopulationExecutor",
    is_stop_requested: Callable[[], bool],
    before_call: Callable[[], object] = lambda: None,
) -> None:
    """Train runs until they are over or a stop is requested, then save them.

    Args:
        trainers: The runs, all on the same devices.
        executor: The states of the runs.
        is_stop_requested: Called between calls of the program and between the batches of an evaluation.
        before_call: Called before each call of the compiled program, and after the last one.
    """
    for index, trainer in enumerate(trainers):
        if trainer.has_pending_evaluation:
            _run_hooks(trainer, executor.get_state(index), is_stop_requested)
    while True:
        before_call()
        unfinished = {index: trainer for index, trainer in enumerate(trainers) if not trainer.is_finished}
        if is_stop_requested() or not unfinished:
            break
        # Advance the runs that need the same program as the first one.
        static = next(iter(unfinished.values())).program.static
        active = {index: trainer for index, trainer in unfinished.items() if trainer.program.static == static}
        n_steps = min(trainer.steps_to_next_hook() for trainer in active.values())
        began = time.perf_counter()
        read_metrics = executor.run_steps(active, n_steps)
        seconds = time.perf_counter() - began
        for index, trainer in active.items():
            trainer.on_steps_dispatched(n_steps, partial(read_metrics, index), seconds)
        for index, trainer in active.items():
            if trainer.is_hook_due:
                _run_hooks(trainer, executor.get_state(index), is_stop_requested)
            if trainer.needs_rewind:
                executor.set_state(index, trainer.rewind())
    for index, trainer in enumerate(trainers):
        if not trainer.is_finished:
            trainer.stop(executor.get_state(index))


def _run_hooks(trainer: "Trainer", state: TrainState, is_stop_requested: Callable[[], bool]) -> None:
    context = trainer.make_hook_context(state, is_stop_requested)
    for hook in trainer.hooks:
        if not hook(context):
            break
    trainer.on_hooks_done(context)


class SingleRunExecutor:
    """An executor that advances one run, on all devices of its mesh."""

    def __init__(self, trainer: "Trainer") -> None:
        self._plan, self._static = trainer.plan, trainer.program.static
        self._state: TrainState
        self.set_state(0, trainer.state())

    def run_steps(self, active: "Mapping[int, Trainer]", n_steps: int) -> ReadMetrics:
        """Start `n_steps` steps of the run."""
        (trainer,) = active.values()
        static, hparams, first_step = trainer.program
        args = StepArgs(trainer.next_batches(n_steps), np.int32(n_steps), hparams, first_step)
        if self._plan.mesh is None:
            args = jax.device_put(args)
        else:
            args = args._replace(batches=self._plan.shard_batch(args.batches, static.training.batch_size))
        self._state, metrics = _call_and_record([trainer], compiled_train_steps, static, self._state, *args)
        return lambda _: jax.device_get(metrics)

    def get_state(self, index: int) -> TrainState:
        """Return the state of the run."""
        del index
        return self._state

    def set_state(self, index: int, state: TrainState) -> None:
        """Replace the state of the run."""
        del index
        self._state = offload_opt_state(self._static, self._plan.shard_state(state))


class PopulationExecutor:
    """An executor that advances many runs with one program, in a mode of `train_step.population_steps`.

    A program is compiled for a number of slots, one per run. If there are fewer runs, the other slots are idle.
    """

    def __init__(self, mode: str, trainers: "Sequence[Trainer]", n_slots: int) -> None:
        states = [trainer.state() for trainer in trainers]
        self._mode, self._plan, self._n_slots = mode, trainers[0].plan, n_slots
        self._states_P = self._plan.shard_state(stack(states + [states[0]] * (n_slots - len(states))))

    def run_steps(self, active: "Mapping[int, Trainer]", n_steps: int) -> ReadMetrics:
        """Start `n_steps` steps of each active run, all with the same static config. The other slots do nothing."""
        args = {
            index: StepArgs(trainer.next_batches(n_steps), np.int32(n_steps), *trainer.program[1:])
            for index, trainer in active.items()
        }
        static = next(iter(active.values())).program.static
        idle = next(iter(args.values()))._replace(count=np.int32(0))
        batches, *scalars = zip(*(args.get(index, idle) for index in range(self._n_slots)), strict=True)
        # Stack batches where they are, on the devices or the host.
        are_on_devices = any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(batches))
        batches_P = _stack_on_devices(batches) if are_on_devices else stack(batches)
        args_P = StepArgs(batches_P, *map(stack, scalars))
        if self._plan.mesh is None:
            args_P = jax.device_put(args_P)
        else:
            args_P = args_P._replace(batches=self._plan.shard_batch(batches_P, static.training.batch_size))
        self._states_P, metrics_P = _call_and_record(
            active.values(), compiled_population_steps, self._mode, static, self._states_P, args_P
        )
        read = cache(lambda: jax.device_get(metrics_P))
        return lambda index: jax.tree.map(lambda column: column[index], read())

    def get_state(self, index: int) -> TrainState:
        """Return the state of one run, sliced from the stacked states."""
        return _get_member(self._states_P, np.int32(index))

    def set_state(self, index: int, state: TrainState) -> None:
        """Replace the state of a run."""
        # From the host: a state committed to one device would move the others there.
        self._states_P = _set_member(self._states_P, jax.device_get(state), np.int32(index))


@jax.jit
def _stack_on_devices(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@jax.jit
def _get_member(tree_P: Any, index: jax.Array) -> Any:
    return jax.tree.map(lambda leaf_P: jax.lax.dynamic_index_in_dim(leaf_P, index, keepdims=False), tree_P)


@partial(jax.jit, donate_argnums=0)
def _set_member(tree_P: Any, tree: Any, index: jax.Array) -> Any:
    return jax.tree.map(lambda leaf_P, leaf: leaf_P.at[index].set(leaf), tree_P, tree)


# The compiled programs that this process has called, by the keys of their arguments.
_programs: dict[Any, Program] = {}


def _call_and_record(trainers: "Iterable[Trainer]", function: Any, *arguments: Any) -> Any:
    """Call a compiled function, and record its program in the event log of each run that has not recorded it."""
    new = [trainer for trainer in trainers if not trainer.is_program_recorded]
    if not new:
        return function(*arguments)
    leaves, tree = jax.tree.flatten(arguments)
    key = function, tree, tuple(map(_cache_key, leaves))
    if key in _programs:
        result = function(*arguments)
    else:
        result, _programs[key] = call_and_fingerprint(function, *arguments)
    for trainer in new:
        trainer.record_program(_programs[key])
    return result


def _cache_key(argument: Any) -> Any:
    """Return the shape, dtype and sharding of an array; any other argument is its own key."""
    if not hasattr(argument, "shape"):
        return argument
    return argument.shape, argument.dtype, getattr(argument, "sharding", None)
