"""Read documents from plain text, JSON lines (also .gz and .zst) and parquet files, and group them into tasks.

A text file, a line of a JSON lines file and a row of a parquet file are each one document. Empty documents are
skipped. This module does not import torch, so that data workers start fast.
"""

from __future__ import annotations

import codecs
import functools
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from config import UserError, first_line
from flatgpt.data.tokenizer import MAX_ENCODE_CHARS, split_text

CHUNK_BYTES = 4 << 20  # approximate size of a chunk and of a task
FORMATS = {".txt": "text", ".md": "text", ".py": "text", ".parquet": "parquet"}
FORMATS |= dict.fromkeys((".jsonl", ".jsonl.gz", ".jsonl.zst"), "jsonl")


@dataclass(frozen=True)
class RawFile:
    """A file of documents: a local path, a text in memory, or a file to be downloaded when it is read.

    Args:
        size: size in bytes, on the disk or on the hub.
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
        revision: identifier of the content.
        notice: a line to print.
    """

    files: dict[str, list[RawFile]]
    revision: str | None = None
    notice: str = ""


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


def files_below(folder: Path) -> list[Path]:
    """Return the files in a folder and its subfolders, sorted. Links to folders are followed, except in a circle."""
    found = []
    for root, folders, names in os.walk(folder, followlinks=True):
        above = {path.resolve() for path in (Path(root), *Path(root).parents)}
        folders[:] = [name for name in folders if Path(root, name).resolve() not in above]
        found += [Path(root, name) for name in names]
    return sorted(path for path in found if path.is_file())


def file_format(name: str | Path) -> str:
    """Return `parquet`, `jsonl` or, for any other suffix, `text`."""
    return next((FORMATS[suffix] for suffix in FORMATS if str(name).endswith(suffix)), "text")


def file_tasks(files: Iterable[RawFile], column: str, choose_split: Callable | None = None) -> Iterator[Task]:
    """Yield tasks over all documents of the files, in order. Each file is downloaded when it is reached.

    Args:
        choose_split: returns the split of a document of several chunks, from the text of all its chunks.
    """
    for format, group in itertools.groupby(files, lambda file: file_format(file.name)):
        if format == "text":  # a task can contain several small files
            yield from chunk_tasks(chunk for file in group for chunk in _text_document(file, choose_split))
        else:
            tasks = _line_tasks if format == "jsonl" else _row_tasks
            for file in group:
                yield from tasks(file.local_path().absolute(), column)  # absolute, for workers with another cwd


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


def documents(files: Iterable[RawFile], column: str, limit: int | None, choose: Callable | None = None):
    """Yield the chunks of the first `limit` documents of the files, in order. The others are not read or downloaded."""
    count = 0
    for chunk in itertools.chain.from_iterable(task.read() for task in file_tasks(files, column, choose)):
        yield chunk
        count += chunk.documents
        if count == limit:
            return


def joined_rows(files: Iterable[RawFile], column: str, limit: int | None) -> Iterator[Chunk]:
    """Join at most `limit` rows of the files to one text, and yield it in chunks; each row counts as a document."""
    read = counted = 0
    found = (chunk for file in files for chunk in rows(file.local_path(), column, empty=True))

    def blocks() -> Iterator[str]:
        nonlocal read
        for task in chunk_tasks(itertools.islice(found, limit)):
            block = list(task.read())
            read += len(block)
            yield "".join(chunk.text for chunk in block)

    for chunk in split_document(blocks()):
        yield chunk._replace(documents=read - counted)
        counted = read


@contextmanager
def read_errors(path: Path):
    """Convert errors of reading a file to a UserError."""
    try:
        yield
    except (OSError, ValueError, NotImplementedError) as error:  # includes those of pyarrow
        remedy = "; if it is damaged or incomplete, move it away and download or copy it again"
        reason = getattr(error, "strerror", None) or first_line(error).rstrip(".") + remedy
        raise UserError(f"{path}: cannot be read: {reason}") from None


# ---------------------------------------------------------------------------------------------------------------------
# plain text


