"""Tokenizers: tiktoken encodings whose ids fit uint16, `byte`, and those of files (tokenizer_reader.py).

enc = load("gpt2")
enc.encode_ordinary("Hello"), enc.decode_single_token_bytes(15496), enc.n_vocab, enc.eot_token
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import re
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tiktoken
import tiktoken.load
import tiktoken.registry
from tiktoken_ext.openai_public import r50k_pat_str

from config import UserError

# Maximum text per call; a longer text without a break is split anyway. One blank more can overflow tiktoken's stack.
MAX_ENCODE_CHARS = 999_998
GPT2_PATTERN_ENCODINGS = ("gpt2", "r50k_base", "p50k_base", "p50k_edit")
# White space to the tokenizers library; str.strip() also removes separators such as \x1c.
_WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
_OTHER_WORD = re.compile("[\u200c\u200dⒶ-ⓩ🄰-🅉🅐-🅩🅰-🆉]")  # not letters, but characters of words

SPECIAL_NOTE = "note: the text contains {}, which is encoded as ordinary characters; --parse_special makes it one id"
NO_ID = -1  # an end_of_text_id that no token has
TOKENIZER_FILE = "tokenizer.json"  # in the folder of a dataset or checkpoint, unless its tokenizer has a known name
GPT2_RANKS = "ba1d6ef6d9728ad39d0e88ee2d4939b0e32a8a12d0b968ee4278e88df699ff4b"  # ranks_hash of gpt2

PATTERN = r50k_pat_str  # GPT-2's
# The same, with combining marks among the letters, as the scripts of India and South-East Asia need, and numbers of at
# most three digits. `prepare_data.py --tokenizer bpe:N` trains with it.
MARKS_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?[\p{L}\p{M}]+| ?\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]+|\s+(?!\S)|\s+"

# Encodings with more than 65,536 ids and their number, listed so that they are refused without a download.
TOO_LARGE = {"cl100k_base": 100_277, "o200k_base": 200_019, "o200k_harmony": 201_088}


class FileTokenizer(tiktoken.Encoding):
    """A byte-level BPE that was read from a file.

    Args:
        name: shown in messages.
        ranks: bytes -> id of each token. A lower id is merged first.
        special: text -> id of the added tokens.
        end_of_text: the added token that separates documents, if there is one.
        rules: text -> those of the flags in tokenizer.json that say where an added token is found, such as
            "lstrip normalized". With "unused" it is never found.
        content: the tokenizer.json that it was read from, as it came; b"" for other formats.
    """

    def __init__(
        self,
        name: str,
        pattern: str,
        ranks: dict[bytes, int],
        special: dict[str, int],
        end_of_text: str | None = None,
        rules: dict[str, str] | None = None,
        content: bytes = b"",
    ):
        super().__init__(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        self.end_of_text = end_of_text if end_of_text in special else None
        self.rules, self.content = rules or {}, content

    @property
    def eot_token(self) -> int | None:
        """The id that separates documents, if there is one."""
        return self._special_tokens.get(self.end_of_text)

    def __getstate__(self) -> tuple:
        ranks, special = self._mergeable_ranks, self._special_tokens
        return self.name, self._pat_str, ranks, special, self.end_of_text, self.rules, self.content

    def __setstate__(self, value: tuple) -> None:
        self.__init__(*value)


class CharacterTokenizer(FileTokenizer):
    """A tokenizer with an id for each of its characters and for nothing else, such as that of nanoGPT's datasets.

    Args:
        ids: character -> id.
    """

    def __init__(self, name: str, ids: dict[str, int], content: bytes = b""):
        super().__init__(name, r"[\s\S]", {char.encode(): n for char, n in ids.items()}, {}, content=content)
        self.ids = ids
        self._table = np.full(0x110000, -1, np.int32)  # code point -> id
        self._table[[ord(char) for char in ids]] = list(ids.values())

    def encode_to_numpy(self, text: str, **_: object) -> np.ndarray:
        """Return the id of each character, (len(text),) uint32.

        Raises:
            UserError: names the first character without an id, and its place.
        """
        found = self._table[np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")]
        if len(unknown := np.flatnonzero(found < 0)):
            place = int(unknown[0])
            line, column = text.count("\n", 0, place) + 1, place - text.rfind("\n", 0, place)
            raise UserError(
                f"tokenizer {self.name} has no character {text[place]!r} (U+{ord(text[place]):04X}), which is in line "
                f"{line:,}, column {column:,} of the text: {text[max(0, place - 20) : place + 20]!r}; remove it, or "
                "choose another tokenizer"
            )
        return found.astype(np.uint32)

    def encode_ordinary(self, text: str) -> list[int]:
        """As encode_to_numpy."""
        return self.encode_to_numpy(text).tolist()

    def encode(self, text: str, **_: object) -> list[int]:
        """As encode_to_numpy."""
        return self.encode_ordinary(text)

    def __getstate__(self) -> tuple:
        return self.name, self.ids, self.content


def check_name(name: str) -> None:
    """Raise UserError unless `load` supports this name. Downloads nothing."""
    known = [*(n for n in tiktoken.list_encoding_names() if n not in TOO_LARGE), "byte"]
    if name not in known:
        reason = f"has {TOO_LARGE[name]:,} ids; at most 65,536 fit uint16 shards" if name in TOO_LARGE else "unknown"
        raise UserError(f"tokenizer {name}: {reason}; use one of {', '.join(known)}")


def is_named(name: str, folder: Path) -> bool:
    """Whether the tokenizer of a dataset in this folder is an encoding of this name, which `load` knows."""
    known = name == "byte" or name in tiktoken.list_encoding_names()
    return known and not (folder / TOKENIZER_FILE).is_file()


def load(name: str, folder: Path | None = None, end_of_text_id: int | None = None) -> tiktoken.Encoding:
    """Return the tokenizer of a dataset, a checkpoint, or of this name.

    Args:
        name: of an encoding, or any name that a dataset or checkpoint has given to its tokenizer.
        folder: of the dataset or checkpoint. If it contains a tokenizer.json, that is read instead.
        end_of_text_id: the id that separates documents, if there is one and a tokenizer.json is read.

    Raises:
        UserError: the name is unknown, it has more than 65,536 ids, or its vocabulary cannot be downloaded; or as
            tokenizer_reader.read.
    """
    if folder and (folder / TOKENIZER_FILE).is_file():
        from flatgpt.data import tokenizer_reader  # imports this module

        end_of_text_id = NO_ID if end_of_text_id is None else end_of_text_id
        return tokenizer_reader.read_json(folder / TOKENIZER_FILE, name, end_of_text_id)
    return _load_named(name)


@functools.cache
def _load_named(name: str) -> tiktoken.Encoding:
    """Return the encoding of this name. `byte` encodes UTF-8 bytes as ids 0 to 255, and end-of-text as 256."""
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
    """Return the SHA-256 of all (id, bytes) pairs, and for a FileTokenizer of its pattern and added tokens."""
    digest = hashlib.sha256()
    for token in encoding.token_byte_values():
        digest.update(encoding.encode_single_token(token).to_bytes(4, "little") + token + b"\0")
    if isinstance(encoding, FileTokenizer):
        parts = encoding._pat_str, sorted(encoding._special_tokens.items()), sorted(encoding.rules.items())
        digest.update(json.dumps((*parts, encoding.end_of_text)).encode())
    return digest.hexdigest()


def extends(encoding: tiktoken.Encoding, other: tiktoken.Encoding) -> bool:
    """Whether a tokenizer gives a text the ids of another one, apart from added tokens that the other one lacks."""
    same = encoding._pat_str == other._pat_str and encoding._mergeable_ranks == other._mergeable_ranks
    return same and other._special_tokens.items() <= encoding._special_tokens.items()


def can_split(encoding: tiktoken.Encoding) -> bool:
    """Whether chunks.split_text changes no id of this tokenizer."""
    named = encoding.name in GPT2_PATTERN_ENCODINGS and not isinstance(encoding, FileTokenizer)
    return named or encoding._pat_str in (PATTERN, MARKS_PATTERN)


@functools.lru_cache
def _special_patterns(encoding: tiktoken.Encoding) -> list[re.Pattern[str]]:
    """Return patterns of the added tokens, which are searched one after the other. The longest token matches first."""
    rules, groups = getattr(encoding, "rules", {}), {"": [], "normalized": []}
    for text in sorted(encoding._special_tokens, key=len, reverse=True):
        if "unused" not in rules.get(text, ""):
            groups["normalized" * ("normalized" in rules.get(text, ""))].append(re.escape(text))
    return [re.compile("|".join(texts)) for texts in groups.values() if texts]


def _in_word(char: str) -> bool:
    """Whether the tokenizers library takes a character, if there is one, for a part of a word."""
    category = unicodedata.category(char) if char else ""
    return category[:1] in ("L", "M") or category in ("Nd", "Nl", "Pc") or bool(_OTHER_WORD.match(char))


def _split_special(
    encoding: tiktoken.Encoding, pattern: re.Pattern[str], text: str
) -> Iterator[tuple[str, int | None]]:
    """Yield the added tokens that match, each with its id, and the texts between them, with None."""
    start = 0
    for match in pattern.finditer(text):
        flags, (left, right) = getattr(encoding, "rules", {}).get(match.group(), ""), match.span()
        if "single_word" in flags and (_in_word(text[max(0, left - 1) : left]) or _in_word(text[right : right + 1])):
            continue
        if "lstrip" in flags:
            left = start + len(text[start:left].rstrip(_WHITE_SPACE))
        if "rstrip" in flags:
            right = re.compile(f"[{_WHITE_SPACE}]*").match(text, right).end()
        yield text[start:left], None
        yield match.group(), encoding._special_tokens[match.group()]
        start = right
    yield text[start:], None


def encode_special(encoding: tiktoken.Encoding, text: str) -> list[int]:
    """Return the ids of a text in which added tokens are never split and never merged across, as AutoTokenizer does."""
    parts: list[tuple[str, int | None]] = [(text, None)]
    for pattern in _special_patterns(encoding):
        split = ([part] if part[1] is not None else _split_special(encoding, pattern, part[0]) for part in parts)
        parts = list(itertools.chain.from_iterable(split))
    return [i for part, n in parts for i in (encode_ordinary(encoding, part) if n is None else [n])]


def encode_ordinary(encoding: tiktoken.Encoding, text: str) -> list[int]:
    """Return the ids of a text that a user gave, of any length; added tokens are encoded as ordinary characters.

    tiktoken's own encode_ordinary panics at a million blanks or line ends in a row. They are encoded in parts.
    """
    runs = re.finditer(r"\s+", text) if len(text) > MAX_ENCODE_CHARS else ()
    cuts = [i for run in runs for i in range(run.start() + MAX_ENCODE_CHARS, run.end(), MAX_ENCODE_CHARS)]
    parts = itertools.pairwise([0, *cuts, len(text)])
    return [n for start, stop in parts for n in encoding.encode_ordinary(text[start:stop])]


def encode(encoding: tiktoken.Encoding, text: str, parse_special: bool) -> list[int]:
    """Return the ids of a text: of its added tokens if parse_special is set, otherwise of all its characters.

    A note is printed once if this encodes an added token as characters.
    """
    if parse_special:
        return encode_special(encoding, text)
    if found := find_special(encoding, text):
        note_once(SPECIAL_NOTE.format(repr(found)))
    return encode_ordinary(encoding, text)


def start_ids(encoding: tiktoken.Encoding, end_of_text: bool = True) -> list[int]:
    """Return the ids that replace an empty prompt.

    Args:
        end_of_text: use the token that separates documents, if there is one. Otherwise a newline is used, or the first
            character of a tokenizer that has no newline.
    """
    if end_of_text and encoding.eot_token is not None:
        return [encoding.eot_token]
    newline = "\n" in encoding.ids if isinstance(encoding, CharacterTokenizer) else True
    return encoding.encode_ordinary("\n") if newline else [0]


@functools.cache
def note_once(text: str) -> None:
    """Print a line to standard error, once per process, on rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)


def find_special(encoding: tiktoken.Encoding, text: str) -> str | None:
    """Return an added token that a text contains, if there is one."""
    found = filter(None, (pattern.search(text) for pattern in _special_patterns(encoding)))
    return next((match.group() for match in found), None)


def to_uint16(ids: np.ndarray, n_vocab: int) -> np.ndarray:
    """Convert ids to little-endian uint16. Raise ValueError unless all are in 0 .. n_vocab - 1."""
    if ids.size and not (ids.min() >= 0 and ids.max() < n_vocab):  # astype would wrap 70000 to 4464
        raise ValueError(f"ids {ids.min()} to {ids.max()} are not all in a vocabulary of {n_vocab:,} ids")
    return ids.astype("<u2")
