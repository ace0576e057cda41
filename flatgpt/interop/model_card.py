"""The model card of an export, README.md: a checkpoint's state.json -> Markdown under the hub's YAML.

What would tell of somebody's machine stays out: folders, absolute paths in the command line, wandb's ids.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
import shlex
from pathlib import Path, PurePosixPath, PureWindowsPath

from config import ModelConfig
from flatgpt.data.sources import DUMP, REPOSITORIES
from flatgpt.interop.hub import hub_name

# Of a run's settings these are about the machine, or about the call, not about the model.
LOCAL = ("config", "data_dir", "out_dir", "init_from", "resume", "device", "wandb", "wandb_project", "rank_timeout")
ENGLISH = ("pydoc", "shakespeare", "wikitext103", "fineweb")


def card(
    path: Path,
    state: dict,
    config: ModelConfig,
    *,
    name: str,
    repo: str | None,
    tokenizer: str,
    parameters: int,
    dtype: str,
    recipe: str,
) -> str:
    """README.md of an exported model: what it is, its data, how it was trained, what it reached, how to use it.

    Args:
        path: the checkpoint's folder, for the log of its run.
        state: its state.json; {} where flatGPT has not trained the model, and nobody says how it was.
        config: the model as it is exported.
        name: what to call it.
        repo: where it is going on the hub.
        tokenizer: its name.
        dtype: of the weights.
        recipe: the settings it was trained with, as TOML; empty: not known.
    """
    use = _use(repo or "user/name", named=repo is not None)
    facts = {"name": name, "tokenizer": tokenizer, "parameters": parameters, "dtype": dtype, "recipe": recipe}
    return f"{_metadata(state, _manifest(state))}\n\n{body(path, state, config, **facts, use=use)}"


def body(
    path: Path,
    state: dict,
    config: ModelConfig,
    *,
    name: str,
    tokenizer: str,
    parameters: int,
    dtype: str,
    recipe: str,
    use: str,
    as_trained: bool = False,
) -> str:
    """What a person reads of it.

    Args:
        path, state, config, name, tokenizer, dtype, recipe: as card has them.
        use: Markdown that says how to use it.
        as_trained: the weights are the checkpoint's own; else they are what Hugging Face's GPT-2 makes of them.
    """
    manifest = _manifest(state)
    parts = [f"# {_code(name)}"]
    whose = "trained with flatGPT" if state else "in the layout of Hugging Face's transformers, written by flatGPT"
    parts += [f"A language model of GPT-2's kind with {parameters:,} parameters, {whose}."]
    parts += ["## Model", _table(_shape(config, state, tokenizer, dtype, as_trained))]
    parts += ["## Use", use]
    if state:
        parts += ["## Data", _list(_data(state, manifest))]
        parts += ["## Training", _list(_training(state, _logged(path, state["iter"])))]
        if state.get("command"):
            command = shlex.join(["python", *map(_public, state["command"])])
            parts += ["The command, absolute paths cut to their last name:", _fenced(command, "sh")]
        if recipe:
            summary = "All settings, as a recipe (<code>python train.py --config FILE</code>)"
            parts += [f"<details><summary>{summary}</summary>", _fenced(recipe.rstrip("\n"), "toml"), "</details>"]
    parts += ["## Limits", _limits(config, state)]
    return "\n\n".join(parts) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# what is known


def _manifest(state: dict) -> dict:
    """meta.json of the dataset, where it still is the one that the model was trained on; else {}."""
    try:
        content = (Path(state["data"]["folder"]) / "meta.json").read_bytes()
    except (OSError, KeyError):
        return {}
    return json.loads(content) if hashlib.sha256(content).hexdigest() == state["data"]["manifest_sha256"] else {}


def _repository(manifest: dict) -> str | None:
    """The dataset's repository on the hub."""
    source = manifest.get("source")
    return REPOSITORIES[source][0] if source in REPOSITORIES else manifest.get("repo")


