"""StableHLO export: an exported model generates the same tokens, from the same logits, with JAX and NumPy alone."""

import dataclasses
import json
import pickle
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_params, small_config
from jax import export
from safetensors import safe_open
from tokenizers import Tokenizer

from rustgpt_jax.config.schema import ModelConfig
from rustgpt_jax.errors import UserError
from rustgpt_jax.inference.generate import decode_steps, pad_stop_ids, start_generation
from rustgpt_jax.inference.sampling import Greedy
from rustgpt_jax.inference.text_generator import TextGenerator, WeightLayout
from rustgpt_jax.interop import stablehlo
from rustgpt_jax.interop.stablehlo import ExportOptions, export_stablehlo, write_stablehlo
from rustgpt_jax.model.interfaces import BlockInputs
from rustgpt_jax.model.mixers import MIXERS
from rustgpt_jax.model.positions import POSITIONS
from rustgpt_jax.tokenizers import Message, encode_prompt, train_tokenizer

ROOT = Path(__file__).parent.parent
PAGES = {name: (ROOT / "docs" / "how_to" / f"{name}.md").read_text(encoding="utf-8") for name in ("stablehlo", "iree")}
(GENERATE,), (COMPILE_IREE, GENERATE_IREE) = (
    re.findall(r"```python\n(.*?)```", page, re.DOTALL) for page in PAGES.values()
)

CONTEXT = 24
PROMPTS = [np.random.default_rng(length).integers(0, 61, length).tolist() for length in (5, 17, 1)]

# Generates with several exported models in one process, which finds no package but JAX, NumPy and what they need.
ISOLATED = """
import pickle, runpy, sys
sys.path[:] = [path for path in sys.path if "site-packages" not in path] + [sys.argv[1]]
for name in ("rustgpt_jax", "flax", "safetensors", "tokenizers"):
    try:
        __import__(name)
    except ImportError:
        continue
    sys.exit(f"{name} can be imported")
generate = runpy.run_path(sys.argv[2])["generate"]
work = pickle.load(sys.stdin.buffer)
pickle.dump([list(generate(*arguments)) for arguments in work], sys.stdout.buffer)
"""


