"""Files to tasks to ids by split: whatever the blocks, what a plain loop over the documents gives."""

import functools
import gzip
import hashlib
import json
import os
import pickle
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config import UserError
from flatgpt.data import encode, readers, tokenizer
from flatgpt.data.encode import Job, Span, Task

quick = settings(max_examples=60)
SPLITS = ("train", "val", "test")
JOB = Job("byte", True, "text", 0.25, 0.15, SPLITS)


@pytest.fixture(params=["byte", "gpt2"])
def name(request):
    return request.param


def job_of(name: str, **changes) -> Job:
    return Job(**{**vars(JOB), "tokenizer": name, **changes})


def small(patch: pytest.MonkeyPatch, block: int, run: int) -> None:
    """Blocks and runs of this size, so that a short text is a long one."""
    patch.setattr(readers, "CHUNK_BYTES", block)
    patch.setattr(encode, "CHUNK_BYTES", block)
    patch.setattr(encode, "MAX_ENCODE_CHARS", run)
    patch.setattr(tokenizer, "MAX_ENCODE_CHARS", run)
    patch.setattr(readers.split_document, "__defaults__", (4 * run,))


def work(job: Job, todo: Iterable[Task], limit: int | None = None) -> tuple[dict, int, int]:
    """What all tasks give, in order, as workers get them: (ids, documents, bytes, words) by split; taken; cuts."""
    found = {split: ([], 0, 0, 0) for split in job.splits}
    taken = cuts = 0
    for task in todo:
        task = pickle.loads(pickle.dumps(task))
        parts, n, more = encode.encode(job, task, None if limit is None else limit - taken)
        assert n <= task.documents
        for split, part in parts.items():
            ids, *counts = found[split]
            added = (part.documents, part.bytes, part.words)
            found[split] = (ids + part.ids.tolist(), *(a + b for a, b in zip(counts, added, strict=True)))
        taken, cuts = taken + n, cuts + more
    return found, taken, cuts


def plain(job: Job, texts: Iterable[str], split: str | None = None) -> dict:
    """The same in a plain loop."""
    encoding = tokenizer.load(job.tokenizer)
    found = {split: ([], 0, 0, 0) for split in job.splits}
    for text in texts:
        own = split or encode.choose_split(text, job.val_fraction, job.test_fraction)
        if own in found:
            ids, n, size, words = found[own]
            ids = ids + encoding.encode_ordinary(text) + [encoding.eot_token] * job.end_of_text
            found[own] = (ids, n + 1, size + len(text.encode()), words + len(text.split()))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# whole documents of mixed files

SENTENCE = "the naïve café's 東京 isn't\r\nfar: 🎈 'tis <|endoftext|>\n\n  {}   of 2024\t\x1c .\n"


def text_of(n: int, times: int = 1) -> str:
    return " " * (n % 2) + "".join(SENTENCE.format(100 * n + k) for k in range(times)) + " " * (n % 3)


def mixed(folder: Path) -> tuple[list[Path], list[str]]:
    """Files of every kind, and their documents in order: short ones, empty ones, ones of many parts."""
    written = []

    def text(name: str, *texts: str) -> Path:
        written.extend(t for t in texts if t)
        (folder / name).write_bytes(texts[0].encode())
        return folder / name

    def lines(name: str, pack, *texts: str | None) -> Path:
        written.extend(t for t in texts if t)
        (folder / name).write_bytes(pack("\n".join(json.dumps({"text": t}) for t in texts).encode()))
        return folder / name

    def parquet(name: str, rows_a_group: int, *texts: str | None) -> Path:
        written.extend(t for t in texts if t)
        table = pa.table({"id": range(len(texts)), "text": pa.array(texts, pa.string())})
        pq.write_table(table, folder / name, row_group_size=rows_a_group)
        return folder / name

    zstd = functools.partial(pa.Codec("zstd").compress, asbytes=True)
    some = [text_of(n) for n in range(100)]
    files = [
        *(text(f"a{n}.txt", text_of(200 + n)) for n in range(5)),
        text("a9.txt", "tiny"),
        text("empty.txt", ""),
        *(text(f"b{n}.md", text_of(300 + n, 10 + n)) for n in range(12)),
        lines("c.jsonl", bytes, *some[:20], None, "", "x"),
        text("d.txt", "no newline"),
        lines("e.jsonl.gz", gzip.compress, *some[20:40], ""),
        lines("f.jsonl.zst", zstd, *some[40:50]),
        parquet("g.parquet", 3, *some[50:70], None, "", None, None, "a"),
        parquet("h.parquet", 1000, *some[70:85], None, *(text_of(400 + n, 9) for n in range(8)), *some[85:]),
        parquet("i.parquet", 1000),
        text("j.py", text_of(500, 30)),
    ]
    return files, written


