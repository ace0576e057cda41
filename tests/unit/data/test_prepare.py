"""The folder that prepare makes: its bytes and its manifest, what is kept and refused, and stopping at any moment."""

import contextlib
import errno
import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from dataset_files import WRITTEN, by_hash, full_disk, mixed, write
from in_process import TEXT
from prepared import content, files, from_text, prepare, refusal, texts

from config import PrepareConfig, UserError
from flatgpt.cli import cli
from flatgpt.data import prepare as preparation
from flatgpt.data import progress, shards, tokenizer
from flatgpt.data.dataset import open_dataset

FOLDER = Path("data/mine")


# ---------------------------------------------------------------------------------------------------------------------
# the folder and its manifest


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", ["byte", "gpt2"])
def test_ids_are_those_of_each_document_alone(in_tmp, name):
    """Files of all formats; and the manifest's counts are those of a plain loop."""
    documents = mixed()
    if name == "byte":  # runs without a break are split, which only in bytes changes no id
        documents.append("x" * 1000 + "\ttab " + "y" * 1000)
        Path("in/e.txt").write_text(documents[-1])
    written = by_hash(documents, 0.2, 0.1)
    data = from_text("in", tokenizer=name, val_fraction=0.2, test_fraction=0.1, shard_tokens=1000)
    encoding = tokenizer.load(name)
    for split, entry in data.meta["splits"].items():
        expected = [i for text in written[split] for i in [*encoding.encode_ordinary(text), encoding.eot_token]]
        assert data.tokens(split)[:].tolist() == expected
        assert entry["tokens"] == len(expected)
        assert entry["documents"] == len(written[split])
        assert entry["bytes"] == sum(len(text.encode()) for text in written[split])
        assert [file["tokens"] for file in entry["files"][:-1]] == [1000] * (len(entry["files"]) - 1)
        for file in entry["files"]:
            raw = (data.folder / file["name"]).read_bytes()
            assert (len(raw), hashlib.sha256(raw).hexdigest()) == (2 * file["tokens"], file["sha256"])
    meta = json.loads((data.folder / "meta.json").read_text(encoding="utf-8"))
    facts = {"format": 1, "source": "text", "tokenizer": name, "encoder": "tiktoken", "dtype": "uint16"}
    facts |= {"vocab_size": encoding.n_vocab, "eot_id": encoding.eot_token, "end_of_text": True}
    facts |= {"ranks_sha256": tokenizer.ranks_hash(encoding)}
    assert facts.items() <= meta.items()
    named = {file["name"] for entry in meta["splits"].values() for file in entry["files"]}
    assert set(content(data.folder)) == {"meta.json", *named}


@pytest.mark.usefixtures("small_chunks")
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


def test_dataset_depends_on_input_and_settings_alone(in_tmp):
    mixed()
    one = from_text("in", shard_tokens=1000)
    shutil.move("in", "elsewhere")
    two = from_text("elsewhere", shard_tokens=1000, workers=3, name="two", data_dir="there/deep")
    assert content(one.folder) == content(two.folder)


@pytest.mark.parametrize(
    ("words", "folder"),
    [
        ("pydoc", "data/pydoc"),
        ("pydoc --tokenizer byte", "data/pydoc"),
        ("pydoc --tokenizer gpt2", "data/pydoc_gpt2"),
        ("pydoc --data_dir there", "there/pydoc"),
        ("text --input a.txt", "data/text"),
        ("text --input a.txt --tokenizer byte", "data/text_byte"),
        ("text --input a.txt --tokenizer byte --name mine", "data/mine"),
        ("wikipedia --dump 20231101.en", "data/wikipedia"),
        ("wikipedia --dump 20231101.simple --tokenizer byte", "data/wikipedia_20231101.simple_byte"),
        ("hub --repo user/stories", "data/stories"),
    ],
)
def test_folder_is_named_after_source_and_tokenizer(words, folder):
    assert preparation.dataset_folder(cli.parse(PrepareConfig, shlex.split(words))) == Path(folder)


def test_same_settings_again_do_nothing(in_tmp):
    files(in_tmp, a=TEXT)
    folder = from_text("a.txt").folder
    before, lines = content(folder), []
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = from_text("a.txt", log=lines.append)
    assert lines == [f"{folder} is there already, with these settings; nothing to do"]
    assert content(folder) == before
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times
    files(in_tmp, copy=TEXT)  # the text is what counts, not the file's name; and 0.1 is the default
    assert from_text("copy.txt", val_fraction=0.1).manifest_hash == again.manifest_hash


