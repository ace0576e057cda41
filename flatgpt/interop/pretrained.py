"""Find pretrained weights by name and read their model's shape and tokenizer, without loading the weights.

Three formats: a checkpoint of flatGPT (state.json, model.safetensors), Hugging Face's GPT-2 (config.json,
model.safetensors or its index), also on the hub, and nanoGPT's ckpt.pt. The command line calls this before torch is
loaded: torch and huggingface_hub are imported only for nanoGPT's file and for a name on the hub.
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

STATE, NANOGPT = "state.json", "ckpt.pt"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
EXPECTED = (
    "a run's folder (out/NAME), a checkpoint (state.json and model.safetensors), a Hugging Face folder of GPT-2's "
    "kind (config.json and model.safetensors), a name on the hub (gpt2, user/model) or nanoGPT's ckpt.pt is expected"
)
# The other fields of ModelConfig (dropout, attention, activation_checkpointing) do not change what a model computes.
COUNTS = ("n_layer", "n_head", "n_embd", "context_length", "vocab_size")
SHAPE = (*COUNTS, "bias", "attn_bias", "head_bias", "tie_weights", "mlp_ratio", "activation", "position")
# transformers' name (ACT2FN in activations.py) -> model.py's; export writes the first one that fits
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
# Settings of transformers that change the result, with their default, the only value that model.py computes.
REQUIRED_SETTINGS = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "layer_norm_epsilon": 1e-5,
}


def is_run_path(path: str) -> bool:
    """Whether a name means a run of flatGPT or one of its checkpoints, or nothing that exists."""
    if not Path(path).exists():
        return hub_name(path) is None
    folder = Path(path).parent if Path(path).name == WEIGHTS else Path(path)
    return (folder / "ckpt").is_dir() or is_flatgpt(folder)


def is_flatgpt(path: Path) -> bool:
    """Whether find_pretrained's answer is a checkpoint of flatGPT."""
    return (path / STATE).exists()


def is_nanogpt(path: Path) -> bool:
    """Whether find_pretrained's answer is nanoGPT's file; otherwise, if it is not flatGPT's, Hugging Face's folder."""
    return path.suffix == ".pt" and path.is_file()


