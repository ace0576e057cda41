"""Which documents make which split, and the tasks that files are cut into."""

import functools
import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dataset_files import WRITTEN, by_characters, by_hash, hub_data, texts_by_split, write
from in_process import TEXT
from prepared import content, files, from_text, refusal, texts

from config import PrepareConfig, UserError
from flatgpt.data import readers
from flatgpt.data.encode import Job, choose_split
from flatgpt.data.readers import Chunk, Corpus, RawFile
from flatgpt.data.split import chunk_tasks, file_tasks, joined_rows, make_passes, split_by_characters


def some(found: dict, *splits) -> dict:
    return {split: found[split] for split in splits}


# ---------------------------------------------------------------------------------------------------------------------
# splits held out of train


def test_from_100_documents_on_a_hash_decides(in_tmp):
    """Near 10% go to validation, equal texts to one side, and no document moves when others come."""
    written = [f"document {n}" for n in range(1000)]
    write(in_tmp / "a.jsonl", written)
    write(in_tmp / "copies.jsonl", written[::5])
    data = from_text("a.jsonl", "copies.jsonl")
    train, val = texts(data, "train"), texts(data, "val")
    assert sorted(train + val) == sorted(written + written[::5])
    assert not set(train) & set(val)
    assert 60 < len(set(val)) < 140  # 100, give or take four standard deviations
    write(in_tmp / "part.jsonl", written[:200])
    part = from_text("part.jsonl", name="part")
    assert set(texts(part, "val")) == set(val) & set(written[:200])
    half = from_text("a.jsonl", name="half", val_fraction=0.5)
    assert 430 < len(set(texts(half, "val"))) < 570


@pytest.mark.parametrize("fraction", [None, 0.25])
@pytest.mark.parametrize("n", [1, 2, 99])
def test_fewer_documents_are_split_by_characters(in_tmp, n, fraction):
    written = [f"{k} na\u00efve caf\u00e9s \U0001f388" * (1 + k % 3) for k in range(n)]
    files(in_tmp, **{f"f{k:03d}": text for k, text in enumerate(written)})
    data = from_text("f*.txt", val_fraction=fraction)
    assert texts_by_split(data) == some(by_characters(written, fraction or 0.1), "train", "val")


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("n", [1, 99, 100])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "jsonl.gz", "parquet"])
def test_empty_documents_do_not_count_as_documents(in_tmp, kind, n):
    written = [f"{k} bottles" if k % 2 else "" for k in range(2 * n)]
    write(in_tmp / f"in/all.{kind}", written)
    data = from_text("in", val_fraction=0.3)
    assert texts_by_split(data) == some((by_characters if n < 100 else by_hash)(written, 0.3), "train", "val")


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(("n", "rule"), [(1, by_characters), (60, by_characters), (240, by_hash)])
def test_test_fraction_makes_a_test_split(in_tmp, n, rule):
    """The three are disjoint, and together they are all the documents."""
    written = [text or f"{n} bottles" for n, text in enumerate(WRITTEN[:n])]
    write(in_tmp / "a.jsonl", written)
    found = texts_by_split(from_text("a.jsonl", val_fraction=0.2, test_fraction=0.3))
    assert found == rule(written, 0.2, 0.3)
    sizes = [len("".join(part)) / len("".join(written)) for part in found.values()]
    assert sizes == pytest.approx([0.5, 0.2, 0.3], abs=0.12)
    assert sum(sizes) == 1


@pytest.mark.usefixtures("small_chunks")
def test_long_text_file_is_one_document_of_one_split(in_tmp):
    """It comes in chunks, and its hash is that of the whole: as if it had been short."""
    written = [f"{n} " + "long " * (200 if n % 10 == 0 else 1) for n in range(120)]
    write(in_tmp / "in.txt", written)
    found = texts_by_split(from_text("in", val_fraction=0.5))
    assert found == some(by_hash(written, 0.5), "train", "val")
    for part in found.values():
        assert max(map(len, part)) > 1000, "the test wants a long one on each side"


