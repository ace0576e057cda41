"""Create the files of a Hugging Face GPT-2 folder or a Hugging Face Space, and write the folder.

A Space contains app.py, flatgpt/, a model and the files that describe them. It installs requirements.txt and runs the
file that README.md's metadata names (huggingface.co/docs/hub/spaces-config-reference). The folder includes the
tokenizer's files, so the Space downloads nothing.
"""

from __future__ import annotations

import dataclasses
import errno
import glob
import importlib.metadata
import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tiktoken import Encoding
from torch import Tensor

from config import ExportConfig, ModelConfig, SamplingConfig, TrainConfig, UserError, first_line
from flatgpt import REPO_ROOT
from flatgpt.data import tokenizer
from flatgpt.data.tokenizer_files import tokenizer_files
from flatgpt.interop.hub import CONFIG, LOCAL_SETTINGS, card_body, hub_name, model_card
from flatgpt.interop.loading import CONV1D, EMBEDDING, HEAD, POSITIONS, ModelSource
from flatgpt.interop.pretrained import ACTIVATIONS
from flatgpt.runs.checkpoint import STATE, TOKENIZER, WEIGHTS, state_file
from flatgpt.runtime.files import fsync
from model import GPT

Content = bytes | Path | dict[str, Tensor]  # bytes, a file to copy, or tensors for safetensors
LOG = "metrics.csv"
STALE = 86400  # seconds after which a partial folder is of a process that was killed
SPACE_FILES = ("app.py", "model.py", "config.py", "LICENSE")  # and flatgpt/
VOCABULARY_FOLDER = "tiktoken_cache"  # app.py sets TIKTOKEN_CACHE_DIR to this folder
# Keys of state.json that a Space publishes. The others are for resuming or describe the machine.
PUBLIC_STATE_KEYS = (
    *("format", "iter", "tokens", "epoch", "val_loss", "best_loss", "best_iter", "tokenizer", "parameters"),
    *("git_commit", "git_dirty", "python", "torch", "device", "cpu", "ranks"),
)
CPU_TORCH_INDEX = """\
# torch without CUDA, a tenth of the size; remove this line for a Space with a GPU
--extra-index-url https://download.pytorch.org/whl/cpu
"""
GITIGNORE = b"__pycache__/\n.gradio/\n"  # created by app.py; compiled code contains local paths
USAGE = """\
```sh
pip install -r requirements.txt
python app.py
```

Open the printed address in a browser. The weights and the tokenizer are in this folder: nothing is downloaded."""


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face's GPT-2


def hugging_face_files(
    source: ModelSource, model: GPT, encoding: Encoding, options: ExportConfig, name: str, recipe: str
) -> dict[str, Content]:
    """Return the files of a Hugging Face GPT-2 folder. The model is converted to `options.dtype`.

    Args:
        name, recipe: as in model_card.

    Raises:
        UserError: NaN or infinite weights, or a tokenizer that Hugging Face's GPT-2 does not support.
    """
    dtype = options.dtype
    model.to(getattr(torch, dtype))
    if broken := [name for name, tensor in model.state_dict().items() if not torch.isfinite(tensor).all()]:
        remedy = "choose another checkpoint" + ", or --dtype bfloat16, which has a wider range" * (dtype == "float16")
        raise UserError(f"{source.path}: {broken[0]} has NaN or infinite values in {dtype}: {remedy}")
    config, eot_id, sampling = model.config, encoding.eot_token, SamplingConfig()
    generation = {"bos_token_id": eot_id, "eos_token_id": eot_id, "pad_token_id": eot_id}
    # infer.py's defaults; the default top_k of transformers is 50
    generation |= {"do_sample": True, "temperature": sampling.effective_temperature, "top_k": sampling.top_k}
    if config.vocab_size > encoding.n_vocab:  # ids that the tokenizer does not have
        generation["suppress_tokens"] = list(range(encoding.n_vocab, config.vocab_size))
    settings = {CONFIG: hugging_face_config(config, eot_id, dtype), "generation_config.json": generation}
    exported = dataclasses.replace(source, config=config)
    return {
        WEIGHTS: to_hugging_face(model),
        **{file: (json.dumps(content, indent=2) + "\n").encode() for file, content in settings.items()},
        **tokenizer_files(encoding, config.context_length),
        "README.md": model_card(exported, options, name=name, recipe=recipe).encode(),
    }


