"""From source names to shards: which text goes where, what the manifest says of it, what is said about bad input."""

import hashlib
import http.server
import json
import threading
from pathlib import Path

import pytest
from conftest import TEXT
from test_dataset import full_disk

import sources
import tokenizer
from config import PrepareConfig, UserError
from dataset import open_dataset


def prepare(source, say=lambda line: None, **keys):
    return sources.prepare(PrepareConfig(source=source, **keys), say)


def from_text(*inputs, say=lambda line: None, **keys):
    """The user's own files in bytes, in data/text_byte."""
    return prepare("text", say, **{"input": tuple(map(str, inputs)), "tokenizer": "byte", **keys})


def refusal(*args, **keys) -> str:
    with pytest.raises(UserError) as caught:
        from_text(*args, **keys)
    return str(caught.value)


def texts(data, split) -> list[str]:
    """The split's documents, cut where an end-of-text follows, decoded by hand: byte's ids are UTF-8."""
    ids = data.tokens(split)[:].tolist()
    if not data.meta["end_of_text"]:
        return [bytes(ids).decode()]
    assert ids[-1] == 256
    ends = [n for n, i in enumerate(ids) if i == 256]
    return [bytes(ids[a + 1 : b]).decode() for a, b in zip([-1, *ends], ends, strict=False)]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def files(folder: Path, **named) -> None:
    """`a="..."` writes a.txt; newlines stay as they are."""
    for name, text in named.items():
        (folder / f"{name}.txt").write_bytes(text.encode())


# ---------------------------------------------------------------------------------------------------------------------
# pydoc and shakespeare


def test_pydoc_is_the_same_bytes_everywhere(in_tmp, monkeypatch):
    """Also where Python's file would list its topics in another order."""
    from pydoc_data.topics import topics

    one = prepare("pydoc")
    monkeypatch.setattr("pydoc_data.topics.topics", dict(reversed(topics.items())))
    two = prepare("pydoc", data_dir="elsewhere")
    assert content(one.folder) == content(two.folder)
    assert one.folder == Path("data/pydoc")


def test_pydoc_is_pythons_reference_cut_at_90_percent(in_tmp):
    from pydoc_data.topics import topics

    data = prepare("pydoc")
    assert data.meta["tokenizer"] == "byte"
    (train,), (val,) = texts(data, "train"), texts(data, "val")
    text = train + val
    assert len(train) == len(text) * 9 // 10
    unique = []
    for name in sorted(topics):
        topic = topics[name].strip("\n")
        if topic not in unique:
            unique.append(topic)
    assert text == "\n\n".join(unique) + "\n"
    assert len(unique) < len(topics)
    assert len(text) > 300_000


@pytest.mark.usefixtures("gpt2_vocabulary")
def test_shakespeare_has_the_numbers_that_everybody_has(in_tmp, real_text):
    """nanoGPT's README: 301,966 and 36,059 tokens of GPT-2; and its character-level cut at 1,003,854 characters."""
    data = prepare("shakespeare", raw_dir=str(real_text))
    counts = {split: (e["tokens"], e["bytes"], e["documents"]) for split, e in data.meta["splits"].items()}
    assert counts == {"train": (301_966, 1_003_854, 1), "val": (36_059, 111_540, 1)}
    assert (data.folder, data.meta["tokenizer"]) == (Path("data/shakespeare"), "gpt2")
    raw = (real_text / "shakespeare" / "input.txt").read_bytes()
    decode = tokenizer.load("gpt2").decode_bytes
    assert decode(data.tokens("train")[:].tolist()) + decode(data.tokens("val")[:].tolist()) == raw
    in_bytes = prepare("shakespeare", raw_dir=str(real_text), tokenizer="byte")
    assert in_bytes.folder == Path("data/shakespeare_byte")
    assert [in_bytes.meta["splits"][s]["tokens"] for s in ("train", "val")] == [1_003_854, 111_540]


# ---------------------------------------------------------------------------------------------------------------------
# downloads