def text_chunks(path: Path) -> Iterator[str]:
    """Yield the text of a UTF-8 file in chunks. Newlines are unchanged; a byte order mark is removed."""
    line = 1
    with read_errors(path), open(path, "rb") as file:
        try:
            for text in codecs.iterdecode(iter(lambda: file.read(CHUNK_BYTES), b""), "utf-8-sig"):
                yield text
                line += text.count("\n")
        except UnicodeDecodeError as error:
            line += error.object[: error.start].count(b"\n")
            byte = f"byte 0x{error.object[error.start]:02x}"
            raise UserError(f"{path} line {line:,}: {byte} is not UTF-8: convert or leave out the file") from None


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


def _text_document(file: RawFile, choose_split: Callable | None) -> Iterator[Chunk]:
    split = None
    for chunk in split_document([file.text] if file.text else text_chunks(file.local_path())):
        if choose_split and split is None and not chunk.documents:
            split = choose_split(text_chunks(file.path))  # reads the whole document, for its hash
        yield chunk._replace(split=split)


# ---------------------------------------------------------------------------------------------------------------------
# JSON lines


def _line_tasks(path: Path, column: str) -> Iterator[Task]:
    """Yield tasks over the lines of a JSON lines file. The worker receives and parses the lines."""
    compression = 1 if path.suffix == ".jsonl" else 3  # a typical ratio
    for line, block in line_chunks(path):
        yield Task(len(block) // compression, functools.partial(parse_lines, block, column, path, line))


def line_chunks(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (number of the first line, block of complete lines), in blocks of about CHUNK_BYTES."""
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
    """Yield the documents in a block of JSON lines. Empty lines, nulls and empty texts are skipped.

    Args:
        line: number of the first line.

    Raises:
        UserError: a line is not a JSON object, or its `column` is not a string.
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
            types = {k: type(v).__name__ for k, v in row.items()} if isinstance(row, dict) else type(row).__name__
            raise UserError(f"{path} line {number:,}: no text {column!r} in {types}; choose the key with --column")
        if text:
            try:
                text.encode()
            except UnicodeEncodeError:  # join surrogate pairs and replace lone surrogates, as tiktoken does
                text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            yield Chunk(text)


# ---------------------------------------------------------------------------------------------------------------------
# parquet


def _row_tasks(path: Path, column: str) -> Iterator[Task]:
    """Yield tasks over the row groups of a parquet file. The worker reads the row groups."""
    with _open_parquet(path, column) as file:
        index = [file.schema.column(n).path for n in range(len(file.schema))].index(column)  # leaf columns
        groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
        groups = [group.column(index).total_uncompressed_size for group in groups]
    share = path.stat().st_size / max(1, sum(groups))
    start = size = 0
    for n, group_size in enumerate(groups):
        large = group_size > 4 * CHUNK_BYTES  # read here, in chunks, to limit the workers' memory
        size += 0 if large else group_size
        stop = n if large else n + 1
        if stop > start and (large or size >= CHUNK_BYTES or n == len(groups) - 1):
            yield Task(int(share * size), functools.partial(rows, path, column, start, stop))
            start, size = stop, 0
        if large:
            yield from chunk_tasks(rows(path, column, n, n + 1))
            start = n + 1


def rows(path: Path, column: str, first: int = 0, stop: int | None = None, empty: bool = False) -> Iterator[Chunk]:
    """Yield the documents of row groups first .. stop - 1 of a parquet file, in order.

    Args:
        empty: yield an empty text for a null or empty row. Otherwise such rows are skipped.
    """
    with _open_parquet(path, column) as file, read_errors(path):
        groups = list(range(first, file.metadata.num_row_groups if stop is None else stop))
        # small batches, because rows can be long
        for batch in file.iter_batches(64, row_groups=groups, columns=[column], use_threads=False):
            for text in batch.column(0).to_pylist():
                if text or empty:
                    yield Chunk(text or "")


def _open_parquet(path: Path, column: str):
    """Open a parquet file. Raise UserError if it is damaged or has no such column of strings."""
    import pyarrow.parquet

    with read_errors(path):
        # buffered, so that a large row group is not read at once
        file = pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    schema = file.schema_arrow
    types = [field.type for field in schema if field.name == column]
    types = [t.value_type if pyarrow.types.is_dictionary(t) else t for t in types]
    if [str(t) in ("string", "large_string", "string_view", "null") for t in types] != [True]:
        columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise UserError(f"{path}: no text column {column!r}; its columns are {columns}: choose one with --column")
    return file
