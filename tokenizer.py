"""Tokenizer names -> tiktoken encodings: any tiktoken encoding whose ids fit uint16, and `byte`.

enc = load("gpt2")
enc.encode_ordinary("Hello"), enc.decode_single_token_bytes(15496), enc.n_vocab, enc.eot_token
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np
import tiktoken

from config import UserError

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


def ranks_hash(encoding: tiktoken.Encoding) -> str:
    """SHA-256 over all (id, bytes) pairs: two vocabularies with one hash encode alike."""
    digest = hashlib.sha256()
    for token in encoding.token_byte_values():
        digest.update(encoding.encode_single_token(token).to_bytes(4, "little") + token + b"\0")
    return digest.hexdigest()


def token_bytes(encoding: tiktoken.Encoding) -> np.ndarray:
    """How many bytes of text each id stands for: (n_vocab,) int64; special tokens stand for none."""
    lengths = np.zeros(encoding.n_vocab, dtype=np.int64)
    for token in encoding.token_byte_values():
        lengths[encoding.encode_single_token(token)] = len(token)
    return lengths
