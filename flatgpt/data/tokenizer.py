"""Load tokenizers by name: tiktoken encodings whose ids fit uint16, and `byte`.

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

MAX_ENCODE_CHARS = 1_000_000  # maximum text per call; a longer text without a break is split anyway
GPT2_PATTERN_ENCODINGS = ("gpt2", "r50k_base", "p50k_base", "p50k_edit")
# GPT-2's pattern has no lookbehind, and a match ends wherever white space follows another character. Splitting a text
# there changes no id. This matches up to the last such position.
_LAST_BREAK = re.compile(r".*\S(?=[ \n])", re.DOTALL)

GPT2_RANKS = "ba1d6ef6d9728ad39d0e88ee2d4939b0e32a8a12d0b968ee4278e88df699ff4b"  # ranks_hash of gpt2

# Encodings with more than 65,536 ids, listed so that they are refused without a download.
TOO_LARGE = ("cl100k_base", "o200k_base", "o200k_harmony")


def check_name(name: str) -> None:
    """Raise UserError unless `load` supports this name. Downloads nothing."""
    known = [*(n for n in tiktoken.list_encoding_names() if n not in TOO_LARGE), "byte"]
    if name not in known:
        reason = "has more than 65,536 ids, which do not fit uint16 shards" if name in TOO_LARGE else "unknown"
        raise UserError(f"tokenizer {name}: {reason}; use one of {', '.join(known)}")


@functools.cache
def load(name: str) -> tiktoken.Encoding:
    """Return the encoding of this name. `byte` encodes UTF-8 bytes as ids 0 to 255, and end-of-text as 256.

    Raises:
        UserError: the name is unknown, it has more than 65,536 ids, or its vocabulary cannot be downloaded.
    """
    if name == "byte":
        return tiktoken.Encoding(
            "byte",
            # Long matches are fast; without merges, each byte is a token.
            pat_str=r"[\s\S]{1,4096}",
            mergeable_ranks={bytes([b]): b for b in range(256)},
            special_tokens={"<|endoftext|>": 256},
        )
    check_name(name)
    try:
        encoding = tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:  # requests' errors are OSErrors; tiktoken's hash mismatch is a ValueError
        problem = f"tokenizer {name}: its vocabulary could not be downloaded ({' '.join(str(error).split())})"
        remedy = "TIKTOKEN_CACHE_DIR to a copy of tiktoken's cache from a machine with network access"
        raise UserError(f"{problem}. Set {remedy}, or use --tokenizer byte, which needs no download") from None
    if encoding.n_vocab > 65_536:
        raise UserError(f"tokenizer {name}: its {encoding.n_vocab:,} ids do not fit uint16 shards")
    return encoding


def vocabulary_files(name: str) -> dict[str, bytes]:
    """Return {file name in a TIKTOKEN_CACHE_DIR: content} of the encoding's files; empty for `byte`.

    tiktoken's cache names each file with the SHA-1 of its URL (tiktoken/load.py).

    Raises:
        UserError: see load.
    """
    load(name)  # downloads and verifies missing files
    if name == "byte":
        return {}
    files, read = {}, tiktoken.load.read_file_cached

    def read_and_record(url: str, *args: str | None, **kwargs: str | None) -> bytes:
        files[hashlib.sha1(url.encode()).hexdigest()] = content = read(url, *args, **kwargs)
        return content

    tiktoken.load.read_file_cached = read_and_record
    try:
        tiktoken.registry.ENCODING_CONSTRUCTORS[name]()
    finally:
        tiktoken.load.read_file_cached = read
    return files


def ranks_hash(encoding: tiktoken.Encoding) -> str:
    """Return the SHA-256 of all (id, bytes) pairs, which identifies the vocabulary."""
    digest = hashlib.sha256()
    for token in encoding.token_byte_values():
        digest.update(encoding.encode_single_token(token).to_bytes(4, "little") + token + b"\0")
    return digest.hexdigest()


def split_text(blocks: Iterable[str], length: int) -> Iterator[str]:
    """Split the joined blocks into chunks of at most `length` characters, without changing the ids of the text.

    If `length` characters have no break, the split is inside a word, and ids next to it may change.
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
    """Convert ids to little-endian uint16. Raise ValueError unless all are in 0 .. n_vocab - 1."""
    if ids.size and not (ids.min() >= 0 and ids.max() < n_vocab):  # astype would wrap 70000 to 4464
        raise ValueError(f"ids {ids.min()} to {ids.max()} are not all in a vocabulary of {n_vocab:,} ids")
    return ids.astype("<u2")
