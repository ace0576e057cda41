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
from flatgpt.data import tokenizer

ODD = {
    "empty": "",
    "emoji": "a 🎈 and a 👩‍👩‍👧‍👦",
    "NUL": "\0a\0\0",
    "CRLF": "one\r\ntwo\rthree\n",
    "long": ("naïve 東京 🎈\n" * 1000)[:10_000],  # longer than one match of byte's pattern
    "one line": "x" * 10_000,
    "special": "before<|endoftext|>after",  # in a text these are thirteen characters, not the end of it
}


@pytest.mark.parametrize("name", ODD)
def test_byte_is_utf8(name):
    encoding = tokenizer.load("byte")
    ids = encoding.encode_ordinary(ODD[name])
    assert ids == list(ODD[name].encode())
    assert encoding.decode(ids) == ODD[name]


def test_byte_has_257_ids():
    encoding = tokenizer.load("byte")
    assert (encoding.n_vocab, encoding.eot_token) == (257, 256)
    assert [encoding.decode_single_token_bytes(i) for i in range(256)] == [bytes([i]) for i in range(256)]


@pytest.mark.usefixtures("gpt2_vocabulary")
def test_gpt2_is_openais():
    """Ids from OpenAI's own examples."""
    encoding = tokenizer.load("gpt2")
    assert (encoding.n_vocab, encoding.eot_token) == (50257, 50256)
    assert encoding.encode_ordinary("Hello world") == [15496, 995]
    for text in ODD.values():
        ids = encoding.encode_ordinary(text)
        assert encoding.decode(ids) == text
        assert encoding.eot_token not in ids


def test_gpt2_is_synthetic_where_nobody_asks_for_openais():
    """Its merges are learnt ones, and it has GPT-2's size: what the other tests of byte-pair encoding stand on."""
    encoding = tokenizer.load("gpt2")
    assert (encoding.name, encoding.n_vocab, encoding.eot_token) == ("gpt2", 50257, 50256)
    tokens = encoding.decode_tokens_bytes(encoding.encode_ordinary("It's there,  the bottles\u6771"))
    assert tokens == [b"It", b"'s", b" there", b",", b" ", b" the", b" bottles", b"\xe6\x9d", b"\xb1"]
    assert encoding.encode_ordinary("Hello world") != [15496, 995]


@pytest.mark.parametrize("use", [tokenizer.load, tokenizer.check_name])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gpt3", ["gpt3", "unknown", "gpt2", "byte"]),
        ("", ["unknown", "gpt2", "byte"]),
        ("cl100k_base", ["cl100k_base", "100,277", "65,536", "gpt2", "byte"]),
        ("o200k_base", ["o200k_base", "200,019", "65,536", "gpt2", "byte"]),
    ],
)
def test_wrong_name_is_answered_with_the_right_ones(monkeypatch, use, name, said):
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: pytest.fail("nothing is to be fetched"))
    with pytest.raises(UserError) as caught:
        use(name)
    for part in said:
        assert part in str(caught.value)
    assert name == "" or "cl100k_base" not in str(caught.value).replace(f"tokenizer {name}", "")


@pytest.mark.parametrize("name", ["byte", "gpt2", "p50k_base"])
def test_right_names_pass_without_a_vocabulary(monkeypatch, tmp_path, name):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("requests.get", lambda *_, **__: pytest.fail("nothing is to be fetched"))
    tokenizer.check_name(name)


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
    assert tokenizer.ranks_hash(tokenizer.load.__wrapped__("gpt2")) == ranks
    with pytest.raises(UserError, match="gpt3: unknown"):
        tokenizer.vocabulary_files("gpt3")


class Garbage:
    """What a captive portal answers: a page, and no error."""

    content = b"<html>log in first</html>"

    def raise_for_status(self):
        pass


