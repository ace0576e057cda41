"""The sources of text: their files, downloaded where they are missing, and the facts that preparation needs."""

from __future__ import annotations

import glob
import hashlib
import http.client
import sys
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from config import PrepareConfig, UserError
from flatgpt.data import readers
from flatgpt.data.hub import HubFiles, known_commit, open_repository
from flatgpt.data.readers import Corpus, RawFile
from flatgpt.data.shards import SPLITS
from flatgpt.runtime.files import atomic_write

# The copy in common use, from Karpathy's char-rnn (2015).
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
DUMP = "20231101.en"  # Wikipedia's, by default
# Dataset repositories known by name, the commits that flatGPT was written against, and the files in them.
REPOSITORIES = {
    "wikitext103": ("Salesforce/wikitext", "b08601e04326c79dfdd32d625aee71d232d685c3", "wikitext-103-raw-v1/*.parquet"),
    "wikipedia": ("wikimedia/wikipedia", "b04c8d1ceb2f5cd4588862100d08de323dccfbaa", "{dump}/*.parquet"),
    "fineweb": ("HuggingFaceFW/fineweb-edu", "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9", "sample/10BT/*.parquet"),
}


@dataclass(frozen=True)
class Source:
    """What prepare needs to know about a source.

    Args:
        tokenizer: the default tokenizer.
        revision: identifies the content without a network; None where only the hub knows.
        open: returns the files; may ask the hub.
        end_of_text: whether an end-of-text token follows each document.
        val_fraction: default share of validation text; None for a source with a validation split.
        joined: whether the rows are lines of one running text, to be joined again.
    """

    tokenizer: str
    revision: Callable[[PrepareConfig], str | None]
    open: Callable[[PrepareConfig], Corpus]
    end_of_text: bool = True
    val_fraction: float | None = 0.0005
    joined: bool = False


def hub_files(config: PrepareConfig) -> HubFiles:
    """Return the files of the dataset repository that the config's source names."""
    root = Path(config.raw_dir) / config.source
    if config.source == "hub":
        patterns = config.files or ("*.parquet", "*.jsonl", "*.jsonl.gz", "*.jsonl.zst")
        return HubFiles(config.repo, config.revision or "main", patterns, root / config.repo)
    repo, commit, pattern = REPOSITORIES[config.source]
    return HubFiles(
        repo,
        config.revision or commit,
        (pattern.format(dump=config.dump or DUMP),),
        root,
        flat=config.dump in (None, DUMP),
        splits=SPLITS if config.source == "wikitext103" else (),
    )


def open_pydoc(config: PrepareConfig) -> Corpus:
    """Return the Python language reference that comes with CPython: about 0.5 MB, no download.

    Topics are in alphabetical order; duplicates are left out.
    """
    from pydoc_data.topics import topics

    text = "\n\n".join(dict.fromkeys(topics[name].strip("\n") for name in sorted(topics))) + "\n"
    return Corpus({"train": [RawFile("pydoc", len(text.encode()), text=text)]})


def open_shakespeare(config: PrepareConfig) -> Corpus:
    """Return tiny Shakespeare, downloaded if it is missing."""
    path = Path(config.raw_dir) / "shakespeare" / "input.txt"
    if not path.exists():
        download(SHAKESPEARE_URL, path, SHAKESPEARE_SHA256)
    if (found := file_hash(path)) != SHAKESPEARE_SHA256:
        raise UserError(
            f"{path} is not tiny Shakespeare: its SHA-256 is {found[:16]}..., not {SHAKESPEARE_SHA256[:16]}...; "
            "move it away to download it again"
        )
    return Corpus({"train": [RawFile(path.name, path.stat().st_size, path)]})


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file; raise UserError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def download(url: str, path: Path, sha256: str) -> None:
    """Download a file to `path`, which exists only once the file is complete and its SHA-256 is right.

    Raises:
        UserError: no network, another content, or a path that cannot be written.
    """
    remedy = f"check the network, or put the file at {path} yourself (another folder: --raw_dir)"
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            content = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{url} could not be downloaded ({getattr(error, 'reason', error)}): {remedy}") from None
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise UserError(
            f"{url} gave {len(content):,} bytes with SHA-256 {found[:16]}..., not {sha256[:16]}...: {remedy}"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, content)
    except OSError as error:
        raise UserError(f"{path} could not be written: {error.strerror}") from None


def text_revision(config: PrepareConfig) -> str:
    """Return the SHA-256 over the SHA-256s of the user's files. Raises UserError for text that is not UTF-8."""
    combined = hashlib.sha256()
    for path in expand(config.input):
        if readers.file_format(path) == "text":
            digest = hashlib.sha256()
            for chunk in readers.text_chunks(path):
                digest.update(chunk.encode())
        else:
            digest = hashlib.sha256(file_hash(path).encode())
        combined.update(digest.digest())
    return combined.hexdigest()


def open_text(config: PrepareConfig) -> Corpus:
    """Return the user's files, in the order given."""
    return Corpus({"train": [RawFile(str(path), path.stat().st_size, path) for path in expand(config.input)]})


def expand(patterns: tuple[str, ...]) -> list[Path]:
    """Return the files that paths, folders (recursive, sorted) and glob patterns name; each file once, in order."""
    files: dict[Path, Path] = {}
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.name.endswith(readers.SUFFIXES) and p.is_file())
            problem = f"no {' '.join(readers.SUFFIXES)} file in this folder"
        elif path.exists():
            found, problem = [path], ""
        else:
            found = sorted(p for p in map(Path, glob.glob(pattern, recursive=True)) if p.is_file())
            problem = "no such file, and no file matches it as a pattern"
        if not found:
            raise UserError(f"--input {pattern}: {problem}")
        for file in found:
            files.setdefault(file.resolve(), file)
    return list(files.values())


def _repository(**facts) -> Source:
    return Source("gpt2", lambda c: known_commit(hub_files(c)), lambda c: open_repository(c, hub_files(c)), **facts)


ONE_TEXT = {"end_of_text": False, "val_fraction": 0.1}
SOURCES = {
    "pydoc": Source("byte", lambda _: f"Python {sys.version.split()[0]}", open_pydoc, **ONE_TEXT),
    "shakespeare": Source("gpt2", lambda _: SHAKESPEARE_SHA256, open_shakespeare, **ONE_TEXT),
    "wikitext103": _repository(end_of_text=False, val_fraction=None, joined=True),
    "wikipedia": _repository(),
    "fineweb": _repository(),
    "hub": _repository(),
    "text": Source("gpt2", text_revision, open_text, val_fraction=0.1),
}
