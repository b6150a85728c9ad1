"""What a run is: frozen dataclasses with the type, range and kind of every knob.

`configs/base.py` gives each knob its value and its meaning; no default stands here. A config is read
into these classes by `resolve`, and divided by `partition` into

    structure   what selects a compiled program: shapes, names of parts, switches (hashable)
    numbers     what a compiled program takes as arguments: seed, learning rate, dropout, ... (a flat dict)

`combine` puts numbers (floats outside `jit`, tracers inside) back into their places in a structure.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rustgpt_jax.errors import UserError, suggestion


def static_field(low: float | None = None, high: float | None = None, choices: tuple[str, ...] = ()) -> Any:
    """A field that is structure, with its inclusive range or its valid values."""
    return dataclasses.field(metadata={"low": low, "high": high, "choices": choices})


def pattern() -> Any:
    """A field that names parts, repeated over the layers. One name alone is a pattern of one."""
    return dataclasses.field(metadata={"pattern": True})


def traced_field(low: float | None = None, high: float | None = None, static_if_zero: bool = False) -> Any:
    """A field that a compiled program takes as an argument. With `static_if_zero`, 0 is structure: the part is gone."""
    return dataclasses.field(metadata={"low": low, "high": high, "number": True, "static_if_zero": static_if_zero})


@dataclass(frozen=True)
class TokenizerConfig:
    """How text becomes tokens."""

    name: str = static_field()
    # For a larger vocabulary the BPE trainer would reserve more memory than any machine has.
    vocab_size: int | None = static_field(low=1, high=2**22)


@dataclass(frozen=True)
class DataConfig:
    """Which text, and which of it is learned."""

    corpus: str = static_field()
    paths: tuple[str, ...] = static_field()
    max_documents: int | None = static_field(low=1)
    split: str = static_field(choices=("document", "tail"))
    valid_fraction: float = static_field(low=0.0, high=0.9)
    loss_mask: str = static_field(choices=("all", "assistant"))
    seq_len: int | None = static_field(low=2)


@dataclass(frozen=True)
class ModelConfig:
    """The parts and shapes of the model."""

    vocab_size: int | None = static_field(low=1)
    context_length: int = static_field(low=2)
    n_layers: int = static_field(low=1)
    d_model: int = static_field(low=1)
    n_heads: int = static_field(low=1)
    n_kv_heads: int | None = static_field(low=1)
    head_dim: int | None = static_field(low=1)
    d_ff: int | None = static_field(low=1)
    mixers: tuple[str, ...] = pattern()
    feedforwards: tuple[str, ...] = pattern()
    positions: tuple[str, ...] = pattern()
    norm: str = static_field()
    norm_placement: str = static_field(choices=("pre", "post", "output", "sandwich"))
    norm_eps: float = traced_field(low=0.0)
    bias: bool = static_field()
    qkv_bias: bool | None = static_field()
    attention_output_bias: bool | None = static_field()
    feedforward_bias: bool | None = static_field()
    norm_bias: bool | None = static_field()
    tie_embeddings: bool = static_field()
    scale_embeddings: bool = static_field()
    embedding_scale: float | None = static_field(low=0.0)
    final_logit_softcap: float = traced_field(low=0.0, static_if_zero=True)
    qk_norm: str = static_field(choices=("none", "head", "projection"))
    attention_scale: float | None = static_field(low=0.0)
    attention_scale_by_layer: bool = static_field()
    attn_logit_softcap: float = traced_field(low=0.0, static_if_zero=True)
    attention_sinks: bool = static_field()
    attention_kernel: str = static_field(
        choices=("auto", "portable", "plain", "triangular", "blockwise", "cudnn", "tokamax")
    )
    local_window: int = static_field(low=1)
    kv_lora_rank: int | None = static_field(low=1)
    q_lora_rank: int | None = static_field(low=1)
    qk_rope_head_dim: int | None = static_field(low=2)
    conv_width: int = static_field(low=1)
    recurrent_width: int | None = static_field(low=1)
    recurrent_blocks: int | None = static_field(low=1)
    scale_first_token: bool = static_field()
    rope_theta: float = traced_field(low=1.0)
    local_rope_theta: float = traced_field(low=1.0)
    rope_fraction: float = static_field(low=0.0, high=1.0)
    rope_scaling: str = static_field()
    rope_factor: float = traced_field(low=1.0)
    rope_original_context: int | None = static_field(low=1)
    rope_beta_slow: float = traced_field(low=0.0)
    rope_beta_fast: float = traced_field(low=0.0)
    rope_attention_factor: float | None = static_field(low=0.0)
    rope_truncate: bool = static_field()
    rope_short_factors: tuple[float, ...] = static_field()
    rope_long_factors: tuple[float, ...] = static_field()
    n_experts: int = static_field(low=1)
    experts_per_token: int = static_field(low=1)
    d_expert: int | None = static_field(low=1)
    expert_activation: str = static_field(choices=("silu", "gelu", "gelu_exact", "relu", "relu_squared"))
    capacity_factor: float = static_field(low=0.0)
    norm_topk_prob: bool = static_field()
    load_balance_loss_weight: float = traced_field(low=0.0, static_if_zero=True)
    router_z_loss: float = traced_field(low=0.0, static_if_zero=True)
    extra: tuple[tuple[str, float], ...] = static_field()
    dropout: float = traced_field(low=0.0, high=0.99, static_if_zero=True)
    init_std: float = traced_field(low=0.0)
    dtype: str = static_field(choices=("float32", "bfloat16"))
    mixer_dtype: str | None = static_field(choices=("float32", "bfloat16"))
    feedforward_dtype: str | None = static_field(choices=("float32", "bfloat16"))
    logits_dtype: str | None = static_field(choices=("float32", "bfloat16"))
    matmul_dtype: str | None = static_field(choices=("bfloat16", "float8"))
    save_residuals: bool | None = static_field()
    scan_layers: bool = static_field()
    remat: str = static_field(choices=("none", "dots", "dots_no_batch", "full", "offload"))

    @property
    def period(self) -> int:
        """Blocks after which the patterns of mixers, feed-forwards and positions are all at their beginning again."""
        return math.lcm(len(self.mixers), len(self.feedforwards), len(self.positions))

    def block(self, layer: int) -> "ModelConfig":
        """What the block of a layer sees: this config with each pattern reduced to the one part that the layer has."""
        names = (self.mixers, self.feedforwards, self.positions)
        mixer, feedforward, position = (pattern[layer % len(pattern)] for pattern in names)
        return dataclasses.replace(self, mixers=(mixer,), feedforwards=(feedforward,), positions=(position,))

    @property
    def mixer_config(self) -> "ModelConfig":
        """What the mixer of a block sees: this config in the mixers' own precision."""
        return dataclasses.replace(self, dtype=self.mixer_dtype or self.dtype)

    @property
    def feedforward_config(self) -> "ModelConfig":
        """What the feed-forward of a block sees: this config in the feed-forwards' own precision."""
        return dataclasses.replace(self, dtype=self.feedforward_dtype or self.dtype)

    @property
    def has_qkv_bias(self) -> bool:
        """True if the query, key and value projections have biases."""
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @property
    def has_attention_output_bias(self) -> bool:
        """True if the output projection of attention has a bias."""
        return self.bias if self.attention_output_bias is None else self.attention_output_bias

    @property
    def has_feedforward_bias(self) -> bool:
        """True if the linear layers of dense feed-forwards have biases."""
        return self.bias if self.feedforward_bias is None else self.feedforward_bias

    @property
    def has_norm_bias(self) -> bool:
        """True if layer norms have biases."""
        return self.bias if self.norm_bias is None else self.norm_bias

    @property
    def head_width(self) -> int:
        """Channels of a head."""
        return self.head_dim or self.d_model // self.n_heads

    @property
    def rotated_channels(self) -> int:
        """Channels of a head that RoPE rotates."""
        return int(self.head_width * self.rope_fraction)

    def get_extra(self, name: str) -> float:
        """The value of a knob in `extra`, for components outside this package. Raises UserError if it is not set."""
        values = dict(self.extra)
        if name not in values:
            raise UserError(f"config.model.extra has no {name!r}.{suggestion(name, values)}")
        return values[name]