def export_problems(config: ModelConfig) -> list[str]:
    """Return why Hugging Face's GPT-2 cannot compute the model of a config, one sentence per reason."""
    problems = []
    if config.position != "learned":
        problems.append(f"position = {config.position}: Hugging Face's GPT-2 supports learned positions only")
    if config.head_bias:
        problems.append("head_bias = true: Hugging Face's GPT-2 has no bias on its output head")
    if config.activation not in ACTIVATIONS.values():
        known = ", ".join(dict.fromkeys(ACTIVATIONS.values()))
        problems.append(f"activation = {config.activation}: an export supports {known} only")
    return problems


def to_hugging_face(model: GPT) -> dict[str, Tensor]:
    """Return the weights with GPT2LMHeadModel's names and layout; the inverse of loading.read_weights.

    Returns:
        contiguous tensors, dtype unchanged: Conv1D matrices as (in, out), (vocab_size, n_embd) tables without padding,
        zeros for absent biases. A tied head is stored only as the embedding. Tensors that an edited
        model.py adds are unchanged.
    """
    converted = {}
    for name, tensor in model.state_dict().items():
        if name in (EMBEDDING, HEAD):
            tensor = tensor[: model.config.vocab_size]
        converted[name] = (tensor.T if name.endswith(CONV1D) else tensor).contiguous()
        if name.endswith(".weight") and name not in (EMBEDDING, HEAD, POSITIONS):
            converted.setdefault(f"{name.removesuffix('weight')}bias", tensor.new_zeros(len(tensor)))
    return converted


def hugging_face_config(config: ModelConfig, eot_id: int | None, dtype: str) -> dict:
    """Return the content of config.json for transformers 4 and 5, vLLM and llama.cpp, which reads n_ctx.

    Args:
        eot_id: id of the tokenizer's end-of-text token; None, which overrides transformers' default, without one.
        dtype: precision of the exported weights: float32, bfloat16 or float16.
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
        "activation_function": next(name for name, ours in ACTIVATIONS.items() if ours == config.activation),
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout),
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "scale_attn_weights": True,
        "use_cache": True,
        "tie_word_embeddings": config.tie_weights,
        "bos_token_id": eot_id,
        "eos_token_id": eot_id,
        "torch_dtype": dtype,  # transformers 4
        "dtype": dtype,  # transformers 5
    }


# ---------------------------------------------------------------------------------------------------------------------
# a Space


def space_files(source: ModelSource, name: str, recipe: str) -> dict[str, bytes | Path]:
    """Return the files of a Space: {path: content or a file to copy}. Only a flatGPT checkpoint includes weights.

    Args:
        name: the model's name.
        recipe: the training settings as TOML; empty if unknown.

    Raises:
        UserError: gradio is not installed, or flatGPT is installed without its repository.
    """
    from huggingface_hub import SpaceCardData

    try:
        gradio = importlib.metadata.version("gradio")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            "--space requires the installed version of gradio in the Space, and gradio is not installed: "
            "pip install -r requirements-extra.txt"
        ) from None
    metadata = SpaceCardData(  # str(metadata) is YAML
        title=name,
        emoji="📝",
        colorFrom="blue",
        colorTo="green",
        sdk="gradio",
        sdk_version=gradio,
        python_version=f"{sys.version_info.major}.{sys.version_info.minor}",
        app_file="app.py",
        # at most 60 characters
        short_description=f"A language model of {source.parameters():,} parameters to try out",
        tags=["gpt2", "text-generation", "flatgpt"],
    )
    body = card_body(source, name=name, use=USAGE, recipe=recipe)
    if not (packages := REPO_ROOT / "requirements.txt").is_file():  # after `pip install .`
        raise UserError(f"--space requires flatGPT's repository, and {packages} is missing: run export.py of a clone")
    files: dict[str, bytes | Path] = {
        "README.md": f"---\n{metadata}\n---\n\n{body}".encode(),
        "requirements.txt": f"{CPU_TORCH_INDEX}{packages.read_text(encoding='utf-8')}gradio=={gradio}\n".encode(),
        ".gitignore": GITIGNORE,  # `hf upload` applies it too
    }
    if source.state:
        run = source.path.parent.parent if source.path.parent.name == "ckpt" else source.path
        files |= {WEIGHTS: source.path / WEIGHTS, STATE: state_file(public_state(source.state, name))}
        files |= {LOG: run / LOG} if (run / LOG).is_file() else {}
        files |= {TOKENIZER: source.path / TOKENIZER} if TOKENIZER in source.state["files"] else {}
    for file in (*(REPO_ROOT / script for script in SPACE_FILES), *(REPO_ROOT / "flatgpt").rglob("*.py")):
        files[file.relative_to(REPO_ROOT).as_posix()] = file
    named = not isinstance(source.encoding, tokenizer.FileTokenizer)
    vocabulary = tokenizer.vocabulary_files(source.encoding.name) if named else {}
    return files | {f"{VOCABULARY_FOLDER}/{key}": data for key, data in vocabulary.items()}


def public_state(state: dict, name: str) -> dict:
    """Return the parts of state.json that describe the weights and do not identify the user's machine.

    Args:
        name: value for `out_dir`, instead of the run's folder.
    """
    known = TrainConfig.__dataclass_fields__.keys() - set(LOCAL_SETTINGS)
    config = {key: value for key, value in state["config"].items() if key in known} | {"out_dir": name}
    if init_from := state["config"].get("init_from"):
        config["init_from"] = init_from if hub_name(init_from) else f".../{Path(init_from).name}"
    known = ("manifest_sha256", "end_of_text", "tokens", "folder")  # earlier versions did not write all
    data = {key: state["data"][key] for key in known if key in state["data"]}
    data |= {"folder": Path(data["folder"]).name} if "folder" in data else {}
    public = {key: state[key] for key in PUBLIC_STATE_KEYS if key in state}
    files = {name: state["files"][name] for name in (WEIGHTS, TOKENIZER) if name in state["files"]}
    return public | {"config": config, "data": data, "files": files}


# ---------------------------------------------------------------------------------------------------------------------
# writing


def file_sizes(files: dict[str, Content]) -> dict[str, int]:
    """Return each file's size in bytes. For tensors, the safetensors header of a few thousand bytes is not counted."""

    def size(content: Content) -> int:
        if isinstance(content, dict):
            return sum(tensor.nbytes for tensor in content.values())
        return content.stat().st_size if isinstance(content, Path) else len(content)

    return {name: size(content) for name, content in files.items()}


