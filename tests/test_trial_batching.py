"""Trial batching: which trials share a program, how they are divided into chunks, and memory estimates."""

import dataclasses
import io
import itertools
import math
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import pytest
from conftest import other_value, small_config, small_tree
from hypothesis import given
from hypothesis import strategies as some
from rich.console import Console

from rustgpt_jax.config.schema import FIELDS, Config, get_field, get_path, partition, replace_paths, stages
from rustgpt_jax.data.preprocess import AssetCache
from rustgpt_jax.errors import UserError
from rustgpt_jax.model.flops import total_bytes
from rustgpt_jax.sharding.hardware_specs import Machine
from rustgpt_jax.sweeps import trial_batching
from rustgpt_jax.sweeps.sweep_command import UTILIZATION, describe_duration, estimate_duration, print_preview
from rustgpt_jax.sweeps.trial_batching import (
    Chunk,
    Cost,
    Plan,
    ShapeClass,
    estimate_cost,
    get_class_key,
    group_by_shape,
    make_plan,
)
from rustgpt_jax.sweeps.trials import Trial, make_trials
from rustgpt_jax.training.memory_estimate import batch_shapes, state_shapes, step_bytes
from rustgpt_jax.training.train_step import compiled_train_steps

# Which trials share a program.

# Knobs that switch off a part of the program at 0.
SWITCHES = [path for path in FIELDS if get_field(path).metadata["static_if_zero"]]
BEFORE = dict.fromkeys(SWITCHES, 0.1)
PROGRAM_GROUPS = ("model", "optimizer", "schedule", "training", "mesh")


def selects_a_program(path: str) -> bool:
    """Return whether another value of a knob needs another compiled program."""
    is_number = get_field(path).metadata["traced"]
    return path == "data.seq_len" or (path.split(".")[0] in PROGRAM_GROUPS and not is_number)


@pytest.mark.parametrize("group", sorted({path.split(".")[0] for path in FIELDS}))
def test_traced_knobs_share_a_program_and_static_knobs_do_not(group: str) -> None:
    before = small_config(**BEFORE)
    for path in [path for path in FIELDS if path.split(".")[0] == group]:
        after = replace_paths(before, {path: other_value(get_path(before, path))})
        assert (get_class_key(before) != get_class_key(after)) == selects_a_program(path), path


@pytest.mark.parametrize("path", SWITCHES)
def test_a_knob_at_zero_selects_another_program(path: str) -> None:
    on, other, off = (get_class_key(small_config(**{path: value})) for value in (0.25, 0.5, 0.0))
    assert on == other != off


def test_stages_are_part_of_the_program() -> None:
    def key(**overrides: Any) -> Any:
        stages = ({"name": "pretrain"}, {"name": "instruct"})
        tree = small_tree(stages=stages)
        (trial,) = make_trials(tree, [{path.replace("__", "."): value for path, value in overrides.items()}])
        return get_class_key(trial.config)

    alone, both = get_class_key(small_config()), key()
    assert len(both) == 2 and both != alone and both[0] == alone[0]
    assert key(stages__instruct__optimizer__learning_rate=0.5, stages__pretrain__training__steps=9) == both
    assert key(stages__instruct__data__seq_len=16) != both
    assert key(stages__instruct__schedule__name="linear") != both


def test_shape_classes_depend_on_the_vocabulary_of_the_tokenizer() -> None:
    tree = small_tree(**{"model.vocab_size": None, "tokenizer.vocab_size": None, "tokenizer.name": "byte"})
    knobs: list[dict[str, Any]] = [{}, {"seed": 1}, {"tokenizer.name": "char"}, {"tokenizer.name": "char", "seed": 1}]
    knobs += [{"data.max_documents": 9}, {"tokenizer.name": "char", "data.max_documents": 9}]
    trials = make_trials(tree, knobs)
    classes = group_by_shape(trials, AssetCache())
    # Bytes are bytes in every text; the characters of a few documents are fewer than those of all.
    members = [[trials.index(trial) for trial in each.trials] for each in classes]
    assert members == [[0, 1, 4], [2, 3], [5]]
    sizes = [each.config.model.vocab_size for each in classes]
    assert sizes[0] is not None and sizes[0] >= 256 and len(set(sizes)) == 3


