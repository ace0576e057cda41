"""Files to documents: the same text for any chunk size; damage is reported with file and place."""

import gzip
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from config import UserError
from flatgpt.data import readers, tokenizer

quick = settings(max_examples=60)
SIZES = [3, 64, 4 << 20]  # of chunks, in bytes
BYTE = tokenizer.load("byte")


def texts(path: Path, column: str = "text") -> list[str]:
    """Return the documents of a file, their chunks joined."""
    found = [""]
    for chunk in readers.documents(path, column):
        found[-1] += chunk.text
        found += [""] * chunk.documents
    return found[:-1]


def refused(parts, call, *args) -> None:
    """Check that the call, or its iterator, raises a UserError of one line with all these parts, the first in front."""
    with pytest.raises(UserError) as caught:
        for _ in call(*args):
            pass
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(parts[0]))
    for part in parts:
        assert str(part) in str(caught.value)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("a.txt", "a.md", "a.py", "parquet"), "text"),
        (("a.jsonl", "b.a.jsonl.gz", "a.jsonl.zst"), "jsonl"),
        (("train-00000-of-00001.parquet",), "parquet"),
    ],
)
def test_file_format(names, expected):
    for name in names:
        assert readers.file_format(name) == readers.file_format(Path("folder.parquet", name)) == expected


@pytest.mark.parametrize("suffix", readers.SUFFIXES)
def test_folders_and_missing_files(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    refused([f"{path}: cannot be read: ", "No such file"], readers.documents, path, "text")
    path.mkdir()
    refused([f"{path}: cannot be read: ", "directory"], readers.documents, path, "text")


# ---------------------------------------------------------------------------------------------------------------------
# plain text

PLAIN = {
    "ascii": "one line\nand another\n",
    "many bytes": "naïve 東京 🎈👩‍👩‍👧 e\u0301" * 5,
    "line ends": "one\r\ntwo\rthree\n\r\n\n\u2028\x85end",
    "mark within": "a\ufeffb\n\ufeff",
    "NUL": "\0a\0",
    "empty": "",
}


@pytest.mark.parametrize("block", [1, *SIZES])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["no mark", "mark"])
@pytest.mark.parametrize("what", PLAIN)
def test_text_files(tmp_path, monkeypatch, what, mark, block):
    """Newlines are unchanged; only a byte order mark at the beginning is left out."""
    monkeypatch.setattr(readers, "CHUNK_BYTES", block)
    path = tmp_path / "a.txt"
    path.write_bytes((mark + PLAIN[what]).encode())
    found = list(readers.text_chunks(path))
    assert "".join(found) == PLAIN[what]
    assert max(map(len, found), default=0) <= block
    assert texts(path) == ([PLAIN[what]] if PLAIN[what] else [])
    assert readers.text_bytes(path, "text") == len((mark + PLAIN[what]).encode())


BROKEN = [b"\xff", b"\x80", b"\xc3", b"\xc3(", b"\xe2\x82", b"\xe2\x82(", b"\xf0\x9f\x8e", b"\xed\xa0\xbd", b"\xc0\xaf"]


@settings(quick, max_examples=150)
@given(
    st.sampled_from(["", "\ufeff"]),
    st.text("aé東🎈\n", max_size=20),
    st.sampled_from(BROKEN),
    st.text("aé東🎈\n", max_size=9),
    st.sampled_from([*range(3, 12), 4 << 20]),
)
@example("", "aaaa\ufeff", b"\xff", "", 4)
def test_text_that_is_not_utf8(tmp_path_factory, mark, before, broken, after, block):
    """The place is that of Python's decoder, also across chunks and at the end of the file."""
    raw = (mark + before).encode() + broken + after.encode()
    with pytest.raises(UnicodeDecodeError) as plain:
        raw.decode()
    path = tmp_path_factory.getbasetemp() / "broken.txt"
    path.write_bytes(raw)
    start = plain.value.start
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "CHUNK_BYTES", block)
        where = f"{path}: not UTF-8: byte 0x{raw[start]:02x} at offset {start:,};"
        refused([where, "iconv"], readers.text_chunks, path)


