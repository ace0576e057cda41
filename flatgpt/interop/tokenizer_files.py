"""Convert a tiktoken encoding to Hugging Face's GPT-2 tokenizer files, and identify the encoding of such files.

files = tokenizer_files(tokenizer.load("gpt2"), context_length=1024)  # {"tokenizer.json": b"...", ...}
identify_encoding(Path("a/hugging/face/folder"))  # "gpt2", "byte", ...

tiktoken has a rank for each token, and merges two neighbours if their concatenation is a token. Hugging Face has an
ordered list of pairs to merge. Both give the same ids: a token's bytes always merge in the same order, so exactly one
pair forms each token, and the list has these pairs in rank order.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

import tiktoken

from config import UserError
from flatgpt.data.tokenizer import GPT2_PATTERN_ENCODINGS, load

END_OF_TEXT = "<|endoftext|>"
# GPT-2's printable characters for the 256 bytes (bytes_to_unicode in OpenAI's encoder.py): bytes that are printable in
# Latin-1 keep their character, the others get the characters from 256 on, in order.
PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
UNPRINTABLE = [byte for byte in range(256) if byte not in PRINTABLE]
BYTE_TO_CHAR = {byte: chr(byte) for byte in PRINTABLE} | {byte: chr(256 + n) for n, byte in enumerate(UNPRINTABLE)}
# n_vocab, so that only an encoding of the right size is loaded; r50k_base has the same vocabulary as gpt2
SIZES = {"byte": 257, "gpt2": 50_257, "p50k_base": 50_281, "p50k_edit": 50_284}
UNSUPPORTED_FILES = ("vocab.txt", "spiece.model", "tokenizer.model")  # BERT and SentencePiece
VERSION = "#version"  # prefix of the first line of merges.txt


def tokenizer_files(encoding: tiktoken.Encoding, context_length: int) -> dict[str, bytes]:
    """Return the files {name: content} for transformers' AutoTokenizer and for converters of GPT-2.

    They define a GPT2Tokenizer (byte-level BPE) with the encoding's ids; end-of-text is bos, eos and unk. Its ids equal
    those of `encode_ordinary`; special tokens are encoded as with allowed_special="all". tiktoken 0.14 and tokenizers
    0.23 agree on the class of every code point. llama.cpp's converter accepts only GPT-2's vocabulary.

    Args:
        encoding: one with GPT-2's pattern (tokenizer.GPT2_PATTERN_ENCODINGS), or `byte`.
        context_length: model_max_length, in tokens.

    Raises:
        UserError: the encoding has another pattern, which GPT2Tokenizer does not support.
    """
    if encoding.name not in (*GPT2_PATTERN_ENCODINGS, "byte"):
        raise UserError(
            f"tokenizer {encoding.name}: Hugging Face's GPT-2 tokenizer does not support its split pattern; "
            f"one of {', '.join((*GPT2_PATTERN_ENCODINGS, 'byte'))} can be exported"
        )
    vocab, merges = _vocab(encoding), _merges(encoding)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    special = {n: {"content": token, **flags} for token, n in vocab.items() if token in encoding.special_tokens_set}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    special_names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
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
            "merges": merges,  # strings: tokenizers before 0.20 does not read pairs
        },
    }
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": context_length,
        **special_names,
        "add_prefix_space": False,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,  # with true, transformers 4 decodes "a ." as "a."
        "errors": "replace",
        "added_tokens_decoder": special,
    }
    return {
        "tokenizer.json": _json(backend),
        "vocab.json": _json(vocab),
        "merges.txt": "\n".join([f"{VERSION}: 0.2", *merges, ""]).encode(),
        "tokenizer_config.json": _json(settings),
        "special_tokens_map.json": _json(special_names),
    }


def identify_encoding(folder: Path) -> str | None:
    """Return the name of the encoding that has the vocabulary of a Hugging Face folder; None without a vocabulary.

    Ids and merges are read from tokenizer.json, or else from vocab.json and merges.txt. Tokens may be added after the
    encoding's ids ([PAD] at 50257). Prefix spaces and normalizers do not change the meaning of an id and are not
    compared. r50k_base is reported as gpt2, because their vocabularies are equal. An encoding is loaded only if the
    number of ids matches.

    Raises:
        UserError: the vocabulary is unknown, or a file is missing or damaged; as tokenizer.load.
    """
    names = ("tokenizer.json", "vocab.json", "merges.txt", *UNSUPPORTED_FILES)
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    if file is None:
        return None
    try:
        if file.name == "tokenizer.json":
            content = json.loads(file.read_text(encoding="utf-8"))
            vocab, merges = content["model"]["vocab"], content["model"]["merges"]
            added = {token["content"]: token["id"] for token in content.get("added_tokens", ())}
        else:
            vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
            added_file = folder / "added_tokens.json"
            added = json.loads(added_file.read_text(encoding="utf-8")) if added_file.is_file() else {}
            lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
            merges = [line for line in lines if not line.startswith(VERSION)]
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
        tokens = {token: int(n) for token, n in (vocab | added).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise UserError(f"{file} is damaged or not a byte-pair vocabulary: {type(error).__name__} {error}") from None
    for name, size in SIZES.items():
        ids = {token: n for token, n in tokens.items() if n < size}
        size_matches = len(ids) == size and not any(tokens[token] >= size for token in vocab)
        if size_matches and ids == _vocab(load(name)) and merges == _merges(load(name)):
            return name
    raise UserError(
        f"{file}: flatGPT does not support this vocabulary; choose a model with the vocabulary of {', '.join(SIZES)}"
    )


def _vocab(encoding: tiktoken.Encoding) -> dict[str, int]:
    """Return {token: id} in order of ids, with tokens as printable characters and special tokens unchanged."""
    ids = {_printable(token): encoding.encode_single_token(token) for token in encoding.token_byte_values()}
    ids |= {token: encoding.encode_single_token(token) for token in encoding.special_tokens_set}
    return dict(sorted(ids.items(), key=lambda item: item[1]))


@functools.cache  # takes half a second for GPT-2
def _merges(encoding: tiktoken.Encoding) -> list[str]:
    """Return the pair that forms each token of several bytes, in rank order: ["Ġ t", "Ġ a", "h e", ...]."""
    ranks = {token: encoding.encode_single_token(token) for token in encoding.token_byte_values()}
    merges = []
    for token in sorted(ranks, key=ranks.get):
        parts = [token[n : n + 1] for n in range(len(token))]
        while len(parts) > 2:
            k = min(range(len(parts) - 1), key=lambda k: ranks.get(parts[k] + parts[k + 1], math.inf))
            parts[k : k + 2] = [parts[k] + parts[k + 1]]
        if len(parts) == 2:
            merges.append(" ".join(map(_printable, parts)))
    return merges


def _printable(token: bytes) -> str:
    return "".join(BYTE_TO_CHAR[byte] for byte in token)


def _json(content: dict) -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode()