class FixedVocabulary(AssetCache):
    """An asset cache without tokenizers."""

    def fill_vocab_size(self, config: Config) -> Config:
        """Set the vocabulary size to 61 if it is unknown."""
        size = config.model.vocab_size or 61
        return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))


GRID = make_trials(
    small_tree(**{"model.vocab_size": None}),
    (
        {"seed": seed, "model.d_model": width, "model.vocab_size": size}
        for seed, width, size in itertools.product((0, 1, 2), (16, 32), (None, 61, 62))
        if (seed, size) != (2, 62)
    ),
)
COST = Cost(parameters=10, state_bytes=100, working_bytes=50, step_flops=1e6, total_flops=1e7, tokens=1000)


@given(some.lists(some.sampled_from(GRID), unique=True))
@hypothesis.settings(max_examples=25)
def test_shape_classes_partition_the_trials_in_order(trials: list[Trial]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial_batching, "estimate_cost", lambda config: COST)
        classes = group_by_shape(trials, FixedVocabulary())
    by_hand: dict[Any, list[Trial]] = {}
    for trial in trials:
        model = trial.config.model
        by_hand.setdefault((model.d_model, model.vocab_size or 61), []).append(trial)
    assert [list(each.trials) for each in classes] == list(by_hand.values())
    for each in classes:
        assert each.config == FixedVocabulary().fill_vocab_size(each.trials[0].config)


# Chunks.

SMALL = small_config()


def a_class(n_trials: int, cost: Cost = COST) -> ShapeClass:
    """Make a shape class."""
    trials = tuple(Trial(f"{number:08x}", {"seed": number}, SMALL) for number in range(n_trials))
    return ShapeClass(trials, SMALL, cost)


