"""Compiled forward passes that tests of models and mixers share."""

from typing import Any

import jax
import numpy as np

from rustgpt_jax.config.schema import ModelConfig
from rustgpt_jax.model import transformer

forward = jax.jit(transformer.apply, static_argnames="model")


def logits_of(
    params: Any, tokens_BT: np.ndarray, model: ModelConfig, positions_BT: Any = None, segments_BT: Any = None
) -> np.ndarray:
    """Logits without a cache, computed by one program for every choice of positions and segments."""
    if positions_BT is None:
        positions_BT = np.broadcast_to(np.arange(tokens_BT.shape[1], dtype=np.int32), tokens_BT.shape)
    if segments_BT is None:
        segments_BT = np.ones_like(tokens_BT)
    return np.asarray(forward(params, tokens_BT, model, positions_BT=positions_BT, segments_BT=segments_BT)[0])


class CachedReader:
    """Reads parts of rows with a cache and compares their logits with those without a cache."""

    def __init__(self, params: Any, tokens_BT: np.ndarray, model: ModelConfig, **tolerance: float) -> None:
        self.params, self.tokens_BT, self.model, self.tolerance = params, tokens_BT, model, tolerance
        self.expected_BTV = logits_of(params, tokens_BT, model)

    def read(self, cache: Any, starts_B: np.ndarray, ends_B: np.ndarray, length: int, filler: int = 7) -> Any:
        """Return the cache after the tokens from `starts_B` to `ends_B`; shorter rows are padded with `filler`."""
        positions_BT = starts_B[:, None] + np.arange(length, dtype=np.int32)
        is_read_BT = positions_BT < ends_B[:, None]
        index_BT = np.minimum(positions_BT, self.tokens_BT.shape[1] - 1)
        logits_BTV, cache = forward(
            self.params,
            np.where(is_read_BT, np.take_along_axis(self.tokens_BT, index_BT, axis=1), filler),
            self.model,
            cache,
            positions_BT=positions_BT,
            segments_BT=is_read_BT.astype(np.int32),
        )
        expected = np.take_along_axis(self.expected_BTV, index_BT[..., None], axis=1)
        tolerance: dict[str, Any] = self.tolerance or {"rtol": 1e-5, "atol": 1e-5 * expected.std()}
        np.testing.assert_allclose(np.asarray(logits_BTV)[is_read_BT], expected[is_read_BT], **tolerance)
        return cache
