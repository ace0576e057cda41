"""Which documents make which split: by hash and by characters, --sample_size, --splits, the source's own; and room."""

import gzip
import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
from in_process import TEXT
from prepared import content, files, from_text, prepare, refusal, texts

from config import PrepareConfig, UserError
from flatgpt.data import encode, readers
from flatgpt.data import split as plan
from flatgpt.data.sources import Corpus, RawFile


def write(path: Path, written: list[str | None]) -> None:
    """The texts as documents of a file, in the format that its name says; of .txt, one file each in a folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"n": n, "text": text}) + "\n" for n, text in enumerate(written)).encode()
    if path.suffix == ".parquet":
        table = pyarrow.table({"n": range(len(written)), "text": pyarrow.array(written, pyarrow.string())})
        pyarrow.parquet.write_table(table, path, row_group_size=7)
    elif path.suffix == ".txt":
        path.with_suffix("").mkdir()
        for n, text in enumerate(written):
            (path.with_suffix("") / f"{n:04d}.txt").write_bytes((text or "").encode())
    else:
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)


def hub_data(written: dict[str, list[str | None]], **keys):
    """A dataset of user/data's files, {name: texts}, put into raw_dir by hand; in bytes."""
    for name, parts in written.items():
        write(Path("raw/hub/user/data", name), parts)
    return prepare("hub", **{"repo": "user/data", "raw_dir": "raw", "tokenizer": "byte", "val_fraction": 0.1, **keys})


def by_hash(written, val=0.1, test=0.0) -> dict[str, list[str]]:
    """What each split holds of 100 documents or more."""
    found = {"train": [], "val": [], "test": []}
    for text in filter(None, written):
        found[encode.choose_split(text, val, test)].append(text)
    return found


def by_characters(written, val=0.1, test=0.0) -> dict[str, list[str]]:
    """What each split holds of fewer."""
    total, at = len("".join(filter(None, written))), 0
    cuts = 0, int(total * (1 - val - test)), int(total * (1 - test)), total
    found = {"train": [], "val": [], "test": []}
    for text in filter(None, written):
        for split, (start, stop) in zip(found, itertools.pairwise(cuts), strict=True):
            if part := text[max(0, start - at) : max(0, stop - at)]:
                found[split].append(part)
        at += len(text)
    return found


def held(data) -> dict[str, list[str]]:
    return {split: texts(data, split) for split in data.meta["splits"]}


def some(found: dict, *splits) -> dict:
    return {split: found[split] for split in splits}


@pytest.fixture
def small_blocks(monkeypatch):
    """Tasks of 300 bytes and parts of 400, so that a small input makes many of both."""
    monkeypatch.setattr(readers, "CHUNK_BYTES", 300)
    monkeypatch.setattr(encode, "CHUNK_BYTES", 300)
    monkeypatch.setattr(readers.split_document, "__defaults__", (400,))


# 160 documents, with an empty one before each two
WRITTEN = [f"{n} na\u00efve caf\u00e9s \U0001f388" * (1 + n % 5) if n % 3 else (None, "")[n % 2] for n in range(240)]


# ---------------------------------------------------------------------------------------------------------------------
# validation and test documents taken out of train


def test_from_100_documents_on_a_hash_decides(in_tmp):
    """Near 10% go to validation, equal texts to one side, and no document moves when others come."""
    (in_tmp / "in").mkdir()
    written = [f"document {n}" for n in range(1000)]
    for n, text in enumerate(written):
        (in_tmp / "in" / f"{n:04d}.txt").write_text(text)
        if n % 5 == 0:
            (in_tmp / "in" / f"copy{n:04d}.txt").write_text(text)
    data = from_text("in")
    train, val = texts(data, "train"), texts(data, "val")
    assert sorted(train + val) == sorted(written + written[::5])
    assert not set(train) & set(val)
    assert 60 < len(set(val)) < 140  # 100, give or take four standard deviations
    part = from_text("in/00*.txt", "in/01*.txt", name="part")
    assert set(texts(part, "val")) == set(val) & set(written[:200])
    half = from_text("in", name="half", val_fraction=0.5)
    assert 430 < len(set(texts(half, "val"))) < 570


