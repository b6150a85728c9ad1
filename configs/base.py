"""The default config, from which all recipes start: a small modern model on the bundled facts.

rustgpt_jax/config/schema.py declares every knob with its default, valid range and documentation.
"""

from ml_collections import ConfigDict

from rustgpt_jax.config import schema


def get_config() -> ConfigDict:
    """Return the default of every knob."""
    return ConfigDict(schema.defaults())
