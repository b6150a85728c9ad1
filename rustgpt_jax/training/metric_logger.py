"""What a run tells while it trains: metrics, evaluations, samples and the best checkpoint."""

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import jax
import numpy as np

from rustgpt_jax.config.schema import Config, OptimizerConfig, StaticConfig, partition
from rustgpt_jax.data.preprocess import StageData
from rustgpt_jax.evaluation.perplexity import evaluate
from rustgpt_jax.inference.decode_params import weight_layout
from rustgpt_jax.inference.text_generator import TextGenerator, generate_text
from rustgpt_jax.model.flops import training_flops_per_token
from rustgpt_jax.model.transformer import Params
from rustgpt_jax.sharding.sharding_plan import ShardingPlan
from rustgpt_jax.tokenizers import Codec
from rustgpt_jax.tracking.formatting import duration
from rustgpt_jax.tracking.metric_writer import MetricsWriter, iter_metrics
from rustgpt_jax.training.optimizers import EVAL_PARAMS, get_eval_params
from rustgpt_jax.training.train_step import Metrics, State, fetch_opt_state
from rustgpt_jax.workdir.run_dir import RunDir

# What makes a step a fault where it is not finite, as in `train_step`.
MUST_BE_FINITE = ("loss", "gradient_norm", "update_norm")

compiled_eval_params = jax.jit(get_eval_params, static_argnums=0)


class Pending(NamedTuple):
    """Steps `first_step` to `first_step + n_steps`, whose metrics the device may still be computing.

    `read` waits for them and gives them as NumPy arrays of at least `n_steps` numbers each.
    """

    first_step: int
    n_steps: int
    read: Callable[[], Metrics]


class NonFiniteStep(NamedTuple):
    """A step whose loss, gradient or update was not finite, and how many of them there have been, itself included."""

    step: int
    n_skipped: int


class EvaluationStopped(Exception):
    """Raised to end an evaluation after a request to stop."""


class ProgressSink(Protocol):
    """What is told to a person while a run trains."""

    def update(self, step: int, values: Mapping[str, float], stage: str) -> None:
        """`step` steps of the run are done."""

    def evaluating(self, done: int, total: int) -> None:
        """`done` of the `total` batches of an evaluation are done."""

    def message(self, text: str) -> None:
        """Something happened."""


