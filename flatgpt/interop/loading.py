"""Load a trained model by any name: a run, a checkpoint, a Hugging Face folder, a name on the hub, nanoGPT's file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tiktoken
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from config import ModelConfig, UserError
from flatgpt.data import tokenizer
from flatgpt.interop.huggingface import crop_positions, hugging_face_weights
from flatgpt.interop.nanogpt import nanogpt_weights
from flatgpt.interop.pretrained import (
    EXPECTED,
    check_shape,
    find_pretrained,
    is_flatgpt,
    is_nanogpt,
    is_run_path,
    pretrained_shape,
    pretrained_tokenizer,
)
from flatgpt.runs import checkpoint
from flatgpt.runs.checkpoint import WEIGHTS, DamagedCheckpointError, verify
from model import GPT


@dataclass(frozen=True)
class ModelSource:
    """Where a model's weights are, and what is known of it.

    Attributes:
        path: a checkpoint's folder, a Hugging Face folder, or nanoGPT's file.
        config: the model's shape.
        tokenizer: name of the tokenizer that it was trained with.
        state: state.json of a checkpoint; {} of other projects' models.
    """

    path: Path
    config: ModelConfig
    tokenizer: str
    state: dict

    @property
    def end_of_text(self) -> bool:
        """Whether its training data had end-of-text between documents; true if that is not known."""
        return self.state["data"]["end_of_text"] if self.state else True

    def describe(self) -> str:
        """Return the path and, if it is known, the iteration."""
        return f"{self.path}, iter {self.state['iter']:,}" if self.state else str(self.path)


def find(model_path: str | None, log: Callable[[str], None]) -> ModelSource:
    """Find the model that --model_path names; a checkpoint's files are verified. None: the newest run.

    Raises:
        UserError: nothing exists there, everything there is damaged, or the tokenizer is not known.
    """
    if model_path is None or is_run_path(model_path):
        if model_path is not None and not Path(model_path).exists():
            raise UserError(f"model_path {model_path}: no such folder; {EXPECTED}")
        folder, state = checkpoint.find(model_path, log)
        known = {field.name for field in dataclasses.fields(ModelConfig)}
        config = ModelConfig(**{key: value for key, value in state["config"].items() if key in known})
        return ModelSource(folder, config, state["tokenizer"]["name"], state)
    path = find_pretrained(model_path, "model_path")
    name = pretrained_tokenizer(str(path))
    if name is None:
        raise UserError(
            f"model_path = {model_path}: nothing there says which tokenizer the model was trained with "
            "(nanoGPT keeps the characters of its character models in a pickle, meta.pkl, which is not read)"
        )
    return ModelSource(path, ModelConfig(**pretrained_shape(str(path))), name, {})


def load(
    source: ModelSource,
    device: torch.device | str,
    context_length: int | None = None,
    model_class: type[GPT] = GPT,
) -> tuple[GPT, tiktoken.Encoding]:
    """Load a model, in evaluation mode, and its tokenizer.

    Args:
        context_length: the number of tokens that the model sees at once; None: as many as it was trained with.
        model_class: GPT or a subclass.

    Raises:
        UserError: the tokenizer's vocabulary has changed, the weights do not fit, or context_length is too large.
    """
    encoding, config = tokenizer.load(source.tokenizer), source.config
    if source.state and tokenizer.ranks_hash(encoding) != source.state["tokenizer"]["ranks_sha256"]:
        raise UserError(f"{source.path}: tokenizer {encoding.name} does not have the vocabulary of the model")
    if encoding.n_vocab > config.vocab_size:
        raise UserError(
            f"{source.path}: the model has {config.vocab_size:,} ids, tokenizer {encoding.name} {encoding.n_vocab:,}"
        )
    if context_length:
        if context_length > config.context_length:
            raise UserError(
                f"context_length = {context_length:,}: {source.path} was trained with {config.context_length:,}; "
                "take at most that"
            )
        config = dataclasses.replace(config, context_length=context_length)
    model = model_class.on_meta_device(config)
    try:
        model.load_state_dict(_read_weights(source.path, config), assign=True)
    except (RuntimeError, SafetensorError) as error:
        raise UserError(f"{source.path} does not fit its config: {str(error).splitlines()[-1].strip()}") from None
    return model.to(device).eval(), encoding


def load_pretrained(model: GPT, path: str) -> None:
    """Copy the weights that init_from names into a model of their shape; its context_length may be smaller.

    Raises:
        UserError: nothing usable there, damaged, or of another shape.
    """
    found = find_pretrained(path)
    check_shape(model.config, path)
    try:
        if is_flatgpt(found):
            verify(found, (WEIGHTS,))
        model.load_state_dict(_read_weights(found, model.config))
    except (DamagedCheckpointError, SafetensorError) as error:
        raise UserError(f"init_from = {path}: {error}") from None


def _read_weights(path: Path, config: ModelConfig) -> dict[str, Tensor]:
    """Return a state dict for GPT(config)."""
    if is_flatgpt(path):
        return crop_positions(load_file(path / WEIGHTS), config.context_length)
    return nanogpt_weights(path, config) if is_nanogpt(path) else hugging_face_weights(path, config)
