"""The folder that prepare makes: its bytes and its manifest, what is kept and refused, and stopping at any moment."""

import contextlib
import errno
import gc
import hashlib
import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from in_process import TEXT
from prepared import content, files, from_text, prepare, refusal, texts
from test_shards import full_disk
from test_split import WRITTEN, by_hash, free, small_blocks, write

from config import PrepareConfig, UserError
from flatgpt.cli import cli
from flatgpt.data import encode as tasks
from flatgpt.data import prepare as preparation
from flatgpt.data import progress, shards, tokenizer
from flatgpt.data.dataset import open_dataset

__all__ = ["small_blocks"]  # a fixture

# ---------------------------------------------------------------------------------------------------------------------
# its bytes

LONG = "".join(f"{n} bottles on the wall,\r\n{n % 7 * ' '}na\u00efve caf\u00e9s \U0001f388\n\n" for n in range(90))


def mixed() -> list[str]:
    """Files of all formats in in/; their documents in order."""
    odd = [" \n", "<|endoftext|>", "a<|endoftext|>b\n", "x" * 2000, "\u3000\u6771\u4eac\u3000", "\r\n", LONG]
    parts = [WRITTEN[:80], [*WRITTEN[80:150], *odd], WRITTEN[150:200], [*odd, *WRITTEN[200:]]]
    for name, part in zip(("a.parquet", "b.jsonl", "c.txt", "d.jsonl.gz"), parts, strict=True):
        write(Path("in", name), part)
    Path("in/c/long.md").write_bytes(b"\xef\xbb\xbf" + LONG.encode())
    return [text for part in (*parts[:3], [LONG], parts[3]) for text in part if text]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("name", ["byte", "gpt2"])
def test_ids_are_those_of_each_document_alone(in_tmp, name):
    there = mixed()
    if name == "byte":  # runs without a break are cut, which only in bytes changes no id
        there.append("x" * 1000 + "\ttab " + "y" * 1000)
        Path("in/e.txt").write_text(there[-1])
    written = by_hash(there, 0.2, 0.1)
    data = from_text("in", tokenizer=name, val_fraction=0.2, test_fraction=0.1, shard_tokens=1000)
    encoding = tokenizer.load(name)
    for split, entry in data.meta["splits"].items():
        expected = [i for text in written[split] for i in [*encoding.encode_ordinary(text), encoding.eot_token]]
        assert data.tokens(split)[:].tolist() == expected
        assert entry["tokens"] == len(expected)
        assert entry["documents"] == len(written[split])
        assert entry["bytes"] == sum(len(text.encode()) for text in written[split])
        assert entry["words"] == sum(len(text.split()) for text in written[split])
        assert [file["tokens"] for file in entry["files"][:-1]] == [1000] * (len(entry["files"]) - 1)


@pytest.mark.usefixtures("small_blocks")
def test_joined_rows_are_one_text(in_tmp):
    """WikiText's rows are lines: as they were, the empty ones too, without an end-of-text."""
    parts = {"train": [f" {n} line\n" if n % 3 else "" for n in range(400)], "validation": ["a\n", "", "b"]}
    for split, rows in {**parts, "test": ["", " = Title = \n", "x"]}.items():
        write(Path(f"raw/wikitext103/{split}-00000-of-00001.parquet"), rows)
    data = prepare("wikitext103", raw_dir="raw", tokenizer="byte")
    assert {split: texts(data, split) for split in data.meta["splits"]} == {
        "train": ["".join(parts["train"])],
        "val": ["a\nb"],
        "test": [" = Title = \nx"],
    }
    assert [data.meta["splits"][split]["documents"] for split in ("train", "val", "test")] == [400, 3, 3]
    sample = prepare("wikitext103", raw_dir="raw", tokenizer="byte", sample_size=50, name="sample", splits=("train",))
    assert texts(sample, "train") == ["".join(parts["train"][:50])]


