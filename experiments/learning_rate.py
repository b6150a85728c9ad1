"""How sensitive is the loss to the learning rate at several widths, and do QK-norm or a z-loss reduce this?

rustgpt sweep --config=learning_rate

Three widths, seven learning rates from 3e-4 to 3e-1, two seeds, three variants: 126 models of two layers, trained on
the bytes of the running Python's standard library. The learning-rate sensitivity (arXiv 2309.14322) is the mean over
the learning rates of min(loss, initial loss) minus the best loss.

FINDING (2 vCPU AMD EPYC, JAX 0.10.2, Python 3.11's library): the sensitivity falls with the width, and QK-norm lowers
it at each width; a z-loss of 1e-4 does not change it beyond noise. Means of two seeds, in nats per byte:

    width      plain    QK-norm    z-loss
    32         0.547    0.455      0.559
    64         0.383    0.276      0.384
    128        0.345    0.201      0.322

No model diverged. QK-norm helps at high rates (width 128 at 0.3: 2.33 instead of 2.84). At a given width, the best
losses of the variants differ by less than those of the seeds. The sweep takes 23 minutes on one core, or about 12 on
two idle cores.
"""

from collections.abc import Iterable

from ml_collections import ConfigDict

from rustgpt_jax import load_config
from rustgpt_jax.sweeps import Overrides, chain, product, seeds, values

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)


def get_config() -> ConfigDict:
    """Return the config of a two-layer byte-level GPT that trains in seconds."""
    config = load_config("base")
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
    """Return a trial for each width, variant, learning rate and seed."""
    widths = [{"model.d_model": width, "model.attention.n_heads": width // 16} for width in (32, 64, 128)]
    variants = chain(
        [{"model.attention.qk_norm": "none", "training.z_loss": 0.0}],
        [{"model.attention.qk_norm": "head", "training.z_loss": 0.0}],
        [{"model.attention.qk_norm": "none", "training.z_loss": 1e-4}],
    )
    return product(widths, variants, values("optimizer.learning_rate", *RATES), seeds(2))
