"""Every name in a config held against the tables, before anything is made or compiled."""

from collections.abc import Mapping
from typing import Any

from rustgpt_jax.config import Config, stages
from rustgpt_jax.data.corpora import CORPORA
from rustgpt_jax.model.feedforwards import FEEDFORWARDS
from rustgpt_jax.model.mixers import MIXERS
from rustgpt_jax.model.norms import NORMS
from rustgpt_jax.model.positions import POSITIONS
from rustgpt_jax.model.rope_scaling import ROPE_SCALINGS
from rustgpt_jax.tables import choose
from rustgpt_jax.tokenizers import IMPORTED, TOKENIZERS
from rustgpt_jax.training.optimizers import OPTIMIZERS
from rustgpt_jax.training.schedules import SCHEDULES

PATTERNS: dict[str, Mapping[str, Any]] = {"mixers": MIXERS, "feedforwards": FEEDFORWARDS, "positions": POSITIONS}


def check_parts(config: Config) -> None:
    """Raises UserError, with the nearest valid name, for a part that no table has."""
    model = config.model
    if config.tokenizer.name != IMPORTED:
        choose(TOKENIZERS, config.tokenizer.name, "config.tokenizer.name")
    choose(NORMS, model.norm, "config.model.norm")
    choose(ROPE_SCALINGS, model.rope_scaling, "config.model.rope_scaling")
    for knob, table in PATTERNS.items():
        for name in getattr(model, knob):
            choose(table, name, f"config.model.{knob}")
    choose(OPTIMIZERS, config.optimizer.name, "config.optimizer.name")
    for stage in stages(config):
        choose(CORPORA, stage.config.data.corpus, "config.data.corpus")
        choose(SCHEDULES, stage.config.schedule.name, "config.schedule.name")
