"""Tokenizer names -> tiktoken encodings: any tiktoken encoding whose ids fit uint16, and `byte`.

enc = load("gpt2")
enc.encode_ordinary("Hello"), enc.decode_single_token_bytes(15496), enc.n_vocab, enc.eot_token
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterable, Iterator

import numpy as np
import tiktoken
import tiktoken.load
import tiktoken.registry

from config import UserError

MAX_ENCODE_CHARS = 1_000_000  # characters encoded at once; a longer run without a break is cut
SAME_PATTERN = ("gpt2", "r50k_base", "p50k_base", "p50k_edit")
# GPT-2's pattern never looks back, and a match ends wherever white space follows another character: a text can be split
# there without changing an id.
_BREAK = re.compile(r"\S(?=[ \n])")

GPT2_RANKS = "ba1d6ef6d9728ad39d0e88ee2d4939b0e32a8a12d0b968ee4278e88df699ff4b"  # ranks_hash of gpt2

# Known not to fit uint16; listed here so that nothing is downloaded to find out.
TOO_LARGE = {"cl100k_base": 100_277, "o200k_base": 200_019, "o200k_harmony": 201_088}


def check_name(name: str) -> None:
    """Raise UserError unless `load` knows an encoding of this name; nothing is fetched."""
    known = [*(n for n in tiktoken.list_encoding_names() if n not in TOO_LARGE), "byte"]
    if name in TOO_LARGE:
        raise UserError(
            f"tokenizer {name}: its {TOO_LARGE[name]:,} ids do not fit the shards' uint16 (65,536); "
            f"take one of {', '.join(known)}"
        )
    if name not in known:
        raise UserError(f"tokenizer {name}: unknown; take one of {', '.join(known)}")


@functools.cache
def load(name: str) -> tiktoken.Encoding:
    """Return the encoding of that name; `byte` is UTF-8 itself: ids 0 to 255, and 256 for end-of-text.

    Raises:
        UserError: an unknown name, more than 65,536 ids, or a vocabulary that cannot be fetched.
    """
    if name == "byte":
        return tiktoken.Encoding(
            "byte",
            # One long match keeps the encoder out of Python; without merges every byte stays its own token.
            pat_str=r"[\s\S]{1,4096}",
            mergeable_ranks={bytes([b]): b for b in range(256)},
            special_tokens={"<|endoftext|>": 256},
        )
    check_name(name)
    try:
        encoding = tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:  # requests' errors are OSErrors; tiktoken's hash mismatch is a ValueError
        url = getattr(getattr(error, "request", None), "url", "its host")
        raise UserError(
            f"tokenizer {name}: its vocabulary could not be fetched from {url} ({type(error).__name__}). "
            "Set TIKTOKEN_CACHE_DIR to a folder that has it (tiktoken's cache of a machine with a network), "
            "or take --tokenizer byte, which needs no download"
        ) from None
    if encoding.n_vocab > 65_536:
        raise UserError(f"tokenizer {name}: its {encoding.n_vocab:,} ids do not fit the shards' uint16 (65,536)")
    return encoding


def vocabulary_files(name: str) -> dict[str, bytes]:
    """Return the files of this encoding, named as in a TIKTOKEN_CACHE_DIR; `byte` needs none.

    tiktoken's constructors fetch by URL, through a cache in which a file's name is the SHA-1 of its URL (its load.py).

    Raises:
        UserError: as in load.
    """
    load(name)  # fetches what is missing, and checks it
    if name == "byte":
        return {}
    files, read = {}, tiktoken.load.read_file_cached

    def recorded(url: str, *hashes: str | None, **more: str | None) -> bytes:
        files[hashlib.sha1(url.encode()).hexdigest()] = content = read(url, *hashes, **more)
        return content

    tiktoken.load.read_file_cached = recorded
    try:
        tiktoken.registry.ENCODING_CONSTRUCTORS[name]()
    finally:
        tiktoken.load.read_file_cached = read
    return files


def ranks_hash(encoding: tiktoken.Encoding) -> str:
    """SHA-256 over all (id, bytes) pairs: two vocabularies with the same hash encode alike."""
    digest = hashlib.sha256()
    for token in encoding.token_byte_values():
        digest.update(encoding.encode_single_token(token).to_bytes(4, "little") + token + b"\0")
    return digest.hexdigest()


def split_text(blocks: Iterable[str], length: int) -> Iterator[tuple[str, bool]]:
    """Split the text of the blocks into chunks of at most `length` characters that encode to the ids of the whole.

    Yields:
        chunk, forced_split: True where more than `length` characters have no break, so that the chunk ends within a
        word and the ids around the split may differ from those of the whole.
    """
    rest = ""
    for block in blocks:
        text, start = rest + block, 0
        while len(text) - start > length:
            stop = _last_break(text, start, start + length)
            yield text[start : stop or start + length], not stop
            start = stop or start + length
        rest = text[start:]
    if rest:
        yield rest, False


def _last_break(text: str, start: int, stop: int) -> int:
    """Return the last index in start + 1 .. stop at which a split changes no id; 0 where there is none."""
    for first in (max(start, stop - 4096), start):
        breaks = [match.end() for match in _BREAK.finditer(text, first, stop + 1)]
        if breaks:
            return breaks[-1]
    return 0


def to_uint16(ids: np.ndarray, n_vocab: int) -> np.ndarray:
    """Convert ids to little-endian uint16; asserts that all are in 0 .. n_vocab - 1."""
    # astype alone would wrap 70000 to 4464
    assert ids.size == 0 or (ids.min() >= 0 and ids.max() < n_vocab), (ids.min(), ids.max(), n_vocab)
    return ids.astype("<u2")
