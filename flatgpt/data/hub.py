"""List and download files of dataset repositories on the Hugging Face Hub, and find local copies.

huggingface_hub does the downloads. The list of a repository's files is cached next to them, so that a complete folder
is recognized without network access. interop/hub.py uses `hub_errors` for models.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from config import PrepareConfig, UserError
from flatgpt.data.readers import Corpus, RawFile, files_below
from flatgpt.data.shards import DAMAGED
from flatgpt.data.subsets import card_subsets, choose_files
from flatgpt.runtime.files import atomic_write

COMMIT = re.compile("[0-9a-f]{40}")
DUMP = "20231101.en"  # the default dump of Wikipedia
# Of a model's repository: what tokenizer_reader reads, and files by which it recognizes other kinds of tokenizers.
TOKENIZER_FILES = ["tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"]
TOKENIZER_FILES += ["added_tokens.json", "config.json", "vocab.txt", "spiece.model", "tokenizer.model"]
NUMBERED = re.compile(r"(.*?)(\d{5})-of-(\d{5})")  # train-00000-of-00041.parquet


class Repository(NamedTuple):
    """A dataset repository with a known layout.

    Attributes:
        commit: the commit that was tested.
        pattern: glob pattern of the files; {dump} stands for --dump.
        splits: the splits, if they are known in advance.
    """

    name: str
    commit: str
    pattern: str
    splits: tuple[str, ...] = ()


@dataclass(frozen=True)
class HubFiles:
    """The files of a dataset repository that a source consists of.

    Args:
        revision: a commit, a branch or a tag.
        patterns: glob patterns of the files' paths in the repository.
        root: local folder; files have the same relative paths as in the repository.
        flat: whether files may also be directly in `root`, without the repository's folders.
        splits: the splits of the repository, if they are known in advance.
    """

    repo: str
    revision: str
    patterns: tuple[str, ...]
    root: Path
    flat: bool = True
    splits: tuple[str, ...] = ()

    @property
    def listing_file(self) -> Path:
        """Path of the cached list of these files."""
        key = hashlib.sha256("\n".join([self.repo, self.revision, *self.patterns]).encode()).hexdigest()[:12]
        return self.root / f".listing-{key}.json"


# ---------------------------------------------------------------------------------------------------------------------
# files of a source


def hub_files(config: PrepareConfig, repository: Repository | None = None) -> HubFiles:
    """Return the files of the source's dataset repository.

    Args:
        repository: None: that of --repo.
    """
    root = Path(config.raw_dir) / config.source
    if repository is None:
        patterns = config.files or ("*.parquet", "*.jsonl", "*.jsonl.gz", "*.jsonl.zst")
        return HubFiles(config.repo, config.revision or "main", patterns, root / config.repo)
    dump, (name, commit, pattern, splits) = config.dump or DUMP, repository
    patterns = (pattern.format(dump=dump),)
    return HubFiles(name, config.revision or commit, patterns, root, flat=dump == DUMP, splits=splits)


def open_repository(config: PrepareConfig, repository: Repository | None = None) -> Corpus:
    """Return the source's files: local files, and files that are downloaded when they are first read.

    If the user put files into the folder, they are used without a request to the hub, unless file numbers
    (-00000-of-00041) or the known splits show that some are missing.

    Raises:
        UserError: see `list_remote`; or a local file has the wrong size.
    """
    files = hub_files(config, repository)
    notice, listing = "", list_remote(files) if config.refresh else cached_listing(files)
    if listing is None:
        found = _find_local(files, flat=files.flat and not config.files)
        names = choose_files(config, found)
        required = [split for split in files.splits if split in (config.splits or files.splits)] or list(names)
        if required and all(split in names and is_complete(names[split]) for split in required):
            raw = {s: [RawFile(n, found[n].stat().st_size, found[n]) for n in names[s]] for s in required}
            return Corpus(raw, files.revision, f"{files.root}: using the local files, without a request to the hub")
        listing = list_remote(files)
    elif listing["commit"] != files.revision and not config.refresh:
        cached = f"commit {listing['commit']}, cached in {files.listing_file}"
        notice = f"{files.repo} {files.revision}: {cached}; --refresh asks the hub for a newer one"
    names = choose_files(config, listing["files"], listing.get("subsets", {}))
    raw = {split: [_raw_file(files, listing, name) for name in group] for split, group in names.items()}
    return Corpus(raw, listing["commit"], notice)


def known_commit(config: PrepareConfig, repository: Repository | None = None) -> str | None:
    """Return the commit that the revision stands for, or None if that needs a request to the hub."""
    files = hub_files(config, repository)
    if config.refresh:
        return None
    listing = cached_listing(files)
    return listing["commit"] if listing else files.revision if COMMIT.fullmatch(files.revision) else None


def _find_local(files: HubFiles, flat: bool) -> dict[str, Path]:
    """Return the matching files that the user put into the folder: {path relative to root: path}, sorted.

    Args:
        flat: also return files directly in the folder, unless one with that name is where the repository has it.
    """
    paths = {path.relative_to(files.root).as_posix(): path for path in files_below(files.root)}
    paths = {name: path for name, path in paths.items() if name[0] != "." and not _downloaded_commit(files, name)}
    found = {name for name in paths if any(fnmatch(name, pattern) for pattern in files.patterns)}
    if flat:
        taken = {PurePosixPath(name).name.lower() for name in found}
        patterns = [pattern.rsplit("/", 1)[-1] for pattern in files.patterns]
        found |= {n for n in paths if "/" not in n and n.lower() not in taken and any(fnmatch(n, p) for p in patterns)}
    return {name: paths[name] for name in sorted(found)}


def _raw_file(files: HubFiles, listing: dict, name: str) -> RawFile:
    """Return a local file, or a file to be downloaded; update a file that was downloaded at another commit.

    A file directly in `root` is used if it can only be this one: it has its size, and no other file its name, without
    regard to case.
    """
    path, flat, size = files.root / name, files.root / PurePosixPath(name).name, listing["files"][name]
    if files.flat and not path.exists() and flat.is_file() and flat.stat().st_size == size:
        names = [PurePosixPath(other).name.lower() for other in (*listing["files"], *listing.get("root", ()))]
        path = flat if names.count(flat.name.lower()) == 1 else path
    if _downloaded_commit(files, name) not in (None, listing["commit"]):
        _download(files, listing["commit"], name)  # replaces the file if this commit changed it
    if path.exists() and not (path.is_file() and path.stat().st_size == size):
        found = f"has {path.stat().st_size:,} bytes" if path.is_file() else "is a folder"
        advice = "it is truncated or of another revision; move it away to download it again"
        raise UserError(f"{path} {found}, but {size:,} on the hub: {advice}")
    return RawFile(name, size, path, fetch=lambda: _download(files, listing["commit"], name))


def is_complete(names: list[str]) -> bool:
    """Return whether every numbered series (`-00000-of-00041`) is complete; other names are ignored."""
    numbers: dict[tuple[str, int], set[int]] = {}
    for name in names:
        if match := NUMBERED.match(name):
            numbers.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
    return all(len(found) == total for (_, total), found in numbers.items())


# ---------------------------------------------------------------------------------------------------------------------
# the hub


def cached_listing(files: HubFiles) -> dict | None:
    """Return the last result of `list_remote` for these files, or None if there is none or it is damaged."""
    with suppress(OSError, *DAMAGED):
        listing = json.loads(files.listing_file.read_text(encoding="utf-8"))
        if isinstance(listing["commit"], str) and {type(size) for size in listing["files"].values()} == {int}:
            return listing
    return None


def list_remote(files: HubFiles) -> dict:
    """List the matching files on the hub, and cache the result.

    Returns:
        `commit`; `files`: {path: size in bytes}; `root`: other files of the same names in no folder; and `subsets`, as
        `card_subsets` returns them.

    Raises:
        UserError: the repository, revision or files do not exist, or access or network is missing.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api = HfApi()
    copy = f"copy its files from another machine to {files.root}"
    with hub_errors(f"dataset {files.repo}, revision {files.revision}", copy):
        info = api.repo_info(files.repo, revision=files.revision, repo_type="dataset")
        commit = info.sha
        tree = api.list_repo_tree(files.repo, recursive=True, revision=commit, repo_type="dataset")
        sizes = {file.path: file.size for file in tree if isinstance(file, RepoFile)}
    found = {path: sizes[path] for path in sorted(sizes) if any(fnmatch(path, p) for p in files.patterns)}
    if not found:
        problem = f"dataset {files.repo} has no file {' '.join(files.patterns)} at revision {files.revision}"
        advice = "check --files, --dump and --revision; for other formats try --revision refs/convert/parquet"
        raise UserError(f"{problem}: {advice}")
    names = {PurePosixPath(path).name for path in found}
    listing = {"commit": commit, "files": found, "root": sorted(names & sizes.keys() - found.keys())}
    listing["subsets"] = card_subsets(info.card_data)
    files.root.mkdir(parents=True, exist_ok=True)
    atomic_write(files.listing_file, json.dumps(listing, indent=1).encode())
    return listing


