"""Assignment of trials to compiled programs: which trials share a program, how many run at a time, and in which mode.

Trials with the same static config form a shape class and share one compiled program. Planning uses no device.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rustgpt_jax.config.schema import Config, MeshConfig, StaticConfig, partition, stages
from rustgpt_jax.data.preprocess import AssetCache
from rustgpt_jax.errors import UserError, suggest_names
from rustgpt_jax.model.flops import parameter_shapes, total_bytes, total_size, training_flops_per_token
from rustgpt_jax.sharding.hardware_specs import Machine
from rustgpt_jax.sharding.sharding_plan import describe_mesh, is_flexible, min_devices
from rustgpt_jax.sweeps.trials import Trial
from rustgpt_jax.training.memory_estimate import state_shapes, step_bytes

MODES = ("auto", "fused", "exact", "solo")
# Maximum number of trials in a program that runs them sequentially; more would only delay a stop.
MAX_EXACT = 4
# The fraction of free memory to plan with; the rest is left to the compiler.
MEMORY_SHARE = 0.7
# An accelerator is idle between steps that are shorter than this.
IDLE_SECONDS = 5e-3

ClassKey = tuple[tuple[StaticConfig, int, MeshConfig], ...]


@dataclass(frozen=True)
class Cost:
    """Cost of a trial: memory for its state and for intermediates, FLOPs per step and in total, and tokens."""

    parameters: int
    state_bytes: int
    working_bytes: int
    step_flops: float
    total_flops: float
    tokens: int


@dataclass(frozen=True, eq=False)
class ShapeClass:
    """Trials that share one compiled program, and the config of the first one with its vocabulary size."""

    trials: tuple[Trial, ...]
    config: Config
    cost: Cost


@dataclass(frozen=True)
class Chunk:
    """Trials that run together.

    Attributes:
        trials: The IDs of the trials.
        mode: "fused", "exact" or "solo".
        width: The number of trials that the program has room for.
        until: The step to stop at, or None for the end.
        devices: The number of devices, or None for all.
    """

    trials: tuple[str, ...]
    mode: str
    width: int
    until: int | None = None
    devices: int | None = 1

    def to_json(self) -> str:
        """Return the chunk as JSON on one line."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Chunk":
        """Parse the output of `to_json`."""
        values = json.loads(text)
        return Chunk(**values | {"trials": tuple(values["trials"])})


@dataclass(frozen=True, eq=False)
class Plan:
    """The execution plan of one shape class."""

    shape_class: ShapeClass
    mode: str
    width: int
    reason: str
    devices: int | None = 1

    @property
    def memory(self) -> int:
        """The memory of the program in bytes; all states exist twice while the program updates them."""
        cost = self.shape_class.cost
        steps_at_once = self.width if self.mode == "fused" else 1
        return 2 * self.width * cost.state_bytes + steps_at_once * cost.working_bytes

    def describe(self) -> dict[str, Any]:
        """Return the plan with the cost of its trials, as JSON has them."""
        cost = self.shape_class.cost
        return {
            "trials": [{"id": trial.id, "knobs": trial.overrides} for trial in self.shape_class.trials],
            "mode": self.mode,
            "width": self.width,
            "reason": self.reason,
            "memory_bytes": self.memory,
            "n_parameters": cost.parameters,
            "tokens_per_trial": cost.tokens,
            "flops_per_trial": cost.total_flops,
        }

    def chunks(self, wanted: Iterable[str], until: int | None = None) -> list[Chunk]:
        """Divide all trials of the class into chunks, and return the chunks with only the wanted trials."""
        ids, wanted = [trial.id for trial in self.shape_class.trials], set(wanted)
        parts = (ids[first : first + self.width] for first in range(0, len(ids), self.width))
        kept = (tuple(name for name in part if name in wanted) for part in parts)
        return [Chunk(part, self.mode, self.width, until, self.devices) for part in kept if part]


def group_by_shape(trials: Sequence[Trial], assets: AssetCache) -> list[ShapeClass]:
    """Group trials by static config, in the order of first occurrence."""
    members: dict[ClassKey, list[Trial]] = {}
    configs: dict[ClassKey, Config] = {}
    for trial in trials:
        config = assets.fill_vocab_size(trial.config)
        key = get_class_key(config)
        members.setdefault(key, []).append(trial)
        configs.setdefault(key, config)
    return [ShapeClass(tuple(members[key]), configs[key], estimate_cost(configs[key])) for key in members]


