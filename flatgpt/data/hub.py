"""Files of dataset repositories on the Hugging Face Hub: list them, download them, and find those on the disk.

Downloads, progress bars and tokens are huggingface_hub's (1.x and 2.x). The list of a repository's files is kept next
to them, so that a complete folder is recognized without a network. `with_retries` serves models too (interop/hub.py).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from config import PrepareConfig, UserError
from flatgpt.data.readers import Corpus, RawFile
from flatgpt.data.shards import SPLITS
from flatgpt.runtime.files import atomic_write

MAX_ATTEMPTS = 4  # with 1, 2 and 4 seconds in between
MAX_RETRY_SECONDS = 15  # no further attempt at a short request after this; huggingface_hub has retried by itself
RETRYABLE_STATUS = (408, 409, 412, 425, 429)  # HTTP status of a busy server: the same request may succeed later
COMMIT = re.compile("[0-9a-f]{40}")
LOG_IN = "log in with `hf auth login` (or set HF_TOKEN) and run again"
# The words for splits in the names of files and folders.
SPLIT_WORDS = {"train": "train", "training": "train", "test": "test", "testing": "test", "val": "val", "dev": "val"}
SPLIT_WORDS |= {"valid": "val", "validation": "val"}
NUMBERED = re.compile(r"(.*?)(\d{5})-of-(\d{5})")  # train-00000-of-00041.parquet


@dataclass(frozen=True)
class HubFiles:
    """The files of a dataset repository that make a source.

    Args:
        revision: a commit, a branch or a tag.
        patterns: of the files' paths in the repository.
        root: local folder, in which files have the same paths as in the repository.
        flat: whether matching files right in `root`, without the repository's folders, belong to the source too.
        splits: the splits that the repository is known to have.
        check: the option to name when the repository has no such files.
    """

    repo: str
    revision: str
    patterns: tuple[str, ...]
    root: Path
    flat: bool = True
    splits: tuple[str, ...] = ()
    check: str = "--revision"

    @property
    def listing_file(self) -> Path:
        """Where the list of these files is cached."""
        key = hashlib.sha256("\n".join([self.repo, self.revision, *self.patterns]).encode()).hexdigest()[:12]
        return self.root / f".listing-{key}.json"


@dataclass(frozen=True)
class Listing:
    """A repository's matching files at one commit: {path: bytes} and {path: the hub's hash}."""

    repo: str
    commit: str
    files: dict[str, int]
    hashes: dict[str, str]


# ---------------------------------------------------------------------------------------------------------------------
# a source's files


def open_repository(config: PrepareConfig, files: HubFiles) -> Corpus:
    """Return the source's files: those in raw_dir, and the others to be downloaded when they are needed.

    A folder that the user filled is taken as it is, unless its files' numbers (-00000-of-00041) or the known splits
    show that files are missing.

    Raises:
        UserError: as `list_remote`; also a local file of another size or revision.
    """
    notice = ""
    if (listing := cached_listing(files)) is None:
        found = _find_local(files)
        names = group_by_split(_choose_files(config, found))
        required = [split for split in files.splits if split in (config.splits or files.splits)] or list(names)
        if required and all(split in names and is_complete(names[split]) for split in required):
            raw = {s: [RawFile(n, found[n].stat().st_size, found[n]) for n in names[s]] for s in required}
            count = sum(map(len, raw.values()))
            notice = f"{files.root}: taking its {count} file{'s' * (count > 1)} as they are, without asking the hub"
            return Corpus(raw, files.revision, notice)
        listing = list_remote(files)
    elif listing.commit != files.revision:
        notice = f"{files.repo} {files.revision}: commit {listing.commit}, as cached in {files.listing_file}"
    names = group_by_split(_choose_files(config, listing.files))
    raw = {split: [_raw_file(files, listing, name) for name in group] for split, group in names.items()}
    return Corpus(raw, listing.commit, notice)


def known_commit(files: HubFiles) -> str | None:
    """Return the commit of the source's files where it is known without a network."""
    listing = cached_listing(files)
    return listing.commit if listing else files.revision if COMMIT.fullmatch(files.revision) else None


def _find_local(files: HubFiles) -> dict[str, Path]:
    """Return the matching files that the user put into the folder: {path relative to root: path}, sorted."""
    found = {}
    for path in sorted(files.root.rglob("*")) if files.root.is_dir() else []:
        name = path.relative_to(files.root).as_posix()
        if not path.is_file() or name.startswith(".") or download_metadata(files.root, name):
            continue
        flat = [p.rsplit("/", 1)[-1] for p in files.patterns] if files.flat and "/" not in name else []
        if any(fnmatch(name, pattern) for pattern in (*files.patterns, *flat)):
            found[name] = path
    return found