# ---------------------------------------------------------------------------------------------------------------------
# --sample_size


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("n", [1, 99, 100, 133, 160, 1000])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_sample_is_the_first_documents_that_are_not_empty(in_tmp, kind, n):
    for part in range(3):
        write(in_tmp / f"in/{part}.{kind}", WRITTEN[80 * part : 80 * part + 80])
    data = from_text("in", sample_size=n)
    first = [text for text in WRITTEN if text][:n]
    assert texts_by_split(data) == some((by_characters if n < 100 else by_hash)(first), "train", "val")


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("n", [1, 20, 130])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_sample_of_each_split_that_the_source_has(in_tmp, kind, n):
    named = {f"train-00000-of-00002.{kind}": WRITTEN[:100], f"train-00001-of-00002.{kind}": WRITTEN[100:]}
    data = hub_data({**named, f"validation.{kind}": WRITTEN[30:70]}, sample_size=n, val_fraction=None)
    documents = [text for text in WRITTEN if text], [text for text in WRITTEN[30:70] if text]
    assert texts_by_split(data) == {"train": documents[0][:n], "val": documents[1][:n]}


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("own", [True, False])
def test_sample_takes_nothing_of_a_long_document_behind_it(in_tmp, own):
    n = 5 if own else 105
    written = [f"{k} bottles" for k in range(n)] + ["long " * 1000, "last"]
    (in_tmp / "raw/hub/user/data").mkdir(parents=True)
    for k, text in enumerate(written):
        Path(f"raw/hub/user/data/{k:03d}.txt").write_text(text)
    if own:
        Path("raw/hub/user/data/val.txt").write_text("validation")
    data = hub_data({}, files=("*.txt",), sample_size=n, val_fraction=None if own else 0.2)
    assert sorted(itertools.chain(*texts_by_split(data).values())) == sorted(written[:n] + ["validation"] * own)


# ---------------------------------------------------------------------------------------------------------------------
# the source's splits, and --splits


def test_splits_of_the_source_are_kept(in_tmp):
    named = {"train.jsonl": WRITTEN[:150], "dev.jsonl": WRITTEN[150:200], "test.jsonl": WRITTEN[200:]}
    data = hub_data(named, val_fraction=None)
    kept = [[text for text in part if text] for part in named.values()]
    assert texts_by_split(data) == dict(zip(("train", "val", "test"), kept, strict=True))


def test_splits_that_the_source_lacks_are_held_out_of_train(in_tmp):
    data = hub_data({"train.jsonl": WRITTEN, "test.jsonl": ["a test"]})
    assert texts_by_split(data) == {**by_hash(WRITTEN), "test": ["a test"]}
    Path("raw/hub/user/data/test.jsonl").rename("raw/hub/user/data/validation.jsonl")
    # one that the hub's own fraction would make a validation document, if there were none
    few = next(f"{n}" for n in itertools.count() if choose_split([f"{n}"], 0.0005, 0.2) == "val")
    data = hub_data({"train.jsonl": [*WRITTEN, few]}, test_fraction=0.2, val_fraction=None, name="other")
    assert texts_by_split(data) == {**by_hash([*WRITTEN, few], 0, 0.2), "val": ["a test"]}


@pytest.mark.parametrize("n", [99, 240])
@pytest.mark.parametrize("splits", [("train",), ("val",), ("test", "val"), ("train", "val", "test")])
def test_splits_makes_only_those_of_the_same_bytes(in_tmp, splits, n):
    write(in_tmp / "a.jsonl", WRITTEN[:n])
    whole = from_text("a.jsonl", test_fraction=0.2)
    data = from_text("a.jsonl", name="some", test_fraction=0.2, splits=splits)
    assert data.meta["splits"] == {s: entry for s, entry in whole.meta["splits"].items() if s in splits}
    assert list(data.meta["splits"]) == [split for split in whole.meta["splits"] if split in splits]
    made = {name: raw for name, raw in content(data.folder).items() if name != "meta.json"}
    assert made == {name: content(whole.folder)[name] for name in (f"{split}_000000.bin" for split in splits)}


@pytest.mark.parametrize(
    ("splits", "message"),
    [(("test",), "text has train, val; --test_fraction makes one"), (("train", "test"), "splits = test: text has")],
)
def test_unknown_split_is_refused(in_tmp, splits, message):
    files(in_tmp, a=TEXT)
    assert message in refusal("a.txt", splits=splits)
    assert not Path("data").exists()


@pytest.mark.parametrize(("name", "split"), [("validation", "val"), ("test", "test")])
def test_fraction_of_a_split_that_the_source_has_is_refused(in_tmp, name, split):
    with pytest.raises(UserError, match=f"hub has a {split} split of its own: leave --{split}_fraction out"):
        hub_data({"train.jsonl": WRITTEN, f"{name}.jsonl": ["x"]}, **{"val_fraction": None, f"{split}_fraction": 0.1})
    assert not Path("data").exists()


