"""Recognize, download and upload models on the Hugging Face Hub, and write model cards (huggingface_hub 1.25 or later).

Command-line parsing calls `hub_name`, so only the other functions import modules outside the standard library. A model
card contains nothing that identifies the user's machine: no folders, absolute paths or wandb ids.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shlex
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from config import ExportConfig, UserError
from flatgpt.runs import history
from flatgpt.runtime.files import read_json

if TYPE_CHECKING:
    from flatgpt.interop.loading import ModelSource

OPENAI = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")  # repositories without a user name
NAME_PATTERN = re.compile(r"(\w[\w.-]*)(?:/\w[\w.-]*)?", re.ASCII)
REVISION_PATTERN = re.compile(r"(?!.*\.\.)\w[\w./-]*", re.ASCII)
FILE_SUFFIXES = (".pt", ".bin", ".safetensors", ".json", ".toml", ".txt", ".git")

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "added_tokens.json")
FILES = (CONFIG, *TOKENIZER, "special_tokens_map.json", INDEX, WEIGHTS, "model-*.safetensors")

# Settings that describe the machine or the command, not the model.
LOCAL_SETTINGS = (
    *("config", "data_dir", "out_dir", "init_from", "resume", "device"),
    *("tracker", "wandb", "wandb_project", "rank_timeout"),
)

CARD = """\
# {name}

A GPT-2 style language model with {parameters:,} parameters, {origin} flatGPT.

## Model

{model}

## Use

{use}

## Training

{training}

## Limits

The model continues text in the style of its training data, including false and offensive statements. It was not \
trained to follow or refuse instructions. Its context length is {context_length:,} tokens.

No license is set. The publisher must choose one that is compatible with the license of the data.
"""
USAGE = """\
```python
from transformers import pipeline

write = pipeline("text-generation", "{model}")
print(write("Once upon a time", max_new_tokens=100)[0]["generated_text"])
```

With flatGPT:

```sh
python infer.py --model_path {model} --prompt "Once upon a time"
```"""
UNVERIFIED = """

These files were not compared with the model that was trained (`--no-verify`). If its code is no longer GPT-2, they \
compute something else."""
TRAINING = """\
{facts}

Losses are in nats per token, over non-overlapping windows of {context_length:,} tokens. Absolute paths in the \
command are shortened to their last component.
"""
RECIPE = """
<details><summary>All settings, as a recipe (<code>python train.py --config FILE</code>)</summary>

```toml
{recipe}
```

