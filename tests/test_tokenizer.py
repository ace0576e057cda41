"""Tokenizers: text comes back byte for byte, and a vocabulary that cannot be used is said so with a remedy."""

import hashlib

import pytest
import tiktoken
import tiktoken.registry
from conftest import TEXT

import tokenizer
from config import UserError

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


@pytest.mark.parametrize("name", ["byte", "gpt2"])
def test_token_bytes_sum_to_the_text(name, request):
    if name == "gpt2":
        request.getfixturevalue("gpt2_vocabulary")
    encoding = tokenizer.load(name)
    lengths = tokenizer.token_bytes(encoding)
    assert lengths.shape == (encoding.n_vocab,)
    for text in (TEXT, *ODD.values()):
        assert lengths[encoding.encode_ordinary(text)].sum() == len(text.encode())
    assert lengths[encoding.eot_token] == 0
    assert (lengths == 0).sum() == 1
