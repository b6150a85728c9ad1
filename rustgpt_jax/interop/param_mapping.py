"""Which tensors of a Hugging Face model are which of our parameters, and how one is made of the other.

A rule gives, for a parameter of a block or of the whole model, the name of a tensor there. Blocks are stacked here, and
tensors there belong to one layer (and one expert), so a parameter is made of slots, one for each of them. A tensor is
one slot, or several side by side along the last axis, transposed where a linear layer keeps (outputs, inputs).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from rustgpt_jax.config.schema import ModelConfig
from rustgpt_jax.model.flops import parameter_shapes
from rustgpt_jax.model.layer_groups import stacks
from rustgpt_jax.tree_paths import by_path


class Rule(NamedTuple):
    """The name of a tensor, which may contain {layer} and {expert}.

    Rules with the same name describe its parts, in order. `view` is the stored shape, applied after the transposition,
    if it differs.
    """

    name: str
    transposed: bool = False
    view: Callable[[ModelConfig], tuple[int, ...]] | None = None


Rules = Mapping[str, Rule]
Index = tuple[int, ...]


class Slot(NamedTuple):
    """A part of a parameter: what stands at a place, an index of its first axes."""

    path: str
    place: Index
    shape: tuple[int, ...]


class Tensor(NamedTuple):
    """A stored tensor: slots concatenated along the last axis, then transposed over the last two axes.

    `view` is the shape that it is then stored in, if it differs.
    """

    name: str
    transposed: bool
    slots: tuple[Slot, ...]
    view: tuple[int, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that it has there."""
        return self._matrix_shape if self.view is None else self.view

    def joined(self, columns: Sequence[np.ndarray]) -> np.ndarray:
        """Return the stored tensor, given its concatenated slots."""
        whole = columns[0] if len(columns) == 1 else np.concatenate(columns, axis=-1)
        whole = np.swapaxes(whole, -1, -2) if self.transposed else whole
        return whole if self.view is None else whole.reshape(self.view)

    def columns(self, stored: np.ndarray) -> np.ndarray:
        """Return the concatenated slots, as a view of the stored tensor."""
        whole = stored if self.view is None else stored.reshape(self._matrix_shape)
        return np.swapaxes(whole, -1, -2) if self.transposed else whole

    @property
    def _matrix_shape(self) -> tuple[int, ...]:
        *first, _ = self.slots[0].shape
        whole = (*first, sum(slot.shape[-1] for slot in self.slots))
        return (*whole[:-2], whole[-1], whole[-2]) if self.transposed else whole


class Piece(NamedTuple):
    """The columns of a tensor that fill one slot."""

    tensor: Tensor
    start: int
    stop: int

    def of(self, stored: np.ndarray) -> np.ndarray:
        """The slot, as a view of the tensor."""
        return self.tensor.columns(stored)[..., self.start : self.stop]


def shapes_by_path(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of all parameters by path, such as blocks/0/mixer/query/kernel."""
    return {path: tuple(leaf.shape) for path, leaf in by_path(parameter_shapes(model)).items()}


def tensors(rules: Rules, model: ModelConfig) -> dict[str, Tensor]:
    """All tensors of a model by name, in the order of the layers. Each parameter has a rule."""
    found: dict[str, list[tuple[int, Rule, Slot]]] = {}
    order = {path: number for number, path in enumerate(rules)}
    for path, shape in shapes_by_path(model).items():
        key, layers = _rule_key(path, model, rules)
        rule = rules[key]
        for index, names in _indices(rule, layers, shape):
            slot = Slot(path, index, shape[len(index) :])
            found.setdefault(rule.name.format(**names), []).append((order[key], rule, slot))
    result: dict[str, Tensor] = {}
    for name, parts in found.items():
        parts.sort(key=lambda part: part[0])
        _, rule, _ = parts[0]
        view = None if rule.view is None else rule.view(model)
        result[name] = Tensor(name, rule.transposed, tuple(slot for _, _, slot in parts), view)
    return dict(sorted(result.items(), key=lambda item: _natural(item[0])))


def pieces(plan: Iterable[Tensor]) -> dict[str, list[Piece]]:
    """For each parameter, what fills its slots, in their order."""
    found: dict[str, dict[tuple[int, ...], Piece]] = {}
    for tensor in plan:
        start = 0
        for slot in tensor.slots:
            stop = start + slot.shape[-1]
            found.setdefault(slot.path, {})[slot.place] = Piece(tensor, start, stop)
            start = stop
    return {path: [of_index[index] for index in sorted(of_index)] for path, of_index in found.items()}


def _rule_key(path: str, model: ModelConfig, rules: Rules) -> tuple[str, tuple[int, ...]]:
    """Return the key of a parameter's rule, which is its path without the stack, and the layers it is stacked over.

    For rules of a specific mixer, the key has the mixer's name in place of 'mixer'.
    """
    if not path.startswith("blocks/"):
        return path, ()
    _, number, key = path.split("/", 2)
    stack = stacks(model)[int(number)]
    of_mixer = key.replace("mixer/", f"{stack.block.mixers[0]}/", 1)
    return of_mixer if of_mixer in rules else key, tuple(stack.layers)


def _indices(
    rule: Rule, layers: tuple[int, ...], shape: tuple[int, ...]
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
