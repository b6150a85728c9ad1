"""Single changes of a config that save memory on a device."""

from collections.abc import Iterator
from itertools import takewhile
from typing import NamedTuple

from rustgpt_jax.config.schema import Config, with_values
from rustgpt_jax.sharding.mesh import axis_sizes

# Tokens of a row whose logits exist at a time.
LOSS_CHUNK = 512
MOST_TENSOR = 8


class Change(NamedTuple):
    """Knobs of a config and their other values."""

    knobs: dict[str, int | str]

    def of(self, config: Config) -> Config:
        """The config with the change."""
        return with_values(config, self.knobs)

    def __str__(self) -> str:
        return " ".join(f"--config.{path}={value}" for path, value in self.knobs.items())


def changes(config: Config, window: int, n_devices: int) -> Iterator[list[Change]]:
    """Changes of each kind, from the smallest to the largest, but for those that the config has made already."""
    sizes = axis_sizes(config.mesh, n_devices)
    shares = sizes["data"] * sizes["fsdp"] * sizes["expert"]
    yield _accumulation(config, shares)
    yield [Change({"model.remat": "full"})] if config.model.remat in ("none", "dots", "weights") else []
    chunk = config.training.loss_chunk or window
    yield [Change({"training.loss_chunk": LOSS_CHUNK})] if chunk > LOSS_CHUNK else []
    yield [Change({"mesh.data": data, "mesh.fsdp": fsdp}) for data, fsdp in _moved(sizes["data"], sizes["fsdp"])]
    yield _tensor(config, sizes)


def _accumulation(config: Config, shares: int) -> list[Change]:
    training = config.training
    rows = training.batch_size // training.accumulation // shares
    return [Change({"training.accumulation": factor * training.accumulation}) for factor in _doublings(rows)]


def _tensor(config: Config, sizes: dict[str, int]) -> list[Change]:
    """More devices along tensor, taken from data, or where there is none from fsdp."""
    giver = "data" if sizes["data"] > 1 else "fsdp"
    heads = config.model.n_kv_heads or config.model.n_heads
    found = []
    for left, tensor in _moved(sizes[giver], sizes["tensor"]):
        if tensor <= MOST_TENSOR and heads % tensor == 0:
            found.append(Change({f"mesh.{giver}": left, "mesh.tensor": tensor}))
    return found


def _moved(giver: int, taker: int) -> list[tuple[int, int]]:
    """Devices of one axis given to another, twice as many at a time."""
    return [(giver // factor, taker * factor) for factor in _doublings(giver)]


def _doublings(most: int) -> list[int]:
    """2, 4, 8, .. as long as they divide a number."""
    powers = (2**power for power in range(1, most.bit_length()))
    return list(takewhile(lambda factor: most % factor == 0, powers))
