"""Hooks of the training loop: log metrics, evaluate, and save checkpoints."""

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple, Protocol

import jax
import numpy as np

from rustgpt_jax.config.schema import StaticConfig, get_path, partition
from rustgpt_jax.data.preprocess import StageData
from rustgpt_jax.evaluation.loss import evaluate
from rustgpt_jax.inference.text_generator import TextGenerator, generate_text, select_weight_layout
from rustgpt_jax.model.flops import training_flops_per_token
from rustgpt_jax.model.transformer import Params
from rustgpt_jax.sharding.sharding_plan import ShardingPlan
from rustgpt_jax.tokenizers import Tokenizer
from rustgpt_jax.tracking.console import format_duration
from rustgpt_jax.tracking.metric_writer import HPARAMS, RunWriter, iter_metrics
from rustgpt_jax.training.checkpointing import Checkpoints
from rustgpt_jax.training.optimizers import EVAL_PARAMS, get_eval_params
from rustgpt_jax.training.train_step import Metrics, TrainState, fetch_opt_state
from rustgpt_jax.workdir.run_dir import RunDir

# `train_step` does not apply an update if one of these metrics is not finite.
MUST_BE_FINITE = ("loss", "gradient_norm", "update_norm")

compiled_eval_params = jax.jit(get_eval_params, static_argnums=0)


class PendingMetrics(NamedTuple):
    """Metrics of the `n_steps` steps after `first_step`, which the device may still be computing.

    `read` waits for them and returns them as NumPy arrays with at least `n_steps` elements.
    """

    first_step: int
    n_steps: int
    read: Callable[[], Metrics]


class NonFiniteStep(NamedTuple):
    """A step whose loss, gradient or update is not finite, and the number of such steps in the run so far."""

    step: int
    n_nonfinite: int


class EvaluationStopped(Exception):
    """Raised when a stop request interrupts an evaluation."""


class ProgressSink(Protocol):
    """An interface that shows the progress of a run."""

    def update(self, step: int, values: Mapping[str, float], stage: str) -> None:
        """Show the metrics of a step."""

    def update_evaluation(self, done: int, total: int) -> None:
        """Show that `done` of the `total` batches of an evaluation are done."""

    def message(self, text: str) -> None:
        """Print a message."""


@dataclass
class HookContext:
    """The argument passed to each hook. Hooks run in order until one returns False.

    They are called after a step with an evaluation or checkpoint, and at the end of a stage or run.

    Attributes:
        step: The number of steps done.
        state: The state after the step.
        is_stop_requested: Returns whether a stop is requested.
        has_pending_evaluation: Whether the evaluation after this step was stopped earlier and has to be repeated.
        is_best: Whether this state has the lowest `logging.best_metric` of the stage. Set by `Evaluate`.
        is_evaluation_stopped: Whether the evaluation was stopped. Set by `Evaluate`.
    """

    step: int
    state: TrainState
    is_stop_requested: Callable[[], bool]
    has_pending_evaluation: bool = False
    is_best: bool = False
    is_evaluation_stopped: bool = False