@dataclass
class Recorder:
    """Writes what happens in one stage of a run. Metrics are read one call late, so that the device never waits.

    A step that went wrong is the last thing that is written, unless it is to be skipped: `fault` tells of it.
    Validation losses up to the step `compares_after` are of other batches, and do not count for the best loss.
    """

    data: StageData
    run: RunDir
    tokenizer: Codec
    writer: MetricsWriter
    progress: ProgressSink
    plan: ShardingPlan
    seconds_per_step: dict[StaticConfig, float]
    compares_after: int = 0
    pending: Pending | None = None
    fault: NonFiniteStep | None = None

    def __post_init__(self) -> None:
        self._flops_per_token = training_flops_per_token(self.config.model, self.data.seq_len)
        self._peak_flops = self.plan.peak_flops()
        self._best_loss = self._best_loss_so_far()
        # When the device was last known to be at the beginning of a call; None where that is not known.
        self._clock: float | None = time.perf_counter()
        self._static = partition(self.data.stage.config)[0]

    def _best_loss_so_far(self) -> float:
        # Of this stage alone: stages measure different texts.
        stage, lines = self.data.stage, iter_metrics(self.run.path, containing=b'"valid/loss"')
        begin = max(stage.first_step, self.compares_after)
        own = (line for line in lines if begin < line["step"] <= stage.end_step)
        return min((line["valid/loss"] for line in own if "valid/loss" in line), default=np.inf)

    def on_first_call(self, static: StaticConfig, seconds: float) -> None:
        """Say once for each program how long its first call took to return: that is its tracing and compiling."""
        if static not in self.seconds_per_step:
            self.seconds_per_step[static] = math.inf
            self.progress.message(f"compiled the training step in {duration(seconds)}")
            # It may have made some of its steps by now.
            self._clock = None

    def on_call(self, pending: Pending) -> None:
        """Take the metrics of a call that has just begun, and write those of the one before."""
        self.flush()
        self.pending = pending

    def flush(self) -> None:
        """Write the metrics that are still to be written."""
        pending, self.pending = self.pending, None
        if pending is None or self.fault is not None:
            return
        metrics = pending.read()
        columns = {**metrics._asdict(), **metrics.signals}
        del columns["signals"]
        speed = self._speed(pending.n_steps)
        for index in range(pending.n_steps):
            step = pending.first_step + index + 1
            values = {f"train/{name}": column[index].item() for name, column in columns.items()} | speed
            is_bad = not all(math.isfinite(values[f"train/{name}"]) for name in MUST_BE_FINITE)
            if is_bad and not self._is_skipped(values["train/faults"]):
                self.fault = NonFiniteStep(step, values["train/faults"])
            if self._is_logged(step) or is_bad:
                self.writer.write(step, {"stage": self.data.stage.name, **values})
            if index == pending.n_steps - 1 or self.fault:
                self.progress.update(step, values, self.data.stage.name)
            if self.fault:
                return

    def _is_skipped(self, n_skipped: int) -> bool:
        faults = self.config.faults
        return faults.nonfinite_policy == "skip" and n_skipped <= faults.max_skipped

    def _is_logged(self, step: int) -> bool:
        return self.data.stage.is_logged(step)

    def _speed(self, count: int) -> dict[str, float]:
        now, began = time.perf_counter(), self._clock
        self._clock = now
        if began is None:
            return {}
        self.seconds_per_step[self._static] = (now - began) / count
        tokens = count * self.data.stage.config.training.batch_size * self.data.seq_len
        tokens_per_second = tokens / (now - began)
        return {
            "train/tokens_per_second": tokens_per_second,
            "train/flops_share": tokens_per_second * self._flops_per_token / self._peak_flops,
        }

    def evaluate(self, state: State, step: int, is_stopped: Callable[[], bool]) -> bool:
        """Evaluate on the stage's validation split and write samples.

        Args:
            state: The state after the step.
            step: The step.
            is_stopped: Called before each batch.

        Returns:
            Whether the loss is the lowest of the stage so far.

        Raises:
            Stopped: `is_stopped` returned True. Nothing of the evaluation has been written.
        """
        bytes_per_token = self.data.store.split("valid").bytes_per_token
        training = self.data.stage.config.training
        batch_size = training.batch_size
        rows = self.plan.local_rows(batch_size, self.data.seq_len)
        batches = (self.plan.shard_batch(batch, batch_size) for batch in self.data.validation_batches(rows))
        params = state.params
        if self._optimizer.name in EVAL_PARAMS:
            opt_state = fetch_opt_state(self._static, state.opt_state)
            params = compiled_eval_params(self._optimizer, params, opt_state)
        n_batches = self.data.n_validation_batches

        def progress(done: int) -> None:
            self.progress.evaluating(done, n_batches)
            if is_stopped():
                raise EvaluationStopped

        values = evaluate(
            params,
            self.config.model,
            batches,
            bytes_per_token,
            training.loss_chunk_size,
            training.grad_accum_steps,
            progress,
        )
        self.progress.evaluating(n_batches, n_batches)
        is_best = values.get("valid/loss", np.inf) < self._best_loss
        if values:
            self.writer.write(step, {"stage": self.data.stage.name, **values})
            self.progress.message(
                f"step {step}  {self.data.stage.name}  validation loss {values['valid/loss']:.4f}"
                f"  perplexity {values['valid/perplexity']:.2f}  {values['valid/bits_per_byte']:.3f} bits per byte"
            )
        if is_best:
            self._best_loss = values["valid/loss"]
        self._write_samples(params, step)
        self._clock = time.perf_counter()
        return is_best

    @property
    def config(self) -> Config:
        """The config of the stage."""
        return self.data.stage.config

    @cached_property
    def _optimizer(self) -> OptimizerConfig:
        # Without its numbers, so that none of them compiles anything.
        return partition(self.config)[0].optimizer

    def _write_samples(self, params: Params, step: int) -> None:
        prompts = self.config.logging.sample_prompts
        if not prompts:
            return
        author = TextGenerator(params, self.config.model, self.tokenizer, self.data.is_dialogue)
        author = author.with_weight_layout(weight_layout(self.config.sampling))
        texts = generate_text(author, [author.prompt(prompt) for prompt in prompts], self.config.sampling)
        with open(self.run.samples_file, "a", encoding="utf-8") as file:
            for prompt, text in zip(prompts, texts, strict=True):
                file.write(json.dumps({"step": step, "prompt": prompt, "text": text}) + "\n")
                self.progress.message(f"  {prompt} | {text}")