@pytest.fixture(scope="module")
def isolated(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that calls `generate` of the page, for each of a list of arguments, in a separate process."""
    folder = tmp_path_factory.mktemp("isolated")
    (folder / "generate.py").write_text(GENERATE)
    (folder / "packages").mkdir()
    for package in ("jax", "jaxlib", "numpy", "ml_dtypes", "opt_einsum", "scipy", "flatbuffers"):
        for top in {file.parts[0] for file in files(package) or () if not file.parts[0].startswith((".", "_"))}:
            (folder / "packages" / top).symlink_to(Path(sys.modules["jax"].__file__).parents[1] / top)

    def run(*work: tuple[Path, Sequence[Sequence[int]], int]) -> list[list[tuple[np.ndarray, np.ndarray]]]:
        command = [sys.executable, "-I", "-S", "-c", ISOLATED, str(folder / "packages"), str(folder / "generate.py")]
        done = subprocess.run(command, input=pickle.dumps(work), capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
        return pickle.loads(done.stdout)

    return run


def make_generator(**changes: Any) -> TextGenerator:
    """Return a small model with random weights, and a tokenizer."""
    knobs = {
        "context_length": CONTEXT,
        "dtype": "float32",
        "attention.local_window": 7,
        "tie_embeddings": False,
    } | changes
    config = small_config(**{f"model.{knob}": value for knob, value in knobs.items()})
    tokenizer = train_tokenizer(dataclasses.replace(config.tokenizer, name="char", vocab_size=None), ["a text"])
    return TextGenerator(random_params(config.model), config.model, tokenizer, is_dialogue=False)


def generate_here(generator: TextGenerator, prompts: Sequence[Sequence[int]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the tokens and logits of each step of `generate`, with the decode loop called for one token at a time."""
    generator = generator.with_weight_layout(WeightLayout(None, "plain", "cpu"))
    state = start_generation(generator.params, prompts, generator.model, CONTEXT)
    steps = []
    for _ in range(CONTEXT - max(map(len, prompts))):
        logits_BV = np.asarray(state.logits_BV)
        steps.append((logits_BV.argmax(axis=1), logits_BV))
        state = decode_steps(
            generator.params,
            state,
            np.int32(1),
            (Greedy(),),
            jax.random.key(0),
            pad_stop_ids(()),
            model=generator.model,
        )
    return steps


def assert_same_steps(found: Any, expected: Any) -> None:
    assert len(found) == len(expected)
    for index, ((tokens, logits), (expected_tokens, expected_logits)) in enumerate(zip(found, expected, strict=True)):
        np.testing.assert_array_equal(tokens, expected_tokens, str(index))
        np.testing.assert_array_equal(logits, expected_logits, str(index))


def test_an_exported_model_generates_the_same_with_jax_and_numpy_alone(isolated: Any, tmp_path: Path) -> None:
    generator = make_generator()
    manifest = write_stablehlo(generator, tmp_path, ExportOptions())
    assert manifest["prefill_lengths"] == [16, CONTEXT]
    assert len([line for line in GENERATE.splitlines() if line.strip()]) <= 40
    (found,) = isolated((tmp_path, PROMPTS, CONTEXT))
    assert_same_steps(found, generate_here(generator, PROMPTS))


def read_exported(folder: Path, name: str) -> export.Exported:
    return export.deserialize(bytearray((folder / f"{name}.jax_export").read_bytes()))


def test_the_manifest_describes_the_programs(tmp_path: Path) -> None:
    generator = make_generator(mixers=("attention", "deltanet"), n_layers=2)
    write_stablehlo(generator, tmp_path, ExportOptions(batch=2, prefill_lengths=(16,)), "int8")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    header = safe_open(tmp_path / manifest["weights"], "np")
    assert list(manifest["programs"]) == ["decode", "prefill_16"]
    for name, program in manifest["programs"].items():
        exported = read_exported(tmp_path, name)
        assert exported.platforms == ("cpu", "cuda", "tpu")
        for key, avals in (("arguments", exported.in_avals), ("results", exported.out_avals)):
            arrays = [(tuple(array["shape"]), array["dtype"]) for array in program[key]]
            assert arrays == [(aval.shape, str(aval.dtype)) for aval in avals]
        names = [array["name"] for array in program["arguments"]]
        assert [name.removeprefix("weights/") for name in names if name.startswith("weights/")] == sorted(header.keys())
        assert names[-1] == ("positions" if name == "decode" else "lengths")
        # JAX guarantees that its own custom calls keep working; there are none of ours.
        assert set(re.findall(r"custom_call @(\w+)", exported.mlir_module())) <= {"lapack_strsm_ffi"}
    assert "I8" in {header.get_slice(name).get_dtype() for name in header.keys()}  # noqa: SIM118 (not a mapping)
    backend = Tokenizer.from_file(str(tmp_path / manifest["tokenizer"]))
    assert backend.encode("text").ids == encode_prompt(generator.tokenizer, [Message("text", "text")])
    tokens = manifest["tokens"]
    assert tokens["eos_token_id"] == generator.tokenizer.end_id and tokens["prefix_token_ids"] == [
        tokens["bos_token_id"]
    ]


def test_rows_that_do_not_fit_are_nan(tmp_path: Path) -> None:
    write_stablehlo(make_generator(), tmp_path, ExportOptions(prefill_lengths=(16,), cache_length=16))
    header = safe_open(tmp_path / "weights.safetensors", "np")
    weights = {name: header.get_tensor(name) for name in header.keys()}  # noqa: SIM118 (not a mapping)
    prefill, decode = (read_exported(tmp_path, name).call for name in ("prefill_16", "decode"))
    logits, cache = jax.jit(prefill)(weights, np.ones((3, 16), np.int32), np.array([0, 16, 17], np.int32))
    assert np.isnan(logits).all(axis=1).tolist() == [True, False, True]
    logits, _ = jax.jit(decode)(weights, cache, np.full(3, 2, np.int32), np.array([-1, 15, 16], np.int32))
    assert np.isnan(logits).any(axis=1).tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("options", "dtype", "message"),
    [
        (ExportOptions(platforms=("cpu", "cdua")), None, "Did you mean 'cuda'"),
        (ExportOptions(), "float16", "float32, bfloat16, int8"),
        (ExportOptions(cache_length=25), None, "only 24 tokens"),
        (ExportOptions(cache_length=20, prefill_lengths=(16, 24)), None, "room for only 20 tokens"),
        (ExportOptions(), None, "InconclusiveDimensionOperation.* --batch=1"),
        (ExportOptions(batch=1), None, "No space left"),
    ],
)
def test_a_failed_export_leaves_nothing(
    options: ExportOptions, dtype: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = make_generator(feedforwards=("moe",))
    monkeypatch.setattr(stablehlo, "load_model", lambda path, which: SimpleNamespace(generator=generator))

    def fail(*arguments: Any) -> None:
        raise UserError("No space left")

    monkeypatch.setattr(stablehlo, "save_hf_tokenizer", fail)
    with pytest.raises(UserError, match=message):
        export_stablehlo(tmp_path / "run", tmp_path / "a.stablehlo", "last", dtype, print, options=options)
    assert list(tmp_path.iterdir()) == []


class PositionalMean(nn.Module):
    """A user's mixer without a cache: a learned mean of the earlier tokens."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, inputs: BlockInputs) -> jax.Array:
        weight_D = self.param("weight", nn.initializers.ones, (x_BTD.shape[-1],))
        is_token_BT1 = (inputs.segments_BT > 0)[..., None]
        sums_BTD = jnp.cumsum(jnp.where(is_token_BT1, x_BTD, 0), axis=1)
        return weight_D[None, None] * sums_BTD / (1 + inputs.positions_BT[..., None]).astype(x_BTD.dtype)


# Changes of the model, and of the options.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **{name: ({"mixers": (name,)}, {}) for name in MIXERS},
    # JAX lowers cumsum differently for several platforms.
    "positional_mean": ({"mixers": ("positional_mean",)}, {"batch": 3, "platforms": ("cpu",)}),
    "positions": ({"positions": tuple(POSITIONS), "n_layers": 7}, {"batch": 3}),
    "moe": ({"feedforwards": ("moe",)}, {"batch": 3}),
    "moe with a capacity": ({"feedforwards": ("moe",), "moe.capacity_factor": 1.0}, {}),
    "norms and sinks": (
        {"norm_placement": "sandwich", "final_logit_softcap": 5.0, "attention.sinks": True, "tie_embeddings": False},
        {},
    ),
}


@pytest.fixture
def positional_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register a mixer of a user."""
    monkeypatch.setitem(MIXERS, "positional_mean", PositionalMean)


@pytest.mark.slow
def test_every_component_generates_the_same(positional_mean: None, isolated: Any, tmp_path: Path) -> None:
    expected = {}
    for name, (changes, options) in CASES.items():
        (tmp_path / name).mkdir()
        generator = make_generator(**changes)
        write_stablehlo(generator, tmp_path / name, ExportOptions(prefill_lengths=(CONTEXT,), **options))
        expected[name] = generate_here(generator, PROMPTS)
    found = dict(zip(CASES, isolated(*((tmp_path / name, PROMPTS, CONTEXT) for name in CASES)), strict=True))
    for name in CASES:
        assert_same_steps(found[name], expected[name])


@pytest.mark.extras
def test_iree_compiles_all_but_deltanet_to_the_same_tokens(positional_mean: None, tmp_path: Path) -> None:
    pytest.importorskip("iree.compiler")
    pytest.importorskip("iree.runtime")
    (tmp_path / "compile_iree.py").write_text(COMPILE_IREE)
    generate: Any = {"__name__": "generate_iree"}
    exec(GENERATE_IREE, generate)
    prompt = PROMPTS[0]
    options = ExportOptions(batch=1, platforms=("cpu",), prefill_lengths=(CONTEXT,))
    for name in ("attention", "local_attention", "rg_lru", "deltanet", "moe with a capacity"):
        (tmp_path / name).mkdir()
        generator = make_generator(**CASES[name][0])
        write_stablehlo(generator, tmp_path / name, options)
        command = [sys.executable, str(tmp_path / "compile_iree.py"), str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True)
        if name == "deltanet":
            assert "lapack_strsm_ffi" in done.stderr and done.returncode
            continue
        assert done.returncode == 0, done.stderr
        found = list(generate["generate"](tmp_path / name, prompt, CONTEXT))
        expected = generate_here(generator, [prompt])
        stops = [index for index, (token_B, _) in enumerate(expected) if token_B[0] in generator.tokenizer.stop_ids]
        for (token, logits_V), (token_B, logits_BV) in zip(found, expected[: min(stops, default=None)], strict=True):
            assert token == token_B[0]
            np.testing.assert_allclose(logits_V, logits_BV[0], atol=2e-5)