def get_class_key(config: Config) -> ClassKey:
    """Return the key of a trial's shape class: static config and sequence length of each stage, and the mesh."""
    return tuple((partition(stage.config)[0], stage.config.seq_len, config.mesh) for stage in stages(config))


def estimate_cost(config: Config) -> Cost:
    """Estimate the cost of a trial from the shapes of its arrays."""
    configs = [stage.config for stage in stages(config)]
    step_tokens = [config.training.batch_size * config.seq_len for config in configs]
    step_flops = [
        tokens * training_flops_per_token(config.model, config.seq_len)
        for tokens, config in zip(step_tokens, configs, strict=True)
    ]
    steps = [config.training.steps for config in configs]
    return Cost(
        parameters=total_size(parameter_shapes(config.model)),
        state_bytes=total_bytes(state_shapes(configs[0])),
        working_bytes=max(step_bytes(config, config.seq_len) for config in configs),
        step_flops=max(step_flops),
        total_flops=float(np.dot(steps, step_flops)),
        tokens=int(np.dot(steps, step_tokens)),
    )


def make_plan(shape_class: ShapeClass, machine: Machine, mode: str, width: int | None = None) -> Plan:
    """Plan how a class runs on a machine, in the given mode or, for `auto`, in the best one.

    The trials are divided among the devices, or among groups of them if a trial's mesh has several.

    Raises:
        UserError: The mode is unknown, or the mesh needs more devices than the machine has.
    """
    if mode not in MODES:
        raise UserError(f"--mode: unknown {mode!r}.{suggest_names(mode, MODES)}")
    n_trials, mesh, cost = len(shape_class.trials), shape_class.config.mesh, shape_class.cost
    needed = min_devices(mesh)
    if needed > machine.n_devices:
        raise UserError(
            f"config.mesh: a trial on {describe_mesh(mesh)} needs {needed} devices; there are {machine.n_devices}."
        )
    selected, reason = _select_mode(shape_class, machine) if mode == "auto" else (mode, "as requested")
    if shape_class.config.optimizer.offload_state and selected != "solo":
        raise UserError(f"config.optimizer.offload_state is for trials that run alone: --mode=solo, not {selected}.")
    if needed > 1:
        reason += f"; each on {needed} devices ({describe_mesh(mesh)})"
    if selected == "solo":
        return Plan(shape_class, selected, 1, reason, None if is_flexible(mesh) else needed)
    share = math.ceil(n_trials / (machine.n_devices // needed))
    if width is not None:
        return Plan(shape_class, selected, min(width, share), reason, needed)
    memory, state_bytes = MEMORY_SHARE * machine.memory, 2 * cost.state_bytes
    is_fused = selected == "fused"
    fitting = memory / (state_bytes + cost.working_bytes) if is_fused else (memory - cost.working_bytes) / state_bytes
    most, limit = max(1, int(fitting)), "as memory allows"
    if not is_fused and most > MAX_EXACT:
        most, limit = MAX_EXACT, "because a stop waits for all of them"
    if most < share:
        reason += f"; {most} at a time, {limit}"
    return Plan(shape_class, selected, min(share, most), reason, needed)


def _select_mode(shape_class: ShapeClass, machine: Machine) -> tuple[str, str]:
    """Return the best mode and the reason for it."""
    if shape_class.config.optimizer.offload_state:
        return "solo", "config.optimizer.offload_state leaves the memory of the device to one trial"
    if machine.platform == "cpu":
        return "exact", f"CPU: one trial on each of {machine.n_devices} cores, bit-identical to separate runs"
    if len(shape_class.trials) <= machine.n_devices:
        return "solo", "no more trials than devices"
    seconds = shape_class.cost.step_flops / machine.flops
    took = f"a step of one trial takes {1e3 * seconds:.2g} ms at peak and"
    if seconds < IDLE_SECONDS:
        return "fused", f"{took} leaves the device idle"
    return "exact", f"{took} saturates the device"


def select_part(classes: Sequence[ShapeClass], part: tuple[int, int]) -> list[Trial]:
    """Return one part of a sweep, (index, number of parts), such that all parts cost about the same.

    The trials of a shape class are consecutive, so that most of them are in the same part. Every trial is in exactly
    one part, on whatever machine this is computed.
    """
    index, n_parts = part
    total = sum(len(shape_class.trials) * shape_class.cost.total_flops for shape_class in classes)
    selected, before = [], 0.0
    for shape_class in classes:
        cost = shape_class.cost.total_flops
        for trial in shape_class.trials:
            if int(n_parts * (before + cost / 2) / total) == index:
                selected.append(trial)
            before += cost
    return selected
