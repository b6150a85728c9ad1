"""Hugging Face folders in and out: the same logits, the same bytes, little memory, and errors that name the culprit."""

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from conftest import random_params, small_config

from configs import base
from experiments.benchmarks.family_logits import CASES, TOKENS, VARIANTS, model_config, random_reference
from rustgpt_jax.config.schema import ModelConfig, replace_paths
from rustgpt_jax.config.validation import resolve
from rustgpt_jax.errors import UserError
from rustgpt_jax.inference.generate import generate
from rustgpt_jax.inference.sampling import Greedy
from rustgpt_jax.interop import convert
from rustgpt_jax.interop.architectures import ARCHITECTURES
from rustgpt_jax.interop.config_mapping import (
    HFConfigReader,
    expand_pattern,
    model_config_differences,
    shortest_pattern,
)
from rustgpt_jax.interop.hf_checkpoint import export_model, import_parameters, read_folder, read_model
from rustgpt_jax.model import transformer
from rustgpt_jax.model.flops import parameter_shapes
from rustgpt_jax.model.presets import FAMILIES
from rustgpt_jax.workdir.params_io import (
    NewTensor,
    StoredTensor,
    open_parameters,
    open_safetensors,
    read_parameters,
    write_safetensors,
)

pytestmark = pytest.mark.usefixtures("quick_codegen")

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
LLAMA = small_config(
    **{
        "model.attention.n_kv_heads": 2,
        "model.attention.head_dim": 16,
        "model.tie_embeddings": False,
        "model.n_layers": 3,
    }
).model


def imported(folder: Path, file: Path) -> tuple[ModelConfig, Any]:
    """The model of a folder and its parameters, by way of a file."""
    knobs, architecture, _ = read_model(folder)
    model = model_config(knobs)
    import_parameters(folder, file, model, architecture)
    return model, read_parameters(file, parameter_shapes(model))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# Against transformers.


@pytest.fixture
def torch() -> Iterator[Any]:
    pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        yield torch


EVERY = CASES | VARIANTS


@pytest.mark.oracle
@pytest.mark.parametrize("name", EVERY)
def test_logits_equal_those_of_transformers_both_ways(name: str, torch: Any, tmp_path: Path) -> None:
    reference = random_reference(EVERY[name])
    reference.save_pretrained(tmp_path / "there")
    model, params = imported(tmp_path / "there", tmp_path / "parameters.safetensors")
    tokens_BT = np.random.default_rng(0).integers(0, model.vocab_size, (2, TOKENS))
    wanted_BTV = reference(torch.tensor(tokens_BT)).logits.numpy()
    logits_BTV, _ = transformer.apply(params, tokens_BT, model)
    np.testing.assert_allclose(logits_BTV, wanted_BTV, rtol=0, atol=1e-4)
    assert np.std(wanted_BTV) > 0.3

    import transformers

    architecture = export_model(params, model, tmp_path / "back")
    assert architecture.roundtrip_differences(model) == {}
    back, found = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not found["missing_keys"] and not found["unexpected_keys"] and not found["mismatched_keys"]
    np.testing.assert_allclose(back(torch.tensor(tokens_BT)).logits.numpy(), wanted_BTV, rtol=0, atol=1e-4)


@pytest.mark.oracle
def test_longrope_beyond_the_original_context_equals_transformers(torch: Any, tmp_path: Path) -> None:
    reference = random_reference(EVERY["llama, longrope"])
    reference.save_pretrained(tmp_path / "there")
    model, params = imported(tmp_path / "there", tmp_path / "parameters.safetensors")
    tokens_BT = np.random.default_rng(0).integers(0, model.vocab_size, (1, 40))
    wanted_BTV = reference(torch.tensor(tokens_BT)).logits.numpy()
    logits_BTV, _ = transformer.apply(params, tokens_BT, dataclasses.replace(model, context_length=64))
    np.testing.assert_allclose(logits_BTV, wanted_BTV, rtol=0, atol=1e-4)


