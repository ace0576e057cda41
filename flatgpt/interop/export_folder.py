"""The files of an exported model: make them, and write them to a new folder."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import tiktoken
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from config import UserError
from flatgpt.interop import loading
from flatgpt.interop.huggingface import export_problems, generation_config, hugging_face_config, to_hugging_face
from flatgpt.interop.loading import ModelSource
from flatgpt.interop.model_card import model_card
from flatgpt.interop.tokenizer_files import tokenizer_files
from flatgpt.runs.checkpoint import WEIGHTS
from model import GPT

Content = bytes | Path | dict[str, Tensor]  # of a file: its bytes, a file to copy, or tensors for safetensors


def load_finite(source: ModelSource, dtype: str, context_length: int | None) -> tuple[GPT, tiktoken.Encoding]:
    """Load a model in the precision of the export, and its tokenizer.

    Raises:
        UserError: as loading.load; also NaN or infinite weights.
    """
    model, encoding = loading.load(source, torch.device("cpu"), context_length)
    model = model.to(getattr(torch, dtype))
    if broken := [name for name, tensor in model.state_dict().items() if not torch.isfinite(tensor).all()]:
        cause, remedy = "the run diverged", "choose an earlier checkpoint"
        if dtype == "float16":
            cause, remedy = f"{cause}, or float16 has too small a range", f"{remedy}, or --dtype bfloat16"
        raise UserError(f"{source.path}: {broken[0]} has NaN or infinite values in {dtype}: {cause}; {remedy}")
    return model, encoding


def hugging_face_files(
    source: ModelSource, dtype: str, context_length: int | None, *, name: str, repo: str | None, recipe: str
) -> dict[str, Content]:
    """Return the files of a Hugging Face GPT-2 folder.

    Args:
        name, repo, recipe: as in model_card.

    Raises:
        UserError: as `load_finite`; also a model or a tokenizer that Hugging Face's GPT-2 does not support.
    """
    if problems := export_problems(source.config):
        raise UserError(f"{source.path} cannot be exported: {'; '.join(problems)}")
    model, encoding = load_finite(source, dtype, context_length)
    config = model.config
    exported = ModelSource(source.path, config, source.tokenizer, source.state)
    settings = {
        "config.json": hugging_face_config(config, encoding.eot_token, dtype),
        "generation_config.json": generation_config(config, encoding.eot_token, encoding.n_vocab),
    }
    return {
        WEIGHTS: to_hugging_face(model.state_dict(), config),
        **{file: (json.dumps(content, indent=2) + "\n").encode() for file, content in settings.items()},
        **tokenizer_files(encoding, config.context_length),
        "README.md": model_card(exported, name=name, repo=repo, dtype=dtype, recipe=recipe).encode(),
    }


def file_sizes(files: dict[str, Content]) -> dict[str, int]:
    """Return the bytes of each file; of tensors without the safetensors header, a few thousand bytes."""

    def size(content: Content) -> int:
        if isinstance(content, dict):
            return sum(tensor.nbytes for tensor in content.values())
        return content.stat().st_size if isinstance(content, Path) else len(content)

    return {name: size(content) for name, content in files.items()}


def write_folder(out: Path, files: dict[str, Content], option: str = "out") -> Path:
    """Write all files to a new folder, or nothing, and return the folder with links resolved.

    The folder gets its name once its files are flushed to the disk.

    Args:
        out: a new folder, an empty one, or a link to an empty one.
        option: the name of the option that gave it.

    Raises:
        UserError: no permission or no disk space.
    """
    folder = Path(os.path.realpath(out))
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # from a killed process
        try:
            partial.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"{option} = {out}: cannot be written: {error.strerror}") from None
        try:
            _write(partial, files)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            needed, free = sum(file_sizes(files).values()), shutil.disk_usage(partial).free
            raise UserError(
                f"{out} could not be written: {reason}; {needed / 1e6:,.1f} MB are needed, {free / 1e6:,.1f} MB are "
                "free; nothing is kept"
            ) from None
        os.rename(partial, folder)  # replaces an empty folder
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _write(folder: Path, files: dict[str, Content]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        if isinstance(content, dict):
            save_file(content, folder / name, metadata={"format": "pt"})  # transformers requires this key
        elif isinstance(content, Path):
            shutil.copyfile(content, folder / name)
        else:
            (folder / name).write_bytes(content)
    (folder / WEIGHTS).chmod((folder / "README.md").stat().st_mode)  # safetensors gives its file to the owner alone
    for name in files:
        with open(folder / name, "rb") as file:
            os.fsync(file.fileno())
