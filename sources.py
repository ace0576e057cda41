"""Source names -> documents -> shards: the text inside Python, tiny Shakespeare, and anyone's own files.

Each source gives a Corpus; `prepare` encodes it and writes a dataset folder. Documents are kept in memory.
"""

from __future__ import annotations

import glob
import hashlib
import http.client
import os
import sys
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import tokenizer
from config import PrepareConfig, UserError
from dataset import SPLITS, Dataset, ShardWriter, open_dataset, read_meta, write_meta, write_whole

# Karpathy's copy, the one that the field trains on (from his char-rnn, 2015).
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TEXT_SUFFIXES = (".txt", ".md", ".py")
FEW_DOCUMENTS = 100  # below this a split by documents would be too coarse


@dataclass(frozen=True)
class Corpus:
    """The documents of a source, by split, and what the manifest says of them."""

    revision: str
    splits: dict[str, list[str]]
    end_of_text: bool  # whether an end-of-text id follows each document


def _cut(text: str, val_fraction: float) -> dict[str, list[str]]:
    """One text cut by characters: the last part is for validation."""
    at = int(len(text) * (1 - val_fraction))
    return {"train": [text[:at]], "val": [text[at:]]}


def read_pydoc(config: PrepareConfig) -> Corpus:
    """The Python language reference that ships inside every CPython: about 0.5 MB, no download.

    Topics in alphabetical order, with equal ones kept once, cut at 90% of the characters.
    """
    from pydoc_data.topics import topics

    text = "\n\n".join(dict.fromkeys(topics[name].strip("\n") for name in sorted(topics))) + "\n"
    return Corpus(f"Python {sys.version.split()[0]}", _cut(text, 0.1), end_of_text=False)


def read_shakespeare(config: PrepareConfig) -> Corpus:
    """Tiny Shakespeare, cut at 90% of the characters, as everybody cuts it."""
    path = Path(config.raw_dir) / "shakespeare" / "input.txt"
    if not path.exists():
        download(SHAKESPEARE_URL, path, SHAKESPEARE_SHA256)
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != SHAKESPEARE_SHA256:
        raise UserError(
            f"{path} is not tiny Shakespeare: its SHA-256 is {found[:16]}..., not {SHAKESPEARE_SHA256[:16]}...; "
            "move it away to have it downloaded again"
        )
    return Corpus(SHAKESPEARE_SHA256, _cut(content.decode(), 0.1), end_of_text=False)


def read_text(config: PrepareConfig) -> Corpus:
    """The user's UTF-8 files, one document each, empty ones left out.

    From 100 documents on, a hash of the text decides which go to validation (so equal texts land on one side);
    fewer are cut by characters, the last part for validation.
    """
    fraction = 0.1 if config.val_fraction is None else config.val_fraction
    documents = [text for text in map(_read_utf8, _expand(config.input)) if text.strip()]
    if not documents:
        raise UserError(f"--input {' '.join(config.input)}: the files hold no text")
    digests = [hashlib.sha256(text.encode()).digest() for text in documents]
    revision = hashlib.sha256(b"".join(digests)).hexdigest()
    if len(documents) >= FEW_DOCUMENTS:
        in_val = [int.from_bytes(d[:8], "big") < fraction * 2**64 for d in digests]
        splits = {
            "train": [t for t, val in zip(documents, in_val, strict=True) if not val],
            "val": [t for t, val in zip(documents, in_val, strict=True) if val],
        }
        return Corpus(revision, splits, end_of_text=True)
    room = int(sum(map(len, documents)) * (1 - fraction))  # characters that training still takes
    splits = {"train": [], "val": []}
    for text in documents:
        head, tail = text[:room], text[room:]
        room -= len(head)
        splits["train"] += [head] if head else []
        splits["val"] += [tail] if tail else []
    return Corpus(revision, splits, end_of_text=True)


def _expand(patterns: tuple[str, ...]) -> list[Path]:
    """Files named by paths, folders (searched in depth, sorted) and patterns; each file once, in order."""
    files: dict[Path, Path] = {}
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix in TEXT_SUFFIXES and p.is_file())
            wanted = f"no {' '.join(TEXT_SUFFIXES)} file in this folder"
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


