"""Lookup of components to check, by the name of a component or registry or by the import path of your own component."""

import dataclasses
import enum
import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rustgpt_jax.config.schema import ModelConfig, get_path
from rustgpt_jax.config.validation import TREES
from rustgpt_jax.conformance.fixtures import small_model
from rustgpt_jax.data.datasets import CORPORA
from rustgpt_jax.errors import UserError, suggest_names
from rustgpt_jax.inference.sampling import SAMPLERS
from rustgpt_jax.model import interfaces
from rustgpt_jax.model.layers import NORMS
from rustgpt_jax.model.mixers import MIXERS
from rustgpt_jax.model.mlps import FEEDFORWARDS
from rustgpt_jax.model.positions import POSITIONS, ROPE_SCALINGS
from rustgpt_jax.model.presets import FAMILIES
from rustgpt_jax.registry import lookup
from rustgpt_jax.sweeps.sweep import LAUNCHERS
from rustgpt_jax.tokenizers import TOKENIZERS
from rustgpt_jax.training.optimizers import OPTIMIZERS, SCHEDULES

# Registries of model components, and the model field that selects from each.
MODEL_FIELDS = {
    "mixers": "mixers",
    "feedforwards": "feedforwards",
    "norms": "norm",
    "positions": "positions",
    "rope_scalings": "rope.scaling",
}
REGISTRIES: dict[str, Mapping[str, Any]] = {
    "mixers": MIXERS,
    "feedforwards": FEEDFORWARDS,
    "norms": NORMS,
    "positions": POSITIONS,
    "rope_scalings": ROPE_SCALINGS,
    "families": FAMILIES,
    "optimizers": OPTIMIZERS,
    "schedules": SCHEDULES,
    "samplers": SAMPLERS,
    "tokenizers": TOKENIZERS,
    "corpora": CORPORA,
    "launchers": LAUNCHERS,
}
MODEL_KINDS = (*MODEL_FIELDS, "families")
KIND_OF_INTERFACE = {
    interfaces.MIXER: "mixers",
    interfaces.FEEDFORWARD: "feedforwards",
    interfaces.NORM: "norms",
    interfaces.POSITION: "positions",
}


class Scope(enum.Enum):
    """The lengths, batch sizes, dtypes and modes that a check covers.

    SMALL: one or two short lengths, in float32; a few seconds per component, for a test suite.
    QUICK: the default of `check`; less than a minute per component.
    EXHAUSTIVE: `check --exhaustive`; less than five minutes per component.
    """

    SMALL = enum.auto()
    QUICK = enum.auto()
    EXHAUSTIVE = enum.auto()


@dataclass(frozen=True, eq=False)
class Component:
    """A component to check.

    Attributes:
        kind: The name of its registry.
        name: Its name in the registry, or its import path.
        value: The class, function or preset.
        model: The small model that uses it; None if it is not part of a model.
        scope: The coverage of the checks.
    """

    kind: str
    name: str
    value: Any
    model: ModelConfig | None
    scope: Scope = Scope.QUICK

    @property
    def title(self) -> str:
        """The registry and the name, as in 'mixers/attention'."""
        return f"{self.kind}/{self.name}"

    @property
    def small_model(self) -> ModelConfig:
        """The small model in which a model component is checked."""
        assert self.model is not None, f"{self.title} is not part of a model"
        return self.model


