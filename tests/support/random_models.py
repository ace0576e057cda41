"""Small models with random weights."""

import dataclasses

import torch

from config import ModelConfig
from model import GPT

T, V = 16, 50  # V is not a multiple of 64: the vocabulary is padded
CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=32, context_length=T, vocab_size=V)


def random_model(seed: int = 0, std: float = 0.2, model_class: type[GPT] = GPT, **changes) -> GPT:
    """A model in evaluation mode with large random numbers in every parameter, so that a mistake in any shows."""
    torch.manual_seed(seed)
    model = model_class(dataclasses.replace(CONFIG, **changes))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=std)
    return model.eval()


def random_ids(batch_size: int = 3, length: int = T, seed: int = 1, vocab_size: int = V) -> torch.Tensor:
    """(batch_size, length) ids."""
    return torch.randint(vocab_size, (batch_size, length), generator=torch.Generator().manual_seed(seed))
