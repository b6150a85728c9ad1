"""The config.json of a Hugging Face model, read strictly."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rustgpt_jax.config.validation import validate_value
from rustgpt_jax.errors import UserError


@dataclass(frozen=True)
class Settings:
    """The values of a config.json, the defaults of `transformers` for missing keys, and a callback for warnings."""

    file: Path
    values: Mapping[str, Any]
    defaults: Mapping[str, Any]
    warn: Callable[[str], object] = lambda text: None

    def __getitem__(self, key: str) -> Any:
        """The value of a key, or its default. Raises UserError for one that has neither."""
        if key in self.values:
            return self.values[key]
        if key in self.defaults:
            return self.defaults[key]
        raise UserError(f"{self.file} has no {key!r}.")

    def knob(self, key: str, knob: str) -> Any:
        """The value of a key, in the type and range of a knob of the model. Raises UserError for another."""
        return validate_value(f"model.{knob}", self[key], f"{self.file}: {key}")

    def whole(self, key: str) -> int:
        """The value of a key that counts something, 1 or more. Raises UserError for another."""
        return self.knob(key, "n_layers")

    def count(self, key: str) -> int:
        """The value of a key that counts something, 0 included. Raises UserError for another."""
        return 0 if self[key] == 0 else self.whole(key)

    def flag(self, key: str) -> bool:
        """The value of a key that is true or false; null is false. Raises UserError for another."""
        return self[key] is not None and self.knob(key, "bias")

    def entries(self, key: str) -> list[Any] | None:
        """The value of a key that is a list or null. Raises UserError for another."""
        value = self[key]
        if not isinstance(value, list | tuple | None):
            raise UserError(f"{self.file}: {key} takes a list, not {value!r}.")
        return None if value is None else list(value)

    def refuse(self, key: str, why: str) -> UserError:
        """The error for a value that the parts here cannot say."""
        return UserError(f"{self.file}: {key}={self[key]!r} cannot be said with the parts here: {why}.")


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        UserError: The file is missing or does not contain a JSON object.
    """
    try:
        values = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged: it is not JSON.") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} is damaged: it is not a JSON object.")
    return values
