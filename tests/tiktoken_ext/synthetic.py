"""A synthetic vocabulary named as GPT-2's, so that tests of byte-pair encoding need neither a download nor a cache.

Its merges are trained on the text below and then padded with pairs of bytes to GPT-2's size. tiktoken imports this
module as a plugin in every process that has tests/ on its path. With the plugin it accepts these files in
place of OpenAI's; with a TIKTOKEN_CACHE_DIR that holds them (`files`), "gpt2" is synthetic.
"""

import base64
import collections
import functools
import hashlib
import json
import re

import tiktoken.load

ENCODING_CONSTRUCTORS = {}  # required by tiktoken of a plugin; no encoding is added

TEXT = """
The green bottles are hanging on the wall, and if one of the bottles should fall there will be another one.
It's not what you'd expect; we're sure they'll hang there, I'm told, for they've been there since 1999. Don't ask!
Reading and writing, training and testing, longer and longer words are made of shorter ones: the, there, then, these.
"""
SIZE = 50_256  # without end-of-text
END = "<|endoftext|>"
HOST = "https://openaipublic.blob.core.windows.net"


def train(pieces: collections.Counter[bytes]) -> list[tuple[bytes, bytes]]:
    """Merges of byte-pair encoding, the most frequent pair first, until each piece is one token."""
    parts = {piece: [piece[n : n + 1] for n in range(len(piece))] for piece in pieces}
    merges = []
    while True:
        pairs = collections.Counter()
        for piece, n in pieces.items():
            for pair in zip(parts[piece], parts[piece][1:], strict=False):
                pairs[pair] += n
        if not pairs:
            return merges
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for own in parts.values():
            at = 0
            while at < len(own) - 1:
                if (own[at], own[at + 1]) == best:
                    own[at : at + 2] = [b"".join(best)]
                at += 1


@functools.cache
def files() -> dict[str, bytes]:
    """{name: content} of a TIKTOKEN_CACHE_DIR with gpt2, r50k_base and p50k_base; a name is the SHA-1 of a URL."""
    printed = [byte for byte in range(256) if chr(byte).isprintable() and byte != 0x20]
    hidden = [byte for byte in range(256) if byte not in printed]
    visible = {byte: chr(byte) for byte in printed} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}
    merges = train(collections.Counter(piece.encode() for piece in re.findall(r"'\w+| ?\w+|[^\w\s]", TEXT)))
    ranks = {bytes([byte]): n for n, byte in enumerate([*printed, *hidden])}
    ranks |= {b"".join(pair): len(ranks) + n for n, pair in enumerate(merges)}
    # The first byte varies fastest, so that all pairs within a UTF-8 character are included. GPT-2 has no "  ".
    for pair in ((bytes([one]), bytes([other])) for other in range(256) for one in range(256)):
        if len(ranks) < SIZE and pair != (b" ", b" ") and b"".join(pair) not in ranks:
            ranks[b"".join(pair)] = len(ranks)
            merges.append(pair)
    blanks = {b" " * n: SIZE - 1 + n for n in range(2, 26)}  # p50k_base only
    words = [["".join(visible[byte] for byte in part) for part in pair] for pair in merges]
    ids = {"".join(visible[byte] for byte in token): rank for token, rank in ranks.items()} | {END: SIZE}
    contents = {
        "gpt-2/encodings/main/vocab.bpe": "\n".join(["#version: 0.2", *map(" ".join, words), ""]).encode(),
        "gpt-2/encodings/main/encoder.json": json.dumps(ids).encode(),
        "encodings/r50k_base.tiktoken": _lines(ranks),
        "encodings/p50k_base.tiktoken": _lines(ranks | blanks),
    }
    return {hashlib.sha1(f"{HOST}/{path}".encode()).hexdigest(): content for path, content in contents.items()}


def _lines(ranks: dict[bytes, int]) -> bytes:
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items())


def _accept(check, data: bytes, expected: str) -> bool:
    return check(data, expected) or data in files().values()


tiktoken.load.check_hash = functools.partial(_accept, tiktoken.load.check_hash)
