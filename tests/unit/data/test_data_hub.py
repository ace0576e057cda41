"""Datasets on the hub: what is asked and fetched, what the disk already has, and what is said when it goes wrong.

The hub is a server on this machine that answers huggingface_hub as the real one does.
"""

import gzip
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from hub_host import hub_environment
from huggingface_hub import constants
from processes import ROOT, command, running
from test_sources import content, prepare, texts

from config import UserError
from flatgpt.data import hub, readers
from flatgpt.data.dataset import open_dataset

WIKITEXT = "b08601e04326c79dfdd32d625aee71d232d685c3"
WIKIPEDIA = "b04c8d1ceb2f5cd4588862100d08de323dccfbaa"
FINEWEB = "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"


def verb(host, *words, **env):
    """prepare_data.py as a user runs it, in the current folder."""
    return command("prepare_data", *words, "--tokenizer", "byte", cwd=Path.cwd(), env=hub_environment(host, **env))


def parquet(*rows: str, column: str = "text") -> bytes:
    file = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(rows)), column: rows}), file)
    return file.getvalue().to_pybytes()


def lines(*rows: str, column: str = "text") -> bytes:
    return "".join(json.dumps({"id": 1, column: row}) + "\n" for row in rows).encode()


FILES = {
    ".gitattributes": b"*.parquet filter=lfs",
    "README.md": b"# A dataset\n",
    "data/dev-00000-of-00001.parquet": parquet("five"),
    "data/test-00000-of-00001.parquet": parquet("six", "", "seven"),
    "data/train-00000-of-00002.parquet": parquet("one", "two"),
    "data/train-00001-of-00002.parquet": parquet("three"),
    "data/validation-00000-of-00001.parquet": parquet("four"),
}
DATA = [name for name in FILES if name.endswith(".parquet")]
FIRST, SECOND = "data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"
TEXTS = {"train": ["one", "two", "three"], "val": ["five", "four"], "test": ["six", "seven"]}
RAW = Path("data/raw/hub/user/name")


def from_hub(repo="user/name", **keys):
    return prepare("hub", repo=repo, **{"tokenizer": "byte", **keys})


def splits_of(data) -> dict[str, list[str]]:
    return {split: texts(data, split) for split in data.meta["splits"]}


def put(root: Path, files: dict[str, bytes]) -> None:
    for name, body in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(body)


def refusal(**keys) -> str:
    """The error line of a dataset that cannot be had; nothing is left of it."""
    with pytest.raises(UserError) as caught:
        prepare(**{"source": "hub", "repo": "user/name", "tokenizer": "byte", **keys})
    assert {path.name for path in Path("data").glob("*")} <= {"raw"}
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# any repository


def test_whole_repository_end_to_end(in_tmp, host):
    """By its newest commit, into raw_dir under the repository's names; then again, with no hub at all."""
    commit = host.publish("user/name", FILES)
    made = verb(host, "hub", "--repo", "user/name")
    assert (made.returncode, made.stderr) == (0, "")
    data = open_dataset(Path("data/name_byte"))
    assert splits_of(data) == TEXTS
    assert (data.meta["revision"], data.meta["repo"]) == (commit, "user/name")
    assert host.asked[:2] == ["GET revision", "GET tree"]
    assert sorted(host.fetched()) == DATA
    found = {path.relative_to(RAW).as_posix(): path.read_bytes() for path in RAW.rglob("*.parquet")}
    assert found == {name: FILES[name] for name in DATA}
    host.stop()
    again = verb(host, "hub", "--repo", "user/name", "--name", "again", HF_HUB_OFFLINE="1")
    assert (again.returncode, again.stderr) == (0, "")
    assert content(Path("data/again")) == content(data.folder)


@pytest.mark.parametrize("state", ["up", "moved on", "down", "offline"])
def test_second_dataset_of_the_same_files_asks_for_nothing(in_tmp, host, monkeypatch, state):
    host.publish("user/name", FILES)
    one = from_hub()
    host.asked.clear()
    if state == "moved on":
        host.publish("user/name", {"data/train.parquet": parquet("new")})
    if state == "down":
        host.stop()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", state == "offline")
    two = from_hub(data_dir="two")
    assert content(two.folder) == content(one.folder)
    assert host.asked == []


