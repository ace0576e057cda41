"""Weights that training may begin with: where they lie, their model's shape, and the tokenizer they know.

Two kinds of folder: flatGPT's checkpoint (state.json, model.safetensors) and Hugging Face's GPT-2 (config.json,
model.safetensors or its index of several), on the hub too; and nanoGPT's file, ckpt.pt. The command line asks before
torch is loaded: the hub's library and torch are imported where a hub's name or nanoGPT's file is given.
Every function takes what init_from says and raises UserError where nothing usable is there.
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
from flatgpt.interop.hub import hub_name

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
FLATGPT, HUGGING_FACE, NANOGPT = "state.json", "config.json", "ckpt.pt"
EXPECTED = (
    "a run's folder (out/NAME), a checkpoint (state.json and model.safetensors), a Hugging Face folder of GPT-2's "
    "kind (config.json and model.safetensors), a name on the hub (gpt2, user/model) or nanoGPT's ckpt.pt is expected"
)
# The rest of ModelConfig (dropout, attention, activation_checkpointing) is how it is trained, not what it is.
COUNTS = ("n_layer", "n_head", "n_embd", "context_length", "vocab_size")
SHAPE = (*COUNTS, "bias", "attn_bias", "head_bias", "tie_weights", "mlp_ratio", "activation", "position")
# transformers' names (activations.py, ACT2FN) of what model.py has
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
# transformers' switches that change the result, and their only value that model.py computes, which is their default.
# reorder_and_upcast_attn is none of them: it only chooses the precision of one product.
FIXED = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "layer_norm_epsilon": 1e-5,
}


def is_ours(path: str) -> bool:
    """Whether a name means a run of ours or one of its checkpoints, or nothing at all."""
    place = Path(path)
    if not place.exists():
        return hub_name(path) is None
    folder = place.parent if place.name == WEIGHTS else place
    return (folder / "ckpt").is_dir() or (folder / FLATGPT).exists()


def find_pretrained(path: str, key: str = "init_from") -> Path:
    """The folder that holds the weights: of a run's folder ckpt/best, else ckpt/last; of a model.safetensors its own.

    A name on the hub is fetched first. Of nanoGPT's it is the file.

    Args:
        key: what gave the path, for messages.

    Raises:
        UserError: nothing there, half of it is missing, or it is a pickle.
    """
    given = Path(path)
    if repo := hub_name(path):
        given = _fetched(repo)
    for file in (given, given / NANOGPT):
        if is_nanogpt(file) and not any((given / name).exists() for name in (FLATGPT, HUGGING_FACE)):
            return file
    folder = given.parent if given.is_file() and given.name in (WEIGHTS, INDEX, *PICKLES) else given
    if not folder.exists():
        raise UserError(f"{key} = {path}: no such folder; {EXPECTED}")
    if (folder / "ckpt").is_dir():
        links = [folder / "ckpt" / name for name in ("best", "last") if (folder / "ckpt" / name).exists()]
        if not links:
            raise UserError(f"{key} = {path}: this run has no checkpoint yet, neither ckpt/best nor ckpt/last")
        folder = folder / "ckpt" / links[0].resolve().name  # the links of a run in training move on
    described = [name for name in (FLATGPT, HUGGING_FACE) if (folder / name).is_file()]
    weights = [name for name in (WEIGHTS, INDEX) if (folder / name).is_file()]
    if given.name in PICKLES or (not weights and any((folder / name).is_file() for name in PICKLES)):
        raise UserError(
            f"{key} = {path}: pytorch_model.bin is a pickle, and reading one can run anybody's code; take the "
            f"model.safetensors of the same model, or, where you trust it, write one with transformers: "
            f"GPT2LMHeadModel.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        )
    if not described and not weights:
        raise UserError(f"{key} = {path}: no weights are there; {EXPECTED}")
    if not described:
        raise UserError(f"{key} = {path}: {weights[0]} alone does not say its model's shape; {EXPECTED}")
    if not weights or (FLATGPT in described and WEIGHTS not in weights):
        raise UserError(f"{key} = {path}: {described[0]} is there, {WEIGHTS} is missing; {EXPECTED}")
    return folder


@functools.cache
def _fetched(repo: str) -> Path:
    """A hub's model, once a process; under torchrun the first one says its commit."""
    from flatgpt.interop.hub import fetch_model

    first = os.environ.get("RANK", "0") == "0"
    return fetch_model(repo, lambda line: print(line, file=sys.stderr) if first else None)


def is_flatgpt(folder: Path) -> bool:
    """Whether what find_pretrained gave is a checkpoint of ours."""
    return (folder / FLATGPT).is_file()


def is_nanogpt(file: Path) -> bool:
    """Whether it is a file of nanoGPT's; else, if not of ours, it is Hugging Face's folder."""
    return file.suffix == ".pt" and file.is_file()


def pretrained_shape(path: str) -> dict[str, object]:
    """The fields of ModelConfig in SHAPE, all of them, as the model at `path` has them.

    Raises:
        UserError: what find_pretrained says, a damaged file, or a model that model.py does not compute.
    """
    folder = find_pretrained(path)
    shape = _shape(folder)
    if shape["n_embd"] % shape["n_head"]:
        raise UserError(
            f"{path}: n_embd = {shape['n_embd']} is no multiple of n_head = {shape['n_head']}: it is damaged"
        )
    return shape


