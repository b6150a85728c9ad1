"""Optimizers: each against NumPy in float64, with traced hyperparameters, and muon layer by layer."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import small_config

from rustgpt_jax.config.schema import OptimizerConfig
from rustgpt_jax.errors import UserError
from rustgpt_jax.model.flops import parameter_shapes
from rustgpt_jax.model.mlps import FEEDFORWARDS
from rustgpt_jax.pytrees import flatten_paths
from rustgpt_jax.training.optimizers import (
    EVAL_PARAMS,
    OPTIMIZERS,
    clip_by_norm,
    get_eval_params,
    make_optimizer,
    muon_partition,
)

pytestmark = pytest.mark.usefixtures("quick_codegen")

Params = dict[str, Any]

NUMBERS = ("learning_rate", "b1", "b2", "eps", "momentum", "muon_learning_rate", "weight_decay")
LAYERS = 2
KERNELS = {"up": (4, 10), "down": (10, 4)}


def knobs(**changes: Any) -> OptimizerConfig:
    return dataclasses.replace(small_config().optimizer, **changes)


def random_like(tree: Any, seed: int) -> Any:
    """Return a tree of the same shapes with normally distributed values."""
    leaves, structure = jax.tree.flatten(tree)
    generator = np.random.default_rng(seed)
    return structure.unflatten([generator.normal(size=leaf.shape).astype(np.float32) for leaf in leaves])


def parameters(seed: int = 0) -> Params:
    """Return parameters with the names and axes of those of a model."""
    block = {
        name: {"kernel": np.empty((LAYERS, *shape)), "bias": np.empty((LAYERS, 4))} for name, shape in KERNELS.items()
    }
    shapes = {
        "embedding": {"table": np.empty((7, 4))},
        "blocks": {"0": {"mixer": block, "mixer_norm": {"scale": np.empty((LAYERS, 4))}}},
        "head": {"kernel": np.empty((4, 7))},
    }
    return random_like(shapes, seed)


def run(config: OptimizerConfig, params: Params, steps: int, rate: Any = 1.0) -> Params:
    """Return the parameters after some steps with gradients that depend only on the step."""

    @jax.jit
    def step(gradients: Params, state: Any, params: Params, rate: Any) -> tuple[Params, Any]:
        updates, state = make_optimizer(config, rate).update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = make_optimizer(config).init(params)
    for index in range(steps):
        params, state = step(random_like(params, 100 + index), state, params, rate)
    return params


def assert_close(left: Any, right: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), left, right)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_step_lowers_a_convex_loss(name: str) -> None:
    config = knobs(name=name, learning_rate=1e-3, muon_learning_rate=1e-3, weight_decay=0.0)
    target, params = parameters(1), jax.tree.map(np.zeros_like, parameters())

    def loss(params: Params) -> jax.Array:
        return sum(jnp.sum((a - b) ** 2) for a, b in zip(*map(jax.tree.leaves, (params, target)), strict=True))

    @jax.jit
    def step(state: Any, params: Params) -> tuple[Any, Params, jax.Array]:
        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = make_optimizer(config).update(gradients, state, params)
        return state, optax.apply_updates(params, updates), value

    state, losses = make_optimizer(config).init(params), []
    for _ in range(10):
        state, params, value = step(state, params)
        losses.append(float(value))
    assert np.all(np.diff(losses) < 0), losses


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_traced_hyperparameters_match_constants_with_one_compilation(name: str) -> None:
    params, gradients = parameters(), parameters(1)

    @jax.jit
    def traced(numbers: dict[str, jax.Array], rate: jax.Array) -> Params:
        config = dataclasses.replace(knobs(name=name), **numbers)
        return make_optimizer(config, rate).update(gradients, make_optimizer(config).init(params), params)[0]

    other = knobs(name=name, learning_rate=0.3, b1=0.5, b2=0.6, momentum=0.7, weight_decay=0.2, eps=0.1)
    whole = traced(numbers_of(knobs(name=name)), np.float32(1.0))
    # The multiplier of the schedule scales the whole update.
    assert_close(traced(numbers_of(knobs(name=name)), np.float32(0.25)), jax.tree.map(lambda leaf: 0.25 * leaf, whole))
    constants = jax.jit(
        lambda: make_optimizer(other, 0.5).update(gradients, make_optimizer(other).init(params), params)[0]
    )
    assert_close(traced(numbers_of(other), np.float32(0.5)), constants())
    assert traced._cache_size() == 1


def numbers_of(config: OptimizerConfig) -> dict[str, np.float32]:
    return {field: np.float32(getattr(config, field)) for field in NUMBERS}


# Oracles in float64.

Direction = Callable[[np.ndarray, np.ndarray], np.ndarray]


def adam_direction(config: OptimizerConfig) -> Callable[[np.ndarray], np.ndarray]:
    mean, square, count = 0.0, 0.0, 0

    def direction(gradient: np.ndarray) -> np.ndarray:
        nonlocal mean, square, count
        count += 1
        mean = config.b1 * mean + (1 - config.b1) * gradient
        square = config.b2 * square + (1 - config.b2) * gradient**2
        return mean / (1 - config.b1**count) / (np.sqrt(square / (1 - config.b2**count)) + config.eps)

    return direction


def adamw_oracle(config: OptimizerConfig, decay: float) -> Direction:
    direction = adam_direction(config)
    return lambda gradient, p: -config.learning_rate * (direction(gradient) + decay * p)


def adam_oracle(config: OptimizerConfig, decay: float) -> Direction:
    direction = adam_direction(config)
    return lambda gradient, p: -config.learning_rate * direction(gradient + decay * p)


def sgd_oracle(config: OptimizerConfig, decay: float) -> Direction:
    velocity = 0.0

    def update(gradient: np.ndarray, p: np.ndarray) -> np.ndarray:
        nonlocal velocity
        velocity = config.momentum * velocity + gradient + decay * p
        return -config.learning_rate * velocity

    return update


def lion_oracle(config: OptimizerConfig, decay: float) -> Direction:
    mean = 0.0

    def update(gradient: np.ndarray, p: np.ndarray) -> np.ndarray:
        nonlocal mean
        sign = np.sign(config.b1 * mean + (1 - config.b1) * gradient)
        mean = config.b2 * mean + (1 - config.b2) * gradient
        return -config.learning_rate * (sign + decay * p)

    return update


def muon_oracle(config: OptimizerConfig, decay: float) -> Direction:
    """Muon for one matrix of one layer, with Jordan's quintic iteration and Nesterov momentum."""
    mean, count = 0.0, 0

    def update(gradient: np.ndarray, p: np.ndarray) -> np.ndarray:
        nonlocal mean, count
        count += 1
        mean = config.momentum * mean + (1 - config.momentum) * gradient
        ahead = config.momentum * mean / (1 - config.momentum ** (count + 1))
        x = ahead + (1 - config.momentum) * gradient / (1 - config.momentum**count)
        x = x / np.linalg.norm(x)
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        return -config.muon_learning_rate * (max(1, x.shape[1] / x.shape[0]) ** 0.5 * x + decay * p)

    return update


