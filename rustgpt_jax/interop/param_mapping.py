"""Mapping between our parameters and the tensors of other formats.

A rule gives the tensor name for a parameter of a block or of the whole model. Blocks are stacked here, while a tensor
belongs to one layer (and one expert), so a parameter consists of one slice per layer (and expert). A tensor is one
slice, or several concatenated along the last axis, transposed if linear layers are stored as (outputs, inputs).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from rustgpt_jax.config.schema import ModelConfig
from rustgpt_jax.model.block import layer_groups
from rustgpt_jax.model.flops import parameter_shapes
from rustgpt_jax.pytrees import flatten_paths


class TensorRule(NamedTuple):
    """The name of a tensor, which may contain {layer} and {expert}.

    Rules with the same name describe its parts, in order. `view` is the stored shape, applied after the transposition,
    if it differs.
    """

    name: str
    transposed: bool = False
    view: Callable[[ModelConfig], tuple[int, ...]] | None = None


TensorRules = Mapping[str, TensorRule]
Index = tuple[int, ...]


class ParamSlice(NamedTuple):
    """The part of a parameter at some indices of its first axes."""

    path: str
    indices: Index
    shape: tuple[int, ...]


class TensorPlan(NamedTuple):
    """A stored tensor: slices concatenated along the last axis, then transposed over the last two axes.

    `view` is the shape in which it is stored, if it differs.
    """

    name: str
    transposed: bool
    slices: tuple[ParamSlice, ...]
    view: tuple[int, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the stored tensor."""
        return self._matrix_shape if self.view is None else self.view

    def to_stored(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """Return the stored tensor, given its slices."""
        joined = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=-1)
        joined = np.swapaxes(joined, -1, -2) if self.transposed else joined
        return joined if self.view is None else joined.reshape(self.view)

    def from_stored(self, stored: np.ndarray) -> np.ndarray:
        """Return the concatenated slices, as a view of the stored tensor."""
        matrix = stored if self.view is None else stored.reshape(self._matrix_shape)
        return np.swapaxes(matrix, -1, -2) if self.transposed else matrix

    @property
    def _matrix_shape(self) -> tuple[int, ...]:
        *first, _ = self.slices[0].shape
        shape = (*first, sum(each.shape[-1] for each in self.slices))
        return (*shape[:-2], shape[-1], shape[-2]) if self.transposed else shape


class TensorSlice(NamedTuple):
    """The columns of a tensor that hold one slice of a parameter."""

    tensor: TensorPlan
    start: int
    stop: int

    def take(self, stored: np.ndarray) -> np.ndarray:
        """Return the slice, as a view of the stored tensor."""
        return self.tensor.from_stored(stored)[..., self.start : self.stop]


