"""The folder that prepare makes: its bytes and its manifest, what is kept and refused, and stopping at any moment."""

import contextlib
import errno
import hashlib
import json
import os
import shlex
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from dataset_files import WRITTEN, by_hash, full_disk, mixed, write
from in_process import TEXT, first_fast
from prepared import content, files, from_text, refusal

from config import PrepareConfig, UserError
from flatgpt.cli import cli
from flatgpt.data import prepare as preparation
from flatgpt.data import shards, tokenizer
from flatgpt.data.dataset import open_dataset
from flatgpt.data.sources import dataset_folder

FOLDER = Path("data/mine")


# ---------------------------------------------------------------------------------------------------------------------
# the folder and its manifest


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", ["byte", "gpt2"])
def test_ids_are_those_of_each_document_alone(in_tmp, name):
    """Files of all formats; and the manifest's counts are those of a plain loop."""
    documents = mixed()
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
    facts = {"format": 1, "source": "text", "tokenizer": name, "encoder": "tiktoken", "dtype": "uint16"}
    facts |= {"vocab_size": encoding.n_vocab, "eot_id": encoding.eot_token, "end_of_text": True}
    facts |= {"ranks_sha256": tokenizer.ranks_hash(encoding)}
    assert facts.items() <= json.loads((data.folder / "meta.json").read_text()).items()
    named = {file["name"] for entry in data.meta["splits"].values() for file in entry["files"]}
    assert set(content(data.folder)) == {"meta.json", *named}


@pytest.mark.parametrize(
    ("words", "folder"),
    [
        ("pydoc --tokenizer byte --data_dir there", "there/pydoc"),
        ("pydoc --tokenizer gpt2", "data/pydoc_gpt2"),
        ("text --input a.txt --tokenizer byte --name mine", "data/mine"),
        ("wikipedia --dump 20231101.simple --tokenizer byte", "data/wikipedia_20231101.simple_byte"),
        ("hub --repo user/stories", "data/stories"),
    ],
)
def test_folder_is_named_after_source_and_tokenizer(words, folder):
    assert dataset_folder(cli.parse(PrepareConfig, shlex.split(words))) == Path(folder)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"val_fraction": 0.1, "workers": 3}, []),
        ({"val_fraction": 0.2, "shard_tokens": 1000}, ["val_fraction 0.1 (now 0.2)", "shard_tokens", "(now 1000)"]),
        ({"tokenizer": "gpt2"}, ["tokenizer byte (now gpt2)"]),
        ({"encoder": "gigatoken"}, ["encoder tiktoken (now gigatoken)"]),
        ({"text": "another text\n" * 100}, ["the text of the input"]),
    ],
)
def test_finished_dataset_stays_and_other_settings_are_refused(in_tmp, change, named):
    """Earlier versions wrote no encoder, which was tiktoken. The text is what counts, not its file's name."""
    files(in_tmp, a=TEXT)
    folder = from_text("a.txt", name="mine").folder
    meta = json.loads((folder / "meta.json").read_text())
    assert meta.pop("encoder") == "tiktoken"
    (folder / "meta.json").write_text(json.dumps(meta))
    before, lines, change = content(folder), [], dict(change)
    files(in_tmp, b=change.pop("text", TEXT))
    if named:
        answer = refusal("b.txt", name="mine", **change)
        assert [part for part in (str(folder), "--name", *named) if part not in answer] == []
    else:
        from_text("b.txt", name="mine", log=lines.append, **change)
        assert lines == [f"{folder} already exists, with the same settings; nothing to do"]
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


KEPT = "run the same command again to resume"


@EVERY_INPUT
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_stopped_at_any_task_it_goes_on_from_there(make, error, capsys):
    whole, total = content(make().folder), make.encoded
    assert total > 8
    for k in some_of(total, 8 if error is KeyboardInterrupt else 3):
        shutil.rmtree(FOLDER)
        with failing(preparation, "encode_task", k, error), pytest.raises(error):
            make()
        lines = [
            line for line in capsys.readouterr().err.splitlines() if not line.startswith("note: the text contains")
        ]
        assert lines == [f"{FOLDER}: stopped; {KEPT}"] * (error is KeyboardInterrupt)
        assert saved() == k
        with pytest.raises(UserError, match=rf"dataset {FOLDER} is not finished: run python "):
            open_dataset(FOLDER)
        lines = []
        assert content(make(lines.append, workers=3).folder) == whole
        assert make.encoded == total - k
        assert (f"{FOLDER}: resuming" in lines) == (k > 0)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("error", first_fast([no_space, KeyboardInterrupt]))