@quick
@given(st.lists(st.text("ab  \n\té🎈", max_size=40), max_size=6), st.integers(1, 30))
def test_chunks_of_a_document(blocks, length):
    found = list(readers.split_document(blocks, length))
    pieces = list(tokenizer.split_text(["".join(blocks)], length))
    last = len(pieces) - 1
    facts = [(chunk.text, chunk.documents, chunk.forced_split) for chunk in found]
    assert facts == [(piece, n == last, cut) for n, (piece, cut) in enumerate(pieces)]
    assert not any(part.forced_split for part in found if part.documents)


def test_chunks_of_a_long_file(tmp_path):
    """Each can be encoded on its own, and has at most 4 * MAX_ENCODE_CHARS characters."""
    text = "a long line of words, and so on;\n" * 300_000
    (tmp_path / "a.txt").write_text(text)
    found = list(readers.documents(tmp_path / "a.txt", "text"))
    assert "".join(part.text for part in found) == text
    assert len(found) == 3
    assert max(len(part.text) for part in found) <= 4 * tokenizer.MAX_ENCODE_CHARS
    assert [part.documents for part in found] == [0, 0, 1]
    assert all(part.text[0] in " \n" and not part.forced_split for part in found[1:])


# ---------------------------------------------------------------------------------------------------------------------
# JSON lines: blocks of whole lines

PACK = {
    ".jsonl": lambda raw: raw,
    ".jsonl.gz": gzip.compress,
    ".jsonl.zst": lambda raw: pa.Codec("zstd").compress(raw, asbytes=True),
}
ROWS = [f"{n} naïve café 東京 🎈\r\n\t" * (1 + n % 4) for n in range(40)]
LINES = [json.dumps({"id": n, "text": text}, ensure_ascii=n % 2 == 0).encode() for n, text in enumerate(ROWS)]
RAW = {
    "newline last": (b"\n".join(LINES) + b"\n", ROWS),
    "no newline last": (b"\n".join(LINES), ROWS),
    "CRLF": (b"\r\n".join(LINES) + b"\r\n", ROWS),
    "empty lines": (b"\n\n" + b"\n \r\n\n".join(LINES) + b"\n\t\n\n", ROWS),
    "nulls and empty texts": (b'{"text": null}\n{"text": ""}\n' + LINES[0] + b'\n{"text":""}\n{"text":null}', ROWS[:1]),
    "mark": (b"\xef\xbb\xbf" + b"\n".join(LINES), ROWS),
    "long line": (LINES[1] + b'\n{"text": "' + b"x" * 9000 + b'"}\n' + LINES[2], [ROWS[1], "x" * 9000, ROWS[2]]),
    "one line": (LINES[3], ROWS[3:4]),
    "lone CR": (b'{"text":\r"a"\r}\n{"text": "b"}\r\r\n', ["a", "b"]),
    "newlines only": (b"\n\n\n", []),
    "empty": (b"", []),
}


@pytest.mark.parametrize("block", [1, *SIZES])
@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("what", RAW)
def test_json_lines(tmp_path, monkeypatch, what, suffix, block):
    """Blocks have complete lines and the number of their first line, and are not longer than needed."""
    monkeypatch.setattr(readers, "CHUNK_BYTES", block)
    raw, rows = RAW[what]
    path = tmp_path / f"a{suffix}"
    path.write_bytes(PACK[suffix](raw))
    found = list(readers.line_chunks(path))
    assert b"".join(lines for _, lines in found) == raw
    longest = max(map(len, raw.split(b"\n"))) + 1
    line = 1
    for number, lines in found:
        assert number == line
        assert 0 < len(lines) <= block + longest
        line += lines.count(b"\n")
    assert all(lines.endswith(b"\n") for _, lines in found[:-1])
    assert texts(path) == rows
    assert readers.text_bytes(path, "text") == path.stat().st_size