def test_manifest_without_an_encoder_is_tiktokens(in_tmp):
    """Earlier versions did not write it, and counted words."""
    files(in_tmp, a=TEXT)
    path = from_text("a.txt", name="mine").folder / "meta.json"
    meta = json.loads(path.read_text())
    assert meta.pop("encoder") == "tiktoken"
    path.write_text(json.dumps(meta | {"splits": {s: {**e, "words": 5} for s, e in meta["splits"].items()}}))
    lines = []
    from_text("a.txt", name="mine", log=lines.append)
    assert "nothing to do" in lines[0]
    assert "encoder tiktoken (now gigatoken)" in refusal("a.txt", name="mine", encoder="gigatoken")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"val_fraction": 0.2}, ["val_fraction 0.1 (now 0.2)"]),
        ({"shard_tokens": 1000}, ["shard_tokens 100000000 (now 1000)"]),
        ({"tokenizer": "gpt2"}, ["tokenizer byte (now gpt2)"]),
        ({"text": "another text\n" * 100}, ["revision"]),
        ({"val_fraction": 0.2, "shard_tokens": 1000}, ["val_fraction", "shard_tokens"]),
    ],
)
def test_other_settings_are_refused_naming_them(in_tmp, change, named):
    files(in_tmp, a=TEXT)
    folder = from_text("a.txt", name="mine").folder
    before, change = content(folder), dict(change)
    files(in_tmp, a=change.pop("text", TEXT))
    answer = refusal("a.txt", name="mine", **change)
    for part in (str(folder), "--name", *named):
        assert part in answer
    assert answer.split("settings: ")[1].split(". Give")[0].count(" (now ") == len(named)
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


@pytest.fixture
def make(request, in_tmp, small_chunks, monkeypatch):
    """Makes FOLDER, of many tasks and shards, of the input that the test's parameter names; counts what it encodes."""

    def encode(*args):
        made.encoded += 1
        return encode_task(*args)

    def made(log=lambda line: None, **keys):
        made.encoded = 0
        made.config = PrepareConfig(**{"tokenizer": "byte", "name": "mine", "shard_tokens": 2000, **settings, **keys})
        return preparation.prepare(made.config, log)

    encode_task = preparation.encode_task
    monkeypatch.setattr(preparation, "encode_task", encode)
    write_input, settings = INPUTS[getattr(request, "param", "hash")]
    write_input()
    return made


@contextlib.contextmanager
def failing(owner, name: str, k: int, error: Callable[[], BaseException] | None, after: bool = False):
    """The k-th call of owner.name, from 0, raises: instead of doing its work, or after it. Gives the calls."""
    real, calls = getattr(owner, name), []

    def call(*args, **keys):
        calls.append(args)
        fails = len(calls) - 1 == k
        if fails and not after:
            raise error()
        answer = real(*args, **keys)
        if fails:
            raise error()
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, call)
        yield calls