def find_components(name: str | None = None, changes: Mapping[str, Any] | None = None) -> list[Component]:
    """Return the components that a name refers to.

    Args:
        name: A component ('attention'), a registry ('mixers'), both ('mixers/attention'), an import path
            ('my_lab.mixers:Retention') or a file ('my_lab/mixers.py:Retention'); None for all registered components.
        changes: Fields of the small model to change.

    Raises:
        UserError: The name is unknown or ambiguous.
    """
    if name is None:
        return [make_component(kind, entry, changes) for kind, registry in REGISTRIES.items() for entry in registry]
    if name in REGISTRIES:
        return [make_component(name, entry, changes) for entry in REGISTRIES[name]]
    kind, _, rest = name.partition("/")
    if kind in REGISTRIES and rest:
        return [make_component(kind, rest, changes)]
    if ":" in name:
        path = to_import_path(name)
        return [make_component(infer_kind(lookup({}, path, "check"), name), path, changes)]
    kinds = [kind for kind, registry in REGISTRIES.items() if name in registry]
    if not kinds:
        known = {*REGISTRIES, *(entry for registry in REGISTRIES.values() for entry in registry)}
        message = f"check: unknown component {name!r}.{suggest_names(name, known)}"
        raise UserError(f"{message} Registries: {', '.join(REGISTRIES)}.")
    if len(kinds) > 1:
        choices = " or ".join(f"{kind}/{name}" for kind in kinds)
        raise UserError(f"check: {name!r} is in more than one registry; use {choices}.")
    return [make_component(kinds[0], name, changes)]


def make_component(kind: str, name: str, changes: Mapping[str, Any] | None = None) -> Component:
    """Return a component of a registry, by name or import path, with the small model that uses it."""
    name = to_import_path(name)
    value = lookup(REGISTRIES[kind], name, f"check {kind}")
    return Component(kind, name, value, _model_with(kind, name, changes or {}) if kind in MODEL_KINDS else None)


def _model_with(kind: str, name: str, changes: Mapping[str, Any]) -> ModelConfig:
    """Return the small model with a component in it and some fields changed.

    A family with a pattern of several layers gets one layer more than the pattern, to test an incomplete repeat.
    """
    if kind == "families":
        preset = lookup(FAMILIES, name, "check families")
        if not isinstance(preset, TREES):
            raise UserError(f"check: families/{name} is not a mapping from model fields to values.")
        model = small_model(**{**preset, **changes})
        if model.period > 1 and "n_layers" not in changes:
            model = dataclasses.replace(model, n_layers=model.period + 1)
    else:
        model = small_model(**{MODEL_FIELDS[kind]: name, **changes})
    for registry, field in MODEL_FIELDS.items():
        value = get_path(model, field)
        names = (value,) if isinstance(value, str) else value
        for each in names:
            lookup(REGISTRIES[registry], each, f"config.model.{field}")
        if registry == kind and name not in names:
            raise UserError(f"check: a model with config.model.{field}={value!r} does not use {kind}/{name}.")
    return model


def infer_kind(value: Any, name: str) -> str:
    """Return the registry that a component belongs to according to its interface.

    Raises:
        UserError: It has the interface of no model component.
    """
    kinds = interfaces.component_kinds(value)
    if not kinds:
        looks = "; ".join(f"{kind} is {look}" for kind, look in interfaces.DESCRIPTIONS.items())
        example = "mixers/my_lab:Retention"
        raise UserError(f"check: cannot tell what {name} is: {looks}. Or name its registry: {example}.")
    return KIND_OF_INTERFACE[kinds[0]]


def to_import_path(name: str) -> str:
    """Convert 'my_lab/mixers.py:Retention' to 'my_lab.mixers:Retention'; other names are returned unchanged."""
    file, colon, attribute = name.rpartition(":")
    if not colon or not file.endswith(".py"):
        return name
    path = Path(file)
    if not path.is_file():
        raise UserError(f"check: {file} does not exist.")
    file_path = path.resolve()
    root = Path.cwd() if file_path.is_relative_to(Path.cwd()) else file_path.parent
    names = file_path.relative_to(root).with_suffix("").parts
    if dotted := [each for each in names if "." in each]:
        raise UserError(f"check: {file} cannot be imported, because {dotted[0]!r} contains a dot. Rename it.")
    module = ".".join(names)
    if str(root) not in sys.path:
        sys.path.append(str(root))
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError as error:
        # Raised if the folder has the name of a module that is not a package.
        if error.name != module:
            raise
        spec = None
    if spec is None or spec.origin != str(file_path):
        raise UserError(f"check: {file} cannot be imported: another module is called {module}. Rename the file.")
    return f"{module}:{attribute}"
