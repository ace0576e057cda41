"""Read text files: formats and compressions by suffix, encodings, and the reason why a file is not text."""

from __future__ import annotations

import codecs
import itertools
import lzma
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath

from config import UserError
from flatgpt.data import chunks
from flatgpt.runtime.files import read_errors

FORMATS = dict.fromkeys((".txt", ".md", ".py", ".rst", ".tex"), "text")
FORMATS |= {".jsonl": "lines", ".ndjson": "lines", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}  # pyarrow's names, except xz
TYPICAL_RATIO = 3  # bytes of text per byte of a compressed file

# Byte order marks and their encodings. The mark of UTF-16 is the beginning of that of UTF-32.
MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF8: "utf-8"}
MARKS |= {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
HEAD_BYTES = 1 << 16  # of a file, from which its kind is recognized
KINDS = {
    b"%PDF-": "a PDF file: extract its text, for example with pdftotext",
    b"PK\3\4": "a ZIP archive (as .docx, .xlsx and .epub are): extract its text",
    b"SQLite format 3\0": "a SQLite database: export its text",
    b"PAR1\x15": "a parquet file: rename it to .parquet",
    b"\x1f\x8b\x08": "compressed with gzip: rename it to .gz",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: rename it to .zst",
    b"BZh91AY&SY": "compressed with bzip2: rename it to .bz2",
    b"\xfd7zXZ\0": "compressed with xz: rename it to .xz",
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself: git lfs pull",
}
CONTROL = re.compile(r"[\x01-\x08\x0e-\x19\x1c-\x1f\ufffe\uffff]")  # in no text; NUL apart
# Text of Western Europe in cp1252: letters, quotation marks and dashes beyond ASCII, without C1 control characters.
WESTERN = re.compile(rb"[\t-\r -~\x80\x85\x91-\x97\xa0-\xff]*")


def suffixes(name: str | Path) -> tuple[str, str]:
    """Return the suffix of the format and that of the compression, in lower case; `""` for none."""
    path = PurePath(str(name).lower())
    return (PurePath(path.stem).suffix, path.suffix) if path.suffix in COMPRESSIONS else (path.suffix, "")


def file_format(name: str | Path) -> str:
    """Return `lines`, `json`, `csv`, `parquet` or, also for an unknown suffix, `text`."""
    return FORMATS.get(suffixes(name)[0], "text")


@contextmanager
def open_decompressed(path: Path):
    """Open a file for reading bytes, decompressed if its suffix says so."""
    compression = COMPRESSIONS.get(suffixes(path)[1])
    with read_errors(path):
        if compression == "xz":
            with lzma.open(path) as file:
                yield file
        elif compression:
            import pyarrow

            with pyarrow.input_stream(str(path), compression=compression) as file:
                yield file
        else:
            with open(path, "rb") as file:
                yield file


def text_chunks(path: Path, encoding: str | None = None) -> Iterator[str]:
    """Yield the text of a file in chunks, as `decode` does."""
    with open_decompressed(path) as file:
        yield from decode(iter(lambda: file.read(chunks.CHUNK_BYTES), b""), str(path), encoding)


def decode(blocks: Iterable[bytes], name: str, encoding: str | None = None) -> Iterator[str]:
    """Decode blocks of bytes. Newlines are unchanged. A byte order mark counts more than `encoding`, and is removed.

    Args:
        name: of the input, for messages.
        encoding: the value of --encoding. None: UTF-8, where there is no such option.

    Raises:
        UserError: the input is not text, or has another encoding.
    """
    blocks, first, head = iter(blocks), [], b""
    for block in blocks:
        first.append(block)
        head += block[:HEAD_BYTES]
        if len(head) >= HEAD_BYTES:
            break
    kind = next((KINDS[start] for start in KINDS if head.startswith(start)), None)
    if kind := "a tar archive: unpack it" if head[257:262] == b"ustar" else kind:
        raise UserError(f"{name} is {kind}")
    codec = codecs.lookup(encoding or "utf-8").name
    if mark := next((mark for mark in MARKS if head.startswith(mark)), None):
        if MARKS[mark] != "utf-8":
            _note_mark(name, MARKS[mark])
        codec = MARKS[mark]
    elif (guess := guess_encoding(head)) and guess != codec and not codec.startswith("iso2022_jp"):
        raise UserError(f"{name} looks like {guess.upper()}: {_remedy(guess, encoding)}")
    line, ascii, start = 1, True, True
    try:
        for text in codecs.iterdecode(itertools.chain(first, blocks), codec):
            text = text.removeprefix("\ufeff") if start else text
            if "\0" in text:
                line += text.count("\n", 0, text.index("\0"))
                raise UserError(_describe_nul(name, line, head.decode(codec, "replace")))
            if text:
                yield text
            line, ascii, start = line + text.count("\n"), ascii and text.isascii(), False
    except UnicodeDecodeError as error:
        if codec == "utf-8":  # the lines before it may be enough for a sample
            yield error.object[: error.start].decode().removeprefix("\ufeff" * start)
        raise UserError(_describe_byte(name, line, ascii, error, codec, encoding)) from None
    except UnicodeError:  # of UTF-16 and UTF-32 without a byte order mark
        raise UserError(f"{name} has no byte order mark: choose --encoding {codec}-le or {codec}-be") from None


def guess_encoding(head: bytes) -> str | None:
    """Return UTF-16 or UTF-32, with its byte order, if a text without a byte order mark is in it; otherwise None.

    Such texts have NUL bytes, because they have spaces and line ends. ISO-2022-JP is recognized too.
    """
    if re.search(rb"\x1b\$[@B]", head):
        return "iso2022_jp"
    if b"\0" not in head or _is_text_with_nuls(head.decode("utf-8", "replace")):
        return None
    best, found = 1 / 200, None
    for codec in ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be"):
        try:
            text = codecs.getincrementaldecoder(codec)().decode(head)  # the last character may be incomplete
        except UnicodeDecodeError:
            continue
        share = len(re.findall(r"[\t-\r -~]", text)) / max(1, len(text))
        if share > best and "\0" not in text and not CONTROL.search(text):
            best, found = share, codec
    return found


def _is_text_with_nuls(head: str) -> bool:
    """Return whether a decoded head is text except for a few NUL characters."""
    return head.count("\0") * 5 < len(head) and not CONTROL.search(head) and "\ufffd" not in head[:-1]


def _describe_nul(name: str, line: int, head: str) -> str:
    if _is_text_with_nuls(head):
        return f"{name} line {line:,}: a NUL character: remove it with tr -d '\\0', or leave out the file"
    return f"{name} is not text, because it has NUL characters: leave it out, or extract its text"


def _describe_byte(
    name: str, line: int, ascii: bool, error: UnicodeDecodeError, codec: str, encoding: str | None
) -> str:
    """Return the message for a byte that is not of the encoding.

    Args:
        ascii: whether the text in front of the block of the error is ASCII.
    """
    before, block = error.object[: error.start], error.object[:HEAD_BYTES]
    line += before.count(b"\n")
    problem = f"{name} line {line:,}: byte 0x{error.object[error.start]:02x} is not {codec.upper()}"
    if CONTROL.search(block.decode("latin-1")):
        return f"{problem}, and the file is not text: leave it out, or extract its text"
    if codec != "utf-8":
        return f"{problem}: choose another --encoding, or leave out the file"
    if not (ascii and before.isascii()):
        return f"{problem}, as the text before it is: repair or leave out the file"
    if WESTERN.fullmatch(block) and sum(value > 127 for value in block) * 4 < len(block):
        return f"{problem}: if the text is Western European, {_remedy('cp1252', encoding)}"
    return f"{problem}: {_remedy('NAME', encoding)}, where NAME is its encoding, or leave it out"


def _remedy(codec: str, encoding: str | None) -> str:
    """Return how to read a text in another encoding: by the option, or converted."""
    if encoding is not None:
        return f"read it with --encoding {codec}"
    return f"convert it with iconv -f {re.sub('-(?=[lb]e$)', '', codec).upper()} -t UTF-8"


_noted: set[str] = set()


def _note_mark(name: str, codec: str) -> None:
    """Print a note, once per encoding."""
    if codec not in _noted:
        _noted.add(codec)
        text = f"{name} is read as {codec.upper()}, as its byte order mark says; others with such a mark too"
        print(f"note: {text}", file=sys.stderr)
