"""Documents become the ids that encode_ordinary has for each alone, with every encoder and in any batches."""

import concurrent.futures
import functools
import itertools
import random
import re
import sys

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from config import UserError
from flatgpt.data import encode, tokenizer
from flatgpt.data.chunks import Chunk, split_text
from flatgpt.data.encode import encode_chunks, load_encoder

EOT = "<|endoftext|>"
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""  # as OpenAI published it
MARKS = [EOT, EOT[:-1], EOT[1:], "<|", "|>", "endoftext", "<|fim_prefix|>"]
WORDS = ["the", "Naïve", "東京", "e\u0301", "👩‍👩", "\u200b", "\0", "'s", "'ll", "'", "2024", "...", *MARKS]
SPACES = [chr(n) for n in range(0x3001) if chr(n).isspace()]  # with U+001C to 1F, which are none to tiktoken
TEXT = st.lists(st.sampled_from([*WORDS, *(f" {word}" for word in WORDS), *SPACES]) | st.text(max_size=3), max_size=30)
DOCUMENTS = st.lists(TEXT.map("".join).filter(bool), min_size=1, max_size=9)
GIGATOKEN = pytest.param("gigatoken", marks=pytest.mark.extra("gigatoken"))


def small_bpe(name: str, pattern: str) -> tiktoken.Encoding:
    """Bytes, and all that two and four of these characters make: a split in the wrong place changes ids."""
    ranks = {bytes([b]): b for b in range(256)}
    pairs = [a + b for a in " \nabe1.'" for b in " \nabe1.'"]
    for token in [*pairs, *(a + b for a in pairs for b in pairs)]:
        ranks[token.encode()] = len(ranks)
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={EOT: len(ranks)})


@functools.cache
def encoding_of(name: str) -> tiktoken.Encoding:
    """`small` is GPT-2's pattern with a few merges, `other` another pattern."""
    if name == "other":
        return small_bpe("other", r"\S+\s+|\S+|\s+")
    return small_bpe("gpt2", GPT2_PATTERN) if name == "small" else tokenizer.load(name)


@pytest.fixture(scope="module", params=["byte", "small", "gpt2", "other", GIGATOKEN])
def encoder(request):
    """(encoding, encode) of each tokenizer with tiktoken, and of `gpt2` with gigatoken."""
    if request.param != "gigatoken":
        return encoding_of(request.param), load_encoder(encoding_of(request.param))
    return encoding_of("gpt2"), load_encoder(encoding_of("gpt2"), "gigatoken")


def plain(encoding, documents, end_of_text: bool) -> list[int]:
    eot = [encoding.eot_token] * end_of_text
    return [i for text in documents for i in (*encoding.encode_ordinary(text), *eot)]


@settings(max_examples=60)
@given(documents=DOCUMENTS, end_of_text=st.booleans(), batch=st.integers(0, 200))
def test_batches_of_documents_have_the_ids_of_each_alone(encoder, documents, end_of_text, batch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "BATCH_CHARS", batch)
        ids, *counts = encode_chunks(*encoder, [*map(Chunk, documents)], end_of_text)
    assert ids.dtype == np.dtype("<u2")
    assert ids.tolist() == plain(encoder[0], documents, end_of_text)
    assert counts == [len(documents), sum(len(text.encode()) for text in documents)]


@settings(max_examples=60)
@given(DOCUMENTS, st.integers(8, 60))
def test_long_documents_are_split_where_no_id_changes(encoder, documents, length):
    """Chunks of one document have no end-of-text between them. Only a run without a break may have other ids."""
    chunks, forced = [], False
    for text in documents:
        parts = list(split_text([text], 4 * length))
        chunks += [Chunk(part, int(n == len(parts))) for n, part in enumerate(parts, 1)]
        forced |= any(len(run) > length for run in re.split(r"(?<=\S)(?=[ \n])", text))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "MAX_ENCODE_CHARS", length)
        ids, count, _ = encode_chunks(*encoder, chunks, True)
    encoding = encoder[0]
    assert count == len(documents)
    if encoding.name == "byte" or (encoding.name != "other" and not forced):
        assert ids.tolist() == plain(encoding, documents, True)
    stops = np.flatnonzero(ids == encoding.eot_token)
    assert [encoding.decode(part[:-1].tolist()) for part in np.split(ids, stops + 1)[:-1]] == documents


def test_pattern_other_than_gpt2s_is_never_split(monkeypatch):
    monkeypatch.setattr(tokenizer, "MAX_ENCODE_CHARS", 8)
    other, text = encoding_of("other"), "ab ab\nab " * 10 + EOT + "a" * 50
    ids, *_ = encode_chunks(other, load_encoder(other), [Chunk(text), Chunk("a")], True)
    assert ids.tolist() == plain(other, [text, "a"], True)