@pytest.mark.parametrize(
    ("written", "keys", "named"),
    [
        (WRITTEN, {"val_fraction": 1e-9}, ["the val split", "0 tokens", "--val_fraction"]),
        (WRITTEN, {"test_fraction": 1e-9, "splits": ("test",)}, ["the test split", "0 tokens", "--test_fraction"]),
        (["a"], {"val_fraction": 0.01}, ["the train split"]),
        (["", None], {}, ["train"]),
        ([], {}, ["train"]),
    ],
)
def test_empty_split_is_an_error_and_leaves_nothing(in_tmp, written, keys, named):
    write(in_tmp / "a.jsonl", written)
    answer = refusal("a.jsonl", **keys)
    for part in ("too little text", *named):
        assert part in answer
    assert "\n" not in answer
    assert not Path("data").exists()


@pytest.mark.parametrize(("tokenizer", "share"), [("byte", 2), ("gpt2", 0.5)])
def test_too_little_space_is_an_error_before_anything_is_written(in_tmp, monkeypatch, tokenizer, share):
    """Two bytes a byte of text, and half a byte with GPT-2's vocabulary; a sample needs less."""
    write(in_tmp / "a.jsonl", [f"{n} some text\n" * 10 for n in range(1000)])
    free = int(share * Path("a.jsonl").stat().st_size) - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    answer = refusal("a.jsonl", tokenizer=tokenizer)
    for part in ("GB are needed in", "GB are free", "--data_dir", "--sample_size"):
        assert part in answer
    assert not Path("data").exists()
    assert from_text("a.jsonl", tokenizer=tokenizer, sample_size=200).meta
    free += 1
    assert from_text("a.jsonl", tokenizer=tokenizer, name="all").meta


def test_downloads_and_shards_on_one_disk_need_space_together(in_tmp, monkeypatch):
    path, fetched = in_tmp / "raw/a.jsonl", []

    def fetch() -> Path:
        fetched.append(path)
        write(path, WRITTEN)
        return path

    corpus = Corpus({"train": [RawFile("a.jsonl", 10_000, path, fetch=fetch)]})
    config = PrepareConfig(source="hub", repo="user/data", tokenizer="byte", raw_dir="raw")
    # 10,000 of the file; its text, perhaps twice as much, in two bytes each
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=49_999))
    with pytest.raises(UserError, match="GB are needed"):
        make_passes(config, corpus, 0.1, in_tmp / "data", 0)
    assert fetched == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=50_000))
    assert [each.name for each in make_passes(config, corpus, 0.1, in_tmp / "data", 0)] == ["train"]
    assert fetched == [path]


# ---------------------------------------------------------------------------------------------------------------------
# tasks

JOB = Job("byte", "tiktoken", True, "train", ("train",))


def raw_files(*paths: Path) -> list[RawFile]:
    return [RawFile(path.name, path.stat().st_size, path) for path in paths]


def tasks_of(*paths: Path) -> list:
    return list(file_tasks(raw_files(*paths), "text", JOB, Path()))


def test_small_files_and_row_groups_share_tasks(tmp_path, monkeypatch):
    """A folder of a million files is not a million tasks."""
    monkeypatch.setattr(readers, "CHUNK_BYTES", 1000)
    paths = [tmp_path / f"{n:03d}.txt" for n in range(100)]
    for path in paths:
        path.write_text("x" * 30)
    assert [len(task.chunks) for task in tasks_of(*paths)] == [34, 34, 32]
    rows = pa.table({"text": ["y" * 30] * 300})
    pq.write_table(rows, tmp_path / "a.parquet", row_group_size=1, use_dictionary=False)
    todo = tasks_of(tmp_path / "a.parquet")
    assert all(1000 <= task.size < 1100 for task in todo[:-1])
    assert [text for task in todo for text in task.read()] == ["y" * 30] * 300
    assert sum(task.size for task in todo) == readers.text_bytes(tmp_path / "a.parquet", "text")


def test_row_group_larger_than_a_workers_memory_is_read_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "CHUNK_BYTES", 300)
    rows = [f"{n} " + "word " * (400 if n in (4, 7, 10) else 3) for n in range(11)]
    pq.write_table(pa.table({"text": rows}), tmp_path / "a.parquet", row_group_size=1, use_dictionary=False)
    todo = tasks_of(tmp_path / "a.parquet")
    assert [len(task.chunks) for task in todo] == [0, 1, 0, 1, 0, 1]
    read = [list(task.read()) if task.read else [chunk.text for chunk in task.chunks] for task in todo]
    assert list(itertools.chain(*read)) == rows


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_sizes_of_lines_are_those_of_the_file(tmp_path, monkeypatch, name):
    """Those of a compressed file are guesses, which never sum to more than its size."""
    monkeypatch.setattr(readers, "CHUNK_BYTES", 300)
    write(tmp_path / name, [f"{n} it's a naïve test" * (1 + n % 9) for n in range(100)])
    sizes, total = [task.size for task in tasks_of(tmp_path / name)], (tmp_path / name).stat().st_size
    assert len(sizes) > 10
    assert min(sizes) >= 0
    assert sum(sizes) == total if name == "a.jsonl" else 0 < sum(sizes) <= total


