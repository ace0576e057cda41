"""The sources: their files, which documents make which split, samples, and what a worker does with a task."""

import functools
import hashlib
import itertools
import os
import pickle
from pathlib import Path

import pytest
from dataset_files import WRITTEN, by_characters, by_hash, hub_data, texts_by_split, write
from in_process import TEXT
from prepared import content, files, from_text, prepare, refusal, texts

from config import SOURCE_SETTINGS, PrepareConfig, UserError
from flatgpt.data import prepare as preparation
from flatgpt.data import readers, sources, tokenizer
from flatgpt.data.chunks import Chunk, Task
from flatgpt.data.inputs import expand_inputs
from flatgpt.data.readers import Corpus, RawFile
from flatgpt.data.sources import SOURCES, encode_task, make_plan
from flatgpt.data.splits import choose_split

# ---------------------------------------------------------------------------------------------------------------------
# pydoc and shakespeare


def test_pydoc(in_tmp, monkeypatch):
    """Python's topics in alphabetical order without duplicates, whatever their order, split at 90%."""
    from pydoc_data.topics import topics

    data = prepare("pydoc")
    assert (data.folder, data.meta["tokenizer"]) == (Path("data/pydoc"), "byte")
    (train,), (val,) = texts(data, "train"), texts(data, "val")
    unique = list(dict.fromkeys(topics[name].strip("\n") for name in sorted(topics)))
    assert train + val == "\n\n".join(unique) + "\n"
    assert len(train) == len(train + val) * 9 // 10
    monkeypatch.setattr("pydoc_data.topics.topics", dict(reversed(topics.items())))
    assert content(prepare("pydoc", data_dir="elsewhere").folder) == content(data.folder)


@pytest.mark.usefixtures("gpt2_vocabulary")
def test_published_sizes_of_shakespeare_and_wikitext(in_tmp, real_text):
    """nanoGPT's README: 301,966 and 36,059 tokens of GPT-2; and its character-level cut at 1,003,854 characters."""
    data = prepare("shakespeare", raw_dir=str(real_text))
    counts = {split: (e["tokens"], e["bytes"], e["documents"]) for split, e in data.meta["splits"].items()}
    assert counts == {"train": (301_966, 1_003_854, 1), "val": (36_059, 111_540, 1)}
    raw = (real_text / "shakespeare" / "input.txt").read_bytes()
    decode = tokenizer.load("gpt2").decode_bytes
    assert decode(data.tokens("train")[:].tolist()) + decode(data.tokens("val")[:].tolist()) == raw
    entry = prepare("wikitext103", raw_dir=str(real_text), splits=("test",)).meta["splits"]["test"]
    assert (entry["tokens"], entry["bytes"], entry["documents"]) == (283_287, 1_287_656, 4358)