@pytest.mark.parametrize(("owner", "name"), [(shards.ShardWriter, "add"), (os, "replace"), (os, "fsync")])
def test_stopped_at_any_write_it_goes_on(make, owner, name, error, after):
    """Also between the shards of a task's splits, and between a file and its name."""
    with failing(owner, name, -1, None) as calls:
        whole, total = content(make().folder), make.encoded
    for k in some_of(len(calls), 6):
        shutil.rmtree(FOLDER)
        with failing(owner, name, k, error, after), pytest.raises((UserError, KeyboardInterrupt)) as caught:
            make()
        assert error is KeyboardInterrupt or f"could not be written: No space left on device; {KEPT}" in str(
            caught.value
        )
        left = total - saved()
        assert content(make().folder) == whole, f"stopped at call {k} of {len(calls)}"
        assert make.encoded <= left


@pytest.mark.slow
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
    assert len(different) > 20
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


def edit_progress(**changes) -> None:
    path = FOLDER / "progress.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("change", "keys", "message"),
    [
        (
            None,
            {"test_fraction": 0.2},
            r"unfinished dataset with other settings: test_fraction 0.1 \(now 0.2\).*--name",
        ),
        (None, {"splits": ("train",)}, r"only_splits None \(now \['train'\]\)"),
        (None, {"encoder": "gigatoken"}, r"encoder tiktoken \(now gigatoken\)"),
        (None, {"input": ("in", "more.txt")}, "the text of the input"),
        (lambda: edit_progress(raw="other files"), {}, "raw files other files"),
        (lambda: edit_progress(tasks=2), {}, r"tasks 2 \(now 1\)"),
        (
            lambda: max(FOLDER.glob("train_*")).unlink(),
            {},
            "was removed or truncated since the last call: move data/mine away",
        ),
        *(
            (
                lambda raw=raw: (FOLDER / "progress.json").write_bytes(raw),
                {},
                "progress.json is damaged: start again with --overwrite",
            )
            for raw in (b"", b"{}", b"null", b"[" * 9999, b'{"command": "x", "settings"', b"\xff\0")
        ),
        *(
            (
                lambda change=change: edit_progress(**change),
                {},
                "progress.json is damaged: start again with --overwrite",
            )
            for change in (
                *({key: wrong} for key in ("passes", "splits") for wrong in (3, [3], "train", {"train": 3}, {})),
                *(
                    {"passes": {"train": {"tasks": 5, "size": 1} | wrong}}
                    for wrong in ({"tasks": -1}, {"tasks": 10**30}, {"size": "1"})
                ),
                *({"settings": wrong} for wrong in (3, [3], "train")),
                {"splits": {"train": {"files": [], "waiting": "1", "documents": 1, "bytes": 1}}},
                {
                    "splits": {
                        "train": {"files": [{"name": "../a", "tokens": 1}], "waiting": 0, "documents": 1, "bytes": 1}
                    }
                },
            )
        ),
    ],
)
def test_unfinished_dataset_that_cannot_go_on_is_refused_and_kept(make, monkeypatch, change, keys, message):
    monkeypatch.setattr(preparation, "load_encoder", lambda *_: None)  # gigatoken need not be installed
    files(Path(), more="more")
    stop(make, LATE)
    if change:
        change()
    before = content(FOLDER)
    with pytest.raises(UserError, match=message):
        make(**keys)
    assert content(FOLDER) == before


@pytest.mark.parametrize("name", ["train_000000.bin", "train.bin"])
def test_shards_without_a_manifest_are_refused_and_kept(make, name):
    """meta.json was deleted, or the shards are another program's."""
    make()
    for path in FOLDER.iterdir():
        path.unlink() if name == "train.bin" or path.name == "meta.json" else None
    (FOLDER / name).write_bytes(b"12")
    before = content(FOLDER)
    with pytest.raises(
        UserError,
        match=rf"{FOLDER} contains other shards \(t.*choose another --name, or move it aside with --overwrite",
    ):
        make(tokenizer="gpt2")
    assert content(FOLDER) == before


def test_before_a_shard_is_finished_another_dataset_can_take_its_place(make):
    """A mistake that was noticed early: nothing is lost, so nobody has to remove anything."""
    whole = content(make(name="whole", test_fraction=0.2).folder)
    stop(make)
    assert content(make(test_fraction=0.2).folder) == whole


