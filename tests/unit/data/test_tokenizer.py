"""Tokenizers: text comes back byte for byte, many documents are encoded as each one alone, and remedies are named."""

import base64
import concurrent.futures
import hashlib
import random
import re

import numpy as np
import pytest
import tiktoken
import tiktoken.registry
from hypothesis import given, settings
from hypothesis import strategies as st

from config import UserError
from flatgpt.data import tokenizer

quick = settings(max_examples=60)

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
# encode: many documents at once, as encode_ordinary has each alone

EOT = "<|endoftext|>"
SPACES = [chr(n) for n in range(0x110000) if chr(n).isspace()]  # with U+001C to 1F, which are none to tiktoken
WORDS = [
    "the",
    "Naïve",
    "東京",
    "e\u0301",
    "🎈",
    "👩‍👩",
    "\u200b",
    "\0",
    "'s",
    "'re",
    "'ll",
    "'",
    "\u2019s",
    "2024",
    "x1",
    "...",
    "-",
]
MARKS = [EOT, EOT[:-1], EOT[1:], "<|", "|>", "<", ">", "endoftext", "<|fim_prefix|>"]
BITS = (
    st.sampled_from([" ", "\n", "  ", "\n\n", "\r\n", "\t", " a", "\nb"])
    | st.sampled_from([*WORDS, *(" " + word for word in WORDS)])
    | st.sampled_from(SPACES)
    | st.sampled_from(MARKS)
    | st.text(max_size=3)
)
NASTY = st.lists(BITS, max_size=30).map("".join) | st.text(" \n\r\tab'.1", max_size=60)

GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""  # as OpenAI published it


def small_bpe(name: str, pattern: str) -> tiktoken.Encoding:
    """Bytes, and all that two and four of these characters make: a cut in the wrong place changes ids."""
    ranks = {bytes([b]): b for b in range(256)}
    pairs = [a + b for a in " \nabe1.'" for b in " \nabe1.'"]
    for token in [*pairs, *(a + b for a in pairs for b in pairs)]:
        ranks[token.encode()] = len(ranks)
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={EOT: len(ranks)})


@pytest.fixture(scope="module", params=["byte", "small", "gpt2", "p50k_base"])
def encoding(request):
    """`small` is GPT-2's pattern with a few merges."""
    return small_bpe("gpt2", GPT2_PATTERN) if request.param == "small" else tokenizer.load(request.param)


def runs(text: str) -> list[str]:
    """The text cut at every break: where a blank or a newline follows something that is not white space."""
    return re.split(r"(?<=\S)(?=[ \n])", text)


def plain_pieces(text: str, length: int) -> list[tuple[str, bool]]:
    """As many runs as fit, over and over; a run that is too long is cut at multiples of the length."""
    found, piece = [], ""
    for run in runs(text):
        if piece and len(piece) + len(run) > length:
            found.append((piece, False))
            piece = ""
        piece += run
        while len(piece) > length:
            found.append((piece[:length], True))
            piece = piece[length:]
    return [*found, (piece, False)] if piece else found


