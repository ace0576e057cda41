"""Download models from the Hugging Face Hub, and upload them, with huggingface_hub (1.25 or later) and its cache.

The command line calls `hub_name`: modules outside the standard library are imported in the other functions only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from config import UserError

OPENAI = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")  # repositories without a user's name
NAME = re.compile(r"(\w[\w.-]*)(?:/\w[\w.-]*)?", re.ASCII)
REVISION = re.compile(r"(?!.*\.\.)\w[\w./-]*", re.ASCII)
FILE_SUFFIXES = (".pt", ".bin", ".safetensors", ".json", ".git")

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "added_tokens.json")
FILES = (CONFIG, *TOKENIZER, "special_tokens_map.json", INDEX, WEIGHTS, "model-*.safetensors")


def hub_name(path: str) -> str | None:
    """Return `path` if it names a model on the hub (gpt2 or user/model, also with @revision), else None.

    A path that exists, or whose first folder exists (out/typo), is a local one.
    """
    name, at, revision = path.partition("@")
    match = NAME.fullmatch(name)
    if not match or name.lower().endswith(FILE_SUFFIXES) or (at and not REVISION.fullmatch(revision)):
        return None
    if "/" not in name and name not in OPENAI:
        return None
    # out/ holds the runs, and may not exist yet.
    local = match[1] == "out" or Path(match[1]).is_dir() or Path(path).exists() or Path(path).is_symlink()
    return None if local else path


def fetch_model(repo: str, log: Callable[[str], None]) -> Path:
    """Return the folder of a model on the hub: config.json, the tokenizer's files and the weights in safetensors.

    The folder is in huggingface_hub's cache and named by its commit. If it is complete, the hub is not asked:
    `user/model` stays at the commit that was downloaded, `user/model@COMMIT` requests another one.

    Args:
        repo: as `hub_name` returns it.
        log: receives a line with the commit.

    Raises:
        UserError: no such model, no safetensors, no access, no network, no disk space.
    """
    from huggingface_hub import errors, snapshot_download

    from flatgpt.data.hub import hub_errors

    name, _, revision = repo.partition("@")

    def snapshot(**more) -> Path:
        return Path(snapshot_download(name, revision=revision or "main", allow_patterns=FILES, **more))

    with suppress(errors.LocalEntryNotFoundError, errors.HFValidationError):
        folder = snapshot(local_files_only=True)
        # Other programs cache the weights without the tokenizer.
        if _has_weights(folder) and any((folder / file).exists() for file in TOKENIZER):
            log(f"{repo}: commit {folder.name[:7]}, from the cache")
            return folder
    with hub_errors(f"{repo}: no such file or folder, and the hub's model of this name could not be downloaded"):
        folder = snapshot()
    if not _has_weights(folder):
        raise UserError(
            f"{repo} has no {CONFIG} and {WEIGHTS} on the hub: choose a model with safetensors; a pickle "
            "(pytorch_model.bin) can run arbitrary code when it is loaded: if you trust it, convert it: "
            f"AutoModelForCausalLM.from_pretrained({name!r}).save_pretrained(FOLDER)"
        )
    log(f"{repo}: commit {folder.name[:7]}, from the hub")
    return folder


def _has_weights(folder: Path) -> bool:
    """Return whether a folder has config.json and the weights, all files if there are several."""
    index = folder / INDEX
    files = indexed_files(index) if index.exists() and not (folder / WEIGHTS).exists() else [WEIGHTS]
    return all((folder / file).exists() for file in (CONFIG, *files))


def indexed_files(index: Path, remedy: str = "") -> list[str]:
    """Return the weight files that an index names.

    Args:
        remedy: what to do about a damaged index; by default to remove it from huggingface_hub's cache.
    """
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if not names:
            raise ValueError("it names no file")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        remedy = remedy or f"remove {index.parents[2]} and run again, or choose another model"
        raise UserError(f"{index} is damaged: {error}; {remedy}") from None
    if wrong := [name for name in names if not re.fullmatch(r"[\w.-]+\.safetensors", str(name))]:
        raise UserError(f"{index}: {wrong[0]} is not a safetensors file in the same folder; choose another model")
    return names


def upload(folder: Path, names: Sequence[str], repo: str, private: bool, log: Callable[[str], None]) -> str:
    """Upload files of a folder to a model repository on the hub in one commit, and return the repository's URL.

    A missing repository is created. Other files that it has are kept.

    Args:
        names: the files to upload, directly in the folder.
        repo: user/name.
        private: create it as a private repository; the visibility of an existing one is checked, never changed.
        log: receives a line with the commit.

    Raises:
        UserError: no token, no permission, a public repository despite `private`, no network.
    """
    from huggingface_hub import HfApi

    from flatgpt.data.hub import hub_errors

    api = HfApi(token=True)
    with hub_errors(f"{repo} could not be uploaded"):
        # Without --private the organisation's default holds, so never private=False.
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