@pytest.mark.parametrize("fraction", [None, 0.25, 0.5])
@pytest.mark.parametrize("n", [1, 2, 7, 99])
def test_fewer_are_cut_by_characters(in_tmp, n, fraction):
    written = [f"{k} na\u00efve caf\u00e9s \U0001f388" * (1 + k % 3) for k in range(n)]
    files(in_tmp, **{f"f{k:03d}": text for k, text in enumerate(written)})
    data = from_text("f*.txt", val_fraction=fraction)
    train, val = texts(data, "train"), texts(data, "val")
    whole = "".join(written)
    assert "".join(train) + "".join(val) == whole
    assert len("".join(train)) == int(len(whole) * (1 - (fraction or 0.1)))
    assert "" not in train + val
    # whole documents but for the one that the cut goes through
    assert train[:-1] == written[: len(train) - 1]
    assert val[1:] == written[n - len(val) + 1 :]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("n", [1, 99, 100])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "jsonl.gz", "parquet"])
def test_empty_documents_do_not_count_as_documents(in_tmp, kind, n):
    written = [f"{k} bottles" if k % 2 else "" for k in range(2 * n)]
    write(in_tmp / f"in/all.{kind}", written)
    data = from_text("in", val_fraction=0.3)
    assert held(data) == some((by_characters if n < 100 else by_hash)(written, 0.3), "train", "val")


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("n", "rule"), [(1, by_characters), (60, by_characters), (240, by_hash)])
def test_test_fraction_makes_a_test_split(in_tmp, n, rule):
    """The three are disjoint, and together they are all there is."""
    written = [text or f"{n} bottles" for n, text in enumerate(WRITTEN[:n])]
    write(in_tmp / "a.jsonl", written)
    data = from_text("a.jsonl", val_fraction=0.2, test_fraction=0.3)
    assert held(data) == rule(written, 0.2, 0.3)
    sizes = [len("".join(found)) / len("".join(written)) for found in held(data).values()]
    assert sizes == pytest.approx([0.5, 0.2, 0.3], abs=0.12)
    assert sum(sizes) == 1
    whole = itertools.chain(*held(data).values())
    assert sorted("".join(whole)) == sorted("".join(written))
    assert n < 100 or not set.intersection(*map(set, held(data).values()))


@pytest.mark.usefixtures("small_blocks")
def test_long_text_file_is_one_document_of_one_split(in_tmp):
    """It comes in parts, and its hash is that of the whole: as if it had been short."""
    written = [f"{n} " + "long " * (200 if n % 10 == 0 else 1) for n in range(120)]
    write(in_tmp / "in.txt", written)
    data = from_text("in", val_fraction=0.5)
    assert held(data) == some(by_hash(written, 0.5), "train", "val")
    for found in held(data).values():
        assert max(map(len, found)) > 1000, "the test wants a long one on each side"


# ---------------------------------------------------------------------------------------------------------------------
# --sample_size


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("n", [1, 7, 99, 100, 101, 133, 160, 1000])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "jsonl.gz", "parquet"])
def test_sample_is_the_first_documents_that_are_not_empty(in_tmp, kind, n):
    for part in range(3):
        write(in_tmp / f"in/{part}.{kind}", WRITTEN[80 * part : 80 * part + 80])
    data = from_text("in", sample_size=n)
    first = [text for text in WRITTEN if text][:n]
    assert held(data) == some((by_characters if n < 100 else by_hash)(first), "train", "val")
    if n >= 100:
        assert sum(entry["documents"] for entry in data.meta["splits"].values()) == min(n, 160)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("n", [1, 6, 20, 130, 200])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_sample_of_each_split_that_the_source_has(in_tmp, kind, n):
    named = {f"train-00000-of-00002.{kind}": WRITTEN[:100], f"train-00001-of-00002.{kind}": WRITTEN[100:]}
    data = hub_data({**named, f"validation.{kind}": WRITTEN[30:70]}, sample_size=n, val_fraction=None)
    there = [text for text in WRITTEN if text], [text for text in WRITTEN[30:70] if text]
    assert held(data) == {"train": there[0][:n], "val": there[1][:n]}


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("n", [5, 6])
@pytest.mark.parametrize("own", [True, False])
def test_sample_takes_nothing_of_a_long_document_behind_it(in_tmp, n, own):
    n += 0 if own else 100
    written = [f"{k} bottles" for k in range(n)] + ["long " * 1000, "last"]
    for k, text in enumerate(written):
        write(in_tmp / f"raw/hub/user/data/{k:03d}.txt", [])
        Path(f"raw/hub/user/data/{k:03d}.txt").write_text(text)
    if own:
        Path("raw/hub/user/data/val.txt").write_text("validation")
    data = hub_data({}, files=("*.txt",), sample_size=n, val_fraction=None if own else 0.2)
    assert sorted(itertools.chain(*held(data).values())) == sorted(written[:n] + ["validation"] * own)


# ---------------------------------------------------------------------------------------------------------------------
# the source's splits, and --splits


def test_splits_of_the_source_are_kept(in_tmp):
    named = {"train.jsonl": WRITTEN[:150], "dev.jsonl": WRITTEN[150:200], "test.jsonl": WRITTEN[200:]}
    data = hub_data(named, val_fraction=None)
    kept = [[text for text in part if text] for part in named.values()]
    assert held(data) == dict(zip(("train", "val", "test"), kept, strict=True))


def test_what_the_source_lacks_is_taken_out_of_train(in_tmp):
    data = hub_data({"train.jsonl": WRITTEN, "test.jsonl": ["a test"]})
    assert held(data) == {**by_hash(WRITTEN), "test": ["a test"]}
    Path("raw/hub/user/data/test.jsonl").rename("raw/hub/user/data/validation.jsonl")
    # one that the hub's own fraction would make a validation document, if there were none
    few = next(f"{n}" for n in itertools.count() if encode.choose_split(f"{n}", 0.0005, 0.2) == "val")
    data = hub_data({"train.jsonl": [*WRITTEN, few]}, test_fraction=0.2, val_fraction=None, name="other")
    assert held(data) == {**by_hash([*WRITTEN, few], 0, 0.2), "val": ["a test"]}


@pytest.mark.parametrize("n", [99, 240])
@pytest.mark.parametrize(
    "splits", [("train",), ("val",), ("test",), ("val", "train"), ("test", "val"), ("train", "val", "test")]
)
def test_splits_makes_only_those(in_tmp, splits, n):
    """Of the same bytes as if all had been made."""
    write(in_tmp / "a.jsonl", WRITTEN[:n])
    whole = from_text("a.jsonl", test_fraction=0.2)
    data = from_text("a.jsonl", name="some", test_fraction=0.2, splits=splits)
    assert list(data.meta["splits"]) == [split for split in whole.meta["splits"] if split in splits]
    for split, entry in data.meta["splits"].items():
        assert entry == whole.meta["splits"][split]
    made = {name: raw for name, raw in content(data.folder).items() if name != "meta.json"}
    assert made == {name: content(whole.folder)[name] for name in (f"{split}_000000.bin" for split in splits)}


@pytest.mark.parametrize(
    ("splits", "keys", "said"),
    [
        (("test",), {}, "text has train, val; --test_fraction makes one"),
        (("train", "test"), {}, "splits = test: text has train, val"),
    ],
)
def test_unknown_split_is_refused(in_tmp, splits, keys, said):
    files(in_tmp, a=TEXT)
    assert said in refusal("a.txt", splits=splits, **keys)
    assert not Path("data").exists()


