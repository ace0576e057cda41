"""Files of dataset repositories on the Hugging Face hub: what there is at a commit, and fetching it.

Downloads, progress bars and tokens are huggingface_hub's (1.x and 2.x). What the hub said is written down beside the
files, so that a folder can be told whole from half without a network.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path

from config import UserError
from shards import write_whole

ATTEMPTS = 4  # with 1, 2 and 4 seconds in between
PATIENCE = 15  # seconds after which no further attempt is made to ask; the library has made its own by then
COMMIT = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True)
class Listing:
    """The files of a repository that match some patterns, at one commit: {path: bytes} and {path: the hub's hash}."""

    repo: str
    commit: str
    files: dict[str, int]
    hashes: dict[str, str]


def listing_file(root: Path, repo: str, revision: str, patterns: tuple[str, ...]) -> Path:
    """Where the hub's answer to this question is written down."""
    key = hashlib.sha256("\n".join([repo, revision, *patterns]).encode()).hexdigest()[:12]
    return root / f".listing-{key}.json"


def recorded(root: Path, repo: str, revision: str, patterns: tuple[str, ...]) -> Listing | None:
    """What the hub said when it was asked last for this; None where it never was."""
    try:
        return Listing(**json.loads(listing_file(root, repo, revision, patterns).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def ask(root: Path, repo: str, revision: str, patterns: tuple[str, ...], check: str) -> Listing:
    """Ask the hub which files match, and write the answer into `root`.

    Args:
        check: what to look at where there are none.

    Raises:
        UserError: no such repository, revision or files, no access, no network.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api = HfApi()
    folder = "/".join(re.split(r"[*?\[]", patterns[0])[0].split("/")[:-1]) if len(patterns) == 1 else ""

    def listing() -> Listing:
        commit = revision
        if not COMMIT.fullmatch(revision):
            commit = api.repo_info(repo, revision=revision, repo_type="dataset").sha
        tree = api.list_repo_tree(repo, folder or None, recursive=True, revision=commit, repo_type="dataset")
        files = [f for f in tree if isinstance(f, RepoFile) and any(fnmatch(f.path, p) for p in patterns)]
        files.sort(key=lambda file: file.path)
        hashes = {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in files}
        return Listing(repo, commit, {file.path: file.size for file in files}, hashes)

    what = f"folder {folder}" if folder else "list of files"
    found = _patiently(listing, repo, revision, what, root, check, PATIENCE)
    if not found.files:
        raise UserError(
            f"dataset {repo} at revision {revision} has no file {' '.join(patterns)}: check {check}; the hub converts "
            "many other formats: --revision refs/convert/parquet"
        )
    root.mkdir(parents=True, exist_ok=True)
    path = listing_file(root, repo, revision, patterns)
    write_whole(path, json.dumps(asdict(found), indent=1).encode())
    return found


def fetched(root: Path, path: str) -> tuple[str, str] | None:
    """Commit and hash of a file that was fetched into `root`; None of one that somebody put there."""
    try:
        commit, digest, *_ = _notes(root, path).read_text().splitlines()
    except (OSError, ValueError):
        return None
    return commit, digest


def _notes(root: Path, path: str) -> Path:
    return root / ".cache" / "huggingface" / "download" / f"{path}.metadata"


def fetch(listing: Listing, path: str, root: Path, check: str) -> Path:
    """Download one file to root/path, where it appears when it is whole; its path. Arguments and errors as in `ask`."""
    from huggingface_hub import hf_hub_download

    target = root / path
    if target.exists():  # never handed to the library, which would replace it
        return target
    # A killed download leaves its temporary file, which nobody will use again.
    for stale in _notes(root, path).parent.glob("*.incomplete"):
        if time.time() - stale.stat().st_mtime > 3600:
            stale.unlink(missing_ok=True)

    def download() -> Path:
        where = {"repo_type": "dataset", "revision": listing.commit, "local_dir": root}
        return Path(hf_hub_download(listing.repo, path, **where))

    return _patiently(download, listing.repo, listing.commit, path, root, check)


def _patiently(call: Callable, repo: str, revision: str, what: str, root: Path, check: str, patience: float = math.inf):
    """call(), again after a broken connection; other failures as UserError."""
    from huggingface_hub import constants, errors

    began = time.monotonic()
    for attempt in range(ATTEMPTS):
        try:
            return call()
        except Exception as why:
            if isinstance(why, errors.LocalEntryNotFoundError) and why.__cause__:
                why = why.__cause__  # what went wrong when it asked for the file
            if refusal := _refusal(why, repo, revision, what, root, check):
                raise UserError(refusal) from None
            # huggingface_hub speaks through httpx (1.x) or httpx2 (2.x), whose errors are no OSErrors; and through
            # hf_xet, which has RuntimeErrors, after minutes of trying: then plain HTTP is left
            xet = type(why) is RuntimeError and not constants.HF_HUB_DISABLE_XET
            network = type(why).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2")
            of_disk = getattr(why, "errno", None) and not isinstance(why, (ConnectionError, TimeoutError))
            if of_disk or not (xet or network or isinstance(why, OSError)):
                raise
            constants.HF_HUB_DISABLE_XET |= xet
            reason = (str(why).strip() or type(why).__name__).splitlines()[0]
            if attempt + 1 == ATTEMPTS or time.monotonic() - began > patience:
                raise UserError(
                    f"{what} of dataset {repo} could not be fetched ({reason}): check the network and run again "
                    f"(whole files are kept, this one starts anew), or put the files into {root} yourself"
                ) from None
            print(f"{what}: the connection broke ({reason}); again", file=sys.stderr)
            time.sleep(2**attempt)


def _refusal(why: Exception, repo: str, revision: str, what: str, root: Path, check: str) -> str:
    """What to tell the user of an error that another attempt would not mend; empty for others."""
    from huggingface_hub import errors

    status = getattr(getattr(why, "response", None), "status_code", None)
    log_in = "log in with `hf auth login` (or set HF_TOKEN) and run again"
    if isinstance(why, errors.OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE is set, and {what} of dataset {repo} is not in {root}: unset it, or put the files there"
    if isinstance(why, errors.GatedRepoError):
        return f"dataset {repo} is gated: accept its terms at https://huggingface.co/datasets/{repo}, then {log_in}"
    if isinstance(why, errors.RepositoryNotFoundError):
        return f"dataset {repo}: the hub has none of this name, or it is private: check it; if it is yours, {log_in}"
    if isinstance(why, errors.RevisionNotFoundError):
        return f"dataset {repo} has no revision {revision}: check --revision"
    if isinstance(why, errors.HFValidationError):
        return f"repo = {repo}: the hub's form is user/name"
    if status == 404 or isinstance(why, errors.RemoteEntryNotFoundError):
        return f"dataset {repo} has no {what} at revision {revision}: check {check}"
    if status in (401, 403):
        return f"dataset {repo}: the hub refuses access (HTTP {status}): {log_in}"
    return ""
