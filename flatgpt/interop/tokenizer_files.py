"""Write a tiktoken encoding as Hugging Face's GPT-2 tokenizer files, and identify the encoding that such files hold.

files = tokenizer_files(tokenizer.load("gpt2"), context_length=1024)  # {"tokenizer.json": b"...", ...}
identify_encoding(Path("a/hugging/face/folder"))  # "gpt2", "byte", ...

tiktoken has a rank for each token and merges any two neighbours whose bytes together are a token. Hugging Face has a
list of pairs that may merge. Both give the same ids: the parts of a token merge in one order wherever it occurs, so
exactly one pair makes each token, and the pairs are listed in the order of the tokens' ranks.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiktoken

from config import UserError
from flatgpt.data.tokenizer import SAME_PATTERN, load

END = "<|endoftext|>"
# GPT-2's printable characters for the 256 bytes (bytes_to_unicode in OpenAI's encoder.py): a byte that is printable in
# Latin-1 stays that character, the others become the characters from 256 on, in order.
PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
BYTE_TO_CHAR = {byte: chr(byte) for byte in PRINTABLE} | {byte: chr(256 + n) for n, byte in enumerate(OTHERS)}
# n_vocab, so that only an encoding of the right size is loaded; r50k_base's vocabulary is that of gpt2
SIZES = {"byte": 257, "gpt2": 50_257, "p50k_base": 50_281, "p50k_edit": 50_284}
UNSUPPORTED = ("vocab.txt", "spiece.model", "tokenizer.model")  # BERT's and SentencePiece's, also in folders of GPT-2
MAX_BYTES = 32 << 20  # of a file that is read: transformers writes 3.6 MB for GPT-2
VERSION = "#version: 0.2"  # first line of merges.txt


def tokenizer_files(encoding: tiktoken.Encoding, context_length: int) -> dict[str, bytes]:
    """Return the files {name: content} that transformers' AutoTokenizer and converters of GPT-2 read.

    They describe a GPT2Tokenizer (byte-level BPE) with the encoding's ids; end-of-text is bos, eos and unk. It encodes
    as `encode_ordinary` does, special tokens as with allowed_special="all". tiktoken 0.14 and tokenizers 0.23 agree on
    the class of every code point. llama.cpp's converter accepts only GPT-2's vocabulary.

    Args:
        encoding: GPT-2's, one with the same pattern (tokenizer.SAME_PATTERN), or `byte`.
        context_length: written as model_max_length, in tokens.

    Raises:
        UserError: an encoding with another pattern, which GPT2Tokenizer cannot express.
    """
    if encoding.name not in (*SAME_PATTERN, "byte"):
        raise UserError(
            f"tokenizer {encoding.name}: it splits text by another pattern than GPT-2's, which Hugging Face's GPT-2 "
            f"tokenizer cannot express; one of {', '.join((*SAME_PATTERN, 'byte'))} can be exported"
        )
    vocab, merges = _vocab(encoding), _merges(encoding)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    special = {n: {"content": token, **flags} for token, n in vocab.items() if token in encoding.special_tokens_set}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    ends = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END)
    backend = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": n, **token} for n, token in special.items()],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocab,
            "merges": merges,  # as text: tokenizers before 0.20 does not read pairs
        },
    }
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": context_length,
        **ends,
        "add_prefix_space": False,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,  # otherwise transformers 4 decodes "a ." as "a."
        "errors": "replace",
        "added_tokens_decoder": special,
    }
    return {
        "tokenizer.json": _json(backend),
        "vocab.json": _json(vocab),
        "merges.txt": "\n".join([VERSION, *merges, ""]).encode(),
        "tokenizer_config.json": _json(settings),
        "special_tokens_map.json": _json(ends),
    }


def identify_encoding(folder: Path) -> str | None:
    """Return the name of the encoding whose vocabulary a Hugging Face folder has, None if it has no vocabulary.

    Ids and merges are compared: of tokenizer.json, and of vocab.json with merges.txt, whichever exist. Tokens may be
    added after the encoding's own ids ([PAD] at 50257). How the folder's tokenizer treats a text before it merges (a
    prefix space, a normaliser) changes no id's meaning and is not compared. r50k_base is called gpt2: their
    vocabularies are equal. An encoding is loaded only if the number of ids fits.

    Raises:
        UserError: an unknown vocabulary, half of one, two that differ, a damaged file; as tokenizer.load.
    """
    fast, vocab, merges, added = (
        folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json")
    )
    names = {}
    if fast.is_file():
        names[fast.name] = _match(fast, *_read(fast, _parse_fast))
    if vocab.is_file() and merges.is_file():
        more = _read(added, _parse_ids) if added.is_file() else {}
        lines = _read(merges, str.splitlines)
        lines = [line for line in lines if not line.startswith("#version")]
        names[vocab.name] = _match(vocab, _read(vocab, _parse_ids), more, lines)
    if len(set(names.values())) > 1:
        found = ", ".join(f"{file} is {name}'s" for file, name in names.items())
        raise UserError(f"{folder}: its tokenizer files disagree, {found}; copy the folder again")
    if names:
        return next(iter(names.values()))
    for file, other in ((vocab, merges), (merges, vocab)):
        if file.is_file():
            raise UserError(f"{other} is missing, without which {file.name} is half a vocabulary; copy it too")
    for name in UNSUPPORTED:
        if (folder / name).is_file():
            raise _unknown_vocabulary(folder / name)
    return None


def _vocab(encoding: tiktoken.Encoding) -> dict[str, int]:
    """Return {token: id} in the order of ids: tokens in printable characters, special tokens unchanged."""
    ids = {_printable(token): encoding.encode_single_token(token) for token in encoding.token_byte_values()}
    ids |= {token: encoding.encode_single_token(token) for token in encoding.special_tokens_set}
    return dict(sorted(ids.items(), key=lambda item: item[1]))


@functools.cache  # half a second for GPT-2
def _merges(encoding: tiktoken.Encoding) -> list[str]:
    """Return the two tokens that make each token of several bytes, in rank order: ["Ġ t", "Ġ a", "h e", ...]."""
    ranks = {token: encoding.encode_single_token(token) for token in encoding.token_byte_values()}
    merges = []
    for token in sorted(ranks, key=ranks.get):
        parts = [token[n : n + 1] for n in range(len(token))]
        while len(parts) > 2:
            joined = [ranks.get(left + right, math.inf) for left, right in itertools.pairwise(parts)]
            lowest = min(joined)
            assert lowest < math.inf, (encoding.name, token, parts)  # no text would give this token
            k = joined.index(lowest)
            parts[k : k + 2] = [parts[k] + parts[k + 1]]
        if len(parts) == 2:
            merges.append(" ".join(map(_printable, parts)))
    return merges


def _printable(token: bytes) -> str:
    return "".join(BYTE_TO_CHAR[byte] for byte in token)


def _json(content: dict) -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode()


def _match(file: Path, vocab: dict[str, int], added: dict[str, int], merges: list[str]) -> str:
    """Return the encoding with these ids and merges; added tokens beyond its ids are ignored."""
    tokens = vocab | added
    for name, size in SIZES.items():
        ids = {token: n for token, n in tokens.items() if n < size}
        if len(ids) == size and max(vocab.values(), default=-1) < size:
            encoding = load(name)
            only_added = ids.keys() - vocab.keys()  # not in printable characters: Ġ is not a space in them
            if ids == _vocab(encoding) and only_added <= encoding.special_tokens_set and merges == _merges(encoding):
                return name
    raise _unknown_vocabulary(file)


def _unknown_vocabulary(file: Path) -> UserError:
    return UserError(
        f"{file} holds a vocabulary that flatGPT does not have, so its ids would mean other text; "
        f"take a model with the vocabulary of {', '.join(SIZES)}"
    )


def _read(file: Path, parse: Callable) -> Any:
    """Return parse(text of the file)."""
    if file.stat().st_size > MAX_BYTES:
        raise _unknown_vocabulary(file)
    try:
        content = parse(file.read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is damaged: {type(error).__name__} {error}; copy it again") from None
    if content is None:
        raise _unknown_vocabulary(file)
    return content


def _parse_fast(text: str) -> tuple[dict[str, int], dict[str, int], list[str]] | None:
    """Return vocabulary, added tokens and merges of a tokenizer.json, None if it is not byte-pair encoding."""
    content = json.loads(text)
    model = content["model"]
    if model.get("type", "BPE") != "BPE":
        return None
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    return _check_ids(model["vocab"]), _check_ids(added), merges


def _parse_ids(text: str) -> dict[str, int]:
    return _check_ids(json.loads(text))


def _check_ids(ids: object) -> dict[str, int]:
    if not isinstance(ids, dict) or not all(type(n) is int for n in ids.values()):
        raise ValueError("whole numbers by token are expected")
    return ids
