"""Divide the documents of a text among train, val and test: by a hash of their text, or few of them by characters."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator

from config import UserError
from flatgpt.data.readers import Chunk, Task
from flatgpt.data.shards import SPLITS

SPLIT_HASH = hashlib.blake2b(digest_size=8, key=b"flatgpt split")
Borders = dict[str, float] | tuple[int, int, int] | None  # of choose_split, or of split_by_characters
FEW_DOCUMENTS = 100  # with fewer, splits are made by characters, as whole documents are too coarse


def divide(chunks: Iterable[Chunk], held_out: dict[str, float], splits: list[str], name: str) -> tuple[Borders, bool]:
    """Choose how documents are divided among splits, so that none is empty. Reads until each split has a document.

    A document's split follows from its hash, and does not depend on `splits`. If `test` would be empty, it gets the
    document with the smallest hash; if `val` would be empty, it gets the one with the smallest hash outside of `test`.
    Fewer than FEW_DOCUMENTS documents are split by characters, from the end, with at least one character each.

    Args:
        held_out: {split: its share}.
        splits: those that are made.
        name: name of the dataset, for messages.

    Returns:
        The borders for choose_split, or a tuple of those for split_by_characters; and whether the shares alone would
        have left a split empty.
    """
    val, test = held_out.get("val", 0), held_out.get("test", 0)
    shares = {"test": test, "val": test + val}
    characters, hashes, found, digest = 0, [], set(), SPLIT_HASH.copy()
    for chunk in chunks:
        characters += len(chunk.text)
        digest.update(chunk.text.encode())
        if chunk.documents:
            hashes.append(_position(digest))
            digest = SPLIT_HASH.copy()
            found.add(_split_at(shares, hashes[-1]))
            if len(hashes) >= FEW_DOCUMENTS and found >= {"train", *held_out}:
                return shares, False
    if len(hashes) < FEW_DOCUMENTS:
        given = (int(characters * (1 - val - test)), int(characters * (1 - test)), characters)
        second = max(0, min(given[1], characters - ("test" in held_out)))
        borders = (max(0, min(given[0], second - ("val" in held_out))), second, characters)
        found = {s for s, (start, end) in zip(SPLITS, itertools.pairwise((0, *borders)), strict=True) if end > start}
    else:
        given, borders, start = shares, dict(shares), 0
        for split in ("test", "val"):
            rest = [position for position in hashes if position >= start]
            if split in held_out and rest:
                borders[split] = max(borders[split], math.nextafter(min(rest), 2))
            start = borders[split]
        found = {_split_at(borders, position) for position in hashes}
    if empty := [split for split in splits if split in ("train", *held_out) and split not in found]:
        numbers = f"{len(hashes):,} documents, {characters:,} characters leave none for the {empty[0]} split of {name}"
        raise UserError(f"too little text: {numbers}; add some, or change --val_fraction or --test_fraction")
    return borders, borders != given


def split_by_characters(chunks: Iterable[Chunk], borders: tuple[int, int, int]) -> Iterator[Chunk]:
    """Split the text of all chunks into train, val and test, which end at the `borders` (in characters).

    A document across a border counts in both splits.
    """
    start = 0
    for chunk in chunks:
        for split, (first, last) in zip(SPLITS, itertools.pairwise((0, *borders)), strict=True):
            if part := chunk.text[max(0, first - start) : max(0, last - start)]:
                yield Chunk(part, 1 if last - start <= len(chunk.text) else chunk.documents, split)
        start += len(chunk.text)


def chunks_by_split(borders: Borders, task: Task) -> dict[str, list[Chunk]]:
    """Return the chunks of a task by their split in the dataset."""
    by_split: dict[str, list[Chunk]] = {}
    for chunk in task.read():
        split = chunk.split or task.split
        if borders and split == "train" and not chunk.split:
            split = choose_split(borders, [chunk.text])
        by_split.setdefault(split, []).append(chunk)
    return by_split


def choose_split(borders: dict[str, float], chunks: Iterable[str]) -> str:
    """Return the split of a document by a keyed hash of its text. Equal texts get the same split, in every dataset.

    Args:
        borders: {`test`, `val`: upper border of the hashes of its documents, from 0 to 1}. Those of train are above.
        chunks: the text of the document, in chunks of any size.
    """
    digest = SPLIT_HASH.copy()  # a keyed hash takes several times as long to create
    for text in chunks:
        digest.update(text.encode())
    return _split_at(borders, _position(digest))


def _position(digest: hashlib.blake2b) -> float:
    return int.from_bytes(digest.digest(), "big") / 2**64


def _split_at(borders: dict[str, float], position: float) -> str:
    return next((split for split in ("test", "val") if position < borders.get(split, 0)), "train")
