"""A model's files from and to the Hugging Face hub, through huggingface_hub (1.x and 2.x) and by way of its own cache.

Nothing outside the standard library is imported before the hub or its cache is asked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from config import UserError

OPENAI = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")  # known to the hub without a user's name
# The hub's rule for names is huggingface_hub's validate_repo_id.
NAME = re.compile(r"(?!.*(?:--|\.\.))(\w(?:[\w.-]{0,94}\w)?)(?:/\w(?:[\w.-]{0,94}\w)?)?", re.ASCII)
REVISION = re.compile(r"(?!.*\.\.)\w[\w./-]*", re.ASCII)
OF_FILES = (".pt", ".bin", ".safetensors", ".json", ".git")

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER = (
    *("tokenizer.json", "vocab.json", "merges.txt"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)
HALF = "nothing of it was committed"
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf")


def hub_name(path: str) -> str | None:
    """The model on the hub that --model_path or --init_from means: gpt2 or user/model, also with @revision.

    None where it means a place on this machine: that exists, or its first folder does (out/typo), or it looks like one.
    """
    name, at, revision = path.partition("@")
    form = NAME.fullmatch(name)
    if not form or name.lower().endswith(OF_FILES) or (at and not REVISION.fullmatch(revision)):
        return None
    if "/" not in name and name not in OPENAI:
        return None
    here = Path(path)
    local = form[1] == "out" or Path(form[1]).is_dir()  # where our runs go, also before the first one
    return None if local or here.exists() or here.is_symlink() else path


# ---------------------------------------------------------------------------------------------------------------------
# from the hub


def fetch_model(repo: str, log: Callable[[str], None]) -> Path:
    """The folder of a model of the hub: config.json, the tokenizer's files, and the weights as safetensors.

    It lies in huggingface_hub's cache and is named by its commit. Where it is whole already, the hub is not asked and
    need not be there: `user/model` stays what it was when it was fetched, `user/model@COMMIT` is what asks for another.

    Args:
        repo: as hub_name gives it.
        log: is told the commit.

    Raises:
        UserError: no such model, none in safetensors, no access, no network, no room.
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
        lambda: HfApi().model_info(name, revision=revision), what, _fetching(repo, what), MAX_RETRY_SECONDS
    )
    files = [file.rfilename for file in info.siblings]
    _check_files(repo, files)
    log(f"{repo}: commit {info.sha[:7]}, from the hub")

    def fetch(file: str, at: str) -> Path | None:
        """None where there is no such file, which the library notes down too."""

        def download() -> Path | None:
            try:
                return Path(hf_hub_download(name, file, revision=at))
            except errors.RemoteEntryNotFoundError:
                return None

        return with_retries(download, file, _fetching(repo, file))

    folder = fetch(CONFIG, info.sha).parent
    for file in TOKENIZER:  # before the weights: where these are, all is
        fetch(file, info.sha)
    for file in [WEIGHTS] if WEIGHTS in files else _shards(fetch(INDEX, info.sha)):
        if fetch(file, info.sha) is None:
            raise UserError(f"{repo}: {INDEX} names {file}, which is not there: the model is half uploaded")
    fetch(CONFIG, revision)  # now the library notes which commit the branch has
    return folder


def _cached(name: str, revision: str) -> Path | None:
    """The folder in the cache, if nothing is missing there."""
    from huggingface_hub import try_to_load_from_cache

    def known(file: str) -> str | object | None:
        """Its path; something else where the hub has told that there is none; None where it was not asked."""
        return try_to_load_from_cache(name, file, revision=revision)

    config, weights, index = known(CONFIG), known(WEIGHTS), known(INDEX)
    # `hf download` fetches all that there is, and notes nothing of what is not; others fetch the weights alone
    if not isinstance(config, str) or all(known(file) is None for file in TOKENIZER[:2]):
        return None
    folder = Path(config).parent
    if isinstance(weights, str):
        return folder
    if isinstance(index, str) and all((folder / shard).is_file() for shard in _shards(Path(index))):
        return folder
    return None


