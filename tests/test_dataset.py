"""The shard format and the order of batches, each against a plain version of itself; and what damage is called."""

import hashlib
import json
import os
import pickle
import tempfile
import tracemalloc
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dataset
from config import UserError
from dataset import IGNORE, ShardWriter, Shuffle, Tokens, TrainingBatches, Windows, eval_batches, open_dataset

quick = settings(max_examples=60, deadline=None, database=None)

# What a manifest says of the tokenizer; the tests here read ids alone.
FACTS = {"tokenizer": "byte", "vocab_size": 257, "ranks_sha256": "", "eot_id": 256, "end_of_text": True}


def shard(path: Path, ids) -> tuple[Path, int]:
    ids = np.asarray(ids, dtype="<u2")
    path.write_bytes(ids.tobytes())
    return path, ids.size


def tokens(folder: Path, *parts) -> Tokens:
    """Tokens over one shard file per part."""
    return Tokens([shard(folder / f"train_{n:06d}.bin", part) for n, part in enumerate(parts)])


def finished(folder: Path, documents, shard_tokens=10**6, split="train", n_vocab=257, **meta) -> Path:
    """A finished dataset of these lists of ids."""
    folder.mkdir()
    writer = ShardWriter(folder, split, n_vocab, shard_tokens)
    for ids in documents:
        writer.add(ids, "x " * len(ids))
    facts = {**FACTS, "vocab_size": n_vocab, "splits": {split: writer.close()}, **meta}
    dataset.write_meta(folder, facts)
    return folder