def named(files: list[Path]) -> list[tuple[str, Path]]:
    return [(path.name, path) for path in files]


@pytest.mark.parametrize("block", [1, 60, 300, 2000, 4 << 20])
def test_whole_documents_are_those_of_a_plain_loop(tmp_path, monkeypatch, name, block):
    """Ids and counts of every split, for any size of block; a hash decides, also of a document in parts."""
    small(monkeypatch, block, run=40)
    files, written = mixed(tmp_path)
    job = job_of(name)
    todo = list(encode.whole_documents(named(files), job, None))
    assert work(job, todo) == (plain(job, written), len(written), 0)
    texts = [task for task in todo if task.spans]
    parts = [span for task in texts for span in task.spans if not (span.first and span.last)]
    assert len({span.split for span in parts}) == 3
    assert {len(span.text) <= 4 * 40 for span in parts} == {True}
    for task in todo:
        assert task.split is None
        if task.spans:
            assert task.documents == sum(span.last for span in task.spans)
            assert task.size == sum(len(span.text.encode()) for span in task.spans)
            assert sum(len(span.text) for span in task.spans[:-1]) < block
    if block <= 300:
        assert len({task.path for task in todo}) > 5
        assert len([task for task in todo if task.path.endswith("h.parquet")]) > 3  # one row group


@pytest.mark.parametrize("split", SPLITS)
def test_split_that_is_given_is_that_of_all(tmp_path, monkeypatch, split):
    small(monkeypatch, 300, run=40)
    files, written = mixed(tmp_path)
    found, taken, _ = work(JOB, encode.whole_documents(named(files), JOB, split))
    assert (found, taken) == (plain(JOB, written, split), len(written))
    assert found[split][1] == len(written)


@pytest.mark.parametrize("splits", [("val",), ("train", "test"), ("test", "train", "val"), ()])
@pytest.mark.parametrize("block", [300, 4 << 20])
def test_splits_that_are_not_wanted_are_not_there(tmp_path, monkeypatch, splits, block):
    small(monkeypatch, block, run=40)
    files, written = mixed(tmp_path)
    job = job_of("byte", splits=splits)
    found, taken, _ = work(job, encode.whole_documents(named(files), job, None))
    assert list(found) == list(splits)
    assert (found, taken) == (plain(job, written), len(written))


@pytest.mark.parametrize("splits", [SPLITS, ("val",)])
@pytest.mark.parametrize("block", [60, 300, 4 << 20])
def test_limit_is_of_documents(tmp_path, monkeypatch, block, splits):
    """The first k, wherever a task ends; empty ones are none, and those of other splits are."""
    small(monkeypatch, block, run=40)
    files, written = mixed(tmp_path)
    job = job_of("byte", splits=splits)
    todo = list(encode.whole_documents(named(files), job, None))
    for limit in (0, 1, 4, 5, 6, 7, 17, 30, 38, 39, 60, 90, len(written), len(written) + 1):
        assert work(job, todo, limit)[:2] == (plain(job, written[:limit]), min(limit, len(written)))


