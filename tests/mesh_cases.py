"""Trains small models on meshes of 8 virtual devices in one or several processes, and prints the results as JSON.

python tests/mesh_cases.py FOLDER [--distributed=HOST:PORT,PROCESSES,PROCESS] [CASE ...]
"""

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from conftest import small_config
from jax.experimental import multihost_utils

from rustgpt_jax.config.schema import Config, combine, partition
from rustgpt_jax.data.pipeline import Batch
from rustgpt_jax.planning.hlo import find_collectives, summarize_collectives
from rustgpt_jax.pytrees import flatten_paths
from rustgpt_jax.sharding.sharding_plan import plan_for_devices
from rustgpt_jax.training.checkpointing import Checkpoints
from rustgpt_jax.training.train_step import compiled_init_state, compiled_train_steps, gradient

STEPS = 20
BASE = {
    "model.n_layers": 2,
    "model.d_model": 32,
    "model.attention.n_heads": 8,
    "model.attention.head_dim": 4,
    "model.d_ff": 64,
    "model.vocab_size": 64,
    "model.dropout": 0.1,
    "training.batch_size": 16,
    "training.z_loss": 1e-4,
    "training.loss_chunk_size": 20,
    "optimizer.learning_rate": 3e-3,
}
MOE = {"model.feedforwards": ("moe",), "model.moe.capacity_factor": 1.5, "model.d_ff": 32}
# Name of a case: knobs of the model, and the mesh.
CASES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "data 8": ({}, {}),
    "fsdp 8": ({}, {"fsdp": 8}),
    "tensor 4": ({}, {"tensor": 4}),
    "fsdp 2 x tensor 2": ({"training.grad_accum_steps": 2}, {"fsdp": 2, "tensor": 2}),
    "expert 4": (MOE, {"expert": 4}),
    "dropless expert 2 x tensor 2": (MOE | {"model.moe.capacity_factor": 0.0}, {"expert": 2, "tensor": 2}),
    "context 4": ({"model.attention.n_kv_heads": 2}, {"context": 4}),
}


def config_of(knobs: dict[str, Any], mesh: dict[str, int]) -> Config:
    """Return the config of a small model on a mesh. Remaining devices belong to the data axis."""
    return small_config(**{**BASE, **knobs, **{f"mesh.{axis}": size for axis, size in mesh.items()}})