@dataclass
class LogMetrics:
    """A hook that writes the metrics of a stage, and detects steps that are not finite.

    Metrics are read one call late, so that the device never waits for the host. At a step that is not finite, unless
    the config allows skipping it, `nonfinite_step` is set, and the metrics of later steps are not written.
    """

    data: StageData
    writer: RunWriter
    progress: ProgressSink
    plan: ShardingPlan
    seconds_per_step: dict[StaticConfig, float]
    pending: PendingMetrics | None = None
    nonfinite_step: NonFiniteStep | None = None

    def __post_init__(self) -> None:
        self._flops_per_token = training_flops_per_token(self.data.stage.config.model, self.data.seq_len)
        self._peak_flops = self.plan.peak_flops()
        stage = self.data.stage
        self._static, hparams = partition(stage.config)
        # With their exact values; those of the program are rounded to float32.
        self._hparams = {HPARAMS + path: get_path(stage.config, path) for path in hparams}
        self._first_logged = next(step for step in count(stage.first_step + 1) if stage.is_logged(step))
        self.restart_clock()

    def restart_clock(self) -> None:
        """Start timing the next call now."""
        # None if it is unknown when the device began the call.
        self._clock: float | None = time.perf_counter()

    def __call__(self, context: HookContext) -> bool:
        """Write all pending metrics. Returns False if a step is not finite."""
        del context
        self.flush()
        return self.nonfinite_step is None

    def on_call(self, pending: PendingMetrics, seconds: float) -> None:
        """Queue the metrics of a call that was just started, and write those of the previous call.

        The first call of a program takes `seconds` to trace and compile it, which is reported.
        """
        if self._static not in self.seconds_per_step:
            self.seconds_per_step[self._static] = math.inf
            self.progress.message(f"compiled the training step in {format_duration(seconds)}")
            # The device may have finished some of the steps by now.
            self._clock = None
        self.flush()
        self.pending = pending

    def flush(self) -> None:
        """Wait for the pending metrics and write them."""
        pending, self.pending = self.pending, None
        if pending is None or self.nonfinite_step is not None:
            return
        columns = pending.read().by_name()
        speed = self._speed(pending.n_steps)
        for index in range(pending.n_steps):
            step = pending.first_step + index + 1
            values = {name: column[index].item() for name, column in columns.items()} | speed
            is_bad = not all(math.isfinite(values[f"train/{name}"]) for name in MUST_BE_FINITE)
            n_bad, faults = values["train/faults"], self.data.stage.config.faults
            if is_bad and not (faults.nonfinite_policy == "skip" and n_bad <= faults.max_skipped):
                self.nonfinite_step = NonFiniteStep(step, n_bad)
            if is_bad or self.data.stage.is_logged(step):
                hparams = self._hparams if step == self._first_logged else {}
                self.writer.write(step, {"stage": self.data.stage.name, **values, **hparams})
            if index == pending.n_steps - 1 or self.nonfinite_step:
                self.progress.update(step, values, self.data.stage.name)
            if self.nonfinite_step:
                return

    def _speed(self, n_steps: int) -> dict[str, float]:
        now, began = time.perf_counter(), self._clock
        self._clock = now
        if began is None:
            return {}
        self.seconds_per_step[self._static] = (now - began) / n_steps
        tokens = n_steps * self.data.stage.config.training.batch_size * self.data.seq_len
        tokens_per_second = tokens / (now - began)
        return {
            "train/tokens_per_second": tokens_per_second,
            "train/flops_share": tokens_per_second * self._flops_per_token / self._peak_flops,
        }