@pytest.mark.parametrize("block", [7, 4 << 20])
@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_concatenated_compressed_files(tmp_path, monkeypatch, suffix, block):
    """As `cat a.gz b.gz`, pigz and zstd with threads make them; a line may continue in the next."""
    monkeypatch.setattr(readers, "CHUNK_BYTES", block)
    raw = b"\n".join(LINES)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"".join(PACK[suffix](raw[n : n + 100]) for n in range(0, len(raw), 100)) + PACK[suffix](b""))
    assert texts(path) == ROWS


@pytest.mark.parametrize("block", [64, 4 << 20])
@pytest.mark.parametrize("left", [5, 12, 0.5, -9, -1])
@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_truncated_file(tmp_path, monkeypatch, suffix, left, block):
    monkeypatch.setattr(readers, "CHUNK_BYTES", block)
    content = PACK[suffix](b"\n".join(LINES))
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content[: len(content) // 2 if left == 0.5 else left])
    refused([f"{path}: ", "truncated"], texts, path)


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("at", [None, 30, 2030, 6030])
def test_damaged_compressed_file(tmp_path, suffix, at):
    """Not compressed at all, or partly overwritten."""
    rows = [{"text": random.Random(n).randbytes(40).hex()} for n in range(500)]
    raw = bytearray("\n".join(map(json.dumps, rows)).encode())
    if at is not None:
        raw = bytearray(PACK[suffix](bytes(raw)))
        raw[at : at + 400] = random.Random(at).randbytes(400)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(raw)
    refused([path], texts, path)


# ---------------------------------------------------------------------------------------------------------------------
# JSON lines: one line

WRONG = [
    *((raw, ["not JSON"]) for raw in (b"no JSON", b'{"text": "a"', b'{"text": "a"} {"text": "b"}')),
    (b'{"text": "\xff"}', ["not JSON", "utf-8"]),
    (b'["a"]', ["no key 'text'", "a list", "--column"]),
    (b'"text"', ["no key 'text'", "a str"]),
    (b"null", ["no key 'text'", "a NoneType"]),
    (b'{"body": "a", "id": 1}', ["no key 'text'", "body, id", "--column"]),
    (b"{}", ["no key 'text'", "--column"]),
    (b'{"text": 7}', ["'text' is a int, not a text"]),
    (b'{"text": 0}', ["'text' is a int"]),
    (b'{"text": false}', ["'text' is a bool"]),
    (b'{"text": ["a"]}', ["'text' is a list"]),
    (b'{"text": {}}', ["'text' is a dict"]),
]


@pytest.mark.parametrize("block", [7, 4 << 20])
@pytest.mark.parametrize("before", [0, 3, 1200])
@pytest.mark.parametrize(("raw", "parts"), WRONG, ids=[raw.decode("latin1") for raw, _ in WRONG])
def test_wrong_line(tmp_path, monkeypatch, raw, parts, before, block):
    """The error has the file and the number of the line; the documents before it are read."""
    monkeypatch.setattr(readers, "CHUNK_BYTES", block)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join([b'{"text": "a"}\n', b"\n", b'{"text": null}\r\n'][n % 3] for n in range(before)) + raw)
    found = []
    refused([f"{path} line {before + 1:,}: ", *parts], lambda: map(found.append, readers.documents(path, "text")))
    assert len(found) == (before + 2) // 3


