"""nanoGPT's ckpt.pt: its model's shape, and its weights as a state dict of model.py."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor

from config import ModelConfig, UserError
from flatgpt.interop.huggingface import convert_state_dict
from flatgpt.interop.pretrained import COUNTS, check_count

KEYS = {"context_length": "block_size"}  # ModelConfig's name -> that in nanoGPT's model_args; the others are equal
ZIP = b"PK\x03\x04"


def nanogpt_shape(file: Path) -> dict[str, object]:
    """Return the fields of ModelConfig that pretrained.SHAPE names, from the file's model_args.

    Raises:
        UserError: not a file of nanoGPT, a damaged one, or one that holds more than tensors and plain types.
    """
    args = _read(file)["model_args"]
    names = {key: KEYS.get(key, key) for key in COUNTS}
    counts = {key: check_count(file, name, args.get(name), key) for key, name in names.items()}
    bias = args.get("bias", True)  # the first versions had no such setting
    if type(bias) is not bool:
        raise UserError(f"{file}: bias = {bias}: true or false is expected")
    shape = {"bias": bias, "attn_bias": None, "head_bias": False, "tie_weights": True, "mlp_ratio": 4.0}
    return counts | shape | {"activation": "gelu", "position": "learned"}  # torch's nn.GELU() is the exact one


def nanogpt_weights(file: Path, config: ModelConfig) -> dict[str, Tensor]:
    """Return the file's weights as GPT(config)'s state dict; see convert_state_dict.

    Args:
        config: the shape that nanogpt_shape returned; context_length may be smaller.

    Raises:
        UserError: as nanogpt_shape and convert_state_dict.
    """
    tensors = ((file, name, tensor) for name, tensor in _read(file)["model"].items())
    tied = "which nanoGPT ties: is it of a changed nanoGPT?"
    return convert_state_dict(tensors, config, conv1d=False, listing=file, tied=tied)


def _read(file: Path) -> dict:
    """Load the checkpoint, which may hold tensors and plain types only. The optimizer's state is not read."""
    problem = f"{file} is damaged or not a checkpoint of nanoGPT"
    with open(file, "rb") as opened:
        if opened.read(len(ZIP)) != ZIP:  # a bare pickle, as torch wrote before 1.6, is not even opened
            raise UserError(f"{problem}: a zip file, as torch.save writes it, is expected")
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:  # its text explains how to run the code in the file
        raise UserError(
            f"{file} is refused: it holds more than tensors and plain types, and reading that could run anybody's "
            "code; or it is damaged"
        ) from None
    except Exception as error:  # a damaged pickle raises whatever its first wrong instruction leads to
        raise UserError(f"{problem}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}") from None
    match saved:
        case {"model": dict() as model, "model_args": dict()} if all(
            isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in model.items()
        ):
            return saved
    raise UserError(f"{file} is not a checkpoint of nanoGPT: model (tensors by name) and model_args are expected in it")
