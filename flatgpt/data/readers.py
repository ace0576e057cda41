"""Read documents from plain text, JSON lines (also .gz and .zst) and parquet files, in chunks that fit into memory.

A text file is one document; so is each line of a JSON lines file and each row of a parquet file. Empty documents are
left out. This module does not import torch: data workers load it.
"""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from config import UserError
from flatgpt.data.tokenizer import MAX_ENCODE_CHARS, split_text

CHUNK_BYTES = 4 << 20  # approximate bytes of text in one chunk, and in one task
SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")


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

    @property
    def missing(self) -> bool:
        """Whether the file has to be downloaded first."""
        return self.fetch is not None and not self.path.exists()

    def local_path(self) -> Path:
        """Return the file's path; download the file if it is missing."""
        return self.fetch() if self.missing else self.path


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
        forced_split: whether it ends within a run of characters without a place to split.
        split: where the document goes; None: not decided yet.
    """

    text: str
    documents: int = 1
    forced_split: bool = False
    split: str | None = None


def file_format(name: str | Path) -> str:
    """Return `parquet`, `jsonl` or `text`, by the name's suffix."""
    name = str(name)
    if name.endswith(".parquet"):
        return "parquet"
    return "jsonl" if name.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")) else "text"


def documents(path: Path, column: str) -> Iterator[Chunk]:
    """Yield the documents of a file in order, long text files in several chunks."""
    if file_format(path) == "text":
        yield from split_document(text_chunks(path))
    elif file_format(path) == "parquet":
        yield from map(Chunk, rows(path, column))
    else:
        for line, block in line_chunks(path):
            yield from map(Chunk, parse_lines(block, column, path, line))


def text_bytes(path: Path, column: str) -> int:
    """Return the bytes of text in a file, exactly for plain text and approximately for the other formats."""
    return sum(s for _, s in row_groups(path, column)) if file_format(path) == "parquet" else path.stat().st_size


# ---------------------------------------------------------------------------------------------------------------------
# plain text


def text_chunks(path: Path) -> Iterator[str]:
    """Yield the text of a UTF-8 file in chunks, with its newlines as they are and without a byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    offset = 0
    with _read_errors(path), open(path, "rb") as file:
        while True:
            block = file.read(CHUNK_BYTES)
            pending = len(decoder.getstate()[0])  # bytes of a character that the last block ended in
            try:
                yield decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                # after a byte order mark (3 bytes) the decoder counts from its end
                start = offset - pending + error.start + 3 * (offset == 0 and block.startswith(codecs.BOM_UTF8))
                raise UserError(
                    f"{path}: not UTF-8: byte 0x{error.object[error.start]:02x} at offset {start:,}; "
                    "convert it (iconv -f latin1 -t utf-8, say) or leave it out"
                ) from None
            if not block:
                return
            offset += len(block)


def split_document(blocks: Iterable[str], length: int = 4 * MAX_ENCODE_CHARS) -> Iterator[Chunk]:
    """Yield one document, which comes in blocks, in chunks of at most `length` characters; nothing if it is empty."""
    last = None
    # A long run is split at multiples of MAX_ENCODE_CHARS, where the worker would split it.
    for text, forced_split in split_text(blocks, length):
        if last:
            yield last
        last = Chunk(text, 0, forced_split)
    if last:
        yield last._replace(documents=1)


@contextmanager
def _read_errors(path: Path):
    """Turn errors of reading a file into a UserError."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged or truncated ({error}); move it away and get it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


# ---------------------------------------------------------------------------------------------------------------------
# JSON lines


