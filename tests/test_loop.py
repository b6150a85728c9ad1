"""Whole runs: resume is bit-exact after any stop or kill, and run folders are protected from misuse."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import hypothesis
import jax
import numpy as np
import pytest
from conftest import small_config
from hypothesis import strategies as st
from rich.console import Console

from rustgpt_jax.config.schema import Config, partition, replace_paths
from rustgpt_jax.errors import UserError
from rustgpt_jax.evaluation import loss
from rustgpt_jax.interop.convert import export_run
from rustgpt_jax.interop.gguf import export_gguf
from rustgpt_jax.process_setup import StopRequest
from rustgpt_jax.reproduce.recorded_run import RecordedRun
from rustgpt_jax.reproduce.run_diff import diff_data
from rustgpt_jax.tokenizers import save_tokenizer, train_tokenizer
from rustgpt_jax.tracking.metric_writer import read_metrics
from rustgpt_jax.training import hooks, loop, run_training
from rustgpt_jax.training.checkpointing import Checkpoints, read_metadata
from rustgpt_jax.training.load_model import load_model
from rustgpt_jax.training.train_step import TrainState, compiled_init_state
from rustgpt_jax.workdir.run_dir import RunDir, lock_run_dir

VOCABULARY = 300
TINY = {
    "tokenizer.name": "byte",
    "tokenizer.vocab_size": VOCABULARY,
    "model.vocab_size": VOCABULARY,
    "model.context_length": 16,
    "model.n_layers": 1,
    "model.d_model": 16,
    "model.attention.n_heads": 2,
    "model.dropout": 0.1,
    "training.steps": 10,
    "training.steps_per_jit_call": 3,
    "logging.log_every": 1,
    "logging.eval_every": 4,
    "logging.eval_batches": 2,
    "logging.checkpoint_every": 3,
    "logging.sample_prompts": ("Why?", "A"),
    "sampling.max_tokens": 4,
    "sampling.temperature": 1.0,
}
# Metrics that depend on the time.
TIMED = {"time", "train/tokens_per_second", "train/flops_share"}


pytestmark = pytest.mark.usefixtures("quick_codegen")


def tiny(**changes: Any) -> Config:
    return small_config(**(TINY | changes))


class Killed(BaseException):
    """Ends training as a kill does, without saving."""


class StopAtOnce(StopRequest):
    """A request to stop before the first step."""

    def __enter__(self) -> StopRequest:
        super().__enter__()
        signal.raise_signal(signal.SIGINT)
        return self


def killed(*_: Any) -> None:
    """Raise Killed."""
    raise Killed


@dataclass(frozen=True)
class Interruption:
    """The end of a process after a number of its steps, by a signal or by a kill."""

    steps: int
    is_kill: bool


def train(config: Config, path: Path, interruption: Interruption | None = None) -> tuple[bool, str]:
    """Train in this process. Returns whether the run is complete, and what it printed."""
    console = Console(file=StringIO(), width=200)
    done = 0

    def steps_then_interruption(*arguments: Any) -> Any:
        nonlocal done
        result = loop_steps(*arguments)
        done += int(arguments[3])
        if interruption and done >= interruption.steps:
            if interruption.is_kill:
                raise Killed
            signal.raise_signal(signal.SIGINT)
        return result

    loop_steps = loop.compiled_train_steps
    steps_then_interruption.lower = loop_steps.lower
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "compiled_train_steps", steps_then_interruption)
        patch.setattr(run_training, "draw_loss_curves", lambda folder: folder / "loss.png")
        if interruption == Interruption(0, is_kill=False):
            patch.setattr(run_training, "StopRequest", StopAtOnce)
        with suppress(Killed):
            status = run_training.train(config, path, {}, console)
            return status == 0, console.file.getvalue()
    return False, console.file.getvalue()


def stored_state(config: Config, path: Path, which: str = "last") -> TrainState:
    static, hparams = partition(config)
    like = jax.eval_shape(lambda: compiled_init_state(static, hparams))
    with Checkpoints(RunDir(path).checkpoints, config) as checkpoints:
        return checkpoints.restore(like, which)


def metrics(path: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name not in TIMED} for line in read_metrics(path)]


def programs(path: Path) -> set[tuple[str, str]]:
    """Return the stages and programs that the launches of a run recorded."""
    events = [json.loads(line) for line in (path / "events.jsonl").read_text().splitlines()]
    return {(event["stage"], event["stablehlo"]) for event in events if event["event"] == "program"}


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def assert_same_bits(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


# Interruptions.


def text_file() -> str:
    """Return a file whose path, which is part of the config, is the same in all runs of a session."""
    path = Path(os.environ["RUSTGPT_JAX_CACHE"]) / "small.txt"
    path.write_text("To be, or not to be, that is the question:\n" * 40, encoding="utf-8")
    return str(path)


CORPORA = {
    "facts": lambda: {"data.corpus": "facts"},
    "chat": lambda: {"data.corpus": "chat", "data.loss_mask": "assistant"},
    "files": lambda: {"data.corpus": "files", "data.paths": (text_file(),), "data.split": "tail"},
}


def config_of(corpus: str, tokenizer: str, accumulation: int, boundary: int | None) -> Config:
    """Return a run of ten steps. Those after `boundary`, if any, are a stage on dialogues with another rate."""
    changes = {"tokenizer.name": tokenizer, "training.grad_accum_steps": accumulation, **CORPORA[corpus]()}
    if boundary is not None:
        second = {"corpus": "chat", "paths": (), "split": "document", "loss_mask": "assistant"}
        changes["stages"] = (
            {"name": "first", "training": {"steps": boundary}},
            {
                "name": "second",
                "data": second,
                "training": {"steps": 10 - boundary},
                "optimizer": {"learning_rate": 0.01},
                "model": {"dropout": 0.2},
            },
        )
    return tiny(**changes)


def last_checkpoint(path: Path) -> int:
    return max((int(step.name) for step in RunDir(path).checkpoints.glob("[0-9]*")), default=0)


def append_torn_lines(path: Path) -> None:
    """Append what a killed process may have written after its last checkpoint."""
    run = RunDir(path)
    last = last_checkpoint(path)
    for file, line in (
        (run.metrics_file, {"stage": "x", "train/loss": 1.0}),
        (run.samples_file, {"prompt": "A", "text": "B"}),
    ):
        with open(file, "a", encoding="utf-8") as lines:
            lines.write(json.dumps({"step": last + 1, **line}) + "\n" + json.dumps({"step": last + 2, **line})[:-7])


def assert_resume_is_bit_exact(config: Config, interruptions: list[Interruption]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        straight, broken = Path(folder) / "straight", Path(folder) / "broken"
        assert train(config, straight)[0]
        for interruption in interruptions:
            is_complete, printed = train(config, broken, interruption)
            if interruption.is_kill and not is_complete:
                append_torn_lines(broken)
            elif not is_complete:
                assert f"Stopped by SIGINT at step {last_checkpoint(broken)}, saved." in printed
        assert train(config, broken)[0]

        assert_same_bits(stored_state(config, broken), stored_state(config, straight))
        assert_same_bits(stored_state(config, broken, "best"), stored_state(config, straight, "best"))
        assert metrics(broken) == metrics(straight)
        assert programs(broken) == programs(straight)
        assert [line["step"] for line in metrics(straight) if "train/loss" in line] == list(range(1, 11))
        for name in ("samples.jsonl", "tokenizer.json", "data.json"):
            assert (broken / name).read_bytes() == (straight / name).read_bytes(), name


@pytest.mark.parametrize(
    ("corpus", "tokenizer", "accumulation", "boundary", "interruptions"),
    [
        ("facts", "bpe", 1, None, [Interruption(5, is_kill=False)]),
        pytest.param(
            *("chat", "byte", 2, None, [Interruption(0, is_kill=False), Interruption(7, is_kill=True)]),
            marks=pytest.mark.long,
        ),
        ("files", "char", 1, 5, [Interruption(4, is_kill=False)]),
        ("facts", "word", 1, 5, [Interruption(5, is_kill=False), Interruption(2, is_kill=True)]),
    ],
)
def test_resume_is_bit_exact(
    corpus: str, tokenizer: str, accumulation: int, boundary: int | None, interruptions: list[Interruption]
) -> None:
    assert_resume_is_bit_exact(config_of(corpus, tokenizer, accumulation, boundary), interruptions)


@pytest.mark.long
@hypothesis.settings(max_examples=6)
@hypothesis.given(
    corpus=st.sampled_from(sorted(CORPORA)),
    tokenizer=st.sampled_from(["word", "char", "byte", "bpe"]),
    accumulation=st.sampled_from([1, 2]),
    boundary=st.none() | st.integers(2, 8),
    interruptions=st.lists(st.builds(Interruption, st.integers(0, 9), st.booleans()), min_size=1, max_size=3),
)
def test_resume_is_bit_exact_for_any_interruptions(
    corpus: str, tokenizer: str, accumulation: int, boundary: int | None, interruptions: list[Interruption]
) -> None:
    jax.config.update("jax_disable_most_optimizations", False)
    assert_resume_is_bit_exact(config_of(corpus, tokenizer, accumulation, boundary), interruptions)


@pytest.mark.parametrize(
    ("step", "boundary", "best_metric"),
    # A step without a scheduled checkpoint, the last step of a stage, which has one, and the end of the run.
    [
        (4, None, "train/mean_loss"),
        pytest.param(3, 3, "valid/loss", marks=pytest.mark.slow),
        pytest.param(10, None, "valid/loss", marks=pytest.mark.slow),
    ],
)
def test_resume_after_a_stop_during_evaluation_is_bit_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, boundary: int | None, best_metric: str
) -> None:
    config = replace_paths(config_of("facts", "byte", 1, boundary), {"logging.best_metric": best_metric})
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert train(config, straight)[0]
    values = {line["step"]: line[best_metric] for line in metrics(straight) if line.get(best_metric)}
    last_stage = {step: value for step, value in values.items() if step > (boundary or 0)}
    assert int(stored_state(config, straight, "best").step) == min(last_stage, key=last_stage.__getitem__)
    sums = loss.eval_loss_sums

    def first_batch_then_signal(*arguments: Any) -> Any:
        if max(line["step"] for line in metrics(broken)) == step:
            signal.raise_signal(signal.SIGTERM)
        return sums(*arguments)

    monkeypatch.setattr(loss, "eval_loss_sums", first_batch_then_signal)
    # The second launch is stopped in the same evaluation again.
    for _ in range(2):
        is_complete, printed = train(config, broken)
        assert not is_complete and f"Stopped by SIGTERM at step {step}, saved." in printed
        assert last_checkpoint(broken) == step
        assert not [line for line in metrics(broken) if line["step"] == step and "valid/loss" in line]
    monkeypatch.setattr(loss, "eval_loss_sums", sums)
    # A kill after part of the evaluation was written.
    with monkeypatch.context() as patch:
        patch.setattr(hooks, "generate_text", killed)
        train(config, broken)
    assert train(config, broken)[0]
    assert "is complete" in train(config, broken)[1]
    assert_same_bits(stored_state(config, broken), stored_state(config, straight))
    assert_same_bits(stored_state(config, broken, "best"), stored_state(config, straight, "best"))
    assert metrics(broken) == metrics(straight)
    assert (broken / "samples.jsonl").read_bytes() == (straight / "samples.jsonl").read_bytes()
    checkpoints = [RunDir(run).checkpoints for run in (broken, straight)]
    regular = [
        {each.name: read_metadata(folder, int(each.name))["is_scheduled"] for each in folder.glob("[0-9]*")}
        for folder in checkpoints
    ]
    assert regular[0] == regular[1]


# Run folders.


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run. Tests must not change it."""
    path = tmp_path_factory.mktemp("finished") / "run"
    assert train(tiny(), path)[0]
    return path


