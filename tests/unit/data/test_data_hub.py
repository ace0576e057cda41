"""Datasets on the hub: requests, files that are on the disk already, and errors.

The hub is a server in this process (hub_host.py) that huggingface_hub talks to.
"""

import gzip
import itertools
import json
import os
import shutil
import time
from pathlib import Path

import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub import constants
from prepared import content, prepare, texts

from config import UserError
from flatgpt.data import hub
from flatgpt.data.sources import REPOSITORIES

WIKITEXT, WIKIPEDIA, FINEWEB = (REPOSITORIES[source][1] for source in ("wikitext103", "wikipedia", "fineweb"))


def parquet(*rows: str, column: str = "text") -> bytes:
    file = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(rows)), column: rows}), file)
    return file.getvalue().to_pybytes()


def lines(*rows: str) -> bytes:
    return "".join(json.dumps({"id": 1, "text": row}) + "\n" for row in rows).encode()


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


def from_hub(**keys):
    return prepare("hub", **{"repo": "user/name", "tokenizer": "byte", **keys})


def splits_of(data) -> dict[str, list[str]]:
    return {split: texts(data, split) for split in data.meta["splits"]}


def put(root: Path, files: dict[str, bytes]) -> None:
    for name, body in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(body)


def refused(parts, **keys) -> None:
    """Check that there is one error line with these parts, and no dataset."""
    with pytest.raises(UserError) as caught:
        prepare(**{"source": "hub", "repo": "user/name", "tokenizer": "byte", **keys})
    assert {path.name for path in Path("data").glob("*")} <= {"raw"}
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# names of files


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *((name, "train") for name in ("data/train-00000-of-00002.parquet", "000_00000.parquet", "test/training.x")),
        *((name, "train") for name in ("contest.parquet", "latest/x.parquet", "devices/invalid/testimony.jsonl")),
        *((name, "val") for name in ("validation-00000-of-00001.parquet", "valid.jsonl", "wiki.val.jsonl.gz")),
        *((name, "val") for name in ("dev-v1.1.jsonl", "default/partial-validation/0000.parquet")),
        *((name, "test") for name in ("data/TEST.parquet", "my_testing_2.parquet", "test2.parquet", "test/0000.x")),
        ("dev/en/test/0.parquet", "test"),
    ],
)
def test_split_of_a_file_name(name, split):
    """A word of the file's name, else of the innermost folder's; parts of other words do not count."""
    assert hub.group_by_split([name]) == {split: [name]}


def test_order_of_splits_and_files():
    found = hub.group_by_split(["b/test.parquet", "train-1", "dev-2", "train-0", "validation-1"])
    assert list(found.items()) == [
        ("train", ["train-1", "train-0"]),
        ("val", ["dev-2", "validation-1"]),
        ("test", ["b/test.parquet"]),
    ]


@pytest.mark.parametrize(
    ("names", "complete"),
    [
        ([], True),
        (["a.parquet", "000_00000.parquet"], True),
        (["train-00001-of-00002.parquet", "train-00000-of-00002.parquet", "x.parquet"], True),
        (["a/train-00000-of-00001.parquet", "b/train-00000-of-00001.parquet"], True),
        (["train-00001-of-00002.parquet", "x.parquet"], False),
        (["a/train-00000-of-00002.parquet", "b/train-00001-of-00002.parquet"], False),
        (["dev-00000-of-00002.parquet", "test-00001-of-00002.parquet"], False),
        (["train-00000-of-00002.parquet", "train-00001-of-00003.parquet"], False),
    ],
)
def test_complete_series(names, complete):
    assert hub.is_complete(names) is complete


# ---------------------------------------------------------------------------------------------------------------------
# any repository


