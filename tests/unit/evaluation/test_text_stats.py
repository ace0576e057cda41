"""What a text's ids are counted as, against Python's own split() of the whole text."""

import json
from dataclasses import asdict
from unittest import mock

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_shards import tokens

from flatgpt.data import tokenizer
from flatgpt.evaluation import text_stats
from flatgpt.evaluation.text_stats import TextCounts, count_text

quick = settings(max_examples=150)

# Letters of one to four bytes; all that split() takes for white space; what only looks like it (no-break: it is).
LETTERS = "aé東🎈\u200b\ufeff\x00\ufffd"
SPACES = "".join(char for char in map(chr, range(0x3001)) if char.isspace())
TEXTS = st.text(st.sampled_from(LETTERS) | st.sampled_from(SPACES) | st.sampled_from(" \n"), max_size=20)
SMALL = st.integers(1, 9)  # ids decoded at once


def plain(encoding, ids: list[int]) -> TextCounts:
    """All ids of a text decoded together, between what stands for none."""
    texts = [[]]
    for each in ids:
        if each >= encoding.n_vocab or each == encoding.eot_token:
            texts.append([])
        else:
            texts[-1].append(each)
    data = [encoding.decode_bytes(text) for text in texts]
    decoded = [part.decode("utf-8", "replace") for part in data]
    return TextCounts(
        bytes=sum(map(len, data)),
        words=sum(len(text.split()) for text in decoded),
        lines=sum(text.count("\n") for text in decoded),
    )


def count(encoding, ids: list[int], start: int, stop: int, piece: int) -> TextCounts:
    with mock.patch.object(text_stats, "PIECE", piece):
        return count_text(np.array(ids, dtype=np.uint16), start, stop, encoding)


@quick
@given(TEXTS, SMALL)
@example("".join(f"{space}{letter}" for space in SPACES for letter in LETTERS), 5)
@example("", 3)
def test_words_are_those_of_split(text, piece):
    """Whatever the pieces are that it is read in: they cut words and characters."""
    encoding, data = tokenizer.load("byte"), text.encode()
    got = count(encoding, list(data), 0, len(data), piece)
    assert got == TextCounts(len(data), len(text.split()), text.count("\n"))


@quick
@given(TEXTS, SMALL)
def test_tokens_that_hold_parts_of_characters(text, piece):
    encoding = tokenizer.load("gpt2")
    ids = encoding.encode_ordinary(text)
    assert count(encoding, ids, 0, len(ids), piece) == TextCounts(
        len(text.encode()), len(text.split()), text.count("\n")
    )


@quick
@given(st.data(), SMALL)
def test_any_part_of_any_ids(data, piece):
    """End-of-text and ids beyond the tokenizer's end words, also within a character; broken characters are letters."""
    some = st.integers(0, 255) | st.sampled_from([*"東🎈 \n".encode()]) | st.sampled_from([256, 257, 300, 65535])
    ids = data.draw(st.lists(some, max_size=30))
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(ids))] * 2)))
    encoding = tokenizer.load("byte")
    assert count(encoding, ids, start, stop, piece) == plain(encoding, ids[start:stop])


@quick
@given(
    st.lists(st.integers(0, 50_300) | st.sampled_from([50_256, b" ", b"\n", b"\xe4\xb8", b"\xad"]), max_size=30), SMALL
)
def test_any_ids_of_gpt2(some, piece):
    encoding = tokenizer.load("gpt2")
    ids = [each if isinstance(each, int) else encoding.encode_single_token(each) for each in some]
    assert count(encoding, ids, 0, len(ids), piece) == plain(encoding, ids)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one two\nthree\n", (14, 3, 2)),
        ("one|two", (6, 2, 0)),  # | is end-of-text here, ~ an id beyond the tokenizer's
        ("one ||| ~ two", (9, 2, 0)),
        ("||", (0, 0, 0)),
        ("a\u00a0b\u2003c\u200bd", (12, 3, 0)),  # a zero-width space is none
    ],
)
@pytest.mark.parametrize("piece", [1, 3, 100])
def test_counts_by_hand(text, expected, piece):
    ids = [{124: 256, 126: 999}.get(byte, byte) for byte in text.encode()]
    got = count(tokenizer.load("byte"), ids, 0, len(ids), piece)
    assert (got.bytes, got.words, got.lines) == expected
    assert json.loads(json.dumps(asdict(got))) == asdict(got)  # no numpy's numbers


def test_a_character_cut_by_the_ends_is_one_letter_each():
    balloon = list("🎈".encode())
    assert count(tokenizer.load("byte"), balloon, 1, 3, 1) == TextCounts(bytes=2, words=1, lines=0)
    assert count(tokenizer.load("byte"), [32, *balloon], 0, 2, 100) == TextCounts(bytes=2, words=1, lines=0)


def test_wikitext_has_the_numbers_of_the_literature(tmp_path, real_text, gpt2_vocabulary, monkeypatch):
    """Of its 4,358 lines the rows that Hugging Face has keep 2,891 ends: empty ones have none."""
    from pyarrow.parquet import read_table

    column = read_table(real_text / "wikitext103" / "test-00000-of-00001.parquet")["text"]
    encoding = tokenizer.load("gpt2")
    ids, _ = tokenizer.encode(encoding, ["".join(column.to_pylist())], end_of_text=False)
    monkeypatch.setattr(text_stats, "PIECE", 10_000)
    split = tokens(tmp_path, *np.array_split(ids, 3))
    assert len(split) == 283_287
    assert count_text(split, 0, len(split), encoding) == TextCounts(bytes=1_287_656, words=241_211, lines=2891)
