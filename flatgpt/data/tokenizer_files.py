"""Write a tokenizer as Hugging Face's files.

tokenizer_files(tokenizer.load("gpt2"), context_length=1024)  # {"tokenizer.json": b"...", ...}

tiktoken has a rank for each token, and merges two neighbours if their concatenation is a token. Hugging Face has an
ordered list of pairs to merge. Both give the same ids: a token's bytes always merge in the same order, so exactly one
pair forms each token, and the list has these pairs in rank order.
"""

from __future__ import annotations

import functools
import json
import math

import tiktoken

from flatgpt.data.tokenizer import PATTERN, TOKENIZER_FILE, CharacterTokenizer

END_OF_TEXT = "<|endoftext|>"
# GPT-2's printable characters for the 256 bytes (bytes_to_unicode in OpenAI's encoder.py): bytes that are printable in
# Latin-1 keep their character, the others get the characters from 256 on, in order.
PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
UNPRINTABLE = [byte for byte in range(256) if byte not in PRINTABLE]
BYTE_TO_CHAR = {byte: chr(byte) for byte in PRINTABLE} | {byte: chr(256 + n) for n, byte in enumerate(UNPRINTABLE)}
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}
EACH_CHARACTER = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")  # that say where an added token is found
VERSION = "#version"  # prefix of the first line of merges.txt


def tokenizer_files(encoding: tiktoken.Encoding, context_length: int) -> dict[str, bytes]:
    """Return the files {name: content} for transformers' AutoTokenizer and for converters of GPT-2.

    The ids equal those of `encode_ordinary`; added tokens are encoded as by tokenizer.encode_special. The token between
    documents is bos, eos and unk. llama.cpp's converter accepts only GPT-2's vocabulary.

    Args:
        context_length: model_max_length, in tokens.
    """
    settings: dict = {"model_max_length": context_length, "clean_up_tokenization_spaces": False}
    if isinstance(encoding, CharacterTokenizer):
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
        return {TOKENIZER_FILE: tokenizer_json(encoding), "tokenizer_config.json": _json(settings)}
    end = getattr(encoding, "end_of_text", END_OF_TEXT)
    special_names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), end) if end else {}
    standard = not getattr(encoding, "content", b"") and _is_gpt2(encoding)
    settings = {
        "tokenizer_class": "GPT2Tokenizer" if standard else "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        **special_names,
        "add_prefix_space": False,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,  # with true, transformers 4 decodes "a ." as "a."
        "errors": "replace",
        "added_tokens_decoder": {token.pop("id"): token for token in _added_tokens(encoding)},
    }
    return {
        TOKENIZER_FILE: tokenizer_json(encoding),
        "vocab.json": _json(_vocab(encoding)),
        "merges.txt": "\n".join([f"{VERSION}: 0.2", *merge_list(encoding), ""]).encode(),
        "tokenizer_config.json": _json(settings),
        "special_tokens_map.json": _json(special_names),
    }


def tokenizer_json(encoding: tiktoken.Encoding) -> bytes:
    """Return the tokenizer as tokenizer.json. One that was read from such a file lacks a normalizer and prefix space.

    tiktoken 0.14 and tokenizers 0.23 agree on the class of every code point.
    """
    if content := getattr(encoding, "content", b""):
        return content
    backend: dict = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None}
    if isinstance(encoding, CharacterTokenizer):
        model = {"type": "WordLevel", "vocab": encoding.ids, "unk_token": ""}  # other characters are an error
        return _json({**backend, "pre_tokenizer": EACH_CHARACTER, "decoder": {"type": "Fuse"}, "model": model})
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    split = byte_level
    if not _is_gpt2(encoding):
        byte_level = {**byte_level, "use_regex": False}
        words = {**EACH_CHARACTER, "pattern": {"Regex": encoding._pat_str}}
        split = {"type": "Sequence", "pretokenizers": [words, byte_level]}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "",
        "fuse_unk": False,
        "byte_fallback": False,
        "vocab": _vocab(encoding),
        "merges": merge_list(encoding),  # strings: tokenizers before 0.20 does not read pairs
    }
    backend |= {"added_tokens": _added_tokens(encoding), "pre_tokenizer": split, "post_processor": byte_level}
    return _json({**backend, "decoder": byte_level, "model": model})


def _is_gpt2(encoding: tiktoken.Encoding) -> bool:
    """Whether GPT-2's pattern gives the same ids. `byte` has no merges, so that any pattern does."""
    return encoding.name == "byte" or encoding._pat_str == PATTERN


def _added_tokens(encoding: tiktoken.Encoding) -> list[dict]:
    if content := getattr(encoding, "content", b""):
        return json.loads(content).get("added_tokens") or []
    by_id, rules = sorted(encoding._special_tokens.items(), key=lambda item: item[1]), getattr(encoding, "rules", {})
    flags = {text: {flag: flag in rules.get(text, "") for flag in FLAGS} | {"special": True} for text, _ in by_id}
    return [{"id": n, "content": text, **flags[text]} for text, n in by_id if "unused" not in rules.get(text, "")]


def _vocab(encoding: tiktoken.Encoding) -> dict[str, int]:
    """Return {token: id} in order of ids, with tokens as printable characters and special tokens unchanged."""
    ids = {_printable(token): encoding.encode_single_token(token) for token in encoding.token_byte_values()}
    ids |= {token: encoding.encode_single_token(token) for token in encoding.special_tokens_set}
    return dict(sorted(ids.items(), key=lambda item: item[1]))


@functools.cache  # takes half a second for GPT-2
def merge_list(encoding: tiktoken.Encoding) -> list[str]:
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