def test_wrong_line_is_named_by_the_task_that_has_it(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "CHUNK_BYTES", 200)
    lines = [json.dumps({"text": f"line {n}"}) if n != 77 else "{}" for n in range(1, 101)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"a\.jsonl line 77: no key 'text'"):
        [list(task.read()) for task in tasks_of(tmp_path / "a.jsonl")]


def test_files_are_downloaded_when_their_turn_comes(tmp_path):
    fetched = []

    def fetch(path: Path) -> Path:
        fetched.append(path.name)
        write(path, ["text"])
        return path

    paths = [tmp_path / f"{n}.jsonl" for n in range(5)]
    raw = [RawFile(path.name, 1, path, fetch=functools.partial(fetch, path)) for path in paths]
    for n, _ in enumerate(file_tasks(raw, "text", JOB, Path())):
        assert fetched == [path.name for path in paths[: n + 1]]


@pytest.mark.parametrize("borders", [(1, 1), (6, 30), (59, 61), (0, 110), (110, 110)])
def test_chunks_of_documents_are_split_by_characters(borders):
    """Each split takes its characters in order; a document at a border is one in both splits."""
    documents, split = ["it's a naïve  test,\n\nisn't it? " * 2, "one more of 2024 words\n" * 3], {}
    whole = "".join(documents)
    first, second = borders
    chars = {"train": first, "val": second - first, "test": len(whole) - second}
    chunks = [chunk for text in documents for chunk in readers.split_document([text], 12)]
    assert len(chunks) > 8
    for chunk in split_by_characters(chunks, chars):
        parts = split.setdefault(chunk.split, [""])
        parts[-1] += chunk.text
        parts += [""] * chunk.documents
    starts = {"train": (0, first), "val": (first, second), "test": (second, len(whole))}
    n = len(documents[0])  # what lies before it is of the first document, what lies behind it of the second
    expected = {s: [whole[a : min(b, n)], whole[max(a, n) : b]] for s, (a, b) in starts.items()}
    assert {s: parts[:-1] for s, parts in split.items()} == {
        s: [part for part in parts if part] for s, parts in expected.items() if any(parts)
    }


@pytest.mark.parametrize("block", [1, 50, 4 << 20])
@pytest.mark.parametrize("limit", [None, 1, 4, 99, 1000])
def test_joined_rows_are_one_text(tmp_path, monkeypatch, block, limit):
    """As it is, also where a row ends within a word; its documents are the rows, empty ones too."""
    monkeypatch.setattr(readers, "CHUNK_BYTES", block)
    monkeypatch.setattr(readers.split_document, "__defaults__", (120,))
    rows = [None, "", " = Naïve café = \n", " It's of 2024 ,", " isn't it ?  \n", "", "\n"] * 40 + ["the end", "", None]
    write(tmp_path / "a.parquet", rows[:100])
    write(tmp_path / "b.parquet", rows[100:])
    chunks = list(joined_rows(raw_files(tmp_path / "a.parquet", tmp_path / "b.parquet"), "text", limit))
    kept = [row or "" for row in rows[:limit]]
    assert "".join(chunk.text for chunk in chunks) == "".join(kept)
    assert sum(chunk.documents for chunk in chunks) == (len(kept) if "".join(kept) else 0)
    assert all(len(chunk.text) <= 120 for chunk in chunks)


@pytest.mark.usefixtures("gpt2_vocabulary")
def test_wikitexts_test_split_has_the_known_counts(real_text, tmp_path):
    from flatgpt.data.encode import encode_task

    job = Job("gpt2", "tiktoken", False, "test", ("test",))
    file = raw_files(real_text / "wikitext103" / "test-00000-of-00001.parquet")
    found = [encode_task(job, task)["test"] for task in chunk_tasks(joined_rows(file, "text", None), 0)]
    assert [sum(part.ids.size for part in found), sum(part.bytes for part in found)] == [283_287, 1_287_656]
    assert sum(part.documents for part in found) == 4358


def test_no_chunk_is_no_task():
    """A file without a character: prepare says so, when it counts the tokens."""
    assert list(chunk_tasks(split_by_characters(iter([]), {"train": 0, "val": 0, "test": 0}))) == []
    assert [len(task.chunks) for task in chunk_tasks(map(Chunk, ["a" * 9] * 3), 10)] == [2, 1]