def test_folder_hangs_on_input_and_settings_alone(in_tmp):
    mixed()
    one = from_text("in", shard_tokens=1000)
    shutil.move("in", "elsewhere")
    two = from_text("elsewhere", shard_tokens=1000, workers=3, name="two", data_dir="there/deep")
    assert content(one.folder) == content(two.folder)


# ---------------------------------------------------------------------------------------------------------------------
# the folder and its manifest


def test_manifest_says_what_there_is(in_tmp):
    files(in_tmp, a=TEXT, b="two words\n" * 200)
    data = from_text("a.txt", "b.txt", shard_tokens=5000)
    meta = json.loads((data.folder / "meta.json").read_text(encoding="utf-8"))
    assert {key: meta[key] for key in ("format", "source", "tokenizer", "vocab_size", "eot_id", "dtype")} == {
        "format": 1,
        "source": "text",
        "tokenizer": "byte",
        "vocab_size": 257,
        "eot_id": 256,
        "dtype": "uint16",
    }
    assert meta["end_of_text"] is True
    assert meta["ranks_sha256"] == tokenizer.ranks_hash(tokenizer.load("byte"))
    assert len(meta["splits"]["train"]["files"]) > 2
    for split, entry in meta["splits"].items():
        there = texts(data, split)
        assert entry["documents"] == len(there)
        assert entry["bytes"] == sum(len(text.encode()) for text in there)
        assert entry["words"] == sum(len(text.split()) for text in there)
        assert entry["tokens"] == entry["bytes"] + entry["documents"] == len(data.tokens(split))
        for file in entry["files"]:
            raw = (data.folder / file["name"]).read_bytes()
            assert (len(raw), hashlib.sha256(raw).hexdigest()) == (2 * file["tokens"], file["sha256"])
        assert [file["tokens"] for file in entry["files"][:-1]] == [5000] * (len(entry["files"]) - 1)
    named = {file["name"] for entry in meta["splits"].values() for file in entry["files"]}
    assert set(content(data.folder)) == {"meta.json", *named}


@pytest.mark.parametrize(
    ("source", "keys", "folder"),
    [
        ("pydoc", {}, "data/pydoc"),
        ("pydoc", {"tokenizer": "byte"}, "data/pydoc"),
        ("pydoc", {"tokenizer": "gpt2"}, "data/pydoc_gpt2"),
        ("pydoc", {"data_dir": "there"}, "there/pydoc"),
        ("text", {}, "data/text"),
        ("text", {"tokenizer": "byte"}, "data/text_byte"),
        ("text", {"tokenizer": "byte", "name": "mine"}, "data/mine"),
    ],
)
def test_folder_is_named_after_source_and_tokenizer(in_tmp, source, keys, folder):
    files(in_tmp, a=TEXT)
    data = prepare(source, **({"input": ("a.txt",)} if source == "text" else {}), **keys)
    assert data.folder == Path(folder)
    assert Path(folder, "meta.json").exists()


@pytest.mark.parametrize(
    ("words", "folder"),
    [
        ("wikipedia", "data/wikipedia"),
        ("wikipedia --dump 20231101.en", "data/wikipedia"),
        ("wikipedia --dump 20231101.simple --tokenizer byte", "data/wikipedia_20231101.simple_byte"),
        ("hub --repo user/stories", "data/stories"),
    ],
)
def test_folder_is_named_after_dump_and_repository(words, folder):
    assert preparation.dataset_folder(cli.parse(PrepareConfig, shlex.split(words))) == Path(folder)