def _language(manifest: dict) -> str | None:
    """The language of the data, where its source has one only."""
    if manifest.get("source") == "wikipedia":
        code = manifest.get("dump", DUMP).partition(".")[2]
        return code if re.fullmatch("[a-z]{2,3}", code) else None  # of Wikipedia's, `simple` is none
    return "en" if manifest.get("source") in ENGLISH else None


def _began_with(state: dict) -> str | None:
    """The model on the hub that training began with."""
    name = state.get("config", {}).get("init_from")
    return name and hub_name(name)


def _logged(path: Path, iteration: int) -> dict:
    """The evaluated row of this iteration in the run's log, {} without. A state.json is written before it is known."""
    file = path.parent.parent / "metrics.csv"
    if path.parent.name != "ckpt" or not file.is_file():
        return {}
    with open(file, encoding="utf-8", errors="replace", newline="") as rows:
        found = [r for r in csv.DictReader(rows) if r["iter"] == str(iteration) and r["val_loss"]]
    return found[-1] if found else {}


# ---------------------------------------------------------------------------------------------------------------------
# the parts


def _metadata(state: dict, manifest: dict) -> str:
    """The hub's front matter."""
    base, repository, language = _began_with(state), _repository(manifest), _language(manifest)
    entries = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gpt2", *["flatgpt"] * bool(state)],
        "language": language and [language],
        "datasets": repository and [repository],
        "base_model": base and base.partition("@")[0],
    }
    return front_matter({key: value for key, value in entries.items() if value})


def front_matter(entries: dict) -> str:
    """The hub's YAML block; JSON's texts, lists and booleans are YAML's too."""
    # not as \u escapes: JSON has two for an emoji, which YAML takes for two characters
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in entries.items()]
    return "".join(["---\n", *lines, "---"])


def _shape(config: ModelConfig, state: dict, tokenizer: str, dtype: str, as_trained: bool) -> dict[str, str]:
    biased = config.bias if config.attn_bias is None else config.attn_bias
    biases = {
        (True, True): "everywhere",
        (False, False): "none" + " (stored as zeros)" * (not as_trained),
        (True, False): "not in attention" + " (there stored as zeros)" * (not as_trained),
        (False, True): "in attention only" + " (else zeros)" * (not as_trained),
    }
    positions = {"learned": "learned positions", "rope": "rotary positions (RoPE)"}[config.position]
    trained = state.get("config", {}).get("context_length", config.context_length)
    cut = f" (of {trained:,} in training)" if trained != config.context_length else ""
    return {
        "layers": f"{config.n_layer:,}",
        "attention heads": f"{config.n_head:,}",
        "width": f"{config.n_embd:,}",
        "width of the MLP": f"{round(config.mlp_ratio * config.n_embd):,}",
        "activation": config.activation,
        "biases": biases[config.bias, biased],
        "output head": "the token embedding's matrix"
        if config.tie_weights
        else "a matrix of its own" + ", with a bias" * config.head_bias,
        "context": f"{config.context_length:,} tokens{cut}, {positions}",
        "tokenizer": f"{tokenizer} (tiktoken's name), the model has {config.vocab_size:,} ids"
        if tokenizer != "byte"
        else "bytes of UTF-8, and end-of-text",
        "weights": dtype,
    }


def _use(repo: str, named: bool) -> str:
    python = (
        "from transformers import pipeline\n\n"
        f'write = pipeline("text-generation", "{repo}")\n'
        'print(write("Once upon a time", max_new_tokens=100)[0]["generated_text"])'
    )
    shell = f'python infer.py --model_path {repo} --prompt "Once upon a time"'
    where = "" if named else f"{_code(repo)} stands for this repository, or for the folder that this file is in.\n\n"
    return f"{where}{_fenced(python, 'python')}\n\nWith flatGPT:\n\n{_fenced(shell, 'sh')}"