def test_the_same_command_again_asks_for_nothing(in_tmp, host):
    """Nor looks at the raw files."""
    host.publish("user/name", FILES)
    from_hub()
    host.asked.clear()
    (RAW / FIRST).write_bytes(b"cut")
    said = []
    prepare("hub", said.append, repo="user/name", tokenizer="byte")
    assert "nothing to do" in said[0]
    assert host.asked == []


@pytest.mark.parametrize("revision", [None, "main", "v2", "refs/convert/parquet", "commit", "short"])
def test_revision_is_resolved_to_its_commit(in_tmp, host, revision):
    commits = {"main": host.publish("user/name", FILES)}
    for branch in ("v2", "refs/convert/parquet"):
        commits[branch] = host.publish("user/name", {"train.jsonl": lines(branch), "dev.jsonl": lines("val")}, branch)
    commits |= {None: commits["main"], "commit": commits["v2"], "short": commits["v2"]}
    asked = {"commit": commits["v2"], "short": commits["v2"][:7]}.get(revision, revision)
    data = from_hub(revision=asked)
    assert data.meta["revision"] == commits[revision]
    train = {None: TEXTS["train"], "main": TEXTS["train"], "refs/convert/parquet": ["refs/convert/parquet"]}
    assert splits_of(data)["train"] == train.get(revision, ["v2"])
    assert ("GET revision" in host.asked) == (revision != "commit")


@pytest.mark.parametrize("where", ["data/", ""])
def test_numbered_files_are_completed(in_tmp, host, where):
    """One of two by hand, under its name in the repository or without folders: the other is fetched, and it alone."""
    host.publish("user/name", FILES)
    put(RAW, {where + FIRST.removeprefix("data/"): FILES[FIRST]})
    data = from_hub()
    assert splits_of(data) == TEXTS
    assert sorted(host.fetched()) == [name for name in DATA if name != FIRST]
    assert [path.relative_to(RAW).as_posix() for path in RAW.rglob("train-00000*.parquet")] == [
        where + FIRST.removeprefix("data/")
    ]


@pytest.mark.parametrize("where", ["data/", ""])
def test_folder_filled_by_hand_is_taken_as_it_is(in_tmp, host, where):
    """Also when the hub has more splits; the hub is not asked, and the revision is what was asked for."""
    names = [FIRST, SECOND, "data/validation-00000-of-00001.parquet"]
    put(RAW, {where + name.removeprefix("data/"): FILES[name] for name in names} | {"notes.txt": b"mine"})
    said = []
    data = prepare("hub", said.append, repo="user/name", tokenizer="byte")
    assert splits_of(data) == {"train": TEXTS["train"], "val": ["four"]}
    assert data.meta["revision"] == "main"
    assert "3 files as they are, without asking the hub" in said[0]
    assert host.asked == []


@pytest.mark.parametrize("where", ["data/", ""])
def test_file_of_another_size_is_refused_and_kept(in_tmp, host, where):
    host.publish("user/name", FILES)
    name = where + FIRST.removeprefix("data/")
    put(RAW, {name: FILES[FIRST][:-1]})
    answer = refusal()
    for part in (f"{RAW / name} has {len(FILES[FIRST]) - 1:,} bytes", f"{len(FILES[FIRST]):,}", "move it away"):
        assert part in answer
    assert (RAW / name).read_bytes() == FILES[FIRST][:-1]
    assert host.fetched() == []


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"revision": "v2"}, None),
        ({"files": ("*.parquet",)}, {"train": ["a", "b"], "val": ["val a", "val b"]}),
        ({"files": ("b/*",)}, {"train": ["b"], "val": ["val b"]}),
    ],
)
def test_what_was_fetched_is_not_taken_for_something_else(in_tmp, host, keys, expected):
    """Another revision, or other --files, of a repository of which the hub has filled the folder in part."""
    files = {
        f"{c}/{split}.parquet": parquet(f"{text}{c}") for c in "ab" for split, text in (("train", ""), ("val", "val "))
    }
    host.publish("user/name", files)
    host.publish("user/name", {**files, "a/train.parquet": parquet("another")}, "v2")
    assert splits_of(from_hub(files=("a/*",), name="one")) == {"train": ["a"], "val": ["val a"]}
    keys = {"files": ("a/*",), **keys}
    if expected:
        assert splits_of(from_hub(**keys)) == expected
    else:  # under the same name, where one of the two can be
        with pytest.raises(UserError, match="of another revision; move it away"):
            from_hub(**keys)