def some_of(total: int, n: int) -> list[int]:
    """The numbers below total, about n of them: evenly, and the first and the last."""
    return sorted({*range(0, total, 1 + total // n), total - 1})


def saved() -> int:
    """How many tasks need not be done again."""
    path = FOLDER / "progress.json"
    passes = json.loads(path.read_text())["passes"].values() if path.exists() else ()
    return sum(state["tasks"] for state in passes)


def no_space() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


@EVERY_INPUT
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_stopped_at_any_task_it_goes_on_from_there(make, error, capsys):
    whole, total = content(make().folder), make.encoded
    assert total > 8
    for k in some_of(total, 8 if error is KeyboardInterrupt else 3):
        shutil.rmtree(FOLDER)
        with failing(preparation, "encode_task", k, error), pytest.raises(error):
            make()
        stopped = f"{FOLDER}: stopped; what is done is kept, and the same command goes on from there\n"
        assert capsys.readouterr().err == stopped * (error is KeyboardInterrupt)
        assert saved() == k
        lines = []
        assert content(make(lines.append).folder) == whole
        assert make.encoded == total - k
        assert lines[-1] == f"{FOLDER}: going on where the work was stopped"


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, no_space])
@pytest.mark.parametrize(("owner", "name"), [(shards.ShardWriter, "add"), (os, "replace"), (os, "fsync")])
def test_stopped_at_any_write_it_goes_on(make, owner, name, error, after):
    """Also between the shards of a task's splits, and between a file and its name."""
    with failing(owner, name, -1, None) as calls:
        whole, total = content(make().folder), make.encoded
    for k in some_of(len(calls), 6):
        shutil.rmtree(FOLDER)
        with failing(owner, name, k, error, after), pytest.raises((UserError, KeyboardInterrupt)) as caught:
            make()
        message = "could not be written: No space left on device; not finished: what is done is kept"
        assert error is KeyboardInterrupt or message in str(caught.value)
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
    for moment in [different[k] for k in some_of(len(different), 10)]:
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
    with failing(preparation, "encode_task", k, KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        make(**keys)


@EVERY_INPUT
def test_unfinished_folder_names_the_command_that_finishes_it(make):
    whole = content(make(name="whole").folder)
    stop(make)
    with pytest.raises(UserError, match=rf"dataset {FOLDER} is not finished: run python prepare_data.py") as caught:
        open_dataset(FOLDER)
    verb, *words = shlex.split(str(caught.value).split(": run python ")[1])
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
        "fineweb --tokenizer gpt2 --shard_tokens 10 --encoder gigatoken",
    ],
)
def test_command_line_gives_the_config_back(words):
    config = cli.parse(PrepareConfig, shlex.split(words))
    again = shlex.split(progress.command_line(config))
    assert again[:2] == ["python", "prepare_data.py"]
    assert cli.parse(PrepareConfig, again[2:]) == config


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"test_fraction": 0.2}, "test_fraction 0.1 (now 0.2)"),
        ({"shard_tokens": 1000}, "shard_tokens 2000 (now 1000)"),
        ({"sample_size": 110}, "sample_size None (now 110)"),
        ({"splits": ("train",)}, "only_splits None (now ['train'])"),
        ({"input": ("in", "more.txt")}, "revision"),
    ],
)
def test_unfinished_dataset_of_other_settings_is_kept(make, keys, message):
    files(Path(), more="more")
    stop(make, LATE)
    before = content(FOLDER)
    with pytest.raises(UserError, match=f"{FOLDER} already holds an unfinished dataset of other settings") as caught:
        make(**keys)
    for part in (message, "--name"):
        assert part in str(caught.value)
    assert content(FOLDER) == before
    whole = content(make(name="whole").folder)
    assert content(make(workers=2).folder) == whole, "the number of workers changes nothing"


def test_encoder_of_an_unfinished_dataset_is_a_setting(make):
    """That of an earlier version, which names none, is tiktoken."""
    whole = content(make(name="whole").folder)
    stop(make, LATE)
    path = FOLDER / "progress.json"
    found = json.loads(path.read_text())
    del found["settings"]["encoder"]
    path.write_text(json.dumps(found))
    settings = {**found["settings"], "encoder": "gigatoken"}
    with pytest.raises(UserError, match=r"encoder tiktoken \(now gigatoken\)"):
        progress.check_settings(FOLDER, "an unfinished dataset", found["settings"], settings)
    assert content(make().folder) == whole


@pytest.mark.parametrize("make", ["own splits"], indirect=True)
def test_raw_files_that_changed_are_refused(make):
    stop(make, LATE)
    before = content(FOLDER)
    with open("raw/hub/user/data/train.jsonl", "a") as file:
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


@pytest.mark.parametrize("keys", [{"test_fraction": 0.2}, {"input": ("in", "more.txt")}])
def test_before_a_shard_is_finished_another_dataset_can_take_its_place(make, keys):
    """A mistake that was noticed early: nothing is lost, so nobody has to remove anything."""
    files(Path(), more="more")
    whole = content(make(name="whole", **keys).folder)
    stop(make)
    assert content(make(**keys).folder) == whole


@pytest.mark.parametrize("make", ["sample", "hash"], indirect=True)
def test_tasks_of_an_earlier_version_go_on_where_they_are_the_same(make):
    """Those of a sample are cut otherwise since then."""
    whole = content(make(name="whole").folder)
    stop(make, make.encoded - 1)
    found = json.loads((FOLDER / "progress.json").read_text())
    (FOLDER / "progress.json").write_text(json.dumps({**found, "tasks": 1}))
    if make.config.sample_size:
        with pytest.raises(UserError, match="another version of flatGPT began this dataset: move data/mine away"):
            make()
    else:
        assert content(make().folder) == whole


