"""Random GPT-2s of transformers, the reference for pretrained weights, and the same weights in nanoGPT's layout."""

import torch
import transformers
from torch import Tensor

CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def random_gpt2(**changes) -> transformers.GPT2LMHeadModel:
    """Large random numbers in every parameter, biases and gains too, so that a mistake in any shows."""
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 24, "vocab_size": 301, "bos_token_id": 0}
    shape |= {"eos_token_id": 0, "attn_implementation": "eager", **changes}
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def nanogpt_checkpoint(model: transformers.GPT2LMHeadModel, prefix: str = "", bias: bool = True, **args) -> dict:
    """What nanoGPT's train.py saves of this model: Linear layers, and a head that is the embedding.

    Args:
        prefix: of torch.compile or DistributedDataParallel.
        bias: False leaves the biases out.
        args: changes of model_args.
    """
    config = model.config
    tensors: dict[str, Tensor] = {
        prefix + name: tensor.T.contiguous() if name.endswith(CONV1D) else tensor.detach().clone()
        for name, tensor in model.state_dict().items()
        if bias or not name.endswith(".bias")
    }
    shape = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd, "bias": bias, "dropout": 0.1}
    shape |= {"block_size": config.n_positions, "vocab_size": config.vocab_size}
    moments = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(4)}}, "param_groups": [{"lr": 1e-3}]}
    saved = {"model": tensors, "optimizer": moments, "model_args": {**shape, **args}, "iter_num": 2000}
    return saved | {"best_val_loss": torch.tensor(1.88), "config": {"dataset": "shakespeare_char", "compile": False}}
