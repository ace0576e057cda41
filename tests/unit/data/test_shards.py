"""The shard format: what is written is read, also by a writer that goes on after a stop; and what damage is called."""

import errno
import hashlib
import json
import os
import pickle
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from dataset_files import FACTS, cut, finished, full_disk, llmc, shard, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared import content

from config import UserError
from flatgpt.data.shards import ShardWriter, Tokens, read_meta, write_meta
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
    paths = sorted(tmp_path.iterdir())
    assert [p.name for p in paths] == [f"val_{n:06d}.bin" for n in range(-(-len(flat) // shard_tokens))]
    pieces = [flat[n : n + shard_tokens] for n in range(0, len(flat), shard_tokens)]
    assert [p.read_bytes() for p in paths] == [b"".join(i.to_bytes(2, "little") for i in piece) for piece in pieces]
    assert entry == {
        "tokens": 23,
        "documents": 5,
        "bytes": 18,
        "files": [
            {"name": p.name, "tokens": len(piece), "sha256": hashlib.sha256(p.read_bytes()).hexdigest()}
            for p, piece in zip(paths, pieces, strict=True)
        ],
    }
    write_meta(tmp_path, {**FACTS, "splits": {"val": entry}})
    files = read_meta(tmp_path)["splits"]["val"]["files"]
    assert Tokens([(tmp_path / f["name"], f["tokens"]) for f in files])[:].tolist() == flat


def test_a_file_has_its_name_when_it_is_full(tmp_path):
    writer = ShardWriter(tmp_path, "train", 257, 4)
    assert content(tmp_path) == {}
    writer.add([1, 2, 3])
    writer.flush()
    assert content(tmp_path) == {"train_000000.bin.tmp": b"\1\0\2\0\3\0"}
    writer.add([4])
    assert content(tmp_path) == {"train_000000.bin": b"\1\0\2\0\3\0\4\0"}
    writer.add([5])
    writer.flush()
    assert content(tmp_path) == {"train_000000.bin": b"\1\0\2\0\3\0\4\0", "train_000001.bin.tmp": b"\5\0"}
    assert writer.tokens == 5
    writer.close()
    assert content(tmp_path) == {"train_000000.bin": b"\1\0\2\0\3\0\4\0", "train_000001.bin": b"\5\0"}


def test_nothing_written_is_no_file(tmp_path):
    nothing = {"tokens": 0, "documents": 0, "bytes": 0, "files": []}
    assert ShardWriter(tmp_path, "train", 257, 4).close() == nothing
    assert content(tmp_path) == {}


@pytest.mark.parametrize("wrong", [-1, 257, 65536 + 5])
def test_ids_beyond_the_vocabulary_are_never_written(tmp_path, wrong):
    """As uint16, 65541 would be 5 without a word."""
    writer = ShardWriter(tmp_path, "train", 257, 100)
    with pytest.raises(AssertionError):
        writer.add([1, wrong])
    assert writer.close()["tokens"] == 0


@quick
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.data())
def test_slices_are_those_of_the_concatenation(sizes, data):
    plain = np.arange(sum(sizes), dtype="<u2")
    edge = st.none() | st.integers(-2 * len(plain), 2 * len(plain))
    with tempfile.TemporaryDirectory() as folder:
        found = tokens(Path(folder), *np.split(plain, np.cumsum(sizes)[:-1]))
        assert len(found) == len(plain)
        for _ in range(5):
            start, stop = data.draw(edge), data.draw(edge)
            got = found[start:stop]
            assert got.dtype == plain.dtype
            assert got.tolist() == plain[start:stop].tolist()


def test_atomic_write_is_all_or_nothing(tmp_path):
    path = tmp_path / "a.bin"
    atomic_write(path, b"old")
    with full_disk(room=1000), pytest.raises(OSError, match="large"):
        atomic_write(path, b"new" * 10_000)
    assert path.read_bytes() == b"old"
    atomic_write(path, b"new" * 10_000)
    assert path.read_bytes() == b"new" * 10_000
    assert list(tmp_path.iterdir()) == [path]


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
# going on after a stop

PART = st.lists(st.integers(0, 256), max_size=9)


@quick
@given(st.lists(PART, max_size=5), st.integers(1, 15), st.data())
def test_writer_that_goes_on_ends_as_if_never_stopped(parts, shard_tokens, data):
    """Stopped at any places, each time with more written than the position knows of; the copy is what a kill leaves."""
    counts = [{"documents": n % 3, "text_bytes": 5 * n} for n in range(len(parts))]
    with tempfile.TemporaryDirectory() as root:
        whole, folder = Path(root, "whole"), Path(root, "stopped")
        whole.mkdir()
        folder.mkdir()
        others = {"val_000007.bin": b"\1\0", "val_000000.bin.tmp": b"\2\0", "progress.json": b"{}"}
        for name, raw in others.items():
            (folder / name).write_bytes(raw)
        plain = ShardWriter(whole, "train", 257, shard_tokens)
        writer = ShardWriter(folder, "train", 257, shard_tokens)
        known = []
        for n, ids in enumerate([[], *parts]):
            if n:
                plain.add(ids, **counts[n - 1])
                writer.add(ids, **counts[n - 1])
            if not data.draw(st.booleans(), label="stop"):
                continue
            writer.flush()
            position = writer.position()
            for lost in data.draw(st.lists(PART, max_size=4), label="lost"):
                writer.add(lost)
            saved = json.dumps(position)
            position = json.loads(saved)
            known.append((position, saved))
            if end := data.draw(st.sampled_from(["", "flush", "close"]), label="end"):
                getattr(writer, end)()
            left, folder = folder, Path(root, f"copy {n}")
            shutil.copytree(left, folder)
            writer = ShardWriter(folder, "train", 257, shard_tokens, position)
            assert writer.position() == position
            assert writer.tokens == plain.tokens == sum(map(len, parts[:n]))
        assert writer.close() == plain.close()
        assert content(folder) == content(whole) | others
        assert all(json.dumps(position) == saved for position, saved in known), "it stays what it was"


def test_position_without_ids_drops_what_came_after_it(tmp_path):
    position = ShardWriter(tmp_path, "train", 257, 4).position()
    ShardWriter(tmp_path, "train", 257, 4).add(range(10))
    ShardWriter(tmp_path, "train", 257, 4, position)
    assert content(tmp_path) == {}


@pytest.mark.parametrize("damage", [cut, Path.unlink])
@pytest.mark.parametrize("name", ["train_000000.bin", "train_000001.bin", "train_000002.bin.tmp"])
def test_files_that_do_not_hold_the_position_are_named_and_kept(tmp_path, name, damage):
    writer = ShardWriter(tmp_path, "train", 257, 4)
    writer.add(range(10))
    writer.flush()
    (tmp_path / "train_000003.bin").write_bytes(b"\1\0")
    damage(tmp_path / name)
    before = content(tmp_path)
    with pytest.raises(UserError) as caught:
        ShardWriter(tmp_path, "train", 257, 4, writer.position())
    assert str(tmp_path / name) in str(caught.value)
    assert f"move {tmp_path} away" in str(caught.value)
    assert content(tmp_path) == before


# ---------------------------------------------------------------------------------------------------------------------
# llm.c's files


def test_llmc_files_are_read(tmp_path):
    a, b = np.arange(50_000, 50_257), np.arange(10)
    found = Tokens([(llmc(tmp_path / "a.bin", a), None), (llmc(tmp_path / "b.bin", b), None)])
    assert len(found) == 267
    assert found[:].dtype == np.dtype("<u2")
    assert found[:].tolist() == [*a, *b]
    assert found[250:260].tolist() == [*a[250:], *b[:3]]


def test_llmc_and_raw_files_are_one_sequence(tmp_path):
    found = Tokens([shard(tmp_path / "a.bin", [1, 2]), (llmc(tmp_path / "b.bin", [3]), None)])
    assert found[:].tolist() == [1, 2, 3]


@pytest.mark.parametrize("left", [4, 12, 500, 1023, 1024, 1025, 1030, 1042, 1043])
def test_truncated_llmc_file(tmp_path, left):
    path = llmc(tmp_path / "x.bin", range(10))
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(UserError, match=rf"x\.bin has llm\.c's header .* and {left:,} bytes.*truncated"):
        Tokens([(path, None)])


@pytest.mark.parametrize("wrong", [{"count": 9}, {"count": 11}, {"version": 2}, {"version": 0}, {"dtype": "<u4"}])
def test_header_that_does_not_fit_the_file(tmp_path, wrong):
    path = llmc(tmp_path / "x.bin", range(10), **wrong)
    with pytest.raises(UserError, match=r"x\.bin has llm\.c's header \(version \d, \d+ ids\)"):
        Tokens([(path, None)])


def test_llmc_file_without_ids(tmp_path):
    with pytest.raises(UserError, match=r"x\.bin has llm\.c's header and no ids"):
        Tokens([(llmc(tmp_path / "x.bin", []), None)])


def test_llama_ids_are_refused_with_the_reason(tmp_path):
    path = llmc(tmp_path / "x.bin", [128_000, 5], magic=20240801, version=7, dtype="<u4")
    with pytest.raises(UserError, match=r"x\.bin .*Llama 3.*do not fit uint16"):
        Tokens([(path, None)])


@pytest.mark.parametrize("magic", [20240520, 20240801])
def test_shard_with_a_manifest_is_never_taken_for_llmcs(tmp_path, magic):
    """As ids, the header is 55,432 (or 55,713), 308, 1, 0, and so on: ids of some vocabulary of 65,536."""
    path = llmc(tmp_path / "x.bin", range(10), magic=magic)
    found = Tokens([(path, 512 + 10)])
    assert found[:].tolist() == np.frombuffer(path.read_bytes(), dtype="<u2").tolist()
    assert found[:4].tolist() == [magic % 65_536, magic // 65_536, 1, 0]


# ---------------------------------------------------------------------------------------------------------------------
# damage


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: f.write_bytes(f.read_bytes()[:-2]), ["18 bytes", "meta.json says 20", "prepare_data.py"]),
        (lambda f: f.write_bytes(f.read_bytes()[:-1]), ["19 bytes", "meta.json says 20", "prepare_data.py"]),
        (lambda f: f.write_bytes(f.read_bytes() + b"\0"), ["21 bytes", "meta.json says 20", "truncated or changed"]),
        (lambda f: f.write_bytes(f.read_bytes() + b"\0\0"), ["22 bytes", "meta.json says 20", "prepare_data.py"]),
        (lambda f: np.arange(10, dtype="<u4").tofile(f), ["40 bytes", "meta.json says 20: looks like uint32 ids"]),
        (lambda f: f.write_bytes(b""), ["0 bytes", "meta.json says 20", "prepare_data.py"]),
        (Path.unlink, ["cannot be read", "No such file"]),
    ],
)
def test_changed_shard_is_named(tmp_path, damage, said):
    files = [shard(tmp_path / f"train_{n:06d}.bin", range(10)) for n in range(3)]
    damage(tmp_path / "train_000001.bin")
    with pytest.raises(UserError) as caught:
        Tokens(files)
    for part in (str(tmp_path / "train_000001.bin"), *said):
        assert part in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\1", b"\1\0\2"])
