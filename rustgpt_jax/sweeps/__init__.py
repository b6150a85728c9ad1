"""Sweeps: many runs from one config, each described by its overrides.

The functions for an experiment's `sweep()` are importable from here:

    from rustgpt_jax.sweeps import log_uniform, product, seeds, sobol, uniform, values

    rates = values("optimizer.learning_rate", 1e-4, 1e-3, 1e-2)
    product(rates, seeds(3))                                        # 9 trials: each rate with the seeds 0, 1, 2

    space = {"optimizer.learning_rate": log_uniform(1e-4, 1e-2), "optimizer.b2": uniform(0.9, 0.999)}
    product(sobol(16, space), seeds(2))                             # 32 trials, spread evenly over the space
"""

from rustgpt_jax.sweeps.search_space import *  # noqa: F403 (re-exports its __all__)