@dataclass
class Evaluate:
    """A hook that evaluates on the validation split of a stage, and writes samples.

    Evaluations up to step `incomparable_until` had other batches or another `logging.best_metric` and do not count.
    """

    data: StageData
    run: RunDir
    tokenizer: Tokenizer
    log: LogMetrics
    incomparable_until: int = 0

    def __post_init__(self) -> None:
        # Other stages are evaluated on other text.
        self._metric = self.data.stage.config.logging.best_metric
        start = max(self.data.stage.first_step, self.incomparable_until)
        self._best_loss = min(self._read_metric(self._metric, start), default=np.inf)

    def _read_metric(self, name: str, start: int) -> list[float]:
        """Return the values of a metric after step `start` of the run, up to the end of the stage."""
        lines = iter_metrics(self.run.path, containing=json.dumps(name).encode())
        return [line[name] for line in lines if name in line and start < line["step"] <= self.data.stage.end_step]

    def is_due(self, step: int) -> bool:
        """Return whether to evaluate after a step."""
        return step % self.data.stage.config.logging.eval_every == 0 or step == self.data.stage.end_step

    def __call__(self, context: HookContext) -> bool:
        """Evaluate if it is due. Returns False if the evaluation was stopped, in which case nothing was written."""
        if not (self.is_due(context.step) or context.has_pending_evaluation):
            return True
        try:
            context.is_best = self.evaluate(context.state, context.step, context.is_stop_requested)
        except EvaluationStopped:
            context.is_evaluation_stopped = True
        return not context.is_evaluation_stopped

    def evaluate(self, state: TrainState, step: int, is_stop_requested: Callable[[], bool]) -> bool:
        """Evaluate a state and write samples. Returns whether its loss is the lowest of the stage so far.

        Raises:
            EvaluationStopped: `is_stop_requested` returned True. Nothing was written.
        """
        # The static half of the config, so that changing a hyperparameter recompiles nothing.
        static = partition(self.data.stage.config)[0]
        params = state.params
        if static.optimizer.name in EVAL_PARAMS:
            params = compiled_eval_params(static.optimizer, params, fetch_opt_state(static, state.opt_state))
        values = self._losses(params, is_stop_requested)
        if self._metric == "train/mean_loss":
            values |= self._mean_train_loss(step)
        is_best = values.get(self._metric, np.inf) < self._best_loss
        if values:
            self.log.writer.write(step, {"stage": self.data.stage.name, **values})
        if "valid/loss" in values:
            self.log.progress.message(
                f"step {step}  {self.data.stage.name}  validation loss {values['valid/loss']:.4f}"
                f"  perplexity {values['valid/perplexity']:.2f}  {values['valid/bits_per_byte']:.3f} bits per byte"
            )
        if is_best:
            self._best_loss = values[self._metric]
            best = {f"best/{name.removeprefix('valid/')}": value for name, value in values.items()}
            self.log.writer.write_summary({**best, "best/step": step})
        self._write_samples(params, step)
        self.log.restart_clock()
        return is_best

    def _losses(self, params: Params, is_stop_requested: Callable[[], bool]) -> dict[str, float]:
        config, plan, n_batches = self.data.stage.config, self.log.plan, self.data.n_validation_batches
        training = config.training

        def on_batch(done: int) -> None:
            self.log.progress.update_evaluation(done, n_batches)
            if is_stop_requested():
                raise EvaluationStopped

        rows = plan.local_rows(training.batch_size, self.data.seq_len)
        values = evaluate(
            params,
            config.model,
            (plan.shard_batch(batch, training.batch_size) for batch in self.data.validation_batches(rows)),
            self.data.store.split("valid").bytes_per_token,
            training.loss_chunk_size,
            training.grad_accum_steps,
            on_batch,
        )
        self.log.progress.update_evaluation(n_batches, n_batches)
        return values

    def _mean_train_loss(self, step: int) -> dict[str, float]:
        """Return the mean of the training losses logged since the previous evaluation, if there are any."""
        every = self.data.stage.config.logging.eval_every
        losses = self._read_metric("train/loss", max(self.data.stage.first_step, (step - 1) // every * every))
        return {"train/mean_loss": sum(losses) / len(losses)} if losses else {}

    def _write_samples(self, params: Params, step: int) -> None:
        config = self.data.stage.config
        prompts = config.logging.sample_prompts
        if not prompts:
            return
        generator = TextGenerator(params, config.model, self.tokenizer, self.data.is_dialogue)
        generator = generator.with_weight_layout(select_weight_layout(config.sampling))
        texts = generate_text(generator, [generator.encode_prompt(prompt) for prompt in prompts], config.sampling)
        with open(self.run.samples_file, "a", encoding="utf-8") as file:
            for prompt, text in zip(prompts, texts, strict=True):
                file.write(json.dumps({"step": step, "prompt": prompt, "text": text}) + "\n")
                self.log.progress.message(f"  {prompt} | {text}")
        self.log.writer.write_samples(step, list(zip(prompts, texts, strict=True)))


@dataclass(frozen=True)
class SaveCheckpoint:
    """A hook that saves the state if a checkpoint is due, after the best evaluation so far, and after the last step."""

    data: StageData
    checkpoints: Checkpoints
    last_step: int

    def is_due(self, step: int) -> bool:
        """Return whether a checkpoint is scheduled after a step."""
        return step % self.data.stage.config.logging.checkpoint_every == 0 or step == self.data.stage.end_step

    def __call__(self, context: HookContext) -> bool:
        """Start saving the state if it is due."""
        is_scheduled = self.is_due(context.step) or context.is_best
        if is_scheduled or context.step == self.last_step:
            self.checkpoints.save(context.state, context.step, context.is_best, is_scheduled)
        return True
