"""Safetensors files and Hugging Face folders with random edits: read to the last number, or refused in a sentence."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from fuzzing import ODD_TEXTS, Data, Place, answer, cases, damaged, edited, write
from fuzzing import place as place
from hypothesis import given
from hypothesis import strategies as st
from test_fuzz_tokenizers import BESIDE, FOREIGN

from configs import base
from rustgpt_jax.interop import convert
from rustgpt_jax.interop.hf_checkpoint import read_folder, read_model
from rustgpt_jax.pytrees import unflatten_paths
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

# A small file, to be damaged everywhere.
SHAPES = {"a/b": (3, 4), "a/c": (2,), "d": (5, 2, 2)}


def written(folder: Path) -> bytes:
    """A safetensors file with these tensors."""
    tensors = [
        NewTensor(name, np.dtype(np.float32), shape, lambda shape=shape: [np.ones(shape, np.float32)])
        for name, shape in SHAPES.items()
    ]
    write_safetensors(folder / "small", tensors, {"format": "rustgpt_jax"})
    return (folder / "small").read_bytes()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of such a file."""
    return written(tmp_path_factory.mktemp("small"))


def with_header(data: bytes, header: Any) -> bytes:
    """The same file with another header, whose length is right."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + int.from_bytes(data[:8], "little") :]


def use(file: Path) -> None:
    """Every tensor of a file, as a file of a run and as one of a model."""
    found = open_safetensors(file)
    for stored in found.values():
        assert stored.read().shape == stored.shape
    shapes = unflatten_paths({name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in SHAPES.items()})
    matching_parameters(file, shapes)
    read_parameters(file, shapes)


def test_a_file_works(place: Place, small: bytes) -> None:
    with place.case() as folder:
        write(folder / "model.safetensors", small)
        use(folder / "model.safetensors")


@cases(400)
@given(st.data())
def test_a_file_with_edits(place: Place, small: bytes, data: st.DataObject) -> None:
    length = int.from_bytes(small[:8], "little")
    header = small[8 : 8 + length]
    edits = edited(json.loads(header)) | damaged(header)
    new = data.draw(edits.map(lambda header: Data(with_header(small, header))) | damaged(small) | st.none())
    with place.case() as folder:
        write(folder / "model.safetensors", new)
        answer(lambda: use(folder / "model.safetensors"))


INDEX = {
    "metadata": {"total_size": 8},
    "weight_map": dict.fromkeys(SHAPES, "model-1.safetensors") | {"f": "model-2.safetensors"},
}


@cases(200)
@given(edited(INDEX) | damaged(json.dumps(INDEX).encode()) | st.none())
def test_an_index_with_edits(place: Place, small: bytes, index: Any) -> None:
    with place.case() as folder:
        one = NewTensor("f", np.dtype(np.float16), (2,), lambda: [np.ones(2, np.float16)])
        write(folder / "model-1.safetensors", small)
        write_safetensors(folder / "model-2.safetensors", [one], {})
        raw = index if isinstance(index, bytes | None) else json.dumps(index).encode()
        write(folder / "model.safetensors.index.json", raw)
        answer(lambda: [stored.shape for stored in read_folder(folder).values()])


@cases(400)
@given(st.sampled_from([*CONFIGS.values()]).flatmap(lambda tree: edited(tree) | damaged(json.dumps(tree).encode())))
def test_the_config_of_a_model_with_edits(place: Place, config: Any) -> None:
    with place.case() as folder:
        write(folder / "config.json", config if isinstance(config, bytes) else json.dumps(config).encode())
        answer(lambda: read_model(folder))


@pytest.fixture
def without_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled: imported models are not compared with transformers."""
    monkeypatch.setattr(convert, "_compared", lambda *_: "")


def import_model(source: Path, run: Path) -> None:
    """What the verb import does, and a verb that reads its run."""
    convert.import_run(source, run, base.get_config(), {}, lambda line: None)
    load_config(run)


def folder_of(name: str, folder: Path) -> None:
    """A folder with a model and a tokenizer."""
    files = {file: json.dumps(values).encode() for file, values in BESIDE.items()}
    files["tokenizer.json"] = FOREIGN["unigram"].encode()
    files |= {file: (GOLDEN / name / file).read_bytes() for file in ("config.json", "model.safetensors")}
    for file, data in files.items():
        write(folder / file, data)


@pytest.mark.parametrize("name", MODELS[:2])
def test_a_model_works(name: str, place: Place, without_comparison: None) -> None:
    with place.case() as folder:
        folder_of(name, folder / "source")
        import_model(folder / "source", folder / "run")


def model_edits(name: str) -> Any:
    """A file of a model's folder, and what stands in it instead."""
    data = (GOLDEN / name / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    headers = edited(json.loads(data[8 : 8 + length])).map(lambda header: Data(with_header(data, header)))
    config = edited(CONFIGS[name]).map(lambda tree: json.dumps(tree).encode())
    return st.tuples(st.just(name), st.just("model.safetensors"), headers) | st.tuples(
        st.just(name), st.just("config.json"), config
    )


@cases(120)
@given(st.sampled_from(MODELS[:4]).flatmap(model_edits), st.sampled_from(("run", "run", *ODD_TEXTS[:3])))
def test_an_import_with_edits(place: Place, without_comparison: None, edit: tuple[str, str, bytes], run: str) -> None:
    name, file, data = edit
    with place.case() as folder:
        folder_of(name, folder / "source")
        (folder / "source" / file).write_bytes(data)
        answer(lambda: import_model(folder / "source", folder / "runs" / run))
        assert list(folder.rglob(".*")) == []


EXPORTED = ("import.json", "parameters.safetensors", "tokenizer.json", "tokenizer.dialect.json", "config.json")


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of an imported model."""
    folder = tmp_path_factory.mktemp("imported")
    folder_of("llama2", folder / "source")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "_compared", lambda *_: "")
        import_model(folder / "source", folder / "run")
    return folder / "run"


@cases(80)
@given(st.data())
def test_an_export_of_a_run_with_edits(
    place: Place, without_comparison: None, imported: Path, data: st.DataObject
) -> None:
    with place.case() as folder:
        shutil.copytree(imported, folder / "run")
        file = folder / "run" / data.draw(st.sampled_from(EXPORTED))
        old = file.read_bytes()
        edits = edited(json.loads(old)).map(as_json) if file.suffix == ".json" else st.nothing()
        new = data.draw(edits | damaged(old) | st.none())
        file.unlink()
        write(file, new)
        answer(lambda: convert.export_run(folder / "run", folder / "export", "last", None, lambda line: None))
        assert {path.name for path in folder.iterdir()} <= {"run", "export"}


def as_json(value: Any) -> bytes:
    """A value as the bytes of a JSON file."""
    return json.dumps(value).encode()