def write_folder(out: Path, files: dict[str, Content], verify: Callable[[Path], None] | None = None) -> Path:
    """Write all files to a new folder, or nothing. Return the folder with symlinks resolved.

    The folder is renamed to its final name after it is verified and all files are flushed to disk.

    Args:
        out: a folder that is empty or does not exist, or a symlink to an empty folder.
        verify: called with the folder before it is renamed; it may raise a UserError.

    Raises:
        UserError: no permission or no disk space.
    """
    folder = Path(os.path.realpath(out))
    prefix = f".{folder.name[:40]}."
    partial = folder.with_name(f"{prefix}{secrets.token_hex(4)}.partial")  # unique, as another export may be writing
    for left in folder.parent.glob(f"{glob.escape(prefix)}*.partial"):  # by a killed process
        if time.time() - left.stat().st_mtime > STALE:
            shutil.rmtree(left, ignore_errors=True)
    try:
        for name, content in files.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, dict):
                save_file(content, partial / name, metadata={"format": "pt"})  # transformers requires this key
            elif isinstance(content, Path):
                shutil.copyfile(content, partial / name)
            else:
                (partial / name).write_bytes(content)
        readable = (partial / "README.md").stat().st_mode
        (partial / WEIGHTS).chmod(readable)  # safetensors makes it readable for its owner only
        if verify:
            verify(partial)
        for name in files:
            fsync(partial / name)
        os.rename(partial, folder)  # replaces an empty folder
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        if getattr(error, "errno", None) == errno.ENOSPC:
            reason += f"; {sum(file_sizes(files).values()) / 1e6:,.1f} MB are needed"
        raise UserError(f"{out} cannot be written: {reason}; no file was written, choose another --out") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder
