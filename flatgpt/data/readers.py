"""Files -> documents: plain text, JSON lines (also .gz, .zst) and parquet, in pieces that fit memory.

A text file is one document; each line of a JSON lines file is one, and each row of a parquet file. A document without
a character is left out. No torch here: a data worker loads this.
"""

from __future__ import annotations

import codecs
import dataclasses
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from config import UserError
from flatgpt.data.tokenizer import MAX_ENCODE_CHARS, split_text

CHUNK_BYTES = 4 << 20  # bytes of text that one task holds, about
SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")


@dataclass(frozen=True)
class RawFile:
    """A file of documents: a path, or a text in memory; or one to be fetched when it is needed.

    Args:
        size: bytes, as they lie on the disk or on the hub.
    """

    name: str
    size: int
    path: Path | None = None
    text: str | None = None
    fetch: Callable[[], Path] | None = None

    @property
    def missing(self) -> bool:
        """Whether it has to be fetched first."""
        return self.fetch is not None and not self.path.exists()

    def local_path(self) -> Path:
        """Its path; fetched if need be."""
        return self.fetch() if self.missing else self.path


@dataclass(frozen=True)
class Corpus:
    """The files of a source by split; where there is no `val`, it is taken out of `train`.

    Args:
        revision: names the content, where Source.revision could not.
    """

    files: dict[str, list[RawFile]]
    revision: str | None = None
    notice: str = ""


@dataclass(frozen=True)
class Chunk:
    """A document, or, of one that is longer than a block, a part that can be encoded on its own."""

    text: str
    first: bool = True
    last: bool = True
    forced_split: bool = False  # its end is in the middle of a run without a break
    starts_mid_word: bool = False  # its beginning is in the middle of a word, for the same reason


def file_format(name: str | Path) -> str:
    """`parquet`, `jsonl` or `text`, by the name's ending."""
    name = str(name)
    if name.endswith(".parquet"):
        return "parquet"
    return "jsonl" if name.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")) else "text"


def documents(path: Path, column: str) -> Iterator[Chunk]:
    """All documents of a file in order, long text files in parts."""
    if file_format(path) == "text":
        yield from split_document(text_chunks(path))
    elif file_format(path) == "parquet":
        yield from map(Chunk, rows(path, column))
    else:
        for line, block in line_chunks(path):
            yield from map(Chunk, parse_lines(block, column, path, line))


def text_bytes(path: Path, column: str) -> int:
    """Bytes of text in a file, for progress and disk space: exact for plain text, near it for the others."""
    return sum(s for _, s in row_groups(path, column)) if file_format(path) == "parquet" else path.stat().st_size


# ---------------------------------------------------------------------------------------------------------------------
# plain text


def text_chunks(path: Path) -> Iterator[str]:
    """The text of a UTF-8 file, block by block, newlines as they are, without a byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    offset = 0
    with _reading(path), open(path, "rb") as file:
        while True:
            block = file.read(CHUNK_BYTES)
            waiting = len(decoder.getstate()[0])  # bytes of a character that the last block ended in
            try:
                yield decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                # after a mark of three bytes the decoder counts from behind it
                start = offset - waiting + error.start + 3 * (offset == 0 and block.startswith(codecs.BOM_UTF8))
                raise UserError(
                    f"{path}: not UTF-8: byte 0x{error.object[error.start]:02x} at offset {start:,}; "
                    "convert it (iconv -f latin1 -t utf-8, say) or leave it out"
                ) from None
            if not block:
                return
            offset += len(block)


def split_document(blocks: Iterable[str], length: int = 4 * MAX_ENCODE_CHARS) -> Iterator[Chunk]:
    """One document that comes in blocks, in parts of at most `length` characters; nothing where there is no text."""
    last = None
    for piece, cut in split_text(
        blocks, length
    ):  # at multiples of MAX_ENCODE_CHARS a run is cut here where the worker would cut it
        if last:
            yield last
        inside = last is not None and not (last.text[-1].isspace() or piece[0].isspace())
        last = Chunk(piece, last is None, False, cut, inside)
    if last:
        yield dataclasses.replace(last, last=True)


@contextmanager
def _reading(path: Path):
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged or truncated ({error}); move it away and get it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


# ---------------------------------------------------------------------------------------------------------------------
# JSON lines


def line_chunks(path: Path) -> Iterator[tuple[int, bytes]]:
    """Whole lines of a JSON lines file in blocks of about CHUNK_BYTES bytes, each with the number of its first line."""
    line, rest = 1, []
    with _reading(path), _open(path) as file:
        while block := file.read(CHUNK_BYTES):
            head, newline, tail = block.rpartition(b"\n")
            if newline:
                whole = b"".join([*rest, head, newline])
                yield line, whole
                line += whole.count(b"\n")
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
    """The texts of a block of JSON lines; empty lines, nulls and empty texts are left out.

    Raises:
        UserError: a line that is no JSON object with that column as a text; names file and line.
    """
    for number, raw in enumerate(block.split(b"\n"), line):
        if not raw.strip():
            continue
        try:
            row = json.loads(raw.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} line {number:,}: not JSON ({error})") from None
        if not isinstance(row, dict) or column not in row:
            there = f"its keys are {', '.join(row)}" if isinstance(row, dict) else f"a {type(row).__name__}"
            raise UserError(f"{path} line {number:,}: no key {column!r}, {there}; name the one with --column")
        text = row[column]
        if text is not None and not isinstance(text, str):
            raise UserError(f"{path} line {number:,}: {column!r} is a {type(text).__name__}, not a text")
        if text:
            yield _without_surrogates(text)


def _without_surrogates(text: str) -> str:
    """JSON can spell half a character ("\\ud83d"): two halves become one, a lone one U+FFFD, as tiktoken does it."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# ---------------------------------------------------------------------------------------------------------------------
