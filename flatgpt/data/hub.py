"""Files of dataset repositories on the Hugging Face Hub: list them, download them, and find those on the disk.

Downloads, their retries, progress bars and tokens are huggingface_hub's. The list of a repository's files is kept next
to them, so that a complete folder is recognized without a network. `hub_errors` serves models too (interop/hub.py).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from config import PrepareConfig, UserError
from flatgpt.data.readers import Corpus, RawFile
from flatgpt.data.shards import SPLITS
from flatgpt.runtime.files import atomic_write

COMMIT = re.compile("[0-9a-f]{40}")
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
    """

    repo: str
    revision: str
    patterns: tuple[str, ...]
    root: Path
    flat: bool = True
    splits: tuple[str, ...] = ()

    @property
    def listing_file(self) -> Path:
        """Where the list of these files is cached."""
        key = hashlib.sha256("\n".join([self.repo, self.revision, *self.patterns]).encode()).hexdigest()[:12]
        return self.root / f".listing-{key}.json"


# ---------------------------------------------------------------------------------------------------------------------
# a source's files


def open_repository(config: PrepareConfig, files: HubFiles) -> Corpus:
    """Return the source's files: those in raw_dir, and the others to be downloaded when they are needed.

    A folder that the user filled is taken as it is, unless its files' numbers (-00000-of-00041) or the known splits
    show that files are missing.

    Raises:
        UserError: as `list_remote`; also a local file of another size.
    """
    notice, listing = "", cached_listing(files)
    if listing is None:
        found = _find_local(files)
        names = group_by_split(_choose_files(config, found))
        required = [split for split in files.splits if split in (config.splits or files.splits)] or list(names)
        if required and all(split in names and is_complete(names[split]) for split in required):
            raw = {s: [RawFile(n, found[n].stat().st_size, found[n]) for n in names[s]] for s in required}
            return Corpus(raw, files.revision, f"{files.root}: taking its files as they are, without asking the hub")
        listing = list_remote(files)
    elif listing["commit"] != files.revision:
        notice = f"{files.repo} {files.revision}: commit {listing['commit']}, as cached in {files.listing_file}"
    names = group_by_split(_choose_files(config, listing["files"]))
    raw = {split: [_raw_file(files, listing, name) for name in group] for split, group in names.items()}
    return Corpus(raw, listing["commit"], notice)


def known_commit(files: HubFiles) -> str | None:
    """Return the commit of the source's files where it is known without a network."""
    listing = cached_listing(files)
    return listing["commit"] if listing else files.revision if COMMIT.fullmatch(files.revision) else None


def _find_local(files: HubFiles) -> dict[str, Path]:
    """Return the matching files that the user put into the folder: {path relative to root: path}, sorted."""
    found = {}
    for path in sorted(path for path in files.root.rglob("*") if path.is_file()):
        name = path.relative_to(files.root).as_posix()
        if name.startswith(".") or _downloaded_commit(files, name):
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


def _raw_file(files: HubFiles, listing: dict, name: str) -> RawFile:
    flat = files.root / PurePosixPath(name).name
    path, size = flat if files.flat and flat.exists() else files.root / name, listing["files"][name]
    if _downloaded_commit(files, name) not in (None, listing["commit"]):
        _download(files, listing["commit"], name)  # replaces the file if it is another one at this commit
    if path.exists() and path.stat().st_size != size:
        raise UserError(
            f"{path} has {path.stat().st_size:,} bytes, the hub's file has {size:,}: it is truncated, or of another "
            "revision; move it away to download it again"
        )
    return RawFile(name, size, path, fetch=lambda: _download(files, listing["commit"], name))


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


def cached_listing(files: HubFiles) -> dict | None:
    """Return the listing that `list_remote` last stored for these files; None without one."""
    try:
        return json.loads(files.listing_file.read_text())
    except (OSError, ValueError):
        return None


def list_remote(files: HubFiles) -> dict:
    """Ask the hub which files match; store the answer and return it: `commit`, and `files`, {path: bytes}.

    Raises:
        UserError: no such repository, revision or files, no access, no network.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api = HfApi()
    with hub_errors(f"dataset {files.repo}, revision {files.revision}"):
        commit = api.repo_info(files.repo, revision=files.revision, repo_type="dataset").sha
        tree = api.list_repo_tree(files.repo, recursive=True, revision=commit, repo_type="dataset")
        sizes = {file.path: file.size for file in tree if isinstance(file, RepoFile)}
    found = {path: sizes[path] for path in sorted(sizes) if any(fnmatch(path, p) for p in files.patterns)}
    if not found:
        raise UserError(
            f"dataset {files.repo} has no file {' '.join(files.patterns)} at revision {files.revision}: check --files, "
            "--dump and --revision; the hub converts many other formats: --revision refs/convert/parquet"
        )
    listing = {"commit": commit, "files": found}
    files.root.mkdir(parents=True, exist_ok=True)
    atomic_write(files.listing_file, json.dumps(listing, indent=1).encode())
    return listing


def _downloaded_commit(files: HubFiles, name: str) -> str | None:
    """Return the commit of a file that was downloaded into the folder; None for one that the user put there."""
    metadata = files.root / ".cache" / "huggingface" / "download" / f"{name}.metadata"  # of huggingface_hub
    return metadata.read_text().partition("\n")[0] if metadata.exists() else None


def _download(files: HubFiles, commit: str, name: str) -> Path:
    """Download one file and return its path, which exists only once the file is complete. Raises as `list_remote`."""
    from huggingface_hub import hf_hub_download

    with hub_errors(f"{name} of dataset {files.repo}, to be put into {files.root}"):
        return Path(hf_hub_download(files.repo, name, repo_type="dataset", revision=commit, local_dir=files.root))


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turn errors of huggingface_hub into a UserError of one line: what was asked for, the reason, and what to do."""
    from huggingface_hub import errors

    log_in = "log in with `hf auth login` (or set HF_TOKEN) and run again"
    causes = {  # GatedRepoError comes before its base class
        errors.OfflineModeIsEnabled: "not all of it is on this machine, and HF_HUB_OFFLINE is set: unset it",
        errors.GatedRepoError: f"it is gated: accept its terms on its page of the hub, then {log_in}",
        errors.RepositoryNotFoundError: "it does not exist on the hub, or it is private: check the name; if you have "
        f"access to it, {log_in}",
        errors.RevisionNotFoundError: "the hub has no such revision of it: check the revision",
        errors.HFValidationError: "a repository is named user/name",
        errors.LocalTokenNotFoundError: f"it takes a token with write access: {log_in}",
    }
    http_error = errors.HfHubHTTPError.__bases__[0]  # of httpx in huggingface_hub 1.x, of httpx2 in 2.x
    try:
        yield
    except (http_error, OSError, ValueError, RuntimeError) as error:  # RuntimeError: hf_xet's
        if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__:
            error = error.__cause__  # the failed request
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        denied = getattr(getattr(error, "response", None), "status_code", None) in (401, 403)
        remedy = log_in if denied else "check the network and the disk, and run again (complete files are kept)"
        cause = next((text for kind, text in causes.items() if isinstance(error, kind)), f"{reason}; {remedy}")
        raise UserError(f"{what}: {cause}") from None
