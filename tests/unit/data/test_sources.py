"""The sources: pydoc, tiny Shakespeare, downloads, and the user's own files."""

import hashlib
import http.server
import threading
from pathlib import Path

import pytest
from in_process import TEXT
from prepared import content, files, from_text, prepare, refusal, texts

from config import UserError
from flatgpt.data import sources, tokenizer

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
    assert len(unique) < len(topics)
    assert len(train) > 300_000
    monkeypatch.setattr("pydoc_data.topics.topics", dict(reversed(topics.items())))
    assert content(prepare("pydoc", data_dir="elsewhere").folder) == content(data.folder)


@pytest.mark.usefixtures("gpt2_vocabulary")
def test_published_sizes_of_shakespeare(in_tmp, real_text):
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
    """Serve `pages` ({path: body}) and list the requested paths in `asked`; /cut ends in the middle of its body."""

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
    ("page", "place", "sha256", "parts"),
    [
        ("/text", "raw/input.txt", "0" * 64, [SHA256[:16], "0" * 16, "--raw_dir"]),
        ("/none", "raw/input.txt", SHA256, ["could not be downloaded", "Not Found", "--raw_dir"]),
        ("/cut", "raw/input.txt", SHA256, ["could not be downloaded", "--raw_dir"]),
        (None, "raw/input.txt", SHA256, ["could not be downloaded (", "refused", "check the network"]),
        ("/text", "file/x/input.txt", SHA256, ["could not be written"]),
    ],
)
def test_a_failed_download_leaves_nothing(server, tmp_path, page, place, sha256, parts):
    """Another content, no page, a broken connection, no server, and a folder that cannot be made."""
    (tmp_path / "file").write_text("x")
    if page is None:
        server.shutdown()
        server.server_close()
    with pytest.raises(UserError) as caught:
        sources.download(server.url + (page or ""), tmp_path / place, sha256)
    for part in (str(tmp_path / place), *parts):
        assert part in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_shakespeare_is_downloaded_once_and_checked(server, in_tmp, monkeypatch):
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
# the user's files


def read(*inputs) -> str:
    """Return the text of both splits."""
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
def test_input_files(in_tmp, inputs, found):
    """Files, patterns, and folders with the known suffixes; each file once, in the given order, then sorted."""
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
def test_text_is_unchanged_except_for_a_byte_order_mark(in_tmp, raw, text):
    Path("a.txt").write_bytes(raw)
    assert read("a.txt") == text


def test_empty_files_are_left_out(in_tmp):
    """A file with only a byte order mark is empty, one with white space is not."""
    files(in_tmp, a=TEXT, blank=" \r\n\n", empty="", mark="\ufeff")
    data = from_text("*.txt", val_fraction=0.5)
    train, val = texts(data, "train"), texts(data, "val")
    assert "".join(train + val) == TEXT + " \r\n\n"
    assert (len(train), val[-1]) == (1, " \r\n\n")
    assert sum(entry["documents"] for entry in data.meta["splits"].values()) == 3  # two files, one split in two


@pytest.mark.parametrize(
    ("named", "inputs", "parts"),
    [
        ({"e": "", "f": "\ufeff"}, ["e.txt", "f.txt"], ["too little text", "train split"]),
        ({"a": TEXT}, ["a.txt", "b.txt"], ["--input b.txt", "no such file"]),
        ({"a": TEXT}, ["*.md"], ["--input *.md", "no file matches"]),
        ({}, ["."], ["--input .", ".txt .md .py"]),
        ({f"f{n}": f"document {n}" for n in range(100)}, ["*.txt"], ["too little text", "val split", "--val_fraction"]),
        ({"a": "a"}, ["a.txt"], ["too little text", "train split"]),
    ],
)
def test_refused_input(in_tmp, named, inputs, parts):
    files(in_tmp, **named)
    answer = refusal(*inputs, val_fraction=1e-9 if len(named) == 100 else None)
    for part in parts:
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
