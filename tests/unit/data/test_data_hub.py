"""Datasets on the hub: requests, files that are on the disk already, and errors.

The hub is a server in this process (hub_host.py) that huggingface_hub talks to.
"""

import itertools
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from dataset_files import texts_by_split
from huggingface_hub import constants
from prepared import content, prepare, texts

from config import PrepareConfig, UserError
from flatgpt.data import hub, subsets
from flatgpt.data.hub import hub_files
from flatgpt.data.sources import FINEWEB, WIKIPEDIA, WIKITEXT


def parquet(*rows: str, column: str = "text") -> bytes:
    file = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(rows)), column: rows}), file)
    return file.getvalue().to_pybytes()


FILES = {
    "all.jsonl": b"not read, as there are parquet files",
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


def from_hub(log=lambda line: None, **keys):
    return prepare("hub", log, **{"repo": "user/name", "tokenizer": "byte", **keys})


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


def test_split_of_a_file_name():
    """A word of the file's name, else of the innermost folder's; parts of other words do not count."""
    names = {
        "train": ["data/train-00000-of-00002.parquet", "000_00000.parquet", "contest.parquet", "devices/invalid.jsonl"],
        "val": ["validation-00000-of-00001.parquet", "wiki.val.jsonl.gz", "dev-v1.1.jsonl", "partial-validation/0.x"],
        "test": ["data/TEST.parquet", "my_testing_2.parquet", "test2.parquet", "dev/en/test/0.parquet"],
    }
    assert subsets.group_by_split([*names["test"], *names["val"], *names["train"]]) == names


def test_complete_series():
    assert hub.is_complete(["a.parquet", "train-00001-of-00002.parquet", "train-00000-of-00002.parquet"])
    assert not hub.is_complete(["a/train-00000-of-00002.parquet", "b/train-00001-of-00002.parquet"])
    assert not hub.is_complete(["train-00000-of-00002.parquet", "train-00001-of-00003.parquet"])


# ---------------------------------------------------------------------------------------------------------------------
# any repository


def test_whole_repository(in_tmp, host, monkeypatch):
    """At its newest commit, into raw_dir under the repository's names. A second dataset makes no request."""
    commit = host.publish("user/name", FILES)
    one = from_hub()
    assert texts_by_split(one) == TEXTS
    assert (one.folder, one.meta["revision"], one.meta["repo"]) == (Path("data/name_byte"), commit, "user/name")
    assert sorted(host.fetched()) == DATA
    assert [(RAW / name).read_bytes() for name in DATA] == [FILES[name] for name in DATA]
    host.asked.clear()
    host.publish("user/name", {"data/train.parquet": parquet("newer")})
    assert content(from_hub(data_dir="two").folder) == content(one.folder)
    (RAW / FIRST).write_bytes(b"cut")
    logged = []
    from_hub(logged.append)  # not even the raw files are read
    assert "nothing to do" in logged[0]
    with pytest.raises(UserError, match=f"{RAW / FIRST} has 3 bytes.*move it away"):
        from_hub(data_dir="three")
    assert host.asked == []
    (RAW / FIRST).unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=f"{FIRST} of dataset user/name.*HF_HUB_OFFLINE is set"):
        from_hub(data_dir="three")


def test_revisions(in_tmp, host):
    """Each has its own list of files; a file that is another one at the new revision is replaced."""
    main = host.publish("user/name", FILES)
    commit = host.publish("user/name", {**FILES, FIRST: parquet("1", "2")}, "v2")
    assert from_hub(name="main").meta["revision"] == main
    host.asked.clear()
    assert texts_by_split(from_hub(revision="v2", name="v2"))["train"] == ["1", "2", "three"]
    assert host.fetched() == [FIRST]
    data = from_hub(revision=commit[:7], name="short", raw_dir="raw")
    assert (data.meta["revision"], texts_by_split(data)["train"]) == (commit, ["1", "2", "three"])