def _read_utf8(path: Path) -> str:
    try:
        content = path.read_bytes()
        return content.decode("utf-8").removeprefix("\ufeff")  # a byte order mark is not text
    except OSError as why:
        raise UserError(f"{path}: cannot be read: {why.strerror}") from None
    except UnicodeDecodeError as why:
        raise UserError(
            f"{path}: not UTF-8: byte 0x{content[why.start]:02x} at offset {why.start:,}; "
            "convert it (iconv -f latin1 -t utf-8, say) or leave it out"
        ) from None


def download(url: str, path: Path, sha256: str) -> None:
    """Fetch a file to `path`, which appears only when it is whole and its SHA-256 is right; UserError otherwise."""
    help = f"check the network, or put the file at {path} yourself (another folder: --raw_dir)"
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            content = answer.read()
    except (OSError, http.client.HTTPException) as why:
        raise UserError(f"{url} could not be fetched ({getattr(why, 'reason', why)}): {help}") from None
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise UserError(f"{url} gave {len(content):,} bytes with SHA-256 {found[:16]}..., not {sha256[:16]}...: {help}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
    except OSError as why:
        raise UserError(f"{path} could not be written: {why.strerror}") from None


@dataclass(frozen=True)
class Source:
    """How a source is read, and the tokenizer that is its own."""

    read: Callable[[PrepareConfig], Corpus]
    tokenizer: str


SOURCES = {
    "pydoc": Source(read_pydoc, "byte"),
    "shakespeare": Source(read_shakespeare, "gpt2"),
    "text": Source(read_text, "gpt2"),
}


def prepare(config: PrepareConfig, say: Callable[[str], None] = print) -> Dataset:
    """Make the dataset that the config describes, or open it if it is there already.

    Args:
        say: takes lines of progress.

    Raises:
        UserError: the folder holds a dataset of other settings, or there is too little text.
    """
    source = SOURCES[config.source]
    name = config.tokenizer or source.tokenizer
    default = config.source if name == source.tokenizer else f"{config.source}_{name}"
    folder = Path(config.data_dir) / (config.name or default)
    encoding = tokenizer.load(name)
    corpus = source.read(config)
    settings = {
        "source": config.source,
        "revision": corpus.revision,
        "tokenizer": name,
        "shard_tokens": config.shard_tokens,
        "val_fraction": 0.1 if config.val_fraction is None else config.val_fraction,
    }
    if (meta := read_meta(folder)) is not None:
        differing = [f"{k} {meta.get(k)} (now {v})" for k, v in settings.items() if meta.get(k) != v]
        if differing:
            raise UserError(
                f"{folder} already holds a dataset of other settings: {'; '.join(differing)}. "
                f"Give this one a name of its own with --name, or move {folder} away"
            )
        say(f"{folder} is there already, with these settings; nothing to do")
        return open_dataset(folder)
    splits = {split: corpus.splits[split] for split in SPLITS if split in corpus.splits}
    encoded = {
        split: [_encode(encoding, text, corpus.end_of_text) for text in texts] for split, texts in splits.items()
    }
    for split, documents in encoded.items():
        if (count := sum(map(len, documents))) < 2:
            raise UserError(
                f"too little text: the {split} split of {folder.name} would have {count} tokens, and it takes 2 to "
                "score one; give more text" + (", or a larger --val_fraction" if config.source == "text" else "")
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        entries = {}
        for split, documents in encoded.items():
            writer = ShardWriter(folder, split, encoding.n_vocab, config.shard_tokens)
            for ids, text in zip(documents, splits[split], strict=True):
                writer.add(ids, text)
            entries[split] = writer.close()
        write_meta(
            folder,
            {
                **settings,
                "vocab_size": encoding.n_vocab,
                "ranks_sha256": tokenizer.ranks_hash(encoding),
                "eot_id": encoding.eot_token,
                "end_of_text": corpus.end_of_text,
                "dtype": "uint16",
                "splits": entries,
            },
        )
    except OSError as why:
        raise UserError(
            f"{folder} could not be written: {os.strerror(why.errno)}; the dataset is not finished"
        ) from None
    return open_dataset(folder)


def _encode(encoding, text: str, end_of_text: bool) -> np.ndarray:
    ids = encoding.encode_ordinary(text)
    return np.array([*ids, encoding.eot_token] if end_of_text else ids, dtype=np.int32)  # a list takes 9 times as much
