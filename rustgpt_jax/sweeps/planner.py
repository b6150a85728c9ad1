"""Assign trials to programs: which share one, how many run at once, and in which mode.

Trials of equal structure form a shape class: one compiled program serves them all. Nothing here needs a device.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rustgpt_jax.config.schema import Config, MeshConfig, StaticConfig, partition, stages
from rustgpt_jax.errors import UserError, suggest_names
from rustgpt_jax.model.flops import parameter_shapes, total_bytes, total_size, training_flops_per_token
from rustgpt_jax.sharding.hardware_specs import Machine
from rustgpt_jax.sharding.sharding_plan import describe_mesh, is_flexible, min_devices
from rustgpt_jax.sweeps.asset_cache import AssetCache
from rustgpt_jax.sweeps.trials import Trial
from rustgpt_jax.training.memory_estimate import state_shapes, step_bytes

MODES = ("auto", "fused", "exact", "solo")
# Trials in a program that runs them one after another: more of them gain nothing, and delay a stop.
MOST_EXACT = 4
# Of the memory that is free; the rest is for what the compiler adds.
MEMORY_SHARE = 0.7
# A step shorter than this leaves an accelerator idle while the next one is sent to it.
IDLE_SECONDS = 5e-3

ClassKey = tuple[tuple[StaticConfig, int, MeshConfig], ...]


@dataclass(frozen=True)
class Cost:
    """The cost of a trial: bytes of its state and of a step's intermediates, and FLOPs of a step and of all steps."""

    parameters: int
    state_bytes: int
    working_bytes: int
    step_flops: float
    total_flops: float
    tokens: int


@dataclass(frozen=True, eq=False)
class ShapeClass:
    """Trials that share one compiled program. `whole` is the config of the first, with its vocabulary size."""

    trials: tuple[Trial, ...]
    whole: Config
    cost: Cost


@dataclass(frozen=True)
class Chunk:
    """Trials that run together: a program of `width` lanes in a mode, up to the step `until` or to their ends.

    It runs on so many `devices`; None stands for all that there are.
    """

    trials: tuple[str, ...]
    mode: str
    width: int
    until: int | None = None
    devices: int | None = 1

    def to_dict(self) -> dict[str, Any]:
        """Return the chunk as a value for JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "Chunk":
        """The inverse of `to_dict`."""
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
        """Bytes that a program of this plan needs: states, which are there twice for a moment, and a step's own."""
        cost = self.shape_class.cost
        steps_at_once = self.width if self.mode == "fused" else 1
        return 2 * self.width * cost.state_bytes + steps_at_once * cost.working_bytes

    def chunks(self, wanted: Iterable[str], until: int | None = None) -> list[Chunk]:
        """The class's trials among those wanted, cut into chunks. The cuts do not depend on what is wanted."""
        ids, wanted = [trial.id for trial in self.shape_class.trials], set(wanted)
        parts = (ids[first : first + self.width] for first in range(0, len(ids), self.width))
        kept = (tuple(name for name in part if name in wanted) for part in parts)
        return [Chunk(part, self.mode, self.width, until, self.devices) for part in kept if part]


def group_by_shape(trials: Sequence[Trial], shelf: AssetCache) -> list[ShapeClass]:
    """Group trials by static config, in the order of first occurrence."""
    members: dict[ClassKey, list[Trial]] = {}
    wholes: dict[ClassKey, Config] = {}
    for trial in trials:
        whole = shelf.whole(trial.config)
        key = class_key(whole)
        members.setdefault(key, []).append(trial)
        wholes.setdefault(key, whole)
    return [ShapeClass(tuple(members[key]), wholes[key], estimate_cost(wholes[key])) for key in members]


def class_key(whole: Config) -> ClassKey:
    """Return what selects a trial's programs: static config and sequence length of each stage, and the mesh."""
    return tuple((partition(stage.config)[0], _window(stage.config), whole.mesh) for stage in stages(whole))


