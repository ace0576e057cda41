"""Documents -> token ids by split: what a worker does with a task.

The result depends on the task alone, so any number of workers, here or on a cluster, writes the same bytes.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import os
import sys
import tempfile
import threading
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import tiktoken

from config import UserError
from flatgpt.data import tokenizer
from flatgpt.data.readers import Chunk
from flatgpt.data.tokenizer import SAME_PATTERN, split_text, to_uint16

END_OF_TEXT = "<|endoftext|>"
BATCH_CHARS = 1 << 18  # characters of short documents that are encoded in one call
REBUILD_CHARS = 200_000_000  # characters after which gigatoken's encoder is built anew


@dataclass(frozen=True)
class Job:
    """What all tasks of a pass share.

    Args:
        split: of all documents; None: a hash of the text decides.
        val_fraction, test_fraction: shares of the documents that the hash gives to these splits.
        outputs: the splits to encode; documents of others are left out.
        vocabulary: tiktoken's cache folder, for workers whose environment does not name one.
    """

    tokenizer: str
    encoder: str
    end_of_text: bool
    split: str | None
    outputs: tuple[str, ...]
    val_fraction: float = 0
    test_fraction: float = 0
    vocabulary: str | None = None


@dataclass(frozen=True)
class Task:
    """Chunks of documents that travel to the worker, or a function with which the worker reads whole documents.

    Args:
        size: bytes of text, as readers.text_bytes counts them.
    """

    size: int
    chunks: tuple[Chunk, ...] = ()
    read: Callable[[], Iterator[str]] | None = None


@dataclass
class Encoded:
    """The result of a task for one split: ids, (n,) uint16, and the counts of their text."""

    ids: np.ndarray
    documents: int
    bytes: int
    forced_splits: int


def choose_split(chunks: Iterable[str], val_fraction: float, test_fraction: float) -> str:
    """Return the split of a document, by a keyed hash of its text: equal texts go to one split, in every dataset.

    Args:
        chunks: the text of the document, in any chunks.
    """
    digest = hashlib.blake2b(digest_size=8, key=b"flatgpt split")
    for chunk in chunks:
        digest.update(chunk.encode())
    position = int.from_bytes(digest.digest(), "big") / 2**64
    return "test" if position < test_fraction else "val" if position < test_fraction + val_fraction else "train"


def encode_task(job: Job, task: Task) -> dict[str, Encoded]:
    """Encode the documents of a task: the result for each of the job's outputs, documents in order."""
    if job.vocabulary:
        os.environ.setdefault("TIKTOKEN_CACHE_DIR", job.vocabulary)
    encoding = tokenizer.load(job.tokenizer)
    encode = load_encoder(encoding, job.encoder)
    by_split: dict[str, list[Chunk]] = {split: [] for split in job.outputs}
    for chunk in map(Chunk, task.read()) if task.read else task.chunks:
        split = chunk.split or job.split
        if split is None:
            split = choose_split([chunk.text], job.val_fraction, job.test_fraction)
        if split in by_split:
            by_split[split].append(chunk)
    return {split: encode_chunks(encoding, encode, chunks, job.end_of_text) for split, chunks in by_split.items()}


# ---------------------------------------------------------------------------------------------------------------------
# text -> ids

Encode = Callable[[Sequence[str], Sequence[bool]], np.ndarray]  # as tiktoken_ids without its first argument


def encode_chunks(encoding: tiktoken.Encoding, encode: Encode, chunks: Iterable[Chunk], end_of_text: bool) -> Encoded:
    """Encode chunks of documents in batches.

    Args:
        encode: as load_encoder returns it.
        end_of_text: put that id after each document.
    """
    result = Encoded(np.zeros(0, "<u2"), 0, 0, 0)
    parts, texts, ends, size = [result.ids], [], [], 0
    # only GPT-2's pattern is known to keep all ids where split_text splits
    max_chars = tokenizer.MAX_ENCODE_CHARS if encoding.name in SAME_PATTERN else sys.maxsize

    def encode_batch() -> None:
        nonlocal texts, ends, size
        parts.append(to_uint16(encode(texts, ends), encoding.n_vocab))
        result.bytes += len("".join(texts).encode())
        texts, ends, size = [], [], 0

    for chunk in chunks:
        if len(chunk.text) <= max_chars:
            texts.append(chunk.text)
            ends.append(False)
        else:
            for text, forced_split in split_text([chunk.text], max_chars):
                texts.append(text)
                ends.append(False)
                result.forced_splits += forced_split
        ends[-1] = end_of_text and chunk.documents > 0
        size += len(chunk.text)
        result.documents += chunk.documents
        result.forced_splits += chunk.forced_split and encoding.name != "byte"  # bytes can be split anywhere
        if size > BATCH_CHARS:
            encode_batch()
    if texts:
        encode_batch()
    result.ids = np.concatenate(parts)
    return result


def load_encoder(encoding: tiktoken.Encoding, encoder: str = "tiktoken") -> Encode:
    """Return the function that encodes batches of texts.

    Args:
        encoding: as tokenizer.load returns it.
        encoder: `tiktoken` or `gigatoken`.

    Raises:
        UserError: as GigatokenEncoder raises.
    """
    if encoder == "gigatoken":
        return _gigatoken_encoder(encoding, threading.get_ident())
    return functools.partial(byte_ids if encoding.name == "byte" else tiktoken_ids, encoding)


@functools.lru_cache(maxsize=64)
def _gigatoken_encoder(encoding: tiktoken.Encoding, thread: int) -> GigatokenEncoder:
    return GigatokenEncoder(encoding)  # it has a cache that it writes to: each thread has its own


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


class GigatokenEncoder:
    """Encodes batches of texts with gigatoken, once its ids of a probe text are equal to tiktoken's.

    Raises:
        UserError: gigatoken is not installed, cannot take this encoding, or has other ids than tiktoken.
    """

    def __init__(self, encoding: tiktoken.Encoding):
        if encoding.name not in SAME_PATTERN:
            raise UserError(
                f"--encoder gigatoken: not for tokenizer {encoding.name}, only for {', '.join(SAME_PATTERN)}; "
                "leave --encoder out"
            )
        self.encoding = encoding
        self._build()
        probe = probe_text()
        if self([probe], [False]).tolist() != encoding.encode_ordinary(probe):
            raise UserError(f"gigatoken's ids of tokenizer {encoding.name} are not tiktoken's: take --encoder tiktoken")

    def _build(self) -> None:
        """Build gigatoken's tokenizer, without special tokens: it would find them in the texts."""
        try:
            from gigatoken import Tokenizer
        except ImportError:
            raise UserError(
                "--encoder gigatoken needs gigatoken: pip install -r requirements-extra.txt (gigatoken)"
            ) from None
        ranks = sorted((self.encoding.encode_single_token(t), t) for t in self.encoding.token_byte_values())
        with tempfile.NamedTemporaryFile(suffix=".tiktoken") as file:
            file.write(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in ranks))
            file.flush()
            try:
                self._tokenizer = Tokenizer.from_tiktoken(file.name, pretokenizer="gpt2", special_tokens={})
            except (RuntimeError, ValueError) as error:  # it takes no gaps between ids, which p50k_base has
                raise UserError(
                    f"gigatoken cannot take tokenizer {self.encoding.name} ({str(error).splitlines()[0]}): "
                    "take --encoder tiktoken"
                ) from None
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
