"""Warm starts: matching parameters are copied bit-exactly, and the rest is reported."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_loop import VOCABULARY, stored_state, tiny, train

from rustgpt_jax.config.config_files import COMMAND_LINE
from rustgpt_jax.data.preprocess import load_or_train_tokenizer
from rustgpt_jax.errors import UserError
from rustgpt_jax.interop.warm_start import _initial_array, _match_layers, _unstack, create_warm_started_run
from rustgpt_jax.model.flops import parameter_shapes
from rustgpt_jax.pytrees import flatten_paths
from rustgpt_jax.reproduce.run_diff import diff_configs
from rustgpt_jax.training.load_model import load_model
from rustgpt_jax.workdir.run_dir import RunDir, create_run_dir, load_config

pytestmark = pytest.mark.usefixtures("quick_codegen")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "run"
    assert train(tiny(), path)[0]
    return path


def begin(source: str, path: Path, **changes: Any) -> str:
    said: list[str] = []
    create_warm_started_run(source, path, tiny(**changes), dict.fromkeys(changes, COMMAND_LINE), said.append)
    return "\n".join(said)


def parameters(path: Path) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in flatten_paths(load_model(path).generator.params).items()}


def test_warm_start_copies_all_matching_parameters(source: Path, tmp_path: Path) -> None:
    said = begin(str(source), tmp_path / "new", **{"optimizer.learning_rate": 1e-4, "seed": 3})
    taken, given = parameters(tmp_path / "new"), parameters(source)
    assert (
        f"{source} at step 10: loaded {len(given)} of {len(given)} parameter arrays" in said
        and "from the seed" not in said
    )
    assert taken.keys() == given.keys()
    assert all(taken[name].tobytes() == given[name].tobytes() for name in given)
    # With a rate of zero, training leaves what it began with.
    still = {"optimizer.learning_rate": 0.0, "schedule.warmup_steps": 0}
    begin(str(source), tmp_path / "still", **still)
    assert train(tiny(**still), tmp_path / "still")[0]
    after = flatten_paths(stored_state(tiny(**still), tmp_path / "still").params)
    assert all(np.asarray(after[name]).tobytes() == given[name].tobytes() for name in given)


def test_parameters_that_do_not_match_are_initialized_from_the_seed(source: Path, tmp_path: Path) -> None:
    changes = {"model.attention.qk_norm": "head", "model.d_ff": 24, "model.tie_embeddings": False}
    said = begin(f"{source}@10", tmp_path / "new", **changes)
    create_run_dir(tmp_path / "fresh", tiny(**changes), {})
    taken, given = parameters(tmp_path / "new"), parameters(source)
    about = json.loads((tmp_path / "new/import.json").read_bytes())
    assert set(about["loaded"]) | set(about["initialized"]) == set(taken)
    for name in about["loaded"]:
        np.testing.assert_array_equal(taken[name], given[name])
    assert (
        about["initialized"]["blocks/0/mixer/query_norm/scale"]
        == about["initialized"]["head/kernel"]
        == "not in the source"
    )
    assert "16 x 24 here" in about["initialized"]["blocks/0/feedforward/up/kernel"]
    assert "blocks/0/feedforward/up/kernel (" in said and "not loaded: " in said


def test_token_embeddings_are_not_copied_with_another_tokenizer(source: Path, tmp_path: Path) -> None:
    other = {"tokenizer.name": "char", "tokenizer.vocab_size": VOCABULARY}
    begin(str(source), tmp_path / "new", **other)
    about = json.loads((tmp_path / "new/import.json").read_bytes())
    assert about["initialized"] == {"embedding/table": "its tokens belong to another tokenizer"}
    assert (
        load_model(tmp_path / "new").generator.tokenizer.serialized == load_or_train_tokenizer(tiny(**other)).serialized
    )


def test_warm_start_of_an_existing_run_resumes_it_or_is_refused(source: Path, tmp_path: Path) -> None:
    begin(str(source), tmp_path / "new")
    before = (tmp_path / "new/parameters.safetensors").read_bytes()
    assert begin(str(source), tmp_path / "new") == ""
    assert (tmp_path / "new/parameters.safetensors").read_bytes() == before
    with pytest.raises(
        UserError, match=r"new was created with the parameters of .*, not with the parameters of .*@best; choose"
    ):
        begin(f"{source}@best", tmp_path / "new")
    train(tiny(), tmp_path / "plain")
    with pytest.raises(UserError, match=r"plain was created without a warm start, not with the parameters of"):
        begin(str(source), tmp_path / "plain")


@pytest.mark.parametrize(
    ("suffix", "changes", "sentence"),
    [
        ("@7", {}, r"no checkpoint of step 7 yet; there are checkpoints of steps .*10\."),
        ("@beast", {}, r"no checkpoint of step beast yet"),
        ("x", {}, r"There is no run .*runx\. Did you mean 'run'\?"),
        (
            "",
            {"model.d_model": 24},
            r"No parameter of .* matches the model of this config: .* 16 in the source and .* 24 here",
        ),
    ],
)
def test_impossible_warm_start_is_an_error_and_leaves_no_folder(
    source: Path, tmp_path: Path, suffix: str, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        begin(f"{source}{suffix}", tmp_path / "new", **changes)
    assert not RunDir(tmp_path / "new").path.exists()


def test_warm_start_keeps_the_tokenizer_unless_another_is_requested(source: Path, tmp_path: Path) -> None:
    """A config whose tokenizer is another, as that of a config file may be, on another text."""
    text = tmp_path / "text.txt"
    text.write_text("zyx wvu, tsr qpo.\n" * 60)
    other = {"tokenizer.name": "char", "tokenizer.vocab_size": None, "model.vocab_size": None}
    config = tiny(**other, **{"data.corpus": "files", "data.paths": (str(text),), "data.split": "tail"})
    said: list[str] = []
    begun = create_warm_started_run(str(source), tmp_path / "new", config, {}, said.append)
    assert begun.config.tokenizer == load_config(source).tokenizer
    assert begun.origins == dict.fromkeys(
        ("tokenizer.name", "tokenizer.vocab_size", "model.vocab_size"), f"init_from {source}"
    )
    assert ", and the tokenizer" in said[0] and "tokens belong to another" not in "".join(said)
    table = "embedding/table"
    np.testing.assert_array_equal(parameters(tmp_path / "new")[table], parameters(source)[table])
    # The same command goes on, also where the source is gone, and trains.
    assert create_warm_started_run(str(source), tmp_path / "new", config, {}, said.append).config == begun.config
    assert train(begun.config, tmp_path / "new")[0]
    assert (
        load_model(tmp_path / "new").generator.tokenizer.serialized == load_model(source).generator.tokenizer.serialized
    )


def test_stacked_blocks_are_matched_by_layer() -> None:
    """Of patterns of two mixers: five layers are two stacks of two and one of one; eight are two of four."""
    models = [tiny(**{"model.mixers": ("attention", "local_attention"), "model.n_layers": n}).model for n in (5, 8)]
    generator = np.random.default_rng(0)
    small, large = (
        {name: generator.normal(size=leaf.shape) for name, leaf in flatten_paths(parameter_shapes(model)).items()}
        for model in models
    )
    given, fresh = (_unstack(arrays, model) for arrays, model in zip((small, large), models, strict=True))
    chosen = _match_layers(given, fresh, is_same_tokenizer=True)
    grown = {name: _initial_array(name, leaf, fresh, given, chosen) for name, leaf in large.items()}
    names = [name.removeprefix("blocks/0/") for name in small if name.startswith("blocks/0/")]
    assert len(names) > 5
    for name in names:
        there = [small[f"blocks/{layer % 2}/{name}"][layer // 2] for layer in range(4)]
        there += [small[f"blocks/2/{name}"][0]]
        there += [large[f"blocks/{layer % 2}/{name}"][layer // 2] for layer in (5, 6, 7)]
        for layer, array in enumerate(there):
            np.testing.assert_array_equal(grown[f"blocks/{layer % 2}/{name}"][layer // 2], array)
    assert chosen.partially_loaded["blocks/0/mixer/query/kernel"] == [0, 2, 4] and not chosen.unused
    assert chosen.initialized["blocks/1/mixer/query/kernel"] == "layers 5, 7: not in the source"
    # And back: what is taken of the grown one is what it was grown from.
    chosen = _match_layers(_unstack(grown, models[1]), given, is_same_tokenizer=True)
    assert not chosen.partially_loaded and not chosen.initialized
    assert chosen.unused["blocks/0/mixer/query/kernel"] == "layer 6: not in this model"
    back = {
        name: _initial_array(name, 0 * leaf, given, _unstack(grown, models[1]), chosen) for name, leaf in small.items()
    }
    assert all(back[name].tobytes() == small[name].tobytes() for name in small)


def test_warm_start_of_a_deeper_model_copies_the_existing_layers(source: Path, tmp_path: Path) -> None:
    said = begin(str(source), tmp_path / "grown", **{"model.n_layers": 2})
    given, grown = parameters(source), parameters(tmp_path / "grown")
    for name, leaf in given.items():
        np.testing.assert_array_equal(grown[name][:1] if name.startswith("blocks/") else grown[name], leaf)
    assert "(layer 1: not in the source)" in said and f"loaded {len(given)} of {len(grown)} parameter arrays" in said


def test_diff_reports_the_source_of_a_warm_start(source: Path, tmp_path: Path) -> None:
    begin(str(source), tmp_path / "new")
    begin(f"{source}@best", tmp_path / "best")
    (found,) = diff_configs(RunDir(tmp_path / "new"), RunDir(tmp_path / "best"))
    assert (found.name, found.first) == ("init_from", f"{source} at step 10")
    assert diff_configs(RunDir(source), RunDir(tmp_path / "new"))[0].first == "(missing)"
    assert not diff_configs(RunDir(tmp_path / "new"), RunDir(tmp_path / "new"))
