"""The supported Hugging Face architectures: the preset, config.json keys and tensors of each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rustgpt_jax.config.schema import ModelConfig, replace_paths
from rustgpt_jax.config.validation import validate_value
from rustgpt_jax.errors import UserError, short_repr, suggest_names
from rustgpt_jax.interop import config_mapping as mapping
from rustgpt_jax.interop.config_mapping import (
    FULL,
    SLIDING,
    HFConfigReader,
    KeyMapping,
    dense_width,
    global_and_local_rope,
    model_config_differences,
    rope,
)
from rustgpt_jax.interop.param_mapping import (
    DENSE,
    FUSED_EXPERTS,
    GPT2,
    MIXTRAL,
    OUTPUT_NORMS,
    PER_EXPERT,
    PHI3,
    RECURRENT_GEMMA,
    STABLELM,
    TensorRules,
)
from rustgpt_jax.model.presets import FAMILIES

# Keys that change the computation or the storage in unsupported ways.
UNSUPPORTED_KEYS = ("quantization_config", "adapter_config")
# Keys that set the number of iterations of loops that run before the tensors are checked.
COUNTING_KEYS = ("num_hidden_layers", "n_layer", "num_experts", "num_local_experts")
MAX_COUNT = 4096


@dataclass(frozen=True)
class Architecture:
    """Mapping between one model class of `transformers` and ModelConfig.

    Attributes:
        name, model_type: As in config.json.
        family: The preset with the knobs that config.json does not set.
        mappings: Mappings between config.json keys and knobs.
        defaults: Values of optional config.json keys, as in the config class of `transformers`.
        rules: The tensors to read and write.
        other_rules: Tensors of alternative layouts, which are only read.
        prefix: Prefix of the tensors of the model without its head; it may be absent.
        ignored: Regular expressions of tensors that hold no parameters.
        aliases: Alternative names of keys (the attribute_map of the config class).
    """

    name: str
    model_type: str
    family: str
    mappings: tuple[KeyMapping, ...]
    defaults: Mapping[str, Any]
    rules: TensorRules
    other_rules: tuple[TensorRules, ...] = ()
    prefix: str = "model."
    ignored: tuple[str, ...] = (r"\.rotary_emb\.inv_freq$",)
    aliases: Mapping[str, str] = field(default_factory=dict)

    def knobs(
        self, config: Mapping[str, Any], file: Path, warn: Callable[[str], object] = lambda text: None
    ) -> dict[str, Any]:
        """Return the knobs of a config.json, warning about ignored keys. Raises UserError naming a bad key."""
        reader = HFConfigReader(file, self._without_aliases(config, file), self.defaults, warn)
        for key in UNSUPPORTED_KEYS:
            if config.get(key):
                raise UserError(f"{file}: {key} is not supported; only unquantized models without adapters are.")
        if config.get("is_causal") is False:
            raise UserError(f"{file}: is_causal is false; only causal attention is supported.")
        for key in COUNTING_KEYS:
            if isinstance(config.get(key), int | float) and config[key] > MAX_COUNT:
                raise UserError(f"{file}: {key} is {short_repr(config[key])}; the maximum is {MAX_COUNT}.")
        knobs = dict(FAMILIES[self.family])
        for each in self.mappings:
            knobs |= each.read(reader)
        return {knob: validate_value(f"model.{knob}", value, f"{file}: {knob}") for knob, value in knobs.items()}

    def _without_aliases(self, config: Mapping[str, Any], file: Path) -> Mapping[str, Any]:
        """Return a config.json with aliases resolved. Raises UserError if two names of a key have different values."""
        values = dict(config)
        for alias, key in self.aliases.items():
            if alias not in config:
                continue
            if key in config and config[key] != config[alias]:
                raise UserError(
                    f"{file}: {alias}={config[alias]!r} and {key}={config[key]!r} are the same setting with different "
                    "values."
                )
            values[key] = config[alias]
        return values

    def hf_config(self, model: ModelConfig) -> dict[str, Any]:
        """Return the config.json closest to a model; `roundtrip_differences` lists what it cannot represent."""
        config: dict[str, Any] = {"architectures": [self.name], "model_type": self.model_type}
        for each in self.mappings:
            config |= each.write(model)
        return config

    def roundtrip_differences(self, model: ModelConfig) -> dict[str, tuple[Any, Any]]:
        """Return the knobs that change when a model's config.json is written and read; none if it is equivalent."""
        knobs = self.knobs(self.hf_config(model), Path("config.json"))
        return model_config_differences(model, replace_paths(model, knobs))


# Keys.

