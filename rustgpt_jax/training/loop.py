"""Training as a whole: from a config to a finished run, with all its effects in their order."""

import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from tokenizers import Tokenizer

from rustgpt_jax.cache import cache_folder
from rustgpt_jax.config import Config, Structure, config_hash, split, stages
from rustgpt_jax.data.corpora import Turn
from rustgpt_jax.data.pipeline import Batch
from rustgpt_jax.data.prepare import (
    StageData,
    changed_data,
    obtain_tokenizer,
    prepare_stage,
    record_data,
    with_vocabulary,
)
from rustgpt_jax.errors import UserError
from rustgpt_jax.model.cost import parameter_shapes, total_size
from rustgpt_jax.parallel.devices import check_batch, replicate, share
from rustgpt_jax.runs.curves import draw_loss_curves
from rustgpt_jax.runs.folder import RunFolder, check, create, lock, write_atomically
from rustgpt_jax.runs.formatting import count as formatted
from rustgpt_jax.runs.formatting import duration
from rustgpt_jax.runs.metrics import MetricsWriter, keep_until
from rustgpt_jax.runs.progress import Progress, counting, waiting
from rustgpt_jax.tokenizers import encode_prompt, save_tokenizer
from rustgpt_jax.training.checkpoints import Checkpoints
from rustgpt_jax.training.optimizers import check_decay_groups
from rustgpt_jax.training.parts import check_parts
from rustgpt_jax.training.recorder import Recorder
from rustgpt_jax.training.signals import StopRequest
from rustgpt_jax.training.step import State, as_arguments, compiled_start, compiled_train_steps


def train(config: Config, path: Path, origins: Mapping[str, str], console: Console) -> bool:
    """Train the run of a config in a folder, from its last checkpoint if it has one. Whether it reached its end.

    Raises UserError, before anything is compiled and before the folder is made, for what cannot work.
    """
    check(path, config)
    check_parts(config)
    run = RunFolder(path)
    with waiting(console, "training the tokenizer"):
        tokenizer = obtain_tokenizer(config, run.tokenizer_file)
    whole = with_vocabulary(config, tokenizer)
    check_decay_groups(parameter_shapes(whole.model), whole.optimizer)
    check_prompts(whole, tokenizer)
    with counting(console, "documents encoded") as progress:
        material = [prepare_stage(stage, tokenizer, cache_folder(), progress) for stage in stages(whole)]
    for data in material:
        check_batch(data.stage.config.training)

    changed = changed_data(run.data_file, material)
    if changed:
        again = "give back the old text, or choose another --run folder"
        raise UserError(f"{path}: the text of stage {changed[0]!r} is not what the run began with; {again}.")

    create(path, config, origins)
    with lock(path):
        save_tokenizer(tokenizer, run.tokenizer_file)
        write_atomically(run.data_file, record_data(material))
        with Checkpoints(run.checkpoints, config_hash(config)) as checkpoints:
            return _run(whole, run, tokenizer, material, checkpoints, console)


def check_prompts(config: Config, tokenizer: Tokenizer) -> None:
    """Raises UserError if a prompt for samples, asked as a question, leaves no room in the model's context."""
    for prompt in config.record.prompts:
        length = len(encode_prompt(tokenizer, [Turn("user", prompt)]))
        if length >= config.model.context_length:
            raise UserError(
                f"config.record.prompts: {prompt!r} takes {length} tokens and leaves no room in "
                f"config.model.context_length={config.model.context_length}."
            )


def _run(
    config: Config,
    run: RunFolder,
    tokenizer: Tokenizer,
    material: list[StageData],
    checkpoints: Checkpoints,
    console: Console,
) -> bool:
    first_step, total_steps = checkpoints.step() or 0, material[-1].stage.end_step
    if first_step == total_steps:
        console.print(f"{run.path} is complete: {total_steps} steps. There is nothing to do.", highlight=False)
        return True
    checkpoints.forget_after(first_step)
    keep_until(run.samples_file, first_step)
    console.print(_headline(config, run, first_step, total_steps), highlight=False, soft_wrap=True)
    began, step = time.perf_counter(), first_step
    with (
        StopRequest() as stop,
        MetricsWriter(run.path, first_step) as writer,
        Progress(console, total_steps) as progress,
    ):
        state, compiled = _first_state(config, checkpoints, first_step), set[Structure]()
        for data in material:
            if step < data.stage.end_step and not stop:
                recorder = Recorder(config, data, run, tokenizer, checkpoints, writer, progress, compiled)
                state, step = _run_stage(data, state, step, recorder, stop)
        checkpoints.save(state, step)
        checkpoints.wait()
    if stop:
        again = "The same command goes on from there."
        console.print(f"Stopped by {stop.signal_name} at step {step}, saved. {again}", highlight=False)
        return False
    console.print(f"Done in {duration(time.perf_counter() - began)}. {_curves(run)}", highlight=False, soft_wrap=True)
    return True


def _curves(run: RunFolder) -> str:
    try:
        return f"Loss curves: {draw_loss_curves(run.path)}"
    except UserError as error:
        return str(error)


def _first_state(config: Config, checkpoints: Checkpoints, step: int) -> State:
    structure, numbers = split(stages(config)[0].config)
    arguments = as_arguments(numbers)
    if step == 0:
        return replicate(compiled_start(structure, arguments))
    return replicate(checkpoints.restore(jax.eval_shape(lambda: compiled_start(structure, arguments))))


def _run_stage(data: StageData, state: State, step: int, recorder: Recorder, stop: StopRequest) -> tuple[State, int]:
    """Run a stage from `step` to its end, or to the end of the call in which a stop is asked for."""
    stage, record = data.stage, data.stage.config.record
    structure, numbers = split(stage.config)
    arguments, first_step = as_arguments(numbers), np.int32(stage.first_step)
    slots = stage.config.training.steps_per_call
    source = data.training_batches().iterate(step)
    while step < stage.end_step and not stop:
        next_event = min(stage.end_step, _next(step, record.evaluate_every), _next(step, record.checkpoint_every))
        count = min(slots, next_event - step)
        batches = share(stacked(source, count, slots), batch_axis=1)
        began = time.perf_counter()
        state, metrics = compiled_train_steps(structure, state, batches, np.int32(count), arguments, first_step)
        recorder.called(structure, time.perf_counter() - began)
        recorder.trained(step, count, metrics)
        step += count
        if step % record.evaluate_every == 0 or step == stage.end_step:
            recorder.evaluate(state, step)
        if step % record.checkpoint_every == 0 or step == stage.end_step:
            recorder.save(state, step)
    recorder.flush()
    source.close()
    return state, step


def _next(step: int, every: int) -> int:
    """The first multiple of `every` after `step`."""
    return (step // every + 1) * every


def stacked(source: Iterator[Batch], count: int, slots: int) -> Batch:
    """The next `count` batches, stacked; the rest of the `slots` repeats the last, which no step reads."""
    batches = [next(source) for _ in range(count)]
    batches += [batches[-1]] * (slots - count)
    return Batch(*(np.stack(leaves) for leaves in zip(*batches, strict=True)))


def _headline(config: Config, run: RunFolder, first_step: int, total_steps: int) -> str:
    parameters = formatted(total_size(parameter_shapes(config.model)))
    begin = f"from step {first_step}" if first_step else "from the start"
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    return f"{run.path}: {parameters} parameters, {total_steps} steps {begin}, on {devices}"