@pytest.mark.parametrize("state", ["up", "newer commit", "down", "offline"])
def test_whole_repository(in_tmp, host, monkeypatch, state):
    """At its newest commit, into raw_dir under the repository's names. A second dataset makes no request."""
    commit = host.publish("user/name", FILES)
    one = from_hub()
    assert splits_of(one) == TEXTS
    assert (one.folder, one.meta["revision"], one.meta["repo"]) == (Path("data/name_byte"), commit, "user/name")
    assert host.asked[:2] == ["GET revision", "GET tree"]
    assert sorted(host.fetched()) == DATA
    found = {path.relative_to(RAW).as_posix(): path.read_bytes() for path in RAW.rglob("*.parquet")}
    assert found == {name: FILES[name] for name in DATA}
    host.asked.clear()
    if state == "newer commit":
        host.publish("user/name", {"data/train.parquet": parquet("new")})
    if state == "down":
        host.stop()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", state == "offline")
    assert content(from_hub(data_dir="two").folder) == content(one.folder)
    (RAW / FIRST).write_bytes(b"cut")
    logged = []
    prepare("hub", logged.append, repo="user/name", tokenizer="byte")  # not even the raw files are read
    assert "nothing to do" in logged[0]
    assert host.asked == []


@pytest.mark.parametrize("revision", [None, "main", "v2", "refs/convert/parquet", "commit", "short"])
def test_revisions(in_tmp, host, revision):
    commits = {"main": host.publish("user/name", FILES)}
    for branch in ("v2", "refs/convert/parquet"):
        commits[branch] = host.publish("user/name", {"train.jsonl": lines(branch), "dev.jsonl": lines("val")}, branch)
    commits |= {None: commits["main"], "commit": commits["v2"], "short": commits["v2"]}
    data = from_hub(revision={"commit": commits["v2"], "short": commits["v2"][:7]}.get(revision, revision))
    assert data.meta["revision"] == commits[revision]
    train = {None: TEXTS["train"], "main": TEXTS["train"], "refs/convert/parquet": ["refs/convert/parquet"]}
    assert splits_of(data)["train"] == train.get(revision, ["v2"])
    assert ("GET revision" in host.asked) == (revision != "commit")


@pytest.mark.parametrize("where", ["data/", ""])
def test_files_of_the_user(in_tmp, host, where):
    """Under their names in the repository or without folders: a complete folder is used without a request."""
    host.publish("user/name", FILES)
    names = [FIRST, SECOND, "data/validation-00000-of-00001.parquet"]
    paths = [where + name.removeprefix("data/") for name in names]
    put(RAW, {path: FILES[name] for path, name in zip(paths, names, strict=True)} | {"notes.txt": b"mine"})
    logged = []
    data = prepare("hub", logged.append, repo="user/name", tokenizer="byte")
    assert splits_of(data) == {"train": TEXTS["train"], "val": ["four"]}
    assert data.meta["revision"] == "main"
    assert "3 files as they are, without asking the hub" in logged[0]
    assert host.asked == []
    (RAW / paths[1]).unlink()  # its series is incomplete now
    assert splits_of(from_hub(name="completed")) == TEXTS
    assert sorted(host.fetched()) == [name for name in DATA if name not in (names[0], names[2])]
    assert [path.relative_to(RAW).as_posix() for path in RAW.rglob("train-00000*.parquet")] == paths[:1]


@pytest.mark.parametrize("where", ["data/", ""])
def test_a_file_of_another_size_is_refused_and_kept(in_tmp, host, where):
    host.publish("user/name", FILES)
    name, size = where + FIRST.removeprefix("data/"), len(FILES[FIRST])
    put(RAW, {name: FILES[FIRST][:-1]})
    refused([f"{RAW / name} has {size - 1:,} bytes", f"{size:,}", "move it away"])
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
def test_downloaded_files_of_another_request(in_tmp, host, keys, expected):
    """Another revision, or other --files, of a repository that is in raw_dir in part."""
    files = {
        f"{c}/{split}.parquet": parquet(f"{text}{c}") for c in "ab" for split, text in (("train", ""), ("val", "val "))
    }
    host.publish("user/name", files)
    host.publish("user/name", {**files, "a/train.parquet": parquet("another")}, "v2")
    assert splits_of(from_hub(files=("a/*",), name="one")) == {"train": ["a"], "val": ["val a"]}
    keys = {"files": ("a/*",), **keys}
    if expected:
        assert splits_of(from_hub(**keys)) == expected
    else:
        with pytest.raises(UserError, match="of another revision; move it away"):
            from_hub(**keys)


