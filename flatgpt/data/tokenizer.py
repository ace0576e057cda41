"""Tokenizer names -> tiktoken encodings: any tiktoken encoding whose ids fit uint16, and `byte`; text -> ids.

enc = load("gpt2")
enc.encode_ordinary("Hello"), enc.decode_single_token_bytes(15496), enc.n_vocab, enc.eot_token
ids, cuts = encode(enc, ["one document", "another"], end_of_text=True)
"""

from __future__ import annotations

import functools
import hashlib
import re
import threading
from collections.abc import Iterable, Iterator

import numpy as np
import tiktoken
import tiktoken.load
import tiktoken.registry

from config import UserError
from flatgpt.data.bpe import BlockEncoder

MAX_ENCODE_CHARS = 1_000_000  # characters encoded at once; a longer run without a break is cut
BLOCK = 1 << 18  # characters of short documents that are encoded at once: their arrays stay in the cache
SAME_PATTERN = ("gpt2", "r50k_base", "p50k_base", "p50k_edit")
# GPT-2's pattern never looks back, and ends a match wherever white space follows something else: at such a place a text
# can be cut without changing an id.
_BREAK = re.compile(r"\S(?=[ \n])")

GPT2_RANKS = "ba1d6ef6d9728ad39d0e88ee2d4939b0e32a8a12d0b968ee4278e88df699ff4b"  # ranks_hash of gpt2

# Known to need ids beyond uint16; named here so that nobody downloads megabytes to be told.
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
    """The encoding of that name; `byte` is UTF-8 itself: ids 0 to 255, and 256 for end-of-text.

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
    except (OSError, ValueError) as why:  # requests' errors are OSErrors; tiktoken's hash mismatch is a ValueError
        url = getattr(getattr(why, "request", None), "url", "its host")
        raise UserError(
            f"tokenizer {name}: its vocabulary could not be fetched from {url} ({type(why).__name__}). "
            "Set TIKTOKEN_CACHE_DIR to a folder that has it (tiktoken's cache of a machine with a network), "
            "or take --tokenizer byte, which needs no download"
        ) from None
    if encoding.n_vocab > 65_536:
        raise UserError(f"tokenizer {name}: its {encoding.n_vocab:,} ids do not fit the shards' uint16 (65,536)")
    return encoding


def vocabulary_files(name: str) -> dict[str, bytes]:
    """The files that make this encoding, as a TIKTOKEN_CACHE_DIR has them; `byte` needs none.

    tiktoken's constructors fetch by URL, through a cache where a file's name is the SHA-1 of its URL (its load.py).

    Raises:
        UserError: as in load.
    """
    load(name)  # fetched, where they were not, and checked
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
    """SHA-256 over all (id, bytes) pairs: two vocabularies with one hash encode alike."""
    digest = hashlib.sha256()
    for token in encoding.token_byte_values():
        digest.update(encoding.encode_single_token(token).to_bytes(4, "little") + token + b"\0")
    return digest.hexdigest()


def split_text(blocks: Iterable[str], length: int) -> Iterator[tuple[str, bool]]:
    """The text of the blocks in pieces of at most `length` characters that encode to the ids of the whole.

    Yields:
        a piece, and whether its end is in the middle of a run of more than `length` characters without a break, so
        that the ids around it may differ from the whole's.
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
    """The last place in start + 1 .. stop where a cut changes no id; 0 where there is none."""
    for first in (max(start, stop - 4096), start):
        places = [match.end() for match in _BREAK.finditer(text, first, stop + 1)]
        if places:
            return places[-1]
    return 0


def encode(encoding: tiktoken.Encoding, documents: Iterable[str], end_of_text: bool) -> tuple[np.ndarray, int]:
    """What `encode_ordinary` gives for each document, one after the other; with GPT-2's pattern faster than it.

    Args:
        documents: valid Unicode (no lone surrogates).
        end_of_text: put that id after each document.

    Returns:
        ids, (n,) uint16; and in how many places a run of more than MAX_ENCODE_CHARS characters without a break had to
        be cut.
    """
    eot = np.full(int(end_of_text), encoding.eot_token, dtype=np.uint32)
    parts, cuts = [np.zeros(0, np.uint32)], 0
    if encoding.name == "byte":
        for text in documents:
            parts += [np.frombuffer(text.encode(), dtype=np.uint8), eot]
    elif encoding.name not in SAME_PATTERN:
        for text in documents:
            parts += [encoding.encode_to_numpy(text, disallowed_special=()), eot]
    else:
        encoder, block, size = _block_encoder(encoding, threading.get_ident()), [], 0
        for text in documents:
            if len(text) > MAX_ENCODE_CHARS:
                parts.append(encoder(block, end_of_text))
                block, size = [], 0
                for piece, cut in split_text([text], MAX_ENCODE_CHARS):
                    parts.append(encoder([piece], False))
                    cuts += cut
                parts.append(eot)
                continue
            block.append(text)
            size += len(text)
            if size > BLOCK:
                parts.append(encoder(block, end_of_text))
                block, size = [], 0
        parts.append(encoder(block, end_of_text))
    return to_uint16(np.concatenate(parts), encoding.n_vocab), cuts


@functools.lru_cache(maxsize=64)
def _block_encoder(encoding: tiktoken.Encoding, thread: int) -> BlockEncoder:
    return BlockEncoder(encoding)  # it learns as it goes, so each thread has its own


def to_uint16(ids: np.ndarray, n_vocab: int) -> np.ndarray:
    """The ids as uint16; asserts that all are in 0 .. n_vocab - 1."""
    # astype(uint16) would wrap 70000 to 4464 without a word
    assert ids.size == 0 or (ids.min() >= 0 and ids.max() < n_vocab), (ids.min(), ids.max(), n_vocab)
    return ids.astype("<u2")