@pytest.mark.parametrize("where", ["data/", ""])
def test_files_of_the_user(in_tmp, host, where):
    """Under their names in the repository or without folders: a complete folder is used without a request."""
    host.publish("user/name", FILES)
    names = [FIRST, SECOND, "data/validation-00000-of-00001.parquet"]
    paths = [where + name.removeprefix("data/") for name in names]
    put(RAW, {path: FILES[name] for path, name in zip(paths, names, strict=True)} | {"notes.txt": b"mine"})
    logged = []
    data = from_hub(logged.append)
    assert texts_by_split(data) == {"train": TEXTS["train"], "val": ["four"]}
    assert data.meta["revision"] == "main"
    assert "using the local files, without a request to the hub" in logged[0]
    assert host.asked == []
    (RAW / paths[1]).unlink()  # its series is incomplete now
    assert texts_by_split(from_hub(name="completed")) == TEXTS
    assert sorted(host.fetched()) == [name for name in DATA if name not in (names[0], names[2])]
    assert [path.relative_to(RAW).as_posix() for path in RAW.rglob("train-00000*.parquet")] == paths[:1]


def lines(text: str) -> bytes:
    return b'{"text": "%s"}\n' % text.encode()


IN_D = {f"d/{name}.jsonl": lines(name) for name in ("train", "Dev", "dev", "test")}
ALIKE = {"train.jsonl": lines("first"), **IN_D}


@pytest.mark.parametrize(
    ("published", "files", "by_hand", "used"),
    [
        (ALIKE, ("*.jsonl",), {"train.jsonl": lines("first")}, ["train.jsonl"]),  # of the size of d/train.jsonl
        (ALIKE, ("d/*",), {"train.jsonl": lines("first")}, []),
        # names that differ only in case, which some file systems do not tell apart; a name that only one file has
        (IN_D, (), {"dev.jsonl": lines("dev"), "test.jsonl": lines("test")}, ["d/test.jsonl"]),
        (ALIKE, ("d/*",), {"test.jsonl": lines("test")}, ["d/test.jsonl"]),
        (IN_D, (), {"test.jsonl": lines("another size")}, []),
        (IN_D, (), {"test.jsonl/train.jsonl": b""}, []),
        (IN_D, (), {"test.jsonl": lines("mine"), "d/test.jsonl": lines("test")}, ["d/test.jsonl"]),
    ],
)
def test_file_in_the_root_is_used_where_it_can_only_be_one(in_tmp, host, published, files, by_hand, used):
    host.publish("user/name", published)
    put(RAW, by_hand)
    hub.list_remote(hub_files(PrepareConfig(source="hub", repo="user/name", files=files)))
    found = texts_by_split(from_hub(files=files))
    root = ["first"] if "*.jsonl" in files else []
    assert found == {"train": ["train", *root], "val": ["Dev", "dev"], "test": ["test"]}
    assert sorted(host.fetched()) == sorted({*IN_D} - {*used})
    assert all((RAW / name).read_bytes() == content for name, content in by_hand.items())


def test_local_files_without_a_list(in_tmp, host):
    """A file is not read twice; a link to a folder is followed; --files names a folder, so the root is not enough."""
    put(Path("elsewhere"), {f"train-0000{n}-of-00002.parquet": parquet(f"{n}") for n in (0, 1)})
    root = Path("data/raw/fineweb")
    put(root, {"train-00000-of-00002.parquet": parquet("0"), "sample/x.parquet": b""})
    (root / "sample/10BT").symlink_to(Path("elsewhere").absolute())
    (root / "sample/up").symlink_to("..")
    data = prepare("fineweb", tokenizer="byte", data_dir="out")
    assert sorted(texts(data, "train") + texts(data, "val")) == ["0", "1"]
    assert host.asked == []
    put(RAW, {"test.jsonl": lines("mine")})
    refused(["user/name", "does not exist on the hub"], files=("d/*",))


def test_folder_in_place_of_a_file_and_damaged_lists(in_tmp, host):
    host.publish("user/name", ALIKE)
    put(RAW, {"d/test.jsonl/x": b"mine"})
    refused([f"{RAW}/d/test.jsonl is a folder", "move it away"], files=("d/test.jsonl",))
    list_file = next(RAW.glob(".listing-*"))
    (RAW / "d").rename("moved")
    for damaged in (b"", b"\xff", b"[]", b"3", b'{"commit": 3, "files": {}}', b'{"commit": "a", "files": {"a": "b"}}'):
        list_file.write_bytes(damaged)
        data = from_hub(files=("d/test.jsonl",), data_dir=f"data{len(damaged)}")
        assert texts(data, "test") == ["test"]