@given(some.data(), some.integers(1, 40), some.integers(1, 9), some.none() | some.integers(1, 9))
def test_chunks_partition_a_class_regardless_of_which_trials_are_wanted(
    data: Any, n_trials: int, width: int, until: int | None
) -> None:
    made = Plan(a_class(n_trials), "fused", width, "")
    ids = [trial.id for trial in made.shape_class.trials]
    wanted = data.draw(some.lists(some.sampled_from([*ids, "elsewhere"]), unique=True))
    chunks = made.chunks(iter(wanted), until)
    assert [name for chunk in chunks for name in chunk.trials] == [name for name in ids if name in wanted]
    place = {name: number // width for number, name in enumerate(ids)}
    assert all(chunk.trials for chunk in chunks)
    # Grouping does not depend on which trials are wanted.
    assert [{place[name] for name in chunk.trials} for chunk in chunks] == [
        {number} for number in sorted({place[name] for name in wanted if name in place})
    ]
    for chunk in chunks:
        assert (len(chunk.trials) <= chunk.width, chunk.width, chunk.mode, chunk.until) == (True, width, "fused", until)
        assert Chunk.from_json(chunk.to_json()) == chunk


# Modes.

CPU = Machine("cpu", 2, 8e9, 0.0)
GPU = Machine("gpu", 1, 80e9, 4e14)
TINY_GPU = Machine("gpu", 1, 1000.0, 4e14)
SHORT, LONG = COST, dataclasses.replace(COST, step_flops=1e13)

# Machine, trials, cost, mode asked for -> mode, width, and words of the reason.
CHOICES = {
    "a CPU": (CPU, 8, SHORT, "auto", "exact", 4, "CPU: one trial on each of 2 cores"),
    "a CPU, few": (CPU, 3, LONG, "auto", "exact", 2, "CPU"),
    "a CPU, many": (CPU, 100, LONG, "auto", "exact", 4, "; 4 at a time, because a stop waits for all of them"),
    "a CPU, one": (CPU, 1, SHORT, "auto", "exact", 1, "CPU"),
    "short steps": (GPU, 100, SHORT, "auto", "fused", 100, "takes 2.5e-06 ms at peak and leaves the device idle"),
    "long steps": (GPU, 3, LONG, "auto", "exact", 3, "takes 25 ms at peak and saturates the device"),
    "long steps, many": (GPU, 30, LONG, "auto", "exact", 4, "; 4 at a time, because a stop waits for all of them"),
    "one trial": (GPU, 1, SHORT, "auto", "solo", 1, "no more trials than devices"),
    "a device each": (Machine("gpu", 8, 8e9, 4e14), 8, SHORT, "auto", "solo", 1, "no more trials than devices"),
    "shared out": (Machine("tpu", 4, 8e9, 4e14), 9, SHORT, "auto", "fused", 3, "idle"),
    # Of the 700 bytes to spend, a trial takes 250 fused, or 200 and all together 50 in exact mode.
    "little memory": (TINY_GPU, 9, SHORT, "auto", "fused", 2, "; 2 at a time, as memory allows"),
    "little memory, exact": (TINY_GPU, 9, LONG, "auto", "exact", 3, "; 3 at a time, as memory allows"),
    "no memory": (Machine("gpu", 1, 10.0, 4e14), 9, SHORT, "auto", "fused", 1, "; 1 at a time, as memory allows"),
    "fused as asked": (CPU, 8, LONG, "fused", "fused", 4, "as requested"),
    "exact as asked": (GPU, 3, SHORT, "exact", "exact", 3, "as requested"),
    "solo as asked": (GPU, 30, SHORT, "solo", "solo", 1, "as requested"),
}


@pytest.mark.parametrize("name", CHOICES)
def test_auto_mode_and_width_depend_on_the_machine(name: str) -> None:
    machine, n_trials, cost, asked, mode, width, reason = CHOICES[name]
    made = make_plan(a_class(n_trials, cost), machine, asked)
    assert (made.mode, made.width) == (mode, width)
    assert reason in made.reason
    # A limit is mentioned only if it applies.
    assert ("at a time" in made.reason) == ("at a time" in reason)
    if asked != "auto":
        assert made.reason == reason


@pytest.mark.parametrize("mode", ["auto", "fused", "exact"])
def test_explicit_width_is_used(mode: str) -> None:
    for width in (1, 3, 6):
        made = make_plan(a_class(6), TINY_GPU, mode, width)
        assert made.width == width and "at a time" not in made.reason
    # No width beyond the trials of a device.
    assert make_plan(a_class(6), CPU, mode, 8).width == 3
    assert make_plan(a_class(6), CPU, "solo", 8).width == 1


def test_unknown_mode_is_an_error() -> None:
    with pytest.raises(UserError, match="--mode: unknown 'fuse'. Did you mean 'fused'?"):
        make_plan(a_class(2), CPU, "fuse")


@given(
    some.builds(
        Cost,
        parameters=some.just(1),
        state_bytes=some.integers(1, 1000),
        working_bytes=some.integers(1, 1000),
        step_flops=some.sampled_from([1e6, 1e13]),
        total_flops=some.just(1.0),
        tokens=some.just(1),
    ),
    some.sampled_from(["cpu", "gpu"]),
    some.integers(1, 4),
    some.integers(1, 20_000),
    some.integers(1, 30),
    some.sampled_from(["auto", "fused", "exact", "solo"]),
)
@hypothesis.settings(max_examples=100)
def test_width_is_the_largest_useful_one_that_fits(
    cost: Cost, platform: str, n_devices: int, memory: int, n_trials: int, mode: str
) -> None:
    # Three quarters of a whole number are exact, so nothing here is decided by rounding.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial_batching, "MEMORY_SHARE", 0.75)
        made = make_plan(a_class(n_trials, cost), Machine(platform, n_devices, memory, 4e14), mode)

    def of_use(width: int) -> bool:
        share = math.ceil(n_trials / n_devices)
        return width <= {"fused": share, "exact": min(share, trial_batching.MAX_EXACT), "solo": 1}[made.mode]

    def fits(width: int) -> bool:
        together = 2 * width * cost.state_bytes + (width if made.mode == "fused" else 1) * cost.working_bytes
        assert dataclasses.replace(made, width=width).memory == together
        return together <= 0.75 * memory

    assert made.width == max([1, *(width for width in range(1, n_trials + 1) if of_use(width) and fits(width))])
    assert made.memory <= 0.75 * memory or made.width == 1


# Cost.


def test_cost_is_summed_over_the_stages() -> None:
    def at(**changes: Any) -> Cost:
        return estimate_cost(small_config(**changes))

    one = at()
    assert one.tokens == 8 * 4 * 32 and one.total_flops == 8 * one.step_flops
    two = at(stages=({"name": "a", "training": {"steps": 3}}, {"name": "b", "data": {"seq_len": 16}}))
    assert two.tokens == 3 * 4 * 32 + 8 * 4 * 16
    assert 3 * two.step_flops < two.total_flops < one.total_flops * 11 / 8
    assert (two.state_bytes, two.working_bytes, two.step_flops) == (
        one.state_bytes,
        one.working_bytes,
        one.step_flops,
    )
    # Parameters and two moments of each, a step here and one in the optimizer.
    assert 0 <= one.state_bytes - 3 * 4 * one.parameters <= 64


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_memory_is_estimated_within_a_factor_of_two() -> None:
    # SGD compiles in half the time.
    size = {"training.batch_size": 16, "training.grad_accum_steps": 4, "model.vocab_size": 2000}
    config = small_config(**size, **{"optimizer.name": "sgd", "model.remat": "full", "model.dropout": 0.1})
    window, calls = config.model.context_length, config.training.steps_per_jit_call
    static, hparams = partition(config)
    batches = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((calls, *leaf.shape), leaf.dtype),
        batch_shapes(config.training.batch_size, window),
    )
    state, whole = state_shapes(config), jax.ShapeDtypeStruct((), jnp.int32)
    program = compiled_train_steps.lower(static, state, batches, whole, hparams, whole).compile()
    needed = program.memory_analysis()
    assert needed is not None
    assert 0.5 < step_bytes(config, window) / needed.temp_size_in_bytes < 2
    assert total_bytes(state) <= needed.output_size_in_bytes <= 1.1 * total_bytes(state) + 1000


