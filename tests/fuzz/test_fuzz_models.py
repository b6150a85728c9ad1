"""Safetensors files and Hugging Face folders with random edits are read completely, or refused in one line."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from fuzzing import ODD_TEXTS, Sandbox, ShortBytes, corrupt_bytes, edit_tree, max_cases, run_or_refuse, write
from fuzzing import sandbox as sandbox
from hypothesis import given
from hypothesis import strategies as st
from test_fuzz_tokenizers import BESIDE, FOREIGN

from configs import base
from rustgpt_jax.config.schema import unflatten
from rustgpt_jax.interop import convert
from rustgpt_jax.interop.hf_checkpoint import read_folder, read_model
from rustgpt_jax.workdir.params_io import (
    NewTensor,
    matching_parameters,
    open_safetensors,
    read_parameters,
    write_safetensors,
)
from rustgpt_jax.workdir.run_dir import load_config

GOLDEN = Path(__file__).parent.parent / "golden"
MODELS = sorted(path.name for path in GOLDEN.iterdir())
CONFIGS = {name: json.loads((GOLDEN / name / "config.json").read_text()) for name in MODELS}

# A small file.
SHAPES = {"a/b": (3, 4), "a/c": (2,), "d": (5, 2, 2)}


def write_small_file(folder: Path) -> bytes:
    """Writes a safetensors file with these tensors and returns its bytes."""
    tensors = [
        NewTensor(name, np.dtype(np.float32), shape, lambda shape=shape: [np.ones(shape, np.float32)])
        for name, shape in SHAPES.items()
    ]
    write_safetensors(folder / "small", tensors, {"format": "rustgpt_jax"})
    return (folder / "small").read_bytes()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of the small file."""
    return write_small_file(tmp_path_factory.mktemp("small"))


def replace_header(data: bytes, header: Any) -> bytes:
    """The same file with another header of the right length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + int.from_bytes(data[:8], "little") :]


def read_every_tensor(file: Path) -> None:
    """Reads every tensor, as from a file of a run and as from one of a model."""
    found = open_safetensors(file)
    for stored in found.values():
        assert stored.read().shape == stored.shape
    shapes = unflatten({name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in SHAPES.items()}, "/")
    matching_parameters(file, shapes)
    read_parameters(file, shapes)


def test_small_file_is_read(sandbox: Sandbox, small: bytes) -> None:
    with sandbox.case() as folder:
        write(folder / "model.safetensors", small)
        read_every_tensor(folder / "model.safetensors")


@max_cases(400)
@given(st.data())
def test_edited_file(sandbox: Sandbox, small: bytes, data: st.DataObject) -> None:
    length = int.from_bytes(small[:8], "little")
    header = small[8 : 8 + length]
    edits = edit_tree(json.loads(header)) | corrupt_bytes(header)
    new = data.draw(
        edits.map(lambda header: ShortBytes(replace_header(small, header))) | corrupt_bytes(small) | st.none()
    )
    with sandbox.case() as folder:
        write(folder / "model.safetensors", new)
        run_or_refuse(lambda: read_every_tensor(folder / "model.safetensors"))


INDEX = {
    "metadata": {"total_size": 8},
    "weight_map": dict.fromkeys(SHAPES, "model-1.safetensors") | {"f": "model-2.safetensors"},
}


@max_cases(200)
@given(edit_tree(INDEX) | corrupt_bytes(json.dumps(INDEX).encode()) | st.none())
def test_edited_index(sandbox: Sandbox, small: bytes, index: Any) -> None:
    with sandbox.case() as folder:
        one = NewTensor("f", np.dtype(np.float16), (2,), lambda: [np.ones(2, np.float16)])
        write(folder / "model-1.safetensors", small)
        write_safetensors(folder / "model-2.safetensors", [one], {})
        raw = index if isinstance(index, bytes | None) else json.dumps(index).encode()
        write(folder / "model.safetensors.index.json", raw)
        run_or_refuse(lambda: [stored.shape for stored in read_folder(folder).values()])


@max_cases(400)
@given(
    st.sampled_from([*CONFIGS.values()]).flatmap(
        lambda tree: edit_tree(tree) | corrupt_bytes(json.dumps(tree).encode())
    )
)
def test_edited_model_config(sandbox: Sandbox, config: Any) -> None:
    with sandbox.case() as folder:
        write(folder / "config.json", config if isinstance(config, bytes) else json.dumps(config).encode())
        run_or_refuse(lambda: read_model(folder))


@pytest.fixture
def without_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Imported models are not compared with transformers, so nothing is compiled."""
    monkeypatch.setattr(convert, "_check_logits", lambda *_: "")


