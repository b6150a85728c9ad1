"""The command `plan`: what a config needs of chips that need not be there, and which change would make it fit."""

from collections.abc import Callable, Iterator

import jax
from rich.console import Console

from rustgpt_jax.config.schema import Config, Stage, replace_paths, stages
from rustgpt_jax.errors import UserError, suggestion
from rustgpt_jax.planning.estimate import Change, Estimate, changes, estimate
from rustgpt_jax.planning.report import show, show_changes
from rustgpt_jax.sharding.hardware_specs import CHIPS, use_cpu_devices
from rustgpt_jax.sharding.sharding_plan import check_shares, on_devices
from rustgpt_jax.tracking.progress import waiting
from rustgpt_jax.training.validate_components import validate_components


def plan(config: Config, chip_name: str, n_devices: int, console: Console) -> bool:
    """Print what a step of a config needs of each of so many chips. Whether it fits, as it is.

    Nothing of the model is allocated, no data are read, and JAX, which must not have been used, gets as many virtual
    devices. Raises UserError for a chip that there is not, for a mesh or a batch that does not suit the number of
    devices, and for a config whose vocabulary only a tokenizer would tell.
    """
    if chip_name not in CHIPS:
        raise UserError(f"--chip: there is no {chip_name!r}.{suggestion(chip_name, CHIPS)}")
    validate_components(config)
    config, window = _longest(with_vocabulary_size(config))
    check_shares(config, window, n_devices)
    devices = _virtual_devices(n_devices)
    chip = CHIPS[chip_name]

    def estimated(config: Config) -> Estimate:
        return estimate(config, window, on_devices(config.mesh, devices), chip)

    with waiting(console, "compiling the step"):
        found = estimated(config)
    show(found, chip_name, console)
    if not found.fits:
        with waiting(console, "looking for a change that makes it fit"):
            tried = list(_tried(found, estimated))
        show_changes(tried, found.room, console)
    return found.fits


def with_vocabulary_size(config: Config) -> Config:
    """The config with the vocabulary that it names, for the model or for the tokenizer. Raises UserError for none."""
    size = config.model.vocab_size or config.tokenizer.vocab_size
    if size is None:
        raise UserError(
            f"config.model.vocab_size is None, and a tokenizer of {config.tokenizer.name}s has no size of its own: "
            "give --config.model.vocab_size=N, for plan reads no text."
        )
    return replace_paths(config, {"model.vocab_size": size})


def _longest(config: Config) -> tuple[Config, int]:
    """The stage with the longest windows, and how long they are."""

    def window(stage: Stage) -> int:
        return stage.config.data.seq_len or stage.config.model.context_length

    longest = max(stages(config), key=window)
    return longest.config, window(longest)


def _virtual_devices(count: int) -> list[jax.Device]:
    jax.config.update("jax_platforms", "cpu")
    # What is compiled only to be looked at is not worth keeping, and what is found in a cache comes without warnings.
    jax.config.update("jax_enable_compilation_cache", False)
    use_cpu_devices(count)
    devices = jax.devices()
    if len(devices) < count:
        raise UserError(
            f"XLA_FLAGS says how many virtual devices there are, {len(devices)}, and plan needs {count}: take "
            "--xla_force_host_platform_device_count out of it."
        )
    return devices[:count]


def _tried(found: Estimate, estimated: Callable[[Config], Estimate]) -> Iterator[tuple[Change, Estimate]]:
    """Changes of each kind, up to the first that fits."""
    for of_kind in changes(found.config, found.window, found.n_devices):
        for change in of_kind:
            changed = estimated(change.of(found.config))
            yield change, changed
            if changed.fits:
                break
