"""Read documents from JSON lines, JSON arrays, and tables of comma- or tab-separated values."""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Iterator
from pathlib import Path

from config import UserError
from flatgpt.data.chunks import Chunk, Task
from flatgpt.data.text_files import suffixes, text_chunks

MAX_ARRAY_CHARS = 1 << 30  # a JSON array is read at once
MISSING = object()

csv.field_size_limit((1 << 31) - 1)  # the default is 131,072 characters


# ---------------------------------------------------------------------------------------------------------------------
# JSON


def line_tasks(path: Path, column: str, encoding: str) -> Iterator[Task]:
    """Yield tasks over the lines of a JSON lines file. The worker receives and parses the lines."""
    for line, block in line_chunks(path, encoding):
        yield Task(len(block), functools.partial(parse_lines, block, column, path, line))


def line_chunks(path: Path, encoding: str) -> Iterator[tuple[int, str]]:
    """Yield (number of the first line, block of complete lines), in blocks of about CHUNK_BYTES."""
    line, rest = 1, ""
    for text in text_chunks(path, encoding):
        lines, newline, rest = (rest + text).rpartition("\n")
        if newline:
            yield line, lines + newline
            line += lines.count("\n") + 1
    if rest:
        yield line, rest


def parse_lines(block: str, column: str, path: Path, line: int) -> Iterator[Chunk]:
    """Yield the documents in a block of JSON lines. Empty lines, nulls and empty texts are skipped.

    Args:
        line: number of the first line.

    Raises:
        UserError: a line is not JSON, or has no text; see `_document`.
    """
    for number, raw in enumerate(block.split("\n"), line):
        if raw := raw.removeprefix("\ufeff").strip():  # of files that were concatenated
            place = f"{path} line {number:,}"
            try:
                row = json.loads(raw)
            except (ValueError, RecursionError) as error:
                expected = "one object a line is expected, or an array in a .json file"
                raise UserError(f"{place}: not JSON ({getattr(error, 'msg', error)}); {expected}") from None
            yield from _document(row, column, place)


def is_array(path: Path, encoding: str) -> bool:
    """Return whether a JSON file is one array, and not lines."""
    return next((text for chunk in text_chunks(path, encoding) if (text := chunk.lstrip())), "").startswith("[")


def array_chunks(path: Path, column: str, encoding: str) -> Iterator[Chunk]:
    """Yield the documents of a JSON array of objects or strings.

    Raises:
        UserError: the file is too large or not JSON, or an item has no text; see `_document`.
    """
    parts, characters = [], 0
    for text in text_chunks(path, encoding):
        parts.append(text)
        characters += len(text)
        if characters > MAX_ARRAY_CHARS:
            problem = f"{path} is an array of more than {MAX_ARRAY_CHARS:,} characters"
            raise UserError(f"{problem}: make JSON lines of it with jq -c '.[]'")
    try:
        rows = json.loads("".join(parts))
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise UserError(f"{path} line {line:,}: not JSON ({getattr(error, 'msg', error)})") from None
    for number, row in enumerate(rows, 1):
        yield from _document(row, column, f"{path} item {number:,}")


def _document(row: object, column: str, place: str) -> Iterator[Chunk]:
    """Yield a string, or that of an object's key. Nulls and empty texts are skipped.

    Args:
        column: a key, or keys of nested objects joined with dots.

    Raises:
        UserError: the row has no such key, or its value is not a string.
    """
    text = row if isinstance(row, str | None) else _value(row, column)
    if not isinstance(text, str | None):
        types = {k: type(v).__name__ for k, v in row.items()} if isinstance(row, dict) else type(row).__name__
        raise UserError(f"{place}: no text {column!r} in {types}; choose the key with --column")
    if text:
        try:
            text.encode()
        except UnicodeEncodeError:  # join surrogate pairs and replace lone surrogates, as tiktoken does
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        yield Chunk(text)


def _value(row: object, column: str) -> object:
    for key in [column] if isinstance(row, dict) and column in row else column.split("."):
        row = row.get(key, MISSING) if isinstance(row, dict) else MISSING
    return row


# ---------------------------------------------------------------------------------------------------------------------
# tables


def table_chunks(path: Path, column: str, encoding: str) -> Iterator[Chunk]:
    """Yield the texts of a column of a table with a header. Quoted fields may have line ends; empty ones are skipped.

    The separator is the tab in a .tsv file, otherwise the comma, semicolon or tab that the header has most of.

    Raises:
        UserError: there is no such column, or a row has another number of fields than the header.
    """
    blocks = (block for _, block in line_chunks(path, encoding))
    lines = (line for block in blocks for line in block.removesuffix("\n").split("\n"))
    if (first := next(lines, None)) is None:
        return
    separator = "\t" if suffixes(path)[0] == ".tsv" else max(",;\t", key=first.count)

    def all_lines() -> Iterator[str]:
        yield first + "\n"
        yield from (line + "\n" for line in lines)

    reader = csv.reader(all_lines(), delimiter=separator, strict=True)
    try:
        header = next(reader)
        if column not in header:
            raise UserError(
                f"{path}: no column {column!r} in the header {first.strip()!r:.300}: choose one with --column"
            )
        index = header.index(column)
        for row in reader:
            if row and len(row) != len(header):
                problem = f"{path} line {reader.line_num:,}: {len(row)} fields, but the header has {len(header)}"
                raise UserError(f"{problem}; fields with a separator or line end have to be in quotes")
            if row and row[index]:
                yield Chunk(row[index])
    except csv.Error as error:
        problem = f"{path} line {reader.line_num:,}: {str(error).partition(' - ')[0]}"
        rules = "a field with quotation marks has to be in quotes, with each mark in it doubled; lines end with \\n"
        raise UserError(f"{problem}; {rules}") from None