def estimate_cost(whole: Config) -> Cost:
    """Estimate the cost of a trial from shapes."""
    configs = [stage.config for stage in stages(whole)]
    step_tokens = [config.training.batch_size * _window(config) for config in configs]
    step_flops = [
        tokens * training_flops_per_token(config.model, _window(config))
        for tokens, config in zip(step_tokens, configs, strict=True)
    ]
    steps = [config.training.steps for config in configs]
    return Cost(
        parameters=total_size(parameter_shapes(whole.model)),
        state_bytes=total_bytes(state_shapes(configs[0])),
        working_bytes=max(step_bytes(config, _window(config)) for config in configs),
        step_flops=max(step_flops),
        total_flops=float(np.dot(steps, step_flops)),
        tokens=int(np.dot(steps, step_tokens)),
    )


def _window(config: Config) -> int:
    return config.data.seq_len or config.model.context_length


def make_plan(shape_class: ShapeClass, machine: Machine, mode: str, width: int | None = None) -> Plan:
    """Plan how a class runs on a machine, in the given mode or, for `auto`, in the best one.

    The trials are shared among the devices, or among groups of them where the mesh of a trial needs several.
    Raises UserError for a mode that there is not, and for a mesh that needs more devices than there are.
    """
    if mode not in MODES:
        raise UserError(f"--mode: unknown {mode!r}.{suggest_names(mode, MODES)}")
    n_trials, mesh = len(shape_class.trials), shape_class.whole.mesh
    needed = min_devices(mesh)
    if needed > machine.n_devices:
        raise UserError(
            f"config.mesh: a trial on {describe_mesh(mesh)} needs {needed} devices; there are {machine.n_devices}."
        )
    chosen, reason = _mode(shape_class, machine) if mode == "auto" else (mode, "as asked")
    if shape_class.whole.optimizer.offload_state and chosen != "solo":
        raise UserError(f"config.optimizer.offload_state is for trials that run alone: --mode=solo, not {chosen}.")
    if needed > 1:
        reason += f"; each on {needed} devices ({describe_mesh(mesh)})"
    if chosen == "solo":
        return Plan(shape_class, chosen, 1, reason, None if is_flexible(mesh) else needed)
    share = math.ceil(n_trials / (machine.n_devices // needed))
    if width is not None:
        return Plan(shape_class, chosen, min(width, share), reason, needed)
    most, limit = _most(shape_class.cost, machine, chosen)
    if most < share:
        reason += f"; {most} at a time, {limit}"
    return Plan(shape_class, chosen, min(share, most), reason, needed)


def _mode(shape_class: ShapeClass, machine: Machine) -> tuple[str, str]:
    if shape_class.whole.optimizer.offload_state:
        return "solo", "config.optimizer.offload_state leaves the memory of the device to one trial"
    if machine.platform == "cpu":
        return (
            "exact",
            f"a CPU: a trial on each of {machine.n_devices} cores, with the bits of each run alone",
        )
    if len(shape_class.trials) <= machine.n_devices:
        return "solo", "no more trials than devices"
    seconds = shape_class.cost.step_flops / machine.flops
    if seconds < IDLE_SECONDS:
        return "fused", f"a step of one trial takes {1e3 * seconds:.2g} ms at peak and leaves the device idle"
    return "exact", f"a step of one trial takes {1e3 * seconds:.2g} ms at peak and fills the device"


def _most(cost: Cost, machine: Machine, mode: str) -> tuple[int, str]:
    """Return the maximum number of trials per program, and the reason for the limit."""
    # States are there twice while the program turns one into the next.
    if mode == "fused":
        fitting = int(MEMORY_SHARE * machine.memory / (2 * cost.state_bytes + cost.working_bytes))
        return max(1, fitting), "as memory allows"
    fitting = int((MEMORY_SHARE * machine.memory - cost.working_bytes) / (2 * cost.state_bytes))
    return (
        (MOST_EXACT, "for a stop waits for a call") if fitting > MOST_EXACT else (max(1, fitting), "as memory allows")
    )
