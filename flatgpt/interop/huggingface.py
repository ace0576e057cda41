"""Weights of others in the names and the layout of model.py, and ours in theirs: Hugging Face's GPT-2, nanoGPT's file.

transformers' GPT-2 keeps its matrices in Conv1D, which lies (in, out), where nn.Linear lies (out, in). That is told by
the folder's config.json (model_type gpt2), never by a shape: a square matrix would not say. nanoGPT has nn.Linear.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from config import ModelConfig, SamplingConfig, UserError
from model import GPT

CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
MASKS = (".attn.bias", ".attn.masked_bias")  # buffers that older versions of transformers and of nanoGPT stored
EMBEDDING, HEAD, POSITIONS = "transformer.wte.weight", "lm_head.weight", "transformer.wpe.weight"
# ours -> transformers' (activations.py, ACT2FN)
ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu"}
# nanoGPT's model_args (its train.py) -> our counts
NANOGPT = {
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "block_size": "context_length",
    "vocab_size": "vocab_size",
}
WRAPPER_PREFIXES = ("_orig_mod.", "module.")  # what torch.compile and DistributedDataParallel put before each name
ZIP = b"PK\x03\x04"

# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face's GPT-2


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
    tensors = ((file, name, tensor) for file in files for name, tensor in _read(file).items())
    # transformers (5.23) unties such a pair, whatever config.json says
    untied = "though config.json ties them: set tie_word_embeddings = false there"
    return convert_state_dict(listing, tensors, config, conv1d=True, untied=untied)


def export_problems(config: ModelConfig) -> list[str]:
    """Why Hugging Face's GPT-2 cannot compute a model, a sentence each; empty when it can."""
    found = []
    if config.position != "learned":
        found.append(f"position = {config.position}: Hugging Face's GPT-2 has learned positions only")
    if config.head_bias:
        found.append("head_bias = true: Hugging Face's GPT-2 has no bias on its output head")
    return found