class ScheduleFree:
    """The sequences x, y and z of schedule-free AdamW for one array."""

    def __init__(self, start: np.ndarray) -> None:
        self.x = self.y = self.z = start.astype(np.float64)
        self.square, self.rates = np.zeros(start.shape), list[float]()

    def step(self, config: OptimizerConfig, rate: float, decay: float, gradient: np.ndarray) -> None:
        """Take a step with a gradient at y and a learning rate."""
        self.rates.append(rate)
        count, weights = len(self.rates), np.maximum.accumulate(self.rates) ** 2
        self.square = config.b2 * self.square + (1 - config.b2) * gradient**2
        root = np.sqrt(self.square / (1 - config.b2**count))
        self.z = self.z - rate * (gradient / (root + config.eps) + decay * self.y)
        share = weights[-1] / weights.sum() if rate else 0.0
        self.x = (1 - share) * self.x + share * self.z
        self.y = (1 - config.b1) * self.z + config.b1 * self.x


def schedule_free_oracle(config: OptimizerConfig, decay: float) -> Direction:
    sequences: ScheduleFree | None = None

    def update(gradient: np.ndarray, p: np.ndarray) -> np.ndarray:
        nonlocal sequences
        sequences = sequences or ScheduleFree(p)
        sequences.step(config, config.learning_rate, decay, gradient)
        return sequences.y - p

    return update


ORACLES = {
    "adamw": adamw_oracle,
    "adam": adam_oracle,
    "sgd": sgd_oracle,
    "lion": lion_oracle,
    "muon": adamw_oracle,
    "schedule_free": schedule_free_oracle,
}


