"""Make a folder that runs as a Hugging Face Space: app.py, flatgpt/, a model, and the files that describe them.

A Space installs requirements.txt and runs the file that README.md's metadata names
(huggingface.co/docs/hub/spaces-config-reference). Nothing is downloaded there: the folder has the tokenizer's files.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from pathlib import Path

from config import TrainConfig, UserError
from flatgpt import REPO_ROOT
from flatgpt.data import tokenizer
from flatgpt.interop.hub import hub_name
from flatgpt.interop.loading import ModelSource
from flatgpt.interop.model_card import LOCAL, card_body
from flatgpt.runs.checkpoint import STATE, WEIGHTS, state_file

LOG, LICENSE = "metrics.csv", "LICENSE"
SCRIPTS = ("app.py", "model.py", "config.py")
# What these import. Imports of other packages are in functions that app.py does not call.
PACKAGES = ("gradio", "huggingface_hub", "matplotlib", "numpy", "pyarrow", "safetensors", "tiktoken", "torch")
VOCABULARY = "tiktoken_cache"  # the TIKTOKEN_CACHE_DIR of app.py
# Keys of state.json that are published. The others are for resuming, or are about the machine.
PUBLIC = (
    *("format", "iter", "tokens", "epoch", "val_loss", "best_loss", "best_iter", "tokenizer"),
    *("git_commit", "git_dirty", "python", "torch", "device", "cpu", "ranks"),
)
CPU_ONLY = """\
# torch without CUDA, a tenth of the size; for a Space with a GPU, leave out this line
--extra-index-url https://download.pytorch.org/whl/cpu
"""
IGNORED = b"__pycache__/\n.gradio/\n"  # created when app.py runs; compiled code contains paths of this machine
USE = """\
```sh
pip install -r requirements.txt
python app.py
```

It prints the address to open in a browser. The weights and the tokenizer are in this folder: nothing is downloaded."""


def space_files(source: ModelSource, name: str, recipe: str, given: str | None) -> dict[str, bytes | Path]:
    """Return {name in the folder: content, or the file to copy}; the weights only of a flatGPT checkpoint.

    Args:
        name: the model's name.
        recipe: the settings it was trained with, as TOML; empty if unknown.
        given: the model as the user named it.

    Raises:
        UserError: gradio is not installed.
    """
    gradio = gradio_version()
    files: dict[str, bytes | Path] = {}
    if source.state:
        files |= {WEIGHTS: source.path / WEIGHTS, STATE: state_file(public_state(source.state, name))}
        run = source.path.parent.parent if source.path.parent.name == "ckpt" else source.path
        files |= {LOG: run / LOG} if (run / LOG).is_file() else {}
    metadata = space_metadata(name, source.config.num_params(), given, gradio)
    body = card_body(source, name=name, use=USE, recipe=recipe)
    files["README.md"] = f"---\n{metadata}\n---\n\n{body}".encode()
    files["requirements.txt"] = requirements(gradio).encode()
    files[".gitignore"] = IGNORED  # `hf upload` follows it too
    for file in (*(REPO_ROOT / script for script in (*SCRIPTS, LICENSE)), *(REPO_ROOT / "flatgpt").rglob("*.py")):
        files[file.relative_to(REPO_ROOT).as_posix()] = file
    return files | {f"{VOCABULARY}/{key}": data for key, data in tokenizer.vocabulary_files(source.tokenizer).items()}


def public_state(state: dict, name: str) -> dict:
    """Return the parts of state.json that describe the weights and do not identify the user's machine.

    Args:
        name: replaces the run's folder.
    """
    known = TrainConfig.__dataclass_fields__.keys() - set(LOCAL)
    config = {key: value for key, value in state["config"].items() if key in known} | {"out_dir": name}
    if first := state["config"].get("init_from"):
        config["init_from"] = first if hub_name(first) else f".../{Path(first).name}"
    data = {key: state["data"][key] for key in ("manifest_sha256", "end_of_text", "tokens") if key in state["data"]}
    if "folder" in state["data"]:
        data["folder"] = Path(state["data"]["folder"]).name
    kept = {key: state[key] for key in PUBLIC if key in state}
    return kept | {"config": config, "data": data, "files": {WEIGHTS: state["files"][WEIGHTS]}}


def requirements(gradio: str) -> str:
    """Return requirements.txt of PACKAGES, in the versions that the repository requires."""
    texts = [(REPO_ROOT / f"requirements{kind}.txt").read_text() for kind in ("", "-extra")]
    lines = [line.partition("#")[0].strip() for text in texts for line in text.splitlines()]
    # a name ends where its version, an extra or a marker begins
    declared = {re.split(r"[^\w-]", line)[0].replace("-", "_").lower(): line for line in lines if line[:1].isalpha()}
    declared["gradio"] = f"gradio=={gradio}"  # a Space installs the metadata's sdk_version in any case
    return CPU_ONLY + "".join(f"{declared[name]}\n" for name in PACKAGES)


def gradio_version() -> str:
    """Return the version of the installed gradio, with which the folder can be tried before it is published."""
    try:
        return importlib.metadata.version("gradio")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            "--space names the version of gradio to run with, that of the installed one, and gradio is not installed: "
            "pip install -r requirements-extra.txt"
        ) from None


def space_metadata(name: str, parameters: int, given: str | None, gradio: str):
    """Return the metadata of a Space, a huggingface_hub SpaceCardData, whose text is YAML."""
    from huggingface_hub import SpaceCardData

    hub = given and hub_name(given)
    return SpaceCardData(
        title=name,
        emoji="📝",
        colorFrom="blue",
        colorTo="green",
        sdk="gradio",
        sdk_version=gradio,
        python_version=f"{sys.version_info.major}.{sys.version_info.minor}",
        app_file="app.py",
        pinned=False,
        short_description=f"A language model of {parameters:,} parameters to try out",  # at most 60 characters
        tags=["gpt2", "text-generation", "flatgpt"],
        models=[hub.partition("@")[0]] if hub else None,
    )