def test_file_that_cannot_be_uint16(tmp_path, content):
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(UserError, match=rf"x\.bin has {len(content)} bytes.*uint16"):
        Tokens([(tmp_path / "x.bin", None)])


@pytest.mark.parametrize("count", [8, 100, 5000])
@pytest.mark.parametrize("dtype", ["<u4", "<i4", "<i8"])
def test_wider_ids_without_a_manifest_are_told_by_their_zeros(tmp_path, dtype, count):
    np.arange(count, dtype=dtype).tofile(tmp_path / "x.bin")
    with pytest.raises(UserError) as caught:
        Tokens([(tmp_path / "x.bin", None)])
    size = min(4096, (tmp_path / "x.bin").stat().st_size)
    for part in (f"{tmp_path}/x.bin looks like uint32 ids", f"its first {size:,} bytes", "again with dtype uint16"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "ids", [[0] * 100, [5, 0] * 7, [5, 0] * 8 + [5], [*[5, 0] * 8, 0, 1], [*[5, 0] * 1000, 7, 7], [0, 5] * 50]
)
def test_zeros_alone_are_ids(tmp_path, ids):
    """All of them, too few to tell, an odd number, or not at every second place."""
    path, _ = shard(tmp_path / "x.bin", ids)
    assert Tokens([(path, None)])[:].tolist() == ids