def test_again_with_the_same_settings_does_nothing(in_tmp):
    files(in_tmp, a=TEXT)
    folder = from_text("a.txt").folder
    before, said = content(folder), []
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = from_text("a.txt", log=said.append)
    assert len(said) == 1
    assert "nothing to do" in said[0]
    assert str(folder) in said[0]
    assert content(folder) == before
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times
    assert again.meta["splits"]["train"]["tokens"] > 0
    files(in_tmp, copy=TEXT)  # the text is what counts, not the file's name; and 0.1 is the default
    assert from_text("copy.txt", val_fraction=0.1).manifest_hash == again.manifest_hash


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"val_fraction": 0.2}, ["val_fraction", "0.2"]),
        ({"shard_tokens": 1000}, ["shard_tokens", "1000", "100000000"]),
        ({"tokenizer": "gpt2"}, ["tokenizer", "byte", "gpt2"]),
        ({"text": "another text\n" * 100}, ["revision"]),
        ({"source": "pydoc"}, ["source", "text", "pydoc"]),
        ({"val_fraction": 0.2, "shard_tokens": 1000}, ["val_fraction", "shard_tokens"]),
    ],
)
def test_again_with_others_is_refused_naming_them(in_tmp, change, said):
    files(in_tmp, a=TEXT)
    folder = from_text("a.txt", name="mine").folder
    before, change = content(folder), dict(change)
    files(in_tmp, a=change.pop("text", TEXT))
    if source := change.pop("source", None):
        with pytest.raises(UserError) as caught:
            prepare(source, name="mine", tokenizer="byte")
        answer = str(caught.value)
    else:
        answer = refusal("a.txt", name="mine", **change)
    for part in (str(folder), "--name", *said):
        assert part in answer
    for key in {"val_fraction", "shard_tokens", "tokenizer"} - set(said):
        assert f"{key} " not in answer.split("settings: ")[1].split(". Give")[0]
    assert content(folder) == before


# ---------------------------------------------------------------------------------------------------------------------
# stopping


def wikitext() -> None:
    for split, n in (("train", 300), ("validation", 80), ("test", 80)):
        write(Path(f"raw/wikitext103/{split}-00000-of-00001.parquet"), [f" {k} lines\n" * 3 for k in range(n)])


def own_splits() -> None:
    write(Path("raw/hub/user/data/train.jsonl"), WRITTEN[:60])
    write(Path("raw/hub/user/data/validation.jsonl"), WRITTEN[60:100])


INPUTS = {
    "hash": (mixed, {"source": "text", "input": ("in",), "test_fraction": 0.1}),
    "characters": (lambda: write(Path("in/a.jsonl"), WRITTEN[:40]), {"source": "text", "input": ("in",)}),
    "own splits": (own_splits, {"source": "hub", "repo": "user/data", "raw_dir": "raw"}),
    "sample": (mixed, {"source": "text", "input": ("in",), "sample_size": 120}),
    "joined": (wikitext, {"source": "wikitext103", "raw_dir": "raw"}),
}
EVERY_INPUT = pytest.mark.parametrize("make", list(INPUTS), indirect=True)
FOLDER = Path("data/mine")


@pytest.fixture
def make(request, in_tmp, small_blocks, monkeypatch):
    """Makes FOLDER, of many tasks and shards, of the input that the test's parameter names; counts what it encodes."""

    def encode(*args):
        made.encoded += 1
        return encode_task(*args)

    def made(log=lambda line: None, **keys):
        made.encoded = 0
        made.config = PrepareConfig(**{"tokenizer": "byte", "name": "mine", "shard_tokens": 2000, **settings, **keys})
        return preparation.prepare(made.config, log)

    encode_task = tasks.encode
    monkeypatch.setattr(tasks, "encode", encode)
    monkeypatch.setattr(os, "fsync", lambda file: None)  # a slow disk shall not make slow tests
    write_input, settings = INPUTS[getattr(request, "param", "hash")]
    write_input()
    return made


@contextlib.contextmanager
def failing(place, name: str, k: int, error: Callable[[], BaseException] | None, after: bool = False):
    """The k-th call of place.name, from 0, raises: instead of doing its work, or after it. Gives the calls."""
    real, calls = getattr(place, name), []

    def call(*args, **keys):
        calls.append(args)
        mine = len(calls) - 1 == k
        if mine and not after:
            raise error()
        answer = real(*args, **keys)
        if mine:
            raise error()
        return answer

    setattr(place, name, call)
    try:
        yield calls
    finally:
        setattr(place, name, real)


