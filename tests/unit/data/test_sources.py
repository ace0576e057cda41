"""From source names to files: one text, downloads, anyone's own; which split a name speaks of; what is refused."""

import hashlib
import http.server
import threading
from pathlib import Path

import pytest
from in_process import TEXT

from config import PrepareConfig, UserError
from flatgpt.data import prepare as preparation
from flatgpt.data import sources, tokenizer


def prepare(source, log=lambda line: None, **keys):
    return preparation.prepare(PrepareConfig(source=source, **keys), log)


def from_text(*inputs, log=lambda line: None, **keys):
    """The user's own files in bytes, in data/text_byte."""
    return prepare("text", log, **{"input": tuple(map(str, inputs)), "tokenizer": "byte", **keys})


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
        ("/none", SHA256, ["could not be downloaded", "Not Found"]),
        ("/cut", SHA256, ["could not be downloaded"]),
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
    with pytest.raises(UserError, match=r"could not be downloaded \(.*refused.*check the network"):
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
        (["?.txt", "in"], "abcdej"),
        (["in"], "cdej"),
        (["in/**/*.md"], "de"),
        (["odd.html", "a.txt"], "ha"),
        (["a.txt", "a.txt", "./a.txt", "*.txt", "in/../a.txt"], "ab"),
        (["link.txt", "a.txt"], "a"),
    ],
)
def test_what_input_reads(in_tmp, inputs, found):
    """Files, folders and patterns; in a folder what we can read; each file once, in the order given, then sorted."""
    (in_tmp / "in" / "deep").mkdir(parents=True)
    for name in ("a.txt", "b.txt", "in/c.py", "in/d.md", "in/deep/e.md", "odd.html", "in/x.html"):
        letter = "h" if name == "odd.html" else Path(name).stem
        (in_tmp / name).write_text(letter * 10)
    (in_tmp / "in" / "j.jsonl").write_text('{"text": "jjjjjjjjjj"}\n')
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
    """Those without a character: a byte order mark is none, white space is."""
    files(in_tmp, a=TEXT, blank=" \r\n\n", empty="", mark="\ufeff")
    data = from_text("*.txt", val_fraction=0.5)
    train, val = texts(data, "train"), texts(data, "val")
    assert "".join(train + val) == TEXT + " \r\n\n"
    assert (len(train), val[-1]) == (1, " \r\n\n")
    assert sum(entry["documents"] for entry in data.meta["splits"].values()) == 3  # two files, one cut in two


@pytest.mark.parametrize(
    ("named", "inputs", "said"),
    [
        ({"e": "", "f": "\ufeff"}, ["e.txt", "f.txt"], ["too little text", "train split"]),
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
