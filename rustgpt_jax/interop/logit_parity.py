"""The same tokens through `transformers` and through the model here: how far are the logits apart?"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from rustgpt_jax.config.schema import ModelConfig
from rustgpt_jax.model import transformer

TOKENS = 64


class Comparison(NamedTuple):
    """The largest difference between two logits, or, where there was nothing to compare with, the reason why.

    largest: the largest absolute value of a logit of the other side.
    """

    difference: float | None
    reason: str
    largest: float = 0.0


def random_tokens(model: ModelConfig, seed: int = 0) -> np.ndarray:
    """tokens_BT to compare with: one row, of 64 tokens or as many as the context holds."""
    length = min(TOKENS, model.context_length)
    rng = np.random.default_rng(seed)
    return rng.integers(0, transformer.vocabulary(model), (1, length), dtype=np.int32)


def reference_logits(folder: Path, tokens_BT: np.ndarray) -> np.ndarray | str:
    """logits_BTV of a Hugging Face folder by `transformers`, in float32 on the CPU; or why there are none.

    Nothing is downloaded, and neither pickles nor code of the folder are read.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        return f"{error.name} is not installed"
    try:
        with _quiet(transformers), torch.no_grad():
            return _logits(transformers, torch, folder, tokens_BT)
    except Exception as error:  # Whatever keeps it from loading a folder that is read here.
        return f"it cannot run this folder ({type(error).__name__}: {str(error).splitlines()[0]})"


def _logits(transformers: Any, torch: Any, folder: Path, tokens_BT: np.ndarray) -> np.ndarray:
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
    ).eval()
    return reference(torch.tensor(tokens_BT, dtype=torch.long), use_cache=False).logits.float().numpy()


def compare_logits(folder: Path, read: Callable[[], transformer.Params], model: ModelConfig) -> Comparison:
    """The largest difference over random tokens between the logits of a folder and of parameters that are the same.

    These are read last: the model is in memory once at a time.
    """
    tokens_BT = random_tokens(model)
    reference_BTV = reference_logits(folder, tokens_BT)
    if isinstance(reference_BTV, str):
        return Comparison(None, reference_BTV)
    return difference(reference_BTV, tokens_BT, read(), model)


def difference(
    reference_BTV: np.ndarray, tokens_BT: np.ndarray, params: transformer.Params, model: ModelConfig
) -> Comparison:
    """The same for logits that are there already."""
    logits_BTV = jax.jit(lambda params, tokens_BT: transformer.apply(params, tokens_BT, model)[0])(params, tokens_BT)
    found = np.max(np.abs(np.asarray(logits_BTV) - reference_BTV))
    return Comparison(float(found), "", float(np.max(np.abs(reference_BTV))))


@contextlib.contextmanager
def _quiet(transformers: Any) -> Any:
    """Without the progress bars and remarks of loading a model."""
    log = transformers.utils.logging
    before, had_bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(before)
        if had_bars:
            log.enable_progress_bar()
