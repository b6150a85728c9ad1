"""The tensors of Hugging Face architectures: what each parameter is called there, and how it lies."""

from rustgpt_jax.config.schema import ModelConfig
from rustgpt_jax.interop.param_mapping import Rule, Rules


def _linear(path: str, name: str, transposed: bool = True) -> Rules:
    return {
        f"{path}/kernel": Rule(f"{name}.weight", transposed),
        f"{path}/bias": Rule(f"{name}.bias"),
    }


LAYER = "model.layers.{layer}."
DENSE: Rules = {
    "embedding/table": Rule("model.embed_tokens.weight"),
    "norm/scale": Rule("model.norm.weight"),
    "head/kernel": Rule("lm_head.weight", True),
    **_linear("mixer/query", LAYER + "self_attn.q_proj"),
    **_linear("mixer/key", LAYER + "self_attn.k_proj"),
    **_linear("mixer/value", LAYER + "self_attn.v_proj"),
    **_linear("mixer/output", LAYER + "self_attn.o_proj"),
    "mixer/query_norm/scale": Rule(LAYER + "self_attn.q_norm.weight"),
    "mixer/key_norm/scale": Rule(LAYER + "self_attn.k_norm.weight"),
    **_linear("feedforward/gate", LAYER + "mlp.gate_proj"),
    **_linear("feedforward/up", LAYER + "mlp.up_proj"),
    **_linear("feedforward/down", LAYER + "mlp.down_proj"),
    "mixer_norm/scale": Rule(LAYER + "input_layernorm.weight"),
    "feedforward_norm/scale": Rule(LAYER + "post_attention_layernorm.weight"),
}
OUTPUT_NORMS: Rules = {
    **DENSE,
    "mixer_output_norm/scale": Rule(LAYER + "post_attention_layernorm.weight"),
    "feedforward_norm/scale": Rule(LAYER + "pre_feedforward_layernorm.weight"),
    "feedforward_output_norm/scale": Rule(LAYER + "post_feedforward_layernorm.weight"),
}
STABLELM: Rules = {
    **DENSE,
    "norm/bias": Rule("model.norm.bias"),
    "mixer_norm/bias": Rule(LAYER + "input_layernorm.bias"),
    "feedforward_norm/bias": Rule(LAYER + "post_attention_layernorm.bias"),
}
PHI3: Rules = {
    **DENSE,
    **_linear("mixer/query", LAYER + "self_attn.qkv_proj"),
    **_linear("mixer/key", LAYER + "self_attn.qkv_proj"),
    **_linear("mixer/value", LAYER + "self_attn.qkv_proj"),
    **_linear("feedforward/gate", LAYER + "mlp.gate_up_proj"),
    **_linear("feedforward/up", LAYER + "mlp.gate_up_proj"),
}
# Experts one by one, and, as transformers 5 holds them in memory, all at once with gate and up side by side.
ONE_BY_ONE: Rules = {
    **DENSE,
    "feedforward/router": Rule(LAYER + "mlp.gate.weight", True),
    "feedforward/gate": Rule(LAYER + "mlp.experts.{expert}.gate_proj.weight", True),
    "feedforward/up": Rule(LAYER + "mlp.experts.{expert}.up_proj.weight", True),
    "feedforward/down": Rule(LAYER + "mlp.experts.{expert}.down_proj.weight", True),
}
AT_ONCE: Rules = {
    **ONE_BY_ONE,
    "feedforward/gate": Rule(LAYER + "mlp.experts.gate_up_proj", True),
    "feedforward/up": Rule(LAYER + "mlp.experts.gate_up_proj", True),
    "feedforward/down": Rule(LAYER + "mlp.experts.down_proj", True),
}
MIXTRAL: Rules = {
    **DENSE,
    "feedforward/router": Rule(LAYER + "block_sparse_moe.gate.weight", True),
    "feedforward/gate": Rule(LAYER + "block_sparse_moe.experts.{expert}.w1.weight", True),
    "feedforward/up": Rule(LAYER + "block_sparse_moe.experts.{expert}.w3.weight", True),
    "feedforward/down": Rule(LAYER + "block_sparse_moe.experts.{expert}.w2.weight", True),
}
MIX, MLP, RG_LRU = LAYER + "temporal_block", LAYER + "mlp_block", LAYER + "temporal_block.rg_lru."


def _recurrent_width(model: ModelConfig) -> int:
    return model.recurrent_width or model.d_model


def _by_block(model: ModelConfig) -> tuple[int, ...]:
    blocks = model.recurrent_blocks or 1
    return (blocks, _recurrent_width(model) // blocks)


RECURRENT_GEMMA: Rules = {
    "embedding/table": Rule("model.embed_tokens.weight"),
    "norm/scale": Rule("model.final_norm.weight"),
    "head/kernel": Rule("lm_head.weight", True),
    "mixer_norm/scale": Rule(LAYER + "temporal_pre_norm.weight"),
    "feedforward_norm/scale": Rule(LAYER + "channel_pre_norm.weight"),
    **_linear("mixer/query", MIX + ".q_proj"),
    **_linear("mixer/key", MIX + ".k_proj"),
    **_linear("mixer/value", MIX + ".v_proj"),
    **_linear("mixer/output", MIX + ".o_proj"),
    **_linear("rg_lru/output", MIX + ".linear_out"),
    **_linear("mixer/gate", MIX + ".linear_y"),
    **_linear("mixer/input", MIX + ".linear_x"),
    "mixer/convolution/kernel": Rule(
        MIX + ".conv_1d.weight", True, lambda model: (_recurrent_width(model), 1, model.conv_width)
    ),
    "mixer/convolution/bias": Rule(MIX + ".conv_1d.bias"),
    "mixer/recurrence_gate/kernel": Rule(RG_LRU + "recurrent_gate_weight"),
    "mixer/recurrence_gate/bias": Rule(RG_LRU + "recurrent_gate_bias", view=_by_block),
    "mixer/input_gate/kernel": Rule(RG_LRU + "input_gate_weight"),
    "mixer/input_gate/bias": Rule(RG_LRU + "input_gate_bias", view=_by_block),
    "mixer/decay_rate": Rule(RG_LRU + "recurrent_param"),
    **_linear("feedforward/gate", MLP + ".gate_proj"),
    **_linear("feedforward/up", MLP + ".up_proj"),
    **_linear("feedforward/down", MLP + ".down_proj"),
}
H = "transformer.h.{layer}."
GPT2: Rules = {
    "embedding/table": Rule("transformer.wte.weight"),
    "positions/table": Rule("transformer.wpe.weight"),
    "norm/scale": Rule("transformer.ln_f.weight"),
    "norm/bias": Rule("transformer.ln_f.bias"),
    "head/kernel": Rule("lm_head.weight", True),
    "mixer_norm/scale": Rule(H + "ln_1.weight"),
    "mixer_norm/bias": Rule(H + "ln_1.bias"),
    "feedforward_norm/scale": Rule(H + "ln_2.weight"),
    "feedforward_norm/bias": Rule(H + "ln_2.bias"),
    # Linear layers are (inputs, outputs) as here, and queries, keys and values come from one.
    **_linear("mixer/query", H + "attn.c_attn", False),
    **_linear("mixer/key", H + "attn.c_attn", False),
    **_linear("mixer/value", H + "attn.c_attn", False),
    **_linear("mixer/output", H + "attn.c_proj", False),
    **_linear("feedforward/up", H + "mlp.c_fc", False),
    **_linear("feedforward/down", H + "mlp.c_proj", False),
}
