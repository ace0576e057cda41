"""Work that can be done anywhere: files of documents -> tasks, and a task -> token ids by split.

What a task gives depends on the task alone, so any number of workers, here or on a cluster, gives the same bytes.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from flatgpt.data import readers, tokenizer
from flatgpt.data.readers import CHUNK_BYTES, Chunk
from flatgpt.data.tokenizer import MAX_ENCODE_CHARS


@dataclass(frozen=True)
class Job:
    """What all tasks of a dataset share.

    Args:
        column: of the documents' text, in parquet and JSON lines.
        val_fraction, test_fraction: shares that the hash of the text gives to these splits.
        splits: the ones that are wanted; others are not encoded.
        vocabulary: tiktoken's cache folder.
    """

    tokenizer: str
    end_of_text: bool
    column: str
    val_fraction: float
    test_fraction: float
    splits: tuple[str, ...]
    vocabulary: str | None = None


@dataclass(frozen=True)
class Span:
    """A document, or a part of one, as documents.Chunk. Split None: the hash of the text decides.

    Args:
        documents: how many end here.
    """

    text: str
    split: str | None = None
    first: bool = True
    last: bool = True
    cut: bool = False
    inside: bool = False
    documents: int = 1


@dataclass(frozen=True)
class Task:
    """Row groups of a parquet file, which the worker reads; or lines or spans of text, which travel with the task.

    Args:
        path: the file they come from.
        split: of all documents; None: the hash of the text decides.
        documents: how many there are; at most so many, where empty ones are not known yet.
        size: bytes of text, as `documents.size` counts them.
        start, stop: row groups; or the number of the first line.
    """

    path: str
    split: str | None
    documents: int
    size: int
    start: int = 0
    stop: int = 0
    lines: bytes | None = None
    spans: tuple[Span, ...] | None = None


@dataclass
class Encoded:
    """What a task gives for one split: ids, (n,) uint16, and the counts of their text."""

    ids: np.ndarray = field(default_factory=lambda: np.zeros(0, "<u2"))
    documents: int = 0
    bytes: int = 0
    words: int = 0


# ---------------------------------------------------------------------------------------------------------------------
# what a worker does


def choose_split(text: str, val_fraction: float, test_fraction: float) -> str:
    """The split of a document, by a keyed hash of its text: equal texts land on one side, in every dataset."""
    return _choose(hashlib.blake2b(text.encode(), digest_size=8, key=b"flatgpt split"), val_fraction, test_fraction)


def _choose(digest, val_fraction: float, test_fraction: float) -> str:
    place = int.from_bytes(digest.digest(), "big") / 2**64
    return "test" if place < test_fraction else "val" if place < test_fraction + val_fraction else "train"


def count_words(raw: bytes) -> int:
    """How many words UTF-8 text has, as `str.split` finds them, at ten times its speed."""
    text = np.frombuffer(raw, dtype=np.uint8)
    # uint8 wraps: these are 9 to 13, 28 to 31 and the blank
    space = (text - np.uint8(9) <= 4) | (text - np.uint8(28) <= 4)
    lead = np.flatnonzero(text >= 0xC2)  # of a character of several bytes
    first, second, third = (
        text[lead],
        text[np.minimum(lead + 1, text.size - 1)],
        text[np.minimum(lead + 2, text.size - 1)],
    )
    two = (first == 0xC2) & ((second == 0x85) | (second == 0xA0))
    # U+1680, U+2000 to 200A, 2028, 2029, 202F, 205F, U+3000
    three = (first == 0xE2) & (second == 0x80) & ((third <= 0x8A) | (third == 0xA8) | (third == 0xA9) | (third == 0xAF))
    three |= (first == 0xE2) & (second == 0x81) & (third == 0x9F)
    three |= (first == 0xE1) & (second == 0x9A) & (third == 0x80)
    three |= (first == 0xE3) & (second == 0x80) & (third == 0x80)
    for places, width in ((lead[two], 2), (lead[three], 3)):
        for n in range(width):
            space[places + n] = True
    return int(np.count_nonzero(space[:-1] & ~space[1:])) + int(text.size > 0 and not space[0])


def _texts(job: Job, task: Task) -> Iterator[tuple[str, str, Span | None]]:
    """(text, split, None) of the task's documents, or (text, split, span) of parts of them."""
    if task.spans is not None:
        for span in task.spans:
            split = span.split or task.split or choose_split(span.text, job.val_fraction, job.test_fraction)
            yield span.text, split, None if span.first and span.last and span.documents == 1 else span
        return
    if task.lines is not None:
        texts = readers.parse_lines(task.lines, job.column, Path(task.path), task.start)
    else:
        texts = readers.rows(Path(task.path), job.column, task.start, task.stop)
    for text in texts:
        yield text, task.split or choose_split(text, job.val_fraction, job.test_fraction), None