def test_files_are_asked_for_one_by_one(tmp_path, monkeypatch):
    """What is not needed for a sample is not downloaded."""
    small(monkeypatch, 300, run=40)
    files, asked = mixed(tmp_path)[0], []

    def ask():
        for path in files:
            asked.append(path.name)
            yield path.name, path

    for task in encode.whole_documents(ask(), JOB, None):
        assert Path(task.path).name in asked[-2:]
    assert len(asked) == len(files)


def test_texts_of_a_task_are_few_or_large(tmp_path, monkeypatch):
    """Small files go together, so that a folder of a million is not a million tasks; row groups too."""
    small(monkeypatch, 1000, run=1000)
    for n in range(100):
        (tmp_path / f"{n:03d}.txt").write_text("x" * 30)
    files = [(f"{n:03d}", tmp_path / f"{n:03d}.txt") for n in range(100)]
    assert [task.documents for task in encode.whole_documents(files, JOB, None)] == [34, 34, 32]
    rows = pa.table({"text": ["y" * 30] * 300})
    pq.write_table(rows, tmp_path / "a.parquet", row_group_size=1, use_dictionary=False)
    todo = list(encode.whole_documents([("a", tmp_path / "a.parquet")], JOB, None))
    assert sum(task.documents for task in todo) == 300
    assert all(1000 <= task.size < 1100 for task in todo[:-1])
    assert [task.start for task in todo] == [0, *(task.stop for task in todo[:-1])]
    assert sum(task.size for task in todo) == readers.text_bytes(tmp_path / "a.parquet", "text")


def test_large_row_group_between_small_ones(tmp_path, monkeypatch):
    small(monkeypatch, 300, run=100)
    rows = [f"{n} " + "word " * (400 if n in (4, 7) else 3) for n in range(10)]
    pq.write_table(pa.table({"text": rows}), tmp_path / "a.parquet", row_group_size=1, use_dictionary=False)
    todo = list(encode.whole_documents([("a", tmp_path / "a.parquet")], JOB, "train"))
    assert [task.documents for task in todo if task.spans] == [1, 1]
    others = [task for task in todo if not task.spans]
    assert [(task.start, task.stop, task.documents) for task in others] == [(0, 4, 4), (5, 7, 2), (8, 10, 2)]
    sizes = [size for _, size in readers.row_groups(tmp_path / "a.parquet", "text")]
    assert [task.size for task in others] == [sum(sizes[task.start : task.stop]) for task in others]
    assert {task.split for task in todo} == {"train"}
    assert work(JOB, todo)[0] == plain(JOB, rows, "train")


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_sizes_of_lines_are_those_of_the_file(tmp_path, monkeypatch, suffix):
    """A packed file's are guesses, which never sum to more than its size."""
    small(monkeypatch, 300, run=100)
    raw = b"".join(json.dumps({"text": text_of(n)}).encode() + b"\n" for n in range(50))
    path = tmp_path / f"a{suffix}"
    path.write_bytes(raw if suffix == ".jsonl" else gzip.compress(raw))
    sizes = [task.size for task in encode.whole_documents([("a", path)], JOB, None)]
    assert min(sizes) >= 0
    assert len(sizes) > 10
    total = sum(sizes)
    assert total == path.stat().st_size if suffix == ".jsonl" else 0 < total <= path.stat().st_size


@pytest.mark.parametrize("wrong", [1, 2, 40, 100])
def test_wrong_line_is_named_by_the_task_that_has_it(tmp_path, monkeypatch, wrong):
    small(monkeypatch, 200, run=100)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"text": "line {n}"}}\n' if n != wrong else "{}\n" for n in range(1, 101)))
    with pytest.raises(UserError, match=rf"a\.jsonl line {wrong}: no key 'text'"):
        work(JOB, encode.whole_documents([("a", path)], JOB, None))


