"""How much does the learning rate matter, by width, and do QK-norm or a z-loss make it matter less?

python launch.py sweep --config=experiments/learning_rate.py

Three widths, seven learning rates from 3e-4 to 3e-1, two seeds, three variants: 126 models of two layers that read
the standard library of the running Python byte by byte. The measure is that of arXiv 2309.14322: the mean over the
learning rates of how far the loss is above the best one, no loss counting for more than that of the initial model.

FINDING (2 vCPU AMD EPYC, JAX 0.10.2, Python 3.11's library): the sensitivity falls with the width, and QK-norm lowers
it at every width; a z-loss of 1e-4 does not change it beyond noise. Means of two seeds, nats a byte:

    width      plain    QK-norm    z-loss
    32         0.547    0.455      0.559
    64         0.383    0.276      0.384
    128        0.345    0.201      0.322

No model diverged. What QK-norm helps is the high rates (width 128 at 0.3: 2.33 against 2.84); the best loss itself
differs by less than the seeds do, except by width. 23 minutes of one core: about 12 on two cores that have nothing
else to do.
"""

from collections.abc import Iterable

from ml_collections import ConfigDict

from configs import base
from rustgpt_jax.sweeps import Overrides, chain, product, seeds, values

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)


def get_config() -> ConfigDict:
    """A GPT of two layers on bytes, for seconds of training."""
    config = base.get_config()
    config.tokenizer.name = "byte"
    config.tokenizer.vocab_size = None
    config.data.corpus = "python_stdlib"
    config.data.max_documents = 200
    config.model.context_length = 64
    config.model.n_layers = 2
    config.model.feedforwards = ("gelu",)
    config.optimizer.b2 = 0.95
    config.training.steps = 150
    config.training.batch_size = 16
    config.training.steps_per_jit_call = 25
    config.logging.eval_every = 150
    config.logging.eval_batches = 20
    config.logging.checkpoint_every = 150
    return config


def sweep() -> Iterable[Overrides]:
    """Every width with every variant, learning rate and seed."""
    widths = [{"model.d_model": width, "model.attention.n_heads": width // 16} for width in (32, 64, 128)]
    variants = chain(
        [{"model.attention.qk_norm": "none", "training.z_loss": 0.0}],
        [{"model.attention.qk_norm": "head", "training.z_loss": 0.0}],
        [{"model.attention.qk_norm": "none", "training.z_loss": 1e-4}],
    )
    return product(widths, variants, values("optimizer.learning_rate", *RATES), seeds(2))