def import_model(source: Path, run: Path) -> None:
    """Imports a model and reads the config of its run."""
    convert.import_run(source, run, base.get_config(), {}, lambda line: None)
    load_config(run)


def write_model_folder(name: str, folder: Path) -> None:
    """Writes a folder with a model and a tokenizer."""
    files = {file: json.dumps(values).encode() for file, values in BESIDE.items()}
    files["tokenizer.json"] = FOREIGN["unigram"].encode()
    files |= {file: (GOLDEN / name / file).read_bytes() for file in ("config.json", "model.safetensors")}
    for file, data in files.items():
        write(folder / file, data)


@pytest.mark.parametrize("name", MODELS[:2])
def test_model_is_imported(name: str, sandbox: Sandbox, without_comparison: None) -> None:
    with sandbox.case() as folder:
        write_model_folder(name, folder / "source")
        import_model(folder / "source", folder / "run")


def model_edits(name: str) -> Any:
    """Draws a model, a file of its folder and the new contents of that file."""
    data = (GOLDEN / name / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    headers = edit_tree(json.loads(data[8 : 8 + length])).map(lambda header: ShortBytes(replace_header(data, header)))
    config = edit_tree(CONFIGS[name]).map(lambda tree: json.dumps(tree).encode())
    return st.tuples(st.just(name), st.just("model.safetensors"), headers) | st.tuples(
        st.just(name), st.just("config.json"), config
    )


@max_cases(120)
@given(st.sampled_from(MODELS[:4]).flatmap(model_edits), st.sampled_from(("run", "run", *ODD_TEXTS[:3])))
def test_import_of_edited_model(
    sandbox: Sandbox, without_comparison: None, edit: tuple[str, str, bytes], run: str
) -> None:
    name, file, data = edit
    with sandbox.case() as folder:
        write_model_folder(name, folder / "source")
        (folder / "source" / file).write_bytes(data)
        run_or_refuse(lambda: import_model(folder / "source", folder / "runs" / run))
        assert list(folder.rglob(".*")) == []


EXPORTED = ("import.json", "parameters.safetensors", "tokenizer.json", "tokenizer.chat_format.json", "config.json")


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of an imported model."""
    folder = tmp_path_factory.mktemp("imported")
    write_model_folder("llama2", folder / "source")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "_check_logits", lambda *_: "")
        import_model(folder / "source", folder / "run")
    return folder / "run"


@max_cases(80)
@given(st.data())
def test_export_of_edited_run(sandbox: Sandbox, without_comparison: None, imported: Path, data: st.DataObject) -> None:
    with sandbox.case() as folder:
        shutil.copytree(imported, folder / "run")
        file = folder / "run" / data.draw(st.sampled_from(EXPORTED))
        old = file.read_bytes()
        edits = edit_tree(json.loads(old)).map(to_json_bytes) if file.suffix == ".json" else st.nothing()
        new = data.draw(edits | corrupt_bytes(old) | st.none())
        file.unlink()
        write(file, new)
        run_or_refuse(lambda: convert.export_run(folder / "run", folder / "export", "last", None, lambda line: None))
        assert {path.name for path in folder.iterdir()} <= {"run", "export"}


def to_json_bytes(value: Any) -> bytes:
    """The bytes of a JSON file."""
    return json.dumps(value).encode()
