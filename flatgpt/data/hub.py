"""Files of dataset repositories on the Hugging Face hub: what there is at a commit, and fetching it.

Downloads, progress bars and tokens are huggingface_hub's (1.x and 2.x). What the hub said is written down beside the
files, so that a folder can be told whole from half without a network. `with_retries` is how models are asked for too.
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
from flatgpt.runtime.files import atomic_write

MAX_ATTEMPTS = 4  # with 1, 2 and 4 seconds in between
MAX_RETRY_SECONDS = 15  # seconds after which no further attempt is made to ask; the library has made its own by then
COMMIT = re.compile("[0-9a-f]{40}")
RETRYABLE_STATUS = (408, 409, 412, 425, 429)  # HTTP's of a hub that is busy: later the same request may do
LOG_IN = "log in with `hf auth login` (or set HF_TOKEN) and run again"


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


def cached_listing(root: Path, repo: str, revision: str, patterns: tuple[str, ...]) -> Listing | None:
    """What the hub said when it was asked last for this; None where it never was."""
    try:
        return Listing(**json.loads(listing_file(root, repo, revision, patterns).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def list_remote(root: Path, repo: str, revision: str, patterns: tuple[str, ...], check: str) -> Listing:
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
    found = with_retries(listing, what, _error_lines(repo, revision, what, root, check), MAX_RETRY_SECONDS)
    if not found.files:
        raise UserError(
            f"dataset {repo} at revision {revision} has no file {' '.join(patterns)}: check {check}; the hub converts "
            "many other formats: --revision refs/convert/parquet"
        )
    root.mkdir(parents=True, exist_ok=True)
    path = listing_file(root, repo, revision, patterns)
    atomic_write(path, json.dumps(asdict(found), indent=1).encode())
    return found


def download_metadata(root: Path, path: str) -> tuple[str, str] | None:
    """Commit and hash of a file that was fetched into `root`; None of one that somebody put there."""
    try:
        commit, digest, *_ = _metadata_file(root, path).read_text().splitlines()
    except (OSError, ValueError):
        return None
    return commit, digest


def _metadata_file(root: Path, path: str) -> Path:
    return root / ".cache" / "huggingface" / "download" / f"{path}.metadata"


def download_file(listing: Listing, path: str, root: Path, check: str) -> Path:
    """Download one file to root/path, where it appears when it is whole; its path. Errors as in `list_remote`."""
    from huggingface_hub import hf_hub_download

    target = root / path
    if target.exists():  # never handed to the library, which would replace it
        return target
    # A killed download leaves its temporary file, which nobody will use again.
    for stale in _metadata_file(root, path).parent.glob("*.incomplete"):
        if time.time() - stale.stat().st_mtime > 3600:
            stale.unlink(missing_ok=True)

    def download() -> Path:
        where = {"repo_type": "dataset", "revision": listing.commit, "local_dir": root}
        return Path(hf_hub_download(listing.repo, path, **where))

    return with_retries(download, path, _error_lines(listing.repo, listing.commit, path, root, check))


def _error_lines(repo: str, revision: str, what: str, root: Path, check: str) -> dict[str, str]:
    """What to tell the user of each failure; for `with_retries`."""
    page = f"https://huggingface.co/datasets/{repo}"
    return {
        "offline": f"HF_HUB_OFFLINE is set, and {what} of dataset {repo} is not in {root}: unset it, or put the files "
        "there",
        "gated": f"dataset {repo} is gated: accept its terms at {page}, then {LOG_IN}",
        "unknown": f"dataset {repo}: the hub has none of this name, or it is private: check it; if it is yours, "
        f"{LOG_IN}",
        "revision": f"dataset {repo} has no revision {revision}: check --revision",
        "form": f"repo = {repo}: the hub's form is user/name",
        "absent": f"dataset {repo} has no {what} at revision {revision}: check {check}",
        "denied": f"dataset {repo}: the hub refuses access ({{reason}}): {LOG_IN}",
        "network": f"{what} of dataset {repo} could not be fetched ({{reason}}): check the network and run again "
        f"(whole files are kept, this one starts anew), or put the files into {root} yourself",
    }


def with_retries(call: Callable, what: str, error_lines: dict[str, str], max_seconds: float = math.inf):
    """call(), again after a broken connection; other failures as UserError.

    Args:
        what: what is asked for, in the lines about further attempts.
        error_lines: the error line of each kind of failure (`_classify`); {reason} stands for the error's text. Kinds
            that are left out are tried again, or are no mistake of the user's: `network` there has to be.
        max_seconds: seconds after which no further attempt is made.
    """
    from huggingface_hub import constants, errors

    began = time.monotonic()
    for attempt in range(MAX_ATTEMPTS):
        try:
            return call()
        except Exception as error:
            if isinstance(error, (errors.LocalEntryNotFoundError, RuntimeError)) and error.__cause__:
                error = error.__cause__  # what went wrong when it asked for the file, or sent it
            kind, reason = _classify(error)
            if kind in error_lines and kind != "network":
                raise UserError(error_lines[kind].replace("{reason}", reason)) from None
            # huggingface_hub speaks through httpx (1.x) or httpx2 (2.x), whose errors are no OSErrors; and through
            # hf_xet, which has RuntimeErrors, after minutes of trying: then plain HTTP is left
            xet = type(error) is RuntimeError and not constants.HF_HUB_DISABLE_XET
            network = type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2")
            if kind == "disk" or not (xet or network or isinstance(error, OSError)):
                raise
            constants.HF_HUB_DISABLE_XET |= xet
            if attempt + 1 == MAX_ATTEMPTS or time.monotonic() - began > max_seconds:
                raise UserError(error_lines["network"].replace("{reason}", reason)) from None
            print(f"{what}: the connection broke ({reason}); again", file=sys.stderr)
            time.sleep(2**attempt)


def _classify(error: Exception) -> tuple[str, str]:
    """(which kind of failure it is, in one line what it says). `network` is all that another attempt may mend."""
    from huggingface_hub import errors

    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "offline", reason
    if isinstance(error, errors.GatedRepoError):
        return "gated", reason
    if isinstance(error, errors.RepositoryNotFoundError):
        return "unknown", reason
    if isinstance(error, errors.RevisionNotFoundError):
        return "revision", reason
    if isinstance(error, errors.HFValidationError):
        return "form", reason
    if status == 404 or isinstance(error, errors.RemoteEntryNotFoundError):
        return "absent", reason
    if status and 400 <= status < 500 and status not in RETRYABLE_STATUS:
        words = (getattr(error, "server_message", None) or "").strip().splitlines()[:1]
        return "denied" if status in (401, 403) else "refused", ": ".join([f"HTTP {status}", *words])
    if getattr(error, "errno", None) and not isinstance(error, (ConnectionError, TimeoutError)):
        return "disk", getattr(error, "strerror", None) or reason
    return "network", reason