def test_unfinished_folder_of_an_earlier_version_goes_on(make):
    """It has more keys, and no encoder; and shards that no record names are removed."""
    whole = content(make(name="whole").folder)
    stop(make, LATE)
    found = json.loads((FOLDER / "progress.json").read_text())
    del found["settings"]["encoder"]
    passes = {split: {**state, "done": False} for split, state in found["passes"].items()}
    edit_progress(settings=found["settings"], passes=passes, cuts=0)
    (FOLDER / "val_000009.bin.tmp").write_bytes(b"old")
    assert content(make().folder) == whole


@pytest.mark.parametrize("state", ["finished", "settings", "unfinished", "damaged", "manifest", "foreign"])
def test_overwrite_moves_what_is_there_aside(make, state):
    """Each time to another name, also twice in a second."""
    whole = content(make(name="whole", test_fraction=0.2).folder)
    stop(make, LATE) if state in ("unfinished", "damaged") else make()
    if state == "damaged":
        edit_progress(passes=3)
    if state == "manifest":
        (FOLDER / "meta.json").write_bytes(b"{")
    if state == "foreign":
        (FOLDER / "meta.json").unlink()
    keys = {} if state == "finished" else {"test_fraction": 0.2}
    before, lines = content(FOLDER), []
    made = make(lines.append, overwrite=True, **keys)
    (old,) = Path("data").glob("mine.old-*")
    assert f"the existing data/mine was moved to {old}" in lines
    assert content(old) == before
    assert content(made.folder) == (before if state == "finished" else whole)
    make(overwrite=True, **keys)
    assert len(list(Path("data").glob("mine.old-*"))) == 2


def test_overwrite_goes_on_with_what_it_began(make):
    whole = content(make().folder)
    stop(make, LATE, overwrite=True)
    (old,) = Path("data").glob("mine.old-*")
    assert content(old) == whole
    assert content(make(overwrite=True).folder) == whole
    assert list(Path("data").glob("mine.old-*")) == [old]


def test_overwrite_does_not_move_its_input(in_tmp, monkeypatch):
    files(in_tmp, a=TEXT)
    folder = from_text("a.txt", name="mine").folder
    files(folder, b=TEXT)
    before = content(folder)
    assert "data/mine contains data/mine/b.txt, which is read" in refusal(
        "data/mine/b.txt", name="mine", overwrite=True
    )
    monkeypatch.chdir(folder)
    assert "contains the current folder" in refusal(
        in_tmp / "a.txt", name="mine", data_dir=str(in_tmp / "data"), overwrite=True
    )
    monkeypatch.chdir(in_tmp)
    assert content(folder) == before


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
    name = f"process {os.getpid()} on {socket.gethostname()}"
    assert answers == [f"{FOLDER} is in use by {name}: wait for it, stop it, or choose another --data_dir"] * 3


def test_error_inside_the_locked_work_is_no_lock(make, monkeypatch):
    """For example of a pipe that does not block."""
    with failing(preparation, "encode_task", 0, BlockingIOError), pytest.raises(BlockingIOError):
        make()


def test_dataset_that_another_call_has_just_finished_is_left_alone(make, monkeypatch):
    """It was finished while this one made its plan."""
    make_plan, lines = preparation.make_plan, []

    def slowly(*args):
        monkeypatch.setattr(preparation, "make_plan", make_plan)
        make()
        return make_plan(*args)

    monkeypatch.setattr(preparation, "make_plan", slowly)
    make(lines.append)
    assert lines == [f"{FOLDER} already exists, with the same settings; nothing to do"]


@pytest.mark.parametrize(
    ("shard_tokens", "room", "file"),
    [
        (1100, 2000, "train_000000.bin.tmp"),
        (900, 2000, "meta.json"),
        (10**6, 350, "progress.json"),
        (9, 9, ".lock"),
    ],
)
def test_full_disk_leaves_an_unfinished_dataset_that_the_next_call_finishes(in_tmp, shard_tokens, room, file):
    """The file that does not fit is named."""
    files(in_tmp, a=TEXT)
    with full_disk(room=room):
        answer = refusal("a.txt", shard_tokens=shard_tokens)
    assert (
        answer
        == f"data/text_byte/{file} could not be written: File too large; {KEPT}, or choose another folder: --data_dir"
    )
    data = from_text("a.txt", shard_tokens=shard_tokens)
    assert sum(entry["bytes"] for entry in data.meta["splits"].values()) == len(TEXT.encode())