def find_pretrained(path: str, key: str = "init_from") -> Path:
    """Return the folder of the weights, or nanoGPT's file. A run means its ckpt/best, else its ckpt/last.

    A model on the hub is downloaded first.

    Args:
        key: the setting that names the path, for messages.

    Raises:
        UserError: nothing exists there, a file is missing, or the weights are a pickle.
    """
    given = fetch_once(repo) if (repo := hub_name(path)) else Path(path)
    for file in (given, given / NANOGPT):
        if is_nanogpt(file) and not any((given / name).exists() for name in (STATE, CONFIG)):
            return file
    folder = given.parent if given.is_file() and given.name in (WEIGHTS, INDEX, *PICKLES) else given
    if not folder.exists():
        raise UserError(f"{key} = {path}: no such folder; {EXPECTED}")
    if (folder / "ckpt").is_dir():
        links = [folder / "ckpt" / name for name in ("best", "last") if (folder / "ckpt" / name).exists()]
        if not links:
            raise UserError(f"{key} = {path}: this run has no checkpoint yet, neither ckpt/best nor ckpt/last")
        folder = folder / "ckpt" / links[0].resolve().name  # not the link, which a run in training changes
    described = [name for name in (STATE, CONFIG) if (folder / name).is_file()]
    weights = [name for name in (WEIGHTS, INDEX) if (folder / name).is_file()]
    if given.name in PICKLES or (not weights and any((folder / name).is_file() for name in PICKLES)):
        raise UserError(
            f"{key} = {path}: pytorch_model.bin is a pickle, and reading one can run anybody's code; take the "
            f"model.safetensors of the same model, or, if you trust it, write one with transformers: "
            f"GPT2LMHeadModel.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        )
    problem = None
    if not described:
        problem = f"{weights[0]} alone does not say its model's shape" if weights else "no weights are there"
    elif not weights or (STATE in described and WEIGHTS not in weights):
        problem = f"{described[0]} is there, {WEIGHTS} is missing"
    if problem:
        raise UserError(f"{key} = {path}: {problem}; {EXPECTED}")
    return folder


@functools.cache
def fetch_once(repo: str) -> Path:
    """Download a model of the hub, once a process; under torchrun the first rank prints its commit."""
    first = os.environ.get("RANK", "0") == "0"
    return fetch_model(repo, lambda line: print(line, file=sys.stderr) if first else None)


def pretrained_shape(path: str) -> dict[str, object]:
    """Return the fields of ModelConfig that SHAPE names, as the model at `path` has them.

    Raises:
        UserError: as find_pretrained; a damaged file, or a model that model.py does not compute.
    """
    found = find_pretrained(path)
    if is_nanogpt(found):
        from flatgpt.interop.nanogpt import nanogpt_shape

        shape = nanogpt_shape(found)
    elif is_flatgpt(found):
        saved = dataclasses.asdict(ModelConfig()) | _read_state(found)["config"]
        shape = {key: check_count(found / STATE, key, saved[key]) if key in COUNTS else saved[key] for key in SHAPE}
    else:
        shape = _hugging_face_shape(found / CONFIG)
    if problems := ModelConfig(**shape).problems():
        raise UserError(f"{path} is damaged: {problems[0]}")
    return shape


def initial_shape(config: TrainConfig) -> dict[str, object]:
    """Return the shape of init_from's model, or of the run that is resumed; {} without init_from.

    Raises:
        UserError: as pretrained_shape, but not for a run that is resumed, which no longer needs those weights.
    """
    if not config.init_from:
        return {}
    if not config.resume:
        return pretrained_shape(config.init_from)
    resumed = str(run_dir(config)) if config.resume in ("latest", "auto") else config.resume
    for path in (resumed, config.init_from):  # there may be no checkpoint to resume yet
        with contextlib.suppress(UserError):
            return pretrained_shape(path)
    return {}


def check_shape(config: ModelConfig, path: str) -> None:
    """Refuse a config whose shape is not that of the weights at `path`; context_length may differ.

    n_head and activation are in no tensor's size: with other ones the weights would load, and compute nonsense.

    Raises:
        UserError: names every field that differs.
    """
    wanted, actual = dataclasses.asdict(config), pretrained_shape(path)
    for shape in (wanted, actual):
        if shape["attn_bias"] is None:
            shape["attn_bias"] = shape["bias"]
    keys = [key for key in SHAPE if key != "context_length" and wanted[key] != actual[key]]
    if keys:
        differing = ", ".join(f"{key} = {wanted[key]} (there {actual[key]})" for key in keys)
        raise UserError(
            f"init_from = {path} has a model of another shape than what is set: {differing}; "
            "leave out these keys, on the command line and in the recipe"
        )


def pretrained_tokenizer(path: str) -> str | None:
    """Return the name of the tokenizer that a model was trained with, None if nothing says it.

    A vocabulary of GPT-2's size, nanoGPT's 50,304 too, is taken for GPT-2's.

    Raises:
        UserError: as find_pretrained; a Hugging Face folder with a vocabulary that flatGPT does not have.
    """
    found = find_pretrained(path)
    if is_flatgpt(found):
        return _read_state(found)["tokenizer"]["name"]
    if not is_nanogpt(found):
        from flatgpt.interop.tokenizer_files import identify_encoding

        if name := identify_encoding(found):
            return name
    return "gpt2" if pretrained_shape(str(found))["vocab_size"] in (50257, 50304) else None


def check_count(file: Path, key: str, value: object, field: str | None = None) -> int:
    """Return a file's value of `key`, checked against the limits of ModelConfig's `field` (by default `key`)."""
    limits = ModelConfig.__dataclass_fields__[field or key].metadata
    low, high = limits["low"], limits.get("high", sys.maxsize)
    if type(value) is not int or not low <= value <= high:
        most = f" and at most {high:,}" if "high" in limits else ""
        raise UserError(f"{file}: {key} = {value!r}: a whole number of at least {low}{most} is expected")
    return value


def _read_json(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("an object of keys is expected")
    except ValueError as error:
        raise UserError(f"{file} is damaged: {error}; copy it again") from None
    return content


def _read_state(folder: Path) -> dict:
    """Return state.json of a checkpoint, which has at least a config and a tokenizer."""
    match state := _read_json(folder / STATE):
        case {"config": dict(), "tokenizer": {"name": str()}}:
            return state
    raise UserError(f"{folder / STATE} is not a flatGPT checkpoint's: it has no config or no tokenizer")


def _hugging_face_shape(file: Path) -> dict[str, object]:
    """Return the shape that a Hugging Face config.json describes."""
    settings = _read_json(file)
    if settings.get("model_type") != "gpt2":
        raise UserError(f"{file}: model_type = {settings.get('model_type')}: only gpt2 is supported")
    for key, value in REQUIRED_SETTINGS.items():
        if settings.get(key, value) != value:
            raise UserError(
                f"{file}: {key} = {settings[key]} changes the model's result; flatGPT computes {value} only"
            )
    activation = settings.get("activation_function", "gelu_new")
    if activation not in ACTIVATIONS:
        raise UserError(f"{file}: activation_function = {activation}: one of {', '.join(ACTIVATIONS)} is expected")
    counts = {key: check_count(file, key, settings.get(key)) for key in COUNTS if key != "context_length"}
    positions, inner = "n_positions" if "n_positions" in settings else "n_ctx", settings.get("n_inner")
    return counts | {
        "context_length": check_count(file, positions, settings.get(positions), "context_length"),
        "bias": True,
        "attn_bias": None,
        "head_bias": False,
        "tie_weights": settings.get("tie_word_embeddings", True),
        "mlp_ratio": 4.0 if inner is None else check_count(file, "n_inner", inner, "n_embd") / counts["n_embd"],
        "activation": ACTIVATIONS[activation],
        "position": "learned",
    }