def _choose_files(config: PrepareConfig, names: Iterable[str]) -> list[str]:
    """Choose files where --files does not: the parquet files if there are any; all have to be in one folder."""
    if config.source != "hub" or config.files:
        return list(names)
    chosen = [name for name in names if name.endswith(".parquet")] or list(names)
    folders = sorted({str(PurePosixPath(name).parent) for name in chosen})
    if len(folders) > 1:
        raise UserError(
            f"dataset {config.repo} has its files in {len(folders)} folders ({', '.join(folders[:8])}"
            f"{', ...' * (len(folders) > 8)}): choose with --files '{folders[0]}/*' (all: '*.parquet')"
        )
    return chosen


def _raw_file(files: HubFiles, listing: Listing, name: str) -> RawFile:
    flat = files.root / PurePosixPath(name).name
    path = flat if files.flat and flat.exists() else files.root / name
    size, downloaded = listing.files[name], download_metadata(files.root, name)
    if path.exists() and path.stat().st_size != size:
        raise UserError(
            f"{path} has {path.stat().st_size:,} bytes, the hub's file has {size:,}: it is truncated, or of another "
            "revision; move it away to download it again"
        )
    if path.exists() and downloaded and listing.commit != downloaded[0] and listing.hashes[name] != downloaded[1]:
        raise UserError(f"{path} was downloaded at another revision: move it away to download this one")
    return RawFile(name, size, path, fetch=lambda: download_file(files, listing, name))


def group_by_split(names: Iterable[str]) -> dict[str, list[str]]:
    """Group file names by the split that the file's name, else its folders' names, contain; `train` without one."""
    found: dict[str, list[str]] = {}
    for name in names:
        words = [w for part in reversed(PurePosixPath(name).parts) for w in re.split(r"[^a-z]+", part.lower())]
        split = next((SPLIT_WORDS[w] for w in words if w in SPLIT_WORDS), "train")
        found.setdefault(split, []).append(name)
    return {split: found[split] for split in SPLITS if split in found}


def is_complete(names: list[str]) -> bool:
    """Return whether all of a numbered series (`-00000-of-00041`) are present; names without numbers always are."""
    numbers: dict[tuple[str, int], set[int]] = {}
    for name in names:
        if match := NUMBERED.match(name):
            numbers.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
    return all(len(found) == total for (_, total), found in numbers.items())


# ---------------------------------------------------------------------------------------------------------------------
# the hub