@dataclass(frozen=True)
class OptimizerConfig:
    """How a gradient becomes an update."""

    name: str = static_field()
    learning_rate: float = traced_field(low=0.0)
    b1: float = traced_field(low=0.0, high=0.999999)
    b2: float = traced_field(low=0.0, high=0.999999)
    eps: float = traced_field(low=1e-30)
    momentum: float = traced_field(low=0.0, high=1.0)
    muon_learning_rate: float = traced_field(low=0.0)
    weight_decay: float = traced_field(low=0.0)
    weight_decay_groups: tuple[tuple[str, float], ...] = static_field()
    clip_norm: float = traced_field(low=0.0, static_if_zero=True)
    offload_state: bool = static_field()
    state_dtype: str = static_field(choices=("float32", "bfloat16"))


@dataclass(frozen=True)
class ScheduleConfig:
    """How the learning rate changes over the steps."""

    name: str = static_field()
    warmup_steps: int = traced_field(low=0)
    decay_frac: float = traced_field(low=0.0, high=1.0)
    final_lr_frac: float = traced_field(low=0.0, high=1.0)


@dataclass(frozen=True)
class TrainingConfig:
    """How many steps, on how much text each."""

    steps: int = traced_field(low=1)
    # Not None: decides instead of `steps`, until data.prepare.resolve_epochs has replaced it by steps.
    epochs: float | None = static_field(low=1e-9)
    batch_size: int = static_field(low=1)
    grad_accum_steps: int = static_field(low=1)
    # Memory use grows with this number, since each call has a slot for every step.
    steps_per_jit_call: int = static_field(low=1, high=2**16)
    z_loss: float = traced_field(low=0.0, static_if_zero=True)
    loss_chunk_size: int | None = static_field(low=1)