# ---------------------------------------------------------------------------------------------------------------------
# while a file is open


@pytest.mark.parametrize("left", [0, 1, 5000, 5999, 6000, 19_998])
@pytest.mark.parametrize("header", [0, 1024])
def test_file_that_is_truncated_while_it_is_read_is_named(tmp_path, header, left):
    """A memory map would end the process, without a word, or give zeros up to the end of the page."""
    before, path = shard(tmp_path / "a.bin", range(10)), tmp_path / "b.bin"
    if header:
        llmc(path, range(10_000))
    else:
        shard(path, range(10_000))
    found = Tokens([before, (path, None)])
    whole = path.read_bytes()
    assert found[5:5000].tolist() == [*range(5, 10), *range(4990)]
    os.truncate(path, header + left)
    readable = 10 + left // 2
    assert found[: readable - 1].tolist() == [*range(10), *range(10_000)][: readable - 1]
    for span in (slice(readable, readable + 1), slice(0, None), slice(10_005, None)):
        with pytest.raises(UserError) as caught:
            found[span]
        said = f"{path}: truncated or replaced while it was in use: it now ends at byte {header + left:,}, had "
        assert str(caught.value).startswith(f"{said}{header + 20_000:,}; ")
    with open(path, "r+b") as file:
        file.write(whole)
    assert found[readable:].tolist() == [*range(10), *range(10_000)][readable:], "put back"