@pytest.mark.parametrize("broken", ["no network", "wrong content"])
def test_vocabulary_out_of_reach(monkeypatch, tmp_path, broken):
    """The remedies work on a machine without a network, which is where this is read."""
    requests = pytest.importorskip("requests")

    def get(url, *_, **__):
        if broken == "no network":
            raise requests.ConnectionError("no route to host", request=requests.Request("GET", url))
        return Garbage()

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    monkeypatch.setattr("requests.get", get)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    with pytest.raises(UserError) as caught:
        tokenizer.load.__wrapped__("gpt2")  # past its cache
    assert "tokenizer gpt2" in str(caught.value)
    assert "TIKTOKEN_CACHE_DIR" in str(caught.value)
    assert "--tokenizer byte" in str(caught.value)
    assert broken != "no network" or "https://" in str(caught.value)
    assert tokenizer.load.__wrapped__("byte").n_vocab == 257


def test_ranks_hash_names_the_vocabulary():
    """Written into checkpoints, so it is pinned: over id (4 bytes, little-endian), the token's bytes and a NUL."""
    plain = b"".join(i.to_bytes(4, "little") + bytes([i]) + b"\0" for i in range(256))
    assert tokenizer.ranks_hash(tokenizer.load("byte")) == hashlib.sha256(plain).hexdigest()


def test_ranks_hash_sees_two_ids_swapped():
    ranks = {bytes([b]): b for b in range(256)}
    ranks[b"a"], ranks[b"b"] = ranks[b"b"], ranks[b"a"]
    swapped = tiktoken.Encoding("byte", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 256})
    assert tokenizer.ranks_hash(swapped) != tokenizer.ranks_hash(tokenizer.load("byte"))


# ---------------------------------------------------------------------------------------------------------------------
# splitting long texts

TEXTS = st.lists(st.sampled_from([" ", "\n", "  ", "\r\n", "\t", "a", "'s", "naïve", "東京", "x" * 9]), max_size=40)


def runs(text: str) -> list[str]:
    """The text split at every break: where a blank or a newline follows a character that is not white space."""
    return re.split(r"(?<=\S)(?=[ \n])", text)


def plain_split(text: str, length: int) -> list[tuple[str, bool]]:
    """As many runs as fit, over and over; a run that is too long is split at multiples of the length."""
    found, chunk = [], ""
    for run in runs(text):
        if chunk and len(chunk) + len(run) > length:
            found.append((chunk, False))
            chunk = ""
        chunk += run
        while len(chunk) > length:
            found.append((chunk[:length], True))
            chunk = chunk[length:]
    return [*found, (chunk, False)] if chunk else found


@settings(max_examples=60)
@given(st.lists(TEXTS.map("".join), max_size=8), st.integers(1, 60))
def test_split_text_is_the_same_for_any_blocks(blocks, length):
    text = "".join(blocks)
    found = list(tokenizer.split_text(blocks, length))
    assert found == list(tokenizer.split_text([text], length)) == plain_split(text, length)
    assert "".join(chunk for chunk, _ in found) == text
    assert sum(forced_split for _, forced_split in found) == sum((len(run) - 1) // length for run in runs(text) if run)


@pytest.mark.parametrize("gap", [10, 4090, 4096, 4100, 9999, 10_000, 20_005])
def test_split_text_finds_a_break_however_far_back(gap):
    text = "one two" + "x" * gap + " three" * 4000
    assert list(tokenizer.split_text([text], 10_000)) == plain_split(text, 10_000)


def test_split_text_changes_no_id(gpt2_vocabulary, real_text):
    encoding = tokenizer.load("gpt2")
    text = (real_text / "shakespeare" / "input.txt").read_text(encoding="utf-8")[:200_000]
    chunks = [chunk for chunk, _ in tokenizer.split_text([text], 1000)]
    assert len(chunks) > 150
    assert [i for chunk in chunks for i in encoding.encode_ordinary(chunk)] == encoding.encode_ordinary(text)


@pytest.mark.parametrize(("ids", "n_vocab"), [([], 1), ([0, 256], 257), ([65535, 0], 65536)])
def test_to_uint16_keeps_ids(ids, n_vocab):
    found = tokenizer.to_uint16(np.array(ids, dtype=np.int64), n_vocab)
    assert (found.tolist(), found.dtype) == (ids, np.dtype("<u2"))


@pytest.mark.parametrize("wrong", [-1, 257, 65535, 65536 + 5])
def test_to_uint16_refuses_ids_beyond_the_vocabulary(wrong):
    """astype alone would turn 65541 into 5."""
    with pytest.raises(AssertionError):
        tokenizer.to_uint16(np.array([1, wrong, 2]), 257)