</details>"""


def hub_name(path: str) -> str | None:
    """Return `path` if it names a model on the hub (gpt2 or user/model, optionally with @revision), else None.

    A path is local if it exists or its first folder exists (out/typo).
    """
    name, separator, revision = path.partition("@")
    match = NAME_PATTERN.fullmatch(name)
    if not match or name.lower().endswith(FILE_SUFFIXES) or (separator and not REVISION_PATTERN.fullmatch(revision)):
        return None
    if "/" not in name and name not in OPENAI:
        return None
    # out/ is the folder for runs, which may not exist yet
    local = match[1] == "out" or Path(match[1]).is_dir() or Path(path).exists() or Path(path).is_symlink()
    return None if local else path


# ---------------------------------------------------------------------------------------------------------------------
# download and upload


def fetch_model(repo: str, log: Callable[[str], None]) -> Path:
    """Download config.json, the tokenizer's files and the safetensors weights of a model on the hub. Return the folder.

    The folder is in huggingface_hub's cache and its name is the commit. A complete folder is used without a request to
    the hub: `user/model` stays at the downloaded commit, and `user/model@COMMIT` selects another commit.

    Args:
        repo: a name that `hub_name` accepts.
        log: called with a line that states the commit.

    Raises:
        UserError: no such model, no safetensors, no access, no network, no disk space.
    """
    from huggingface_hub import errors, snapshot_download

    from flatgpt.data.hub import hub_errors

    name, _, revision = repo.partition("@")

    def snapshot(**options) -> Path:
        return Path(snapshot_download(name, revision=revision or "main", allow_patterns=FILES, **options))

    with suppress(errors.LocalEntryNotFoundError, errors.HFValidationError):
        folder = snapshot(local_files_only=True)
        # Other programs cache the weights without the tokenizer.
        if _has_weights(folder) and any((folder / file).exists() for file in TOKENIZER):
            log(f"{repo}: commit {folder.name[:7]}, from the cache")
            return folder
    with hub_errors(f"{repo}: no such file or folder, and no model of this name could be downloaded from the hub"):
        folder = snapshot()
    if not _has_weights(folder):
        raise UserError(
            f"{repo} has no {CONFIG} and {WEIGHTS} on the hub: choose a model with safetensors; a pickle "
            "(pytorch_model.bin) can run arbitrary code when it is loaded; if you trust it, convert it: "
            f"AutoModelForCausalLM.from_pretrained({name!r}).save_pretrained(FOLDER)"
        )
    log(f"{repo}: commit {folder.name[:7]}, from the hub")
    return folder


def _has_weights(folder: Path) -> bool:
    """Whether a folder has config.json and all files of the weights."""
    index = folder / INDEX
    files = indexed_files(index) if index.exists() and not (folder / WEIGHTS).exists() else [WEIGHTS]
    return all((folder / file).exists() for file in (CONFIG, *files))


def indexed_files(index: Path, remedy: str = "") -> list[str]:
    """Return the names of the weight files that an index lists.

    Args:
        remedy: advice for a damaged index; default: remove the model from huggingface_hub's cache.

    Raises:
        UserError: the index is damaged, or lists a file that is not a safetensors file in the same folder.
    """
    remedy = remedy or f"remove {index.parents[2]} and run again, or choose another model"
    names = read_json(index, remedy).get("weight_map")
    if not names or not isinstance(names, dict):
        raise UserError(f"{index} is damaged: it lists no file in weight_map; {remedy}")
    if wrong := [name for name in names.values() if not re.fullmatch(r"[\w.-]+\.safetensors", str(name))]:
        raise UserError(f"{index}: {wrong[0]!r:.60} is not a safetensors file in the same folder; choose another model")
    return sorted(set(names.values()))


def upload(folder: Path, names: Sequence[str], repo: str, private: bool, log: Callable[[str], None]) -> str:
    """Upload files to a model repository on the hub in one commit. Return the repository's URL.

    The repository is created if it does not exist. Its other files are kept.

    Args:
        names: the files to upload, relative to `folder`.
        repo: user/name.
        private: create a private repository, and require an existing one to be private.
        log: called with a line that states the commit.

    Raises:
        UserError: no token, no permission, a public repository despite `private`, no network.
    """
    from huggingface_hub import HfApi

    from flatgpt.data.hub import hub_errors

    api = HfApi(token=True)
    with hub_errors(f"{repo} could not be uploaded"):
        # None keeps the default of the organization; False would override it.
        api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.model_info(repo).private:
            raise UserError(
                f"private: {repo} already exists on the hub and is public: make it private at "
                f"https://huggingface.co/{repo}/settings, or choose another name"
            )
        message = "Upload from flatGPT"
        info = api.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=list(names), commit_message=message)
    log(f"{repo}: commit {info.oid[:7]}")
    return f"{api.endpoint}/{repo}"


# ---------------------------------------------------------------------------------------------------------------------
# model cards


def model_card(source: ModelSource, options: ExportConfig, *, name: str, recipe: str) -> str:
    """Return README.md of an exported model: metadata and evaluation results for the hub, then `card_body`.

    Args:
        source: the exported model.
        options: repository, dtype of the weights, and whether they are verified.
        name: the model's name.
        recipe: the training settings as TOML; empty if unknown.
    """
    from huggingface_hub import EvalResult, ModelCardData

    state, losses, base = source.state, _evaluation(source), _initial_model(source.state)
    dataset = _dataset(state)
    repository = dataset.get("repository")
    results = []
    if losses and "folder" in state["data"]:
        folder = Path(state["data"]["folder"]).name
        location = {"dataset_name": folder, "dataset_type": repository or folder, "dataset_split": "val"}
        for metric, value in {"loss": losses["val_loss"], "perplexity": losses["perplexity"]}.items():
            figure = {"metric_type": metric, "metric_name": f"{metric} per token", "metric_value": round(value, 4)}
            results.append(EvalResult(task_type="text-generation", **location, **figure))
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gpt2", *["flatgpt"] * bool(state)],
        language=dataset.get("language"),
        datasets=repository and [repository],
        base_model=base and base.partition("@")[0],
        eval_results=results or None,
        model_name=" ".join(name.split()) if results else None,
    )
    use = USAGE.format(model=options.push or "FOLDER") + (UNVERIFIED if not options.verify else "")
    return f"---\n{metadata}\n---\n\n{card_body(source, name=name, use=use, dtype=options.dtype, recipe=recipe)}"


def card_body(source: ModelSource, *, name: str, use: str, dtype: str = "float32", recipe: str = "") -> str:
    """Return the Markdown text of a model card.

    Args:
        source, name, dtype, recipe: as in `model_card`.
        use: Markdown with usage instructions.
    """
    config, training = source.config, "The training settings and data are unknown."
    if source.state:
        facts = _list(_training_facts(source))
        training = TRAINING.format(facts=facts, context_length=source.state["config"]["context_length"])
        training += RECIPE.format(recipe=recipe.rstrip()) if recipe else ""
    return CARD.format(
        name=_code(name),
        parameters=source.parameters(),
        origin="trained with" if source.state else "exported by",
        model=_list({**vars(config), "tokenizer": source.encoding.name, "weights": dtype}),
        use=use,
        training=training.rstrip(),
        context_length=config.context_length,
    )


def _dataset(state: dict) -> dict:
    """Return meta.json, hub repository, language and license of the dataset; {} if it is missing or has changed."""
    try:
        content = (Path(state["data"]["folder"]) / "meta.json").read_bytes()
    except (OSError, KeyError):
        return {}
    if hashlib.sha256(content).hexdigest() != state["data"]["manifest_sha256"]:
        return {}
    from flatgpt.data.sources import SOURCES

    manifest = json.loads(content)
    source = SOURCES.get(manifest["source"], SOURCES["text"])  # whose language, license and repository are not known
    language = source.language
    if "dump" in manifest:  # 20231101.simple has no language code
        language = next(iter(re.findall(r"\.([a-z]{2,3})$", manifest["dump"])), None)
    repository = source.repository.name if source.repository else manifest.get("repo")
    return {**manifest, "language": language, "license": source.license, "repository": repository}


def _initial_model(state: dict) -> str | None:
    """Return the hub name of the model that training started from; None if it is not on the hub."""
    name = state.get("config", {}).get("init_from")
    return name and hub_name(name)


def _evaluation(source: ModelSource) -> dict[str, float]:
    """Return the losses in the checkpoint's row of metrics.csv; {} if the checkpoint was not evaluated.

    The val_loss in state.json is from an earlier iteration, because a checkpoint is saved before it is evaluated.
    """
    if source.state:
        log = history.read(source.path.parent.parent)
        for i, val_loss, train_loss in zip(log["iter"], log["val_loss"], log["train_loss"], strict=True):
            if i == source.state["iter"] and val_loss < 700:  # not NaN, and exp() does not overflow
                return {"val_loss": val_loss, "perplexity": math.exp(val_loss), "train_loss": train_loss}
    return {}


def _training_facts(source: ModelSource) -> dict[str, object]:
    state, config, dataset = source.state, source.state["config"], _dataset(source.state)
    data, losses = state["data"], _evaluation(source)
    args = [re.sub(r"^(--\w+=)?[/~].*?([^/]*)$", r"\1.../\2", str(arg)) for arg in state.get("command", [])]
    return {
        "dataset": Path(data["folder"]).name if "folder" in data else None,
        **{key: dataset.get(key) for key in ("source", "repository", "revision", "dump", "sample_size")},
        "license of the text": dataset.get("license"),
        **{f"tokens, {split}": f"{n:,}" for split, n in data.get("tokens", {}).items() if type(n) is int},
        "end-of-text after each document": data["end_of_text"],
        "SHA-256 of the dataset's meta.json": data.get("manifest_sha256"),
        "started from the weights of": config.get("init_from") and (_initial_model(state) or "another model"),
        "updates": f"{state['iter']:,}",
        **{key: state.get(key) for key in ("tokens", "epoch")},
        **{key: f"{value:,.4f}" for key, value in losses.items()},
        **{key: config.get(key) or None for key in ("eval_tokens", "eval_batches")},
        "device": state.get("cpu") if state.get("device") == "cpu" else state.get("device"),
        **{key: state.get(key) for key in ("ranks", "python", "torch", "git_commit", "git_dirty")},
        "command": shlex.join(["python", *args]) if args else None,
    }


def _list(facts: dict[str, object]) -> str:
    """Return a Markdown list of the values that are not None."""
    return "\n".join(f"- {key}: {_code(str(value))}" for key, value in facts.items() if value is not None)


def _code(text: str) -> str:
    """Return a Markdown code span; its delimiter is longer than any sequence of backticks in the text."""
    text, ticks = " ".join(text.split()), "`"
    while ticks in text:
        ticks += "`"
    space = " " * (ticks != "`")
    return f"{ticks}{space}{text}{space}{ticks}"