@dataclass(frozen=True)
class MeshConfig:
    """How many devices each kind of parallelism has; -1 stands for all that are left. No result depends on it."""

    data: int = static_field(low=-1)
    fsdp: int = static_field(low=-1)
    expert: int = static_field(low=-1)
    context: int = static_field(low=-1)
    tensor: int = static_field(low=-1)


@dataclass(frozen=True)
class FaultsConfig:
    """What becomes of a run when a step goes wrong."""

    nonfinite_policy: str = static_field(choices=("stop", "skip", "rewind"))
    max_skipped: int = static_field(low=0)


@dataclass(frozen=True)
class LoggingConfig:
    """What a run writes, and when."""

    log_every: int = static_field(low=1)
    eval_every: int = static_field(low=1)
    eval_batches: int | None = static_field(low=1)
    checkpoint_every: int = static_field(low=1)
    sample_prompts: tuple[str, ...] = static_field()


@dataclass(frozen=True)
class SamplingConfig:
    """How text is drawn from the model."""

    seed: int = static_field(low=0, high=2**32 - 1)
    max_tokens: int = static_field(low=1)
    temperature: float = static_field(low=0.0)
    top_k: int = static_field(low=0)
    top_p: float = static_field(low=0.0, high=1.0)
    min_p: float = static_field(low=0.0, high=1.0)
    repetition_penalty: float = static_field(low=1.0)
    past_context: str = static_field(choices=("stop", "slide"))
    history_turns: int | None = static_field(low=0)
    weight_dtype: str | None = static_field(choices=("bfloat16", "int8"))
    matmul_impl: str = static_field(choices=("plain", "native"))


@dataclass(frozen=True)
class StageConfig:
    """One stage of a run: a name, and the knobs in which it differs from the run's config."""

    name: str
    overrides: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Config:
    """A whole run. The meaning of each knob stands in configs/base.py."""

    seed: int = traced_field(low=0, high=2**32 - 1)
    tokenizer: TokenizerConfig = static_field()
    data: DataConfig = static_field()
    model: ModelConfig = static_field()
    optimizer: OptimizerConfig = static_field()
    schedule: ScheduleConfig = static_field()
    training: TrainingConfig = static_field()
    mesh: MeshConfig = static_field()
    faults: FaultsConfig = static_field()
    logging: LoggingConfig = static_field()
    sampling: SamplingConfig = static_field()
    stages: tuple[StageConfig, ...] = static_field()


# The program of a run: the groups that its compiled steps depend on.


@dataclass(frozen=True)
class StaticConfig:
    """What selects a compiled training program. Its number fields hold TRACED, or 0 where a part is switched off."""

    seed: Any
    model: ModelConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    training: TrainingConfig


TRACED = "traced"