def apply_oracle(oracle: Direction, path: Any, start: np.ndarray, steps: int, layer: Any = ...) -> np.ndarray:
    """Return a parameter, or a layer of it, after the steps of `run`, by an oracle."""
    p = start[layer].astype(np.float64)
    for step in range(steps):
        gradients = random_like(parameters(), 100 + step)
        gradient = dict(leaves(gradients))[path][layer]
        p = p + oracle(gradient.astype(np.float64), p)
    return p


def leaves(tree: Any) -> Iterator[tuple[str, Any]]:
    yield from flatten_paths(tree).items()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_match_numpy_oracles(name: str) -> None:
    groups = (("norm|bias", 0.0), ("head", 0.5), (".*", 1.0))
    config = knobs(name=name, learning_rate=0.01, eps=0.1, weight_decay=0.2, weight_decay_groups=groups)
    after = dict(leaves(run(config, parameters(), 5)))
    for path, start in leaves(parameters()):
        decay = 0.0 if "norm" in path or "bias" in path else 0.1 if "head" in path else 0.2
        if name == "muon" and path.startswith("blocks") and path.endswith("kernel"):
            layers = [apply_oracle(muon_oracle(config, decay), path, start, 5, layer) for layer in range(LAYERS)]
            wanted = np.stack(layers)
        else:
            wanted = apply_oracle(ORACLES[name](config, decay), path, start, 5)
        np.testing.assert_allclose(after[path], wanted, rtol=1e-4, atol=2e-5, err_msg=path)


# Weight decay.


def decay_fractions(*groups: tuple[str, float], name: str = "adamw") -> dict[str, float]:
    """Return each parameter after a step without gradients, as a fraction of its value before."""
    params = parameters()
    config = knobs(name=name, learning_rate=0.1, muon_learning_rate=0.1, weight_decay=0.5, weight_decay_groups=groups)
    updates, _ = make_optimizer(config).update(
        jax.tree.map(np.zeros_like, params), make_optimizer(config).init(params), params
    )
    after = dict(leaves(optax.apply_updates(params, updates)))
    return {path: float(np.mean(after[path] / leaf)) for path, leaf in leaves(params)}


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_first_matching_decay_group_applies(name: str) -> None:
    left = decay_fractions(("scale|bias", 0.0), ("mixer/down", 0.5), ("blocks", 1.0), (".*", 2.0), name=name)
    for path, fraction in left.items():
        factor = 0 if path.endswith(("scale", "bias")) else 0.5 if "down" in path else 1 if "blocks" in path else 2
        assert fraction == pytest.approx(1 - 0.05 * factor, rel=1e-5), path


def test_decay_factor_of_zero_disables_decay() -> None:
    assert decay_fractions(("scale", 0.0), (".*", 1.0))["blocks/0/mixer_norm/scale"] == 1.0


def test_parameter_without_decay_group_is_an_error() -> None:
    with pytest.raises(UserError, match="weight_decay_groups: no expression matches the parameter 'embedding/table'"):
        decay_fractions(("blocks|head", 1.0))


def test_unknown_optimizer_suggests_the_nearest_name() -> None:
    with pytest.raises(UserError, match="config.optimizer.name: unknown 'adamww'. Did you mean 'adamw'?"):
        make_optimizer(knobs(name="adamww"))


# Muon.


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("feedforward", FEEDFORWARDS)
def test_muon_updates_exactly_the_kernels_of_the_blocks(feedforward: str, scan_layers: bool) -> None:
    everything = {
        "model.feedforwards": (feedforward,),
        "model.scan_layers": scan_layers,
        "model.bias": True,
        "model.attention.qk_norm": "head",
        "model.positions": ("learned",),
        "model.tie_embeddings": False,
    }
    shapes = dict(leaves(parameter_shapes(small_config(**everything).model)))
    taken = {
        path
        for path, label in leaves(muon_partition(parameter_shapes(small_config(**everything).model)))
        if label == "muon"
    }
    experts = {f"blocks/0/feedforward/{name}" for name in ("gate", "up", "down")} & set(shapes)
    kernels = {path for path in shapes if path.startswith("blocks/") and path.endswith("/kernel")}
    assert taken == kernels | experts
    assert len(taken) >= 6
    assert all(len(shapes[path].shape) == 3 + (path in experts) for path in taken)