def fetch_tokenizer(repo: str) -> Path:
    """Return a folder with the tokenizer's files of a model on the hub, from huggingface_hub's cache if it has them.

    Args:
        repo: user/name, optionally with @revision.

    Raises:
        UserError: no such repository, no access, no network.
    """
    from huggingface_hub import errors, snapshot_download

    name, _, revision = repo.partition("@")
    fetch = functools.partial(snapshot_download, name, revision=revision or "main", allow_patterns=TOKENIZER_FILES)
    with suppress(errors.LocalEntryNotFoundError, errors.HFValidationError):
        folder = Path(fetch(local_files_only=True))
        if any((folder / file).exists() for file in TOKENIZER_FILES[:2]):
            return folder
    copy = "copy its tokenizer.json from another machine and give its path"
    with hub_errors(f"tokenizer {repo}: no such file or folder, and no download from the hub", copy):
        return Path(fetch())


def _downloaded_commit(files: HubFiles, name: str) -> str | None:
    """Return the commit at which huggingface_hub downloaded the file; None if the user put the file there."""
    metadata = files.root / ".cache" / "huggingface" / "download" / f"{name}.metadata"
    return metadata.read_text(errors="replace").partition("\n")[0] if metadata.is_file() else None


def _download(files: HubFiles, commit: str, name: str) -> Path:
    """Download a file and return its path. The path does not exist until the file is complete."""
    from huggingface_hub import hf_hub_download

    with hub_errors(f"download of {name} of dataset {files.repo} to {files.root}"):
        return Path(hf_hub_download(files.repo, name, repo_type="dataset", revision=commit, local_dir=files.root))