def shapes_by_path(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all parameters by path, such as blocks/0/mixer/query/kernel."""
    return {path: tuple(leaf.shape) for path, leaf in flatten_paths(parameter_shapes(model)).items()}


def plan_tensors(rules: TensorRules, model: ModelConfig) -> dict[str, TensorPlan]:
    """Return the tensors of a model by name, in the order of the layers. Every parameter must have a rule."""
    found: dict[str, list[tuple[int, TensorRule, ParamSlice]]] = {}
    order = {path: number for number, path in enumerate(rules)}
    for path, shape in shapes_by_path(model).items():
        key, layers = _rule_key(path, model, rules)
        for index, names in _slice_indices(rules[key], layers, shape):
            part = ParamSlice(path, index, shape[len(index) :])
            found.setdefault(rules[key].name.format(**names), []).append((order[key], rules[key], part))
    result: dict[str, TensorPlan] = {}
    for name, parts in found.items():
        parts.sort(key=lambda part: part[0])
        _, rule, _ = parts[0]
        view = None if rule.view is None else rule.view(model)
        result[name] = TensorPlan(name, rule.transposed, tuple(part for _, _, part in parts), view)
    return dict(sorted(result.items(), key=lambda item: _natural_key(item[0])))


def slices_by_param(plan: Iterable[TensorPlan]) -> dict[str, list[TensorSlice]]:
    """Return the tensor slices that each parameter consists of, in order of their indices."""
    found: dict[str, dict[Index, TensorSlice]] = {}
    for tensor in plan:
        start = 0
        for part in tensor.slices:
            stop = start + part.shape[-1]
            found.setdefault(part.path, {})[part.indices] = TensorSlice(tensor, start, stop)
            start = stop
    return {path: [by_index[index] for index in sorted(by_index)] for path, by_index in found.items()}


def _rule_key(path: str, model: ModelConfig, rules: TensorRules) -> tuple[str, tuple[int, ...]]:
    """Return the key of a parameter's rule (its path without the `blocks/N` prefix) and the layers it is stacked over.

    For rules of a specific mixer, the key has the mixer's name in place of 'mixer'.
    """
    if not path.startswith("blocks/"):
        return path, ()
    _, number, key = path.split("/", 2)
    group = layer_groups(model)[int(number)]
    mixer_key = key.replace("mixer/", f"{group.block.mixers[0]}/", 1)
    return mixer_key if mixer_key in rules else key, tuple(group.layers)


def _slice_indices(
    rule: TensorRule, layers: tuple[int, ...], shape: tuple[int, ...]
) -> list[tuple[Index, dict[str, int]]]:
    """Return the index of each slice of a parameter, with the {layer} and {expert} in its tensor's name."""
    if not layers:
        return [((), {})]
    if "{expert}" not in rule.name:
        return [((index,), {"layer": layer}) for index, layer in enumerate(layers)]
    return [
        ((index, expert), {"layer": layer, "expert": expert})
        for index, layer in enumerate(layers)
        for expert in range(shape[1])
    ]


def _natural_key(name: str) -> list[tuple[int, str]]:
    """Return a sort key that orders layer 2 before layer 10."""
    return [(int(word), "") if word.isdigit() else (-1, word) for word in name.split(".")]


def linear_rules(path: str, name: str, transposed: bool = True) -> TensorRules:
    """Return the rules of a linear layer."""
    return {f"{path}/kernel": TensorRule(f"{name}.weight", transposed), f"{path}/bias": TensorRule(f"{name}.bias")}


def norm_rules(path: str, name: str) -> TensorRules:
    """Return the rules of a normalization layer with a scale and an optional bias."""
    return {f"{path}/scale": TensorRule(f"{name}.weight"), f"{path}/bias": TensorRule(f"{name}.bias")}


# The tensors of Hugging Face architectures.

LAYER = "model.layers.{layer}."
DENSE: TensorRules = {
    "embedding/table": TensorRule("model.embed_tokens.weight"),
    "norm/scale": TensorRule("model.norm.weight"),
    "head/kernel": TensorRule("lm_head.weight", True),
    **linear_rules("mixer/query", LAYER + "self_attn.q_proj"),
    **linear_rules("mixer/key", LAYER + "self_attn.k_proj"),
    **linear_rules("mixer/value", LAYER + "self_attn.v_proj"),
    **linear_rules("mixer/output", LAYER + "self_attn.o_proj"),
    "mixer/query_norm/scale": TensorRule(LAYER + "self_attn.q_norm.weight"),
    "mixer/key_norm/scale": TensorRule(LAYER + "self_attn.k_norm.weight"),
    **linear_rules("feedforward/gate", LAYER + "mlp.gate_proj"),
    **linear_rules("feedforward/up", LAYER + "mlp.up_proj"),
    **linear_rules("feedforward/down", LAYER + "mlp.down_proj"),
    "mixer_norm/scale": TensorRule(LAYER + "input_layernorm.weight"),
    "feedforward_norm/scale": TensorRule(LAYER + "post_attention_layernorm.weight"),
}
OUTPUT_NORMS: TensorRules = {
    **DENSE,
    "mixer_output_norm/scale": TensorRule(LAYER + "post_attention_layernorm.weight"),
    "feedforward_norm/scale": TensorRule(LAYER + "pre_feedforward_layernorm.weight"),
    "feedforward_output_norm/scale": TensorRule(LAYER + "post_feedforward_layernorm.weight"),
}
STABLELM: TensorRules = {
    **DENSE,
    **norm_rules("norm", "model.norm"),
    **norm_rules("mixer_norm", LAYER + "input_layernorm"),
    **norm_rules("feedforward_norm", LAYER + "post_attention_layernorm"),
}
PHI3: TensorRules = {
    **DENSE,
    **linear_rules("mixer/query", LAYER + "self_attn.qkv_proj"),
    **linear_rules("mixer/key", LAYER + "self_attn.qkv_proj"),
    **linear_rules("mixer/value", LAYER + "self_attn.qkv_proj"),
    **linear_rules("feedforward/gate", LAYER + "mlp.gate_up_proj"),
    **linear_rules("feedforward/up", LAYER + "mlp.gate_up_proj"),
}
# Experts one by one, or fused with concatenated gate and up, as transformers 5 holds them in memory.
PER_EXPERT: TensorRules = {
    **DENSE,
    "feedforward/router": TensorRule(LAYER + "mlp.gate.weight", True),
    "feedforward/gate": TensorRule(LAYER + "mlp.experts.{expert}.gate_proj.weight", True),
    "feedforward/up": TensorRule(LAYER + "mlp.experts.{expert}.up_proj.weight", True),
    "feedforward/down": TensorRule(LAYER + "mlp.experts.{expert}.down_proj.weight", True),
}
FUSED_EXPERTS: TensorRules = {
    **PER_EXPERT,
    "feedforward/gate": TensorRule(LAYER + "mlp.experts.gate_up_proj", True),
    "feedforward/up": TensorRule(LAYER + "mlp.experts.gate_up_proj", True),
    "feedforward/down": TensorRule(LAYER + "mlp.experts.down_proj", True),
}
MIXTRAL: TensorRules = {
    **DENSE,
    "feedforward/router": TensorRule(LAYER + "block_sparse_moe.gate.weight", True),
    "feedforward/gate": TensorRule(LAYER + "block_sparse_moe.experts.{expert}.w1.weight", True),
    "feedforward/up": TensorRule(LAYER + "block_sparse_moe.experts.{expert}.w3.weight", True),
    "feedforward/down": TensorRule(LAYER + "block_sparse_moe.experts.{expert}.w2.weight", True),
}
MIX, MLP, RG_LRU = LAYER + "temporal_block", LAYER + "mlp_block", LAYER + "temporal_block.rg_lru."


def _recurrent_width(model: ModelConfig) -> int:
    return model.recurrent.width or model.d_model


def _by_block(model: ModelConfig) -> tuple[int, ...]:
    blocks = model.recurrent.blocks or 1
    return (blocks, _recurrent_width(model) // blocks)


RECURRENT_GEMMA: TensorRules = {
    "embedding/table": TensorRule("model.embed_tokens.weight"),
    "norm/scale": TensorRule("model.final_norm.weight"),
    "head/kernel": TensorRule("lm_head.weight", True),
    "mixer_norm/scale": TensorRule(LAYER + "temporal_pre_norm.weight"),
    "feedforward_norm/scale": TensorRule(LAYER + "channel_pre_norm.weight"),
    **linear_rules("mixer/query", MIX + ".q_proj"),
    **linear_rules("mixer/key", MIX + ".k_proj"),
    **linear_rules("mixer/value", MIX + ".v_proj"),
    **linear_rules("mixer/output", MIX + ".o_proj"),
    **linear_rules("rg_lru/output", MIX + ".linear_out"),
    **linear_rules("mixer/gate", MIX + ".linear_y"),
    **linear_rules("mixer/input", MIX + ".linear_x"),
    "mixer/convolution/kernel": TensorRule(
        MIX + ".conv_1d.weight", True, lambda model: (_recurrent_width(model), 1, model.recurrent.conv_width)
    ),
    "mixer/convolution/bias": TensorRule(MIX + ".conv_1d.bias"),
    "mixer/recurrence_gate/kernel": TensorRule(RG_LRU + "recurrent_gate_weight"),
    "mixer/recurrence_gate/bias": TensorRule(RG_LRU + "recurrent_gate_bias", view=_by_block),
    "mixer/input_gate/kernel": TensorRule(RG_LRU + "input_gate_weight"),
    "mixer/input_gate/bias": TensorRule(RG_LRU + "input_gate_bias", view=_by_block),
    "mixer/decay_rate": TensorRule(RG_LRU + "recurrent_param"),
    **linear_rules("feedforward/gate", MLP + ".gate_proj"),
    **linear_rules("feedforward/up", MLP + ".up_proj"),
    **linear_rules("feedforward/down", MLP + ".down_proj"),
}
H = "transformer.h.{layer}."
GPT2: TensorRules = {
    "embedding/table": TensorRule("transformer.wte.weight"),
    "positions/table": TensorRule("transformer.wpe.weight"),
    **norm_rules("norm", "transformer.ln_f"),
    "head/kernel": TensorRule("lm_head.weight", True),
    **norm_rules("mixer_norm", H + "ln_1"),
    **norm_rules("feedforward_norm", H + "ln_2"),
    # Linear layers are stored as (inputs, outputs), as here, and queries, keys and values in one tensor.
    **linear_rules("mixer/query", H + "attn.c_attn", False),
    **linear_rules("mixer/key", H + "attn.c_attn", False),
    **linear_rules("mixer/value", H + "attn.c_attn", False),
    **linear_rules("mixer/output", H + "attn.c_proj", False),
    **linear_rules("feedforward/up", H + "mlp.c_fc", False),
    **linear_rules("feedforward/down", H + "mlp.c_proj", False),
}