@contextmanager
def full_disk(room: int):
    """No file can grow past `room` bytes: a real write error in the middle of a file."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# ---------------------------------------------------------------------------------------------------------------------
# writing and reading


@pytest.mark.parametrize("shard_tokens", [1, 7, 10, 23, 100])
def test_what_is_written_is_read(tmp_path, shard_tokens):
    documents = [[0, 1, 2], [], list(range(11)), [65535] * 9]
    texts = ["a b c", "", "na\u00efve \U0001f388\r\n", "one\ttwo"]
    writer = ShardWriter(tmp_path, "val", 65536, shard_tokens)
    for ids, text in zip(documents, texts, strict=True):
        writer.add(ids, text)
    entry = writer.close()
    flat = [i for ids in documents for i in ids]
    paths = sorted(tmp_path.iterdir())
    assert [p.name for p in paths] == [f"val_{n:06d}.bin" for n in range(-(-len(flat) // shard_tokens))]
    pieces = [flat[n : n + shard_tokens] for n in range(0, len(flat), shard_tokens)]
    assert [p.read_bytes() for p in paths] == [b"".join(i.to_bytes(2, "little") for i in piece) for piece in pieces]
    assert entry == {
        "tokens": 23,
        "documents": 4,
        "bytes": 5 + 0 + 13 + 7,
        "words": 3 + 0 + 2 + 2,
        "files": [
            {"name": p.name, "tokens": len(piece), "sha256": hashlib.sha256(p.read_bytes()).hexdigest()}
            for p, piece in zip(paths, pieces, strict=True)
        ],
    }
    dataset.write_meta(tmp_path, {**FACTS, "splits": {"val": entry}})
    assert open_dataset(tmp_path).tokens("val")[:].tolist() == flat


@pytest.mark.parametrize("wrong", [-1, 257, 65536 + 5])
def test_ids_beyond_the_vocabulary_are_never_written(tmp_path, wrong):
    """As uint16, 65541 would be 5 without a word."""
    writer = ShardWriter(tmp_path, "train", 257, 100)
    with pytest.raises(AssertionError):
        writer.add([1, wrong], "x")


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


def test_write_whole_is_all_or_nothing(tmp_path):
    path = tmp_path / "a.bin"
    dataset.write_whole(path, b"old")
    with full_disk(room=1000), pytest.raises(OSError, match="large"):
        dataset.write_whole(path, b"new" * 10_000)
    assert path.read_bytes() == b"old"
    dataset.write_whole(path, b"new" * 10_000)
    assert path.read_bytes() == b"new" * 10_000
    assert list(tmp_path.iterdir()) == [path]


def test_manifest_hash_names_the_data(tmp_path):
    one = open_dataset(finished(tmp_path / "one", [[1, 2, 3]]))
    same = open_dataset(finished(tmp_path / "same", [[1, 2, 3]]))
    other = open_dataset(finished(tmp_path / "other", [[1, 2, 4]]))
    assert one.manifest_hash == same.manifest_hash != other.manifest_hash


# ---------------------------------------------------------------------------------------------------------------------
# damage


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: f.write_bytes(f.read_bytes()[:-2]), ["18 bytes", "meta.json says 20", "prepare_data.py"]),
        (lambda f: f.write_bytes(f.read_bytes()[:-1]), ["19 bytes", "meta.json says 20", "prepare_data.py"]),
        (lambda f: f.write_bytes(f.read_bytes() + b"\0\0"), ["22 bytes", "meta.json says 20", "prepare_data.py"]),
        (lambda f: f.write_bytes(b""), ["0 bytes", "meta.json says 20", "prepare_data.py"]),
        (Path.unlink, ["cannot be read", "No such file"]),
    ],
)
def test_changed_shard_is_named(tmp_path, damage, said):
    data = open_dataset(finished(tmp_path / "d", [range(23)], shard_tokens=10))
    damage(data.folder / "train_000001.bin")
    with pytest.raises(UserError) as caught:
        data.tokens("train")
    for part in (str(data.folder / "train_000001.bin"), *said):
        assert part in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\1", b"\1\0\2"])
def test_file_that_cannot_be_uint16(tmp_path, content):
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(UserError, match=rf"x\.bin has {len(content)} bytes.*uint16"):
        Tokens([(tmp_path / "x.bin", None)])


@pytest.mark.parametrize(
    ("name", "left", "said"),
    [
        ("pydoc", [], ["is not there", "prepare_data.py pydoc"]),
        ("shakespeare_byte", [], ["is not there", "prepare_data.py shakespeare --tokenizer byte"]),
        ("pydoc", ["train_000000.bin"], ["is not finished", "prepare_data.py pydoc"]),
        ("pydoc", ["train_000000.bin.tmp"], ["is not finished", "prepare_data.py pydoc"]),
        ("pydoc", ["train_000000.bin", "meta.json.tmp"], ["is not finished", "prepare_data.py pydoc"]),
        ("mine", ["train_000000.bin"], ["is not finished", "prepare_data.py text --input", "--name mine"]),
        ("text_byte", [], ["is not there", "prepare_data.py text --tokenizer byte --input"]),
    ],
)
def test_unfinished_dataset_names_the_command(tmp_path, name, left, said):
    folder = tmp_path / name
    for file in left:
        folder.mkdir(exist_ok=True)
        (folder / file).write_bytes(b"\1\0")
    with pytest.raises(UserError) as caught:
        open_dataset(folder)
    for part in (str(folder), *said):
        assert part in str(caught.value)


def test_command_for_a_dataset_elsewhere_says_where(tmp_path):
    """Without --data_dir the command would write to ./data, and the dataset would still be missing here."""
    with pytest.raises(UserError, match=rf"--data_dir {tmp_path}"):
        open_dataset(tmp_path / "pydoc")


@pytest.mark.parametrize("content", [b"", b'{"format": 1, "sou', b"\xff\xfe", b"[1]", b"{}", b'{"format": 1}'])
def test_damaged_manifest(tmp_path, content):
    (tmp_path / "meta.json").write_bytes(content)
    with pytest.raises(UserError, match=r"meta\.json is damaged.*prepare_data\.py"):
        open_dataset(tmp_path)


def test_manifest_of_another_format_or_tokenizer(tmp_path):
    folder = finished(tmp_path / "d", [[1, 2]], tokenizer="gpt3")
    with pytest.raises(UserError, match="tokenizer gpt3"):
        open_dataset(folder)
    (folder / "meta.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(UserError, match="format 99"):
        open_dataset(folder)


def test_missing_split_names_those_there_are(tmp_path):
    data = open_dataset(finished(tmp_path / "d", [[1, 2]], split="val"))
    with pytest.raises(UserError, match=r"no split test; it has val$"):
        data.tokens("test")


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


# ---------------------------------------------------------------------------------------------------------------------
# windows and their order


@pytest.mark.parametrize("stride", [None, 1, 3, 5, 8])
@pytest.mark.parametrize("length", [1, 5, 6, 7, 10, 11, 23])
def test_windows(tmp_path, length, stride):
    """Window w holds ids [wS, wS + T], targets one later, over the borders of files of 4 ids; whole ones only."""
    ids, T = np.arange(100, 100 + length), 5
    windows = Windows(tokens(tmp_path, *np.array_split(ids, -(-length // 4))), T, stride)
    S = stride or T
    plain = [ids[s : s + T + 1] for s in range(0, length, S) if s + T + 1 <= length]
    assert len(windows) == len(plain)
    for w, row in enumerate(plain):
        x, y = windows.batch(np.array([w], dtype=np.uint64))
        assert x.dtype == y.dtype == np.int64
        assert x.tolist() == [row[:-1].tolist()]
        assert y.tolist() == [row[1:].tolist()]
    if len(plain) > 1:
        x, _ = windows.batch(np.array([1, 0]))
        assert x.tolist() == [plain[1][:-1].tolist(), plain[0][:-1].tolist()]


def batches(folder, n_windows, batch_size, accum=1, seed=1) -> TrainingBatches:
    """Of windows whose first id is their own number: T = 1, stride 1."""
    return TrainingBatches(Windows(tokens(folder, range(n_windows + 1)), 1), batch_size, accum, seed)


def order(run: TrainingBatches, sequences: int) -> list[int]:
    """First ids of the run's first sequences, in order."""
    accum = run.per_update // run.batch_size
    updates = range(-(-sequences // run.per_update))
    return [int(i) for u in updates for m in range(accum) for i in run(u, m)[0][:, 0]][:sequences]


@pytest.mark.parametrize("n", [1, 2, 3, 16, 37])
@pytest.mark.parametrize(("batch_size", "accum"), [(1, 1), (4, 1), (5, 3), (64, 2)])
def test_an_epoch_visits_each_window_once(tmp_path, n, batch_size, accum):
    """Whatever divides what; where a batch spans two epochs (or many), both are whole."""
    found = order(batches(tmp_path, n, batch_size, accum), 3 * n)
    for epoch in range(3):
        assert sorted(found[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_order_depends_on_seed_and_epoch_alone(tmp_path):
    found = order(batches(tmp_path, 100, 10), 200)
    assert found[:100] != found[100:], "another epoch, another order"
    assert found[:100] != sorted(found[:100])
    assert order(batches(tmp_path, 100, 10, seed=2), 100) != found[:100]
    for batch_size, accum in ((5, 2), (2, 5), (20, 1), (7, 1)):
        assert order(batches(tmp_path, 100, batch_size, accum), 200) == found


def test_update_does_not_depend_on_what_came_before(tmp_path):
    run = batches(tmp_path, 37, 4, 2)
    there = {(u, m): run(u, m)[0].tolist() for u in range(20) for m in range(2)}
    for update, micro in [(19, 1), (3, 0), (3, 1), (0, 0)]:
        assert batches(tmp_path, 37, 4, 2)(update, micro)[0].tolist() == there[update, micro]


def plain_shuffle(n: int, seed: int, epoch: int) -> list[int]:
    """Shuffle in Python's whole numbers, one value at a time."""
    half = 1
    while 4**half < n:
        half += 1
    digest = hashlib.blake2b(f"flatgpt order {seed} {epoch}".encode(), digest_size=64).digest()
    keys = [int.from_bytes(digest[i : i + 8], "little") for i in range(0, 64, 8)]

    def permute(value):
        left, right = divmod(value, 2**half)
        for key in keys:
            z = (right + key) % 2**64
            z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
            z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
            left, right = right, left ^ ((z ^ (z >> 31)) % 2**half)
        return left * 2**half + right

    out = []
    for place in range(n):
        value = permute(place)
        while value >= n:
            value = permute(value)
        out.append(value)
    return out


@pytest.mark.parametrize("n", [1, 2, 4, 5, 16, 17, 100])
def test_shuffle_is_its_plain_version(n):
    assert Shuffle(n, 1337, 3)(np.arange(n)).tolist() == plain_shuffle(n, 1337, 3)


def test_shuffle_never_changes():
    """A run resumed with a later version of this code has to see the batches that it would have seen."""
    assert Shuffle(10, 1337, 0)(np.arange(10)).tolist() == [1, 0, 4, 8, 9, 6, 5, 3, 2, 7]


@quick
@given(st.integers(1, 3000), st.integers(0, 2**63 - 1), st.integers(0, 10**6))
def test_shuffle_is_a_bijection(n, seed, epoch):
    assert sorted(Shuffle(n, seed, epoch)(np.arange(n)).tolist()) == list(range(n))


def test_shuffle_favours_no_window():
    """Which of 32 windows comes first, over 3,200 epochs: chi-squared below its 99.99% point (31 degrees: 70)."""
    first = [int(Shuffle(32, 7, epoch)(np.zeros(1))[0]) for epoch in range(3200)]
    counts = np.bincount(first, minlength=32)
    assert ((counts - 100.0) ** 2 / 100).sum() < 70


class Endless:
    """A split of 10^12 tokens."""

    def __len__(self):
        return 10**12

    def __getitem__(self, span):
        return np.arange(span.start, span.stop) % 50257


def test_order_takes_no_memory():
    tracemalloc.start()
    run = TrainingBatches(Windows(Endless(), 1), 64, 4, 1337)
    found = np.concatenate([run.indices(10**7, micro) for micro in range(4)])
    run(10**7, 0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200_000
    assert len(set(found.tolist())) == 256
    assert max(found) < len(run.windows) == 10**12 - 1
    assert min(found) < 10**11  # spread over all of it
    assert max(found) > 9 * 10**11


# ---------------------------------------------------------------------------------------------------------------------
# evaluation


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
@pytest.mark.parametrize("length", [1, 2, 5, 6, 7, 10, 11, 12, 23])
def test_every_token_but_the_first_is_a_target_once(tmp_path, length, batch_size):
    T, seen = 5, []
    for x, y in eval_batches(tokens(tmp_path, *np.array_split(np.arange(length), 1 + length // 4)), T, batch_size):
        assert x.dtype == y.dtype == np.int64
        assert x.shape == y.shape
        assert x.shape[1] == T
        assert 1 <= len(x) <= batch_size
        for row_x, row_y in zip(x, y, strict=True):
            scored = (row_y != IGNORE).sum()
            assert (row_y[scored:] == IGNORE).all()
            start = row_x[0]
            assert start % T == 0, "windows do not overlap"
            assert row_x[:scored].tolist() == list(range(start, start + scored))
            assert row_y[:scored].tolist() == list(range(start + 1, start + scored + 1))
            assert (row_x < length).all()
            assert (row_x >= 0).all()
            seen += row_y[:scored].tolist()
    assert seen == list(range(1, length))


@pytest.mark.parametrize("limit", [1, 2, 3, 99])
def test_limit_takes_the_first_batches(tmp_path, limit):
    split = tokens(tmp_path, range(24))
    every = [y.tolist() for _, y in eval_batches(split, 5, 2)]
    assert len(every) == 3
    assert [y.tolist() for _, y in eval_batches(split, 5, 2, limit)] == every[:limit]
