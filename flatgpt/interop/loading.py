"""Load a trained model: a run, a checkpoint, a Hugging Face folder, a model on the hub, or nanoGPT's ckpt.pt."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tiktoken
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from config import ModelConfig, UserError, first_line
from flatgpt.data import tokenizer
from flatgpt.interop import pretrained
from flatgpt.interop.hub import INDEX, WEIGHTS, indexed_files
from flatgpt.interop.pretrained import is_flatgpt, is_nanogpt
from flatgpt.runs import checkpoint
from flatgpt.runs.history import STATE
from flatgpt.runtime.device import note
from flatgpt.runtime.files import wrong_kind
from model import GPT

# transformers' GPT-2 stores these as Conv1D, (in, out); nn.Linear has (out, in). Shapes do not tell them apart: that of
# attention's c_proj is square.
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
MASK_BUFFERS = (".attn.bias", ".attn.masked_bias")  # buffers saved by older versions of transformers and nanoGPT
EMBEDDING, HEAD, POSITIONS = "transformer.wte.weight", "lm_head.weight", "transformer.wpe.weight"
# Keys of state.json that are used without further checks. None: not written by earlier versions, or not set.
FACTS = {"tokenizer.ranks_sha256": str, "data.end_of_text": bool, "data.folder": str | None, "data.tokens": dict | None}
FACTS |= {"command": list | None, "config.init_from": str | None, "config.out_dir": str | None}
# of torch.compile, DistributedDataParallel, a module that contains the model, and GPT2LMHeadModel itself
PREFIXES = ("_orig_mod.", "module.", "model.", "transformer.")


@dataclass(frozen=True)
class ModelSource:
    """Location, config and metadata of a model's weights.

    Attributes:
        path: a checkpoint's folder, a Hugging Face folder, or nanoGPT's file.
        config: the model's config.
        encoding: the tokenizer that the model was trained with.
        state: state.json of a flatGPT checkpoint; {} for other formats.
    """

    path: Path
    config: ModelConfig
    encoding: tiktoken.Encoding
    state: dict

    @property
    def end_of_text(self) -> bool:
        """Whether the training data has end-of-text tokens between documents; true if unknown."""
        return self.state["data"]["end_of_text"] if self.state else True

    def parameters(self) -> int:
        """Return the number of parameters."""
        return GPT.on_meta_device(self.config).num_params()

    def describe(self) -> str:
        """Return the path and, if known, the iteration."""
        return f"{self.path}, iter {self.state['iter']:,}" if self.state else str(self.path)


def find(model_path: str | None, log: Callable[[str], None] = note) -> ModelSource:
    """Find the model at `model_path`; None means the newest run. The files of a flatGPT checkpoint are verified.

    Raises:
        UserError: no undamaged model exists at this path, or its tokenizer is unknown.
    """
    if model_path is None or pretrained.is_run(model_path):
        path, state = checkpoint.find(model_path and str(pretrained.folder_of(model_path)), log)
        for key, kind in FACTS.items():
            value = state
            for part in key.split("."):
                value = value.get(part) if isinstance(value, dict) else None
            if not isinstance(value, kind):
                raise UserError(f"{path / STATE} is damaged: {key} = {value!r:.60} has another type; copy it again")
    else:
        path, state = pretrained.find(model_path, "model_path"), {}
    encoding = pretrained.read_tokenizer(str(path) if state else model_path)
    if encoding is None:
        raise UserError(
            f"model_path = {model_path}: the tokenizer of this model is unknown: copy its tokenizer.json, or its "
            f"vocab.json and merges.txt, into {path}"
        )
    return ModelSource(path, pretrained.read_config(str(path)), encoding, state)


def load(
    source: ModelSource,
    device: torch.device | str,
    context_length: int | None = None,
    model_class: type[GPT] = GPT,
) -> tuple[GPT, tiktoken.Encoding]:
    """Load a model in evaluation mode, and its tokenizer.

    Args:
        context_length: context length of the model, in tokens; None: that of its training.
        model_class: GPT or a subclass.

    Raises:
        UserError: the tokenizer's vocabulary has changed, the weights do not fit, or context_length is too large.
    """
    encoding, config = source.encoding, source.config
    if source.state and tokenizer.ranks_hash(encoding) != source.state["tokenizer"]["ranks_sha256"]:
        raise UserError(
            f"{source.path}: tokenizer {encoding.name} does not have the vocabulary that the model was trained with"
        )
    if encoding.n_vocab > config.vocab_size:
        raise UserError(
            f"{source.path}: the model has {config.vocab_size:,} ids, tokenizer {encoding.name} {encoding.n_vocab:,}: "
            "the weights or the tokenizer's files are of another model"
        )
    config = dataclasses.replace(config, context_length=context_length or config.context_length)
    model = model_class.on_meta_device(config)
    _load_weights(model, source.path, source.config, assign=True)
    model.name = str(source.path)
    return model.to(device).eval(), encoding


def load_pretrained(model: GPT, path: str) -> None:
    """Copy pretrained weights into a model of the same shape; the model's context_length may be smaller.

    n_head and activation are compared too: the weights would load with other values, but give wrong results.

    Args:
        path: value of init_from.

    Raises:
        UserError: the path has no weights, they are damaged, or the shapes differ; the message lists the fields.
    """
    location, config = pretrained.find(path), pretrained.read_config(path)
    expected, actual = (
        pretrained.shape(c) | {"attn_bias": c.bias if c.attn_bias is None else c.attn_bias}
        for c in (model.config, config)
    )
    if keys := [key for key in expected if key != "context_length" and expected[key] != actual[key]]:
        differing = ", ".join(f"{key} = {expected[key]} (weights: {actual[key]})" for key in keys)
        raise UserError(
            f"init_from = {path}: the shape of these weights differs from the settings: {differing}; "
            "leave out these keys, on the command line and in the recipe"
        )
    try:
        if is_flatgpt(location):
            checkpoint.verify(location, (WEIGHTS,))
    except checkpoint.DamagedCheckpointError as error:
        raise UserError(f"init_from = {path}: {error}") from None
    _load_weights(model, location, config, assign=False)


# ---------------------------------------------------------------------------------------------------------------------
# weights


def _load_weights(model: GPT, path: Path, trained: ModelConfig, assign: bool) -> None:
    length = model.config.context_length
    if length > trained.context_length and trained.position == "learned":
        raise UserError(
            f"context_length = {length:,}: {path} was trained with {trained.context_length:,}, which is the maximum"
        )
    try:
        model.load_state_dict(read_weights(path, model.config), assign=assign)
    except (RuntimeError, IndexError) as error:  # lists missing and unknown tensors and wrong shapes
        found = str(error).partition(":\n")[2] or str(error)
        for word in ("Missing", "Unexpected"):
            found = found.replace(f"{word} key(s) in state_dict:", word.lower())
        found = textwrap.shorten(found, 300, placeholder=" ...").rstrip(".")
        raise UserError(
            f"{path} does not fit its config: {found}; its weights, its config or model.py are of another model"
        ) from None


def read_weights(path: Path, config: ModelConfig) -> dict[str, Tensor]:
    """Return the weights as GPT(config)'s state dict. A longer position table is cropped.

    Args:
        path: result of pretrained.find.

    Raises:
        UserError: a damaged or missing file.
    """
    if is_flatgpt(path):
        weights = _load_file(path / WEIGHTS)
    elif is_nanogpt(path):
        weights = _convert(pretrained.read_nanogpt(path)["model"], config, path)
    else:
        files = [WEIGHTS] if (path / WEIGHTS).is_file() else indexed_files(path / INDEX, "copy it again")
        tensors = {name: tensor for file in files for name, tensor in _load_file(path / file).items()}
        weights = _convert(tensors, config, path)
    if POSITIONS in weights:
        weights[POSITIONS] = weights[POSITIONS][: config.context_length]
    return weights


def _load_file(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        reason = f"{'damaged' if file.is_file() else 'missing'} ({first_line(error)})"
        raise UserError(f"{file} is {wrong_kind(file) or reason}: copy it again") from None


def _convert(tensors: dict[str, Tensor], config: ModelConfig, path: Path) -> dict[str, Tensor]:
    """Return weights of Hugging Face or nanoGPT as GPT(config)'s state dict, in float32.

    Linear weights become (out, in), and vocabulary rows are padded with zeros to a multiple of 64. load_state_dict
    reports missing and unknown tensors and wrong shapes.

    Raises:
        UserError: the config ties the head to the embedding, but the stored head differs from it.
    """
    weights = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            text = f"{path}: {name!r:.80} is {tensor.dtype}: quantized weights are not supported, choose others"
            raise UserError(text)
        while name.startswith(PREFIXES):
            name = name.partition(".")[2]
        # names of GPT2Model, which OpenAI's models on the hub use, lack `transformer.`
        name = name if name.startswith("lm_head.") else f"transformer.{name}"
        if name.endswith(MASK_BUFFERS):
            continue
        if name.endswith(CONV1D) and not is_nanogpt(path):
            tensor = tensor.t()
        elif name in (EMBEDDING, HEAD):
            tensor = F.pad(tensor, (0, 0, 0, -config.vocab_size % 64))
        # copy: a memory-mapped file may be rewritten while the model is in use
        weights[name] = tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    head = weights.pop(HEAD, None) if config.tie_weights else None
    # safetensors' save_model stores one of two tied tensors, under the name that is first in the alphabet
    if head is not None and not torch.equal(head, weights.setdefault(EMBEDDING, head)):
        raise UserError(  # transformers 5.23 unties them in this case, whatever config.json says
            f"{path}: {HEAD} differs from {EMBEDDING}, but its config ties them; in a Hugging Face folder, set "
            "tie_word_embeddings = false in config.json"
        )
    return weights
