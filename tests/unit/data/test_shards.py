"""The shard format: what is written is read, also by a writer that continues after a stop; and damage is named."""

import errno
import hashlib
import json
import os
import pickle
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from dataset_files import FACTS, cut, limit, llmc, shard, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared import content

from config import UserError
from flatgpt.data.shards import ShardWriter, Tokens, read_meta
from flatgpt.runtime.files import atomic_write

quick = settings(max_examples=60)

# ---------------------------------------------------------------------------------------------------------------------
# writing and reading


@pytest.mark.parametrize("shard_tokens", [1, 7, 10, 23, 100])
def test_what_is_written_is_read(tmp_path, shard_tokens):
    writer = ShardWriter(tmp_path, "val", 65536, shard_tokens)
    writer.add([0, 1, 2], text_bytes=5)
    writer.add([])
    writer.add(list(range(11)), documents=3, text_bytes=13)
    writer.add(np.full(9, 65535), documents=0)
    entry = writer.close()
    flat = [0, 1, 2, *range(11), *[65535] * 9]
    pieces = [flat[n : n + shard_tokens] for n in range(0, len(flat), shard_tokens)]
    expected = {f"val_{n:06d}.bin": np.array(piece, "<u2").tobytes() for n, piece in enumerate(pieces)}
    assert content(tmp_path) == expected
    assert entry == {
        "tokens": 23,
        "documents": 5,
        "bytes": 18,
        "files": [
            {"name": name, "tokens": len(raw) // 2, "sha256": hashlib.sha256(raw).hexdigest()}
            for name, raw in expected.items()
        ],
    }
    assert Tokens([(tmp_path / file["name"], file["tokens"]) for file in entry["files"]])[:].tolist() == flat


@quick
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.data())
def test_indexing_is_that_of_the_concatenation(sizes, data):
    """With any slice, an int or numpy's; and a position outside is an error."""
    plain = np.arange(sum(sizes), dtype="<u2")
    position = st.integers(-2 * len(plain), 2 * len(plain))
    edge = st.none() | position | position.map(np.int64)
    step = st.none() | st.integers(-3, 3).filter(bool) | position.filter(bool)
    with tempfile.TemporaryDirectory() as folder:
        found = tokens(Path(folder), *np.split(plain, np.cumsum(sizes)[:-1]))
        assert len(found) == len(plain)
        for _ in range(5):
            key = data.draw(st.builds(slice, edge, edge, step) | position | position.map(np.int32))
            try:
                expected = plain[key]
            except IndexError:
                with pytest.raises(IndexError):
                    found[key]
            else:
                assert found[key].dtype == plain.dtype
                assert found[key].tolist() == expected.tolist()
        assert list(found) == plain.tolist()
        for wrong in (1.5, "1", [0], None):
            with pytest.raises(TypeError):
                found[wrong]


def test_nothing_has_its_name_before_it_is_on_the_disk(tmp_path, monkeypatch):
    """With all that belongs in it: a rename can reach the disk before the content does."""
    on_disk, renamed, rename = [], [], os.replace

    def replace(source, target):
        renamed.append((os.stat(source).st_ino, os.stat(source).st_size))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", lambda file: on_disk.append((os.fstat(file).st_ino, os.fstat(file).st_size)))
    monkeypatch.setattr(os, "replace", replace)
    writer = ShardWriter(tmp_path, "train", 257, 4)
    writer.add(range(10))
    writer.close()
    atomic_write(tmp_path / "a", b"x" * 10)
    assert on_disk == renamed
    assert [size for _, size in renamed] == [8, 8, 4, 10]


# ---------------------------------------------------------------------------------------------------------------------
# continuing after a stop

PART = st.lists(st.integers(0, 256), max_size=9)