def some_of(total: int, n: int) -> list[int]:
    """The numbers below total, about n of them: evenly, and the first and the last."""
    return sorted({*range(0, total, 1 + total // n), total - 1})


def saved() -> int:
    """How many tasks need not be done again."""
    progress = FOLDER / "progress.json"
    passes = json.loads(progress.read_text())["passes"].values() if progress.exists() else ()
    return sum(state["tasks"] for state in passes)


NO_SPACE = "could not be written: No space left on device"


def no_space() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


@EVERY_INPUT
@pytest.mark.parametrize("error", [KeyboardInterrupt, no_space, RuntimeError])
def test_stopped_at_any_task_it_goes_on_from_there(make, error, capsys):
    whole, total = content(make().folder), make.encoded
    assert total > 8
    for k in some_of(total, 12 if error is KeyboardInterrupt else 3):
        shutil.rmtree(FOLDER)
        with failing(tasks, "encode", k, error), pytest.raises(type(error())):
            make()
        stopped = f"{FOLDER}: stopped; what is done is kept, and the same command goes on from there\n"
        assert capsys.readouterr().err == stopped * (error is KeyboardInterrupt)
        assert k - 1 <= saved() <= k  # a task that a sample ends in is encoded twice
        said, left = [], total - saved()
        assert content(make(said.append).folder) == whole
        assert make.encoded == left
        assert said[-1] == f"{FOLDER}: going on where the work was stopped"


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, no_space])
@pytest.mark.parametrize(("place", "name"), [(shards.ShardWriter, "add"), (os, "replace"), (os, "fsync")])
def test_stopped_at_any_write_it_goes_on(make, place, name, error, after):
    """Also between the shards of a task's splits, and between a file and its name."""
    with failing(place, name, -1, None) as calls:
        whole, total = content(make().folder), make.encoded
    for k in some_of(len(calls), 12):
        shutil.rmtree(FOLDER)
        with failing(place, name, k, error, after), pytest.raises((UserError, KeyboardInterrupt)) as why:
            make()
        assert error is KeyboardInterrupt or f"{NO_SPACE}; not finished: what is done is kept" in str(why.value)
        left = total - saved()
        assert content(make().folder) == whole, f"stopped at call {k} of {len(calls)}"
        assert make.encoded <= left


@EVERY_INPUT
def test_killed_at_any_moment_it_goes_on(make, monkeypatch):
    """kill -9 leaves what the disk held around one of the flushes and renames."""
    monkeypatch.setattr(preparation, "SAVE_SECONDS", -1)
    moments: list[dict[str, bytes]] = []

    def watched(real):
        def call(*args):
            moments.append(content(FOLDER))
            real(*args)
            moments.append(content(FOLDER))

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", watched(os.replace))
        patch.setattr(os, "fsync", watched(os.fsync))
        whole, total = content(make().folder), make.encoded
    different = [moment for n, moment in enumerate(moments) if moment != moments[n - 1]]
    assert len(different) > 40
    for moment in [different[k] for k in some_of(len(different), 20)]:
        shutil.rmtree(FOLDER)
        FOLDER.mkdir()
        for name, raw in moment.items():
            (FOLDER / name).write_bytes(raw)
        left = total - saved()
        assert content(make().folder) == whole, f"it held {sorted(moment)}"
        assert make.encoded <= ("meta.json" not in moment) * left


LATE = 25  # some shards are finished when so many tasks are


def stop(make, k: int = 5, **keys) -> None:
    """A dataset that was stopped at its k-th task."""
    with failing(tasks, "encode", k, KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        make(**keys)


@EVERY_INPUT
def test_unfinished_folder_names_the_command_that_finishes_it(make):
    whole = content(make(name="whole").folder)
    stop(make)
    with pytest.raises(UserError, match=rf"dataset {FOLDER} is not finished: run python prepare_data.py") as why:
        open_dataset(FOLDER)
    verb, *words = shlex.split(str(why.value).split(": run python ")[1])
    assert verb == "prepare_data.py"
    assert cli.parse(PrepareConfig, words) == make.config
    stop(make, 2, workers=3)
    with pytest.raises(UserError, match=r"--workers 3$"):  # the last command counts
        open_dataset(FOLDER)
    assert content(preparation.prepare(cli.parse(PrepareConfig, words)).folder) == whole


@pytest.mark.parametrize(
    "words",
    [
        "pydoc",
        "text --input 'a b.txt' '*.jsonl' in --column body --splits val train --val_fraction 1e-09 --workers 2",
        "hub --repo u/n --files 'x/*.parquet' --revision main --test_fraction 0.25 --cluster tcp://host:8786",
        "wikipedia --dump 20231101.simple --sample_size 1_000 --raw_dir 'my raw' --data_dir /d --name \"it's\"",
        "fineweb --tokenizer gpt2 --shard_tokens 10",
    ],
)
def test_again_is_the_command_line_that_gives_the_config(words):
    config = cli.parse(PrepareConfig, shlex.split(words))
    again = shlex.split(progress.again(config))
    assert again[:2] == ["python", "prepare_data.py"]
    assert cli.parse(PrepareConfig, again[2:]) == config


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"test_fraction": 0.2}, "test_fraction 0.1 (now 0.2)"),
        ({"shard_tokens": 1000}, "shard_tokens 2000 (now 1000)"),
        ({"sample_size": 110}, "sample_size None (now 110)"),
        ({"splits": ("train",)}, "only_splits None (now ['train'])"),
        ({"input": ("in", "more.txt")}, "revision"),
    ],
)
def test_unfinished_dataset_of_other_settings_is_kept(make, keys, said):
    files(Path(), more="more")
    stop(make, LATE)
    before = content(FOLDER)
    with pytest.raises(UserError, match=f"{FOLDER} already holds an unfinished dataset of other settings") as why:
        make(**keys)
    for part in (said, "--name"):
        assert part in str(why.value)
    assert content(FOLDER) == before
    whole = content(make(name="whole").folder)
    assert content(make(workers=2).folder) == whole, "the number of workers changes nothing"