def _shards(index: Path) -> list[str]:
    """The files that the index of the weights names."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{index} is damaged: {error}; remove {index.parents[2]} and run again, or take another model"
        ) from None
    if wrong := [name for name in names if not re.fullmatch(r"[\w.-]+\.safetensors", str(name))]:
        raise UserError(f"{index}: {wrong[0]} is no safetensors file of the same folder; such a model is not loaded")
    return names


def _check_files(repo: str, files: list[str]) -> None:
    """Refuse a repository without what is loaded."""
    name = repo.partition("@")[0]
    if CONFIG not in files:
        raise UserError(f"{repo}: the hub's model of this name has no {CONFIG}: it is not one that transformers wrote")
    if WEIGHTS in files or INDEX in files:
        return
    there = [file for file in files if file.endswith(OTHER_WEIGHTS)]
    if not there:
        raise UserError(f"{repo}: the hub's model of this name has no {WEIGHTS}, and no other weights: check the name")
    pickle = ", which is a pickle, and reading one can run anybody's code" if there[0].endswith(".bin") else ""
    raise UserError(
        f"{repo} has no {WEIGHTS}, only {', '.join(there[:3])}{pickle}: take a model with safetensors, or, where you "
        f"trust it, write one with transformers: AutoModelForCausalLM.from_pretrained({name!r}).save_pretrained(FOLDER)"
    )


def _fetching(repo: str, what: str) -> dict[str, str]:
    """What to tell the user of each failure; for hub.with_retries."""
    from huggingface_hub import constants

    from flatgpt.data.hub import LOG_IN

    name, _, revision = repo.partition("@")
    cache = constants.HF_HUB_CACHE
    here = f"{repo}: no such file or folder here, and"
    return {
        "offline": f"{here} the hub's model is not in {cache}, or not all of it, while HF_HUB_OFFLINE is set: "
        "check the path, or unset it",
        "gated": f"{name} is gated: accept its terms at https://huggingface.co/{name}, then {LOG_IN}",
        "unknown": f"{here} the hub has none of this name, or it is private: check it; if it is yours, {LOG_IN}",
        "revision": f"{name} has no revision {revision}: check what follows the @",
        "absent": f"{name} has no {what}: check the name",
        "denied": f"{name}: the hub refuses access ({{reason}}): {LOG_IN}",
        "refused": f"{name}: the hub refuses to give {what} ({{reason}}): check the name",
        "disk": f"{what} of {name} cannot be written into {cache} ({{reason}}): make room, or name another folder "
        "in HF_HOME",
        "network": f"{here} {what} of the hub's model could not be fetched ({{reason}}): check the path or the network "
        "and run again (whole files are kept)",
    }


# ---------------------------------------------------------------------------------------------------------------------
# to the hub


def upload(folder: Path, names: Sequence[str], repo: str, private: bool, log: Callable[[str], None]) -> str:
    """Commit files of a folder to a model repository on the hub, which is made if it is missing; its address.

    One commit: all of them arrive, or none. Files of other names that the repository has stay there.

    Args:
        names: of files right in the folder; no others leave, and no links.
        repo: user/name.
        private: that nobody else may see it; of a repository that is there already it is checked, never changed.
        log: is told the commit.

    Raises:
        UserError: a missing file or a link, no token, no right to write, a public repository against `private`, no
            network.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, errors, get_token

    from flatgpt.data.hub import with_retries

    if "/" not in repo or not NAME.fullmatch(repo):
        raise UserError(f"{repo}: the hub's form is user/name")
    for name in names:
        file = folder / name
        if Path(name).name != name or file.is_symlink() or not file.is_file():
            raise UserError(f"{file}: only files that lie in {folder} itself are uploaded, no links: put it there")
    token = get_token()
    if not token:
        raise UserError(
            f"{repo}: uploading needs a token that may write: log in with `hf auth login` (or set HF_TOKEN), run again"
        )
    api = HfApi(token=token)
    sentences = _uploading(repo)

    def visibility() -> bool | None:
        """Whether it is private; None where there is none, or none that this token may see."""
        try:
            return api.model_info(repo).private
        except errors.RepositoryNotFoundError:
            return None

    def commit():
        added = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in names]
        try:
            return api.create_commit(repo, added, commit_message="Upload from flatGPT")
        except ValueError as error:  # README.md's header, or no room left in the large file storage
            if isinstance(error, (errors.HfHubHTTPError, errors.HFValidationError)):
                raise
            raise UserError(f"{repo}: the hub refuses the upload ({' '.join(str(error).split())}): {HALF}") from None

    there = with_retries(visibility, repo, sentences)
    if private and there is False:
        raise UserError(
            f"private: {repo} is on the hub already, for everybody to see: make it private at "
            f"https://huggingface.co/{repo}/settings, or choose another name"
        )
    if there is None:  # not private=False, which would override an organisation's default
        with_retries(lambda: api.create_repo(repo, private=private or None, exist_ok=True), repo, sentences)
    done = with_retries(commit, repo, sentences)
    log(f"{repo}: commit {done.oid[:7]}")
    return f"{api.endpoint}/{repo}"


def _uploading(repo: str) -> dict[str, str]:
    """What to tell the user of each failure; for hub.with_retries."""
    no_right = (
        f"{repo}: the hub refuses ({{reason}}): take a name of your own or of your organisation, and a token that may "
        "write (https://huggingface.co/settings/tokens), by `hf auth login` or HF_TOKEN"
    )
    return dict.fromkeys(("gated", "unknown", "denied", "absent"), no_right) | {
        "offline": f"HF_HUB_OFFLINE is set, and {repo} is to be uploaded: unset it",
        "form": f"{repo}: the hub's form is user/name",
        "refused": f"{repo}: the hub refuses the upload ({{reason}}): {HALF}",
        "disk": f"{repo}: a file could not be read ({{reason}}): {HALF}",
        "network": f"{repo} could not be uploaded ({{reason}}): {HALF}; check the network and run again",
    }
