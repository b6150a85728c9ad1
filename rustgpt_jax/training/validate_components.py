"""Every name in a config held against the tables, before anything is made or compiled."""

import inspect
from collections.abc import Mapping
from typing import Any

from rustgpt_jax.config.schema import Config, stages
from rustgpt_jax.data.datasets import CORPORA
from rustgpt_jax.errors import UserError
from rustgpt_jax.model import interfaces
from rustgpt_jax.model.kernels.types import ANY_DEVICE
from rustgpt_jax.model.kernels.verify import attention_choices
from rustgpt_jax.model.mixers import MIXERS
from rustgpt_jax.model.mlps import FEEDFORWARDS
from rustgpt_jax.model.norms import NORMS
from rustgpt_jax.model.positions import POSITIONS, ROPE_SCALINGS
from rustgpt_jax.registry import choose
from rustgpt_jax.tokenizers import IMPORTED, TOKENIZERS
from rustgpt_jax.training.optimizers import OPTIMIZERS
from rustgpt_jax.training.schedules import SCHEDULES

# Knobs that name parts of the model, the tables of these parts, and what they are.
MODEL_PARTS: dict[str, tuple[Mapping[str, Any], str]] = {
    "mixers": (MIXERS, interfaces.MIXER),
    "feedforwards": (FEEDFORWARDS, interfaces.FEEDFORWARD),
    "positions": (POSITIONS, interfaces.POSITION),
    "norm": (NORMS, interfaces.NORM),
}


def validate_components(config: Config) -> None:
    """Raises UserError, with the nearest valid name, for a part that no table has, or one that is of another kind.

    So it does for an attention kernel that could compute the model on no device.
    """
    model = config.model
    if config.tokenizer.name != IMPORTED:
        _check_function(TOKENIZERS, config.tokenizer.name, "config.tokenizer.name", "texts", "vocab_size")
    _check_function(ROPE_SCALINGS, model.rope_scaling, "config.model.rope_scaling", "frequencies", "config")
    for knob, (table, kind) in MODEL_PARTS.items():
        named = getattr(model, knob)
        for name in (named,) if isinstance(named, str) else named:
            if interfaces.component_kind(choose(table, name, f"config.model.{knob}")) != kind:
                raise UserError(f"config.model.{knob}={name!r} is not {kind}: {interfaces.LOOKS[kind]}.")
    _check_function(OPTIMIZERS, config.optimizer.name, "config.optimizer.name", "config", "rate")
    for stage in stages(config):
        _check_function(CORPORA, stage.config.data.corpus, "config.data.corpus", "config")
        _check_function(SCHEDULES, stage.config.schedule.name, "config.schedule.name", "step", "steps", "schedule")
        attention_choices(
            stage.config.model, ANY_DEVICE, stage.config.data.seq_len or stage.config.model.context_length
        )


def _check_function(table: Mapping[str, Any], name: str, knob: str, *arguments: str) -> None:
    """Raises UserError for a name of nothing, or of what cannot be called with these arguments."""
    part = choose(table, name, knob)
    try:
        inspect.signature(part).bind(*arguments)
    except (TypeError, ValueError):  # What is no function, one of other arguments, or a built-in that hides its own.
        raise UserError(f"{knob}={name!r} is not a function of ({', '.join(arguments)}).") from None
