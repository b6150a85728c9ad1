"""RustGPT's task: pretrain on facts, then learn to answer questions, in about a minute on two cores.

rustgpt train --config=rustgpt
rustgpt chat runs/rustgpt
"""

from ml_collections import ConfigDict

from rustgpt_jax import load_config


def get_config() -> ConfigDict:
    """A small word-level model, pretrained on facts, then instruction-tuned on dialogues."""
    config = load_config("base")
    config.tokenizer.name = "word"
    config.tokenizer.vocab_size = None
    config.data.valid_fraction = 0.05
    config.model.context_length = 64
    config.model.n_layers = 2
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 3e-3
    config.schedule.warmup_steps = 20
    config.training.batch_size = 16
    config.training.steps_per_jit_call = 20
    config.logging.log_every = 20
    config.logging.eval_every = 150
    config.logging.checkpoint_every = 150
    # The model memorizes its answers: on other dialogues, its loss is lowest before it knows any of them.
    config.logging.best_metric = "train/mean_loss"
    config.logging.sample_prompts = ("Why is the sky blue?", "What does the heart do?")
    config.sampling.temperature = 0.0
    config.sampling.max_tokens = 48
    # The dialogues of the corpus have a single question each, so a chat does not include earlier turns.
    config.sampling.history_turns = 0
    config.stages = (
        ConfigDict({"name": "pretrain", "data": {"corpus": "facts"}, "training": {"steps": 100}}),
        ConfigDict(
            {
                "name": "instruct",
                "data": {"corpus": "chat", "loss_mask": "assistant"},
                "training": {"steps": 350},
            }
        ),
    )
    return config