def test_damaged_listing_is_requested_again(in_tmp, host):
    host.publish("user/name", FILES)
    one = from_hub()
    (listing,) = RAW.glob(".listing*")
    listing.write_text(listing.read_text()[:40])
    (RAW / SECOND).unlink()
    host.asked.clear()
    assert content(from_hub(name="two").folder) == content(one.folder)
    assert (host.asked[:2], host.fetched()) == (["GET revision", "GET tree"], [SECOND])


@pytest.mark.parametrize(
    "files",
    [
        {"train.jsonl": lines("one"), "dev.jsonl": lines("two")},
        {"train.jsonl.gz": gzip.compress(lines("one")), "val.jsonl": lines("two")},
        {"train.parquet": parquet("one"), "val.parquet": parquet("two"), "all.jsonl": lines("no")},
    ],
)
def test_formats(in_tmp, host, files):
    """JSON lines if there is no parquet file."""
    host.publish("user/name", {"README.md": b"", "notes.txt": b"no", **files})
    assert splits_of(from_hub()) == {"train": ["one"], "val": ["two"]}


def test_several_folders(in_tmp, host):
    """The error names them; --files chooses, also when the folder of raw files has others."""
    names = [f"{c}/{split}-00000-of-00001.parquet" for c in "ab" for split in ("train", "dev")]
    host.publish("user/name", {name: parquet(name[:4], column="body") for name in names})
    refused(["user/name", "2 folders (a, b)", "--files 'a/*'", "all: '*.parquet'"], column="body")
    assert host.fetched() == []
    data = from_hub(files=("b/*",), column="body")
    assert splits_of(data) == {"train": ["b/tr"], "val": ["b/de"]}
    assert data.meta["files"] == ["b/*"]
    assert sorted(set(host.fetched())) == ["b/dev-00000-of-00001.parquet", "b/train-00000-of-00001.parquet"]
    with pytest.raises(UserError, match=r"other settings: files \['b/\*'\]"):
        from_hub(files=("*.parquet",), column="body")
    both = from_hub(files=("a/*.parquet", "b/t*"), column="body", name="both", raw_dir="raw")
    assert splits_of(both) == {"train": ["a/tr", "b/tr"], "val": ["a/de"]}


# ---------------------------------------------------------------------------------------------------------------------
# known repositories


WIKITEXT_ROWS = {
    "train-00000-of-00002": ["", " = Title = \n", "", " Some text . \n"],
    "train-00001-of-00002": [" More of it . \n", ""],
    "validation-00000-of-00001": ["", " = Other = \n"],
    "test-00000-of-00001": [" = Third = \n", ""],
}
WIKITEXT_TEXTS = {
    "train": [" = Title = \n Some text . \n More of it . \n"],
    "val": [" = Other = \n"],
    "test": [" = Third = \n"],
}
RAW_CONFIG = "wikitext-103-raw-v1"


@pytest.fixture
def wikitext(host):
    """Publish Salesforce/wikitext with other text in its other configurations."""
    others = ("wikitext-103-v1", "wikitext-2-raw-v1", "wikitext-2-v1")
    files = {f"{RAW_CONFIG}/{name}.parquet": parquet(*rows) for name, rows in WIKITEXT_ROWS.items()}
    files |= {f"{other}/{name}.parquet": parquet("<unk>") for other in others for name in WIKITEXT_ROWS}
    host.publish("Salesforce/wikitext", {"README.md": b"", **files}, commit=WIKITEXT)
    return files


