"""Encode documents as token ids."""

from __future__ import annotations

import base64
import functools
import itertools
import math
import re
import sys
import tempfile
import threading
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import tiktoken

from config import UserError
from flatgpt.data import tokenizer
from flatgpt.data.chunks import Chunk, split_text
from flatgpt.data.tokenizer import FileTokenizer, to_uint16

END_OF_TEXT = "<|endoftext|>"
BATCH_CHARS = 1 << 18  # short documents are encoded together up to this number of characters
REBUILD_CHARS = 200_000_000  # characters after which gigatoken's encoder is rebuilt
BREAK = re.compile(r"\S[ \n]")  # a text can be split between these two characters without changing an id
GIGATOKEN_ENCODINGS = ("gpt2", "r50k_base")  # p50k_base has gaps between ids, which gigatoken does not support

Encode = Callable[[Sequence[str], Sequence[bool]], np.ndarray]  # (texts, ends) -> ids, as in tiktoken_ids
Encoded = tuple[np.ndarray, int, int]  # ids, (n,) uint16; number of documents; bytes of text


def encode_chunks(
    encoding: tiktoken.Encoding, encode: Encode, chunks: Sequence[Chunk], end_of_text: bool, parse_special: bool = False
) -> Encoded:
    """Encode chunks of documents in batches.

    Args:
        encode: the result of load_encoder.
        end_of_text: append the end-of-text id to each document.
        parse_special: as in load_encoder.
    """
    parts, texts, ends = [], [], []
    batch_chars = documents = text_bytes = 0
    # with other patterns, split_text could change ids; encode_special splits between added tokens
    max_chars = tokenizer.MAX_ENCODE_CHARS if tokenizer.can_split(encoding) and not parse_special else math.inf
    for n, chunk in enumerate(chunks, 1):
        if len(chunk.text) <= max_chars:
            texts.append(chunk.text)
        else:
            segments = list(split_text([chunk.text], max_chars))
            if not all(BREAK.fullmatch(before[-1] + after[0]) for before, after in itertools.pairwise(segments)):
                warn_forced_split()
            texts += segments
            ends += [False] * (len(segments) - 1)
        ends.append(end_of_text and chunk.documents > 0)
        batch_chars += len(chunk.text)
        documents += chunk.documents
        if batch_chars > BATCH_CHARS or n == len(chunks):
            parts.append(to_uint16(encode(texts, ends), encoding.n_vocab))
            text_bytes += len("".join(texts).encode())
            texts, ends, batch_chars = [], [], 0
    return np.concatenate(parts), documents, text_bytes


def encode_text(encoding: tiktoken.Encoding, chunks: Iterable[str], parse_special: bool = False) -> np.ndarray:
    """Return the ids of one text, given in chunks: (n,) uint16, those of prepare_data.py without end-of-text.

    Args:
        parse_special: encode added tokens, such as <|endoftext|>, as their ids.
    """
    if (tokenizer.can_split(encoding) or encoding.name == "byte") and not parse_special:
        chunks = split_text(chunks, tokenizer.MAX_ENCODE_CHARS)
    else:
        chunks = ["".join(chunks)]
    ids = bytearray()
    for chunk in chunks:
        encoded = np.array(tokenizer.encode(encoding, chunk, parse_special), dtype=np.uint32)
        ids += to_uint16(encoded, encoding.n_vocab).tobytes()
    return np.frombuffer(ids, "<u2")


