"""import and export: a run exported to a Hugging Face folder and imported again is the same and trains on."""

import filecmp
import shutil
import sys
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import small_tree
from rich.console import Console

from rustgpt_jax.config.schema import config_hash, replace_paths
from rustgpt_jax.config.validation import resolve
from rustgpt_jax.errors import UserError
from rustgpt_jax.inference.text_generator import generate_text
from rustgpt_jax.interop import convert
from rustgpt_jax.interop.convert import LogitComparison, export_run, import_run
from rustgpt_jax.interop.warm_start import create_warm_started_run
from rustgpt_jax.tracking.metric_writer import read_metrics
from rustgpt_jax.training.load_model import load_model
from rustgpt_jax.training.run_training import train
from rustgpt_jax.workdir.run_dir import RunDir, load_config, load_origins

pytestmark = pytest.mark.usefixtures("quick_codegen")

KNOBS = {
    "data.corpus": "chat",
    "data.max_documents": 60,
    "tokenizer.vocab_size": 300,
    "model.vocab_size": None,
    "model.tie_embeddings": False,
    "schedule.warmup_steps": 0,
    "optimizer.learning_rate": 0.01,
    "training.steps": 30,
    "training.steps_per_jit_call": 10,
    "logging.eval_every": 30,
    "logging.checkpoint_every": 30,
    "sampling.temperature": 0.0,
}
RECIPE = KNOBS | {"training.steps": 2, "training.steps_per_jit_call": 2}
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json")


def quiet(said: str) -> None:
    del said


def imported(source: Path, path: Path, says: Any = quiet) -> RunDir:
    import_run(source, path, small_tree(**RECIPE), {"data.corpus": "here"}, says)
    return RunDir(path)


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory, quick_codegen: None) -> Path:
    """A run that has learned a little of the dialogues."""
    path = tmp_path_factory.mktemp("native") / "run"
    train(resolve(small_tree(**KNOBS)), path, {}, Console(file=StringIO()))
    return path


@pytest.fixture(scope="module")
def folder(native: Path) -> Path:
    """The same as a Hugging Face folder."""
    path = native.parent / "exported"
    export_run(native, path, "last", None, quiet)
    return path


@pytest.fixture(scope="module")
def back(folder: Path) -> Iterator[RunDir]:
    """The folder as a run again."""
    yield imported(folder, folder.parent / "back")


def test_export_and_import_preserve_a_run(native: Path, back: RunDir) -> None:
    there, here = load_model(native), load_model(back.path)
    assert here.step == 0 and back.is_untrained
    jax.tree.map(np.testing.assert_array_equal, there.generator.params, here.generator.params)
    assert there.generator.stop_ids == here.generator.stop_ids and here.generator.is_dialogue
    prompts = [there.generator.encode_prompt("Why is the sky blue?"), there.generator.encode_prompt("Hello!")]
    assert [here.generator.encode_prompt("Why is the sky blue?"), here.generator.encode_prompt("Hello!")] == prompts
    assert generate_text(there.generator, prompts, there.config.sampling) == generate_text(
        here.generator, prompts, there.config.sampling
    )


def test_an_untrained_run_is_exported_as_it_was_imported(folder: Path, back: RunDir, tmp_path: Path) -> None:
    export_run(back.path, tmp_path / "again", "last", None, quiet)
    again = imported(tmp_path / "again", tmp_path / "run")
    export_run(again.path, tmp_path / "thrice", "last", None, quiet)
    for name in FILES:
        assert filecmp.cmp(folder / name, tmp_path / "again" / name, shallow=False), name
        assert filecmp.cmp(tmp_path / "again" / name, tmp_path / "thrice" / name, shallow=False), name


@pytest.mark.parametrize("is_same_model", [True, False])
def test_a_run_started_from_an_import_is_exported(
    is_same_model: bool, folder: Path, back: RunDir, tmp_path: Path
) -> None:
    config = load_config(back.path)
    if not is_same_model:
        config = replace_paths(config, {"model.norm": "layernorm", "model.feedforwards": ("gelu",), "model.bias": True})
    create_warm_started_run(str(back.path), tmp_path / "run", config, {}, quiet)
    if is_same_model:
        export_run(tmp_path / "run", tmp_path / "again", "last", None, quiet)
        for name in FILES:
            assert filecmp.cmp(folder / name, tmp_path / "again" / name, shallow=False), name
    else:
        with pytest.raises(UserError, match="No supported Hugging Face architecture"):
            export_run(tmp_path / "run", tmp_path / "again", "last", None, quiet)


def test_origins_name_the_imported_folder(folder: Path, back: RunDir) -> None:
    config, origins = load_config(back.path), load_origins(back.path)
    assert (config.tokenizer.name, config.model.d_model, config.data.corpus) == ("imported", 32, "chat")
    assert origins["model.d_model"] == f"import from {folder}" and origins["data.corpus"] == "here"


