"""Does QK-norm widen the range of good learning rates?

rustgpt sweep --config=qk_norm

A small version of experiments/learning_rate.py, which takes two minutes on two cores: the model of configs/tiny.py,
trained for 200 steps on the bytes of 200 files of the running Python's standard library, with and without a norm of
queries and keys, at five learning rates and six seeds: 60 trials in two shape classes.

FINDING (2 vCPU AMD EPYC, JAX 0.10.2, Python 3.11's library): not shown at this size. The best setting has QK-norm, at a
rate of 0.03, with a mean loss of 2.683 nats per byte; without QK-norm, the best rate is 0.01, with 2.711, and the
difference is not significant (p = 0.89). At 0.03, the mean is 0.153 higher without QK-norm (p = 0.19). The sensitivity
to the learning rate is 0.140 with and 0.143 without. experiments/learning_rate.py finds a difference with more steps
and higher rates.
"""

from collections.abc import Iterable

from ml_collections import ConfigDict

from rustgpt_jax import load_config
from rustgpt_jax.sweeps import Overrides, product, seeds, values


def get_config() -> ConfigDict:
    """Return the config of configs/tiny.py with more steps and real text."""
    config = load_config("tiny")
    config.data.corpus = "python_stdlib"
    config.data.max_documents = 200
    config.training.steps = 200
    config.logging.eval_batches = 20
    config.logging.checkpoint_every = 200
    return config


def sweep() -> Iterable[Overrides]:
    """Return a trial for each kind of norm, learning rate and seed."""
    return product(
        values("model.attention.qk_norm", "none", "head"),
        values("optimizer.learning_rate", 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
        seeds(6),
    )