@pytest.mark.parametrize(
    ("run", "notes"),
    [("x" * 3_000_000, 1), (" " * 1_000_000 + "a", 1), (" " * 999_999 + "a", 1), ("x " * 1_000_000, 0)],
    ids=["x", "blanks", "blanks before a word", "words"],
)
def test_long_run_is_split_and_comes_back(run, notes, capsys):
    """tiktoken alone takes such a run as one match, and overflows its stack on a million blanks before a word."""
    encoding = tokenizer.load("gpt2")
    text = f"It's far: {run}\nthe end"
    encode.warn_forced_split.cache_clear()
    ids, *_ = encode_chunks(encoding, load_encoder(encoding), [Chunk(text)], False)
    assert encoding.decode(ids.tolist()) == text
    assert capsys.readouterr().err.count("warning: text of more than 999,998 characters without a space") == notes


@pytest.mark.parametrize("name", ["tiktoken", GIGATOKEN])
def test_real_text(gpt2_vocabulary, real_text, name):
    text = (real_text / "shakespeare" / "input.txt").read_text(encoding="utf-8")
    encoding = tokenizer.load("gpt2")
    documents = [text, *text.splitlines(keepends=True)[:5000]]
    ids, *_ = encode_chunks(encoding, load_encoder(encoding, name), [*map(Chunk, documents)], True)
    assert len(text) > tokenizer.MAX_ENCODE_CHARS
    assert ids.tolist() == plain(encoding, documents, True)


@pytest.mark.parametrize("name", ["tiktoken", GIGATOKEN])
def test_threads_of_one_process_do_not_mix_their_ids(name):
    """A Dask worker does as many tasks at once as it has threads."""
    encoding, chance = encoding_of("gpt2"), random.Random(0)
    documents = ["".join(chance.choices("abcdefg ", k=20_000)) for _ in range(20)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda text: load_encoder(encoding, name)([text], [False]).tolist(), documents))
    assert found == [encoding.encode_ordinary(text) for text in documents]


# ---------------------------------------------------------------------------------------------------------------------
# gigatoken


@pytest.mark.extra("gigatoken")
def test_gigatoken_has_the_ids_of_every_character(gpt2_vocabulary):
    """Those that it knows as letters and tiktoken does not are encoded by tiktoken."""
    encoding = tokenizer.load("gpt2")
    giga, plain = load_encoder(encoding, "gigatoken"), load_encoder(encoding)
    points = [*range(0x3100), *range(0x3100, 0xD800, 13), *range(0xE000, 0x110000, 29)]
    texts = [f"a{c}a1{c}1!{c}! {c}\n{c}'s" for c in map(chr, points)]
    for first in range(0, len(texts), 999):
        batch = texts[first : first + 999]
        assert giga(batch, [True] * len(batch)).tolist() == plain(batch, [True] * len(batch)).tolist(), hex(
            points[first]
        )


class StandInTokenizer:
    """Stands in for gigatoken.Tokenizer: it has tiktoken's ids, or none at all where `broken`."""

    broken, built = False, 0

    @classmethod
    def from_tiktoken(cls, path, pretokenizer, special_tokens):
        cls.built += 1
        return cls()

    def encode_batch(self, texts, parallel):
        rows = [[] if self.broken else encoding_of("gpt2").encode_ordinary(text) for text in texts]
        as_awkward = lambda **parts: type("Array", (), parts)()  # noqa: E731
        content = as_awkward(data=np.array(list(itertools.chain(*rows)), np.uint32))
        offsets = as_awkward(data=np.cumsum([0, *map(len, rows)]))
        return as_awkward(layout=as_awkward(content=content, offsets=offsets))


@pytest.fixture
def stand_in(monkeypatch):
    """StandInTokenizer in place of gigatoken's, none of it built."""
    module = type(sys)("gigatoken")
    module.Tokenizer = StandInTokenizer
    monkeypatch.setitem(sys.modules, "gigatoken", module)
    monkeypatch.setattr(StandInTokenizer, "built", 0)
    load_encoder.cache_clear()
    yield
    load_encoder.cache_clear()


@pytest.mark.usefixtures("stand_in")
def test_gigatoken_is_built_anew_before_its_cache_is_large(monkeypatch):
    giga, built = load_encoder(encoding_of("gpt2"), "gigatoken"), []
    for n in range(4):
        monkeypatch.setattr(encode, "REBUILD_CHARS", 50 if n > 1 else 10**9)
        assert giga([f"word{n} " * 20], [True]).tolist() == plain(encoding_of("gpt2"), [f"word{n} " * 20], True)
        built.append(StandInTokenizer.built)
    assert built == [1, 1, 2, 3]


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(
    ("name", "fault", "message"),
    [
        ("gpt2", "missing", r"pip install -r requirements-extra.txt \(gigatoken\)"),
        ("gpt2", "broken", "gigatoken's gpt2 ids differ from tiktoken's: use --encoder tiktoken"),
        ("byte", "", "--encoder gigatoken supports tokenizer gpt2, r50k_base, not byte"),
    ],
)
def test_gigatoken_that_cannot_be_used_is_one_error(monkeypatch, name, fault, message):
    monkeypatch.setattr(StandInTokenizer, "broken", fault == "broken")
    if fault == "missing":
        monkeypatch.setitem(sys.modules, "gigatoken", None)
    with pytest.raises(UserError, match=message):
        load_encoder(encoding_of(name), "gigatoken")