def partition(config: Config) -> tuple[StaticConfig, dict[str, float]]:
    """Divide a config into the structure of its program and the numbers that the program takes as arguments."""
    hparams: dict[str, float] = {}

    def strip(node: Any, prefix: str) -> Any:
        changes: dict[str, Any] = {}
        for field in dataclasses.fields(node):
            path, value = prefix + field.name, getattr(node, field.name)
            if dataclasses.is_dataclass(value):
                changes[field.name] = strip(value, path + ".")
            elif _is_number(path) and not (get_field(path).metadata["static_if_zero"] and value == 0):
                changes[field.name], hparams[path] = TRACED, value
        return dataclasses.replace(node, **changes)

    whole = StaticConfig(config.seed, config.model, config.optimizer, config.schedule, config.training)
    return strip(whole, ""), hparams


def combine(static: StaticConfig, hparams: Mapping[str, Any]) -> StaticConfig:
    """The inverse of `partition`: every TRACED in `static` replaced by the number (or tracer) of its path."""

    def fill(node: Any, prefix: str) -> Any:
        changes: dict[str, Any] = {}
        for field in dataclasses.fields(node):
            value = getattr(node, field.name)
            if dataclasses.is_dataclass(value):
                changes[field.name] = fill(value, prefix + field.name + ".")
            elif isinstance(value, str) and value == TRACED:
                changes[field.name] = hparams[prefix + field.name]
        return dataclasses.replace(node, **changes)

    return fill(static, "")


def is_enabled(value: Any) -> bool:
    """Whether a part whose number is `value` exists in the program: all but a Python zero (a tracer is always on)."""
    return not (isinstance(value, (int, float)) and value == 0)


def for_inference(model: ModelConfig) -> ModelConfig:
    """A model as it is read: numbers that only training reads are 0, so that models that differ in these alone run the
    same program; and attention is computed as suits the device here, not the one that trained it.
    """
    return dataclasses.replace(
        model,
        dropout=0.0,
        init_std=0.0,
        load_balance_loss_weight=0.0,
        router_z_loss=0.0,
        attention_kernel="auto",
        save_residuals=False,
    )


# Fields by dotted path.


def _walk(cls: type, prefix: str) -> dict[str, dataclasses.Field[Any]]:
    fields: dict[str, dataclasses.Field[Any]] = {}
    for field in dataclasses.fields(cls):
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            fields |= _walk(field.type, prefix + field.name + ".")
        else:
            fields[prefix + field.name] = field
    return fields


FIELDS: dict[str, dataclasses.Field[Any]] = {
    path: field for path, field in _walk(Config, "").items() if path != "stages"
}


def get_field(path: str) -> dataclasses.Field[Any]:
    """The dataclass field at a dotted path such as 'optimizer.learning_rate'."""
    return FIELDS[path]


def _is_number(path: str) -> bool:
    return bool(get_field(path).metadata.get("number"))


def get_path(config: Any, path: str) -> Any:
    """The value at a dotted path of a config."""
    for name in path.split("."):
        config = getattr(config, name)
    return config


def flatten(config: Config) -> dict[str, Any]:
    """Every knob of a config but its stages, by dotted path, in the order of the classes above."""
    return {path: get_path(config, path) for path in FIELDS}


# Stages.

STEPS, EPOCHS = "training.steps", "training.epochs"


@dataclass(frozen=True)
class Stage:
    """One stage of a run: steps `first_step` to `end_step` (exclusive), with a complete config.

    `until` is the step after which the run continued with another config, or None.
    """

    name: str
    first_step: int
    config: Config
    until: int | None = None

    @property
    def end_step(self) -> int:
        """The first step that is not the stage's."""
        return self.first_step + self.config.training.steps

    @property
    def last_step(self) -> int:
        """The last step, counted from 1, that is trained with this config."""
        return self.end_step if self.until is None else min(self.until, self.end_step)

    def is_logged(self, step: int) -> bool:
        """Return whether the metrics of the given step, counted from 1, are recorded."""
        # The loss of the first step is that of the initial parameters.
        return step == 1 or step % self.config.logging.log_every == 0 or step == self.end_step


