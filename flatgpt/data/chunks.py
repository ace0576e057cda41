"""Documents in chunks, and tasks that group them. Does not import torch, so that data workers start fast."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from flatgpt.data.tokenizer import MAX_ENCODE_CHARS

CHUNK_BYTES = 4 << 20  # approximate size of a chunk and of a task
# GPT-2's pattern has no lookbehind, and a match ends wherever white space follows another character. Splitting a text
# there changes no id. This matches up to the last such position.
_LAST_BREAK = re.compile(r".*\S(?=[ \n])", re.DOTALL)


class Chunk(NamedTuple):
    """A document, or a part of a long document that can be encoded separately.

    Args:
        documents: number of documents that end in this chunk; 0: the next chunk continues the document.
        split: the document's split; None: not decided yet.
    """

    text: str
    documents: int = 1
    split: str | None = None


class Task(NamedTuple):
    """Work for one call of encode_task.

    Args:
        size: approximate size in the raw file, in bytes.
        read: returns the chunks; parses JSON lines and reads parquet rows in the worker.
        split: the chunks' split in the source.
    """

    size: int
    read: Callable[[], Iterable[Chunk]]
    split: str = "train"


def chunk_tasks(chunks: Iterable[Chunk], size: int | None = None) -> Iterator[Task]:
    """Group the chunks into tasks of at least `size` characters, by default CHUNK_BYTES."""
    size = CHUNK_BYTES if size is None else size
    waiting, characters = [], 0
    for chunk in chunks:
        waiting.append(chunk)
        characters += len(chunk.text)
        if characters >= size:
            yield Task(characters, functools.partial(iter, waiting))
            waiting, characters = [], 0
    if waiting:
        yield Task(characters, functools.partial(iter, waiting))


def split_document(blocks: Iterable[str], length: int = 4 * MAX_ENCODE_CHARS) -> Iterator[Chunk]:
    """Split a document, given in blocks of any size, into chunks of at most `length` characters.

    Text without a space or newline is split at multiples of MAX_ENCODE_CHARS, as encode_chunks would split it.
    """
    last = None
    for text in split_text(blocks, length):
        if last:
            yield Chunk(last, 0)
        last = text
    if last:
        yield Chunk(last)


def split_text(blocks: Iterable[str], length: int) -> Iterator[str]:
    """Split the joined blocks into chunks of at most `length` characters, without changing the ids of the text.

    If `length` characters have no break, the split is inside a word, and ids next to it may change.
    """
    rest = ""
    for block in blocks:
        text, start = rest + block, 0
        while len(text) - start > length:
            found = _LAST_BREAK.match(text, start, start + length + 1)
            stop = found.end() if found else start + length
            yield text[start:stop]
            start = stop
        rest = text[start:]
    if rest:
        yield rest
