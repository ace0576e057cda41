"""Blocks of text give the ids that tiktoken gives document by document, whatever is in them."""

import random

import numpy as np
import pytest
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st
from in_process import TEXT

from flatgpt.data import bpe, tokenizer
from flatgpt.data.bpe import BlockEncoder

# GPT-2's pattern, as tiktoken has it
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
WORDS = """
    's 'll 're 've 't 'm 'd 'L ' '' ’s <|endoftext|> <| endoftext |> the Hello antidisestablishmentarianism a B é ß 東
    1 ² ½ Ⅷ ٣ 123 ! ? -- ... \0 😀 👩\u200d👩\u200d👧 e\u0301 \u00ad \U000e0001 \uffff \U00010400
"""
SPACES = [c for c in map(chr, range(0x3001)) if c.isspace()]
PIECES = [*WORDS.split(), *SPACES, "  ", " 's", " the", "\n\n", "\r\n", " " * 20, "x" * 40, "東" * 9]
text = st.lists(st.sampled_from(PIECES) | st.characters(codec="utf-8"), max_size=30).map("".join)
many = settings(max_examples=300)


def small_encoding() -> tiktoken.Encoding:
    """GPT-2's pattern, and merges of all pairs with some letters and signs: where a piece ends changes the ids."""
    ranks = {bytes([b]): b for b in range(256)}
    for one in b"a1! '\nse":
        for other in range(256):
            ranks.setdefault(bytes([one, other]), len(ranks))
            ranks.setdefault(bytes([other, one]), len(ranks))
    for more in (b" the", b"ther", b"'ll", b"'ve", b"'re", b"  \n", b"endo", b"e\xcc\x81"):
        ranks.setdefault(more, len(ranks))
    special = {"<|endoftext|>": len(ranks)}
    return tiktoken.Encoding("small", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)


SMALL = small_encoding()


def plain(encoding, documents, end_of_text) -> list[int]:
    eot = [encoding.eot_token] if end_of_text else []
    return [i for document in documents for i in [*encoding.encode_ordinary(document), *eot]]


@pytest.fixture(scope="module")
def small():
    return BlockEncoder(SMALL)


@pytest.fixture(scope="module")
def gpt2():
    return BlockEncoder(tokenizer.load("gpt2"))


@many
@given(documents=st.lists(text, max_size=6), end_of_text=st.booleans())
@example(documents=["a\n", "b", " ", "'s", "", "'", "s", "x '", "s"], end_of_text=False)
@example(documents=["  a", "a  ", "\u3000a", "a\u3000\u3000b", "\u3000", "'ll've're'dx"], end_of_text=True)
def test_block_is_its_documents(small, documents, end_of_text):
    assert small(documents, end_of_text).tolist() == plain(SMALL, documents, end_of_text)


@many
@given(documents=st.lists(text, max_size=6), end_of_text=st.booleans())
def test_block_of_gpt2_is_its_documents(gpt2, documents, end_of_text):
    assert gpt2(documents, end_of_text).tolist() == plain(gpt2.encoding, documents, end_of_text)


def test_every_character_has_the_class_that_tiktoken_gives_it(small):
    """Each of Unicode's characters between letters, digits, signs and blanks; of the last planes some."""
    points = [*range(0xD800), *range(0xE000, 0x33500), *range(0x33500, 0x110000, 97), *range(0xE0000, 0xE0200)]
    for first in range(0, len(points), 4096):
        block = [f"a{c}a1{c}1!{c}! {c}\n{c}" for c in map(chr, points[first : first + 4096])]
        assert small(block, True).tolist() == plain(SMALL, block, True), hex(points[first])


def test_real_text(gpt2_vocabulary, real_text):
    gpt2 = BlockEncoder(tokenizer.load("gpt2"))
    raw = (real_text / "shakespeare" / "input.txt").read_text(encoding="utf-8")
    speeches = raw.split("\n\n")
    assert gpt2([raw], False).tolist() == plain(gpt2.encoding, [raw], False)
    assert gpt2(speeches, True).tolist() == plain(gpt2.encoding, speeches, True)


def words(n: int, seed: int) -> str:
    chance = random.Random(seed)
    return " ".join("".join(chance.choices("abcdefé1'", k=chance.randrange(1, 25))) for _ in range(n))


def test_what_was_learnt_and_forgotten_changes_nothing(monkeypatch):
    """More pieces than are kept, in one block and over many; and a block of many that are new."""
    monkeypatch.setattr(bpe, "KEPT", 300)
    encoder = BlockEncoder(SMALL)
    for seed in range(30):
        block = [words(100, seed), TEXT[:500], words(10, seed - 1)]
        assert encoder(block, True).tolist() == plain(SMALL, block, True)
        assert encoder.used < SMALL.n_vocab + 300
    block = [words(5000, 99)]
    assert encoder(block, False).tolist() == plain(SMALL, block, False)
    assert encoder.used == SMALL.n_vocab


def test_table_that_would_fill_up_leaves_pieces_to_the_dictionary(monkeypatch):
    monkeypatch.setattr(bpe, "SLOTS", 4096)
    encoder = BlockEncoder(SMALL)
    block = [words(3000, 5)]
    for _ in range(3):
        assert encoder(block, False).tolist() == plain(SMALL, block, False)
    assert np.count_nonzero(encoder.value >= 0) < 2048


def test_pieces_that_were_seen_need_no_tiktoken(small, monkeypatch):
    """That is where the speed comes from."""
    block = [TEXT, words(200, 7)]
    before = small(block, True)
    monkeypatch.setattr(small, "_learn", lambda pieces: [small.long[piece] for piece in pieces])
    assert small(block, True).tolist() == before.tolist()


@pytest.mark.parametrize("documents", [[], [""], ["", ""]])
def test_nothing(small, documents):
    assert small(documents, False).tolist() == []
    assert small(documents, True).tolist() == [SMALL.eot_token] * len(documents)
