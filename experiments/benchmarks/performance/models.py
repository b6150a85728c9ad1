"""Model sizes, batch sizes and variants of the benchmark.

python experiments/benchmarks/run.py
"""

from typing import NamedTuple

from experiments.benchmarks.best_batch import Knobs, make_config
from rustgpt_jax.config.schema import Config


class Shape(NamedTuple):
    """A GPT-2 to train.

    Attributes:
        knobs: The sizes of the model.
        batch: The batch size.
        steps: The number of steps per call, which is a turn.
        scan_layers: The faster value at this size.
    """

    knobs: Knobs
    batch: int
    steps: int
    scan_layers: bool

    @property
    def tokens(self) -> int:
        """The number of tokens in a batch."""
        return self.batch * self.knobs["model.context_length"]


def _knobs(layers: int, heads: int, width: int, context: int, vocabulary: int) -> Knobs:
    return {
        "model.n_layers": layers,
        "model.attention.n_heads": heads,
        "model.d_model": width,
        "model.context_length": context,
        "model.vocab_size": vocabulary,
    }


SHAPES = {
    "shk": Shape(_knobs(4, 4, 128, 64, 65), batch=12, steps=20, scan_layers=False),
    "mid": Shape(_knobs(6, 6, 384, 256, 65), batch=16, steps=1, scan_layers=False),
    "124M": Shape(_knobs(12, 12, 768, 256, 50304), batch=2, steps=1, scan_layers=False),
    "smoke": Shape(_knobs(2, 2, 32, 16, 64), batch=2, steps=2, scan_layers=False),
}
# Our training variants; a new one also needs a name in RACES.
TRAINING: dict[str, Knobs] = {
    "float32": {"model.dtype": "float32"},
    "bfloat16 factors": {
        "model.dtype": "float32",
        "model.precision.matmul_dtype": "bfloat16",
        "model.precision.logits_dtype": "bfloat16",
    },
    "bfloat16": {"model.dtype": "bfloat16"},
}


def training_config(shape: str, knobs: Knobs) -> Config:
    """Return the config of a shape with the values at some dotted paths changed."""
    wanted = SHAPES[shape]
    sizes = {"training.batch_size": wanted.batch, "training.steps_per_jit_call": wanted.steps}
    return make_config(
        "124m", wanted.knobs | sizes | {"model.scan_layers": wanted.scan_layers, "model.dtype": "float32"} | knobs
    )


# The dtypes of weights in decoding.
WEIGHTS: dict[str, Knobs] = {
    "float32": {"model.dtype": "float32"},
    "bfloat16": {"model.dtype": "bfloat16"},
    "int8": {"model.dtype": "float32", "sampling.weight_dtype": "int8"},
}


class Decoded(NamedTuple):
    """A GPT-2 to decode with, and numbers of tokens: in the prompt, generated, and individually timed."""

    size: str
    prompt: int
    new: int
    steps: int


DECODED = Decoded("124m", prompt=128, new=16, steps=1000)
SMOKE = Decoded("smoke", prompt=16, new=16, steps=40)


def decoding_config(size: str, weights: str, kernel: str) -> Config:
    """Return the config of a GPT-2 that decodes with weights in a dtype and with a matrix kernel."""
    return make_config(size, {"model.scan_layers": False, "sampling.matmul_impl": kernel} | WEIGHTS[weights])