def encode(job: Job, task: Task, limit: int | None = None) -> tuple[dict[str, Encoded], int, int]:
    """Ids of a task by split.

    Args:
        limit: take the first so many documents only.

    Returns:
        what each split gets; how many documents there were; in how many places a long run was cut.
    """
    if job.vocabulary:  # a worker of a cluster may have another environment
        os.environ.setdefault("TIKTOKEN_CACHE_DIR", job.vocabulary)
    encoding = tokenizer.load(job.tokenizer)
    found = {split: Encoded() for split in job.splits}
    ids: dict[str, list[np.ndarray]] = {split: [] for split in job.splits}
    waiting: dict[str, list[str]] = {split: [] for split in job.splits}
    taken = cuts = size = 0

    def encode_texts(split: str, texts: list[str], end_of_text: bool) -> None:
        nonlocal cuts
        encoded, more = tokenizer.encode(encoding, texts, end_of_text)
        raw = "\n".join(texts).encode()
        ids[split].append(encoded)
        found[split].bytes += len(raw) - max(0, len(texts) - 1)
        found[split].words += count_words(raw)
        cuts += more

    def encode_waiting() -> None:
        nonlocal size
        for split in job.splits:
            encode_texts(split, waiting[split], job.end_of_text)
            waiting[split] = []
        size = 0

    for text, split, span in _texts(job, task):
        if taken == limit:
            break
        taken += span.documents if span else 1
        if split not in found:
            continue
        found[split].documents += span.documents if span else 1
        if span:
            encode_waiting()
            encode_texts(split, [text], job.end_of_text and span.last)
            found[split].words -= span.inside
            cuts += span.cut and encoding.name != "byte"  # bytes can be cut anywhere
            continue
        waiting[split].append(text)
        size += len(text)
        if size > MAX_ENCODE_CHARS:
            encode_waiting()
    encode_waiting()
    for split, entry in found.items():
        entry.ids = np.concatenate([np.zeros(0, "<u2"), *ids[split]])
    return found, taken, cuts


# ---------------------------------------------------------------------------------------------------------------------
# files -> tasks


def whole_documents(files: Iterable[tuple[str, Path]], job: Job, split: str | None) -> Iterator[Task]:
    """Tasks of about CHUNK_BYTES bytes over all documents of the files, in order.

    Args:
        files: (name for messages, path), asked for one by one.
        split: as Task's.
    """
    waiting: list[Span] = []
    size = 0
    for name, path in files:
        if readers.file_format(path) != "text":
            if waiting:
                yield _of_spans(name, waiting)
                waiting, size = [], 0
            yield from _of_lines(path, split) if readers.file_format(path) == "jsonl" else _of_rows(path, job, split)
            continue
        for span in _of_text(path, job, split):
            waiting.append(span)
            size += len(span.text)
            if size >= CHUNK_BYTES:
                yield _of_spans(name, waiting)
                waiting, size = [], 0
    if waiting:
        yield _of_spans(name, waiting)


