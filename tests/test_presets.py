"""Presets: they match the released models, and golden models have the logits of transformers, without torch."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_tree

from configs import base
from rustgpt_jax.config.schema import ModelConfig, flatten, replace_paths
from rustgpt_jax.config.validation import resolve
from rustgpt_jax.inference.generate import generate
from rustgpt_jax.inference.sampling import Greedy
from rustgpt_jax.interop.architectures import ARCHITECTURES, architecture_of
from rustgpt_jax.interop.config_mapping import canonical_config, model_config_differences
from rustgpt_jax.interop.hf_checkpoint import import_parameters, read_model
from rustgpt_jax.model import transformer
from rustgpt_jax.model.flops import parameter_shapes, total_size
from rustgpt_jax.model.presets import FAMILIES, NOT_IN_LOGITS, SIZES
from rustgpt_jax.workdir.params_io import read_parameters

pytestmark = pytest.mark.usefixtures("quick_codegen")

GOLDEN = Path(__file__).parent / "golden"


def with_knobs(knobs: dict[str, Any]) -> ModelConfig:
    config = base.get_config()
    config.model.update_from_flattened_dict(knobs)
    return resolve(config).model


# Presets.


def test_every_preset_sets_all_knobs_but_sizes_and_those_not_in_logits() -> None:
    (said,) = {frozenset(knobs) for knobs in FAMILIES.values()}
    every = set(flatten(ModelConfig()))
    assert said | SIZES | NOT_IN_LOGITS == every
    assert not (said & SIZES or said & NOT_IN_LOGITS)


def test_every_knob_is_part_of_the_computation_or_not_in_logits() -> None:
    parts: dict[str, Any] = {
        "mixers": ("local_attention", "latent_attention", "rg_lru"),
        "feedforwards": ("swiglu", "moe"),
        "positions": ("rope", "local_rope"),
    }
    model = replace_paths(small(parts | {"n_layers": 3}), {"rope.scaling": "yarn", "rope.original_context": 16})
    assert set(canonical_config(model)) | NOT_IN_LOGITS == set(flatten(ModelConfig()))


def small(knobs: dict[str, Any]) -> ModelConfig:
    config = small_tree(
        **{
            "model.attention.n_kv_heads": 2,
            "model.attention.head_dim": 16,
            "model.attention.local_window": 5,
            "model.moe.n_experts": 4,
        }
    )
    config.model.update_from_flattened_dict(knobs)
    return resolve(config).model


@pytest.mark.parametrize("name", FAMILIES)
def test_every_preset_has_an_architecture(name: str) -> None:
    more: dict[str, Any] = {"attention.n_kv_heads": None, "attention.head_dim": None} if name == "gpt2" else {}
    if name == "recurrent_gemma":
        # The square root of d_model is a number of bfloat16, and so it is in the gates' blocks, one for each head.
        more = {"d_model": 64, "recurrent.blocks": 4}
    model = small(FAMILIES[name] | more)
    family_of = {architecture.family: architecture for architecture in ARCHITECTURES.values()}
    architecture = family_of[name.replace("llama3", "llama2")]
    assert architecture.roundtrip_differences(model) == {}
    assert total_size(parameter_shapes(model)) > 0


# The config.json of released models without keys about tokens and training, and their numbers of parameters.
LLAMA = {"hidden_act": "silu", "rms_norm_eps": 1e-05, "tie_word_embeddings": False, "rope_scaling": None}
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "gpt2": (
        {"architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new", "n_ctx": 1024, "n_embd": 768}
        | {"n_head": 12, "n_layer": 12, "n_positions": 1024, "vocab_size": 50257, "layer_norm_epsilon": 1e-05},
        124_439_808,
    ),
    "llama2": (
        LLAMA
        | {"architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 11008}
        | {"max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32}
        | {"num_key_value_heads": 32, "vocab_size": 32000, "pretraining_tp": 1},
        6_738_415_616,
    ),
    "llama3": (
        LLAMA
        | {"architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336, "mlp_bias": False}
        | {"max_position_embeddings": 131072, "num_attention_heads": 32, "num_hidden_layers": 32}
        | {"num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0, "attention_bias": False}
        | {
            "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
            | {"original_max_position_embeddings": 8192, "rope_type": "llama3"}
        },
        8_030_261_248,
    ),
    "mistral": (
        LLAMA
        | {"architectures": ["MistralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336}
        | {"max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32}
        | {"num_key_value_heads": 8, "vocab_size": 32000, "rope_theta": 10000.0, "sliding_window": 4096},
        7_241_732_096,
    ),
    "qwen2": (
        LLAMA
        | {"architectures": ["Qwen2ForCausalLM"], "hidden_size": 3584, "intermediate_size": 18944}
        | {"max_position_embeddings": 131072, "num_attention_heads": 28, "num_hidden_layers": 28}
        | {"num_key_value_heads": 4, "vocab_size": 152064, "rope_theta": 1000000.0, "sliding_window": 131072}
        | {"rms_norm_eps": 1e-06, "max_window_layers": 28, "use_sliding_window": False},
        7_615_616_512,
    ),
    "qwen3": (
        LLAMA
        | {"architectures": ["Qwen3ForCausalLM"], "hidden_size": 4096, "intermediate_size": 12288, "head_dim": 128}
        | {"max_position_embeddings": 40960, "num_attention_heads": 32, "num_hidden_layers": 36}
        | {"num_key_value_heads": 8, "vocab_size": 151936, "rope_theta": 1000000, "sliding_window": None}
        | {"rms_norm_eps": 1e-06, "max_window_layers": 36, "use_sliding_window": False, "attention_bias": False},
        8_190_735_360,
    ),
    "gemma2": (
        {"architectures": ["Gemma2ForCausalLM"], "hidden_size": 2304, "intermediate_size": 9216, "head_dim": 256}
        | {"max_position_embeddings": 8192, "num_attention_heads": 8, "num_hidden_layers": 26, "vocab_size": 256000}
        | {"num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096}
        | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 256}
        | {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False},
        2_614_341_888,
    ),
    "gemma3": (
        {"architectures": ["Gemma3ForCausalLM"], "hidden_size": 1152, "intermediate_size": 6912, "head_dim": 256}
        | {"max_position_embeddings": 32768, "num_attention_heads": 4, "num_hidden_layers": 26, "vocab_size": 262144}
        | {"num_key_value_heads": 1, "rms_norm_eps": 1e-06, "rope_theta": 1000000, "rope_local_base_freq": 10000}
        | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "query_pre_attn_scalar": 256}
        | {"hidden_activation": "gelu_pytorch_tanh", "sliding_window": 512, "sliding_window_pattern": 6},
        999_885_952,
    ),
    "recurrent_gemma": (
        {"architectures": ["RecurrentGemmaForCausalLM"], "hidden_size": 2560, "intermediate_size": 15360}
        | {"head_dim": 256, "num_attention_heads": 10, "num_key_value_heads": 1, "num_hidden_layers": 26}
        | {"attention_window_size": 2048, "conv1d_width": 4, "lru_width": 2560, "logits_soft_cap": 30.0}
        | {"block_types": ["recurrent", "recurrent", "attention"], "hidden_activation": "gelu_pytorch_tanh"}
        | {"attention_bias": False, "partial_rotary_factor": 0.5, "rope_theta": 10000.0, "rms_norm_eps": 1e-06}
        | {"vocab_size": 256000, "embeddings_scale_by_sqrt_dim": True},
        2_682_862_080,
    ),
    "stablelm": (
        {"architectures": ["StableLmForCausalLM"], "hidden_size": 2560, "intermediate_size": 6912, "hidden_act": "silu"}
        | {"max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32}
        | {"num_key_value_heads": 32, "vocab_size": 50304, "layer_norm_eps": 1e-05, "rope_theta": 10000}
        | {"partial_rotary_factor": 0.25, "use_qkv_bias": False, "tie_word_embeddings": False},
        2_795_443_200,
    ),
    "phi3": (
        LLAMA
        | {"architectures": ["Phi3ForCausalLM"], "hidden_size": 3072, "intermediate_size": 8192}
        | {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "num_attention_heads": 32}
        | {"num_hidden_layers": 32, "num_key_value_heads": 32, "vocab_size": 32064, "rope_theta": 10000.0}
        | {"sliding_window": 2047, "attention_bias": False},
        3_821_079_552,
    ),
    "olmo2": (
        LLAMA
        | {"architectures": ["Olmo2ForCausalLM"], "hidden_size": 4096, "intermediate_size": 11008}
        | {"max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32}
        | {"num_key_value_heads": 32, "vocab_size": 100352, "rope_theta": 500000, "rms_norm_eps": 1e-06},
        7_298_617_344,
    ),
    "smollm3": (
        {"architectures": ["SmolLM3ForCausalLM"], "hidden_size": 2048, "intermediate_size": 11008}
        | {"max_position_embeddings": 65536, "num_attention_heads": 16, "num_hidden_layers": 36, "hidden_act": "silu"}
        | {"num_key_value_heads": 4, "vocab_size": 128256, "rope_theta": 5000000.0, "rms_norm_eps": 1e-06}
        | {"no_rope_layers": [1, 1, 1, 0] * 9, "no_rope_layer_interval": 4, "layer_types": ["full_attention"] * 36}
        | {"use_sliding_window": False, "sliding_window": None, "mlp_bias": False, "attention_bias": False},
        3_075_098_624,
    ),
    "mixtral": (
        LLAMA
        | {"architectures": ["MixtralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336}
        | {"max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32, "vocab_size": 32000}
        | {"num_key_value_heads": 8, "rope_theta": 1000000.0, "num_local_experts": 8, "num_experts_per_tok": 2},
        46_702_792_704,
    ),
    "qwen3_moe": (
        LLAMA
        | {"architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 2048, "intermediate_size": 6144, "head_dim": 128}
        | {"max_position_embeddings": 40960, "num_attention_heads": 32, "num_hidden_layers": 48}
        | {"num_key_value_heads": 4, "vocab_size": 151936, "rope_theta": 1000000.0, "sliding_window": None}
        | {"rms_norm_eps": 1e-06, "use_sliding_window": False, "attention_bias": False, "decoder_sparse_step": 1}
        | {"mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True, "num_experts": 128}
        | {"num_experts_per_tok": 8},
        30_532_122_624,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_match_released_models(name: str) -> None:
    config, parameters = PUBLISHED[name]
    architecture = architecture_of(config, Path("config.json"))
    model = with_knobs(architecture.knobs(config, Path("config.json")))
    # RecurrentGemma multiplies embeddings by the root of d_model in bfloat16: the one number that depends on the size.
    rounded = {"embedding_scale": (50.5, 2560**0.5)} if name == "recurrent_gemma" else {}
    assert model_config_differences(model, replace_paths(model, FAMILIES[name])) == rounded
    assert total_size(parameter_shapes(model)) == parameters
    assert architecture.roundtrip_differences(model) == {}


def test_all_families_are_published_and_golden() -> None:
    assert set(PUBLISHED) == set(FAMILIES) == {folder.name for folder in GOLDEN.iterdir()}


# Golden models, made by make_golden.py.


@pytest.fixture(scope="module")
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    source, file = GOLDEN / request.param, tmp_path_factory.mktemp(request.param) / "parameters.safetensors"
    knobs, architecture, _ = read_model(source)
    model = with_knobs(knobs)
    import_parameters(source, file, model, architecture)
    with np.load(source / "expected.npz") as expected:
        return model, read_parameters(file, parameter_shapes(model)), dict(expected)


@pytest.mark.parametrize("golden", sorted(FAMILIES), indirect=True)
def test_golden_models_have_the_logits_of_transformers(golden: Any) -> None:
    model, params, expected = golden
    logits_BTV = jax.jit(lambda params, tokens: transformer.apply(params, tokens, model)[0])(
        params, expected["tokens_BT"]
    )
    np.testing.assert_allclose(logits_BTV, expected["logits_BTV"], rtol=0, atol=1e-4)
    assert jnp.std(logits_BTV) > 0.3


QUICK = ("gpt2", "gemma3", "llama3")


@pytest.mark.parametrize(
    "golden",
    [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in sorted(FAMILIES)],
    indirect=True,
)
@pytest.mark.slow
def test_golden_models_generate_the_tokens_of_transformers(golden: Any) -> None:
    model, params, expected = golden
    (drawn,) = generate(
        params,
        [expected["prompt_T"].tolist()],
        model,
        samplers=(Greedy(),),
        key=jax.random.key(0),
        max_tokens=len(expected["greedy_T"]),
    )
    assert drawn == expected["greedy_T"].tolist()