def test_damaged_listing_is_asked_for_again(in_tmp, host):
    host.publish("user/name", FILES)
    one = from_hub()
    (listing,) = RAW.glob(".listing*")
    listing.write_text(listing.read_text()[:40])
    (RAW / SECOND).unlink()
    host.asked.clear()
    assert content(from_hub(name="two").folder) == content(one.folder)
    assert (host.asked[:2], host.fetched()) == (["GET revision", "GET tree"], [SECOND])


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (
            {"train.jsonl": lines("one", "two"), "dev.jsonl": lines("three")},
            {"train": ["one", "two"], "val": ["three"]},
        ),
        ({"train.jsonl.gz": gzip.compress(lines("one")), "test/x.jsonl.gz": gzip.compress(lines("two"))}, None),
        (
            {"train.jsonl.gz": gzip.compress(lines("one")), "val.jsonl": lines("two")},
            {"train": ["one"], "val": ["two"]},
        ),
        (
            {"train.parquet": parquet("one"), "val.parquet": parquet("v"), "all.jsonl": lines("no")},
            {"train": ["one"], "val": ["v"]},
        ),
    ],
)
def test_layouts_without_files(in_tmp, host, files, expected):
    """JSON lines where there is no parquet; several folders are asked about."""
    host.publish("user/name", {"README.md": b"", "notes.txt": b"no", **files})
    if expected is None:
        answer = refusal()
        for part in ("user/name", "2 folders (., test)", "--files"):
            assert part in answer
    else:
        assert splits_of(from_hub()) == expected


def test_several_folders(in_tmp, host):
    """The error names them; --files chooses, once for the dataset and once for the folder of the raw files."""
    made = {
        f"{c}/{s}-00000-of-00001.parquet": parquet(f"{c} {s}", column="body") for c in "ab" for s in ("train", "dev")
    }
    host.publish("user/name", made)
    answer = refusal(column="body")
    for part in ("user/name", "2 folders (a, b)", "--files 'a/*'", "all: '*.parquet'"):
        assert part in answer
    assert host.fetched() == []
    data = from_hub(files=("b/*",), column="body")
    assert splits_of(data) == {"train": ["b train"], "val": ["b dev"]}
    assert data.meta["files"] == ["b/*"]
    assert sorted(set(host.fetched())) == ["b/dev-00000-of-00001.parquet", "b/train-00000-of-00001.parquet"]
    with pytest.raises(UserError, match=r"other settings: files \['b/\*'\]"):
        from_hub(files=("*.parquet",), column="body")
    both = from_hub(files=("a/*.parquet", "b/t*"), column="body", name="both", raw_dir="raw")
    assert splits_of(both) == {"train": ["a train", "b train"], "val": ["a dev"]}


# ---------------------------------------------------------------------------------------------------------------------
# the sources that are known by name


WIKITEXT_ROWS = {
    "train-00000-of-00002": ["", " = Title = \n", "", " Some text . \n"],
    "train-00001-of-00002": [" More of it . \n", ""],
    "validation-00000-of-00001": ["", " = Other = \n"],
    "test-00000-of-00001": [" = Third = \n", ""],
}
RAW_CONFIG = "wikitext-103-raw-v1"


@pytest.fixture
def wikitext(host):
    """Salesforce/wikitext with its configurations; in the other ones other text."""
    others = ("wikitext-103-v1", "wikitext-2-raw-v1", "wikitext-2-v1")
    files = {f"{RAW_CONFIG}/{name}.parquet": parquet(*rows) for name, rows in WIKITEXT_ROWS.items()}
    files |= {f"{other}/{name}.parquet": parquet("<unk>") for other in others for name in WIKITEXT_ROWS}
    host.publish("Salesforce/wikitext", {"README.md": b"", **files}, commit=WIKITEXT)
    return files