def test_several_folders(in_tmp, host):
    """The error names them; --files chooses, also when the folder of raw files has others."""
    host.publish(
        "user/name", {f"{c}/{s}.parquet": parquet(c + s, column="body") for c in "ab" for s in ("train", "dev")}
    )
    refused(["user/name", "2 subsets (a, b)", "--subset a", "--files 'a/*'", "all: '*.parquet'"], column="body")
    assert host.fetched() == []
    data = from_hub(files=("b/*",), column="body")
    assert (texts_by_split(data), data.meta["files"]) == ({"train": ["btrain"], "val": ["bdev"]}, ["b/*"])
    with pytest.raises(UserError, match=r"other settings: files \['b/\*'\]"):
        from_hub(files=("*.parquet",), column="body")
    both = from_hub(files=("a/*.parquet", "b/t*"), column="body", name="both")
    assert texts_by_split(both) == {"train": ["atrain", "btrain"], "val": ["adev"]}


CARD = {
    "configs": [
        {"config_name": "en", "data_files": [{"split": "train", "path": ["texts/one-*", "texts/two-*"]}]},
        {
            "config_name": "de",
            "data_files": [{"split": "train", "path": "de/a*"}, {"split": "validation", "path": "de/v*"}],
        },
        {"config_name": "csv", "data_files": "*.csv"},
        {"config_name": "fr", "data_dir": "french"},
    ]
}
IN_CARD = ["de/a.parquet", "de/v.parquet", "french/test.parquet", "texts/one-0.parquet", "texts/two-0.parquet", "x.csv"]


def test_subsets_of_the_card(in_tmp, host):
    """Its splits count, not the files' names. A second one makes no request but its downloads."""
    commit = host.publish("user/name", {name: parquet(name) for name in [*IN_CARD, "texts/three-0.parquet"]})
    host.cards["user/name"] = CARD
    refused(["user/name has 4 subsets (csv, de, en, fr)", "--subset csv"])
    refused(["user/name has no subset d; it has de, csv"], subset="d")
    refused(["subset csv of dataset user/name has no parquet", "in *.csv", "refs/convert/parquet"], subset="csv")
    assert host.fetched() == []
    host.asked.clear()
    for subset, expected in {
        "de": {"train": ["de/a.parquet"], "val": ["de/v.parquet"]},
        "en": {"train": ["texts/one-0.parquet", "texts/two-0.parquet"]},
        "fr": {"test": ["french/test.parquet"]},
    }.items():
        data = from_hub(subset=subset, val_fraction=None if subset == "de" else 0)
        assert (data.folder, texts_by_split(data)) == (Path(f"data/name_{subset}_byte"), expected)
        assert (data.meta["subset"], data.meta["revision"]) == (subset, commit)
    assert {what for what in host.asked if what.startswith("GET") and "." not in what} == set()
    assert sorted(host.fetched()) == IN_CARD[:-1]


@pytest.mark.parametrize("default", [{"config_name": "default"}, {"config_name": "en", "default": True}])
def test_default_subset(in_tmp, host, default):
    host.publish("user/name", {name: parquet(name) for name in IN_CARD})
    host.cards["user/name"] = {"configs": [*CARD["configs"][1:], {**default, "data_files": "texts/two*"}, "odd", {}]}
    data = from_hub(val_fraction=0)
    assert (data.folder, texts_by_split(data)) == (Path("data/name_byte"), {"train": ["texts/two-0.parquet"]})


@pytest.mark.parametrize(
    "card", [None, {}, {"configs": None}, {"configs": [{"config_name": "a", "data_files": "no/*"}]}]
)
def test_subsets_of_folders(in_tmp, host, card):
    """As of refs/convert/parquet, which has a folder for each split; by the name or the path of a folder."""
    published = ("a/b/train/0.parquet", "a/b/partial-validation/0.parquet", "a/c/train/0.jsonl", "d/b/test/0.parquet")
    host.publish("user/name", {name: lines(name) if "json" in name else parquet(name) for name in published})
    host.cards["user/name"] = card
    refused(["2 subsets (a/b, d/b)", "--subset a/b", "--files 'a/b/*'"])
    refused(["2 subsets (a/b, d/b)"], subset="b")
    refused(["has no subset e; it has a/b, a/c, d/b"], subset="e")
    for subset, expected in {
        "a/b": {"train": [published[0]], "val": [published[1]]},
        "c": {"train": [published[2]]},
        "d": {"test": [published[3]]},
    }.items():
        data = from_hub(subset=subset, name=f"of {subset[0]}", val_fraction=None if subset == "a/b" else 0)
        assert texts_by_split(data) == expected


