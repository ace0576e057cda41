"""Files of dataset repositories on the Hugging Face hub: what there is at a commit, and fetching it.

Downloads, progress bars and tokens are huggingface_hub's (1.x and 2.x). What the hub said is written down beside the
files, so that a folder can be told whole from half without a network. `patiently` is how models are asked for too.
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

ATTEMPTS = 4  # with 1, 2 and 4 seconds in between
PATIENCE = 15  # seconds after which no further attempt is made to ask; the library has made its own by then
COMMIT = re.compile("[0-9a-f]{40}")
PASSING = (408, 409, 412, 425, 429)  # HTTP's of a hub that is busy: later the same request may do
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
    found = patiently(listing, what, _sentences(repo, revision, what, root, check), PATIENCE)
    if not found.files:
        raise UserError(
            f"dataset {repo} at revision {revision} has no file {' '.join(patterns)}: check {check}; the hub converts "
            "many other formats: --revision refs/convert/parquet"
        )
    root.mkdir(parents=True, exist_ok=True)
    path = listing_file(root, repo, revision, patterns)
    atomic_write(path, json.dumps(asdict(found), indent=1).encode())
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

    return patiently(download, path, _sentences(listing.repo, listing.commit, path, root, check))


def _sentences(repo: str, revision: str, what: str, root: Path, check: str) -> dict[str, str]:
    """What to tell the user of each failure; for `patiently`."""
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


def patiently(call: Callable, what: str, sentences: dict[str, str], patience: float = math.inf):
    """call(), again after a broken connection; other failures as UserError.

    Args:
        what: what is asked for, in the lines about further attempts.
        sentences: the error line of each kind of failure (`_kind`), {reason} in it for the error's own words. Kinds
            that are left out are tried again, or are no mistake of the user's: `network` there has to be.
        patience: seconds after which no further attempt is made.
    """
    from huggingface_hub import constants, errors

    began = time.monotonic()
    for attempt in range(ATTEMPTS):
        try:
            return call()
        except Exception as why:
            if isinstance(why, (errors.LocalEntryNotFoundError, RuntimeError)) and why.__cause__:
                why = why.__cause__  # what went wrong when it asked for the file, or sent it
            kind, reason = _kind(why)
            if kind in sentences and kind != "network":
                raise UserError(sentences[kind].replace("{reason}", reason)) from None
            # huggingface_hub speaks through httpx (1.x) or httpx2 (2.x), whose errors are no OSErrors; and through
            # hf_xet, which has RuntimeErrors, after minutes of trying: then plain HTTP is left
            xet = type(why) is RuntimeError and not constants.HF_HUB_DISABLE_XET
            network = type(why).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2")
            if kind == "disk" or not (xet or network or isinstance(why, OSError)):
                raise
            constants.HF_HUB_DISABLE_XET |= xet
            if attempt + 1 == ATTEMPTS or time.monotonic() - began > patience:
                raise UserError(sentences["network"].replace("{reason}", reason)) from None
            print(f"{what}: the connection broke ({reason}); again", file=sys.stderr)
            time.sleep(2**attempt)


def _kind(why: Exception) -> tuple[str, str]:
    """(which kind of failure it is, in one line what it says). `network` is all that another attempt may mend."""
    from huggingface_hub import errors

    reason = (str(why).strip() or type(why).__name__).splitlines()[0]
    status = getattr(getattr(why, "response", None), "status_code", None)
    if isinstance(why, errors.OfflineModeIsEnabled):
        return "offline", reason
    if isinstance(why, errors.GatedRepoError):
        return "gated", reason
    if isinstance(why, errors.RepositoryNotFoundError):
        return "unknown", reason
    if isinstance(why, errors.RevisionNotFoundError):
        return "revision", reason
    if isinstance(why, errors.HFValidationError):
        return "form", reason
    if status == 404 or isinstance(why, errors.RemoteEntryNotFoundError):
        return "absent", reason
    if status and 400 <= status < 500 and status not in PASSING:
        words = (getattr(why, "server_message", None) or "").strip().splitlines()[:1]
        return "denied" if status in (401, 403) else "refused", ": ".join([f"HTTP {status}", *words])
    if getattr(why, "errno", None) and not isinstance(why, (ConnectionError, TimeoutError)):
        return "disk", getattr(why, "strerror", None) or reason
    return "network", reason