def forced_cuts(text: str, length: int) -> int:
    return sum((len(run) - 1) // length for run in runs(text) if run)


@settings(quick, max_examples=120)
@given(
    st.lists(NASTY, max_size=12),
    st.booleans(),
    st.integers(8, 200) | st.just(tokenizer.MAX_ENCODE_CHARS),
    st.integers(0, 200),
)
def test_encode_is_encode_ordinary_of_each_document(encoding, documents, end_of_text, run, block):
    """Exactly, unless a run without a break is longer than MAX_ENCODE_CHARS; then as text, and the cuts are counted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "MAX_ENCODE_CHARS", run)
        patch.setattr(tokenizer, "BLOCK", block)
        ids, cuts = tokenizer.encode(encoding, iter(documents), end_of_text)
    assert ids.dtype == np.dtype("<u2")
    expected = 0 if encoding.name == "byte" else sum(forced_cuts(text, run) for text in documents)
    assert cuts == expected
    eot = [encoding.eot_token] * end_of_text
    if not expected:
        assert ids.tolist() == [i for text in documents for i in (*encoding.encode_ordinary(text), *eot)]
    if end_of_text:
        ends = np.flatnonzero(ids == encoding.eot_token)
        assert [encoding.decode(part.tolist()[:-1]) for part in np.split(ids, ends + 1)[:-1]] == documents
        assert len(ids) == (ends[-1] + 1 if documents else 0)
    else:
        assert encoding.decode(ids.tolist()) == "".join(documents)


@pytest.mark.parametrize("encoding", ["byte", "small", "gpt2"], indirect=True)
@pytest.mark.parametrize("end_of_text", [False, True])
@pytest.mark.parametrize(
    "text", ["it's we're I'll", "'reab'veel ", "a  b\n\nc ", "x1 22", "東京 é\u2003\u3000🎈", "''s 's", EOT + "'t"]
)
def test_documents_do_not_run_into_each_other(encoding, text, end_of_text):
    """A text cut at every place in two and in three: each is encoded as if it were alone."""
    eot = [encoding.eot_token] * end_of_text
    for first in range(len(text) + 1):
        for second in range(first, min(first + 3, len(text)) + 1):
            documents = [text[:first], text[first:second], text[second:]]
            plain = [i for own in documents for i in (*encoding.encode_ordinary(own), *eot)]
            assert tokenizer.encode(encoding, documents, end_of_text)[0].tolist() == plain, documents


@pytest.mark.parametrize("encoding", ["byte", "small", "gpt2"], indirect=True)
@pytest.mark.parametrize("block", [0, 30, 100, 1000])
@pytest.mark.parametrize("end_of_text", [False, True])
def test_long_and_short_documents_stay_in_order(encoding, monkeypatch, end_of_text, block):
    monkeypatch.setattr(tokenizer, "MAX_ENCODE_CHARS", 50)
    monkeypatch.setattr(tokenizer, "BLOCK", block)
    documents = [f"{n} it's the\n" * (0, 1, 2, 9, 30, 4, 3)[n * n % 7] for n in range(40)]
    eot = [encoding.eot_token] * end_of_text
    plain = [i for text in documents for i in (*encoding.encode_ordinary(text), *eot)]
    ids, cuts = tokenizer.encode(encoding, documents, end_of_text)
    assert (ids.tolist(), cuts) == (plain, 0)


@pytest.mark.parametrize("run", [1, 2, 7])
def test_document_as_long_as_a_run_is_whole(monkeypatch, run):
    encoding = small_bpe("gpt2", GPT2_PATTERN)
    monkeypatch.setattr(tokenizer, "MAX_ENCODE_CHARS", run)
    for length, cuts in ((run, 0), (run + 1, 1), (2 * run, 1), (2 * run + 1, 2)):
        for end_of_text in (False, True):
            assert tokenizer.encode(encoding, ["a" * length], end_of_text)[1] == cuts


def test_pattern_that_joins_over_breaks_is_never_cut(monkeypatch):
    """Only of GPT-2's pattern and its like is it known that a cut changes nothing."""
    encoding = small_bpe("another", r"\S+\s+|\S+|\s+")
    text = "ab ab\nab " * 10 + EOT + "a" * 50
    plain = encoding.encode_ordinary(text)
    monkeypatch.setattr(tokenizer, "MAX_ENCODE_CHARS", 8)
    ids, cuts = tokenizer.encode(encoding, [text, "a"], True)
    assert (ids.tolist(), cuts) == ([*plain, encoding.eot_token, ord("a"), encoding.eot_token], 0)


@pytest.mark.usefixtures("gpt2_vocabulary")
@pytest.mark.parametrize("end_of_text", [False, True])
def test_real_text(real_text, end_of_text):
    """Tiny Shakespeare, longer than MAX_ENCODE_CHARS, and its lines and speeches as documents beside it."""
    text = (real_text / "shakespeare" / "input.txt").read_text(encoding="utf-8")
    assert len(text) > tokenizer.MAX_ENCODE_CHARS
    encoding = tokenizer.load("gpt2")
    documents = [text, *text.splitlines(keepends=True)[:5000], *text.split("\n\n")]
    ids, cuts = tokenizer.encode(encoding, documents, end_of_text)
    eot = [encoding.eot_token] * end_of_text
    plain = [i for own in encoding.encode_ordinary_batch(documents, num_threads=1) for i in (*own, *eot)]
    assert (ids.tolist(), cuts) == (plain, 0)


def test_threads_of_one_process_do_not_mix_their_ids():
    """A Dask worker does as many tasks at once as it has threads."""
    encoding = small_bpe("gpt2", GPT2_PATTERN)
    chance = random.Random(0)
    documents = ["".join(chance.choices("abcdefg ", k=20_000)) for _ in range(40)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda text: tokenizer.encode(encoding, [text], False)[0].tolist(), documents))
    assert found == [encoding.encode_ordinary(text) for text in documents]


