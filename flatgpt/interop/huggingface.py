"""Hugging Face's GPT-2: weights to and from model.py's state dict, and the config files of an exported folder.

transformers' GPT-2 keeps its matrices in Conv1D, (in, out), where nn.Linear has (out, in). config.json tells that
(model_type gpt2), never a tensor's size: it could not for a square matrix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from config import ModelConfig, SamplingConfig, UserError
from flatgpt.interop.hub import INDEX, WEIGHTS, indexed_files
from flatgpt.interop.pretrained import ACTIVATIONS
from model import GPT

CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
MASKS = (".attn.bias", ".attn.masked_bias")  # buffers in files of older versions of transformers and nanoGPT
EMBEDDING, HEAD, POSITIONS = "transformer.wte.weight", "lm_head.weight", "transformer.wpe.weight"
WRAPPER_PREFIXES = ("_orig_mod.", "module.")  # of torch.compile and DistributedDataParallel

# ---------------------------------------------------------------------------------------------------------------------
# to model.py


def hugging_face_weights(folder: Path, config: ModelConfig) -> dict[str, Tensor]:
    """Return the weights of a Hugging Face GPT-2 folder as GPT(config)'s state dict; see convert_state_dict.

    Args:
        folder: with model.safetensors, or model.safetensors.index.json and the files that it names.
        config: the shape that pretrained_shape returned; context_length may be smaller.

    Raises:
        UserError: a damaged or missing file; and as convert_state_dict.
    """
    listing, files = folder / WEIGHTS, [folder / WEIGHTS]
    if not listing.is_file():
        listing = folder / INDEX
        files = [folder / name for name in indexed_files(listing, "copy it again")]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is missing, which {listing.name} names: copy it too")
    tensors = ((file, name, tensor) for file in files for name, tensor in _load(file).items())
    # transformers (5.23) unties such a pair, whatever config.json says
    tied = "though config.json ties them: set tie_word_embeddings = false there"
    return convert_state_dict(tensors, config, conv1d=True, listing=listing, tied=tied)


def _load(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except SafetensorError as error:
        raise UserError(f"{file} is damaged: {error}; copy it again (after a git clone: git lfs pull)") from None


def convert_state_dict(
    tensors: Iterable[tuple[Path, str, Tensor]], config: ModelConfig, conv1d: bool, listing: Path, tied: str
) -> dict[str, Tensor]:
    """Return GPT(config)'s state dict, float32, of tensors under GPT-2's names, each with the file that it is from.

    Linear weights become (out, in), vocabulary rows are padded with zeros to a multiple of 64, and a longer position
    table is cropped.

    Args:
        conv1d: whether matrices are stored as (in, out).
        listing: the file to name if a tensor is missing.
        tied: what to say of a stored head that differs from the embedding though the model is tied.

    Raises:
        UserError: names the first tensor that is missing, unknown or of another size.
    """
    expected = {name: tuple(p.shape) for name, p in GPT.on_meta_device(config).state_dict().items()}
    weights, head = {}, None
    for file, stored_name, tensor in tensors:
        name = stored_name
        while name.startswith(WRAPPER_PREFIXES):
            name = name.partition(".")[2]
        # GPT2Model's names, as OpenAI's models on the hub have them, lack `transformer.`
        name = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
        if name.endswith(MASKS):
            continue
        if name == HEAD and config.tie_weights:
            head = tensor
            continue
        if name not in expected:
            raise UserError(f"{file}: {stored_name} is not in a GPT-2 of this shape; is it another kind of model?")
        size, transposed = expected[name], conv1d and name.endswith(CONV1D)
        if transposed:
            size = size[::-1]
        elif name in (EMBEDDING, HEAD):
            size = (config.vocab_size, size[1])
        elif name == POSITIONS:
            size = (*tensor.shape[:1], size[1])
        if tuple(tensor.shape) != size or not tensor.is_floating_point():
            found = " x ".join(map(str, tensor.shape))
            found += "" if tensor.is_floating_point() else f" of {str(tensor.dtype).removeprefix('torch.')}"
            raise UserError(f"{file}: {stored_name} is {found}, {' x '.join(map(str, size))} is expected")
        if transposed:
            tensor = tensor.T
        elif name in (EMBEDDING, HEAD):
            tensor = F.pad(tensor, (0, 0, 0, expected[name][0] - config.vocab_size))
        # copied: a file that is mapped into memory may be rewritten while the model lives
        weights[name] = tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if missing := [name for name in expected if name not in weights]:
        raise UserError(f"{listing}: {missing[0]} is missing; is it another kind of model, or half a copy?")
    if head is not None and not torch.equal(head.float(), weights[EMBEDDING][: config.vocab_size]):
        raise UserError(f"{listing}: {HEAD} is not {EMBEDDING}, {tied}")
    return crop_positions(weights, config.context_length)


def crop_positions(weights: dict[str, Tensor], context_length: int) -> dict[str, Tensor]:
    """Return the state dict with the first context_length rows of its position table, if it has one (not with RoPE).

    Raises:
        UserError: the table has fewer rows.
    """
    if POSITIONS not in weights:
        return weights
    rows = len(weights[POSITIONS])
    if rows < context_length:
        raise UserError(
            f"context_length = {context_length:,}: the pretrained model has {rows:,} learned positions; "
            "take at most that"
        )
    return weights | {POSITIONS: weights[POSITIONS][:context_length]}


# ---------------------------------------------------------------------------------------------------------------------
# to Hugging Face


def export_problems(config: ModelConfig) -> list[str]:
    """Return why Hugging Face's GPT-2 cannot compute a model, a sentence each; empty if it can."""
    problems = []
    if config.position != "learned":
        problems.append(f"position = {config.position}: Hugging Face's GPT-2 has learned positions only")
    if config.head_bias:
        problems.append("head_bias = true: Hugging Face's GPT-2 has no bias on its output head")
    return problems


