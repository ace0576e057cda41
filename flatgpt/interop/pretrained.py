"""Find pretrained weights and runs to resume, and read their settings and tokenizer, without loading the weights.

Three formats are supported: flatGPT checkpoints (state.json, model.safetensors), Hugging Face GPT-2 folders and hub
models (config.json, model.safetensors or its index), and nanoGPT's ckpt.pt. The command line uses this module before
torch is imported: torch, tiktoken and huggingface_hub are imported only by the formats that need them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import pickle
import shlex
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

from config import EXCLUSIVE, START_ONLY, ModelConfig, TrainConfig, UserError, checked, first_line, run_dir
from flatgpt import REPO_ROOT
from flatgpt.interop.hub import CONFIG, INDEX, WEIGHTS, fetch_model, hub_name
from flatgpt.runs.history import RECIPE, STATE, folders, follow, gpt2_parameters, read_state, read_table, run_of
from flatgpt.runtime.files import read_json, wrong_kind

if TYPE_CHECKING:
    import tiktoken

NANOGPT = "ckpt.pt"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
EXPECTED_PATHS = (
    "a run's folder (out/NAME), a checkpoint (state.json and model.safetensors), a Hugging Face GPT-2 folder "
    "(config.json and model.safetensors), a model on the hub (gpt2, user/model) or nanoGPT's ckpt.pt is expected"
)
REQUIRED = ("n_layer", "n_head", "n_embd", "context_length", "vocab_size")
# settings that do not affect the weights' shapes or meaning
NOT_SHAPE = ("dropout", "attention", "activation_checkpointing")
# name in transformers (ACT2FN in activations.py) -> name in model.py. An export writes the first matching name.
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
# transformers setting that changes the logits -> supported values, the default first
SUPPORTED_SETTINGS = {
    "model_type": ("gpt2",),
    "auto_map": (None,),  # the repository's own code
    "activation_function": tuple(ACTIVATIONS),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "layer_norm_epsilon": (1e-5,),
}

# ---------------------------------------------------------------------------------------------------------------------
# finding


def is_run(path: str) -> bool:
    """Whether the path is a flatGPT run or checkpoint."""
    folder = folder_of(path)
    return (folder / "ckpt").is_dir() or is_flatgpt(folder)


def folder_of(path: str) -> Path:
    """Return the folder of a path: itself, or that of a file such as model.safetensors."""
    location = follow(follow(Path(path).parent) / Path(path).name)
    return location.parent if location.is_file() else location


def is_flatgpt(path: Path) -> bool:
    """Whether a result of `find` is a flatGPT checkpoint."""
    return (path / STATE).exists()


def is_nanogpt(path: Path) -> bool:
    """Whether a result of `find` is a nanoGPT file. If it is not flatGPT's either, it is a Hugging Face folder."""
    return path.suffix == ".pt" and path.is_file()


