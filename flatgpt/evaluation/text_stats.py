"""The text that token ids stand for, counted: its bytes, its words, its lines."""

from __future__ import annotations

import codecs
from dataclasses import dataclass

import numpy as np
import tiktoken

from flatgpt.data.shards import Tokens

PIECE = 1 << 18  # ids decoded at once


@dataclass(frozen=True)
class TextCounts:
    """What figures per byte and per word are divided by.

    Attributes:
        bytes: of UTF-8; special tokens and ids beyond the tokenizer's stand for none.
        words: what white space or end-of-text separates, as str.split() has it.
        lines: line ends, which are no words here; some count each as one.
    """

    bytes: int
    words: int
    lines: int


def count_text(tokens: Tokens, start: int, stop: int, encoding: tiktoken.Encoding) -> TextCounts:
    """Counts of the text of ids [start, stop), read in pieces; a word cut by `start` is one."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    special = np.zeros(1 << 16, dtype=bool)  # stand for no text, and end a word
    special[encoding.n_vocab :] = True
    special[[encoding.encode_single_token(word) for word in encoding.special_tokens_set]] = True
    total, words, lines, inside = 0, 0, 0, False
    for first in range(start, stop, PIECE):
        ids = tokens[first : min(first + PIECE, stop)]
        parts = np.split(ids, np.flatnonzero(special[ids]))
        for n, part in enumerate(parts):
            if n:  # it begins with a special token
                text, part = decoder.decode(b"", final=True), part[1:]
                words += bool(text) and not inside
                inside = False
            data = encoding.decode_bytes(part.tolist())
            total += len(data)
            text = decoder.decode(data)
            if not text:
                continue
            words += len(text.split()) - (inside and not text[0].isspace())
            lines += text.count("\n")
            inside = not text[-1].isspace()
    words += bool(decoder.decode(b"", final=True)) and not inside
    return TextCounts(total, words, lines)
