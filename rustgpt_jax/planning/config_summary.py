"""Summary of a config: the value and origin of each field, parameter shapes, FLOPs and memory."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from rustgpt_jax.cache_dir import cache_folder
from rustgpt_jax.config.schema import Config, Stage, flatten, partition, stages, uses_epochs
from rustgpt_jax.data.preprocess import fill_vocab_size, load_or_train_tokenizer, resolve_epochs_of_text
from rustgpt_jax.model.flops import forward_flops_per_token, parameter_shapes, total_bytes, total_size
from rustgpt_jax.pytrees import flatten_paths
from rustgpt_jax.sharding.sharding_plan import check_batch_shards
from rustgpt_jax.tracking.formatting import format_bytes, format_count
from rustgpt_jax.training.config_checks import validate_components
from rustgpt_jax.training.train_step import init_state


def print_config_summary(config: Config, origins: Mapping[str, str], console: Console) -> None:
    """Print the knobs with their origins, the parameters with their shapes, and FLOPs and memory.

    Nothing is computed but shapes; where the vocabulary depends on the corpus, the tokenizer is trained, and where the
    number of steps depends on the number of epochs, the text is encoded.
    """
    validate_components(config)
    for stage in stages(config):
        check_batch_shards(stage.config, stage.config.data.seq_len or config.model.context_length, jax.device_count())
    if uses_epochs(config) or not config.model.vocab_size:
        tokenizer = load_or_train_tokenizer(config)
        resolved = resolve_epochs_of_text(config, tokenizer, cache_folder())
        config, origins = resolved.config, {**origins, **resolved.origins}
        for sentence in resolved.messages:
            console.print(sentence, markup=False, highlight=False, soft_wrap=True)
        whole = fill_vocab_size(config, tokenizer)
    else:
        whole = config
    # All of it is made before any of it is shown: a part may refuse its knobs.
    tables = [_knobs(config, origins), *(_stage_knobs(own.name, dict(own.overrides)) for own in config.stages)]
    for table in [*tables, _parameters(whole), _costs(whole)]:
        console.print(table)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in columns:
        table.add_column(
            name, style="cyan" if name == "knob" else "", no_wrap=name in ("knob", "path", "size"), overflow="fold"
        )
    return table


def _knobs(config: Config, origins: Mapping[str, str]) -> Table:
    table = _table("Knobs", "knob", "value", "origin")
    for path, value in flatten(config).items():
        origin = origins.get(path, "")
        table.add_row(f"config.{path}", repr(value), origin, style="" if origin == "base" else "bold")
    return table


def _stage_knobs(name: str, overrides: Mapping[str, Any]) -> Table:
    table = _table(f"\nStage {name}", "knob", "value")
    for path, value in overrides.items():
        table.add_row(f"config.{path}", repr(value))
    return table


def _parameters(config: Config) -> Table:
    table = _table(
        "\nParameters (blocks are stacked: the first axis counts repeats of the pattern)", "path", "shape", "size"
    )
    for path, leaf in flatten_paths(parameter_shapes(config.model)).items():
        shape = " x ".join(map(str, leaf.shape))
        table.add_row(path, shape, f"{total_size(leaf):,}")
    table.add_row("all", "", f"{total_size(parameter_shapes(config.model)):,}", style="bold")
    return table


def _costs(config: Config) -> Table:
    table = _table("\nCost", "what", "how much", "of which")
    shapes = parameter_shapes(config.model)
    parameters = total_bytes(shapes)
    static, hparams = partition(config)
    state = jax.eval_shape(lambda: init_state(static, hparams))
    optimizer = total_bytes(state.opt_state)
    table.add_row("parameters", format_count(total_size(shapes)), format_bytes(parameters))
    table.add_row("memory of training", format_bytes(2 * parameters + optimizer), _memory(parameters, optimizer))
    for stage in stages(config):
        table.add_row(*_stage_costs(stage))
    table.add_row("token stores and compiled programs", "kept in", str(cache_folder()))
    return table


def _memory(parameters: int, optimizer: int) -> str:
    parts = {"parameters": parameters, "gradients": parameters, "optimizer": optimizer}
    return ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items()) + "; activations come on top"


def _stage_costs(stage: Stage) -> tuple[str, str, str]:
    config = stage.config
    window = config.data.seq_len or config.model.context_length
    forward = forward_flops_per_token(dataclasses.replace(config.model, remat="none"), window)
    tokens = config.training.steps * config.training.batch_size * window
    return (
        f"stage {stage.name}",
        f"{format_count(3 * forward)} FLOPs a token",
        f"forward {format_count(forward)}; "
        f"{config.training.steps} steps of {config.training.batch_size} x {window} tokens"
        f", {format_count(tokens)} in all, {format_count(3 * forward * tokens)} FLOPs",
    )
