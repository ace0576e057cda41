"""Small models with large random weights, so that a wrong result shows; and ranks played one after the other."""

import collections
import dataclasses
import itertools

import torch

from config import ModelConfig, SamplingConfig
from flatgpt.inference.decoder import Decoder
from flatgpt.inference.sampling import generate_batch
from flatgpt.runtime.distributed import DistributedContext
from model import GPT

T, V = 16, 50  # V is not a multiple of 64: the vocabulary is padded
SMALL = ModelConfig(n_layer=2, n_head=2, n_embd=32, context_length=T, vocab_size=V)


def random_model(seed: int = 0, std: float = 0.4, model_class: type[GPT] = GPT, **changes) -> GPT:
    """A GPT with normal weights; by default one block, 16 channels, 8 positions and 12 ids."""
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "context_length": 8, "vocab_size": 12, **changes}
    torch.manual_seed(seed)
    model = model_class(ModelConfig(**shape))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std)
    return model.eval()


def small_model(seed: int = 0, std: float = 0.2, model_class: type[GPT] = GPT, **changes) -> GPT:
    """The same in the shape SMALL."""
    return random_model(seed, std, model_class, **{**dataclasses.asdict(SMALL), **changes})


def generate(decoder: Decoder, prompt: list[int], max_new_tokens: int, options: SamplingConfig, **kwargs) -> list[int]:
    """The new ids after one prompt; arguments as of generate_batch."""
    return [token for (token,) in generate_batch(decoder, [prompt], max_new_tokens, options, **kwargs)]


def random_ids(batch_size: int = 3, length: int = T, seed: int = 1, vocab_size: int = V) -> torch.Tensor:
    """(batch_size, length) ids."""
    return torch.randint(vocab_size, (batch_size, length), generator=torch.Generator().manual_seed(seed))


def over_ranks(world: int, score):
    """What the last rank gets from score(ranks) after all other ranks have given their part of each collective."""
    parts = collections.defaultdict(list)  # by number of the call

    class PlayedRank(DistributedContext):
        def all_gather(self, value) -> list:
            given = parts[next(calls)]
            given.append(value)
            return given

        def sum(self, value: torch.Tensor) -> torch.Tensor:
            return torch.stack(self.all_gather(value)).sum(0)

    for rank in range(world):
        calls = itertools.count()
        answer = score(PlayedRank(rank, world))
    assert {len(given) for given in parts.values()} == {world}
    return answer