@pytest.mark.parametrize("length", [3999, 4000, 4001, 4500, 8001, 12_345])
def test_cuts_of_a_long_word_are_counted(tmp_path, monkeypatch, length):
    """In parts and in a part's runs: as many as the encoder would need for the whole, and the word is still one."""
    small(monkeypatch, 500, run=1000)
    text = "a word " + "x" * length + " and the end\n"
    (tmp_path / "a.txt").write_text(text)
    (ids, n, size, words), taken, cuts = work_on(tmp_path / "a.txt", "gpt2")
    assert (n, taken, size, words) == (1, 1, len(text), 6)
    assert cuts == length // 1000  # the blank before it is of the run
    encoding = tokenizer.load("gpt2")
    assert ids.pop() == encoding.eot_token
    assert encoding.decode(ids) == text


def work_on(path: Path, name: str):
    found, taken, cuts = work(job_of(name), encode.whole_documents([(path.name, path)], JOB, "train"))
    return found["train"], taken, cuts


@pytest.mark.parametrize(
    ("before", "between", "after"),
    [("", "word\t", ""), ("", "line\r\n", ""), ("a", " ", "b"), ("a", "\n \t", "b")],
)
def test_words_where_a_run_is_cut_after_white_space(tmp_path, monkeypatch, before, between, after):
    small(monkeypatch, 500, run=100)
    for times in range(1, 500):
        text = before + between * times + after
        (tmp_path / "a.txt").write_bytes(text.encode())
        assert work_on(tmp_path / "a.txt", "byte")[0][3] == len(text.split())


def test_bytes_can_be_cut_anywhere(tmp_path, monkeypatch):
    small(monkeypatch, 500, run=100)
    (tmp_path / "a.txt").write_text("x" * 1000)
    (ids, *_), _, cuts = work_on(tmp_path / "a.txt", "byte")
    assert ids == [120] * 1000 + [256]
    assert cuts == 0


def test_vocabulary_of_the_job_is_a_workers_own(monkeypatch):
    """A machine of a cluster knows its own cache, or is told of ours."""
    task = Task("", "train", 1, 1, spans=(Span("a"),))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "mine")
    encode.encode(job_of("byte", vocabulary="ours"), task)
    assert os.environ["TIKTOKEN_CACHE_DIR"] == "mine"
    del os.environ["TIKTOKEN_CACHE_DIR"]
    encode.encode(job_of("byte", vocabulary=None), task)
    assert "TIKTOKEN_CACHE_DIR" not in os.environ
    encode.encode(job_of("byte", vocabulary="ours"), task)
    assert os.environ["TIKTOKEN_CACHE_DIR"] == "ours"


# ---------------------------------------------------------------------------------------------------------------------
# few documents, cut by characters

WORDS = st.lists(st.sampled_from(["a", "ab", "naïve", "🎈", "it's", "x" * 25]), max_size=12)


@settings(quick, max_examples=100)
@given(st.lists(st.tuples(WORDS, st.sampled_from(" \n")), max_size=6), st.data())
def test_cut_by_characters_is_a_cut_of_the_plain_text(texts, data):
    """Each split takes its characters in order; a document that is cut in two is one in both."""
    written = [text for words, between in texts if (text := between.join(words))]
    total = sum(map(len, written))
    first, second = sorted((data.draw(st.integers(0, total)), data.draw(st.integers(0, total))))
    rooms = {"train": first, "val": second - first, "test": total - second}
    expected, left = {split: [] for split in SPLITS}, dict(rooms)
    for text in written:
        for split in SPLITS:
            head, text = text[: left[split]], text[left[split] :]
            left[split] -= len(head)
            expected[split] += [head] if head else []
    length = data.draw(st.integers(2, 40))
    parts = [part for text in written for part in readers.split_document([text], length)]
    if not total:
        return
    with pytest.MonkeyPatch.context() as patch:
        small(patch, 1, run=10)
        found, _, _ = work(JOB, encode.cut_by_characters(iter(parts), rooms))
    for split in SPLITS:
        assert found[split] == plain(JOB, expected[split], split)[split]
        assert sum(len(text) for text in expected[split]) == rooms[split]