def find(path: str, key: str = "init_from") -> Path:
    """Return the folder of the weights, or nanoGPT's file. Models on the hub are downloaded.

    Args:
        path: path or hub name; for a run's folder, its ckpt/best is used, else its ckpt/last.
        key: name of the setting that contains the path, for messages.

    Raises:
        UserError: the path does not exist, a file is missing, or the weights are a pickle.
    """
    location = fetch_once(repo) if (repo := hub_name(path)) else follow(Path(path))
    if is_nanogpt(location):
        return location
    folder = follow(location.parent) if location.is_file() or location.name == WEIGHTS else location
    linked = (follow(folder / "ckpt" / name) for name in ("best", "last"))
    if checkpoint := next(filter(Path.is_dir, linked), None):
        folder = folder / "ckpt" / checkpoint.resolve().name  # not the link, which may change during training
    files = {name for name in (STATE, CONFIG, WEIGHTS, INDEX, NANOGPT, *PICKLES) if (folder / name).is_file()}
    if files & {STATE, CONFIG} and files & {WEIGHTS, INDEX} and location.name not in PICKLES:
        return folder
    if NANOGPT in files and not files & {STATE, CONFIG}:
        return folder / NANOGPT
    if files & {*PICKLES}:
        raise UserError(
            f"{key} = {path}: pytorch_model.bin is a pickle, which can run arbitrary code when it is loaded; use the "
            f"model.safetensors of the same model, or, if you trust it, convert it with transformers: "
            f"GPT2LMHeadModel.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        )
    problem, remedy = "no weights in this folder" if folder.exists() else "no such folder", EXPECTED_PATHS
    if files:
        problem = f"this folder has only {' and '.join(sorted(files))}"
    elif location.is_file():
        problem = "this file has no weights"
    name = Path(path).name.removesuffix(".toml")
    if is_run(run := f"out/{name}"):
        remedy = f"did you mean {run}?"
    elif (REPO_ROOT / "configs" / f"{name}.toml").is_file():
        remedy = f"{name} is a recipe: train it with python train.py --config {name}, then give {run}"
    raise UserError(f"{key} = {path}: {problem}; {remedy}")


@functools.cache
def fetch_once(repo: str) -> Path:
    """Download a model from the hub, once per process. Under torchrun, only rank 0 prints its commit."""
    first = os.environ.get("RANK", "0") == "0"
    return fetch_model(repo, lambda line: print(line, file=sys.stderr) if first else None)


# ---------------------------------------------------------------------------------------------------------------------
# config and tokenizer


def read_config(path: str) -> ModelConfig:
    """Return the config of the model at `path`.

    Raises:
        UserError: as find; or the config is damaged, or model.py does not support it.
    """
    location = find(path)
    names = {key: key for key in REQUIRED}  # ModelConfig field -> key in the file
    if is_nanogpt(location):
        file, settings = location, read_nanogpt(location)["model_args"]
        # The first versions of nanoGPT had no setting `bias`. Its nn.GELU() is the exact GELU.
        settings = {"bias": True, **settings, "activation": "gelu"}
        names |= {"context_length": "block_size", "bias": "bias", "activation": "activation"}
    elif is_flatgpt(location):
        file, settings = location / STATE, read_json(location / STATE).get("config")
        if not isinstance(settings, dict):
            raise UserError(f"{file} is damaged: config = {settings!r:.60} is not an object; copy it again")
        names |= {f.name: f.name for f in dataclasses.fields(ModelConfig) if f.name in settings}
    else:
        file, settings = location / CONFIG, read_json(location / CONFIG)
        for key, values in SUPPORTED_SETTINGS.items():
            if settings.get(key, values[0]) not in values:
                supported = " or ".join(map(str, values))
                value = f"{settings[key]!r:.60}"
                raise UserError(f"{file}: {key} = {value}: model.py supports only {supported}; choose another model")
        settings = {"tie_word_embeddings": True, "activation_function": "gelu_new", **settings}
        settings["activation_function"] = ACTIVATIONS[settings["activation_function"]]
        names |= {"context_length": "n_positions" if "n_positions" in settings else "n_ctx"}
        names |= {"tie_weights": "tie_word_embeddings", "activation": "activation_function"}
    fields = {}
    for name, key in names.items():
        fields[name] = _checked(file, key, settings.get(key), ModelConfig.__dataclass_fields__[name])
    if not is_flatgpt(location) and settings.get("n_inner") is not None:
        width = _checked(file, "n_inner", settings["n_inner"], ModelConfig.__dataclass_fields__["n_embd"])
        fields["mlp_ratio"] = width / fields["n_embd"]
    config = ModelConfig(**fields)
    if problems := config.problems():
        raise UserError(f"{file} is damaged: {problems[0]}")
    # A model of this size will be built before its weights are read. In an edited model.py, blocks may share weights.
    stored, parameters = _stored_numbers(location), gpt2_parameters(config)
    if parameters > 20 * stored:
        sizes = f"it describes a model of {parameters:,} parameters, but the weights have {stored:,}"
        raise UserError(f"{file} is damaged: {sizes}; copy it again, or choose another model")
    return config


def _stored_numbers(location: Path) -> float:
    """Return how many numbers the weights at a result of `find` have; infinity if no file can be read."""
    if is_nanogpt(location):
        return sum(tensor.numel() for tensor in read_nanogpt(location)["model"].values())
    from safetensors import SafetensorError, safe_open

    stored = 0
    for path in location.glob("*.safetensors"):
        with contextlib.suppress(OSError, SafetensorError), safe_open(path, "np") as file:
            stored += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    return stored or math.inf


def _checked(file: Path, key: str, value, field: dataclasses.Field):
    """Return a value of the file after the checks of a ModelConfig field."""
    kind, _, optional = field.type.partition(" | ")
    if value is None and optional and field.name not in REQUIRED:
        return None
    try:
        return checked(value, {"int": int, "float": float, "bool": bool, "str": str}[kind], field.metadata)
    except ValueError as error:
        raise UserError(f"{file}: {key} = {value!r:.60}: {error}; choose another model, or copy it again") from None


def shape(config: ModelConfig) -> dict[str, object]:
    """Return the fields of ModelConfig that determine the weights' shapes and meaning."""
    return {key: value for key, value in dataclasses.asdict(config.model()).items() if key not in NOT_SHAPE}


def initial_shape(config: TrainConfig) -> dict[str, object]:
    """Return the shape of the model at init_from; {} without init_from.

    Raises:
        UserError: as read_config.
    """
    return shape(read_config(config.init_from)) if config.init_from else {}


def checkpoints_to_resume(config: TrainConfig) -> tuple[Path, list[Path]]:
    """Return the path that config.resume names, and the checkpoints there, newest first, including damaged ones.

    Raises:
        UserError: there is no checkpoint, and config.resume is not `auto`.
    """
    named = config.resume not in ("latest", "auto")
    path = folder_of(config.resume) if named else run_dir(config)
    found = folders(path)
    if not found and config.resume != "auto":
        problem = "there is no checkpoint" if path.exists() else "no such folder"
        remedy = "give a run's folder (out/NAME) or a checkpoint" if named else "start without --resume"
        if named and (path / "config.toml").is_file():  # a run that was stopped before its first checkpoint
            command = f"python train.py --config {shlex.quote(str(path / 'config.toml'))}"
            shown = f"its settings are there: {command} --show_batch {config.show_batch}"
            remedy = shown if config.show_batch else f"to start again: {command}"
        raise UserError(f"nothing to resume in {path}: {problem}; {remedy}")
    return path, found


def run_settings(config: TrainConfig) -> tuple[dict[Path, dict], dict] | None:
    """Return the settings of the run that config.resume names, for cli.parse; None if a new run starts.

    Without out_dir and recipe, a run that is named by a path continues in its folder, wherever that lies now.

    Returns:
        tables of settings by file, config.toml before state.json; and what the run's recipe said.

    Raises:
        UserError: as checkpoints_to_resume.
    """
    path, found = checkpoints_to_resume(config) if config.resume and not config.overwrite else (None, [])
    if not found:
        return None
    folder = next(filter(read_state, found), found[0])
    state = read_state(folder) or {"config": {}}  # train.py reports that all checkpoints are damaged
    saved = {key: value for key, value in state["config"].items() if value is not None}
    superseded = {one for one, other in EXCLUSIVE if other in saved}  # such as epochs: state.json has max_iters too
    saved = {key: saved[key] for key in saved.keys() & TrainConfig.__dataclass_fields__.keys() - superseded}
    tables, recipe = {folder / STATE: saved}, state.get("recipe", {})
    if run := run_of(path):
        tables = {run / RECIPE: read_table(run / RECIPE, tomllib.loads)} | tables
    for table in (*tables.values(), recipe):
        for key in (*START_ONLY, "out_dir"):
            table.pop(key, None)
        if table and run and not (config.resume in ("latest", "auto") or config.out_dir or config.config):
            table["out_dir"] = str(run)
    return tables, recipe


def read_tokenizer(path: str) -> tiktoken.Encoding | None:
    """Return the tokenizer that a model was trained with; None if unknown.

    Without tokenizer files, a vocabulary of 50,257 or 50,304 (nanoGPT's padding) ids is assumed to be GPT-2's.

    Raises:
        UserError: as find, tokenizer.load and tokenizer_reader.read; or the characters of a nanoGPT model are missing.
    """
    from flatgpt.data import tokenizer, tokenizer_reader

    location = find(path)
    if is_flatgpt(location):
        state = read_json(location / STATE)
        match state.get("tokenizer"):
            case {"name": str(name), **facts}:
                file, files = location / tokenizer.TOKENIZER_FILE, state.get("files")
                stored = isinstance(files, dict) and file.name in files  # otherwise its name is enough
                if stored and not file.is_file():
                    raise UserError(f"{file} is missing: copy the checkpoint again")
                return tokenizer.load(name, location if stored else None, facts.get("eot_id"))
            case None:
                return None
            case value:
                raise UserError(f"{location / STATE} is damaged: tokenizer = {value!r:.60} has no name; copy it again")
    size = read_config(path).vocab_size
    encoding = None if is_nanogpt(location) else tokenizer_reader.read(location)
    if isinstance(encoding, tokenizer.FileTokenizer) and (repo := hub_name(path)):  # its folder's name is the commit
        encoding.name = repo.partition("@")[0].rpartition("/")[2]
    if encoding is None and size in (50257, 50304):
        return tokenizer.load("gpt2")
    return _nanogpt_characters(location, size) if is_nanogpt(location) else encoding


def _nanogpt_characters(file: Path, size: int) -> tiktoken.Encoding:
    """Return the characters of a nanoGPT model. The file is searched beside it and where nanoGPT's sample.py does."""
    from flatgpt.data.tokenizer_reader import CHARACTERS, read_characters

    config = read_nanogpt(file).get("config")
    dataset = config.get("dataset") if isinstance(config, dict) else None
    folders = [file.parent, file.absolute().parent.parent / "data" / str(dataset)]
    found = next((folder / CHARACTERS for folder in folders if (folder / CHARACTERS).is_file()), None)
    if found is None:
        source = f"data/{dataset}/{CHARACTERS}" if dataset else CHARACTERS
        raise UserError(
            f"{file} has {size:,} ids, whose characters are in {CHARACTERS} of the data that it was trained on: copy "
            f"nanoGPT's {source} to {file.with_name(CHARACTERS)}"
        )
    encoding = read_characters(found, str(dataset or file.absolute().parent.name))
    if encoding.n_vocab != size:
        raise UserError(
            f"{found} has {encoding.n_vocab:,} characters, but {file} has {size:,} ids: copy the {CHARACTERS} of the "
            f"data that it was trained on to {file.with_name(CHARACTERS)}"
        )
    return encoding


# ---------------------------------------------------------------------------------------------------------------------
# files


def read_nanogpt(file: Path) -> dict:
    """Load nanoGPT's checkpoint with memory-mapped tensors. Only tensors and plain types are unpickled."""
    import torch

    try:
        saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can raise any exception
        # torch's message about a pickle advises weights_only=False
        reason = "" if isinstance(error, pickle.UnpicklingError) else f" ({first_line(error)})"
        other = "damaged, not a zip file of torch.save, or contains objects other than tensors and plain types, which "
        kind = wrong_kind(file) or f"{other}could run arbitrary code{reason}"
        raise UserError(f"{file} is not loaded: it is {kind}") from None
    match saved:
        case {"model": dict() as weights, "model_args": dict()}:
            if all(isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in weights.items()):
                return saved
    raise UserError(f"{file} is not a nanoGPT checkpoint: it must contain model (tensors by name) and model_args")
