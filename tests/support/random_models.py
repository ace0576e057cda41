"""Small models with large random weights, so that a wrong result shows; and ranks played one after the other."""

import torch

from config import ModelConfig
from model import GPT


def random_model(**changes) -> GPT:
    """A GPT with normal weights; by default one block, 16 channels, 8 positions and 12 ids."""
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "context_length": 8, "vocab_size": 12, **changes}
    torch.manual_seed(0)
    model = GPT(ModelConfig(**shape))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    return model


def over_ranks(world: int, score):
    """What the last rank gets from score(share, all_reduce) after all other ranks have summed theirs."""
    sums = []
    for rank in range(world):
        answer = score((rank, world), lambda own: sums.append(own.clone()) or torch.stack(sums).sum(0))
    assert {part.dtype for part in sums} == {torch.float64}
    return answer
