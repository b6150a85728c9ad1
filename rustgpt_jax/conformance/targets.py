"""What a user means by a name: a part of a table, a whole table, or a part of their own, and the model it is in."""

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
from rustgpt_jax.model.mixers import MIXERS
from rustgpt_jax.model.mlps import FEEDFORWARDS
from rustgpt_jax.model.norms import NORMS
from rustgpt_jax.model.positions import POSITIONS, ROPE_SCALINGS
from rustgpt_jax.model.presets import FAMILIES
from rustgpt_jax.registry import lookup
from rustgpt_jax.sweeps.sweep import LAUNCHERS
from rustgpt_jax.tokenizers import TOKENIZERS
from rustgpt_jax.training.optimizers import OPTIMIZERS, SCHEDULES

# Tables of parts of the model, and the knob of the small model that names one.
KNOBS = {
    "mixers": "mixers",
    "feedforwards": "feedforwards",
    "norms": "norm",
    "positions": "positions",
    "rope_scalings": "rope.scaling",
}
TABLES: dict[str, Mapping[str, Any]] = {
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
MODEL_KINDS = (*KNOBS, "families")

TABLE_OF = {
    interfaces.MIXER: "mixers",
    interfaces.FEEDFORWARD: "feedforwards",
    interfaces.NORM: "norms",
    interfaces.POSITION: "positions",
}


class Scope(enum.Enum):
    """The lengths, batch sizes, types and modes that a check covers.

    SMALL: one or two short lengths, in float32: seconds a part, for a test suite.
    QUICK: what `check` does, in less than a minute a part.
    EXHAUSTIVE: what `check --exhaustive` does, in less than five minutes a part.
    """

    SMALL = enum.auto()
    QUICK = enum.auto()
    EXHAUSTIVE = enum.auto()


@dataclass(frozen=True, eq=False)
class Subject:
    """A part to check: its table, name and value, the small model that uses it (or None), and how much to cover."""

    kind: str
    name: str
    part: Any
    model: ModelConfig | None
    scope: Scope = Scope.QUICK

    @property
    def title(self) -> str:
        """The part as a user would name it: 'mixers/attention'."""
        return f"{self.kind}/{self.name}"

    @property
    def small_model(self) -> ModelConfig:
        """The model that a part of a model is checked in."""
        assert self.model is not None, f"{self.title} is no part of a model"
        return self.model


def subjects(name: str | None = None, changes: Mapping[str, Any] | None = None) -> list[Subject]:
    """The parts that a name means; all parts for None. `changes` are knobs of the small model that is theirs.

    A name is that of a part ('attention'), of a table ('mixers'), both ('mixers/attention'), an import path
    ('my_lab.mixers:Retention') or a file ('my_lab/mixers.py:Retention'). Raises UserError for a name that means
    nothing or more than one thing.
    """
    if name is None:
        return [subject(kind, entry, changes) for kind, table in TABLES.items() for entry in table]
    if name in TABLES:
        return [subject(name, entry, changes) for entry in TABLES[name]]
    kind, _, rest = name.partition("/")
    if kind in TABLES and rest:
        return [subject(kind, rest, changes)]
    if ":" in name:
        path = import_path(name)
        return [subject(component_kind(lookup({}, path, "check"), name), path, changes)]
    kinds = [kind for kind, table in TABLES.items() if name in table]
    if not kinds:
        known = {*TABLES, *(entry for table in TABLES.values() for entry in table)}
        raise UserError(f"check: unknown part {name!r}.{suggest_names(name, known)} Tables: {', '.join(TABLES)}.")
    if len(kinds) > 1:
        raise UserError(f"check: {name!r} is in more than one table; say {' or '.join(f'{k}/{name}' for k in kinds)}.")
    return [subject(kinds[0], name, changes)]


def subject(kind: str, name: str, changes: Mapping[str, Any] | None = None) -> Subject:
    """The part of a table, by its name or its import path, in its model. Raises UserError for a wrong name."""
    name = import_path(name)
    part = lookup(TABLES[kind], name, f"check {kind}")
    return Subject(kind, name, part, model_of(kind, name, changes or {}) if kind in MODEL_KINDS else None)


def model_of(kind: str, name: str, changes: Mapping[str, Any]) -> ModelConfig:
    """The small model that has a part in its place, with some knobs changed.

    That of a family has a layer more than its patterns, where these are longer than one: layers may be left over.
    """
    if kind == "families":
        preset = lookup(FAMILIES, name, "check families")
        if not isinstance(preset, TREES):
            raise UserError(f"check: families/{name} is no mapping from knobs of a model to their values.")
        model = small_model(**{**preset, **changes})
        if model.period > 1 and "n_layers" not in changes:
            model = dataclasses.replace(model, n_layers=model.period + 1)
    else:
        model = small_model(**{KNOBS[kind]: name, **changes})
    for table, knob in KNOBS.items():
        value = get_path(model, knob)
        names = (value,) if isinstance(value, str) else value
        for each in names:
            lookup(TABLES[table], each, f"config.model.{knob}")
        if table == kind and name not in names:
            raise UserError(f"check: a model with config.model.{knob}={value!r} does not have {kind}/{name} in it.")
    return model


def component_kind(part: Any, name: str) -> str:
    """Returns the table that a component belongs to, judged by its interface.

    Raises:
        UserError: It has the interface of no component of a model.
    """
    kinds = interfaces.component_kinds(part)
    if not kinds:
        looks = "; ".join(f"{kind} is {look}" for kind, look in interfaces.DESCRIPTIONS.items())
        raise UserError(f"check: it is not clear what {name} is: {looks}. Or name its table: mixers/my_lab:Retention.")
    return TABLE_OF[kinds[0]]


def import_path(name: str) -> str:
    """A name with a file before its colon, 'my_lab/mixers.py:Retention', as the import path of the same part."""
    file, colon, part = name.rpartition(":")
    if not colon or not file.endswith(".py"):
        return name
    path = Path(file)
    if not path.is_file():
        raise UserError(f"check: there is no file {file}.")
    file_path = path.resolve()
    root = Path.cwd() if file_path.is_relative_to(Path.cwd()) else file_path.parent
    names = file_path.relative_to(root).with_suffix("").parts
    if dotted := [each for each in names if "." in each]:
        raise UserError(f"check: {file} is no import path, for {dotted[0]!r} has a dot in it. Rename it.")
    module = ".".join(names)
    if str(root) not in sys.path:
        sys.path.append(str(root))
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError as error:
        # So it is where the folder has the name of a module that is no package.
        if error.name != module:
            raise
        found = None
    if found is None or found.origin != str(file_path):
        raise UserError(f"check: {file} cannot be imported: another module is called {module}. Rename the file.")
    return f"{module}:{part}"
