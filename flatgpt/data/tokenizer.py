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
GPT2_PATTERN_ENCODINGS = ("gpt2", "r50k_base", "p50k_base", "p50k_edit")
# GPT-2's pattern never looks back, and a match ends wherever white space follows another character: a text can be split
# there without changing an id. This matches up to the last such place.
_LAST_BREAK = re.compile(r".*\S(?=[ \n])", re.DOTALL)

GPT2_RANKS = "ba1d6ef6d9728ad39d0e88ee2d4939b0e32a8a12d0b968ee4278e88df699ff4b"  # ranks_hash of gpt2

# Known not to fit uint16; listed here so that nothing is downloaded to find out.
TOO_LARGE = ("cl100k_base", "o200k_base", "o200k_harmony")


def check_name(name: str) -> None:
    """Raise UserError unless `load` knows an encoding of this name; nothing is fetched."""
    known = [*(n for n in tiktoken.list_encoding_names() if n not in TOO_LARGE), "byte"]
    if name not in known:
        reason = "more ids than the shards' uint16 holds, 65,536" if name in TOO_LARGE else "unknown"
        raise UserError(f"tokenizer {name}: {reason}; take one of {', '.join(known)}")


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
        raise UserError(
            f"tokenizer {name}: its vocabulary could not be fetched ({' '.join(str(error).split())}). Set "
            "TIKTOKEN_CACHE_DIR to a folder that has it (tiktoken's cache of a machine with a network), "
            "or take --tokenizer byte, which needs no download"
        ) from None
    if encoding.n_vocab > 65_536:
        raise UserError(f"tokenizer {name}: its {encoding.n_vocab:,} ids do not fit the shards' uint16")
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


def split_text(blocks: Iterable[str], length: int) -> Iterator[str]:
    """Split the text of the blocks into chunks of at most `length` characters that encode to the ids of the whole.

    Where more characters than that have no break, a chunk ends within a word, and the ids around its end may differ.
    """
    rest = ""
    for block in blocks:
        text, start = rest + block, 0
        while len(text) - start > length:
            found = _LAST_BREAK.match(text, start, start + length + 1)
            stop = found.end() if found else start + length
            yield text[start:stop]
            start = stop
        rest = text[start:]
    if rest:
        yield rest


def to_uint16(ids: np.ndarray, n_vocab: int) -> np.ndarray:
    """Convert ids to little-endian uint16; asserts that all are in 0 .. n_vocab - 1."""
    # astype alone would wrap 70000 to 4464
    assert ids.size == 0 or (ids.min() >= 0 and ids.max() < n_vocab), (ids.min(), ids.max(), n_vocab)
    return ids.astype("<u2")