@quick
@given(st.lists(PART, max_size=5), st.integers(1, 15), st.data())
def test_writer_that_goes_on_ends_as_if_never_stopped(parts, shard_tokens, data):
    """Stopped at any places, each time with more written than the position knows of; the copy is what a kill leaves."""
    with tempfile.TemporaryDirectory() as root:
        whole, folder = Path(root, "whole"), Path(root, "stopped")
        whole.mkdir()
        folder.mkdir()
        others = {"val_000007.bin": b"\1\0", "val_000000.bin.tmp": b"\2\0", "progress.json": b"{}"}
        for name, raw in others.items():
            (folder / name).write_bytes(raw)
        plain = ShardWriter(whole, "train", 257, shard_tokens)
        writer = ShardWriter(folder, "train", 257, shard_tokens)
        for n, ids in enumerate([[], *parts]):
            for each in (plain, writer):
                each.add(ids, documents=n % 3, text_bytes=5 * n)
            if not data.draw(st.booleans(), label="stop"):
                continue
            writer.flush()
            position = json.loads(json.dumps(writer.position()))
            for lost in data.draw(st.lists(PART, max_size=4), label="lost"):
                writer.add(lost)
            if end := data.draw(st.sampled_from(["", "flush", "close"]), label="end"):
                getattr(writer, end)()
            left, folder = folder, Path(root, f"copy {n}")
            shutil.copytree(left, folder)
            writer = ShardWriter(folder, "train", 257, shard_tokens, position)
            assert writer.position() == position
            assert writer.tokens == plain.tokens == sum(map(len, parts[:n]))
        assert writer.close() == plain.close()
        assert content(folder) == content(whole) | others


@pytest.mark.parametrize("damage", [cut, Path.unlink])
@pytest.mark.parametrize("name", ["train_000000.bin", "train_000001.bin", "train_000002.bin.tmp"])
def test_files_that_do_not_hold_the_position_are_named_and_kept(tmp_path, name, damage):
    writer = ShardWriter(tmp_path, "train", 257, 4)
    writer.add(range(10))
    writer.flush()
    (tmp_path / "train_000003.bin").write_bytes(b"\1\0")
    damage(tmp_path / name)
    before = content(tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path / name} .*move {tmp_path} away"):
        ShardWriter(tmp_path, "train", 257, 4, writer.position())
    assert content(tmp_path) == before


# ---------------------------------------------------------------------------------------------------------------------
# files of other programs, and damage


