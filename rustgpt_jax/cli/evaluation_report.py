"""Output of the verb `evaluate`: loss, perplexity, bits per byte, and accuracy on dialogues."""

from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from rustgpt_jax.cache_dir import cache_folder
from rustgpt_jax.config.schema import SamplingConfig, stages
from rustgpt_jax.data.datasets import assign_splits, load_documents
from rustgpt_jax.data.preprocess import StageData, find_changed_stages, prepare_stage
from rustgpt_jax.evaluation.exact_match import count_exact_matches
from rustgpt_jax.evaluation.loss import evaluate
from rustgpt_jax.inference.text_generator import TextGenerator, select_weight_layout
from rustgpt_jax.sharding.hardware_specs import query_machine
from rustgpt_jax.tracking.console import show_progress
from rustgpt_jax.training.load_model import LoadedModel
from rustgpt_jax.training.memory_estimate import check_inference_memory


class StageEvaluation(NamedTuple):
    """The evaluation of a stage.

    Attributes:
        stage: The name of the stage.
        weight_dtype: The dtype of the weights; None for that of the training.
        metrics: The loss, perplexity and bits per byte on the validation split; empty if there is no validation text.
        answers: The right and all answers on the dialogues of each split; empty without dialogues.
    """

    stage: str
    weight_dtype: str | None
    metrics: dict[str, float]
    answers: dict[str, tuple[int, int]]

    def describe(self) -> dict[str, Any]:
        """Return the evaluation as JSON has it."""
        answers = {split: {"right": right, "total": total} for split, (right, total) in self.answers.items()}
        metrics = {name.removeprefix("valid/"): value for name, value in self.metrics.items()}
        return {
            "stage": self.stage,
            "weight_dtype": self.weight_dtype,
            "metrics": metrics or None,
            "answers": answers or None,
        }


def print_evaluation(
    trained: LoadedModel, console: Console, allow_oversubscription: bool = False
) -> list[StageEvaluation]:
    """Print loss, perplexity and bits per byte for each stage's validation split, and the correct answers on dialogues.

    If decoding uses weights of a narrower dtype, a second row shows the metrics with those weights.

    Returns:
        The rows.
    """
    for config in (stage.config for stage in stages(trained.config)):
        rows = config.training.batch_size // config.training.grad_accum_steps
        check_inference_memory(config, query_machine(), rows, allow_oversubscription)
    sampling = trained.config.sampling
    decoder = trained.generator.with_weight_layout(select_weight_layout(sampling))
    table = Table(title=f"step {trained.step}", title_justify="left", box=None, pad_edge=False)
    for column in ("stage", "loss", "perplexity", "bits per byte", "answers right, training", "validation"):
        table.add_column(column)
    datasets = [prepare_stage(stage, trained.generator.tokenizer, cache_folder()) for stage in stages(trained.config)]
    for stage in find_changed_stages(trained.run.data_file, datasets):
        console.print(f"The text of stage {stage} differs from the text that the model was trained on.", style="yellow")
    found = list[StageEvaluation]()
    for data in datasets:
        answers = _count_right_answers(decoder, sampling, data, console)
        name, metrics = data.stage.name, _measure_loss(trained.generator, data, console)
        if sampling.weight_dtype is not None:
            found.append(StageEvaluation(name, None, metrics, {}))
            metrics = _measure_loss(decoder, data, console)
        found.append(StageEvaluation(name, sampling.weight_dtype, metrics, answers))
    for row in found:
        name = row.stage if row.weight_dtype is None else f"{row.stage}, weights in {row.weight_dtype}"
        losses = [f"{value:.4f}" for value in row.metrics.values()] or ["no validation text", "", ""]
        table.add_row(name, *losses, *(_format_count(*count) for count in row.answers.values()))
    console.print(table)
    return found


def _format_count(right: int, total: int) -> str:
    return f"{right} of {total} ({right / total:.1%})" if total else "none"


def _measure_loss(writer: TextGenerator, data: StageData, console: Console) -> dict[str, float]:
    training, total = data.stage.config.training, data.n_validation_batches
    with show_progress(console, "batches evaluated") as progress:
        return evaluate(
            writer.params,
            writer.model,
            data.validation_batches(),
            data.store.split("valid").bytes_per_token,
            training.loss_chunk_size,
            training.grad_accum_steps,
            lambda done: progress(done, total),
        )


def _count_right_answers(
    writer: TextGenerator, sampling: SamplingConfig, data: StageData, console: Console
) -> dict[str, tuple[int, int]]:
    if not data.is_dialogue:
        return {}
    config = data.stage.config.data
    n_characters = sum(len(document.text) for document in load_documents(config))
    splits: dict[str, list] = {"train": [], "valid": []}
    for split, document in assign_splits(load_documents(config), config, n_characters):
        splits[split].append(document)
    with show_progress(console, "questions answered") as progress:
        return {
            split: count_exact_matches(writer, dialogues, sampling, progress) for split, dialogues in splits.items()
        }