@pytest.mark.parametrize(
    ("by_hand", "splits", "fetched"),
    [
        ([], (), list(WIKITEXT_ROWS)),
        ([], ("val",), ["validation-00000-of-00001"]),
        (["test-00000-of-00001"], ("test",), []),
        (["test-00000-of-00001"], (), [name for name in WIKITEXT_ROWS if "test" not in name]),
        (list(WIKITEXT_ROWS), (), []),
    ],
)
def test_wikitext103(in_tmp, host, wikitext, by_hand, splits, fetched):
    """One running text per split; the splits that are missing are downloaded, the others need no hub."""
    for name in by_hand:
        folder = f"{RAW_CONFIG}/" if "train" in name else ""
        put(Path("data/raw/wikitext103"), {f"{folder}{name}.parquet": wikitext[f"{RAW_CONFIG}/{name}.parquet"]})
    data = prepare("wikitext103", tokenizer="byte", splits=splits)
    assert splits_of(data) == {split: WIKITEXT_TEXTS[split] for split in splits or WIKITEXT_TEXTS}
    assert (data.meta["end_of_text"], data.meta["revision"]) == (False, WIKITEXT)
    documents = {"train": 6, "val": 2, "test": 2}  # rows, also empty ones
    assert {split: entry["documents"] for split, entry in data.meta["splits"].items()} == {
        split: documents[split] for split in data.meta["splits"]
    }
    assert sorted(host.fetched()) == [f"{RAW_CONFIG}/{name}.parquet" for name in sorted(fetched)]
    assert host.asked[:1] == [f"GET tree/{RAW_CONFIG}"] * bool(fetched)
    for name in host.fetched():
        assert Path("data/raw/wikitext103", name).read_bytes() == wikitext[name]
    host.asked.clear()
    shutil.rmtree("data/raw")
    logged = []
    prepare("wikitext103", logged.append, tokenizer="byte", splits=splits)
    assert "nothing to do" in logged[0]
    assert host.asked == []


@pytest.mark.usefixtures("gpt2_vocabulary")
def test_published_size_of_wikitext103(in_tmp, host, real_text):
    """The test split has the 283,287 GPT-2 tokens that perplexities are computed over."""
    data = prepare("wikitext103", raw_dir=str(real_text), splits=("test",))
    entry = data.meta["splits"].pop("test")
    assert (entry["tokens"], entry["bytes"]) == (283_287, 1_287_656)
    assert data.meta["splits"] == {}
    assert (data.folder, data.meta["revision"], host.asked) == (Path("data/wikitext103"), WIKITEXT, [])


def test_dumps_of_wikipedia_are_separate(in_tmp, host):
    """Files without a folder are of the default dump; each dump has its own folder and dataset."""
    numbered = [f"train-0000{n}-of-00002.parquet" for n in (0, 1)]
    put(Path("data/raw/wikipedia"), {f"{f}{n}": parquet(f"{f}mine") for f in ("", "20231101.nds/") for n in numbered})
    dumps = {f"{dump}/{n}": parquet(dump) for dump in ("20231101.simple", "20231101.en") for n in numbered}
    host.publish("wikimedia/wikipedia", dumps, commit=WIKIPEDIA)
    keys = {"tokenizer": "byte", "val_fraction": 0.5}
    data = prepare("wikipedia", dump="20231101.simple", **keys)
    assert data.folder == Path("data/wikipedia_20231101.simple_byte")
    assert "".join(texts(data, "train") + texts(data, "val")) == "20231101.simple" * 2
    fetched = [f"20231101.simple/{name}" for name in numbered]
    assert (host.asked[0], host.fetched()) == ("GET tree/20231101.simple", fetched)
    assert all(Path("data/raw/wikipedia", name).read_bytes() == dumps[name] for name in fetched)
    default = prepare("wikipedia", **keys)
    assert default.folder == Path("data/wikipedia_byte")
    assert "".join(texts(default, "train") + texts(default, "val")) == "minemine"
    assert default.meta["end_of_text"] is True
    assert host.fetched() == fetched


def test_a_sample_of_fineweb_downloads_the_files_that_it_needs(in_tmp, host):
    """Of 60 documents each: 1 file for 60 documents, 3 for 150, and then the last one for all."""
    names = [f"sample/10BT/00{n}_00000.parquet" for n in range(4)]
    files = {name: parquet(*(f"document {n} {k}" for k in range(60))) for n, name in enumerate(names)}
    files["data/CC-MAIN-2013-20/train-00000-of-00014.parquet"] = parquet("another configuration")
    host.publish("HuggingFaceFW/fineweb-edu", files, commit=FINEWEB)
    documents = [f"document {n} {k}" for n in range(4) for k in range(60)]
    for size, fetched in ((60, names[:1]), (150, names[:3]), (None, names)):
        data = prepare("fineweb", tokenizer="byte", sample_size=size, val_fraction=0.5, name=f"s{size}")
        found = texts(data, "train") + texts(data, "val")
        assert len("".join(found)) == len("".join(documents[:size]))
        assert set(found) == set(documents[:size]) or size == 60  # so few are split by characters
        assert host.fetched() == fetched
    assert (data.meta["revision"], host.asked[0]) == (FINEWEB, "GET tree/sample/10BT")