def test_llmc_and_raw_files_are_one_sequence(tmp_path):
    files = [shard(tmp_path / "a.bin", [1, 2]), (llmc(tmp_path / "b.bin", range(50_000, 50_257)), None)]
    found = Tokens([*files, (llmc(tmp_path / "c.bin", [3]), None)])
    assert len(found) == 260
    assert found[:].tolist() == [1, 2, *range(50_000, 50_257), 3]
    path = files[1][0]  # with a manifest its header is ids of some vocabulary of 65,536
    assert Tokens([(path, 512 + 257)])[:4].tolist() == [20240520 % 65_536, 20240520 // 65_536, 1, 0]


class Trap:
    """Unpickled, it leaves a folder behind."""

    def __reduce__(self):
        return os.mkdir, ("canary",)


@pytest.mark.parametrize(
    ("body", "count", "said"),
    [
        (bytes(18), 10, "has 18 bytes, but meta.json says 20: truncated"),
        (bytes(40), 10, "has 40 bytes, but meta.json says 20: .*not uint16"),
        (b"", None, "has 0 bytes: .*positive even"),
        (b"\1\0\2", None, "has 3 bytes: .*positive even"),
        (np.arange(8, dtype="<u4").tobytes(), None, "looks like uint32 ids"),
        ({"count": 11}, None, "has 1,044 bytes, but its llm.c header says 1,046: truncated"),
        ({"magic": 20240801, "dtype": "<u4"}, None, "has llm.c's uint32 ids of Llama 3"),
        (pickle.dumps(Trap(), 4), None, "is a Python pickle"),
        (pickle.dumps([f"{n}" * 40_000 for n in range(5)], 4), None, "is a Python pickle"),  # of several frames
        (pickle.dumps([5] * 3000, 5), None, "is a Python pickle"),
        (pickle.dumps(Trap(), 4), 10, "has .* bytes, but meta.json says 20"),
    ],
)
def test_files_that_are_no_shards(in_tmp, body, count, said):
    """Each is named, and what to do; nothing is unpickled."""
    if isinstance(body, dict):
        llmc(Path("x.bin"), range(10), **body)
    else:
        Path("x.bin").write_bytes(body)
    with pytest.raises(UserError, match=rf"^x\.bin {said}.*move \. away"):
        Tokens([(Path("x.bin"), count)])
    assert not Path("canary").exists()


def test_ids_that_look_like_other_formats(tmp_path):
    """Zeros that are too few or not at every second place; and the first bytes of a pickle without its rest.

    With a manifest, only the size decides, and with --verify the hash.
    """
    zeros = [[0] * 100, [5, 0] * 7, [5, 0] * 8 + [5], [*[5, 0] * 1000, 7, 7], [0, 5] * 50]
    pickles = [[first, *second, *range(20)] for first in (0x0280, 0x0480) for second in ([0x0195], [0x4E4E] * 4)]
    pickles += [[0x0480, 0x1495, 0, 0, 0, 0, *range(20)], [0x0480, 0xFF95, 0, 0, 0, 0, *range(20), ord(".") << 8]]
    for ids in (*zeros, *pickles):
        path, _ = shard(tmp_path / "x.bin", ids)
        assert Tokens([(path, None)])[:].tolist() == ids
    for raw in (pickle.dumps([5] * 3000, 4), np.arange(40, dtype="<u4").tobytes()):
        path, count = shard(tmp_path / "x.bin", np.frombuffer(raw, "<u2"))
        assert Tokens([(path, count)])[:].tobytes() == raw


SPLITS_KEY = {"splits": {"train": {"tokens": 3, "files": [{"name": "train_000000.bin", "tokens": 3}]}}}


FILE = SPLITS_KEY["splits"]["train"]["files"][0]
WRONG_KEYS = [{"vocab_size": wrong} for wrong in (0, -1, 70_000, "257", 257.0, None, True)]
WRONG_KEYS += [{"tokenizer": 3}, {"eot_id": "256"}, {"eot_id": -1}, {"end_of_text": "no"}, {"ranks_sha256": None}]
WRONG_KEYS += [
    {"splits": {"train": {"tokens": 3, "files": [FILE], **entry}}}
    for entry in (
        *({"tokens": wrong} for wrong in (-3, 4, "3", None)),
        *({"documents": wrong} for wrong in (-1, "1", [])),
        *({"files": wrong} for wrong in (3, [3], ["a.bin"], [], [{"tokens": 3}], [{**FILE, "tokens": "3"}])),
        *({"files": [{**FILE, "name": wrong}]} for wrong in ("../train_000000.bin", "/a.bin", "a/b.bin", 3)),
        {"files": [{**FILE, "tokens": -1}, {**FILE, "tokens": 4}]},
    )
]


@pytest.mark.parametrize(
    "body",
    [
        *(json.dumps({"format": 1, **FACTS, **SPLITS_KEY, **wrong}).encode() for wrong in WRONG_KEYS),
        *(
            b"",
            b'{"format": 1, "sou',
            b"\xff\xfe",
            b"[1]",
            b'{"format": 1}',
            b'{"format": 99}',
            pickle.dumps(Trap(), 0),
        ),
        *(json.dumps({k: 1 for k in ("format", *FACTS) if k != lost} | SPLITS_KEY).encode() for lost in FACTS),
        *(json.dumps(dict.fromkeys(("format", *FACTS), 1) | {"splits": bad}).encode() for bad in (3, [], {}, {"a": 3})),
    ],
)
def test_damaged_manifest(in_tmp, body):
    Path("meta.json").write_text(json.dumps({"format": 1, **FACTS, **SPLITS_KEY}))
    assert read_meta(Path())["splits"] == SPLITS_KEY["splits"]
    Path("meta.json").write_bytes(body)
    with pytest.raises(UserError, match=r"meta\.json is damaged, or its format is not 1.*prepare_data\.py"):
        read_meta(Path())
    assert not Path("canary").exists()


# ---------------------------------------------------------------------------------------------------------------------
# while a file is open


@pytest.mark.parametrize("left", [0, 1, 5000, 5999, 19_998])
def test_file_that_is_truncated_while_it_is_read_is_named(tmp_path, left):
    """A memory map would end the process, without a word, or give zeros up to the end of the page."""
    path, plain = llmc(tmp_path / "b.bin", range(10_000)), [*range(10), *range(10_000)]
    found, whole = Tokens([shard(tmp_path / "a.bin", range(10)), (path, None)]), path.read_bytes()
    os.truncate(path, 1024 + left)
    readable = 10 + left // 2
    assert found[: readable - 1].tolist() == plain[: readable - 1]
    for span in (slice(readable, readable + 1), slice(0, None), slice(10_005, None)):
        with pytest.raises(UserError, match=f"^{path}: truncated or replaced while it was in use"):
            found[span]
    with open(path, "r+b") as file:
        file.write(whole)
    assert found[:].tolist() == plain, "put back"
    atomic_write(path, b"")  # another file of this name
    assert found[:].tolist() == plain


def test_disk_that_cannot_be_read_is_said_with_the_place(tmp_path, monkeypatch):
    def fail(file, size, at):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    found = tokens(tmp_path, range(100))
    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(UserError, match=r"train_000000\.bin: cannot be read at byte 20: Input/output error"):
        found[10:20]


def open_files() -> set[int]:
    return {int(name) for name in os.listdir("/dev/fd") if os.path.exists(f"/dev/fd/{name}")}


def test_many_shards_are_read_by_threads_with_few_open_files(tmp_path):
    """A shard that was replaced or removed while it was closed is an error; it has another size or is another file."""
    before, plain = open_files(), np.arange(1200, dtype="<u2")
    with limit("RLIMIT_NOFILE", 120), ThreadPoolExecutor(4) as threads:
        found = tokens(tmp_path, *plain.reshape(300, 4))
        spans = [slice(start, start + 9) for start in np.random.default_rng(0).permutation(1192).tolist()]
        for span, ids in zip(spans, threads.map(found.__getitem__, spans), strict=True):
            assert ids.tolist() == plain[span].tolist()
        assert found[100:].tolist() == plain[100:].tolist()  # the first shards are closed now
        assert len(open_files() - before) <= 30
        for n, damage in enumerate([lambda path: atomic_write(path, bytes(8)), lambda path: os.truncate(path, 6)]):
            damage(tmp_path / f"train_{n:06d}.bin")
            with pytest.raises(UserError, match=rf"train_00000{n}\.bin: truncated or replaced while it was in use"):
                found[4 * n : 4 * n + 2]
        (tmp_path / "train_000002.bin").unlink()
        with pytest.raises(UserError, match=r"train_000002\.bin: cannot be read: No such file"):
            found[8:10]


@pytest.mark.filterwarnings("error")
def test_files_are_closed_with_their_tokens_and_not_inherited(tmp_path):
    before = open_files()
    found = tokens(tmp_path, range(10), range(5))
    files = open_files() - before
    assert len(files) == 2
    assert not any(map(os.get_inheritable, files))
    part = found[:]
    del found
    assert open_files() == before
    assert part.tolist() == [*range(10), *range(5)]


# ---------------------------------------------------------------------------------------------------------------------
# ids outside the vocabulary


@pytest.mark.parametrize(("file", "at"), [(0, 0), (0, 9), (1, 0), (1, 6)])
def test_id_outside_the_vocabulary_is_not_read(tmp_path, file, at):
    parts = [np.full(10, 256), np.full(7, 256)]
    parts[file][at], place = 257, 10 * file + at
    tokens(tmp_path, *parts)
    files = [(tmp_path / f"train_00000{n}.bin", len(part)) for n, part in enumerate(parts)]
    found = Tokens(files, 257)
    assert found[:place].tolist() + found[place + 1 :].tolist() == [256] * 16
    for span in (slice(None), slice(place, place + 1), slice(max(0, place - 3), place + 3)):
        with pytest.raises(
            UserError, match=f"^{files[file][0]}: id 257 at byte {2 * at} is not in the vocabulary of 257"
        ):
            found[span]
    assert Tokens(files)[:][place] == 257, "the vocabulary is not known"
