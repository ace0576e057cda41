"""Write a tiktoken encoding as Hugging Face's GPT-2 tokenizer files, and identify the encoding that such files hold.

files = tokenizer_files(tokenizer.load("gpt2"), context_length=1024)  # {"tokenizer.json": b"...", ...}
identify_encoding(Path("a/hugging/face/folder"))  # "gpt2", "byte", ...

tiktoken has a rank for each token and merges any two neighbours whose bytes together are a token. Hugging Face has a
list of pairs that may merge. Both give the same ids: the parts of a token merge in one order wherever it occurs, so
exactly one pair makes each token, and the pairs are listed in the order of the tokens' ranks.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

import tiktoken

from config import UserError
from flatgpt.data.tokenizer import GPT2_PATTERN_ENCODINGS, load

END = "<|endoftext|>"
# GPT-2's printable characters for the 256 bytes (bytes_to_unicode in OpenAI's encoder.py): a byte that is printable in
# Latin-1 stays that character, the others become the characters from 256 on, in order.
PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
BYTE_TO_CHAR = {byte: chr(byte) for byte in PRINTABLE} | {byte: chr(256 + n) for n, byte in enumerate(OTHERS)}
# n_vocab, so that only an encoding of the right size is loaded; r50k_base's vocabulary is that of gpt2
SIZES = {"byte": 257, "gpt2": 50_257, "p50k_base": 50_281, "p50k_edit": 50_284}
UNSUPPORTED = ("vocab.txt", "spiece.model", "tokenizer.model")  # BERT's and SentencePiece's, also in folders of GPT-2
VERSION = "#version"  # begins the first line of merges.txt


def tokenizer_files(encoding: tiktoken.Encoding, context_length: int) -> dict[str, bytes]:
    """Return the files {name: content} that transformers' AutoTokenizer and converters of GPT-2 read.

    They describe a GPT2Tokenizer (byte-level BPE) with the encoding's ids; end-of-text is bos, eos and unk. It encodes
    as `encode_ordinary` does, special tokens as with allowed_special="all". tiktoken 0.14 and tokenizers 0.23 agree on
    the class of every code point. llama.cpp's converter accepts only GPT-2's vocabulary.

    Args:
        encoding: GPT-2's, one with the same pattern (tokenizer.GPT2_PATTERN_ENCODINGS), or `byte`.
        context_length: written as model_max_length, in tokens.

    Raises:
        UserError: an encoding with another pattern, which GPT2Tokenizer cannot express.
    """
    if encoding.name not in (*GPT2_PATTERN_ENCODINGS, "byte"):
        raise UserError(
            f"tokenizer {encoding.name}: it splits text by another pattern than GPT-2's, which Hugging Face's GPT-2 "
            f"tokenizer cannot express; one of {', '.join((*GPT2_PATTERN_ENCODINGS, 'byte'))} can be exported"
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
        "merges.txt": "\n".join([f"{VERSION}: 0.2", *merges, ""]).encode(),
        "tokenizer_config.json": _json(settings),
        "special_tokens_map.json": _json(ends),
    }


def identify_encoding(folder: Path) -> str | None:
    """Return the name of the encoding whose vocabulary a Hugging Face folder has, None if it has no vocabulary.

    Ids and merges of tokenizer.json are compared; where there is none, those of vocab.json with merges.txt. Tokens may
    be added after the encoding's own ids ([PAD] at 50257). How the folder's tokenizer treats a text before it merges (a
    prefix space, a normaliser) changes no id's meaning and is not compared. r50k_base is called gpt2: their
    vocabularies are equal. An encoding is loaded only if the number of ids fits.

    Raises:
        UserError: an unknown vocabulary, a missing or damaged file; as tokenizer.load.
    """
    names = ("tokenizer.json", "vocab.json", "merges.txt", *UNSUPPORTED)
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
            more = folder / "added_tokens.json"
            added = json.loads(more.read_text(encoding="utf-8")) if more.is_file() else {}
            lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
            merges = [line for line in lines if not line.startswith(VERSION)]
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
        tokens = {token: int(n) for token, n in (vocab | added).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is damaged, or no byte-pair vocabulary: {type(error).__name__} {error}") from None
    for name, size in SIZES.items():
        ids = {token: n for token, n in tokens.items() if n < size}
        fits = len(ids) == size and not any(tokens[token] >= size for token in vocab)
        if fits and ids == _vocab(load(name)) and merges == _merges(load(name)):
            return name
    raise UserError(
        f"{file} holds a vocabulary that flatGPT does not have, so its ids would mean other text; "
        f"take a model with the vocabulary of {', '.join(SIZES)}"
    )


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
            k = min(range(len(parts) - 1), key=lambda k: ranks.get(parts[k] + parts[k + 1], math.inf))
            parts[k : k + 2] = [parts[k] + parts[k + 1]]
        if len(parts) == 2:
            merges.append(" ".join(map(_printable, parts)))
    return merges


def _printable(token: bytes) -> str:
    return "".join(BYTE_TO_CHAR[byte] for byte in token)


def _json(content: dict) -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode()
