"""How fast a chip could be at best (the roofline, Williams and others 2009): bounds on the time of a step.

Nothing here knows how well a program does; a measured step takes longer than the lower bound.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from rustgpt_jax.planning.collectives import Collective
from rustgpt_jax.sharding.hardware_specs import Chip


@dataclass(frozen=True)
class Seconds:
    """What each part of a step takes on a device: matrix products, memory traffic, collectives."""

    compute: float
    memory: float
    collectives: float

    @property
    def overlapped(self) -> float:
        """A step in which everything goes on at the same time: as long as its longest part."""
        return max(self.compute, self.memory, self.collectives)

    @property
    def exposed(self) -> float:
        """A step that waits for each collective."""
        return max(self.compute, self.memory) + self.collectives

    @property
    def limit(self) -> str:
        """The longest part."""
        parts = {"compute": self.compute, "memory": self.memory, "collectives": self.collectives}
        return max(parts, key=lambda name: parts[name])


def step_seconds(chip: Chip, dtype: str, flops: float, traffic: float, found: Iterable[Collective]) -> Seconds:
    """The parts of a step: FLOPs of matrix products of a type, bytes to and from memory, and collectives, a device."""
    return Seconds(
        flops / chip.flops(dtype), traffic / chip.bandwidth, sum(collective_seconds(each, chip) for each in found)
    )


def collective_seconds(each: Collective, chip: Chip) -> float:
    """Seconds that a collective takes in all its runs, at full bandwidth and without latency.

    Devices are numbered node by node, `chip.linked` to each. A group with members on several nodes is as fast as the
    network lets it be: its members on a node receive together, each by its own adapter, what the node lacks.
    """
    fast = each.total / chip.links
    nodes = [Counter(device // chip.linked for device in group) for group in each.groups]
    if max(map(len, nodes), default=1) == 1:
        return fast
    if each.kind == "collective-permute":
        return each.total / chip.network
    members = min(min(own.values()) for own in nodes)
    return max(fast, each.total / (members * chip.network))


def utilization(chip: Chip, dtype: str, model_flops: float, seconds: float) -> float:
    """Model FLOPs utilisation (arXiv 2204.02311, appendix B): FLOPs that a model needs, of those that the chip has.

    model_flops: of a step on a device, without recomputation.
    """
    return model_flops / (chip.flops(dtype) * seconds)