def test_file_that_is_renamed_over_stays_what_it_was(tmp_path):
    found = tokens(tmp_path, range(10))
    atomic_write(tmp_path / "train_000000.bin", b"")
    assert found[:].tolist() == list(range(10))


def test_what_is_read_in_several_parts_is_whole(tmp_path, monkeypatch):
    """A read may give less than it was asked for, also half an id."""
    found, read = tokens(tmp_path, range(100)), os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, at: read(file, min(size, 7), at))
    assert found[3:90].tolist() == list(range(3, 90))


def test_disk_that_cannot_be_read_is_said_with_the_place(tmp_path, monkeypatch):
    def fail(file, size, at):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    found = tokens(tmp_path, range(100))
    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(UserError, match=r"train_000000\.bin: cannot be read at byte 20: Input/output error"):
        found[10:20]


def open_files() -> set[int]:
    found = set()
    for name in os.listdir("/dev/fd"):
        with suppress(OSError):  # what listed them is closed by now
            os.fstat(int(name))
            found.add(int(name))
    return found


@pytest.mark.filterwarnings("error")
def test_files_are_closed_with_their_tokens_and_not_inherited(tmp_path):
    before = open_files()
    found = tokens(tmp_path, range(10), range(5), range(3))
    files = open_files() - before
    assert len(files) == 3
    assert not any(map(os.get_inheritable, files))
    part = found[:]
    del found
    assert open_files() == before
    assert part.tolist() == [*range(10), *range(5), *range(3)]
    with pytest.raises(UserError, match="train_000001"):
        Tokens([(tmp_path / "train_000000.bin", 10), (tmp_path / "train_000001.bin", 6)])
    assert open_files() == before


# ---------------------------------------------------------------------------------------------------------------------
# manifests


@pytest.mark.parametrize("content", [b"", b'{"format": 1, "sou', b"\xff\xfe", b"[1]", b"{}", b'{"format": 1}'])
def test_damaged_manifest(tmp_path, content):
    (tmp_path / "meta.json").write_bytes(content)
    with pytest.raises(UserError, match=r"meta\.json is damaged.*prepare_data\.py"):
        read_meta(tmp_path)


@pytest.mark.parametrize("missing", [*FACTS, "splits"])
def test_manifest_without_one_of_its_facts_is_damaged(tmp_path, missing):
    write_meta(tmp_path, {key: value for key, value in {**FACTS, "splits": {}}.items() if key != missing})
    with pytest.raises(UserError, match=r"meta\.json is damaged"):
        read_meta(tmp_path)


