"""Source names -> the files that hold their documents, and into which split each goes.

pydoc and shakespeare are one text; wikitext103, wikipedia, fineweb and hub are files of dataset repositories on the
Hugging Face hub, or the same files put into --raw_dir by hand; text is anyone's own files.
"""

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
from flatgpt.data import readers, repositories
from flatgpt.data.readers import Corpus, RawFile
from flatgpt.data.repositories import HubFiles, open_files
from flatgpt.runtime.files import atomic_write

# Karpathy's copy, the one that the field trains on (from his char-rnn, 2015).
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


@dataclass(frozen=True)
class Source:
    """What prepare needs to know of a source.

    Args:
        tokenizer: its own.
        revision: names the content, without a network; None: only the hub knows.
        open: its files; may ask the hub.
        end_of_text: whether an end-of-text id follows each document.
        val_fraction: share of validation text where the source has one split; None: it has its own.
        joined: its rows are one running text, as it was before it was cut into rows.
    """

    tokenizer: str
    revision: Callable[[PrepareConfig], str | None]
    open: Callable[[PrepareConfig], Corpus]
    end_of_text: bool = True
    val_fraction: float | None = 0.0005
    joined: bool = False


# ---------------------------------------------------------------------------------------------------------------------
# one text


def open_pydoc(config: PrepareConfig) -> Corpus:
    """The Python language reference that ships inside every CPython: about 0.5 MB, no download.

    Topics in alphabetical order, equal ones once.
    """
    from pydoc_data.topics import topics

    text = "\n\n".join(dict.fromkeys(topics[name].strip("\n") for name in sorted(topics))) + "\n"
    return Corpus({"train": [RawFile("pydoc", len(text.encode()), text=text)]})


def _python(config: PrepareConfig) -> str:
    return f"Python {sys.version.split()[0]}"


def open_shakespeare(config: PrepareConfig) -> Corpus:
    """Tiny Shakespeare, downloaded where it is not there."""
    path = Path(config.raw_dir) / "shakespeare" / "input.txt"
    if not path.exists():
        download(SHAKESPEARE_URL, path, SHAKESPEARE_SHA256)
    if (found := file_hash(path)) != SHAKESPEARE_SHA256:
        raise UserError(
            f"{path} is not tiny Shakespeare: its SHA-256 is {found[:16]}..., not {SHAKESPEARE_SHA256[:16]}...; "
            "move it away to have it downloaded again"
        )
    return Corpus({"train": [RawFile(path.name, path.stat().st_size, path)]})


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes; UserError where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def download(url: str, path: Path, sha256: str) -> None:
    """Fetch a file to `path`, which appears only when it is whole and its SHA-256 is right; UserError otherwise."""
    help = f"check the network, or put the file at {path} yourself (another folder: --raw_dir)"
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            content = answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{url} could not be fetched ({getattr(error, 'reason', error)}): {help}") from None
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise UserError(f"{url} gave {len(content):,} bytes with SHA-256 {found[:16]}..., not {sha256[:16]}...: {help}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, content)
    except OSError as error:
        raise UserError(f"{path} could not be written: {error.strerror}") from None


# ---------------------------------------------------------------------------------------------------------------------
# anyone's own files


def text_revision(config: PrepareConfig) -> str:
    """SHA-256 over the files' SHA-256s. Reads all of them, and says early which is not UTF-8."""
    whole = hashlib.sha256()
    for path in expand(config.input):
        digest = hashlib.sha256()
        if readers.file_format(path) == "text":
            for block in readers.text_chunks(path):
                digest.update(block.encode())
        else:
            digest.update(file_hash(path).encode())
        whole.update(digest.digest())
    return whole.hexdigest()


def open_text(config: PrepareConfig) -> Corpus:
    """The user's files, in the order given."""
    files = [RawFile(str(path), path.stat().st_size, path) for path in expand(config.input)]
    return Corpus({"train": files})


def expand(patterns: tuple[str, ...]) -> list[Path]:
    """Files named by paths, folders (searched in depth, sorted) and patterns; each file once, in order."""
    files: dict[Path, Path] = {}
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.name.endswith(readers.SUFFIXES) and p.is_file())
            wanted = f"no {' '.join(readers.SUFFIXES)} file in this folder"
        elif path.exists():
            found, wanted = [path], ""
        else:
            found = sorted(p for p in map(Path, glob.glob(pattern, recursive=True)) if p.is_file())
            wanted = "no such file, and no file matches it as a pattern"
        if not found:
            raise UserError(f"--input {pattern}: {wanted}")
        for file in found:
            files.setdefault(file.resolve(), file)
    return list(files.values())


def _from_hub(files: Callable[[PrepareConfig], HubFiles], **facts) -> Source:
    return Source("gpt2", lambda c: repositories.commit(files(c)), lambda c: open_files(c, files(c)), **facts)


SOURCES = {
    "pydoc": Source("byte", _python, open_pydoc, end_of_text=False, val_fraction=0.1),
    "shakespeare": Source("gpt2", lambda _: SHAKESPEARE_SHA256, open_shakespeare, end_of_text=False, val_fraction=0.1),
    "wikitext103": _from_hub(repositories.wikitext103, end_of_text=False, val_fraction=None, joined=True),
    "wikipedia": _from_hub(repositories.wikipedia),
    "fineweb": _from_hub(repositories.fineweb),
    "hub": _from_hub(repositories.hub_repository),
    "text": Source("gpt2", text_revision, open_text, val_fraction=0.1),
}
