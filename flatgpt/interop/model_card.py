"""Write model cards: Markdown with the hub's metadata, from a checkpoint's state.json.

Nothing that identifies the user's machine is published: folders, absolute paths, wandb's ids.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from flatgpt.data.sources import DUMP, REPOSITORIES
from flatgpt.interop.hub import hub_name
from flatgpt.runs import history

if TYPE_CHECKING:
    from flatgpt.interop.loading import ModelSource

# Settings of a run that are about the machine or the call, not about the model.
LOCAL = ("config", "data_dir", "out_dir", "init_from", "resume", "device", "wandb", "wandb_project", "rank_timeout")
ENGLISH = ("pydoc", "shakespeare", "wikitext103", "fineweb")

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

It continues text in the style of its training data, including false and offensive statements; it was not trained to \
follow or to refuse instructions. Its context is {context_length:,} tokens.

No license is set: the publisher chooses one that is compatible with the data's.
"""
USE = """\
```python
from transformers import pipeline

write = pipeline("text-generation", "{model}")
print(write("Once upon a time", max_new_tokens=100)[0]["generated_text"])
```

With flatGPT:

```sh
python infer.py --model_path {model} --prompt "Once upon a time"
```"""
TRAINING = """\
{facts}

Losses are in nats per token, in windows of {context_length:,} tokens that do not overlap. Absolute paths in the \
command are reduced to their last name.
"""
RECIPE = """
<details><summary>All settings, as a recipe (<code>python train.py --config FILE</code>)</summary>

```toml
{recipe}
```

</details>"""


def model_card(source: ModelSource, *, name: str, repo: str | None, dtype: str, recipe: str) -> str:
    """Return README.md of an exported model: metadata and evaluation results for the hub, and `card_body`.

    Args:
        source: the model as it is exported.
        name: the model's name.
        repo: the repository that the model is uploaded to.
        dtype: of the exported weights.
        recipe: the settings it was trained with, as TOML; empty if unknown.
    """
    from huggingface_hub import EvalResult, ModelCardData

    state, losses, base = source.state, _evaluation(source), _initial_model(source.state)
    dataset = _dataset(state)
    repository = dataset.get("repository")
    results = []
    if losses and "folder" in state["data"]:
        folder = Path(state["data"]["folder"]).name
        where = {"dataset_name": folder, "dataset_type": repository or folder, "dataset_split": "val"}
        for metric, value in {"loss": losses["val_loss"], "perplexity": losses["perplexity"]}.items():
            figure = {"metric_type": metric, "metric_name": f"{metric} per token", "metric_value": round(value, 4)}
            results.append(EvalResult(task_type="text-generation", **where, **figure))
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
    use = USE.format(model=repo or "FOLDER")
    return f"---\n{metadata}\n---\n\n{card_body(source, name=name, use=use, dtype=dtype, recipe=recipe)}"


def card_body(source: ModelSource, *, name: str, use: str, dtype: str = "float32", recipe: str = "") -> str:
    """Return the Markdown text of a model card.

    Args:
        source, name, dtype, recipe: as in `model_card`.
        use: Markdown that says how to use the model.
    """
    config, training = source.config, "Its training and its data are not known here."
    if source.state:
        facts = _list(_training_facts(source))
        training = TRAINING.format(facts=facts, context_length=source.state["config"]["context_length"])
        training += RECIPE.format(recipe=recipe.rstrip()) if recipe else ""
    return CARD.format(
        name=_code(name),
        parameters=config.num_params(),
        origin="trained with" if source.state else "written by",
        model=_list({**vars(config), "tokenizer": source.tokenizer, "weights": dtype}),
        use=use,
        training=training.rstrip(),
        context_length=config.context_length,
    )


def _dataset(state: dict) -> dict:
    """Return meta.json of the training data, its repository on the hub and its language; {} if it is not the same."""
    try:
        content = (Path(state["data"]["folder"]) / "meta.json").read_bytes()
    except (OSError, KeyError):
        return {}
    if hashlib.sha256(content).hexdigest() != state["data"]["manifest_sha256"]:
        return {}
    manifest = json.loads(content)
    source, language = manifest["source"], manifest.get("dump", DUMP).partition(".")[2]
    if source not in (*ENGLISH, "wikipedia") or not re.fullmatch("[a-z]{2,3}", language):
        language = None  # 20231101.simple has no language code
    repository = REPOSITORIES[source][0] if source in REPOSITORIES else manifest.get("repo")
    return {**manifest, "language": language, "repository": repository}


def _initial_model(state: dict) -> str | None:
    """Return the model on the hub that training started from."""
    name = state.get("config", {}).get("init_from")
    return name and hub_name(name)


def _evaluation(source: ModelSource) -> dict[str, float]:
    """Return the losses in this checkpoint's row of metrics.csv; {} if it was not evaluated.

    The val_loss in state.json is from an earlier evaluation: a checkpoint is saved before it is evaluated.
    """
    if source.state:
        log = history.read(source.path.parent.parent)
        for i, val_loss, train_loss in zip(log["iter"], log["val_loss"], log["train_loss"], strict=True):
            if i == source.state["iter"] and val_loss < 700:  # neither NaN nor beyond exp's range
                return {"val_loss": val_loss, "perplexity": math.exp(val_loss), "train_loss": train_loss}
    return {}


def _training_facts(source: ModelSource) -> dict[str, object]:
    state, config, dataset = source.state, source.state["config"], _dataset(source.state)
    data, losses = state["data"], _evaluation(source)
    words = [re.sub(r"^(--\w+=)?[/~].*?([^/]*)$", r"\1.../\2", word) for word in state.get("command", [])]
    return {
        "dataset": Path(data["folder"]).name if "folder" in data else None,
        **{key: dataset.get(key) for key in ("source", "repository", "revision", "dump", "sample_size")},
        **{f"tokens, {split}": f"{count:,}" for split, count in data.get("tokens", {}).items()},
        "end-of-text after each document": data["end_of_text"],
        "SHA-256 of its manifest": data.get("manifest_sha256"),
        "started from the weights of": config.get("init_from") and (_initial_model(state) or "another model"),
        "updates": f"{state['iter']:,}",
        **{key: state.get(key) for key in ("tokens", "epoch")},
        **{key: f"{value:,.4f}" for key, value in losses.items()},
        "eval_batches": config.get("eval_batches") or None,
        "device": state.get("cpu") if state.get("device") == "cpu" else state.get("device"),
        **{key: state.get(key) for key in ("ranks", "python", "torch", "git_commit", "git_dirty")},
        "command": shlex.join(["python", *words]) if words else None,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Markdown


def _list(facts: dict[str, object]) -> str:
    """Return a list of the facts that are known."""
    return "\n".join(f"- {key}: {_code(str(value))}" for key, value in facts.items() if value is not None)


def _code(text: str) -> str:
    """Return a code span, in more backticks than any run of them in the text."""
    text, ticks = " ".join(text.split()), "`"
    while ticks in text:
        ticks += "`"
    space = " " * (ticks != "`")
    return f"{ticks}{space}{text}{space}{ticks}"
