"""Which tensors of a Hugging Face model are which of our parameters, and how one is made of the other.

A rule gives, for a parameter of a block or of the whole model, the name of a tensor there. Blocks are stacked here, and
tensors there belong to one layer (and one expert), so a parameter is made of slots, one for each of them. A tensor is
one slot, or several side by side along the last axis, transposed where a linear layer keeps (outputs, inputs).
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
    """A part of a parameter: what stands at a place, an index of its first axes."""

    path: str
    place: Index
    shape: tuple[int, ...]


class TensorPlan(NamedTuple):
    """A stored tensor: slots concatenated along the last axis, then transposed over the last two axes.

    `view` is the shape that it is then stored in, if it differs.
    """

    name: str
    transposed: bool
    slots: tuple[ParamSlice, ...]
    view: tuple[int, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that it has there."""
        return self._matrix_shape if self.view is None else self.view

    def to_stored(self, columns: Sequence[np.ndarray]) -> np.ndarray:
        """Return the stored tensor, given its concatenated slots."""
        whole = columns[0] if len(columns) == 1 else np.concatenate(columns, axis=-1)
        whole = np.swapaxes(whole, -1, -2) if self.transposed else whole
        return whole if self.view is None else whole.reshape(self.view)

    def from_stored(self, stored: np.ndarray) -> np.ndarray:
        """Return the concatenated slots, as a view of the stored tensor."""
        whole = stored if self.view is None else stored.reshape(self._matrix_shape)
        return np.swapaxes(whole, -1, -2) if self.transposed else whole

    @property
    def _matrix_shape(self) -> tuple[int, ...]:
        *first, _ = self.slots[0].shape
        whole = (*first, sum(slot.shape[-1] for slot in self.slots))
        return (*whole[:-2], whole[-1], whole[-2]) if self.transposed else whole


class TensorSlice(NamedTuple):
    """The columns of a tensor that fill one slot."""

    tensor: TensorPlan
    start: int
    stop: int

    def take(self, stored: np.ndarray) -> np.ndarray:
        """The slot, as a view of the tensor."""
        return self.tensor.from_stored(stored)[..., self.start : self.stop]