@functools.cache
def warn_forced_split() -> None:
    """Print a warning, once per process."""
    text = f"text of more than {tokenizer.MAX_ENCODE_CHARS:,} characters without a space or newline"
    print(f"warning: {text} is split for encoding; ids next to the split may change", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# encoders


def load_tokenizer(name: str, folder: Path, end_of_text_id: int | None) -> tiktoken.Encoding:
    """Return tokenizer.load(...). A tokenizer.json is read once per process, not once per task."""
    path = folder / tokenizer.TOKENIZER_FILE
    return _load_once(name, folder, end_of_text_id, path.stat().st_mtime_ns if path.is_file() else None)


@functools.lru_cache(maxsize=2)
def _load_once(name: str, folder: Path, end_of_text_id: int | None, changed: int | None) -> tiktoken.Encoding:
    return tokenizer.load(name, folder, end_of_text_id)


@functools.cache
def load_encoder(encoding: tiktoken.Encoding, encoder: str = "tiktoken", parse_special: bool = False) -> Encode:
    """Return the function that encodes batches of texts.

    Args:
        encoding: the result of tokenizer.load.
        encoder: `tiktoken` or `gigatoken`.
        parse_special: whether added tokens in a text become their ids. Otherwise they are ordinary characters.

    Raises:
        UserError: see GigatokenEncoder.
    """
    if encoder == "gigatoken":
        return GigatokenEncoder(encoding)
    if parse_special:
        return functools.partial(special_ids, encoding)
    plain = not isinstance(encoding, FileTokenizer) and encoding.name == "byte"
    return functools.partial(byte_ids if plain else tiktoken_ids, encoding)


def tiktoken_ids(encoding: tiktoken.Encoding, texts: Sequence[str], ends: Sequence[bool]) -> np.ndarray:
    """Return the concatenated ids of the texts, equal to those of encode_ordinary: (n,) unsigned integers.

    Args:
        texts: valid Unicode (no lone surrogates).
        ends: whether to append the end-of-text id, for each text.
    """
    short = all(len(text) <= tokenizer.MAX_ENCODE_CHARS for text in texts)  # others could overflow tiktoken's stack
    if (separator := _separator(encoding)) and short:
        joined = separator.join([*texts, ""])  # a call per text halves the speed for short texts
        if joined.count(separator) == len(texts):
            ids = encoding.encode_to_numpy(joined, allowed_special={separator}, disallowed_special=())
            last = np.flatnonzero(ids == encoding.eot_token)
            return ids if all(ends) else np.delete(ids, last[~np.array(ends, bool)])
    # a text is long, or contains "<|endoftext|>", which is encoded as ordinary text
    rows = [np.array(tokenizer.encode_ordinary(encoding, text), np.uint32) for text in texts]
    return _insert_eot(encoding, np.concatenate(rows), np.cumsum([len(row) for row in rows]), ends)


@functools.lru_cache
def _separator(encoding: tiktoken.Encoding) -> str | None:
    """Return the end-of-text token, unless a text beside it could change where it is found."""
    end = getattr(encoding, "end_of_text", END_OF_TEXT)
    if end is None or any(end.startswith(end[n:]) for n in range(1, len(end))):
        return None
    return None if any(token != end and token.startswith(end) for token in encoding.special_tokens_set) else end


def special_ids(encoding: tiktoken.Encoding, texts: Sequence[str], ends: Sequence[bool]) -> np.ndarray:
    """Return the ids of the texts as tiktoken_ids does, with the ids of added tokens in them."""
    rows = [np.array(tokenizer.encode_special(encoding, text), np.uint32) for text in texts]
    return _insert_eot(encoding, np.concatenate(rows), np.cumsum([len(row) for row in rows]), ends)


def byte_ids(encoding: tiktoken.Encoding, texts: Sequence[str], ends: Sequence[bool]) -> np.ndarray:
    """Return the UTF-8 bytes of the texts, as tiktoken_ids does."""
    rows = [text.encode() for text in texts]
    ids = np.frombuffer(b"".join(rows), np.uint8).astype(np.uint16)
    return _insert_eot(encoding, ids, np.cumsum([len(row) for row in rows]), ends)


def _insert_eot(encoding: tiktoken.Encoding, ids: np.ndarray, stops: np.ndarray, ends: Sequence[bool]) -> np.ndarray:
    """Insert the end-of-text id after each text whose `ends` is true; `stops` are the texts' ends in `ids`."""
    return np.insert(ids, stops[np.array(ends, bool)], encoding.eot_token) if any(ends) else ids


class GigatokenEncoder(threading.local):
    """Encodes batches of texts with gigatoken. The constructor compares its ids of a probe text with tiktoken's.

    State is per thread, because encoding writes to gigatoken's cache.

    Raises:
        UserError: gigatoken is not installed, does not support this encoding, or returns other ids than tiktoken.
    """

    def __init__(self, encoding: tiktoken.Encoding):
        self.encoding = encoding
        if encoding.name not in GIGATOKEN_ENCODINGS or isinstance(encoding, FileTokenizer):
            supported = ", ".join(GIGATOKEN_ENCODINGS)
            raise UserError(f"--encoder gigatoken supports tokenizer {supported}, not {encoding.name}")
        self._build()
        probe = probe_text()
        if self([probe], [False]).tolist() != encoding.encode_ordinary(probe):
            raise UserError(f"gigatoken's {encoding.name} ids differ from tiktoken's: use --encoder tiktoken")

    def _build(self) -> None:
        """Build gigatoken's tokenizer without special tokens, so that they are encoded as ordinary text."""
        try:
            from gigatoken import Tokenizer
        except ImportError:
            raise UserError("--encoder gigatoken: pip install -r requirements-extra.txt (gigatoken)") from None
        ranks = sorted((self.encoding.encode_single_token(t), t) for t in self.encoding.token_byte_values())
        with tempfile.NamedTemporaryFile(suffix=".tiktoken") as file:
            file.write(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in ranks))
            file.flush()
            self._tokenizer = Tokenizer.from_tiktoken(file.name, pretokenizer="gpt2", special_tokens={})
        self._chars = 0  # encoded since the last build

    def __call__(self, texts: Sequence[str], ends: Sequence[bool]) -> np.ndarray:
        """Return the ids of the texts, as tiktoken_ids does."""
        joined = "".join(texts)
        # gigatoken 0.10.0 uses Unicode 17, tiktoken 0.14 Unicode 16: ids of characters new in 17 may differ
        if not joined.isascii() and unassigned()[np.frombuffer(joined.encode("utf-32-le"), np.uint32)].any():
            return tiktoken_ids(self.encoding, texts, ends)
        if self._chars > REBUILD_CHARS:  # its word cache is unbounded in 0.10.0
            self._build()
        self._chars += len(joined)
        rows = self._tokenizer.encode_batch(list(texts), parallel=False).layout  # of an Awkward Array
        return _insert_eot(self.encoding, rows.content.data, rows.offsets.data[1:], ends)


@functools.cache
def unassigned() -> np.ndarray:
    """Return a mask of the code points that are unassigned in Python's Unicode version: (0x110000,) bool."""
    return np.array([unicodedata.category(chr(point)) == "Cn" for point in range(0x110000)])


def probe_text() -> str:
    """Return a text with characters of all kinds next to letters, digits, punctuation and white space."""
    points = [*range(0x3100), *range(0x3100, 0xD800, 61), *range(0xE000, 0x110000, 61)]
    words = "It's we'll I'm they've you'd we're isn't 'S 'LL 'x <|endoftext|> 3.14 1st  two   three\t\n \n\r\n"
    assigned = [chr(point) for point in points if not unassigned()[point]]
    return words + "".join(f"a{c}b{c}1{c} {c}!{c}{c}\n{c}'s" for c in assigned)
