"""Write model cards: Markdown with the hub's metadata, from a checkpoint's state.json.

Nothing that identifies the user's machine is published: folders, absolute paths, wandb's ids.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
import shlex
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING

from flatgpt.data.sources import DUMP, REPOSITORIES
from flatgpt.interop.hub import hub_name

if TYPE_CHECKING:
    from flatgpt.interop.loading import ModelSource

# Settings of a run that are about the machine or the call, not about the model.
LOCAL = ("config", "data_dir", "out_dir", "init_from", "resume", "device", "wandb", "wandb_project", "rank_timeout")
ENGLISH = ("pydoc", "shakespeare", "wikitext103", "fineweb")


def model_card(source: ModelSource, *, name: str, repo: str | None, dtype: str, recipe: str) -> str:
    """Return README.md of an exported model: metadata and evaluation results for the hub, and `card_body`.

    Args:
        source: the model as it is exported.
        name: the model's name.
        repo: the repository that the model is uploaded to.
        dtype: of the exported weights.
        recipe: the settings it was trained with, as TOML; empty if unknown.
    """
    from huggingface_hub import ModelCardData

    state, manifest = source.state, _manifest(source.state)
    base, repository, language = _initial_model(state), _repository(manifest), _language(manifest)
    results = _eval_results(source, repository)
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gpt2", *["flatgpt"] * bool(state)],
        language=[language] if language else None,
        datasets=[repository] if repository else None,
        base_model=base.partition("@")[0] if base else None,
        eval_results=results or None,
        model_name=" ".join(name.split()) if results else None,
    )
    target = repo or "user/name"
    python = (
        "from transformers import pipeline\n\n"
        f'write = pipeline("text-generation", "{target}")\n'
        'print(write("Once upon a time", max_new_tokens=100)[0]["generated_text"])'
    )
    shell = f'python infer.py --model_path {target} --prompt "Once upon a time"'
    note = "" if repo else f"{_code(target)} stands for this repository, or for the folder with this file.\n\n"
    use = f"{note}{_fenced(python, 'python')}\n\nWith flatGPT:\n\n{_fenced(shell, 'sh')}"
    return f"---\n{metadata}\n---\n\n{card_body(source, name=name, use=use, dtype=dtype, recipe=recipe)}"


def card_body(
    source: ModelSource, *, name: str, use: str, dtype: str = "float32", recipe: str = "", as_trained: bool = False
) -> str:
    """Return the Markdown text of a model card.

    Args:
        source, name, dtype, recipe: as in `model_card`.
        use: Markdown that says how to use the model.
        as_trained: whether the weights are the checkpoint's, not converted to Hugging Face's GPT-2.
    """
    state, config = source.state, source.config
    origin = "trained with flatGPT" if state else "in the format of Hugging Face transformers, written by flatGPT"
    rows = _model_rows(source, dtype, as_trained)
    parts = [
        f"# {_code(name)}",
        f"A GPT-2 style language model with {config.num_params():,} parameters, {origin}.",
        "## Model",
        "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]),
        "## Use",
        use,
    ]
    if state:
        parts += ["## Data", _list(_data_lines(state)), "## Training", _list(_training_lines(source))]
        if state.get("command"):
            command = shlex.join(["python", *map(_without_folders, state["command"])])
            parts += ["The command, absolute paths reduced to their last name:", _fenced(command, "sh")]
        if recipe:
            summary = "All settings, as a recipe (<code>python train.py --config FILE</code>)"
            parts += [f"<details><summary>{summary}</summary>", _fenced(recipe.rstrip("\n"), "toml"), "</details>"]
    unknown = "" if state else " Its training and its data are not known here."
    parts += [
        "## Limits",
        "It continues text in the style of its training data, including false and offensive statements; it was not "
        f"trained to follow or to refuse instructions. Its context is {config.context_length:,} tokens.{unknown}",
        "No license is set: the publisher chooses one that is compatible with the data's.",
    ]
    return "\n\n".join(parts) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# facts


def _manifest(state: dict) -> dict:
    """Return meta.json of the training data if it is still the same, else {}."""
    try:
        content = (Path(state["data"]["folder"]) / "meta.json").read_bytes()
    except (OSError, KeyError):
        return {}
    return json.loads(content) if hashlib.sha256(content).hexdigest() == state["data"]["manifest_sha256"] else {}


def _repository(manifest: dict) -> str | None:
    """Return the dataset's repository on the hub."""
    source = manifest.get("source")
    return REPOSITORIES[source][0] if source in REPOSITORIES else manifest.get("repo")


