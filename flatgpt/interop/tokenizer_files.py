"""A tiktoken encoding as the tokenizer files of a Hugging Face GPT-2 folder, and which encoding such files hold.

files = tokenizer_files(tokenizer.load("gpt2"), context_length=1024)  # {"tokenizer.json": b"...", ...}
identify_encoding(Path("a/hugging/face/folder"))  # "gpt2", "byte", ...

tiktoken keeps a rank for each token and merges any two neighbours whose bytes together are a token. Hugging Face keeps
a list of pairs that may merge. Both come to the same ids: the parts of a token merge in one order wherever it stands,
so each token has one pair that makes it, and the pair's place in the list is the token's among the ranks.
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
# GPT-2's visible characters for the 256 bytes (bytes_to_unicode in OpenAI's encoder.py): a byte that Latin-1 prints
# stands for itself, the others for the characters from 256 on, in order. No file then holds a space or control code.
PRINTED = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
HIDDEN = [byte for byte in range(256) if byte not in PRINTED]
VISIBLE = {byte: chr(byte) for byte in PRINTED} | {byte: chr(256 + n) for n, byte in enumerate(HIDDEN)}
# n_vocab, known here so that only an encoding that may be the one is loaded; r50k_base's vocabulary is gpt2's
SIZES = {"byte": 257, "gpt2": 50_257, "p50k_base": 50_281, "p50k_edit": 50_284}
FOREIGN = ("vocab.txt", "spiece.model", "tokenizer.model")  # BERT's and SentencePiece's, which GPT-2 folders may have
LIMIT = 32 << 20  # bytes of a file that may be ours: transformers writes 3.6 MB for GPT-2
VERSION = "#version: 0.2"  # first line of merges.txt


def tokenizer_files(encoding: tiktoken.Encoding, context_length: int) -> dict[str, bytes]:
    """The files that transformers' AutoTokenizer, older readers and converters of GPT-2 want: {name: content}.

    GPT2Tokenizer's, byte-level BPE; ids are the encoding's, end-of-text is bos, eos and unk. Read back, they encode
    as `encode_ordinary` does, special tokens within a text as with allowed_special="all". What is a letter or a digit,
    each library's Unicode tables say; tiktoken 0.14 and tokenizers 0.23 agree on every code point. llama.cpp's
    converter knows a vocabulary by its ids for a certain text: GPT-2's is the only one here that it takes.

    Args:
        encoding: GPT-2's, one that shares its pattern (tokenizer.SAME_PATTERN), or `byte`.
        context_length: written as model_max_length, in tokens.

    Raises:
        UserError: an encoding of another pattern, which GPT2Tokenizer could not follow.
    """
    if encoding.name not in (*SAME_PATTERN, "byte"):
        raise UserError(
            f"tokenizer {encoding.name}: it cuts text by another pattern than GPT-2's, which Hugging Face's GPT-2 "
            f"tokenizer cannot follow; one of {', '.join((*SAME_PATTERN, 'byte'))} can be exported"
        )
    vocab, merges = _vocab(encoding), _merges(encoding)
    as_is = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    special = {
        number: {"content": token, **as_is} for token, number in vocab.items() if token in encoding.special_tokens_set
    }
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    ends = {"bos_token": END, "eos_token": END, "unk_token": END}
    backend = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, **token} for number, token in special.items()],
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
            "merges": merges,  # as text: tokenizers before 0.20 reads no pairs
        },
    }
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": context_length,
        **ends,
        "add_prefix_space": False,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,  # else transformers 4 decodes "a ." as "a."
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
    """The name of the encoding whose vocabulary a Hugging Face folder holds; None where it holds no vocabulary.

    Compared are ids and merges: of tokenizer.json, and of vocab.json with merges.txt, whichever are there. Added tokens
    may follow the encoding's own ids ([PAD] at 50257): those mean what they did, and our tokenizer never gives the
    others. How the folder's tokenizer treats a text before it merges (a prefix space, a normaliser) changes the meaning
    of no id and is not compared. Of r50k_base the name is gpt2: they are one vocabulary.

    An encoding is loaded (tokenizer.load) only where the number of ids fits.

    Raises:
        UserError: a vocabulary that is none of ours, half of one, two that differ, a damaged file; what `load` raises.
    """
    whole, vocab, merges, added = (
        folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json")
    )
    names = {}
    if whole.is_file():
        names[whole.name] = _name(whole, *_read(whole, _parts))
    if vocab.is_file() and merges.is_file():
        more = _read(added, _ids) if added.is_file() else {}
        names[vocab.name] = _name(vocab, _read(vocab, _ids), more, _read(merges, _lines))
    if len(set(names.values())) > 1:
        said = ", ".join(f"{file} is {name}'s" for file, name in names.items())
        raise UserError(f"{folder}: its tokenizer files disagree, {said}; copy the folder again")
    if names:
        return next(iter(names.values()))
    for file, other in ((vocab, merges), (merges, vocab)):
        if file.is_file():
            raise UserError(f"{other} is missing, without which {file.name} is half a vocabulary; copy it too")
    for name in FOREIGN:
        if (folder / name).is_file():
            raise _none_of_ours(folder / name)
    return None


def _vocab(encoding: tiktoken.Encoding) -> dict[str, int]:
    """{token: id} in the order of the ids: tokens in visible characters, special tokens as they are written."""
    ids = {_visible(token): encoding.encode_single_token(token) for token in encoding.token_byte_values()}
    ids |= {token: encoding.encode_single_token(token) for token in encoding.special_tokens_set}
    return dict(sorted(ids.items(), key=lambda item: item[1]))


@functools.cache  # half a second for GPT-2
def _merges(encoding: tiktoken.Encoding) -> list[str]:
    """The two tokens that make each token of several bytes, in the order of ranks: ["Ġ t", "Ġ a", "h e", ...]."""
    ranks = {token: encoding.encode_single_token(token) for token in encoding.token_byte_values()}
    merges = []
    for token in sorted(ranks, key=ranks.get):
        parts = [token[n : n + 1] for n in range(len(token))]
        while len(parts) > 2:
            joined = [ranks.get(left + right, math.inf) for left, right in itertools.pairwise(parts)]
            lowest = min(joined)
            assert lowest < math.inf, (encoding.name, token, parts)  # no text would give this token
            at = joined.index(lowest)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append(" ".join(map(_visible, parts)))
    return merges


def _visible(token: bytes) -> str:
    return "".join(VISIBLE[byte] for byte in token)


def _json(content: dict) -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode()


def _name(file: Path, vocab: dict[str, int], added: dict[str, int], merges: list[str]) -> str:
    """The encoding of these ids and merges; of the added tokens, those beyond its ids do not count."""
    tokens = vocab | added
    for name, size in SIZES.items():
        ids = {token: number for token, number in tokens.items() if number < size}
        if len(ids) == size and max(vocab.values(), default=-1) < size:
            encoding = load(name)
            only_added = ids.keys() - vocab.keys()  # they stand for what is written: Ġ for itself, not for a blank
            if ids == _vocab(encoding) and only_added <= encoding.special_tokens_set and merges == _merges(encoding):
                return name
    raise _none_of_ours(file)


def _none_of_ours(file: Path) -> UserError:
    return UserError(
        f"{file} holds a vocabulary that flatGPT does not have, so its ids would mean other text; "
        f"take a model with the vocabulary of {', '.join(SIZES)}"
    )


def _read(file: Path, parse: Callable) -> Any:
    """What parse(text of the file) gives; UserError where it cannot make sense of it."""
    if file.stat().st_size > LIMIT:
        raise _none_of_ours(file)
    try:
        answer = parse(file.read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as why:
        raise UserError(f"{file} is damaged: {type(why).__name__} {why}; copy it again") from None
    if answer is None:
        raise _none_of_ours(file)
    return answer


def _parts(text: str) -> tuple[dict[str, int], dict[str, int], list[str]] | None:
    """Vocabulary, added tokens and merges of a tokenizer.json; None of another kind than byte-pair encoding."""
    content = json.loads(text)
    model = content["model"]
    if model.get("type", "BPE") != "BPE":
        return None
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    return _checked(model["vocab"]), _checked(added), merges


def _ids(text: str) -> dict[str, int]:
    return _checked(json.loads(text))


def _checked(ids: object) -> dict[str, int]:
    if not isinstance(ids, dict) or not all(type(number) is int for number in ids.values()):
        raise ValueError("whole numbers by token are expected")
    return ids


def _lines(text: str) -> list[str]:
    """The merges of a merges.txt."""
    return [line for line in text.splitlines() if not line.startswith("#version")]
