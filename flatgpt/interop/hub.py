"""Download models from the Hugging Face Hub, and upload them, with huggingface_hub (1.x and 2.x) and its cache.

The command line calls `hub_name`: modules outside the standard library are imported in the other functions only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from config import UserError

OPENAI = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")  # repositories without a user's name
NAME = re.compile(
    r"(?!.*(?:--|\.\.))(\w(?:[\w.-]{0,94}\w)?)(?:/\w(?:[\w.-]{0,94}\w)?)?", re.ASCII
)  # as validate_repo_id
REVISION = re.compile(r"(?!.*\.\.)\w[\w./-]*", re.ASCII)
FILE_SUFFIXES = (".pt", ".bin", ".safetensors", ".json", ".git")

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER = (
    *("tokenizer.json", "vocab.json", "merges.txt"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf")
NOTHING_COMMITTED = "nothing was committed"


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


# ---------------------------------------------------------------------------------------------------------------------
# download


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
    from huggingface_hub import HfApi, errors, hf_hub_download

    from flatgpt.data.hub import MAX_RETRY_SECONDS, with_retries

    name, _, revision = repo.partition("@")
    revision = revision or "main"
    if folder := _cached(name, revision):
        log(f"{repo}: commit {folder.name[:7]}, from the cache")
        return folder
    what = "list of files"
    info = with_retries(
        lambda: HfApi().model_info(name, revision=revision), what, _download_errors(repo, what), MAX_RETRY_SECONDS
    )
    files = [file.rfilename for file in info.siblings]
    _check_files(repo, files)
    log(f"{repo}: commit {info.sha[:7]}, from the hub")

    # Not snapshot_download: it returns an incomplete folder when the hub does not answer.
    def download(file: str, commit: str = info.sha) -> Path | None:
        """Return None for a file that does not exist, which huggingface_hub records in its cache."""

        def request() -> Path | None:
            try:
                return Path(hf_hub_download(name, file, revision=commit))
            except errors.RemoteEntryNotFoundError:
                return None

        return with_retries(request, file, _download_errors(repo, file))

    folder = download(CONFIG).parent
    for file in TOKENIZER:
        download(file)
    for file in [WEIGHTS] if WEIGHTS in files else indexed_files(download(INDEX)):  # last: they make it complete
        if download(file) is None:
            raise UserError(f"{repo}: {INDEX} names {file}, which does not exist: the upload is incomplete")
    download(CONFIG, revision)  # records the commit of the branch
    return folder


def _cached(name: str, revision: str) -> Path | None:
    """Return the model's folder in the cache if it is complete."""
    from huggingface_hub import try_to_load_from_cache

    def known(file: str) -> str | object | None:
        """Return a path, another object for a file that does not exist on the hub, or None for an unknown file."""
        return try_to_load_from_cache(name, file, revision=revision)

    config, weights, index = known(CONFIG), known(WEIGHTS), known(INDEX)
    # Others cache the weights without the tokenizer. `hf download` does not record which files do not exist.
    if not isinstance(config, str) or all(known(file) is None for file in TOKENIZER[:2]):
        return None
    folder = Path(config).parent
    if isinstance(weights, str):
        return folder
    if isinstance(index, str) and all((folder / file).is_file() for file in indexed_files(Path(index))):
        return folder
    return None


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


def _check_files(repo: str, files: list[str]) -> None:
    """Raise UserError for a repository without config.json or safetensors."""
    if CONFIG not in files:
        raise UserError(f"{repo}: this model on the hub has no {CONFIG}: it is not in the format of transformers")
    if WEIGHTS in files or INDEX in files:
        return
    others = [file for file in files if file.endswith(OTHER_WEIGHTS)]
    if not others:
        raise UserError(f"{repo}: this model on the hub has no {WEIGHTS}, and no other weights: check the name")
    pickle = ", a pickle, which can run arbitrary code when it is loaded" if others[0].endswith(".bin") else ""
    name = repo.partition("@")[0]
    raise UserError(
        f"{repo} has no {WEIGHTS}, only {', '.join(others[:3])}{pickle}: choose a model with safetensors, or, if you "
        f"trust it, convert it: AutoModelForCausalLM.from_pretrained({name!r}).save_pretrained(FOLDER)"
    )