def _data(state: dict, manifest: dict) -> list[str]:
    data, repository = state["data"], _repository(manifest)
    lines = [f"dataset {_code(Path(data['folder']).name)}" if "folder" in data else None]
    if manifest:
        lines[0] += f": source {_code(manifest['source'])}, revision {_code(manifest['revision'])}"
        lines += [f"repository {_code(repository)} on the Hugging Face hub" if repository else None]
        lines += [f"{key} = {_code(str(manifest[key]))}" for key in ("dump", "sample_size") if key in manifest]
    tokens = ", ".join(f"{split} {count:,}" for split, count in data.get("tokens", {}).items())
    lines += [f"tokens: {tokens}" if tokens else None]
    lines += [f"end-of-text after each document: {'yes' if data['end_of_text'] else 'no'}"]
    lines += [f"SHA-256 of its manifest: {data['manifest_sha256']}" if "manifest_sha256" in data else None]
    return [line for line in lines if line]


def _training(state: dict, row: dict) -> list[str]:
    config = state["config"]
    size = f"{state['iter']:,} updates"
    size += f", {state['tokens']:,} tokens, {state['epoch']:.2f} epochs" if "epoch" in state else ""
    lines = [size, f"it began with the weights of {_code(_began_with(state))}" if _began_with(state) else None]
    if config.get("init_from") and not _began_with(state):
        lines += ["it began with the weights of another model"]
    if row:
        batches = config["eval_batches"]
        part = f"the first {batches:,} batches of {config['batch_size']:,} windows" if batches else "all"
        loss = float(row["val_loss"])
        lines += [
            f"validation loss {loss:.4f} nats per token, perplexity {math.exp(min(loss, 700)):,.2f}: the mean over "
            f"{part} of the val split, in windows of {config['context_length']:,} tokens that do not overlap, "
            f"computed in {config['dtype']} as training was",
            f"training loss of the last update {float(row['train_loss']):.4f} nats per token"
            if row["train_loss"]
            else None,
        ]
    elif state.get("val_loss") is not None:
        lines += [f"validation loss {state['val_loss']:.4f} nats per token, at an evaluation before this checkpoint"]
    ranks = state.get("ranks", 1)
    device = state.get("cpu") if state.get("device") == "cpu" else state.get("device")
    lines += [f"on {ranks} x {device}" if device and ranks > 1 else f"on {device}" if device else None]
    versions = [f"{key} {state[key]}" for key in ("python", "torch") if state.get(key)]
    if state.get("git_commit"):
        versions += [f"flatGPT {state['git_commit']}" + ", with local changes" * bool(state.get("git_dirty"))]
    return [line for line in [*lines, ", ".join(versions)] if line]


def _limits(config: ModelConfig, state: dict) -> str:
    unknown = "" if state else " How it was trained, and on what, is not known here."
    return (
        "It continues text in the manner of the text that it was trained on, false and offensive statements included; "
        "it was not taught to follow instructions or to decline them. "
        f"It sees {config.context_length:,} tokens at once.{unknown}\n\n"
        "No license is set here: that is for whoever publishes it to choose, and has to fit the data's."
    )


# ---------------------------------------------------------------------------------------------------------------------
# Markdown


def _public(word: str) -> str:
    """A word of the command line without the folders of an absolute path: --input=/home/me/a.txt, --input=.../a.txt."""
    key, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    windows = PureWindowsPath(value)  # knows both slashes
    if PurePosixPath(value).is_absolute() or windows.is_absolute() or value.startswith("~"):
        value = f".../{windows.name}"
    return key + equals + value


def _ticks(text: str, least: int) -> str:
    """Backticks that cannot be ended from inside the text."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))


def _code(text: str) -> str:
    text = " ".join(text.split())
    ticks, space = _ticks(text, 1), " " * ("`" in text)
    return f"{ticks}{space}{text}{space}{ticks}"


def _fenced(text: str, language: str) -> str:
    ticks = _ticks(text, 3)
    return f"{ticks}{language}\n{text}\n{ticks}"


def _list(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _table(rows: dict[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())])
