"""A folder that runs as a Hugging Face Space: app.py, the code it imports, a model, and what describes them.

A Space installs requirements.txt and runs the file that README.md's front matter names
(huggingface.co/docs/hub/spaces-config-reference). Nothing is fetched there: the tokenizer's files are in the folder.
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
from flatgpt.interop.model_card import LOCAL, body, front_matter
from flatgpt.runs.checkpoint import STATE, WEIGHTS, state_file

APP, LOG, LICENSE = "app.py", "metrics.csv", "LICENSE"
SCRIPTS = (APP, "model.py", "config.py")
# What they import. Imports of other packages are inside functions that app.py does not call.
PACKAGES = ("gradio", "huggingface_hub", "matplotlib", "numpy", "pyarrow", "safetensors", "tiktoken", "torch")
VOCABULARY = "tiktoken_cache"  # app.py has TIKTOKEN_CACHE_DIR name it
DECLARED = ("requirements.txt", "requirements-extra.txt")
# Of state.json; the rest is for going on with the run, or is about the machine.
PUBLIC = (
    *("format", "iter", "tokens", "epoch", "val_loss", "best_loss", "best_iter", "tokenizer"),
    *("git_commit", "git_dirty", "python", "torch", "device", "cpu", "ranks"),
)
CPU_ONLY = """\
# torch without CUDA, a tenth of the size; for a Space with a GPU, leave out this line
--extra-index-url https://download.pytorch.org/whl/cpu
"""
IGNORED = b"__pycache__/\n.gradio/\n"  # come where app.py runs; compiled code has this machine's paths in it
USE = """\
```sh
pip install -r requirements.txt
python app.py
```

It prints the address to open in a browser. The weights and the tokenizer are in this folder: nothing is fetched."""


def space_files(found: ModelSource, name: str, recipe: str, given: str | None) -> dict[str, bytes | Path]:
    """{name in the folder: content, or the file to copy}; of a model that is not ours, without the model itself.

    Args:
        name: what to call it.
        recipe: the settings it was trained with, as TOML; empty: not known.
        given: what the user called the model, a name on the hub say.

    Raises:
        UserError: gradio is not installed.
    """
    version = gradio_version()
    files: dict[str, bytes | Path] = {}
    if found.state:
        files |= {WEIGHTS: found.path / WEIGHTS, STATE: state_file(public_state(found.state, name))}
        run = found.path.parent.parent if found.path.parent.name == "ckpt" else found.path
        files |= {LOG: run / LOG} if (run / LOG).is_file() else {}
    parameters = found.config.num_params()
    text = body(
        found.path,
        found.state,
        found.config,
        name=name,
        tokenizer=found.tokenizer,
        parameters=parameters,
        dtype="float32",
        recipe=recipe,
        use=USE,
        as_trained=bool(found.state),
    )
    files["README.md"] = f"{_metadata(name, parameters, given, version)}\n\n{text}".encode()
    files["requirements.txt"] = requirements(version).encode()
    files[".gitignore"] = IGNORED  # `hf upload` goes by it too
    files |= code_files() | {LICENSE: REPO_ROOT / LICENSE}  # which wants to be with copies
    return files | {f"{VOCABULARY}/{key}": data for key, data in tokenizer.vocabulary_files(found.tokenizer).items()}


def public_state(state: dict, name: str) -> dict:
    """state.json of the weights alone, without what would tell of somebody's machine.

    Args:
        name: what to call the run, whose folder is not named.
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


# ---------------------------------------------------------------------------------------------------------------------
# code


def code_files() -> dict[str, Path]:
    """{name in the folder: file} of all code that app.py may import."""
    files = [*(REPO_ROOT / name for name in SCRIPTS), *sorted((REPO_ROOT / "flatgpt").rglob("*.py"))]
    return {file.relative_to(REPO_ROOT).as_posix(): file for file in files}


def requirements(gradio: str) -> str:
    """requirements.txt of the packages, in the versions that the repository asks for."""
    lines = [
        line.partition("#")[0].strip() for file in DECLARED for line in (REPO_ROOT / file).read_text().splitlines()
    ]
    # a name ends where its version, an extra or a marker begins
    declared = {re.split(r"[^\w-]", line)[0].replace("-", "_").lower(): line for line in lines if line[:1].isalpha()}
    # Spaces install the front matter's version of gradio, whatever is asked for here
    wanted = declared | {"gradio": f"gradio=={gradio}"}
    return CPU_ONLY + "".join(f"{wanted[name]}\n" for name in PACKAGES)


def gradio_version() -> str:
    """Of the one that is installed, with which the folder can be tried before it is published."""
    try:
        return importlib.metadata.version("gradio")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            "--space names the version of gradio to run with, the one that is here, and there is none: "
            "pip install -r requirements-extra.txt"
        ) from None


# ---------------------------------------------------------------------------------------------------------------------
# words


def _metadata(name: str, parameters: int, given: str | None, gradio: str) -> str:
    hub = given and hub_name(given)
    return front_matter(
        {
            "title": name,
            "emoji": "📝",
            "colorFrom": "blue",
            "colorTo": "green",
            "sdk": "gradio",
            "sdk_version": gradio,
            "python_version": f"{sys.version_info.major}.{sys.version_info.minor}",
            "app_file": APP,
            "pinned": False,
            # the hub takes 60 characters
            "short_description": f"A language model of {parameters:,} parameters to try out",
            "tags": ["gpt2", "text-generation", "flatgpt"],
            **({"models": [hub.partition("@")[0]]} if hub else {}),
        }
    )