def _download_errors(repo: str, what: str) -> dict[str, str]:
    """Return the error line of each kind of failure, for with_retries."""
    from huggingface_hub import constants

    from flatgpt.data.hub import LOG_IN

    name, _, revision = repo.partition("@")
    cache, nothing_local = constants.HF_HUB_CACHE, f"{repo}: no such file or folder, and"
    return {
        "offline": f"{nothing_local} the hub's model is not in {cache}, or not completely, while HF_HUB_OFFLINE is "
        "set: check the path, or unset it",
        "gated": f"{name} is gated: accept its terms at https://huggingface.co/{name}, then {LOG_IN}",
        "unknown": f"{nothing_local} no such model on the hub, or it is private: check the name; if it is yours, "
        f"{LOG_IN}",
        "revision": f"{name} has no revision {revision}: check the text after the @",
        "absent": f"{name} has no {what}: check the name",
        "denied": f"{name}: the hub denies access ({{reason}}): {LOG_IN}",
        "refused": f"{name}: the hub refuses the request for {what} ({{reason}}): check the name",
        "disk": f"{what} of {name} cannot be written to {cache} ({{reason}}): free some space, or name another folder "
        "in HF_HOME",
        "network": f"{nothing_local} {what} of the hub's model could not be downloaded ({{reason}}): check the path or "
        "the network, and run again (complete files are kept)",
    }


# ---------------------------------------------------------------------------------------------------------------------
# upload


def upload(folder: Path, names: Sequence[str], repo: str, private: bool, log: Callable[[str], None]) -> str:
    """Upload files of a folder to a model repository on the hub in one commit, and return the repository's URL.

    A missing repository is created. Other files that it has are kept.

    Args:
        names: the files to upload, directly in the folder and not links.
        repo: user/name.
        private: create it as a private repository; the visibility of an existing one is checked, never changed.
        log: receives a line with the commit.

    Raises:
        UserError: a missing file, no token, no permission, a public repository despite `private`, no network.
    """
    from huggingface_hub import HfApi, errors, get_token

    from flatgpt.data.hub import with_retries

    if "/" not in repo or not NAME.fullmatch(repo):
        raise UserError(f"{repo}: a repository is named user/name")
    for name in names:
        file = folder / name
        if Path(name).name != name or file.is_symlink() or not file.is_file():
            raise UserError(f"{file}: only files directly in {folder} are uploaded, no links: put it there")
    token = get_token()
    if not token:
        raise UserError(f"{repo}: an upload needs a token with write access: `hf auth login` or HF_TOKEN; run again")
    api = HfApi(token=token)
    error_lines = _upload_errors(repo)

    def visibility() -> bool | None:
        """Return whether the repository is private; None if it does not exist, or not for this token."""
        try:
            return api.model_info(repo).private
        except errors.RepositoryNotFoundError:
            return None

    def commit():
        try:
            return api.upload_folder(
                repo_id=repo, folder_path=folder, allow_patterns=list(names), commit_message="Upload from flatGPT"
            )
        except ValueError as error:  # invalid metadata in README.md, or no space left in the large file storage
            if isinstance(error, (errors.HfHubHTTPError, errors.HFValidationError)):
                raise
            text = " ".join(str(error).split())
            raise UserError(f"{repo}: the hub refuses the upload ({text}): {NOTHING_COMMITTED}") from None

    is_private = with_retries(visibility, repo, error_lines)
    if private and is_private is False:
        raise UserError(
            f"private: {repo} already exists on the hub and is public: make it private at "
            f"https://huggingface.co/{repo}/settings, or choose another name"
        )
    if is_private is None:  # without --private the organisation's default holds, so never private=False
        with_retries(lambda: api.create_repo(repo, private=private or None, exist_ok=True), repo, error_lines)
    info = with_retries(commit, repo, error_lines)
    log(f"{repo}: commit {info.oid[:7]}")
    return f"{api.endpoint}/{repo}"


def _upload_errors(repo: str) -> dict[str, str]:
    """Return the error line of each kind of failure, for with_retries."""
    no_permission = (
        f"{repo}: the hub refuses the upload ({{reason}}): use your own name or your organisation's, and a token with "
        "write access (https://huggingface.co/settings/tokens), by `hf auth login` or HF_TOKEN"
    )
    return dict.fromkeys(("gated", "unknown", "denied", "absent"), no_permission) | {
        "offline": f"HF_HUB_OFFLINE is set, and {repo} is to be uploaded: unset it",
        "form": f"{repo}: a repository is named user/name",
        "refused": f"{repo}: the hub refuses the upload ({{reason}}): {NOTHING_COMMITTED}",
        "disk": f"{repo}: a file could not be read ({{reason}}): {NOTHING_COMMITTED}",
        "network": f"{repo} could not be uploaded ({{reason}}): {NOTHING_COMMITTED}; check the network and run again",
    }
