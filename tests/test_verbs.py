"""The verbs that list and explain: `explain` with and without --program, `configs`, `runs`, `components` and `data`."""

from io import StringIO
from typing import Any

import pytest
from conftest import small_config
from rich.console import Console

from rustgpt_jax.config.schema import flatten
from rustgpt_jax.model.flops import training_flops_per_token
from rustgpt_jax.planning.program_costs import (
    BACKWARD,
    FORWARD,
    RECOMPUTED,
    count_program_costs,
    lower_decode_step,
    lower_train_step,
    parse_scopes,
)
from rustgpt_jax.planning.report import print_config_summary, summarize_config

# explain --program.

SCOPES = {
    "jit(train_step)/jvp(embedding)": ("embedding", FORWARD),
    "jit(train_step)/jvp(embedding)/positions/LearnedPositions": ("positions/LearnedPositions", FORWARD),
    "jit(train_step)/transpose(jvp(blocks))/while/body/closed_call/0/Block/mixer/query": (
        "blocks/0/mixer/query",
        BACKWARD,
    ),
    "jit(train_step)/jvp(blocks)/3/Block/Block._norm/mixer_norm/3/Block/Block._norm/mixer_norm/checkpoint": (
        "blocks/3/mixer_norm",
        FORWARD,
    ),
    "jit(f)/transpose(jvp(blocks))/while/body/checkpoint/rematted_computation/0/Block/feedforward/up/jit(silu)": (
        "blocks/0/feedforward/up",
        RECOMPUTED,
    ),
    "jit(train_step)/0/Block/mixer/norm": ("blocks/0/mixer/norm", FORWARD),
    "jit(train_step)/jvp(loss)/while/body/transpose(jvp(logits))/BTD,DV->BTV": ("logits", BACKWARD),
    "jit(train_step)/jvp()": ("other", FORWARD),
}


@pytest.mark.parametrize("scopes", SCOPES)
def test_scopes_name_a_module_and_a_pass(scopes: str) -> None:
    assert parse_scopes(scopes.split("/")) == SCOPES[scopes]


PROGRAMS: dict[str, dict[str, Any]] = {
    # A chunked loss, gradient accumulation, and matrix products in the optimizer.
    "plain": {"training.loss_chunk_size": 32, "training.grad_accum_steps": 2, "optimizer.name": "muon"},
    "remat": {"model.n_layers": 3, "model.mixers": ("rg_lru", "attention"), "model.remat": "full"},
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_costs_by_module_agree_with_the_model_and_with_xla(name: str) -> None:
    config = small_config(**PROGRAMS[name])
    lowered = lower_train_step(config)
    costs, xla = count_program_costs(lowered), lowered.cost_analysis()
    tokens = config.training.batch_size * config.seq_len
    flops = costs.total().flops
    assert flops[FORWARD] + flops[BACKWARD] == tokens * training_flops_per_token(config.model, config.seq_len)
    assert flops[BACKWARD] == 2 * flops[FORWARD]
    assert (flops["update"] > 0) == (name == "plain") and (flops[RECOMPUTED] > 0) == (name == "remat")
    # XLA counts the body of each loop once.
    assert costs.once.total_flops + costs.once.other_flops == pytest.approx(xla["flops"], rel=0.01)
    assert costs.once.bytes == pytest.approx(xla["bytes accessed"], rel=0.05)
    # Almost everything belongs to a module, and the parts of a module are in it.
    assert costs.total("other").operations < 0.1 * costs.total().operations
    groups = 3 if name == "remat" else 1
    assert costs.total("blocks").total_flops == sum(costs.total(f"blocks/{i}").total_flops for i in range(groups))
    assert [path for path in costs.paths(1) if path != "other"] == [
        *("embedding", "blocks", "norm", "logits", "loss", "optimizer")
    ]


def test_costs_of_a_decoding_step_are_those_of_one_token_and_the_whole_cache() -> None:
    config = small_config()
    found = count_program_costs(lower_decode_step(config.model)).total()
    whole = training_flops_per_token(config.model, config.model.context_length) / 3
    assert found.total_flops == found.flops[FORWARD] == whole


def test_program_is_lowered_for_a_chip_that_is_not_here() -> None:
    lowered = lower_train_step(small_config(), "cuda")
    assert (
        count_program_costs(lowered).total().flops
        == count_program_costs(lower_train_step(small_config())).total().flops
    )


# explain.


def test_explain_shows_what_differs_from_the_defaults() -> None:
    config = small_config(**{"optimizer.b1": 0.8})
    for shows_all in (False, True):
        console = Console(file=StringIO(), width=200)
        summary = summarize_config(config, {"optimizer.b1": "mine.py", "optimizer.b2": "base"}, console)
        print_config_summary(summary, console, shows_all)
        lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
        fields = {line.split()[0]: line.split()[1:] for line in lines if line.startswith("config.")}
        assert fields["config.optimizer.b1"] == ["0.8", "mine.py"] and "config.model.d_model" in fields
        assert ("config.optimizer.b2" in fields) == shows_all
        n_rest = len(flatten(config)) - len(fields)
        assert any(f"{n_rest} other fields have their defaults" in line for line in lines) == (not shows_all)
        assert (n_rest == 0) == shows_all