@pytest.mark.slow
def test_an_imported_run_trains_from_its_parameters(native: Path, folder: Path, tmp_path: Path) -> None:
    run = imported(folder, tmp_path / "run")
    assert train(load_config(run.path), run.path, {}, Console(file=StringIO())) == 0
    first, learned = (next(iter(read_metrics(path)))["train/loss"] for path in (native, run.path))
    assert learned < 0.8 * first
    assert load_model(run.path).step == 2 and not run.is_untrained
    export_run(run.path, tmp_path / "trained", "last", "bfloat16", quiet)
    assert (tmp_path / "trained/model.safetensors").stat().st_size < (folder / "model.safetensors").stat().st_size


@pytest.mark.slow
def test_a_model_without_a_chat_template_continues_prompts(folder: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(folder, plain)
    (plain / "chat_template.jinja").unlink()
    tree = small_tree(**RECIPE | {"data.corpus": "facts", "logging.sample_prompts": ("The sky",)})
    import_run(plain, tmp_path / "run", tree, {}, quiet)
    assert train(load_config(tmp_path / "run"), tmp_path / "run", {}, Console(file=StringIO())) == 0
    assert '"prompt": "The sky"' in RunDir(tmp_path / "run").samples_file.read_text()


def test_unfinished_checkpoints_are_ignored(folder: Path, tmp_path: Path) -> None:
    run = imported(folder, tmp_path / "run")
    (run.checkpoints / "30.orbax-checkpoint-tmp").mkdir(parents=True)
    assert run.is_untrained and load_model(run.path).step == 0


def test_imported_tokenizers_are_not_trained(back: RunDir, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rustgpt import"):
        train(load_config(back.path), tmp_path / "new", {}, Console(file=StringIO()))
    assert not (tmp_path / "new").exists()
    assert config_hash(load_config(back.path)) != config_hash(resolve(small_tree(**RECIPE)))


# What is compared, and what is said.


@pytest.mark.parametrize("verb", ["import", "export"])
def test_different_logits_are_an_error(verb: str, folder: Path, native: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(convert, "compare_logits", lambda *_: LogitComparison(0.1, "", 5.0))
    with pytest.raises(UserError, match="differ by up to 0.1 .*Nothing was written"):
        if verb == "import":
            imported(folder, tmp_path / "new")
        else:
            export_run(native, tmp_path / "new", "last", None, quiet)
    assert list(tmp_path.iterdir()) == []


def test_missing_comparisons_are_reported(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    said: list[str] = []
    monkeypatch.setattr(convert, "compare_logits", lambda *_: LogitComparison(None, "torch is not installed"))
    imported(folder, tmp_path / "run", said.append)
    assert "Not compared with transformers: torch is not installed." in said
    monkeypatch.setattr(convert, "free_memory", lambda: 0)
    imported(folder, tmp_path / "other", said.append)
    assert said[-2].startswith("Not compared with transformers: that needs about")


@pytest.mark.oracle
def test_folders_that_transformers_cannot_load_are_imported(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("torch")
    said: list[str] = []
    monkeypatch.setattr(convert, "_logits", lambda *_: (_ for _ in ()).throw(OSError("no such file\nat all")))
    assert imported(folder, tmp_path / "run", said.append).parameters_file.exists()
    assert "Not compared with transformers: it cannot run this folder (OSError: no such file)." in said


def test_parameters_are_read_only_for_comparisons(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(convert, "read_parameters", lambda *_: pytest.fail("the whole model was read"))
    monkeypatch.setattr(convert, "free_memory", lambda: 0)
    imported(folder, tmp_path / "run")
    monkeypatch.undo()
    monkeypatch.setattr(convert, "read_parameters", lambda *_: pytest.fail("the whole model was read"))
    monkeypatch.setitem(sys.modules, "torch", None)
    imported(folder, tmp_path / "other")


def test_conflicting_model_knobs_are_refused(folder: Path, tmp_path: Path) -> None:
    tree = small_tree(**RECIPE, **{"model.context_length": 64})
    with pytest.raises(UserError, match="config.model.context_length=64 was given, but the imported model has 32"):
        import_run(folder, tmp_path / "run", tree, {"model.context_length": "command line"}, quiet)
    assert list(tmp_path.iterdir()) == []


def test_export_into_the_current_folder(folder: Path, native: Path, tmp_path: Path, monkeypatch: Any) -> None:
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    export_run(native.resolve(), Path("."), "last", None, quiet)
    assert filecmp.cmp(folder / "model.safetensors", place / "model.safetensors", shallow=False)
    with pytest.raises(UserError, match="/ already exists"):
        export_run(native.resolve(), Path("/"), "last", None, quiet)


def test_existing_folders_are_not_overwritten(folder: Path, back: RunDir, native: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in [*folder.iterdir(), *back.path.iterdir()]}
    with pytest.raises(UserError, match="already exists"):
        imported(folder, back.path)
    with pytest.raises(UserError, match="already exists"):
        export_run(native, folder, "last", None, quiet)
    assert {file: file.stat().st_mtime_ns for file in [*folder.iterdir(), *back.path.iterdir()]} == before