def test_muon_excludes_routers_convolutions_and_other_arrays() -> None:
    array = np.empty((2, 4, 4))
    block = {"router": array, "convolution": {"kernel": array}, "kernel": array}
    labels = muon_partition({"experts": array, "blocks": {"0": block}})
    block_labels = {"router": "adamw", "convolution": {"kernel": "adamw"}, "kernel": "muon"}
    assert labels == {"experts": "adamw", "blocks": {"0": block_labels}}


def test_muon_orthogonalizes_each_expert() -> None:
    gradients = {"blocks": {"0": {"up": np.random.default_rng(0).standard_normal((2, 3, 4, 5)).astype(np.float32)}}}
    config = knobs(name="muon", weight_decay=0.0)
    updates, _ = jax.jit(make_optimizer(config).update)(gradients, make_optimizer(config).init(gradients), gradients)
    (update,) = jax.tree.leaves(updates)
    values = np.linalg.svd(np.asarray(update) / config.muon_learning_rate / (5 / 4) ** 0.5, compute_uv=False)
    assert values.shape == (2, 3, 4) and np.all((values > 0.6) & (values < 1.25))


def muon_updates(gradients: Params) -> dict[str, np.ndarray]:
    """Return the first update of each kernel of the blocks, without learning rate and shape factor."""
    config = knobs(name="muon", weight_decay=0.0)
    updates, _ = jax.jit(make_optimizer(config).update)(gradients, make_optimizer(config).init(gradients), gradients)
    kernels = {path: leaf for path, leaf in leaves(updates["blocks"]) if path.endswith("kernel")}
    return {
        path: np.asarray(leaf) / -config.muon_learning_rate / max(1, leaf.shape[2] / leaf.shape[1]) ** 0.5
        for path, leaf in kernels.items()
    }


def test_muon_orthogonalizes_each_layer() -> None:
    updates = muon_updates(parameters(3))
    assert len(updates) == len(KERNELS)
    for path, update in updates.items():
        values = np.linalg.svd(update, compute_uv=False)
        assert values.shape == (LAYERS, 4)
        # The band in which the iteration ends.
        assert np.all((values > 0.6) & (values < 1.25)), (path, values)


def test_muon_layers_are_independent() -> None:
    gradients = parameters(3)
    louder = jax.tree.map(np.copy, gradients)
    for kernel in louder["blocks"]["0"]["mixer"].values():
        kernel["kernel"][1:] *= 1000.0
        kernel["kernel"][1:] += 7.0
    quiet_updates, loud_updates = muon_updates(gradients), muon_updates(louder)
    for path, update in quiet_updates.items():
        np.testing.assert_array_equal(update[0], loud_updates[path][0])
        assert not np.allclose(update[1], loud_updates[path][1], atol=1e-3)


# Parameters for evaluation.


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_eval_params_equal_the_parameters_before_the_first_step(name: str) -> None:
    params = parameters()
    found = get_eval_params(knobs(name=name), params, make_optimizer(knobs(name=name)).init(params))
    assert found is params or name in EVAL_PARAMS
    assert_close(found, params)
    assert set(EVAL_PARAMS) <= set(OPTIMIZERS)


# Schedule-free.

SCHEDULE_FREE = {"name": "schedule_free", "eps": 1e-3, "weight_decay": 0.2}
DECAYING = {"name": "schedule_free", "weight_decay_groups": (("norm|bias", 0.0), (".*", 1.0))}
# Warmup, constant, decay.
RATES = (0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 0.3, 0.1)


@jax.jit
def schedule_free_step(
    numbers: dict[str, jax.Array], rate: jax.Array, gradients: Params, params: Params, state: Any
) -> tuple[Params, Any]:
    config = dataclasses.replace(knobs(**DECAYING), **numbers)
    updates, state = make_optimizer(config, rate).update(gradients, state, params)
    return optax.apply_updates(params, updates), state