def initial_shape(config: TrainConfig) -> dict[str, object]:
    """The shape that a run begins with: of init_from's model, or of the run that it resumes; without init_from, {}.

    Raises:
        UserError: see pretrained_shape; not for a run that is resumed, which needs those weights no more.
    """
    if not config.init_from:
        return {}
    if not config.resume:
        return pretrained_shape(config.init_from)
    resumed = str(run_dir(config)) if config.resume in ("latest", "auto") else config.resume
    for path in (resumed, config.init_from):  # there may be nothing to resume yet
        with contextlib.suppress(UserError):
            return pretrained_shape(path)
    return {}


def _shape(folder: Path) -> dict[str, object]:
    """Of what find_pretrained gave."""
    if is_nanogpt(folder):
        from flatgpt.interop.huggingface import nanogpt_shape

        return nanogpt_shape(folder)
    if not is_flatgpt(folder):
        return _hugging_face_shape(folder / HUGGING_FACE)
    saved = dataclasses.asdict(ModelConfig()) | _state(folder)["config"]
    return {key: _count(folder / FLATGPT, key, saved[key]) if key in COUNTS else saved[key] for key in SHAPE}


def pretrained_tokenizer(path: str) -> str | None:
    """The tokenizer whose ids the model knows, None where nothing tells.

    Raises:
        UserError: a Hugging Face folder with a vocabulary that is none of ours.
    """
    return tokenizer_there(find_pretrained(path))


def tokenizer_there(place: Path) -> str | None:
    """The same, of what find_pretrained gave. GPT-2's counts of ids, nanoGPT's 50,304 too, are taken for GPT-2's."""
    if is_flatgpt(place):
        return _state(place)["tokenizer"]["name"]
    if not is_nanogpt(place):
        from flatgpt.interop.tokenizer_files import identify_encoding

        if name := identify_encoding(place):
            return name
    return "gpt2" if pretrained_shape(str(place))["vocab_size"] in (50257, 50304) else None


def check_shape(config: ModelConfig, path: str) -> None:
    """Refuse a shape other than that of the weights at `path`, which a recipe or the command line may have set.

    context_length is left to formats.crop_positions. n_head and activation are in no weight's size: with other ones
    the weights would load, and mean nothing.

    Raises:
        UserError: names every field that differs.
    """
    asked, there = dataclasses.asdict(config), pretrained_shape(path)
    for shape in (asked, there):
        if shape["attn_bias"] is None:
            shape["attn_bias"] = shape["bias"]
    differing = [
        f"{key} = {asked[key]} (there {there[key]})"
        for key in SHAPE
        if key != "context_length" and asked[key] != there[key]
    ]
    if differing:
        raise UserError(
            f"init_from = {path} has a model of another shape than what is set: {', '.join(differing)}; "
            "leave out these keys, on the command line and in the recipe"
        )


def _read_json(file: Path) -> dict:
    try:
        answer = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as why:
        raise UserError(f"{file} is damaged: {why}; copy it again") from None
    if not isinstance(answer, dict):
        raise UserError(f"{file} is damaged: an object of keys is expected; copy it again")
    return answer


def _state(folder: Path) -> dict:
    """state.json of a flatGPT checkpoint, as far as it is needed here."""
    state = _read_json(folder / FLATGPT)
    match state:
        case {"config": dict(), "tokenizer": {"name": str()}}:
            return state
    raise UserError(f"{folder / FLATGPT} is not a flatGPT checkpoint's: it says no config or no tokenizer")


def _count(file: Path, key: str, value: object, field: str | None = None) -> int:
    """A file's value of key: whole, and within the limits of ModelConfig's `field` (without: of that same name)."""
    limits = ModelConfig.__dataclass_fields__[field or key].metadata
    low, high = limits["low"], limits.get("high", sys.maxsize)
    if type(value) is not int or not low <= value <= high:
        most = f" and at most {high:,}" if "high" in limits else ""
        raise UserError(f"{file}: {key} = {value!r}: a whole number of at least {low}{most} is expected")
    return value


def _hugging_face_shape(file: Path) -> dict[str, object]:
    """The shape that a Hugging Face config.json says."""
    theirs = _read_json(file)
    if theirs.get("model_type") != "gpt2":
        raise UserError(f"{file}: model_type = {theirs.get('model_type')}: only gpt2 is known")
    for key, value in FIXED.items():
        if theirs.get(key, value) != value:
            raise UserError(f"{file}: {key} = {theirs[key]} changes the model's result; flatGPT computes {value} only")
    activation = theirs.get("activation_function", "gelu_new")
    if activation not in ACTIVATIONS:
        raise UserError(f"{file}: activation_function = {activation}: one of {', '.join(ACTIVATIONS)} is expected")
    counts = {key: _count(file, key, theirs.get(key)) for key in COUNTS if key != "context_length"}
    positions = "n_positions" if "n_positions" in theirs else "n_ctx"
    n_embd, inner = counts["n_embd"], theirs.get("n_inner")
    return counts | {
        "context_length": _count(file, positions, theirs.get(positions), "context_length"),
        "bias": True,
        "attn_bias": None,
        "head_bias": False,
        "tie_weights": theirs.get("tie_word_embeddings", True),
        "mlp_ratio": 4.0 if inner is None else _count(file, "n_inner", inner, "n_embd") / n_embd,
        "activation": ACTIVATIONS[activation],
        "position": "learned",
    }