@pytest.mark.parametrize("make", ["hash", "own splits"], indirect=True)
def test_raw_files_that_changed_are_refused(make):
    stop(make, LATE)
    before = content(FOLDER)
    name = "in/b.jsonl" if Path("in").exists() else "raw/hub/user/data/train.jsonl"
    with open(name, "a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(
        UserError, match=r"revision|raw files changed since this dataset was begun: move data/mine away"
    ):
        make()
    assert content(FOLDER) == before


@pytest.mark.parametrize("damage", [b"", b"{}", b"[]", b"null", b'{"command": "x", "settings"', b"\xff\0"])
def test_damaged_progress_is_one_line(make, damage):
    stop(make)
    (FOLDER / "progress.json").write_bytes(damage)
    before = content(FOLDER)
    with pytest.raises(UserError, match=r"progress.json is damaged: move data/mine away and run again"):
        make()
    with pytest.raises(UserError, match=r"data/mine is not finished: run python prepare_data.py"):
        open_dataset(FOLDER)
    assert content(FOLDER) == before


@pytest.mark.parametrize("keys", [{"test_fraction": 0.2}, {"shard_tokens": 1000}, {"input": ("in", "more.txt")}])
def test_before_a_shard_is_finished_another_dataset_can_take_its_place(make, keys):
    """A mistake that was noticed early: nothing is lost, so nobody has to remove anything."""
    files(Path(), more="more")
    whole = content(make(name="whole", **keys).folder)
    stop(make)
    assert content(make(**keys).folder) == whole


def test_unfinished_dataset_of_another_version_is_refused(make, monkeypatch):
    stop(make, LATE)
    monkeypatch.setattr(progress, "TASKS", progress.TASKS + 1)
    with pytest.raises(UserError, match="another version of flatGPT began this dataset: move data/mine away"):
        make()


def test_shard_lost_since_the_stop_is_refused(make):
    stop(make)
    lost = max(FOLDER.glob("train_*"))
    lost.unlink()
    with pytest.raises(UserError, match=f"{lost} is not as it was when the work stopped: move {FOLDER} away"):
        make()