def test_shard_lost_since_the_stop_is_refused(make):
    stop(make)
    lost = max(FOLDER.glob("train_*"))
    lost.unlink()
    with pytest.raises(UserError, match=f"{lost} is not as it was when the work stopped: move {FOLDER} away"):
        make()


def test_shards_of_others_are_left_alone(make):
    whole = content(make(name="whole").folder)
    FOLDER.mkdir()
    (FOLDER / "train.bin").write_bytes(b"theirs")
    with pytest.raises(UserError, match=r"data/mine holds other shards \(train.bin\): give --name, or move it away"):
        make()
    assert content(FOLDER) == {"train.bin": b"theirs"}
    (FOLDER / "train.bin").unlink()
    for name in ("train_000007.bin", "val_000000.bin.tmp"):  # ours, of work that is not recorded anywhere
        (FOLDER / name).write_bytes(b"old")
    assert content(make().folder) == whole


def test_forced_splits_are_counted_also_in_work_that_was_stopped(make):
    lines = []
    Path("in/c/run.txt").write_text("x" * 1000)
    make(lines.append, tokenizer="gpt2")
    notes = [line for line in lines if "cut in" in line]
    assert len(notes) == 1
    assert notes[0].startswith("note: cut in 2 places, in runs of more than 1,000,000 characters")
    stop(make, make.encoded - 2, name="stopped", tokenizer="gpt2")
    lines.clear()
    make(lines.append, name="stopped", tokenizer="gpt2")
    assert [line for line in lines if "cut in" in line] == notes
    lines.clear()
    make(lines.append, name="bytes")
    assert not any("cut in" in line for line in lines), "bytes can be split anywhere"


def test_progress_is_printed_line_by_line_where_there_is_no_terminal(make, monkeypatch, capsys):
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
# two at once, and folders that cannot be written


def test_folder_at_work_is_locked(make, monkeypatch):
    """The second call is refused, and changes nothing for the first."""
    whole = content(make(name="whole").folder)
    answers, encode_task = [], preparation.encode_task

    def during(*args):
        if len(answers) < 3:
            before = content(FOLDER)
            with pytest.raises(UserError) as caught:
                preparation.prepare(make.config, lambda line: None)
            answers.append(str(caught.value))
            assert content(FOLDER) == before
        return encode_task(*args)

    monkeypatch.setattr(preparation, "encode_task", during)
    assert content(make().folder) == whole
    assert answers == [f"{FOLDER}: another prepare_data.py is at work in this folder; wait for it"] * 3


def test_dataset_that_another_call_has_just_finished_is_left_alone(make, monkeypatch):
    """It was finished while this one loaded its vocabulary."""
    load, times = tokenizer.load, {}

    def slowly(name):
        monkeypatch.setattr(tokenizer, "load", load)
        make()
        times.update({path.name: path.stat().st_mtime_ns for path in FOLDER.iterdir()})
        make.encoded = 0
        return load(name)

    make(name="whole")
    config = PrepareConfig(**{**vars(make.config), "name": "mine"})
    monkeypatch.setattr(tokenizer, "load", slowly)
    assert preparation.prepare(config, lambda line: None).folder == FOLDER
    assert make.encoded == 0
    assert {path.name: path.stat().st_mtime_ns for path in FOLDER.iterdir()} == times


def test_folder_that_cannot_be_made(in_tmp):
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
    named = [file["name"] for entry in data.meta["splits"].values() for file in entry["files"]]
    assert set(content(data.folder)) == {"meta.json", *named}


def test_full_disk_at_the_manifest(make, monkeypatch):
    whole = content(make().folder)
    shutil.rmtree(FOLDER)
    write_meta = preparation.write_meta

    def fail(folder, meta):
        with full_disk(room=100):
            return write_meta(folder, meta)

    monkeypatch.setattr(preparation, "write_meta", fail)
    with pytest.raises(UserError, match="could not be written: File too large; not finished: what is done is kept"):
        make()
    monkeypatch.setattr(preparation, "write_meta", write_meta)
    assert content(make().folder) == whole
