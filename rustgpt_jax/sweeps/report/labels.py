"""What knobs, values, losses and settings are called where people read of them."""

import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rustgpt_jax.config.schema import FIELDS
from rustgpt_jax.sweeps.report.results import BITS_PER_BYTE, SEED, TRAIN_LOSS, VALID_LOSS, Overrides, Results

# Last names of knobs that say nothing without their group.
BARE_NAMES = ("name", "steps")


@dataclass(frozen=True)
class Metric:
    """The name of a loss and its unit."""

    name: str
    unit: str

    def __str__(self) -> str:
        return f"{self.name}, {self.unit}"


METRICS = {
    VALID_LOSS: Metric("validation loss", "nats a token"),
    BITS_PER_BYTE: Metric("validation loss", "bits per byte"),
    TRAIN_LOSS: Metric("training loss", "nats a token"),
}


def knob_names(paths: Iterable[str]) -> dict[str, str]:
    """A short name for each dotted path: its last word, with the groups before it that tell it from the others."""
    paths = list(paths)
    names: dict[str, str] = {}
    for path in paths:
        parts = path.split(".")
        ends = [".".join(parts[start:]) for start in reversed(range(len(parts)))]
        clear = [end for end in ends if sum(("." + other).endswith("." + end) for other in paths) == 1]
        short = next((end for end in clear if end not in BARE_NAMES), path)
        # d_model and n_layers are words of the field.
        names[path] = re.sub(r"(?<=[a-z]{2})_", " ", short.removesuffix(".name").replace(".", " "))
    return names


def format_value(value: Any) -> str:
    """A knob's value in at most four significant digits, without the zeros of an exponent: 0.001, 3e-5, muon."""
    if isinstance(value, float):
        mantissa, e, exponent = f"{value:.4g}".partition("e")
        return f"{mantissa}e{int(exponent)}" if e else mantissa
    if isinstance(value, (list, tuple)):
        return ", ".join(map(format_value, value))
    return str(value)


def format_loss(loss: float) -> str:
    """A loss, or a difference of two, with the digits that a seed leaves of it."""
    return f"{loss:.4f}"


def format_p_value(p_value: float) -> str:
    """A p-value with its sign: p = 0.012, p < 0.001."""
    return f"p = {p_value:.3f}" if p_value >= 0.001 else "p < 0.001"


def describe_setting(knobs: Mapping[str, Any]) -> str:
    """The values of some knobs in a line: 'optimizer muon, learning rate 0.003'."""
    names = knob_names([*knobs, SEED])
    return ", ".join(f"{names[path]} {format_value(value)}" for path, value in knobs.items()) or "the config as it is"


def format_rerun_command(results: Results, overrides: Overrides) -> str:
    """The command that trains one trial of a sweep again, alone, with the knobs that the sweep's own command set."""
    kept = [(path, text) for path, text in _set_by(results.command) if path not in overrides]
    own = [(path, _argument(path, value)) for path, value in overrides.items()]
    flags = (shlex.quote(f"--config.{path}={text}") for path, text in kept + own)
    return " ".join(["python launch.py train", f"--config={shlex.quote(results.config_file)}", *flags])


def _set_by(command: str) -> list[tuple[str, str]]:
    """The knobs that a command line sets, as --config.x=VALUE or --config.x VALUE, and the texts of their values."""
    words = iter(shlex.split(command))
    values: list[tuple[str, str]] = []
    for word in words:
        if word.startswith("-") and word.lstrip("-").startswith("config."):
            path, equals, text = word.lstrip("-").removeprefix("config.").partition("=")
            values.append((path, text if equals else next(words, "")))
    return values


def _argument(path: str, value: Any) -> str:
    if isinstance(value, (list, tuple)) and path in FIELDS and FIELDS[path].metadata.get("pattern"):
        return ",".join(value)
    return value if isinstance(value, str) else repr(value)
