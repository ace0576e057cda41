"""Documents -> token ids."""

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
from collections.abc import Callable, Sequence

import numpy as np
import tiktoken

from config import UserError
from flatgpt.data import tokenizer
from flatgpt.data.readers import Chunk
from flatgpt.data.tokenizer import GPT2_PATTERN_ENCODINGS, split_text, to_uint16

END_OF_TEXT = "<|endoftext|>"
BATCH_CHARS = 1 << 18  # characters of short documents that are encoded in one call
REBUILD_CHARS = 200_000_000  # characters after which gigatoken's encoder is built anew
BREAK = re.compile(r"\S[ \n]")  # around a split at which no id changes
GIGATOKEN_ENCODINGS = ("gpt2", "r50k_base")  # it takes no gaps between ids, which p50k_base has

Encode = Callable[[Sequence[str], Sequence[bool]], np.ndarray]  # as tiktoken_ids without its first argument
Encoded = tuple[np.ndarray, int, int]  # ids, (n,) uint16, and their numbers of documents and bytes of text


def encode_chunks(encoding: tiktoken.Encoding, encode: Encode, chunks: Sequence[Chunk], end_of_text: bool) -> Encoded:
    """Encode chunks of documents in batches.

    Args:
        encode: as load_encoder returns it.
        end_of_text: put that id after each document.
    """
    parts, texts, ends = [], [], []
    batch_chars = documents = text_bytes = 0
    # of other encodings it is not known that split_text changes no id
    max_chars = tokenizer.MAX_ENCODE_CHARS if encoding.name in GPT2_PATTERN_ENCODINGS else math.inf
    for n, chunk in enumerate(chunks, 1):
        if len(chunk.text) <= max_chars:
            texts.append(chunk.text)
        else:
            pieces = list(split_text([chunk.text], max_chars))
            if not all(BREAK.fullmatch(before[-1] + after[0]) for before, after in itertools.pairwise(pieces)):
                note_cut()
            texts += pieces
            ends += [False] * (len(pieces) - 1)
        ends.append(end_of_text and chunk.documents > 0)
        batch_chars += len(chunk.text)
        documents += chunk.documents
        if batch_chars > BATCH_CHARS or n == len(chunks):
            parts.append(to_uint16(encode(texts, ends), encoding.n_vocab))
            text_bytes += len("".join(texts).encode())
            texts, ends, batch_chars = [], [], 0
    return np.concatenate(parts), documents, text_bytes


