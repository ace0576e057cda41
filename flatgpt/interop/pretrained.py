"""Find pretrained weights by name, and read their model's config and tokenizer, without loading the weights.

Three formats: a checkpoint of flatGPT (state.json, model.safetensors), Hugging Face's GPT-2 (config.json,
model.safetensors or its index), also on the hub, and nanoGPT's ckpt.pt. The command line calls this before torch is
loaded: torch, tiktoken and huggingface_hub are imported only for the names that need them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import sys
from pathlib import Path

from config import ModelConfig, TrainConfig, UserError, run_dir
from flatgpt.interop.hub import CONFIG, INDEX, WEIGHTS, fetch_model, hub_name
from flatgpt.runs.history import STATE, follow

NANOGPT = "ckpt.pt"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
EXPECTED = (
    "a run's folder (out/NAME), a checkpoint (state.json and model.safetensors), a Hugging Face folder of GPT-2's "
    "kind (config.json and model.safetensors), a name on the hub (gpt2, user/model) or nanoGPT's ckpt.pt is expected"
)
COUNTS = ("n_layer", "n_head", "n_embd", "context_length", "vocab_size")
NOT_SHAPE = ("dropout", "attention", "activation_checkpointing")  # do not change what a model computes
# transformers' name (ACT2FN in activations.py) -> model.py's; export writes the first one that fits
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
# Settings of transformers that change the result -> the values that model.py computes, the default first.
SUPPORTED = {
    "model_type": ("gpt2",),
    "activation_function": tuple(ACTIVATIONS),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "layer_norm_epsilon": (1e-5,),
}

# ---------------------------------------------------------------------------------------------------------------------
# finding


def is_run(path: str) -> bool:
    """Whether a run of flatGPT or one of its checkpoints has this name."""
    folder = Path(path).parent if Path(path).name == WEIGHTS else follow(Path(path))
    return (folder / "ckpt").is_dir() or is_flatgpt(folder)


def is_flatgpt(path: Path) -> bool:
    """Whether find's answer is a checkpoint of flatGPT."""
    return (path / STATE).exists()


def is_nanogpt(path: Path) -> bool:
    """Whether find's answer is nanoGPT's file; if it is not flatGPT's either, it is Hugging Face's folder."""
    return path.suffix == ".pt" and path.is_file()


