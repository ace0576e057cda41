"""Read tokenizers from files: byte-level BPEs of Hugging Face and tiktoken, and nanoGPT's tables of characters.

read(Path("a/hugging/face/folder"))    # or tokenizer.json, vocab.json, merges.txt, NAME.tiktoken, meta.pkl
"""

from __future__ import annotations

import base64
import json
import pickle
import re
from pathlib import Path

import tiktoken

from config import UserError, first_line
from flatgpt.data.tokenizer import PATTERN, TOKENIZER_FILE, CharacterTokenizer, FileTokenizer, load, note_once
from flatgpt.data.tokenizer_files import CHAR_TO_BYTE, END_OF_TEXT, VERSION, merge_list

# Texts of the token between documents, if no file names it.
ENDS_OF_TEXT = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")
# n_vocab, so that only an encoding of the right size is loaded; r50k_base has the same vocabulary as gpt2
SIZES = {"byte": 257, "gpt2": 50_257, "p50k_base": 50_281, "p50k_edit": 50_284}
MAX_IDS = 65_536
UNSUPPORTED_FILES = {"vocab.txt": "WordPiece", "spiece.model": "SentencePiece", "tokenizer.model": "SentencePiece"}
CHARACTERS = "meta.pkl"  # nanoGPT's
REMEDY = "choose another tokenizer: gpt2, byte, or a byte-level BPE in Hugging Face's or tiktoken's format"
DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, OverflowError)


def read(path: Path) -> tiktoken.Encoding | None:
    """Return the tokenizer of a file or folder; None if a folder contains no tokenizer.

    A vocabulary without added tokens that equals that of a named encoding is that encoding.

    Args:
        path: a folder with Hugging Face's files, or one of them: tokenizer.json, or vocab.json or merges.txt, which
            belong together; a .tiktoken file, which is read with GPT-2's pattern; or nanoGPT's meta.pkl.

    Raises:
        UserError: the file is damaged, it is another kind of tokenizer, or it has more than 65,536 ids.
    """
    if path.is_dir():
        names = (TOKENIZER_FILE, "vocab.json", "merges.txt", *UNSUPPORTED_FILES, CHARACTERS)
        found = next((path / name for name in names if (path / name).is_file()), None)
        return found and read(found)
    if kind := UNSUPPORTED_FILES.get(path.name):
        raise UserError(f"{path}: {kind} tokenizers are not supported; {REMEDY}")
    name = path.parent.resolve().name if path.stem in ("tokenizer", "vocab", "merges", "meta") else path.stem
    if path.suffix == ".pkl":
        return read_characters(path, name)
    try:
        if path.suffix == ".tiktoken":
            rows = [line.split() for line in path.read_bytes().splitlines() if line]
            ranks = {base64.b64decode(token): int(rank) for token, rank in rows}
            special = {END_OF_TEXT: max(ranks.values()) + 1}
            return _known(_file_tokenizer(path, name, PATTERN, ranks, special, END_OF_TEXT))
        if path.name == TOKENIZER_FILE:
            return _known(read_json(path, name))
        folder = path.parent
        vocab, added = _read_object(folder / "vocab.json"), _read_object(folder / "added_tokens.json")
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        merges = [line for line in lines if line and not line.startswith(VERSION)]
        return _known(_from_vocabulary(path, name, vocab, merges, PATTERN, added, _end_of_text(folder)))
    except DAMAGED as error:
        raise _damaged(path, error) from None


def read_json(path: Path, name: str, end_of_text_id: int | None = None) -> FileTokenizer:
    """Return the tokenizer of a tokenizer.json. Its normalizer and prefix space are not applied, which a note says.

    Args:
        name: name of the tokenizer.
        end_of_text_id: the id that separates documents; NO_ID: none. None: that which the files beside it name as
            eos_token.

    Raises:
        UserError: as read.
    """
    try:
        content = path.read_bytes()
        data = json.loads(content)
        model, added = data["model"], {token["content"]: token for token in data.get("added_tokens") or ()}
        kind = model.get("type") or ("BPE" if "merges" in model else "unknown")
        if kind == "WordLevel" and all(len(token) == 1 for token in model["vocab"]):
            return CharacterTokenizer(name, _checked_ids(path, model["vocab"]), content)
        if kind == "BPE" and model.get("byte_fallback"):
            kind = "SentencePiece BPE"
        if kind != "BPE":
            raise UserError(f"{path}: {kind} tokenizers are not supported; {REMEDY}")
        pattern, prefix_space = _pattern(path, data.get("pre_tokenizer"))
        ignored = ["its prefix space"] * prefix_space
        ignored += [f"its normalizer ({data['normalizer']['type']})"] if data.get("normalizer") else []
        if ignored:
            note_once(f"note: {path}: {' and '.join(ignored)} is not applied: texts are encoded as they are")
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        ids = {text: token["id"] for text, token in added.items()}
        end = next((text for text, n in (model["vocab"] | ids).items() if n == end_of_text_id), None)
        end = _end_of_text(path.parent) if end_of_text_id is None else end
        rules = {text: rule for text, token in added.items() if (rule := _rule(token)) != re.escape(text)}
        return _from_vocabulary(path, name, model["vocab"], merges, pattern, ids, end, rules, content)
    except DAMAGED as error:
        raise _damaged(path, error) from None