def _language(manifest: dict) -> str | None:
    """Return the language code of a source with a single language."""
    if manifest.get("source") == "wikipedia":
        code = manifest.get("dump", DUMP).partition(".")[2]
        return code if re.fullmatch("[a-z]{2,3}", code) else None  # 20231101.simple has no code
    return "en" if manifest.get("source") in ENGLISH else None


def _initial_model(state: dict) -> str | None:
    """Return the model on the hub that training started from."""
    name = state.get("config", {}).get("init_from")
    return name and hub_name(name)


def _evaluation(source: ModelSource) -> dict:
    """Return the row of metrics.csv with this checkpoint's evaluation, {} without one.

    The val_loss in state.json is from an earlier evaluation: a checkpoint is saved before it is evaluated.
    """
    file = source.path.parent.parent / "metrics.csv"
    if not source.state or source.path.parent.name != "ckpt" or not file.is_file():
        return {}
    with open(file, encoding="utf-8", errors="replace", newline="") as rows:
        iteration = str(source.state["iter"])
        found = [row for row in csv.DictReader(rows) if row["iter"] == iteration and row["val_loss"]]
    return found[-1] if found else {}


def _eval_results(source: ModelSource, repository: str | None) -> list:
    """Return the validation loss and perplexity of this checkpoint for the hub's model-index."""
    from huggingface_hub import EvalResult

    row, data = _evaluation(source), source.state.get("data", {})
    if not row or "folder" not in data or not math.isfinite(loss := float(row["val_loss"])):
        return []
    name = Path(data["folder"]).name
    metrics = {"loss": ("loss, nats per token", loss), "perplexity": ("perplexity per token", _perplexity(loss))}
    return [
        EvalResult(
            task_type="text-generation",
            dataset_name=name,
            dataset_type=repository or name,
            dataset_split="val",
            metric_type=kind,
            metric_name=label,
            metric_value=round(value, 4),
        )
        for kind, (label, value) in metrics.items()
    ]


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700))


def _model_rows(source: ModelSource, dtype: str, as_trained: bool) -> dict[str, str]:
    """Return the rows of the table about the model."""
    config = source.config
    attn_bias = config.bias if config.attn_bias is None else config.attn_bias
    biases = {
        (True, True): "everywhere",
        (False, False): "none" + " (stored as zeros)" * (not as_trained),
        (True, False): "not in attention" + " (stored as zeros there)" * (not as_trained),
        (False, True): "in attention only" + " (zeros elsewhere)" * (not as_trained),
    }
    trained = source.state.get("config", {}).get("context_length", config.context_length)
    cropped = f" (of {trained:,} in training)" if trained != config.context_length else ""
    positions = {"learned": "learned positions", "rope": "rotary positions (RoPE)"}[config.position]
    head = "a separate matrix" + ", with a bias" * config.head_bias
    tokenizer = f"{source.tokenizer} (tiktoken), vocab_size {config.vocab_size:,}"
    return {
        "layers": f"{config.n_layer:,}",
        "attention heads": f"{config.n_head:,}",
        "embedding size": f"{config.n_embd:,}",
        "MLP hidden size": f"{round(config.mlp_ratio * config.n_embd):,}",
        "activation": config.activation,
        "biases": biases[config.bias, attn_bias],
        "output head": "tied to the token embedding" if config.tie_weights else head,
        "context": f"{config.context_length:,} tokens{cropped}, {positions}",
        "tokenizer": "UTF-8 bytes and end-of-text" if source.tokenizer == "byte" else tokenizer,
        "weights": dtype,
    }


