"""The loop around the steps: all the effects of training, in the order of the run."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from tokenizers import Tokenizer

from rustgpt_jax.cache import cache_folder
from rustgpt_jax.config import Config, config_hash, split, stages
from rustgpt_jax.data.pipeline import Batch
from rustgpt_jax.data.prepare import StageData, obtain_tokenizer, prepare_stage, with_vocabulary
from rustgpt_jax.decoding.text import Writer, write
from rustgpt_jax.evaluation.perplexity import evaluate
from rustgpt_jax.model.cost import parameter_shapes, total_size, training_flops_per_token
from rustgpt_jax.parallel.devices import check_batch, peak_flops, replicate, share
from rustgpt_jax.runs.curves import draw_loss_curves
from rustgpt_jax.runs.folder import RunFolder, create, lock, write_atomically
from rustgpt_jax.runs.formatting import count as formatted
from rustgpt_jax.runs.formatting import duration
from rustgpt_jax.runs.metrics import MetricsWriter, keep_until, read_metrics
from rustgpt_jax.runs.progress import Progress
from rustgpt_jax.training.checkpoints import Checkpoints
from rustgpt_jax.training.signals import StopRequest
from rustgpt_jax.training.step import Metrics, State, as_arguments, compiled_start, compiled_train_steps


def train(config: Config, path: Path, origins: dict[str, str], console: Console) -> bool:
    """Train the run of a config in a folder, from its last checkpoint if it has one. Whether it reached its end.

    Raises UserError, before anything is compiled, for what cannot work.
    """
    run = create(path, config, origins)
    with lock(path):
        tokenizer = obtain_tokenizer(config, run.tokenizer_file)
        whole = with_vocabulary(config, tokenizer)
        material = [prepare_stage(stage, tokenizer, cache_folder()) for stage in stages(whole)]
        write_atomically(run.data_file, json.dumps([data.summary() for data in material], indent=2) + "\n")
        for data in material:
            check_batch(data.stage.config.training)
        with Checkpoints(run.checkpoints, config_hash(config)) as checkpoints:
            return _run(whole, run, tokenizer, material, checkpoints, console)


def _run(
    config: Config,
    run: RunFolder,
    tokenizer: Tokenizer,
    material: list[StageData],
    checkpoints: Checkpoints,
    console: Console,
) -> bool:
    total_steps = material[-1].stage.end_step
    first_step = checkpoints.step() or 0
    if first_step == total_steps:
        console.print(f"{run.path} is complete: {total_steps} steps. Nothing to do.", highlight=False)
        return True
    checkpoints.forget_after(first_step)
    keep_until(run.samples_file, first_step)
    console.print(_headline(config, run, first_step, total_steps), highlight=False)
    with (
        StopRequest() as stop,
        MetricsWriter(run.path, first_step) as writer,
        Progress(console, total_steps) as progress,
    ):
        loop = Loop(config, run, tokenizer, checkpoints, writer, progress, stop)
        state = loop.first_state(first_step)
        for data in material:
            if loop.step < data.stage.end_step and not stop:
                state = loop.run_stage(data, state)
        checkpoints.save(state, loop.step)
        checkpoints.wait()
    if stop:
        console.print(f"Stopped by {stop.signal_name} at step {loop.step}, saved. The same command goes on from there.")
        return False
    picture = draw_loss_curves(run.path)
    console.print(f"Done in {duration(loop.seconds())}. Loss curves: {picture}", highlight=False)
    return True


@dataclass
class Pending:
    """Steps whose metrics are still on the device: `first_step` to `first_step + count`."""

    first_step: int
    count: int
    metrics: Metrics


@dataclass
class Loop:
    """What the stages of a run share: its position, and where its effects go."""

    config: Config
    run: RunFolder
    tokenizer: Tokenizer
    checkpoints: Checkpoints
    writer: MetricsWriter
    progress: Progress
    stop: StopRequest
    step: int = 0
    best_loss: float = np.inf
    pending: Pending | None = None
    compiled: set[Any] = field(default_factory=set)
    peak: float = 0.0
    started: float = field(default_factory=time.perf_counter)
    reported: float = 0.0

    def seconds(self) -> float:
        """Since training began."""
        return time.perf_counter() - self.started

    def first_state(self, step: int) -> State:
        """The state to go on from: of the last checkpoint, or of step 0."""
        self.step = step
        self.peak, _ = peak_flops()
        structure, numbers = split(self.config)
        if step == 0:
            return replicate(compiled_start(structure, as_arguments(numbers)))
        like = jax.eval_shape(lambda: compiled_start(structure, as_arguments(numbers)))
        return replicate(self.checkpoints.restore(like))

    def run_stage(self, data: StageData, state: State) -> State:
        """Run a stage from where it stands to its end, or to the end of the call in which a stop was asked for."""
        stage, training = data.stage, data.stage.config.training
        structure, numbers = split(stage.config)
        arguments = as_arguments(numbers)
        source = data.training_batches().iterate(self.step)
        flops_per_token = training_flops_per_token(stage.config.model, data.window)
        self.best_loss = self.best_loss_of(stage.name)
        self.reported = time.perf_counter()
        while self.step < stage.end_step and not self.stop:
            count = min(training.steps_per_call, self.next_event(stage.end_step) - self.step)
            batches = share(stacked(source, count, training.steps_per_call), batch_axis=1)
            began = time.perf_counter()
            state, metrics = compiled_train_steps(
                structure, state, batches, np.int32(count), arguments, np.int32(stage.first_step)
            )
            self.note_compilation(structure, time.perf_counter() - began)
            self.report(data, flops_per_token)
            self.pending = Pending(self.step, count, metrics)
            self.step += count
            if self.is_due(self.config.record.evaluate_every, stage.end_step):
                self.report(data, flops_per_token)
                self.evaluate(data, state)
            if self.is_due(self.config.record.checkpoint_every, stage.end_step):
                self.report(data, flops_per_token)
                self.checkpoints.save(state, self.step)
        self.report(data, flops_per_token)
        source.close()
        return state

    def best_loss_of(self, stage: str) -> float:
        """The lowest validation loss that the run has recorded in a stage: stages measure different texts."""
        lines = read_metrics(self.run.path)
        return min((line["valid/loss"] for line in lines if line["stage"] == stage and "valid/loss" in line), default=np.inf)

    def next_event(self, end_step: int) -> int:
        """The next step after which something happens besides training."""
        record = self.config.record
        return min(end_step, *((self.step // every + 1) * every for every in (record.evaluate_every, record.checkpoint_every)))

    def is_due(self, every: int, end_step: int) -> bool:
        """Whether what happens at multiples of `every`, and at the end of a stage, happens now."""
        return self.step % every == 0 or self.step == end_step

    def note_compilation(self, structure: Any, seconds: float) -> None:
        """Say once for each program how long its first call took to return, which is its tracing and compiling."""
        if structure not in self.compiled:
            self.compiled.add(structure)
            self.progress.message(f"compiled the training step in {duration(seconds)}")
            self.reported = time.perf_counter()

    def report(self, data: StageData, flops_per_token: float) -> None:
        """Write the metrics of the steps before those that the device is busy with now."""
        pending, self.pending = self.pending, None
        if pending is None:
            return
        metrics = jax.device_get(pending.metrics)
        now = time.perf_counter()
        tokens_per_second = pending.count * data.stage.config.training.batch_size * data.window / (now - self.reported)
        self.reported = now
        speed = {
            "train/tokens_per_second": tokens_per_second,
            "train/flops_share": tokens_per_second * flops_per_token / self.peak,
        }
        for index in range(pending.count):
            step = pending.first_step + index + 1
            values = {f"train/{name}": float(column[index]) for name, column in metrics._asdict().items()}
            if step % self.config.record.log_every == 0 or step == data.stage.end_step:
                self.writer.write(step, {"stage": data.stage.name, **values, **speed})
            if index == pending.count - 1:
                self.progress.update(step, {**values, **speed}, data.stage.name)

    def evaluate(self, data: StageData, state: State) -> None:
        """Measure the stage's validation split, keep the best state, and write samples."""
        model = self.config.model
        bytes_per_token = data.store.split("valid").bytes_per_token
        shared = (share(batch, batch_axis=0) for batch in data.validation_batches())
        values = evaluate(state.params, model, shared, bytes_per_token)
        if values:
            self.writer.write(self.step, {"stage": data.stage.name, **values})
            self.progress.message(
                f"step {self.step}  {data.stage.name}  validation loss {values['valid/loss']:.4f}"
                f"  perplexity {values['valid/perplexity']:.2f}  {values['valid/bits_per_byte']:.3f} bits per byte"
            )
            if values["valid/loss"] < self.best_loss:
                self.best_loss = values["valid/loss"]
                self.checkpoints.save(state, self.step, "best")
        self.write_samples(data, state)
        self.reported = time.perf_counter()

    def write_samples(self, data: StageData, state: State) -> None:
        """Continue the config's prompts, into samples.jsonl and onto the screen."""
        prompts = self.config.record.prompts
        if not prompts:
            return
        writer = Writer(state.params, self.config.model, self.tokenizer, data.is_dialogue)
        texts = write(writer, [writer.prompt(prompt) for prompt in prompts], self.config.sampling)
        with open(self.run.samples_file, "a", encoding="utf-8") as file:
            for prompt, text in zip(prompts, texts, strict=True):
                file.write(json.dumps({"step": self.step, "prompt": prompt, "text": text}) + "\n")
                self.progress.message(f"  {prompt} | {text}")


def stacked(source: Iterator[Batch], count: int, slots: int) -> Batch:
    """The next `count` batches, stacked; the rest of the `slots` repeats the last, which no step reads."""
    batches = [next(source) for _ in range(count)]
    batches += [batches[-1]] * (slots - count)
    return Batch(*(np.stack(leaves) for leaves in zip(*batches, strict=True)))


def _headline(config: Config, run: RunFolder, first_step: int, total_steps: int) -> str:
    device = jax.devices()[0]
    parameters = formatted(total_size(parameter_shapes(config.model)))
    begin = f"from step {first_step}" if first_step else "from the start"
    return (
        f"{run.path}: {parameters} parameters, {total_steps} steps {begin}, "
        f"on {jax.device_count()} {device.platform} device(s) ({device.device_kind})"
    )