def to_hugging_face(weights: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Return GPT(config)'s state dict in GPT2LMHeadModel's names and layout; the reverse of hugging_face_weights.

    Returns:
        contiguous tensors in their precision: Conv1D's matrices (in, out), (vocab_size, n_embd) tables without padding,
        zeros for biases that the model does not have, a tied head only as the embedding.
    """
    reference = GPT.on_meta_device(dataclasses.replace(config, bias=True, attn_bias=None)).state_dict()
    converted = {}
    for name, like in reference.items():
        tensor = weights[name] if name in weights else torch.zeros(like.shape, dtype=weights[EMBEDDING].dtype)
        if name in (EMBEDDING, HEAD):
            tensor = tensor[: config.vocab_size]
        converted[name] = (tensor.T if name.endswith(CONV1D) else tensor).contiguous()
    return converted


def hugging_face_config(config: ModelConfig, eot_id: int, dtype: str) -> dict:
    """Return config.json for transformers 4 and 5, vLLM and llama.cpp's converter (which reads n_ctx).

    Args:
        eot_id: the tokenizer's end-of-text.
        dtype: of the exported weights: float32, bfloat16 or float16.
    """
    inner = round(config.mlp_ratio * config.n_embd)
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_ctx": config.context_length,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": None if inner == 4 * config.n_embd else inner,
        "activation_function": next(name for name, own in ACTIVATIONS.items() if own == config.activation),
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout),
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "scale_attn_weights": True,
        "use_cache": True,
        "tie_word_embeddings": config.tie_weights,
        "bos_token_id": eot_id,
        "eos_token_id": eot_id,
        "torch_dtype": dtype,  # transformers 4
        "dtype": dtype,  # 5
    }


def generation_config(config: ModelConfig, eot_id: int, n_vocab: int) -> dict:
    """Return generation_config.json: sampling with the defaults of infer.py.

    Args:
        n_vocab: number of the tokenizer's ids; a larger vocab_size has more, which are never sampled.
    """
    answer = {"bos_token_id": eot_id, "eos_token_id": eot_id, "pad_token_id": eot_id}
    sampling = SamplingConfig()
    # top_k: transformers' default is 50
    answer |= {"do_sample": True, "temperature": sampling.effective_temperature, "top_k": sampling.top_k}
    if config.vocab_size > n_vocab:
        answer["suppress_tokens"] = list(range(n_vocab, config.vocab_size))
    return answer