def read_characters(path: Path, name: str) -> CharacterTokenizer:
    """Return the characters of nanoGPT's meta.pkl. Only dicts, strings and integers are unpickled.

    Raises:
        UserError: the pickle contains other objects, which could run arbitrary code, or has no characters.
    """

    class PlainUnpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> None:
            raise pickle.UnpicklingError(f"it contains {module}.{name}")

    try:
        with open(path, "rb") as file:
            ids = PlainUnpickler(file).load()["stoi"]
        if not all(len(char) == 1 for char in ids):
            raise ValueError("stoi has keys that are not characters")
        return CharacterTokenizer(name, _checked_ids(path, ids))
    except (*DAMAGED, pickle.UnpicklingError, EOFError, MemoryError) as error:
        raise UserError(f"{path} is not read: it is not nanoGPT's table of characters ({first_line(error)})") from None


def _checked_ids(path: Path, ids: dict[str, int]) -> dict[str, int]:
    """Return character ids if they are all the numbers from 0 on. Raise ValueError otherwise."""
    if len(ids) > MAX_IDS:
        raise UserError(f"{path}: its {len(ids):,} ids do not fit uint16 shards; {REMEDY}")
    if not ids or sorted(ids.values()) != [*range(len(ids))] or any(type(n) is not int for n in ids.values()):
        raise ValueError("ids are not the numbers from 0 on")
    return ids


def _from_vocabulary(
    path: Path,
    name: str,
    vocab: dict[str, int],
    merges: list[str],
    pattern: str,
    added: dict[str, int],
    end_of_text: str | None,
    rules: dict[str, str] | None = None,
    content: bytes = b"",
) -> FileTokenizer:
    """Return the tokenizer of Hugging Face's vocabulary and merges.

    Tokens that no merge forms, such as end-of-text in a vocab.json, are added tokens.
    """
    formed = {merge.replace(" ", "") for merge in merges}
    added = {token: n for token, n in vocab.items() if len(token) > 1 and token not in formed} | added
    if odd := next((token for token in vocab if token not in added and not {*token} <= CHAR_TO_BYTE.keys()), None):
        raise UserError(f"{path}: the token {odd!r:.60} is not of a byte-level BPE; {REMEDY}")
    tokens = {token: n for token, n in vocab.items() if token not in added}
    ranks = {bytes(map(CHAR_TO_BYTE.get, token)): n for token, n in tokens.items()}
    encoding = _file_tokenizer(path, name, pattern, ranks, added, end_of_text, rules, content)
    if merges != merge_list(encoding):
        raise UserError(f"{path}: its merges do not have the order of its ids, which tiktoken needs; {REMEDY}")
    return encoding


def _file_tokenizer(path: Path, name: str, pattern: str, ranks: dict, special: dict, *rest) -> FileTokenizer:
    """Return a FileTokenizer. Raise UserError if it has too many ids or lacks a byte."""
    if missing := {bytes([byte]) for byte in range(256)} - ranks.keys():
        raise UserError(f"{path}: it has no token for {len(missing)} of the 256 bytes; {REMEDY}")
    numbers = [*ranks.values(), *special.values()]
    if len({*numbers}) < len(numbers) or min(numbers) < 0:
        raise ValueError("two tokens have the same id, or one is negative")
    if max(numbers) >= MAX_IDS:
        raise UserError(f"{path}: its {max(numbers) + 1:,} ids do not fit uint16 shards; {REMEDY}")
    try:
        return FileTokenizer(name, pattern, ranks, special, *rest)
    except ValueError as error:  # of tiktoken
        raise UserError(f"{path}: its pattern {pattern!r:.200} is not supported ({first_line(error)})") from None


def _known(encoding: FileTokenizer) -> tiktoken.Encoding:
    """Return the named encoding that has the same ids, if there is one, otherwise the argument."""
    for name, size in SIZES.items():
        if encoding.n_vocab == size:  # load may download
            named = load(name)
            same = encoding._mergeable_ranks == named._mergeable_ranks
            same &= encoding._special_tokens == named._special_tokens
            if same and encoding._pat_str in (PATTERN, named._pat_str):
                return named
    return encoding


def _pattern(path: Path, pre_tokenizer: dict | None) -> tuple[str, bool]:
    """Return the regular expression of a pre-tokenizer, and whether it adds a space before the text."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    match steps:
        case [{"type": "ByteLevel"} as level] if level.get("use_regex", True):
            return PATTERN, level.get("add_prefix_space", True)
        case [{"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": regex}}, level]:
            if level and level.get("type") == "ByteLevel" and not level.get("use_regex", True):
                return regex, level.get("add_prefix_space", True)
    kinds = " and ".join(str((step or {}).get("type")) for step in steps)
    raise UserError(f"{path}: it splits words by {kinds}, which is not supported; {REMEDY}")


def _rule(token: dict) -> str:
    """Return the regular expression of an added token of tokenizer.json."""
    rule = re.escape(token["content"])
    rule = rf"(?<!\w){rule}(?!\w)" if token.get("single_word") else rule
    return r"\s*" * bool(token.get("lstrip")) + rule + r"\s*" * bool(token.get("rstrip"))


def _end_of_text(folder: Path) -> str | None:
    """Return the token between documents: the eos_token that a Hugging Face folder names, or a usual one."""
    vocabulary = _read_object(folder / TOKENIZER_FILE)
    ids = {token["content"]: token["id"] for token in vocabulary.get("added_tokens") or ()}
    ids |= _read_object(folder / "added_tokens.json")
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        named = _read_object(folder / file).get("eos_token")
        if named := named.get("content") if isinstance(named, dict) else named:
            return named
    number = _read_object(folder / "config.json").get("eos_token_id")
    named = [text for text, n in ids.items() if n == number]
    return next((text for text in (*named, *ENDS_OF_TEXT) if text in ids), None)


def _read_object(file: Path) -> dict:
    """Return the object in a JSON file; {} if there is no file."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is damaged or not a byte-pair vocabulary: {type(error).__name__} {error}")