@contextmanager
def hub_errors(what: str, offline: str = "") -> Iterator[None]:
    """Convert errors of huggingface_hub to a UserError: `what` was requested, the reason, and what to do.

    Args:
        offline: what to do without a network.
    """
    from huggingface_hub import errors

    log_in = "log in with `hf auth login` (or set HF_TOKEN) and run again"
    causes = {  # GatedRepoError before its base class
        errors.OfflineModeIsEnabled: "it is not completely on this machine, and HF_HUB_OFFLINE is set: unset it"
        + f", or {offline}" * bool(offline),
        errors.GatedRepoError: f"it is gated: accept the terms on its page on the hub, then {log_in}",
        errors.RepositoryNotFoundError: "it does not exist on the hub, or it is private: check the name; if you have "
        f"access to it, {log_in}",
        errors.RevisionNotFoundError: "it has no such revision on the hub: check the revision",
        errors.HFValidationError: "a repository name has the form user/name",
        errors.LocalTokenNotFoundError: f"it needs a token with write access: {log_in}",
    }
    http_error = errors.HfHubHTTPError.__bases__[0]  # httpx in huggingface_hub 1.x, httpx2 in 2.x
    try:
        yield
    except (http_error, OSError, ValueError, RuntimeError) as error:  # RuntimeError: from hf_xet
        if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__:
            error = error.__cause__  # the failed request
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        denied = getattr(getattr(error, "response", None), "status_code", None) in (401, 403)
        remedy = log_in if denied else "check the network and the disk, and run again (complete files are kept)"
        remedy += f"; without a network, {offline}" * bool(offline and not denied)
        cause = next((text for cls, text in causes.items() if isinstance(error, cls)), f"{reason}; {remedy}")
        raise UserError(f"{what}: {cause}") from None