def batches_of(config: Config) -> Batch:
    """Return random batches with documents and padding."""
    random = np.random.default_rng(0)
    shape = STEPS, config.training.batch_size, config.model.context_length
    tokens = random.integers(0, 64, (*shape[:2], shape[2] + 1)).astype(np.int32)
    # Repeat half of the rows, so that there is something to learn.
    tokens[:, ::2] = tokens[0, 0]
    segments = 1 + (np.arange(shape[2]) > shape[2] // 3).astype(np.int32)
    positions = np.where(segments == 2, np.arange(shape[2]) - shape[2] // 3 - 1, np.arange(shape[2])).astype(np.int32)
    weights = (random.random(shape) < 0.8).astype(np.float32)
    full = (np.broadcast_to(each, shape).copy() for each in (segments, positions))
    return Batch(tokens[..., :-1], tokens[..., 1:], weights, *full)


def whole(tree: Any) -> Any:
    """Gather a tree of sharded arrays as NumPy arrays of this process."""
    return multihost_utils.process_allgather(tree, tiled=True) if jax.process_count() > 1 else jax.device_get(tree)


def run(config: Config, devices: list[jax.Device], folder: Path | None = None) -> dict[str, Any]:
    """Return initial parameters, the gradient of the first batch, the losses of all steps, and the compiled program."""
    (static, hparams), batches = partition(config), batches_of(config)
    plan = plan_for_devices(config.mesh, devices)
    rows = config.training.batch_size
    # Arrays on one device of this process are complete.
    take = whole if plan.mesh else jax.device_get
    with plan.use_mesh():
        here = plan.local_rows(rows, config.model.context_length)
        batches = jax.tree.map(lambda leaf: leaf[:, here], batches)
        state = compiled_init_state(static, hparams)
        first = take(state.params)
        shards = {path: leaf.addressable_shards[0].data.shape for path, leaf in flatten_paths(state).items()}
        one = plan.shard_batch(jax.tree.map(lambda leaf: leaf[0], batches), rows)
        key = jax.random.key(1)
        gradients = jax.jit(lambda params, batch: gradient(params, batch, combine(static, hparams), key)[0])
        found = take(gradients(state.params, one))
        arguments = plan.shard_batch(batches, rows), np.int32(STEPS), hparams, np.int32(0)
        compiled = compiled_train_steps.lower(static, state, *arguments).compile()
        state, metrics = compiled(state, *arguments)
        if folder is not None:
            with Checkpoints(folder, config, is_writer=True) as checkpoints:
                checkpoints.save(state, STEPS)
        return {
            "first": first,
            "gradients": found,
            "losses": take(metrics.loss),
            "last": take(state),
            "shards": shards,
            "text": compiled.as_text(),
            "sizes": plan.sizes,
        }


@cache
def run_alone(knobs: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    """Run a case on one device."""
    return run(config_of(dict(knobs), {}), jax.local_devices()[:1])


def difference(left: Any, right: Any) -> dict[str, float]:
    """Return the largest difference of each array of two trees, relative to its largest value."""
    left, right = flatten_paths(left), flatten_paths(right)
    return {
        path: float(np.max(np.abs(left[path] - right[path])) / max(np.max(np.abs(left[path])), 1e-6)) for path in left
    }


def same_bits(left: Any, right: Any) -> bool:
    """Return whether two trees are bit-identical."""
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def run_case(knobs: dict[str, Any], mesh: dict[str, int], folder: Path) -> dict[str, Any]:
    """Return the results of a case, and those of the same model on one device."""
    config = config_of(knobs, mesh)
    alone, here = run_alone(tuple(knobs.items())), run(config, jax.devices(), folder)
    found = find_collectives(here["text"], 8)
    restored = {}
    for name, onto in {"one device": {}, "tensor 2": {"tensor": 2}, "fsdp 4": {"fsdp": 4}}.items():
        if not onto and jax.process_count() > 1:
            continue
        other = plan_for_devices(config_of({}, onto).mesh, jax.devices() if onto else jax.devices()[:1])
        with other.use_mesh(), Checkpoints(folder, config) as checkpoints:
            like = jax.eval_shape(lambda: compiled_init_state(*partition(config)))
            restored[name] = same_bits(whole(checkpoints.restore(other.add_shardings(like))), here["last"])
    return {
        "same_start": same_bits(alone["first"], here["first"]),
        "losses": [alone["losses"].tolist(), here["losses"].tolist()],
        "gradients": difference(alone["gradients"], here["gradients"]),
        "collectives": {
            f"{kind} {' '.join(axes)}": [each.count, each.received]
            for (kind, axes), each in summarize_collectives(found, here["sizes"]).items()
        },
        "largest_gather": max([each.received for each in found if each.kind == "all-gather"], default=0.0),
        "shards": {
            path: [list(leaf.shape), list(here["shards"][path])] for path, leaf in flatten_paths(here["last"]).items()
        },
        "restored": restored,
    }


if __name__ == "__main__":
    root, names = Path(sys.argv[1]), [word for word in sys.argv[2:] if not word.startswith("--")]
    for word in sys.argv[2:]:
        if word.startswith("--distributed="):
            coordinator, count, index = word.removeprefix("--distributed=").split(",")
            jax.distributed.initialize(coordinator, int(count), int(index))
    print(json.dumps({name: run_case(*CASES[name], root / name.replace(" ", "_")) for name in names or CASES}))
