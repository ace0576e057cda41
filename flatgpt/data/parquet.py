"""Read the documents of parquet files: each row is one."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

from config import UserError
from flatgpt.data import chunks
from flatgpt.data.chunks import Chunk, Task, chunk_tasks
from flatgpt.runtime.files import read_errors

TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null")


def row_tasks(path: Path, column: str) -> Iterator[Task]:
    """Yield tasks over the row groups of a parquet file. The worker reads the row groups."""
    with _open(path, column) as file:
        index = [file.schema.column(n).path for n in range(len(file.schema))].index(column)  # leaf columns
        groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
        groups = [group.column(index).total_uncompressed_size for group in groups]
    share = path.stat().st_size / max(1, sum(groups))
    start = size = 0
    for n, group_size in enumerate(groups):
        large = group_size > 4 * chunks.CHUNK_BYTES  # read here, in chunks, to limit the workers' memory
        size += 0 if large else group_size
        stop = n if large else n + 1
        if stop > start and (large or size >= chunks.CHUNK_BYTES or n == len(groups) - 1):
            yield Task(int(share * size), functools.partial(rows, path, column, start, stop))
            start, size = stop, 0
        if large:
            yield from chunk_tasks(rows(path, column, n, n + 1))
            start = n + 1


def rows(path: Path, column: str, first: int = 0, stop: int | None = None, empty: bool = False) -> Iterator[Chunk]:
    """Yield the documents of row groups first .. stop - 1 of a parquet file, in order.

    Args:
        column: a column, or a field of structs, its names joined with dots.
        empty: yield an empty text for a null or empty row. Otherwise such rows are skipped.
    """
    import pyarrow.compute

    with _open(path, column) as file, read_errors(path):
        top, *nested = _names(file.schema_arrow, column)
        groups = list(range(first, file.metadata.num_row_groups if stop is None else stop))
        # small batches, because rows can be long
        for batch in file.iter_batches(64, row_groups=groups, columns=[column], use_threads=False):
            values = batch.column(top)
            for text in (pyarrow.compute.struct_field(values, nested) if nested else values).to_pylist():
                if text or empty:
                    yield Chunk(_decode(text, path, column) if isinstance(text, bytes) else text or "")


def _open(path: Path, column: str):
    """Open a parquet file. Raise UserError if it is damaged or has no such column of text."""
    import pyarrow.parquet

    with read_errors(path):
        # buffered, so that a large row group is not read at once
        file = pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    fields, kind = file.schema_arrow, None
    for name in _names(fields, column):
        types = [field.type for field in fields if field.name == name]
        kind = types[0] if len(types) == 1 else None
        fields = kind if kind is not None and pyarrow.types.is_struct(kind) else ()
    kind = kind.storage_type if isinstance(kind, pyarrow.BaseExtensionType) else kind  # for example arrow.json
    kind = kind.value_type if isinstance(kind, pyarrow.DictionaryType) else kind
    if str(kind) not in TEXT_TYPES:
        columns = ", ".join(f"{field.name} ({field.type})" for field in file.schema_arrow)
        raise UserError(f"{path}: no text column {column!r}; its columns are {columns}: choose one with --column")
    return file


def _names(schema, column: str) -> list[str]:
    """Return the column's name, or those of nested fields if there is no such column."""
    return [column] if column in schema.names else column.split(".")


def _decode(value: bytes, path: Path, column: str) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise UserError(f"{path}: column {column!r} has bytes that are not UTF-8 text: choose another one") from None
