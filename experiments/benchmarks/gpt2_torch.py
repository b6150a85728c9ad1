"""PyTorch implementation of the same GPT-2, and its training benchmark.

python -m experiments.benchmarks.gpt2_torch '{"what": "training", "size": "124m", "batch": 16, "device": "cuda"}'

Prints one measurement as JSON, which `accelerator.py` compares with those of `gpt2_jax.py`. The model is what a careful
user of PyTorch writes: torch.compile, a single QKV projection, scaled_dot_product_attention, autocast to bfloat16 over
float32 weights, a bfloat16 residual stream, fused AdamW. It has the same parameters and, for the same weights, the same
logits and training losses (tests/test_accelerator.py). Knobs: remat=full recomputes each block in the backward pass;
attention=cudnn selects that kernel instead of PyTorch's default. In its favor, logits stay bfloat16 up to the loss, the
learning rate is constant, and updates are not checked for finiteness.
"""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from experiments.benchmarks.best_batch import make_config, serve_task
from rustgpt_jax.config.schema import Config, ModelConfig

if TYPE_CHECKING:
    import torch

WARM_UP = 2


def gpt2(model: ModelConfig) -> "torch.nn.ModuleDict":
    """Return a GPT-2 with tied embeddings."""
    from torch import nn

    width = model.d_model

    def norm() -> nn.Module:
        return nn.LayerNorm(width, model.norm_eps)

    def block() -> nn.Module:
        return nn.ModuleDict(
            {
                "mixer_norm": norm(),
                "query_key_value": nn.Linear(width, 3 * width),
                "output": nn.Linear(width, width),
                "feedforward_norm": norm(),
                "up": nn.Linear(width, 4 * width),
                "down": nn.Linear(4 * width, width),
            }
        )

    layers = nn.ModuleDict(
        {
            "embedding": nn.Embedding(model.vocab_size, width),
            "positions": nn.Embedding(model.context_length, width),
            "blocks": nn.ModuleList(block() for _ in range(model.n_layers)),
            "norm": norm(),
        }
    )
    for parameter in layers.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=model.init_std)
    return layers


def logits(layers: "torch.nn.ModuleDict", tokens_BT: "torch.Tensor", model: ModelConfig) -> "torch.Tensor":
    """Return logits_BTV for the next token at each position."""
    import torch
    from torch.nn import functional
    from torch.utils.checkpoint import checkpoint

    def block(x_BTD: torch.Tensor, layer: torch.nn.ModuleDict) -> torch.Tensor:
        batch, length, width = x_BTD.shape
        projected = layer["query_key_value"](layer["mixer_norm"](x_BTD))
        q_BHTC, k_BHTC, v_BHTC = projected.view(batch, length, 3, model.attention.n_heads, -1).permute(2, 0, 3, 1, 4)
        mixed_BHTC = functional.scaled_dot_product_attention(q_BHTC, k_BHTC, v_BHTC, is_causal=True)
        x_BTD = x_BTD + layer["output"](mixed_BHTC.transpose(1, 2).reshape(batch, length, width))
        hidden_BTF = functional.gelu(layer["up"](layer["feedforward_norm"](x_BTD)), approximate="tanh")
        return x_BTD + layer["down"](hidden_BTF)

    x_BTD = layers["embedding"](tokens_BT) + layers["positions"].weight[None, : tokens_BT.shape[1]]
    x_BTD = x_BTD.to(getattr(torch, model.dtype))
    for layer in layers["blocks"]:
        x_BTD = checkpoint(block, x_BTD, layer, use_reentrant=False) if model.remat == "full" else block(x_BTD, layer)
    return functional.linear(layers["norm"](x_BTD), layers["embedding"].weight)


def make_loss(layers: "torch.nn.ModuleDict", model: ModelConfig) -> Callable[..., "torch.Tensor"]:
    """Return a function that computes the mean cross-entropy of targets_BT given tokens_BT."""
    from torch.nn import functional

    def loss(tokens_BT: "torch.Tensor", targets_BT: "torch.Tensor") -> "torch.Tensor":
        logits_BTV = logits(layers, tokens_BT, model)
        return functional.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten())

    return loss