def test_training_a_complete_run_changes_nothing(finished: Path) -> None:
    before = contents(finished)
    is_complete, printed = train(tiny(), finished)
    assert is_complete and "is complete: 10 steps" in printed
    assert contents(finished) == before


def test_training_with_another_config_is_refused(finished: Path) -> None:
    before = contents(finished)
    with pytest.raises(
        UserError, match="another config: seed is 0 in the run and 3 in this config. Choose another --run folder"
    ):
        train(tiny(seed=3), finished)
    assert contents(finished) == before


def test_a_locked_run_is_refused(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    with lock_run_dir(run):
        before = contents(run)
        with pytest.raises(UserError, match=f"is in use: process {os.getpid()} on .* is training in it"):
            train(tiny(), run)
        assert contents(run) == before


def test_a_prompt_longer_than_the_context_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="config.logging.sample_prompts"):
        train(tiny(**{"logging.sample_prompts": ("Why is the sky blue?",)}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_calls_end_at_evaluations_and_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []

    def counted(*arguments: Any) -> Any:
        counts.append(int(arguments[3]))
        return steps(*arguments)

    steps = loop.compiled_train_steps
    counted.lower = steps.lower
    monkeypatch.setattr(loop, "compiled_train_steps", counted)
    train(tiny(**{"logging.eval_every": 4, "logging.checkpoint_every": 9}), tmp_path)
    # Calls have one step until the duration of a step is known.
    assert counts == [1, 1, 1, 1, 3, 1, 1, 1]


def test_stages_have_their_own_data_schedule_and_hyperparameters(tmp_path: Path) -> None:
    assert train(config_of("facts", "byte", 1, 5), tmp_path)[0]
    lines = [line for line in metrics(tmp_path) if "train/loss" in line]
    assert [line["stage"] for line in lines] == ["first"] * 5 + ["second"] * 5
    rates = [line["train/learning_rate"] for line in lines]
    # Each schedule starts with a warmup of two steps.
    warm = [1 / 3, 2 / 3, 1]
    assert rates[:3] == pytest.approx([1e-3 * share for share in warm])
    assert rates[5:8] == pytest.approx([1e-2 * share for share in warm])
    learned = [line["train/learned_tokens"] for line in lines]
    assert set(learned[:5]) == {4 * 16}
    assert 0 < sum(learned[5:]) < 5 * 4 * 16


# The best checkpoint.


def scripted(path: Path, losses: dict[int, float]) -> Any:
    """Return an `evaluate` that gives these losses at these steps."""

    def evaluate(*_: Any) -> dict[str, float]:
        step = max(line["step"] for line in read_metrics(path) if "train/loss" in line)
        return {"valid/loss": losses[step], "valid/perplexity": 0.0, "valid/bits_per_byte": 0.0}

    return evaluate


EVERY_TWO = {"logging.eval_every": 2, "logging.checkpoint_every": 2, "logging.sample_prompts": ()}


@pytest.mark.parametrize("interruptions", [[], [Interruption(4, is_kill=False)], [Interruption(5, is_kill=True)]])
def test_best_checkpoint_has_the_lowest_validation_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interruptions: list[Interruption]
) -> None:
    config = tiny(**EVERY_TWO)
    monkeypatch.setattr(hooks, "evaluate", scripted(tmp_path, {2: 3.0, 4: 2.0, 6: math.nan, 8: 2.5, 10: 4.0}))
    for interruption in interruptions:
        train(config, tmp_path, interruption)
    assert train(config, tmp_path)[0]
    best = stored_state(config, tmp_path, "best")
    assert best.step == 4
    # The state of the same run stopped at step 4.
    other = tmp_path / "other"
    monkeypatch.setattr(hooks, "evaluate", lambda *_: {})
    train(config, other, Interruption(4, is_kill=False))
    assert_same_bits(best, stored_state(config, other))


def test_best_checkpoint_is_of_the_last_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    halves = ({"name": "a", "training": {"steps": 4}}, {"name": "b", "training": {"steps": 6}})
    config = tiny(**EVERY_TWO, stages=halves)
    monkeypatch.setattr(hooks, "evaluate", scripted(tmp_path, {2: 1.0, 4: 1.5, 6: 3.0, 8: 2.5, 10: 4.0}))
    assert train(config, tmp_path)[0]
    assert stored_state(config, tmp_path, "best").step == 8


# Many devices.

ON_DEVICES = """
import sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
import jax
jax.config.update("jax_disable_most_optimizations", True)
from rich.console import Console
from test_loop import TINY, loop, run_training, small_config
from rustgpt_jax.errors import UserError
assert jax.device_count() == 8
steps = loop.compiled_train_steps

def reporting(static, state, batches, *others):
    table, tokens = state.params["embedding"]["table"], batches.tokens_BT
    print(table.sharding.is_fully_replicated, tokens.shape, tokens.addressable_shards[0].data.shape)
    return steps(static, state, batches, *others)

reporting.lower = steps.lower
loop.compiled_train_steps = reporting
for batch_size, accumulation in ((12, 1), (8, 2), (16, 2)):
    changes = {{"training.batch_size": batch_size, "training.grad_accum_steps": accumulation, "training.steps": 3}}
    try:
        run_training.train(small_config(**(TINY | changes)), Path(sys.argv[1]), {{}}, Console(stderr=True))
    except UserError as error:
        print(error)
"""


@pytest.mark.slow
@pytest.mark.long
def test_eight_devices_give_the_same_losses_as_one(tmp_path: Path) -> None:
    tests = Path(__file__).parent
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run(
        [sys.executable, "-c", ON_DEVICES.format(root=str(tests.parent), tests=str(tests)), str(tmp_path / "eight")],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    # The first calls are of one step, and all have the same shapes.
    assert list(dict.fromkeys(done.stdout.splitlines())) == [
        "config.training.batch_size=12 in 1 microbatches cannot be divided equally among 8 devices; "
        "the nearest batch size that can is 16.",
        "config.training.batch_size=8 in 2 microbatches cannot be divided equally among 8 devices; "
        "the nearest batch size that can is 16.",
        "True (3, 16, 16) (3, 2, 16)",
    ]

    config = tiny(**{"training.batch_size": 16, "training.grad_accum_steps": 2, "training.steps": 3})
    assert train(config, tmp_path / "one")[0]
    eight, one = metrics(tmp_path / "eight"), metrics(tmp_path / "one")
    assert [line["step"] for line in eight] == [line["step"] for line in one]
    for ours, theirs in zip(eight, one, strict=True):
        for name in ("train/loss", "valid/loss", "train/gradient_norm"):
            assert ours.get(name) == pytest.approx(theirs.get(name), abs=1e-5)


# Files of a run folder that were damaged or replaced.


def test_replaced_tokenizer_is_refused(finished: Path, tmp_path: Path) -> None:
    run = RunDir(Path(shutil.copytree(finished, tmp_path / "run")))
    other = train_tokenizer(tiny(**{"tokenizer.name": "char"}).tokenizer, ["some other text"])
    save_tokenizer(other, run.tokenizer_file)
    for use in (
        lambda: load_model(run.path),
        lambda: train(tiny(), run.path),
        lambda: RecordedRun(run.path, Console(quiet=True)),
        lambda: export_run(run.path, tmp_path / "out", "last", None, print),
        lambda: export_gguf(run.path, tmp_path / "out.gguf", "last", None, print),
    ):
        with pytest.raises(UserError, match=r"tokenizer.json is not the tokenizer of this run: its SHA-256 is"):
            use()


@pytest.mark.parametrize(
    "content", ["null", "[]", "5", "[null]", '[{"stage": 1}]', '[{"n_dialogues": 0}]', "[" * 10_000]
)
def test_damaged_data_record_is_an_error(finished: Path, tmp_path: Path, content: str) -> None:
    run = RunDir(Path(shutil.copytree(finished, tmp_path / "run")))
    run.data_file.write_text(content)
    for use in (lambda: load_model(run.path), lambda: train(tiny(), run.path), lambda: diff_data(run, run)):
        if content == "[]":
            continue
        with pytest.raises(UserError, match=r"data.json is damaged"):
            use()


def test_edited_config_is_refused(finished: Path, tmp_path: Path) -> None:
    run = RunDir(Path(shutil.copytree(finished, tmp_path / "run")))
    record = json.loads(run.config_file.read_bytes())
    record["config"]["optimizer"]["learning_rate"] *= 2
    run.config_file.write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"config.json was changed after the run began: its config has the hash"):
        load_model(run.path)
    # The mesh is not part of the hash.
    record = json.loads((finished / "config.json").read_bytes())
    record["config"]["mesh"]["data"] = 1
    run.config_file.write_text(json.dumps(record))
    load_model(run.path)


def test_metrics_lines_without_a_stage_do_not_prevent_resume(finished: Path, tmp_path: Path) -> None:
    config, run = tiny(), tmp_path / "run"
    train(config, run, Interruption(7, is_kill=False))
    file = RunDir(run).metrics_file
    file.write_text(file.read_text().replace('"stage"', '"stag"', 3))
    assert train(config, run)[0]
    assert_same_bits(stored_state(config, run, "best"), stored_state(config, finished, "best"))