# ---------------------------------------------------------------------------------------------------------------------
# errors


@pytest.mark.parametrize(
    ("request_", "faults", "waited"),
    [
        (f"GET {SECOND}", [10, 0, 300], [1, 1, 1]),  # huggingface_hub's own attempts
        (f"GET {SECOND}", [parquet("three")[:-9]], [1]),
        (f"HEAD {SECOND}", ["drop"] * 3, [1, 2, 4]),
        ("GET revision", ["drop"] * 3, [1, 2, 4]),
        ("GET tree", [(503, "")] * 3, [1, 2, 4]),
    ],
)
def test_download_after_a_broken_connection(in_tmp, host, waits, request_, faults, waited):
    host.publish("user/name", FILES)
    host.faults[request_] = iter(faults)
    assert splits_of(from_hub()) == TEXTS
    assert (RAW / SECOND).read_bytes() == FILES[SECOND]
    assert host.asked.count(request_) == 1 + len(faults)
    assert waits == waited


@pytest.mark.parametrize(
    ("request_", "fault"), [(f"GET {SECOND}", 0), (f"HEAD {SECOND}", "drop"), (f"HEAD {SECOND}", (503, ""))]
)
def test_complete_files_are_kept_while_the_connection_stays_broken(in_tmp, host, waits, capsys, request_, fault):
    """Old temporary files of a killed download are removed, young ones may be in use."""
    host.publish("user/name", FILES)
    host.faults[request_] = itertools.repeat(fault)
    temporary = RAW / ".cache/huggingface/download/data"
    put(temporary, {"old.incomplete": b"x", "young.incomplete": b"x"})
    os.utime(temporary / "old.incomplete", times=(time.time() - 3700, time.time() - 3700))
    failed = f"{SECOND} of dataset user/name could not be downloaded"
    refused([failed, "run again", "complete files are kept", str(RAW)])
    assert capsys.readouterr().err.count("the connection broke") == 3
    assert [path.relative_to(RAW).as_posix() for path in RAW.rglob("*.parquet")] == [FIRST]
    assert list(RAW.rglob("*.incomplete")) == [temporary / "young.incomplete"]
    host.faults.clear()
    host.asked.clear()
    assert splits_of(from_hub()) == TEXTS
    assert sorted(host.fetched()) == [name for name in DATA if name != FIRST]


def test_no_network(in_tmp, host, waits):
    host.stop()
    where = f"put the files into {RAW} yourself"
    refused(["user/name could not be downloaded (", "refused", "check the network", where])
    assert waits == [1, 2, 4]


def test_xet_storage_without_an_answer(in_tmp, host, waits, monkeypatch):
    """Large files are on the hub's Xet storage, which hf_xet reads; plain HTTP is the second attempt."""
    pytest.importorskip("hf_xet")
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_MAX_ATTEMPTS", "0")
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_BASE_DELAY", "1ms")
    host.publish("user/name", FILES)
    host.storage = "http://127.0.0.1:1"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", False)
    assert splits_of(from_hub()) == TEXTS
    assert waits == [1]
    assert {FIRST, SECOND} <= set(host.fetched())


@pytest.mark.parametrize("error", [ConnectionError(), TimeoutError(), OSError("many\nlines")])
def test_errors_without_a_text_or_with_several_lines(in_tmp, host, waits, monkeypatch, error):
    def broken(*_, **__):
        raise error

    host.publish("user/name", FILES)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", broken)
    refused([f"could not be downloaded ({str(error).partition(chr(10))[0] or type(error).__name__})"])


