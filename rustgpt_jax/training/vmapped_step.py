"""Many runs of one structure in one program: their states, batches and numbers stacked along a first axis P.

exact   one run after another inside the program (`lax.map`): the bits of each run alone
fused   all runs at once (`vmap`): fastest where one run leaves the device idle; sums are taken in another order
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rustgpt_jax.config.schema import Structure
from rustgpt_jax.data.pipeline import Batch
from rustgpt_jax.training.train_step import Metrics, Numbers, State, train_steps


class StepArgs(NamedTuple):
    """What each run of a population is to do in a call: `count` steps, of which 0 leave its state untouched."""

    batches: Batch
    count: Any
    numbers: Numbers
    first_step: Any


def exact(structure: Structure, states_P: State, orders_P: StepArgs) -> tuple[State, Metrics]:
    """Each run's steps as `train_steps` does them, one run after another."""
    return jax.lax.map(lambda run: train_steps(structure, run[0], *run[1]), (states_P, orders_P))


def fused(structure: Structure, states_P: State, orders_P: StepArgs) -> tuple[State, Metrics]:
    """The steps of all runs at once. All counts that are not 0 must be equal."""
    count, structure = jnp.max(orders_P.count), vmappable(structure)

    def steps(state: State, orders: StepArgs) -> tuple[State, Metrics]:
        after, metrics = train_steps(structure, state, orders.batches, count, orders.numbers, orders.first_step)
        is_asked = orders.count > 0
        return jax.tree.map(partial(jnp.where, is_asked), after, state), metrics

    return jax.vmap(steps)(states_P, orders_P)


MODES: dict[str, Callable[[Structure, State, StepArgs], tuple[State, Metrics]]] = {"exact": exact, "fused": fused}


def vmappable(structure: Structure) -> Structure:
    """A structure whose steps can be made of many runs at once: libraries' attention kernels cannot."""
    if structure.model.attention_kernel != "auto":
        return structure
    return replace(structure, model=replace(structure.model, attention_kernel="portable"))


def population_steps(mode: str, structure: Structure, states_P: State, orders_P: StepArgs) -> tuple[State, Metrics]:
    """Some steps of every run of a population, in one of MODES; metrics are P x slots."""
    return MODES[mode](structure, states_P, orders_P)


def member(tree_P: Any, index: jax.Array) -> Any:
    """The arrays of one run out of those of a population."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), tree_P)


def put(tree_P: Any, tree: Any, index: jax.Array) -> Any:
    """The arrays of a population with those of one run replaced."""
    return jax.tree.map(lambda leaf_P, leaf: leaf_P.at[index].set(leaf), tree_P, tree)


def stack(trees: Sequence[Any]) -> Any:
    """Trees of equal shapes as one tree with a first axis P, on the host: stacking compiles nothing."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *jax.device_get(list(trees)))


def stack_on_devices(trees: Sequence[Any]) -> Any:
    """As `stack`, of arrays that are on devices."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


compiled_stack = jax.jit(stack_on_devices)
compiled_population_steps = jax.jit(population_steps, static_argnums=(0, 1), donate_argnums=2)
compiled_member = jax.jit(member)
compiled_put = jax.jit(put, donate_argnums=0)