# parquet


def _open_parquet(path: Path, column: str):
    """The file, its column checked. UserError: no parquet, truncated, without that column, or not of texts."""
    import pyarrow
    import pyarrow.parquet

    with _reading(path):
        try:
            # buffered, so that a row group is not read whole: some files have one of gigabytes
            file = pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
        except pyarrow.ArrowInvalid as error:
            reason = _first_line(error).split(". ")[0]
            raise UserError(f"{path}: no parquet file, or a truncated one ({reason}); get it again") from None
    schema = file.schema_arrow
    if column not in schema.names:
        raise UserError(
            f"{path}: no column {column!r}; its columns are {', '.join(schema.names)}: choose with --column"
        )
    if schema.names.count(column) > 1:
        raise UserError(f"{path}: has several columns {column!r}")
    found = schema.field(column).type
    if pyarrow.types.is_dictionary(found):
        found = found.value_type
    kinds = pyarrow.types
    if not any(is_kind(found) for is_kind in (kinds.is_string, kinds.is_large_string, kinds.is_null)):
        raise UserError(f"{path}: column {column!r} holds {found}, not text; its columns are {', '.join(schema.names)}")
    return file


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")


def row_groups(path: Path, column: str) -> list[tuple[int, int]]:
    """(rows, bytes of the column) of each row group of a parquet file."""
    with _open_parquet(path, column) as file:
        meta = file.metadata
        paths = [file.schema.column(n).path for n in range(len(file.schema))]  # nested columns come as several
        place = paths.index(column)
        groups = [meta.row_group(n) for n in range(meta.num_row_groups)]
        return [(group.num_rows, group.column(place).total_uncompressed_size) for group in groups]


def rows(path: Path, column: str, first: int = 0, stop: int | None = None, empty: bool = False) -> Iterator[str]:
    """The texts of the row groups first .. stop - 1 of a parquet file, in order.

    Args:
        empty: give a null or empty row as an empty text, instead of leaving it out.
    """
    import pyarrow

    with _open_parquet(path, column) as file:
        meta = file.metadata
        groups = list(range(first, meta.num_row_groups if stop is None else stop))
        n = sum(meta.row_group(g).num_rows for g in groups)
        of_rows = sum(meta.row_group(g).total_byte_size for g in groups)
        # long rows: few at a time; as entries of a dictionary they can be longer than these sizes say
        per_batch = max(1, min(128, CHUNK_BYTES * n // (of_rows + 1)))
        try:
            for batch in file.iter_batches(per_batch, row_groups=groups, columns=[column], use_threads=False):
                for text in batch.column(0).to_pylist():
                    if text or empty:
                        yield text or ""
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: damaged ({_first_line(error)}); move it away and get it again") from None
