"""Weights of others, in the names and the layout of model.py: Hugging Face's GPT-2.

transformers' GPT-2 keeps its matrices in Conv1D, which lies (in, out), where nn.Linear lies (out, in). That is told by
the folder's config.json (model_type gpt2), never by a shape: a square matrix would not say.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from config import ModelConfig, UserError
from model import GPT

CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
MASKS = (".attn.bias", ".attn.masked_bias")  # buffers that older versions of transformers stored
EMBEDDING, HEAD, POSITIONS = "transformer.wte.weight", "lm_head.weight", "transformer.wpe.weight"


def hugging_face_weights(folder: Path, config: ModelConfig) -> dict[str, Tensor]:
    """The weights of a Hugging Face GPT-2 folder as GPT(config)'s state dict, float32.

    Args:
        folder: model.safetensors, or model.safetensors.index.json and the files it names.
        config: the shape of the folder's model (pretrained.pretrained_shape); context_length may be smaller.

    Returns:
        GPT's names; Linear weights (out, in); vocabulary rows padded with zeros to a multiple of 64.

    Raises:
        UserError: a damaged or missing file; the first tensor that is missing, not the model's or of another size.
    """
    listing, files = _files(folder)
    expected = {name: tuple(p.shape) for name, p in GPT.without_values(config).state_dict().items()}
    weights, head = {}, None
    for file in files:
        for name, tensor in _read(file).items():
            # GPT2Model's names, and those of OpenAI's models on the hub, have no `transformer.`
            ours = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
            if ours.endswith(MASKS):
                continue
            if ours == HEAD and config.tie_weights:
                head = tensor
                continue
            if ours not in expected:
                raise UserError(f"{file}: {name} has no place in a GPT-2 of this shape; is it another kind of model?")
            size = expected[ours]
            if ours.endswith(CONV1D):
                size = size[::-1]
            elif ours in (EMBEDDING, HEAD):
                size = (config.vocab_size, size[1])
            elif ours == POSITIONS:
                size = (*tensor.shape[:1], size[1])
            if tuple(tensor.shape) != size or not tensor.is_floating_point():
                raise UserError(f"{file}: {name} is {_text(tensor.shape, tensor.dtype)}, {_text(size)} is expected")
            if ours.endswith(CONV1D):
                tensor = tensor.T
            elif ours in (EMBEDDING, HEAD):
                tensor = F.pad(tensor, (0, 0, 0, expected[ours][0] - config.vocab_size))  # rows, at the end
            weights[ours] = tensor.float().contiguous()
    if missing := [name for name in expected if name not in weights]:
        raise UserError(f"{listing}: {missing[0]} is missing; is it another kind of model, or half a copy?")
    # transformers (5.23) unties such a pair, whatever config.json says
    if head is not None and not torch.equal(head.float(), weights[EMBEDDING][: config.vocab_size]):
        raise UserError(
            f"{listing}: {HEAD} is not {EMBEDDING}, though config.json ties them: set tie_word_embeddings = false there"
        )
    return crop_positions(weights, config.context_length)


def crop_positions(weights: dict[str, Tensor], context_length: int) -> dict[str, Tensor]:
    """A state dict with the first context_length rows of its position table; without a table (RoPE) as it is.

    Raises:
        UserError: the table has fewer rows.
    """
    if POSITIONS not in weights:
        return weights
    rows = len(weights[POSITIONS])
    if rows < context_length:
        raise UserError(
            f"context_length = {context_length:,}: the model to begin with has {rows:,} learned positions; "
            "take at most that"
        )
    return weights | {POSITIONS: weights[POSITIONS][:context_length]}


def _files(folder: Path) -> tuple[Path, list[Path]]:
    """(the file that stands for all in messages, the files that hold the tensors)."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return whole, [whole]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if not names or any(Path(name).name != name for name in names):
            raise ValueError("weight_map has to name files of this folder")
    except (ValueError, KeyError, TypeError, AttributeError) as why:
        raise UserError(f"{index} is damaged: {why}; copy it again") from None
    for name in names:
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing, which {index.name} names: copy it too")
    return index, [folder / name for name in names]


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except SafetensorError as why:
        raise UserError(f"{file} is damaged: {why}; copy it again (after a git clone: git lfs pull)") from None


def _text(size: tuple[int, ...], dtype: torch.dtype | None = None) -> str:
    kind = "" if dtype is None or dtype.is_floating_point else f" of {str(dtype).removeprefix('torch.')}"
    return " x ".join(map(str, size)) + kind