def test_manifest_of_another_format(tmp_path):
    (tmp_path / "meta.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(UserError, match="format 99"):
        read_meta(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# ids that are none


@pytest.mark.parametrize("id", [257, 65_535])
@pytest.mark.parametrize(("file", "at"), [(0, 0), (0, 5), (0, 9), (1, 0), (1, 6)])
def test_id_outside_the_vocabulary_is_not_read(tmp_path, file, at, id):
    parts = [np.full(10, 256), np.full(7, 256)]
    files = [shard(tmp_path / f"{n}.bin", part) for n, part in enumerate(parts)]
    assert Tokens(files, 257)[:].tolist() == [256] * 17
    parts[file][at] = id
    shard(files[file][0], parts[file])
    found, place = Tokens(files, 257), 10 * file + at
    assert found[:place].tolist() + found[place + 1 :].tolist() == [256] * 16
    for span in (slice(None), slice(place, place + 1), slice(max(0, place - 3), place + 3)):
        with pytest.raises(UserError) as caught:
            found[span]
        said = f"{files[file][0]}: id {id} at byte {2 * at} is not in the vocabulary of 257 ids"
        assert str(caught.value).startswith(said)
    assert Tokens(files)[:][place] == id, "nobody knows the vocabulary"


@pytest.mark.parametrize(("file", "at"), [(0, 0), (0, 3), (1, (1 << 22) + 2)])
def test_check_ids_names_file_and_byte(tmp_path, file, at):
    """The last place lies in the second piece of the second file."""
    parts = [np.full(4, 256), np.zeros((1 << 22) + 3)]
    tokens(tmp_path, *parts).check_ids(257)
    parts[file][at] = 257
    parts[1][-1] = 300  # a later one is not the first
    with pytest.raises(UserError) as caught:
        tokens(tmp_path, *parts).check_ids(257)
    id = int(parts[file][at])
    assert f"train_{file:06d}.bin: id {id} at byte {2 * at:,} is not in the vocabulary of 257" in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# pickles


class Trap:
    """Unpickled, it leaves a folder behind."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("content", ["trap", "list", "array", "bytes"])
def test_pickle_is_refused_and_not_run(tmp_path, content, protocol):
    ids = np.arange(3000, dtype="<u2")
    thing = {"trap": Trap(tmp_path / "canary"), "list": ids.tolist(), "array": ids, "bytes": ids.tobytes()}[content]
    pickled = pickle.dumps(thing, protocol)
    (tmp_path / "x.bin").write_bytes(pickled)
    with pytest.raises(UserError, match="pickle"):
        Tokens([(tmp_path / "x.bin", None)])
    assert not (tmp_path / "canary").exists()
    if content == "trap":
        pickle.loads(pickled)  # the trap does work
        assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickle_of_a_shards_name_and_size_is_refused_and_not_run(tmp_path, protocol):
    folder, canary = finished(tmp_path / "d", {"train": [range(9)]}), tmp_path / "canary"
    pickled = pickle.dumps(Trap(canary), protocol)
    if len(pickled) % 2:
        canary = tmp_path / "canary_"
        pickled = pickle.dumps(Trap(canary), protocol)
    path = folder / "train_000000.bin"
    path.write_bytes(pickled)
    with pytest.raises(UserError, match=f"{path} is a Python pickle"):
        Tokens([(path, len(pickled) // 2)])
    assert not canary.exists()


@pytest.mark.parametrize("protocol", range(6))
def test_pickle_in_the_place_of_a_manifest_is_refused_and_not_run(tmp_path, protocol):
    (tmp_path / "meta.json").write_bytes(pickle.dumps(Trap(tmp_path / "canary"), protocol))
    with pytest.raises(UserError, match=rf"{tmp_path}/meta\.json is damaged"):
        read_meta(tmp_path)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("second", [[], [0x0195], [0x4E4E] * 4])
@pytest.mark.parametrize("first", [0x0280, 0x0380, 0x0480, 0x0580])
def test_ids_that_begin_like_a_pickle_are_ids(tmp_path, first, second):
    """`\\x80\\x02` is id 640, a word in GPT-2's vocabulary; some go on like a frame (0x95) or like opcodes (NNNN).

    A pickle ends with `.`; these end with a newline, id 198, as texts do.
    """
    random = np.random.default_rng(first)
    for _ in range(50):
        ids = [first, *second, *random.integers(0, 50257, 60).tolist(), 198]
        assert tokens(tmp_path, ids)[:].tolist() == ids


@pytest.mark.parametrize("second", [[0x4E4E] * 4, [0x9595] * 4, [0x0095, 100, 0, 0, 0]])
@pytest.mark.parametrize("first", [0x0480, 0x0580])
def test_ids_that_begin_and_end_like_a_pickle_without_its_frame_are_ids(tmp_path, first, second):
    """Opcodes and the last `.` are not enough: the frame of these protocols ends within the file."""
    ids = [first, *second, *range(20), 0x2E00]
    assert tokens(tmp_path, ids)[:].tolist() == ids