def _of_spans(name: str, spans: Iterable[Span], split: str | None = None) -> Task:
    spans = tuple(spans)
    return Task(name, split, sum(s.documents for s in spans), sum(len(s.text.encode()) for s in spans), spans=spans)


def _of_text(path: Path, job: Job, split: str | None) -> Iterator[Span]:
    parts = readers.documents(path, job.column)
    for part in parts:
        if split is None and not part.last:  # the hash takes the whole document: read it once for that
            digest = hashlib.blake2b(digest_size=8, key=b"flatgpt split")
            for block in readers.text_chunks(path):
                digest.update(block.encode())
            split = _choose(digest, job.val_fraction, job.test_fraction)
        yield Span(part.text, split, part.first, part.last, part.forced_split, part.starts_mid_word, int(part.last))


def _of_lines(path: Path, split: str | None) -> Iterator[Task]:
    total, done = path.stat().st_size, 0
    for line, block in readers.line_chunks(path):
        # compressed files: nobody knows how much is left, so the bar goes by what a block usually becomes
        size = len(block) if path.name.endswith("l") else min(len(block) // 3, total - done)
        done += size
        yield Task(str(path), split, block.count(b"\n") + 1, size, line, lines=block)


def _of_rows(path: Path, job: Job, split: str | None) -> Iterator[Task]:
    start = rows = size = 0
    groups = readers.row_groups(path, job.column)
    for n, (group_rows, group_size) in enumerate(groups):
        if group_size > 4 * CHUNK_BYTES:  # too large for a worker's memory: read here, a block at a time
            if rows:
                yield Task(str(path), split, rows, size, start, n)
            texts = readers.rows(path, job.column, n, n + 1)
            for texts_of_block in _blocks(texts):
                yield _of_spans(str(path), map(Span, texts_of_block), split)
            start, rows, size = n + 1, 0, 0
            continue
        rows, size = rows + group_rows, size + group_size
        if size >= CHUNK_BYTES:
            yield Task(str(path), split, rows, size, start, n + 1)
            start, rows, size = n + 1, 0, 0
    if rows:
        yield Task(str(path), split, rows, size, start, len(groups))


def _blocks(texts: Iterable[str]) -> Iterator[list[str]]:
    block, size = [], 0
    for text in texts:
        block.append(text)
        size += len(text)
        if size >= CHUNK_BYTES:
            yield block
            block, size = [], 0
    if block:
        yield block


def cut_by_characters(parts: Iterable[Chunk], rooms: dict[str, int]) -> Iterator[Task]:
    """Tasks over documents of which each split takes so many characters, in order; a document may be cut in two."""

    def spans() -> Iterator[Span]:
        left = [(split, room) for split, room in rooms.items() if room]
        if not left:
            return
        (split, room), begun = left.pop(0), False
        for part in parts:
            begun, text, inside = begun and not part.first, part.text, part.starts_mid_word
            while text:
                head, text = text[:room], text[room:]
                room -= len(head)
                last = not room or (part.last and not text)
                yield Span(head, split, not begun, last, part.forced_split and not text, begun and inside, int(last))
                begun, inside = True, False
                if not room and left:
                    (split, room), begun = left.pop(0), False

    for span in spans():
        yield _of_spans("", [span])


def joined(files: Iterable[tuple[str, Path]], job: Job, split: str, limit: int | None) -> Iterator[Task]:
    """Tasks over the rows of the files put together to one running text, as they are; `limit` rows at most."""
    count = 0

    def blocks() -> Iterator[str]:
        nonlocal count
        rows = (text for _, path in files for text in readers.rows(path, job.column, empty=True))
        for block in _blocks(itertools.islice(rows, limit)):
            count += len(block)
            yield "".join(block)

    told = 0
    for part in readers.split_document(blocks()):
        rows, told = count - told, count
        yield _of_spans(
            "", [Span(part.text, split, part.first, part.last, part.forced_split, part.starts_mid_word, rows)]
        )