def test_nothing_to_cut_is_no_task():
    """A file without a character: prepare says so, when it counts the tokens."""
    assert list(encode.cut_by_characters(iter([]), {"train": 0, "val": 0, "test": 0})) == []


@pytest.mark.parametrize("at", [1, 6, 7, 8, 15, 30, 59, 60, 61, 110])
def test_cut_by_characters_in_gpt2s_ids(monkeypatch, at):
    """Parts of a document are encoded as the whole of what its split has of it."""
    small(monkeypatch, 1, run=12)
    written = ["it's a naïve  test,\n\nisn't it? " * 2, "one more of 2024 words\n" * 3]
    whole = "".join(written)
    parts = [part for text in written for part in readers.split_document([text])]
    assert len(parts) >= 3
    job = job_of("gpt2", splits=("train", "val"))
    found, _, cuts = work(job, encode.cut_by_characters(iter(parts), {"train": at, "val": len(whole) - at, "test": 0}))
    n = len(written[0])
    train, val = [whole[: min(at, n)], whole[n:at]], [whole[at:n], whole[max(at, n) :]]
    expected = {"train": [text for text in train if text], "val": [text for text in val if text]}
    assert found == {split: plain(job, texts, split)[split] for split, texts in expected.items()}
    assert cuts == 0


def test_forced_cuts_of_few_documents_are_counted(monkeypatch):
    """Where the room ends is none: that is a document's end."""
    small(monkeypatch, 1, run=100)
    parts = list(readers.split_document(["x" * 1000]))
    assert [len(part.text) for part in parts] == [400, 400, 200]
    found, _, cuts = work(job_of("gpt2"), encode.cut_by_characters(iter(parts), {"train": 500, "val": 500, "test": 0}))
    assert [found[split][1:] for split in SPLITS] == [(1, 500, 1), (1, 500, 1), (0, 0, 0)]
    assert cuts == 4 + 4


# ---------------------------------------------------------------------------------------------------------------------
# rows joined to one text


def wiki(folder: Path) -> tuple[list[Path], list[str]]:
    """Lines of a text as rows of two files; an empty line is an empty row, or a null."""
    rows = [None, "", " = Naïve café = \n", " It's of 2024 ,", " isn't it ?  \n", "", "", "\n"]
    rows += [text for n in range(60) for text in (f" = {n} = \n", "", f" row {n} <|endoftext|>", "s\r\n", None, " \n")]
    rows += ["the end", "", None]
    for name, part in (("a", rows[:100]), ("b", rows[100:])):
        pq.write_table(pa.table({"text": part}), folder / f"{name}.parquet", row_group_size=30)
    return [folder / "a.parquet", folder / "b.parquet"], [row or "" for row in rows]


@pytest.mark.parametrize("block", [1, 50, 700, 4 << 20])
@pytest.mark.parametrize("limit", [None, 1, 2, 3, 4, 5, 99, 100, 101, 250, 1000])
def test_joined_rows_are_one_text(tmp_path, monkeypatch, name, block, limit):
    """As it is, also where a row ends within a word; `documents` is the number of rows, empty ones too."""
    small(monkeypatch, block, run=30)
    files, rows = wiki(tmp_path)
    whole, words = "".join(rows[:limit]), "".join(rows[:limit]).split()
    job = job_of(name, splits=("test",), end_of_text=False)
    todo = list(encode.joined(named(files), job, "test", limit))
    ids = tokenizer.load(name).encode_ordinary(whole)
    n = len(rows[:limit]) if whole else 0
    assert work(job, todo) == ({"test": (ids, n, len(whole.encode()), len(words))}, n, 0)
    assert {task.split or span.split for task in todo for span in task.spans} <= {"test"}
    assert len(todo) > 9 or len(whole) < 1500
    assert all(len(span.text) <= 120 for task in todo for span in task.spans)