# The preview.


@pytest.mark.parametrize("width", [60, 100, 160])
def test_preview_lists_all_trials_and_totals(width: int) -> None:
    knobs = [{"seed": seed, "model.d_model": size} for size in (16, 32) for seed in (1, 2, 3)]
    trials = make_trials(small_tree(), knobs)
    console = Console(file=io.StringIO(), width=width)
    print_preview(trials, FixedVocabulary(), CPU, "auto", None, console)
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    lines = shown.splitlines()
    assert all(len(line) <= width for line in lines)
    for number, trial in enumerate(trials):
        (line,) = [line for line in lines if line.startswith(trial.id)]
        assert line.split() == [trial.id, str(1 + number // 3), f"seed={1 + number % 3},", trial_width(trial)]
    assert lines[0].startswith("6 trials, 2 programs to compile, ")
    words = " ".join(shown.split())
    tokens = sum(stages(trial.config)[-1].end_step * 4 * 32 for trial in trials)
    assert f"6 trials, 2 programs to compile, {tokens / 1000:.3g}K tokens" in words and "Nothing was run." in words


def test_duration_is_that_of_all_devices_or_of_the_longest_program() -> None:
    trials = make_trials(small_tree(), [{"seed": seed} for seed in range(8)])
    (shape_class,) = group_by_shape(trials, FixedVocabulary())
    flops = shape_class.cost.total_flops
    # At the assumed utilization, a device takes 100 s for a trial.
    machine = Machine("gpu", 4, 1e12, flops / 100 / UTILIZATION)
    for mode, width, seconds in (("solo", None, 200), ("exact", 1, 200), ("exact", 2, 200), ("exact", 8, 200)):
        duration = estimate_duration([make_plan(shape_class, machine, mode, width)], machine)
        assert (duration.seconds, duration.device_seconds) == pytest.approx((seconds, 800))
    one = [dataclasses.replace(make_plan(shape_class, machine, "exact"), width=8)]
    assert estimate_duration(one, machine).seconds == pytest.approx(800)
    assert estimate_duration([make_plan(shape_class, machine, "exact", 1)], machine, 40).seconds == pytest.approx(1000)
    described = describe_duration(estimate_duration(one, machine), machine)
    assert described.startswith("About 0.22 hours (13m20s) on the 4 GPUs of this machine, 0.22 GPU-hours, if ")
    assert "at least 0.067 hours at that peak" in described


def trial_width(trial: Trial) -> str:
    """Format a trial's width as an override."""
    return f"model.d_model={trial.config.model.d_model}"