LONG = 3_000_000
LONG_RUNS = {
    "letters": lambda: "x" * LONG,
    "spaces": lambda: " " * LONG,
    "newlines": lambda: "\n" * LONG,
    "base64": lambda: base64.b64encode(random.Random(0).randbytes(LONG * 3 // 4)).decode(),
}


@pytest.mark.parametrize("what", LONG_RUNS)
def test_long_run_is_cut_and_comes_back(what):
    """tiktoken alone takes such a run as one match; of a million blanks before a word it overflows its stack."""
    encoding = tokenizer.load("gpt2")
    before, after = "It's a long, long way:", "\nand here it ends, in 2024.\n"
    text = before + " " + LONG_RUNS[what]() + after
    ids, cuts = tokenizer.encode(encoding, [text, after], end_of_text=True)
    assert cuts == 3  # with the blank it is a little longer than 3 * MAX_ENCODE_CHARS
    ids = ids.tolist()
    head, tail = encoding.encode_ordinary(before), encoding.encode_ordinary(after)
    assert ids[: len(head)] == head
    assert ids[-len(tail) - 2 :] == [encoding.eot_token, *tail, encoding.eot_token]
    assert encoding.decode(ids[: -len(tail) - 2]) == text


@pytest.mark.parametrize("white", [" ", "\n", "\t"])
@pytest.mark.parametrize("less", [2, 1, 0, -1])
def test_white_space_as_long_as_a_run_before_a_word(white, less):
    """tiktoken alone overflows its stack on 999,999 blanks and a letter."""
    encoding = tokenizer.load("gpt2")
    text = white * (tokenizer.MAX_ENCODE_CHARS - less) + "a"
    ids, cuts = tokenizer.encode(encoding, [text], end_of_text=False)
    assert cuts == (less < 1)
    assert encoding.decode(ids.tolist()) == text


# ---------------------------------------------------------------------------------------------------------------------
# pieces, and ids as uint16


@quick
@given(st.lists(NASTY, max_size=8), st.integers(1, 60))
def test_pieces_are_the_same_for_any_blocks(blocks, length):
    text = "".join(blocks)
    found = list(tokenizer.split_text(blocks, length))
    assert found == list(tokenizer.split_text([text], length)) == plain_pieces(text, length)
    assert "".join(piece for piece, _ in found) == text
    assert all(0 < len(piece) <= length for piece, _ in found)
    assert sum(cut for _, cut in found) == forced_cuts(text, length)


@pytest.mark.parametrize("gap", [10, 4090, 4096, 4100, 9000, 9999, 10_000, 20_005])
def test_pieces_find_a_break_however_far_back(gap):
    text = "one two" + "x" * gap + " three" * 4000
    assert list(tokenizer.split_text([text], 10_000)) == plain_pieces(text, 10_000)


@pytest.mark.parametrize(("ids", "n_vocab"), [([], 1), ([0, 256], 257), ([65535, 0], 65536)])
def test_to_uint16_keeps_ids(ids, n_vocab):
    narrow = tokenizer.to_uint16(np.array(ids, dtype=np.int64), n_vocab)
    assert (narrow.tolist(), narrow.dtype) == (ids, np.dtype("<u2"))


@pytest.mark.parametrize("wrong", [-1, 257, 65535, 65536 + 5])
def test_to_uint16_refuses_ids_beyond_the_vocabulary(wrong):
    """As uint16, 65541 would be 5 without a word."""
    with pytest.raises(AssertionError):
        tokenizer.to_uint16(np.array([1, wrong, 2]), 257)