@pytest.mark.parametrize(
    ("keys", "faults", "parts"),
    [
        ({"repo": "user/none"}, {}, ["user/none does not exist on the hub, or it is private", "hf auth login"]),
        ({"revision": "v9"}, {}, ["user/name", "has no revision v9", "--revision"]),
        ({"revision": "9" * 40}, {}, ["user/name", "has no revision 999", "--revision"]),
        ({"files": ("*.csv",)}, {}, ["user/name", "has no file *.csv", "--files"]),
        ({"files": ("nope/*.parquet",)}, {}, ["user/name", "has no folder nope", "--files"]),
        ({"files": ("*.md", "x")}, {"GET tree": (403, "GatedRepo")}, ["user/name is gated", "hf auth login"]),
        ({}, {f"HEAD {FIRST}": (401, "GatedRepo")}, ["accept its terms at https://huggingface.co/datasets/user/name"]),
        ({}, {f"HEAD {FIRST}": (403, "GatedRepo")}, ["user/name is gated", "HF_TOKEN"]),
        *(
            ({}, {request: (403, "")}, ["user/name", "denies access (HTTP 403)", "hf auth login"])
            for request in ("GET revision", f"HEAD {FIRST}", f"GET {FIRST}")
        ),
        ({}, {f"HEAD {FIRST}": (404, "EntryNotFound")}, ["user/name", f"has no {FIRST}", "--files"]),
        ({"repo": "user/what?"}, {}, ["user/what?", "user/name"]),
        ({"source": "wikipedia", "repo": None, "dump": "1999.en"}, {}, ["wikimedia/wikipedia", "1999.en", "--dump"]),
    ],
)
def test_errors_of_the_hub(in_tmp, host, waits, keys, faults, parts):
    """A clear answer of the hub is not requested again."""
    host.publish("user/name", FILES)
    host.publish("wikimedia/wikipedia", {"20231101.en/train-00000-of-00001.parquet": b""}, commit=WIKIPEDIA)
    host.faults = {request: itertools.repeat(fault) for request, fault in faults.items()}
    refused(parts, **keys)
    assert waits == []
    assert list(Path("data").rglob("*.parquet")) == []


@pytest.mark.parametrize(
    ("words", "offline", "part"),
    [
        (["hub", "--repo", "user/none"], False, "dataset user/none does not exist on the hub"),
        (["hub", "--repo", "user/gated"], False, "accept its terms at https://huggingface.co/datasets/user/gated"),
        (["wikitext103"], True, "wikitext-103-raw-v1 of dataset Salesforce/wikitext is not in data/raw"),
    ],
)
def test_an_error_is_one_line(in_tmp, host, cli, monkeypatch, words, offline, part):
    host.publish("user/gated", FILES)
    host.faults[f"HEAD {FIRST}"] = host.faults[f"HEAD {DATA[0]}"] = itertools.repeat((403, "GatedRepo"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    result = cli("prepare_data", *words, "--tokenizer", "byte")
    assert part in result.error
    assert (result.out, result.err.count("\n")) == ("", 1)


@pytest.mark.parametrize("listed", [False, True])
def test_offline_without_the_files(in_tmp, host, waits, monkeypatch, listed):
    """Never downloaded; or the list of files is cached, and one of them was removed."""
    host.publish("user/name", FILES)
    if listed:
        from_hub(data_dir="other")
        (RAW / SECOND).unlink()
        host.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(["HF_HUB_OFFLINE is set", SECOND if listed else "user/name", str(RAW), "unset it"])
    assert (host.asked, waits) == ([], [])


def test_errors_of_the_disk_are_not_retried(in_tmp, host, waits):
    """There is a file in the place of a folder."""
    host.publish("user/name", FILES)
    put(RAW, {"data": b"a file"})
    with pytest.raises(OSError, match="data") as caught:
        from_hub()
    assert caught.value.errno
    assert waits == []


def test_a_file_that_appears_meanwhile_is_not_replaced(in_tmp, host):
    host.publish("user/name", FILES)
    files = hub.HubFiles("user/name", "main", ("*.parquet",), RAW)
    listing = hub.list_remote(files)
    put(RAW, {FIRST: b"mine"})
    assert hub.download_file(files, listing, FIRST).read_bytes() == b"mine"
    assert host.fetched() == []
