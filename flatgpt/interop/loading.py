"""A trained model by the name that a user gives: run, checkpoint, Hugging Face folder, hub name, nanoGPT's file."""

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
from flatgpt.interop.huggingface import crop_positions, hugging_face_weights, nanogpt_weights
from flatgpt.interop.pretrained import (
    EXPECTED,
    check_shape,
    find_pretrained,
    is_flatgpt,
    is_nanogpt,
    is_ours,
    pretrained_shape,
    tokenizer_there,
)
from flatgpt.runs import checkpoint
from flatgpt.runs.checkpoint import WEIGHTS, DamagedCheckpointError, verify
from model import GPT


@dataclass(frozen=True)
class ModelSource:
    """A model that was found, and what is known of it.

    Args:
        path: our checkpoint's folder, a Hugging Face folder, or nanoGPT's file.
        config: its shape.
        tokenizer: name of the tokenizer that it was trained with.
        state: state.json of our checkpoint, {} of others.
    """

    path: Path
    config: ModelConfig
    tokenizer: str
    state: dict

    @property
    def end_of_text(self) -> bool:
        """Whether its data had end-of-text between documents; of others' models nobody says, and most had."""
        return self.state["data"]["end_of_text"] if self.state else True

    def describe(self) -> str:
        """Path and, where it is known, iteration."""
        return f"{self.path}, iter {self.state['iter']:,}" if self.state else str(self.path)


def find(model_path: str | None, say: Callable[[str], None]) -> ModelSource:
    """The model that --model_path means, verified as far as it can be; None: the newest run.

    Raises:
        UserError: nothing there, nothing undamaged, or a tokenizer that nobody knows.
    """
    if model_path is not None and is_ours(model_path) and not Path(model_path).exists():
        raise UserError(f"model_path {model_path}: no such folder; {EXPECTED}")
    if model_path is None or is_ours(model_path):
        folder, state = checkpoint.find(model_path, say)
        known = {f.name for f in dataclasses.fields(ModelConfig)}
        config = ModelConfig(**{k: v for k, v in state["config"].items() if k in known})
        return ModelSource(folder, config, state["tokenizer"]["name"], state)
    path = find_pretrained(model_path, "model_path")
    name = tokenizer_there(path)
    if name is None:
        raise UserError(
            f"model_path = {model_path}: nothing there says which tokenizer the model was trained with "
            "(nanoGPT keeps the characters of its character models in a pickle, meta.pkl, which is not read)"
        )
    return ModelSource(path, ModelConfig(**pretrained_shape(str(path))), name, {})


def load(
    found: ModelSource, device: torch.device, context_length: int | None = None, model_class: type[GPT] = GPT
) -> tuple[GPT, tiktoken.Encoding]:
    """The model in evaluation mode, and its tokenizer.

    Args:
        context_length: see at most so many tokens at once; None: as many as it was trained with.
        model_class: GPT or a subclass.

    Raises:
        UserError: a tokenizer that encodes differently now, weights that do not fit, or a longer context than it has.
    """
    encoding, config = tokenizer.load(found.tokenizer), found.config
    if found.state and tokenizer.ranks_hash(encoding) != found.state["tokenizer"]["ranks_sha256"]:
        raise UserError(f"{found.path}: tokenizer {encoding.name} has not the vocabulary that the model knows")
    if encoding.n_vocab > config.vocab_size:
        raise UserError(
            f"{found.path}: the model has {config.vocab_size:,} ids, tokenizer {encoding.name} {encoding.n_vocab:,}"
        )
    if context_length:
        if context_length > config.context_length:
            raise UserError(
                f"context_length = {context_length:,}: {found.path} was trained with {config.context_length:,}; "
                "take at most that"
            )
        config = dataclasses.replace(config, context_length=context_length)
    model = model_class.on_meta_device(config)
    try:
        model.load_state_dict(_weights(found.path, config), assign=True)
    except (RuntimeError, SafetensorError) as why:
        raise UserError(f"{found.path} does not fit its config: {str(why).splitlines()[-1].strip()}") from None
    return model.to(device).eval(), encoding


def load_pretrained(model: GPT, path: str) -> None:
    """Copy the weights that init_from names into a model of their shape; its context_length may be smaller.

    Raises:
        UserError: nothing usable there, damaged, or of another shape.
    """
    place = find_pretrained(path)
    check_shape(model.config, path)
    try:
        if is_flatgpt(place):
            verify(place, (WEIGHTS,))
        weights = _weights(place, model.config)
    except (DamagedCheckpointError, SafetensorError) as why:
        raise UserError(f"init_from = {path}: {why}") from None
    model.load_state_dict(weights)


def _weights(path: Path, config: ModelConfig) -> dict[str, Tensor]:
    """A state dict for GPT(config)."""
    if is_flatgpt(path):
        return crop_positions(load_file(path / WEIGHTS), config.context_length)
    return nanogpt_weights(path, config) if is_nanogpt(path) else hugging_face_weights(path, config)
