"""Models with a known output, and checkpoints of them."""

from pathlib import Path

import torch

from config import ModelConfig
from flatgpt.data import tokenizer
from flatgpt.runs import checkpoint
from model import GPT


def zero_model(**changes) -> GPT:
    """Return a small model with zeros in every matrix: its blocks change nothing, and all logits are 0."""
    sizes = {"n_layer": 1, "n_head": 1, "n_embd": 8, "context_length": 8, "vocab_size": 257, "tie_weights": False}
    model = GPT(ModelConfig(**{**sizes, **changes}))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.transformer.ln_f.weight.fill_(1)
    return model.eval()


def scripted_model(script: str | list[int], **changes) -> GPT:
    """Return a model whose greedy output is a script: after n tokens of any input follows the script's token n.

    Args:
        script: text, as bytes, or token ids.
        changes: fields of ModelConfig.
    """
    ids = list(script.encode()) if isinstance(script, str) else script
    size = max(8, len(ids))
    model = zero_model(n_embd=size, context_length=size, **changes)
    with torch.no_grad():
        model.transformer.wpe.weight.copy_(torch.eye(size))
        for position, token in enumerate(ids):
            model.lm_head.weight[token, position] += 100
    return model


def save_model(model: GPT, run_dir: str | Path, iter: int = 7, end_of_text: bool = False) -> str:
    """Save a model over bytes as a run's checkpoint. Returns the checkpoint's folder, as --model_path takes it."""
    bytes_only = tokenizer.load("byte")
    state = {
        "iter": iter,
        "config": {**vars(model.config)},
        "tokenizer": {"name": "byte", "ranks_sha256": tokenizer.ranks_hash(bytes_only)},
        "data": {"end_of_text": end_of_text},
    }
    train_state = {"optimizer": {}, "scaler": {}, "row": {}}
    return str(checkpoint.save(Path(run_dir), state, model.state_dict(), train_state, 1))