def test_other_peoples_shards_are_left_alone(make):
    whole = content(make(name="whole").folder)
    FOLDER.mkdir()
    (FOLDER / "train.bin").write_bytes(b"theirs")
    with pytest.raises(UserError, match=r"data/mine holds other shards \(train.bin\): give --name, or move it away"):
        make()
    assert content(FOLDER) == {"train.bin": b"theirs"}
    (FOLDER / "train.bin").unlink()
    for name in ("train_000007.bin", "val_000000.bin.tmp"):  # ours, of a work that nobody remembers
        (FOLDER / name).write_bytes(b"old")
    assert content(make().folder) == whole


def test_cuts_are_told_at_the_end_also_of_work_that_was_stopped(make):
    said = []
    Path("in/c/run.txt").write_text("x" * 1000)
    make(said.append, tokenizer="gpt2")
    cuts = [line for line in said if "cut in" in line]
    assert len(cuts) == 1
    assert cuts[0].startswith("note: cut in 2 places, in runs of more than 1,000,000 characters")
    stop(make, make.encoded - 2, name="stopped", tokenizer="gpt2")
    said.clear()
    make(said.append, name="stopped", tokenizer="gpt2")
    assert [line for line in said if "cut in" in line] == cuts
    said.clear()
    make(said.append, name="bytes")
    assert not any("cut in" in line for line in said), "bytes can be cut anywhere"


def test_progress_is_told_line_by_line_where_there_is_no_terminal(make, monkeypatch, capsys):
    monkeypatch.setattr(preparation, "LINE_SECONDS", -1)
    make()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= make.encoded
    parts = [int(line.split(": ")[1].split("%")[0]) for line in lines]
    assert parts == sorted(parts)
    assert parts[0] < 10
    tokens = [int(line.split("%, ")[1].split(" tokens")[0].replace(",", "")) for line in lines]
    assert tokens[-1] == sum(entry["tokens"] for entry in open_dataset(FOLDER).meta["splits"].values())


# ---------------------------------------------------------------------------------------------------------------------
# two at once


def test_folder_at_work_is_locked(make):
    """The second call is refused, also by name of a finished dataset's settings, and changes nothing for the first."""
    whole = content(make(name="whole").folder)
    answers = []

    def during(*args):
        if len(answers) < 3:
            before = content(FOLDER)
            with pytest.raises(UserError) as why:
                preparation.prepare(make.config, lambda line: None)
            answers.append(str(why.value))
            assert content(FOLDER) == before
        return encode(*args)

    encode, tasks.encode = tasks.encode, during
    try:
        assert content(make().folder) == whole
    finally:
        tasks.encode = encode
    assert answers == [f"{FOLDER}: another prepare_data.py is at work in this folder; wait for it"] * 3


def test_dataset_that_another_call_has_just_finished_is_left_alone(make, monkeypatch):
    """It came while this one looked for its vocabulary."""
    load, times = tokenizer.load, {}

    def slowly(name):
        monkeypatch.setattr(tokenizer, "load", load)
        make()
        times.update({path.name: path.stat().st_mtime_ns for path in FOLDER.iterdir()})
        make.encoded = 0
        return load(name)

    monkeypatch.setattr(tokenizer, "load", slowly)
    config = PrepareConfig(
        source="text", input=("in",), test_fraction=0.1, tokenizer="byte", shard_tokens=2000, name="mine"
    )
    assert preparation.prepare(config, lambda line: None).folder == FOLDER
    assert make.encoded == 0
    assert {path.name: path.stat().st_mtime_ns for path in FOLDER.iterdir()} == times


# ---------------------------------------------------------------------------------------------------------------------
# folders that cannot be written


def test_target_that_cannot_be_made(in_tmp):
    files(in_tmp, a=TEXT)
    answer = refusal("a.txt", data_dir="a.txt/x")
    assert answer.startswith("a.txt/x/text_byte could not be written: ")
    assert "--data_dir" in answer
    assert "\n" not in answer