def test_wikitext103_is_one_running_text(in_tmp, host, wikitext):
    data = prepare("wikitext103", tokenizer="byte")
    assert splits_of(data) == {
        "train": [" = Title = \n Some text . \n More of it . \n"],
        "val": [" = Other = \n"],
        "test": [" = Third = \n"],
    }
    assert (data.meta["end_of_text"], data.meta["revision"]) == (False, WIKITEXT)
    assert [entry["documents"] for entry in data.meta["splits"].values()] == [6, 2, 2]  # rows, also empty ones
    names = [f"{RAW_CONFIG}/{name}.parquet" for name in sorted(WIKITEXT_ROWS)]
    assert sorted(host.fetched()) == names
    assert host.asked[0] == f"GET tree/{RAW_CONFIG}"
    assert all(Path("data/raw/wikitext103", name).read_bytes() == wikitext[name] for name in names)


@pytest.mark.usefixtures("gpt2_vocabulary")
def test_wikitext103_test_split_by_hand_has_the_numbers_that_everybody_has(in_tmp, host, real_text):
    """Tokens of GPT-2 and words, by which perplexities per token and per word are compared; without a network."""
    data = prepare("wikitext103", raw_dir=str(real_text), splits=("test",))
    entry = data.meta["splits"].pop("test")
    assert (entry["tokens"], entry["bytes"], entry["words"]) == (283_287, 1_287_656, 241_211)
    assert data.meta["splits"] == {}
    assert (data.folder, data.meta["revision"], host.asked) == (Path("data/wikitext103"), WIKITEXT, [])


def test_wikitext103_fetches_the_splits_that_are_not_there(in_tmp, host, wikitext):
    """All three where the test split lies there by hand; asked for alone, it needs no hub."""
    name = "test-00000-of-00001.parquet"
    root = Path("data/raw/wikitext103")
    put(root, {name: wikitext[f"{RAW_CONFIG}/{name}"]})
    alone = prepare("wikitext103", tokenizer="byte", splits=("test",), name="alone")
    assert host.asked == []
    data = prepare("wikitext103", tokenizer="byte")
    assert list(data.meta["splits"]) == ["train", "val", "test"]
    assert texts(data, "test") == texts(alone, "test") == [" = Third = \n"]
    assert sorted(host.fetched()) == [f"{RAW_CONFIG}/{n}.parquet" for n in sorted(WIKITEXT_ROWS) if "test" not in n]


def test_wikitext103_by_hand(in_tmp, host, wikitext):
    """Some in the repository's folder, some not; the dataset stays when the raw files are gone."""
    for name in WIKITEXT_ROWS:
        place = f"{RAW_CONFIG}/" if "train" in name else ""
        put(Path("data/raw/wikitext103"), {f"{place}{name}.parquet": wikitext[f"{RAW_CONFIG}/{name}.parquet"]})
    made = prepare("wikitext103", tokenizer="byte")
    assert splits_of(made)["train"] == [" = Title = \n Some text . \n More of it . \n"]
    assert list(made.meta["splits"]) == ["train", "val", "test"]
    shutil.rmtree("data/raw")
    said = []
    prepare("wikitext103", said.append, tokenizer="byte")
    assert "nothing to do" in said[0]
    assert host.asked == []


def test_wikitext103_fetches_the_splits_that_are_asked_for(in_tmp, host, wikitext):
    data = prepare("wikitext103", tokenizer="byte", splits=("val",))
    assert splits_of(data) == {"val": [" = Other = \n"]}
    assert host.fetched() == [f"{RAW_CONFIG}/validation-00000-of-00001.parquet"]


def test_wikipedia_by_hand(in_tmp, host, real_text):
    """The default dump's files without their folder."""
    data = prepare("wikipedia", tokenizer="byte", raw_dir=str(real_text), val_fraction=0.1)
    rows = [r for f in sorted((real_text / "wikipedia").iterdir()) for r in readers.rows(f, "text")]
    assert "".join(texts(data, "train") + texts(data, "val")) == "".join(rows)
    assert (data.folder, data.meta["revision"], host.asked) == (Path("data/wikipedia_byte"), WIKIPEDIA, [])