def cached_listing(files: HubFiles) -> Listing | None:
    """Return the listing that `list_remote` last stored for these files; None without one."""
    try:
        return Listing(**json.loads(files.listing_file.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def list_remote(files: HubFiles) -> Listing:
    """Ask the hub which files match, and store the answer.

    Raises:
        UserError: no such repository, revision or files, no access, no network.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api, repo, revision, patterns = HfApi(), files.repo, files.revision, files.patterns
    folder = "/".join(re.split(r"[*?\[]", patterns[0])[0].split("/")[:-1]) if len(patterns) == 1 else ""

    def request() -> Listing:
        commit = revision
        if not COMMIT.fullmatch(revision):
            commit = api.repo_info(repo, revision=revision, repo_type="dataset").sha
        tree = api.list_repo_tree(repo, folder or None, recursive=True, revision=commit, repo_type="dataset")
        found = [f for f in tree if isinstance(f, RepoFile) and any(fnmatch(f.path, p) for p in patterns)]
        found.sort(key=lambda file: file.path)
        hashes = {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in found}
        return Listing(repo, commit, {file.path: file.size for file in found}, hashes)

    what = f"folder {folder}" if folder else "list of files"
    listing = with_retries(request, what, _error_lines(files, revision, what), MAX_RETRY_SECONDS)
    if not listing.files:
        raise UserError(
            f"dataset {repo} at revision {revision} has no file {' '.join(patterns)}: check {files.check}; the hub "
            "converts many other formats: --revision refs/convert/parquet"
        )
    files.root.mkdir(parents=True, exist_ok=True)
    atomic_write(files.listing_file, json.dumps(asdict(listing), indent=1).encode())
    return listing


def download_metadata(root: Path, name: str) -> tuple[str, str] | None:
    """Return (commit, hash) of a file that was downloaded into `root`; None for one that the user put there."""
    try:
        commit, digest, *_ = _metadata_file(root, name).read_text().splitlines()
    except (OSError, ValueError):
        return None
    return commit, digest


def _metadata_file(root: Path, name: str) -> Path:
    return root / ".cache" / "huggingface" / "download" / f"{name}.metadata"  # huggingface_hub's, of local_dir


def download_file(files: HubFiles, listing: Listing, name: str) -> Path:
    """Download one file and return its path, which exists only once the file is complete. Raises as `list_remote`."""
    from huggingface_hub import hf_hub_download

    target = files.root / name
    if target.exists():  # huggingface_hub would replace it
        return target
    # A killed download leaves a temporary file that is not used again.
    for stale in _metadata_file(files.root, name).parent.glob("*.incomplete"):
        if time.time() - stale.stat().st_mtime > 3600:
            stale.unlink(missing_ok=True)

    def request() -> Path:
        where = {"repo_type": "dataset", "revision": listing.commit, "local_dir": files.root}
        return Path(hf_hub_download(listing.repo, name, **where))

    return with_retries(request, name, _error_lines(files, listing.commit, name))


def _error_lines(files: HubFiles, revision: str, what: str) -> dict[str, str]:
    """Return the error line of each kind of failure, for `with_retries`."""
    repo, root = files.repo, files.root
    return {
        "offline": f"HF_HUB_OFFLINE is set, and {what} of dataset {repo} is not in {root}: unset it, or put the files "
        "there",
        "gated": f"dataset {repo} is gated: accept its terms at https://huggingface.co/datasets/{repo}, then {LOG_IN}",
        "unknown": f"dataset {repo} does not exist on the hub, or it is private: check the name; if it is yours, "
        f"{LOG_IN}",
        "revision": f"dataset {repo} has no revision {revision}: check --revision",
        "form": f"repo = {repo}: a repository is named user/name",
        "absent": f"dataset {repo} has no {what} at revision {revision}: check {files.check}",
        "denied": f"dataset {repo}: the hub denies access ({{reason}}): {LOG_IN}",
        "network": f"{what} of dataset {repo} could not be downloaded ({{reason}}): check the network and run again "
        f"(complete files are kept, this one starts anew), or put the files into {root} yourself",
    }


# ---------------------------------------------------------------------------------------------------------------------
# failures


def with_retries(call: Callable, what: str, error_lines: dict[str, str], max_seconds: float = math.inf):
    """Return call(), repeated after network errors; turn other failures of the hub into a UserError.

    Args:
        what: what is requested, for the line about another attempt.
        error_lines: the message of each kind of failure (`_classify`), in which {reason} stands for the error's own
            text. `network` is required. A kind without a message is retried if the network may be the cause, else
            raised as it is.
        max_seconds: no further attempt after this many seconds.
    """
    from huggingface_hub import constants, errors

    began = time.monotonic()
    for attempt in range(MAX_ATTEMPTS):
        try:
            return call()
        except Exception as error:
            if isinstance(error, (errors.LocalEntryNotFoundError, RuntimeError)) and error.__cause__:
                error = error.__cause__  # the failed request
            kind, reason = _classify(error)
            if kind in error_lines and kind != "network":
                raise UserError(error_lines[kind].replace("{reason}", reason)) from None
            # The errors of httpx (huggingface_hub 1.x) and httpx2 (2.x) are not OSErrors. hf_xet raises RuntimeErrors
            # after minutes of retries: then plain HTTP is left.
            xet = type(error) is RuntimeError and not constants.HF_HUB_DISABLE_XET
            network = type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2")
            if kind == "disk" or not (xet or network or isinstance(error, OSError)):
                raise
            constants.HF_HUB_DISABLE_XET |= xet
            if attempt + 1 == MAX_ATTEMPTS or time.monotonic() - began > max_seconds:
                raise UserError(error_lines["network"].replace("{reason}", reason)) from None
            print(f"{what}: the connection broke ({reason}); trying again", file=sys.stderr)
            time.sleep(2**attempt)


def _classify(error: Exception) -> tuple[str, str]:
    """Return the kind of failure, and the error's text in one line. Only `network` errors may pass by themselves."""
    from huggingface_hub import errors

    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    status = getattr(getattr(error, "response", None), "status_code", None)
    kinds = {
        errors.OfflineModeIsEnabled: "offline",
        errors.GatedRepoError: "gated",  # before its base class RepositoryNotFoundError
        errors.RepositoryNotFoundError: "unknown",
        errors.RevisionNotFoundError: "revision",
        errors.HFValidationError: "form",
        errors.RemoteEntryNotFoundError: "absent",
    }
    for kind in kinds:
        if isinstance(error, kind):
            return kinds[kind], reason
    if status == 404:
        return "absent", reason
    if status and 400 <= status < 500 and status not in RETRYABLE_STATUS:
        text = (getattr(error, "server_message", None) or "").strip().splitlines()[:1]
        return "denied" if status in (401, 403) else "refused", ": ".join([f"HTTP {status}", *text])
    if getattr(error, "errno", None) and not isinstance(error, (ConnectionError, TimeoutError)):
        return "disk", getattr(error, "strerror", None) or reason
    return "network", reason
