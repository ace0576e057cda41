"""Bytes, words and lines of token ids, against str.split() of the whole text."""

from unittest import mock

import numpy as np
from dataset_files import tokens
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flatgpt.data import tokenizer
from flatgpt.evaluation import text as evaluation_text
from flatgpt.evaluation.text import TextCounts, count_text

# Letters of one to four bytes; all white space that split() knows; characters that only look like it.
LETTERS = "aé東🎈\u200b\ufeff\x00\ufffd"
SPACES = "".join(char for char in map(chr, range(0x3001)) if char.isspace())
TEXTS = st.text(st.sampled_from(LETTERS) | st.sampled_from(SPACES) | st.sampled_from(" \n"), max_size=20)
BYTES, SMALL = tokenizer.load("byte"), st.integers(1, 9)  # ids decoded at once


def count(encoding, ids: list[int], chunk: int) -> TextCounts:
    with mock.patch.object(evaluation_text, "CHUNK_TOKENS", chunk):
        return count_text(np.array(ids, dtype=np.uint16), len(ids), encoding)


@settings(max_examples=150)
@given(TEXTS, SMALL)
@example("".join(f"{space}{letter}" for space in SPACES for letter in LETTERS), 5)
def test_words_are_those_of_split(text, chunk):
    """Chunks cut words and characters, and tokens of gpt2 hold parts of characters."""
    expected = TextCounts(len(text.encode()), len(text.split()), text.count("\n"))
    assert count(BYTES, list(text.encode()), chunk) == expected
    gpt2 = tokenizer.load("gpt2")
    assert count(gpt2, gpt2.encode_ordinary(text), chunk) == expected


@settings(max_examples=150)
@given(st.lists(st.integers(0, 255) | st.sampled_from([*"東🎈 \n".encode(), 256, 257, 300, 65535]), max_size=30), SMALL)
def test_special_tokens_end_words_and_have_no_bytes(ids, chunk):
    """Also ids beyond the tokenizer's, and within a character; broken characters count as letters."""
    texts = [[]]
    for each in ids:
        texts.append([]) if each > 255 else texts[-1].append(each)
    decoded = [bytes(part).decode("utf-8", "replace") for part in texts]
    words, lines = sum(len(text.split()) for text in decoded), sum(text.count("\n") for text in decoded)
    assert count(BYTES, ids, chunk) == TextCounts(sum(map(len, texts)), words, lines)


def test_only_the_first_ids_are_counted():
    ids = np.array([*b"one two three"], dtype=np.uint16)
    assert count_text(ids, 5, BYTES) == TextCounts(bytes=5, words=2, lines=0)
    assert count_text(ids, 0, BYTES) == TextCounts(0, 0, 0)


def test_wikitext_has_the_numbers_of_the_literature(tmp_path, real_text, gpt2_vocabulary, monkeypatch):
    """Of its 4,358 lines the rows that Hugging Face has keep 2,891 ends: empty ones have none."""
    from pyarrow.parquet import read_table

    column = read_table(real_text / "wikitext103" / "test-00000-of-00001.parquet")["text"]
    encoding = tokenizer.load("gpt2")
    ids = np.array(encoding.encode_ordinary("".join(column.to_pylist())), np.uint16)
    monkeypatch.setattr(evaluation_text, "CHUNK_TOKENS", 10_000)
    split = tokens(tmp_path, *np.array_split(ids, 3))
    assert len(split) == 283_287
    assert count_text(split, len(split), encoding) == TextCounts(bytes=1_287_656, words=241_211, lines=2891)