def test_wikipedia_dumps_do_not_mix(in_tmp, host):
    """Flat files are the default dump's; each dump has its own folder and dataset."""
    by_hand = {
        f"{place}train-0000{n}-of-00002.parquet": parquet(f"{place}by hand {n}")
        for place in ("", "20231101.nds/")
        for n in (0, 1)
    }
    put(Path("data/raw/wikipedia"), by_hand)
    dumps = {
        f"{dump}/train-0000{n}-of-00002.parquet": parquet(f"{dump} {n}")
        for dump in ("20231101.simple", "20231101.en")
        for n in (0, 1)
    }
    host.publish("wikimedia/wikipedia", dumps, commit=WIKIPEDIA)
    keys = {"tokenizer": "byte", "val_fraction": 0.5}
    data = prepare("wikipedia", dump="20231101.simple", **keys)
    assert data.folder == Path("data/wikipedia_20231101.simple_byte")
    assert "".join(texts(data, "train") + texts(data, "val")) == "20231101.simple 020231101.simple 1"
    fetched = ["20231101.simple/train-00000-of-00002.parquet", "20231101.simple/train-00001-of-00002.parquet"]
    assert (host.asked[0], host.fetched()) == ("GET tree/20231101.simple", fetched)
    assert all(Path("data/raw/wikipedia", name).read_bytes() == dumps[name] for name in fetched)
    default = prepare("wikipedia", **keys)
    assert default.folder == Path("data/wikipedia_byte")
    assert "".join(texts(default, "train") + texts(default, "val")) == "by hand 0by hand 1"
    assert default.meta["end_of_text"] is True
    assert host.fetched() == fetched


def test_fineweb_sample_fetches_what_it_needs(in_tmp, host):
    """Of 60 documents a file: 1 file for 60 of them, 3 for 150, and then the last one for all."""
    names = [f"sample/10BT/00{n}_00000.parquet" for n in range(4)]
    files = {name: parquet(*(f"document {n} {k}" for k in range(60))) for n, name in enumerate(names)}
    files["data/CC-MAIN-2013-20/train-00000-of-00014.parquet"] = parquet("another configuration")
    host.publish("HuggingFaceFW/fineweb-edu", files, commit=FINEWEB)
    whole = [f"document {n} {k}" for n in range(4) for k in range(60)]
    for size, fetched in ((60, names[:1]), (150, names[:3]), (None, names)):
        data = prepare("fineweb", tokenizer="byte", sample_size=size, val_fraction=0.5, name=f"s{size}")
        found = texts(data, "train") + texts(data, "val")
        assert len("".join(found)) == len("".join(whole[:size]))
        assert set(found) == set(whole[:size]) or size == 60  # so few are cut by characters
        assert host.fetched() == fetched
    assert (data.meta["revision"], host.asked[0]) == (FINEWEB, "GET tree/sample/10BT")


# ---------------------------------------------------------------------------------------------------------------------
# what goes wrong


@pytest.mark.parametrize(
    ("request_", "faults", "waited"),
    [
        (f"GET {SECOND}", [10, 0, 300], [1, 1, 1]),  # huggingface_hub's own max_seconds
        (f"GET {SECOND}", [parquet("three")[:-9]], [1]),
        (f"HEAD {SECOND}", ["drop"] * 3, [1, 2, 4]),
        ("GET revision", ["drop"] * 3, [1, 2, 4]),
        ("GET tree", [(503, "")] * 3, [1, 2, 4]),
    ],
)
def test_broken_connection_is_taken_up_again(in_tmp, host, waits, request_, faults, waited):
    host.publish("user/name", FILES)
    host.faults[request_] = iter(faults)
    assert splits_of(from_hub()) == TEXTS
    assert (RAW / SECOND).read_bytes() == FILES[SECOND]
    assert host.asked.count(request_) == 1 + len(faults)
    assert waits == waited