@functools.cache
def note_cut() -> None:
    """Print a note, once in each process."""
    run = f"a run of more than {tokenizer.MAX_ENCODE_CHARS:,} characters without a space or line end"
    print(f"note: text is cut in {run}; ids next to the cut may differ", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# texts -> ids


@functools.cache
def load_encoder(encoding: tiktoken.Encoding, encoder: str = "tiktoken") -> Encode:
    """Return the function that encodes batches of texts.

    Args:
        encoding: as tokenizer.load returns it.
        encoder: `tiktoken` or `gigatoken`.

    Raises:
        UserError: as GigatokenEncoder raises.
    """
    if encoder == "gigatoken":
        return GigatokenEncoder(encoding)
    return functools.partial(byte_ids if encoding.name == "byte" else tiktoken_ids, encoding)


def tiktoken_ids(encoding: tiktoken.Encoding, texts: Sequence[str], ends: Sequence[bool]) -> np.ndarray:
    """Return the ids of the texts, one after the other, each as encode_ordinary has them: (n,) unsigned integers.

    Args:
        texts: valid Unicode (no lone surrogates).
        ends: for each text, whether the end-of-text id follows it.
    """
    joined = END_OF_TEXT.join([*texts, ""])  # one call for all: a call for each costs short texts half of the speed
    if joined.count(END_OF_TEXT) == len(texts):
        ids = encoding.encode_to_numpy(joined, allowed_special={END_OF_TEXT}, disallowed_special=())
        return ids if all(ends) else np.delete(ids, np.flatnonzero(ids == encoding.eot_token)[~np.array(ends, bool)])
    # a text has these characters, which stand for themselves there
    rows = [encoding.encode_to_numpy(text, disallowed_special=()) for text in texts]
    return _insert_eot(encoding, np.concatenate(rows), np.cumsum([len(row) for row in rows]), ends)


def byte_ids(encoding: tiktoken.Encoding, texts: Sequence[str], ends: Sequence[bool]) -> np.ndarray:
    """Return the UTF-8 bytes of the texts, as tiktoken_ids does."""
    rows = [text.encode() for text in texts]
    ids = np.frombuffer(b"".join(rows), np.uint8).astype(np.uint16)
    return _insert_eot(encoding, ids, np.cumsum([len(row) for row in rows]), ends)


def _insert_eot(encoding: tiktoken.Encoding, ids: np.ndarray, stops: np.ndarray, ends: Sequence[bool]) -> np.ndarray:
    """Insert the end-of-text id at those of the stops at which a document ends."""
    return np.insert(ids, stops[np.array(ends, bool)], encoding.eot_token)


class GigatokenEncoder(threading.local):
    """Encodes batches of texts with gigatoken, once its ids of a probe text are equal to tiktoken's.

    Each thread has its own, because encoding writes to its cache.

    Raises:
        UserError: gigatoken is not installed, does not know this encoding, or has other ids than tiktoken.
    """

    def __init__(self, encoding: tiktoken.Encoding):
        self.encoding = encoding
        if encoding.name not in GIGATOKEN_ENCODINGS:
            raise UserError(
                f"--encoder gigatoken takes tokenizer {', '.join(GIGATOKEN_ENCODINGS)}, not {encoding.name}"
            )
        self._build()
        probe = probe_text()
        if self([probe], [False]).tolist() != encoding.encode_ordinary(probe):
            raise UserError(f"gigatoken's ids of tokenizer {encoding.name} are not tiktoken's: take --encoder tiktoken")

    def _build(self) -> None:
        """Build gigatoken's tokenizer, without special tokens: it would find them in the texts."""
        try:
            from gigatoken import Tokenizer
        except ImportError:
            raise UserError("--encoder gigatoken: pip install -r requirements-extra.txt (gigatoken)") from None
        ranks = sorted((self.encoding.encode_single_token(t), t) for t in self.encoding.token_byte_values())
        with tempfile.NamedTemporaryFile(suffix=".tiktoken") as file:
            file.write(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in ranks))
            file.flush()
            self._tokenizer = Tokenizer.from_tiktoken(file.name, pretokenizer="gpt2", special_tokens={})
        self._chars = 0  # encoded since then

    def __call__(self, texts: Sequence[str], ends: Sequence[bool]) -> np.ndarray:
        """Return the ids of the texts, as tiktoken_ids does."""
        joined = "".join(texts)
        # 0.10.0 knows the letters of Unicode 17, tiktoken 0.14 those of 16: with new characters the ids may differ
        if not joined.isascii() and unassigned()[np.frombuffer(joined.encode("utf-32-le"), np.uint32)].any():
            return tiktoken_ids(self.encoding, texts, ends)
        if self._chars > REBUILD_CHARS:  # its cache of words has no bound in 0.10.0
            self._build()
        self._chars += len(joined)
        rows = self._tokenizer.encode_batch(list(texts), parallel=False).layout  # Awkward Array's
        return _insert_eot(self.encoding, rows.content.data, rows.offsets.data[1:], ends)


@functools.cache
def unassigned() -> np.ndarray:
    """Return for each code point whether Python's Unicode has no character there: (0x110000,) bool."""
    return np.array([unicodedata.category(chr(point)) == "Cn" for point in range(0x110000)])


def probe_text() -> str:
    """Return a text with all kinds of characters between letters, digits, punctuation and white space."""
    points = [*range(0x3100), *range(0x3100, 0xD800, 61), *range(0xE000, 0x110000, 61)]
    words = "It's we'll I'm they've you'd we're isn't 'S 'LL 'x <|endoftext|> 3.14 1st  two   three\t\n \n\r\n"
    known = [chr(point) for point in points if not unassigned()[point]]
    return words + "".join(f"a{c}b{c}1{c} {c}!{c}{c}\n{c}'s" for c in known)