def line_chunks(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield complete lines in blocks of about CHUNK_BYTES bytes, each with the number of its first line."""
    line, rest = 1, []
    with _read_errors(path), _open(path) as file:
        while block := file.read(CHUNK_BYTES):
            head, newline, tail = block.rpartition(b"\n")
            if newline:
                lines = b"".join([*rest, head, newline])
                yield line, lines
                line += lines.count(b"\n")
                rest = []
            rest.append(tail)
        if last := b"".join(rest):
            yield line, last


def _open(path: Path):
    if path.name.endswith(".gz"):
        return gzip.open(path, "rb")
    if path.name.endswith(".zst"):
        import pyarrow

        return pyarrow.input_stream(str(path), compression="zstd")
    return open(path, "rb")


def parse_lines(block: bytes, column: str, path: Path, line: int) -> Iterator[str]:
    """Yield the texts in a block of JSON lines; empty lines, nulls and empty texts are left out.

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
        if not isinstance(row, dict) or column not in row:
            found = f"its keys are {', '.join(row)}" if isinstance(row, dict) else f"a {type(row).__name__}"
            raise UserError(f"{path} line {number:,}: no key {column!r}, {found}; choose the key with --column")
        text = row[column]
        if text is not None and not isinstance(text, str):
            raise UserError(f"{path} line {number:,}: {column!r} is a {type(text).__name__}, not a text")
        if text:
            try:
                text.encode()
            except UnicodeEncodeError:  # "\ud83d" is half a character: join pairs, replace a lone one, as tiktoken
                text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            yield text


# ---------------------------------------------------------------------------------------------------------------------
# parquet


def _open_parquet(path: Path, column: str):
    """Open a parquet file. Raises UserError if it is damaged or its column does not exist or does not hold strings."""
    import pyarrow
    import pyarrow.parquet

    with _read_errors(path):
        try:
            # buffered, so that a row group of gigabytes is not read at once
            file = pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
        except pyarrow.ArrowInvalid as error:
            reason = _first_line(error).split(". ")[0]
            raise UserError(f"{path}: not a parquet file, or a truncated one ({reason}); get it again") from None
    schema = file.schema_arrow
    if column not in schema.names:
        raise UserError(
            f"{path}: no column {column!r}; its columns are {', '.join(schema.names)}: choose with --column"
        )
    if schema.names.count(column) > 1:
        raise UserError(f"{path}: has several columns {column!r}")
    types, found = pyarrow.types, schema.field(column).type
    if types.is_dictionary(found):
        found = found.value_type
    if not (types.is_string(found) or types.is_large_string(found) or types.is_null(found)):
        raise UserError(f"{path}: column {column!r} holds {found}, not text; its columns are {', '.join(schema.names)}")
    return file


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")


def row_groups(path: Path, column: str) -> list[tuple[int, int]]:
    """Return (rows, bytes of the column) of each row group of a parquet file."""
    with _open_parquet(path, column) as file:
        meta = file.metadata
        paths = [file.schema.column(n).path for n in range(len(file.schema))]  # nested columns come as several
        index = paths.index(column)
        groups = [meta.row_group(n) for n in range(meta.num_row_groups)]
        return [(group.num_rows, group.column(index).total_uncompressed_size) for group in groups]


def rows(path: Path, column: str, first: int = 0, stop: int | None = None, empty: bool = False) -> Iterator[str]:
    """Yield the texts of the row groups first .. stop - 1 of a parquet file, in order.

    Args:
        empty: yield an empty text for a null or empty row, which is left out otherwise.
    """
    import pyarrow

    with _open_parquet(path, column) as file:
        meta = file.metadata
        groups = list(range(first, meta.num_row_groups if stop is None else stop))
        n = sum(meta.row_group(g).num_rows for g in groups)
        size = sum(meta.row_group(g).total_byte_size for g in groups)
        # few long rows at a time; rows of a dictionary column can be longer than these sizes say
        per_batch = max(1, min(128, CHUNK_BYTES * n // (size + 1)))
        try:
            for batch in file.iter_batches(per_batch, row_groups=groups, columns=[column], use_threads=False):
                for text in batch.column(0).to_pylist():
                    if text or empty:
                        yield text or ""
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: damaged ({_first_line(error)}); move it away and get it again") from None