NORM_EPSILON = mapping.direct("rms_norm_eps", "norm_eps")
SIZES = (
    mapping.direct("vocab_size", "vocab_size"),
    mapping.direct("max_position_embeddings", "context_length"),
    mapping.direct("num_hidden_layers", "n_layers"),
    mapping.direct("hidden_size", "d_model"),
    mapping.direct("num_attention_heads", "attention.n_heads"),
    mapping.direct("num_key_value_heads", "attention.n_kv_heads", lambda model: model.attention.kv_heads),
    mapping.direct("head_dim", "attention.head_dim", lambda model: model.head_width),
    NORM_EPSILON,
    mapping.direct("tie_word_embeddings", "tie_embeddings"),
)
WIDTH = mapping.direct("intermediate_size", "d_ff", dense_width)
GATED_MLP = (*SIZES, WIDTH, mapping.activation("hidden_act", mapping.GATED_ACTIVATIONS))
ATTENTION_BIAS = mapping.attention_bias("attention_bias")
MLP_BIAS = mapping.direct("mlp_bias", "feedforward_bias", lambda model: model.has_feedforward_bias)

ROPE_DEFAULTS = dict.fromkeys(
    ("rope_parameters", "rope_scaling", "partial_rotary_factor", "original_max_position_embeddings")
)
COMMON_DEFAULTS: dict[str, Any] = ROPE_DEFAULTS | {
    "rope_theta": 10000.0,
    "head_dim": None,
    "num_key_value_heads": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "sliding_window": None,
    "layer_types": None,
}
QWEN_DEFAULTS = COMMON_DEFAULTS | {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}
GEMMA_DEFAULTS = COMMON_DEFAULTS | {
    "head_dim": 256,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "use_bidirectional_attention": False,
}
GEMMA = (
    *SIZES,
    WIDTH,
    ATTENTION_BIAS,
    mapping.divisible_heads(),
    mapping.activation("hidden_activation", mapping.GATED_ACTIVATIONS),
    mapping.query_pre_attn_scalar("query_pre_attn_scalar"),
    mapping.softcap("final_logit_softcapping", "final_logit_softcap"),
    mapping.constant("use_bidirectional_attention", False, None),
)


def _no_rope_layers(reader: HFConfigReader, layer: int) -> str:
    has_window = reader.boolean("use_sliding_window") and reader["sliding_window"] is not None
    positions = mapping.no_rope_layers().read(reader)["positions"]
    return SLIDING if has_window and positions[layer % len(positions)] == "none" else FULL