def stages(config: Config) -> tuple[Stage, ...]:
    """The stages of a run in their order. A config that lists none is one stage called 'train'."""
    if not config.stages:
        return (Stage("train", 0, config),)
    result: list[Stage] = []
    for stage in config.stages:
        own = dict(stage.overrides)
        if STEPS in own:
            # Its own steps, rather than the epochs of the whole run.
            own.setdefault(EPOCHS, None)
        whole = replace_paths(dataclasses.replace(config, stages=()), own)
        result.append(Stage(stage.name, result[-1].end_step if result else 0, whole))
    return tuple(result)


class Earlier(NamedTuple):
    """A config that a run used up to a given step, before it was changed."""

    until: int
    config: Config


def stages_in_turn(config: Config, earlier: Sequence[Earlier] = ()) -> tuple[Stage, ...]:
    """Return the stages of a run whose config changed at some steps, with one entry per config of a stage."""
    result: list[Stage] = []
    begin = 0
    for until, each in (*earlier, (None, config)):
        for stage in stages(each):
            if stage.end_step > begin and (until is None or stage.first_step < until > begin):
                result.append(dataclasses.replace(stage, until=until))
        begin = max(begin, until or 0)
    # The run is complete; later config changes apply to no step.
    return tuple(result)


def uses_epochs(config: Config) -> bool:
    """True if some stage takes its steps from a number of epochs, which needs its data."""
    return any(stage.config.training.epochs is not None for stage in stages(config))


def with_steps(config: Config, steps: Mapping[str, int]) -> Config:
    """A config with a number of steps, instead of a number of epochs, for some stages by name."""
    if not config.stages:
        return replace_paths(config, {STEPS: steps["train"], EPOCHS: None})
    parts = []
    for stage in config.stages:
        own = {path: value for path, value in stage.overrides if path != EPOCHS}
        own |= {STEPS: steps[stage.name]} if stage.name in steps else {}
        parts.append(StageConfig(stage.name, tuple(sorted(own.items()))))
    return replace_paths(config, {"stages": tuple(parts), EPOCHS: None})


def replace_paths(config: Config, values: Mapping[str, Any]) -> Config:
    """A copy of `config` with the values at some dotted paths replaced. The values are taken as they are."""
    for path, value in values.items():
        *groups, name = path.split(".")
        nodes = [config]
        for group in groups:
            nodes.append(getattr(nodes[-1], group))
        for node, child in zip(reversed(nodes), reversed([*groups, name]), strict=True):
            value = dataclasses.replace(node, **{child: value})
        config = value
    return config


def may_differ_by_stage(path: str) -> bool:
    """A stage has its own data, steps and numbers; parameters and optimizer state must keep their shapes."""
    return path.startswith("data.") or path in ("schedule.name", EPOCHS) or (_is_number(path) and path != "seed")


# Written form.


def to_dict(config: Config) -> dict[str, Any]:
    """A config as plain dicts, lists and scalars, ready for JSON; `resolve` reads it back."""
    plain = dataclasses.asdict(config)
    plain["stages"] = [{"name": stage.name, **unflatten(dict(stage.overrides))} for stage in config.stages]
    return json.loads(json.dumps(plain))


def unflatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted paths turned into nested dicts."""
    tree: dict[str, Any] = {}
    for path, value in values.items():
        *groups, name = path.split(".")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = value
    return tree


def may_change(path: str) -> bool:
    """Return whether a knob may change during a run, that is, whether it affects only what is recorded."""
    knob = path.split(".", 2)[-1] if path.startswith("stages.") else path
    return knob.startswith(("logging.", "sampling.", "mesh.")) or knob in (
        "training.steps",
        "training.steps_per_jit_call",
    )


def affects_result(path: str) -> bool:
    """Whether a knob says what a run computes, and not only where."""
    return not path.startswith("mesh.")


def config_hash(config: Config) -> str:
    """The name of a config, but for its mesh: 16 hex digits of the SHA-256 of its canonical JSON."""
    plain = to_dict(config)
    del plain["mesh"]
    canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def diff(first: Config, second: Config) -> dict[str, tuple[Any, Any]]:
    """The knobs in which two configs differ, by dotted path."""
    left, right = flatten(first), flatten(second)
    changed = {path: (left[path], right[path]) for path in FIELDS if left[path] != right[path]}
    if first.stages != second.stages:
        changed["stages"] = (first.stages, second.stages)
    return changed