def test_subset_of_local_files(in_tmp, host):
    """One that is on the disk needs no hub."""
    put(RAW, {"en/train.parquet": parquet("mine"), "de/train.parquet": parquet("meins")})
    assert texts_by_split(from_hub(subset="en", val_fraction=0)) == {"train": ["mine"]}
    assert host.asked == []
    with pytest.raises(UserError, match=r"user/name.* does not exist on the hub"):
        from_hub(subset="fr")


def test_refresh(in_tmp, host):
    """The notice of a cached list names it; a dataset of the older commit is kept."""
    first = host.publish("user/name", {"train.jsonl": lines("old"), "test.jsonl": lines("old test")})
    keys = {"val_fraction": 0, "name": "mine"}
    old = from_hub(refresh=True, **keys)
    assert old.meta["revision"] == first
    second = host.publish("user/name", {"train.jsonl": lines("newer"), "test.jsonl": lines("old test")})
    logged = []
    from_hub(logged.append, **{**keys, "name": "again"})
    assert f"commit {first}" in logged[0]
    assert "--refresh" in logged[0]
    with pytest.raises(UserError, match=rf"revision {first} \(now {second}\).*--overwrite"):
        from_hub(refresh=True, **keys)
    logged.clear()
    data = from_hub(logged.append, refresh=True, overwrite=True, **keys)
    assert texts_by_split(data) == {"train": ["newer"], "test": ["old test"]}
    assert not any("cached in" in line for line in logged)
    host.faults["GET revision"] = itertools.repeat("drop")
    with pytest.raises(UserError, match="check the network"):
        from_hub(refresh=True, **keys)
    assert "nothing to do" in (from_hub(logged.append, **keys), logged[-1])[1]


# ---------------------------------------------------------------------------------------------------------------------
# known repositories


RAW_CONFIG = "wikitext-103-raw-v1"
WIKITEXT_ROWS = {
    "train-00000-of-00002": ["", " = Title = \n", "", " Some text . \n"],
    "train-00001-of-00002": [" More of it . \n", ""],
    "validation-00000-of-00001": ["", " = Other = \n"],
    "test-00000-of-00001": [" = Third = \n", ""],
}
WIKITEXT_TEXTS = {
    "train": " = Title = \n Some text . \n More of it . \n",
    "val": " = Other = \n",
    "test": " = Third = \n",
}


@pytest.mark.parametrize(
    ("by_hand", "splits", "fetched"),
    [
        ([], (), list(WIKITEXT_ROWS)),
        ([], ("val",), ["validation-00000-of-00001"]),
        (["test-00000-of-00001"], ("test",), []),
        (["test-00000-of-00001"], (), [name for name in WIKITEXT_ROWS if "test" not in name]),
    ],
)
def test_wikitext103(in_tmp, host, by_hand, splits, fetched):
    """One running text per split; the splits that are missing are downloaded, the others need no hub."""
    files = {f"{RAW_CONFIG}/{name}.parquet": parquet(*rows) for name, rows in WIKITEXT_ROWS.items()}
    host.publish(
        "Salesforce/wikitext", {"wikitext-2-v1/train.parquet": parquet("<unk>"), **files}, commit=WIKITEXT.commit
    )
    put(Path("data/raw/wikitext103"), {f"{name}.parquet": files[f"{RAW_CONFIG}/{name}.parquet"] for name in by_hand})
    data = prepare("wikitext103", tokenizer="byte", splits=splits)
    assert texts_by_split(data) == {split: [WIKITEXT_TEXTS[split]] for split in splits or WIKITEXT_TEXTS}
    assert (data.meta["end_of_text"], data.meta["revision"]) == (False, WIKITEXT.commit)
    documents = {"train": 6, "val": 2, "test": 2}  # rows, also empty ones
    assert all(entry["documents"] == documents[split] for split, entry in data.meta["splits"].items())
    assert sorted(host.fetched()) == [f"{RAW_CONFIG}/{name}.parquet" for name in sorted(fetched)]