@pytest.mark.parametrize(
    ("request_", "fault"), [(f"GET {SECOND}", 0), (f"HEAD {SECOND}", "drop"), (f"HEAD {SECOND}", (503, ""))]
)
def test_whole_files_are_kept_when_the_connection_stays_broken(in_tmp, host, waits, capsys, request_, fault):
    host.publish("user/name", FILES)
    host.faults[request_] = itertools.repeat(fault)
    answer = refusal()
    for part in (
        f"{SECOND} of dataset user/name could not be downloaded",
        "run again",
        "complete files are kept",
        str(RAW),
    ):
        assert part in answer
    assert capsys.readouterr().err.count("the connection broke") == 3
    there = [path.relative_to(RAW).as_posix() for path in RAW.rglob("*.parquet")]
    assert there == [FIRST]
    assert list(RAW.rglob("*.incomplete")) == []
    host.faults.clear()
    host.asked.clear()
    assert splits_of(from_hub()) == TEXTS
    assert sorted(host.fetched()) == [name for name in DATA if name not in there]


def test_nobody_answers(in_tmp, host, waits):
    host.stop()
    answer = refusal()
    for part in (
        "user/name could not be downloaded (",
        "refused",
        "check the network",
        f"put the files into {RAW} yourself",
    ):
        assert part in answer
    assert waits == [1, 2, 4]


def test_storage_that_does_not_answer(in_tmp, host, waits, monkeypatch):
    """Most large files are on the hub's Xet storage, where a library of its own goes for them."""
    pytest.importorskip("hf_xet")
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_MAX_ATTEMPTS", "0")
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_BASE_DELAY", "1ms")
    host.publish("user/name", FILES)
    host.storage = "http://127.0.0.1:1"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", False)
    data = from_hub()
    assert waits == [1], "once, and then by plain HTTP"
    assert {FIRST, SECOND} <= set(host.fetched())
    assert sum(entry["documents"] for entry in data.meta["splits"].values()) > 0


@pytest.mark.parametrize("why", [ConnectionError(), TimeoutError(), OSError("many\nlines")])
def test_errors_without_a_text_or_with_several_lines(in_tmp, host, waits, monkeypatch, why):
    def broken(*_, **__):
        raise why

    host.publish("user/name", FILES)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", broken)
    answer = refusal()
    assert f"could not be downloaded ({str(why).partition(chr(10))[0]}" in answer
    assert "()" not in answer


REFUSALS = [
    ({"repo": "user/none"}, {}, ["user/none", "does not exist on the hub, or it is private", "hf auth login"]),
    ({"revision": "v9"}, {}, ["user/name", "has no revision v9", "--revision"]),
    ({"revision": "9" * 40}, {}, ["user/name", "has no revision 999", "--revision"]),
    ({"files": ("*.csv",)}, {}, ["user/name", "has no file *.csv", "--files"]),
    ({"files": ("nope/*.parquet",)}, {}, ["user/name", "has no folder nope", "--files"]),
    ({"files": ("*.md", "x")}, {"GET tree": (403, "GatedRepo")}, ["user/name is gated", "/user/name", "hf auth login"]),
    ({}, {f"HEAD {FIRST}": (401, "GatedRepo")}, ["user/name is gated", "accept its terms at https://huggingface.co/"]),
    ({}, {f"HEAD {FIRST}": (403, "GatedRepo")}, ["user/name is gated", "HF_TOKEN"]),
    ({}, {"GET revision": (403, "")}, ["user/name", "denies access (HTTP 403)", "hf auth login"]),
    ({}, {f"HEAD {FIRST}": (403, "")}, ["user/name", "denies access (HTTP 403)", "hf auth login"]),
    ({}, {f"GET {FIRST}": (403, "")}, ["user/name", "denies access (HTTP 403)", "hf auth login"]),
    ({}, {f"HEAD {FIRST}": (404, "EntryNotFound")}, ["user/name", f"has no {FIRST}", "--files"]),
    ({"repo": "user/what?"}, {}, ["user/what?", "user/name"]),
    (
        {"source": "wikipedia", "repo": None, "dump": "19990101.en"},
        {},
        ["wikimedia/wikipedia", "19990101.en", "--dump"],
    ),
]