def check_schedule_free(configs: list[OptimizerConfig], rates: tuple[float, ...]) -> None:
    """Check x, y and z after each step, of one config each. The gradients are a function of y."""
    params, target = parameters(), dict(leaves(parameters(1)))
    state = make_optimizer(configs[0]).init(params)
    oracles = {path: ScheduleFree(leaf) for path, leaf in leaves(params)}
    for step, (config, rate) in enumerate(zip(configs, rates, strict=True)):
        noise = random_like(params, 100 + step)
        gradients = jax.tree.map(lambda p, t, n: p - t + n, params, parameters(1), noise)
        for (path, oracle), (_, n) in zip(oracles.items(), leaves(noise), strict=True):
            decay = 0.0 if "norm" in path or "bias" in path else config.weight_decay
            oracle.step(config, rate * config.learning_rate, decay, oracle.y - target[path] + n)
        params, state = schedule_free_step(numbers_of(config), np.float32(rate), gradients, params, state)
        averages = dict(leaves(get_eval_params(config, params, state)))
        for (path, y), (_, z) in zip(leaves(params), leaves(state.z), strict=True):
            for found, wanted in ((y, oracles[path].y), (z, oracles[path].z), (averages[path], oracles[path].x)):
                np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=2e-5, err_msg=f"{path} at step {step}")


@pytest.mark.parametrize("b1", [0.3, 0.9, 0.98])
def test_schedule_free_matches_its_numpy_oracle(b1: float) -> None:
    config = knobs(**SCHEDULE_FREE, learning_rate=0.05, b1=b1)
    check_schedule_free([config] * len(RATES), RATES)


def test_schedule_free_b1_may_change_between_stages() -> None:
    early, late = (knobs(**SCHEDULE_FREE, learning_rate=0.05, b1=b1) for b1 in (0.9, 0.5))
    check_schedule_free([early] * 4 + [late] * 4, RATES)


def test_schedule_free_ignores_steps_with_learning_rate_zero() -> None:
    config = knobs(**SCHEDULE_FREE, learning_rate=0.05)
    check_schedule_free([config] * 3, (0.0, 0.0, 1.0))


def test_schedule_free_average_converges_under_noise() -> None:
    config = knobs(name="schedule_free", learning_rate=0.1, weight_decay=0.0)
    target, params = parameters(1), parameters()
    start, state = params, make_optimizer(config).init(params)
    for step in range(300):
        noise = random_like(params, 100 + step)
        gradients = jax.tree.map(lambda p, t, n: p - t + 2 * n, params, target, noise)
        params, state = schedule_free_step(numbers_of(config), np.float32(1.0), gradients, params, state)

    def distance(point: Params) -> float:
        return float(optax.tree.norm(jax.tree.map(jnp.subtract, point, target)))

    average = get_eval_params(config, params, state)
    assert distance(average) < 0.3 * distance(state.z)
    assert distance(average) < 0.2 * distance(start)


@pytest.mark.slow
def test_schedule_free_supports_vmap() -> None:
    configs = [knobs(**SCHEDULE_FREE, learning_rate=rate, b1=b1) for rate, b1 in ((0.01, 0.9), (0.05, 0.5))]
    params, gradients = parameters(), [parameters(seed) for seed in (2, 3)]

    def member(numbers: dict[str, jax.Array]) -> tuple[Params, Params]:
        config = dataclasses.replace(knobs(**DECAYING), **numbers)

        def body(carry: tuple[Params, Any], gradients: Params) -> tuple[tuple[Params, Any], None]:
            params, state = carry
            updates, state = make_optimizer(config, 0.5).update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), None

        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *gradients)
        (y, state), _ = jax.lax.scan(body, (params, make_optimizer(config).init(params)), stacked)
        return y, get_eval_params(config, y, state)

    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *map(numbers_of, configs))
    together = jax.jit(jax.vmap(member))(stacked)
    for index, config in enumerate(configs):
        alone = jax.jit(member)(numbers_of(config))
        assert_close(jax.tree.map(lambda leaf, index=index: leaf[index], together), alone)


# Clipping.


def test_clip_by_norm_keeps_the_direction() -> None:
    gradients = parameters()
    norm = optax.tree.norm(gradients)
    clipped = clip_by_norm(gradients, norm, 0.5)
    assert float(optax.tree.norm(clipped)) == pytest.approx(0.5, rel=1e-5)
    assert_close(jax.tree.map(lambda leaf: leaf * norm / 0.5, clipped), gradients)


def test_clip_by_norm_keeps_short_and_zero_gradients() -> None:
    for gradients in (parameters(), jax.tree.map(np.zeros_like, parameters())):
        norm = optax.tree.norm(gradients)
        assert_close(clip_by_norm(gradients, norm, 1.001 * norm), gradients, rtol=0, atol=0)