def test_shakespeare_is_downloaded_once_and_checked(in_tmp, monkeypatch):
    """The user's file is never overwritten, and a download that fails leaves none."""
    page, raw = in_tmp / "page.txt", Path("data/raw/shakespeare/input.txt")
    page.write_bytes(TEXT.encode())
    monkeypatch.setattr(sources, "SHAKESPEARE_URL", page.as_uri())
    monkeypatch.setattr(sources, "SHAKESPEARE_SHA256", hashlib.sha256(TEXT.encode()).hexdigest())
    data = prepare("shakespeare", tokenizer="byte")
    assert raw.read_bytes() == TEXT.encode()
    assert texts(data, "train") + texts(data, "val") == [TEXT[: len(TEXT) * 9 // 10], TEXT[len(TEXT) * 9 // 10 :]]
    page.unlink()
    assert content(prepare("shakespeare", tokenizer="byte", data_dir="other").folder) == content(data.folder)
    raw.write_text("Not Shakespeare")
    with pytest.raises(UserError, match=r"input\.txt is not tiny Shakespeare.*move it away"):
        prepare("shakespeare", tokenizer="byte", data_dir="third")
    raw.unlink()
    with pytest.raises(UserError, match=rf"could not be downloaded to {raw} \(.*No such file.*--raw_dir"):
        prepare("shakespeare", tokenizer="byte", data_dir="third")
    assert not raw.exists()


# ---------------------------------------------------------------------------------------------------------------------
# the user's files


@pytest.mark.parametrize(
    ("inputs", "found"),
    [
        (["b.txt", "a.txt"], "ba"),
        (["?.txt", "in"], "abcdej"),
        (["in/**/*.md"], "de"),
        (["odd.html", "a.txt"], "ha"),
        (["link.txt", "a.txt", "./a.txt", "*.txt", "in/../a.txt"], "ab"),
        (["in/deep/e.md", "in/e.md", "linked"], "eEcdj"),
    ],
)
def test_input_files(in_tmp, inputs, found):
    """Files, patterns, and folders with the known suffixes; each file once, in the given order, then sorted.

    Links to files and folders are followed, one to a folder above is not; files of the same name are several.
    """
    (in_tmp / "in" / "deep").mkdir(parents=True)
    for name in ("a.txt", "b.txt", "in/c.py", "in/d.md", "in/deep/e.md", "odd.html", "in/x.html"):
        letter = "h" if name == "odd.html" else Path(name).stem
        (in_tmp / name).write_text(letter * 10)
    (in_tmp / "in" / "j.jsonl").write_text('{"text": "jjjjjjjjjj"}\n')
    if "link.txt" in inputs:
        (in_tmp / "link.txt").symlink_to("a.txt")
    if "linked" in inputs:
        (in_tmp / "in" / "e.md").write_text("E" * 10)
        (in_tmp / "in" / "deep" / "up").symlink_to("..")
        (in_tmp / "linked").mkdir()
        (in_tmp / "linked" / "folder").symlink_to("../in")
    data = from_text(*inputs, val_fraction=0.5)
    assert "".join(texts(data, "train") + texts(data, "val")) == "".join(letter * 10 for letter in found)


def test_folder_counts_what_it_leaves_out(in_tmp):
    """Suffixes have no case; hidden files and folders are left out, and tables and objects without the column."""
    read = {"in/a.txt": "a", "in/B.TXT": "b", "in/x.md/c.Jsonl": '{"text": "c"}', "in/d.ndjson": '{"text": "d"}'}
    read |= {"in/e.json": '["e"]', "in/f.CSV": "text\nf", "in/g.tsv": "id\ttext\n1\tg", "in/h.tex": "h"}
    left = {"in/.i.txt": "i", "in/.git/j.txt": "j", "in/.venv/k/l.py": "l", "in/m.pdf": "%PDF-", "in/n.pdf": "%PDF-"}
    left |= {"in/package.json": '{\n"name": "o"}', "in/p.csv": "x,y\n1,2", "in/LICENSE": "q"}
    for name, text in (read | left).items():
        (in_tmp / name).parent.mkdir(parents=True, exist_ok=True)
        (in_tmp / name).write_text(text)
    (in_tmp / "in" / "r.txt").symlink_to("missing.txt")
    os.mkfifo("in/s.txt")
    lines = []
    data = from_text("in", log=lines.append, val_fraction=0.5)
    assert sorted("".join(texts(data, "train") + texts(data, "val"))) == list("abcdefgh")
    (line,) = lines
    assert line.startswith("in: 8 files read; left out: 3 hidden, ")
    counts = (
        "2 .pdf",
        "2 broken or special",
        "1 .json without readable 'text'",
        "1 .csv without readable 'text'",
        "1 without a suffix",
    )
    assert [count for count in counts if count not in line] == []
    from_text("in/*", "in/LICENSE", log=lines.append, name="second", val_fraction=0.5)
    assert lines[1].startswith("in/*: 7 files read; left out: ")
    assert lines[1].endswith("\nread as plain text, with any markup: 1 without a suffix")


def test_deep_patterns_do_not_follow_links_in_circles(in_tmp):
    """With two links, glob.glob would return 2^40 paths."""
    (in_tmp / "in" / "deep" / ".git").mkdir(parents=True)
    for name in ("in/a.txt", "in/deep/b.txt", "in/deep/.git/c.txt", "in/deep/.d.txt", "in/deep/e.md"):
        (in_tmp / name).write_text(Path(name).name)
    (in_tmp / "in" / "up").symlink_to("..")
    (in_tmp / "in" / "deep" / "up").symlink_to("..")
    names = {
        "in/**/*.txt": ["in/a.txt", "in/deep/b.txt"],
        "**/deep/**/?.txt": ["in/deep/b.txt"],
        f"{in_tmp}/**": ["in/a.txt", "in/deep/b.txt", "in/deep/e.md"],
        "i*/**/deep/*": ["in/deep/b.txt", "in/deep/e.md"],
    }
    for pattern, expected in names.items():
        assert expand_inputs((pattern,)) == [Path(*[in_tmp] * (pattern[0] == "/"), name) for name in expected]
    assert "in/**/*.rst: no such file" in refusal("in/**/*.rst")


def test_encoding_is_a_setting(in_tmp):
    (in_tmp / "a.txt").write_bytes(("café " * 50).encode("cp1252"))
    data = from_text("a.txt", encoding="CP1252")
    assert "".join(texts(data, "train") + texts(data, "val")) == "café " * 50
    assert data.meta["encoding"] == "cp1252"
    (in_tmp / "a.txt").write_text("café " * 50)
    assert "encoding cp1252 (now None)" in refusal("a.txt")


def test_file_that_grows_is_refused(in_tmp, monkeypatch):
    (in_tmp / "a.txt").write_text(TEXT)
    read = readers.text_chunks

    def read_and_grow(path, encoding):
        with open(path, "a") as file:
            file.write("more\n")
        yield from read(path, encoding)

    with monkeypatch.context() as patch:
        patch.setattr(readers, "text_chunks", read_and_grow)
        assert "a.txt changed while it was read: run again" in refusal("a.txt")
    from_text("a.txt")


@pytest.mark.parametrize(
    ("named", "inputs", "keys", "parts"),
    [
        (
            {"e": "", "f": "\ufeff"},
            ["e.txt", "f.txt"],
            {},
            ["too little text: the files of text_byte have none"],
        ),
        ({"a": TEXT}, ["a.txt", "b.txt"], {}, ["--input b.txt", "no such file"]),
        ({"a": TEXT}, ["*.md"], {}, ["--input *.md", "no such file"]),
        ({"a": TEXT}, [""], {}, ["--input : no such file"]),
        ({"a": TEXT}, ["pipe"], {}, ["--input pipe is a pipe or device", "save its text in a file"]),
        ({}, ["."], {}, ["--input .: no file to read, but ", "1 .latin1", ".txt .md .py"]),
        ({"a": TEXT}, ["-"], {}, ["--input - is a pipe or device"]),
        ({"a": TEXT}, ["/dev/null"], {}, ["--input /dev/null is a pipe or device"]),
        (
            {f"f{n}": str(n) for n in range(100)},
            ["*.txt"],
            {"val_fraction": 0.999999, "test_fraction": 1e-9},
            [
                "too little text: 100 documents, 190 characters leave none for the train split",
                "add some, or change --val_f",
            ],
        ),
        (
            {f"f{n}": "the same" for n in range(100)},
            ["*.txt"],
            {"test_fraction": 0.01},
            ["too little text: 100 documents (1 different), 8 characters"],
        ),
        ({"a": "a"}, ["a.txt"], {}, ["1 document, 1 character leave none for the train split"]),
        (
            {"a": "a", "b": "b"},
            ["."],
            {"test_fraction": 0.1},
            ["2 documents, 2 characters leave none"],
        ),
        ({"a": "caf"}, ["a.txt", "odd.latin1"], {}, ["odd.latin1 line 2: byte 0xe9 is not UTF-8"]),
        (
            {"a": TEXT},
            ["a.txt"],
            {"splits": ("test",)},
            ["splits = test: text has train, val; --test_fraction makes one"],
        ),
        ({"a": TEXT}, ["a.txt"], {"splits": ("train", "test")}, ["splits = test: text has train, val"]),
    ],
)
def test_refused_input(in_tmp, named, inputs, keys, parts):
    """An error line, and no dataset."""
    files(in_tmp, **named)
    (in_tmp / "odd.latin1").write_bytes(b"one\ncaf\xe9")
    os.mkfifo("pipe")  # could be read only once
    answer = refusal(*inputs, **keys)
    assert [part for part in parts if part not in answer] == []
    assert "\n" not in answer
    assert not list(Path("data").glob("*"))


# ---------------------------------------------------------------------------------------------------------------------
# splits

# 30 short documents, and long ones that come in chunks
LONG = [f"{n} " + "long " * (200 if n % 10 == 0 else 1) for n in range(120)]


def some(found: dict) -> dict:
    return {split: texts for split, texts in found.items() if texts}


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("kind", ["txt", "jsonl", "jsonl.gz", "parquet"])
@pytest.mark.parametrize(("n", "limit"), [(1, None), (99, None), (240, None), (240, 99), (240, 100), (240, 133)])
def test_documents_are_split_by_their_hash_and_fewer_than_100_by_characters(in_tmp, kind, n, limit):
    """Empty documents do not count; a sample is the first ones of all files."""
    written = [text or "" for text in [*WRITTEN, *LONG][-n:]]
    for part in range(3):
        write(in_tmp / f"in/{part}.{kind}", written[part * n // 3 : (part + 1) * n // 3])
    data = from_text("in", sample_size=limit, val_fraction=0.2, test_fraction=0.3)
    kept = [text for text in written if text][:limit]
    rule = by_characters if len(kept) < 100 else by_hash
    assert texts_by_split(data) == some(rule(kept, 0.2, 0.3))
    made = from_text("in", sample_size=limit, val_fraction=0.2, test_fraction=0.3, splits=("test", "val"), name="some")
    assert made.meta["splits"] == {split: data.meta["splits"][split] for split in ("val", "test")}


def place(text: str) -> float:
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=b"flatgpt split").digest()
    return int.from_bytes(digest, "big") / 2**64


@pytest.mark.parametrize(("val", "test"), [(1e-9, None), (1e-9, 1e-9), (0.02, 1e-9), (1e-9, 0.05)])
@pytest.mark.parametrize(("n", "limit"), [(130, None), (300, 150)])
def test_no_split_is_empty(in_tmp, val, test, n, limit):
    """A split that no document's hash chooses gets the document with the smallest one, whatever the order of all."""
    written = [text for text in [*WRITTEN, *LONG] if text][-n:]
    rest, expected, border = sorted(set(written[:limit]), key=place), {}, 0
    for split, share in (("test", test), ("val", val)):
        border += share or 0
        chosen = [text for text in rest if place(text) < border] or rest[: 1 if share else 0]
        expected[split], rest = chosen, rest[len(chosen) :]
    expected = {split: set(texts) for split, texts in some({"train": rest, **expected}).items()}
    for order, part in (("in", written[:limit]), ("reversed", written[:limit][::-1])):
        write(in_tmp / order / "a.jsonl", [*part, "", *(written[limit:] if limit else [])])
        keys = {"val_fraction": val, "test_fraction": test, "sample_size": limit}
        data = from_text(order, name=order, **keys)
        assert {split: set(texts) for split, texts in texts_by_split(data).items()} == expected
        for split in data.meta["splits"]:
            alone = from_text(order, name=f"{order} {split}", splits=(split,), **keys)
            assert texts(alone, split) == texts(data, split)


@pytest.mark.parametrize("test", [None, 0.02, 0.3])
@pytest.mark.parametrize("characters", range(3, 12))
def test_few_characters_leave_no_split_empty(in_tmp, characters, test):
    """Of the end, test and val have their share or one character; before, that was only so where shares are large."""
    files(in_tmp, a="0123456789ab"[:characters])
    data = from_text("a.txt", val_fraction=0.05, test_fraction=test)
    found = {split: "".join(parts) for split, parts in texts_by_split(data).items()}
    assert "".join(found.values()) == "0123456789ab"[:characters]
    assert found.keys() == {"train", "val", *(["test"] if test else [])}
    assert all(found.values())


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("order", [1, -1])
def test_equal_documents_of_few_are_on_one_side_or_split_alike(in_tmp, order):
    """A file of several chunks and a line are equal documents too. Before, copies were on both sides."""
    documents = [f"{n} {'word ' * n}" for n in range(30)] + ["x" * 700, f"{LONG[100]}\n"]
    write(Path("in/a.txt"), documents[::order])
    write(Path("in/b.jsonl"), documents + documents[::-1])
    found = texts_by_split(from_text("in", val_fraction=0.3, test_fraction=0.2))
    sides = [set(found[split]) for split in ("train", "val", "test")]
    assert sum(map(len, sides)) == len(set.union(*sides))
    assert all(found[split].count(text) == 3 for split, side in zip(found, sides, strict=True) for text in side)
    assert sum(len(text) for side in sides for text in side) == len("".join(documents))


@pytest.mark.parametrize("documents", [1, 2])
def test_few_documents_are_not_split_inside_a_special_token_or_a_character(in_tmp, documents):
    """Characters of one document are split anywhere, as in earlier versions; its special tokens are not."""
    line = "<|user|>\u0928\u093f" * 20
    files(in_tmp, a=line, b=(line + ".") * (documents - 1) or line)
    inputs = ("a.txt", "b.txt")[:documents]
    keys = {"special_tokens": ("<|user|>",), "parse_special": True}
    for n in range(20):
        data = from_text(*inputs, name=f"d{n}", val_fraction=0.2 + n / 200, **keys)
        ids = {split: data.tokens(split)[:].tolist() for split in ("train", "val")}
        assert sum(part.count(257) for part in ids.values()) == 20 * documents
        assert documents == 1 or bytes(i for i in ids["val"][:3] if i < 256) != "\u093f".encode()


@pytest.mark.parametrize("end", ["", None])
def test_split_of_the_source_without_text_is_refused_before_encoding(in_tmp, monkeypatch, end):
    monkeypatch.setattr(preparation, "encode_task", lambda *_: pytest.fail("encoding has begun"))
    with pytest.raises(UserError, match="the val split of data_byte would have 0 characters; omit it with --splits"):
        hub_data({"train.jsonl": WRITTEN, "dev.jsonl": ["", end]}, val_fraction=None)
    for split, rows in {"train": ["", "x"], "validation": ["a"], "test": ["a"]}.items():
        write(Path(f"raw/wikitext103/{split}-00000-of-00001.parquet"), rows)
    with pytest.raises(UserError, match=r"the \w+ split of \S+ would have 1 characters"):
        prepare("wikitext103", raw_dir="raw", tokenizer="byte")
    assert not Path("data").exists()


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("n", [None, 1, 20, 130])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_splits_of_the_source_are_kept(in_tmp, kind, n):
    named = {"train-0-of-2": WRITTEN[:100], "train-1-of-2": WRITTEN[100:], "dev": WRITTEN[30:70], "test": WRITTEN[:9]}
    data = hub_data({f"{name}.{kind}": part for name, part in named.items()}, sample_size=n, val_fraction=None)
    documents = {"train": WRITTEN, "val": WRITTEN[30:70], "test": WRITTEN[:9]}
    assert texts_by_split(data) == {split: [*filter(None, part)][:n] for split, part in documents.items()}


def test_splits_that_the_source_lacks_are_held_out_of_train(in_tmp):
    data = hub_data({"train.jsonl": WRITTEN, "test.jsonl": ["a test"]})
    assert texts_by_split(data) == {**by_hash(WRITTEN), "test": ["a test"]}
    Path("raw/hub/user/data/test.jsonl").rename("raw/hub/user/data/validation.jsonl")
    # one that the hub's own fraction would make a validation document, if there were none
    few = next(f"{n}" for n in itertools.count() if choose_split({"test": 0.2, "val": 0.2005}, [f"{n}"]) == "val")
    data = hub_data({"train.jsonl": [*WRITTEN, few]}, test_fraction=0.2, val_fraction=None, name="other")
    assert texts_by_split(data) == {**by_hash([*WRITTEN, few], 0, 0.2), "val": ["a test"]}
    with pytest.raises(UserError, match="hub has its own val split: leave out --val_fraction"):
        hub_data({}, val_fraction=0.1, name="third")


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
@pytest.mark.parametrize("limit", [None, 20])
def test_files_of_the_users_own_splits(in_tmp, kind, limit):
    """A file that is in two is not for training; documents that are in two are counted. All make the revision."""
    named = {"in/a": WRITTEN[:100], "in/v": WRITTEN[60:100], "in/t": WRITTEN[100:130]}
    for name, part in named.items():
        write(Path(f"{name}.{kind}"), part)
    paths = {name: name if kind == "txt" else f"{name}.jsonl" for name in named}
    lines, keys = [], {"val_input": (paths["in/v"],), "test_input": (paths["in/t"],), "sample_size": limit}
    data = from_text("in", log=lines.append, **keys)
    expected = {"train": WRITTEN[:100], "val": WRITTEN[60:100], "test": WRITTEN[100:130]}
    expected = {split: [*filter(None, part)][:limit] for split, part in expected.items()}
    assert texts_by_split(data) == expected
    shared = len({*expected["val"]} & {*expected["train"]})
    files_left_out = 70 if kind == "txt" else 2
    assert lines[0] == f"note: input files that are left out, as --val_input or --test_input has them: {files_left_out}"
    assert (f"note: {shared} different documents" in "".join(lines)) == (shared > 0)
    assert "val_fraction" not in data.meta
    assert "the text of the input" in refusal(
        "in", **{**keys, "val_input": keys["test_input"], "test_input": keys["val_input"]}
    )
    alone = from_text("in", splits=("val",), name="val", **keys)
    assert alone.meta["splits"] == {"val": data.meta["splits"]["val"]}
    assert "--input: all of its files are in --val_input too" in refusal(paths["in/v"], val_input=("in",), name="none")


def test_test_files_leave_validation_to_a_share(in_tmp):
    write(Path("a.jsonl"), WRITTEN)
    write(Path("t.jsonl"), ["a test"])
    assert texts_by_split(from_text("a.jsonl", test_input=("t.jsonl",))) == {**by_hash(WRITTEN), "test": ["a test"]}


@pytest.mark.parametrize("n", [3, 240])
def test_no_validation_split(in_tmp, n):
    write(Path("a.jsonl"), WRITTEN[:n])
    kept = [*filter(None, WRITTEN[:n])]
    assert texts_by_split(from_text("a.jsonl", val_fraction=0)) == {"train": kept}
    both = texts_by_split(from_text("a.jsonl", val_fraction=0, test_fraction=0.3, name="test"))
    assert both == some((by_characters if n < 100 else by_hash)(kept, 0, 0.3))
    assert "splits = val: text has train" in refusal("a.jsonl", val_fraction=0, splits=("val",), name="val")
    with pytest.raises(UserError, match="hub has its own val split: choose the others with --splits"):
        hub_data({"train.jsonl": WRITTEN, "dev.jsonl": ["a"]}, val_fraction=0)


@pytest.mark.parametrize("limit", [1, 20])
def test_what_is_behind_a_sample_need_not_be_valid(in_tmp, limit):
    files(in_tmp, a="some text\n")
    write(Path("b.jsonl"), WRITTEN[:40])
    with open("b.jsonl", "ab") as file:
        file.write(b"{not JSON \xff\n")
    Path("c.txt").write_bytes(b"caf\xe9")
    made = from_text("a.txt", "b.jsonl", "c.txt", sample_size=limit, val_fraction=0)
    assert made.meta["splits"]["train"]["documents"] == limit
    assert "c.txt line 1" in refusal("c.txt", "a.txt", sample_size=limit, name="bad")
    assert "c.txt line 1" in refusal("a.txt", "b.jsonl", "c.txt", name="bad")


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("limit", [None, 2, 50, 133])
def test_joined_rows_are_one_text(in_tmp, limit):
    """WikiText's rows are lines: as they were, the empty ones too, without an end-of-text."""
    rows = [f" {n} isn't a line of 2024 \n" if n % 3 != 1 else "" for n in range(400)]
    parts = {
        "train-00000-of-00002": rows[:100],
        "train-00001-of-00002": rows[100:],
        "validation-00000-of-00001": ["a\n"],
    }
    for name, part in {**parts, "test-00000-of-00001": ["", " = Title = \n", "x"]}.items():
        write(Path(f"raw/wikitext103/{name}.parquet"), part)
    data = prepare("wikitext103", raw_dir="raw", tokenizer="byte", sample_size=limit, splits=("train", "test"))
    assert texts(data, "train") == ["".join(rows[:limit])]
    assert [data.meta["splits"][split]["documents"] for split in ("train", "test")] == [
        limit or 400,
        min(limit or 3, 3),
    ]


@pytest.mark.parametrize("limit", [None, 120])
def test_sample_downloads_files_until_it_has_enough(in_tmp, limit):
    fetched = []

    def fetch(path: Path) -> Path:
        fetched.append(path.name)
        write(path, [f"{path.stem} {n}" for n in range(50)])
        return path

    paths = [in_tmp / f"{n}.jsonl" for n in range(5)]
    raw = [RawFile(path.name, 1, path, fetch=functools.partial(fetch, path)) for path in paths]
    plan = make_plan(PrepareConfig(source="hub", repo="a/b", sample_size=limit), Corpus({"train": raw}))
    assert sum(chunk.documents for task in plan.tasks["train"] for chunk in task.read()) == (limit or 250)
    assert fetched == [path.name for path in paths[: 3 if limit else 5]]


# ---------------------------------------------------------------------------------------------------------------------
# in the workers


@pytest.mark.parametrize("splits", [["train", "val", "test"], ["val"], ["test", "train"]])
def test_task_gives_each_split_its_documents(splits):
    """The hash decides, or the chunk, or the split of the source."""
    documents, borders = [f"document {n}" for n in range(200)], {"test": 0.15, "val": 0.4}
    config = PrepareConfig(source="text", tokenizer="byte")
    call = functools.partial(encode_task, config, Path("none"), 256, splits, borders)

    def counts(task: Task) -> dict[str, int]:
        encoded, special = pickle.loads(pickle.dumps(call))(task)
        assert special is None
        return {split: count for split, (_, count, _) in encoded.items()}

    chosen = [choose_split(borders, [text]) for text in documents]
    assert counts(Task(0, functools.partial(map, Chunk, documents))) == {s: chosen.count(s) for s in splits}
    decided = [Chunk(text, split=splits[0]) for text in documents]
    assert counts(Task(0, functools.partial(iter, decided))) == {splits[0]: 200}
    if splits[0] != "train":
        assert counts(Task(0, functools.partial(map, Chunk, documents), split=splits[0])) == {splits[0]: 200}


def test_choice_of_a_split_never_changes():
    """Pinned: a dataset that is made again has the same splits."""
    chosen = [choose_split({"test": 0.1, "val": 0.1 + 0.2}, [f"document {n}"]) for n in range(60)]
    letters = {"train": "r", "val": "a", "test": "e"}
    assert "".join(letters[split] for split in chosen) == "rrerrrrerararrraaerearrrrrrrerrrrrraarearrrrrrrrrrrrararrrar"


def test_every_source_has_settings():
    """config.py's table lists what prepare_data.py accepts, sources.py's what it opens."""
    assert [*SOURCES, "compare"] == [*SOURCE_SETTINGS]
    fields = PrepareConfig.__dataclass_fields__.keys()
    assert all(set(settings.settings.split()) <= fields for settings in SOURCE_SETTINGS.values())