_ARCHITECTURES = (
    Architecture(
        name="LlamaForCausalLM",
        model_type="llama",
        family="llama2",
        mappings=(*GATED_MLP, mapping.divisible_heads(), ATTENTION_BIAS, MLP_BIAS, rope()),
        defaults=COMMON_DEFAULTS,
        rules=DENSE,
    ),
    Architecture(
        name="GPT2LMHeadModel",
        model_type="gpt2",
        family="gpt2",
        mappings=(
            mapping.direct("vocab_size", "vocab_size"),
            mapping.direct("n_positions", "context_length"),
            mapping.direct("n_layer", "n_layers"),
            mapping.direct("n_embd", "d_model"),
            mapping.direct("n_head", "attention.n_heads"),
            mapping.direct("n_inner", "d_ff", dense_width),
            mapping.direct("layer_norm_epsilon", "norm_eps"),
            mapping.direct("tie_word_embeddings", "tie_embeddings"),
            mapping.activation("activation_function", mapping.UNGATED_ACTIVATIONS),
            mapping.scale_attn_weights("scale_attn_weights"),
            mapping.direct("scale_attn_by_inverse_layer_idx", "attention.scale_by_layer"),
            mapping.constant("add_cross_attention", False),
            mapping.fixed({"attention.n_kv_heads": None, "attention.head_dim": None}),
        ),
        defaults={
            "n_inner": None,
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
            "activation_function": "gelu_new",
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
        rules=GPT2,
        prefix="transformer.",
        # Old versions of transformers stored masks.
        ignored=(r"\.attn\.(masked_)?bias$",),
        aliases={
            "hidden_size": "n_embd",
            "max_position_embeddings": "n_positions",
            "num_attention_heads": "n_head",
            "num_hidden_layers": "n_layer",
        },
    ),
    Architecture(
        name="MistralForCausalLM",
        model_type="mistral",
        family="mistral",
        mappings=(*GATED_MLP, mapping.sliding_window_in_all_layers(), rope()),
        defaults=COMMON_DEFAULTS | {"num_key_value_heads": 8, "sliding_window": 4096},
        rules=DENSE,
    ),
    Architecture(
        name="Qwen2ForCausalLM",
        model_type="qwen2",
        family="qwen2",
        mappings=(*GATED_MLP, mapping.sliding_window_after_first_layers(), rope()),
        defaults=QWEN_DEFAULTS,
        rules=DENSE,
    ),
    Architecture(
        name="Qwen3ForCausalLM",
        model_type="qwen3",
        family="qwen3",
        mappings=(*GATED_MLP, ATTENTION_BIAS, mapping.sliding_window_after_first_layers(), rope()),
        defaults=QWEN_DEFAULTS | {"head_dim": 128},
        rules=DENSE,
    ),
    Architecture(
        name="Gemma2ForCausalLM",
        model_type="gemma2",
        family="gemma2",
        mappings=(
            *GEMMA,
            mapping.softcap("attn_logit_softcapping", "attention.logit_softcap"),
            mapping.layer_types(lambda reader, layer: FULL if layer % 2 else SLIDING),
            rope(),
        ),
        defaults=GEMMA_DEFAULTS | {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
        rules=OUTPUT_NORMS,
    ),
    Architecture(
        name="Gemma3ForCausalLM",
        model_type="gemma3_text",
        family="gemma3",
        mappings=(
            *GEMMA,
            # transformers reads it but does not use it.
            mapping.constant("attn_logit_softcapping", None),
            mapping.layer_types(
                lambda reader, layer: SLIDING if (layer + 1) % reader.positive_int("sliding_window_pattern") else FULL,
                has_local_rope=True,
            ),
            global_and_local_rope(),
        ),
        defaults=GEMMA_DEFAULTS | {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6},
        rules=OUTPUT_NORMS,
    ),
    Architecture(
        name="RecurrentGemmaForCausalLM",
        model_type="recurrent_gemma",
        family="recurrent_gemma",
        mappings=(
            *SIZES,
            mapping.doubled_mlp_width("intermediate_size"),
            mapping.divisible_heads(),
            mapping.activation("hidden_activation", {"gelu": mapping.GATED_ACTIVATIONS["gelu"]}),
            mapping.softcap("logits_soft_cap", "final_logit_softcap"),
            mapping.direct("attention_bias", "attention.qkv_bias", lambda model: model.has_qkv_bias),
            mapping.block_types(),
            mapping.direct("attention_window_size", "attention.local_window"),
            mapping.direct("conv1d_width", "recurrent.conv_width"),
            mapping.direct("num_attention_heads", "recurrent.blocks", lambda model: model.attention.n_heads),
            mapping.rounded_embedding_scale(),
            rope(has_fraction=True, types={"default": "default"}),
        ),
        defaults=COMMON_DEFAULTS
        | {
            "tie_word_embeddings": True,
            "hidden_activation": "gelu_pytorch_tanh",
            "logits_soft_cap": 30.0,
            "attention_window_size": 2048,
            "conv1d_width": 4,
            "lru_width": None,
            "block_types": ("recurrent", "recurrent", "attention"),
            "partial_rotary_factor": 0.5,
            # transformers does not limit the context here. The released models were trained on this length.
            "max_position_embeddings": 8192,
        },
        rules=RECURRENT_GEMMA,
        aliases={"sliding_window": "attention_window_size"},
    ),
    Architecture(
        name="StableLmForCausalLM",
        model_type="stablelm",
        family="stablelm",
        mappings=(
            *(mapping.direct("layer_norm_eps", "norm_eps") if each is NORM_EPSILON else each for each in GATED_MLP),
            mapping.divisible_heads(),
            mapping.direct("use_qkv_bias", "attention.qkv_bias", lambda model: model.has_qkv_bias),
            mapping.constant("qk_layernorm", False),
            mapping.constant("use_parallel_residual", False),
            rope(has_fraction=True),
        ),
        defaults=COMMON_DEFAULTS
        | {
            "num_key_value_heads": 32,
            "layer_norm_eps": 1e-5,
            "use_qkv_bias": False,
            "qk_layernorm": False,
            "use_parallel_residual": False,
            "partial_rotary_factor": 0.25,
        },
        rules=STABLELM,
    ),
    Architecture(
        name="Phi3ForCausalLM",
        model_type="phi3",
        family="phi3",
        mappings=(
            *GATED_MLP,
            mapping.divisible_heads(),
            mapping.sliding_window_in_all_layers(),
            # Older files use other names for longrope.
            rope(
                has_fraction=True, types={"default": "default", **dict.fromkeys(("longrope", "su", "yarn"), "longrope")}
            ),
            KeyMapping(
                lambda reader: {},
                lambda model: {"original_max_position_embeddings": model.rope.original_context or model.context_length},
            ),
        ),
        defaults=COMMON_DEFAULTS | {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
        rules=PHI3,
    ),
    Architecture(
        name="Olmo2ForCausalLM",
        model_type="olmo2",
        family="olmo2",
        mappings=(*GATED_MLP, ATTENTION_BIAS, rope()),
        defaults=COMMON_DEFAULTS | {"rms_norm_eps": 1e-5},
        rules=OUTPUT_NORMS,
    ),
    Architecture(
        name="SmolLM3ForCausalLM",
        model_type="smollm3",
        family="smollm3",
        mappings=(
            *GATED_MLP,
            ATTENTION_BIAS,
            MLP_BIAS,
            mapping.no_rope_layers(),
            mapping.layer_types(_no_rope_layers, has_switch=True),
            rope(),
        ),
        defaults=COMMON_DEFAULTS
        | {
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
            "rope_theta": 2e6,
            "no_rope_layers": None,
            "no_rope_layer_interval": 4,
        },
        rules=DENSE,
    ),
    Architecture(
        name="MixtralForCausalLM",
        model_type="mixtral",
        family="mixtral",
        mappings=(
            *SIZES,
            mapping.expert_activation("hidden_act"),
            mapping.direct("num_local_experts", "moe.n_experts"),
            mapping.direct("num_experts_per_tok", "moe.experts_per_token"),
            mapping.direct("intermediate_size", "d_ff", mapping.expert_width),
            mapping.fixed({"moe.d_expert": None}),
            mapping.sliding_window_in_all_layers(),
            rope(),
        ),
        defaults=COMMON_DEFAULTS | {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6},
        rules=MIXTRAL,
        other_rules=(FUSED_EXPERTS,),
        aliases={"num_experts": "num_local_experts"},
    ),
    Architecture(
        name="Qwen3MoeForCausalLM",
        model_type="qwen3_moe",
        family="qwen3_moe",
        mappings=(
            *SIZES,
            ATTENTION_BIAS,
            mapping.expert_activation("hidden_act"),
            mapping.moe_in_some_layers("hidden_act"),
            mapping.direct("num_experts_per_tok", "moe.experts_per_token"),
            mapping.direct("moe_intermediate_size", "moe.d_expert", mapping.expert_width),
            WIDTH,
            mapping.direct("norm_topk_prob", "moe.norm_topk_prob"),
            mapping.sliding_window_in_all_layers("use_sliding_window"),
            rope(),
        ),
        defaults=COMMON_DEFAULTS
        | {
            "num_key_value_heads": 4,
            "sliding_window": 4096,
            "decoder_sparse_step": 1,
            "mlp_only_layers": None,
            "norm_topk_prob": False,
        },
        rules=PER_EXPERT,
        other_rules=(FUSED_EXPERTS,),
        # transformers 5 writes num_local_experts; published models use num_experts.
        aliases={"num_experts": "num_local_experts"},
    ),
)

ARCHITECTURES: dict[str, Architecture] = {architecture.name: architecture for architecture in _ARCHITECTURES}


def architecture_of(config: Mapping[str, Any], file: Path) -> Architecture:
    """Return the architecture that a config.json names, or else the one with its model_type.

    Raises:
        UserError: The architecture is unknown or not given.
    """
    names, model_type = config.get("architectures"), config.get("model_type")
    if names is None or names == []:
        names = [architecture.name for architecture in _ARCHITECTURES if architecture.model_type == model_type]
    elif not isinstance(names, list) or not isinstance(names[0], str):
        raise UserError(
            f'{file}: architectures must be a list with one name, such as ["LlamaForCausalLM"], got {names!r}.'
        )
    if not names:
        raise UserError(
            f'{file} names no architecture, such as "architectures": ["LlamaForCausalLM"], and its model_type '
            f"{model_type!r} is unknown."
            f"{suggest_names(str(model_type), [each.model_type for each in _ARCHITECTURES])}"
        )
    if names[0] not in ARCHITECTURES:
        raise UserError(f"{file}: unknown architecture {names[0]!r}.{suggest_names(names[0], ARCHITECTURES)}")
    return ARCHITECTURES[names[0]]


def architecture_for(model: ModelConfig) -> Architecture:
    """Return the first architecture that can represent a model.

    Raises:
        UserError: No architecture can represent it; the message names the differences from the closest one.
    """
    found: list[tuple[int, str, str]] = []
    for architecture in _ARCHITECTURES:
        try:
            differences = architecture.roundtrip_differences(model)
        except UserError:
            continue
        if not differences:
            return architecture
        shown = ", ".join(f"{knob}={here!r} (it has {there!r})" for knob, (here, there) in differences.items())
        found.append((len(differences), architecture.name, shown))
    _, name, shown = min(found)
    raise UserError(
        f"No supported Hugging Face architecture computes what this model does. The nearest, {name}, cannot represent "
        f"config.model: {shown}."
    )
