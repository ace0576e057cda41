"""Tokenizers: text comes back byte for byte, long texts are split without changing ids, and remedies are named."""

import hashlib
import re

import numpy as np
import pytest
import tiktoken
import tiktoken.registry
from hypothesis import given, settings
from hypothesis import strategies as st

from config import UserError
from flatgpt.data import chunks, tokenizer
from flatgpt.data.encode import tiktoken_ids

ODD = [
    *("", "a 🎈 and a 👩‍👩‍👧‍👦", "\0a\0\0", "one\r\ntwo\rthree\n", "x" * 10_000),
    ("naïve 東京 🎈\n" * 1000)[:10_000],  # longer than one match of byte's pattern
    "before<|endoftext|>after",  # in a text these are thirteen characters, not the end of it
]


def test_byte_is_utf8():
    encoding = tokenizer.load("byte")
    assert (encoding.n_vocab, encoding.eot_token) == (257, 256)
    for text in ODD:
        assert encoding.encode_ordinary(text) == list(text.encode())
        assert encoding.decode(encoding.encode_ordinary(text)) == text
    # Written into checkpoints, so it is pinned: over id (4 bytes, little-endian), the token's bytes and a NUL.
    plain = b"".join(i.to_bytes(4, "little") + bytes([i]) + b"\0" for i in range(256))
    assert tokenizer.ranks_hash(encoding) == hashlib.sha256(plain).hexdigest()


@pytest.mark.usefixtures("gpt2_vocabulary")
def test_gpt2_is_openais():
    """Ids from OpenAI's own examples."""
    encoding = tokenizer.load("gpt2")
    assert (encoding.n_vocab, encoding.eot_token) == (50257, 50256)
    assert encoding.encode_ordinary("Hello world") == [15496, 995]
    for text in ODD:
        ids = encoding.encode_ordinary(text)
        assert encoding.decode(ids) == text
        assert encoding.eot_token not in ids


@pytest.mark.parametrize("use", [tokenizer.load, tokenizer.check_name, tokenizer.vocabulary_files])
@pytest.mark.parametrize(
    ("name", "said"), [("gpt3", "unknown"), ("", "unknown"), ("cl100k_base", "has 100,277 ids; at most 65,536")]
)
def test_wrong_name_is_answered_with_the_right_ones(monkeypatch, use, name, said):
    """Nothing is fetched to find out; nor for a right name."""
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: pytest.fail("nothing is to be fetched"))
    with pytest.raises(UserError, match=rf"tokenizer {name}: {said}.*; use one of gpt2, .*, p50k_edit, byte$"):
        use(name)
    tokenizer.check_name("p50k_base")


def test_vocabulary_files(monkeypatch, tmp_path):
    """They are a TIKTOKEN_CACHE_DIR with which nothing is fetched; tiktoken is as before."""
    assert tokenizer.vocabulary_files("byte") == {}
    read = tiktoken.load.read_file_cached
    ranks, files = tokenizer.ranks_hash(tokenizer.load("gpt2")), tokenizer.vocabulary_files("gpt2")
    assert tiktoken.load.read_file_cached is read
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("requests.get", lambda *_, **__: pytest.fail("nothing is to be fetched"))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    assert tokenizer.ranks_hash(tokenizer._load_named.__wrapped__("gpt2")) == ranks


@pytest.mark.parametrize("broken", ["no network", "wrong content"])
def test_vocabulary_out_of_reach(monkeypatch, tmp_path, broken):
    """The remedies work on a machine without a network, which is where this is read."""
    requests = pytest.importorskip("requests")

    def get(url, *_, **__):
        if broken == "no network":
            raise requests.ConnectionError(f"no route to {url}")
        found = requests.Response()
        found.status_code, found._content = 200, b"<html>log in first</html>"  # of a captive portal
        return found

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    monkeypatch.setattr("requests.get", get)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    with pytest.raises(UserError, match=r"tokenizer gpt2: .*https://.*TIKTOKEN_CACHE_DIR.*--tokenizer byte"):
        tokenizer._load_named.__wrapped__("gpt2")  # past its cache