def test_column(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": 7, "body": "the body"}\n')
    assert texts(path, "body") == ["the body"]
    refused([path, "no key 'other', its keys are text, body"], texts, path, "other")


@pytest.mark.parametrize(
    ("spelled", "text"),
    [
        (r"\ud83d\ude00", "😀"),
        (r"a\ud83d", "a\ufffd"),
        (r"\ude00 b", "\ufffd b"),
        (r"\ude00\ud83d", "\ufffd\ufffd"),
        (r"\ud83d\ud83d\ude00\u0000", "\ufffd😀\0"),
        (r"\ufeff東\udfff🎈", "\ufeff東\ufffd🎈"),
    ],
)
def test_surrogates_are_decoded_like_in_tiktoken(spelled, text):
    raw = f'{{"text": "{spelled}"}}'
    assert list(readers.parse_lines(raw.encode(), "text", Path("a"), 1)) == [text]
    assert BYTE.encode_ordinary(json.loads(raw)["text"]) == list(text.encode())


# ---------------------------------------------------------------------------------------------------------------------
# parquet

SOME = ["one", None, "naïve 東京 🎈\r\n", "", "\0", " "]
GIVEN = ["one", "naïve 東京 🎈\r\n", "\0", " "]
TYPES = {
    "string": pa.string(),
    "large_string": pa.large_string(),
    "dictionary": pa.dictionary(pa.int32(), pa.string()),
    "dictionary of large ones": pa.dictionary(pa.int64(), pa.large_string()),
}


def parquet(path: Path, columns, **settings) -> Path:
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    pq.write_table(table, path, **settings)
    return path


@pytest.mark.parametrize("block", [1, 4 << 20])
@pytest.mark.parametrize("rows_a_group", [1, 2, 100])
@pytest.mark.parametrize("kind", TYPES)
def test_parquet_rows(tmp_path, monkeypatch, kind, rows_a_group, block):
    """Nulls and empty rows are left out, or yielded as empty texts for joining."""
    monkeypatch.setattr(readers, "CHUNK_BYTES", block)
    columns = {"id": range(len(SOME)), "text": pa.array(SOME).cast(TYPES[kind]), "title": ["t"] * len(SOME)}
    path = parquet(tmp_path / "a.parquet", columns, row_group_size=rows_a_group)
    assert list(readers.rows(path, "text")) == texts(path) == GIVEN
    assert list(readers.rows(path, "text", empty=True)) == [text or "" for text in SOME]
    assert texts(path, "title") == ["t"] * len(SOME)


def test_parquet_of_many_row_groups(tmp_path):
    """Any of them can be read alone; their sizes are those of the text column."""
    rows = [f"{n} " + "x" * (n % 50) for n in range(1000)]
    extra = [random.Random(n).randbytes(99) for n in range(1000)]
    path = parquet(tmp_path / "a.parquet", {"raw": extra, "text": rows}, row_group_size=7, use_dictionary=False)
    groups = readers.row_groups(path, "text")
    assert [n for n, _ in groups] == [7] * 142 + [6]
    for first, stop in ((0, 1), (0, None), (5, 9), (142, 143), (142, None), (3, 3), (0, 0)):
        end = 1000 if stop is None else 7 * stop
        assert list(readers.rows(path, "text", first, stop)) == rows[7 * first : end]
    for n, (_, size) in enumerate(groups):
        plain = sum(len(text) for text in rows[7 * n : 7 * n + 7])
        assert plain < size < plain + 200
    assert readers.text_bytes(path, "text") == sum(size for _, size in groups)


@pytest.mark.parametrize(
    "values",
    [
        [{"a": 1, "b": {"c": "x" * 500}}] * 20,
        [["x" * 500, "y"]] * 20,
        pa.array([[("k", "v" * 500)]] * 20, pa.map_(pa.string(), pa.string())),
        [{"text": "x" * 500, "id": n} for n in range(20)],
    ],
    ids=["struct", "list", "map", "struct with a column of the same name"],
)
def test_parquet_size_next_to_nested_columns(tmp_path, values):
    """Each of them is several columns of the file."""
    columns = {"before": values, "text": ["a", "b"] * 10, "after": values}
    path = parquet(tmp_path / "a.parquet", columns, row_group_size=10, use_dictionary=False)
    alone = parquet(tmp_path / "b.parquet", {"text": columns["text"]}, row_group_size=10, use_dictionary=False)
    assert readers.row_groups(path, "text") == readers.row_groups(alone, "text")
    assert texts(path) == ["a", "b"] * 10


@pytest.mark.parametrize("groups", [0, 1, 3])
def test_parquet_without_rows(tmp_path, groups):
    path, schema = tmp_path / "a.parquet", pa.schema([("text", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for _ in range(groups):
            writer.write_table(schema.empty_table())
    assert [rows for rows, _ in readers.row_groups(path, "text")] == [0] * groups
    assert texts(path) == list(readers.rows(path, "text", empty=True)) == []


@pytest.mark.parametrize("call", [readers.rows, readers.row_groups, readers.documents])
@pytest.mark.parametrize(
    ("column", "parts"),
    [
        *((name, [f"no column {name!r}", "id, list, both, raw", "--column"]) for name in ("body", "", "a", "both.a")),
        ("id", ["'id' holds int64, not text", "id, list, both, raw"]),
        ("list", ["'list' holds list", "not text"]),
        ("both", ["'both' holds struct", "not text"]),
        ("raw", ["'raw' holds binary, not text"]),
    ],
)
def test_parquet_without_that_text(tmp_path, call, column, parts):
    columns = {"id": [1], "list": [["a"]], "both": [{"a": "b"}], "raw": [b"a"]}
    path = parquet(tmp_path / "a.parquet", columns)
    refused([f"{path}: ", *parts], call, path, column)


@pytest.mark.parametrize("call", [readers.rows, readers.row_groups])
@pytest.mark.parametrize("left", [0, 3, 100, 0.5, -1, "text"])
def test_not_a_complete_parquet_file(tmp_path, call, left):
    path = parquet(tmp_path / "a.parquet", {"text": ["one", "two"] * 1000})
    content = b"this is text\n" * 100 if left == "text" else path.read_bytes()
    path.write_bytes(content if left == "text" else content[: len(content) // 2 if left == 0.5 else left])
    refused([f"{path}: not a parquet file, or a truncated one (", "get it again"], call, path, "text")


@pytest.mark.parametrize("codec", ["snappy", "zstd", "gzip"])
@pytest.mark.parametrize("at", [0, 0.5])
def test_parquet_with_a_damaged_page(tmp_path, codec, at):
    """The rows before it may have been read."""
    rows = [random.Random(n).randbytes(20).hex() for n in range(3000)]
    path = parquet(tmp_path / "a.parquet", {"text": rows}, row_group_size=1000, compression=codec, use_dictionary=False)
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    start = column.data_page_offset + int(at * column.total_compressed_size)
    raw = bytearray(path.read_bytes())
    raw[start : start + 300] = b"\xff" * 300
    path.write_bytes(raw)
    found = []
    refused([f"{path}: damaged ("], lambda: map(found.append, readers.rows(path, "text")))
    assert found == rows[: len(found)]


def test_parquet_with_text_that_is_not_utf8(tmp_path):
    """pyarrow checks it neither when it writes nor when it reads."""
    raw = pa.array([b"one", b"caf\xe9"], pa.binary())
    path = parquet(tmp_path / "a.parquet", {"text": pa.Array.from_buffers(pa.string(), 2, raw.buffers())})
    refused([path], readers.rows, path, "text")


def test_large_row_group_is_read_a_little_at_a_time(tmp_path, monkeypatch):
    """Some files have one of gigabytes: a few chunks are in memory, whatever its size."""
    rows = [chr(97 + n % 26) * 20_000 for n in range(2400)]
    path = parquet(
        tmp_path / "a.parquet", {"text": rows}, use_dictionary=False, compression="none", write_batch_size=16
    )
    assert [rows for rows, _ in readers.row_groups(path, "text")] == [2400]
    assert readers.text_bytes(path, "text") > 48_000_000
    monkeypatch.setattr(readers, "CHUNK_BYTES", 1 << 20)
    before, most = pa.total_allocated_bytes(), 0
    for n, text in enumerate(readers.rows(path, "text")):
        assert text == rows[n]
        most = max(most, pa.total_allocated_bytes() - before)
    assert n == 2399
    assert most < 12 << 20
