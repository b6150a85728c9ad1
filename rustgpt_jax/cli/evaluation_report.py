"""The `evaluate` command: prints loss, perplexity and bits per byte of a run, and its accuracy on dialogues."""

from rich.console import Console
from rich.table import Table

from rustgpt_jax.cache_dir import cache_folder
from rustgpt_jax.config.schema import SamplingConfig, stages
from rustgpt_jax.data.datasets import assign_splits, load_documents
from rustgpt_jax.data.preprocess import StageData, find_changed_stages, prepare_stage
from rustgpt_jax.evaluation.exact_match import right_answers
from rustgpt_jax.evaluation.loss import evaluate
from rustgpt_jax.inference.decode_params import select_weight_layout
from rustgpt_jax.inference.text_generator import TextGenerator
from rustgpt_jax.sharding.hardware_specs import query_machine
from rustgpt_jax.tracking.console import show_progress
from rustgpt_jax.training.load_model import LoadedModel
from rustgpt_jax.training.memory_estimate import check_inference_memory


def print_evaluation(trained: LoadedModel, console: Console, is_oversubscribed: bool = False) -> None:
    """Print loss, perplexity and bits per byte for each stage's validation split, and right answers for dialogues.

    Where weights of a narrower type are read in decoding, a line more says what the model loses by it.
    """
    for config in (stage.config for stage in stages(trained.config)):
        rows = config.training.batch_size // config.training.grad_accum_steps
        check_inference_memory(config, query_machine(), rows, is_oversubscribed)
    sampling = trained.config.sampling
    reader = trained.writer.with_weight_layout(select_weight_layout(sampling))
    table = Table(title=f"step {trained.step}", title_justify="left", box=None, pad_edge=False)
    for column in ("stage", "loss", "perplexity", "bits per byte", "answers right, training", "validation"):
        table.add_column(column)
    material = [prepare_stage(stage, trained.writer.tokenizer, cache_folder()) for stage in stages(trained.config)]
    for stage in find_changed_stages(trained.run.data_file, material):
        console.print(f"The text of stage {stage} is not the one that the model was trained on.", style="yellow")
    for data in material:
        answers = _answers(reader, sampling, data, console)
        if sampling.weight_dtype is None:
            table.add_row(data.stage.name, *_predictions(trained.writer, data, console), *answers)
        else:
            table.add_row(data.stage.name, *_predictions(trained.writer, data, console))
            table.add_row(
                f"{data.stage.name}, weights in {sampling.weight_dtype}", *_predictions(reader, data, console), *answers
            )
    console.print(table)


def _predictions(writer: TextGenerator, data: StageData, console: Console) -> list[str]:
    stream = data.store.split("valid")
    training = data.stage.config.training
    total = data.n_validation_batches
    with show_progress(console, "batches evaluated") as progress:
        values = evaluate(
            writer.params,
            writer.model,
            data.validation_batches(),
            stream.bytes_per_token,
            training.loss_chunk_size,
            training.grad_accum_steps,
            lambda done: progress(done, total),
        )
    return [f"{value:.4f}" for value in values.values()] or ["no validation text", "", ""]


def _answers(writer: TextGenerator, sampling: SamplingConfig, data: StageData, console: Console) -> list[str]:
    if not data.is_dialogue:
        return ["", ""]
    config = data.stage.config.data
    n_characters = sum(len(document.text) for document in load_documents(config))
    sides: dict[str, list] = {"train": [], "valid": []}
    for side, document in assign_splits(load_documents(config), config, n_characters):
        sides[side].append(document)
    with show_progress(console, "questions answered") as progress:
        counts = [right_answers(writer, side, sampling, progress) for side in sides.values()]
    return [f"{right} of {total} ({right / total:.1%})" if total else "none" for right, total in counts]