def _data_lines(state: dict) -> list[str | None]:
    data, manifest = state["data"], _manifest(state)
    repository = _repository(manifest)
    name = f"dataset {_code(Path(data['folder']).name)}" if "folder" in data else None
    if manifest:
        name += f": source {_code(manifest['source'])}, revision {_code(manifest['revision'])}"
    tokens = ", ".join(f"{split} {count:,}" for split, count in data.get("tokens", {}).items())
    return [
        name,
        f"repository {_code(repository)} on the Hugging Face hub" if repository else None,
        *(f"{key} = {_code(str(manifest[key]))}" for key in ("dump", "sample_size") if key in manifest),
        f"tokens: {tokens}" if tokens else None,
        f"end-of-text after each document: {'yes' if data['end_of_text'] else 'no'}",
        f"SHA-256 of its manifest: {data['manifest_sha256']}" if "manifest_sha256" in data else None,
    ]


def _training_lines(source: ModelSource) -> list[str | None]:
    state, config, row = source.state, source.state["config"], _evaluation(source)
    size = f", {state['tokens']:,} tokens, {state['epoch']:.2f} epochs" if "epoch" in state else ""
    lines = [f"{state['iter']:,} updates{size}"]
    if config.get("init_from"):
        base = _initial_model(state)
        lines += [f"started from the weights of {_code(base) if base else 'another model'}"]
    if row:
        loss, batches = float(row["val_loss"]), config.get("eval_batches")
        part = f"the first {batches:,} batches of {config['batch_size']:,} windows" if batches else "all"
        lines += [
            f"validation loss {loss:.4f} nats per token, perplexity {_perplexity(loss):,.2f}: the mean over {part} of "
            f"the val split, in windows of {config['context_length']:,} tokens that do not overlap, computed in "
            f"{config['dtype']} like the training"
        ]
        if row["train_loss"]:
            lines += [f"training loss of the last update {float(row['train_loss']):.4f} nats per token"]
    elif state.get("val_loss") is not None:
        lines += [f"validation loss {state['val_loss']:.4f} nats per token, at an evaluation before this checkpoint"]
    ranks = state.get("ranks", 1)
    device = state.get("cpu") if state.get("device") == "cpu" else state.get("device")
    versions = [f"{key} {state[key]}" for key in ("python", "torch") if state.get(key)]
    if state.get("git_commit"):
        versions += [f"flatGPT {state['git_commit']}" + ", with local changes" * bool(state.get("git_dirty"))]
    return [*lines, f"on {f'{ranks} x ' * (ranks > 1)}{device}" if device else None, ", ".join(versions)]


# ---------------------------------------------------------------------------------------------------------------------
# Markdown


def _without_folders(word: str) -> str:
    """Reduce an absolute path in a word of the command line: --input=/home/me/a.txt becomes --input=.../a.txt."""
    key, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    windows = PureWindowsPath(value)  # knows both slashes
    if PurePosixPath(value).is_absolute() or windows.is_absolute() or value.startswith("~"):
        value = f".../{windows.name}"
    return key + equals + value


def _backticks(text: str, least: int) -> str:
    """Return more backticks than any run of them in the text."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))


def _code(text: str) -> str:
    text = " ".join(text.split())
    ticks, space = _backticks(text, 1), " " * ("`" in text)
    return f"{ticks}{space}{text}{space}{ticks}"


def _fenced(text: str, language: str) -> str:
    ticks = _backticks(text, 3)
    return f"{ticks}{language}\n{text}\n{ticks}"


def _list(lines: list[str | None]) -> str:
    return "\n".join(f"- {line}" for line in lines if line)