# ---------------------------------------------------------------------------------------------------------------------
# splitting long texts

TEXTS = st.lists(st.sampled_from([" ", "\n", "  ", "\r\n", "\t", "a", "'s", "naïve", "東京", "x" * 9]), max_size=40)


def plain_split(text: str, length: int) -> list[str]:
    """As many runs as fit, over and over; a run that is too long is split at multiples of the length."""
    found, chunk = [], ""
    for run in re.split(r"(?<=\S)(?=[ \n])", text):  # at every break
        if chunk and len(chunk) + len(run) > length:
            found.append(chunk)
            chunk = ""
        chunk += run
        while len(chunk) > length:
            found.append(chunk[:length])
            chunk = chunk[length:]
    return [*found, chunk] if chunk else found


@settings(max_examples=60)
@given(st.lists(TEXTS.map("".join), max_size=8), st.integers(1, 60))
def test_split_text_is_the_same_for_any_blocks(blocks, length):
    text = "".join(blocks)
    assert list(chunks.split_text(blocks, length)) == plain_split(text, length)
    assert list(chunks.split_text([text], length)) == plain_split(text, length)


def test_split_text_changes_no_id(gpt2_vocabulary, real_text):
    encoding = tokenizer.load("gpt2")
    text = (real_text / "shakespeare" / "input.txt").read_text(encoding="utf-8")[:200_000]
    parts = list(chunks.split_text([text], 1000))
    assert len(parts) > 150
    assert [i for chunk in parts for i in encoding.encode_ordinary(chunk)] == encoding.encode_ordinary(text)


def test_to_uint16_refuses_ids_beyond_the_vocabulary():
    """astype alone would turn 65541 into 5."""
    for ids, n_vocab in (([], 1), ([0, 256], 257), ([65535, 0], 65536)):
        found = tokenizer.to_uint16(np.array(ids, dtype=np.int64), n_vocab)
        assert (found.tolist(), found.dtype) == (ids, np.dtype("<u2"))
    for wrong in (-1, 257, 65535, 65536 + 5):
        with pytest.raises(ValueError, match="not all in a vocabulary of 257 ids"):  # not an assert: -O removes those
            tokenizer.to_uint16(np.array([1, wrong, 2]), 257)


LLAMA = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@pytest.mark.parametrize(
    "pattern", [tokenizer.PATTERN, tokenizer.MARKS_PATTERN, LLAMA], ids=["GPT-2's", "marks", "Llama 3's"]
)
@pytest.mark.parametrize("parse_special", [False, True])
def test_a_million_blanks(pattern, parse_special):
    """They overflow the stack of tiktoken's regular expressions if they are encoded in one call."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    encoding = tokenizer.FileTokenizer("bytes", pattern, ranks, {"<|endoftext|>": 256})
    text = "a" + " " * 1_100_000 + "word" + "\n" * 1_100_000
    assert tokenizer.encode(encoding, text, parse_special) == [*text.encode()]
    if not parse_special:
        assert tiktoken_ids(encoding, [text, "b"], [False, False]).tolist() == [*text.encode(), ord("b")]


@pytest.mark.parametrize("unit", ["a", "🎈", "\0", "\ud800", " \n", "a ", "a" * 9 + "\n"], ids=ascii)
def test_long_text_has_the_ids_of_one_call(unit, monkeypatch, gpt2_vocabulary):
    """A text is cut only inside of white space that is longer than the limit."""
    encoding, text = tokenizer.load("gpt2"), "the " + unit * 40
    expected = encoding.encode_ordinary(text)
    monkeypatch.setattr(tokenizer, "MAX_ENCODE_CHARS", 16)
    found = tokenizer.encode_ordinary(encoding, text)
    assert encoding.decode_bytes(found) == encoding.decode_bytes(expected)
    assert found == expected or unit.isspace()