@pytest.mark.oracle
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_equal_those_of_transformers(name: str, torch: Any, tmp_path: Path) -> None:
    reference = random_reference(EVERY[name], seed=2)
    reference.save_pretrained(tmp_path)
    model, params = imported(tmp_path, tmp_path / "parameters.safetensors")
    prompt = np.random.default_rng(2).integers(0, model.vocab_size, 11).tolist()
    ids, most = torch.tensor([prompt]), min(32, model.context_length - len(prompt))
    written = reference.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=most)
    (drawn,) = generate(params, [prompt], model, samplers=(Greedy(),), key=jax.random.key(0), max_tokens=most)
    assert drawn == written[0, len(prompt) :].tolist()


@pytest.mark.oracle
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_defaults_equal_those_of_transformers(name: str, torch: Any) -> None:
    import transformers

    theirs = getattr(transformers, name).config_class()
    ours = ARCHITECTURES[name].defaults
    rope_keys = {"rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq", "partial_rotary_factor"}
    # Written out by the class when it is made, from other keys.
    filled = {"layer_types", "head_dim", "num_key_value_heads", "no_rope_layers", "sliding_window", "mlp_only_layers"}
    fields = {field.name: field.default for field in dataclasses.fields(type(theirs))}
    for key in ours.keys() - rope_keys:
        if key in fields:
            assert ours[key] == fields[key] or not (ours[key] or fields[key]), key
        elif hasattr(theirs, key) and key not in filled:
            assert ours[key] == getattr(theirs, key), key
    rope = theirs.to_dict().get("rope_parameters")
    if rope:
        whole = rope.get("full_attention", rope)
        fraction = whole.get("partial_rotary_factor")
        assert (fraction or 1.0) == (ours["partial_rotary_factor"] or 1.0)
        assert whole.keys() <= {"rope_type", "rope_theta", "partial_rotary_factor"}
        assert (whole["rope_type"], whole["rope_theta"]) == ("default", ours["rope_theta"])


class Recorded(dict[str, Any]):
    """A mapping that remembers which keys were asked for."""

    def __init__(self, *values: Any) -> None:
        super().__init__(*values)
        self.asked = set[str]()

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)


