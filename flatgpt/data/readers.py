"""Read documents from plain text, JSON lines (also .gz and .zst) and parquet files, and group them into tasks.

A text file is one document; so is each line of a JSON lines file and each row of a parquet file. Empty documents are
left out. This module does not import torch: data workers load it.
"""

from __future__ import annotations

import codecs
import functools
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from config import UserError
from flatgpt.data.tokenizer import MAX_ENCODE_CHARS, split_text

CHUNK_BYTES = 4 << 20  # approximate bytes of text in one chunk, and in one task
FORMATS = {".txt": "text", ".md": "text", ".py": "text", ".parquet": "parquet"}
FORMATS |= dict.fromkeys((".jsonl", ".jsonl.gz", ".jsonl.zst"), "jsonl")


@dataclass(frozen=True)
class RawFile:
    """A file of documents: a path, a text in memory, or a file to be downloaded when it is needed.

    Args:
        size: bytes of the file, on the disk or on the hub.
        fetch: downloads the file and returns its path.
    """

    name: str
    size: int
    path: Path | None = None
    text: str | None = None
    fetch: Callable[[], Path] | None = None

    def local_path(self) -> Path:
        """Return the file's path; download the file if it is missing."""
        return self.fetch() if self.fetch and not self.path.exists() else self.path


@dataclass(frozen=True)
class Corpus:
    """The files of a source, by split.

    Args:
        revision: identifies the content.
        notice: a line to print.
    """

    files: dict[str, list[RawFile]]
    revision: str | None = None
    notice: str = ""


class Chunk(NamedTuple):
    """A document, or a part of a long one that can be encoded on its own.

    Args:
        documents: how many documents end with this chunk; 0: the next chunk continues the document.
        split: where the document goes; None: not decided yet.
    """

    text: str
    documents: int = 1
    split: str | None = None


class Task(NamedTuple):
    """Work for one call of encode_task. Where documents are parsed there, only their raw form is sent to the worker.

    Args:
        size: approximate bytes of the file that it takes.
        read: returns the chunks.
        split: the split of the source that they belong to.
    """

    size: int
    read: Callable[[], Iterable[Chunk]]
    split: str = "train"


def file_format(name: str | Path) -> str:
    """Return `parquet`, `jsonl` or, by any other suffix than theirs, `text`."""
    return next((FORMATS[suffix] for suffix in FORMATS if str(name).endswith(suffix)), "text")


def file_tasks(files: Iterable[RawFile], column: str, choose_split: Callable | None = None) -> Iterator[Task]:
    """Yield tasks over all documents of the files, in order; files are downloaded when their turn comes.

    Args:
        choose_split: returns the split of a document that comes in several chunks, given them all.
    """
    for kind, group in itertools.groupby(files, lambda file: file_format(file.name)):
        if kind == "text":  # small files share a task
            yield from chunk_tasks(chunk for file in group for chunk in _text_document(file, choose_split))
        else:
            tasks = _line_tasks if kind == "jsonl" else _row_tasks
            for file in group:
                yield from tasks(file.local_path().absolute(), column)  # a cluster's workers run in other folders


def chunk_tasks(chunks: Iterable[Chunk], size: int | None = None) -> Iterator[Task]:
    """Yield tasks of at least `size` characters, by default CHUNK_BYTES, over the chunks."""
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


@contextmanager
def read_errors(path: Path):
    """Turn errors of reading a file into a UserError."""
    try:
        yield
    except (OSError, ValueError) as error:  # those of pyarrow too
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be read: {reason}") from None


# ---------------------------------------------------------------------------------------------------------------------
# plain text


def text_chunks(path: Path) -> Iterator[str]:
    """Yield the text of a UTF-8 file in chunks, with its newlines as they are and without a byte order mark."""
    line = 1
    with read_errors(path), open(path, "rb") as file:
        try:
            for text in codecs.iterdecode(iter(lambda: file.read(CHUNK_BYTES), b""), "utf-8-sig"):
                yield text
                line += text.count("\n")
        except UnicodeDecodeError as error:
            line += error.object[: error.start].count(b"\n")
            byte = error.object[error.start]
            raise UserError(
                f"{path} line {line:,}: byte 0x{byte:02x} is not UTF-8: convert or leave out the file"
            ) from None


def split_document(blocks: Iterable[str], length: int = 4 * MAX_ENCODE_CHARS) -> Iterator[Chunk]:
    """Yield one document, which comes in blocks, in chunks of at most `length` characters; nothing if it is empty."""
    last = None
    # A long run is split at multiples of MAX_ENCODE_CHARS, where the worker would split it.
    for text in split_text(blocks, length):
        if last:
            yield Chunk(last, 0)
        last = text
    if last:
        yield Chunk(last)