def adamw(layers: "torch.nn.ModuleDict", config: Config) -> "torch.optim.AdamW":
    """Return AdamW with the config's hyperparameters, without weight decay for biases and norms."""
    import torch

    numbers = config.optimizer
    matrices = [parameter for parameter in layers.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in layers.parameters() if parameter.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": numbers.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    betas = (numbers.b1, numbers.b2)
    return torch.optim.AdamW(groups, lr=numbers.learning_rate, betas=betas, eps=numbers.eps, fused=True)


def make_step(config: Config, layers: "torch.nn.ModuleDict", compiled: bool) -> Callable[..., "torch.Tensor"]:
    """Return a training step: a function of tokens_BT and targets_BT that updates the layers and returns the loss."""
    import torch

    optimizer, model = adamw(layers, config), config.model
    loss_function = torch.compile(make_loss(layers, model)) if compiled else make_loss(layers, model)
    kind = next(layers.parameters()).device.type

    def step(tokens_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        with torch.autocast(kind, torch.bfloat16, enabled=model.dtype == "bfloat16"):
            loss = loss_function(tokens_BT, targets_BT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(layers.parameters(), config.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def trainer(config: Config, device: str, compiled: bool) -> Callable[[], float]:
    """Return a function that trains for several steps, then waits for and returns the last loss."""
    import torch

    model, training = config.model, config.training
    torch.manual_seed(0)
    with torch.device(device):
        layers = gpt2(model)
        shape = (training.steps_per_jit_call, training.batch_size, model.context_length + 1)
        windows = torch.randint(model.vocab_size, shape)
    step = make_step(config, layers, compiled)

    def call() -> float:
        for tokens_BS in windows:
            loss = step(tokens_BS[:, :-1], tokens_BS[:, 1:])
        return loss.item()

    return call


def training(size: str, batch: int, knobs: dict[str, Any], repeats: int, device: str) -> dict[str, Any]:
    """Return the seconds per step of several calls, at a batch size and with some knobs changed."""
    import torch

    remat = {"model.remat": knobs.get("remat", "none")}
    config = make_config(size, {"training.batch_size": batch} | remat)
    is_cuda = device == "cuda"
    if knobs.get("attention") == "cudnn":
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_math_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(True)
    torch.set_float32_matmul_precision("high")
    # On a CPU, compilation would dominate the smoke test.
    call = trainer(config, device, compiled=is_cuda)
    seconds = []
    for _ in range(WARM_UP + repeats):
        began = time.perf_counter()
        last = call()
        seconds.append(time.perf_counter() - began)
    if not abs(last) < float("inf"):
        raise ArithmeticError(f"the loss is {last}")
    return {
        "seconds": [each / config.training.steps_per_jit_call for each in seconds[WARM_UP:]],
        "tokens": batch * config.model.context_length,
        "memory": torch.cuda.max_memory_allocated() if is_cuda else None,
        "first_call": seconds[0],
        "kernel": knobs.get("attention", "PyTorch's choice"),
    }


def machine(device: str) -> dict[str, Any]:
    """Return the version of PyTorch, and the reason why it cannot use a device, if any."""
    try:
        import torch
    except ImportError as error:
        return {"absent": f"it cannot be imported ({error}): python -m pip install torch"}
    found: dict[str, Any] = {"version": torch.__version__, "cuda": torch.version.cuda}
    if device == "cuda" and not torch.cuda.is_available():
        return found | {"absent": f"version {torch.__version__} finds no CUDA here"}
    if device == "cuda":
        found |= {"kind": torch.cuda.get_device_name(), "cudnn": torch.backends.cudnn.version()}
    return found


TASKS = {"machine": machine, "training": training}

if __name__ == "__main__":
    serve_task(TASKS)