@pytest.mark.parametrize("shard_tokens", [1100, 900])
def test_full_disk_leaves_an_unfinished_dataset_that_the_next_call_finishes(in_tmp, shard_tokens):
    """2,200 bytes a shard: the first one fails; 1,800 bytes: the shards fit, and the note of twenty does not."""
    files(in_tmp, a=TEXT)
    with full_disk(room=2000):
        answer = refusal("a.txt", shard_tokens=shard_tokens)
    kept = "what is done is kept, and the same command goes on from there"
    assert answer == f"data/text_byte could not be written: File too large; not finished: {kept}"
    with pytest.raises(UserError, match=r"is not finished: run python prepare_data.py text --input a.txt"):
        open_dataset(Path("data/text_byte"))
    data = from_text("a.txt", shard_tokens=shard_tokens)
    assert "".join(texts(data, "train") + texts(data, "val")) == TEXT
    assert set(content(data.folder)) == {
        "meta.json",
        *(f["name"] for e in data.meta["splits"].values() for f in e["files"]),
    }


def test_full_disk_at_the_manifest(make):
    whole = content(make().folder)
    shutil.rmtree(FOLDER)

    def write_meta(folder, meta):
        with full_disk(room=100):
            return write(folder, meta)

    write, preparation.write_meta = preparation.write_meta, write_meta
    try:
        with pytest.raises(UserError, match="could not be written: File too large; not finished: what is done is kept"):
            make()
    finally:
        preparation.write_meta = write
    assert content(make().folder) == whole


def test_going_on_needs_room_for_the_rest_only(make, monkeypatch):
    """What is on the disk already is not asked for again."""
    whole = content(make(name="whole").folder)
    stop(make, make.encoded - 2)
    size = sum(path.stat().st_size for path in Path("in").rglob("*") if path.is_file())  # its text, or near it
    free(monkeypatch, size)  # all of it would take twice as much
    assert content(make().folder) == whole


@pytest.fixture
def small_disk(in_tmp):
    """A file system of one megabyte in data/; gives a call that changes its size or makes it read-only."""
    Path("data").mkdir()

    def mount(*words) -> bool:
        return subprocess.run(["mount", "-t", "tmpfs", *words, "none", "data"], capture_output=True).returncode == 0

    if shutil.which("mount") is None or not mount("-o", "size=1m"):
        pytest.skip("no file system can be mounted here: it takes root, and Linux")
    yield lambda options: mount("-o", f"remount,{options}") or pytest.fail("remount")
    gc.collect()  # an error keeps the frames alive that have the files open
    subprocess.run(["umount", "data"], check=True)


@pytest.mark.slow
def test_disk_that_is_really_full(small_disk, monkeypatch):
    """Refused beforehand; where the estimate was too low, stopped, and finished when there is room."""
    write(Path("a.jsonl"), [f"{n} bottles " * 100 for n in range(1500)])
    answer = refusal("a.jsonl", name="mine")
    assert "GB are needed in" in answer
    assert list(Path("data").iterdir()) == []
    with monkeypatch.context() as patch:
        free(patch, 1 << 40)
        answer = refusal("a.jsonl", name="mine", shard_tokens=100_000)
        assert f"{NO_SPACE}; not finished: what is done is kept" in answer
        assert len(list(FOLDER.glob("train_*.bin"))) >= 4
        assert NO_SPACE in refusal("a.jsonl", name="mine", shard_tokens=100_000)
    small_disk("size=20m")
    data = from_text("a.jsonl", name="mine", shard_tokens=100_000)
    assert content(data.folder) == content(from_text("a.jsonl", data_dir="other", shard_tokens=100_000).folder)


@pytest.mark.slow
def test_disk_that_is_read_only(small_disk):
    files(Path(), a=TEXT)
    small_disk("ro")
    answer = refusal("a.txt")
    assert answer == "data/text_byte could not be written: Read-only file system; another place: --data_dir"