def _text_document(file: RawFile, choose_split: Callable | None) -> Iterator[Chunk]:
    split = None
    for chunk in split_document([file.text] if file.text else text_chunks(file.local_path())):
        if choose_split and split is None and not chunk.documents:
            split = choose_split(text_chunks(file.path))  # the hash takes the whole document: read it once for that
        yield chunk._replace(split=split)


# ---------------------------------------------------------------------------------------------------------------------
# JSON lines


def _line_tasks(path: Path, column: str) -> Iterator[Task]:
    """Yield tasks over the lines of a JSON lines file, which travel to the worker."""
    compression = 1 if path.suffix == ".jsonl" else 3  # about
    for line, block in line_chunks(path):
        yield Task(len(block) // compression, functools.partial(parse_lines, block, column, path, line))


def line_chunks(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield complete lines in blocks of about CHUNK_BYTES bytes, each with the number of its first line."""
    import pyarrow

    line, rest = 1, b""
    with read_errors(path), pyarrow.input_stream(str(path), compression="detect") as file:
        while block := file.read(CHUNK_BYTES):
            lines, newline, rest = (rest + block).rpartition(b"\n")
            if newline:
                yield line, lines + newline
                line += lines.count(b"\n") + 1
        if rest:
            yield line, rest


def parse_lines(block: bytes, column: str, path: Path, line: int) -> Iterator[Chunk]:
    """Yield the documents in a block of JSON lines; empty lines, nulls and empty texts are left out.

    Args:
        line: number of the first line.

    Raises:
        UserError: a line is not a JSON object with a string under that key.
    """
    for number, raw in enumerate(block.split(b"\n"), line):
        if not raw.strip():
            continue
        try:
            row = json.loads(raw.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} line {number:,}: not JSON ({error})") from None
        text = row.get(column, 0) if isinstance(row, dict) else 0
        if not isinstance(text, str | None):
            types = (
                {key: type(value).__name__ for key, value in row.items()}
                if isinstance(row, dict)
                else type(row).__name__
            )
            raise UserError(f"{path} line {number:,}: no text {column!r} in {types}; choose the key with --column")
        if text:
            try:
                text.encode()
            except UnicodeEncodeError:  # "\ud83d" is half a character: join pairs, replace a lone one, as tiktoken
                text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            yield Chunk(text)


# ---------------------------------------------------------------------------------------------------------------------
# parquet


def _row_tasks(path: Path, column: str) -> Iterator[Task]:
    """Yield tasks over row groups of a parquet file, which the worker reads."""
    with _open_parquet(path, column) as file:
        index = [file.schema.column(n).path for n in range(len(file.schema))].index(column)  # nested ones are several
        groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
        groups = [group.column(index).total_uncompressed_size for group in groups]
    share = path.stat().st_size / max(1, sum(groups))
    start = size = 0
    for n, group_size in enumerate(groups):
        large = group_size > 4 * CHUNK_BYTES  # than fits into a worker's memory: read here, in chunks
        size += 0 if large else group_size
        stop = n if large else n + 1
        if stop > start and (large or size >= CHUNK_BYTES or n == len(groups) - 1):
            yield Task(int(share * size), functools.partial(rows, path, column, start, stop))
            start, size = stop, 0
        if large:
            yield from chunk_tasks(rows(path, column, n, n + 1))
            start = n + 1


def rows(path: Path, column: str, first: int = 0, stop: int | None = None, empty: bool = False) -> Iterator[Chunk]:
    """Yield the texts of the row groups first .. stop - 1 of a parquet file, in order.

    Args:
        empty: yield an empty text for a null or empty row, which is left out otherwise.
    """
    with _open_parquet(path, column) as file, read_errors(path):
        groups = list(range(first, file.metadata.num_row_groups if stop is None else stop))
        # few rows at a time, as they may be long
        for batch in file.iter_batches(64, row_groups=groups, columns=[column], use_threads=False):
            for text in batch.column(0).to_pylist():
                if text or empty:
                    yield Chunk(text or "")


def _open_parquet(path: Path, column: str):
    """Open a parquet file. Raises UserError if it is damaged or its column does not exist or does not hold strings."""
    import pyarrow.parquet

    with read_errors(path):
        # buffered, so that a row group of gigabytes is not read at once
        file = pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    schema = file.schema_arrow
    types = [field.type for field in schema if field.name == column]
    types = [kind.value_type if pyarrow.types.is_dictionary(kind) else kind for kind in types]
    if [str(kind) in ("string", "large_string", "string_view", "null") for kind in types] != [True]:
        columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise UserError(f"{path}: no text column {column!r}; its columns are {columns}: choose one with --column")
    return file