def to_hugging_face(weights: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """GPT(config)'s state dict in GPT2LMHeadModel's names and layout; the reverse of hugging_face_weights.

    Returns:
        contiguous tensors, in the precision they had: matrices of Conv1D (in, out); (vocab_size, n_embd) tables without
        the padding; zeros for biases that the model has not, as GPT-2 always has them; a tied head only as the table.
    """
    whole = GPT.on_meta_device(dataclasses.replace(config, bias=True, attn_bias=None)).state_dict()
    answer = {}
    for name, like in whole.items():
        tensor = weights[name] if name in weights else torch.zeros(like.shape, dtype=weights[EMBEDDING].dtype)
        if name in (EMBEDDING, HEAD):
            tensor = tensor[: config.vocab_size]
        answer[name] = (tensor.T if name.endswith(CONV1D) else tensor).contiguous()
    return answer


def hugging_face_config(config: ModelConfig, eot_id: int, dtype: str) -> dict:
    """config.json for transformers 4 and 5, vLLM and llama.cpp's converter (which reads n_ctx, not n_positions).

    Args:
        eot_id: the tokenizer's end-of-text.
        dtype: of the weights in the folder: float32, bfloat16 or float16.
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
        "activation_function": ACTIVATIONS[config.activation],
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
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
    """generation_config.json: sampling as infer.py does it when it is told nothing.

    Args:
        n_vocab: the tokenizer's ids; those beyond it, which a larger vocab_size brings, are never to be drawn.
    """
    answer = {"bos_token_id": eot_id, "eos_token_id": eot_id, "pad_token_id": eot_id}
    # top_k: without it transformers draws from the likeliest 50
    answer |= {
        "do_sample": True,
        "temperature": SamplingConfig().effective_temperature,
        "top_k": SamplingConfig().top_k,
    }
    if config.vocab_size > n_vocab:
        answer["suppress_tokens"] = list(range(n_vocab, config.vocab_size))
    return answer


# ---------------------------------------------------------------------------------------------------------------------
# nanoGPT's ckpt.pt


def nanogpt_shape(file: Path) -> dict[str, object]:
    """The fields of ModelConfig in pretrained.SHAPE, as model_args of nanoGPT's file has them.

    Raises:
        UserError: no file of nanoGPT's, a damaged one, or one that holds more than tensors and plain types.
    """
    given = _nanogpt(file)["model_args"]
    counts = {}
    for theirs, ours in NANOGPT.items():
        limits, value = ModelConfig.__dataclass_fields__[ours].metadata, given.get(theirs)
        low, high = limits["low"], limits.get("high", sys.maxsize)
        if type(value) is not int or not low <= value <= high:
            raise UserError(f"{file}: {theirs} = {value}: a whole number from {low} to {high:,} is expected")
        counts[ours] = value
    bias = given.get("bias", True)  # its first versions had no such switch
    if type(bias) is not bool:
        raise UserError(f"{file}: bias = {bias}: true or false is expected")
    shape = {"bias": bias, "attn_bias": None, "head_bias": False, "tie_weights": True, "mlp_ratio": 4.0}
    shape |= {"activation": "gelu", "position": "learned"}  # torch's nn.GELU(), which is the exact one
    if problems := ModelConfig(**counts, **shape).problems():
        raise UserError(f"{file}: {problems[0]}")
    return counts | shape


def nanogpt_weights(file: Path, config: ModelConfig) -> dict[str, Tensor]:
    """The weights of nanoGPT's file as GPT(config)'s state dict, float32; vocabulary rows padded with zeros.

    Args:
        config: the shape that nanogpt_shape gave; context_length may be smaller.

    Raises:
        UserError: what nanogpt_shape says; the first tensor that is missing, not the model's or of another size.
    """
    tensors = ((file, name, tensor) for name, tensor in _nanogpt(file)["model"].items())
    return convert_state_dict(
        file, tensors, config, conv1d=False, untied="which nanoGPT ties: is it of a changed nanoGPT?"
    )


def _nanogpt(file: Path) -> dict:
    """What torch.load gives, with nothing but tensors and plain types in it; the optimizer's state is not read."""
    no_file = f"{file} is damaged or no checkpoint of nanoGPT's"
    with open(file, "rb") as opened:
        if opened.read(len(ZIP)) != ZIP:  # a bare pickle, as torch wrote before 1.6, is not even begun
            raise UserError(f"{no_file}: a zip file, as torch.save writes it, is expected")
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:  # its own text explains how to run what is in there
        raise UserError(
            f"{file} is refused: it holds more than tensors and plain types, and reading that could run anybody's "
            "code; or it is damaged"
        ) from None
    except Exception as why:  # a damaged pickle raises whatever its first wrong instruction leads to
        raise UserError(f"{no_file}: {type(why).__name__}: {(str(why).splitlines() or [''])[0]}") from None
    match saved:
        case {"model": dict() as model, "model_args": dict()} if all(
            isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in model.items()
        ):
            return saved
    raise UserError(f"{file} is no checkpoint of nanoGPT's: model (tensors by name) and model_args are expected in it")


# ---------------------------------------------------------------------------------------------------------------------
# both


def convert_state_dict(
    listing: Path, tensors: Iterable[tuple[Path, str, Tensor]], config: ModelConfig, conv1d: bool, untied: str
) -> dict[str, Tensor]:
    """GPT(config)'s state dict, float32, of tensors in GPT-2's names, each with the file that it comes from.

    Args:
        listing: the file that stands for all in messages.
        conv1d: matrices lie (in, out).
        untied: what to say of a stored head that is not the embedding, though the model is tied.
    """
    expected = {name: tuple(p.shape) for name, p in GPT.on_meta_device(config).state_dict().items()}
    weights, head = {}, None
    for file, name, tensor in tensors:
        ours = name
        while ours.startswith(WRAPPER_PREFIXES):
            ours = ours.partition(".")[2]
        # GPT2Model's names, and those of OpenAI's models on the hub, have no `transformer.`
        ours = ours if ours.startswith(("transformer.", "lm_head.")) else f"transformer.{ours}"
        if ours.endswith(MASKS):
            continue
        if ours == HEAD and config.tie_weights:
            head = tensor
            continue
        if ours not in expected:
            raise UserError(f"{file}: {name} has no place in a GPT-2 of this shape; is it another kind of model?")
        size, turned = expected[ours], conv1d and ours.endswith(CONV1D)
        if turned:
            size = size[::-1]
        elif ours in (EMBEDDING, HEAD):
            size = (config.vocab_size, size[1])
        elif ours == POSITIONS:
            size = (*tensor.shape[:1], size[1])
        if tuple(tensor.shape) != size or not tensor.is_floating_point():
            raise UserError(f"{file}: {name} is {_text(tensor.shape, tensor.dtype)}, {_text(size)} is expected")
        if turned:
            tensor = tensor.T
        elif ours in (EMBEDDING, HEAD):
            tensor = F.pad(tensor, (0, 0, 0, expected[ours][0] - config.vocab_size))  # rows, at the end
        # copied: a file that is mapped into memory may be written anew while the model lives
        weights[ours] = tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if missing := [name for name in expected if name not in weights]:
        raise UserError(f"{listing}: {missing[0]} is missing; is it another kind of model, or half a copy?")
    if head is not None and not torch.equal(head.float(), weights[EMBEDDING][: config.vocab_size]):
        raise UserError(f"{listing}: {HEAD} is not {EMBEDDING}, {untied}")
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