def test_joined_rows_that_make_one_long_word(tmp_path, monkeypatch):
    small(monkeypatch, 100, run=30)
    pq.write_table(pa.table({"text": ["x" * 50] * 11}), tmp_path / "a.parquet")
    todo = list(encode.joined([("a", tmp_path / "a.parquet")], JOB, "test", None))
    assert len(todo) == 5
    job = job_of("byte", end_of_text=False)
    assert work(job, todo)[0]["test"] == ([120] * 550, 11, 550, 1)


@pytest.mark.usefixtures("gpt2_vocabulary")
def test_wikitexts_test_split_has_the_known_counts(real_text):
    """241,211 words of 245,569: with an end after each of its 4,358 lines they are the number in the literature."""
    path = real_text / "wikitext103" / "test-00000-of-00001.parquet"
    job = job_of("gpt2", splits=("test",), end_of_text=False)
    found, rows, cuts = work(job, encode.joined([("test", path)], job, "test", None))
    ids, n, size, words = found["test"]
    assert (len(ids), words, size, n, rows, cuts) == (283_287, 241_211, 1_287_656, 4358, 4358, 0)
    whole = "".join(readers.rows(path, "text", empty=True))
    assert ids == tokenizer.load("gpt2").encode_ordinary(whole)


# ---------------------------------------------------------------------------------------------------------------------
# the hash, and words


def test_choice_never_changes():
    """Pinned: a dataset that is made again has the same splits."""
    chosen = [encode.choose_split(f"document {n}", 0.2, 0.1) for n in range(60)]
    letters = {"train": "r", "val": "a", "test": "e"}
    assert "".join(letters[split] for split in chosen) == "rrerrrrerararrraaerearrrrrrrerrrrrraarearrrrrrrrrrrrararrrar"
    odd = [encode.choose_split(text, 0.3, 0.3) for text in ("", "\n", "naïve 🎈", "東京", "a", "b")]
    assert odd == ["test", "val", "val", "val", "val", "train"]


@quick
@given(st.text(), st.floats(0, 0.5), st.floats(0, 0.5))
def test_choice_is_a_keyed_hash_of_the_text(text, val, test):
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=b"flatgpt split").digest()
    place = int(digest.hex(), 16) / 2**64
    chosen = encode.choose_split(text, val, test)
    assert chosen == ("test" if place < test else "val" if place < test + val else "train")


@pytest.mark.parametrize(("val", "test"), [(0.1, 0), (0.1, 0.05), (0.5, 0.25), (0.0005, 0)])
def test_shares_are_near_the_fractions(val, test):
    """Within four standard deviations; and a split that is larger has all that it had."""
    texts = [f"a text, {n}" for n in range(20_000)]
    chosen = [encode.choose_split(text, val, test) for text in texts]
    for split, share in (("val", val), ("test", test)):
        assert abs(chosen.count(split) - 20_000 * share) <= 4 * (20_000 * share * (1 - share)) ** 0.5
    more = [encode.choose_split(text, 1.5 * val, test) for text in texts]
    assert all(now == before for now, before in zip(more, chosen, strict=True) if before != "train")


SPACES = [chr(n) for n in range(0x110000) if chr(n).isspace()]


@settings(quick, max_examples=200)
@given(
    st.lists(
        st.sampled_from(SPACES) | st.sampled_from(["a", "é", "東", "🎈", "\u200b", "\u2060"]) | st.text(max_size=2)
    )
)
def test_words_are_those_of_split(parts):
    text = "".join(parts)
    assert encode.count_words(text.encode()) == len(text.split())


def test_every_character_is_white_space_or_none_as_in_python():
    for start in range(0, 0x110000, 64):
        characters = [chr(n) for n in range(start, start + 64) if not 0xD800 <= n < 0xE000]
        text = "\n".join(f"a{c}b" for c in characters)
        assert encode.count_words(text.encode()) == len(text.split()), hex(start)