# Config fields of `transformers` that do not affect logits: training, other heads, output options, names.
IGNORED_KEYS = (
    *("_name_or_path", "architectures", "dtype", "id2label", "label2id", "model_type", "problem_type"),
    *("transformers_version", "use_cache", "return_dict", "output_attentions", "output_hidden_states"),
    *("output_router_logits", "is_encoder_decoder", "chunk_size_feed_forward", "pretraining_tp"),
    *(
        "attention_dropout",
        "attn_pdrop",
        "embd_pdrop",
        "resid_pdrop",
        "hidden_dropout",
        "router_aux_loss_coef",
        "router_jitter_noise",
    ),
    *("initializer_range", "w_init_variance_scale", "final_w_init_variance_scale", "reorder_and_upcast_attn"),
    *("summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "_sliding_window_pattern"),
)


@pytest.mark.oracle
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_field_of_transformers_config_is_read_or_ignored_on_purpose(name: str, torch: Any) -> None:
    """A setting that nobody reads would change the computation there and not here."""
    import transformers

    architecture, theirs = ARCHITECTURES[name], getattr(transformers, name).config_class()
    values = theirs.to_dict()
    asked = set[str]()
    # Some keys are read only where others ask for them.
    for more in ({}, {"use_sliding_window": True, "sliding_window": 7, "layer_types": None}):
        config = Recorded(values | {key: value for key, value in more.items() if key in values or key == "layer_types"})
        settings = HFConfigReader(Path("config.json"), config, architecture.defaults)
        for correspondence in architecture.mappings:
            correspondence.read(settings)
        asked |= config.asked
    asked |= architecture.hf_config(model_config(FAMILIES[architecture.family] | {"vocab_size": 97})).keys()
    fields = set(values) | {field.name for field in dataclasses.fields(type(theirs))}
    assert fields - asked - set(architecture.aliases) - set(IGNORED_KEYS) == set()
    # Computed from block_types, not stored.
    aliases = {alias: key for alias, key in theirs.attribute_map.items() if key != "layers_block_type"}
    assert aliases == architecture.aliases


def test_aliases_of_keys_are_read_and_must_agree() -> None:
    file = GOLDEN / "recurrent_gemma" / "config.json"
    config, architecture = json.loads(file.read_text()), ARCHITECTURES["RecurrentGemmaForCausalLM"]
    renamed = {key: value for key, value in config.items() if key != "attention_window_size"} | {"sliding_window": 7}
    assert config["attention_window_size"] == 7
    assert architecture.knobs(renamed, file) == architecture.knobs(config, file)
    with pytest.raises(UserError, match="sliding_window=9 and attention_window_size=7 are the same setting"):
        architecture.knobs(config | {"sliding_window": 9}, file)


@pytest.mark.oracle
def test_compare_logits_finds_differences(torch: Any, tmp_path: Path) -> None:
    export_model(random_params(LLAMA), LLAMA, tmp_path / "there")
    found = convert.compare_logits(tmp_path / "there", lambda: random_params(LLAMA), LLAMA)
    assert found.difference is not None and found.difference < 1e-4
    other = convert.compare_logits(tmp_path / "there", lambda: random_params(LLAMA, seed=1), LLAMA)
    assert other.difference is not None and other.difference > 0.1


def test_compare_logits_gives_the_reason_without_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    found = convert.compare_logits(tmp_path, dict, LLAMA)
    assert (found.difference, found.reason) == (None, "torch is not installed")


# There and back, without torch.


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_export_import_export_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    first, file, second = tmp_path / "first", tmp_path / "parameters.safetensors", tmp_path / "second"
    knobs, architecture, tokens = read_model(GOLDEN / name)
    model = model_config(knobs)
    import_parameters(GOLDEN / name, file, model, architecture)
    export_model(open_parameters(file), model, first, architecture=architecture.name, special_tokens=tokens)
    knobs, architecture, tokens = read_model(first)
    assert model_config_differences(model_config(knobs), model) == {}
    import_parameters(first, file, model_config(knobs), architecture)
    model = model_config(knobs)
    export_model(open_parameters(file), model, second, architecture=architecture.name, special_tokens=tokens)
    assert contents(first) == contents(second)
    original, exported = read_folder(GOLDEN / name), read_folder(first)
    assert original.keys() == exported.keys()
    assert all(np.array_equal(original[key].read(), exported[key].read()) for key in original)


# One family of each set of tensor rules and pattern of layers.
STRUCTURES = ("gpt2", "gemma3", "mixtral", "olmo2", "phi3", "qwen3_moe", "recurrent_gemma", "smollm3", "stablelm")


@pytest.mark.parametrize("name", STRUCTURES)
def test_export_and_import_preserve_parameters(name: str, tmp_path: Path) -> None:
    config = base.get_config()
    config.model.update_from_flattened_dict(FAMILIES[name])
    config.model.update({"vocab_size": 31, "d_model": 64, "d_ff": 24, "n_layers": 7, "moe": {"n_experts": 3}})
    config.model.recurrent.blocks = config.model.attention.n_heads
    model = resolve(config).model
    params = random_params(model)
    export_model(params, model, tmp_path / "there", shard_bytes=4000)
    assert len(list((tmp_path / "there").glob("*.safetensors"))) > 2
    again, read = imported(tmp_path / "there", tmp_path / "parameters.safetensors")
    assert model_config_differences(model, again) == {}
    jax.tree.map(np.testing.assert_array_equal, read, params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_export_in_another_dtype_rounds_once(dtype: str, tmp_path: Path) -> None:
    params = random_params(LLAMA)
    export_model(params, LLAMA, tmp_path / "there", dtype=dtype)
    assert json.loads((tmp_path / "there" / "config.json").read_text())["torch_dtype"] == dtype
    _, read = imported(tmp_path / "there", tmp_path / "parameters.safetensors")
    kind = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[dtype]
    jax.tree.map(lambda one, other: np.testing.assert_array_equal(one, other.astype(kind)), read, params)
    stored = open_safetensors(tmp_path / "parameters.safetensors").values()
    assert {tensor.dtype for tensor in stored} == {np.dtype(kind)}


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_fused_experts_are_read(name: str, tmp_path: Path) -> None:
    """The form that transformers 5 holds in memory: gate and up side by side, all experts in one tensor."""
    knobs, architecture, _ = read_model(GOLDEN / name)
    model = model_config(knobs)
    import_parameters(GOLDEN / name, tmp_path / "one_by_one", model, architecture)
    stored = {key: tensor.read().astype(np.float32) for key, tensor in read_folder(GOLDEN / name).items()}
    merged = fused(stored)
    assert not any(".experts.0." in key for key in merged)
    (tmp_path / "there").mkdir()
    save(merged, tmp_path / "there" / "model.safetensors")
    import_parameters(tmp_path / "there", tmp_path / "at_once", model, architecture)
    shapes = parameter_shapes(model)
    one, other = (read_parameters(tmp_path / form, shapes) for form in ("one_by_one", "at_once"))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def save(tensors: dict[str, np.ndarray], file: Path) -> None:
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, file)


def fused(stored: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    merged: dict[str, np.ndarray] = {}
    experts: dict[str, dict[str, list[np.ndarray]]] = {}
    renamed = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    for name, tensor in stored.items():
        name = name.replace("block_sparse_moe", "mlp")
        if match := re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", name):
            group, number, matrix = match.groups()
            of_group = experts.setdefault(group, {}).setdefault(renamed.get(matrix, matrix), [])
            assert len(of_group) == int(number)
            of_group.append(tensor)
        else:
            merged[name] = tensor
    for group, matrices in experts.items():
        gate, up, down = (np.stack(matrices[name]) for name in ("gate_proj", "up_proj", "down_proj"))
        merged |= {f"{group}.gate_up_proj": np.concatenate([gate, up], axis=1), f"{group}.down_proj": down}
    return merged


def test_unprefixed_names_masks_and_tied_heads_are_read(tmp_path: Path) -> None:
    """The published gpt2 has names without 'transformer.', and masks."""
    knobs, architecture, _ = read_model(GOLDEN / "gpt2")
    model = model_config(knobs)
    stored = {key: tensor.read().astype(np.float32) for key, tensor in read_folder(GOLDEN / "gpt2").items()}
    bare = {key.removeprefix("transformer."): tensor for key, tensor in stored.items()}
    bare |= {"h.0.attn.bias": np.ones((1, 1, 4, 4), np.float32), "lm_head.weight": bare["wte.weight"]}
    save(bare, tmp_path / "model.safetensors")
    import_parameters(tmp_path, tmp_path / "bare", model, architecture)
    import_parameters(GOLDEN / "gpt2", tmp_path / "prefixed", model, architecture)
    one, other = (read_parameters(tmp_path / name, parameter_shapes(model)) for name in ("bare", "prefixed"))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_tied_model_that_keeps_only_its_head_is_read(tmp_path: Path) -> None:
    model = dataclasses.replace(LLAMA, tie_embeddings=True)
    params = random_params(model)
    export_model(params, model, tmp_path / "there")
    change(
        tmp_path / "there", lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")})
    )
    _, read = imported(tmp_path / "there", tmp_path / "parameters")
    jax.tree.map(np.testing.assert_array_equal, read, params)


def test_an_untied_model_without_embeddings_is_refused(tmp_path: Path) -> None:
    export_model(random_params(LLAMA), LLAMA, tmp_path / "there")
    change(tmp_path / "there", lambda tensors: tensors.pop("model.embed_tokens.weight"))
    with pytest.raises(UserError, match=r"has no tensor model.embed_tokens.weight"):
        imported(tmp_path / "there", tmp_path / "parameters")


def test_float64_weights_are_rounded_to_float32(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    params: dict[str, np.ndarray] = {}
    export_model(random_params(LLAMA), LLAMA, tmp_path / "there")

    def widen(tensors: dict[str, np.ndarray]) -> None:
        wide = {name: array.astype(np.float64) + 1e-9 * rng.random() for name, array in tensors.items()}
        tensors.update(wide)
        params.update(wide)

    change(tmp_path / "there", widen)
    assert {tensor.dtype_name for tensor in read_folder(tmp_path / "there").values()} == {"F64"}
    _, read = imported(tmp_path / "there", tmp_path / "parameters")
    assert {tensor.dtype for tensor in open_safetensors(tmp_path / "parameters").values()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(read["embedding"]["table"], params["model.embed_tokens.weight"].astype(np.float32))
    kernel = read["blocks"]["0"]["mixer"]["query"]["kernel"][1]
    np.testing.assert_array_equal(kernel, params["model.layers.1.self_attn.q_proj.weight"].astype(np.float32).T)


def test_a_pattern_is_the_shortest_that_gives_the_layers() -> None:
    for layers in range(1, 12):
        for pattern in ("a", "aab", "abab", "aaaaab", "abcd"):
            names = expand_pattern(pattern, layers)
            shortest = shortest_pattern(names)
            assert expand_pattern(shortest, layers) == names
            assert all(expand_pattern(names[:period], layers) != names for period in range(1, len(shortest)))


# What cannot be said.


@pytest.mark.parametrize(
    ("knobs", "named"),
    [
        ({"attention.sinks": True}, "attention.sinks"),
        ({"norm": "layernorm"}, "norm"),
        ({"feedforwards": ("moe",), "moe.capacity_factor": 1.0}, "moe.capacity_factor"),
        ({"rope.fraction": 0.5, "attention.qk_norm": "head"}, "qk_norm"),
        ({"positions": ("alibi",)}, "positions"),
        ({"final_logit_softcap": 3.0}, "final_logit_softcap"),
    ],
)
def test_a_model_that_no_architecture_can_say_is_refused(knobs: dict[str, Any], named: str, tmp_path: Path) -> None:
    model = replace_paths(LLAMA, knobs)
    with pytest.raises(UserError, match=rf"The nearest, \w+, cannot represent config.model: .*{named}"):
        export_model({}, model, tmp_path / "there")
    with pytest.raises(UserError, match="LlamaForCausalLM cannot represent config.model"):
        export_model({}, model, tmp_path / "there", architecture="LlamaForCausalLM")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["FalconForCausalLM"]}, "unknown architecture 'FalconForCausalLM'"),
        ({"architectures": None, "model_type": "lama"}, "'lama' is unknown. Did you mean 'llama'"),
        ({"hidden_act": "relu6"}, "hidden_act='relu6'"),
        ({"rope_scaling": {"rope_type": "proportional", "factor": 2.0}}, "unknown type 'proportional'"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "has no 'short_factor'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "has no 'low_freq_factor'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": 3}}, "truncate must be True or False"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"is_causal": False}, "is_causal is false"),
        ({"num_hidden_layers": "many"}, "num_hidden_layers must be a whole number"),
        ({"hidden_size": None}, "hidden_size must be a whole number"),
    ],
)
def test_unsupported_config_values_are_refused_by_name(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    export_model(random_params(LLAMA), LLAMA, tmp_path / "there")
    file = tmp_path / "there" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        read_model(tmp_path / "there")
    assert "config.json" in str(raised.value)


@pytest.mark.parametrize(
    ("scaling", "computed"),
    [
        ({"type": "yarn", "factor": 2.0, "finetuned": True}, {"type": "yarn", "factor": 2.0}),
        ({"rope_type": "linear", "factor": 2.0, "offset": 1}, {"rope_type": "linear", "factor": 2.0}),
        ({"rope_type": "default", "mrope_section": [2, 3]}, None),
    ],
)
def test_unused_rope_keys_are_ignored_with_a_warning(scaling: Any, computed: Any) -> None:
    file, warnings = GOLDEN / "llama2" / "config.json", list[str]()
    config = {key: value for key, value in json.loads(file.read_text()).items() if key != "rope_parameters"}
    architecture = ARCHITECTURES["LlamaForCausalLM"]
    knobs = architecture.knobs(config | {"rope_scaling": scaling}, file, warnings.append)
    assert knobs == architecture.knobs(config | {"rope_scaling": computed}, file)
    (warning,) = warnings
    (ignored,) = scaling.keys() - {"type", "rope_type", "factor"}
    assert f"the key {ignored!r} has no effect and is ignored" in warning


def test_dynamic_rope_is_read_unscaled_with_a_warning() -> None:
    """As in transformers, which scales texts longer than max_position_embeddings only; here they cannot be longer."""
    file, warnings = GOLDEN / "llama2" / "config.json", list[str]()
    config = {key: value for key, value in json.loads(file.read_text()).items() if key != "rope_parameters"}
    architecture = ARCHITECTURES["LlamaForCausalLM"]
    knobs = architecture.knobs(config | {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, file, warnings.append)
    assert knobs == architecture.knobs(config | {"rope_scaling": None}, file)
    assert knobs["context_length"] == config["max_position_embeddings"]
    (warning,) = warnings
    assert "not scaled with a longer config.model.context_length either" in warning


def test_longrope_is_read_for_the_original_context() -> None:
    file, warnings = GOLDEN / "llama2" / "config.json", list[str]()
    config = {key: value for key, value in json.loads(file.read_text()).items() if key != "rope_parameters"}
    pairs = config["head_dim"] // 2
    factors = {"short_factor": [1.0] * pairs, "long_factor": [4.0] * pairs}
    scaling = {"rope_type": "longrope", "original_max_position_embeddings": 16} | factors
    architecture = ARCHITECTURES["LlamaForCausalLM"]
    knobs = architecture.knobs(config | {"rope_scaling": scaling}, file, warnings.append)
    assert knobs["context_length"] == 16 and knobs["rope.factor"] == config["max_position_embeddings"] / 16
    assert "longrope is read with its short factors" in warnings[0]
    # A model with a longer context uses the long factors for all texts, and says so.
    model = dataclasses.replace(model_config(knobs), context_length=64)
    written = architecture.hf_config(model)["rope_scaling"]
    assert written["short_factor"] == written["long_factor"] == [4.0] * pairs
    assert architecture.roundtrip_differences(model) == {}


ROPES = [
    {"rope_type": "yarn", key: value}
    for key in ("original_max_position_embeddings", "factor", "mscale", "beta_fast", "attention_factor", "truncate")
    for value in ("x", None, -1, 0)
]


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_invalid_values_in_a_config_raise_user_errors(name: str) -> None:
    file = GOLDEN / name / "config.json"
    _, architecture, _ = read_model(file.parent)
    config = json.loads(file.read_text())
    for key in [*config, *architecture.defaults]:
        for nonsense in ("x", None, -1, 0, 0.5, True, [], [3], {}, {"full_attention": 3}, *ROPES):
            try:
                knobs = architecture.knobs(config | {key: nonsense}, file)
            except UserError:
                continue
            assert knobs.keys() >= FAMILIES[name].keys()


def change(folder: Path, edit: Callable[[dict[str, np.ndarray]], Any]) -> None:
    from safetensors.numpy import load_file

    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save(tensors, folder / "model.safetensors")


NORM = "model.layers.1.input_layernorm.weight"


def edit_bytes(edit: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    def damage(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(edit(file.read_bytes()))

    return damage


def rename(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / "model.safetensors").rename(folder / name)


def index(text: str) -> Callable[[Path], Any]:
    """Replace the tensors by an index."""

    def damage(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(text)

    return damage


def edit_tensors(**tensors: Any) -> Callable[[Path], Any]:
    return lambda folder: change(folder, lambda stored: stored.update({NORM: tensors["norm"]}))


def weight_map(shard: str) -> str:
    return json.dumps({"weight_map": {NORM: shard}})


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing tensor": (lambda folder: change(folder, lambda stored: stored.pop(NORM)), f"has no tensor {NORM}"),
    "unknown tensor": (
        lambda folder: change(folder, lambda stored: stored.update({"model.layers.7.norm.weight": np.ones(3)})),
        "model.layers.7.norm.weight",
    ),
    "wrong shape": (edit_tensors(norm=np.ones(33, np.float32)), "has the shape (33,); config.json requires (32,)"),
    "wrong dtype": (edit_tensors(norm=np.ones(32, np.int8)), f"{NORM} has the data type I8"),
    "truncated by 1": (edit_bytes(lambda data: data[:-1]), "model.safetensors is damaged or truncated"),
    "truncated by 20,000": (edit_bytes(lambda data: data[:-20_000]), "model.safetensors is damaged or truncated"),
    "truncated header": (edit_bytes(lambda data: data[:100]), "model.safetensors is damaged or truncated"),
    "wrong header": (edit_bytes(lambda data: data.replace(b"data_", b"date_")), "model.safetensors is damaged"),
    "pickles": (rename("pytorch_model.bin"), "only as pickles"),
    "no tensors": (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
    "missing shard": (index(weight_map("model-1.safetensors")), "names model-1.safetensors, which is missing"),
    "long shard name": (index(weight_map("9" * 300)), "9999, which is missing"),
    "shard elsewhere": (index(weight_map("../secret.safetensors")), "names '../secret.safetensors'"),
    "damaged index": (index("{"), "model.safetensors.index.json is damaged"),
    "no index": (rename("model-1.safetensors"), "neither model.safetensors nor model.safetensors.index.json"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_import_names_damage_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    damage, message = DAMAGE[name]
    export_model(random_params(LLAMA), LLAMA, tmp_path / "there")
    damage(tmp_path / "there")
    knobs, architecture, _ = read_model(tmp_path / "there")
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match=re.escape(message)):
        import_parameters(tmp_path / "there", tmp_path / "run" / "parameters", model_config(knobs), architecture)
    assert list((tmp_path / "run").iterdir()) == []


def test_a_file_truncated_during_import_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    export_model(random_params(LLAMA), LLAMA, tmp_path / "there")
    file, whole = tmp_path / "there" / "model.safetensors", StoredTensor.read

    def cut_short(stored: StoredTensor) -> np.ndarray:
        if stored.name == NORM:
            file.write_bytes(file.read_bytes()[:5000])
        return whole(stored)

    monkeypatch.setattr(StoredTensor, "read", cut_short)
    with pytest.raises(UserError, match="model.safetensors cannot be read: .*fill whole buffer"):
        imported(tmp_path / "there", tmp_path / "parameters")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_tensors_in_a_file_are_aligned(tmp_path: Path) -> None:
    values = {
        "odd": np.ones(3, ml_dtypes.bfloat16),
        "wide": np.ones((2, 5), np.float32),
        "half": np.ones(8, np.float16),
    }
    new = [NewTensor(name, array.dtype, array.shape, lambda array=array: [array]) for name, array in values.items()]
    write_safetensors(tmp_path / "file", new, {})
    data, stored = (tmp_path / "file").read_bytes(), open_safetensors(tmp_path / "file")
    n_header = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n_header])
    offsets = {name: 8 + n_header + header[name]["data_offsets"][0] for name in values}
    assert all(offsets[name] % array.dtype.itemsize == 0 for name, array in values.items())
    assert all(np.array_equal(stored[name].read(), array) for name, array in values.items())


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.touch(), lambda path: path.mkdir()])
def test_folders_without_a_model_are_refused(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "there")
    with pytest.raises(UserError, match="there is not a folder with a Hugging Face model"):
        read_model(tmp_path / "there")


def test_a_head_that_differs_from_the_tied_embedding_is_refused(tmp_path: Path) -> None:
    export_model(random_params(LLAMA), LLAMA, tmp_path / "there")
    _, architecture, _ = read_model(tmp_path / "there")
    tied = dataclasses.replace(LLAMA, tie_embeddings=True)
    with pytest.raises(UserError, match="tie_word_embeddings, but lm_head.weight differs"):
        import_parameters(tmp_path / "there", tmp_path / "parameters", tied, architecture)


@pytest.mark.parametrize("layers", [2, 4])
def test_parameters_of_another_model_are_refused(layers: int, tmp_path: Path) -> None:
    export_model(random_params(LLAMA), LLAMA, tmp_path / "there")
    imported(tmp_path / "there", tmp_path / "file")
    shapes = parameter_shapes(dataclasses.replace(LLAMA, n_layers=layers))
    with pytest.raises(UserError, match=r"blocks/0/.* has shape \(3, "):
        read_parameters(tmp_path / "file", shapes)
    with pytest.raises(UserError, match="has no parameter blocks/0/mixer/key/bias"):
        read_parameters(tmp_path / "file", parameter_shapes(replace_paths(LLAMA, {"attention.qkv_bias": True})))
    with pytest.raises(UserError, match="has a parameter head/kernel, which the model of this run does not have"):
        read_parameters(tmp_path / "file", parameter_shapes(dataclasses.replace(LLAMA, tie_embeddings=True)))


def test_failed_exports_leave_nothing(tmp_path: Path) -> None:
    class Broken(Exception):
        pass

    def fail(folder: Path) -> None:
        assert (folder / "model.safetensors").exists()
        raise Broken

    with pytest.raises(Broken):
        export_model(random_params(LLAMA), LLAMA, tmp_path / "there", finish=fail)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes").touch()
    with pytest.raises(UserError, match="there already exists and is not empty"):
        export_model(random_params(LLAMA), LLAMA, tmp_path / "there")
    assert [file.name for file in tmp_path.rglob("*")] == ["there", "notes"]


# Memory.

PEAK = """
import sys
from pathlib import Path
import jax, numpy as np
from experiments.benchmarks.family_logits import model_config
from rustgpt_jax.interop.hf_checkpoint import export_model
from rustgpt_jax.interop.hf_checkpoint import read_model, import_parameters
from rustgpt_jax.workdir.params_io import open_parameters, read_parameters
from rustgpt_jax.model.flops import parameter_shapes, total_bytes

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

folder = Path(sys.argv[1])
knobs, architecture, _ = read_model(folder / "there")
model = model_config(knobs)
shapes = parameter_shapes(model)
jax.device_put(np.ones(1)).block_until_ready()
file = folder / "parameters"
before = status("VmRSS")

def peak(name, work):
    Path("/proc/self/clear_refs").write_text("5")
    result = work()
    print(name, (status("VmHWM") - before) / total_bytes(shapes))
    return result

peak("write", lambda: import_parameters(folder / "there", file, model, architecture))
peak("copy", lambda: export_model(open_parameters(file), model, folder / "copy"))
params = peak("read", lambda: jax.block_until_ready(read_parameters(file, shapes)))
peak("export", lambda: export_model(params, model, folder / "back", dtype="bfloat16"))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's record of a process's memory")
@pytest.mark.parametrize(
    ("family", "vocab_size", "dtype"), [("llama2", 8000, "float32"), ("gemma3", 60000, "bfloat16")]
)
def test_import_and_export_need_little_more_memory_than_the_model(
    family: str, vocab_size: int, dtype: str, tmp_path: Path
) -> None:
    config = base.get_config()
    config.model.update_from_flattened_dict(FAMILIES[family])
    config.model.update({"vocab_size": vocab_size, "d_model": 512, "n_layers": 7, "attention": {"n_heads": 8}})
    model = resolve(config).model
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), parameter_shapes(model))
    export_model(params, model, tmp_path / "there", dtype=dtype)
    words = [sys.executable, "-c", PEAK, str(tmp_path)]
    shown = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    peaks = {name: float(share) for name, share in map(str.split, shown.splitlines())}
    assert peaks.keys() == {"write", "copy", "read", "export"}
    assert max(peaks.values()) < 1.3, peaks
    assert peaks["read"] > 0.9
