"""Divide the documents of a text among train, val and test: by a hash of their text, or few of them by characters."""

from __future__ import annotations

import hashlib
import itertools
import math
import unicodedata
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from config import UserError
from flatgpt.data.chunks import Chunk, Task
from flatgpt.data.shards import SPLITS

SPLIT_HASH = hashlib.blake2b(digest_size=8, key=b"flatgpt split")
FEW_DOCUMENTS = 100  # with fewer, splits are made by characters, as whole documents are too coarse
MAX_SHIFT = 200  # characters by which split_by_characters moves a border


class CharacterBorders(NamedTuple):
    """Where a text of few documents is split by characters.

    Args:
        ends: of train, val and test, in characters of all different documents.
        starts: of each document. Equal documents start at the same place, so that they are split alike.
        shift: largest distance by which a border is moved back.
        special_tokens: a border that is inside one of these is moved before it.
    """

    ends: tuple[int, int, int]
    starts: tuple[int, ...]
    shift: int
    special_tokens: tuple[str, ...]


Borders = dict[str, float] | CharacterBorders | None  # of choose_split, or of split_by_characters


def documents(chunks: Iterable[Chunk]) -> Iterator[tuple[float, int]]:
    """Yield the hash of each document, from 0 to 1, and its length in characters."""
    length, digest = 0, SPLIT_HASH.copy()
    for chunk in chunks:
        length += len(chunk.text)
        digest.update(chunk.text.encode())
        if chunk.documents:
            yield _position(digest), length
            length, digest = 0, SPLIT_HASH.copy()


def divide(
    chunks: Iterable[Chunk],
    held_out: dict[str, float],
    splits: list[str],
    name: str,
    special_tokens: Iterable[str] = (),
) -> tuple[Borders, int]:
    """Choose how documents are divided among splits, so that none is empty. Reads until each split has a document.

    A document's split follows from its hash, and does not depend on `splits`. If `test` would be empty, it gets the
    document with the smallest hash; if `val` would be empty, it gets the one with the smallest hash outside of `test`.
    Fewer than FEW_DOCUMENTS documents are split by characters, from the end, with at least one character each.

    Args:
        held_out: {split: its share}.
        splits: those that are made.
        name: name of the dataset, for messages.
        special_tokens: texts that are not split by characters.

    Returns:
        The borders for choose_split, or those for split_by_characters; and a number of the way of dividing, which is 0
        for the shares alone.
    """
    val, test = held_out.get("val", 0), held_out.get("test", 0)
    shares = {"test": test, "val": test + val}
    characters, hashes, starts, found = 0, [], {}, set()
    for position, length in documents(chunks):
        hashes.append(position)
        if position not in starts:
            starts[position] = characters
            characters += length
        found.add(_split_at(shares, position))
        if len(hashes) >= FEW_DOCUMENTS and found >= {"train", *held_out}:
            return shares, 0
    if len(hashes) < FEW_DOCUMENTS:
        given = (int(characters * (1 - val - test)), int(characters * (1 - test)), characters)
        second = max(0, min(given[1], characters - ("test" in held_out)))
        ends = (max(0, min(given[0], second - ("val" in held_out))), second, characters)
        sizes = {s: end - start for s, (start, end) in zip(SPLITS, itertools.pairwise((0, *ends)), strict=True)}
        found = {split for split in SPLITS if sizes[split]}
        shift = min(MAX_SHIFT, *(sizes[split] // 2 for split in found)) if found else 0
        tokens = tuple(sorted(special_tokens))
        borders = CharacterBorders(ends, tuple(starts[position] for position in hashes), shift, tokens)
        way = 2 if len(hashes) > 1 or tokens else int(ends != given)
    else:
        borders, start = dict(shares), 0
        for split in ("test", "val"):
            rest = [position for position in hashes if position >= start]
            if split in held_out and rest:
                borders[split] = max(borders[split], math.nextafter(min(rest), 2))
            start = borders[split]
        found = {_split_at(borders, position) for position in hashes}
        way = int(borders != shares)
    if empty := [split for split in splits if split in ("train", *held_out) and split not in found]:
        if not characters:
            raise UserError(f"too little text: the files of {name} have none; add some")
        plural, equal = "s" * (characters > 1), f" ({len(starts):,} different)" if len(starts) < len(hashes) else ""
        counts = f"{len(hashes):,} document{'s' * (len(hashes) > 1)}{equal}, {characters:,} character{plural}"
        problem = f"too little text: {counts} leave none for the {empty[0]} split of {name}"
        raise UserError(f"{problem}; add some, or change --val_fraction or --test_fraction")
    return borders, way


def split_by_characters(chunks: Iterable[Chunk], borders: CharacterBorders) -> Iterator[Chunk]:
    """Split documents into train, val and test. A document across a border counts in both splits."""
    starts = iter(borders.starts)
    start = next(starts, 0)
    for chunk in chunks:
        cuts = [0, *(_cut(chunk.text, start, end, borders) for end in borders.ends)]
        for split, end, (first, last) in zip(SPLITS, borders.ends, itertools.pairwise(cuts), strict=True):
            if part := chunk.text[first:last]:
                yield Chunk(part, 1 if end <= start + len(chunk.text) else chunk.documents, split)
        start = next(starts, 0) if chunk.documents else start + len(chunk.text)


def _cut(text: str, start: int, end: int, borders: CharacterBorders) -> int:
    """Return where a text that starts at `start` is split: at `end`, or a little before it.

    With several documents, the border is moved to the start of the document, a line, a word or a character, whichever
    is the first of these that is near.
    """
    border, in_document = end - start, start not in borders.starts
    nearest = max(in_document, border - borders.shift)
    if not 0 < border < len(text):
        return max(0, min(border, len(text)))
    if len(borders.starts) > 1:
        line, word = (text.rfind(before, nearest, border) + 1 for before in "\n ")
        while border > nearest and unicodedata.category(text[border])[0] == "M":  # a combining mark
            border -= 1
        border = 0 if nearest == 0 else line or word or border
    for token in borders.special_tokens:
        found = text.find(token, max(nearest, border - len(token) + 1), border + len(token) - 1)
        border = border if found < 0 else found
    return border


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