def find(path: str, key: str = "init_from") -> Path:
    """Return the folder of the weights, or nanoGPT's file. A run means its ckpt/best, else its ckpt/last.

    A model on the hub is downloaded first.

    Args:
        key: the setting that names the path, for messages.

    Raises:
        UserError: nothing exists there, a file is missing, or the weights are a pickle.
    """
    location = fetch_once(repo) if (repo := hub_name(path)) else Path(path)
    if is_nanogpt(location):
        return location
    folder = location.parent if location.is_file() else location
    checkpoints = [link for name in ("best", "last") if (link := folder / "ckpt" / name).exists()]
    if checkpoints:
        folder = folder / "ckpt" / checkpoints[0].resolve().name  # not the link, which a run in training changes
    files = {name for name in (STATE, CONFIG, WEIGHTS, INDEX, NANOGPT, *PICKLES) if (folder / name).is_file()}
    if files & {STATE, CONFIG} and files & {WEIGHTS, INDEX} and location.name not in PICKLES:
        return folder
    if NANOGPT in files and not files & {STATE, CONFIG}:
        return folder / NANOGPT
    if files & {*PICKLES}:
        raise UserError(
            f"{key} = {path}: pytorch_model.bin is a pickle, and reading one can run anybody's code; take the "
            f"model.safetensors of the same model, or, if you trust it, write one with transformers: "
            f"GPT2LMHeadModel.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        )
    problem = "no weights are there" if folder.exists() else "no such folder"
    if files:
        problem = f"only {' and '.join(sorted(files))} is there"
    raise UserError(f"{key} = {path}: {problem}; {EXPECTED}")


@functools.cache
def fetch_once(repo: str) -> Path:
    """Download a model of the hub, once a process; under torchrun the first rank prints its commit."""
    first = os.environ.get("RANK", "0") == "0"
    return fetch_model(repo, lambda line: print(line, file=sys.stderr) if first else None)


# ---------------------------------------------------------------------------------------------------------------------
# config and tokenizer


def read_config(path: str) -> ModelConfig:
    """Return the config of the model that `path` names.

    Raises:
        UserError: as find; a damaged file, or a model that model.py does not compute.
    """
    found = find(path)
    renamed, inner = {}, None  # name of a count in the file, where it is another one; width of the MLP
    if is_nanogpt(found):
        file, settings = found, read_nanogpt(found)["model_args"]
        renamed = {"context_length": "block_size"}
        # The first versions had no setting `bias`. torch's nn.GELU() is the exact one.
        other = {"bias": settings.get("bias", True), "activation": "gelu"}
    elif is_flatgpt(found):
        file, settings = found / STATE, _read_json(found / STATE).get("config", {})
        other = {f.name: settings[f.name] for f in dataclasses.fields(ModelConfig) if f.name in settings}
    else:
        file, settings = found / CONFIG, _read_json(found / CONFIG)
        for key, values in SUPPORTED.items():
            if settings.get(key, values[0]) not in values:
                supported = " or ".join(map(str, values))
                raise UserError(f"{file}: {key} = {settings[key]}: model.py computes {supported} only")
        renamed = {"context_length": "n_positions" if "n_positions" in settings else "n_ctx"}
        other = {"tie_weights": settings.get("tie_word_embeddings", True)}
        other |= {"activation": ACTIVATIONS[settings.get("activation_function", "gelu_new")]}
        inner = settings.get("n_inner")
    counts = {key: _count(file, renamed.get(key, key), settings, key) for key in COUNTS}
    if inner is not None:
        other["mlp_ratio"] = _count(file, "n_inner", settings, "n_embd") / counts["n_embd"]
    config = ModelConfig(**other | counts)
    if problems := config.problems():
        raise UserError(f"{file} is damaged: {problems[0]}")
    return config


def shape(config: ModelConfig) -> dict[str, object]:
    """Return the fields of ModelConfig that belong to the weights."""
    return {key: value for key, value in dataclasses.asdict(config.model()).items() if key not in NOT_SHAPE}


def initial_shape(config: TrainConfig) -> dict[str, object]:
    """Return the shape of init_from's model, or of the run that is resumed; {} without init_from.

    Raises:
        UserError: as read_config, but not for a run that is resumed, which no longer needs those weights.
    """
    if not config.init_from:
        return {}
    if not config.resume:
        return shape(read_config(config.init_from))
    resumed = str(run_dir(config)) if config.resume in ("latest", "auto") else config.resume
    for path in (resumed, config.init_from):  # there may be no checkpoint to resume yet
        with contextlib.suppress(UserError):
            return shape(read_config(path))
    return {}


def read_tokenizer(path: str) -> str | None:
    """Return the name of the tokenizer that a model was trained with, None if nothing says it.

    A vocabulary of GPT-2's size, nanoGPT's 50,304 too, is taken for GPT-2's.

    Raises:
        UserError: as find; a Hugging Face folder with a vocabulary that flatGPT does not have.
    """
    found, name = find(path), None
    if is_flatgpt(found):
        return _read_json(found / STATE).get("tokenizer", {}).get("name")
    if not is_nanogpt(found):
        from flatgpt.interop.tokenizer_files import identify_encoding

        name = identify_encoding(found)
    return name or ("gpt2" if read_config(path).vocab_size in (50257, 50304) else None)


# ---------------------------------------------------------------------------------------------------------------------
# files


def read_nanogpt(file: Path) -> dict:
    """Load nanoGPT's checkpoint, which may hold tensors and plain types only. What is not used is not read."""
    import torch

    try:
        saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # a damaged pickle raises whatever its first wrong instruction leads to
        raise UserError(
            f"{file} is refused: it is damaged, or no zip file of torch.save, or holds more than tensors and plain "
            "types, and reading that could run anybody's code"
        ) from None
    match saved:
        case {"model": dict(), "model_args": dict()}:
            return saved
    raise UserError(f"{file} is not a checkpoint of nanoGPT: model (tensors by name) and model_args are expected in it")


def _read_json(file: Path) -> dict:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise UserError(f"{file} is damaged: {error}; copy it again") from None


def _count(file: Path, key: str, settings: dict, field: str) -> int:
    """Return the value of `key` in a file's settings, checked against the limits of ModelConfig's field."""
    value, limits = settings.get(key), ModelConfig.__dataclass_fields__[field].metadata
    low, high = limits["low"], limits.get("high", sys.maxsize)
    if type(value) is not int or not low <= value <= high:
        most = f" and at most {high:,}" if "high" in limits else ""
        raise UserError(f"{file}: {key} = {value!r}: a whole number of at least {low}{most} is expected")
    return value