def test_dumps_of_wikipedia_are_separate(in_tmp, host):
    """Files without a folder are of the default dump; each dump has its own folder and dataset."""
    numbered = [f"train-0000{n}-of-00002.parquet" for n in (0, 1)]
    put(Path("data/raw/wikipedia"), {f"{f}{n}": parquet(f"{f}mine") for f in ("", "20231101.nds/") for n in numbered})
    dumps = {f"{dump}/{n}": parquet(dump) for dump in ("20231101.simple", "20231101.en") for n in numbered}
    host.publish("wikimedia/wikipedia", dumps, commit=WIKIPEDIA.commit)
    keys = {"tokenizer": "byte", "val_fraction": 0.5}
    for dump, suffix, text in ((None, "", "mine"), ("20231101.simple", "_20231101.simple", "20231101.simple")):
        data = prepare("wikipedia", dump=dump, **keys)
        assert data.folder == Path(f"data/wikipedia{suffix}_byte")
        assert sorted("".join(texts(data, "train") + texts(data, "val"))) == sorted(text * 2)
        assert host.fetched() == [f"{dump}/{name}" for name in numbered] * bool(dump)


def test_a_sample_of_fineweb_downloads_the_files_that_it_needs(in_tmp, host):
    """Of 60 documents each: 1 file for 60 documents, 3 for 150, and then the last one for all."""
    names = [f"sample/10BT/00{n}_00000.parquet" for n in range(4)]
    files = {name: parquet(*(f"document {n} {k}" for k in range(60))) for n, name in enumerate(names)}
    files["data/CC-MAIN-2013-20/train-00000-of-00014.parquet"] = parquet("another configuration")
    host.publish("HuggingFaceFW/fineweb-edu", files, commit=FINEWEB.commit)
    documents = [f"document {n} {k}" for n in range(4) for k in range(60)]
    for size, fetched in ((60, names[:1]), (150, names[:3]), (None, names)):
        data = prepare("fineweb", tokenizer="byte", sample_size=size, val_fraction=0.5, name=f"s{size}")
        found = texts(data, "train") + texts(data, "val")
        assert len("".join(found)) == len("".join(documents[:size]))
        assert set(found) == set(documents[:size]) or size == 60  # so few are split by characters
        assert host.fetched() == fetched


def test_size_of_a_download_is_said_before_it(in_tmp, host):
    """Also why a share of the training files, alone, needs them all."""
    files = {f"sample/10BT/00{n}_00000.parquet": parquet(*(f"document {n} {k}" for k in range(60))) for n in range(3)}
    host.publish("HuggingFaceFW/fineweb-edu", files, commit=FINEWEB.commit)

    def log(line: str) -> None:
        logged.append((line, len(host.fetched())))

    for keys, lines in (
        ({"sample_size": 60}, []),
        (
            {"splits": ("val",), "name": "v"},
            ["downloading 2 files, 1 MB, to data/raw: val is a share of all"],
        ),
        ({"name": "all"}, []),
    ):
        logged = []
        prepare("fineweb", log, tokenizer="byte", val_fraction=0.5, **keys)
        assert [line[: len(start)] for (line, fetched), start in zip(logged, lines, strict=True)] == lines
        assert all(fetched == 1 for _, fetched in logged)


# ---------------------------------------------------------------------------------------------------------------------
# errors


@pytest.mark.parametrize(
    ("keys", "faults", "parts"),
    [
        ({"repo": "user/none"}, {}, ["user/none", "does not exist on the hub, or it is private", "hf auth login"]),
        ({"revision": "v9"}, {}, ["user/name, revision v9", "no such revision"]),
        ({"files": ("*.csv",)}, {}, ["user/name", "has no file *.csv", "--files", "--revision"]),
        ({"source": "wikipedia", "repo": None, "dump": "1999.en"}, {}, ["wikimedia/wikipedia", "1999.en", "--dump"]),
        ({"repo": "user/what?"}, {}, ["user/what?", "user/name"]),
        ({}, {f"HEAD {FIRST}": (403, "GatedRepo")}, ["user/name", "gated", "accept the terms", "HF_TOKEN"]),
        ({}, {"GET revision": (403, "")}, ["user/name", "403 Forbidden", "hf auth login"]),
        ({}, {"GET revision": "drop"}, ["user/name", "Server disconnected", "check the network", f"machine to {RAW}"]),
        (
            {},
            {f"GET {FIRST}": (503, "")},
            [f"{FIRST} of dataset user/name", str(RAW), "503", "complete files are kept"],
        ),
    ],
)
def test_errors_of_the_hub(in_tmp, host, waits, keys, faults, parts):
    host.publish("user/name", FILES)
    host.publish("wikimedia/wikipedia", {"20231101.en/train-00000-of-00001.parquet": b""}, commit=WIKIPEDIA.commit)
    host.faults = {request: itertools.repeat(fault) for request, fault in faults.items()}
    refused(parts, **keys)
    assert list(Path("data").rglob("*.parquet")) == []