@pytest.fixture
def server(monkeypatch):
    """A host on this machine: serves `pages`, {path: body}; lists what it was `asked`; /cut stops in the middle."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            host.asked.append(self.path)
            body = host.pages.get(self.path)
            self.send_response(404 if body is None else 200)
            self.send_header("Content-Length", len(body or b"") + 100 * (self.path == "/cut"))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *_):
            pass

    monkeypatch.setenv("no_proxy", "*")
    host = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    host.asked, host.url = [], f"http://127.0.0.1:{host.server_port}"
    host.pages = {"/text": TEXT.encode(), "/cut": TEXT.encode()}
    thread = threading.Thread(target=host.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield host
    host.shutdown()
    host.server_close()
    thread.join()


SHA256 = hashlib.sha256(TEXT.encode()).hexdigest()


def test_download(server, tmp_path):
    path = tmp_path / "raw" / "corpus" / "input.txt"
    sources.download(f"{server.url}/text", path, SHA256)
    assert content(path.parent) == {"input.txt": TEXT.encode()}


@pytest.mark.parametrize(
    ("page", "sha256", "said"),
    [
        ("/text", "0" * 64, [SHA256[:16], "0" * 16]),
        ("/none", SHA256, ["could not be fetched", "Not Found"]),
        ("/cut", SHA256, ["could not be fetched"]),
    ],
)
def test_failed_download_leaves_nothing(server, tmp_path, page, sha256, said):
    path = tmp_path / "raw" / "input.txt"
    with pytest.raises(UserError) as caught:
        sources.download(server.url + page, path, sha256)
    for part in (server.url + page, str(path), "--raw_dir", *said):
        assert part in str(caught.value)
    assert list(tmp_path.rglob("*.*")) == []


def test_nobody_answers(server, tmp_path):
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match=r"could not be fetched \(.*refused.*check the network"):
        sources.download(server.url, tmp_path / "input.txt", SHA256)


def test_download_to_an_impossible_place(server, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"file/x.*(Not a directory|File exists)"):
        sources.download(f"{server.url}/text", tmp_path / "file" / "x" / "input.txt", SHA256)


def test_raw_file_is_fetched_once_and_its_hash_checked(server, in_tmp, monkeypatch):
    monkeypatch.setattr(sources, "SHAKESPEARE_URL", f"{server.url}/text")
    monkeypatch.setattr(sources, "SHAKESPEARE_SHA256", SHA256)
    data = prepare("shakespeare", tokenizer="byte")
    raw = Path("data/raw/shakespeare/input.txt")
    assert raw.read_bytes() == TEXT.encode()
    assert texts(data, "train") + texts(data, "val") == [TEXT[: len(TEXT) * 9 // 10], TEXT[len(TEXT) * 9 // 10 :]]
    prepare("shakespeare", tokenizer="byte", data_dir="other")
    assert server.asked == ["/text"]
    raw.write_text("Not Shakespeare")
    with pytest.raises(UserError, match=r"input\.txt is not tiny Shakespeare.*move it away"):
        prepare("shakespeare", tokenizer="byte", data_dir="third")
    assert server.asked == ["/text"], "the user's file is never overwritten"
    assert not Path("third").exists()


# ---------------------------------------------------------------------------------------------------------------------
# anyone's own files


def read(*inputs) -> str:
    """What `--input` reads: both splits, put together again."""
    data = from_text(*inputs, val_fraction=0.5)
    return "".join(texts(data, "train") + texts(data, "val"))


@pytest.mark.parametrize(
    ("inputs", "found"),
    [
        (["b.txt"], "b"),
        (["b.txt", "a.txt"], "ba"),
        (["*.txt"], "ab"),
        (["?.txt", "in"], "abcde"),
        (["in"], "cde"),
        (["in/**/*.md"], "de"),
        (["odd.html", "a.txt"], "ha"),
        (["a.txt", "a.txt", "./a.txt", "*.txt", "in/../a.txt"], "ab"),
        (["link.txt", "a.txt"], "a"),
    ],
)
def test_what_input_reads(in_tmp, inputs, found):
    """Files, folders and patterns; in a folder .txt, .md and .py; each file once, in the order given, then sorted."""
    (in_tmp / "in" / "deep").mkdir(parents=True)
    for name in ("a.txt", "b.txt", "in/c.py", "in/d.md", "in/deep/e.md", "odd.html", "in/x.html"):
        letter = "h" if name == "odd.html" else Path(name).stem
        (in_tmp / name).write_text(letter * 10)
    if "link.txt" in inputs:
        (in_tmp / "link.txt").symlink_to("a.txt")
    assert read(*inputs) == "".join(letter * 10 for letter in found)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"one\r\ntwo\r\n\r\n", "one\r\ntwo\r\n\r\n"),
        (b"\xef\xbb\xbfone two", "one two"),
        ("na\u00efve \u6771\u4eac \U0001f388\0".encode(), "na\u00efve \u6771\u4eac \U0001f388\0"),
        (b"<|endoftext|> is text here", "<|endoftext|> is text here"),
    ],
)
def test_text_stays_as_it_is_but_for_the_byte_order_mark(in_tmp, raw, text):
    Path("a.txt").write_bytes(raw)
    assert read("a.txt") == text


def test_empty_files_are_left_out(in_tmp):
    files(in_tmp, a=TEXT, empty="", blank=" \r\n\n", mark="\ufeff")
    data = from_text("*.txt")
    assert "".join(texts(data, "train") + texts(data, "val")) == TEXT
    assert sum(entry["documents"] for entry in data.meta["splits"].values()) == 2  # one file, cut in two


@pytest.mark.parametrize(
    ("named", "inputs", "said"),
    [
        ({"e": "", "f": " \n"}, ["e.txt", "f.txt"], ["e.txt f.txt", "no text"]),
        ({"a": TEXT}, ["a.txt", "b.txt"], ["--input b.txt", "no such file"]),
        ({"a": TEXT}, ["*.md"], ["--input *.md", "no file matches"]),
        ({}, ["."], ["--input .", ".txt .md .py"]),
        ({f"f{n}": f"document {n}" for n in range(100)}, ["*.txt"], ["too little text", "val split", "--val_fraction"]),
        ({"a": "a"}, ["a.txt"], ["too little text", "train split"]),
    ],
)
def test_input_that_does_not_do(in_tmp, named, inputs, said):
    files(in_tmp, **named)
    answer = refusal(*inputs, val_fraction=1e-9 if len(named) == 100 else None)
    for part in said:
        assert part in answer
    assert not Path("data").exists()


@pytest.mark.parametrize(
    ("raw", "byte", "offset"),
    [
        (b"caf\xe9 au lait", "0xe9", "3"),
        (b"\xef\xbb\xbfab\xff", "0xff", "5"),
        (b"x" * 5000 + b"\xe6\x9d", "0xe6", "5,000"),
    ],
)
def test_invalid_utf8_names_file_and_offset(in_tmp, raw, byte, offset):
    files(in_tmp, a=TEXT)
    Path("b.txt").write_bytes(raw)
    answer = refusal("a.txt", "b.txt")
    assert answer.startswith("b.txt: not UTF-8")
    assert f"{byte} at offset {offset};" in answer


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
def test_folder_is_named_after_source_and_tokenizer(in_tmp, request, source, keys, folder):
    if keys.get("tokenizer") == "gpt2" or (source == "text" and "tokenizer" not in keys):
        request.getfixturevalue("gpt2_vocabulary")
    files(in_tmp, a=TEXT)
    data = prepare(source, **({"input": ("a.txt",)} if source == "text" else {}), **keys)
    assert data.folder == Path(folder)
    assert Path(folder, "meta.json").exists()


def test_again_with_the_same_settings_does_nothing(in_tmp):
    files(in_tmp, a=TEXT)
    folder = from_text("a.txt").folder
    before, said = content(folder), []
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = from_text("a.txt", say=said.append)
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
def test_again_with_others_is_refused_naming_them(in_tmp, request, change, said):
    if change.get("tokenizer") == "gpt2":
        request.getfixturevalue("gpt2_vocabulary")
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


def test_target_that_cannot_be_made(in_tmp):
    files(in_tmp, a=TEXT)
    answer = refusal("a.txt", data_dir="a.txt/x")
    assert "a.txt/x/text_byte could not be written" in answer
    assert "not finished" in answer
    assert "\n" not in answer


@pytest.mark.parametrize("shard_tokens", [1100, 900])
def test_full_disk_leaves_an_unfinished_dataset_that_the_next_call_finishes(in_tmp, shard_tokens):
    """2,200 bytes a shard: the first one fails; 1,800 bytes: the shards fit, and the manifest does not."""
    files(in_tmp, a=TEXT)
    with full_disk(room=2000):
        answer = refusal("a.txt", shard_tokens=shard_tokens)
    assert answer == "data/text_byte could not be written: File too large; the dataset is not finished"
    with pytest.raises(UserError, match="is not finished"):
        open_dataset(Path("data/text_byte"))
    data = from_text("a.txt", shard_tokens=shard_tokens)
    assert "".join(texts(data, "train") + texts(data, "val")) == TEXT
    assert not list(data.folder.glob("*.tmp"))