@pytest.mark.parametrize(("name", "split"), [("validation", "val"), ("test", "test")])
def test_fraction_of_a_split_that_is_there_is_refused(in_tmp, name, split):
    with pytest.raises(UserError, match=f"hub has a {split} split of its own: leave --{split}_fraction out"):
        hub_data({"train.jsonl": WRITTEN, f"{name}.jsonl": ["x"]}, **{"val_fraction": None, f"{split}_fraction": 0.1})
    assert not Path("data").exists()


@pytest.mark.parametrize(
    ("written", "keys", "said"),
    [
        (WRITTEN, {"val_fraction": 1e-9}, ["the val split", "0 tokens", "--val_fraction"]),
        (WRITTEN, {"test_fraction": 1e-9}, ["the test split", "0 tokens", "--test_fraction"]),
        (WRITTEN, {"val_fraction": 1e-9, "splits": ("val",)}, ["the val split"]),
        (["a"], {"val_fraction": 0.01}, ["the train split"]),
        (["", None], {}, []),
        ([], {}, []),
    ],
)
def test_empty_split_is_an_error_and_leaves_nothing(in_tmp, written, keys, said):
    write(in_tmp / "a.jsonl", written)
    answer = refusal("a.jsonl", **keys)
    for part in ("too little text" if said else "text", *said):
        assert part in answer
    assert "\n" not in answer
    assert not Path("data").exists()


# ---------------------------------------------------------------------------------------------------------------------
# room


def free(monkeypatch, space: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=space))


def test_too_little_room_is_said_before_anything_is_written(in_tmp, monkeypatch):
    """Two bytes a byte of text, and half a byte with GPT-2's vocabulary."""
    write(in_tmp / "a.txt", [TEXT] * 3)
    size = 3 * len(TEXT.encode())
    free(monkeypatch, 2 * size - 1)
    answer = refusal("a")
    for part in ("GB are needed in", "GB are free", "--data_dir", "--sample_size"):
        assert part in answer
    assert "\n" not in answer
    assert not Path("data").exists()
    free(monkeypatch, 2 * size)
    assert from_text("a").meta


def test_room_for_gpt2s_tokens(in_tmp, monkeypatch):
    files(in_tmp, a=TEXT)
    free(monkeypatch, len(TEXT.encode()) // 2 - 1)
    assert "GB are needed" in refusal("a.txt", tokenizer="gpt2")
    free(monkeypatch, len(TEXT.encode()) // 2)
    assert from_text("a.txt", tokenizer="gpt2").meta


def test_sample_needs_less_room(in_tmp, monkeypatch):
    write(in_tmp / "a.jsonl", [f"{n} some text\n" * 10 for n in range(1000)])
    free(monkeypatch, 60_000)
    assert "GB are needed" in refusal("a.jsonl")
    sample = from_text("a.jsonl", sample_size=200)
    assert sum(entry["documents"] for entry in sample.meta["splits"].values()) == 200


def test_downloads_and_shards_on_one_disk_need_room_together(in_tmp, monkeypatch):
    fetched = []

    def fetch() -> Path:
        fetched.append("it")
        write(in_tmp / "raw/a.jsonl", WRITTEN)
        return in_tmp / "raw/a.jsonl"

    corpus = Corpus({"train": [RawFile("a.jsonl", 10_000, in_tmp / "raw/a.jsonl", fetch=fetch)]})
    config = PrepareConfig(source="hub", repo="user/data", tokenizer="byte", raw_dir="raw")
    free(monkeypatch, 49_999)  # 10,000 of the file; its text, perhaps twice as much, in two bytes each
    with pytest.raises(UserError, match="GB are needed"):
        plan.make_plan(config, corpus, 0.1, in_tmp / "data", 0)
    assert fetched == []
    free(monkeypatch, 50_000)
    assert [each.name for each in plan.make_plan(config, corpus, 0.1, in_tmp / "data", 0).passes] == ["train"]
    assert fetched == ["it"]