def shapes_by_path(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of all parameters by path, such as blocks/0/mixer/query/kernel."""
    return {path: tuple(leaf.shape) for path, leaf in flatten_paths(parameter_shapes(model)).items()}


def plan_tensors(rules: TensorRules, model: ModelConfig) -> dict[str, TensorPlan]:
    """All tensors of a model by name, in the order of the layers. Each parameter has a rule."""
    found: dict[str, list[tuple[int, TensorRule, ParamSlice]]] = {}
    order = {path: number for number, path in enumerate(rules)}
    for path, shape in shapes_by_path(model).items():
        key, layers = _rule_key(path, model, rules)
        rule = rules[key]
        for index, names in _indices(rule, layers, shape):
            slot = ParamSlice(path, index, shape[len(index) :])
            found.setdefault(rule.name.format(**names), []).append((order[key], rule, slot))
    result: dict[str, TensorPlan] = {}
    for name, parts in found.items():
        parts.sort(key=lambda part: part[0])
        _, rule, _ = parts[0]
        view = None if rule.view is None else rule.view(model)
        result[name] = TensorPlan(name, rule.transposed, tuple(slot for _, _, slot in parts), view)
    return dict(sorted(result.items(), key=lambda item: _natural(item[0])))


def slices_by_param(plan: Iterable[TensorPlan]) -> dict[str, list[TensorSlice]]:
    """For each parameter, what fills its slots, in their order."""
    found: dict[str, dict[tuple[int, ...], TensorSlice]] = {}
    for tensor in plan:
        start = 0
        for slot in tensor.slots:
            stop = start + slot.shape[-1]
            found.setdefault(slot.path, {})[slot.place] = TensorSlice(tensor, start, stop)
            start = stop
    return {path: [of_index[index] for index in sorted(of_index)] for path, of_index in found.items()}


def _rule_key(path: str, model: ModelConfig, rules: TensorRules) -> tuple[str, tuple[int, ...]]:
    """Return the key of a parameter's rule, which is its path without the stack, and the layers it is stacked over.

    For rules of a specific mixer, the key has the mixer's name in place of 'mixer'.
    """
    if not path.startswith("blocks/"):
        return path, ()
    _, number, key = path.split("/", 2)
    stack = layer_groups(model)[int(number)]
    of_mixer = key.replace("mixer/", f"{stack.block.mixers[0]}/", 1)
    return of_mixer if of_mixer in rules else key, tuple(stack.layers)


def _indices(
    rule: TensorRule, layers: tuple[int, ...], shape: tuple[int, ...]
) -> list[tuple[tuple[int, ...], dict[str, int]]]:
    if not layers:
        return [((), {})]
    if "{expert}" not in rule.name:
        return [((place,), {"layer": layer}) for place, layer in enumerate(layers)]
    return [
        ((place, expert), {"layer": layer, "expert": expert})
        for place, layer in enumerate(layers)
        for expert in range(shape[1])
    ]


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts layer 2 before layer 10."""
    return [(int(word), "") if word.isdigit() else (-1, word) for word in name.split(".")]


# The tensors of Hugging Face architectures: what each parameter is called there, and how it lies.


def _linear(path: str, name: str, transposed: bool = True) -> TensorRules:
    return {
        f"{path}/kernel": TensorRule(f"{name}.weight", transposed),
        f"{path}/bias": TensorRule(f"{name}.bias"),
    }


LAYER = "model.layers.{layer}."
DENSE: TensorRules = {
    "embedding/table": TensorRule("model.embed_tokens.weight"),
    "norm/scale": TensorRule("model.norm.weight"),
    "head/kernel": TensorRule("lm_head.weight", True),
    **_linear("mixer/query", LAYER + "self_attn.q_proj"),
    **_linear("mixer/key", LAYER + "self_attn.k_proj"),
    **_linear("mixer/value", LAYER + "self_attn.v_proj"),
    **_linear("mixer/output", LAYER + "self_attn.o_proj"),
    "mixer/query_norm/scale": TensorRule(LAYER + "self_attn.q_norm.weight"),
    "mixer/key_norm/scale": TensorRule(LAYER + "self_attn.k_norm.weight"),
    **_linear("feedforward/gate", LAYER + "mlp.gate_proj"),
    **_linear("feedforward/up", LAYER + "mlp.up_proj"),
    **_linear("feedforward/down", LAYER + "mlp.down_proj"),
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
    "norm/bias": TensorRule("model.norm.bias"),
    "mixer_norm/bias": TensorRule(LAYER + "input_layernorm.bias"),
    "feedforward_norm/bias": TensorRule(LAYER + "post_attention_layernorm.bias"),
}
PHI3: TensorRules = {
    **DENSE,
    **_linear("mixer/query", LAYER + "self_attn.qkv_proj"),
    **_linear("mixer/key", LAYER + "self_attn.qkv_proj"),
    **_linear("mixer/value", LAYER + "self_attn.qkv_proj"),
    **_linear("feedforward/gate", LAYER + "mlp.gate_up_proj"),
    **_linear("feedforward/up", LAYER + "mlp.gate_up_proj"),
}
# Experts one by one, and, as transformers 5 holds them in memory, all at once with gate and up side by side.
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
    **_linear("mixer/query", MIX + ".q_proj"),
    **_linear("mixer/key", MIX + ".k_proj"),
    **_linear("mixer/value", MIX + ".v_proj"),
    **_linear("mixer/output", MIX + ".o_proj"),
    **_linear("rg_lru/output", MIX + ".linear_out"),
    **_linear("mixer/gate", MIX + ".linear_y"),
    **_linear("mixer/input", MIX + ".linear_x"),
    "mixer/convolution/kernel": TensorRule(
        MIX + ".conv_1d.weight", True, lambda model: (_recurrent_width(model), 1, model.recurrent.conv_width)
    ),
    "mixer/convolution/bias": TensorRule(MIX + ".conv_1d.bias"),
    "mixer/recurrence_gate/kernel": TensorRule(RG_LRU + "recurrent_gate_weight"),
    "mixer/recurrence_gate/bias": TensorRule(RG_LRU + "recurrent_gate_bias", view=_by_block),
    "mixer/input_gate/kernel": TensorRule(RG_LRU + "input_gate_weight"),
    "mixer/input_gate/bias": TensorRule(RG_LRU + "input_gate_bias", view=_by_block),
    "mixer/decay_rate": TensorRule(RG_LRU + "recurrent_param"),
    **_linear("feedforward/gate", MLP + ".gate_proj"),
    **_linear("feedforward/up", MLP + ".up_proj"),
    **_linear("feedforward/down", MLP + ".down_proj"),
}
H = "transformer.h.{layer}."
GPT2: TensorRules = {
    "embedding/table": TensorRule("transformer.wte.weight"),
    "positions/table": TensorRule("transformer.wpe.weight"),
    "norm/scale": TensorRule("transformer.ln_f.weight"),
    "norm/bias": TensorRule("transformer.ln_f.bias"),
    "head/kernel": TensorRule("lm_head.weight", True),
    "mixer_norm/scale": TensorRule(H + "ln_1.weight"),
    "mixer_norm/bias": TensorRule(H + "ln_1.bias"),
    "feedforward_norm/scale": TensorRule(H + "ln_2.weight"),
    "feedforward_norm/bias": TensorRule(H + "ln_2.bias"),
    # Linear layers are (inputs, outputs) as here, and queries, keys and values come from one.
    **_linear("mixer/query", H + "attn.c_attn", False),
    **_linear("mixer/key", H + "attn.c_attn", False),
    **_linear("mixer/value", H + "attn.c_attn", False),
    **_linear("mixer/output", H + "attn.c_proj", False),
    **_linear("feedforward/up", H + "mlp.c_fc", False),
    **_linear("feedforward/down", H + "mlp.c_proj", False),
}
