"""Read documents from the files of a source, and group them into tasks.

A text file, a line of a JSON lines file, an item of a JSON array and a row of a table or parquet file are each one
document. Empty documents are skipped. This module does not import torch, so that data workers start fast.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from flatgpt.data import parquet, records
from flatgpt.data.chunks import Chunk, Task, chunk_tasks, split_document
from flatgpt.data.text_files import TYPICAL_RATIO, file_format, suffixes, text_chunks


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

    def has_changed(self) -> bool:
        """Return whether a file of the user has another size now."""
        return self.path is not None and self.fetch is None and self.path.stat().st_size != self.size


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


def walk(folder: Path, onerror: Callable[[OSError], None] | None = None) -> Iterator[tuple[Path, list, list]]:
    """Yield what os.walk does. Links to folders are followed, except in a circle."""
    for root, folders, names in os.walk(folder, onerror=onerror, followlinks=True):
        above = {path.resolve() for path in (Path(root), *Path(root).parents)}
        folders[:] = [name for name in folders if Path(root, name).resolve() not in above]
        yield Path(root), folders, names


def files_below(folder: Path) -> list[Path]:
    """Return the files in a folder and its subfolders, sorted."""
    return sorted(path for root, _, names in walk(folder) for name in names if (path := root / name).is_file())


def file_tasks(
    files: Iterable[RawFile],
    column: str,
    choose_split: Callable | None = None,
    encoding: str = "utf-8",
    size: int | None = None,
) -> Iterator[Task]:
    """Yield tasks over all documents of the files, in order. Each file is downloaded when it is reached.

    Args:
        choose_split: returns the split of a document of several chunks, from the text of all its chunks.
        encoding: of files without a byte order mark.
        size: that of `chunk_tasks`, where it groups the documents.
    """
    for (format, compressed), group in itertools.groupby(files, _kind):
        if format == "text":  # a task can contain several small files
            found = (chunk for file in group for chunk in _text_document(file, choose_split, encoding))
            tasks = chunk_tasks(found, size)
        else:
            paths = (file.local_path().absolute() for file in group)  # absolute, for workers with another cwd
            tasks = itertools.chain.from_iterable(_record_tasks(path, format, column, encoding, size) for path in paths)
        yield from (task._replace(size=task.size // TYPICAL_RATIO) for task in tasks) if compressed else tasks


def _kind(file: RawFile) -> tuple[str, bool]:
    return file_format(file.name), suffixes(file.name)[1] != ""


def _record_tasks(path: Path, format: str, column: str, encoding: str, size: int | None) -> Iterator[Task]:
    if format == "parquet":
        return parquet.row_tasks(path, column)
    if format == "csv":
        return chunk_tasks(records.table_chunks(path, column, encoding), size)
    if format == "json" and records.is_array(path, encoding):
        return chunk_tasks(records.array_chunks(path, column, encoding), size)
    return records.line_tasks(path, column, encoding)


def documents(
    files: Iterable[RawFile],
    column: str,
    limit: int | None,
    choose_split: Callable | None = None,
    encoding: str = "utf-8",
) -> Iterator[Chunk]:
    """Yield the chunks of the first `limit` documents of the files, in order. The others are not read or downloaded."""
    count = 0
    tasks = file_tasks(files, column, choose_split, encoding, size=0)  # 0: nothing is read ahead
    for chunk in itertools.chain.from_iterable(task.read() for task in tasks):
        yield chunk
        count += chunk.documents
        if count == limit:
            return


def joined_rows(files: Iterable[RawFile], column: str, limit: int | None) -> Iterator[Chunk]:
    """Join at most `limit` rows of the files to one text, and yield it in chunks; each row counts as a document."""
    read = counted = 0
    found = (chunk for file in files for chunk in parquet.rows(file.local_path(), column, empty=True))

    def blocks() -> Iterator[str]:
        nonlocal read
        for task in chunk_tasks(itertools.islice(found, limit)):
            block = list(task.read())
            read += len(block)
            yield "".join(chunk.text for chunk in block)

    for chunk in split_document(blocks()):
        yield chunk._replace(documents=read - counted)
        counted = read


def _text_document(file: RawFile, choose_split: Callable | None, encoding: str) -> Iterator[Chunk]:
    split = None
    for chunk in split_document([file.text] if file.text else text_chunks(file.local_path(), encoding)):
        if choose_split and split is None and not chunk.documents:
            split = choose_split(text_chunks(file.path, encoding))  # reads the whole document, for its hash
        yield chunk._replace(split=split)