@pytest.mark.parametrize(("keys", "faults", "said"), REFUSALS)
def test_refusals(in_tmp, host, waits, keys, faults, said):
    """At once: what the hub says clearly is not asked again."""
    host.publish("user/name", FILES)
    host.publish("wikimedia/wikipedia", {"20231101.en/train-00000-of-00001.parquet": b""}, commit=WIKIPEDIA)
    host.faults = {request: itertools.repeat(fault) for request, fault in faults.items()}
    answer = refusal(**keys)
    for part in said:
        assert part in answer
    assert waits == []
    assert list(Path("data").rglob("*.parquet")) == []


@pytest.mark.parametrize("known", [False, True])
def test_offline_without_the_files(in_tmp, host, waits, monkeypatch, known):
    """Nothing there; or the hub has told once of the files, and one of them is gone."""
    host.publish("user/name", FILES)
    if known:
        from_hub(data_dir="other")
        (RAW / SECOND).unlink()
        host.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    answer = refusal()
    for part in ("HF_HUB_OFFLINE is set", SECOND if known else "user/name", str(RAW), "unset it"):
        assert part in answer
    assert (host.asked, waits) == ([], [])


@pytest.mark.parametrize(
    ("words", "env", "said"),
    [
        (["hub", "--repo", "user/none"], {}, "dataset user/none does not exist on the hub"),
        (
            ["wikitext103"],
            {"HF_HUB_OFFLINE": "1"},
            "wikitext-103-raw-v1 of dataset Salesforce/wikitext is not in data/raw",
        ),
        (["hub", "--repo", "user/gated"], {}, "accept its terms at https://huggingface.co/datasets/user/gated"),
    ],
)
def test_refusal_is_one_error_line(in_tmp, host, words, env, said):
    host.publish("user/gated", FILES)
    host.faults[f"HEAD {FIRST}"] = host.faults[f"HEAD {DATA[0]}"] = itertools.repeat((403, "GatedRepo"))
    answer = verb(host, *words, **env)
    assert (answer.returncode, answer.stdout) == (2, "")
    assert answer.stderr.startswith("error: ")
    assert answer.stderr.count("\n") == 1
    assert said in answer.stderr
    assert {path.name for path in Path("data").glob("*")} <= {"raw"}


def test_the_disks_errors_are_not_the_networks(in_tmp, host, waits):
    """A file where a folder has to be: said once, without waiting."""
    host.publish("user/name", FILES)
    put(RAW, {"data": b"a file"})
    with pytest.raises(OSError, match="data") as caught:
        from_hub()
    assert caught.value.errno
    assert waits == []


def test_file_that_came_in_the_meantime_is_kept(in_tmp, host):
    """Of somebody else's making: not fetched over."""
    host.publish("user/name", FILES)
    files = hub.HubFiles("user/name", "main", ("*.parquet",), RAW)
    listing = hub.list_remote(files)
    put(RAW, {FIRST: b"mine"})
    assert hub.download_file(files, listing, FIRST).read_bytes() == b"mine"
    assert host.fetched() == []


def test_killed_in_the_middle_of_a_file(in_tmp, host):
    """The next call makes the whole; what the killed one left is removed when it is older than an hour."""
    host.publish("user/name", FILES)
    halfway, gone = threading.Event(), threading.Event()
    host.faults[f"GET {SECOND}"] = iter([lambda: (halfway.set(), gone.wait(60))])
    words = ["hub", "--repo", "user/name", "--tokenizer", "byte"]
    env = {**os.environ, "PYTHONPATH": "", **hub_environment(host)}
    call = [sys.executable, ROOT / "prepare_data.py", *words]
    with running(call, env=env, stderr=subprocess.DEVNULL) as started:
        assert halfway.wait(60)
        started.kill()
        assert started.wait() == -signal.SIGKILL
    gone.set()
    (left,) = RAW.rglob("*.incomplete")
    assert not (RAW / SECOND).exists()
    (young := left.with_name("young.incomplete")).touch()
    os.utime(left, times=(time.time() - 3700, time.time() - 3700))
    host.asked.clear()
    done = verb(host, *words[:3])
    assert (done.returncode, done.stderr) == (0, "")
    assert splits_of(open_dataset(Path("data/name_byte"))) == TEXTS
    assert FIRST not in host.fetched()
    assert SECOND in host.fetched()
    assert list(RAW.rglob("*.incomplete")) == [young]
