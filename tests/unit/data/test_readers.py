"""Files to documents and tasks: the same text for any chunk size; an error names file and place."""

import bz2
import csv
import gzip
import io
import json
import lzma
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dataset_files import write
from hypothesis import example, given, settings
from hypothesis import strategies as st

from config import UserError
from flatgpt.data import chunks, parquet, readers, text_files


def tasks_of(*paths: Path, column: str = "text") -> list[chunks.Task]:
    return list(readers.file_tasks([readers.RawFile(str(path), 0, path) for path in paths], column))


def documents(*paths: Path, column: str = "text") -> list[str]:
    """Return the documents of files, their chunks joined."""
    found = [""]
    for task in tasks_of(*paths, column=column):
        for chunk in task.read():
            found[-1] += chunk.text
            found += [""] * chunk.documents
    return found[:-1]


# ---------------------------------------------------------------------------------------------------------------------
# documents

PACK = {
    "": lambda raw: raw,
    ".gz": lambda raw: gzip.compress(raw, mtime=0),
    ".zst": lambda raw: pa.Codec("zstd").compress(raw, asbytes=True),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
ENGLISH = "The river was wide.\nIt was slow.\n" * 9
ROWS = [f"{n} naïve café 東京 🎈\r\n\t" * (1 + n % 4) for n in range(40)]
LINES = [json.dumps({"id": n, "text": text}, ensure_ascii=n % 2 == 0).encode() for n, text in enumerate(ROWS)]
RAW = b"\n".join(LINES)
TEXTS = {
    "many bytes": "naïve 東京 🎈👩‍👩‍👧 e\u0301" * 5,
    "line ends": "one\r\ntwo\rthree\n\r\n\n\u2028\x85end",
    "mark within": "a\ufeffb\n\ufeff",
    "empty": "",
}
JSON_LINES = {
    "no newline last": (RAW, ROWS),
    "CRLF, empty lines": (b"\n\n" + b"\r\n \r\n\n".join(LINES) + b"\n\t\n\n", ROWS),
    "nulls, empty texts": (b'{"text": null}\n{"text": ""}\n' + LINES[0] + b'\n{"text":""}\n{"text":null}', ROWS[:1]),
    "mark": (b"\xef\xbb\xbf" + RAW, ROWS),
    "long line": (LINES[1] + b'\n{"text": "' + b"x" * 9000 + b'"}\n' + LINES[2], [ROWS[1], "x" * 9000, ROWS[2]]),
    "lone CR": (b'{"text":\r"a"\r}\n{"text": "b"}\r\r\n', ["a", "b"]),
    "surrogates": (rb'{"text": "a\ud83d\ude00\ud83d\ude00\ud83d \udfff\u0000"}', ["a😀😀\ufffd \ufffd\0"]),
    "empty": (b"", []),
    "strings": (b'"a"\nnull\n"b\\n"', ["a", "b\n"]),
    "nested": (b'{"text": "a", "n": {"text": "b"}}', ["a"]),
}
TABLE = [["1", "a"], ["2", 'say "b", c;\td\r\ne'], ["3", ""], ["4", "東京" * 2000], ["5", " "]]
COLUMN = [text for _, text in TABLE if text]
ARRAY = json.dumps([{"text": text} for text in ROWS], indent=1).encode()


def table(separator: str) -> bytes:
    """Return TABLE as csv.writer has it."""
    file = io.StringIO()
    csv.writer(file, delimiter=separator).writerows([["id", "text"], *TABLE])
    return file.getvalue().encode()


FILES = {
    **{
        f"{what}{mark!r}.txt": ((mark + t).encode(), [t] * (t != ""))
        for what, t in TEXTS.items()
        for mark in ("", "\ufeff")
    },
    **{f"{what}.jsonl{s}": (PACK[s](raw), found) for what, (raw, found) in JSON_LINES.items() for s in PACK},
    **{f"array{mark!r}.json": ((mark + ARRAY.decode()).encode(), ROWS) for mark in ("", " \n", "\ufeff")},
    "strings.json": (b'["a", "", null, "b"]', ["a", "b"]),
    "lines.json": (RAW, ROWS),
    "empty.json": (b"", []),
    "comma.csv": (table(","), COLUMN),
    "semicolon.CSV": (table(";"), COLUMN),
    "tab.tsv": (table("\t"), COLUMN),
    "one column.csv": (b'\xef\xbb\xbftext\n\na\n"b\nc"\n', ["a", "b\nc"]),
    "one column.tsv": (b"text\na, b\nc; d\n", ["a, b", "c; d"]),
    "header only.csv": (b"id,text\n", []),
    "empty.csv": (b"", []),
    **{
        f"{name}{s}": (PACK[s](raw), found)
        for s in PACK
        for name, raw, found in (
            ("a.txt", ENGLISH.encode(), [ENGLISH]),
            ("a.json", ARRAY, ROWS),
            ("a.JSON", RAW, ROWS),
            ("a.csv", table(","), COLUMN),
        )
    },
    # as `cat a.gz b.gz`, pigz and zstd with threads make them
    **{
        f"concatenated.ndjson{s}": (b"".join(PACK[s](RAW[n : n + 100]) for n in range(0, len(RAW), 100)), ROWS)
        for s in PACK
    },
}


@pytest.mark.parametrize("block", [1, 3, 64, 4 << 20])
@pytest.mark.parametrize("name", FILES)
def test_documents_of_text_and_lines(tmp_path, monkeypatch, name, block):
    """Newlines are unchanged; a byte order mark at the beginning, nulls and empty documents are left out."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", block)
    raw, expected = FILES[name]
    (tmp_path / name).write_bytes(raw)
    assert documents(tmp_path / name) == expected


def test_long_field_of_a_table(tmp_path):
    """Python's csv module has a limit of 131,072 characters by default."""
    (tmp_path / "a.csv").write_text(f"text\n{'東京' * 200_000}\n", encoding="utf-8")
    assert documents(tmp_path / "a.csv") == ["東京" * 200_000]


@pytest.mark.parametrize("rows_a_group", [1, 2, 100])
@pytest.mark.parametrize(
    "kind",
    [
        *(pa.string(), pa.string_view(), pa.binary(), pa.binary_view()),
        *(pa.dictionary(pa.int64(), kind) for kind in (pa.large_string(), pa.binary())),
    ],
)
def test_documents_of_parquet(tmp_path, monkeypatch, kind, rows_a_group):
    """Nulls and empty rows are left out, or yielded as empty texts for joining. Nested columns are several."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1)
    texts = ["one", None, "naïve 東京 🎈\r\n", "", "\0", " "]
    nested = [{"text": "x", "b": ["y"]}] * 6
    table = pa.table({"before": nested, "text": pa.array(texts).cast(kind), "title": ["t"] * 6, "after": nested})
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, row_group_size=rows_a_group)
    assert documents(path) == [text for text in texts if text]
    assert [chunk.text for chunk in parquet.rows(path, "text", empty=True)] == [text or "" for text in texts]
    assert documents(path, column="title") == ["t"] * 6
    pq.write_table(table[:0], path)
    assert tasks_of(path) == []


def test_nested_and_dotted_columns(tmp_path):
    """A name with a dot is a column's, or else a field's of structs; also of JSON's objects."""
    inner = pa.StructArray.from_arrays([pa.array(["a", "b", None])], ["text"], mask=pa.array([False, True, False]))
    outer = pa.StructArray.from_arrays([inner], ["in"])
    path, objects = tmp_path / "a.parquet", tmp_path / "a.jsonl"
    pq.write_table(pa.table({"out": outer, "extension": pa.array(['"x"'] * 3, pa.json_())}), path)
    assert documents(path, column="out.in.text") == ["a"]
    assert documents(path, column="extension") == ['"x"'] * 3
    pq.write_table(pa.table({"out": outer, "out.in.text": ["c", "d", None]}), path)
    assert documents(path, column="out.in.text") == ["c", "d"]
    objects.write_text(
        '{"out": {"in": {"text": "a"}}}\n{"out.in.text": "b", "out": 1}\n{"out": {"in": {"text": null}}}'
    )
    assert documents(objects, column="out.in.text") == ["a", "b"]


ENCODINGS = ["utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be", "gb18030", "shift_jis", "cp1252", "koi8-r"]


@settings(max_examples=150)
@given(st.data(), st.sampled_from(ENCODINGS), st.booleans(), st.sampled_from([1, 2, 3, 5, 4 << 20]))
def test_encodings(tmp_path_factory, data, codec, marked, block):
    """A byte order mark counts more than --encoding; characters across chunks are whole."""
    alphabet = {"cp1252": "aé€“\n", "koi8-r": "aЖ\n", "shift_jis": "a東ア\n"}.get(codec, "aé東🎈\n")
    text = data.draw(st.text(alphabet, max_size=30))
    marked = marked and codec.startswith("utf")
    path = tmp_path_factory.getbasetemp() / "encoded.txt"
    path.write_bytes(("\ufeff" * marked + text).encode(codec))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK_BYTES", block)
        assert "".join(text_files.text_chunks(path, "latin-1" if marked else codec)) == text


@pytest.mark.parametrize("codec", ["utf-16", "utf-32-be", "cp1252"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.csv.gz"])
def test_encoded_records(tmp_path, name, codec):
    rows = ["café", "a\nb"]
    text = {
        ".jsonl": "".join(json.dumps({"text": row}, ensure_ascii=False) + "\n" for row in rows),
        ".json": json.dumps(rows, ensure_ascii=False),
        ".csv": 'text\ncafé\n"a\nb"\n',
    }[f".{name.split('.')[1]}"].encode(codec)
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    files = [readers.RawFile(name, 0, tmp_path / name)]
    assert [chunk.text for chunk in readers.documents(files, "text", None, encoding=codec)] == rows


BEYOND = (
    {"a.txt": b"x", "b.txt": b"\xff"},
    {"a.csv": b"text\nx\n1,2\n"},
    {"a.json": b'["x", 1]'},
    {"a.jsonl": b'"x"\n1'},
)


@pytest.mark.parametrize("named", BEYOND, ids=lambda named: min(named))
def test_sample_does_not_read_what_is_beyond_it(tmp_path, named):
    """Otherwise one bad record of a large input would stop each experiment with a part of it."""
    for name, raw in named.items():
        (tmp_path / name).write_bytes(raw)
    files = [readers.RawFile(name, 0, tmp_path / name) for name in named]
    assert [chunk.text for chunk in readers.documents(files, "text", 1)] == ["x"]
    with pytest.raises(UserError):
        list(readers.documents(files, "text", 2))


@pytest.mark.parametrize("given", ["utf-16", "utf-16-be", "utf-8", "latin-1"])
def test_wrong_encoding_that_would_succeed_is_refused(tmp_path, given):
    (tmp_path / "a.txt").write_bytes(ENGLISH.encode("utf-16-le"))
    with pytest.raises(UserError, match=r"read it with --encoding utf-16-le$"):
        list(text_files.text_chunks(tmp_path / "a.txt", given))


@settings(max_examples=60)
@given(st.lists(st.text("ab  \n\té🎈", max_size=40), max_size=6), st.integers(1, 30))
def test_chunks_of_a_document_are_those_of_split_text(blocks, length):
    found = list(chunks.split_document(blocks, length))
    assert [chunk.text for chunk in found] == list(chunks.split_text(["".join(blocks)], length))
    assert [chunk.documents for chunk in found] == [0] * (len(found) - 1) + [1] * (len(found) > 0)


# ---------------------------------------------------------------------------------------------------------------------
# tasks


@pytest.mark.parametrize("kind", ["txt", "parquet"])
def test_small_files_and_row_groups_share_tasks(tmp_path, monkeypatch, kind):
    """A folder of a million files is not a million tasks."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1000)
    write(tmp_path / f"in.{kind}", ["x" * 30] * 100)
    paths = sorted((tmp_path / "in").iterdir()) if kind == "txt" else [tmp_path / "in.parquet"]
    assert len(tasks_of(*paths)) in (3, 4)
    assert documents(*paths) == ["x" * 30] * 100


def test_row_group_larger_than_a_workers_memory_is_read_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 300)
    rows = [f"{n} " + "word " * (400 if n in (4, 7, 10) else 3) for n in range(11)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": rows}), path, row_group_size=1, use_dictionary=False)
    found = tasks_of(path)
    assert [task.read.func is iter for task in found] == [False, True] * 3  # the worker reads the others
    assert documents(path) == rows


# ---------------------------------------------------------------------------------------------------------------------
# errors

COMPRESSED = {f".jsonl{s}": PACK[s](RAW) for s in PACK if s}
GOOD = b'{"text": "a"}\n\n{"text": null}\r\n'
WRONG_LINES = [
    *((raw, ["not JSON"]) for raw in (b"no JSON", b'{"text": "a"', b'{"text": "a"} {"text": "b"}')),
    (b'{"text": "\xff"}', ["byte 0xff is not UTF-8"]),
    (b'["a"]', ["list", "--column"]),
    (b'{"body": "a", "id": 1}', ["'text'", "body", "id", "--column"]),
    (b"{}", ["'text'", "--column"]),
    *(
        (b'{"text": %s}' % raw, ["'text'", kind])
        for raw, kind in ((b"0", "int"), (b"false", "bool"), (b'["a"]', "list"))
    ),
]
WRONG_RECORDS = [
    ("json", b'[{"text": "a"},\n\n {"text": 5}]', ["item 2", "'text'", "int", "--column"]),
    ("json", b'[{"text": "a"},\n\n', ["line 3", "not JSON"]),
    ("json", b'{\n"text": "a"\n}', ["line 1", "not JSON", "an array in a .json file"]),
    ("json", b'{"data": [{"text": "a"}]}', ["line 1", "no text 'text'", "data"]),
    ("csv", b"id,body\n1,a\n", ["no column 'text'", "'id,body'", "--column"]),
    ("csv", b'id,text\n1,"a\nb"\n2,c,d\n', ["line 4", "3 fields, but the header has 2"]),
    ("csv", b'id,text\n1,"a\nb', ["line 3", "unexpected end of data"]),
    ("tsv", b"text\tid\nonly\n", ["line 2", "1 fields, but the header has 2"]),
    ("tsv", b'text\tid\n"a" b\t1\n', ["line 2", "quotation marks has to be in quotes", "doubled"]),
    ("csv", b"id,text\r1,a\r", ["line 1", "new-line character seen in unquoted field; ", "lines end with \\n"]),
    ("csv", b"\n\nid,text\n1,a\n", ["no column 'text' in the header ''"]),
]
NO_TEXT = [
    *(
        (ENGLISH.encode(e), [f"looks like {e.upper()}", f"read it with --encoding {e}"])
        for e in ("utf-16-le", "utf-32-be")
    ),
    ("Широкая река.\n".encode("utf-16-be"), ["read it with --encoding utf-16-be"]),  # its bytes are ASCII
    ("नदी चौड़ी और धीमी थी।\n".encode("utf-16-le"), ["read it with --encoding utf-16-le"]),
    ("川は広くて遅かった。\n".encode("iso2022_jp"), ["read it with --encoding iso2022_jp"]),
    (f"{ENGLISH}caf\xe9\n".encode("latin-1"), ["line 19: byte 0xe9 is not UTF-8", "Western European", "cp1252"]),
    ("Широкая река.\n".encode("koi8-r"), ["line 1: byte 0xfb is not UTF-8", "read it with --encoding NAME"]),
    (f"{ENGLISH}naïve\n".encode() + b"caf\xe9\n", ["line 20: byte 0xe9 is not UTF-8, as the text before it is"]),
    (f"{ENGLISH}a\0b\n".encode(), ["line 19: a NUL character", "tr -d"]),
    (b"%PDF-1.7\n1 0 obj", ["is a PDF file"]),
    (b"PK\3\4\x14\0\6\0\10\0", ["is a ZIP archive", ".docx"]),
    (b"SQLite format 3\0\x10\0", ["is a SQLite database"]),
    (b"\x1f\x8b\x08\0\0", ["compressed with gzip"]),
    (b"version https://git-lfs.github.com/spec/v1\n", ["git lfs pull"]),
    (b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR\0\0\0\1", ["the file is not text"]),
    (b"name" + bytes(253) + b"ustar" + bytes(250), ["is a tar archive: unpack it"]),
    (b"name" + bytes(96) + b"0000644" + bytes(200), ["is not text, because it has NUL characters"]),
]
COLUMNS = pa.table({"id": [1], "list": [["a"]], "both": [{"a": "b"}], "raw": [b"a"], "text": ["a"]})
NOT_UTF8 = pa.Array.from_buffers(pa.string(), 2, pa.array([b"one", b"caf\xe9"], pa.binary()).buffers())


def parquet_bytes(table: pa.Table, **settings) -> bytes:
    file = pa.BufferOutputStream()
    pq.write_table(table, file, **settings)
    return file.getvalue().to_pybytes()


def damaged_page(codec: str) -> bytes:
    table = pa.table({"text": [random.Random(n).randbytes(20).hex() for n in range(3000)]})
    raw = bytearray(parquet_bytes(table, row_group_size=1000, compression=codec, use_dictionary=False))
    page = pq.ParquetFile(pa.BufferReader(bytes(raw))).metadata.row_group(1).column(0).data_page_offset
    raw[page : page + 300] = b"\xff" * 300
    return bytes(raw)


REMEDY = "if it is damaged or incomplete, move it away and download or copy it again"
WHOLE = parquet_bytes(pa.table({"text": ["one", "two"] * 1000}))


@pytest.mark.parametrize(
    ("name", "raw", "column", "parts"),
    [
        *((f"a{suffix}", None, "text", ["cannot be read", "No such file"]) for suffix in text_files.FORMATS),
        *(("a.jsonl", n * GOOD + raw, "text", [f"line {3 * n + 1:,}", *p]) for n in (0, 400) for raw, p in WRONG_LINES),
        ("a.jsonl", b'{"text": "a"}', "other", ["line 1", "'other'", "text"]),
        *((f"a{suffix}", b"no gzip, no zstd" * 9, "text", [REMEDY]) for suffix in COMPRESSED),
        *(
            (f"a{s}", raw[:n], "text", ["ended before" if s == ".jsonl.xz" else "runcated", REMEDY])
            for s, raw in COMPRESSED.items()
            for n in (12, -9, len(raw) // 2)
        ),
        *((f"a{s}", raw[:99] + bytes(99) + raw[198:], "text", [REMEDY]) for s, raw in COMPRESSED.items()),
        *(
            ("a.parquet", parquet_bytes(COLUMNS), column, [repr(column), "text (string)"])
            for column in ("body", "both.b", "list.element", "id")
        ),
        *(("a.parquet", parquet_bytes(COLUMNS), column, [repr(column), "--column"]) for column in ("list", "both")),
        ("a.parquet", parquet_bytes(pa.table({"text": [b"\x89PNG"]})), "text", ["'text' has bytes that are not UTF-8"]),
        *((f"a.{s}", raw, "text", parts) for s, raw, parts in WRONG_RECORDS),
        *((f"a{suffix}", raw, "text", parts) for raw, parts in NO_TEXT for suffix in (".txt", ".jsonl")),
        *(("a.csv", raw, ENGLISH.partition("\n")[0], parts) for raw, parts in NO_TEXT),
        *(
            ("a.parquet", raw, "text", ["cannot be read", REMEDY])
            for raw in (b"", WHOLE[:100], WHOLE[:-1], b"this is text\n" * 99)
        ),
        *(("a.parquet", damaged_page(codec), "text", [REMEDY]) for codec in ("snappy", "zstd")),
        ("a.parquet", parquet_bytes(pa.table({"text": NOT_UTF8})), "text", []),
    ],
)
def test_error_names_the_file_and_the_place(tmp_path, monkeypatch, name, raw, column, parts):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 700)
    path = tmp_path / name
    if raw is not None:
        path.write_bytes(raw)
    with pytest.raises(UserError) as caught:
        documents(path, column=column)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    assert [part for part in parts if part not in str(caught.value)] == []


@settings(max_examples=100)
@given(
    st.text("aé東🎈\n\ufeff", max_size=20),
    st.sampled_from([b"\xff", b"\x80", b"\xc3", b"\xc3(", b"\xe2\x82(", b"\xf0\x9f\x8e", b"\xed\xa0\xbd", b"\xc0\xaf"]),
    st.text("aé東🎈\n", max_size=9),
    st.sampled_from([*range(3, 12), 4 << 20]),
)
@example("aaaa\ufeff", b"\xff", "", 4)
def test_text_that_is_not_utf8(tmp_path_factory, before, broken, after, block):
    """The place is that of Python's decoder, also across chunks and at the end of the file."""
    raw = before.encode() + broken + after.encode()
    with pytest.raises(UnicodeDecodeError) as plain:
        raw.decode()
    line = raw[: plain.value.start].count(b"\n") + 1
    path = tmp_path_factory.getbasetemp() / "broken.txt"
    path.write_bytes(raw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK_BYTES", block)
        with pytest.raises(
            UserError, match=rf"broken\.txt line {line}: byte 0x{raw[plain.value.start]:02x} is not UTF-8"
        ):
            list(text_files.text_chunks(path))
